//! Cards of the harness, through the real binding.

use voxfleet_harness::card::{FakeNvml, code};

use super::*;

/// Enough samples for the longest pause after failures.
const MANY: usize = 70;

fn simulated(fake: &FakeNvml, gpu: GpuChoice) -> WorkerConfig {
    let nvml_library = Some(fake.library());
    WorkerConfig { gpu, nvml_library, engine: EngineKind::Simulated, ..WorkerConfig::default() }
}

fn ours(pid: u32) -> Option<Ours> {
    Some(Ours { pid, expected_mb: 500, resident_mb: 0 })
}

fn class(figures: &Device) -> Option<FailureClass> {
    figures.trouble.as_ref().map(|trouble| trouble.class)
}

#[test]
fn names_become_ids() {
    assert_eq!(cpu_id("node.example.org", 2).expect("id").as_str(), "cpu-node-example-org-2");
    assert_eq!(cpu_id("", 0).expect("id").as_str(), "cpu-host-0");
    assert_eq!(cpu_id(&"x".repeat(300), u32::MAX).expect("id").as_str().len(), MAX_ID_LEN);
    assert_eq!(cpu_id("höst", 1).expect("id").as_str(), "cpu-h-st-1");
    let uuid = "GPU-9a3e4d6b-0d2f-8f1c-1c57-0f6a7d6f1a11";
    assert_eq!(gpu_id_of_uuid(uuid).expect("id").as_str(), uuid);
    assert_eq!(gpu_id_of_uuid("MIG-GPU-1/7/0").expect("id").as_str(), "MIG-GPU-1-7-0");
}

/// On a machine with a GPU its figures, on one without the typed error.
#[test]
fn a_real_gpu_that_was_asked_for_is_there_or_an_error() {
    let config = WorkerConfig { gpu: GpuChoice::Index(0), engine: EngineKind::Simulated, ..WorkerConfig::default() };
    match Probe::open(&config) {
        Ok(mut probe) => {
            let figures = probe.sample(None);
            assert!(probe.is_gpu() && probe.visible_device().starts_with("GPU-"), "{figures:?}");
            assert_eq!(probe.gpu_id.as_str(), probe.visible_device());
            assert!(figures.total_mb > 1_000 && figures.free_mb <= figures.total_mb, "{figures:?}");
            assert_eq!((figures.index, figures.used_mb), (Some(0), 0), "nothing of ours runs there");
            assert!(figures.temperature_c.is_some_and(|c| (10..120).contains(&c)), "{figures:?}");
            let by_uuid = GpuChoice::Uuid(probe.visible_device().to_owned());
            let again = Probe::open(&WorkerConfig { gpu: by_uuid, ..config.clone() }).expect("by its uuid");
            assert_eq!(again.gpu_id, probe.gpu_id);
        }
        Err(error) => assert!(
            matches!(error, DeviceError::NoNvml { .. } | DeviceError::NotFound { .. } | DeviceError::Split { .. }),
            "{error}"
        ),
    }
    let nobody = WorkerConfig { gpu: GpuChoice::Uuid("GPU-none".to_owned()), ..config };
    assert!(matches!(Probe::open(&nobody).err(), Some(DeviceError::NoNvml { .. } | DeviceError::NotFound { .. })));
}

#[test]
fn a_machine_without_a_gpu_has_a_cpu() {
    let config = WorkerConfig { gpu: GpuChoice::None, index: 7, ..WorkerConfig::default() };
    let mut probe = Probe::open(&config).expect("cpu");
    assert!(probe.gpu_id.as_str().starts_with("cpu-") && probe.gpu_id.as_str().ends_with("-7"));
    let name = probe.gpu_id.clone();
    probe.rename_cpu(7, &HashSet::new()).expect("free");
    assert_eq!(probe.gpu_id, name);
    probe.rename_cpu(7, &HashSet::from([name, cpu_id(&probe.host, 8).expect("id")])).expect("two are taken");
    assert!(probe.gpu_id.as_str().ends_with("-9"));
    let figures = probe.sample(ours(std::process::id()));
    assert!(figures.total_mb > 0 && figures.used_mb > 0 && figures.index.is_none());
    assert_eq!((probe.visible_device(), class(&figures)), ("", None));
    let named = WorkerConfig { gpu_id: Some("gpu-a".to_owned()), ..config };
    assert_eq!(Probe::open(&named).expect("named").gpu_id.as_str(), "gpu-a");
}

