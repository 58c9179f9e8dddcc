mod device;
mod random;

use voxfleet_schema::{
    device::Pressure,
    fleet::{EngineName, Heartbeat, Residency},
    transcript::SpeakersBy,
};

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

fn seen(gpu: &Gpu) -> Seen<'_> {
    Seen {
        name: &gpu.name,
        heartbeat: &gpu.beat,
        health: WorkerHealth::Alive,
        suspect_at: Duration::MAX,
        superseded: false,
        sessions: gpu.used,
        jobs: 0,
        promised: &[],
        duty: Duty::Anyone,
        reserve_percent: 10,
    }
}

fn roster(gpus: &[Gpu]) -> Roster {
    roster_of(gpus.iter().map(seen))
}

fn roster_of<'a>(seen: impl IntoIterator<Item = Seen<'a>>) -> Roster {
    let mut roster = Roster::default();
    for one in seen {
        roster.put(one, &DispatcherConfig::default());
    }
    roster
}

fn route(roster: &Roster, request: &Request<'_>) -> Result<Slot, Failure> {
    roster.route(request, Duration::ZERO, &DispatcherConfig::default()).map(|pick| pick.slot)
}

fn pick(gpus: &[Gpu], options: &SessionOptions) -> Result<usize, Failure> {
    route(&roster(gpus), &Request::new(options, true))
}

/// What is said of each, in the order in which they were put in.
fn reasons(roster: &Roster, request: &Request<'_>) -> Vec<Option<String>> {
    let told = roster.explain(request, None, Duration::ZERO, Rows::All);
    let rows = told.as_array().expect("rows");
    let of = |name: &WorkerName| rows.iter().find(|r| r["gpu_id"] == name.gpu_id.as_str()).expect("a row");
    roster.who.iter().map(|who| of(&who.name)["refused"].as_str().map(str::to_owned)).collect()
}

fn class(gpus: &[Gpu], options: &SessionOptions) -> FailureClass {
    pick(gpus, options).expect_err("refused").class
}

fn wants(model: &str, policy: Policy) -> SessionOptions {
    SessionOptions { model: Some(model.to_owned()), policy, ..SessionOptions::default() }
}

