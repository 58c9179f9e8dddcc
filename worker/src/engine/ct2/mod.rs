//! CTranslate2: windows of different sessions and jobs run as one batch.
//!
//! | module | holds |
//! |---|---|
//! | [`mel`] | sound as the encoder takes it; pure |
//! | [`growing`] | what of it was worked out before |
//! | [`vocabulary`] | tokens of a model folder, prompts as tokens |
//! | [`passes`] | what a decode's tokens say, and where the next pass begins; pure |
//! | [`schedule`] | which windows are passed over next, together; pure |
//! | [`folder`] | the model folder that belongs to a model's file |
//! | `recognizer`, `device`, `pulse`, `pass`, `warmup` | with the cargo feature `ct2`: models, the thread that owns the device, signs of life while it works, one pass, how many windows fit |
//! | `trial` | the same: batches with every setting open, for measurements |
//!
//! A decode depends on its window alone, in company too: windows share a batch only where each would get the same encoder
//! context and the same number of prompt tokens by itself, so nothing is padded but with the silence that a window alone
//! has as well. Rounding may differ with the shape of a matrix; in float32 that changes no token (test).

#[cfg(feature = "ct2-engine")]
mod device;
pub mod folder;
pub mod growing;
pub mod mel;
#[cfg(feature = "ct2-engine")]
mod pass;
pub mod passes;
#[cfg(feature = "ct2-engine")]
mod pulse;
#[cfg(feature = "ct2-engine")]
mod recognizer;
pub mod schedule;
#[cfg(all(test, feature = "ct2-engine"))]
mod tests;
#[cfg(feature = "ct2-engine")]
pub mod trial;
pub mod vocabulary;
#[cfg(feature = "ct2-engine")]
mod warmup;

#[cfg(feature = "ct2-engine")]
pub use self::{
    device::Ct2Device,
    recognizer::{Ct2Model, Ct2Recognizer},
};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Whether this build has the engine.
pub const BUILT_IN: bool = cfg!(feature = "ct2-engine");

/// What CTranslate2 computes with. It turns a folder's numbers into these when it loads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeType {
    /// `int8_float32` on a CPU, `float16` on a GPU.
    #[default]
    Auto,
    Float32,
    Float16,
    #[serde(rename = "int8_float32")]
    Int8Float32,
    #[serde(rename = "int8_float16")]
    Int8Float16,
}

#[cfg(feature = "ct2-engine")]
impl ComputeType {
    /// As the library names it.
    fn on(self, gpu: bool) -> ct2rs::sys::ComputeType {
        use ct2rs::sys::ComputeType as Named;
        match self {
            Self::Auto if gpu => Named::FLOAT16,
            Self::Auto | Self::Int8Float32 => Named::INT8_FLOAT32,
            Self::Float32 => Named::FLOAT32,
            Self::Float16 => Named::FLOAT16,
            Self::Int8Float16 => Named::INT8_FLOAT16,
        }
    }
}

/// How the engine runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ct2Config {
    pub compute_type: ComputeType,
    /// Most windows in one batch; fewer where the memory carries fewer.
    pub batch: usize,
    /// Where folders made of ggml files are kept; none: `ct2/` in the cache folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folders: Option<PathBuf>,
}

impl Default for Ct2Config {
    fn default() -> Self {
        // Beyond four windows the caches of a CPU are too small (docs/batching.md).
        Self { compute_type: ComputeType::Auto, batch: 4, folders: None }
    }
}
