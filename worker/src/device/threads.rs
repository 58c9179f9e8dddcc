//! How many decodes run at once, and how many threads each of them has.
//!
//! ggml's threads spin: decodes that together have more threads than there are cores take many times longer, so states x
//! threads stays within the cores, over all workers of a host. Who they are is asked anew for each engine: workers come and go,
//! and one that has started alone must not keep all the cores for ever.

use std::sync::Arc;

use super::presence::Presence;
use crate::{config::WorkerConfig, ipc::EngineKind};

/// A GPU's decodes need the CPU for little more than log-mel and sampling.
const MOST_BESIDE_A_GPU: usize = 4;

/// Who shares the cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sharers {
    cores: usize,
    /// Workers of this host, this one included.
    workers: usize,
    /// Decodes of this worker that may run at once, as configured.
    states: usize,
    on_gpu: bool,
}

/// What one engine gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) states: usize,
    /// Of each decode.
    pub(crate) threads: usize,
}

impl Sharers {
    /// Threads as configured, as far as this worker's fair share allows them, or (0) all of the share.
    fn share(self, threads: usize) -> Share {
        let cores = (self.cores / self.workers.max(1)).max(1);
        // A GPU decodes several at once, however few cores stand beside it.
        let states = if self.on_gpu { self.states } else { self.states.min(cores) }.max(1);
        let each = (cores / states).max(1);
        let threads = match threads {
            0 if self.on_gpu => each.min(MOST_BESIDE_A_GPU),
            0 => each,
            asked => asked.min(each),
        };
        Share { states, threads }
    }
}

/// The way to an engine's share of the cores. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Cores {
    engine: EngineKind,
    states: usize,
    threads: usize,
    /// Most windows in a batch, of an engine that has such.
    batch: usize,
    /// Workers at least, where more are on their way than are seen.
    at_least: usize,
    presence: Option<Arc<Presence>>,
}

impl Cores {
    pub(crate) fn new(config: &WorkerConfig, presence: Option<Arc<Presence>>) -> Self {
        Self {
            engine: config.engine,
            states: config.decode_states,
            threads: config.decode_threads,
            batch: config.ct2.batch,
            at_least: config.host_workers as usize,
            presence,
        }
    }

    /// Workers of this host, this one included.
    fn workers(&self) -> usize {
        let seen = 1 + self.presence.as_ref().map_or(0, |presence| presence.others().len());
        seen.max(self.at_least)
    }

    /// Of an engine that starts now. Blocks.
    pub(crate) fn share(&self, on_gpu: bool) -> Share {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let sharers = Sharers { cores, workers: self.workers(), states: self.states, on_gpu };
        let share = match self.engine {
            EngineKind::WhisperCpp | EngineKind::Auto => sharers.share(self.threads),
            // One batch at a time has all threads; another is made ready meanwhile.
            EngineKind::Ct2 => {
                let Share { threads, .. } = Sharers { states: 1, ..sharers }.share(self.threads);
                Share { states: self.states.max(2 * self.batch), threads }
            }
            // Its decodes wait and do not compute.
            EngineKind::Simulated => Share { states: self.states, threads: 1 },
        };
        if share.states < self.states || share.threads < self.threads && self.engine.is_real() {
            tracing::warn!(
                asked_states = self.states,
                asked_threads = self.threads,
                "fewer decodes or threads than configured: more than there are cores slow each other down"
            );
        }
        let Share { states: decode_states, threads: decode_threads } = share;
        tracing::info!(decode_states, decode_threads, cores, workers = sharers.workers, "cores shared out");
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::presence::Neighbour;

    #[test]
    fn threads_of_all_workers_never_exceed_the_cores() {
        for (cores, workers, on_gpu, configured, states, threads) in [
            (2, 1, false, 0, 2, 1),
            (2, 2, false, 0, 1, 1),
            (16, 1, false, 0, 2, 8),
            (16, 2, false, 0, 2, 4),
            (16, 3, false, 0, 2, 2),
            (16, 8, false, 0, 2, 1),
            (16, 32, false, 0, 1, 1),
            (16, 1, true, 0, 2, 4),
            (8, 2, true, 0, 2, 2),
            (2, 4, true, 0, 2, 1),
            // What was asked for stands within the share.
            (16, 2, false, 3, 2, 3),
            (16, 4, false, 6, 2, 2),
            (16, 4, true, 6, 2, 2),
            (16, 1, true, 6, 2, 6),
            (16, 1, false, 64, 2, 8),
            (1, 1, false, 4, 1, 1),
            (0, 0, false, 0, 1, 1),
        ] {
            let sharers = Sharers { cores, workers, states: 2, on_gpu };
            let share = sharers.share(configured);
            assert_eq!(share, Share { states, threads }, "{sharers:?} {configured}");
            let all = workers * share.states * share.threads;
            assert!(on_gpu || workers > cores || all <= cores.max(1), "{sharers:?} {configured}");
        }
    }

    #[test]
    fn each_engine_is_told_who_is_there_now() {
        let cache = tempfile::tempdir().expect("cache");
        let announce = |gpu_id: &str| {
            let me = Neighbour { gpu_id: gpu_id.to_owned(), uuid: None };
            Presence::announce(cache.path(), "h", &me).expect("announced")
        };
        let config = WorkerConfig { host_workers: 2, ..WorkerConfig::default() };
        let cores = Cores::new(&config, Some(Arc::new(announce("cpu-0"))));
        assert_eq!(cores.workers(), 2, "one is on its way");
        let (first, second) = (announce("cpu-1"), announce("cpu-2"));
        assert_eq!(cores.workers(), 3);
        drop((first, second));
        assert_eq!(cores.workers(), 2);
    }
}
