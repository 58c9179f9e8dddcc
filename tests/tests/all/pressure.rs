//! More than there is room for, and less answer than there should be: engines that are slow or stand still, workers that fall
//! silent together, and a producer that speaks faster than the log takes it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures_util::future::try_join_all;
use serde_json::Value;
use tokio::{sync::Semaphore, task::JoinSet, time::Instant};
use voxfleet_harness::{
    audio::{self, Pcm},
    chaos::talk::{self, POISON_RUN, Said, Talk},
    checker,
    fleet::{self, Engine, Fleet},
    probe_api,
    process::Worker,
    producer::{Pace, Producer},
    verdict::{self, Verdict},
    wait::eventually,
};

use crate::direct;

/// A verdict, a move, and what is left to decode after it.
const SOON: Duration = Duration::from_secs(30);

/// All that the fleet was told of one GPU, or of `*`: which, what, and the event.
async fn told(fleet: &Fleet, gpu: &str) -> Result<Vec<(String, String, Value)>> {
    let mut found = Vec::new();
    for message in checker::read(&fleet.js(), "ASR_EVENT", &format!("asr.v1.event.fleet.{gpu}.*")).await? {
        let mut words = message.subject.rsplit('.').map(str::to_owned);
        let (what, gpu) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        found.push((gpu, what, serde_json::from_slice(&message.payload)?));
    }
    Ok(found)
}

async fn was_told(fleet: &Fleet, gpu: &str, what: &str) -> Result<Value> {
    let event = eventually(format!("{gpu} being {what}"), SOON, || async {
        told(fleet, gpu).await.ok()?.into_iter().find(|(_, w, _)| w == what).map(|(_, _, event)| event)
    });
    event.await.with_context(|| fleet.logs())
}

/// The worker that the record of this session names.
async fn owner(fleet: &Fleet, session: &str) -> Option<String> {
    let record = voxfleet_harness::chaos::load::record(&fleet.js(), "session", session).await?;
    record["worker"]["gpu_id"].as_str().map(str::to_owned)
}

/// Waits for the session's end; what became of it.
async fn judged(fleet: &Fleet, said: &Said) -> Result<Verdict> {
    ensure!(said.gave_up.is_none(), "{}: {:?}", said.id, said.gave_up);
    fleet.wait_end(&said.id, SOON).await.with_context(|| fleet.logs())?;
    let verdict = verdict::session(&fleet.js(), &said.id, &said.samples).await?.clean(&said.id);
    verdict.with_context(|| fleet.logs())
}

/// Somebody talks without a pause four times as fast as speech, the engine decodes three times as fast: it falls behind, says
/// so, and says when it has caught up; nothing is missing from the text.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_engine_says_that_it_lags_and_drops_nothing() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder().workers(1).slots(4).engine(Engine::Simulated { speed: 3.0 }).start().await?;
    let js = fleet.js();
    let speakers = (0..2u64).map(|n| {
        let js = js.clone();
        async move {
            let session = format!("slow-{n}");
            let mut samples = audio::silence(0.5).samples;
            samples.extend(without_a_pause(n, 16.0));
            let pressing = samples.len();
            samples.extend(audio::blasts(30 + n, 7.0).samples);
            let pcm = Pcm::mono_16k(samples);
            let mut producer = Producer::named(js, &session, "s1");
            producer.stream(&Pcm::mono_16k(pcm.samples[..pressing].to_vec()), 100, Pace::Speed(4.0)).await?;
            producer.stream(&Pcm::mono_16k(pcm.samples[pressing..].to_vec()), 100, Pace::Speed(1.0)).await?;
            producer.end().await?;
            Ok::<_, anyhow::Error>((session, pcm))
        }
    });
    for (session, pcm) in try_join_all(speakers).await? {
        let text = fleet.wait_end(&session, SOON).await.with_context(|| fleet.logs())?;
        ensure!(text == direct::simulated_text(&pcm)?, "{session}: {text}\n{}", fleet.logs());
        let verdict = verdict::session(&js, &session, &pcm.samples).await?.clean(&session)?;
        ensure!(verdict.epoch == 1, "{verdict:?}");
        let events = eventually(format!("{session} being restored"), SOON, || async {
            checker::events(&js, &session).await.ok().filter(|all| all.iter().any(|(what, _)| what == "restored"))
        });
        let events = events.await.with_context(|| fleet.logs())?;
        let at = |what: &str| events.iter().position(|(w, _)| w == what);
        let lagging = at("lagging").with_context(|| format!("{session} did not say that it lags: {events:#?}"))?;
        let lag_ms = events[lagging].1["detail"]["lag_ms"].as_u64().context("lag_ms")?;
        ensure!((5_001..=16_500).contains(&lag_ms), "{lag_ms} ms of what was spoken in four seconds");
        ensure!(at("restored").is_some_and(|restored| restored > lagging), "{session}: {events:#?}");
    }
    fleet.check_alive()?;
    Ok(())
}

