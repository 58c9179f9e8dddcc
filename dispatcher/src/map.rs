//! The fleet map: which GPU serves which service, and which reserve stands in for one that fails. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use voxfleet_schema::{
    fleet::{GpuRole, Role, ServiceStatus, WorkerHealth},
    id::GpuId,
};

use crate::{
    config::ServiceConfig,
    routing::{Duty, Service},
};

/// After a start nobody has been heard yet: that is no failure before this time.
const FIRST_LOOK: Duration = Duration::from_secs(5);
/// A GPU that comes back is believed once it has been alive for this long, so that one that comes and goes does not take its
/// reserve's work to and fro.
const BACK_AFTER: Duration = Duration::from_secs(10);
/// The service that takes whoever names none, where there are several.
const USUAL: &str = "asr";

/// One service, as configured.
#[derive(Debug)]
struct Entry {
    name: String,
    gpus: Vec<GpuId>,
    reserves: Vec<GpuId>,
    config: ServiceConfig,
}

/// The map as configured. Empty: every worker serves everything.
#[derive(Debug, Default)]
pub struct Map {
    services: Vec<Entry>,
    serves: HashMap<GpuId, u16>,
    reserves: HashMap<GpuId, ()>,
}

/// A GPU as it is now, its incarnations taken together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    pub gpu_id: GpuId,
    pub health: WorkerHealth,
    /// The services whose sessions and jobs it has.
    pub works_for: BTreeSet<u16>,
    /// No GPU at all.
    pub cpu: bool,
}

/// A reserve in the place of a GPU that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct StandIn {
    service: u16,
    instead_of: GpuId,
    /// That one is back: nothing new comes here, and what is here is finished.
    leaving: bool,
}

/// Who does what now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// GPUs that cannot serve, and since when they are alive again.
    out: BTreeMap<GpuId, Option<Duration>>,
    /// By reserve.
    standing_in: BTreeMap<GpuId, StandIn>,
}

/// What has changed from one look to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A GPU cannot serve; a reserve stands in for it, or none is left.
    Failed { gpu: GpuId, service: u16, reserve: Option<GpuId> },
    /// A reserve came free, or came back, for a GPU that had none.
    StandsIn { gpu: GpuId, service: u16, reserve: GpuId },
    /// The GPU serves again.
    Back { gpu: GpuId, service: u16 },
}

impl Map {
    /// `services` have been checked.
    pub fn of(services: &BTreeMap<String, ServiceConfig>) -> Self {
        let ids = |names: &[String]| -> Vec<GpuId> { names.iter().filter_map(|id| GpuId::new(id).ok()).collect() };
        let entry = |(name, config): (&String, &ServiceConfig)| Entry {
            name: name.clone(),
            gpus: ids(&config.gpus),
            reserves: ids(&config.reserves),
            config: config.clone(),
        };
        let services: Vec<Entry> = services.iter().map(entry).collect();
        let serves = services.iter().zip(0..).flat_map(|(s, n)| s.gpus.iter().map(move |gpu| (gpu.clone(), n)));
        let reserves = services.iter().flat_map(|s| s.reserves.iter().map(|gpu| (gpu.clone(), ())));
        Self { serves: serves.collect(), reserves: reserves.collect(), services }
    }

    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    pub fn name(&self, service: u16) -> &str {
        self.services.get(usize::from(service)).map_or("", |s| &s.name)
    }

    pub fn takes_cpus(&self, service: u16) -> bool {
        self.services.get(usize::from(service)).is_some_and(|s| s.config.cpu)
    }

