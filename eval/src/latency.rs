//! When each word was shown: from the end of a word to the moment somebody could read it.
//!
//! Two kinds of evidence: messages as they arrived ([`seen`]), and words that carry the time at which they were published
//! ([`delays`]).

use crate::{
    align::{Op, align},
    text::Normalise,
};

/// A word of the truth; times are ms since the call began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub word: String,
    pub start_ms: u64,
    pub end_ms: u64,
}

/// A partial or a final as it arrived. Times are ms since the call began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    pub at_ms: u64,
    /// End of the audio it covers.
    pub to_ms: u64,
    pub text: String,
    /// Index of the final that it is, or number of finals that came before the partial.
    pub what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Partial { finals_before: usize },
    Final,
}

/// Times of arrival, in ms since the call began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// First partial that had it; the final where no partial came before it.
    pub first_ms: Option<u64>,
    pub in_partial: bool,
    pub final_ms: Option<u64>,
}

/// Lays every arrival beside what had begun to be said by the end of the audio it covers.
pub fn seen(truth: &[Said], arrivals: &[Arrival]) -> Vec<Seen> {
    let mut all = vec![Seen::default(); truth.len()];
    let mut finals: Vec<Vec<String>> = Vec::new();
    for arrival in arrivals {
        let text = Normalise::Basic.words(&arrival.text);
        let is_final = match arrival.what {
            What::Final => {
                finals.push(text.clone());
                true
            }
            // Overtaken by a final: a reader drops it.
            What::Partial { finals_before } if finals_before < finals.len() => continue,
            What::Partial { .. } => false,
        };
        let mut heard: Vec<String> = finals.concat();
        if !is_final {
            heard.extend(text);
        }
        let begun = truth.iter().take_while(|said| said.start_ms < arrival.to_ms).count();
        for (seen, has) in all.iter_mut().zip(matched(&truth[..begun], &heard)) {
            if !has {
                continue;
            }
            if is_final && seen.final_ms.is_none() {
                seen.final_ms = Some(arrival.at_ms);
            }
            if seen.first_ms.is_none() {
                (seen.first_ms, seen.in_partial) = (Some(arrival.at_ms), !is_final);
            }
        }
    }
    all
}

/// For each word of the truth, whether an alignment of least edits puts the same heard word beside it. Of several such
/// alignments it takes the one that leaves out the latest words: what has just been said is what is missing.
fn matched(truth: &[Said], heard: &[String]) -> Vec<bool> {
    let columns = heard.len() + 1;
    let same = |row: usize, column: usize| truth[row - 1].word == heard[column - 1];
    let mut cost = vec![0usize; (truth.len() + 1) * columns];
    for row in 0..=truth.len() {
        for column in 0..columns {
            cost[row * columns + column] = match (row, column) {
                (0, n) | (n, 0) => n,
                _ => {
                    let diagonal = cost[(row - 1) * columns + column - 1] + usize::from(!same(row, column));
                    diagonal.min(cost[(row - 1) * columns + column] + 1).min(cost[row * columns + column - 1] + 1)
                }
            };
        }
    }
    let mut found = vec![false; truth.len()];
    let (mut row, mut column) = (truth.len(), heard.len());
    while row > 0 {
        let here = cost[row * columns + column];
        if here == cost[(row - 1) * columns + column] + 1 {
            row -= 1;
        } else if column > 0 && here == cost[(row - 1) * columns + column - 1] + usize::from(!same(row, column)) {
            (row, column) = (row - 1, column - 1);
            found[row] = truth[row].word == heard[column];
        } else {
            column -= 1;
        }
    }
    found
}

/// A word with the time at which it could first be read, in ms on the clock of the reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub word: String,
    pub at_ms: u64,
}

/// For each word of the truth that was heard right, from its end to when it was published, in ms. Negative where a word was
/// shown before its end.
pub fn delays(truth: &[Said], published: &[Published]) -> Vec<i64> {
    let said: Vec<&str> = truth.iter().map(|s| s.word.as_str()).collect();
    let shown: Vec<&str> = published.iter().map(|p| p.word.as_str()).collect();
    let (mut i, mut j, mut found) = (0, 0, Vec::new());
    for op in align(&said, &shown) {
        if op == Op::Equal {
            found.push(published[j].at_ms as i64 - truth[i].end_ms as i64);
        }
        i += usize::from(op != Op::Insert);
        j += usize::from(op != Op::Delete);
    }
    found
}

/// How a set of delays is spread, in ms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub count: usize,
    pub mean: f64,
    pub p50: i64,
    pub p90: i64,
    pub p95: i64,
    pub p99: i64,
    pub max: i64,
}