#[test]
fn two_cards_are_told_apart_and_their_tenants_seen() {
    let fake = FakeNvml::new(2).expect("cards");
    let open = |choice| Probe::open(&simulated(&fake, choice)).expect("a card");
    let mut first = open(GpuChoice::Auto);
    let mut second = open(GpuChoice::Index(1));
    let same = open(GpuChoice::Uuid(fake.uuid(1)));
    assert_eq!((first.visible_device(), first.gpu_id.as_str()), (fake.uuid(0).as_str(), fake.uuid(0).as_str()));
    assert_eq!((second.visible_device(), same.gpu_id.as_str()), (fake.uuid(1).as_str(), fake.uuid(1).as_str()));

    fake.set(1, "used_mb", 9_600).expect("a tenant");
    fake.set(1, "processes", "77 900\n78 100").expect("processes");
    let figures = first.sample(ours(77));
    assert_eq!((figures.index, figures.gpus, figures.used_by_others_mb), (Some(0), Some(2), 0));
    assert_eq!((figures.temperature_c, figures.ecc_errors, figures.trouble), (Some(40), Some(0), None));
    assert_eq!((figures.power_w, figures.utilization), (Some(31.5), Some(0.0)));
    let figures = second.sample(ours(77));
    assert_eq!((figures.total_mb, figures.free_mb, figures.used_mb), (16_000, 5_400, 900));
    assert_eq!(figures.used_by_others_mb, 9_700);
    fake.set(1, "used_mb", 14_000).expect("it grows");
    let figures = second.sample(ours(77));
    assert_eq!((figures.free_mb, figures.used_mb, figures.used_by_others_mb), (1_000, 900, 14_100));
}

#[test]
fn heat_throttling_and_memory_errors_are_seen() {
    let fake = FakeNvml::new(1).expect("a card");
    let mut probe = Probe::open(&simulated(&fake, GpuChoice::Auto)).expect("a card");
    for (key, value) in [("temperature", 84), ("throttle", 64 | 8), ("ecc", 3), ("utilization", 97)] {
        fake.set(0, key, value).expect(key);
    }
    let figures = probe.sample(None);
    assert_eq!((figures.temperature_c, figures.ecc_errors, figures.utilization), (Some(84), Some(3), Some(0.97)));
    assert_eq!(figures.throttled, ["thermal", "hardware"]);
    for key in ["temperature", "throttle", "ecc", "utilization", "power_mw"] {
        fake.unset(0, key).expect(key);
    }
    let figures = probe.sample(None);
    assert_eq!((figures.temperature_c, figures.ecc_errors, figures.power_w), (None, None, None));
    assert!(figures.throttled.is_empty() && figures.trouble.is_none(), "{figures:?}");
}

#[test]
fn a_list_of_processes_that_is_refused_leaves_what_came_on_top() {
    let fake = FakeNvml::new(1).expect("a card");
    fake.set(0, "used_mb", 2_000).expect("a tenant");
    fake.set(0, "error_processes", code::NO_PERMISSION).expect("refused");
    let mut probe = Probe::open(&simulated(&fake, GpuChoice::Auto)).expect("a card");
    assert_eq!(probe.sample(None).used_by_others_mb, 2_000);
    fake.set(0, "used_mb", 2_700).expect("ours");
    let figures = probe.sample(ours(77));
    assert_eq!((figures.used_mb, figures.used_by_others_mb, figures.trouble), (700, 2_000, None));
    fake.set(0, "used_mb", 9_700).expect("more than our models can explain");
    let figures = probe.sample(ours(77));
    assert_eq!((figures.used_mb, figures.used_by_others_mb), (1_100, 8_600));
}

#[test]
fn a_simulated_card_shows_who_lives_on_it() {
    let fake = FakeNvml::new(1).expect("a card");
    let folder = tempfile::tempdir().expect("folder");
    let me = std::process::id();
    for (name, mb) in [
        (format!("{me}.0"), 300),
        (format!("{me}.1"), 200),
        ("tenant.voxtral".to_owned(), 9_600),
        // No process has this number.
        ("4194399.0".to_owned(), 5_000),
        ("total_mb".to_owned(), 16_000),
    ] {
        std::fs::write(folder.path().join(name), mb.to_string()).expect("an allocation");
    }
    fake.set(0, "simulated_card", folder.path().display()).expect("link");
    let mut probe = Probe::open(&simulated(&fake, GpuChoice::Auto)).expect("a card");
    let figures = probe.sample(ours(me));
    assert_eq!((figures.used_mb, figures.used_by_others_mb, figures.free_mb), (500, 9_600, 5_900));
}