    /// The service that whoever asks for this model belongs to: the one that lists it, else the only one, else the usual one,
    /// else the first that lists no models.
    pub fn service_of(&self, model: Option<&str>) -> Option<Service> {
        let lists = |s: &Entry| model.is_some_and(|model| s.config.models.iter().any(|m| m == model));
        let at = |what: &dyn Fn(&Entry) -> bool| self.services.iter().position(what);
        let only = (self.services.len() == 1).then_some(0);
        let found =
            at(&lists).or(only).or_else(|| at(&|s| s.name == USUAL)).or_else(|| at(&|s| s.config.models.is_empty()))?;
        let service = &self.services[found];
        let gpus = !service.gpus.is_empty() || !service.reserves.is_empty();
        Some(Service { number: found as u16, cpu: service.config.cpu, gpus })
    }

    /// Whether it names a GPU, dead or alive; `is_cpu`: names that are known to stand for something else.
    pub fn names_gpu(&self, service: u16, is_cpu: impl Fn(&GpuId) -> bool) -> bool {
        let service = self.services.get(usize::from(service));
        service.is_some_and(|s| s.gpus.iter().chain(&s.reserves).any(|gpu| !is_cpu(gpu)))
    }

    /// What a worker on this GPU may do; `cpu`: it has no GPU.
    pub fn duty(&self, roles: &Roles, gpu: &GpuId, cpu: bool) -> Duty {
        if self.is_empty() {
            return Duty::Anyone;
        }
        if let Some(service) = self.serves.get(gpu) {
            return Duty::Serves(*service);
        }
        match roles.standing_in.get(gpu) {
            Some(stands) if !stands.leaving => Duty::Serves(stands.service),
            Some(_) => Duty::Reserve,
            None if self.reserves.contains_key(gpu) => Duty::Reserve,
            None if cpu => Duty::Cpu,
            None => Duty::Nobody,
        }
    }

    /// Share of the GPU's memory that is never planned, in percent, where its service says so.
    pub fn reserve_percent(&self, roles: &Roles, gpu: &GpuId) -> Option<u8> {
        let stands = || roles.standing_in.get(gpu).map(|s| &s.service);
        let service = self.serves.get(gpu).or_else(stands)?;
        Some(100 - self.services.get(usize::from(*service))?.config.memory_limit_percent)
    }

    /// Models that a worker on this GPU is to load before anybody asks.
    pub fn preload(&self, roles: &Roles, gpu: &GpuId) -> &[String] {
        match self.duty(roles, gpu, false) {
            Duty::Serves(service) => self.services.get(usize::from(service)).map_or(&[], |s| &s.config.preload),
            _ => &[],
        }
    }

    /// Who does what now, and what of that is new. `gpus`: those that have been heard and are not dead; `listened`: how long
    /// whoever lives could be heard.
    pub fn roles(
        &self,
        gpus: &HashMap<GpuId, Gpu>,
        before: &Roles,
        now: Duration,
        listened: Duration,
    ) -> (Roles, Vec<Change>) {
        let mut next = Roles { out: self.out(gpus, before, now, listened), standing_in: BTreeMap::new() };
        // What a reserve has of another service it finishes first; what it has of this one is from before a takeover.
        let can = |gpu: &GpuId, service: u16| {
            gpus.get(gpu).is_some_and(|g| g.health == WorkerHealth::Alive && g.works_for.iter().all(|s| *s == service))
        };
        for (reserve, stands) in &before.standing_in {
            let leaving = !next.out.contains_key(&stands.instead_of);
            // One that only is silent for a moment keeps its place; one that is gone or leaves has lost it.
            let there = gpus.get(reserve).is_some_and(|g| {
                matches!(g.health, WorkerHealth::Alive | WorkerHealth::Suspect | WorkerHealth::Joining)
            });
            let busy = gpus.get(reserve).is_some_and(|g| !g.works_for.is_empty());
            if there && (!leaving || busy) {
                next.standing_in.insert(reserve.clone(), StandIn { leaving, ..stands.clone() });
            }
        }
        let mut changes = Vec::new();
        for (service, number) in self.services.iter().zip(0..) {
            for gpu in &service.gpus {
                let was_out = before.out.contains_key(gpu);
                if !next.out.contains_key(gpu) {
                    if was_out {
                        changes.push(Change::Back { gpu: gpu.clone(), service: number });
                    }
                    continue;
                }
                let has = next.standing_in.values().any(|s| s.instead_of == *gpu);
                let free = |r: &&GpuId| can(r, number) && !next.standing_in.contains_key(*r);
                // One that only finishes what it has of this service goes on instead, where nobody else is free.
                let leaving = |r: &&GpuId| {
                    can(r, number) && next.standing_in.get(*r).is_some_and(|s| s.leaving && s.service == number)
                };
                let found =
                    || service.reserves.iter().find(free).or_else(|| service.reserves.iter().find(leaving)).cloned();
                let found = if has { None } else { found() };
                if let Some(reserve) = &found {
                    let stands = StandIn { service: number, instead_of: gpu.clone(), leaving: false };
                    next.standing_in.insert(reserve.clone(), stands);
                }
                match (was_out, found) {
                    (false, reserve) => changes.push(Change::Failed { gpu: gpu.clone(), service: number, reserve }),
                    (true, Some(reserve)) => {
                        changes.push(Change::StandsIn { gpu: gpu.clone(), service: number, reserve });
                    }
                    (true, None) => {}
                }
            }
        }
        (next, changes)
    }

