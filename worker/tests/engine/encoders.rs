//! Speaker encoders of every interface that is known, from files of `worker/tests/encoders/make.py`.

use std::path::{Path, PathBuf};

use voxfleet_diarize::fbank::{Extractor, FrontEnd};
use voxfleet_worker::engine::{
    Cancel,
    diarize::{DiarizeConfig, Hearing, Listener},
};

use crate::support::onnxruntime;

const DIMS: usize = 8;
const FRAMES: usize = 98;

fn config(encoder: &str) -> DiarizeConfig {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/encoders");
    DiarizeConfig { encoder: Some(Path::new(folder).join(encoder)), ..DiarizeConfig::default() }
}

fn library() -> Option<PathBuf> {
    onnxruntime().inspect_err(|why| println!("skipped: encoders, {why}")).ok()
}

/// A second of noise that swells.
fn second() -> Vec<f32> {
    let mut dice = 0x2545_f491u32;
    let mut noise = || {
        dice ^= dice << 13;
        dice ^= dice >> 17;
        dice ^= dice << 5;
        dice as f32 / u32::MAX as f32 - 0.5
    };
    (0..16_000).map(|n| noise() * (n as f32 / 16_000.0)).collect()
}

/// What the networks of `make.py` say of features, at length 1.
fn expected(front_end: FrontEnd, samples: &[f32]) -> Vec<f32> {
    let mut features = Extractor::new(front_end).features(samples).select(std::slice::from_ref(&(0..FRAMES)));
    front_end.normalise(&mut features);
    let greatest: Vec<f32> = (0..features.bins())
        .map(|bin| (0..features.frames()).map(|t| features.frame(t)[bin]).fold(f32::NEG_INFINITY, f32::max))
        .collect();
    let weight = |band: usize, number: usize| ((7 * band + 3 * number) % 11) as f32 / 5.0 - 1.0;
    let vector: Vec<f32> =
        (0..DIMS).map(|number| greatest.iter().enumerate().map(|(band, x)| x * weight(band, number)).sum()).collect();
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    vector.iter().map(|x| x / length).collect()
}

#[test]
fn each_kind_of_encoder_gets_the_features_it_was_trained_on() {
    let Some(library) = library() else { return };
    let samples = second();
    let mut names = Vec::new();
    for (file, front_end) in
        [("wespeaker.onnx", FrontEnd::Kaldi { bins: 80 }), ("nemo.onnx", FrontEnd::Nemo { bins: 80 })]
    {
        let mut listener = Listener::open(&config(file), Some(&library)).expect(file);
        let whole = 0..samples.len() as u64;
        let hearing = Hearing {
            index: 0,
            samples: samples.clone(),
            from_sample: 0,
            speech: vec![whole],
            patient: true,
            waited_ms: 0,
        };
        let heard = listener.hear(&hearing, &Cancel::default()).expect(file);
        let [piece] = &heard.voiced[..] else { panic!("{file}: {:?}", heard.voiced) };
        let found = piece.embedding.as_ref().expect("heard");
        let expected = expected(front_end, &samples);
        assert_eq!(found.len(), DIMS, "{file}");
        let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-4, "{file}: {found:?} instead of {expected:?}");
        names.push(heard.encoder);
    }
    assert_ne!(names[0], names[1], "vectors of two encoders are never compared");
}

#[test]
fn the_distance_that_somebody_chose_is_part_of_an_encoders_name() {
    let Some(library) = library() else { return };
    let name = |distance_percent| {
        let config = DiarizeConfig { distance_percent, ..config("wespeaker.onnx") };
        let mut listener = Listener::open(&config, Some(&library)).expect("opened");
        let hearing =
            Hearing { index: 0, samples: second(), from_sample: 0, speech: Vec::new(), patient: true, waited_ms: 0 };
        listener.hear(&hearing, &Cancel::default()).expect("heard").encoder
    };
    assert_eq!(name(Some(45)), format!("{}/45", name(None)));
}

#[test]
fn what_is_no_encoder_is_refused_with_a_reason() {
    let Some(library) = library() else { return };
    for (file, why) in
        [("three_inputs.onnx", "3 inputs"), ("make.py", "loading the model"), ("nobody.onnx", "No such file")]
    {
        let error = Listener::open(&config(file), Some(&library)).err().expect(file);
        assert!(error.starts_with("speaker encoder: ") && error.contains(why), "{error}");
    }
}
