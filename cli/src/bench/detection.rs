//! How soon a death can be known: the same fleet with shorter and shorter heartbeats on a machine that is kept busy. Nobody
//! dies, so each verdict is a false one; at the end of each row one worker is killed, and the verdict timed.
//!
//! Where false verdicts begin is the limit: each costs a move of all that the worker held, and nothing else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio,
    chaos::talk,
    checker,
    fleet::{Engine, Fleet},
    load::Crowd,
    wait::eventually,
};

use super::{progress, usage};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench detection
  voxfleet bench detection --heartbeats 1000,300 --busy 16 --seconds 120 --json")]
pub(crate) struct DetectionArgs {
    /// worker.heartbeat_ms of each row; a worker is suspect after 1.5 and dead after 3 of them
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 500, 300, 200, 100], value_name = "MS")]
    heartbeats: Vec<u64>,
    /// Threads that do nothing but keep the machine busy; four for each core when not told
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1_000))]
    busy: Option<u16>,
    /// How long each row is watched
    #[arg(long, default_value_t = 60, value_name = "S", value_parser = clap::value_parser!(u64).range(5..=3_600))]
    seconds: u64,
    /// Workers
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=64))]
    workers: u64,
    /// Sessions in real time
    #[arg(long, default_value_t = 16, value_name = "N")]
    sessions: usize,
}

const CHUNK_MS: u64 = 200;
const OPENED_PER_S: f64 = 20.0;
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) async fn run(args: DetectionArgs) -> Result<Value> {
    usage(args.sessions >= 1, "--sessions: at least one")?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = args.busy.map_or(cores * 4, usize::from);
    let mut rows = Vec::new();
    for heartbeat_ms in &args.heartbeats {
        usage((100..=5_000).contains(heartbeat_ms), "--heartbeats: 100 to 5000 ms")?;
        progress(&format!("heartbeats each {heartbeat_ms} ms, {threads} threads busy on {cores} cores"));
        let row = row(&args, *heartbeat_ms, threads).await?;
        progress(&format!("{row}"));
        rows.push(row);
    }
    Ok(json!({ "cores": cores, "busy_threads": threads, "seconds": args.seconds, "rows": rows }))
}

async fn row(args: &DetectionArgs, heartbeat_ms: u64, threads: usize) -> Result<Value> {
    let slots = args.sessions.div_ceil(args.workers as usize - 1) as u32 + 1;
    let builder =
        Fleet::builder().workers(args.workers as usize).slots(slots).engine(Engine::Simulated { speed: 30.0 });
    let mut fleet = builder
        .set("worker.heartbeat_ms", heartbeat_ms)
        .set("dispatcher.suspect_after_ms", heartbeat_ms * 3 / 2)
        .set("dispatcher.dead_after_ms", heartbeat_ms * 3)
        .start()
        .await?;
    let js = talk::impatient(fleet.client());
    let pcm = audio::bursts(1, 60.0);
    let mut crowd = Crowd::new(fleet.client(), "detection", args.sessions, &pcm, CHUNK_MS);
    let ramp = args.sessions as f64 / OPENED_PER_S;
    let busy = Busy::new(threads);
    // Sessions go round and round in their recording until the row is done.
    let speaking = crowd.pace(ramp, f64::INFINITY, args.seconds as f64 + PATIENCE.as_secs_f64() * 2.0);
    let watching = async {
        tokio::time::sleep(Duration::from_secs(args.seconds)).await;
        let told = async |what: &str| -> Result<usize> {
            Ok(checker::read(&js, "ASR_EVENT", &format!("asr.v1.event.fleet.*.{what}")).await?.len())
        };
        let (suspects, dead) = (told("suspect").await?, told("dead").await?);
        let killed_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
        let worker = fleet.workers.last_mut().context("a worker")?;
        let subject = format!("asr.v1.event.fleet.{}.dead", worker.gpu_id());
        worker.kill9()?;
        let stored = eventually("the verdict's event", PATIENCE, || async {
            checker::stored_ms(&js, "ASR_EVENT", &subject).await.filter(|stored| *stored >= killed_ms)
        });
        anyhow::Ok((suspects, dead, stored.await? - killed_ms))
    };
    let (suspects, dead, detection_ms) = tokio::select! {
        watched = watching => watched?,
        sent = speaking => anyhow::bail!("the sessions ended before the row did: {:?}", sent?),
    };
    drop(busy);
    Ok(json!({
        "heartbeat_ms": heartbeat_ms,
        "dead_after_ms": heartbeat_ms * 3,
        "false_suspects": suspects,
        "false_verdicts": dead,
        "detection_ms": detection_ms,
    }))
}

/// Threads that spin until this is dropped.
struct Busy {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Busy {
    fn new(threads: usize) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let spin = || {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        };
        let threads = (0..threads).map(|_| spin()).collect();
        Self { stop, threads }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot panic, and there would be nothing to do about it.
            let _ = thread.join();
        }
    }
}
