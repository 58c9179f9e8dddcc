//! The most live sessions that this CPU holds with words at most two seconds behind, by engine.
//!
//! A whole fleet of one worker: server, dispatcher, supervisor, engine with the micro model, and as many sessions as are tried,
//! each a test call at the pace it was spoken. The lag of a word is measured as [`super::latency`] measures it: from when the chunk
//! with its last sample is handed to the client library to the first message that shows it at a plain subscriber. A partial
//! that is left out under load therefore counts: its words wait for the next.
//!
//! Sessions are doubled until the 95th percentile of all words breaks the bound or a session has no end in time, then the
//! gap is halved. Engines have all cores: whisper.cpp as one decode state of one thread for each, which is its fastest use of
//! them, CTranslate2 as threads of its one device. Slots are as many as sessions, so that nothing else is the limit. Server,
//! dispatcher and the sessions' producers run on the same cores.

use anyhow::Result;
use serde_json::{Value, json};
use voxfleet_harness::audio::Pcm;
use voxfleet_worker::engine::ct2::ComputeType;

use super::{
    engines::{self, Engine, compute_type},
    latency::{Call, MICRO, Round, cores, measure},
    progress, rounded, usage,
};
use crate::demo::report::quantile;

/// How far words may be behind, at the 95th percentile.
const BOUND_MS: u64 = 2_000;
const CHUNK_MS: u64 = 200;

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench density
  voxfleet bench density --engines whisper_cpp,ct2 --most 64 --json
  voxfleet bench density --first 1 --seconds 15 --most 4

Each number of sessions that is tried takes the audio's length and about 15 s; there are about six for each engine.")]
pub(crate) struct DensityArgs {
    /// Engines: whisper_cpp, ct2 [default: those of this build]
    #[arg(long, value_delimiter = ',', value_name = "NAMES", hide_possible_values = true)]
    engines: Vec<Engine>,
    /// Audio of each session; calls are cut where nobody speaks and no longer than they are, half a minute
    #[arg(long, default_value_t = 30, value_name = "N", value_parser = clap::value_parser!(u64).range(5..=60))]
    seconds: u64,
    /// Sessions to begin with
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000))]
    first: u64,
    /// Search no further than this
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000))]
    most: u64,
    /// Windows that CTranslate2 decodes together [default: what its workers do]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=64))]
    batch: Option<u64>,
    /// What CTranslate2 computes with [default: what its workers do]
    #[arg(long, value_name = "TYPE", value_parser = compute_type)]
    compute_type: Option<ComputeType>,
}

pub(super) async fn run(args: DensityArgs) -> Result<Value> {
    usage(args.first <= args.most, "--first: no more than --most")?;
    let engines = engines::chosen(&args.engines)?;
    let (first, most) = (usize::try_from(args.first)?, usize::try_from(args.most)?);
    let calls = Call::all(Some(args.seconds * 1_000))?;
    let longest = calls.iter().map(|call| &call.pcm).map(Pcm::seconds).fold(0.0, f64::max);
    let (mut rows, mut steps) = (Vec::new(), Vec::new());
    for engine in engines {
        let settings = settings(engine, &args);
        let mut tried: Vec<Step> = Vec::new();
        while let Some(sessions) = next(&held_of(&tried), first, most) {
            progress(&format!("{}: {sessions} live sessions for {longest:.0} s", engine.as_str()));
            let round = measure(&calls, sessions, CHUNK_MS, &settings).await?;
            let step = Step::of(engine, sessions, &round);
            progress(&format!("{sessions}: {}", step.trouble.as_deref().unwrap_or("held")));
            tried.push(step);
        }
        rows.push(best(engine, &tried));
        tried.sort_by_key(|step| step.sessions);
        steps.extend(tried.iter().map(Step::printed));
    }
    let ratio = ratio(&rows);
    Ok(json!({
        "rows": rows.iter().map(Step::row).collect::<Vec<_>>(),
        "ratio": ratio.map(rounded),
        "note": ratio.is_none().then_some("no ratio: both engines are needed, ct2 is a cargo feature"),
        "steps": steps,
        "bound_ms": BOUND_MS,
        "audio_s": rounded(longest),
        "most": most,
        "chunk_ms": CHUNK_MS,
        "cores": cores(),
    }))
}

