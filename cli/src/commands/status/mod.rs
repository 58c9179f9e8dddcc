//! `voxfleet status`: what the dispatcher believes; without one, what workers and streams say themselves.

mod device;
mod text;
mod why;

use std::{collections::BTreeMap, io::IsTerminal as _, time::Duration};

use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, timeout_at};
use voxfleet_nats::{
    Nats,
    api::{self, ApiError, Endpoint},
    fleet::{self, Queued},
    kv::{Bucket, KvError, Records},
};
use voxfleet_schema::{
    fleet::{FleetStatus, Heartbeat, WorkerHealth, WorkerStatus},
    id::WorkerName,
    session::{SessionRecord, SessionState},
};

pub(super) use text::table;

use self::device::Facts;
use super::close;
use crate::{
    Context,
    args::StatusArgs,
    exit::{Exit, OrExit as _},
    transcript::screen::out,
};

const ASK: Duration = Duration::from_secs(2);
/// Workers beat each second unless told otherwise; one beat of each is heard in this time.
const LISTEN: Duration = Duration::from_millis(1_300);
/// For those that a dispatcher knows and that were not heard yet: the slowest beat each five seconds.
const LISTEN_LONGEST: Duration = Duration::from_millis(5_300);

/// Where the table comes from.
enum Fleet {
    Told(Box<FleetStatus>),
    /// By workers alone, and why no dispatcher told it.
    Heard {
        why: String,
        workers: Vec<WorkerStatus>,
    },
}

impl Fleet {
    fn workers(&self) -> &[WorkerStatus] {
        match self {
            Fleet::Told(status) => &status.workers,
            Fleet::Heard { workers, .. } => workers,
        }
    }
}

pub(crate) async fn run(args: &StatusArgs, context: &Context) -> anyhow::Result<Exit> {
    let (nats, _) = context.client("voxfleet-status").await?;
    let answer = match &args.why {
        Some(id) => why::run(id, args.json, &nats).await,
        None => match args.watch {
            Some(seconds) => again(args, seconds, &nats, context).await,
            None => whole(args, &nats).await,
        },
    };
    close(nats).await;
    answer
}

/// Until Ctrl-C. A look that fails is said in its place: a server that is restarted is there again later.
async fn again(args: &StatusArgs, seconds: u64, nats: &Nats, context: &Context) -> anyhow::Result<Exit> {
    let screen = !args.json && std::io::stdout().is_terminal();
    let mut looks = tokio::time::interval(Duration::from_secs(seconds));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while context.shutdown.run_until_cancelled(looks.tick()).await.is_some() {
        let Some(seen) = context.shutdown.run_until_cancelled(look(args, nats)).await else { break };
        let text = match seen {
            Ok(text) => text,
            Err(error) if args.json => json!({ "error": format!("{error:#}") }).to_string(),
            Err(error) => format!("the fleet cannot be seen now: {error:#}"),
        };
        match screen {
            // Home, what is there, and nothing behind it: no flicker.
            true => out(&format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")))?,
            false if args.json => out(&text)?,
            false => out(&format!("{}\n{text}\n", super::jobs::now_ms()))?,
        }
    }
    Ok(Exit::Ok)
}

async fn whole(args: &StatusArgs, nats: &Nats) -> anyhow::Result<Exit> {
    out(&look(args, nats).await?)?;
    Ok(Exit::Ok)
}

async fn look(args: &StatusArgs, nats: &Nats) -> anyhow::Result<String> {
    let fleet = fleet(nats).await?;
    let (sessions, hidden) = match sessions(nats, args.all).await {
        Ok(sessions) => (sessions, None),
        Err(KvError::Server(error)) if error.is_denied() => (Vec::new(), Some(error.to_string())),
        Err(error) => return Err(error).or_exit(Exit::Unavailable),
    };
    // Beside the point of the table: who may not look at streams sees it without.
    let queued = fleet::queued(nats).await.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot see what waits for workers");
        BTreeMap::new()
    });
    if args.json {
        let mut value = value(&fleet, &sessions, &queued);
        if let Some(why) = hidden {
            value["sessions"] = Value::Null;
            value["sessions_error"] = json!(why);
        }
        return Ok(value.to_string());
    }
    let mut text = text::whole(&fleet, &sessions, &queued, super::jobs::now_ms());
    if let Some(why) = hidden {
        text.push_str(&format!("\nsessions are not shown: {why}"));
    }
    Ok(text)
}

