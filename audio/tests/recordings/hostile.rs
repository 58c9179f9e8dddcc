//! Broken and hostile recordings: as much of them as is good, or a typed error with a sentence that helps.

use std::os::unix::fs::FileExt as _;

use voxfleet_audio::{AudioError, Decoder, Limits};
use voxfleet_schema::failure::FailureClass;

use crate::{as_i16, call, decode, decode_named, drain, file, fixture, limits, tone, wav};

fn error(bytes: &[u8], name: &str) -> (FailureClass, String) {
    match decode_named(bytes, name) {
        Ok(decoded) => panic!("{name}: decoded {} s of {}", decoded.seconds(), decoded.format),
        Err(error) => {
            let failure = error.failure();
            (failure.class, failure.message)
        }
    }
}

/// The same noise every time.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    })
    .take(len)
    .collect()
}

#[test]
fn nothing_and_noise_are_bad_audio() {
    assert_eq!(error(b"", "empty.wav").0, FailureClass::BadAudio);
    for (len, seed) in [(10, 1), (1_000, 2), (100_000, 3), (2_000_000, 4), (2_000_000, 5), (2_000_000, 6)] {
        let (class, message) = error(&noise(len, seed), "noise.wav");
        assert_eq!(class, FailureClass::BadAudio, "{len}: {message}");
    }
    // Noise with the mark of a container in front of it.
    for mark in
        [&b"RIFF\xff\xff\xff\x7fWAVE"[..], b"fLaC", b"OggS", b"\0\0\0\x20ftypM4A ", b"\x1a\x45\xdf\xa3", b"ID3\x04"]
    {
        let (class, message) = error(&[mark, &noise(50_000, 7)].concat(), "noise");
        assert!(matches!(class, FailureClass::BadAudio), "{mark:?}: {message}");
    }
}

#[test]
fn what_is_no_recording_is_named() {
    let cases: [(&[u8], &str); 4] = [
        (b"Dear colleague, please find the recording attached.\n", "a text"),
        (b"<html><head><title>Sign in</title></head></html>", "a web page"),
        (b"%PDF-1.7 and so on", "a PDF"),
        (b"RIFF\x10\0\0\0AVI LIST", "an AVI video"),
    ];
    for (bytes, what) in cases {
        let (class, message) = error(bytes, "call.wav");
        assert_eq!(class, FailureClass::UnsupportedFormat);
        assert!(message.contains(what) && message.contains("wav, flac, mp3"), "{message}");
    }
}

#[test]
fn a_film_without_sound_is_named() {
    for (name, container) in [("silent-film.mp4", "mp4"), ("silent-film.webm", "webm")] {
        let (class, message) = error(&fixture(name), name);
        assert_eq!(class, FailureClass::UnsupportedFormat, "{message}");
        assert!(message.contains(container) && message.contains("video but no audio"), "{message}");
    }
}

#[test]
fn an_unknown_codec_and_impossible_rates_are_refused() {
    let samples = as_i16(&tone(8_000, 1, 1_000));
    // WMA inside a wav.
    assert_eq!(error(&wav(0x161, 16, 8_000, 1, &samples), "a.wav").0, FailureClass::BadAudio);
    for (rate_hz, channels) in [(4_000, 1), (384_000, 1), (16_000, 65), (16_000, 32_768), (16_000, 65_535)] {
        let (class, message) = error(&wav(1, 16, rate_hz, channels, &samples), "a.wav");
        assert_eq!(class, FailureClass::UnsupportedFormat);
        assert!(message.contains(&rate_hz.to_string()) && message.contains("8000 to 192000"), "{message}");
    }
}

#[test]
fn a_recording_without_samples_is_bad_audio() {
    let (class, message) = error(&wav(1, 16, 8_000, 1, &[]), "a.wav");
    assert_eq!((class, message.contains("no audio")), (FailureClass::BadAudio, true), "{message}");
    // Head of a flac, without a frame.
    assert_eq!(error(&call()[..8_192.min(call().len())][..100], "a.flac").0, FailureClass::BadAudio);
}

