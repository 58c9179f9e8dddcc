//! What a file says, whatever its form: text, RTTM, one JSON object, or one a line. Pure.

use serde::Deserialize;
use serde_json::Value;
use voxfleet_eval::{Turn, rttm, text::Normalise, wder::Spoken};
use voxfleet_schema::transcript::join_text;

use crate::formats::{Piece, Timed, turns_of};

#[derive(Debug, thiserror::Error)]
pub(super) enum ContentError {
    #[error("line {line} is no JSON object")]
    Line { line: usize, source: serde_json::Error },
    #[error("it is no JSON object of ours: {0}")]
    Shape(serde_json::Error),
    #[error(transparent)]
    Rttm(#[from] rttm::ParseError),
    #[error("no {0} in it")]
    Lacks(&'static str),
}

#[derive(Debug)]
pub(super) enum Content {
    Text(String),
    Rttm(Vec<rttm::Entry>),
    Transcript(Transcript),
    /// Objects, one a line.
    Lines(Vec<Value>),
}

/// A transcript with what is known of times and speakers.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    pieces: Vec<Piece>,
    /// Those that stand in the file by themselves.
    turns: Vec<Turn>,
}

/// Fields of all the objects that are read: a job's aggregate, an export, its words, a test call.
#[derive(Debug, Deserialize)]
struct Object {
    #[serde(default)]
    aligned_segments: Vec<Part>,
    #[serde(default)]
    segments: Vec<Part>,
    /// A test call.
    #[serde(default)]
    turns: Vec<Part>,
    #[serde(default)]
    words: Vec<Word>,
    #[serde(default)]
    speaker_turns: Vec<Part>,
    full_text: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Part {
    start: f64,
    end: f64,
    #[serde(default)]
    text: String,
    speaker: Option<String>,
    #[serde(default)]
    words: Vec<Word>,
}

#[derive(Debug, Clone, Deserialize)]
struct Word {
    word: String,
    #[serde(default)]
    start: f64,
    #[serde(default)]
    end: f64,
    speaker: Option<String>,
}

fn ms(seconds: f64) -> u64 {
    // A cast of what is negative or no number gives 0.
    (seconds * 1000.0).round() as u64
}

impl From<Word> for Timed {
    fn from(word: Word) -> Self {
        let (start_ms, end_ms) = (ms(word.start), ms(word.end));
        Timed { text: word.word, start_ms, end_ms, speaker: word.speaker, score: 1.0, overlapped_by: None }
    }
}

impl From<Part> for Piece {
    fn from(part: Part) -> Self {
        let words = part.words.into_iter().map(Timed::from).collect();
        let (start_ms, end_ms) = (ms(part.start), ms(part.end));
        Piece { start_ms, end_ms, text: part.text, speaker: part.speaker, channel: None, words }
    }
}

impl From<Part> for Turn {
    fn from(part: Part) -> Self {
        Turn { start_s: part.start, end_s: part.end, speaker: part.speaker.unwrap_or_default() }
    }
}

impl From<Object> for Transcript {
    fn from(object: Object) -> Self {
        let turns = if object.speaker_turns.is_empty() { &object.turns } else { &object.speaker_turns };
        let turns = turns.iter().filter(|t| t.speaker.is_some()).cloned().map(Turn::from).collect();
        let parts = [object.aligned_segments, object.segments, object.turns];
        let mut pieces: Vec<Piece> =
            parts.into_iter().find(|list| !list.is_empty()).unwrap_or_default().into_iter().map(Piece::from).collect();
        if pieces.is_empty() && !object.words.is_empty() {
            let words: Vec<Timed> = object.words.into_iter().map(Timed::from).collect();
            let text = join_text(words.iter().map(|w| w.text.as_str()));
            pieces = vec![Piece { text, words, ..Piece::default() }];
        } else if pieces.is_empty() {
            let text = object.full_text.unwrap_or_default();
            pieces.extend((!text.is_empty()).then(|| Piece { text, ..Piece::default() }));
        }
        Transcript { pieces, turns }
    }
}

impl Content {
    pub(super) fn of(text: &str) -> Result<Self, ContentError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        if text.trim_start().starts_with('{') {
            return match serde_json::from_str::<Value>(text) {
                // One line of several that happens to be alone.
                Ok(value) if value.get("type").is_some() || value.get("word").is_some() => {
                    Ok(Content::Lines(vec![value]))
                }
                Ok(value) => {
                    let object: Object = serde_json::from_value(value).map_err(ContentError::Shape)?;
                    Ok(Content::Transcript(object.into()))
                }
                Err(error) if text.trim().lines().count() < 2 => Err(ContentError::Shape(error)),
                Err(_) => objects(text).map(Content::Lines),
            };
        }
        let first = text.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with(";;") && !l.starts_with('#'));
        let kind = first.and_then(|line| line.split_whitespace().next()).unwrap_or_default();
        if kind == "SPEAKER" || kind == "SPKR-INFO" {
            return Ok(Content::Rttm(rttm::parse(text)?));
        }
        Ok(Content::Text(text.to_owned()))
    }

