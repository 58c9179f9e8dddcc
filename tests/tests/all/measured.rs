//! What a worker learns of its device while it works, and what a plan makes of it.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::Value;
use voxfleet_harness::{
    audio, fleet,
    process::{Settings, voxfleet},
    producer::{Pace, Producer},
    wait::eventually,
};

use crate::device_ladder::OnCard;

const SPEED: f64 = 30.0;
const STATES: f64 = 2.0;

/// The factor kept for the model `small`, in whatever file of the folder.
fn factor(cache: &Path) -> Option<f64> {
    let files = fs::read_dir(cache.join("measured")).ok()?.flatten();
    let texts = files.filter_map(|file| serde_json::from_slice::<Value>(&fs::read(file.path()).ok()?).ok());
    texts
        .flat_map(|kept| kept["measured"].as_array().cloned().unwrap_or_default())
        .find(|entry| entry["model"] == "small")?["realtime_factor"]
        .as_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_knows_how_fast_a_model_was_here() -> Result<()> {
    let _turn = fleet::turn().await;
    let cache = tempfile::tempdir()?;
    let settings = Settings::new()
        .with("worker.simulated.speed", SPEED)
        .with("worker.decode_states", STATES)
        .with("worker.cache_dir", cache.path().display());
    let mut on = OnCard::start(1_000, settings).await?;
    let name = on.alone.name().await?;
    // Half of it is silence, which costs nothing and says nothing.
    let live = (0..3u64).map(|n| {
        let (js, session) = (on.alone.js.clone(), format!("live-{n}"));
        async move {
            let mut producer = Producer::bare(js, &session);
            producer.stream(&audio::bursts(40 + n, 70.0), 200, Pace::Speed(4.0)).await?;
            Ok::<_, anyhow::Error>(producer.end().await?)
        }
    });
    for n in 0..3 {
        on.alone.take(&name, &format!("live-{n}"), 1).await?;
    }
    try_join_all(live).await?;
    let kept = eventually("a speed", Duration::from_secs(30), || async { factor(cache.path()) });
    let kept = kept.await.with_context(|| on.alone.worker.log_tail())?;
    // The finals alone would be as fast as both states together; partials decode all of it again, some of it often.
    ensure!(kept > 1.0 && kept < 0.7 * SPEED * STATES, "{kept}");

    let plan = Settings::new().with("worker.cache_dir", cache.path().display());
    let plan = plan.with("worker.models_dir", on.models().display());
    let mut command = voxfleet(&plan, cache.path())?;
    command.args(["plan", "--gpu", "T4:1000MB", "--model", "small", "--sessions", "500", "--json"]);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let planned: Value =
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let small = &planned["options"][0];
    ensure!(small["figures"]["realtime_factor"] == kept && small["bound"] == "decode_speed", "{small:#}");
    ensure!(small["sessions"].as_f64() == Some(kept.floor()), "{small:#}");
    println!("{kept} x real time, {} sessions", small["sessions"]);
    Ok(())
}
