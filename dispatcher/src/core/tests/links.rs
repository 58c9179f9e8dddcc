//! The dispatcher's own link, its successors, and tasks that never answer.

use super::*;

fn silent() -> AskReply {
    AskReply::Silent("timeout".to_owned())
}

#[test]
fn an_owner_that_a_takeover_has_not_heard_is_judged_like_any_other() {
    let mut world = World::new(1);
    let record = |n: u64| SessionRecord {
        state: SessionState::Assigned,
        epoch: 3,
        worker: Some(worker(&format!("gone{n}"), "i")),
        ..world_record(&format!("s{n}"))
    };
    for n in 0..3 {
        let loaded = Loaded { record: Some((record(n), 1)), ..Loaded::default() };
        world.core.recover(loaded, world.now);
    }
    world.core.recover_fleet(vec![], world.now);
    world.keep = |e| matches!(e, Effect::Bury { .. });
    // The dispatcher's own link is down: silence says nothing.
    for _ in 0..30 {
        world.wait(Duration::from_secs(1));
        world.beat(0, |_| ());
        testing::probe(&mut world.core, false, false, world.now);
        world.core.tick(world.now);
        world.run();
    }
    assert!(world.assigned.is_empty() && world.kept.is_empty());
    world.seconds(3, |w| w.beat(0, |_| ()));
    assert!(world.kept.is_empty(), "heartbeats are late when the link comes back, and three at once are the network");
    world.seconds(10, |w| w.beat(0, |_| ()));
    assert_eq!(world.kept(|e| matches!(e, Effect::Bury { heartbeat: None, .. })), 3);
    assert!(world.assigned.is_empty(), "the verdict comes first");
    world.keep = |_| false;
    world.answer_kept();
    assert_eq!(world.assigned.len(), 3);
    assert_eq!(world.told(What::Moved), 3);
}

#[test]
fn a_verdict_that_a_predecessor_wrote_counts_at_once() {
    let mut world = World::new(1);
    let name = worker("gone", "i");
    let record =
        SessionRecord { state: SessionState::Assigned, epoch: 3, worker: Some(name.clone()), ..world_record("s") };
    world.core.recover(Loaded { record: Some((record, 1)), ..Loaded::default() }, world.now);
    world
        .core
        .recover_fleet(vec![FleetKey { worker: name.clone(), revision: 7, dead_ms: Some(0), device: None }], world.now);
    world.core.tick(world.now);
    world.run();
    assert_eq!(world.assigned, [("s".to_owned(), "g0".to_owned(), 4)]);
    assert_eq!(world.told(What::Dead), 0, "that has been told");
    assert_eq!(world.core.fleet.dead(), [name]);
}

#[test]
fn consumers_of_whoever_has_not_been_heard_stay_until_its_verdict() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Bury { .. } | Effect::RemoveConsumers { .. });
    world.core.consumers(&[worker("g9", "i")], &[], world.now);
    world.run();
    assert!(world.kept.is_empty());
    world.seconds(1, |w| w.beat(0, |_| ()));
    assert_eq!(world.kept(|e| matches!(e, Effect::Bury { .. })), 1);
    assert_eq!(world.kept(|e| matches!(e, Effect::RemoveConsumers { .. })), 0);
    world.keep = |e| matches!(e, Effect::RemoveConsumers { .. });
    world.answer_kept();
    assert_eq!(world.kept(|e| matches!(e, Effect::RemoveConsumers { .. })), 1);
}

#[test]
fn somebody_else_has_heard_whoever_was_to_be_condemned() {
    let mut world = World::new(2);
    world.keep = |e| matches!(e, Effect::Bury { .. });
    let beats = |w: &mut World| w.beat(1, |_| ());
    world.seconds(3, beats);
    let Some(Effect::Bury { worker: name, revision: Some(_), .. }) = world.kept.pop() else {
        panic!("{:?}", world.kept)
    };
    world.core.buried(&name, Burial::Fenced, world.now);
    world.run();
    assert_eq!(world.told(What::Dead), 0);
    world.seconds(2, beats);
    assert!(world.kept.is_empty(), "its silence begins anew");
    world.seconds(1, beats);
    let bury = world.kept.pop();
    assert!(matches!(bury, Some(Effect::Bury { revision: Some(_), .. })), "over the key as admission left it");
}

