//! A producer as producers should be: numbered chunks of one named source, one at a time, each acknowledged before the
//! next, a failed one sent again under the same message id.
//!
//! Stop and wait keeps the log in order whatever fails; it costs one round trip a chunk, which real-time audio has time for.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use voxfleet_nats::{
    Nats,
    log::{AudioLog, LogError},
    retry::Backoff,
};
use voxfleet_schema::{
    audio::{ASR_END, ASR_FORMAT, ASR_OPT_PREFIX, ASR_SEQ, ASR_SOURCE, AudioFormat},
    id::{IdError, SourceId, StreamId},
    trace::{TRACEPARENT, TraceContext},
};

/// What the log keeps free of a message for headers.
const HEADER_ROOM: usize = 16 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProducerError {
    #[error("a chunk of {len} bytes does not fit, the server takes {max}; use a smaller --chunk-ms")]
    ChunkTooLarge { len: usize, max: usize },
    #[error("chunk {number} was not acknowledged for {waited_s} s")]
    GaveUp { number: u64, waited_s: u64, source: LogError },
    #[error("chunk {number} was refused")]
    Refused { number: u64, source: LogError },
    #[error("stopped")]
    Stopped,
    #[error("no name for this source")]
    Source(#[from] IdError),
}

pub(crate) struct Producer {
    log: AudioLog,
    id: StreamId,
    source: SourceId,
    format: AudioFormat,
    /// Options that the first chunk carries, by their names in headers.
    options: Vec<(String, String)>,
    /// What whoever started this wants it to be part of, as it is written.
    trace: Option<String>,
    next: u64,
    max_chunk: usize,
    give_up: Duration,
    /// Where a person is told that the log is full, and that it takes audio again.
    tell: Option<fn(&str)>,
}

impl ProducerError {
    /// There is no room for it now; later there may be.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, ProducerError::GaveUp { source: LogError::Full, .. })
    }
}

impl Producer {
    pub(crate) fn new(
        nats: &Nats,
        id: StreamId,
        format: AudioFormat,
        give_up: Duration,
    ) -> Result<Self, ProducerError> {
        Ok(Self {
            log: AudioLog::new(nats),
            id,
            // New for each start, so that a restarted producer is not taken for a repetition of itself.
            source: SourceId::new(Uuid::new_v4().simple().to_string())?,
            format,
            options: Vec::new(),
            trace: None,
            next: 0,
            max_chunk: nats.max_payload().saturating_sub(HEADER_ROOM),
            give_up,
            tell: None,
        })
    }

    pub(crate) fn telling(mut self, tell: fn(&str)) -> Self {
        self.tell = Some(tell);
        self
    }

    /// Sends these session options with the first chunk.
    pub(crate) fn with_options(mut self, options: &[(String, String)]) -> Self {
        self.options = options.iter().map(|(name, value)| (header_name(name), value.clone())).collect();
        self
    }

    /// All of it is part of this trace.
    pub(crate) fn traced(mut self, trace: Option<TraceContext>) -> Self {
        self.trace = trace.map(|trace| trace.to_string());
        self
    }

    /// Writes a chunk and waits for its acknowledgement; returns its sequence in the log. `end` closes the session.
    pub(crate) async fn send(
        &mut self,
        payload: Bytes,
        end: bool,
        stop: &CancellationToken,
    ) -> Result<u64, ProducerError> {
        if payload.len() > self.max_chunk {
            return Err(ProducerError::ChunkTooLarge { len: payload.len(), max: self.max_chunk });
        }
        let number = self.next;
        let (seq, msg_id) = (number.to_string(), format!("{}:{}:{number}", self.id, self.source));
        let format = self.format.to_string();
        let mut headers =
            vec![(ASR_SEQ, seq.as_str()), (ASR_SOURCE, self.source.as_str()), (ASR_FORMAT, format.as_str())];
        headers.extend(self.trace.as_deref().map(|trace| (TRACEPARENT, trace)));
        if end {
            headers.push((ASR_END, "1"));
        }
        if number == 0 {
            headers.extend(self.options.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        }
        let begun = Instant::now();
        let mut backoff = Backoff::default();
        let mut full = false;
        loop {
            let source = match self.attempt(&headers, &payload, &msg_id).await {
                Ok(seq) => {
                    self.next += 1;
                    if let Some(tell) = self.tell.filter(|_| full) {
                        tell(&format!(
                            "there is room again, chunk {number} is stored after {} s",
                            begun.elapsed().as_secs()
                        ));
                    }
                    return Ok(seq);
                }
                Err(error) if may_pass(&error) => error,
                Err(source) => return Err(ProducerError::Refused { number, source }),
            };
            if begun.elapsed() >= self.give_up {
                return Err(ProducerError::GaveUp { number, waited_s: begun.elapsed().as_secs(), source });
            }
            tracing::warn!(number, error = %source, "chunk not acknowledged, sending it again");
            if let Some(tell) = self.tell.filter(|_| matches!(source, LogError::Full) && !full) {
                let left = self.give_up.saturating_sub(begun.elapsed()).as_secs();
                tell(&format!("chunk {number}: {source}; nothing sent before is lost, it is sent again for {left} s"));
                full = true;
            }
            tokio::select! {
                () = stop.cancelled() => return Err(ProducerError::Stopped),
                () = backoff.wait() => {}
            }
        }
    }

    async fn attempt(&self, headers: &[(&str, &str)], payload: &Bytes, msg_id: &str) -> Result<u64, LogError> {
        let pending = self.log.publish(&self.id, headers, payload.clone(), Some(msg_id)).await?;
        Ok(pending.stored().await?.seq)
    }
}

/// When sound at `ms` has been spoken, for a producer that began to speak at `started`.
pub(crate) fn due(started: Instant, ms: u64, speed: f64) -> Instant {
    started + Duration::from_secs_f64(ms as f64 / 1000.0 / speed)
}

/// How long ago the sound at `ms` was spoken, in ms.
pub(crate) fn ago(started: Instant, ms: u64, speed: f64) -> u64 {
    let ago = Instant::now().saturating_duration_since(due(started, ms, speed));
    u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)
}

/// Whether the same chunk may be taken later. A full log empties as its audio expires.
fn may_pass(error: &LogError) -> bool {
    match error {
        LogError::Full => true,
        LogError::Server(error) => error.is_transient(),
        LogError::Conflict | LogError::TooLarge | LogError::BadHeader { .. } => false,
    }
}

/// `endpoint_ms` -> `Asr-Opt-Endpoint-Ms`.
fn header_name(option: &str) -> String {
    let words = option.split('_').map(|word| {
        let mut letters = word.chars();
        letters.next().map(|first| first.to_ascii_uppercase().to_string() + letters.as_str()).unwrap_or_default()
    });
    format!("{ASR_OPT_PREFIX}{}", words.collect::<Vec<_>>().join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_nats::ServerError;

    #[test]
    fn options_travel_as_headers_that_the_schema_reads() {
        for name in voxfleet_schema::session::SessionOptions::NAMES {
            let header = header_name(name);
            let read = header.strip_prefix(ASR_OPT_PREFIX).map(|n| n.to_ascii_lowercase().replace('-', "_"));
            assert_eq!(read.as_deref(), Some(name));
        }
        assert_eq!(header_name("endpoint_ms"), "Asr-Opt-Endpoint-Ms");
    }

    #[test]
    fn only_what_may_pass_is_sent_again() {
        assert!(may_pass(&LogError::Full) && may_pass(&LogError::Server(ServerError::Timeout)));
        assert!(!may_pass(&LogError::TooLarge) && !may_pass(&LogError::Server(ServerError::Closed)));
    }
}
