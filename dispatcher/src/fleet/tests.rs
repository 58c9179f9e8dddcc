mod properties;

use voxfleet_schema::fleet::EngineRunState;

use super::*;
use crate::testing::{self, beat, worker};

const MS: Duration = Duration::from_millis(1);

fn config() -> DispatcherConfig {
    DispatcherConfig::default()
}

#[test]
fn a_worker_goes_from_joining_to_dead() {
    let mut fleet = Fleet::default();
    let name = worker("g0", "i0");
    assert_eq!(fleet.heard(beat("g0", "i0"), Duration::ZERO), Heard::Joined);
    assert_eq!(fleet.health(&name, Duration::ZERO, &config()), WorkerHealth::Joining);
    fleet.set_ready(&name, true);
    assert_eq!(fleet.health(&name, 1_499 * MS, &config()), WorkerHealth::Alive);
    assert_eq!(fleet.health(&name, 1_500 * MS, &config()), WorkerHealth::Suspect);
    assert!(fleet.verdicts(2_999 * MS, &config()).is_empty());
    assert_eq!(fleet.verdicts(3_000 * MS, &config()), std::slice::from_ref(&name));
    assert!(fleet.bury(&name, 3_000 * MS).is_some());
    assert_eq!(fleet.health(&name, 3_000 * MS, &config()), WorkerHealth::Dead);
    assert_eq!(fleet.heard(beat("g0", "i0"), 3_100 * MS), Heard::Dead { first: true });
    assert_eq!(fleet.heard(beat("g0", "i0"), 3_200 * MS), Heard::Dead { first: false });
    assert_eq!(fleet.heard(beat("g0", "i1"), 3_100 * MS), Heard::Joined);
}

#[test]
fn draining_and_stuck_workers_are_named() {
    let mut fleet = Fleet::default();
    let mut heartbeat = beat("g0", "i0");
    let name = heartbeat.worker();
    fleet.heard(heartbeat.clone(), Duration::ZERO);
    fleet.set_ready(&name, true);
    heartbeat.draining = true;
    assert_eq!(fleet.heard(heartbeat.clone(), MS), Heard::Changed);
    assert_eq!(fleet.health(&name, MS, &config()), WorkerHealth::Draining);
    heartbeat.draining = false;
    heartbeat.engine.ms_since_progress = 30_000;
    fleet.heard(heartbeat.clone(), 2 * MS);
    assert_eq!(fleet.health(&name, 2 * MS, &config()), WorkerHealth::Unhealthy);
    heartbeat.engine.ms_since_progress = 0;
    heartbeat.engine.state = EngineRunState::Failed;
    fleet.heard(heartbeat, 3 * MS);
    assert_eq!(fleet.health(&name, 3 * MS, &config()), WorkerHealth::Unhealthy);
}

#[test]
fn many_silent_at_once_wait_ten_seconds_and_no_longer() {
    let mut fleet = Fleet::default();
    for n in 0..4 {
        fleet.heard(beat(&format!("g{n}"), "i"), Duration::ZERO);
    }
    fleet.heard(beat("g0", "i"), 2_000 * MS);
    assert!(fleet.verdicts(3_000 * MS, &config()).is_empty(), "three of four: suspect the network");
    fleet.heard(beat("g0", "i"), 12_000 * MS);
    assert!(fleet.verdicts(12_900 * MS, &config()).is_empty());
    assert_eq!(fleet.verdicts(13_000 * MS, &config()).len(), 3);
}

#[test]
fn verdicts_wait_while_the_own_link_is_in_doubt() {
    let mut fleet = Fleet::default();
    fleet.heard(beat("g0", "i"), Duration::ZERO);
    fleet.hold_verdicts(8_000 * MS);
    assert!(fleet.verdicts(7_999 * MS, &config()).is_empty());
    assert_eq!(fleet.verdicts(8_000 * MS, &config()).len(), 1);
}

