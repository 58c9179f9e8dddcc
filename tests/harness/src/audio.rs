//! Audio for tests: files as 16-bit samples, and sounds that are made.

use std::path::Path;

use symphonia::core::{
    codecs::audio::AudioDecoderOptions,
    formats::{FormatOptions, TrackType, probe::Hint},
    io::MediaSourceStream,
    meta::MetadataOptions,
};

use crate::{Error, Result, dice::Dice, find};

/// Interleaved 16-bit samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pcm {
    pub rate_hz: u32,
    pub channels: usize,
    pub samples: Vec<i16>,
}

impl Pcm {
    pub fn mono_16k(samples: Vec<i16>) -> Self {
        Self { rate_hz: 16_000, channels: 1, samples }
    }

    pub fn seconds(&self) -> f64 {
        self.samples.len() as f64 / self.channels as f64 / f64::from(self.rate_hz)
    }

    /// `pcm_s16le` bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.samples.iter().flat_map(|s| s.to_le_bytes()).collect()
    }

    /// As a wav file.
    pub fn wav(&self) -> Vec<u8> {
        let data = self.bytes();
        let frame = self.channels as u32 * 2;
        let mut file = Vec::with_capacity(44 + data.len());
        file.extend_from_slice(b"RIFF");
        file.extend_from_slice(&(36 + data.len() as u32).to_le_bytes());
        file.extend_from_slice(b"WAVEfmt ");
        file.extend_from_slice(&16u32.to_le_bytes());
        file.extend_from_slice(&1u16.to_le_bytes());
        file.extend_from_slice(&(self.channels as u16).to_le_bytes());
        file.extend_from_slice(&self.rate_hz.to_le_bytes());
        file.extend_from_slice(&(self.rate_hz * frame).to_le_bytes());
        file.extend_from_slice(&(frame as u16).to_le_bytes());
        file.extend_from_slice(&16u16.to_le_bytes());
        file.extend_from_slice(b"data");
        file.extend_from_slice(&(data.len() as u32).to_le_bytes());
        file.extend_from_slice(&data);
        file
    }

    /// Bytes of `ms` milliseconds, whole frames.
    pub fn chunk_bytes(&self, ms: u64) -> usize {
        let frames = u64::from(self.rate_hz) * ms / 1_000;
        usize::try_from(frames).unwrap_or(usize::MAX).max(1) * self.channels * 2
    }
}

/// Reads a flac or wav file.
pub fn read(path: &Path) -> Result<Pcm> {
    let wrong = |e: symphonia::core::errors::Error| Error::Wrong(format!("{}: {e}", path.display()));
    let absent = || Error::Wrong(format!("{}: no audio track", path.display()));
    let file = std::fs::File::open(path).map_err(Error::io(path.display().to_string()))?;
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let (formats, metadata) = (FormatOptions::default(), MetadataOptions::default());
    let probe = symphonia::default::get_probe();
    let mut reader = probe.probe(&Hint::new(), stream, formats, metadata).map_err(wrong)?;
    let track = reader.default_track(TrackType::Audio).ok_or_else(absent)?;
    let track_id = track.id;
    let codec = track.codec_params.as_ref().and_then(|p| p.audio()).ok_or_else(absent)?;
    let codecs = symphonia::default::get_codecs();
    let mut decoder = codecs.make_audio_decoder(codec, &AudioDecoderOptions::default()).map_err(wrong)?;
    let mut pcm = Pcm { rate_hz: 0, channels: 0, samples: Vec::new() };
    let mut piece: Vec<i16> = Vec::new();
    while let Some(packet) = reader.next_packet().map_err(wrong)? {
        if packet.track_id != track_id {
            continue;
        }
        let decoded = decoder.decode(&packet).map_err(wrong)?;
        pcm.rate_hz = decoded.spec().rate();
        pcm.channels = decoded.num_planes();
        piece.resize(decoded.samples_interleaved(), 0);
        decoded.copy_to_slice_interleaved(&mut piece);
        pcm.samples.extend_from_slice(&piece);
    }
    Ok(pcm)
}

/// Test call `n`: mono, 16 kHz.
pub fn call(n: u32) -> Result<Pcm> {
    read(&find::root().join(format!("tests/audio/call-{n:02}.flac")))
}

