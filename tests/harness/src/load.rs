//! Load for measurements: many sessions at an even pace, bursts, and what JetStream alone can do on the same machine.

use std::{
    collections::HashSet,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use async_nats::{
    HeaderMap, Subscriber,
    jetstream::{self, consumer, context::PublishAckFuture, stream},
};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};

use crate::{Error, Result, audio::Pcm};

/// Publish time in microseconds since 1970, on chunks whose way is measured. Unknown headers are passed on.
pub const SENT_US: &str = "Asr-Sent-Us";

/// Acks that may be outstanding.
const IN_FLIGHT: usize = 4_096;

pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

/// Publishes without waiting for each ack, keeps the order, counts what was refused.
pub(crate) struct Pipeline {
    js: jetstream::Context,
    acks: FuturesUnordered<<PublishAckFuture as IntoFuture>::IntoFuture>,
    refused: u64,
}

impl Pipeline {
    pub(crate) fn new(client: async_nats::Client) -> Self {
        let builder = jetstream::context::ContextBuilder::new().timeout(Duration::from_secs(30));
        let js = builder.max_ack_inflight(2 * IN_FLIGHT).backpressure_on_inflight(true).build(client);
        Self { js, acks: FuturesUnordered::new(), refused: 0 }
    }

    pub(crate) async fn publish(&mut self, subject: String, headers: HeaderMap, payload: Bytes) -> Result<()> {
        let failed = Error::nats("publishing load");
        let ack = self.js.publish_with_headers(subject, headers, payload).await.map_err(failed)?;
        self.acks.push(ack.into_future());
        while let Some(Some(done)) = self.acks.next().now_or_never() {
            self.refused += u64::from(done.is_err());
        }
        while self.acks.len() >= IN_FLIGHT {
            self.refused += u64::from(matches!(self.acks.next().await, Some(Err(_))));
        }
        Ok(())
    }

    /// Waits for every ack; how many were refused.
    pub(crate) async fn finish(mut self) -> u64 {
        while let Some(done) = self.acks.next().await {
            self.refused += u64::from(done.is_err());
        }
        self.refused
    }
}

/// Many sessions that say the same audio, each from another place on.
pub struct Crowd {
    client: async_nats::Client,
    subjects: Vec<String>,
    audio: Bytes,
    chunk_bytes: usize,
    chunk: Duration,
    /// Next chunk of each session.
    next: Vec<usize>,
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    pub chunks: u64,
    /// Chunks that carry [`SENT_US`].
    pub stamped: u64,
    pub refused: u64,
    /// Longest time a chunk left after it was due.
    pub late_ms: f64,
    pub seconds: f64,
}

impl Crowd {
    pub fn new(client: async_nats::Client, name: &str, sessions: usize, pcm: &Pcm, chunk_ms: u64) -> Self {
        Self {
            client,
            subjects: (0..sessions).map(|n| format!("asr.v1.audio.{name}-{n}")).collect(),
            audio: pcm.bytes().into(),
            chunk_bytes: pcm.chunk_bytes(chunk_ms),
            chunk: Duration::from_millis(chunk_ms),
            // 37 is prime to any sensible number of chunks: neighbours do not pause together.
            next: (0..sessions).map(|n| n * 37).collect(),
        }
    }

    fn chunk_of(&mut self, session: usize) -> Bytes {
        let whole = self.audio.len() / self.chunk_bytes;
        let at = self.next[session] % whole * self.chunk_bytes;
        self.next[session] += 1;
        self.audio.slice(at..at + self.chunk_bytes)
    }

    /// Real-time pace for `seconds`, sessions spread evenly over the chunk's length; chunks that leave after `measure_from`
    /// seconds are stamped. Sessions join one after the other over `ramp` seconds.
    pub async fn pace(&mut self, ramp: f64, measure_from: f64, seconds: f64) -> Result<Sent> {
        let mut pipeline = Pipeline::new(self.client.clone());
        let mut sent = Sent::default();
        let sessions = self.subjects.len();
        let started = tokio::time::Instant::now();
        let begin = Instant::now();
        let rounds = (seconds / self.chunk.as_secs_f64()) as u32;
        for round in 0..rounds {
            for n in 0..sessions {
                let phase = self.chunk.mul_f64(n as f64 / sessions as f64);
                let due = self.chunk * round + phase;
                if due.as_secs_f64() < ramp * n as f64 / sessions as f64 {
                    continue;
                }
                tokio::time::sleep_until(started + due).await;
                sent.late_ms = sent.late_ms.max((begin.elapsed().saturating_sub(due)).as_secs_f64() * 1e3);
                let mut headers = HeaderMap::new();
                if due.as_secs_f64() >= measure_from {
                    headers.insert(SENT_US, now_us().to_string().as_str());
                    sent.stamped += 1;
                }
                let payload = self.chunk_of(n);
                pipeline.publish(self.subjects[n].clone(), headers, payload).await?;
                sent.chunks += 1;
            }
        }
        sent.refused = pipeline.finish().await;
        sent.seconds = begin.elapsed().as_secs_f64();
        Ok(sent)
    }

