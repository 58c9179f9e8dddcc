//! Who says what: the engine with its listener, called directly on the test calls.

use std::path::{Path, PathBuf};

use voxfleet_schema::{
    session::{Diarize, SessionOptions},
    transcript::{SpeakersBy, Word},
};
use voxfleet_worker::{
    engine::{
        diarize::{DiarizeConfig, Listener, reconsidered},
        direct::transcribe_with_speakers,
    },
    ipc::{FinalDraft, StartPoint},
};

use crate::support::*;

fn asked() -> SessionOptions {
    SessionOptions { diarize: Diarize::On, ..SessionOptions::default() }
}

/// The segmentation network of the test data.
fn segmentation() -> Option<PathBuf> {
    let data = std::env::var_os("VOXFLEET_TEST_DATA").map_or_else(|| root().join("../shared/data"), PathBuf::from);
    let file = data.join("models/pyannote-segmentation-3.0.fp32.onnx");
    if !file.is_file() {
        println!("skipped: everything with segmentation, {} is not there", file.display());
        return None;
    }
    Some(file)
}

/// With segmentation, where it is there, and without.
fn ways() -> Vec<DiarizeConfig> {
    let by = |segmentation| DiarizeConfig { segmentation, encoder: None, ..DiarizeConfig::default() };
    segmentation().map(|file| by(Some(file))).into_iter().chain([by(None)]).collect()
}

fn library() -> Option<PathBuf> {
    match onnxruntime() {
        Ok(library) => Some(library),
        Err(why) => {
            println!("skipped: speakers, {why}");
            None
        }
    }
}

fn told(number: u32, config: &DiarizeConfig, library: &Path, start: Option<StartPoint>) -> Vec<FinalDraft> {
    let mut listener = Listener::open(config, Some(library)).expect("a listener");
    let vads = detectors().pop().expect("a detector");
    let mut recognizer = Remembering::new(&whisper());
    let log = log_16k(&call(number), 200);
    let start = start.unwrap_or_else(StartPoint::beginning);
    transcribe_with_speakers(&log, &asked(), start, &mut recognizer, vads.as_ref(), Some(&mut listener), None)
        .expect("transcribed")
}

/// Name and times of each word of a call, in seconds.
fn truth(number: u32) -> Vec<(String, f64, f64)> {
    let text = std::fs::read_to_string(root().join(format!("tests/audio/call-{number:02}.json"))).expect("description");
    let described: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let turns = described["turns"].as_array().expect("turns");
    let words =
        turns.iter().flat_map(|turn| {
            let name = turn["speaker"].as_str().expect("speaker").to_owned();
            turn["words"].as_array().expect("words").iter().map(move |word| {
                (name.clone(), word["start"].as_f64().expect("start"), word["end"].as_f64().expect("end"))
            })
        });
    words.collect()
}

/// Who is meant by a label: whoever says most under it. Then words under the wrong name, and all words.
fn wrong_words(finals: &[FinalDraft], truth: &[(String, f64, f64)]) -> (usize, usize) {
    let words: Vec<&Word> = finals.iter().flat_map(|f| &f.segments).flat_map(|s| &s.words).collect();
    let who = |word: &Word| {
        let middle = (word.start_ms + word.end_ms) as f64 / 2_000.0;
        let distance = |(_, start, end): &(String, f64, f64)| (start - middle).max(middle - end).max(0.0);
        let near = truth.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).expect("words");
        near.0.clone()
    };
    let mut counts: std::collections::BTreeMap<(Option<&String>, String), usize> = Default::default();
    for word in &words {
        *counts.entry((word.speaker.as_ref(), who(word))).or_default() += 1;
    }
    let mut right = 0;
    for label in words.iter().filter_map(|w| w.speaker.as_ref()).collect::<std::collections::BTreeSet<_>>() {
        right += counts.iter().filter(|((l, _), _)| *l == Some(label)).map(|(_, n)| *n).max().unwrap_or(0);
    }
    (words.len() - right, words.len())
}

#[test]
fn words_of_the_calls_belong_to_who_says_them() {
    let Some(library) = library() else { return };
    for config in ways() {
        for number in 1..=5 {
            // As it stands at the end of a call.
            let finals = reconsidered(told(number, &config, &library, None), &asked());
            let (wrong, words) = wrong_words(&finals, &truth(number));
            let names = finals.iter().flat_map(|f| &f.turns).map(|turn| turn.speaker.as_str());
            let labels = names.collect::<std::collections::BTreeSet<_>>().len();
            let by = finals.iter().filter_map(|f| f.speakers.as_ref()).map(|s| s.by).next();
            println!("call {number} by {by:?}: {wrong} of {words} words under the wrong name, {labels} labels");
            let expected = if config.segmentation.is_some() { SpeakersBy::Segmentation } else { SpeakersBy::Changes };
            assert_eq!(by, Some(expected));
            // In call 03 somebody speaks over somebody else.
            let allowed = if number == 3 { words / 6 } else { words / 20 };
            // Without segmentation two who speak at once sound like somebody else.
            let most = if number == 3 && config.segmentation.is_none() { 3 } else { 2 };
            assert!(wrong <= allowed && (2..=most).contains(&labels), "call {number} by {by:?}");
        }
    }
}

#[test]
fn a_restart_behind_any_final_changes_no_label() {
    let Some(library) = library() else { return };
    let config = ways().swap_remove(0);
    let whole = told(2, &config, &library, None);
    assert!(whole.len() > 4 && whole.iter().any(|f| !f.turns.is_empty()));
    for index in 0..whole.len() - 1 {
        let rest = told(2, &config, &library, Some(after(&whole, index)));
        assert_eq!(timeless(&rest), timeless(&whole[index + 1..]), "behind final {index}");
    }
    // Without its checkpoint it says so, and no label is given to somebody else.
    let shown = whole[2].speakers.clone().expect("speakers").labels;
    let mut start = after(&whole, 2);
    start.checkpoint = Default::default();
    let rest = told(2, &config, &library, Some(start));
    let spoken: Vec<_> = rest.iter().filter(|f| !f.turns.is_empty()).collect();
    assert!(spoken[0].speakers.as_ref().is_some_and(|s| s.afresh), "{:?}", spoken[0].speakers);
    assert!(spoken[1..].iter().all(|f| f.speakers.as_ref().is_some_and(|s| !s.afresh)));
    let number = |name: &str| name[1..].parse::<u32>().expect("a label");
    assert!(spoken.iter().flat_map(|f| &f.turns).all(|turn| number(&turn.speaker) > shown));
}

#[test]
fn what_cannot_listen_says_why() {
    let Some(library) = library() else { return };
    let nothing = DiarizeConfig { encoder: Some(root().join("README.md")), ..DiarizeConfig::default() };
    let error = Listener::open(&nothing, Some(&library)).err().expect("no encoder");
    assert!(error.contains("speaker encoder"), "{error}");
    let odd = DiarizeConfig { segmentation: Some(root().join("README.md")), ..DiarizeConfig::default() };
    assert!(Listener::open(&odd, Some(&library)).is_ok(), "voices are told apart by changes then");
    assert!(Listener::open(&DiarizeConfig::default(), None).is_err());
}
