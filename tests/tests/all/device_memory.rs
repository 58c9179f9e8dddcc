//! The real engine when its memory runs out in the middle of a session: whisper.cpp's own allocation fails, its process dies of
//! that, and the session goes on with the next smaller model from where it was.
//!
//! Both models are the same file under two names, so that the whole text must be what the engine says alone.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinSet;
use voxfleet_harness::{
    audio, checker,
    fleet::{self, Engine, Fleet},
    probe_api,
    producer::{Pace, Producer},
    scarce_memory::ScarceMemory,
    wait::eventually,
};
use voxfleet_schema::session::SessionOptions;

use crate::direct;

const SOON: Duration = Duration::from_secs(60);
const ASKED: &str = "small.en";
const SMALLER: &str = "base.en";

#[tokio::test(flavor = "multi_thread")]
async fn out_of_memory_in_mid_session_changes_the_model_and_no_word() -> Result<()> {
    let _place = fleet::place().await;
    let (scarce, models) = (ScarceMemory::new()?, tempfile::tempdir()?);
    let micro = fleet::models_dir().join(format!("{}.bin", direct::MICRO));
    for name in [ASKED, SMALLER] {
        fs::copy(&micro, models.path().join(format!("{name}.bin")))?;
    }
    let mut fleet = Fleet::builder()
        .workers(1)
        .slots(2)
        .engine(Engine::Micro)
        .set("worker.models_dir", models.path().display())
        .set("worker.default_model", ASKED)
        .set("worker.restore_after_ms", 3_000)
        .worker_env("LD_PRELOAD", &scarce.library().display().to_string())
        .start()
        .await?;
    let call = audio::call(1)?;
    let log = direct::log(&call, 200);
    let expected = direct::transcribe(&mut *direct::micro()?, &*direct::best_vad(), &SessionOptions::default(), &log)?;

    let mut talk = JoinSet::new();
    let (spoken, mut producer) = (call.clone(), Producer::named(fleet.js(), "call", "s1"));
    talk.spawn(async move {
        let first = [("Asr-Opt-Model", ASKED), ("Asr-Opt-Policy", "allow_smaller")];
        producer.stream_with(&spoken, 200, Pace::Speed(2.0), &first).await?;
        producer.end().await
    });
    let by = |model: &'static str| {
        let js = fleet.js();
        eventually(format!("a final by {model}"), SOON, move || {
            let js = js.clone();
            async move {
                let finals = checker::finals(&js, "call").await.ok()?;
                finals.iter().any(|f| f.json["model"] == *model).then_some(())
            }
        })
    };
    by(ASKED).await.with_context(|| fleet.logs())?;
    scarce.strike()?;
    by(SMALLER).await.with_context(|| fleet.logs())?;
    ensure!(!scarce.is_due(), "no allocation failed");
    // The next heartbeat tells it, which may come after the final.
    let told = eventually("how its engine ended", SOON, || async {
        let status = probe_api::fleet_status(&fleet.client()).await?;
        let end = status["workers"][0]["heartbeat"]["engine"]["last_end"].clone();
        end.is_object().then_some(end)
    });
    let end = told.await.with_context(|| fleet.logs())?;
    ensure!(end["class"] == "out_of_memory", "{end}");
    while let Some(ended) = talk.join_next().await {
        ended??;
    }

    let text = fleet.wait_end("call", SOON).await.with_context(|| fleet.logs())?;
    ensure!(text == direct::text(&expected), "\n  heard    {text}\n  expected {}", direct::text(&expected));
    let report = checker::check(&fleet.js(), "call").await?.clean()?;
    ensure!(report.covered == call.samples.len() as u64, "{} samples", report.covered);
    let events = checker::events(&fleet.js(), "call").await?;
    let told: Vec<_> = events.iter().filter(|(_, event)| event["detail"]["asked"] == ASKED).collect();
    let (what, event) = told.first().context("nothing was told")?;
    ensure!(what == "degraded" && event["detail"]["class"] == "out_of_memory", "{told:?}");
    ensure!(event["detail"]["model"] == SMALLER && event["detail"]["device"] == "cpu", "{told:?}");
    fleet.check_alive()?;
    Ok(())
}