#[test]
fn a_slot_is_taken_from_the_assignment_until_the_worker_lets_go() {
    let mut fleet = Fleet::default();
    let mut heartbeat = beat("g0", "i");
    let name = heartbeat.worker();
    fleet.heard(heartbeat.clone(), Duration::ZERO);
    let [a, b] = [testing::id("a"), testing::id("b")];
    let used = |fleet: &Fleet| fleet.get(&name).map(|w| w.load.used());
    let load = fleet.load_mut(&name).expect("known");
    load.assign(&a);
    load.assign(&a);
    load.assign(&b);
    assert_eq!(used(&fleet), Some(2));
    heartbeat.held = vec![testing::held("a", 1)];
    fleet.heard(heartbeat, MS);
    assert_eq!(used(&fleet), Some(2));
    let load = fleet.load_mut(&name).expect("known");
    load.unassign(&b);
    load.unassign(&a);
    assert_eq!(load.used(), 1, "a is still held");
    load.let_go(&a);
    load.let_go(&a);
    assert_eq!(load.used(), 0);
}

#[test]
fn the_newest_incarnation_of_a_gpu_is_known() {
    let mut fleet = Fleet::default();
    for incarnation in ["i0", "i1"] {
        fleet.heard(beat("g0", incarnation), Duration::ZERO);
    }
    assert!(fleet.superseded(&worker("g0", "i0")) && !fleet.superseded(&worker("g0", "i1")));
    fleet.bury(&worker("g0", "i1"), Duration::ZERO);
    assert!(!fleet.superseded(&worker("g0", "i0")));
}

#[test]
fn an_engine_that_dies_three_times_a_minute_is_unhealthy() {
    let mut fleet = Fleet::default();
    let mut heartbeat = beat("g0", "i");
    let name = heartbeat.worker();
    heartbeat.engine.crashes = 7;
    fleet.heard(heartbeat.clone(), Duration::ZERO);
    fleet.set_ready(&name, true);
    let mut at = |crashes: u32, ms: u32| {
        heartbeat.engine.crashes = crashes;
        fleet.heard(heartbeat.clone(), ms * MS);
        fleet.health(&name, ms * MS, &config())
    };
    assert_eq!(at(9, 1_000), WorkerHealth::Alive, "what happened before it was heard is not known to be recent");
    assert_eq!(at(4, 2_000), WorkerHealth::Alive, "old ones leave the count");
    assert_eq!(at(5, 50_000), WorkerHealth::Unhealthy);
    assert_eq!(at(5, 60_999), WorkerHealth::Unhealthy);
    assert_eq!(at(5, 61_000), WorkerHealth::Alive);
}

#[test]
fn of_two_incarnations_the_one_that_got_its_name_last_is_the_newer() {
    let mut fleet = Fleet::default();
    for (incarnation, started_ms) in [("new", 2_000), ("old", 1_000)] {
        let mut heartbeat = beat("g0", incarnation);
        heartbeat.started_ms = started_ms;
        fleet.heard(heartbeat, Duration::ZERO);
    }
    assert!(fleet.superseded(&worker("g0", "old")) && !fleet.superseded(&worker("g0", "new")));
}

#[test]
fn whoever_is_only_named_falls_silent_with_the_others() {
    let mut fleet = Fleet::default();
    fleet.heard(beat("g0", "i"), 20_000 * MS);
    for gpu in ["a", "b", "c"] {
        fleet.miss(&worker(gpu, "i"), Duration::ZERO);
    }
    assert!(fleet.verdicts(20_000 * MS, &config()).is_empty(), "three of four: suspect the network");
    assert!(fleet.verdicts(29_999 * MS, &config()).iter().all(|name| name.gpu_id.as_str() == "g0"));
    fleet.heard(beat("b", "i"), 29_999 * MS);
    fleet.heard(beat("g0", "i"), 29_999 * MS);
    assert_eq!(fleet.verdicts(30_000 * MS, &config()), [worker("a", "i"), worker("c", "i")]);
}
