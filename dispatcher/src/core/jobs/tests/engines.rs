//! The engine of a job that may not change it, and of its parts: kept over finals that name none, and by successors.

use voxfleet_schema::fleet::EngineName;

use super::{running::part, *};
use crate::routing::Refusal;

fn submit(world: &mut World, call: u64, policy: Policy, submission: Result<Box<Submission>, Failure>) {
    let submission = submission.map(|mut submission| {
        submission.options.policy = policy;
        if let Some(part) = &mut submission.part {
            part.vad = VadKind::Silero;
        }
        submission
    });
    world.core.job(JobInput::Submit { call: CallId(call), submission }, world.now);
    world.run();
}

/// Its worker stores a final.
fn heard(world: &mut World, name: &str, engine: Option<EngineName>) {
    let epoch = world.key(name).epoch;
    assert!(world.store(&id(name), epoch, None));
    if let Some(mark) = world.stored.chains.get_mut(&id(name)).and_then(|chain| chain.last_mut()) {
        mark.engine = engine;
    }
    let mark = world.stored.last(&id(name));
    world.core.job(JobInput::Chain { id: id(name), mark }, world.now);
    world.run();
}

fn succeed(world: &mut World) {
    world.succeed();
    world.core.recover_fleet(Vec::new(), world.now);
    world.run();
}

/// Heartbeats of `g<n>` with the jobs that its key says it has, on this engine.
fn beats(world: &mut World, n: usize, engine: &str) {
    let name = worker(&format!("g{n}"), "i");
    let has = |record: &JobRecord| record.state == JobState::Assigned && record.worker.as_ref() == Some(&name);
    let mine = world.stored.keys.values().filter(|(record, _)| has(record));
    let held: Vec<Held> = mine.map(|(record, _)| holds_job(record.id.as_str(), record.epoch)).collect();
    world.beat(n, |b| (b.engine.kind, b.held) = (engine.to_owned(), held));
}

fn owner(world: &World, name: &str) -> Option<String> {
    world.key(name).worker.as_ref().map(|worker| worker.gpu_id.to_string())
}

fn engine(world: &World, name: &str) -> Option<String> {
    world.key(name).engine.clone()
}

#[test]
fn a_job_keeps_the_engine_of_its_finals_wherever_it_goes() {
    for (takeover, says_it) in [(false, true), (true, true), (true, false)] {
        let mut world = World::new(1);
        submit(&mut world, 1, Policy::ExactModel, Ok(submission("whole")));
        world.seconds(2, |w| beats(w, 0, "simulated"));
        assert_eq!(engine(&world, "whole"), None, "nothing is known");
        heard(&mut world, "whole", Some(EngineName::Simulated));
        world.seconds(2, |w| beats(w, 0, "simulated"));
        let noted = world.stored.keys[&id("whole")].clone();
        assert_eq!((noted.0.engine.as_deref(), noted.0.epoch), (Some("simulated"), 1));
        heard(&mut world, "whole", None);
        world.seconds(2, |w| beats(w, 0, "simulated"));
        assert_eq!(world.stored.keys[&id("whole")], noted, "written once");
        submit(&mut world, 2, Policy::ExactModel, part("part", "whole"));
        if !says_it {
            // As an older version has it.
            world.stored.keys.values_mut().for_each(|(record, _)| record.engine = None);
        }
        if takeover {
            succeed(&mut world);
        }
        world.seconds(25, |w| beats(w, 1, "ct2"));
        if !says_it {
            // It has one place, for the one or the other.
            let owners = ["whole", "part"].map(|name| owner(&world, name));
            assert!(owners.contains(&Some("g1".to_owned())), "{owners:?}");
            continue;
        }
        for name in ["whole", "part"] {
            assert_eq!((world.state(name), world.key(name).epoch > 0), (JobState::Queued, name == "whole"), "{name}");
            world.core.ask_status(CallId(9), JobQuery { job: id(name) }, world.now);
            world.run();
            let Some((_, Answer::Job(status))) = world.answers.last() else { panic!("{:?}", world.answers) };
            let rows = status.candidates.as_array().expect("rows");
            let row = rows.iter().find(|row| row["gpu_id"] == "g1").expect("a row");
            assert_eq!(row["refused"], Refusal::OtherEngine.as_str(), "{name}, takeover: {takeover}");
        }
        world.seconds(2, |w| {
            beats(w, 1, "ct2");
            beats(w, 2, "simulated");
        });
        assert_eq!((owner(&world, "whole").as_deref(), world.key("whole").epoch), (Some("g2"), 2));
    }
}

/// Neither has stored a final, and the worker of the whole dies.
#[test]
fn a_whole_keeps_the_engine_that_its_part_was_given_to() {
    for (policy, takeover) in [(Policy::ExactModel, false), (Policy::ExactModel, true), (Policy::AllowCpu, false)] {
        let exact = policy == Policy::ExactModel;
        let says = exact.then(|| "simulated".to_owned());
        let mut world = World::new(2);
        submit(&mut world, 1, policy, Ok(submission("whole")));
        let both = |w: &mut World| (0..2).for_each(|n| beats(w, n, "simulated"));
        world.seconds(2, both);
        submit(&mut world, 2, policy, part("part", "whole"));
        assert_eq!(engine(&world, "part"), says, "with its assignment");
        world.seconds(2, both);
        assert_eq!((owner(&world, "whole").as_deref(), owner(&world, "part").as_deref()), (Some("g0"), Some("g1")));
        assert_eq!(engine(&world, "whole"), says);
        if takeover {
            // What had not been written when the dispatcher died.
            world.stored.keys.get_mut(&id("whole")).expect("a key").0.engine = None;
            succeed(&mut world);
        }
        world.seconds(25, |w| {
            beats(w, 1, "simulated");
            beats(w, 2, "ct2");
        });
        let expected = if exact { None } else { Some("g2".to_owned()) };
        assert_eq!(owner(&world, "whole"), expected, "{policy:?}, takeover: {takeover}");
        world.seconds(2, |w| {
            beats(w, 1, "simulated");
            beats(w, 2, "ct2");
            beats(w, 3, "simulated");
        });
        let expected = if exact { "g3" } else { "g2" };
        assert_eq!(owner(&world, "whole").as_deref(), Some(expected), "{policy:?}, takeover: {takeover}");
    }
}

/// Who has the whole has begun a part himself, and dies before the whole has a final.
#[test]
fn a_whole_keeps_the_engine_that_its_part_was_begun_with() {
    let mut world = World::new(1);
    submit(&mut world, 1, Policy::ExactModel, Ok(submission("whole")));
    submit(&mut world, 2, Policy::ExactModel, part("part", "whole"));
    world.seconds(2, |w| beats(w, 0, "simulated"));
    heard(&mut world, "part", Some(EngineName::Simulated));
    world.seconds(2, |w| beats(w, 0, "simulated"));
    assert_eq!((engine(&world, "whole").as_deref(), world.key("part").epoch), (Some("simulated"), 0));
    succeed(&mut world);
    world.seconds(40, |w| beats(w, 1, "ct2"));
    assert_eq!((owner(&world, "whole"), owner(&world, "part")), (None, None), "also once nobody is at the part");
}
