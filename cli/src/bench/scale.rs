//! How far one active dispatcher reaches: sessions in real time over more and more workers, what each process uses and how
//! late chunks come, until something no longer keeps up.
//!
//! Everything shares this machine, so the wall it finds is this machine's. What tells the dispatcher's own wall is its CPU
//! time per chunk: `dispatcher_wall_sessions` is how many sessions fill one core at that price.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio,
    fleet::{Engine, Fleet},
    load::Crowd,
};

use super::{
    probe::{self, Report},
    processes::{Cpu, Memory},
    progress, rounded, route, usage,
};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench scale
  voxfleet bench scale --rows 10x1,1000x8 --seconds 10 --json")]
pub(crate) struct ScaleArgs {
    /// Sessions x workers, one row each
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SESSIONSxWORKERS",
        default_value = "10x1,100x1,100x8,1000x1,1000x8,1000x32,3000x8"
    )]
    rows: Vec<Row>,
    /// How long each row is measured, after all sessions have been opened
    #[arg(long, default_value_t = 15.0, value_name = "SECONDS")]
    seconds: f64,
    /// Audio in one chunk
    #[arg(long, default_value_t = 200, value_name = "MS")]
    chunk_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    sessions: usize,
    workers: usize,
}

impl std::str::FromStr for Row {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('x').and_then(|(s, w)| Some((s.trim().parse().ok()?, w.trim().parse().ok()?)));
        match parts {
            Some((sessions, workers)) if sessions >= 1 && (1..=64).contains(&workers) => Ok(Self { sessions, workers }),
            _ => Err(format!("{text:?} is not sessions x workers, as 100x8, with at most 64 workers")),
        }
    }
}

/// Sessions opened per second at the start.
const OPENED_PER_S: f64 = 100.0;
/// From the last opening to the first measured chunk.
const SETTLE_S: f64 = 5.0;
/// Chunks later than this count as not kept up with.
const GIVE_UP: Duration = Duration::from_secs(10);

pub(super) async fn run(args: ScaleArgs) -> Result<Value> {
    usage(args.seconds >= 1.0 && args.chunk_ms >= 1, "nothing to measure")?;
    let mut rows = Vec::new();
    for row in &args.rows {
        rows.push(measure(*row, &args).await?);
    }
    Ok(json!({ "chunk_ms": args.chunk_ms, "seconds": args.seconds, "rows": rows }))
}

async fn measure(row: Row, args: &ScaleArgs) -> Result<Value> {
    let Row { sessions, workers } = row;
    let dir = tempfile::tempdir()?;
    let mut fleet = Fleet::builder()
        .workers(workers)
        .slots(sessions.div_ceil(workers) as u32)
        .engine(Engine::Simulated { speed: 0.0 })
        .set("worker.engine_exe", probe::engine_script(dir.path())?.display())
        .start()
        .await?;
    let pcm = audio::bursts(1, 120.0);
    let mut crowd = Crowd::new(fleet.client(), "scale", sessions, &pcm, args.chunk_ms);
    let ramp = sessions as f64 / OPENED_PER_S;
    let measure_from = ramp + SETTLE_S;
    progress(&format!("{sessions} sessions, {workers} workers: {:.0} s", measure_from + args.seconds));
    crowd.pace(ramp, f64::INFINITY, measure_from).await?;
    let cpu = Cpu::now(&fleet);
    let sent = crowd.pace(0.0, 0.0, args.seconds).await?;
    let cores = cpu.cores_since(&fleet);
    let memory = Memory::of(&fleet);
    let in_time = route::seen_at_least(dir.path(), sent.stamped, GIVE_UP).await.is_ok();
    fleet.check_alive()?;
    let seen = Report::read_all(dir.path());
    ensure!(seen.count > 0, "no engine saw a chunk\n{}", fleet.logs());
    let chunks_per_s = sent.chunks as f64 / sent.seconds;
    let dispatcher_us = cores.kinds[1] / chunks_per_s * 1e6;
    let chunks_of_a_session = 1e3 / args.chunk_ms as f64;
    Ok(json!({
        "sessions": sessions,
        "workers": workers,
        "bytes_per_s": (chunks_per_s * pcm.chunk_bytes(args.chunk_ms) as f64).round(),
        "chunks_per_s": rounded(chunks_per_s),
        "chunks_wanted_per_s": rounded(chunks_of_a_session * sessions as f64),
        "kept_up": in_time && sent.refused == 0 && chunks_per_s >= 0.98 * chunks_of_a_session * sessions as f64,
        "added_p50_ms": rounded(seen.percentile_ms(0.50)),
        "added_p99_ms": rounded(seen.percentile_ms(0.99)),
        "cpu_cores": rounded(cores.kinds[1]),
        "dispatcher_us_per_chunk": rounded(dispatcher_us),
        "dispatcher_wall_sessions": (1e6 / dispatcher_us / chunks_of_a_session).round(),
        "dispatcher_mb": rounded(memory.0[1]),
        "nats_server_cores": rounded(cores.kinds[0]),
        "supervisor_cores": rounded(cores.kinds[2]),
        "engine_cores": rounded(cores.kinds[3]),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sessions_by_workers() {
        let row: Row = "100x8".parse().expect("row");
        assert_eq!((row.sessions, row.workers), (100, 8));
        for bad in ["100", "x8", "0x1", "1x0", "1x65", "ax1"] {
            assert!(bad.parse::<Row>().is_err(), "{bad}");
        }
    }
}
