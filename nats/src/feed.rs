//! Endless ordered reading of a stream, for the log's tail, readers of transcripts and events, and bucket watches.
//!
//! A feed owns a short-lived pull consumer and keeps credits with the server. Whatever goes wrong (a lost connection, a
//! restarted server, a leader that was killed, a gap in the consumer's numbering) it makes a new consumer that begins
//! after the last message it gave out. What it gives out is each stored message once, in stream order.

use std::{
    future::Future,
    pin::Pin,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_nats::{
    HeaderMap, Subject, Subscriber,
    jetstream::consumer::{self, AckPolicy, DeliverPolicy, IntoConsumerConfig, pull},
};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::Serialize;
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;

use crate::{
    Nats, ServerError,
    connect::ConnectionState,
    raw::{self, Delivery, Get, PullRequest, PullStatus, SILENCE},
    retry::Backoff,
};

/// Where a reader begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The oldest message there is.
    First,
    /// Only what comes from now on.
    New,
    /// This stream sequence; the first one when it is above what the stream has.
    Seq(u64),
    /// The newest message of each subject, then everything new.
    LastPerSubject,
}

/// Messages asked for at once; the next request goes out when half have come.
const BATCH: usize = 512;
/// Bytes asked for at once. Above the largest message there can be, or it would never come.
const BATCH_BYTES: usize = 16 * 1024 * 1024;
const EXPIRES: Duration = Duration::from_secs(30);
/// [`Feed::forgotten_after`], unless told otherwise.
const INACTIVE: Duration = Duration::from_secs(30);
/// How long a server may lag behind the leader until what it has is no answer.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(10);
/// Losses in a row, without a message in between, after which the next message itself is suspected.
const SUSPECT_AFTER: u32 = 2;

/// One message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) seq: u64,
    pub(crate) stored_ms: u64,
    pub(crate) pending: u64,
    pub(crate) subject: Subject,
    /// None when the header block cannot be read; see [`raw::asr_headers`].
    pub(crate) headers: Option<HeaderMap>,
    pub(crate) payload: Bytes,
}

/// The server's word for the length of a payload that it leaves out.
const LEFT_OUT: &str = "Nats-Msg-Size";

impl Message {
    /// Length of its payload, sent or left out.
    pub(crate) fn bytes(&self) -> u64 {
        let said = self.headers.as_ref().and_then(|headers| headers.get(LEFT_OUT)?.as_str().parse().ok());
        said.unwrap_or(self.payload.len() as u64)
    }
}

pub(crate) struct Feed {
    nats: Nats,
    stream: &'static str,
    filter: String,
    start: Start,
    headers_only: bool,
    inactive: Duration,
    /// After the first message, or once it is known where "new" begins.
    next_seq: Option<u64>,
    active: Option<Active>,
    /// A consumer on its way. Kept here: whoever stops waiting for the next message must not begin it anew each time.
    making: Option<Making>,
    state: watch::Receiver<ConnectionState>,
    backoff: Backoff,
    /// Not before then, after a failure.
    not_before: Option<Instant>,
    /// Times the connection was lost since the last message.
    losses: u32,
}

type MadeLater = Pin<Box<dyn Future<Output = Result<Made, ServerError>> + Send>>;

struct Making {
    policy: DeliverPolicy,
    connects: u64,
    /// Never locked: a feed is looked at by several threads, this by its owner alone.
    made: Mutex<MadeLater>,
}

struct Made {
    inbox: String,
    subscriber: Subscriber,
    info: consumer::Info,
    /// The place to go on from is beyond the stream.
    beyond: bool,
}

struct Active {
    subscriber: Subscriber,
    inbox: String,
    pull_subject: String,
    credits: usize,
    consumer_seq: u64,
    connects: u64,
    heard: Instant,
    pending_at_start: u64,
}

