//! When each word of the truth was first seen. Pure.

use crate::wer::words;

/// A word of the truth; times are ms since the call began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) word: String,
    pub(super) start_ms: u64,
    pub(super) end_ms: u64,
}

/// A partial or a final as it arrived. Times are ms since the call began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arrival {
    pub(super) at_ms: u64,
    /// End of the audio it covers.
    pub(super) to_ms: u64,
    pub(super) text: String,
    /// Index of the final that it is, or number of finals that came before the partial.
    pub(super) what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Partial { finals_before: usize },
    Final,
}

/// Times of arrival, in ms since the call began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// First partial that had it; the final where no partial came before it.
    pub(super) first_ms: Option<u64>,
    pub(super) in_partial: bool,
    pub(super) final_ms: Option<u64>,
}

/// Lays every arrival beside what had begun to be said by the end of the audio it covers.
pub(super) fn seen(truth: &[Said], arrivals: &[Arrival]) -> Vec<Seen> {
    let mut all = vec![Seen::default(); truth.len()];
    let mut finals: Vec<Vec<String>> = Vec::new();
    for arrival in arrivals {
        let text = words(&arrival.text);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// One word each 300 ms, 200 ms long.
    fn truth(text: &str) -> Vec<Said> {
        let word = |(n, word): (u64, &str)| Said { word: word.to_owned(), start_ms: n * 300, end_ms: n * 300 + 200 };
        (0..).zip(text.split(' ')).map(word).collect()
    }

    fn heard(text: &str) -> Vec<String> {
        words(text)
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
}
