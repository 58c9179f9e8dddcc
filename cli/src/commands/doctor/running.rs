//! What can be wrong with a fleet as a whole: who is active, who is missing, what waits, what lies about. Pure; each finding
//! names its mend, and `docs/runbook.md` has more.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use voxfleet_nats::topology::Behind;
use voxfleet_schema::{
    fleet::{FleetStatus, Heartbeat, WorkerHealth, WorkerStatus},
    id::{StreamId, WorkerName},
};

use super::Check;

/// Names of one kind that are told; more are counted.
const NAMED: usize = 5;

/// Who is active, and who would be next. `connected` are all dispatchers that answer.
pub(super) fn dispatcher(status: Result<&FleetStatus, String>, connected: &[String]) -> Check {
    const NAME: &str = "dispatcher";
    let status = match status {
        Ok(status) => status,
        Err(error) if connected.is_empty() => {
            return Check::warn(NAME, error, "start `voxfleet dispatcher`; audio waits in the log until then");
        }
        Err(error) => {
            let found = format!("none is active ({error}); connected: {}", named(connected));
            let mend = "a standby takes over within seconds; if it does not, look at its log and at: nats kv get asr_control lease";
            return Check::fail(NAME, found, mend);
        }
    };
    // Who may not ask services hears of nobody, and nothing is said of standbys then.
    let standbys: Vec<&String> = connected.iter().filter(|name| **name != status.dispatcher).collect();
    match (&status.verdicts_wait, standbys.len(), connected.is_empty()) {
        (Some(why), ..) => Check::warn(
            NAME,
            format!("{} declares nobody dead now: {why}", status.dispatcher),
            "it passes by itself; if it stays, look at the way between the dispatcher and NATS",
        ),
        (None, 0, true) => Check::ok(NAME, status.dispatcher.clone()),
        (None, 0, false) => Check::warn(
            NAME,
            format!("{} is active, no standby", status.dispatcher),
            "start a second `voxfleet dispatcher` on another machine: while there is none, nothing new is given out",
        ),
        (None, n, _) => Check::ok(NAME, format!("{} is active, {n} standing by", status.dispatcher)),
    }
}

/// Each worker that is not well, and those that have been declared dead.
pub(super) fn workers(status: &FleetStatus) -> Vec<Check> {
    const NAME: &str = "worker";
    let mut checks: Vec<Check> = status.workers.iter().filter_map(of_worker).collect();
    // One that has come back under a new name is no loss.
    let alive: BTreeSet<_> = status.workers.iter().map(|w| &w.heartbeat.gpu_id).collect();
    let dead: BTreeSet<String> =
        status.dead.iter().filter(|w| !alive.contains(&w.gpu_id)).map(|w| w.gpu_id.to_string()).collect();
    if !dead.is_empty() {
        let dead: Vec<String> = dead.into_iter().collect();
        let found = format!("declared dead and not back: {}", named(&dead));
        checks.push(Check::warn(
            NAME,
            found,
            "look at its machine and its log; start it again, or leave it: its work is elsewhere",
        ));
    }
    checks
}

fn of_worker(worker: &WorkerStatus) -> Option<Check> {
    const NAME: &str = "worker";
    let WorkerStatus { health, ms_since_heartbeat, heartbeat } = worker;
    let gpu = &heartbeat.gpu_id;
    let silent = format!("{:.1} s", *ms_since_heartbeat as f64 / 1_000.0);
    match health {
        WorkerHealth::Dead => Some(Check::fail(
            NAME,
            format!("{gpu} is dead, nothing heard for {silent}"),
            "look at its machine and its log; its work goes to others by itself",
        )),
        WorkerHealth::Suspect => Some(Check::warn(
            NAME,
            format!("{gpu} is suspect, nothing heard for {silent}"),
            "it gets nothing new until it is heard; if that comes often, look at its network and its load",
        )),
        WorkerHealth::Unhealthy => Some(Check::fail(
            NAME,
            format!("{gpu} beats, and its engine has not moved for {} s", heartbeat.engine.ms_since_progress / 1_000),
            "its worker ends the engine by itself (worker.engine_stuck_ms); if it comes again, drain it: voxfleet drain GPU",
        )),
        WorkerHealth::Draining => {
            let why = heartbeat.drain.as_ref().map_or("asked", |drain| drain.why.as_str());
            Some(Check::warn(
                NAME,
                format!("{gpu} is draining ({why})"),
                "it ends by itself; start it again when it is wanted",
            ))
        }
        WorkerHealth::Joining | WorkerHealth::Alive | WorkerHealth::Unknown => None,
    }
}

