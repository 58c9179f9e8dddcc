//! What becomes of sessions when the engine dies of its device: each cause with each policy, through real processes, on a card
//! that is a folder.
//!
//! Three sessions speak, one for each policy that a GPU serves, with a model of which there are three sizes. In mid-speech a
//! fault strikes the engine's process, once. They speak on until each has come back to what it asked for, where it can.
//! Whatever happens, every text is whole and as it would have been: the simulated engine hears the same with every model.
//! What is checked beside that is what ran when, what was told, the cause, and what `voxfleet doctor` says of it.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use voxfleet_harness::{
    audio::{self, Pcm},
    card::FakeNvml,
    checker,
    fleet::{self, Engine, Fleet},
    probe_api,
    process::{Settings, voxfleet},
    producer::{Pace, Producer},
    sim_card::SimulatedCard,
    wait::eventually,
};
use voxfleet_schema::{
    failure::FailureClass,
    remedy::{Side, remedy},
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
    async fn start(restore_after: Duration) -> Result<Self> {
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
            .set("worker.restore_after_ms", restore_after.as_millis())
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

    /// Model and device of each final that somebody decoded.
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

/// Speaks twice as fast as people do until told to stop; gives what was said.
fn speak(site: &Site, n: usize, stop: Arc<AtomicBool>) -> impl Future<Output = Result<Pcm>> + Send + use<> {
    let policy = POLICIES[n];
    let mut producer = Producer::named(site.fleet.js(), policy, "s1");
    async move {
        let mut said = Vec::new();
        for part in 0..30 {
            let pcm = audio::blasts(40 * (n as u64 + 1) + part, 6.0);
            let first = [("Asr-Opt-Model", ASKED), ("Asr-Opt-Policy", policy)];
            producer.stream_with(&pcm, 200, Pace::Speed(2.0), if part == 0 { &first } else { &[] }).await?;
            said.extend(pcm.samples);
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        producer.end().await?;
        Ok(Pcm::mono_16k(said))
    }
}

async fn row(row: &Row) -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(Duration::from_secs(4)).await?;
    let (stop, mut talks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
    for n in 0..POLICIES.len() {
        let talk = speak(&site, n, Arc::clone(&stop));
        talks.spawn(async move { talk.await.map(|pcm| (n, pcm)) });
    }
    for policy in POLICIES {
        let spoken = || async { (!site.finals(policy).await.ok()?.is_empty()).then_some(()) };
        eventually(format!("a final of {policy}"), SOON, spoken).await.with_context(|| site.fleet.logs())?;
    }
    // One look may miss a late heartbeat, and then says nothing of any worker.
    let looked = || async { doctor(&site.fleet).await.ok().filter(|checks| !checks.is_empty()) };
    let well = eventually("a worker that doctor hears", SOON, looked).await.with_context(|| site.fleet.logs())?;
    ensure!(well.len() == 1 && well[0]["verdict"] == "ok", "{well:#?}");
    site.card.fault(row.fault, 0)?;
    let cause = || async { site.engine().await.filter(|engine| engine["last_end"]["class"] == row.class) };
    let engine = eventually(format!("an end by {}", row.class), SOON, cause).await;
    let engine = engine.with_context(|| site.fleet.logs())?;
    let class: FailureClass = serde_json::from_value(json!(row.class))?;
    let mend = remedy(Side::Engine, class);
    let message = engine["last_end"]["message"].as_str().unwrap_or_default();
    ensure!(message.ends_with(mend), "no remedy in {message:?}");
    let names_it = |check: &Value| {
        let found = check["found"].as_str().unwrap_or_default();
        found.starts_with("gpu-1, an engine ended ")
            && found.contains(&format!(" ago: {class}: "))
            && check["mend"] == mend
    };
    let looked = || async {
        let told = doctor(&site.fleet).await.ok()?;
        told.iter().any(names_it).then_some(told)
    };
    let told = eventually(format!("doctor naming {class}"), SOON, looked).await.with_context(|| site.fleet.logs())?;
    ensure!(told.iter().all(|check| check["verdict"] != "ok"), "{told:#?}");
    for (n, policy) in POLICIES.iter().enumerate() {
        settled(&site, row, policy, n)
            .await
            .with_context(|| format!("{} {policy}\n{}", row.fault, site.fleet.logs()))?;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(talk) = talks.join_next().await {
        let (n, pcm) = talk??;
        let policy = POLICIES[n];
        check(&site, row, policy, n, &pcm)
            .await
            .with_context(|| format!("{} {policy}\n{}", row.fault, site.fleet.logs()))?;
    }
    ensure!(!site.card.is_due(row.fault), "{} never struck", row.fault);
    site.fleet.check_alive()?;
    Ok(())
}

/// Waits until a session has come to where it stays: with what it asked for, or where that does not come back, with what
/// stands in.
async fn settled(site: &Site, row: &Row, policy: &str, n: usize) -> Result<()> {
    let before = site.finals(policy).await?.len();
    let there = || async {
        let ran = site.finals(policy).await.ok()?;
        let last = ran.last().map(|(model, device)| (model.as_str(), device.as_str()));
        let fell = |on: &(&str, &str)| ran.iter().any(|(model, device)| (model.as_str(), device.as_str()) == *on);
        let is_there = match row.meanwhile[n] {
            None if row.for_good => true,
            None | SAME => ran.len() > before + 1 && last == SAME,
            Some(on) if row.for_good => fell(&on),
            Some(on) => fell(&on) && last == SAME,
        };
        is_there.then_some(())
    };
    Ok(eventually("what it comes to", SOON, there).await?)
}

/// What `voxfleet doctor` says of the workers.
async fn doctor(fleet: &Fleet) -> Result<Vec<Value>> {
    let settings = Settings::new().with("nats.urls", fleet.url());
    let mut command = voxfleet(&settings, fleet.dir())?;
    command.args(["doctor", "--json"]);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let report: Value =
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let checks = report["checks"].as_array().cloned().unwrap_or_default();
    Ok(checks.into_iter().filter(|check| check["name"] == "fleet").collect())
}

async fn check(site: &Site, row: &Row, policy: &str, n: usize, speech: &Pcm) -> Result<()> {
    let expected = direct::simulated_text(speech)?;
    if row.for_good && row.meanwhile[n].is_none() {
        return waits(site, policy, &expected).await;
    }
    let text = site.fleet.wait_end(policy, SOON).await?;
    let report = checker::check(&site.fleet.js(), policy).await?.clean()?;
    ensure!(report.covered == speech.samples.len() as u64, "{} samples", report.covered);
    ensure!(text == expected, "\n  heard    {text}\n  expected {expected}");

    let ran = site.finals(policy).await?;
    let mut ran: Vec<(&str, &str)> = ran.iter().map(|(model, device)| (model.as_str(), device.as_str())).collect();
    ran.dedup();
    let told = site.told(policy).await?;
    let whats: Vec<&str> = told.iter().map(|(what, _)| what.as_str()).collect();
    let as_asked = (ASKED, "cuda:simulated");
    match row.meanwhile[n] {
        // It waited, or went on as before.
        None | SAME => ensure!(ran == [as_asked] && told.is_empty(), "{ran:?} {told:?}"),
        Some(on) => {
            match row.for_good {
                true => ensure!(ran == [as_asked, on] && whats == ["degraded"], "{ran:?} {told:?}"),
                // Once each, and it comes back.
                false => {
                    ensure!(ran == [as_asked, on, as_asked] && whats == ["degraded", "restored"], "{ran:?} {told:?}");
                    ensure!(told[1].1["model"] == ASKED && told[1].1["device"] == "gpu", "{told:?}");
                }
            }
            let detail = &told[0].1;
            let device = if on.1 == "cpu" { "cpu" } else { "gpu" };
            ensure!(detail["class"] == row.class && detail["asked"] == ASKED, "{told:?}");
            ensure!(detail["model"] == on.0 && detail["device"] == device, "{told:?}");
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

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_the_cpu_waits_for_one_and_takes_the_gpu_from_nobody() -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(Duration::from_secs(600)).await?;
    let pcm = audio::blasts(90, 12.0);
    let talk = async |policy: &str| -> Result<()> {
        let mut producer = Producer::named(site.fleet.js(), policy, "s1");
        let first = [("Asr-Opt-Model", ASKED), ("Asr-Opt-Policy", policy)];
        producer.stream_with(&pcm, 200, Pace::AsFastAsPossible, &first).await?;
        producer.end().await?;
        Ok(())
    };
    talk("force_cpu").await?;
    let waits = || async {
        let status = probe_api::fleet_status(&site.fleet.client()).await?;
        (status["sessions_waiting"] == 1).then_some(())
    };
    eventually("a session that waits for a CPU", SOON, waits).await.with_context(|| site.fleet.logs())?;
    talk("allow_smaller").await?;
    site.fleet.wait_end("allow_smaller", SOON).await.with_context(|| site.fleet.logs())?;
    let on_gpu = (ASKED.to_owned(), "cuda:simulated".to_owned());
    ensure!(site.finals("allow_smaller").await?.iter().all(|ran| *ran == on_gpu), "the GPU is not given away");
    ensure!(site.finals("force_cpu").await?.is_empty(), "nobody has decoded it");

    // The GPU goes, and with somebody who may follow its engine runs on the CPU.
    site.card.fault("lost", 0)?;
    talk("allow_cpu").await?;
    for policy in ["force_cpu", "allow_cpu"] {
        let text = site.fleet.wait_end(policy, SOON).await.with_context(|| site.fleet.logs())?;
        ensure!(text == direct::simulated_text(&pcm)?, "{policy}: {text}");
        checker::check(&site.fleet.js(), policy).await?.clean()?;
    }
    let on_cpu = (ASKED.to_owned(), "cpu".to_owned());
    let ran = site.finals("force_cpu").await?;
    ensure!(!ran.is_empty() && ran.iter().all(|ran| *ran == on_cpu), "{ran:?}");
    ensure!(site.told("force_cpu").await?.is_empty(), "it has what it asked for");
    ensure!(!site.told("allow_cpu").await?.is_empty(), "this one has not");
    site.fleet.check_alive()?;
    Ok(())
}