/// What is said in test call `n`.
pub fn call_text(n: u32) -> Result<String> {
    let path = find::root().join(format!("tests/audio/call-{n:02}.txt"));
    std::fs::read_to_string(&path).map_err(Error::io(path.display().to_string()))
}

/// Half a second to three seconds of noise that swells as syllables do, then 0.7 to 1.5 s of near silence, until
/// `seconds` are full. The same seed gives the same samples.
pub fn bursts(seed: u64, seconds: f64) -> Pcm {
    const RATE: f64 = 16_000.0;
    let mut dice = Dice::new(seed);
    let wanted = (seconds * RATE) as usize;
    let mut samples = Vec::with_capacity(wanted);
    while samples.len() < wanted {
        let speech = (RATE * (0.5 + 2.5 * dice.unit())) as usize;
        let pause = (RATE * (0.7 + 0.8 * dice.unit())) as usize;
        let syllable = RATE * (0.15 + 0.1 * dice.unit());
        for n in 0..speech {
            let swell = 0.35 + 0.65 * (std::f64::consts::PI * n as f64 / syllable).sin().abs();
            samples.push(((dice.unit() - 0.5) * 24_000.0 * swell) as i16);
        }
        samples.extend((0..pause).map(|_| ((dice.unit() - 0.5) * 8.0) as i16));
    }
    samples.truncate(wanted);
    Pcm::mono_16k(samples)
}

/// Half a second to three seconds of even noise, then 0.7 to 1.5 s of near silence, until `seconds` are full. So loud that a
/// detector hears all of it, wherever it begins to listen: one that adapts takes the valleys of [`bursts`] for pauses where
/// it has heard nothing quieter.
pub fn blasts(seed: u64, seconds: f64) -> Pcm {
    let mut dice = Dice::new(seed ^ 0xb1a5);
    let wanted = (seconds * 16_000.0) as usize;
    let mut samples = Vec::with_capacity(wanted);
    while samples.len() < wanted {
        let (noise, pause) = (dice.between(0.5, 3.0), dice.between(0.7, 1.5));
        samples.extend((0..(noise * 16_000.0) as usize).map(|_| dice.between(-20_000.0, 20_000.0) as i16));
        samples.extend((0..(pause * 16_000.0) as usize).map(|_| dice.between(-4.0, 4.0) as i16));
    }
    samples.truncate(wanted);
    Pcm::mono_16k(samples)
}

pub fn silence(seconds: f64) -> Pcm {
    Pcm::mono_16k(vec![0; (seconds * 16_000.0) as usize])
}

/// Word error rate: edit distance over words, by the number of reference words.
pub fn word_error_rate(reference: &str, heard: &str) -> f64 {
    let (reference, heard) = (words(reference), words(heard));
    let mut row: Vec<usize> = (0..=heard.len()).collect();
    for (i, r) in reference.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, h) in heard.iter().enumerate() {
            let substituted = diagonal + usize::from(r != h);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[heard.len()] as f64 / reference.len().max(1) as f64
}

fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '\'')).filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_reads_as_long_as_its_description_says() {
        let pcm = call(1).expect("call 1");
        assert_eq!((pcm.rate_hz, pcm.channels), (16_000, 1));
        assert!((pcm.seconds() - 33.579).abs() < 0.01, "{}", pcm.seconds());
        assert!(call_text(1).expect("text").starts_with("good morning"));
    }

    #[test]
    fn bursts_are_the_same_each_time_and_not_all_noise() {
        let pcm = bursts(7, 20.0);
        assert_eq!(pcm, bursts(7, 20.0));
        assert_ne!(pcm, bursts(8, 20.0));
        let quiet = pcm.samples.chunks(512).filter(|f| f.iter().all(|s| s.abs() < 100)).count();
        assert!(quiet > 50, "{quiet}");
    }

    #[test]
    fn word_errors_count() {
        assert_eq!(word_error_rate("a b c d", "A, b. c d"), 0.0);
        assert_eq!(word_error_rate("a b c d", "a x c"), 0.5);
        assert_eq!(word_error_rate("a b", "a b c"), 0.5);
    }
}
