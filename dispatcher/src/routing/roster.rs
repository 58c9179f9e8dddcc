//! What routing looks at, worked out when it changes: with each heartbeat and assignment, not with each decision.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use voxfleet_schema::{
    fleet::{Heartbeat, WorkerHealth},
    id::{GpuId, WorkerName},
    transcript::{SpeakersBy, VadKind},
};

use super::fit::{self, Names, Shelf, Standing};
use crate::config::DispatcherConfig;

/// A decode rate older than this says nothing about now.
const DECODE_RATE_FRESH_MS: u64 = 60_000;
/// Share of a device's memory that other tenants may use before it counts against the device, in per mille.
const PRESSURE_FROM: u64 = 850;

/// Place of a worker in the roster, good until a worker joins or leaves.
pub type Slot = usize;

/// What the fleet map makes of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Duty {
    /// There is no map.
    #[default]
    Anyone,
    /// One service, by its place in the map.
    Serves(u16),
    /// Services that take CPUs.
    Cpu,
    /// A reserve that stands in for nobody now.
    Reserve,
    /// The map does not name it.
    Nobody,
}

/// One worker as it is now.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    pub name: &'a WorkerName,
    pub heartbeat: &'a Heartbeat,
    pub health: WorkerHealth,
    /// When it is suspect unless it is heard again, on the clock of decisions.
    pub suspect_at: Duration,
    /// A newer incarnation runs on its GPU.
    pub superseded: bool,
    /// Slots taken, the dispatcher's own pending assignments included.
    pub sessions: u32,
    pub jobs: u32,
    /// Models that those need whom it was given; none = its default.
    pub promised: &'a [Option<&'a str>],
    pub duty: Duty,
    /// Share of the device's memory that is never planned, in percent.
    pub reserve_percent: u8,
}

/// Slots of one kind on a GPU: those of its incarnations together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) used: u32,
    pub(super) slots: u32,
}

impl Places {
    pub(super) fn is_full(self) -> bool {
        self.used >= self.slots
    }

    pub(super) fn free(self) -> u32 {
        self.slots.saturating_sub(self.used)
    }
}

/// What a decision reads of each worker. It runs over all of them: no text, nothing to look up.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) health: WorkerHealth,
    suspect_at: Duration,
    pub(super) superseded: bool,
    /// Other incarnations run on its GPU.
    pub(super) shared: bool,
    pub(super) cpu: bool,
    /// It has a GPU and runs on the CPU all the same.
    pub(super) fallen: bool,
    pub(super) hot: bool,
    /// Other tenants have grown into what it uses.
    pub(super) pressed: bool,
    /// It decodes slower than speech under the work it has.
    pub(super) slow: bool,
    pub(super) vad: VadKind,
    pub(super) speakers: bool,
    pub(super) duty: Duty,
    own: [Places; 2],
    /// Of sessions and of jobs, with those of the GPU's other incarnations.
    places: [Places; 2],
    pub(super) pressure: u32,
    /// It has some model loaded.
    pub(super) any_loaded: bool,
    /// Place in the order that decides between equals.
    pub(super) rank: u32,
    pub(super) free_mb: u64,
    pub(super) total_mb: u64,
    pub(super) reserve_mb: u64,
    /// What may be given out of it now.
    pub(super) room_mb: u64,
    pub(super) promised_mb: u64,
    pub(super) shelf: Shelf,
}

impl Row {
    pub(super) fn health(&self, now: Duration) -> WorkerHealth {
        if now >= self.suspect_at { WorkerHealth::Suspect } else { self.health }
    }

    pub(super) fn places(&self, live: bool) -> Places {
        self.places[usize::from(!live)]
    }

    /// Whether somebody who found no room before may find it now, `before` being the same worker earlier.
    fn offers_more(&self, before: &Self) -> bool {
        let same = |a: &Self, b: &Self| {
            let key = |r: &Self| (r.health, r.superseded, r.cpu, r.hot, r.pressed, r.slow, r.vad, r.speakers, r.duty);
            key(a) == key(b) && a.shelf == b.shelf
        };
        let freed = (0..2).any(|kind| self.places[kind].free() > before.places[kind].free());
        let any_free = self.places.iter().any(|p| p.free() > 0);
        self.health == WorkerHealth::Alive && any_free && (freed || before.shared != self.shared || !same(self, before))
    }
}

