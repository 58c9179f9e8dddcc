//! Time, room and floods.

use super::*;

#[tokio::test]
async fn results_expire_with_their_recordings_and_then_their_keys() -> Result<()> {
    let mut setup = Setup::new().await?;
    setup.stop.cancel();
    while setup.tasks.join_next().await.is_some() {}
    let store = setup.js.get_object_store("asr_media").await?;
    for key in ["audio/old", "result/old/f.json", "calls/theirs.wav"] {
        store.put(key, &mut &b"bytes"[..]).await?;
    }
    let bucket = setup.js.get_key_value("asr_jobs").await?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis() as u64;
    let record = |id: &str, ended_ms: u64, expired: bool| {
        Bytes::from(
            json!({
                "id": id, "state": "done", "audio": format!("object://asr_media/audio/{id}"), "options": {},
                "result_ttl_s": 60, "epoch": 1, "attempts": 1, "submitted_ms": 1, "changed_ms": 1, "ended_ms": ended_ms,
                "result": format!("object://asr_media/result/{id}/f.json"), "expired": expired,
            })
            .to_string(),
        )
    };
    bucket.create("old", record("old", now - 61_000, false)).await?;
    bucket.create("fresh", record("fresh", now, false)).await?;
    bucket.create("ancient", record("ancient", now - 40 * 86_400_000, true)).await?;
    setup.stop = CancellationToken::new();
    setup.start_dispatcher("d2").await?;
    setup.record("old", |v| v["expired"] == true).await?;
    setup.event("old", "expired").await?;
    for gone in ["audio/old", "result/old/f.json"] {
        ensure!(store.info(gone).await.is_err(), "{gone} is still there");
    }
    ensure!(store.info("calls/theirs.wav").await.is_ok());
    eventually("the oldest key goes", SOON, || async { bucket.get("ancient").await.ok()?.is_none().then_some(()) })
        .await?;
    let left = setup.js.get_stream("KV_asr_jobs").await?.get_last_raw_message_by_subject("$KV.asr_jobs.ancient").await;
    ensure!(left.is_err(), "a marker would stay for ever: {left:?}");
    ensure!(bucket.get("fresh").await?.is_some());
    let status = setup.status("old").await?;
    ensure!(status["ok"]["record"]["expired"] == true, "{status}");
    setup.finish().await
}

#[tokio::test]
async fn a_full_bucket_loses_keys_with_their_results() -> Result<()> {
    let mut setup = Setup::bare().await?;
    setup.config.topology.bucket_max_bytes = 1 << 20;
    setup.start_dispatcher("d1").await?;
    setup.ask("fleet.status", json!({})).await?;
    setup.stop.cancel();
    while setup.tasks.join_next().await.is_some() {}
    let store = setup.js.get_object_store("asr_media").await?;
    store.put("result/old/f.json", &mut &b"bytes"[..]).await?;
    let bucket = setup.js.get_key_value("asr_jobs").await?;
    let record = json!({
        "id": "old", "state": "done", "audio": "s3://b/k", "options": {}, "result_ttl_s": 60, "epoch": 1, "attempts": 1,
        "submitted_ms": 1, "changed_ms": 1, "ended_ms": 1, "result": "object://asr_media/result/old/f.json",
    });
    bucket.create("old", record.to_string().into()).await?;
    for size in [200_000, 20_000, 2_000, 200, 1] {
        for n in 0.. {
            if bucket.create(format!("fill-{size}-{n}"), vec![b'x'; size].into()).await.is_err() {
                break;
            }
        }
    }
    setup.stop = CancellationToken::new();
    setup.start_dispatcher("d2").await?;
    setup.event("old", "expired").await?;
    eventually("the key goes too", SOON, || async { bucket.get("old").await.ok()?.is_none().then_some(()) }).await?;
    ensure!(store.info("result/old/f.json").await.is_err());
    let refused = setup.submit("new").await?;
    ensure!(class(&refused) == "no_capacity" && refused["error"]["retry_after_ms"].is_u64(), "{refused}");
    setup.finish().await
}

