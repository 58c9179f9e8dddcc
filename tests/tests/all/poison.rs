//! Inputs that kill or hang the engine: they are found, set aside, and cost nobody else a word.
//!
//! The simulated engine aborts (or hangs) at each window with 400 samples at the very top in a row, wherever it is decoded.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, future::try_join_all};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker::{self, StoredFinal},
    fleet::{self, Engine, Fleet},
    process::{Settings, Worker},
    producer::{Pace, Producer},
    verdict,
    wait::eventually,
};
use voxfleet_nats::{Nats, NatsConfig, api, subjects::Endpoint};
use voxfleet_schema::{
    failure::FailureClass,
    fleet::{Assignment, ControlReply, ControlRequest, EngineRunState, Heartbeat},
    id::{Kind, StreamId},
    job::{Inline, JobQuery, JobRequest, JobState, JobStatus, Submitted},
    session::SessionOptions,
};
use voxfleet_worker::ipc::FinalDraft;

use crate::{
    direct,
    worker_supervisor::{Alone, id},
};

const RUN: usize = 400;
const PATIENCE: Duration = Duration::from_secs(90);

/// Speech with poison in its second burst, and what the engine makes of it where that is harmless.
struct Poisoned {
    pcm: Pcm,
    finals: Vec<FinalDraft>,
    /// Which of them kills.
    bad: usize,
}

impl Poisoned {
    fn new(seed: u64, seconds: f64) -> Result<Self> {
        let mut pcm = audio::bursts(seed, seconds);
        let plain = finals_of(&pcm)?;
        let bad = plain.iter().enumerate().skip(1).find(|(_, f)| !f.segments.is_empty()).context("a second burst")?.0;
        let start = plain[bad].segments[0].start_ms as usize * 16;
        // Where it speaks: boundaries stay as they are.
        let at = start + 4_800;
        pcm.samples[at..at + RUN].fill(i16::MAX);
        let finals = finals_of(&pcm)?;
        let range = |f: &FinalDraft| f.from_sample as usize..f.to_sample as usize;
        let bad = finals.iter().position(|f| range(f).contains(&at)).context("its final")?;
        ensure!(range(&finals[bad]).contains(&(at + RUN)), "poison over a boundary");
        Ok(Self { pcm, finals, bad })
    }

    /// The chain it must leave: all as if it were harmless, but one final without text.
    fn check(&self, stored: &[StoredFinal], class: FailureClass) -> Result<()> {
        ensure!(stored.len() == self.finals.len(), "{} finals, not {}", stored.len(), self.finals.len());
        for (n, (stored, expected)) in stored.iter().zip(&self.finals).enumerate() {
            let range = (stored.json["from_sample"].as_u64(), stored.json["to_sample"].as_u64());
            ensure!(range == (Some(expected.from_sample), Some(expected.to_sample)), "final {n} covers {range:?}");
            let error = &stored.json["error"]["class"];
            if n == self.bad {
                ensure!(*error == json!(class.as_str()) && stored.text().is_empty(), "final {n}: {}", stored.json);
            } else {
                ensure!(error.is_null(), "final {n}: {error}");
                ensure!(stored.text() == direct::text(std::slice::from_ref(expected)), "final {n}: {}", stored.text());
            }
        }
        Ok(())
    }
}

fn finals_of(pcm: &Pcm) -> Result<Vec<FinalDraft>> {
    let options = SessionOptions::default();
    direct::transcribe(&mut *direct::simulated()?, &*direct::energy_vad(), &options, &direct::log(pcm, 100))
}

async fn speak(js: async_nats::jetstream::Context, session: &str, pcm: &Pcm) -> Result<()> {
    let mut producer = Producer::named(js, session, "s1");
    producer.stream(pcm, 100, Pace::Speed(4.0)).await?;
    producer.end().await?;
    Ok(())
}

async fn letters(js: &async_nats::jetstream::Context, kind: &str, id: &str) -> Result<Vec<Value>> {
    let read = checker::read(js, "ASR_DEAD", &format!("asr.v1.dead.{kind}.{id}")).await?;
    Ok(read.iter().map(|letter| serde_json::from_slice(&letter.payload)).collect::<Result<_, _>>()?)
}

