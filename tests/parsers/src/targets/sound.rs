//! Recordings: what they are, what is in them, and the frames in which a decoder's process says so.

use std::{io::Write as _, time::Duration};

use bytes::BytesMut;
use voxfleet_audio::{Decoder, Limits, wire};
use voxfleet_schema::audio::sniff_container;

/// Short: a few kilobytes can unpack to days.
const LIMITS: Limits = Limits { max_seconds: 20, memory_mb: 512, stall: Duration::from_secs(30) };
/// The highest rate that is decoded, in its widest form: samples of 4 bytes in 64 channels.
const MOST_PCM_PER_S: u64 = 768_000 * 4 * 64;

pub(super) fn sniff(input: &[u8]) -> bool {
    sniff_container(input).is_some()
}

/// A file that begins well or breaks off: its end comes, its sound is bounded, its samples are whole.
pub(super) fn recordings(input: &[u8]) -> bool {
    // From a file, which can be searched, and from a pipe, which cannot.
    let whole =
        tempfile::tempfile().and_then(|mut file| file.write_all(input).map(|()| file)).expect("a temporary file");
    let from_file = drain(Decoder::open(whole, None, &LIMITS));
    let from_pipe = drain(Decoder::read(std::io::Cursor::new(input.to_vec()), None, &LIMITS));
    from_file || from_pipe
}

fn drain(opened: Result<Decoder, voxfleet_audio::AudioError>) -> bool {
    let mut decoder = match opened {
        Ok(decoder) => decoder,
        Err(error) => {
            assert!(error.failure().message.len() < 1_000, "a long story about a bad file");
            return false;
        }
    };
    let mut format = decoder.format();
    let mut bytes = 0u64;
    loop {
        match decoder.next() {
            Ok(None) => return bytes > 0,
            Ok(Some(chunk)) => {
                format = chunk.format.unwrap_or(format);
                assert!(!chunk.pcm.is_empty(), "an empty chunk");
                assert_eq!(chunk.pcm.len() % format.frame_bytes(), 0, "a part of a frame");
                bytes += chunk.pcm.len() as u64;
                assert!(bytes <= (LIMITS.max_seconds + 2) * MOST_PCM_PER_S, "{bytes} bytes");
            }
            Err(error) => {
                let failure = error.failure();
                assert!(failure.message.len() < 1_000, "a long story about a bad file");
                return false;
            }
        }
    }
}

/// What a decoder's process says, cut anywhere.
pub(super) fn frames(input: &[u8]) -> bool {
    let (mut buffer, mut taken) = (BytesMut::from(input), false);
    while let Ok(Some((frame, pcm))) = wire::take(&mut buffer) {
        taken = true;
        let mut written = wire::head(&frame, pcm.len()).expect("what was read can be said");
        written.extend_from_slice(&pcm);
        let again = wire::take(&mut BytesMut::from(written.as_slice())).expect("reads").expect("is whole");
        assert!(again.1 == pcm, "its sound changes");
        assert!(wire::head(&again.0, pcm.len()).expect("says it again") == written[..written.len() - pcm.len()]);
    }
    taken
}
