//! The engine of a session that may not change it: kept over finals that name none, and by successors.

use voxfleet_schema::{fleet::EngineName, session::Policy};

use super::*;
use crate::{routing::Refusal, sessions::Asked};

fn options(policy: Policy) -> SessionOptions {
    SessionOptions { model: Some("small".to_owned()), policy, ..SessionOptions::default() }
}

fn final_by(engine: &str, index: u64) -> Final {
    Final { engine: engine.to_owned(), end: false, ..end_final("s", index, 1, index + 1) }
}

/// A world with one worker that has the session.
fn opened(policy: Policy) -> World {
    let mut world = World::new(1);
    world.ask(1, "s", Asked::Open(Box::new(options(policy)), None));
    assert_eq!(world.state("s"), SessionState::Assigned, "{:?}", world.answers);
    world
}

fn holds(world: &mut World) {
    world.beat(0, |b| b.held = vec![held("s", 1)]);
}

fn heard(world: &mut World, engine: &str, index: u64) {
    world.core.finished(&final_by(engine, index), world.now);
    world.run();
    world.seconds(2, holds);
}

fn revision(world: &World) -> Option<u64> {
    world.core.book.session(&id("s")).expect("a session").revision
}

#[test]
fn a_key_says_the_engine_once_and_its_worker_is_not_asked_again() {
    for (policy, says) in [(Policy::ExactModel, Some("simulated")), (Policy::AllowCpu, None)] {
        let mut world = opened(policy);
        let opened = (revision(&world), world.record("s").changed_ms);
        world.seconds(2, holds);
        assert_eq!((revision(&world), world.record("s").engine.as_deref()), (opened.0, None), "nothing is known");
        heard(&mut world, "simulated", 0);
        let noted = revision(&world);
        assert_eq!((noted != opened.0, world.record("s").engine.as_deref()), (says.is_some(), says), "{policy:?}");
        for (index, engine) in [(1, "simulated"), (2, "none"), (3, "simulated")] {
            heard(&mut world, engine, index);
        }
        assert_eq!((revision(&world), world.record("s").engine.as_deref()), (noted, says), "{policy:?}");
        assert_eq!((world.assigned.len(), world.told(What::Assigned), world.record("s").changed_ms), (1, 1, opened.1));
    }
}

#[test]
fn an_open_that_comes_while_the_engine_is_written_is_answered() {
    let mut world = opened(Policy::ExactModel);
    world.keep = |e| matches!(e, Effect::Save { .. });
    heard(&mut world, "simulated", 0);
    assert_eq!(world.kept(|e| matches!(e, Effect::Save { .. })), 1);
    world.ask(2, "s", Asked::Open(Box::new(options(Policy::ExactModel)), None));
    assert_eq!(world.answers.len(), 1);
    world.answer_kept();
    assert!(matches!(world.answers.last(), Some((CallId(2), Answer::Opened(o))) if o.epoch == 1));
    assert_eq!(world.assigned.len(), 1);
}

#[test]
fn a_bucket_that_is_full_is_left_alone_for_a_while() {
    let saves: fn(&Effect) -> bool = |e| matches!(e, Effect::Save { .. });
    let mut world = opened(Policy::ExactModel);
    let stands = (world.record("s").clone(), revision(&world).expect("written"));
    world.keep = |e| matches!(e, Effect::Save { .. } | Effect::Load { .. });
    heard(&mut world, "simulated", 0);
    assert_eq!(world.kept(saves), 1);
    world.kept.clear();
    world.core.saved(&id("s"), Err(SaveError::Failed("no space".to_owned())), world.now);
    world.seconds(3, holds);
    assert!(world.kept.iter().any(|e| matches!(e, Effect::Load { .. })), "{:?}", world.kept);
    world.core.loaded(&id("s"), Ok(Loaded { record: Some(stands), ..Loaded::default() }), world.now);
    world.run();
    world.kept.clear();
    world.seconds(50, holds);
    assert_eq!(world.kept(saves), 0);
    world.seconds(10, holds);
    assert_eq!(world.kept(saves), 1);
}

