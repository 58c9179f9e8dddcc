//! Added latency from a producer's publish to the engine, with many sessions in real time on one machine, and the rate
//! at which the same fleet saturates, beside what JetStream alone carries there.
//!
//! Latency runs from the moment before the producer calls publish to the moment the chunk's frame has been read whole
//! at the engine child's socket: client, server, disk log, dispatcher, hint, supervisor. Producers, server, dispatcher,
//! supervisor and engine share the machine, and the engine really works (simulated text without delay).

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio,
    fleet::{Engine, Fleet},
    load::{self, Crowd},
    wait::eventually,
};

use super::{
    probe::{self, Report},
    processes::{Cpu, Memory},
    progress, rounded, usage,
};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench route
  voxfleet bench route --sessions 1000 --seconds 30 --json")]
pub(crate) struct RouteArgs {
    /// Sessions at once, in real time
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    sessions: usize,
    /// How long latency is measured, after all sessions have been opened
    #[arg(long, default_value_t = 20.0, value_name = "SECONDS")]
    seconds: f64,
    /// Audio in one chunk
    #[arg(long, default_value_t = 200, value_name = "MS")]
    chunk_ms: u64,
    /// Chunks of each session in the saturating burst
    #[arg(long, default_value_t = 30, value_name = "N")]
    burst: usize,
}

/// Sessions opened per second at the start.
const OPENED_PER_S: f64 = 100.0;
/// From the last opening to the first measured chunk.
const SETTLE_S: f64 = 5.0;

pub(super) async fn run(args: RouteArgs) -> Result<Value> {
    usage(args.sessions >= 1 && args.seconds >= 1.0 && args.chunk_ms >= 1 && args.burst >= 1, "nothing to measure")?;
    let dir = tempfile::tempdir()?;
    let mut fleet = Fleet::builder()
        .workers(1)
        .slots(args.sessions as u32)
        .engine(Engine::Simulated { speed: 0.0 })
        .set("worker.engine_exe", probe::engine_script(dir.path())?.display())
        .start()
        .await?;

    let pcm = audio::bursts(1, 120.0);
    let mut crowd = Crowd::new(fleet.client(), "route", args.sessions, &pcm, args.chunk_ms);
    let ramp = args.sessions as f64 / OPENED_PER_S;
    let measure_from = ramp + SETTLE_S;
    progress(&format!(
        "{} sessions in real time: {ramp:.0} s to open them, {:.0} s measured",
        args.sessions, args.seconds
    ));
    let cpu = Cpu::now(&fleet);
    let sent = crowd.pace(ramp, measure_from, measure_from + args.seconds).await?;
    let cores = cpu.cores_since(&fleet);
    let stamped = seen_at_least(dir.path(), sent.stamped, Duration::from_secs(30)).await;
    fleet.check_alive()?;
    let paced = Report::read_all(dir.path());
    ensure!(paced.count > 0, "the probe saw nothing");
    let late = match &stamped {
        Ok(_) => 0,
        Err(_) => sent.stamped.saturating_sub(paced.count),
    };
    let memory = Memory::of(&fleet);

    progress(&format!("burst of {} chunks", args.burst * args.sessions));
    let begin = Instant::now();
    let burst = crowd.burst(args.burst).await?;
    let published_s = burst.seconds;
    let all = seen_at_least(dir.path(), paced.count + burst.stamped, Duration::from_secs(300)).await;
    let saturated_s = begin.elapsed().as_secs_f64();
    fleet.check_alive()?;
    let arrived = Report::read_all(dir.path()).count.saturating_sub(paced.count);
    ensure!(all.is_ok(), "only {arrived} of {} chunks reached the engine\n{}", burst.stamped, fleet.logs());

    progress("JetStream alone: publish and pull");
    let raw = load::raw_jetstream(&fleet.client(), args.burst * args.sessions, pcm.chunk_bytes(args.chunk_ms)).await?;
    Ok(json!({
        "p50_ms": rounded(paced.percentile_ms(0.50)),
        "p90_ms": rounded(paced.percentile_ms(0.90)),
        "p99_ms": rounded(paced.percentile_ms(0.99)),
        "p999_ms": rounded(paced.percentile_ms(0.999)),
        "max_ms": rounded(paced.max_us as f64 / 1e3),
        "measured_chunks": paced.count,
        "chunks_over_30_s_late": late,
        "publish_refused": sent.refused + burst.refused,
        "producer_late_max_ms": rounded(sent.late_ms),
        "sessions": args.sessions,
        "chunk_ms": args.chunk_ms,
        "chunks_per_s": rounded(1e3 / args.chunk_ms as f64 * args.sessions as f64),
        "saturation_msgs_per_s": rounded(burst.chunks as f64 / saturated_s),
        "burst_publish_msgs_per_s": rounded(burst.chunks as f64 / published_s),
        "raw_jetstream_msgs_per_s": rounded(raw),
        "cpu_cores": cores.json(),
        "resident_mb": memory.json(),
    }))
}

/// Waits until the engines have seen this many chunks.
pub(super) async fn seen_at_least(dir: &Path, count: u64, deadline: Duration) -> Result<()> {
    let probe = || std::future::ready((Report::read_all(dir).count >= count).then_some(()));
    Ok(eventually(format!("{count} chunks at the engine"), deadline, probe).await?)
}
