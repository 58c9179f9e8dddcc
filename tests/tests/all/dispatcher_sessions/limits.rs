//! Room, models, time, and requests that make no sense.

use super::*;

#[tokio::test]
async fn sessions_wait_for_room_and_for_workers_that_refuse() -> Result<()> {
    let mut setup = Setup::new().await?;
    setup.say("early", AUDIO, &[]).await?;
    let waiting = setup.event("early", "waiting", 1).await?;
    ensure!(waiting[0]["error"]["class"] == "no_workers", "{waiting:?}");
    setup.state("early", "waiting").await?;
    let worker = setup.worker("g0", 1).await?;
    worker.has("early", 1).await?;
    let second = setup.say("late", AUDIO, &[("Asr-End", "1")]).await?;
    let waiting = setup.event("late", "waiting", 1).await?;
    ensure!(waiting[0]["error"]["class"] == "no_capacity", "{waiting:?}");
    let status = setup.session("status", "late").await?;
    ensure!(status["ok"]["why"][0].as_str().is_some_and(|w| w.contains("No GPU resources")), "{status}");

    let stubborn = setup.worker("g1", 1).await?;
    stubborn.lock().refuse = true;
    eventually("two refusals", SOON, || async { (stubborn.requests("assign").len() >= 2).then_some(()) }).await?;
    let mut epochs: Vec<u64> = stubborn.requests("assign").iter().filter_map(|r| r["epoch"].as_u64()).collect();
    // One whose answer was late is asked for again as it was.
    epochs.dedup();
    ensure!(epochs.windows(2).all(|w| w[1] > w[0]), "each attempt has its own epoch: {epochs:?}");
    stubborn.lock().refuse = false;
    eventually("taken at last", SOON, || async { stubborn.epoch("late") }).await?;
    stubborn.end("late", 0, second).await?;
    setup.state("late", "ended").await?;
    worker.stop.cancel();
    stubborn.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn a_smaller_model_is_given_to_the_worker_and_told() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0", 1).await?;
    // The worker has `small` only.
    let open = json!({ "session": "call", "options": { "model": "medium" } }).to_string();
    let opened = eventually("an acceptance", SOON, || async {
        setup.ask("session.open", open.clone()).await.ok().filter(|r| r["ok"].is_object())
    })
    .await?;
    ensure!(opened["ok"]["epoch"] == 1, "{opened}");
    let asked = worker.requests("assign");
    ensure!(asked[0]["options"]["model"] == "small", "{asked:?}");
    let record = setup.state("call", "assigned").await?;
    ensure!(record["options"]["model"] == "medium", "{record}");
    for (what, asked) in [("assigned", "model_asked"), ("degraded", "asked")] {
        let events = setup.event("call", what, 1).await?;
        ensure!(events[0]["detail"]["model"] == "small" && events[0]["detail"][asked] == "medium", "{events:?}");
    }
    let exact = json!({ "session": "other", "options": { "model": "medium", "policy": "exact_model" } }).to_string();
    ensure!(class(&setup.ask("session.open", exact).await?) == "model_missing");
    worker.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn a_waiting_session_whose_audio_expired_is_closed_and_its_id_can_speak_again() -> Result<()> {
    let mut setup = Setup::with(TopologyConfig { audio_max_age_s: 10, ..TopologyConfig::default() }).await?;
    let seq = setup.say("late", AUDIO, &[]).await?;
    setup.event("late", "waiting", 1).await?;
    // Its audio, then the flush behind it, are there for ten seconds each: longer than anything else is waited for here.
    eventually("the end of its audio", Duration::from_secs(60), || async {
        setup.events("late", "failed").await.ok().filter(|events| !events.is_empty())
    })
    .await?;
    let record = setup.state("late", "ended").await?;
    let stream = setup.js.get_stream("ASR_TRANSCRIPT").await?;
    let stored = stream.get_last_raw_message_by_subject("asr.v1.transcript.session.late.final").await?;
    let end: Value = serde_json::from_slice(&stored.payload)?;
    ensure!(end["index"] == 0, "{end}");
    ensure!(end["end"] == true && end["from_sample"] == 0 && end["to_sample"] == 0, "{end}");
    ensure!(end["lost"]["to_seq"].as_u64().is_some_and(|to| to >= seq), "{end}");
    ensure!(record["ended_seq"] == end["audio"]["to_seq"], "{record}");

    let worker = setup.worker("g0", 1).await?;
    setup.say("late", AUDIO, &[]).await?;
    worker.has("late", 1).await?;
    ensure!(setup.event("late", "failed", 1).await?.len() == 1);
    worker.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn hostile_requests_and_entries_get_their_answer_and_cost_nothing() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0", 4).await?;
    let deep = "[".repeat(10_000);
    let long = json!({ "session": "x".repeat(10_000) }).to_string();
    let cases = [
        "",
        "not json",
        "{}",
        "[]",
        "{\"session\":7}",
        "{\"session\":\"..\"}",
        "{\"session\":\"*\"}",
        "{\"session\":\">\"}",
        "{\"session\":\"a b\"}",
        "{\"session\":\"\u{e9}\"}",
        "{\"session\":\"a\",\"options\":{\"colour\":\"red\"}}",
        "{\"session\":\"a\",\"options\":{\"policy\":\"never\"}}",
        "{\"session\":\"a\",\"options\":{\"endpoint_ms\":1}}",
        "{\"session\":\"a\",\"options\":{\"min_speakers\":2}}",
        "{\"session\":\"a\",\"options\":7}",
        deep.as_str(),
        long.as_str(),
    ];
    for body in cases {
        let reply = setup.ask("session.open", body.to_owned()).await?;
        ensure!(class(&reply) == "bad_request", "{reply} to {}", &body[..body.len().min(40)]);
    }
    for body in ["{\"modell\":\"small\"}", "{\"sessions\":-1}", "[1]"] {
        let reply = setup.ask("plan", body).await?;
        ensure!(class(&reply) == "bad_request", "{reply} to {body}");
    }
    for body in ["{}", "{\"gpu_id\":\"a b\"}", "{\"gpu_id\":\"g0\",\"force\":true}"] {
        let reply = setup.ask("fleet.drain", body).await?;
        ensure!(class(&reply) == "bad_request", "{reply} to {body}");
    }
    ensure!(class(&setup.ask("fleet.drain", "{\"gpu_id\":\"nobody\"}").await?) == "not_found");
    ensure!(class(&setup.session("close", "nobody").await?) == "not_found");

    type Bad = (&'static [u8], &'static [(&'static str, &'static str)], &'static str);
    let bad: [Bad; 7] = [
        (b"", &[], "bad_request"),
        (b"odd", &[], "bad_audio"),
        (AUDIO, &[("Asr-Format", "pcm_s16le;rate=0")], "bad_audio"),
        (AUDIO, &[("Asr-Format", "mp3")], "unsupported_format"),
        (AUDIO, &[("Asr-Opt-Colour", "red")], "bad_request"),
        (b"", &[("Asr-End", "1")], "bad_request"),
        (b"OggS\0\0", &[], "unsupported_format"),
    ];
    for (n, (payload, headers, wanted)) in bad.iter().enumerate() {
        let seq = setup.say("bad", payload, headers).await?;
        let events = setup.event("bad", "rejected", n + 1).await?;
        let event = events.iter().find(|e| e["seq"] == seq).context("its event")?;
        ensure!(event["error"]["class"] == *wanted, "{event}");
    }
    setup.say("bad", AUDIO, &[]).await?;
    setup.event("bad", "rejected", bad.len() + 1).await?;
    ensure!(class(&setup.session("status", "bad").await?) == "not_found", "none of it opened a session");
    setup.say("bad", AUDIO, &[("Asr-Format", "pcm_s16le")]).await?;
    worker.has("bad", 1).await?;
    setup.say("no!name", AUDIO, &[]).await?;
    setup.event("_invalid", "rejected", 1).await?;
    let status = setup.ask("fleet.status", "").await?;
    ensure!(status["ok"]["sessions_assigned"] == 1 && status["ok"]["workers"][0]["health"] == "alive", "{status}");
    worker.stop.cancel();
    setup.finish().await
}
