//! One long recording as a file job, against the same engine called directly on the same file: submitted over NATS, placed
//! by the dispatcher, fetched from the object store, decoded in its own process, transcribed by the worker's engine child.
//!
//! Both sides have one decode state of one thread and a model that is loaded. The clock of the job runs from the request to
//! the arrival of the end final that names its result; that of the direct call from opening the file to its last final.
//! They take turns, and the median of the rounds' ratios counts.

use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use voxfleet_audio::{Decoder, EntryMaker, Limits};
use voxfleet_harness::{
    audio::{self, Pcm},
    fleet::Fleet,
    probe_api,
    wait::eventually,
};
use voxfleet_nats::{Nats, NatsConfig, media::Media};
use voxfleet_schema::{job::JobResult, session::SessionOptions, transcript::join_text};
use voxfleet_worker::{engine::direct::transcribe_log, ipc::StartPoint};

use super::{
    pipeline::Kind,
    processes, progress, recording, rounded,
    sampled::{Processes, Sampled},
    usage,
};

/// Beyond the time the direct call took, or for the first job of a worker.
const DEADLINE: Duration = Duration::from_secs(1_800);
const ASK: Duration = Duration::from_secs(10);
/// Longest aggregate read back.
const MAX_RESULT: usize = 1 << 30;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct JobArgs {
    /// One long recording as a file job instead of live sessions
    #[arg(long)]
    jobs: bool,
    /// With --jobs: length of the simulated engine's recording
    #[arg(long, default_value_t = 1_800.0, value_name = "SECONDS", requires = "jobs")]
    job_seconds: f64,
    /// With --jobs: length of the real engine's recording (the test calls one after the other)
    #[arg(long, default_value_t = 1_800.0, value_name = "SECONDS", requires = "jobs")]
    real_seconds: f64,
    /// With --jobs: how often each side has its turn
    #[arg(long, default_value_t = 3, value_name = "N", requires = "jobs", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// With --jobs: how often with the real engine
    #[arg(long, default_value_t = 1, value_name = "N", requires = "jobs", value_parser = clap::value_parser!(u32).range(1..=100))]
    real_rounds: u32,
    /// With --jobs: no comparison, but the memory of every process while a recording of so many hours is transcribed by the
    /// simulated engine without delay
    #[arg(long, value_name = "HOURS", requires = "jobs")]
    hours: Option<f64>,
    /// With --hours: channels of the recording, each transcribed by itself; more than one come from a file (1 MB for each
    /// second of 32) and not from the object store
    #[arg(long, default_value_t = 1, value_name = "N", requires = "hours", value_parser = clap::value_parser!(u16).range(1..=32))]
    channels: u16,
}

impl JobArgs {
    pub(super) fn wanted(&self) -> bool {
        self.jobs
    }
}

pub(super) async fn run(args: &JobArgs, speed: f64, simulated_only: bool) -> Result<Value> {
    if let Some(hours) = args.hours {
        usage((0.01..=24.0).contains(&hours), "--hours: 0.01 to 24")?;
        return long_file(hours, usize::from(args.channels)).await;
    }
    usage(args.job_seconds >= 1.0 && args.real_seconds >= 1.0, "nothing to measure")?;
    let bursts = audio::bursts(1, args.job_seconds);
    let simulated = measure(&Kind::Simulated { speed }, &bursts, args.rounds).await?;
    let mut result = json!({
        "ratio": simulated["ratio"],
        "simulated": simulated,
        "speed": speed,
    });
    if !simulated_only {
        let calls = recording::calls(&[1, 2, 4, 5], args.real_seconds)?;
        result["real"] = measure(&Kind::Micro, &calls.pcm, args.real_rounds).await?;
    }
    Ok(result)
}

/// Finals only, on both sides.
fn options() -> SessionOptions {
    SessionOptions { interim: false, ..SessionOptions::default() }
}

