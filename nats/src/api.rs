//! The request/reply service that dispatchers offer, and its client.
//!
//! Every dispatcher registers the service in a queue group of its own name, so each hears every request; only the active
//! one answers. A client asks again by id until somebody does, so a stopped process swallows nothing.

use std::time::Duration;

use async_nats::{
    StatusCode,
    service::{self, Service, ServiceExt},
};
use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{BoxStream, SelectAll},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::Instant;
use voxfleet_schema::{
    codec::{self, CONTENT_TYPE, CodecError},
    failure::Failure,
    session::Reply,
    trace::{TRACEPARENT, TraceContext},
};

pub use crate::subjects::Endpoint;
use crate::{Nats, ServerError, raw};

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("cannot encode")]
    Encode(#[source] CodecError),
    #[error("unreadable answer")]
    Malformed(#[source] CodecError),
    /// A typed refusal by the dispatcher.
    #[error(transparent)]
    Refused(Failure),
    /// Nobody serves the API: no dispatcher is connected.
    #[error("no dispatcher is connected")]
    NoDispatcher,
    /// Dispatchers are there; none answered in time.
    #[error("no dispatcher answered in time")]
    Timeout,
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// One request.
#[derive(Debug, Clone)]
pub struct ApiCall {
    pub endpoint: Endpoint,
    pub body: Bytes,
    pub content_type: Option<String>,
    pub traceparent: Option<String>,
}

impl ApiCall {
    /// The body as a request from a stranger: bounded, JSON or MessagePack. An empty body reads as `{}`.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, CodecError> {
        let body: &[u8] = if self.body.is_empty() { b"{}" } else { &self.body };
        codec::from_request(body, self.content_type.as_deref().filter(|_| !self.body.is_empty()))
    }
}

/// Name of the service in `nats micro list`.
pub(crate) const SERVICE: &str = "voxfleet";

/// Every dispatcher that is connected, by name, the active one and standbys: whoever answers within `patience`. Needs
/// permission to publish to `$SRV.>`; without one nobody answers.
pub async fn dispatchers(nats: &Nats, patience: Duration) -> Result<Vec<String>, ServerError> {
    #[derive(serde::Deserialize)]
    struct Info {
        #[serde(default)]
        metadata: std::collections::HashMap<String, String>,
    }
    let inbox = nats.client().new_inbox();
    let mut answers = nats.client().subscribe(inbox.clone()).await.map_err(ServerError::from)?;
    let asked = nats.client().publish_with_reply(format!("$SRV.INFO.{SERVICE}"), inbox, Bytes::new());
    asked.await.map_err(ServerError::from)?;
    let until = Instant::now() + patience;
    let mut names = Vec::new();
    while let Ok(Some(answer)) = tokio::time::timeout_at(until, answers.next()).await {
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            break;
        }
        // Others may call a service of theirs the same.
        let info = serde_json::from_slice::<Info>(&answer.payload).ok();
        names.extend(info.and_then(|mut info| info.metadata.remove("dispatcher")));
    }
    names.sort();
    Ok(names)
}

/// Serves the API.
pub struct ApiServer {
    nats: Nats,
    service: Service,
    requests: SelectAll<BoxStream<'static, (Endpoint, service::Request)>>,
}

impl ApiServer {
    /// Registers every endpoint under `nats micro`, in a queue group of this process's own: every dispatcher hears every
    /// request, namesakes too, and only the active one answers.
    pub async fn start(nats: &Nats, dispatcher: &str) -> Result<ApiServer, ApiError> {
        let service = nats
            .client()
            .service_builder()
            .description("live speech sessions and jobs; only the active dispatcher answers")
            .queue_group(format!("{dispatcher}-{}", uuid::Uuid::new_v4().simple()))
            .metadata([("dispatcher".to_owned(), dispatcher.to_owned())].into())
            .start(SERVICE, env!("CARGO_PKG_VERSION"))
            .await
            .map_err(ServerError::Request)?;
        let mut requests = SelectAll::new();
        for endpoint in Endpoint::ALL {
            let heard = service
                .endpoint_builder()
                .name(endpoint.as_str().replace('.', "-"))
                .add(nats.subjects().api(endpoint))
                .await
                .map_err(ServerError::Request)?;
            requests.push(heard.map(move |request| (endpoint, request)).boxed());
        }
        // The server knows all of them now: a client that asks after this call is heard.
        nats.rtt(nats.request_timeout()).await?;
        Ok(ApiServer { nats: nats.clone(), service, requests })
    }

    /// The next request. None: the connection is closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<(ApiCall, ApiResponder)> {
        let (endpoint, request) = loop {
            let (endpoint, request) = self.requests.next().await?;
            if !raw::is_from_a_stream(&request.message) {
                break (endpoint, request);
            }
            tracing::warn!(%endpoint, "a message that a stream sent is no request");
        };
        let header = |name: &str| {
            request
                .message
                .headers
                .as_ref()
                .and_then(|headers| headers.get(name))
                .map(|value| value.as_str().to_owned())
        };
        let call = ApiCall {
            endpoint,
            body: request.message.payload.clone(),
            content_type: header(CONTENT_TYPE),
            traceparent: header(TRACEPARENT),
        };
        Some((call, ApiResponder { nats: self.nats.clone(), request }))
    }

    /// Takes the service off the list.
    pub async fn stop(self) {
        if let Err(error) = self.service.stop().await {
            tracing::warn!(%error, "cannot stop the api service");
        }
    }
}

