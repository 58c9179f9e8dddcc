//! What the real engine hears: word error rates on the test calls, times of words, other formats.

use std::collections::BTreeMap;

use crate::support::*;
use voxfleet_schema::{
    session::{Channels, SessionOptions},
    transcript::{Segment, WordTiming},
};
use voxfleet_worker::{engine::vad::Energy, ipc::StartPoint};

#[test]
fn formats_say_the_same() {
    let samples = first_seconds(5, 12);
    let floats = as_f32(&samples);
    let upsampled = |factor: usize| -> Vec<f32> {
        // Linear interpolation is good enough to carry speech.
        let next = floats.iter().skip(1).chain([&0.0]);
        floats
            .iter()
            .zip(next)
            .flat_map(|(a, b)| (0..factor).map(move |n| a + (b - a) * n as f32 / factor as f32))
            .collect()
    };
    let mut at_44100 = Vec::new();
    for n in 0..(samples.len() as u64 * 441).div_ceil(160) {
        let at = n as f64 * 160.0 / 441.0;
        let (index, share) = (at as usize, at.fract() as f32);
        let sample = |index: usize| floats.get(index).copied().unwrap_or(0.0);
        at_44100.push(sample(index) + (sample(index + 1) - sample(index)) * share);
    }
    // Left speaks, right is silent: the mix is half as loud.
    let stereo: Vec<i16> = samples.iter().flat_map(|s| [*s, 0]).collect();
    let cases: Vec<(&str, Vec<u8>, usize)> = vec![
        ("pcm_f32le;rate=16000;channels=1", bytes_f32(&floats), 4),
        ("pcm_f32le;rate=48000;channels=1", bytes_f32(&upsampled(3)), 4),
        ("pcm_f32le;rate=44100;channels=1", bytes_f32(&at_44100), 4),
        ("pcm_f32le;rate=192000;channels=1", bytes_f32(&upsampled(12)), 4),
        ("pcm_s16le;rate=16000;channels=2", bytes_s16(&stereo), 4),
    ];
    let vads = detectors().pop().expect("a detector");
    let mut recognizer = Remembering::new(&whisper());
    let expected = text(&finals(&log_16k(&samples, 200), &mut recognizer, vads.as_ref()));
    for (format, bytes, frame) in &cases {
        let log = log_of(bytes, format, 1_000 * frame);
        let all = finals(&log, &mut recognizer, vads.as_ref());
        assert_chain(&all, samples.len() as u64);
        let (errors, words) = word_errors(&expected, &text(&all));
        assert!(words > 20 && errors * 20 <= words, "{format}: {errors} of {words} words differ");
    }
}

#[test]
fn the_micro_model_hears_the_calls() {
    let best = detectors().pop().expect("a detector");
    for vads in detectors() {
        let mut recognizer = Remembering::new(&whisper());
        // Both detectors on a plain call and on the one where two people speak at once, the better one on all.
        let calls: &[u32] = if vads.kind() == best.kind() { &[1, 2, 3, 4, 5] } else { &[1, 3] };
        for &number in calls {
            let all = finals(&log_16k(&call(number), 200), &mut recognizer, vads.as_ref());
            let (errors, words) = word_errors(&reference(number), &text(&all));
            println!(
                "call {number} with {}: {errors} errors in {words} words, {} finals",
                vads.kind().as_str(),
                all.len()
            );
            let allowed = if number == 3 { words / 10 } else { words / 50 };
            assert!(errors <= allowed, "call {number} with {}: {errors} of {words}", vads.kind().as_str());
        }
    }
}