async fn measure(kind: &Kind, pcm: &Pcm, rounds: u32) -> Result<Value> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("long.wav");
    recording::write_wav(&path, pcm, pcm.seconds())?;
    let fleet = Fleet::builder().workers(1).slots(1).engine(kind.engine()).set("worker.job_slots", 1);
    let fleet = fleet.set("worker.decode_states", 1).set("worker.decode_threads", 1).start().await?;
    let store = Store::connect(&fleet).await?;
    let warm = dir.path().join("warm.wav");
    recording::write_wav(&warm, pcm, 5.0)?;
    store.put("warm", &warm).await?;
    job(&fleet, &store, "warm", "warm").await?;
    store.put("long", &path).await?;

    let (name, seconds) = (kind.name(), pcm.seconds());
    let (mut ratios, mut directs, mut jobs, mut last, mut equal) = (Vec::new(), Vec::new(), Vec::new(), None, true);
    for round in 1..=rounds {
        progress(&format!("{name} engine called directly on {seconds:.0} s, round {round} of {rounds}"));
        let (direct_s, expected) = {
            let (kind, path) = (kind.clone(), path.clone());
            tokio::task::spawn_blocking(move || direct(&kind, &path)).await??
        };
        progress(&format!("{name} engine as a job, round {round} of {rounds}"));
        let (job_s, result) = job(&fleet, &store, &format!("long-{round}"), "long").await?;
        equal &= result.full_text == expected;
        ratios.push(direct_s / job_s);
        directs.push(direct_s);
        jobs.push(job_s);
        last = Some(result);
    }
    let last = last.context("no round")?;
    let (direct_s, job_s) = (median(&directs), median(&jobs));
    Ok(json!({
        "ratio": rounded(median(&ratios)),
        "ratio_min": rounded(ratios.iter().copied().fold(f64::INFINITY, f64::min)),
        "ratio_max": rounded(ratios.iter().copied().fold(0.0, f64::max)),
        "rounds": rounds,
        "fleet_audio_s_per_s": rounded(seconds / job_s),
        "direct_audio_s_per_s": rounded(seconds / direct_s),
        "fleet_s": rounded(job_s),
        "direct_s": rounded(direct_s),
        "audio_s": rounded(seconds),
        "threads": 1,
        "text_equal": equal,
        "stages_s": last.performance_metrics.stages,
        // Request, placing and the answer: what is neither queue nor worker.
        "worker_s": rounded(last.performance_metrics.total_duration),
    }))
}

pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        n if n.is_multiple_of(2) => sorted[middle - 1].midpoint(sorted[middle]),
        _ => sorted[middle],
    }
}

/// Seconds from opening the file to the last final, and the text.
pub(super) fn direct(kind: &Kind, path: &Path) -> Result<(f64, String)> {
    let mut state = kind.states(1)?.pop().context("a decode state")?;
    let vads = kind.vad();
    let begin = Instant::now();
    let mut decoder = Decoder::open(File::open(path)?, path.file_name().and_then(|n| n.to_str()), &Limits::default())?;
    let (mut maker, mut log) = (EntryMaker::default(), Vec::new());
    while let Some(chunk) = decoder.next()? {
        log.push(maker.chunk(chunk));
    }
    log.push(maker.end());
    let finals = transcribe_log(&log, &options(), StartPoint::beginning(), &mut *state, &*vads, None)?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok((seconds, join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str())))))
}

/// The object store of a fleet, as clients see it.
pub(super) struct Store(Media);

impl Store {
    pub(super) async fn connect(fleet: &Fleet) -> Result<Self> {
        // The bucket is there, and requests are answered, as soon as a dispatcher is active.
        let client = fleet.client();
        eventually("the dispatcher answers", ASK, || probe_api::fleet_status(&client)).await?;
        let config = NatsConfig { urls: fleet.urls(), ..NatsConfig::default() };
        Ok(Self(Media::new(&Nats::connect(&config, "bench").await?)))
    }

    pub(super) async fn put(&self, key: &str, path: &Path) -> Result<()> {
        self.0.put(key, tokio::fs::File::open(path).await?).await?;
        Ok(())
    }
}

/// Submits what lies under `key` and waits for its result; seconds from the request to the end final.
pub(super) async fn job(fleet: &Fleet, store: &Store, id: &str, key: &str) -> Result<(f64, JobResult)> {
    job_at(fleet, store, id, &format!("object://asr_media/{key}"), json!({"interim": false})).await
}

async fn job_at(fleet: &Fleet, store: &Store, id: &str, audio: &str, options: Value) -> Result<(f64, JobResult)> {
    let client = fleet.client();
    let mut finals = client.subscribe(format!("asr.v1.transcript.job.{id}.final")).await?;
    client.flush().await?;
    let request = json!({ "job": id, "audio": audio, "name": "long.wav", "options": options });
    let begin = Instant::now();
    let asked = client.request("asr.v1.api.job.submit", request.to_string().into());
    let answer = tokio::time::timeout(ASK, asked).await.context("nobody answers job.submit")??;
    let answer: Value = serde_json::from_slice(&answer.payload)?;
    ensure!(answer.get("ok").is_some(), "job.submit: {answer}");
    let ended = async {
        while let Some(message) = finals.next().await {
            let value: Value = serde_json::from_slice(&message.payload)?;
            if value["end"] == true {
                return Ok(value);
            }
        }
        bail!("the connection closed before the job's end")
    };
    let end = tokio::time::timeout(DEADLINE, ended).await.with_context(|| format!("{id}: not done in time"))??;
    let seconds = begin.elapsed().as_secs_f64();
    let Some(url) = end["result"].as_str() else { bail!("{id} failed: {}", end["error"]) };
    let key = url.strip_prefix("object://asr_media/").context("a result outside the object store")?;
    let bytes = store.0.get_bytes(key, MAX_RESULT).await?.context("the result is not there")?;
    Ok((seconds, serde_json::from_slice(&bytes)?))
}

