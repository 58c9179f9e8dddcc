//! Audio chunks: their headers, their sample formats, and the clock that turns input frames into samples.
//!
//! A chunk's payload is raw audio bytes; everything else is in optional NATS headers. A header value that breaks its
//! syntax makes the whole chunk bad: nothing of it is used, nothing of the session changes, and an event says why.

use std::{fmt, str::FromStr};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    PREROLL_SAMPLES, SAMPLE_RATE_HZ,
    failure::{Failure, FailureClass},
    id::SourceId,
    session::{OptionError, SessionOptions},
    trace::{TRACEPARENT, TraceContext},
};

pub const ASR_SEQ: &str = "Asr-Seq";
pub const ASR_SOURCE: &str = "Asr-Source";
pub const ASR_FORMAT: &str = "Asr-Format";
pub const ASR_END: &str = "Asr-End";
pub const ASR_FLUSH: &str = "Asr-Flush";
/// Prefix of session options on the first chunk: `Asr-Opt-Model`, `Asr-Opt-Endpoint-Ms`, ...
pub const ASR_OPT_PREFIX: &str = "Asr-Opt-";
/// On a hint only: stream sequence of the logged chunk it copies.
pub const ASR_LOG_SEQ: &str = "Asr-Log-Seq";
/// On a hint only: stream sequence of the session's entry before it, when the dispatcher saw both itself.
pub const ASR_LOG_PREV: &str = "Asr-Log-Prev";
/// On ends and flushes that the dispatcher wrote: `idle`, `close` or `pause`.
pub const ASR_CAUSE: &str = "Asr-Cause";

/// How one sample is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Signed 16-bit little endian; full scale is 32768.
    PcmS16Le,
    /// IEEE 32-bit float little endian; full scale is 1.0.
    PcmF32Le,
}

impl Encoding {
    pub fn bytes_per_sample(self) -> usize {
        match self {
            Encoding::PcmS16Le => 2,
            Encoding::PcmF32Le => 4,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Encoding::PcmS16Le => "pcm_s16le",
            Encoding::PcmF32Le => "pcm_f32le",
        }
    }
}

/// `Asr-Format`: `pcm_s16le;rate=16000;channels=1` is the default; rate and channels may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AudioFormat {
    pub encoding: Encoding,
    /// 8,000 to 192,000 Hz.
    pub rate_hz: u32,
    /// 1 to 64, interleaved.
    pub channels: u16,
}

/// Lowest and highest input rate accepted, in Hz.
pub const RATES_HZ: std::ops::RangeInclusive<u32> = 8_000..=192_000;
pub const MAX_CHANNELS: u16 = 64;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("unsupported encoding {0:?}, live audio is pcm_s16le or pcm_f32le; send containers and codecs as a job")]
    Encoding(String),
    #[error("rate {0} Hz is outside 8000 to 192000")]
    Rate(u64),
    #[error("{0} channels, allowed are 1 to {MAX_CHANNELS}")]
    Channels(u64),
    #[error("cannot read {0:?}, expected for example pcm_s16le;rate=16000;channels=1")]
    Syntax(String),
}

impl Default for AudioFormat {
    fn default() -> Self {
        Self { encoding: Encoding::PcmS16Le, rate_hz: SAMPLE_RATE_HZ, channels: 1 }
    }
}

impl AudioFormat {
    pub fn frame_bytes(self) -> usize {
        self.encoding.bytes_per_sample() * usize::from(self.channels)
    }

    /// Sample at 16 kHz of input frame `frame`, both counted since the format began: `floor(n * 16000 / rate)`.
    pub fn sample_of_frame(self, frame: u64) -> u64 {
        (u128::from(frame) * u128::from(SAMPLE_RATE_HZ) / u128::from(self.rate_hz)) as u64
    }

    /// First frame whose sample is `sample` or later: the inverse of [`Self::sample_of_frame`].
    pub fn first_frame_at(self, sample: u64) -> u64 {
        (u128::from(sample) * u128::from(self.rate_hz)).div_ceil(u128::from(SAMPLE_RATE_HZ)) as u64
    }
}

impl fmt::Display for AudioFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{};rate={};channels={}", self.encoding.as_str(), self.rate_hz, self.channels)
    }
}

