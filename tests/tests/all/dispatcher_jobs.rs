//! File jobs at the dispatcher alone, on a real nats-server, with a worker that is nothing but NATS messages.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::{HeaderMap, jetstream};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use voxfleet_dispatcher::DispatcherConfig;
use voxfleet_harness::{
    process::{Dispatcher, Settings},
    server::NatsServer,
    wait::eventually,
};
use voxfleet_nats::{Nats, NatsConfig};
use voxfleet_schema::job::WorkItem;

const SOON: Duration = Duration::from_secs(20);

/// A server, a dispatcher, and what was started with them.
struct Setup {
    server: NatsServer,
    js: jetstream::Context,
    client: async_nats::Client,
    config: DispatcherConfig,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    workers: JoinSet<()>,
}

impl Setup {
    async fn new() -> Result<Self> {
        let mut setup = Self::bare().await?;
        setup.start_dispatcher("d1").await?;
        setup.ask("fleet.status", json!({})).await?;
        Ok(setup)
    }

    async fn bare() -> Result<Self> {
        let server = NatsServer::start().await?;
        let (js, client) = (server.jetstream().await?, server.client().await?);
        let config = DispatcherConfig { lease_ms: 1_500, ..DispatcherConfig::default() };
        Ok(Self {
            server,
            js,
            client,
            config,
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
            workers: JoinSet::new(),
        })
    }

    async fn start_dispatcher(&mut self, name: &str) -> Result<()> {
        let config = NatsConfig { urls: vec![self.server.url()], ..NatsConfig::default() };
        let nats = Nats::connect(&config, name).await?;
        let token = self.stop.clone();
        let config = DispatcherConfig { name: name.to_owned(), ..self.config.clone() };
        self.tasks.spawn(async move {
            let ended = voxfleet_dispatcher::run(nats, config, token).await;
            assert!(ended.is_ok(), "dispatcher: {ended:?}");
        });
        Ok(())
    }

    async fn worker(&mut self, gpu: &str) -> Result<Worker> {
        let worker = Worker::start(&self.client, &self.js, gpu, &mut self.workers).await?;
        eventually(&format!("consumers of {gpu}"), SOON, || async { worker.consumer().await.ok() }).await?;
        Ok(worker)
    }

    async fn ask(&self, endpoint: &str, body: Value) -> Result<Value> {
        let (body, subject) = (Bytes::from(body.to_string()), format!("asr.v1.api.{endpoint}"));
        let reply = eventually(format!("an answer to {endpoint}"), SOON, || async {
            let asked = self.client.request(subject.clone(), body.clone());
            tokio::time::timeout(Duration::from_secs(3), asked).await.ok()?.ok()
        });
        Ok(serde_json::from_slice(&reply.await?.payload)?)
    }

    async fn submit(&self, id: &str) -> Result<Value> {
        self.ask("job.submit", request(id)).await
    }

    /// A bare publish, and its place in the stream.
    async fn publish(&self, priority: &str, id: &str, content_type: Option<&str>, body: Vec<u8>) -> Result<u64> {
        let mut headers = HeaderMap::new();
        if let Some(content_type) = content_type {
            headers.insert("Content-Type", content_type);
        }
        let subject = format!("asr.v1.jobs.{priority}.{id}");
        Ok(self.js.publish_with_headers(subject, headers, body.into()).await?.await?.sequence)
    }

    async fn status(&self, id: &str) -> Result<Value> {
        self.ask("job.status", json!({ "job": id })).await
    }

    /// The record in the bucket once it is as wanted.
    async fn record(&self, id: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let bucket = self.js.get_key_value("asr_jobs").await?;
        let found = eventually(format!("record of {id}"), SOON, || async {
            let bytes = bucket.get(id).await.ok()??;
            serde_json::from_slice::<Value>(&bytes).ok().filter(|v| wanted(v))
        });
        match found.await {
            Ok(record) => Ok(record),
            Err(_) => {
                let bytes = bucket.get(id).await?;
                bail!("{id} is {:?}", bytes.map(|b| String::from_utf8_lossy(&b).into_owned()))
            }
        }
    }

    async fn state(&self, id: &str, state: &str) -> Result<Value> {
        self.record(id, |v| v["state"] == state).await
    }

    /// Every message in a stream under a subject.
    async fn read(&self, stream: &str, subject: &str) -> Result<Vec<Value>> {
        let stream = self.js.get_stream(stream).await?;
        let config = jetstream::consumer::pull::OrderedConfig { filter_subject: subject.into(), ..Default::default() };
        let consumer = stream.create_consumer(config).await?;
        let pending = consumer.cached_info().num_pending as usize;
        let mut messages = consumer.messages().await?.take(pending);
        let mut found = Vec::new();
        while let Some(message) = messages.next().await {
            found.push(serde_json::from_slice(&message?.payload)?);
        }
        Ok(found)
    }

    async fn events(&self, job: &str, what: &str) -> Result<Vec<Value>> {
        self.read("ASR_EVENT", &format!("asr.v1.event.job.{job}.{what}")).await
    }

