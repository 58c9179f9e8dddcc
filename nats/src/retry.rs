//! How long to wait before the next attempt. Pure delays; who waits decides whether to go on.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Delays for repeating a request to the server: 50 ms, doubling to 2 s, jittered so that a fleet does not ask in step.
#[derive(Debug)]
pub struct Backoff {
    delays: ExponentialBackoff,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            delays: ExponentialBuilder::default()
                .with_min_delay(Duration::from_millis(50))
                .with_max_delay(LONGEST)
                .with_factor(2.0)
                .with_jitter()
                .without_max_times()
                .build(),
        }
    }
}

const LONGEST: Duration = Duration::from_secs(2);

impl Backoff {
    pub fn next_delay(&mut self) -> Duration {
        self.delays.next().unwrap_or(LONGEST).min(LONGEST)
    }

    /// Sleeps for the next delay.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next_delay()).await;
    }
}

/// Delay before reconnect attempt `attempts`: at once first, then up to a second, so that a restarted server is found
/// quickly and a dead one is not hammered.
pub(crate) fn reconnect_delay(attempts: usize) -> Duration {
    match attempts {
        0 | 1 => Duration::ZERO,
        n => Duration::from_millis((50u64 << (n - 2).min(5)).min(1_000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_bound_and_never_end() {
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..50).map(|_| backoff.next_delay()).collect();
        assert!(delays[0] >= Duration::from_millis(50) && delays[0] <= Duration::from_millis(100));
        assert!(delays.iter().all(|d| *d <= LONGEST));
        assert_eq!(delays[49], LONGEST);
    }

    #[test]
    fn reconnects_begin_at_once_and_stay_under_a_second() {
        assert_eq!(reconnect_delay(0), Duration::ZERO);
        assert!((0..1_000).all(|n| reconnect_delay(n) <= Duration::from_secs(1)));
    }
}
