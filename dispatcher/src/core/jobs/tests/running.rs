//! Tries, ends, deaths and drains.

use super::*;

#[test]
fn a_cancel_closes_the_chain_wherever_the_job_is() {
    let mut world = World::new(1);
    for name in ["a", "b"] {
        world.submit(1, name);
        world.run();
    }
    for (call, name) in [(2, "a"), (3, "b"), (4, "b")] {
        world.core.ask_cancel(CallId(call), JobQuery { job: id(name) }, world.now);
    }
    world.run();
    for name in ["a", "b"] {
        assert_eq!(world.state(name), JobState::Cancelled, "{name}");
        assert_eq!(world.stored.chains[&id(name)].len(), 1);
    }
    assert!(world.released.iter().any(|(_, job, epoch)| *job == id("a") && *epoch == 1));
    assert!(world.stored.work.is_empty() && world.stored.dead.is_empty());
    assert_eq!(
        (world.key("a").epoch, world.stored.chains[&id("a")][0].epoch),
        (2, 2),
        "its worker meets a later epoch"
    );
    assert_eq!(world.told(What::Cancelled), 2);
    for call in [2, 3, 4] {
        assert!(matches!(world.answer(call), Some(Answer::Job(_))), "{call}");
    }
}

pub(super) fn part(name: &str, parent: &str) -> Result<Box<Submission>, Failure> {
    let mut part = Submission { part: Some(testing::part_of(parent)), ..*submission(name) };
    part.options.model = Some("small".to_owned());
    Ok(Box::new(part))
}

#[test]
fn parts_go_when_their_whole_has_ended() {
    let mut world = World::new(1);
    world.submit(1, "whole");
    world.run();
    for (call, name, parent) in [(2, "part", "whole"), (3, "done", "whole"), (4, "stray", "nobody")] {
        world.core.job(JobInput::Submit { call: CallId(call), submission: part(name, parent) }, world.now);
        world.run();
    }
    world.store(&id("done"), 0, done());
    world.core.job(JobInput::Chain { id: id("done"), mark: world.stored.last(&id("done")) }, world.now);
    world.run();
    assert_eq!(world.state("done"), JobState::Done, "who has the whole did it");
    let holds = |w: &mut World| w.beat(0, |b| b.held = vec![holds_job("whole", 1)]);
    world.seconds(5, holds);
    assert_eq!((world.state("part"), world.state("stray")), (JobState::Queued, JobState::Cancelled));
    world.store(&id("whole"), 1, done());
    world.core.job(JobInput::Chain { id: id("whole"), mark: world.stored.last(&id("whole")) }, world.now);
    world.seconds(5, |w| w.beat(0, |_| ()));
    assert_eq!((world.state("whole"), world.state("part")), (JobState::Done, JobState::Cancelled));
    assert!(world.stored.dead.is_empty(), "that is no failure");
}

/// The whole runs on one engine, and the only other worker has another.
#[test]
fn a_part_of_a_job_that_may_not_differ_waits_for_the_engine_of_its_whole() {
    for (policy, state) in [(Policy::ExactModel, JobState::Queued), (Policy::AllowCpu, JobState::Assigned)] {
        let mut world = World::new(2);
        let of_policy = |submission: Result<Box<Submission>, Failure>| {
            submission.map(|mut submission| {
                submission.options.policy = policy;
                submission
            })
        };
        world.core.job(JobInput::Submit { call: CallId(1), submission: of_policy(Ok(submission("whole"))) }, world.now);
        world.run();
        let owner = world.key("whole").worker.clone().expect("assigned").gpu_id;
        let beats = |w: &mut World| {
            for n in 0..2 {
                w.beat(n, |b| {
                    if b.gpu_id == owner {
                        b.held = vec![holds_job("whole", 1)];
                    } else {
                        b.engine.kind = "ct2".to_owned();
                    }
                });
            }
        };
        world.seconds(2, beats);
        let mut part = part("part", "whole").expect("a part");
        part.part.as_mut().expect("of a whole").vad = VadKind::Silero;
        let submission = of_policy(Ok(part));
        world.core.job(JobInput::Submit { call: CallId(2), submission }, world.now);
        world.seconds(2, beats);
        assert_eq!(world.state("part"), state, "{policy:?}");
    }
}

