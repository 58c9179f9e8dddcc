//! Which worker takes a session or a file job: filter, then score, then pick. Pure; time and load come in as values.
//!
//! A [`Roster`] keeps what does not change from one decision to the next. Every worker has a reason, chosen or not;
//! [`Roster::explain`] tells them, for an event that explains itself.

mod explain;
mod fit;
mod plan;
mod refusal;
mod roster;

use std::{cmp::Ordering, time::Duration};

use voxfleet_schema::{
    device::Instead,
    failure::{Failure, FailureClass},
    fleet::{EngineName, WorkerHealth},
    id::WorkerName,
    session::{Diarize, Policy, SessionOptions},
    transcript::VadKind,
};

pub use explain::Rows;
pub use fit::Size;
pub(crate) use fit::{has_fallen, is_cpu};
pub use refusal::Refusal;
pub use roster::{Duty, Roster, Seen, Slot};

use crate::config::DispatcherConfig;
use fit::{StandIn, Wanted};
use refusal::Refusals;
use roster::Row;

/// Two cards that differ by less have the same room: what drivers and contexts take differs by a few MB from one reading to
/// the next, and sessions would not spread evenly.
const ROOM_STEP_MB: u64 = 1_024;

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub options: &'a SessionOptions,
    /// A session that has finals keeps their VAD kind.
    pub vad: Option<VadKind>,
    /// One that may not change keeps the engine of its finals.
    pub engine: Option<EngineName>,
    /// Somebody listens: it must keep up with speech. A file job need not.
    pub live: bool,
    /// The service it belongs to, with a map of the fleet; none: no service of the map takes it.
    pub service: Option<Service>,
    /// It has a slot of this worker now, which comes free when it moves.
    pub leaves: Option<&'a WorkerName>,
    /// Workers that refused it just now.
    pub left_out: &'a [Slot],
}

impl<'a> Request<'a> {
    /// A new one on a fleet without a map.
    pub fn new(options: &'a SessionOptions, live: bool) -> Self {
        Self { options, vad: None, engine: None, live, service: None, leaves: None, left_out: &[] }
    }
}

/// A service of the fleet map, by its place there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Service {
    pub number: u16,
    /// It may use CPUs.
    pub cpu: bool,
    /// It has GPUs, whether they are there now or not.
    pub gpus: bool,
}

/// What a worker that could take it looks like to the score, in order of weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    /// CPU workers come last, unless the session asks for one.
    pub cpu: bool,
    /// How many sizes below the model asked for; the one asked for comes first.
    pub smaller: usize,
    pub used: u32,
    pub slots: u32,
    /// Per mille of device memory in use by others, above the threshold.
    pub pressure: u32,
    pub warm: bool,
    pub free_mb: u64,
    /// Free memory in steps of [`ROOM_STEP_MB`]; 0 on a CPU, whose memory is that of all workers of its host.
    room: u64,
    stand_in: Option<StandIn>,
    /// Place in the order of (host, device index, name), for equals.
    rank: u32,
}

impl Score {
    /// No request scores better there: where that is not good enough, nothing need be looked up.
    fn at_best(row: &Row, live: bool) -> Self {
        let places = row.places(live);
        Self {
            cpu: false,
            smaller: 0,
            used: places.used,
            slots: places.slots,
            pressure: row.pressure,
            warm: row.any_loaded,
            free_mb: row.free_mb,
            room: room(row),
            stand_in: None,
            rank: row.rank,
        }
    }

    fn compare(&self, other: &Self) -> Ordering {
        let share = |a: &Self, b: &Self| u64::from(a.used) * u64::from(b.slots);
        self.cpu
            .cmp(&other.cpu)
            .then_with(|| self.smaller.cmp(&other.smaller))
            .then_with(|| share(self, other).cmp(&share(other, self)))
            .then_with(|| self.pressure.cmp(&other.pressure))
            .then_with(|| other.warm.cmp(&self.warm))
            .then_with(|| other.room.cmp(&self.room))
            .then_with(|| self.rank.cmp(&other.rank))
    }
}

/// Free memory in steps of [`ROOM_STEP_MB`]; that of a CPU says nothing of the worker.
fn room(row: &Row) -> u64 {
    if row.cpu { 0 } else { row.free_mb / ROOM_STEP_MB }
}

/// Whom a request goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pick {
    pub slot: Slot,
    /// How it differs there from what was asked for.
    pub instead: Option<Instead>,
}

/// What of a request holds for all workers.
struct Terms<'a> {
    request: &'a Request<'a>,
    wanted: Wanted,
    /// On a fleet that never had a GPU a CPU stands in for nothing; where one has died, it would.
    any_gpu: bool,
    now: Duration,
}

