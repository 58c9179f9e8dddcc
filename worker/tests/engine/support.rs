//! What the engine's tests share: audio, logs, recognizers, detectors.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use bytes::Bytes;
use symphonia::core::{
    codecs::audio::AudioDecoderOptions,
    formats::{FormatOptions, TrackType, probe::Hint},
    io::MediaSourceStream,
    meta::MetadataOptions,
};
#[cfg(feature = "ct2-engine")]
use voxfleet_ggml::folder::{Precision, convert};
use voxfleet_schema::{audio::RawEntry, session::SessionOptions, transcript::join_text};
#[cfg(feature = "ct2-engine")]
use voxfleet_worker::{
    engine::ct2::{Ct2Device, Ct2Model},
    ipc::Ct2Config,
};
use voxfleet_worker::{
    engine::{
        EngineError, Hypothesis, Purpose, Recognizer, RecognizerInfo, Window,
        direct::transcribe_log,
        pool::Model,
        simulated::SimulatedModel,
        vad::{Energy, VadFactory, best_available},
        whisper::WhisperModel,
    },
    ipc::{AfterFinal, FinalDraft, SimulatedConfig, StartPoint},
};

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub(crate) fn micro_model() -> PathBuf {
    root().join("tests/models/micro.en-q8_0.bin")
}

/// Interleaved 16-bit samples of a file under `tests/audio`.
pub(crate) fn audio(name: &str) -> Vec<i16> {
    let file = std::fs::File::open(root().join("tests/audio").join(name)).expect(name);
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let mut reader = symphonia::default::get_probe()
        .probe(&Hint::new(), stream, FormatOptions::default(), MetadataOptions::default())
        .expect("probe");
    let codec = reader.default_track(TrackType::Audio).and_then(|t| t.codec_params.as_ref()?.audio().cloned());
    let mut decoder = symphonia::default::get_codecs()
        .make_audio_decoder(&codec.expect("audio track"), &AudioDecoderOptions::default())
        .expect("decoder");
    let (mut samples, mut piece) = (Vec::new(), Vec::new());
    while let Some(packet) = reader.next_packet().expect("packet") {
        decoder.decode(&packet).expect("decode").copy_to_vec_interleaved::<i16>(&mut piece);
        samples.extend_from_slice(&piece);
    }
    samples
}

pub(crate) fn call(number: u32) -> Vec<i16> {
    audio(&format!("call-{number:02}.flac"))
}

/// The first seconds of a call: enough where whisper.cpp has to decode everything anew.
pub(crate) fn first_seconds(number: u32, seconds: usize) -> Vec<i16> {
    let mut samples = call(number);
    samples.truncate(seconds * 16_000);
    samples
}

pub(crate) fn reference(number: u32) -> String {
    std::fs::read_to_string(root().join(format!("tests/audio/call-{number:02}.txt"))).expect("reference")
}

pub(crate) fn bytes_s16(samples: &[i16]) -> Vec<u8> {
    samples.iter().flat_map(|s| s.to_le_bytes()).collect()
}

pub(crate) fn bytes_f32(samples: &[f32]) -> Vec<u8> {
    samples.iter().flat_map(|s| s.to_le_bytes()).collect()
}

/// A log: audio cut into chunks of `chunk` bytes, the format on the first, then an end entry. Sequences have gaps, as in
/// a stream that many sessions share.
pub(crate) fn log_of(audio: &[u8], format: &str, chunk: usize) -> Vec<RawEntry> {
    let mut log: Vec<RawEntry> =
        audio.chunks(chunk).map(|piece| entry(&[], Bytes::copy_from_slice(piece))).chain([end()]).collect();
    log[0].headers.push(("Asr-Format".to_owned(), format.to_owned()));
    number(&mut log);
    log
}

/// 16 kHz mono s16 in chunks of `ms` milliseconds.
pub(crate) fn log_16k(samples: &[i16], ms: usize) -> Vec<RawEntry> {
    log_of(&bytes_s16(samples), "pcm_s16le;rate=16000;channels=1", ms * 32)
}

