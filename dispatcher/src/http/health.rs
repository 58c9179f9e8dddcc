//! Whether this process is alive, and whether work progresses. Pure.

use std::sync::Arc;

use serde_json::{Value, json};
use voxfleet_schema::fleet::{EngineRunState, Residency, WorkerHealth};

use super::{board::Board, view::Tile};

/// What keeps work from progressing; each with what it looks like from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// The server does not answer this process.
    NatsLost,
    /// It does, but no dispatcher is active.
    NoDispatcher,
    /// Nobody takes work.
    NoWorkers,
    /// All who could take work have an engine that does not move.
    EnginesStuck,
    /// Some workers stand still; the others go on.
    SomeUnhealthy,
    /// The audio stream is nearly full: soon nobody can publish.
    LogNearlyFull,
}

impl Why {
    pub(crate) fn code(self) -> &'static str {
        match self {
            Why::NatsLost => "nats_lost",
            Why::NoDispatcher => "no_dispatcher",
            Why::NoWorkers => "no_workers",
            Why::EnginesStuck => "engines_stuck",
            Why::SomeUnhealthy => "some_unhealthy",
            Why::LogNearlyFull => "log_nearly_full",
        }
    }

    fn message(self) -> &'static str {
        match self {
            Why::NatsLost => "the NATS server does not answer this dispatcher",
            Why::NoDispatcher => "no dispatcher is active: no new session or job is placed",
            Why::NoWorkers => "no worker takes work: sessions and jobs wait",
            Why::EnginesStuck => "every worker that could take work has an engine that does not move",
            Why::SomeUnhealthy => "some workers are unhealthy; the others go on",
            Why::LogNearlyFull => "the audio stream is over 80 % full",
        }
    }

    /// Whether work still progresses.
    pub(crate) fn is_warning(self) -> bool {
        matches!(self, Why::SomeUnhealthy | Why::LogNearlyFull)
    }
}

/// What is wrong now, worst first; none: work progresses.
pub(crate) fn reasons(connected: bool, board: Option<&Board>) -> Vec<Why> {
    if !connected {
        return vec![Why::NatsLost];
    }
    let Some(board) = board else { return vec![Why::NoDispatcher] };
    let mut found = Vec::new();
    let is = |state: WorkerHealth| board.tiles.iter().filter(|tile| tile.state == state).count();
    let (well, unhealthy) = (is(WorkerHealth::Alive), is(WorkerHealth::Unhealthy));
    if well == 0 {
        found.push(if unhealthy > 0 { Why::EnginesStuck } else { Why::NoWorkers });
    } else if unhealthy > 0 {
        found.push(Why::SomeUnhealthy);
    }
    if board.streams.iter().any(|usage| usage.stream == "ASR_AUDIO" && usage.share() >= 0.8) {
        found.push(Why::LogNearlyFull);
    }
    found
}

/// The answer of `GET /ready`, and whether it is a yes.
pub(crate) fn ready(connected: bool, board: Option<&Board>) -> (bool, Value) {
    let reasons = reasons(connected, board);
    let ready = reasons.iter().all(|why| why.is_warning());
    let told: Vec<Value> = reasons.iter().map(|why| json!({ "code": why.code(), "message": why.message() })).collect();
    let none = Vec::new();
    let tiles: &[Arc<Tile>] = board.map_or(&none, |board| &board.tiles);
    let live = || tiles.iter().filter(|tile| tile.state != WorkerHealth::Dead);
    let loaded = live().any(|tile| tile.models.iter().any(|model| model.state == Residency::Loaded));
    let gpus = live().filter(|tile| !tile.cpu).count();
    let idle = live().map(|tile| tile.engine.idle_timeout_s).filter(|s| *s > 0).min();
    let works =
        live().any(|tile| tile.engine.state == EngineRunState::Ready && tile.engine.ms_since_activity.is_none());
    let since = if works { Some(0) } else { live().filter_map(|tile| tile.engine.ms_since_activity).min() };
    let device = live().map(|tile| tile.engine.effective_device.as_str()).find(|device| !device.is_empty());
    let answer = json!({
        "ready": ready, "reasons": told, "role": if board.is_some_and(|b| b.active) { "active" } else { "standby" },
        "model_loaded": loaded, "idle_timeout_seconds": idle, "time_since_last_activity": since.map(|ms| ms as f64 / 1000.0),
        "gpu_available": gpus > 0, "gpu_count": gpus, "current_device": device,
        "memory_allocated_mb": live().map(|tile| tile.used_mb).sum::<u64>(),
    });
    (ready, answer)
}