/// An engine that is behind has no time for partials: each of its finals tells how far, long before it holds a window too much.
#[tokio::test(flavor = "multi_thread")]
async fn who_pauses_is_heard_to_lag_as_well() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder().workers(1).slots(4).engine(Engine::Simulated { speed: 2.0 }).start().await?;
    let (js, pcm) = (fleet.js(), audio::bursts(40, 24.0));
    let mut producer = Producer::named(js.clone(), "pauses", "s1");
    producer.stream(&pcm, 100, Pace::Speed(8.0)).await?;
    producer.end().await?;
    let text = fleet.wait_end("pauses", SOON).await.with_context(|| fleet.logs())?;
    ensure!(text == direct::simulated_text(&pcm)?, "{text}\n{}", fleet.logs());
    let events = eventually("its events", SOON, || async {
        checker::events(&js, "pauses").await.ok().filter(|all| all.iter().any(|(what, _)| what == "ended"))
    });
    let events = events.await?;
    let lags = |(what, event): &(String, Value)| (what == "lagging").then(|| event["detail"]["lag_ms"].as_u64());
    let lag_ms = events.iter().find_map(lags).with_context(|| format!("{events:#?}"))?;
    ensure!(lag_ms.is_some_and(|ms| (5_001..=24_000).contains(&ms)), "{lag_ms:?}");
    let said = events.iter().filter(|(what, _)| what == "lagging" || what == "restored").count();
    ensure!(said <= 2, "once behind and once no longer: {events:#?}");
    fleet.check_alive()?;
    Ok(())
}

/// Even noise in which no detector finds an endpoint.
fn without_a_pause(seed: u64, seconds: f64) -> Vec<i16> {
    let mut loud = audio::blasts(seed, 4.0 * seconds).samples;
    loud.retain(|s| s.unsigned_abs() > 4);
    loud.truncate((seconds * 16_000.0) as usize);
    loud
}

/// An engine that hangs in a decode while its supervisor beats on: the worker is unhealthy long before its supervisor gives
/// the engine up, and a worker that does not hang there takes over.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_progress_makes_its_worker_unhealthy_and_its_work_moves() -> Result<()> {
    const STUCK_MS: u64 = 2_000;
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder()
        .workers(1)
        .slots(4)
        .engine(Engine::Simulated { speed: 30.0 })
        .set("worker.simulated.poison_hang", POISON_RUN)
        .set("worker.engine_stuck_ms", 60_000)
        .set("dispatcher.stuck_after_ms", STUCK_MS)
        .start()
        .await?;
    let pcm = audio::blasts(81, 16.0);
    let poison = talk::place_for_poison(&pcm, 4 * 16_000).context("a place for it")?;
    let talk =
        Talk { id: "hangs".to_owned(), poison: Some(poison), seed: 81, seconds: 16.0, speed: 2.0, chunk_ms: 100 };
    let mut talks = JoinSet::new();
    talks.spawn(talk::talk(talk::impatient(fleet.client()), talk));
    eventually("its worker", SOON, || async { owner(&fleet, "hangs").await.filter(|gpu| gpu == "gpu-1") }).await?;
    // It never hears so many at the top.
    let settings = fleet.worker_settings().clone().with("worker.simulated.poison_hang", 1_000_000);
    let mut able = Worker::start("able", &settings, fleet.dir())?;

    let seen = eventually("an unhealthy worker", SOON, || async {
        let status = probe_api::fleet_status(&fleet.client()).await?;
        let workers = status["workers"].as_array()?;
        let sick = workers.iter().find(|w| w["heartbeat"]["gpu_id"] == "gpu-1" && w["health"] == "unhealthy")?;
        Some(sick.clone())
    });
    let seen = seen.await.with_context(|| fleet.logs())?;
    ensure!(seen["ms_since_heartbeat"].as_u64().is_some_and(|ms| ms < 1_500), "it beats: {seen}");
    let engine = &seen["heartbeat"]["engine"];
    ensure!(engine["ms_since_progress"].as_u64().is_some_and(|ms| ms >= STUCK_MS), "{seen}");
    let event = was_told(&fleet, "gpu-1", "unhealthy").await?;
    ensure!(event.to_string().contains("stood still"), "{event}");

    eventually("its session elsewhere", SOON, || async { owner(&fleet, "hangs").await.filter(|gpu| gpu == "able") })
        .await
        .with_context(|| fleet.logs())?;
    let opened = probe_api::open(&fleet.client(), "after", 60).await?;
    ensure!(opened["worker"]["gpu_id"] == "able", "{opened}");
    let said = talks.join_next().await.context("the call")??;
    let verdict = judged(&fleet, &said).await?;
    ensure!(verdict.epoch == 2, "{verdict:?}");

    // Neither was it dead, nor was the engine given up.
    let events = told(&fleet, "gpu-1").await?;
    ensure!(!events.iter().any(|(_, what, _)| what == "dead"), "{events:#?}");
    let later = eventually("a later beat of gpu-1", SOON, || async {
        let status = probe_api::fleet_status(&fleet.client()).await?;
        let mut beats = status["workers"].as_array()?.iter().map(|w| &w["heartbeat"]);
        let later = |b: &&Value| b["gpu_id"] == "gpu-1" && b["seq"].as_u64() > seen["heartbeat"]["seq"].as_u64();
        beats.find(later).cloned()
    });
    let later = later.await.with_context(|| fleet.logs())?;
    ensure!(later["engine"]["restarts"] == 0, "{later}");
    able.check_alive()?;
    fleet.check_alive()?;
    Ok(())
}

