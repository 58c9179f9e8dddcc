//! Words and segments to speakers, by the turns they fall into.
//!
//! Word times of a recogniser are off by some tens of milliseconds and turns by as much, so what a word touches is
//! weighed, not taken literally. All times are on one axis, in milliseconds; words and turns are in order of their start.

use std::{collections::BTreeMap, ops::Range};

/// Where a word or a segment lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start_ms: u64,
    pub end_ms: u64,
}

impl Span {
    fn length(self) -> u64 {
        self.end_ms.saturating_sub(self.start_ms)
    }

    fn overlap(self, other: Self) -> u64 {
        self.end_ms.min(other.end_ms).saturating_sub(self.start_ms.max(other.start_ms))
    }

    fn gap(self, other: Self) -> u64 {
        self.start_ms.max(other.start_ms).saturating_sub(self.end_ms.min(other.end_ms))
    }
}

/// A speaker's turn; turns of two speakers may overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    pub span: Span,
    pub speaker: u32,
}

/// How words are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// A word outside of all turns belongs to the nearest one if it is not further than this.
    pub reach_ms: u64,
    /// Two overlaps that differ by less are equal, and the speaker of the word before stays.
    pub tie_ms: u64,
}

impl Default for Rules {
    fn default() -> Self {
        Self { reach_ms: 1_000, tie_ms: 20 }
    }
}

/// Who says a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Speakers {
    /// Nobody where no turn is near.
    pub first: Option<u32>,
    /// Who speaks at the same time, over most of the word.
    pub second: Option<u32>,
}

/// The speakers of each word.
pub fn words(words: &[Span], turns: &[Turn], rules: &Rules) -> Vec<Speakers> {
    let mut found: Vec<Speakers> = Vec::with_capacity(words.len());
    let mut begun = 0;
    for word in words {
        // Turns that ended long before this word are not looked at again.
        while turns.get(begun).is_some_and(|turn| turn.span.end_ms + rules.reach_ms < word.start_ms) {
            begun += 1;
        }
        let before = found.last().and_then(|s| s.first);
        found.push(word_speakers(*word, &turns[begun..], before, rules));
    }
    smooth(words, turns, &mut found);
    found
}

fn word_speakers(word: Span, turns: &[Turn], before: Option<u32>, rules: &Rules) -> Speakers {
    // A word of no length is asked for where it stands.
    let word = Span { end_ms: word.end_ms.max(word.start_ms + 1), ..word };
    let near: Vec<&Turn> = turns.iter().take_while(|turn| turn.span.start_ms <= word.end_ms + rules.reach_ms).collect();
    let shares = shares(word, near.iter().copied());
    let Some(most) = shares.values().max() else {
        let nearest = near
            .iter()
            .map(|turn| (turn.span.gap(word), before != Some(turn.speaker), turn.span.start_ms, turn.speaker))
            .filter(|(gap, ..)| *gap <= rules.reach_ms)
            .min();
        return Speakers { first: nearest.map(|(.., speaker)| speaker), second: None };
    };
    let level = |speaker: &u32| shares.get(speaker).is_some_and(|share| share + rules.tie_ms > *most);
    let first = before.filter(level).or_else(|| {
        let best = shares.iter().filter(|(_, share)| *share == most).map(|(speaker, _)| *speaker);
        best.min_by_key(|speaker| near.iter().position(|turn| turn.speaker == *speaker))
    });
    let second = shares
        .iter()
        .filter(|(speaker, share)| Some(**speaker) != first && 2 * **share >= word.length())
        .max_by_key(|(speaker, share)| (**share, std::cmp::Reverse(**speaker)))
        .map(|(speaker, _)| *speaker);
    Speakers { first, second }
}

/// How much of a span each speaker has.
fn shares<'a>(span: Span, turns: impl Iterator<Item = &'a Turn>) -> BTreeMap<u32, u64> {
    let mut shares = BTreeMap::new();
    for turn in turns {
        let overlap = turn.span.overlap(span);
        if overlap > 0 {
            *shares.entry(turn.speaker).or_default() += overlap;
        }
    }
    shares
}

