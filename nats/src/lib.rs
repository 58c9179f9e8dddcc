//! The only code of voxfleet that names NATS.
//!
//! Producers write audio into a stream that is the log ([`log`]); the dispatcher copies entries to workers as hints
//! ([`publish`]), which take them by capacity ([`claim`]); workers write finals as a chain of fenced publishes
//! ([`transcript`]). Everything above this crate speaks in ids and wire types, never in subjects.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | where the server is and how to prove who we are |
//! | [`connect`] | [`Nats`]: one connection, its events, its end |
//! | [`subjects`] | every subject, built and parsed |
//! | [`topology`] | streams, buckets and worker consumers: created, verified, with the mend for what differs |
//! | [`log`] | the audio log: next, last, append, tail |
//! | [`publish`] | hints, events, partials, dead letters |
//! | [`events`] | events on their way out: a queue that waits for the stream |
//! | [`dead`] | dead letters found again, and put away for good |
//! | [`again`] | a job that failed, submitted again from its dead letter |
//! | [`claim`] | a worker's capacity-limited pull of hints |
//! | [`jobs`] | submitted jobs on their way in, work items on their way to a worker |
//! | [`purge`] | all that is kept of a session or job, found and removed |
//! | [`media`] | the object store: recordings and results |
//! | [`transcript`] | the chain of finals, checkpoints, and readers of what workers publish |
//! | [`fleet`] | heartbeats and control requests |
//! | [`kv`] | typed records with compare-and-set |
//! | [`api`] | the request/reply service and its client |
//! | [`lease`] | which dispatcher is active |
//! | [`roles`] | what each role may do, and server files that hold it to that |
//! | [`retry`] | how long to wait before the next attempt |
//! | `shown` | the certificates that servers show |
//! | `denial` | what this login may not do, told to whoever asked |
//! | `feed`, `pull`, `raw` | endless ordered reading; a durable consumer's pull; the JetStream API in its own words |
//!
//! Invariants: an expected-sequence conflict is 10071 or 10164, whichever the server's replica count makes of it; the end
//! of any endless read is an error, never silence; nothing here spawns a task per message.

pub mod again;
pub mod api;
pub mod claim;
pub mod config;
pub mod connect;
pub mod dead;
mod denial;
pub mod error;
pub mod events;
mod feed;
pub mod fleet;
pub mod jobs;
pub mod kv;
pub mod lease;
pub mod log;
pub mod media;
pub mod publish;
mod pull;
pub mod purge;
mod raw;
pub mod retry;
pub mod roles;
mod shown;
pub mod subjects;
pub mod topology;
pub mod transcript;

pub use config::{NatsConfig, Secret};
pub use connect::{ConnectError, Nats};
pub use error::ServerError;
pub use subjects::{Subject, Subjects};
