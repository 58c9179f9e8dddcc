//! Speech probabilities -> where finals end. Pure; positions are session samples.
//!
//! Where channels are split, each has its own utterances and one final covers all channels of one range:
//! - An utterance begins with speech on its channel and is over when that channel has been silent for `endpoint_ms`. One
//!   that was no more than a click is forgotten.
//! - A final ends at an endpoint: with the frame in which the last utterance is over and nobody speaks on any channel.
//! - People who never pause together are cut 28 s behind the first of their utterances, at the frame of the last five
//!   seconds whose loudest channel is the quietest: a full window. So no window is longer than that of one channel alone.
//! - While nobody has spoken on any channel, long silence is committed.
//!
//! With one channel that is: silence after speech, a full window, long silence.

use std::{collections::VecDeque, ops::Range};

use voxfleet_schema::{PREROLL_SAMPLES, SAMPLE_RATE_HZ, audio::AudioFormat};

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
/// Most audio a window or a silence may span, as f32 at the input's rate. Reached before the limits above only over 140 kHz.
const MAX_BYTES: u64 = 16 << 20;
/// Of several channels, as they came and as 16 kHz: for both limits together a session has room for 32 MiB, and the half
/// second before and the entry behind them need some. Up to seven channels at 16 kHz it is not reached.
const MAX_SPLIT_BYTES: u64 = 12 << 20;
/// Most that can be split, bytes a second: 32 channels of floats at 48 kHz, in windows of two seconds.
const MAX_SPLIT_BYTES_PER_S: u64 = 32 * 48_000 * 4;

/// Limits of one stretch, from the session's options and the input's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    endpoint: u64,
    window: u64,
    silence: u64,
}

impl Limits {
    /// `channels`: how many are heard one by one.
    pub(super) fn new(endpoint_ms: u32, format: AudioFormat, channels: usize) -> Self {
        let (rate_hz, channels) = (u64::from(format.rate_hz), channels as u64);
        let (bytes, per_s) = match channels {
            1 => (MAX_BYTES, rate_hz * 4),
            _ => (MAX_SPLIT_BYTES, split_bytes_per_s(format).max(channels * u64::from(SAMPLE_RATE_HZ) * 4)),
        };
        let most = bytes * u64::from(SAMPLE_RATE_HZ) / per_s;
        Self { endpoint: u64::from(endpoint_ms) * 16, window: MAX_WINDOW.min(most), silence: MAX_SILENCE.min(most) }
    }
}

fn split_bytes_per_s(format: AudioFormat) -> u64 {
    u64::from(format.rate_hz) * format.frame_bytes() as u64
}

/// Whether the channels of this format can be heard one by one in the memory that a session has.
pub(super) fn can_be_split(format: AudioFormat) -> bool {
    format.channels == 1 || split_bytes_per_s(format) <= MAX_SPLIT_BYTES_PER_S
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

/// Speech of one channel that a recognizer should hear, with padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Speech {
    pub(super) channel: usize,
    pub(super) range: Range<u64>,
    /// The same without padding.
    pub(super) spoken: Range<u64>,
    /// The channel has been silent behind it for long enough: it will not grow.
    pub(super) over: bool,
}

#[derive(Debug)]
struct Utterance {
    channel: usize,
    /// Padding goes back no further: the final's start, or where the channel's utterance before was over.
    floor: u64,
    start: u64,
    end: u64,
    speech_frames: u32,
    /// Where it was over.
    over: Option<u64>,
}

impl Utterance {
    fn begin(&self) -> u64 {
        self.start.saturating_sub(PADDING).max(self.floor)
    }

    fn speech(&self, limit: u64) -> Option<Speech> {
        if self.speech_frames < MIN_SPEECH_FRAMES || self.start >= limit {
            return None;
        }
        let range = self.begin()..(self.end + PADDING).min(self.over.unwrap_or(limit)).min(limit);
        let spoken = self.start..self.end.min(limit);
        (range.start < range.end).then_some(Speech { channel: self.channel, range, spoken, over: self.over.is_some() })
    }
}

/// What one channel is about.
#[derive(Debug)]
struct Ear {
    speaking: bool,
    floor: u64,
    utterance: Option<Utterance>,
}

