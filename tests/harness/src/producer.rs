//! A producer as a stranger would write it: plain JetStream publishes, with or without headers.

use std::time::Duration;

use async_nats::{HeaderMap, jetstream};
use bytes::Bytes;
use tokio::time::Instant;

use crate::{Error, Result, audio::Pcm};

/// How fast audio comes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    AsFastAsPossible,
    /// 1.0 = as it was spoken.
    Speed(f64),
}

/// Publishes one session's audio; waits for each ack and stops at the first that fails.
pub struct Producer {
    js: jetstream::Context,
    session: String,
    subject: String,
    /// `Asr-Source` and the next `Asr-Seq`; none = bare payloads.
    source: Option<(String, u64)>,
}

impl Producer {
    /// Without any header, as `nats pub` does it.
    pub fn bare(js: jetstream::Context, session: &str) -> Self {
        Self { js, session: session.to_owned(), subject: format!("asr.v1.audio.{session}"), source: None }
    }

    /// With `Asr-Source`, `Asr-Seq` and `Nats-Msg-Id`, as our own producers do it.
    pub fn named(js: jetstream::Context, session: &str, source: &str) -> Self {
        Self { source: Some((source.to_owned(), 0)), ..Self::bare(js, session) }
    }

    pub fn session(&self) -> &str {
        &self.session
    }

    /// One chunk; gives its sequence in `ASR_AUDIO`.
    pub async fn send(&mut self, payload: impl Into<Bytes>, headers: &[(&str, &str)]) -> Result<u64> {
        let mut map = HeaderMap::new();
        if let Some((source, seq)) = &self.source {
            map.insert("Asr-Source", source.as_str());
            map.insert("Asr-Seq", seq.to_string().as_str());
            map.insert("Nats-Msg-Id", format!("{}:{source}:{seq}", self.session).as_str());
        }
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        let failed = |e: jetstream::context::PublishError| Error::nats(format!("audio of {}", self.session))(e);
        let ack = self.js.publish_with_headers(self.subject.clone(), map, payload.into()).await.map_err(failed)?;
        let ack = ack.await.map_err(failed)?;
        if let Some((_, seq)) = &mut self.source {
            *seq += 1;
        }
        Ok(ack.sequence)
    }

    /// All of `pcm` in chunks of `chunk_ms`; the last acknowledged sequence. A chunk leaves when its last sample would have
    /// been spoken.
    pub async fn stream(&mut self, pcm: &Pcm, chunk_ms: u64, pace: Pace) -> Result<u64> {
        self.stream_with(pcm, chunk_ms, pace, &[]).await
    }

    /// The same with `first` as headers of the first chunk: session options, a format.
    pub async fn stream_with(&mut self, pcm: &Pcm, chunk_ms: u64, pace: Pace, first: &[(&str, &str)]) -> Result<u64> {
        let bytes = Bytes::from(pcm.bytes());
        let size = pcm.chunk_bytes(chunk_ms);
        let started = Instant::now();
        let mut last = 0;
        for (n, from) in (0..bytes.len()).step_by(size).enumerate() {
            if let Pace::Speed(speed) = pace {
                let spoken = Duration::from_millis(chunk_ms * (n as u64 + 1));
                tokio::time::sleep_until(started + spoken.div_f64(speed)).await;
            }
            let piece = bytes.slice(from..(from + size).min(bytes.len()));
            last = self.send(piece, if n == 0 { first } else { &[] }).await?;
        }
        Ok(last)
    }

    /// An empty chunk with `Asr-End`.
    pub async fn end(&mut self) -> Result<u64> {
        self.send(Bytes::new(), &[("Asr-End", "1")]).await
    }

    pub async fn flush(&mut self) -> Result<u64> {
        self.send(Bytes::new(), &[("Asr-Flush", "1")]).await
    }
}
