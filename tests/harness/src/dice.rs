//! Chance that can be had again: the same seed gives the same throws on every machine.

/// xorshift64*: small, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// 0 to 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// 0 to `n` - 1; 0 for none.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.unit() * n as f64) as usize).min(n.saturating_sub(1))
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throws_repeat_and_spread() {
        let throws = |seed| (0..1_000).map(|_| 0).scan(Dice::new(seed), |d, _: i32| Some(d.below(10))).collect();
        let (one, again, other): (Vec<usize>, Vec<usize>, Vec<usize>) = (throws(1), throws(1), throws(2));
        assert_eq!(one, again);
        assert_ne!(one, other);
        for n in 0..10 {
            assert!(one.iter().filter(|t| **t == n).count() > 60, "{n}");
        }
        assert_eq!(Dice::new(3).below(0), 0);
    }
}
