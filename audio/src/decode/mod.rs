//! Reads a recording as chunks of 200 ms, in memory that does not depend on its length.
//!
//! Blocking. Integer samples of 16 bits or fewer stay `pcm_s16le`; wider ones, floats and everything a lossy codec
//! makes become `pcm_f32le`, so nothing is lost on the way in. The same bytes give the same chunks.
//!
//! A damaged part is left out and silence of its length put in its place, so that times stay right; numbers that are
//! none (NaN, infinity) become zeros. Both are counted; a file most of which is damaged fails.

mod track;

use std::{
    fs::File,
    io::{self, Cursor, Read},
};

use bytes::{Bytes, BytesMut};
use symphonia::core::{
    audio::GenericAudioBufferRef,
    errors::Error,
    formats::{FormatId, FormatOptions, FormatReader, probe::Hint, well_known as container},
    io::{MediaSource, MediaSourceStream, ReadOnlySource},
    meta::MetadataOptions,
    packet::Packet,
};
use voxfleet_schema::audio::{AudioFormat, Encoding, MAX_CHANNELS, RATES_HZ, sniff_container};

use self::track::{Playing, container_name, is_bare_stream};
use crate::{
    AudioError, Limits,
    sniff::{HEAD_BYTES, foreign},
    source::{Source, lacks_index, read_up_to},
    wav,
};

/// Chunks a second.
const PER_SECOND: u32 = 5;
/// Format changes inside a file: a chained stream of a radio has hundreds, a hostile file one a packet.
const MAX_CHANGES: u32 = 1_000;
/// Damaged parts after which a file is judged before its end.
const JUDGE_AFTER: u64 = 200;
/// Longest silence put in the place of one damaged part: two seconds are longer than any codec's packet.
const MAX_FILL_S: u64 = 2;
/// Fewest bytes a second that any codec here comes down to in earnest; a head that claims more audio is not believed.
const LEAST_BYTES_PER_S: u64 = 2;
/// Percent of a bare stream that must be frames. Noise that happens to look like frames makes up a few.
const LEAST_FRAMES_PERCENT: u64 = 25;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// On the first one, and where it changes.
    pub format: Option<AudioFormat>,
    /// Interleaved; 200 ms, less before a change of format and at the end.
    pub pcm: Bytes,
}

/// A recording being decoded.
pub struct Decoder {
    demuxer: Box<dyn FormatReader>,
    playing: Playing,
    container: &'static str,
    kind: FormatId,
    limit_s: u64,
    total_ms: Option<u64>,
    format: AudioFormat,
    /// What the last chunk said.
    announced: Option<AudioFormat>,
    /// Decoded and not yet handed out, in `format`.
    pending: BytesMut,
    /// The first part in another format: waits until `pending` is handed out.
    changed: Option<(AudioFormat, BytesMut)>,
    changes: u32,
    tally: Tally,
    /// Bytes of the file behind its tag, where that is known.
    body_bytes: Option<u64>,
    ended: bool,
    truncated: bool,
    /// Channels of a recording that the demuxer takes for one of one channel,
    together: Option<u16>,
    /// and the samples that do not make a frame yet.
    begun: BytesMut,
    narrow: Vec<i16>,
    wide: Vec<f32>,
}

/// What has been decoded.
#[derive(Debug, Default)]
struct Tally {
    good: u64,
    bad: u64,
    last_was_bad: bool,
    frames: u64,
    decoded_us: u64,
    packet_bytes: u64,
}

