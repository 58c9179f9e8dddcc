//! What is published and not part of the chain: hints, events, partials, dead letters.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::{
    HeaderMap,
    header::HeaderName,
    jetstream::{self, context::PublishAckFuture, message::PublishMessage},
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    audio::{ASR_LOG_PREV, ASR_LOG_SEQ, RawEntry},
    codec,
    event::Event,
    id::{Kind, StreamId, WorkerName},
    trace::TRACEPARENT,
    transcript::Partial,
};

use crate::{Nats, ServerError, raw};

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("cannot encode")]
    Encode(#[from] codec::CodecError),
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// What became of a hint. Neither is an error: a lost hint costs latency only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HintSent {
    Sent,
    /// Too many are unanswered: the stream is stalled. The worker reads the log instead.
    Dropped,
}

/// Hints that may be unanswered. At 5,000 a second this is 0.4 s of answers outstanding.
const WINDOW: usize = 2_048;
/// How long a hint waits for a place among them before it is given up.
const PATIENCE: Duration = Duration::from_millis(200);

/// Publishes. Clones share one window of unanswered hints.
#[derive(Debug, Clone)]
pub struct Publisher {
    nats: Nats,
    hints: Arc<Hints>,
}

#[derive(Debug)]
struct Hints {
    js: jetstream::Context,
    answers: mpsc::Sender<PublishAckFuture>,
    /// The last hint found no place: the next ones do not wait for one.
    stalled: AtomicBool,
    failed: Arc<AtomicU64>,
}

impl Publisher {
    /// Call it within a runtime: one task reads the answers to all hints.
    pub fn new(nats: &Nats) -> Self {
        let js = jetstream::context::ContextBuilder::new()
            .timeout(nats.request_timeout())
            .max_ack_inflight(WINDOW)
            .backpressure_on_inflight(true)
            .build(nats.client().clone());
        let (answers, rx) = mpsc::channel(WINDOW);
        let failed = Arc::new(AtomicU64::new(0));
        nats.tasks().spawn(read_answers(rx, failed.clone(), nats.stop_token()));
        let hints = Hints { js, answers, stalled: AtomicBool::new(false), failed };
        Self { nats: nats.clone(), hints: Arc::new(hints) }
    }

    /// Copies a log entry to its owner. `prev` is the sequence of the session's entry before it, when the caller saw both.
    pub async fn hint(&self, to: &WorkerName, id: &StreamId, entry: &RawEntry, prev: Option<u64>) -> HintSent {
        let Some(headers) = hint_headers(entry, prev) else { return HintSent::Dropped };
        let message = PublishMessage::build().payload(entry.payload.clone()).headers(headers);
        let sending = self.hints.js.send_publish(self.nats.subjects().live(to, id), message);
        let stalled = self.hints.stalled.load(Ordering::Relaxed);
        let patience = if stalled { Duration::ZERO } else { PATIENCE };
        match tokio::time::timeout(patience, sending).await {
            Ok(Ok(answer)) => {
                if stalled {
                    self.hints.stalled.store(false, Ordering::Relaxed);
                }
                // Full or closed: the client's own reader takes the answer, only its failure goes uncounted.
                let _ = self.hints.answers.try_send(answer);
                HintSent::Sent
            }
            Ok(Err(error)) => {
                count_failure(&self.hints.failed, &ServerError::from(error));
                HintSent::Dropped
            }
            Err(_) => {
                if !stalled {
                    tracing::warn!(window = WINDOW, "hints are not answered, dropping them until they are");
                    self.hints.stalled.store(true, Ordering::Relaxed);
                }
                HintSent::Dropped
            }
        }
    }

    /// Hints that the stream refused or did not answer for, so far.
    pub fn hints_failed(&self) -> u64 {
        self.hints.failed.load(Ordering::Relaxed)
    }

    /// Writes an event and waits until it is stored.
    pub async fn event(&self, event: &Event) -> Result<(), PublishError> {
        self.write_event(event, None).await
    }

    /// Like [`Self::event`], stored once even when several say it within two minutes under the same `msg_id`.
    pub async fn event_once(&self, event: &Event, msg_id: &str) -> Result<(), PublishError> {
        self.write_event(event, Some(msg_id)).await
    }

