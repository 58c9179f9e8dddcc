//! What this worker holds, and what it answers to assignments and releases.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::{DrainNotice, GivenUp, Held, Slots},
    id::{Kind, StreamId},
};

use crate::{
    capacity::locked,
    session::{Handle, WaitingHint},
};

/// A session that failed here is not taken again for this long: the dispatcher asks each second.
const REFUSE_AFTER_FAILURE: Duration = Duration::from_secs(10);
/// Failures remembered at most.
const MAX_FAILURES: usize = 256;
/// How long heartbeats say that a job was given up: the dispatcher, or its successor, hears it long before.
const TELL_GIVEN_UP: Duration = Duration::from_secs(60);
/// Told at most; older ones were heard.
const MAX_GIVEN_UP: usize = 64;

/// What an assignment meets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Situation<'a> {
    /// Epoch under which it is held already.
    pub(super) held_epoch: Option<u64>,
    pub(super) free_slots: u32,
    pub(super) draining: bool,
    pub(super) engine: EngineIs,
    pub(super) model_known: bool,
    /// It failed here a moment ago.
    pub(super) failure: Option<&'a Failure>,
    /// Why nothing that its policy allows can be run for it here.
    pub(super) no_footing: Option<&'a Failure>,
}

/// What the caller knows.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) engine: EngineIs,
    pub(super) model_known: bool,
    pub(super) no_footing: Option<Failure>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Decision {
    /// Held under this epoch: nothing to do.
    Held,
    /// Held under a lower epoch: go on under this one.
    Raise,
    Start,
    Refuse(Failure),
}

/// The engine, as somebody new would find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EngineIs {
    Able,
    /// It has work and does not move.
    Stalled,
    /// It cannot be started.
    Failed,
}

/// Decides about an assignment at `epoch`.
pub(super) fn decide(epoch: u64, situation: Situation<'_>) -> Decision {
    let refuse = |class, text: &str| Decision::Refuse(Failure::new(class, text));
    match situation.held_epoch {
        Some(held) if held == epoch => return Decision::Held,
        Some(held) if held > epoch => {
            return refuse(FailureClass::BadRequest, &format!("stale epoch {epoch}, held under {held}"));
        }
        _ => {}
    }
    if let Some(failure) = situation.failure {
        return Decision::Refuse(failure.clone());
    }
    if !situation.model_known {
        return refuse(FailureClass::ModelMissing, "the model is not on this worker");
    }
    if situation.engine == EngineIs::Failed {
        return refuse(FailureClass::EngineCrash, "the engine cannot be started");
    }
    if let Some(failure) = situation.no_footing {
        return Decision::Refuse(failure.clone());
    }
    if situation.draining {
        return refuse(FailureClass::NoCapacity, "the worker is draining");
    }
    if situation.held_epoch.is_some() {
        return Decision::Raise;
    }
    if situation.engine == EngineIs::Stalled {
        return refuse(FailureClass::NoCapacity, "the engine stands still");
    }
    if situation.free_slots == 0 {
        return refuse(FailureClass::NoCapacity, "every slot is taken");
    }
    Decision::Start
}

type Key = (Kind, StreamId);

#[derive(Debug, Default)]
struct Inner {
    sessions: BTreeMap<Key, Arc<Handle>>,
    failures: HashMap<Key, (Instant, Failure)>,
    given_up: VecDeque<(Instant, GivenUp)>,
    drain: Option<DrainNotice>,
}

impl Inner {
    fn used(&self, kind: Kind) -> u32 {
        self.sessions.keys().filter(|(k, _)| *k == kind).count() as u32
    }
}

/// What a heartbeat says of them.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) slots: Slots,
    pub(crate) job_slots: Slots,
    pub(crate) held: Vec<Held>,
    pub(crate) given_up: Vec<GivenUp>,
    pub(crate) drain: Option<DrainNotice>,
}

/// Sessions and jobs held, by name. Read by heartbeat and pulls, changed by control; locked for moments only.
#[derive(Debug)]
pub(crate) struct Holdings {
    slots: u32,
    job_slots: u32,
    inner: Mutex<Inner>,
    /// Something changed that the dispatcher should hear of at once.
    news: Arc<Notify>,
}

impl Holdings {
    pub(super) fn new(slots: u32, job_slots: u32, news: Arc<Notify>) -> Self {
        Self { slots, job_slots, inner: Mutex::default(), news }
    }

