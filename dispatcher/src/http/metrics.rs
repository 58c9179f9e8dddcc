//! What `/metrics` says of the fleet, from one board; and the names of what is counted as it happens.
//!
//! Workers sit behind NAT: Prometheus cannot reach them, so everything about them comes from here. No label ever holds a
//! session, a job or a text; `gpu_id` has as many values as there are GPUs.

use std::{collections::HashMap, sync::Arc, time::Duration};

use metrics::counter;
use voxfleet_http::exposition::Exposition;
use voxfleet_schema::{
    event::{Event, Scope, What},
    failure::{Failure, FailureClass},
    fleet::WorkerHealth,
    id::{GpuId, Kind},
};

use super::{
    board::Board,
    view::{self, Tile},
};

const AUDIO_BYTES: &str = "voxfleet_audio_bytes_total";
const AUDIO_CHUNKS: &str = "voxfleet_audio_chunks_total";
const ASSIGNMENTS: &str = "voxfleet_assignments_total";
const MOVES: &str = "voxfleet_moves_total";
const FAILOVERS: &str = "voxfleet_failovers_total";
/// What sessions and jobs mostly fail of.
const FAILS: [FailureClass; 8] = [
    FailureClass::BadAudio,
    FailureClass::UnsupportedFormat,
    FailureClass::TooLarge,
    FailureClass::ModelMissing,
    FailureClass::OutOfMemory,
    FailureClass::EngineCrash,
    FailureClass::Timeout,
    FailureClass::Cancelled,
];
/// Ends of engines that are told from the first on, with 0.
const ENDS: [FailureClass; 3] = [FailureClass::Timeout, FailureClass::EngineCrash, FailureClass::OutOfMemory];
/// Why something left a worker.
const MOVED: [&str; 4] = ["dead", "gone", "drained", "room"];
const REFUSALS: &str = "voxfleet_refusals_total";
const FAILURES: &str = "voxfleet_failures_total";
const EVENTS: &str = "voxfleet_events_total";

/// Entries of the log that this dispatcher has read.
pub(crate) fn audio_read(chunks: usize, bytes: usize) {
    counter!(AUDIO_CHUNKS).increment(chunks as u64);
    counter!(AUDIO_BYTES).increment(bytes as u64);
}

pub(crate) fn refused(failure: &Failure) {
    counter!(REFUSALS, "class" => failure.class.as_str()).increment(1);
}

/// Everything that this dispatcher decides and tells is counted by its event.
pub(crate) fn told(event: &Event) {
    counter!(EVENTS, "what" => event.what.as_str()).increment(1);
    let kind = match event.scope {
        Scope::Session => Kind::Session.as_str(),
        Scope::Job => Kind::Job.as_str(),
        Scope::Fleet | Scope::Unknown => return,
    };
    match event.what {
        What::Assigned => counter!(ASSIGNMENTS, "kind" => kind).increment(1),
        What::Moved => {
            let why = MOVED.iter().find(|why| event.detail["why"] == **why).unwrap_or(&"room");
            counter!(MOVES, "kind" => kind, "reason" => *why).increment(1);
            if *why == "dead" {
                counter!(FAILOVERS).increment(1);
            }
        }
        What::Failed => {
            let class = event.error.as_ref().map_or("unknown", |error| error.class.as_str());
            counter!(FAILURES, "class" => class).increment(1);
        }
        _ => {}
    }
}

/// So that the first scrape finds them at 0: a rate needs a value before the first event.
pub(crate) fn begin() {
    voxfleet_trace::begin_counting();
    for kind in [Kind::Session, Kind::Job] {
        counter!(ASSIGNMENTS, "kind" => kind.as_str()).absolute(0);
        for why in MOVED {
            counter!(MOVES, "kind" => kind.as_str(), "reason" => why).absolute(0);
        }
    }
    counter!(FAILOVERS).absolute(0);
    for class in [FailureClass::NoCapacity, FailureClass::NoWorkers, FailureClass::ModelDoesNotFit] {
        counter!(REFUSALS, "class" => class.as_str()).absolute(0);
    }
    for class in FAILS {
        counter!(FAILURES, "class" => class.as_str()).absolute(0);
    }
    audio_read(0, 0);
}

const MB: f64 = 1_048_576.0;

