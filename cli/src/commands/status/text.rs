//! The fleet as tables. Pure.

use std::collections::BTreeMap;

use voxfleet_nats::fleet::Queued;
use voxfleet_schema::{
    fleet::{FleetStatus, GpuRole, Residency, ServiceStatus, WorkerHealth, WorkerStatus},
    id::WorkerName,
    session::SessionRecord,
};

use super::{super::jobs::age, Fleet, device::devices};
use crate::plain::plain;

/// Held ids shown of one worker; the rest are counted.
const HELD_SHOWN: usize = 8;

pub(super) fn whole(
    fleet: &Fleet,
    sessions: &[SessionRecord],
    queued: &BTreeMap<WorkerName, Queued>,
    now_ms: u64,
) -> String {
    let mut text = match fleet {
        Fleet::Told(status) => headline(status),
        Fleet::Heard { why, .. } => format!("no dispatcher ({why}); what follows is what workers say themselves\n"),
    };
    let head = ["GPU", "STATE", "SLOTS", "JOBS", "QUEUED", "MEMORY MB", "ENGINE", "MODELS", "HELD"];
    let mut workers = vec![head.map(str::to_owned).to_vec()];
    workers.extend(fleet.workers().iter().map(|w| worker_row(w, queued.get(&w.heartbeat.worker()))));
    text.push_str(&table(&workers));
    if fleet.workers().is_empty() {
        text.push_str("no worker beats\n");
    } else {
        text.push('\n');
        text.push_str(&devices(fleet.workers().iter().map(|worker| &worker.heartbeat)));
    }
    for worker in fleet.workers() {
        text.extend(drain_line(worker, now_ms));
    }
    if let Fleet::Told(status) = fleet {
        if !status.dead.is_empty() {
            let dead: Vec<String> = status.dead.iter().map(ToString::to_string).collect();
            text.push_str(&format!("dead: {}\n", dead.join(", ")));
        }
        if let Some(why) = &status.verdicts_wait {
            text.push_str(&format!("nobody is declared dead now: {why}\n"));
        }
        if !status.services.is_empty() {
            text.push('\n');
            text.push_str(&services(&status.services));
        }
    }
    text.push('\n');
    let mut rows = vec![["SESSION", "STATE", "GPU", "EPOCH", "LAG S", "MODEL"].map(str::to_owned).to_vec()];
    let held = fleet.workers().iter().flat_map(|worker| &worker.heartbeat.held);
    let lags: BTreeMap<_, _> = held.filter_map(|held| Some((&held.id, held.lag_ms?))).collect();
    rows.extend(sessions.iter().map(|session| session_row(session, lags.get(&session.id).copied())));
    text.push_str(&table(&rows));
    if sessions.is_empty() {
        text.push_str("no open session\n");
    }
    text.trim_end().split('\n').map(plain).collect::<Vec<_>>().join("\n")
}

fn headline(status: &FleetStatus) -> String {
    let FleetStatus { dispatcher, sessions_waiting, sessions_assigned, jobs_queued, jobs_assigned, .. } = status;
    format!(
        "dispatcher {dispatcher}: {sessions_assigned} sessions on GPUs, {sessions_waiting} waiting; {jobs_assigned} jobs running, {jobs_queued} queued\n"
    )
}

fn worker_row(worker: &WorkerStatus, queued: Option<&Queued>) -> Vec<String> {
    let beat = &worker.heartbeat;
    let models =
        beat.models.iter().filter(|m| m.state != Residency::Available).map(|m| match (m.state, m.load_percent) {
            (Residency::Loaded, _) => format!("{} ({} MB)", m.name, m.resident_mb),
            (Residency::Loading, Some(percent)) => format!("{} loading {percent} %", m.name),
            _ => format!("{} {}", m.name, word(&m.state)),
        });
    let models: Vec<String> = models.collect();
    vec![
        beat.gpu_id.to_string(),
        word(&worker.health),
        format!("{}/{}", beat.slots.used, beat.slots.total),
        format!("{}/{}", beat.job_slots.used, beat.job_slots.total),
        match queued {
            None | Some(Queued { hints: 0, jobs: 0 }) => "-".to_owned(),
            Some(Queued { hints, jobs }) => format!("{hints} hints, {jobs} jobs"),
        },
        format!("{} used, {} free of {}", beat.device.used_mb, beat.device.free_mb, beat.device.total_mb),
        format!("{} {} {}", beat.engine.kind, word(&beat.engine.state), beat.engine.effective_device),
        if models.is_empty() { "none loaded".to_owned() } else { models.join(", ") },
        held(beat.held.iter().map(|h| (h.id.as_str(), h.suspect))),
    ]
}

fn held<'a>(held: impl ExactSizeIterator<Item = (&'a str, bool)>) -> String {
    let more = held.len().saturating_sub(HELD_SHOWN);
    let name = |(id, suspect): (&str, bool)| if suspect { format!("{id} (suspect)") } else { id.to_owned() };
    let mut names: Vec<String> = held.take(HELD_SHOWN).map(name).collect();
    if more > 0 {
        names.push(format!("and {more} more"));
    }
    names.join(" ")
}

/// `gpu-1 drains: asked, gone in 40s, 2 left`.
fn drain_line(worker: &WorkerStatus, now_ms: u64) -> Option<String> {
    let beat = &worker.heartbeat;
    if worker.health != WorkerHealth::Draining && !beat.draining {
        return None;
    }
    let mut parts = Vec::new();
    if let Some(notice) = &beat.drain {
        parts.push(notice.why.clone());
        parts.extend(notice.until_ms.map(|at| match at.checked_sub(now_ms) {
            Some(left) => format!("gone in {}", age(left)),
            None => format!("should be gone since {}", age(now_ms - at)),
        }));
    }
    parts.push(format!("{} left", beat.held.len()));
    Some(format!("{} drains: {}\n", beat.gpu_id, parts.join(", ")))
}