impl From<AudioFormat> for String {
    fn from(format: AudioFormat) -> String {
        format.to_string()
    }
}

impl TryFrom<String> for AudioFormat {
    type Error = FormatError;
    fn try_from(text: String) -> Result<Self, FormatError> {
        text.parse()
    }
}

impl FromStr for AudioFormat {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let quote = |s: &str| s.chars().take(64).collect::<String>();
        let mut parts = text.split(';').map(str::trim);
        let name = parts.next().unwrap_or("");
        let encoding = match name.to_ascii_lowercase().as_str() {
            "pcm_s16le" => Encoding::PcmS16Le,
            "pcm_f32le" => Encoding::PcmF32Le,
            _ => return Err(FormatError::Encoding(quote(name))),
        };
        let mut format = AudioFormat { encoding, ..AudioFormat::default() };
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| FormatError::Syntax(quote(text)))?;
            let number: u64 = value.trim().parse().map_err(|_| FormatError::Syntax(quote(text)))?;
            match key.trim() {
                "rate" => {
                    format.rate_hz =
                        u32::try_from(number).ok().filter(|r| RATES_HZ.contains(r)).ok_or(FormatError::Rate(number))?;
                }
                "channels" => {
                    format.channels = u16::try_from(number)
                        .ok()
                        .filter(|c| (1..=MAX_CHANNELS).contains(c))
                        .ok_or(FormatError::Channels(number))?;
                }
                _ => return Err(FormatError::Syntax(quote(text))),
            }
        }
        Ok(format)
    }
}

/// One entry of a session's log as it lies in `ASR_AUDIO`, not yet judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawEntry {
    /// Stream sequence in `ASR_AUDIO`.
    pub seq: u64,
    /// The `Asr-*` headers, in order, and `traceparent`. Others are left out.
    pub headers: Vec<(String, String)>,
    pub payload: Bytes,
}

/// What an entry's headers say.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChunkHeaders {
    pub seq: Option<u64>,
    pub source: Option<SourceId>,
    pub format: Option<AudioFormat>,
    pub end: bool,
    pub flush: bool,
    /// Session options, when any `Asr-Opt-*` stands there.
    pub options: Option<Box<SessionOptions>>,
    /// The trace it is part of; one that cannot be read is none.
    pub trace: Option<TraceContext>,
}

/// Why a chunk is bad as a whole.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BadChunk {
    #[error("header {name}: {why}")]
    Header { name: &'static str, why: String },
    #[error("header Asr-Format: {0}")]
    Format(#[from] FormatError),
    #[error("session options: {0}")]
    Options(#[from] OptionError),
    #[error("empty chunk without Asr-End or Asr-Flush")]
    Empty,
    #[error("{len} bytes are not a whole number of frames of {frame_bytes} bytes")]
    PartialFrame { len: usize, frame_bytes: usize },
    #[error("sample {at} is not a finite number")]
    NotFinite { at: usize },
    #[error("this is {0}, live audio is raw PCM; send containers and codecs as a job")]
    Container(&'static str),
}

impl BadChunk {
    pub fn class(&self) -> FailureClass {
        match self {
            BadChunk::Header { .. } | BadChunk::Options(_) | BadChunk::Empty => FailureClass::BadRequest,
            BadChunk::Format(FormatError::Encoding(_)) | BadChunk::Container(_) => FailureClass::UnsupportedFormat,
            BadChunk::Format(_) | BadChunk::PartialFrame { .. } | BadChunk::NotFinite { .. } => FailureClass::BadAudio,
        }
    }

    pub fn failure(&self) -> Failure {
        Failure::new(self.class(), self.to_string())
    }
}

impl ChunkHeaders {
    /// Reads the headers; names are compared without case, unknown ones are passed over.
    pub fn parse<'a>(headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, BadChunk> {
        let mut parsed = ChunkHeaders::default();
        let mut options: Option<SessionOptions> = None;
        for (name, value) in headers {
            let value = value.trim();
            if name.eq_ignore_ascii_case(ASR_SEQ) {
                parsed.seq = Some(
                    value
                        .parse()
                        .map_err(|_| BadChunk::Header { name: ASR_SEQ, why: "not a number from 0".to_owned() })?,
                );
            } else if name.eq_ignore_ascii_case(ASR_SOURCE) {
                let id = SourceId::new(value).map_err(|e| BadChunk::Header { name: ASR_SOURCE, why: e.to_string() })?;
                parsed.source = Some(id);
            } else if name.eq_ignore_ascii_case(ASR_FORMAT) {
                parsed.format = Some(value.parse()?);
            } else if name.eq_ignore_ascii_case(ASR_END) {
                parsed.end = flag(ASR_END, value)?;
            } else if name.eq_ignore_ascii_case(ASR_FLUSH) {
                parsed.flush = flag(ASR_FLUSH, value)?;
            } else if name.eq_ignore_ascii_case(TRACEPARENT) {
                parsed.trace = TraceContext::parse(value);
            } else if let Some(key) = strip_prefix_ignore_case(name, ASR_OPT_PREFIX) {
                options.get_or_insert_default().set(&key.to_ascii_lowercase().replace('-', "_"), value)?;
            }
        }
        if let Some(options) = options {
            options.validate()?;
            parsed.options = Some(Box::new(options));
        }
        Ok(parsed)
    }

    pub fn of(entry: &RawEntry) -> Result<Self, BadChunk> {
        let headers = Self::parse(entry.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())))?;
        if entry.payload.is_empty() && !headers.end && !headers.flush {
            return Err(BadChunk::Empty);
        }
        Ok(headers)
    }
}

