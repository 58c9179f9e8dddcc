//! Two hums stand for two people: networks that know their pitch stand for the real ones, so what is tested is all that
//! lies between.

use std::f32::consts::PI;

use super::*;
use crate::powerset::{CLASSES, FIELD, STEP};

const HUMS: [f32; 3] = [400.0, 1_300.0, 3_500.0];

/// Who hums when, in seconds, over faint noise.
fn recording(seconds: f64, hums: &[(usize, f64, f64)]) -> Vec<f32> {
    let mut noise = 7u32;
    (0..(seconds * 16_000.0) as usize)
        .map(|i| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = i as f64 / 16_000.0;
            let hiss = ((noise >> 16) as f32 / 65_536.0 - 0.5) * 0.002;
            let active = hums.iter().filter(|(_, from, to)| at >= *from && at < *to);
            hiss + active
                .map(|(who, ..)| 0.2 * (2.0 * PI * HUMS[*who] * (i % 16_000) as f32 / 16_000.0).sin())
                .sum::<f32>()
        })
        .collect()
}

/// How loud one pitch is.
fn loudness(samples: &[f32], hz: f32) -> f32 {
    let (mut re, mut im) = (0f32, 0f32);
    for (i, sample) in samples.iter().enumerate() {
        let angle = 2.0 * PI * hz * i as f32 / 16_000.0;
        re += sample * angle.cos();
        im += sample * angle.sin();
    }
    (re * re + im * im).sqrt() / samples.len() as f32
}

/// Numbers people in order of their first hum in the window, as a real one may.
struct Pitches {
    missing: usize,
}

impl Segmenter for Pitches {
    fn logits(&mut self, samples: &[f32]) -> Result<Vec<[f32; CLASSES]>, ModelError> {
        let mut numbers: Vec<usize> = Vec::new();
        let frames = powerset::frames(samples.len()) - self.missing;
        Ok((0..frames)
            .map(|frame| {
                let heard = &samples[frame * STEP + FIELD / 3..][..FIELD / 3];
                let active: Vec<usize> = (0..HUMS.len()).filter(|who| loudness(heard, HUMS[*who]) > 0.015).collect();
                for who in &active {
                    if !numbers.contains(who) {
                        numbers.push(*who);
                    }
                }
                let mut local: Vec<usize> =
                    active.iter().filter_map(|who| numbers.iter().position(|n| n == who)).collect();
                local.sort_unstable();
                let class = match local[..] {
                    [] => 0,
                    [one] => one + 1,
                    [0, 1] => 4,
                    [0, 2] => 5,
                    _ => 6,
                };
                let mut logits = [-9.0; CLASSES];
                logits[class] = -0.001;
                logits
            })
            .collect())
    }
}

/// How much of the time each bin is as loud as it gets: a hum is steady and hiss is not.
struct Steadiness {
    dims: usize,
}

impl Embedder for Steadiness {
    fn encoder(&self) -> &str {
        "steadiness"
    }

    fn dims(&self) -> usize {
        self.dims
    }

    fn front_end(&self) -> FrontEnd {
        FrontEnd::Kaldi { bins: 80 }
    }

    fn embed(&mut self, features: &Features) -> Result<Vec<f32>, ModelError> {
        let bin = |bin: usize| (0..features.frames()).map(move |frame| features.frame(frame)[bin]);
        Ok((0..80)
            .map(|b| {
                let mut levels: Vec<f32> = bin(b).collect();
                levels.sort_by(f32::total_cmp);
                // Not the loudest frame: a hum begins and ends with a click.
                let loud = levels[levels.len() * 9 / 10];
                let steady = levels.iter().filter(|x| (loud - **x).abs() < 0.3).count();
                (steady as f32 / features.frames() as f32).powi(2)
            })
            .collect())
    }
}

const FROM: u64 = 1_000_000;