/// A single word between two of another speaker stays only if most of it lies in its own speaker's turn and that turn
/// is not just an edge of something else.
fn smooth(words: &[Span], turns: &[Turn], found: &mut [Speakers]) {
    for at in 1..found.len().saturating_sub(1) {
        let (before, own, after) = (found[at - 1].first, found[at].first, found[at + 1].first);
        if before.is_none() || before != after || own == before {
            continue;
        }
        let inside = own.is_some_and(|own| {
            let shares = shares(words[at], turns.iter());
            let share = |speaker: Option<u32>| speaker.and_then(|s| shares.get(&s)).copied().unwrap_or(0);
            3 * share(Some(own)) >= 2 * words[at].length() && 3 * share(before) <= words[at].length()
        });
        if !inside {
            let second = own.filter(|_| found[at].second.is_some());
            found[at] = Speakers { first: before, second };
        }
    }
}

/// Where a segment is to be split so that each part has one speaker: ranges of its words, and whose they are. Words
/// without a speaker stay with those before, or after where there are none before.
pub fn split(words: &[Speakers]) -> Vec<(Range<usize>, Option<u32>)> {
    let mut parts: Vec<(Range<usize>, Option<u32>)> = Vec::new();
    for (index, word) in words.iter().enumerate() {
        match parts.last_mut() {
            Some((range, speaker)) if word.first.is_none() || speaker.is_none() || *speaker == word.first => {
                range.end = index + 1;
                *speaker = speaker.or(word.first);
            }
            _ => parts.push((index..index + 1, word.first)),
        }
    }
    parts
}

