//! What every engine promises, real and simulated, with each voice activity detector.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::support::*;
use voxfleet_schema::{
    audio::RawEntry,
    failure::FailureClass,
    session::{Channels, SessionOptions, Task},
};
#[cfg(feature = "ct2-engine")]
use voxfleet_worker::{engine::ct2::ComputeType, ipc::Ct2Config};
use voxfleet_worker::{
    engine::{
        Cancel, EngineError, Purpose, Recognizer, Window,
        direct::transcribe_log,
        pool::Model,
        simulated::{SimulatedModel, text_of},
        stream::{SessionStream, Step},
        vad::{Energy, VadFactory},
        whisper::WhisperModel,
    },
    ipc::{ENTRY_COST, FinalDraft, SimulatedConfig, StartPoint},
};

/// Every engine with each detector.
fn engines() -> Vec<(Model, Arc<dyn VadFactory>)> {
    let pair = |model: Model| detectors().into_iter().map(move |vads| (model.clone(), vads));
    let both = pair(simulated()).chain(pair(whisper()));
    #[cfg(feature = "ct2-engine")]
    let both = both.chain(pair(ct2(&Ct2Config { compute_type: ComputeType::Float32, ..Ct2Config::default() })));
    both.collect()
}

fn named(model: &Model, vads: &dyn VadFactory) -> String {
    format!("{} with {}", model.info().engine, vads.kind().as_str())
}

fn window(samples: Vec<f32>, purpose: Purpose) -> Window {
    Window {
        samples,
        from_sample: 0,
        purpose,
        prompt: String::new(),
        language: None,
        task: Task::Transcribe,
        hearing: None,
        background: false,
        cancel: Cancel::default(),
    }
}

#[test]
fn resuming_from_any_final_gives_exactly_the_finals_that_follow() {
    for (model, vads) in engines() {
        let name = named(&model, vads.as_ref());
        let mut recognizer = Remembering::new(&model);
        for (samples, carry_prompt) in [(call(1), false), (first_seconds(2, 14), true)] {
            let log = log_16k(&samples, 170);
            let options = SessionOptions { carry_prompt, ..SessionOptions::default() };
            let run = |start, recognizer: &mut Remembering| {
                timeless(&finals_with(&log, &options, start, recognizer, vads.as_ref()))
            };
            let undisturbed = run(StartPoint::beginning(), &mut recognizer);
            assert_chain(&undisturbed, samples.len() as u64);
            assert!(undisturbed.len() >= 3, "{name}: {} finals", undisturbed.len());
            let decodes = recognizer.decodes;
            for index in 0..undisturbed.len() - 1 {
                let resumed = run(after(&undisturbed, index), &mut recognizer);
                assert_eq!(resumed, undisturbed[index + 1..], "{name}, resumed from final {index}");
            }
            assert_eq!(recognizer.decodes, decodes, "{name}: resuming made other windows");
        }
    }
}

#[test]
fn chunk_sizes_change_no_final() {
    let essence = |finals: &[FinalDraft]| -> Vec<_> {
        let of =
            |f: &FinalDraft| (f.from_sample, f.to_sample, f.segments.clone(), f.speech_final, f.end, f.guards.clone());
        finals.iter().map(of).collect()
    };
    for (model, vads) in engines() {
        let name = named(&model, vads.as_ref());
        let mut recognizer = Remembering::new(&model);
        let samples = call(4);
        let expected = finals(&log_16k(&samples, 200), &mut recognizer, vads.as_ref());
        assert!(expected.len() > 6, "{name}");
        for ms in [1, 10, 32, 333, 1_000, 7_000, 30_000] {
            let cut = finals(&log_16k(&samples, ms), &mut recognizer, vads.as_ref());
            assert_eq!(essence(&cut), essence(&expected), "{name}, chunks of {ms} ms");
        }
        // Other rates change what is heard, not how: one engine is enough.
        if !matches!(model, Model::Simulated(_)) {
            continue;
        }
        let slow: Vec<i16> = first_seconds(4, 12).iter().step_by(2).copied().collect();
        let at_8k = |chunk| log_of(&bytes_s16(&slow), "pcm_s16le;rate=8000;channels=1", chunk);
        let expected = finals(&at_8k(3_200), &mut recognizer, vads.as_ref());
        for chunk in [2, 34, 15_998] {
            let cut = finals(&at_8k(chunk), &mut recognizer, vads.as_ref());
            assert_eq!(essence(&cut), essence(&expected), "{name}, 8 kHz in chunks of {chunk} bytes");
        }
    }
}

