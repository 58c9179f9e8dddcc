//! Who spoke when: signal and decision code of diarization.
//!
//! The engine hands each final's stretch of audio to [`hear::Listener`], which says where somebody speaks and what each
//! piece sounds like; [`online::Voices`] gives each piece a label at once and travels in the checkpoint;
//! [`cluster`] looks at everything again when a job ends or a revision is due; [`align`] gives the words their speakers.
//! Neural networks are behind the two traits of [`models`]: this crate names no runtime, opens no file, reads no clock
//! and draws no random number, so the same samples and the same state give the same answer. It depends on nothing of
//! ours; the worker runs it live, the command line on stored chains.
//!
//! | module | holds |
//! |---|---|
//! | [`fbank`] | log mel features to Kaldi's and to NeMo's definition |
//! | [`models`] | what a segmentation network and a speaker encoder must do |
//! | [`powerset`] | the segmentation network's classes and frames as activity of three local speakers |
//! | [`windows`] | a stretch of any length in windows, and local speakers followed from window to window |
//! | [`changes`] | where the speaker changes, by embeddings alone, where there is no segmentation |
//! | [`hear`] | all of that: turns with an embedding each |
//! | [`cluster`] | agglomerative clustering, and the VB-HMM over x-vectors |
//! | [`online`] | labels given once and for all, and the state that travels |
//! | [`xvectors`] | Kaldi's archives and PLDA, for measurements |
//! | [`align`] | words and segments to speakers |

pub mod align;
pub mod changes;
pub mod cluster;
pub mod fbank;
pub mod hear;
pub mod models;
pub mod online;
pub mod powerset;
pub mod windows;
pub mod xvectors;

/// Sample rate of everything in this crate, in Hz.
pub const RATE_HZ: u32 = 16_000;

/// Our own speaker encoder, which needs no download; its card is beside it.
pub const ENCODER: &[u8] = include_bytes!("../encoder/encoder.onnx");
