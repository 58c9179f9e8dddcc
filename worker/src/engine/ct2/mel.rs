//! Whisper's picture of sound: the logarithm of the energy in 80 or 128 bands, a hundred times a second; pure.
//!
//! Frames of 25 ms under a periodic Hann window, 10 ms apart, the first centred on the first sample with the samples before
//! it mirrored; silence behind the last. Triangles on Slaney's mel scale, each of area 1. The logarithm (base 10) ends 8
//! below the loudest point of the whole window and is brought to about -1 to 1. That is the formula to a thousandth, and
//! whisper.cpp decodes it as its own (tests).

use std::{f64::consts::PI, sync::Arc};

use realfft::{RealFftPlanner, RealToComplex, num_complex::Complex};

const RATE_HZ: f64 = 16_000.0;
const FRAME: usize = 400;
const HOP: usize = 160;
const BINS: usize = FRAME / 2 + 1;
/// Smallest energy that is told from silence.
const FLOOR: f32 = 1e-10;
/// How far below the loudest point the quietest lies, in powers of ten.
const RANGE: f32 = 8.0;

/// One triangle: the bin it begins at and its weights.
struct Band {
    first: usize,
    weights: Vec<f32>,
}

/// Makes spectrograms; holds the window, the bands and the tables of the Fourier transform.
pub struct LogMel {
    window: Vec<f32>,
    bands: Vec<Band>,
    fft: Arc<dyn RealToComplex<f32>>,
    input: Vec<f32>,
    scratch: Vec<Complex<f32>>,
    spectrum: Vec<Complex<f32>>,
}

/// A window of sound.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrogram {
    bands: usize,
    /// Frame by frame; those behind the sound are all `silence`.
    values: Vec<f32>,
    silence: f32,
    /// Frames that whisper.cpp counts for the sound alone.
    frames: usize,
}

impl LogMel {
    pub fn new(bands: usize) -> Self {
        let fft = RealFftPlanner::<f32>::new().plan_fft_forward(FRAME);
        let hann = |n: usize| (0.5 - 0.5 * (2.0 * PI * n as f64 / FRAME as f64).cos()) as f32;
        let bands = filters(bands)
            .iter()
            .map(|row| {
                let first = row.iter().position(|w| *w > 0.0).unwrap_or(0);
                let end = row.iter().rposition(|w| *w > 0.0).map_or(first, |last| last + 1);
                Band { first, weights: row[first..end].to_vec() }
            })
            .collect();
        Self {
            window: (0..FRAME).map(hann).collect(),
            bands,
            input: fft.make_input_vec(),
            scratch: fft.make_scratch_vec(),
            spectrum: fft.make_output_vec(),
            fft,
        }
    }

    /// Of mono samples at 16 kHz, -1 to 1.
    pub fn spectrogram(&mut self, samples: &[f32]) -> Spectrogram {
        let energies = self.energies(samples, &[]);
        self.picture(energies, samples.len())
    }

    /// Frames that lie within so many samples whole: more sound behind them changes none of them.
    pub fn whole_frames(samples: usize) -> usize {
        if samples < FRAME / 2 { 0 } else { (samples - FRAME / 2) / HOP + 1 }
    }

    /// The logarithms as they are, frame by frame. `known` are those of the first frames, worked out before.
    pub fn energies(&mut self, samples: &[f32], known: &[f32]) -> Vec<f32> {
        // Frames that reach into the sound; whisper.cpp takes what lies half a frame behind it for silence.
        let heard = (samples.len() + FRAME / 2) / HOP + 1;
        let mut energies = Vec::with_capacity(heard * self.bands.len());
        energies.extend_from_slice(known);
        for frame in known.len() / self.bands.len()..heard {
            self.frame(samples, frame, &mut energies);
        }
        energies
    }

    pub fn bands(&self) -> usize {
        self.bands.len()
    }

    /// What the encoder sees of the energies of so many samples.
    pub fn picture(&self, energies: Vec<f32>, samples: usize) -> Spectrogram {
        let mut values = energies;
        let loudest = values.iter().copied().fold(FLOOR.log10(), f32::max);
        let quietest = loudest - RANGE;
        let bring = |value: f32| (value.max(quietest) + 4.0) / 4.0;
        values.iter_mut().for_each(|value| *value = bring(*value));
        let frames = 1 + (samples + FRAME / 2).saturating_sub(FRAME) / HOP;
        Spectrogram { bands: self.bands.len(), values, silence: bring(FLOOR.log10()), frames }
    }

