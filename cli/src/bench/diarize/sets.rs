//! Recordings whose speakers are known.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use voxfleet_diarize::RATE_HZ;
use voxfleet_eval::{Turn, rttm, wder::Spoken};
use voxfleet_harness::find;
use voxfleet_schema::audio::{ASR_END, ASR_FORMAT, AudioFormat, Encoding, RawEntry};
use voxfleet_worker::engine::resample::To16k;

use crate::{demo::speakers::reference, sound};

pub(super) struct Recording {
    pub(super) name: String,
    format: AudioFormat,
    pcm: Bytes,
    pub(super) turns: Vec<Turn>,
    /// What was said and by whom; empty where only turns are known.
    pub(super) words: Vec<Spoken>,
}

impl Recording {
    fn read(path: &Path, turns: Vec<Turn>) -> Result<Self> {
        let (format, pcm) = sound::read_file(path).with_context(|| path.display().to_string())?;
        let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
        Ok(Self { name, format, pcm: pcm.into(), turns, words: Vec::new() })
    }

    pub(super) fn seconds(&self) -> f64 {
        (self.pcm.len() / self.format.frame_bytes()) as f64 / f64::from(self.format.rate_hz)
    }

    /// One channel at 16 kHz.
    pub(super) fn at_16k(&self) -> Result<Vec<f32>> {
        let value: fn(&[u8]) -> f32 = match self.format.encoding {
            Encoding::PcmS16Le => |b| f32::from(i16::from_le_bytes([b[0], b[1]])) / 32_768.0,
            Encoding::PcmF32Le => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        };
        let channels = usize::from(self.format.channels).max(1);
        let frames = self.pcm.chunks_exact(self.format.frame_bytes());
        let mono: Vec<f32> = frames
            .map(|frame| frame.chunks_exact(frame.len() / channels).map(value).sum::<f32>() / channels as f32)
            .collect();
        let mut resampler = To16k::new(self.format.rate_hz)?;
        let mut samples = Vec::new();
        resampler.push(&mono, &mut samples);
        resampler.flush(mono.len() as u64 * u64::from(RATE_HZ) / u64::from(self.format.rate_hz), &mut samples);
        Ok(samples)
    }

    pub(super) fn speakers(&self) -> usize {
        self.turns.iter().map(|turn| turn.speaker.as_str()).collect::<std::collections::BTreeSet<_>>().len()
    }

    /// Of these samples at 16 kHz.
    #[cfg(test)]
    pub(super) fn of(samples: Vec<i16>, turns: Vec<Turn>) -> Self {
        let pcm = samples.iter().flat_map(|sample| sample.to_le_bytes()).collect::<Vec<u8>>().into();
        Self { name: "made".to_owned(), format: AudioFormat::default(), pcm, turns, words: Vec::new() }
    }

    /// As it stands in a session's log when it has been streamed in chunks of 200 ms.
    pub(super) fn log(&self) -> Vec<RawEntry> {
        let format = (ASR_FORMAT.to_owned(), self.format.to_string());
        let chunk = self.format.rate_hz as usize / 5 * self.format.frame_bytes();
        let pieces =
            (0..self.pcm.len()).step_by(chunk).map(|from| self.pcm.slice(from..(from + chunk).min(self.pcm.len())));
        let mut log: Vec<RawEntry> =
            pieces.zip(1..).map(|(payload, seq)| RawEntry { seq, headers: vec![format.clone()], payload }).collect();
        let end = vec![format, (ASR_END.to_owned(), "1".to_owned())];
        log.push(RawEntry { seq: log.len() as u64 + 1, headers: end, payload: Bytes::new() });
        log
    }
}

/// Folder of the public test data.
pub(super) fn data() -> PathBuf {
    std::env::var_os("VOXFLEET_TEST_DATA").map_or_else(|| find::root().join("../shared/data"), PathBuf::from)
}