    async fn event(&self, job: &str, what: &str) -> Result<Value> {
        let event = eventually(format!("{what} of {job}"), SOON, || async {
            self.events(job, what).await.ok()?.into_iter().next_back()
        });
        Ok(event.await?)
    }

    async fn dead(&self, job: &str) -> Result<Vec<Value>> {
        self.read("ASR_DEAD", &format!("asr.v1.dead.job.{job}")).await
    }

    async fn finals(&self, job: &str) -> Result<Vec<Value>> {
        self.read("ASR_TRANSCRIPT", &format!("asr.v1.transcript.job.{job}.final")).await
    }

    /// Everything that was pulled from the door has been answered.
    async fn door_is_empty(&self) -> Result<()> {
        eventually("an empty ASR_JOBS", SOON, || async {
            let mut stream = self.js.get_stream("ASR_JOBS").await.ok()?;
            (stream.info().await.ok()?.state.messages == 0).then_some(())
        })
        .await
        .map_err(Into::into)
    }

    async fn finish(mut self) -> Result<()> {
        self.stop.cancel();
        while let Some(done) = self.tasks.join_next().await {
            ensure!(!done.is_err_and(|e| e.is_panic()), "a dispatcher failed");
        }
        self.workers.shutdown().await;
        Ok(())
    }
}

fn request(id: &str) -> Value {
    json!({ "job": id, "audio": "https://audio.example/a.wav" })
}

fn class(reply: &Value) -> &str {
    reply["error"]["class"].as_str().unwrap_or("not refused")
}

#[derive(Default)]
struct Holding {
    held: BTreeMap<String, (u64, Option<u64>)>,
    given_up: Vec<Value>,
    requests: Vec<Value>,
    silent: bool,
    slots: u32,
}

/// A worker: heartbeats, answers to control requests; it fetches, finishes and gives up when the test says so.
struct Worker {
    gpu: String,
    incarnation: String,
    js: jetstream::Context,
    state: Arc<Mutex<Holding>>,
}

