//! Every parser that reads what a stranger wrote, fed with damaged inputs.
//!
//! A [`Target`] is one parser with what must hold for any input: it ends, within time and memory that the input's length
//! bounds; and what it accepts can be written and read back as the same. A [`campaign`] starts from real inputs (fixtures of
//! the whole project, and `corpus/<target>/`, which keeps what was found), changes them, and keeps those changes that are
//! accepted, to change them further. The ordinary tests run a short one of fixed seed; `examples/campaign.rs` a long one.
//! It needs no nightly compiler and sees no coverage: its reach comes from seeds of every kind and from a dictionary.

mod campaign;
mod memory;
mod mutate;
mod seeds;
mod targets;

pub use campaign::{Budget, Finding, Report, campaign, replay};
pub use memory::Counting;
pub use targets::{TARGETS, Target};
