//! A board as pages read it. Pure.
//!
//! A tile stands for one incarnation on one GPU. The dead keep their last tile until another incarnation of their GPU is heard
//! or their verdict is forgotten, so that whoever looks sees what is missing.

use std::{collections::HashMap, collections::HashSet, sync::Arc};

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};
use voxfleet_schema::{
    device::{EngineEnd, Standby},
    fleet::{DrainNotice, EngineRunState, FleetStatus, Heartbeat, ModelState, Provider, Residency, Role, WorkerHealth},
    fleet::{ServiceStatus, WorkerStatus},
    id::{GpuId, WorkerName},
};

use super::board::Board;

/// One worker on one GPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Tile {
    pub(crate) gpu_id: GpuId,
    pub(crate) incarnation: String,
    pub(crate) state: WorkerHealth,
    pub(crate) heartbeat_age_ms: u64,
    pub(crate) host: String,
    pub(crate) provider: Provider,
    pub(crate) device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) device_index: Option<u32>,
    /// It has no GPU.
    pub(crate) cpu: bool,
    pub(crate) total_mb: u64,
    pub(crate) free_mb: u64,
    pub(crate) used_mb: u64,
    pub(crate) others_mb: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) temperature_c: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) utilization_percent: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) power_w: Option<u32>,
    pub(crate) slots: u32,
    pub(crate) slots_used: u32,
    pub(crate) job_slots: u32,
    pub(crate) job_slots_used: u32,
    pub(crate) models: Vec<TileModel>,
    pub(crate) engine: TileEngine,
    pub(crate) standbys: Vec<TileStandby>,
    pub(crate) services: Vec<TileService>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) drain: Option<DrainNotice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) price_per_hour: Option<f64>,
    pub(crate) version: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TileModel {
    pub(crate) name: String,
    pub(crate) state: Residency,
    pub(crate) resident_mb: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) load_percent: Option<u8>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TileEngine {
    pub(crate) state: EngineRunState,
    pub(crate) kind: String,
    pub(crate) effective_device: String,
    pub(crate) silence_ms: u64,
    pub(crate) restarts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) decode_rate: Option<f32>,
    pub(crate) idle_timeout_s: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ms_since_activity: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_end: Option<EngineEnd>,
    #[serde(skip)]
    pub(crate) ends: std::collections::BTreeMap<voxfleet_schema::failure::FailureClass, u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TileStandby {
    pub(crate) asked: String,
    pub(crate) model: String,
    pub(crate) device: String,
    pub(crate) why: &'static str,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TileService {
    pub(crate) service: String,
    pub(crate) role: Role,
}

impl Tile {
    fn of(worker: &WorkerStatus, services: &[TileService]) -> Tile {
        let beat = &worker.heartbeat;
        let (device, engine) = (&beat.device, &beat.engine);
        let model = |m: &ModelState| TileModel {
            name: m.name.clone(),
            state: m.state,
            resident_mb: m.resident_mb,
            load_percent: m.load_percent,
        };
        let standby = |s: &Standby| TileStandby {
            asked: s.asked.clone(),
            model: s.model.clone(),
            device: s.device.clone(),
            why: s.class.as_str(),
        };
        Tile {
            gpu_id: beat.gpu_id.clone(),
            incarnation: beat.incarnation.to_string(),
            state: worker.health,
            heartbeat_age_ms: worker.ms_since_heartbeat,
            host: beat.host.clone(),
            provider: beat.provider,
            device: device.name.clone(),
            device_index: device.index,
            cpu: device.uuid.is_none() && device.index.is_none(),
            total_mb: device.total_mb,
            free_mb: device.free_mb,
            used_mb: device.used_mb,
            others_mb: device.used_by_others_mb,
            temperature_c: device.temperature_c,
            utilization_percent: device.utilization.map(|share| (share * 100.0).round() as u32),
            power_w: device.power_w.map(|watts| watts.round() as u32),
            slots: beat.slots.total,
            slots_used: beat.slots.used,
            job_slots: beat.job_slots.total,
            job_slots_used: beat.job_slots.used,
            models: beat.models.iter().map(model).collect(),
            engine: TileEngine {
                state: engine.state,
                kind: engine.kind.clone(),
                effective_device: engine.effective_device.clone(),
                silence_ms: engine.ms_since_progress,
                restarts: engine.restarts,
                decode_rate: engine.decode_rate,
                idle_timeout_s: engine.idle_timeout_s,
                ms_since_activity: engine.ms_since_activity,
                last_end: engine.last_end.clone(),
                ends: engine.ends.clone(),
            },
            standbys: engine.standbys.iter().map(standby).collect(),
            services: services.to_vec(),
            drain: beat.drain.clone(),
            price_per_hour: beat.price_per_hour,
            version: beat.version.clone(),
        }
    }

