//! Tensor types of ggml and how their bytes become numbers; pure.
//!
//! Quantised tensors are rows of blocks of 32 numbers. A block has a scale (and, in the `_1` types, a smallest value) as
//! half floats, then four, five or eight bits per number; of five bits the highest stand apart in one word. The first half
//! of a block's numbers are the low nibbles of its bytes, the second half the high ones.

use half::{bf16, f16};

/// Numbers in one block of a quantised type.
const BLOCK: usize = 32;

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    /// A type that whisper.cpp knows and that is not turned into numbers here: its blocks' numbers and bytes.
    Other {
        numbers: u64,
        bytes: u64,
    },
}

impl Kind {
    /// By its number in the file; None = unknown to whisper.cpp.
    pub fn of(number: u32) -> Option<Self> {
        let other = |bytes| Kind::Other { numbers: 256, bytes };
        Some(match number {
            0 => Kind::F32,
            1 => Kind::F16,
            30 => Kind::Bf16,
            2 => Kind::Q4_0,
            3 => Kind::Q4_1,
            6 => Kind::Q5_0,
            7 => Kind::Q5_1,
            8 => Kind::Q8_0,
            10 => other(84),  // q2_k
            11 => other(110), // q3_k
            12 => other(144), // q4_k
            13 => other(176), // q5_k
            14 => other(210), // q6_k
            _ => return None,
        })
    }

    /// Numbers and bytes of one block.
    pub fn block(self) -> (u64, u64) {
        match self {
            Kind::F32 => (1, 4),
            Kind::F16 | Kind::Bf16 => (1, 2),
            Kind::Q4_0 => (32, 18),
            Kind::Q4_1 => (32, 20),
            Kind::Q5_0 => (32, 22),
            Kind::Q5_1 => (32, 24),
            Kind::Q8_0 => (32, 34),
            Kind::Other { numbers, bytes } => (numbers, bytes),
        }
    }

    /// Whether [`numbers`] can read it.
    pub fn is_readable(self) -> bool {
        !matches!(self, Kind::Other { .. })
    }
}

/// Appends the numbers of whole blocks; bytes behind the last whole block are passed over.
pub fn numbers(kind: Kind, bytes: &[u8], out: &mut Vec<f32>) {
    let (_, size) = kind.block();
    let blocks = bytes.chunks_exact(usize::try_from(size).unwrap_or(usize::MAX));
    match kind {
        Kind::F32 => out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        Kind::F16 => out.extend(blocks.map(|b| half_at(b, 0))),
        Kind::Bf16 => out.extend(blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        Kind::Q8_0 => blocks.for_each(|block| {
            let scale = half_at(block, 0);
            out.extend(block[2..].iter().map(|&byte| f32::from(byte.cast_signed()) * scale));
        }),
        Kind::Q4_0 => blocks.for_each(|block| {
            let scale = half_at(block, 0);
            nibbles(&block[2..], |_, low| (f32::from(low) - 8.0) * scale, out);
        }),
        Kind::Q4_1 => blocks.for_each(|block| {
            let (scale, least) = (half_at(block, 0), half_at(block, 2));
            nibbles(&block[4..], |_, low| f32::from(low) * scale + least, out);
        }),
        Kind::Q5_0 => blocks.for_each(|block| {
            let (scale, high) = (half_at(block, 0), word_at(block, 2));
            nibbles(&block[6..], |n, low| (f32::from(fifth(high, n) | low) - 16.0) * scale, out);
        }),
        Kind::Q5_1 => blocks.for_each(|block| {
            let (scale, least, high) = (half_at(block, 0), half_at(block, 2), word_at(block, 4));
            nibbles(&block[8..], |n, low| f32::from(fifth(high, n) | low) * scale + least, out);
        }),
        Kind::Other { .. } => {}
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// The fifth bit of number n, in its place.
fn fifth(high: u32, n: usize) -> u8 {
    if high >> n & 1 == 1 { 0x10 } else { 0 }
}

fn nibbles(packed: &[u8], number: impl Fn(usize, u8) -> f32, out: &mut Vec<f32>) {
    out.extend(packed.iter().enumerate().map(|(n, byte)| number(n, byte & 0x0f)));
    out.extend(packed.iter().enumerate().map(|(n, byte)| number(n + BLOCK / 2, byte >> 4)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: Kind, bytes: &[u8]) -> Vec<f32> {
        let mut out = Vec::new();
        numbers(kind, bytes, &mut out);
        out
    }

    fn half(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }

    #[test]
    fn plain_numbers() {
        assert_eq!(read(Kind::F32, &[1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat()), [1.5, -2.0]);
        assert_eq!(read(Kind::F16, &[half(0.25), half(-3.0)].concat()), [0.25, -3.0]);
        assert_eq!(read(Kind::Bf16, &[0x80, 0x3f, 0x00, 0xc0]), [1.0, -2.0]);
        assert!(read(Kind::F32, &[0, 0, 0]).is_empty(), "half a number is none");
    }

    #[test]
    fn eight_bits() {
        let block: Vec<u8> = half(0.5).into_iter().chain((0..32).map(|n: u8| n.wrapping_sub(16))).collect();
        let expected: Vec<f32> = (0..32).map(|n| (n as f32 - 16.0) * 0.5).collect();
        assert_eq!(read(Kind::Q8_0, &block), expected);
    }

    #[test]
    fn four_bits_low_nibbles_first() {
        // Number n of the block is n mod 16.
        let packed = (0..16u8).map(|n| n << 4 | n);
        let block: Vec<u8> = half(2.0).into_iter().chain(packed.clone()).collect();
        let expected: Vec<f32> = (0..32).map(|n| ((n % 16) as f32 - 8.0) * 2.0).collect();
        assert_eq!(read(Kind::Q4_0, &block), expected);
        let block: Vec<u8> = [half(2.0), half(-1.0)].concat().into_iter().chain(packed).collect();
        let expected: Vec<f32> = (0..32).map(|n| (n % 16) as f32 * 2.0 - 1.0).collect();
        assert_eq!(read(Kind::Q4_1, &block), expected);
    }

    #[test]
    fn five_bits_with_the_highest_apart() {
        // Number n of the block is n.
        let packed = (0..16u8).map(|n| n << 4 | n);
        let high = 0xffff_0000u32.to_le_bytes();
        let block: Vec<u8> = half(0.5).into_iter().chain(high).chain(packed.clone()).collect();
        let expected: Vec<f32> = (0..32).map(|n| (n as f32 - 16.0) * 0.5).collect();
        assert_eq!(read(Kind::Q5_0, &block), expected);
        let block: Vec<u8> = [half(0.5), half(3.0)].concat().into_iter().chain(high).chain(packed).collect();
        let expected: Vec<f32> = (0..32).map(|n| n as f32 * 0.5 + 3.0).collect();
        assert_eq!(read(Kind::Q5_1, &block), expected);
    }

    #[test]
    fn every_type_reads_what_its_blocks_hold() {
        for number in 0..64 {
            let Some(kind) = Kind::of(number) else { continue };
            let (per_block, bytes) = kind.block();
            let read = read(kind, &vec![0; 3 * bytes as usize + bytes as usize - 1]);
            let blocks = if kind.is_readable() && bytes > 1 { 3 } else { 0 };
            assert_eq!(read.len() as u64, blocks * per_block, "type {number}");
        }
    }
}