/// What is needed of a worker only to name it and to put it in order.
#[derive(Debug)]
pub(super) struct Who {
    pub(super) name: WorkerName,
    pub(super) host: String,
    index: Option<u32>,
    /// What its card is called, by its driver, the same in every container that sees it.
    card: Option<String>,
    pub(super) seq: u64,
}

impl Who {
    fn key(&self) -> (&str, Option<u32>, &WorkerName) {
        (&self.host, self.index, &self.name)
    }
}

#[derive(Debug, Default)]
pub struct Roster {
    pub(super) rows: Vec<Row>,
    pub(super) who: Vec<Who>,
    at: HashMap<WorkerName, Slot>,
    /// Slots in order of [`Who::key`].
    order: Vec<Slot>,
    gpus: HashMap<GpuId, BTreeSet<WorkerName>>,
    /// Whose memory is one: workers on one card, whatever they and their hosts are called: two containers on one machine are
    /// two hosts.
    cards: HashMap<String, BTreeSet<WorkerName>>,
    /// Everybody ever heard, by GPU: whether there is a device. A GPU that has died is still one that the fleet has.
    devices: HashMap<GpuId, bool>,
    pub(super) any_gpu: bool,
    pub(super) names: Names,
}

impl Roster {
    /// Every worker of a fleet without a map, alive and without anything under way: what a bench needs.
    pub fn of<'a>(beats: impl IntoIterator<Item = &'a Heartbeat>, config: &DispatcherConfig) -> Self {
        let mut roster = Self::default();
        for heartbeat in beats {
            roster.put(
                Seen {
                    name: &heartbeat.worker(),
                    heartbeat,
                    health: WorkerHealth::Alive,
                    suspect_at: Duration::MAX,
                    superseded: false,
                    sessions: heartbeat.slots.used,
                    jobs: heartbeat.job_slots.used,
                    promised: &[],
                    duty: Duty::Anyone,
                    reserve_percent: config.reserve_percent,
                },
                config,
            );
        }
        roster
    }

    /// Takes in how a worker is now. True: somebody who found no room before may find it now.
    pub fn put(&mut self, seen: Seen<'_>, config: &DispatcherConfig) -> bool {
        let row = self.row(&seen, config);
        self.remember(&seen.name.gpu_id, seen.heartbeat.device.index.is_some());
        let (host, index) = (&seen.heartbeat.host, seen.heartbeat.device.index);
        let card = seen.heartbeat.device.uuid.clone();
        let known = self.at.get(seen.name).copied();
        // Whoever changes its place in the order, or its card, is a new one.
        let same = |who: &Who| who.host == *host && who.index == index && who.card == card;
        let known = known.filter(|slot| same(&self.who[*slot]));
        let before = match known {
            Some(slot) => {
                self.who[slot].seq = seen.heartbeat.seq;
                let rank = self.rows[slot].rank;
                Some(std::mem::replace(&mut self.rows[slot], Row { rank, ..row }))
            }
            None => {
                self.remove(seen.name);
                let name = seen.name.clone();
                self.insert(row, Who { name, host: host.clone(), index, card, seq: seen.heartbeat.seq });
                None
            }
        };
        let others = self.share(seen.name);
        let now = self.at.get(seen.name).map(|slot| &self.rows[*slot]);
        others || now.is_some_and(|row| before.is_none_or(|before| row.offers_more(&before)))
    }

    fn row(&mut self, seen: &Seen<'_>, config: &DispatcherConfig) -> Row {
        let beat = seen.heartbeat;
        let device = &beat.device;
        let others = device.used_by_others_mb.saturating_mul(1_000) / device.total_mb.max(1);
        let rate = beat.engine.decode_rate.zip(beat.engine.decode_rate_age_ms);
        let slow = rate.is_some_and(|(rate, age)| age < DECODE_RATE_FRESH_MS && rate < config.min_decode_rate);
        let own = [
            Places { used: seen.sessions, slots: beat.slots.total },
            Places { used: seen.jobs, slots: beat.job_slots.total },
        ];
        let shelf = Shelf::of(beat, seen.promised, &mut self.names);
        // What its card reports is of a device that it does not run on: no memory to plan with, its worker has the last word.
        let fallen = fit::has_fallen(beat);
        let (total_mb, free_mb) = if fallen { (0, 0) } else { (device.total_mb, device.free_mb) };
        Row {
            health: seen.health,
            suspect_at: seen.suspect_at,
            superseded: seen.superseded,
            shared: false,
            cpu: fit::is_cpu(beat),
            fallen,
            pressed: !fallen && device.pressure.is_some(),
            hot: !fallen && device.temperature_c.is_some_and(|t| t >= config.max_temperature_c),
            // What it measured under work that is gone says nothing of a worker that is idle.
            slow: slow && seen.sessions + seen.jobs > 0,
            vad: beat.engine.vad,
            speakers: !matches!(beat.engine.speakers, SpeakersBy::None | SpeakersBy::Unknown),
            duty: seen.duty,
            own,
            places: own,
            pressure: if fallen { 0 } else { others.saturating_sub(PRESSURE_FROM) as u32 },
            any_loaded: shelf.models.iter().any(|m| m.standing == Standing::Loaded),
            rank: 0,
            free_mb,
            total_mb,
            reserve_mb: total_mb.saturating_mul(seen.reserve_percent.into()) / 100,
            room_mb: 0,
            promised_mb: shelf.promised_mb(),
            shelf,
        }
    }

    /// A worker on this GPU was heard, here or by a predecessor; `device`: it is a GPU.
    pub fn remember(&mut self, gpu: &GpuId, device: bool) {
        self.any_gpu |= device;
        match self.devices.get_mut(gpu) {
            Some(known) => *known |= device,
            None => drop(self.devices.insert(gpu.clone(), device)),
        }
    }

    /// Whoever was heard under this name has no GPU.
    pub fn is_cpu(&self, gpu: &GpuId) -> bool {
        self.devices.get(gpu) == Some(&false)
    }

    /// A worker is gone. True: it had left less room for others on its GPU.
    pub fn remove(&mut self, name: &WorkerName) -> bool {
        let Some(slot) = self.at.remove(name) else {
            return false;
        };
        self.rows.swap_remove(slot);
        let card = self.who.swap_remove(slot).card;
        self.order.retain(|other| *other != slot);
        if slot < self.who.len() {
            let moved = self.who.len();
            self.at.insert(self.who[slot].name.clone(), slot);
            if let Some(other) = self.order.iter_mut().find(|other| **other == moved) {
                *other = slot;
            }
        }
        self.number();
        let neighbour = card.and_then(|card| leave(&mut self.cards, &card, name));
        let twin = leave(&mut self.gpus, &name.gpu_id, name);
        for other in [&twin, &neighbour].into_iter().flatten() {
            self.share(other);
        }
        twin.is_some() || neighbour.is_some()
    }

    fn insert(&mut self, row: Row, who: Who) {
        let slot = self.rows.len();
        let at = self.order.partition_point(|other| self.who[*other].key() < who.key());
        self.order.insert(at, slot);
        self.at.insert(who.name.clone(), slot);
        self.gpus.entry(who.name.gpu_id.clone()).or_default().insert(who.name.clone());
        if let Some(card) = &who.card {
            self.cards.entry(card.clone()).or_default().insert(who.name.clone());
        }
        self.rows.push(row);
        self.who.push(who);
        self.number();
    }

    fn number(&mut self) {
        for (rank, slot) in (0..).zip(&self.order) {
            self.rows[*slot].rank = rank;
        }
    }

    /// Incarnations on one GPU have one set of slots between them, and all workers on one card one memory: what one was
    /// promised is not there for the other, whichever's heartbeat is the older. True: there is more for one of the others.
    fn share(&mut self, name: &WorkerName) -> bool {
        let slots_of = |names: Option<&BTreeSet<WorkerName>>| -> Vec<Slot> {
            names.into_iter().flatten().filter_map(|name| self.at.get(name).copied()).collect()
        };
        let Some(own) = self.at.get(name).copied() else {
            return false;
        };
        let twins = slots_of(self.gpus.get(&name.gpu_id));
        let mut neighbours = slots_of(self.who[own].card.as_ref().and_then(|card| self.cards.get(card)));
        neighbours.extend(twins.iter().filter(|slot| !neighbours.contains(slot)).copied().collect::<Vec<_>>());
        let rows = |slots: &[Slot]| slots.iter().map(|slot| &self.rows[*slot]).collect::<Vec<_>>();
        let places = [0, 1].map(|kind| Places {
            used: rows(&twins).iter().map(|r| r.own[kind].used).sum(),
            slots: rows(&twins).iter().map(|r| r.own[kind].slots).max().unwrap_or(0),
        });
        // Who has fallen back takes nothing of the card and knows nothing of it.
        let on_card = || neighbours.iter().map(|slot| &self.rows[*slot]).filter(|row| !row.fallen);
        let free_mb = on_card().map(|r| r.free_mb).min().unwrap_or(0);
        let promised_mb: u64 = on_card().map(|r| r.promised_mb).sum();
        for slot in &twins {
            let row = &mut self.rows[*slot];
            row.shared = twins.len() > 1;
            row.places = places;
        }
        let mut more = false;
        for slot in neighbours {
            let row = &mut self.rows[slot];
            let room_mb = free_mb.saturating_sub(row.reserve_mb).saturating_sub(promised_mb);
            row.room_mb = room_mb;
            let fits = row.shelf.measure((row.total_mb > 0).then_some((row.total_mb - row.reserve_mb, room_mb)));
            more |= fits && slot != own;
        }
        more
    }

    pub fn slot(&self, name: &WorkerName) -> Option<Slot> {
        self.at.get(name).copied()
    }

    pub fn name(&self, slot: Slot) -> &WorkerName {
        &self.who[slot].name
    }

    /// Number of its last heartbeat.
    pub fn seq(&self, slot: Slot) -> u64 {
        self.who[slot].seq
    }

    /// As it was when it was last put in.
    pub fn health(&self, name: &WorkerName) -> Option<WorkerHealth> {
        self.slot(name).map(|slot| self.rows[slot].health)
    }

    /// Its incarnations.
    pub fn on_gpu(&self, gpu: &GpuId) -> impl Iterator<Item = &WorkerName> {
        self.gpus.get(gpu).into_iter().flatten()
    }

    pub(super) fn others_on_gpu(&self, slot: Slot) -> impl Iterator<Item = Slot> {
        let name = &self.who[slot].name;
        self.on_gpu(&name.gpu_id).filter(move |other| *other != name).filter_map(|other| self.slot(other))
    }

    /// One worker of all on its card, the same for each of them.
    pub(super) fn first_on_card(&self, slot: Slot) -> Slot {
        let on_card = self.who[slot].card.as_ref().and_then(|card| self.cards.get(card));
        on_card.into_iter().flatten().find_map(|name| self.slot(name)).unwrap_or(slot)
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Free slots of the alive, of those for live sessions or of those for jobs.
    pub fn free(&self, live: bool, now: Duration) -> u32 {
        self.open(now).map(|r| r.places(live).free()).sum()
    }

    /// Slots of that kind in all, of whoever is alive.
    pub fn slots(&self, live: bool, now: Duration) -> u32 {
        self.open(now).map(|r| r.places(live).slots).sum()
    }

    /// Those that take new work at all, one for each GPU.
    fn open(&self, now: Duration) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |r| {
            let works = !matches!(r.duty, Duty::Reserve | Duty::Nobody);
            works && r.health(now) == WorkerHealth::Alive && !(r.shared && r.superseded)
        })
    }
}

/// Takes a name out of a group; whoever is left there, one of them.
fn leave<K: Eq + std::hash::Hash>(
    groups: &mut HashMap<K, BTreeSet<WorkerName>>,
    key: &K,
    name: &WorkerName,
) -> Option<WorkerName> {
    let names = groups.get_mut(key)?;
    names.remove(name);
    let left = names.first().cloned();
    if left.is_none() {
        groups.remove(key);
    }
    left
}
