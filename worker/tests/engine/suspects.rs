//! What the engine child does with inputs that may have killed it, and with sessions that end in order.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    process::{Command, Stdio},
};

use voxfleet_schema::{
    audio::RawEntry,
    failure::{Failure, FailureClass},
    fleet::Residency,
    session::SessionOptions,
};
use voxfleet_worker::{
    engine::child::serve,
    ipc::{FinalDraft, FromEngine, SimulatedConfig, StartPoint, Suspect, ToEngine},
};

use crate::{
    rig::{Child, directly, finals_in, instant, partials_in, simulated_config, state_of},
    support::*,
};

fn open_suspect(child: &mut Child, handle: u64, suspect: Suspect) {
    let start = Box::new(StartPoint::beginning());
    let options = Box::new(SessionOptions::default());
    child.send(ToEngine::Open {
        handle,
        options,
        start,
        background: false,
        suspect: Some(suspect),
        scout: false,
        hears: false,
    });
}

/// A suspect, session 0, among so many that are fed alike; each says what the engine says when it is called directly.
fn suspect_among(sessions: u32) -> Child {
    let mut child = Child::start(simulated_config(SimulatedConfig { speed: 40.0, ..instant() }));
    let logs: Vec<Vec<RawEntry>> = (1..=sessions).map(|n| log_16k(&first_seconds(n, 12), 100)).collect();
    open_suspect(&mut child, 0, Suspect { beyond: 0, crashes: 1, park: None, blind: false });
    for handle in 1..u64::from(sessions) {
        child.open(handle, SessionOptions::default());
    }
    child.feed_in_turn(&logs);
    for (handle, log) in (0..).zip(&logs) {
        assert_eq!(timeless(&child.finals_of(handle)), timeless(&directly(log)), "session {handle}");
    }
    child
}

/// A call, session 7, of which one stretch with speech is to be set aside.
struct SetAside {
    child: Child,
    /// What the engine says when it is called directly.
    direct: Vec<FinalDraft>,
    /// Which of them holds the stretch.
    n: usize,
    why: Failure,
}

impl SetAside {
    fn start(blind: bool) -> Self {
        let log = log_16k(&call(1), 100);
        let direct = directly(&log);
        let (n, bad) = direct.iter().enumerate().skip(1).find(|(_, f)| !f.segments.is_empty()).expect("speech");
        let why = Failure::new(FailureClass::EngineCrash, "it kills");
        let mut child = Child::start(simulated_config(instant()));
        let park = Some(why.clone());
        open_suspect(&mut child, 7, Suspect { beyond: bad.from_sample, crashes: 3, park, blind });
        child.feed(7, &log);
        Self { child, direct, n, why }
    }
}

/// What was being decoded while a window of `handle` was, until its first final.
fn beside(seen: &[FromEngine], handle: u64) -> Vec<u64> {
    let mut running: Vec<u64> = Vec::new();
    let mut beside = Vec::new();
    for message in seen {
        match message {
            FromEngine::Began { handle, .. } => running.push(*handle),
            FromEngine::Over { handle } => {
                let at = running.iter().position(|h| h == handle).expect("it had begun");
                running.swap_remove(at);
            }
            FromEngine::Final { handle: h, .. } if *h == handle => return beside,
            _ => {}
        }
        if running.contains(&handle) {
            beside.extend(running.iter().filter(|h| **h != handle));
        }
    }
    beside
}

#[test]
fn a_suspect_is_decoded_alone_until_its_first_final_and_says_the_same() {
    let child = suspect_among(4);
    assert_eq!(beside(&child.seen, 0), Vec::<u64>::new(), "nothing beside it");
    assert!((1..4).any(|handle| !beside(&child.seen, handle).is_empty()), "the others share the threads");
    let first_final =
        child.seen.iter().position(|m| matches!(m, FromEngine::Final { handle: 0, .. })).expect("a final");
    assert_eq!(partials_in(&child.seen[..first_final], 0), [], "no partial could kill the engine for it");
    child.end().expect("end");
}