fn value(fleet: &Fleet, sessions: &[SessionRecord], queued: &BTreeMap<WorkerName, Queued>) -> Value {
    let queued: BTreeMap<String, &Queued> = queued.iter().map(|(worker, n)| (worker.to_string(), n)).collect();
    let workers: Vec<Value> = fleet.workers().iter().map(worker).collect();
    let mut value = json!({
        "dispatcher": null, "dispatcher_error": null, "workers": workers, "sessions": sessions, "queued": queued,
    });
    match fleet {
        Fleet::Heard { why, .. } => value["dispatcher_error"] = json!(why),
        Fleet::Told(status) => {
            value["dispatcher"] = json!(status.dispatcher);
            value["dead"] = json!(status.dead);
            value["services"] = json!(status.services);
            value["sessions_waiting"] = json!(status.sessions_waiting);
            value["sessions_assigned"] = json!(status.sessions_assigned);
            value["jobs_queued"] = json!(status.jobs_queued);
            value["jobs_assigned"] = json!(status.jobs_assigned);
        }
    }
    value
}

/// As the wire says it, with what health checks ask for beside the heartbeat.
fn worker(status: &WorkerStatus) -> Value {
    let mut value = json!(status);
    if let (Value::Object(fields), Value::Object(facts)) = (&mut value, json!(Facts::of(&status.heartbeat))) {
        fields.extend(facts);
    }
    value
}

async fn fleet(nats: &Nats) -> anyhow::Result<Fleet> {
    match api::request::<_, FleetStatus>(nats, Endpoint::FleetStatus, &json!({}), ASK).await {
        Ok(status) => Ok(Fleet::Told(Box::new(status))),
        Err(error @ (ApiError::NoDispatcher | ApiError::Timeout | ApiError::Refused(_) | ApiError::Malformed(_))) => {
            Ok(Fleet::Heard { why: error.to_string(), workers: heard(nats).await? })
        }
        Err(error) => Err(error).or_exit(Exit::Unavailable),
    }
}

/// Every worker that beats now.
pub(super) async fn heard(nats: &Nats) -> anyhow::Result<Vec<WorkerStatus>> {
    let mut beats = fleet::heartbeats(nats).await.or_exit(Exit::Unavailable)?;
    let begun = Instant::now();
    let known = known(nats).await;
    let mut last: BTreeMap<WorkerName, (Instant, Heartbeat)> = BTreeMap::new();
    loop {
        let all = known.iter().all(|name| last.keys().any(|heard| heard.to_string() == *name));
        let until = begun + if all { LISTEN } else { LISTEN_LONGEST };
        let Ok(beat) = timeout_at(until, beats.next()).await else { break };
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

/// Workers that are not known to be dead, by their keys; none where this login may not read them.
async fn known(nats: &Nats) -> Vec<String> {
    match Records::<Value>::new(nats, Bucket::Fleet).all().await {
        Ok(records) => {
            records.into_iter().filter(|(_, found)| found.value["verdict"].is_null()).map(|(name, _)| name).collect()
        }
        Err(error) => {
            tracing::debug!(%error, "keys of workers not read");
            Vec::new()
        }
    }
}

async fn sessions(nats: &Nats, all: bool) -> Result<Vec<SessionRecord>, KvError> {
    let records = Records::<SessionRecord>::new(nats, Bucket::Sessions).all().await?;
    let mut sessions: Vec<SessionRecord> = records.into_iter().map(|(_, versioned)| versioned.value).collect();
    sessions.retain(|s| all || s.state != SessionState::Ended);
    sessions.sort_by(|a, b| a.opened_ms.cmp(&b.opened_ms).then_with(|| a.id.cmp(&b.id)));
    Ok(sessions)
}
