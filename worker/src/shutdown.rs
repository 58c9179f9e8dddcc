//! One budget for leaving, spread over named stages: whatever a stage leaves is there for the next, and together they never
//! take longer than was promised, whoever asked: SIGTERM, a drain, or a provider that takes the machine back.

use std::{future::Future, time::Duration};

use tokio::time::{Instant, timeout_at};

/// Parts of a stop, in order, with the point of its tail (in percent) at which each must be over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Sessions and jobs go on until the dispatcher has moved them.
    HandOver,
    /// What is left is fed nothing more and stores the finals it has begun.
    Finish,
    /// Their tasks end.
    Sessions,
    /// The engine child ends and is reaped.
    Engine,
    /// Heartbeats, control and pulls end.
    Tasks,
    /// What was published is flushed, the connection closes.
    Nats,
}

impl Stage {
    fn ends_at_percent(self) -> u32 {
        match self {
            Stage::HandOver => 40,
            Stage::Finish => 65,
            Stage::Sessions => 70,
            Stage::Engine => 85,
            Stage::Tasks => 90,
            Stage::Nats => 100,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ShutdownBudget {
    begun: Instant,
    total: Duration,
    /// The last part of it, shared out by the stages' percentages; what is before it belongs to the hand-over.
    tail: Duration,
}

impl ShutdownBudget {
    /// `total` from now to the end of the process; no more than `tail` of it for all that comes behind a long hand-over.
    pub(crate) fn begin(now: Instant, total: Duration, tail: Duration) -> Self {
        Self { begun: now, total, tail: tail.min(total) }
    }

    pub(crate) fn deadline(&self, stage: Stage) -> Instant {
        self.begun + (self.total - self.tail) + self.tail * stage.ends_at_percent() / 100
    }

    /// When everything is over.
    pub(crate) fn over(&self) -> Instant {
        self.begun + self.total
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Runs one stage until its deadline; says whether it came to its own end.
    pub(crate) async fn run(&self, stage: Stage, work: impl Future<Output = ()>) -> bool {
        let done = timeout_at(self.deadline(stage), work).await.is_ok();
        let elapsed_ms = self.elapsed().as_millis() as u64;
        if done {
            tracing::debug!(?stage, elapsed_ms, "shutdown stage done");
        } else {
            tracing::warn!(?stage, elapsed_ms, "shutdown stage ran out of time");
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGES: [Stage; 6] =
        [Stage::HandOver, Stage::Finish, Stage::Sessions, Stage::Engine, Stage::Tasks, Stage::Nats];

    #[tokio::test(start_paused = true)]
    async fn stages_share_one_budget() {
        let begun = Instant::now();
        let ten = Duration::from_secs(10);
        let budget = ShutdownBudget::begin(begun, ten, ten);
        assert!(budget.run(Stage::HandOver, async {}).await);
        for stage in STAGES {
            assert!(!budget.run(stage, std::future::pending()).await);
            assert_eq!(begun.elapsed().as_secs(), budget.deadline(stage).duration_since(begun).as_secs());
        }
        assert!(begun.elapsed() <= Duration::from_millis(10_010), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_drain_hands_over_for_long_and_ends_in_time() {
        let begun = Instant::now();
        // (total, tail, end of the hand-over) in ms
        for (total, tail, hand_over) in [(60_000, 10_000, 54_000), (10_000, 10_000, 4_000), (2_000, 10_000, 800)] {
            let ms = Duration::from_millis;
            let budget = ShutdownBudget::begin(begun, ms(total), ms(tail));
            assert_eq!(budget.deadline(Stage::HandOver), begun + ms(hand_over));
            assert_eq!(budget.deadline(Stage::Nats), begun + ms(total));
            assert_eq!(budget.over(), begun + ms(total));
            assert!(STAGES.windows(2).all(|pair| budget.deadline(pair[0]) < budget.deadline(pair[1])));
        }
    }
}
