//! Turns and segments under their labels. Pure.

use std::collections::BTreeMap;

use voxfleet_diarize::{
    align::{self, Rules, Span},
    hear::Voiced,
    online::Assigned,
};
use voxfleet_schema::transcript::{Segment, Turn, Word};

/// How a label is shown.
fn name_of(label: u32) -> String {
    format!("S{label}")
}

/// The label behind a name that [`name_of`] made.
fn label_of(name: &str) -> Option<u32> {
    name.strip_prefix('S')?.parse().ok()
}

/// Who spoke when, by their beginning; pieces of one voice that touch are one turn.
pub(crate) fn turns_of(voiced: &[Voiced], assigned: &[Assigned]) -> Vec<Turn> {
    let mut pieces: Vec<Turn> = assigned
        .iter()
        .filter_map(|given| {
            let piece = voiced.get(given.turn)?;
            Some(Turn {
                start_ms: piece.from_sample / 16,
                end_ms: piece.to_sample / 16,
                speaker: name_of(given.label),
                voice: Some(given.voice),
            })
        })
        .collect();
    pieces.sort_by_key(|piece| (piece.start_ms, piece.end_ms, piece.voice));
    let mut turns: Vec<Turn> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let touches = |turn: &&mut Turn| turn.voice == piece.voice && turn.end_ms >= piece.start_ms;
        match turns.iter_mut().rev().find(touches) {
            Some(turn) => turn.end_ms = turn.end_ms.max(piece.end_ms),
            None => turns.push(piece),
        }
    }
    turns
}

/// The same turns after voices were given other labels; says whether any changed.
pub(crate) fn relabel(turns: &mut [Turn], labels: &BTreeMap<u32, u32>) -> bool {
    let mut changed = false;
    for turn in turns {
        if let Some(label) = turn.voice.and_then(|voice| labels.get(&voice)) {
            let name = name_of(*label);
            changed |= turn.speaker != name;
            turn.speaker = name;
        }
    }
    changed
}

/// Gives segments and words their speakers, and cuts segments where the speaker changes, so that each has one.
pub(crate) fn attribute(segments: Vec<Segment>, turns: &[Turn]) -> Vec<Segment> {
    let rules = Rules::default();
    let known: Vec<align::Turn> = turns
        .iter()
        .filter_map(|turn| {
            let span = Span { start_ms: turn.start_ms, end_ms: turn.end_ms };
            Some(align::Turn { span, speaker: label_of(&turn.speaker)? })
        })
        .collect();
    let mut told = Vec::with_capacity(segments.len());
    let mut before = None;
    for segment in segments {
        if segment.words.is_empty() {
            let span = Span { start_ms: segment.start_ms, end_ms: segment.end_ms };
            let speaker = align::segment(span, &known, before, &rules);
            before = speaker.or(before);
            told.push(Segment { speaker: speaker.map(name_of), ..segment });
            continue;
        }
        let spans: Vec<Span> =
            segment.words.iter().map(|word| Span { start_ms: word.start_ms, end_ms: word.end_ms }).collect();
        let speakers = align::words(&spans, &known, &rules);
        let parts = align::split(&speakers);
        let mut segment = segment;
        for (word, speakers) in segment.words.iter_mut().zip(&speakers) {
            word.speaker = speakers.first.map(name_of);
            word.overlapped_by = speakers.second.map(name_of);
        }
        before = parts.last().and_then(|(_, speaker)| *speaker).or(before);
        match cut(&segment, &parts) {
            Some(cut) => told.extend(cut),
            None => {
                let most = most_of(&segment.words);
                told.push(Segment { speaker: most, ..segment });
            }
        }
    }
    for (id, segment) in (0..).zip(&mut told) {
        segment.id = id;
    }
    told
}

/// A segment in parts of one speaker each. None where its words do not make up its text: then it stays whole.
fn cut(segment: &Segment, parts: &[(std::ops::Range<usize>, Option<u32>)]) -> Option<Vec<Segment>> {
    let mut starts = Vec::with_capacity(segment.words.len());
    let mut at = 0;
    for word in &segment.words {
        let found = at + segment.text.get(at..)?.find(&word.text)?;
        starts.push(found);
        at = found + word.text.len();
    }
    let part = |(range, speaker): &(std::ops::Range<usize>, Option<u32>)| {
        let words = segment.words.get(range.clone())?;
        let from = if range.start == 0 { 0 } else { *starts.get(range.start)? };
        let to = starts.get(range.end).copied().unwrap_or(segment.text.len());
        let (first, last) = (words.first()?, words.last()?);
        Some(Segment {
            start_ms: if range.start == 0 { segment.start_ms } else { first.start_ms },
            end_ms: if range.end == segment.words.len() { segment.end_ms } else { last.end_ms },
            text: segment.text.get(from..to)?.trim().to_owned(),
            speaker: speaker.map(name_of),
            words: words.to_vec(),
            confidence: words.iter().map(|word| word.confidence).sum::<f32>() / words.len() as f32,
            ..segment.clone()
        })
    };
    match parts {
        // Its confidence is the engine's own.
        [(_, speaker)] => Some(vec![Segment { speaker: speaker.map(name_of), ..segment.clone() }]),
        parts => parts.iter().map(part).collect(),
    }
}

