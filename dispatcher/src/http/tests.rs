//! Boards as pages, scrapes and health checks read them.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use bytes::Bytes;
use serde_json::{Value, json};
use voxfleet_http::exposition::Exposition;
use voxfleet_nats::topology::Usage;
use voxfleet_schema::{
    fleet::{FleetStatus, Heartbeat, WorkerHealth, WorkerStatus},
    id::WorkerName,
};

use super::{
    board::Board,
    health::{self, Why},
    metrics,
    view::{self, Tile},
};
use crate::testing::{beat, worker};

fn status(workers: Vec<(WorkerHealth, Heartbeat)>, dead: Vec<WorkerName>) -> FleetStatus {
    let of = |(health, heartbeat)| WorkerStatus { health, ms_since_heartbeat: 400, heartbeat };
    let workers: Vec<WorkerStatus> = workers.into_iter().map(of).collect();
    serde_json::from_value(json!({
        "dispatcher": "a", "workers": workers, "sessions_waiting": 1, "sessions_assigned": 2,
        "jobs_queued": 3, "jobs_assigned": 4, "dead": dead,
    }))
    .expect("a status")
}

fn board(fleet: FleetStatus, before: &[Arc<Tile>], audio_bytes: u64) -> Board {
    let tiles = view::tiles(&fleet, before);
    let audio = Usage { stream: "ASR_AUDIO".to_owned(), messages: 1, bytes: audio_bytes, max_bytes: 100, consumers: 0 };
    let dead = Usage { stream: "ASR_DEAD".to_owned(), messages: 7, bytes: 1, max_bytes: 100, consumers: 0 };
    Board {
        number: 1,
        taken: Instant::now(),
        at_ms: 5,
        active: true,
        fleet,
        tiles,
        sessions: Vec::new(),
        streams: vec![audio, dead],
        rtt: None,
        news: Bytes::new(),
        lists: Mutex::default(),
    }
}

fn with(states: &[WorkerHealth]) -> Board {
    let of = |(n, state): (usize, &WorkerHealth)| (*state, beat(&format!("g{n}"), "i"));
    board(status(states.iter().enumerate().map(of).collect(), Vec::new()), &[], 0)
}

fn states(tiles: &[Arc<Tile>]) -> Vec<(String, WorkerHealth)> {
    tiles.iter().map(|tile| (tile.name(), tile.state)).collect()
}

#[test]
fn the_dead_stay_in_sight_until_their_gpu_is_back_or_they_are_forgotten() {
    use WorkerHealth::*;
    let first = board(status(vec![(Alive, beat("g0", "i")), (Alive, beat("g1", "i"))], vec![]), &[], 0);
    let verdict = vec![worker("g1", "i")];
    let died = board(status(vec![(Alive, beat("g0", "i"))], verdict.clone()), &first.tiles, 0);
    assert_eq!(states(&died.tiles), [("g0/i".to_owned(), Alive), ("g1/i".to_owned(), Dead)]);
    let later = board(status(vec![(Alive, beat("g0", "i"))], verdict.clone()), &died.tiles, 0);
    assert_eq!(states(&later.tiles), states(&died.tiles));
    let back = vec![(Alive, beat("g0", "i")), (Joining, beat("g1", "j"))];
    let back = board(status(back, verdict), &later.tiles, 0);
    assert_eq!(states(&back.tiles), [("g0/i".to_owned(), Alive), ("g1/j".to_owned(), Joining)]);
    let forgotten = board(status(vec![(Alive, beat("g0", "i"))], vec![]), &later.tiles, 0);
    assert_eq!(states(&forgotten.tiles), [("g0/i".to_owned(), Alive)]);
}

#[test]
fn of_each_gpu_nobody_shows_the_last_dead_is_looked_up() {
    use WorkerHealth::*;
    let dead = vec![worker("g1", "k"), worker("g0", "h"), worker("g1", "j"), worker("g2", "i")];
    let shown = board(status(vec![(Alive, beat("g2", "i"))], vec![]), &[], 0).tiles;
    let fleet = status(vec![(Alive, beat("g0", "i"))], dead);
    assert_eq!(view::unknown_dead(&fleet, &shown), [&worker("g1", "k")]);
    let tile = Arc::new(Tile::last_of(beat("g1", "k"), 9_000));
    let tiles = view::tiles(&fleet, &[shown, vec![tile]].concat());
    assert_eq!(states(&tiles), [("g0/i".to_owned(), Alive), ("g2/i".to_owned(), Dead), ("g1/k".to_owned(), Dead)]);
}

#[test]
fn news_is_what_changed_and_who_has_gone() {
    use WorkerHealth::*;
    let before = board(status(vec![(Alive, beat("g0", "i")), (Alive, beat("g1", "i"))], vec![]), &[], 0);
    let news = |now: &Board| -> Value { serde_json::from_slice(&view::news(now, &before.tiles)).expect("json") };
    let names = |news: &Value| -> Vec<String> {
        let gpus = news["gpus"].as_array().expect("a list");
        gpus.iter().map(|gpu| gpu["gpu_id"].as_str().expect("an id").to_owned()).collect()
    };
    let mut older = before.fleet.clone();
    older.workers[0].ms_since_heartbeat += 900;
    older.workers[1].heartbeat.engine.ms_since_activity = Some(5);
    let quiet = news(&board(older.clone(), &before.tiles, 0));
    assert_eq!((names(&quiet), &quiet["full"], &quiet["gone"]), (vec![], &json!(false), &json!([])));
    older.workers[0].ms_since_heartbeat = 1_700;
    older.workers[1].heartbeat.slots.used = 1;
    assert_eq!(names(&news(&board(older.clone(), &before.tiles, 0))), ["g0", "g1"]);
    older.workers.remove(1);
    let gone = news(&board(older, &before.tiles, 0));
    assert_eq!((names(&gone), &gone["gone"]), (vec!["g0".to_owned()], &json!(["g1/i"])));
}

