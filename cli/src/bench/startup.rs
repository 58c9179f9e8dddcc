//! How long each process takes to be of use, and how much memory idle sessions cost.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use voxfleet_harness::{
    fleet::{self, Engine, Fleet},
    probe_api,
    process::{Dispatcher, Settings, Worker},
    server::NatsServer,
    wait::eventually,
};
use voxfleet_worker::engine::whisper::WhisperModel;

use super::{processes::Memory, progress, rounded, usage};

const DEADLINE: Duration = Duration::from_secs(60);
/// Open requests on their way at once.
const AT_ONCE: usize = 32;
const MICRO: &str = "micro.en-q8_0";

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench startup
  voxfleet bench startup --sessions 100 --runs 3 --json")]
pub(crate) struct StartupArgs {
    /// Idle sessions
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    sessions: usize,
    /// Starts of each process; the median is reported
    #[arg(long, default_value_t = 5, value_name = "N")]
    runs: usize,
}

pub(super) async fn run(args: StartupArgs) -> Result<Value> {
    usage(args.runs >= 1, "nothing to measure")?;
    let mut times: [Vec<f64>; 5] = Default::default();
    for run in 1..=args.runs {
        progress(&format!("start {run} of {}", args.runs));
        for (all, one) in times.iter_mut().zip(one_start().await?) {
            all.push(one);
        }
    }
    let [server, dispatcher, worker, engine, model] = times.map(median);
    progress(&format!("{} idle sessions", args.sessions));
    let (empty, idle, opened_s) = idle_sessions(args.sessions).await?;
    Ok(json!({
        "nats_server_ms": server,
        "dispatcher_ms": dispatcher,
        "worker_ms": worker,
        "engine_ms": engine,
        "micro_model_load_ms": model,
        "idle_sessions": args.sessions,
        "opens_per_s": rounded(args.sessions as f64 / opened_s),
        "resident_mb_0_sessions": empty.json(),
        "resident_mb_idle_sessions": idle.json(),
    }))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().map_or(0.0, rounded)
}

fn ms(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

/// Server until it listens, dispatcher until it answers, worker until its first heartbeat and until its engine child is
/// ready, and loading the small model with one decode state.
async fn one_start() -> Result<[f64; 5]> {
    let dir = tempfile::tempdir()?;
    let begin = Instant::now();
    let server = NatsServer::start().await?;
    let server_ms = ms(begin);
    let client = server.client().await?;
    let settings = Settings::new().with("nats.urls", server.url());

    let begin = Instant::now();
    let _dispatcher = Dispatcher::start("dispatcher", &settings, dir.path())?;
    eventually("the dispatcher answers", DEADLINE, || probe_api::fleet_status(&client)).await?;
    let dispatcher_ms = ms(begin);

    let worker = |id: &'static str, more: Settings| {
        let (client, settings, dir) = (client.clone(), settings.clone().and(&more), dir.path());
        async move {
            let mut beats = probe_api::heartbeats(&client, id).await?;
            let begin = Instant::now();
            let worker = Worker::start(id, &settings.with("worker.gpu", "none"), dir)?;
            let first = tokio::time::timeout(DEADLINE, beats.next()).await.context("no heartbeat")?;
            first.context("no heartbeat")?;
            let first_ms = ms(begin);
            // Heartbeats come each second; the log says it when it happens.
            let ready = || std::future::ready(worker.log().contains("engine ready").then(|| ms(begin)));
            let ready = eventually("a ready engine", DEADLINE, ready).await?;
            Ok::<_, anyhow::Error>((first_ms, ready))
        }
    };
    // Preloading a model starts the engine child, which otherwise waits for its first session.
    let simulated = Settings::new().with("worker.engine", "simulated").with("worker.preload", "simulated");
    let (worker_ms, engine_ms) = worker("start", simulated).await?;
    let model_ms = tokio::task::spawn_blocking(|| -> Result<f64> {
        let begin = Instant::now();
        let path = fleet::models_dir().join(format!("{MICRO}.bin"));
        WhisperModel::load(MICRO, &path, false, 1)?.state()?;
        Ok(ms(begin))
    });
    Ok([server_ms, dispatcher_ms, worker_ms, engine_ms, model_ms.await??])
}

/// Memory without sessions and with `sessions` that were opened and never spoke, and how long opening them took.
async fn idle_sessions(sessions: usize) -> Result<(Memory, Memory, f64)> {
    let fleet = Fleet::builder()
        .workers(1)
        .slots(sessions.max(1) as u32)
        .engine(Engine::Simulated { speed: 0.0 })
        .start()
        .await?;
    let client = fleet.client();
    eventually("the dispatcher answers", DEADLINE, || probe_api::fleet_status(&client)).await?;
    let empty = Memory::of(&fleet);
    let begin = Instant::now();
    let opened = stream::iter(0..sessions)
        .map(|n| {
            let client = client.clone();
            async move { probe_api::open(&client, &format!("idle-{n}"), 1_800).await }
        })
        .buffer_unordered(AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    let seconds = begin.elapsed().as_secs_f64();
    opened.into_iter().collect::<Result<Vec<_>, _>>()?;
    eventually("all sessions are held", DEADLINE, || async {
        let status = probe_api::fleet_status(&client).await?;
        let used = status["workers"].as_array()?.iter().filter_map(|w| w["heartbeat"]["slots"]["used"].as_u64());
        (used.sum::<u64>() >= sessions as u64).then_some(())
    })
    .await?;
    Ok((empty, Memory::of(&fleet), seconds))
}
