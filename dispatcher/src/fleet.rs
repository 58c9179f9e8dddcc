//! What the dispatcher believes about each worker: heartbeats, their receive times on its own monotonic clock, and what
//! follows from them. Pure; verdicts are decided here and carried out elsewhere.

mod health;
mod link;
mod load;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use voxfleet_schema::{
    event::What,
    fleet::{Heartbeat, Held, WorkerHealth, WorkerStatus},
    id::{GpuId, Incarnation, Kind, StreamId, WorkerName},
};

pub use link::{HoldNews, RoundTrip, Why};
pub use load::Load;

use crate::config::DispatcherConfig;
use health::{Crashes, Patience};
use link::Link;

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
    /// Revision of its key in `asr_fleet` as this process wrote it last: a verdict is fenced by it.
    pub revision: Option<u64>,
    /// Somebody else has written there, who hears it: for a verdict it has been silent since then.
    elsewhere: Duration,
    /// When its heartbeat was last written there; none: it is to be written as soon as may be.
    pub noted: Option<Duration>,
    /// It was asked to be gone by this Unix time in ms, and takes nothing new from then on.
    pub drain_until_ms: Option<u64>,
    crashes: Crashes,
    told: WorkerHealth,
    told_draining: bool,
}

/// What a heartbeat means for those who carry decisions out.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// First of an incarnation: make its consumers, unless a verdict stands in its way.
    Joined,
    Known,
    /// What it holds, whether it drains, or how its engine is, is not as it was.
    Changed,
    /// Its incarnation was declared dead: tell it to renew. `first` of its heartbeats since.
    Dead {
        first: bool,
    },
    /// Older than the last one.
    Stale,
}

/// A worker that a key names and nobody has heard.
#[derive(Debug, Clone, Copy)]
struct Missed {
    /// Silent for this dispatcher since then.
    since: Duration,
    /// Of its key in `asr_fleet`, as a predecessor left it.
    revision: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Dead {
    at: Duration,
    /// Unix time in ms of a verdict that a predecessor left.
    left_ms: Option<u64>,
    /// Its incarnation was heard again and told to renew.
    back: bool,
    /// It went in good order.
    left: bool,
}

#[derive(Debug, Default)]
pub struct Fleet {
    workers: HashMap<WorkerName, Worker>,
    /// Newest incarnation of each GPU.
    newest: HashMap<GpuId, Incarnation>,
    /// Owners of sessions and jobs that have not been heard since this dispatcher listens.
    missed: HashMap<WorkerName, Missed>,
    dead: HashMap<WorkerName, Dead>,
    joined: u64,
    link: Link,
    /// Workers that are not as they were, for whoever keeps figures of them.
    touched: HashSet<WorkerName>,
}

impl Fleet {
    pub fn heard(&mut self, heartbeat: Heartbeat, now: Duration) -> Heard {
        let name = heartbeat.worker();
        self.touched.insert(name.clone());
        if let Some(dead) = self.dead.get_mut(&name) {
            return Heard::Dead { first: !std::mem::replace(&mut dead.back, true) };
        }
        let held = held_by(&heartbeat, Kind::Session);
        let jobs_held = held_by(&heartbeat, Kind::Job);
        if let Some(worker) = self.workers.get_mut(&name) {
            // Core NATS keeps the order of one connection, but a worker that reconnects may be heard twice.
            // Its clock must agree that it is the older: else one heartbeat with a number far too high, whoever sent it, would
            // make all that follow stale, and their worker dead.
            let older = heartbeat.sent_ms <= worker.heartbeat.sent_ms;
            if heartbeat.seq < worker.heartbeat.seq && older {
                return Heard::Stale;
            }
            let changed = changed(&worker.heartbeat, &heartbeat);
            worker.crashes.heard(heartbeat.engine.crashes, now);
            worker.heard = now;
            worker.heartbeat = heartbeat;
            worker.load.hold(held);
            worker.jobs.hold(jobs_held);
            return if changed { Heard::Changed } else { Heard::Known };
        }
        self.joined += 1;
        let missed = self.missed.remove(&name);
        let mut load = Load::default();
        load.hold(held);
        let mut jobs = Load::default();
        jobs.hold(jobs_held);
        let worker = Worker {
            crashes: Crashes::before(heartbeat.engine.crashes),
            heartbeat,
            heard: now,
            order: self.joined,
            ready: false,
            load,
            jobs,
            revision: missed.and_then(|m| m.revision),
            elsewhere: Duration::ZERO,
            noted: Some(now),
            drain_until_ms: None,
            told: WorkerHealth::Joining,
            told_draining: false,
        };
        self.workers.insert(name.clone(), worker);
        self.find_newest(&name.gpu_id);
        Heard::Joined
    }

    /// Of several incarnations on one GPU the one that got its name last; where none says when, who was heard first last.
    fn find_newest(&mut self, gpu: &GpuId) {
        let newest = self
            .workers
            .iter()
            .filter(|(name, _)| name.gpu_id == *gpu)
            .max_by_key(|(_, w)| (w.heartbeat.started_ms, w.order))
            .map(|(name, _)| name.incarnation.clone());
        match newest {
            Some(incarnation) => self.newest.insert(gpu.clone(), incarnation),
            None => self.newest.remove(gpu),
        };
    }

