//! The engine on the micro model.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, setrlimit};
use symphonia::core::{
    codecs::audio::AudioDecoderOptions,
    formats::{FormatOptions, TrackType, probe::Hint},
    io::MediaSourceStream,
    meta::MetadataOptions,
};
use voxfleet_ggml::folder::{Precision, convert};
use voxfleet_schema::session::Task;

use super::{ComputeType, Ct2Config, Ct2Device, Ct2Model, pass::Run, pulse::Pulse};
use crate::engine::{
    Cancel, EngineError, Hypothesis, Purpose, Recognizer, Window,
    whisper::{
        WhisperModel, WhisperRecognizer,
        random::{self, Format, Shape},
    },
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn micro() -> PathBuf {
    root().join("tests/models/micro.en-q8_0.bin")
}

/// A folder of the micro model that lives as long as the test.
fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("folder");
    let dir = folder.path().join("micro.en");
    convert(&micro(), &dir, Precision::Float32, &mut |_, _| true).expect("converted");
    (folder, dir)
}

fn model(compute_type: ComputeType, batch: usize) -> Ct2Model {
    let (_folder, dir) = folder();
    load(&dir, &Ct2Config { compute_type, batch, folders: None }).expect("loaded")
}

fn load(dir: &Path, config: &Ct2Config) -> Result<Ct2Model, EngineError> {
    Ct2Model::load("micro.en", dir, config, 1, false, &Ct2Device::start().expect("thread"))
}

fn whisper() -> WhisperRecognizer {
    WhisperModel::load("micro.en", &micro(), false, 1).expect("loaded").state().expect("state")
}

fn audio(name: &str) -> Vec<f32> {
    let file = std::fs::File::open(root().join("tests/audio").join(name)).expect(name);
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let mut reader = symphonia::default::get_probe()
        .probe(&Hint::new(), stream, FormatOptions::default(), MetadataOptions::default())
        .expect("probe");
    let codec = reader.default_track(TrackType::Audio).and_then(|t| t.codec_params.as_ref()?.audio().cloned());
    let mut decoder = symphonia::default::get_codecs()
        .make_audio_decoder(&codec.expect("audio track"), &AudioDecoderOptions::default())
        .expect("decoder");
    let (mut samples, mut piece) = (Vec::new(), Vec::new());
    while let Some(packet) = reader.next_packet().expect("packet") {
        decoder.decode(&packet).expect("decode").copy_to_vec_interleaved::<f32>(&mut piece);
        samples.extend_from_slice(&piece);
    }
    samples
}

/// Beginning and end in seconds, and those of its words.
type Turn = (f64, f64, Vec<(f64, f64)>);

/// The turns of a call.
fn turns(call: u32) -> Vec<Turn> {
    let text = std::fs::read_to_string(root().join(format!("tests/audio/call-{call:02}.json"))).expect("description");
    let call: serde_json::Value = serde_json::from_str(&text).expect("json");
    let time = |value: &serde_json::Value, key: &str| value[key].as_f64().expect("time");
    let list = |value: &serde_json::Value, key: &str| value[key].as_array().expect("list").clone();
    list(&call, "turns")
        .iter()
        .map(|turn| {
            let words = list(turn, "words").iter().map(|w| (time(w, "start"), time(w, "end"))).collect();
            (time(turn, "start"), time(turn, "end"), words)
        })
        .collect()
}

/// Each turn of the five calls with 150 ms around it.
fn utterances(purpose: Purpose) -> Vec<Window> {
    (1..=5)
        .flat_map(|call| {
            let samples = audio(&format!("call-{call:02}.flac"));
            turns(call).into_iter().map(move |(begin, end, _)| {
                let place = |seconds: f64| (seconds.max(0.0) * 16_000.0) as usize;
                let range = place(begin - 0.15)..place(end + 0.15).min(samples.len());
                window(samples[range].to_vec(), purpose)
            })
        })
        .collect()
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

fn text(heard: &Result<Hypothesis, EngineError>) -> String {
    let heard = heard.as_ref().expect("heard");
    heard.segments.iter().map(|s| s.text.as_str()).collect::<Vec<_>>().join(" ")
}

#[test]
fn both_engines_hear_the_same_words() {
    let (mut ours, mut theirs) = (model(ComputeType::Float32, 4).state(), whisper());
    // The full context of finals takes its time: one in five says enough.
    for (purpose, step) in [(Purpose::Partial, 1), (Purpose::Final, 5)] {
        let windows: Vec<Window> = utterances(purpose).into_iter().step_by(step).collect();
        let (ours, theirs) = (ours.decode(&windows), theirs.decode(&windows));
        let differ: Vec<(String, String)> =
            ours.iter().zip(&theirs).map(|(a, b)| (text(a), text(b))).filter(|(a, b)| a != b).collect();
        println!("{purpose:?}: {} of {} windows differ: {differ:?}", differ.len(), windows.len());
        assert!(windows.len() > 10 && differ.len() * 50 <= windows.len(), "{purpose:?}: {differ:?}");
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let (ours, theirs) = (ours.as_ref().expect("heard"), theirs.as_ref().expect("heard"));
            assert_eq!(ours.language.as_deref(), Some("en"));
            assert_eq!(ours.word_timing.is_some(), theirs.word_timing.is_some());
            for segment in &ours.segments {
                assert!(segment.confidence > 0.3 && segment.mean_log_probability > -1.0, "{segment:?}");
            }
        }
    }
}

