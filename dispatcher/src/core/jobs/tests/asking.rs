//! What is asked, told, refused and kept.

use super::*;

#[test]
fn a_job_is_written_before_it_is_told_and_given_out() {
    let mut world = World::new(1);
    world.submit(1, "a");
    assert!(world.answers.is_empty() && world.told(What::Submitted) == 0);
    world.run();
    assert!(matches!(world.answer(1), Some(Answer::Submitted(s)) if s.state == JobState::Queued));
    assert_eq!((world.state("a"), world.key("a").epoch, world.key("a").attempts), (JobState::Assigned, 1, 1));
    assert_eq!(world.stored.work.get(&(worker("g0", "i"), id("a"))), Some(&1));
    let whats: Vec<_> = world.told.iter().filter(|e| e.scope == Scope::Job).map(|e| e.what).collect();
    assert_eq!(whats, [What::Submitted, What::Assigned]);
    world.submit(2, "b");
    world.run();
    assert_eq!((world.state("b"), world.told(What::Waiting)), (JobState::Queued, 1), "one slot");
}

#[test]
fn the_end_of_the_chain_ends_it_and_frees_the_slot() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.submit(2, "b");
    world.run();
    world.store(&id("a"), 1, done());
    let mark = world.stored.last(&id("a"));
    world.core.job(JobInput::Chain { id: id("a"), mark }, world.now);
    world.run();
    assert_eq!((world.state("a"), world.key("a").duration_ms), (JobState::Done, Some(2_000)));
    assert_eq!(world.told(What::Done), 1);
    assert!(world.released.iter().any(|(_, job, epoch)| *job == id("a") && *epoch == 1));
    assert_eq!(world.state("b"), JobState::Assigned);
    assert!(world.core.jobs.book.job(&id("a")).is_none(), "ended ones are not kept");
}

#[test]
fn a_missed_end_is_found_by_the_heartbeat() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.store(&id("a"), 1, done());
    world.seconds(3, |w| {
        w.beat(0, |b| b.held = vec![Held { final_index: Some(0), ..holds_job("a", 1) }]);
    });
    assert_eq!(world.state("a"), JobState::Done);
}

#[test]
fn asking_again_is_answered_and_another_request_is_refused() {
    let mut world = World::new(0);
    world.submit(1, "a");
    world.submit(2, "a");
    let other = Submission { name: Some("other".to_owned()), ..*submission("a") };
    world.core.job(JobInput::Submit { call: CallId(3), submission: Ok(Box::new(other)) }, world.now);
    world.run();
    for call in [1, 2] {
        assert!(matches!(world.answer(call), Some(Answer::Submitted(_))), "{call}");
    }
    assert!(matches!(world.answer(3), Some(Answer::Refused(f)) if f.class == FailureClass::BadRequest));
    assert_eq!((world.told(What::Submitted), world.stored.revision), (1, 1));
    world.core.ask_status(CallId(4), JobQuery { job: id("ghost") }, world.now);
    world.run();
    assert!(matches!(world.answer(4), Some(Answer::Refused(f)) if f.class == FailureClass::NotFound));
    world.core.ask_status(CallId(5), JobQuery { job: id("a") }, world.now);
    world.run();
    let Some(Answer::Job(status)) = world.answer(5) else { panic!("{:?}", world.answers) };
    assert_eq!((status.ahead, status.record.state), (Some(0), JobState::Queued));
    assert!(status.why.as_ref().is_some_and(|why| why.contains("no_workers")));
}

#[test]
fn what_cannot_be_stored_is_refused_and_forgotten() {
    let mut world = World::new(0);
    let mut submission = submission("a");
    submission.recording = Some(Recording { bytes: bytes::Bytes::from_static(b"x"), paid: None });
    world.core.job(JobInput::Submit { call: CallId(1), submission: Ok(submission) }, world.now);
    world.gather();
    world.carry_out(0);
    let Some(Effect::Job(JobEffect::Put { .. })) = world.open.pop() else { panic!("the recording comes first") };
    world.core.job(JobInput::Put { id: id("a"), result: Err(PutError::Full) }, world.now);
    world.run();
    let full = |answer: Option<&Answer>| matches!(answer, Some(Answer::Refused(f)) if f.class == FailureClass::NoCapacity && f.retry_after_ms.is_some());
    assert!(full(world.answer(1)));
    world.submit(2, "b");
    world.carry_out(0);
    world.open.clear();
    world.core.job(JobInput::Saved { id: id("b"), result: Err(JobSaveError::Full) }, world.now);
    world.run();
    assert!(full(world.answer(2)));
    assert!(world.core.jobs.book.is_empty());
}

