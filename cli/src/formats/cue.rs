//! Subtitles: what stands on the screen at a time, and from when to when.
//!
//! A cue has at most two lines of about [`WIDTH`] characters. A segment that is longer becomes several, cut between words;
//! each then lasts from its first word to the end of its last one. Where the times of words are missing, or do not fit the
//! text, the segment's time is shared out by characters. Cues follow one another: none begins before the one before it ends.

use super::piece::{Piece, letters};

/// What a line holds, in characters: broadcasters keep to 37 to 42, so that it is read at a glance.
pub(super) const WIDTH: usize = 42;
const LINES: usize = 2;
/// Shortest cue: one that ends as it begins is not shown, and some players refuse the file.
const SHORTEST_MS: u64 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cue {
    pub(super) start_ms: u64,
    pub(super) end_ms: u64,
    pub(super) speaker: Option<String>,
    /// One or two, none empty.
    pub(super) lines: Vec<String>,
}

/// A word, or a part of one that is longer than a line.
#[derive(Debug, Clone)]
struct Token {
    text: String,
    chars: usize,
    /// No space between it and the one before.
    glued: bool,
    start_ms: u64,
    end_ms: u64,
}

pub(super) fn cues(pieces: &[Piece]) -> Vec<Cue> {
    let mut cues: Vec<Cue> = pieces.iter().flat_map(of_piece).collect();
    // Two people who speak at once have segments that overlap.
    cues.sort_by_key(|cue| cue.start_ms);
    for at in 0..cues.len() {
        let (before, rest) = cues.split_at_mut(at);
        let cue = &mut rest[0];
        if let Some(last) = before.last_mut()
            && last.end_ms > cue.start_ms
        {
            if last.start_ms + SHORTEST_MS <= cue.start_ms {
                last.end_ms = cue.start_ms;
            } else {
                cue.start_ms = last.end_ms;
            }
        }
        cue.end_ms = cue.end_ms.max(cue.start_ms + SHORTEST_MS);
    }
    cues
}

fn of_piece(piece: &Piece) -> Vec<Cue> {
    let speaker = piece.speaker.as_deref().map(|s| s.split_whitespace().collect::<Vec<_>>().join(" "));
    let speaker = speaker.filter(|s| !s.is_empty());
    // The name stands in front of the first line, with a colon and a space.
    let taken = speaker.as_ref().map_or(0, |name| (name.chars().count() + 2).min(WIDTH / 2));
    let mut cues = Vec::new();
    let mut rest = tokens(piece);
    while !rest.is_empty() {
        let here = fits(&rest, taken);
        let tail = rest.split_off(here);
        let (start_ms, end_ms) = (rest[0].start_ms, rest[here - 1].end_ms);
        cues.push(Cue { start_ms, end_ms, speaker: speaker.clone(), lines: lines(&rest, taken) });
        rest = tail;
    }
    // Alone on the screen it stays for the whole segment; of several the outer ones keep the segment's ends.
    if let Some(first) = cues.first_mut() {
        first.start_ms = first.start_ms.min(piece.start_ms);
    }
    if let Some(last) = cues.last_mut() {
        last.end_ms = last.end_ms.max(piece.end_ms);
    }
    cues
}

/// The words of a piece, each with its time.
fn tokens(piece: &Piece) -> Vec<Token> {
    let total = letters(&piece.text);
    let times = times(piece, total);
    let mut tokens = Vec::new();
    let mut at = 0;
    for word in piece.text.split_whitespace() {
        let all: Vec<char> = word.chars().collect();
        for (n, part) in all.chunks(WIDTH).enumerate() {
            let chars = part.len();
            let (start_ms, end_ms) = (times(at).0, times(at + chars - 1).1);
            tokens.push(Token { text: part.iter().collect(), chars, glued: n > 0, start_ms, end_ms });
            at += chars;
        }
    }
    tokens
}

