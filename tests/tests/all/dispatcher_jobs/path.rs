//! What every job goes through, and what its senders are told.

use super::*;

#[tokio::test]
async fn a_submitted_job_is_given_out_and_ends() -> Result<()> {
    let mut setup = Setup::new().await?;
    let reply = setup.submit("call").await?;
    ensure!(reply["ok"]["state"] == "queued", "{reply}");
    ensure!(reply["ok"]["subjects"]["events"] == "asr.v1.event.job.call.*", "{reply}");
    let waiting = setup.event("call", "waiting").await?;
    ensure!(waiting["error"]["class"] == "no_workers", "{waiting}");
    let status = setup.status("call").await?;
    ensure!(status["ok"]["ahead"] == 0 && status["ok"]["why"].is_string(), "{status}");

    let worker = setup.worker("g0").await?;
    let taken = worker.take().await?;
    ensure!(taken.item.epoch == 1 && taken.item.attempt == 1, "{:?}", taken.item);
    ensure!(taken.item.audio == "https://audio.example/a.wav", "{:?}", taken.item);
    let assigned = setup.event("call", "assigned").await?;
    ensure!(assigned["gpu_id"] == "g0" && assigned["detail"]["candidates"][0]["chosen"] == true, "{assigned}");
    eventually("progress", SOON, || async {
        let status = setup.status("call").await.ok()?;
        (status["ok"]["progress"]["done_ms"] == 1_000 && status["ok"]["record"]["state"] == "assigned").then_some(())
    })
    .await?;

    worker.end(taken).await?;
    let done = setup.state("call", "done").await?;
    ensure!(done["duration_ms"] == 2_000 && done["attempts"] == 1 && done["ended_ms"].is_u64(), "{done}");
    ensure!(done["result"] == "object://asr_media/result/call/f.json", "{done}");
    let event = setup.event("call", "done").await?;
    ensure!(event["detail"]["result"] == done["result"] && event["detail"]["realtime"].is_f64(), "{event}");
    worker.let_go("call").await?;
    ensure!(setup.events("call", "submitted").await?.len() == 1 && setup.events("call", "waiting").await?.len() == 1);

    // The same request after its end, and a question, are answered from the key.
    let again = setup.submit("call").await?;
    ensure!(again["ok"]["state"] == "done", "{again}");
    let status = setup.status("call").await?;
    ensure!(status["ok"]["record"] == done, "{status}");
    ensure!(setup.status("ghost").await?["error"]["class"] == "not_found");
    setup.finish().await
}

#[tokio::test]
async fn a_submit_is_idempotent_and_its_recording_is_stored() -> Result<()> {
    let setup = Setup::new().await?;
    let inline = |data: &str| json!({ "job": "call", "data": data, "name": "a.wav" });
    for _ in 0..2 {
        let reply = setup.ask("job.submit", inline("aGVsbG8=")).await?;
        ensure!(reply["ok"]["state"] == "queued", "{reply}");
    }
    let record = setup.state("call", "queued").await?;
    ensure!(record["audio"] == "object://asr_media/audio/call", "{record}");
    let store = setup.js.get_object_store("asr_media").await?;
    let mut object = store.get("audio/call").await?;
    let mut bytes = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut object, &mut bytes).await?;
    ensure!(bytes == b"hello");
    for other in [inline("aGVsbG9v"), request("call"), json!({ "job": "call", "data": "aGVsbG8=" })] {
        let reply = setup.ask("job.submit", other).await?;
        ensure!(class(&reply) == "bad_request", "{reply}");
    }
    for bad in [json!({}), json!({ "job": "b" }), json!({ "job": "b", "audio": "a.wav" }), json!({ "jobb": "b" })] {
        let reply = setup.ask("job.submit", bad).await?;
        ensure!(class(&reply) == "bad_request", "{reply}");
    }
    // A recording of the largest size comes in, one that is larger does not.
    let big = |kb: usize| "AAAA".repeat(kb * 1024 / 3);
    let reply = setup.ask("job.submit", json!({ "job": "big", "data": big(2_000) })).await?;
    ensure!(reply["ok"]["state"] == "queued", "{reply}");
    let reply = setup.ask("job.submit", json!({ "job": "bigger", "data": big(2_060) })).await?;
    ensure!(class(&reply) == "too_large", "{reply}");
    setup.event("call", "submitted").await?;
    ensure!(setup.events("call", "submitted").await?.len() == 1);
    setup.finish().await
}

#[tokio::test]
async fn bare_publishes_are_taken_in_either_codec() -> Result<()> {
    let setup = Setup::new().await?;
    let body = json!({ "audio": "https://audio.example/a.wav", "options": { "priority": "low", "language": "en" } });
    setup.publish("high", "plain", None, body.to_string().into()).await?;
    let packed = rmp_serde::to_vec_named(&body)?;
    setup.publish("low", "packed", Some("application/msgpack"), packed.clone()).await?;
    setup.publish("normal", "guessed", None, packed).await?;
    for (id, priority) in [("plain", "high"), ("packed", "low"), ("guessed", "normal")] {
        let record = setup.state(id, "queued").await?;
        ensure!(record["options"]["priority"] == priority && record["options"]["language"] == "en", "{record}");
    }
    setup.door_is_empty().await?;
    // The same again changes nothing and is no mistake.
    setup.publish("high", "plain", None, body.to_string().into()).await?;
    setup.door_is_empty().await?;
    setup.event("plain", "submitted").await?;
    ensure!(setup.dead("plain").await?.is_empty() && setup.events("plain", "submitted").await?.len() == 1);
    setup.finish().await
}

