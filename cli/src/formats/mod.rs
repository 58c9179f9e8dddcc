//! A transcript as people keep it: plain text, SubRip, WebVTT, RTTM, one JSON object. Pure.
//!
//! | module | holds |
//! |---|---|
//! | [`piece`] | what is written down: text with its times, from a chain of finals or from a job's aggregate |
//! | [`speakers`] | pieces cut where the speaker changes, turns made of words |
//! | [`cue`] | subtitles: two short lines each, cut at word times, never one over another |
//! | [`subtitles`] | the syntax of SubRip and WebVTT |

mod cue;
mod piece;
mod speakers;
mod subtitles;

use clap::ValueEnum;
use serde::Serialize;
use voxfleet_eval::{Turn, rttm};
use voxfleet_schema::job::SpeakerTurn;

pub(crate) use piece::{Chain, Piece, Timed};
pub(crate) use speakers::turns_of;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// One line for each segment, with its speaker in front
    #[default]
    Text,
    /// One object with segments, words, times and turns
    Json,
    /// One object with every word: time, score, speaker, channel
    Words,
    /// SubRip subtitles
    Srt,
    /// WebVTT subtitles; speakers are voices
    Vtt,
    /// Who spoke when: NIST's Rich Transcription Time Marked
    Rttm,
}

impl Format {
    /// It can be written without the names of who speaks.
    pub(crate) fn can_hide_speakers(self) -> bool {
        matches!(self, Format::Text | Format::Srt | Format::Vtt)
    }
}

/// A transcript, ready to be written in any form.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Document {
    /// Whose transcript it is: the id of a session or job.
    pub(crate) name: String,
    pub(crate) pieces: Vec<Piece>,
    /// Who spoke when, as it was found beside the words; empty where nothing was.
    pub(crate) turns: Vec<SpeakerTurn>,
    /// What stands for it as JSON, which is not made of the rest.
    pub(crate) json: String,
}

impl Document {
    /// The whole file, with its last line ended.
    pub(crate) fn render(&self, format: Format, with_speakers: bool) -> String {
        let cues = || cue::cues(&hidden(speakers::by_speaker(&self.pieces), with_speakers));
        match format {
            Format::Text if with_speakers => text(&speakers::by_speaker(&self.pieces)),
            Format::Text => text(&hidden(self.pieces.clone(), false)),
            Format::Json => format!("{}\n", self.json.trim_end()),
            Format::Words => format!("{}\n", self.words()),
            Format::Srt => subtitles::srt(&cues()),
            Format::Vtt => subtitles::vtt(&cues()),
            Format::Rttm => self.rttm(),
        }
    }

    /// What a reader of the file might take for a mistake.
    pub(crate) fn notes(&self, format: Format) -> Vec<String> {
        let mut notes = Vec::new();
        if format == Format::Rttm && !self.pieces.is_empty() && self.turns().is_empty() {
            notes.push(format!("{}: nobody's turns are known; ask for them with --diarize", self.name));
        }
        let bare = self.pieces.iter().filter(|p| p.words.is_empty()).count();
        if format == Format::Words && bare > 0 {
            notes.push(format!("{}: {bare} segments have no words with times and are left out", self.name));
        }
        notes
    }

    fn turns(&self) -> Vec<SpeakerTurn> {
        if self.turns.is_empty() { turns_of(&self.pieces) } else { self.turns.clone() }
    }

    fn rttm(&self) -> String {
        let entry = |turn: SpeakerTurn| rttm::Entry {
            file: self.name.clone(),
            channel: "1".to_owned(),
            turn: Turn { start_s: turn.start, end_s: turn.end, speaker: turn.speaker },
        };
        rttm::write(&self.turns().into_iter().map(entry).collect::<Vec<_>>())
    }

    fn words(&self) -> String {
        let row = |piece: &Piece, word: &Timed| {
            serde_json::json!(Row {
                word: word.text.trim(),
                start: piece::seconds(word.start_ms),
                end: piece::seconds(word.end_ms),
                // Its own digits, not those of the wider number.
                score: (f64::from(word.score) * 10_000.0).round() / 10_000.0,
                speaker: word.speaker.as_deref().or(piece.speaker.as_deref()),
                overlapped_by: word.overlapped_by.as_deref(),
                channel: piece.channel,
            })
        };
        let rows: Vec<_> = self.pieces.iter().flat_map(|p| p.words.iter().map(|w| row(p, w))).collect();
        serde_json::json!({"name": self.name, "words": rows}).to_string()
    }
}

/// A word of [`Format::Words`]. Times are seconds.
#[derive(Serialize)]
struct Row<'a> {
    word: &'a str,
    start: f64,
    end: f64,
    score: f64,
    speaker: Option<&'a str>,
    /// Who else: only where there is somebody.
    #[serde(skip_serializing_if = "Option::is_none")]
    overlapped_by: Option<&'a str>,
    channel: Option<u16>,
}

fn hidden(mut pieces: Vec<Piece>, with_speakers: bool) -> Vec<Piece> {
    if !with_speakers {
        pieces.iter_mut().for_each(|piece| piece.speaker = None);
    }
    pieces
}

