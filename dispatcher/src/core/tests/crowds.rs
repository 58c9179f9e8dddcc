//! Many at once: opens in a burst, long queues, heartbeats while everything is taken.

use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;
use voxfleet_schema::fleet::Residency;

use super::*;
use crate::{sessions::Asked, testing::model};

fn retry_ms(answer: &Answer) -> Option<u64> {
    match answer {
        Answer::Refused(failure) if failure.class == FailureClass::NoCapacity => failure.retry_after_ms,
        _ => None,
    }
}

#[test]
fn ten_thousand_opens_at_once_are_admitted_in_order_and_cost_no_reads_beyond_the_free_slots() {
    let mut world = World::new(4);
    world.keep = |e| matches!(e, Effect::Load { .. });
    let start = std::time::Instant::now();
    for n in 0..10_000u64 {
        world.core.ask_about(&id(&format!("s{n:05}")), CallId(n), Asked::Open(Box::default(), None), world.now);
        world.run();
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(world.kept.len(), 16, "a read for each free slot");
    assert!(world.core.book.len() == 16 && world.core.waiting.is_empty(), "who is refused leaves nothing behind");
    // Their keys are read in any order.
    world.kept.reverse();
    world.answer_kept();
    let admitted: BTreeSet<u64> =
        world.answers.iter().filter(|(_, a)| matches!(a, Answer::Opened(_))).map(|(call, _)| call.0).collect();
    assert_eq!(admitted, (0..16).collect(), "whoever came first");
    let times: Vec<u64> = world.answers.iter().filter_map(|(_, a)| retry_ms(a)).collect();
    assert_eq!(times.len(), 10_000 - 16);
    assert!(times.iter().all(|ms| (1_000..=30_000).contains(ms)));
    let last = &times[5_000..];
    for second in 1..30 {
        let come = last.iter().filter(|ms| **ms / 1_000 == second).count();
        assert!(come < 400, "{come} of {} in second {second}", last.len());
    }
}

#[test]
fn a_place_that_was_claimed_in_vain_goes_to_whoever_comes_next() {
    let mut world = World::new(1);
    world.beat(0, |b| b.slots.total = 1);
    world.keep = |e| matches!(e, Effect::Load { .. });
    world.open(1, "a");
    assert_eq!(refused(world.open(2, "b")), FailureClass::NoCapacity);
    world.core.loaded(&id("a"), Err("no answer".to_owned()), world.now);
    world.run();
    assert_eq!(world.open(3, "b"), None, "its key is being read");
    assert_eq!(world.kept.len(), 2);
}

#[test]
fn refusals_stay_distinct_without_a_read() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Load { .. });
    let open = |world: &mut World, call: u64, model: Option<&str>| {
        let options = SessionOptions { model: model.map(str::to_owned), ..SessionOptions::default() };
        world.ask(call, &format!("s{call}"), Asked::Open(Box::new(options), None));
        world.answers.iter().find(|(c, _)| *c == CallId(call)).map(|(_, a)| a.clone())
    };
    assert_eq!(refused(open(&mut world, 1, Some("nobodys"))), FailureClass::ModelMissing);
    world.beat(0, |b| b.models = vec![model("huge", Residency::Available, 90_000)]);
    assert_eq!(refused(open(&mut world, 2, Some("huge"))), FailureClass::ModelDoesNotFit);
    world.beat(0, |b| b.draining = true);
    assert_eq!(refused(open(&mut world, 3, None)), FailureClass::NoWorkers);
    world.beat(0, |b| b.slots.total = 0);
    assert_eq!(refused(open(&mut world, 4, None)), FailureClass::NoCapacity);
    assert!(world.kept.is_empty());
}

#[test]
fn who_waits_comes_before_who_asks_anew() {
    let mut world = World::new(1);
    for n in 0..6 {
        world.audio(&format!("s{n}"), n + 1);
        world.wait(MS);
    }
    assert_eq!(world.core.waiting.len(), 2);
    world.keep = |e| matches!(e, Effect::Release { .. });
    world.entry("s0", 10, &[("Asr-End", "1")], b"");
    world.core.finished(&end_final("s0", 0, 1, 10), world.now);
    world.run();
    world.keep = |_| false;
    let Some(Effect::Release { worker, id: session, epoch, .. }) = world.kept.pop() else { panic!("a release") };
    world.core.released(&worker, &session, epoch, true, world.now);
    // Its slot is free, and nobody has looked at the queue yet.
    world.core.ask_about(&id("new"), CallId(1), Asked::Open(Box::default(), None), world.now);
    world.run();
    assert_eq!(world.state("s4"), SessionState::Assigned);
    assert_eq!(refused(world.answers.pop().map(|(_, a)| a)), FailureClass::NoCapacity);
}

#[test]
fn a_session_that_workers_refuse_keeps_its_place() {
    let mut world = World::new(1);
    world.beat(0, |b| b.slots.total = 1);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    world.audio("first", 1);
    world.wait(MS);
    world.audio("second", 2);
    let Some(Effect::Ask { worker, .. }) = world.kept.pop() else { panic!("{:?}", world.kept) };
    world.wait(5_000 * MS);
    let no = AskReply::Refused(Failure::new(FailureClass::NoCapacity, "no permit"));
    world.core.asked(&id("first"), 1, &worker, no, world.now);
    world.core.effects().for_each(drop);
    assert_eq!(world.core.waiting.iter().map(StreamId::as_str).collect::<Vec<_>>(), ["second"], "being written");
    world.core.saved(&id("first"), Ok(9), world.now);
    assert_eq!(world.core.waiting.iter().map(StreamId::as_str).collect::<Vec<_>>(), ["first", "second"]);
}

