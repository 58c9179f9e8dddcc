//! File jobs at the dispatcher alone, on a real nats-server, with a worker that is nothing but NATS messages.

mod limits;
mod path;
mod trouble;

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
            let ended = voxfleet_dispatcher::run(nats, config, voxfleet_trace::Tracer::off(), token).await;
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

    /// Nobody waits for what is published at the door.
    async fn nobody_pulls(&self) -> Result<()> {
        eventually("a door that nobody pulls from", SOON, || async {
            let door = self.js.get_stream("ASR_JOBS").await.ok()?;
            let mut intake: jetstream::consumer::PullConsumer = door.get_consumer("dispatcher").await.ok()?;
            (intake.info().await.ok()?.num_waiting == 0).then_some(())
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
        self.give_up_with(taken, json!({ "class": class, "message": "as the test says" })).await
    }

    async fn give_up_with(&self, taken: Taken, failure: Value) -> Result<()> {
        {
            let mut state = self.lock();
            state.held.remove(taken.item.job.as_str());
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
