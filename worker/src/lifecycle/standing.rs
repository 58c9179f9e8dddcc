//! What runs for whom: the engine's knowledge of its device, asked by sessions and changed by what happens to children.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use tokio::{sync::mpsc, time::Instant};
use voxfleet_schema::{
    device::{Device, EngineEnd, Xids},
    failure::{Failure, FailureClass},
    fleet::{EngineRunState, ModelState, Residency},
};

use super::{
    Engine, EngineStatus,
    cause::{Cause, is_of_the_device},
    fallback::{Ended, Moment, Place},
    ladder::{Ask, Footing},
    load::Load,
};
use crate::{
    capacity::locked,
    ipc::ToEngine,
    session::{Names, unix_ms},
};

fn moment() -> Moment {
    Moment { mono: Instant::now(), wall_ms: unix_ms() }
}

/// Whether its file can be used.
fn is_here(model: &ModelState) -> bool {
    !matches!(model.state, Residency::Failed | Residency::Missing | Residency::Fetching | Residency::Unknown)
}

/// The device as the fleet sees it: where the child runs, and while none does, whether the next one is to do without its GPU.
fn told_device(there: Option<&str>, falls_back: bool) -> String {
    there.unwrap_or(if falls_back { "cpu" } else { "none" }).to_owned()
}

/// What loading it takes, as far as that is known.
fn size(model: &ModelState) -> u64 {
    model.resident_mb.max(model.expected_mb)
}

impl Engine {
    fn models_here(&self) -> Vec<String> {
        self.0.status.borrow().models.iter().filter(|model| is_here(model)).map(|model| model.name.clone()).collect()
    }

    /// The model of those that name none.
    pub(crate) fn default_model(&self) -> &str {
        &self.0.config.default_model
    }

    /// What runs for somebody who is here from now on, until [`Engine::forget`].
    pub(crate) fn footing(&self, names: &Names, ask: &Ask) -> Result<Footing, Failure> {
        let models = self.models_here();
        let mut fallback = locked(&self.0.fallback);
        let before = fallback.on_cpu();
        fallback.begins(names.name(), ask.clone(), &models);
        if fallback.on_cpu() != before {
            self.0.activity.notify_one();
        }
        fallback.footing(Instant::now(), ask, &models)
    }

    /// What would run for somebody who is not here yet.
    pub(crate) fn would(&self, ask: &Ask) -> Result<Footing, Failure> {
        let models = self.models_here();
        locked(&self.0.fallback).would(Instant::now(), ask, &models)
    }

    /// Whether that is still what runs for it.
    pub(crate) fn stands(&self, ask: &Ask, footing: &Footing) -> bool {
        let models = self.models_here();
        // A refusal comes when it is opened again.
        locked(&self.0.fallback).footing(Instant::now(), ask, &models).is_ok_and(|now| now == *footing)
    }

    /// Whether the next child is to run on the CPU.
    pub(super) fn wants_cpu(&self) -> bool {
        self.look_at_device();
        locked(&self.0.fallback).on_cpu()
    }

    /// Learns what is wrong with the device before a child has died of it.
    fn look_at_device(&self) {
        let Some(class) = self.out_of_order() else { return };
        let models = self.models_here();
        let mut fallback = locked(&self.0.fallback);
        let end = Ended { class, on_cpu: fallback.on_cpu(), culprit: None };
        fallback.ended(moment(), end, &models);
    }

    /// Leaves a GPU that has fallen off the bus before the engine on it has noticed: nothing there will ever come back. Other
    /// troubles may be the driver's alone.
    pub(super) fn leave_what_fell_off(&self) {
        let fell_off = self.0.device.borrow().xids.is_some_and(|xids| xids.last == Xids::FELL_OFF);
        if fell_off {
            self.look_at_device();
        }
    }

    /// Why nothing can run on the device, as far as its figures tell.
    fn out_of_order(&self) -> Option<FailureClass> {
        let trouble = self.0.device.borrow().trouble.as_ref().map(|trouble| trouble.class);
        trouble.filter(|class| is_of_the_device(*class))
    }

    /// See [`told_device`].
    pub(super) fn effective_device(&self, status: &EngineStatus) -> String {
        let there = (status.state == EngineRunState::Ready).then_some(status.device.as_str());
        let falls_back = self.0.config.use_gpu && (self.is_on_side(true) || self.out_of_order().is_some());
        told_device(there, falls_back)
    }

    /// Whether the engine runs there, or would.
    pub(crate) fn is_on_side(&self, on_cpu: bool) -> bool {
        locked(&self.0.fallback).on_cpu() == on_cpu
    }

    /// Nobody is here any more under this name.
    pub(super) fn leaves(&self, names: &Names) {
        let models = self.models_here();
        locked(&self.0.fallback).forget(&names.name(), &models);
        self.0.activity.notify_one();
    }

