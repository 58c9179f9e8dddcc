//! Devices that lose memory, or are lost: what sessions get instead, what is told of it, and how they come back.

use voxfleet_schema::{
    device::{DeviceTrouble, Instead, Pressure},
    fleet::{Held, Residency},
    session::Policy,
};

use super::*;
use crate::{sessions::Asked, testing::model};

/// What a worker says of itself, beside what it holds.
type Says = fn(&mut Heartbeat);

/// Beats of `g0`, `g1`, ..., with whatever the dispatcher has given them.
fn beats(says: &'static [Says]) -> impl Fn(&mut World) {
    move |world| {
        for (n, says) in (0..).zip(says) {
            let held = held_by(world, &format!("g{n}"));
            let seq = world.now.mono.as_millis() as u64;
            world.beat(n, |b| {
                (b.seq, b.sent_ms, b.held) = (seq, seq, held);
                says(b);
            });
        }
    }
}

fn held_by(world: &World, gpu: &str) -> Vec<Held> {
    let sessions = world.core.book.sessions().map(|(_, s)| s);
    let mine = sessions.filter(|s| s.record.worker.as_ref().is_some_and(|w| w.gpu_id.as_str() == gpu));
    mine.filter(|s| s.state() == SessionState::Assigned).map(|s| held(s.record.id.as_str(), s.record.epoch)).collect()
}

/// Memory for `small` beside its `medium`, and for nothing else.
fn crowded(b: &mut Heartbeat) {
    roomy(b);
    b.device.free_mb = 4_000;
}

fn roomy(b: &mut Heartbeat) {
    b.models = vec![model("medium", Residency::Available, 9_000), model("small", Residency::Available, 852)];
}

fn cpu(b: &mut Heartbeat) {
    roomy(b);
    (b.device.index, b.device.total_mb) = (None, 0);
    b.engine.effective_device = "cpu".to_owned();
}

fn full(b: &mut Heartbeat) {
    roomy(b);
    b.slots.total = 0;
}

fn fallen(b: &mut Heartbeat) {
    roomy(b);
    b.engine.effective_device = "cpu".to_owned();
    lost(b);
}

fn lost(b: &mut Heartbeat) {
    roomy(b);
    b.device.trouble = Some(DeviceTrouble { class: FailureClass::DeviceLost, message: "off the bus".to_owned() });
}

fn pressed(b: &mut Heartbeat) {
    roomy(b);
    b.device.pressure = Some(Pressure::MoveAway);
    for held in &mut b.held {
        held.elsewhere = true;
    }
}

fn open(world: &mut World, name: &str, model: &str, policy: Policy) {
    let options = SessionOptions { model: Some(model.to_owned()), policy, ..SessionOptions::default() };
    world.ask(world.answers.len() as u64, name, Asked::Open(Box::new(options), None));
    assert_eq!(world.state(name), SessionState::Assigned, "{:?}", world.answers.last());
}

fn details(world: &World, what: What) -> Vec<serde_json::Value> {
    let of = |e: &&Event| e.scope == Scope::Session && e.what == what;
    world.told.iter().filter(of).map(|e| e.detail.clone()).collect()
}

fn owner(world: &World, session: &str) -> String {
    world.record(session).worker.as_ref().expect("assigned").gpu_id.to_string()
}

#[test]
fn a_stand_in_is_told_once_and_taken_back_when_there_has_been_room_for_a_while() {
    let mut world = World::new(0);
    beats(&[crowded])(&mut world);
    open(&mut world, "s", "medium", Policy::AllowSmaller);
    let degraded = serde_json::json!({
        "asked": "medium", "model": "small", "device": "gpu", "class": "model_does_not_fit", "by": "dispatcher",
    });
    assert_eq!(details(&world, What::Degraded), std::slice::from_ref(&degraded));
    world.seconds(60, beats(&[crowded]));
    assert_eq!((world.record("s").epoch, details(&world, What::Degraded).len()), (1, 1), "there is no room");
    // Room that comes and goes is no room.
    for _ in 0..3 {
        world.seconds(20, beats(&[roomy]));
        world.seconds(2, beats(&[crowded]));
    }
    assert_eq!(world.record("s").epoch, 1);
    world.seconds(29, beats(&[roomy]));
    assert_eq!(world.record("s").epoch, 1, "not yet");
    world.seconds(4, beats(&[roomy]));
    assert_eq!((world.record("s").epoch, world.record("s").instead.clone()), (2, None), "on its own worker");
    let restored = serde_json::json!({ "asked": "medium", "model": "medium", "device": "gpu", "by": "dispatcher" });
    assert_eq!(details(&world, What::Restored), [restored]);
    world.seconds(60, beats(&[roomy]));
    assert_eq!((world.record("s").epoch, world.told(What::Moved), world.told(What::Restored)), (2, 0, 1));
}

