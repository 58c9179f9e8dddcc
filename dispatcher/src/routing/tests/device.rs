//! What devices and models are like: which model stands in, who is pressed, whose memory is shared, who has fallen back.

use voxfleet_schema::{
    device::DeviceTrouble,
    fleet::EngineRunState,
    plan::{PlanRequest, Risk},
};

use super::*;

fn picked(gpus: &[Gpu], options: &SessionOptions) -> Option<Instead> {
    let pick = roster(gpus).route(&Request::new(options, true), Duration::ZERO, &DispatcherConfig::default());
    pick.expect("room").instead
}

fn with(models: Vec<voxfleet_schema::fleet::ModelState>) -> Vec<Gpu> {
    let mut fleet = gpus(1);
    fleet[0].beat.models = models;
    fleet
}

#[test]
fn models_stand_in_by_what_their_names_say() {
    use Residency::{Available, Loaded};
    for (asked, here, stands_in) in [
        ("medium.en-q5_0", vec![("small.en", Available, 900)], Some("small.en")),
        ("medium.en-q5_0", vec![("tiny.en", Loaded, 100), ("base", Available, 400)], Some("base")),
        ("large-v3", vec![("small.en", Available, 900), ("tiny", Available, 100)], Some("tiny")),
        ("medium", vec![("small.en", Available, 900)], None),
        ("small", vec![("small-q5_1", Available, 300)], None),
        ("micro.en-q8_0", vec![("tiny.en", Available, 100)], None),
        ("medium.en", vec![("small", Available, 900), ("small.en", Available, 900)], Some("small.en")),
        ("medium", vec![("small-q5_1", Available, 300), ("small", Available, 900)], Some("small")),
        ("ggml-medium", vec![("ggml-small", Available, 30_000), ("ggml-base", Available, 400)], Some("ggml-base")),
    ] {
        let here: Vec<_> = here.into_iter().map(|(name, state, mb)| model(name, state, mb)).collect();
        let fleet = with(here);
        let options = wants(asked, Policy::AllowCpu);
        match stands_in {
            None => assert_eq!(class(&fleet, &options), FailureClass::ModelMissing, "{asked}"),
            Some(other) => {
                assert_eq!(picked(&fleet, &options), instead(asked, other, FailureClass::ModelMissing), "{asked}");
                assert_eq!(class(&fleet, &wants(asked, Policy::ExactModel)), FailureClass::ModelMissing, "{asked}");
            }
        }
    }
}

#[test]
fn why_a_smaller_model_runs_is_told_by_its_class() {
    for (state, mb, why) in [
        (Residency::NoRoom, 2_000, FailureClass::OutOfMemory),
        (Residency::Available, 30_000, FailureClass::ModelDoesNotFit),
        (Residency::Missing, 2_000, FailureClass::ModelMissing),
        (Residency::Fetching, 2_000, FailureClass::ModelMissing),
        (Residency::Failed, 2_000, FailureClass::ModelMissing),
    ] {
        let fleet = with(vec![model("medium", state, mb), model("small", Residency::Available, 852)]);
        for options in [wants("medium", Policy::AllowSmaller), SessionOptions::default()] {
            assert_eq!(picked(&fleet, &options), instead("medium", "small", why), "{state:?}");
        }
        assert!(pick(&fleet, &wants("medium", Policy::ExactModel)).is_err());
    }
}

#[test]
fn who_names_no_model_is_given_the_default_that_the_worker_says() {
    use Residency::{Available, Loaded, Missing};
    let unnamed = SessionOptions { policy: Policy::ExactModel, ..SessionOptions::default() };
    for (says, states, mb, expected) in [
        (Some("b"), [Missing, Available], 400, Ok(0)),
        (Some("b"), [Loaded, Missing], 400, Err(FailureClass::ModelMissing)),
        (Some("b"), [Loaded, Available], 30_000, Err(FailureClass::ModelDoesNotFit)),
        (Some("c"), [Loaded, Available], 400, Err(FailureClass::ModelMissing)),
        (None, [Loaded, Missing], 400, Ok(0)),
        (None, [Missing, Available], 400, Err(FailureClass::ModelMissing)),
    ] {
        let [first, second] = states;
        let mut fleet = with(vec![model("a", first, 100), model("b", second, mb)]);
        fleet[0].beat.default_model = says.map(str::to_owned);
        assert_eq!(pick(&fleet, &unnamed).map_err(|failure| failure.class), expected, "{says:?} {states:?} {mb}");
    }
    let mut fleet = with(vec![model("a", Available, 10_000), model("b", Available, 10_000)]);
    fleet[0].beat.default_model = Some("b".to_owned());
    let promised = roster_of([Seen { promised: &[None], ..seen(&fleet[0]) }]);
    let fits = |model| route(&promised, &Request::new(&wants(model, Policy::ExactModel), true)).is_ok();
    assert_eq!((fits("a"), fits("b")), (false, true), "its memory is spoken for by whoever named none");
}