/// What is said of a window, and when: segment by segment.
fn said(heard: &Result<Hypothesis, EngineError>) -> Vec<(u64, u64, String)> {
    let segments = &heard.as_ref().expect("heard").segments;
    segments.iter().map(|s| (s.start_ms, s.end_ms, s.text.clone())).collect()
}

/// Hears windows alone, and twice in company that chance has put together. Those that differ, and how many there are.
fn in_company(compute_type: ComputeType, batch: usize, windows: &[Window]) -> (Vec<usize>, usize) {
    let (alone, company) = (model(compute_type, 1), model(compute_type, batch));
    let mut recognizer = alone.state();
    let expected: Vec<_> = windows.iter().map(|w| said(&recognizer.decode(std::slice::from_ref(w))[0])).collect();
    let mut recognizer = company.state();
    // The same every time: a fixed shuffle.
    let mut order: Vec<usize> = (0..windows.len()).collect();
    let mut seed = 7u64;
    let mut differ = Vec::new();
    for _ in 0..2 {
        for place in (1..order.len()).rev() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            order.swap(place, (seed >> 33) as usize % (place + 1));
        }
        let shuffled: Vec<Window> = order.iter().map(|n| windows[*n].clone()).collect();
        let heard = recognizer.decode(&shuffled);
        differ.extend(heard.iter().zip(&order).filter(|(heard, n)| said(heard) != expected[**n]).map(|(_, n)| *n));
    }
    (differ, 2 * windows.len())
}

#[test]
fn company_changes_no_token() {
    let mut windows: Vec<Window> = utterances(Purpose::Final).into_iter().step_by(10).collect();
    windows.extend(utterances(Purpose::Partial).into_iter().take(24));
    for (n, window) in windows.iter_mut().enumerate() {
        window.prompt = ["", "this is anna", "the order number is seven"][n % 3].to_owned();
    }
    let (differ, all) = in_company(ComputeType::Float32, 7, &windows);
    assert!(differ.is_empty() && all > 50, "{differ:?} of {all}");
}

/// Numbers are rounded by the row, and a row is one window's: its neighbours are in none of its sums.
#[test]
fn company_changes_few_finals_in_int8() {
    let windows: Vec<Window> = utterances(Purpose::Final).into_iter().step_by(3).collect();
    let (differ, all) = in_company(ComputeType::Int8Float32, 16, &windows);
    println!("int8: {} of {all} finals differ in company", differ.len());
    assert!(differ.len() * 20 <= all && all > 30, "{differ:?} of {all}");
}

#[test]
fn words_come_at_the_same_time_in_company() {
    // On a CPU finals share a batch only where it may have many windows of the short context.
    let (alone, company) = (model(ComputeType::Float32, 1), model(ComputeType::Float32, 16));
    let windows: Vec<Window> = utterances(Purpose::Final).into_iter().step_by(4).collect();
    let times = |heard: &Result<Hypothesis, EngineError>| -> Vec<(String, u64, u64)> {
        let segments = heard.as_ref().expect("heard").segments.iter();
        segments.flat_map(|s| &s.words).map(|w| (w.text.clone(), w.start_ms, w.end_ms)).collect()
    };
    let together = company.state().decode(&windows);
    let mut words = 0;
    for (window, together) in windows.iter().zip(&together) {
        let (alone, together) = (times(&alone.state().decode(std::slice::from_ref(window))[0]), times(together));
        words += alone.len();
        assert_eq!(alone.len(), together.len());
        for (alone, together) in alone.iter().zip(&together) {
            // One position of the encoder is 20 ms; rounding may move a path by one.
            let near = alone.1.abs_diff(together.1) <= 20 && alone.2.abs_diff(together.2) <= 20;
            assert!(alone.0 == together.0 && near, "{alone:?} alone, {together:?} in company");
        }
    }
    assert!(words > 50, "{words} words");
}

