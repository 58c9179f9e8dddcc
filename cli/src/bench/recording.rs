//! Long recordings for benches, in memory and as wav files.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Result, ensure};
use voxfleet_harness::audio::{self, Pcm};

/// A recording and what is said in it.
#[derive(Debug, Clone)]
pub(super) struct Spoken {
    pub(super) pcm: Pcm,
    pub(super) text: String,
}

/// The test calls one after the other, whole ones, again and again until `seconds` are full; each at least once if `seconds`
/// is 0.
pub(super) fn calls(numbers: &[u32], seconds: f64) -> Result<Spoken> {
    let calls = numbers.iter().map(|n| Ok((audio::call(*n)?, audio::call_text(*n)?))).collect::<Result<Vec<_>>>()?;
    let round_s: f64 = calls.iter().map(|(pcm, _)| pcm.seconds()).sum();
    ensure!(round_s > 0.0, "no calls");
    let mut spoken = Spoken { pcm: Pcm::mono_16k(Vec::new()), text: String::new() };
    for (pcm, text) in calls.iter().cycle() {
        spoken.pcm.samples.extend_from_slice(&pcm.samples);
        spoken.text.push_str(text.trim());
        spoken.text.push('\n');
        let whole_round = spoken.pcm.seconds() + 0.001 >= round_s;
        if whole_round && spoken.pcm.seconds() >= seconds {
            break;
        }
    }
    Ok(spoken)
}

/// Writes `pcm` again and again until `seconds` are full, in little memory.
pub(super) fn write_wav(path: &Path, pcm: &Pcm, seconds: f64) -> Result<()> {
    let frame = pcm.channels * 2;
    let wanted = (seconds * f64::from(pcm.rate_hz)).round() as usize * frame;
    let bytes = pcm.bytes();
    ensure!(!bytes.is_empty(), "nothing to write");
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&header(pcm, wanted as u64))?;
    let mut left = wanted;
    while left > 0 {
        let now = left.min(bytes.len());
        file.write_all(&bytes[..now])?;
        left -= now;
    }
    file.flush()?;
    Ok(())
}

/// What stands in front of PCM of 16 bits: 44 bytes, or 80 where lengths take more than 32 bits (RF64).
fn header(pcm: &Pcm, data_bytes: u64) -> Vec<u8> {
    let channels = pcm.channels as u16;
    let frame = channels * 2;
    let short = u32::try_from(data_bytes).ok().filter(|bytes| *bytes < u32::MAX - 44);
    let mut header = Vec::with_capacity(80);
    header.extend_from_slice(if short.is_some() { b"RIFF" } else { b"RF64" });
    header.extend_from_slice(&short.map_or(u32::MAX, |bytes| bytes + 36).to_le_bytes());
    header.extend_from_slice(b"WAVE");
    if short.is_none() {
        header.extend_from_slice(b"ds64");
        header.extend_from_slice(&28u32.to_le_bytes());
        for length in [data_bytes + 72, data_bytes, data_bytes / u64::from(frame)] {
            header.extend_from_slice(&length.to_le_bytes());
        }
        header.extend_from_slice(&0u32.to_le_bytes());
    }
    header.extend_from_slice(b"fmt ");
    header.extend_from_slice(&16u32.to_le_bytes());
    header.extend_from_slice(&1u16.to_le_bytes());
    header.extend_from_slice(&channels.to_le_bytes());
    header.extend_from_slice(&pcm.rate_hz.to_le_bytes());
    header.extend_from_slice(&(pcm.rate_hz * u32::from(frame)).to_le_bytes());
    header.extend_from_slice(&frame.to_le_bytes());
    header.extend_from_slice(&16u16.to_le_bytes());
    header.extend_from_slice(b"data");
    header.extend_from_slice(&short.unwrap_or(u32::MAX).to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back_repeated() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("a.wav");
        let pcm = audio::bursts(3, 1.0);
        write_wav(&path, &pcm, 2.5).expect("written");
        let read = audio::read(&path).expect("read");
        assert_eq!((read.rate_hz, read.channels, read.samples.len()), (16_000, 1, 40_000));
        assert_eq!(read.samples[32_000..], pcm.samples[..8_000]);
    }

    #[test]
    fn what_is_longer_than_four_gib_says_so_elsewhere() {
        let pcm = Pcm { channels: 32, ..Pcm::mono_16k(vec![0; 32]) };
        let (short, long) = (header(&pcm, 64 << 20), header(&pcm, 64 << 26));
        assert_eq!((short.len(), long.len()), (44, 80));
        assert_eq!((&short[..4], &long[..4], &long[12..16]), (&b"RIFF"[..], &b"RF64"[..], &b"ds64"[..]));
        assert_eq!(long[28..36], (64u64 << 26).to_le_bytes());
        assert_eq!(long[36..44], (1u64 << 26).to_le_bytes());
        assert_eq!(short[40..], (64u32 << 20).to_le_bytes());
        assert_eq!(long[76..], u32::MAX.to_le_bytes());
    }

    #[test]
    fn calls_are_whole() {
        let once = calls(&[1, 2], 0.0).expect("calls");
        assert!((once.pcm.seconds() - 64.8).abs() < 0.1, "{}", once.pcm.seconds());
        let more = calls(&[1, 2], 70.0).expect("calls");
        assert!((more.pcm.seconds() - 98.4).abs() < 0.1, "{}", more.pcm.seconds());
        assert_eq!(more.text.split_whitespace().count(), 94 + 86 + 94);
    }
}
