//! Reads what a producer sends: recordings of every format that is taken, or raw PCM, as interleaved frames.
//!
//! Blocking; callers run it on a thread of its own.

use std::{
    fs::File,
    io::{Cursor, Read},
    path::PathBuf,
};

use bytes::{Bytes, BytesMut};
use voxfleet_audio::{AudioError, Decoder, Limits};
use voxfleet_schema::audio::{AudioFormat, sniff_container};

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
    #[error(transparent)]
    Decode(#[from] AudioError),
    #[error("the format changes inside the file, which a session cannot follow; send it as a job")]
    FormatChange,
    #[error("the file is cut off or damaged; what was readable has been used")]
    CutOff,
}

/// Audio being read, from its current position.
pub(crate) struct Sound {
    format: AudioFormat,
    total_ms: Option<u64>,
    /// Decoded and not yet handed out.
    pending: BytesMut,
    reader: Reader,
    /// Why there is no more, told after what is pending.
    broken: Option<SoundError>,
}

enum Reader {
    Raw(Box<dyn Read + Send>),
    Decoded(Box<Decoder>),
    Done,
}

impl Sound {
    /// `raw` takes the input as PCM of that format, whatever it looks like.
    pub(crate) fn open(input: &Input, raw: Option<AudioFormat>) -> Result<Self, SoundError> {
        match input {
            Input::Stdin => Self::read(std::io::stdin(), raw),
            Input::File(path) => {
                let mut file = File::open(path)?;
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Self::read(file, raw);
                }
                let mut head = Vec::new();
                file.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head)?;
                if raw.is_none() && sniff_container(&head).is_some() {
                    let name = path.to_string_lossy();
                    return Ok(Self::decoded(Decoder::open(file, Some(&name), &unlimited())?));
                }
                let mut sound = Self::raw(Cursor::new(head).chain(file), raw);
                let frames = metadata.len() / sound.format.frame_bytes() as u64;
                sound.total_ms = Some(frames * 1000 / u64::from(sound.format.rate_hz));
                Ok(sound)
            }
        }
    }

    fn read(mut from: impl Read + Send + Sync + 'static, raw: Option<AudioFormat>) -> Result<Self, SoundError> {
        let mut head = Vec::new();
        from.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head)?;
        let container = if raw.is_some() { None } else { sniff_container(&head) };
        let whole = Cursor::new(head).chain(from);
        match container {
            Some(_) => Ok(Self::decoded(Decoder::read(whole, None, &unlimited())?)),
            None => Ok(Self::raw(whole, raw)),
        }
    }

    fn raw(from: impl Read + Send + 'static, format: Option<AudioFormat>) -> Self {
        let reader = Reader::Raw(Box::new(from));
        Self { format: format.unwrap_or_default(), total_ms: None, pending: BytesMut::new(), reader, broken: None }
    }

    fn decoded(decoder: Decoder) -> Self {
        let (format, total_ms) = (decoder.format(), decoder.total_ms());
        Self { format, total_ms, pending: BytesMut::new(), reader: Reader::Decoded(Box::new(decoder)), broken: None }
    }

    pub(crate) fn format(&self) -> AudioFormat {
        self.format
    }

    /// Length where the file says it.
    pub(crate) fn total_ms(&self) -> Option<u64> {
        self.total_ms
    }

    /// The next `frames` frames, fewer at the end, none after it. Bytes of an unfinished last frame are left out.
    pub(crate) fn next(&mut self, frames: usize) -> Result<Option<Bytes>, SoundError> {
        let wanted = frames.max(1) * self.format.frame_bytes();
        while self.pending.len() < wanted {
            match self.fill(wanted) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    // What came before is handed out first.
                    (self.reader, self.broken) = (Reader::Done, Some(error));
                    break;
                }
            }
        }
        let whole = self.pending.len().min(wanted) / self.format.frame_bytes() * self.format.frame_bytes();
        if let Some(error) = self.broken.take_if(|_| whole == 0) {
            return Err(error);
        }
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
            Reader::Decoded(decoder) => match decoder.next()? {
                Some(chunk) if chunk.format.is_some_and(|format| format != self.format) => {
                    Err(SoundError::FormatChange)
                }
                Some(chunk) => {
                    self.pending.extend_from_slice(&chunk.pcm);
                    Ok(true)
                }
                None if decoder.truncated() => Err(SoundError::CutOff),
                None => {
                    self.reader = Reader::Done;
                    Ok(false)
                }
            },
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

