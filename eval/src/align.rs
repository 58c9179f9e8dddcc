//! The alignment of two sequences with the fewest edits.
//!
//! Of several alignments with equally few edits one is chosen by the rule of rapidfuzz, which jiwer counts with, because
//! kinds of edits differ between them: equal ends are put aside; then, from the back, an item is deleted where that is
//! best, else inserted where the item before could only be reached so, else put beside its partner. What is larger than
//! [`MAX_CELLS`] is halved first (Hirschberg 1975), so memory stays bounded: the number of edits is the same then, and
//! their kinds may be those of another best alignment.

use std::{collections::HashMap, hash::Hash, iter::Sum, ops::AddAssign};

/// Table entries kept at once, a byte each: two texts of 8,000 words.
pub const MAX_CELLS: usize = 64 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// The same on both sides.
    Equal,
    Substitute,
    /// In the reference only.
    Delete,
    /// In what was heard only.
    Insert,
}

/// Counts of an alignment. They add up over utterances, which gives the figures of a whole set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Edits {
    /// Items of the reference.
    pub reference: usize,
    pub substituted: usize,
    pub deleted: usize,
    pub inserted: usize,
}

impl Edits {
    pub fn of(ops: &[Op]) -> Self {
        let mut counts = Self::default();
        for op in ops {
            counts.reference += usize::from(*op != Op::Insert);
            match op {
                Op::Equal => {}
                Op::Substitute => counts.substituted += 1,
                Op::Delete => counts.deleted += 1,
                Op::Insert => counts.inserted += 1,
            }
        }
        counts
    }

    pub fn edits(self) -> usize {
        self.substituted + self.deleted + self.inserted
    }

    /// Items that are the same on both sides.
    pub fn hits(self) -> usize {
        self.reference - self.substituted - self.deleted
    }

    /// Items of what was heard.
    pub fn heard(self) -> usize {
        self.hits() + self.substituted + self.inserted
    }

    /// Edits per item of the reference: the word (character) error rate. A fraction; can exceed 1. Against an empty
    /// reference it is the number of edits.
    pub fn rate(self) -> f64 {
        match (self.reference, self.edits()) {
            (_, 0) => 0.0,
            (0, edits) => edits as f64,
            (items, edits) => edits as f64 / items as f64,
        }
    }

    /// Edits per pair of the alignment, at most 1 (MER; Morris, Maier and Green 2004).
    pub fn match_error_rate(self) -> f64 {
        match self.hits() + self.edits() {
            0 => 0.0,
            pairs => self.edits() as f64 / pairs as f64,
        }
    }

    /// Share of hits in the reference times that in what was heard (WIP, same source).
    pub fn information_preserved(self) -> f64 {
        match (self.reference, self.heard()) {
            (0, 0) => 1.0,
            (0, _) | (_, 0) => 0.0,
            (said, heard) => {
                let hits = self.hits() as f64;
                (hits / said as f64) * (hits / heard as f64)
            }
        }
    }

    /// WIL.
    pub fn information_lost(self) -> f64 {
        1.0 - self.information_preserved()
    }
}

impl AddAssign for Edits {
    fn add_assign(&mut self, other: Self) {
        self.reference += other.reference;
        self.substituted += other.substituted;
        self.deleted += other.deleted;
        self.inserted += other.inserted;
    }
}

