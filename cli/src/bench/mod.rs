//! `voxfleet bench`: measurements, each on real servers and real processes that it starts and ends itself.
//!
//! | module | measures |
//! |---|---|
//! | [`pipeline`] | audio through NATS and the fleet against the same engine called directly |
//! | [`route`] | added latency from a producer's publish to the engine, and what a fleet saturates at |
//! | [`startup`] | start-up time of each process, and memory with idle sessions |
//! | [`probe`] | the engine's door: where latency is measured |
//!
//! Each prints a table, or with `--json` one object with fixed field names.

mod pipeline;
mod probe;
mod route;
mod startup;

use std::path::PathBuf;

use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{exit::Exit, transcript::screen};

/// Which bench to run.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench pipeline
  voxfleet bench route --sessions 1000 --seconds 30 --json
  voxfleet bench startup")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
    /// One object on standard output and nothing else
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Bench {
    /// Audio per second through NATS and the fleet, against the same engine called directly
    Pipeline(pipeline::PipelineArgs),
    /// Added latency from publish to engine with many sessions, and the rate at which it saturates
    Route(route::RouteArgs),
    /// Start-up time of each process, memory with idle sessions
    Startup(startup::StartupArgs),
    /// An engine child that notes when each chunk reaches it
    #[command(hide = true)]
    Probe(probe::ProbeArgs),
}

pub(crate) async fn run(args: BenchArgs, shutdown: CancellationToken) -> anyhow::Result<Exit> {
    let bench = async {
        match args.bench {
            Bench::Pipeline(args) => pipeline::run(args).await,
            Bench::Route(args) => route::run(args).await,
            Bench::Startup(args) => startup::run(args).await,
            Bench::Probe(args) => {
                tokio::task::spawn_blocking(move || probe::run(&args)).await??;
                Ok(Value::Null)
            }
        }
    };
    // Dropped half way, a bench still ends every process that it started.
    let result = tokio::select! {
        result = bench => result?,
        () = shutdown.cancelled() => return Ok(Exit::Interrupted),
    };
    if result.is_null() {
        return Ok(Exit::Ok);
    }
    if args.json {
        screen::object(&result)?;
    } else {
        table("", &result)?;
    }
    Ok(Exit::Ok)
}

/// Says what is being done, where it does not mix with the answer.
fn progress(text: &str) {
    eprintln!("bench: {text}");
}

/// Two columns, nested objects indented by their names.
fn table(prefix: &str, value: &Value) -> anyhow::Result<()> {
    for (name, value) in value.as_object().into_iter().flatten() {
        let name = format!("{prefix}{name}");
        match value {
            Value::Object(_) => table(&format!("{name}."), value)?,
            Value::Number(n) if n.is_f64() => {
                screen::out(&format!("{name:<42} {:>14.3}", n.as_f64().unwrap_or_default()))?;
            }
            other => screen::out(&format!("{name:<42} {other:>14}"))?,
        }
    }
    Ok(())
}

/// Three digits behind the point are more than these measurements are good for.
fn rounded(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

/// What `bench` and the workers it starts find in the user cache.
fn cached(path: &str) -> Option<PathBuf> {
    Some(voxfleet_harness::find::cache().join(path)).filter(|p| p.is_file())
}
