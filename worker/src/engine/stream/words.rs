//! Text helpers of the stream: prompts, and words on the session's clock.

use std::ops::Range;

use voxfleet_schema::transcript::{Segment, Word};

use crate::engine::Hypothesis;

/// Hotwords, prompt and carried text, in this order: what is nearest to the audio weighs most.
pub(super) fn prompt(hotwords: &[String], prompt: &str, tail: &str) -> String {
    let hotwords = hotwords.join(", ");
    let parts = [hotwords.as_str(), prompt.trim(), tail.trim()];
    parts.iter().filter(|p| !p.is_empty()).copied().collect::<Vec<_>>().join(" ")
}

/// The last `limit` characters, from a word's beginning.
pub(super) fn tail(text: &str, limit: usize) -> &str {
    let Some((at, _)) = text.char_indices().rev().nth(limit.saturating_sub(1)) else {
        return text;
    };
    if at == 0 || text[..at].ends_with(' ') {
        return &text[at..];
    }
    text[at..].split_once(' ').map_or("", |(_, rest)| rest)
}

/// Puts what was heard in `window` onto the session's clock, inside the final's `range` (both in samples).
pub(super) fn place(heard: &Hypothesis, window: &Range<u64>, range: Range<u64>) -> Vec<Segment> {
    let (first, last) = (range.start.div_ceil(16), range.end / 16);
    let at = |ms: u64| (window.start / 16 + ms).clamp(first.min(last), last);
    let mut segments: Vec<Segment> = Vec::with_capacity(heard.segments.len());
    for segment in &heard.segments {
        let text = segment.text.trim();
        if text.is_empty() {
            continue;
        }
        let words = segment.words.iter().filter(|w| !w.text.trim().is_empty()).map(|w| Word {
            text: w.text.trim().to_owned(),
            start_ms: at(w.start_ms),
            end_ms: at(w.end_ms.max(w.start_ms)),
            confidence: w.confidence.clamp(0.0, 1.0),
            speaker: None,
            overlapped_by: None,
        });
        segments.push(Segment {
            id: segments.len() as u32,
            start_ms: at(segment.start_ms),
            end_ms: at(segment.end_ms.max(segment.start_ms)),
            text: text.to_owned(),
            speaker: None,
            channel: None,
            language: heard.language.clone(),
            confidence: segment.confidence.clamp(0.0, 1.0),
            words: words.collect(),
        });
    }
    segments
}

/// Says of all that was heard on a channel whose it is.
pub(super) fn attribute(segments: &mut [Segment], channel: usize, speaker: &str) {
    for segment in segments {
        segment.channel = u16::try_from(channel).ok();
        segment.speaker = Some(speaker.to_owned());
        segment.words.iter_mut().for_each(|word| word.speaker = Some(speaker.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{HeardSegment, HeardWord};

    #[test]
    fn prompts_join_what_is_there() {
        assert_eq!(prompt(&[], "", ""), "");
        assert_eq!(prompt(&["oslo".into(), "anna".into()], " hello ", ""), "oslo, anna hello");
        assert_eq!(prompt(&[], "hello", "my name"), "hello my name");
    }

    #[test]
    fn tails_begin_with_a_word() {
        assert_eq!(tail("one two three", 100), "one two three");
        assert_eq!(tail("one two three", 13), "one two three");
        assert_eq!(tail("one two three", 9), "two three");
        assert_eq!(tail("one two three", 8), "three");
        assert_eq!(tail("ééé ééé", 3), "ééé");
        assert_eq!(tail("onlyoneword", 4), "");
    }

    #[test]
    fn times_stay_inside_the_final() {
        let heard = Hypothesis {
            segments: vec![
                HeardSegment {
                    start_ms: 0,
                    end_ms: 99_000,
                    text: " hello ".into(),
                    words: vec![HeardWord { text: " hello".into(), start_ms: 10, end_ms: 5, confidence: 1.5 }],
                    ..HeardSegment::default()
                },
                HeardSegment { text: "  ".into(), ..HeardSegment::default() },
            ],
            ..Hypothesis::default()
        };
        let segments = place(&heard, &(16_000..32_000), 8_000..40_000);
        let [segment] = segments.as_slice() else { panic!("white space is no segment") };
        assert_eq!((segment.start_ms, segment.end_ms, segment.text.as_str()), (1_000, 2_500, "hello"));
        assert_eq!(
            (segment.words[0].start_ms, segment.words[0].end_ms, segment.words[0].confidence),
            (1_010, 1_010, 1.0)
        );
    }
}
