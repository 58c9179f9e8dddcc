//! What each role tries and must not be able to do, with plain clients that know nothing of our code.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::Client;
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};
use voxfleet_harness::{
    fleet::Fleet,
    login::{Keys, Refusals},
};

/// One role's own connection.
struct Intruder {
    role: &'static str,
    client: Client,
    refused: Refusals,
}

impl Intruder {
    /// Publishes there, with a reply subject of its own, and must be told that it may not.
    async fn publishes(&self, subject: &str, body: &Value) -> Result<()> {
        let inbox = self.client.new_inbox();
        self.client.publish_with_reply(subject.to_owned(), inbox, body.to_string().into()).await?;
        self.client.flush().await?;
        self.refused.wait(subject).await.with_context(|| self.role)
    }

    async fn asks(&self, request: &str, body: Value) -> Result<()> {
        self.publishes(&format!("$JS.API.{request}"), &body).await
    }

    async fn listens(&self, subject: &str) -> Result<()> {
        let _kept = self.client.subscribe(subject.to_owned()).await?;
        self.client.flush().await?;
        self.refused.wait(subject).await.with_context(|| self.role)
    }
}

/// What every role but the operator is refused.
const STREAMS: [&str; 10] = [
    "ASR_AUDIO",
    "ASR_LIVE",
    "ASR_JOBS",
    "ASR_WORK",
    "ASR_TRANSCRIPT",
    "ASR_CHECKPOINT",
    "ASR_PARTIAL",
    "ASR_EVENT",
    "ASR_DEAD",
    "OBJ_asr_media",
];
const BUCKETS: [&str; 4] = ["asr_sessions", "asr_jobs", "asr_fleet", "asr_control"];

pub(super) async fn everything_else(fleet: &Fleet, keys: &Keys, account: &str) -> Result<()> {
    let before = streams(fleet).await?;
    for role in ["producer", "viewer", "worker", "dispatcher", "operator"] {
        let (client, refused) = keys.login(account, role).connect(fleet.urls()).await?;
        let intruder = Intruder { role, client, refused };
        // A role may publish: a check that would always find a refusal finds none here.
        let own = format!("_INBOX_{role}.own");
        ensure!(intruder.refused.wait_none(&intruder.client, &own).await?, "{role} may not publish to {own}");
        if role != "operator" {
            destroys(&intruder).await?;
        }
        match role {
            "producer" => as_producer(&intruder).await?,
            "viewer" => as_viewer(&intruder).await?,
            "worker" => as_worker(&intruder).await?,
            "dispatcher" => as_dispatcher(&intruder).await?,
            _ => as_operator(&intruder).await?,
        }
    }
    let after = streams(fleet).await?;
    ensure!(before == after, "streams changed:\n{before:?}\n{after:?}");
    Ok(())
}

/// What is stored where nobody has anything to store now: name, first and last sequence.
async fn streams(fleet: &Fleet) -> Result<Vec<(String, u64, u64)>> {
    let js = fleet.js();
    let names: Vec<String> = js.stream_names().try_collect().await?;
    let mut found = Vec::new();
    for name in names {
        let info = js.get_stream(&name).await?.get_info().await?;
        // The dispatcher writes buckets and events all the time.
        if !name.starts_with("KV_") && name != "ASR_EVENT" {
            found.push((name, info.state.first_sequence, info.state.last_sequence));
        }
    }
    found.sort();
    Ok(found)
}

async fn destroys(one: &Intruder) -> Result<()> {
    let streams = STREAMS.into_iter().map(str::to_owned).chain(BUCKETS.map(|bucket| format!("KV_{bucket}")));
    for stream in streams {
        one.asks(&format!("STREAM.DELETE.{stream}"), json!({})).await?;
        // A dispatcher gives its own streams more replicas.
        if one.role != "dispatcher" {
            one.asks(&format!("STREAM.UPDATE.{stream}"), json!({"name": stream})).await?;
        }
        one.asks(&format!("STREAM.SNAPSHOT.{stream}"), json!({"deliver_subject": "x"})).await?;
    }
    for stream in ["ASR_AUDIO", "ASR_TRANSCRIPT", "ASR_CHECKPOINT", "ASR_JOBS", "ASR_DEAD", "ASR_EVENT"] {
        one.asks(&format!("STREAM.PURGE.{stream}"), json!({})).await?;
    }
    for stream in ["ASR_AUDIO", "ASR_TRANSCRIPT", "ASR_CHECKPOINT"] {
        one.asks(&format!("STREAM.MSG.DELETE.{stream}"), json!({"seq": 1})).await?;
    }
    one.asks("STREAM.CREATE.MINE", json!({"name": "MINE", "subjects": ["asr.v1.audio.*"]})).await?;
    one.asks("STREAM.LIST", json!({})).await?;
    one.asks("CONSUMER.DURABLE.CREATE.ASR_TRANSCRIPT.mine", json!({})).await?;
    // Its filter is not in the subject, so the server could not hold it to one.
    one.asks("CONSUMER.CREATE.ASR_TRANSCRIPT.mine", json!({})).await?;
    one.asks("CONSUMER.DELETE.ASR_TRANSCRIPT.mine", json!({})).await?;
    one.publishes("$KV.other.key", &json!({})).await?;
    one.publishes("other.subject", &json!({})).await?;
    one.publishes("$SRV.PING", &json!({})).await?;
    for subject in [">", "asr.v1.>", "$JS.>", "_INBOX.>", "_INBOX_operator.>", "asr.v1.audio.*", "asr.v1.checkpoint.>"]
    {
        one.listens(subject).await?;
    }
    Ok(())
}

