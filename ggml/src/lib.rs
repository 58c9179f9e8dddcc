//! Whisper models as files: reads the ggml files of whisper.cpp and writes the folders that CTranslate2 takes.
//!
//! It stands beside `schema`, on the lowest floor: files in, files out, no runtime and no engine. The worker looks a model
//! through with it before C++ code sees the file; `voxfleet models convert` makes one download serve both engines.
//!
//! | module | holds |
//! |---|---|
//! | [`layout`] | a ggml file walked from end to end: header, filters, vocabulary, where each tensor lies |
//! | [`blocks`] | tensor types and how their blocks become numbers; pure |
//! | [`vocabulary`] | tokens, special tokens and languages of a Whisper vocabulary; pure |
//! | [`plan`] | which variables a folder has and from which tensors each comes; pure |
//! | [`folder`] | writes the folder, tensor by tensor |
//!
//! Every size in a file is a stranger's: it is compared with what is left of the file and with what Whisper models have
//! before memory is asked for.

pub mod blocks;
pub mod folder;
pub mod layout;
pub mod plan;
pub mod vocabulary;

use std::{io, path::PathBuf};

/// Why a model could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a ggml file, cut off, or with sizes that no Whisper model has.
    #[error("{}: {why}", path.display())]
    Damaged { path: PathBuf, why: String },
    /// A whole file of a kind that is not converted.
    #[error("{}: {why}", path.display())]
    Unsupported { path: PathBuf, why: String },
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    #[error("stopped")]
    Stopped,
    #[error("{doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}
