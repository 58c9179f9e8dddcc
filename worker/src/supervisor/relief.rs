//! What this worker does when other tenants grow on its device: takes nothing new, gives back what it does not use, and asks
//! that its sessions be moved, one at a time. The steps are those of [`crate::lifecycle::pressure`].

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    device::Pressure,
    failure::{Failure, FailureClass},
    fleet::{Device, ModelState},
    id::{Kind, StreamId},
};

use super::holdings::Holdings;
use crate::{
    capacity::locked,
    config::WorkerConfig,
    lifecycle::{Engine, Gauge, Memory},
};

/// When a refused one may ask again: a tenant is looked at each second, and believed after some.
const RETRY_AFTER_MS: u64 = 5_000;

/// Who is to be moved: its name, and what it is decoded with.
type Candidate = (StreamId, String);

#[derive(Debug, Default)]
struct Inner {
    level: Option<Pressure>,
    others_mb: u64,
    free_mb: u64,
    /// For how long a neighbour has kept the device to itself.
    neighbour_ms: u64,
    /// The one session that should be elsewhere.
    leaves: Option<StreamId>,
}

/// A neighbour that keeps the device for so long keeps words from people.
const MOVES_AFTER_MS: u64 = 15_000;

/// Looks at the device that a session is given to be moved; then the next one is asked for.
const LOOKS_EACH: u32 = 5;

/// Who was asked to leave. One at a time: with each of them memory may become free.
#[derive(Debug, Default)]
struct Leaving {
    asked: Option<(StreamId, u32)>,
    /// Those who stayed: no other worker has room for them, or what they ask for.
    stayed: BTreeSet<StreamId>,
}

impl Leaving {
    /// One look: whose turn it is.
    fn look(&mut self, held: &[Candidate], models: &[ModelState]) -> Option<StreamId> {
        let is_held = |id: &StreamId| held.iter().any(|(held, _)| held == id);
        self.stayed.retain(is_held);
        match self.asked.take().filter(|(id, _)| is_held(id)) {
            Some((id, looks)) if looks < LOOKS_EACH => self.asked = Some((id, looks + 1)),
            Some((id, _)) => {
                self.stayed.insert(id);
            }
            None => {}
        }
        if self.asked.is_none() {
            if self.stayed.len() >= held.len() {
                // All over again: another worker may have room by now.
                self.stayed.clear();
            }
            self.asked = next_to_leave(&self.stayed, held, models).map(|id| (id, 1));
        }
        self.asked.as_ref().map(|(id, _)| id.clone())
    }
}

/// The present step, for admission and heartbeats.
#[derive(Debug, Default)]
pub(crate) struct Relief {
    inner: Mutex<Inner>,
    changed: Notify,
}

impl Relief {
    pub(crate) fn level(&self) -> Option<Pressure> {
        locked(&self.inner).level
    }

    /// Why nothing new is taken, if so.
    pub(super) fn refusal(&self) -> Option<Failure> {
        let inner = locked(&self.inner);
        inner.level?;
        let Inner { others_mb, free_mb, neighbour_ms, .. } = *inner;
        let why = match neighbour_ms / 1_000 {
            0 => format!("other tenants have {others_mb} MB of the device, {free_mb} MB are free and to stay so"),
            waited_s => format!("the neighbour has held the device's lock for {waited_s} s"),
        };
        Some(Failure { retry_after_ms: Some(RETRY_AFTER_MS), ..Failure::new(FailureClass::NoCapacity, why) })
    }

    /// Whether this one should be moved.
    pub(crate) fn asks_elsewhere(&self, kind: Kind, id: &StreamId) -> bool {
        kind == Kind::Session && locked(&self.inner).leaves.as_ref() == Some(id)
    }

    /// Waits until something new may be taken that was not, or the other way round.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Other tenants need the device.
    #[cfg(test)]
    pub(super) fn press(&self) {
        self.set(Inner { level: Some(Pressure::NoNewWork), ..Inner::default() });
    }

