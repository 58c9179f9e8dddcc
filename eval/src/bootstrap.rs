//! How far a figure may be off by the choice of recordings: the percentile bootstrap (Efron 1979; for word error rates
//! Bisani and Ney 2004). The set is drawn again and again from itself, whole utterances or files at a time, and the middle
//! of what comes out is the interval. The same seed gives the same interval on every machine.

/// Seed of everything that does not name one.
pub const SEED: u64 = 20_040_517;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
    /// How sure, as a fraction.
    pub confidence: f64,
    pub rounds: u32,
}

/// `statistic` is given the numbers of the items drawn, some of them more than once. None for fewer than two items, which
/// say nothing about their scatter, and for no rounds.
pub fn interval(
    items: usize,
    rounds: u32,
    confidence: f64,
    seed: u64,
    mut statistic: impl FnMut(&[usize]) -> f64,
) -> Option<Interval> {
    if items < 2 || rounds == 0 {
        return None;
    }
    let mut random = Random::new(seed);
    let mut drawn = vec![0; items];
    let mut values: Vec<f64> = (0..rounds)
        .map(|_| {
            drawn.fill_with(|| random.below(items));
            statistic(&drawn)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    let tail = (1.0 - confidence) / 2.0;
    Some(Interval { low: quantile(&values, tail), high: quantile(&values, 1.0 - tail), confidence, rounds })
}

/// Between the two nearest of sorted values.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// xorshift64* (Vigna 2016): good enough to draw with, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // Nought would stay nought; neighbouring seeds are spread.
        Self((seed ^ 0x9e37_79b9_7f4a_7c15).max(1))
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next_u64()) * end as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(values: &[f64]) -> impl FnMut(&[usize]) -> f64 + '_ {
        |drawn| drawn.iter().map(|n| values[*n]).sum::<f64>() / drawn.len() as f64
    }

    #[test]
    fn the_interval_is_that_of_the_mean() {
        // 400 values with mean 0.5 and deviation 0.5: the mean scatters by 0.025, 95 % of it within 0.049.
        let values: Vec<f64> = (0..400).map(|n| f64::from(n % 2)).collect();
        let found = interval(values.len(), 2_000, 0.95, SEED, mean(&values)).expect("enough items");
        assert!((found.low - 0.451).abs() < 0.006 && (found.high - 0.549).abs() < 0.006, "{found:?}");
        let narrow = interval(values.len(), 2_000, 0.5, SEED, mean(&values)).expect("enough items");
        assert!(narrow.high - narrow.low < (found.high - found.low) / 2.0, "{narrow:?}");
        assert_eq!(interval(values.len(), 2_000, 0.95, SEED, mean(&values)), Some(found), "the same again");
        assert_ne!(interval(values.len(), 2_000, 0.95, 1, mean(&values)), Some(found), "another seed");
    }

    #[test]
    fn one_recording_says_nothing() {
        assert_eq!(interval(1, 100, 0.95, SEED, |_| 0.0), None);
        assert_eq!(interval(9, 0, 0.95, SEED, |_| 0.0), None);
    }

    #[test]
    fn draws_reach_every_item_alike() {
        let mut random = Random::new(7);
        let mut hits = [0u32; 10];
        (0..10_000).for_each(|_| hits[random.below(10)] += 1);
        assert!(hits.iter().all(|n| (850..1_150).contains(n)), "{hits:?}");
    }
}
