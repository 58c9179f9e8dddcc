//! The test calls at once through two workers, each at the pace it was spoken, beside the same engine called directly on
//! the whole recording.
//!
//! Live is compute-aware: audio arrives at its own pace and one decode state per worker has to keep up with it, so what a
//! machine cannot do in time shows in the lag of its finals.

use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, future::try_join_all};
use serde_json::{Value, json};
use tokio::time::Instant;
use voxfleet_eval::{Edits, text::compare};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker,
    fleet::{Engine, Fleet},
    producer::{Pace, Producer},
};
use voxfleet_schema::{session::SessionOptions, transcript::join_text};
use voxfleet_worker::{engine::direct::transcribe_log, ipc::StartPoint};

use super::{
    pipeline::{CHUNK_MS, Kind, log},
    progress, rounded, usage,
};
use crate::{demo::report::quantile, producer::ago};

const CALLS: std::ops::RangeInclusive<u32> = 1..=5;
const WORKERS: usize = 2;
/// From the end of a call to its end final, on a machine that is behind.
const LAST_WORDS: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench accuracy
  voxfleet bench accuracy --speed 2 --json")]
pub(crate) struct AccuracyArgs {
    /// Times real time
    #[arg(long, default_value_t = 1.0, value_name = "N")]
    speed: f64,
}

/// What one call gave live.
struct Heard {
    text: String,
    /// From a final's last sound to its arrival, in ms.
    lags_ms: Vec<u64>,
}

pub(super) async fn run(args: AccuracyArgs) -> Result<Value> {
    usage(args.speed.is_finite() && args.speed > 0.0, "--speed: live audio has a pace, so more than 0")?;
    let calls = CALLS.map(audio::call).collect::<Result<Vec<_>, _>>()?;
    let references = CALLS.map(audio::call_text).collect::<Result<Vec<_>, _>>()?;
    let audio_s: f64 = calls.iter().map(Pcm::seconds).sum();

    progress(&format!("{} calls, {audio_s:.0} s of audio, the engine called directly", calls.len()));
    let offline = {
        let calls = calls.clone();
        tokio::task::spawn_blocking(move || calls.iter().map(offline).collect::<Result<Vec<_>>>()).await??
    };
    progress(&format!("the same live on {WORKERS} workers, all at once, at {} x real time", args.speed));
    let live = live(&calls, args.speed).await?;

    let (mut rows, mut lags) = (Vec::new(), Vec::new());
    let (mut live_errors, mut offline_errors) = (Vec::new(), Vec::new());
    for (((call, reference), heard), offline) in CALLS.zip(&references).zip(&live).zip(&offline) {
        let (of_live, of_offline) = (compare(reference, &heard.text), compare(reference, offline));
        rows.push(json!({
            "call": format!("{call:02}"),
            "live_wer": rounded(of_live.rate()),
            "offline_wer": rounded(of_offline.rate()),
            "same_text": heard.text == *offline,
            "final_lag_p50_ms": quantile(&heard.lags_ms, 0.5),
            "final_lag_p95_ms": quantile(&heard.lags_ms, 0.95),
        }));
        lags.extend(&heard.lags_ms);
        live_errors.push(of_live);
        offline_errors.push(of_offline);
    }
    Ok(json!({
        "rows": rows,
        "live_wer": rounded(together(&live_errors)),
        "offline_wer": rounded(together(&offline_errors)),
        "final_lag_p50_ms": quantile(&lags, 0.5),
        "final_lag_p95_ms": quantile(&lags, 0.95),
        "speed": args.speed,
        "workers": WORKERS,
        "audio_s": rounded(audio_s),
    }))
}

fn offline(pcm: &Pcm) -> Result<String> {
    let mut state = Kind::Micro.states(1)?.pop().context("a decode state")?;
    let (log, options) = (log(pcm), SessionOptions::default());
    let finals = transcribe_log(&log, &options, StartPoint::beginning(), &mut *state, &*Kind::Micro.vad(), None)?;
    Ok(join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str()))))
}

async fn live(calls: &[Pcm], speed: f64) -> Result<Vec<Heard>> {
    let slots = calls.len() as u32;
    let fleet = Fleet::builder().workers(WORKERS).slots(slots).engine(Engine::Micro);
    let fleet = fleet.set("worker.decode_threads", 1).start().await?;
    let calls = calls.iter().enumerate().map(|(n, pcm)| one(&fleet, n, pcm, speed));
    try_join_all(calls).await
}

/// Streams one call and listens to its finals until the last.
async fn one(fleet: &Fleet, n: usize, pcm: &Pcm, speed: f64) -> Result<Heard> {
    let session = format!("accuracy-{n}");
    let mut finals = fleet.client().subscribe(format!("asr.v1.transcript.session.{session}.final")).await?;
    let begun = Instant::now();
    let sending = async {
        let mut producer = Producer::named(fleet.js(), &session, "s1");
        producer.stream(pcm, CHUNK_MS, Pace::Speed(speed)).await?;
        producer.end().await?;
        Ok::<_, anyhow::Error>(())
    };
    let listening = async {
        let mut lags_ms = Vec::new();
        while let Some(message) = finals.next().await {
            let stored: Value = serde_json::from_slice(&message.payload)?;
            if let Some(end_ms) = stored["segments"].as_array().and_then(|s| s.last()?["end_ms"].as_u64()) {
                lags_ms.push(ago(begun, end_ms, speed));
            }
            if stored["end"] == true {
                return Ok(lags_ms);
            }
        }
        Err(anyhow::anyhow!("{session}: the connection closed before its end final"))
    };
    let whole = Duration::from_secs_f64(pcm.seconds() / speed) + LAST_WORDS;
    let both = tokio::time::timeout(whole, async { tokio::try_join!(sending, listening) });
    let ((), lags_ms) = both.await.with_context(|| format!("{session}: no end final within {whole:?}"))??;
    // The stored chain is what counts: what was listened to gives the times only.
    let text = checker::check(&fleet.js(), &session).await?.clean()?.text();
    Ok(Heard { text, lags_ms })
}

/// Word error rate over all calls: long ones count for more.
fn together(errors: &[Edits]) -> f64 {
    errors.iter().copied().sum::<Edits>().rate()
}
