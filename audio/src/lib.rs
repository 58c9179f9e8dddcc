//! Recordings of strangers become PCM: every file format that is taken, and nothing believed that a file says of itself.
//!
//! It stands between the bytes a worker fetched and the session machinery, which eats the same log entries for a
//! recording as for a live call. Pure of the network; the slim CLI uses it too.
//!
//! - [`decode`]: [`Decoder`] reads a file, or a pipe, in bounded memory, as chunks of 200 ms.
//! - [`entries`]: [`EntryMaker`] turns chunks into the entries of a log.
//! - [`child`]: the process of its own in which a worker runs a decoder, its limits, and the end of it in the child.
//! - [`process`]: the parent's side of it; [`spawner`]: how children of this binary are started, for whoever has some.
//! - [`wire`]: what child and parent say to each other.
//! - [`error`]: [`AudioError`], what can be wrong with a recording, in sentences for whoever sent it.
//! - `source`, `wav`, `sniff`: the bytes, with wav headers that lie put right; what a file is that is no recording.
//!
//! A recording that breaks off is decoded as far as it goes, and [`Decoder::truncated`] says so: a cut recording is
//! common and worth its text, but never passes for a whole one. Only where nothing can be read (an m4a whose index
//! was never written) is it an error.

pub mod child;
pub mod decode;
pub mod entries;
pub mod error;
pub mod process;
mod sniff;
mod source;
pub mod spawner;
mod wav;
pub mod wire;

use std::time::Duration;

pub use decode::{Chunk, Decoder};
pub use entries::EntryMaker;
pub use error::AudioError;

/// What one recording may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Longest recording. A few kilobytes can unpack to days of silence.
    pub max_seconds: u64,
    /// Memory of the decoder's process beyond what the executable maps, in MiB. [`Decoder`] itself does not enforce it.
    pub memory_mb: u64,
    /// A decoder's process that says nothing for so long, while it is listened to, is ended.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // A day: longer recordings exist as several files.
            max_seconds: 86_400,
            // Measured need of an eight-hour file is a twentieth of it.
            memory_mb: 512,
            // Decoding runs hundreds of times faster than speech; a silent decoder hangs.
            stall: Duration::from_secs(30),
        }
    }
}