fn settings(engine: Engine, args: &DensityArgs) -> Vec<(&'static str, String)> {
    let mut settings = vec![("worker.engine", engine.as_str().to_owned())];
    if engine == Engine::Ct2 {
        // As many threads as there are cores.
        settings.push(("worker.decode_threads", "0".to_owned()));
        settings.extend(args.batch.map(|batch| ("worker.ct2.batch", batch.to_string())));
        settings.extend(args.compute_type.map(|numbers| ("worker.ct2.compute_type", engines::name_of(numbers))));
    }
    settings
}

/// One number of sessions that was tried.
#[derive(Debug, Clone)]
struct Step {
    engine: Engine,
    sessions: usize,
    partial_p50_ms: Option<u64>,
    partial_p95_ms: Option<u64>,
    final_p95_ms: Option<u64>,
    wer: f64,
    /// Share of the words that only a final showed.
    without_partial: f64,
    trouble: Option<String>,
}

impl Step {
    fn of(engine: Engine, sessions: usize, round: &Round) -> Self {
        let partial_p95_ms = quantile(&round.partial_ms, 0.95);
        Self {
            engine,
            sessions,
            partial_p50_ms: quantile(&round.partial_ms, 0.5),
            partial_p95_ms,
            final_p95_ms: quantile(&round.final_ms, 0.95),
            wer: round.edits.rate(),
            without_partial: round.without_partial as f64 / round.words.max(1) as f64,
            trouble: round.trouble.clone().or_else(|| too_late(partial_p95_ms)),
        }
    }

    fn row(&self) -> Value {
        json!({
            "engine": self.engine.as_str(),
            "model": MICRO,
            "sessions": self.sessions,
            "partial_lag_p50_ms": self.partial_p50_ms,
            "partial_lag_p95_ms": self.partial_p95_ms,
            "final_lag_p95_ms": self.final_p95_ms,
            "wer": rounded(self.wer),
            "words_without_partial": rounded(self.without_partial),
        })
    }

    fn printed(&self) -> Value {
        let mut row = self.row();
        row["held"] = self.trouble.is_none().into();
        row["trouble"] = self.trouble.clone().into();
        row
    }
}

/// Why so many sessions were too many, if they were.
fn too_late(partial_p95_ms: Option<u64>) -> Option<String> {
    match partial_p95_ms {
        None => Some("no word was shown".to_owned()),
        Some(ms) => (ms > BOUND_MS).then(|| format!("words come {ms} ms late at p95")),
    }
}

fn held_of(tried: &[Step]) -> Vec<(usize, bool)> {
    tried.iter().map(|step| (step.sessions, step.trouble.is_none())).collect()
}

/// The step with the most sessions that were held; none held = no sessions.
fn best(engine: Engine, tried: &[Step]) -> Step {
    let held = tried.iter().filter(|step| step.trouble.is_none()).max_by_key(|step| step.sessions);
    held.cloned()
        .unwrap_or_else(|| Step { trouble: Some("none held".to_owned()), ..Step::of(engine, 0, &Round::default()) })
}

/// How many times the sessions of whisper.cpp the other engine holds.
fn ratio(rows: &[Step]) -> Option<f64> {
    let of = |engine: Engine| rows.iter().find(|step| step.engine == engine).map(|step| step.sessions as f64);
    of(Engine::WhisperCpp).filter(|sessions| *sessions > 0.0).zip(of(Engine::Ct2)).map(|(one, other)| other / one)
}

