//! What supervisor and engine child say to each other over their socketpair, never stdout.
//!
//! Frames are a `u32` length (little endian) and that many bytes of MessagePack with named fields. Audio is [`Bytes`]
//! inside a struct, never inside a tagged enum (that costs 13 ms for 10 s of PCM, a struct 8 us).
//!
//! Every answer carries the `handle` it was computed for; handles are never used twice, so text of a session that was
//! closed, or rebuilt from another worker's final, can not reach its successor.

pub mod transport;

use serde::{Deserialize, Serialize};

pub use crate::engine::{
    ct2::Ct2Config,
    diarize::{DiarizeConfig, Heard},
};
use voxfleet_schema::{
    audio::RawEntry,
    event::What,
    failure::Failure,
    fleet::ModelState,
    session::SessionOptions,
    transcript::{AudioRange, Checkpoint, Final, Lost, Resume, Segment, Speakers, SpeakersBy, Timings, Turn, VadKind},
};

/// Bytes each log entry counts beside its payload while the engine keeps it: its place in the queue, its share of the
/// producers' state and the allocation of its audio. Without it, entries of a few bytes would cost far more than they pay.
pub const ENTRY_COST: u64 = 256;

/// Where a session starts: at its beginning, or behind a final.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartPoint {
    /// None = at the first entry of the log.
    pub after: Option<Box<AfterFinal>>,
    /// Log entries are gone: the session goes on at `after.to_sample` with the first entry above `after.to_seq`, and the next
    /// final says so if `lost` is set.
    #[serde(default)]
    pub expired: bool,
    #[serde(default)]
    pub lost: Option<Lost>,
    /// Of the last final; default when there is none.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// It was named by the final and could not be found.
    #[serde(default)]
    pub checkpoint_missing: bool,
    /// Finals before it whose speakers nobody has told: what is heard of them comes as [`ToEngine::Heard`].
    #[serde(default)]
    pub late: Vec<u64>,
    /// Another worker was at work on it, or there is a final already: somebody may be waiting for its next words.
    #[serde(default)]
    pub taken_over: bool,
}

/// What of the last final decides how to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AfterFinal {
    pub index: u64,
    pub to_sample: u64,
    pub to_seq: u64,
    pub end: bool,
    pub resume: Resume,
    /// What it said of its speakers.
    #[serde(default)]
    pub speakers: Option<Speakers>,
}

impl From<&Final> for AfterFinal {
    fn from(f: &Final) -> Self {
        Self {
            index: f.index,
            to_sample: f.to_sample,
            to_seq: f.audio.to_seq,
            end: f.end,
            resume: f.resume.clone(),
            speakers: f.speakers.clone(),
        }
    }
}

impl StartPoint {
    pub fn beginning() -> Self {
        Self {
            after: None,
            expired: false,
            lost: None,
            checkpoint: Checkpoint::default(),
            checkpoint_missing: false,
            late: Vec::new(),
            taken_over: false,
        }
    }

    /// First log sequence to feed.
    pub fn first_seq(&self) -> u64 {
        match &self.after {
            None => 1,
            Some(after) if self.expired => after.to_seq + 1,
            Some(after) => after.resume.seq,
        }
    }
}

/// First frame to the child: everything it needs to know. It reads no configuration and no environment of its own.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct EngineConfig {
    pub engine: EngineKind,
    /// Model file of each model name that may be asked for.
    pub models: Vec<ModelFile>,
    pub default_model: String,
    /// Silero's ONNX file; none = the energy-based detector.
    pub silero_model: Option<std::path::PathBuf>,
    /// ONNX Runtime's shared library.
    pub onnxruntime: Option<std::path::PathBuf>,
    /// Decode states and threads of each; states x threads never exceed the cores.
    pub decode_states: usize,
    pub decode_threads: usize,
    pub use_gpu: bool,
    /// Memory of the device that is left free, in MB.
    #[serde(default)]
    pub reserve_mb: u64,
    /// Decode only while holding a lock that a neighbour may take too.
    #[serde(default)]
    pub turns: Option<TurnsConfig>,
    #[serde(default)]
    pub diarize: DiarizeConfig,
    #[serde(default)]
    pub ct2: Ct2Config,
    pub simulated: SimulatedConfig,
}

/// Turns on the device, by `flock(2)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TurnsConfig {
    pub lock_file: std::path::PathBuf,
    pub hold_ms: u64,
    pub gap_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    #[default]
    WhisperCpp,
    /// CTranslate2: windows of different sessions as one batch.
    Ct2,
    /// By the model: CTranslate2 for its folders where this build has it, whisper.cpp for ggml files.
    Auto,
    Simulated,
}

