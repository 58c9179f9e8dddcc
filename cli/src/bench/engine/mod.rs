//! Speed of the bare engines: one window of speech again and again, no server, no detector, no second looks.
//!
//! | module | holds |
//! |---|---|
//! | [`rows`] | what is timed, and what each row says; pure |
//! | `batched` | in builds that have it: CTranslate2 on batches of the window |
//! | [`same_windows`] | both engines as they are on every utterance of the test calls: speed, word errors, equal texts |
//! | [`halves`] | the micro model as half floats, for whisper.cpp |
//!
//! x real time is the audio of all states or windows together by the time that passed, their spectrograms included; the fastest
//! of the rounds counts. The text has a fixed length where weights are random, and the micro model's is cut at the same
//! length, so that every row of a model does the same work but for the setting that differs.
//!
//! For the micro model the test calls are decoded as well, with the full context and with fitted ones of different least
//! sizes: `accuracy` shows what a smaller context costs in words. There nothing is decoded twice, as the engine would
//! where a guard strikes. A tiny model that was trained for this says little of official ones.

#[cfg(feature = "ct2-engine")]
mod batched;
mod halves;
mod rows;
mod same_windows;

use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use voxfleet_eval::{Edits, text::compare};
use voxfleet_harness::audio;
use voxfleet_schema::{
    session::SessionOptions,
    transcript::{WordTiming, join_text},
};
use voxfleet_worker::{
    engine::{
        EngineError, HeardSegment, Hypothesis, Recognizer, RecognizerInfo, Window,
        ct2::ComputeType,
        direct::transcribe_log,
        whisper::{
            context::Context as Encoder,
            trial::{Settings, TrialModel, TrialState},
        },
    },
    ipc::{ModelFile, StartPoint},
};

use self::rows::{Case, Row, Timed, best_of, cases};
use super::{
    engines::{self, Engine, compute_type},
    models::{Model, Stubs},
    pipeline::{Kind, log},
    progress, rounded, usage,
};

/// With speech from its first second on.
const CALL: u32 = 1;
const CALLS: std::ops::RangeInclusive<u32> = 1..=5;
/// Least positions that are tried beside the engine's own; 50 are a second.
const LEAST: [usize; 4] = [128, 256, 384, 512];

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench engine
  voxfleet bench engine --models micro,base,small --format q8_0 --threads 1,2 --json
  voxfleet bench engine --engines whisper_cpp,ct2 --batches 1,4 --compute-types int8_float32
  voxfleet bench engine --models large-v3-turbo --use-gpu --states 1,2,4,8 --rounds 5")]
pub(crate) struct EngineArgs {
    /// micro (the small model of the tests), or random weights: tiny, base, small, medium, large-v3-turbo
    #[arg(long, value_delimiter = ',', default_value = "micro,base", value_name = "NAMES")]
    models: Vec<Model>,
    #[command(flatten)]
    stubs: Stubs,
    /// Engines: whisper_cpp, ct2 [default: those of this build]
    #[arg(long, value_delimiter = ',', value_name = "NAMES", hide_possible_values = true)]
    engines: Vec<Engine>,
    /// Windows that CTranslate2 decodes together
    #[arg(long, value_delimiter = ',', default_value = "1,4,8,16", value_name = "N,...", value_parser = clap::value_parser!(u32).range(1..=64))]
    batches: Vec<u32>,
    /// What CTranslate2 computes with: float32, float16, int8_float32, int8_float16
    #[arg(long, value_delimiter = ',', default_value = "float32,int8_float32", value_name = "TYPES", value_parser = compute_type)]
    compute_types: Vec<ComputeType>,
    /// Threads of a decode
    #[arg(long, value_delimiter = ',', default_value = "1,2", value_name = "N,...", value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: Vec<u32>,
    /// Decode states of whisper.cpp at work at once
    #[arg(long, value_delimiter = ',', default_value = "1,2", value_name = "N,...", value_parser = clap::value_parser!(u32).range(1..=8))]
    states: Vec<u32>,
    /// Length of the window
    #[arg(long, default_value_t = 8.0, value_name = "SECONDS")]
    seconds: f64,
    /// Text tokens of a window
    #[arg(long, default_value_t = 24, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=200))]
    max_tokens: u32,
    /// How often each is timed, after one that is not; less often where one takes many seconds
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// On the first GPU that is visible
    #[arg(long)]
    use_gpu: bool,
    /// Leave out what the micro model hears in the test calls
    #[arg(long)]
    speed_only: bool,
}