/// Gives the entries stream sequences: 3, 6, 9, ...
pub(crate) fn number(log: &mut [RawEntry]) {
    log.iter_mut().zip(1u64..).for_each(|(entry, n)| entry.seq = 3 * n);
}

pub(crate) fn entry(headers: &[(&str, &str)], payload: Bytes) -> RawEntry {
    let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    RawEntry { seq: 0, headers, payload }
}

pub(crate) fn end() -> RawEntry {
    entry(&[("Asr-End", "1")], Bytes::new())
}

pub(crate) fn flush() -> RawEntry {
    entry(&[("Asr-Flush", "1")], Bytes::new())
}

/// All that was said.
pub(crate) fn text(finals: &[FinalDraft]) -> String {
    join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str())))
}

/// Finals without what the clock on the wall decides.
pub(crate) fn timeless(finals: &[FinalDraft]) -> Vec<FinalDraft> {
    let mut finals = finals.to_vec();
    for f in &mut finals {
        (f.timings.queued_ms, f.timings.decode_ms, f.timings.diarize_ms) = (0, 0, 0);
    }
    finals
}

/// Where a session goes on after final `index`.
pub(crate) fn after(finals: &[FinalDraft], index: usize) -> StartPoint {
    let last = &finals[index];
    StartPoint {
        after: Some(Box::new(AfterFinal {
            index: index as u64,
            to_sample: last.to_sample,
            to_seq: last.audio.to_seq,
            end: last.end,
            resume: last.resume.clone(),
            speakers: last.speakers.clone(),
        })),
        checkpoint: last.checkpoint.clone().unwrap_or_default(),
        ..StartPoint::beginning()
    }
}

pub(crate) fn simulated() -> Model {
    let config = SimulatedConfig { speed: 0.0, ..SimulatedConfig::default() };
    Model::Simulated(SimulatedModel::load("simulated", &config).expect("simulated"))
}

/// The micro model, loaded once for all tests of a binary.
pub(crate) fn whisper() -> Model {
    static MODEL: OnceLock<WhisperModel> = OnceLock::new();
    let load = || WhisperModel::load("micro.en", &micro_model(), false, 1).expect("micro model");
    Model::Whisper(MODEL.get_or_init(load).clone())
}

/// The micro model in CTranslate2, in float32 unless told otherwise.
#[cfg(feature = "ct2-engine")]
pub(crate) fn ct2(config: &Ct2Config) -> Model {
    static FOLDER: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, dir) = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("folder");
        let dir = folder.path().join("micro.en");
        convert(&micro_model(), &dir, Precision::Float32, &mut |_, _| true).expect("converted");
        (folder, dir)
    });
    Model::Ct2(
        Ct2Model::load("micro.en", dir, config, 1, false, &Ct2Device::start().expect("thread")).expect("micro model"),
    )
}

/// By energy always, and Silero where it is installed.
pub(crate) fn detectors() -> Vec<Arc<dyn VadFactory>> {
    let mut all: Vec<Arc<dyn VadFactory>> = vec![Arc::new(Energy)];
    match silero() {
        Ok(silero) => all.push(silero),
        Err(why) => println!("skipped: everything with Silero, {why}"),
    }
    all
}

/// Where bootstrap puts things.
fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("VOXFLEET_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("voxfleet")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/voxfleet")))
        .unwrap_or_default()
}

/// ONNX Runtime, or why it cannot be had here.
pub(crate) fn onnxruntime() -> Result<PathBuf, String> {
    let set = std::env::var_os("ORT_DYLIB_PATH").filter(|v| !v.is_empty()).map(PathBuf::from);
    let library = set.unwrap_or_else(|| cache().join("lib/libonnxruntime.so"));
    if library.is_file() { Ok(library) } else { Err(format!("{} is not there", library.display())) }
}

/// Silero, or why it cannot be had here.
pub(crate) fn silero() -> Result<Arc<dyn VadFactory>, String> {
    let library = onnxruntime()?;
    let (factory, note) = best_available(Some(&cache().join("models/silero_vad.onnx")), Some(&library));
    note.map_or(Ok(factory), Err)
}

