//! A test call: its audio and what was really said.

use std::{path::Path, time::Instant};

use bytes::Bytes;
use voxfleet_eval::{Edits, text::compare};
use voxfleet_schema::{
    audio::{ASR_END, ASR_FORMAT, AudioFormat, RawEntry},
    session::SessionOptions,
    transcript::join_text,
};
use voxfleet_worker::{
    WorkerConfig,
    engine::{
        EngineError,
        direct::transcribe_log,
        pool::{Devices, Model},
        vad::best_available,
    },
    ipc::{EngineConfig, StartPoint},
};

use crate::sound;

const CHUNK_MS: usize = 200;

pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) format: AudioFormat,
    pub(crate) pcm: Bytes,
    /// One line a turn.
    pub(crate) lines: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("{path}")]
    Audio { path: String, source: sound::SoundError },
    #[error("{path}")]
    Reference { path: String, source: std::io::Error },
}

impl Call {
    /// `call-<name>.flac` and `call-<name>.txt` of `dir`.
    pub(crate) fn load(dir: &Path, name: &str) -> Result<Self, CallError> {
        let name = format!("call-{name}");
        let audio = dir.join(format!("{name}.flac"));
        let (format, pcm) = sound::read_file(&audio)
            .map_err(|source| CallError::Audio { path: audio.display().to_string(), source })?;
        let text = dir.join(format!("{name}.txt"));
        let reference = std::fs::read_to_string(&text)
            .map_err(|source| CallError::Reference { path: text.display().to_string(), source })?;
        let lines = reference.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
        Ok(Self { name, format, pcm: pcm.into(), lines })
    }

    pub(crate) fn reference(&self) -> String {
        self.lines.join(" ")
    }

    /// Position of a byte of the audio, in ms.
    pub(crate) fn ms_of(&self, byte: usize) -> u64 {
        (byte / self.format.frame_bytes()) as u64 * 1000 / u64::from(self.format.rate_hz)
    }

    /// The call as it stands in the log when it has been streamed.
    fn log(&self) -> Vec<RawEntry> {
        let format = (ASR_FORMAT.to_owned(), self.format.to_string());
        let chunk = self.chunk_bytes();
        let mut log: Vec<RawEntry> = (0..self.pcm.len())
            .step_by(chunk)
            .map(|from| self.pcm.slice(from..(from + chunk).min(self.pcm.len())))
            .zip(1..)
            .map(|(payload, seq)| RawEntry { seq, headers: vec![format.clone()], payload })
            .collect();
        let end = vec![format, (ASR_END.to_owned(), "1".to_owned())];
        log.push(RawEntry { seq: log.len() as u64 + 1, headers: end, payload: Bytes::new() });
        log
    }

    pub(crate) fn chunk_bytes(&self) -> usize {
        (self.format.rate_hz as usize * CHUNK_MS / 1000).max(1) * self.format.frame_bytes()
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.ms_of(self.pcm.len()) as f64 / 1000.0
    }
}

/// The same engine called directly on the whole call.
pub(crate) struct Offline {
    pub(crate) errors: Edits,
    /// From the first sample to the last final, the model being loaded.
    pub(crate) seconds: f64,
    /// Whether the fleet said the same, to the letter.
    pub(crate) text: String,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OfflineError {
    #[error("no model in {0}")]
    NoModel(String),
    #[error("the engine, called directly")]
    Engine(#[from] EngineError),
}

/// Blocks as long as the decoding takes. One thread and one state, as each worker of the demo has.
pub(crate) fn offline(call: &Call, worker: &WorkerConfig) -> Result<Offline, OfflineError> {
    let files = worker.model_files();
    let Some(model) = files.first() else {
        let dir = worker.models_dir.clone().unwrap_or_default();
        return Err(OfflineError::NoModel(dir.display().to_string()));
    };
    let engine = EngineConfig {
        engine: worker.engine,
        ct2: worker.ct2(),
        decode_states: 1,
        decode_threads: 1,
        ..EngineConfig::default()
    };
    let mut state = Model::load(&engine, model, &mut Devices::default())?.state()?;
    let detector = best_available(worker.resolved_silero().as_deref(), worker.resolved_onnxruntime().as_deref()).0;
    let log = call.log();
    let begun = Instant::now();
    let finals = transcribe_log(
        &log,
        &SessionOptions::default(),
        StartPoint::beginning(),
        &mut *state,
        detector.as_ref(),
        None,
    )?;
    let seconds = begun.elapsed().as_secs_f64();
    let text = join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str())));
    Ok(Offline { errors: compare(&call.reference(), &text), seconds, text })
}