/// When the letter of this number is spoken, of `total`: the time of its word where the words make up the text.
fn times(piece: &Piece, total: usize) -> impl Fn(usize) -> (u64, u64) + '_ {
    let same = {
        let of_words = piece.words.iter().flat_map(|w| w.text.chars()).filter(|c| !c.is_whitespace());
        of_words.eq(piece.text.chars().filter(|c| !c.is_whitespace()))
    };
    let mut ends = Vec::new();
    if same {
        let mut end = 0;
        for word in &piece.words {
            end += letters(&word.text);
            ends.push((end, word.start_ms, word.end_ms));
        }
    }
    let (start_ms, length_ms) = (piece.start_ms, piece.end_ms.saturating_sub(piece.start_ms));
    move |letter| {
        if let Some((_, from, to)) = ends.get(ends.partition_point(|(end, _, _)| *end <= letter)) {
            return (*from, *to);
        }
        let share = |n: usize| start_ms + (length_ms as f64 * n as f64 / total.max(1) as f64) as u64;
        (share(letter), share(letter + 1))
    }
}

/// How many of the tokens fill one cue, at least one.
fn fits(tokens: &[Token], taken: usize) -> usize {
    let (mut line, mut column) = (1, taken);
    let mut empty = true;
    for (at, token) in tokens.iter().enumerate() {
        let gap = usize::from(!token.glued && !empty);
        if column + gap + token.chars <= WIDTH || (empty && line == LINES) {
            column += gap + token.chars;
            empty = false;
            continue;
        }
        if line == LINES {
            return at.max(1);
        }
        (line, column, empty) = (line + 1, token.chars, false);
    }
    tokens.len()
}

/// On one line where it fits, else on two of about the same length.
fn lines(tokens: &[Token], taken: usize) -> Vec<String> {
    let width = |part: &[Token]| {
        let gaps = part.iter().skip(1).filter(|t| !t.glued).count();
        part.iter().map(|t| t.chars).sum::<usize>() + gaps
    };
    let text = |part: &[Token]| {
        let mut line = String::new();
        for token in part {
            if !line.is_empty() && !token.glued {
                line.push(' ');
            }
            line.push_str(&token.text);
        }
        line
    };
    if taken + width(tokens) <= WIDTH || tokens.len() < 2 {
        return vec![text(tokens)];
    }
    let longer = |at: &usize| (taken + width(&tokens[..*at])).max(width(&tokens[*at..]));
    let at = (1..tokens.len()).min_by_key(longer).unwrap_or(1);
    vec![text(&tokens[..at]), text(&tokens[at..])]
}

#[cfg(test)]
mod tests {
    use super::{super::piece::Timed, *};

    fn piece(start_ms: u64, end_ms: u64, text: &str) -> Piece {
        Piece { start_ms, end_ms, text: text.to_owned(), ..Piece::default() }
    }

    /// Each word takes 100 ms, with 20 ms between them.
    fn with_words(mut piece: Piece) -> Piece {
        let start = piece.start_ms;
        let word = |(n, w): (u64, &str)| Timed {
            text: format!(" {w}"),
            start_ms: start + n * 120,
            end_ms: start + n * 120 + 100,
            ..Timed::default()
        };
        piece.words = (0..).zip(piece.text.split_whitespace()).map(word).collect();
        piece
    }

    fn shown(cues: &[Cue]) -> Vec<(u64, u64, Vec<&str>)> {
        cues.iter().map(|c| (c.start_ms, c.end_ms, c.lines.iter().map(String::as_str).collect())).collect()
    }

    #[test]
    fn a_short_segment_is_one_cue() {
        assert_eq!(shown(&cues(&[piece(500, 900, " good  morning ")])), [(500, 900, vec!["good morning"])]);
        assert_eq!(cues(&[piece(0, 900, "   "), piece(0, 9, "")]), []);
    }

