//! Speech probabilities -> where finals end. Pure; positions are session samples.

use voxfleet_schema::PREROLL_SAMPLES;

use crate::engine::VAD_FRAME;

const FRAME: u64 = VAD_FRAME as u64;

/// Speech begins at this probability (Silero's own default) ...
const ONSET: f32 = 0.5;
/// ... and goes on above this one, so that a weak syllable does not end it.
const HOLD: f32 = 0.35;
/// Fewer speech frames than this (96 ms) are a click, not a word.
const MIN_SPEECH_FRAMES: u32 = 3;
/// Kept before and after speech for the recognizer, 150 ms: the detector hears onsets a little late.
const PADDING: u64 = 2_400;
/// Where a full window may be cut: somewhere in its last five seconds.
const CUT_SEARCH_FRAMES: usize = (5 * 16_000) / VAD_FRAME;
/// Whisper hears 30 s at once; two seconds stay free for padding.
const MAX_WINDOW: u64 = 28 * 16_000;
/// Silence is committed after this long, so that a quiet session stays cheap to resume.
const MAX_SILENCE: u64 = 30 * 16_000;
/// Most input frames a window or a silence may span: 16 MiB as f32. Reached before the limits above only over 140 kHz.
const MAX_FRAMES: u64 = 4 * 1024 * 1024;

/// Limits of one stretch, from the session's options and the input rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    endpoint: u64,
    window: u64,
    silence: u64,
}

impl Limits {
    pub(super) fn new(endpoint_ms: u32, rate_hz: u32) -> Self {
        let frames = MAX_FRAMES * 16_000 / u64::from(rate_hz);
        Self { endpoint: u64::from(endpoint_ms) * 16, window: MAX_WINDOW.min(frames), silence: MAX_SILENCE.min(frames) }
    }
}

/// Why a final ends where it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// Silence after speech.
    Endpoint(u64),
    /// The window is full.
    Full(u64),
    /// Long silence.
    Quiet(u64),
}

#[derive(Debug)]
struct Utterance {
    start: u64,
    end: u64,
    speech_frames: u32,
}

/// Follows the frames of one stretch: from half a second before `from` to its cut.
#[derive(Debug)]
pub(super) struct Endpointer {
    /// First sample the next final covers; frames that end before it only warm up the state.
    from: u64,
    /// End of the last frame heard.
    at: u64,
    speaking: bool,
    utterance: Option<Utterance>,
    /// Probability and start of the latest frames of the utterance.
    recent: std::collections::VecDeque<(f32, u64)>,
}

impl Endpointer {
    /// `base` is where the first frame begins.
    pub(super) fn new(from: u64, base: u64) -> Self {
        Self { from, at: base, speaking: false, utterance: None, recent: std::collections::VecDeque::new() }
    }

    /// Speech so far that a recognizer should hear, with padding, inside `from..limit`.
    pub(super) fn speech(&self, limit: u64) -> Option<std::ops::Range<u64>> {
        let utterance = self.utterance.as_ref().filter(|u| u.speech_frames >= MIN_SPEECH_FRAMES)?;
        let start = utterance.start.saturating_sub(PADDING).max(self.from);
        let end = (utterance.end + PADDING).min(limit);
        (start < end).then_some(start..end)
    }

    /// The frame pushed last, where it is speech.
    pub(super) fn speaks(&self) -> Option<std::ops::Range<u64>> {
        self.speaking.then(|| self.at - FRAME..self.at)
    }