#[test]
fn words_lie_inside_their_segments_and_near_the_truth() {
    let described: serde_json::Value = {
        let text = std::fs::read_to_string(root().join("tests/audio/call-01.json")).expect("description");
        serde_json::from_str(&text).expect("json")
    };
    let truth: Vec<(String, f64)> = described["turns"]
        .as_array()
        .expect("turns")
        .iter()
        .flat_map(|t| t["words"].as_array().expect("words"))
        .map(|w| (w["word"].as_str().expect("word").to_owned(), w["start"].as_f64().expect("start") * 1_000.0))
        .collect();
    let vads = detectors().pop().expect("a detector");
    let all = finals(&log_16k(&call(1), 200), &mut Remembering::new(&whisper()), vads.as_ref());
    let mut off = Vec::new();
    for f in &all {
        assert!(f.segments.is_empty() || f.timings.word_timing == Some(WordTiming::TokenEstimate));
        for segment in &f.segments {
            assert!(segment.start_ms * 16 + 16 > f.from_sample && segment.end_ms * 16 <= f.to_sample + 16);
            assert!(segment.confidence > 0.3 && segment.confidence <= 1.0, "{segment:?}");
            let spoken: Vec<&str> = segment.words.iter().map(|w| w.text.as_str()).collect();
            assert_eq!(spoken.join(" "), segment.text);
            for (word, next) in segment.words.iter().zip(segment.words.iter().skip(1)) {
                assert!(word.start_ms <= word.end_ms && word.end_ms <= next.start_ms, "{word:?} {next:?}");
            }
            for word in &segment.words {
                assert!(word.start_ms >= segment.start_ms && word.end_ms <= segment.end_ms);
                let same =
                    truth.iter().filter(|(w, _)| *w == word.text).map(|(_, at)| (at - word.start_ms as f64).abs());
                off.push(same.fold(f64::INFINITY, f64::min));
            }
        }
    }
    off.sort_by(f64::total_cmp);
    assert!(off.len() > 80, "{} words", off.len());
    let median = off[off.len() / 2];
    println!("word starts are off by {median:.0} ms (median), {:.0} ms (nine in ten)", off[off.len() * 9 / 10]);
    assert!(median < 200.0, "median {median} ms");
}

#[test]
fn a_prompt_and_hotwords_do_no_harm() {
    let options = SessionOptions {
        hotwords: vec!["lucy".to_owned(), "carpet".to_owned()],
        prompt: Some("a call to a delivery company".to_owned()),
        ..SessionOptions::default()
    };
    let vads = Energy;
    let mut state = whisper().state().expect("state");
    let log = log_16k(&first_seconds(2, 12), 200);
    let all = finals_with(&log, &options, StartPoint::beginning(), state.as_mut(), &vads);
    let plain = finals(&log, &mut Remembering::new(&whisper()), &vads);
    let (errors, words) = word_errors(&text(&plain), &text(&all));
    assert!(words > 20 && errors * 10 <= words, "{errors} of {words}");
}

/// Both sides of the first call, the agent on the left: who said which words, by the description of the call.
fn said_in_stereo() -> BTreeMap<String, Vec<String>> {
    let text = std::fs::read_to_string(root().join("tests/audio/call-01.json")).expect("description");
    let described: serde_json::Value = serde_json::from_str(&text).expect("json");
    let mut said: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for turn in described["turns"].as_array().expect("turns") {
        let words = said.entry(turn["speaker"].as_str().expect("speaker").to_owned()).or_default();
        words.extend(turn["text"].as_str().expect("text").split_whitespace().map(str::to_owned));
    }
    said
}

fn split(endpoint_ms: u32) -> SessionOptions {
    let channel_names = vec!["agent".to_owned(), "customer".to_owned()];
    SessionOptions { channels: Channels::Split, channel_names, endpoint_ms, ..SessionOptions::default() }
}

#[test]
fn a_stereo_call_says_who_said_what() {
    let log = log_of(&bytes_s16(&audio("call-01-stereo.flac")), "pcm_s16le;rate=16000;channels=2", 12_800);
    for vads in detectors() {
        let mut recognizer = Remembering::new(&whisper());
        // With a pause that nobody makes, several turns of both stand in one final.
        for endpoint_ms in [500, 1_500] {
            let name = format!("{} with {endpoint_ms} ms", vads.kind().as_str());
            let all = finals_with(&log, &split(endpoint_ms), StartPoint::beginning(), &mut recognizer, vads.as_ref());
            let segments: Vec<&Segment> = all.iter().flat_map(|f| &f.segments).collect();
            for (channel, (speaker, said)) in (0..).zip(said_in_stereo()) {
                let of_channel = segments.iter().filter(|s| s.channel == Some(channel));
                let heard: Vec<&str> = of_channel.flat_map(|s| s.words.iter().map(|w| w.text.as_str())).collect();
                let (errors, words) = word_errors(&said.join(" "), &heard.join(" "));
                assert!(errors == 0 && words >= 40, "{name}, {speaker}: {errors} of {words}: {}", heard.join(" "));
            }
            for segment in &segments {
                let speaker = ["agent", "customer"][usize::from(segment.channel.expect("channel"))];
                assert_eq!(segment.speaker.as_deref(), Some(speaker));
                assert!(segment.words.iter().all(|w| w.speaker.as_deref() == Some(speaker)), "{segment:?}");
            }
            println!("{name}: {} finals, {} segments", all.len(), segments.len());
        }
    }
}
