//! whisper.cpp on single windows with every setting open: threads, encoder context, flash attention, GPU. Only
//! measurements use it; what the engine itself does with these settings stands one level above.

use std::path::Path;

use whisper_rs::{FullParams, SamplingStrategy, WhisperContext, WhisperContextParameters, WhisperState};

use super::{
    context::{Context, MIN_SAMPLES},
    decode_error, device,
};
use crate::engine::{EngineError, models};

/// What differs from one decode to the next; greedy at temperature 0, no fall-back, no word times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub threads: usize,
    pub context: Context,
    /// Text tokens of a window, heard in one pass; 0 = as many as there are, in as many passes as they take.
    pub max_tokens: usize,
}

/// Weights of one model.
pub struct TrialModel {
    context: WhisperContext,
    device: String,
}

impl TrialModel {
    /// Flash attention belongs to the weights' context, and so to all of its states.
    pub fn load(name: &str, path: &Path, use_gpu: bool, flash_attention: bool) -> Result<Self, EngineError> {
        whisper_rs::install_logging_hooks();
        models::check(name, path)?;
        let device = device(use_gpu);
        let mut parameters = WhisperContextParameters::default();
        parameters.use_gpu(device != "cpu").gpu_device(0).flash_attn(flash_attention);
        let context = WhisperContext::new_with_params(path, parameters)
            .map_err(|e| EngineError::Model { name: name.to_owned(), why: e.to_string() })?;
        Ok(Self { context, device })
    }

    /// `cpu` or `cuda:<name>`: what it really runs on.
    pub fn device(&self) -> &str {
        &self.device
    }

    pub fn state(&self) -> Result<TrialState, EngineError> {
        let state = self.context.create_state().map_err(|e| EngineError::OutOfMemory(e.to_string()))?;
        Ok(TrialState(state))
    }
}

/// One decode state.
pub struct TrialState(WhisperState);

impl TrialState {
    /// Text of one window, mono at 16 kHz, taken for English.
    pub fn decode(&mut self, samples: &[f32], settings: Settings) -> Result<String, EngineError> {
        let mut parameters = FullParams::new(SamplingStrategy::Greedy { best_of: 1 });
        parameters.set_n_threads(i32::try_from(settings.threads).unwrap_or(1));
        // whisper-rs keeps a copy each time: three bytes a decode.
        parameters.set_language(Some("en"));
        parameters.set_no_context(true);
        parameters.set_temperature(0.0);
        parameters.set_temperature_inc(0.0);
        parameters.set_no_speech_thold(2.0);
        parameters.set_max_tokens(i32::try_from(settings.max_tokens).unwrap_or(0));
        // A text that is cut is not gone on with in another pass over the window.
        parameters.set_single_segment(settings.max_tokens > 0);
        parameters.set_audio_ctx(settings.context.positions(samples.len()) as i32);
        parameters.set_print_progress(false);
        parameters.set_print_realtime(false);
        parameters.set_print_timestamps(false);
        parameters.set_print_special(false);
        let padded;
        let samples = if samples.len() < MIN_SAMPLES {
            padded = [samples, &vec![0.0; MIN_SAMPLES - samples.len()]].concat();
            &padded
        } else {
            samples
        };
        self.0.full(parameters, samples).map_err(|e| decode_error(&e))?;
        let mut text = String::new();
        for segment in self.0.as_iter() {
            text.push_str(&segment.to_str_lossy().map_err(|e| decode_error(&e))?);
        }
        Ok(text.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::whisper::random::{self, Format, Shape};

    #[test]
    fn states_agree_with_and_without_flash_and_stop_where_they_are_told() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("tiny.bin");
        random::write(&path, Shape::Tiny, Format::Q8, 6).expect("written");
        let samples: Vec<f32> = (0..32_000).map(|n| (n as f32 * 0.05).sin() * 0.3).collect();
        let settings = Settings { threads: 2, context: Context::PARTIAL, max_tokens: 0 };
        for flash in [false, true] {
            let model = TrialModel::load("tiny", &path, false, flash).expect("loaded");
            assert_eq!(model.device(), "cpu");
            let (mut one, mut two) = (model.state().expect("state"), model.state().expect("state"));
            let text = one.decode(&samples, settings).expect("decoded");
            assert_eq!(text.split_whitespace().count(), 6, "{text}");
            assert_eq!(two.decode(&samples, settings).expect("decoded"), text);
            let short = one.decode(&samples[..800], Settings { max_tokens: 2, ..settings }).expect("50 ms are padded");
            assert!((1..=3).contains(&short.split_whitespace().count()), "{short}");
        }
    }
}