/// The speaker of a segment without word times: who has most of it, else the nearest within reach.
pub fn segment(segment: Span, turns: &[Turn], before: Option<u32>, rules: &Rules) -> Option<u32> {
    word_speakers(segment, turns, before, rules).first
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span((start_ms, end_ms): (u64, u64)) -> Span {
        Span { start_ms, end_ms }
    }

    fn turns(turns: &[(u64, u64, u32)]) -> Vec<Turn> {
        turns.iter().map(|(start, end, speaker)| Turn { span: span((*start, *end)), speaker: *speaker }).collect()
    }

    fn first(spans: &[(u64, u64)], of: &[(u64, u64, u32)]) -> Vec<Option<u32>> {
        let spans: Vec<Span> = spans.iter().copied().map(span).collect();
        words(&spans, &turns(of), &Rules::default()).iter().map(|s| s.first).collect()
    }

    #[test]
    fn a_word_is_whose_turn_it_is_mostly_in() {
        let talk = [(0, 1_000, 1), (1_100, 2_000, 2)];
        assert_eq!(first(&[(100, 400), (700, 1_150), (1_050, 1_400), (1_500, 1_900)], &talk), [1, 1, 2, 2].map(Some));
        // Half and half: whoever spoke before goes on, and at the beginning the first.
        assert_eq!(first(&[(0, 500), (900, 1_200)], &[(0, 1_050, 1), (1_050, 2_000, 2)]), [1, 1].map(Some));
        assert_eq!(first(&[(900, 1_200)], &[(0, 1_050, 1), (1_050, 2_000, 2)]), [Some(1)]);
        let back = [(0, 100, 1), (200, 600, 2), (900, 1_050, 1), (1_050, 2_000, 2)];
        assert_eq!(first(&[(250, 550), (900, 1_200)], &back), [2, 2].map(Some));
        assert_eq!(first(&[(500, 500)], &talk), [Some(1)]);
        assert_eq!(first(&[(0, 10)], &[]), [None]);
    }

    #[test]
    fn a_word_in_a_gap_goes_to_the_nearest_turn_within_reach() {
        let talk = [(0, 1_000, 1), (2_000, 3_000, 2), (6_000, 7_000, 1)];
        assert_eq!(first(&[(1_100, 1_300)], &talk), [Some(1)]);
        assert_eq!(first(&[(1_700, 1_900)], &talk), [Some(2)]);
        assert_eq!(first(&[(4_300, 4_500)], &talk), [None]);
        // As near to one as to the other: whoever spoke before.
        assert_eq!(first(&[(2_500, 2_900), (3_400, 3_600)], &[(2_000, 3_000, 2), (4_000, 5_000, 1)]), [2, 2].map(Some));
        assert_eq!(first(&[(400, 600), (1_400, 1_600)], &[(0, 1_000, 1), (2_000, 3_000, 2)]), [1, 1].map(Some));
    }

    #[test]
    fn overlapping_speech_has_two_labels() {
        let talk = turns(&[(0, 3_000, 1), (1_000, 1_600, 2)]);
        let spans: Vec<Span> = [(500, 900), (1_050, 1_500), (1_500, 1_900)].map(span).into();
        let found = words(&spans, &talk, &Rules::default());
        assert_eq!(found[0], Speakers { first: Some(1), second: None });
        assert_eq!(found[1], Speakers { first: Some(1), second: Some(2) });
        assert_eq!(found[2], Speakers { first: Some(1), second: None }, "a quarter of a word is no overlap");
    }

    #[test]
    fn one_word_between_two_of_another_must_be_clearly_its_own() {
        let around = |own: (u64, u64)| {
            first(
                &[(0, 900), (1_000, 1_400), (1_500, 2_400)],
                &[(0, 1_000 + own.0, 1), (1_000 + own.0, 1_000 + own.1, 2), (1_000 + own.1, 2_400, 1)],
            )
        };
        assert_eq!(around((0, 400)), [1, 2, 1].map(Some));
        assert_eq!(around((40, 380)), [1, 2, 1].map(Some));
        assert_eq!(around((150, 400)), [1, 1, 1].map(Some));
        // Outside of every turn, nearest to a third: no reason to change twice.
        let talk = [(0, 900, 1), (1_250, 1_300, 3), (1_500, 2_400, 1)];
        assert_eq!(first(&[(0, 900), (1_000, 1_240), (1_500, 2_400)], &talk), [1, 1, 1].map(Some));
    }

    #[test]
    fn segments_are_split_where_the_speaker_changes() {
        let said = |speakers: &[u32]| -> Vec<Speakers> {
            speakers.iter().map(|s| Speakers { first: Some(*s).filter(|s| *s > 0), second: None }).collect()
        };
        assert_eq!(split(&said(&[1, 1, 2, 2, 1])), [(0..2, Some(1)), (2..4, Some(2)), (4..5, Some(1))]);
        assert_eq!(split(&said(&[0, 0, 2, 0, 1])), [(0..4, Some(2)), (4..5, Some(1))]);
        assert_eq!(split(&said(&[0, 0])), [(0..2, None)]);
        assert_eq!(split(&[]), []);
    }

    #[test]
    fn a_segment_without_word_times_is_whose_it_is_mostly() {
        let talk = turns(&[(0, 1_000, 1), (1_000, 4_000, 2), (4_000, 5_000, 1)]);
        let whose = |from, to| segment(span((from, to)), &talk, None, &Rules::default());
        assert_eq!(whose(0, 5_000), Some(2));
        assert_eq!(whose(0, 1_500), Some(1));
        assert_eq!(whose(5_500, 6_000), Some(1));
        assert_eq!(whose(7_000, 8_000), None);
    }

    proptest! {
        #[test]
        fn every_word_is_in_one_part_and_parts_change_speaker(
            lengths in prop::collection::vec((0u64..600, 0u64..400), 0..40),
            talk in prop::collection::vec((0u64..9_000, 1u64..3_000, 1u32..4), 0..12),
        ) {
            let mut at = 0;
            let spans: Vec<Span> = lengths
                .iter()
                .map(|(gap, length)| {
                    let start_ms = at + gap;
                    at = start_ms + length;
                    Span { start_ms, end_ms: at }
                })
                .collect();
            let mut turns: Vec<Turn> = talk
                .iter()
                .map(|(start, length, speaker)| Turn { span: span((*start, start + length)), speaker: *speaker })
                .collect();
            turns.sort_by_key(|t| t.span.start_ms);
            let found = words(&spans, &turns, &Rules::default());
            prop_assert_eq!(found.len(), spans.len());
            prop_assert!(found.iter().all(|s| s.second.is_none() || s.second != s.first));
            let parts = split(&found);
            let mut next = 0;
            for (range, _) in &parts {
                prop_assert!(range.start == next && range.end > range.start);
                next = range.end;
            }
            prop_assert_eq!(next, spans.len());
            prop_assert!(parts.windows(2).all(|p| p[0].1 != p[1].1));
        }
    }
}
