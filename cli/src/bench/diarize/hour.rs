//! An hour of one live session in which people speak who were never heard before: what grows?
//!
//! A real server, dispatcher and worker with an engine that takes no time for words; the calls come again and again, each time
//! at another pitch and pace, so that voices are others. Each minute of audio, when its final is there, resident memory is
//! looked at, and how large the session's checkpoint is. Growth is the slope of a straight line through the minutes behind the
//! first tenth, and through those of the second half: buffers and allocators come to their size before.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use voxfleet_harness::{
    audio::{self, Pcm},
    child::resident_bytes,
    fleet::{Engine, Fleet},
    probe_api,
    producer::{Pace, Producer},
};

use super::Found;
use crate::bench::{
    processes::{self, Memory},
    progress, rounded, usage,
};

const SESSION: &str = "hour";
const CHUNK_MS: u64 = 200;
/// Beyond the time that the audio takes.
const DEADLINE: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, clap::Args)]
pub(super) struct HourArgs {
    /// With --hour: other than 60
    #[arg(long, default_value_t = 60, value_name = "N", requires = "hour", value_parser = clap::value_parser!(u32).range(2..=1440))]
    minutes: u32,
    /// With --hour: times real time
    #[arg(long, default_value_t = 20.0, value_name = "N", requires = "hour")]
    speed: f64,
}

/// What was seen when a minute of audio was done.
#[derive(Debug, Clone, Copy)]
struct Minute {
    engine_mb: f64,
    supervisor_mb: f64,
    checkpoint_bytes: usize,
    labels: u64,
}

pub(super) async fn run(args: &HourArgs, found: &Found) -> Result<Value> {
    usage(args.speed > 0.0, "--speed: more than nought")?;
    let library = found.library.as_ref().context("ONNX Runtime is not here")?;
    let mut builder = Fleet::builder().workers(1).slots(1).engine(Engine::Simulated { speed: 0.0 });
    builder = builder.set("worker.onnxruntime", library.display()).set("worker.decode_states", 1);
    let files = [
        ("worker.segmentation_model", &found.config.segmentation),
        ("worker.speaker_encoder", &found.config.encoder),
        ("worker.silero_model", &found.silero),
    ];
    for (setting, file) in files {
        if let Some(file) = file {
            builder = builder.set(setting, file.display());
        }
    }
    let fleet = builder.start().await?;
    let calls = (1..=5).map(audio::call).collect::<Result<Vec<_>, _>>()?;
    progress(&format!("{} minutes at {} x real time", args.minutes, args.speed));
    let seconds = f64::from(args.minutes) * 60.0;
    let patience = DEADLINE + Duration::from_secs_f64(seconds / args.speed * 2.0);
    let both = async { tokio::try_join!(speak(&fleet, &calls, seconds, args.speed), watch(&fleet)) };
    let ((), minutes) =
        tokio::time::timeout(patience, both).await.with_context(|| format!("not done in time\n{}", fleet.logs()))??;
    Ok(json!({ "hour": told(&minutes), "speed": args.speed, "segmentation": found.config.segmentation.is_some() }))
}

/// The calls, never twice at one pace.
async fn speak(fleet: &Fleet, calls: &[Pcm], seconds: f64, speed: f64) -> Result<()> {
    let mut producer = Producer::named(fleet.js(), SESSION, "s1");
    let mut spoken_s = 0.0;
    let paces = (0..).map(|n| 0.75 + 0.6 * (f64::from(n) * 0.618_034).fract());
    for (call, (n, pace)) in calls.iter().cycle().zip((0..).zip(paces)) {
        if spoken_s >= seconds {
            break;
        }
        let other = faster(call, pace);
        spoken_s += other.seconds();
        let options: &[(&str, &str)] =
            if n == 0 { &[("Asr-Opt-Diarize", "true"), ("Asr-Opt-Language", "en")] } else { &[] };
        producer.stream_with(&other, CHUNK_MS, Pace::Speed(speed), options).await?;
    }
    producer.end().await?;
    Ok(())
}

/// The same played so much faster: higher, too.
fn faster(pcm: &Pcm, factor: f64) -> Pcm {
    let samples = &pcm.samples;
    let count = (samples.len() as f64 / factor) as usize;
    let at = |n: usize| {
        let place = n as f64 * factor;
        let (first, share) = (place as usize, place.fract());
        let value = |index: usize| f64::from(samples.get(index).copied().unwrap_or(0));
        (value(first) * (1.0 - share) + value(first + 1) * share).round() as i16
    };
    Pcm::mono_16k((0..count).map(at).collect())
}