/// The fleet's figures. `board` is none where nobody could be asked.
pub(crate) fn fleet(out: &mut Exposition, board: Option<&Board>) {
    let Some(board) = board else { return };
    let tiles = &one_each(&board.tiles);
    let mut family = out.gauge("voxfleet_gpus", "workers by what the dispatcher believes of them");
    for (state, count) in view::states(tiles) {
        family.sample(&[("state", state)], count as f64);
    }
    let mut family = out.gauge("voxfleet_gpu_info", "1 for each worker, with what it runs on");
    for tile in tiles {
        let labels = [("gpu_id", tile.gpu_id.as_str()), ("device", &tile.device), ("provider", provider(tile))];
        family.sample(&labels, 1.0);
    }
    let mut family = out.gauge("voxfleet_gpu_state", "1 for the present state of each worker");
    for tile in tiles {
        family.sample(&[("gpu_id", tile.gpu_id.as_str()), ("state", state(tile))], 1.0);
    }
    let mut family = out.gauge("voxfleet_gpu_memory_bytes", "device memory: total, free, used by us, used by others");
    for tile in living(tiles) {
        for (kind, mb) in
            [("total", tile.total_mb), ("free", tile.free_mb), ("used", tile.used_mb), ("others", tile.others_mb)]
        {
            family.sample(&[("gpu_id", tile.gpu_id.as_str()), ("kind", kind)], mb as f64 * MB);
        }
    }
    each(out, "voxfleet_gpu_temperature_celsius", "temperature of the device", tiles, |t| {
        t.temperature_c.map(f64::from)
    });
    each(out, "voxfleet_gpu_utilization_ratio", "how busy the device is, 0 to 1", tiles, |t| {
        t.utilization_percent.map(|percent| f64::from(percent) / 100.0)
    });
    each(out, "voxfleet_gpu_power_watts", "power that the device draws", tiles, |t| t.power_w.map(f64::from));
    for (name, help, figures) in [
        (
            "voxfleet_gpu_slots",
            "live sessions that it can hold, and holds",
            (|t| (t.slots, t.slots_used)) as fn(&Tile) -> (u32, u32),
        ),
        ("voxfleet_gpu_job_slots", "recordings that it can hold, and holds", |t| (t.job_slots, t.job_slots_used)),
    ] {
        let mut family = out.gauge(name, help);
        for tile in living(tiles) {
            let (total, used) = figures(tile);
            family.sample(&[("gpu_id", tile.gpu_id.as_str()), ("state", "total")], f64::from(total));
            family.sample(&[("gpu_id", tile.gpu_id.as_str()), ("state", "used")], f64::from(used));
        }
    }
    each(out, "voxfleet_gpu_heartbeat_age_seconds", "since its last heartbeat", tiles, |t| {
        Some(t.heartbeat_age_ms as f64 / 1e3)
    });
    each(out, "voxfleet_engine_silence_seconds", "since its engine moved while it has work, else 0", tiles, |t| {
        Some(t.engine.silence_ms as f64 / 1e3)
    });
    each(
        out,
        "voxfleet_engine_on_standby",
        "1 while it runs a smaller model or the CPU in place of what was asked for",
        tiles,
        |t| Some(f64::from(u8::from(!t.standbys.is_empty()))),
    );
    let mut family = out.counter("voxfleet_engine_restarts_total", "starts of its engine after the first");
    for tile in living(tiles) {
        family.sample(&[("gpu_id", tile.gpu_id.as_str())], f64::from(tile.engine.restarts));
    }
    let mut family = out.counter("voxfleet_engine_ends_total", "ends of its engine that nobody wanted");
    for tile in living(tiles) {
        let ends = &tile.engine.ends;
        let none = ENDS.iter().filter(|class| !ends.contains_key(class)).map(|class| (class, &0));
        for (class, count) in ends.iter().chain(none) {
            family.sample(&[("gpu_id", tile.gpu_id.as_str()), ("class", class.as_str())], f64::from(*count));
        }
    }
    work(out, board);
    streams(out, board);
}

fn work(out: &mut Exposition, board: &Board) {
    let fleet = &board.fleet;
    out.gauge("voxfleet_sessions", "open live sessions")
        .sample(&[("state", "waiting")], f64::from(fleet.sessions_waiting))
        .sample(&[("state", "assigned")], f64::from(fleet.sessions_assigned));
    out.gauge("voxfleet_jobs", "recordings that wait or are being transcribed")
        .sample(&[("state", "queued")], f64::from(fleet.jobs_queued))
        .sample(&[("state", "assigned")], f64::from(fleet.jobs_assigned));
    let mut lags: Vec<u64> = board.sessions.iter().filter_map(|session| session.lag_ms).collect();
    lags.sort_unstable();
    let mut family = out.gauge("voxfleet_sessions_lag_seconds", "logged minus decoded over the sessions held now");
    for (name, share) in [("0.5", 0.5), ("0.95", 0.95), ("1", 1.0)] {
        family.sample(&[("quantile", name)], quantile(&lags, share) as f64 / 1e3);
    }
}

