use proptest::prelude::*;
use voxfleet_schema::fleet::Residency;

use super::*;
use crate::testing::{beat, model};

struct Gpu {
    name: WorkerName,
    beat: Heartbeat,
    used: u32,
}

fn gpus(count: u32) -> Vec<Gpu> {
    (0..count)
        .map(|n| {
            let mut beat = beat(&format!("g{n}"), "i");
            beat.device.index = Some(n);
            Gpu { name: beat.worker(), beat, used: 0 }
        })
        .collect()
}

fn candidates(gpus: &[Gpu]) -> Vec<Candidate<'_>> {
    gpus.iter()
        .map(|g| Candidate {
            name: &g.name,
            heartbeat: &g.beat,
            health: WorkerHealth::Alive,
            used: g.used,
            slots: g.beat.slots.total,
            superseded: false,
            refused: false,
        })
        .collect()
}

fn pick(gpus: &[Gpu], options: &SessionOptions) -> Result<usize, Failure> {
    route(Request { options, vad: None, live: true }, &candidates(gpus), &DispatcherConfig::default()).pick
}

fn class(gpus: &[Gpu], options: &SessionOptions) -> FailureClass {
    pick(gpus, options).expect_err("refused").class
}

fn wants(model: &str, policy: Policy) -> SessionOptions {
    SessionOptions { model: Some(model.to_owned()), policy, ..SessionOptions::default() }
}

#[test]
fn sixteen_sessions_land_in_turns_and_the_seventeenth_is_refused() {
    let mut fleet = gpus(4);
    fleet.reverse();
    let options = SessionOptions::default();
    for n in 0..16u32 {
        let at = pick(&fleet, &options).expect("room");
        assert_eq!(fleet[at].beat.device.index, Some(n % 4), "session {n}");
        fleet[at].used += 1;
    }
    let failure = pick(&fleet, &options).expect_err("full");
    assert_eq!(failure.class, FailureClass::NoCapacity);
    assert_eq!(failure.message, "No GPU resources available");
    assert_eq!(failure.retry_after_ms, Some(1_000));
}

#[test]
fn each_filter_names_its_reason() {
    let hot = |g: &mut Gpu| g.beat.device.temperature_c = Some(83);
    let slow = |g: &mut Gpu| {
        g.used = 1;
        (g.beat.engine.decode_rate, g.beat.engine.decode_rate_age_ms) = (Some(0.5), Some(59_999));
    };
    let full = |g: &mut Gpu| g.used = 4;
    let other_vad = |g: &mut Gpu| g.beat.engine.vad = VadKind::Energy;
    let no_model = |g: &mut Gpu| g.beat.models.clear();
    let failed = |g: &mut Gpu| g.beat.models[0].state = Residency::Failed;
    let tight = |g: &mut Gpu| g.beat.device.free_mb = 2_400 + 851;
    let tiny = |g: &mut Gpu| g.beat.device.total_mb = 900;
    type Change = fn(&mut Gpu);
    let cases: [(Change, Refusal); 8] = [
        (hot, Refusal::TooHot),
        (slow, Refusal::TooSlow),
        (full, Refusal::NoSlot),
        (other_vad, Refusal::OtherVad),
        (no_model, Refusal::ModelNotHere),
        (failed, Refusal::ModelNotHere),
        (tight, Refusal::ModelDoesNotFitNow),
        (tiny, Refusal::ModelTooLarge),
    ];
    let options = SessionOptions::default();
    let request = Request { options: &options, vad: Some(VadKind::Silero), live: true };
    for (change, refusal) in cases {
        let mut fleet = gpus(2);
        change(&mut fleet[0]);
        let decision = route(request, &candidates(&fleet), &DispatcherConfig::default());
        assert_eq!(decision.reasons[0], Err(refusal));
        assert_eq!(decision.pick, Ok(1));
    }
    for (used, age_ms) in [(1, 60_000), (0, 1)] {
        let mut fleet = gpus(1);
        fleet[0].used = used;
        (fleet[0].beat.engine.decode_rate, fleet[0].beat.engine.decode_rate_age_ms) = (Some(0.5), Some(age_ms));
        assert_eq!(pick(&fleet, &options), Ok(0), "an old rate says nothing, nor does that of work that is gone");
    }
}