impl EngineKind {
    /// As finals and heartbeats name it.
    pub fn as_str(self) -> &'static str {
        match self {
            EngineKind::WhisperCpp => "whisper_cpp",
            EngineKind::Ct2 => "ct2",
            EngineKind::Auto => "auto",
            EngineKind::Simulated => "simulated",
        }
    }

    /// It computes: it needs model files, cores and memory.
    pub fn is_real(self) -> bool {
        self != EngineKind::Simulated
    }

    /// What a heartbeat says of a model beside the worker's engine: which it is where that differs by model.
    pub fn told_of(self, file: &ModelFile) -> Option<String> {
        (self == EngineKind::Auto).then(|| self.of_model(file).as_str().to_owned())
    }

    /// Which engine takes a model; never `Auto`.
    pub fn of_model(self, file: &ModelFile) -> EngineKind {
        match self {
            EngineKind::Auto if file.path.is_dir() => EngineKind::Ct2,
            EngineKind::Auto => EngineKind::WhisperCpp,
            named => named,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFile {
    pub name: String,
    pub path: std::path::PathBuf,
}

/// How the simulated engine behaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SimulatedConfig {
    /// Audio seconds decoded per second; 0 = no delay at all.
    pub speed: f64,
    /// Memory it really allocates for weights and for each state, in MB.
    pub weights_mb: u64,
    pub state_mb: u64,
    /// Every n-th decode fails; 0 = never.
    pub fail_every: u64,
    /// The process aborts at the n-th decode, as whisper.cpp does when CUDA runs out of memory; 0 = never.
    pub abort_at: u64,
    /// Decodes after the n-th never return; 0 = never.
    pub hang_at: u64,
    pub load_ms: u64,
    /// A folder that plays a card of so many MB: allocations are files there, so that two processes share it and a test can
    /// fill it, take it away or make it fail. Without one there is memory enough.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card: Option<std::path::PathBuf>,
    /// What a process takes on the card before any model, in MB.
    pub context_mb: u64,
    /// Weights by model name, in MB; `weights_mb` for the others.
    pub sizes: std::collections::BTreeMap<String, u64>,
    /// The process aborts at each window with so many samples at the very top (32,767) in a row: an input that is poison
    /// wherever it goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poison: Option<u32>,
    /// The same, but the decode never returns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poison_hang: Option<u32>,
    /// The process aborts when the voice detector is shown so many of them in one frame of 512.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poison_vad: Option<u32>,
    /// Who speaks is known this much later than it is heard; with any engine.
    pub listen_ms: u64,
}

impl Default for SimulatedConfig {
    fn default() -> Self {
        Self {
            speed: 20.0,
            weights_mb: 0,
            state_mb: 0,
            fail_every: 0,
            abort_at: 0,
            hang_at: 0,
            load_ms: 0,
            card: None,
            context_mb: 0,
            sizes: Default::default(),
            poison: None,
            poison_hang: None,
            poison_vad: None,
            listen_ms: 0,
        }
    }
}

/// Supervisor -> child.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToEngine {
    Configure(Box<EngineConfig>),
    /// Load a model before its first use.
    Load {
        model: String,
    },
    /// Give a model's memory back, once nobody here uses it.
    Unload {
        model: String,
    },
    Open {
        handle: u64,
        options: Box<SessionOptions>,
        start: Box<StartPoint>,
        /// Live sessions come first.
        #[serde(default)]
        background: bool,
        #[serde(default)]
        suspect: Option<Suspect>,
        /// Nothing is decoded: its finals say where a recording is cut, and how much speech there is.
        #[serde(default)]
        scout: bool,
        /// Of a scout: the speakers of its first final are listened to, and nothing else is said of it.
        #[serde(default)]
        hears: bool,
    },
    /// Say `Pong`.
    Ping {
        n: u64,
    },
    Entry(EntryFor),
    /// What was heard of the speakers of a final that was late when the session came here.
    Heard {
        handle: u64,
        heard: Box<HeardOf>,
    },
    /// Nothing more is fed: finish a final already begun and say so, begin no other.
    Finish {
        handle: u64,
    },
    /// Forget it; running decodes of it are cancelled.
    Close {
        handle: u64,
    },
}

/// An input that may have killed the engine before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Suspect {
    /// Nothing else is decoded beside it until a final has gone beyond this sample, and it gets no partials.
    pub beyond: u64,
    /// How often it killed the engine alone: those with fewer come first.
    pub crashes: u32,
    /// The stretch that begins at `beyond` is not decoded; its final says this.
    pub park: Option<Failure>,
    /// Nor is its audio looked at: it ends where a long silence would. Then it is to be opened again.
    #[serde(default)]
    pub blind: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EntryFor {
    pub handle: u64,
    pub entry: RawEntry,
}

