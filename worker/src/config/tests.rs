use super::*;

fn simulated() -> WorkerConfig {
    WorkerConfig { engine: EngineKind::Simulated, ..WorkerConfig::default() }
}

#[test]
fn the_simulated_default_has_no_problem_and_the_real_one_wants_a_model() {
    assert_eq!(simulated().problems(), Vec::<String>::new());
    assert_eq!(simulated().resolved_default_model(), SIMULATED_MODEL);
    let problems = WorkerConfig::default().problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("worker.models:"));
}

#[test]
fn every_mistake_is_named_at_once() {
    let config = WorkerConfig {
        slots: 0,
        decode_states: 0,
        gpu_id: Some("a b".to_owned()),
        gpu: GpuChoice::Uuid("first".to_owned()),
        price_per_hour: Some(f64::NAN),
        shutdown_ms: 1,
        survey_every_ms: 0,
        silero_model: Some("/nowhere/silero.onnx".into()),
        models: [("x/y".to_owned(), PathBuf::from("/nowhere/x.bin"))].into(),
        ..simulated()
    };
    let problems = config.problems();
    for field in [
        "worker.slots:",
        "worker.decode_states:",
        "worker.gpu_id:",
        "worker.gpu:",
        "worker.price_per_hour:",
        "worker.shutdown_ms:",
        "worker.survey_every_ms:",
        "worker.silero_model:",
        "worker.models:",
        "worker.models.x/y:",
    ] {
        assert!(problems.iter().any(|p| p.starts_with(field)), "{field} not in {problems:?}");
    }
}

#[test]
fn turns_need_a_file_that_can_be_locked() {
    let folder = tempfile::tempdir().expect("folder");
    let sequential = |lock_file: Option<&str>| {
        let lock_file = lock_file.map(|name| folder.path().join(name));
        WorkerConfig { sharing: Sharing::Sequential, lock_file, ..simulated() }
    };
    let problems = |config: &WorkerConfig| config.problems().join("; ");
    let good = sequential(Some("gpu.lock"));
    assert_eq!(problems(&good), "");
    assert!(!folder.path().join("gpu.lock").exists(), "asking makes nothing");
    let turns = good.turns().expect("turns");
    assert_eq!((turns.hold_ms, turns.gap_ms), (good.lock_hold_ms, good.lock_gap_ms));
    for (bad, why) in [
        (sequential(None), "needs it"),
        (sequential(Some("none/gpu.lock")), "is not there"),
        (sequential(Some("")), "is a folder"),
        (WorkerConfig { sharing: Sharing::Swap, ..good.clone() }, "belongs to sharing"),
    ] {
        let problems = problems(&bad);
        assert!(problems.starts_with("worker.lock_file:") && problems.contains(why), "{problems}");
    }
    assert_eq!(WorkerConfig { sharing: Sharing::Swap, ..good }.turns(), None);
}

#[test]
fn a_lock_file_that_nobody_can_make_is_a_mistake() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("gpu.lock");
    let asked = |may_make: bool| can_be_locked(&path, move |_| may_make);
    assert_eq!(asked(true), Ok(()));
    assert!(asked(false).is_err_and(|why| why.contains("may not make it")));
    std::fs::write(&path, "").expect("a neighbour makes it");
    assert_eq!(asked(false), Ok(()), "one that is there can be locked by whoever may read it");
    assert!(may_make_files(folder.path()) && !may_make_files(Path::new("/nowhere")));
}

#[test]
fn a_stop_keeps_within_what_the_provider_gives() {
    let ms = |provider, shutdown_ms| WorkerConfig { provider, shutdown_ms, ..simulated() }.shutdown().as_millis();
    assert_eq!(ms(ProviderChoice::RunPod, 0), 4_500);
    assert_eq!(ms(ProviderChoice::Local, 0), 9_500);
    assert_eq!(ms(ProviderChoice::Auto, 0), 9_500);
    assert_eq!(ms(ProviderChoice::RunPod, 700), 700);
}

#[test]
fn the_device_is_given_as_number_or_text() {
    let read = |json: &str| serde_json::from_str::<GpuChoice>(json).expect(json);
    assert_eq!(read("0"), GpuChoice::Index(0));
    assert_eq!(read("\"1\""), GpuChoice::Index(1));
    assert_eq!(read("\"auto\""), GpuChoice::Auto);
    assert_eq!(read("\"none\""), GpuChoice::None);
    assert_eq!(read("\"GPU-1\""), GpuChoice::Uuid("GPU-1".to_owned()));
    for choice in [GpuChoice::Auto, GpuChoice::None, GpuChoice::Index(3), GpuChoice::Uuid("GPU-x".to_owned())] {
        assert_eq!(GpuChoice::from(String::from(choice.clone()).as_str()), choice);
    }
}

#[test]
fn a_model_that_is_not_here_is_answered_with_the_command_that_brings_it() {
    let told = |name: &str| {
        let wanted = WorkerConfig {
            default_model: Some(name.to_owned()),
            models: [("m".to_owned(), concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml").into())].into(),
            ..WorkerConfig::default()
        };
        wanted.problems().join("; ")
    };
    assert!(told("small.en").contains("`voxfleet models pull small.en` brings it"), "{}", told("small.en"));
    assert!(told("small.en-ct2").contains("its model is called \"small.en\""), "{}", told("small.en-ct2"));
    assert!(told("mine").contains("\"mine\" is not one of the models"), "{}", told("mine"));
}

#[test]
fn models_come_from_the_folder_and_by_name() {
    let dir = tempfile::tempdir().expect("dir");
    let models = dir.path().join("models");
    std::fs::create_dir(&models).expect("models");
    for name in ["b.bin", "a.bin", "silero_vad.onnx", ".hidden.bin"] {
        std::fs::write(models.join(name), "x").expect(name);
    }
    let named = dir.path().join("other.bin");
    std::fs::write(&named, "x").expect("other");
    let config = WorkerConfig {
        cache_dir: Some(dir.path().to_owned()),
        models: [("b".to_owned(), named.clone())].into(),
        default_model: Some("b".to_owned()),
        ..WorkerConfig::default()
    };
    assert_eq!(config.problems(), Vec::<String>::new());
    let files = config.model_files();
    assert_eq!(files.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(files[1].path, named);
    assert_eq!(config.resolved_silero(), Some(models.join("silero_vad.onnx")));
    assert_eq!(config.resolved_onnxruntime(), None);
    let undecided = WorkerConfig { default_model: None, ..config };
    assert!(undecided.problems()[0].starts_with("worker.default_model:"));
}
