//! Audio seconds per second through NATS and the fleet, against the same engine called directly on the same audio.
//!
//! Both decode finals only (no partials), with the same number of threads, from a backlog: neither ever waits for audio.
//! The direct rate is the audio divided by the busy time of its threads as if they were perfectly balanced, so the
//! fleet is held to the most that the engine could do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker,
    fleet::{self, Engine, Fleet},
    load,
};
use voxfleet_schema::{audio::RawEntry, session::SessionOptions, transcript::join_text};
use voxfleet_worker::{
    engine::{
        Recognizer,
        direct::transcribe_log,
        simulated::SimulatedModel,
        vad::{self, VadFactory},
        whisper::WhisperModel,
    },
    ipc::{SimulatedConfig, StartPoint},
};

use super::{
    cached,
    jobs::{self, JobArgs},
    progress, rounded, usage,
};

pub(super) const CHUNK_MS: u64 = 200;
const MICRO: &str = "micro.en-q8_0";
const DEADLINE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench pipeline
  voxfleet bench pipeline --jobs --simulated-only --json
  voxfleet bench pipeline --jobs --hours 8
  voxfleet bench pipeline --jobs --hours 1 --channels 32 --json")]
pub(crate) struct PipelineArgs {
    /// Sessions at once
    #[arg(long, default_value_t = 16, value_name = "N")]
    sessions: usize,
    /// Audio of each session
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    seconds: f64,
    /// Speed of the simulated engine, times real time
    #[arg(long, default_value_t = 20.0, value_name = "N")]
    speed: f64,
    /// Decode threads of the simulated engine
    #[arg(long, default_value_t = 2, value_name = "N")]
    threads: usize,
    /// Leave out the real engine
    #[arg(long)]
    simulated_only: bool,
    #[command(flatten)]
    job: JobArgs,
}

/// How one kind of engine is loaded on both sides.
#[derive(Clone)]
pub(super) enum Kind {
    Simulated { speed: f64 },
    Micro,
}

impl Kind {
    /// One decode state with weights of its own would not be the same: states share them.
    pub(super) fn states(&self, n: usize) -> Result<Vec<Box<dyn Recognizer>>> {
        match self {
            Kind::Simulated { speed } => {
                let config = SimulatedConfig { speed: *speed, ..SimulatedConfig::default() };
                let model = SimulatedModel::load("simulated", &config)?;
                (0..n).map(|_| Ok(Box::new(model.state()?) as Box<dyn Recognizer>)).collect()
            }
            Kind::Micro => {
                let path = fleet::models_dir().join(format!("{MICRO}.bin"));
                let model = WhisperModel::load(MICRO, &path, false, 1)?;
                (0..n).map(|_| Ok(Box::new(model.state()?) as Box<dyn Recognizer>)).collect()
            }
        }
    }

    pub(super) fn vad(&self) -> Arc<dyn VadFactory> {
        match self {
            Kind::Simulated { .. } => Arc::new(vad::Energy),
            Kind::Micro => {
                let (silero, library) = (cached("models/silero_vad.onnx"), cached("lib/libonnxruntime.so"));
                vad::best_available(silero.as_deref(), library.as_deref()).0
            }
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Kind::Simulated { .. } => "simulated",
            Kind::Micro => "real",
        }
    }

    pub(super) fn engine(&self) -> Engine {
        match self {
            Kind::Simulated { speed } => Engine::Simulated { speed: *speed },
            Kind::Micro => Engine::Micro,
        }
    }
}

pub(super) async fn run(args: PipelineArgs) -> Result<Value> {
    if args.job.wanted() {
        return jobs::run(&args.job, args.speed, args.simulated_only).await;
    }
    usage(args.sessions >= 1 && args.threads >= 1 && args.seconds >= 1.0, "nothing to measure")?;
    let recordings: Vec<Pcm> = (0..args.sessions as u64).map(|n| audio::bursts(n, args.seconds)).collect();
    let simulated = measure(Kind::Simulated { speed: args.speed }, recordings, args.threads).await?;
    let mut result = json!({
        "ratio": simulated["ratio"],
        "simulated": simulated,
        "speed": args.speed,
    });
    if !args.simulated_only {
        let recordings = (1..=5).map(audio::call).collect::<Result<Vec<_>, _>>()?;
        // The second core is left to everything that is not the engine.
        result["real"] = measure(Kind::Micro, recordings, 1).await?;
    }
    Ok(result)
}