impl Worker {
    async fn start(
        client: &async_nats::Client,
        js: &jetstream::Context,
        gpu: &str,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self> {
        let holding = Holding { slots: 1, ..Holding::default() };
        let worker = Self {
            gpu: gpu.to_owned(),
            incarnation: format!("i{}", uuid::Uuid::new_v4().simple()),
            js: js.clone(),
            state: Arc::new(Mutex::new(holding)),
        };
        let mut control = client.subscribe(format!("asr.v1.control.{gpu}.{}", worker.incarnation)).await?;
        let (state, client) = (worker.state.clone(), client.clone());
        let (name, incarnation) = (worker.gpu.clone(), worker.incarnation.clone());
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(250));
            let mut seq = 0;
            loop {
                tokio::select! {
                    _ = ticks.tick() => {
                        seq += 1;
                        if let Some(beat) = heartbeat(&name, &incarnation, seq, &state)
                            && client.publish(format!("asr.v1.heartbeat.{name}"), beat.to_string().into()).await.is_err()
                        {
                            return;
                        }
                    }
                    request = control.next() => {
                        let Some(request) = request else { return };
                        answer(&request.payload, &state);
                        if let Some(to) = request.reply && client.publish(to, "\"done\"".into()).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(worker)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Holding> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn released(&self, id: &str) -> Option<u64> {
        let state = self.lock();
        state.requests.iter().find(|r| r["do"] == "release" && r["id"] == id).and_then(|r| r["epoch"].as_u64())
    }

    async fn consumer(&self) -> Result<jetstream::consumer::PullConsumer> {
        let stream = self.js.get_stream("ASR_WORK").await?;
        let name = format!("{}={}", self.gpu, self.incarnation);
        stream.get_consumer(&name).await.map_err(|e| anyhow::anyhow!("{name}: {e}"))
    }

    /// Fetches the next work item and holds it.
    async fn take(&self) -> Result<Taken> {
        let message = eventually(format!("work for {}", self.gpu), SOON, || async {
            let consumer = self.consumer().await.ok()?;
            let fetched = consumer.fetch().max_messages(1).expires(Duration::from_secs(2)).messages().await;
            fetched.ok()?.next().await?.ok()
        });
        let message = message.await?;
        let item: WorkItem = rmp_serde::from_slice(&message.payload)?;
        self.lock().held.insert(item.job.to_string(), (item.epoch, None));
        Ok(Taken { item, message })
    }

    /// Stores the end final, keeps the job until it is told to let go, and acks.
    async fn end(&self, taken: Taken) -> Result<()> {
        let (id, epoch) = (taken.item.job.as_str(), taken.item.epoch);
        let result = format!("object://asr_media/result/{id}/f.json");
        self.store(id, 0, epoch, true, Some(&result)).await?;
        taken.ack().await
    }

    async fn store(&self, id: &str, index: u64, epoch: u64, end: bool, result: Option<&str>) -> Result<()> {
        let resume = json!({
            "seq": 1, "at_sample": 0, "at_frame": 0, "format": "pcm_s16le;rate=16000;channels=1", "format_sample": 0,
            "sources": [], "asr_seq": null, "asr_seen": 0,
        });
        let body = json!({
            "kind": "job", "id": id, "index": index, "final_id": uuid::Uuid::new_v4().to_string(), "epoch": epoch,
            "gpu_id": self.gpu, "model": "small", "device": "cpu", "engine": "simulated", "vad": "silero",
            "from_sample": 0, "to_sample": 32_000, "audio": { "from_seq": 1, "to_seq": 2 }, "resume": resume,
            "segments": [], "speech_final": true, "end": end, "result": result, "timings": {},
        });
        let subject = format!("asr.v1.transcript.job.{id}.final");
        self.js.publish(subject, body.to_string().into()).await?.await?;
        if let Some(held) = self.lock().held.get_mut(id) {
            held.1 = Some(index);
        }
        Ok(())
    }

    async fn give_up(&self, taken: Taken, class: &str) -> Result<()> {
        {
            let mut state = self.lock();
            state.held.remove(taken.item.job.as_str());
            let failure = json!({ "class": class, "message": "as the test says" });
            let said = json!({ "kind": "job", "id": taken.item.job, "epoch": taken.item.epoch, "failure": failure });
            state.given_up.push(said);
        }
        taken.ack().await
    }

    async fn let_go(&self, id: &str) -> Result<()> {
        eventually(format!("{} lets {id} go", self.gpu), SOON, || async {
            (!self.lock().held.contains_key(id)).then_some(())
        })
        .await
        .map_err(Into::into)
    }
}

struct Taken {
    item: WorkItem,
    message: jetstream::Message,
}

impl Taken {
    async fn ack(&self) -> Result<()> {
        self.message.double_ack().await.map_err(|e| anyhow::anyhow!("{e}"))
    }
}

fn heartbeat(gpu: &str, incarnation: &str, seq: u64, state: &Mutex<Holding>) -> Option<Value> {
    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if state.silent {
        return None;
    }
    let progress = json!({ "stage": "transcribing", "done_ms": 1_000, "total_ms": 2_000 });
    let row = |(id, (epoch, index)): (&String, &(u64, Option<u64>))| json!({ "kind": "job", "id": id, "epoch": epoch, "final_index": index, "progress": progress });
    let held: Vec<Value> = state.held.iter().map(row).collect();
    Some(json!({
        "gpu_id": gpu, "incarnation": incarnation, "seq": seq, "sent_ms": 0, "host": "test", "pid": 1,
        "provider": "local",
        "device": {
            "index": 0, "name": "test", "total_mb": 24_000, "free_mb": 20_000, "used_mb": 0, "used_by_others_mb": 0,
        },
        "slots": { "total": 0, "used": 0 }, "job_slots": { "total": state.slots, "used": held.len() }, "held": held,
        "given_up": state.given_up,
        "models": [{ "name": "small", "state": "available", "resident_mb": 0, "expected_mb": 852 }],
        "engine": {
            "state": "ready", "kind": "simulated", "effective_device": "cuda:test", "vad": "silero",
            "ms_since_progress": 0, "restarts": 0,
        },
        "draining": false, "version": "test",
    }))
}

fn answer(body: &[u8], state: &Mutex<Holding>) {
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let request: Value = serde_json::from_slice(body).unwrap_or_default();
    if request["do"] == "release" {
        let id = request["id"].as_str().unwrap_or_default();
        let epoch = request["epoch"].as_u64().unwrap_or_default();
        if state.held.get(id).is_some_and(|(held, _)| *held <= epoch) {
            state.held.remove(id);
        }
    }
    state.requests.push(request);
}

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
        dead.len() == 1 && dead[0]["body"] == "{\"audoi\":" && dead[0]["error"]["class"] == "bad_request",
        "{dead:?}"
    );

    setup.publish("normal", "other", None, request("one").to_string().into()).await?;
    setup.event("other", "rejected").await?;
    setup.publish("urgent", "hurry", None, request("hurry").to_string().into()).await?;
    setup.event("hurry", "rejected").await?;
    setup.publish("normal", "bytes", Some("application/msgpack"), vec![0xff, 0xfe]).await?;
    setup.event("bytes", "rejected").await?;
    ensure!(setup.dead("bytes").await?[0]["body_base64"] == "//4=");
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

#[tokio::test]
async fn a_passing_trouble_is_tried_again_and_not_for_ever() -> Result<()> {
    let mut setup = Setup::bare().await?;
    setup.config.max_attempts = 2;
    setup.start_dispatcher("d1").await?;
    let worker = setup.worker("g0").await?;
    setup.submit("flaky").await?;
    worker.give_up(worker.take().await?, "unavailable").await?;
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
    setup
        .publish("normal", "knocks", None, json!({ "audio": "https://audio.example/b.wav" }).to_string().into())
        .await?;
    worker.end(runs).await?;
    let _second = Dispatcher::start("d2", &settings, folder.path())?;
    setup.state("runs", "done").await?;
    let mut seen = Vec::new();
    for _ in 0..2 {
        let taken = worker.take().await?;
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