fn flag(name: &'static str, value: &str) -> Result<bool, BadChunk> {
    match value {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(BadChunk::Header { name, why: "neither 1 nor 0".to_owned() }),
    }
}

fn strip_prefix_ignore_case<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let head = text.get(..prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then(|| &text[prefix.len()..])
}

/// Names the container that `payload` starts with, if it does. PCM can begin with any bytes, so only marks of four bytes
/// or more count, and MPEG audio needs two frame headers in a row.
pub fn sniff_container(payload: &[u8]) -> Option<&'static str> {
    let at = |from: usize, mark: &[u8]| payload.get(from..from + mark.len()) == Some(mark);
    if at(0, b"OggS") {
        Some("ogg")
    } else if at(0, b"RIFF") && at(8, b"WAVE") {
        Some("a wav file")
    } else if at(0, b"fLaC") {
        Some("flac")
    } else if at(4, b"ftyp") {
        Some("mp4/m4a")
    } else if at(0, &[0x1a, 0x45, 0xdf, 0xa3]) {
        Some("webm/matroska")
    } else if (at(0, b"ID3") && payload.get(3).is_some_and(|v| (2..=4).contains(v))) || two_mpeg_frames(payload) {
        Some("mp3")
    } else {
        None
    }
}

/// ISO 11172-3 frame header, layer III: sync, version, bit rate and sample rate give the distance to the next header.
fn mpeg_frame_len(header: &[u8]) -> Option<usize> {
    const KBPS_V1: [usize; 16] = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0];
    const KBPS_V2: [usize; 16] = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0];
    let [a, b, c, _] = *header.first_chunk::<4>()?;
    let layer_three = b & 0b110 == 0b010;
    if a != 0xff || b & 0xe0 != 0xe0 || !layer_three {
        return None;
    }
    let (version, index) = ((b >> 3) & 3, usize::from(c >> 4));
    let base_hz = [44_100, 48_000, 32_000].get(usize::from((c >> 2) & 3))?;
    let (kbps, rate, slots) = match version {
        3 => (KBPS_V1[index], *base_hz, 144),
        2 => (KBPS_V2[index], base_hz / 2, 72),
        0 => (KBPS_V2[index], base_hz / 4, 72),
        _ => return None,
    };
    (kbps > 0).then(|| slots * kbps * 1000 / rate + usize::from((c >> 1) & 1))
}

fn two_mpeg_frames(payload: &[u8]) -> bool {
    mpeg_frame_len(payload).is_some_and(|len| payload.get(len..).and_then(mpeg_frame_len).is_some())
}

