//! What workers tell the fleet, and what the fleet tells workers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use crate::device::Device;
use crate::{
    device::{EngineEnd, Standby},
    failure::{Failure, FailureClass},
    id::{GpuId, Incarnation, Kind, StreamId, WorkerName},
    job::JobProgress,
    nought,
    session::SessionOptions,
    trace::TraceContext,
    transcript::{SpeakersBy, VadKind},
};

/// Where a worker is rented.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provider {
    VastAi,
    #[serde(rename = "runpod")]
    RunPod,
    Lambda,
    Local,
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    pub total: u32,
    pub used: u32,
}

/// One session or job this incarnation works on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub kind: Kind,
    pub id: StreamId,
    pub epoch: u64,
    /// Last log entry handed to the engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_audio_seq: Option<u64>,
    /// Last final stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub final_index: Option<u64>,
    /// Logged minus decoded, in ms; none of a job, and from older workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_ms: Option<u64>,
    /// Of a job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<JobProgress>,
    /// The engine crashed while it decoded this; until it has passed, it is decoded alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspect: bool,
    /// How often the engine crashed on its present window while nothing else was decoded.
    #[serde(default, skip_serializing_if = "nought")]
    pub crashes: u32,
    /// First sample of that window: once a final has gone beyond it, nothing is left of the suspicion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspect_from: Option<u64>,
    /// It had better be on another worker, if one has room. Either one more crash would set the window aside, and only this
    /// worker has tried it: it waits some seconds before it does so again, for the last try is to be another's. Or other tenants
    /// have grown on the device ([`crate::device::Pressure::MoveAway`]): then one session at a time, which goes on meanwhile.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub elsewhere: bool,
}

/// A job this incarnation was given and let go without finishing it. Said in each heartbeat until the dispatcher's answer
/// (another epoch, or the end) makes it old, at most a minute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    pub kind: Kind,
    pub id: StreamId,
    pub epoch: u64,
    pub failure: Failure,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residency {
    /// Its file is here.
    #[default]
    Available,
    Loading,
    Loaded,
    /// The device had no memory for it; tried again later.
    NoRoom,
    /// Its file is on its way.
    Fetching,
    /// Its file is not here and cannot be fetched now.
    Missing,
    Failed,
    #[serde(other)]
    Unknown,
}

/// An engine, as finals and heartbeats name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EngineName {
    WhisperCpp,
    Ct2,
    Simulated,
}

impl EngineName {
    pub const ALL: [Self; 3] = [Self::WhisperCpp, Self::Ct2, Self::Simulated];