/// Memory while a recording of `hours` is transcribed.
async fn long_file(hours: f64, channels: usize) -> Result<Value> {
    let dir = tempfile::tempdir()?;
    let (path, seconds) = (dir.path().join("long.wav"), hours * 3_600.0);
    progress(&format!("writing {hours} h of audio, {channels} channels"));
    let written: PathBuf = path.clone();
    tokio::task::spawn_blocking(move || recording::write_wav(&written, &many(channels), seconds)).await??;
    let bytes = path.metadata()?.len();
    let kind = Kind::Simulated { speed: 0.0 };
    let fleet = Fleet::builder().workers(1).slots(1).engine(kind.engine()).set("worker.job_slots", 1);
    let root = dir.path().canonicalize()?;
    let fleet = fleet.set("worker.decode_states", 1).set("worker.fetch.file_roots", root.display());
    let fleet = fleet.set("worker.fetch.max_bytes", bytes + 1).start().await?;
    let store = Store::connect(&fleet).await?;
    let [nats_server, dispatcher, supervisor, _] = processes::first_pids(&fleet);
    let mut sampled = Sampled::default();
    let work = async {
        if channels > 1 {
            progress(&format!("transcribing {} MB", bytes >> 20));
            let audio = format!("file://{}", root.join("long.wav").display());
            let options = json!({"interim": false, "channels": "split"});
            let (job_s, result) = job_at(&fleet, &store, "long", &audio, options).await?;
            return Ok((None, job_s, result));
        }
        progress(&format!("putting {} MB into the object store", bytes >> 20));
        let begin = Instant::now();
        store.put("long", &path).await?;
        let upload_s = begin.elapsed().as_secs_f64();
        progress("transcribing it");
        let (job_s, result) = job(&fleet, &store, "long", "long").await?;
        Ok::<_, anyhow::Error>((Some(upload_s), job_s, result))
    };
    let (upload_s, job_s, result) = tokio::select! {
        done = work => done?,
        () = sampled.watch(Processes { nats_server, dispatcher, supervisor }) => bail!("the watch ended"),
    };
    ensure!((result.duration - seconds).abs() < 1.0, "{} s came out of {seconds} s", result.duration);
    Ok(json!({
        "hours": hours,
        "channels": channels,
        "file_mb": bytes >> 20,
        "upload_s": upload_s.map(rounded),
        "job_s": rounded(job_s),
        "audio_s_per_s": rounded(seconds / job_s),
        "stages_s": result.performance_metrics.stages,
        "segments": result.segments.len(),
        "channels_heard": result.segments.iter().filter_map(|s| s.channel).collect::<BTreeSet<_>>().len(),
        "result_mb": rounded(serde_json::to_vec(&result)?.len() as f64 / f64::from(1 << 20)),
        "resident_mb": sampled.json(),
    }))
}

/// Ten minutes of one channel, or one of many that know nothing of each other.
fn many(channels: usize) -> Pcm {
    if channels == 1 {
        return audio::bursts(1, 600.0);
    }
    let each: Vec<Pcm> = (1..).take(channels).map(|seed| audio::bursts(seed, 60.0)).collect();
    let frames = each.iter().map(|pcm| pcm.samples.len()).min().unwrap_or(0);
    let samples = (0..frames).flat_map(|frame| each.iter().map(move |pcm| pcm.samples[frame])).collect();
    Pcm { channels, ..Pcm::mono_16k(samples) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_lie_beside_each_other() {
        let pcm = many(3);
        assert_eq!((pcm.channels, pcm.seconds()), (3, 60.0));
        let second: Vec<i16> = pcm.samples.chunks(3).map(|frame| frame[1]).collect();
        assert_eq!(second, audio::bursts(2, 60.0).samples);
    }

    #[test]
    fn the_middle_of_the_ratios_counts() {
        assert_eq!(median(&[0.9, 0.99, 0.5]), 0.9);
        assert_eq!(median(&[1.0, 2.0]), 1.5);
        assert_eq!(median(&[]), 0.0);
    }
}
