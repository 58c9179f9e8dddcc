//! What is timed, and what each row says; pure but for the clock of [`best_of`].

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use voxfleet_worker::engine::whisper::context::Context as Encoder;

use super::super::{engines::Engine, rounded};

/// A row that takes longer is not timed again: on a busy machine threads that spin wait for each other for seconds.
const ROW_BUDGET: Duration = Duration::from_secs(20);
/// Windows that are decoded together with the full context: as many as the engine puts together without being told. More
/// finals than that rarely wait at the same moment.
pub(super) const FULL_CONTEXT_BATCH: usize = 4;

/// One row's settings of whisper.cpp, which decodes one window at a time in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) threads: usize,
    pub(super) states: usize,
    pub(super) batch: usize,
    pub(super) context: Encoder,
}

/// Both contexts for every number of threads and states that the cores carry: ggml's threads spin, and more of them than
/// cores measure nothing but that.
pub(super) fn cases(threads: &[u32], states: &[u32], cores: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for states in states.iter().map(|n| *n as usize) {
        for threads in threads.iter().map(|n| *n as usize).filter(|threads| threads.saturating_mul(states) <= cores) {
            cases.extend([Encoder::PARTIAL, Encoder::Full].map(|context| Case { threads, states, batch: 1, context }));
        }
    }
    cases
}

/// Of CTranslate2 on so many threads, which has one device and many windows on it.
#[cfg(any(test, feature = "ct2-engine"))]
pub(super) fn batches(threads: usize, batches: &[u32]) -> Vec<Case> {
    let of = |context| batches.iter().map(move |batch| Case { threads, states: 1, batch: *batch as usize, context });
    of(Encoder::PARTIAL).chain(of(Encoder::Full).filter(|case| case.batch <= FULL_CONTEXT_BATCH)).collect()
}

fn name_of(context: Encoder) -> &'static str {
    if context == Encoder::Full { "full" } else { "fitted" }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { threads, states, batch, context } = self;
        write!(f, "{} context, {states} states of {threads} threads, batch {batch}", name_of(*context))
    }
}

/// How fast a case was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Timed {
    /// Seconds of audio per second.
    pub(super) factor: f64,
    pub(super) rounds: u32,
    /// In the text of each window: so much was written.
    pub(super) words: usize,
}

/// The fastest of the rounds. `once` decodes `audio_s` of sound and says how many words a window had.
pub(super) fn best_of(rounds: u32, audio_s: f64, mut once: impl FnMut() -> Result<usize>) -> Result<Timed> {
    let started = Instant::now();
    let (mut times, mut first, mut words) = (Vec::new(), None, 0);
    while times.len() < rounds as usize && started.elapsed() < ROW_BUDGET {
        let begin = Instant::now();
        words = once()?;
        // The first makes what the library keeps and brings weights into the caches: it counts only where it is the only one.
        match first {
            None => first = Some(begin.elapsed().as_secs_f64()),
            Some(_) => times.push(begin.elapsed().as_secs_f64()),
        }
    }
    let best = times.iter().copied().reduce(f64::min).or(first).context("no round")?;
    Ok(Timed { factor: audio_s / best.max(1e-6), rounds: times.len() as u32, words })
}

/// One row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) model: String,
    pub(super) weights: String,
    pub(super) engine: Engine,
    pub(super) compute_type: String,
    pub(super) case: Case,
    pub(super) positions: usize,
    pub(super) flash_attention: bool,
    pub(super) timed: Timed,
}

impl Row {
    fn cores(&self) -> usize {
        self.case.threads * self.case.states
    }

    /// The row of whisper.cpp that it is compared with: the same model, context and cores, whether as threads or as states,
    /// whichever was faster. Without flash attention, which that engine does without as well.
    fn beside<'a>(&self, rows: &'a [Row]) -> Option<&'a Row> {
        let alike = rows.iter().filter(|row| {
            row.engine == Engine::WhisperCpp
                && !row.flash_attention
                && (&row.model, row.case.context, row.cores()) == (&self.model, self.case.context, self.cores())
        });
        alike.max_by(|a, b| a.timed.factor.total_cmp(&b.timed.factor))
    }
}

