//! A transcript as WhisperLiveKit's pages and clients read it: the whole state each time, lines that stand and a buffer that
//! does not. Pure.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Value, json};
use voxfleet_schema::transcript::{Final, Partial, Revision, Segment, Speakers, join_text};

use super::super::reading::Follower;

/// Lines kept, hours of speech; older ones go from the front. The log and the chain keep everything.
const MOST_LINES: usize = 2_000;
/// Silence that gets a line of its own, in ms.
const SILENCE_MS: u64 = 5_000;
/// Who speaks where nobody was asked for, where it is not known yet, and where nobody does.
const ONLY_SPEAKER: u64 = 1;
const NOT_KNOWN_YET: u64 = 0;
const SILENCE: i64 = -2;
const SAMPLES_PER_MS: u64 = 16;

/// What one speaker says in one final.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    index: u64,
    speaker: u64,
    text: String,
    start_ms: u64,
    end_ms: u64,
    language: Option<String>,
}

/// What has been said so far.
#[derive(Debug, Default)]
pub(crate) struct View {
    follower: Follower,
    lines: VecDeque<Line>,
    /// Finals whose speakers come later, and how much audio they cover, in ms.
    late: BTreeMap<u64, u64>,
    partial: Option<Partial>,
    /// Labels that are no `S1`, `S2`, ... in the order in which they came.
    named: Vec<String>,
    end: Option<u64>,
    gpu_id: Option<String>,
}

impl View {
    /// False: it has been seen.
    pub(crate) fn on_final(&mut self, value: &Final) -> bool {
        if !self.follower.on_final(value) {
            return false;
        }
        if self.partial.as_ref().is_some_and(|partial| !self.follower.on_partial(partial)) {
            self.partial = None;
        }
        self.gpu_id = Some(value.gpu_id.to_string());
        // Audio behind an end goes on with the chain.
        self.end = value.end.then_some(value.audio.to_seq);
        let late = is_late(value.speakers.as_ref());
        if late {
            let ms = value.to_sample.saturating_sub(value.from_sample) / SAMPLES_PER_MS;
            self.late.insert(value.index, ms);
        }
        let lines = self.lines_of(value.index, &value.segments, late);
        self.lines.extend(lines);
        while self.lines.len() > MOST_LINES {
            self.lines.pop_front();
        }
        true
    }

    pub(crate) fn on_revision(&mut self, value: &Revision) -> bool {
        if !self.follower.on_revision(value) {
            return false;
        }
        let late = is_late(value.speakers.as_ref());
        if !late {
            self.late.remove(&value.index);
        }
        let at = self.lines.partition_point(|line| line.index < value.index);
        let pruned = self.lines.len() >= MOST_LINES && at == 0;
        self.lines.retain(|line| line.index != value.index);
        if !pruned {
            for line in self.lines_of(value.index, &value.segments, late).into_iter().rev() {
                self.lines.insert(at, line);
            }
        }
        true
    }

    pub(crate) fn on_partial(&mut self, value: Partial) -> bool {
        let news = self.follower.on_partial(&value) && self.partial.as_ref().is_none_or(|old| old.epoch <= value.epoch);
        if news {
            self.gpu_id = Some(value.gpu_id.to_string());
            self.partial = Some(value);
        }
        news
    }

    /// Where the chain ends, as a sequence of the log; none while it goes on.
    pub(crate) fn end(&self) -> Option<u64> {
        self.end
    }

    /// Somebody's name is still to come.
    pub(crate) fn waits_for_speakers(&self) -> bool {
        !self.late.is_empty()
    }

    fn lines_of(&mut self, index: u64, segments: &[Segment], late: bool) -> Vec<Line> {
        let mut lines: Vec<Line> = Vec::new();
        for segment in segments.iter().filter(|segment| !segment.text.trim().is_empty()) {
            let speaker = match &segment.speaker {
                Some(label) => self.number(label),
                None if late => NOT_KNOWN_YET,
                None => ONLY_SPEAKER,
            };
            match lines.last_mut() {
                Some(line) if line.speaker == speaker => {
                    line.text = join_text([line.text.as_str(), segment.text.as_str()].into_iter());
                    line.end_ms = line.end_ms.max(segment.end_ms);
                }
                _ => lines.push(Line {
                    index,
                    speaker,
                    text: segment.text.trim().to_owned(),
                    start_ms: segment.start_ms,
                    end_ms: segment.end_ms,
                    language: segment.language.clone(),
                }),
            }
        }
        lines
    }

