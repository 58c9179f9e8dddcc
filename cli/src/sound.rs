//! Reads what a producer sends: wav and flac files through symphonia, or raw PCM, as interleaved frames.
//!
//! Blocking; callers run it on a thread of its own. Samples of 16 bits or fewer stay `pcm_s16le`, wider ones become
//! `pcm_f32le`, so nothing is lost on the way in.

use std::{
    fs::File,
    io::{Cursor, Read},
    path::PathBuf,
};

use bytes::{Bytes, BytesMut};
use symphonia::core::{
    codecs::audio::{AudioDecoder, AudioDecoderOptions},
    formats::{FormatOptions, FormatReader, TrackType, probe::Hint},
    io::{MediaSourceStream, ReadOnlySource},
    meta::MetadataOptions,
};
use voxfleet_schema::audio::{AudioFormat, Encoding, MAX_CHANNELS, RATES_HZ, sniff_container};

/// Bytes that tell what a file is.
const HEAD_BYTES: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    Stdin,
    File(PathBuf),
}

impl From<&str> for Input {
    fn from(text: &str) -> Self {
        if text == "-" { Input::Stdin } else { Input::File(text.into()) }
    }
}

impl std::fmt::Display for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Input::Stdin => f.write_str("standard input"),
            Input::File(path) => write!(f, "{}", path.display()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SoundError {
    #[error("cannot read")]
    Read(#[from] std::io::Error),
    #[error("this is {0}; wav, flac and raw PCM can be streamed")]
    Container(&'static str),
    #[error("cannot decode")]
    Decode(#[from] symphonia::core::errors::Error),
    #[error("the file has no audio track")]
    NoTrack,
    #[error("{rate_hz} Hz with {channels} channels is outside what a session takes")]
    OutOfRange { rate_hz: u32, channels: usize },
    #[error("the format changes inside the file")]
    FormatChange,
}

/// Audio being read, from its current position.
pub(crate) struct Sound {
    format: AudioFormat,
    /// Length where the file says it.
    total_frames: Option<u64>,
    /// Decoded and not yet handed out.
    pending: BytesMut,
    reader: Reader,
}

enum Reader {
    Raw(Box<dyn Read + Send>),
    Decoded { track: u32, demuxer: Box<dyn FormatReader>, decoder: Box<dyn AudioDecoder> },
    Done,
}

impl Sound {
    /// `raw` takes the input as PCM of that format, whatever it looks like.
    pub(crate) fn open(input: &Input, raw: Option<AudioFormat>) -> Result<Self, SoundError> {
        match input {
            Input::Stdin => Self::read(std::io::stdin(), None, raw),
            Input::File(path) => {
                let file = File::open(path)?;
                let length = file.metadata().ok().filter(|m| m.is_file()).map(|m| m.len());
                Self::read(file, length, raw)
            }
        }
    }

    fn read(
        mut from: impl Read + Send + Sync + 'static,
        length: Option<u64>,
        raw: Option<AudioFormat>,
    ) -> Result<Self, SoundError> {
        let mut head = Vec::new();
        from.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head)?;
        let container = if raw.is_some() { None } else { sniff_container(&head) };
        let whole = Cursor::new(head).chain(from);
        match container {
            Some("flac" | "a wav file") => Self::decoded(whole),
            Some(other) => Err(SoundError::Container(other)),
            None => {
                let format = raw.unwrap_or_default();
                let total_frames = length.map(|l| l / format.frame_bytes() as u64);
                Ok(Self { format, total_frames, pending: BytesMut::new(), reader: Reader::Raw(Box::new(whole)) })
            }
        }
    }

    fn decoded(from: impl Read + Send + Sync + 'static) -> Result<Self, SoundError> {
        let stream = MediaSourceStream::new(Box::new(ReadOnlySource::new(from)), Default::default());
        let demuxer = symphonia::default::get_probe().probe(
            &Hint::new(),
            stream,
            FormatOptions::default(),
            MetadataOptions::default(),
        )?;
        let track = demuxer.default_track(TrackType::Audio).ok_or(SoundError::NoTrack)?;
        let parameters = track.codec_params.as_ref().and_then(|p| p.audio()).ok_or(SoundError::NoTrack)?;
        let rate_hz = parameters.sample_rate.unwrap_or(0);
        let channels = parameters.channels.as_ref().map_or(0, |c| c.count());
        let narrow = parameters.bits_per_sample.is_some_and(|bits| bits <= 16);
        let (Some(track_channels), true) =
            (u16::try_from(channels).ok().filter(|c| (1..=MAX_CHANNELS).contains(c)), RATES_HZ.contains(&rate_hz))
        else {
            return Err(SoundError::OutOfRange { rate_hz, channels });
        };
        let format = AudioFormat {
            encoding: if narrow { Encoding::PcmS16Le } else { Encoding::PcmF32Le },
            rate_hz,
            channels: track_channels,
        };
        let decoder =
            symphonia::default::get_codecs().make_audio_decoder(parameters, &AudioDecoderOptions::default())?;
        let (id, total_frames) = (track.id, track.num_frames);
        let reader = Reader::Decoded { track: id, demuxer, decoder };
        Ok(Self { format, total_frames, pending: BytesMut::new(), reader })
    }

    pub(crate) fn format(&self) -> AudioFormat {
        self.format
    }

    pub(crate) fn total_ms(&self) -> Option<u64> {
        self.total_frames.map(|frames| frames * 1000 / u64::from(self.format.rate_hz))
    }

    /// The next `frames` frames, fewer at the end, none after it. Bytes of an unfinished last frame are left out.
    pub(crate) fn next(&mut self, frames: usize) -> Result<Option<Bytes>, SoundError> {
        let wanted = frames.max(1) * self.format.frame_bytes();
        while self.pending.len() < wanted && self.fill(wanted)? {}
        let whole = self.pending.len().min(wanted) / self.format.frame_bytes() * self.format.frame_bytes();
        Ok((whole > 0).then(|| self.pending.split_to(whole).freeze()))
    }

    /// Reads some more; false at the end.
    fn fill(&mut self, wanted: usize) -> Result<bool, SoundError> {
        match &mut self.reader {
            Reader::Done => Ok(false),
            Reader::Raw(from) => {
                let missing = wanted - self.pending.len();
                let mut part = vec![0; missing];
                let read = from.read(&mut part)?;
                self.pending.extend_from_slice(&part[..read]);
                if read == 0 {
                    self.reader = Reader::Done;
                }
                Ok(read > 0)
            }
            Reader::Decoded { track, demuxer, decoder } => {
                let Some(packet) = demuxer.next_packet()? else {
                    self.reader = Reader::Done;
                    return Ok(false);
                };
                if packet.track_id != *track {
                    return Ok(true);
                }
                let decoded = decoder.decode(&packet)?;
                let spec = decoded.spec();
                if (spec.rate(), spec.channels().count()) != (self.format.rate_hz, usize::from(self.format.channels)) {
                    return Err(SoundError::FormatChange);
                }
                match self.format.encoding {
                    Encoding::PcmS16Le => {
                        let mut samples: Vec<i16> = Vec::new();
                        decoded.copy_to_vec_interleaved(&mut samples);
                        self.pending.extend(samples.into_iter().flat_map(i16::to_le_bytes));
                    }
                    Encoding::PcmF32Le => {
                        let mut samples: Vec<f32> = Vec::new();
                        decoded.copy_to_vec_interleaved(&mut samples);
                        self.pending.extend(samples.into_iter().flat_map(f32::to_le_bytes));
                    }
                }
                Ok(true)
            }
        }
    }

    /// Everything that is left; for short files.
    #[cfg(any(test, feature = "bench"))]
    pub(crate) fn rest(&mut self) -> Result<Vec<u8>, SoundError> {
        let mut all = Vec::new();
        while let Some(part) = self.next(self.format.rate_hz as usize)? {
            all.extend_from_slice(&part);
        }
        Ok(all)
    }
}

/// A whole file.
#[cfg(any(test, feature = "bench"))]
pub(crate) fn read_file(path: &std::path::Path) -> Result<(AudioFormat, Vec<u8>), SoundError> {
    let mut sound = Sound::open(&Input::File(path.to_owned()), None)?;
    Ok((sound.format(), sound.rest()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wav(bits: u16, channels: u16, data: &[u8]) -> Vec<u8> {
        let block = channels * bits / 8;
        let mut file = b"RIFF".to_vec();
        file.extend((36 + data.len() as u32).to_le_bytes());
        file.extend(b"WAVEfmt ");
        file.extend(16u32.to_le_bytes());
        file.extend([1u16, channels].into_iter().flat_map(u16::to_le_bytes));
        file.extend([8_000u32, 8_000 * u32::from(block)].into_iter().flat_map(u32::to_le_bytes));
        file.extend([block, bits].into_iter().flat_map(u16::to_le_bytes));
        file.extend(b"data");
        file.extend((data.len() as u32).to_le_bytes());
        file.extend(data);
        file
    }

    #[test]
    fn wav_comes_back_bit_for_bit() {
        let samples: Vec<u8> = (0..2_000i16).map(|i| i * 16).flat_map(i16::to_le_bytes).collect();
        let mut sound = Sound::read(Cursor::new(wav(16, 2, &samples)), None, None).expect("wav");
        assert_eq!(sound.format().to_string(), "pcm_s16le;rate=8000;channels=2");
        assert_eq!(sound.total_ms(), Some(125));
        let first = sound.next(300).expect("readable").expect("audio");
        assert_eq!(first, samples[..1200]);
        assert_eq!(sound.rest().expect("readable"), samples[1200..]);
        assert_eq!(sound.next(300).expect("readable"), None);
    }

    #[test]
    fn wider_samples_become_floats() {
        let sound = Sound::read(Cursor::new(wav(24, 1, &[0, 0, 0x40].repeat(100))), None, None);
        let mut sound = sound.expect("24 bit wav");
        assert_eq!(sound.format().encoding, Encoding::PcmF32Le);
        assert_eq!(sound.rest().expect("readable")[..4], 0.5f32.to_le_bytes());
    }

    #[test]
    fn raw_is_cut_at_whole_frames() {
        let mut sound = Sound::read(Cursor::new(vec![1; 1_001]), Some(1_001), None).expect("raw");
        assert_eq!(sound.format(), AudioFormat::default());
        assert_eq!(sound.next(400).expect("readable").map(|b| b.len()), Some(800));
        assert_eq!(sound.next(400).expect("readable").map(|b| b.len()), Some(200));
        assert_eq!(sound.next(400).expect("readable"), None);
    }

    #[test]
    fn other_containers_are_refused_unless_called_raw() {
        let ogg = || Cursor::new(b"OggS and more".to_vec());
        assert!(matches!(Sound::read(ogg(), None, None), Err(SoundError::Container("ogg"))));
        assert!(Sound::read(ogg(), None, Some(AudioFormat::default())).is_ok());
        assert!(Sound::read(Cursor::new(b"fLaC\0\0\0\0".to_vec()), None, None).is_err());
    }

    #[test]
    fn the_test_call_is_read_whole() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/audio/call-01.flac");
        let (format, bytes) = read_file(&path).expect("flac");
        assert_eq!(format, AudioFormat::default());
        assert!((33.0..34.0).contains(&(bytes.len() as f64 / 32_000.0)));
    }
}
