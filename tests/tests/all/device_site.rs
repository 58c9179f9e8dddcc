//! Workers on GPUs that are not there: real processes, the real binding to NVIDIA's library, and a library that shows what
//! a test says.

use std::{collections::BTreeMap, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use voxfleet_harness::{
    card::{FakeNvml, code},
    child::{Child, children_of},
    fleet,
    process::{Settings, voxfleet},
    server::NatsServer,
    sim_card::SimulatedCard,
    wait::eventually,
};
use voxfleet_nats::{
    Nats, NatsConfig,
    fleet::{Heartbeats, control, heartbeats},
    topology::{self, TopologyConfig},
};
use voxfleet_schema::{
    failure::FailureClass,
    fleet::{ControlReply, ControlRequest, Heartbeat, Provider},
};

const SOON: Duration = Duration::from_secs(20);
/// What a fresh machine's environment says of its provider must not reach a test, nor this one's.
const RENTED: [&str; 4] = ["RUNPOD_POD_ID", "VAST_CONTAINERLABEL", "CONTAINER_ID", "CONTAINER_API_KEY"];

/// A machine with cards, and a server that hears its workers.
struct Site {
    cards: FakeNvml,
    beats: Heartbeats,
    nats: Nats,
    server: NatsServer,
    dir: TempDir,
}

impl Site {
    async fn start(cards: u32) -> Result<Self> {
        let server = NatsServer::start().await?;
        let nats = Nats::connect(&NatsConfig { urls: vec![server.url()], ..NatsConfig::default() }, "test").await?;
        topology::ensure(&nats, &TopologyConfig::default()).await?;
        let beats = heartbeats(&nats).await?;
        Ok(Self { cards: FakeNvml::new(cards)?, beats, nats, server, dir: tempfile::tempdir()? })
    }

    /// `voxfleet` with these words, on this machine.
    fn run(&self, words: &[&str]) -> Result<Command> {
        let settings = Settings::new()
            .with("nats.urls", self.server.url())
            .with("worker.engine", "simulated")
            .with("worker.simulated.speed", 0.0)
            .with("worker.nvml_library", self.cards.library().display())
            .with("worker.cache_dir", self.dir.path().display());
        let mut command = voxfleet(&settings, self.dir.path())?;
        for name in RENTED {
            command.env_remove(name);
        }
        command.args(words);
        Ok(command)
    }

    fn spawn(&self, name: &str, words: &[&str]) -> Result<Child> {
        Ok(Child::start(name, self.run(words)?, &self.dir.path().join(format!("{name}.log")))?)
    }

    /// The first heartbeat from now on that fits.
    async fn beat(&mut self, what: &str, fits: impl Fn(&Heartbeat) -> bool) -> Result<Heartbeat> {
        let find = async {
            loop {
                let beat = self.beats.next().await?;
                if fits(&beat) {
                    return Ok::<_, anyhow::Error>(beat);
                }
            }
        };
        tokio::time::timeout(SOON, find)
            .await
            .with_context(|| format!("no heartbeat with {what}\n{}", logs(self.dir.path())))?
    }

    /// The newest heartbeat of each of these cards' workers.
    async fn beats_of(&mut self, uuids: &[String]) -> Result<BTreeMap<String, Heartbeat>> {
        let mut found = BTreeMap::new();
        while found.len() < uuids.len() {
            let wanted = |beat: &Heartbeat| uuids.iter().any(|uuid| beat.gpu_id.as_str() == uuid);
            let beat = self.beat("a card of these", wanted).await?;
            found.insert(beat.gpu_id.to_string(), beat);
        }
        Ok(found)
    }

    /// Asks its worker for the engine that a session would need.
    async fn wake(&self, beat: &Heartbeat) -> Result<()> {
        let prewarm = ControlRequest::Prewarm { model: "simulated".to_owned() };
        let name = beat.worker();
        let ask = || async { control(&self.nats, &name, &prewarm, Duration::from_secs(2)).await.ok() };
        let reply = eventually("an answer to a prewarm", SOON, ask).await?;
        ensure!(reply == ControlReply::Done, "{reply:?}");
        Ok(())
    }

    async fn json(&self, words: &[&str]) -> Result<Value> {
        let mut command = self.run(words)?;
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn logs(dir: &Path) -> String {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let logs = files.filter(|path| path.extension().is_some_and(|e| e == "log"));
    logs.filter_map(|path| std::fs::read_to_string(path).ok()).collect::<Vec<_>>().join("\n")
}

fn environment(pid: u32, name: &str) -> Option<String> {
    let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let prefix = format!("{name}=");
    environ
        .split(|byte| *byte == 0)
        .find_map(|entry| String::from_utf8_lossy(entry).strip_prefix(&prefix).map(str::to_owned))
}

fn trouble(beat: &Heartbeat) -> Option<FailureClass> {
    beat.device.trouble.as_ref().map(|trouble| trouble.class)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_its_card_and_its_engine_sees_no_other() -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(2).await?;
    let uuid = site.cards.uuid(1);
    let mut worker = site.spawn("worker", &["worker", "--gpu", "1", "--set", "worker.price_per_hour=0.5"])?;
    let beat = site.beat("the card's name", |beat| beat.gpu_id.as_str() == uuid).await?;
    let device = &beat.device;
    ensure!(
        (device.uuid.as_deref(), device.index, device.gpus) == (Some(uuid.as_str()), Some(1), Some(2)),
        "{device:?}"
    );
    ensure!((device.total_mb, device.temperature_c, trouble(&beat)) == (16_000, Some(40), None), "{device:?}");
    ensure!((beat.provider, beat.price_per_hour) == (Provider::Local, Some(0.5)), "{beat:?}");

    site.cards.set(1, "used_mb", 9_600)?;
    site.cards.set(1, "temperature", 84)?;
    site.cards.set(1, "throttle", 64)?;
    site.beat("a tenant and heat", |beat| {
        let device = &beat.device;
        let tenant = (device.used_by_others_mb, device.free_mb) == (9_600, 6_400);
        tenant && device.temperature_c == Some(84) && device.throttled == ["thermal"]
    })
    .await?;
    site.wake(&beat).await?;
    let pid = worker.pid();
    let engine = || std::future::ready(children_of(pid).into_iter().next());
    let engine = eventually("an engine", SOON, engine).await?;
    let visible = || std::future::ready(environment(engine, "CUDA_VISIBLE_DEVICES").filter(|seen| *seen == uuid));
    eventually("an engine that sees this card alone", SOON, visible).await?;

    // One look may miss a late heartbeat.
    let looked = || async {
        let status = site.json(&["status", "--json"]).await.ok()?;
        status["workers"][0].is_object().then_some(status)
    };
    let status = eventually("the worker in the status", SOON, looked).await.with_context(|| logs(site.dir.path()))?;
    let told = &status["workers"][0];
    ensure!(told["gpu_available"] == true && told["gpu_count"] == 2, "{told:#}");
    ensure!(told["model_loaded"].is_boolean() && told["memory_allocated_mb"].is_u64(), "{told:#}");

    site.cards.set(1, "error", code::GPU_IS_LOST)?;
    let lost = site.beat("a lost card", |beat| trouble(beat).is_some()).await?;
    ensure!(trouble(&lost) == Some(FailureClass::DeviceLost), "{lost:?}");
    ensure!((lost.device.uuid.as_deref(), lost.device.free_mb) == (Some(uuid.as_str()), 0), "{lost:?}");
    ensure!(lost.incarnation == beat.incarnation, "the worker lives on");
    site.cards.unset(1, "error")?;
    site.beat("the card again", |beat| trouble(beat).is_none() && beat.device.free_mb == 6_400).await?;
    ensure!(
        worker.log().contains("device does not answer") && worker.log().contains("device answers again"),
        "{}",
        worker.log()
    );
    ensure!(worker.terminate(SOON).await?.success(), "{}", worker.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_driver_reports_of_a_card_is_told_of_it_and_of_no_other() -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(3).await?;
    site.cards.split(1, &[4_864])?;
    site.cards.set(2, "no_events", "")?;
    let uuids = [site.cards.uuid(0), site.cards.instance_uuid(1, 0), site.cards.uuid(2)];
    let mut all = site.spawn("all", &["worker", "--all-gpus"])?;
    for (_, beat) in site.beats_of(&uuids).await? {
        ensure!(beat.device.xids.is_none() && trouble(&beat).is_none(), "{beat:?}");
    }
    // Of the second it is the card that reports, for its instance.
    site.cards.set(1, "xid", 48)?;
    let told = |beat: &Heartbeat| beat.device.xids.is_some();
    let beat = site.beat("an XID", told).await?;
    ensure!(beat.gpu_id.as_str() == uuids[1] && trouble(&beat).is_none(), "{beat:?}");
    site.cards.set(0, "xid", 13)?;
    site.cards.set(2, "xid", 13)?;
    site.beat("the first card's", |beat| told(beat) && beat.gpu_id.as_str() == uuids[0]).await?;
    let later = site.beat("the third", |beat| beat.gpu_id.as_str() == uuids[2] && beat.seq > 3).await?;
    ensure!(later.device.xids.is_none() && later.device.free_mb == 16_000, "{later:?}");
    // One look may miss a late heartbeat.
    let looked = || async {
        let status = site.json(&["status", "--json"]).await.ok()?;
        (status["workers"].as_array()?.len() == uuids.len()).then_some(status)
    };
    let status = eventually("all three in the status", SOON, looked).await.with_context(|| logs(site.dir.path()))?;
    let workers = status["workers"].as_array().context("workers")?;
    let last = |uuid: &str| {
        let worker = workers.iter().find(|worker| worker["heartbeat"]["gpu_id"] == uuid);
        worker.map_or(Value::Null, |worker| worker["heartbeat"]["device"]["xids"]["last"].clone())
    };
    ensure!(uuids.each_ref().map(|uuid| last(uuid)) == [13.into(), 48.into(), Value::Null], "{status:#}");
    let looked = || async {
        let mut command = site.run(&["status"]).ok()?;
        let output = tokio::task::spawn_blocking(move || command.output()).await.ok()?.ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        uuids.iter().all(|uuid| text.contains(uuid.as_str())).then_some(text)
    };
    let text = eventually("all three in the table", SOON, looked).await.with_context(|| logs(site.dir.path()))?;
    ensure!(text.contains("the last is XID 48: the card has to be reset"), "{text}");
    ensure!(all.terminate(SOON).await?.success(), "{}", all.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_hangs_stops_no_heartbeat() -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(1).await?;
    let mut worker = site.spawn("worker", &["worker", "--gpu", "0"])?;
    let first = site.beat("the card", |beat| beat.device.free_mb == 16_000).await?;
    site.cards.set(0, "hangs", "")?;
    let hanging = site.beat("a driver that hangs", |beat| trouble(beat).is_some()).await?;
    ensure!(trouble(&hanging) == Some(FailureClass::Unavailable), "{hanging:?}");
    ensure!(hanging.device.free_mb == 16_000 && hanging.seq > first.seq + 2, "it went on beating: {hanging:?}");
    site.cards.unset(0, "hangs")?;
    site.beat("the driver again", |beat| trouble(beat).is_none()).await?;
    site.cards.set(0, "hangs", "")?;
    ensure!(worker.terminate(SOON).await?.success(), "nor the end: {}", worker.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_is_not_there_is_refused_by_name() -> Result<()> {
    let _place = fleet::place().await;
    let site = Site::start(1).await?;
    // 64: scripts that keep a worker running try no more. A driver's trouble may be over in a moment.
    for (words, said, code) in [
        (&["worker", "--gpu", "3"][..], "gpu 3 was asked for", 1),
        (&["worker", "--gpu", "0", "--engine", "whisper_cpp", "--models-dir", "."], "no CUDA", 1),
        (&["worker", "--all-gpus", "--engine", "whisper_cpp", "--models-dir", "."], "no CUDA", 64),
        (&["worker", "--all-gpus", "--set", "worker.gpu_id=gpu-1"], "worker.gpu_id", 64),
    ] {
        std::fs::write(site.dir.path().join("m.bin"), "x")?;
        let mut worker = site.spawn("refused", words)?;
        let status = worker.wait(SOON).await?;
        ensure!(status.code() == Some(code) && worker.log().contains(said), "{words:?}: {status}\n{}", worker.log());
    }
    let nobody = Site::start(0).await?;
    for (trouble, said) in [(None, "--gpu none"), (Some(code::DRIVER_MISMATCH), "reboot")] {
        if let Some(trouble) = trouble {
            nobody.cards.set_machine("init_error", trouble)?;
        }
        let mut worker = nobody.spawn("nobody", &["worker", "--all-gpus"])?;
        let status = worker.wait(SOON).await?;
        ensure!(status.code() == Some(1) && worker.log().contains(said), "{status}\n{}", worker.log());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_card_has_a_worker_that_comes_back() -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(2).await?;
    site.cards.split(1, &[4_864, 9_856])?;
    let uuids = [site.cards.uuid(0), site.cards.instance_uuid(1, 0), site.cards.instance_uuid(1, 1)];
    let mut all = site.spawn("all", &["worker", "--all-gpus"])?;
    let beats = site.beats_of(&uuids).await?;
    for (uuid, beat) in &beats {
        ensure!(beat.device.uuid.as_deref() == Some(uuid.as_str()), "{beat:?}");
        ensure!(children_of(all.pid()).contains(&beat.pid), "{} is no child of {}", beat.pid, all.pid());
    }
    site.wake(&beats[&uuids[0]]).await?;
    among(&all, 3).await?;

    let (killed, bystander) = (&beats[&uuids[0]], &beats[&uuids[1]]);
    ensure!(Command::new("kill").args(["-KILL", &killed.pid.to_string()]).status()?.success());
    let back = |beat: &Heartbeat| beat.gpu_id == killed.gpu_id && beat.pid != killed.pid;
    let back = site.beat("a worker in the place of the one that was killed", back).await?;
    ensure!(children_of(all.pid()).contains(&back.pid), "{back:?}");
    let other = site.beat("the other", |beat| beat.gpu_id == bystander.gpu_id).await?;
    ensure!(other.incarnation == bystander.incarnation, "nothing happened to it");

    let pids = [back.pid, other.pid, beats[&uuids[2]].pid];
    ensure!(all.terminate(SOON).await?.success(), "{}", all.log_tail());
    ensure!(pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()), "all of them have ended");
    Ok(())
}

/// Waits until an engine of this process was told that so many share the cores.
async fn among(process: &Child, workers: usize) -> Result<()> {
    let said = format!("workers={workers}");
    let told = || {
        let found = process.log().lines().any(|line| line.contains("cores shared out") && line.contains(&said));
        std::future::ready(found.then_some(()))
    };
    eventually(format!("an engine told of {said}"), SOON, told).await.with_context(|| process.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_comes_back_gets_its_worker() -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(2).await?;
    site.cards.set(1, "error", code::GPU_IS_LOST)?;
    let (first, second) = (site.cards.uuid(0), site.cards.uuid(1));
    let mut all = site.spawn("all", &["worker", "--all-gpus", "--set", "worker.survey_every_ms=200"])?;
    let beat = site.beat("the card that answers", |beat| beat.gpu_id.as_str() == first).await?;
    ensure!(all.log().contains("a gpu gets no worker until it answers"), "{}", all.log());
    ensure!(children_of(all.pid()) == [beat.pid], "{beat:?}");
    site.cards.unset(1, "error")?;
    let back = site.beat("the card that is back", |beat| beat.gpu_id.as_str() == second).await?;
    let other = site.beat("the other", |beat| beat.gpu_id.as_str() == first).await?;
    ensure!(other.incarnation == beat.incarnation && other.pid != back.pid, "nothing happened to it");
    ensure!(children_of(all.pid()).len() == 2, "one each");
    ensure!(all.log().matches("a gpu gets no worker until it answers").count() == 1, "said once\n{}", all.log());
    ensure!(all.terminate(SOON).await?.success(), "{}", all.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_shows_each_device_and_leaves_out_what_our_own_engines_hold() -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(3).await?;
    let card = SimulatedCard::new(16_000)?;
    site.cards.split(0, &[4_864, 9_856])?;
    site.cards.set(1, "error", code::GPU_IS_LOST)?;
    site.cards.set(2, "simulated_card", card.path().display())?;
    let folder = format!("worker.simulated.card={}", card.path().display());
    let words = ["worker", "--gpu", "2", "--set", &folder, "--set", "worker.simulated.context_mb=700"];
    let mut worker = site.spawn("worker", &words)?;
    let beat = site.beat("the whole card", |beat| beat.device.index == Some(2)).await?;
    site.wake(&beat).await?;
    site.beat("an engine on it", |beat| beat.device.used_mb >= 700).await?;
    card.tenant("voxtral", 3_000)?;

    let devices = |plan: &Value| -> Vec<Value> {
        let further = plan["further"].as_array().cloned().unwrap_or_default();
        std::iter::once(plan.clone()).chain(further).collect()
    };
    let plan = site.json(&["plan", "--json"]).await?;
    let devices_now = devices(&plan);
    let sizes: Vec<u64> = devices_now.iter().filter_map(|device| device["card"]["total_mb"].as_u64()).collect();
    ensure!(sizes == [4_864, 9_856, 16_000, 0], "{sizes:?}\n{plan:#}");
    ensure!(devices_now[..3].iter().all(|device| device["options"][0]["model"].is_string()), "{plan:#}");
    let lost = devices_now[3]["trouble"].as_str().context("a trouble")?;
    ensure!(lost.starts_with("gpu 1:") && devices_now[3]["options"] == json!([]), "{plan:#}");
    ensure!(devices_now[2]["card"]["tenants"] == json!([{"name": "in use now", "mb": 3_000}]), "{plan:#}");
    ensure!(devices_now[2]["in_use_may_be_ours"] == false, "{plan:#}");

    site.cards.set(2, "error_processes", code::NO_PERMISSION)?;
    let plan = site.json(&["plan", "--json"]).await?;
    let device = &devices(&plan)[2];
    ensure!(device["in_use_may_be_ours"] == true, "nobody can tell: {plan:#}");
    ensure!(device["card"]["tenants"][0]["mb"].as_u64() >= Some(3_700), "{plan:#}");
    ensure!(worker.terminate(SOON).await?.success(), "{}", worker.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_on_one_card_are_noticed() -> Result<()> {
    let _place = fleet::place().await;
    let mut site = Site::start(1).await?;
    let mut first = site.spawn("first", &["worker", "--gpu", "0", "--gpu-id", "gpu-a"])?;
    let alone =
        site.beat("the first", |beat| beat.gpu_id.as_str() == "gpu-a" && beat.device.shared_with.is_empty()).await?;
    site.wake(&alone).await?;
    among(&first, 1).await?;
    let mut second = site.spawn("second", &["worker", "--gpu", "0", "--gpu-id", "gpu-b"])?;
    site.beat("the first's news", |b| b.gpu_id.as_str() == "gpu-a" && b.device.shared_with == ["gpu-b"]).await?;
    site.beat("the second's news", |b| b.gpu_id.as_str() == "gpu-b" && b.device.shared_with == ["gpu-a"]).await?;
    // Its next engine has half of the cores.
    let pid = first.pid();
    let engine = || std::future::ready(children_of(pid).into_iter().next());
    let engine = eventually("an engine", SOON, engine).await?;
    ensure!(Command::new("kill").args(["-KILL", &engine.to_string()]).status()?.success());
    among(&first, 2).await?;
    let doctor = site.json(&["doctor", "--json"]).await?;
    let checks = doctor["checks"].as_array().context("checks")?;
    let shared = |check: &&Value| check["name"] == "gpu" && check["verdict"] == "warn";
    let found = checks.iter().find(shared).and_then(|check| check["found"].as_str()).context("a warning")?;
    ensure!(found.contains("gpu-a") && found.contains("gpu-b"), "{found}");
    second.kill9()?;
    site.beat("the first alone", |b| b.gpu_id.as_str() == "gpu-a" && b.device.shared_with.is_empty()).await?;
    ensure!(first.terminate(SOON).await?.success(), "{}", first.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_the_trouble_and_its_remedy() -> Result<()> {
    let site = Site::start(2).await?;
    let found = |report: &Value, name: &str| -> Vec<Value> {
        let checks = report["checks"].as_array().cloned().unwrap_or_default();
        checks.into_iter().filter(|check| check["name"] == name).collect()
    };
    let report = site.json(&["doctor", "--json"]).await?;
    ensure!(found(&report, "nvidia")[0]["found"].as_str().is_some_and(|v| v.contains("580.65.06")), "{report:#}");
    ensure!(found(&report, "gpu").len() == 2 && found(&report, "device")[0]["verdict"] == "ok", "{report:#}");

    site.cards.set(0, "error", code::GPU_IS_LOST)?;
    let report = site.json(&["doctor", "--json"]).await?;
    let lost = found(&report, "gpu").into_iter().find(|check| check["verdict"] == "fail").context("a failure")?;
    ensure!(lost["found"].as_str().is_some_and(|text| text.starts_with("device_lost: gpu 0")), "{lost:#}");
    ensure!(lost["mend"].as_str().is_some_and(|text| text.contains("xid")), "{lost:#}");

    site.cards.set_machine("init_error", code::DRIVER_MISMATCH)?;
    let report = site.json(&["doctor", "--json"]).await?;
    let mismatch = found(&report, "gpu");
    ensure!(mismatch[0]["mend"].as_str().is_some_and(|text| text.contains("reboot")), "{report:#}");
    ensure!(found(&report, "device")[0]["verdict"] == "warn", "the cpu stands in: {report:#}");
    Ok(())
}
