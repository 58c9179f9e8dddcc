//! A device that fails under a worker: what ends the engine has a class, whoever may goes on with less, whoever may not is
//! refused, and all comes back when the device does. The card is a folder that engines and the fake library share.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use voxfleet_harness::{
    audio::{self, Pcm},
    card::FakeNvml,
    checker, fleet,
    process::Settings,
    producer::{Pace, Producer},
    sim_card::SimulatedCard,
    wait::eventually,
};
use voxfleet_schema::{
    failure::FailureClass,
    fleet::{ControlReply, Heartbeat, Residency},
    id::WorkerName,
    session::{Policy, SessionOptions},
};

use crate::{direct, worker_supervisor::Alone};

const SOON: Duration = Duration::from_secs(30);

/// A worker on a card of its own, with a model `small` of 600 MB and a model `base` of 200.
pub(crate) struct OnCard {
    pub(crate) alone: Alone,
    pub(crate) card: SimulatedCard,
    nvml: FakeNvml,
    models: TempDir,
}

impl OnCard {
    pub(crate) async fn start(total_mb: u64, settings: Settings) -> Result<Self> {
        let (card, nvml, models) = (SimulatedCard::new(total_mb)?, FakeNvml::new(1)?, tempfile::tempdir()?);
        nvml.set(0, "simulated_card", card.path().display())?;
        nvml.set(0, "total_mb", total_mb)?;
        for model in ["small", "base"] {
            fs::write(models.path().join(format!("{model}.bin")), "")?;
        }
        let settings = Settings::new()
            .with("worker.gpu", 0)
            .with("worker.nvml_library", nvml.library().display())
            .with("worker.models_dir", models.path().display())
            .with("worker.default_model", "small")
            .with("worker.simulated.card", card.path().display())
            .with("worker.simulated.context_mb", 50)
            .with("worker.simulated.state_mb", 10)
            .with("worker.simulated.sizes.small", 600)
            .with("worker.simulated.sizes.base", 200)
            .with("worker.restore_after_ms", 1_000)
            .and(&settings);
        Ok(Self { alone: Alone::start(settings).await?, card, nvml, models })
    }

    pub(crate) fn models(&self) -> &Path {
        self.models.path()
    }

    async fn take(&mut self, session: &str, policy: Policy) -> Result<ControlReply> {
        let name = self.alone.name().await?;
        self.take_as(&name, session, policy).await
    }

    /// The same of a worker whose name is known: no wait for a heartbeat.
    async fn take_as(&self, name: &WorkerName, session: &str, policy: Policy) -> Result<ControlReply> {
        let options = SessionOptions { policy, ..SessionOptions::default() };
        self.alone.assign_with(name, session, 1, options).await
    }

    /// Waits for a final of this model and device.
    async fn final_by(&self, session: &str, model: &str, device: &str) -> Result<()> {
        let told = |f: &checker::StoredFinal| f.json["model"] == *model && f.json["device"] == *device;
        let found = eventually(format!("a final by {model} on {device}"), SOON, || async {
            let finals = checker::finals(&self.alone.js, session).await.ok()?;
            finals.iter().any(told).then_some(())
        });
        found.await.with_context(|| self.alone.worker.log_tail())
    }

    /// Details of what the worker has told of models and devices, in order.
    async fn changes(&self, session: &str, count: usize) -> Result<Vec<(String, Value)>> {
        let found = eventually(format!("{count} changes"), SOON, || async {
            let told = checker::events(&self.alone.js, session).await.ok()?;
            let by_worker = |(_, event): &(String, Value)| event["detail"]["by"] == "worker";
            let changes: Vec<_> = told.into_iter().filter(by_worker).collect();
            (changes.len() >= count).then_some(changes)
        });
        found.await.with_context(|| self.alone.worker.log_tail())
    }
}

fn state_of(beat: &Heartbeat, model: &str) -> Option<Residency> {
    beat.models.iter().find(|m| m.name == model).map(|m| m.state)
}

fn refused(reply: &ControlReply) -> Option<FailureClass> {
    match reply {
        ControlReply::Refused(failure) => Some(failure.class),
        _ => None,
    }
}

