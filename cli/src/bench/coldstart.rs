//! From nothing to the first words.
//!
//! | row | clock starts | and then |
//! |---|---|---|
//! | `cold` | the worker process is started; a session has been speaking for a second and waits for it | engine, model, states, log, decode |
//! | `preloaded` | the same; the worker loads the model at its start and not for its first session | |
//! | `idle` | the first chunk of a session at a worker without an engine process, as after idle release | the same without the worker's start |
//! | `prewarmed` | the first chunk of a session that was opened in time for engine and model to be ready | a decode state is made |
//! | `warm` | the first chunk of a session at a worker that has just transcribed another | |
//!
//! The clock stops when a plain subscriber has the first partial with words, or the first final where a machine is so far
//! behind that no partial came before it (`finals_first` counts those). Where a session begins with the clock, words
//! have to be spoken first, and a partial waits for about a second of them: that is the floor, seen in `warm`.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::time::Instant;
use voxfleet_harness::{
    audio::{self, Pcm},
    fleet::{Engine, Fleet, FleetBuilder},
    probe_api,
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_worker::ipc::ModelFile;

use super::{
    models::{Model, Stubs},
    progress, rounded,
};

const CALL: u32 = 1;
/// When its first word begins.
const FIRST_WORD_MS: usize = 534;
/// Short, so that the chunk that is waited for costs little.
const CHUNK_MS: u64 = 100;
/// How long the waiting session has been speaking.
const AHEAD: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(300);
/// How often a worker that has gone is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const GPU: &str = "gpu-1";

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench coldstart
  voxfleet bench coldstart --model base --rounds 3 --json
  voxfleet bench coldstart --model large-v3-turbo --gpu 0")]
pub(crate) struct ColdstartArgs {
    /// micro (the small model of the tests), or random weights: tiny, base, small, medium, large-v3-turbo
    #[arg(long, default_value = "micro", value_name = "NAME")]
    model: Model,
    #[command(flatten)]
    stubs: Stubs,
    /// How often each is measured; the median is reported
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Device of the worker, as `worker --gpu` takes it
    #[arg(long, default_value = "none", value_name = "DEVICE")]
    gpu: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Cold,
    Preloaded,
    Idle,
    Prewarmed,
    Warm,
}

impl Start {
    const ALL: [Start; 5] = [Start::Cold, Start::Preloaded, Start::Idle, Start::Prewarmed, Start::Warm];

    fn as_str(self) -> &'static str {
        match self {
            Start::Cold => "cold",
            Start::Preloaded => "preloaded",
            Start::Idle => "idle",
            Start::Prewarmed => "prewarmed",
            Start::Warm => "warm",
        }
    }
}

pub(super) async fn run(args: ColdstartArgs) -> Result<Value> {
    let file = args.stubs.file(args.model)?;
    let mut speech = audio::call(CALL)?;
    speech.samples.drain(..FIRST_WORD_MS * 16);
    let mut times: [Vec<f64>; 5] = Default::default();
    let mut device = Value::Null;
    let mut finals_first = 0;
    for round in 1..=args.rounds {
        for (start, times) in Start::ALL.into_iter().zip(&mut times) {
            progress(&format!("{}, round {round} of {}", start.as_str(), args.rounds));
            let (first, on) = one(&args, &file, start, &speech).await.with_context(|| start.as_str())?;
            progress(&format!("  {:.0} ms", first.ms));
            times.push(first.ms);
            finals_first += u32::from(first.by == By::Final);
            device = on;
        }
    }
    Ok(answer(
        &times,
        &json!({ "model": file.name, "weights": args.stubs.weights(args.model), "device": device, "finals_first": finals_first, "rounds": args.rounds }),
    ))
}

/// Medians under their fixed names, and all there is as rows.
fn answer(times: &[Vec<f64>; 5], about: &Value) -> Value {
    let mut answer = about.clone();
    let mut rows = Vec::new();
    for (start, times) in Start::ALL.into_iter().zip(times) {
        let mut sorted = times.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |n: usize| sorted.get(n).copied().map(rounded);
        answer[format!("{}_ms", start.as_str())] = at(sorted.len() / 2).into();
        rows.push(json!({
            "start": start.as_str(),
            "min_ms": at(0),
            "median_ms": at(sorted.len() / 2),
            "max_ms": at(sorted.len().saturating_sub(1)),
        }));
    }
    answer["rows"] = rows.into();
    answer
}

fn builder(args: &ColdstartArgs, file: &ModelFile, preload: bool) -> Result<FleetBuilder> {
    let dir = file.path.parent().context("a model lies in a folder")?;
    let builder = Fleet::builder()
        .workers(0)
        .slots(4)
        .engine(Engine::Micro)
        .set("worker.models_dir", dir.display())
        .set("worker.default_model", &file.name)
        .set("worker.gpu", &args.gpu)
        .set("dispatcher.min_decode_rate", 0);
    Ok(if preload { builder.set("worker.preload", &file.name) } else { builder })
}

