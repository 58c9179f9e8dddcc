//! Good recordings come out whole: length, format, and the sound itself.

use std::{fs::File, path::PathBuf, time::Instant};

use voxfleet_audio::Decoder;
use voxfleet_schema::audio::Encoding;

use crate::{as_i16, call, decode, decode_named, drain, fixture, limits, tone, wav};

/// Best correlation of `a` with `b` over shifts of at most `most` samples, and the shift (how much later `a` is).
fn alignment(a: &[f32], b: &[f32], most: i64) -> (f64, i64) {
    let at = |shift: i64| {
        let (mut ab, mut aa, mut bb) = (0f64, 0f64, 0f64);
        for (i, y) in b.iter().enumerate() {
            if let Some(x) = usize::try_from(i as i64 + shift).ok().and_then(|j| a.get(j)) {
                (ab, aa, bb) = (ab + f64::from(x * y), aa + f64::from(x * x), bb + f64::from(y * y));
            }
        }
        ab / (aa * bb).sqrt().max(f64::MIN_POSITIVE)
    };
    (-most..=most).map(|shift| (at(shift), shift)).max_by(|a, b| a.0.total_cmp(&b.0)).expect("some shift")
}

fn original() -> Vec<f32> {
    decode(&call()).expect("call").samples()[..48_000].to_vec()
}

