//! Text with its times.

use std::collections::BTreeMap;

use serde::Serialize;
use voxfleet_schema::{
    SAMPLE_RATE_HZ,
    failure::Failure,
    id::{Kind, StreamId},
    job::{AlignedSegment, AlignedWord, JobResult, ResultSegment, SpeakerTurn},
    transcript::{Final, Revision, Segment, Word, join_text},
};

use super::Document;
use crate::plain::without_controls;

/// Turns looked back over for the one that goes on: more people do not speak at once.
const SPEAKERS_AT_ONCE: usize = 4;

#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Piece {
    pub(crate) start_ms: u64,
    pub(crate) end_ms: u64,
    pub(crate) text: String,
    pub(crate) speaker: Option<String>,
    pub(crate) channel: Option<u16>,
    /// Empty where the times of words are not known.
    pub(crate) words: Vec<Timed>,
}

/// A word.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Timed {
    pub(crate) text: String,
    pub(crate) start_ms: u64,
    pub(crate) end_ms: u64,
    /// 0 to 1.
    pub(crate) score: f32,
    pub(crate) speaker: Option<String>,
    /// Who speaks over it.
    pub(crate) overlapped_by: Option<String>,
}

fn ms(seconds: f64) -> u64 {
    // A cast of what is negative or no number gives 0.
    (seconds * 1000.0).round() as u64
}

pub(super) fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

/// Characters that are no white space.
pub(super) fn letters(text: &str) -> usize {
    text.chars().filter(|c| !c.is_whitespace()).count()
}

impl Document {
    /// `json` are the aggregate's own bytes.
    pub(crate) fn of_result(id: &StreamId, result: &JobResult, json: String) -> Self {
        Self { name: id.to_string(), pieces: of_result(result), turns: result.speaker_turns.clone(), json }
    }
}

fn of_result(result: &JobResult) -> Vec<Piece> {
    let word = |w: &AlignedWord| Timed {
        text: without_controls(&w.word),
        start_ms: ms(w.start),
        end_ms: ms(w.end),
        score: w.score,
        speaker: w.speaker.clone(),
        overlapped_by: w.overlapped_by.clone(),
    };
    let piece = |s: &AlignedSegment| Piece {
        start_ms: ms(s.start),
        end_ms: ms(s.end),
        text: without_controls(&s.text),
        speaker: s.speaker.as_deref().map(without_controls),
        channel: s.channel,
        words: s.words.iter().map(word).collect(),
    };
    result.aligned_segments.iter().map(piece).collect()
}

/// What a chain of finals says by now.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    pub(crate) finals: Vec<Final>,
}

/// A chain as one object: the fields of a job's aggregate that a chain knows, and whose chain it is.
#[derive(Debug, Serialize)]
struct Whole<'a> {
    kind: Kind,
    id: &'a StreamId,
    /// No more is to come.
    ended: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a Failure>,
    full_text: String,
    segments: Vec<ResultSegment>,
    aligned_segments: Vec<AlignedSegment>,
    language: Option<&'a str>,
    duration: f64,
    speaker_turns: Vec<SpeakerTurn>,
}

impl Chain {
    /// Puts revised segments and turns in the place of those of their final: the highest revision of each counts.
    pub(crate) fn revise(&mut self, revisions: Vec<Revision>) {
        let mut highest: BTreeMap<u64, Revision> = BTreeMap::new();
        for revision in revisions {
            let known = highest.get(&revision.index).map(|known| known.revision);
            if known.is_none_or(|known| known < revision.revision) {
                highest.insert(revision.index, revision);
            }
        }
        for one in &mut self.finals {
            if let Some(revision) = highest.remove(&one.index) {
                one.words_omitted |= revision.words_omitted;
                (one.segments, one.turns, one.speakers) = (revision.segments, revision.turns, revision.speakers);
            }
        }
    }

    pub(crate) fn ended(&self) -> bool {
        self.finals.last().is_some_and(|last| last.end)
    }

