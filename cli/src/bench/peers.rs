//! Our engine beside whisper.cpp by itself, in one run: the same bundled library, model, threads and recordings.
//!
//! | row | is |
//! |---|---|
//! | `ours` | the engine called directly: Silero, one window an utterance, each at full context |
//! | `ours_fitted` | the same with the encoder's context fitted to each window, as partials have it |
//! | `whisper_cpp` | the whole recording in windows of 30 s, as the library does it; settings as ours |
//! | `whisper_cpp_flash` | the same with flash attention, the library's default |
//! | `whisper_cpp_fall_back` | the same, and windows that look bad are decoded again, the library's default |
//! | `whisper_cpp_vad` | speech found by its own detector, put together without pauses, then windows of 30 s |
//!
//! The engines take turns; the fastest of the rounds counts, so that a moment of a busy machine does not. Beside the time
//! that passed stands the time this process was given, which other programs hardly change.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use voxfleet_eval::{Edits, text::compare};
use voxfleet_harness::{audio::Pcm, find, fleet};
use voxfleet_schema::{session::SessionOptions, transcript::join_text};
use voxfleet_worker::{
    engine::{
        EngineError, Hypothesis, Purpose, Recognizer, RecognizerInfo, Window,
        direct::transcribe_log,
        vad::VadFactory,
        whisper::{
            WhisperModel,
            whole::{WholeOptions, WholeWhisper},
        },
    },
    ipc::StartPoint,
};

use super::{
    pipeline::{Kind, log},
    processes, progress,
    recording::{self, Spoken},
    rounded, usage,
};

const MICRO: &str = "micro.en-q8_0";
const DETECTOR: &str = "models/for-tests-silero-v6.2.0-ggml.bin";

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench peers
  voxfleet bench peers --long-seconds 600 --threads 2 --json
  VOXFLEET_TEST_DATA=/data voxfleet bench peers

whisper.cpp's own detector is tried when VOXFLEET_TEST_DATA/models/for-tests-silero-v6.2.0-ggml.bin is there.")]
pub(crate) struct PeersArgs {
    /// Length of the recording that calls 01 to 05 are put together to, one after the other
    #[arg(long, default_value_t = 300.0, value_name = "SECONDS")]
    long_seconds: f64,
    /// Threads of one decode
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
    /// How often each has its turn
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: u32,
    /// whisper.cpp's detector [default: see below]
    #[arg(long, value_name = "FILE")]
    vad_model: Option<PathBuf>,
}

/// One recording of the set.
struct Item {
    name: String,
    spoken: Spoken,
}

/// What one engine made of one recording.
#[derive(Default, Clone)]
struct Outcome {
    text: String,
    /// Of the fastest round.
    seconds: f64,
    /// Of the round that was given least.
    cpu_s: f64,
}

pub(super) async fn run(args: PeersArgs) -> Result<Value> {
    usage(args.long_seconds >= 1.0, "--long-seconds: at least 1")?;
    let mut items = Vec::new();
    for number in 1..=5 {
        items.push(Item { name: format!("{number:02}"), spoken: recording::calls(&[number], 0.0)? });
    }
    items.push(Item { name: "long".to_owned(), spoken: recording::calls(&[1, 2, 3, 4, 5], args.long_seconds)? });
    let detector = args.vad_model.clone().or_else(detector);
    tokio::task::spawn_blocking(move || compare_all(&args, &items, detector)).await?
}

/// Where the test data lie, if somebody has said so.
fn detector() -> Option<PathBuf> {
    let data =
        std::env::var_os("VOXFLEET_TEST_DATA").map_or_else(|| find::root().join("../shared/data"), PathBuf::from);
    Some(data.join(DETECTOR)).filter(|path| path.is_file())
}

fn compare_all(args: &PeersArgs, items: &[Item], detector: Option<PathBuf>) -> Result<Value> {
    let threads = args.threads as usize;
    let mut engines = engines(threads, detector.as_ref())?;
    let mut outcomes = vec![vec![Outcome::default(); items.len()]; engines.len()];
    for round in 1..=args.rounds {
        for (n, item) in items.iter().enumerate() {
            progress(&format!("recording {}, round {round} of {}", item.name, args.rounds));
            for (engine, outcomes) in engines.iter_mut().zip(&mut outcomes) {
                let (begin, cpu) = (Instant::now(), processes::cpu_seconds(std::process::id()));
                let text = engine.run.transcribe(&item.spoken.pcm).with_context(|| engine.name)?;
                let seconds = begin.elapsed().as_secs_f64();
                progress(&format!("  {} {seconds:.2} s", engine.name));
                let cpu_s = processes::cpu_seconds(std::process::id()) - cpu;
                let before = &outcomes[n];
                outcomes[n] = match round {
                    1 => Outcome { text, seconds, cpu_s },
                    _ => Outcome { text, seconds: seconds.min(before.seconds), cpu_s: cpu_s.min(before.cpu_s) },
                };
            }
        }
    }
    let rows = engines.iter().zip(&outcomes).map(|(engine, outcomes)| row(engine.name, items, outcomes));
    let rows: Vec<Value> = rows.collect();
    let speed =
        |name: &str| rows.iter().find(|r| r["engine"] == name).and_then(|r| r["long_cpu_realtime_factor"].as_f64());
    let against = speed("ours").zip(speed("whisper_cpp")).map(|(ours, theirs)| rounded(ours / theirs));
    Ok(json!({
        "rows": rows,
        "ours_vs_whisper_cpp_cpu_speed": against,
        "model": MICRO,
        "threads": threads,
        "rounds": args.rounds,
        "own_detector": detector.is_some(),
        "vad": Kind::Micro.vad().kind().as_str(),
    }))
}