#[test]
fn sessions_go_back_to_gpus_one_at_a_time() {
    let mut world = World::new(0);
    beats(&[full, cpu])(&mut world);
    for name in ["a", "b", "c"] {
        open(&mut world, name, "small", Policy::AllowCpu);
        assert_eq!(owner(&world, name), "g1");
    }
    open(&mut world, "asked", "small", Policy::ForceCpu);
    let told = details(&world, What::Degraded);
    assert_eq!(told.len(), 3, "who asked for a CPU has what he asked for");
    assert_eq!(
        (&told[0]["device"], &told[0]["class"], &told[0]["model"]),
        (&"cpu".into(), &"no_capacity".into(), &"small".into())
    );
    world.seconds(31, beats(&[roomy, cpu]));
    let moved = |world: &World| ["a", "b", "c"].iter().filter(|name| owner(world, name) == "g0").count();
    let mut before = moved(&world);
    for _ in 0..40 {
        world.seconds(1, beats(&[roomy, cpu]));
        assert!(moved(&world) <= before + 1, "{} -> {}", before, moved(&world));
        before = moved(&world);
    }
    assert_eq!((before, owner(&world, "asked").as_str()), (3, "g1"));
    assert_eq!((details(&world, What::Restored).len(), world.told(What::Moved)), (3, 3));
}

#[test]
fn a_session_whose_worker_fell_back_goes_to_a_gpu_that_comes_free() {
    let mut world = World::new(0);
    beats(&[roomy, full])(&mut world);
    open(&mut world, "s", "small", Policy::AllowCpu);
    assert_eq!(owner(&world, "s"), "g0");
    world.seconds(60, beats(&[fallen, full]));
    assert_eq!((owner(&world, "s").as_str(), world.told(What::Degraded)), ("g0", 0), "its worker tells of that itself");
    world.seconds(33, beats(&[fallen, roomy]));
    assert_eq!(owner(&world, "s"), "g1");
    assert_eq!(details(&world, What::Restored).len(), 1);
}

#[test]
fn a_move_back_that_never_came_about_leaves_nothing_to_be_told_later() {
    let mut world = World::new(0);
    beats(&[roomy, full])(&mut world);
    open(&mut world, "s", "small", Policy::AllowCpu);
    world.keep = |e| matches!(e, Effect::Save { .. } | Effect::Load { .. });
    world.seconds(33, beats(&[fallen, roomy]));
    let record = world.record("s").clone();
    assert!(matches!(world.kept.pop(), Some(Effect::Save { .. })), "it is to move");
    world.core.saved(&id("s"), Err(SaveError::Conflict), world.now);
    world.run();
    world.kept.clear();
    let found = Loaded { record: Some((record, 99)), ..Loaded::default() };
    world.core.loaded(&id("s"), Ok(found), world.now);
    world.keep = |_| false;
    world.answer_kept();
    assert_eq!(owner(&world, "s"), "g0", "as the key says");
    // Its card is back, of which its worker tells; then the card is lost for good.
    world.seconds(5, beats(&[roomy, roomy]));
    world.seconds(1, beats(&[lost, roomy]));
    assert_eq!((owner(&world, "s").as_str(), world.told(What::Restored)), ("g1", 0));
}

#[test]
fn a_lost_device_is_unhealthy_and_its_work_moves() {
    let mut world = World::new(0);
    beats(&[roomy, roomy])(&mut world);
    open(&mut world, "s", "small", Policy::ExactModel);
    assert_eq!(owner(&world, "s"), "g0");
    world.seconds(1, beats(&[roomy, roomy]));
    world.wait(200 * MS);
    beats(&[lost, roomy])(&mut world);
    let why: Vec<_> =
        world.told.iter().filter(|e| e.what == What::Unhealthy).map(|e| e.detail["why"].clone()).collect();
    assert_eq!(why, ["device_lost: off the bus"]);
    assert_eq!(owner(&world, "s"), "g1", "at once");
    world.seconds(3, beats(&[roomy, roomy]));
    assert_eq!(world.told(What::Recovered), 1);
}

#[test]
fn what_is_pressed_away_does_not_come_back_while_the_pressure_lasts() {
    let mut world = World::new(0);
    beats(&[roomy, roomy])(&mut world);
    open(&mut world, "s", "small", Policy::AllowCpu);
    assert_eq!(owner(&world, "s"), "g0");
    world.seconds(2, beats(&[roomy, roomy]));
    world.seconds(1, beats(&[pressed, roomy]));
    assert_eq!((owner(&world, "s").as_str(), world.finish_ms), ("g1", 2_000), "what was begun is finished");
    // Now the other one is pressed too: there is nowhere to go, and nothing goes to and fro.
    world.seconds(60, beats(&[pressed, pressed]));
    assert_eq!((owner(&world, "s").as_str(), world.told(What::Moved)), ("g1", 1));
    let options = SessionOptions { model: Some("small".to_owned()), ..SessionOptions::default() };
    world.ask(99, "new", Asked::Open(Box::new(options), None));
    assert_eq!(refused(world.answers.pop().map(|(_, a)| a)), FailureClass::NoCapacity);
    world.seconds(2, beats(&[pressed, roomy]));
    assert_eq!((owner(&world, "s").as_str(), world.told(What::Moved)), ("g1", 1));
}