/// Where the half second before `to_sample` begins.
pub fn preroll_start(to_sample: u64) -> u64 {
    to_sample.saturating_sub(PREROLL_SAMPLES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_read_and_write() {
        let cases = [
            ("pcm_s16le", (Encoding::PcmS16Le, 16_000, 1)),
            ("pcm_s16le;rate=8000", (Encoding::PcmS16Le, 8_000, 1)),
            (" PCM_F32LE ; rate = 48000 ; channels = 2 ", (Encoding::PcmF32Le, 48_000, 2)),
        ];
        for (text, (encoding, rate_hz, channels)) in cases {
            let format: AudioFormat = text.parse().expect(text);
            assert_eq!(format, AudioFormat { encoding, rate_hz, channels });
            assert_eq!(format.to_string().parse(), Ok(format));
        }
    }

    #[test]
    fn impossible_formats_are_typed() {
        let error = |text: &str| text.parse::<AudioFormat>().expect_err(text);
        assert_eq!(error("pcm_s16le;rate=0"), FormatError::Rate(0));
        assert_eq!(error("pcm_s16le;rate=1"), FormatError::Rate(1));
        assert_eq!(error("pcm_s16le;rate=10000000"), FormatError::Rate(10_000_000));
        assert_eq!(error("pcm_s16le;channels=0"), FormatError::Channels(0));
        assert!(matches!(error("ogg"), FormatError::Encoding(_)));
        assert!(matches!(error("pcm_s16le;rate=fast"), FormatError::Syntax(_)));
        assert!(matches!(error("pcm_s16le;rate"), FormatError::Syntax(_)));
        assert!(matches!(error(""), FormatError::Encoding(_)));
    }

    #[test]
    fn the_clock_inverts() {
        for rate_hz in [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000] {
            let format = AudioFormat { rate_hz, ..AudioFormat::default() };
            for sample in [0u64, 1, 7, 160, 7_999, 16_000, 123_457, 57_600_000] {
                let frame = format.first_frame_at(sample);
                assert!(format.sample_of_frame(frame) >= sample);
                assert!(frame == 0 || format.sample_of_frame(frame - 1) < sample, "{rate_hz} {sample}");
            }
        }
    }

    #[test]
    fn headers_break_the_chunk_when_they_break_their_syntax() {
        let bad = |name, value| ChunkHeaders::parse([(name, value)]).expect_err(value);
        for (name, value) in [
            ("Asr-Seq", "-1"),
            ("Asr-Seq", "x"),
            ("Asr-Source", "a b"),
            ("Asr-End", "yes"),
            ("Asr-Flush", "2"),
            ("Asr-Opt-Endpoint-Ms", "soon"),
            ("Asr-Opt-Colour", "red"),
            ("Asr-Opt-Policy", "whatever"),
        ] {
            assert_eq!(bad(name, value).class(), FailureClass::BadRequest, "{name}: {value}");
        }
        assert_eq!(bad("Asr-Format", "mp3").class(), FailureClass::UnsupportedFormat);
        assert_eq!(bad("Asr-Format", "pcm_s16le;rate=1").class(), FailureClass::BadAudio);
        let good = ChunkHeaders::parse([("asr-end", "1"), ("Nats-Msg-Id", "x"), ("Asr-Opt-Endpoint-Ms", "300")])
            .expect("good headers");
        assert!(good.end && !good.flush);
        assert_eq!(good.options.expect("options").endpoint_ms, 300);
    }

    #[test]
    fn containers_are_known_by_their_marks_and_pcm_is_not_taken_for_one() {
        assert_eq!(sniff_container(b"OggS\0\x02"), Some("ogg"));
        assert_eq!(sniff_container(b"RIFF\x24\0\0\0WAVEfmt "), Some("a wav file"));
        assert_eq!(sniff_container(b"ID3\x04\0\0"), Some("mp3"));
        // 128 kbit/s, 44.1 kHz, no padding: 417 bytes to the next header
        let mut mp3 = vec![0u8; 900];
        for at in [0, 417] {
            mp3[at..at + 4].copy_from_slice(&[0xff, 0xfb, 0x90, 0x00]);
        }
        assert_eq!(sniff_container(&mp3), Some("mp3"));
        assert_eq!(sniff_container(&mp3[..400]), None, "one header is not enough: PCM may hold it");
        assert_eq!(sniff_container(&[0xff, 0xfb, 0x00, 0x01]), None);
        assert_eq!(sniff_container(&[]), None);
    }
}
