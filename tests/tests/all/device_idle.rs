//! Nothing on the card before somebody needs it, and nothing after: loaded once however many ask, released when nobody has
//! for a while, there again when it is needed. The fake library counts what lies on the card.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use voxfleet_harness::{
    audio::{self, Pcm},
    checker, fleet,
    process::Settings,
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_schema::fleet::{EngineRunState, Heartbeat, Residency};

use crate::{device_ladder::OnCard, direct};

const SOON: Duration = Duration::from_secs(15);

async fn speak(on: &OnCard, session: &str, pcm: &Pcm) -> Result<()> {
    let mut producer = Producer::bare(on.alone.js.clone(), session);
    producer.stream(pcm, 100, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    Ok(())
}

fn nothing_is_there(beat: &Heartbeat) -> bool {
    beat.engine.state == EngineRunState::Down && beat.device.used_mb == 0
}

fn loads(on: &OnCard) -> usize {
    on.alone.worker.log().matches("model loaded").count()
}

async fn gone(pid: u32) -> Result<()> {
    let ended = || async { (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()) };
    eventually("the end of the engine", SOON, ended).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn loaded_at_the_first_use_released_after_a_while_and_loaded_again() -> Result<()> {
    let _place = fleet::place().await;
    let settings = Settings::new().with("worker.idle_release_ms", 2_000).with("worker.simulated.load_ms", 300);
    let mut on = OnCard::start(1_000, settings).await?;
    let name = on.alone.name().await?;
    let beat = on.alone.beat("nothing", |b| b.seq >= 2).await?;
    ensure!(nothing_is_there(&beat) && on.alone.worker.engine_pid().is_none(), "{:?}", beat.engine);
    assert_eq!((beat.engine.idle_timeout_s, beat.engine.ms_since_activity), (2, None));
    assert_eq!(on.card.used_mb()?, 0);

    // All of them at once: one process, one load.
    let pcm = audio::bursts(31, 6.0);
    let sessions = ["a", "b", "c", "d"];
    try_join_all(sessions.map(|session| on.alone.take(&name, session, 1))).await?;
    let load = |b: &Heartbeat| b.models.iter().find(|m| m.state == Residency::Loaded).cloned();
    let beat = on.alone.beat("a load", |b| load(b).is_some()).await?;
    let loaded = load(&beat).context("the model")?;
    ensure!(loaded.name == "small" && loaded.load_ms.is_some_and(|ms| ms >= 300), "{loaded:?}");
    let first = on.alone.worker.engine_pid().context("an engine")?;
    try_join_all(sessions.map(|session| speak(&on, session, &pcm))).await?;
    let text = direct::simulated_text(&pcm)?;
    for session in sessions {
        assert_eq!(on.alone.end_text(session).await?, text, "{session}");
    }
    assert_eq!(loads(&on), 1, "{}", on.alone.worker.log_tail());
    let beat = on.alone.beat("memory in use", |b| b.device.used_mb >= 660).await?;
    assert_eq!(beat.engine.restarts, 0);

    for session in sessions {
        on.alone.release(&name, session, 1).await?;
    }
    on.alone.beat("rest", |b| b.engine.ms_since_activity.is_some_and(|ms| ms >= 500)).await?;
    on.alone.beat("0 MB by the library's count", nothing_is_there).await?;
    gone(first).await?;
    assert_eq!(on.card.used_mb()?, 0);
    for line in ["model load begins", "model loaded", "engine idle", "engine released", "memory freed"] {
        ensure!(on.alone.worker.log().contains(line), "no {line:?}\n{}", on.alone.worker.log_tail());
    }

    on.alone.take(&name, "again", 1).await?;
    speak(&on, "again", &pcm).await?;
    assert_eq!(on.alone.end_text("again").await?, text);
    checker::check(&on.alone.js, "again").await?.clean()?;
    assert_eq!(loads(&on), 2);
    let second = on.alone.worker.engine_pid().context("an engine")?;
    ensure!(second != first);
    let beat = on.alone.beat("the end of it all", |b| b.engine.last_end.is_none()).await?;
    assert_eq!(beat.engine.restarts, 0, "no end was a fault");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_loaded_ahead_goes_too_and_nobody_who_listens_loses_it() -> Result<()> {
    let _place = fleet::place().await;
    let settings = Settings::new().with("worker.idle_release_ms", 1_500).with("worker.preload", "small");
    let mut on = OnCard::start(1_000, settings).await?;
    let name = on.alone.name().await?;
    on.alone.beat("a load", |b| b.models.iter().any(|m| m.state == Residency::Loaded)).await?;
    on.alone.beat("nothing", nothing_is_there).await?;

    // A session that is silent for longer than that is still one.
    on.alone.take(&name, "silent", 1).await?;
    let beat = on.alone.beat("an engine", |b| b.engine.state == EngineRunState::Ready).await?;
    let later = beat.seq + 4;
    let beat = on.alone.beat("some time", |b| b.seq >= later).await?;
    assert_eq!((beat.engine.state, beat.engine.ms_since_activity), (EngineRunState::Ready, None));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_is_lent_is_empty_between_jobs() -> Result<()> {
    let _place = fleet::place().await;
    let mut on = OnCard::start(1_000, Settings::new().with("worker.sharing", "swap")).await?;
    let name = on.alone.name().await?;
    let pcm = audio::bursts(32, 4.0);
    for (n, session) in ["first", "second"].into_iter().enumerate() {
        on.alone.take(&name, session, 1).await?;
        speak(&on, session, &pcm).await?;
        on.alone.end_text(session).await?;
        // What was said before it was taken is behind us: that would be an empty card as well.
        on.alone.beat("its session", |b| !b.held.is_empty()).await?;
        on.alone.release(&name, session, 1).await?;
        on.alone.beat("an empty card", |b| b.held.is_empty() && nothing_is_there(b)).await?;
        assert_eq!((on.card.used_mb()?, loads(&on)), (0, n + 1));
    }
    Ok(())
}