/// Three parts of about the same length.
fn thirds(pcm: &Pcm) -> [Pcm; 3] {
    let part = |n: usize| {
        let len = pcm.samples.len();
        Pcm { samples: pcm.samples[len * n / 3..len * (n + 1) / 3].to_vec(), ..pcm.clone() }
    };
    [part(0), part(1), part(2)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_somebody_fills_costs_a_size_and_no_word_until_it_is_free_again() -> Result<()> {
    let _place = fleet::place().await;
    let mut on = OnCard::start(1_000, Settings::new()).await?;
    ensure!(on.take("fills", Policy::AllowSmaller).await? == ControlReply::Done);
    let pcm = audio::bursts(21, 36.0);
    let [first, second, third] = thirds(&pcm);
    let mut producer = Producer::bare(on.alone.js.clone(), "fills");
    producer.stream(&first, 100, Pace::AsFastAsPossible).await?;
    on.final_by("fills", "small", "cuda:simulated").await?;

    // The next decode finds no memory, and CUDA ends the process.
    on.card.tenant("neighbour", 400)?;
    producer.stream(&second, 100, Pace::AsFastAsPossible).await?;
    on.final_by("fills", "base", "cuda:simulated").await?;
    let beat = on.alone.beat("a stand-in", |b| !b.engine.standbys.is_empty()).await?;
    let standby = &beat.engine.standbys[0];
    assert_eq!((standby.asked.as_str(), standby.model.as_str(), standby.device.as_str()), ("small", "base", "gpu"));
    assert_eq!((standby.class, beat.engine.restarts), (FailureClass::OutOfMemory, 1));
    assert_eq!(state_of(&beat, "small"), Some(Residency::NoRoom));
    let end = beat.engine.last_end.context("how it ended")?;
    ensure!(end.class == FailureClass::OutOfMemory && end.message.contains("nvidia-smi"), "{}", end.message);
    ensure!(beat.held.iter().all(|held| !held.suspect && held.crashes == 0), "no input is to blame");
    assert_eq!(beat.engine.crashes, 0, "and the worker has dealt with it");
    assert_eq!(refused(&on.take("exact", Policy::ExactModel).await?), Some(FailureClass::OutOfMemory));

    on.card.tenant("neighbour", 0)?;
    on.alone.beat("small again", |b| state_of(b, "small") == Some(Residency::Loaded)).await?;
    producer.stream(&third, 100, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    assert_eq!(on.alone.end_text("fills").await?, direct::simulated_text(&pcm)?);
    checker::check(&on.alone.js, "fills").await?.clean()?;
    let finals = checker::finals(&on.alone.js, "fills").await?;
    let mut models: Vec<&str> =
        finals.iter().filter_map(|f| f.json["model"].as_str()).filter(|m| *m != "none").collect();
    models.dedup();
    assert_eq!(models, ["small", "base", "small"]);
    let changes = on.changes("fills", 2).await?;
    let whats: Vec<&str> = changes.iter().map(|(what, _)| what.as_str()).collect();
    assert_eq!(whats, ["degraded", "restored"], "{changes:?}");
    let detail =
        json!({ "asked": "small", "model": "base", "device": "gpu", "class": "out_of_memory", "by": "worker" });
    assert_eq!(changes[0].1["detail"], detail);
    assert_eq!(changes[1].1["detail"]["model"], "small");
    ensure!(on.take("exact", Policy::ExactModel).await? == ControlReply::Done, "there is room again");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_that_do_not_fit_cost_no_process() -> Result<()> {
    let _place = fleet::place().await;
    let mut on = OnCard::start(500, Settings::new()).await?;
    ensure!(on.take("soft", Policy::AllowCpu).await? == ControlReply::Done);
    let pcm = audio::bursts(22, 9.0);
    let mut producer = Producer::bare(on.alone.js.clone(), "soft");
    producer.stream(&pcm, 100, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    assert_eq!(on.alone.end_text("soft").await?, direct::simulated_text(&pcm)?);
    checker::check(&on.alone.js, "soft").await?.clean()?;
    on.final_by("soft", "base", "cuda:simulated").await?;
    let changes = on.changes("soft", 1).await?;
    assert_eq!((changes.len(), changes[0].0.as_str()), (1, "degraded"), "{changes:?}");
    let beat = on.alone.beat("no room", |b| state_of(b, "small") == Some(Residency::NoRoom)).await?;
    assert_eq!((beat.engine.restarts, beat.engine.last_end), (0, None));
    let failure = &beat.models.iter().find(|m| m.name == "small").context("small")?.failure;
    ensure!(failure.as_ref().is_some_and(|f| f.class == FailureClass::OutOfMemory), "{failure:?}");
    Ok(())
}

/// These faults, one in each process, and then none: the GPU is left alone for the reason of the last, and taken again when
/// its time is over.
async fn to_the_cpu_and_back(faults: &[&str], class: FailureClass, settings: Settings) -> Result<()> {
    let _place = fleet::place().await;
    let mut on = OnCard::start(1_000, settings).await?;
    let name = on.alone.name().await?;
    ensure!(on.take_as(&name, "soft", Policy::AllowCpu).await? == ControlReply::Done);
    let pcm = audio::bursts(23, 36.0);
    let [first, second, third] = thirds(&pcm);
    let mut producer = Producer::bare(on.alone.js.clone(), "soft");
    producer.stream(&first, 100, Pace::AsFastAsPossible).await?;
    on.final_by("soft", "small", "cuda:simulated").await?;
    for fault in faults {
        on.card.fault(fault, 0)?;
    }
    producer.stream(&second, 100, Pace::AsFastAsPossible).await?;
    on.final_by("soft", "small", "cpu").await?;
    let beat = on.alone.beat("the CPU", |b| b.engine.effective_device == "cpu").await?;
    assert_eq!(beat.engine.restarts as usize, faults.len());
    assert_eq!(beat.engine.last_end.map(|end| end.class), Some(class));
    assert_eq!(beat.engine.standbys.iter().map(|standby| standby.class).collect::<Vec<_>>(), [class]);
    assert_eq!(on.card.used_by_processes_mb()?, 0, "nothing is left on it");
    for policy in [Policy::ExactModel, Policy::AllowSmaller] {
        assert_eq!(refused(&on.take_as(&name, "strict", policy).await?), Some(class));
    }
    on.alone.beat("the GPU", |b| b.engine.effective_device == "cuda:simulated").await?;
    producer.stream(&third, 100, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    assert_eq!(on.alone.end_text("soft").await?, direct::simulated_text(&pcm)?);
    checker::check(&on.alone.js, "soft").await?.clean()?;
    let changes = on.changes("soft", 2).await?;
    let told: Vec<_> = changes.iter().map(|(what, event)| (what.as_str(), &event["detail"]["device"])).collect();
    assert_eq!(told, [("degraded", &json!("cpu")), ("restored", &json!("gpu"))]);
    assert_eq!(changes[0].1["detail"]["class"], class.as_str());
    let finals = checker::finals(&on.alone.js, "soft").await?;
    let last = finals.iter().rfind(|f| !f.text().is_empty()).context("a final")?;
    assert_eq!(last.json["device"], "cuda:simulated");
    let taken = on.take_as(&name, "strict", Policy::ExactModel).await?;
    ensure!(taken == ControlReply::Done, "the GPU serves again");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_leaves_a_card_of_which_the_driver_reports_that_it_fell_off() -> Result<()> {
    let _place = fleet::place().await;
    let mut on = OnCard::start(1_000, Settings::new()).await?;
    ensure!(on.take("off", Policy::AllowCpu).await? == ControlReply::Done);
    let pcm = audio::bursts(25, 24.0);
    let [first, second, third] = thirds(&pcm);
    let mut producer = Producer::bare(on.alone.js.clone(), "off");
    producer.stream(&first, 100, Pace::AsFastAsPossible).await?;
    on.final_by("off", "small", "cuda:simulated").await?;

    // Another program's fault, and one that asks for a reset: neither takes the card away.
    for (count, xid) in [(1, 31), (2, 48)] {
        on.nvml.set(0, "xid", xid)?;
        let told = |b: &Heartbeat| b.device.xids.is_some_and(|x| (x.last, x.count) == (xid, count));
        let beat = on.alone.beat("an XID", told).await?;
        assert_eq!((beat.device.trouble, beat.engine.effective_device.as_str()), (None, "cuda:simulated"));
    }
    producer.stream(&second, 100, Pace::AsFastAsPossible).await?;

    on.nvml.set(0, "xid", 79)?;
    let lost = |b: &Heartbeat| b.device.trouble.as_ref().is_some_and(|t| t.class == FailureClass::DeviceLost);
    let beat = on.alone.beat("a lost card", lost).await?;
    ensure!(beat.device.xids.is_some_and(|x| (x.last, x.count) == (79, 3)), "{:?}", beat.device);
    on.alone.beat("the CPU", |b| b.engine.effective_device == "cpu" && !b.engine.standbys.is_empty()).await?;
    producer.stream(&third, 100, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    assert_eq!(on.alone.end_text("off").await?, direct::simulated_text(&pcm)?);
    checker::check(&on.alone.js, "off").await?.clean()?;
    on.final_by("off", "small", "cpu").await?;
    let changes = on.changes("off", 1).await?;
    let (what, event) = changes.first().context("a change")?;
    assert_eq!((what.as_str(), &event["detail"]["class"]), ("degraded", &json!("device_lost")));
    assert_eq!(on.card.used_by_processes_mb()?, 0, "nothing is left on it");
    let log = on.alone.worker.log();
    ensure!(log.contains("xid=79") && log.contains("xid=48") && !log.contains("engine died"), "{log}");
    Ok(())
}

/// Its own time, long enough to be looked at meanwhile, where others wait for longer than the test.
fn soon_after(which: &str) -> Settings {
    let long = Settings::new().with("worker.restore_after_ms", 600_000).with("worker.restore_driver_after_ms", 600_000);
    long.with(which, 8_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_falls_off_the_bus_sends_whoever_may_to_the_cpu_and_takes_him_back() -> Result<()> {
    to_the_cpu_and_back(&["lost"], FailureClass::DeviceLost, soon_after("worker.restore_after_ms")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_fits_again_is_used_again() -> Result<()> {
    to_the_cpu_and_back(&["mismatch"], FailureClass::DriverMismatch, soon_after("worker.restore_driver_after_ms")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_library_that_is_there_again_is_used_again() -> Result<()> {
    to_the_cpu_and_back(&["library"], FailureClass::MissingLibrary, soon_after("worker.restore_driver_after_ms")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_third_crash_within_a_minute_leaves_the_gpu_alone_for_a_while() -> Result<()> {
    let settings = soon_after("worker.restore_after_ms");
    to_the_cpu_and_back(&["abort", "exit", "kill"], FailureClass::EngineCrash, settings).await
}

/// What happens to the process, by name of the fault, and what becomes of it.
const ENDS: [(&str, FailureClass, &str, &str); 11] = [
    ("oom_at_decode", FailureClass::OutOfMemory, "base", "cuda:simulated"),
    ("oom_at_load", FailureClass::OutOfMemory, "base", "cuda:simulated"),
    ("lost", FailureClass::DeviceLost, "small", "cpu"),
    ("mismatch", FailureClass::DriverMismatch, "small", "cpu"),
    ("library", FailureClass::MissingLibrary, "small", "cpu"),
    ("assertion", FailureClass::EngineCrash, "small", "cuda:simulated"),
    ("abort", FailureClass::EngineCrash, "small", "cuda:simulated"),
    ("exit", FailureClass::EngineCrash, "small", "cuda:simulated"),
    ("kill", FailureClass::EngineCrash, "small", "cuda:simulated"),
    ("garbage", FailureClass::EngineCrash, "small", "cuda:simulated"),
    ("hang", FailureClass::Timeout, "small", "cuda:simulated"),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_end_of_a_process_has_its_class_and_costs_no_word() -> Result<()> {
    let _turn = fleet::turn().await;
    let pcm = audio::bursts(24, 6.0);
    let text = direct::simulated_text(&pcm)?;
    for (fault, class, model, device) in ENDS {
        let settings = Settings::new().with("worker.engine_stuck_ms", 2_000).with("worker.restore_after_ms", 600_000);
        let mut on = OnCard::start(1_000, settings).await?;
        on.card.fault(fault, 0)?;
        ensure!(on.take("ends", Policy::AllowCpu).await? == ControlReply::Done);
        let mut producer = Producer::bare(on.alone.js.clone(), "ends");
        producer.stream(&pcm, 100, Pace::AsFastAsPossible).await?;
        producer.end().await?;
        assert_eq!(on.alone.end_text("ends").await.context(fault)?, text, "{fault}");
        on.final_by("ends", model, device).await.context(fault)?;
        let beat = on.alone.beat("its end", |b| b.engine.last_end.is_some()).await.context(fault)?;
        let end = beat.engine.last_end.context("an end")?;
        assert_eq!(end.class, class, "{fault}: {}", end.message);
        ensure!(end.message.contains("; ") && beat.engine.restarts == 1, "{fault}: {}", end.message);
    }
    Ok(())
}
