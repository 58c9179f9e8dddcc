//! Workers that leave, fall ill and come back; what is told of it, and what becomes of their sessions.

use voxfleet_schema::{
    fleet::{DrainRequest, EngineRunState},
    id::GpuId,
    session::Priority,
};

use super::*;

/// A heartbeat of a worker that holds sessions at these epochs.
fn holds(b: &mut Heartbeat, sessions: &[(&str, u64)]) {
    b.held = sessions.iter().map(|(name, epoch)| held(name, *epoch)).collect();
}

#[test]
fn a_refused_move_leaves_the_session_with_its_old_owner() {
    let mut world = World::new(2);
    world.audio("s", 1);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    let drains = |w: &mut World| {
        w.beat(0, |b| {
            b.draining = true;
            holds(b, &[("s", 1)]);
        });
    };
    world.wait(100 * MS);
    drains(&mut world);
    let Some(Effect::Ask { worker: other, assignment }) = world.kept.pop() else { panic!("{:?}", world.kept) };
    assert_eq!((other.clone(), assignment.epoch), (worker("g1", "i"), 2));
    let no = Failure::new(FailureClass::NoCapacity, "no permit");
    world.core.asked(&id("s"), 2, &other, AskReply::Refused(no), world.now);
    world.run();
    assert_eq!(world.state("s"), SessionState::Waiting);
    world.seconds(20, |w| {
        drains(w);
        w.beat(1, |b| b.slots.total = 0);
    });
    assert!(world.releases.is_empty(), "it works on until somebody else has it");
    world.keep = |_| false;
    for seq in 1..=3 {
        world.beat(1, |b| b.seq = seq);
    }
    drains(&mut world);
    assert_eq!(world.assigned.last(), Some(&("s".to_owned(), "g1".to_owned(), 3)));
    assert_eq!((world.releases.as_slice(), world.finish_ms), (&[("s".to_owned(), 1)][..], 2_000));
    assert_eq!(world.told(What::Moved), 1);
}

#[test]
fn a_waiting_session_stays_with_an_owner_that_recovers() {
    let mut world = World::new(2);
    world.audio("s", 1);
    let beats = |sick: bool| {
        move |w: &mut World| {
            w.beat(0, |b| {
                b.engine.ms_since_progress = if sick { 40_000 } else { 0 };
                holds(b, &[("s", 1)]);
            });
        }
    };
    world.keep = |e| matches!(e, Effect::Ask { .. });
    world.seconds(1, beats(true));
    let Some(Effect::Ask { worker: other, .. }) = world.kept.pop() else { panic!("{:?}", world.kept) };
    let no = Failure::new(FailureClass::NoCapacity, "no permit");
    world.core.asked(&id("s"), 2, &other, AskReply::Refused(no), world.now);
    world.keep = |_| false;
    world.seconds(3, beats(true));
    assert_eq!(world.state("s"), SessionState::Waiting);
    world.seconds(3, beats(false));
    assert_eq!(world.assigned.last(), Some(&("s".to_owned(), "g0".to_owned(), 3)));
    assert!(world.releases.is_empty());
}

#[test]
fn what_a_draining_worker_has_let_go_moves_at_once_and_without_waiting_for_the_tick() {
    let mut world = World::new(2);
    world.audio("s", 1);
    world.seconds(1, |w| w.beat(0, |b| holds(b, &[("s", 1)])));
    world.wait(100 * MS);
    world.beat(0, |b| b.draining = true);
    assert_eq!(world.assigned.last(), Some(&("s".to_owned(), "g1".to_owned(), 2)));
}

