//! The service API and the heartbeats, asked with plain requests.

use std::time::Duration;

use async_nats::Client;
pub use async_nats::Subscriber;
use serde_json::{Value, json};

use crate::{Error, Result};

/// One question; none when nobody answers in time or the answer is a failure.
async fn ask(client: &Client, endpoint: &str, body: &Value, patience: Duration) -> Option<Value> {
    let request = client.request(format!("asr.v1.api.{endpoint}"), body.to_string().into());
    let reply = tokio::time::timeout(patience, request).await.ok()?.ok()?;
    let answer: Value = serde_json::from_slice(&reply.payload).ok()?;
    answer.get("ok").cloned()
}

/// What the active dispatcher believes of the fleet.
pub async fn fleet_status(client: &Client) -> Option<Value> {
    // Short, since a dispatcher that is not active yet says nothing: callers ask again.
    ask(client, "fleet.status", &json!({}), Duration::from_secs(1)).await
}

/// Opens a session; asks again as clients do.
pub async fn open(client: &Client, session: &str, idle_timeout_s: u32) -> Result<Value> {
    let body = json!({"session": session, "options": {"idle_timeout_s": idle_timeout_s}});
    for _ in 0..20 {
        if let Some(opened) = ask(client, "session.open", &body, Duration::from_secs(1)).await {
            return Ok(opened);
        }
    }
    Err(Error::Wrong(format!("session {session} could not be opened")))
}

/// Heartbeats of one GPU from now on.
pub async fn heartbeats(client: &Client, gpu_id: &str) -> Result<Subscriber> {
    subscribe(client, &format!("asr.v1.heartbeat.{gpu_id}")).await
}

/// Everything on `subject` from now on, as it is published.
pub async fn subscribe(client: &Client, subject: &str) -> Result<Subscriber> {
    let subscriber = client.subscribe(subject.to_owned()).await;
    let subscriber = subscriber.map_err(Error::nats(subject))?;
    client.flush().await.map_err(Error::nats(subject))?;
    Ok(subscriber)
}
