//! The dispatcher: takes live sessions and file jobs in, gives each to a worker, passes audio on as hints, and ends them.
//!
//! It stands between `voxfleet-nats` below and the command line above; it never meets a worker's code. The log and the
//! chain are the truth, so a dispatcher that dies costs latency only: [`run`] of the next one reads what the keys say and
//! goes on.
//!
//! | module | what for |
//! |---|---|
//! | [`config`] | settings |
//! | [`fleet`] | heartbeats -> joining, alive, suspect, dead, draining, unhealthy |
//! | [`map`] | which GPU serves which service, which reserve stands in |
//! | [`routing`] | filter -> score -> pick, with everybody's reasons |
//! | [`admission`] | who is placed first |
//! | [`idle`] | when a flush and when an end is due |
//! | [`open`] | which entry opens or reopens a session |
//! | [`reconcile`] | desired against actual -> actions |
//! | [`kept`] | the engine that may not change |
//! | [`sessions`] | the book of sessions in memory |
//! | [`jobs`] | the book of file jobs, and what is to be done about each |
//! | [`core`] | all of these as one state machine: inputs -> effects, without IO |
//! | `http` | health, figures, the dashboard and what it asks for |
//! | `active`, `run` | the IO around it: lease, recovery, listeners, effects |

mod active;
pub mod admission;
pub mod config;
pub mod core;
pub mod fleet;
mod http;
pub mod idle;
pub mod jobs;
pub mod kept;
pub mod map;
pub mod moment;
pub mod open;
pub mod reconcile;
pub mod routing;
mod run;
pub mod sessions;
#[cfg(test)]
mod testing;

pub use config::DispatcherConfig;
#[doc(hidden)]
pub use http::strangers;
pub use run::{DispatcherError, run};