    /// `rounds` chunks for each session as fast as JetStream takes them, all stamped.
    pub async fn burst(&mut self, rounds: usize) -> Result<Sent> {
        let mut pipeline = Pipeline::new(self.client.clone());
        let mut sent = Sent::default();
        let begin = Instant::now();
        for _ in 0..rounds {
            for n in 0..self.subjects.len() {
                let mut headers = HeaderMap::new();
                headers.insert(SENT_US, now_us().to_string().as_str());
                let payload = self.chunk_of(n);
                pipeline.publish(self.subjects[n].clone(), headers, payload).await?;
                sent.chunks += 1;
            }
        }
        sent.stamped = sent.chunks;
        sent.refused = pipeline.finish().await;
        sent.seconds = begin.elapsed().as_secs_f64();
        Ok(sent)
    }
}

/// A whole recording into one session as fast as JetStream takes it, with an end.
pub async fn upload(
    client: async_nats::Client,
    session: &str,
    pcm: &Pcm,
    chunk_ms: u64,
    first: &[(&str, &str)],
) -> Result<()> {
    let mut pipeline = Pipeline::new(client);
    let (bytes, size) = (Bytes::from(pcm.bytes()), pcm.chunk_bytes(chunk_ms));
    let subject = format!("asr.v1.audio.{session}");
    let mut headers = HeaderMap::new();
    first.iter().for_each(|(name, value)| headers.insert(*name, *value));
    for from in (0..bytes.len()).step_by(size) {
        let piece = bytes.slice(from..(from + size).min(bytes.len()));
        pipeline.publish(subject.clone(), std::mem::take(&mut headers), piece).await?;
    }
    headers.insert("Asr-End", "1");
    pipeline.publish(subject, headers, Bytes::new()).await?;
    match pipeline.finish().await {
        0 => Ok(()),
        refused => Err(Error::Wrong(format!("{refused} chunks of {session} were refused"))),
    }
}

/// Hears end finals as they are published, so that waiting for them costs nothing.
pub struct Ends {
    finals: Subscriber,
}

impl Ends {
    pub async fn listen(client: &async_nats::Client) -> Result<Self> {
        let finals = client.subscribe("asr.v1.transcript.session.*.final").await.map_err(Error::nats("finals"))?;
        client.flush().await.map_err(Error::nats("finals"))?;
        Ok(Self { finals })
    }

    /// Waits until each of these sessions has ended.
    pub async fn wait(&mut self, sessions: impl IntoIterator<Item = String>, deadline: Duration) -> Result<()> {
        let mut open: HashSet<String> = sessions.into_iter().collect();
        let all = async {
            while !open.is_empty() {
                let message = self.finals.next().await.ok_or_else(|| Error::Wrong("the server is gone".to_owned()))?;
                let json: serde_json::Value = serde_json::from_slice(&message.payload).unwrap_or_default();
                if json["end"] == true {
                    open.remove(json["id"].as_str().unwrap_or_default());
                }
            }
            Ok(())
        };
        match tokio::time::timeout(deadline, all).await {
            Ok(done) => done,
            Err(_) => Err(Error::Wrong(format!("not ended within {deadline:?}: {open:?}"))),
        }
    }
}

/// Messages per second that JetStream alone carries on this server: published pipelined into a file stream and pulled
/// with acks at the same time.
pub async fn raw_jetstream(client: &async_nats::Client, messages: usize, bytes: usize) -> Result<f64> {
    const NAME: &str = "BENCH_RAW";
    let js = jetstream::new(client.clone());
    let config = stream::Config {
        name: NAME.to_owned(),
        subjects: vec!["bench.raw.*".to_owned()],
        storage: stream::StorageType::File,
        ..stream::Config::default()
    };
    let stream = js.create_stream(config).await.map_err(Error::nats(NAME))?;
    let config = consumer::pull::Config {
        durable_name: Some("bench".to_owned()),
        max_ack_pending: 10_000,
        ..consumer::pull::Config::default()
    };
    let consumer = stream.create_consumer(config).await.map_err(Error::nats(NAME))?;
    let pulled = async {
        let pull = consumer.stream().max_messages_per_batch(1_000).messages();
        let mut arriving = pull.await.map_err(Error::nats(NAME))?;
        for _ in 0..messages {
            let message = arriving.next().await.ok_or_else(|| Error::Wrong("raw pull ended".to_owned()))?;
            message.map_err(Error::nats(NAME))?.ack().await.map_err(|e| Error::Wrong(e.to_string()))?;
        }
        Ok::<_, Error>(())
    };
    let published = async {
        let mut pipeline = Pipeline::new(client.clone());
        let payload = Bytes::from(vec![7; bytes]);
        for n in 0..messages {
            pipeline.publish(format!("bench.raw.{}", n % 1_000), HeaderMap::new(), payload.clone()).await?;
        }
        Ok::<_, Error>(pipeline.finish().await)
    };
    let begin = Instant::now();
    let (_, refused) = futures_util::future::try_join(pulled, published).await?;
    let rate = messages as f64 / begin.elapsed().as_secs_f64();
    js.delete_stream(NAME).await.map_err(Error::nats(NAME))?;
    if refused > 0 { Err(Error::Wrong(format!("{refused} raw messages were refused"))) } else { Ok(rate) }
}