#[test]
fn what_is_missing_everywhere_is_missing_and_what_comes_is_waited_for() {
    let exact = wants("medium", Policy::ExactModel);
    for (states, expected, comes_again) in [
        ([Residency::Missing, Residency::Missing], FailureClass::ModelMissing, false),
        ([Residency::Missing, Residency::Failed], FailureClass::ModelMissing, false),
        ([Residency::Missing, Residency::Fetching], FailureClass::NoCapacity, true),
        ([Residency::NoRoom, Residency::Missing], FailureClass::NoCapacity, true),
    ] {
        let mut fleet = gpus(2);
        for (gpu, state) in fleet.iter_mut().zip(states) {
            gpu.beat.models = vec![model("medium", state, 2_000)];
        }
        for options in [&exact, &SessionOptions { model: None, ..exact.clone() }] {
            let failure = pick(&fleet, options).expect_err("nobody can run it");
            assert_eq!((failure.class, failure.retry_after_ms.is_some()), (expected, comes_again), "{states:?}");
        }
        let roster = roster(&fleet);
        let could = roster.any_could(&Request::new(&exact, false), Duration::ZERO, |_| true);
        assert_eq!(could, comes_again, "{states:?}");
    }
}

#[test]
fn what_is_being_fetched_for_somebody_has_its_memory() {
    let mut fleet = with(vec![model("a", Residency::Fetching, 10_000), model("b", Residency::Available, 10_000)]);
    let b = wants("b", Policy::ExactModel);
    assert!(pick(&fleet, &b).is_ok());
    let promised = [Some("a")];
    let all = roster_of([Seen { promised: &promised, ..seen(&fleet[0]) }]);
    assert_eq!(route(&all, &Request::new(&b, true)).expect_err("spoken for").class, FailureClass::NoCapacity);
    fleet[0].beat.models[0].state = Residency::NoRoom;
    let all = roster_of([Seen { promised: &promised, ..seen(&fleet[0]) }]);
    assert!(route(&all, &Request::new(&b, true)).is_ok(), "it will not be loaded there");
}

/// Two workers with names of their own, started on the same card.
fn neighbours() -> Vec<Gpu> {
    let mut fleet = gpus(2);
    for gpu in &mut fleet {
        gpu.beat.device.index = Some(0);
        gpu.beat.device.uuid = Some("GPU-5a".to_owned());
        gpu.beat.models = vec![model("a", Residency::Available, 10_000), model("b", Residency::Available, 7_000)];
    }
    fleet
}

