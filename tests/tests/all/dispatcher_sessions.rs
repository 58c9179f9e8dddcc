//! The dispatcher alone, on a real nats-server, with a worker that is nothing but NATS messages.

mod device;
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
use voxfleet_harness::{server::NatsServer, wait::eventually};
use voxfleet_nats::{Nats, NatsConfig, topology::TopologyConfig};

const SOON: Duration = Duration::from_secs(15);
const AUDIO: &[u8] = &[0, 1, 0, 1];

/// A server, a dispatcher, and what was started with them.
struct Setup {
    server: NatsServer,
    js: jetstream::Context,
    client: async_nats::Client,
    topology: TopologyConfig,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Setup {
    async fn new() -> Result<Self> {
        Self::with(TopologyConfig::default()).await
    }

    async fn with(topology: TopologyConfig) -> Result<Self> {
        let server = NatsServer::start().await?;
        let (js, client) = (server.jetstream().await?, server.client().await?);
        let mut setup = Self { server, js, client, topology, stop: CancellationToken::new(), tasks: JoinSet::new() };
        setup.start_dispatcher("d1").await?;
        setup.ask("fleet.status", "").await?;
        Ok(setup)
    }

    async fn start_dispatcher(&mut self, name: &str) -> Result<CancellationToken> {
        let config = NatsConfig { urls: vec![self.server.url()], ..NatsConfig::default() };
        let nats = Nats::connect(&config, name).await?;
        let stop = self.stop.child_token();
        let topology = self.topology.clone();
        let config = DispatcherConfig {
            name: name.to_owned(),
            lease_ms: 1_500,
            restore_after_ms: 2_000,
            topology,
            ..DispatcherConfig::default()
        };
        let token = stop.clone();
        self.tasks.spawn(async move {
            let ended = voxfleet_dispatcher::run(nats, config, voxfleet_trace::Tracer::off(), token).await;
            assert!(ended.is_ok(), "dispatcher: {ended:?}");
        });
        Ok(stop)
    }

    async fn worker(&mut self, gpu: &str, slots: u32) -> Result<Worker> {
        Worker::start(&self.client, &self.js, gpu, slots, &mut self.tasks).await
    }

    /// Publishes an entry and returns its sequence.
    async fn say(&self, session: &str, payload: &'static [u8], headers: &[(&str, &str)]) -> Result<u64> {
        let mut map = HeaderMap::new();
        headers.iter().for_each(|(name, value)| map.insert(*name, *value));
        let subject = format!("asr.v1.audio.{session}");
        Ok(self.js.publish_with_headers(subject, map, Bytes::from_static(payload)).await?.await?.sequence)
    }

    async fn ask(&self, endpoint: &str, body: impl Into<Bytes>) -> Result<Value> {
        let (body, subject) = (body.into(), format!("asr.v1.api.{endpoint}"));
        let what = format!("an answer to {endpoint}");
        let reply = eventually(&what, SOON, || async {
            let asked = self.client.request(subject.clone(), body.clone());
            tokio::time::timeout(Duration::from_secs(3), asked).await.ok()?.ok()
        });
        Ok(serde_json::from_slice(&reply.await?.payload)?)
    }

    async fn session(&self, endpoint: &str, id: &str) -> Result<Value> {
        self.ask(&format!("session.{endpoint}"), json!({ "session": id }).to_string()).await
    }

    /// The record in the bucket once it is as wanted.
    async fn record(&self, id: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let bucket = self.js.get_key_value("asr_sessions").await?;
        let what = format!("record of {id}");
        let found = eventually(&what, SOON, || async {
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

    /// Everything in a stream under a subject, in order.
    async fn read(&self, stream: &str, subject: &str) -> Result<Vec<jetstream::message::StreamMessage>> {
        let stream = self.js.get_stream(stream).await?;
        let mut found = Vec::new();
        let mut next = 1;
        while let Ok(message) = stream.direct_get_next_for_subject(subject, Some(next)).await {
            next = message.sequence + 1;
            found.push(message);
        }
        Ok(found)
    }

    async fn events(&self, session: &str, what: &str) -> Result<Vec<Value>> {
        self.events_on(&format!("asr.v1.event.session.{session}.{what}")).await
    }

    async fn events_on(&self, subject: &str) -> Result<Vec<Value>> {
        let subject = subject.to_owned();
        let stream = self.js.get_stream("ASR_EVENT").await?;
        let config = jetstream::consumer::pull::OrderedConfig { filter_subject: subject, ..Default::default() };
        let consumer = stream.create_consumer(config).await?;
        let pending = consumer.cached_info().num_pending as usize;
        let mut messages = consumer.messages().await?.take(pending);
        let mut events = Vec::new();
        while let Some(message) = messages.next().await {
            events.push(serde_json::from_slice(&message?.payload)?);
        }
        Ok(events)
    }

    async fn event(&self, session: &str, what: &str, count: usize) -> Result<Vec<Value>> {
        eventually(&format!("{count} x {what} of {session}"), SOON, || async {
            self.events(session, what).await.ok().filter(|e| e.len() >= count)
        })
        .await
        .map_err(Into::into)
    }

    async fn log(&self, session: &str) -> Result<Vec<jetstream::message::StreamMessage>> {
        self.read("ASR_AUDIO", &format!("asr.v1.audio.{session}")).await
    }

    async fn finish(mut self) -> Result<()> {
        self.stop.cancel();
        while let Some(done) = self.tasks.join_next().await {
            ensure!(!done.is_err_and(|e| e.is_panic()), "a task failed");
        }
        Ok(())
    }
}

#[derive(Default)]
struct Holding {
    /// id -> (epoch, last final's index)
    held: BTreeMap<String, (u64, Option<u64>)>,
    requests: Vec<Value>,
    refuse: bool,
    silent: bool,
    /// What its heartbeats say otherwise.
    says: Value,
}

/// A worker: heartbeats, answers to control requests, and finals when the test says so.
struct Worker {
    gpu: String,
    incarnation: String,
    js: jetstream::Context,
    state: Arc<Mutex<Holding>>,
    stop: CancellationToken,
}

impl Worker {
    async fn start(
        client: &async_nats::Client,
        js: &jetstream::Context,
        gpu: &str,
        slots: u32,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self> {
        let worker = Self {
            gpu: gpu.to_owned(),
            incarnation: format!("i{}", uuid::Uuid::new_v4().simple()),
            js: js.clone(),
            state: Arc::default(),
            stop: CancellationToken::new(),
        };
        let mut control = client.subscribe(format!("asr.v1.control.{gpu}.{}", worker.incarnation)).await?;
        let (state, stop, client) = (worker.state.clone(), worker.stop.clone(), client.clone());
        let (name, incarnation) = (worker.gpu.clone(), worker.incarnation.clone());
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(250));
            let mut seq = 0;
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = ticks.tick() => {
                        let beat = heartbeat(&name, &incarnation, seq, slots, &state);
                        seq += 1;
                        if let Some(beat) = beat {
                            let subject = format!("asr.v1.heartbeat.{name}");
                            assert!(client.publish(subject, beat.to_string().into()).await.is_ok());
                        }
                    }
                    request = control.next() => {
                        let Some(request) = request else { return };
                        let reply = answer(&request.payload, &state);
                        if let Some(to) = request.reply {
                            assert!(client.publish(to, reply.to_string().into()).await.is_ok());
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

    fn requests(&self, what: &str) -> Vec<Value> {
        self.lock().requests.iter().filter(|r| r["do"] == what).cloned().collect()
    }

    fn epoch(&self, id: &str) -> Option<u64> {
        self.lock().held.get(id).map(|(epoch, _)| *epoch)
    }

    async fn has(&self, id: &str, epoch: u64) -> Result<()> {
        eventually(&format!("{} holds {id} at {epoch}", self.gpu), SOON, || async {
            (self.epoch(id) == Some(epoch)).then_some(())
        })
        .await
        .map_err(Into::into)
    }

    async fn let_go(&self, id: &str) -> Result<()> {
        eventually(&format!("{} lets {id} go", self.gpu), SOON, || async { self.epoch(id).is_none().then_some(()) })
            .await
            .map_err(Into::into)
    }

    /// Stores a final and shows it in the next heartbeat.
    async fn publish(&self, id: &str, index: u64, to_seq: u64, end: bool, resume: Value) -> Result<()> {
        let epoch = self.epoch(id).context("held")?;
        let mut resume_at = json!({
            "seq": 1, "at_sample": 0, "at_frame": 0, "format": "pcm_s16le;rate=16000;channels=1", "format_sample": 0,
            "sources": [], "asr_seq": null, "asr_seen": 0,
        });
        for (key, value) in resume.as_object().context("an object")? {
            resume_at[key] = value.clone();
        }
        let body = json!({
            "kind": "session", "id": id, "index": index, "final_id": uuid::Uuid::new_v4().to_string(), "epoch": epoch,
            "gpu_id": self.gpu, "model": "small", "device": "cpu", "engine": "simulated", "vad": "silero",
            "from_sample": 0, "to_sample": 2, "audio": { "from_seq": 1, "to_seq": to_seq }, "resume": resume_at,
            "segments": [], "speech_final": true, "end": end, "timings": {},
        });
        let subject = format!("asr.v1.transcript.session.{id}.final");
        self.js.publish(subject, body.to_string().into()).await?.await?;
        if let Some(held) = self.lock().held.get_mut(id) {
            held.1 = Some(index);
        }
        Ok(())
    }

    async fn end(&self, id: &str, index: u64, to_seq: u64) -> Result<()> {
        self.publish(id, index, to_seq, true, json!({})).await
    }

    /// Hints in its subject, as (session, log sequence, previous).
    async fn hints(&self) -> Result<Vec<(String, u64, Option<u64>)>> {
        let stream = self.js.get_stream("ASR_LIVE").await?;
        let name = format!("{}={}", self.gpu, self.incarnation);
        let consumer: jetstream::consumer::PullConsumer =
            stream.get_consumer(&name).await.map_err(|e| anyhow::anyhow!("consumer {name}: {e}"))?;
        let mut batch = consumer.fetch().max_messages(1_000).messages().await?;
        let mut hints = Vec::new();
        while let Some(Ok(message)) = batch.next().await {
            let id = message.subject.split('.').next_back().unwrap_or_default().to_owned();
            let number = |name: &str| {
                message.headers.as_ref().and_then(|h| h.get(name)).and_then(|v| v.as_str().parse::<u64>().ok())
            };
            hints.push((id, number("Asr-Log-Seq").context("Asr-Log-Seq")?, number("Asr-Log-Prev")));
            message.ack().await.map_err(|e| anyhow::anyhow!("{e}"))?;
        }
        Ok(hints)
    }
}

fn heartbeat(gpu: &str, incarnation: &str, seq: u64, slots: u32, state: &Mutex<Holding>) -> Option<Value> {
    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if state.silent {
        return None;
    }
    let held: Vec<Value> = state
        .held
        .iter()
        .map(|(id, (epoch, index))| json!({ "kind": "session", "id": id, "epoch": epoch, "final_index": index }))
        .collect();
    let mut beat = json!({
        "gpu_id": gpu, "incarnation": incarnation, "seq": seq, "sent_ms": 0, "host": "test", "pid": 1,
        "provider": "local",
        "device": {
            "index": 0, "name": "test", "total_mb": 24_000, "free_mb": 20_000, "used_mb": 0, "used_by_others_mb": 0,
        },
        "slots": { "total": slots, "used": held.len() }, "job_slots": { "total": 1, "used": 0 }, "held": held,
        "models": [{ "name": "small", "state": "available", "resident_mb": 0, "expected_mb": 852 }],
        "engine": {
            "state": "ready", "kind": "simulated", "effective_device": "cuda:test", "vad": "silero",
            "ms_since_progress": 0, "restarts": 0,
        },
        "draining": false, "version": "test",
    });
    put(&mut beat, &state.says);
    Some(beat)
}

/// Objects into objects; anything else in place of what was there.
fn put(into: &mut Value, from: &Value) {
    for (key, value) in from.as_object().into_iter().flatten() {
        match &mut into[key] {
            inner @ Value::Object(_) if value.is_object() => put(inner, value),
            other => *other = value.clone(),
        }
    }
}

fn answer(body: &[u8], state: &Mutex<Holding>) -> Value {
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let request: Value = serde_json::from_slice(body).unwrap_or_default();
    let id = request["id"].as_str().unwrap_or_default().to_owned();
    let epoch = request["epoch"].as_u64().unwrap_or_default();
    let reply = match request["do"].as_str() {
        Some("assign") if state.refuse => json!({ "refused": { "class": "no_capacity", "message": "no permit" } }),
        Some("assign") => {
            let index = state.held.get(&id).and_then(|(_, index)| *index);
            state.held.insert(id, (epoch, index));
            json!("done")
        }
        Some("release") => {
            state.held.remove(&id);
            json!("done")
        }
        _ => json!("done"),
    };
    state.requests.push(request);
    reply
}

fn class(reply: &Value) -> &str {
    reply["error"]["class"].as_str().unwrap_or("not refused")
}