async fn measure(kind: Kind, recordings: Vec<Pcm>, threads: usize) -> Result<Value> {
    let audio_s: f64 = recordings.iter().map(Pcm::seconds).sum();
    let name = kind.name();
    progress(&format!("{name} engine called directly on {audio_s:.0} s of audio, {threads} threads"));
    let (direct_s, expected) = {
        let (kind, recordings) = (kind.clone(), recordings.clone());
        tokio::task::spawn_blocking(move || direct(&kind, &recordings, threads)).await??
    };
    progress(&format!("{name} engine through NATS and the fleet"));
    let (fleet_s, heard) = through_the_fleet(&kind, &recordings, threads).await?;
    Ok(json!({
        "ratio": rounded(direct_s / fleet_s),
        "fleet_audio_s_per_s": rounded(audio_s / fleet_s),
        "direct_audio_s_per_s": rounded(audio_s / direct_s),
        "audio_s": rounded(audio_s),
        "sessions": recordings.len(),
        "threads": threads,
        "text_equal": heard == expected,
    }))
}

/// No partials: finals are what both sides must produce, whatever the load.
fn options() -> SessionOptions {
    SessionOptions { interim: false, ..SessionOptions::default() }
}

pub(super) fn log(pcm: &Pcm) -> Vec<RawEntry> {
    let (bytes, size) = (Bytes::from(pcm.bytes()), pcm.chunk_bytes(CHUNK_MS));
    let pieces = (0..bytes.len()).step_by(size).map(|from| bytes.slice(from..(from + size).min(bytes.len())));
    let mut entries: Vec<RawEntry> =
        pieces.zip(1..).map(|(payload, seq)| RawEntry { seq, headers: Vec::new(), payload }).collect();
    let end = vec![("Asr-End".to_owned(), "1".to_owned())];
    entries.push(RawEntry { seq: entries.len() as u64 + 1, headers: end, payload: Bytes::new() });
    entries
}

/// Seconds that perfectly balanced threads would take, and each recording's text.
fn direct(kind: &Kind, recordings: &[Pcm], threads: usize) -> Result<(f64, Vec<String>)> {
    let (vads, next) = (kind.vad(), AtomicUsize::new(0));
    let logs: Vec<Vec<RawEntry>> = recordings.iter().map(log).collect();
    let mut texts = vec![String::new(); logs.len()];
    let mut busy_s = 0.0;
    let states = kind.states(threads)?;
    std::thread::scope(|scope| -> Result<()> {
        let mut running = Vec::new();
        for mut state in states {
            let (vads, next, logs) = (&vads, &next, &logs);
            running.push(scope.spawn(move || -> Result<(f64, Vec<(usize, String)>)> {
                let (begin, mut done) = (Instant::now(), Vec::new());
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(log) = logs.get(n) else { break };
                    let finals = transcribe_log(log, &options(), StartPoint::beginning(), &mut *state, &**vads, None)?;
                    done.push((n, join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str())))));
                }
                Ok((begin.elapsed().as_secs_f64(), done))
            }));
        }
        for thread in running {
            let (seconds, done) = thread.join().map_err(|_| anyhow::anyhow!("a decode thread panicked"))??;
            busy_s += seconds;
            done.into_iter().for_each(|(n, text)| texts[n] = text);
        }
        Ok(())
    })?;
    Ok((busy_s / threads as f64, texts))
}

async fn through_the_fleet(kind: &Kind, recordings: &[Pcm], threads: usize) -> Result<(f64, Vec<String>)> {
    let fleet = Fleet::builder()
        .workers(1)
        .slots(recordings.len() as u32 + 1)
        .engine(kind.engine())
        .set("worker.decode_states", threads)
        .set("worker.decode_threads", 1)
        .start()
        .await?;
    let mut ends = load::Ends::listen(&fleet.client()).await?;
    // The engine child and its model are there before the clock starts, as they are for the direct call.
    load::upload(fleet.client(), "warm", &audio::bursts(99, 2.0), CHUNK_MS, &[]).await?;
    ends.wait(["warm".to_owned()], DEADLINE).await?;

    let first = [("Asr-Opt-Interim", "false")];
    let name = |n: usize| format!("pipeline-{n}");
    let begin = Instant::now();
    let uploads = recordings.iter().enumerate().map(|(n, pcm)| {
        let client = fleet.client();
        async move { load::upload(client, &name(n), pcm, CHUNK_MS, &first).await }
    });
    let (uploaded, ended) = tokio::join!(try_join_all(uploads), ends.wait((0..recordings.len()).map(name), DEADLINE));
    uploaded?;
    ended?;
    let seconds = begin.elapsed().as_secs_f64();
    let mut texts = Vec::new();
    for n in 0..recordings.len() {
        let report = checker::check(&fleet.js(), &name(n)).await?.clean().context("the fleet's chain is broken")?;
        texts.push(report.text());
    }
    Ok((seconds, texts))
}
