//! What becomes of sessions when the engine dies of its device: each cause with each policy, through real processes, on a card
//! that is a folder.
//!
//! Three sessions speak, one for each policy that a GPU serves, with a model of which there are three sizes. In mid-speech a
//! fault strikes the engine's process. Whatever happens then, every text is whole and as it would have been: the simulated
//! engine hears the same with every model. What is checked beside that is what ran when, what was told, and the cause.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::task::JoinSet;
use voxfleet_harness::{
    audio::{self, Pcm},
    card::FakeNvml,
    checker,
    fleet::{self, Engine, Fleet},
    probe_api,
    producer::{Pace, Producer},
    sim_card::SimulatedCard,
    wait::eventually,
};

use crate::direct;

const SOON: Duration = Duration::from_secs(60);
/// Room for everything at once.
const CARD_MB: u64 = 16_000;
const POLICIES: [&str; 3] = ["exact_model", "allow_smaller", "allow_cpu"];
/// What is asked for.
const ASKED: &str = "medium";

/// What a fault leads to.
struct Row {
    fault: &'static str,
    class: &'static str,
    /// What runs meanwhile, by policy: model and device; none: it waits for what it asked for.
    meanwhile: [Option<(&'static str, &'static str)>; 3],
    /// Nobody who waits is tried again before somebody has mended the machine.
    for_good: bool,
}

const SAME: Option<(&str, &str)> = Some((ASKED, "cuda:simulated"));
const SMALLER: Option<(&str, &str)> = Some(("small", "cuda:simulated"));
const CPU: Option<(&str, &str)> = Some((ASKED, "cpu"));

/// The engine is started again, and goes on as before.
const fn again(fault: &'static str, class: &'static str) -> Row {
    Row { fault, class, meanwhile: [SAME; 3], for_good: false }
}

/// Nothing runs on the GPU any more.
const fn without_gpu(fault: &'static str, class: &'static str, for_good: bool) -> Row {
    Row { fault, class, meanwhile: [None, None, CPU], for_good }
}

struct Site {
    card: SimulatedCard,
    fleet: Fleet,
    _nvml: FakeNvml,
    _models: tempfile::TempDir,
}

impl Site {
    async fn start() -> Result<Self> {
        let (card, nvml, models) = (SimulatedCard::new(CARD_MB)?, FakeNvml::new(1)?, tempfile::tempdir()?);
        nvml.set(0, "simulated_card", card.path().display())?;
        for name in ["medium", "small", "base"] {
            fs::write(models.path().join(format!("{name}.bin")), name)?;
        }
        let fleet = Fleet::builder()
            .workers(1)
            .slots(4)
            .engine(Engine::Simulated { speed: 50.0 })
            .set("worker.gpu", 0)
            .set("worker.nvml_library", nvml.library().display())
            .set("worker.models_dir", models.path().display())
            .set("worker.default_model", ASKED)
            .set("worker.engine_stuck_ms", 2_000)
            .set("worker.restore_after_ms", 4_000)
            .set("dispatcher.restore_after_ms", 1_000)
            .set("worker.simulated.card", card.path().display())
            .set("worker.simulated.context_mb", 500)
            .set("worker.simulated.sizes.medium", 4_000)
            .set("worker.simulated.sizes.small", 1_000)
            .set("worker.simulated.sizes.base", 400)
            .set("worker.simulated.state_mb", 50)
            .start()
            .await?;
        Ok(Self { card, fleet, _nvml: nvml, _models: models })
    }

    async fn engine(&self) -> Option<Value> {
        let status = probe_api::fleet_status(&self.fleet.client()).await?;
        Some(status["workers"][0]["heartbeat"]["engine"].clone())
    }

    async fn finals(&self, session: &str) -> Result<Vec<(String, String)>> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let finals = checker::finals(&self.fleet.js(), session).await?;
        // Those without text were decoded by nobody.
        let spoken = finals.iter().filter(|f| !f.text().is_empty());
        Ok(spoken.map(|f| (text(&f.json["model"]), text(&f.json["device"]))).collect())
    }

    /// Details of the `degraded` and `restored` events, in their order.
    async fn told(&self, session: &str) -> Result<Vec<(String, Value)>> {
        let events = checker::events(&self.fleet.js(), session).await?;
        let wanted = |(what, event): &(String, Value)| {
            // The same words tell of a session that fell behind and caught up.
            (what == "degraded" || what == "restored") && event["detail"]["asked"].is_string()
        };
        Ok(events.into_iter().filter(wanted).map(|(what, event)| (what, event["detail"].clone())).collect())
    }
}

fn speech(n: usize) -> Pcm {
    audio::blasts(40 + n as u64, 24.0)
}