impl Roster {
    /// Chooses a worker.
    pub fn route(&self, request: &Request<'_>, now: Duration, config: &DispatcherConfig) -> Result<Pick, Failure> {
        let terms = self.terms(request, now);
        let mut best: Option<(Slot, Score)> = None;
        let mut met = Refusals::default();
        // Somebody has the model and is only full: should nobody take it, that is what is said.
        let mut only_full = false;
        for (slot, row) in self.rows.iter().enumerate() {
            let full = only_full && row.places(request.live).is_full();
            let beaten =
                || best.as_ref().is_some_and(|(_, best)| best.compare(&Score::at_best(row, request.live)).is_lt());
            if !row.shared && (full || beaten()) {
                continue;
            }
            match self.judge(&terms, slot, row) {
                Ok(score) if best.as_ref().is_none_or(|(_, best)| score.compare(best) == Ordering::Less) => {
                    best = Some((slot, score));
                }
                Ok(_) => {}
                Err(refusal) => {
                    only_full |= refusal == Refusal::NoSlot;
                    met.add(refusal);
                }
            }
        }
        match best {
            Some((slot, score)) => Ok(Pick { slot, instead: self.instead_there(request, slot, score.stand_in, now) }),
            None => Err(self.refuse(&terms, met, config)),
        }
    }

    /// Whether any worker could take it, now or once a slot is free, of those that `counts`.
    pub fn any_could(&self, request: &Request<'_>, now: Duration, counts: impl Fn(&WorkerName) -> bool) -> bool {
        let terms = self.terms(request, now);
        let could = |(slot, row): (Slot, &Row)| match self.judge(&terms, slot, row) {
            Ok(_) => true,
            Err(refusal) => refusal.is_for_now(),
        };
        self.rows.iter().enumerate().any(|(slot, row)| could((slot, row)) && counts(self.name(slot)))
    }

    /// How it differs on this worker from what was asked for, whatever else speaks against it there.
    pub fn instead(&self, request: &Request<'_>, worker: &WorkerName, now: Duration) -> Option<Instead> {
        let slot = self.slot(worker)?;
        let fit = self.rows[slot].shelf.fit(Wanted::of(request, &self.names)).ok();
        self.instead_there(request, slot, fit.and_then(|fit| fit.stand_in), now)
    }

    fn instead_there(
        &self,
        request: &Request<'_>,
        slot: Slot,
        stand_in: Option<StandIn>,
        now: Duration,
    ) -> Option<Instead> {
        let cpu = self.rows[slot].cpu && self.misses_gpu(request);
        if stand_in.is_none() && !cpu {
            return None;
        }
        let asked = request.options.model.clone();
        let name = |number| self.names.name(number).to_owned();
        Some(Instead {
            asked: asked.or_else(|| stand_in.and_then(|s| s.asked).map(name)),
            model: stand_in.map(|s| name(s.model)),
            cpu,
            class: stand_in.map_or_else(|| self.why_no_gpu(now), StandIn::class),
        })
    }

    /// There are GPUs for it, and it did not ask to be kept off them.
    fn misses_gpu(&self, request: &Request<'_>) -> bool {
        let gpus = request.service.map_or(self.any_gpu, |service| service.gpus);
        gpus && request.options.policy != Policy::ForceCpu
    }

    fn why_no_gpu(&self, now: Duration) -> FailureClass {
        let alive = |row: &Row| !row.cpu && row.health(now) == WorkerHealth::Alive;
        if self.rows.iter().any(alive) { FailureClass::NoCapacity } else { FailureClass::NoWorkers }
    }

    /// Whether this worker, which has it already, could now run what was asked for.
    pub fn could_as_asked(&self, request: &Request<'_>, worker: &WorkerName, now: Duration) -> bool {
        let Some(slot) = self.slot(worker) else {
            return false;
        };
        let row = &self.rows[slot];
        let fits = || row.shelf.fit(Wanted::of(request, &self.names)).is_ok_and(|fit| fit.stand_in.is_none());
        let hindered = row.pressed || row.hot || (request.live && row.slow);
        let able = row.health(now) == WorkerHealth::Alive && !hindered;
        able && !(row.cpu && self.misses_gpu(request)) && fits()
    }

    /// A number for a model's name, the same for all names that no worker lists: strangers may think up any.
    pub fn model_number(&self, model: &str) -> Option<u32> {
        self.names.known(model)
    }

    fn terms<'a>(&self, request: &'a Request<'a>, now: Duration) -> Terms<'a> {
        let strict = matches!(request.options.policy, Policy::ExactModel | Policy::AllowSmaller);
        Terms {
            request,
            wanted: Wanted::of(request, &self.names),
            any_gpu: strict && request.service.map_or(self.any_gpu, |service| service.gpus),
            now,
        }
    }

    fn judge(&self, terms: &Terms<'_>, slot: Slot, row: &Row) -> Result<Score, Refusal> {
        let score = self.judge_alone(terms, slot, row)?;
        if row.superseded && row.shared {
            let newer = |other: &Slot| !self.rows[*other].superseded;
            let takes_it = |other: Slot| self.judge_alone(terms, other, &self.rows[other]).is_ok();
            if self.others_on_gpu(slot).filter(newer).any(takes_it) {
                return Err(Refusal::Superseded);
            }
        }
        Ok(score)
    }