impl Spread {
    /// None of nothing. A percentile is the smallest value that at least so many are not above (nearest rank).
    pub fn of(values: &[i64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable();
        let (count, max) = (sorted.len(), *sorted.last()?);
        let rank = |share: f64| sorted[((count as f64 * share).ceil() as usize).clamp(1, count) - 1];
        let mean = sorted.iter().map(|v| *v as f64).sum::<f64>() / count as f64;
        Some(Self { count, mean, p50: rank(0.5), p90: rank(0.9), p95: rank(0.95), p99: rank(0.99), max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One word each 300 ms, 200 ms long.
    fn truth(text: &str) -> Vec<Said> {
        let word = |(n, word): (u64, &str)| Said { word: word.to_owned(), start_ms: n * 300, end_ms: n * 300 + 200 };
        (0..).zip(text.split(' ')).map(word).collect()
    }

    fn heard(text: &str) -> Vec<String> {
        Normalise::Basic.words(text)
    }

    fn partial(at_ms: u64, to_ms: u64, finals_before: usize, text: &str) -> Arrival {
        Arrival { at_ms, to_ms, text: text.to_owned(), what: What::Partial { finals_before } }
    }

    fn last(at_ms: u64, to_ms: u64, text: &str) -> Arrival {
        Arrival { at_ms, to_ms, text: text.to_owned(), what: What::Final }
    }

    #[test]
    fn the_latest_words_are_those_not_heard_yet() {
        let table: [(&str, &str, &[bool]); 8] = [
            ("yes i see i", "yes i", &[true, true, false, false]),
            ("no no no", "no", &[true, false, false]),
            ("a b c", "a x c", &[true, false, true]),
            ("a b c", "x a b c", &[true, true, true]),
            ("a b c", "", &[false, false, false]),
            ("a b c", "b c", &[false, true, true]),
            ("a b c d", "a b y z c d", &[true, true, true, true]),
            ("a", "A,", &[true]),
        ];
        for (said, text, expected) in table {
            assert_eq!(matched(&truth(said), &heard(text)), expected, "{said} / {text}");
        }
        assert!(matched(&[], &heard("x y")).is_empty());
    }

    #[test]
    fn each_word_counts_when_it_is_first_shown() {
        let truth = truth("good morning this is lucy");
        let found = seen(
            &truth,
            &[
                partial(700, 600, 0, "good mourning"),
                partial(1_300, 1_200, 0, "good morning this"),
                last(2_000, 1_500, "good morning this is lucy"),
            ],
        );
        let shown: Vec<_> = found.iter().map(|s| (s.first_ms, s.in_partial, s.final_ms)).collect();
        assert_eq!(shown[0], (Some(700), true, Some(2_000)));
        assert_eq!(shown[1], (Some(1_300), true, Some(2_000)), "wrong at first");
        assert_eq!(shown[2], (Some(1_300), true, Some(2_000)));
        assert_eq!(shown[3], (Some(2_000), false, Some(2_000)), "no partial had it");
    }

    #[test]
    fn partials_stand_behind_the_finals_before_them() {
        let truth = truth("yes please yes please");
        let found = seen(
            &truth,
            &[
                last(900, 600, "yes please"),
                partial(950, 600, 0, "yes please yes"),
                partial(1_300, 1_000, 1, "yes"),
                last(1_800, 1_200, "yes"),
            ],
        );
        let firsts: Vec<_> = found.iter().map(|s| s.first_ms).collect();
        assert_eq!(firsts, [Some(900), Some(900), Some(1_300), None], "an overtaken partial shows nothing");
        assert_eq!(found[2].final_ms, Some(1_800));
        assert_eq!(found[3].final_ms, None, "never heard");
    }

    #[test]
    fn nothing_is_found_that_had_not_begun() {
        let truth = truth("a b a");
        let found = seen(&truth, &[partial(500, 600, 0, "a a")]);
        assert_eq!(found[2].first_ms, None);
    }

    #[test]
    fn only_right_words_have_a_delay() {
        let published = |text: &str, at_ms: u64| Published { word: text.to_owned(), at_ms };
        let shown =
            [published("good", 600), published("mourning", 700), published("this", 750), published("now", 9_000)];
        assert_eq!(delays(&truth("good morning this is"), &shown), [400, -50]);
        assert!(delays(&truth("a"), &[]).is_empty());
    }

    #[test]
    fn a_spread_is_of_real_values() {
        let values: Vec<i64> = (1..=200).rev().collect();
        let found = Spread::of(&values).expect("values");
        assert_eq!((found.p50, found.p90, found.p95, found.p99, found.max), (100, 180, 190, 198, 200));
        assert_eq!((found.count, found.mean), (200, 100.5));
        assert_eq!(Spread::of(&[7]).map(|s| (s.p50, s.p99)), Some((7, 7)));
        assert_eq!(Spread::of(&[]), None);
    }
}
