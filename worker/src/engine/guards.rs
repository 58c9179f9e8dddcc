//! Text that is not speech is held back: what a recognizer says about silence, noise and its own loops.
//!
//! Pure, from the scores of one hypothesis alone, so that a guard strikes on every worker or on none. Thresholds:
//!
//! | guard | strikes when | why this value |
//! |---|---|---|
//! | `no_speech` | no-speech probability > 0.6 and mean log probability < -1.0 | Whisper's own pair: either alone is often wrong |
//! | `log_probability` | mean log probability < -1.5, or < -1.0 with confidence < 0.35 | Whisper decodes again below -1.0; we do not, and hard speech lies between |
//! | `compression` | text of 40 bytes or more packs better than 2.4 to 1 | Whisper's value; shorter texts hardly pack at all |
//! | `repetition` | one phrase several times in a row, see [`loops`] | phrases too few to pack well |
//!
//! White space alone is no text; it goes without a guard.

use std::io::Write;

use flate2::{Compression, write::ZlibEncoder};

use super::{HeardSegment, Hypothesis};

pub const NO_SPEECH: &str = "no_speech";
pub const LOG_PROBABILITY: &str = "log_probability";
pub const COMPRESSION: &str = "compression";
pub const REPETITION: &str = "repetition";

const NO_SPEECH_PROBABILITY: f32 = 0.6;
const DOUBTFUL_LOG_PROBABILITY: f32 = -1.0;
const HOPELESS_LOG_PROBABILITY: f32 = -1.5;
const DOUBTFUL_CONFIDENCE: f32 = 0.35;
const COMPRESSION_RATIO: f32 = 2.4;
const COMPRESSION_MIN_BYTES: usize = 40;
/// Longest phrase looked at for repetition, in words.
const MAX_PHRASE: usize = 12;

/// A hypothesis without what a guard held back, and which guards struck.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Judged {
    pub hypothesis: Hypothesis,
    /// Each once, in the order in which they first struck.
    pub guards: Vec<&'static str>,
}

/// Leaves out the segments that are not speech.
pub fn judge(heard: &Hypothesis) -> Judged {
    let mut guards: Vec<&'static str> = Vec::new();
    let mut kept: Vec<HeardSegment> = Vec::new();
    let mut same_in_a_row = 1;
    for segment in heard.segments.iter().filter(|s| !s.text.trim().is_empty()) {
        let words = plain_words(&segment.text);
        let same = kept.last().is_some_and(|before| !words.is_empty() && plain_words(&before.text) == words);
        same_in_a_row = if same { same_in_a_row + 1 } else { 1 };
        // A phrase that comes back as segment after segment is a loop too; its first occurrences may be real.
        let looped = same && same_in_a_row >= repeats_of(words.len());
        match verdict(segment, &words).or(looped.then_some(REPETITION)) {
            None => kept.push(segment.clone()),
            Some(guard) if guards.contains(&guard) => {}
            Some(guard) => guards.push(guard),
        }
    }
    let hypothesis = Hypothesis { segments: kept, ..heard.clone_without_segments() };
    Judged { hypothesis, guards }
}

impl Hypothesis {
    fn clone_without_segments(&self) -> Self {
        Self { segments: Vec::new(), language: self.language.clone(), word_timing: self.word_timing }
    }
}

fn verdict(segment: &HeardSegment, words: &[String]) -> Option<&'static str> {
    let log_probability = segment.mean_log_probability;
    let doubtful = log_probability < DOUBTFUL_LOG_PROBABILITY;
    if segment.no_speech_probability > NO_SPEECH_PROBABILITY && doubtful {
        return Some(NO_SPEECH);
    }
    // A number that is none came from a broken model.
    if !log_probability.is_finite()
        || log_probability < HOPELESS_LOG_PROBABILITY
        || (doubtful && segment.confidence < DOUBTFUL_CONFIDENCE)
    {
        return Some(LOG_PROBABILITY);
    }
    if loops(words) {
        return Some(REPETITION);
    }
    if compression_ratio(segment.text.trim()).is_some_and(|ratio| ratio > COMPRESSION_RATIO) {
        return Some(COMPRESSION);
    }
    None
}

/// Lower case, letters and digits only.
fn plain_words(text: &str) -> Vec<String> {
    text.split_whitespace()
        .map(|w| w.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect::<String>())
        .filter(|w| !w.is_empty())
        .collect()
}

/// How often a phrase of so many words must come in a row before it is a loop. People say "no no no no" and read out
/// "seven seven seven seven"; nobody says a sentence three times without a pause.
fn repeats_of(words: usize) -> usize {
    match words {
        0 | 1 => 8,
        2 => 5,
        3 => 4,
        _ => 3,
    }
}

