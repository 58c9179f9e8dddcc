//! Full buckets, lagging replicas, refusals, audio that expires.

use voxfleet_nats::topology::Usage;
use voxfleet_schema::{fleet::Residency, session::Policy};

use super::*;
use crate::testing::model;

#[test]
fn a_bucket_that_refuses_at_once_is_asked_again_after_a_pause() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Save { .. });
    world.audio("s", 1);
    let mut attempts = 0;
    for _ in 0..20 {
        let saves = |effect: &Effect| matches!(effect, Effect::Save { .. });
        for effect in world.kept.drain(..).collect::<Vec<_>>() {
            attempts += usize::from(saves(&effect));
            // An answer that nobody waits for any more changes nothing.
            world.core.saved(&id("s"), Err(SaveError::Failed("bucket is full".to_owned())), world.now);
            world.run();
        }
        world.seconds(1, |w| w.beat(0, |_| ()));
    }
    assert!((5..=12).contains(&attempts), "{attempts} writes in 20 s");
    world.keep = |_| false;
    world.answer_kept();
    world.seconds(3, |w| w.beat(0, |_| ()));
    assert_eq!(world.state("s"), SessionState::Assigned);
}

#[test]
fn an_open_that_could_not_be_written_takes_no_slot() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Save { .. });
    for (call, name) in [(1, "a"), (2, "b"), (3, "c"), (4, "d")] {
        world.open(call, name);
    }
    for effect in std::mem::take(&mut world.kept) {
        let Effect::Save { id, .. } = effect else { panic!("{effect:?}") };
        world.core.saved(&id, Err(SaveError::Failed("bucket is full".to_owned())), world.now);
    }
    world.seconds(3, |w| w.beat(0, |_| ()));
    for call in 1..=4 {
        let answer = world.answers.iter().find(|(c, _)| *c == CallId(call)).map(|(_, a)| a.clone());
        assert_eq!(refused(answer), FailureClass::Timeout, "whoever asked hears of it");
    }
    assert!(world.kept.is_empty(), "nobody writes for callers that were sent away: {:?}", world.kept);
    world.keep = |_| false;
    assert!(matches!(world.open(5, "a"), Some(Answer::Opened(_))), "there is room");
}

#[test]
fn a_full_log_is_named_and_not_written_to_each_second() {
    let mut world = World::new(1);
    world.audio("s", 1);
    let appends = |e: &Effect| matches!(e, Effect::Append { .. });
    let beats = |w: &mut World| w.beat(0, |b| b.held = vec![held("s", 1)]);
    world.seconds(4, beats);
    assert_eq!(world.kept(appends), 1);
    world.core.appended(&id("s"), Mark::Pause, Err(AppendError::Full), world.now);
    world.kept.clear();
    world.seconds(9, beats);
    assert_eq!(world.kept(appends), 0);
    world.seconds(3, beats);
    assert_eq!(world.kept(appends), 1, "again, there may be room");
    world.core.appended(&id("s"), Mark::Close(CallId(7)), Err(AppendError::Full), world.now);
    world.run();
    let Some((CallId(7), Answer::Refused(failure))) = world.answers.last() else { panic!("{:?}", world.answers) };
    assert_eq!((failure.class, failure.retry_after_ms), (FailureClass::NoCapacity, Some(1_000)));
    assert!(failure.message.contains("full"));
}

#[test]
fn a_move_is_told_once_also_by_a_successor() {
    let mut world = World::new(1);
    let record = SessionRecord {
        state: SessionState::Assigned,
        epoch: 4,
        worker: Some(worker("g0", "i")),
        displaced_from: Some(worker("gone", "i")),
        ..world_record("s")
    };
    world.core.recover(Loaded { record: Some((record, 9)), last: Some((5, true)), ..Loaded::default() }, world.now);
    world.run();
    world.seconds(3, |w| w.beat(0, |b| b.held = vec![held("s", 4)]));
    // It lost the session, and is asked again.
    world.seconds(3, |w| w.beat(0, |_| ()));
    assert_eq!(world.assigned.last().map(|a| a.2), Some(4));
    assert_eq!(world.told(What::Moved), 0, "that was told long ago");
}

#[test]
fn nobody_overtakes_who_waits_longer() {
    let mut world = World::new(1);
    for n in 1..=4 {
        world.audio(&format!("s{n}"), n);
    }
    for (seq, name) in [(5, "first"), (6, "second")] {
        world.audio(name, seq);
        assert_eq!(world.state(name), SessionState::Waiting);
    }
    // A slot comes free, and before anything else is looked at somebody asks for one that waits behind another.
    world.core.heartbeat(
        Heartbeat { seq: 1, slots: voxfleet_schema::fleet::Slots { total: 5, used: 0 }, ..testing::beat("g0", "i") },
        world.now,
    );
    world.ask(2, "second", crate::sessions::Asked::Open(Box::new(world.record("second").options.clone()), None));
    assert_eq!((world.state("first"), world.state("second")), (SessionState::Assigned, SessionState::Waiting));
    assert!(matches!(world.answers.last(), Some((CallId(2), Answer::Refused(_)))));
}

