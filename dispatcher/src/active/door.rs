//! How jobs get in: bare publishes, the API's submits, keys that somebody else wrote.

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats, ServerError,
    jobs::{ClaimError, JobIntake, JobMessage},
    kv::{Bucket, KvError, Records},
    retry::Backoff,
};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    id::StreamId,
    job::{JobRecord, MAX_JOB_REQUEST_BYTES},
    trace::TraceContext,
};

use super::{
    Input,
    jobs::{AtTheDoor, Budget, Caller, MAX_KEPT},
};
use crate::{
    core::jobs::JobInput,
    jobs::{
        Submission,
        request::{Subject, explain_id},
    },
};

/// Bodies up to this long are read at once; longer ones take milliseconds and go to a thread of their own.
pub(super) const SHORT_BODY: usize = 16 * 1024;
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
    let JobMessage { priority, id, seq, content_type, traceparent, payload, ack, .. } = message;
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
    let mut submission = match subject {
        Ok(subject) => read(payload, content_type, Some(subject), Some(paid)).await,
        Err(failure) => Err(failure),
    };
    if let Ok(submission) = &mut submission {
        submission.trace = traceparent.as_deref().and_then(TraceContext::parse);
    }
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
