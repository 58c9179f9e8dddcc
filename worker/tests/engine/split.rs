//! What the engine child does with channels that are heard one by one.

use voxfleet_schema::{
    audio::RawEntry,
    failure::{Failure, FailureClass},
    session::{Channels, SessionOptions},
};
use voxfleet_worker::{
    engine::vad::Energy,
    ipc::{FinalDraft, FromEngine, SimulatedConfig, StartPoint, Suspect, ToEngine},
};

use crate::{
    rig::{Child, instant, simulated_config},
    support::*,
};

fn split() -> SessionOptions {
    SessionOptions { channels: Channels::Split, interim: false, ..SessionOptions::default() }
}

/// Two calls at once, a pause that both make, and two others.
fn both() -> Vec<RawEntry> {
    let side = |first, second| [first_seconds(first, 14), vec![0; 24_000], first_seconds(second, 6)].concat();
    let (left, right) = (side(1, 2), side(2, 4));
    let both: Vec<i16> = left.iter().zip(&right).flat_map(|(l, r)| [*l, *r]).collect();
    log_of(&bytes_s16(&both), "pcm_s16le;rate=16000;channels=2", 6_400)
}

fn directly(log: &[RawEntry]) -> Vec<FinalDraft> {
    let mut recognizer = Remembering::new(&simulated());
    timeless(&finals_with(log, &split(), StartPoint::beginning(), &mut recognizer, &Energy))
}

fn slow() -> SimulatedConfig {
    SimulatedConfig { speed: 60.0, ..instant() }
}

/// Most windows that were decoded at once in what a child said.
fn most_at_once(seen: &[FromEngine]) -> usize {
    let (mut running, mut most) = (0usize, 0);
    for message in seen {
        match message {
            FromEngine::Began { .. } => running += 1,
            FromEngine::Over { .. } => running -= 1,
            _ => {}
        }
        most = most.max(running);
    }
    assert_eq!(running, 0, "all of them came back");
    most
}

fn open_suspect(child: &mut Child, suspect: Suspect) {
    let (options, start) = (Box::new(split()), Box::new(StartPoint::beginning()));
    child.send(ToEngine::Open {
        handle: 7,
        options,
        start,
        background: false,
        suspect: Some(suspect),
        scout: false,
        hears: false,
    });
}

#[test]
fn both_states_work_on_both_channels_and_say_what_the_engine_says_directly() {
    let log = both();
    let mut child = Child::start(simulated_config(slow()));
    child.open(7, split());
    child.feed(7, &log);
    let finals = timeless(&child.finals_of(7));
    assert!(finals.iter().any(|f| f.segments.len() > 1), "nobody spoke while the other did");
    assert_eq!(finals, directly(&log));
    child.until_it_is_quiet();
    assert_eq!(most_at_once(&child.seen), 2);
    child.end().expect("end");
}

#[test]
fn windows_of_a_suspect_are_decoded_one_by_one() {
    let log = both();
    let mut child = Child::start(simulated_config(slow()));
    open_suspect(&mut child, Suspect { beyond: u64::MAX, crashes: 1, park: None, blind: false });
    child.feed(7, &log);
    assert_eq!(timeless(&child.finals_of(7)), directly(&log));
    child.until_it_is_quiet();
    assert_eq!(most_at_once(&child.seen), 1);
    child.end().expect("end");
}

#[test]
fn a_parked_stretch_is_parked_on_all_channels() {
    let (log, why) = (both(), Failure::new(FailureClass::EngineCrash, "it kills"));
    let direct = directly(&log);
    // Not the first one, which finds out the language.
    let n = direct.iter().rposition(|f| f.segments.len() > 1).expect("both speak");
    assert!(n > 0, "{} finals", direct.len());
    let mut child = Child::start(simulated_config(instant()));
    let beyond = direct[n].from_sample;
    open_suspect(&mut child, Suspect { beyond, crashes: 3, park: Some(why.clone()), blind: false });
    child.feed(7, &log);
    let stored = timeless(&child.finals_of(7));
    assert_eq!(stored.len(), direct.len());
    for (at, (stored, direct)) in stored.iter().zip(&direct).enumerate() {
        if at == n {
            assert!(stored.parked && stored.segments.is_empty() && stored.error == Some(why.clone()));
            assert_eq!((stored.to_sample, &stored.resume), (direct.to_sample, &direct.resume));
        } else {
            assert_eq!(stored, direct, "final {at}");
        }
    }
    child.end().expect("end");
}

#[test]
fn a_decode_that_fails_on_one_channel_is_tried_again_and_changes_nothing() {
    let log = both();
    let mut child = Child::start(simulated_config(SimulatedConfig { fail_every: 3, ..instant() }));
    child.open(7, split());
    child.feed(7, &log);
    assert_eq!(timeless(&child.finals_of(7)), directly(&log));
    child.end().expect("end");
}
