//! Faults of a simulated card end a real process the way a real card's do.

use std::{
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::Path,
    process::{Command, ExitStatus, Stdio},
};

use voxfleet_schema::{audio::RawEntry, failure::FailureClass, fleet::Residency, session::SessionOptions};
use voxfleet_worker::{
    engine::{child::serve, last_words::LastWords},
    ipc::{EngineConfig, EngineKind, FromEngine, SimulatedConfig, ToEngine},
};

use crate::{
    rig::{Child, finals_in, instant, simulated_config, state_of},
    support::*,
};

/// Set for a process of this binary that is to be the engine, on the socket that is its standard input.
const IS_ENGINE: &str = "VOXFLEET_TEST_IS_ENGINE";

/// Not a test of its own: what [`Engine`] runs. Without the variable there is nothing to do.
#[test]
fn an_engine_process() {
    if std::env::var_os(IS_ENGINE).is_some() {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("a socket");
        serve(UnixStream::from(socket)).expect("an end in order");
    }
}

struct Engine {
    process: std::process::Child,
    child: Child,
}

impl Engine {
    fn start(config: EngineConfig) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        let process = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "card::an_engine_process"])
            .env(IS_ENGINE, "1")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .expect("a process");
        Self { process, child: Child::beyond(ours, config) }
    }

    fn died(mut self) -> (ExitStatus, Child) {
        self.child.until_it_is_gone();
        (self.process.wait().expect("its end"), self.child)
    }
}

pub(crate) fn card(total_mb: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("folder");
    fs::write(folder.path().join("total_mb"), total_mb.to_string()).expect("total");
    fs::create_dir(folder.path().join("faults")).expect("faults");
    folder
}

pub(crate) fn on(card: &Path) -> EngineConfig {
    let sizes = [("simulated".to_owned(), 300), ("other".to_owned(), 2_000)].into();
    let simulated = SimulatedConfig { card: Some(card.to_owned()), context_mb: 100, sizes, state_mb: 50, ..instant() };
    EngineConfig { use_gpu: true, ..simulated_config(simulated) }
}

/// MB of living and dead processes on it.
fn files_mb(card: &Path) -> u64 {
    let files = fs::read_dir(card).expect("card").flatten();
    let numbers = files.filter(|f| f.file_name().to_string_lossy().starts_with(|c: char| c.is_ascii_digit()));
    numbers.map(|f| fs::read_to_string(f.path()).expect("size").parse::<u64>().expect("MB")).sum()
}

pub(crate) fn call_in_one() -> Vec<RawEntry> {
    log_16k(&first_seconds(1, 12), 200)
}

#[test]
fn memory_is_taken_as_it_is_needed_and_the_device_is_named() {
    let card = card(1_000);
    let mut child = Child::start(on(card.path()));
    child.until("ready", |seen| match seen.first()? {
        FromEngine::Ready { device, .. } => {
            assert_eq!(device, "cuda:simulated");
            Some(())
        }
        other => panic!("{other:?} came before ready"),
    });
    assert_eq!(files_mb(card.path()), 0, "nothing before it is asked for");
    child.open(1, SessionOptions { interim: false, ..SessionOptions::default() });
    child.feed(1, &call_in_one());
    let finals = child.finals_of(1);
    assert!(finals.iter().all(|f| f.segments.is_empty() || f.device == "cuda:simulated"), "{finals:?}");
    assert_eq!(files_mb(card.path()), 100 + 300 + 50, "context, weights, one state");
    assert_eq!(state_of(&child.seen, "simulated"), Some((Residency::Loaded, 350, 400)));
    // A second model is too large for what is left; the first goes on.
    child.open(2, SessionOptions { model: Some("other".to_owned()), ..SessionOptions::default() });
    assert_eq!(child.failure_of(2).class, FailureClass::OutOfMemory);
    child.open(3, SessionOptions::default());
    child.feed(3, &call_in_one());
    assert_eq!(timeless(&child.finals_of(3)), timeless(&finals));
    child.end().expect("end");
    assert_eq!(files_mb(card.path()), 100, "the context alone stays, for as long as the process");
}

/// Of a build without CUDA; with it, what is missing depends on the machine.
#[cfg(not(feature = "cuda"))]
#[test]
fn a_gpu_that_is_not_there_ends_the_real_engine_and_never_becomes_a_silent_cpu() {
    let config = EngineConfig { engine: EngineKind::WhisperCpp, use_gpu: true, ..simulated_config(instant()) };
    let (status, child) = Engine::start(config).died();
    assert_eq!(LastWords::of_code(status.code().expect("a code")), Some(LastWords::MissingLibrary), "{status}");
    assert!(!child.seen.iter().any(|m| matches!(m, FromEngine::Ready { .. })), "{:?}", child.seen);
}