#[test]
fn channels_heard_one_by_one_resume_and_do_not_see_chunks() {
    let options = SessionOptions { channels: Channels::Split, carry_prompt: true, ..SessionOptions::default() };
    // Two calls at once, the second begun in the middle of a sentence: they hardly ever pause together.
    let (left, right) = (first_seconds(2, 20), first_seconds(4, 22).split_off(32_000));
    let both: Vec<i16> = left.iter().zip(&right).flat_map(|(l, r)| [*l, *r]).collect();
    let log = |ms: usize| log_of(&bytes_s16(&both), "pcm_s16le;rate=16000;channels=2", ms * 64);
    for (model, vads) in engines() {
        let name = named(&model, vads.as_ref());
        let mut recognizer = Remembering::new(&model);
        let mut run =
            |log: &[RawEntry], start| timeless(&finals_with(log, &options, start, &mut recognizer, vads.as_ref()));
        let undisturbed = run(&log(170), StartPoint::beginning());
        assert_chain(&undisturbed, left.len() as u64);
        let channels: Vec<_> = undisturbed.iter().flat_map(|f| f.segments.iter().map(|s| s.channel)).collect();
        assert!(channels.contains(&Some(0)) && channels.contains(&Some(1)), "{name}");
        for index in 0..undisturbed.len() - 1 {
            let resumed = run(&log(170), after(&undisturbed, index));
            assert_eq!(resumed, undisturbed[index + 1..], "{name}, resumed from final {index}");
        }
        for ms in [10, 333, 7_000] {
            let cut = run(&log(ms), StartPoint::beginning());
            let essence = |all: &[FinalDraft]| -> Vec<_> {
                all.iter().map(|f| (f.from_sample, f.to_sample, f.segments.clone(), f.speech_final)).collect()
            };
            assert_eq!(essence(&cut), essence(&undisturbed), "{name}, chunks of {ms} ms");
        }
    }
}

#[test]
fn the_simulated_text_is_that_of_the_samples() {
    let samples = call(2);
    let log = log_16k(&samples, 100);
    let model = simulated();
    for vads in detectors() {
        let all = finals(&log, model.state().expect("state").as_mut(), vads.as_ref());
        let floats = as_f32(&samples);
        let mut words = 0;
        for segment in all.iter().flat_map(|f| &f.segments) {
            let (from, to) = (segment.start_ms as usize * 16, segment.end_ms as usize * 16);
            // Whole blocks of the segment; its first and last may be cut within a millisecond.
            let inside = from.next_multiple_of(4_000)..to / 4_000 * 4_000;
            let expected = text_of(&floats[inside.clone()], inside.start as u64);
            assert!(segment.text.contains(&expected), "{:?} in {:?}", expected, segment.text);
            words += expected.split(' ').count();
        }
        assert!(words > 60, "{words} words");
    }
}

#[test]
fn silence_and_noise_give_no_text() {
    for (model, vads) in engines() {
        let name = named(&model, vads.as_ref());
        let mut recognizer = Remembering::new(&model);
        for file in ["holdout/silence-digital.flac", "holdout/silence-noise.flac"] {
            let samples = audio(file);
            let all = finals(&log_16k(&samples, 200), &mut recognizer, vads.as_ref());
            assert_chain(&all, samples.len() as u64);
            assert_eq!(text(&all), "", "{name}, {file}");
        }
        // The recognizer by itself, where a detector let silence through: they say white space or nothing.
        if !matches!(model, Model::Simulated(_)) {
            for purpose in [Purpose::Partial, Purpose::Final] {
                for samples in [vec![0.0; 48_000], as_f32(&audio("holdout/silence-noise.flac"))] {
                    let heard = voxfleet_worker::engine::pool::hear(&mut recognizer, &window(samples, purpose));
                    assert_eq!(heard.expect("decode").hypothesis.segments, [], "{name}, {purpose:?}");
                }
            }
        }
    }
}