    pub(crate) fn snapshot(&self, now: Instant) -> Snapshot {
        let mut inner = locked(&self.inner);
        inner.given_up.retain(|(at, _)| now.saturating_duration_since(*at) < TELL_GIVEN_UP);
        Snapshot {
            slots: Slots { total: self.slots, used: inner.used(Kind::Session) },
            job_slots: Slots { total: self.job_slots, used: inner.used(Kind::Job) },
            held: inner.sessions.values().map(|handle| handle.held()).collect(),
            given_up: inner.given_up.iter().map(|(_, given_up)| given_up.clone()).collect(),
            drain: inner.drain.clone(),
        }
    }

    fn slots(&self, kind: Kind) -> u32 {
        if kind == Kind::Job { self.job_slots } else { self.slots }
    }

    /// Jobs that may be taken now.
    pub(super) fn free_job_slots(&self) -> usize {
        let inner = locked(&self.inner);
        if inner.drain.is_some() { 0 } else { self.job_slots.saturating_sub(inner.used(Kind::Job)) as usize }
    }

    /// Takes nothing new from now on, and says so.
    pub(super) fn set_draining(&self, notice: DrainNotice) {
        locked(&self.inner).drain = Some(notice);
        self.news.notify_one();
    }

    /// Worth a heartbeat of its own: what waits for this worker to be empty, or for a session it lets go, waits no second more.
    fn less(&self, inner: &Inner) {
        if inner.drain.is_some() || inner.sessions.is_empty() {
            self.news.notify_one();
        }
    }

