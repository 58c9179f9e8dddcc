mod properties;

use voxfleet_schema::{device::DeviceTrouble, failure::FailureClass, fleet::EngineRunState};

use super::*;
use crate::testing::{self, beat, worker};

const MS: Duration = Duration::from_millis(1);

fn config() -> DispatcherConfig {
    DispatcherConfig::default()
}

/// A look over a link that answers at once.
fn look(fleet: &mut Fleet, now: Duration) -> Vec<WorkerName> {
    fleet.round_trip(RoundTrip { began: now, answered: true, connects: 1 }, now, &config());
    fleet.verdicts(now, &config())
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
    assert!(look(&mut fleet, 2_999 * MS).is_empty());
    assert_eq!(look(&mut fleet, 3_000 * MS), std::slice::from_ref(&name));
    assert!(fleet.bury(&name, 3_000 * MS).is_some());
    assert_eq!(fleet.health(&name, 3_000 * MS, &config()), WorkerHealth::Dead);
    assert_eq!(fleet.heard(beat("g0", "i0"), 3_100 * MS), Heard::Dead { first: true });
    assert_eq!(fleet.heard(beat("g0", "i0"), 3_200 * MS), Heard::Dead { first: false });
    assert_eq!(fleet.heard(beat("g0", "i1"), 3_100 * MS), Heard::Joined);
}

#[test]
fn a_heartbeat_with_a_number_far_too_high_does_not_make_those_that_follow_stale() {
    let mut fleet = Fleet::default();
    let mut heartbeat = beat("g0", "i0");
    (heartbeat.seq, heartbeat.sent_ms) = (5, 5_000);
    fleet.heard(heartbeat.clone(), Duration::ZERO);
    let mut overtaken = heartbeat.clone();
    (overtaken.seq, overtaken.sent_ms) = (4, 4_000);
    assert_eq!(fleet.heard(overtaken, MS), Heard::Stale);
    let mut forged = heartbeat.clone();
    forged.seq = 1_000_000;
    fleet.heard(forged, 2 * MS);
    (heartbeat.seq, heartbeat.sent_ms) = (6, 6_000);
    assert_eq!(fleet.heard(heartbeat, 3 * MS), Heard::Known);
}

#[test]
fn a_broken_device_is_unhealthy_until_its_engine_runs_on_the_cpu() {
    use FailureClass::{DeviceLost, DriverMismatch, MissingLibrary, Unavailable};
    for (class, device, index, health) in [
        (DeviceLost, "cuda:test", Some(0), WorkerHealth::Unhealthy),
        (DriverMismatch, "cuda:test", Some(0), WorkerHealth::Unhealthy),
        (MissingLibrary, "cuda:test", Some(0), WorkerHealth::Unhealthy),
        (Unavailable, "cuda:test", Some(0), WorkerHealth::Alive),
        (DeviceLost, "cpu", Some(0), WorkerHealth::Alive),
        (MissingLibrary, "cpu", None, WorkerHealth::Alive),
    ] {
        let mut fleet = Fleet::default();
        let mut heartbeat = beat("g0", "i0");
        (heartbeat.device.index, heartbeat.engine.effective_device) = (index, device.to_owned());
        let name = heartbeat.worker();
        fleet.heard(heartbeat.clone(), Duration::ZERO);
        fleet.set_ready(&name, true);
        fleet.news(MS, &config());
        heartbeat.device.trouble = Some(DeviceTrouble { class, message: "gone".to_owned() });
        assert_eq!(fleet.heard(heartbeat.clone(), 2 * MS), Heard::Changed, "no need to wait for a tick");
        assert_eq!(fleet.health(&name, 2 * MS, &config()), health, "{class} {device}");
        let told: Vec<_> = fleet.news(2 * MS, &config()).into_iter().map(|(_, what, why)| (what, why)).collect();
        if health == WorkerHealth::Alive {
            assert_eq!(told, []);
            continue;
        }
        assert_eq!(told, [(What::Unhealthy, format!("{class}: gone"))]);
        heartbeat.device.trouble = None;
        fleet.heard(heartbeat, 3 * MS);
        assert_eq!(fleet.news(3 * MS, &config())[0].1, What::Recovered);
    }
}

#[test]
fn a_lost_device_without_an_engine_is_healthy_where_the_next_one_runs_on_the_cpu() {
    for (device, health) in [("cpu", WorkerHealth::Alive), ("none", WorkerHealth::Unhealthy)] {
        for state in [EngineRunState::Down, EngineRunState::Starting, EngineRunState::Restarting] {
            let mut fleet = Fleet::default();
            let mut heartbeat = beat("g0", "i0");
            let name = heartbeat.worker();
            (heartbeat.engine.state, heartbeat.engine.effective_device) = (state, device.to_owned());
            heartbeat.device.trouble =
                Some(DeviceTrouble { class: FailureClass::DeviceLost, message: "gone".to_owned() });
            fleet.heard(heartbeat, Duration::ZERO);
            fleet.set_ready(&name, true);
            assert_eq!(fleet.health(&name, MS, &config()), health, "{device} {state:?}");
        }
    }
}