    /// GPUs that cannot serve.
    fn out(
        &self,
        gpus: &HashMap<GpuId, Gpu>,
        before: &Roles,
        now: Duration,
        listened: Duration,
    ) -> BTreeMap<GpuId, Option<Duration>> {
        let mut out = BTreeMap::new();
        for gpu in self.services.iter().flat_map(|s| &s.gpus) {
            let was = before.out.get(gpu);
            match gpus.get(gpu).map(|g| g.health) {
                Some(WorkerHealth::Alive) => {
                    if let Some(alive_since) = was {
                        let since = alive_since.unwrap_or(now);
                        if now.saturating_sub(since) < BACK_AFTER {
                            out.insert(gpu.clone(), Some(since));
                        }
                    }
                }
                // Not known yet what becomes of it: as before.
                Some(WorkerHealth::Joining | WorkerHealth::Suspect) => {
                    if was.is_some() {
                        out.insert(gpu.clone(), None);
                    }
                }
                None if was.is_none() && listened < FIRST_LOOK => {}
                Some(_) | None => {
                    out.insert(gpu.clone(), None);
                }
            }
        }
        out
    }

    /// The map as people are told of it.
    pub fn status(&self, roles: &Roles, gpus: &HashMap<GpuId, Gpu>) -> Vec<ServiceStatus> {
        let health = |gpu: &GpuId| gpus.get(gpu).map(|g| g.health);
        let row = |gpu: &GpuId, role, standing_in_for| GpuRole {
            gpu_id: gpu.clone(),
            role,
            health: health(gpu),
            standing_in_for,
        };
        let mut cpus: Vec<&GpuId> =
            gpus.values().filter(|g| self.duty(roles, &g.gpu_id, g.cpu) == Duty::Cpu).map(|g| &g.gpu_id).collect();
        cpus.sort();
        let status = |service: &Entry| {
            let mut rows: Vec<GpuRole> = service.gpus.iter().map(|gpu| row(gpu, Role::Serves, None)).collect();
            rows.extend(service.reserves.iter().map(|gpu| match roles.standing_in.get(gpu) {
                Some(stands) => row(gpu, Role::StandingIn, Some(stands.instead_of.clone())),
                None => row(gpu, Role::Reserve, None),
            }));
            if service.config.cpu {
                rows.extend(cpus.iter().map(|gpu| row(gpu, Role::Cpu, None)));
            }
            ServiceStatus {
                service: service.name.clone(),
                gpus: rows,
                memory_limit_percent: service.config.memory_limit_percent,
                preload: service.config.preload.clone(),
            }
        };
        self.services.iter().map(status).collect()
    }
}

#[cfg(test)]
mod tests;