#[test]
fn nobody_gets_his_own_recording_into_anothers_parts() {
    let mut world = World::new(2);
    world.submit(1, "whole");
    world.run();
    let mut forged = part("part", "whole").expect("a part");
    forged.audio = "https://audio.example/b.wav".to_owned();
    world.core.job(JobInput::Submit { call: CallId(2), submission: Ok(forged) }, world.now);
    world.run();
    let Some(Answer::Refused(failure)) = world.answer(2) else { panic!("{:?}", world.answer(2)) };
    assert_eq!(failure.class, FailureClass::BadRequest, "{failure}");
    assert!(!world.stored.keys.contains_key(&id("part")));
}

#[test]
fn a_part_that_its_parent_has_begun_is_gone_on_with() {
    let mut world = World::new(2);
    world.submit(1, "whole");
    world.run();
    world.store(&id("part"), 4, None);
    world.core.job(JobInput::Submit { call: CallId(2), submission: part("part", "whole") }, world.now);
    world.run();
    assert_eq!(world.state("part"), JobState::Queued, "its parent is at it");
    let holds = |w: &mut World| {
        w.beat(0, |b| b.held = vec![holds_job("whole", 1)]);
        w.beat(1, |_| ());
    };
    world.seconds(20, holds);
    world.store(&id("part"), 4, None);
    world.core.job(JobInput::Chain { id: id("part"), mark: world.stored.last(&id("part")) }, world.now);
    world.seconds(20, holds);
    assert_eq!(world.state("part"), JobState::Queued, "and gets on");
    world.seconds(15, holds);
    let record = world.key("part");
    assert_eq!((record.state, record.epoch), (JobState::Assigned, 5), "no longer, and above its epoch");
    // Anybody else's chain is not gone on with.
    world.store(&id("other"), 1, None);
    world.submit(3, "other");
    world.run();
    assert!(matches!(world.answer(3), Some(Answer::Refused(f)) if f.class == FailureClass::BadRequest));
}

#[test]
fn who_finishes_before_the_cancel_has_finished() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.store(&id("a"), 1, done());
    world.core.ask_cancel(CallId(2), JobQuery { job: id("a") }, world.now);
    world.run();
    assert_eq!((world.state("a"), world.told(What::Cancelled)), (JobState::Done, 0));
    assert_eq!(
        (world.key("a").error.as_ref(), world.finish_ms),
        (None, 2_000),
        "its worker hears of its end final first"
    );
}

#[test]
fn tries_that_fail_are_repeated_and_counted() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    for attempt in 1..=3u32 {
        let record = world.key("a").clone();
        assert_eq!((record.state, record.attempts), (JobState::Assigned, attempt));
        let epoch = record.epoch;
        let gives_up = |w: &mut World| w.beat(0, |b| b.given_up = given_up("a", epoch, FailureClass::Timeout));
        world.seconds(1, gives_up);
        if attempt < 3 {
            assert_eq!(world.state("a"), JobState::Queued);
            world.seconds(5, gives_up);
        }
    }
    assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Failed, 3));
    assert_eq!((world.told(What::Failed), world.stored.dead.len()), (1, 1));
}

#[test]
fn no_room_is_no_try_and_another_worker_comes_first() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    assert_eq!(world.key("a").worker, Some(worker("g0", "i")));
    world.seconds(1, |w| {
        w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::NoCapacity));
        w.beat(1, |_| ());
    });
    let record = world.key("a");
    assert_eq!((record.worker.clone(), record.attempts, record.epoch), (Some(worker("g1", "i")), 1, 2));
}

#[test]
fn a_dead_workers_job_is_placed_again_above_its_epoch() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.beat(1, |_| ());
    world.seconds(4, |w| w.beat(1, |_| ()));
    let record = world.key("a");
    assert_eq!((record.state, record.epoch), (JobState::Assigned, 2));
    assert_eq!((record.attempts, record.deaths), (1, 1), "that was no try of its own");
    assert_eq!(record.worker, Some(worker("g1", "i")));
    assert_eq!(world.told(What::Moved), 1);
}

#[test]
fn a_job_that_gets_on_survives_any_number_of_workers() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    for n in 1..6 {
        let epoch = world.key("a").epoch;
        world.store(&id("a"), epoch, None);
        let mark = world.stored.last(&id("a"));
        world.core.job(JobInput::Chain { id: id("a"), mark }, world.now);
        world.beat(n, |_| ());
        world.seconds(4, |w| w.beat(n, |_| ()));
        assert_eq!(world.state("a"), JobState::Assigned, "worker {n}");
    }
    for n in 6..15 {
        let (attempts, deaths) = (world.key("a").attempts, world.key("a").deaths);
        assert_eq!((world.state("a"), attempts, deaths), (JobState::Assigned, 1, n as u32 - 5), "worker {n}");
        world.beat(n, |_| ());
        world.seconds(4, |w| w.beat(n, |_| ()));
    }
    assert_eq!(world.state("a"), JobState::Failed, "ten deaths without a final in between");
}

