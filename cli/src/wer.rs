//! Word error rate: edits (substituted, left out, put in) that turn what was heard into the reference, per reference word.

/// Counts of an alignment of least cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub(crate) struct WordErrors {
    pub(crate) reference_words: usize,
    pub(crate) substituted: usize,
    pub(crate) deleted: usize,
    pub(crate) inserted: usize,
}

impl WordErrors {
    pub(crate) fn edits(self) -> usize {
        self.substituted + self.deleted + self.inserted
    }

    /// A fraction; can exceed 1. Words against an empty reference are all wrong.
    pub(crate) fn rate(self) -> f64 {
        match (self.reference_words, self.edits()) {
            (_, 0) => 0.0,
            (0, edits) => edits as f64,
            (words, edits) => edits as f64 / words as f64,
        }
    }
}

/// Lower case, punctuation dropped, split at white space. An apostrophe inside a word stays: "don't" is one word.
pub(crate) fn words(text: &str) -> Vec<String> {
    text.split_whitespace()
        .map(|word| {
            word.chars().filter(|c| c.is_alphanumeric() || *c == '\'').flat_map(char::to_lowercase).collect::<String>()
        })
        .map(|word| word.trim_matches('\'').to_owned())
        .filter(|word| !word.is_empty())
        .collect()
}

/// Levenshtein distance over words, with the kinds of edits of one best path (a substitution is preferred to a pair of
/// deletion and insertion, which cost two).
pub(crate) fn compare(reference: &str, heard: &str) -> WordErrors {
    let (reference, heard) = (words(reference), words(heard));
    let start = WordErrors { reference_words: reference.len(), ..WordErrors::default() };
    // Row i holds the best counts for the first i reference words against every prefix of what was heard.
    let mut row: Vec<WordErrors> = (0..=heard.len()).map(|inserted| WordErrors { inserted, ..start }).collect();
    for expected in &reference {
        let mut diagonal = row[0];
        row[0].deleted += 1;
        for (at, word) in heard.iter().enumerate() {
            let (above, left) = (row[at + 1], row[at]);
            let same = word == expected;
            let candidates = [
                WordErrors { substituted: diagonal.substituted + usize::from(!same), ..diagonal },
                WordErrors { deleted: above.deleted + 1, ..above },
                WordErrors { inserted: left.inserted + 1, ..left },
            ];
            let best = candidates.into_iter().min_by_key(|c| c.edits()).unwrap_or(start);
            (diagonal, row[at + 1]) = (above, best);
        }
    }
    row[heard.len()]
}

/// What was heard, laid beside one line of the reference.
#[cfg(any(test, feature = "bench"))]
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Beside {
    pub(crate) reference: String,
    pub(crate) heard: Vec<Heard>,
    /// Reference words that nothing was heard for.
    pub(crate) missed: usize,
}

#[cfg(any(test, feature = "bench"))]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) word: String,
    pub(crate) right: bool,
}

/// Gives each heard word to the reference line that it is aligned with. Whole matrix: for calls, not for hours.
#[cfg(any(test, feature = "bench"))]
pub(crate) fn beside(reference_lines: &[String], heard: &str) -> Vec<Beside> {
    let owned: Vec<(usize, String)> = reference_lines
        .iter()
        .enumerate()
        .flat_map(|(line, text)| words(text).into_iter().map(move |w| (line, w)))
        .collect();
    let heard = words(heard);
    let columns = heard.len() + 1;
    let mut cost = vec![0usize; (owned.len() + 1) * columns];
    for row in 0..=owned.len() {
        for column in 0..columns {
            cost[row * columns + column] = match (row, column) {
                (0, n) | (n, 0) => n,
                _ => {
                    let differs = usize::from(owned[row - 1].1 != heard[column - 1]);
                    let diagonal = cost[(row - 1) * columns + column - 1] + differs;
                    let (above, left) = (cost[(row - 1) * columns + column], cost[row * columns + column - 1]);
                    diagonal.min(above + 1).min(left + 1)
                }
            };
        }
    }
    let mut lines: Vec<Beside> =
        reference_lines.iter().map(|l| Beside { reference: l.clone(), ..Beside::default() }).collect();
    // Backwards from the end; words put in belong to the line of the reference word before them.
    let (mut row, mut column) = (owned.len(), heard.len());
    while row > 0 || column > 0 {
        let here = cost[row * columns + column];
        let line = owned.get(row.saturating_sub(1)).map_or(0, |(line, _)| *line);
        let mut put = |right: bool, column: usize| {
            if let Some(beside) = lines.get_mut(line) {
                beside.heard.push(Heard { word: heard[column - 1].clone(), right });
            }
        };
        let same = row > 0 && column > 0 && owned[row - 1].1 == heard[column - 1];
        if row > 0 && column > 0 && here == cost[(row - 1) * columns + column - 1] + usize::from(!same) {
            put(same, column);
            (row, column) = (row - 1, column - 1);
        } else if column > 0 && here == cost[row * columns + column - 1] + 1 {
            put(false, column);
            column -= 1;
        } else {
            if let Some(beside) = lines.get_mut(line) {
                beside.missed += 1;
            }
            row -= 1;
        }
    }
    lines.iter_mut().for_each(|l| l.heard.reverse());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_counted_by_kind() {
        let cases = [
            ("a b c", "a b c", (0, 0, 0)),
            ("a b c", "a x c", (1, 0, 0)),
            ("a b c", "a c", (0, 1, 0)),
            ("a b c", "a b b c", (0, 0, 1)),
            ("a b c d", "x a b d", (0, 1, 1)),
            ("", "a b", (0, 0, 2)),
            ("a b", "", (0, 2, 0)),
        ];
        for (reference, heard, (substituted, deleted, inserted)) in cases {
            let found = compare(reference, heard);
            assert_eq!(
                (found.substituted, found.deleted, found.inserted),
                (substituted, deleted, inserted),
                "{heard:?}"
            );
        }
    }

    #[test]
    fn case_and_punctuation_do_not_count() {
        assert_eq!(compare("Good morning, this is Lucy.", "good  morning this is lucy").edits(), 0);
        assert_eq!(words("Don't -- 'stop' 3.5!"), ["don't", "stop", "35"]);
    }

    #[test]
    fn the_rate_is_a_fraction() {
        assert_eq!(compare("a b c d", "a b c x").rate(), 0.25);
        assert_eq!(compare("", "").rate(), 0.0);
        assert_eq!(compare("a", "x y z").rate(), 3.0);
    }

    #[test]
    fn heard_words_find_their_line() {
        let lines = ["good morning", "my name is anna", "thank you"].map(str::to_owned);
        let found = beside(&lines, "good morning my name anne so thank you");
        let show = |b: &Beside| {
            let words: Vec<String> =
                b.heard.iter().map(|h| if h.right { h.word.clone() } else { format!("[{}]", h.word) }).collect();
            (words.join(" "), b.missed)
        };
        let shown: Vec<_> = found.iter().map(show).collect();
        assert_eq!(shown[0], ("good morning".to_owned(), 0));
        assert_eq!(shown[2], ("thank you".to_owned(), 0));
        assert_eq!(shown[1].0.matches('[').count(), 2, "{shown:?}");
        assert!(beside(&lines, "").iter().all(|b| b.heard.is_empty()));
        assert_eq!(beside(&[], "x y"), []);
    }
}
