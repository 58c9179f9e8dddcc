//! The aggregate of a job, from the finals of its chain. Pure.

use std::collections::BTreeMap;

use crate::memory::Change;
use voxfleet_schema::{
    SAMPLE_RATE_HZ,
    fleet::Provider,
    job::{AlignedSegment, AlignedWord, JobResult, PerformanceMetrics, ResultSegment, SpeakerTurn},
    transcript::{Final, join_text},
};

use crate::provider::Rent;

/// Wall-clock times of a job, in s.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Times {
    /// Submitted to taken by this worker; clocks of two machines, never below zero.
    pub(crate) queue: f64,
    pub(crate) fetch: f64,
    pub(crate) transcribe: f64,
    /// Where this worker began in the recording: the times are its own, what others did before is not in them.
    pub(crate) from: f64,
}

/// Turns overlap, so a piece of one may not stand behind the other pieces of it.
const SPEAKERS_AT_ONCE: usize = 8;

/// Takes finals in the order of their chain.
#[derive(Debug, Default)]
pub(crate) struct Aggregate {
    segments: Vec<ResultSegment>,
    aligned: Vec<AlignedSegment>,
    turns: Vec<SpeakerTurn>,
    diarize_ms: u64,
    /// Bytes of text by language: what was said most decides.
    languages: BTreeMap<String, usize>,
    decode_ms: u64,
    to_sample: u64,
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1_000.0
}

impl Aggregate {
    pub(crate) fn add(&mut self, value: &Final) {
        self.decode_ms += value.timings.decode_ms;
        self.diarize_ms += value.timings.diarize_ms;
        self.to_sample = self.to_sample.max(value.to_sample);
        for turn in &value.turns {
            let (start, end) = (seconds(turn.start_ms), seconds(turn.end_ms));
            match self.turns.iter_mut().rev().take(SPEAKERS_AT_ONCE).find(|last| last.speaker == turn.speaker) {
                // Pieces of one turn.
                Some(last) if last.end >= start => last.end = last.end.max(end),
                _ => self.turns.push(SpeakerTurn { speaker: turn.speaker.clone(), start, end }),
            }
        }
        for segment in &value.segments {
            let text = segment.text.trim();
            if text.is_empty() {
                continue;
            }
            if let Some(language) = &segment.language {
                *self.languages.entry(language.clone()).or_default() += text.len();
            }
            let (start, end) = (seconds(segment.start_ms), seconds(segment.end_ms));
            self.segments.push(ResultSegment {
                id: self.segments.len() as u64,
                start,
                end,
                text: text.to_owned(),
                speaker: segment.speaker.clone(),
                channel: segment.channel,
                confidence: segment.confidence,
            });
            let words = segment.words.iter().map(|word| AlignedWord {
                word: word.text.trim().to_owned(),
                start: seconds(word.start_ms),
                end: seconds(word.end_ms),
                score: word.confidence,
                speaker: word.speaker.clone(),
                overlapped_by: word.overlapped_by.clone(),
            });
            self.aligned.push(AlignedSegment {
                start,
                end,
                text: text.to_owned(),
                speaker: segment.speaker.clone(),
                channel: segment.channel,
                words: words.collect(),
            });
        }
    }

    /// `memory`: what stages of this worker did to its device.
    pub(crate) fn finish(self, rent: Rent, times: Times, memory: &[Change]) -> JobResult {
        let duration = self.to_sample as f64 / f64::from(SAMPLE_RATE_HZ);
        let total = times.fetch + times.transcribe;
        // What this worker did of it.
        let own = (duration - times.from).max(0.0);
        let times_real_time = (own > 0.0 && total > 0.0).then(|| own / total);
        let seconds_of = [
            ("queue", times.queue),
            ("fetch", times.fetch),
            ("transcribe", times.transcribe),
            ("decode", seconds(self.decode_ms)),
        ];
        let mut stages: BTreeMap<String, f64> = seconds_of.map(|(name, s)| (name.to_owned(), s)).into();
        if self.diarize_ms > 0 {
            stages.insert("diarize".to_owned(), seconds(self.diarize_ms));
        }
        for Change { stage, before_mb, after_mb } in memory {
            stages.insert(format!("{}_before_mb", stage.as_str()), *before_mb as f64);
            stages.insert(format!("{}_after_mb", stage.as_str()), *after_mb as f64);
        }
        JobResult {
            full_text: join_text(self.segments.iter().map(|s| s.text.as_str())),
            segments: self.segments,
            aligned_segments: self.aligned,
            language: self.languages.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(language, _)| language),
            duration,
            speaker_turns: self.turns,
            provider: provider_name(rent.provider).to_owned(),
            performance_metrics: PerformanceMetrics {
                total_duration: total,
                stages,
                realtime_factor: if own > 0.0 { total / own } else { 0.0 },
                times_real_time,
                cost_per_audio_hour: times_real_time.and_then(|times| rent.per_audio_hour(times)),
            },
        }
    }
}

