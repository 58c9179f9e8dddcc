//! Many sessions at once on simulated workers. The simulated text is made from the samples, so a lost, doubled or shifted
//! sample is a wrong word.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use voxfleet_harness::{
    audio, checker,
    fleet::{self, Engine, Fleet},
    producer::{Pace, Producer},
};

use crate::direct;

const SESSIONS: u64 = 40;

#[tokio::test(flavor = "multi_thread")]
async fn forty_sessions_on_two_workers_all_end_with_the_right_text() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder()
        .workers(2)
        .slots(SESSIONS as u32 / 2)
        .engine(Engine::Simulated { speed: 100.0 })
        .start()
        .await?;
    let js = fleet.js();
    let sessions = (0..SESSIONS).map(|n| {
        let js = js.clone();
        async move {
            let pcm = audio::bursts(n, 12.0 + (n % 5) as f64);
            let session = format!("forty-{n}");
            // Every other one as a stranger would send it, in chunks from 20 ms to a second.
            let mut producer = match n % 2 {
                0 => Producer::bare(js.clone(), &session),
                _ => Producer::named(js.clone(), &session, "source-1"),
            };
            let chunk_ms = [20, 100, 200, 333, 1_000][(n % 5) as usize];
            producer.stream(&pcm, chunk_ms, Pace::Speed(4.0)).await?;
            producer.end().await?;
            let text = fleet::wait_end(&js, &session, Duration::from_secs(60)).await?;
            let report = checker::check(&js, &session).await?.clean()?;
            ensure!(report.covered == pcm.samples.len() as u64, "{session}: {} samples", report.covered);
            let expected = direct::simulated_text(&pcm)?;
            ensure!(!expected.is_empty(), "{session}: the engine heard nothing");
            ensure!(text == expected, "{session}:\n  heard    {text}\n  expected {expected}");
            let gpu = report.finals.last().and_then(|f| f.json["gpu_id"].as_str()).context("a gpu id")?;
            Ok::<_, anyhow::Error>(gpu.to_owned())
        }
    });
    let outcome = try_join_all(sessions).await;
    let logs = fleet.logs();
    let mut gpus = outcome.with_context(|| logs.clone())?;
    gpus.sort();
    gpus.dedup();
    ensure!(gpus.len() == 2, "only {gpus:?} worked\n{logs}");
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_gives_a_final_at_once_and_the_session_goes_on() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let pcm = audio::bursts(77, 6.0);
    let mut producer = Producer::named(fleet.js(), "pause", "s1");
    let last = producer.stream(&pcm, 200, Pace::AsFastAsPossible).await?;
    // Two seconds without audio: the dispatcher writes a flush, and everything so far becomes final.
    let covered = voxfleet_harness::wait::eventually("finals up to the pause", Duration::from_secs(10), || async {
        let finals = checker::finals(&fleet.js(), "pause").await.ok()?;
        let to = finals.last()?.json["to_sample"].as_u64()?;
        (to == pcm.samples.len() as u64).then_some(to)
    })
    .await?;
    assert_eq!(covered, pcm.samples.len() as u64);
    let log = checker::log(&fleet.js(), "pause").await?;
    let flush = log.last().context("a log")?;
    ensure!(flush.seq > last && flush.headers.contains_key("Asr-Flush"), "{flush:?}");
    producer.stream(&pcm, 200, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    fleet.wait_end("pause", Duration::from_secs(20)).await?;
    let report = checker::check(&fleet.js(), "pause").await?.clean()?;
    assert_eq!(report.covered, 2 * pcm.samples.len() as u64);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_producer_is_ended_and_its_audio_goes_on_at_a_higher_epoch() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let pcm = audio::bursts(78, 4.0);
    let mut producer = Producer::bare(fleet.js(), "idle");
    let options = [("Asr-Opt-Idle-Timeout-S", "3")];
    producer.stream_with(&pcm, 200, Pace::AsFastAsPossible, &options).await?;
    fleet.wait_end("idle", Duration::from_secs(20)).await?;
    let first = checker::check(&fleet.js(), "idle").await?.clean()?;
    let epoch = |report: &checker::Report| report.finals.last().and_then(|f| f.json["epoch"].as_u64());
    producer.stream(&pcm, 200, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    let expect = checker::Expect { reopened: true, ..checker::Expect::default() };
    let second = voxfleet_harness::wait::eventually("the second end", Duration::from_secs(20), || async {
        let report = checker::check_with(&fleet.js(), "idle", &expect).await.ok()?;
        (report.finals.iter().filter(|f| f.is_end()).count() == 2).then_some(report)
    })
    .await?
    .clean()?;
    ensure!(epoch(&second) > epoch(&first), "{:?} {:?}", epoch(&first), epoch(&second));
    assert_eq!(second.covered, 2 * pcm.samples.len() as u64);
    Ok(())
}