async fn row(row: &Row) -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start().await?;
    let mut talks = JoinSet::new();
    for (n, policy) in POLICIES.iter().enumerate() {
        let mut producer = Producer::named(site.fleet.js(), policy, "s1");
        talks.spawn(async move {
            let first = [("Asr-Opt-Model", ASKED), ("Asr-Opt-Policy", *policy)];
            producer.stream_with(&speech(n), 200, Pace::Speed(2.0), &first).await?;
            producer.end().await
        });
    }
    for policy in POLICIES {
        let spoken = || async { (!site.finals(policy).await.ok()?.is_empty()).then_some(()) };
        eventually(format!("a final of {policy}"), SOON, spoken).await.with_context(|| site.fleet.logs())?;
    }
    site.card.fault(row.fault, 0)?;
    let cause = || async { site.engine().await.filter(|engine| engine["last_end"]["class"] == row.class) };
    let engine = eventually(format!("an end by {}", row.class), SOON, cause).await;
    let engine = engine.with_context(|| site.fleet.logs())?;
    let message = engine["last_end"]["message"].as_str().unwrap_or_default();
    ensure!(message.contains("; "), "no remedy in {message:?}");
    while let Some(talk) = talks.join_next().await {
        talk??;
    }
    for (n, policy) in POLICIES.iter().enumerate() {
        check(&site, row, policy, n).await.with_context(|| format!("{} {policy}\n{}", row.fault, site.fleet.logs()))?;
    }
    ensure!(!site.card.is_due(row.fault), "{} never struck", row.fault);
    site.fleet.check_alive()?;
    Ok(())
}

async fn check(site: &Site, row: &Row, policy: &str, n: usize) -> Result<()> {
    let speech = speech(n);
    if row.for_good && row.meanwhile[n].is_none() {
        return waits(site, policy, &direct::simulated_text(&speech)?).await;
    }
    let text = site.fleet.wait_end(policy, SOON).await?;
    let report = checker::check(&site.fleet.js(), policy).await?.clean()?;
    ensure!(report.covered == speech.samples.len() as u64, "{} samples", report.covered);
    let expected = direct::simulated_text(&speech)?;
    ensure!(text == expected, "\n  heard    {text}\n  expected {expected}");

    let ran = site.finals(policy).await?;
    let ran: Vec<(&str, &str)> = ran.iter().map(|(model, device)| (model.as_str(), device.as_str())).collect();
    let told = site.told(policy).await?;
    let as_asked = (ASKED, "cuda:simulated");
    ensure!(ran.first() == Some(&as_asked), "{ran:?}");
    match row.meanwhile[n] {
        // It waited, or went on as before.
        None => {
            ensure!(ran.iter().all(|on| *on == as_asked), "{ran:?}");
            ensure!(told.is_empty(), "{told:?}");
        }
        Some(on) if on == as_asked => {
            ensure!(ran.iter().all(|on| *on == as_asked), "{ran:?}");
            ensure!(told.is_empty(), "{told:?}");
        }
        Some(on) => {
            ensure!(ran.iter().all(|ran| *ran == as_asked || *ran == on) && ran.contains(&on), "{ran:?}");
            let (what, detail) = told.first().context("nothing was told")?;
            ensure!(what == "degraded" && detail["class"] == row.class, "{told:?}");
            let device = if on.1 == "cpu" { "cpu" } else { "gpu" };
            ensure!(detail["model"] == on.0 && detail["device"] == device && detail["asked"] == ASKED, "{told:?}");
            // It comes back unless its speech is over before.
            let back = ran.iter().rev().take_while(|ran| **ran == as_asked).count() > 0;
            ensure!(!back || told.last().is_some_and(|(what, _)| what == "restored"), "{told:?}\n{ran:?}");
            ensure!(told.len() <= 2, "{told:?}");
        }
    }
    Ok(())
}

/// It is kept, with what was said of it so far, and runs on nothing else.
async fn waits(site: &Site, policy: &str, expected: &str) -> Result<()> {
    let waiting = || async {
        let status = probe_api::fleet_status(&site.fleet.client()).await?;
        (status["sessions_waiting"] == 2).then_some(())
    };
    eventually("two sessions that wait", SOON, waiting).await?;
    let finals = checker::finals(&site.fleet.js(), policy).await?;
    let so_far: Vec<String> = finals.iter().map(|f| f.text()).filter(|text| !text.is_empty()).collect();
    ensure!(expected.starts_with(&so_far.join(" ")), "\n  heard    {so_far:?}\n  expected {expected}");
    let ran = site.finals(policy).await?;
    ensure!(
        ran.iter().all(|(model, device)| (model.as_str(), device.as_str()) == (ASKED, "cuda:simulated")),
        "{ran:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn out_of_memory_at_a_decode_goes_down_the_ladder() -> Result<()> {
    row(&Row { fault: "oom_at_decode", class: "out_of_memory", meanwhile: [None, SMALLER, SMALLER], for_good: false })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_leaves_the_cpu() -> Result<()> {
    row(&without_gpu("lost", "device_lost", false)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_does_not_fit_leaves_the_cpu() -> Result<()> {
    row(&without_gpu("mismatch", "driver_mismatch", true)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_library_that_is_missing_leaves_the_cpu() -> Result<()> {
    row(&without_gpu("library", "missing_library", true)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_is_a_crash() -> Result<()> {
    row(&again("abort", "engine_crash")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assertion_of_the_engine_is_a_crash() -> Result<()> {
    row(&again("assertion", "engine_crash")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_is_a_crash() -> Result<()> {
    row(&again("exit", "engine_crash")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_is_a_crash() -> Result<()> {
    row(&again("kill", "engine_crash")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hang_is_a_timeout() -> Result<()> {
    row(&again("hang", "timeout")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_wire_is_a_crash() -> Result<()> {
    row(&again("garbage", "engine_crash")).await
}
