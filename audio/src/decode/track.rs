//! Which track of a file is decoded, and by what.

use std::sync::OnceLock;

use symphonia::core::{
    audio::GenericAudioBufferRef,
    codecs::{
        CodecParameters,
        audio::{AudioCodecId, AudioCodecParameters, AudioDecoder, AudioDecoderOptions, well_known as codec},
        registry::CodecRegistry,
    },
    formats::{FormatId, FormatReader, Track, TrackType, well_known as container},
    packet::Packet,
    units::{Duration, TimeBase},
};

use crate::AudioError;

const OPUS_HZ: u32 = 48_000;

/// The track being decoded.
pub(super) struct Playing {
    pub(super) id: u32,
    pub(super) decoder: Box<dyn AudioDecoder>,
    pub(super) time_base: Option<TimeBase>,
    /// Frames still to be left out at the start: what an Opus encoder needs to settle.
    pub(super) skip: u64,
    /// Frames the container says there are.
    pub(super) claimed_frames: Option<u64>,
    /// They were counted by the encoder, not guessed from the length of the file.
    pub(super) counted: bool,
    /// For MPEG audio: frames the encoder added at the end.
    padding: Option<u64>,
}

pub(super) fn container_name(id: FormatId, short: &'static str) -> &'static str {
    match id {
        container::FORMAT_ID_WAVE => "wav",
        container::FORMAT_ID_ISOMP4 => "mp4/m4a",
        container::FORMAT_ID_MKV => "webm/matroska",
        _ => short,
    }
}

/// Formats without a head, found by scanning for anything that looks like a frame.
pub(super) fn is_bare_stream(id: FormatId) -> bool {
    matches!(
        id,
        container::FORMAT_ID_MP1 | container::FORMAT_ID_MP2 | container::FORMAT_ID_MP3 | container::FORMAT_ID_ADTS
    )
}

fn codecs() -> &'static CodecRegistry {
    static CODECS: OnceLock<CodecRegistry> = OnceLock::new();
    CODECS.get_or_init(|| {
        let mut codecs = CodecRegistry::new();
        symphonia::default::register_enabled_codecs(&mut codecs);
        codecs.register_audio_decoder::<symphonia_adapter_libopus::OpusDecoder>();
        codecs
    })
}

impl Playing {
    /// The default audio track, or the first one that can be decoded.
    pub(super) fn choose(demuxer: &dyn FormatReader) -> Result<Self, AudioError> {
        let format = demuxer.format_info();
        let container = container_name(format.format, format.short_name);
        let default = demuxer.default_track(TrackType::Audio).map(|t| t.id);
        let mut audio: Vec<(&Track, &AudioCodecParameters)> =
            demuxer.tracks().iter().filter_map(|t| Some((t, t.codec_params.as_ref()?.audio()?))).collect();
        audio.sort_by_key(|(track, _)| Some(track.id) != default);
        for (track, parameters) in &audio {
            if let Some(playing) = Self::start(format.format, track, parameters) {
                return Ok(playing);
            }
        }
        match audio.first() {
            Some((_, parameters)) => Err(AudioError::Codec { container, codec: codec_name(parameters) }),
            None => Err(AudioError::NoAudioTrack { container, held: held(demuxer.tracks()) }),
        }
    }

    fn start(format: FormatId, track: &Track, parameters: &AudioCodecParameters) -> Option<Self> {
        let mut parameters = parameters.clone();
        let mut skip = 0;
        if parameters.codec == codec::CODEC_ID_OPUS {
            // Always its clock; matroska writes the rate before encoding here.
            parameters.sample_rate = Some(OPUS_HZ);
        }
        if parameters.codec == codec::CODEC_ID_OPUS
            && let Some(head) = &mut parameters.extra_data
            && let Some(place) = head.get_mut(10..12)
        {
            // The decoder would take all of it from the first packet, which is often shorter. MP4 writes it big-endian.
            let bytes = [place[0], place[1]];
            skip = if format == container::FORMAT_ID_ISOMP4 {
                u16::from_be_bytes(bytes)
            } else {
                u16::from_le_bytes(bytes)
            };
            place.fill(0);
        }
        let decoder = codecs().make_audio_decoder(&parameters, &AudioDecoderOptions::default()).ok()?;
        let mpeg = is_bare_stream(format);
        Some(Self {
            id: track.id,
            decoder,
            time_base: track.time_base,
            skip: u64::from(skip),
            claimed_frames: track.num_frames.filter(|n| *n > 0),
            counted: format == container::FORMAT_ID_FLAC || (mpeg && track.padding.is_some()),
            padding: mpeg.then(|| u64::from(track.padding.unwrap_or(0))),
        })
    }