    /// A child ended unasked. Before its sessions hear of it.
    pub(super) fn learn(&self, cause: &Cause, on_cpu: bool) {
        let failure = cause.failure();
        let culprit = self.culprit();
        let (at, models) = (moment(), self.models_here());
        let marked = {
            let mut fallback = locked(&self.0.fallback);
            let end = Ended { class: cause.class, on_cpu, culprit: culprit.as_deref() };
            fallback.ended(at, end, &models)
        };
        match marked {
            Some(Place::Model { name, .. }) => {
                tracing::error!(class = %cause.class, model = name, on_cpu, "engine ended, {}", failure.message);
            }
            Some(Place::Device) => {
                tracing::error!(class = %cause.class, "engine ended, its GPU is left alone, {}", failure.message);
            }
            None => tracing::error!(class = %cause.class, on_cpu, "engine ended, {}", failure.message),
        }
        self.ended_by(failure, at.wall_ms);
    }

    /// None could be started.
    pub(super) fn not_started(&self, cause: &Cause) {
        let failure = cause.failure();
        tracing::error!(class = %failure.class, "{}", failure.message);
        self.ended_by(failure, unix_ms());
    }

    fn ended_by(&self, failure: Failure, at_ms: u64) {
        *locked(&self.0.ends).entry(failure.class).or_default() += 1;
        *locked(&self.0.last_end) = Some(EngineEnd { class: failure.class, message: failure.message, at_ms });
    }

    /// See [`took_the_last`].
    fn culprit(&self) -> Option<String> {
        let models = self.0.status.borrow().models.clone();
        let outboxes = locked(&self.0.outboxes);
        let asked = locked(&self.0.asked).clone();
        let asked: Vec<&str> = asked.iter().map(String::as_str).collect();
        let decoding = locked(&self.0.decoding);
        let decoded = decoding.keys().filter_map(|handle| outboxes.get(handle)).map(|outbox| outbox.model.as_str());
        took_the_last(&models, &asked, &decoded.collect::<Vec<_>>()).map(str::to_owned)
    }

    /// A child that lives on says that it has no memory for a model.
    pub(super) fn has_no_room(&self, model: &str) {
        let models = self.models_here();
        let on_cpu = self.0.on_cpu.load(Ordering::Relaxed);
        let place = Place::Model { name: model.to_owned(), on_cpu };
        locked(&self.0.fallback).failed(moment(), place, FailureClass::OutOfMemory, &models);
        self.0.activity.notify_one();
        self.0.news.notify_one();
    }

    /// A child that lives on says that a model cannot be loaded, for another reason than memory.
    pub(super) fn cannot_load(&self, model: &str) {
        let models = self.models_here();
        let on_cpu = self.0.on_cpu.load(Ordering::Relaxed);
        let place = Place::Model { name: model.to_owned(), on_cpu };
        locked(&self.0.fallback).tried_in_vain(moment(), |tried| *tried == place, &models);
    }

    pub(super) fn has_loaded(&self, model: &str) {
        let models = self.models_here();
        let on_cpu = self.0.on_cpu.load(Ordering::Relaxed);
        let place = Place::Model { name: model.to_owned(), on_cpu };
        locked(&self.0.fallback).restored(Instant::now(), &place, &models);
    }

    /// Tries again what may be tried again, through the child that runs, if one does.
    pub(super) fn restore(&self, child: Option<&mpsc::Sender<ToEngine>>) {
        if child.is_none() {
            // Whoever comes is told what he would get before a child is asked for.
            self.look_at_device();
        }
        let (now, device, models) = (Instant::now(), self.0.device.borrow().clone(), self.models_here());
        let (states, on_cpu) = (self.0.status.borrow().models.clone(), self.0.on_cpu.load(Ordering::Relaxed));
        let free_mb = self.free_mb(&device);
        let needs = |name: &str| states.iter().find(|model| model.name == name).map_or(0, |model| model.expected_mb);
        let smallest = states.iter().filter(|model| is_here(model)).map(|model| model.expected_mb).min().unwrap_or(0);
        let mut fallback = locked(&self.0.fallback);
        // What stands in for a model goes when that one is back.
        let freed: BTreeMap<String, u64> = if child.is_some() {
            let of =
                |name: &String| states.iter().find(|model| model.name == *name).map_or(0, |model| model.resident_mb);
            let freed = |model: &String| fallback.only_in_place_of(model, &models).iter().map(of).sum();
            models.iter().map(|model| (model.clone(), freed(model))).collect()
        } else {
            BTreeMap::new()
        };
        let fits = |name: &str, freed_mb: u64| free_mb.is_none_or(|free| free + freed_mb >= needs(name));
        let room = |place: &Place| match place {
            Place::Device => device.trouble.is_none() && free_mb.is_none_or(|free| free >= smallest),
            // The figures are the GPU's; what the host has shows when it is tried.
            Place::Model { on_cpu: true, .. } if self.0.config.use_gpu => true,
            Place::Model { name, .. } => fits(name, freed.get(name).copied().unwrap_or(0)),
        };
        let before = fallback.on_cpu();
        let mut anew = false;
        for place in fallback.due(now, room) {
            let loaded = |name: &String| states.iter().any(|m| m.name == *name && m.state == Residency::Loaded);
            let tried = match (&place, child) {
                (Place::Model { name, on_cpu: side }, Some(frames)) if *side == on_cpu && !loaded(name) => {
                    let beside = (*side && self.0.config.use_gpu) || fits(name, 0);
                    // Both do not fit: the next child has it alone.
                    anew |= !beside;
                    // Whoever waits for it goes on as he is until it is there.
                    tracing::info!(model = name, beside, "trying again to load a model that had no room");
                    beside && frames.try_send(ToEngine::Load { model: name.clone() }).is_ok()
                }
                _ => false,
            };
            if !tried {
                tracing::info!(?place, "may be used again");
                fallback.restored(now, &place, &models);
            }
        }
        if anew {
            self.0.anew.store(true, Ordering::Relaxed);
        }
        if anew || fallback.on_cpu() != before {
            self.0.activity.notify_one();
        }
    }

