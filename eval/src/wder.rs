//! Word diarization error rate: words that were given to the wrong speaker (Shafey, Soltau and Shafran, "Joint speech
//! recognition and speaker diarization via sequence transduction", 2019).
//!
//! The words of both sides are aligned; of the pairs, right words or wrong ones, it is the share whose speakers are not the
//! same, once the speakers of what was heard are given to those of the reference so that most words agree. Words that
//! were missed or invented have no pair and do not count: that is what the word error rate is for.

use std::{collections::BTreeMap, iter::Sum, ops::AddAssign};

use crate::{
    align::{Edits, Op, align},
    assign::best,
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spoken {
    pub word: String,
    pub speaker: Option<String>,
}

/// Counts. They add up over files, whose speakers are mapped file by file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wder {
    /// Pairs of the alignment whose word has a speaker in the reference.
    pub pairs: usize,
    /// Those of them with another speaker, or none, in what was heard.
    pub wrong: usize,
    pub edits: Edits,
    /// Speakers of what was heard that were found to be one of the reference.
    pub mapping: Vec<(String, String)>,
}

impl Wder {
    /// A fraction; 0 where no word has a pair.
    pub fn rate(&self) -> f64 {
        if self.pairs == 0 { 0.0 } else { self.wrong as f64 / self.pairs as f64 }
    }
}

impl AddAssign for Wder {
    fn add_assign(&mut self, other: Self) {
        self.pairs += other.pairs;
        self.wrong += other.wrong;
        self.edits += other.edits;
        self.mapping.extend(other.mapping);
    }
}

impl Sum for Wder {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

/// Both in the order in which they were spoken.
pub fn score(reference: &[Spoken], heard: &[Spoken]) -> Wder {
    let words = |list: &[Spoken]| list.iter().map(|s| s.word.clone()).collect::<Vec<_>>();
    let ops = align(&words(reference), &words(heard));
    let (names, others) = (speakers(reference), speakers(heard));
    let mut together = vec![vec![0.0; names.len()]; others.len()];
    let (mut i, mut j, mut pairs) = (0, 0, 0);
    for op in &ops {
        if matches!(op, Op::Equal | Op::Substitute)
            && let Some(who) = &reference[i].speaker
        {
            pairs += 1;
            if let Some(other) = &heard[j].speaker {
                together[others[other.as_str()]][names[who.as_str()]] += 1.0;
            }
        }
        i += usize::from(*op != Op::Insert);
        j += usize::from(*op != Op::Delete);
    }
    let mapped = best(&together);
    let right: f64 = mapped.iter().enumerate().filter_map(|(h, r)| Some(together[h][(*r)?])).sum();
    let name = |map: &BTreeMap<&str, usize>, n: usize| map.keys().nth(n).copied().unwrap_or_default().to_owned();
    let mapping = mapped.iter().enumerate().filter_map(|(h, r)| Some((name(&others, h), name(&names, (*r)?))));
    Wder { pairs, wrong: pairs - right as usize, edits: Edits::of(&ops), mapping: mapping.collect() }
}

fn speakers(words: &[Spoken]) -> BTreeMap<&str, usize> {
    let mut names: BTreeMap<&str, usize> =
        words.iter().filter_map(|w| w.speaker.as_deref()).map(|name| (name, 0)).collect();
    names.values_mut().zip(0..).for_each(|(number, n)| *number = n);
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `A:a b B:c`: words, each said by the last name before it.
    fn spoken(text: &str) -> Vec<Spoken> {
        let mut speaker = None;
        let mut words = Vec::new();
        for token in text.split_whitespace() {
            let word = match token.split_once(':') {
                Some((name, word)) => {
                    speaker = Some(name.to_owned()).filter(|n| !n.is_empty());
                    word
                }
                None => token,
            };
            words.push(Spoken { word: word.to_owned(), speaker: speaker.clone() });
        }
        words
    }

    #[test]
    fn words_of_the_wrong_speaker_are_counted() {
        let reference = "A:good morning how are B:fine thanks";
        let table = [
            ("x:good morning how are y:fine thanks", (6, 0)),
            ("x:good morning how y:are fine thanks", (6, 1)),
            ("x:good morning how are fine thanks", (6, 2)),
            ("good morning how are fine thanks", (6, 6)),
            ("y:good x:morning :how are y:fine thanks", (6, 3)),
            // A wrong word counts as a right one, a missed or invented one does not.
            ("x:bad morning are y:fine thanks so", (5, 0)),
            ("", (0, 0)),
        ];
        for (heard, expected) in table {
            let found = score(&spoken(reference), &spoken(heard));
            assert_eq!((found.pairs, found.wrong), expected, "{heard}: {found:?}");
        }
    }

    #[test]
    fn names_are_told_and_files_add_up() {
        let one = score(&spoken("A:a b"), &spoken("S1:a b"));
        assert_eq!(one.mapping, [("S1".to_owned(), "A".to_owned())]);
        let two = score(&spoken("A:a B:b"), &spoken("S1:a b"));
        let sum: Wder = [one, two].into_iter().sum();
        assert_eq!((sum.pairs, sum.wrong, sum.rate()), (4, 1, 0.25));
        assert_eq!(score(&[], &[]).rate(), 0.0);
        assert_eq!(score(&spoken(":a"), &spoken("S1:a")).pairs, 0, "nobody knows who said it");
    }
}
