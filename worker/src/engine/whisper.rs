//! whisper.cpp. The weights are loaded once per model; each [`WhisperRecognizer`] is one decode state beside them.
//!
//! A decode depends on its window alone: greedy at temperature 0 with no fall-back, no context of earlier windows, prompt
//! tokens passed explicitly. Finals look at the full 30 s context; partials at what their audio needs and a margin, with
//! one more pass at full context where that gave no sensible text. Flash attention is off: it pads keys with rows that are
//! not masked, and it would switch off alignment by cross attention. Word times are whisper.cpp's own estimate from
//! timestamp probabilities and energy, and say so ([`WordTiming::TokenEstimate`]).

pub mod context;
pub mod random;
pub mod trial;
pub mod whole;

use std::{
    collections::HashMap,
    ffi::c_void,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use voxfleet_schema::{session::Task, transcript::WordTiming};
use whisper_rs::{
    FullParams, SamplingStrategy, WhisperContext, WhisperContextParameters, WhisperError, WhisperSegment, WhisperState,
};

use self::context::{Context, MIN_SAMPLES};
use super::{
    Cancel, EngineError, HeardSegment, HeardWord, Hypothesis, Purpose, Recognizer, RecognizerInfo, Window, checksum,
    diarize, guards, last_words, models,
};

/// Prompt tokens that Whisper takes: half its text context, less the token in front.
pub(super) const MAX_PROMPT_TOKENS: usize = 223;
/// whisper.cpp's times are in units of 10 ms.
const MS_PER_TICK: i64 = 10;

/// One loaded model.
#[derive(Clone)]
pub struct WhisperModel {
    context: Arc<WhisperContext>,
    info: RecognizerInfo,
    threads: usize,
    on_gpu: bool,
    /// Expected of one decode state.
    state_mb: u64,
}

impl WhisperModel {
    /// Checks the file, then loads its weights onto device 0 (what `CUDA_VISIBLE_DEVICES` shows) or the CPU.
    pub fn load(name: &str, path: &Path, use_gpu: bool, threads: usize) -> Result<Self, EngineError> {
        last_words::listen();
        let facts = models::check(name, path)?;
        if !checksum::verify(name, path)? {
            tracing::debug!(model = name, "no checksum beside the model");
        }
        let device = device(use_gpu);
        let on_gpu = device != "cpu";
        // whisper.cpp goes on with a null buffer where this allocation fails.
        enough_memory(on_gpu, facts.expected_mb, || format!("model {name}"))?;
        let mut parameters = WhisperContextParameters::default();
        parameters.use_gpu(on_gpu).gpu_device(0).flash_attn(false);
        let context = WhisperContext::new_with_params(path, parameters).map_err(|_| EngineError::Model {
            name: name.to_owned(),
            why: format!("whisper.cpp refused {}: its tensors are not those of a Whisper model", path.display()),
        })?;
        let info = RecognizerInfo {
            engine: "whisper_cpp".to_owned(),
            model: name.to_owned(),
            device,
            multilingual: context.is_multilingual(),
        };
        Ok(Self { context: Arc::new(context), info, threads: threads.max(1), on_gpu, state_mb: facts.state_mb })
    }

    pub fn info(&self) -> &RecognizerInfo {
        &self.info
    }

    pub fn is_on_gpu(&self) -> bool {
        self.on_gpu
    }

    /// One more decode state on these weights.
    pub fn state(&self) -> Result<WhisperRecognizer, EngineError> {
        enough_memory(self.on_gpu, self.state_mb, || format!("a decode state of {}", self.info.model))?;
        let state = self
            .context
            .create_state()
            .map_err(|e| EngineError::OutOfMemory(format!("decode state of {}: {e}", self.info.model)))?;
        Ok(WhisperRecognizer { model: self.clone(), state, parameters: HashMap::new() })
    }
}

/// Where models really will run: `cpu`, or `cuda:<name>` where a GPU is asked for, compiled in and there. whisper.cpp would
/// go on with the CPU in silence.
pub fn device(use_gpu: bool) -> String {
    use_gpu.then(gpu_name).flatten().map_or_else(|| "cpu".to_owned(), |name| format!("cuda:{name}"))
}

#[cfg(feature = "cuda")]
fn gpu_name() -> Option<String> {
    use whisper_rs::whisper_rs_sys as sys;
    // SAFETY: a device of the registry lives as long as the process, and so does its description.
    unsafe {
        let device = sys::ggml_backend_dev_by_type(sys::ggml_backend_dev_type_GGML_BACKEND_DEVICE_TYPE_GPU);
        if device.is_null() {
            return None;
        }
        let name = sys::ggml_backend_dev_description(device);
        (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu_name() -> Option<String> {
    None
}

/// MB of the GPU that this process leaves to others.
static RESERVE_MB: AtomicU64 = AtomicU64::new(0);

/// Said once, before the first model is loaded.
pub fn leave_free(reserve_mb: u64) {
    RESERVE_MB.store(reserve_mb, Ordering::Relaxed);
}

/// Refuses what cannot fit, before an allocation fails: on a device that aborts the process, on the host the kernel picks a
/// victim. Where the free memory is not known, everything fits.
pub(super) fn enough_memory(on_gpu: bool, needed_mb: u64, what: impl Fn() -> String) -> Result<(), EngineError> {
    let reserve_mb = reserve_mb(on_gpu);
    match if on_gpu { free_device_mb() } else { free_memory_mb() } {
        Some(free_mb) => fits(needed_mb, free_mb, reserve_mb, what),
        None => Ok(()),
    }
}

fn reserve_mb(on_gpu: bool) -> u64 {
    if on_gpu { RESERVE_MB.load(Ordering::Relaxed) } else { 0 }
}

/// MB that may still be taken, what others are left not counted; none where the system does not tell.
#[cfg(feature = "ct2-engine")]
pub(super) fn free_mb(on_gpu: bool) -> Option<u64> {
    let free_mb = if on_gpu { free_device_mb() } else { free_memory_mb() };
    free_mb.map(|free_mb| free_mb.saturating_sub(reserve_mb(on_gpu)))
}

fn fits(needed_mb: u64, free_mb: u64, reserve_mb: u64, what: impl Fn() -> String) -> Result<(), EngineError> {
    if needed_mb <= free_mb.saturating_sub(reserve_mb) {
        return Ok(());
    }
    let left = if reserve_mb == 0 { String::new() } else { format!(", {reserve_mb} MB of them are left to others") };
    Err(EngineError::OutOfMemory(format!("{} needs about {needed_mb} MB, {free_mb} MB are free{left}", what())))
}

#[cfg(feature = "cuda")]
pub(super) fn free_device_mb() -> Option<u64> {
    use whisper_rs::whisper_rs_sys as sys;
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: a device of the registry lives as long as the process; it writes two numbers.
    unsafe {
        let device = sys::ggml_backend_dev_by_type(sys::ggml_backend_dev_type_GGML_BACKEND_DEVICE_TYPE_GPU);
        if device.is_null() {
            return None;
        }
        sys::ggml_backend_dev_memory(device, &mut free, &mut total);
    }
    (total > 0).then_some(free as u64 >> 20)
}

#[cfg(not(feature = "cuda"))]
pub(super) fn free_device_mb() -> Option<u64> {
    None
}

/// What the host and its container leave, in MB.
fn free_memory_mb() -> Option<u64> {
    diarize::free_mb()
}

/// One decode state on the shared weights.
pub struct WhisperRecognizer {
    model: WhisperModel,
    state: WhisperState,
    /// Parameters by language: whisper-rs leaks the language's name each time it is set, so it is set once.
    parameters: HashMap<String, FullParams<'static, 'static>>,
}

impl Recognizer for WhisperRecognizer {
    fn info(&self) -> &RecognizerInfo {
        &self.model.info
    }

    fn decode(&mut self, batch: &[Window]) -> Vec<Result<Hypothesis, EngineError>> {
        batch.iter().map(|window| self.decode_one(window)).collect()
    }
}

impl WhisperRecognizer {
    fn decode_one(&mut self, window: &Window) -> Result<Hypothesis, EngineError> {
        if window.cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        if window.samples.is_empty() {
            return Ok(Hypothesis { language: window.language.clone(), ..Hypothesis::default() });
        }
        let full = match window.purpose {
            Purpose::Final => return self.pass(window, 0),
            Purpose::Partial => Context::PARTIAL.positions(window.samples.len()),
        };
        let heard = self.pass(window, full)?;
        let judged = guards::judge(&heard);
        if judged.guards.is_empty() && !judged.hypothesis.segments.is_empty() {
            return Ok(heard);
        }
        self.pass(window, 0)
    }

    /// One pass; `audio_ctx` 0 = the full context.
    fn pass(&mut self, window: &Window, audio_ctx: usize) -> Result<Hypothesis, EngineError> {
        let language = self.language(window)?;
        let tokens = self.prompt_tokens(&window.prompt)?;
        let finals = window.purpose == Purpose::Final;
        // Shortening the lifetime of a copy is what lets it hold this window's tokens.
        let mut parameters: FullParams<'_, '_> = self.parameters(&language).clone();
        parameters.set_translate(window.task == Task::Translate);
        parameters.set_token_timestamps(finals);
        parameters.set_audio_ctx(audio_ctx as i32);
        parameters.set_tokens(&tokens);
        let cancel: *const Cancel = &window.cancel;
        // SAFETY: the flag outlives the call below, which is the only one that looks at it, through a shared reference.
        unsafe {
            parameters.set_abort_callback(Some(is_cancelled));
            parameters.set_abort_callback_user_data(cancel.cast_mut().cast());
        }
        let padded;
        let samples = if window.samples.len() < MIN_SAMPLES {
            padded = [&window.samples[..], &vec![0.0; MIN_SAMPLES - window.samples.len()]].concat();
            &padded
        } else {
            &window.samples
        };
        let decoded = self.state.full(parameters, samples);
        if window.cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        decoded.map_err(|e| decode_error(&e))?;
        self.hypothesis(window, &language)
    }

    fn language(&self, window: &Window) -> Result<String, EngineError> {
        let info = &self.model.info;
        match (&window.language, info.multilingual) {
            (None, true) => Ok("auto".to_owned()),
            (None, false) => Ok("en".to_owned()),
            (Some(language), true) if whisper_rs::get_lang_id(language).is_some() => Ok(language.clone()),
            (Some(language), false) if language == "en" => Ok("en".to_owned()),
            (Some(language), _) => {
                Err(EngineError::Unsupported(format!("model {} does not know language {language}", info.model)))
            }
        }
        .and_then(|language| match (window.task, info.multilingual) {
            (Task::Translate, false) => {
                Err(EngineError::Unsupported(format!("model {} is English only and cannot translate", info.model)))
            }
            _ => Ok(language),
        })
    }

    /// The last tokens of the prompt, as many as Whisper looks at.
    fn prompt_tokens(&self, prompt: &str) -> Result<Vec<i32>, EngineError> {
        let prompt = prompt.trim();
        if prompt.is_empty() {
            return Ok(Vec::new());
        }
        // A token is at least one byte, and the text's leading space may become one of its own.
        let tokens = self
            .model
            .context
            .tokenize(&format!(" {prompt}"), prompt.len() + 2)
            .map_err(|e| EngineError::Decode(format!("prompt: {e}")))?;
        let skip = tokens.len().saturating_sub(MAX_PROMPT_TOKENS);
        Ok(tokens[skip..].to_vec())
    }

    fn parameters(&mut self, language: &str) -> &FullParams<'static, 'static> {
        let threads = self.model.threads;
        self.parameters.entry(language.to_owned()).or_insert_with(|| {
            let mut p = FullParams::new(SamplingStrategy::Greedy { best_of: 1 });
            p.set_n_threads(i32::try_from(threads).unwrap_or(1));
            // None = detect; names not known to whisper.cpp were refused before.
            p.set_language(whisper_rs::get_lang_id(language).and_then(whisper_rs::get_lang_str));
            p.set_no_context(true);
            p.set_suppress_blank(true);
            p.set_temperature(0.0);
            p.set_temperature_inc(0.0);
            // Our guards judge and say so; whisper.cpp would drop text in silence.
            p.set_no_speech_thold(2.0);
            p.set_print_special(false);
            p.set_print_progress(false);
            p.set_print_realtime(false);
            p.set_print_timestamps(false);
            p
        })
    }

    fn hypothesis(&self, window: &Window, language: &str) -> Result<Hypothesis, EngineError> {
        let window_ms = window.samples.len() as u64 * 1_000 / 16_000;
        let finals = window.purpose == Purpose::Final;
        let language = match language {
            "auto" => whisper_rs::get_lang_str(self.state.full_lang_id_from_state()).unwrap_or("en").to_owned(),
            named => named.to_owned(),
        };
        let spaced = !UNSPACED.contains(&language.as_str());
        let end_of_text = self.model.context.token_eot();
        let mut segments = Vec::new();
        for segment in self.state.as_iter() {
            let tokens = tokens_of(&segment, end_of_text)?;
            let (start_ms, end_ms) = (ms(segment.start_timestamp(), window_ms), ms(segment.end_timestamp(), window_ms));
            let start_ms = start_ms.min(end_ms);
            let scores = Scores::of(&tokens);
            segments.push(HeardSegment {
                start_ms,
                end_ms,
                text: segment.to_str_lossy().map_err(|e| decode_error(&e))?.trim().to_owned(),
                words: if finals { words_of(&tokens, spaced, start_ms..end_ms) } else { Vec::new() },
                confidence: scores.confidence,
                no_speech_probability: segment.no_speech_probability(),
                mean_log_probability: scores.mean_log_probability,
            });
        }
        let word_timing = finals.then_some(WordTiming::TokenEstimate);
        Ok(Hypothesis { segments, language: Some(language), word_timing })
    }
}

/// Languages written without spaces: each token that ends on a whole character is a word there.
pub(super) const UNSPACED: [&str; 6] = ["zh", "ja", "th", "lo", "my", "yue"];

/// One text token.
pub(super) struct Token {
    pub(super) bytes: Vec<u8>,
    pub(super) probability: f32,
    pub(super) log_probability: f32,
    /// In ms, not yet clamped; none before whisper.cpp has worked it out.
    pub(super) start_ms: i64,
    pub(super) end_ms: i64,
}

/// A segment's text tokens; timestamps and other specials are left out.
fn tokens_of(segment: &WhisperSegment<'_>, end_of_text: i32) -> Result<Vec<Token>, EngineError> {
    let mut tokens = Vec::new();
    for n in 0..segment.n_tokens() {
        let Some(token) = segment.get_token(n).filter(|t| t.token_id() < end_of_text) else {
            continue;
        };
        let data = token.token_data();
        tokens.push(Token {
            bytes: token.to_bytes().map_err(|e| decode_error(&e))?.to_vec(),
            probability: data.p,
            log_probability: data.plog,
            start_ms: data.t0 * MS_PER_TICK,
            end_ms: data.t1 * MS_PER_TICK,
        });
    }
    Ok(tokens)
}

struct Scores {
    confidence: f32,
    mean_log_probability: f32,
}

impl Scores {
    fn of(tokens: &[Token]) -> Self {
        let count = tokens.len().max(1) as f32;
        Self {
            confidence: (tokens.iter().map(|t| t.probability).sum::<f32>() / count).clamp(0.0, 1.0),
            mean_log_probability: tokens.iter().map(|t| t.log_probability).sum::<f32>() / count,
        }
    }
}

/// Joins tokens to words: a leading space begins a new one. Times stay in order and within the segment.
pub(super) fn words_of(tokens: &[Token], spaced: bool, segment_ms: std::ops::Range<u64>) -> Vec<HeardWord> {
    let mut groups: Vec<Vec<&Token>> = Vec::new();
    let mut bytes_so_far: Vec<u8> = Vec::new();
    for token in tokens {
        let whole = std::str::from_utf8(&bytes_so_far).is_ok();
        let begins = token.bytes.starts_with(b" ") || (!spaced && whole);
        if begins || groups.is_empty() {
            groups.push(Vec::new());
            bytes_so_far.clear();
        }
        bytes_so_far.extend_from_slice(&token.bytes);
        if let Some(group) = groups.last_mut() {
            group.push(token);
        }
    }
    let clamp = |ms: i64| u64::try_from(ms).unwrap_or(0).clamp(segment_ms.start, segment_ms.end);
    let mut earliest = segment_ms.start;
    let mut words = Vec::with_capacity(groups.len());
    for group in groups {
        let bytes = group.iter().flat_map(|t| t.bytes.iter().copied()).collect::<Vec<u8>>();
        let text = String::from_utf8_lossy(&bytes).trim().to_owned();
        let (Some(first), Some(last)) = (group.first(), group.last()) else {
            continue;
        };
        if text.is_empty() {
            continue;
        }
        let start_ms = clamp(first.start_ms).max(earliest);
        let end_ms = clamp(last.end_ms).max(start_ms);
        earliest = end_ms;
        let confidence = group.iter().map(|t| t.probability).sum::<f32>() / group.len() as f32;
        words.push(HeardWord { text, start_ms, end_ms, confidence: confidence.clamp(0.0, 1.0) });
    }
    words
}

/// Ticks as ms within the window; whisper.cpp reports nonsense far below zero for silence.
fn ms(ticks: i64, window_ms: u64) -> u64 {
    u64::try_from(ticks.saturating_mul(MS_PER_TICK)).unwrap_or(0).min(window_ms)
}

fn decode_error(error: &WhisperError) -> EngineError {
    EngineError::Decode(error.to_string())
}

/// Asked by whisper.cpp between the steps of its graphs.
unsafe extern "C" fn is_cancelled(flag: *mut c_void) -> bool {
    // SAFETY: set to a live `Cancel` for the length of one decode.
    unsafe { flag.cast::<Cancel>().as_ref() }.is_some_and(Cancel::is_cancelled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &[u8], start_ms: i64, end_ms: i64) -> Token {
        Token { bytes: text.to_vec(), probability: 0.5, log_probability: -0.7, start_ms, end_ms }
    }

    #[test]
    fn the_reserve_is_left_to_others() {
        let fits = |needed, free, reserve| fits(needed, free, reserve, || "model small".to_owned());
        for (needed, free, reserve, enough) in
            [(900, 1_000, 0, true), (900, 1_000, 100, true), (900, 1_000, 101, false), (1, 1_000, 2_000, false)]
        {
            assert_eq!(fits(needed, free, reserve).is_ok(), enough, "{needed} {free} {reserve}");
        }
        let refused = fits(900, 1_000, 800).expect_err("too little").to_string();
        assert!(refused.contains("900 MB") && refused.contains("1000 MB") && refused.contains("800 MB"), "{refused}");
        let refused = fits(900, 100, 0).expect_err("too little").to_string();
        assert!(!refused.contains("others"), "{refused}");
    }

    #[test]
    fn tokens_become_words() {
        let tokens =
            [token(b" good", 100, 300), token(b" morn", 300, 500), token(b"ing", 500, 700), token(b".", 700, 720)];
        let words = words_of(&tokens, true, 0..700);
        let seen: Vec<(&str, u64, u64)> = words.iter().map(|w| (w.text.as_str(), w.start_ms, w.end_ms)).collect();
        assert_eq!(seen, [("good", 100, 300), ("morning.", 300, 700)]);
    }

    #[test]
    fn word_times_stay_in_order_and_inside() {
        let tokens = [token(b" a", -50, 400), token(b" b", 300, 250), token(b" c", 5_000, 6_000), token(b" ", 0, 0)];
        let words = words_of(&tokens, true, 20..1_000);
        let seen: Vec<(u64, u64)> = words.iter().map(|w| (w.start_ms, w.end_ms)).collect();
        assert_eq!(seen, [(20, 400), (400, 400), (1_000, 1_000)]);
    }

    #[test]
    fn characters_cut_between_tokens_are_joined() {
        let text = "东京".as_bytes();
        let tokens = [token(&text[..2], 0, 10), token(&text[2..3], 10, 20), token(&text[3..], 20, 30)];
        let words = words_of(&tokens, false, 0..100);
        assert_eq!(words.iter().map(|w| w.text.as_str()).collect::<Vec<_>>(), ["东", "京"]);
    }

    #[test]
    fn nonsense_times_are_clamped() {
        assert_eq!(ms(-100_726, 5_000), 0);
        assert_eq!(ms(150, 5_000), 1_500);
        assert_eq!(ms(3_000, 5_000), 5_000);
    }
}
