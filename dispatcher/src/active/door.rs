//! How jobs get in: bare publishes, the API's submits, keys that somebody else wrote; and what is left lying about.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats, ServerError,
    jobs::{ClaimError, JobIntake, JobMessage},
    kv::{Bucket, KvError, Records},
    media::Media,
    retry::Backoff,
};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    id::StreamId,
    job::{JobRecord, MAX_JOB_REQUEST_BYTES},
};

use super::{
    Input,
    effects::{describe, unix_ms},
    jobs::{AtTheDoor, Budget, Caller, MAX_KEPT},
};
use crate::{
    core::jobs::JobInput,
    jobs::{
        Submission, decide,
        request::{Subject, explain_id},
    },
};

/// Bodies up to this long are read at once; longer ones take milliseconds and go to a thread of their own.
pub(super) const SHORT_BODY: usize = 16 * 1024;
/// What nobody asks for any more is looked for this often: it only takes room.
const TIDY_EVERY: Duration = Duration::from_secs(3_600);
/// And first this long after a start, when there is less to do: dispatchers that are restarted every hour tidy too.
const TIDY_FIRST: Duration = Duration::from_secs(300);
/// Pieces of objects that were never finished.
const UNFINISHED: Duration = Duration::from_secs(3_600);

/// Reads a request where it disturbs nobody.
pub(super) async fn read(
    body: Bytes,
    content_type: Option<String>,
    subject: Option<Subject>,
    paid: Option<OwnedSemaphorePermit>,
) -> Result<Box<Submission>, Failure> {
    if body.len() <= SHORT_BODY {
        return Submission::read(&body, content_type.as_deref(), subject.as_ref(), paid).map(Box::new);
    }
    let reading =
        tokio::task::spawn_blocking(move || Submission::read(&body, content_type.as_deref(), subject.as_ref(), paid));
    match reading.await {
        Ok(submission) => submission.map(Box::new),
        Err(error) => {
            tracing::error!(%error, "a request could not be read");
            Err(Failure::new(FailureClass::Internal, "the request could not be read"))
        }
    }
}

/// Every bare publish, while there is room in the queue and in memory.
pub(super) async fn publishes(
    nats: Nats,
    mut open: watch::Receiver<bool>,
    budget: Budget,
    inputs: mpsc::Sender<Input>,
    stop: CancellationToken,
) -> &'static str {
    let listen = async {
        let mut intake = JobIntake::new(&nats);
        loop {
            if open.wait_for(|open| *open).await.is_err() {
                return;
            }
            let Some(mut paid) = budget.take(MAX_JOB_REQUEST_BYTES).await else {
                return;
            };
            let message = match intake.next().await {
                Ok(message) => message,
                Err(ClaimError::Server(ServerError::Closed)) => return,
                Err(error) => {
                    tracing::warn!(error = %error, "jobs cannot be taken now");
                    continue;
                }
            };
            Budget::shrink(&mut paid, message.payload.len());
            if inputs.send(submitted(message, paid).await).await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "job intake"
}

async fn submitted(message: JobMessage, paid: OwnedSemaphorePermit) -> Input {
    let JobMessage { priority, id, seq, content_type, payload, ack, .. } = message;
    let known = id.as_ref().ok().cloned();
    let bad = |why: String| Failure::new(FailureClass::BadRequest, why);
    let subject = match (id, priority) {
        (Ok(id), Ok(priority)) => Ok(Subject { id, priority }),
        (Err(error), _) => Err(bad(explain_id(&error))),
        (_, Err(error)) => Err(bad(error.to_string())),
    };
    // A copy: a part of the body would keep all of it in memory.
    let body = Bytes::copy_from_slice(&payload[..payload.len().min(MAX_KEPT)]);
    let at = AtTheDoor { ack, id: known, seq, content_type: content_type.clone(), body, body_bytes: payload.len() };
    let submission = match subject {
        Ok(subject) => read(payload, content_type, Some(subject), Some(paid)).await,
        Err(failure) => Err(failure),
    };
    Input::Submit { caller: Caller::Door(Box::new(at)), submission }
}

/// Every change of a key: a job that another process wrote is this one's to place.
pub(super) async fn keys(nats: Nats, inputs: mpsc::Sender<Input>, stop: CancellationToken) -> &'static str {
    let mut backoff = Backoff::default();
    let listen = async {
        let mut watch = Records::<JobRecord>::new(&nats, Bucket::Jobs).watch();
        loop {
            let change = match watch.next().await {
                Ok(change) => change,
                Err(KvError::Server(ServerError::Closed)) => return,
                Err(error @ KvError::Malformed { .. }) => {
                    tracing::warn!(error = %error, "not a job");
                    continue;
                }
                Err(error) => {
                    tracing::warn!(error = %error, "keys of jobs not readable now");
                    backoff.wait().await;
                    continue;
                }
            };
            backoff = Backoff::default();
            let Ok(id) = StreamId::new(&change.key) else {
                continue;
            };
            let open = change.value.is_some_and(|record| !record.state.has_ended());
            let changed = JobInput::Changed { id, revision: change.revision, open };
            if inputs.send(Input::Job(Box::new(changed))).await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "job keys"
}

/// Removes objects of jobs that nobody will ask for: of requests that never became jobs, and of workers that lost a race.
pub(super) async fn tidy(nats: Nats, keep_s: u64, stop: CancellationToken) -> &'static str {
    let listen = async {
        let mut pause = TIDY_FIRST;
        loop {
            tokio::time::sleep(pause).await;
            pause = TIDY_EVERY;
            if let Err(error) = tidy_once(&nats, keep_s).await {
                tracing::warn!(error, "object store not tidied");
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "tidy"
}

async fn tidy_once(nats: &Nats, keep_s: u64) -> Result<(), String> {
    let (media, records) = (Media::new(nats), Records::<JobRecord>::new(nats, Bucket::Jobs));
    let before_ms = unix_ms().saturating_sub(keep_s * 1_000);
    let mut removed = 0u64;
    for object in media.list().await.map_err(|e| describe(&e))? {
        // A recording may be put long before its job is submitted.
        let Some(id) = decide::job_of_media(&object.key).filter(|_| object.modified_ms < before_ms) else {
            continue;
        };
        let record = match records.get(id.as_str()).await {
            Ok(found) => found.map(|v| v.value),
            // Somebody knows what it is.
            Err(KvError::Malformed { .. }) => continue,
            Err(error) => return Err(describe(&error)),
        };
        if decide::orphan(&object.key, record.as_ref()) && media.delete(&object.key).await.map_err(|e| describe(&e))? {
            removed += 1;
        }
    }
    let swept = media.sweep(UNFINISHED).await.map_err(|e| describe(&e))?;
    tracing::info!(removed, chunks = swept.chunks, "object store tidied");
    Ok(())
}
