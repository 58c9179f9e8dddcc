//! The real engine: the small Whisper model on the CPU, six sessions on two workers.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::Value;
use voxfleet_harness::{
    audio, checker,
    fleet::{self, Engine, Fleet},
    producer::{Pace, Producer},
};
use voxfleet_schema::session::SessionOptions;

use crate::direct;

/// Call and the highest word error rate it may have.
const SESSIONS: [(u32, f64); 6] = [(1, 0.02), (2, 0.02), (3, 0.10), (4, 0.02), (5, 0.02), (1, 0.02)];

#[tokio::test(flavor = "multi_thread")]
async fn six_sessions_say_what_the_engine_says_alone() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(3).engine(Engine::Micro).start().await?;
    let js = fleet.js();
    let sessions = SESSIONS.iter().enumerate().map(|(n, (call, _))| {
        let js = js.clone();
        async move {
            let session = format!("micro-{n}");
            let mut producer = Producer::named(js.clone(), &session, "s1");
            producer.stream(&audio::call(*call)?, 200, Pace::Speed(2.0)).await?;
            producer.end().await?;
            fleet::wait_end(&js, &session, Duration::from_secs(120)).await?;
            Ok::<_, anyhow::Error>(checker::check(&js, &session).await?.clean()?)
        }
    });
    let outcome = try_join_all(sessions).await;
    let logs = fleet.logs();
    let reports = outcome.with_context(|| logs.clone())?;

    let expected_vad = direct::best_vad();
    let mut recognizer = direct::micro()?;
    for ((call, most), report) in SESSIONS.iter().zip(&reports) {
        let log = direct::log(&audio::call(*call)?, 200);
        let alone = direct::transcribe(&mut *recognizer, &*expected_vad, &SessionOptions::default(), &log)?;
        let (heard, alone_text) = (report.text(), direct::text(&alone));
        ensure!(heard == alone_text, "call {call}:\n  fleet {heard}\n  alone {alone_text}");
        let rate = audio::word_error_rate(&audio::call_text(*call)?, &heard);
        ensure!(rate <= *most, "call {call}: word error rate {rate:.4}, at most {most}\n{heard}");
        for f in &report.finals {
            ensure!(f.json["vad"] == expected_vad.kind().as_str(), "{}", f.json["vad"]);
            for s in f.json["segments"].as_array().into_iter().flatten() {
                ensure!(s["words"].as_array().is_some_and(|w| !w.is_empty()), "a segment without words: {s}");
            }
        }
    }
    let mut gpus: Vec<&Value> = reports.iter().flat_map(|r| r.finals.iter().map(|f| &f.json["gpu_id"])).collect();
    gpus.sort_by_key(|g| g.to_string());
    gpus.dedup();
    ensure!(gpus.len() == 2, "only {gpus:?} worked\n{logs}");
    let partials = checker::read(&js, "ASR_PARTIAL", "asr.v1.transcript.session.*.partial").await?;
    // Partials come where a decode thread has nothing better to do: how many is a matter of load.
    ensure!(!partials.is_empty(), "no session has a partial");
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_silero_the_energy_detector_serves_and_says_so() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).slots(2).engine(Engine::MicroEnergy).start().await?;
    let call = audio::call(1)?;
    let mut producer = Producer::bare(fleet.js(), "energy");
    producer.stream(&call, 500, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    let heard = fleet.wait_end("energy", Duration::from_secs(120)).await?;
    let report = checker::check(&fleet.js(), "energy").await?.clean()?;
    ensure!(report.finals.iter().all(|f| f.json["vad"] == "energy"), "another detector");
    let log = direct::log(&call, 500);
    let alone = direct::transcribe(&mut *direct::micro()?, &*direct::energy_vad(), &SessionOptions::default(), &log)?;
    assert_eq!(heard, direct::text(&alone));
    let rate = audio::word_error_rate(&audio::call_text(1)?, &heard);
    ensure!(rate <= 0.05, "word error rate {rate:.4} by energy\n{heard}");
    Ok(())
}