#[test]
fn a_quarter_of_the_slots_moves_at_once_the_most_important_first() {
    let mut world = World::new(1);
    let slots = |b: &mut Heartbeat| b.slots.total = 8;
    world.beat(0, slots);
    let names: Vec<String> = (0..8).map(|n| format!("s{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        let priority = if n >= 6 { Priority::High } else { Priority::Normal };
        let options = SessionOptions { priority, ..SessionOptions::default() };
        world.ask(n as u64, name, crate::sessions::Asked::Open(Box::new(options), None));
    }
    world.beat(1, slots);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    let drains = |w: &mut World| {
        w.beat(0, |b| {
            (b.slots.total, b.draining) = (8, true);
            b.held = names.iter().map(|name| held(name, 1)).collect();
        });
    };
    world.wait(100 * MS);
    drains(&mut world);
    let asked = |w: &World| -> Vec<String> {
        let ids = w.kept.iter().map(|e| match e {
            Effect::Ask { assignment, .. } => assignment.id.to_string(),
            other => panic!("{other:?}"),
        });
        ids.collect()
    };
    assert_eq!(asked(&world), ["s6", "s7"]);
    world.seconds(3, |w| {
        drains(w);
        w.beat(1, slots);
    });
    assert_eq!(asked(&world).len(), 2, "no more until these have moved");
    for expected in [["s0", "s1"], ["s2", "s3"], ["s4", "s5"]] {
        world.answer_kept();
        world.wait(100 * MS);
        world.run();
        assert_eq!(asked(&world), expected);
    }
}

fn drain(world: &mut World, call: u64, gpu: &str, deadline_ms: Option<u64>) -> Option<Answer> {
    let request = DrainRequest { gpu_id: GpuId::new(gpu).expect("test id"), deadline_ms };
    world.core.drain(CallId(call), &request, world.now);
    world.run();
    world.answers.iter().find(|(c, _)| *c == CallId(call)).map(|(_, a)| a.clone())
}

#[test]
fn a_gpu_is_drained_on_request_and_told_until_it_says_so() {
    let mut world = World::new(2);
    world.audio("s", 1);
    world.keep = |e| matches!(e, Effect::Drain { .. } | Effect::Note { .. });
    assert_eq!(refused(drain(&mut world, 1, "nobody", None)), FailureClass::NotFound);
    assert_eq!(drain(&mut world, 2, "g0", Some(10_000)), None, "it has not answered");
    assert!(matches!(world.kept[0], Effect::Note { drain_until_ms: Some(10_000), .. }), "a successor reads the wish");
    assert!(matches!(world.kept[1], Effect::Drain { deadline_ms: 10_000, .. }));
    world.kept.clear();
    world.core.drained(&worker("g0", "i"), &AskReply::Silent("timeout".to_owned()));
    world.run();
    assert!(matches!(world.answers.last(), Some((_, Answer::Refused(f))) if f.class == FailureClass::Timeout));
    for n in 0..3 {
        assert!(
            matches!(world.open(10 + n, &format!("new{n}")), Some(Answer::Opened(o)) if o.worker == worker("g1", "i"))
        );
    }
    world.now.unix_ms = 4_000;
    world.seconds(1, |w| (0..2).for_each(|n| w.beat(n, |_| ())));
    assert!(matches!(world.kept.pop(), Some(Effect::Drain { deadline_ms: 6_000, .. })), "{:?}", world.kept);
    world.core.drained(&worker("g0", "i"), &AskReply::Taken);
    world.seconds(5, |w| w.beat(0, |b| b.draining = true));
    assert!(!world.kept.iter().any(|e| matches!(e, Effect::Drain { .. })), "it says so itself");
    assert_eq!(world.told(What::Draining), 1);
}

#[test]
fn whoever_asks_hears_who_drains_and_what_they_held() {
    let mut world = World::new(2);
    world.audio("a", 1);
    world.audio("b", 2);
    world.audio("c", 3);
    let Some(Answer::Drained(drained)) = drain(&mut world, 1, "g0", None) else { panic!("{:?}", world.answers) };
    assert_eq!((drained.workers.as_slice(), drained.sessions, drained.jobs), (&[worker("g0", "i")][..], 2, 0));
    world.wait(100 * MS);
    world.run();
    let moved = world.assigned[3..].iter().map(|(_, gpu, _)| gpu.as_str()).collect::<Vec<_>>();
    assert_eq!(moved, ["g1"], "it needs not say so before its sessions begin to move");
}

#[test]
fn a_successor_goes_on_with_a_drain_that_was_asked_for() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Drain { .. } | Effect::Admit { .. });
    world.beat(1, |_| ());
    world.kept.clear();
    let ready = Admission::Ready { revision: 4, drain_until_ms: Some(9_000) };
    world.core.admitted(&worker("g1", "i"), ready, world.now);
    world.seconds(1, |w| w.beat(0, |_| ()));
    assert!(matches!(world.kept.pop(), Some(Effect::Drain { deadline_ms: 9_000, .. })));
}

#[test]
fn changes_of_health_are_told_once_each() {
    let mut world = World::new(1);
    let told = |w: &World| {
        use What::{Dead, Draining, Ended, Joined, Recovered, Suspect, Unhealthy};
        let health = [Joined, Suspect, Unhealthy, Recovered, Draining, Dead, Ended];
        w.told.iter().map(|e| e.what).filter(|what| health.contains(what)).collect::<Vec<_>>()
    };
    world.seconds(2, |_| ());
    assert_eq!(told(&world), [What::Joined, What::Suspect]);
    world.seconds(3, |w| w.beat(0, |_| ()));
    world.seconds(3, |w| w.beat(0, |b| b.engine.state = EngineRunState::Failed));
    world.seconds(3, |w| w.beat(0, |_| ()));
    world.seconds(3, |w| w.beat(0, |b| b.draining = true));
    world.seconds(8, |_| ());
    use What::{Draining, Ended, Joined, Recovered, Suspect, Unhealthy};
    assert_eq!(told(&world), [Joined, Suspect, Recovered, Unhealthy, Recovered, Draining, Ended]);
    for event in &world.told {
        assert_eq!((event.id.as_str(), &event.detail["incarnation"]), ("g0", &"i".into()));
    }
    for seq in 0..3 {
        world.beat(0, |b| b.seq = seq);
    }
    assert_eq!(world.told(What::Renewed), 1);
}