    /// Says whether anything is new to the fleet.
    fn set(&self, next: Inner) -> bool {
        let mut inner = locked(&self.inner);
        let news = (inner.level, &inner.leaves) != (next.level, &next.leaves);
        if inner.level.is_some() != next.level.is_some() {
            self.changed.notify_one();
        }
        *inner = next;
        news
    }
}

/// Follows the device's figures until `stop`.
pub(super) struct Follow {
    pub(super) relief: Arc<Relief>,
    pub(super) config: Arc<WorkerConfig>,
    pub(super) default_model: Arc<str>,
    pub(super) engine: Engine,
    pub(super) holdings: Arc<Holdings>,
    pub(super) device: watch::Receiver<Device>,
    pub(super) news: Arc<Notify>,
}

impl Follow {
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let (mut gauge, mut leaving) = (Gauge::default(), Leaving::default());
        loop {
            let device = self.device.borrow_and_update().clone();
            // An engine that has gone to the CPU takes nothing from the tenants of the GPU.
            let memory = Memory::of(&device, self.config.reserve_mb(device.total_mb));
            let level = gauge.look(memory.filter(|_| !self.engine.is_on_side(true)));
            let neighbour_ms = self.engine.neighbour_ms();
            self.act(level.max(waiting(neighbour_ms)), neighbour_ms, &device, &mut leaving);
            tokio::select! {
                () = stop.cancelled() => break,
                changed = self.device.changed() => if changed.is_err() { break },
            }
        }
    }

    fn act(&self, level: Option<Pressure>, neighbour_ms: u64, device: &Device, leaving: &mut Leaving) {
        let before = self.relief.level();
        let (others_mb, free_mb) = (device.used_by_others_mb, device.free_mb);
        if level != before {
            match level {
                Some(level) => tracing::warn!(?level, others_mb, free_mb, "other tenants need the device"),
                None => tracing::info!(others_mb, free_mb, "there is room on the device again"),
            }
        }
        if level >= Some(Pressure::ReleaseIdle) {
            self.engine.release_idle();
        }
        let leaves = if level == Some(Pressure::MoveAway) {
            self.next_to_leave(leaving)
        } else {
            *leaving = Leaving::default();
            None
        };
        if self.relief.set(Inner { level, others_mb, free_mb, neighbour_ms, leaves }) {
            self.news.notify_one();
        }
    }

    fn next_to_leave(&self, leaving: &mut Leaving) -> Option<StreamId> {
        let asked = locked(&self.relief.inner).leaves.clone();
        let next = leaving.look(&self.sessions(), &self.engine.status().models);
        if next != asked
            && let Some(id) = &next
        {
            tracing::warn!(session = %id, "to be moved, other tenants need the device");
        }
        next
    }

    /// With what runs for them, which may be a stand-in.
    fn sessions(&self) -> Vec<Candidate> {
        let standbys = self.engine.standbys();
        let runs = |asked: String| {
            let standby = standbys.iter().find(|standby| standby.asked == asked);
            standby.map_or(asked, |standby| standby.model.clone())
        };
        let sessions = self.holdings.all().into_iter().filter(|handle| handle.names.kind == Kind::Session);
        let named = sessions.map(|handle| {
            let model = handle.desired.borrow().options.model.clone();
            (handle.names.id.clone(), runs(model.unwrap_or_else(|| self.default_model.as_ref().to_owned())))
        });
        named.collect()
    }
}

/// The step while a neighbour keeps the device: nothing new comes, and who waits for too long goes where there is room.
fn waiting(neighbour_ms: u64) -> Option<Pressure> {
    match neighbour_ms {
        0 => None,
        ms if ms < MOVES_AFTER_MS => Some(Pressure::NoNewWork),
        _ => Some(Pressure::MoveAway),
    }
}