/// A model of many languages, with random weights: what it makes of a sound is nonsense, and the same every time.
fn of_many_languages(batch: usize) -> (tempfile::TempDir, Ct2Model) {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("tiny.bin");
    random::write(&path, Shape::Tiny, Format::Q8, 6).expect("written");
    let config = Ct2Config { compute_type: ComputeType::Float32, batch, folders: None };
    let model = load(&path, &config).expect("loaded");
    (folder, model)
}

#[test]
fn each_window_has_its_own_language_in_company() {
    let (_folder, model) = of_many_languages(8);
    let mut windows: Vec<Window> = utterances(Purpose::Partial).into_iter().step_by(14).collect();
    let given = ["de", "fr", "ja"];
    for (n, window) in windows.iter_mut().enumerate() {
        window.language = (n % 2 == 1).then(|| given[n / 2 % 3].to_owned());
    }
    let languages = |heard: Vec<Result<Hypothesis, EngineError>>| -> Vec<Option<String>> {
        heard.into_iter().map(|heard| heard.expect("heard").language).collect()
    };
    let mut recognizer = model.state();
    let alone: Vec<_> = windows.iter().flat_map(|w| languages(recognizer.decode(std::slice::from_ref(w)))).collect();
    let together = languages(recognizer.decode(&windows));
    println!("{together:?}");
    assert_eq!(alone, together);
    for (window, language) in windows.iter().zip(&together) {
        assert!(language.is_some() && (window.language.is_none() || window.language == *language), "{together:?}");
    }
}

#[test]
fn whoever_makes_a_batch_fail_fails_alone() {
    let model = model(ComputeType::Float32, 4);
    let mut recognizer = model.state();
    let windows: Vec<Window> = utterances(Purpose::Partial).into_iter().take(3).collect();
    let pulse = Pulse::start().expect("thread");
    let mut runs = || -> Vec<Run> { windows.iter().map(|window| recognizer.run(window).expect("run")).collect() };
    let mut alone = runs();
    for run in &mut alone {
        assert_eq!(model.loaded.pass_or_fail(std::slice::from_mut(run), &pulse), [Ok(())]);
    }
    // One that asks for more than the encoder has.
    let mut batch = runs();
    batch[0].positions = 3_000;
    let passed = model.loaded.pass_or_fail(&mut batch, &pulse);
    assert!(matches!(passed[0], Err(EngineError::Decode(_))), "{passed:?}");
    assert_eq!(passed[1..], [Ok(()), Ok(())]);
    // Two that the library does not take together.
    let mut unlike = runs();
    unlike[1].prompt = model.loaded.vocabulary.tokens(" this is anna");
    assert_eq!(model.loaded.pass_or_fail(&mut unlike[..2], &pulse), [Ok(()), Ok(())]);
    for (place, run) in [(1, &batch[1]), (2, &batch[2]), (0, &unlike[0])] {
        let said_of =
            |run: &Run| run.segments.iter().map(|s| (s.text.clone(), s.start_ms, s.end_ms)).collect::<Vec<_>>();
        assert_eq!(said_of(run), said_of(&alone[place]), "window {place}");
    }
    assert_eq!(model.batch(), 4, "memory was not short");
}

/// Passes of seconds: those that are in one and those that wait for it move all the same.
#[test]
fn a_long_pass_gives_signs_of_life() {
    let (_folder, model) = of_many_languages(48);
    let windows: Vec<Window> = utterances(Purpose::Final).into_iter().take(8).collect();
    let longest = |window: &Window, done: &AtomicBool| {
        let (mut longest, mut looks, mut since) = (Duration::ZERO, 0, Instant::now());
        while !done.load(Ordering::Relaxed) {
            // Before its first look its sound is being prepared.
            if looks == 0 || window.cancel.looks() != looks {
                (looks, since) = (window.cancel.looks(), Instant::now());
            }
            longest = longest.max(since.elapsed());
            std::thread::park_timeout(Duration::from_millis(5));
        }
        longest
    };
    let silent: Vec<Duration> = std::thread::scope(|scope| {
        let windows = windows.iter().map(|window| {
            scope.spawn(|| {
                let done = AtomicBool::new(false);
                std::thread::scope(|scope| {
                    let watching = scope.spawn(|| longest(window, &done));
                    let heard = model.state().decode(std::slice::from_ref(window));
                    done.store(true, Ordering::Relaxed);
                    assert!(heard[0].is_ok(), "{heard:?}");
                    watching.join().expect("watched")
                })
            })
        });
        let threads: Vec<_> = windows.collect();
        threads.into_iter().map(|thread| thread.join().expect("decoded")).collect()
    });
    let passed_ms = model.loaded.passed_ms.load(Ordering::Relaxed);
    println!("the last pass took {passed_ms} ms, nobody was silent for more than {:?}", silent.iter().max());
    assert!(silent.iter().all(|silent| *silent < Duration::from_secs(1)), "{silent:?}");
}