/// Whether some phrase of one to twelve words stands in a row more often than people speak so.
fn loops(words: &[String]) -> bool {
    (1..=MAX_PHRASE).any(|len| {
        // Equal to the word one phrase before, for so long that it makes up the repeats after the first.
        let needed = len * (repeats_of(len) - 1);
        let mut run = 0;
        words.iter().skip(len).zip(words).any(|(word, before)| {
            run = if word == before { run + 1 } else { 0 };
            run >= needed
        })
    })
}

/// Bytes of text per byte packed; none for texts too short to tell.
fn compression_ratio(text: &str) -> Option<f32> {
    if text.len() < COMPRESSION_MIN_BYTES {
        return None;
    }
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    // Writing to memory does not fail; if it ever did, there would be no ratio.
    encoder.write_all(text.as_bytes()).ok()?;
    let packed = encoder.finish().ok()?;
    Some(text.len() as f32 / packed.len().max(1) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> HeardSegment {
        HeardSegment {
            text: text.to_owned(),
            confidence: 0.9,
            no_speech_probability: 0.01,
            mean_log_probability: -0.2,
            ..HeardSegment::default()
        }
    }

    fn judged(segments: Vec<HeardSegment>) -> (Vec<String>, Vec<&'static str>) {
        let language = Some("en".to_owned());
        let judged = judge(&Hypothesis { segments, language: language.clone(), word_timing: None });
        assert_eq!(judged.hypothesis.language, language);
        (judged.hypothesis.segments.into_iter().map(|s| s.text).collect(), judged.guards)
    }

    #[test]
    fn scores_decide() {
        // no-speech probability, mean log probability, confidence -> guard
        let table = [
            (0.0, -0.1, 0.95, None),
            (0.9, -0.5, 0.60, None),
            (0.61, -1.01, 0.60, Some(NO_SPEECH)),
            (0.60, -1.01, 0.60, None),
            (0.99, -3.0, 0.05, Some(NO_SPEECH)),
            (0.0, -1.2, 0.34, Some(LOG_PROBABILITY)),
            (0.0, -1.2, 0.36, None),
            (0.0, -1.51, 0.90, Some(LOG_PROBABILITY)),
            (0.0, -0.9, 0.10, None),
            (0.0, f32::NAN, 0.90, Some(LOG_PROBABILITY)),
            (f32::NAN, -0.1, 0.90, None),
        ];
        for (no_speech_probability, mean_log_probability, confidence, expected) in table {
            let segment =
                HeardSegment { no_speech_probability, mean_log_probability, confidence, ..said("hello there") };
            let (texts, guards) = judged(vec![segment]);
            let case = (no_speech_probability, mean_log_probability, confidence);
            assert_eq!(guards, expected.into_iter().collect::<Vec<_>>(), "{case:?}");
            assert_eq!(texts.is_empty(), expected.is_some(), "{case:?}");
        }
    }

    #[test]
    fn loops_are_told_from_speech() {
        let table = [
            ("no no no no", false),
            ("zero seven seven seven seven nine", false),
            ("the order number is zero seven nine eight", false),
            ("ha ha ha ha ha ha ha ha", true),
            ("Thank you. Thank you. Thank you. Thank you. Thank you.", true),
            ("thank you for watching thank you for watching thank you for watching", true),
            ("well thank you for watching thank you for watching", false),
            ("so I said I do not know and I do not care and I do not know", false),
            ("you know you know you know you know", false),
        ];
        for (text, expected) in table {
            let (texts, guards) = judged(vec![said(text)]);
            assert_eq!(!guards.is_empty(), expected, "{text:?} gave {guards:?}");
            assert_eq!(texts.is_empty(), expected, "{text:?}");
        }
    }

    #[test]
    fn letters_in_a_loop_pack_too_well() {
        let (texts, guards) = judged(vec![said(&"la-la-la-la-".repeat(12))]);
        assert_eq!((texts.len(), guards), (0, vec![COMPRESSION]));
        let plain = "the new carpet will arrive on wednesday at half past nine and the driver will call you before";
        assert_eq!(judged(vec![said(plain)]).1, Vec::<&str>::new());
    }

    #[test]
    fn a_loop_over_segments_keeps_its_beginning() {
        let (texts, guards) = judged(vec![said("see you all next time"); 6]);
        assert_eq!((texts.len(), guards), (2, vec![REPETITION]));
        let (texts, guards) = judged(vec![said("yes"), said("yes"), said("no"), said("yes")]);
        assert_eq!((texts.len(), guards.len()), (4, 0));
    }

    #[test]
    fn white_space_goes_without_a_guard_and_the_good_stays() {
        let bad = HeardSegment { mean_log_probability: -2.0, ..said("subtitles by") };
        let (texts, guards) = judged(vec![said(" \n"), said("hello"), bad.clone(), bad, said("goodbye")]);
        assert_eq!(texts, ["hello", "goodbye"]);
        assert_eq!(guards, [LOG_PROBABILITY]);
        assert_eq!(judge(&Hypothesis::default()), Judged::default());
    }
}
