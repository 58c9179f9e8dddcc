//! Log mel filterbanks: what speaker encoders hear.
//!
//! Two definitions, because an encoder is only right with the one it was trained on: Kaldi's `compute-fbank-feats`
//! (WeSpeaker, CAM++, ours) and NeMo's `AudioToMelSpectrogramPreprocessor` (TitaNet). No dither in either, so the same
//! samples give the same features. Features of a stretch are computed once; what an embedding is made of are rows of
//! them, chosen by [`Features::select`] and then normalised by [`FrontEnd::normalise`] over what was chosen.

use std::{f32::consts::PI, ops::Range, sync::Arc};

use realfft::{RealFftPlanner, RealToComplex, num_complex::Complex};
use serde::{Deserialize, Serialize};

use crate::RATE_HZ;

/// Samples of one frame (25 ms).
pub const FRAME: usize = 400;
/// Samples from frame to frame (10 ms).
pub const SHIFT: usize = 160;
/// The frame's length for the FFT.
const PADDED: usize = 512;
const PREEMPHASIS: f32 = 0.97;

/// Which definition of features an encoder was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrontEnd {
    /// Kaldi: povey window, mean removed in each frame, edges snipped, 20 Hz to Nyquist; mean over time subtracted.
    Kaldi { bins: usize },
    /// NeMo: Hann window, frames centred, Slaney's mel scale and area, mean and variance over time made 0 and 1.
    Nemo { bins: usize },
}

/// A matrix of features, frame after frame.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Features {
    bins: usize,
    data: Vec<f32>,
}

impl Features {
    /// Panics where `data` is not whole frames.
    pub fn new(bins: usize, data: Vec<f32>) -> Self {
        assert!(bins > 0 && data.len().is_multiple_of(bins), "whole frames");
        Self { bins, data }
    }

    pub fn bins(&self) -> usize {
        self.bins
    }

    pub fn frames(&self) -> usize {
        self.data.len().checked_div(self.bins).unwrap_or(0)
    }

    /// All values, frame after frame.
    pub fn values(&self) -> &[f32] {
        &self.data
    }

    pub fn frame(&self, index: usize) -> &[f32] {
        &self.data[index * self.bins..][..self.bins]
    }

    /// The frames of some ranges, one after another; what lies beyond the end is left out.
    pub fn select(&self, ranges: &[Range<usize>]) -> Self {
        let frames = self.frames();
        let data = ranges
            .iter()
            .map(|r| r.start.min(frames)..r.end.min(frames))
            .flat_map(|r| &self.data[r.start * self.bins..r.end.max(r.start) * self.bins])
            .copied()
            .collect();
        Self { bins: self.bins, data }
    }

    /// Repeats the frames until there are `least` of them: encoders want some context even of a short word.
    pub fn tiled(mut self, least: usize) -> Self {
        let once = self.data.len();
        while once > 0 && self.frames() < least {
            self.data.extend_from_within(..once);
        }
        self
    }

    /// Mean of each bin over time.
    fn means(&self) -> Vec<f64> {
        let mut means = vec![0f64; self.bins];
        for frame in self.data.chunks_exact(self.bins) {
            means.iter_mut().zip(frame).for_each(|(m, x)| *m += f64::from(*x));
        }
        let frames = self.frames().max(1) as f64;
        means.iter_mut().for_each(|m| *m /= frames);
        means
    }
}

impl FrontEnd {
    pub fn bins(self) -> usize {
        match self {
            Self::Kaldi { bins } | Self::Nemo { bins } => bins,
        }
    }