#[test]
fn workers_on_one_card_share_its_memory_and_not_their_slots() {
    let mut fleet = neighbours();
    let (a, b) = (wants("a", Policy::ExactModel), wants("b", Policy::ExactModel));
    let config = DispatcherConfig::default();
    let promised = [Some("a")];
    let mut all = roster(&fleet);
    let fits = |all: &Roster, options, name: &WorkerName| {
        all.could_as_asked(&Request::new(options, true), name, Duration::ZERO)
    };
    assert!(fits(&all, &a, &fleet[1].name));
    all.put(Seen { promised: &promised, sessions: 1, ..seen(&fleet[0]) }, &config);
    assert!(!fits(&all, &a, &fleet[1].name), "17,600 MB of the card, 10,000 of them promised to its neighbour");
    assert!(fits(&all, &b, &fleet[1].name));
    assert_eq!(route(&all, &Request::new(&a, true)), Ok(0), "only where it is promised already");
    assert_eq!(all.free(true, Duration::ZERO), 7, "slots are each one's own");
    assert!(all.put(seen(&fleet[0]), &config), "what comes free is free for the neighbour");
    assert!(fits(&all, &a, &fleet[1].name));
    // The neighbour's heartbeat is older than what is loaded now.
    fleet[0].beat.device.free_mb = 8_000;
    all.put(seen(&fleet[0]), &config);
    assert!(!fits(&all, &b, &fleet[1].name));
    assert!(all.remove(&fleet[0].name), "it leaves room");
    assert!(fits(&all, &a, &fleet[1].name));
    for (host, uuid, other) in [("container", "GPU-5a", false), ("host", "GPU-5b", true)] {
        let mut fleet = neighbours();
        (fleet[1].beat.host, fleet[1].beat.device.uuid) = (host.to_owned(), Some(uuid.to_owned()));
        let all = roster_of([Seen { promised: &promised, ..seen(&fleet[0]) }, seen(&fleet[1])]);
        assert_eq!(fits(&all, &a, &fleet[1].name), other, "{host} {uuid}");
    }
}

#[test]
fn a_worker_whose_neighbour_frees_memory_is_news() {
    let fleet = neighbours();
    let config = DispatcherConfig::default();
    let promised = [Some("a")];
    let mut all = roster_of([Seen { promised: &promised, sessions: 4, jobs: 1, ..seen(&fleet[0]) }, seen(&fleet[1])]);
    let full = Seen { sessions: 4, jobs: 1, ..seen(&fleet[0]) };
    assert!(all.put(full, &config), "nothing for itself, and room for the other");
    assert!(!all.put(full, &config));
}

fn fallen(gpu: &mut Gpu, state: EngineRunState) {
    gpu.beat.engine.effective_device = "cpu".to_owned();
    gpu.beat.engine.state = state;
    gpu.beat.device.trouble =
        Some(DeviceTrouble { class: FailureClass::DeviceLost, message: "it fell off the bus".to_owned() });
}

#[test]
fn who_fell_back_is_a_cpu() {
    for state in [EngineRunState::Ready, EngineRunState::Down, EngineRunState::Restarting] {
        let mut fleet = gpus(2);
        fallen(&mut fleet[0], state);
        fleet[1].used = 3;
        assert_eq!(pick(&fleet, &wants("small", Policy::AllowCpu)), Ok(1), "a GPU comes first");
        assert_eq!(pick(&fleet, &wants("small", Policy::ForceCpu)), Ok(0));
        fleet[1].used = 4;
        assert_eq!(class(&fleet, &wants("small", Policy::ExactModel)), FailureClass::NoCapacity);
        let cpu = |class| Some(Instead { asked: Some("small".into()), model: None, cpu: true, class });
        assert_eq!(picked(&fleet, &wants("small", Policy::AllowCpu)), cpu(FailureClass::NoCapacity), "{state:?}");
        assert_eq!(picked(&fleet, &wants("small", Policy::ForceCpu)), None, "as asked");
        assert_eq!(picked(&fleet[..1], &wants("small", Policy::AllowCpu)), cpu(FailureClass::NoWorkers));
    }
    let mut cpus = gpus(1);
    cpus[0].beat.device.index = None;
    assert_eq!(picked(&cpus, &wants("small", Policy::AllowCpu)), None, "a fleet of CPUs stands in for nothing");
}

#[test]
fn an_engine_that_is_not_there_is_where_its_worker_says_that_it_starts() {
    for (device, starts_on_cpu) in [("cpu", true), ("none", false), ("cuda:test", false)] {
        for state in [EngineRunState::Down, EngineRunState::Starting, EngineRunState::Restarting] {
            let mut fleet = gpus(1);
            (fleet[0].beat.engine.effective_device, fleet[0].beat.engine.state) = (device.to_owned(), state);
            // The card is there, and the engine has fallen back for a reason of its own.
            assert_eq!(pick(&fleet, &wants("small", Policy::ForceCpu)).is_ok(), starts_on_cpu, "{device} {state:?}");
            assert_eq!(pick(&fleet, &wants("small", Policy::ExactModel)).is_ok(), !starts_on_cpu, "{device} {state:?}");
        }
    }
}

