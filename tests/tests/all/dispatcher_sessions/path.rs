//! What every session goes through: opened, spoken to, ended, opened again.

use super::*;

#[tokio::test]
async fn bare_audio_opens_a_session_is_hinted_and_ends() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0", 4).await?;
    let first = setup.say("call", AUDIO, &[("Asr-Opt-Endpoint-Ms", "300")]).await?;
    let record = setup.state("call", "assigned").await?;
    ensure!(record["options"]["endpoint_ms"] == 300 && record["implicit"] == true, "{record}");
    worker.has("call", 1).await?;
    let assigned = setup.event("call", "assigned", 1).await?;
    ensure!(assigned[0]["detail"]["candidates"][0]["chosen"] == true, "{assigned:?}");
    let second = setup.say("call", AUDIO, &[]).await?;
    let third = setup.say("call", AUDIO, &[("Asr-End", "1")]).await?;
    // Taken is gone: they may come in several parts.
    let seen = Mutex::new(Vec::new());
    eventually("hints", SOON, || async {
        let hints = worker.hints().await.ok()?;
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.extend(hints);
        seen.iter().any(|(_, seq, _)| *seq == third).then_some(())
    })
    .await?;
    let seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(seen.contains(&("call".to_owned(), second, Some(first))), "{seen:?}");
    ensure!(seen.contains(&("call".to_owned(), third, Some(second))), "{seen:?}");
    worker.end("call", 0, third).await?;
    let record = setup.state("call", "ended").await?;
    ensure!(record["ended_seq"] == third, "{record}");
    worker.let_go("call").await?;
    setup.event("call", "ended", 1).await?;
    let status = setup.session("status", "call").await?;
    ensure!(status["ok"]["record"]["state"] == "ended" && status["ok"]["last_final"] == 0, "{status}");
    worker.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn a_session_is_opened_asked_about_closed_and_opened_again() -> Result<()> {
    let mut setup = Setup::new().await?;
    let refused = setup.session("open", "call").await?;
    ensure!(class(&refused) == "no_workers" && refused["error"]["retry_after_ms"].is_u64(), "{refused}");
    let worker = setup.worker("g0", 1).await?;
    let opened = eventually("an acceptance", SOON, || async {
        setup.session("open", "call").await.ok().filter(|r| r["ok"].is_object())
    })
    .await?;
    ensure!(opened["ok"]["worker"]["gpu_id"] == "g0" && opened["ok"]["epoch"] == 1, "{opened}");
    ensure!(opened["ok"]["subjects"]["audio"] == "asr.v1.audio.call", "{opened}");
    worker.has("call", 1).await?;
    let again = setup.session("open", "call").await?;
    ensure!(again == opened, "{again}");
    let other = json!({ "session": "call", "options": { "endpoint_ms": 300 } }).to_string();
    let refused = setup.ask("session.open", other.clone()).await?;
    ensure!(class(&refused) == "bad_request", "{refused}");
    let full = setup.session("open", "other").await?;
    ensure!(class(&full) == "no_capacity" && full["error"]["message"] == "No GPU resources available", "{full}");
    ensure!(class(&setup.session("status", "other").await?) == "not_found");
    let missing = json!({ "session": "x", "options": { "model": "nothing" } }).to_string();
    ensure!(class(&setup.ask("session.open", missing).await?) == "model_missing");
    setup.say("call", AUDIO, &[]).await?;

    let closed = setup.session("close", "call").await?;
    let end = closed["ok"]["end_seq"].as_u64().context("a sequence")?;
    let log = setup.log("call").await?;
    let last = log.last().context("entries")?;
    ensure!(last.sequence == end && last.payload.is_empty());
    ensure!(last.headers.get("Asr-Cause").is_some_and(|c| c.as_str() == "close"), "{:?}", last.headers);
    ensure!(last.headers.get("Asr-End").is_some_and(|c| c.as_str() == "1"), "{:?}", last.headers);
    worker.end("call", 0, end).await?;
    setup.state("call", "ended").await?;
    worker.let_go("call").await?;
    ensure!(setup.session("close", "call").await? == closed, "closing twice says the same");
    ensure!(setup.log("call").await?.len() == log.len(), "and writes nothing more");

    let reopened = setup.ask("session.open", other).await?;
    ensure!(reopened["ok"]["epoch"] == 2, "{reopened}");
    let record = setup.state("call", "assigned").await?;
    ensure!(record["options"]["endpoint_ms"] == 300, "{record}");
    worker.has("call", 2).await?;
    worker.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn silence_is_flushed_once_then_ended_and_the_same_source_goes_on() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0", 1).await?;
    let named = |seq: &'static str| [("Asr-Source", "mic"), ("Asr-Seq", seq), ("Asr-Opt-Idle-Timeout-S", "4")];
    setup.say("quiet", AUDIO, &named("0")).await?;
    worker.has("quiet", 1).await?;
    eventually("an idle end", SOON, || async {
        let log = setup.log("quiet").await.ok()?;
        (log.len() >= 3).then_some(())
    })
    .await?;
    let log = setup.log("quiet").await?;
    let causes: Vec<_> = log.iter().map(|m| m.headers.get("Asr-Cause").map(ToString::to_string)).collect();
    ensure!(causes == [None, Some("pause".to_owned()), Some("idle".to_owned())], "{causes:?}");
    ensure!(log[1].headers.get("Asr-Flush").is_some() && log[2].headers.get("Asr-End").is_some());
    worker.end("quiet", 0, log[2].sequence).await?;
    setup.state("quiet", "ended").await?;
    worker.let_go("quiet").await?;
    setup.say("quiet", AUDIO, &[("Asr-Source", "mic"), ("Asr-Seq", "0")]).await?;
    setup.event("quiet", "duplicate", 1).await?;
    setup.say("quiet", AUDIO, &[("Asr-Source", "mic"), ("Asr-Seq", "1")]).await?;
    worker.has("quiet", 2).await?;
    let record = setup.state("quiet", "assigned").await?;
    ensure!(record["options"]["idle_timeout_s"] == 4, "its options stay: {record}");
    worker.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn audio_after_its_own_end_is_refused_and_other_audio_goes_on() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0", 1).await?;
    setup.say("call", AUDIO, &[("Asr-Source", "a"), ("Asr-Seq", "0")]).await?;
    let end = setup.say("call", b"", &[("Asr-Source", "a"), ("Asr-Seq", "1"), ("Asr-End", "1")]).await?;
    worker.has("call", 1).await?;
    worker.end("call", 0, end).await?;
    setup.state("call", "ended").await?;
    let refused = setup.say("call", AUDIO, &[("Asr-Source", "a"), ("Asr-Seq", "2")]).await?;
    let events = setup.event("call", "audio_after_end", 1).await?;
    ensure!(events[0]["seq"] == refused && events[0]["error"]["class"] == "audio_after_end", "{events:?}");
    setup.say("call", b"", &[("Asr-End", "1")]).await?;
    let status = setup.session("status", "call").await?;
    ensure!(status["ok"]["record"]["state"] == "ended", "{status}");

    // Without a source it goes on, and what comes between an end and its final goes on without being let go.
    setup.say("call", AUDIO, &[]).await?;
    worker.has("call", 2).await?;
    let end = setup.say("call", b"", &[("Asr-End", "1")]).await?;
    let above = setup.say("call", AUDIO, &[("Asr-Source", "b")]).await?;
    // Log and chain come by two ways: a final that is read before the audio above it rightly lets the session go.
    eventually("the hint of what is above the end", SOON, || async {
        worker.hints().await.ok().filter(|hints| hints.iter().any(|(_, seq, _)| *seq == above))
    })
    .await?;
    let releases = worker.requests("release").len();
    worker.publish("call", 1, end, true, json!({ "seq": end })).await?;
    worker.has("call", 3).await?;
    ensure!(worker.requests("release").len() == releases, "it was never let go");
    let record = setup.state("call", "assigned").await?;
    ensure!(record["ended_seq"] == end, "{record}");
    let end = setup.say("call", b"", &[("Asr-Source", "b"), ("Asr-End", "1")]).await?;
    ensure!(end > above);
    worker.end("call", 2, end).await?;
    setup.state("call", "ended").await?;
    ensure!(setup.events("call", "audio_after_end").await?.len() == 1);
    worker.stop.cancel();
    setup.finish().await
}