    /// MPEG audio beyond the length its head tells is no padding: heads are guesses, and files are joined end to end.
    pub(super) fn keep_what_is_no_padding(&self, packet: &mut Packet) {
        if self.padding.is_some_and(|padding| packet.trim_end.get() > padding) {
            packet.trim_end = Duration::ZERO;
        }
    }

    /// Frames that `packet` stands for on the timeline.
    pub(super) fn frames_of(&self, packet: &Packet, rate_hz: u32) -> u64 {
        let seconds = self.time_base.and_then(|base| base.calc_duration(packet.dur));
        seconds.map_or(0, |t| u64::try_from(t.as_nanos() * i128::from(rate_hz) / 1_000_000_000).unwrap_or(0))
    }

    pub(super) fn claimed_ms(&self, demuxer: &dyn FormatReader) -> Option<u64> {
        let by_frames = self
            .claimed_frames
            .zip(self.decoder.codec_params().sample_rate)
            .and_then(|(frames, rate)| u64::try_from(u128::from(frames) * 1000 / u128::from(rate.max(1))).ok());
        by_frames.or_else(|| {
            let media = demuxer.media_info();
            let time = media.time_base?.calc_duration(media.duration.filter(|d| d.get() > 0)?)?;
            u64::try_from(time.as_millis()).ok()
        })
    }

    /// Whether 16 bits hold all there is in `buffer`: integers of the source, not a decoder's approximation.
    pub(super) fn is_narrow(&self, buffer: &GenericAudioBufferRef<'_>) -> bool {
        use GenericAudioBufferRef::*;
        let parameters = self.decoder.codec_params();
        match buffer {
            U8(_) | S8(_) | U16(_) | S16(_) => true,
            F32(_) | F64(_) => false,
            U24(_) | S24(_) | U32(_) | S32(_) => parameters.bits_per_sample.is_some_and(|bits| bits <= 16),
        }
    }
}

fn held(tracks: &[Track]) -> &'static str {
    let has = |wanted: fn(&CodecParameters) -> bool| tracks.iter().filter_map(|t| t.codec_params.as_ref()).any(wanted);
    if has(|p| matches!(p, CodecParameters::Video(_))) {
        "video"
    } else if has(|p| matches!(p, CodecParameters::Subtitle(_))) {
        "subtitles"
    } else {
        "no track of a known kind"
    }
}

fn codec_name(parameters: &AudioCodecParameters) -> String {
    let name = match parameters.codec {
        codec::CODEC_ID_OPUS => {
            let channels = parameters.channels.as_ref().map_or(0, |c| c.count());
            return format!("opus with {channels} channels");
        }
        codec::CODEC_ID_AAC => "a variant of AAC other than AAC-LC",
        codec::CODEC_ID_MP1 => "MPEG audio layer I",
        codec::CODEC_ID_MP2 => "MPEG audio layer II",
        codec::CODEC_ID_AC3 => "Dolby Digital (AC-3)",
        codec::CODEC_ID_EAC3 => "Dolby Digital Plus (E-AC-3)",
        codec::CODEC_ID_AC4 => "Dolby AC-4",
        codec::CODEC_ID_DCA => "DTS",
        codec::CODEC_ID_TRUEHD => "Dolby TrueHD",
        codec::CODEC_ID_SPEEX => "Speex",
        codec::CODEC_ID_WMA => "Windows Media Audio",
        codec::CODEC_ID_ADPCM_G722 => "G.722",
        codec::CODEC_ID_ADPCM_G726 | codec::CODEC_ID_ADPCM_G726LE => "G.726",
        codec::CODEC_ID_WAVPACK => "WavPack",
        AudioCodecId { .. } => return format!("codec {}", parameters.codec),
    };
    name.to_owned()
}