#[test]
fn who_fell_back_is_not_planned_with_the_figures_of_its_card() {
    let mut fleet = gpus(1);
    fallen(&mut fleet[0], EngineRunState::Down);
    let device = &mut fleet[0].beat.device;
    // What is known last of a card that does not answer.
    (device.free_mb, device.temperature_c, device.pressure) = (0, Some(99), Some(Pressure::MoveAway));
    device.used_by_others_mb = 24_000;
    for policy in [Policy::AllowCpu, Policy::ForceCpu] {
        assert_eq!(pick(&fleet, &wants("small", policy)), Ok(0), "{policy:?}");
    }
    let mut hot = gpus(1);
    hot[0].beat.device.temperature_c = Some(99);
    assert!(pick(&hot, &wants("small", Policy::AllowCpu)).is_err(), "on the card itself it counts");
    let all = roster(&fleet);
    let plan = all.plan(&PlanRequest::default(), Duration::ZERO);
    let told = &plan.workers[0];
    assert_eq!((told.cpu, told.total_mb, told.free_mb, told.refused.as_deref()), (true, 0, 0, None));
    assert_eq!((told.models[0].standing.as_str(), told.models[0].option.sessions), ("fits", 4));
}

#[test]
fn who_fell_back_takes_nothing_from_its_neighbours_on_the_card() {
    let mut fleet = neighbours();
    fleet[0].beat.engine.effective_device = "cpu".to_owned();
    fleet[0].beat.device.free_mb = 0;
    let promised = [Some("a")];
    let all = roster_of([Seen { promised: &promised, ..seen(&fleet[0]) }, seen(&fleet[1])]);
    assert_eq!(route(&all, &Request::new(&wants("a", Policy::ExactModel), true)), Ok(1));
}

#[test]
fn a_service_without_cpus_does_not_use_the_cpu_of_its_gpu() {
    let mut fleet = gpus(1);
    fallen(&mut fleet[0], EngineRunState::Ready);
    let all = roster_of([Seen { duty: Duty::Serves(0), ..seen(&fleet[0]) }]);
    let of = |cpu| Service { number: 0, cpu, gpus: true };
    for (policy, with_cpus, without) in [
        (Policy::AllowCpu, Ok(0), FailureClass::NoWorkers),
        (Policy::ForceCpu, Ok(0), FailureClass::ModelDoesNotFit),
        (Policy::ExactModel, Err(FailureClass::NoWorkers), FailureClass::NoWorkers),
    ] {
        let options = wants("small", policy);
        let ask = |cpu| {
            let request = Request { service: Some(of(cpu)), ..Request::new(&options, true) };
            route(&all, &request).map_err(|failure| failure.class)
        };
        assert_eq!((ask(true), ask(false)), (with_cpus, Err(without)), "{policy:?}");
    }
    let mut named = gpus(1);
    named[0].beat.device.index = None;
    let all = roster_of([Seen { duty: Duty::Serves(0), ..seen(&named[0]) }]);
    let options = wants("small", Policy::AllowCpu);
    let request = Request { service: Some(Service { gpus: false, ..of(false) }), ..Request::new(&options, true) };
    assert_eq!(route(&all, &request), Ok(0), "a CPU worker that it names itself");
}

#[test]
fn a_cpu_that_cannot_keep_up_gets_no_live_session() {
    for policy in [Policy::AllowCpu, Policy::ForceCpu] {
        let options = wants("small", policy);
        let rate = |rate, sessions, jobs, has_fallen| {
            let mut fleet = gpus(1);
            if has_fallen {
                fallen(&mut fleet[0], EngineRunState::Ready)
            } else {
                fleet[0].beat.device.index = None
            }
            (fleet[0].beat.engine.decode_rate, fleet[0].beat.engine.decode_rate_age_ms) = (Some(rate), Some(100));
            fleet[0].beat.job_slots.total = 2;
            let all = roster_of([Seen { sessions, jobs, ..seen(&fleet[0]) }]);
            let ask = |live| route(&all, &Request::new(&options, live)).is_ok();
            (ask(true), ask(false))
        };
        for has_fallen in [false, true] {
            assert_eq!(rate(0.9, 1, 0, has_fallen), (false, true), "a file job need not keep up");
            assert_eq!(rate(0.9, 0, 1, has_fallen), (false, true), "a job takes what it has");
            assert_eq!(rate(1.1, 1, 1, has_fallen), (true, true));
            assert_eq!(rate(0.9, 0, 0, has_fallen), (true, true), "what was under way is over");
        }
    }
}

