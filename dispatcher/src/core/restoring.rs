//! Back to what was asked for: sessions on a smaller model, or on a CPU, once there has been room for a while. Jobs stay where
//! they are until their end.
//!
//! Only so many move as there is room, one at a time from each worker, and each by the way that every move takes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use voxfleet_schema::{
    device::Instead,
    fleet::WorkerHealth,
    id::{StreamId, WorkerName},
    session::{Policy, Priority, SessionState},
};

use super::{Core, instead::why_on_cpu};
use crate::{admission::Needs, moment::Moment, routing::is_cpu, sessions::Session};

/// How well a session is served, and could be elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Served {
    cpu: bool,
    smaller: bool,
}

impl Served {
    fn of(instead: Option<&Instead>) -> Self {
        Self { cpu: instead.is_some_and(|i| i.cpu), smaller: instead.is_some_and(|i| i.model.is_some()) }
    }

    /// A GPU comes before the model: nothing on a CPU is sure to keep up.
    fn is_better_than(self, other: Self) -> bool {
        (self.cpu, self.smaller) < (other.cpu, other.smaller)
    }
}

impl Core {
    pub(super) fn restore(&mut self, now: Moment) {
        self.refresh_roster();
        let after = Duration::from_millis(self.config.restore_after_ms);
        // What somebody with the same needs would get now, elsewhere.
        let mut found: HashMap<Needs, Option<Served>> = HashMap::new();
        let mut looked: Vec<(StreamId, bool)> = Vec::new();
        let mut due: BTreeMap<WorkerName, Vec<(Priority, StreamId)>> = BTreeMap::new();
        let mut moving: HashSet<WorkerName> = HashSet::new();
        for (id, session) in self.book.sessions() {
            if !session.settled() {
                moving.extend(session.record.worker.clone());
            }
            let Some((owner, served)) = self.served(session, now) else {
                if session.better_since.is_some() && session.settled() {
                    looked.push((id.clone(), false));
                }
                continue;
            };
            let elsewhere = *found.entry(self.needs(session)).or_insert_with(|| {
                let (pick, _) = self.decide(session, |_| None, now);
                pick.ok().map(|pick| Served::of(pick.instead.as_ref()))
            });
            let better = self.fits_there(session, owner, now) || elsewhere.is_some_and(|e| e.is_better_than(served));
            if better != session.better_since.is_some() {
                looked.push((id.clone(), better));
            }
            if better && now.since(session.better_since.unwrap_or(now.mono)) >= after {
                due.entry(owner.clone()).or_default().push((session.record.options.priority, id.clone()));
            }
        }
        for (id, better) in looked {
            if let Some(session) = self.book.session_mut(&id) {
                session.better_since = better.then_some(now.mono);
            }
        }
        for (owner, mut sessions) in due {
            if moving.contains(&owner) {
                continue;
            }
            sessions.sort();
            // The others look again when this one has moved.
            for (_, id) in sessions {
                if self.restore_one(&id, &owner, now) {
                    break;
                }
            }
        }
    }

    /// Who has it and how, if that is less than what was asked for and nothing else is under way for it.
    fn served<'a>(&self, session: &'a Session, now: Moment) -> Option<(&'a WorkerName, Served)> {
        let open = session.state() == SessionState::Assigned && session.settled() && !session.end_stands();
        let owner = session.record.worker.as_ref().filter(|_| open && !session.record.suspect)?;
        let worker = self.fleet.get(owner)?;
        if worker.health(now.mono, &self.config) != WorkerHealth::Alive {
            return None;
        }
        let mut served = Served::of(session.record.instead.as_ref());
        let asked_for_cpu = session.record.options.policy == Policy::ForceCpu;
        served.cpu |= worker.heartbeat.device.index.is_some() && is_cpu(&worker.heartbeat) && !asked_for_cpu;
        (served.cpu || served.smaller).then_some((owner, served))
    }

    /// Its own worker could run what was asked for.
    fn fits_there(&self, session: &Session, owner: &WorkerName, now: Moment) -> bool {
        let request = self.request_for(&session.record.options, true);
        session.record.instead.is_some() && self.roster.could_as_asked(&request, owner, now.mono)
    }

    /// False: there is no room any more.
    fn restore_one(&mut self, id: &StreamId, owner: &WorkerName, now: Moment) -> bool {
        self.refresh_roster();
        let Some(session) = self.book.session(id) else {
            return false;
        };
        let Some((_, served)) = self.served(session, now) else {
            return false;
        };
        let epoch = session.record.epoch;
        if self.fits_there(session, owner, now) {
            tracing::info!(session = %id, gpu = %owner.gpu_id, "there is room for what was asked for");
            self.place_again(id, owner.clone(), epoch, now);
            return true;
        }
        let (pick, _) = self.decide(session, |_| None, now);
        if !pick.is_ok_and(|pick| Served::of(pick.instead.as_ref()).is_better_than(served)) {
            return false;
        }
        tracing::info!(session = %id, gpu = %owner.gpu_id, "there is room elsewhere for what was asked for");
        // Its worker has told that it fell back; that this is over is told by whoever moves it.
        let asked = session.record.options.model.clone();
        let heartbeat = self.fleet.get(owner).map(|worker| &worker.heartbeat).filter(|_| served.cpu);
        let class = heartbeat.map(|heartbeat| why_on_cpu(heartbeat, asked.as_deref()));
        let left = class.map(|class| Instead { asked, model: None, cpu: true, class });
        self.displaced(id);
        let moves = self.place(id, now).is_ok();
        if let Some(session) = self.book.session_mut(id) {
            if moves {
                session.left = left;
            } else {
                session.displaced_from = None;
            }
        }
        moves
    }
}
