//! `voxfleet status`: what the dispatcher believes; without one, what workers say themselves.

use std::{collections::BTreeMap, time::Duration};

use serde_json::json;
use tokio::time::{Instant, timeout_at};
use voxfleet_nats::{
    Nats,
    api::{self, ApiError, Endpoint},
    fleet,
    kv::{Bucket, Records},
};
use voxfleet_schema::{
    fleet::{FleetStatus, Heartbeat, Residency, WorkerHealth, WorkerStatus},
    id::WorkerName,
    session::{SessionRecord, SessionState},
};

use super::close;
use crate::{
    Context,
    args::StatusArgs,
    exit::{Exit, OrExit as _},
    transcript::screen::{object, out},
};

const ASK: Duration = Duration::from_secs(2);
/// Workers beat each second; one beat of each is heard in this time.
const LISTEN: Duration = Duration::from_millis(1_300);

/// Where the table comes from.
struct Fleet {
    dispatcher: Option<String>,
    /// Why there is none.
    why: Option<String>,
    workers: Vec<WorkerStatus>,
}

pub(crate) async fn run(args: &StatusArgs, context: &Context) -> anyhow::Result<Exit> {
    let (nats, _) = context.client("voxfleet-status").await?;
    let fleet = fleet(&nats).await;
    let sessions = sessions(&nats, args.all).await;
    close(nats).await;
    let (fleet, sessions) = (fleet?, sessions?);
    if args.json {
        object(&json!({
            "dispatcher": fleet.dispatcher, "dispatcher_error": fleet.why,
            "workers": fleet.workers, "sessions": sessions,
        }))?;
    } else {
        out(&text(&fleet, &sessions))?;
    }
    Ok(Exit::Ok)
}

async fn fleet(nats: &Nats) -> anyhow::Result<Fleet> {
    match api::request::<_, FleetStatus>(nats, Endpoint::FleetStatus, &json!({}), ASK).await {
        Ok(status) => Ok(Fleet { dispatcher: Some(status.dispatcher), why: None, workers: status.workers }),
        Err(error @ (ApiError::NoDispatcher | ApiError::Timeout | ApiError::Refused(_) | ApiError::Malformed(_))) => {
            let workers = heard(nats).await?;
            Ok(Fleet { dispatcher: None, why: Some(error.to_string()), workers })
        }
        Err(error) => Err(error).or_exit(Exit::Unavailable),
    }
}

/// Every worker that beats now.
pub(super) async fn heard(nats: &Nats) -> anyhow::Result<Vec<WorkerStatus>> {
    let mut beats = fleet::heartbeats(nats).await.or_exit(Exit::Unavailable)?;
    let until = Instant::now() + LISTEN;
    let mut last: BTreeMap<WorkerName, (Instant, Heartbeat)> = BTreeMap::new();
    while let Ok(beat) = timeout_at(until, beats.next()).await {
        match beat {
            Ok(beat) => {
                last.insert(beat.worker(), (Instant::now(), beat));
            }
            Err(fleet::FleetError::Server(error)) => return Err(error).or_exit(Exit::Unavailable),
            Err(error) => tracing::warn!(%error, "a heartbeat cannot be read"),
        }
    }
    let status = |(at, heartbeat): (Instant, Heartbeat)| WorkerStatus {
        health: if heartbeat.draining { WorkerHealth::Draining } else { WorkerHealth::Alive },
        ms_since_heartbeat: u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX),
        heartbeat,
    };
    Ok(last.into_values().map(status).collect())
}

async fn sessions(nats: &Nats, all: bool) -> anyhow::Result<Vec<SessionRecord>> {
    let records = Records::<SessionRecord>::new(nats, Bucket::Sessions).all().await.or_exit(Exit::Unavailable)?;
    let mut sessions: Vec<SessionRecord> = records.into_iter().map(|(_, versioned)| versioned.value).collect();
    sessions.retain(|s| all || s.state != SessionState::Ended);
    sessions.sort_by(|a, b| a.opened_ms.cmp(&b.opened_ms).then_with(|| a.id.cmp(&b.id)));
    Ok(sessions)
}

fn text(fleet: &Fleet, sessions: &[SessionRecord]) -> String {
    let mut text = match (&fleet.dispatcher, &fleet.why) {
        (Some(name), _) => format!("dispatcher {name}\n"),
        (None, why) => {
            let why = why.as_deref().unwrap_or("none answers");
            format!("no dispatcher ({why}); what follows is what workers say themselves\n")
        }
    };
    let mut workers =
        vec![["GPU", "STATE", "SLOTS", "MEMORY MB", "ENGINE", "MODELS", "HELD"].map(str::to_owned).to_vec()];
    workers.extend(fleet.workers.iter().map(worker_row));
    text.push_str(&table(&workers));
    if fleet.workers.is_empty() {
        text.push_str("no worker beats\n");
    }
    text.push('\n');
    let mut rows = vec![["SESSION", "STATE", "GPU", "EPOCH", "MODEL"].map(str::to_owned).to_vec()];
    rows.extend(sessions.iter().map(session_row));
    text.push_str(&table(&rows));
    if sessions.is_empty() {
        text.push_str("no open session\n");
    }
    text.trim_end().to_owned()
}

fn worker_row(worker: &WorkerStatus) -> Vec<String> {
    let beat = &worker.heartbeat;
    let models = beat.models.iter().filter(|m| m.state != Residency::Available).map(|m| {
        if m.state == Residency::Loaded {
            format!("{} ({} MB)", m.name, m.resident_mb)
        } else {
            format!("{} {}", m.name, word(&m.state))
        }
    });
    let models: Vec<String> = models.collect();
    vec![
        beat.gpu_id.to_string(),
        word(&worker.health),
        format!("{}/{}", beat.slots.used, beat.slots.total),
        format!("{} used, {} free of {}", beat.device.used_mb, beat.device.free_mb, beat.device.total_mb),
        format!("{} {} {}", beat.engine.kind, word(&beat.engine.state), beat.engine.effective_device),
        if models.is_empty() { "none loaded".to_owned() } else { models.join(", ") },
        beat.held.iter().map(|h| h.id.as_str()).collect::<Vec<_>>().join(" "),
    ]
}

fn session_row(session: &SessionRecord) -> Vec<String> {
    vec![
        session.id.to_string(),
        word(&session.state),
        session.worker.as_ref().map_or_else(|| "-".to_owned(), |w| w.gpu_id.to_string()),
        session.epoch.to_string(),
        session.options.model.clone().unwrap_or_else(|| "default".to_owned()),
    ]
}

/// A wire word as it is written in JSON.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Columns as wide as their widest cell, two spaces between.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |at: usize| rows.iter().filter_map(|r| r.get(at)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["A", "LONG"], ["wide cell", "x"]].map(|r| r.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "A          LONG\nwide cell  x\n");
    }

    #[test]
    fn an_empty_fleet_says_so() {
        let text =
            text(&Fleet { dispatcher: None, why: Some("no dispatcher is connected".to_owned()), workers: vec![] }, &[]);
        assert!(text.starts_with("no dispatcher (no dispatcher is connected)"));
        assert!(text.contains("no worker beats") && text.contains("no open session"));
    }
}