/// A successor that finds this key, and its session held by its worker or not.
fn taken_over(record: &SessionRecord) -> World {
    let mut world = World::new(0);
    let loaded = Loaded { record: Some((record.clone(), 9)), chain: None, last: Some((1, true)) };
    world.core.recover(loaded, world.now);
    world
}

#[test]
fn a_successor_does_not_tell_again_and_takes_back_what_its_predecessor_gave() {
    let mut world = World::new(0);
    beats(&[crowded])(&mut world);
    open(&mut world, "s", "medium", Policy::AllowCpu);
    let record = world.record("s").clone();
    let class = FailureClass::ModelDoesNotFit;
    let small = Instead { asked: Some("medium".into()), model: Some("small".into()), cpu: false, class };
    assert_eq!(record.instead, Some(small));

    let mut world = taken_over(&record);
    world.seconds(10, beats(&[crowded]));
    assert_eq!((world.record("s").epoch, world.told(What::Degraded)), (1, 0));
    world.seconds(35, beats(&[roomy]));
    assert_eq!((world.record("s").epoch, world.told(What::Degraded), world.told(What::Restored)), (2, 0, 1));

    // Its worker dies: another one gives the same, which is no news.
    let mut world = taken_over(&record);
    world.seconds(3, beats(&[crowded]));
    world.seconds(6, |w| {
        let held = held_by(w, "g1");
        w.beat(1, |b| {
            b.held = held;
            crowded(b);
        });
    });
    assert_eq!((owner(&world, "s").as_str(), world.told(What::Degraded)), ("g1", 0));

    // Its worker never got it: then nobody can have told.
    let mut world = taken_over(&record);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    world.seconds(4, |w| w.beat(0, crowded));
    let Some(Effect::Ask { assignment, .. }) = world.kept.first() else { panic!("asked again") };
    assert_eq!(assignment.options.model.as_deref(), Some("small"), "the same as before");
    world.keep = |_| false;
    world.answer_kept();
    assert_eq!(world.told(What::Degraded), 1);
}

#[test]
fn who_is_refused_everywhere_is_told_nothing_of_stand_ins() {
    let mut world = World::new(0);
    beats(&[crowded])(&mut world);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    let options = SessionOptions { model: Some("medium".to_owned()), ..SessionOptions::default() };
    world.ask(1, "s", Asked::Open(Box::new(options), None));
    let Some(Effect::Ask { worker, assignment }) = world.kept.pop() else { panic!("asked") };
    let no = AskReply::Refused(Failure::new(FailureClass::NoCapacity, "no permit"));
    world.audio("s", 1);
    world.core.asked(&id("s"), assignment.epoch, &worker, no, world.now);
    world.run();
    assert_eq!((world.state("s"), world.record("s").instead.clone()), (SessionState::Waiting, None));
    world.keep = |_| false;
    world.seconds(4, beats(&[roomy]));
    assert_eq!(
        (world.state("s"), world.told(What::Degraded), world.told(What::Restored)),
        (SessionState::Assigned, 0, 0)
    );
}

#[test]
fn a_gpu_of_a_service_that_runs_on_its_cpu_calls_the_reserve() {
    let service = crate::config::ServiceConfig {
        gpus: vec!["g0".to_owned()],
        reserves: vec!["g1".to_owned()],
        cpu: false,
        ..crate::config::ServiceConfig::default()
    };
    let config = DispatcherConfig { services: [("asr".to_owned(), service)].into(), ..DispatcherConfig::default() };
    let mut world = World::new(0);
    world.core = Core::new(config, "d".to_owned(), Subjects::new("asr.v1"));
    world.seconds(2, beats(&[roomy, roomy]));
    world.seconds(2, beats(&[fallen, roomy]));
    open(&mut world, "s", "small", Policy::AllowCpu);
    assert_eq!(owner(&world, "s"), "g1");
    world.seconds(2, beats(&[fallen, full]));
    let options = SessionOptions { model: Some("small".to_owned()), ..SessionOptions::default() };
    world.ask(50, "new", Asked::Open(Box::new(options), None));
    assert!(matches!(world.answers.last(), Some((_, Answer::Refused(_)))), "the map says no CPU");
}

#[test]
fn a_worker_that_was_drained_leaves_without_a_death() {
    let mut world = World::new(2);
    world.seconds(2, |w| w.beat(0, |b| b.draining = true));
    world.seconds(8, |w| w.beat(1, |_| ()));
    let fleet = |what| world.told.iter().filter(|e| e.scope == Scope::Fleet && e.what == what && e.id == "g0").count();
    assert_eq!((fleet(What::Dead), fleet(What::Suspect), fleet(What::Ended)), (0, 0, 1));
    assert!(world.core.fleet.is_dead(&worker("g0", "i")), "its name is used up");
    assert!(world.kept(|e| matches!(e, Effect::RemoveConsumers { .. })) > 0);
}