#[test]
fn a_parked_stretch_is_not_decoded_and_moves_no_boundary() {
    let SetAside { mut child, direct, n, why } = SetAside::start(false);
    let bad = &direct[n];
    let stored = child.finals_of(7);
    assert_eq!(stored.len(), direct.len());
    for (at, (stored, direct)) in stored.iter().zip(&direct).enumerate() {
        if at == n {
            assert!(stored.parked && stored.segments.is_empty());
            assert_eq!(stored.error, Some(why.clone()));
            assert_eq!((stored.from_sample, stored.to_sample), (direct.from_sample, direct.to_sample));
            assert_eq!((stored.audio, &stored.resume), (direct.audio, &direct.resume));
        } else {
            assert_eq!(timeless(std::slice::from_ref(stored)), timeless(std::slice::from_ref(direct)), "final {at}");
        }
    }
    let decoded = child.seen.iter().any(|m| matches!(m, FromEngine::Began { at, .. } if *at == bad.from_sample));
    assert!(!decoded, "it was never touched");
    child.end().expect("end");
}

#[test]
fn a_session_that_finishes_says_what_it_had_begun_and_nothing_else() {
    let answered = |seen: &[FromEngine]| seen.iter().position(|m| matches!(m, FromEngine::Finished { handle: 1 }));
    let log = log_16k(&call(1), 100);
    let mut child = Child::start(simulated_config(SimulatedConfig { speed: 10.0, ..instant() }));
    child.open(1, SessionOptions { interim: false, ..SessionOptions::default() });
    child.feed(1, &log);
    child.until("a decode", |seen| seen.iter().any(|m| matches!(m, FromEngine::Began { .. })).then_some(()));
    let before = finals_in(&child.seen, 1).len();
    child.send(ToEngine::Finish { handle: 1 });
    child.until("its end", answered);
    let finals = finals_in(&child.seen, 1);
    // What came before the request reached it, and the one that was being decoded then.
    assert!(finals.len() > before && finals.iter().any(|f| !f.segments.is_empty()) && !finals.iter().any(|f| f.end));
    child.send(ToEngine::Ping { n: 9 });
    child.until("an answer", |seen| seen.iter().any(|m| matches!(m, FromEngine::Pong { n: 9 })).then_some(()));
    assert_eq!(finals_in(&child.seen, 1).len(), finals.len(), "nothing was begun after that");
    child.end().expect("end");

    let mut child = Child::start(simulated_config(instant()));
    child.open(1, SessionOptions::default());
    child.send(ToEngine::Finish { handle: 1 });
    child.until("its end", answered);
    assert_eq!(finals_in(&child.seen, 1), []);
    child.end().expect("end");
}

/// What was at work while the audio of `handle` was looked at, until its first final.
fn beside_its_steps(seen: &[FromEngine], handle: u64) -> usize {
    let (mut decoding, mut beside) = (0usize, 0);
    for message in seen {
        match message {
            FromEngine::Began { .. } => decoding += 1,
            FromEngine::Over { .. } => decoding -= 1,
            FromEngine::Stepping { handle: h, .. } if *h == handle => beside += decoding,
            FromEngine::Final { handle: h, .. } if *h == handle => return beside,
            _ => {}
        }
    }
    beside
}

#[test]
fn a_suspect_is_looked_at_while_nothing_is_decoded_and_nobody_is_looked_at_while_it_is() {
    let child = suspect_among(3);
    assert_eq!(beside_its_steps(&child.seen, 0), 0);
    assert!(beside_its_steps(&child.seen, 1) + beside_its_steps(&child.seen, 2) > 0, "others are, as ever");
    let first = child.seen.iter().position(|m| matches!(m, FromEngine::Final { handle: 0, .. })).expect("a final");
    let mut alone = false;
    for message in &child.seen[..first] {
        match message {
            FromEngine::Began { handle: 0, .. } => alone = true,
            FromEngine::Over { handle: 0 } => alone = false,
            FromEngine::Stepping { handle, .. } => assert!(!alone, "{handle} was looked at beside it"),
            _ => {}
        }
    }
    child.end().expect("end");
}

#[test]
fn a_stretch_that_may_not_be_looked_at_is_set_aside_and_what_comes_before_it_is_not() {
    let SetAside { mut child, direct, n, why } = SetAside::start(true);
    let bad = &direct[n];
    child.until("the one set aside", |seen| finals_in(seen, 7).iter().any(|f| f.parked).then_some(()));
    // What comes behind it is for the next opening.
    child.send(ToEngine::Finish { handle: 7 });
    child.until("its end", |seen| seen.iter().position(|m| matches!(m, FromEngine::Finished { handle: 7 })));
    let stored = finals_in(&child.seen, 7);
    assert_eq!(stored.len(), n + 1);
    assert_eq!(timeless(&stored[..n]), timeless(&direct[..n]));
    let last = &stored[n];
    assert_eq!((last.from_sample, last.error.as_ref(), last.segments.len()), (bad.from_sample, Some(&why), 0));
    assert!(last.to_sample >= bad.to_sample, "it reaches as far as a silence");
    child.end().expect("end");
}

