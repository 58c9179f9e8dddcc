//! A final that waits for its text: one window for each utterance of each channel, and what was heard in them. Pure.

use std::ops::Range;

use voxfleet_schema::{
    failure::Failure,
    session::SessionOptions,
    transcript::{AudioRange, Segment, Timings, Turn},
};

use super::{endpoint::Speech, words};
use crate::engine::{EngineError, Hypothesis, RecognizerInfo, diarize::Listened};

/// What came of one window.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) heard: Result<Hypothesis, EngineError>,
    pub(super) guards: Vec<String>,
    pub(super) listened: Listened,
    pub(super) info: RecognizerInfo,
    pub(super) timings: Timings,
}

/// One window, in session samples.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) channel: usize,
    pub(super) window: Range<u64>,
    spoken: Range<u64>,
    answer: Option<Answer>,
}

/// A final that waits for its text.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) to: u64,
    pub(super) audio: AudioRange,
    pub(super) speech_final: bool,
    pub(super) end: bool,
    /// In order of where they begin; none without speech.
    pub(super) parts: Vec<Part>,
}

/// What was heard in all windows of a final.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) segments: Vec<Segment>,
    /// Of channels that are split.
    pub(super) turns: Vec<Turn>,
    /// Of the only window, where channels are mixed.
    pub(super) listened: Listened,
    /// Each once.
    pub(super) guards: Vec<String>,
    /// Of the first window that could not be decoded; the others' text stands beside it.
    pub(super) error: Option<Failure>,
    pub(super) info: RecognizerInfo,
    pub(super) timings: Timings,
}

impl Joined {
    /// Nothing was decoded.
    pub(super) fn nothing(error: Option<Failure>) -> Self {
        let (info, timings) = (RecognizerInfo::none(), Timings::default());
        let (segments, turns, listened) = (Vec::new(), Vec::new(), Listened::NotAsked);
        Self { segments, turns, listened, guards: Vec::new(), error, info, timings }
    }
}

impl Pending {
    pub(super) fn parts_of(speech: Vec<Speech>) -> Vec<Part> {
        let part = |s: Speech| Part { channel: s.channel, window: s.range, spoken: s.spoken, answer: None };
        speech.into_iter().map(part).collect()
    }

    /// Takes an answer; says whether it was the last that was waited for.
    pub(super) fn take(&mut self, part: usize, answer: Answer) -> bool {
        if let Some(part) = self.parts.get_mut(part) {
            part.answer = Some(answer);
        }
        self.parts.iter().all(|part| part.answer.is_some())
    }