impl Decoder {
    /// Reads `file` from its start, wherever its position is. `name` is a hint at most.
    pub fn open(file: File, name: Option<&str>, limits: &Limits) -> Result<Self, AudioError> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Self::read(file, name, limits);
        }
        let len = metadata.len();
        let mut head = vec![0; HEAD_BYTES];
        let got = read_up_to(&file, &mut head, 0)?;
        head.truncate(got);
        let mended = wav::mend(&file, len)?;
        if let Some((rate_hz, channels)) = mended.too_many {
            return Err(AudioError::OutOfRange { rate_hz, channels: channels.into() });
        }
        if sniff_container(&head) == Some("mp4/m4a") && lacks_index(&file, len)? {
            return Err(AudioError::NoIndex);
        }
        let source = Source::new(file, len, mended.patches);
        let mut decoder = Self::probe(Box::new(source), &head, name, limits, Some(len), mended.channels)?;
        decoder.truncated = mended.truncated;
        Ok(decoder)
    }

    /// Reads what comes through a pipe, which cannot go back: an MP4 whose index is at its end fails.
    pub fn read(
        mut from: impl Read + Send + Sync + 'static,
        name: Option<&str>,
        limits: &Limits,
    ) -> Result<Self, AudioError> {
        let mut head = Vec::new();
        from.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head)?;
        let whole = Cursor::new(head.clone()).chain(from);
        Self::probe(Box::new(ReadOnlySource::new(whole)), &head, name, limits, None, None)
    }

    fn probe(
        source: Box<dyn MediaSource>,
        head: &[u8],
        name: Option<&str>,
        limits: &Limits,
        len: Option<u64>,
        together: Option<u16>,
    ) -> Result<Self, AudioError> {
        if head.is_empty() {
            return Err(AudioError::Empty);
        }
        if let Some(what) = foreign(head) {
            return Err(AudioError::Foreign { what });
        }
        let mut hint = Hint::new();
        if let Some((_, extension)) = name.and_then(|n| n.rsplit_once('.')) {
            hint.with_extension(extension);
        }
        let stream = MediaSourceStream::new(source, Default::default());
        let (options, metadata) = (FormatOptions::default(), MetadataOptions::default());
        let demuxer = symphonia::default::get_probe()
            .probe(&hint, stream, options, metadata)
            .map_err(|error| cannot_open(error, sniff_container(head)))?;
        let info = demuxer.format_info();
        let (kind, container) = (info.format, container_name(info.format, info.short_name));
        let playing = Playing::choose(demuxer.as_ref())?;
        let mut decoder = Self {
            demuxer,
            playing,
            container,
            kind,
            limit_s: limits.max_seconds,
            total_ms: None,
            format: AudioFormat::default(),
            announced: None,
            pending: BytesMut::new(),
            changed: None,
            changes: 0,
            tally: Tally::default(),
            body_bytes: len.map(|len| len.saturating_sub(id3_bytes(head))),
            ended: false,
            truncated: false,
            together,
            begun: BytesMut::new(),
            narrow: Vec::new(),
            wide: Vec::new(),
        };
        decoder.total_ms = decoder.credible_total(len);
        if let Some(claimed_ms) = decoder.total_ms.filter(|ms| *ms > limits.max_seconds.saturating_mul(1000)) {
            return Err(AudioError::ClaimsTooLong { claimed_ms, limit_s: limits.max_seconds });
        }
        // What the head says of the format is not always what the first packet holds.
        while decoder.pending.is_empty() && !decoder.ended {
            decoder.fill()?;
        }
        if decoder.pending.is_empty() { Err(AudioError::NoAudio) } else { Ok(decoder) }
    }

    fn credible_total(&self, len: Option<u64>) -> Option<u64> {
        let claimed = self.playing.claimed_ms(self.demuxer.as_ref())? / u64::from(self.together.unwrap_or(1));
        len.is_none_or(|len| claimed <= (len / LEAST_BYTES_PER_S).saturating_mul(1000)).then_some(claimed)
    }

    /// Of the first chunk, later of the last one.
    pub fn format(&self) -> AudioFormat {
        self.format
    }

    /// Length, if the container says it and its bytes do not belie it.
    pub fn total_ms(&self) -> Option<u64> {
        self.total_ms
    }

    /// The recording breaks off: there was more of it once. Final only after the last chunk.
    pub fn truncated(&self) -> bool {
        self.truncated
    }

    /// Parts that could not be decoded, so far.
    pub fn damaged(&self) -> u64 {
        self.tally.bad
    }

    /// The next 200 ms; none after the last.
    #[expect(clippy::should_implement_trait, reason = "an iterator would hide that an error comes before the end")]
    pub fn next(&mut self) -> Result<Option<Chunk>, AudioError> {
        loop {
            let whole = (self.format.rate_hz / PER_SECOND) as usize * self.format.frame_bytes();
            if self.pending.len() >= whole {
                return Ok(Some(self.chunk(whole)));
            }
            if self.changed.is_some() || self.ended {
                if !self.pending.is_empty() {
                    return Ok(Some(self.chunk(self.pending.len())));
                }
                let Some((format, pcm)) = self.changed.take() else { return Ok(None) };
                (self.format, self.pending) = (format, pcm);
                self.changes += 1;
                if self.changes > MAX_CHANGES {
                    return Err(AudioError::FormatChanges { limit: MAX_CHANGES });
                }
                continue;
            }
            self.fill()?;
        }
    }

    fn chunk(&mut self, bytes: usize) -> Chunk {
        let format = (self.announced != Some(self.format)).then_some(self.format);
        self.announced = Some(self.format);
        Chunk { format, pcm: self.pending.split_to(bytes).freeze() }
    }

    /// Decodes one packet more, or finds the end.
    fn fill(&mut self) -> Result<(), AudioError> {
        let mut packet = match self.demuxer.next_packet() {
            Ok(Some(packet)) if packet.track_id == self.playing.id => packet,
            Ok(Some(_)) => return Ok(()),
            Ok(None) => return self.end(false),
            // Another stream is chained to this one.
            Err(Error::ResetRequired) => {
                self.playing = Playing::choose(self.demuxer.as_ref())?;
                return Ok(());
            }
            Err(Error::IoError(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                // A wav of unknown length ends wherever it ends.
                let open_ended = self.kind == container::FORMAT_ID_WAVE && self.playing.claimed_frames.is_none();
                return self.end(!open_ended);
            }
            Err(Error::IoError(error)) => return Err(AudioError::Read(error)),
            Err(error) => {
                tracing::debug!(%error, container = self.container, "container damaged, the rest of it is lost");
                return self.end(true);
            }
        };
        self.tally.packet_bytes += packet.data.len() as u64;
        self.playing.keep_what_is_no_padding(&mut packet);
        let bad = match self.playing.decoder.decode(&packet) {
            Ok(_) => self.append()?,
            Err(Error::IoError(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(AudioError::Read(error));
            }
            Err(error) => {
                tracing::trace!(%error, "damaged packet");
                self.append_silence(&packet);
                true
            }
        };
        self.tally.last_was_bad = bad;
        if bad {
            self.tally.bad += 1;
            if self.tally.bad >= JUDGE_AFTER {
                self.judge()?;
            }
        } else {
            self.tally.good += 1;
        }
        if self.tally.decoded_us > self.limit_s.saturating_mul(1_000_000) {
            return Err(AudioError::TooLong { limit_s: self.limit_s });
        }
        Ok(())
    }

    /// Takes what the decoder has just made; true if some of it was no number.
    fn append(&mut self) -> Result<bool, AudioError> {
        let buffer = self.playing.decoder.last_decoded();
        let frames = buffer.frames();
        if frames == 0 {
            return Ok(false);
        }
        let mut format = format_of(&self.playing, &buffer)?;
        let skipped = self.playing.skip.min(frames as u64) as usize;
        self.playing.skip -= skipped as u64;
        let from = skipped * usize::from(format.channels);
        let mut damaged = false;
        let mut pcm = BytesMut::with_capacity((frames - skipped) * format.frame_bytes());
        match format.encoding {
            Encoding::PcmS16Le => {
                buffer.copy_to_vec_interleaved(&mut self.narrow);
                self.narrow[from..].iter().for_each(|sample| pcm.extend_from_slice(&sample.to_le_bytes()));
            }
            Encoding::PcmF32Le => {
                buffer.copy_to_vec_interleaved(&mut self.wide);
                for sample in &self.wide[from..] {
                    damaged |= !sample.is_finite();
                    let sample = if sample.is_finite() { *sample } else { 0.0 };
                    pcm.extend_from_slice(&sample.to_le_bytes());
                }
            }
        }
        if let Some(channels) = self.together {
            format.channels = channels;
            self.begun.unsplit(pcm);
            let whole = self.begun.len() - self.begun.len() % format.frame_bytes();
            pcm = self.begun.split_to(whole);
        }
        self.take(format, pcm);
        Ok(damaged)
    }

    fn append_silence(&mut self, packet: &Packet) {
        // Before the first good part nothing says what silence would look like.
        if self.tally.frames == 0 {
            return;
        }
        let format = self.changed.as_ref().map_or(self.format, |(format, _)| *format);
        let frames = self.playing.frames_of(packet, format.rate_hz) / u64::from(self.together.unwrap_or(1));
        let frames = frames.min(MAX_FILL_S * u64::from(format.rate_hz));
        self.take(format, BytesMut::zeroed(frames as usize * format.frame_bytes()));
    }

    fn take(&mut self, format: AudioFormat, pcm: BytesMut) {
        let frames = (pcm.len() / format.frame_bytes()) as u64;
        if frames == 0 {
            return;
        }
        if self.tally.frames == 0 {
            self.format = format;
        }
        self.tally.frames += frames;
        self.tally.decoded_us += frames * 1_000_000 / u64::from(format.rate_hz);
        if format == self.format {
            self.pending.unsplit(pcm);
        } else {
            // `next` empties this before it asks for more.
            self.changed = Some((format, pcm));
        }
    }

    fn end(&mut self, cut: bool) -> Result<(), AudioError> {
        self.ended = true;
        self.judge()?;
        let (counted, frames) = (self.playing.counted, self.tally.frames);
        let short = counted && self.playing.claimed_frames.is_some_and(|claimed| frames < claimed);
        self.truncated |= cut || short || (counted && self.tally.last_was_bad);
        Ok(())
    }

    /// Whether this is a recording with flaws, or something else.
    fn judge(&self) -> Result<(), AudioError> {
        let Tally { good, bad, packet_bytes, .. } = self.tally;
        if bad > good {
            return Err(AudioError::MostlyDamaged { bad, good });
        }
        if let Some(body) = self.body_bytes.filter(|_| self.ended && is_bare_stream(self.kind)) {
            let percent = packet_bytes.saturating_mul(100) / body.max(1);
            if percent < LEAST_FRAMES_PERCENT {
                return Err(AudioError::MostlyForeign { container: self.container, percent });
            }
        }
        Ok(())
    }
}

fn format_of(playing: &Playing, buffer: &GenericAudioBufferRef<'_>) -> Result<AudioFormat, AudioError> {
    let (rate_hz, channels) = (buffer.spec().rate(), buffer.spec().channels().count());
    match u16::try_from(channels) {
        Ok(count) if (1..=MAX_CHANNELS).contains(&count) && RATES_HZ.contains(&rate_hz) => Ok(AudioFormat {
            encoding: if playing.is_narrow(buffer) { Encoding::PcmS16Le } else { Encoding::PcmF32Le },
            rate_hz,
            channels: count,
        }),
        _ => Err(AudioError::OutOfRange { rate_hz, channels }),
    }
}

/// Length of the ID3v2 tag at the start, pictures included.
fn id3_bytes(head: &[u8]) -> u64 {
    match head {
        [b'I', b'D', b'3', _, _, _, a, b, c, d, ..] => {
            10 + [a, b, c, d].iter().fold(0u64, |sum, byte| sum << 7 | u64::from(**byte & 0x7f))
        }
        _ => 0,
    }
}

fn cannot_open(error: Error, container: Option<&'static str>) -> AudioError {
    match (error, container) {
        (Error::IoError(error), _) if error.kind() != io::ErrorKind::UnexpectedEof => AudioError::Read(error),
        (_, None) => AudioError::Unrecognised,
        (Error::IoError(_), Some(container)) => {
            AudioError::Head { container: named(container), why: "the file ends inside it".to_owned() }
        }
        (error, Some(container)) => AudioError::Head { container: named(container), why: error.to_string() },
    }
}

fn named(container: &'static str) -> &'static str {
    if container == "a wav file" { "wav" } else { container }
}