#[test]
fn only_the_alive_take_new_work() {
    let fleet = gpus(1);
    let options = SessionOptions::default();
    for health in [
        WorkerHealth::Joining,
        WorkerHealth::Suspect,
        WorkerHealth::Dead,
        WorkerHealth::Draining,
        WorkerHealth::Unhealthy,
        WorkerHealth::Unknown,
    ] {
        let mut one = candidates(&fleet);
        one[0].health = health;
        let decision = route(Request { options: &options, vad: None, live: true }, &one, &DispatcherConfig::default());
        assert_eq!(decision.reasons, [Err(Refusal::NotAlive(health))]);
        assert_eq!(decision.pick.expect_err("nobody").class, FailureClass::NoWorkers);
    }
    assert_eq!(class(&[], &options), FailureClass::NoWorkers);
}

#[test]
fn refusals_tell_apart_what_waiting_cures() {
    let mut fleet = gpus(1);
    assert_eq!(class(&fleet, &wants("nothing", Policy::AllowCpu)), FailureClass::ModelMissing);
    fleet[0].beat.models = vec![model("large", Residency::Available, 30_000)];
    assert_eq!(class(&fleet, &wants("large", Policy::ExactModel)), FailureClass::ModelDoesNotFit);
    fleet[0].beat.models[0].expected_mb = 19_000;
    assert_eq!(class(&fleet, &wants("large", Policy::ExactModel)), FailureClass::NoCapacity);
    let mut refused = candidates(&fleet);
    refused[0].refused = true;
    let options = SessionOptions::default();
    let decision = route(Request { options: &options, vad: None, live: true }, &refused, &DispatcherConfig::default());
    assert_eq!(decision.pick.expect_err("refused").class, FailureClass::NoCapacity);
}

#[test]
fn a_smaller_model_stands_in_where_the_policy_lets_it() {
    let mut fleet = gpus(1);
    fleet[0].beat.models =
        vec![model("medium", Residency::Available, 30_000), model("base", Residency::Available, 388)];
    assert_eq!(class(&fleet, &wants("medium", Policy::ExactModel)), FailureClass::ModelDoesNotFit);
    assert_eq!(pick(&fleet, &wants("medium", Policy::AllowSmaller)), Ok(0));
    assert_eq!(pick(&fleet, &wants("medium", Policy::AllowCpu)), Ok(0));
    let config = DispatcherConfig::default();
    assert_eq!(stand_in(&wants("medium", Policy::AllowCpu), &fleet[0].beat, &config), Some("base"));
    assert_eq!(stand_in(&wants("base", Policy::AllowCpu), &fleet[0].beat, &config), None, "as asked");
    fleet[0].beat.models.remove(0);
    fleet[0].used = 4;
    let full = class(&fleet, &wants("medium", Policy::AllowSmaller));
    assert_eq!(full, FailureClass::NoCapacity, "what stands in is only busy");
    assert_eq!(class(&fleet, &wants("medium", Policy::ExactModel)), FailureClass::ModelMissing);
    fleet.extend(gpus(2).pop());
    fleet[0].used = 0;
    fleet[1].used = 3;
    fleet[1].beat.models = vec![model("medium", Residency::Available, 2_000)];
    assert_eq!(pick(&fleet, &wants("medium", Policy::AllowSmaller)), Ok(1), "what was asked for comes first");
}

#[test]
fn cpus_come_last_and_only_where_allowed() {
    let mut fleet = gpus(2);
    fleet[0].beat.device.index = None;
    fleet[0].beat.host = "a".into();
    fleet[1].used = 3;
    assert_eq!(pick(&fleet, &wants("small", Policy::AllowCpu)), Ok(1), "a fuller gpu before an empty cpu");
    assert_eq!(pick(&fleet, &wants("small", Policy::ForceCpu)), Ok(0));
    fleet[1].used = 4;
    assert_eq!(pick(&fleet, &wants("small", Policy::AllowCpu)), Ok(0));
    assert_eq!(class(&fleet, &wants("small", Policy::ExactModel)), FailureClass::NoCapacity);
    assert_eq!(pick(&fleet[..1], &wants("small", Policy::ExactModel)), Ok(0), "a fleet of cpus");
}

