//! Devices short of memory: stand-ins, what is told of them, cards that two workers share, and what `plan` says.

use super::*;

fn model(name: &str, state: &str, mb: u64) -> Value {
    json!({ "name": name, "state": state, "resident_mb": 0, "expected_mb": mb, "measured": true })
}

/// A worker that says this from its first heartbeat on.
async fn says(setup: &mut Setup, gpu: &str, slots: u32, says: Value) -> Result<Worker> {
    let worker = setup.worker(gpu, slots).await?;
    worker.lock().says = says.clone();
    eventually(&format!("{gpu} is heard"), SOON, || async {
        let status = setup.ask("fleet.status", "").await.ok()?;
        let rows = status["ok"]["workers"].as_array()?.clone();
        let row = rows.into_iter().find(|row| row["heartbeat"]["gpu_id"] == gpu)?;
        (row["health"] == "alive" && row["heartbeat"]["models"] == says["models"]).then_some(())
    })
    .await?;
    Ok(worker)
}

fn open(session: &str, model: &str, policy: &str) -> String {
    json!({ "session": session, "options": { "model": model, "policy": policy } }).to_string()
}

#[tokio::test]
async fn a_stand_in_of_any_name_is_told_once_and_taken_back_by_a_successor() -> Result<()> {
    let mut setup = Setup::new().await?;
    let models = json!([model("medium.en-q5_0", "available", 9_000), model("small.en", "available", 852)]);
    let crowded = json!({ "models": models, "device": { "free_mb": 4_000 } });
    let worker = says(&mut setup, "g0", 2, crowded).await?;
    let opened = setup.ask("session.open", open("call", "medium.en-q5_0", "allow_smaller")).await?;
    ensure!(opened["ok"]["epoch"] == 1, "{opened}");
    let asked = worker.requests("assign");
    ensure!(asked[0]["options"]["model"] == "small.en" && asked[0]["model_asked"] == "medium.en-q5_0", "{asked:?}");
    let told = setup.event("call", "degraded", 1).await?;
    let degraded = json!({
        "asked": "medium.en-q5_0", "model": "small.en", "device": "gpu", "class": "model_does_not_fit", "by": "dispatcher",
    });
    ensure!(told[0]["detail"] == degraded, "{told:?}");
    setup.stop.cancel();
    setup.stop = CancellationToken::new();
    setup.start_dispatcher("d2").await?;
    eventually("the successor", SOON, || async {
        let status = setup.ask("fleet.status", "").await.ok()?;
        (status["ok"]["dispatcher"] == "d2" && status["ok"]["sessions_assigned"] == 1).then_some(())
    })
    .await?;
    worker.lock().says["device"]["free_mb"] = json!(20_000);
    worker.has("call", 2).await?;
    let asked = worker.requests("assign");
    let last = asked.last().context("asked")?;
    ensure!(last["options"]["model"] == "medium.en-q5_0" && last["model_asked"].is_null(), "{asked:?}");
    let restored = setup.event("call", "restored", 1).await?;
    ensure!(restored[0]["detail"]["model"] == "medium.en-q5_0", "{restored:?}");
    ensure!(setup.events("call", "degraded").await?.len() == 1, "told by its predecessor");
    worker.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn two_workers_on_one_card_are_not_promised_its_memory_twice() -> Result<()> {
    let mut setup = Setup::new().await?;
    let models = json!([model("a", "available", 10_000), model("b", "fetching", 1_000)]);
    let card = json!({ "models": models, "device": { "uuid": "GPU-1" } });
    let first = says(&mut setup, "g0", 1, card.clone()).await?;
    let second = says(&mut setup, "g1", 1, card).await?;
    let plan = setup.ask("plan", json!({ "model": "a" }).to_string()).await?;
    let option = &plan["ok"]["options"][0];
    ensure!(option["model"] == "a" && option["sessions"] == 1 && option["risk"] == "safe", "{plan}");
    ensure!(plan["ok"]["workers"][1]["models"][0]["standing"] == "fits", "{plan}");
    let opened = setup.ask("session.open", open("one", "a", "exact_model")).await?;
    ensure!(opened["ok"]["worker"]["gpu_id"] == "g0", "{opened}");
    let refused = setup.ask("session.open", open("two", "a", "exact_model")).await?;
    ensure!(class(&refused) == "no_capacity" && refused["error"]["retry_after_ms"].is_u64(), "{refused}");
    let plan = setup.ask("plan", "").await?;
    let there = &plan["ok"]["workers"][1]["models"];
    ensure!(there[0]["standing"] == "model does not fit in free memory" && there[0]["measured"] == true, "{plan}");
    ensure!(there[1]["standing"] == "model is being fetched", "{plan}");
    let waits = setup.ask("session.open", open("three", "b", "exact_model")).await?;
    ensure!(class(&waits) == "no_capacity", "{waits}");
    // Files that are nowhere are not waited for.
    for worker in [&first, &second] {
        worker.lock().says["models"][1]["state"] = json!("missing");
    }
    eventually("the refusal for good", SOON, || async {
        let missing = setup.ask("session.open", open("four", "b", "exact_model")).await.ok()?;
        (class(&missing) == "model_missing").then_some(())
    })
    .await?;
    // Once the other card is another, there is room.
    second.lock().says["device"]["uuid"] = json!("GPU-2");
    eventually("room on a card of its own", SOON, || async {
        let opened = setup.ask("session.open", open("two", "a", "exact_model")).await.ok()?;
        (opened["ok"]["worker"]["gpu_id"] == "g1").then_some(())
    })
    .await?;
    first.stop.cancel();
    second.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn a_lost_device_gives_its_work_away_and_a_drained_worker_is_not_called_dead() -> Result<()> {
    let mut setup = Setup::new().await?;
    let models = json!({ "models": [model("small", "available", 852)] });
    let first = says(&mut setup, "g0", 1, models.clone()).await?;
    setup.ask("session.open", open("call", "small", "exact_model")).await?;
    first.has("call", 1).await?;
    let second = says(&mut setup, "g1", 1, models).await?;
    first.lock().says["device"] = json!({ "trouble": { "class": "device_lost", "message": "off the bus" } });
    second.has("call", 2).await?;
    let fleet = |what: &str| format!("asr.v1.event.fleet.g0.{what}");
    let told = eventually("unhealthy", SOON, || async {
        setup.events_on(&fleet("unhealthy")).await.ok().filter(|found| !found.is_empty())
    })
    .await?;
    ensure!(told[0]["detail"]["why"] == "device_lost: off the bus", "{told:?}");
    first.let_go("call").await?;
    first.lock().says = json!({ "draining": true });
    eventually("it drains", SOON, || async {
        setup.events_on(&fleet("draining")).await.ok().filter(|found| !found.is_empty())
    })
    .await?;
    first.stop.cancel();
    eventually("its end", SOON, || async {
        setup.events_on(&fleet("ended")).await.ok().filter(|found| !found.is_empty())
    })
    .await?;
    ensure!(setup.events_on(&fleet("dead")).await?.is_empty());
    let status = setup.ask("fleet.status", "").await?;
    ensure!(status["ok"]["dead"].is_null(), "{status}");
    second.stop.cancel();
    setup.finish().await
}