    /// `S3` is 3; other names count on behind the thousands, where no `S` gets to.
    fn number(&mut self, label: &str) -> u64 {
        let own = label.strip_prefix('S').and_then(|n| n.parse().ok());
        if let Some(n) = own.filter(|n| (1..1_000).contains(n)) {
            return n;
        }
        let at = self.named.iter().position(|known| known == label).unwrap_or_else(|| {
            self.named.push(label.to_owned());
            self.named.len() - 1
        });
        // Channels have no `S` beside them: they count from 1 like everybody.
        let first = if label.starts_with('S') { 1_000 } else { 1 };
        first + at as u64
    }

    /// The whole state, in the shape of WhisperLiveKit 0.2.
    pub(crate) fn state(&self) -> Value {
        let mut lines = Vec::with_capacity(self.lines.len());
        let mut before: Option<u64> = None;
        for line in &self.lines {
            if let Some(end) = before.filter(|end| line.start_ms >= end + SILENCE_MS) {
                lines.push(json!({ "speaker": SILENCE, "text": "", "start": clock(end), "end": clock(line.start_ms) }));
            }
            before = Some(before.unwrap_or(0).max(line.end_ms));
            let (start, end) = (clock(line.start_ms), clock(line.end_ms));
            let mut value = json!({ "speaker": line.speaker, "text": line.text, "start": start, "end": end });
            if let Some(language) = &line.language {
                value["detected_language"] = json!(language);
            }
            lines.push(value);
        }
        let buffer = self.partial.as_ref().map_or(String::new(), |partial| {
            join_text([partial.committed.as_str(), partial.tentative.as_str()].into_iter())
        });
        let heard = !lines.is_empty() || !buffer.is_empty();
        let lag_s = self.partial.as_ref().map_or(0.0, |partial| seconds(partial.lag_ms));
        json!({
            "status": if heard { "active_transcription" } else { "no_audio_detected" },
            "lines": lines,
            "buffer_transcription": buffer,
            "buffer_diarization": "",
            "buffer_translation": "",
            "remaining_time_transcription": lag_s,
            "remaining_time_diarization": seconds(self.late.values().sum()),
            "gpu_id": self.gpu_id,
        })
    }
}

fn is_late(speakers: Option<&Speakers>) -> bool {
    speakers.is_some_and(|speakers| speakers.late)
}

/// `0:00:01`.
fn clock(ms: u64) -> String {
    let s = ms / 1_000;
    format!("{}:{:02}:{:02}", s / 3_600, s / 60 % 60, s % 60)
}