#[test]
fn heartbeats_of_a_full_fleet_look_at_nobody_who_waits() {
    let mut world = World::new(2);
    for n in 0..2_000 {
        world.audio(&format!("s{n:04}"), n + 1);
    }
    assert_eq!(world.core.waiting.len(), 2_000 - 8);
    world.wait(1_000 * MS);
    for seq in 1..200 {
        world.core.heartbeat(Heartbeat { seq, ..beat("g0", "i") }, world.now);
        world.core.refresh_roster();
        assert!(!world.core.place_due, "nothing came free");
    }
    let mut more = beat("g0", "i");
    (more.seq, more.slots.total) = (200, 5);
    world.core.heartbeat(more, world.now);
    world.run();
    assert_eq!(world.state("s0008"), SessionState::Assigned, "whoever waits longest");
    assert_eq!(world.core.waiting.len(), 2_000 - 9);
}

#[test]
fn whoever_waits_can_see_why() {
    let mut world = World::new(2);
    for n in 0..9 {
        world.audio(&format!("s{n}"), n + 1);
    }
    world.ask(1, "s8", Asked::Status);
    let Some((_, Answer::Status(status))) = world.answers.pop() else { panic!("{:?}", world.answers) };
    assert_eq!(status.why, ["no_capacity: No GPU resources available"]);
    let rows = status.candidates.as_array().cloned().unwrap_or_default();
    assert_eq!(rows.iter().map(|r| r["refused"].as_str()).collect::<Vec<_>>(), [Some("no free slot"); 2]);
    world.ask(2, "s0", Asked::Status);
    let Some((_, Answer::Status(status))) = world.answers.pop() else { panic!("{:?}", world.answers) };
    assert_eq!(status.candidates, serde_json::Value::Null, "its event says it");
}

#[test]
fn a_model_that_one_session_will_load_leaves_no_room_for_another_until_its_heartbeat_shows_it() {
    let two = |b: &mut Heartbeat| {
        b.models = vec![model("a", Residency::Available, 12_000), model("b", Residency::Available, 12_000)];
    };
    let mut world = World::new(1);
    world.beat(0, two);
    let open = |world: &mut World, call: u64, model: &str| {
        let options = SessionOptions { model: Some(model.to_owned()), ..SessionOptions::default() };
        world.ask(call, &format!("s{call}"), Asked::Open(Box::new(options), None));
        matches!(world.answers.last(), Some((c, Answer::Opened(_))) if *c == CallId(call))
    };
    assert!(open(&mut world, 1, "a") && open(&mut world, 2, "a"));
    assert!(!open(&mut world, 3, "b"), "12,000 MB of 17,600 are spoken for");
    let mut other = beat("g0", "j");
    other.device.index = Some(0);
    two(&mut other);
    other.started_ms = 5;
    world.core.heartbeat(other, world.now);
    world.run();
    assert!(!open(&mut world, 4, "b"), "nor on a new incarnation on the same GPU");
    assert!(open(&mut world, 5, "a"), "whoever needs the same model needs no more memory");
    assert_eq!(world.assigned.last().map(|(_, _, epoch)| *epoch), Some(1));
    assert_eq!(world.core.fleet.get(&worker("g0", "i")).map(|w| w.load.used()), Some(3), "where it is promised");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Sessions that open by audio while others end, in any order: whoever came first is placed first, no slot is given
    /// twice, and none stays empty while somebody waits.
    #[test]
    fn order_of_admission_is_order_of_arrival(steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..80)) {
        let mut world = World::new(2);
        let mut seq = 0;
        let mut arrived: Vec<String> = Vec::new();
        let mut working: Vec<String> = Vec::new();
        for (arrives, which) in steps {
            world.wait(10 * MS);
            seq += 1;
            if arrives || working.is_empty() {
                let name = format!("s{seq:04}");
                world.audio(&name, seq);
                arrived.push(name);
            } else {
                let name = working.remove(which.index(working.len()));
                world.entry(&name, seq, &[("Asr-End", "1")], b"");
                world.core.finished(&end_final(&name, 0, 1, seq), world.now);
                world.run();
                prop_assert_eq!(world.state(&name), SessionState::Ended);
            }
            let placed: Vec<&str> = world.assigned.iter().map(|(name, _, _)| name.as_str()).collect();
            prop_assert_eq!(&placed[..], &arrived[..placed.len()], "in order");
            working = placed.iter().map(|n| (*n).to_owned())
                .filter(|n| world.state(n) == SessionState::Assigned).collect();
            let mut used: HashMap<String, u32> = HashMap::new();
            for name in &working {
                *used.entry(world.record(name).worker.as_ref().expect("a worker").gpu_id.to_string()).or_default() += 1;
            }
            prop_assert!(used.values().all(|n| *n <= 4), "{used:?}");
            let free = 8 - working.len();
            prop_assert!(free == 0 || world.core.waiting.is_empty());
        }
    }
}
