//! What live audio costs of the pool's time, the partials of a stretch included. Pure; time is an argument.
//!
//! The cores are shared out among the decode threads, so that on the CPU a decode takes its thread's part of the pool and
//! nothing of the others'. Decodes on a GPU are in each other's way: of a moment in which two run, each has one half.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::engine::pool::Runs;

/// A stretch that was decoded for partials less often than once in this time was not live, or the pool had no time for them:
/// it costs less than live audio does.
const PARTIAL_AT_LEAST_EVERY_MS: u64 = 2_000;

/// A session's decode: its handle, and which window of its final it is, or none for its partial. It has one of each at most.
pub(super) type Decode = (u64, Option<usize>);

/// What a decode was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Partial,
    /// A window of a final that has others still.
    Part,
    /// The last window of a final.
    Last,
}

/// A clock that goes slower the more is decoded at once.
#[derive(Debug)]
pub(super) struct Pace {
    threads: u32,
    shared_ms: f64,
    at: Instant,
    begun: HashMap<Decode, f64>,
}

impl Pace {
    pub(super) fn new(threads: usize, now: Instant) -> Self {
        Self { threads: threads.max(1) as u32, shared_ms: 0.0, at: now, begun: HashMap::new() }
    }

    fn advance(&mut self, now: Instant) {
        if !self.begun.is_empty() {
            self.shared_ms += now.saturating_duration_since(self.at).as_secs_f64() * 1_000.0 / self.begun.len() as f64;
        }
        self.at = now;
    }

    pub(super) fn begins(&mut self, decode: Decode, now: Instant) {
        self.advance(now);
        self.begun.insert(decode, self.shared_ms);
    }

    /// The part of the pool's time that it had.
    pub(super) fn over(&mut self, decode: Decode, now: Instant, took: Duration, runs: Runs) -> f64 {
        self.advance(now);
        let begun = self.begun.remove(&decode).unwrap_or(self.shared_ms);
        if runs == Runs::Apart { (took / self.threads).as_secs_f64() * 1_000.0 } else { self.shared_ms - begun }
    }
}

/// For how long a decode kept the device busy, in ms. What a window waits for those that go before it is no work of its own.
pub(super) fn busy_ms(runs: Runs, took: Duration, pool_ms: f64) -> u64 {
    match runs {
        Runs::Batched => pool_ms as u64,
        Runs::Apart | Runs::Together => took.as_millis() as u64,
    }
}

/// What a session's present stretch has cost so far.
#[derive(Debug, Default)]
pub(super) struct Spent {
    pool_ms: f64,
    partials: u64,
    /// Heard in the windows of its final so far.
    audio_ms: u64,
    failed: bool,
}

/// A stretch of live audio: how much was heard in it, and the part of the pool's time that all its decodes took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Stretch {
    pub(super) audio_ms: u64,
    pub(super) pool_ms: f64,
}

impl Spent {
    /// A decode is over. With the stretch's final, gives what the stretch has cost in all, if it says something of live audio.
    pub(super) fn add(&mut self, role: Role, succeeded: bool, audio_ms: u64, pool_ms: f64) -> Option<Stretch> {
        // One that was overtaken by its final has cost its time too.
        self.pool_ms += pool_ms;
        if role == Role::Partial {
            self.partials += u64::from(succeeded);
            return None;
        }
        self.audio_ms += audio_ms;
        self.failed |= !succeeded;
        if role == Role::Part {
            return None;
        }
        let Self { pool_ms, partials, audio_ms, failed } = std::mem::take(self);
        (!failed && partials >= audio_ms / PARTIAL_AT_LEAST_EVERY_MS).then_some(Stretch { audio_ms, pool_ms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_on_a_gpu_share_each_moment_and_those_on_the_cpu_have_their_own() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let took = Duration::from_millis(400);
        for (runs, first, second, busy) in [
            (Runs::Apart, 200.0, 200.0, 400),
            (Runs::Together, 300.0, 300.0, 400),
            // What it waited for the other is not its own.
            (Runs::Batched, 300.0, 300.0, 300),
        ] {
            let mut pace = Pace::new(2, begin);
            pace.begins((1, Some(0)), at(1_000));
            pace.begins((1, None), at(1_200));
            // Alone for 200 ms, with the other for 200.
            let one = pace.over((1, Some(0)), at(1_400), took, runs);
            let other = pace.over((1, None), at(1_600), took, runs);
            assert!((one - first).abs() < 1e-6 && (other - second).abs() < 1e-6, "{runs:?} {one} {other}");
            assert_eq!(busy_ms(runs, took, one), busy, "{runs:?}");
            // Nothing runs, and nothing is paid for.
            pace.begins((3, Some(1)), at(9_000));
            let alone = pace.over((3, Some(1)), at(9_400), took, runs);
            assert!((alone - if runs == Runs::Apart { 200.0 } else { 400.0 }).abs() < 1e-6, "{runs:?} {alone}");
        }
    }

    #[test]
    fn a_stretch_costs_its_partials_and_its_final() {
        let mut spent = Spent::default();
        let cost = |stretch: Option<Stretch>| stretch.map(|s| (s.audio_ms, s.pool_ms));
        assert_eq!(spent.add(Role::Partial, true, 1_000, 10.0), None);
        assert_eq!(spent.add(Role::Partial, false, 2_000, 5.0), None, "overtaken");
        assert_eq!(cost(spent.add(Role::Last, true, 3_000, 20.0)), Some((3_000, 35.0)));
        assert_eq!(
            cost(spent.add(Role::Last, true, 1_999, 20.0)),
            Some((1_999, 20.0)),
            "too short for a partial, and begun anew"
        );
        assert_eq!(
            spent.add(Role::Last, true, 2_000, 20.0),
            None,
            "there was no time for partials, or it was not live"
        );
        assert_eq!(spent.add(Role::Last, false, 1_000, 20.0), None, "no text came of it");
    }

    #[test]
    fn a_stretch_of_several_windows_costs_all_of_them() {
        let mut spent = Spent::default();
        assert_eq!(spent.add(Role::Part, true, 900, 10.0), None);
        assert_eq!(spent.add(Role::Last, true, 800, 5.0), Some(Stretch { audio_ms: 1_700, pool_ms: 15.0 }));
        assert_eq!(spent.add(Role::Part, false, 900, 10.0), None);
        assert_eq!(spent.add(Role::Last, true, 800, 5.0), None, "one of them failed");
        assert_eq!(spent.add(Role::Last, true, 800, 5.0), Some(Stretch { audio_ms: 800, pool_ms: 5.0 }), "begun anew");
    }
}