/// A session whose end final stands at 2 and whose entry 3 no walk finds; the first walk is under way.
fn unseen_behind_the_end(world: &mut World) {
    world.audio("s", 1);
    world.entry("s", 2, &[("Asr-End", "1")], b"");
    world.audio("s", 3);
    world.core.finished(&end_final("s", 0, 1, 2), world.now);
    world.run();
    assert!(matches!(world.kept.pop(), Some(Effect::Walk { .. })));
}

fn found_nothing(world: &mut World, last: Option<u64>) {
    let walker = Box::new(Walker::after(&end_final("s", 0, 1, 2)));
    let end = WalkEnd { walker, opener: None, rejected: Vec::new(), last };
    world.core.walked(&id("s"), Ok(end), world.now);
    world.run();
}

#[test]
fn an_entry_the_walk_cannot_see_is_looked_for_at_the_pace_of_the_tick() {
    let mut world = World::new(1);
    unseen_behind_the_end(&mut world);
    for _ in 0..5 {
        found_nothing(&mut world, Some(3));
        assert_eq!(world.kept(|e| matches!(e, Effect::Walk { .. })), 0, "not at once");
        world.seconds(1, |w| w.beat(0, |b| b.held = vec![held("s", 1)]));
        assert!(matches!(world.kept.pop(), Some(Effect::Walk { .. })));
    }
    assert_eq!(world.state("s"), SessionState::Assigned);
}

#[test]
fn an_entry_that_expired_behind_the_end_keeps_nothing_open() {
    let mut world = World::new(1);
    unseen_behind_the_end(&mut world);
    found_nothing(&mut world, None);
    assert_eq!(world.state("s"), SessionState::Ended);
}

#[test]
fn what_the_tail_reads_during_the_walk_outlives_what_the_leader_said_before() {
    let mut world = World::new(1);
    unseen_behind_the_end(&mut world);
    world.audio("s", 4);
    found_nothing(&mut world, None);
    assert_eq!(world.state("s"), SessionState::Assigned, "entry 4 has not been looked at");
}

#[test]
fn a_refused_reopening_changes_nothing() {
    let mut world = World::new(1);
    world.audio("s", 1);
    world.entry("s", 2, &[("Asr-End", "1")], b"");
    world.core.finished(&end_final("s", 0, 1, 2), world.now);
    world.run();
    let before = world.record("s").clone();
    assert!(before.implicit && before.state == SessionState::Ended);
    let options = SessionOptions { model: Some("nothing".to_owned()), ..SessionOptions::default() };
    world.ask(1, "s", crate::sessions::Asked::Open(Box::new(options), None));
    assert_eq!(refused(world.answers.pop().map(|(_, a)| a)), FailureClass::ModelMissing);
    assert_eq!(*world.record("s"), before);
}

#[test]
fn a_smaller_model_is_what_the_worker_is_told_and_the_record_keeps_what_was_asked() {
    let mut world = World::new(0);
    world.beat(0, |b| {
        b.models = vec![model("medium", Residency::Available, 30_000), model("base", Residency::Available, 388)]
    });
    world.keep = |e| matches!(e, Effect::Ask { .. });
    let options = SessionOptions { model: Some("medium".to_owned()), ..SessionOptions::default() };
    world.ask(1, "s", crate::sessions::Asked::Open(Box::new(options.clone()), None));
    let Some(Effect::Ask { worker, assignment }) = world.kept.pop() else { panic!("asked") };
    assert_eq!(assignment.options, SessionOptions { model: Some("base".to_owned()), ..options.clone() });
    world.core.asked(&id("s"), 1, &worker, AskReply::Taken, world.now);
    world.run();
    assert_eq!(world.record("s").options, options);
    assert_eq!(assignment.model_asked.as_deref(), Some("medium"));
    for (what, asked) in [(What::Assigned, "model_asked"), (What::Degraded, "asked")] {
        let event = world.told.iter().find(|e| e.what == what).expect("told");
        assert_eq!((&event.detail["model"], &event.detail[asked]), (&"base".into(), &"medium".into()));
    }
    world.ask(2, "s", crate::sessions::Asked::Open(Box::new(options), None));
    assert!(matches!(world.answers.last(), Some((CallId(2), Answer::Opened(_)))), "asking again says the same");
}

