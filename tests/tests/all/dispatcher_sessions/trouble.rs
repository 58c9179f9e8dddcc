//! Deaths and successors.

use super::*;

#[tokio::test]
async fn a_silent_worker_is_dead_and_its_sessions_move() -> Result<()> {
    let mut setup = Setup::new().await?;
    let first = setup.worker("g0", 4).await?;
    setup.say("call", AUDIO, &[]).await?;
    first.has("call", 1).await?;
    let second = setup.worker("g1", 4).await?;
    eventually("two alive", SOON, || async {
        let status = setup.ask("fleet.status", "").await.ok()?;
        let alive = status["ok"]["workers"].as_array()?.iter().filter(|w| w["health"] == "alive").count();
        (alive == 2).then_some(())
    })
    .await?;
    first.lock().silent = true;
    second.has("call", 2).await?;
    let moved = setup.event("call", "moved", 1).await?;
    ensure!(moved[0]["gpu_id"] == "g1" && moved[0]["detail"]["from"]["gpu_id"] == "g0", "{moved:?}");
    eventually("consumers removed", SOON, || async { first.hints().await.is_err().then_some(()) }).await?;
    first.lock().silent = false;
    eventually("told to renew", SOON, || async { (!first.requests("renew").is_empty()).then_some(()) }).await?;
    ensure!(first.hints().await.is_err(), "a dead incarnation's heartbeat makes nothing");
    first.stop.cancel();
    second.stop.cancel();
    setup.finish().await
}

/// Somebody, or a faulty disk, has written what is no record: the session goes on from log and chain.
#[tokio::test]
async fn a_key_that_cannot_be_read_is_like_one_that_is_gone() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0", 4).await?;
    let first = setup.say("call", AUDIO, &[]).await?;
    worker.has("call", 1).await?;
    worker.publish("call", 0, first, false, json!({})).await?;
    // Read by the first dispatcher, so that the next one does not meet it in the log; no final has it yet.
    let second = setup.say("call", AUDIO, &[]).await?;
    eventually("its hint", SOON, || async {
        worker.hints().await.ok()?.iter().any(|(_, seq, _)| *seq == second).then_some(())
    })
    .await?;
    setup.stop.cancel();
    while setup.tasks.len() > 1 {
        setup.tasks.join_next().await.context("a task")??;
    }
    setup.stop = CancellationToken::new();
    setup.js.publish("$KV.asr_sessions.call", "garbage".into()).await?.await?;
    let end = setup.say("call", b"", &[("Asr-End", "1")]).await?;
    setup.start_dispatcher("d2").await?;
    worker.has("call", 2).await?;
    worker.end("call", 1, end).await?;
    setup.state("call", "ended").await?;
    worker.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn a_standby_goes_on_where_the_active_one_stopped() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0", 4).await?;
    setup.say("call", AUDIO, &[]).await?;
    worker.has("call", 1).await?;
    let old = setup.ask("fleet.status", "").await?;
    ensure!(old["ok"]["dispatcher"] == "d1", "{old}");
    setup.stop.cancel();
    setup.stop = CancellationToken::new();
    // Audio and an end while nobody listens; the worker reads the log by itself.
    setup.say("call", AUDIO, &[]).await?;
    let end = setup.say("call", b"", &[("Asr-End", "1")]).await?;
    setup.say("unheard", AUDIO, &[]).await?;
    worker.end("call", 0, end).await?;
    setup.start_dispatcher("d2").await?;
    setup.state("call", "ended").await?;
    worker.let_go("call").await?;
    worker.has("unheard", 1).await?;
    let new = setup.ask("fleet.status", "").await?;
    ensure!(new["ok"]["dispatcher"] == "d2", "{new}");
    let epochs = worker.requests("assign").iter().filter(|r| r["id"] == "call").count();
    ensure!(epochs == 1, "the takeover moved nothing");
    worker.stop.cancel();
    setup.finish().await
}
