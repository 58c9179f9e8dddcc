//! Who speaks: pieces cut where the speaker changes, and turns where a transcript brings none.

use std::collections::HashMap;

use voxfleet_schema::job::SpeakerTurn;

use super::piece::{Piece, Timed, letters, seconds};

/// Pauses up to this are inside a turn: a breath, not somebody else's chance.
const PAUSE_MS: u64 = 500;

fn speaker_of<'a>(piece: &'a Piece, word: &'a Timed) -> Option<&'a str> {
    word.speaker.as_deref().or(piece.speaker.as_deref())
}

/// Pieces of one speaker each. Words decide where they make up the text; elsewhere a piece has its own speaker.
pub(super) fn by_speaker(pieces: &[Piece]) -> Vec<Piece> {
    pieces.iter().flat_map(of_piece).collect()
}

fn of_piece(piece: &Piece) -> Vec<Piece> {
    let runs: Vec<&[Timed]> = piece.words.chunk_by(|a, b| speaker_of(piece, a) == speaker_of(piece, b)).collect();
    let whole = piece.words.iter().map(|w| letters(&w.text)).sum::<usize>() == letters(&piece.text);
    if runs.len() > 1 && !whole {
        return vec![piece.clone()];
    }
    let mut rest = piece.text.as_str();
    let mut cut = Vec::new();
    for (n, run) in runs.iter().enumerate() {
        let taken = run.iter().map(|w| letters(&w.text)).sum();
        let (text, tail) = rest.split_at(if n + 1 == runs.len() { rest.len() } else { after_letters(rest, taken) });
        rest = tail;
        let (first, last) = (&run[0], &run[run.len() - 1]);
        cut.push(Piece {
            // The outer ones keep the segment's ends.
            start_ms: if n == 0 { piece.start_ms } else { first.start_ms },
            end_ms: if n + 1 == runs.len() { piece.end_ms } else { last.end_ms },
            text: text.trim().to_owned(),
            speaker: speaker_of(piece, first).map(str::to_owned),
            words: run.to_vec(),
            ..piece.clone()
        });
    }
    if cut.is_empty() { vec![piece.clone()] } else { cut }
}

/// Where in the text, in bytes, so many letters have been.
fn after_letters(text: &str, count: usize) -> usize {
    let letters = text.char_indices().filter(|(_, c)| !c.is_whitespace());
    letters.take(count).last().map_or(0, |(at, c)| at + c.len_utf8())
}

/// Turns made of words, or of whole pieces where those have no words: one speaker's are joined over short pauses.
pub(crate) fn turns_of(pieces: &[Piece]) -> Vec<SpeakerTurn> {
    let mut spoken: Vec<(u64, u64, &str)> = Vec::new();
    for piece in pieces {
        if piece.words.is_empty() {
            spoken.extend(piece.speaker.as_deref().map(|who| (piece.start_ms, piece.end_ms, who)));
        }
        spoken.extend(piece.words.iter().filter_map(|w| Some((w.start_ms, w.end_ms, speaker_of(piece, w)?))));
    }
    spoken.sort_by_key(|(start_ms, ..)| *start_ms);
    let mut turns: Vec<(u64, u64, &str)> = Vec::new();
    let mut open: HashMap<&str, usize> = HashMap::new();
    for (start_ms, end_ms, who) in spoken {
        match open.get(who).map(|at| &mut turns[*at]).filter(|last| start_ms <= last.1 + PAUSE_MS) {
            Some(last) => last.1 = last.1.max(end_ms),
            None => {
                open.insert(who, turns.len());
                turns.push((start_ms, end_ms, who));
            }
        }
    }
    let turn = |(start_ms, end_ms, who): (u64, u64, &str)| SpeakerTurn {
        speaker: who.to_owned(),
        start: seconds(start_ms),
        end: seconds(end_ms),
    };
    turns.into_iter().map(turn).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(text: &str, start_ms: u64, speaker: Option<&str>) -> Timed {
        let speaker = speaker.map(str::to_owned);
        Timed { text: text.to_owned(), start_ms, end_ms: start_ms + 80, speaker, ..Timed::default() }
    }

    fn piece(text: &str, speaker: Option<&str>, words: Vec<Timed>) -> Piece {
        let speaker = speaker.map(str::to_owned);
        Piece { start_ms: 0, end_ms: 1_000, text: text.to_owned(), speaker, words, ..Piece::default() }
    }

    fn shown(pieces: &[Piece]) -> Vec<(&str, Option<&str>, u64, u64)> {
        pieces.iter().map(|p| (p.text.as_str(), p.speaker.as_deref(), p.start_ms, p.end_ms)).collect()
    }

    #[test]
    fn a_piece_is_cut_where_the_speaker_changes() {
        let words = vec![
            word(" Hello,", 100, None),
            word(" yes", 300, Some("B")),
            word(" no.", 400, Some("B")),
            word(" oh", 900, None),
        ];
        let found = by_speaker(&[piece("Hello, yes no. oh", Some("A"), words)]);
        let expected = [("Hello,", Some("A"), 0, 180), ("yes no.", Some("B"), 300, 480), ("oh", Some("A"), 900, 1_000)];
        assert_eq!(shown(&found), expected);
        assert_eq!(found[1].words.len(), 2);
    }

    #[test]
    fn a_piece_of_one_speaker_stays_whole() {
        let words = vec![word("a", 100, Some("B")), word("b", 300, Some("B"))];
        assert_eq!(shown(&by_speaker(&[piece("a b", None, words)])), [("a b", Some("B"), 0, 1_000)]);
        assert_eq!(shown(&by_speaker(&[piece("a b", Some("A"), vec![])])), [("a b", Some("A"), 0, 1_000)]);
        let others = vec![word("a", 100, Some("B")), word("other", 300, Some("C"))];
        assert_eq!(shown(&by_speaker(&[piece("a b", None, others)])), [("a b", None, 0, 1_000)], "not its words");
    }

    #[test]
    fn text_without_spaces_is_cut_between_letters() {
        let words = vec![word("你好", 0, Some("A")), word("是", 500, Some("B"))];
        let found = by_speaker(&[piece("你好是", None, words)]);
        assert_eq!(found.iter().map(|p| p.text.as_str()).collect::<Vec<_>>(), ["你好", "是"]);
    }

    #[test]
    fn turns_are_made_of_words() {
        let pieces = [
            piece("x", Some("A"), vec![word("x", 0, None), word("y", 500, None), word("z", 300, Some("B"))]),
            Piece { start_ms: 1_080, end_ms: 2_000, ..piece("w", Some("A"), vec![]) },
            Piece { start_ms: 2_501, end_ms: 2_900, ..piece("w", Some("A"), vec![]) },
            piece("nobody", None, vec![word("nobody", 0, None)]),
        ];
        let found: Vec<_> = turns_of(&pieces).into_iter().map(|t| (t.speaker, t.start, t.end)).collect();
        let expected = [("A", 0.0, 2.0), ("B", 0.3, 0.38), ("A", 2.501, 2.9)];
        assert_eq!(found, expected.map(|(who, start, end)| (who.to_owned(), start, end)));
    }
}
