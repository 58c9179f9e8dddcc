//! The fleet map on real processes: who serves, who stands in, who gives back, and what `voxfleet status` says of it.
//!
//! All workers here run on CPUs. One that the map names is to it what a GPU is; one that it does not name is a CPU worker.
//! Shares of memory are not planned on a CPU: that part is shown by the tests of the routing itself.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use voxfleet_harness::{
    chaos::talk::{self, Talk},
    checker,
    fleet::{self, Engine, Fleet},
    verdict,
    wait::eventually,
};

use crate::dead_letters::typed;

/// A verdict, a move, and a GPU that must be alive for ten seconds before it is believed.
const SOON: Duration = Duration::from_secs(40);
const CALL: &str = "call";

/// The first service as `voxfleet status --json` shows it.
async fn service(fleet: &Fleet) -> Result<Value> {
    let output = typed(&fleet.url(), fleet.dir(), &["status", "--json"]).await?;
    let status: Value = serde_json::from_slice(&output.stdout)?;
    Ok(status["services"][0].clone())
}

/// Waits until these GPUs have these roles; a third word is the GPU stood in for.
async fn roles(fleet: &Fleet, wanted: &[(&str, &str, Option<&str>)]) -> Result<Value> {
    let found = eventually(format!("{wanted:?}"), SOON, || async {
        let service = service(fleet).await.ok()?;
        let is_so = |(gpu, role, instead): &(&str, &str, Option<&str>)| {
            let rows = service["gpus"].as_array().into_iter().flatten();
            rows.filter(|row| row["gpu_id"] == *gpu)
                .any(|row| row["role"] == *role && row["standing_in_for"].as_str() == *instead)
        };
        wanted.iter().all(is_so).then(|| service.clone())
    });
    match found.await {
        Ok(service) => Ok(service),
        Err(e) => Err(e).with_context(|| fleet.logs()),
    }
}

/// Waits until this worker's heartbeat says so of its one model.
pub(crate) async fn model_is(fleet: &Fleet, gpu: &str, state: &str) -> Result<()> {
    eventually(format!("the model of {gpu} being {state}"), SOON, || async {
        let status = voxfleet_harness::probe_api::fleet_status(&fleet.client()).await?;
        let workers = status["workers"].as_array()?.iter().map(|w| &w["heartbeat"]);
        let mut models = workers.filter(|b| b["gpu_id"] == gpu).filter_map(|b| b["models"].as_array()).flatten();
        models.any(|m| m["name"] == "simulated" && m["state"] == state).then_some(())
    })
    .await
    .with_context(|| fleet.logs())
}

/// Waits until the record of the call names this worker.
async fn owned_by(fleet: &Fleet, gpu: &str) -> Result<()> {
    eventually(format!("{CALL} on {gpu}"), SOON, || async {
        let record = talk_record(fleet).await?;
        (record["worker"]["gpu_id"] == gpu).then_some(())
    })
    .await
    .with_context(|| fleet.logs())
}

async fn talk_record(fleet: &Fleet) -> Option<Value> {
    voxfleet_harness::chaos::load::record(&fleet.js(), "session", CALL).await
}

/// Whether the fleet was told that this happened to this GPU; the event.
async fn told(fleet: &Fleet, gpu: &str, what: &str) -> Result<Value> {
    let subject = format!("asr.v1.event.fleet.{gpu}.{what}");
    let event = eventually(subject.clone(), SOON, || async {
        let found = checker::read(&fleet.js(), "ASR_EVENT", &subject).await.ok()?;
        serde_json::from_slice::<Value>(&found.last()?.payload).ok()
    });
    Ok(event.await?)
}

/// `gpu-1` serves, `gpu-2` is its reserve, the others are CPU workers.
async fn mapped(workers: usize) -> Result<Fleet> {
    let builder = Fleet::builder().workers(workers).slots(4).engine(Engine::Simulated { speed: 30.0 });
    let fleet = builder
        .set("dispatcher.services.asr.gpus", "gpu-1")
        .set("dispatcher.services.asr.reserves", "gpu-2")
        .set("dispatcher.services.asr.preload", "simulated")
        .set("dispatcher.services.asr.memory_limit_percent", 75)
        .start()
        .await?;
    Ok(fleet)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_loads_its_models_before_anybody_asks() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = mapped(2).await?;
    model_is(&fleet, "gpu-1", "loaded").await?;
    model_is(&fleet, "gpu-2", "available").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reserve_stands_in_a_cpu_comes_last_and_who_is_back_serves_again() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = mapped(3).await?;
    let service =
        roles(&fleet, &[("gpu-1", "serves", None), ("gpu-2", "reserve", None), ("gpu-3", "cpu", None)]).await?;
    ensure!(service["service"] == "asr" && service["memory_limit_percent"] == 75, "{service}");
    ensure!(service["preload"] == json!(["simulated"]), "{service}");
    // A reserve loads nothing before its time.
    model_is(&fleet, "gpu-2", "available").await?;

    let mut speaking = JoinSet::new();
    let talk = Talk { id: CALL.to_owned(), poison: None, seed: 71, seconds: 30.0, speed: 1.0, chunk_ms: 200 };
    speaking.spawn(talk::talk(talk::impatient(fleet.client()), talk));
    owned_by(&fleet, "gpu-1").await?;

    fleet.workers[0].kill9()?;
    roles(&fleet, &[("gpu-2", "standing_in", Some("gpu-1"))]).await?;
    owned_by(&fleet, "gpu-2").await?;
    model_is(&fleet, "gpu-2", "loaded").await?;
    let degraded = told(&fleet, "gpu-1", "degraded").await?;
    ensure!(degraded["detail"]["standing_in"] == "gpu-2", "{degraded}");

    fleet.workers[1].kill9()?;
    owned_by(&fleet, "gpu-3").await?;
    let said = speaking.join_next().await.context("the call")??;
    ensure!(said.gave_up.is_none(), "{:?}", said.gave_up);
    fleet.wait_end(CALL, SOON).await.with_context(|| fleet.logs())?;
    let verdict = verdict::session(&fleet.js(), CALL, &said.samples).await?.clean(CALL)?;
    ensure!(verdict.epoch >= 3, "{verdict:?}");

    // Back, and believed after a while; what comes new comes here again.
    fleet.restart_worker(0)?;
    fleet.restart_worker(1)?;
    told(&fleet, "gpu-1", "restored").await.with_context(|| fleet.logs())?;
    roles(&fleet, &[("gpu-1", "serves", None), ("gpu-2", "reserve", None)]).await?;
    let opened = voxfleet_harness::probe_api::open(&fleet.client(), "after", 60).await?;
    ensure!(opened["worker"]["gpu_id"] == "gpu-1", "{opened}");
    fleet.check_alive()?;
    Ok(())
}
