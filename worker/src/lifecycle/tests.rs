//! The engine as it looks from outside while no child runs, or when one says something.

use voxfleet_schema::{
    device::DeviceTrouble,
    failure::FailureClass,
    id::{GpuId, StreamId},
    session::Policy,
};

use super::*;
use crate::{
    config::WorkerConfig,
    device::Cores,
    ipc::{EngineKind, FromEngine, ModelFile, SimulatedConfig},
};

/// An engine with models of these names and what it is told of its device.
pub(crate) fn engine(models: &[&str], use_gpu: bool) -> (Engine, watch::Sender<Device>) {
    let file = |name: &&str| ModelFile { name: (*name).to_owned(), path: format!("/nowhere/{name}.bin").into() };
    let config = EngineConfig {
        engine: EngineKind::Simulated,
        models: models.iter().map(file).collect(),
        default_model: models.first().copied().unwrap_or_default().to_owned(),
        silero_model: None,
        diarize: Default::default(),
        onnxruntime: None,
        decode_states: 1,
        decode_threads: 1,
        use_gpu,
        reserve_mb: 0,
        turns: None,
        ct2: Default::default(),
        simulated: SimulatedConfig::default(),
    };
    let exe = Some("/nowhere/voxfleet".into());
    let cores = Cores::new(&WorkerConfig::default(), None);
    let program =
        Program { exe, args: vec!["engine".to_owned()], visible_device: "0".to_owned(), cores, gpu: "g".into() };
    let terms = EngineTerms {
        slots: 2,
        stuck_after: Duration::from_secs(5),
        idle_release: None,
        swap: false,
        waits: Waits { after: Duration::from_secs(60), driver: Duration::from_secs(1_800) },
        reserve_percent: 0,
    };
    let gpu = Device { index: use_gpu.then_some(0), total_mb: 16_000, free_mb: 16_000, ..Device::default() };
    let (figures, device) = watch::channel(gpu);
    (Engine::new(config, program, terms, Budget::new(1 << 20, 1 << 20), device, Arc::default()), figures)
}

fn trouble(class: FailureClass) -> Option<DeviceTrouble> {
    Some(DeviceTrouble { class, message: "gone".to_owned() })
}

fn names(id: &str) -> Names {
    let id = StreamId::new(id).expect("id");
    Names { kind: Kind::Session, id, gpu_id: GpuId::new("g").expect("id") }
}

fn ask(model: &str, policy: Policy) -> Ask {
    Ask { model: model.to_owned(), policy }
}

fn told_device(engine: &Engine) -> String {
    engine.heartbeat_state(Instant::now()).0.effective_device
}

#[tokio::test]
async fn a_lost_gpu_without_an_engine_says_that_the_next_one_runs_on_the_cpu() {
    let (engine, figures) = engine(&["small"], true);
    assert_eq!((engine.status().state, told_device(&engine)), (EngineRunState::Down, "none".to_owned()));
    figures.send_modify(|device| device.trouble = trouble(FailureClass::Unavailable));
    assert_eq!(told_device(&engine), "none", "a driver that is only slow");
    figures.send_modify(|device| device.trouble = trouble(FailureClass::DeviceLost));
    assert_eq!(told_device(&engine), "cpu");

    // Nobody has asked for a child, and still whoever comes learns what he would get.
    engine.restore(None);
    let lent = engine.would(&ask("small", Policy::AllowCpu)).expect("the CPU");
    assert_eq!((lent.on_cpu, lent.because), (true, Some(FailureClass::DeviceLost)));
    let refused = engine.would(&ask("small", Policy::ExactModel)).expect_err("not on its GPU");
    assert_eq!(refused.class, FailureClass::DeviceLost);
    figures.send_modify(|device| device.trouble = None);
    assert_eq!(told_device(&engine), "cpu", "until it is tried again");
}

#[tokio::test]
async fn a_worker_without_a_gpu_has_not_fallen_back() {
    let (engine, _figures) = engine(&["small"], false);
    assert_eq!(told_device(&engine), "none");
}