/// The calls that the project made itself, with their words. In 03 one turn is spoken over another.
pub(super) fn synthetic() -> Result<Vec<Recording>> {
    let folder = find::root().join("tests/audio");
    (1..=5)
        .map(|number| {
            let name = format!("call-{number:02}");
            let turns = turns_of(&folder.join(format!("{name}.rttm")))?.remove(&name).unwrap_or_default();
            let mut call = Recording::read(&folder.join(format!("{name}.flac")), turns)?;
            call.words = reference(&folder.join(format!("{name}.json")))?;
            Ok(call)
        })
        .collect()
}

/// pyannote's own sample: two speakers, 30 s.
pub(super) fn sample() -> Result<Vec<Recording>> {
    let folder = data().join("diarization/pyannote");
    let turns = turns_of(&folder.join("sample.rttm"))?.into_values().next().unwrap_or_default();
    Ok(vec![Recording::read(&folder.join("sample.wav"), turns)?])
}

/// Ten clips of far-field meetings, 30 s each.
pub(super) fn ami30() -> Result<Vec<Recording>> {
    let folder = data().join("diarization/ami30");
    let turns = turns_of(&folder.join("reference.rttm"))?;
    turns.into_iter().map(|(name, turns)| Recording::read(&folder.join(format!("{name}.wav")), turns)).collect()
}

/// Turns by recording.
fn turns_of(path: &Path) -> Result<BTreeMap<String, Vec<Turn>>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut turns: BTreeMap<String, Vec<Turn>> = BTreeMap::new();
    for entry in rttm::parse(&text).with_context(|| path.display().to_string())? {
        turns.entry(entry.file).or_default().push(entry.turn);
    }
    Ok(turns)
}

/// Digits in a turn, and their pauses and those between turns, in s.
const DIGITS: std::ops::RangeInclusive<u64> = 4..=8;
const WITHIN_S: f64 = 0.08;
const BETWEEN_S: f64 = 0.6;
const DIGIT_TURNS: usize = 24;

/// People who say digits, one after another: their takes put together to turns, always in the same way.
pub(super) fn digits() -> Result<Vec<Recording>> {
    let folder = data().join("digits");
    let mut takes: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if let [_, speaker, _] = stem.split('_').collect::<Vec<_>>()[..] {
            takes.entry(speaker.to_owned()).or_default().push(path);
        }
    }
    takes.values_mut().for_each(|paths| paths.sort());
    let names: Vec<&String> = takes.keys().collect();
    anyhow::ensure!(names.len() > 1, "{} has no digits of several people", folder.display());
    let mut dice = 0x2545_f491_4f6c_dd1d_u64;
    let mut roll = |sides: u64| {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        dice % sides
    };
    let (mut pcm, mut turns, mut format): (Vec<u8>, Vec<Turn>, Option<AudioFormat>) = Default::default();
    let mut who = 0;
    for _ in 0..DIGIT_TURNS {
        // Somebody else than before.
        who = (who + 1 + roll(names.len() as u64 - 1) as usize) % names.len();
        let mut span: Option<(f64, f64)> = None;
        for _ in 0..DIGITS.start() + roll(DIGITS.end() - DIGITS.start() + 1) {
            let of = &takes[names[who]];
            let path = &of[roll(of.len() as u64) as usize];
            let (take, sound) = sound::read_file(path).with_context(|| path.display().to_string())?;
            anyhow::ensure!(*format.get_or_insert(take) == take, "{} has another format", path.display());
            let second = take.rate_hz as usize * take.frame_bytes();
            let seconds = |bytes: usize| bytes as f64 / second as f64;
            let start = seconds(pcm.len());
            pcm.extend_from_slice(&sound);
            span = Some((span.map_or(start, |(first, _)| first), seconds(pcm.len())));
            pcm.resize(pcm.len() + (WITHIN_S * f64::from(take.rate_hz)) as usize * take.frame_bytes(), 0);
        }
        if let (Some((start_s, end_s)), Some(format)) = (span, format) {
            turns.push(Turn { start_s, end_s, speaker: names[who].clone() });
            pcm.resize(pcm.len() + (BETWEEN_S * f64::from(format.rate_hz)) as usize * format.frame_bytes(), 0);
        }
    }
    let format = format.context("no digits")?;
    Ok(vec![Recording { name: "digits".to_owned(), format, pcm: pcm.into(), turns, words: Vec::new() }])
}