    fn frame(&mut self, samples: &[f32], frame: usize, values: &mut Vec<f32>) {
        for (n, (input, window)) in self.input.iter_mut().zip(&self.window).enumerate() {
            let place = frame * HOP + n;
            let sample = match place.checked_sub(FRAME / 2) {
                Some(after) => samples.get(after),
                None => samples.get(FRAME / 2 - place),
            };
            *input = sample.copied().unwrap_or(0.0) * window;
        }
        // Its lengths are those it was planned for.
        if self.fft.process_with_scratch(&mut self.input, &mut self.spectrum, &mut self.scratch).is_err() {
            self.spectrum.fill(Complex::default());
        }
        for band in &self.bands {
            let bins = &self.spectrum[band.first..];
            let energy: f32 = bins.iter().zip(&band.weights).map(|(bin, weight)| bin.norm_sqr() * weight).sum();
            values.push(energy.max(FLOOR).log10());
        }
    }
}

impl Spectrogram {
    /// Frames of the sound alone, without the silence behind it.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// `count` frames from `from` on, band by band, as the encoder takes them; behind the sound is silence.
    pub fn bands_of(&self, from: usize, count: usize, out: &mut Vec<f32>) {
        let heard = self.values.len() / self.bands;
        let known = heard.saturating_sub(from).min(count);
        for band in 0..self.bands {
            out.extend((from..from + known).map(|frame| self.values[frame * self.bands + band]));
            out.extend(std::iter::repeat_n(self.silence, count - known));
        }
    }
}

/// `bands` rows of [`BINS`] weights.
fn filters(bands: usize) -> Vec<Vec<f32>> {
    let top = mel_of(RATE_HZ / 2.0);
    let edges: Vec<f64> = (0..bands + 2).map(|n| hz_of(top * n as f64 / (bands + 1) as f64)).collect();
    edges
        .windows(3)
        .map(|edge| {
            let area = 2.0 / (edge[2] - edge[0]);
            (0..BINS)
                .map(|bin| {
                    let hz = bin as f64 * RATE_HZ / FRAME as f64;
                    let (rising, falling) =
                        ((hz - edge[0]) / (edge[1] - edge[0]), (edge[2] - hz) / (edge[2] - edge[1]));
                    (rising.min(falling).max(0.0) * area) as f32
                })
                .collect()
        })
        .collect()
}

/// Slaney's scale: even up to 1 kHz, then 27 steps for each factor of 6.4.
fn mel_of(hz: f64) -> f64 {
    if hz < 1_000.0 { hz * 3.0 / 200.0 } else { 15.0 + (hz / 1_000.0).ln() * 27.0 / 6.4f64.ln() }
}

