//! What the dispatcher believes about each worker: heartbeats, their receive times on its own monotonic clock, and what
//! follows from them. Pure; verdicts are decided here and carried out elsewhere.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use voxfleet_schema::{
    fleet::{EngineRunState, Heartbeat, WorkerHealth, WorkerStatus},
    id::{GpuId, Incarnation, Kind, StreamId, WorkerName},
};

use crate::config::DispatcherConfig;

/// Three silent workers at once can be chance on a small fleet; with a fifth of the fleet it is the network.
const MASS_SILENCE_WORKERS: usize = 3;
const MASS_SILENCE_SHARE: usize = 5;

/// One incarnation.
#[derive(Debug)]
pub struct Worker {
    pub heartbeat: Heartbeat,
    /// Monotonic receive time of the last heartbeat.
    pub heard: Duration,
    /// Counts incarnations in order of their first heartbeat.
    pub order: u64,
    /// Its consumers exist, so it can be given work.
    pub ready: bool,
    /// Live sessions.
    pub load: Load,
    /// File jobs, which have slots of their own.
    pub jobs: Load,
}

/// Sessions (or jobs) that fill a worker's slots: those the book gave to it, and those it says it holds.
#[derive(Debug, Default)]
pub struct Load {
    assigned: HashSet<StreamId>,
    held: HashSet<StreamId>,
    union: u32,
}

impl Load {
    /// Slots taken, pending assignments included.
    pub fn used(&self) -> u32 {
        self.union
    }

    pub fn assigned(&self) -> impl Iterator<Item = &StreamId> {
        self.assigned.iter()
    }

    pub fn assign(&mut self, id: &StreamId) {
        if self.assigned.insert(id.clone()) && !self.held.contains(id) {
            self.union += 1;
        }
    }

    /// The book takes it away; the slot stays taken while the worker holds it.
    pub fn unassign(&mut self, id: &StreamId) {
        if self.assigned.remove(id) && !self.held.contains(id) {
            self.union -= 1;
        }
    }

    /// The worker said it let go.
    pub fn let_go(&mut self, id: &StreamId) {
        if self.held.remove(id) && !self.assigned.contains(id) {
            self.union -= 1;
        }
    }

    fn hold(&mut self, held: HashSet<StreamId>) {
        self.held = held;
        self.union = self.held.union(&self.assigned).count() as u32;
    }
}

/// What a heartbeat means for those who carry decisions out.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// First of an incarnation: make its consumers, unless a verdict stands in its way.
    Joined,
    Known,
    /// Its incarnation was declared dead: tell it to renew.
    Dead,
    /// Older than the last one.
    Stale,
}

#[derive(Debug, Default)]
pub struct Fleet {
    workers: HashMap<WorkerName, Worker>,
    /// Newest incarnation of each GPU.
    newest: HashMap<GpuId, Incarnation>,
    dead: HashMap<WorkerName, Duration>,
    joined: u64,
    mass_silence_since: Option<Duration>,
    hold_until: Duration,
}

impl Fleet {
    pub fn heard(&mut self, heartbeat: Heartbeat, now: Duration) -> Heard {
        let name = heartbeat.worker();
        if self.dead.contains_key(&name) {
            return Heard::Dead;
        }
        let held = held_by(&heartbeat, Kind::Session);
        let jobs_held = held_by(&heartbeat, Kind::Job);
        if let Some(worker) = self.workers.get_mut(&name) {
            // Core NATS keeps the order of one connection, but a worker that reconnects may be heard twice.
            if heartbeat.seq < worker.heartbeat.seq {
                return Heard::Stale;
            }
            worker.heard = now;
            worker.heartbeat = heartbeat;
            worker.load.hold(held);
            worker.jobs.hold(jobs_held);
            return Heard::Known;
        }
        self.joined += 1;
        self.newest.insert(name.gpu_id.clone(), name.incarnation.clone());
        let mut load = Load::default();
        load.hold(held);
        let mut jobs = Load::default();
        jobs.hold(jobs_held);
        let worker = Worker { heartbeat, heard: now, order: self.joined, ready: false, load, jobs };
        self.workers.insert(name, worker);
        Heard::Joined
    }

    pub fn get(&self, name: &WorkerName) -> Option<&Worker> {
        self.workers.get(name)
    }

    pub fn workers(&self) -> impl Iterator<Item = (&WorkerName, &Worker)> {
        self.workers.iter()
    }

    pub fn load_mut(&mut self, name: &WorkerName) -> Option<&mut Load> {
        self.workers.get_mut(name).map(|w| &mut w.load)
    }

    pub fn job_load_mut(&mut self, name: &WorkerName) -> Option<&mut Load> {
        self.workers.get_mut(name).map(|w| &mut w.jobs)
    }

    /// Whether a newer incarnation runs on the same GPU.
    pub fn superseded(&self, name: &WorkerName) -> bool {
        self.newest.get(&name.gpu_id).is_some_and(|newest| *newest != name.incarnation)
    }