#[test]
fn refusals_of_an_open_say_what_is_missing() {
    let ask = |world: &mut World, model: &str| {
        let options =
            SessionOptions { model: Some(model.to_owned()), policy: Policy::ExactModel, ..SessionOptions::default() };
        world.ask(1, "new", crate::sessions::Asked::Open(Box::new(options), None));
        refused(world.answers.pop().map(|(_, a)| a))
    };
    let mut world = World::new(0);
    assert_eq!(ask(&mut world, "small"), FailureClass::NoWorkers);
    world.beat(0, |b| b.models.push(model("large", Residency::Available, 30_000)));
    assert_eq!(ask(&mut world, "nothing"), FailureClass::ModelMissing);
    assert_eq!(ask(&mut world, "large"), FailureClass::ModelDoesNotFit);
    for n in 0..4 {
        world.audio(&format!("s{n}"), n + 1);
    }
    assert_eq!(ask(&mut world, "small"), FailureClass::NoCapacity);
    assert_eq!(ask(&mut world, "nothing"), FailureClass::ModelMissing, "a full fleet has it no more");
}

fn close_chains(effect: &Effect) -> bool {
    matches!(effect, Effect::CloseChain { .. })
}

#[test]
fn a_waiting_session_is_told_before_its_audio_expires_and_closed_once_it_has() {
    let mut world = World::new(0);
    world.audio("s", 5);
    world.entry("s", 6, &[("Asr-Flush", "1"), ("Asr-Cause", "pause")], b"");
    world.core.oldest(1);
    world.seconds(3_290, |_| ());
    assert_eq!(world.told(What::Failed), 0);
    world.seconds(20, |_| ());
    assert_eq!(world.told(What::Failed), 1);
    world.core.oldest(6);
    world.seconds(300, |_| ());
    assert_eq!((world.told(What::Failed), world.kept(close_chains)), (1, 0), "once; and one entry is left");
    world.core.oldest(7);
    world.seconds(20, |_| ());
    assert_eq!(world.kept(close_chains), 1, "one attempt at a time");
    world.kept.retain(close_chains);
    let Some(Effect::CloseChain { epoch: 0, to_seq: 6, .. }) = world.kept.pop() else { panic!("{:?}", world.kept) };
    world.core.chain_read(&id("s"), Some(ChainMark::from(&end_final("s", 0, 0, 6))), world.now);
    world.run();
    assert_eq!((world.state("s"), world.record("s").ended_seq), (SessionState::Ended, Some(6)));
    assert!(world.core.waiting.is_empty());
}

#[test]
fn a_session_that_found_room_is_not_failing() {
    let mut world = World::new(0);
    world.audio("s", 5);
    world.core.oldest(1);
    world.seconds(100, |_| ());
    world.beat(0, |_| ());
    assert_eq!(world.state("s"), SessionState::Assigned);
    world.core.oldest(100);
    world.seconds(3_600, |w| w.beat(0, |b| b.held = vec![held("s", 1)]));
    assert_eq!((world.told(What::Failed), world.kept(close_chains)), (0, 0));
}

#[test]
fn a_stream_that_fills_is_told_once_per_crossing() {
    let mut world = World::new(0);
    let told: Vec<usize> = [79, 81, 90, 76, 81, 74, 81]
        .into_iter()
        .map(|bytes| {
            let usage =
                |stream: &str| Usage { stream: stream.to_owned(), messages: 1, bytes, max_bytes: 100, consumers: 0 };
            world.core.usage(&[usage("ASR_AUDIO"), usage("ASR_EVENT")], world.now);
            world.run();
            world.told(What::StreamFilling)
        })
        .collect();
    assert_eq!(told, [0, 1, 1, 1, 1, 1, 2]);
    assert!(world.told.iter().all(|e| e.id == "ASR_AUDIO"), "one that drops what is old is full by nature");
}

#[test]
fn beyond_the_limit_new_sessions_wait_in_the_log_in_their_order() {
    let mut world = World::new(0);
    world.core.config.max_sessions = 2;
    for (seq, session) in [(1, "a"), (2, "b"), (3, "c"), (4, "d"), (5, "c")] {
        world.audio(session, seq);
    }
    assert_eq!((world.core.book.len(), world.core.cursor()), (2, 2));
    assert_eq!(world.told(What::Waiting), 3, "said once of all that are passed over");
    assert_eq!(refused(world.open(1, "new")), FailureClass::NoCapacity);
    let beats = |w: &mut World| w.beat(0, |b| b.held = vec![held("b", 1)]);
    beats(&mut world);
    world.entry("a", 6, &[("Asr-End", "1")], b"");
    world.core.finished(&end_final("a", 0, 1, 6), world.now);
    world.run();
    assert_eq!(world.state("a"), SessionState::Ended);
    world.seconds(1, beats);
    let Some(Effect::GoBack { from: 3 }) = world.kept.pop() else { panic!("{:?}", world.kept) };
    assert_eq!(world.core.cursor(), 2, "until they are read again");
    for (seq, session) in [(3, "c"), (4, "d"), (5, "c"), (6, "a")] {
        let (payload, end): (&'static [u8], &[(&str, &str)]) =
            if seq == 6 { (b"", &[("Asr-End", "1")]) } else { (b"ab", &[]) };
        world.entry(session, seq, end, payload);
    }
    assert_eq!(world.state("c"), SessionState::Assigned);
    assert!(world.core.book.session(&id("d")).is_none());
    assert_eq!(world.core.cursor(), 3, "d has its turn later");
}

#[test]
fn audio_that_comes_before_the_key_of_an_asked_for_session_is_read_again_by_a_successor() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Save { .. });
    world.open(1, "s");
    world.audio("s", 1);
    assert_eq!(world.core.cursor(), 0, "nothing of it is written");
    world.keep = |_| false;
    world.answer_kept();
    assert_eq!((world.state("s"), world.core.cursor()), (SessionState::Assigned, 1));
}