fn services(services: &[ServiceStatus]) -> String {
    let mut rows = vec![["SERVICE", "GPU", "ROLE", "STATE", "LIMIT", "PRELOAD"].map(str::to_owned).to_vec()];
    for service in services {
        let preload = if service.preload.is_empty() { "-".to_owned() } else { service.preload.join(" ") };
        let limit = format!("{} %", service.memory_limit_percent);
        rows.extend(service.gpus.iter().map(|gpu| {
            let state = gpu.health.as_ref().map_or_else(|| "not heard".to_owned(), word);
            vec![service.service.clone(), gpu.gpu_id.to_string(), role(gpu), state, limit.clone(), preload.clone()]
        }));
    }
    table(&rows)
}

fn role(gpu: &GpuRole) -> String {
    let role = word(&gpu.role).replace('_', " ");
    match &gpu.standing_in_for {
        Some(failed) => format!("{role} for {failed}"),
        None => role,
    }
}

fn session_row(session: &SessionRecord, lag_ms: Option<u64>) -> Vec<String> {
    vec![
        session.id.to_string(),
        word(&session.state),
        session.worker.as_ref().map_or_else(|| "-".to_owned(), |w| w.gpu_id.to_string()),
        session.epoch.to_string(),
        lag_ms.map_or_else(|| "-".to_owned(), |ms| format!("{:.1}", ms as f64 / 1e3)),
        session.options.model.clone().unwrap_or_else(|| "default".to_owned()),
    ]
}

/// A wire word as it is written in JSON.
pub(super) fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Columns as wide as their widest cell, two spaces between. Cells are made plain.
pub(in crate::commands) fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| plain(cell)).collect()).collect();
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
    use serde_json::{Value, json};

    #[test]
    fn columns_line_up() {
        let rows = [["A", "LONG"], ["wide cell", "x"]].map(|r| r.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "A          LONG\nwide cell  x\n");
    }

    #[test]
    fn an_empty_fleet_says_so() {
        let fleet = Fleet::Heard { why: "no dispatcher is connected".to_owned(), workers: vec![] };
        let text = whole(&fleet, &[], &BTreeMap::new(), 0);
        assert!(text.starts_with("no dispatcher (no dispatcher is connected)"));
        assert!(text.contains("no worker beats") && text.contains("no open session"));
    }

    fn worker(gpu: &str, health: &str, extra: Value) -> Value {
        let mut beat = json!({
            "gpu_id": gpu, "incarnation": "i", "seq": 1, "sent_ms": 0, "host": "h", "pid": 1, "provider": "local",
            "device": {"name": "cpu", "total_mb": 100, "free_mb": 60, "used_mb": 30, "used_by_others_mb": 10},
            "slots": {"total": 4, "used": 1}, "job_slots": {"total": 2, "used": 0}, "held": [], "models": [],
            "engine": {"state": "ready", "kind": "simulated", "effective_device": "cpu", "vad": "energy",
                "ms_since_progress": 0, "restarts": 0},
            "draining": false, "version": "0",
        });
        extra.as_object().cloned().unwrap_or_default().into_iter().for_each(|(name, value)| beat[name] = value);
        json!({"health": health, "ms_since_heartbeat": 10, "heartbeat": beat})
    }

    #[test]
    fn roles_drains_queues_and_the_dead_are_shown() {
        let held = json!([{"kind": "session", "id": "call-7", "epoch": 1, "suspect": true}]);
        let loads = json!({"models": [
            {"name": "large", "state": "loading", "resident_mb": 0, "load_percent": 42},
            {"name": "base", "state": "loading", "resident_mb": 0},
        ]});
        let drain = json!({"draining": true, "held": held, "drain": {"why": "asked", "until_ms": 50_000}});
        let status: FleetStatus = serde_json::from_value(json!({
            "dispatcher": "d", "sessions_waiting": 2, "sessions_assigned": 1,
            "workers": [worker("gpu-1", "draining", drain), worker("gpu-2", "alive", loads)],
            "dead": [{"gpu_id": "gpu-3", "incarnation": "k"}],
            "services": [{"service": "asr", "memory_limit_percent": 90, "preload": ["tiny.en"], "gpus": [
                {"gpu_id": "gpu-2", "role": "standing_in", "health": "alive", "standing_in_for": "gpu-3"},
                {"gpu_id": "gpu-9", "role": "reserve"},
            ]}],
        }))
        .expect("a status");
        let waits = Queued { hints: 12, jobs: 1 };
        let queued = BTreeMap::from([(status.workers[1].heartbeat.worker(), waits)]);
        let text = whole(&Fleet::Told(Box::new(status)), &[], &queued, 10_000);
        for part in [
            "dispatcher d: 1 sessions on GPUs, 2 waiting",
            "call-7 (suspect)",
            "gpu-1 drains: asked, gone in 40s, 1 left",
            "12 hints, 1 jobs",
            "dead: gpu-3.k",
            "standing in for gpu-3",
            "not heard",
            "90 %",
            "tiny.en",
            "large loading 42 %, base loading\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn a_long_list_of_held_sessions_is_cut() {
        let ids: Vec<String> = (0..12).map(|n| format!("s{n}")).collect();
        let text = super::held(ids.iter().map(|id| (id.as_str(), false)));
        assert!(text.ends_with("s7 and 4 more"), "{text}");
    }
}
