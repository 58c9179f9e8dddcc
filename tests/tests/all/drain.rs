//! Leaving in good order: nothing is cut short, what is left is handed over, and one budget holds for all of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures_util::future::try_join_all;
use voxfleet_harness::{
    audio, checker,
    child::Child,
    fleet::{self, Engine, Fleet},
    process::{self, Settings},
    producer::{Pace, Producer},
    relay::Relay,
    server::NatsServer,
    wait::eventually,
    wire::{Fate, Publish},
};
use voxfleet_schema::{
    fleet::{ControlReply, ControlRequest},
    id::{Kind, WorkerName},
    session::SessionOptions,
};

use crate::{
    direct,
    worker_supervisor::{Alone, id},
};

/// What a process may take beyond its budget: the test's own looks, and a busy machine.
const SLACK: Duration = Duration::from_secs(3);
const SOON: Duration = Duration::from_secs(30);

/// A worker whose decode of one final's window is under way and takes about `decode_s`.
struct Deciding {
    alone: Alone,
    name: WorkerName,
    text: String,
}

const SESSION: &str = "begun";

impl Deciding {
    async fn start(settings: Settings, decode_s: f64) -> Result<Self> {
        let pcm = audio::Pcm::mono_16k(audio::bursts(9, 30.0).samples[..16_000 * 2].to_vec());
        let settings = Settings::new().with("worker.simulated.speed", pcm.seconds() / decode_s).and(&settings);
        let mut alone = Alone::start(settings).await?;
        let name = alone.name().await?;
        let mut producer = Producer::bare(alone.js.clone(), SESSION);
        producer.stream(&pcm, 100, Pace::AsFastAsPossible).await?;
        let flush = producer.flush().await?;
        let quiet = SessionOptions { interim: false, ..SessionOptions::default() };
        let reply = alone.assign_with(&name, SESSION, 1, quiet).await?;
        ensure!(reply == ControlReply::Done, "{reply:?}");
        // From then on the engine has everything, and the decode begins with the flush.
        alone.beat("the flush", |b| b.held.iter().any(|h| h.last_audio_seq == Some(flush))).await?;
        Ok(Self { alone, name, text: direct::simulated_text(&pcm)? })
    }

    async fn finals(&self) -> Result<Vec<String>> {
        let finals = checker::finals(&self.alone.js, SESSION).await?;
        Ok(finals.iter().map(checker::StoredFinal::text).collect())
    }