    pub fn set_ready(&mut self, name: &WorkerName, ready: bool) {
        if let Some(worker) = self.workers.get_mut(name) {
            worker.ready = ready;
        }
    }

    /// Takes a worker out for good: its heartbeats are answered with `renew` from now on.
    pub fn bury(&mut self, name: &WorkerName, now: Duration) -> Option<Worker> {
        self.dead.insert(name.clone(), now);
        if self.newest.get(&name.gpu_id) == Some(&name.incarnation) {
            let next = self
                .workers
                .iter()
                .filter(|(n, _)| n.gpu_id == name.gpu_id && *n != name)
                .max_by_key(|(_, w)| w.order)
                .map(|(n, _)| n.incarnation.clone());
            match next {
                Some(incarnation) => self.newest.insert(name.gpu_id.clone(), incarnation),
                None => self.newest.remove(&name.gpu_id),
            };
        }
        self.workers.remove(name)
    }

    pub fn is_dead(&self, name: &WorkerName) -> bool {
        self.dead.contains_key(name)
    }

    /// No verdicts before `until`: the dispatcher's own link is in doubt.
    pub fn hold_verdicts(&mut self, until: Duration) {
        self.hold_until = self.hold_until.max(until);
    }

    pub fn health(&self, name: &WorkerName, now: Duration, config: &DispatcherConfig) -> WorkerHealth {
        match self.workers.get(name) {
            Some(worker) => worker.health(now, config),
            None if self.dead.contains_key(name) => WorkerHealth::Dead,
            None => WorkerHealth::Unknown,
        }
    }

    /// Workers to declare dead now. Remembers when many fell silent together, so that their verdicts wait once, not for
    /// ever.
    pub fn verdicts(&mut self, now: Duration, config: &DispatcherConfig) -> Vec<WorkerName> {
        let dead_after = Duration::from_millis(config.dead_after_ms);
        let suspect_after = Duration::from_millis(config.suspect_after_ms);
        let silence = |w: &Worker| now.saturating_sub(w.heard);
        let silent = self.workers.values().filter(|w| silence(w) >= suspect_after).count();
        let mass = silent >= MASS_SILENCE_WORKERS && silent * MASS_SILENCE_SHARE > self.workers.len();
        self.mass_silence_since = if mass { Some(self.mass_silence_since.unwrap_or(now)) } else { None };
        if let Some(since) = self.mass_silence_since {
            self.hold_until = self.hold_until.max(since + Duration::from_millis(config.mass_silence_hold_ms));
        }
        if now < self.hold_until {
            return Vec::new();
        }
        let mut dead: Vec<WorkerName> =
            self.workers.iter().filter(|(_, w)| silence(w) >= dead_after).map(|(n, _)| n.clone()).collect();
        dead.sort();
        dead
    }

    /// Forgets verdicts older than `keep`; names are never used twice, so only a very late zombie could come back, and
    /// its verdict stands in the bucket.
    pub fn forget_dead(&mut self, now: Duration, keep: Duration) {
        self.dead.retain(|_, at| now.saturating_sub(*at) < keep);
    }

    pub fn status(&self, now: Duration, config: &DispatcherConfig) -> Vec<WorkerStatus> {
        let mut rows: Vec<_> = self
            .workers
            .values()
            .map(|w| WorkerStatus {
                health: w.health(now, config),
                ms_since_heartbeat: now.saturating_sub(w.heard).as_millis() as u64,
                heartbeat: w.heartbeat.clone(),
            })
            .collect();
        rows.sort_by(|a, b| {
            let key = |r: &WorkerStatus| (r.heartbeat.host.clone(), r.heartbeat.device.index, r.heartbeat.worker());
            key(a).cmp(&key(b))
        });
        rows
    }
}

impl Worker {
    pub fn health(&self, now: Duration, config: &DispatcherConfig) -> WorkerHealth {
        let silent = now.saturating_sub(self.heard);
        let engine = &self.heartbeat.engine;
        if silent >= Duration::from_millis(config.suspect_after_ms) {
            // Dead is a verdict, not a reading: until it is written, a silent worker is suspect however long.
            WorkerHealth::Suspect
        } else if !self.ready {
            WorkerHealth::Joining
        } else if self.heartbeat.draining {
            WorkerHealth::Draining
        } else if engine.state == EngineRunState::Failed || engine.ms_since_progress >= config.stuck_after_ms {
            WorkerHealth::Unhealthy
        } else {
            WorkerHealth::Alive
        }
    }
}

