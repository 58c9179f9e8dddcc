//! Interleaved PCM -> values from -1 to 1: all channels mixed, or one at a time.

use std::{borrow::Cow, ops::Range};

use bytes::Bytes;
use voxfleet_schema::audio::{AudioFormat, BadChunk, Encoding};

/// Audio of one log entry.
#[derive(Debug)]
pub(super) enum Audio {
    /// One value per frame: the mean of its channels.
    Mixed(Vec<f32>),
    /// As it came, all of it checked: decoded channel by channel where it is fed.
    Split { payload: Bytes, format: AudioFormat },
}

impl Audio {
    pub(super) fn none() -> Self {
        Self::Mixed(Vec::new())
    }

    pub(super) fn mixed(payload: &[u8], format: AudioFormat) -> Result<Self, BadChunk> {
        to_mono(payload, format).map(Self::Mixed)
    }

    pub(super) fn split(payload: Bytes, format: AudioFormat) -> Result<Self, BadChunk> {
        whole_frames(&payload, format)?;
        if format.encoding == Encoding::PcmF32Le {
            let values = payload.chunks_exact(4).map(|s| f32::from_le_bytes([s[0], s[1], s[2], s[3]]));
            if let Some(at) = values.into_iter().position(|value| !value.is_finite()) {
                return Err(BadChunk::NotFinite { at });
            }
        }
        Ok(Self::Split { payload, format })
    }

    pub(super) fn frames(&self) -> usize {
        match self {
            Self::Mixed(mono) => mono.len(),
            Self::Split { payload, format } => payload.len() / format.frame_bytes(),
        }
    }

    /// What is heard one by one.
    pub(super) fn channels(&self) -> usize {
        match self {
            Self::Mixed(_) => 1,
            Self::Split { format, .. } => usize::from(format.channels),
        }
    }

    /// Bytes that are kept.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Mixed(mono) => size_of_val(mono.as_slice()) as u64,
            Self::Split { payload, .. } => payload.len() as u64,
        }
    }

    /// Values of one channel, which it has, over frames that it has.
    pub(super) fn channel(&self, channel: usize, frames: Range<usize>) -> Cow<'_, [f32]> {
        let (payload, format) = match self {
            Self::Mixed(mono) => return Cow::Borrowed(&mono[frames]),
            Self::Split { payload, format } => (payload, format),
        };
        let (frame_bytes, at) = (format.frame_bytes(), channel * format.encoding.bytes_per_sample());
        let chosen = payload[frames.start * frame_bytes..frames.end * frame_bytes].chunks_exact(frame_bytes);
        Cow::Owned(match format.encoding {
            Encoding::PcmS16Le => {
                chosen.map(|f| f32::from(i16::from_le_bytes([f[at], f[at + 1]])) / 32_768.0).collect()
            }
            Encoding::PcmF32Le => {
                chosen.map(|f| f32::from_le_bytes([f[at], f[at + 1], f[at + 2], f[at + 3]]).clamp(-1.0, 1.0)).collect()
            }
        })
    }
}

fn whole_frames(payload: &[u8], format: AudioFormat) -> Result<(), BadChunk> {
    let frame_bytes = format.frame_bytes();
    if payload.len().is_multiple_of(frame_bytes) {
        Ok(())
    } else {
        Err(BadChunk::PartialFrame { len: payload.len(), frame_bytes })
    }
}

/// One value per frame, clamped to -1..1.
fn to_mono(payload: &[u8], format: AudioFormat) -> Result<Vec<f32>, BadChunk> {
    whole_frames(payload, format)?;
    let (frame_bytes, channels) = (format.frame_bytes(), usize::from(format.channels));
    let scale = 1.0 / f32::from(format.channels);
    match format.encoding {
        Encoding::PcmS16Le => Ok(payload
            .chunks_exact(frame_bytes)
            .map(|frame| {
                let sum: f32 =
                    frame.chunks_exact(2).map(|s| f32::from(i16::from_le_bytes([s[0], s[1]])) / 32_768.0).sum();
                sum * scale
            })
            .collect()),
        Encoding::PcmF32Le => {
            let mut mono = Vec::with_capacity(payload.len() / frame_bytes);
            for (n, frame) in payload.chunks_exact(frame_bytes).enumerate() {
                let mut sum = 0.0;
                for (channel, s) in frame.chunks_exact(4).enumerate() {
                    let value = f32::from_le_bytes([s[0], s[1], s[2], s[3]]);
                    if !value.is_finite() {
                        return Err(BadChunk::NotFinite { at: n * channels + channel });
                    }
                    sum += value.clamp(-1.0, 1.0);
                }
                mono.push(sum * scale);
            }
            Ok(mono)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_come_apart_as_they_were_put_together() {
        let format = |encoding, channels| AudioFormat { encoding, channels, ..AudioFormat::default() };
        let s16: Vec<u8> = [1i16, -2, 3, 16_384, -32_768, 32_767].iter().flat_map(|s| s.to_le_bytes()).collect();
        let f32s: Vec<u8> = [0.5f32, -0.25, 7.0, -7.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        let cases = [
            (Encoding::PcmS16Le, 3, &s16, 1, 0..2, vec![-2.0 / 32_768.0, -1.0]),
            (Encoding::PcmS16Le, 3, &s16, 2, 1..2, vec![32_767.0 / 32_768.0]),
            (Encoding::PcmS16Le, 1, &s16, 0, 3..4, vec![0.5]),
            (Encoding::PcmF32Le, 2, &f32s, 0, 0..2, vec![0.5, 1.0]),
            (Encoding::PcmF32Le, 2, &f32s, 1, 0..2, vec![-0.25, -1.0]),
        ];
        for (encoding, channels, bytes, channel, frames, expected) in cases {
            let audio = Audio::split(bytes.clone().into(), format(encoding, channels)).expect("whole frames");
            assert_eq!(audio.channels(), usize::from(channels));
            assert_eq!(audio.frames() * audio.channels() * encoding.bytes_per_sample(), bytes.len());
            assert_eq!(
                audio.channel(channel, frames.clone()).as_ref(),
                expected,
                "{channel} of {channels}, {frames:?}"
            );
            if channels == 1 {
                let mixed = Audio::mixed(bytes, format(encoding, 1)).expect("whole frames");
                assert_eq!(audio.channel(0, 0..audio.frames()), mixed.channel(0, 0..audio.frames()));
            }
        }
    }

    #[test]
    fn what_cannot_be_mixed_cannot_be_split_either() {
        let stereo = |encoding| AudioFormat { encoding, channels: 2, ..AudioFormat::default() };
        let bad: Vec<u8> = [0.5f32, 0.5, 0.5, f32::NAN].iter().flat_map(|s| s.to_le_bytes()).collect();
        let cases = [
            (stereo(Encoding::PcmS16Le), vec![0; 6], BadChunk::PartialFrame { len: 6, frame_bytes: 4 }),
            (stereo(Encoding::PcmF32Le), bad, BadChunk::NotFinite { at: 3 }),
        ];
        for (format, payload, expected) in cases {
            assert_eq!(Audio::mixed(&payload, format).expect_err("bad"), expected);
            assert_eq!(Audio::split(payload.into(), format).expect_err("bad"), expected);
        }
    }
}
