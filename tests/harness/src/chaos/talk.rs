//! The load under the faults: producers that repeat what is not acknowledged, and recordings handed in as jobs.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use async_nats::jetstream;
use base64::Engine as _;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    Error, Result,
    audio::{self, Pcm},
    producer::Producer,
};

/// A producer that gets no acknowledgement for so long gives up: longer than any fault.
const GIVE_UP: Duration = Duration::from_secs(60);
const ACK_WAIT: Duration = Duration::from_secs(3);
/// Larger recordings go through the object store.
const INLINE_BYTES: usize = 1_500_000;

/// A session to be spoken.
#[derive(Debug, Clone, PartialEq)]
pub struct Talk {
    pub id: String,
    /// Where it says what kills the simulated engine.
    pub poison: Option<Range<u64>>,
    pub seed: u64,
    pub seconds: f64,
    /// Times real time.
    pub speed: f64,
    pub chunk_ms: u64,
}

/// What a producer has had acknowledged.
#[derive(Debug)]
pub struct Said {
    pub id: String,
    pub poison: Option<Range<u64>>,
    pub samples: Vec<i16>,
    /// Why it stopped early.
    pub gave_up: Option<String>,
}

/// Samples at the very top in a row that kill the simulated engine (`worker.simulated.poison`).
pub const POISON_RUN: u64 = 400;

/// Puts poison where speech is: a run at the very top of 16 bits.
pub fn poisoned(pcm: &mut Pcm, at: &Range<u64>) {
    let index = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(pcm.samples.len());
    let (from, to) = (index(at.start), index(at.end));
    pcm.samples[from..to].fill(i16::MAX);
}

/// A place for poison: in the first loud stretch after `wanted` that is long enough to hold it whole.
pub fn place_for_poison(pcm: &Pcm, wanted: u64) -> Option<Range<u64>> {
    let loud = crate::words::Recording::new(pcm.samples.clone()).loud();
    let room = loud.into_iter().find(|l| l.start >= wanted && l.end - l.start >= 4 * POISON_RUN)?;
    let from = (room.start + room.end) / 2;
    Some(from..from + POISON_RUN)
}

/// What publishes and reads go through, for callers that do not name the client library.
pub type Js = jetstream::Context;

/// A context whose publishes do not wait long for their answers.
pub fn impatient(client: async_nats::Client) -> jetstream::Context {
    let mut js = jetstream::new(client);
    js.set_timeout(ACK_WAIT);
    js
}

/// Speaks a session from its first chunk to its end entry; a chunk without an acknowledgement is sent again, under the same
/// number, until it has one.
pub async fn talk(js: jetstream::Context, talk: Talk) -> Said {
    let mut pcm = audio::blasts(talk.seed, talk.seconds);
    if let Some(poison) = &talk.poison {
        poisoned(&mut pcm, poison);
    }
    speak(js, &talk, &pcm, &AtomicU64::new(0)).await
}

/// The same with audio of one's own. `acknowledged` is told how many samples the log holds.
pub async fn speak(js: jetstream::Context, talk: &Talk, pcm: &Pcm, acknowledged: &AtomicU64) -> Said {
    let mut producer = Producer::named(js, &talk.id, "s1");
    let per_chunk = pcm.chunk_bytes(talk.chunk_ms) / 2;
    let (id, poison) = (talk.id.clone(), talk.poison.clone());
    let mut said = Said { id, poison, samples: Vec::with_capacity(pcm.samples.len()), gave_up: None };
    let started = Instant::now();
    for (n, chunk) in pcm.samples.chunks(per_chunk).enumerate() {
        let spoken = Duration::from_millis(talk.chunk_ms * (n as u64 + 1));
        tokio::time::sleep_until(started + spoken.div_f64(talk.speed)).await;
        let payload: Vec<u8> = chunk.iter().flat_map(|s| s.to_le_bytes()).collect();
        if let Err(e) = insist(&mut producer, payload, &[]).await {
            said.gave_up = Some(e.to_string());
            return said;
        }
        said.samples.extend_from_slice(chunk);
        acknowledged.store(said.samples.len() as u64, Ordering::Relaxed);
    }
    said.gave_up = insist(&mut producer, Vec::new(), &[("Asr-End", "1")]).await.err().map(|e| e.to_string());
    said
}

async fn insist(producer: &mut Producer, payload: Vec<u8>, headers: &[(&str, &str)]) -> Result<u64> {
    let begun = Instant::now();
    loop {
        match producer.send(payload.clone(), headers).await {
            Ok(seq) => return Ok(seq),
            Err(e) if begun.elapsed() > GIVE_UP => return Err(e),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Hands in a recording until somebody says that it was accepted.
pub async fn submit(js: jetstream::Context, id: String, pcm: &Pcm, priority: &str) -> Result<()> {
    submit_bytes(js, id, pcm.wav(), priority).await
}

/// The same with any bytes.
pub async fn submit_bytes(js: jetstream::Context, id: String, wav: Vec<u8>, priority: &str) -> Result<()> {
    let begun = Instant::now();
    let mut last = String::from("nobody answered");
    while begun.elapsed() < GIVE_UP {
        let mut body = json!({"job": id, "options": {"priority": priority}});
        let placed = if wav.len() <= INLINE_BYTES {
            body["data"] = base64::engine::general_purpose::STANDARD.encode(&wav).into();
            Ok(())
        } else {
            body["audio"] = format!("object://asr_media/chaos/{id}.wav").into();
            let key = format!("chaos/{id}.wav");
            let put = store(&js, &key, &wav);
            tokio::time::timeout(Duration::from_secs(15), put)
                .await
                .unwrap_or_else(|_| Err(Error::Wrong("storing the recording took too long".to_owned())))
        };
        match placed {
            Err(e) => last = e.to_string(),
            Ok(()) => match asked(&js, &body).await {
                Ok(()) => return Ok(()),
                Err(why) => last = why,
            },
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    Err(Error::Wrong(format!("job {id} was never accepted: {last}")))
}

async fn store(js: &jetstream::Context, key: &str, bytes: &[u8]) -> Result<()> {
    let store = js.get_object_store("asr_media").await.map_err(Error::nats("asr_media"))?;
    let mut reader = bytes;
    store.put(key, &mut reader).await.map(drop).map_err(Error::nats(key))
}

async fn asked(js: &jetstream::Context, body: &serde_json::Value) -> std::result::Result<(), String> {
    let client = js.client();
    let request = client.request("asr.v1.api.job.submit", body.to_string().into());
    let reply = tokio::time::timeout(ACK_WAIT, request).await.map_err(|_| "no answer in time".to_owned())?;
    let reply = reply.map_err(|e| e.to_string())?;
    let answer: serde_json::Value = serde_json::from_slice(&reply.payload).map_err(|e| e.to_string())?;
    if answer.get("ok").is_some() { Ok(()) } else { Err(answer.to_string()) }
}
