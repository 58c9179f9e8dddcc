//! The segmentation network by itself, without voices: windows of ten seconds one behind the other, each frame's likeliest
//! class, and in each window the best mapping of its local speakers to those of the reference. No collar, overlap is scored.
//! What it gets wrong here nothing behind it can mend.

use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use voxfleet_diarize::{
    RATE_HZ,
    models::Segmenter,
    powerset::{self, LOCAL},
    windows::WINDOW,
};
use voxfleet_eval::{
    Turn,
    der::{self, Der},
};

use super::{rounded, sets::Recording};

/// The row of a set.
pub(super) fn row(set: &str, recordings: &[Recording], segmenter: &mut dyn Segmenter) -> Result<Value> {
    let mut sum = Der::default();
    let mut windows = 0;
    for recording in recordings {
        let samples = recording.at_16k()?;
        for (index, window) in samples.chunks(WINDOW).enumerate() {
            let mut filled = window.to_vec();
            filled.resize(WINDOW, 0.0);
            let logits = segmenter.logits(&filled).map_err(|error| anyhow!("{error}"))?;
            let active: Vec<[bool; LOCAL]> = logits.iter().map(powerset::decided).collect();
            let from = index * WINDOW;
            let options = der::Options {
                regions: Some(vec![(seconds(from), seconds(from + window.len()))]),
                ..der::Options::default()
            };
            sum += der::score(&recording.turns, &turns(&active, from, window.len()), &options);
            windows += 1;
        }
    }
    let share = |seconds: f64| rounded(seconds / sum.total_s.max(f64::MIN_POSITIVE));
    Ok(json!({
        "set": set,
        "der": rounded(sum.rate()),
        "confusion": share(sum.confusion_s),
        "missed": share(sum.missed_s),
        "false_alarm": share(sum.false_alarm_s),
        "recordings": recordings.len(),
        "windows": windows,
        "scored": "in each window of 10 s the best mapping of its local speakers",
    }))
}

fn seconds(sample: usize) -> f64 {
    sample as f64 / f64::from(RATE_HZ)
}

/// Turns of a window's local speakers; a frame lasts until half-way to the next.
fn turns(active: &[[bool; LOCAL]], from: usize, samples: usize) -> Vec<Turn> {
    let boundary = |frame: usize| if frame >= active.len() { samples } else { powerset::boundary(frame).min(samples) };
    let mut turns = Vec::new();
    for local in 0..LOCAL {
        let mut since = None;
        for frame in 0..=active.len() {
            match (since, active.get(frame).is_some_and(|frame| frame[local])) {
                (None, true) => since = Some(frame),
                (Some(first), false) => {
                    let (start_s, end_s) = (seconds(from + boundary(first)), seconds(from + boundary(frame)));
                    turns.push(Turn { start_s, end_s, speaker: local.to_string() });
                    since = None;
                }
                _ => {}
            }
        }
    }
    turns
}

#[cfg(test)]
mod tests {
    use voxfleet_diarize::{models::ModelError, powerset::CLASSES};

    use super::*;

    /// Says that one speaks in the first half of a window and another in the second, and numbers them the other way round each
    /// time.
    struct Swapping(usize);

    impl Segmenter for Swapping {
        fn logits(&mut self, samples: &[f32]) -> Result<Vec<[f32; CLASSES]>, ModelError> {
            assert_eq!(samples.len(), WINDOW);
            self.0 += 1;
            let frames = powerset::frames(samples.len());
            let class = |frame: usize| 1 + usize::from((frame < frames / 2) == self.0.is_multiple_of(2));
            Ok((0..frames).map(|f| std::array::from_fn(|c| if c == class(f) { 0.0 } else { -9.0 })).collect())
        }
    }

    #[test]
    fn local_speakers_are_mapped_window_by_window() {
        let turn = |start_s: f64, who: &str| Turn { start_s, end_s: start_s + 5.0, speaker: who.to_owned() };
        let reference = [turn(0.0, "a"), turn(5.0, "b"), turn(10.0, "a"), turn(15.0, "b"), turn(20.0, "a")];
        let recordings = [Recording::of(vec![0; 25 * 16_000], reference.to_vec())];
        let row = row("x", &recordings, &mut Swapping(0)).expect("a row");
        // The last window is half as long: who "speaks" in its second half is outside of what is scored.
        assert!(row["der"].as_f64().is_some_and(|der| der < 0.01) && row["windows"] == 3, "{row}");
        let wrong = [Recording::of(vec![0; 20 * 16_000], vec![turn(0.0, "a"), turn(12.5, "b")])];
        let der = super::row("x", &wrong, &mut Swapping(0)).expect("a row")["der"].as_f64();
        // Of ten seconds 2.5 are given to somebody else, and ten more are nobody's.
        assert!(der.is_some_and(|der| (der - 1.25).abs() < 0.01), "{der:?}");
    }
}