#[test]
fn a_card_that_is_lost_keeps_its_name_and_comes_back() {
    let fake = FakeNvml::new(1).expect("a card");
    let mut probe = Probe::open(&simulated(&fake, GpuChoice::Index(0))).expect("a card");
    assert_eq!(probe.sample(None).free_mb, 16_000);
    for (value, lost) in [
        (code::GPU_IS_LOST, FailureClass::DeviceLost),
        (code::UNKNOWN, FailureClass::Unavailable),
        (code::DRIVER_MISMATCH, FailureClass::DriverMismatch),
    ] {
        fake.set(0, "error", value).expect("lost");
        let figures = probe.sample(None);
        assert_eq!(class(&figures), Some(lost));
        assert_eq!((figures.uuid, figures.total_mb, figures.free_mb), (Some(fake.uuid(0)), 16_000, 0));
        let said = figures.trouble.expect("trouble").message;
        assert!(said.ends_with(remedy(Side::Driver, lost)), "{said}");
        assert_eq!(class(&probe.sample(None)), Some(lost));
        fake.unset(0, "error").expect("back");
        let back = (0..MANY).map(|_| probe.sample(None)).find(|figures| figures.trouble.is_none());
        assert_eq!(back.map(|figures| figures.free_mb), Some(16_000));
    }
}

#[test]
fn a_driver_that_goes_under_a_worker_is_asked_until_it_is_back() {
    let fake = FakeNvml::new(1).expect("a card");
    let mut probe = Probe::open(&simulated(&fake, GpuChoice::Index(0))).expect("a card");
    fake.set(0, "error", code::UNKNOWN).expect("trouble");
    fake.set_machine("init_error", code::DRIVER_NOT_LOADED).expect("unloaded");
    assert_eq!(class(&probe.sample(None)), Some(FailureClass::Unavailable));
    fake.unset(0, "error").expect("the card is well");
    assert_eq!(class(&probe.sample(None)), Some(FailureClass::DeviceLost), "its driver is gone");
    fake.unset_machine("init_error").expect("loaded again");
    assert!((0..MANY).any(|_| probe.sample(None).trouble.is_none()));
}

#[test]
fn what_is_wrong_at_the_start_is_typed() {
    let fake = FakeNvml::new(1).expect("a card");
    let open = |gpu| Probe::open(&simulated(&fake, gpu));
    assert!(matches!(open(GpuChoice::Index(1)).err(), Some(DeviceError::NotFound { .. })));
    assert!(matches!(open(GpuChoice::Uuid("GPU-x".to_owned())).err(), Some(DeviceError::NotFound { .. })));

    fake.set_machine("init_error", code::DRIVER_MISMATCH).expect("mismatch");
    let error = open(GpuChoice::Index(0)).err().expect("no nvml");
    assert_eq!(error.class(), Some(FailureClass::DriverMismatch));
    assert!(error.to_string().contains(remedy(Side::Driver, FailureClass::DriverMismatch)), "{error}");
    let mut on_cpu = open(GpuChoice::Auto).expect("the cpu");
    assert!(!on_cpu.is_gpu() && on_cpu.gpu_id.as_str().starts_with("cpu-"));
    assert_eq!(class(&on_cpu.sample(None)), Some(FailureClass::DriverMismatch), "nothing is silent");
    assert_eq!(survey(Some(&fake.library())).map_err(|t| t.class), Err(FailureClass::DriverMismatch));
    fake.unset_machine("init_error").expect("mended");

    fake.set(0, "error", code::GPU_IS_LOST).expect("lost");
    let mut on_cpu = open(GpuChoice::Auto).expect("the cpu");
    assert_eq!((on_cpu.is_gpu(), class(&on_cpu.sample(None))), (false, Some(FailureClass::DeviceLost)));
    let survey = survey(Some(&fake.library())).expect("a survey");
    assert_eq!((survey.devices.len(), survey.troubles.len()), (0, 1));
    assert_eq!(survey.versions.cuda.as_deref(), Some("13.0"));
}

#[test]
fn a_library_that_is_not_there_is_a_trouble_only_where_it_was_named() {
    let missing = WorkerConfig {
        nvml_library: Some("/nowhere/libnvidia-ml.so.1".into()),
        engine: EngineKind::Simulated,
        ..WorkerConfig::default()
    };
    let mut probe = Probe::open(&missing).expect("the cpu");
    assert_eq!((probe.is_gpu(), class(&probe.sample(None))), (false, Some(FailureClass::MissingLibrary)));
    let by_name = Probe::open(&WorkerConfig { gpu: GpuChoice::Index(0), ..missing });
    assert_eq!(by_name.err().and_then(|e| e.class()), Some(FailureClass::MissingLibrary));
}

