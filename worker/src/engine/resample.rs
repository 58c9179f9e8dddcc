//! Any input rate to 16 kHz, sample-exact and independent of how the input is cut.
//!
//! Output sample `n` is the input at time `n / 16000` s: the filter's delay is taken out. Work goes on in blocks of a fixed
//! number of output samples, so the same input gives the same bits however it was chunked. Only the engine's stream uses
//! it; it starts a new one behind every final.

use audioadapter_buffers::direct::SequentialSlice;
use rubato::{
    Async, FixedAsync, Resampler, SincInterpolationParameters, SincInterpolationType, WindowFunction,
    audioadapter::{Adapter, AdapterMut},
    calculate_cutoff,
};
use voxfleet_schema::{SAMPLE_RATE_HZ, audio::RATES_HZ};

use super::EngineError;

/// Output samples per block: 10 ms, so that the resampler adds next to no latency of its own.
const BLOCK: usize = 160;

/// Filter length in periods of the lower of the two rates. 128 puts the transition band within 8 % of the lower Nyquist
/// frequency and images and aliases below -90 dB.
const FILTER_PERIODS: usize = 128;

const WINDOW: WindowFunction = WindowFunction::BlackmanHarris2;

/// Filter phases kept; between two of them the value is interpolated, with an error near -80 dB.
const PHASES: usize = 128;

/// How many zeros may stand in front of the input so that the filter's delay becomes a whole number of output samples.
const MAX_LEAD: usize = 512;

/// Resamples one mono stream to 16 kHz.
pub struct To16k {
    /// None = the input is 16 kHz already.
    filter: Option<Filter>,
    /// Samples handed out since `new` or `reset`.
    given: u64,
}

struct Filter {
    inner: Async<f32>,
    /// Zeros in front of the input, and output samples to leave out: together they undo the delay.
    lead: usize,
    delay: usize,
    to_skip: usize,
    /// Input not yet filtered.
    pending: Vec<f32>,
    block: Vec<f32>,
}

impl To16k {
    pub fn new(rate_hz: u32) -> Result<Self, EngineError> {
        if !RATES_HZ.contains(&rate_hz) {
            return Err(EngineError::Unsupported(format!("rate {rate_hz} Hz is outside 8000 to 192000")));
        }
        let filter = if rate_hz == SAMPLE_RATE_HZ { None } else { Some(Filter::new(rate_hz)?) };
        Ok(Self { filter, given: 0 })
    }

    /// Starts again at time 0, without building the filter anew.
    pub fn reset(&mut self) {
        self.given = 0;
        if let Some(filter) = &mut self.filter {
            filter.reset();
        }
    }

    /// Takes input frames and appends what they complete. Holds back up to 10 ms and half the filter's length.
    pub fn push(&mut self, frames: &[f32], out: &mut Vec<f32>) {
        let before = out.len();
        match &mut self.filter {
            None => out.extend_from_slice(frames),
            Some(filter) => {
                filter.pending.extend_from_slice(frames);
                filter.run(out);
            }
        }
        self.given += (out.len() - before) as u64;
    }

    /// Ends the input: silence follows it, until exactly `total_out` samples have come out since `new`. Not to be pushed
    /// to afterwards. A total below what has come out already adds nothing.
    pub fn flush(&mut self, total_out: u64, out: &mut Vec<f32>) {
        let Some(missing) = total_out.checked_sub(self.given).filter(|m| *m > 0) else {
            return;
        };
        let start = out.len();
        let end = start + usize::try_from(missing).unwrap_or(usize::MAX - start);
        if let Some(filter) = &mut self.filter {
            // Behind half a filter and what is pending (less than a block) there is only silence.
            let tail_end = end.min(start + filter.delay + 2 * BLOCK);
            while out.len() < tail_end {
                filter.push_silence();
                filter.run(out);
            }
        }
        out.resize(end, 0.0);
        self.given = total_out;
    }
}

