//! `voxfleet status --why`: where one session or job is, and what spoke for and against each GPU, at the last decision and
//! now. Only what would happen now needs a dispatcher.

use serde_json::{Value, json};
use voxfleet_nats::{
    Nats,
    api::{self, ApiError, Endpoint},
    kv::{Bucket, KvError, Records},
    transcript::{self, ReadError},
};
use voxfleet_schema::{
    event::{Event, Scope, What},
    id::{Kind, StreamId},
    job::{AudioUrl, JobQuery, JobRecord, JobStatus},
    session::{SessionRecord, SessionRequest, SessionStatus},
};

use super::{
    super::jobs::{age, fields, now_ms},
    ASK,
    text::{table, word},
};
use crate::{
    exit::{Exit, OrExit as _, coded},
    transcript::{
        line::{Paint, of_event},
        screen::{object, out},
    },
};

/// The last of each is shown: they say how it came to be where it is.
const TOLD: [What; 7] =
    [What::Assigned, What::Waiting, What::Moved, What::Rejected, What::Parked, What::Failed, What::Ended];

/// What is known of one session or job.
struct Known {
    kind: Kind,
    record: Value,
    /// Oldest first.
    events: Vec<Event>,
    /// What a dispatcher would decide now, or why none says so.
    now: Result<Now, String>,
}

#[derive(Debug, Default)]
struct Now {
    why: Vec<String>,
    ahead: Option<u32>,
    candidates: Value,
}

pub(super) async fn run(id: &StreamId, as_json: bool, nats: &Nats) -> anyhow::Result<Exit> {
    let mut found = Vec::new();
    if let Some(mut record) = record::<JobRecord>(nats, Bucket::Jobs, id).await? {
        record.audio = AudioUrl::harmless(&record.audio);
        let now = ask(nats, Endpoint::JobStatus, &JobQuery { job: id.clone() }).await.map(|status: JobStatus| Now {
            why: status.why.into_iter().collect(),
            ahead: status.ahead,
            candidates: status.candidates,
        });
        found.push(Known { kind: Kind::Job, record: json!(record), events: told(nats, Scope::Job, id).await?, now });
    }
    if let Some(record) = record::<SessionRecord>(nats, Bucket::Sessions, id).await? {
        let now = ask(nats, Endpoint::SessionStatus, &SessionRequest { session: id.clone() }).await;
        let now = now.map(|SessionStatus { why, candidates, .. }| Now { why, ahead: None, candidates });
        let events = told(nats, Scope::Session, id).await?;
        found.push(Known { kind: Kind::Session, record: json!(record), events, now });
    }
    if found.is_empty() {
        return unopened(id, as_json, nats).await;
    }
    if as_json {
        for known in &found {
            object(&value(id, known))?;
        }
    } else {
        let now = now_ms();
        let shown: Vec<String> = found.iter().map(|known| text(id, known, now)).collect();
        out(&shown.join("\n\n"))?;
    }
    Ok(Exit::Ok)
}

/// What never was opened, or ended long ago, may still have left events.
async fn unopened(id: &StreamId, as_json: bool, nats: &Nats) -> anyhow::Result<Exit> {
    for (kind, scope) in [(Kind::Session, Scope::Session), (Kind::Job, Scope::Job)] {
        let events = told(nats, scope, id).await?;
        if events.is_empty() {
            continue;
        }
        let now = Err(format!("there is no such {kind} now"));
        let known = Known { kind, record: Value::Null, events, now };
        if as_json {
            object(&value(id, &known))?;
        } else {
            out(&text(id, &known, now_ms()))?;
        }
        return Ok(Exit::NotFound);
    }
    Err(anyhow::anyhow!("there is no session and no job {id}")).or_exit(Exit::NotFound)
}

async fn record<T: serde::Serialize + serde::de::DeserializeOwned>(
    nats: &Nats,
    bucket: Bucket,
    id: &StreamId,
) -> anyhow::Result<Option<T>> {
    let found: Result<_, KvError> = Records::<T>::new(nats, bucket).get(id.as_str()).await;
    found.map(|versioned| versioned.map(|v| v.value)).or_exit(Exit::Unavailable)
}