/// Who runs another version than this program.
pub(super) fn versions<'a>(beats: impl Iterator<Item = &'a Heartbeat>, mine: &str) -> Vec<Check> {
    let mut others: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for beat in beats.filter(|beat| beat.version != mine) {
        others.entry(&beat.version).or_default().push(beat.gpu_id.to_string());
    }
    let check = |(version, mut gpus): (&str, Vec<String>)| {
        gpus.sort();
        let found = format!("{} on {version}, this is {mine}", named(&gpus));
        Check::warn("version", found, "upgrade one after the other: docs/runbook.md")
    };
    others.into_iter().map(check).collect()
}

/// A session that waits, and what the dispatcher says of it.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) id: StreamId,
    pub(super) why: Vec<String>,
}

/// Why one waits: what the dispatcher says of it as a whole, and each reason that speaks against a GPU, once.
pub(super) fn reasons(whole: &[String], candidates: &Value) -> Vec<String> {
    let refused = candidates.as_array().into_iter().flatten().filter_map(|row| row["refused"].as_str());
    let refused: BTreeSet<&str> = refused.collect();
    whole.iter().map(String::as_str).chain(refused).map(str::to_owned).collect()
}

/// Sessions without a GPU; jobs wait as they like.
pub(super) fn waiting(status: &FleetStatus, told: &[Waiting]) -> Vec<Check> {
    if status.sessions_waiting == 0 {
        return vec![Check::ok("sessions", format!("{} on GPUs, none waits", status.sessions_assigned))];
    }
    let mut found = format!("{} without a GPU", status.sessions_waiting);
    for Waiting { id, why } in told {
        let why = if why.is_empty() { "for a place".to_owned() } else { why.join(", ") };
        found.push_str(&format!("; {id} waits: {why}"));
    }
    let mend = "start workers, or free some; their audio is kept for an hour: voxfleet status --why SESSION";
    vec![Check::warn("sessions", found, mend)]
}

pub(super) fn dead_letters(count: u64) -> Check {
    match count {
        0 => Check::ok("dead letters", "none"),
        n => Check::warn(
            "dead letters",
            format!("{n} could not be done"),
            "see why, then try again or put away: voxfleet jobs dead list",
        ),
    }
}

/// Copies of streams that are behind; nothing on a single server.
pub(super) fn replicas(behind: &[Behind]) -> Vec<Check> {
    let check = |behind: &Behind| {
        let Behind { stream, leader, lagging } = behind;
        if leader.is_none() {
            let mend = "it stands still until a majority of its servers is there: start them";
            return Check::fail("replicas", format!("{stream} has no leader"), mend);
        }
        let late: Vec<String> = lagging.iter().map(|(server, lag)| format!("{server} ({lag} behind)")).collect();
        let mend = "take no other server down until it has caught up; if it does not, start it or look at its disk";
        Check::warn("replicas", format!("{stream} lacks {}", named(&late)), mend)
    };
    behind.iter().map(check).collect()
}

