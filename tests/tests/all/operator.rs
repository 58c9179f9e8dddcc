//! What an operator asks a fleet: why something is where it is, what waits where, and to give up a GPU in good order.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio,
    fleet::{self, Fleet},
    producer::{Pace, Producer},
    verdict,
    wait::eventually,
};

use crate::dead_letters::{said, typed};

const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_gpu_hands_over_and_the_reasons_are_told() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder().workers(2).slots(4).start().await?;
    let outcome = drained(&mut fleet).await;
    outcome.with_context(|| fleet.logs())
}

async fn drained(fleet: &mut Fleet) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (url, dir) = (fleet.url(), dir.path());
    let types = |words: &'static [&'static str]| {
        let url = url.clone();
        async move { typed(&url, dir, words).await }
    };
    let pcm = audio::bursts(55, 6.0);
    let mut producer = Producer::named(fleet.js(), "call", "s");
    let half = audio::Pcm::mono_16k(pcm.samples[..48_000].to_vec());
    producer.stream(&half, 200, Pace::AsFastAsPossible).await?;

    let why = || async {
        let output = types(&["status", "--why", "call", "--json"]).await?;
        ensure!(output.status.success(), "{}", said(&output));
        Ok::<Value, anyhow::Error>(serde_json::from_slice(&output.stdout)?)
    };
    let owner = eventually("somebody has it", SOON, || async {
        why().await.ok()?["record"]["worker"]["gpu_id"].as_str().map(str::to_owned)
    })
    .await?;
    let told = types(&["status", "--why", "call"]).await?;
    for part in ["state        assigned", "DECISION", "chosen", "would do", owner.as_str()] {
        ensure!(said(&told).contains(part), "{part:?} is not in:\n{}", said(&told));
    }
    ensure!(types(&["status", "--why", "nobody"]).await?.status.code() == Some(66));
    let table = types(&["status"]).await?;
    ensure!(said(&table).contains("QUEUED") && said(&table).contains("1 sessions on GPUs"), "{}", said(&table));

    // It goes, and what it held is elsewhere.
    ensure!(types(&["drain", "gpu-of-nobody"]).await?.status.code() == Some(66));
    let words = ["drain", owner.as_str(), "--deadline", "20s", "--wait", "--json"];
    let gone = typed(&url, dir, &words).await?;
    ensure!(gone.status.success(), "{}", said(&gone));
    let gone: Value = serde_json::from_slice(&gone.stdout)?;
    ensure!(gone["sessions"] == 1 && gone["workers"][0]["gpu_id"] == owner.as_str(), "{gone}");
    let moved = eventually("somebody else has it", SOON, || async {
        let why = why().await.ok()?;
        (why["record"]["worker"]["gpu_id"] != owner.as_str()).then_some(why)
    })
    .await?;
    let events = moved["events"].as_array().context("events")?;
    ensure!(events.iter().any(|e| e["what"] == "moved"), "{moved:#}");

    // Without a dispatcher the streams tell it all the same.
    for dispatcher in &mut fleet.dispatchers {
        dispatcher.kill9()?;
    }
    let told = types(&["status", "--why", "call"]).await?;
    ensure!(told.status.success() && said(&told).contains("no dispatcher"), "{}", said(&told));
    ensure!(said(&told).contains("moved") && said(&told).contains("chosen"), "{}", said(&told));

    // The worker goes on from the log alone.
    let rest = audio::Pcm::mono_16k(pcm.samples[48_000..].to_vec());
    producer.stream(&rest, 200, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    let text = fleet.wait_end("call", SOON).await?;
    // The pause in the sending is an entry of the log, so the samples are counted, not the words compared.
    verdict::session(&fleet.js(), "call", &pcm.samples).await?.clean("call")?;
    ensure!(!text.is_empty());
    Ok(())
}