/// None of this is needed: without a dispatcher the rest is told all the same.
async fn ask<Q: serde::Serialize + Sync, A: serde::de::DeserializeOwned>(
    nats: &Nats,
    endpoint: Endpoint,
    query: &Q,
) -> Result<A, String> {
    api::request(nats, endpoint, query, ASK).await.map_err(|error: ApiError| error.to_string())
}

async fn told(nats: &Nats, scope: Scope, id: &StreamId) -> anyhow::Result<Vec<Event>> {
    let mut events = Vec::new();
    for what in TOLD {
        match transcript::last_event(nats, scope, id, what).await {
            Ok(event) => events.extend(event),
            Err(error @ ReadError::Malformed { .. }) => tracing::warn!(%error, "passing over an event"),
            Err(error) => return Err(coded(Exit::Unavailable, error.into())),
        }
    }
    events.sort_by_key(|event| event.at_ms);
    Ok(events)
}

fn value(id: &StreamId, known: &Known) -> Value {
    let mut value = json!({"kind": known.kind, "id": id, "record": known.record, "events": known.events});
    match &known.now {
        Ok(now) => {
            value["why"] = json!(now.why);
            value["ahead"] = json!(now.ahead);
            value["candidates"] = now.candidates.clone();
        }
        Err(error) => value["dispatcher_error"] = json!(error),
    }
    value
}

fn text(id: &StreamId, known: &Known, now_ms: u64) -> String {
    let ago = |ms: u64| format!("{} ago", age(now_ms.saturating_sub(ms)));
    let record = &known.record;
    let mut lines = vec![(known.kind.as_str(), id.to_string())];
    if !record.is_null() {
        lines.push(("state", word(&record["state"])));
        let mut put = |name, value: Option<String>| lines.extend(value.map(|value| (name, value)));
        put("gpu", record["worker"]["gpu_id"].as_str().map(str::to_owned));
        put("incarnation", record["worker"]["incarnation"].as_str().map(str::to_owned));
        put("epoch", record["epoch"].as_u64().map(|n| n.to_string()));
        put("changed", record["changed_ms"].as_u64().filter(|ms| *ms > 0).map(ago));
        put("suspect", (record["suspect"] == true).then(|| "it crashed an engine and is decoded alone".to_owned()));
    }
    if let Ok(now) = &known.now {
        lines.extend(now.ahead.map(|n| ("queue", format!("{n} before it"))));
        lines.extend(now.why.iter().map(|why| ("waits", why.clone())));
    }
    let mut text = fields(&lines);
    if !known.events.is_empty() {
        text.push_str("\n\nevents, the last of each kind\n");
        let line = |e: &Event| format!("  {:>8}  {}\n", ago(e.at_ms), of_event(e, Paint { colour: false }));
        text.extend(known.events.iter().map(line));
    }
    let decided = known.events.iter().rev().find(|e| matches!(e.what, What::Assigned | What::Waiting));
    if let Some(event) = decided {
        let rows = candidates(&event.detail["candidates"]);
        text.push_str(&section(&format!("the decision of {} ({})", ago(event.at_ms), event.what.as_str()), rows));
    }
    match &known.now {
        Ok(now) => text.push_str(&section("were it placed now", candidates(&now.candidates))),
        Err(error) => text.push_str(&format!("\n{error}: what would be decided now is not known\n")),
    }
    text.trim_end().to_owned()
}

fn section(head: &str, rows: Option<String>) -> String {
    rows.map(|rows| format!("\n{head}\n{rows}")).unwrap_or_default()
}