#[test]
fn a_job_that_crashed_an_engine_alone_is_a_suspect_wherever_it_goes() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    world.seconds(1, |w| w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::EngineCrash)));
    assert!(world.key("a").suspect);
    world.seconds(3, |w| (0..2).for_each(|n| w.beat(n, |_| ())));
    let record = world.key("a");
    assert_eq!(
        (record.state, record.worker.clone(), record.suspect),
        (JobState::Assigned, Some(worker("g1", "i")), true)
    );
    world.seconds(2, |w| {
        w.beat(0, |_| ());
        w.beat(1, |b| b.held = vec![holds_job("a", 2)]);
    });
    world.seconds(1, |w| w.beat(1, |b| b.given_up = given_up("a", 2, FailureClass::Timeout)));
    assert!(!world.key("a").suspect, "its worker said that it has passed");
}

#[test]
fn a_lost_work_item_is_sent_again_and_a_silent_worker_is_passed_over() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.stored.work.clear();
    world.seconds(3, |w| w.beat(0, |_| ()));
    assert_eq!(world.stored.work.get(&(worker("g0", "i"), id("a"))), Some(&1));
    world.beat(1, |_| ());
    world.seconds(40, |w| {
        w.beat(0, |_| ());
        w.beat(1, |_| ());
    });
    let record = world.key("a");
    assert_eq!((record.worker.clone(), record.attempts), (Some(worker("g1", "i")), 1));
    assert!(!world.stored.work.contains_key(&(worker("g0", "i"), id("a"))));
}

#[test]
fn a_job_nobody_knows_is_let_go() {
    let mut world = World::new(1);
    world.seconds(1, |w| w.beat(0, |b| b.held = vec![holds_job("ghost", 3)]));
    assert_eq!(world.released, [(worker("g0", "i"), id("ghost"), 3)]);
}

#[test]
fn a_job_another_process_wrote_is_placed() {
    let mut world = World::new(1);
    let record = crate::testing::job("theirs");
    world.stored.keys.insert(id("theirs"), (record, 7));
    world.core.job(JobInput::Changed { id: id("theirs"), revision: 7, open: true }, world.now);
    world.run();
    assert_eq!(world.state("theirs"), JobState::Assigned);
}

#[test]
fn what_somebody_else_wrote_is_true() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    let mut record = world.key("a").clone();
    (record.worker, record.epoch) = (Some(worker("g1", "i")), 4);
    world.stored.revision += 1;
    let revision = world.stored.revision;
    world.stored.keys.insert(id("a"), (record, revision));
    world.core.job(JobInput::Changed { id: id("a"), revision, open: true }, world.now);
    world.run();
    let used = |gpu: &str| world.core.fleet.get(&worker(gpu, "i")).map(|w| w.jobs.used());
    assert_eq!((used("g0"), used("g1")), (Some(0), Some(1)));
    assert_eq!(world.stored.work.get(&(worker("g1", "i"), id("a"))), Some(&4));
    assert!(world.released.contains(&(worker("g0", "i"), id("a"), 1)));
}

#[test]
fn a_draining_worker_hands_over_when_there_is_room() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    let drains = |w: &mut World| {
        w.beat(0, |b| {
            b.draining = true;
            b.held = vec![holds_job("a", 1)];
        });
    };
    world.seconds(3, drains);
    assert_eq!(world.key("a").epoch, 1, "nobody else has room");
    world.seconds(2, |w| {
        drains(w);
        w.beat(1, |_| ());
    });
    let record = world.key("a");
    assert_eq!((record.worker.clone(), record.epoch, record.attempts), (Some(worker("g1", "i")), 2, 1));
    assert!(world.released.contains(&(worker("g0", "i"), id("a"), 1)));
    assert_eq!((world.released.len(), world.finish_ms), (1, 2_000), "the final that it has begun is finished");
}

#[test]
fn finals_are_told_by_their_kind() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    let mut end: Final = crate::testing::end_final("a", 0, 1, 2);
    world.core.finished(&end, world.now);
    world.run();
    assert_eq!(world.state("a"), JobState::Assigned, "a session of the same name");
    end.kind = Kind::Job;
    world.core.finished(&end, world.now);
    world.run();
    assert_eq!((world.state("a"), world.key("a").duration_ms), (JobState::Done, Some(1_000)));
}
