//! One pass over a batch: encode, generate, align.
//!
//! Between its steps each window is asked whether it was cancelled, as a sign of life; within a step nothing stops it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use ct2rs::sys::{Device, StorageView, Whisper, WhisperAlignmentResult, WhisperOptions};
use voxfleet_ggml::vocabulary::LANGUAGES;
use voxfleet_schema::session::Task;

use super::{
    growing::Growing,
    mel::Spectrogram,
    passes::{self, Cut, LEAST_FRAMES, Marks, PASS_FRAMES},
    pulse::{Pulse, patience},
    schedule::{self, For, Key, Most, Waiting},
    vocabulary::Vocabulary,
};
use crate::engine::{
    Cancel, EngineError, HeardSegment, RecognizerInfo, Window,
    last_words::{self, LastWords},
    whisper::{MAX_PROMPT_TOKENS, Token, UNSPACED, context::Context, words_of},
};

/// Whisper's text context; half of it is for what is said.
const TEXT_POSITIONS: usize = 448;
const MS_PER_FRAME: u64 = 10;
/// Of word times.
const MS_PER_POSITION: i64 = 20;
/// As in Whisper's own word times.
const MEDIAN_FILTER: i64 = 7;
/// A rest this short is confused by what was said before it, in frames.
const SHORT_REST: usize = 500;

/// A loaded model.
pub(super) struct Loaded {
    pub(super) whisper: Whisper,
    pub(super) vocabulary: Vocabulary,
    pub(super) info: RecognizerInfo,
    pub(super) bands: usize,
    pub(super) never_said: Vec<i32>,
    /// Of the models that this process has loaded so far.
    pub(super) id: usize,
    /// Windows in a batch; smaller after an allocation failed.
    pub(super) most: AtomicUsize,
    /// What that was when the model was loaded.
    pub(super) fitting: AtomicUsize,
    /// Batches of that many that had their memory, in a row.
    pub(super) calm: AtomicUsize,
    /// What one window of silence takes, in ms.
    pub(super) silence_ms: AtomicU64,
    /// What the last pass took, in ms.
    pub(super) passed_ms: AtomicU64,
    pub(super) growing: Growing,
}

/// One window on its way.
pub(super) struct Run {
    pub(super) sound: Spectrogram,
    pub(super) window_ms: u64,
    pub(super) positions: usize,
    pub(super) what: For,
    pub(super) words: bool,
    pub(super) task: Task,
    pub(super) prompt: Vec<u32>,
    /// What was asked for; none: to be detected.
    pub(super) asked: Option<String>,
    pub(super) language: Option<String>,
    pub(super) cancel: Cancel,
    pub(super) since: Instant,
    /// What was said in its passes so far.
    pub(super) said: Vec<u32>,
    /// Where its next pass begins, in frames.
    pub(super) at: usize,
    pub(super) segments: Vec<HeardSegment>,
}

impl Run {
    pub(super) fn is_over(&self) -> bool {
        self.at + LEAST_FRAMES >= self.sound.frames()
    }

    pub(super) fn waiting(&self, model: usize, most: Most) -> Waiting {
        let key = Key { model, positions: self.positions, prompt_tokens: self.context().len(), words: self.words };
        Waiting { key, what: self.what, since: self.since, most }
    }

    /// From the beginning, with another context, as if it had never been heard.
    pub(super) fn again(&mut self, positions: usize) {
        (self.at, self.positions) = (0, positions);
        self.language = self.asked.clone();
        self.said.clear();
        self.segments.clear();
    }

    /// Earlier words for the next pass, as whisper.cpp rolls them.
    fn context(&self) -> Vec<u32> {
        if self.at > 0 && self.at + SHORT_REST >= self.sound.frames() {
            return Vec::new();
        }
        let all = [&self.prompt[..], &self.said[..]].concat();
        all[all.len().saturating_sub(MAX_PROMPT_TOKENS)..].to_vec()
    }
}