/// One row a GPU: chosen, fit or refused, then whatever was weighed. Of a large fleet one row stands for many, and a last one
/// without a GPU sums up. None where nothing was told.
fn candidates(value: &Value) -> Option<String> {
    let (rows, rest): (Vec<&Value>, Vec<&Value>) = value.as_array()?.iter().partition(|row| row["gpu_id"].is_string());
    if rows.is_empty() && rest.is_empty() {
        return None;
    }
    const FIRST: [&str; 4] = ["gpu_id", "incarnation", "chosen", "refused"];
    let mut weighed: Vec<&str> = Vec::new();
    for name in rows.iter().filter_map(|row| row.as_object()).flat_map(|row| row.keys()) {
        if !FIRST.contains(&name.as_str()) && !weighed.contains(&name.as_str()) {
            weighed.push(name);
        }
    }
    let upper = |name: &str| name.to_uppercase().replace('_', " ");
    let mut cells = vec![["GPU", "INCARNATION", "DECISION"].map(str::to_owned).to_vec()];
    cells[0].extend(weighed.iter().map(|name| upper(name)));
    for row in &rows {
        let decision = match (&row["refused"], row["chosen"] == true) {
            (Value::Null, true) => "chosen".to_owned(),
            (Value::Null, false) => "would do".to_owned(),
            (refused, _) => format!("refused: {}", plain(refused)),
        };
        let mut line = vec![plain(&row["gpu_id"]), plain(&row["incarnation"]), decision];
        line.extend(weighed.iter().map(|name| plain(&row[*name])));
        cells.push(line);
    }
    let mut text = if rows.is_empty() { String::new() } else { table(&cells) };
    for fields in rest.into_iter().filter_map(Value::as_object) {
        let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name} {}", plain(value))).collect();
        text.push_str(&format!("{}\n", fields.join(", ")));
    }
    Some(text)
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn an_event(what: What, at_ms: u64, detail: Value) -> Event {
        let mut event = Event::new(Scope::Session, "call-7", what, at_ms);
        event.detail = detail;
        event
    }

    #[test]
    fn every_gpu_has_its_reason() {
        let rows = json!([
            {"gpu_id": "gpu-1", "incarnation": "i", "chosen": true, "used": 1, "slots": 4, "free_mb": 900},
            {"gpu_id": "gpu-2", "incarnation": "j", "chosen": false, "used": 2, "slots": 4, "free_mb": 500},
            {"gpu_id": "gpu-3", "incarnation": "k", "refused": "draining"},
        ]);
        let text = candidates(&rows).expect("rows");
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["GPU", "INCARNATION", "DECISION", "FREE", "MB", "SLOTS", "USED"]);
        assert_eq!(lines[1], ["gpu-1", "i", "chosen", "900", "4", "1"]);
        assert_eq!(lines[3], ["gpu-3", "k", "refused:", "draining", "-", "-", "-"]);
        assert_eq!((candidates(&Value::Null), candidates(&json!([]))), (None, None));
        let large =
            json!([{"gpu_id": "gpu-3", "incarnation": "k", "refused": "no_slots", "count": 880}, {"gpus": 900}]);
        let large = candidates(&large).expect("rows");
        assert!(large.contains("880") && large.ends_with("gpus 900\n"), "{large}");
    }

    #[test]
    fn the_last_decision_and_the_present_one_are_told() {
        let was = json!({"candidates": [{"gpu_id": "gpu-1", "incarnation": "i", "refused": "no_slots"}]});
        let mut known = Known {
            kind: Kind::Session,
            record: json!({"state": "waiting", "epoch": 3, "changed_ms": 1_000}),
            events: vec![
                an_event(What::Assigned, 1_000, json!({"candidates": [{"gpu_id": "gpu-0", "chosen": true}]})),
                an_event(What::Waiting, 2_000, was),
            ],
            now: Ok(Now {
                why: vec!["no GPU has a free slot".to_owned()],
                ahead: None,
                candidates: json!([{"gpu_id": "gpu-2", "incarnation": "j", "refused": "unhealthy"}]),
            }),
        };
        let id = StreamId::new("call-7").expect("id");
        let shown = text(&id, &known, 62_000);
        for part in [
            "state    waiting",
            "waits    no GPU has a free slot",
            "decision of 1m ago (waiting)",
            "no_slots",
            "unhealthy",
        ] {
            assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
        }
        assert!(!shown.contains("gpu-0"), "an older decision:\n{shown}");
        known.now = Err("no dispatcher is connected".to_owned());
        let shown = text(&id, &known, 62_000);
        assert!(shown.contains("no_slots") && shown.contains("no dispatcher is connected: what would"), "{shown}");
    }
}