    /// What an encoder of this kind wants done over the frames that make one embedding.
    pub fn normalise(self, features: &mut Features) {
        if features.frames() == 0 {
            return;
        }
        let means = features.means();
        let scales: Vec<f64> = match self {
            Self::Kaldi { .. } => vec![1.0; means.len()],
            Self::Nemo { .. } => {
                let mut squares = vec![0f64; means.len()];
                for frame in features.data.chunks_exact(features.bins) {
                    for (square, (x, mean)) in squares.iter_mut().zip(frame.iter().zip(&means)) {
                        *square += (f64::from(*x) - mean).powi(2);
                    }
                }
                let freedom = features.frames().saturating_sub(1).max(1) as f64;
                squares.iter().map(|s| 1.0 / ((s / freedom).sqrt() + 1e-5)).collect()
            }
        };
        for frame in features.data.chunks_exact_mut(features.bins) {
            for (x, (mean, scale)) in frame.iter_mut().zip(means.iter().zip(&scales)) {
                *x = ((f64::from(*x) - mean) * scale) as f32;
            }
        }
    }
}

/// One triangular filter: its weights and the FFT bin of the first.
struct Filter {
    first: usize,
    weights: Vec<f32>,
}

/// Computes features; holds the window, the filters and the FFT's tables.
pub struct Extractor {
    front_end: FrontEnd,
    window: Vec<f32>,
    filters: Vec<Filter>,
    fft: Arc<dyn RealToComplex<f32>>,
    input: Vec<f32>,
    scratch: Vec<Complex<f32>>,
    spectrum: Vec<Complex<f32>>,
    power: Vec<f32>,
}

impl Extractor {
    pub fn new(front_end: FrontEnd) -> Self {
        let fft = RealFftPlanner::<f32>::new().plan_fft_forward(PADDED);
        let hann = |i: usize| 0.5 - 0.5 * (2.0 * PI * i as f32 / (FRAME - 1) as f32).cos();
        let (window, filters) = match front_end {
            FrontEnd::Kaldi { bins } => ((0..FRAME).map(|i| hann(i).powf(0.85)).collect(), kaldi_filters(bins)),
            FrontEnd::Nemo { bins } => ((0..FRAME).map(hann).collect(), slaney_filters(bins)),
        };
        Self {
            front_end,
            window,
            filters,
            input: fft.make_input_vec(),
            scratch: fft.make_scratch_vec(),
            spectrum: fft.make_output_vec(),
            power: vec![0.0; PADDED / 2 + 1],
            fft,
        }
    }

    pub fn front_end(&self) -> FrontEnd {
        self.front_end
    }

    /// Log mel features of samples at 16 kHz in -1..1, not yet normalised. Kaldi's count of frames is
    /// `1 + (n - 400) / 160`, nothing below 400 samples; NeMo's `1 + n / 160`.
    pub fn features(&mut self, samples: &[f32]) -> Features {
        let data = match self.front_end {
            FrontEnd::Kaldi { bins } => self.kaldi(samples, bins),
            FrontEnd::Nemo { bins } => self.nemo(samples, bins),
        };
        Features { bins: self.front_end.bins(), data }
    }

    fn kaldi(&mut self, samples: &[f32], bins: usize) -> Vec<f32> {
        let frames = (samples.len() + SHIFT).saturating_sub(FRAME) / SHIFT;
        let mut data = Vec::with_capacity(frames * bins);
        let mut frame = [0f32; FRAME];
        for at in 0..frames {
            // Kaldi's numbers are those of 16-bit samples.
            frame.iter_mut().zip(&samples[at * SHIFT..]).for_each(|(x, s)| *x = s * 32768.0);
            let mean = frame.iter().sum::<f32>() / FRAME as f32;
            let mut before = frame[0] - mean;
            for (i, x) in frame.iter().enumerate() {
                let centred = x - mean;
                self.input[i] = (centred - PREEMPHASIS * before) * self.window[i];
                before = centred;
            }
            self.input[FRAME..].fill(0.0);
            self.filtered(&mut data, |energy| energy.max(f32::EPSILON).ln());
        }
        data
    }