#[tokio::test]
async fn a_malformed_publish_is_put_away_for_its_sender() -> Result<()> {
    let setup = Setup::new().await?;
    let seq = setup.publish("normal", "broken", None, b"{\"audoi\":".to_vec()).await?;
    let rejected = setup.event("broken", "rejected").await?;
    ensure!(rejected["error"]["class"] == "bad_request" && rejected["seq"] == seq, "{rejected}");
    let dead = setup.dead("broken").await?;
    ensure!(
        dead.len() == 1 && dead[0]["request"]["body"] == "{\"audoi\":" && dead[0]["error"]["class"] == "bad_request",
        "{dead:?}"
    );

    setup.publish("normal", "other", None, request("one").to_string().into()).await?;
    setup.event("other", "rejected").await?;
    setup.publish("urgent", "hurry", None, request("hurry").to_string().into()).await?;
    setup.event("hurry", "rejected").await?;
    setup.publish("normal", "bytes", Some("application/msgpack"), vec![0xff, 0xfe]).await?;
    setup.event("bytes", "rejected").await?;
    ensure!(setup.dead("bytes").await?[0]["request"]["body_base64"] == "//4=");
    setup.publish("normal", "b*d", None, request("x").to_string().into()).await.ok();
    setup.door_is_empty().await?;
    ensure!(setup.status("broken").await?["error"]["class"] == "not_found");
    setup.finish().await
}

#[tokio::test]
async fn higher_priority_first_then_who_came_first() -> Result<()> {
    let mut setup = Setup::new().await?;
    for (id, priority) in [("low", "low"), ("first", "normal"), ("second", "normal"), ("high", "high")] {
        let mut body = request(id);
        body["options"] = json!({ "priority": priority });
        ensure!(setup.ask("job.submit", body).await?["ok"]["state"] == "queued");
    }
    let ahead = |status: Value| status["ok"]["ahead"].as_u64();
    ensure!(ahead(setup.status("low").await?) == Some(3) && ahead(setup.status("second").await?) == Some(2));
    let worker = setup.worker("g0").await?;
    for expected in ["high", "first", "second", "low"] {
        let taken = worker.take().await?;
        ensure!(taken.item.job.as_str() == expected, "{} before {expected}", taken.item.job);
        worker.end(taken).await?;
        setup.state(expected, "done").await?;
    }
    setup.finish().await
}

#[tokio::test]
async fn cancelled_while_queued_or_running_it_ends_once() -> Result<()> {
    let mut setup = Setup::new().await?;
    setup.submit("waits").await?;
    let reply = setup.ask("job.cancel", json!({ "job": "waits" })).await?;
    ensure!(matches!(reply["ok"]["record"]["state"].as_str(), Some("closing" | "cancelled")), "{reply}");
    setup.state("waits", "cancelled").await?;
    let finals = setup.finals("waits").await?;
    ensure!(finals.len() == 1 && finals[0]["end"] == true && finals[0]["error"]["class"] == "cancelled", "{finals:?}");

    let worker = setup.worker("g0").await?;
    setup.submit("runs").await?;
    let taken = worker.take().await?;
    setup.ask("job.cancel", json!({ "job": "runs" })).await?;
    worker.let_go("runs").await?;
    let record = setup.state("runs", "cancelled").await?;
    ensure!(record["epoch"].as_u64() > Some(taken.item.epoch) && record["error"]["class"] == "cancelled", "{record}");
    setup.event("runs", "cancelled").await?;
    let again = setup.ask("job.cancel", json!({ "job": "runs" })).await?;
    ensure!(again["ok"]["record"]["state"] == "cancelled", "{again}");
    ensure!(setup.finals("runs").await?.len() == 1 && setup.dead("runs").await?.is_empty());
    ensure!(setup.ask("job.cancel", json!({ "job": "ghost" })).await?["error"]["class"] == "not_found");
    // The slot is free again.
    setup.submit("next").await?;
    ensure!(worker.take().await?.item.job.as_str() == "next");
    setup.finish().await
}

#[tokio::test]
async fn a_bad_recording_fails_at_once_and_is_put_away() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0").await?;
    let signed = json!({ "job": "noise", "audio": "https://audio.example/a.wav?X-Amz-Signature=s" });
    setup.ask("job.submit", signed).await?;
    let taken = worker.take().await?;
    ensure!(taken.item.audio.ends_with("=s"), "the worker needs all of it");
    worker.give_up(taken, "bad_audio").await?;
    let record = setup.state("noise", "failed").await?;
    ensure!(record["error"]["class"] == "bad_audio" && record["attempts"] == 1, "{record}");
    let finals = setup.finals("noise").await?;
    ensure!(finals.len() == 1 && finals[0]["end"] == true && finals[0]["error"]["class"] == "bad_audio", "{finals:?}");
    let dead = setup.dead("noise").await?;
    ensure!(dead.len() == 1 && dead[0]["record"]["id"] == "noise" && dead[0]["error"]["class"] == "bad_audio");
    ensure!(dead[0]["record"]["audio"] == "https://audio.example/a.wav", "{dead:?}");
    let event = setup.event("noise", "failed").await?;
    ensure!(event["error"]["class"] == "bad_audio", "{event}");
    ensure!(worker.released("noise") == Some(1));
    setup.finish().await
}
