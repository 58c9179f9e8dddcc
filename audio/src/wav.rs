//! Wav headers that do not tell the truth about the length of their audio.
//!
//! A recorder that crashed leaves a length of 0, one that writes to a pipe leaves 0xffffffff, a download that broke off
//! leaves a length beyond the file, and above 4 GiB the length stands elsewhere (RF64, BW64). In all of these the audio
//! is whatever follows the head of the data chunk, so the demuxer is shown the real length there.

use std::{fs::File, io};

use crate::source::{Patch, read_up_to};

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Mended {
    pub(crate) patches: Vec<Patch>,
    /// The header promises more than there is.
    pub(crate) truncated: bool,
}

/// Chunks before the audio: a handful in files that mean well.
const MOST_CHUNKS: usize = 256;
const UNKNOWN: u32 = u32::MAX;

pub(crate) fn mend(file: &File, len: u64) -> io::Result<Mended> {
    let mut mended = Mended::default();
    let mut head = [0u8; 12];
    if read_up_to(file, &mut head, 0)? < 12 || &head[8..] != b"WAVE" {
        return Ok(mended);
    }
    let large = matches!(&head[..4], b"RF64" | b"BW64");
    if !large && &head[..4] != b"RIFF" {
        return Ok(mended);
    }
    let mut at = 12u64;
    let mut long_data = None;
    for _ in 0..MOST_CHUNKS {
        let mut chunk = [0u8; 24];
        let read = read_up_to(file, &mut chunk, at)?;
        if read < 8 {
            return Ok(mended);
        }
        let claimed = u32::from_le_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]);
        match &chunk[..4] {
            // RIFF size, then the size of the audio, 64 bits each.
            b"ds64" if read == 24 => {
                let mut wide = [0; 8];
                wide.copy_from_slice(&chunk[16..24]);
                long_data = Some(u64::from_le_bytes(wide));
            }
            b"data" => {
                let room = len.saturating_sub(at + 8);
                let promised = match (claimed, long_data) {
                    (UNKNOWN, Some(wide)) if large => Some(wide),
                    (UNKNOWN, _) => None,
                    (0, _) if room > 0 => None,
                    (claimed, _) => Some(u64::from(claimed)),
                };
                mended.truncated = promised.is_some_and(|promised| promised > room);
                let shown = u32::try_from(promised.unwrap_or(room).min(room)).unwrap_or(UNKNOWN);
                if large {
                    mended.patches.push((0, *b"RIFF"));
                }
                // The size of the whole is checked by some readers, and is wrong wherever the other one is.
                mended.patches.push((4, UNKNOWN.to_le_bytes()));
                mended.patches.push((at + 4, shown.to_le_bytes()));
                return Ok(mended);
            }
            _ => {}
        }
        // Chunks begin at even positions.
        at += 8 + u64::from(claimed) + u64::from(claimed & 1);
    }
    Ok(mended)
}
