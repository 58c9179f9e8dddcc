//! How long a decision takes: sessions are placed one after another on fleets of several sizes until every slot is taken.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use voxfleet_dispatcher::{
    DispatcherConfig,
    routing::{Duty, Request, Roster, Seen},
};
use voxfleet_schema::{
    fleet::{Heartbeat, WorkerHealth},
    session::SessionOptions,
};

const SESSIONS_EACH: u32 = 16;

/// A heartbeat as a worker sends it, with models of all sizes.
fn heartbeat(n: u32) -> Result<Heartbeat, serde_json::Error> {
    let model = |name: &str, mb: u64| serde_json::json!({ "name": name, "state": "available", "resident_mb": 0, "expected_mb": mb });
    serde_json::from_value(serde_json::json!({
        "gpu_id": format!("gpu-{n:04}"), "incarnation": "i", "seq": 1, "sent_ms": 0, "host": format!("host-{:03}", n / 8),
        "pid": 1, "provider": "local",
        "device": { "index": n % 8, "name": "test", "total_mb": 80_000, "free_mb": 70_000 + u64::from(n % 7), "used_mb": 0,
                    "used_by_others_mb": 0 },
        "slots": { "total": SESSIONS_EACH, "used": 0 }, "job_slots": { "total": 2, "used": 0 }, "held": [],
        "models": [model("large-v3-turbo", 3_900), model("medium", 2_100), model("small", 852), model("base", 388)],
        "engine": { "state": "ready", "kind": "simulated", "effective_device": "cuda:test", "vad": "silero",
                    "ms_since_progress": 0, "restarts": 0 },
        "draining": false, "version": "0",
    }))
}

fn main() -> Result<ExitCode, serde_json::Error> {
    let config = DispatcherConfig::default();
    let options = SessionOptions { model: Some("small".to_owned()), ..SessionOptions::default() };
    for gpus in [4u32, 40, 400, 1_000] {
        let beats = (0..gpus).map(heartbeat).collect::<Result<Vec<_>, _>>()?;
        let mut roster = Roster::of(&beats, &config);
        let mut used = vec![0u32; beats.len()];
        let mut times: Vec<Duration> = Vec::new();
        let (mut put, mut refused) = (Duration::ZERO, 0);
        for _ in 0..gpus * SESSIONS_EACH + 1_000 {
            let begun = Instant::now();
            let picked = roster.route(&Request::new(&options, true), Duration::ZERO, &config);
            times.push(begun.elapsed());
            let Ok(pick) = picked else {
                refused += 1;
                continue;
            };
            let begun = Instant::now();
            let name = roster.name(pick.slot).clone();
            let at = beats.partition_point(|b| b.gpu_id < name.gpu_id);
            used[at] += 1;
            roster.put(
                Seen {
                    name: &name,
                    heartbeat: &beats[at],
                    health: WorkerHealth::Alive,
                    suspect_at: Duration::MAX,
                    superseded: false,
                    sessions: used[at],
                    jobs: 0,
                    promised: &[Some("small")],
                    duty: Duty::Anyone,
                    reserve_percent: config.reserve_percent,
                },
                &config,
            );
            put += begun.elapsed();
        }
        let placed = times.len() - refused;
        times.sort();
        let at = |share: usize| times[times.len() * share / 100].as_nanos() as f64 / 1e3;
        println!(
            "{gpus:>5} GPUs, {placed} placed, {refused} refused: p50 {:.1} us, p99 {:.1} us, max {:.1} us; a change {:.1} us",
            at(50),
            at(99),
            times[times.len() - 1].as_nanos() as f64 / 1e3,
            put.as_nanos() as f64 / 1e3 / placed as f64
        );
    }
    Ok(ExitCode::SUCCESS)
}