/// How much had been said when the audio of `handle` was looked at first.
fn first_look(seen: &[FromEngine], handle: u64) -> Option<usize> {
    seen.iter().position(|m| matches!(m, FromEngine::Stepping { handle: h, .. } if *h == handle))
}

/// Whether any model was being loaded when so much had been said.
fn loading(seen: &[FromEngine]) -> bool {
    ["simulated", "other"].iter().any(|model| state_of(seen, model).is_some_and(|(s, ..)| s == Residency::Loading))
}

#[test]
fn a_suspect_waits_for_models_that_are_loaded_and_nobody_else_does() {
    let mut child = Child::start(simulated_config(SimulatedConfig { load_ms: 4_000, ..instant() }));
    let log = log_16k(&first_seconds(1, 12), 100);
    child.send(ToEngine::Load { model: "simulated".to_owned() });
    child.until("the model", |seen| state_of(seen, "simulated").filter(|(s, ..)| *s == Residency::Loaded));
    // While a second one is loaded, which the suspect does not even want.
    child.send(ToEngine::Load { model: "other".to_owned() });
    open_suspect(&mut child, 0, Suspect { beyond: 0, crashes: 1, park: None, blind: false });
    child.open(1, SessionOptions::default());
    for entry in &log {
        child.feed(0, std::slice::from_ref(entry));
        child.feed(1, std::slice::from_ref(entry));
    }
    let direct = directly(&log);
    for handle in [0, 1] {
        assert_eq!(timeless(&child.finals_of(handle)), timeless(&direct), "session {handle}");
    }
    let seen = &child.seen;
    let first = first_look(seen, 0).expect("a look");
    assert!(!loading(&seen[..first]), "a death would have been the loader's as well");
    assert!(finals_in(&seen[..first], 1).iter().any(|f| !f.segments.is_empty()), "the other was decoded meanwhile");
    child.end().expect("end");
}

/// Set for a process of this binary that is to be the engine, on the socket that is its standard input.
const IS_ENGINE: &str = "VOXFLEET_TEST_IS_ENGINE";

#[test]
fn audio_that_kills_the_voice_detector_does_so_with_no_model_being_loaded() {
    if std::env::var_os(IS_ENGINE).is_some() {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("a socket");
        serve(UnixStream::from(socket)).expect("an end in order");
        return;
    }
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let mut engine = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "suspects::audio_that_kills_the_voice_detector_does_so_with_no_model_being_loaded"])
        .env(IS_ENGINE, "1")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .expect("a process");
    let mut child =
        Child::beyond(ours, simulated_config(SimulatedConfig { load_ms: 700, poison_vad: Some(64), ..instant() }));
    open_suspect(&mut child, 7, Suspect { beyond: 0, crashes: 0, park: None, blind: false });
    child.feed(7, &log_16k(&[i16::MAX; 16_000], 100));
    child.until_it_is_gone();
    assert_eq!(engine.wait().expect("its end").signal(), Some(6), "it aborts");
    assert!(first_look(&child.seen, 7).is_some(), "at a look");
    assert!(!loading(&child.seen), "so nobody else can be blamed");
}

#[test]
fn each_stretch_that_is_looked_at_is_named() {
    let mut child = Child::start(simulated_config(instant()));
    // Nothing but silence, all there at once: many finals come of one turn.
    child.open(1, SessionOptions::default());
    child.feed(1, &log_of(&vec![0; 32_000 * 100], "pcm_s16le;rate=16000;channels=1", 32_000 * 20));
    let ends: Vec<u64> = child.finals_of(1).iter().map(|f| f.from_sample).collect();
    assert!(ends.len() > 2);
    for at in ends {
        let named = |m: &FromEngine| matches!(m, FromEngine::Stepping { at: looked, .. } if *looked == at);
        assert!(child.seen.iter().any(named), "the one at {at}");
    }
    child.end().expect("end");
}
