//! The filterbanks against what their makers compute.
//!
//! `data/fbank_reference.json` holds values of kaldi-native-fbank; `data/nemo_reference.json` those of librosa's filters
//! and short-time transform with NeMo's settings. Both are of one signal made of integers, rebuilt here.

use serde_json::Value;
use voxfleet_diarize::fbank::{Extractor, Features, FrontEnd};

/// The signal that the reference describes, in 16-bit steps.
fn signal() -> Vec<i64> {
    let triangle = |p: i64| if p < 32_768 { 2 * p - 32_768 } else { 98_303 - 2 * p };
    let (mut noise, mut a, mut b) = (12_345u32, 0i64, 32_768i64);
    (0..8_000)
        .map(|n| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            a = (a + 400 + (n >> 1)) % 65_536;
            b = (b + 20_000 - 2 * n).rem_euclid(65_536);
            (triangle(a) >> 2) + (triangle(b) >> 3) + ((i64::from(noise >> 16) - 32_768) >> 6) + 300
        })
        .collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn assert_close(ours: &[f32], theirs: &Value, what: &str) {
    let theirs = numbers(theirs);
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (bin, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        assert!((f64::from(*ours) - theirs).abs() < 1e-3, "{what}, bin {bin}: {ours} and {theirs}");
    }
}

fn assert_agrees(reference: &str, front_end: FrontEnd, normalised: bool) {
    let reference: Value = serde_json::from_str(reference).unwrap();
    let signal = signal();
    assert_eq!(signal.iter().sum::<i64>(), reference["sum_of_samples"].as_i64().unwrap());
    let samples: Vec<f32> = signal.iter().map(|s| *s as f32 / 32_768.0).collect();
    let mut features = Extractor::new(front_end).features(&samples);
    if normalised {
        front_end.normalise(&mut features);
    }
    assert_eq!(features.frames(), reference["frames"].as_u64().unwrap() as usize);
    for (frame, values) in reference["shown"].as_object().unwrap() {
        assert_close(features.frame(frame.parse().unwrap()), values, &format!("frame {frame}"));
    }
    if !normalised {
        assert_close(&means(&features), &reference["mean_per_bin"], "means");
    }
}

fn means(features: &Features) -> Vec<f32> {
    let mut means = vec![0f32; features.bins()];
    for frame in 0..features.frames() {
        means.iter_mut().zip(features.frame(frame)).for_each(|(m, x)| *m += x / features.frames() as f32);
    }
    means
}

#[test]
fn kaldis_filterbank_is_kaldis() {
    let reference = include_str!("data/fbank_reference.json");
    assert_agrees(reference, FrontEnd::Kaldi { bins: 80 }, false);
    let reference: Value = serde_json::from_str(reference).unwrap();
    let silence = Extractor::new(FrontEnd::Kaldi { bins: 80 }).features(&[0.0; 400]);
    assert_close(silence.frame(0), &vec![reference["silence"].clone(); 80].into(), "silence");
}

#[test]
fn nemos_filterbank_is_nemos() {
    assert_agrees(include_str!("data/nemo_reference.json"), FrontEnd::Nemo { bins: 80 }, true);
}