impl Sum for Edits {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

/// One best alignment, from front to back.
pub fn align<T: Eq + Hash>(reference: &[T], heard: &[T]) -> Vec<Op> {
    align_within(reference, heard, MAX_CELLS)
}

pub fn edits<T: Eq + Hash>(reference: &[T], heard: &[T]) -> Edits {
    Edits::of(&align(reference, heard))
}

fn align_within<T: Eq + Hash>(reference: &[T], heard: &[T], max_cells: usize) -> Vec<Op> {
    // Numbers are compared in no time, words are not.
    let mut numbers: HashMap<&T, u32> = HashMap::new();
    let mut number = |item| {
        let next = numbers.len() as u32;
        *numbers.entry(item).or_insert(next)
    };
    let reference: Vec<u32> = reference.iter().map(&mut number).collect();
    let heard: Vec<u32> = heard.iter().map(&mut number).collect();
    let mut ops = Vec::with_capacity(reference.len().max(heard.len()));
    path(&reference, &heard, max_cells, &mut ops);
    ops
}

/// Appends the operations of the best path.
fn path(reference: &[u32], heard: &[u32], max_cells: usize, ops: &mut Vec<Op>) {
    let front = reference.iter().zip(heard).take_while(|(a, b)| a == b).count();
    let (inner, other) = (&reference[front..], &heard[front..]);
    let back = inner.iter().rev().zip(other.iter().rev()).take_while(|(a, b)| a == b).count();
    let (inner, other) = (&inner[..inner.len() - back], &other[..other.len() - back]);
    ops.extend(std::iter::repeat_n(Op::Equal, front));
    if inner.len() > 1 && inner.len().saturating_mul(other.len()) > max_cells {
        let half = inner.len() / 2;
        let at = split(&inner[..half], &inner[half..], other);
        path(&inner[..half], &other[..at], max_cells, ops);
        path(&inner[half..], &other[at..], max_cells, ops);
    } else {
        table(inner, other, ops);
    }
    ops.extend(std::iter::repeat_n(Op::Equal, back));
}

/// Where to cut `heard` so that both halves together cost least.
fn split(first: &[u32], second: &[u32], heard: &[u32]) -> usize {
    let before = costs(first.iter(), heard.iter());
    let after = costs(second.iter().rev(), heard.iter().rev());
    let total = |at: &usize| before[*at] + after[heard.len() - *at];
    (0..=heard.len()).min_by_key(total).unwrap_or(0)
}

/// The cost of all of `reference` against each prefix of `heard`.
fn costs<'a>(reference: impl Iterator<Item = &'a u32>, heard: impl Iterator<Item = &'a u32> + Clone) -> Vec<u32> {
    let mut row: Vec<u32> = (0..=heard.clone().count() as u32).collect();
    for item in reference {
        let mut diagonal = row[0];
        row[0] += 1;
        for (at, other) in heard.clone().enumerate() {
            let best = (diagonal + u32::from(item != other)).min(row[at] + 1).min(row[at + 1] + 1);
            diagonal = std::mem::replace(&mut row[at + 1], best);
        }
    }
    row
}

/// The whole table, one byte a cell: how the path comes to it.
fn table(reference: &[u32], heard: &[u32], ops: &mut Vec<Op>) {
    let columns = heard.len();
    let mut steps = vec![Op::Equal; reference.len() * columns];
    let mut row: Vec<u32> = (0..=columns as u32).collect();
    for (i, item) in reference.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] += 1;
        for (j, other) in heard.iter().enumerate() {
            let (above, left) = (row[j + 1], row[j]);
            let here = (diagonal + u32::from(item != other)).min(left + 1).min(above + 1);
            steps[i * columns + j] = if here == above + 1 {
                Op::Delete
            } else if left + 1 == diagonal {
                Op::Insert
            } else if item == other {
                Op::Equal
            } else {
                Op::Substitute
            };
            (diagonal, row[j + 1]) = (above, here);
        }
    }
    let from = ops.len();
    let (mut i, mut j) = (reference.len(), columns);
    while i > 0 || j > 0 {
        let step = match (i, j) {
            (0, _) => Op::Insert,
            (_, 0) => Op::Delete,
            _ => steps[(i - 1) * columns + j - 1],
        };
        i -= usize::from(step != Op::Insert);
        j -= usize::from(step != Op::Delete);
        ops.push(step);
    }
    ops[from..].reverse();
}

/// What was heard, laid beside one line of the reference.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Beside {
    pub heard: Vec<Heard>,
    /// Words of the line that nothing was heard for.
    pub missed: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    pub word: String,
    pub right: bool,
}