fn heard(samples: &[f32], segmentation: bool, speech: &[Range<u64>]) -> Vec<Voiced> {
    let stretch = Stretch { samples, from_sample: FROM, speech };
    let mut pitches = Pitches { missing: 0 };
    let segmenter: Option<&mut dyn Segmenter> = if segmentation { Some(&mut pitches) } else { None };
    let mut listener = Listener::new(FrontEnd::Kaldi { bins: 80 }, Hearing::default());
    listener.voices(stretch, segmenter, &mut Steadiness { dims: 80 }).unwrap()
}

fn seconds(piece: &Voiced) -> (f64, f64) {
    ((piece.from_sample - FROM) as f64 / 16_000.0, (piece.to_sample - FROM) as f64 / 16_000.0)
}

fn likeness(a: &Voiced, b: &Voiced) -> f32 {
    1.0 - crate::cluster::cosine_distance(a.embedding.as_ref().unwrap(), b.embedding.as_ref().unwrap())
}

#[track_caller]
fn assert_at(piece: &Voiced, from: f64, to: f64) {
    let (start, end) = seconds(piece);
    assert!((start - from).abs() < 0.08 && (end - to).abs() < 0.08, "{start}..{end} instead of {from}..{to}");
}

const ALL: [Range<u64>; 1] = [FROM..FROM + 16_000 * 60];

#[test]
fn turns_are_where_people_speak_and_sound_like_them() {
    let samples = recording(9.0, &[(0, 0.5, 3.0), (1, 3.5, 6.0), (0, 6.5, 8.0)]);
    let pieces = heard(&samples, true, &ALL);
    assert_eq!(pieces.len(), 3, "{pieces:?}");
    assert_at(&pieces[0], 0.5, 3.0);
    assert_at(&pieces[1], 3.5, 6.0);
    assert_at(&pieces[2], 6.5, 8.0);
    assert_eq!(pieces[0].track, pieces[2].track);
    assert_ne!(pieces[0].track, pieces[1].track);
    assert!(likeness(&pieces[0], &pieces[2]) > 0.9 && likeness(&pieces[0], &pieces[1]) < 0.5);
    assert!(pieces.iter().all(|p| !p.overlapped && p.reliable_ms + 200 > p.duration_ms()));
    let length: f32 = pieces[0].embedding.as_ref().unwrap().iter().map(|x| x * x).sum();
    assert!((length - 1.0).abs() < 1e-4);
}

#[test]
fn what_two_say_at_once_is_in_neither_embedding() {
    let samples = recording(9.0, &[(0, 1.0, 4.5), (1, 3.0, 6.0), (1, 7.0, 8.5)]);
    let pieces = heard(&samples, true, &ALL);
    assert_eq!(pieces.len(), 3, "{pieces:?}");
    assert_at(&pieces[0], 1.0, 4.5);
    assert_at(&pieces[1], 3.0, 6.0);
    assert!(likeness(&pieces[1], &pieces[2]) > 0.9 && likeness(&pieces[0], &pieces[1]) < 0.5);
    assert!(pieces[1].reliable_ms < 1_700, "{}", pieces[1].reliable_ms);
    // Somebody who is only heard under somebody else.
    let pieces = heard(&recording(6.0, &[(0, 0.5, 5.0), (1, 2.0, 3.5)]), true, &ALL);
    let hidden: Vec<_> = pieces.iter().filter(|p| p.overlapped).collect();
    assert_eq!(hidden.len(), 1, "{pieces:?}");
    assert_at(hidden[0], 2.0, 3.5);
    assert_eq!(hidden[0].reliable_ms, 0);
    // For a moment only: that was nobody.
    let pieces = heard(&recording(6.0, &[(0, 0.5, 5.0), (1, 2.0, 2.3)]), true, &ALL);
    assert!(pieces.iter().all(|p| !p.overlapped), "{pieces:?}");
}

