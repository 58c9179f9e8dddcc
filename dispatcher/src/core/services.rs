//! The fleet map at work: who stands in for whom, what is told of it, and models that are loaded before anybody asks.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use voxfleet_schema::{
    event::{Event, Scope, What},
    fleet::{Residency, ServiceStatus, WorkerHealth},
    id::{GpuId, WorkerName},
};

use super::{Core, Effect};
use crate::{
    map::{Change, Gpu},
    moment::Moment,
    routing::has_fallen,
};

/// Longer than an answered request takes to show in a heartbeat.
const PRELOAD_AGAIN: Duration = Duration::from_secs(2);
const PRELOAD_PAUSE: Duration = Duration::from_secs(60);

/// A model that a worker was told to load and has not been seen to have.
pub(super) struct Preload {
    asked: Duration,
    pause: Duration,
}

impl Core {
    /// After something has changed: who does what now.
    pub(super) fn look_at_map(&mut self, now: Moment) {
        self.map_due = false;
        if self.map.is_empty() {
            return;
        }
        if self.fleet.deaf(now.mono) {
            self.doubted = now.mono;
        }
        let mut gpus = self.gpus(now.mono);
        for gpu in self.fleet.condemned() {
            // Who was heard and fell silent has failed, however short the time that was listened.
            let dead = || Gpu {
                gpu_id: gpu.clone(),
                health: WorkerHealth::Dead,
                works_for: BTreeSet::new(),
                cpu: self.roster.is_cpu(gpu),
            };
            gpus.entry(gpu.clone()).or_insert_with(dead);
        }
        let (roles, changes) = self.map.roles(&gpus, &self.roles, now.mono, now.since(self.doubted));
        if roles != self.roles {
            let before = std::mem::replace(&mut self.roles, roles);
            let new_duty = |name: &WorkerName| {
                let duty = |roles| self.map.duty(roles, &name.gpu_id, false);
                duty(&before) != duty(&self.roles)
            };
            let changed: Vec<WorkerName> =
                self.fleet.workers().map(|(name, _)| name).filter(|name| new_duty(name)).cloned().collect();
            for worker in changed {
                self.fleet.touch(&worker);
                self.prewarm(&worker, now);
            }
        }
        for change in changes {
            self.tell_change(&change, now);
        }
    }

    /// A worker that serves loads what its service wants loaded.
    pub(super) fn prewarm(&mut self, worker: &WorkerName, now: Moment) {
        for model in self.map.preload(&self.roles, &worker.gpu_id).to_vec() {
            let preload = Preload { asked: now.mono, pause: PRELOAD_AGAIN };
            self.preloads.insert((worker.clone(), model.clone()), preload);
            self.effect(Effect::Prewarm { worker: worker.clone(), model });
        }
    }

    /// A request that was lost, or a load that failed or died with its engine, is asked for again until the worker shows the
    /// model loaded. Not longer: what has left for being idle stays away.
    pub(super) fn preload_again(&mut self, now: Moment) {
        let mut preloads = std::mem::take(&mut self.preloads);
        preloads.retain(|(worker, model), preload| {
            let Some(known) = self.fleet.get(worker).filter(|known| known.ready) else { return false };
            let shown = known.heartbeat.models.iter().find(|m| m.name == *model).map(|m| m.state);
            if shown == Some(Residency::Loaded) || !self.map.preload(&self.roles, &worker.gpu_id).contains(model) {
                return false;
            }
            if shown != Some(Residency::Loading) && now.since(preload.asked) >= preload.pause {
                *preload = Preload { asked: now.mono, pause: (preload.pause * 2).min(PRELOAD_PAUSE) };
                self.effect(Effect::Prewarm { worker: worker.clone(), model: model.clone() });
            }
            true
        });
        self.preloads = preloads;
    }

    /// An engine that died took its models with it.
    pub(super) fn preload_after_restart(&mut self, worker: &WorkerName, now: Moment) {
        for model in self.map.preload(&self.roles, &worker.gpu_id).to_vec() {
            let preload = Preload { asked: now.mono, pause: PRELOAD_AGAIN };
            self.preloads.entry((worker.clone(), model)).or_insert(preload);
        }
    }

    pub(super) fn services(&self, now: Moment) -> Vec<ServiceStatus> {
        if self.map.is_empty() { Vec::new() } else { self.map.status(&self.roles, &self.gpus(now.mono)) }
    }

    /// What was heard of each GPU, of all its incarnations together.
    fn gpus(&self, now: Duration) -> HashMap<GpuId, Gpu> {
        let mut gpus: HashMap<GpuId, Gpu> = HashMap::new();
        for (name, worker) in self.fleet.workers() {
            // One that runs on its CPU is no GPU for now, however alive.
            let health = match worker.health(now, &self.config) {
                WorkerHealth::Alive if has_fallen(&worker.heartbeat) => WorkerHealth::Unhealthy,
                health => health,
            };
            let sessions = worker.load.assigned().filter_map(|id| self.book.session(id));
            let jobs = self.jobs.of(&worker.jobs);
            let options = sessions.map(|s| &s.record.options).chain(jobs.map(|job| &job.record.options));
            let services = options.filter_map(|o| self.map.service_of(o.model.as_deref())).map(|s| s.number);
            let gpu = gpus.entry(name.gpu_id.clone()).or_insert_with(|| Gpu {
                gpu_id: name.gpu_id.clone(),
                health,
                works_for: BTreeSet::new(),
                cpu: worker.heartbeat.device.index.is_none(),
            });
            gpu.works_for.extend(services);
            if hope(health) < hope(gpu.health) {
                gpu.health = health;
            }
        }
        gpus
    }

    fn tell_change(&mut self, change: &Change, now: Moment) {
        let (what, gpu, service, reserve) = match change {
            Change::Failed { gpu, service, reserve } => (What::Degraded, gpu, *service, reserve.as_ref()),
            Change::StandsIn { gpu, service, reserve } => (What::Degraded, gpu, *service, Some(reserve)),
            Change::Back { gpu, service } => (What::Restored, gpu, *service, None),
        };
        let name = self.map.name(service).to_owned();
        let mut event = Event::new(Scope::Fleet, gpu.as_str(), what, now.unix_ms);
        event.gpu_id = Some(gpu.to_string());
        event.detail = serde_json::json!({ "service": name });
        if what == What::Degraded {
            event.detail["standing_in"] = reserve.map(GpuId::to_string).into();
            event.detail["cpu_workers"] = (reserve.is_none() && self.map.takes_cpus(service)).into();
            tracing::warn!(gpu = %gpu, service = name, reserve = reserve.map(tracing::field::display), "a GPU of a service cannot serve");
        } else {
            tracing::info!(gpu = %gpu, service = name, "a GPU serves again");
        }
        self.effect(Effect::Tell { event: Box::new(event), once: false });
    }
}

/// Of two incarnations the one that gives more reason to hope counts.
fn hope(health: WorkerHealth) -> u8 {
    match health {
        WorkerHealth::Alive => 0,
        WorkerHealth::Joining => 1,
        WorkerHealth::Suspect => 2,
        WorkerHealth::Draining => 3,
        WorkerHealth::Unhealthy => 4,
        WorkerHealth::Dead | WorkerHealth::Unknown => 5,
    }
}
