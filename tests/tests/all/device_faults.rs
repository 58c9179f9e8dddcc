//! What becomes of sessions when the engine dies of its device: each cause with each policy, through real processes, on a card
//! that is a folder; and running out of memory with the real engine.
//!
//! Three sessions speak, one for each policy that a GPU serves, with a model of which there are three sizes. In mid-speech a
//! fault strikes the engine's process. Whatever happens then, every text is whole and as it would have been: the simulated
//! engine hears the same with every model. What is checked beside that is what ran when, what was told, and the cause.

use std::{fs, process::Command, time::Duration};

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
}

const SAME: Option<(&str, &str)> = Some((ASKED, "cuda:simulated"));
const SMALLER: Option<(&str, &str)> = Some(("small", "cuda:simulated"));
const CPU: Option<(&str, &str)> = Some((ASKED, "cpu"));

/// The engine is started again, and goes on as before.
const fn again(fault: &'static str, class: &'static str) -> Row {
    Row { fault, class, meanwhile: [SAME; 3] }
}

/// Nothing runs on the GPU any more.
const fn without_gpu(fault: &'static str, class: &'static str) -> Row {
    Row { fault, class, meanwhile: [None, None, CPU] }
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
        Ok(finals.iter().map(|f| (text(&f.json["model"]), text(&f.json["device"]))).collect())
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

#[tokio::test(flavor = "multi_thread")]
async fn out_of_memory_at_a_decode_goes_down_the_ladder() -> Result<()> {
    row(&Row { fault: "oom_at_decode", class: "out_of_memory", meanwhile: [None, SMALLER, SMALLER] }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_leaves_the_cpu() -> Result<()> {
    row(&without_gpu("lost", "device_lost")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_does_not_fit_leaves_the_cpu() -> Result<()> {
    row(&without_gpu("mismatch", "driver_mismatch")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_library_that_is_missing_leaves_the_cpu() -> Result<()> {
    row(&without_gpu("library", "missing_library")).await
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

/// The real engine, of which the system takes its memory in mid-speech: a limit on the address space of its process, so that
/// its next large allocation fails. Two names of the same small model stand for two sizes, so no word may change.
#[tokio::test(flavor = "multi_thread")]
async fn the_real_engine_survives_that_its_memory_is_taken() -> Result<()> {
    let _turn = fleet::turn().await;
    let models = tempfile::tempdir()?;
    for name in ["medium.en", "base.en"] {
        let micro = fleet::models_dir().join(format!("{}.bin", direct::MICRO));
        fs::copy(micro, models.path().join(format!("{name}.bin")))?;
    }
    let mut fleet = Fleet::builder()
        .workers(1)
        .slots(2)
        .engine(Engine::Micro)
        .set("worker.models_dir", models.path().display())
        .set("worker.default_model", "medium.en")
        .set("worker.restore_after_ms", 3_600_000)
        .start()
        .await?;
    let call = audio::call(1)?;
    let mut producer = Producer::named(fleet.js(), "call", "s1");
    let talk = {
        let call = call.clone();
        async move {
            let first = [("Asr-Opt-Policy", "allow_smaller"), ("Asr-Opt-Model", "medium.en")];
            producer.stream_with(&call, 200, Pace::Speed(1.5), &first).await?;
            producer.end().await
        }
    };
    let mut talks = JoinSet::new();
    talks.spawn(talk);
    let js = fleet.js();
    let spoken = || async { (checker::finals(&js, "call").await.ok()?.len() >= 2).then_some(()) };
    eventually("two finals", SOON, spoken).await.with_context(|| fleet.logs())?;
    let pid = fleet.workers[0].engine_pid().context("an engine")?;
    let taken = Command::new("prlimit").args(["--pid", &pid.to_string(), "--as=1048576"]).status()?;
    ensure!(taken.success(), "prlimit: {taken}");
    while let Some(talk) = talks.join_next().await {
        talk??;
    }
    let heard = fleet.wait_end("call", Duration::from_secs(120)).await.with_context(|| fleet.logs())?;
    let report = checker::check(&js, "call").await?.clean()?;
    let ran: Vec<&str> = report.finals.iter().filter_map(|f| f.json["model"].as_str()).collect();
    let changed = ran.iter().position(|model| *model == "base.en").with_context(|| fleet.logs())?;
    ensure!(changed >= 2 && ran[..changed].iter().all(|m| *m == "medium.en"), "{ran:?}");
    ensure!(ran[changed..].iter().all(|m| *m == "base.en"), "{ran:?}");
    let log = direct::log(&call, 200);
    let alone = direct::transcribe(&mut *direct::micro()?, &*direct::best_vad(), &Default::default(), &log)?;
    ensure!(heard == direct::text(&alone), "\n  heard {heard}\n  alone {}", direct::text(&alone));
    let status = probe_api::fleet_status(&fleet.client()).await.context("status")?;
    let end = &status["workers"][0]["heartbeat"]["engine"]["last_end"];
    ensure!(end["class"] == "out_of_memory", "{end}\n{}", fleet.logs());
    fleet.check_alive()?;
    Ok(())
}