/// The key as a predecessor left it, the engine that the last final names, and what the session keeps. The worker that had it is
/// dead, and the only other one has another engine.
#[test]
fn a_successor_knows_the_engine_that_the_last_final_does_not_name() {
    for (key, last, kept) in [
        (Some("simulated"), "none", Some(EngineName::Simulated)),
        (Some("ct2"), "simulated", Some(EngineName::Simulated)),
        (None, "simulated", Some(EngineName::Simulated)),
        (None, "none", None),
        (Some("of_tomorrow"), "none", None),
    ] {
        let mut world = World::new(0);
        let ct2 = |b: &mut Heartbeat| b.engine.kind = "ct2".to_owned();
        world.beat(0, ct2);
        let gone = worker("gone", "i");
        let record = SessionRecord {
            state: SessionState::Assigned,
            options: options(Policy::ExactModel),
            epoch: 1,
            worker: Some(gone.clone()),
            engine: key.map(str::to_owned),
            ..world_record("s")
        };
        let chain = Some(ChainMark::from(&final_by(last, 4)));
        world.core.recover(Loaded { record: Some((record, 1)), chain, last: Some((9, true)) }, world.now);
        let verdict = FleetKey { worker: gone, revision: 7, dead_ms: Some(0), device: None };
        world.core.recover_fleet(vec![verdict], world.now);
        let engine = world.core.book.session(&id("s")).expect("recovered").engine();
        assert_eq!(engine, kept, "{key:?} {last}");
        // What its finals named is written down first, where the key says something else.
        for _ in 0..2 {
            world.core.tick(world.now);
            world.run();
        }
        if kept.is_none() {
            assert_eq!(world.assigned, [("s".to_owned(), "g0".to_owned(), 2)], "{key:?} {last}");
            assert_eq!(world.record("s").engine.as_deref(), key, "what a newer version wrote stays");
            continue;
        }
        assert_eq!(world.state("s"), SessionState::Waiting, "{key:?} {last}");
        assert_eq!(world.record("s").engine.as_deref(), Some("simulated"), "{key:?} {last}");
        world.ask(1, "s", Asked::Status);
        let Some((_, Answer::Status(status))) = world.answers.last() else { panic!("{:?}", world.answers) };
        assert_eq!(status.candidates[0]["refused"], Refusal::OtherEngine.as_str(), "{}", status.candidates);
        world.beat(1, |_| ());
        assert_eq!(world.assigned, [("s".to_owned(), "g1".to_owned(), 2)], "{key:?} {last}");
    }
}

#[test]
fn a_session_that_ended_goes_on_with_its_engine() {
    let mut world = opened(Policy::ExactModel);
    world.audio("s", 1);
    heard(&mut world, "simulated", 0);
    world.entry("s", 3, &[("Asr-End", "1")], b"");
    let end = Final { engine: "none".to_owned(), ..end_final("s", 1, 1, 3) };
    world.core.finished(&end, world.now);
    world.run();
    let ended = world.record("s").clone();
    assert_eq!((ended.state, ended.engine.as_deref()), (SessionState::Ended, Some("simulated")));

    let mut successor = World::new(0);
    successor.beat(0, |b| b.engine.kind = "ct2".to_owned());
    successor.keep = |e| matches!(e, Effect::Load { .. });
    successor.beat(1, |_| ());
    successor.ask(1, "s", Asked::Open(Box::new(options(Policy::ExactModel)), None));
    let loaded = Loaded { record: Some((ended, 5)), chain: Some(ChainMark::from(&end)), last: Some((3, false)) };
    successor.core.loaded(&id("s"), Ok(loaded), successor.now);
    successor.run();
    assert_eq!(successor.assigned, [("s".to_owned(), "g1".to_owned(), 2)]);
}
