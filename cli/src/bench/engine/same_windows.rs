//! Both engines as they are, on every utterance of the test calls: the same windows, cut by the engine's own endpoints, with
//! the same looks (a partial's fitted context with a second look where a guard strikes, a final's full context and word
//! times) and the same number of cores. Nothing else runs: no detector, no server.
//!
//! What differs belongs to the engines: whisper.cpp decodes a window at a time in each of its states and times words by its own
//! estimate, CTranslate2 decodes a batch at a time and times words by an alignment of its own. All windows wait at once, so its
//! batches are as full as can be.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use voxfleet_eval::{Edits, text::compare};
use voxfleet_harness::audio;
use voxfleet_schema::{session::SessionOptions, transcript::join_text};
use voxfleet_worker::{
    engine::{
        EngineError, Hypothesis, Purpose, Recognizer, RecognizerInfo, Window,
        ct2::ComputeType,
        direct::transcribe_log,
        pool::hear,
        whisper::{WhisperModel, WhisperRecognizer},
    },
    ipc::{ModelFile, StartPoint},
};

use super::{
    super::{
        engines::{self, Engine},
        models::micro_copied,
        pipeline::{Kind, log},
        progress, rounded,
    },
    CALLS, halves,
    rows::FULL_CONTEXT_BATCH,
};

/// A setting that takes longer is not timed again.
const BUDGET: Duration = Duration::from_secs(5);
const FORMATS: [&str; 2] = ["q8_0", "f16"];

/// What is compared.
pub(super) struct Compared<'a> {
    pub(super) engines: &'a [Engine],
    pub(super) threads: &'a [u32],
    pub(super) batches: &'a [u32],
    pub(super) compute_types: &'a [ComputeType],
    pub(super) cores: usize,
    pub(super) rounds: u32,
}

/// One way to decode all windows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Way {
    numbers: Numbers,
    threads: usize,
    states: usize,
    batch: usize,
}

/// An engine with what it computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Numbers {
    Whisper(&'static str),
    Ct2(ComputeType),
}

impl Numbers {
    fn engine(self) -> Engine {
        match self {
            Numbers::Whisper(_) => Engine::WhisperCpp,
            Numbers::Ct2(_) => Engine::Ct2,
        }
    }

    fn name(self) -> String {
        match self {
            Numbers::Whisper(format) => format.to_owned(),
            Numbers::Ct2(compute_type) => engines::name_of(compute_type),
        }
    }
}

impl Way {
    /// As many finals as [`FULL_CONTEXT_BATCH`] at once, partials without a limit.
    fn is_for(&self, purpose: Purpose) -> bool {
        purpose == Purpose::Partial || self.batch <= FULL_CONTEXT_BATCH
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { numbers, threads, states, batch } = self;
        write!(
            f,
            "{} {}, {states} states of {threads} threads, batch {batch}",
            numbers.engine().as_str(),
            numbers.name()
        )
    }
}

/// Every way, those first that others are compared with. whisper.cpp has so many cores as threads of one state and as states of
/// one thread.
fn ways(compared: &Compared<'_>) -> Vec<Way> {
    let threads = || compared.threads.iter().map(|n| *n as usize).filter(|threads| *threads <= compared.cores);
    let mut ways = Vec::new();
    for engine in compared.engines {
        match engine {
            Engine::WhisperCpp => ways.extend(FORMATS.into_iter().flat_map(|format| {
                let of = move |threads, states| Way { numbers: Numbers::Whisper(format), threads, states, batch: 1 };
                threads().flat_map(move |n| [of(n, 1), of(1, n)].into_iter().take(n.min(2)))
            })),
            Engine::Ct2 => ways.extend(compared.compute_types.iter().flat_map(|numbers| {
                let numbers = Numbers::Ct2(*numbers);
                threads().flat_map(move |threads| {
                    let of = move |batch: &u32| Way { numbers, threads, states: 1, batch: *batch as usize };
                    compared.batches.iter().map(of)
                })
            })),
        }
    }
    ways
}

/// What one way gave for one purpose.
struct Found {
    way: Way,
    purpose: Purpose,
    factor: f64,
    /// Of each window, in order.
    texts: Vec<String>,
}

/// The windows of all calls, and where each call's end.
struct Calls {
    windows: Vec<Window>,
    ends: Vec<usize>,
    references: Vec<String>,
}