#[test]
fn what_crashed_an_engine_goes_with_the_session_to_its_next_owner() {
    let mut world = World::new(2);
    world.audio("s", 1);
    world.seconds(1, |w| {
        w.beat(0, |b| {
            holds(b, &[("s", 1)]);
            (b.held[0].suspect, b.held[0].crashes, b.held[0].suspect_from) = (true, 2, Some(9_000));
        });
    });
    world.keep = |e| matches!(e, Effect::Ask { .. } | Effect::Save { .. });
    world.seconds(4, |w| w.beat(1, |_| ()));
    let Some(Effect::Save { record, .. }) = world.kept.last() else { panic!("{:?}", world.kept) };
    assert_eq!((record.suspect, record.crashes, record.suspect_from), (true, 2, Some(9_000)));
    assert_eq!(record.displaced_from, Some(worker("g0", "i")), "a successor tells of the move");
    world.answer_kept();
    let Some(Effect::Ask { assignment, .. }) = world.kept.last() else { panic!("{:?}", world.kept) };
    assert_eq!((assignment.suspect, assignment.crashes, assignment.suspect_from), (true, 2, Some(9_000)));
    world.keep = |_| false;
    world.answer_kept();
    world.seconds(1, |w| w.beat(1, |b| holds(b, &[("s", 2)])));
    assert!(!world.record("s").suspect, "it has passed there");
}

#[test]
fn a_drain_without_a_deadline_is_the_workers_own() {
    let mut world = World::new(2);
    world.keep = |e| matches!(e, Effect::Drain { .. } | Effect::Note { .. });
    assert_eq!(drain(&mut world, 1, "g0", None), None);
    let drains = |world: &mut World| {
        let sent = world.kept.iter().filter_map(|e| match e {
            Effect::Drain { deadline_ms, .. } => Some(*deadline_ms),
            _ => None,
        });
        let sent: Vec<u64> = sent.collect();
        world.kept.clear();
        sent
    };
    assert_eq!(drains(&mut world), [0]);
    world.core.drained(&worker("g0", "i"), &AskReply::Silent("timeout".to_owned()));
    world.seconds(1, |w| (0..2).for_each(|n| w.beat(n, |_| ())));
    assert_eq!(drains(&mut world), [0], "told again, the same");
    world.core.drained(&worker("g0", "i"), &AskReply::Silent("timeout".to_owned()));
    // Somebody wants it sooner.
    drain(&mut world, 2, "g0", Some(5_000));
    assert_eq!(drains(&mut world), [5_000]);
}

#[test]
fn the_last_try_of_what_kills_engines_is_moved_to_another_worker() {
    let asks = |b: &mut voxfleet_schema::fleet::Heartbeat, epoch| {
        holds(b, &[("s", epoch)]);
        (b.held[0].suspect, b.held[0].crashes, b.held[0].suspect_from) = (true, 2, Some(9_000));
        b.held[0].elsewhere = true;
    };
    // Nobody else: it stays.
    let mut world = World::new(1);
    world.audio("s", 1);
    world.seconds(4, |w| w.beat(0, |b| asks(b, 1)));
    assert_eq!((world.record("s").epoch, world.told(What::Moved)), (1, 0));

    let mut world = World::new(2);
    world.audio("s", 1);
    let owner = world.record("s").worker.clone();
    assert_eq!(owner, Some(worker("g0", "i")));
    world.seconds(3, |w| {
        w.beat(0, |b| asks(b, 1));
        w.beat(1, |_| ());
    });
    let record = world.record("s");
    assert_eq!((record.worker.clone(), record.epoch), (Some(worker("g1", "i")), 2));
    assert_eq!((record.crashes, record.suspect_from), (2, Some(9_000)));
    // It knows of two crashes, and does not ask: it keeps it.
    world.seconds(5, |w| {
        w.beat(0, |_| ());
        w.beat(1, |b| {
            asks(b, 2);
            b.held[0].elsewhere = false;
        });
    });
    assert_eq!((world.record("s").epoch, world.told(What::Moved)), (2, 1));
}
