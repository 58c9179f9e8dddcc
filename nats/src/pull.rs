//! A durable consumer's pull: only as many messages as there is room for, none lost.
//!
//! One long-lived inbox and credits: a request goes out for what is free and not asked for yet. The server's heartbeats
//! show a pull that nobody serves any more; then, and after each reconnect, it asks again under a new inbox.

use std::time::Duration;

use async_nats::Subscriber;
use futures_util::StreamExt;
use tokio::{sync::watch, time::Instant};

use crate::{
    Nats, ServerError,
    connect::ConnectionState,
    raw::{self, PullRequest, PullStatus, SILENCE},
    retry::Backoff,
};

/// A request the server forgets by itself: a process that died leaves nothing that swallows messages for long.
const EXPIRES: Duration = Duration::from_secs(5);

pub(crate) struct Pull {
    nats: Nats,
    /// For log lines.
    what: &'static str,
    pull_subject: String,
    state: watch::Receiver<ConnectionState>,
    active: Option<Active>,
    backoff: Backoff,
    not_before: Option<Instant>,
    losses: u32,
}

struct Active {
    subscriber: Subscriber,
    inbox: String,
    connects: u64,
    /// Asked for and not come.
    credits: usize,
    heard: Instant,
}

pub(crate) enum Pulled {
    Message(async_nats::Message),
    /// There is no such consumer (any more). The next call asks again, after a while.
    NoConsumer,
    /// The connection was lost since the last message, so many times in a row.
    Reconnected {
        losses: u32,
    },
}

impl Pull {
    pub(crate) fn new(nats: &Nats, what: &'static str, stream: &str, consumer: &str) -> Self {
        Self {
            nats: nats.clone(),
            what,
            pull_subject: format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"),
            state: nats.connection_events(),
            active: None,
            backoff: Backoff::default(),
            not_before: None,
            losses: 0,
        }
    }

    /// The next message, not acked. `want` (at least 1) is how many the caller has room for now: no more than that are ever
    /// asked for. Waits while there is none; survives reconnects. Fails only when the connection is closed. Cancel-safe:
    /// what is cut off here comes again when its ack is due.
    pub(crate) async fn next(&mut self, want: usize) -> Result<Pulled, ServerError> {
        loop {
            if let Err(error) = self.prepare(want).await {
                if matches!(error, ServerError::Closed) {
                    return Err(error);
                }
                tracing::warn!(what = self.what, %error, "pull failed, asking again");
                self.lose();
                continue;
            }
            let Some(active) = self.active.as_mut() else { continue };
            tokio::select! {
                biased;
                message = active.subscriber.next() => {
                    let Some(message) = message else { return Err(ServerError::Closed) };
                    active.heard = Instant::now();
                    match raw::pull_status(&message) {
                        Some(PullStatus::Alive) => self.backoff = Backoff::default(),
                        Some(PullStatus::Ended { unused }) => {
                            active.credits -= unused.min(active.credits);
                            self.backoff = Backoff::default();
                        }
                        Some(PullStatus::Gone) => {
                            tracing::debug!(what = self.what, "no consumer to pull from, waiting for it");
                            self.lose();
                            return Ok(Pulled::NoConsumer);
                        }
                        // Anything else in our inbox is somebody else's.
                        None if message.reply.as_ref().is_some_and(|reply| reply.starts_with("$JS.ACK.")) => {
                            active.credits = active.credits.saturating_sub(1);
                            (self.losses, self.backoff) = (0, Backoff::default());
                            return Ok(Pulled::Message(message));
                        }
                        None => {}
                    }
                }
                changed = self.state.changed() => {
                    let now = *self.state.borrow_and_update();
                    if changed.is_err() || now.closed {
                        return Err(ServerError::Closed);
                    }
                    if now.connects != active.connects {
                        self.active = None;
                        self.losses += 1;
                        return Ok(Pulled::Reconnected { losses: self.losses });
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
}