    /// None: nobody's, or one of a newer version.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|engine| engine.as_str() == name)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::WhisperCpp => "whisper_cpp",
            Self::Ct2 => "ct2",
            Self::Simulated => "simulated",
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelState {
    pub name: String,
    /// The engine that runs it; none: that of its worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    pub state: Residency,
    /// Measured after load; 0 when not loaded.
    pub resident_mb: u64,
    /// What loading it will take with all decode states, measured on this device or from its file.
    #[serde(default)]
    pub expected_mb: u64,
    /// `expected_mb` was measured here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub measured: bool,
    /// How long its load took, or has taken so far, in ms; none when it is not loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_ms: Option<u64>,
    /// How much of its file a load has read; none when it is not being loaded, and while nothing is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_percent: Option<u8>,
    /// Why it cannot be used now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineRunState {
    /// No child process: nothing loaded, 0 MB on the device.
    #[default]
    Down,
    Starting,
    Ready,
    /// It died and is being started again.
    Restarting,
    /// It cannot be started.
    Failed,
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineState {
    pub state: EngineRunState,
    /// `whisper_cpp`, `ct2`, `simulated`, or `auto`: each model says which runs it.
    pub kind: String,
    /// The device it really runs on: `cpu` or `cuda:<name>`.
    pub effective_device: String,
    pub vad: VadKind,
    /// How it tells speakers apart.
    #[serde(default)]
    pub speakers: SpeakersBy,
    /// Since it last moved forward; 0 when it has no work.
    pub ms_since_progress: u64,
    pub restarts: u32,
    /// What speaks against the device within the last ten minutes: stretches of audio that killed the engine alone, and deaths
    /// that none of them explains.
    #[serde(default, skip_serializing_if = "nought")]
    pub crashes: u32,
    /// Audio seconds decoded per second of decoding in one state, partials included, sustained; none before the first decode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_rate: Option<f32>,
    /// Age of that figure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_rate_age_ms: Option<u64>,
    /// Audio seconds that finals cover, per second with work: what the device delivers, partials and everything that waits in
    /// between included. None before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivery_rate: Option<f32>,
    /// A neighbour has held the device's lock for so long, and nothing is decoded meanwhile; 0 = it does not, or not for long.
    #[serde(default, skip_serializing_if = "nought")]
    pub neighbour_ms: u64,
    /// Without work for so long it ends and leaves 0 MB on its device, in s; 0 = never.
    #[serde(default)]
    pub idle_timeout_s: u64,
    /// Since it last had work, in ms; none while it has some, or is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ms_since_activity: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<EngineEnd>,
    /// Such ends since its worker began, by class; a class that has not come is missing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ends: BTreeMap<FailureClass, u32>,
    /// What runs in place of what was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub standbys: Vec<Standby>,
}

/// Why and until when a worker takes nothing new.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainNotice {
    /// `sigterm`, `asked`, or what announced the preemption.
    pub why: String,
    /// Unix time in ms, by the worker's clock: it is gone by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ms: Option<u64>,
}

/// Sent each second on `asr.v1.heartbeat.<gpu_id>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    pub gpu_id: GpuId,
    pub incarnation: Incarnation,
    /// Counts from 0 within an incarnation.
    pub seq: u64,
    /// Unix time in ms, by the worker's clock.
    pub sent_ms: u64,
    /// Unix time in ms at which this incarnation got its name: of two on one GPU the later is the newer.
    #[serde(default)]
    pub started_ms: u64,
    /// Time from one heartbeat to the next, in ms; 0 from older workers, which beat each second.
    #[serde(default, skip_serializing_if = "nought")]
    pub beat_ms: u32,
    pub host: String,
    pub pid: u32,
    pub provider: Provider,
    pub device: Device,
    pub slots: Slots,
    /// Job slots: `max_ack_pending` of its `ASR_WORK` consumer.
    pub job_slots: Slots,
    pub held: Vec<Held>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given_up: Vec<GivenUp>,
    pub models: Vec<ModelState>,
    /// The model of those that name none; none from older workers, and from those without a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_model: Option<String>,
    pub engine: EngineState,
    pub draining: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainNotice>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
    pub version: String,
}

/// Far above what a device, a worker or a clock can say, and far below where sums of it overflow: 1 EB in MB, 34 years in ms.
const MOST_MB: u64 = 1 << 40;
const MOST_MS: u64 = 1 << 40;
const MOST_SLOTS: u32 = 1 << 16;

impl Heartbeat {
    /// The engine that runs a model of it.
    pub fn engine_of(&self, model: &ModelState) -> Option<EngineName> {
        EngineName::of(model.engine.as_deref().unwrap_or(&self.engine.kind))
    }

    /// A figure that nothing can have, by its name: who sends it is broken or hostile, and must not be reckoned with.
    pub fn impossible(&self) -> Option<&'static str> {
        let (device, engine) = (&self.device, &self.engine);
        let figures = [
            ("device.total_mb", device.total_mb, MOST_MB),
            ("device.free_mb", device.free_mb, MOST_MB),
            ("device.used_mb", device.used_mb, MOST_MB),
            ("device.used_by_others_mb", device.used_by_others_mb, MOST_MB),
            ("slots.total", self.slots.total.into(), MOST_SLOTS.into()),
            ("slots.used", self.slots.used.into(), MOST_SLOTS.into()),
            ("job_slots.total", self.job_slots.total.into(), MOST_SLOTS.into()),
            ("job_slots.used", self.job_slots.used.into(), MOST_SLOTS.into()),
            ("engine.ms_since_progress", engine.ms_since_progress, MOST_MS),
            ("engine.ms_since_activity", engine.ms_since_activity.unwrap_or(0), MOST_MS),
            ("engine.idle_timeout_s", engine.idle_timeout_s, MOST_MS),
            ("engine.decode_rate_age_ms", engine.decode_rate_age_ms.unwrap_or(0), MOST_MS),
            ("engine.neighbour_ms", engine.neighbour_ms, MOST_MS),
        ];
        let models = self.models.iter().flat_map(|model| {
            [("models.resident_mb", model.resident_mb, MOST_MB), ("models.expected_mb", model.expected_mb, MOST_MB)]
        });
        let held = self.held.iter().map(|held| ("held.lag_ms", held.lag_ms.unwrap_or(0), MOST_MS));
        let found = figures.into_iter().chain(models).chain(held).find(|(_, figure, most)| figure > most);
        found.map(|(name, ..)| name)
    }

    pub fn worker(&self) -> WorkerName {
        WorkerName { gpu_id: self.gpu_id.clone(), incarnation: self.incarnation.clone() }
    }
}