/// Looks whenever a final ends a minute, until the last.
async fn watch(fleet: &Fleet) -> Result<Vec<Minute>> {
    let mut finals =
        probe_api::subscribe(&fleet.client(), &format!("asr.v1.transcript.session.{SESSION}.final")).await?;
    let checkpoints = fleet.js().get_stream("ASR_CHECKPOINT").await?;
    let [_, _, supervisor, _] = processes::first_pids(fleet);
    let mut minutes = Vec::new();
    while let Some(message) = finals.next().await {
        let stored: Value = serde_json::from_slice(&message.payload)?;
        let done = stored["to_sample"].as_u64().unwrap_or(0) / (16_000 * 60);
        if done as usize > minutes.len() {
            let engine = fleet.workers.first().and_then(|w| w.engine_pid()).context("no engine process")?;
            let mb = |pid: u32| resident_bytes(pid).map(Memory::mb).context("a process has ended");
            let subject = format!("asr.v1.checkpoint.session.{SESSION}");
            let checkpoint = checkpoints.get_last_raw_message_by_subject(&subject).await;
            let minute = Minute {
                engine_mb: mb(engine)?,
                supervisor_mb: mb(supervisor)?,
                checkpoint_bytes: checkpoint.map_or(0, |message| message.payload.len()),
                labels: stored["speakers"]["labels"].as_u64().unwrap_or(0),
            };
            minutes.resize(done as usize, minute);
        }
        if stored["end"] == true {
            return Ok(minutes);
        }
    }
    bail!("the connection closed before the end final")
}

fn told(minutes: &[Minute]) -> Value {
    let process = |mb: fn(&Minute) -> f64| {
        let growth = |from: usize| rounded(60.0 * slope(&minutes[from..].iter().map(mb).collect::<Vec<_>>()));
        let all: Vec<f64> = minutes.iter().map(mb).collect();
        json!({
            "first_mb": all.first().copied().map(rounded),
            "max_mb": rounded(all.iter().copied().fold(0.0, f64::max)),
            "last_mb": all.last().copied().map(rounded),
            "growth_mb_per_hour": growth(minutes.len() / 10),
            "growth_of_second_half_mb_per_hour": growth(minutes.len() / 2),
            "each_minute_mb": all.iter().map(|mb| format!("{mb:.0}")).collect::<Vec<_>>().join(" "),
        })
    };
    json!({
        "minutes": minutes.len(),
        "engine": process(|minute| minute.engine_mb),
        "supervisor": process(|minute| minute.supervisor_mb),
        "labels": minutes.last().map(|minute| minute.labels),
        "checkpoint_max_bytes": minutes.iter().map(|minute| minute.checkpoint_bytes).max(),
        "checkpoint_last_bytes": minutes.last().map(|minute| minute.checkpoint_bytes),
    })
}

/// Of the straight line nearest to these values, one step from each to the next.
fn slope(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let (middle, mean) = ((count - 1.0) / 2.0, values.iter().sum::<f64>() / count);
    let (mut up, mut along) = (0.0, 0.0);
    for (n, value) in values.iter().enumerate() {
        let x = n as f64 - middle;
        up += x * (value - mean);
        along += x * x;
    }
    if along > 0.0 { up / along } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_that_of_the_settled_minutes() {
        let minute = |n: usize, engine_mb: f64| Minute {
            engine_mb,
            supervisor_mb: 30.0,
            checkpoint_bytes: 1_000 * n.min(9),
            labels: n as u64,
        };
        // It jumps to its size in the first minutes and then takes half an MB each minute, in the end nothing.
        let size = |n: usize| if n < 2 { 10.0 } else { 100.0 + 0.5 * n.min(10) as f64 };
        let row = told(&(0..20).map(|n| minute(n, size(n))).collect::<Vec<_>>());
        assert_eq!(row["engine"]["growth_of_second_half_mb_per_hour"].as_f64(), Some(0.0));
        let minutes: Vec<Minute> =
            (0..20).map(|n| minute(n, if n < 2 { 10.0 } else { 100.0 + 0.5 * n as f64 })).collect();
        let row = told(&minutes);
        assert_eq!(row["engine"]["growth_mb_per_hour"].as_f64(), Some(30.0));
        assert_eq!(row["engine"]["growth_of_second_half_mb_per_hour"].as_f64(), Some(30.0));
        assert_eq!(row["supervisor"]["growth_mb_per_hour"].as_f64(), Some(0.0));
        assert_eq!((row["engine"]["first_mb"].as_f64(), row["engine"]["last_mb"].as_f64()), (Some(10.0), Some(109.5)));
        assert_eq!((row["labels"].as_u64(), row["checkpoint_max_bytes"].as_u64()), (Some(19), Some(9_000)));
        assert_eq!(told(&minutes[..1])["engine"]["growth_mb_per_hour"].as_f64(), Some(0.0));
    }

    #[test]
    fn faster_is_shorter_and_higher() {
        let wave = |hz: f64, n: usize| {
            let at = |i: usize| ((i as f64 * hz / 16_000.0 * std::f64::consts::TAU).sin() * 9_000.0).round() as i16;
            Pcm::mono_16k((0..n).map(at).collect())
        };
        let (fast, expected) = (faster(&wave(200.0, 16_000), 1.25), wave(250.0, 12_800));
        assert_eq!(fast.samples.len(), expected.samples.len());
        let off = fast.samples.iter().zip(&expected.samples).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(off.is_some_and(|off| off < 60), "{off:?}");
    }
}
