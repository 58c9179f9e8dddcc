//! A card shared with somebody who is none of ours, in each of the three ways: real processes, a simulated engine whose memory
//! is counted on a folder that is a card, and a management library that shows this folder.

use std::{
    fs,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{ChildStdout, Command},
    task::JoinSet,
};
use voxfleet_harness::{
    audio::{self, Pcm},
    card::FakeNvml,
    checker,
    fleet::{self, Engine, Fleet, FleetBuilder},
    probe_api,
    process::Worker,
    producer::{Pace, Producer},
    sim_card::SimulatedCard,
    wait::{eventually, never},
};
use voxfleet_schema::job::JobState;

use crate::{direct, jobs_fleet};

const SOON: Duration = Duration::from_secs(30);
const CARD_MB: u64 = 16_000;

/// Two cards, and a worker's settings on the first of them.
struct Cards {
    nvml: FakeNvml,
    folders: [SimulatedCard; 2],
    models: tempfile::TempDir,
}

impl Cards {
    fn new() -> Result<Self> {
        let folders = [SimulatedCard::new(CARD_MB)?, SimulatedCard::new(CARD_MB)?];
        let nvml = FakeNvml::new(2)?;
        for (n, folder) in (0..).zip(&folders) {
            nvml.set(n, "simulated_card", folder.path().display())?;
        }
        let models = tempfile::tempdir()?;
        for name in ["big", "little"] {
            fs::write(models.path().join(format!("{name}.bin")), name)?;
        }
        Ok(Self { nvml, folders, models })
    }

    /// The context takes 500 MB, a big model 4,000, a little one 400, each of their two states 50. The reserve is 800.
    fn fleet(&self, speed: f64) -> FleetBuilder {
        Fleet::builder()
            .workers(1)
            .slots(4)
            .engine(Engine::Simulated { speed })
            .set("worker.nvml_library", self.nvml.library().display())
            .set("worker.gpu", 0)
            .set("worker.models_dir", self.models.path().display())
            .set("worker.default_model", "little")
            .set("worker.simulated.card", self.folders[0].path().display())
            .set("worker.simulated.context_mb", 500)
            .set("worker.simulated.sizes.big", 4_000)
            .set("worker.simulated.sizes.little", 400)
            .set("worker.simulated.state_mb", 50)
    }

    /// What the management library says is in use on the first card.
    async fn told_mb(&self, fleet: &Fleet) -> Option<(u64, u64)> {
        let device = beat_of(fleet, "gpu-1").await?["device"].clone();
        Some((device["used_mb"].as_u64()?, device["used_by_others_mb"].as_u64()?))
    }
}

async fn beat_of(fleet: &Fleet, gpu_id: &str) -> Option<Value> {
    let status = probe_api::fleet_status(&fleet.client()).await?;
    let workers = status["workers"].as_array()?;
    workers.iter().map(|w| &w["heartbeat"]).find(|beat| beat["gpu_id"] == gpu_id).cloned()
}

/// Waits for a pressure of the first worker's device, or for none.
async fn pressure(fleet: &Fleet, fits: impl Fn(&Value) -> bool) -> Result<()> {
    let seen = eventually("the pressure", SOON, || async {
        let beat = beat_of(fleet, "gpu-1").await?;
        fits(&beat["device"]["pressure"]).then_some(())
    });
    seen.await.with_context(|| fleet.logs())
}

/// Speaks at its own pace until told to stop; gives what was said.
fn speak(
    fleet: &Fleet,
    session: &str,
    seed: u64,
    stop: Arc<AtomicBool>,
) -> impl Future<Output = Result<Pcm>> + Send + use<> {
    let mut producer = Producer::named(fleet.js(), session, "s1");
    async move {
        let mut said = Vec::new();
        for n in 0..120 {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let pcm = audio::bursts(seed + n, 2.0);
            producer.stream(&pcm, 200, Pace::Speed(1.0)).await?;
            said.extend(pcm.samples);
        }
        producer.end().await?;
        Ok(Pcm::mono_16k(said))
    }
}