/// A file of one's own, sent at its own pace, may be as long as it is.
fn unlimited() -> Limits {
    Limits { max_seconds: u64::MAX, ..Limits::default() }
}

/// A whole file.
#[cfg(any(test, feature = "bench"))]
pub(crate) fn read_file(path: &std::path::Path) -> Result<(AudioFormat, Vec<u8>), SoundError> {
    let mut sound = Sound::open(&Input::File(path.to_owned()), None)?;
    Ok((sound.format(), sound.rest()?))
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::audio::Encoding;

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
        let mut sound = Sound::read(Cursor::new(wav(16, 2, &samples)), None).expect("wav");
        assert_eq!(sound.format().to_string(), "pcm_s16le;rate=8000;channels=2");
        assert_eq!(sound.total_ms(), Some(125));
        let first = sound.next(300).expect("readable").expect("audio");
        assert_eq!(first, samples[..1200]);
        assert_eq!(sound.rest().expect("readable"), samples[1200..]);
        assert_eq!(sound.next(300).expect("readable"), None);
    }

    #[test]
    fn wider_samples_become_floats() {
        let sound = Sound::read(Cursor::new(wav(24, 1, &[0, 0, 0x40].repeat(100))), None);
        let mut sound = sound.expect("24 bit wav");
        assert_eq!(sound.format().encoding, Encoding::PcmF32Le);
        assert_eq!(sound.rest().expect("readable")[..4], 0.5f32.to_le_bytes());
    }

    #[test]
    fn raw_is_cut_at_whole_frames() {
        let mut sound = Sound::read(Cursor::new(vec![1; 1_001]), None).expect("raw");
        assert_eq!(sound.format(), AudioFormat::default());
        assert_eq!(sound.next(400).expect("readable").map(|b| b.len()), Some(800));
        assert_eq!(sound.next(400).expect("readable").map(|b| b.len()), Some(200));
        assert_eq!(sound.next(400).expect("readable"), None);
    }

    #[test]
    fn broken_containers_are_refused_unless_called_raw() {
        let ogg = || Cursor::new(b"OggS and more".to_vec());
        assert!(matches!(Sound::read(ogg(), None), Err(SoundError::Decode(AudioError::Head { container: "ogg", .. }))));
        assert!(Sound::read(ogg(), Some(AudioFormat::default())).is_ok());
        assert!(Sound::read(Cursor::new(b"fLaC\0\0\0\0".to_vec()), None).is_err());
    }

    #[test]
    fn what_a_broken_file_has_comes_before_its_error() {
        let samples = [7u8; 2_000];
        let cut = wav(16, 1, &samples)[..44 + 1_000].to_vec();
        let mut file = tempfile::NamedTempFile::new().expect("file");
        std::io::Write::write_all(&mut file, &cut).expect("written");
        let mut sound = Sound::open(&Input::File(file.path().to_owned()), None).expect("wav");
        assert_eq!(sound.next(400).expect("readable").map(|b| b.len()), Some(800));
        assert_eq!(sound.next(400).expect("readable").map(|b| b.len()), Some(200));
        assert!(matches!(sound.next(400), Err(SoundError::CutOff)));
        assert_eq!(sound.next(400).expect("the end"), None);
    }

    #[test]
    fn the_test_call_is_read_whole() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/audio/call-01.flac");
        let (format, bytes) = read_file(&path).expect("flac");
        assert_eq!(format, AudioFormat::default());
        assert!((33.0..34.0).contains(&(bytes.len() as f64 / 32_000.0)));
    }
}