#[tokio::test]
async fn where_nothing_can_be_put_away_jobs_end_all_the_same() -> Result<()> {
    let mut setup = Setup::bare().await?;
    setup.config.topology.dead_max_bytes = 1 << 20;
    setup.start_dispatcher("d1").await?;
    let worker = setup.worker("g0").await?;
    for size in [200_000, 20_000, 2_000, 200, 1] {
        for _ in 0..1_000 {
            let sent = setup.js.publish("asr.v1.dead.job.filler", vec![b'x'; size].into()).await?;
            if sent.await.is_err() {
                break;
            }
        }
    }
    setup.submit("noise").await?;
    worker.give_up(worker.take().await?, "bad_audio").await?;
    setup.state("noise", "failed").await?;
    let failed = setup.event("noise", "failed").await?;
    ensure!(failed["detail"]["not_kept"] == "ASR_DEAD is full", "{failed}");
    setup.publish("normal", "broken", None, b"{\"audoi\":".to_vec()).await?;
    let rejected = setup.event("broken", "rejected").await?;
    ensure!(rejected["detail"]["not_kept"] == "ASR_DEAD is full", "{rejected}");
    setup.door_is_empty().await?;
    setup.finish().await
}

#[tokio::test]
async fn a_flood_of_lists_is_answered_and_disturbs_nobody() -> Result<()> {
    let setup = Setup::new().await?;
    setup.submit("call").await?;
    let ask = || setup.client.request("asr.v1.api.job.list", "{}".into());
    let replies = futures_util::future::join_all((0..300).map(|_| ask())).await;
    let (mut listed, mut refused) = (0, 0);
    for reply in replies {
        let reply: Value = serde_json::from_slice(&reply?.payload)?;
        match reply["ok"]["total"].as_u64() {
            Some(1) => listed += 1,
            _ if class(&reply) == "no_capacity" && reply["error"]["retry_after_ms"].is_u64() => refused += 1,
            _ => bail!("{reply}"),
        }
    }
    ensure!(listed >= 1 && listed + refused == 300, "{listed} lists, {refused} refusals");
    setup.finish().await
}

#[tokio::test]
async fn lists_are_newest_first_and_can_be_narrowed() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0").await?;
    for id in ["a", "b", "c"] {
        setup.submit(id).await?;
    }
    worker.end(worker.take().await?).await?;
    setup.state("a", "done").await?;
    setup.state("b", "assigned").await?;
    let running = worker.take().await?;
    let list = |body: Value| {
        let setup = &setup;
        async move {
            let reply = setup.ask("job.list", body).await?;
            let rows = reply["ok"]["jobs"].as_array().context("rows")?.clone();
            let ids: Vec<String> = rows.iter().filter_map(|r| r["job"].as_str().map(str::to_owned)).collect();
            anyhow::Ok((ids, reply["ok"]["total"].clone(), rows))
        }
    };
    let (ids, total, rows) = list(json!({})).await?;
    ensure!(ids == ["c", "b", "a"] && total == 3, "{ids:?}");
    ensure!(rows[1]["gpu_id"] == "g0" && rows[1]["state"] == "assigned", "{rows:?}");
    ensure!(list(json!({ "limit": 1 })).await?.0 == ["c"]);
    ensure!(list(json!({ "limit": 1 })).await?.1 == 3);
    ensure!(list(json!({ "state": "done" })).await?.0 == ["a"]);
    ensure!(class(&setup.ask("job.list", json!({ "status": "done" })).await?) == "bad_request");
    let fleet = setup.ask("fleet.status", json!({})).await?;
    ensure!(fleet["ok"]["jobs_queued"] == 1 && fleet["ok"]["jobs_assigned"] == 1, "{fleet}");
    worker.end(running).await?;
    setup.finish().await
}

#[tokio::test]
async fn a_full_queue_refuses_and_lets_publishes_wait() -> Result<()> {
    let mut setup = Setup::bare().await?;
    setup.config.jobs_max_queued = 1;
    setup.start_dispatcher("d1").await?;
    ensure!(setup.submit("one").await?["ok"]["state"] == "queued");
    let reply = setup.submit("two").await?;
    ensure!(class(&reply) == "no_capacity" && reply["error"]["retry_after_ms"].is_u64(), "{reply}");
    ensure!(setup.submit("one").await?["ok"]["state"] == "queued", "what is known is answered");
    setup.publish("normal", "three", None, json!({ "audio": "https://a.example/b" }).to_string().into()).await?;
    let worker = setup.worker("g0").await?;
    worker.end(worker.take().await?).await?;
    setup.state("one", "done").await?;
    let next = worker.take().await?;
    ensure!(next.item.job.as_str() == "three");
    ensure!(setup.events("three", "rejected").await?.is_empty());
    setup.finish().await
}