impl Filter {
    fn new(rate_hz: u32) -> Result<Self, EngineError> {
        let ratio = f64::from(SAMPLE_RATE_HZ) / f64::from(rate_hz);
        let length = ((FILTER_PERIODS as f64 / ratio.min(1.0)).ceil() as usize).next_multiple_of(8);
        // The cut-off follows from the periods, not from the length: when sampling down, each period takes several taps.
        let parameters = SincInterpolationParameters::new(length, WINDOW)
            .f_cutoff(calculate_cutoff(FILTER_PERIODS, WINDOW))
            .oversampling_factor(PHASES)
            .interpolation(SincInterpolationType::Linear);
        let inner = Async::<f32>::new_sinc(ratio, 1.0, &parameters, BLOCK, 1, FixedAsync::Output)
            .map_err(|e| EngineError::Unsupported(format!("no resampler for {rate_hz} Hz: {e}")))?;
        let (lead, delay) = whole_delay(rate_hz, length);
        let mut filter = Self { inner, lead, delay, to_skip: 0, pending: Vec::new(), block: vec![0.0; BLOCK] };
        filter.rewind();
        Ok(filter)
    }

    fn reset(&mut self) {
        self.inner.reset();
        self.rewind();
    }

    fn rewind(&mut self) {
        self.to_skip = self.delay;
        self.pending.clear();
        self.pending.resize(self.lead, 0.0);
    }

    fn run(&mut self, out: &mut Vec<f32>) {
        let mut used = 0;
        loop {
            let needed = self.inner.input_frames_next();
            let Some(input) = self.pending.get(used..used + needed) else {
                break;
            };
            if let Err(why) = filter_block(&mut self.inner, input, &mut self.block) {
                // Only wrong buffer sizes get here. Silence keeps the clock right, and the log says so.
                tracing::error!(%why, "resampler refused a block");
                self.block.fill(0.0);
            }
            used += needed;
            let skip = self.to_skip.min(BLOCK);
            self.to_skip -= skip;
            out.extend_from_slice(&self.block[skip..]);
        }
        self.pending.drain(..used);
    }

    fn push_silence(&mut self) {
        let needed = self.inner.input_frames_next().saturating_sub(self.pending.len());
        self.pending.resize(self.pending.len() + needed, 0.0);
    }
}

fn filter_block(inner: &mut Async<f32>, input: &[f32], block: &mut [f32]) -> Result<(), Box<dyn std::error::Error>> {
    let from = SequentialSlice::new(input, 1, input.len())?;
    let mut into = SequentialSlice::new_mut(block, 1, BLOCK)?;
    let (from, into): (&dyn Adapter<f32>, &mut dyn AdapterMut<f32>) = (&from, &mut into);
    inner.process_into_buffer(from, into, None)?;
    Ok(())
}

/// Zeros to put in front and output samples to drop, so that sample 0 is the input at time 0.
///
/// rubato's sample `k` looks at input frame `(k + 1) * step - length / 2 + 1 / PHASES` with `step` = input frames per output
/// sample (its index moves before each sample is taken, and its filter phases are stored from the top). With `lead` zeros in
/// front, that is frame 0 for `k = (length / 2 - 1 / PHASES + lead) / step - 1`: the lead is taken that brings `k` closest to
/// a whole number.
fn whole_delay(rate_hz: u32, length: usize) -> (usize, usize) {
    let step = f64::from(rate_hz) / f64::from(SAMPLE_RATE_HZ);
    let delay_at = |lead: usize| (length as f64 / 2.0 - 1.0 / PHASES as f64 + lead as f64) / step - 1.0;
    let miss = |lead: &usize| (delay_at(*lead) - delay_at(*lead).round()).abs();
    let lead = (0..MAX_LEAD).min_by(|a, b| miss(a).total_cmp(&miss(b))).unwrap_or(0);
    (lead, delay_at(lead).round().max(0.0) as usize)
}

#[cfg(test)]
mod tests {
    use std::f64::consts::TAU;

    use super::*;

    const RATES: [u32; 12] =
        [8_000, 11_025, 12_345, 16_000, 22_050, 24_000, 32_000, 37_800, 44_100, 48_000, 96_000, 192_000];

    fn sine(rate_hz: u32, hz: f64, seconds: f64) -> Vec<f32> {
        let frames = (f64::from(rate_hz) * seconds) as usize;
        (0..frames).map(|n| (0.5 * (TAU * hz * n as f64 / f64::from(rate_hz)).sin()) as f32).collect()
    }

