//! A worker whose model is not here yet: it starts, says so, fetches it beside its work, and serves.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio,
    fleet::{self, Engine, Fleet},
    probe_api::fleet_status,
    process::voxfleet,
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_schema::{
    failure::FailureClass,
    remedy::{Side, remedy},
};

use crate::direct;

const SOON: Duration = Duration::from_secs(60);

/// A catalog whose one model is the micro model, to be had from `source`.
fn catalog(dir: &Path, source: &Path) -> Result<std::path::PathBuf> {
    let micro = fleet::models_dir().join(format!("{}.bin", direct::MICRO));
    let output = Command::new("sha256sum").arg(&micro).output()?;
    let text = String::from_utf8(output.stdout)?;
    let sum = text.split_whitespace().next().context("a checksum")?;
    let bytes = std::fs::metadata(&micro)?.len();
    let path = dir.join("catalog.toml");
    let entry = format!(
        "[[model]]\nname = \"wanted\"\nkind = \"whisper\"\nlicence = \"Apache-2.0\"\nmultilingual = false\n\
         expected_mb = 200\nfiles = [{{ file = \"wanted.bin\", bytes = {bytes}, sha256 = \"{sum}\" }}]\n\
         sources = [\"file://{}/{{file}}\"]\n",
        source.display()
    );
    std::fs::write(&path, entry)?;
    Ok(path)
}

async fn model_is(fleet: &Fleet, state: &str) -> Result<Value> {
    let found = || async {
        let status = fleet_status(&fleet.client()).await?;
        let model = status["workers"][0]["heartbeat"]["models"][0].clone();
        (model["state"] == state).then_some(model)
    };
    Ok(eventually(format!("a model that is {state}"), SOON, found).await?)
}

/// What `voxfleet doctor` says where the workers are.
async fn doctor(fleet: &Fleet) -> Result<Value> {
    let mut command = voxfleet(fleet.worker_settings(), fleet.dir())?;
    command.args(["doctor", "--json"]);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

fn of_name(report: &Value, name: &str) -> Vec<Value> {
    let checks = report["checks"].as_array().cloned().unwrap_or_default();
    checks.into_iter().filter(|check| check["name"] == name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_missing_is_said_and_serves_once_it_is_fetched() -> Result<()> {
    let _turn = fleet::turn().await;
    let (dir, source) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let models = dir.path().join("models");
    let mut fleet = Fleet::builder()
        .workers(1)
        .slots(2)
        .engine(Engine::Micro)
        .set("worker.models_dir", models.display())
        .set("worker.prefetch", "wanted")
        .set("worker.preload", "wanted")
        .set("models.catalog", catalog(dir.path(), source.path())?.display())
        .start()
        .await?;
    let missing = model_is(&fleet, "missing").await?;
    ensure!(missing["failure"]["class"] == "model_missing", "{missing}");

    // Who looks at the fleet is told the trouble; who looks at the machine, that it is on its way.
    let report = doctor(&fleet).await?;
    let fleets = of_name(&report, "fleet");
    ensure!(fleets.len() == 1 && fleets[0]["verdict"] == "fail", "{report:#}");
    ensure!(
        fleets[0]["found"].as_str().is_some_and(|found| found.contains("model wanted: model_missing")),
        "{report:#}"
    );
    ensure!(fleets[0]["mend"] == remedy(Side::Model, FailureClass::ModelMissing), "{report:#}");
    let machine = of_name(&report, "models");
    ensure!(machine.len() == 1 && machine[0]["verdict"] == "warn", "{report:#}");
    ensure!(machine[0]["found"].as_str().is_some_and(|found| found.starts_with("wanted is not here")), "{report:#}");

    let mut producer = Producer::bare(fleet.js(), "early");
    producer.stream(&audio::call(1)?, 500, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    let waiting = || async { (fleet_status(&fleet.client()).await?["sessions_waiting"] == 1).then_some(()) };
    eventually("a session that waits for the model", SOON, waiting).await?;

    std::fs::copy(fleet::models_dir().join(format!("{}.bin", direct::MICRO)), source.path().join("wanted.bin"))?;
    model_is(&fleet, "loaded").await.with_context(|| fleet.logs())?;
    let heard = fleet.wait_end("early", SOON).await.with_context(|| fleet.logs())?;
    let rate = audio::word_error_rate(&audio::call_text(1)?, &heard);
    ensure!(rate <= 0.05, "word error rate {rate:.4}\n{heard}");
    let report = doctor(&fleet).await?;
    let (fleets, machine) = (of_name(&report, "fleet"), of_name(&report, "models"));
    ensure!(fleets.iter().chain(&machine).all(|check| check["verdict"] == "ok"), "{report:#}");
    fleet.check_alive()?;
    Ok(())
}
