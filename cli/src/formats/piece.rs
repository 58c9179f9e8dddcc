//! Text with its times.

use std::collections::BTreeMap;

use serde::Serialize;
use voxfleet_schema::{
    SAMPLE_RATE_HZ,
    failure::Failure,
    id::{Kind, StreamId},
    job::{AlignedSegment, AlignedWord, JobResult, ResultSegment, SpeakerTurn},
    transcript::{Final, Revision, Segment, join_text},
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start_ms: u64,
    pub(crate) end_ms: u64,
    pub(crate) text: String,
    pub(crate) speaker: Option<String>,
    /// Empty where the times of words are not known.
    pub(crate) words: Vec<Timed>,
}

/// A word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Timed {
    pub(crate) text: String,
    pub(crate) start_ms: u64,
    pub(crate) end_ms: u64,
}

fn ms(seconds: f64) -> u64 {
    // A cast of what is negative or no number gives 0.
    (seconds * 1000.0).round() as u64
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

pub(crate) fn of_result(result: &JobResult) -> Vec<Piece> {
    let word = |w: &AlignedWord| Timed { text: w.word.clone(), start_ms: ms(w.start), end_ms: ms(w.end) };
    let piece = |s: &AlignedSegment| Piece {
        start_ms: ms(s.start),
        end_ms: ms(s.end),
        text: s.text.clone(),
        speaker: s.speaker.clone(),
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
    /// Puts revised segments in the place of those of their final: the highest revision of each counts.
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
                one.segments = revision.segments;
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

    pub(crate) fn pieces(&self) -> Vec<Piece> {
        let piece = |s: &Segment| Piece {
            start_ms: s.start_ms,
            end_ms: s.end_ms,
            text: s.text.trim().to_owned(),
            speaker: s.speaker.clone(),
            words: (s.words.iter())
                .map(|w| Timed { text: w.text.clone(), start_ms: w.start_ms, end_ms: w.end_ms })
                .collect(),
        };
        self.segments().map(piece).collect()
    }

    /// None for a chain without finals.
    pub(crate) fn json(&self) -> Option<Result<String, serde_json::Error>> {
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
            speaker_turns: Vec::new(),
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
            turns: Vec::new(),
            speakers: None,
        }
    }

    #[test]
    fn the_highest_revision_counts() {
        let mut chain = Chain { finals: vec![a_final(0, 1, "g", "one"), a_final(1, 1, "g", "two")] };
        chain.revise(vec![revision(1, 2, "TWO"), revision(1, 1, "Two"), revision(9, 1, "nowhere")]);
        let texts: Vec<_> = chain.pieces().into_iter().map(|p| (p.text, p.speaker)).collect();
        assert_eq!(texts, [("one".to_owned(), None), ("TWO".to_owned(), Some("B".to_owned()))]);
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
        let chain = Chain { finals: vec![a_final(0, 1, "g", "one"), a_final(1, 1, "g", "two")] };
        let json = chain.json().expect("finals").expect("JSON");
        let mut value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        value["provider"] = "local".into();
        value["performance_metrics"] = serde_json::json!({"total_duration": 1.0, "stages": {}, "realtime_factor": 0.5});
        let result: JobResult = serde_json::from_value(value).expect("an aggregate");
        assert_eq!(of_result(&result), chain.pieces());
        assert_eq!((ms(-1.0), ms(f64::NAN), ms(1.0005)), (0, 0, 1001));
    }
}
