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
