//! Workers come, change and go: heartbeats, admission, verdicts, their keys, and what is told of them.

use std::time::Duration;

use voxfleet_schema::{
    event::What,
    fleet::{Heartbeat, WorkerHealth},
    id::{Kind, StreamId, WorkerName},
    job::JobState,
    session::SessionState,
};

use super::{Admission, Burial, Core, Effect, NoteError, Recall};
use crate::{
    fleet::{Heard, HoldNews, RoundTrip},
    moment::Moment,
    routing::Duty,
};

/// Verdicts stand in the bucket for a day; memory need not keep them longer than a zombie's next heartbeat.
const REMEMBER_DEAD: Duration = Duration::from_secs(3_600);
/// How often each worker's last heartbeat is written to its key, for people and late joiners.
const NOTE_EVERY: Duration = Duration::from_secs(10);
/// Such writes at each tick: a fleet of a thousand takes turns instead of writing at once.
const NOTES: usize = 128;
/// The answer to a write of a worker's key is lost after this: longer than any takes with all its retries.
const WRITE_LOST: Duration = Duration::from_secs(30);

/// A key of `asr_fleet` as a predecessor left it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetKey {
    pub worker: WorkerName,
    pub revision: u64,
    /// Unix time in ms of its verdict.
    pub dead_ms: Option<u64>,
    /// Whether it has a GPU, by its last heartbeat.
    pub device: Option<bool>,
}