/// What CTranslate2 says when there is no memory left, on a CPU and on a GPU.
pub(super) fn out_of_memory(error: &dyn std::fmt::Display) -> Option<EngineError> {
    let why = error.to_string();
    let said = why.to_ascii_lowercase();
    let short = ["bad_alloc", "cannot allocate"].iter().any(|sign| said.contains(sign))
        || LastWords::in_text(&why) == Some(LastWords::OutOfMemory);
    short.then_some(EngineError::OutOfMemory(why))
}

/// A card that has failed answers nothing in this process any more: without an end, each later final would be without words.
fn leave_if_device_failed(error: &EngineError) {
    if let EngineError::Decode(why) = error
        && let Some(words) = device_failed(why)
    {
        last_words::leave(words, why);
    }
}

fn device_failed(why: &str) -> Option<LastWords> {
    let said = why.to_ascii_lowercase();
    if !said.contains("cuda") && !said.contains("cublas") {
        return None;
    }
    Some(LastWords::in_text(why).unwrap_or(LastWords::DeviceLost))
}

pub(super) fn decode_error(error: impl std::fmt::Display) -> EngineError {
    out_of_memory(&error).unwrap_or_else(|| EngineError::Decode(error.to_string()))
}

/// What one pass over one window gave.
struct Passed {
    tokens: Vec<u32>,
    ended: bool,
    mean_log_probability: f32,
    no_speech_probability: f32,
}

impl Loaded {
    /// What goes into one batch. Full contexts beside each other fall out of a CPU's caches: there the bound is that of windows
    /// with the short one.
    pub(super) fn most(&self) -> Most {
        let windows = self.most.load(Ordering::Relaxed);
        let positions = (self.info.device == "cpu").then(|| windows * Context::PARTIAL.positions(0));
        Most { windows, positions }
    }

    /// The language it is decoded in; none = to be detected.
    pub(super) fn language(&self, window: &Window) -> Result<Option<String>, EngineError> {
        let model = &self.info.model;
        let known = |code: &str| self.vocabulary.specials.language(code).is_some();
        let language = match (&window.language, self.info.multilingual) {
            (None, true) => None,
            (None, false) => Some("en".to_owned()),
            (Some(code), true) if known(code) => Some(code.clone()),
            (Some(code), false) if code == "en" => Some(code.clone()),
            (Some(code), _) => {
                return Err(EngineError::Unsupported(format!("model {model} does not know language {code}")));
            }
        };
        if window.task == Task::Translate && !self.info.multilingual {
            return Err(EngineError::Unsupported(format!("model {model} is English only and cannot translate")));
        }
        Ok(language)
    }

    /// One pass over a batch of windows that are alike. One that fails is tried in halves: an input that is poison then fails
    /// alone, and what was too large for the memory may fit. Says of each why it failed.
    pub(super) fn pass_or_fail(&self, batch: &mut [Run], pulse: &Pulse) -> Vec<Result<(), EngineError>> {
        let begin = Instant::now();
        let silence = Duration::from_millis(self.silence_ms.load(Ordering::Relaxed));
        let call = pulse.slow(patience(silence, batch.iter().map(|run| run.positions).sum()));
        // A panic of the library's bindings leaves nothing behind: what they made for this pass is gone.
        let passed = catch_unwind(AssertUnwindSafe(|| self.pass(batch)));
        drop(call);
        self.passed_ms.store(begin.elapsed().as_millis() as u64, Ordering::Relaxed);
        let error = match passed.unwrap_or_else(|_| Err(EngineError::Decode("the engine panicked".to_owned()))) {
            Ok(()) => {
                self.had_room(batch.len());
                return vec![Ok(()); batch.len()];
            }
            Err(error) => error,
        };
        leave_if_device_failed(&error);
        if batch.len() <= 1 {
            return vec![Err(error)];
        }
        let half = batch.len() / 2;
        if matches!(error, EngineError::OutOfMemory(_)) {
            let before = self.most.fetch_min(half, Ordering::Relaxed);
            self.calm.store(0, Ordering::Relaxed);
            let model = &self.info.model;
            tracing::warn!(model, batch = before.min(half), before, "no memory for a batch, the next are smaller");
        }
        tracing::warn!(%error, windows = batch.len(), "a batch failed and is tried in halves");
        let (one, other) = batch.split_at_mut(half);
        [self.pass_or_fail(one, pulse), self.pass_or_fail(other, pulse)].concat()
    }