#[test]
fn long_silence_is_committed() {
    for (model, vads) in engines() {
        let all = finals(&log_16k(&vec![0; 100 * 16_000], 500), &mut Remembering::new(&model), vads.as_ref());
        assert_chain(&all, 100 * 16_000);
        assert!((3..6).contains(&all.len()), "{} finals", all.len());
        assert!(all.iter().all(|f| f.segments.is_empty()));
    }
}

#[test]
fn a_flush_ends_a_final_where_it_stands() {
    for (model, vads) in engines() {
        let name = named(&model, vads.as_ref());
        let samples = call(1);
        let mut log = log_16k(&samples, 100);
        // 1.7 s: in the middle of the first sentence.
        log.insert(17, flush());
        number(&mut log);
        let mut recognizer = Remembering::new(&model);
        let all = timeless(&finals(&log, &mut recognizer, vads.as_ref()));
        assert_chain(&all, samples.len() as u64);
        let flushed = all.iter().position(|f| f.to_sample == 17 * 1_600).expect("a final up to the flush");
        assert_eq!(all[flushed].audio.to_seq, log[17].seq, "{name}");
        assert!(all[flushed].speech_final && !all[flushed].segments.is_empty(), "{name}");
        // A flush that is done is passed over when it is read again.
        let options = SessionOptions::default();
        let resumed = finals_with(&log, &options, after(&all, flushed), &mut recognizer, vads.as_ref());
        assert_eq!(timeless(&resumed), all[flushed + 1..], "{name}");
    }
}

#[test]
fn audio_after_an_end_goes_on_in_the_same_chain() {
    for (model, vads) in engines() {
        let (first, second) = (first_seconds(2, 9), first_seconds(4, 9));
        let mut log = log_16k(&first, 200);
        let ended_at = log.len() - 1;
        log.extend(log_16k(&second, 200));
        number(&mut log);
        let mut recognizer = Remembering::new(&model);
        let all = finals(&log[..=ended_at], &mut recognizer, vads.as_ref());
        assert_chain(&all, first.len() as u64);
        let last = all.last().expect("finals");
        assert_eq!(last.audio.to_seq, log[ended_at].seq);
        let options = SessionOptions::default();
        let more = finals_with(&log, &options, after(&all, all.len() - 1), &mut recognizer, vads.as_ref());
        assert_eq!(more[0].from_sample, last.to_sample);
        assert_chain(&[&all[..all.len() - 1], &[FinalDraft { end: false, ..last.clone() }], &more].concat(), {
            (first.len() + second.len()) as u64
        });
    }
}

#[test]
fn a_format_may_change_inside_a_session() {
    for (model, vads) in engines() {
        let name = named(&model, vads.as_ref());
        let (first, second) = (first_seconds(2, 9), as_f32(&first_seconds(4, 9)));
        let mut log = log_16k(&first, 200);
        log.pop();
        log.extend(log_of(&bytes_f32(&second), "pcm_f32le;rate=16000", 6_400));
        number(&mut log);
        let mut recognizer = Remembering::new(&model);
        let all = timeless(&finals(&log, &mut recognizer, vads.as_ref()));
        assert_chain(&all, (first.len() + second.len()) as u64);
        for index in 0..all.len() - 1 {
            let options = SessionOptions::default();
            let resumed = finals_with(&log, &options, after(&all, index), &mut recognizer, vads.as_ref());
            assert_eq!(timeless(&resumed), all[index + 1..], "{name}, resumed from final {index}");
        }
    }
}

#[test]
fn a_decode_depends_on_its_window_alone() {
    let model = whisper();
    let samples = as_f32(&call(1));
    let windows: Vec<Window> = [(8_000, 48_000), (60_000, 110_000), (120_000, 170_000)]
        .into_iter()
        .map(|(from, to)| window(samples[from..to].to_vec(), Purpose::Final))
        .collect();
    let mut state = model.state().expect("state");
    let expected: Vec<_> =
        windows.iter().map(|w| model.state().expect("state").decode(std::slice::from_ref(w))).collect();
    // Other windows, partials and prompts in between leave no trace.
    for order in [[0, 1, 2], [2, 0, 1], [1, 1, 0]] {
        for index in order {
            let partial = Window { purpose: Purpose::Partial, ..windows[(index + 1) % 3].clone() };
            let prompted = Window { prompt: "oslo, berlin, hello my name is anna".to_owned(), ..partial.clone() };
            assert!(state.decode(&[partial, prompted]).iter().all(Result::is_ok));
            assert_eq!(state.decode(&windows[index..=index]), expected[index]);
        }
    }
}