fn hz_of(mel: f64) -> f64 {
    if mel < 15.0 { mel * 200.0 / 3.0 } else { 1_000.0 * ((mel - 15.0) * 6.4f64.ln() / 27.0).exp() }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::{CString, c_int},
        os::unix::ffi::OsStrExt as _,
        path::{Path, PathBuf},
    };

    use voxfleet_ggml::layout;
    use whisper_rs::whisper_rs_sys as sys;

    use super::*;

    fn micro() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin")
    }

    /// A tone that rises, over noise that is the same each time, with a silence in it.
    fn sound(samples: usize) -> Vec<f32> {
        let mut noise = 1u32;
        (0..samples)
            .map(|n| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let (t, hiss) = (n as f32 / 16_000.0, (noise >> 8) as f32 / (1 << 24) as f32 - 0.5);
                let gap = (8_000..12_000).contains(&n);
                if gap { 0.0 } else { 0.4 * (t * (300.0 + 900.0 * t)).sin() + 0.02 * hiss }
            })
            .collect()
    }

    #[test]
    fn bands_are_those_that_whisper_was_trained_with() {
        let layout = layout::read(&micro()).expect("model");
        let ours = filters(80).concat();
        let apart = ours.iter().zip(&layout.filters).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(ours.len() == layout.filters.len() && apart < 1e-7, "{apart}");
        assert_eq!(filters(128).len(), 128);
    }

    /// The formula, without a fast transform.
    fn slowly(samples: &[f32], bands: usize, frame: usize) -> Vec<f64> {
        let sample = |at: isize| samples.get(at.unsigned_abs()).map_or(0.0, |s| f64::from(*s));
        let windowed = |n: usize| {
            let hann = 0.5 - 0.5 * (2.0 * PI * n as f64 / 400.0).cos();
            sample((frame * 160 + n) as isize - 200) * hann
        };
        let energy: Vec<f64> = (0..201)
            .map(|bin| {
                let turn = |n: usize| 2.0 * PI * (bin * n) as f64 / 400.0;
                let (re, im) = (0..400).fold((0.0, 0.0), |(re, im), n| {
                    (re + windowed(n) * turn(n).cos(), im - windowed(n) * turn(n).sin())
                });
                re * re + im * im
            })
            .collect();
        let sum = |row: &Vec<f32>| row.iter().zip(&energy).map(|(w, e)| f64::from(*w) * e).sum::<f64>();
        filters(bands).iter().map(|row| sum(row).max(1e-10).log10()).collect()
    }

    #[test]
    fn the_fast_way_gives_what_the_formula_gives() {
        let samples = sound(20_000);
        for bands in [80, 128] {
            let made = LogMel::new(bands).spectrogram(&samples);
            let all: Vec<Vec<f64>> = (0..126).map(|frame| slowly(&samples, bands, frame)).collect();
            let loudest = all.iter().flatten().copied().fold(-10.0, f64::max);
            for (frame, formula) in all.iter().enumerate() {
                let mut ours = Vec::new();
                made.bands_of(frame, 1, &mut ours);
                for (ours, formula) in ours.iter().zip(formula) {
                    let expected = (formula.max(loudest - 8.0) + 4.0) / 4.0;
                    assert!((f64::from(*ours) - expected).abs() < 1e-3, "frame {frame}: {ours} for {expected}");
                }
            }
        }
    }

    #[test]
    fn behind_the_sound_is_silence() {
        let made = LogMel::new(80).spectrogram(&sound(16_000));
        assert_eq!(made.frames(), 99);
        let mut bands = Vec::new();
        made.bands_of(90, 200, &mut bands);
        assert_eq!(bands.len(), 80 * 200);
        for band in bands.chunks(200) {
            assert!(band[15..].iter().all(|v| *v == made.silence), "{band:?}");
        }
        let nothing = LogMel::new(80).spectrogram(&[0.0; 1_600]);
        assert!(nothing.values.iter().all(|v| *v == nothing.silence && *v == -1.5), "{:?}", nothing.values);
    }

    /// What whisper.cpp makes of the first token after a picture of its own and after ours.
    #[test]
    fn whisper_cpp_hears_the_same_in_our_picture() {
        let path = CString::new(micro().as_os_str().as_bytes()).expect("path");
        let samples = sound(3 * 16_000);
        let made = LogMel::new(80).spectrogram(&samples);
        let mut bands = Vec::new();
        made.bands_of(0, 3_300, &mut bands);
        // SAFETY: the context is alive throughout and used by this thread alone; lengths are those of the slices.
        let (theirs, ours, frames) = unsafe {
            let mut parameters = sys::whisper_context_default_params();
            parameters.use_gpu = false;
            parameters.flash_attn = false;
            let context = sys::whisper_init_from_file_with_params(path.as_ptr(), parameters);
            assert!(!context.is_null());
            let vocabulary = sys::whisper_n_vocab(context) as usize;
            let first = |context| {
                assert_eq!(sys::whisper_encode(context, 0, 1), 0);
                let start = sys::whisper_token_sot(context);
                assert_eq!(sys::whisper_decode(context, &start, 1, 0, 1), 0);
                std::slice::from_raw_parts(sys::whisper_get_logits(context), vocabulary).to_vec()
            };
            let count = samples.len() as c_int;
            assert_eq!(sys::whisper_pcm_to_mel(context, samples.as_ptr(), count, 1), 0);
            let frames = sys::whisper_n_len(context);
            let theirs = first(context);
            assert_eq!(sys::whisper_set_mel(context, bands.as_ptr(), 3_300, 80), 0);
            let ours = first(context);
            sys::whisper_free(context);
            (theirs, ours, frames)
        };
        assert_eq!(frames as usize, made.frames());
        // Its matrices are of eight bits and round what they multiply: the smallest difference may become a step.
        let apart = theirs.iter().zip(&ours).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let most = theirs.iter().map(|v| v.abs()).fold(0.0, f32::max);
        assert!(most > 1.0 && apart < most / 200.0, "logits up to {most} are {apart} apart");
    }
}