/// Gives each heard word to the line of the reference that it is aligned with. Words put in belong to the line of the
/// reference word before them.
pub fn beside(lines: &[Vec<String>], heard: &[String]) -> Vec<Beside> {
    let owners: Vec<usize> = lines.iter().enumerate().flat_map(|(n, line)| line.iter().map(move |_| n)).collect();
    let reference: Vec<&String> = lines.iter().flatten().collect();
    let others: Vec<&String> = heard.iter().collect();
    let mut all = vec![Beside::default(); lines.len()];
    let (mut i, mut j) = (0usize, 0);
    for op in align(&reference, &others) {
        let word = if op == Op::Insert { i.saturating_sub(1) } else { i };
        let Some(line) = all.get_mut(owners.get(word).copied().unwrap_or(0)) else { break };
        if op == Op::Delete {
            line.missed += 1;
        } else {
            line.heard.push(Heard { word: heard[j].clone(), right: op == Op::Equal });
            j += 1;
        }
        i += usize::from(op != Op::Insert);
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(reference: &str, heard: &str) -> Vec<Op> {
        let list = |text: &str| text.split(' ').filter(|w| !w.is_empty()).map(str::to_owned).collect::<Vec<_>>();
        align(&list(reference), &list(heard))
    }

    fn counts(reference: &str, heard: &str) -> Edits {
        Edits::of(&of(reference, heard))
    }

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
        for (reference, heard, expected) in cases {
            let found = counts(reference, heard);
            assert_eq!((found.substituted, found.deleted, found.inserted), expected, "{heard:?}");
        }
    }

    #[test]
    fn rates_at_the_edges() {
        let both = |reference, heard| {
            let found: Edits = counts(reference, heard);
            (found.rate(), found.match_error_rate(), found.information_preserved())
        };
        assert_eq!(both("a b c d", "a b c x"), (0.25, 0.25, 0.5625));
        assert_eq!(both("", ""), (0.0, 0.0, 1.0));
        assert_eq!(both("", "x y"), (2.0, 1.0, 0.0));
        assert_eq!(both("x y", ""), (1.0, 1.0, 0.0));
        assert_eq!(both("a", "x y z"), (3.0, 1.0, 0.0));
        assert_eq!(counts("a b", "a b").information_lost(), 0.0);
    }

    #[test]
    fn a_set_is_the_sum_of_its_utterances() {
        let sum: Edits = [counts("a b c", "a"), counts("d", "x d")].into_iter().sum();
        assert_eq!((sum.reference, sum.deleted, sum.inserted, sum.hits(), sum.heard()), (4, 2, 1, 2, 3));
        assert_eq!(sum.rate(), 0.75);
    }

    #[test]
    fn of_two_best_alignments_it_is_the_known_one() {
        use Op::*;
        // Leaving out the one and putting in the other would cost as much.
        assert_eq!(of("a b", "b c"), [Substitute, Substitute]);
        assert_eq!(of("a b c", "c a b"), [Insert, Equal, Equal, Delete]);
        assert_eq!(of("x a", "y"), [Substitute, Delete]);
    }

    #[test]
    fn heard_words_find_their_line() {
        let split = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let lines = ["good morning", "my name is anna", "thank you"].map(split);
        let shown: Vec<_> = beside(&lines, &split("good morning my name anne so thank you"))
            .iter()
            .map(|b| {
                let words = b.heard.iter().map(|h| if h.right { h.word.clone() } else { format!("[{}]", h.word) });
                (words.collect::<Vec<_>>().join(" "), b.missed)
            })
            .collect();
        let expected = [("good morning", 0), ("my name [anne] [so]", 0), ("thank you", 0)];
        assert_eq!(shown, expected.map(|(words, missed)| (words.to_owned(), missed)));
        assert!(beside(&lines, &[]).iter().all(|b| b.heard.is_empty()));
        assert_eq!(beside(&lines, &[]).iter().map(|b| b.missed).sum::<usize>(), 8);
        assert_eq!(beside(&[], &split("x y")), []);
    }

    fn words() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(0u8..5, 0..40)
    }

    proptest! {
        /// An alignment spells both sides, costs what the distance is, and halving does not make it dearer.
        #[test]
        fn alignments_are_whole_and_cheapest(a in words(), b in words(), cells in 1usize..200) {
            let distance = *costs(
                a.iter().map(|x| u32::from(*x)).collect::<Vec<_>>().iter(),
                b.iter().map(|x| u32::from(*x)).collect::<Vec<_>>().iter(),
            ).last().unwrap_or(&0);
            for ops in [align(&a, &b), align_within(&a, &b, cells)] {
                let (mut i, mut j) = (0, 0);
                for op in &ops {
                    match op {
                        Op::Equal => prop_assert_eq!(a[i], b[j]),
                        Op::Substitute => prop_assert_ne!(a[i], b[j]),
                        Op::Delete | Op::Insert => {}
                    }
                    i += usize::from(*op != Op::Insert);
                    j += usize::from(*op != Op::Delete);
                }
                prop_assert_eq!((i, j), (a.len(), b.len()));
                prop_assert_eq!(Edits::of(&ops).edits(), distance as usize);
            }
        }
    }
}
