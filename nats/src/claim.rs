//! A worker's pull of hints: only as many as it has room for, each acked when taken.
//!
//! One long-lived inbox and credits: a request goes out for what is free and not asked for yet. The server's heartbeats
//! show a pull that nobody serves any more; then, and after each reconnect, it asks again under a new inbox.

use std::time::Duration;

use async_nats::Subscriber;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::{sync::watch, time::Instant};
use voxfleet_schema::{
    audio::{ASR_LOG_PREV, ASR_LOG_SEQ, RawEntry},
    id::{StreamId, WorkerName},
};

use crate::{
    Nats, ServerError,
    connect::ConnectionState,
    raw::{self, PullRequest, PullStatus, SILENCE},
    retry::Backoff,
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
/// A request the server forgets by itself: a worker that died leaves nothing that swallows hints for long.
const EXPIRES: Duration = Duration::from_secs(5);

/// Pulls from one incarnation's consumer.
pub struct LivePull {
    nats: Nats,
    pull_subject: String,
    state: watch::Receiver<ConnectionState>,
    active: Option<Active>,
    backoff: Backoff,
    not_before: Option<Instant>,
}

struct Active {
    subscriber: Subscriber,
    inbox: String,
    connects: u64,
    /// Asked for and not come.
    credits: usize,
    heard: Instant,
}

impl LivePull {
    pub fn new(nats: &Nats, worker: &WorkerName) -> Self {
        Self {
            nats: nats.clone(),
            pull_subject: format!("$JS.API.CONSUMER.MSG.NEXT.{LIVE}.{}", consumer_name(worker)),
            state: nats.connection_events(),
            active: None,
            backoff: Backoff::default(),
            not_before: None,
        }
    }

    /// The next hint. `free` (at least 1) is how many the caller has room for now: no more than that are ever asked for.
    /// Waits while there is none, or no consumer yet; survives reconnects. Fails only when the connection is closed.
    /// Cancel-safe: a hint cut off here comes again or is read from the log.
    pub async fn next(&mut self, free: usize) -> Result<Hint, ClaimError> {
        let want = free.clamp(1, MOST);
        loop {
            if let Err(error) = self.prepare(want).await {
                if matches!(error, ServerError::Closed) {
                    return Err(error.into());
                }
                tracing::warn!(%error, "pull of hints failed, asking again");
                self.lose();
                continue;
            }
            let Some(active) = self.active.as_mut() else { continue };
            tokio::select! {
                biased;
                message = active.subscriber.next() => {
                    let Some(message) = message else { return Err(ServerError::Closed.into()) };
                    active.heard = Instant::now();
                    match raw::pull_status(&message) {
                        Some(PullStatus::Alive) => self.backoff = Backoff::default(),
                        Some(PullStatus::Ended { unused }) => {
                            active.credits -= unused.min(active.credits);
                            self.backoff = Backoff::default();
                        }
                        Some(PullStatus::Gone) => {
                            tracing::debug!("no consumer for hints, waiting for it");
                            self.lose();
                        }
                        None => {
                            active.credits = active.credits.saturating_sub(1);
                            self.backoff = Backoff::default();
                            if let Some(hint) = self.take(message).await? {
                                return Ok(hint);
                            }
                        }
                    }
                }
                changed = self.state.changed() => {
                    let now = *self.state.borrow_and_update();
                    if changed.is_err() || now.closed {
                        return Err(ServerError::Closed.into());
                    }
                    if now.connects != active.connects {
                        self.active = None;
                    }
                }
                () = tokio::time::sleep_until(active.heard + SILENCE) => self.lose(),
            }
        }
    }

    /// Subscribes where needed, and asks for what is free and not asked for.
    async fn prepare(&mut self, want: usize) -> Result<(), ServerError> {
        if let Some(at) = self.not_before {
            tokio::time::sleep_until(at).await;
            self.not_before = None;
        }
        if self.active.is_none() {
            let now = *self.state.borrow_and_update();
            if now.closed {
                return Err(ServerError::Closed);
            }
            let inbox = self.nats.client().new_inbox();
            let subscriber = self.nats.client().subscribe(inbox.clone()).await?;
            self.active = Some(Active { subscriber, inbox, connects: now.connects, credits: 0, heard: Instant::now() });
        }
        let Some(active) = self.active.as_mut() else { return Ok(()) };
        // Half used up, not each one: a request costs the server as much as a message.
        if active.credits * 2 <= want && active.credits < want {
            let batch = want - active.credits;
            let body = PullRequest::body(batch, None, EXPIRES)?;
            self.nats.client().publish_with_reply(self.pull_subject.clone(), active.inbox.clone(), body).await?;
            if active.credits == 0 {
                active.heard = Instant::now();
            }
            active.credits += batch;
        }
        Ok(())
    }

    fn lose(&mut self) {
        self.active = None;
        self.not_before = Some(Instant::now() + self.backoff.next_delay());
    }

    /// Acks a message and reads it. None: it is no hint.
    async fn take(&self, message: async_nats::Message) -> Result<Option<Hint>, ServerError> {
        let Some(reply) = message.reply.clone().filter(|reply| reply.starts_with("$JS.ACK.")) else {
            // Somebody wrote to our inbox.
            return Ok(None);
        };
        self.nats.client().publish(reply, Bytes::from_static(b"+ACK")).await?;
        let hint = read(&self.nats, message);
        if hint.is_none() {
            tracing::warn!("a message among the hints is none");
        }
        Ok(hint)
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