impl Calls {
    fn cut() -> Result<Self> {
        let mut found = Self { windows: Vec::new(), ends: Vec::new(), references: Vec::new() };
        let vads = Kind::Micro.vad();
        for call in CALLS {
            let mut cutter = Cutter { windows: Vec::new(), info: RecognizerInfo::none() };
            let options = SessionOptions { interim: false, ..SessionOptions::default() };
            transcribe_log(&log(&audio::call(call)?), &options, StartPoint::beginning(), &mut cutter, &*vads, None)?;
            found.windows.append(&mut cutter.windows);
            found.ends.push(found.windows.len());
            found.references.push(audio::call_text(call)?);
        }
        ensure!(!found.windows.is_empty(), "nobody speaks in the test calls");
        Ok(found)
    }

    fn seconds(&self) -> f64 {
        self.windows.iter().map(|window| window.samples.len() as f64 / 16_000.0).sum()
    }

    /// Word errors of each call.
    fn errors(&self, texts: &[String]) -> Vec<Edits> {
        let begins = [0].into_iter().chain(self.ends.iter().copied());
        begins
            .zip(&self.ends)
            .zip(&self.references)
            .map(|((begin, end), reference)| {
                compare(reference, &join_text(texts[begin..*end].iter().map(String::as_str)))
            })
            .collect()
    }
}

/// Takes windows down instead of hearing them: where finals are cut depends on the sound alone.
struct Cutter {
    windows: Vec<Window>,
    info: RecognizerInfo,
}

impl Recognizer for Cutter {
    fn info(&self) -> &RecognizerInfo {
        &self.info
    }

    fn decode(&mut self, batch: &[Window]) -> Vec<Result<Hypothesis, EngineError>> {
        self.windows.extend_from_slice(batch);
        batch.iter().map(|_| Ok(Hypothesis::default())).collect()
    }
}

pub(super) fn run(compared: &Compared<'_>) -> Result<Value> {
    let calls = Calls::cut()?;
    let dir = tempfile::tempdir()?;
    let quantised = micro_copied(dir.path())?;
    let halves = ModelFile { name: "micro.en-f16".to_owned(), path: dir.path().join("micro.en-f16.bin") };
    halves::write(&quantised.path, &halves.path)?;
    let file_of = |numbers: Numbers| if numbers == Numbers::Whisper("f16") { &halves } else { &quantised };
    let mut all: Vec<Found> = Vec::new();
    for way in ways(compared) {
        for purpose in [Purpose::Partial, Purpose::Final].into_iter().filter(|purpose| way.is_for(*purpose)) {
            progress(&format!("{} utterances as {}, {way}", calls.windows.len(), name_of(purpose)));
            let windows: Vec<Window> =
                calls.windows.iter().map(|window| Window { purpose, ..window.clone() }).collect();
            let (took_s, texts) = decode(&way, file_of(way.numbers), &windows, compared.rounds)
                .with_context(|| format!("{way}, {}", name_of(purpose)))?;
            all.push(Found { way: way.clone(), purpose, factor: calls.seconds() / took_s.max(1e-6), texts });
        }
    }
    let rows = all.iter().map(|found| row(found, &all, &calls)).collect::<Vec<_>>();
    Ok(json!({
        "windows": calls.windows.len(),
        "audio_s": rounded(calls.seconds()),
        "rows": rows,
        "wer_by_call": by_call(&all, &calls),
    }))
}

fn name_of(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Partial => "partials",
        Purpose::Final => "finals",
    }
}

/// The way of whisper.cpp that a way is compared with: on as many cores, as threads or as states, whichever was faster.
fn beside<'a>(found: &Found, all: &'a [Found], format: &'static str) -> Option<&'a Found> {
    let cores = |way: &Way| way.threads * way.states;
    let alike = all.iter().filter(|other| {
        other.way.numbers == Numbers::Whisper(format)
            && (other.purpose, cores(&other.way)) == (found.purpose, cores(&found.way))
    });
    alike.max_by(|a, b| a.factor.total_cmp(&b.factor))
}

fn row(found: &Found, all: &[Found], calls: &Calls) -> Value {
    let errors: Edits = calls.errors(&found.texts).into_iter().sum();
    let exact = all
        .iter()
        .find(|other| other.way.numbers == Numbers::Ct2(ComputeType::Float32) && other.purpose == found.purpose);
    let differ = exact.map(|exact| exact.texts.iter().zip(&found.texts).filter(|(a, b)| a != b).count());
    let mut row = json!({
        "engine": found.way.numbers.engine().as_str(),
        "compute_type": found.way.numbers.name(),
        "batch": found.way.batch,
        "threads": found.way.threads,
        "states": found.way.states,
        "windows_as": name_of(found.purpose),
        "realtime_factor": rounded(found.factor),
        "wer": rounded(errors.rate()),
        "word_errors": errors.edits(),
        "words": errors.reference,
        "differ_from_float32": differ.map(|differ| rounded(differ as f64 / found.texts.len().max(1) as f64)),
    });
    if found.way.numbers.engine() == Engine::Ct2 {
        let times = |format| beside(found, all, format).map(|other| rounded(found.factor / other.factor.max(1e-6)));
        row["times_whisper_cpp"] = times("q8_0").into();
        row["times_whisper_cpp_f16"] = times("f16").into();
    }
    row
}