    pub(super) fn get(&self, kind: Kind, id: &StreamId) -> Option<Arc<Handle>> {
        locked(&self.inner).sessions.get(&(kind, id.clone())).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Handle>> {
        locked(&self.inner).sessions.values().cloned().collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        locked(&self.inner).sessions.is_empty()
    }

    /// Decides.
    pub(super) fn consider(&self, kind: Kind, id: &StreamId, epoch: u64, offer: &Offer, now: Instant) -> Decision {
        let mut inner = locked(&self.inner);
        inner.failures.retain(|_, (at, _)| now.saturating_duration_since(*at) < REFUSE_AFTER_FAILURE);
        let key = (kind, id.clone());
        let situation = Situation {
            held_epoch: inner.sessions.get(&key).map(|handle| handle.epoch()),
            free_slots: self.slots(kind).saturating_sub(inner.used(kind)),
            draining: inner.drain.is_some(),
            engine: offer.engine,
            model_known: offer.model_known,
            no_footing: offer.no_footing.as_ref(),
            failure: inner.failures.get(&key).map(|(_, failure)| failure),
        };
        decide(epoch, situation)
    }

    pub(super) fn put(&self, handle: Arc<Handle>) {
        let key = (handle.names.kind, handle.names.id.clone());
        let mut inner = locked(&self.inner);
        inner.given_up.retain(|(_, given_up)| (given_up.kind, &given_up.id) != (key.0, &key.1));
        inner.sessions.insert(key, handle);
    }

    /// Says in the next heartbeats that a job was let go without an end.
    pub(super) fn give_up(&self, given_up: GivenUp, now: Instant) {
        let mut inner = locked(&self.inner);
        if inner.given_up.len() == MAX_GIVEN_UP {
            inner.given_up.pop_front();
        }
        inner.given_up.push_back((now, given_up));
        self.news.notify_one();
    }

    /// Forgets a session whose task has ended, unless its name is held by a newer one.
    pub(super) fn ended(&self, handle: &Arc<Handle>, failure: Option<Failure>, now: Instant) {
        let key = (handle.names.kind, handle.names.id.clone());
        let mut inner = locked(&self.inner);
        if inner.sessions.get(&key).is_some_and(|held| Arc::ptr_eq(held, handle)) {
            inner.sessions.remove(&key);
            self.less(&inner);
        }
        if let Some(failure) = failure
            && inner.failures.len() < MAX_FAILURES
        {
            inner.failures.insert(key, (now, failure));
        }
    }

    /// Takes a session out at once; its task ends by itself.
    pub(super) fn remove(&self, kind: Kind, id: &StreamId) {
        let mut inner = locked(&self.inner);
        if inner.sessions.remove(&(kind, id.clone())).is_some() {
            self.less(&inner);
        }
    }

    /// Gives a hint to its session; one for a session not held here is dropped.
    pub(crate) fn hint(&self, hint: WaitingHint) {
        match self.get(Kind::Session, &hint.hint.id) {
            Some(handle) => handle.hints.put(hint),
            None => tracing::trace!(session = %hint.hint.id, "hint for a session not held"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Situation<'static> = Situation {
        held_epoch: None,
        free_slots: 1,
        draining: false,
        engine: EngineIs::Able,
        model_known: true,
        failure: None,
        no_footing: None,
    };

    #[test]
    fn assignments_are_idempotent_and_refusals_typed() {
        let failed = Failure::new(FailureClass::OutOfMemory, "no");
        let full = Situation { free_slots: 0, ..FREE };
        let held = |epoch| Situation { held_epoch: Some(epoch), ..full };
        let class = |situation| match decide(5, situation) {
            Decision::Refuse(failure) => failure.class,
            other => panic!("{other:?}"),
        };
        assert_eq!(decide(5, FREE), Decision::Start);
        assert_eq!(decide(5, held(5)), Decision::Held);
        assert_eq!(decide(5, held(4)), Decision::Raise, "a slot it has already");
        assert_eq!(class(held(6)), FailureClass::BadRequest);
        assert_eq!(class(full), FailureClass::NoCapacity);
        assert_eq!(class(Situation { draining: true, ..FREE }), FailureClass::NoCapacity);
        assert_eq!(class(Situation { draining: true, ..held(4) }), FailureClass::NoCapacity);
        assert_eq!(class(Situation { engine: EngineIs::Failed, ..FREE }), FailureClass::EngineCrash);
        let stalled = Situation { engine: EngineIs::Stalled, ..FREE };
        assert_eq!(class(stalled), FailureClass::NoCapacity);
        assert_eq!(decide(5, Situation { engine: EngineIs::Stalled, ..held(4) }), Decision::Raise, "it has it already");
        assert_eq!(class(Situation { model_known: false, ..FREE }), FailureClass::ModelMissing);
        assert_eq!(class(Situation { failure: Some(&failed), ..FREE }), FailureClass::OutOfMemory);
        assert_eq!(class(Situation { no_footing: Some(&failed), ..FREE }), FailureClass::OutOfMemory);
        assert_eq!(class(Situation { no_footing: Some(&failed), ..held(4) }), FailureClass::OutOfMemory);
        assert_eq!(decide(5, Situation { draining: true, ..held(5) }), Decision::Held);
    }

    fn handle(kind: Kind, id: &str) -> Arc<Handle> {
        let names = crate::session::Names {
            kind,
            id: StreamId::new(id).expect("id"),
            gpu_id: voxfleet_schema::id::GpuId::new("g").expect("id"),
        };
        Arc::new(Handle::new(names, 1, Default::default(), None))
    }

    #[test]
    fn jobs_and_sessions_take_no_slots_from_each_other() {
        let holdings = Holdings::new(1, 1, Arc::default());
        let now = Instant::now();
        let offer = Offer { engine: EngineIs::Able, model_known: true, no_footing: None };
        let consider = |kind, id: &str| holdings.consider(kind, &StreamId::new(id).expect("id"), 1, &offer, now);
        holdings.put(handle(Kind::Session, "a"));
        assert_eq!(consider(Kind::Job, "j"), Decision::Start);
        assert!(matches!(consider(Kind::Session, "b"), Decision::Refuse(_)));
        holdings.put(handle(Kind::Job, "a"));
        assert_eq!(holdings.free_job_slots(), 0);
        assert!(matches!(consider(Kind::Job, "k"), Decision::Refuse(f) if f.class == FailureClass::NoCapacity));
        let told = holdings.snapshot(now);
        assert_eq!((told.slots.used, told.job_slots.used, told.held.len()), (1, 1, 2));
        assert!(told.held.iter().all(|held| held.progress.is_some() == (held.kind == Kind::Job)));
    }

    #[test]
    fn a_job_given_up_is_told_until_it_comes_back_or_a_minute_has_passed() {
        let holdings = Holdings::new(1, 1, Arc::default());
        let now = Instant::now();
        let given_up = |id: &str| GivenUp {
            kind: Kind::Job,
            id: StreamId::new(id).expect("id"),
            epoch: 3,
            failure: Failure::new(FailureClass::Timeout, "slow"),
        };
        holdings.give_up(given_up("a"), now);
        holdings.give_up(given_up("b"), now + Duration::from_secs(30));
        assert_eq!(holdings.snapshot(now).given_up.len(), 2);
        holdings.put(handle(Kind::Job, "b"));
        assert_eq!(holdings.snapshot(now).given_up, [given_up("a")]);
        assert_eq!(holdings.snapshot(now + TELL_GIVEN_UP).given_up, []);
        for n in 0..MAX_GIVEN_UP + 5 {
            holdings.give_up(given_up(&format!("j{n}")), now);
        }
        assert_eq!(holdings.snapshot(now).given_up.len(), MAX_GIVEN_UP);
    }
}