enum Took {
    Message(Message),
    Nothing,
    Lost(&'static str),
}

impl Feed {
    pub(crate) fn new(nats: &Nats, stream: &'static str, filter: String, start: Start) -> Self {
        Self {
            nats: nats.clone(),
            stream,
            filter,
            start,
            headers_only: false,
            inactive: INACTIVE,
            next_seq: None,
            active: None,
            making: None,
            state: nats.connection_events(),
            backoff: Backoff::default(),
            not_before: None,
            losses: 0,
        }
    }

    /// Without payloads: [`Message::bytes`] says how long each is.
    pub(crate) fn headers_only(self) -> Self {
        Self { headers_only: true, ..self }
    }

    /// How long the server keeps a consumer that nobody pulls from.
    pub(crate) fn forgotten_after(self, inactive: Duration) -> Self {
        Self { inactive, ..self }
    }

    /// The next message. After an error the next call goes on, not before a while. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Message, ServerError> {
        loop {
            if self.active.is_none()
                && let Some(message) = self.establish().await?
            {
                return Ok(message);
            }
            let Some(active) = self.active.as_mut() else { continue };
            if active.credits <= BATCH / 2 {
                active.ask(&self.nats).await?;
            }
            let silent = active.heard + SILENCE;
            tokio::select! {
                biased;
                message = active.subscriber.next() => match message {
                    None => return Err(ServerError::Closed),
                    Some(message) => match active.take(message) {
                        Took::Message(message) => {
                            self.next_seq = Some(message.seq + 1);
                            (self.losses, self.backoff) = (0, Backoff::default());
                            return Ok(message);
                        }
                        Took::Nothing => self.backoff = Backoff::default(),
                        Took::Lost(why) => self.lose(why),
                    },
                },
                changed = self.state.changed() => {
                    let now = *self.state.borrow_and_update();
                    if changed.is_err() || now.closed {
                        return Err(ServerError::Closed);
                    }
                    if now.connects != active.connects {
                        self.losses += 1;
                        self.lose("connection was lost");
                    }
                }
                () = tokio::time::sleep_until(silent) => self.lose("server is silent"),
            }
        }
    }

    /// Everything up to what the stream holds now, for a feed that has just begun. Its consumer may stand on a server that
    /// lags behind the stream's leader, and ends where that one ends: then another one is asked, until what the leader had as
    /// its last was read.
    pub(crate) async fn read_all(self) -> Result<Vec<Message>, ServerError> {
        let until = Instant::now() + CAUGHT_UP_WITHIN;
        let mut backoff = Backoff::default();
        loop {
            let last = self.last_seq().await?;
            let messages = self.anew().read_to_its_end().await?;
            let read = messages.last().map_or(0, |message| message.seq);
            if read >= last {
                return Ok(messages);
            }
            if Instant::now() >= until {
                tracing::warn!(
                    stream = self.stream,
                    read,
                    last,
                    "the server that was read from stays behind the leader"
                );
                return Err(ServerError::Timeout);
            }
            tracing::debug!(stream = self.stream, read, last, "read from a server that lags, again");
            backoff.wait().await;
        }
    }