/// One line a call, one column for each engine and its numbers; finals, since partials are replaced.
fn by_call(all: &[Found], calls: &Calls) -> Vec<Value> {
    let mut seen: Vec<Numbers> = Vec::new();
    let mut columns = Vec::new();
    for found in all.iter().filter(|found| found.purpose == Purpose::Final) {
        if !seen.contains(&found.way.numbers) {
            seen.push(found.way.numbers);
            let name = format!("{}_{}", found.way.numbers.engine().as_str(), found.way.numbers.name());
            columns.push((name, calls.errors(&found.texts)));
        }
    }
    CALLS
        .enumerate()
        .map(|(n, call)| {
            let mut line = json!({ "call": format!("{call:02}") });
            for (name, errors) in &columns {
                line[name] = errors.get(n).map(|errors| rounded(errors.rate())).into();
            }
            line
        })
        .collect()
}

/// The fastest of the rounds in s, and what was heard.
fn decode(way: &Way, file: &ModelFile, windows: &[Window], rounds: u32) -> Result<(f64, Vec<String>)> {
    match way.numbers {
        Numbers::Whisper(_) => {
            let model = WhisperModel::load(&file.name, &file.path, false, way.threads)?;
            let mut states = (0..way.states).map(|_| model.state()).collect::<Result<Vec<_>, _>>()?;
            let warm = &windows[..windows.len().min(way.states)];
            one_by_one(&mut states, warm)?;
            timed(windows, rounds, || {
                let begin = Instant::now();
                let texts = one_by_one(&mut states, windows)?;
                Ok((begin.elapsed(), texts))
            })
        }
        #[cfg(feature = "ct2-engine")]
        Numbers::Ct2(compute_type) => {
            use voxfleet_worker::engine::{
                ct2::{Ct2Config, Ct2Device, Ct2Model},
                guards::judge,
            };

            let config = Ct2Config { compute_type, batch: way.batch, ..Ct2Config::default() };
            let device = Ct2Device::start()?;
            timed(windows, rounds, || {
                // Loaded anew, which also warms it up: it knows again what it has heard before, and would spare itself the pictures.
                let mut recognizer =
                    Ct2Model::load(&file.name, &file.path, &config, way.threads, false, &device)?.state();
                let begin = Instant::now();
                let heard = recognizer.decode(windows);
                let took = begin.elapsed();
                let texts = heard.into_iter().map(|heard| Ok(text_of(&judge(&heard?).hypothesis)));
                Ok((took, texts.collect::<Result<_, EngineError>>()?))
            })
        }
        #[cfg(not(feature = "ct2-engine"))]
        Numbers::Ct2(_) => Err(anyhow!("ct2 is not in this build")),
    }
}

fn timed(
    windows: &[Window],
    rounds: u32,
    mut once: impl FnMut() -> Result<(Duration, Vec<String>)>,
) -> Result<(f64, Vec<String>)> {
    let (mut all, mut best, mut heard) = (Duration::ZERO, f64::INFINITY, Vec::new());
    for _ in 0..rounds {
        let (took, texts) = once()?;
        ensure!(texts.len() == windows.len(), "{} texts of {} windows", texts.len(), windows.len());
        (all, best, heard) = (all + took, best.min(took.as_secs_f64()), texts);
        if all > BUDGET {
            break;
        }
    }
    Ok((best, heard))
}

/// Whichever state is free takes the next window, as the engine's threads do.
fn one_by_one(states: &mut [WhisperRecognizer], windows: &[Window]) -> Result<Vec<String>> {
    let next = Mutex::new(windows.iter().enumerate());
    let mut texts = vec![String::new(); windows.len()];
    let heard = std::thread::scope(|scope| {
        let threads: Vec<_> = states
            .iter_mut()
            .map(|state| {
                scope.spawn(|| {
                    let mut heard = Vec::new();
                    loop {
                        let Some((n, window)) = next.lock().ok().and_then(|mut next| next.next()) else {
                            return Ok(heard);
                        };
                        heard.push((n, text_of(&hear(state, window)?.hypothesis)));
                    }
                })
            })
            .collect();
        let ended = threads.into_iter().map(|thread| {
            let heard: Result<Vec<_>, EngineError> = thread.join().map_err(|_| anyhow!("a decode panicked"))?;
            anyhow::Ok(heard?)
        });
        ended.collect::<Result<Vec<_>>>()
    })?;
    heard.into_iter().flatten().for_each(|(n, text)| texts[n] = text);
    Ok(texts)
}