    /// Whatever the order in which the answers came, the same answers make the same final: segments stand in order of
    /// where they begin.
    pub(super) fn join(&mut self, from: u64, options: &SessionOptions) -> Joined {
        let mut joined = Joined::nothing(None);
        let several = self.parts.len() > 1;
        for (n, part) in std::mem::take(&mut self.parts).into_iter().enumerate() {
            let Some(Answer { heard, guards, listened, info, timings }) = part.answer else { continue };
            if n == 0 {
                if let Listened::Heard(Ok(heard)) = &listened {
                    joined.timings.diarize_ms = heard.took.as_millis() as u64;
                }
                (joined.info, joined.listened) = (info, listened);
            }
            let speaker = options.speaker_of(part.channel);
            joined.turns.extend(speaker.clone().map(|speaker| Turn {
                start_ms: part.spoken.start / 16,
                end_ms: part.spoken.end / 16,
                speaker,
                voice: None,
            }));
            let all = &mut joined.timings;
            all.queued_ms = all.queued_ms.max(timings.queued_ms);
            all.decode_ms += timings.decode_ms;
            all.audio_ms += (part.window.end - part.window.start) / 16;
            for guard in guards {
                if !joined.guards.contains(&guard) {
                    joined.guards.push(guard);
                }
            }
            match heard {
                Ok(hypothesis) => {
                    all.word_timing = all.word_timing.or(hypothesis.word_timing);
                    let mut segments = words::place(&hypothesis, &part.window, from..self.to);
                    if let Some(speaker) = speaker {
                        words::attribute(&mut segments, part.channel, &speaker);
                    }
                    joined.segments.extend(segments);
                }
                Err(error) => {
                    let why = if several { format!("channel {}: {error}", part.channel) } else { error.to_string() };
                    joined.error.get_or_insert(Failure::new(error.class(), why));
                }
            }
        }
        if several {
            joined.segments.sort_by_key(|s| (s.start_ms, s.channel));
            joined.segments.iter_mut().zip(0..).for_each(|(segment, id)| segment.id = id);
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_schema::session::Channels;

    use crate::engine::HeardSegment;

    fn heard(text: &str, start_ms: u64) -> Hypothesis {
        let segment = HeardSegment { start_ms, end_ms: start_ms + 100, text: text.to_owned(), ..Default::default() };
        Hypothesis { segments: vec![segment], language: Some("en".to_owned()), word_timing: None }
    }

    fn answer(heard: Result<Hypothesis, EngineError>, guard: &str, decode_ms: u64) -> Answer {
        let guards = (!guard.is_empty()).then(|| guard.to_owned()).into_iter().collect();
        let timings = Timings { queued_ms: decode_ms, decode_ms, ..Timings::default() };
        let listened = Listened::NotAsked;
        Answer {
            heard,
            guards,
            listened,
            info: RecognizerInfo { model: "m".to_owned(), ..RecognizerInfo::none() },
            timings,
        }
    }

    fn joined(order: [usize; 3], third: &Result<Hypothesis, EngineError>) -> Joined {
        let speech = |channel, range: Range<u64>| {
            let spoken = range.start + 2_400..range.end - 2_400;
            Speech { channel, range, spoken, over: true }
        };
        let speech = vec![speech(1, 16_000..32_000), speech(0, 24_000..40_000), speech(1, 48_000..64_000)];
        let audio = AudioRange { from_seq: 1, to_seq: 2 };
        let parts = Pending::parts_of(speech);
        let mut pending = Pending { to: 80_000, audio, speech_final: true, end: false, parts };
        let mut answers = [
            Some(answer(Ok(heard("one", 800)), "repetition", 5)),
            Some(answer(Ok(heard("two", 100)), "repetition", 7)),
            Some(answer(third.clone(), "no_speech", 1)),
        ];
        for (n, part) in order.into_iter().enumerate() {
            assert_eq!(pending.take(part, answers[part].take().expect("once")), n == 2);
        }
        let names = vec!["agent".to_owned()];
        let options = SessionOptions { channels: Channels::Split, channel_names: names, ..Default::default() };
        pending.join(8_000, &options)
    }

    #[test]
    fn channels_are_merged_in_order_of_time_whoever_answered_first() {
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let joined = joined(order, &Ok(heard("three", 0)));
            let said = |s: &Segment| (s.id, s.start_ms, s.text.clone(), s.channel, s.speaker.clone());
            let expected = |id, ms, text: &str, channel, speaker: &str| {
                (id, ms, text.to_owned(), Some(channel), Some(speaker.to_owned()))
            };
            assert_eq!(
                joined.segments.iter().map(said).collect::<Vec<_>>(),
                [
                    expected(0, 1_600, "two", 0, "agent"),
                    expected(1, 1_800, "one", 1, "ch1"),
                    expected(2, 3_000, "three", 1, "ch1")
                ]
            );
            assert_eq!(joined.guards, ["repetition", "no_speech"]);
            let Timings { queued_ms, decode_ms, audio_ms, .. } = joined.timings;
            assert_eq!((queued_ms, decode_ms, audio_ms), (7, 13, 3_000));
            assert_eq!((joined.error, joined.info.model.as_str()), (None, "m"));
        }
    }

    #[test]
    fn what_one_channel_lacks_does_not_silence_the_others() {
        let joined = joined([0, 1, 2], &Err(EngineError::Decode("no".to_owned())));
        let texts: Vec<&str> = joined.segments.iter().map(|s| s.text.as_str()).collect();
        assert_eq!(texts, ["two", "one"]);
        assert!(joined.error.is_some_and(|e| e.message.contains("channel 1")));
    }
}
