//! What time brings: heartbeats, verdicts, idle times, reconciliation.

use std::{collections::HashMap, time::Duration};

use voxfleet_schema::{
    event::What,
    fleet::{Heartbeat, WorkerHealth},
    id::{Kind, StreamId, WorkerName},
    session::SessionState,
};

use super::{Admission, Core, Effect, Mark, requests};
use crate::{
    fleet::Heard,
    idle::Due,
    moment::Moment,
    reconcile::{self, Action, Desired, Holder, Owner},
    sessions::{Known, Stage},
};

/// Verdicts stand in the bucket for a day; memory need not keep them longer than a zombie's next heartbeat.
const REMEMBER_DEAD: Duration = Duration::from_secs(3_600);
/// A read that was lost is asked for again.
const READ_AGAIN: Duration = Duration::from_secs(2);
const KEEP_CONTAINER: Duration = Duration::from_secs(300);
/// Going back reads again all that came since: not at each place that comes free.
const GO_BACK_EVERY: Duration = Duration::from_secs(10);

impl Core {
    pub fn heartbeat(&mut self, heartbeat: Heartbeat, now: Moment) {
        let name = heartbeat.worker();
        let free = |core: &Self| {
            core.fleet.get(&name).map_or(0, |w| w.heartbeat.job_slots.total.saturating_sub(w.jobs.used()))
        };
        let free_before = free(self);
        let heard = self.fleet.heard(heartbeat.clone(), now.mono);
        if free(self) > free_before {
            self.job_room();
        }
        match heard {
            Heard::Joined => {
                self.recharge(&name);
                self.recharge_jobs(&name);
                self.effect(Effect::Admit { heartbeat: Box::new(heartbeat) });
            }
            Heard::Known => self.place_due = true,
            Heard::Dead => self.effect(Effect::Renew { worker: name }),
            Heard::Stale => {}
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
        match admission {
            Admission::Ready => {
                let Some(known) = self.fleet.get(worker) else {
                    return;
                };
                let detail = serde_json::json!({
                    "host": known.heartbeat.host, "slots": known.heartbeat.slots.total,
                    "device": known.heartbeat.device.name,
                });
                if !known.ready {
                    tracing::info!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, "worker joined");
                    self.fleet_event(worker, What::Joined, now, detail);
                }
                self.fleet.set_ready(worker, true);
                self.place_due = true;
                self.job_room();
            }
            Admission::Dead => {
                self.fleet.bury(worker, now.mono);
                self.effect(Effect::Renew { worker: worker.clone() });
            }
            Admission::Failed(error) => {
                tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, error, "worker not admitted, trying again");
                self.readmit.insert(worker.clone());
            }
        }
    }

    /// A verdict was written, or not.
    pub fn buried(&mut self, worker: &WorkerName, written: Result<(), String>, now: Moment) {
        self.burying.remove(worker);
        if let Err(error) = written {
            // Still silent at the next look: then again.
            return tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, error, "verdict not written");
        }
        tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, "worker is dead");
        self.fleet.bury(worker, now.mono);
        self.fleet_event(worker, What::Dead, now, serde_json::json!({}));
        self.effect(Effect::RemoveConsumers { worker: worker.clone() });
        self.reconcile(now);
        self.reconcile_jobs(now);
    }

    /// Consumers that exist on the server: those of unknown or dead incarnations go, missing ones are made again.
    pub fn consumers(&mut self, complete: &[WorkerName], partial: &[WorkerName], now: Moment) {
        // A takeover has not heard everybody at once.
        let listening = now.mono > 2 * Duration::from_millis(self.config.dead_after_ms);
        for worker in complete.iter().chain(partial) {
            if listening && self.fleet.get(worker).is_none() {
                self.effect(Effect::RemoveConsumers { worker: worker.clone() });
            }
        }
        let missing: Vec<Heartbeat> = self
            .fleet
            .workers()
            .filter(|(name, w)| w.ready && !complete.contains(name))
            .map(|(_, w)| w.heartbeat.clone())
            .collect();
        for heartbeat in missing {
            self.effect(Effect::Admit { heartbeat: Box::new(heartbeat) });
        }
    }

    /// Whether the audio stream answered a probe just now, and the server a ping.
    pub fn probed(&mut self, stream: bool, server: bool, now: Moment) {
        self.clock.probe(now.mono, stream);
        if !server {
            // Shortly after the link comes back heartbeats are late, not missing.
            self.fleet.hold_verdicts(now.mono + Duration::from_millis(self.config.dead_after_ms));
        }
    }

    /// The pace at which everything is looked at.
    pub fn tick(&mut self, now: Moment) {
        self.fleet.forget_dead(now.mono, REMEMBER_DEAD);
        for worker in self.fleet.verdicts(now.mono, &self.config) {
            if let Some(known) = self.fleet.get(&worker)
                && self.burying.insert(worker)
            {
                let heartbeat = Box::new(known.heartbeat.clone());
                self.effect(Effect::Bury { heartbeat });
            }
        }
        for worker in std::mem::take(&mut self.readmit) {
            if let Some(known) = self.fleet.get(&worker) {
                let heartbeat = Box::new(known.heartbeat.clone());
                self.effect(Effect::Admit { heartbeat });
            }
        }
        self.look_at_sessions(now);
        self.look_at_expiry(now);
        self.reconcile(now);
        self.place_waiting(now);
        self.tick_jobs(now);
    }

    /// After each batch of inputs: what came free goes to those who wait.
    pub fn settle(&mut self, now: Moment) {
        if self.place_due {
            self.place_waiting(now);
        }
        self.settle_jobs(now);
    }

    fn look_at_sessions(&mut self, now: Moment) {
        let idle_now = self.idle_now(now);
        let flush_after = Duration::from_millis(self.config.flush_after_ms);
        let crowded = self.book.len() >= self.config.max_sessions;
        let keep = if crowded { Duration::ZERO } else { requests::keep_ended(&self.config) };
        let mut due = Vec::new();
        let mut ends = Vec::new();
        let mut walks = Vec::new();
        let mut loads = Vec::new();
        let mut later = Vec::new();
        let mut forget = Vec::new();
        for (id, known) in self.book.iter() {
            let session = match known {
                Known::Session(session) => session,
                Known::Loading(loading) => {
                    if loading.retry_at.is_some_and(|at| now.mono >= at) {
                        loads.push(id.clone());
                    }
                    continue;
                }
                Known::Container { at, .. } => {
                    if crowded || now.since(*at) >= KEEP_CONTAINER {
                        forget.push(id.clone());
                    }
                    continue;
                }
            };
            if matches!(session.stage, Stage::Reading(_)) && now.since(session.since) >= READ_AGAIN {
                loads.push(id.clone());
            }
            if !session.later.is_empty() {
                later.push(id.clone());
            }
            if session.state() == SessionState::Ended {
                let behind = session.record.ended_seq.unwrap_or(0);
                let read = session.walker.as_ref().map_or(behind + 1, |w| w.next_seq());
                if session.settled() && session.last_audio.is_some_and(|seq| seq > behind && seq >= read) {
                    walks.push(id.clone());
                } else if session.settled() && now.since(session.since) >= keep && session.later.is_empty() {
                    forget.push(id.clone());
                }
                continue;
            }
            if session.settled() && session.end_stands() {
                ends.push(id.clone());
                continue;
            }
            let timeout = Duration::from_secs(u64::from(session.record.options.idle_timeout_s));
            let placed = session.state() == SessionState::Assigned;
            match session.idle.due(idle_now, flush_after, timeout, !session.end_stands(), placed) {
                Due::Nothing => {}
                Due::Flush => due.push((id.clone(), Mark::Pause)),
                Due::End => due.push((id.clone(), Mark::Idle)),
            }
        }
        for id in forget {
            self.book.remove(&id);
        }
        let max = self.config.max_sessions;
        let room = self.book.len() < max && self.book.len() <= max - max / 10;
        if room
            && now.since(self.went_back) >= GO_BACK_EVERY
            && let Some(from) = self.book.go_back()
        {
            self.went_back = now.mono;
            self.effect(Effect::GoBack { from });
        }
        for id in loads {
            match self.book.get_mut(&id) {
                Some(Known::Loading(loading)) => loading.retry_at = None,
                Some(Known::Session(session)) => session.since = now.mono,
                Some(Known::Container { .. }) | None => continue,
            }
            self.effect(Effect::Load { id });
        }
        for id in ends {
            self.check_end(&id, now);
        }
        for id in walks {
            self.look_behind_end(&id, now);
        }
        for id in later {
            self.asks_later(&id, now);
        }
        for (id, mark) in due {
            self.append_due(&id, mark, now);
        }
    }

    /// Compares what the keys say with what workers hold, and acts on the difference.
    fn reconcile(&mut self, now: Moment) {
        let dead_after = Duration::from_millis(self.config.dead_after_ms);
        let mut holders: HashMap<&StreamId, Vec<Holder<'_>>> = HashMap::new();
        for (worker, known) in self.fleet.workers() {
            for held in known.heartbeat.held.iter().filter(|h| h.kind == Kind::Session) {
                holders.entry(&held.id).or_default().push(Holder { worker, held, heard: known.heard });
            }
        }
        let mut actions: Vec<(StreamId, Action)> = Vec::new();
        for (id, session) in self.book.sessions() {
            let desired = Desired {
                state: session.state(),
                epoch: session.record.epoch,
                worker: session.record.worker.as_ref(),
                settled_since: session.settled().then_some(session.since),
                final_index: session.chain.map(|c| c.index),
            };
            let owner = session.record.worker.as_ref().and_then(|name| {
                let health = self.fleet.health(name, now.mono, &self.config);
                let heard = self.fleet.get(name).map(|w| w.heard);
                heard
                    .map(|heard| Owner { health, heard })
                    .or((health == WorkerHealth::Dead).then_some(Owner { health, heard: Duration::ZERO }))
            });
            let held = holders.get(id).map_or(&[][..], Vec::as_slice);
            let found = reconcile::compare(desired, owner, held, now.mono, dead_after);
            actions.extend(found.into_iter().map(|action| (id.clone(), action)));
        }
        let strangers: Vec<StreamId> =
            holders.keys().filter(|id| self.book.get(id).is_none()).map(|id| (*id).clone()).collect();
        for id in strangers {
            self.look_up(&id);
        }
        for (id, action) in actions {
            self.act(&id, action, now);
        }
    }

    fn act(&mut self, id: &StreamId, action: Action, now: Moment) {
        // An action before it may have set something going for the same session.
        let settled = self.book.session(id).is_some_and(|s| s.settled());
        tracing::debug!(session = %id, ?action, settled, "reconciling");
        match action {
            Action::Release { worker, epoch } => self.effect(Effect::Release { worker, id: id.clone(), epoch }),
            Action::CatchUp => self.effect(Effect::ReadChain { id: id.clone() }),
            Action::Resend if settled => self.ask_worker(id, now),
            Action::Raise { above } if settled => {
                if let Some(worker) = self.book.session(id).and_then(|s| s.record.worker.clone()) {
                    self.place_again(id, worker, above, now);
                }
            }
            Action::Displace if settled => {
                self.displaced(id);
                self.place_or_wait(id, now);
            }
            Action::MoveIfRoom if settled => {
                self.displaced(id);
                if self.place(id, now).is_err()
                    && let Some(session) = self.book.session_mut(id)
                {
                    session.displaced_from = None;
                }
            }
            Action::Resend | Action::Raise { .. } | Action::Displace | Action::MoveIfRoom => {}
        }
    }

    fn displaced(&mut self, id: &StreamId) {
        if let Some(session) = self.book.session_mut(id) {
            session.displaced_from = session.record.worker.clone();
        }
    }

    /// Nobody knows the session: whoever holds it lets go.
    pub(super) fn release_holders(&mut self, id: &StreamId) {
        let holders: Vec<(WorkerName, u64)> = self
            .fleet
            .workers()
            .flat_map(|(name, w)| w.heartbeat.held.iter().map(move |h| (name, h)))
            .filter(|(_, h)| h.kind == Kind::Session && h.id == *id)
            .map(|(name, h)| (name.clone(), h.epoch))
            .collect();
        for (worker, epoch) in holders {
            self.effect(Effect::Release { worker, id: id.clone(), epoch });
        }
    }
}