    /// Only the device's thread comes here, so nothing changes in between.
    fn had_room(&self, windows: usize) {
        let (most, fitting) = (self.most.load(Ordering::Relaxed), self.fitting.load(Ordering::Relaxed));
        if windows < most || most >= fitting {
            return;
        }
        let calm = self.calm.fetch_add(1, Ordering::Relaxed) + 1;
        let grown = schedule::grown(most, fitting, calm);
        if grown > most {
            self.most.store(grown, Ordering::Relaxed);
            self.calm.store(0, Ordering::Relaxed);
            tracing::info!(model = self.info.model, batch = grown, before = most, "batches may be larger again");
        }
    }

    fn pass(&self, batch: &mut [Run]) -> Result<(), EngineError> {
        let Some(positions) = batch.first().map(|run| run.positions) else { return Ok(()) };
        let frames = 2 * positions;
        let mut features = Vec::with_capacity(batch.len() * self.bands * frames);
        batch.iter().for_each(|run| run.sound.bands_of(run.at, frames, &mut features));
        let shape = [batch.len(), self.bands, frames];
        let features = StorageView::new(&shape, &mut features, Device::CPU).map_err(decode_error)?;
        let encoded = self.whisper.encode(&features, false).map_err(decode_error)?;
        if !looked(batch) {
            return Ok(());
        }
        self.detect(&encoded, batch)?;
        let passed = self.generate(&encoded, batch)?;
        if !looked(batch) {
            return Ok(());
        }
        let specials = self.vocabulary.specials;
        let marks = Marks { end_of_text: specials.end_of_text, first_timestamp: specials.first_timestamp };
        let heard: Vec<passes::Heard> = passed
            .iter()
            .zip(batch.iter())
            .map(|(passed, run)| passes::heard(&passed.tokens, passed.ended, run.at..run.sound.frames(), marks))
            .collect();
        let words = if batch[0].words { self.align(&encoded, batch, &heard)? } else { Vec::new() };
        for (n, ((run, passed), heard)) in batch.iter_mut().zip(passed).zip(heard).enumerate() {
            let mut words = words.get(n).into_iter().flatten();
            for cut in &heard.segments {
                let tokens: Vec<&Aligned> = words.by_ref().take(cut.tokens.len()).collect();
                run.segments.push(self.segment(run, cut, &tokens, &passed));
            }
            run.said.extend(heard.tokens);
            // Whatever was said, the next pass is further on, and behind what waits now: a window of many passes holds up nobody.
            run.at = heard.next.max(run.at + 2 * LEAST_FRAMES);
            run.since = Instant::now();
        }
        Ok(())
    }

    fn detect(&self, encoded: &StorageView<'_>, batch: &mut [Run]) -> Result<(), EngineError> {
        if batch.iter().all(|run| run.language.is_some()) {
            return Ok(());
        }
        let detected = self.whisper.detect_language(encoded).map_err(decode_error)?;
        for (run, languages) in batch.iter_mut().zip(detected) {
            let code = languages.first().map(|best| best.language.trim_matches(['<', '|', '>']));
            let known = code.and_then(|code| LANGUAGES.iter().find(|language| **language == code));
            run.language.get_or_insert_with(|| known.unwrap_or(&"en").to_string());
        }
        looked(batch);
        Ok(())
    }

    /// The tokens that say what is to be done, without a prompt.
    fn task(&self, run: &Run) -> Vec<u32> {
        let specials = self.vocabulary.specials;
        let mut tokens = vec![specials.start];
        if self.info.multilingual {
            let language = run.language.as_deref().and_then(|code| specials.language(code));
            tokens.push(language.unwrap_or(specials.first_language));
            tokens.push(match run.task {
                Task::Translate => specials.translate,
                _ => specials.transcribe,
            });
        }
        tokens
    }