/// All rows as they are printed; those of CTranslate2 say how many times whisper.cpp's speed they have.
pub(super) fn printed(rows: &[Row]) -> Vec<Value> {
    rows.iter()
        .map(|row| {
            let mut printed = json!({
                "model": row.model,
                "engine": row.engine.as_str(),
                "compute_type": row.compute_type,
                "batch": row.case.batch,
                "weights": row.weights,
                "threads": row.case.threads,
                "audio_ctx": row.positions,
                "context": name_of(row.case.context),
                "flash_attention": row.flash_attention,
                "states": row.case.states,
                "realtime_factor": rounded(row.timed.factor),
                "rounds": row.timed.rounds,
                "words": row.timed.words,
            });
            if row.engine == Engine::Ct2 {
                let beside = row.beside(rows);
                printed["times_whisper_cpp"] =
                    beside.map(|beside| rounded(row.timed.factor / beside.timed.factor.max(1e-6))).into();
                printed["whisper_cpp"] = beside
                    .map(|b| format!("{}, {} states of {} threads", b.compute_type, b.case.states, b.case.threads))
                    .into();
            }
            printed
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_threads_than_cores_are_tried() {
        let tried = |cores| cases(&[1, 2], &[1, 2], cores).iter().map(|c| (c.threads, c.states)).collect::<Vec<_>>();
        assert_eq!(tried(1), [(1, 1), (1, 1)]);
        assert_eq!(tried(2), [(1, 1), (1, 1), (2, 1), (2, 1), (1, 2), (1, 2)]);
        assert_eq!(tried(4).len(), 8);
    }

    #[test]
    fn large_batches_are_of_partials_only() {
        let tried = batches(2, &[1, 4, 8]);
        let looks: Vec<_> = tried.iter().map(|case| (case.batch, name_of(case.context))).collect();
        assert_eq!(looks, [(1, "fitted"), (4, "fitted"), (8, "fitted"), (1, "full"), (4, "full")]);
        assert!(tried.iter().all(|case| (case.threads, case.states) == (2, 1)));
    }

    fn row(engine: Engine, (threads, states, batch): (usize, usize, usize), flash: bool, factor: f64) -> Row {
        Row {
            model: "base".to_owned(),
            weights: "random f16".to_owned(),
            engine,
            compute_type: if engine == Engine::Ct2 { "float32" } else { "f16" }.to_owned(),
            case: Case { threads, states, batch, context: Encoder::Full },
            positions: 1_500,
            flash_attention: flash,
            timed: Timed { factor, rounds: 2, words: 24 },
        }
    }

    #[test]
    fn each_is_compared_with_the_best_that_as_many_cores_gave() {
        use Engine::{Ct2, WhisperCpp};
        let mut rows = vec![
            row(WhisperCpp, (1, 1, 1), false, 2.0),
            row(WhisperCpp, (2, 1, 1), false, 3.0),
            row(WhisperCpp, (1, 2, 1), false, 4.0),
            row(WhisperCpp, (1, 2, 1), true, 9.0),
            row(Ct2, (1, 1, 4), false, 6.0),
            row(Ct2, (2, 1, 4), false, 10.0),
            row(Ct2, (4, 1, 4), false, 10.0),
        ];
        let shown = printed(&rows);
        let times: Vec<_> = shown.iter().map(|row| row["times_whisper_cpp"].as_f64()).collect();
        assert_eq!(times, [None, None, None, None, Some(3.0), Some(2.5), None]);
        assert_eq!(shown[5]["whisper_cpp"], "f16, 2 states of 1 threads");
        assert!(shown[0].get("times_whisper_cpp").is_none() && shown[6]["times_whisper_cpp"].is_null());
        // Another model or another context is nothing to compare with.
        rows[4].model = "small".to_owned();
        rows[5].case.context = Encoder::PARTIAL;
        assert!(printed(&rows)[4..].iter().all(|row| row["times_whisper_cpp"].is_null()));
    }

    #[test]
    fn the_first_round_counts_only_where_it_is_the_only_one() {
        let mut turns = 0;
        let timed = best_of(2, 6.0, || {
            turns += 1;
            Ok(turns)
        });
        let timed = timed.expect("timed");
        assert_eq!((timed.rounds, timed.words, turns), (2, 3, 3));
        assert!(timed.factor > 0.0);
    }
}
