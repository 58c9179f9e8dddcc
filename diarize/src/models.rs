//! What the two networks must do; the worker does it with ONNX Runtime, tests with arithmetic.
//!
//! An error of a network ends the hearing of one stretch, nothing else: the caller publishes its words without speakers
//! and says why.

use crate::{fbank::Features, fbank::FrontEnd, powerset::CLASSES};

/// A network could not be run, or answered something of the wrong shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    #[error("segmentation: {0}")]
    Segmentation(String),
    #[error("speaker encoder: {0}")]
    Encoder(String),
}

/// pyannote's segmentation-3.0 or one of its shape.
pub trait Segmenter {
    /// Log-probabilities of the classes of [`crate::powerset`], one row each
    /// [`STEP`](crate::powerset::STEP) samples; samples at 16 kHz in -1..1, at most ten seconds of them.
    fn logits(&mut self, samples: &[f32]) -> Result<Vec<[f32; CLASSES]>, ModelError>;
}

/// A speaker encoder: features of any length in, one vector out.
pub trait Embedder {
    /// Which encoder this is: embeddings of two encoders are never compared. A file's checksum does well.
    fn encoder(&self) -> &str;

    /// Length of its vectors.
    fn dims(&self) -> usize;

    /// The features it was trained on.
    fn front_end(&self) -> FrontEnd;

    /// The vector of these frames, which are normalised already. Its length need not be 1.
    fn embed(&mut self, features: &Features) -> Result<Vec<f32>, ModelError>;
}
