//! Diarization error rate and Jaccard error rate, as pyannote.metrics 4 defines them (`DiarizationErrorRate`,
//! `JaccardErrorRate`).
//!
//! What is scored: the regions given, or else from the first to the last boundary of either side; without the collar around
//! each boundary of the reference, and, where that is wanted, without what two turns of the reference cover. Speakers of
//! the hypothesis are then given to those of the reference so that they share the most time. At each moment with `r`
//! speakers in the reference, `h` in the hypothesis and `c` of them the same: missed is what `r` has more, false alarm what
//! `h` has more, confusion `min(r, h) - c`. Turns of one speaker that overlap count twice, on either side.

use std::{collections::BTreeMap, iter::Sum, ops::AddAssign};

use crate::{Turn, assign::best};

/// Turns no longer than this are none: what pyannote.core calls an empty segment.
const SHORTEST_S: f64 = 1e-6;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// Width of what is not scored around each boundary of the reference, half of it on either side.
    pub collar_s: f64,
    /// Leave out what two turns of the reference cover.
    pub skip_overlap: bool,
    /// Start and end of what is scored; overlapping ones count once. None: all that either side covers.
    pub regions: Option<Vec<(f64, f64)>>,
}

/// Times in seconds. They add up over files, whose speakers are mapped file by file; mappings are put together too.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Der {
    /// Time in the reference, each speaker's.
    pub total_s: f64,
    pub correct_s: f64,
    pub confusion_s: f64,
    pub missed_s: f64,
    pub false_alarm_s: f64,
    /// Sum of the Jaccard error rates of the reference's speakers, and their number.
    pub jaccard_sum: f64,
    pub speakers: usize,
    /// Speakers of the hypothesis that were found to be one of the reference.
    pub mapping: Vec<(String, String)>,
}

impl Der {
    /// Time that is wrong per time in the reference; a fraction that can exceed 1. Against a silent reference 0 or 1.
    pub fn rate(&self) -> f64 {
        let wrong_s = self.confusion_s + self.missed_s + self.false_alarm_s;
        match (self.total_s > 0.0, wrong_s > 0.0) {
            (true, _) => wrong_s / self.total_s,
            (false, wrong) => f64::from(u8::from(wrong)),
        }
    }

    /// Mean over the reference's speakers of the share of their time, and of that of whoever was taken for them, which
    /// the two do not share. A fraction, at most 1; without speakers 1.
    pub fn jaccard_rate(&self) -> f64 {
        if self.speakers == 0 { 1.0 } else { self.jaccard_sum / self.speakers as f64 }
    }
}

impl AddAssign for Der {
    fn add_assign(&mut self, other: Self) {
        self.total_s += other.total_s;
        self.correct_s += other.correct_s;
        self.confusion_s += other.confusion_s;
        self.missed_s += other.missed_s;
        self.false_alarm_s += other.false_alarm_s;
        self.jaccard_sum += other.jaccard_sum;
        self.speakers += other.speakers;
        self.mapping.extend(other.mapping);
    }
}