/// Four workers with a session each, all of them speaking.
struct Four {
    fleet: Fleet,
    talks: JoinSet<Said>,
    /// Where each session is at first.
    at: Vec<(String, String)>,
}

impl Four {
    async fn start(name: &str, seed: u64, seconds: f64) -> Result<Self> {
        let builder = Fleet::builder().workers(4).slots(2).engine(Engine::Simulated { speed: 30.0 });
        let fleet = builder.start().await?;
        let mut four = Self { fleet, talks: JoinSet::new(), at: Vec::new() };
        for n in 0..4 {
            let id = format!("{name}-{n}");
            let opened = probe_api::open(&four.fleet.client(), &id, 60).await?;
            let gpu = opened["worker"]["gpu_id"].as_str().with_context(|| format!("{opened}"))?;
            four.at.push((id.clone(), gpu.to_owned()));
            let talk = Talk { id, poison: None, seed: seed + n, seconds, speed: 1.0, chunk_ms: 100 };
            four.talks.spawn(talk::talk(talk::impatient(four.fleet.client()), talk));
        }
        let mut gpus: Vec<&String> = four.at.iter().map(|(_, gpu)| gpu).collect();
        gpus.sort_unstable();
        gpus.dedup();
        ensure!(gpus.len() == 4, "one session each: {:?}", four.at);
        // All of them are at work.
        for (id, _) in &four.at {
            eventually(format!("a final of {id}"), SOON, || async {
                checker::finals(&four.fleet.js(), id).await.ok().filter(|finals| !finals.is_empty())
            })
            .await
            .with_context(|| four.fleet.logs())?;
        }
        Ok(four)
    }

    /// Stops these workers with their engines, and lets them go on.
    async fn stand_still(&mut self, which: &[usize], time: Duration) -> Result<()> {
        let engines: Vec<u32> = which.iter().filter_map(|i| self.fleet.workers[*i].engine_pid()).collect();
        ensure!(engines.len() == which.len(), "an engine each: {engines:?}");
        for i in which {
            self.fleet.workers[*i].stop()?;
        }
        signal("STOP", &engines)?;
        ensure!(!self.talks.is_empty(), "nobody speaks");
        tokio::time::sleep(time).await;
        ensure!(self.talks.try_join_next().is_none(), "somebody has ended meanwhile");
        signal("CONT", &engines)?;
        for i in which {
            self.fleet.workers[*i].cont()?;
        }
        Ok(())
    }

    /// What became of each session, by where it was at first.
    async fn judged(&mut self) -> Result<Vec<(String, Verdict)>> {
        let mut verdicts = Vec::new();
        while let Some(said) = self.talks.join_next().await {
            let said = said?;
            let gpu = self.at.iter().find(|(id, _)| *id == said.id).map(|(_, gpu)| gpu.clone());
            verdicts.push((gpu.context("one of the four")?, judged(&self.fleet, &said).await?));
        }
        Ok(verdicts)
    }
}

fn signal(name: &str, pids: &[u32]) -> Result<()> {
    let status = std::process::Command::new("kill")
        .arg(format!("-{name}"))
        .args(pids.iter().map(u32::to_string))
        .status()
        .with_context(|| format!("kill -{name}"))?;
    ensure!(status.success(), "kill -{name} {pids:?}: {status}");
    Ok(())
}

/// GPUs this was told of, each once.
fn whom(events: &[(String, String, Value)], what: &str) -> Vec<String> {
    let mut gpus: Vec<String> = events.iter().filter(|(_, w, _)| w == what).map(|(gpu, ..)| gpu.clone()).collect();
    gpus.sort_unstable();
    gpus.dedup();
    gpus
}