    /// Takes the next frame.
    pub(super) fn push(&mut self, probability: f32, limits: Limits) -> Option<Cut> {
        let start = self.at;
        self.at += FRAME;
        self.speaking = probability >= ONSET || (self.speaking && probability >= HOLD);
        if self.at <= self.from {
            return None;
        }
        if self.speaking {
            let utterance =
                self.utterance.get_or_insert(Utterance { start: start.max(self.from), end: 0, speech_frames: 0 });
            utterance.end = self.at;
            utterance.speech_frames += 1;
        }
        let Some(utterance) = &self.utterance else {
            // Half a second stays uncommitted: an onset that is just beginning keeps its padding.
            return (self.at - self.from >= limits.silence).then(|| Cut::Quiet(self.at - PREROLL_SAMPLES));
        };
        if self.at - utterance.end >= limits.endpoint {
            if utterance.speech_frames >= MIN_SPEECH_FRAMES {
                return Some(Cut::Endpoint(self.at));
            }
            self.utterance = None;
            self.recent.clear();
            return None;
        }
        if self.recent.len() == CUT_SEARCH_FRAMES {
            self.recent.pop_front();
        }
        self.recent.push_back((probability, start));
        if self.at - utterance.start.saturating_sub(PADDING).max(self.from) < limits.window {
            return None;
        }
        let quietest = self.recent.iter().rev().min_by(|a, b| a.0.total_cmp(&b.0));
        Some(Cut::Full(quietest.map_or(self.at, |(_, start)| (start + FRAME / 2).max(self.from + 1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(from: u64, base: u64, probabilities: impl IntoIterator<Item = f32>) -> (Endpointer, Option<Cut>) {
        let mut endpointer = Endpointer::new(from, base);
        let limits = Limits::new(500, 16_000);
        for probability in probabilities {
            if let Some(cut) = endpointer.push(probability, limits) {
                return (endpointer, Some(cut));
            }
        }
        (endpointer, None)
    }

    fn frames(probability: f32, ms: usize) -> impl Iterator<Item = f32> {
        std::iter::repeat_n(probability, ms / 32)
    }

    #[test]
    fn an_endpoint_comes_when_silence_has_lasted() {
        let (heard, cut) = run(0, 0, frames(0.0, 320).chain(frames(0.9, 640)).chain(frames(0.1, 2_000)));
        assert_eq!(cut, Some(Cut::Endpoint(46 * 512)), "30 frames, then the 16th of silence passes 500 ms");
        assert_eq!(heard.speech(46 * 512), Some(10 * 512 - 2_400..30 * 512 + 2_400));
    }

    #[test]
    fn weak_syllables_hold_and_clicks_do_not_count() {
        let (_, cut) = run(0, 0, frames(0.9, 320).chain(frames(0.4, 3_000)));
        assert_eq!(cut, None);
        let (heard, cut) = run(0, 0, frames(0.4, 1_000).chain([0.9, 0.9]).chain(frames(0.0, 1_000)));
        assert_eq!((cut, heard.speech(u64::MAX)), (None, None));
    }

    #[test]
    fn speech_before_the_start_only_warms_up() {
        let (heard, cut) = run(8_192, 0, frames(0.9, 512).chain(frames(0.0, 5_000)));
        assert_eq!((cut, heard.speech(u64::MAX)), (None, None), "it belongs to the final before");
        let (heard, _) = run(8_000, 0, frames(0.9, 640));
        assert_eq!(heard.speech(u64::MAX).map(|r| r.start), Some(8_000), "never reaches behind the start");
    }

    #[test]
    fn long_silence_is_committed_but_for_its_last_half_second() {
        let (_, cut) = run(0, 0, frames(0.0, 40_000));
        assert_eq!(cut, Some(Cut::Quiet(938 * 512 - 8_000)));
    }

    #[test]
    fn a_full_window_is_cut_at_its_quietest_late_frame() {
        let speech = (0..2_000).map(|n| match n {
            100 => 0.36,
            800 => 0.38,
            _ => 0.99,
        });
        let (_, cut) = run(0, 0, speech);
        assert_eq!(cut, Some(Cut::Full(800 * 512 + 256)), "frame 100 lies too far back");
    }

    #[test]
    fn high_rates_have_shorter_windows() {
        assert_eq!(Limits::new(500, 48_000).window, MAX_WINDOW);
        assert!(Limits::new(500, 192_000).window < MAX_WINDOW);
    }
}