#[test]
fn models_of_one_process_take_turns() {
    let (_folder, dir) = folder();
    let device = Ct2Device::start().expect("thread");
    let load = |compute_type| {
        let config = Ct2Config { compute_type, batch: 4, folders: None };
        Ct2Model::load("micro.en", &dir, &config, 1, false, &device).expect("loaded")
    };
    let models = [load(ComputeType::Float32), load(ComputeType::Int8Float32)];
    let windows: Vec<Window> = utterances(Purpose::Partial).into_iter().take(8).collect();
    let alone: Vec<Vec<String>> =
        models.iter().map(|model| model.state().decode(&windows).iter().map(text).collect()).collect();
    let together: Vec<Vec<String>> = std::thread::scope(|scope| {
        let heard: Vec<_> = models.iter().map(|model| scope.spawn(|| model.state().decode(&windows))).collect();
        heard.into_iter().map(|heard| heard.join().expect("heard").iter().map(text).collect()).collect()
    });
    assert_eq!(alone, together);
    // One that leaves takes nothing from the other.
    let [one, other] = models;
    drop(one);
    drop(device);
    assert_eq!(other.state().decode(&windows[..1]).iter().map(text).collect::<Vec<_>>(), alone[1][..1]);
}

#[test]
fn words_come_when_they_are_said() {
    let mut recognizer = model(ComputeType::Float32, 4).state();
    let (mut apart, mut words) = (Vec::new(), 0);
    for call in [2, 4] {
        let samples = audio(&format!("call-{call:02}.flac"));
        for (begin, end, said) in turns(call).into_iter().step_by(2) {
            let from = ((begin - 0.15).max(0.0) * 16_000.0) as usize;
            let to = (((end + 0.15) * 16_000.0) as usize).min(samples.len());
            let heard = recognizer.decode(&[window(samples[from..to].to_vec(), Purpose::Final)]).remove(0);
            let heard: Vec<_> = heard.expect("heard").segments.into_iter().flat_map(|s| s.words).collect();
            if heard.len() != said.len() {
                continue;
            }
            words += heard.len();
            for (heard, (begin, _)) in heard.iter().zip(said) {
                assert!(heard.start_ms <= heard.end_ms && heard.confidence > 0.0, "{heard:?}");
                apart.push((heard.start_ms as f64 - (begin * 1_000.0 - from as f64 / 16.0)).abs());
            }
        }
    }
    apart.sort_by(f64::total_cmp);
    let (median, most) = (apart[apart.len() / 2], apart[apart.len() * 9 / 10]);
    println!("{words} words begin {median:.0} ms from where they are said (median), nine of ten within {most:.0} ms");
    assert!(words > 50 && median < 150.0, "{words} words, median {median} ms, nine of ten within {most} ms");
}

#[test]
fn a_recording_of_several_sentences_is_passed_over_again_where_one_is_unfinished() {
    let samples = audio("call-02.flac");
    let (mut ours, mut theirs) = (model(ComputeType::Float32, 4).state(), whisper());
    let windows = [window(samples[..29 * 16_000].to_vec(), Purpose::Final)];
    let (ours, theirs) = (ours.decode(&windows), theirs.decode(&windows));
    assert_eq!(text(&ours[0]), text(&theirs[0]));
    let segments = &ours[0].as_ref().expect("heard").segments;
    assert!(segments.len() > 3, "{segments:?}");
    assert!(segments.is_sorted_by_key(|s| s.start_ms) && segments.iter().all(|s| s.end_ms <= 29_000), "{segments:?}");
}