    fn generate(&self, encoded: &StorageView<'_>, batch: &[Run]) -> Result<Vec<Passed>, EngineError> {
        let specials = self.vocabulary.specials;
        let mut before = 0;
        let prompts: Vec<Vec<&str>> = batch
            .iter()
            .map(|run| {
                let context = run.context();
                let marked = (!context.is_empty()).then_some(specials.previous);
                let prompt: Vec<u32> = marked.into_iter().chain(context).chain(self.task(run)).collect();
                before = prompt.len() - 1;
                prompt.iter().map(|token| self.vocabulary.written(*token)).collect()
            })
            .collect();
        let options = WhisperOptions {
            beam_size: 1,
            return_scores: true,
            return_no_speech_prob: true,
            max_length: TEXT_POSITIONS,
            suppress_tokens: self.never_said.clone(),
            ..WhisperOptions::default()
        };
        let most = (TEXT_POSITIONS / 2).min(TEXT_POSITIONS - before);
        let results = self.whisper.generate(encoded, &prompts, &options).map_err(decode_error)?;
        if results.len() != batch.len() {
            return Err(EngineError::Decode(format!("{} answers to {} windows", results.len(), batch.len())));
        }
        let passed = results.into_iter().map(|result| {
            let ids = result.sequences_ids.into_iter().next().unwrap_or_default();
            let tokens: Vec<u32> = ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
            Passed {
                ended: tokens.len() < most,
                tokens,
                mean_log_probability: result.scores.first().copied().unwrap_or(f32::NAN),
                no_speech_probability: result.no_speech_prob,
            }
        });
        Ok(passed.collect())
    }

    /// When each text token was said, for each window.
    fn align(
        &self,
        encoded: &StorageView<'_>,
        batch: &[Run],
        heard: &[passes::Heard],
    ) -> Result<Vec<Vec<Aligned>>, EngineError> {
        let texts: Vec<Vec<usize>> = heard
            .iter()
            .map(|heard| heard.segments.iter().flat_map(|s| &s.tokens).map(|token| *token as usize).collect())
            .collect();
        let mut aligned: Vec<Vec<Aligned>> = vec![Vec::new(); batch.len()];
        if texts.iter().all(Vec::is_empty) {
            return Ok(aligned);
        }
        let frames: Vec<usize> = batch
            .iter()
            .map(|run| (run.sound.frames() - run.at).clamp(2, PASS_FRAMES.min(2 * run.positions)))
            .collect();
        let tasks: Vec<Vec<u32>> = batch.iter().map(|run| self.task(run)).collect();
        let mut left: Vec<usize> = (0..batch.len()).filter(|place| !texts[*place].is_empty()).collect();
        // The library takes one task and language at a time, and all windows of the batch. It also reckons with what it fills
        // shorter texts up with: texts of one length at a time, those of the others cut or filled to it and not looked at.
        while let Some(first) = left.first().copied() {
            let (task, length) = (tasks[first].clone(), texts[first].len());
            let start: Vec<usize> = task.iter().map(|token| *token as usize).collect();
            let even: Vec<Vec<usize>> = texts
                .iter()
                .map(|text| text.iter().copied().chain(std::iter::repeat(0)).take(length).collect())
                .collect();
            let results = self.whisper.align(encoded, &start, &even, &frames, MEDIAN_FILTER).map_err(decode_error)?;
            for place in left.extract_if(.., |place| tasks[*place] == task && texts[*place].len() == length) {
                if let Some(result) = results.get(place) {
                    aligned[place] = timed(result, texts[place].len(), batch[place].at as i64);
                }
            }
        }
        Ok(aligned)
    }