#[test]
fn what_keeps_work_from_progressing_is_told_apart() {
    use WorkerHealth::*;
    let reasons = |states: &[WorkerHealth]| health::reasons(true, Some(&with(states)));
    assert_eq!(health::reasons(false, Some(&with(&[Alive]))), [Why::NatsLost]);
    assert_eq!(health::reasons(true, None), [Why::NoDispatcher]);
    assert_eq!(reasons(&[]), [Why::NoWorkers]);
    assert_eq!(reasons(&[Suspect, Joining, Draining]), [Why::NoWorkers]);
    assert_eq!(reasons(&[Unhealthy, Suspect]), [Why::EnginesStuck]);
    assert_eq!(reasons(&[Unhealthy, Alive]), [Why::SomeUnhealthy]);
    assert_eq!(reasons(&[Alive]), []);
    let full = board(status(vec![(Alive, beat("g0", "i"))], vec![]), &[], 80);
    assert_eq!(health::reasons(true, Some(&full)), [Why::LogNearlyFull]);
    assert!(health::ready(true, Some(&full)).0, "work still progresses");
    assert!(!health::ready(true, Some(&with(&[Unhealthy]))).0);
}

#[test]
fn every_series_stands_once_and_the_dead_have_no_figures() {
    use WorkerHealth::*;
    let first = board(status(vec![(Alive, beat("g0", "i")), (Alive, beat("g1", "i"))], vec![]), &[], 0);
    let died = board(status(vec![(Unhealthy, beat("g0", "i"))], vec![worker("g1", "i")]), &first.tiles, 0);
    let mut out = Exposition::default();
    metrics::fleet(&mut out, Some(&died));
    let text = out.into_text();
    for line in [
        "voxfleet_gpus{state=\"dead\"} 1",
        "voxfleet_gpus{state=\"unhealthy\"} 1",
        "voxfleet_gpus{state=\"alive\"} 0",
        "voxfleet_gpu_state{gpu_id=\"g1\",state=\"dead\"} 1",
        "voxfleet_gpu_memory_bytes{gpu_id=\"g0\",kind=\"used\"} 4194304000",
        "voxfleet_jobs{state=\"queued\"} 3",
        "voxfleet_stream_max_bytes{stream=\"ASR_AUDIO\"} 100",
        "voxfleet_dead_letters 7",
    ] {
        assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line} in\n{text}");
    }
    assert!(!text.contains("voxfleet_gpu_slots{gpu_id=\"g1\""), "{text}");
    let mut nobody = Exposition::default();
    metrics::fleet(&mut nobody, None);
    assert_eq!(nobody.into_text(), "", "figures that nobody knows are missing, not 0");
}

/// An increase needs a value before the first event: what is looked at is told from the start on.
#[test]
fn ends_of_engines_are_told_by_class_and_gpu() {
    use voxfleet_schema::failure::FailureClass::{DeviceLost, Timeout};
    let mut one = beat("g0", "i");
    one.engine.ends = [(Timeout, 2), (DeviceLost, 1)].into();
    let mut out = Exposition::default();
    let both = vec![(WorkerHealth::Alive, one), (WorkerHealth::Alive, beat("g1", "i"))];
    metrics::fleet(&mut out, Some(&board(status(both, vec![]), &[], 0)));
    let text = out.into_text();
    for (gpu, class, count) in [
        ("g0", "timeout", 2),
        ("g0", "device_lost", 1),
        ("g0", "engine_crash", 0),
        ("g0", "out_of_memory", 0),
        ("g1", "timeout", 0),
    ] {
        let line = format!("voxfleet_engine_ends_total{{gpu_id=\"{gpu}\",class=\"{class}\"}} {count}\n");
        assert_eq!(text.matches(&line).count(), 1, "{line} in\n{text}");
    }
    assert!(!text.contains("gpu_id=\"g1\",class=\"device_lost\""), "{text}");
}

#[test]
fn two_incarnations_on_one_gpu_are_one_series() {
    use WorkerHealth::*;
    let both = vec![(Draining, beat("g0", "i")), (Alive, beat("g0", "j")), (Dead, beat("g1", "i"))];
    let mut out = Exposition::default();
    metrics::fleet(&mut out, Some(&board(status(both, vec![]), &[], 0)));
    let text = out.into_text();
    let mut series: Vec<&str> =
        text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| Some(l.rsplit_once(' ')?.0)).collect();
    let all = series.len();
    series.sort_unstable();
    series.dedup();
    assert_eq!(series.len(), all, "{text}");
    assert!(text.contains("voxfleet_gpu_state{gpu_id=\"g0\",state=\"alive\"} 1"), "{text}");
}

#[test]
fn other_servers_clients_find_their_figures() {
    let mut one = beat("g0", "i");
    (one.slots.used, one.device.utilization) = (3, Some(0.256));
    let board = board(status(vec![(WorkerHealth::Alive, one)], vec![]), &[], 0);
    let status = view::gpu_status(&board);
    assert_eq!((&status["total_gpus"], &status["total_connections"]), (&json!(1), &json!(3)));
    assert_eq!(status["max_connections_per_gpu"], 4);
    let gpu = &status["gpus"][0];
    assert_eq!((&gpu["allocated_memory_gb"], &gpu["free_memory_gb"]), (&json!(3.91), &json!(19.53)));
    assert_eq!((&gpu["active_connections"], &gpu["utilization_percent"]), (&json!(3), &json!(26)));
}