#[test]
fn the_score_goes_by_share_then_pressure_then_warmth_then_memory() {
    let options = SessionOptions::default();
    let mut fleet = gpus(2);
    fleet[1].beat.device.free_mb += 1;
    assert_eq!(pick(&fleet, &options), Ok(1), "free memory");
    fleet[0].beat.models[0] = model("small", Residency::Loaded, 852);
    assert_eq!(pick(&fleet, &options), Ok(0), "warm before memory");
    fleet[0].beat.device.used_by_others_mb = 21_000;
    assert_eq!(pick(&fleet, &options), Ok(1), "pressure before warm");
    fleet[1].used = 1;
    assert_eq!(pick(&fleet, &options), Ok(0), "share before pressure");
    fleet[0].used = 2;
    fleet[0].beat.slots.total = 16;
    assert_eq!(pick(&fleet, &options), Ok(0), "a share, not a count");
}

#[test]
fn of_two_incarnations_the_newest_that_can_takes_it() {
    let options = SessionOptions::default();
    let mut fleet = vec![gpus(1).remove(0), gpus(1).remove(0)];
    fleet[1].name.incarnation = voxfleet_schema::id::Incarnation::new("j").expect("id");
    fleet[1].used = 3;
    let both = |fleet: &[Gpu]| {
        let mut both = candidates(fleet);
        both[0].superseded = true;
        route(Request { options: &options, vad: None, live: true }, &both, &DispatcherConfig::default()).pick
    };
    assert_eq!(both(&fleet), Ok(1));
    fleet[1].used = 4;
    assert_eq!(both(&fleet), Ok(0));
}

#[test]
fn an_explanation_names_every_candidate() {
    let mut fleet = gpus(3);
    fleet[2].used = 4;
    let options = SessionOptions::default();
    let candidates = candidates(&fleet);
    let decision =
        route(Request { options: &options, vad: None, live: true }, &candidates, &DispatcherConfig::default());
    let rows = explain(&candidates, &decision);
    assert_eq!(rows[0]["chosen"], true);
    assert_eq!(rows[1]["chosen"], false);
    assert_eq!(rows[2]["refused"], "no free slot");
}

proptest! {
    #[test]
    fn no_slot_is_given_twice_and_none_is_refused_while_one_is_free(
        slots in prop::collection::vec(0u32..6, 0..8),
        requests in 0usize..60,
        order in any::<prop::sample::Index>(),
    ) {
        let mut fleet = gpus(slots.len() as u32);
        for (gpu, total) in fleet.iter_mut().zip(&slots) {
            gpu.beat.slots.total = *total;
        }
        if !fleet.is_empty() {
            let by = order.index(fleet.len());
            fleet.rotate_left(by);
        }
        let room: u32 = slots.iter().sum();
        for n in 0..requests {
            match pick(&fleet, &SessionOptions::default()) {
                Ok(at) => {
                    prop_assert!(fleet[at].used < fleet[at].beat.slots.total);
                    let before = |g: &Gpu| f64::from(g.used) / f64::from(g.beat.slots.total);
                    let best = fleet.iter().filter(|g| g.used < g.beat.slots.total).map(before).fold(1.0, f64::min);
                    prop_assert!(before(&fleet[at]) <= best);
                    fleet[at].used += 1;
                }
                Err(_) => prop_assert!(n as u32 >= room),
            }
        }
        let placed: u32 = fleet.iter().map(|g| g.used).sum();
        prop_assert_eq!(placed, room.min(requests as u32));
    }

    #[test]
    fn the_order_of_candidates_does_not_matter(used in prop::collection::vec(0u32..5, 1..9), turn in 0usize..9) {
        let mut fleet = gpus(used.len() as u32);
        for (gpu, used) in fleet.iter_mut().zip(&used) {
            gpu.used = *used;
        }
        let name = |fleet: &[Gpu]| pick(fleet, &SessionOptions::default()).ok().map(|at| fleet[at].name.clone());
        let first = name(&fleet);
        let len = fleet.len();
        fleet.rotate_left(turn % len);
        prop_assert_eq!(name(&fleet), first);
    }
}
