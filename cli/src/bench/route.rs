//! Added latency from a producer's publish to the engine, with many sessions in real time on one machine, and the rate
//! at which the same fleet saturates, beside what JetStream alone carries there.
//!
//! Latency runs from the moment before the producer calls publish to the moment the chunk's frame has been read whole
//! at the engine child's socket: client, server, disk log, dispatcher, hint, supervisor. Producers, server, dispatcher,
//! supervisor and engine share the machine, and the engine really works (simulated text without delay).

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio,
    child::{children_of, resident_bytes},
    fleet::{Engine, Fleet},
    load::{self, Crowd},
    wait::eventually,
};

use super::{probe::Report, progress, rounded};

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
    ensure!(args.sessions >= 1 && args.seconds >= 1.0 && args.chunk_ms >= 1 && args.burst >= 1, "nothing to measure");
    let dir = tempfile::tempdir()?;
    let seen = dir.path().join("seen.json");
    let mut fleet = Fleet::builder()
        .workers(1)
        .slots(args.sessions as u32)
        .engine(Engine::Simulated { speed: 0.0 })
        .set("worker.engine_exe", engine_script(dir.path(), &seen)?.display())
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
    let stamped = seen_at_least(&seen, sent.stamped, Duration::from_secs(30)).await;
    fleet.check_alive()?;
    let paced = Report::read(&seen).context("the probe saw nothing")?;
    let late = match &stamped {
        Ok(_) => 0,
        Err(_) => sent.stamped.saturating_sub(paced.count),
    };
    let memory = Memory::of(&fleet);

    progress(&format!("burst of {} chunks", args.burst * args.sessions));
    let begin = Instant::now();
    let burst = crowd.burst(args.burst).await?;
    let published_s = burst.seconds;
    let all = seen_at_least(&seen, paced.count + burst.stamped, Duration::from_secs(300)).await;
    let saturated_s = begin.elapsed().as_secs_f64();
    fleet.check_alive()?;
    let arrived = Report::read(&seen).map_or(0, |r| r.count.saturating_sub(paced.count));
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
        "cpu_cores": cores,
        "resident_mb": memory.json(),
    }))
}

/// What the worker starts instead of itself: the probe, which is an engine with a clock.
fn engine_script(dir: &Path, report: &Path) -> Result<PathBuf> {
    let path = dir.join("engine.sh");
    let exe = std::env::current_exe()?;
    let text = format!("#!/bin/sh\nexec '{}' bench probe --report '{}' -- \"$@\"\n", exe.display(), report.display());
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

async fn seen_at_least(path: &Path, count: u64, deadline: Duration) -> Result<()> {
    let probe = || std::future::ready(Report::read(path).filter(|r| r.count >= count).map(drop));
    Ok(eventually(format!("{count} chunks at the engine"), deadline, probe).await?)
}

/// CPU time of each process so far, in seconds.
struct Cpu {
    at: Instant,
    dispatcher: f64,
    supervisor: f64,
    engine: f64,
    server: f64,
    producer: f64,
}

impl Cpu {
    fn now(fleet: &Fleet) -> Self {
        let [server, dispatcher, supervisor, engine] = pids(fleet).map(cpu_seconds);
        Self { at: Instant::now(), dispatcher, supervisor, engine, server, producer: cpu_seconds(std::process::id()) }
    }

    /// Cores each process kept busy since then.
    fn cores_since(&self, fleet: &Fleet) -> Value {
        let (now, wall) = (Self::now(fleet), self.at.elapsed().as_secs_f64());
        json!({
            "nats_server": rounded((now.server - self.server) / wall),
            "dispatcher": rounded((now.dispatcher - self.dispatcher) / wall),
            "supervisor": rounded((now.supervisor - self.supervisor) / wall),
            "engine": rounded((now.engine - self.engine) / wall),
            "producer": rounded((now.producer - self.producer) / wall),
        })
    }
}

/// Server, dispatcher, supervisor, engine; 0 where there is none.
pub(super) fn pids(fleet: &Fleet) -> [u32; 4] {
    let server = match &fleet.servers {
        voxfleet_harness::fleet::Servers::One(server) => server.pid(),
        _ => 0,
    };
    let dispatcher = fleet.dispatchers.first().map_or(0, |d| d.pid());
    let supervisor = fleet.workers.first().map_or(0, |w| w.pid());
    let engine = children_of(supervisor).into_iter().next().unwrap_or(0);
    [server, dispatcher, supervisor, engine]
}

/// User and system time of a process.
pub(super) fn cpu_seconds(pid: u32) -> f64 {
    // Fields 14 and 15 in clock ticks, of which Linux reports 100 a second; the name in field 2 may hold spaces.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    fields.skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Resident memory of each process, in MB.
pub(super) struct Memory([f64; 4]);

impl Memory {
    pub(super) fn of(fleet: &Fleet) -> Self {
        Self(pids(fleet).map(|pid| Self::mb(resident_bytes(pid).unwrap_or(0))))
    }

    pub(super) fn mb(bytes: u64) -> f64 {
        bytes as f64 / f64::from(1 << 20)
    }

    pub(super) fn json(&self) -> Value {
        let [server, dispatcher, supervisor, engine] = self.0.map(rounded);
        json!({"nats_server": server, "dispatcher": dispatcher, "supervisor": supervisor, "engine": engine})
    }
}