    /// Its text, one utterance each.
    pub(super) fn utterances(&self) -> Result<Vec<String>, ContentError> {
        match self {
            Content::Text(text) => Ok(text.lines().map(str::to_owned).collect()),
            Content::Transcript(of) => Ok(of.pieces.iter().map(|p| p.text.clone()).collect()),
            Content::Lines(lines) => finals(lines),
            Content::Rttm(_) => Err(ContentError::Lacks("words")),
        }
    }

    /// Turns by the name of their recording, which only RTTM knows.
    pub(super) fn turns(&self) -> Result<Vec<(Option<String>, Turn)>, ContentError> {
        match self {
            Content::Rttm(entries) => {
                Ok(entries.iter().map(|entry| (Some(entry.file.clone()), entry.turn.clone())).collect())
            }
            Content::Transcript(of) => {
                let made =
                    |t: voxfleet_schema::job::SpeakerTurn| Turn { start_s: t.start, end_s: t.end, speaker: t.speaker };
                let turns = match of.turns.is_empty() {
                    true => turns_of(&of.pieces).into_iter().map(made).collect(),
                    false => of.turns.clone(),
                };
                Ok(turns.into_iter().map(|turn| (None, turn)).collect())
            }
            // Nobody spoke: what RTTM says by saying nothing.
            Content::Text(text) if text.trim().is_empty() => Ok(Vec::new()),
            Content::Text(_) | Content::Lines(_) => Err(ContentError::Lacks("speaker turns")),
        }
    }

    /// Its words with their speakers, in the order in which they were spoken.
    pub(super) fn spoken(&self, normalise: Normalise) -> Result<Vec<Spoken>, ContentError> {
        let Content::Transcript(of) = self else { return Err(ContentError::Lacks("words with speakers")) };
        let mut words: Vec<(u64, String, Option<String>)> = Vec::new();
        for piece in &of.pieces {
            if piece.words.is_empty() {
                words.push((piece.start_ms, piece.text.clone(), piece.speaker.clone()));
            }
            let speaker = |word: &Timed| word.speaker.clone().or_else(|| piece.speaker.clone());
            words.extend(piece.words.iter().map(|w| (w.start_ms, w.text.clone(), speaker(w))));
        }
        words.sort_by_key(|(start_ms, ..)| *start_ms);
        if words.iter().all(|(_, _, speaker)| speaker.is_none()) && !words.is_empty() {
            return Err(ContentError::Lacks("words with speakers"));
        }
        // What one says on end is made comparable in one piece: a number may be several words.
        let runs = words.chunk_by(|a, b| a.2 == b.2);
        let spoken = runs.flat_map(|run| {
            let text = join_text(run.iter().map(|(_, word, _)| word.as_str()));
            normalise.words(&text).into_iter().map(|word| Spoken { word, speaker: run[0].2.clone() })
        });
        Ok(spoken.collect())
    }

    /// Its words with their times in ms, in the order of their starts.
    pub(super) fn timed(&self) -> Result<Vec<(String, u64, u64)>, ContentError> {
        let mut words: Vec<(String, u64, u64)> = match self {
            Content::Transcript(of) => {
                of.pieces.iter().flat_map(|p| &p.words).map(|w| (w.text.clone(), w.start_ms, w.end_ms)).collect()
            }
            Content::Lines(lines) => {
                let word = |line: &Value| {
                    let end_ms = line["end_ms"].as_u64()?;
                    Some((line["word"].as_str()?.to_owned(), line["start_ms"].as_u64().unwrap_or(end_ms), end_ms))
                };
                lines
                    .iter()
                    .map(word)
                    .collect::<Option<_>>()
                    .ok_or(ContentError::Lacks("word and end_ms on every line"))?
            }
            Content::Text(_) | Content::Rttm(_) => Vec::new(),
        };
        if words.is_empty() {
            return Err(ContentError::Lacks("words with times"));
        }
        words.sort_by_key(|(_, start_ms, _)| *start_ms);
        Ok(words)
    }
}

fn objects(text: &str) -> Result<Vec<Value>, ContentError> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let object =
        |(line, text): (usize, &str)| serde_json::from_str(text).map_err(|source| ContentError::Line { line, source });
    lines.map(object).collect()
}