    fn noise(frames: usize) -> Vec<f32> {
        let mut state = 0x2545_f491_u32;
        (0..frames)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as f32 / u32::MAX as f32 - 0.5
            })
            .collect()
    }

    fn whole(rate_hz: u32, frames: &[f32]) -> Vec<f32> {
        let total = frames.len() as u64 * 16_000 / u64::from(rate_hz);
        let mut resampler = To16k::new(rate_hz).expect("rate");
        let mut out = Vec::new();
        resampler.push(frames, &mut out);
        assert!(out.len() as u64 <= total, "{rate_hz} Hz gave more than it was given");
        resampler.flush(total, &mut out);
        assert_eq!(out.len() as u64, total, "{rate_hz} Hz");
        out
    }

    /// Amplitude and phase (radians) at `hz`, by correlation over whole periods away from the edges.
    fn tone(samples: &[f32], hz: f64) -> (f64, f64) {
        let (from, len) = (1_600, 8_000);
        let (mut re, mut im) = (0.0, 0.0);
        for (n, s) in samples.iter().enumerate().skip(from).take(len) {
            let angle = TAU * hz * n as f64 / 16_000.0;
            re += f64::from(*s) * angle.sin();
            im += f64::from(*s) * angle.cos();
        }
        let scale = 2.0 / len as f64;
        ((re * re + im * im).sqrt() * scale, im.atan2(re))
    }

    #[test]
    fn chunking_changes_no_bit() {
        for rate_hz in RATES {
            let input = noise(rate_hz as usize / 3 + 17);
            let expected = whole(rate_hz, &input);
            for cut in [1, 7, 160, 441, 4_801] {
                let mut resampler = To16k::new(rate_hz).expect("rate");
                let mut out = Vec::new();
                input.chunks(cut).for_each(|chunk| resampler.push(chunk, &mut out));
                resampler.flush(expected.len() as u64, &mut out);
                assert!(out == expected, "{rate_hz} Hz in chunks of {cut}");
            }
        }
    }

    #[test]
    fn a_sine_keeps_frequency_amplitude_and_phase() {
        for rate_hz in RATES {
            for hz in [100.0, 1_000.0, 3_000.0] {
                let out = whole(rate_hz, &sine(rate_hz, hz, 1.0));
                let (amplitude, phase) = tone(&out, hz);
                assert!((amplitude - 0.5).abs() < 0.001, "{rate_hz} Hz, tone {hz}: amplitude {amplitude}");
                let delay_ms = (phase / TAU / hz * 1_000.0).abs();
                assert!(delay_ms < 0.005, "{rate_hz} Hz, tone {hz}: off by {delay_ms} ms");
            }
        }
    }

    #[test]
    fn what_cannot_be_represented_is_gone() {
        for rate_hz in [22_050, 44_100, 48_000, 96_000, 192_000] {
            for hz in [8_300.0, 9_000.0, 10_500.0] {
                let out = whole(rate_hz, &sine(rate_hz, hz, 1.0));
                let loudest = out[1_600..14_400].iter().fold(0.0_f32, |a, s| a.max(s.abs()));
                assert!(loudest < 0.0005, "{rate_hz} Hz, tone {hz}: alias of {loudest}, that is above -60 dB");
            }
        }
    }

    #[test]
    fn a_reset_is_a_new_start() {
        let input = noise(20_000);
        let expected = whole(44_100, &input);
        let mut resampler = To16k::new(44_100).expect("rate");
        resampler.push(&noise(1_234), &mut Vec::new());
        resampler.reset();
        let mut out = Vec::new();
        resampler.push(&input, &mut out);
        resampler.flush(expected.len() as u64, &mut out);
        assert!(out == expected);
    }

    #[test]
    fn counts_are_exact_whatever_is_asked() {
        for rate_hz in RATES {
            for (frames, total) in [(0, 0), (0, 5), (1, 1), (3, 1), (999, 12_345), (100_000, 1 << 17)] {
                let mut resampler = To16k::new(rate_hz).expect("rate");
                let mut out = Vec::new();
                resampler.push(&vec![0.25; frames.min(total as usize / 2)], &mut out);
                resampler.flush(total, &mut out);
                assert_eq!(out.len() as u64, total, "{rate_hz} Hz, {frames} frames");
            }
        }
    }

    #[test]
    fn impossible_rates_are_typed() {
        for rate_hz in [0, 1, 7_999, 192_001, u32::MAX] {
            assert!(matches!(To16k::new(rate_hz), Err(EngineError::Unsupported(_))), "{rate_hz}");
        }
    }
}