/// Not theirs: publishes of workers and dispatchers.
const WORKERS: [&str; 9] = [
    "asr.v1.transcript.session.talk.final",
    "asr.v1.transcript.session.talk.revision",
    "asr.v1.transcript.session.talk.partial",
    "asr.v1.checkpoint.session.talk",
    "asr.v1.heartbeat.gpu-1",
    "asr.v1.event.session.talk.ended",
    "asr.v1.dead.session.talk",
    "asr.v1.gpu.gpu-1.i.live.talk",
    "asr.v1.gpu.gpu-1.i.job.rec",
];

async fn clients_part(one: &Intruder) -> Result<()> {
    for subject in WORKERS {
        one.publishes(subject, &json!({})).await?;
    }
    for bucket in BUCKETS {
        one.publishes(&format!("$KV.{bucket}.talk"), &json!({})).await?;
        one.asks(&format!("STREAM.MSG.GET.KV_{bucket}"), json!({"seq": 1})).await?;
    }
    // Audio of others, and voice prints.
    let read = json!({"last_by_subj": "asr.v1.audio.talk"});
    one.asks("STREAM.MSG.GET.ASR_AUDIO", read.clone()).await?;
    one.asks("DIRECT.GET.ASR_AUDIO", read).await?;
    one.asks("DIRECT.GET.ASR_AUDIO.asr.v1.audio.talk", json!({})).await?;
    one.asks("CONSUMER.CREATE.ASR_AUDIO.c.asr.v1.audio.>", json!({})).await?;
    one.asks("STREAM.MSG.GET.ASR_CHECKPOINT", json!({"seq": 1})).await?;
    one.asks("CONSUMER.CREATE.ASR_CHECKPOINT.c.asr.v1.checkpoint.>", json!({})).await?;
    // What failed, with where its recording lies.
    one.asks("STREAM.MSG.GET.ASR_DEAD", json!({"seq": 1})).await?;
    one.asks("CONSUMER.CREATE.ASR_DEAD.c.asr.v1.dead.>", json!({})).await?;
    one.asks("CONSUMER.MSG.NEXT.ASR_JOBS.dispatcher", json!({"batch": 1})).await?;
    one.asks("CONSUMER.MSG.NEXT.ASR_WORK.gpu-1=i", json!({"batch": 1})).await?;
    one.publishes("asr.v1.control.gpu-1.i", &json!({"cmd": "drain"})).await?;
    one.publishes("asr.v1.api.fleet.drain", &json!({"gpu_id": "gpu-1"})).await?;
    one.publishes("$JS.ACK.ASR_WORK.gpu-1=i.1.1.1.1.1", &json!({})).await?;
    for subject in [
        "asr.v1.api.>",
        "asr.v1.control.>",
        "asr.v1.jobs.>",
        "asr.v1.dead.>",
        "asr.v1.gpu.>",
        "_INBOX_worker.>",
        "_INBOX_dispatcher.>",
    ] {
        one.listens(subject).await?;
    }
    // A filter outside of what may be read is refused even where its subject says otherwise.
    let body = json!({"stream_name": "ASR_TRANSCRIPT", "config": {"name": "c", "filter_subject": "asr.v1.transcript.>", "ack_policy": "none"}});
    one.asks("CONSUMER.CREATE.ASR_AUDIO.c.asr.v1.transcript.>", body).await
}

async fn as_producer(one: &Intruder) -> Result<()> {
    clients_part(one).await?;
    one.asks("STREAM.PURGE.OBJ_asr_media", json!({})).await?;
    one.listens("asr.v1.heartbeat.*").await?;
    one.listens("_INBOX_viewer.>").await
}