/// Follows the frames of one stretch: from half a second before `from` to its cut.
#[derive(Debug)]
pub(super) struct Endpointer {
    /// First sample the next final covers; frames that end before it only warm up the state.
    from: u64,
    /// End of the last frame heard.
    at: u64,
    ears: Vec<Ear>,
    /// Utterances that are over.
    over: Vec<Utterance>,
    /// Highest probability of all channels and start of the latest frames since somebody began to speak.
    recent: VecDeque<(f32, u64)>,
}

impl Endpointer {
    /// `base` is where the first frame begins.
    pub(super) fn new(from: u64, base: u64) -> Self {
        Self { from, at: base, ears: Vec::new(), over: Vec::new(), recent: VecDeque::new() }
    }

    /// Speech so far, inside `from..limit`, in order of where it begins.
    pub(super) fn speech(&self, limit: u64) -> Vec<Speech> {
        let mut speech: Vec<Speech> = self.utterances().filter_map(|u| u.speech(limit)).collect();
        speech.sort_by_key(|s| (s.range.start, s.channel));
        speech
    }

    /// The frame pushed last, where it is speech.
    pub(super) fn speaks(&self) -> Option<Range<u64>> {
        self.ears.iter().any(|ear| ear.speaking).then(|| self.at - FRAME..self.at)
    }

    fn utterances(&self) -> impl Iterator<Item = &Utterance> {
        self.over.iter().chain(self.ears.iter().filter_map(|ear| ear.utterance.as_ref()))
    }