/// The text of the finals among what `stream --json` and `watch --json` print.
fn finals(lines: &[Value]) -> Result<Vec<String>, ContentError> {
    let segments = lines.iter().filter(|l| l["type"] == "final").filter_map(|l| l["final"]["segments"].as_array());
    let texts: Vec<String> = segments.flatten().filter_map(|s| Some(s["text"].as_str()?.to_owned())).collect();
    if texts.is_empty() { Err(ContentError::Lacks("finals")) } else { Ok(texts) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Content {
        Content::of(text).expect("a file")
    }

    const CALL: &str = r#"{"audio": "x", "seconds": 3, "turns": [
        {"speaker": "agent", "voice": "f2", "start": 1.0, "end": 2.0, "text": "oh two three", "words": [
            {"word": "two", "start": 1.2, "end": 1.4}, {"word": "oh", "start": 1.0, "end": 1.1},
            {"word": "three", "start": 1.5, "end": 1.6}]},
        {"speaker": "customer", "start": 1.3, "end": 1.8, "text": "yes", "words": [{"word": "Yes.", "start": 1.45, "end": 1.8}]}]}"#;

    #[test]
    fn a_test_call_has_everything() {
        let call = of(CALL);
        assert_eq!(call.utterances().expect("text"), ["oh two three", "yes"]);
        let turns = call.turns().expect("turns");
        assert_eq!((turns.len(), turns[1].1.speaker.as_str(), turns[1].1.end_s), (2, "customer", 1.8));
        let words: Vec<_> = call.timed().expect("times").into_iter().map(|(word, _, end_ms)| (word, end_ms)).collect();
        assert_eq!(words[1..3], [("two".to_owned(), 1_400), ("Yes.".to_owned(), 1_800)]);
        let spoken = |by| -> Vec<String> {
            let words = call.spoken(by).expect("words").into_iter();
            words.map(|s| format!("{}:{}", s.speaker.unwrap_or_default(), s.word)).collect()
        };
        assert_eq!(spoken(Normalise::Basic), ["agent:oh", "agent:two", "customer:yes", "agent:three"]);
        assert_eq!(spoken(Normalise::English), ["agent:oh", "agent:2", "customer:yes", "agent:3"]);
    }

    #[test]
    fn our_own_forms_are_read() {
        let result =
            of(r#"{"full_text": "a b c", "segments": [{"start": 0, "end": 1, "text": "x"}], "speaker_turns": [],
            "aligned_segments": [{"start": 0, "end": 2, "text": "a b", "speaker": "S1", "words": [
                {"word": "a", "start": 0, "end": 0.5, "score": 1, "speaker": null},
                {"word": "b", "start": 1.5, "end": 2, "score": 1, "speaker": "S2"}]},
              {"start": 3, "end": 4, "text": "c d", "speaker": "S1", "words": []}]}"#);
        assert_eq!(result.utterances().expect("text"), ["a b", "c d"]);
        let turns: Vec<_> = result.turns().expect("turns").into_iter().map(|(_, t)| (t.speaker, t.end_s)).collect();
        assert_eq!(turns, [("S1", 0.5), ("S2", 2.0), ("S1", 4.0)].map(|(who, end)| (who.to_owned(), end)));
        let spoken = result.spoken(Normalise::Basic).expect("words");
        assert_eq!(spoken.iter().filter(|s| s.speaker.as_deref() == Some("S1")).count(), 3);
        let words = of(
            r#"{"name": "x", "words": [{"word": "a", "start": 0, "end": 1, "score": 1, "speaker": "S1", "channel": null}]}"#,
        );
        assert_eq!((words.utterances().expect("text"), words.turns().expect("turns").len()), (vec!["a".to_owned()], 1));
        assert_eq!(of(r#"{"full_text": "only this"}"#).utterances().expect("text"), ["only this"]);
        let lines = of(
            "{\"type\":\"partial\",\"partial\":{}}\n{\"type\":\"final\",\"final\":{\"segments\":[{\"text\":\"x\"}]}}\n",
        );
        assert_eq!(lines.utterances().expect("text"), ["x"]);
        let turns = of(";; x\nSPEAKER f 1 0 1 <NA> <NA> A <NA> <NA>\n").turns().expect("turns");
        assert_eq!(turns[0].0.as_deref(), Some("f"));
        assert_eq!(of("").turns().expect("nobody spoke").len(), 0);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let told = |result: Result<Content, ContentError>| result.expect_err("refused").to_string();
        assert_eq!(told(Content::of("{\"a\": 1}\n{\"b\"\n")), "line 2 is no JSON object");
        assert!(
            told(Content::of("{\"turns\": [{\"start\": \"x\"}]}")).contains("no JSON object of ours"),
            "a wrong type"
        );
        assert!(told(Content::of("{\"turns\": ")).contains("no JSON object of ours"), "cut off");
        assert_eq!(told(Content::of("SPEAKER a 1 0")), "line 1: 4 fields where 8 are needed");
        let text = of("one two");
        assert_eq!(text.turns().expect_err("none").to_string(), "no speaker turns in it");
        assert_eq!(text.spoken(Normalise::Basic).expect_err("none").to_string(), "no words with speakers in it");
        assert_eq!(text.timed().expect_err("none").to_string(), "no words with times in it");
        assert_eq!(of("SPEAKER f 1 0 1 x x A").utterances().expect_err("none").to_string(), "no words in it");
        let nobody = of(r#"{"segments": [{"start": 0, "end": 1, "text": "x", "speaker": null}]}"#);
        assert!(nobody.spoken(Normalise::Basic).is_err());
    }
}