fn provider_name(provider: Provider) -> &'static str {
    match provider {
        Provider::VastAi => "vast_ai",
        Provider::RunPod => "runpod",
        Provider::Lambda => "lambda",
        Provider::Local => "local",
        Provider::Unknown => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::transcript::{Segment, Word};

    use super::*;
    use crate::memory::Stage;
    use crate::session::tests::final_of;

    fn segment(start_ms: u64, end_ms: u64, text: &str, language: &str) -> Segment {
        Segment {
            id: 0,
            start_ms,
            end_ms,
            text: text.to_owned(),
            speaker: None,
            channel: None,
            language: Some(language.to_owned()),
            confidence: 0.5,
            words: vec![Word {
                text: format!(" {text}"),
                start_ms,
                end_ms,
                confidence: 0.25,
                speaker: None,
                overlapped_by: None,
            }],
        }
    }

    fn rented(provider: Provider) -> Rent {
        Rent { provider, price_per_hour: Some(0.3) }
    }

    #[test]
    fn segments_of_all_finals_become_one_result() {
        let mut aggregate = Aggregate::default();
        let mut first = final_of(0);
        first.segments = vec![segment(100, 900, "guten tag", "de"), segment(900, 950, "  ", "de")];
        (first.to_sample, first.timings.decode_ms) = (16_000, 300);
        let mut second = final_of(1);
        second.segments = vec![segment(1_200, 2_500, "good morning everybody", "en")];
        (second.to_sample, second.timings.decode_ms) = (48_000, 200);
        aggregate.add(&first);
        aggregate.add(&second);
        let loaded = Change { stage: Stage::Load, before_mb: 2, after_mb: 402 };
        let times = Times { queue: 9.0, fetch: 0.5, transcribe: 1.0, from: 1.0 };
        let result = aggregate.finish(rented(Provider::RunPod), times, &[loaded]);
        assert_eq!(result.full_text, "guten tag good morning everybody");
        assert_eq!(
            result.segments.iter().map(|s| (s.id, s.start, s.end)).collect::<Vec<_>>(),
            [(0, 0.1, 0.9), (1, 1.2, 2.5)]
        );
        assert_eq!(result.aligned_segments[1].words[0].word, "good morning everybody");
        assert_eq!(
            (result.language.as_deref(), result.duration, result.provider.as_str()),
            (Some("en"), 3.0, "runpod")
        );
        let metrics = result.performance_metrics;
        assert_eq!((metrics.total_duration, metrics.realtime_factor), (1.5, 0.75), "neither waiting nor others' work");
        assert_eq!(metrics.times_real_time, Some(2.0 / 1.5));
        assert_eq!(metrics.cost_per_audio_hour, Some(0.3 / (2.0 / 1.5)), "of the audio that was done here");
        assert_eq!((metrics.stages["decode"], metrics.stages["queue"]), (0.5, 9.0));
        assert_eq!((metrics.stages["load_before_mb"], metrics.stages["load_after_mb"]), (2.0, 402.0));
    }

    #[test]
    fn silence_is_a_result_without_a_language() {
        let mut aggregate = Aggregate::default();
        let mut only = final_of(0);
        only.to_sample = 160_000;
        aggregate.add(&only);
        let result = aggregate.finish(rented(Provider::Local), Times::default(), &[]);
        assert_eq!((result.full_text.as_str(), result.language, result.duration), ("", None, 10.0));
        assert!(result.segments.is_empty() && result.aligned_segments.is_empty());
        let times = Times { transcribe: 1.0, ..Times::default() };
        let nothing = Aggregate::default().finish(rented(Provider::Local), times, &[]);
        assert_eq!(nothing.performance_metrics.realtime_factor, 0.0, "a number even for no audio");
    }

    #[test]
    fn the_fields_are_those_of_the_contract() {
        let value = serde_json::to_value(Aggregate::default().finish(rented(Provider::Local), Times::default(), &[]))
            .expect("JSON");
        let mut names: Vec<_> = value.as_object().expect("object").keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "aligned_segments",
                "duration",
                "full_text",
                "language",
                "performance_metrics",
                "provider",
                "segments",
                "speaker_turns"
            ]
        );
    }
}