/// Consumers of incarnations that nobody hears: a dispatcher removes them when it has declared them dead.
pub(super) fn strangers<'a>(
    consumers: impl Iterator<Item = &'a WorkerName>,
    heard: &[WorkerName],
    status: Option<&FleetStatus>,
) -> Option<Check> {
    let known = |worker: &WorkerName| {
        heard.contains(worker) || status.is_some_and(|s| s.workers.iter().any(|w| w.heartbeat.worker() == *worker))
    };
    let strange: Vec<String> =
        consumers.filter(|w| !known(w)).map(|w| format!("{}={}", w.gpu_id, w.incarnation)).collect();
    if strange.is_empty() {
        return None;
    }
    let found = format!("of workers nobody hears: {}", named(&strange));
    let mend = "an active dispatcher removes them within a minute; else: nats consumer rm ASR_LIVE NAME, and ASR_WORK";
    Some(Check::warn("consumers", found, mend))
}

fn named(names: &[String]) -> String {
    let first = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::commands::doctor::Verdict;

    fn beat(gpu: &str, incarnation: &str) -> Value {
        json!({
            "gpu_id": gpu, "incarnation": incarnation, "seq": 1, "sent_ms": 1, "host": "h", "pid": 1, "provider": "local",
            "device": {"name": "T4", "total_mb": 16_000, "free_mb": 5_000, "used_mb": 0, "used_by_others_mb": 0},
            "slots": {"total": 4, "used": 1}, "job_slots": {"total": 2, "used": 0}, "held": [], "models": [],
            "engine": {"state": "ready", "kind": "whisper_cpp", "effective_device": "cuda:T4", "vad": "silero",
                "ms_since_progress": 21_000, "restarts": 0},
            "draining": false, "version": "1.0.0",
        })
    }

    fn status(workers: &[(&str, &str, &str)], more: Value) -> FleetStatus {
        let workers: Vec<Value> = workers
            .iter()
            .map(|(gpu, incarnation, health)| {
                json!({"health": health, "ms_since_heartbeat": 2_500, "heartbeat": beat(gpu, incarnation)})
            })
            .collect();
        let mut status = json!({"dispatcher": "d1", "workers": workers, "sessions_waiting": 0, "sessions_assigned": 3});
        status.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        serde_json::from_value(status).expect("a status")
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn who_is_active_and_who_would_be_next() {
        let well = status(&[], json!({}));
        let held = status(&[], json!({"verdicts_wait": "its own round trip fails"}));
        for (status, connected, verdict, part) in [
            (Ok(&well), names(&["d1", "d2"]), Verdict::Ok, "1 standing by"),
            (Ok(&well), names(&["d1"]), Verdict::Warn, "no standby"),
            (Ok(&well), names(&[]), Verdict::Ok, "d1"),
            (Ok(&held), names(&["d1", "d2"]), Verdict::Warn, "round trip fails"),
            (Err("nobody".to_owned()), names(&[]), Verdict::Warn, "nobody"),
            (
                Err("timeout".to_owned()),
                names(&["d1", "d2"]),
                Verdict::Fail,
                "none is active (timeout); connected: d1, d2",
            ),
        ] {
            let check = dispatcher(status, &connected);
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.found.contains(part), "{check:?}");
            assert_eq!(check.mend.is_some(), verdict != Verdict::Ok);
        }
    }

    #[test]
    fn workers_that_are_not_well_are_told_one_by_one() {
        for (health, verdict, part) in [
            ("dead", Verdict::Fail, "nothing heard for 2.5 s"),
            ("suspect", Verdict::Warn, "g1 is suspect"),
            ("unhealthy", Verdict::Fail, "not moved for 21 s"),
            ("draining", Verdict::Warn, "draining (asked)"),
        ] {
            let checks = workers(&status(&[("g1", "i", health), ("g2", "i", "alive")], json!({})));
            assert_eq!((checks.len(), checks[0].verdict), (1, verdict), "{checks:?}");
            assert!(checks[0].found.contains(part) && checks[0].mend.is_some(), "{checks:?}");
        }
        assert_eq!(workers(&status(&[("g1", "i", "alive"), ("g2", "i", "joining")], json!({}))), []);
    }

    #[test]
    fn the_dead_that_came_back_are_no_loss() {
        let dead = json!({"dead": [{"gpu_id": "g1", "incarnation": "old"}, {"gpu_id": "g2", "incarnation": "x"}]});
        let checks = workers(&status(&[("g1", "new", "alive")], dead));
        assert_eq!(checks.len(), 1);
        assert_eq!(checks[0].found, "declared dead and not back: g2");
    }

    #[test]
    fn other_versions_are_gathered() {
        let beats: Vec<Heartbeat> = ["g2", "g1", "g3"]
            .iter()
            .map(|gpu| {
                let mut beat = beat(gpu, "i");
                beat["version"] = json!(if *gpu == "g3" { "1.0.1" } else { "1.0.0" });
                serde_json::from_value(beat).expect("a heartbeat")
            })
            .collect();
        let checks = versions(beats.iter(), "1.0.1");
        assert_eq!(checks.len(), 1);
        assert_eq!(checks[0].found, "g1, g2 on 1.0.0, this is 1.0.1");
        assert_eq!(versions(beats.iter().filter(|b| b.version == "1.0.1"), "1.0.1"), []);
    }

    #[test]
    fn what_waits_is_told_with_its_reason() {
        let waiting_now = status(&[], json!({"sessions_waiting": 4}));
        let told = [
            Waiting { id: StreamId::new("a").expect("id"), why: names(&["g1: no free slot"]) },
            Waiting { id: StreamId::new("b").expect("id"), why: Vec::new() },
        ];
        let checks = waiting(&waiting_now, &told);
        assert_eq!(checks[0].found, "4 without a GPU; a waits: g1: no free slot; b waits: for a place");
        assert_eq!(waiting(&status(&[], json!({})), &[])[0].verdict, Verdict::Ok);
        let candidates = json!([{"gpu_id": "g1", "refused": "too hot"}, {"gpu_id": "g2", "refused": "too hot"}, {}]);
        assert_eq!(reasons(&names(&["no_capacity: full"]), &candidates), ["no_capacity: full", "too hot"]);
        assert_eq!(reasons(&[], &Value::Null), [""; 0]);
    }

    #[test]
    fn letters_and_copies_that_are_behind_are_told() {
        assert_eq!((dead_letters(0).verdict, dead_letters(2).verdict), (Verdict::Ok, Verdict::Warn));
        let behind = |leader: Option<&str>, lagging: &[(&str, u64)]| Behind {
            stream: "ASR_AUDIO".to_owned(),
            leader: leader.map(str::to_owned),
            lagging: lagging.iter().map(|(name, lag)| ((*name).to_owned(), *lag)).collect(),
        };
        let checks = replicas(&[behind(None, &[]), behind(Some("n1"), &[("n2", 7)])]);
        assert_eq!((checks[0].verdict, checks[1].verdict), (Verdict::Fail, Verdict::Warn));
        assert_eq!(checks[1].found, "ASR_AUDIO lacks n2 (7 behind)");
        assert_eq!(replicas(&[]), []);
    }

    #[test]
    fn consumers_of_nobody_are_told_and_those_of_the_silent_are_not() {
        let worker = |gpu: &str, incarnation: &str| -> WorkerName {
            serde_json::from_value(json!({"gpu_id": gpu, "incarnation": incarnation})).expect("a name")
        };
        let (heard, silent, gone) = (worker("g1", "i"), worker("g2", "i"), worker("g1", "older"));
        let status = status(&[("g2", "i", "suspect")], json!({}));
        let all = [heard.clone(), silent, gone];
        let check = strangers(all.iter(), std::slice::from_ref(&heard), Some(&status)).expect("one is strange");
        assert_eq!(check.found, "of workers nobody hears: g1=older");
        assert_eq!(strangers(all[..2].iter(), std::slice::from_ref(&heard), Some(&status)), None);
    }

    #[test]
    fn many_names_are_counted() {
        let many: Vec<String> = (1..=7).map(|n| format!("g{n}")).collect();
        assert_eq!(named(&many), "g1, g2, g3, g4, g5 and 2 more");
    }
}
