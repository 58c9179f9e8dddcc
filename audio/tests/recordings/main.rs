//! Recordings of every kind, good and bad, through the decoder.

mod formats;
mod hostile;

use std::{io::Write as _, path::PathBuf};

use voxfleet_audio::{AudioError, Decoder, Limits};
use voxfleet_schema::audio::{AudioFormat, Encoding};

/// What came out of a recording.
#[derive(Debug, PartialEq)]
pub(crate) struct Decoded {
    pub(crate) format: AudioFormat,
    pub(crate) formats: Vec<AudioFormat>,
    pub(crate) chunk_bytes: Vec<usize>,
    pub(crate) pcm: Vec<u8>,
    pub(crate) total_ms: Option<u64>,
    pub(crate) truncated: bool,
    pub(crate) damaged: u64,
}

impl Decoded {
    pub(crate) fn seconds(&self) -> f64 {
        (self.pcm.len() / self.format.frame_bytes()) as f64 / f64::from(self.format.rate_hz)
    }

    /// First channel.
    pub(crate) fn samples(&self) -> Vec<f32> {
        let frames = self.pcm.chunks_exact(self.format.frame_bytes());
        match self.format.encoding {
            Encoding::PcmS16Le => frames.map(|f| f32::from(i16::from_le_bytes([f[0], f[1]])) / 32_768.0).collect(),
            Encoding::PcmF32Le => frames.map(|f| f32::from_le_bytes([f[0], f[1], f[2], f[3]])).collect(),
        }
    }
}

pub(crate) fn limits() -> Limits {
    Limits { max_seconds: 3_600, ..Limits::default() }
}

pub(crate) fn file(bytes: &[u8]) -> std::fs::File {
    let mut file = tempfile::tempfile().expect("temporary file");
    file.write_all(bytes).expect("written");
    file
}

pub(crate) fn drain(mut decoder: Decoder) -> Result<Decoded, AudioError> {
    let (format, mut formats, mut chunk_bytes, mut pcm) = (decoder.format(), Vec::new(), Vec::new(), Vec::new());
    while let Some(chunk) = decoder.next()? {
        formats.extend(chunk.format);
        chunk_bytes.push(chunk.pcm.len());
        pcm.extend_from_slice(&chunk.pcm);
    }
    assert_eq!(decoder.next().expect("still the end"), None);
    let (total_ms, truncated, damaged) = (decoder.total_ms(), decoder.truncated(), decoder.damaged());
    Ok(Decoded { format, formats, chunk_bytes, pcm, total_ms, truncated, damaged })
}

pub(crate) fn decode_named(bytes: &[u8], name: &str) -> Result<Decoded, AudioError> {
    Decoder::open(file(bytes), Some(name), &limits()).and_then(drain)
}

pub(crate) fn decode(bytes: &[u8]) -> Result<Decoded, AudioError> {
    decode_named(bytes, "recording")
}

pub(crate) fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The call all fixtures are made of, 16 kHz mono flac.
pub(crate) fn call() -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/audio/call-01.flac");
    std::fs::read(path).expect("the test call")
}

/// A wav file of one data chunk; `tag` 1 = integer, 3 = float, 6 = A-law, 7 = mu-law.
pub(crate) fn wav(tag: u16, bits: u16, rate_hz: u32, channels: u16, data: &[u8]) -> Vec<u8> {
    // A header may claim what does not fit.
    let block = channels.wrapping_mul(bits / 8);
    let mut file = b"RIFF".to_vec();
    // The telephone codings have room for an extension, which is empty.
    let extension = if matches!(tag, 6 | 7) { &[0u8; 2][..] } else { &[] };
    file.extend((36 + extension.len() as u32 + data.len() as u32).to_le_bytes());
    file.extend(b"WAVEfmt ");
    file.extend((16 + extension.len() as u32).to_le_bytes());
    file.extend([tag, channels].into_iter().flat_map(u16::to_le_bytes));
    file.extend([rate_hz, rate_hz.wrapping_mul(u32::from(block))].into_iter().flat_map(u32::to_le_bytes));
    file.extend([block, bits].into_iter().flat_map(u16::to_le_bytes));
    file.extend(extension);
    file.extend(b"data");
    file.extend((data.len() as u32).to_le_bytes());
    file.extend(data);
    file
}

/// A tone of 440 Hz at half of full scale.
pub(crate) fn tone(rate_hz: u32, channels: u16, frames: usize) -> Vec<f32> {
    let step = 440.0 * std::f64::consts::TAU / f64::from(rate_hz);
    (0..frames).flat_map(|i| vec![((i as f64 * step).sin() / 2.0) as f32; usize::from(channels)]).collect()
}

pub(crate) fn as_i16(samples: &[f32]) -> Vec<u8> {
    samples.iter().flat_map(|s| ((s * 32_767.0) as i16).to_le_bytes()).collect()
}