    async fn release(&self, finish_ms: u32) -> Result<()> {
        let release = ControlRequest::Release { kind: Kind::Session, id: id(SESSION), epoch: 1, finish_ms };
        ensure!(self.alone.ask(&self.name, &release).await? == ControlReply::Done);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_released_session_may_store_the_final_it_has_begun() -> Result<()> {
    let mut begun = Deciding::start(Settings::new(), 3.0).await?;
    begun.release(8_000).await?;
    let beat = begun.alone.beat("a free slot", |b| b.held.is_empty()).await?;
    assert_eq!(beat.slots.used, 0, "nobody waits for its slot");
    let drain = ControlRequest::Drain { deadline_ms: 20_000 };
    assert_eq!(begun.alone.ask(&begun.name, &drain).await?, ControlReply::Done);
    let status = begun.alone.worker.wait(Duration::from_secs(15)).await?;
    assert!(status.success(), "{status}\n{}", begun.alone.worker.log_tail());
    assert_eq!(begun.finals().await?, [begun.text.clone()], "the drain waited for it");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_without_time_gives_up_what_has_begun() -> Result<()> {
    // Surely under way still when it is released; nobody waits for its end.
    let mut begun = Deciding::start(Settings::new(), 20.0).await?;
    begun.release(0).await?;
    let drain = ControlRequest::Drain { deadline_ms: 20_000 };
    assert_eq!(begun.alone.ask(&begun.name, &drain).await?, ControlReply::Done);
    let status = begun.alone.worker.wait(Duration::from_secs(15)).await?;
    assert!(status.success(), "{status}");
    assert_eq!(begun.finals().await?, Vec::<String>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_waits_for_a_final_within_its_budget_and_for_none_beyond_it() -> Result<()> {
    let _turn = fleet::turn().await;
    for (shutdown_ms, decode_s, stored) in [(6_000, 2.0, true), (2_000, 60.0, false)] {
        let mut begun = Deciding::start(Settings::new().with("worker.shutdown_ms", shutdown_ms), decode_s).await?;
        let engine = begun.alone.worker.engine_pid().context("an engine")?;
        let asked = Instant::now();
        let budget = Duration::from_millis(shutdown_ms) + SLACK;
        let status = begun.alone.worker.terminate(budget).await?;
        assert!(status.success(), "{status}\n{}", begun.alone.worker.log_tail());
        ensure!(asked.elapsed() <= budget, "{:?} of {budget:?}", asked.elapsed());
        assert_eq!(begun.finals().await?.len(), usize::from(stored), "budget {shutdown_ms} ms");
        // Where the budget was too short to reap it, it has died with its supervisor.
        eventually("the end of the engine", Duration::from_secs(5), || async {
            let stat = std::fs::read_to_string(format!("/proc/{engine}/stat")).unwrap_or_default();
            (stat.is_empty() || stat.contains(") Z ")).then_some(())
        })
        .await?;
        let told = begun.alone.beat("why", |b| b.draining).await?;
        assert_eq!(told.drain.map(|drain| drain.why).as_deref(), Some("sigterm"));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_at_its_deadline_whoever_is_left() -> Result<()> {
    // A beat of its own says so, before anything is let go: the last beat of all would say it too.
    let mut alone = Alone::start(Settings::new().with("worker.heartbeat_ms", 5_000)).await?;
    let name = alone.name().await?;
    alone.take(&name, "left", 1).await?;
    let asked = Instant::now();
    assert_eq!(alone.ask(&name, &ControlRequest::Drain { deadline_ms: 2_500 }).await?, ControlReply::Done);
    let beat = alone.beat("draining", |b| b.draining).await?;
    ensure!(asked.elapsed() < Duration::from_secs(2), "said after {:?}", asked.elapsed());
    ensure!(beat.held.len() == 1, "said when nothing was held any more: {beat:?}");
    let drain = beat.drain.context("a notice")?;
    assert_eq!(drain.why, "asked");
    let in_ms = drain.until_ms.context("until when")?.saturating_sub(beat.sent_ms);
    ensure!((1_500..=2_500).contains(&in_ms), "gone in {in_ms} ms");
    let status = alone.worker.wait(Duration::from_millis(2_500) + SLACK).await?;
    assert!(status.success(), "{status}\n{}", alone.worker.log_tail());
    Ok(())
}

/// A terminal that closes is no crash; under `nohup` it is nothing at all. This test's own session may ignore hangups, and its
/// children with it: `env` takes that back.
#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_is_a_stop_unless_it_is_ignored() -> Result<()> {
    let server = NatsServer::start().await?;
    for (through, stays) in [(&["env", "--default-signal=HUP"][..], false), (&["nohup"][..], true)] {
        let dir = tempfile::tempdir()?;
        let plain = process::voxfleet(&Settings::new().with("nats.urls", server.url()), dir.path())?;
        let mut command = std::process::Command::new(through[0]);
        command.args(&through[1..]).arg(plain.get_program()).arg("dispatcher").current_dir(dir.path());
        command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut child = Child::start(through[0], command, &dir.path().join("log"))?;
        let active = || std::future::ready(child.log().contains("active").then_some(()));
        eventually("the dispatcher is active", SOON, active).await.with_context(|| child.log())?;
        child.hang_up()?;
        if stays {
            let ended = tokio::time::timeout(SLACK, child.wait(SOON)).await;
            ensure!(ended.is_err() && !child.log().contains("SIGHUP"), "it ended: {}", child.log());
        } else {
            let status = child.wait(SOON).await?;
            ensure!(status.success() && child.log().contains("SIGHUP"), "{status}\n{}", child.log());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preemption_is_a_drain_by_file_and_by_hook() -> Result<()> {
    // What is held is handed over within 40 % of it, and must still be there to be released.
    const NOTICE: Duration = Duration::from_secs(10);
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("preempted");
    let port = voxfleet_harness::ports::free_port()?;
    let settings = Settings::new()
        .with("worker.preemption.file", file.display())
        .with("worker.preemption.http_listen", format!("127.0.0.1:{port}"))
        .with("worker.preemption.notice_ms", NOTICE.as_millis());
    for how in ["file", "http"] {
        let mut alone = Alone::start(settings.clone()).await?;
        let name = alone.name().await?;
        alone.take(&name, "preempted", 1).await?;
        let noticed = Instant::now();
        if how == "file" {
            std::fs::write(&file, "")?;
        } else {
            hook(port).await?;
        }
        let beat = alone.beat("a notice", |b| b.draining).await?;
        assert_eq!(beat.drain.map(|drain| drain.why), Some(format!("preemption: {how}")));
        ensure!(noticed.elapsed() < Duration::from_millis(500) + SLACK, "heard after {:?}", noticed.elapsed());
        // What it holds goes on until somebody else has it; then it waits no longer.
        alone.release(&name, "preempted", 1).await?;
        let status = alone.worker.wait(NOTICE + SLACK).await?;
        assert!(status.success(), "{status}\n{}", alone.worker.log_tail());
    }
    Ok(())
}

async fn hook(port: u16) -> Result<()> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"POST /preempt HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    ensure!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn renewed_while_it_drains_a_worker_still_ends() -> Result<()> {
    let mut alone = Alone::start(Settings::new()).await?;
    let name = alone.name().await?;
    alone.take(&name, "held", 1).await?;
    assert_eq!(alone.ask(&name, &ControlRequest::Drain { deadline_ms: 60_000 }).await?, ControlReply::Done);
    assert_eq!(alone.ask(&name, &ControlRequest::Renew).await?, ControlReply::Done);
    let status = alone.worker.wait(Duration::from_secs(8)).await?;
    assert!(status.success(), "{status}\n{}", alone.worker.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_told_with_its_age_and_changes_are_told_at_once() -> Result<()> {
    // So seldom that a change which is not news is told seconds later. All times are of the worker's clock: how fast this test
    // asks is another question.
    const BEAT_MS: u64 = 5_000;
    const AT_ONCE_MS: u64 = BEAT_MS / 2;
    /// By which a beat may come before its time.
    const SLIPS_MS: u64 = 100;
    let mut alone = Alone::start(Settings::new().with("worker.heartbeat_ms", BEAT_MS)).await?;
    let first = alone.beat("a name", |_| true).await?;
    assert_eq!(u64::from(first.beat_ms), BEAT_MS);
    ensure!(first.started_ms > 0 && first.started_ms <= first.sent_ms);
    let name = first.worker();
    Producer::bare(alone.js.clone(), "brief").send(Bytes::from_static(&[0; 640]), &[]).await?;
    alone.take(&name, "brief", 1).await?;
    alone.release(&name, "brief", 1).await?;
    // More beats than were due: one of them is news.
    alone
        .beat("nothing held and news of it", |b| {
            let due = (b.sent_ms + SLIPS_MS).saturating_sub(first.sent_ms) / BEAT_MS;
            b.held.is_empty() && b.seq > first.seq + due
        })
        .await?;
    assert_eq!(alone.ask(&name, &ControlRequest::Renew).await?, ControlReply::Done);
    let renewed = alone.beat("another name", |b| b.worker() != name).await?;
    ensure!(renewed.started_ms > first.started_ms);
    let ms = renewed.sent_ms.saturating_sub(renewed.started_ms);
    ensure!(ms < AT_ONCE_MS, "its name was told after {ms} ms");
    let news = ControlRequest::Drain { deadline_ms: 60_000 };
    assert_eq!(alone.ask(&renewed.worker(), &news).await?, ControlReply::Done);
    let told = alone.beat("draining", |b| b.draining).await?;
    let until_ms = told.drain.and_then(|drain| drain.until_ms).context("until when")?;
    let ms = (told.sent_ms + 60_000).saturating_sub(until_ms);
    ensure!(ms < AT_ONCE_MS, "its drain was told after {ms} ms");
    Ok(())
}

/// Sessions handed over in one go, at most.
fn most_at_once(moves: &[(u64, u64)]) -> usize {
    let at = |t: u64| moves.iter().filter(|(from, to)| *from <= t && t < *to).count();
    moves.iter().map(|(from, _)| at(*from)).max().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_of_one_of_two_workers_under_live_sessions_changes_no_word() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(8).engine(Engine::Simulated { speed: 20.0 }).start().await?;
    let js = fleet.js();
    let sessions: Vec<(String, audio::Pcm)> =
        (0..8).map(|n| (format!("live-{n}"), audio::bursts(80 + n, 14.0))).collect();
    let speaking = sessions.iter().map(|(session, pcm)| {
        let mut producer = Producer::named(js.clone(), session, "s1");
        async move {
            producer.stream(pcm, 100, Pace::Speed(1.0)).await?;
            producer.end().await?;
            Ok::<_, anyhow::Error>(())
        }
    });
    let worker = &mut fleet.workers[0];
    let leaving = async {
        // In the middle of it all.
        eventually("finals", Duration::from_secs(30), || async {
            (checker::finals(&js, "live-0").await.ok()?.len() >= 2).then_some(())
        })
        .await?;
        let asked = Instant::now();
        let status = worker.terminate(Duration::from_millis(9_500) + SLACK).await?;
        ensure!(status.success(), "{status}\n{}", worker.log_tail());
        Ok::<_, anyhow::Error>(asked.elapsed())
    };
    let (spoken, took) = tokio::join!(try_join_all(speaking), leaving);
    spoken?;
    let took = took.with_context(|| fleet.dispatchers[0].log_tail())?;
    let mut moved = Vec::new();
    for (session, pcm) in &sessions {
        let text = fleet.wait_end(session, Duration::from_secs(30)).await.with_context(|| fleet.logs())?;
        assert_eq!(text, direct::simulated_text(pcm)?, "{session}");
        checker::check(&js, session).await?.clean()?;
        let events = checker::events(&js, session).await?;
        let at = |what: &str| {
            events.iter().filter(|(w, _)| w == what).filter_map(|(_, event)| event["at_ms"].as_u64()).max()
        };
        if let (Some(from), Some(to)) = (at("moved"), at("assigned")) {
            moved.push((from.min(to), from.max(to) + 1));
        }
    }
    ensure!(!moved.is_empty(), "nothing was moved\n{}", fleet.logs());
    ensure!(most_at_once(&moved) <= 2, "more than a quarter of the slots at once: {moved:?}");
    ensure!(took < Duration::from_millis(9_500) + SLACK, "{took:?}");
    Ok(())
}

/// Holds up everything that the worker sends about transcripts, and what is behind it on that connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn heartbeats_and_answers_go_on_while_the_main_connection_stands_still() -> Result<()> {
    let stalled = Arc::new(AtomicBool::new(false));
    let server = NatsServer::start().await?;
    let hold = Arc::clone(&stalled);
    let tamper = move |publish: &mut Publish| {
        let held = |since: Instant| hold.load(Ordering::Relaxed) && since.elapsed() < Duration::from_secs(30);
        if held(Instant::now()) && publish.subject.starts_with("asr.v1.transcript.") {
            let since = Instant::now();
            // This thread's other tasks go on elsewhere meanwhile.
            tokio::task::block_in_place(|| {
                while held(since) {
                    std::thread::park_timeout(Duration::from_millis(20));
                }
            });
        }
        Fate::Pass
    };
    let relay = Relay::start_with(&[server.url()], Some(Arc::new(tamper))).await?;
    let mut alone = Alone::start_on(server, Settings::new().with("nats.urls", relay.url())).await?;
    let name = alone.name().await?;
    let js = alone.js.clone();
    alone.take(&name, "stalled", 1).await?;
    stalled.store(true, Ordering::Relaxed);
    let mut producer = Producer::bare(js.clone(), "stalled");
    producer.stream(&audio::bursts(2, 10.0), 100, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    let begun = Instant::now();
    let mut last = Instant::now();
    while begun.elapsed() < Duration::from_secs(6) {
        alone.beat("anything", |_| true).await?;
        ensure!(last.elapsed() < Duration::from_secs(1) + SLACK, "silent for {:?}", last.elapsed());
        last = Instant::now();
    }
    let asked = Instant::now();
    let prewarm = ControlRequest::Prewarm { model: "simulated".to_owned() };
    assert_eq!(alone.ask(&name, &prewarm).await?, ControlReply::Done);
    ensure!(asked.elapsed() < SLACK, "answered after {:?}", asked.elapsed());
    assert_eq!(checker::finals(&js, "stalled").await?.len(), 0, "the main connection did stand still");
    stalled.store(false, Ordering::Relaxed);
    alone.end_text("stalled").await?;
    Ok(())
}