pub(super) fn run(args: &EngineArgs) -> Result<Value> {
    usage((1.0..=30.0).contains(&args.seconds), "--seconds: 1 to 30, what Whisper hears at once")?;
    let mut samples = floats(&audio::call(CALL)?.samples);
    samples.truncate((args.seconds * 16_000.0) as usize);
    let engines = engines::chosen(&args.engines)?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // A card's work is not shared out among cores.
    let most = if args.use_gpu { usize::MAX } else { cores };
    let (mut rows, mut devices): (Vec<Row>, Vec<String>) = (Vec::new(), Vec::new());
    for model in &args.models {
        let file = args.stubs.file(*model)?;
        for flash in [false, true].into_iter().filter(|_| engines.contains(&Engine::WhisperCpp)) {
            let loaded = TrialModel::load(&file.name, &file.path, args.use_gpu, flash)?;
            ensure!(!args.use_gpu || loaded.device() != "cpu", "--use-gpu: this build or this machine has none");
            devices.push(loaded.device().to_owned());
            for case in cases(&args.threads, &args.states, most) {
                progress(&format!("{}{}, {case}", file.name, if flash { ", flash attention" } else { "" }));
                let timed = speed(&loaded, &samples, case, args).with_context(|| format!("{}, {case}", file.name))?;
                rows.push(Row {
                    model: file.name.clone(),
                    weights: args.stubs.weights(*model),
                    engine: Engine::WhisperCpp,
                    compute_type: args.stubs.stored_as(*model).to_owned(),
                    case,
                    positions: case.context.positions(samples.len()),
                    flash_attention: flash,
                    timed,
                });
            }
        }
        #[cfg(feature = "ct2-engine")]
        if engines.contains(&Engine::Ct2) {
            let threads: Vec<u32> = args.threads.iter().copied().filter(|n| *n as usize <= most).collect();
            let used = batched::speed(args, (*model, &file), &samples, &threads, &mut rows)?;
            devices.extend(used.into_iter().map(str::to_owned));
        }
    }
    devices.sort();
    devices.dedup();
    let hears_calls = args.models.contains(&Model::Micro) && !args.speed_only;
    let accuracy = if hears_calls && engines.contains(&Engine::WhisperCpp) {
        Value::Array(accuracy(&args.stubs.file(Model::Micro)?, args.use_gpu)?)
    } else {
        Value::Null
    };
    // Loaded by the engines themselves: a card's work is measured by the fleet's benches.
    let same_windows = if hears_calls && !args.use_gpu {
        let compared = same_windows::Compared {
            engines: &engines,
            threads: &args.threads,
            batches: &args.batches,
            compute_types: &args.compute_types,
            cores,
            rounds: args.rounds,
        };
        same_windows::run(&compared)?
    } else {
        Value::Null
    };
    Ok(json!({
        "rows": rows::printed(&rows),
        "same_windows": same_windows,
        "accuracy": accuracy,
        "window_s": args.seconds,
        "max_tokens": args.max_tokens,
        "cores": cores,
        "device": devices.join(", "),
    }))
}

fn speed(model: &TrialModel, samples: &[f32], case: Case, args: &EngineArgs) -> Result<Timed> {
    let settings = Settings { threads: case.threads, context: case.context, max_tokens: args.max_tokens as usize };
    let mut states = (0..case.states).map(|_| model.state()).collect::<Result<Vec<TrialState>, _>>()?;
    best_of(args.rounds, samples.len() as f64 / 16_000.0 * case.states as f64, || {
        let texts = std::thread::scope(|scope| {
            let decodes: Vec<_> =
                states.iter_mut().map(|state| scope.spawn(move || state.decode(samples, settings))).collect();
            let texts = decodes.into_iter().map(|decode| {
                let text = decode.join().map_err(|_| anyhow!("a decode panicked"))??;
                anyhow::Ok(text)
            });
            texts.collect::<Result<Vec<String>>>()
        })?;
        texts.first().map(|text| text.split_whitespace().count()).context("no text")
    })
}

fn floats(samples: &[i16]) -> Vec<f32> {
    samples.iter().map(|sample| f32::from(*sample) / 32_768.0).collect()
}