#[test]
fn who_said_that_it_goes_has_left_and_is_not_called_dead() {
    for (draining, held, dead) in [(true, false, false), (true, true, true), (false, false, true)] {
        let mut fleet = Fleet::default();
        let mut heartbeat = beat("g0", "i0");
        let name = heartbeat.worker();
        heartbeat.draining = draining;
        heartbeat.held = if held { vec![testing::held("s", 1)] } else { Vec::new() };
        fleet.heard(heartbeat, Duration::ZERO);
        fleet.set_ready(&name, true);
        fleet.news(MS, &config());
        let suspected = !fleet.news(2_000 * MS, &config()).is_empty();
        assert_eq!(suspected, dead, "{draining} {held}");
        assert!(look(&mut fleet, 2_999 * MS).is_empty());
        assert_eq!(look(&mut fleet, 3_000 * MS), std::slice::from_ref(&name), "its name is used up all the same");
        fleet.bury(&name, 3_000 * MS);
        assert!(fleet.is_dead(&name));
        assert_eq!(!fleet.dead().is_empty(), dead, "{draining} {held}");
    }
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
    assert!(look(&mut fleet, 3_000 * MS).is_empty(), "three of four: suspect the network");
    fleet.heard(beat("g0", "i"), 12_000 * MS);
    assert!(look(&mut fleet, 12_900 * MS).is_empty());
    assert_eq!(look(&mut fleet, 13_000 * MS).len(), 3);
}

#[test]
fn verdicts_wait_while_the_own_link_is_in_doubt() {
    let mut fleet = Fleet::default();
    fleet.heard(beat("g0", "i"), Duration::ZERO);
    fleet.round_trip(RoundTrip { began: 1_000 * MS, answered: false, connects: 1 }, 2_000 * MS, &config());
    assert!(fleet.verdicts(5_000 * MS, &config()).is_empty());
    assert!(look(&mut fleet, 6_000 * MS).is_empty());
    assert!(look(&mut fleet, 8_999 * MS).is_empty());
    assert_eq!(look(&mut fleet, 9_000 * MS).len(), 1);
}

#[test]
fn nobody_is_condemned_for_a_silence_that_no_answer_proves() {
    let mut fleet = Fleet::default();
    fleet.heard(beat("g0", "i"), Duration::ZERO);
    assert!(look(&mut fleet, 2_900 * MS).is_empty());
    assert!(fleet.verdicts(3_500 * MS, &config()).is_empty(), "asked before it had been silent for long enough");
    assert_eq!(look(&mut fleet, 3_600 * MS).len(), 1);
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
        fleet.miss(&worker(gpu, "i"), 17_000 * MS);
    }
    assert!(look(&mut fleet, 20_000 * MS).is_empty(), "three of four: suspect the network");
    assert!(look(&mut fleet, 29_999 * MS).iter().all(|name| name.gpu_id.as_str() == "g0"));
    fleet.heard(beat("b", "i"), 29_999 * MS);
    fleet.heard(beat("g0", "i"), 29_999 * MS);
    assert_eq!(look(&mut fleet, 30_000 * MS), [worker("a", "i"), worker("c", "i")]);
}

#[test]
fn who_comes_and_goes_does_not_put_off_the_verdicts_of_others() {
    let mut fleet = Fleet::default();
    for gpu in ["a", "b", "c"] {
        fleet.heard(beat(gpu, "i"), Duration::ZERO);
    }
    let mut condemned = Vec::new();
    // Every three seconds the third is silent for a moment longer than it may be.
    for step in 1..80u32 {
        let now = step * 250 * MS;
        if step % 12 > 6 {
            fleet.heard(beat("c", "i"), now);
        }
        for name in look(&mut fleet, now) {
            fleet.bury(&name, now);
            condemned.push((name, now));
        }
    }
    assert_eq!(condemned, [(worker("a", "i"), 13_000 * MS), (worker("b", "i"), 13_000 * MS)]);
}

#[test]
fn somebody_who_is_heard_elsewhere_is_not_alive_for_that() {
    let mut fleet = Fleet::default();
    let name = worker("g0", "i");
    fleet.heard(beat("g0", "i"), Duration::ZERO);
    fleet.set_ready(&name, true);
    assert_eq!(look(&mut fleet, 3_000 * MS), std::slice::from_ref(&name));
    fleet.heard_elsewhere(&name, 3_100 * MS);
    assert_eq!(fleet.health(&name, 3_100 * MS, &config()), WorkerHealth::Suspect);
    assert!(look(&mut fleet, 6_000 * MS).is_empty());
    assert_eq!(look(&mut fleet, 6_100 * MS), [name]);
}

#[test]
fn the_newest_verdicts_come_first_and_those_of_gpus_that_are_back_are_old() {
    let mut fleet = Fleet::default();
    for (gpu, at_ms) in [("a", 1_000), ("b", 3_000), ("c", 2_000), ("d", 4_000)] {
        fleet.was_buried(&worker(gpu, "i"), at_ms, MS);
    }
    fleet.heard(beat("d", "j"), MS);
    fleet.heard(beat("e", "i"), MS);
    fleet.bury(&worker("e", "i"), 2 * MS);
    assert_eq!(fleet.dead(), ["e", "b", "c", "a"].map(|gpu| worker(gpu, "i")));
}

#[test]
fn a_worker_that_beats_slowly_is_judged_by_its_own_beats() {
    let mut fleet = Fleet::default();
    let name = worker("slow", "i");
    let heartbeat = voxfleet_schema::fleet::Heartbeat { beat_ms: 5_000, ..beat("slow", "i") };
    fleet.heard(heartbeat, Duration::ZERO);
    fleet.heard(beat("usual", "i"), Duration::ZERO);
    fleet.set_ready(&name, true);
    assert_eq!(fleet.health(&name, 7_499 * MS, &config()), WorkerHealth::Alive);
    assert_eq!(fleet.health(&name, 7_500 * MS, &config()), WorkerHealth::Suspect);
    assert_eq!(look(&mut fleet, 14_999 * MS), [worker("usual", "i")]);
    assert_eq!(look(&mut fleet, 15_000 * MS), [name, worker("usual", "i")]);
}