/// Where the answer goes. Drop it to stay silent (a standby).
#[derive(Debug)]
pub struct ApiResponder {
    nats: Nats,
    request: service::Request,
}

impl ApiResponder {
    /// Answers; nothing happens where the asker wanted no answer. Refusals also carry the service error headers, so that
    /// `nats req` and `nats micro stats` show them as such.
    pub async fn reply<T: Serialize + Sync>(self, reply: &Reply<T>) -> Result<(), ApiError> {
        let Some(to) = self.request.message.reply.clone() else { return Ok(()) };
        let body = codec::to_json(reply).map_err(ApiError::Encode)?;
        let mut headers = raw::json_headers();
        if let Reply::Error(failure) = reply {
            headers.insert("Nats-Service-Error", failure.class.as_str());
            headers.insert("Nats-Service-Error-Code", "400");
            let sent = self.nats.client().publish_with_headers(to, headers, body.into()).await;
            return Ok(sent.map_err(ServerError::from)?);
        }
        let sent = self.request.respond_with_headers(Ok(body.into()), headers).await;
        Ok(sent.map_err(ServerError::from)?)
    }
}

/// How long to wait before asking again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long a refusal waits for an acceptance, where the request was asked more than once.
const LINGER: Duration = Duration::from_millis(300);

/// Asks the active dispatcher; asks again each second until `deadline` has passed, so the request must be idempotent by
/// the id it carries. An acceptance beats a refusal.
pub async fn request<Req: Serialize + Sync, Resp: DeserializeOwned>(
    nats: &Nats,
    endpoint: Endpoint,
    request: &Req,
    deadline: Duration,
) -> Result<Resp, ApiError> {
    request_traced(nats, endpoint, request, None, deadline).await
}

/// The same, as a part of this trace.
pub async fn request_traced<Req: Serialize + Sync, Resp: DeserializeOwned>(
    nats: &Nats,
    endpoint: Endpoint,
    request: &Req,
    trace: Option<&TraceContext>,
    deadline: Duration,
) -> Result<Resp, ApiError> {
    let body: Bytes = codec::to_json(request).map_err(ApiError::Encode)?.into();
    let subject = nats.subjects().api(endpoint);
    let headers = raw::traced(raw::json_headers(), trace);
    // One inbox for every time it asks: a late answer to the first is an answer.
    let inbox = nats.client().new_inbox();
    let mut answers = nats.client().subscribe(inbox.clone()).await.map_err(ServerError::from)?;
    let end = Instant::now() + deadline;
    let mut refused = std::pin::pin!(nats.denials().publishing(&subject));
    let (mut asked, mut ask_at) = (0u32, Instant::now());
    let mut nobody = false;
    let mut refusal: Option<(Failure, Instant)> = None;
    loop {
        if refusal.is_none() && Instant::now() >= ask_at {
            nats.client()
                .publish_with_reply_and_headers(subject.clone(), inbox.clone(), headers.clone(), body.clone())
                .await
                .map_err(ServerError::from)?;
            asked += 1;
            ask_at = Instant::now() + ASK_AGAIN;
        }
        let wake = refusal.as_ref().map_or(ask_at.min(end), |(_, until)| *until);
        tokio::select! {
            answer = answers.next() => {
                let Some(answer) = answer else { return Err(ServerError::Closed.into()) };
                if answer.status == Some(StatusCode::NO_RESPONDERS) {
                    nobody = true;
                    continue;
                }
                nobody = false;
                let reply: Reply<Resp> = codec::from_json(&answer.payload).map_err(ApiError::Malformed)?;
                match reply.into_result() {
                    Ok(value) => return Ok(value),
                    Err(failure) if asked == 1 => return Err(ApiError::Refused(failure)),
                    Err(failure) => {
                        refusal.get_or_insert((failure, Instant::now() + LINGER));
                    }
                }
            }
            error = &mut refused => return Err(error.into()),
            () = tokio::time::sleep_until(wake) => {
                if let Some((failure, _)) = refusal {
                    return Err(ApiError::Refused(failure));
                }
                if Instant::now() >= end {
                    return Err(if nobody { ApiError::NoDispatcher } else { ApiError::Timeout });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_schema::session::SessionRequest;

    #[test]
    fn calls_from_strangers_are_decoded_with_care() {
        let call = |body: &'static [u8], content_type: Option<&str>| ApiCall {
            endpoint: Endpoint::SessionOpen,
            body: Bytes::from_static(body),
            content_type: content_type.map(str::to_owned),
            traceparent: None,
        };
        assert!(call(br#"{"session":"a"}"#, None).decode::<SessionRequest>().is_ok());
        assert!(call(br#"{"session":"a b"}"#, None).decode::<SessionRequest>().is_err());
        assert!(call(b"", Some("application/msgpack")).decode::<serde_json::Value>().is_ok());
        assert!(call(b"{}", Some("text/yaml")).decode::<serde_json::Value>().is_err());
    }
}