async fn said_by(fleet: &Fleet, session: &str, pcm: &Pcm) -> Result<Vec<checker::StoredFinal>> {
    let text = fleet.wait_end(session, Duration::from_secs(60)).await.with_context(|| fleet.logs())?;
    let report = checker::check(&fleet.js(), session).await?.clean()?;
    ensure!(report.covered == pcm.samples.len() as u64, "{session}: {} samples", report.covered);
    let expected = direct::simulated_text(pcm)?;
    ensure!(!expected.is_empty() && text == expected, "{session}:\n  heard    {text}\n  expected {expected}");
    Ok(report.finals)
}

/// Nobody has run out of memory, and no engine has died.
async fn nothing_died(fleet: &mut Fleet) -> Result<()> {
    fleet.check_alive()?;
    let logs = fleet.workers[0].log();
    ensure!(!logs.contains("out of memory") && !logs.contains("engine died"), "{logs}");
    let fleet = &*fleet;
    let beat = eventually("a heartbeat", SOON, || async { beat_of(fleet, "gpu-1").await });
    let beat = beat.await.with_context(|| fleet.logs())?;
    ensure!(beat["engine"]["restarts"] == 0 && beat["engine"]["crashes"].is_null(), "{beat}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_grows_by_we_do_without_and_take_again_when_it_shrinks() -> Result<()> {
    let _place = fleet::place().await;
    let cards = Cards::new()?;
    let [card, spare] = &cards.folders;
    card.tenant("llm", 9_600)?;
    let mut fleet = cards.fleet(50.0).start().await?;
    // Each heartbeat: whether there was pressure, and who was held.
    let mut beats = probe_api::heartbeats(&fleet.client(), "gpu-1").await?;
    let mut watching = JoinSet::new();
    watching.spawn(async move {
        let (mut newcomers, mut before): (Vec<Value>, Option<Vec<Value>>) = (Vec::new(), None);
        while let Some(message) = beats.next().await {
            let Ok(beat) = serde_json::from_slice::<Value>(&message.payload) else { continue };
            let held = beat["held"].as_array().cloned().unwrap_or_default();
            let held: Vec<Value> = held.iter().map(|h| h["id"].clone()).collect();
            if !beat["device"]["pressure"].is_null() {
                let known = before.replace(held.clone());
                newcomers.extend(known.iter().flat_map(|known| held.iter().filter(|id| !known.contains(id))).cloned());
            } else {
                before = None;
            }
            if beat["draining"] == true {
                break;
            }
        }
        newcomers
    });

    let (stop, mut talks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
    talks.spawn(speak(&fleet, "stays", 100, Arc::clone(&stop)));
    let short = audio::bursts(7, 4.0);
    let mut producer = Producer::named(fleet.js(), "passes", "s1");
    let first = [("Asr-Opt-Model", "big"), ("Asr-Opt-Policy", "exact_model")];
    producer.stream_with(&short, 200, Pace::AsFastAsPossible, &first).await?;
    producer.end().await?;
    said_by(&fleet, "passes", &short).await?;
    let used = eventually("both models on the card", SOON, || async {
        card.used_by_processes_mb().ok().filter(|mb| *mb >= 500 + 4_000 + 400 + 2 * 50)
    });
    used.await.with_context(|| fleet.logs())?;

    // It grows: nobody new comes, and what nobody uses goes.
    card.tenant_takes_all_but("llm", 500)?;
    pressure(&fleet, |p| !p.is_null()).await?;
    let mut later = Producer::named(fleet.js(), "later", "s1");
    later.stream(&short, 200, Pace::AsFastAsPossible).await?;
    later.end().await?;
    let free = eventually("the big model off the card", SOON, || async {
        card.used_by_processes_mb().ok().filter(|mb| *mb < 4_000)
    });
    free.await.with_context(|| fleet.logs())?;
    pressure(&fleet, Value::is_null).await?;
    // There is room again: whoever waited is heard.
    said_by(&fleet, "later", &short).await?;

    // It grows into the rest, and there is another card.
    let settings = fleet.worker_settings().clone().with("worker.gpu", 1);
    let settings = settings.with("worker.simulated.card", spare.path().display());
    let other = Worker::start("gpu-2", &settings, fleet.dir())?;
    fleet.workers.push(other);
    fleet.wait_ready().await?;
    card.tenant_takes_all_but("llm", 300)?;
    pressure(&fleet, |p| p == "move_away").await?;
    let moved = eventually("a final from the other card", SOON, || async {
        let finals = checker::finals(&fleet.js(), "stays").await.ok()?;
        finals.last().filter(|f| f.json["gpu_id"] == "gpu-2").map(|_| ())
    });
    moved.await.with_context(|| fleet.logs())?;
    let empty = eventually("nothing of ours on the card", SOON, || async {
        (card.used_by_processes_mb().ok()? == 0).then_some(())
    });
    empty.await.with_context(|| fleet.logs())?;
    ensure!(spare.used_by_processes_mb()? >= 900, "it is decoded there");

    // It shrinks, and the other card goes away: we are back.
    card.tenant("llm", 1_000)?;
    pressure(&fleet, Value::is_null).await?;
    nothing_died(&mut fleet).await?;
    fleet.workers[1].kill9()?;
    fleet.workers.truncate(1);
    let back = eventually("a final from the first card", SOON, || async {
        let finals = checker::finals(&fleet.js(), "stays").await.ok()?;
        finals.last().filter(|f| f.json["gpu_id"] == "gpu-1").map(|_| ())
    });
    back.await.with_context(|| fleet.logs())?;
    stop.store(true, Ordering::Relaxed);
    let pcm = talks.join_next().await.context("the talk")???;
    let finals = said_by(&fleet, "stays", &pcm).await?;
    let mut gpus: Vec<&str> = finals.iter().filter_map(|f| f.json["gpu_id"].as_str()).collect();
    gpus.dedup();
    ensure!(gpus == ["gpu-1", "gpu-2", "gpu-1"], "{gpus:?}");
    nothing_died(&mut fleet).await?;
    fleet.workers[0].terminate(SOON).await?;
    let newcomers = tokio::time::timeout(SOON, watching.join_next()).await?.context("the watch")??;
    ensure!(newcomers.is_empty(), "taken under pressure: {newcomers:?}");
    Ok(())
}

/// Somebody who runs `flock LOCK_FILE COMMAND`.
struct Neighbour {
    process: tokio::process::Child,
    says: Lines<BufReader<ChildStdout>>,
}

impl Neighbour {
    /// Waits until it has the device; says how long that took.
    async fn enter(lock: &std::path::Path) -> Result<(Self, Duration)> {
        let begin = Instant::now();
        let mut process = Command::new("flock")
            .arg(lock)
            .args(["sh", "-c", "echo in; read over"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("flock(1), of util-linux")?;
        let mut says = BufReader::new(process.stdout.take().context("pipe")?).lines();
        let line = tokio::time::timeout(SOON, says.next_line()).await??;
        ensure!(line.as_deref() == Some("in"), "{line:?}");
        Ok((Self { process, says }, begin.elapsed()))
    }

    async fn leave(mut self) -> Result<()> {
        self.process.stdin.take().context("pipe")?.write_all(b"over\n").await?;
        ensure!(self.says.next_line().await?.is_none() && self.process.wait().await?.success());
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_neighbour_and_we_take_turns_by_flock() -> Result<()> {
    const HOLD_MS: u64 = 500;
    const STUCK_MS: u64 = 2_000;
    const SPEED: f64 = 10.0;
    let _turn = fleet::turn().await;
    let cards = Cards::new()?;
    let card = &cards.folders[0];
    let lock = cards.models.path().join("gpu.lock");
    let mut fleet = cards
        .fleet(SPEED)
        .set("worker.sharing", "sequential")
        .set("worker.lock_file", lock.display())
        .set("worker.lock_hold_ms", HOLD_MS)
        .set("worker.engine_stuck_ms", STUCK_MS)
        .start()
        .await?;
    let (stop, mut talks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
    for (n, session) in ["one", "two", "three"].into_iter().enumerate() {
        let talk = speak(&fleet, session, 1_000 * n as u64, Arc::clone(&stop));
        talks.spawn(async move { talk.await.map(|pcm| (session, pcm)) });
    }
    let working = || eventually("our turn", SOON, || async { card.decodes().ok().filter(|n| *n > 0) });
    working().await.with_context(|| fleet.logs())?;
    let mut waits = Vec::new();
    for round in 0..4 {
        let (neighbour, waited) = Neighbour::enter(&lock).await?;
        waits.push(waited);
        // Once far longer than an engine may stand still.
        let stays = Duration::from_millis(if round == 2 { 2 * STUCK_MS } else { 300 });
        let beside = || async {
            match card.decodes() {
                Ok(0) => None,
                Ok(n) => Some(format!("{n} decodes beside the neighbour")),
                Err(error) => Some(error.to_string()),
            }
        };
        never(stays, beside).await.with_context(|| fleet.logs())?;
        neighbour.leave().await?;
        working().await.with_context(|| fleet.logs())?;
    }
    stop.store(true, Ordering::Relaxed);
    let mut longest_s = 0.0f64;
    while let Some(talk) = talks.join_next().await {
        let (session, pcm) = talk??;
        for f in said_by(&fleet, session, &pcm).await? {
            let samples = |key: &str| f.json[key].as_f64().unwrap_or(0.0);
            longest_s = longest_s.max((samples("to_sample") - samples("from_sample")) / 16_000.0);
        }
    }
    // The rest is for processes that start on a busy machine.
    let bound =
        Duration::from_millis(HOLD_MS) + Duration::from_secs_f64(longest_s / SPEED) + Duration::from_millis(700);
    ensure!(waits.iter().all(|wait| *wait < bound), "the neighbour waited for {waits:?}, allowed are {bound:?}");
    nothing_died(&mut fleet).await?;
    println!("the neighbour waited for {waits:?}, bound {bound:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_neighbour_that_keeps_the_device_is_told_of_and_nothing_new_comes() -> Result<()> {
    let _turn = fleet::turn().await;
    let cards = Cards::new()?;
    let lock = cards.models.path().join("gpu.lock");
    let mut fleet =
        cards.fleet(10.0).set("worker.sharing", "sequential").set("worker.lock_file", lock.display()).start().await?;
    let (neighbour, _) = Neighbour::enter(&lock).await?;
    let (stop, mut talks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
    talks.spawn(speak(&fleet, "waits", 0, Arc::clone(&stop)));
    let told = eventually("a neighbour that is told of", SOON, || async {
        let beat = beat_of(&fleet, "gpu-1").await?;
        let long = beat["engine"]["neighbour_ms"].as_u64().is_some_and(|ms| ms >= 5_000);
        (long && beat["device"]["pressure"] == "no_new_work").then_some(())
    });
    told.await.with_context(|| fleet.logs())?;
    ensure!(fleet.logs().contains("the neighbour keeps the device's lock"), "{}", fleet.logs());
    neighbour.leave().await?;
    let over = eventually("the end of its turn", SOON, || async {
        let beat = beat_of(&fleet, "gpu-1").await?;
        (beat["engine"]["neighbour_ms"].is_null() && beat["device"]["pressure"].is_null()).then_some(())
    });
    over.await.with_context(|| fleet.logs())?;
    stop.store(true, Ordering::Relaxed);
    let pcm = talks.join_next().await.context("the talk")???;
    said_by(&fleet, "waits", &pcm).await?;
    nothing_died(&mut fleet).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_file_that_goes_away_costs_time_and_blames_nobody() -> Result<()> {
    let _turn = fleet::turn().await;
    let cards = Cards::new()?;
    let card = &cards.folders[0];
    let folder = cards.models.path().join("run");
    fs::create_dir(&folder)?;
    let lock = folder.join("gpu.lock");
    let mut fleet = cards
        .fleet(10.0)
        .set("worker.sharing", "sequential")
        .set("worker.lock_file", lock.display())
        .set("worker.lock_hold_ms", 300)
        .set("worker.restore_after_ms", 2_000)
        .start()
        .await?;
    let (stop, mut talks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
    talks.spawn(speak(&fleet, "goes-on", 300, Arc::clone(&stop)));
    let working = eventually("our turn", SOON, || async { card.decodes().ok().filter(|n| *n > 0) });
    working.await.with_context(|| fleet.logs())?;

    fs::remove_dir_all(&folder)?;
    let told = eventually("the engine's end", SOON, || async {
        let beat = beat_of(&fleet, "gpu-1").await?;
        beat["engine"]["last_end"].is_object().then_some(beat)
    });
    let beat = told.await.with_context(|| fleet.logs())?;
    let end = &beat["engine"]["last_end"];
    let message = end["message"].as_str().unwrap_or_default();
    ensure!(end["class"] == "engine_crash" && message.contains("worker.lock_file"), "{end}");
    ensure!(message.contains(&lock.display().to_string()) && message.contains("No such file"), "{end}");
    // It needs no card there, and no lock.
    let spared = eventually("the CPU", SOON, || async {
        let beat = beat_of(&fleet, "gpu-1").await?;
        (beat["engine"]["effective_device"] == "cpu").then_some(beat)
    });
    let beat = spared.await.with_context(|| fleet.logs())?;
    ensure!(beat["engine"]["crashes"].is_null() && beat["held"][0]["suspect"].is_null(), "{beat}");
    ensure!(!fleet.logs().contains("engine died while it was at these"), "{}", fleet.logs());

    fs::create_dir(&folder)?;
    let back = eventually("the card", SOON, || async { card.decodes().ok().filter(|n| *n > 0) });
    back.await.with_context(|| fleet.logs())?;
    stop.store(true, Ordering::Relaxed);
    let pcm = talks.join_next().await.context("the talk")???;
    said_by(&fleet, "goes-on", &pcm).await?;
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn swapped_out_after_each_job_and_each_last_session() -> Result<()> {
    let _place = fleet::place().await;
    let cards = Cards::new()?;
    let card = &cards.folders[0];
    let mut fleet = cards.fleet(50.0).set("worker.sharing", "swap").start().await?;
    let nats = jobs_fleet::connect(&fleet).await?;
    let pcm = audio::bursts(11, 6.0);
    for round in 0..2 {
        let job = format!("job-{round}");
        jobs_fleet::submit(&nats, &jobs_fleet::request(&job, pcm.wav())?).await?;
        let taken = eventually("its model on the card", SOON, || async {
            card.used_by_processes_mb().ok().filter(|mb| *mb >= 900)
        });
        taken.await.with_context(|| fleet.logs())?;
        let status = jobs_fleet::ended(&nats, &fleet, &job).await?;
        ensure!(status.record.state == JobState::Done, "{status:?}");
        nothing_left(&cards, &fleet).await?;

        let session = format!("live-{round}");
        let mut producer = Producer::named(fleet.js(), &session, "s1");
        producer.stream(&pcm, 200, Pace::Speed(4.0)).await?;
        producer.end().await?;
        said_by(&fleet, &session, &pcm).await?;
        nothing_left(&cards, &fleet).await?;
    }
    nothing_died(&mut fleet).await?;
    Ok(())
}

/// Neither on the card, nor by what its driver says.
async fn nothing_left(cards: &Cards, fleet: &Fleet) -> Result<()> {
    let left = eventually("an empty card", SOON, || async {
        let told = cards.told_mb(fleet).await?;
        (cards.folders[0].used_mb().ok()? == 0 && told == (0, 0)).then_some(())
    });
    left.await.with_context(|| fleet.logs())
}
