//! The engine: turns a session's log into partials and finals.
//!
//! | module | holds |
//! |---|---|
//! | [`resample`] | any input rate -> 16 kHz, sample-exact |
//! | [`vad`] | voice activity: Silero through ONNX Runtime, or by energy |
//! | [`diarize`] | who speaks: the networks beside each decode thread |
//! | [`onnx`] | how ONNX models are opened |
//! | [`stream`] | log entries -> samples -> VAD -> windows -> finals; pure, boundaries depend on the log alone |
//! | [`whisper`], [`ct2`], [`simulated`] | recognizers: whisper.cpp, CTranslate2, and text made from the samples themselves |
//! | [`models`] | a model file is checked here before the C++ code sees it |
//! | [`guards`] | holds back text that is not speech; pure |
//! | [`pool`], [`child`] | decode-state threads, and the child process around streams and pool |
//! | [`last_words`] | how an engine process that cannot go on says why |
//! | [`direct`] | the same engine called directly on a log, for tests and measurements |
//!
//! [`Recognizer`] and [`Vad`] are the two interfaces that real and simulated engines implement; one conformance suite
//! runs over all of them.

pub mod checksum;
pub mod child;
pub mod ct2;
pub mod diarize;
pub mod direct;
pub mod guards;
pub mod last_words;
pub mod models;
mod onnx;
pub mod pool;
pub mod resample;
pub mod simulated;
pub mod stream;
pub mod vad;
pub mod whisper;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};
use voxfleet_schema::{
    failure::FailureClass,
    session::Task,
    transcript::{VadKind, WordTiming},
};

/// Samples per VAD frame at 16 kHz: 32 ms, what Silero was trained on.
pub const VAD_FRAME: usize = 512;

/// Why an engine could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum EngineError {
    #[error("model {name}: {why}")]
    Model { name: String, why: String },
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    #[error("cancelled")]
    Cancelled,
    #[error("decode failed: {0}")]
    Decode(String),
    #[error("voice activity detection failed: {0}")]
    Vad(String),
    #[error("{0}")]
    Unsupported(String),
}

impl EngineError {
    pub fn class(&self) -> FailureClass {
        match self {
            EngineError::Model { .. } => FailureClass::ModelMissing,
            EngineError::OutOfMemory(_) => FailureClass::OutOfMemory,
            EngineError::Cancelled => FailureClass::Cancelled,
            EngineError::Decode(_) | EngineError::Vad(_) => FailureClass::Internal,
            EngineError::Unsupported(_) => FailureClass::BadRequest,
        }
    }
}

/// Asks a running decode to stop; checked between its steps, so each look is also a sign of life.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<CancelState>);

#[derive(Debug, Default)]
struct CancelState {
    cancelled: AtomicBool,
    looks: AtomicU64,
}

impl Cancel {
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.looks.fetch_add(1, Ordering::Relaxed);
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// The same, without a sign of life.
    pub fn was_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// How often somebody looked: while this grows, the decode moves.
    pub fn looks(&self) -> u64 {
        self.0.looks.load(Ordering::Relaxed)
    }
}

/// What a window is decoded for. Finals get full context and word times; partials only text, as fast as possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Partial,
    Final,
}

/// One window of speech to decode. A decode depends on nothing but this: no history, no generator state.
#[derive(Debug, Clone)]
pub struct Window {
    /// Mono, 16 kHz, -1 to 1.
    pub samples: Vec<f32>,
    /// Where it begins in its session, in samples.
    pub from_sample: u64,
    pub purpose: Purpose,
    /// Hotwords, prompt and carried text, in this order; empty for none.
    pub prompt: String,
    /// None = detect.
    pub language: Option<String>,
    pub task: Task,
    /// Who speaks is to be heard as well.
    pub hearing: Option<Box<diarize::Hearing>>,
    /// Of a recording: live windows go first. Decides when it is decoded, never what is heard.
    pub background: bool,
    pub cancel: Cancel,
}

/// What a recognizer heard in one window. Times are ms from the window's first sample.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Hypothesis {
    pub segments: Vec<HeardSegment>,
    /// The language it was decoded in (given or detected).
    pub language: Option<String>,
    pub word_timing: Option<WordTiming>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeardSegment {
    pub start_ms: u64,
    pub end_ms: u64,
    pub text: String,
    /// Empty for partials.
    pub words: Vec<HeardWord>,
    /// 0 to 1.
    pub confidence: f32,
    pub no_speech_probability: f32,
    /// Mean natural logarithm of its tokens' probabilities.
    pub mean_log_probability: f32,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeardWord {
    pub text: String,
    pub start_ms: u64,
    pub end_ms: u64,
    pub confidence: f32,
}

/// What a recognizer really is, for finals and heartbeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecognizerInfo {
    /// `whisper_cpp`, `ct2` or `simulated`.
    pub engine: String,
    pub model: String,
    /// `cpu` or `cuda:<name>`.
    pub device: String,
    pub multilingual: bool,
}

impl RecognizerInfo {
    /// For finals that needed no recognizer: nothing was said.
    pub fn none() -> Self {
        Self { engine: "none".to_owned(), model: "none".to_owned(), device: "none".to_owned(), multilingual: false }
    }
}

/// A decode state: decodes windows, possibly of different sessions, as one batch. whisper.cpp takes them one by one,
/// CTranslate2 together.
pub trait Recognizer: Send {
    fn info(&self) -> &RecognizerInfo;

    /// One result per window, in order.
    fn decode(&mut self, batch: &[Window]) -> Vec<Result<Hypothesis, EngineError>>;
}

/// Voice activity detection over consecutive frames of one stream.
pub trait Vad: Send {
    fn kind(&self) -> VadKind;

    /// Forgets everything heard.
    fn reset(&mut self);

    /// A new one of the same kind, for another channel of the same session.
    fn another(&self) -> Box<dyn Vad>;

    /// Probability of speech in the next [`VAD_FRAME`] samples, 0 to 1.
    fn speech_probability(&mut self, frame: &[f32; VAD_FRAME]) -> Result<f32, EngineError>;
}