fn text(pieces: &[Piece]) -> String {
    let line = |piece: &Piece| {
        let words = piece.text.split_whitespace().collect::<Vec<_>>().join(" ");
        match piece.speaker.as_deref() {
            _ if words.is_empty() => None,
            Some(speaker) => Some(format!("{speaker}: {words}\n")),
            None => Some(format!("{words}\n")),
        }
    };
    pieces.iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start_ms: u64, text: &str, speaker: Option<&str>) -> Piece {
        let speaker = speaker.map(str::to_owned);
        Piece { start_ms, end_ms: start_ms + 1_000, text: text.to_owned(), speaker, ..Piece::default() }
    }

    fn word(text: &str, start_ms: u64, speaker: Option<&str>) -> Timed {
        let speaker = speaker.map(str::to_owned);
        Timed { text: text.to_owned(), start_ms, end_ms: start_ms + 300, score: 0.9, speaker, overlapped_by: None }
    }

    fn document(pieces: Vec<Piece>) -> Document {
        Document { name: "call-1".to_owned(), pieces, turns: Vec::new(), json: "{\"a\":1}\n".to_owned() }
    }

    #[test]
    fn text_is_one_line_a_segment() {
        let of =
            document(vec![piece(0, " good\nmorning ", None), piece(1, "  ", Some("A")), piece(2, "yes", Some("B"))]);
        assert_eq!(of.render(Format::Text, true), "good morning\nB: yes\n");
        assert_eq!(of.render(Format::Text, false), "good morning\nyes\n");
        assert_eq!(document(vec![]).render(Format::Text, true), "");
        assert_eq!(of.render(Format::Json, true), "{\"a\":1}\n");
    }

    #[test]
    fn a_change_of_speakers_is_a_line_and_a_cue() {
        let words = vec![word("yes", 0, Some("A")), word(" no", 400, Some("B"))];
        let of = document(vec![Piece { words, ..piece(0, "yes no", Some("A")) }]);
        assert_eq!(of.render(Format::Text, true), "A: yes\nB: no\n");
        assert_eq!(of.render(Format::Text, false), "yes no\n");
        let vtt = "WEBVTT\n\n1\n00:00:00.000 --> 00:00:00.300\n<v A>yes\n\n2\n00:00:00.400 --> 00:00:01.000\n<v B>no\n";
        assert_eq!(of.render(Format::Vtt, true), vtt);
        assert_eq!(of.render(Format::Vtt, false), vtt.replace("<v A>", "").replace("<v B>", ""));
        assert!(of.render(Format::Srt, true).contains("\nB: no\n") && !of.render(Format::Srt, false).contains("B:"));
    }

    #[test]
    fn turns_are_those_found_or_else_the_words() {
        let mut of = document(vec![Piece { words: vec![word("no", 400, None)], ..piece(0, "no", Some("B")) }]);
        let line = |start: &str, length: &str, who: &str| {
            format!("SPEAKER call-1 1 {start} {length} <NA> <NA> {who} <NA> <NA>\n")
        };
        assert_eq!(of.render(Format::Rttm, true), line("0.400", "0.300", "B"));
        of.turns = vec![SpeakerTurn { speaker: "S1".to_owned(), start: 0.1, end: 0.95 }];
        assert_eq!(of.render(Format::Rttm, true), line("0.100", "0.850", "S1"));
        assert!(of.notes(Format::Rttm).is_empty());
        let silent = document(vec![piece(0, "no", None)]);
        assert_eq!(silent.render(Format::Rttm, true), "");
        assert_eq!(silent.notes(Format::Rttm).len(), 1);
    }

    /// The files that `cli/tests/public_parsers.py` opens.
    #[test]
    fn the_forms_of_one_transcript() {
        let json = include_str!("../../tests/data/formats/result.json");
        let id = voxfleet_schema::id::StreamId::new("call-7").expect("an id");
        let of = Document::of_result(&id, &serde_json::from_str(json).expect("an aggregate"), json.to_owned());
        let forms = [
            (Format::Text, include_str!("../../tests/data/formats/transcript.txt")),
            (Format::Srt, include_str!("../../tests/data/formats/transcript.srt")),
            (Format::Vtt, include_str!("../../tests/data/formats/transcript.vtt")),
            (Format::Rttm, include_str!("../../tests/data/formats/transcript.rttm")),
            (Format::Words, include_str!("../../tests/data/formats/transcript.words.json")),
            (Format::Json, json),
        ];
        for (format, expected) in forms {
            assert_eq!(of.render(format, true), expected, "{format:?}");
        }
    }

    #[test]
    fn words_have_all_their_fields() {
        let mut one = piece(0, "no yes", Some("B"));
        let both = Timed { overlapped_by: Some("B".to_owned()), ..word("yes", 800, Some("A")) };
        (one.channel, one.words) = (Some(1), vec![word(" no", 400, None), both]);
        let of = document(vec![one, piece(0, "no words", None)]);
        let found: serde_json::Value = serde_json::from_str(&of.render(Format::Words, true)).expect("JSON");
        let expected = serde_json::json!({"name": "call-1", "words": [
            {"word": "no", "start": 0.4, "end": 0.7, "score": 0.9, "speaker": "B", "channel": 1},
            {"word": "yes", "start": 0.8, "end": 1.1, "score": 0.9, "speaker": "A", "overlapped_by": "B", "channel": 1},
        ]});
        assert_eq!(found, expected);
        assert_eq!(of.notes(Format::Words), ["call-1: 1 segments have no words with times and are left out"]);
    }
}