    fn nemo(&mut self, samples: &[f32], bins: usize) -> Vec<f32> {
        let frames = if samples.is_empty() { 0 } else { 1 + samples.len() / SHIFT };
        let emphasised = |at: usize| match at {
            0 => samples[0],
            _ => samples[at] - PREEMPHASIS * samples[at - 1],
        };
        let mut data = Vec::with_capacity(frames * bins);
        let offset = (PADDED - FRAME) / 2;
        for at in 0..frames {
            self.input.fill(0.0);
            for i in 0..FRAME {
                // The frame's centre lies at `at * SHIFT`; outside of the samples is silence.
                let Some(sample) = (at * SHIFT + offset + i).checked_sub(PADDED / 2) else { continue };
                if sample < samples.len() {
                    self.input[offset + i] = emphasised(sample) * self.window[i];
                }
            }
            self.filtered(&mut data, |energy| (energy + 2f32.powi(-24)).ln());
        }
        data
    }

    /// The power spectrum of `input` through the filters, appended.
    fn filtered(&mut self, data: &mut Vec<f32>, log: impl Fn(f32) -> f32) {
        if self.fft.process_with_scratch(&mut self.input, &mut self.spectrum, &mut self.scratch).is_err() {
            // Only a wrong buffer length can do this, and the buffers are the FFT's own.
            unreachable!("the FFT made these buffers");
        }
        self.power.iter_mut().zip(&self.spectrum).for_each(|(p, c)| *p = c.norm_sqr());
        data.extend(self.filters.iter().map(|filter| {
            log(filter.weights.iter().zip(&self.power[filter.first..]).map(|(weight, power)| weight * power).sum())
        }));
    }
}

/// Kaldi's filters: triangles on the scale `1127 ln(1 + f / 700)` between 20 Hz and Nyquist; Nyquist's own bin is not used.
fn kaldi_filters(bins: usize) -> Vec<Filter> {
    let mel = |hz: f32| 1127.0 * (1.0 + hz / 700.0).ln();
    let (low, high) = (mel(20.0), mel(RATE_HZ as f32 / 2.0));
    let step = (high - low) / (bins + 1) as f32;
    let width = RATE_HZ as f32 / PADDED as f32;
    (0..bins)
        .map(|bin| {
            let left = low + bin as f32 * step;
            let (centre, right) = (left + step, left + 2.0 * step);
            triangle((0..PADDED / 2).map(|i| {
                let at = mel(width * i as f32);
                if at <= left || at >= right {
                    0.0
                } else if at <= centre {
                    (at - left) / (centre - left)
                } else {
                    (right - at) / (right - centre)
                }
            }))
        })
        .collect()
}

/// Slaney's filters as librosa makes them: linear below 1 kHz, logarithmic above, each of the same area.
fn slaney_filters(bins: usize) -> Vec<Filter> {
    const LINEAR_STEP: f64 = 200.0 / 3.0;
    const LOG_FROM_HZ: f64 = 1000.0;
    let log_from = LOG_FROM_HZ / LINEAR_STEP;
    let log_step = 6.4f64.ln() / 27.0;
    let mel = |hz: f64| {
        if hz < LOG_FROM_HZ { hz / LINEAR_STEP } else { log_from + (hz / LOG_FROM_HZ).ln() / log_step }
    };
    let hz = |mel: f64| {
        if mel < log_from { mel * LINEAR_STEP } else { LOG_FROM_HZ * (log_step * (mel - log_from)).exp() }
    };
    let high = mel(f64::from(RATE_HZ) / 2.0);
    let edge = |i: usize| hz(high * i as f64 / (bins + 1) as f64);
    let width = f64::from(RATE_HZ) / PADDED as f64;
    (0..bins)
        .map(|bin| {
            let (left, centre, right) = (edge(bin), edge(bin + 1), edge(bin + 2));
            triangle((0..=PADDED / 2).map(|i| {
                let at = width * i as f64;
                let rise = (at - left) / (centre - left);
                let fall = (right - at) / (right - centre);
                (rise.min(fall).max(0.0) * 2.0 / (right - left)) as f32
            }))
        })
        .collect()
}

