//! Workers that only say that they are there: heartbeats, a yes to whatever a dispatcher asks, and partials that grow. For
//! figures and pictures of fleets that no machine here could run.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_nats::{Client, Message};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{Error, Result, probe_api};

/// A heartbeat a second each, spread over it.
const SLICES: usize = 20;
const BEAT: Duration = Duration::from_secs(1);
const MODEL: &str = "pretended";
const WORDS: [&str; 8] = ["good", "morning", "this", "is", "what", "somebody", "says", "now"];
/// The longest that a session may idle.
const LONGEST_S: u32 = 1_800;
/// Opened at once.
const OPENING: usize = 16;

/// Sessions of each worker, with their epochs.
type Held = Vec<BTreeMap<String, u64>>;

/// A fleet of them. Ends with its token.
#[derive(Debug, Clone)]
pub struct Pretended {
    client: Client,
    slots: u32,
    held: Arc<Mutex<Held>>,
}

fn gpu_id(n: usize) -> String {
    format!("pretended-{n:04}")
}

fn incarnation(n: usize) -> String {
    format!("i{n}")
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl Pretended {
    pub fn new(client: Client, gpus: usize, slots: u32) -> Self {
        Self { client, slots, held: Arc::new(Mutex::new(vec![BTreeMap::new(); gpus])) }
    }

    /// Sessions that any of them holds.
    pub fn sessions(&self) -> usize {
        self.held.lock().map_or(0, |held| held.iter().map(BTreeMap::len).sum())
    }

    /// Opens `count` sessions without audio; they stay as long as they may.
    pub async fn open(&self, count: usize) -> Result<()> {
        let opened = futures_util::stream::iter(0..count).map(|n| {
            let client = self.client.clone();
            async move { probe_api::open(&client, &format!("call-{n:05}"), LONGEST_S).await }
        });
        let mut opened = opened.buffer_unordered(OPENING);
        while let Some(opened) = opened.next().await {
            opened?;
        }
        Ok(())
    }

    /// Says yes, beats, and lets sessions speak, `partials_per_s` in all, until `stop`.
    pub async fn run(&self, partials_per_s: usize, stop: CancellationToken) -> Result<()> {
        let failed = |what: &str, error: &dyn std::fmt::Display| Error::Wrong(format!("{what}: {error}"));
        let control = self.client.subscribe("asr.v1.control.>").await;
        let mut control = control.map_err(|e| failed("listening to control requests", &e))?;
        let gpus = self.held.lock().map_or(0, |held| held.len());
        let mut slices = tokio::time::interval(BEAT / SLICES as u32);
        let (mut tick, mut spoken) = (0u64, 0usize);
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                message = control.next() => {
                    let Some(message) = message else { return Err(Error::Wrong("the connection is closed".to_owned())) };
                    self.answer(message).await?;
                }
                _ = slices.tick() => {
                    let slice = tick as usize % SLICES;
                    for n in (slice..gpus).step_by(SLICES) {
                        let beat = self.heartbeat(n, tick / SLICES as u64).to_string();
                        let sent = self.client.publish(format!("asr.v1.heartbeat.{}", gpu_id(n)), beat.into()).await;
                        sent.map_err(|e| failed("a heartbeat", &e))?;
                    }
                    for (worker, id, epoch) in self.next_speakers(&mut spoken, partials_per_s / SLICES) {
                        let text: Vec<&str> = (0..8).map(|n| WORDS[(spoken + n) % WORDS.len()]).collect();
                        let partial = json!({
                            "kind": "session", "id": id, "epoch": epoch, "gpu_id": gpu_id(worker), "from_sample": 0, "to_sample": tick * 800,
                            "committed": text.join(" "), "tentative": format!("{}", tick / SLICES as u64), "lag_ms": 120,
                        });
                        let subject = format!("asr.v1.transcript.session.{id}.partial");
                        let sent = self.client.publish(subject, partial.to_string().into()).await;
                        sent.map_err(|e| failed("a partial", &e))?;
                    }
                    tick += 1;
                }
            }
        }
    }

    /// The next sessions in turn.
    fn next_speakers(&self, spoken: &mut usize, count: usize) -> Vec<(usize, String, u64)> {
        let Ok(held) = self.held.lock() else { return Vec::new() };
        let of = |(worker, sessions)| {
            let sessions: &BTreeMap<String, u64> = sessions;
            sessions.iter().map(move |(id, epoch)| (worker, id, *epoch))
        };
        let all: Vec<(usize, &String, u64)> = held.iter().enumerate().flat_map(of).collect();
        let count = count.min(all.len());
        let chosen = (0..count).map(|n| all[(*spoken + n) % all.len()]);
        let chosen = chosen.map(|(worker, id, epoch)| (worker, id.clone(), epoch)).collect();
        *spoken += count;
        chosen
    }

    async fn answer(&self, message: Message) -> Result<()> {
        let name = message.subject.rsplit('.').nth(1).unwrap_or_default();
        let worker = name.rsplit('-').next().and_then(|n| n.parse::<usize>().ok());
        let request: Value = serde_json::from_slice(&message.payload).unwrap_or_default();
        if let (Some(worker), Ok(mut held)) = (worker, self.held.lock())
            && let (Some(sessions), Some(id)) = (held.get_mut(worker), request["id"].as_str())
        {
            match request["do"].as_str() {
                Some("assign") => drop(sessions.insert(id.to_owned(), request["epoch"].as_u64().unwrap_or(1))),
                Some("release" | "cancel") => drop(sessions.remove(id)),
                _ => {}
            }
        }
        let Some(to) = message.reply else { return Ok(()) };
        let sent = self.client.publish(to, json!("done").to_string().into()).await;
        sent.map_err(|e| Error::Wrong(format!("an answer: {e}")))
    }

    fn heartbeat(&self, n: usize, seq: u64) -> Value {
        let held = self.held.lock().map(|held| held[n].clone()).unwrap_or_default();
        let used_mb = 1_000 + 850 * held.len().min(20) as u64;
        let others_mb = 500 + (seq * 50 + n as u64 * 137) % 3_000;
        json!({
            "gpu_id": gpu_id(n), "incarnation": incarnation(n), "seq": seq, "sent_ms": now_ms(), "started_ms": 1,
            "host": format!("host-{:03}", n / 8), "pid": 1, "provider": "vast_ai",
            "device": {
                "index": n % 8, "name": "Pretended RTX", "uuid": format!("GPU-{n:08x}"), "total_mb": 24_000,
                "free_mb": 24_000 - used_mb - others_mb, "used_mb": used_mb, "used_by_others_mb": others_mb,
                "temperature_c": 40 + (seq + n as u64) % 30, "power_w": 210.0, "utilization": 0.5,
            },
            "slots": { "total": self.slots, "used": held.len() }, "job_slots": { "total": 1, "used": 0 },
            "held": held.iter().map(|(id, epoch)| json!({ "kind": "session", "id": id, "epoch": epoch, "lag_ms": 120 })).collect::<Vec<_>>(),
            "models": [{ "name": MODEL, "state": "loaded", "resident_mb": 852, "expected_mb": 852 }], "default_model": MODEL,
            "engine": {
                "state": "ready", "kind": "simulated", "effective_device": "cuda:pretended", "vad": "silero",
                "ms_since_progress": 0, "restarts": 0, "decode_rate": 30.0, "idle_timeout_s": 600, "ms_since_activity": 0,
            },
            "draining": false, "price_per_hour": 0.4, "version": env!("CARGO_PKG_VERSION"),
        })
    }
}