#[test]
fn a_verdict_on_its_way_is_taken_back_by_a_heartbeat() {
    let mut world = World::new(2);
    world.keep = |e| matches!(e, Effect::Bury { .. });
    world.seconds(3, |w| w.beat(1, |_| ()));
    let Some(Effect::Bury { worker: name, recall, .. }) = world.kept.pop() else { panic!("{:?}", world.kept) };
    assert!(!recall.is_set());
    world.beat(0, |_| ());
    assert!(recall.is_set(), "it lives");
    world.core.buried(&name, Burial::Recalled, world.now);
    world.run();
    assert!(!world.core.fleet.is_dead(&name) && world.told(What::Dead) == 0);
    world.seconds(3, |w| w.beat(1, |_| ()));
    let Some(Effect::Bury { recall, .. }) = world.kept.pop() else { panic!("{:?}", world.kept) };
    assert!(!recall.is_set(), "silent again");
}

#[test]
fn gpus_that_a_predecessor_has_heard_count() {
    let mut world = World::new(0);
    world.beat(0, |b| b.device.index = None);
    let key = FleetKey { worker: worker("g7", "i"), revision: 7, dead_ms: Some(0), device: Some(true) };
    world.core.recover_fleet(vec![key], world.now);
    let policy = voxfleet_schema::session::Policy::ExactModel;
    let options = SessionOptions { model: Some("small".to_owned()), policy, ..SessionOptions::default() };
    world.ask(1, "s", crate::sessions::Asked::Open(Box::new(options), None));
    assert_eq!(refused(world.answers.pop().map(|(_, a)| a)), FailureClass::NoWorkers, "no silent CPU");
}

#[test]
fn a_verdict_whose_writing_was_lost_is_written_again() {
    let mut world = World::new(2);
    world.keep = |e| matches!(e, Effect::Bury { .. });
    world.seconds(30, |w| w.beat(1, |_| ()));
    assert_eq!(world.kept.len(), 1);
    world.seconds(5, |w| w.beat(1, |_| ()));
    assert_eq!(world.kept.len(), 2);
}

#[test]
fn who_does_not_answer_while_the_own_link_is_down_is_asked_again() {
    let mut world = World::new(2);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    world.audio("s", 1);
    world.kept.clear();
    testing::probe(&mut world.core, false, false, world.now);
    world.core.asked(&id("s"), 1, &worker("g0", "i"), silent(), world.now);
    world.run();
    assert!(world.kept.is_empty(), "not at once");
    world.seconds(1, |_| ());
    let asked = world.kept.pop();
    assert!(
        matches!(&asked, Some(Effect::Ask { worker: w, assignment }) if *w == worker("g0", "i") && assignment.epoch == 1),
        "{asked:?}"
    );
    world.seconds(4, |w| (0..2).for_each(|n| w.beat(n, |_| ())));
    world.kept.clear();
    world.core.asked(&id("s"), 1, &worker("g0", "i"), silent(), world.now);
    world.run();
    let asked = world.kept.pop();
    assert!(
        matches!(&asked, Some(Effect::Ask { worker: w, assignment }) if *w == worker("g1", "i") && assignment.epoch == 2),
        "with a good link that is the worker's own silence: {asked:?}"
    );
}

#[test]
fn what_a_failed_task_never_answered_is_begun_again() {
    for lost in [
        (|e| matches!(e, Effect::Load { .. })) as fn(&Effect) -> bool,
        |e| matches!(e, Effect::Save { .. }),
        |e| matches!(e, Effect::Ask { .. }),
    ] {
        let mut world = World::new(1);
        world.keep = lost;
        world.audio("s", 1);
        assert_eq!(world.kept.len(), 1);
        world.kept.clear();
        world.keep = |_| false;
        world.seconds(65, |w| {
            let taken = !w.assigned.is_empty();
            w.beat(0, |b| b.held.extend(taken.then(|| held("s", 1))));
        });
        assert_eq!((world.state("s"), world.assigned.len()), (SessionState::Assigned, 1));
    }
}