#[test]
fn audio_that_comes_while_an_ended_session_is_opened_again_is_read_again_by_a_successor() {
    let mut world = World::new(1);
    world.audio("s", 1);
    world.entry("s", 2, &[("Asr-End", "1")], b"");
    world.core.finished(&end_final("s", 0, 1, 2), world.now);
    world.run();
    world.keep = |e| matches!(e, Effect::Save { .. });
    world.open(1, "s");
    world.audio("s", 3);
    assert_eq!(world.core.cursor(), 2, "its key says that it has ended");
    world.keep = |_| false;
    world.answer_kept();
    assert_eq!((world.state("s"), world.core.cursor()), (SessionState::Assigned, 3));
}

#[test]
fn audio_behind_an_end_is_read_again_until_this_dispatcher_has_written_the_key() {
    let mut world = World::new(1);
    world.audio("s", 1);
    world.entry("s", 2, &[("Asr-End", "1")], b"");
    world.keep = |e| matches!(e, Effect::Save { .. } | Effect::Walk { .. });
    // As after a takeover: the end stands, and a predecessor may have sent `ended`.
    let session = world.core.book.session_mut(&id("s")).expect("known");
    session.chain = Some(ChainMark::from(&end_final("s", 0, 1, 2)));
    world.audio("s", 3);
    assert_eq!(world.core.cursor(), 2);
    world.core.tick(world.now);
    world.run();
    assert!(matches!(world.kept.pop(), Some(Effect::Walk { .. })));
    let walker = Box::new(Walker::after(&end_final("s", 0, 1, 2)));
    let opener = Some(Opener { seq: 3, options: None, source: None, trace: None });
    world.core.walked(&id("s"), Ok(WalkEnd { walker, opener, rejected: Vec::new(), last: None }), world.now);
    world.run();
    assert_eq!(world.core.cursor(), 2);
    world.answer_kept();
    assert_eq!((world.record("s").epoch, world.core.cursor()), (2, 3));
}

#[test]
fn audio_behind_an_end_that_a_predecessor_wrote_late_goes_on() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Save { .. } | Effect::Walk { .. } | Effect::Load { .. });
    // The end final stands, audio came behind it, and the last entry is somebody's close.
    let record =
        SessionRecord { state: SessionState::Assigned, epoch: 1, worker: Some(worker("g0", "i")), ..world_record("s") };
    let chain = Some(ChainMark::from(&end_final("s", 0, 1, 2)));
    let loaded = Loaded { record: Some((record.clone(), 1)), chain, last: Some((4, false)) };
    world.core.recover(loaded, world.now);
    world.run();
    let walked = |world: &mut World| {
        assert!(matches!(world.kept.pop(), Some(Effect::Walk { .. })), "{:?}", world.kept);
        let walker = Box::new(Walker::after(&end_final("s", 0, 1, 2)));
        let opener = Some(Opener { seq: 3, options: None, source: None, trace: None });
        world.core.walked(&id("s"), Ok(WalkEnd { walker, opener, rejected: Vec::new(), last: None }), world.now);
        world.run();
    };
    walked(&mut world);
    assert!(matches!(world.kept.pop(), Some(Effect::Save { .. })));
    world.core.saved(&id("s"), Err(SaveError::Conflict), world.now);
    world.run();
    assert!(matches!(world.kept.pop(), Some(Effect::Load { .. })));
    let ended = SessionRecord { state: SessionState::Ended, ended_seq: Some(2), ..record };
    world.core.loaded(&id("s"), Ok(Loaded { record: Some((ended, 2)), ..Loaded::default() }), world.now);
    world.run();
    walked(&mut world);
    world.keep = |_| false;
    world.answer_kept();
    assert_eq!((world.state("s"), world.record("s").epoch), (SessionState::Assigned, 2));
}
