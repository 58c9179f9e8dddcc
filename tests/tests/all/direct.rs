//! The engine called directly on a log: no NATS, no processes. What a fleet says must be the same, to the letter.

use std::path::PathBuf;

use anyhow::Result;
use bytes::Bytes;
use voxfleet_harness::{audio::Pcm, find, fleet};
use voxfleet_schema::{audio::RawEntry, session::SessionOptions, transcript::join_text};
use voxfleet_worker::{
    engine::{
        Recognizer,
        direct::transcribe_log,
        simulated::SimulatedModel,
        vad::{self, VadFactory},
        whisper::WhisperModel,
    },
    ipc::{FinalDraft, SimulatedConfig, StartPoint},
};

/// Name of the small test model: its file's stem.
pub(crate) const MICRO: &str = "micro.en-q8_0";

/// A simulated engine that takes no time.
pub(crate) fn simulated() -> Result<Box<dyn Recognizer>> {
    let config = SimulatedConfig { speed: 0.0, ..SimulatedConfig::default() };
    Ok(Box::new(SimulatedModel::load("simulated", &config)?.state()?))
}

pub(crate) fn micro() -> Result<Box<dyn Recognizer>> {
    let path = fleet::models_dir().join(format!("{MICRO}.bin"));
    Ok(Box::new(WhisperModel::load(MICRO, &path, false, 1)?.state()?))
}

/// The detector that a worker with this cache uses.
pub(crate) fn best_vad() -> std::sync::Arc<dyn VadFactory> {
    let file = |path: PathBuf| path.is_file().then_some(path);
    let silero = file(find::cache().join("models/silero_vad.onnx"));
    let library = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from).and_then(file);
    let library = library.or_else(|| file(find::cache().join("lib/libonnxruntime.so")));
    vad::best_available(silero.as_deref(), library.as_deref()).0
}

pub(crate) fn energy_vad() -> std::sync::Arc<dyn VadFactory> {
    std::sync::Arc::new(vad::Energy)
}

/// A log with `pcm` in chunks of `chunk_ms` and an end.
pub(crate) fn log(pcm: &Pcm, chunk_ms: u64) -> Vec<RawEntry> {
    let bytes = Bytes::from(pcm.bytes());
    let size = pcm.chunk_bytes(chunk_ms);
    let mut entries: Vec<RawEntry> = (0..bytes.len())
        .step_by(size)
        .map(|from| bytes.slice(from..(from + size).min(bytes.len())))
        .enumerate()
        .map(|(n, payload)| RawEntry { seq: n as u64 + 1, headers: Vec::new(), payload })
        .collect();
    let end = vec![("Asr-End".to_owned(), "1".to_owned())];
    entries.push(RawEntry { seq: entries.len() as u64 + 1, headers: end, payload: Bytes::new() });
    entries
}

/// All finals of a log.
pub(crate) fn transcribe(
    recognizer: &mut dyn Recognizer,
    vad: &dyn VadFactory,
    options: &SessionOptions,
    log: &[RawEntry],
) -> Result<Vec<FinalDraft>> {
    Ok(transcribe_log(log, options, StartPoint::beginning(), recognizer, vad, None)?)
}

pub(crate) fn text(finals: &[FinalDraft]) -> String {
    join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str())))
}

/// What the simulated engine makes of `pcm`.
pub(crate) fn simulated_text(pcm: &Pcm) -> Result<String> {
    Ok(text(&simulated_finals(pcm)?))
}

/// The same, final by final.
pub(crate) fn simulated_finals(pcm: &Pcm) -> Result<Vec<FinalDraft>> {
    transcribe(&mut *simulated()?, &*energy_vad(), &SessionOptions::default(), &log(pcm, 200))
}