#[test]
fn last_heartbeats_are_written_down_in_turns() {
    let mut world = World::new(200);
    world.keep = |e| matches!(e, Effect::Note { .. });
    let beats = |w: &mut World| (0..200).for_each(|n| w.beat(n, |_| ()));
    world.seconds(9, beats);
    assert_eq!(world.kept.len(), 0);
    world.seconds(1, beats);
    assert_eq!(world.kept.len(), 128);
    world.seconds(1, beats);
    assert_eq!(world.kept.len(), 200);
    world.seconds(8, beats);
    assert_eq!(world.kept.len(), 200);
}

#[test]
fn a_key_that_somebody_else_wrote_is_read_again() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Note { .. } | Effect::Admit { .. });
    world.seconds(10, |w| w.beat(0, |_| ()));
    assert!(matches!(world.kept.pop(), Some(Effect::Note { .. })));
    world.core.noted(&worker("g0", "i"), Err(NoteError::Conflict));
    world.seconds(1, |w| w.beat(0, |_| ()));
    assert!(matches!(world.kept.pop(), Some(Effect::Admit { .. })));
    world.core.admitted(&worker("g0", "i"), Admission::Dead, world.now);
    world.run();
    assert!(matches!(world.kept.pop(), Some(Effect::Renew { .. })));
}

/// Of the first worker.
fn notes(e: &Effect) -> bool {
    matches!(e, Effect::Note { heartbeat, .. } if heartbeat.gpu_id.as_str() == "g0")
}

#[test]
fn a_heartbeat_on_its_way_to_the_key_does_not_fence_the_verdict_off() {
    let mut world = World::new(2);
    world.keep = |e| notes(e) || matches!(e, Effect::Bury { .. });
    world.seconds(9, |w| (0..2).for_each(|n| w.beat(n, |_| ())));
    let alone = |w: &mut World| w.beat(1, |_| ());
    world.seconds(1, alone);
    assert_eq!(world.kept(notes), 1, "its turn came before anybody could know");
    world.seconds(3, alone);
    assert_eq!(world.kept.len(), 1, "its key is being written");
    world.core.noted(&worker("g0", "i"), Ok(777));
    world.core.judge(world.now);
    world.run();
    assert!(matches!(world.kept.pop(), Some(Effect::Bury { revision: Some(777), .. })), "at the next look");
}

#[test]
fn the_last_heartbeat_of_a_silent_worker_is_not_written_down() {
    let mut world = World::new(2);
    world.keep = |e| notes(e) || matches!(e, Effect::Bury { .. });
    world.seconds(8, |w| (0..2).for_each(|n| w.beat(n, |_| ())));
    world.seconds(3, |w| w.beat(1, |_| ()));
    assert_eq!(world.kept(notes), 0);
    assert!(matches!(world.kept.pop(), Some(Effect::Bury { .. })), "three seconds after its last one");
}

#[test]
fn a_wish_to_drain_waits_for_the_key() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Note { .. });
    world.seconds(10, |w| w.beat(0, |_| ()));
    assert!(matches!(world.kept.pop(), Some(Effect::Note { drain_until_ms: None, .. })));
    let request = voxfleet_schema::fleet::DrainRequest { gpu_id: worker("g0", "i").gpu_id, deadline_ms: None };
    world.core.drain(CallId(1), &request, world.now);
    world.run();
    assert!(world.kept.is_empty(), "not two at once");
    world.core.noted(&worker("g0", "i"), Ok(7));
    world.seconds(1, |w| w.beat(0, |_| ()));
    assert!(matches!(world.kept.pop(), Some(Effect::Note { drain_until_ms: Some(_), revision: 7, .. })));
}