async fn as_viewer(one: &Intruder) -> Result<()> {
    clients_part(one).await?;
    for subject in ["asr.v1.audio.talk", "asr.v1.jobs.normal.mine", "$O.asr_media.M.a2V5", "$O.asr_media.C.n"] {
        one.publishes(subject, &json!({})).await?;
    }
    for request in ["session.open", "session.close", "job.submit", "job.status", "job.list", "job.cancel", "plan"] {
        one.publishes(&format!("asr.v1.api.{request}"), &json!({})).await?;
    }
    // Recordings lie there.
    one.asks("STREAM.MSG.GET.OBJ_asr_media", json!({"seq": 1})).await?;
    one.asks("CONSUMER.CREATE.OBJ_asr_media.c.$O.asr_media.>", json!({})).await?;
    one.listens("_INBOX_producer.>").await
}

async fn as_worker(one: &Intruder) -> Result<()> {
    for subject in
        ["asr.v1.audio.talk", "asr.v1.gpu.gpu-1.i.live.talk", "asr.v1.gpu.gpu-1.i.job.rec", "asr.v1.control.gpu-2.i"]
    {
        one.publishes(subject, &json!({})).await?;
    }
    for request in [
        "session.open",
        "session.close",
        "session.status",
        "session.list",
        "job.submit",
        "job.status",
        "job.list",
        "job.cancel",
        "fleet.status",
        "fleet.drain",
        "plan",
    ] {
        one.publishes(&format!("asr.v1.api.{request}"), &json!({})).await?;
    }
    for bucket in BUCKETS {
        one.publishes(&format!("$KV.{bucket}.talk"), &json!({})).await?;
        // Records say who speaks where, and with which options.
        one.asks(&format!("STREAM.MSG.GET.KV_{bucket}"), json!({"last_by_subj": format!("$KV.{bucket}.talk")})).await?;
        one.asks(&format!("CONSUMER.CREATE.KV_{bucket}.c.$KV.{bucket}.>"), json!({})).await?;
    }
    one.asks("STREAM.MSG.GET.ASR_DEAD", json!({"seq": 1})).await?;
    one.asks("CONSUMER.CREATE.ASR_LIVE.c.asr.v1.gpu.*.*.live.*", json!({})).await?;
    one.asks("CONSUMER.DELETE.ASR_WORK.gpu-1=i", json!({})).await?;
    one.asks("STREAM.PURGE.ASR_WORK", json!({})).await?;
    one.asks("STREAM.PURGE.OBJ_asr_media", json!({})).await?;
    one.asks("CONSUMER.MSG.NEXT.ASR_JOBS.dispatcher", json!({"batch": 1})).await?;
    one.publishes("$JS.ACK.ASR_JOBS.dispatcher.1.1.1.1.1", &json!({})).await?;
    for subject in ["asr.v1.api.>", "asr.v1.transcript.>", "_INBOX_dispatcher.>"] {
        one.listens(subject).await?;
    }
    Ok(())
}

async fn as_dispatcher(one: &Intruder) -> Result<()> {
    for subject in [
        "asr.v1.transcript.session.talk.partial",
        "asr.v1.checkpoint.session.talk",
        "asr.v1.heartbeat.gpu-1",
        "asr.v1.jobs.high.mine",
    ] {
        one.publishes(subject, &json!({})).await?;
    }
    // Voice prints are the workers' alone.
    one.asks("STREAM.MSG.GET.ASR_CHECKPOINT", json!({"seq": 1})).await?;
    one.asks("CONSUMER.CREATE.ASR_CHECKPOINT.c.asr.v1.checkpoint.>", json!({})).await?;
    one.asks("CONSUMER.MSG.NEXT.ASR_WORK.gpu-1=i", json!({"batch": 1})).await?;
    one.listens("asr.v1.control.>").await
}

/// Whoever may do nearly everything may still not speak for others.
async fn as_operator(one: &Intruder) -> Result<()> {
    for subject in WORKERS {
        one.publishes(subject, &json!({})).await?;
    }
    for subject in ["asr.v1.audio.talk", "$KV.other.key", "$SYS.REQ.SERVER.PING", "_INBOX_worker.x"] {
        one.publishes(subject, &json!({})).await?;
    }
    for subject in [">", "$SYS.>", "_INBOX_worker.>"] {
        one.listens(subject).await?;
    }
    Ok(())
}

trait Allowed {
    async fn wait_none(&self, client: &Client, subject: &str) -> Result<bool>;
}

impl Allowed for Refusals {
    /// Whether a message comes through on `subject`, which is one's own.
    async fn wait_none(&self, client: &Client, subject: &str) -> Result<bool> {
        let mut heard = client.subscribe(subject.to_owned()).await?;
        client.publish(subject.to_owned(), "x".into()).await?;
        client.flush().await?;
        let came = tokio::time::timeout(Duration::from_secs(5), heard.next()).await?.is_some();
        Ok(came && self.all().is_empty())
    }
}
