//! What a decoder's process says: a frame is a head in MessagePack, then raw PCM.
//!
//! Two little-endian 32-bit numbers give their lengths. One way only; the other way is the closing of the socket.

use bytes::{Buf as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use voxfleet_schema::{
    audio::{AudioFormat, MAX_CHANNELS, RATES_HZ},
    failure::Failure,
};

/// Longest head: a failure's sentence.
const MAX_HEAD: usize = 64 * 1024;
/// Longest PCM: a chunk of the widest format.
const MAX_PCM: usize = (*RATES_HZ.end() / 5) as usize * MAX_CHANNELS as usize * 4;
const LENGTHS: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Frame {
    /// The file is a recording; first frame where it is.
    Opened { format: AudioFormat, total_ms: Option<u64> },
    /// PCM follows.
    Chunk { format: Option<AudioFormat> },
    /// All of it has been decoded; last frame.
    End { truncated: bool, damaged: u64 },
    /// Last frame.
    Failed { failure: Failure },
}

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("cannot write a frame's head")]
    Encode(#[from] rmp_serde::encode::Error),
    #[error("cannot read a frame's head")]
    Decode(#[from] rmp_serde::decode::Error),
    #[error("a frame of {head} + {pcm} bytes")]
    TooLong { head: usize, pcm: usize },
}

/// The frame up to its PCM, which is written behind it.
pub fn head(frame: &Frame, pcm_len: usize) -> Result<Vec<u8>, WireError> {
    let head = rmp_serde::to_vec_named(frame)?;
    if head.len() > MAX_HEAD || pcm_len > MAX_PCM {
        return Err(WireError::TooLong { head: head.len(), pcm: pcm_len });
    }
    let mut bytes = Vec::with_capacity(LENGTHS + head.len());
    bytes.extend((head.len() as u32).to_le_bytes());
    bytes.extend((pcm_len as u32).to_le_bytes());
    bytes.extend(head);
    Ok(bytes)
}

/// Takes the first frame off `buffer`; none while it is not complete.
pub fn take(buffer: &mut BytesMut) -> Result<Option<(Frame, Bytes)>, WireError> {
    let Some(&[a, b, c, d, e, f, g, h]) = buffer.first_chunk::<LENGTHS>() else { return Ok(None) };
    let head = u32::from_le_bytes([a, b, c, d]) as usize;
    let pcm = u32::from_le_bytes([e, f, g, h]) as usize;
    if head > MAX_HEAD || pcm > MAX_PCM {
        return Err(WireError::TooLong { head, pcm });
    }
    if buffer.len() < LENGTHS + head + pcm {
        buffer.reserve(LENGTHS + head + pcm - buffer.len());
        return Ok(None);
    }
    buffer.advance(LENGTHS);
    let frame = rmp_serde::from_slice(&buffer.split_to(head))?;
    Ok(Some((frame, buffer.split_to(pcm).freeze())))
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::failure::FailureClass;

    use super::*;

    #[test]
    fn frames_come_back_however_they_are_cut() {
        let format = AudioFormat { rate_hz: 44_100, channels: 2, ..AudioFormat::default() };
        let frames = [
            (Frame::Opened { format, total_ms: Some(1_000) }, vec![]),
            (Frame::Chunk { format: Some(format) }, vec![7u8; 300]),
            (Frame::Chunk { format: None }, vec![8u8; 1]),
            (Frame::End { truncated: true, damaged: 2 }, vec![]),
            (Frame::Failed { failure: Failure::new(FailureClass::BadAudio, "no") }, vec![]),
        ];
        let bytes: Vec<u8> =
            frames.iter().flat_map(|(f, pcm)| [head(f, pcm.len()).expect("head"), pcm.clone()].concat()).collect();
        for step in [1, 7, bytes.len()] {
            let mut buffer = BytesMut::new();
            let mut read = Vec::new();
            for part in bytes.chunks(step) {
                buffer.extend_from_slice(part);
                while let Some((frame, pcm)) = take(&mut buffer).expect("frame") {
                    read.push((frame, pcm.to_vec()));
                }
            }
            assert_eq!(read, frames);
        }
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_reserved() {
        for lengths in [[u32::MAX, 0], [1, u32::MAX]] {
            let mut buffer = BytesMut::from(lengths.map(u32::to_le_bytes).concat().as_slice());
            assert!(matches!(take(&mut buffer), Err(WireError::TooLong { .. })));
        }
    }
}