/// Times of each recording are x real time: seconds of audio per second.
fn row(name: &str, items: &[Item], outcomes: &[Outcome]) -> Value {
    let mut row = json!({ "engine": name });
    let (mut edits, mut words, mut audio_s, mut took_s, mut cpu_s) = (0, 0, 0.0, 0.0, 0.0);
    let factor = |audio_s: f64, took_s: f64| rounded(audio_s / took_s.max(1e-3));
    for (item, outcome) in items.iter().zip(outcomes) {
        let errors: Edits = compare(&item.spoken.text, &outcome.text);
        row[format!("wer_{}", item.name)] = rounded(errors.rate()).into();
        if item.name == "long" {
            let seconds = item.spoken.pcm.seconds();
            row["long_realtime_factor"] = factor(seconds, outcome.seconds).into();
            row["long_cpu_realtime_factor"] = factor(seconds, outcome.cpu_s).into();
        } else {
            edits += errors.edits();
            words += errors.reference;
            audio_s += item.spoken.pcm.seconds();
            took_s += outcome.seconds;
            cpu_s += outcome.cpu_s;
        }
    }
    row["wer"] = rounded(edits as f64 / words.max(1) as f64).into();
    row["word_errors"] = edits.into();
    row["words"] = words.into();
    row["realtime_factor"] = factor(audio_s, took_s).into();
    row["cpu_realtime_factor"] = factor(audio_s, cpu_s).into();
    row
}

/// One way to transcribe a whole recording.
trait Transcribe {
    fn transcribe(&mut self, pcm: &Pcm) -> Result<String>;
}

struct Named {
    name: &'static str,
    run: Box<dyn Transcribe>,
}

fn engines(threads: usize, detector: Option<&PathBuf>) -> Result<Vec<Named>> {
    let path = fleet::models_dir().join(format!("{MICRO}.bin"));
    let model = WhisperModel::load(MICRO, &path, false, threads)?;
    let vads = Kind::Micro.vad();
    let ours = |fitted: bool| -> Result<Box<dyn Transcribe>> {
        let state: Box<dyn Recognizer> = Box::new(model.state()?);
        let state = if fitted { Box::new(Fitted(state)) } else { state };
        Ok(Box::new(Ours { state, vads: vads.clone() }))
    };
    let whole = |flash: bool, options: WholeOptions| -> Result<Box<dyn Transcribe>> {
        Ok(Box::new(Whole { whisper: WholeWhisper::load(MICRO, &path, threads, flash)?, options }))
    };
    let plain = WholeOptions::default;
    let mut engines = vec![
        Named { name: "ours", run: ours(false)? },
        Named { name: "ours_fitted", run: ours(true)? },
        Named { name: "whisper_cpp", run: whole(false, plain())? },
        Named { name: "whisper_cpp_flash", run: whole(true, plain())? },
        Named { name: "whisper_cpp_fall_back", run: whole(false, WholeOptions { fall_back: true, ..plain() })? },
    ];
    if let Some(detector) = detector {
        let options = WholeOptions { vad_model: Some(detector.clone()), ..plain() };
        engines.push(Named { name: "whisper_cpp_vad", run: whole(false, options)? });
    }
    Ok(engines)
}

struct Ours {
    state: Box<dyn Recognizer>,
    vads: std::sync::Arc<dyn VadFactory>,
}

impl Transcribe for Ours {
    fn transcribe(&mut self, pcm: &Pcm) -> Result<String> {
        let options = SessionOptions { interim: false, ..SessionOptions::default() };
        let finals = transcribe_log(&log(pcm), &options, StartPoint::beginning(), &mut *self.state, &*self.vads, None)?;
        Ok(join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str()))))
    }
}

/// Decodes finals the way partials are decoded: less of the encoder, no word times.
struct Fitted(Box<dyn Recognizer>);

impl Recognizer for Fitted {
    fn info(&self) -> &RecognizerInfo {
        self.0.info()
    }

    fn decode(&mut self, batch: &[Window]) -> Vec<Result<Hypothesis, EngineError>> {
        let batch: Vec<Window> = batch.iter().map(|w| Window { purpose: Purpose::Partial, ..w.clone() }).collect();
        self.0.decode(&batch)
    }
}

struct Whole {
    whisper: WholeWhisper,
    options: WholeOptions,
}

impl Transcribe for Whole {
    fn transcribe(&mut self, pcm: &Pcm) -> Result<String> {
        let samples: Vec<f32> = pcm.samples.iter().map(|s| f32::from(*s) / 32_768.0).collect();
        let segments = self.whisper.transcribe(&samples, &self.options)?;
        Ok(join_text(segments.iter().map(String::as_str)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_summed_and_the_long_one_stands_apart() {
        let item = |name: &str, text: &str| Item {
            name: name.to_owned(),
            spoken: Spoken { pcm: Pcm::mono_16k(vec![0; 160_000]), text: text.to_owned() },
        };
        let items = [item("01", "a b c d"), item("02", "e f g h"), item("long", "a b c d")];
        let outcome = |text: &str, seconds: f64| Outcome { text: text.to_owned(), seconds, cpu_s: seconds / 2.0 };
        let row = row("ours", &items, &[outcome("a b c", 1.0), outcome("e f g h", 3.0), outcome("a b c d", 5.0)]);
        assert_eq!((row["wer"].as_f64(), row["word_errors"].as_u64()), (Some(0.125), Some(1)));
        assert_eq!((row["wer_01"].as_f64(), row["wer_long"].as_f64()), (Some(0.25), Some(0.0)));
        assert_eq!((row["realtime_factor"].as_f64(), row["long_realtime_factor"].as_f64()), (Some(5.0), Some(2.0)));
        assert_eq!(row["cpu_realtime_factor"].as_f64(), Some(10.0));
    }
}