#[test]
fn what_cannot_be_done_is_typed() {
    let model = model(ComputeType::Int8Float32, 4);
    let mut recognizer = model.state();
    let samples = utterances(Purpose::Partial).remove(0).samples;
    let with = |change: fn(&mut Window)| {
        let mut window = window(samples.clone(), Purpose::Partial);
        change(&mut window);
        window
    };
    let windows = [
        with(|w| w.language = Some("de".to_owned())),
        with(|w| w.task = Task::Translate),
        with(|w| w.cancel.cancel()),
        with(|w| w.samples.clear()),
        with(|_| {}),
    ];
    let heard = recognizer.decode(&windows);
    assert!(matches!(heard[0], Err(EngineError::Unsupported(_))), "{:?}", heard[0]);
    assert!(matches!(heard[1], Err(EngineError::Unsupported(_))), "{:?}", heard[1]);
    assert_eq!(heard[2], Err(EngineError::Cancelled));
    assert_eq!((text(&heard[3]).as_str(), text(&heard[4]).is_empty()), ("", false));
    assert_eq!(model.info().engine, "ct2");

    let load = |dir: &Path| load(dir, &Ct2Config::default()).map(|_| ());
    let (_folder, dir) = folder();
    for (file, bytes) in [("model.bin", &b"nonsense"[..]), ("config.json", b"{"), ("vocabulary.json", b"[]")] {
        let whole = std::fs::read(dir.join(file)).expect("file");
        std::fs::write(dir.join(file), bytes).expect("write");
        assert!(matches!(load(&dir), Err(EngineError::Model { .. })), "{file}: {:?}", load(&dir));
        std::fs::write(dir.join(file), whole).expect("write");
    }
    load(&dir).expect("whole again");
}

#[test]
fn silence_has_no_words() {
    let mut recognizer = model(ComputeType::Float32, 4).state();
    for purpose in [Purpose::Partial, Purpose::Final] {
        let windows = [window(vec![0.0; 48_000], purpose), window(audio("holdout/silence-noise.flac"), purpose)];
        for heard in recognizer.decode(&windows) {
            assert_eq!(text(&heard).trim(), "");
        }
    }
}

/// Not a test of speed: the figures are for whoever runs it with `--nocapture`, on a machine with nothing else to do.
#[test]
fn int8_changes_few_words() {
    let windows = utterances(Purpose::Partial);
    let mut exact = model(ComputeType::Float32, 4).state();
    let mut small = model(ComputeType::Int8Float32, 4).state();
    let (exact, small) = (exact.decode(&windows), small.decode(&windows));
    let differ = exact.iter().zip(&small).filter(|(a, b)| text(a) != text(b)).count();
    println!("int8: {differ} of {} windows differ from float32", windows.len());
    assert!(differ * 20 <= windows.len(), "{differ} of {}", windows.len());
}

/// In a process of its own, whose address space ends 64 MB beyond what the loaded model has: sixteen windows at once do not
/// fit, one does.
#[test]
fn short_memory_makes_batches_smaller_and_ends_nobody() {
    const INSIDE: &str = "VOXFLEET_TEST_SHORT_MEMORY";
    if std::env::var_os(INSIDE).is_none() {
        let itself = std::env::current_exe().expect("path");
        let name = "engine::ct2::tests::short_memory_makes_batches_smaller_and_ends_nobody";
        let inside =
            std::process::Command::new(itself).args(["--exact", name, "--nocapture"]).env(INSIDE, "1").output();
        let inside = inside.expect("started");
        let said = String::from_utf8_lossy(&inside.stdout);
        assert!(
            inside.status.success() && said.contains("batches of"),
            "{said}{}",
            String::from_utf8_lossy(&inside.stderr)
        );
        return;
    }
    let model = model(ComputeType::Float32, 16);
    let mut recognizer = model.state();
    let windows: Vec<Window> = utterances(Purpose::Final).into_iter().take(16).collect();
    let alone = recognizer.decode(&windows[..1]);
    assert_eq!(model.batch(), 16);
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let kb = status.lines().find_map(|l| l.strip_prefix("VmSize:")?.split_whitespace().next()?.parse::<u64>().ok());
    let most = Some((kb.expect("VmSize") << 10) + (64 << 20));
    setrlimit(Resource::As, Rlimit { current: most, maximum: most }).expect("limit");
    let heard = recognizer.decode(&windows);
    println!("batches of {}", model.batch());
    assert!((1..16).contains(&model.batch()), "{}", model.batch());
    assert_eq!(text(&heard[0]), text(&alone[0]));
    for heard in &heard {
        assert!(!text(heard).is_empty());
    }
}