    pub fn get(&self, name: &WorkerName) -> Option<&Worker> {
        self.workers.get(name)
    }

    pub fn get_mut(&mut self, name: &WorkerName) -> Option<&mut Worker> {
        self.touched.insert(name.clone());
        self.workers.get_mut(name)
    }

    pub fn workers(&self) -> impl Iterator<Item = (&WorkerName, &Worker)> {
        self.workers.iter()
    }

    pub fn load_mut(&mut self, name: &WorkerName) -> Option<&mut Load> {
        self.get_mut(name).map(|w| &mut w.load)
    }

    pub fn job_load_mut(&mut self, name: &WorkerName) -> Option<&mut Load> {
        self.get_mut(name).map(|w| &mut w.jobs)
    }

    /// What it has promised has changed.
    pub fn touch(&mut self, name: &WorkerName) {
        self.touched.insert(name.clone());
    }

    /// Workers that have come, gone or changed since the last call.
    pub fn take_touched(&mut self) -> HashSet<WorkerName> {
        std::mem::take(&mut self.touched)
    }

    /// Whether a newer incarnation runs on the same GPU.
    pub fn superseded(&self, name: &WorkerName) -> bool {
        self.newest.get(&name.gpu_id).is_some_and(|newest| *newest != name.incarnation)
    }

    pub fn set_ready(&mut self, name: &WorkerName, ready: bool) {
        if let Some(worker) = self.get_mut(name) {
            worker.ready = ready;
        }
    }

    /// Somebody names this worker who has not been heard: from now on its silence, which has lasted `since` then, counts
    /// like that of any other.
    pub fn miss(&mut self, name: &WorkerName, since: Duration) {
        if !self.workers.contains_key(name) && !self.dead.contains_key(name) && !self.missed.contains_key(name) {
            self.missed.insert(name.clone(), Missed { since, revision: None });
        }
    }

    /// Its key as a predecessor left it.
    pub fn was_noted(&mut self, name: &WorkerName, revision: u64) {
        if let Some(missed) = self.missed.get_mut(name) {
            missed.revision = Some(revision);
        }
    }

    /// Revision of its key that a verdict is to be written over, if one is known.
    pub fn revision(&self, name: &WorkerName) -> Option<u64> {
        match self.workers.get(name) {
            Some(worker) => worker.revision,
            None => self.missed.get(name)?.revision,
        }
    }

    /// Somebody else has written its key: another dispatcher hears it, so no verdict before its silence has lasted anew. It
    /// is not alive for that.
    pub fn heard_elsewhere(&mut self, name: &WorkerName, now: Duration) {
        if let Some(worker) = self.workers.get_mut(name) {
            (worker.elsewhere, worker.revision) = (now, None);
        }
        if let Some(missed) = self.missed.get_mut(name) {
            *missed = Missed { since: now, revision: None };
        }
    }

    /// Takes a worker out for good: its heartbeats are answered with `renew` from now on.
    pub fn bury(&mut self, name: &WorkerName, now: Duration) -> Option<Worker> {
        self.touched.insert(name.clone());
        let left = self.workers.get(name).is_some_and(Worker::has_left);
        self.dead.entry(name.clone()).or_insert(Dead { at: now, left_ms: None, back: false, left });
        self.missed.remove(name);
        let worker = self.workers.remove(name);
        self.find_newest(&name.gpu_id);
        worker
    }

    /// A predecessor's verdict.
    pub fn was_buried(&mut self, name: &WorkerName, at_ms: u64, now: Duration) {
        self.bury(name, now);
        if let Some(dead) = self.dead.get_mut(name) {
            dead.left_ms = Some(at_ms);
        }
    }

    pub fn is_dead(&self, name: &WorkerName) -> bool {
        self.dead.contains_key(name)
    }

    /// Workers that died and have not been heard again, newest first. Of what a predecessor left not those whose GPU
    /// has a worker: they may have taken a new name long ago.
    pub fn dead(&self) -> Vec<WorkerName> {
        let counts = |name: &WorkerName, dead: &Dead| {
            !dead.back && !dead.left && (dead.left_ms.is_none() || !self.newest.contains_key(&name.gpu_id))
        };
        let dead = self.dead.iter().filter(|(name, dead)| counts(name, dead));
        let mut dead: Vec<_> = dead.map(|(name, d)| (d.left_ms.is_none(), d.at, d.left_ms, name)).collect();
        dead.sort_by(|a, b| b.cmp(a));
        dead.into_iter().map(|(.., name)| name.clone()).collect()
    }

    /// A round trip of the dispatcher itself came to its end. While none is answered, silence proves nothing; and shortly
    /// after the link comes back heartbeats are late, not missing.
    pub fn round_trip(&mut self, trip: RoundTrip, now: Duration, config: &DispatcherConfig) {
        self.link.round_trip(trip, now, config);
    }

