//! How good a transcript is: words, characters, speakers, delay. Pure: no files, no clock, nothing of a fleet.
//!
//! Used by `voxfleet eval`, and by the benches and the demo, so that all of them count alike. The figures are those of the
//! tools that the field uses (jiwer for words, pyannote.metrics for speakers); `tests/` holds what those tools say.
//!
//! | module | holds |
//! |---|---|
//! | [`text`] | named ways to make two texts comparable; [`english`] is the thorough one |
//! | [`align`] | the alignment of two sequences with the fewest edits, counts and rates made of it |
//! | [`view`] | an alignment for people, three lines |
//! | [`rttm`] | speaker turns and scored regions as files |
//! | [`der`] | diarization error rate, Jaccard error rate |
//! | [`wder`] | words that were given to the wrong speaker |
//! | [`assign`] | which speaker of one side is which of the other |
//! | [`latency`] | from the end of a word to the moment it was shown |
//! | [`bootstrap`] | how far a figure may be off by the choice of recordings |

pub mod align;
pub mod assign;
pub mod bootstrap;
pub mod der;
mod english;
pub mod latency;
pub mod rttm;
pub mod text;
pub mod view;
pub mod wder;

pub use align::{Edits, Op};

/// Somebody speaks. Times are seconds since the recording began.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    pub start_s: f64,
    pub end_s: f64,
    pub speaker: String,
}