#[test]
fn partials_hear_what_finals_hear() {
    let model = whisper();
    let mut state = model.state().expect("state");
    let samples = as_f32(&call(1));
    let (from, to) = (6_160, 47_000);
    let heard = |state: &mut dyn Recognizer, purpose| {
        let heard =
            state.decode(&[window(samples[from..to].to_vec(), purpose)]).pop().expect("answer").expect("decode");
        heard.segments.iter().map(|s| s.text.clone()).collect::<Vec<_>>().join(" ")
    };
    let (partial, whole) = (heard(state.as_mut(), Purpose::Partial), heard(state.as_mut(), Purpose::Final));
    assert_eq!(partial, "good morning this is lucy how can i help you");
    assert_eq!(whole, partial);
    let short = state.decode(&[window(samples[from..from + 2_000].to_vec(), Purpose::Partial)]).pop().expect("answer");
    assert!(short.is_ok(), "an eighth of a second is padded");
}

#[test]
fn what_a_model_cannot_do_is_typed() {
    let mut state = whisper().state().expect("state");
    let speech = window(vec![0.1; 16_000], Purpose::Final);
    for window in [
        Window { language: Some("de".to_owned()), ..speech.clone() },
        Window { task: Task::Translate, ..speech.clone() },
        Window { language: Some("xx".to_owned()), ..speech.clone() },
    ] {
        let answer = state.decode(&[window]).pop().expect("answer");
        assert!(matches!(&answer, Err(EngineError::Unsupported(_))), "{answer:?}");
        assert_eq!(answer.expect_err("error").class(), FailureClass::BadRequest);
    }
    let english = state.decode(&[Window { language: Some("en".to_owned()), ..speech.clone() }]).pop().expect("answer");
    assert_eq!(english.expect("decode").language.as_deref(), Some("en"));
    let long = Window { prompt: "hello my name is anna ".repeat(2_000), ..speech };
    assert!(state.decode(&[long]).pop().expect("answer").is_ok(), "a prompt of any length is cut");
}