#[test]
fn a_write_whose_answer_was_lost_is_looked_up() {
    let mut world = World::new(0);
    world.submit(1, "a");
    world.carry_out(0);
    let Some(Effect::Job(save @ JobEffect::Save { .. })) = world.open.pop() else { panic!("a write") };
    world.serve(save);
    world.core.job(JobInput::Saved { id: id("a"), result: Err(JobSaveError::Failed("timeout".to_owned())) }, world.now);
    world.seconds(3, |_| ());
    assert!(matches!(world.answer(1), Some(Answer::Submitted(_))));
    assert_eq!(world.told(What::Submitted), 1);
}

#[test]
fn a_cancel_whose_write_was_lost_is_tried_again() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.core.ask_cancel(CallId(2), JobQuery { job: id("a") }, world.now);
    world.gather();
    let Some(Effect::Job(JobEffect::Save { .. })) = world.open.pop() else { panic!("a write") };
    world.core.job(JobInput::Saved { id: id("a"), result: Err(JobSaveError::Failed("timeout".to_owned())) }, world.now);
    world.run();
    assert!(world.answer(2).is_none() && world.state("a") == JobState::Assigned);
    world.seconds(4, |w| w.beat(0, |_| ()));
    assert_eq!(world.state("a"), JobState::Cancelled);
    assert!(matches!(world.answer(2), Some(Answer::Job(s)) if s.record.state == JobState::Cancelled));
}

#[test]
fn what_was_lost_at_the_end_is_answered_as_it_stands() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.core.ask_cancel(CallId(2), JobQuery { job: id("a") }, world.now);
    world.gather();
    world.carry_out(0);
    let close = world.open.iter().position(|e| matches!(e, Effect::Job(JobEffect::Close { .. }))).expect("a close");
    world.open.remove(close);
    world.core.job(JobInput::Closed { id: id("a"), result: Err("timeout".to_owned()) }, world.now);
    world.gather();
    assert!(matches!(world.answer(2), Some(Answer::Job(s)) if s.record.state == JobState::Closing));
}

#[test]
fn what_is_told_has_no_signature() {
    let mut world = World::new(0);
    let body = br#"{"job":"a","audio":"https://audio.example/a.wav?X-Amz-Signature=s"}"#;
    let submission = Box::new(Submission::read(body, None, None, None).expect("a request"));
    world.core.job(JobInput::Submit { call: CallId(1), submission: Ok(submission) }, world.now);
    world.run();
    world.core.ask_status(CallId(2), JobQuery { job: id("a") }, world.now);
    world.core.ask_cancel(CallId(3), JobQuery { job: id("a") }, world.now);
    world.run();
    world.core.ask_status(CallId(4), JobQuery { job: id("a") }, world.now);
    world.run();
    for call in 2..=4 {
        let Some(Answer::Job(status)) = world.answer(call) else { panic!("{call}: {:?}", world.answers) };
        assert_eq!(status.record.audio, "https://audio.example/a.wav", "{call}");
    }
    assert!(world.key("a").audio.ends_with("=s"), "its worker needs it");
}

#[test]
fn too_many_lists_are_refused() {
    let mut world = World::new(0);
    world.core.job(JobInput::Listed { call: CallId(1), result: Err(ListError::Busy) }, world.now);
    world.run();
    let busy = |f: &Failure| f.class == FailureClass::NoCapacity && f.retry_after_ms.is_some();
    assert!(matches!(world.answer(1), Some(Answer::Refused(f)) if busy(f)));
}

#[test]
fn a_bucket_that_is_filling_takes_no_new_jobs() {
    let mut world = World::new(0);
    world.submit(1, "a");
    world.run();
    let usage = |percent: u64| voxfleet_nats::topology::Usage {
        stream: "KV_asr_jobs".to_owned(),
        messages: 1,
        bytes: percent,
        max_bytes: 100,
        consumers: 0,
    };
    for (percent, takes) in [(80, true), (81, false), (76, false), (75, true)] {
        world.core.usage(&[usage(percent)], world.now);
        assert_eq!(world.core.takes_jobs(), takes, "{percent}");
    }
    world.core.usage(&[usage(90)], world.now);
    world.submit(2, "b");
    world.submit(3, "a");
    world.run();
    assert!(matches!(world.answer(2), Some(Answer::Refused(f)) if f.class == FailureClass::NoCapacity));
    assert!(matches!(world.answer(3), Some(Answer::Submitted(_))), "what is known is answered");
}

