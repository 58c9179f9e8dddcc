//! Is everything over for the fleet as well? What clients see of a session is its chain; a slot that never comes free, or a
//! key that never says so, only shows later.

use std::{collections::BTreeMap, time::Duration};

use async_nats::{Client, jetstream};
use futures_util::StreamExt as _;
use serde_json::Value;
use tokio::time::Instant;

use super::load::record;
use crate::{Error, Result, checker};

/// How long that may take after the last end: verdicts, takeovers and the clean-up of dead workers included.
const PATIENCE: Duration = Duration::from_secs(30);
/// Two heartbeats and a half.
const BEATS: Duration = Duration::from_millis(2_500);

/// What is not over, asked until it is or patience ends. `ids`: kind and id.
pub async fn unfinished(
    client: &Client,
    js: &jetstream::Context,
    workers: usize,
    mut ids: Vec<(&'static str, String)>,
) -> Result<Vec<String>> {
    let until = Instant::now() + PATIENCE;
    loop {
        let mut left = Vec::new();
        let mut open = Vec::new();
        for (kind, id) in ids {
            let record = record(js, kind, &id).await;
            if let Some(why) = not_over(record.as_ref()) {
                left.push(format!("{kind} {id} {why}"));
                open.push((kind, id));
            }
        }
        ids = open;
        let beats = heartbeats(client).await?;
        if beats.len() != workers {
            left.push(format!("{} of {workers} workers beat", beats.len()));
        }
        left.extend(beats.values().filter_map(busy));
        let alive: Vec<&str> = beats.values().filter_map(|b| b["incarnation"].as_str()).collect();
        for stream in ["ASR_LIVE", "ASR_WORK"] {
            let names = checker::consumer_names(js, stream).await?;
            let strange = names.iter().filter(|n| !alive.iter().any(|incarnation| n.contains(incarnation)));
            left.extend(strange.map(|n| format!("consumer {n} of {stream} belongs to nobody who beats")));
        }
        if left.is_empty() || Instant::now() > until {
            return Ok(left);
        }
    }
}

/// Why a record is not one of something that is over.
fn not_over(record: Option<&Value>) -> Option<String> {
    match record.map(|r| r["state"].as_str().unwrap_or("without a state")) {
        Some("ended" | "done" | "failed" | "cancelled") => None,
        Some(state) => Some(format!("is {state} for the dispatcher")),
        None => Some("has no record".to_owned()),
    }
}

/// What a worker has although nothing goes on.
fn busy(beat: &Value) -> Option<String> {
    let held = beat["held"].as_array().map_or(0, Vec::len);
    let used = ["slots", "job_slots"].map(|field| beat[field]["used"].as_u64().unwrap_or(0));
    (held > 0 || used != [0, 0])
        .then(|| format!("{} holds {held} and uses {} and {} slots", beat["gpu_id"], used[0], used[1]))
}

/// The newest of each GPU.
async fn heartbeats(client: &Client) -> Result<BTreeMap<String, Value>> {
    let mut beats = client.subscribe("asr.v1.heartbeat.*").await.map_err(Error::nats("heartbeats"))?;
    let mut newest = BTreeMap::new();
    let until = Instant::now() + BEATS;
    while let Ok(Some(message)) = tokio::time::timeout_at(until, beats.next()).await {
        let beat: Value =
            serde_json::from_slice(&message.payload).map_err(|e| Error::Wrong(format!("heartbeat: {e}")))?;
        newest.insert(beat["gpu_id"].as_str().unwrap_or_default().to_owned(), beat);
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_goes_on_is_seen() {
        for over in ["ended", "done", "failed", "cancelled"] {
            assert_eq!(not_over(Some(&json!({"state": over}))), None, "{over}");
        }
        for going in ["waiting", "assigned", "queued", "closing"] {
            assert!(not_over(Some(&json!({"state": going}))).is_some(), "{going}");
        }
        assert!(not_over(None).is_some());
        let beat = |held: Value, slots: u64, job_slots: u64| json!({"gpu_id": "g", "held": held, "slots": {"used": slots}, "job_slots": {"used": job_slots}});
        assert_eq!(busy(&beat(json!([]), 0, 0)), None);
        for beat in [beat(json!([{"id": "a"}]), 0, 0), beat(json!([]), 1, 0), beat(json!([]), 0, 1)] {
            assert!(busy(&beat).is_some(), "{beat}");
        }
    }
}
