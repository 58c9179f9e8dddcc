//! What a decode's tokens say: text, segments, and where the next pass over the window begins; pure.
//!
//! Whisper hears 30 s at a time and may close with a timestamp before the end of the sound: what lies behind it is decoded
//! once more from there. The rules are whisper.cpp's, so that both engines cut a window alike, with one difference: a
//! segment begins at its own timestamp and not where the one before ended.

use std::ops::Range;

/// Frames of 10 ms in one pass.
pub const PASS_FRAMES: usize = 3_000;
/// What is shorter than this is not decoded.
pub const LEAST_FRAMES: usize = 10;
/// Frames from one timestamp to the next.
const FRAMES_PER_TIMESTAMP: usize = 2;

/// The numbers of a vocabulary that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    pub end_of_text: u32,
    pub first_timestamp: u32,
}

/// One segment of a pass. Frames count from the window's beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pub begin: usize,
    pub end: usize,
    /// Text tokens, in order.
    pub tokens: Vec<u32>,
}

/// What one pass gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    pub segments: Vec<Cut>,
    /// Tokens that count, timestamps included: the context of the next pass.
    pub tokens: Vec<u32>,
    /// Where the next pass begins.
    pub next: usize,
}

/// `tokens` without the end-of-text, which came where `ended`; the pass began at `from`, the sound ends at `end`.
pub fn heard(tokens: &[u32], ended: bool, pass: Range<usize>, marks: Marks) -> Heard {
    let (from, end) = (pass.start, pass.end);
    let Scan { kept, mut shift } = scan(tokens, ended, from, end, marks);
    let tokens = &tokens[..kept];
    let segments = cut(tokens, from, from + shift, end, marks);
    // It closed with one timestamp: nothing more is said in this pass.
    if let [.., before, last] = tokens
        && *before < marks.first_timestamp
        && *last > marks.first_timestamp
    {
        shift = (end - from).min(PASS_FRAMES);
    }
    Heard { segments, tokens: tokens.to_vec(), next: from + shift }
}

struct Scan {
    /// Tokens up to the last timestamp that ends a segment.
    kept: usize,
    /// Frames from this pass to the next.
    shift: usize,
}

fn scan(tokens: &[u32], ended: bool, from: usize, end: usize, marks: Marks) -> Scan {
    let over = |shift: usize| from + shift + LEAST_FRAMES >= end;
    let (mut kept, mut shift, mut marked) = (0, PASS_FRAMES, false);
    for (n, token) in tokens.iter().enumerate() {
        if *token <= marks.first_timestamp {
            continue;
        }
        let at = (*token - marks.first_timestamp) as usize * FRAMES_PER_TIMESTAMP;
        if marked && at < shift && kept < n {
            // It went back in time: all of it is taken as it is.
            return Scan { kept: tokens.len(), shift };
        }
        (kept, shift, marked) = (n + 1, at, true);
        if over(shift) {
            return Scan { kept, shift };
        }
    }
    let unfinished = !ended && (kept == 0 || shift < PASS_FRAMES / 2);
    if kept == 0 || unfinished { Scan { kept: tokens.len(), shift } } else { Scan { kept, shift } }
}

fn cut(tokens: &[u32], from: usize, next: usize, end: usize, marks: Marks) -> Vec<Cut> {
    let time = |token: u32| from + (token - marks.first_timestamp) as usize * FRAMES_PER_TIMESTAMP;
    let mut segments = Vec::new();
    let mut begin = from;
    let mut text: Vec<u32> = Vec::new();
    let mut push = |begin: usize, till: usize, tokens: Vec<u32>| {
        let till = till.min(end);
        segments.push(Cut { begin: begin.min(till), end: till, tokens });
    };
    for token in tokens {
        match *token {
            t if t < marks.end_of_text => text.push(t),
            t if t >= marks.first_timestamp => {
                if !text.is_empty() {
                    push(begin, time(t), std::mem::take(&mut text));
                }
                begin = time(t);
            }
            _ => {}
        }
    }
    if !text.is_empty() {
        push(begin, next, text);
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Marks = Marks { end_of_text: 100, first_timestamp: 1_000 };

    /// The timestamp of so many hundredths of a second.
    fn at(hundredths: u32) -> u32 {
        1_000 + hundredths / 2
    }

    fn run(tokens: &[u32], pass: Range<usize>) -> (Vec<(usize, usize, usize)>, usize) {
        let heard = heard(tokens, true, pass, MARKS);
        (heard.segments.iter().map(|s| (s.begin, s.end, s.tokens.len())).collect(), heard.next)
    }

    #[test]
    fn one_segment_that_ends_where_the_sound_ends() {
        assert_eq!(run(&[at(20), 1, 2, 3, at(480)], 0..490), (vec![(20, 480, 3)], 490));
        // Nothing counts behind the timestamp that reaches the end.
        assert_eq!(run(&[at(20), 1, at(484), at(484), 7, at(900)], 0..490), (vec![(20, 484, 1)], 490));
    }

    #[test]
    fn segments_begin_at_their_own_timestamps() {
        let tokens = [at(0), 1, 2, at(200), at(300), 3, at(500)];
        assert_eq!(run(&tokens, 0..800), (vec![(0, 200, 2), (300, 500, 1)], 800));
    }

    #[test]
    fn what_is_unfinished_is_decoded_again_from_its_beginning() {
        let tokens = [at(0), 1, 2, at(2_000), at(2_100), 3, 4];
        let heard = heard(&tokens, true, 0..3_000, MARKS);
        assert_eq!((heard.segments.len(), heard.next), (1, 2_100));
        assert_eq!(heard.tokens, tokens[..5]);
        // The second pass counts from where it begins.
        assert_eq!(run(&[at(0), 3, 4, at(850)], 2_100..3_000), (vec![(2_100, 2_950, 2)], 3_000));
    }

    #[test]
    fn text_without_an_end_goes_to_the_end_of_the_sound() {
        assert_eq!(run(&[at(0), 1, 2], 0..700), (vec![(0, 700, 2)], 3_000));
        // Behind a beginning of its own it is heard again from there.
        assert_eq!(run(&[at(10), 1, 2], 0..700), (vec![], 10));
        assert_eq!(run(&[1, 2], 0..700), (vec![(0, 700, 2)], 3_000));
        assert_eq!(run(&[], 0..700), (vec![], 3_000));
        assert_eq!(run(&[at(0)], 0..700), (vec![], 3_000));
    }

    #[test]
    fn loops_and_steps_back_are_taken_as_they_are() {
        // It never came to an end.
        let stuck = heard(&[at(0), 1, at(100), at(100), 1, 1, 1], false, 0..3_000, MARKS);
        assert_eq!((stuck.tokens.len(), stuck.segments.len(), stuck.next), (7, 2, 100));
        let back = heard(&[at(0), 1, at(900), at(900), 2, at(500), 3], true, 0..3_000, MARKS);
        assert_eq!((back.tokens.len(), back.next), (7, 900));
        assert!(back.segments.iter().all(|s| s.begin <= s.end), "{:?}", back.segments);
    }

    #[test]
    fn other_special_tokens_are_no_text() {
        assert_eq!(run(&[at(0), 1, 150, 2, at(490)], 0..490), (vec![(0, 490, 2)], 490));
    }
}