    fn segment(&self, run: &Run, cut: &Cut, aligned: &[&Aligned], passed: &Passed) -> HeardSegment {
        let ms = |frame: usize| (frame as u64 * MS_PER_FRAME).min(run.window_ms);
        let (start_ms, end_ms) = (ms(cut.begin), ms(cut.end));
        let bytes: Vec<u8> = cut.tokens.iter().flat_map(|token| self.vocabulary.bytes(*token).to_vec()).collect();
        let tokens: Vec<Token> = cut
            .tokens
            .iter()
            .zip(aligned)
            .map(|(token, aligned)| Token {
                bytes: self.vocabulary.bytes(*token).to_vec(),
                probability: aligned.probability,
                log_probability: aligned.probability.max(f32::MIN_POSITIVE).ln(),
                start_ms: aligned.start_ms,
                end_ms: aligned.end_ms,
            })
            .collect();
        let spaced = !run.language.as_deref().is_some_and(|language| UNSPACED.contains(&language));
        let count = tokens.len().max(1) as f32;
        let (confidence, mean_log_probability) = if tokens.is_empty() {
            (passed.mean_log_probability.exp(), passed.mean_log_probability)
        } else {
            let sum = |of: fn(&Token) -> f32| tokens.iter().map(of).sum::<f32>() / count;
            (sum(|t| t.probability), sum(|t| t.log_probability))
        };
        HeardSegment {
            start_ms,
            end_ms,
            text: String::from_utf8_lossy(&bytes).trim().to_owned(),
            words: words_of(&tokens, spaced, start_ms..end_ms),
            confidence: confidence.clamp(0.0, 1.0),
            no_speech_probability: passed.no_speech_probability,
            mean_log_probability,
        }
    }
}

/// A sign of life for each window of the batch. A cancelled one is dropped before its next pass; false: all of them were.
fn looked(batch: &[Run]) -> bool {
    let cancelled = batch.iter().filter(|run| run.cancel.is_cancelled()).count();
    cancelled < batch.len()
}

/// When a token was said, in ms from the window's beginning, and how probable it was.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Aligned {
    start_ms: i64,
    end_ms: i64,
    probability: f32,
}

/// The path through the attention names a position for each step of tokens and sound; a token begins where the path first
/// comes to it, and ends where the next begins.
fn timed(result: &WhisperAlignmentResult, tokens: usize, offset_frames: i64) -> Vec<Aligned> {
    let offset_ms = offset_frames * MS_PER_FRAME as i64;
    let mut starts: Vec<Option<i64>> = vec![None; tokens + 1];
    let mut last = 0;
    for step in &result.alignments {
        last = last.max(step.frame_x);
        if let Some(start) = usize::try_from(step.token_x).ok().and_then(|token| starts.get_mut(token)) {
            start.get_or_insert(step.frame_x);
        }
    }
    let mut next = last;
    let mut times: Vec<i64> = starts
        .into_iter()
        .rev()
        .map(|start| {
            next = start.unwrap_or(next);
            offset_ms + next * MS_PER_POSITION
        })
        .collect();
    times.reverse();
    times
        .windows(2)
        .enumerate()
        .map(|(token, pair)| Aligned {
            start_ms: pair[0],
            end_ms: pair[1],
            probability: result.text_token_probs.get(token).copied().unwrap_or(0.0),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_library_says_is_told_apart() {
        for said in [
            "std::bad_alloc",
            "CUDA failed with error out of memory",
            "cuBLAS failed with status CUBLAS_STATUS_ALLOC_FAILED",
            "mkl_malloc: failed to allocate memory",
        ] {
            assert!(matches!(decode_error(said), EngineError::OutOfMemory(_)), "{said}");
        }
        for (said, words) in [
            ("CUDA failed with error an illegal memory access was encountered", Some(LastWords::DeviceLost)),
            ("CUDA failed with error uncorrectable ECC error encountered", Some(LastWords::DeviceLost)),
            ("CUDA failed with error no kernel image is available", Some(LastWords::DriverMismatch)),
            ("cuBLAS failed with status CUBLAS_STATUS_EXECUTION_FAILED", Some(LastWords::DeviceLost)),
            ("prompts of different lengths", None),
        ] {
            assert!(matches!(decode_error(said), EngineError::Decode(_)), "{said}");
            assert_eq!(device_failed(said), words, "{said}");
        }
    }
}