fn instead(asked: &str, model: &str, class: FailureClass) -> Option<Instead> {
    Some(Instead { asked: Some(asked.to_owned()), model: Some(model.to_owned()), cpu: false, class })
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
    let other_engine = |g: &mut Gpu| g.beat.models[0].engine = Some("ct2".to_owned());
    let deaf = |g: &mut Gpu| g.beat.engine.speakers = SpeakersBy::None;
    let no_model = |g: &mut Gpu| g.beat.models.clear();
    let failed = |g: &mut Gpu| g.beat.models[0].state = Residency::Failed;
    let missing = |g: &mut Gpu| g.beat.models[0].state = Residency::Missing;
    let fetching = |g: &mut Gpu| g.beat.models[0].state = Residency::Fetching;
    let no_room = |g: &mut Gpu| g.beat.models[0].state = Residency::NoRoom;
    let pressed = |g: &mut Gpu| g.beat.device.pressure = Some(Pressure::NoNewWork);
    let tight = |g: &mut Gpu| g.beat.device.free_mb = 2_400 + 851;
    let tiny = |g: &mut Gpu| g.beat.device.total_mb = 900;
    type Change = fn(&mut Gpu);
    let cases: [(Change, Refusal); 14] = [
        (hot, Refusal::TooHot),
        (slow, Refusal::TooSlow),
        (full, Refusal::NoSlot),
        (other_vad, Refusal::OtherVad),
        (other_engine, Refusal::OtherEngine),
        (deaf, Refusal::NoSpeakers),
        (no_model, Refusal::ModelNotHere),
        (failed, Refusal::ModelFailed),
        (missing, Refusal::ModelMissing),
        (fetching, Refusal::ModelBeingFetched),
        (no_room, Refusal::ModelHasNoRoom),
        (pressed, Refusal::TenantPressure),
        (tight, Refusal::ModelDoesNotFitNow),
        (tiny, Refusal::ModelTooLarge),
    ];
    let options = SessionOptions { diarize: Diarize::On, ..SessionOptions::default() };
    let (vad, engine) = (Some(VadKind::Silero), EngineName::of(&gpus(1)[0].beat.engine.kind));
    let request = Request { vad, engine, ..Request::new(&options, true) };
    for (change, refusal) in cases {
        let mut fleet = gpus(2);
        change(&mut fleet[0]);
        let roster = roster(&fleet);
        assert_eq!(reasons(&roster, &request), [Some(refusal.as_str().to_owned()), None]);
        assert_eq!(route(&roster, &request), Ok(1));
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
    for (health, told) in [
        (WorkerHealth::Joining, "joining"),
        (WorkerHealth::Suspect, "suspect"),
        (WorkerHealth::Dead, "dead"),
        (WorkerHealth::Draining, "draining"),
        (WorkerHealth::Unhealthy, "unhealthy"),
        (WorkerHealth::Unknown, "not alive"),
    ] {
        let roster = roster_of([Seen { health, ..seen(&fleet[0]) }]);
        let request = Request::new(&options, true);
        assert_eq!(reasons(&roster, &request), [Some(told.to_owned())]);
        assert_eq!(route(&roster, &request).expect_err("nobody").class, FailureClass::NoWorkers);
    }
    let roster = roster_of([Seen { suspect_at: Duration::from_secs(1), ..seen(&fleet[0]) }]);
    let at = |ms| roster.route(&Request::new(&options, true), Duration::from_millis(ms), &DispatcherConfig::default());
    assert!(at(999).is_ok() && at(1_000).is_err(), "silence counts between two heartbeats too");
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
    let options = SessionOptions::default();
    let refused = Request { left_out: &[0], ..Request::new(&options, true) };
    assert_eq!(route(&roster(&fleet), &refused).expect_err("refused").class, FailureClass::NoCapacity);
}

#[test]
fn a_smaller_model_stands_in_where_the_policy_lets_it() {
    let mut fleet = gpus(1);
    fleet[0].beat.models =
        vec![model("medium", Residency::Available, 30_000), model("base", Residency::Available, 388)];
    assert_eq!(class(&fleet, &wants("medium", Policy::ExactModel)), FailureClass::ModelDoesNotFit);
    assert_eq!(pick(&fleet, &wants("medium", Policy::AllowSmaller)), Ok(0));
    assert_eq!(pick(&fleet, &wants("medium", Policy::AllowCpu)), Ok(0));
    let one = roster(&fleet);
    let runs = |options: &SessionOptions| {
        one.instead(&Request::new(options, true), &fleet[0].name, Duration::ZERO).and_then(|instead| instead.model)
    };
    assert_eq!(runs(&wants("medium", Policy::AllowCpu)).as_deref(), Some("base"));
    assert_eq!(runs(&wants("base", Policy::AllowCpu)), None, "as asked");
    let options = wants("large-v3-turbo", Policy::AllowCpu);
    let picked = one.route(&Request::new(&options, true), Duration::ZERO, &DispatcherConfig::default());
    assert_eq!(picked, Ok(Pick { slot: 0, instead: instead("large-v3-turbo", "base", FailureClass::ModelMissing) }));
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
fn a_gpu_that_has_died_is_no_leave_to_use_a_cpu() {
    let mut fleet = gpus(2);
    fleet[0].beat.device.index = None;
    let mut all = roster(&fleet);
    all.remove(&fleet[1].name);
    for policy in [Policy::ExactModel, Policy::AllowSmaller] {
        let options = wants("small", policy);
        let failure = route(&all, &Request::new(&options, true)).expect_err("it waits for the gpu");
        assert_eq!((failure.class, failure.retry_after_ms), (FailureClass::NoWorkers, Some(1_000)));
    }
    for policy in [Policy::AllowCpu, Policy::ForceCpu] {
        assert_eq!(route(&all, &Request::new(&wants("small", policy), true)), Ok(0));
    }
    let mut known = roster(&fleet[..1]);
    known.remember(&fleet[1].name.gpu_id, true);
    let options = wants("small", Policy::ExactModel);
    assert!(route(&known, &Request::new(&options, true)).is_err(), "a predecessor has heard it");

    fleet[1].beat.engine.effective_device = "cpu".to_owned();
    assert_eq!(class(&fleet[1..], &options), FailureClass::NoWorkers, "fallen back, the only one");
}

#[test]
fn with_a_map_a_service_has_the_gpus_that_it_names() {
    let mut fleet = gpus(1);
    fleet[0].beat.device.index = None;
    let cpu = roster_of([Seen { duty: Duty::Cpu, ..seen(&fleet[0]) }]);
    let options = wants("small", Policy::ExactModel);
    let of = |gpus| Request { service: Some(Service { number: 0, cpu: true, gpus }), ..Request::new(&options, true) };
    assert_eq!(route(&cpu, &of(false)), Ok(0), "a service of CPUs");
    assert_eq!(route(&cpu, &of(true)).expect_err("waits").class, FailureClass::NoWorkers);
}

#[test]
fn the_score_goes_by_share_then_pressure_then_warmth_then_memory() {
    let options = SessionOptions::default();
    let mut fleet = gpus(2);
    fleet[1].beat.device.free_mb += 1;
    assert_eq!(pick(&fleet, &options), Ok(0), "a little more memory is nothing");
    fleet[1].beat.device.free_mb += 2_000;
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

fn twins() -> Vec<Gpu> {
    let mut twins = vec![gpus(1).remove(0), gpus(1).remove(0)];
    twins[1].name.incarnation = voxfleet_schema::id::Incarnation::new("j").expect("id");
    twins
}

/// The first is the older one.
fn both(twins: &[Gpu]) -> Roster {
    roster_of([Seen { superseded: true, ..seen(&twins[0]) }, seen(&twins[1])])
}

#[test]
fn of_two_incarnations_the_newest_that_can_takes_it() {
    let options = SessionOptions::default();
    let request = Request::new(&options, true);
    let mut fleet = twins();
    fleet[1].used = 3;
    assert_eq!(route(&both(&fleet), &request), Ok(1));
    fleet[1].beat.device.temperature_c = Some(90);
    assert_eq!(route(&both(&fleet), &request), Ok(0));
}

#[test]
fn two_incarnations_on_one_gpu_have_its_slots_between_them() {
    let options = SessionOptions::default();
    let request = Request::new(&options, true);
    let mut fleet = twins();
    (fleet[0].used, fleet[1].used) = (3, 1);
    let full = both(&fleet);
    assert_eq!(route(&full, &request).expect_err("full").class, FailureClass::NoCapacity);
    assert_eq!(full.free(true, Duration::ZERO), 0);
    let moves = Request { leaves: Some(&fleet[0].name), ..request };
    assert_eq!(route(&full, &moves), Ok(1), "its own slot comes free");
    fleet[1].used = 0;
    assert_eq!(both(&fleet).free(true, Duration::ZERO), 1);
}

#[test]
fn memory_that_is_spoken_for_is_not_given_twice() {
    let mut fleet = gpus(1);
    fleet[0].beat.models = vec![
        model("a", Residency::Available, 10_000),
        model("b", Residency::Available, 10_000),
        model("c", Residency::Available, 7_600),
    ];
    let (a, b, c) = (wants("a", Policy::ExactModel), wants("b", Policy::ExactModel), wants("c", Policy::ExactModel));
    let fits = |roster: &Roster, options| route(roster, &Request::new(options, true)).is_ok();
    let promised = roster_of([Seen { promised: &[Some("a"), Some("a")], ..seen(&fleet[0]) }]);
    assert!(fits(&promised, &a) && fits(&promised, &c), "once, however many need it");
    assert!(!fits(&promised, &b), "17,600 MB free, 10,000 of them spoken for");
    let default = roster_of([Seen { promised: &[None], ..seen(&fleet[0]) }]);
    assert!(!fits(&default, &b), "the first of its list is its default");
    fleet[0].beat.models[0].state = Residency::Loading;
    assert!(!fits(&roster(&fleet), &b), "what it has taken so far is not known");
    fleet[0].beat.models[0].state = Residency::Loaded;
    let loaded = roster_of([Seen { promised: &[Some("a")], ..seen(&fleet[0]) }]);
    assert!(fits(&loaded, &b), "its heartbeat counts what is loaded");
}

#[test]
fn two_incarnations_on_one_gpu_have_one_memory() {
    let mut fleet = twins();
    for twin in &mut fleet {
        twin.beat.models = vec![model("a", Residency::Available, 10_000)];
    }
    let options = wants("a", Policy::ExactModel);
    let promised = [Some("a")];
    let roster = roster_of([Seen { superseded: true, promised: &promised, ..seen(&fleet[0]) }, seen(&fleet[1])]);
    assert_eq!(route(&roster, &Request::new(&options, true)), Ok(0), "only where it is promised already");
    fleet[0].beat.models[0].state = Residency::Loaded;
    fleet[0].beat.device.free_mb = 10_000;
    let roster = both(&fleet);
    assert_eq!(route(&roster, &Request::new(&options, true)), Ok(0), "the other's heartbeat is older");
}

#[test]
fn a_roster_forgets_who_left_and_keeps_its_order() {
    let options = SessionOptions::default();
    let request = Request::new(&options, true);
    let fleet = gpus(5);
    let mut all = roster(&fleet);
    for gone in [0, 3] {
        all.remove(&fleet[gone].name);
        all.remove(&fleet[gone].name);
    }
    let next = |roster: &Roster| roster.name(route(roster, &request).expect("room")).gpu_id.to_string();
    assert_eq!((next(&all), all.len()), ("g1".to_owned(), 3));
    let order: Vec<_> = all.explain(&request, None, Duration::ZERO, Rows::All).as_array().expect("rows").clone();
    assert_eq!(order.iter().map(|r| r["gpu_id"].as_str().expect("id")).collect::<Vec<_>>(), ["g1", "g2", "g4"]);
    all.put(Seen { sessions: 1, ..seen(&fleet[1]) }, &DispatcherConfig::default());
    assert_eq!(next(&all), "g2");
}

#[test]
fn a_heartbeat_that_changes_nothing_offers_nothing() {
    let mut fleet = gpus(1);
    let config = DispatcherConfig::default();
    let mut all = Roster::default();
    assert!(all.put(seen(&fleet[0]), &config), "it is new");
    fleet[0].beat.device.free_mb -= 7;
    fleet[0].beat.seq += 1;
    assert!(!all.put(seen(&fleet[0]), &config));
    assert!(!all.put(Seen { sessions: 1, ..seen(&fleet[0]) }, &config), "less than before");
    assert!(all.put(seen(&fleet[0]), &config));
    fleet[0].beat.device.free_mb = 900;
    all.put(seen(&fleet[0]), &config);
    fleet[0].beat.device.free_mb = 9_000;
    assert!(all.put(seen(&fleet[0]), &config), "its model fits again");
    let full = Seen { sessions: 4, jobs: 1, ..seen(&fleet[0]) };
    all.put(full, &config);
    fleet[0].beat.models.push(model("base", Residency::Available, 388));
    let full = Seen { sessions: 4, jobs: 1, ..seen(&fleet[0]) };
    assert!(!all.put(full, &config), "nobody could use it");
}

#[test]
fn an_explanation_names_every_candidate() {
    let mut fleet = gpus(3);
    fleet[2].used = 4;
    let options = SessionOptions::default();
    let rows = roster(&fleet).explain(&Request::new(&options, true), Some(0), Duration::ZERO, Rows::Short);
    assert_eq!(rows[0]["chosen"], true);
    assert_eq!(rows[1]["chosen"], false);
    assert_eq!(rows[2]["refused"], "no free slot");
}

#[test]
fn of_a_large_fleet_an_explanation_tells_what_matters() {
    let mut fleet = gpus(200);
    for gpu in &mut fleet[50..150] {
        gpu.used = 4;
    }
    fleet[150].beat.device.temperature_c = Some(99);
    for gpu in &mut fleet[..50] {
        gpu.used = 1;
    }
    let options = SessionOptions::default();
    let request = Request::new(&options, true);
    let all = roster(&fleet);
    let chosen = route(&all, &request).expect("room");
    let short = all.explain(&request, Some(chosen), Duration::ZERO, Rows::Short);
    let rows = short.as_array().expect("rows");
    assert_eq!(rows.len(), 8 + 2 + 1);
    assert_eq!((&rows[0]["chosen"], rows[0]["used"].as_u64()), (&true.into(), Some(0)));
    assert!(rows[1..8].iter().all(|r| r["chosen"] == false && r["used"] == 0));
    let counted = |why: &str| rows.iter().find(|r| r["refused"] == why).map(|r| r["count"].as_u64());
    assert_eq!((counted("no free slot"), counted("too hot")), (Some(Some(100)), Some(Some(1))));
    assert_eq!(rows[10], serde_json::json!({ "gpus": 200, "more_with_room": 99 - 8 }));
    let full = all.explain(&request, Some(chosen), Duration::ZERO, Rows::All);
    assert_eq!(full.as_array().map(Vec::len), Some(200));
}
