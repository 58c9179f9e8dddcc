//! Jobs on their way: from a producer's publish to the dispatcher ([`JobIntake`]), and as work items to a worker
//! ([`publish_work`], [`WorkPull`]).
//!
//! Nothing here is acked before its receiver says so; what a receiver that died had taken comes again. A claim has three
//! exits: done, later, term.

use std::time::Duration;

use async_nats::jetstream::{
    consumer::{self, AckPolicy, DeliverPolicy, IntoConsumerConfig, pull},
    message::PublishMessage,
};
use bytes::Bytes;
use serde::Serialize;
use voxfleet_schema::{
    codec::{self, CONTENT_TYPE, CodecError},
    id::{IdError, StreamId, WorkerName},
    job::WorkItem,
    session::Priority,
    trace::{TRACEPARENT, TraceContext},
};

pub use crate::claim::ClaimError;
use crate::{
    Nats, ServerError,
    pull::{Pull, Pulled},
    raw::{self, Delivery, Get},
    retry::Backoff,
    subjects::Subject,
    topology::{
        consumer_name,
        names::{JOBS, WORK},
    },
};

#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    #[error("cannot encode")]
    Encode(#[source] CodecError),
    /// What stands on the worker's subject for this job is no work item.
    #[error("work item {seq} cannot be read")]
    Malformed { seq: u64, source: CodecError },
    /// A newer assignment of this job stands on the worker's subject.
    #[error("epoch {epoch} of this job is queued already")]
    Newer { epoch: u64 },
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// The second last token of a job's subject is none of ours. Carries at most 16 characters of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("priority {0:?} is not among high, normal and low")]
pub struct BadPriority(pub String);

/// Submits a job as a producer does: the message is the queue's once this returns its sequence. Any body is taken; the
/// dispatcher refuses what is no request (event `rejected`). `trace`: what it is to be part of.
pub async fn publish_job(
    nats: &Nats,
    priority: Priority,
    id: &StreamId,
    content_type: &str,
    body: Bytes,
    trace: Option<TraceContext>,
) -> Result<u64, ServerError> {
    let mut headers = async_nats::HeaderMap::new();
    headers.insert(CONTENT_TYPE, content_type);
    let headers = raw::traced(headers, trace.as_ref());
    let message = PublishMessage::build().payload(body).headers(headers);
    Ok(raw::publish(nats, nats.subjects().job(priority, id), message).await?.sequence)
}

/// Gives a job to a worker and returns where it stands. Idempotent: an item that is queued already, or taken and not done,
/// is left alone; one of an older epoch is replaced.
pub async fn publish_work(nats: &Nats, worker: &WorkerName, item: &WorkItem) -> Result<u64, WorkError> {
    let putting = tokio::time::timeout(PUT_WITHIN, put_work(nats, worker, item)).await;
    putting.unwrap_or_else(|_| Err(ServerError::Timeout.into()))
}

/// How long a work item may take to get through: several answers of a server that is slow.
const PUT_WITHIN: Duration = Duration::from_secs(20);

async fn put_work(nats: &Nats, worker: &WorkerName, item: &WorkItem) -> Result<u64, WorkError> {
    let mut backoff = Backoff::default();
    let subject = nats.subjects().work_item(worker, &item.job);
    let body = Bytes::from(codec::to_msgpack(item).map_err(WorkError::Encode)?);
    loop {
        // A fence, not a message id: an id would swallow the same item for two minutes after it was acked.
        let message = PublishMessage::build()
            .payload(body.clone())
            .headers(raw::msgpack_headers())
            .expected_last_subject_sequence(0);
        match raw::publish(nats, subject.clone(), message).await {
            Ok(ack) => return Ok(ack.sequence),
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(error.into()),
        }
        match newest(nats, &subject).await? {
            Some((seq, Ok(found))) if found.epoch == item.epoch => return Ok(seq),
            Some((_, Ok(found))) if found.epoch > item.epoch => return Err(WorkError::Newer { epoch: found.epoch }),
            Some((seq, _)) => raw::purge(nats, WORK, &subject, Some(seq + 1)).await?,
            // Done in between, or another publish of a cluster was on its way.
            None => {}
        }
        backoff.wait().await;
    }
}

/// What is queued for this worker of this job, taken and not acked included, from the leader.
pub async fn queued_work(nats: &Nats, worker: &WorkerName, job: &StreamId) -> Result<Option<WorkItem>, WorkError> {
    match newest(nats, &nats.subjects().work_item(worker, job)).await? {
        None => Ok(None),
        Some((seq, item)) => item.map(Some).map_err(|source| WorkError::Malformed { seq, source }),
    }
}

/// Takes back what is queued for this worker of this job. One that is taken already goes on, but its ack changes nothing.
pub async fn purge_work(nats: &Nats, worker: &WorkerName, job: &StreamId) -> Result<(), ServerError> {
    raw::purge(nats, WORK, &nats.subjects().work_item(worker, job), None).await
}

async fn newest(nats: &Nats, subject: &str) -> Result<Option<(u64, Result<WorkItem, CodecError>)>, ServerError> {
    let which = Get { last_by_subj: Some(subject), ..Get::default() };
    let stored = raw::leader_get(nats, WORK, &which).await?;
    Ok(stored.map(|stored| (stored.seq, codec::from_msgpack(&stored.payload))))
}

/// A submitted job as it came; nothing of it is checked yet.
#[derive(Debug)]
pub struct JobMessage {
    pub priority: Result<Priority, BadPriority>,
    pub id: Result<StreamId, IdError>,
    /// Sequence in `ASR_JOBS`.
    pub seq: u64,
    pub content_type: Option<String>,
    pub traceparent: Option<String>,
    pub payload: Bytes,
    /// How often it came, this time included.
    pub delivered: u64,
    pub ack: JobAck,
}

/// What becomes of a submitted job. Dropped, it comes again after half a minute.
#[derive(Debug)]
pub struct JobAck {
    nats: Nats,
    exit: Exit,
}

#[derive(Debug)]
enum Exit {
    /// Where the server waits for the ack.
    Reply(async_nats::Subject),
    /// It was read past its consumer.
    Stored { seq: u64 },
}

impl JobAck {
    /// It is the dispatcher's now, accepted or refused; the queue forgets it. Waits for the server's word. On an error it
    /// may come again.
    pub async fn done(self) -> Result<(), ServerError> {
        match self.exit {
            Exit::Reply(reply) => ask(&self.nats, reply, Bytes::from_static(b"+ACK")).await,
            Exit::Stored { seq } => raw::delete(&self.nats, JOBS, seq).await.map(drop),
        }
    }

    /// It comes again after `delay`.
    pub async fn later(self, delay: Duration) -> Result<(), ServerError> {
        match self.exit {
            Exit::Reply(reply) => tell(&self.nats, reply, nak(delay)).await,
            Exit::Stored { .. } => Ok(()),
        }
    }
}

/// Name of the intake's consumer.
pub(crate) const INTAKE: &str = "dispatcher";
const INTAKE_ACK_WAIT: Duration = Duration::from_secs(30);
/// Taken and not acked: what one dispatcher works on at a time.
const INTAKE_ACK_PENDING: i64 = 256;
/// Messages asked for at once. A body may be megabytes, and few are needed at a time.
const INTAKE_BATCH: usize = 8;
/// Connections lost in a row, without a message in between, after which a message itself is suspected.
const SUSPECT_AFTER: u32 = 2;

/// The dispatcher's end of `ASR_JOBS`. Only the active dispatcher has one; dropping it stops it.
pub struct JobIntake {
    nats: Nats,
    pull: Pull,
    made: bool,
}

impl JobIntake {
    pub fn new(nats: &Nats) -> Self {
        Self { nats: nats.clone(), pull: Pull::new(nats, "jobs", JOBS, INTAKE), made: false }
    }

    /// The next submitted job. Waits while there is none; makes its consumer where there is none; survives reconnects and
    /// restarted servers. Fails only when the connection is closed. Cancel-safe: what is cut off here comes again.
    pub async fn next(&mut self) -> Result<JobMessage, ClaimError> {
        loop {
            if !self.made {
                match ensure_intake(&self.nats).await {
                    Ok(()) => self.made = true,
                    Err(ServerError::Closed) => return Err(ServerError::Closed.into()),
                    // The pull below waits a while and says that there is no consumer.
                    Err(error) => tracing::warn!(%error, "no consumer for jobs, making it again soon"),
                }
            }
            match self.pull.next(INTAKE_BATCH).await? {
                Pulled::Message(message) => {
                    if let Some(job) = self.read(message) {
                        return Ok(job);
                    }
                }
                Pulled::NoConsumer => self.made = false,
                Pulled::Reconnected { losses } if losses >= SUSPECT_AFTER => {
                    if let Some(job) = self.poisonous().await {
                        return Ok(job);
                    }
                }
                Pulled::Reconnected { .. } => {}
            }
        }
    }

    fn read(&self, message: async_nats::Message) -> Option<JobMessage> {
        let reply = message.reply?;
        let delivery = Delivery::parse(&reply)?;
        let header = |name: &str| Some(message.headers.as_ref()?.get(name)?.as_str().to_owned());
        let (priority, id) = self.nats.subjects().parse_job(&message.subject);
        Some(JobMessage {
            priority: priority.map_err(BadPriority),
            id,
            seq: delivery.stream_seq,
            content_type: header(CONTENT_TYPE),
            traceparent: header(TRACEPARENT),
            payload: message.payload,
            delivered: delivery.delivered,
            ack: JobAck { nats: self.nats.clone(), exit: Exit::Reply(reply) },
        })
    }

    /// A stranger's header block can be such that the client gives up the connection that brings it, again and again. The
    /// API brings it inside JSON.
    async fn poisonous(&self) -> Option<JobMessage> {
        let mut seq = 1;
        for _ in 0..INTAKE_ACK_PENDING {
            let which = Get { seq: Some(seq), next_by_subj: Some(">"), ..Get::default() };
            let stored = match raw::leader_get(&self.nats, JOBS, &which).await {
                Ok(stored) => stored?,
                Err(error) => {
                    tracing::warn!(%error, "cannot look for a job with unreadable headers");
                    return None;
                }
            };
            if stored.headers.is_none() {
                tracing::warn!(seq = stored.seq, "job with unreadable headers");
                let (priority, id) = self.nats.subjects().parse_job(&stored.subject);
                return Some(JobMessage {
                    priority: priority.map_err(BadPriority),
                    id,
                    seq: stored.seq,
                    content_type: None,
                    traceparent: None,
                    payload: stored.payload,
                    delivered: 1,
                    ack: JobAck { nats: self.nats.clone(), exit: Exit::Stored { seq: stored.seq } },
                });
            }
            seq = stored.seq + 1;
        }
        None
    }
}

async fn ensure_intake(nats: &Nats) -> Result<(), ServerError> {
    #[derive(Serialize)]
    struct Request {
        stream_name: &'static str,
        config: consumer::Config,
    }
    // Without a filter: whatever the stream takes must come, literal wildcards in a subject included.
    let config = pull::Config {
        durable_name: Some(INTAKE.to_owned()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: INTAKE_ACK_WAIT,
        max_ack_pending: INTAKE_ACK_PENDING,
        ..pull::Config::default()
    };
    let request = Request { stream_name: JOBS, config: config.into_consumer_config() };
    let made: Result<consumer::Info, _> = raw::api(nats, format!("CONSUMER.CREATE.{JOBS}.{INTAKE}"), &request).await;
    made.map(|_| ())
}

/// A job given to this worker.
#[derive(Debug)]
pub struct Work {
    pub id: StreamId,
    /// An item that cannot be read is for [`WorkAck::term`].
    pub item: Result<WorkItem, CodecError>,
    /// Sequence in `ASR_WORK`.
    pub seq: u64,
    /// How often it came, this time included.
    pub delivered: u64,
    pub ack: WorkAck,
}

/// What becomes of a work item. Dropped, it comes again when [`WorkAck::progress`] has not been said for half a minute.
#[derive(Debug, Clone)]
pub struct WorkAck {
    nats: Nats,
    reply: async_nats::Subject,
}

impl WorkAck {
    /// Still at work: it is not sent again for another half a minute. Nobody answers.
    pub async fn progress(&self) -> Result<(), ServerError> {
        tell(&self.nats, self.reply.clone(), Bytes::from_static(b"+WPI")).await
    }

    /// It is done, or no longer this worker's. Waits for the server's word; `NoResponders` says that the consumer, and with
    /// it the claim, is gone.
    pub async fn done(self) -> Result<(), ServerError> {
        ask(&self.nats, self.reply, Bytes::from_static(b"+ACK")).await
    }

    /// It comes again after `delay`.
    pub async fn later(self, delay: Duration) -> Result<(), ServerError> {
        tell(&self.nats, self.reply, nak(delay)).await
    }

    /// It will never be done by anybody; `reason` is in the server's advisory.
    pub async fn term(self, reason: &str) -> Result<(), ServerError> {
        let reason: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_REASON).collect();
        ask(&self.nats, self.reply, format!("+TERM {reason}").into()).await
    }
}

/// Longest reason, in characters.
const MAX_REASON: usize = 256;

/// Pulls from one incarnation's consumer on `ASR_WORK`.
pub struct WorkPull {
    nats: Nats,
    pull: Pull,
}

impl WorkPull {
    pub fn new(nats: &Nats, worker: &WorkerName) -> Self {
        Self { nats: nats.clone(), pull: Pull::new(nats, "work", WORK, &consumer_name(worker)) }
    }

    /// The next work item, not acked. Call it only while a slot is free (`free` at least 1): one is asked for at a time, and
    /// the consumer's `max_ack_pending` bounds what is taken and not done. Waits while there is none, or no consumer yet;
    /// survives reconnects. Fails only when the connection is closed. Cancel-safe: what is cut off here comes again.
    pub async fn next(&mut self, free: usize) -> Result<Work, ClaimError> {
        debug_assert!(free > 0, "a pull without a free slot");
        loop {
            let Pulled::Message(message) = self.pull.next(1).await? else { continue };
            if let Some(work) = self.read(message).await {
                return Ok(work);
            }
        }
    }

    async fn read(&self, message: async_nats::Message) -> Option<Work> {
        let reply = message.reply?;
        let delivery = Delivery::parse(&reply)?;
        let ack = WorkAck { nats: self.nats.clone(), reply };
        let Some(Subject::WorkItem { job, .. }) = self.nats.subjects().parse(&message.subject) else {
            tracing::warn!(seq = delivery.stream_seq, "a message among the work items is none");
            if let Err(error) = ack.term("its subject names no job").await {
                tracing::debug!(%error, "it will come again");
            }
            return None;
        };
        let item = codec::from_msgpack(&message.payload);
        Some(Work { id: job, item, seq: delivery.stream_seq, delivered: delivery.delivered, ack })
    }
}

fn nak(delay: Duration) -> Bytes {
    format!("-NAK {{\"delay\":{}}}", delay.as_nanos()).into()
}

/// An ack that nobody answers.
async fn tell(nats: &Nats, reply: async_nats::Subject, word: Bytes) -> Result<(), ServerError> {
    Ok(nats.client().publish(reply, word).await?)
}

/// An ack as a request: only the server's answer says that it took it.
async fn ask(nats: &Nats, reply: async_nats::Subject, word: Bytes) -> Result<(), ServerError> {
    let request = async_nats::Request::new().payload(word).timeout(Some(nats.request_timeout()));
    nats.client().send_request(reply, request).await?;
    Ok(())
}
