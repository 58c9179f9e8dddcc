//! Reconciliation of sessions: keys against heartbeats, and acting on the difference.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use voxfleet_schema::{
    fleet::WorkerHealth,
    id::{Kind, StreamId, WorkerName},
    session::{Priority, SessionState},
};

use super::{Core, Effect};
use crate::{
    moment::Moment,
    reconcile::{self, Action, Desired, FINISH_WITHIN, Holder, Owner},
};

/// Between two looks that heartbeats ask for: a thousand workers beat a thousand times a second.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Share of a worker's slots whose sessions move away at once: enough to be quick, few enough that the others of its fleet
/// open them one after another.
const MOVES_SHARE: u32 = 4;

impl Core {
    /// Looks at once where a heartbeat has shown something that need not wait for the tick.
    pub(super) fn settle_reconciliation(&mut self, now: Moment) {
        if self.reconcile_due && now.since(self.reconciled) >= LOOK_EVERY {
            self.reconcile(now);
            self.reconcile_jobs(now);
        }
    }

    /// Compares what the keys say with what workers hold, and acts on the difference.
    pub(super) fn reconcile(&mut self, now: Moment) {
        (self.reconcile_due, self.reconciled) = (false, now.mono);
        // First who stands in for whom: what a GPU leaves behind is not for a CPU while a reserve has room.
        self.refresh_roster();
        if self.map_due {
            self.look_at_map(now);
        }
        let mut holders: HashMap<&StreamId, Vec<Holder<'_>>> = HashMap::new();
        for (worker, known) in self.fleet.workers() {
            let health = known.health(now.mono, &self.config);
            for held in known.heartbeat.held.iter().filter(|h| h.kind == Kind::Session) {
                holders.entry(&held.id).or_default().push(Holder { worker, held, heard: known.heard, health });
            }
        }
        let mut actions: Vec<(StreamId, Action)> = Vec::new();
        let mut moves: BTreeMap<WorkerName, Vec<(Priority, StreamId)>> = BTreeMap::new();
        let mut arrived: Vec<StreamId> = Vec::new();
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
                match self.fleet.get(name) {
                    Some(w) => Some(Owner { health, heard: w.heard, drains: w.heartbeat.draining }),
                    None => {
                        (health == WorkerHealth::Dead).then_some(Owner { health, heard: Duration::ZERO, drains: false })
                    }
                }
            });
            let held = holders.get(id).map_or(&[][..], Vec::as_slice);
            // Its move is long over, which a predecessor did not get to write down.
            if session.displaced_from.is_some()
                && session.settled()
                && session.state() == SessionState::Assigned
                && held.iter().any(|h| desired.worker == Some(h.worker) && h.held.epoch == desired.epoch)
            {
                arrived.push(id.clone());
            }
            for action in reconcile::compare(desired, owner, held) {
                match (action, desired.worker) {
                    (Action::MoveIfRoom, Some(from)) => {
                        let priority = session.record.options.priority;
                        moves.entry(from.clone()).or_default().push((priority, id.clone()));
                    }
                    (action, _) => actions.push((id.clone(), action)),
                }
            }
        }
        let strangers: Vec<StreamId> =
            holders.keys().filter(|id| self.book.get(id).is_none()).map(|id| (*id).clone()).collect();
        for id in strangers {
            self.look_up(&id);
        }
        for id in arrived {
            if let Some(session) = self.book.session_mut(&id) {
                session.displaced_from = None;
            }
        }
        for (id, action) in actions {
            self.act(&id, action, now);
        }
        for (from, wanted) in moves {
            self.move_away(&from, wanted, now);
        }
    }

    fn act(&mut self, id: &StreamId, action: Action, now: Moment) {
        // An action before it may have set something going for the same session.
        let settled = self.book.session(id).is_some_and(|s| s.settled());
        tracing::debug!(session = %id, ?action, settled, "reconciling");
        match action {
            Action::Release { worker, epoch, finish } => {
                let finish_ms = if finish { FINISH_WITHIN.as_millis() as u32 } else { 0 };
                self.effect(Effect::Release { worker, id: id.clone(), epoch, finish_ms });
            }
            Action::CatchUp => self.effect(Effect::ReadChain { id: id.clone() }),
            Action::Resend if settled => {
                if let Some(session) = self.book.session_mut(id)
                    && session.told_epoch < session.record.epoch
                {
                    // Its worker never got it from a predecessor, who cannot have told how.
                    session.told_instead = None;
                }
                self.ask_worker(id, now);
            }
            Action::Raise { above } if settled => {
                if let Some(worker) = self.book.session(id).and_then(|s| s.record.worker.clone()) {
                    self.place_again(id, worker, above, now);
                }
            }
            Action::Adopt { worker, above } if settled => {
                tracing::info!(session = %id, gpu = %worker.gpu_id, "a waiting session stays with who works on it");
                self.place_again(id, worker, above, now);
            }
            Action::Displace if settled => {
                self.displaced(id);
                self.place_or_wait(id, now);
            }
            Action::MoveIfRoom if settled => {
                self.move_if_room(id, now);
            }
            Action::Resend | Action::Raise { .. } | Action::Adopt { .. } | Action::Displace | Action::MoveIfRoom => {}
        }
    }

    /// Moves sessions away from a worker that should not keep them, the most important first and a few at a time.
    fn move_away(&mut self, from: &WorkerName, mut wanted: Vec<(Priority, StreamId)>, now: Moment) {
        let slots = self.fleet.get(from).map_or(0, |w| w.heartbeat.slots.total);
        let most = (slots / MOVES_SHARE).max(1) as usize;
        let under_way = |core: &Self| {
            core.book.sessions().filter(|(_, s)| !s.settled() && s.displaced_from.as_ref() == Some(from)).count()
        };
        let mut moving = under_way(self);
        wanted.sort();
        for (_, id) in wanted {
            if moving >= most {
                return;
            }
            if self.book.session(&id).is_some_and(|s| s.settled()) && self.move_if_room(&id, now) {
                moving += 1;
            }
        }
    }

    /// False: nobody else has room, and it stays where it is.
    fn move_if_room(&mut self, id: &StreamId, now: Moment) -> bool {
        self.displaced(id);
        let owner = self.book.session(id).and_then(|session| session.record.worker.clone());
        if let Some(owner) =
            owner.filter(|owner| self.fleet.health(owner, now.mono, &self.config) == WorkerHealth::Alive)
        {
            // It is fit, and asks itself that it be somebody else.
            self.refused_by(id, &owner);
        }
        let moves = self.place(id, now).is_ok();
        if !moves && let Some(session) = self.book.session_mut(id) {
            session.displaced_from = None;
        }
        moves
    }

    pub(super) fn displaced(&mut self, id: &StreamId) {
        if let Some(session) = self.book.session_mut(id)
            && session.record.worker.is_some()
        {
            session.displaced_from = session.record.worker.clone();
        }
    }

    /// Time an old owner gets to store the final it has begun, when its session has moved.
    pub(super) fn finish_ms(&self, old: &WorkerName, suspect: bool, now: Moment) -> u32 {
        match self.fleet.health(old, now.mono, &self.config) {
            // What kills engines is not finished there.
            WorkerHealth::Alive if suspect => 0,
            WorkerHealth::Alive | WorkerHealth::Draining | WorkerHealth::Unhealthy => FINISH_WITHIN.as_millis() as u32,
            _ => 0,
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
            self.effect(Effect::Release { worker, id: id.clone(), epoch, finish_ms: 0 });
        }
    }
}
