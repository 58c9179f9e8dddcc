//! CTranslate2 on batches of windows with every setting open: numbers, encoder context, length of the text, GPU. Only
//! measurements use it; what the engine itself does with these settings stands in the modules beside it.

use std::path::Path;

use ct2rs::sys::{Config, Device, StorageView, Whisper, WhisperOptions};

use super::{
    ComputeType, folder,
    mel::LogMel,
    pass::{decode_error, out_of_memory},
    vocabulary::Vocabulary,
};
use crate::engine::{
    EngineError,
    whisper::context::{Context, MIN_SAMPLES},
};

/// How long the text of a window is, in tokens. One more is looked at, as whisper.cpp does before it stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// As the model ends it, but cut here.
    AtMost(usize),
    /// This, whatever the model makes of the sound: the end of the text is held back.
    Exactly(usize),
}

/// What differs from one decode to the next; greedy, one pass, no word times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub context: Context,
    pub length: Length,
}

/// Text of one window, and how many tokens it took, timestamps included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub text: String,
    pub tokens: usize,
}

/// Weights of one model, with the threads that compute and the numbers they compute with.
pub struct TrialModel {
    whisper: Whisper,
    vocabulary: Vocabulary,
    mel: LogMel,
    device: Device,
}

impl TrialModel {
    /// `path` is a model folder, or a ggml file that has one beside it or gets it.
    pub fn load(
        name: &str,
        path: &Path,
        compute_type: ComputeType,
        threads: usize,
        use_gpu: bool,
    ) -> Result<Self, EngineError> {
        let facts = folder::of(name, path, None)?;
        let vocabulary = Vocabulary::read(name, &facts.dir)?;
        let compute_type = compute_type.on(use_gpu);
        let device = if use_gpu { Device::CUDA } else { Device::CPU };
        let loading = Config { device, compute_type, num_threads_per_replica: threads.max(1), ..Config::default() };
        let whisper = Whisper::new(&facts.dir, loading).map_err(|error| {
            let failed = || EngineError::Model { name: name.to_owned(), why: error.to_string() };
            out_of_memory(&error).unwrap_or_else(failed)
        })?;
        let mel = LogMel::new(whisper.n_mels());
        Ok(Self { whisper, vocabulary, mel, device })
    }

    /// `cpu` or `cuda`.
    pub fn device(&self) -> &'static str {
        if self.device == Device::CUDA { "cuda" } else { "cpu" }
    }

    /// Texts of windows that are decoded as one batch, mono at 16 kHz, taken for English; all look at as much context as the
    /// longest needs. Their pictures are made here too.
    pub fn decode(&mut self, windows: &[&[f32]], settings: Settings) -> Result<Vec<Said>, EngineError> {
        let Some(positions) = windows.iter().map(|window| settings.context.positions(window.len())).max() else {
            return Ok(Vec::new());
        };
        let (bands, frames) = (self.whisper.n_mels(), 2 * positions);
        let mut features = Vec::with_capacity(windows.len() * bands * frames);
        for window in windows {
            let padded;
            let samples = if window.len() < MIN_SAMPLES {
                padded = [window, &vec![0.0; MIN_SAMPLES - window.len()][..]].concat();
                &padded
            } else {
                *window
            };
            self.mel.spectrogram(samples).bands_of(0, frames, &mut features);
        }
        let shape = [windows.len(), bands, frames];
        let features = StorageView::new(&shape, &mut features, Device::CPU).map_err(decode_error)?;
        let encoded = self.whisper.encode(&features, false).map_err(decode_error)?;
        let specials = self.vocabulary.specials;
        let mut held_back: Vec<u32> = specials.never_said().into_iter().chain(specials.language_tokens()).collect();
        let tokens = match settings.length {
            Length::AtMost(tokens) => tokens,
            Length::Exactly(tokens) => {
                held_back.push(specials.end_of_text);
                tokens
            }
        };
        let options = WhisperOptions {
            beam_size: 1,
            return_scores: true,
            return_no_speech_prob: true,
            // One half of it is for what is said.
            max_length: 2 * (tokens + 1),
            suppress_tokens: held_back.into_iter().map(|token| token as i32).collect(),
            ..WhisperOptions::default()
        };
        let task = if self.vocabulary.is_multilingual() {
            vec![specials.start, specials.first_language, specials.transcribe]
        } else {
            vec![specials.start]
        };
        let task: Vec<&str> = task.into_iter().map(|token| self.vocabulary.written(token)).collect();
        let results = self.whisper.generate(&encoded, &vec![task; windows.len()], &options).map_err(decode_error)?;
        Ok(results.into_iter().map(|result| self.said(result.sequences_ids.first())).collect())
    }

    fn said(&self, tokens: Option<&Vec<usize>>) -> Said {
        let tokens: Vec<u32> = tokens.into_iter().flatten().filter_map(|token| u32::try_from(*token).ok()).collect();
        let spoken = tokens.iter().filter(|token| **token < self.vocabulary.specials.end_of_text);
        let bytes: Vec<u8> = spoken.flat_map(|token| self.vocabulary.bytes(*token).to_vec()).collect();
        Said { text: String::from_utf8_lossy(&bytes).trim().to_owned(), tokens: tokens.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::whisper::random::{self, Format, Shape};

    #[test]
    fn texts_are_as_long_as_they_are_told_alone_and_together() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("tiny.bin");
        random::write(&path, Shape::Tiny, Format::Q8, 6).expect("written");
        let samples: Vec<f32> = (0..32_000).map(|n| (n as f32 * 0.05).sin() * 0.3).collect();
        let mut model = TrialModel::load("tiny", &path, ComputeType::Float32, 1, false).expect("loaded");
        assert_eq!(model.device(), "cpu");
        let windows = [&samples[..], &samples[..800], &samples[..20_000]];
        for (length, expected) in [
            (Length::Exactly(1), 2..=2),
            (Length::Exactly(12), 13..=13),
            (Length::AtMost(3), 4..=4),
            (Length::AtMost(40), 5..=8),
        ] {
            let settings = Settings { context: Context::PARTIAL, length };
            let together = model.decode(&windows, settings).expect("decoded");
            assert_eq!(together.len(), windows.len());
            for (window, said) in windows.iter().zip(&together) {
                assert!(expected.contains(&said.tokens) && !said.text.contains("<|"), "{length:?}: {said:?}");
                assert_eq!(model.decode(&[window], settings).expect("decoded"), std::slice::from_ref(said));
            }
        }
        assert!(
            model.decode(&[], Settings { context: Context::Full, length: Length::AtMost(3) }).expect("none").is_empty()
        );
    }
}