    async fn write_event(&self, event: &Event, msg_id: Option<&str>) -> Result<(), PublishError> {
        let mut message = raw::json_message(codec::to_json(event)?);
        if let Some(msg_id) = msg_id {
            message = message.message_id(msg_id);
        }
        raw::publish(&self.nats, self.nats.subjects().event(event), message).await?;
        Ok(())
    }

    /// Sends a partial; nobody waits for it to be stored.
    pub async fn partial(&self, partial: &Partial) -> Result<(), PublishError> {
        let subject = self.nats.subjects().partial(partial.kind, &partial.id);
        let body = codec::to_json(partial)?.into();
        let sent = self.nats.client().publish_with_headers(subject, raw::json_headers(), body).await;
        Ok(sent.map_err(ServerError::from)?)
    }

    /// Puts away what failed for good, with everything a person needs to see why.
    pub async fn dead<T: Serialize + Sync>(&self, kind: Kind, id: &StreamId, letter: &T) -> Result<(), PublishError> {
        self.write_letter(kind, id, letter, None).await
    }

    /// Like [`Self::dead`], stored once even when it is said again within two minutes under the same `msg_id`.
    pub async fn dead_once<T: Serialize + Sync>(
        &self,
        kind: Kind,
        id: &StreamId,
        letter: &T,
        msg_id: &str,
    ) -> Result<(), PublishError> {
        self.write_letter(kind, id, letter, Some(msg_id)).await
    }

    async fn write_letter<T: Serialize + Sync>(
        &self,
        kind: Kind,
        id: &StreamId,
        letter: &T,
        msg_id: Option<&str>,
    ) -> Result<(), PublishError> {
        let mut message = raw::json_message(codec::to_json(letter)?);
        if let Some(msg_id) = msg_id {
            message = message.message_id(msg_id);
        }
        raw::publish(&self.nats, self.nats.subjects().dead(kind, id), message).await?;
        Ok(())
    }
}

/// None where a header cannot be sent, which an entry of the log cannot have unless it was unreadable.
fn hint_headers(entry: &RawEntry, prev: Option<u64>) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    // Which trace it is part of its worker was told with its assignment.
    for (name, value) in entry.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case(TRACEPARENT)) {
        let name: HeaderName = name.parse().ok()?;
        let value: async_nats::HeaderValue = value.parse().ok()?;
        headers.append(name, value);
    }
    headers.insert(ASR_LOG_SEQ, entry.seq.to_string());
    if let Some(prev) = prev {
        headers.insert(ASR_LOG_PREV, prev.to_string());
    }
    Some(headers)
}

async fn read_answers(mut rx: mpsc::Receiver<PublishAckFuture>, failed: Arc<AtomicU64>, stop: CancellationToken) {
    let mut waiting = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            answer = rx.recv() => match answer {
                Some(answer) => waiting.push(answer.into_future()),
                // Every publisher is gone; what is still unanswered interests nobody.
                None => return,
            },
            Some(result) = waiting.next() => {
                if let Err(error) = result {
                    count_failure(&failed, &ServerError::from(error));
                }
            }
        }
    }
}

fn count_failure(failed: &AtomicU64, error: &ServerError) {
    let count = failed.fetch_add(1, Ordering::Relaxed) + 1;
    // One line for each doubling: a stalled stream fails thousands a second.
    if count.is_power_of_two() {
        tracing::warn!(count, %error, "hints failed, workers read the log instead");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn a_hint_carries_its_place_in_the_log() {
        let entry = RawEntry {
            seq: 42,
            headers: vec![("Asr-Seq".into(), "7".into()), ("Traceparent".into(), "00".into())],
            payload: Bytes::from_static(b"ab"),
        };
        let headers = hint_headers(&entry, Some(40)).expect("headers");
        let value = |name: &str| headers.get(name).map(|v| v.as_str().to_owned());
        assert_eq!(value(ASR_LOG_SEQ).as_deref(), Some("42"));
        assert_eq!(value(ASR_LOG_PREV).as_deref(), Some("40"));
        assert_eq!(value("Asr-Seq").as_deref(), Some("7"));
        assert_eq!(value("Traceparent"), None, "once, with the assignment");
        assert!(hint_headers(&entry, None).expect("headers").get(ASR_LOG_PREV).is_none());
    }
}