#[test]
fn people_are_followed_through_windows_and_long_turns_come_in_pieces() {
    let samples = recording(31.0, &[(0, 1.0, 12.5), (1, 13.0, 18.0), (0, 18.5, 23.0), (2, 23.5, 30.0)]);
    let pieces = heard(&samples, true, &ALL);
    assert!(pieces.iter().all(|p| p.duration_ms() <= 4_000 && p.reliable_ms >= 1_500), "{pieces:?}");
    let speaker = |p: &&Voiced| match seconds(p).0 {
        at if at < 12.7 => 0,
        at if at < 18.2 => 1,
        at if at < 23.2 => 0,
        _ => 2,
    };
    for (a, b) in pieces.iter().zip(pieces.iter().skip(1)) {
        let same = speaker(&a) == speaker(&b);
        assert_eq!(likeness(a, b) > 0.8, same, "{:?} {:?}", seconds(a), seconds(b));
        assert!(!same || a.track == b.track, "{:?} {:?}", seconds(a), seconds(b));
        assert!(a.to_sample <= b.from_sample + 1_600);
    }
    assert_at(&pieces[0], 1.0, 1.0 + 11.5 / 3.0);
}

#[test]
fn without_segmentation_a_turn_ends_with_a_pause_or_another_voice() {
    let samples = recording(12.0, &[(0, 0.0, 3.6), (1, 3.6, 7.2), (1, 9.0, 11.0)]);
    let pieces = heard(&samples, false, &[FROM..FROM + 115_200, FROM + 144_000..FROM + 176_000]);
    let turns: Vec<_> = pieces.iter().map(seconds).collect();
    assert_eq!(turns.len(), 3, "{turns:?}");
    assert!((turns[0].1 - 3.6).abs() <= 0.3 && turns[0].1 == turns[1].0, "{turns:?}");
    assert_eq!((turns[0].0, turns[1].1, turns[2]), (0.0, 7.2, (9.0, 11.0)));
    assert!(likeness(&pieces[1], &pieces[2]) > 0.9 && likeness(&pieces[0], &pieces[1]) < 0.6);
    let tracks: Vec<u32> = pieces.iter().map(|p| p.track).collect();
    assert_eq!(tracks, [0, 1, 2]);
}

#[test]
fn only_voice_activity_is_somebody() {
    let samples = recording(9.0, &[(0, 0.5, 3.0), (1, 4.0, 8.0)]);
    let pieces = heard(&samples, true, &[FROM + 80_000..FROM + 112_000]);
    assert_eq!(pieces.len(), 1);
    assert_at(&pieces[0], 4.95, 7.05);
    assert!(heard(&samples, true, &[]).is_empty() && heard(&samples, false, &[]).is_empty());
    assert!(heard(&[], true, &ALL).is_empty() && heard(&[], false, &ALL).is_empty());
}

#[test]
fn a_word_is_heard_and_a_click_is_not() {
    let samples = recording(1.0, &[(0, 0.3, 0.6)]);
    let word = heard(&samples, false, &[FROM + 4_800..FROM + 9_600]);
    assert!(word[0].embedding.is_some() && word[0].reliable_ms == 300);
    let click = heard(&samples, false, &[FROM + 4_800..FROM + 5_000]);
    assert!(click[0].embedding.is_none());
}

#[test]
fn networks_of_the_wrong_shape_are_refused() {
    let samples = recording(3.0, &[(0, 0.5, 2.5)]);
    let stretch = Stretch { samples: &samples, from_sample: FROM, speech: &ALL };
    let mut listener = Listener::new(FrontEnd::Kaldi { bins: 80 }, Hearing::default());
    let short = listener.voices(stretch, Some(&mut Pitches { missing: 1 }), &mut Steadiness { dims: 80 });
    assert!(matches!(short, Err(ModelError::Segmentation(_))));
    let other = listener.voices(stretch, Some(&mut Pitches { missing: 0 }), &mut Steadiness { dims: 81 });
    assert!(matches!(other, Err(ModelError::Encoder(_))));
}
