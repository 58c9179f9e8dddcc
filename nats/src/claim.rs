//! A worker's pull of hints: only as many as it has room for, each acked when taken.

use bytes::Bytes;
use voxfleet_schema::{
    audio::{ASR_LOG_PREV, ASR_LOG_SEQ, RawEntry},
    id::{StreamId, WorkerName},
};

use crate::{
    Nats, ServerError,
    pull::{Pull, Pulled},
    raw,
    subjects::Subject,
    topology::{consumer_name, names::LIVE},
};

#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// A copy of a log entry, already acked.
#[derive(Debug, Clone)]
pub struct Hint {
    pub id: StreamId,
    /// `entry.seq` is the sequence in the log. Only the producer's `Asr-*` headers are left in it.
    pub entry: RawEntry,
    /// The session's entry before it, when the dispatcher saw both.
    pub prev: Option<u64>,
}

/// Hints asked for at once, whatever is free.
const MOST: usize = 256;

/// Pulls from one incarnation's consumer.
pub struct LivePull {
    nats: Nats,
    pull: Pull,
}

impl LivePull {
    pub fn new(nats: &Nats, worker: &WorkerName) -> Self {
        Self { nats: nats.clone(), pull: Pull::new(nats, "hints", LIVE, &consumer_name(worker)) }
    }

    /// The next hint. `free` (at least 1) is how many the caller has room for now: no more than that are ever asked for.
    /// Waits while there is none, or no consumer yet; survives reconnects. Fails only when the connection is closed.
    /// Cancel-safe: a hint cut off here comes again or is read from the log.
    pub async fn next(&mut self, free: usize) -> Result<Hint, ClaimError> {
        loop {
            let Pulled::Message(message) = self.pull.next(free.clamp(1, MOST)).await? else { continue };
            if let Some(hint) = self.take(message).await {
                return Ok(hint);
            }
        }
    }

    /// Acks a message and reads it. None: it is no hint.
    async fn take(&self, message: async_nats::Message) -> Option<Hint> {
        if let Some(reply) = message.reply.clone()
            && let Err(error) = self.nats.client().publish(reply, Bytes::from_static(b"+ACK")).await
        {
            // It comes again when its ack is due, and is dropped then.
            tracing::debug!(%error, "a hint is not acked");
        }
        let hint = read(&self.nats, message);
        if hint.is_none() {
            tracing::warn!("a message among the hints is none");
        }
        hint
    }
}

fn read(nats: &Nats, message: async_nats::Message) -> Option<Hint> {
    let Some(Subject::Live { id, .. }) = nats.subjects().parse(&message.subject) else { return None };
    let headers = message.headers?;
    let number = |name: &str| headers.get(name)?.as_str().parse::<u64>().ok();
    let seq = number(ASR_LOG_SEQ)?;
    let prev = number(ASR_LOG_PREV);
    Some(Hint {
        id,
        entry: RawEntry { seq, headers: raw::asr_headers(Some(&headers)), payload: message.payload },
        prev,
    })
}