#[test]
fn a_cancelled_decode_ends_soon() {
    let samples = as_f32(&[call(1), call(2)].concat());
    for (name, model) in [
        ("whisper", whisper()),
        ("simulated", {
            let slow = SimulatedConfig { speed: 0.01, ..SimulatedConfig::default() };
            Model::Simulated(SimulatedModel::load("slow", &slow).expect("load"))
        }),
    ] {
        let mut state = model.state().expect("state");
        let window = window(samples[..28 * 16_000].to_vec(), Purpose::Final);
        let cancel = window.cancel.clone();
        let running = std::thread::spawn(move || {
            let answer = state.decode(&[window]).pop().expect("answer");
            (answer, Instant::now())
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while cancel.looks() < 3 {
            assert!(Instant::now() < deadline, "{name}: the decode never looked at its flag");
            std::thread::yield_now();
        }
        let begin = Instant::now();
        cancel.cancel();
        let (answer, ended) = running.join().expect("thread");
        assert_eq!(answer, Err(EngineError::Cancelled), "{name}");
        let took = ended.saturating_duration_since(begin);
        assert!(took < Duration::from_secs(4), "{name} took {took:?}");
    }
}

/// Drives a stream chunk by chunk as the engine does, and watches what it keeps.
struct Soak {
    finals: usize,
    most_kept_bytes: u64,
    most_behind_ms: u64,
    grown_mb: u64,
}

fn soak(model: &Model, seconds: usize) -> Soak {
    let mut recognizer = model.state().expect("state");
    let audio = [call(1), call(2), vec![0; 16_000 * 9], call(4), call(5)].concat();
    let mut stream = SessionStream::new(&SessionOptions::default(), StartPoint::beginning(), Energy.create());
    let mut result = Soak { finals: 0, most_kept_bytes: 0, most_behind_ms: 0, grown_mb: 0 };
    let (mut pushed, mut consumed, mut before) = (0, 0, None);
    let chunks = audio.chunks(3_200).cycle().take(seconds * 5);
    for (number, chunk) in chunks.enumerate() {
        let payload = bytes_s16(chunk);
        pushed += payload.len() as u64 + ENTRY_COST;
        stream.push(RawEntry { seq: number as u64 + 1, headers: Vec::new(), payload: payload.into() });
        loop {
            match stream.step().expect("step") {
                Step::Starved => break,
                Step::Ended => panic!("nothing ended it"),
                Step::Draft(_) => result.finals += 1,
                Step::Final(windows) => {
                    let heard = recognizer.decode(&windows).pop().expect("answer");
                    let timings = Default::default();
                    stream
                        .complete(0, heard, Vec::new(), Default::default(), recognizer.info(), timings)
                        .expect("a final");
                    result.finals += 1;
                }
            }
        }
        if let Some(window) = stream.partial_window() {
            let to_sample = window.from_sample + window.samples.len() as u64;
            let heard = recognizer.decode(&[window]).pop().expect("answer").expect("decode");
            let partial = stream.partial_heard(&heard, to_sample).expect("nothing overtook it");
            assert!(partial.lag_ms < 1_000, "{}", partial.lag_ms);
        }
        consumed += stream.take_consumed();
        assert!(stream.take_notes().is_empty());
        result.most_kept_bytes = result.most_kept_bytes.max(pushed - consumed);
        result.most_behind_ms = result.most_behind_ms.max(stream.behind_ms());
        // The first fifth warms up.
        if number >= seconds {
            let now = resident_mb();
            result.grown_mb = result.grown_mb.max(now.saturating_sub(*before.get_or_insert(now)));
        }
    }
    result
}

#[test]
fn twenty_minutes_keep_memory_and_lag_flat() {
    let soak = soak(&simulated(), 20 * 60);
    println!(
        "{} finals, kept {} kB at most, {} ms behind",
        soak.finals,
        soak.most_kept_bytes / 1_000,
        soak.most_behind_ms
    );
    assert!(soak.finals > 200, "{}", soak.finals);
    // A full window and half a second before it, at 32 kB/s.
    assert!(soak.most_kept_bytes < 31 * (32_000 + 5 * ENTRY_COST), "{} bytes", soak.most_kept_bytes);
    assert!(soak.most_behind_ms < 31_000, "{} ms", soak.most_behind_ms);
    // Other tests of this binary load models meanwhile; a leak of the audio alone would be over 70 MB.
    assert!(soak.grown_mb < 60, "{} MB", soak.grown_mb);
}

#[test]
fn whisper_keeps_up() {
    let begin = Instant::now();
    let soak = soak(&whisper(), 30);
    println!("{} finals in {:?}, {} MB more", soak.finals, begin.elapsed(), soak.grown_mb);
    assert!(soak.finals > 6);
    assert!(soak.most_kept_bytes < 31 * (32_000 + 5 * ENTRY_COST), "{} bytes", soak.most_kept_bytes);
}

#[test]
fn partials_grow_towards_their_final() {
    let mut partials = Vec::new();
    let log = log_16k(&first_seconds(1, 14), 200);
    let mut state = Remembering::new(&whisper());
    let options = SessionOptions::default();
    let mut keep = |p| partials.push(p);
    let with = transcribe_log(&log, &options, StartPoint::beginning(), &mut state, &Energy, Some(&mut keep));
    let without = finals(&log, &mut state, &Energy);
    assert_eq!(timeless(&with.expect("finals")), timeless(&without), "partials change no final");
    assert!(partials.len() > 4, "{} partials", partials.len());
    let mut stable = (u64::MAX, String::new());
    for partial in &partials {
        assert!(partial.to_sample > partial.from_sample && partial.lag_ms < 1_000);
        if stable.0 == partial.from_sample {
            assert!(partial.committed.starts_with(&stable.1), "{:?} then {:?}", stable.1, partial.committed);
        }
        stable = (partial.from_sample, partial.committed.clone());
    }
}

#[test]
fn a_damaged_model_is_refused_before_it_is_loaded() {
    let whole = std::fs::read(micro_model()).expect("model");
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), &whole[..whole.len() / 2]).expect("write");
    let refused = WhisperModel::load("half", file.path(), false, 1).map(|_| ()).expect_err("half a model");
    assert!(matches!(&refused, EngineError::Model { name, .. } if name == "half"), "{refused}");
}