#[tokio::test]
async fn an_engine_that_cannot_be_started_says_why_and_it_is_not_the_gpu() {
    let (engine, _figures) = engine(&["small"], true);
    for _ in 0..4 {
        assert!(matches!(engine.live(&CancellationToken::new()).await, LifeEnd::NotReady));
    }
    let (state, _) = engine.heartbeat_state(Instant::now());
    let end = state.last_end.expect("an end");
    assert_eq!((end.class, state.ends), (FailureClass::EngineCrash, [(FailureClass::EngineCrash, 4)].into()));
    assert!(end.message.contains("/nowhere/voxfleet") && end.message.contains("No such file"), "{}", end.message);
    assert!(!engine.wants_cpu());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_started_for_a_model_that_has_no_room() {
    let (engine, _figures) = engine(&["small"], true);
    let load = || tokio::time::timeout(Duration::from_secs(1), engine.load("small".to_owned()));
    assert!(load().await.is_err(), "it waits for a child");
    engine.has_no_room("small");
    assert!(matches!(load().await, Ok(Ok(()))), "it asks for none");
}

#[tokio::test]
async fn a_file_that_is_damaged_when_it_is_tried_again_ends_the_trial() {
    let (engine, _figures) = engine(&["small"], true);
    let said = |state| {
        let model = ModelState { name: "small".to_owned(), state, ..ModelState::default() };
        engine.receive(FromEngine::Models(vec![model]));
    };
    let at = |seconds| fallback::Moment { mono: Instant::now() + Duration::from_secs(seconds), wall_ms: 0 };
    let due = |seconds| locked(&engine.0.fallback).due(at(seconds).mono, |_| true).len();
    said(Residency::Loading);
    said(Residency::NoRoom);
    assert_eq!((due(50), due(61)), (0, 1));
    said(Residency::Loading);
    said(Residency::Failed);
    assert_eq!((due(115), due(121)), (0, 1), "not at once, and not never");
}

#[tokio::test]
async fn a_trial_ends_with_the_child_whatever_became_of_that() {
    let (engine, _figures) = engine(&["small"], true);
    let later = Instant::now() + Duration::from_secs(70);
    engine.has_no_room("small");
    let due = || locked(&engine.0.fallback).due(later, |_| true).len();
    assert_eq!((due(), due()), (1, 0), "it is being tried");
    let mut status = engine.watch();
    tokio::select! {
        () = engine.run(CancellationToken::new()) => panic!("nobody has stopped it"),
        ready = engine.ready() => panic!("{ready:?}"),
        _ = status.wait_for(|status| status.state == EngineRunState::Restarting) => {}
    }
    assert_eq!(due(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_card_that_holds_one_of_two_models_gets_the_larger_one_back_in_a_child_of_its_own() {
    let minute = Duration::from_secs(61);
    for (small_is_asked_for, free_mb, again, anew) in [
        (false, 4_000, true, true),
        (true, 4_000, false, false),
        (false, 3_000, false, false),
        (true, 6_000, true, false),
    ] {
        let (engine, figures) = engine(&["medium", "small"], true);
        let is = |medium, small| {
            let model = |name: &str, state, resident_mb, expected_mb| ModelState {
                name: name.to_owned(),
                state,
                resident_mb,
                expected_mb,
                ..ModelState::default()
            };
            let models = vec![model("medium", medium, 0, 5_000), model("small", small, 1_500, 1_600)];
            engine.receive(FromEngine::Models(models));
        };
        is(Residency::Loading, Residency::Available);
        is(Residency::NoRoom, Residency::Loaded);
        let wish = ask("medium", Policy::AllowSmaller);
        assert_eq!(engine.footing(&names("a"), &wish).expect("small").model, "small");
        if small_is_asked_for {
            engine.footing(&names("b"), &ask("small", Policy::ExactModel)).expect("small");
        }
        figures.send_modify(|device| device.free_mb = free_mb);
        let (frames, mut sent) = mpsc::channel(4);
        tokio::time::advance(minute).await;
        engine.restore(Some(&frames));
        let what = format!("small_is_asked_for {small_is_asked_for}, {free_mb} MB");
        let loads = matches!(sent.try_recv(), Ok(ToEngine::Load { .. }));
        let is_back = engine.would(&wish).is_ok_and(|footing| footing.model == "medium");
        assert_eq!(loads || is_back, again, "{what}");
        assert_eq!((is_back, engine.0.anew.load(Ordering::Relaxed)), (anew, anew), "{what}");
    }
}

#[tokio::test]
async fn what_a_child_said_of_a_file_is_still_told_when_it_has_gone() {
    let (engine, _figures) = engine(&["small", "base"], true);
    let model = |name: &str, state, expected_mb| ModelState {
        name: name.to_owned(),
        state,
        expected_mb,
        ..ModelState::default()
    };
    let said = vec![model("small", Residency::Missing, 0), model("base", Residency::Loaded, 388)];
    engine.receive(FromEngine::Models(said));
    engine.set_state(EngineRunState::Down, false);
    engine.look_at_files();
    let (_, told) = engine.heartbeat_state(Instant::now());
    let told: Vec<_> = told.iter().map(|model| (model.name.as_str(), model.state, model.expected_mb)).collect();
    assert_eq!(told, [("small", Residency::Missing, 0), ("base", Residency::Available, 388)]);
}

#[tokio::test]
async fn the_headers_are_read_without_a_child() {
    let (engine, _figures) = engine(&["small"], true);
    let mut reading = engine.read_headers();
    let found = reading.join_next().await.expect("one reader").expect("read");
    assert_eq!(found, [("small".to_owned(), 0)], "a simulated model takes what its configuration says");
    engine.headers_say(&[("small".to_owned(), 852), ("gone".to_owned(), 1)]);
    assert_eq!(engine.status().models[0].expected_mb, 852);
}