    /// Takes the next frame: one probability for each channel. Channels may be added, never left out.
    pub(super) fn push(&mut self, probabilities: &[f32], limits: Limits) -> Option<Cut> {
        let (from, start) = (self.from, self.at);
        self.at += FRAME;
        let at = self.at;
        if self.ears.len() < probabilities.len() {
            self.ears.resize_with(probabilities.len(), || Ear { speaking: false, floor: from, utterance: None });
        }
        for (ear, probability) in self.ears.iter_mut().zip(probabilities) {
            ear.speaking = *probability >= ONSET || (ear.speaking && *probability >= HOLD);
        }
        if at <= from {
            return None;
        }
        let mut clicked = false;
        for (channel, ear) in self.ears.iter_mut().enumerate() {
            if ear.speaking {
                let (floor, start) = (ear.floor, start.max(from));
                let begun = Utterance { channel, floor, start, end: 0, speech_frames: 0, over: None };
                let utterance = ear.utterance.get_or_insert(begun);
                utterance.end = at;
                utterance.speech_frames += 1;
            } else if let Some(utterance) = ear.utterance.take_if(|u| at - u.end >= limits.endpoint) {
                if utterance.speech_frames < MIN_SPEECH_FRAMES {
                    clicked = true;
                } else {
                    ear.floor = at;
                    self.over.push(Utterance { over: Some(at), ..utterance });
                }
            }
        }
        if self.ears.iter().all(|ear| ear.utterance.is_none()) {
            if !self.over.is_empty() {
                return Some(Cut::Endpoint(at));
            }
            if clicked {
                self.recent.clear();
                return None;
            }
            // Half a second stays uncommitted: an onset that is just beginning keeps its padding.
            return (at - from >= limits.silence).then(|| Cut::Quiet(at - PREROLL_SAMPLES));
        }
        if self.recent.len() == CUT_SEARCH_FRAMES {
            self.recent.pop_front();
        }
        self.recent.push_back((probabilities.iter().copied().fold(0.0, f32::max), start));
        let first = self.utterances().map(Utterance::begin).min().unwrap_or(from);
        if at - first < limits.window {
            return None;
        }
        let quietest = self.recent.iter().rev().min_by(|a, b| a.0.total_cmp(&b.0));
        Some(Cut::Full(quietest.map_or(at, |(_, start)| (start + FRAME / 2).max(from + 1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(from: u64, base: u64, probabilities: impl IntoIterator<Item = f32>) -> (Endpointer, Option<Cut>) {
        let mut endpointer = Endpointer::new(from, base);
        let limits = Limits::new(500, AudioFormat::default(), 1);
        for probability in probabilities {
            if let Some(cut) = endpointer.push(&[probability], limits) {
                return (endpointer, Some(cut));
            }
        }
        (endpointer, None)
    }

    /// The range of the only utterance.
    fn only(heard: &Endpointer, limit: u64) -> Option<Range<u64>> {
        let mut speech = heard.speech(limit);
        assert!(speech.len() <= 1);
        speech.pop().map(|s| s.range)
    }

    fn frames(probability: f32, ms: usize) -> impl Iterator<Item = f32> {
        std::iter::repeat_n(probability, ms / 32)
    }

    #[test]
    fn an_endpoint_comes_when_silence_has_lasted() {
        let (heard, cut) = run(0, 0, frames(0.0, 320).chain(frames(0.9, 640)).chain(frames(0.1, 2_000)));
        assert_eq!(cut, Some(Cut::Endpoint(46 * 512)), "30 frames, then the 16th of silence passes 500 ms");
        assert_eq!(only(&heard, 46 * 512), Some(10 * 512 - 2_400..30 * 512 + 2_400));
    }

    #[test]
    fn weak_syllables_hold_and_clicks_do_not_count() {
        let (_, cut) = run(0, 0, frames(0.9, 320).chain(frames(0.4, 3_000)));
        assert_eq!(cut, None);
        let (heard, cut) = run(0, 0, frames(0.4, 1_000).chain([0.9, 0.9]).chain(frames(0.0, 1_000)));
        assert_eq!((cut, only(&heard, u64::MAX)), (None, None));
    }

    #[test]
    fn speech_before_the_start_only_warms_up() {
        let (heard, cut) = run(8_192, 0, frames(0.9, 512).chain(frames(0.0, 5_000)));
        assert_eq!((cut, only(&heard, u64::MAX)), (None, None), "it belongs to the final before");
        let (heard, _) = run(8_000, 0, frames(0.9, 640));
        assert_eq!(only(&heard, u64::MAX).map(|r| r.start), Some(8_000), "never reaches behind the start");
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
        let window = |rate_hz, channels, split| {
            let format = AudioFormat { rate_hz, channels, ..AudioFormat::default() };
            Limits::new(500, format, if split { usize::from(channels) } else { 1 }).window
        };
        assert_eq!(window(48_000, 1, false), MAX_WINDOW);
        assert!(window(192_000, 1, false) < MAX_WINDOW);
        for rate_hz in [8_000, 44_100, 192_000] {
            assert_eq!(window(rate_hz, 8, false), window(rate_hz, 1, false), "mixed channels cost nothing");
            assert_eq!(window(rate_hz, 1, true), window(rate_hz, 1, false));
        }
        for (rate_hz, channels, seconds) in
            [(8_000, 2, 28), (48_000, 2, 28), (16_000, 7, 28), (16_000, 16, 12), (48_000, 32, 4)]
        {
            assert_eq!(window(rate_hz, channels, true) / 16_000, seconds, "{channels} channels at {rate_hz} Hz");
        }
    }

    /// `(channel, from ms, to ms)` of loud speech on so many channels.
    fn hear(channels: usize, spoken: &[(usize, u64, u64)], ms: u64) -> (Endpointer, Option<Cut>) {
        let mut endpointer = Endpointer::new(0, 0);
        let limits = Limits::new(500, AudioFormat { channels: channels as u16, ..AudioFormat::default() }, channels);
        for frame in 0..ms / 32 {
            let at = frame * 32;
            let loud = |c| spoken.iter().any(|(channel, from, to)| *channel == c && (*from..*to).contains(&at));
            let probabilities: Vec<f32> = (0..channels).map(|c| if loud(c) { 0.9 } else { 0.1 }).collect();
            if let Some(cut) = endpointer.push(&probabilities, limits) {
                return (endpointer, Some(cut));
            }
        }
        (endpointer, None)
    }

    #[test]
    fn a_final_ends_where_every_channel_is_silent() {
        type Case<'a> = (&'a str, &'a [(usize, u64, u64)], Option<Cut>, &'a [(usize, u64, u64, bool)]);
        let endpoint = |ms: u64| Some(Cut::Endpoint(ms * 16));
        let cases: [Case<'_>; 9] = [
            ("one speaks", &[(1, 320, 960)], endpoint(1_472), &[(1, 170, 1_110, true)]),
            ("one behind the other", &[(0, 320, 960), (1, 1_600, 2_240)], endpoint(1_472), &[(0, 170, 1_110, true)]),
            (
                "the other begins while the first is waited for",
                &[(0, 320, 960), (1, 1_280, 2_240)],
                endpoint(2_752),
                &[(0, 170, 1_110, true), (1, 1_130, 2_390, true)],
            ),
            (
                "both at once, and one ends later",
                &[(0, 320, 960), (1, 320, 2_240)],
                endpoint(2_752),
                &[(0, 170, 1_110, true), (1, 170, 2_390, true)],
            ),
            (
                "one speaks twice while the other goes on",
                &[(0, 320, 960), (1, 640, 3_200), (0, 2_240, 2_880)],
                endpoint(3_712),
                &[(0, 170, 1_110, true), (1, 490, 3_350, true), (0, 2_090, 3_030, true)],
            ),
            ("a click is no speech", &[(0, 320, 960), (1, 960, 1_024)], endpoint(1_536), &[(0, 170, 1_110, true)]),
            ("nor is a click alone", &[(1, 960, 1_024)], None, &[]),
            (
                "somebody goes on speaking",
                &[(0, 320, 960), (1, 640, 9_000)],
                None,
                &[(0, 170, 1_110, true), (1, 490, 6_016, false)],
            ),
            ("nobody speaks", &[], None, &[]),
        ];
        for (what, spoken, cut, speech) in cases {
            let (heard, found) = hear(2, spoken, 6_016);
            assert_eq!(found, cut, "{what}");
            let limit = found.map_or(6_016 * 16, |cut| match cut {
                Cut::Endpoint(at) | Cut::Full(at) | Cut::Quiet(at) => at,
            });
            let found: Vec<_> = heard
                .speech(limit)
                .into_iter()
                .map(|s| (s.channel, s.range.start / 16, s.range.end / 16, s.over))
                .collect();
            assert_eq!(found, speech, "{what}");
        }
    }

    #[test]
    fn people_who_never_pause_together_are_cut_at_the_quietest_common_frame() {
        // Turns that leave 320 ms between them.
        let turns: Vec<_> = (0..20u64).map(|n| ((n % 2) as usize, n * 2_016, n * 2_016 + 1_696)).collect();
        let (heard, cut) = hear(2, &turns, 40_000);
        let Some(Cut::Full(at)) = cut else { panic!("{cut:?}") };
        let pause = |at: u64| turns.iter().all(|(_, from, to)| !(from * 16..to * 16).contains(&at));
        assert!(pause(at) && (23 * 16_000..29 * 16_000).contains(&at), "{at}");
        let speech = heard.speech(at);
        assert_eq!(speech.len(), turns.iter().filter(|(_, from, _)| from * 16 < at).count());
        assert!(speech.iter().all(|s| s.range.end <= at && s.range.end - s.range.start <= 2 * 16_000 + 2 * PADDING));
        // Whoever begins behind the cut belongs to the next final, though his padding does not.
        let (heard, _) = hear(2, &[(0, 0, 1_600), (1, 1_700, 9_000)], 4_000);
        assert_eq!(heard.speech(1_650 * 16).iter().map(|s| s.channel).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn silence_on_all_channels_is_committed_as_on_one() {
        let (_, cut) = hear(3, &[], 40_000);
        assert_eq!(cut, Some(Cut::Quiet(938 * 512 - 8_000)));
    }

    #[test]
    fn a_channel_that_appears_late_was_silent() {
        let mut endpointer = Endpointer::new(0, 0);
        let limits = Limits::new(500, AudioFormat::default(), 1);
        for frame in 0..60 {
            let probabilities: &[f32] = if frame < 20 { &[0.9] } else { &[0.1, 0.9] };
            assert_eq!(endpointer.push(probabilities, limits), None);
        }
        let speech = endpointer.speech(60 * 512);
        assert_eq!(
            speech.iter().map(|s| (s.channel, s.range.start)).collect::<Vec<_>>(),
            [(0, 0), (1, 20 * 512 - 2_400)]
        );
    }

    #[test]
    fn what_no_memory_holds_is_not_split() {
        let format = |rate_hz, channels| {
            let encoding = voxfleet_schema::audio::Encoding::PcmF32Le;
            AudioFormat { encoding, rate_hz, channels }
        };
        assert!(
            can_be_split(format(48_000, 32)) && can_be_split(format(192_000, 8)) && can_be_split(format(192_000, 1))
        );
        assert!(!can_be_split(format(48_000, 33)) && !can_be_split(format(192_000, 9)));
    }
}