#[test]
fn on_the_cpu_the_card_is_not_touched() {
    let card = card(1);
    let mut child = Child::start(EngineConfig { use_gpu: false, ..on(card.path()) });
    fs::write(card.path().join("faults/abort"), "0 always").expect("fault");
    child.open(1, SessionOptions::default());
    child.feed(1, &call_in_one());
    assert!(child.finals_of(1).iter().all(|f| f.segments.is_empty() || f.device == "cpu"));
    assert_eq!(files_mb(card.path()), 0);
    child.end().expect("end");
}

#[test]
fn each_fault_ends_the_process_in_its_own_way() {
    // Exit code, signal.
    let faults = [
        ("oom_at_decode", Some(81), None),
        ("lost", Some(82), None),
        ("mismatch", Some(83), None),
        ("assertion", Some(84), None),
        ("library", Some(85), None),
        ("exit", Some(7), None),
        ("abort", None, Some(6)),
        ("kill", None, Some(9)),
    ];
    for (what, code, signal) in faults {
        let card = card(1_000);
        let fault = card.path().join("faults").join(what);
        fs::write(&fault, "1").expect("fault");
        let mut engine = Engine::start(on(card.path()));
        engine.child.open(1, SessionOptions { interim: false, ..SessionOptions::default() });
        engine.child.feed_while_it_lives(1, &call_in_one());
        let (status, child) = engine.died();
        assert_eq!((status.code(), status.signal()), (code, signal), "{what}");
        let heard = finals_in(&child.seen, 1).iter().filter(|f| !f.segments.is_empty()).count();
        assert_eq!(heard, 1, "{what}: the first decode went well");
        assert!(!fault.exists(), "{what}: struck once");
    }
}

#[test]
fn memory_that_is_taken_away_later_ends_the_process() {
    for warm in [false, true] {
        let card = card(1_000);
        let mut engine = Engine::start(on(card.path()));
        let options = SessionOptions { interim: false, ..SessionOptions::default() };
        if warm {
            engine.child.open(0, options.clone());
            engine.child.feed(0, &call_in_one());
            engine.child.finals_of(0);
        } else {
            engine.child.send(ToEngine::Load { model: "simulated".to_owned() });
            engine.child.until("the model", |seen| state_of(seen, "simulated").filter(|s| s.0 == Residency::Loaded));
        }
        // Without a state there is no room for one; with one, what is in use already has been taken.
        fs::write(card.path().join("tenant.llm"), if warm { "551" } else { "560" }).expect("tenant");
        engine.child.open(1, options);
        engine.child.feed_while_it_lives(1, &call_in_one());
        assert_eq!(engine.died().0.code(), Some(81), "warm {warm}");
    }
    // At the load it is an error, unless it is to be worse.
    let full = card(1_000);
    fs::write(full.path().join("faults/oom_at_load"), "0").expect("fault");
    let mut engine = Engine::start(on(full.path()));
    engine.child.open(1, SessionOptions::default());
    assert_eq!(engine.died().0.code(), Some(81));
    let gone = card(1_000);
    let mut engine = Engine::start(on(gone.path()));
    engine.child.until("ready", |seen| seen.first().map(|_| ()));
    drop(gone);
    engine.child.open(1, SessionOptions::default());
    assert_eq!(engine.died().0.code(), Some(82), "a card that is taken away is lost");
}

#[test]
fn a_decode_may_hang_and_the_wire_may_carry_garbage() {
    let broken = card(1_000);
    fs::write(broken.path().join("faults/garbage"), "0").expect("fault");
    let mut engine = Engine::start(on(broken.path()));
    engine.child.open(1, SessionOptions::default());
    engine.child.feed_while_it_lives(1, &call_in_one());
    // The reader gives up at what is no frame, the process itself lives on.
    engine.child.until_it_is_gone();
    assert!(engine.process.try_wait().expect("its state").is_none());
    engine.process.kill().expect("kill");
    engine.process.wait().expect("its end");

    let stuck = card(1_000);
    fs::write(stuck.path().join("faults/hang"), "0").expect("fault");
    let mut engine = Engine::start(on(stuck.path()));
    engine.child.open(1, SessionOptions { interim: false, ..SessionOptions::default() });
    engine.child.feed(1, &call_in_one());
    engine.child.until("the decode", |seen| {
        seen.iter().any(|m| matches!(m, FromEngine::Began { handle: 1, .. })).then_some(())
    });
    engine.child.until_it_is_quiet();
    assert!(!engine.child.seen.iter().any(|m| matches!(m, FromEngine::Over { .. })));
    assert!(finals_in(&engine.child.seen, 1).iter().all(|f| f.segments.is_empty()));
    engine.process.kill().expect("kill");
    engine.process.wait().expect("its end");
}