impl Core {
    /// Why something left this worker, in one word: what an operator counts failovers by.
    pub(super) fn why_moved(&self, from: &WorkerName) -> &'static str {
        match self.fleet.get(from) {
            _ if self.fleet.is_dead(from) => "dead",
            None => "gone",
            Some(worker) if worker.heartbeat.draining || worker.drain_until_ms.is_some() => "drained",
            Some(_) => "room",
        }
    }

    /// Takes over what the keys say of workers, at the start, after the sessions and jobs.
    pub fn recover_fleet(&mut self, keys: Vec<FleetKey>, now: Moment) {
        self.miss_owners();
        for key in keys {
            if let Some(device) = key.device {
                self.roster.remember(&key.worker.gpu_id, device);
            }
            match key.dead_ms {
                Some(at_ms) => self.fleet.was_buried(&key.worker, at_ms, now.mono),
                None => self.fleet.was_noted(&key.worker, key.revision),
            }
        }
    }

    pub fn heartbeat(&mut self, heartbeat: Heartbeat, now: Moment) {
        let name = heartbeat.worker();
        if let Some(recall) = self.burying.get(&name) {
            recall.set();
        }
        let free = |core: &Self| {
            core.fleet.get(&name).map_or(0, |w| w.heartbeat.job_slots.total.saturating_sub(w.jobs.used()))
        };
        let free_before = free(self);
        let restarts = self.fleet.get(&name).map(|w| w.heartbeat.engine.restarts);
        let heard = self.fleet.heard(heartbeat.clone(), now.mono);
        if free(self) > free_before {
            self.job_room();
        }
        match heard {
            Heard::Joined => {
                self.note_suspects(&heartbeat);
                self.recharge(&name);
                self.recharge_jobs(&name);
                self.admit(&name, now);
            }
            Heard::Known | Heard::Changed => {
                self.note_suspects(&heartbeat);
                self.refusals_end(&name, heartbeat.seq);
                self.reconcile_due |= heard == Heard::Changed;
                if restarts.is_some_and(|before| before < heartbeat.engine.restarts) {
                    self.preload_after_restart(&name, now);
                }
            }
            Heard::Dead { first } => {
                if first {
                    tracing::info!(gpu = %name.gpu_id, incarnation = %name.incarnation, "a dead incarnation beats");
                    self.fleet_event(&name, What::Renewed, now, serde_json::json!({ "why": "it was declared dead" }));
                }
                self.effect(Effect::Renew { worker: name });
                return;
            }
            Heard::Stale => return,
        }
        if let Some((what, why)) = self.fleet.news_of(&name, now.mono, &self.config) {
            self.tell_health(&name, what, &why, now);
        }
    }

    /// What crashed its engine, as its owner says: whoever gets it next is told.
    fn note_suspects(&mut self, heartbeat: &Heartbeat) {
        let name = heartbeat.worker();
        for held in &heartbeat.held {
            match held.kind {
                Kind::Session => {
                    if let Some(session) = self.book.session_mut(&held.id)
                        && session.state() == SessionState::Assigned
                        && session.record.epoch == held.epoch
                        && session.record.worker.as_ref() == Some(&name)
                    {
                        (session.record.suspect, session.record.crashes) = (held.suspect, held.crashes);
                        session.record.suspect_from = held.suspect_from;
                    }
                }
                Kind::Job => self.note_suspect_job(held, &name),
                Kind::Unknown => {}
            }
        }
    }

    /// Sessions that were given to a worker before it was heard here.
    fn recharge(&mut self, name: &WorkerName) {
        let ids: Vec<StreamId> = self
            .book
            .sessions()
            .filter(|(_, s)| s.state() == SessionState::Assigned && s.record.worker.as_ref() == Some(name))
            .map(|(id, _)| id.clone())
            .collect();
        for id in ids {
            self.charge_from_record(&id);
        }
    }

    /// A new incarnation's consumers were made, or may not be.
    pub fn admitted(&mut self, worker: &WorkerName, admission: Admission, now: Moment) {
        self.key_writes.remove(worker);
        match admission {
            Admission::Ready { revision, drain_until_ms } => {
                let Some(known) = self.fleet.get_mut(worker) else {
                    return;
                };
                known.revision = Some(revision);
                // A wish that came meanwhile is still to be written.
                known.noted = known.noted.map(|_| now.mono);
                known.drain_until_ms = known.drain_until_ms.or(drain_until_ms);
                let joins = !std::mem::replace(&mut known.ready, true);
                let detail = serde_json::json!({
                    "host": known.heartbeat.host, "slots": known.heartbeat.slots.total,
                    "device": known.heartbeat.device.name,
                });
                if joins {
                    self.warn_of_nobody(worker);
                    tracing::info!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, "worker joined");
                    self.fleet_event(worker, What::Joined, now, detail);
                    self.prewarm(worker, now);
                }
                self.place_due = true;
                self.reconcile_due = true;
                self.job_room();
            }
            Admission::Dead => {
                tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, "a verdict stands, told to renew");
                self.fleet.bury(worker, now.mono);
                self.forget_asking(worker);
                self.reconcile_due = true;
                self.effect(Effect::Renew { worker: worker.clone() });
            }
            Admission::Failed(error) => {
                tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, error, "worker not admitted, trying again");
                self.readmit.insert(worker.clone());
            }
        }
    }

    /// A verdict was written, or not.
    pub fn buried(&mut self, worker: &WorkerName, burial: Burial, now: Moment) {
        self.key_writes.remove(worker);
        self.burying.remove(worker);
        match burial {
            Burial::Written | Burial::Stood => {}
            Burial::Recalled => {
                return tracing::info!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, "heard again, no verdict");
            }
            Burial::Fenced => {
                tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, "somebody has admitted it meanwhile, no verdict");
                self.fleet.heard_elsewhere(worker, now.mono);
                if self.fleet.get(worker).is_some() {
                    self.readmit.insert(worker.clone());
                }
                return;
            }
            Burial::Failed(error) => {
                // Still silent at the next look: then again.
                return tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, error, "verdict not written");
            }
        }
        let silent_ms = self.fleet.get(worker).map(|w| w.silent(now.mono).as_millis() as u64);
        let left = self.fleet.get(worker).filter(|w| w.has_left());
        let why =
            left.map(|w| w.heartbeat.drain.as_ref().map_or_else(|| "asked".to_owned(), |notice| notice.why.clone()));
        match &why {
            Some(why) => {
                tracing::info!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, why, "worker has left");
            }
            None => {
                tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, silent_ms, "worker is dead");
            }
        }
        self.fleet.bury(worker, now.mono);
        self.forget_asking(worker);
        if burial == Burial::Written {
            match why {
                Some(why) => self.fleet_event(worker, What::Ended, now, serde_json::json!({ "why": why })),
                None => self.fleet_event(worker, What::Dead, now, serde_json::json!({ "silent_ms": silent_ms })),
            }
        }
        self.effect(Effect::RemoveConsumers { worker: worker.clone() });
        self.reconcile(now);
        self.reconcile_jobs(now);
    }

    /// Consumers that exist on the server: those of dead incarnations go, missing ones are made again. One that nobody has
    /// heard is missed like an owner, so that its verdict comes before anything of it is deleted.
    pub fn consumers(&mut self, complete: &[WorkerName], partial: &[WorkerName], now: Moment) {
        for worker in complete.iter().chain(partial) {
            if self.fleet.is_dead(worker) {
                self.effect(Effect::RemoveConsumers { worker: worker.clone() });
            } else {
                self.fleet.miss(worker, Duration::ZERO);
            }
        }
        let missing = self.fleet.workers().filter(|(name, w)| w.ready && !complete.contains(name));
        let missing: Vec<WorkerName> = missing.map(|(name, _)| name.clone()).collect();
        for worker in missing {
            self.admit(&worker, now);
        }
    }

    /// Whether the audio stream answered a probe just now.
    pub fn probed(&mut self, stream: bool, now: Moment) {
        self.clock.probe(now.mono, stream);
    }

    /// The server answered, or did not.
    pub fn round_trip(&mut self, trip: RoundTrip, now: Moment) {
        self.fleet.round_trip(trip, now.mono, &self.config);
    }

    /// Whether a worker's key may be written now. One write at a time: of two over the same revision one would take the
    /// other for somebody else's, and a verdict would wait for three more heartbeats.
    fn may_write(&mut self, worker: &WorkerName, now: Moment) -> bool {
        let free = self.key_writes.get(worker).is_none_or(|since| now.since(*since) >= WRITE_LOST);
        if free {
            self.key_writes.insert(worker.clone(), now.mono);
        }
        free
    }

    /// Makes what a worker needs, now or when its key is not being written.
    fn admit(&mut self, worker: &WorkerName, now: Moment) {
        let Some(known) = self.fleet.get(worker) else {
            return;
        };
        let heartbeat = Box::new(known.heartbeat.clone());
        if self.may_write(worker, now) {
            self.effect(Effect::Admit { heartbeat });
        } else {
            self.readmit.insert(worker.clone());
        }
    }

    /// A heartbeat was written to its key, or not.
    pub fn noted(&mut self, worker: &WorkerName, result: Result<u64, NoteError>) {
        self.key_writes.remove(worker);
        match result {
            Ok(revision) => {
                if let Some(known) = self.fleet.get_mut(worker) {
                    known.revision = Some(revision);
                }
            }
            // Another dispatcher's writing, or a verdict: admission reads which.
            Err(NoteError::Conflict) => {
                self.readmit.insert(worker.clone());
            }
            Err(NoteError::Failed(error)) => {
                // It may have been written: then the next one conflicts.
                tracing::debug!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, error, "heartbeat not noted");
            }
        }
    }

    /// A worker that the fleet map knows nothing of would stand idle without a word.
    fn warn_of_nobody(&self, worker: &WorkerName) {
        let cpu = self.fleet.get(worker).is_some_and(|w| w.heartbeat.device.index.is_none());
        if self.map.duty(&self.roles, &worker.gpu_id, cpu) == Duty::Nobody {
            tracing::warn!(gpu = %worker.gpu_id, "no service of dispatcher.services names this GPU, it gets no work");
        }
    }

    /// Verdicts, more often than everything else is looked at: each look that comes late is audio that nobody hears.
    pub fn judge(&mut self, now: Moment) {
        let silent = self.fleet.verdicts(now.mono, &self.config);
        match self.fleet.hold_news(now.mono) {
            Some(HoldNews::Held { why, until }) => {
                let for_ms = until.map(|until| until.saturating_sub(now.mono).as_millis() as u64);
                tracing::info!(why = why.as_str(), for_ms, "verdicts wait");
            }
            Some(HoldNews::Over { since }) => {
                let waited_ms = now.since(since).as_millis() as u64;
                tracing::info!(waited_ms, silent = silent.len(), "verdicts wait no longer");
            }
            None => {}
        }
        for worker in silent {
            if self.may_write(&worker, now) {
                let heartbeat = self.fleet.get(&worker).map(|known| Box::new(known.heartbeat.clone()));
                let revision = self.fleet.revision(&worker);
                let recall = Recall::default();
                self.burying.insert(worker.clone(), recall.clone());
                self.effect(Effect::Bury { worker, heartbeat, revision, recall });
            }
        }
    }

    /// The part of the tick that is about workers.
    pub(super) fn tick_workers(&mut self, now: Moment) {
        self.fleet.forget_dead(now.mono, REMEMBER_DEAD);
        self.miss_owners();
        self.key_writes.retain(|_, since| now.since(*since) < WRITE_LOST);
        self.judge(now);
        for worker in std::mem::take(&mut self.readmit) {
            self.admit(&worker, now);
        }
        for (worker, what, why) in self.fleet.news(now.mono, &self.config) {
            self.tell_health(&worker, what, &why, now);
        }
        self.note_heartbeats(now);
        self.drain_again(now);
    }

    /// Owners that have not been heard count like others that fell silent: since this dispatcher listens.
    fn miss_owners(&mut self) {
        let sessions = self.book.sessions().filter(|(_, s)| s.state() == SessionState::Assigned);
        let sessions = sessions.filter_map(|(_, s)| s.record.worker.as_ref());
        let jobs = self.jobs.jobs().filter(|job| job.state() == JobState::Assigned);
        for worker in sessions.chain(jobs.filter_map(|job| job.record.worker.as_ref())) {
            self.fleet.miss(worker, Duration::ZERO);
        }
    }

    /// Writes down the last heartbeats of those whose turn it is. Not of the silent: what comes next to their keys is a
    /// heartbeat or a verdict.
    fn note_heartbeats(&mut self, now: Moment) {
        let due = |w: &crate::fleet::Worker| {
            let turn = w.noted.is_none_or(|noted| now.since(noted) >= NOTE_EVERY && w.heard > noted);
            turn && w.ready && w.revision.is_some() && w.silent(now.mono) < w.patience(&self.config).suspect_after
        };
        let mut turns: Vec<(Option<Duration>, WorkerName)> =
            self.fleet.workers().filter(|(_, w)| due(w)).map(|(name, w)| (w.noted, name.clone())).collect();
        turns.sort();
        for (_, worker) in turns.into_iter().take(NOTES) {
            self.note(&worker, now);
        }
    }

    /// Writes down the last heartbeat now, or as soon as the key is not being written.
    pub(super) fn note(&mut self, worker: &WorkerName, now: Moment) {
        let Some(revision) = self.fleet.get(worker).and_then(|known| known.revision) else {
            return;
        };
        let free = self.may_write(worker, now);
        let Some(known) = self.fleet.get_mut(worker) else {
            return;
        };
        known.noted = free.then_some(now.mono);
        if free {
            let heartbeat = Box::new(known.heartbeat.clone());
            let drain_until_ms = known.drain_until_ms;
            self.effect(Effect::Note { heartbeat, revision, drain_until_ms });
        }
    }

    fn tell_health(&mut self, worker: &WorkerName, what: What, why: &str, now: Moment) {
        let known = self.fleet.get(worker);
        let mut detail = serde_json::json!({ "why": why });
        if let Some(notice) = known.and_then(|w| w.heartbeat.drain.as_ref()).filter(|_| what == What::Draining) {
            detail["until_ms"] = notice.until_ms.into();
        }
        tracing::info!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, what = what.as_str(), why, "health of a worker");
        self.fleet_event(worker, what, now, detail);
        let health = self.fleet.health(worker, now.mono, &self.config);
        if matches!(health, WorkerHealth::Draining | WorkerHealth::Unhealthy | WorkerHealth::Alive) {
            self.reconcile_due = true;
        }
    }
}