#[test]
fn a_cut_recording_is_read_as_far_as_it_goes_and_says_so() {
    let whole = wav(1, 16, 16_000, 1, &as_i16(&tone(16_000, 1, 48_000)));
    let cases = [
        ("a.wav", whole),
        ("a.flac", call()),
        ("a.ogg", fixture("call-01.ogg")),
        ("a.opus", fixture("call-01.opus")),
        ("a.mp3", fixture("call-01.mp3")),
    ];
    for (name, bytes) in cases {
        let full = decode_named(&bytes, name).expect(name);
        assert!(!full.truncated, "{name} is whole");
        let cut = decode_named(&bytes[..bytes.len() * 6 / 10], name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(cut.truncated, "{name} is cut");
        let part = cut.seconds() / full.seconds();
        // Ogg pages hold a second.
        assert!((0.2..0.75).contains(&part), "{name}: {part} of it");
        let same = cut.pcm.iter().zip(&full.pcm).take_while(|(a, b)| a == b).count();
        assert!(same as f64 > 0.9 * cut.pcm.len() as f64, "{name}: only the first {same} of {} bytes", cut.pcm.len());
    }
}

#[test]
fn every_sample_of_a_cut_wav_is_used() {
    let data = as_i16(&tone(16_000, 1, 5_000));
    let bytes = wav(1, 16, 16_000, 1, &data);
    let cut = decode(&bytes[..44 + 7_001]).expect("cut");
    assert_eq!((cut.pcm.as_slice(), cut.truncated, cut.total_ms), (&data[..7_000], true, Some(218)));
}

#[test]
fn an_mp4_without_its_index_is_refused_with_the_reason() {
    let bytes = fixture("call-01.m4a");
    let moov = bytes.windows(4).position(|w| w == b"moov").expect("index");
    for cut in [moov - 4, moov / 2, 40] {
        let (class, message) = error(&bytes[..cut], "a.m4a");
        assert_eq!((class, message.contains("no index")), (FailureClass::BadAudio, true), "{message}");
    }
    // Cut inside the index.
    assert_eq!(error(&bytes[..bytes.len() - 100], "a.m4a").0, FailureClass::BadAudio);
}

#[test]
fn lengths_that_lie_cost_nothing() {
    let data = as_i16(&tone(16_000, 1, 16_000));
    let good = wav(1, 16, 16_000, 1, &data);
    // 4 GiB of audio, a length nobody knew, a recorder that died: the audio there is.
    for (claimed, truncated) in [(u32::MAX - 1, true), (u32::MAX, false), (0, false)] {
        let mut bytes = good.clone();
        bytes[40..44].copy_from_slice(&claimed.to_le_bytes());
        let decoded = decode(&bytes).expect("decodes");
        assert_eq!((decoded.pcm.as_slice(), decoded.truncated), (data.as_slice(), truncated), "{claimed}");
        assert_eq!(decoded.total_ms, Some(1_000));
    }
    // A flac whose head says 19 hours: its bytes could not hold that.
    let mut bytes = call();
    bytes.truncate(9_000);
    bytes[22..26].copy_from_slice(&0x4000_0000u32.to_be_bytes());
    let decoded = decode(&bytes).expect("decodes");
    assert_eq!((decoded.total_ms, decoded.truncated), (None, true));
}

#[test]
fn wav_beyond_four_gib_is_read() {
    let data = as_i16(&tone(16_000, 1, 4_000));
    let plain = wav(1, 16, 16_000, 1, &data);
    for (mark, claimed, truncated) in [(b"RF64", data.len() as u64, false), (b"BW64", 5 << 30, true)] {
        let mut bytes = mark.to_vec();
        bytes.extend(u32::MAX.to_le_bytes());
        bytes.extend(b"WAVEds64");
        bytes.extend(28u32.to_le_bytes());
        bytes.extend([claimed + 100, claimed, claimed / 2].into_iter().flat_map(u64::to_le_bytes));
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(&plain[12..40]);
        bytes.extend(u32::MAX.to_le_bytes());
        bytes.extend(&data);
        let decoded = decode(&bytes).expect("decodes");
        assert_eq!((decoded.pcm.as_slice(), decoded.truncated), (data.as_slice(), truncated));
    }
}

/// A flac of silence: `blocks` frames of 16,384 samples at 16 kHz, 12 bytes each. `total` as its head says it.
fn flac_of_silence(blocks: u32, total: u64) -> Vec<u8> {
    fn crc(bytes: &[u8], width: u32, polynomial: u32) -> u32 {
        let top = 1 << (width - 1);
        bytes.iter().fold(0, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte) << (width - 8), |crc, _| {
                (if crc & top == 0 { crc << 1 } else { crc << 1 ^ polynomial }) & ((top << 1) - 1)
            })
        })
    }
    let mut bytes = b"fLaC\x80\0\0\x22".to_vec();
    bytes.extend([0x40, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    // 20 bits rate, 3 channels - 1, 5 bits - 1, 36 samples.
    bytes.extend((16_000u64 << 44 | 15 << 36 | total).to_be_bytes());
    bytes.extend([0; 16]);
    for n in 0..blocks {
        // Block size code 14 = 16,384; rate and width from the head; one channel; number as in UTF-8.
        let mut frame = vec![0xff, 0xf8, 0xe0, 0x00];
        let number =
            char::from_u32(if n < 0xd800 { n } else { n + 0x800 }).filter(|_| n < 0xd800).expect("short enough");
        frame.extend(number.to_string().as_bytes());
        frame.push(crc(&frame, 8, 7) as u8);
        // A constant subframe of zero.
        frame.extend([0, 0, 0]);
        frame.extend((crc(&frame, 16, 0x8005) as u16).to_be_bytes());
        bytes.extend(frame);
    }
    bytes
}

#[test]
fn a_bomb_of_silence_ends_at_the_limit() {
    let few = Limits { max_seconds: 60, ..limits() };
    let short = Decoder::open(file(&flac_of_silence(50, 0)), None, &few).and_then(drain).expect("within the limit");
    assert_eq!(short.pcm.len(), 50 * 16_384 * 2);
    // 15 hours in 600 kB, and its head does not say so.
    let bomb = flac_of_silence(50_000, 0);
    assert!(bomb.len() < 700_000);
    let mut decoder = Decoder::open(file(&bomb), None, &few).expect("opens");
    let mut decoded_s = 0.0;
    let failure = loop {
        match decoder.next() {
            Ok(Some(chunk)) => decoded_s += chunk.pcm.len() as f64 / 32_000.0,
            Ok(None) => panic!("all {decoded_s} s of it"),
            Err(error) => break error.failure(),
        }
    };
    assert!((58.0..62.0).contains(&decoded_s), "{decoded_s} s");
    assert_eq!(
        (failure.class, failure.message.contains("60 s")),
        (FailureClass::TooLarge, true),
        "{}",
        failure.message
    );
    // One that says it is not begun at all.
    let honest = Decoder::open(file(&flac_of_silence(500, 500 * 16_384)), None, &few);
    assert!(matches!(honest, Err(AudioError::ClaimsTooLong { claimed_ms: 512_000, limit_s: 60 })));
}

#[test]
fn silence_is_a_recording() {
    let decoded = decode(&wav(1, 16, 16_000, 1, &[0; 64_000])).expect("silence");
    assert_eq!(decoded.seconds(), 2.0);
}

#[test]
fn damage_in_the_middle_is_counted_and_keeps_the_time() {
    let good = fixture("call-01.mp3");
    let whole = decode(&good).expect("whole");
    let mut bytes = good.clone();
    let middle = bytes.len() / 2;
    // Within frames, past their heads: frames of 32 kbit/s at 16 kHz are 144 bytes.
    let sync = (middle..)
        .find(|&i| {
            bytes[i] == 0xff
                && bytes[i + 1] & 0xfe
                    == good[(0..).find(|&j| good[j] == 0xff && good[j + 1] & 0xe0 == 0xe0).expect("frame") + 1] & 0xfe
        })
        .expect("frame");
    bytes[sync + 4..sync + 140].fill(0xfd);
    let decoded = decode(&bytes).expect("most of it is good");
    assert!(decoded.seconds() > whole.seconds() - 0.1, "{} s", decoded.seconds());
    assert!((decoded.seconds() - whole.seconds()).abs() < 0.1, "{} and {} s", decoded.seconds(), whole.seconds());
    assert_ne!(decoded.pcm, whole.pcm);
}

#[test]
fn a_file_that_is_good_at_its_beginning_only_is_cut_there() {
    let mut bytes = call();
    let from = 9_000;
    let junk = noise(bytes.len() - from, 9);
    for (place, junk) in bytes[from..].iter_mut().zip(junk) {
        *place = junk;
    }
    let whole = decode(&call()).expect("good");
    let decoded = decode(&bytes).expect("its beginning is good");
    assert!(decoded.truncated && !decoded.pcm.is_empty(), "{} s of it", decoded.seconds());
    assert!(whole.pcm.starts_with(&decoded.pcm), "{} s that were not in it", decoded.seconds());
}

#[test]
fn noise_between_frames_is_no_mp3() {
    // Two real frames, then noise.
    let bytes = [&fixture("call-01.mp3")[..800], &noise(400_000, 11)].concat();
    let (class, message) = error(&bytes, "a.mp3");
    assert_eq!(class, FailureClass::BadAudio, "{message}");
}

#[test]
fn what_is_no_number_becomes_silence_and_is_counted() {
    let mut samples = tone(16_000, 1, 16_000);
    samples[100] = f32::NAN;
    samples[9_000] = f32::INFINITY;
    let data: Vec<u8> = samples.iter().flat_map(|s| s.to_le_bytes()).collect();
    let decoded = decode(&wav(3, 32, 16_000, 1, &data)).expect("float wav");
    assert!(decoded.samples().iter().all(|s| s.is_finite()));
    assert_eq!(decoded.damaged, 2);
    let all: Vec<u8> = [f32::NAN; 16_000].iter().flat_map(|s| s.to_le_bytes()).collect();
    assert_eq!(error(&wav(3, 32, 16_000, 1, &all), "nan.wav").0, FailureClass::BadAudio);
}

#[test]
fn the_position_of_the_file_neither_matters_nor_moves() {
    let bytes = wav(1, 16, 16_000, 1, &as_i16(&tone(16_000, 1, 3_000)));
    let mut file = file(&bytes);
    let before = std::io::Seek::stream_position(&mut file).expect("position");
    let decoded = Decoder::open(file.try_clone().expect("clone"), None, &limits()).and_then(drain).expect("decodes");
    assert_eq!(decoded.pcm.len(), 6_000);
    assert_eq!(std::io::Seek::stream_position(&mut file).expect("position"), before);
    assert_eq!(file.read_at(&mut [0; 4], 0).expect("still open"), 4);
}

mod any_bytes {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        /// Whatever happens to a file, the answer is audio or an error, never a panic or more audio than the limit.
        #[test]
        fn damaged_files_end(which in 0usize..7, cut in 0.0f64..1.0, flips in prop::collection::vec((0.0f64..1.0, any::<u8>()), 0..12)) {
            let names = ["call-01.mp3", "call-01.ogg", "call-01.opus", "call-01.m4a", "call-01.webm", "call-01-adpcm.wav", "video.mp4"];
            let mut bytes = fixture(names[which]);
            bytes.truncate(((bytes.len() as f64 * (cut * 1.5).min(1.0)) as usize).max(1));
            for (place, value) in flips {
                let at = (place * place * bytes.len() as f64) as usize;
                bytes[at] = value;
            }
            let few = Limits { max_seconds: 100, ..limits() };
            if let Ok(decoded) = Decoder::open(file(&bytes), None, &few).and_then(drain) {
                prop_assert!(decoded.pcm.len() < 100 * 192_000 * 4);
                prop_assert!(!decoded.pcm.is_empty());
            }
        }
    }
}