/// The first words, and the device that said them.
async fn one(args: &ColdstartArgs, file: &ModelFile, start: Start, speech: &Pcm) -> Result<(First, Value)> {
    let mut fleet = builder(args, file, start == Start::Preloaded)?.start().await?;
    let client = fleet.client();
    let session = format!("start-{}", start.as_str());
    let mut heard = probe_api::subscribe(&client, &format!("asr.v1.transcript.session.{session}.*")).await?;
    let mut producer = Producer::named(fleet.js(), &session, "s1");
    let options = [("Asr-Opt-Language", "en")];
    let speaking = async |producer: &mut Producer| -> Result<()> {
        producer.stream_with(speech, CHUNK_MS, Pace::Speed(1.0), &options).await?;
        // Nothing more is said, but the session stays open: its words must come from what was said.
        std::future::pending().await
    };
    let begin = match start {
        Start::Cold | Start::Preloaded => {
            let speaking = speaking(&mut producer);
            tokio::pin!(speaking);
            tokio::select! {
                end = &mut speaking => end?,
                () = tokio::time::sleep(AHEAD) => {}
            }
            let begin = Instant::now();
            fleet.add_worker(GPU)?;
            return until_words(begin, speaking, &mut heard, &mut fleet).await;
        }
        Start::Idle => {
            fleet.add_worker(GPU)?;
            fleet.wait_ready().await?;
            ensure!(fleet.workers[0].engine_pid().is_none(), "the worker has an engine before its first session");
            Instant::now()
        }
        Start::Prewarmed => {
            fleet.add_worker(GPU)?;
            fleet.wait_ready().await?;
            let mut beats = probe_api::heartbeats(&client, GPU).await?;
            // A worker that was heard a moment ago may not be one for new sessions yet.
            let open = || async { probe_api::open(&client, &session, 60).await.ok() };
            eventually("the session is opened", DEADLINE, open).await?;
            let loaded = async {
                while let Some(beat) = beats.next().await {
                    let beat: Value = serde_json::from_slice(&beat.payload)?;
                    let mut models = beat["models"].as_array().into_iter().flatten();
                    if models.any(|m| m["name"] == file.name.as_str() && m["state"] == "loaded") {
                        return Ok(());
                    }
                }
                anyhow::bail!("no heartbeats")
            };
            let loaded = tokio::time::timeout(DEADLINE, loaded).await;
            loaded.with_context(|| format!("an open session does not load its model\n{}", fleet.logs()))??;
            Instant::now()
        }
        Start::Warm => {
            fleet.add_worker(GPU)?;
            fleet.wait_ready().await?;
            // Several, so that every decode state has been used.
            let before: Vec<Producer> =
                (0..4).map(|n| Producer::named(fleet.js(), &format!("before-{n}"), "s1")).collect();
            let before = before.into_iter().map(async |mut producer| {
                producer.stream_with(speech, CHUNK_MS, Pace::AsFastAsPossible, &options).await?;
                producer.end().await?;
                fleet.wait_end(producer.session(), DEADLINE).await
            });
            futures_util::future::try_join_all(before).await?;
            Instant::now()
        }
    };
    until_words(begin, speaking(&mut producer), &mut heard, &mut fleet).await
}

/// Speaks until the first partial with words is there.
async fn until_words(
    begin: Instant,
    speaking: impl Future<Output = Result<()>>,
    heard: &mut probe_api::Subscriber,
    fleet: &mut Fleet,
) -> Result<(First, Value)> {
    let words = async {
        while let Some(message) = heard.next().await {
            let told: Value = serde_json::from_slice(&message.payload)?;
            if let Some(by) = words_by(&told) {
                return Ok((begin.elapsed().as_secs_f64() * 1e3, by));
            }
        }
        anyhow::bail!("the connection closed before the first words")
    };
    let first = async {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        tokio::pin!(words, speaking);
        loop {
            tokio::select! {
                first = &mut words => return first,
                end = &mut speaking => return end.and_then(|()| anyhow::bail!("speaking does not end")),
                // A worker that refuses its device is gone at once.
                _ = looks.tick() => fleet.check_alive()?,
            }
        }
    };
    let found = tokio::time::timeout(DEADLINE, first).await;
    let (ms, by) = found.with_context(|| format!("no words\n{}", fleet.logs()))??;
    let mut beats = probe_api::heartbeats(&fleet.client(), GPU).await?;
    let beat = tokio::time::timeout(DEADLINE, beats.next()).await?.context("no heartbeat")?;
    let beat: Value = serde_json::from_slice(&beat.payload)?;
    Ok((First { ms, by }, beat["engine"]["effective_device"].clone()))
}

/// When the first words came, and by what.
struct First {
    ms: f64,
    by: By,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Partial,
    Final,
}

/// What shows words here, if anything does.
fn words_by(told: &Value) -> Option<By> {
    let has = |text: &Value| text.as_str().is_some_and(|text| !text.trim().is_empty());
    if has(&told["committed"]) || has(&told["tentative"]) {
        return Some(By::Partial);
    }
    told["segments"].as_array()?.iter().any(|segment| has(&segment["text"])).then_some(By::Final)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_by_partials_and_by_finals() {
        assert_eq!(words_by(&json!({"committed": "", "tentative": " good"})), Some(By::Partial));
        assert_eq!(words_by(&json!({"committed": "", "tentative": " "})), None);
        assert_eq!(words_by(&json!({"segments": [{"text": "good morning"}]})), Some(By::Final));
        assert_eq!(words_by(&json!({"segments": []})), None);
    }

    #[test]
    fn medians_have_their_fixed_names() {
        let times = [vec![3.0, 1.0, 2.0], vec![5.0], vec![7.0, 6.0], vec![8.0], vec![9.0]];
        let answer = answer(&times, &json!({ "model": "m" }));
        let ms = |name: &str| answer[name].as_f64();
        assert_eq!((ms("cold_ms"), ms("warm_ms"), ms("prewarmed_ms")), (Some(2.0), Some(9.0), Some(8.0)));
        assert_eq!((ms("preloaded_ms"), ms("idle_ms")), (Some(5.0), Some(7.0)));
        assert_eq!(answer["rows"][0], json!({"start": "cold", "min_ms": 1.0, "median_ms": 2.0, "max_ms": 3.0}));
        assert_eq!(answer["model"], "m");
    }
}