fn streams(out: &mut Exposition, board: &Board) {
    for (name, help, figure) in [
        (
            "voxfleet_stream_bytes",
            "bytes that a stream holds",
            (|u| u.bytes) as fn(&voxfleet_nats::topology::Usage) -> u64,
        ),
        ("voxfleet_stream_max_bytes", "bytes that a stream may hold", |u| u.max_bytes),
        ("voxfleet_stream_messages", "messages that a stream holds", |u| u.messages),
        ("voxfleet_stream_consumers", "consumers of a stream", |u| u.consumers as u64),
    ] {
        let mut family = out.gauge(name, help);
        for usage in &board.streams {
            family.sample(&[("stream", &usage.stream)], figure(usage) as f64);
        }
    }
    out.gauge("voxfleet_dead_letters", "letters in ASR_DEAD").value(view::dead_letters(board) as f64);
}

/// Two incarnations may share a GPU for a while, one leaving and one coming; a series of a GPU is of the one that works.
fn one_each(tiles: &[Arc<Tile>]) -> Vec<Arc<Tile>> {
    let rank = |tile: &Tile| match tile.state {
        WorkerHealth::Alive => 5,
        WorkerHealth::Unhealthy => 4,
        WorkerHealth::Joining => 3,
        WorkerHealth::Suspect => 2,
        WorkerHealth::Draining => 1,
        WorkerHealth::Dead | WorkerHealth::Unknown => 0,
    };
    let mut chosen: Vec<Arc<Tile>> = Vec::with_capacity(tiles.len());
    let mut places: HashMap<&GpuId, usize> = HashMap::with_capacity(tiles.len());
    for tile in tiles {
        match places.get(&tile.gpu_id) {
            Some(&place) if rank(tile) <= rank(&chosen[place]) => {}
            Some(&place) => chosen[place] = tile.clone(),
            None => {
                places.insert(&tile.gpu_id, chosen.len());
                chosen.push(tile.clone());
            }
        }
    }
    chosen
}

fn living(tiles: &[Arc<Tile>]) -> impl Iterator<Item = &Tile> {
    tiles.iter().map(|tile| &**tile).filter(|tile| tile.state != WorkerHealth::Dead)
}

fn each(
    out: &mut Exposition,
    name: &'static str,
    help: &str,
    tiles: &[Arc<Tile>],
    figure: impl Fn(&Tile) -> Option<f64>,
) {
    let mut family = out.gauge(name, help);
    for tile in living(tiles) {
        if let Some(value) = figure(tile) {
            family.sample(&[("gpu_id", tile.gpu_id.as_str())], value);
        }
    }
}

fn state(tile: &Tile) -> &'static str {
    match tile.state {
        WorkerHealth::Joining => "joining",
        WorkerHealth::Alive => "alive",
        WorkerHealth::Suspect => "suspect",
        WorkerHealth::Dead => "dead",
        WorkerHealth::Draining => "draining",
        WorkerHealth::Unhealthy => "unhealthy",
        WorkerHealth::Unknown => "unknown",
    }
}

fn provider(tile: &Tile) -> &'static str {
    use voxfleet_schema::fleet::Provider::*;
    match tile.provider {
        VastAi => "vast_ai",
        RunPod => "runpod",
        Lambda => "lambda",
        Local => "local",
        Unknown => "unknown",
    }
}

/// The smallest value that at least `share` of them do not exceed; 0 of none.
fn quantile(sorted: &[u64], share: f64) -> u64 {
    let place = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(0)
}

/// The connection as this process has it.
pub(crate) fn connection(out: &mut Exposition, connected: bool, rtt: Option<Duration>, reconnects: u64, active: bool) {
    out.gauge("voxfleet_build_info", "1, with the version that runs")
        .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    out.gauge("voxfleet_dispatcher_active", "1 while this dispatcher holds the lease")
        .value(f64::from(u8::from(active)));
    out.gauge("voxfleet_nats_connected", "1 while NATS answers").value(f64::from(u8::from(connected)));
    if let Some(rtt) = rtt {
        out.gauge("voxfleet_nats_rtt_seconds", "round trip to the NATS server").value(rtt.as_secs_f64());
    }
    out.counter("voxfleet_nats_reconnects_total", "connects after the first").value(reconnects as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_those_that_are_there() {
        assert_eq!(quantile(&[], 0.95), 0);
        assert_eq!(quantile(&[7], 0.5), 7);
        let all: Vec<u64> = (1..=100).collect();
        assert_eq!((quantile(&all, 0.5), quantile(&all, 0.95), quantile(&all, 1.0)), (50, 95, 100));
    }
}