fn seconds(ms: u64) -> f64 {
    (ms as f64 / 10.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(said: &[(u64, u64, &str, Option<&str>)]) -> Value {
        let one = |(n, (start, end, text, speaker)): (usize, &(u64, u64, &str, Option<&str>))| json!({ "id": n, "start_ms": start, "end_ms": end, "text": text, "speaker": speaker, "confidence": 1.0 });
        said.iter().enumerate().map(one).collect()
    }

    fn a_final(index: u64, to_seq: u64, more: Value, said: &[(u64, u64, &str, Option<&str>)]) -> Final {
        let mut value = json!({
            "kind": "session", "id": "s", "index": index, "final_id": "f", "epoch": 1, "gpu_id": "gpu-1", "model": "m",
            "device": "cpu", "engine": "simulated", "vad": "energy", "from_sample": 0, "to_sample": 32_000,
            "audio": { "from_seq": 1, "to_seq": to_seq }, "segments": segments(said), "speech_final": true, "timings": {},
            "resume": { "seq": 1, "at_sample": 0, "at_frame": 0, "format": "pcm_s16le", "format_sample": 0 },
        });
        for (name, field) in more.as_object().cloned().unwrap_or_default() {
            value[name] = field;
        }
        serde_json::from_value(value).expect("a final")
    }

    fn a_partial(epoch: u64, after: Option<u64>, committed: &str, tentative: &str) -> Partial {
        serde_json::from_value(json!({
            "kind": "session", "id": "s", "epoch": epoch, "gpu_id": "gpu-2", "after_index": after, "from_sample": 0,
            "to_sample": 1, "committed": committed, "tentative": tentative, "lag_ms": 1_234,
        }))
        .expect("a partial")
    }

    #[test]
    fn nothing_said_is_told_as_such() {
        let state = View::default().state();
        assert_eq!((state["status"].as_str(), &state["lines"]), (Some("no_audio_detected"), &json!([])));
    }

    #[test]
    fn the_state_has_every_field_that_clients_read() {
        let mut view = View::default();
        assert!(view.on_partial(a_partial(1, None, "good", "mor")));
        assert_eq!(view.state()["buffer_transcription"], "good mor");
        let said = [(0, 900, "good morning", None), (900, 3_700, "everybody", None)];
        assert!(view.on_final(&a_final(0, 3, json!({}), &said)));
        assert!(!view.on_final(&a_final(0, 3, json!({}), &said)), "once");
        assert!(view.on_partial(a_partial(1, Some(0), "and", "")));
        assert_eq!(
            view.state(),
            json!({
                "status": "active_transcription",
                "lines": [{ "speaker": 1, "text": "good morning everybody", "start": "0:00:00", "end": "0:00:03" }],
                "buffer_transcription": "and", "buffer_diarization": "", "buffer_translation": "",
                "remaining_time_transcription": 1.23, "remaining_time_diarization": 0.0, "gpu_id": "gpu-2",
            })
        );
    }

    #[test]
    fn a_final_takes_its_partial_away_and_older_ones_stay_away() {
        let mut view = View::default();
        view.on_partial(a_partial(2, None, "one", ""));
        view.on_final(&a_final(0, 3, json!({ "epoch": 2 }), &[(0, 1, "one", None)]));
        assert_eq!(view.state()["buffer_transcription"], "");
        assert!(!view.on_partial(a_partial(1, Some(0), "late", "")), "of a lower epoch");
        assert!(!view.on_partial(a_partial(2, None, "late", "")), "of an older final");
        assert!(view.on_partial(a_partial(3, Some(0), "two", "")));
        assert!(!view.on_partial(a_partial(2, Some(0), "zombie", "")));
    }

    #[test]
    fn speakers_are_numbers_and_revisions_name_those_who_were_not_known() {
        let mut view = View::default();
        let late = json!({ "speakers": { "by": "segmentation", "late": true } });
        view.on_final(&a_final(0, 3, late, &[(0, 1_000, "hello", None), (1_000, 2_000, "hi", None)]));
        assert!(view.waits_for_speakers());
        let state = view.state();
        assert_eq!((&state["lines"][0]["speaker"], &state["remaining_time_diarization"]), (&json!(0), &json!(2.0)));
        view.on_final(&a_final(1, 5, json!({}), &[(9_000, 9_500, "bye", Some("S2"))]));
        let revision: Revision = serde_json::from_value(json!({
            "kind": "session", "id": "s", "index": 0, "revision": 1, "epoch": 1, "speakers": { "by": "segmentation" },
            "segments": segments(&[(0, 1_000, "hello", Some("S1")), (1_000, 2_000, "hi", Some("S2"))]),
        }))
        .expect("a revision");
        assert!(view.on_revision(&revision));
        assert!(!view.waits_for_speakers());
        let state = view.state();
        let told: Vec<(i64, &str)> = state["lines"]
            .as_array()
            .expect("lines")
            .iter()
            .map(|line| (line["speaker"].as_i64().expect("a number"), line["text"].as_str().expect("text")))
            .collect();
        assert_eq!(told, [(1, "hello"), (2, "hi"), (SILENCE, ""), (2, "bye")]);
        assert_eq!(state["lines"][2]["start"], "0:00:02");
    }

    #[test]
    fn channels_are_speakers_of_their_own() {
        let mut view = View::default();
        view.on_final(&a_final(
            0,
            3,
            json!({}),
            &[(0, 1, "a", Some("agent")), (1, 2, "b", Some("ch1")), (2, 3, "c", Some("agent"))],
        ));
        let state = view.state();
        let numbers: Vec<_> = state["lines"].as_array().expect("lines").iter().map(|l| l["speaker"].clone()).collect();
        assert_eq!(numbers, [1, 2, 1]);
    }

    #[test]
    fn an_end_holds_until_somebody_goes_on() {
        let mut view = View::default();
        view.on_final(&a_final(0, 7, json!({ "end": true }), &[]));
        assert_eq!(view.end(), Some(7));
        view.on_final(&a_final(1, 9, json!({}), &[]));
        assert_eq!(view.end(), None);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut view = View::default();
        for n in 0..MOST_LINES as u64 + 10 {
            view.on_final(&a_final(n, n + 1, json!({}), &[(n, n + 1, "x", None)]));
        }
        assert_eq!(view.lines.len(), MOST_LINES);
        assert_eq!(view.lines.front().map(|line| line.index), Some(10));
    }

    #[test]
    fn times_are_as_python_writes_them() {
        for (ms, text) in [(0, "0:00:00"), (1_999, "0:00:01"), (61_000, "0:01:01"), (36_000_000, "10:00:00")] {
            assert_eq!(clock(ms), text);
        }
    }
}