fn held_by(heartbeat: &Heartbeat, kind: Kind) -> HashSet<StreamId> {
    heartbeat.held.iter().filter(|h| h.kind == kind).map(|h| h.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, beat, worker};

    const MS: Duration = Duration::from_millis(1);

    fn config() -> DispatcherConfig {
        DispatcherConfig::default()
    }

    #[test]
    fn a_worker_goes_from_joining_to_dead() {
        let mut fleet = Fleet::default();
        let name = worker("g0", "i0");
        assert_eq!(fleet.heard(beat("g0", "i0"), Duration::ZERO), Heard::Joined);
        assert_eq!(fleet.health(&name, Duration::ZERO, &config()), WorkerHealth::Joining);
        fleet.set_ready(&name, true);
        assert_eq!(fleet.health(&name, 1_499 * MS, &config()), WorkerHealth::Alive);
        assert_eq!(fleet.health(&name, 1_500 * MS, &config()), WorkerHealth::Suspect);
        assert!(fleet.verdicts(2_999 * MS, &config()).is_empty());
        assert_eq!(fleet.verdicts(3_000 * MS, &config()), std::slice::from_ref(&name));
        assert!(fleet.bury(&name, 3_000 * MS).is_some());
        assert_eq!(fleet.health(&name, 3_000 * MS, &config()), WorkerHealth::Dead);
        assert_eq!(fleet.heard(beat("g0", "i0"), 3_100 * MS), Heard::Dead);
        assert_eq!(fleet.heard(beat("g0", "i1"), 3_100 * MS), Heard::Joined);
    }

    #[test]
    fn draining_and_stuck_workers_are_named() {
        let mut fleet = Fleet::default();
        let mut heartbeat = beat("g0", "i0");
        let name = heartbeat.worker();
        fleet.heard(heartbeat.clone(), Duration::ZERO);
        fleet.set_ready(&name, true);
        heartbeat.draining = true;
        assert_eq!(fleet.heard(heartbeat.clone(), MS), Heard::Known);
        assert_eq!(fleet.health(&name, MS, &config()), WorkerHealth::Draining);
        heartbeat.draining = false;
        heartbeat.engine.ms_since_progress = 30_000;
        fleet.heard(heartbeat.clone(), 2 * MS);
        assert_eq!(fleet.health(&name, 2 * MS, &config()), WorkerHealth::Unhealthy);
        heartbeat.engine.ms_since_progress = 0;
        heartbeat.engine.state = EngineRunState::Failed;
        fleet.heard(heartbeat, 3 * MS);
        assert_eq!(fleet.health(&name, 3 * MS, &config()), WorkerHealth::Unhealthy);
    }

    #[test]
    fn many_silent_at_once_wait_ten_seconds_and_no_longer() {
        let mut fleet = Fleet::default();
        for n in 0..4 {
            fleet.heard(beat(&format!("g{n}"), "i"), Duration::ZERO);
        }
        fleet.heard(beat("g0", "i"), 2_000 * MS);
        assert!(fleet.verdicts(3_000 * MS, &config()).is_empty(), "three of four: suspect the network");
        fleet.heard(beat("g0", "i"), 12_000 * MS);
        assert!(fleet.verdicts(12_900 * MS, &config()).is_empty());
        assert_eq!(fleet.verdicts(13_000 * MS, &config()).len(), 3);
    }

    #[test]
    fn verdicts_wait_while_the_own_link_is_in_doubt() {
        let mut fleet = Fleet::default();
        fleet.heard(beat("g0", "i"), Duration::ZERO);
        fleet.hold_verdicts(8_000 * MS);
        assert!(fleet.verdicts(7_999 * MS, &config()).is_empty());
        assert_eq!(fleet.verdicts(8_000 * MS, &config()).len(), 1);
    }

    #[test]
    fn a_slot_is_taken_from_the_assignment_until_the_worker_lets_go() {
        let mut fleet = Fleet::default();
        let mut heartbeat = beat("g0", "i");
        let name = heartbeat.worker();
        fleet.heard(heartbeat.clone(), Duration::ZERO);
        let [a, b] = [testing::id("a"), testing::id("b")];
        let used = |fleet: &Fleet| fleet.get(&name).map(|w| w.load.used());
        let load = fleet.load_mut(&name).expect("known");
        load.assign(&a);
        load.assign(&a);
        load.assign(&b);
        assert_eq!(used(&fleet), Some(2));
        heartbeat.held = vec![testing::held("a", 1)];
        fleet.heard(heartbeat, MS);
        assert_eq!(used(&fleet), Some(2));
        let load = fleet.load_mut(&name).expect("known");
        load.unassign(&b);
        load.unassign(&a);
        assert_eq!(load.used(), 1, "a is still held");
        load.let_go(&a);
        load.let_go(&a);
        assert_eq!(load.used(), 0);
    }

    #[test]
    fn the_newest_incarnation_of_a_gpu_is_known() {
        let mut fleet = Fleet::default();
        for incarnation in ["i0", "i1"] {
            fleet.heard(beat("g0", incarnation), Duration::ZERO);
        }
        assert!(fleet.superseded(&worker("g0", "i0")) && !fleet.superseded(&worker("g0", "i1")));
        fleet.bury(&worker("g0", "i1"), Duration::ZERO);
        assert!(!fleet.superseded(&worker("g0", "i0")));
    }
}