#[test]
fn an_engine_without_cuda_takes_no_gpu() {
    let fake = FakeNvml::new(1).expect("a card");
    let whisper = |gpu| WorkerConfig { engine: EngineKind::WhisperCpp, ..simulated(&fake, gpu) };
    let (auto, named) = (Probe::open(&whisper(GpuChoice::Auto)), Probe::open(&whisper(GpuChoice::Index(0))));
    if cfg!(feature = "cuda") {
        assert!(auto.is_ok_and(|probe| probe.is_gpu()) && named.is_ok());
    } else {
        assert!(auto.is_ok_and(|probe| !probe.is_gpu()));
        assert!(matches!(named.err(), Some(DeviceError::NoCuda { .. })));
    }
}

#[test]
fn instances_of_a_split_card_are_devices_of_their_own() {
    let fake = FakeNvml::new(2).expect("cards");
    fake.split(0, &[4_864, 9_856]).expect("split");
    let mut first = Probe::open(&simulated(&fake, GpuChoice::Auto)).expect("an instance");
    assert_eq!(first.visible_device(), fake.instance_uuid(0, 0));
    let mut second = Probe::open(&simulated(&fake, GpuChoice::Uuid(fake.instance_uuid(0, 1)))).expect("another");
    assert_eq!(second.gpu_id.as_str(), fake.instance_uuid(0, 1));
    let figures = first.sample(None);
    assert_eq!((figures.index, figures.total_mb, figures.gpus), (Some(0), 4_864, Some(3)));
    fake.set(0, "temperature", 84).expect("hot");
    let figures = second.sample(None);
    assert_eq!((figures.total_mb, figures.temperature_c), (9_856, Some(84)), "the heat of its card");
    let survey = survey(Some(&fake.library())).expect("a survey");
    let listed: Vec<(u32, bool)> = survey.devices.iter().map(|d| (d.index, d.is_instance)).collect();
    assert_eq!(listed, [(0, true), (0, true), (1, false)]);
    for whole in [GpuChoice::Index(0), GpuChoice::Uuid(fake.uuid(0))] {
        match Probe::open(&simulated(&fake, whole)).err() {
            Some(DeviceError::Split { instances, .. }) => assert_eq!(instances.len(), 2),
            other => panic!("{other:?}"),
        }
    }
    fake.set(0, "error", code::GPU_IS_LOST).expect("lost with its card");
    assert_eq!(class(&second.sample(None)), Some(FailureClass::DeviceLost));
}

#[test]
fn two_workers_on_one_card_notice_each_other() {
    let fake = FakeNvml::new(2).expect("cards");
    let cache = tempfile::tempdir().expect("cache");
    let start = |gpu_id: &str, card| {
        let config = WorkerConfig { gpu_id: Some(gpu_id.to_owned()), ..simulated(&fake, GpuChoice::Index(card)) };
        let mut probe = Probe::open(&config).expect("a card");
        probe.announce(cache.path());
        probe
    };
    let (mut first, mut beside) = (start("gpu-a", 0), start("gpu-b", 1));
    assert!(first.sample(None).shared_with.is_empty());
    let mut second = start("gpu-c", 0);
    assert_eq!(
        (first.sample(None).shared_with, second.sample(None).shared_with),
        (vec!["gpu-c".into()], vec!["gpu-a".into()])
    );
    assert!(beside.sample(None).shared_with.is_empty(), "on a card of its own");
    drop(second);
    assert!(first.sample(None).shared_with.is_empty());
}

#[test]
fn a_card_that_fell_off_is_left_alone_for_a_while_and_may_come_back() {
    let fake = FakeNvml::new(1).expect("a fake card");
    let mut probe = Probe::open(&simulated(&fake, GpuChoice::Index(0))).expect("a card");
    assert_eq!(probe.sample(None).xids, None);
    fake.set(0, "xid", 119).expect("told");
    let figures = probe.sample(None);
    assert_eq!((class(&figures), figures.free_mb), (None, 16_000), "an answer of the card counts for more");
    assert_eq!(figures.xids.map(|xids| (xids.last, xids.count)), Some((119, 1)));
    fake.set(0, "xid", 79).expect("told");
    let lost = (0..MANY).take_while(|_| class(&probe.sample(None)) == Some(FailureClass::DeviceLost)).count();
    assert_eq!(lost, 32, "although its driver answers");
    let back = probe.sample(None);
    assert_eq!((class(&back), back.free_mb), (None, 16_000));
    assert_eq!(back.xids.map(|xids| (xids.last, xids.count)), Some((79, 2)));
    // Watched again, by a library that was loaded again.
    fake.set(0, "xid", 94).expect("told");
    assert_eq!(probe.sample(None).xids.map(|xids| (xids.last, xids.count)), Some((94, 3)));
}
