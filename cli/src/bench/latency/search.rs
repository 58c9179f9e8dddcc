//! How many sessions to try next, and whether so many were carried. Pure.

use crate::demo::report::quantile;

/// What a listener notices: half a second, the silence that ends an utterance, so as long as one waits anyway.
const NOTICED_MS: u64 = 500;

/// The number to try after these; none when the most is known to a quarter of itself.
pub(super) fn next(tried: &[(usize, bool)], most: usize) -> Option<usize> {
    let held = tried.iter().filter(|(_, held)| *held).map(|(n, _)| *n).max();
    let failed = tried.iter().filter(|(_, held)| !held).map(|(n, _)| *n).min();
    match (held, failed) {
        (None, None) => Some(1),
        (None, Some(_)) => None,
        (Some(held), None) => (held < most).then(|| (held * 2).min(most)),
        (Some(held), Some(failed)) => (failed - held > (held / 4).max(1)).then_some(held + (failed - held) / 2),
    }
}

/// From the last word of each final to its arrival, in ms, in order of arrival.
#[derive(Debug, Clone, Default)]
pub(super) struct Tails(pub(super) Vec<u64>);

impl Tails {
    /// Why so many sessions were too many, if they were: the 95th percentile is over twice that of a single session and a
    /// delay that a listener notices beyond, or finals come later and later.
    pub(super) fn too_late(&self, single: &Tails) -> Option<&'static str> {
        let p95 = |tails: &Tails| quantile(&tails.0, 0.95).unwrap_or(u64::MAX);
        if p95(self) > p95(single).saturating_mul(2).saturating_add(NOTICED_MS) {
            return Some("finals come late");
        }
        let third = self.0.len() / 3;
        let median = |part: &[u64]| quantile(part, 0.5).unwrap_or(0);
        let (early, late) = (median(&self.0[..third]), median(&self.0[self.0.len() - third..]));
        (late > early + early / 2 + NOTICED_MS).then_some("finals come later and later")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_then_halves_the_gap() {
        let run = |most: usize, holds: usize| {
            let mut tried = Vec::new();
            while let Some(n) = next(&tried, most) {
                tried.push((n, n <= holds));
            }
            tried.into_iter().map(|(n, _)| n).collect::<Vec<_>>()
        };
        assert_eq!(run(64, 13), [1, 2, 4, 8, 16, 12, 14]);
        assert_eq!(run(64, 9), [1, 2, 4, 8, 16, 12, 10]);
        assert_eq!(run(6, 100), [1, 2, 4, 6]);
        assert_eq!(run(64, 0), [1]);
        assert_eq!(run(64, 1), [1, 2]);
        assert_eq!(run(1, 9), [1]);
    }

    #[test]
    fn late_or_ever_later_is_too_late() {
        let single = Tails(vec![900; 30]);
        let too_late = |tails: Vec<u64>| Tails(tails).too_late(&single);
        assert_eq!(too_late(vec![2_200; 30]), None);
        assert_eq!(too_late(vec![2_400; 30]), Some("finals come late"));
        assert_eq!(too_late((0..30).map(|n| 400 + n * 60).collect()), Some("finals come later and later"));
        assert_eq!(too_late(vec![]), Some("finals come late"), "nothing came");
    }
}