/// What was heard of a final.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeardOf {
    pub index: u64,
    /// As they stand in the chain; none where it is not there any more.
    pub segments: Option<Vec<Segment>>,
    pub heard: Result<Heard, String>,
}

/// What was heard in the first stretch of a stream that listens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeardIn {
    pub from_sample: u64,
    pub to_sample: u64,
    pub heard: Result<Heard, String>,
}

/// Child -> supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromEngine {
    /// It is up; nothing is loaded yet.
    Ready {
        vad: VadKind,
        speakers: SpeakersBy,
        device: String,
        engine: String,
        notes: Vec<String>,
    },
    Models(Vec<ModelState>),
    /// A model has been loaded.
    Loaded {
        model: String,
        took_ms: u64,
        resident_mb: u64,
    },
    /// Bytes of audio that are no longer kept for this session: their permits are free.
    Consumed {
        handle: u64,
        bytes: u64,
    },
    /// Worth an event.
    Note {
        handle: u64,
        note: StreamNote,
    },
    Partial {
        handle: u64,
        partial: Box<PartialDraft>,
    },
    Final {
        handle: u64,
        draft: Box<FinalDraft>,
    },
    /// The speakers of an earlier final; it goes into the chain behind the finals that were sent before.
    Revision {
        handle: u64,
        revision: Box<RevisionDraft>,
    },
    /// All that a scout that listens says.
    Heard {
        handle: u64,
        heard: Box<HeardIn>,
    },
    /// A window of the stretch that begins at this sample goes to a decode thread. Said before it does, so that whoever
    /// finds the child dead knows what it was doing.
    Began {
        handle: u64,
        at: u64,
    },
    /// It came back.
    Over {
        handle: u64,
    },
    /// The loop looks at new audio of this one, and no longer at the one before: voice activity, resampling. `at`: where its
    /// present stretch begins.
    Stepping {
        handle: u64,
        at: u64,
    },
    /// It looks at nobody's.
    Stepped,
    /// Answer to `Ping`, and a sign of life in long stretches of work.
    Pong {
        n: u64,
    },
    /// Answer to `Finish`: what had begun is said.
    Finished {
        handle: u64,
    },
    /// The session cannot go on here (model missing, options the model cannot follow).
    Failed {
        handle: u64,
        failure: Failure,
    },
    /// Sent each 200 ms while there is work and it moves: decodes finished, audio heard, time that took. A decode that failed
    /// or was cancelled is only finished: it says nothing about speed.
    Progress {
        decodes: u64,
        audio_ms: u64,
        busy_ms: u64,
        working: bool,
        /// For how long a neighbour has kept the device from us; 0 while it does not.
        neighbour_ms: u64,
    },
    /// A stretch of a live session has its final: how much was heard in it, and the part of the pool's time that all its
    /// decodes took.
    Lived {
        model: String,
        audio_ms: u64,
        pool_ms: f64,
    },
}

/// Something about a log entry that its sender should know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamNote {
    pub what: What,
    pub seq: u64,
    pub failure: Option<Failure>,
    pub detail: String,
}

/// A partial as the engine knows it; the supervisor adds names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartialDraft {
    pub from_sample: u64,
    pub to_sample: u64,
    pub committed: String,
    pub tentative: String,
    /// Handed to the engine minus decoded.
    pub lag_ms: u64,
}

/// Segments with their speakers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Told {
    pub segments: Vec<Segment>,
    pub turns: Vec<Turn>,
    pub speakers: Option<Speakers>,
}

/// What replaces that of an earlier final.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RevisionDraft {
    /// Of the final.
    pub index: u64,
    pub segments: Vec<Segment>,
    pub turns: Vec<Turn>,
    pub speakers: Option<Speakers>,
}

/// A final as the engine knows it; the supervisor adds names, index, ids and the checkpoint's sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FinalDraft {
    pub from_sample: u64,
    pub to_sample: u64,
    pub audio: AudioRange,
    pub resume: Resume,
    pub segments: Vec<Segment>,
    pub turns: Vec<Turn>,
    pub speakers: Option<Speakers>,
    pub speech_final: bool,
    pub end: bool,
    pub lost: Option<Lost>,
    pub error: Option<Failure>,
    /// Its audio was set aside undecoded; `error` says why.
    #[serde(default)]
    pub parked: bool,
    /// A scout's: the voices in it, where its words are decoded elsewhere and speakers are asked for.
    #[serde(default)]
    pub heard: Option<Result<Heard, String>>,
    pub guards: Vec<String>,
    pub checkpoint_missing: bool,
    /// To be written before the final; none when nothing goes beyond it.
    pub checkpoint: Option<Checkpoint>,
    pub model: String,
    pub device: String,
    pub engine: String,
    pub vad: VadKind,
    pub timings: Timings,
}