/// Everything that decides what is heard: engine and model, samples, place, prompt, language, and whether it is a final.
type Key = (String, Vec<u32>, u64, String, Option<String>, bool);

/// Remembers what was heard in which window, for all tests of a binary. Running a log again then costs only windows that
/// are new; that the same window always gives the same text has a test of its own.
pub(crate) struct Remembering {
    inner: Box<dyn Recognizer>,
    /// Windows that it had to decode.
    pub(crate) decodes: usize,
}

impl Remembering {
    pub(crate) fn new(model: &Model) -> Self {
        Self { inner: model.state().expect("state"), decodes: 0 }
    }

    fn recall(&mut self, window: &Window) -> Result<Hypothesis, EngineError> {
        static HEARD: Mutex<Option<HashMap<Key, Hypothesis>>> = Mutex::new(None);
        let bits = window.samples.iter().map(|s| s.to_bits()).collect();
        let finals = window.purpose == Purpose::Final;
        let model = format!("{} {}", self.inner.info().engine, self.inner.info().model);
        let key = (model, bits, window.from_sample, window.prompt.clone(), window.language.clone(), finals);
        if let Some(heard) = HEARD.lock().expect("lock").get_or_insert_default().get(&key) {
            return Ok(heard.clone());
        }
        self.decodes += 1;
        let heard = self.inner.decode(std::slice::from_ref(window)).pop().expect("one answer per window")?;
        HEARD.lock().expect("lock").get_or_insert_default().insert(key, heard.clone());
        Ok(heard)
    }
}

impl Recognizer for Remembering {
    fn info(&self) -> &RecognizerInfo {
        self.inner.info()
    }

    fn decode(&mut self, batch: &[Window]) -> Vec<Result<Hypothesis, EngineError>> {
        batch.iter().map(|window| self.recall(window)).collect()
    }
}

/// All finals of a log from its beginning.
pub(crate) fn finals(log: &[RawEntry], recognizer: &mut dyn Recognizer, vads: &dyn VadFactory) -> Vec<FinalDraft> {
    finals_with(log, &SessionOptions::default(), StartPoint::beginning(), recognizer, vads)
}

pub(crate) fn finals_with(
    log: &[RawEntry],
    options: &SessionOptions,
    start: StartPoint,
    recognizer: &mut dyn Recognizer,
    vads: &dyn VadFactory,
) -> Vec<FinalDraft> {
    transcribe_log(log, options, start, recognizer, vads, None).expect("transcribe")
}

/// No gap, no overlap, from 0 to the end, and one end final at the end.
pub(crate) fn assert_chain(finals: &[FinalDraft], samples: u64) {
    let mut at = 0;
    for f in finals {
        assert_eq!(f.from_sample, at, "a final begins where the one before ended");
        assert!(f.to_sample >= f.from_sample);
        at = f.to_sample;
    }
    assert_eq!(at, samples, "everything is covered");
    let ends: Vec<bool> = finals.iter().map(|f| f.end).collect();
    assert!(ends.iter().rev().skip(1).all(|e| !e) && ends.last() == Some(&true), "{ends:?}");
}

/// Word errors and reference words.
pub(crate) fn word_errors(reference: &str, heard: &str) -> (usize, usize) {
    let reference: Vec<&str> = reference.split_whitespace().collect();
    let heard: Vec<&str> = heard.split_whitespace().collect();
    let mut row: Vec<usize> = (0..=heard.len()).collect();
    for (i, r) in reference.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, h) in heard.iter().enumerate() {
            let cost = (diagonal + usize::from(r != h)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], cost);
        }
    }
    (row[heard.len()], reference.len())
}

/// Resident memory of this process in MB.
pub(crate) fn resident_mb() -> u64 {
    voxfleet_worker::engine::pool::resident_mb()
}

pub(crate) fn as_f32(samples: &[i16]) -> Vec<f32> {
    samples.iter().map(|s| f32::from(*s) / 32_768.0).collect()
}