#[test]
fn every_codec_gives_the_call_back() {
    let original = original();
    // Rate, longest deviation in ms, shift in ms: AAC has a lead-in of 1024 samples that its container cannot tell us.
    let cases = [
        ("call-01.mp3", 16_000u32, 0u32, 0i64),
        ("call-01.ogg", 16_000, 0, 0),
        ("call-01.opus", 48_000, 0, 0),
        ("call-01.webm", 48_000, 20, 0),
        ("call-01.m4a", 16_000, 130, 64),
        ("video.mp4", 16_000, 130, 64),
        ("call-01-adpcm.wav", 16_000, 64, 0),
    ];
    for (name, rate_hz, longer_ms, shift_ms) in cases {
        let decoded = decode_named(&fixture(name), name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((decoded.format.rate_hz, decoded.format.channels), (rate_hz, 1), "{name}");
        assert_eq!(decoded.format.encoding, Encoding::PcmF32Le, "{name}");
        assert!(!decoded.truncated && decoded.damaged == 0, "{name}: {} {}", decoded.truncated, decoded.damaged);
        let over_ms = (decoded.seconds() - 3.0) * 1000.0;
        assert!((-1.0..=f64::from(longer_ms) + 1.0).contains(&over_ms), "{name}: {over_ms} ms over");
        // Opus knows only 48 kHz; every third sample will do to compare.
        let samples: Vec<f32> = decoded.samples().into_iter().step_by((rate_hz / 16_000) as usize).collect();
        let (correlation, shift) = alignment(&samples, &original, 1_200);
        assert!(correlation > 0.8, "{name}: {correlation} at {shift}");
        assert!((shift - shift_ms * 16).abs() <= 4, "{name}: shifted by {shift} samples");
        let total = decoded.total_ms.unwrap_or_else(|| panic!("{name} tells its length"));
        assert!(total.abs_diff(3_000) <= u64::from(longer_ms) + 60, "{name}: {total} ms");
    }
}

#[test]
fn wav_comes_back_bit_for_bit() {
    let tone = tone(8_000, 2, 2_000);
    let bytes = as_i16(&tone);
    let decoded = decode(&wav(1, 16, 8_000, 2, &bytes)).expect("wav");
    assert_eq!(decoded.format.to_string(), "pcm_s16le;rate=8000;channels=2");
    assert_eq!(decoded.formats, [decoded.format]);
    assert_eq!(decoded.pcm, bytes);
    assert_eq!(decoded.total_ms, Some(250));
    // 1,600 frames are 200 ms.
    assert_eq!(decoded.chunk_bytes, [6_400, 1_600]);
}

#[test]
fn every_number_of_channels_is_read() {
    for channels in [1, 2, 18, 19, 26, 27, 31, 32, 64] {
        // No whole number of frames is a whole number of the demuxer's packets.
        let samples: Vec<i16> = (0..16_001 * i32::from(channels)).map(|n| (n % 30_011) as i16).collect();
        let bytes: Vec<u8> = samples.iter().flat_map(|sample| sample.to_le_bytes()).collect();
        let mut plain = wav(1, 16, 16_000, channels, &bytes);
        for extensible in [false, true] {
            if extensible {
                // 16 valid bits, no positions, and the kind that the short form says in two bytes.
                let rest =
                    [22u16, 16, 0, 0, 1, 0, 0, 0x10, 0x80, 0xaa00, 0x3800, 0x719b].map(u16::to_le_bytes).concat();
                plain.splice(36..36, rest);
                plain[16..20].copy_from_slice(&40u32.to_le_bytes());
                plain[20..22].copy_from_slice(&0xfffeu16.to_le_bytes());
            }
            let decoded = decode(&plain).expect("wav");
            assert_eq!(decoded.format.to_string(), format!("pcm_s16le;rate=16000;channels={channels}"));
            assert!(decoded.pcm == bytes, "{channels} channels");
            assert_eq!((decoded.total_ms, decoded.truncated), (Some(1_000), false), "{channels} channels");
        }
    }
}

#[test]
fn every_width_of_wav_is_read() {
    let tone = tone(16_000, 1, 4_000);
    let int = |bytes: usize| -> Vec<u8> {
        tone.iter()
            .flat_map(|s| ((f64::from(*s) * 2_147_483_647.0) as i32).to_le_bytes()[4 - bytes..].to_vec())
            .collect()
    };
    let eight: Vec<u8> = tone.iter().map(|s| (s * 127.0 + 128.0) as u8).collect();
    let float: Vec<u8> = tone.iter().flat_map(|s| s.to_le_bytes()).collect();
    let double: Vec<u8> = tone.iter().flat_map(|s| f64::from(*s).to_le_bytes()).collect();
    use Encoding::{PcmF32Le, PcmS16Le};
    let cases = [
        (1, 8, eight, PcmS16Le, 0.02),
        (1, 16, int(2), PcmS16Le, 1e-4),
        (1, 24, int(3), PcmF32Le, 1e-6),
        (1, 32, int(4), PcmF32Le, 1e-7),
        (3, 32, float, PcmF32Le, 0.0),
        (3, 64, double, PcmF32Le, 1e-7),
    ];
    for (tag, bits, data, encoding, error) in cases {
        let decoded = decode(&wav(tag, bits, 16_000, 1, &data)).unwrap_or_else(|e| panic!("{tag} {bits}: {e}"));
        assert_eq!(decoded.format.encoding, encoding, "{tag} {bits}");
        let worst = decoded.samples().iter().zip(&tone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= error, "{tag} {bits}: {worst}");
        assert_eq!(decoded.samples().len(), tone.len());
    }
}

#[test]
fn telephone_wav_is_read() {
    // Silence and loudest positive value of both laws.
    for (tag, silence, loud) in [(6, 0xd5, 0xaa), (7, 0xff, 0x80)] {
        let data = [vec![silence; 400], vec![loud; 400]].concat();
        let decoded = decode(&wav(tag, 8, 8_000, 1, &data)).expect("law");
        assert_eq!(decoded.format.to_string(), "pcm_s16le;rate=8000;channels=1");
        let samples = decoded.samples();
        assert!(samples[0].abs() < 0.001 && samples[799] > 0.95, "{tag}: {} {}", samples[0], samples[799]);
    }
}

#[test]
fn low_high_and_surround_formats_are_read() {
    for (rate_hz, channels) in [(8_000, 1), (11_025, 1), (22_050, 2), (44_100, 2), (192_000, 1), (48_000, 6)] {
        let frames = rate_hz as usize / 2;
        let decoded = decode(&wav(1, 16, rate_hz, channels, &as_i16(&tone(rate_hz, channels, frames)))).expect("wav");
        assert_eq!((decoded.format.rate_hz, decoded.format.channels), (rate_hz, channels));
        let whole = (rate_hz / 5) as usize * decoded.format.frame_bytes();
        let (last, others) = decoded.chunk_bytes.split_last().expect("chunks");
        assert!(others.iter().all(|bytes| *bytes == whole) && *last <= whole, "{rate_hz}: {:?}", decoded.chunk_bytes);
        assert_eq!(decoded.pcm.len(), frames * decoded.format.frame_bytes());
    }
}

#[test]
fn the_same_bytes_give_the_same_chunks() {
    for name in ["call-01.mp3", "call-01.opus", "call-01.m4a"] {
        let bytes = fixture(name);
        assert_eq!(decode(&bytes).expect(name), decode(&bytes).expect(name), "{name}");
    }
}

#[test]
fn a_pipe_gives_what_the_file_gives() {
    for bytes in [fixture("call-01.mp3"), fixture("call-01.ogg"), wav(1, 16, 8_000, 1, &as_i16(&tone(8_000, 1, 3_000)))]
    {
        let piped = Decoder::read(std::io::Cursor::new(bytes.clone()), None, &limits()).and_then(drain).expect("piped");
        let read = decode(&bytes).expect("read");
        assert_eq!((piped.pcm, piped.truncated), (read.pcm, read.truncated));
    }
}

#[test]
fn a_change_of_format_starts_a_new_chunk() {
    // Two ogg streams, one after the other: 16 kHz vorbis, then opus, which is 48 kHz.
    let (first, second) = (fixture("call-01.ogg"), fixture("call-01.opus"));
    let decoded = decode(&[first.clone(), second.clone()].concat()).expect("chained");
    let [a, b] = [first, second].map(|bytes| decode(&bytes).expect("single"));
    assert_eq!(decoded.formats, [a.format, b.format]);
    assert_eq!(decoded.chunk_bytes, [a.chunk_bytes, b.chunk_bytes].concat());
    assert_eq!(decoded.pcm, [a.pcm, b.pcm].concat());
    assert!(!decoded.truncated);
}

#[test]
fn joined_mp3_files_are_read_to_the_end() {
    // The head of the first one knows its own length only.
    let one = fixture("call-01.mp3");
    let joined = decode(&[one.clone(), one].concat()).expect("joined");
    assert!((5.8..6.3).contains(&joined.seconds()), "{} s", joined.seconds());
}

#[test]
fn public_files_are_read_where_they_are() {
    let root = std::env::var_os("VOXFLEET_TEST_DATA")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let folder = root.join("formats");
    if !folder.is_dir() {
        eprintln!("skipped: no folder {}", folder.display());
        return;
    }
    let expected = [
        ("common_voice_en_651325.mp3", 48_000, 1),
        ("lhotse_mono_c0.opus", 48_000, 1),
        ("lhotse_mono_c0.wav", 8_000, 1),
        ("lhotse_stereo.mp3", 8_000, 2),
        ("lhotse_stereo.opus", 48_000, 2),
        ("lhotse_stereo.wav", 8_000, 2),
        ("rodio_audacity24bit_level5.flac", 44_100, 1),
        ("rodio_audacity32bit_int.wav", 44_100, 2),
        ("rodio_beep3.ogg", 44_100, 1),
        ("rodio_music.m4a", 44_100, 2),
        ("rodio_music.opus", 48_000, 2),
    ];
    for (name, rate_hz, channels) in expected {
        let begun = Instant::now();
        let file = File::open(folder.join(name)).expect(name);
        let decoded =
            Decoder::open(file, Some(name), &limits()).and_then(drain).unwrap_or_else(|e| panic!("{name}: {e}"));
        eprintln!(
            "{name}: {} {:.2} s, total {:?}, truncated {}, damaged {}, {:.0} x real time",
            decoded.format,
            decoded.seconds(),
            decoded.total_ms,
            decoded.truncated,
            decoded.damaged,
            decoded.seconds() / begun.elapsed().as_secs_f64()
        );
        assert_eq!((decoded.format.rate_hz, decoded.format.channels), (rate_hz, channels), "{name}");
        assert!(!decoded.truncated && decoded.damaged == 0, "{name}");
    }
}