#[test]
fn a_price_decides_nothing() {
    let mut fleet = gpus(2);
    (fleet[0].beat.price_per_hour, fleet[1].beat.price_per_hour) = (Some(9.0), Some(0.1));
    assert_eq!(pick(&fleet, &SessionOptions::default()), Ok(0));
}

#[test]
fn a_plan_says_what_fits_where() {
    let mut fleet = gpus(3);
    let models = |loaded: Residency| {
        vec![
            model("medium", Residency::Available, 9_000),
            model("small", loaded, 852),
            model("large-v3", Residency::Available, 30_000),
        ]
    };
    fleet[0].beat.models = models(Residency::Loaded);
    fleet[0].used = 1;
    fleet[1].beat.models = models(Residency::Missing);
    fleet[1].beat.models[0].measured = true;
    fleet[1].beat.device.free_mb = 4_000;
    fleet[2].beat.device.pressure = Some(Pressure::MoveAway);
    let all = roster(&fleet);
    let plan = all.plan(&PlanRequest::default(), Duration::ZERO);
    let rows: Vec<_> = plan.options.iter().map(|o| (o.model.as_str(), o.sessions, o.used_mb, o.risk)).collect();
    assert_eq!(
        rows,
        [("large-v3", 0, 0, Risk::Refuse), ("medium", 3, 9_000, Risk::Safe), ("small", 3, 852, Risk::Safe),]
    );
    assert!((plan.options[1].utilization - 0.542).abs() < 1e-9, "4,000 used and 9,000 of 24,000");
    let standings: Vec<_> = plan.workers[1].models.iter().map(|m| (m.standing.as_str(), m.option.risk)).collect();
    assert_eq!(
        standings,
        [
            ("model does not fit in free memory", Risk::Refuse),
            ("model missing", Risk::Refuse),
            ("model larger than the device", Risk::Refuse),
        ]
    );
    assert!(plan.workers[1].models[0].measured && !plan.workers[0].models[0].measured);
    assert_eq!(plan.workers[2].refused.as_deref(), Some("another tenant presses on the card"));
    assert_eq!((plan.workers[0].slots_free, plan.workers[0].reserve_mb), (3, 2_400));

    let one = PlanRequest { model: Some("medium".to_owned()), sessions: Some(2) };
    let plan = all.plan(&one, Duration::ZERO);
    assert_eq!(plan.options.iter().map(|o| (o.model.as_str(), o.sessions)).collect::<Vec<_>>(), [("medium", 2)]);
    assert_eq!(plan.workers[0].models.len(), 1);
    let none = PlanRequest { model: Some("none".to_owned()), sessions: None };
    let plan = all.plan(&none, Duration::ZERO);
    assert_eq!((plan.options[0].sessions, plan.options[0].risk), (0, Risk::Refuse));
}

#[test]
fn a_plan_gives_a_shared_card_out_once() {
    let fleet = neighbours();
    let plan = roster(&fleet).plan(&PlanRequest::default(), Duration::ZERO);
    let sessions: Vec<_> = plan.options.iter().map(|o| (o.model.as_str(), o.sessions)).collect();
    assert_eq!(sessions, [("a", 4), ("b", 8)], "17,600 MB hold one a, and two b");
    let mut tight = gpus(1);
    tight[0].beat.models[0] = model("small", Residency::Loaded, 852);
    tight[0].beat.device.free_mb = 1_000;
    let plan = roster(&tight).plan(&PlanRequest::default(), Duration::ZERO);
    assert_eq!((plan.options[0].risk, plan.options[0].sessions), (Risk::Tight, 4), "neighbours fill the reserve");
}