/// Word errors of the test calls with different contexts; utterances are cut by the engine's own detector.
fn accuracy(file: &ModelFile, use_gpu: bool) -> Result<Vec<Value>> {
    let calls = CALLS.map(audio::call).collect::<Result<Vec<_>, _>>()?;
    let references = CALLS.map(audio::call_text).collect::<Result<Vec<_>, _>>()?;
    let model = TrialModel::load(&file.name, &file.path, use_gpu, false)?;
    let contexts = LEAST.map(|least| Encoder::Fitted { least }).into_iter().chain([Encoder::Full]);
    let vads = Kind::Micro.vad();
    contexts
        .map(|context| {
            progress(&format!("{} on {} calls, {context:?}", file.name, calls.len()));
            let mut heard = Plain::new(&model, context)?;
            let options = SessionOptions { interim: false, ..SessionOptions::default() };
            let mut errors: Vec<Edits> = Vec::new();
            for (call, reference) in calls.iter().zip(&references) {
                let finals =
                    transcribe_log(&log(call), &options, StartPoint::beginning(), &mut heard, &*vads, None)?;
                let text = join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str())));
                errors.push(compare(reference, &text));
            }
            let (edits, words) = errors.iter().fold((0, 0), |(e, w), of| (e + of.edits(), w + of.reference));
            Ok(json!({
                "model": file.name,
                "context": match context { Encoder::Full => "full".to_owned(), Encoder::Fitted { least } => format!("fitted, {least} at least") },
                "wer": rounded(edits as f64 / words.max(1) as f64),
                "word_errors": edits,
                "words": words,
                "windows": heard.windows,
                "windows_at_the_least": heard.at_the_least,
                "decode_realtime_factor": rounded(heard.audio_s / heard.took_s.max(1e-6)),
            }))
        })
        .collect()
}

/// One state behind the engine's interface: one context, one pass, no judgement.
struct Plain {
    state: TrialState,
    context: Encoder,
    info: RecognizerInfo,
    windows: usize,
    /// Those that needed no more than the least positions: only they differ from a context with another least.
    at_the_least: usize,
    audio_s: f64,
    took_s: f64,
}

impl Plain {
    fn new(model: &TrialModel, context: Encoder) -> Result<Self> {
        let info = RecognizerInfo {
            engine: "whisper_cpp".to_owned(),
            model: "trial".to_owned(),
            device: model.device().to_owned(),
            multilingual: false,
        };
        Ok(Self { state: model.state()?, context, info, windows: 0, at_the_least: 0, audio_s: 0.0, took_s: 0.0 })
    }

    fn hear(&mut self, window: &Window) -> Result<Hypothesis, EngineError> {
        let begin = Instant::now();
        let settings = Settings { threads: 1, context: self.context, max_tokens: 0 };
        let text = self.state.decode(&window.samples, settings)?;
        self.took_s += begin.elapsed().as_secs_f64();
        self.windows += 1;
        let positions = self.context.positions(window.samples.len());
        self.at_the_least += usize::from(self.context == Encoder::Fitted { least: positions });
        self.audio_s += window.samples.len() as f64 / 16_000.0;
        let segment = HeardSegment {
            end_ms: window.samples.len() as u64 / 16,
            text,
            // Text alone is compared; scores in its favour keep the guards out.
            confidence: 1.0,
            ..HeardSegment::default()
        };
        Ok(Hypothesis {
            segments: vec![segment],
            language: Some("en".to_owned()),
            word_timing: Some(WordTiming::TokenEstimate),
        })
    }
}

impl Recognizer for Plain {
    fn info(&self) -> &RecognizerInfo {
        &self.info
    }

    fn decode(&mut self, batch: &[Window]) -> Vec<Result<Hypothesis, EngineError>> {
        batch.iter().map(|window| self.hear(window)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_their_fixed_names() {
        let args = EngineArgs {
            models: vec![Model::Micro],
            stubs: Stubs { format: "f16".parse().expect("a format"), stubs_dir: None },
            engines: vec![Engine::WhisperCpp],
            batches: vec![1],
            compute_types: Vec::new(),
            threads: vec![1],
            states: vec![1],
            seconds: 1.0,
            max_tokens: 4,
            rounds: 1,
            use_gpu: false,
            speed_only: true,
        };
        let found = run(&args).expect("measured");
        let rows = found["rows"].as_array().expect("rows");
        let looks: Vec<(u64, bool)> = rows
            .iter()
            .filter_map(|row| Some((row["audio_ctx"].as_u64()?, row["flash_attention"].as_bool()?)))
            .collect();
        assert_eq!(looks, [(512, false), (1_500, false), (512, true), (1_500, true)]);
        for row in rows {
            assert_eq!((row["model"].as_str(), row["threads"].as_u64()), (Some("micro.en-q8_0"), Some(1)));
            assert_eq!((row["engine"].as_str(), row["compute_type"].as_str()), (Some("whisper_cpp"), Some("q8_0")));
            assert_eq!(row["batch"], 1);
            assert!(row["realtime_factor"].as_f64().is_some_and(|factor| factor > 0.0), "{row}");
        }
    }
}