/// Restarts of each worker's engine, from its next heartbeat.
async fn restarts(fleet: &Fleet) -> Result<BTreeMap<String, u64>> {
    let mut beats = fleet.client().subscribe("asr.v1.heartbeat.*").await?;
    let mut found = BTreeMap::new();
    while found.len() < fleet.workers.len() {
        let beat = tokio::time::timeout(PATIENCE, beats.next()).await?.context("heartbeats")?;
        let beat: Value = serde_json::from_slice(&beat.payload)?;
        let gpu = beat["gpu_id"].as_str().context("gpu_id")?.to_owned();
        found.insert(gpu, beat["engine"]["restarts"].as_u64().context("restarts")?);
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_session_loses_one_window_and_its_neighbours_nothing() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder()
        .workers(3)
        .slots(8)
        .engine(Engine::Simulated { speed: 40.0 })
        .set("worker.simulated.poison", RUN)
        .start()
        .await?;
    let js = fleet.js();
    let poisoned = Poisoned::new(3, 14.0)?;
    let clean: Vec<(String, Pcm)> =
        (0..6).map(|n| (format!("clean-{n}"), audio::bursts(40 + n, 12.0 + n as f64))).collect();
    let speaking = clean.iter().map(|(session, pcm)| speak(js.clone(), session, pcm));
    let (poison, others) = tokio::join!(speak(js.clone(), "poison", &poisoned.pcm), try_join_all(speaking));
    poison?;
    others?;
    for (session, pcm) in &clean {
        let text = fleet.wait_end(session, PATIENCE).await.with_context(|| fleet.logs())?;
        assert_eq!(text, direct::simulated_text(pcm)?, "{session}");
        checker::check(&js, session).await?.clean()?;
    }
    fleet.wait_end("poison", PATIENCE).await.with_context(|| fleet.logs())?;
    let stored = checker::finals(&js, "poison").await?;
    poisoned.check(&stored, FailureClass::EngineCrash).with_context(|| fleet.logs())?;
    let range = poisoned.finals[poisoned.bad].from_sample..poisoned.finals[poisoned.bad].to_sample;
    let verdict = verdict::poisoned_session(&js, "poison", &poisoned.pcm.samples, &[range]).await?;
    assert_eq!(verdict.parked, 1, "{verdict:?}");

    let letters = letters(&js, "session", "poison").await?;
    ensure!(letters.len() == 1, "{letters:?}");
    let bad = &stored[poisoned.bad].json;
    assert_eq!(letters[0]["audio"], bad["audio"]);
    assert_eq!((&letters[0]["error"]["class"], &letters[0]["attempts"]), (&json!("engine_crash"), &json!(3)));
    assert_eq!((&letters[0]["origin"]["gpu_id"], &letters[0]["kind"]), (&bad["gpu_id"], &json!("session")));
    let told = eventually("its event", PATIENCE, || async {
        checker::events(&js, "poison").await.ok().filter(|told| told.iter().any(|(what, _)| what == "parked"))
    });
    let told = told.await?;
    assert_eq!(told.iter().filter(|(what, _)| what == "parked").count(), 1, "{told:?}");

    // Where it was first one death may have been shared and two were its own; the last try was another worker's. It went to
    // nobody else.
    let owner = bad["gpu_id"].as_str().context("gpu_id")?;
    let mut deaths = restarts(&fleet).await?;
    ensure!(deaths.remove(owner) == Some(1), "set aside on {owner}\n{}", fleet.logs());
    let mut others: Vec<u64> = deaths.into_values().collect();
    others.sort_unstable();
    ensure!(others[0] == 0 && (2..=3).contains(&others[1]), "{others:?}\n{}", fleet.logs());
    fleet.check_alive()?;
    Ok(())
}

async fn submit(nats: &Nats, job: &str, pcm: &Pcm) -> Result<()> {
    let request = JobRequest {
        job: Some(StreamId::new(job)?),
        audio: None,
        data: Some(Inline(pcm.wav().into())),
        name: None,
        options: SessionOptions::default(),
        result_ttl_s: None,
        part: None,
    };
    let _: Submitted = api::request(nats, Endpoint::JobSubmit, &request, Duration::from_secs(10)).await?;
    Ok(())
}

async fn ended(nats: &Nats, fleet: &Fleet, job: &str) -> Result<JobStatus> {
    let query = JobQuery { job: StreamId::new(job)? };
    let done = eventually("the job's end", PATIENCE, || async {
        let status: JobStatus = api::request(nats, Endpoint::JobStatus, &query, Duration::from_secs(5)).await.ok()?;
        status.record.state.has_ended().then_some(status)
    });
    done.await.with_context(|| fleet.logs())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_job_is_a_dead_letter_and_other_jobs_are_done() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder()
        .workers(2)
        .slots(4)
        .engine(Engine::Simulated { speed: 40.0 })
        .set("worker.simulated.poison", RUN)
        .set("worker.job_slots", 2)
        .start()
        .await?;
    let nats = Nats::connect(&NatsConfig { urls: fleet.urls(), ..NatsConfig::default() }, "test").await?;
    let poisoned = Poisoned::new(5, 20.0)?;
    let clean: Vec<(String, Pcm)> = (0..3).map(|n| (format!("good-{n}"), audio::bursts(60 + n, 40.0))).collect();
    submit(&nats, "poison", &poisoned.pcm).await?;
    for (job, pcm) in &clean {
        submit(&nats, job, pcm).await?;
    }
    for (job, pcm) in &clean {
        let ended = ended(&nats, &fleet, job).await?;
        ensure!(ended.record.state == JobState::Done, "{job}: {:?}\n{}", ended.record, fleet.logs());
        let finals = checker::finals_of(&fleet.js(), "job", job).await?;
        let texts: Vec<String> = finals.iter().map(StoredFinal::text).filter(|t| !t.is_empty()).collect();
        assert_eq!(texts.join(" "), direct::simulated_text(pcm)?, "{job}");
        assert_eq!(letters(&fleet.js(), "job", job).await?, Vec::<Value>::new(), "{job} is innocent");
    }
    let record = ended(&nats, &fleet, "poison").await?.record;
    assert_eq!((record.state, record.attempts), (JobState::Failed, 3), "{record:?}");
    assert_eq!(record.error.map(|e| e.class), Some(FailureClass::EngineCrash));
    assert_eq!(letters(&fleet.js(), "job", "poison").await?.len(), 1);
    let deaths: u64 = restarts(&fleet).await?.values().sum();
    ensure!((3..=6).contains(&deaths), "{deaths} deaths for three tries\n{}", fleet.logs());
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_device_loses_nothing_while_another_one_is_there() -> Result<()> {
    let _turn = fleet::turn().await;
    // Each of its engines dies at its first decode.
    let mut fleet = Fleet::builder()
        .workers(1)
        .slots(4)
        .engine(Engine::Simulated { speed: 40.0 })
        .set("worker.simulated.abort_at", 1)
        .start()
        .await?;
    let js = fleet.js();
    let pcm = audio::bursts(8, 14.0);
    let mut producer = Producer::named(js.clone(), "call", "s1");
    let dir = tempfile::tempdir()?;
    let settings = fleet.worker_settings().clone().with("worker.simulated.abort_at", 0);
    let help = async {
        let assigned = eventually("its worker", PATIENCE, || async {
            let events = checker::events(&js, "call").await.ok()?;
            events.iter().any(|(what, _)| what == "assigned").then_some(())
        });
        assigned.await?;
        Worker::start("able", &settings, dir.path())
    };
    let (streamed, able) = tokio::join!(producer.stream(&pcm, 100, Pace::Speed(4.0)), help);
    streamed?;
    let mut able = able?;
    producer.end().await?;
    let text = fleet.wait_end("call", PATIENCE).await.with_context(|| fleet.logs())?;
    ensure!(text == direct::simulated_text(&pcm)?, "{text}\nable: {}\n{}", able.log_tail(), fleet.logs());
    let finals = checker::finals(&js, "call").await?;
    ensure!(finals.iter().all(|f| f.json["error"].is_null()), "{}", fleet.logs());
    assert_eq!(letters(&js, "session", "call").await?, Vec::<Value>::new());
    able.check_alive()?;
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kills_the_voice_detector_is_found_and_set_aside_too() -> Result<()> {
    let _place = fleet::place().await;
    // At least so many of them are in one of its frames.
    let settings = Settings::new()
        .with("worker.simulated.poison_vad", RUN / 2)
        .with("worker.slots", 5)
        .with("worker.simulated.load_ms", 700);
    let mut alone = Alone::start(settings).await?;
    let name = alone.name().await?;
    let poisoned = Poisoned::new(4, 10.0)?;
    let beside: Vec<(String, Pcm)> = (0..4).map(|n| (format!("beside-{n}"), audio::bursts(20 + n, 10.0))).collect();
    let all = || beside.iter().map(|(session, pcm)| (session.as_str(), pcm)).chain([("poison", &poisoned.pcm)]);
    for (session, _) in all() {
        alone.take(&name, session, 1).await?;
    }
    try_join_all(all().map(|(session, pcm)| speak(alone.js.clone(), session, pcm))).await?;
    for (session, pcm) in &beside {
        assert_eq!(alone.end_text(session).await?, direct::simulated_text(pcm)?, "{session}");
        let finals = checker::finals(&alone.js, session).await?;
        ensure!(finals.iter().all(|f| f.json["error"].is_null()), "{session}\n{}", alone.worker.log_tail());
    }
    alone.end_text("poison").await?;
    let finals = checker::finals(&alone.js, "poison").await?;
    let bad: Vec<&StoredFinal> = finals.iter().filter(|f| !f.json["error"].is_null()).collect();
    ensure!(bad.len() == 1 && bad[0].json["error"]["class"] == json!("engine_crash"), "{bad:?}");
    // What comes before is as if nothing were.
    let at = finals.iter().position(|f| !f.json["error"].is_null()).context("the bad one")?;
    assert_eq!(at, poisoned.bad);
    for (stored, expected) in finals[..at].iter().zip(&poisoned.finals) {
        assert_eq!(stored.text(), direct::text(std::slice::from_ref(expected)));
    }
    assert_eq!(letters(&alone.js, "session", "poison").await?.len(), 1);
    let innocent = |b: &Heartbeat| b.engine.restarts >= 3 && b.held.iter().all(|h| !h.suspect);
    let beat = alone.beat("nobody suspected any more", innocent).await?;
    ensure!((3..=5).contains(&beat.engine.restarts), "{} deaths\n{}", beat.engine.restarts, alone.worker.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_hangs_the_engine_is_set_aside_too() -> Result<()> {
    let _place = fleet::place().await;
    let settings = Settings::new().with("worker.simulated.poison_hang", RUN).with("worker.engine_stuck_ms", 3_000);
    let mut alone = Alone::start(settings).await?;
    let name = alone.name().await?;
    let poisoned = Poisoned::new(4, 10.0)?;
    let pcm = audio::bursts(12, 10.0);
    let quiet = || SessionOptions { interim: false, ..SessionOptions::default() };
    for session in ["hangs", "beside"] {
        ensure!(alone.assign_with(&name, session, 1, quiet()).await? == ControlReply::Done);
    }
    let spoken = [("hangs", &poisoned.pcm), ("beside", &pcm)];
    try_join_all(spoken.map(|(session, pcm)| speak(alone.js.clone(), session, pcm))).await?;
    alone.beat("a stuck engine", |b| b.engine.ms_since_progress >= 1_000).await?;
    alone.beat("a suspect", |b| b.held.iter().any(|h| h.suspect && h.id == id("hangs"))).await?;
    assert_eq!(alone.end_text("beside").await?, direct::simulated_text(&pcm)?);
    alone.end_text("hangs").await?;
    poisoned.check(&checker::finals(&alone.js, "hangs").await?, FailureClass::Timeout)?;
    assert_eq!(letters(&alone.js, "session", "hangs").await?.len(), 1);
    let beat = alone.beat("nobody suspected", |b| b.held.iter().all(|h| !h.suspect)).await?;
    ensure!((3..=4).contains(&beat.engine.restarts), "{} deaths", beat.engine.restarts);
    ensure!(beat.engine.crashes <= 1, "one input is to blame, not the device: {}", beat.engine.crashes);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_worker_found_out_is_believed() -> Result<()> {
    let _place = fleet::place().await;
    let settings = Settings::new().with("worker.simulated.poison", RUN);
    let mut alone = Alone::start(settings).await?;
    let name = alone.name().await?;
    // Its first speech kills.
    let mut pcm = audio::bursts(3, 6.0);
    let start = finals_of(&pcm)?[0].segments.first().context("speech")?.start_ms as usize * 16;
    pcm.samples[start + 4_800..start + 4_800 + RUN].fill(i16::MAX);
    let given = Assignment {
        kind: Kind::Session,
        id: id("known"),
        epoch: 4,
        options: SessionOptions::default(),
        suspect: true,
        crashes: 3,
        suspect_from: Some(finals_of(&pcm)?[0].from_sample),
        model_asked: None,
        traceparent: None,
    };
    ensure!(alone.ask(&name, &ControlRequest::Assign(given)).await? == ControlReply::Done);
    alone.beat("a suspect", |b| b.held.iter().any(|h| h.suspect && h.crashes == 3)).await?;
    speak(alone.js.clone(), "known", &pcm).await?;
    alone.end_text("known").await?;
    let finals = checker::finals(&alone.js, "known").await?;
    assert_eq!(finals[0].json["error"]["class"], json!("engine_crash"), "{}", finals[0].json);
    ensure!(finals[1..].iter().all(|f| f.json["error"].is_null()));
    let beat = alone.beat("nobody suspected", |b| b.held.iter().all(|h| !h.suspect && h.crashes == 0)).await?;
    assert_eq!(beat.engine.restarts, 0, "it was not tried again");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_stands_still_while_idle_is_seen_and_replaced() -> Result<()> {
    let _place = fleet::place().await;
    let settings = Settings::new().with("worker.preload", "simulated").with("worker.engine_stuck_ms", 6_000);
    let mut alone = Alone::start(settings).await?;
    let name = alone.name().await?;
    alone.beat("an engine", |b| b.engine.state == EngineRunState::Ready).await?;
    let engine = alone.worker.engine_pid().context("an engine")?;
    signal("STOP", engine)?;
    alone.beat("no progress", |b| b.engine.ms_since_progress >= 3_000).await?;
    let refused = alone.assign(&name, "new", 1).await?;
    ensure!(matches!(&refused, ControlReply::Refused(f) if f.class == FailureClass::NoCapacity), "{refused:?}");
    let beat = alone.beat("another engine", |b| b.engine.restarts == 1).await?;
    assert_eq!(beat.engine.crashes, 1);
    let pcm = audio::bursts(13, 5.0);
    alone.take(&name, "after", 1).await?;
    speak(alone.js.clone(), "after", &pcm).await?;
    assert_eq!(alone.end_text("after").await?, direct::simulated_text(&pcm)?);
    ensure!(alone.worker.engine_pid() != Some(engine));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stood_still_itself_does_not_blame_its_engine() -> Result<()> {
    let _place = fleet::place().await;
    let settings = Settings::new().with("worker.preload", "simulated").with("worker.engine_stuck_ms", 2_000);
    let mut alone = Alone::start(settings).await?;
    alone.beat("an engine", |b| b.engine.state == EngineRunState::Ready).await?;
    let engine = alone.worker.engine_pid().context("an engine")?;
    alone.worker.stop()?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    alone.worker.cont()?;
    let seq = alone.beat("life", |b| b.engine.state == EngineRunState::Ready).await?.seq;
    alone.beat("more of it", |b| b.seq >= seq + 4).await?;
    assert_eq!(alone.worker.engine_pid(), Some(engine), "{}", alone.worker.log_tail());
    Ok(())
}

fn signal(name: &str, pid: u32) -> Result<()> {
    let status = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status()?;
    ensure!(status.success(), "kill -{name} {pid}: {status}");
    Ok(())
}
