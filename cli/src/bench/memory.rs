//! Memory of one worker's engine with 1, 2, 4, ... live sessions on one loaded model.
//!
//! A real server, dispatcher and worker; the calls are streamed at a pace, so that partials and finals are decoded as in
//! real life. A row is taken when each of its sessions has had a final and none has ended. Rows share one engine process, from the
//! fewest sessions to the most: what it keeps for good counts against the later ones.
//!
//! Weights and decode states come first: `loaded_mb` is the engine with its model and nothing decoded, `one_state_mb` the same
//! after its first session, and before the first row every decode state of the pool has worked. States belong to the pool and
//! not to sessions, so a worker that has only ever seen one session is that much smaller than the first row.
//!
//! On a CPU the figure is the resident memory of the engine process; on a GPU what the driver says this worker uses.
//! `final_lag_*` says whether the device keeps up: time from a final's last sound to its arrival, decoding and the pause that
//! ends an utterance included.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, future::try_join_all};
use serde_json::{Value, json};
use tokio::{process::Command, sync::watch, time::Instant};
use voxfleet_harness::{
    audio::{self, Pcm},
    child::resident_bytes,
    find,
    fleet::{Engine, Fleet},
    probe_api::{self, Subscriber},
    producer::{Pace, Producer},
};

use super::{
    models::{Model, Stubs},
    pipeline::CHUNK_MS,
    processes::Memory,
    progress, rounded, usage,
};
use crate::{demo::report::quantile, producer::ago};

/// Calls with speech in their first seconds.
const CALLS: [u32; 4] = [1, 2, 4, 5];
const DEADLINE: Duration = Duration::from_secs(600);
/// 16 sessions may cost a tenth more than one.
const BAR: f64 = 1.1;
const GPU: &str = "gpu-1";

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench memory
  voxfleet bench memory --model base --format q8_0
  voxfleet bench memory --model large-v3-turbo --gpu 0 --sessions 1,16,64 --json")]
pub(crate) struct MemoryArgs {
    /// micro (the small model of the tests), or random weights: tiny, base, small, medium, large-v3-turbo
    #[arg(long, default_value = "micro", value_name = "NAME")]
    model: Model,
    #[command(flatten)]
    stubs: Stubs,
    /// Live sessions of each row, fewest first
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16", value_name = "N,...", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    sessions: Vec<u32>,
    /// Audio of each session
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    seconds: f64,
    /// Times real time
    #[arg(long, default_value_t = 1.0, value_name = "N")]
    speed: f64,
    /// Decode states of the worker
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    states: u32,
    /// Threads of each decode state
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
    /// Device of the worker, as `worker --gpu` takes it
    #[arg(long, default_value = "none", value_name = "DEVICE")]
    gpu: String,
}

pub(super) async fn run(args: MemoryArgs) -> Result<Value> {
    usage(args.speed.is_finite() && args.speed > 0.0, "--speed: live audio has a pace, so more than 0")?;
    usage(args.seconds >= 5.0, "--seconds: at least 5, so that something is said")?;
    usage(args.sessions.is_sorted(), "--sessions: fewest first, since they share one process")?;
    let file = args.stubs.file(args.model)?;
    let weighed = weigh(&args).await?;
    let bench = Bench::start(&args, &file).await?;
    let mut rows = Vec::new();
    let loaded = bench.loaded(&file.name).await?;
    bench.sessions("first", 1, false).await?;
    let one_state = bench.used().await?;
    // Twice as many as there are states: each of them gets something to do.
    bench.sessions("all", args.states * 2, false).await?;
    for sessions in &args.sessions {
        progress(&format!("{sessions} live sessions on {}", file.name));
        let begin = Instant::now();
        let round = bench.sessions("row", *sessions, true).await?;
        let used = round.used.context("a row without a figure")?;
        rows.push(json!({
            "sessions": sessions,
            "total_mb": rounded(used.total_mb()),
            "resident_mb": rounded(used.resident_mb),
            "finals": round.lags_ms.len(),
            "final_lag_p50_ms": quantile(&round.lags_ms, 0.5),
            "final_lag_p95_ms": quantile(&round.lags_ms, 0.95),
            "seconds": rounded(begin.elapsed().as_secs_f64()),
        }));
    }
    let mut found = answer(&weighed, loaded.total_mb(), one_state.total_mb(), rows);
    found["model"] = file.name.into();
    found["weights"] = args.stubs.weights(args.model).into();
    found["decode_states"] = args.states.into();
    found["speed"] = args.speed.into();
    Ok(found)
}

