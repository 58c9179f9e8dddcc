//! Heartbeats and control requests: core NATS, nothing stored. And what waits for each worker in its queues.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_nats::{Subscriber, jetstream::ErrorCode};
use futures_util::StreamExt;
use serde::Serialize;
use tokio::sync::broadcast;
use voxfleet_schema::{
    codec::{self, CodecError},
    failure::{Failure, FailureClass},
    fleet::{ControlReply, ControlRequest, Heartbeat},
    id::WorkerName,
};

use crate::{
    Nats, ServerError,
    denial::{Denial, subscribing},
    raw,
    subjects::Subject,
    topology::names::{LIVE, WORK},
};

#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error("cannot encode")]
    Encode(#[source] CodecError),
    /// What came cannot be read; `subject` tells whose it is.
    #[error("unreadable message on {subject}")]
    Malformed { subject: String, source: CodecError },
    /// A heartbeat under another GPU's name.
    #[error("heartbeat of {claims} came on {subject}")]
    WrongSubject { subject: String, claims: String },
    #[error("heartbeat on {subject} with a figure that nothing can have: {figure}")]
    Impossible { subject: String, figure: &'static str },
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// Sends a heartbeat; returns when it is handed to the connection.
pub async fn heartbeat_publish(nats: &Nats, heartbeat: &Heartbeat) -> Result<(), FleetError> {
    let body = codec::to_json(heartbeat).map_err(FleetError::Encode)?;
    let subject = nats.subjects().heartbeat(&heartbeat.gpu_id);
    let sent = nats.client().publish_with_headers(subject, raw::json_headers(), body.into()).await;
    Ok(sent.map_err(ServerError::from)?)
}

/// Hears every heartbeat from now on.
pub async fn heartbeats(nats: &Nats) -> Result<Heartbeats, FleetError> {
    let denials = nats.denials().listen();
    let subscriber = subscribe(nats, nats.subjects().heartbeats_all()).await?;
    Ok(Heartbeats { nats: nats.clone(), subscriber, denials })
}

/// Subscribes and waits until the server knows it, so that what is sent after this call is heard.
async fn subscribe(nats: &Nats, subject: String) -> Result<Subscriber, ServerError> {
    let subscriber = nats.client().subscribe(subject).await?;
    nats.rtt(nats.request_timeout()).await?;
    Ok(subscriber)
}

pub struct Heartbeats {
    nats: Nats,
    subscriber: Subscriber,
    denials: broadcast::Receiver<Arc<Denial>>,
}

impl Heartbeats {
    /// The next heartbeat; bad ones are errors of their own, and the next call goes on. `Server(Closed)` is the end.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Result<Heartbeat, FleetError> {
        let subject = self.nats.subjects().heartbeats_all();
        let message = loop {
            let message = tokio::select! {
                biased;
                message = self.subscriber.next() => message.ok_or(ServerError::Closed)?,
                error = subscribing(&mut self.denials, &subject) => return Err(error.into()),
            };
            if !raw::is_from_a_stream(&message) {
                break message;
            }
            tracing::debug!("a message that a stream sent is no heartbeat");
        };
        let heartbeat: Heartbeat = codec::from_json(&message.payload)
            .map_err(|source| FleetError::Malformed { subject: message.subject.to_string(), source })?;
        match self.nats.subjects().parse(&message.subject) {
            Some(Subject::Heartbeat(gpu)) if gpu == heartbeat.gpu_id => match heartbeat.impossible() {
                None => Ok(heartbeat),
                Some(figure) => Err(FleetError::Impossible { subject: message.subject.to_string(), figure }),
            },
            _ => Err(FleetError::WrongSubject {
                subject: message.subject.to_string(),
                claims: heartbeat.gpu_id.to_string(),
            }),
        }
    }
}

/// Asks a worker. `Server(NoResponders)`: that incarnation is not connected. `Server(Timeout)`: it may have done it.
pub async fn control(
    nats: &Nats,
    to: &WorkerName,
    request: &ControlRequest,
    timeout: Duration,
) -> Result<ControlReply, FleetError> {
    let subject = nats.subjects().control(to);
    let body = codec::to_json(request).map_err(FleetError::Encode)?;
    let request = async_nats::Request::new().payload(body.into()).headers(raw::json_headers()).timeout(Some(timeout));
    let refused = nats.denials().publishing(&subject);
    let answer = tokio::select! {
        answer = nats.client().send_request(subject.clone(), request) => answer.map_err(ServerError::from)?,
        error = refused => return Err(error.into()),
    };
    codec::from_json(&answer.payload).map_err(|source| FleetError::Malformed { subject, source })
}

/// Answers control requests to this incarnation. Drop it to stop listening.
pub async fn serve_control(nats: &Nats, me: &WorkerName) -> Result<ControlServer, FleetError> {
    let subscriber = subscribe(nats, nats.subjects().control(me)).await?;
    Ok(ControlServer { nats: nats.clone(), subscriber })
}

pub struct ControlServer {
    nats: Nats,
    subscriber: Subscriber,
}

impl ControlServer {
    /// The next request; unreadable ones are refused inside. None: the connection is closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<(ControlRequest, ControlResponder)> {
        loop {
            let message = self.subscriber.next().await?;
            if raw::is_from_a_stream(&message) {
                tracing::warn!("a message that a stream sent is no control request");
                continue;
            }
            let responder = ControlResponder { nats: self.nats.clone(), to: message.reply };
            match codec::from_json(&message.payload) {
                Ok(request) => return Some((request, responder)),
                Err(error) => {
                    tracing::warn!(%error, "unreadable control request");
                    let refusal = Failure::new(FailureClass::BadRequest, "unreadable control request");
                    if let Err(error) = responder.reply(&ControlReply::Refused(refusal)).await {
                        tracing::warn!(%error, "cannot answer a control request");
                    }
                }
            }
        }
    }
}

/// Where the answer goes.
#[derive(Debug)]
pub struct ControlResponder {
    nats: Nats,
    to: Option<async_nats::Subject>,
}

impl ControlResponder {
    /// Answers; nothing happens where the asker wanted no answer.
    pub async fn reply(self, reply: &ControlReply) -> Result<(), FleetError> {
        let Some(to) = self.to else { return Ok(()) };
        let body = codec::to_json(reply).map_err(FleetError::Encode)?;
        let sent = self.nats.client().publish_with_headers(to, raw::json_headers(), body.into()).await;
        Ok(sent.map_err(ServerError::from)?)
    }
}

/// What waits for one worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Queued {
    /// Hints not taken yet.
    pub hints: u64,
    /// Jobs given to it, those it works on included.
    pub jobs: u64,
}

/// What waits for each worker, as its streams tell; a worker for which nothing waits is left out. A stream that is missing
/// holds nothing.
pub async fn queued(nats: &Nats) -> Result<BTreeMap<WorkerName, Queued>, ServerError> {
    let mut found: BTreeMap<WorkerName, Queued> = BTreeMap::new();
    for stream in [LIVE, WORK] {
        let subjects = match raw::subject_counts(nats, stream, ">").await {
            Err(error) if error.is_code(ErrorCode::STREAM_NOT_FOUND) => continue,
            subjects => subjects?,
        };
        for (subject, count) in subjects {
            match nats.subjects().parse(&subject) {
                Some(Subject::Live { worker, .. }) => found.entry(worker).or_default().hints += count,
                Some(Subject::WorkItem { worker, .. }) => found.entry(worker).or_default().jobs += count,
                _ => {}
            }
        }
    }
    Ok(found)
}