impl Sum for Der {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

/// A stretch within which nobody starts or stops: who speaks on either side, and how many times at once.
struct Stretch {
    length_s: f64,
    reference: Vec<(usize, usize)>,
    heard: Vec<(usize, usize)>,
}

pub fn score(reference: &[Turn], heard: &[Turn], options: &Options) -> Der {
    let (names, others) = (speakers(reference), speakers(heard));
    let stretches = stretches(reference, heard, (&names, &others), options);
    let mut shared = vec![vec![0.0; names.len()]; others.len()];
    for stretch in &stretches {
        for (h, twice) in &stretch.heard {
            for (r, times) in &stretch.reference {
                shared[*h][*r] += stretch.length_s * (times * twice) as f64;
            }
        }
    }
    let mapped = best(&shared);
    let mut der = Der::default();
    for Stretch { length_s, reference, heard } in &stretches {
        let r: usize = reference.iter().map(|(_, times)| times).sum();
        let h: usize = heard.iter().map(|(_, times)| times).sum();
        let same = |(who, times): &(usize, usize)| {
            let there = reference.iter().find(|(name, _)| mapped[*who] == Some(*name));
            there.map_or(0, |(_, others)| *times.min(others))
        };
        let correct: usize = heard.iter().map(same).sum();
        der.total_s += length_s * r as f64;
        der.correct_s += length_s * correct as f64;
        der.confusion_s += length_s * (r.min(h) - correct) as f64;
        der.missed_s += length_s * r.saturating_sub(h) as f64;
        der.false_alarm_s += length_s * h.saturating_sub(r) as f64;
    }
    for r in 0..names.len() {
        let partner = mapped.iter().position(|m| *m == Some(r));
        if let Some(jaccard) = jaccard(&stretches, r, partner) {
            der.jaccard_sum += jaccard;
            der.speakers += 1;
        }
    }
    let name = |map: &BTreeMap<&str, usize>, n: usize| {
        map.iter().find(|(_, at)| **at == n).map_or_else(String::new, |(name, _)| (*name).to_owned())
    };
    let pairs = mapped.iter().enumerate().filter_map(|(h, r)| Some((name(&others, h), name(&names, (*r)?))));
    der.mapping = pairs.collect();
    der
}

/// None for a speaker of whom nothing is scored.
fn jaccard(stretches: &[Stretch], speaker: usize, partner: Option<usize>) -> Option<f64> {
    let (mut own_s, mut both_s, mut union_s) = (0.0, 0.0, 0.0);
    for Stretch { length_s, reference, heard } in stretches {
        let speaks = reference.iter().any(|(r, _)| *r == speaker);
        let beside = heard.iter().any(|(h, _)| Some(*h) == partner);
        own_s += if speaks { *length_s } else { 0.0 };
        both_s += if speaks && beside { *length_s } else { 0.0 };
        union_s += if speaks || beside { *length_s } else { 0.0 };
    }
    (own_s > 0.0).then(|| if partner.is_some() { 1.0 - both_s / union_s } else { 1.0 })
}

fn speakers(turns: &[Turn]) -> BTreeMap<&str, usize> {
    let mut names: BTreeMap<&str, usize> = turns.iter().map(|t| (t.speaker.as_str(), 0)).collect();
    names.values_mut().zip(0..).for_each(|(number, n)| *number = n);
    names
}

/// What begins (+1) or ends (-1) at a time.
#[derive(Clone, Copy)]
enum What {
    Reference(usize),
    Heard(usize),
    Collar,
    Region,
}

fn stretches(
    reference: &[Turn],
    heard: &[Turn],
    (names, others): (&BTreeMap<&str, usize>, &BTreeMap<&str, usize>),
    options: &Options,
) -> Vec<Stretch> {
    let mut events: Vec<(f64, isize, What)> = Vec::new();
    let mut put = |from: f64, to: f64, what: What| {
        if to - from > SHORTEST_S {
            events.extend([(from, 1, what), (to, -1, what)]);
        }
    };
    for turn in reference {
        put(turn.start_s, turn.end_s, What::Reference(names[turn.speaker.as_str()]));
        if options.collar_s > 0.0 && turn.end_s - turn.start_s > SHORTEST_S {
            let half = options.collar_s / 2.0;
            for at in [turn.start_s, turn.end_s] {
                put(at - half, at + half, What::Collar);
            }
        }
    }
    for turn in heard {
        put(turn.start_s, turn.end_s, What::Heard(others[turn.speaker.as_str()]));
    }
    for (from, to) in options.regions.iter().flatten() {
        put(*from, *to, What::Region);
    }
    // Everything is scored where nothing is said about it.
    let mut regions = isize::from(options.regions.is_none());
    events.sort_by(|a, b| a.0.total_cmp(&b.0));

    let (mut speaking, mut answering) = (vec![0isize; names.len()], vec![0isize; others.len()]);
    let (mut collars, mut last_s, mut found) = (0, f64::NEG_INFINITY, Vec::new());
    for (at_s, step, what) in events {
        let length_s = at_s - last_s;
        let at_once: isize = speaking.iter().sum();
        let left_out = collars > 0 || regions <= 0 || (options.skip_overlap && at_once > 1);
        if length_s > 0.0 && length_s.is_finite() && !left_out {
            let (reference, heard) = (present(&speaking), present(&answering));
            if !reference.is_empty() || !heard.is_empty() {
                found.push(Stretch { length_s, reference, heard });
            }
        }
        last_s = at_s;
        match what {
            What::Reference(who) => speaking[who] += step,
            What::Heard(who) => answering[who] += step,
            What::Collar => collars += step,
            What::Region => regions += step,
        }
    }
    found
}

fn present(counts: &[isize]) -> Vec<(usize, usize)> {
    counts.iter().enumerate().filter(|(_, n)| **n > 0).map(|(who, n)| (who, *n as usize)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(list: &[(f64, f64, &str)]) -> Vec<Turn> {
        list.iter()
            .map(|(start_s, end_s, who)| Turn { start_s: *start_s, end_s: *end_s, speaker: (*who).into() })
            .collect()
    }

    fn plain(reference: &[(f64, f64, &str)], heard: &[(f64, f64, &str)]) -> Der {
        score(&turns(reference), &turns(heard), &Options::default())
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn names_do_not_matter_and_times_do() {
        let reference = [(0.0, 10.0, "A"), (12.0, 20.0, "B")];
        assert_eq!(plain(&reference, &[(0.0, 10.0, "x"), (12.0, 20.0, "y")]).rate(), 0.0);
        let found = plain(&reference, &[(0.0, 9.0, "x"), (9.0, 10.0, "y"), (13.0, 21.0, "y")]);
        assert!(
            near(found.confusion_s, 1.0) && near(found.missed_s, 1.0) && near(found.false_alarm_s, 1.0),
            "{found:?}"
        );
        assert!(near(found.total_s, 18.0) && near(found.correct_s, 16.0) && near(found.rate(), 3.0 / 18.0));
        assert_eq!(found.mapping, [("x".to_owned(), "A".to_owned()), ("y".to_owned(), "B".to_owned())]);
        // A shares 9 of 10 s with x; B and y share 7 of 10.
        assert!(near(found.jaccard_rate(), (0.1 + 0.3) / 2.0), "{}", found.jaccard_rate());
    }

    #[test]
    fn overlap_counts_each_speaker() {
        let found = plain(&[(0.0, 4.0, "A"), (2.0, 6.0, "B")], &[(0.0, 6.0, "x")]);
        assert!(near(found.total_s, 8.0) && near(found.missed_s, 2.0) && near(found.confusion_s, 2.0), "{found:?}");
        let skipped = Options { skip_overlap: true, ..Options::default() };
        let found = score(&turns(&[(0.0, 4.0, "A"), (2.0, 6.0, "B")]), &turns(&[(0.0, 6.0, "x")]), &skipped);
        assert!(near(found.total_s, 4.0) && near(found.missed_s, 0.0) && near(found.confusion_s, 2.0), "{found:?}");
    }

    #[test]
    fn a_collar_has_half_its_width_on_either_side() {
        let collar = Options { collar_s: 0.5, ..Options::default() };
        let found = score(&turns(&[(0.0, 10.0, "A")]), &turns(&[(0.24, 10.3, "x")]), &collar);
        assert!(near(found.total_s, 9.5) && near(found.missed_s, 0.0) && near(found.false_alarm_s, 0.05), "{found:?}");
    }

    #[test]
    fn only_regions_are_scored() {
        let regions = Options { regions: Some(vec![(1.0, 3.0), (2.0, 4.0)]), ..Options::default() };
        let found = score(&turns(&[(0.0, 10.0, "A")]), &turns(&[(3.0, 10.0, "x")]), &regions);
        assert!(near(found.total_s, 3.0) && near(found.missed_s, 2.0), "{found:?}");
    }

    #[test]
    fn silence_has_a_rate_too() {
        assert_eq!(plain(&[], &[]).rate(), 0.0);
        assert_eq!(plain(&[], &[(0.0, 1.0, "x")]).rate(), 1.0);
        assert_eq!(plain(&[(0.0, 1.0, "A")], &[]).rate(), 1.0);
        assert_eq!(plain(&[(0.0, 1.0, "A")], &[]).jaccard_rate(), 1.0);
        assert_eq!(plain(&[(1.0, 1.0, "A")], &[]).total_s, 0.0, "no time");
    }

    #[test]
    fn a_set_is_the_sum_of_its_files() {
        let one = plain(&[(0.0, 9.0, "A")], &[(0.0, 9.0, "x")]);
        let two = plain(&[(0.0, 1.0, "B")], &[]);
        let sum: Der = [one, two].into_iter().sum();
        assert!(near(sum.rate(), 0.1) && near(sum.jaccard_rate(), 0.5), "{sum:?}");
    }
}
