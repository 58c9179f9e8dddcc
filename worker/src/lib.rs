//! A worker: one supervisor process per GPU, and the engine child it starts.
//!
//! The supervisor speaks NATS, beats, counts permits and never blocks; the engine child owns device, models and decode
//! states. They speak [`ipc`] over a socketpair. What becomes of a log is decided in [`engine::stream`] alone, which is a
//! pure state machine; everything else here moves bytes.

/// A line of the log about a session or job, with the names that every process gives them: session or job, gpu.
macro_rules! say {
    ($level:ident, $names:expr, $($rest:tt)+) => {{
        let names: &$crate::session::Names = &$names;
        let (session, job) = (names.kind.session(&names.id), names.kind.job(&names.id));
        tracing::$level!(session, job, gpu = %names.gpu_id, $($rest)+)
    }};
}

mod capacity;
pub mod config;
pub mod device;
pub mod engine;
pub mod every_gpu;
mod heartbeat;
mod http;
pub mod ipc;
mod job;
mod lifecycle;
mod measures;
mod memory;
pub mod metrics;
mod preempt;
pub mod provider;
mod pull;
mod session;
mod shutdown;
mod stock;
mod supervisor;

pub use config::WorkerConfig;
pub use preempt::PreemptionConfig;
pub use supervisor::{WorkerError, run};
