//! The dispatcher alone, on a real nats-server, with a worker that is nothing but NATS messages.

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
        let config =
            DispatcherConfig { name: name.to_owned(), lease_ms: 1_500, topology, ..DispatcherConfig::default() };
        let token = stop.clone();
        self.tasks.spawn(async move {
            let ended = voxfleet_dispatcher::run(nats, config, token).await;
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
        let subject = format!("asr.v1.event.session.{session}.{what}");
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
    Some(json!({
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
    }))
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
    let mut seen = Vec::new();
    eventually("hints", SOON, || async {
        match worker.hints().await {
            Ok(hints) => Some(hints).filter(|h| h.iter().any(|(_, seq, _)| *seq == third)),
            Err(_) => None,
        }
    })
    .await
    .map(|hints| seen = hints)?;
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
    let epochs: Vec<u64> = stubborn.requests("assign").iter().filter_map(|r| r["epoch"].as_u64()).collect();
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
    let reply = setup.ask("plan", "{}").await?;
    ensure!(reply["error"]["message"].as_str().is_some_and(|m| m.contains("not available")), "{reply}");
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

#[tokio::test]
async fn a_standby_goes_on_where_the_active_one_stopped() -> Result<()> {
    let mut setup = Setup::new().await?;
    let worker = setup.worker("g0", 4).await?;
    setup.say("call", AUDIO, &[]).await?;
    worker.has("call", 1).await?;
    let old = setup.ask("fleet.status", "").await?;
    ensure!(old["ok"]["dispatcher"] == "d1", "{old}");
    setup.stop.cancel();
    setup.stop = CancellationToken::new();
    // Audio and an end while nobody listens; the worker reads the log by itself.
    setup.say("call", AUDIO, &[]).await?;
    let end = setup.say("call", b"", &[("Asr-End", "1")]).await?;
    setup.say("unheard", AUDIO, &[]).await?;
    worker.end("call", 0, end).await?;
    setup.start_dispatcher("d2").await?;
    setup.state("call", "ended").await?;
    worker.let_go("call").await?;
    worker.has("unheard", 1).await?;
    let new = setup.ask("fleet.status", "").await?;
    ensure!(new["ok"]["dispatcher"] == "d2", "{new}");
    let epochs = worker.requests("assign").iter().filter(|r| r["id"] == "call").count();
    ensure!(epochs == 1, "the takeover moved nothing");
    worker.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn a_silent_worker_is_dead_and_its_sessions_move() -> Result<()> {
    let mut setup = Setup::new().await?;
    let first = setup.worker("g0", 4).await?;
    setup.say("call", AUDIO, &[]).await?;
    first.has("call", 1).await?;
    let second = setup.worker("g1", 4).await?;
    eventually("two alive", SOON, || async {
        let status = setup.ask("fleet.status", "").await.ok()?;
        let alive = status["ok"]["workers"].as_array()?.iter().filter(|w| w["health"] == "alive").count();
        (alive == 2).then_some(())
    })
    .await?;
    first.lock().silent = true;
    second.has("call", 2).await?;
    let moved = setup.event("call", "moved", 1).await?;
    ensure!(moved[0]["gpu_id"] == "g1" && moved[0]["detail"]["from"]["gpu_id"] == "g0", "{moved:?}");
    eventually("consumers removed", SOON, || async { first.hints().await.is_err().then_some(()) }).await?;
    first.lock().silent = false;
    eventually("told to renew", SOON, || async { (!first.requests("renew").is_empty()).then_some(()) }).await?;
    ensure!(first.hints().await.is_err(), "a dead incarnation's heartbeat makes nothing");
    first.stop.cancel();
    second.stop.cancel();
    setup.finish().await
}

#[tokio::test]
async fn a_waiting_session_whose_audio_expired_is_closed_and_its_id_can_speak_again() -> Result<()> {
    let mut setup = Setup::with(TopologyConfig { audio_max_age_s: 10, ..TopologyConfig::default() }).await?;
    let seq = setup.say("late", AUDIO, &[]).await?;
    setup.event("late", "waiting", 1).await?;
    // Its audio, then the flush behind it, are there for ten seconds each.
    setup.event("late", "failed", 1).await?;
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
    for what in ["assigned", "degraded"] {
        let events = setup.event("call", what, 1).await?;
        ensure!(
            events[0]["detail"]["model"] == "small" && events[0]["detail"]["model_asked"] == "medium",
            "{events:?}"
        );
    }
    let exact = json!({ "session": "other", "options": { "model": "medium", "policy": "exact_model" } }).to_string();
    ensure!(class(&setup.ask("session.open", exact).await?) == "model_missing");
    worker.stop.cancel();
    setup.finish().await
}