    /// Sequence of the leader's last message under the filter; 0: there is none, or this login may not ask.
    async fn last_seq(&self) -> Result<u64, ServerError> {
        let which = Get { last_by_subj: Some(&self.filter), ..Get::default() };
        match raw::leader_get(&self.nats, self.stream, &which).await {
            Ok(stored) => Ok(stored.map_or(0, |stored| stored.seq)),
            Err(ServerError::Denied { .. }) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// The same from its beginning.
    fn anew(&self) -> Self {
        let feed = Self::new(&self.nats, self.stream, self.filter.clone(), self.start);
        Self { headers_only: self.headers_only, inactive: self.inactive, ..feed }
    }

    async fn read_to_its_end(mut self) -> Result<Vec<Message>, ServerError> {
        let mut messages = Vec::new();
        messages.extend(self.establish().await?);
        if self.active.as_ref().is_some_and(|active| active.pending_at_start == 0) {
            return Ok(messages);
        }
        loop {
            let message = self.next().await?;
            let last = message.pending == 0;
            messages.push(message);
            if last {
                return Ok(messages);
            }
        }
    }

    fn lose(&mut self, why: &'static str) {
        tracing::debug!(stream = self.stream, next_seq = self.next_seq, why, "reading goes on with a new consumer");
        self.active = None;
        self.not_before = Some(Instant::now() + self.backoff.next_delay());
    }

    /// Makes a consumer and subscribes. Gives out the one message that no connection survives, where that is the trouble.
    async fn establish(&mut self) -> Result<Option<Message>, ServerError> {
        if let Some(at) = self.not_before {
            tokio::time::sleep_until(at).await;
            self.not_before = None;
        }
        let made = self.try_establish().await;
        if made.is_err() {
            self.not_before = Some(Instant::now() + self.backoff.next_delay());
        }
        made
    }

    async fn try_establish(&mut self) -> Result<Option<Message>, ServerError> {
        let making = match self.making.take() {
            Some(making) => making,
            None => {
                if self.state.borrow_and_update().closed {
                    return Err(ServerError::Closed);
                }
                if self.losses >= SUSPECT_AFTER
                    && let Some(message) = self.poisonous().await?
                {
                    return Ok(Some(message));
                }
                self.make()
            }
        };
        let made = self.making.insert(making).made.get_mut().unwrap_or_else(PoisonError::into_inner).await;
        let Some(Making { policy, connects, .. }) = self.making.take() else { return Ok(None) };
        let Made { inbox, subscriber, info, beyond } = made?;
        if beyond {
            (self.start, self.next_seq) = (Start::First, None);
            return Ok(None);
        }
        if policy == DeliverPolicy::New {
            self.next_seq = Some(info.delivered.stream_sequence + 1);
        }
        self.active = Some(Active {
            subscriber,
            inbox,
            pull_subject: format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", self.stream, info.name),
            credits: 0,
            consumer_seq: 0,
            connects,
            heard: Instant::now(),
            pending_at_start: info.num_pending,
        });
        Ok(None)
    }

    fn make(&self) -> Making {
        let connects = self.state.borrow().connects;
        let policy = match (self.next_seq, self.start) {
            (Some(seq), _) | (None, Start::Seq(seq)) => DeliverPolicy::ByStartSequence { start_sequence: seq.max(1) },
            (None, Start::First) => DeliverPolicy::All,
            (None, Start::New) => DeliverPolicy::New,
            (None, Start::LastPerSubject) => DeliverPolicy::LastPerSubject,
        };
        let feed = self.anew();
        let made: MadeLater = Box::pin(async move {
            // Before the consumer exists, so that nothing can be sent to nobody.
            let inbox = feed.nats.client().new_inbox();
            let subscriber = feed.nats.client().subscribe(inbox.clone()).await?;
            let info = create(&feed, policy).await?;
            let beyond = match policy {
                DeliverPolicy::ByStartSequence { start_sequence } if info.num_pending == 0 => {
                    feed.is_beyond_the_stream(start_sequence).await
                }
                _ => false,
            };
            Ok(Made { inbox, subscriber, info, beyond })
        });
        Making { policy, connects, made: Mutex::new(made) }
    }

    /// Whether the stream ends before the entry in front of `seq`: it was lost and made again, and a consumer that waits for
    /// `seq` would wait for ever.
    async fn is_beyond_the_stream(&self, seq: u64) -> bool {
        match raw::stream_info(&self.nats, self.stream).await {
            Ok(info) if info.state.last_sequence + 1 < seq => {
                let last = info.state.last_sequence;
                tracing::warn!(
                    stream = self.stream,
                    seq,
                    last,
                    "place to go on from is beyond the stream, reading starts at its first message"
                );
                true
            }
            Ok(_) => false,
            Err(error) => {
                // A reader without that permission follows a stream that stays; the next new consumer asks again.
                tracing::debug!(stream = self.stream, %error, "cannot see where the stream ends");
                false
            }
        }
    }

    /// A stranger's header block can be such that the client gives up the connection that brings it. The API brings it
    /// inside JSON.
    async fn poisonous(&mut self) -> Result<Option<Message>, ServerError> {
        let from = match (self.next_seq, self.start) {
            (Some(seq), _) | (None, Start::Seq(seq)) => seq.max(1),
            (None, Start::First) => 1,
            (None, Start::New | Start::LastPerSubject) => return Ok(None),
        };
        let which = Get { seq: Some(from), next_by_subj: Some(&self.filter), ..Get::default() };
        let Some(stored) = raw::leader_get(&self.nats, self.stream, &which).await? else { return Ok(None) };
        if stored.headers.is_some() {
            return Ok(None);
        }
        tracing::warn!(stream = self.stream, seq = stored.seq, "message with unreadable headers");
        self.next_seq = Some(stored.seq + 1);
        self.losses = 0;
        Ok(Some(Message {
            seq: stored.seq,
            stored_ms: 0,
            pending: 1,
            subject: stored.subject.into(),
            headers: None,
            payload: stored.payload,
        }))
    }
}

impl Active {
    async fn ask(&mut self, nats: &Nats) -> Result<(), ServerError> {
        let bytes = BATCH_BYTES.max(nats.max_payload() * 2);
        let body = PullRequest::body(BATCH, Some(bytes), EXPIRES)?;
        nats.client().publish_with_reply(self.pull_subject.clone(), self.inbox.clone(), body).await?;
        self.credits += BATCH;
        Ok(())
    }

    fn take(&mut self, message: async_nats::Message) -> Took {
        self.heard = Instant::now();
        match raw::pull_status(&message) {
            Some(PullStatus::Alive) => return Took::Nothing,
            Some(PullStatus::Ended { unused }) => {
                self.credits = self.credits.saturating_sub(unused.min(BATCH));
                return Took::Nothing;
            }
            Some(PullStatus::Gone) => return Took::Lost("consumer is gone"),
            None => {}
        }
        let Some(delivery) = message.reply.as_deref().and_then(Delivery::parse) else {
            // Somebody wrote to our inbox.
            return Took::Nothing;
        };
        if delivery.consumer_seq != self.consumer_seq + 1 {
            return Took::Lost("a message is missing");
        }
        self.consumer_seq = delivery.consumer_seq;
        self.credits = self.credits.saturating_sub(1);
        Took::Message(Message {
            seq: delivery.stream_seq,
            stored_ms: delivery.stored_ms,
            pending: delivery.pending,
            subject: message.subject,
            headers: Some(message.headers.unwrap_or_default()),
            payload: message.payload,
        })
    }
}

async fn create(feed: &Feed, deliver_policy: DeliverPolicy) -> Result<consumer::Info, ServerError> {
    let Feed { nats, stream, filter, headers_only, inactive, .. } = feed;
    #[derive(Serialize)]
    struct Request<'a> {
        stream_name: &'a str,
        config: consumer::Config,
    }
    let name = format!("feed-{}", Uuid::new_v4().simple());
    let config = pull::Config {
        name: Some(name.clone()),
        deliver_policy,
        ack_policy: AckPolicy::None,
        filter_subject: filter.clone(),
        headers_only: *headers_only,
        inactive_threshold: *inactive,
        // It is made again whenever it is lost, so it needs neither disk nor copies.
        memory_storage: true,
        num_replicas: 1,
        ..pull::Config::default()
    };
    let request = Request { stream_name: stream, config: config.into_consumer_config() };
    raw::api(nats, format!("CONSUMER.CREATE.{stream}.{name}.{filter}"), &request).await
}