    /// Why it ended, where it did not end well.
    pub(crate) fn error(&self) -> Option<&Failure> {
        self.finals.last().filter(|last| last.end).and_then(|last| last.error.as_ref())
    }

    fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.finals.iter().flat_map(|f| &f.segments).filter(|s| !s.text.trim().is_empty())
    }

    fn pieces(&self) -> Vec<Piece> {
        let word = |w: &Word| Timed {
            text: without_controls(&w.text),
            start_ms: w.start_ms,
            end_ms: w.end_ms,
            score: w.confidence,
            speaker: w.speaker.clone(),
            overlapped_by: w.overlapped_by.clone(),
        };
        let piece = |s: &Segment| Piece {
            start_ms: s.start_ms,
            end_ms: s.end_ms,
            text: s.text.trim().to_owned(),
            speaker: s.speaker.clone(),
            channel: s.channel,
            words: s.words.iter().map(word).collect(),
        };
        self.segments().map(piece).collect()
    }

    /// The turns of all finals; pieces of one turn, cut where finals are, become one again.
    fn turns(&self) -> Vec<SpeakerTurn> {
        let mut turns: Vec<SpeakerTurn> = Vec::new();
        for turn in self.finals.iter().flat_map(|f| &f.turns) {
            let (start, end) = (seconds(turn.start_ms), seconds(turn.end_ms));
            match turns.iter_mut().rev().take(SPEAKERS_AT_ONCE).find(|last| last.speaker == turn.speaker) {
                Some(last) if last.end >= start => last.end = last.end.max(end),
                _ => turns.push(SpeakerTurn { speaker: turn.speaker.clone(), start, end }),
            }
        }
        turns
    }

    /// None for a chain without finals.
    pub(crate) fn document(&self) -> Option<Result<Document, serde_json::Error>> {
        let name = self.finals.last()?.id.to_string();
        let json = self.json()?;
        Some(json.map(|json| Document { name, pieces: self.pieces(), turns: self.turns(), json }))
    }

    fn json(&self) -> Option<Result<String, serde_json::Error>> {
        let last = self.finals.last()?;
        let mut languages: BTreeMap<&str, usize> = BTreeMap::new();
        for segment in self.segments() {
            if let Some(language) = &segment.language {
                *languages.entry(language).or_default() += segment.text.trim().len();
            }
        }
        let whole = Whole {
            kind: last.kind,
            id: &last.id,
            ended: self.ended(),
            error: self.error(),
            full_text: join_text(self.segments().map(|s| s.text.as_str())),
            segments: self.segments().zip(0..).map(|(s, id)| result_segment(s, id)).collect(),
            aligned_segments: self.segments().map(aligned_segment).collect(),
            language: languages.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(language, _)| language),
            duration: last.to_sample as f64 / f64::from(SAMPLE_RATE_HZ),
            speaker_turns: self.turns(),
        };
        Some(serde_json::to_string(&whole))
    }
}

fn result_segment(s: &Segment, id: u64) -> ResultSegment {
    ResultSegment {
        id,
        start: seconds(s.start_ms),
        end: seconds(s.end_ms),
        text: s.text.trim().to_owned(),
        speaker: s.speaker.clone(),
        channel: s.channel,
        confidence: s.confidence,
    }
}