    /// Whether silence means anything now.
    pub fn may_judge(&self, now: Duration) -> bool {
        self.link.held(now).is_none()
    }

    /// The dispatcher's own link is in doubt: that nobody is heard says nothing.
    pub fn deaf(&self, now: Duration) -> bool {
        self.link.in_doubt(now)
    }

    /// Why verdicts wait now, if they do.
    pub fn held(&self, now: Duration) -> Option<Why> {
        self.link.held(now).map(|(why, _)| why)
    }

    /// What has changed about that since the last call.
    pub fn hold_news(&mut self, now: Duration) -> Option<HoldNews> {
        self.link.news(now)
    }

    pub fn health(&self, name: &WorkerName, now: Duration, config: &DispatcherConfig) -> WorkerHealth {
        match self.workers.get(name) {
            Some(worker) => worker.health(now, config),
            None if self.dead.contains_key(name) => WorkerHealth::Dead,
            None => WorkerHealth::Unknown,
        }
    }

    /// What the health of every worker has come to since the last call, with reasons.
    pub fn news(&mut self, now: Duration, config: &DispatcherConfig) -> Vec<(WorkerName, What, String)> {
        let news = self.workers.iter_mut().filter_map(|(name, worker)| {
            let (what, why) = worker.news(now, config)?;
            Some((name.clone(), what, why))
        });
        let mut news: Vec<_> = news.collect();
        news.sort_by(|a, b| a.0.cmp(&b.0));
        news
    }

    /// The same for one of them.
    pub fn news_of(&mut self, name: &WorkerName, now: Duration, config: &DispatcherConfig) -> Option<(What, String)> {
        self.workers.get_mut(name)?.news(now, config)
    }

    /// Workers to declare dead now: silent for long enough as far as the dispatcher's own link proves it.
    pub fn verdicts(&mut self, now: Duration, config: &DispatcherConfig) -> Vec<WorkerName> {
        // How often somebody beats who has not been heard is not known.
        let usual = Patience::with(0, config);
        let signs = || {
            let heard = self.workers.iter().map(|(name, w)| (name, w.heard.max(w.elsewhere), w.patience(config)));
            heard.chain(self.missed.iter().map(|(name, m)| (name, m.since, usual)))
        };
        // Whoever said that it goes says nothing about the link by going.
        let gone = |name: &WorkerName| self.workers.get(name).is_some_and(Worker::has_left);
        let quiet = signs().filter(|(_, sign, patience)| now.saturating_sub(*sign) >= patience.suspect_after);
        let silent = quiet.filter(|(name, ..)| !gone(name)).count();
        let all = self.workers.len() + self.missed.len();
        self.link.silent(silent, all, now, config);
        if self.link.in_doubt(now) {
            return Vec::new();
        }
        let longer = self.link.longer(now, config);
        let dead =
            signs().filter(|(_, sign, patience)| self.link.proven_silence(*sign) >= patience.dead_after + longer);
        let mut dead: Vec<WorkerName> = dead.map(|(name, ..)| name.clone()).collect();
        dead.sort();
        dead
    }

    /// GPUs of workers that this dispatcher has heard and found dead.
    pub fn condemned(&self) -> impl Iterator<Item = &GpuId> {
        self.dead.iter().filter(|(_, dead)| dead.left_ms.is_none()).map(|(name, _)| &name.gpu_id)
    }

    /// Forgets verdicts older than `keep`; names are never used twice, so only a very late zombie could come back, and
    /// its verdict stands in the bucket.
    pub fn forget_dead(&mut self, now: Duration, keep: Duration) {
        self.dead.retain(|_, dead| now.saturating_sub(dead.at) < keep);
    }

    pub fn status(&self, now: Duration, config: &DispatcherConfig) -> Vec<WorkerStatus> {
        let mut rows: Vec<_> = self
            .workers
            .values()
            .map(|w| WorkerStatus {
                health: w.health(now, config),
                ms_since_heartbeat: w.silent(now).as_millis() as u64,
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

fn held_by(heartbeat: &Heartbeat, kind: Kind) -> HashSet<StreamId> {
    heartbeat.held.iter().filter(|h| h.kind == kind).map(|h| h.id.clone()).collect()
}

/// Whether there is something in a heartbeat that decisions need not wait a second for.
fn changed(before: &Heartbeat, after: &Heartbeat) -> bool {
    fn what(held: &Held) -> (Kind, &StreamId, u64, bool) {
        (held.kind, &held.id, held.epoch, held.elsewhere)
    }
    if before.draining != after.draining
        || before.engine.state != after.engine.state
        || before.engine.effective_device != after.engine.effective_device
        || before.device.trouble != after.device.trouble
        || before.device.pressure != after.device.pressure
        || before.held.len() != after.held.len()
        || before.given_up.len() != after.given_up.len()
    {
        return true;
    }
    // Mostly the same in the same order.
    if before.held.iter().map(what).eq(after.held.iter().map(what)) {
        return false;
    }
    let held: HashSet<_> = before.held.iter().map(what).collect();
    !after.held.iter().all(|h| held.contains(&what(h)))
}