    /// Of somebody who said this last.
    pub(crate) fn last_of(heartbeat: Heartbeat, ms_since_heartbeat: u64) -> Tile {
        Tile::of(&WorkerStatus { health: WorkerHealth::Dead, ms_since_heartbeat, heartbeat }, &[])
    }

    /// What a page knows it by.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.gpu_id, self.incarnation)
    }

    /// Whether a page has to be told. A heartbeat's age in ordinary times is not worth a message: that it grows is.
    fn is_news(&self, before: &Tile) -> bool {
        let quiet = |tile: &Tile| Tile {
            heartbeat_age_ms: tile.heartbeat_age_ms / 1_500,
            engine: TileEngine { ms_since_activity: None, ..tile.engine.clone() },
            ..tile.clone()
        };
        quiet(self) != quiet(before)
    }
}

/// The dead whose GPU no tile shows: of each GPU the one that died last.
pub(crate) fn unknown_dead<'a>(fleet: &'a FleetStatus, before: &[Arc<Tile>]) -> Vec<&'a WorkerName> {
    let living = fleet.workers.iter().map(|worker| &worker.heartbeat.gpu_id);
    let mut shown: HashSet<&GpuId> = living.chain(before.iter().map(|tile| &tile.gpu_id)).collect();
    // The newest verdicts come first.
    fleet.dead.iter().filter(|name| shown.insert(&name.gpu_id)).collect()
}

/// Tiles of everybody heard, in the order of the fleet, and of the dead behind them.
pub(crate) fn tiles(fleet: &FleetStatus, before: &[Arc<Tile>]) -> Vec<Arc<Tile>> {
    let services = services(&fleet.services);
    let none = Vec::new();
    let mut tiles: Vec<Arc<Tile>> = fleet
        .workers
        .iter()
        .map(|worker| Arc::new(Tile::of(worker, services.get(&worker.heartbeat.gpu_id).unwrap_or(&none))))
        .collect();
    let living: HashSet<GpuId> = tiles.iter().map(|tile| tile.gpu_id.clone()).collect();
    let verdicts: HashMap<String, &WorkerName> = fleet.dead.iter().map(|name| (name.to_string(), name)).collect();
    for tile in before {
        let name = format!("{}.{}", tile.gpu_id, tile.incarnation);
        if !living.contains(&tile.gpu_id) && verdicts.contains_key(&name) {
            let dead = Tile { state: WorkerHealth::Dead, slots_used: 0, job_slots_used: 0, ..Tile::clone(tile) };
            tiles.push(Arc::new(dead));
        }
    }
    tiles
}

fn services(services: &[ServiceStatus]) -> HashMap<GpuId, Vec<TileService>> {
    let mut found: HashMap<GpuId, Vec<TileService>> = HashMap::new();
    for service in services {
        for gpu in &service.gpus {
            let role = TileService { service: service.service.clone(), role: gpu.role };
            found.entry(gpu.gpu_id.clone()).or_default().push(role);
        }
    }
    found
}