fn aligned_segment(s: &Segment) -> AlignedSegment {
    let words = s.words.iter().map(|w| AlignedWord {
        word: w.text.trim().to_owned(),
        start: seconds(w.start_ms),
        end: seconds(w.end_ms),
        score: w.confidence,
        speaker: w.speaker.clone(),
        overlapped_by: w.overlapped_by.clone(),
    });
    AlignedSegment {
        start: seconds(s.start_ms),
        end: seconds(s.end_ms),
        text: s.text.trim().to_owned(),
        speaker: s.speaker.clone(),
        channel: s.channel,
        words: words.collect(),
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::transcript::Turn;

    use super::*;
    use crate::transcript::view::tests::a_final;

    fn revision(index: u64, number: u64, text: &str) -> Revision {
        let mut segments = a_final(index, 1, "g", text).segments;
        segments[0].speaker = Some("B".to_owned());
        let id = StreamId::new("s").expect("id");
        Revision {
            kind: Kind::Session,
            id,
            index,
            revision: number,
            epoch: 1,
            segments,
            turns: vec![turn(index * 1_000, index * 1_000 + 700, text)],
            speakers: None,
            words_omitted: false,
        }
    }

    fn turn(start_ms: u64, end_ms: u64, speaker: &str) -> Turn {
        Turn { start_ms, end_ms, speaker: speaker.to_owned(), voice: None }
    }

    #[test]
    fn the_highest_revision_counts() {
        let mut chain = Chain { finals: vec![a_final(0, 1, "g", "one"), a_final(1, 1, "g", "two")] };
        chain.revise(vec![revision(1, 2, "TWO"), revision(1, 1, "Two"), revision(9, 1, "nowhere")]);
        let texts: Vec<_> = chain.pieces().into_iter().map(|p| (p.text, p.speaker)).collect();
        assert_eq!(texts, [("one".to_owned(), None), ("TWO".to_owned(), Some("B".to_owned()))]);
        assert_eq!(chain.turns(), [SpeakerTurn { speaker: "TWO".to_owned(), start: 1.0, end: 1.7 }], "its turns too");
    }

    #[test]
    fn a_turn_cut_by_a_final_is_one() {
        let mut chain = Chain { finals: vec![a_final(0, 1, "g", "one"), a_final(1, 1, "g", "two")] };
        chain.finals[0].turns = vec![turn(0, 1_000, "S1"), turn(400, 600, "S2")];
        chain.finals[1].turns = vec![turn(1_000, 1_500, "S1"), turn(1_600, 2_000, "S2"), turn(1_700, 1_900, "S1")];
        let found: Vec<_> = chain.turns().into_iter().map(|t| (t.speaker, t.start, t.end)).collect();
        let expected = [("S1", 0.0, 1.5), ("S2", 0.4, 0.6), ("S2", 1.6, 2.0), ("S1", 1.7, 1.9)];
        assert_eq!(found, expected.map(|(who, start, end)| (who.to_owned(), start, end)));
    }

    #[test]
    fn a_chain_as_one_object() {
        let mut chain =
            Chain { finals: vec![a_final(0, 1, "g", " one"), a_final(1, 1, "g", " "), a_final(2, 1, "g", "two")] };
        chain.finals[0].segments[0].language = Some("en".to_owned());
        chain.finals[2].end = true;
        let json = chain.json().expect("finals").expect("JSON");
        let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(value["full_text"], "one two");
        assert_eq!(
            (&value["language"], &value["duration"], &value["ended"]),
            (&"en".into(), &3.0.into(), &true.into())
        );
        assert_eq!((&value["segments"][1]["id"], &value["segments"][1]["start"]), (&1.into(), &2.0.into()));
        assert_eq!(value["aligned_segments"][0]["words"][0]["word"], "one");
        assert!(Chain::default().json().is_none());
    }

    #[test]
    fn an_aggregate_gives_the_same_pieces_as_its_chain() {
        let mut chain = Chain { finals: vec![a_final(0, 1, "g", "one"), a_final(1, 1, "g", "two")] };
        chain.finals[0].turns = vec![turn(100, 800, "S1")];
        chain.finals[0].segments[0].channel = Some(1);
        let json = chain.json().expect("finals").expect("JSON");
        let mut value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        value["provider"] = "local".into();
        value["performance_metrics"] = serde_json::json!({"total_duration": 1.0, "stages": {}, "realtime_factor": 0.5});
        let result: JobResult = serde_json::from_value(value).expect("an aggregate");
        let of_job = Document::of_result(&chain.finals[0].id, &result, String::new());
        assert_eq!(of_job.pieces, chain.pieces());
        assert_eq!(of_job.turns, [SpeakerTurn { speaker: "S1".to_owned(), start: 0.1, end: 0.8 }]);
        assert_eq!((ms(-1.0), ms(f64::NAN), ms(1.0005)), (0, 0, 1001));
    }
}