/// Who says most of these words; the first of them where that is even.
fn most_of(words: &[Word]) -> Option<String> {
    let mut said: Vec<(&String, u64)> = Vec::new();
    for word in words {
        let Some(speaker) = &word.speaker else { continue };
        let ms = word.end_ms.saturating_sub(word.start_ms) + 1;
        match said.iter_mut().find(|(known, _)| *known == speaker) {
            Some((_, sum)) => *sum += ms,
            None => said.push((speaker, ms)),
        }
    }
    said.iter().rev().max_by_key(|(_, ms)| *ms).map(|(speaker, _)| (*speaker).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(text: &str, words: &[(&str, u64, u64)]) -> Segment {
        let words = words.iter().map(|(text, start_ms, end_ms)| Word {
            text: (*text).to_owned(),
            start_ms: *start_ms,
            end_ms: *end_ms,
            confidence: 0.5,
            speaker: None,
            overlapped_by: None,
        });
        Segment {
            id: 0,
            start_ms: 0,
            end_ms: 2_000,
            text: text.to_owned(),
            speaker: None,
            channel: None,
            language: None,
            confidence: 0.75,
            words: words.collect(),
        }
    }

    fn turn(start_ms: u64, end_ms: u64, label: u32) -> Turn {
        Turn { start_ms, end_ms, speaker: name_of(label), voice: Some(label * 10) }
    }

    fn said(segments: &[Segment]) -> Vec<(u32, &str, Option<&str>)> {
        segments.iter().map(|s| (s.id, s.text.as_str(), s.speaker.as_deref())).collect()
    }

    #[test]
    fn a_segment_is_cut_where_the_speaker_changes() {
        let words = [("good", 0, 400), ("morning", 400, 900), ("hello", 1_000, 1_400), ("you", 1_500, 1_900)];
        let two = segment("good morning, hello you", &words);
        let turns = [turn(0, 950, 1), turn(950, 2_000, 2)];
        let told = attribute(vec![two.clone()], &turns);
        assert_eq!(said(&told), [(0, "good morning,", Some("S1")), (1, "hello you", Some("S2"))]);
        assert_eq!((told[0].start_ms, told[0].end_ms, told[1].start_ms, told[1].end_ms), (0, 900, 1_000, 2_000));
        let texts: Vec<_> = told.iter().flat_map(|s| &s.words).map(|w| w.text.as_str()).collect();
        assert_eq!(texts, words.map(|(text, ..)| text), "no word is lost");
        // A text that its words do not make up stays whole, and belongs to whoever says most of it.
        let odd = segment("something else", &words);
        assert_eq!(said(&attribute(vec![odd], &turns)), [(0, "something else", Some("S1"))]);
        // One speaker: as the engine made it.
        let one = attribute(vec![two.clone()], &[turn(0, 2_000, 3)]);
        assert_eq!((said(&one), one[0].confidence), (vec![(0, "good morning, hello you", Some("S3"))], 0.75));
        assert_eq!(said(&attribute(vec![two], &[])), [(0, "good morning, hello you", None)]);
    }

    #[test]
    fn words_under_two_voices_have_two_labels() {
        let both = segment("yes no", &[("yes", 0, 1_000), ("no", 1_000, 2_000)]);
        let told = attribute(vec![both], &[turn(0, 2_000, 1), turn(1_000, 1_900, 2)]);
        let labels: Vec<_> =
            told.iter().flat_map(|s| &s.words).map(|w| (w.speaker.as_deref(), w.overlapped_by.as_deref())).collect();
        assert_eq!(labels, [(Some("S1"), None), (Some("S1"), Some("S2"))]);
    }

    #[test]
    fn segments_without_words_belong_to_whoever_has_most_of_them() {
        let told = attribute(vec![segment("text", &[])], &[turn(0, 700, 1), turn(700, 2_000, 2)]);
        assert_eq!(said(&told), [(0, "text", Some("S2"))]);
    }

    #[test]
    fn voices_get_other_labels_and_pieces_that_touch_are_one() {
        let piece = |from_ms: u64, to_ms: u64, track| Voiced {
            from_sample: from_ms * 16,
            to_sample: to_ms * 16,
            track,
            overlapped: false,
            embedding: None,
            reliable_ms: 0,
        };
        let voiced = [piece(0, 4_000, 0), piece(4_000, 6_000, 0), piece(5_000, 7_000, 1), piece(8_000, 9_000, 0)];
        let given = [(1, 1), (1, 1), (2, 2), (1, 1)].into_iter().enumerate();
        let assigned: Vec<_> = given.map(|(turn, (voice, label))| Assigned { turn, voice, label }).collect();
        let mut turns = turns_of(&voiced, &assigned);
        let shown =
            |turns: &[Turn]| -> Vec<_> { turns.iter().map(|t| (t.start_ms, t.end_ms, t.speaker.clone())).collect() };
        let expected = [(0, 6_000, "S1"), (5_000, 7_000, "S2"), (8_000, 9_000, "S1")];
        assert_eq!(shown(&turns), expected.map(|(a, b, name)| (a, b, name.to_owned())));
        assert!(!relabel(&mut turns, &BTreeMap::from([(1, 1), (2, 2)])));
        assert!(relabel(&mut turns, &BTreeMap::from([(2, 1)])));
        assert!(turns.iter().all(|turn| turn.speaker == "S1"));
    }
}