/// What was weighed alone, then the rows and how much more the last takes than the first.
fn answer(weighed: &Value, loaded_mb: f64, one_state_mb: f64, rows: Vec<Value>) -> Value {
    let total = |row: Option<&Value>| row.and_then(|row| row["total_mb"].as_f64());
    let ratio = total(rows.last()).zip(total(rows.first())).map(|(most, fewest)| most / fewest.max(1e-3));
    json!({
        "weights_mb": weighed["weights_mb"],
        "state_mb": weighed["state_mb"],
        "device": weighed["device"],
        "loaded_mb": rounded(loaded_mb),
        "one_state_mb": rounded(one_state_mb),
        "rows": rows,
        "most_sessions_to_fewest": ratio.map(rounded),
        "within_10_percent": ratio.map(|ratio| ratio <= BAR),
    })
}

/// In a process of its own, so that nothing else was ever loaded there and a GPU is free of it afterwards.
async fn weigh(args: &MemoryArgs) -> Result<Value> {
    let mut command = Command::new(find::voxfleet()?);
    let model = match args.model {
        Model::Micro => "micro",
        Model::Random(shape) => shape.as_str(),
    };
    command.args(["bench", "weigh", "--json", "--model", model, "--format", args.stubs.format.as_str()]);
    if let Some(dir) = &args.stubs.stubs_dir {
        command.arg("--stubs-dir").arg(dir);
    }
    if args.gpu != "none" {
        command.arg("--use-gpu");
    }
    let output = command.stderr(Stdio::inherit()).kill_on_drop(true).output().await?;
    ensure!(output.status.success(), "weights and states could not be weighed");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// What the engine takes at one moment, in MB.
struct Used {
    resident_mb: f64,
    device_mb: Option<f64>,
}

impl Used {
    fn total_mb(&self) -> f64 {
        self.device_mb.unwrap_or(self.resident_mb)
    }
}

/// What the sessions of one round gave.
struct Round {
    used: Option<Used>,
    lags_ms: Vec<u64>,
}

struct Bench {
    fleet: Fleet,
    calls: Vec<Pcm>,
    speed: f64,
}

impl Bench {
    async fn start(args: &MemoryArgs, file: &voxfleet_worker::ipc::ModelFile) -> Result<Self> {
        let most = args.sessions.iter().copied().max().unwrap_or(1).max(args.states * 2);
        let dir = file.path.parent().context("a model lies in a folder")?;
        let fleet = Fleet::builder()
            .workers(1)
            .slots(most)
            .engine(Engine::Micro)
            .set("worker.models_dir", dir.display())
            .set("worker.default_model", &file.name)
            .set("worker.preload", &file.name)
            .set("worker.decode_states", args.states)
            .set("worker.decode_threads", args.threads)
            .set("worker.gpu", &args.gpu)
            // Memory is measured here, whether the device keeps up or not.
            .set("dispatcher.min_decode_rate", 0);
        let mut calls = CALLS.iter().map(|n| audio::call(*n)).collect::<Result<Vec<_>, _>>()?;
        calls.iter_mut().for_each(|call| call.samples.truncate((args.seconds * 16_000.0) as usize));
        Ok(Self { fleet: fleet.start().await?, calls, speed: args.speed })
    }

    async fn beats(&self) -> Result<Subscriber> {
        Ok(probe_api::heartbeats(&self.fleet.client(), GPU).await?)
    }

    /// The engine once the model is there and nothing was decoded.
    async fn loaded(&self, name: &str) -> Result<Used> {
        let mut beats = self.beats().await?;
        let loaded = async {
            while let Some(beat) = next(&mut beats).await? {
                let mut models = beat["models"].as_array().into_iter().flatten();
                if models.any(|m| m["name"] == name && m["state"] == "loaded") {
                    return Ok(());
                }
            }
            anyhow::bail!("no heartbeats")
        };
        tokio::time::timeout(DEADLINE, loaded).await.context("the model was not loaded")??;
        self.used().await
    }

    async fn used(&self) -> Result<Used> {
        let pid = self.fleet.workers.first().and_then(|w| w.engine_pid()).context("no engine process")?;
        let resident_mb = resident_bytes(pid).map(Memory::mb).context("the engine has ended")?;
        let mut beats = self.beats().await?;
        // The next one may tell of a look at the device before this moment.
        let mut device_mb = None;
        for _ in 0..2 {
            let beat = next(&mut beats).await?.context("no heartbeats")?;
            let on_card = !beat["device"]["index"].is_null();
            device_mb = beat["device"]["used_mb"].as_f64().filter(|_| on_card);
        }
        Ok(Used { resident_mb, device_mb })
    }

    /// So many at once, each with a part of a call; weighed, if wanted, when each has had a final.
    async fn sessions(&self, name: &str, count: u32, weigh: bool) -> Result<Round> {
        let (heard, mut all_heard) = watch::channel(0u32);
        let (release, released) = watch::channel(false);
        let one = |n: u32| self.one(format!("{name}-{count}-{n}"), n, &heard, released.clone());
        let weighing = async {
            all_heard.wait_for(|n| *n >= count).await?;
            let used = if weigh { Some(self.used().await?) } else { None };
            release.send_replace(true);
            Ok(used)
        };
        let all = async { tokio::try_join!(try_join_all((0..count).map(one)), weighing) };
        let (lags_ms, used) = tokio::time::timeout(DEADLINE, all)
            .await
            .with_context(|| format!("{count} sessions\n{}", self.fleet.logs()))??;
        Ok(Round { used, lags_ms: lags_ms.concat() })
    }

    /// Streams, says when its first final is there, ends when it may, and gives how late its finals came.
    async fn one(
        &self,
        session: String,
        n: u32,
        heard: &watch::Sender<u32>,
        mut released: watch::Receiver<bool>,
    ) -> Result<Vec<u64>> {
        let pcm = &self.calls[n as usize % self.calls.len()];
        let mut finals =
            probe_api::subscribe(&self.fleet.client(), &format!("asr.v1.transcript.session.{session}.final")).await?;
        let begun = Instant::now();
        let sending = async {
            let mut producer = Producer::named(self.fleet.js(), &session, "s1");
            let options = [("Asr-Opt-Language", "en")];
            producer.stream_with(pcm, CHUNK_MS, Pace::Speed(self.speed), &options).await?;
            released.wait_for(|released| *released).await?;
            producer.end().await?;
            anyhow::Ok(())
        };
        let listening = async {
            let mut lags_ms = Vec::new();
            let mut first = true;
            while let Some(stored) = next(&mut finals).await? {
                if let Some(end_ms) = stored["segments"].as_array().and_then(|s| s.last()?["end_ms"].as_u64()) {
                    lags_ms.push(ago(begun, end_ms, self.speed));
                }
                if std::mem::take(&mut first) {
                    heard.send_modify(|n| *n += 1);
                }
                if stored["end"] == true {
                    return Ok(lags_ms);
                }
            }
            anyhow::bail!("{session}: the connection closed before its end final")
        };
        let ((), lags_ms) = tokio::try_join!(sending, listening)?;
        Ok(lags_ms)
    }
}

async fn next(messages: &mut Subscriber) -> Result<Option<Value>> {
    let Some(message) = messages.next().await else { return Ok(None) };
    Ok(Some(serde_json::from_slice(&message.payload)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_sessions_are_held_against_the_fewest() {
        let weighed = json!({ "weights_mb": 28, "state_mb": 65.5, "device": "cpu" });
        let row = |sessions: u32, total_mb: f64| json!({ "sessions": sessions, "total_mb": total_mb });
        let found = answer(&weighed, 85.0, 150.0, vec![row(1, 200.0), row(4, 230.0), row(16, 220.0)]);
        assert_eq!((found["weights_mb"].as_u64(), found["state_mb"].as_f64()), (Some(28), Some(65.5)));
        assert_eq!(
            (found["rows"][0]["sessions"].as_u64(), found["rows"][2]["total_mb"].as_f64()),
            (Some(1), Some(220.0))
        );
        assert_eq!(found["within_10_percent"], true);
        assert_eq!(answer(&weighed, 85.0, 150.0, vec![row(1, 200.0), row(16, 221.0)])["within_10_percent"], false);
    }
}
