//! Traces: what dispatcher and workers did for a session or a job, as spans, told to a collector in OpenTelemetry's protocol
//! (OTLP over HTTP, protobuf). Off unless an endpoint is configured.
//!
//! A span is told when it is over, whole; nothing is open for as long as a session lives. Which trace it belongs to travels in
//! keys, assignments and work items ([`voxfleet_schema::trace`]), so that a successor goes on with it.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | the settings |
//! | [`span`] | a span and what may stand in it |
//! | [`tracer`] | what everybody is given: takes spans, never waits |
//! | [`export`] | the task that sends them, and the bound on what waits |
//! | [`wire`] | spans as OTLP writes them; pure |
//!
//! Invariants: [`Tracer::record`] never blocks and never fails; what there is no room for is dropped and counted. A trace that
//! its producer did not sample is passed on and not told. No span holds text that somebody said or wrote, nor a secret: names
//! are constants, values are ids, numbers and our own words.

mod config;
mod export;
mod span;
mod tracer;
mod wire;

pub use config::TracingConfig;
pub use export::{Exporter, TraceError, begin_counting};
pub use span::{Span, Value, unix_ns};
pub use tracer::{Service, Tracer};
