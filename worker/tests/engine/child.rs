//! The engine child over a real socketpair, in a thread of this process: frames in, frames out.

use std::{
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use voxfleet_schema::{
    audio::RawEntry, event::What, failure::FailureClass, fleet::Residency, session::SessionOptions, transcript::VadKind,
};
use voxfleet_worker::{
    engine::child::{ChildError, serve},
    ipc::{
        ENTRY_COST, EngineConfig, EngineKind, FromEngine, ModelFile, SimulatedConfig, StartPoint, ToEngine,
        transport::{BlockingWriter, TransportError},
    },
};

use crate::{
    rig::{Child, directly, finals_in, instant, partials_in, simulated_config, state_of},
    support::*,
};

#[test]
fn it_says_what_it_is_and_gives_the_same_finals_as_the_engine_called_directly() {
    let mut child = Child::start(simulated_config(instant()));
    let (vad, device, engine, notes) = child.until("ready", |seen| match seen.first()? {
        FromEngine::Ready { vad, device, engine, notes, .. } => {
            Some((*vad, device.clone(), engine.clone(), notes.clone()))
        }
        other => panic!("{other:?} came before ready"),
    });
    assert_eq!((vad, device.as_str(), engine.as_str()), (VadKind::Energy, "cpu", "simulated"));
    assert!(notes.iter().any(|n| n.contains("energy")), "it says why it has no Silero: {notes:?}");

    let logs: Vec<Vec<RawEntry>> = (1..=4).map(|n| log_16k(&call(n), 100)).collect();
    for handle in 0..4 {
        child.open(handle, SessionOptions::default());
    }
    child.feed_in_turn(&logs);
    for (handle, log) in (0..).zip(&logs) {
        assert_eq!(timeless(&child.finals_of(handle)), timeless(&directly(log)), "session {handle}");
        // Permits: all but what lies in the last half second comes back.
        let sent: u64 = log.iter().map(|e| e.payload.len() as u64 + ENTRY_COST).sum();
        let back = child.until("permits", |seen| {
            let back = seen.iter().filter_map(|m| match m {
                FromEngine::Consumed { handle: h, bytes } if *h == handle => Some(*bytes),
                _ => None,
            });
            let back: u64 = back.sum();
            (back + 20_000 + 8 * ENTRY_COST > sent).then_some(back)
        });
        assert!(back <= sent, "{back} bytes of {sent} came back");
    }
    child.end().expect("an orderly end");
}

#[test]
fn partials_come_while_a_thread_is_idle() {
    let mut child = Child::start(simulated_config(instant()));
    child.open(1, SessionOptions::default());
    child.open(2, SessionOptions { interim: false, ..SessionOptions::default() });
    let log = log_16k(&first_seconds(1, 4), 100);
    for handle in [1, 2] {
        child.feed(handle, &log);
    }
    child.finals_of(1);
    child.finals_of(2);
    // Fed faster than it is spoken, a final may overtake partials; slowly, they must come.
    child.open(3, SessionOptions::default());
    for (n, entry) in log.iter().take(28).enumerate() {
        child.feed(3, std::slice::from_ref(entry));
        if n == 20 {
            child.until("partial", |seen| (!partials_in(seen, 3).is_empty()).then_some(()));
        }
    }
    assert_eq!(partials_in(&child.seen, 2), [], "nobody asked for them");
    child.end().expect("end");
}

#[test]
fn whoever_takes_a_session_over_says_its_first_words_before_the_final() {
    let log = log_16k(&call(1), 200);
    for (taken_over, interim) in [(true, true), (true, false), (false, true)] {
        // All of it is there before anything can be decoded; one thread, so that what is asked for first is said first.
        let simulated = SimulatedConfig { load_ms: 4_000, ..instant() };
        let mut child = Child::start(EngineConfig { decode_states: 1, ..simulated_config(simulated) });
        let options = SessionOptions { interim, ..SessionOptions::default() };
        child.open_at(1, options, false, StartPoint { taken_over, ..StartPoint::beginning() });
        child.feed(1, &log);
        let finals = child.finals_of(1);
        assert_eq!(timeless(&finals), timeless(&directly(&log)));
        let first = finals.iter().find(|f| !f.segments.is_empty()).expect("somebody speaks");
        let said = child.seen.iter().find_map(|m| match m {
            FromEngine::Partial { partial, .. } => Some((true, partial.from_sample)),
            FromEngine::Final { draft, .. } if !draft.segments.is_empty() => Some((false, draft.from_sample)),
            _ => None,
        });
        assert_eq!(
            said,
            Some((taken_over && interim, first.from_sample)),
            "taken over {taken_over}, partials {interim}"
        );
        child.end().expect("end");
    }
}

#[test]
fn a_recording_gives_way_to_live_sessions() {
    // One thread, at 20 x: each of the recording's windows keeps it busy for a while.
    let mut config = simulated_config(SimulatedConfig { speed: 20.0, ..instant() });
    config.decode_states = 1;
    let mut child = Child::start(config);
    child.open_as(1, SessionOptions { interim: false, ..SessionOptions::default() }, true);
    child.feed(1, &log_16k(&call(1), 200));
    child.until("a final of the recording", |seen| finals_in(seen, 1).first().map(|_| ()));
    child.open(2, SessionOptions::default());
    let live = log_16k(&call(2), 200);
    child.feed(2, &live);
    child.finals_of(2);
    let of_the_recording = finals_in(&child.seen, 1).len();
    assert!(finals_in(&child.seen, 2).len() >= 4);
    // The one that was being decoded when the live session came, and one begun while that session had no window ready.
    assert!(of_the_recording <= 3, "{of_the_recording} finals of the recording came before the live session's end");
    child.finals_of(1);
    child.end().expect("end");
}

#[test]
fn models_are_loaded_once_on_first_use_and_say_what_they_take() {
    let simulated = SimulatedConfig { weights_mb: 40, state_mb: 15, load_ms: 300, ..instant() };
    let mut child = Child::start(simulated_config(simulated));
    let state = |model: &'static str| move |seen: &[FromEngine]| state_of(seen, model);
    assert_eq!(child.until("models", state("simulated")), (Residency::Available, 0, 70));
    for handle in 1..=3 {
        child.open(handle, SessionOptions::default());
        child.feed(handle, &log_16k(&first_seconds(1, 5), 200));
    }
    for handle in 1..=3 {
        assert!(!text(&child.finals_of(handle)).is_empty());
    }
    let loading = |seen: &[FromEngine]| {
        let of =
            |m: &FromEngine| matches!(m, FromEngine::Models(all) if all.iter().any(|m| m.state == Residency::Loading));
        seen.iter().filter(|m| of(m)).count()
    };
    assert_eq!(loading(&child.seen), 1, "three sessions, one load");
    let (residency, resident_mb, _) = state_of(&child.seen, "simulated").expect("models");
    assert_eq!(residency, Residency::Loaded);
    assert!((40..140).contains(&resident_mb), "{resident_mb} MB: weights once and at most two states");
    assert_eq!(state_of(&child.seen, "other").expect("models").0, Residency::Available, "nobody needed it");
    child.send(ToEngine::Load { model: "other".to_owned() });
    child.until("prewarmed", |seen| (state_of(seen, "other")?.0 == Residency::Loaded).then_some(()));
    child.end().expect("end");
}

#[test]
fn what_cannot_be_loaded_fails_its_sessions_and_no_other() {
    let damaged = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(damaged.path(), b"lmgg and then nothing").expect("write");
    let mut config = simulated_config(instant());
    config.engine = EngineKind::WhisperCpp;
    config.models = vec![
        ModelFile { name: "micro.en".to_owned(), path: micro_model() },
        ModelFile { name: "damaged".to_owned(), path: damaged.path().to_owned() },
        ModelFile { name: "missing".to_owned(), path: PathBuf::from("/nonexistent/model.bin") },
    ];
    config.default_model = "micro.en".to_owned();
    let mut child = Child::start(config);
    let named = |name: &str| SessionOptions { model: Some(name.to_owned()), ..SessionOptions::default() };
    for (handle, name) in [(1, "damaged"), (2, "missing"), (3, "unheard-of")] {
        child.open(handle, named(name));
        child.feed(handle, &log_16k(&first_seconds(1, 3), 200));
        let failure = child.failure_of(handle);
        assert_eq!(failure.class, FailureClass::ModelMissing, "{name}: {failure:?}");
    }
    // German from an English model: no other worker could do it, so the session goes on and its finals say so.
    child.open(4, SessionOptions { language: Some("de".to_owned()), ..SessionOptions::default() });
    child.open(5, SessionOptions::default());
    let samples = first_seconds(1, 5);
    for entry in log_16k(&samples, 200) {
        child.feed(4, std::slice::from_ref(&entry));
        child.feed(5, &[entry]);
    }
    let german = child.finals_of(4);
    assert_chain(&german, samples.len() as u64);
    let refused = german.iter().filter_map(|f| f.error.as_ref()).map(|e| e.class).collect::<Vec<_>>();
    assert!(!refused.is_empty() && refused.iter().all(|class| *class == FailureClass::BadRequest), "{refused:?}");
    assert_eq!(text(&german), "");
    assert!(text(&child.finals_of(5)).starts_with("good morning"));
    assert_eq!(child.finals_of(5)[0].model, "micro.en");
    assert!(!child.seen.iter().any(|m| matches!(m, FromEngine::Failed { handle: 4 | 5, .. })));
    child.end().expect("end");
}

#[test]
fn a_model_that_does_not_fit_is_out_of_memory() {
    let mut child = Child::start(simulated_config(SimulatedConfig { weights_mb: 1 << 40, ..instant() }));
    child.open(1, SessionOptions::default());
    assert_eq!(child.failure_of(1).class, FailureClass::OutOfMemory);
    assert_eq!(state_of(&child.seen, "simulated").expect("models").0, Residency::NoRoom);
    child.end().expect("end");
}

#[test]
fn a_model_leaves_when_nobody_uses_it_and_comes_back_at_the_next_use() {
    let loads = |seen: &[FromEngine]| seen.iter().filter(|m| matches!(m, FromEngine::Loaded { .. })).count();
    let mut child = Child::start(simulated_config(instant()));
    let log = log_16k(&first_seconds(1, 4), 200);
    for handle in 1..4 {
        child.open(handle, SessionOptions::default());
    }
    child.feed(1, &log);
    let first = child.finals_of(1);
    assert_eq!(loads(&child.seen), 1, "however many want it");
    child.send(ToEngine::Unload { model: "simulated".to_owned() });
    child.feed(2, &log);
    assert_eq!(timeless(&child.finals_of(2)), timeless(&first), "it is in use");
    assert_eq!(loads(&child.seen), 1);
    for handle in 1..4 {
        child.send(ToEngine::Close { handle });
    }
    child.send(ToEngine::Unload { model: "simulated".to_owned() });
    child.until("its release", |seen| {
        (state_of(seen, "simulated").is_some_and(|state| state.0 == Residency::Available)).then_some(())
    });
    child.open(4, SessionOptions::default());
    child.feed(4, &log);
    assert_eq!(timeless(&child.finals_of(4)), timeless(&first));
    assert_eq!(loads(&child.seen), 2);
    child.end().expect("end");
}

#[test]
fn failed_decodes_are_tried_again_and_change_no_text() {
    let log = log_16k(&call(2), 200);
    let expected = directly(&log);
    let mut child = Child::start(simulated_config(SimulatedConfig { fail_every: 3, ..instant() }));
    child.open(1, SessionOptions::default());
    child.feed(1, &log);
    assert_eq!(timeless(&child.finals_of(1)), timeless(&expected));
    child.end().expect("end");
    // All of them fail: the audio is covered all the same, and the finals say so.
    let mut child = Child::start(simulated_config(SimulatedConfig { fail_every: 1, ..instant() }));
    child.open(1, SessionOptions::default());
    child.feed(1, &log);
    let failed = child.finals_of(1);
    assert_chain(&failed, call(2).len() as u64);
    assert!(failed.iter().any(|f| f.error.is_some()) && failed.iter().all(|f| f.segments.is_empty()));
    child.end().expect("end");
}

#[test]
fn a_hung_decode_is_silent_and_a_working_one_is_not() {
    let progress = |seen: &[FromEngine]| -> Vec<bool> {
        let of = |m: &FromEngine| match m {
            FromEngine::Progress { working, .. } => Some(*working),
            _ => None,
        };
        seen.iter().filter_map(of).collect()
    };
    // Two seconds of audio take two seconds: about ten reports.
    let mut child = Child::start(simulated_config(SimulatedConfig { speed: 1.0, ..SimulatedConfig::default() }));
    child.open(1, SessionOptions { interim: false, ..SessionOptions::default() });
    child.feed(1, &log_16k(&first_seconds(1, 3), 200));
    child.finals_of(1);
    child.until("rest", |seen| (progress(seen).last() == Some(&false)).then_some(()));
    assert!(progress(&child.seen).iter().filter(|w| **w).count() >= 5, "{:?}", progress(&child.seen));
    child.end().expect("end");

    let mut child = Child::start(simulated_config(SimulatedConfig { hang_at: 1, ..instant() }));
    child.open(1, SessionOptions { interim: false, ..SessionOptions::default() });
    child.feed(1, &log_16k(&call(1), 200));
    child.until("a hang", |seen| (progress(seen).last() == Some(&true)).then_some(()));
    // Within that second many reports would have come.
    child.until_it_is_quiet();
    assert_eq!(progress(&child.seen).last(), Some(&true), "it has work and does not move");
    // The loop still answers.
    child.open(2, SessionOptions { model: Some("unheard-of".to_owned()), ..SessionOptions::default() });
    assert_eq!(child.failure_of(2).class, FailureClass::ModelMissing);
    let begin = Instant::now();
    child.end().expect("end");
    assert!(begin.elapsed() < Duration::from_secs(5), "a hung thread does not hold the end up");
}

#[test]
fn a_closed_session_is_forgotten_at_once() {
    let slow = SimulatedConfig { speed: 0.1, ..SimulatedConfig::default() };
    let mut child = Child::start(simulated_config(slow));
    let log = log_16k(&first_seconds(1, 4), 200);
    for handle in [1, 2] {
        child.open(handle, SessionOptions::default());
        child.feed(handle, &log);
    }
    child.until("a decode", |seen| {
        let loaded = (0..seen.len())
            .find(|n| state_of(&seen[..=*n], "simulated").is_some_and(|(state, ..)| state == Residency::Loaded))?;
        seen[loaded..].iter().any(|m| matches!(m, FromEngine::Progress { working: true, .. })).then_some(())
    });
    for handle in [1, 2] {
        child.send(ToEngine::Close { handle });
    }
    // 30 s of decoding would have been left.
    let begin = Instant::now();
    let (decodes, audio_ms, busy_ms) = child.until("rest", |seen| {
        let last = seen.iter().rev().find(|m| matches!(m, FromEngine::Progress { .. }));
        match last? {
            FromEngine::Progress { decodes, audio_ms, busy_ms, working: false, .. } => {
                Some((*decodes, *audio_ms, *busy_ms))
            }
            _ => None,
        }
    });
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert!(decodes > 0, "they were begun");
    assert_eq!((audio_ms, busy_ms), (0, 0), "a decode that was cancelled tells nothing about speed");
    assert_eq!(finals_in(&child.seen, 1), []);
    child.feed(1, &log);
    child.open(3, SessionOptions { model: Some("unheard-of".to_owned()), ..SessionOptions::default() });
    child.failure_of(3);
    assert_eq!(finals_in(&child.seen, 1), [], "audio of a closed session goes nowhere");
    child.end().expect("end");
}

#[test]
fn notes_come_with_the_entry_they_are_about() {
    let mut child = Child::start(simulated_config(instant()));
    child.open(1, SessionOptions::default());
    let mut log = log_16k(&first_seconds(1, 2), 200);
    log.insert(2, entry(&[("Asr-Seq", "minus one")], bytes::Bytes::from_static(&[0; 4])));
    log.insert(4, entry(&[], bytes::Bytes::from_static(b"OggS and so on")));
    number(&mut log);
    child.feed(1, &log);
    child.finals_of(1);
    // Where all of it is there in one turn, they follow the final.
    let noted = child.until("two notes", |seen| {
        let notes = seen.iter().filter_map(|m| match m {
            FromEngine::Note { handle: 1, note } => Some((note.seq, note.what)),
            _ => None,
        });
        let noted: Vec<(u64, What)> = notes.collect();
        (noted.len() >= 2).then_some(noted)
    });
    assert_eq!(
        noted.iter().filter(|(seq, what)| *seq == log[2].seq && *what == What::Rejected).count(),
        1,
        "{noted:?}"
    );
    assert!(noted.contains(&(log[4].seq, What::Rejected)), "{noted:?}");
    child.end().expect("end");
}

#[test]
fn broken_beginnings_are_typed() {
    let run = |write: &dyn Fn(&mut BlockingWriter<UnixStream>)| {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        let child = std::thread::spawn(move || serve(theirs));
        let mut writer = BlockingWriter::new(ours);
        write(&mut writer);
        drop(writer);
        child.join().expect("no panic")
    };
    assert!(run(&|_| ()).is_ok(), "a supervisor that changes its mind");
    let unconfigured = run(&|w| w.send(&ToEngine::Load { model: "m".to_owned() }).expect("send"));
    assert!(matches!(unconfigured, Err(ChildError::NotConfigured)));
    let garbage = run(&|w| w.send(&"not a message").expect("send"));
    assert!(matches!(garbage, Err(ChildError::Transport(TransportError::Decode(_)))));
    assert!(matches!(voxfleet_worker::engine::child::main(1), Err(ChildError::Fd(1))));
}