/// The number to try after these; none when the most is known to an eighth of itself.
fn next(tried: &[(usize, bool)], first: usize, most: usize) -> Option<usize> {
    let held = tried.iter().filter(|(_, held)| *held).map(|(n, _)| *n).max();
    let failed = tried.iter().filter(|(_, held)| !held).map(|(n, _)| *n).min();
    match (held, failed) {
        (None, None) => Some(first),
        (None, Some(failed)) => (failed > 1).then_some(failed / 2),
        (Some(held), None) => (held < most).then(|| (held * 2).min(most)),
        // A busy moment may have failed a number below one that was held later.
        (Some(held), Some(failed)) if failed <= held => None,
        (Some(held), Some(failed)) => (failed - held > (held / 8).max(1)).then_some(held + (failed - held) / 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_then_halves_the_gap() {
        let run = |first: usize, most: usize, holds: usize| {
            let mut tried = Vec::new();
            while let Some(n) = next(&tried, first, most) {
                tried.push((n, n <= holds));
            }
            tried.into_iter().map(|(n, _)| n).collect::<Vec<_>>()
        };
        assert_eq!(run(4, 128, 13), [4, 8, 16, 12, 14, 13]);
        assert_eq!(run(4, 128, 41), [4, 8, 16, 32, 64, 48, 40, 44]);
        assert_eq!(run(4, 6, 100), [4, 6]);
        assert_eq!(run(4, 128, 0), [4, 2, 1]);
        assert_eq!(run(4, 128, 1), [4, 2, 1]);
        assert_eq!(run(4, 128, 3), [4, 2, 3]);
        assert_eq!(run(1, 1, 9), [1]);
        assert_eq!(next(&[(8, false), (16, true)], 4, 128), None, "one of them was an accident");
    }

    fn step(engine: Engine, sessions: usize, p95_ms: Option<u64>) -> Step {
        let mut round = Round::default();
        round.partial_ms.extend(p95_ms);
        Step::of(engine, sessions, &round)
    }

    #[test]
    fn what_is_held_is_what_comes_in_time() {
        use Engine::{Ct2, WhisperCpp};
        let tried = [
            step(WhisperCpp, 4, Some(700)),
            step(WhisperCpp, 8, Some(2_000)),
            step(WhisperCpp, 9, Some(2_001)),
            step(WhisperCpp, 16, None),
        ];
        assert_eq!(held_of(&tried), [(4, true), (8, true), (9, false), (16, false)]);
        let rows = [best(WhisperCpp, &tried), best(Ct2, &[step(Ct2, 24, Some(1_500))])];
        assert_eq!((rows[0].sessions, rows[1].row()["partial_lag_p95_ms"].as_u64()), (8, Some(1_500)));
        assert_eq!(ratio(&rows), Some(3.0));
        assert_eq!(ratio(&rows[..1]), None, "one engine has nothing beside it");
        // A round without an end is too much, however soon its words came.
        let mut round = Round::default();
        round.partial_ms.push(100);
        round.trouble.get_or_insert("no end".to_owned());
        let stuck = Step::of(Ct2, 2, &round);
        assert_eq!((stuck.trouble.as_deref(), best(Ct2, std::slice::from_ref(&stuck)).sessions), (Some("no end"), 0));
        assert_eq!(ratio(&[best(WhisperCpp, &[stuck]), rows[1].clone()]), None);
    }

    #[test]
    fn each_engine_has_the_cores_in_its_own_way() {
        let args = DensityArgs {
            engines: Vec::new(),
            seconds: 30,
            first: 4,
            most: 8,
            batch: Some(8),
            compute_type: Some(ComputeType::Float32),
        };
        let of = |engine| settings(engine, &args).into_iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>();
        assert_eq!(of(Engine::WhisperCpp), ["worker.engine=whisper_cpp"]);
        let ct2 = of(Engine::Ct2);
        assert_eq!(ct2[1..], ["worker.decode_threads=0", "worker.ct2.batch=8", "worker.ct2.compute_type=float32"]);
    }
}
