//! Turns on the device with somebody who runs flock(1).

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use voxfleet_schema::{audio::RawEntry, session::SessionOptions};
use voxfleet_worker::{
    engine::child::ChildError,
    ipc::{EngineConfig, FromEngine, SimulatedConfig, TurnsConfig},
};

use crate::{
    card::{call_in_one, card, on},
    rig::{Child, directly, finals_in},
    support::*,
};

/// Somebody who has the device until told to leave it.
struct Tenant {
    process: std::process::Child,
    says: BufReader<ChildStdout>,
}

impl Tenant {
    /// Waits in flock(1) for its turn.
    fn asks(lock: &Path) -> Self {
        let mut process = Command::new("flock")
            .arg(lock)
            .args(["-c", "echo in; read over; echo out"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("flock(1), of util-linux");
        let says = BufReader::new(process.stdout.take().expect("pipe"));
        Self { process, says }
    }

    fn is_in(&mut self) {
        let mut line = String::new();
        self.says.read_line(&mut line).expect("a line");
        assert_eq!(line, "in\n");
    }

    fn leaves(mut self) {
        writeln!(self.process.stdin.take().expect("pipe"), "over").expect("told");
        assert!(self.process.wait().expect("its end").success());
    }
}

fn by_turns(card: &Path, lock: &Path, hold_ms: u64, speed: f64) -> EngineConfig {
    let config = on(card);
    let simulated = SimulatedConfig { speed, ..config.simulated };
    EngineConfig { turns: Some(TurnsConfig { lock_file: lock.to_owned(), hold_ms, gap_ms: 50 }), simulated, ..config }
}

fn decodes(card: &Path) -> usize {
    let files = fs::read_dir(card).expect("card").flatten();
    files.filter(|f| f.file_name().to_string_lossy().starts_with("busy.")).count()
}

#[test]
fn nothing_is_decoded_while_the_neighbour_has_the_device() {
    let card = card(1_000);
    let lock = card.path().join("gpu.lock");
    let mut tenant = Tenant::asks(&lock);
    tenant.is_in();
    let mut child = Child::start(by_turns(card.path(), &lock, 2_000, 0.0));
    let log = call_in_one();
    child.open(1, SessionOptions::default());
    child.feed(1, &log);
    // It hears the audio, and goes on saying that it lives: nobody is to take it for stuck.
    let began = |seen: &[FromEngine]| seen.iter().any(|m| matches!(m, FromEngine::Began { .. }));
    child.until("signs of life", |seen| {
        let signs = seen.iter().filter(|m| matches!(m, FromEngine::Progress { working: true, .. }));
        (signs.count() >= 5).then_some(())
    });
    assert!(child.seen.iter().any(|m| matches!(m, FromEngine::Stepping { handle: 1, .. })));
    assert!(!began(&child.seen) && decodes(card.path()) == 0);
    tenant.leaves();
    assert_eq!(timeless(&child.finals_of(1)), timeless(&on_card(directly(&log))));
    // Without work it keeps nobody out.
    let mut tenant = Tenant::asks(&lock);
    tenant.is_in();
    tenant.leaves();
    child.end().expect("end");
}

fn on_card(mut finals: Vec<voxfleet_worker::ipc::FinalDraft>) -> Vec<voxfleet_worker::ipc::FinalDraft> {
    for spoken in finals.iter_mut().filter(|f| !f.segments.is_empty()) {
        spoken.device = "cuda:simulated".to_owned();
    }
    finals
}

#[test]
fn a_neighbour_gets_its_turn_within_the_bound_again_and_again() {
    const HOLD: Duration = Duration::from_millis(300);
    const SPEED: f64 = 20.0;
    let card = card(1_000);
    let lock = card.path().join("gpu.lock");
    let mut child = Child::start(by_turns(card.path(), &lock, HOLD.as_millis() as u64, SPEED));
    let logs: Vec<Vec<RawEntry>> = (1..=4).map(|n| log_16k(&call(n), 200)).collect();
    for handle in 0..4 {
        child.open(handle, SessionOptions { interim: false, ..SessionOptions::default() });
    }
    child.feed_in_turn(&logs);
    let longest = logs.iter().flat_map(|log| directly(log)).map(|f| f.to_sample - f.from_sample).max().expect("finals");
    let decode = Duration::from_secs_f64(longest as f64 / 16_000.0 / SPEED);
    let mut waits = Vec::new();
    child.until("a decode", |seen| seen.iter().any(|m| matches!(m, FromEngine::Began { .. })).then_some(()));
    for _ in 0..3 {
        let begin = Instant::now();
        let mut tenant = Tenant::asks(&lock);
        tenant.is_in();
        waits.push(begin.elapsed());
        let until = Instant::now() + Duration::from_millis(200);
        while Instant::now() < until {
            assert_eq!(decodes(card.path()), 0, "it has the device for itself");
            std::thread::yield_now();
        }
        tenant.leaves();
        let before = child.seen.len();
        let over = |m: &FromEngine| matches!(m, FromEngine::Over { .. });
        child.until("our turn", |seen| seen[before..].iter().any(over).then_some(()));
    }
    // A busy machine may take its time to start a process.
    let bound = HOLD + decode + Duration::from_millis(500);
    assert!(waits.iter().all(|wait| *wait < bound), "{waits:?}, allowed are {bound:?}");
    for (handle, log) in (0..).zip(&logs) {
        assert_eq!(timeless(&child.finals_of(handle)), timeless(&on_card(directly(log))), "session {handle}");
    }
    child.end().expect("end");
}

#[test]
fn without_its_lock_a_child_does_not_begin() {
    let card = card(1_000);
    let child = Child::start(by_turns(card.path(), &card.path().join("none/gpu.lock"), 300, 0.0));
    let error = child.end().expect_err("no lock");
    assert!(matches!(&error, ChildError::Lock(_)) && error.to_string().contains("none/gpu.lock"), "{error}");
}

#[test]
fn a_lock_that_goes_away_ends_the_child() {
    let card = card(1_000);
    let folder = card.path().join("run");
    fs::create_dir(&folder).expect("folder");
    let mut child = Child::start(by_turns(card.path(), &folder.join("gpu.lock"), 300, 0.0));
    child.until("ready", |seen| seen.first().map(|_| ()));
    fs::remove_dir_all(&folder).expect("gone");
    child.open(1, SessionOptions::default());
    child.feed_while_it_lives(1, &call_in_one());
    child.until_it_is_gone();
    assert!(finals_in(&child.seen, 1).iter().all(|f| f.segments.is_empty()), "nothing was decoded without it");
    assert!(matches!(child.end(), Err(ChildError::Lock(_))));
}