    /// What of the device's memory we may still take; none where it gives no figures.
    fn free_mb(&self, device: &Device) -> Option<u64> {
        let reserve_mb = device.total_mb * u64::from(self.0.terms.reserve_percent) / 100;
        (device.total_mb > 0).then(|| device.free_mb.saturating_sub(reserve_mb))
    }

    /// Loaded models that are not to be used: they take the room of those that stand in for them.
    pub(super) fn to_unload(&self) -> Vec<String> {
        let states = self.0.status.borrow().models.clone();
        let fallback = locked(&self.0.fallback);
        let loaded = states.into_iter().filter(|model| model.state == Residency::Loaded);
        loaded.map(|model| model.name).filter(|name| fallback.no_room(name).is_some()).collect()
    }

    /// Models as the fleet should see them.
    pub(super) fn told_models(&self, mut models: Vec<ModelState>, now: Instant) -> Vec<ModelState> {
        let (fallback, loads) = (locked(&self.0.fallback), locked(&self.0.loads));
        for model in &mut models {
            (model.load_ms, model.load_percent) = match (model.state, loads.get(&model.name)) {
                (Residency::Loading, Some(Load::Since { at, from })) => {
                    let percent = from.as_ref().zip(self.pid()).and_then(|(file, pid)| file.percent(pid));
                    (Some(now.saturating_duration_since(*at).as_millis() as u64), percent)
                }
                (Residency::Loaded, Some(Load::Took { ms })) => (Some(*ms), None),
                _ => (None, None),
            };
            let has_room = matches!(model.state, Residency::Loaded | Residency::Loading);
            let failure = fallback.failure_of(now, &model.name);
            match (model.state, failure) {
                (_, Some(failure)) if !has_room => (model.state, model.failure) = (Residency::NoRoom, Some(failure)),
                // The child has not heard that it may be tried again.
                (Residency::NoRoom, None) => (model.state, model.failure) = (Residency::Available, None),
                _ => {}
            }
        }
        models
    }
}

/// The model that took the last memory: one that was being loaded, else one that was wanted and was not there yet (a loader
/// may end its process before anybody hears that it has begun), else the largest that was decoded with, else the largest that
/// was there.
fn took_the_last<'a>(models: &'a [ModelState], asked: &[&str], decoded: &[&str]) -> Option<&'a str> {
    let largest = |of: &dyn Fn(&ModelState) -> bool| {
        models.iter().filter(|model| of(model)).max_by_key(|model| size(model)).map(|model| model.name.as_str())
    };
    largest(&|model| model.state == Residency::Loading)
        .or_else(|| largest(&|model| model.state != Residency::Loaded && asked.contains(&model.name.as_str())))
        .or_else(|| largest(&|model| decoded.contains(&model.name.as_str())))
        .or_else(|| largest(&|model| model.state == Residency::Loaded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_memory_was_taken_by_who_came_last() {
        use Residency::{Available, Loaded, Loading};
        let model = |name: &str, state, mb| ModelState {
            name: name.to_owned(),
            state,
            expected_mb: mb,
            resident_mb: if state == Loaded { mb } else { 0 },
            ..ModelState::default()
        };
        let there = [model("base", Loaded, 400), model("small", Loaded, 900)];
        let loads = [model("base", Loading, 400), model("small", Loaded, 900)];
        let wanted = [model("base", Available, 400), model("small", Loaded, 900)];
        let none: &[&str] = &[];
        for (models, opened, decoded, culprit) in [
            (&loads, &["small"][..], &["small"][..], Some("base")),
            (&wanted, &["base", "small"][..], &["small"][..], Some("base")),
            (&wanted, &["small"][..], none, Some("small")),
            (&there, &["base", "small"][..], &["base"][..], Some("base")),
            (&there, none, none, Some("small")),
        ] {
            assert_eq!(took_the_last(models, opened, decoded), culprit, "{opened:?} {decoded:?}");
        }
        let nothing = [model("base", Available, 400)];
        assert_eq!(took_the_last(&nothing, none, none), None, "what comes before the first model");
    }
}
