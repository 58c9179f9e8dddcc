//! What tests, `demo` and `bench` stand on: real nats-servers, real processes, faults, and a checker that knows nothing
//! of the product's code.
//!
//! | module | holds |
//! |---|---|
//! | [`find`] | where `nats-server`, `nats` and `voxfleet` are, or the command that brings them |
//! | [`child`] | one child process: log in a file, killed and reaped on drop, dies with its parent |
//! | [`server`] | a nats-server of one's own, single or a cluster of three |
//! | [`ports`] | ports that are given out once |
//! | [`login`] | accounts, keys, and clients that log in with them |
//! | [`authority`] | certificates of a private authority, good and bad ones |
//! | [`relay`] | a TCP relay that pauses, swallows, delays, stalls and cuts, each direction by itself |
//! | [`wire`] | single publishes dropped, doubled, delayed or changed on their way through a relay |
//! | [`https`] | a web server that serves, refuses, redirects and misbehaves as told |
//! | [`s3`] | a real S3 service |
//! | [`card`] | GPUs that are not there, behind a library of NVIDIA's interface |
//! | [`scarce_memory`] | memory that runs out in an engine process |
//! | [`sim_card`] | the folder that is a card to simulated engines |
//! | [`process`] | `voxfleet dispatcher` and `voxfleet worker`, configured through the environment |
//! | [`fleet`] | all of it together, ready to be spoken to |
//! | [`producer`] | a stranger's producer: plain publishes |
//! | [`load`] | many sessions at once, and JetStream by itself |
//! | [`flood`] | one tenant that sends whatever the server takes, and what another one notices of it |
//! | [`pretended`] | workers that only say that they are there, by the hundred |
//! | [`probe_api`] | the service API and heartbeats, asked plainly |
//! | [`checker`] | reads log and chain, says everything that does not fit |
//! | [`words`] | which samples a simulated transcript stands for |
//! | [`verdict`] | was every sample of a session or job transcribed exactly once? |
//! | [`chaos`] | random faults over many sessions and jobs |
//! | [`soak`] | hours of work in minutes: what every process and stream keeps |
//! | [`dice`] | chance that repeats |
//! | [`audio`] | test calls, made sounds, word error rate |
//! | [`wait`] | poll with a deadline; nothing here sleeps a fixed time |
//!
//! Nothing in here panics: callers decide what a failure means. Only `async-nats` is used to speak to NATS, never the
//! product's `nats` crate, so that a mistake there can not hide itself.

pub mod audio;
pub mod authority;
pub mod card;
pub mod chaos;
pub mod checker;
pub mod child;
pub mod dice;
pub mod find;
pub mod fleet;
pub mod flood;
pub mod https;
pub mod load;
pub mod login;
pub mod ports;
pub mod pretended;
pub mod probe_api;
pub mod process;
pub mod producer;
pub mod relay;
pub mod s3;
pub mod scarce_memory;
pub mod server;
pub mod sim_card;
pub mod soak;
pub mod verdict;
pub mod wait;
pub mod wire;
pub mod words;

/// What went wrong while something was set up or asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Missing(#[from] find::Missing),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error(transparent)]
    NotInTime(#[from] wait::NotInTime),
    #[error("{name} ended while it was starting ({status}); its log ends with:\n{log}")]
    EndedEarly { name: String, status: String, log: String },
    #[error("{what}: {why}")]
    Nats { what: String, why: String },
    #[error("{0}")]
    Wrong(String),
}

impl Error {
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }

    /// For the many error types of async-nats.
    pub fn nats<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
        let what = what.into();
        move |e| Error::Nats { what, why: e.to_string() }
    }
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
