//! A worker alone: a real process, driven by control messages as a dispatcher would send them, and none of it there.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use tempfile::TempDir;
use voxfleet_harness::{
    audio::{self, Pcm},
    checker,
    process::{Settings, Worker},
    producer::{Pace, Producer},
    server::NatsServer,
    wait::eventually,
};
use voxfleet_nats::{
    Nats, NatsConfig,
    fleet::{Heartbeats, control, heartbeats},
    publish::Publisher,
    topology::{self, TopologyConfig},
};
use voxfleet_schema::{
    audio::RawEntry,
    failure::FailureClass,
    fleet::{Assignment, ControlReply, ControlRequest, EngineRunState, Heartbeat},
    id::{Kind, StreamId, WorkerName},
    session::SessionOptions,
};

use crate::direct;

const SOON: Duration = Duration::from_secs(15);

/// A server with the topology, one worker, and its heartbeats.
pub(crate) struct Alone {
    pub(crate) worker: Worker,
    beats: Heartbeats,
    nats: Nats,
    pub(crate) js: async_nats::jetstream::Context,
    _server: NatsServer,
    _dir: TempDir,
}

pub(crate) fn id(name: &str) -> StreamId {
    StreamId::new(name).expect("id")
}

impl Alone {
    pub(crate) async fn start(settings: Settings) -> Result<Self> {
        Self::start_on(NatsServer::start().await?, settings).await
    }

    pub(crate) async fn start_on(server: NatsServer, settings: Settings) -> Result<Self> {
        let nats = Nats::connect(&NatsConfig { urls: vec![server.url()], ..NatsConfig::default() }, "test").await?;
        topology::ensure(&nats, &TopologyConfig::default()).await?;
        let beats = heartbeats(&nats).await?;
        let dir = tempfile::tempdir()?;
        let settings = Settings::new()
            .with("nats.urls", server.url())
            .with("worker.engine", "simulated")
            .with("worker.simulated.speed", 0.0)
            .with("worker.gpu", "none")
            .with("worker.cache_dir", dir.path().display())
            .and(&settings);
        let worker = Worker::start("gpu-1", &settings, dir.path())?;
        let js = server.jetstream().await?;
        Ok(Self { worker, beats, nats, js, _server: server, _dir: dir })
    }

    /// The first heartbeat from now on that fits.
    pub(crate) async fn beat(&mut self, what: &str, fits: impl Fn(&Heartbeat) -> bool) -> Result<Heartbeat> {
        let find = async {
            loop {
                let beat = self.beats.next().await?;
                if fits(&beat) {
                    return Ok::<_, anyhow::Error>(beat);
                }
            }
        };
        let found = tokio::time::timeout(SOON, find).await;
        found.with_context(|| format!("no heartbeat with {what}\n{}", self.worker.log_tail()))?
    }

    pub(crate) async fn name(&mut self) -> Result<WorkerName> {
        Ok(self.beat("a name", |_| true).await?.worker())
    }

    pub(crate) async fn ask(&self, name: &WorkerName, request: &ControlRequest) -> Result<ControlReply> {
        // Its first heartbeat may come before its control subscription.
        let ask = || async { control(&self.nats, name, request, Duration::from_secs(2)).await.ok() };
        Ok(eventually("an answer to a control request", SOON, ask).await?)
    }

    pub(crate) async fn assign(&self, name: &WorkerName, session: &str, epoch: u64) -> Result<ControlReply> {
        self.assign_with(name, session, epoch, SessionOptions::default()).await
    }

    pub(crate) async fn assign_with(
        &self,
        name: &WorkerName,
        session: &str,
        epoch: u64,
        options: SessionOptions,
    ) -> Result<ControlReply> {
        let assignment = Assignment {
            kind: Kind::Session,
            id: id(session),
            epoch,
            options,
            suspect: false,
            crashes: 0,
            suspect_from: None,
            model_asked: None,
            traceparent: None,
        };
        self.ask(name, &ControlRequest::Assign(assignment)).await
    }