    /// Without regard to other incarnations that might do better.
    fn judge_alone(&self, terms: &Terms<'_>, slot: Slot, row: &Row) -> Result<Score, Refusal> {
        let request = terms.request;
        let health = row.health(terms.now);
        if health != WorkerHealth::Alive {
            return Err(Refusal::of(health));
        }
        match (row.duty, request.service) {
            (Duty::Anyone, _) => {}
            (Duty::Serves(number), Some(service)) if number == service.number => {}
            (Duty::Cpu, Some(service)) if service.cpu => {}
            (Duty::Reserve, _) => return Err(Refusal::Reserved),
            _ => return Err(Refusal::OtherService),
        }
        if request.left_out.contains(&slot) {
            return Err(Refusal::RefusedBefore);
        }
        if request.vad.is_some_and(|vad| vad != row.vad) {
            return Err(Refusal::OtherVad);
        }
        if request.options.diarize == Diarize::On && !row.speakers {
            return Err(Refusal::NoSpeakers);
        }
        let device_ok = match request.options.policy {
            // What a newer version means is not known here: as if nothing had been said.
            Policy::AllowCpu | Policy::Unknown => true,
            Policy::ForceCpu => row.cpu,
            Policy::ExactModel | Policy::AllowSmaller => !row.cpu || !terms.any_gpu,
        };
        let kept_off = row.fallen && request.service.is_some_and(|service| !service.cpu);
        if !device_ok || kept_off {
            return Err(Refusal::WrongDevice);
        }
        let fit = row.shelf.fit(terms.wanted)?;
        if row.pressed {
            return Err(Refusal::TenantPressure);
        }
        let mut places = row.places(request.live);
        if row.shared && request.leaves.is_some_and(|from| self.moves_within(from, slot)) {
            places.used = places.used.saturating_sub(1);
        }
        if places.is_full() {
            return Err(Refusal::NoSlot);
        }
        if request.live && row.slow {
            return Err(Refusal::TooSlow);
        }
        if row.hot {
            return Err(Refusal::TooHot);
        }
        Ok(Score {
            smaller: fit.smaller,
            cpu: row.cpu && request.options.policy != Policy::ForceCpu,
            used: places.used,
            slots: places.slots,
            pressure: row.pressure,
            warm: fit.warm,
            free_mb: row.free_mb,
            room: room(row),
            stand_in: fit.stand_in,
            rank: row.rank,
        })
    }

    /// To another incarnation on the same GPU.
    fn moves_within(&self, from: &WorkerName, to: Slot) -> bool {
        let to = self.name(to);
        from.gpu_id == to.gpu_id && from != to && self.slot(from).is_some()
    }

    /// The typed refusal when nobody can take it: an empty fleet, a model nobody has or could hold, or no room now.
    fn refuse(&self, terms: &Terms<'_>, met: Refusals, config: &DispatcherConfig) -> Failure {
        let retry = |class, message: &str| Failure {
            retry_after_ms: Some(config.retry_after_ms),
            ..Failure::new(class, message)
        };
        if terms.request.service.is_none() && self.rows.iter().any(|row| row.duty != Duty::Anyone) {
            return Failure::new(FailureClass::ModelMissing, "no service of the fleet is for this model");
        }
        if !met.any(|refusal| !refusal.is_absence()) {
            return retry(FailureClass::NoWorkers, "no worker is ready");
        }
        let no_cpus = terms.request.service.is_some_and(|service| !service.cpu);
        let for_gpus = terms.any_gpu || (no_cpus && terms.request.options.policy != Policy::ForceCpu);
        if for_gpus && !met.any(|refusal| !refusal.is_absence() && refusal != Refusal::WrongDevice) {
            return retry(FailureClass::NoWorkers, "no worker with a GPU is ready, and the work is for no other");
        }
        if !met.any(Refusal::comes_after_model) && !self.rows.iter().any(|row| row.shelf.lists_any(terms.wanted)) {
            let model = terms.request.options.model.as_ref();
            let what =
                model.map_or_else(|| "the model that it is to use".to_owned(), |model| format!("model {model:?}"));
            return Failure::new(FailureClass::ModelMissing, format!("no worker has {what}"));
        }
        if !met.any(|refusal| !refusal.is_absence() && !refusal.is_for_good()) {
            return Failure::new(FailureClass::ModelDoesNotFit, "no device of the fleet can hold the model");
        }
        retry(FailureClass::NoCapacity, NO_CAPACITY)
    }
}

/// What somebody is told who comes when everything is taken.
pub const NO_CAPACITY: &str = "No GPU resources available";

#[cfg(test)]
mod tests;
