//! `voxfleet doctor` in front of a fleet that is broken in one way after the other: each is named with its mend.

use std::time::Duration;

use anyhow::{Context as _, Result};
use async_nats::jetstream::consumer::pull;
use serde_json::{Value, json};
use voxfleet_harness::{
    audio,
    fleet::{self, Fleet},
    producer::{Pace, Producer},
    wait::eventually,
};

use crate::dead_letters::{said, typed};

const SOON: Duration = Duration::from_secs(40);

/// What it says now, as (name, verdict, found, mend).
async fn told(fleet: &Fleet, dir: &std::path::Path) -> Result<Vec<(String, String, String, String)>> {
    let output = typed(&fleet.url(), dir, &["doctor", "--json"]).await?;
    let answer: Value = serde_json::from_slice(&output.stdout).with_context(|| said(&output))?;
    let text = |check: &Value, name: &str| check[name].as_str().unwrap_or_default().to_owned();
    let checks = answer["checks"].as_array().context("checks")?;
    Ok(checks.iter().map(|c| (text(c, "name"), text(c, "verdict"), text(c, "found"), text(c, "mend"))).collect())
}

/// Waits until it says this, with a mend where it is not well.
async fn tells(fleet: &Fleet, dir: &std::path::Path, name: &str, verdict: &str, part: &str) -> Result<()> {
    let seen = eventually(format!("{name} {verdict}: {part}"), SOON, || async {
        let all = told(fleet, dir).await.ok()?;
        let found = all.into_iter().find(|(n, v, found, _)| n == name && v == verdict && found.contains(part))?;
        (verdict == "ok" || !found.3.is_empty()).then_some(())
    });
    match seen.await {
        Ok(()) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("{:?}", fleet.logs())),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_fleet_is_told_with_its_mends() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder().workers(2).slots(1).dispatchers(2).start().await?;
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    for (name, part) in [
        ("dispatcher", "1 standing by"),
        ("workers", "2 beat"),
        ("sessions", "none waits"),
        ("dead letters", "none"),
        ("streams", "all there"),
    ] {
        tells(&fleet, dir, name, "ok", part).await?;
    }

    // More sessions than places, a letter, and a consumer of somebody who never was.
    for n in 0..3 {
        let mut producer = Producer::named(fleet.js(), &format!("s-{n}"), "s1");
        producer.stream(&audio::bursts(n, 1.0), 200, Pace::AsFastAsPossible).await?;
    }
    tells(&fleet, dir, "sessions", "warn", "1 without a GPU").await?;
    tells(&fleet, dir, "sessions", "warn", "no free slot").await?;
    let lost = json!({"audio": "object://asr_media/nothing"}).to_string();
    fleet.js().publish("asr.v1.jobs.normal.lost", lost.into()).await?.await?;
    tells(&fleet, dir, "dead letters", "warn", "1 could not be done").await?;
    let stranger = pull::Config {
        durable_name: Some("gpu-9=nobody".to_owned()),
        filter_subject: "asr.v1.gpu.gpu-9.nobody.live.*".to_owned(),
        ..pull::Config::default()
    };
    eventually("the consumer of nobody is told", SOON, || async {
        // Made anew for each look: a dispatcher takes it away within seconds.
        let live = fleet.js().get_stream_no_info("ASR_LIVE").await.ok()?;
        live.create_consumer(stranger.clone()).await.ok()?;
        let all = told(&fleet, dir).await.ok()?;
        all.into_iter()
            .find(|(n, v, found, _)| n == "consumers" && v == "warn" && found.contains("gpu-9=nobody"))
            .map(drop)
    })
    .await
    .with_context(|| fleet.logs())?;

    // One that stands still, and stays away.
    fleet.workers[1].stop()?;
    tells(&fleet, dir, "worker", "warn", "declared dead and not back: gpu-2").await?;
    fleet.workers[1].cont()?;

    // Nobody is next, and then nobody is there.
    let leader = eventually("a leader", SOON, || fleet.leader()).await?;
    fleet.dispatchers[1 - leader].kill9()?;
    tells(&fleet, dir, "dispatcher", "warn", "no standby").await?;
    fleet.dispatchers[leader].kill9()?;
    tells(&fleet, dir, "dispatcher", "warn", "no dispatcher is connected").await
}