/// Of the model that takes the most memory for the fewest sessions: with the last of them it can go.
fn next_to_leave(stayed: &BTreeSet<StreamId>, held: &[Candidate], models: &[ModelState]) -> Option<StreamId> {
    let users = |model: &str| held.iter().filter(|(_, m)| m == model).count() as u64;
    let size = |model: &str| models.iter().find(|m| m.name == model).map_or(0, |m| m.resident_mb.max(m.expected_mb));
    let worth = |model: &str| size(model) / users(model).max(1);
    let others = held.iter().filter(|(id, _)| !stayed.contains(id));
    others.max_by_key(|(id, model)| (worth(model), std::cmp::Reverse(id.clone()))).map(|(id, _)| id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(id: &str) -> StreamId {
        StreamId::new(id).expect("id")
    }

    #[test]
    fn one_leaves_at_a_time_and_first_those_whose_model_is_freed_soonest() {
        let model = |name: &str, resident_mb| ModelState { name: name.to_owned(), resident_mb, ..Default::default() };
        let models = [model("large", 4_000), model("base", 400)];
        let held = |names: &[(&str, &str)]| -> Vec<Candidate> {
            names.iter().map(|(name, model)| (id(name), (*model).to_owned())).collect()
        };
        let all = held(&[("a", "base"), ("b", "large"), ("c", "large"), ("d", "other")]);
        let next = |held: &[Candidate]| Leaving::default().look(held, &models);
        assert_eq!(next(&all), Some(id("b")));
        let many: Vec<Candidate> = (0..20).map(|n| (id(&format!("s{n}")), "large".to_owned())).collect();
        let many = [many, held(&[("a", "base")])].concat();
        assert_eq!(next(&many), Some(id("a")), "one move frees 400 MB, twenty the large one");
        assert_eq!(next(&[]), None);
    }

    #[test]
    fn whoever_cannot_be_moved_holds_up_nobody_else() {
        let models = [("large", 4_000), ("base", 400)].map(|(name, resident_mb)| ModelState {
            name: name.to_owned(),
            resident_mb,
            ..ModelState::default()
        });
        let held = [("x", "large"), ("y", "base")].map(|(name, model)| (id(name), model.to_owned()));
        let mut leaving = Leaving::default();
        let mut turns = Vec::new();
        for _ in 0..3 * LOOKS_EACH {
            turns.extend(leaving.look(&held, &models));
        }
        let each = |name: &str| vec![id(name); LOOKS_EACH as usize];
        assert_eq!(turns, [each("x"), each("y"), each("x")].concat(), "and all over again");
        // It goes in the middle of its turn.
        assert_eq!(leaving.look(&held[..1], &models), Some(id("x")));
        assert_eq!(leaving.look(&held[1..], &models), Some(id("y")));
    }

    #[tokio::test]
    async fn the_refusal_names_what_the_others_have() {
        let relief = Relief::default();
        assert_eq!(relief.refusal(), None);
        let pressed = || Inner {
            level: Some(Pressure::MoveAway),
            others_mb: 15_500,
            free_mb: 300,
            neighbour_ms: 0,
            leaves: Some(id("s")),
        };
        assert!(relief.set(pressed()) && !relief.set(pressed()), "told once");
        relief.changed().await;
        let refusal = relief.refusal().expect("refused");
        assert_eq!(refusal.class, FailureClass::NoCapacity);
        assert!(refusal.message.contains("15500 MB") && refusal.message.contains("300 MB"), "{refusal}");
        assert!(relief.asks_elsewhere(Kind::Session, &id("s")) && !relief.asks_elsewhere(Kind::Job, &id("s")));
        relief.set(Inner { neighbour_ms: 7_300, ..pressed() });
        let refusal = relief.refusal().expect("refused");
        assert!(refusal.message.contains("lock for 7 s"), "{refusal}");
        assert!(relief.set(Inner::default()));
        assert_eq!((relief.refusal(), relief.level()), (None, None));
    }
}