fn text_of(heard: &Hypothesis) -> String {
    join_text(heard.segments.iter().map(|segment| segment.text.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: Numbers = Numbers::Ct2(ComputeType::Float32);
    const INT8: Numbers = Numbers::Ct2(ComputeType::Int8Float32);
    const Q8: Numbers = Numbers::Whisper("q8_0");

    fn compared(cores: usize) -> Vec<(Numbers, usize, usize, usize)> {
        let compared = Compared {
            engines: &[Engine::WhisperCpp, Engine::Ct2],
            threads: &[1, 2],
            batches: &[1, 4],
            compute_types: &[ComputeType::Float32],
            cores,
            rounds: 1,
        };
        ways(&compared).into_iter().map(|way| (way.numbers, way.threads, way.states, way.batch)).collect()
    }

    #[test]
    fn both_engines_have_the_same_cores() {
        let f16 = Numbers::Whisper("f16");
        assert_eq!(compared(1), [(Q8, 1, 1, 1), (f16, 1, 1, 1), (F32, 1, 1, 1), (F32, 1, 1, 4)]);
        let two = compared(2);
        assert_eq!(two[..3], [(Q8, 1, 1, 1), (Q8, 2, 1, 1), (Q8, 1, 2, 1)]);
        assert_eq!(two[6..], [(F32, 1, 1, 1), (F32, 1, 1, 4), (F32, 2, 1, 1), (F32, 2, 1, 4)]);
    }

    fn found(numbers: Numbers, threads: usize, states: usize, factor: f64, texts: &[&str]) -> Found {
        Found {
            way: Way { numbers, threads, states, batch: 1 },
            purpose: Purpose::Final,
            factor,
            texts: texts.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    #[test]
    fn rows_say_how_far_they_are_from_each_other() {
        let calls = Calls {
            windows: Vec::new(),
            ends: vec![2, 3],
            references: vec!["good morning anna".to_owned(), "goodbye".to_owned()],
        };
        let all = [
            found(Q8, 2, 1, 10.0, &["good morning", "anna", "goodbye"]),
            found(Q8, 1, 2, 20.0, &["good morning", "anna", "goodbye"]),
            found(F32, 2, 1, 50.0, &["good morning", "anna", "goodbye"]),
            found(INT8, 2, 1, 60.0, &["good morning", "anne", "goodbye"]),
            found(INT8, 1, 1, 60.0, &["good morning", "anna", ""]),
        ];
        let rows: Vec<Value> = all.iter().map(|found| row(found, &all, &calls)).collect();
        let of = |name: &str| rows.iter().map(|row| row[name].as_f64()).collect::<Vec<_>>();
        assert_eq!(of("wer"), [Some(0.0), Some(0.0), Some(0.0), Some(0.25), Some(0.25)]);
        assert_eq!(of("differ_from_float32"), [Some(0.0), Some(0.0), Some(0.0), Some(0.333), Some(0.333)]);
        assert_eq!(of("times_whisper_cpp"), [None, None, Some(2.5), Some(3.0), None]);
        assert_eq!(of("times_whisper_cpp_f16"), [None; 5]);
        let calls = by_call(&all, &calls);
        assert_eq!(
            calls[0],
            json!({"call": "01", "whisper_cpp_q8_0": 0.0, "ct2_float32": 0.0, "ct2_int8_float32": 0.333})
        );
        assert_eq!(calls[1]["ct2_int8_float32"], 0.0, "what the first way with these numbers heard");
    }

    #[test]
    fn utterances_are_those_that_finals_are_made_of() {
        let calls = Calls::cut().expect("cut");
        assert_eq!((calls.ends.len(), calls.ends.last()), (5, Some(&calls.windows.len())));
        assert!(calls.windows.len() >= 40 && calls.windows.iter().all(|w| w.purpose == Purpose::Final));
        assert!(calls.windows.iter().all(|w| (8_000..30 * 16_000).contains(&w.samples.len())));
        let nothing = vec![String::new(); calls.windows.len()];
        assert!(calls.errors(&nothing).iter().all(|errors| errors.rate() == 1.0 && errors.reference > 30));
    }
}
