//! How many threads each decode has. Pure.
//!
//! ggml's threads spin: decodes that together have more threads than there are cores take many times longer, so states x
//! threads stays within the cores, over all workers of a host.

/// A GPU's decodes need the CPU for little more than log-mel and sampling.
const MOST_BESIDE_A_GPU: usize = 4;

/// Who shares the cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sharers {
    pub(crate) cores: usize,
    /// Workers of this host, this one included.
    pub(crate) workers: usize,
    /// Decodes of this worker that may run at once.
    pub(crate) states: usize,
    pub(crate) on_gpu: bool,
}

impl Sharers {
    /// Threads of each decode: as configured, as far as there are cores for them, or (0) this worker's fair share.
    pub(crate) fn threads(self, configured: usize) -> usize {
        let each = |workers: usize| (self.cores / (self.states.max(1) * workers.max(1))).max(1);
        match configured {
            0 if self.on_gpu => each(self.workers).min(MOST_BESIDE_A_GPU),
            0 => each(self.workers),
            asked => asked.min(each(1)),
        }
    }

    /// Decodes that may run at once: on the CPU no more than there are cores.
    pub(crate) fn states(self) -> usize {
        if self.on_gpu { self.states } else { self.states.min(self.cores.max(1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_never_exceed_the_cores() {
        for (cores, workers, states, on_gpu, configured, threads) in [
            (2, 1, 2, false, 0, 1),
            (16, 1, 2, false, 0, 8),
            (16, 2, 2, false, 0, 4),
            (16, 3, 2, false, 0, 2),
            (16, 8, 2, false, 0, 1),
            (16, 32, 2, false, 0, 1),
            (16, 1, 2, true, 0, 4),
            (8, 2, 2, true, 0, 2),
            (2, 4, 2, true, 0, 1),
            // What was asked for stands, within the cores.
            (16, 4, 2, false, 6, 6),
            (16, 1, 2, false, 64, 8),
            (1, 1, 2, false, 4, 1),
        ] {
            let sharers = Sharers { cores, workers, states, on_gpu };
            assert_eq!(sharers.threads(configured), threads, "{sharers:?} {configured}");
        }
    }

    #[test]
    fn a_cpu_has_no_more_decodes_than_cores() {
        for (cores, on_gpu, states) in [(1, false, 1), (2, false, 2), (8, false, 2), (1, true, 2), (0, false, 1)] {
            assert_eq!(Sharers { cores, workers: 1, states: 2, on_gpu }.states(), states);
        }
    }
}