/// How many are in each state, all states named.
pub(crate) fn states(tiles: &[Arc<Tile>]) -> [(&'static str, usize); 6] {
    use WorkerHealth::*;
    [
        ("joining", Joining),
        ("alive", Alive),
        ("suspect", Suspect),
        ("dead", Dead),
        ("draining", Draining),
        ("unhealthy", Unhealthy),
    ]
    .map(|(name, state)| (name, tiles.iter().filter(|tile| tile.state == state).count()))
}

fn totals(board: &Board) -> Value {
    let (tiles, fleet) = (&board.tiles, &board.fleet);
    let sum =
        |figure: fn(&Tile) -> u64| tiles.iter().filter(|t| t.state != WorkerHealth::Dead).map(|t| figure(t)).sum();
    let (slots, slots_used): (u64, u64) = (sum(|t| t.slots.into()), sum(|t| t.slots_used.into()));
    let (job_slots, job_slots_used): (u64, u64) = (sum(|t| t.job_slots.into()), sum(|t| t.job_slots_used.into()));
    let (total_mb, used_mb): (u64, u64) = (sum(|t| t.total_mb), sum(|t| t.used_mb));
    let price: f64 = tiles.iter().filter_map(|tile| tile.price_per_hour).sum();
    let mut totals = json!({
        "gpus": tiles.len(), "slots": slots, "slots_used": slots_used, "job_slots": job_slots,
        "job_slots_used": job_slots_used, "sessions_waiting": fleet.sessions_waiting,
        "sessions_assigned": fleet.sessions_assigned, "jobs_queued": fleet.jobs_queued,
        "jobs_assigned": fleet.jobs_assigned, "dead_letters": dead_letters(board),
        "memory_total_mb": total_mb, "memory_used_mb": used_mb,
    });
    if price > 0.0 {
        totals["price_per_hour"] = json!(price);
    }
    for (name, count) in states(tiles) {
        totals[name] = json!(count);
    }
    totals
}

pub(crate) fn dead_letters(board: &Board) -> u64 {
    board.streams.iter().find(|usage| usage.stream == DEAD).map_or(0, |usage| usage.messages)
}

const DEAD: &str = "ASR_DEAD";

/// Everything, for somebody who has nothing yet.
pub(crate) fn full(board: &Board) -> Value {
    let stream = |u: &voxfleet_nats::topology::Usage| json!({ "stream": u.stream, "bytes": u.bytes, "max_bytes": u.max_bytes, "messages": u.messages });
    let mut nats = json!({ "connected": board.rtt.is_some() });
    if let Some(rtt) = board.rtt {
        nats["rtt_ms"] = json!((rtt.as_secs_f64() * 1e5).round() / 100.0);
    }
    let mut view = json!({
        "at_ms": board.at_ms, "dispatcher": board.fleet.dispatcher, "active": board.active, "nats": nats,
        "totals": totals(board), "gpus": board.tiles, "streams": board.streams.iter().map(stream).collect::<Vec<_>>(),
    });
    if let Some(why) = &board.fleet.verdicts_wait {
        view["verdicts_wait"] = json!(why);
    }
    view
}

/// What changed since `before`, as JSON; `full` is false.
pub(crate) fn news(board: &Board, before: &[Arc<Tile>]) -> Bytes {
    let known: HashMap<String, &Arc<Tile>> = before.iter().map(|tile| (tile.name(), tile)).collect();
    let names: HashSet<String> = board.tiles.iter().map(|tile| tile.name()).collect();
    let changed: Vec<&Arc<Tile>> =
        board.tiles.iter().filter(|tile| known.get(&tile.name()).is_none_or(|before| tile.is_news(before))).collect();
    let gone: Vec<&String> = known.keys().filter(|name| !names.contains(*name)).collect();
    let mut view = full(board);
    if let Some(object) = view.as_object_mut() {
        object.insert("full".to_owned(), json!(false));
        object.insert("gpus".to_owned(), json!(changed));
        object.insert("gone".to_owned(), json!(gone));
    }
    Bytes::from(view.to_string())
}

/// `GET /gpu-status`, in the words that clients of other servers know.
pub(crate) fn gpu_status(board: &Board) -> Value {
    let live: Vec<&Arc<Tile>> = board.tiles.iter().filter(|tile| tile.state != WorkerHealth::Dead).collect();
    let gb = |mb: u64| (mb as f64 / 1024.0 * 100.0).round() / 100.0;
    let gpu = |tile: &&Arc<Tile>| {
        json!({
            "gpu_id": tile.gpu_id, "state": tile.state, "active_connections": tile.slots_used,
            "max_connections": tile.slots, "allocated_memory_gb": gb(tile.used_mb),
            "free_memory_gb": gb(tile.free_mb), "total_memory_gb": gb(tile.total_mb),
            "other_tenants_memory_gb": gb(tile.others_mb), "utilization_percent": tile.utilization_percent,
            "temperature_c": tile.temperature_c, "jobs": tile.job_slots_used, "device": tile.device,
        })
    };
    json!({
        "total_gpus": live.len(),
        "total_connections": live.iter().map(|tile| u64::from(tile.slots_used)).sum::<u64>(),
        "max_connections_per_gpu": live.iter().map(|tile| tile.slots).max().unwrap_or(0),
        "gpus": live.iter().map(gpu).collect::<Vec<_>>(),
    })
}
