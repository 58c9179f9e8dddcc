//! One budget for a stop, spread over named stages: whatever a stage leaves is there for the next, and together they never
//! take longer than was promised.

use std::{future::Future, time::Duration};

use tokio::time::{Instant, timeout_at};

/// Parts of a stop, in order, with the point of the whole budget (in percent) at which each must be over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Sessions store the finals they have begun.
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
            Stage::Finish => 50,
            Stage::Sessions => 60,
            Stage::Engine => 80,
            Stage::Tasks => 85,
            Stage::Nats => 100,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct ShutdownBudget {
    begun: Instant,
    total: Duration,
}

impl ShutdownBudget {
    pub(crate) fn begin(now: Instant, total: Duration) -> Self {
        Self { begun: now, total }
    }

    pub(crate) fn deadline(&self, stage: Stage) -> Instant {
        self.begun + self.total * stage.ends_at_percent() / 100
    }

    /// Runs one stage until its deadline; says whether it came to its own end.
    pub(crate) async fn run(&self, stage: Stage, work: impl Future<Output = ()>) -> bool {
        let done = timeout_at(self.deadline(stage), work).await.is_ok();
        let elapsed_ms = self.begun.elapsed().as_millis() as u64;
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

    #[tokio::test(start_paused = true)]
    async fn stages_share_one_budget() {
        let begun = Instant::now();
        let budget = ShutdownBudget::begin(begun, Duration::from_secs(10));
        assert!(budget.run(Stage::Finish, async {}).await);
        for stage in [Stage::Finish, Stage::Sessions, Stage::Engine, Stage::Tasks, Stage::Nats] {
            assert!(!budget.run(stage, std::future::pending()).await);
            assert_eq!(begun.elapsed().as_secs(), budget.deadline(stage).duration_since(begun).as_secs());
        }
        assert!(begun.elapsed() <= Duration::from_millis(10_010), "{:?}", begun.elapsed());
    }
}