#[test]
fn a_job_that_failed_is_told_even_when_nothing_can_be_kept_of_it() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.pass(Duration::from_secs(1));
    world.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::BadAudio));
    world.core.tick(world.now);
    world.gather();
    while !matches!(world.open.first(), Some(Effect::Job(JobEffect::Close { .. }))) {
        world.carry_out(0);
    }
    let Effect::Job(close) = world.open.remove(0) else { panic!("a close") };
    let Some(JobInput::Closed { id, result: Ok(end) }) = world.serve(close) else { panic!("an end") };
    world.core.job(JobInput::Closed { id, result: Ok(ChainEnd { not_kept: true, ..end }) }, world.now);
    world.run();
    assert_eq!(world.state("a"), JobState::Failed);
    let told = world.told.iter().find(|e| e.what == What::Failed).expect("told");
    assert_eq!(told.detail["not_kept"], NOT_KEPT);
}

#[test]
fn a_broken_worker_does_not_get_every_try() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    assert_eq!(world.key("a").worker, Some(worker("g0", "i")));
    world.seconds(3, |w| {
        w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::EngineCrash));
        w.beat(1, |_| ());
    });
    assert_eq!((world.key("a").worker.clone(), world.key("a").attempts), (Some(worker("g1", "i")), 2));
    world.seconds(10, |w| {
        w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::EngineCrash));
        w.beat(1, |b| b.given_up = given_up("a", 2, FailureClass::EngineCrash));
    });
    assert_eq!(world.key("a").attempts, 3, "where nobody else is left it may");
}

#[test]
fn poison_goes_to_two_workers_and_not_round_the_fleet() {
    let mut world = World::new(5);
    world.submit(1, "a");
    world.run();
    let mut met = Vec::new();
    for _ in 0..40 {
        let record = world.key("a");
        if record.state == JobState::Assigned && met.last() != Some(&(record.worker.clone(), record.epoch)) {
            met.push((record.worker.clone(), record.epoch));
        }
        let met = met.clone();
        world.seconds(1, |w| {
            for n in 0..5 {
                let name = Some(worker(&format!("g{n}"), "i"));
                let crashed = met.iter().rev().find(|(who, _)| *who == name);
                let given_up = crashed.map(|(_, epoch)| given_up("a", *epoch, FailureClass::EngineCrash));
                w.beat(n, |b| b.given_up = given_up.unwrap_or_default());
            }
        });
    }
    assert_eq!((world.state("a"), met.len()), (JobState::Failed, 3), "{met:?}");
    met.sort_by_key(|(who, _)| who.as_ref().map(ToString::to_string));
    met.dedup_by_key(|(who, _)| who.clone());
    assert_eq!(met.len(), 2, "{met:?}");
}

#[test]
fn what_one_worker_may_not_fetch_another_may() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    world.seconds(2, |w| {
        w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::Forbidden));
        w.beat(1, |_| ());
    });
    assert_eq!((world.state("a"), world.key("a").worker.clone()), (JobState::Assigned, Some(worker("g1", "i"))));
    world.seconds(3, |w| {
        w.beat(0, |_| ());
        w.beat(1, |b| b.given_up = given_up("a", 2, FailureClass::Forbidden));
    });
    assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Failed, 2), "nobody is left to ask");
}

#[test]
fn who_has_no_room_for_a_minute_is_waited_for() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    let full = |w: &mut World| {
        let mut given_up = given_up("a", 1, FailureClass::NoCapacity);
        given_up[0].failure.retry_after_ms = Some(60_000);
        let seq = w.now.mono.as_secs();
        w.beat(0, |b| (b.seq, b.given_up) = (seq, given_up));
    };
    world.seconds(50, full);
    assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Queued, 0));
    world.seconds(20, full);
    assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Assigned, 1));
}

#[test]
fn an_ended_job_that_is_met_is_expired_in_its_time() {
    let mut world = World::new(0);
    let ended = |ttl| JobRecord {
        state: JobState::Done,
        ended_ms: Some(900_000),
        result_ttl_s: ttl,
        ..crate::testing::job("a")
    };
    for (ttl, due) in [(60, true), (3_600, false)] {
        world.stored.keys.insert(id("a"), (ended(ttl), 7));
        world.core.ask_status(CallId(1), JobQuery { job: id("a") }, world.now);
        world.run();
        assert_eq!(!world.core.jobs.book.due(world.now.unix_ms, 9).is_empty(), due, "{ttl}");
    }
    assert_eq!(world.core.jobs.book.due(u64::MAX, 9), [id("a")]);
}
