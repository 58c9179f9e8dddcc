//! Wire types of voxfleet: what producers, dispatcher, workers and viewers say to each other.
//!
//! This is the lowest floor: no IO, no runtime, no NATS. Everything above builds on these types, so a change here is
//! a change of the contract; `tests/golden/` pins the bytes.
//!
//! | module | holds |
//! |---|---|
//! | [`id`] | validated names: sessions, jobs, GPUs, incarnations, sources |
//! | [`audio`] | chunk headers, sample formats, the frame -> sample clock |
//! | [`source`] | the producer state machine: duplicates, gaps, stale sources, ends |
//! | [`job`] | file jobs: request, record, work item, progress, aggregate |
//! | [`session`] | session options, API requests and answers, the stored session record |
//! | [`transcript`] | finals, partials, revisions, checkpoints: the chain |
//! | [`fleet`] | heartbeats, control requests |
//! | [`device`] | device figures, what is wrong with a device, what stands in for what |
//! | [`ladder`] | sizes of models that stand in for each other |
//! | [`plan`] | what fits on a device |
//! | [`dead`] | what `ASR_DEAD` keeps of what could not be done |
//! | [`event`] | what happened, for people and tests |
//! | [`failure`] | the closed set of failure classes |
//! | [`remedy`] | what to do about a trouble of device, engine or models |
//! | [`trace`] | which trace something is part of |
//! | [`codec`] | JSON for what people may read, MessagePack for what only machines exchange |
//!
//! Readers tolerate unknown fields and unknown enum values; writers never send them.

pub mod audio;
pub mod codec;
pub mod dead;
pub mod device;
pub mod event;
pub mod failure;
pub mod fleet;
pub mod id;
pub mod job;
pub mod ladder;
pub mod plan;
pub mod remedy;
pub mod session;
pub mod source;
pub mod trace;
pub mod transcript;

/// Sample rate of every sample position on the wire and of everything an engine sees, in Hz.
pub const SAMPLE_RATE_HZ: u32 = 16_000;

/// How far before a final's end everything with a memory (resampler, VAD, endpointer) restarts, in samples (0.5 s).
pub const PREROLL_SAMPLES: u64 = 8_000;

/// Left out of what people read: counts that are nearly always nought.
pub(crate) fn nought<T: Default + PartialEq>(count: &T) -> bool {
    *count == T::default()
}
