//! Failures, deaths and successors.

use super::*;

#[tokio::test]
async fn a_passing_trouble_is_tried_again_and_not_for_ever() -> Result<()> {
    let mut setup = Setup::bare().await?;
    setup.config.max_attempts = 2;
    setup.start_dispatcher("d1").await?;
    let worker = setup.worker("g0").await?;
    setup.submit("flaky").await?;
    // Time enough to see it wait.
    let failure = json!({ "class": "unavailable", "message": "as the test says", "retry_after_ms": 5_000 });
    worker.give_up_with(worker.take().await?, failure).await?;
    let record = setup.record("flaky", |v| v["state"] == "queued" && v["attempts"] == 1).await?;
    ensure!(record["not_before_ms"].is_u64() && record["error"]["class"] == "unavailable", "{record}");
    ensure!(setup.status("flaky").await?["ok"]["why"].as_str().is_some_and(|why| why.contains("unavailable")));
    let second = worker.take().await?;
    ensure!(second.item.epoch > 1 && second.item.attempt == 2, "{:?}", second.item);
    worker.give_up(second, "no_capacity").await?;
    let third = worker.take().await?;
    ensure!(third.item.attempt == 2, "no room is no try: {:?}", third.item);
    worker.give_up(third, "timeout").await?;
    let record = setup.state("flaky", "failed").await?;
    ensure!(record["attempts"] == 2 && record["error"]["class"] == "timeout", "{record}");
    setup.event("flaky", "failed").await?;
    ensure!(setup.dead("flaky").await?.len() == 1 && setup.events("flaky", "failed").await?.len() == 1);
    setup.finish().await
}

#[tokio::test]
async fn a_dead_workers_job_goes_to_another() -> Result<()> {
    let mut setup = Setup::new().await?;
    let first = setup.worker("g0").await?;
    setup.submit("call").await?;
    let taken = first.take().await?;
    first.store("call", 0, taken.item.epoch, false, None).await?;
    let second = setup.worker("g1").await?;
    first.lock().silent = true;
    let again = second.take().await?;
    ensure!(again.item.epoch > taken.item.epoch, "{:?}", again.item);
    let moved = setup.event("call", "moved").await?;
    ensure!(moved["detail"]["from"]["gpu_id"] == "g0" && moved["gpu_id"] == "g1", "{moved}");
    second.store("call", 1, again.item.epoch, true, Some("object://asr_media/result/call/f.json")).await?;
    again.ack().await?;
    setup.state("call", "done").await?;
    setup.finish().await
}

#[tokio::test]
async fn a_lost_work_item_is_sent_again() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0").await?;
    setup.submit("call").await?;
    setup.state("call", "assigned").await?;
    eventually("a work item", SOON, || async {
        let mut stream = setup.js.get_stream("ASR_WORK").await.ok()?;
        (stream.info().await.ok()?.state.messages == 1).then_some(())
    })
    .await?;
    setup.js.get_stream("ASR_WORK").await?.purge().await?;
    let taken = worker.take().await?;
    ensure!(taken.item.attempt == 1, "{:?}", taken.item);
    worker.end(taken).await?;
    setup.state("call", "done").await?;
    setup.finish().await
}

/// What a dispatcher that is killed leaves at each point, written by hand; the next one makes it good.
#[tokio::test]
async fn every_half_done_job_is_made_good_by_a_successor() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0").await?;
    worker.lock().slots = 8;
    setup.stop.cancel();
    while setup.tasks.join_next().await.is_some() {}
    let bucket = setup.js.get_key_value("asr_jobs").await?;
    let name = json!({ "gpu_id": "g0", "incarnation": worker.incarnation });
    let record = |id: &str, state: &str, epoch: u64, change: Value| {
        let mut record = json!({
            "id": id, "state": state, "audio": "https://audio.example/a.wav", "options": {}, "result_ttl_s": 86_400,
            "epoch": epoch, "attempts": epoch.min(1), "submitted_ms": 1, "changed_ms": 1,
        });
        for (key, value) in change.as_object().into_iter().flatten() {
            record[key] = value.clone();
        }
        Bytes::from(record.to_string())
    };
    let failure = |class: &str| json!({ "class": class, "message": "x" });
    // Created, not acked. Assigned, not sent. Assigned, ended, not written. Closing, not closed. Closing and closed.
    bucket.create("created", record("created", "queued", 0, json!({}))).await?;
    bucket.create("unsent", record("unsent", "assigned", 1, json!({ "worker": name }))).await?;
    bucket.create("ended", record("ended", "assigned", 1, json!({ "worker": name }))).await?;
    worker.store("ended", 0, 1, true, Some("object://asr_media/result/ended/f.json")).await?;
    bucket.create("closing", record("closing", "closing", 2, json!({ "error": failure("bad_audio") }))).await?;
    bucket.create("closed", record("closed", "closing", 2, json!({ "error": failure("cancelled") }))).await?;
    worker.store("closed", 0, 1, true, None).await?;

    setup.stop = CancellationToken::new();
    setup.start_dispatcher("d3").await?;
    let mut taken = Vec::new();
    for _ in 0..2 {
        taken.push(worker.take().await?);
    }
    taken.sort_by(|a, b| a.item.job.as_str().cmp(b.item.job.as_str()));
    let epochs: Vec<_> = taken.iter().map(|t| (t.item.job.to_string(), t.item.epoch)).collect();
    ensure!(epochs == [("created".to_owned(), 1), ("unsent".to_owned(), 1)], "{epochs:?}");
    for one in taken {
        worker.end(one).await?;
    }
    for id in ["created", "unsent", "ended"] {
        setup.state(id, "done").await?;
    }
    setup.state("closing", "failed").await?;
    ensure!(setup.dead("closing").await?.len() == 1 && setup.finals("closing").await?[0]["epoch"] == 2);
    // It was finished before it could be cancelled.
    setup.state("closed", "done").await?;
    setup.finish().await
}

#[tokio::test]
async fn a_killed_dispatcher_loses_no_job() -> Result<()> {
    let mut setup = Setup::bare().await?;
    let folder = tempfile::tempdir()?;
    let settings = Settings::new().with("nats.urls", setup.server.url()).with("dispatcher.lease_ms", 1_500);
    let first = Dispatcher::start("d1", &settings, folder.path())?;
    setup.ask("fleet.status", json!({})).await?;
    let worker = setup.worker("g0").await?;
    setup.submit("runs").await?;
    let runs = worker.take().await?;
    setup.submit("waits").await?;
    drop(first);
    // Until the server has seen its connection end, it may hand a job to the dead, which comes again in half a minute.
    setup.nobody_pulls().await?;
    setup
        .publish("normal", "knocks", None, json!({ "audio": "https://audio.example/b.wav" }).to_string().into())
        .await?;
    worker.end(runs).await?;
    let second = Dispatcher::start("d2", &settings, folder.path())?;
    setup.state("runs", "done").await?;
    let mut seen = Vec::new();
    for _ in 0..2 {
        let taken = worker.take().await.with_context(|| second.log())?;
        seen.push(taken.item.job.to_string());
        worker.end(taken).await?;
    }
    seen.sort();
    ensure!(seen == ["knocks", "waits"], "{seen:?}");
    for id in ["knocks", "waits"] {
        setup.state(id, "done").await?;
        ensure!(setup.finals(id).await?.len() == 1);
    }
    setup.finish().await
}
