//! Wav headers that do not tell the truth about the length of their audio.
//!
//! A recorder that crashed leaves a length of 0, one that writes to a pipe leaves 0xffffffff, a download that broke off
//! leaves a length beyond the file, and above 4 GiB the length stands elsewhere (RF64, BW64). In all of these the audio
//! is whatever follows the head of the data chunk, so the demuxer is shown the real length there.
//!
//! The demuxer has a name for each of so many channels and takes no more. A file of more is shown to it as one channel, whose
//! samples the decoder puts together to frames again.

use std::{fs::File, io};

use voxfleet_schema::audio::MAX_CHANNELS;

use crate::source::{Patch, read_up_to};

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Mended {
    pub(crate) patches: Vec<Patch>,
    /// The header promises more than there is.
    pub(crate) truncated: bool,
    /// Channels of a file that is shown as one of one channel.
    pub(crate) channels: Option<u16>,
    /// Rate and channels where these are more than are transcribed.
    pub(crate) too_many: Option<(u32, u16)>,
}

/// Channels that the demuxer has names for; fewer where the header can give them places.
const NAMED_CHANNELS: u16 = 26;
const PLACED_CHANNELS: u16 = 18;
/// Speaker position of the one channel that is shown: the front's centre.
const CENTRE: u32 = 4;
const EXTENSIBLE: u16 = 0xfffe;
/// Whole numbers, floats, A-law, mu-law, and the header that says more.
const PLAIN: [u16; 5] = [1, 3, 6, 7, EXTENSIBLE];

/// Chunks before the audio: a handful in files that mean well.
const MOST_CHUNKS: usize = 256;
const UNKNOWN: u32 = u32::MAX;

impl Mended {
    /// `fmt` is the beginning of the format chunk, which lies at `at`: kind, channels, rate, bytes a second, bytes a frame, bits
    /// a sample.
    fn show_as_one(&mut self, at: u64, fmt: &[u8]) {
        let number = |place: usize| u16::from_le_bytes([fmt[place], fmt[place + 1]]);
        let (kind, channels, frame, bits) = (number(0), number(2), number(12), number(14));
        let sample = frame / channels.max(1);
        // Anything else packs samples in ways of its own.
        if !PLAIN.contains(&kind) || sample != bits.div_ceil(8) {
            return;
        }
        let known = if kind == EXTENSIBLE { PLACED_CHANNELS } else { NAMED_CHANNELS };
        let many = (known + 1..=MAX_CHANNELS).contains(&channels);
        if !many || sample == 0 || sample * channels != frame {
            return;
        }
        let pair = |[a, b]: [u8; 2], [c, d]: [u8; 2]| [a, b, c, d];
        self.patches.push((at, pair(kind.to_le_bytes(), 1u16.to_le_bytes())));
        self.patches.push((at + 12, pair(sample.to_le_bytes(), bits.to_le_bytes())));
        if kind == EXTENSIBLE {
            self.patches.push((at + 20, CENTRE.to_le_bytes()));
        }
        self.channels = Some(channels);
    }
}

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
            b"fmt " if read == 24 => {
                mended.show_as_one(at + 8, &chunk[8..]);
                // The demuxer multiplies them without looking.
                let channels = u16::from_le_bytes([chunk[10], chunk[11]]);
                let rate_hz = u32::from_le_bytes([chunk[12], chunk[13], chunk[14], chunk[15]]);
                mended.too_many = (channels > MAX_CHANNELS).then_some((rate_hz, channels));
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