    pub(crate) async fn take(&self, name: &WorkerName, session: &str, epoch: u64) -> Result<()> {
        let reply = self.assign(name, session, epoch).await?;
        ensure!(reply == ControlReply::Done, "{reply:?}\n{}", self.worker.log_tail());
        Ok(())
    }

    pub(crate) async fn release(&self, name: &WorkerName, session: &str, epoch: u64) -> Result<ControlReply> {
        self.ask(name, &ControlRequest::Release { kind: Kind::Session, id: id(session), epoch, finish_ms: 0 }).await
    }

    pub(crate) async fn end_text(&self, session: &str) -> Result<String> {
        let finals = eventually(format!("end final of {session}"), Duration::from_secs(30), || async {
            let finals = checker::finals(&self.js, session).await.ok()?;
            finals.last()?.is_end().then_some(finals)
        })
        .await
        .with_context(|| self.worker.log_tail())?;
        let texts: Vec<String> = finals.iter().map(checker::StoredFinal::text).filter(|t| !t.is_empty()).collect();
        Ok(texts.join(" "))
    }
}

fn refusal(reply: ControlReply) -> Option<FailureClass> {
    match reply {
        ControlReply::Refused(failure) => Some(failure.class),
        _ => None,
    }
}

async fn whole(js: &async_nats::jetstream::Context, session: &str, pcm: &Pcm) -> Result<()> {
    let mut producer = Producer::bare(js.clone(), session);
    producer.stream(pcm, 100, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_dispatcher_the_log_alone_gives_the_text() -> Result<()> {
    let mut alone = Alone::start(Settings::new()).await?;
    let name = alone.name().await?;
    let pcm = audio::bursts(1, 20.0);
    whole(&alone.js, "log-alone", &pcm).await?;
    alone.take(&name, "log-alone", 1).await?;
    assert_eq!(alone.end_text("log-alone").await?, direct::simulated_text(&pcm)?);
    let report = checker::check(&alone.js, "log-alone").await?.clean()?;
    assert_eq!(report.covered, pcm.samples.len() as u64);

    // It stays held, with its last final, until it is released.
    let last = report.finals.len() as u64 - 1;
    let held = alone.beat("the end final", |b| b.held.iter().any(|h| h.final_index == Some(last))).await?;
    assert_eq!((held.slots.used, held.held[0].epoch), (1, 1));
    assert_eq!(held.held[0].last_audio_seq, Some(201));
    assert_eq!(held.engine.state, EngineRunState::Ready);
    assert!(held.device.used_mb > 0 && held.device.total_mb > held.device.used_mb);
    assert_eq!(alone.release(&name, "log-alone", 1).await?, ControlReply::Done);
    alone.beat("nothing held", |b| b.held.is_empty()).await?;
    alone.worker.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hints_out_of_order_doubled_and_lost_change_nothing() -> Result<()> {
    let mut alone = Alone::start(Settings::new()).await?;
    let name = alone.name().await?;
    topology::ensure_worker(&alone.nats, &name, 0).await?;
    alone.take(&name, "hints", 1).await?;
    let pcm = audio::bursts(2, 12.0);
    let publisher = Publisher::new(&alone.nats);
    let mut producer = Producer::named(alone.js.clone(), "hints", "s1");
    let (bytes, size) = (Bytes::from(pcm.bytes()), pcm.chunk_bytes(100));
    let mut prev = None;
    let mut late = None;
    for (n, from) in (0..bytes.len()).step_by(size).enumerate() {
        let payload = bytes.slice(from..(from + size).min(bytes.len()));
        let seq = producer.send(payload.clone(), &[]).await?;
        let headers = vec![("Asr-Source".to_owned(), "s1".to_owned()), ("Asr-Seq".to_owned(), n.to_string())];
        let hint = (RawEntry { seq, headers, payload }, prev);
        let copies = match n % 7 {
            // Lost.
            2 => 0,
            // Late: goes out behind its successor.
            4 => {
                late = Some(hint.clone());
                0
            }
            // Doubled.
            5 => 2,
            _ => 1,
        };
        for _ in 0..copies {
            publisher.hint(&name, &id("hints"), &hint.0, hint.1).await;
        }
        if n % 7 == 5
            && let Some((entry, prev)) = late.take()
        {
            publisher.hint(&name, &id("hints"), &entry, prev).await;
        }
        prev = Some(seq);
    }
    producer.end().await?;
    assert_eq!(alone.end_text("hints").await?, direct::simulated_text(&pcm)?);
    checker::check(&alone.js, "hints").await?.clean()?;
    let events = checker::events(&alone.js, "hints").await?;
    assert!(events.iter().all(|(what, _)| what != "gap" && what != "duplicate"), "{events:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hints_reach_the_engine_without_the_log() -> Result<()> {
    let mut alone = Alone::start(Settings::new()).await?;
    let name = alone.name().await?;
    topology::ensure_worker(&alone.nats, &name, 0).await?;
    let publisher = Publisher::new(&alone.nats);
    let mut producer = Producer::bare(alone.js.clone(), "quick");
    let chunk = Bytes::from(audio::bursts(3, 0.2).bytes());
    let mut prev = producer.send(chunk.clone(), &[]).await?;
    alone.take(&name, "quick", 1).await?;
    alone.beat("the first chunk", |b| b.held.iter().any(|h| h.last_audio_seq == Some(prev))).await?;
    // A sequence that the log does not have: only a hint can bring it.
    for step in [1_000, 2_000] {
        let entry = RawEntry { seq: prev + step, headers: Vec::new(), payload: chunk.clone() };
        publisher.hint(&name, &id("quick"), &entry, Some(prev)).await;
        prev = entry.seq;
    }
    alone.beat("both hints", |b| b.held.iter().any(|h| h.last_audio_seq == Some(prev))).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_engine_is_started_again_and_sessions_go_on_from_their_last_final() -> Result<()> {
    let mut alone = Alone::start(Settings::new()).await?;
    let name = alone.name().await?;
    alone.take(&name, "crash", 1).await?;
    let pcm = audio::bursts(4, 24.0);
    let mut producer = Producer::bare(alone.js.clone(), "crash");
    let third = Pcm { samples: pcm.samples[..pcm.samples.len() / 3].to_vec(), ..pcm.clone() };
    let rest = Pcm { samples: pcm.samples[pcm.samples.len() / 3..].to_vec(), ..pcm.clone() };
    let fed = producer.stream(&third, 100, Pace::AsFastAsPossible).await?;
    alone.beat("the first third", |b| b.held.iter().any(|h| h.last_audio_seq == Some(fed))).await?;

    let engine = alone.worker.engine_pid().context("an engine")?;
    kill9(engine)?;
    producer.stream(&rest, 100, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    assert_eq!(alone.end_text("crash").await?, direct::simulated_text(&pcm)?);
    checker::check(&alone.js, "crash").await?.clean()?;
    let started = |b: &Heartbeat| b.engine.restarts == 1 && b.engine.state == EngineRunState::Ready;
    let beat = alone.beat("a restart", started).await?;
    assert_eq!(beat.engine.crashes, 1);
    assert_ne!(alone.worker.engine_pid(), Some(engine));
    assert_eq!(beat.worker(), name, "the worker itself lived on");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_dies_with_its_supervisor() -> Result<()> {
    let mut alone = Alone::start(Settings::new().with("worker.preload", "simulated")).await?;
    alone.beat("an engine", |b| b.engine.state == EngineRunState::Ready).await?;
    let engine = alone.worker.engine_pid().context("an engine")?;
    alone.worker.kill9()?;
    eventually("the end of the engine", SOON, || async {
        // A zombie whose new parent has not looked yet is dead too.
        let stat = std::fs::read_to_string(format!("/proc/{engine}/stat")).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    })
    .await?;
    Ok(())
}

fn kill9(pid: u32) -> Result<()> {
    let status = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status()?;
    ensure!(status.success(), "kill -9 {pid}: {status}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_has_the_last_word_on_what_it_takes() -> Result<()> {
    let mut alone = Alone::start(Settings::new().with("worker.slots", 2)).await?;
    let name = alone.name().await?;
    alone.take(&name, "a", 5).await?;
    alone.take(&name, "b", 1).await?;
    assert_eq!(refusal(alone.assign(&name, "c", 1).await?), Some(FailureClass::NoCapacity));
    alone.take(&name, "a", 5).await?;
    assert_eq!(refusal(alone.assign(&name, "a", 4).await?), Some(FailureClass::BadRequest));
    alone.take(&name, "a", 6).await?;
    let held = alone.beat("epoch 6", |b| b.held.iter().any(|h| h.epoch == 6)).await?;
    assert_eq!(held.slots.used, 2);

    // A release that was overtaken by an assignment changes nothing.
    alone.release(&name, "a", 5).await?;
    assert_eq!(refusal(alone.assign(&name, "c", 1).await?), Some(FailureClass::NoCapacity));
    alone.release(&name, "a", 6).await?;
    alone.take(&name, "c", 1).await?;
    alone.release(&name, "b", 1).await?;
    let unknown = SessionOptions { model: Some("nobody".to_owned()), ..SessionOptions::default() };
    assert_eq!(refusal(alone.assign_with(&name, "d", 1, unknown).await?), Some(FailureClass::ModelMissing));
    let job = ControlRequest::Assign(Assignment {
        kind: Kind::Job,
        id: id("j"),
        epoch: 1,
        suspect: false,
        crashes: 0,
        suspect_from: None,
        model_asked: None,
        traceparent: None,
        options: SessionOptions::default(),
    });
    assert_eq!(refusal(alone.ask(&name, &job).await?), Some(FailureClass::BadRequest));
    let cancel = ControlRequest::Cancel { kind: Kind::Job, id: id("j") };
    assert_eq!(alone.ask(&name, &cancel).await?, ControlReply::Done, "who does not hold it has nothing to let go of");
    let prewarm = |model: &str| ControlRequest::Prewarm { model: model.to_owned() };
    assert_eq!(alone.ask(&name, &prewarm("simulated")).await?, ControlReply::Done);
    assert_eq!(refusal(alone.ask(&name, &prewarm("nobody")).await?), Some(FailureClass::ModelMissing));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn after_its_end_a_session_goes_on_at_a_higher_epoch_only() -> Result<()> {
    let mut alone = Alone::start(Settings::new()).await?;
    let name = alone.name().await?;
    let (first, second) = (audio::bursts(5, 6.0), audio::bursts(6, 6.0));
    whole(&alone.js, "again", &first).await?;
    alone.take(&name, "again", 1).await?;
    alone.end_text("again").await?;
    let ended = checker::finals(&alone.js, "again").await?.len();
    whole(&alone.js, "again", &second).await?;
    // The end final was at epoch 1: nothing more is fed at that epoch, whatever the log holds.
    let end_seq = alone.beat("the end", |b| b.held.iter().any(|h| h.final_index == Some(ended as u64 - 1))).await?;
    assert!(end_seq.held[0].last_audio_seq.is_some());
    alone.take(&name, "again", 2).await?;
    let done = eventually("a second end final", SOON, || async {
        let finals = checker::finals(&alone.js, "again").await.ok()?;
        (finals.iter().filter(|f| f.is_end()).count() == 2).then_some(finals)
    })
    .await
    .with_context(|| alone.worker.log_tail())?;
    let epochs: Vec<u64> = done.iter().filter_map(|f| f.json["epoch"].as_u64()).collect();
    assert!(epochs[..ended].iter().all(|e| *e == 1) && epochs[ended..].iter().all(|e| *e == 2), "{epochs:?}");
    let to = done.last().and_then(|f| f.json["to_sample"].as_u64());
    assert_eq!(to, Some((first.samples.len() + second.samples.len()) as u64));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_cannot_start_is_failed_and_refuses() -> Result<()> {
    let mut alone = Alone::start(Settings::new().with("worker.engine_exe", "/bin/false")).await?;
    let name = alone.name().await?;
    alone.take(&name, "hopeless", 1).await?;
    alone.beat("a failed engine", |b| b.engine.state == EngineRunState::Failed && b.held.is_empty()).await?;
    assert_eq!(refusal(alone.assign(&name, "another", 1).await?), Some(FailureClass::EngineCrash));
    eventually("the event", SOON, || async {
        let events = checker::events(&alone.js, "hopeless").await.ok()?;
        events.iter().any(|(what, _)| what == "failed").then_some(())
    })
    .await?;
    alone.worker.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_stores_what_was_begun_and_leaves_no_child() -> Result<()> {
    let mut alone = Alone::start(Settings::new().with("worker.simulated.speed", 20.0)).await?;
    let name = alone.name().await?;
    let pcm = audio::bursts(7, 20.0);
    let fed = Producer::bare(alone.js.clone(), "stopped").stream(&pcm, 100, Pace::AsFastAsPossible).await?;
    alone.take(&name, "stopped", 1).await?;
    alone.beat("all of it", |b| b.held.iter().any(|h| h.last_audio_seq == Some(fed))).await?;
    let engine = alone.worker.engine_pid().context("an engine")?;
    let status = alone.worker.terminate(Duration::from_secs(10)).await?;
    assert!(status.success(), "{status}\n{}", alone.worker.log_tail());
    assert!(!std::path::Path::new(&format!("/proc/{engine}")).exists(), "the engine was reaped");
    alone.beat("the last word", |b| b.draining && b.held.is_empty()).await?;
    let finals = checker::finals(&alone.js, "stopped").await?;
    assert!(!finals.is_empty());
    let expected = direct::simulated_text(&pcm)?;
    let stored: Vec<String> = finals.iter().map(checker::StoredFinal::text).filter(|t| !t.is_empty()).collect();
    assert!(expected.starts_with(&stored.join(" ")), "{stored:?} in {expected}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_takes_nothing_and_ends_when_it_is_empty() -> Result<()> {
    let mut alone = Alone::start(Settings::new()).await?;
    let name = alone.name().await?;
    alone.take(&name, "last", 1).await?;
    let drain = ControlRequest::Drain { deadline_ms: 60_000 };
    assert_eq!(alone.ask(&name, &drain).await?, ControlReply::Done);
    assert_eq!(refusal(alone.assign(&name, "late", 1).await?), Some(FailureClass::NoCapacity));
    let beat = alone.beat("draining", |b| b.draining).await?;
    assert_eq!(beat.held.len(), 1, "what it holds goes on");
    alone.release(&name, "last", 1).await?;
    let status = alone.worker.wait(SOON).await?;
    assert!(status.success(), "{status}\n{}", alone.worker.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn renewed_it_has_a_new_name_and_holds_nothing() -> Result<()> {
    let mut alone = Alone::start(Settings::new()).await?;
    let name = alone.name().await?;
    alone.take(&name, "moved", 1).await?;
    assert_eq!(alone.ask(&name, &ControlRequest::Renew).await?, ControlReply::Done);
    let renewed = alone.beat("a new name", |b| b.worker() != name && b.held.is_empty()).await?.worker();
    assert_eq!(renewed.gpu_id, name.gpu_id);
    let old = control(&alone.nats, &name, &ControlRequest::Renew, Duration::from_secs(2)).await;
    assert!(old.is_err(), "nobody answers to the old name");
    let pcm = audio::bursts(8, 5.0);
    whole(&alone.js, "moved", &pcm).await?;
    alone.take(&renewed, "moved", 2).await?;
    assert_eq!(alone.end_text("moved").await?, direct::simulated_text(&pcm)?);
    Ok(())
}