/// Only what is not nought of a filter's weights.
fn triangle(weights: impl Iterator<Item = f32>) -> Filter {
    let weights: Vec<f32> = weights.collect();
    let first = weights.iter().position(|w| *w > 0.0).unwrap_or(0);
    let end = weights.iter().rposition(|w| *w > 0.0).map_or(first, |last| last + 1);
    Filter { first, weights: weights[first..end].to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(hz: f32, samples: usize) -> Vec<f32> {
        (0..samples).map(|i| 0.3 * (2.0 * PI * hz * i as f32 / RATE_HZ as f32).sin()).collect()
    }

    #[test]
    fn frames_are_counted_as_their_makers_do() {
        for (samples, kaldi, nemo) in [(0, 0, 0), (399, 0, 3), (400, 1, 3), (559, 1, 4), (560, 2, 4), (16_000, 98, 101)]
        {
            let samples = vec![0.1; samples];
            assert_eq!(Extractor::new(FrontEnd::Kaldi { bins: 80 }).features(&samples).frames(), kaldi);
            assert_eq!(Extractor::new(FrontEnd::Nemo { bins: 80 }).features(&samples).frames(), nemo);
        }
    }

    #[test]
    fn a_higher_tone_fills_a_higher_bin() {
        for front_end in [FrontEnd::Kaldi { bins: 80 }, FrontEnd::Nemo { bins: 80 }] {
            let peaks: Vec<_> = [200.0, 700.0, 2_000.0, 6_000.0]
                .map(|hz| {
                    let features = Extractor::new(front_end).features(&tone(hz, 8_000));
                    let frame = features.frame(20);
                    (0..80).max_by(|a, b| frame[*a].total_cmp(&frame[*b])).unwrap()
                })
                .into();
            assert!(peaks.is_sorted() && peaks[0] < peaks[3], "{peaks:?}");
        }
    }

    #[test]
    fn silence_is_the_floor_and_nothing_else() {
        let features = Extractor::new(FrontEnd::Kaldi { bins: 80 }).features(&[0.0; 4_000]);
        assert!(features.values().iter().all(|x| *x == f32::EPSILON.ln()));
    }

    #[test]
    fn normalised_features_have_no_mean_and_nemos_have_variance_one() {
        let mut noise = 1u32;
        let samples: Vec<f32> = (0..16_000)
            .map(|_| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (noise >> 16) as f32 / 65_536.0 - 0.5
            })
            .collect();
        for (front_end, variance) in [(FrontEnd::Kaldi { bins: 80 }, None), (FrontEnd::Nemo { bins: 80 }, Some(1.0))] {
            let raw = Extractor::new(front_end).features(&samples);
            let mut features = raw.clone();
            front_end.normalise(&mut features);
            let step = |of: &Features| of.frame(9)[7] - of.frame(5)[7];
            assert!(variance.is_some() || (step(&features) - step(&raw)).abs() < 1e-3, "only the mean is taken away");
            assert!(features.means().iter().all(|m| m.abs() < 1e-4));
            if let Some(variance) = variance {
                let squares: f32 = (0..features.frames()).map(|i| features.frame(i)[7].powi(2)).sum();
                let measured = squares / (features.frames() - 1) as f32;
                assert!((measured - variance).abs() < 1e-3, "{measured}");
            }
        }
    }

    #[test]
    fn chosen_frames_come_in_order_and_are_repeated_to_a_length() {
        let features = Features::new(2, (0..10).map(|i| i as f32).collect());
        let some = features.select(&[1..2, 3..9]);
        assert_eq!(some.values(), [2.0, 3.0, 6.0, 7.0, 8.0, 9.0]);
        assert_eq!(some.clone().tiled(7).frames(), 9);
        assert_eq!(some.clone().tiled(3), some);
        assert_eq!(features.select(&[]).tiled(5).frames(), 0);
    }
}
