//! The fleet map at work.

use voxfleet_schema::fleet::{Residency, Role};

use super::*;
use crate::{config::ServiceConfig, sessions::Asked, testing::model};

fn mapped(services: &[(&str, ServiceConfig)]) -> World {
    let mut world = World::new(0);
    // Listening has only begun: who has not been heard is not missed yet.
    world.now.mono = Duration::from_secs(1);
    let config = DispatcherConfig {
        services: services.iter().map(|(name, config)| ((*name).to_owned(), config.clone())).collect(),
        ..DispatcherConfig::default()
    };
    world.core = Core::new(config, "d".to_owned(), Subjects::new("asr.v1"));
    world
}

fn service(gpus: &[&str], reserves: &[&str]) -> ServiceConfig {
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    ServiceConfig { gpus: names(gpus), reserves: names(reserves), ..ServiceConfig::default() }
}

fn prewarmed(world: &World) -> Vec<(String, String)> {
    let of = |e: &Effect| match e {
        Effect::Prewarm { worker, model } => Some((worker.gpu_id.to_string(), model.clone())),
        _ => None,
    };
    world.kept.iter().filter_map(of).collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

fn held_by(world: &World, gpu: &str) -> Vec<voxfleet_schema::fleet::Held> {
    let mine = |s: &&crate::sessions::Session| s.record.worker.as_ref().is_some_and(|w| w.gpu_id.as_str() == gpu);
    let sessions = world.core.book.sessions().map(|(_, s)| s).filter(mine);
    sessions
        .filter(|s| s.state() == SessionState::Assigned)
        .map(|s| held(s.record.id.as_str(), s.record.epoch))
        .collect()
}

/// Heartbeats of these, with what they were given and the model in memory.
fn beats(gpus: &'static [u32]) -> impl Fn(&mut World) {
    move |world| {
        for n in gpus {
            let held = held_by(world, &format!("g{n}"));
            world.beat(*n, |b| {
                b.held = held;
                b.models = vec![model("small", Residency::Loaded, 852)];
            });
        }
    }
}

#[test]
fn a_reserve_takes_the_work_of_a_gpu_that_died_and_nothing_before() {
    let preload = ServiceConfig { preload: vec!["small".to_owned()], ..service(&["g0", "g1"], &["g2"]) };
    let mut world = mapped(&[("asr", preload)]);
    for n in 0..3 {
        world.beat(n, |_| ());
    }
    assert_eq!(prewarmed(&world), pairs(&[("g0", "small"), ("g1", "small")]));
    world.kept.clear();
    for n in 0..8 {
        world.audio(&format!("s{n}"), n + 1);
    }
    world.seconds(1, beats(&[0, 1, 2]));
    let failure = world.open(1, "more");
    assert!(matches!(&failure, Some(Answer::Refused(f)) if f.message == "No GPU resources available"), "{failure:?}");
    world.seconds(5, beats(&[1, 2]));
    let moved: Vec<_> = world.assigned[8..].iter().map(|(_, gpu, _)| gpu.as_str()).collect();
    assert_eq!(moved, ["g2"; 4]);
    assert_eq!(prewarmed(&world), pairs(&[("g2", "small")]));
    let degraded: Vec<_> = world.told.iter().filter(|e| e.scope == Scope::Fleet && e.what == What::Degraded).collect();
    assert_eq!(degraded.len(), 1);
    assert_eq!((degraded[0].id.as_str(), &degraded[0].detail["standing_in"]), ("g0", &"g2".into()));
    let status = world.core.fleet_status(world.now);
    let rows: Vec<_> = status.services[0].gpus.iter().map(|g| (g.gpu_id.as_str(), g.role, g.health)).collect();
    let alive = Some(voxfleet_schema::fleet::WorkerHealth::Alive);
    assert_eq!(rows, [("g0", Role::Serves, None), ("g1", Role::Serves, alive), ("g2", Role::StandingIn, alive)]);

    // A new incarnation on g0: after a while the reserve takes nothing new, and what it has stays.
    let back = |world: &mut World| {
        let mut heartbeat = beat("g0", "j");
        heartbeat.device.index = Some(0);
        world.core.heartbeat(heartbeat, world.now);
        world.run();
        beats(&[1, 2])(world);
    };
    world.seconds(14, back);
    assert_eq!(world.told.iter().filter(|e| e.scope == Scope::Fleet && e.what == What::Restored).count(), 1);
    assert_eq!(held_by(&world, "g2").len(), 4);
    let Some(Answer::Opened(opened)) = world.open(2, "new") else { panic!("{:?}", world.answers.last()) };
    assert_eq!(opened.worker, worker("g0", "j"));
}

#[test]
fn a_preload_that_was_lost_or_failed_is_asked_for_again_until_it_is_there() {
    let preload = ServiceConfig { preload: vec!["small".to_owned()], ..service(&["g0"], &["g1"]) };
    let mut world = mapped(&[("asr", preload)]);
    let shown = |state, restarts| {
        move |world: &mut World| {
            for n in [0, 1] {
                world.beat(n, |b| {
                    b.models = vec![model("small", state, 852)];
                    b.engine.restarts = restarts;
                });
            }
        }
    };
    let asked = |world: &mut World| {
        let asked = prewarmed(world);
        world.kept.clear();
        assert!(asked.iter().all(|(gpu, _)| gpu == "g0"), "{asked:?}");
        asked.len()
    };
    world.seconds(20, shown(Residency::Available, 0));
    let lost = asked(&mut world);
    assert!((3..=5).contains(&lost), "again, and less often each time: {lost}");
    world.seconds(60, shown(Residency::Loading, 0));
    assert_eq!(asked(&mut world), 0, "it is at it");
    world.seconds(5, shown(Residency::Failed, 0));
    assert_eq!(asked(&mut world), 1, "it failed");
    world.seconds(2, shown(Residency::Loaded, 0));
    world.seconds(100, shown(Residency::Available, 0));
    assert_eq!(asked(&mut world), 0, "it left for being idle");
    world.seconds(4, shown(Residency::Available, 1));
    assert_eq!(asked(&mut world), 1, "its engine died");
}

fn exact() -> SessionOptions {
    let policy = voxfleet_schema::session::Policy::ExactModel;
    SessionOptions { model: Some("small".to_owned()), policy, ..SessionOptions::default() }
}

/// A GPU with a session that is not to be on a CPU dies beside a CPU worker.
fn dies_beside_a_cpu(mut world: World) -> World {
    let cpu = |w: &mut World| w.beat(1, |b| b.device.index = None);
    world.beat(0, |_| ());
    cpu(&mut world);
    world.ask(1, "s", Asked::Open(Box::new(exact()), None));
    assert_eq!(world.assigned, [("s".to_owned(), "g0".to_owned(), 1)]);
    world.seconds(8, cpu);
    world
}

/// Whoever was heard and died has failed, although those that were not heard yet are still waited for.
#[test]
fn a_death_in_the_first_seconds_calls_the_reserve_and_not_the_cpu() {
    let mut world = mapped(&[("asr", ServiceConfig { cpu: true, ..service(&["g0"], &["g1"]) })]);
    let others = |w: &mut World| {
        beats(&[1])(w);
        let held = held_by(w, "g2");
        w.beat(2, |b| (b.device.index, b.held) = (None, held));
    };
    world.beat(0, |_| ());
    others(&mut world);
    world.audio("s", 1);
    assert_eq!(world.assigned, [("s".to_owned(), "g0".to_owned(), 1)]);
    world.seconds(4, others);
    assert_eq!(world.assigned.get(1).map(|(_, gpu, _)| gpu.as_str()), Some("g1"), "{:?}", world.assigned);
}

#[test]
fn a_session_that_is_for_gpus_waits_when_the_last_one_dies() {
    let with_map = mapped(&[("asr", ServiceConfig { cpu: true, ..service(&["g0"], &[]) })]);
    for world in [World::new(0), with_map] {
        let mut world = dies_beside_a_cpu(world);
        assert!(world.core.fleet.is_dead(&worker("g0", "i")));
        assert_eq!((world.state("s"), world.assigned.len()), (SessionState::Waiting, 1));
        let mut back = beat("g0", "j");
        back.device.index = Some(0);
        world.core.heartbeat(back, world.now);
        world.run();
        assert_eq!(world.assigned[1].1, "g0", "it is back");
    }
}

#[test]
fn nobody_is_missed_while_the_own_link_is_in_doubt() {
    let mut world = mapped(&[("asr", service(&["g0"], &["g1"]))]);
    for _ in 0..10 {
        world.wait(Duration::from_secs(1));
        testing::probe(&mut world.core, false, false, world.now);
        world.core.tick(world.now);
        world.run();
    }
    let degraded = |w: &World| w.told(What::Degraded);
    // The link is back, and the reserve's heartbeat comes before the other one's.
    world.seconds(1, |w| w.beat(1, |_| ()));
    assert_eq!(degraded(&world), 0, "it could not be heard");
    world.seconds(10, |w| w.beat(1, |_| ()));
    assert_eq!(degraded(&world), 1, "it is not there");
}

#[test]
fn a_service_may_name_a_worker_that_has_no_gpu() {
    let mut world = mapped(&[("asr", service(&["g0"], &[]))]);
    world.beat(0, |b| b.device.index = None);
    world.ask(1, "s", Asked::Open(Box::new(exact()), None));
    assert_eq!(world.assigned, [("s".to_owned(), "g0".to_owned(), 1)]);
}

#[test]
fn each_service_keeps_to_its_own_gpus_and_limits() {
    let of = |gpus: &[&str], models: &[&str], cpu| ServiceConfig {
        models: models.iter().map(|m| (*m).to_owned()).collect(),
        cpu,
        ..service(gpus, &[])
    };
    let tight = ServiceConfig { memory_limit_percent: 20, ..of(&["g1"], &["medium"], true) };
    let mut world = mapped(&[("asr", of(&["g0"], &["small"], false)), ("bulk", tight)]);
    let both = |b: &mut Heartbeat| {
        b.models = vec![model("small", Residency::Available, 852), model("medium", Residency::Available, 4_900)];
    };
    world.beat(0, both);
    world.beat(1, |b| {
        both(b);
        b.device.free_mb = 24_000;
    });
    world.beat(2, |b| {
        both(b);
        b.device.index = None;
        b.device.total_mb = 0;
    });
    let open = |world: &mut World, call: u64, model: Option<&str>| {
        let options = SessionOptions { model: model.map(str::to_owned), ..SessionOptions::default() };
        world.ask(call, &format!("s{call}"), Asked::Open(Box::new(options), None));
        match world.answers.last() {
            Some((_, Answer::Opened(opened))) => Ok(opened.worker.gpu_id.to_string()),
            Some((_, Answer::Refused(failure))) => Err(failure.class),
            other => panic!("{other:?}"),
        }
    };
    for call in 0..4 {
        assert_eq!(open(&mut world, call, Some("small")).as_deref(), Ok("g0"));
    }
    assert_eq!(open(&mut world, 5, Some("small")), Err(FailureClass::NoCapacity), "no CPUs for this service");
    assert_eq!(open(&mut world, 6, None), Err(FailureClass::NoCapacity), "the usual service");
    // 4,900 MB are more than a fifth of 24,000, so a smaller one stands in on its GPU; the CPU comes later.
    assert_eq!(open(&mut world, 7, Some("medium")).as_deref(), Ok("g1"));
    for call in 8..11 {
        assert_eq!(open(&mut world, call, Some("medium")).as_deref(), Ok("g1"));
    }
    assert_eq!(open(&mut world, 12, Some("medium")).as_deref(), Ok("g2"), "CPU workers when no GPU has room");
}