    #[test]
    fn two_lines_are_about_as_long_as_each_other() {
        let text = "one two three four five six seven eight nine ten eleven";
        let cues = cues(&[piece(0, 4_000, text)]);
        assert_eq!(shown(&cues), [(0, 4_000, vec!["one two three four five six", "seven eight nine ten eleven"])]);
    }

    #[test]
    fn a_long_segment_is_cut_at_the_times_of_its_words() {
        let text = (0..30).map(|n| format!("word{n:02}")).collect::<Vec<_>>().join(" ");
        let found = cues(&[with_words(piece(1_000, 5_000, &text))]);
        // Six words of six letters fill a line, twelve a cue.
        let starts: Vec<_> = found.iter().map(|c| (c.start_ms, c.end_ms)).collect();
        assert_eq!(starts, [(1_000, 2_420), (2_440, 3_860), (3_880, 5_000)]);
        assert_eq!(found.iter().flat_map(|c| c.lines.clone()).collect::<Vec<_>>().join(" "), text);
    }

    #[test]
    fn without_word_times_letters_share_the_time() {
        let text = (0..24).map(|n| format!("word{n:02}")).collect::<Vec<_>>().join(" ");
        let times = |piece: Piece| cues(&[piece]).iter().map(|c| (c.start_ms, c.end_ms)).collect::<Vec<_>>();
        assert_eq!(times(piece(0, 10_000, &text)), [(0, 5_000), (5_000, 10_000)]);
        let mut other_words = with_words(piece(0, 10_000, &text));
        other_words.words[3].text = "something else".to_owned();
        assert_eq!(times(other_words), [(0, 5_000), (5_000, 10_000)]);
    }

    #[test]
    fn a_word_longer_than_a_line_is_broken() {
        let found = cues(&[piece(0, 1_000, &"字".repeat(100))]);
        let lines: Vec<usize> = found.iter().flat_map(|c| &c.lines).map(|l| l.chars().count()).collect();
        assert_eq!(lines, [42, 42, 16]);
        assert_eq!(shown(&found)[1].0, 840);
    }

    #[test]
    fn cues_never_overlap_and_never_vanish() {
        let pieces = [
            piece(3_000, 4_000, "third"),
            piece(0, 2_500, "first"),
            piece(1_000, 2_000, "second"),
            piece(5_000, 5_000, "no time"),
            piece(5_000, 5_000, "nor this"),
            piece(6_000, 5_500, "backwards"),
        ];
        let found = cues(&pieces);
        assert_eq!(found.len(), pieces.len());
        assert!(found.iter().all(|c| c.start_ms < c.end_ms), "{found:?}");
        assert!(found.windows(2).all(|w| w[0].end_ms <= w[1].start_ms), "{found:?}");
        assert_eq!(shown(&found)[0], (0, 1_000, vec!["first"]));
    }

    #[test]
    fn no_line_is_too_long_with_a_name_in_front() {
        let text = (0..40).map(|n| "abcdefghijk"[..n % 11 + 1].to_owned()).collect::<Vec<_>>().join(" ");
        for speaker in [None, Some("SPEAKER_01"), Some("a name that is much longer than it should ever be")] {
            let mut long = with_words(piece(0, 5_000, &text));
            long.speaker = speaker.map(str::to_owned);
            let found = cues(&[long]);
            let words: Vec<&str> = found.iter().flat_map(|c| &c.lines).map(String::as_str).collect();
            assert_eq!(words.join(" "), text, "no word is lost");
            let taken = speaker.map_or(0, |s| (s.len() + 2).min(21));
            for cue in &found {
                assert!((1..=2).contains(&cue.lines.len()) && cue.lines.iter().all(|l| !l.is_empty()), "{cue:?}");
                assert!(
                    cue.lines[0].len() + taken <= WIDTH && cue.lines[cue.lines.len() - 1].len() <= WIDTH,
                    "{cue:?}"
                );
            }
        }
    }
}
