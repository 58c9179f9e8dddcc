//! Binary messages of a socket as audio: whole frames however they were cut, containers known by their first bytes, and no
//! more at a time than somebody can speak. Pure.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;
use voxfleet_schema::audio::{AudioFormat, sniff_container};

use super::super::limits::SocketLimits;

/// The longest mark of a container.
const MARK_BYTES: usize = 12;

/// Cuts samples at whole frames; what is left waits for the next message.
#[derive(Debug)]
pub(crate) struct Frames {
    frame_bytes: usize,
    rest: BytesMut,
}

impl Frames {
    pub(crate) fn new(format: AudioFormat) -> Self {
        Self { frame_bytes: format.frame_bytes().max(1), rest: BytesMut::new() }
    }

    /// The whole frames there are now; maybe none.
    pub(crate) fn push(&mut self, mut bytes: Bytes) -> Bytes {
        if self.rest.is_empty() {
            let whole = bytes.len() - bytes.len() % self.frame_bytes;
            self.rest.extend_from_slice(&bytes.split_off(whole));
            return bytes;
        }
        self.rest.extend_from_slice(&bytes);
        let whole = self.rest.len() - self.rest.len() % self.frame_bytes;
        self.rest.split_to(whole).freeze()
    }
}

/// What a client sends, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Samples,
    Container(&'static str),
}

/// Holds the first bytes until they tell.
#[derive(Debug, Default)]
pub(crate) struct Head {
    held: BytesMut,
}

impl Head {
    /// None: too little to tell yet.
    pub(crate) fn push(&mut self, bytes: Bytes) -> Option<(Content, Bytes)> {
        let all = match self.held.is_empty() {
            true => bytes,
            false => {
                self.held.extend_from_slice(&bytes);
                self.held.split().freeze()
            }
        };
        if all.len() < MARK_BYTES {
            self.held.extend_from_slice(&all);
            return None;
        }
        Some((sniff_container(&all).map_or(Content::Samples, Content::Container), all))
    }

    /// Everything there was, where it was too little for a container.
    pub(crate) fn finish(self) -> Bytes {
        self.held.freeze()
    }
}

/// How long somebody who sends too fast waits: a bucket of bytes that fills with time.
#[derive(Debug)]
pub(crate) struct Pace {
    per_s: f64,
    most: f64,
    left: f64,
    at: Instant,
}

impl Pace {
    pub(crate) fn new(format: AudioFormat, limits: &SocketLimits, now: Instant) -> Self {
        let real_time = format.frame_bytes() as f64 * f64::from(format.rate_hz);
        let most = real_time * f64::from(limits.burst_s);
        Self { per_s: real_time * f64::from(limits.max_speed), most, left: most, at: now }
    }

    /// `bytes` came; nothing more is to be read for so long.
    pub(crate) fn spend(&mut self, bytes: usize, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.left = (self.left + passed * self.per_s).min(self.most) - bytes as f64;
        match self.left < 0.0 {
            true => Duration::from_secs_f64(-self.left / self.per_s),
            false => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_schema::audio::Encoding;

    fn cut(bytes: &[u8], sizes: &[usize]) -> Vec<Bytes> {
        let (mut parts, mut at, mut n) = (Vec::new(), 0, 0);
        while at < bytes.len() {
            let to = (at + sizes[n % sizes.len()]).min(bytes.len());
            parts.push(Bytes::copy_from_slice(&bytes[at..to]));
            (at, n) = (to, n + 1);
        }
        parts
    }

    #[test]
    fn frames_are_whole_however_messages_are_cut() {
        let bytes: Vec<u8> = (0..241u32).map(|n| n as u8).collect();
        for (encoding, channels) in [(Encoding::PcmS16Le, 1), (Encoding::PcmS16Le, 3), (Encoding::PcmF32Le, 2)] {
            let format = AudioFormat { encoding, channels, ..AudioFormat::default() };
            for sizes in [vec![1], vec![3], vec![1, 2, 5, 7], vec![64, 1], vec![241]] {
                let mut frames = Frames::new(format);
                let mut said = Vec::new();
                for part in cut(&bytes, &sizes) {
                    let whole = frames.push(part);
                    assert_eq!(whole.len() % format.frame_bytes(), 0, "{sizes:?}");
                    said.extend_from_slice(&whole);
                }
                let whole = bytes.len() - bytes.len() % format.frame_bytes();
                assert_eq!(said, bytes[..whole], "{format} {sizes:?}");
            }
        }
    }

    #[test]
    fn a_recorder_is_known_by_its_first_bytes_however_small() {
        let webm = [0x1a, 0x45, 0xdf, 0xa3, 1, 2, 3, 4, 5, 6, 7, 8, 9];
        for (bytes, content) in [
            (webm.to_vec(), Content::Container("webm/matroska")),
            (b"OggS\0\x02\0\0\0\0\0\0\0\0".to_vec(), Content::Container("ogg")),
            (b"RIFF\x24\0\0\0WAVEfmt ".to_vec(), Content::Container("a wav file")),
            (vec![0; 640], Content::Samples),
        ] {
            for size in [1, 5, bytes.len()] {
                let mut head = Head::default();
                let told: Vec<_> = cut(&bytes, &[size]).into_iter().filter_map(|part| head.push(part)).collect();
                assert_eq!(told.first().map(|(content, _)| *content), Some(content), "{size}");
                assert!(bytes.starts_with(&told[0].1), "nothing is lost or turned round");
            }
        }
        let mut head = Head::default();
        assert_eq!(head.push(Bytes::from_static(b"abc")), None);
        assert_eq!(head.finish(), Bytes::from_static(b"abc"));
    }

    #[test]
    fn who_sends_faster_than_speech_for_long_is_slowed_and_nobody_else() {
        let begun = Instant::now();
        let at = |s: f64| begun + Duration::from_secs_f64(s);
        let mut pace = Pace::new(AudioFormat::default(), &SocketLimits::default(), begun);
        let second = 32_000;
        for n in 0..600 {
            assert_eq!(pace.spend(second, at(f64::from(n))), Duration::ZERO, "real time is never slowed");
        }
        let mut pace = Pace::new(AudioFormat::default(), &SocketLimits::default(), begun);
        assert_eq!(pace.spend(60 * second, begun), Duration::ZERO, "a minute at once");
        let wait = pace.spend(4 * second, begun);
        assert!((wait.as_secs_f64() - 1.0).abs() < 1e-6, "{wait:?}");
        assert_eq!(pace.spend(0, at(1.0)), Duration::ZERO, "waited for");
        let wait = pace.spend(8 * second, at(1.0));
        assert!((wait.as_secs_f64() - 2.0).abs() < 1e-6, "{wait:?}");
    }
}