/// Requests on `asr.v1.control.<gpu_id>.<incarnation>`. JSON, `{"do":"assign",...}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "made to be sent and dropped, never kept in numbers")]
pub enum ControlRequest {
    /// Take this session or job. Idempotent by (id, epoch).
    Assign(Assignment),
    /// Let go; the chain goes on elsewhere or has ended.
    Release {
        kind: Kind,
        id: StreamId,
        epoch: u64,
        /// Time to finish and store a final already begun, nothing new being fed; 0 = at once, what is begun is given up.
        #[serde(default, skip_serializing_if = "nought")]
        finish_ms: u32,
    },
    Cancel {
        kind: Kind,
        id: StreamId,
    },
    Prewarm {
        model: String,
    },
    Drain {
        deadline_ms: u64,
    },
    /// Your incarnation was declared dead: take a new name.
    Renew,
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    pub kind: Kind,
    pub id: StreamId,
    pub epoch: u64,
    pub options: SessionOptions,
    /// It crashed an engine where it was before: decode it alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspect: bool,
    /// How often it did so while alone.
    #[serde(default, skip_serializing_if = "nought")]
    pub crashes: u32,
    /// On the window that begins with this sample, and no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspect_from: Option<u64>,
    /// `options.model` stands in for this one, which the session asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_asked: Option<String>,
    /// The trace it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::trace::lenient")]
    pub traceparent: Option<TraceContext>,
}

/// A worker's answer. It has the last word on what it takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlReply {
    Done,
    Refused(Failure),
    #[serde(other)]
    Unknown,
}

/// Answer to `fleet.status`: what the dispatcher believes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FleetStatus {
    pub dispatcher: String,
    pub workers: Vec<WorkerStatus>,
    pub sessions_waiting: u32,
    pub sessions_assigned: u32,
    #[serde(default)]
    pub jobs_queued: u32,
    #[serde(default)]
    pub jobs_assigned: u32,
    /// Workers declared dead and not heard of since, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dead: Vec<WorkerName>,
    /// The fleet map; empty when there is none, and every GPU serves everything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<ServiceStatus>,
    /// Why nobody is declared dead now, however silent; none while silence counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdicts_wait: Option<String>,
}

/// What a GPU is to a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The map gives it to this service.
    Serves,
    /// It takes nothing until a GPU of its service fails.
    Reserve,
    /// A reserve in the place of one that failed.
    StandingIn,
    /// A CPU worker, taken when no GPU is left.
    Cpu,
    #[serde(other)]
    Unknown,
}

/// One GPU of a service. `health` is none when nobody with this id has been heard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuRole {
    pub gpu_id: GpuId,
    pub role: Role,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<WorkerHealth>,
    /// The GPU it stands in for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing_in_for: Option<GpuId>,
}

/// One service of the fleet map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub service: String,
    pub gpus: Vec<GpuRole>,
    /// Share of each GPU's memory it may fill.
    pub memory_limit_percent: u8,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preload: Vec<String>,
}

/// `fleet.drain`: hand over everything on this GPU and end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    pub gpu_id: GpuId,
    /// The worker is gone by then; its own `worker.drain_ms` when missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// Answer to `fleet.drain`: who was told, and what they held then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    pub workers: Vec<WorkerName>,
    pub sessions: u32,
    pub jobs: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerHealth {
    Joining,
    Alive,
    Suspect,
    Dead,
    Draining,
    Unhealthy,
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    pub health: WorkerHealth,
    pub ms_since_heartbeat: u64,
    pub heartbeat: Heartbeat,
}