/// When all fall silent at once it is not they who are dead.
#[tokio::test(flavor = "multi_thread")]
async fn four_workers_silent_at_once_are_not_condemned_and_keep_their_sessions() -> Result<()> {
    let _place = fleet::place().await;
    let mut four = Four::start("mass", 100, 25.0).await?;
    four.stand_still(&[0, 1, 2, 3], Duration::from_secs(5)).await?;
    for (gpu, verdict) in four.judged().await? {
        ensure!(verdict.epoch == 1, "{gpu}: {verdict:?}\n{}", four.fleet.logs());
    }
    let events = told(&four.fleet, "*").await?;
    ensure!(whom(&events, "suspect").len() == 4, "all four were silent: {events:#?}");
    ensure!(whom(&events, "dead").is_empty(), "{events:#?}");
    for (id, gpu) in &four.at {
        ensure!(owner(&four.fleet, id).await.as_ref() == Some(gpu), "{id} left {gpu}");
    }
    four.fleet.check_alive()?;
    Ok(())
}

/// The contrast: one of four, for as long, is condemned, and its session goes on elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_four_silent_for_as_long_is_condemned_and_its_session_moves() -> Result<()> {
    let _place = fleet::place().await;
    let mut four = Four::start("one", 120, 25.0).await?;
    four.stand_still(&[1], Duration::from_secs(10)).await?;
    for (gpu, verdict) in four.judged().await? {
        let moved = gpu == four.fleet.workers[1].gpu_id();
        ensure!((verdict.epoch > 1) == moved, "{gpu}: {verdict:?}\n{}", four.fleet.logs());
    }
    let events = told(&four.fleet, "*").await?;
    ensure!(whom(&events, "dead") == ["gpu-2"], "{events:#?}");
    four.fleet.check_alive()?;
    Ok(())
}

/// Ten minutes of audio in chunks of 40 ms as fast as the log takes them, with a bounded number of answers outstanding: who
/// waits for them is slowed down, loses nothing, and makes no process grow.
#[tokio::test(flavor = "multi_thread")]
async fn a_producer_faster_than_the_log_is_slowed_by_its_answers() -> Result<()> {
    const OUTSTANDING: usize = 64;
    const CHUNK_MS: u64 = 40;
    const SESSION: &str = "rushed";
    // Three times the most that was measured, and less than the audio: 19 MB.
    const GROWTH: u64 = 12 << 20;
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(1).slots(4).start().await?;
    let (js, pcm) = (fleet.js(), audio::blasts(55, 600.0));
    let bytes = Bytes::from(pcm.bytes());
    let size = pcm.chunk_bytes(CHUNK_MS);
    let resident = |fleet: &Fleet| fleet.dispatchers[0].resident_bytes().context("memory of the dispatcher");
    let before = resident(&fleet)?;
    let most = Arc::new(AtomicU64::new(before));

    let permits = Arc::new(Semaphore::new(OUTSTANDING));
    let (mut acks, mut waited) = (JoinSet::<Result<u64>>::new(), 0u64);
    let mut sequences = Vec::new();
    let begun = Instant::now();
    let pieces = (0..bytes.len()).step_by(size).map(|from| bytes.slice(from..(from + size).min(bytes.len())));
    for (n, piece) in pieces.enumerate() {
        waited += u64::from(permits.available_permits() == 0);
        let permit = permits.clone().acquire_owned().await?;
        let ack = js.publish(format!("asr.v1.audio.{SESSION}"), piece).await?;
        acks.spawn(async move {
            let stored = ack.await;
            drop(permit);
            Ok(stored?.sequence)
        });
        while let Some(stored) = acks.try_join_next() {
            sequences.push(stored??);
        }
        if n % 50 == 0 {
            most.fetch_max(resident(&fleet)?, Ordering::Relaxed);
        }
    }
    while let Some(stored) = acks.join_next().await {
        sequences.push(stored??);
    }
    let took = begun.elapsed();
    Producer::bare(js.clone(), SESSION).end().await?;
    {
        let ended = fleet.wait_end(SESSION, SOON);
        tokio::pin!(ended);
        loop {
            tokio::select! {
                ended = &mut ended => break ended.map(drop).with_context(|| fleet.logs())?,
                () = tokio::time::sleep(Duration::from_millis(50)) => {
                    most.fetch_max(resident(&fleet)?, Ordering::Relaxed);
                }
            }
        }
    }
    let all = begun.elapsed();
    sequences.sort_unstable();
    sequences.dedup();
    ensure!(sequences.len() == bytes.len().div_ceil(size), "{} answers", sequences.len());
    ensure!(waited > 0, "it never had to wait for an answer");
    let most = most.load(Ordering::Relaxed);
    eprintln!("{} chunks in {took:?}, waited {waited} times, end after {all:?}, {before} -> {most}", sequences.len());
    ensure!(most < before + GROWTH, "the dispatcher grew from {before} to {most} bytes");
    verdict::session(&js, SESSION, &pcm.samples).await?.clean(SESSION).with_context(|| fleet.logs())?;
    fleet.check_alive()?;
    Ok(())
}
