//! `voxfleet bench`: measurements, each on real servers and real processes that it starts and ends itself.
//!
//! | module | measures |
//! |---|---|
//! | [`accuracy`] | word error rate of live calls beside the same engine offline, and how late finals come |
//! | [`chaos`] | random faults over many sessions and jobs: nothing lost, nothing twice |
//! | [`allocate`] | one routing decision, on fleets of 4 to 1,000 GPUs |
//! | [`coldstart`] | from the start of a worker, or of a session, to its first words: cold, preloaded, prewarmed, warm |
//! | [`dashboard`] | scrapes of a large fleet, and pages that stay open: time, bytes, CPU of the dispatcher |
//! | [`density`] | the most live sessions this CPU holds with partials in time, by engine |
//! | [`detection`] | shorter and shorter heartbeats on a busy machine: where false verdicts begin |
//! | [`diarize`] | who spoke when and who said which word, on recordings whose speakers are known |
//! | [`engine`] | speed of the bare engines by model shape, threads, encoder context, flash attention, states and batch |
//! | [`failover`] | workers killed in mid-word: time to the verdict and to the next words, nothing lost, nothing twice |
//! | [`latency`] | from the end of a word to its first partial and to its final, and how many sessions this CPU carries |
//! | [`longfile`] | one long recording on 1, 2, 4 and 8 workers: how much sooner it is done |
//! | [`memory`] | memory of one engine with 1 to 16 live sessions |
//! | [`peers`] | text and speed of our engine beside whisper.cpp by itself |
//! | [`pipeline`] | audio through NATS and the fleet against the same engine called directly, live and ([`jobs`]) as a file |
//! | [`rebalance`] | half of the workers killed at once: events, moves, time until all sessions produce again |
//! | [`route`] | added latency from a producer's publish to the engine, and what a fleet saturates at |
//! | [`scale`] | sessions over more and more workers: what one dispatcher carries, and where its wall is |
//! | [`soak`] | a fleet at work for long with kills and one restart of everything: what grows? |
//! | [`startup`] | start-up time of each process, and memory with idle sessions |
//! | [`tenants`] | two accounts on one server: what one notices of the other's flood |
//! | [`tracing`] | the same load with and without a collector of traces, in turns |
//! | [`probe`] | the engine's door: where latency is measured |
//! | [`models`] | model files with random weights in the official shapes |
//! | [`engines`] | which speech engines are compared |
//! | [`recording`], [`sampled`], [`processes`] | long recordings; memory and CPU of every process |
//!
//! Each prints a table, or with `--json` one object with fixed field names.

mod accuracy;
mod allocate;
mod chaos;
mod coldstart;
mod dashboard;
mod density;
mod detection;
mod diarize;
mod engine;
mod engines;
mod failover;
mod jobs;
mod latency;
mod longfile;
mod memory;
mod models;
mod peers;
mod pipeline;
mod probe;
mod processes;
mod rebalance;
mod recording;
mod route;
mod sampled;
mod scale;
mod soak;
mod startup;
mod tenants;
mod tracing;

use std::path::PathBuf;

use clap::Args as _;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{
    exit::{Exit, coded},
    transcript::screen,
};

/// Which bench to run.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Without a bench it lists them.

Examples:
  voxfleet bench accuracy
  voxfleet bench allocate
  voxfleet bench chaos --minutes 3 --seed 1
  voxfleet bench coldstart
  voxfleet bench dashboard
  voxfleet bench density
  voxfleet bench detection
  voxfleet bench diarize
  voxfleet bench engine --models micro
  voxfleet bench failover --kills 20
  voxfleet bench latency --quick
  voxfleet bench longfile
  voxfleet bench memory --model base --format q8_0
  voxfleet bench peers
  voxfleet bench pipeline --jobs
  voxfleet bench rebalance
  voxfleet bench route --sessions 1000 --seconds 30 --json
  voxfleet bench scale
  voxfleet bench soak --minutes 20
  voxfleet bench startup
  voxfleet bench tenants
  voxfleet bench tracing")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    bench: Option<Bench>,
    /// One object on standard output and nothing else
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Bench {
    /// Word error rate of the test calls live, at the pace they were spoken, beside the same engine offline
    Accuracy(accuracy::AccuracyArgs),
    /// Random faults, ten kills a minute and more, over many sessions and jobs; was anything lost or said twice?
    Chaos(chaos::ChaosArgs),
    /// How long one routing decision takes, on fleets of 4 to 1,000 GPUs
    Allocate(allocate::AllocateArgs),
    /// From process start, or from a session's first chunk, to its first words
    Coldstart(coldstart::ColdstartArgs),
    /// Scrapes of a large fleet and pages that stay open: time, bytes, CPU of the dispatcher
    Dashboard(dashboard::DashboardArgs),
    /// The most live sessions this CPU holds with partials at most two seconds behind, by engine
    Density(density::DensityArgs),
    /// How soon a death can be known on a busy machine, and where false verdicts begin
    Detection(detection::DetectionArgs),
    /// Errors of speaker labels on recordings whose speakers are known, and what listening costs
    Diarize(diarize::DiarizeArgs),
    /// Speed of the bare engines by model shape, threads, context, flash attention, decode states and batch
    Engine(engine::EngineArgs),
    /// Workers killed in mid-word: time to the verdict and to the next words
    Failover(failover::FailoverArgs),
    /// From the end of a word to its first partial and its final, with one session and with the most this CPU carries
    Latency(latency::LatencyArgs),
    /// One long recording on 1, 2, 4 and 8 simulated workers: how much sooner is it done, and is the text the same?
    Longfile(longfile::LongfileArgs),
    /// Memory of one worker's engine with 1 to 16 live sessions on one loaded model
    Memory(memory::MemoryArgs),
    /// Our engine beside whisper.cpp by itself: text and speed
    Peers(peers::PeersArgs),
    /// Audio per second through NATS and the fleet, against the same engine called directly
    Pipeline(pipeline::PipelineArgs),
    /// Half of the workers killed at once: events, moves, time until every session produces again
    Rebalance(rebalance::RebalanceArgs),
    /// Added latency from publish to engine with many sessions, and the rate at which it saturates
    Route(route::RouteArgs),
    /// Many sessions over many workers: CPU, memory, latency, and where the wall is
    Scale(scale::ScaleArgs),
    /// A fleet at work for long, with kills and one restart of everything: does memory, a file, a key or a stream grow?
    Soak(soak::SoakArgs),
    /// Start-up time of each process, memory with idle sessions
    Startup(startup::StartupArgs),
    /// Two accounts on one server: latency in one with and without a flood in the other
    Tenants(tenants::TenantsArgs),
    /// The same load with and without traces, in turns: time and CPU
    Tracing(tracing::TracingArgs),
    /// Write the models with random weights that other benches use
    #[command(hide = true)]
    Stubs(models::StubsArgs),
    /// What a model's weights and states take of a process
    #[command(hide = true)]
    Weigh(models::WeighArgs),
    /// An engine child that notes when each chunk reaches it
    #[command(hide = true)]
    Probe(probe::ProbeArgs),
}

pub(crate) async fn run(args: BenchArgs, shutdown: CancellationToken) -> anyhow::Result<Exit> {
    let Some(bench) = args.bench else {
        return list(args.json);
    };
    let measured = async {
        match bench {
            Bench::Accuracy(args) => accuracy::run(args).await,
            Bench::Chaos(args) => chaos::run(args).await,
            Bench::Allocate(args) => tokio::task::spawn_blocking(move || allocate::run(&args)).await?,
            Bench::Coldstart(args) => coldstart::run(args).await,
            Bench::Longfile(args) => longfile::run(args).await,
            Bench::Dashboard(args) => dashboard::run(args).await,
            Bench::Density(args) => density::run(args).await,
            Bench::Detection(args) => detection::run(args).await,
            Bench::Diarize(args) => diarize::run(args).await,
            Bench::Engine(args) => tokio::task::spawn_blocking(move || engine::run(&args)).await?,
            Bench::Failover(args) => failover::run(args).await,
            Bench::Latency(args) => latency::run(args).await,
            Bench::Memory(args) => memory::run(args).await,
            Bench::Peers(args) => peers::run(args).await,
            Bench::Pipeline(args) => pipeline::run(args).await,
            Bench::Rebalance(args) => rebalance::run(args).await,
            Bench::Route(args) => route::run(args).await,
            Bench::Scale(args) => scale::run(args).await,
            Bench::Soak(args) => soak::run(args).await,
            Bench::Startup(args) => startup::run(args).await,
            Bench::Tenants(args) => tenants::run(args).await,
            Bench::Tracing(args) => tracing::run(args).await,
            Bench::Stubs(args) => tokio::task::spawn_blocking(move || models::write_stubs(&args)).await?,
            Bench::Weigh(args) => tokio::task::spawn_blocking(move || models::weigh(&args)).await?,
            Bench::Probe(args) => {
                tokio::task::spawn_blocking(move || probe::run(&args)).await??;
                Ok(Value::Null)
            }
        }
    };
    // Dropped half way, a bench still ends every process that it started.
    let result = tokio::select! {
        result = measured => result?,
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
    // A bench that is a test says so.
    Ok(if result["clean"] == Value::Bool(false) { Exit::Failure } else { Exit::Ok })
}

/// Every bench with its line of help.
fn list(json: bool) -> anyhow::Result<Exit> {
    let command = BenchArgs::augment_args(clap::Command::new("bench"));
    let shown = command.get_subcommands().filter(|c| !c.is_hide_set());
    let rows = shown.map(|c| (c.get_name().to_owned(), c.get_about().map(ToString::to_string).unwrap_or_default()));
    if json {
        let benches: serde_json::Map<String, Value> = rows.map(|(name, about)| (name, about.into())).collect();
        screen::object(&serde_json::json!({ "benches": benches }))?;
    } else {
        for (name, about) in rows {
            screen::out(&format!("voxfleet bench {name:<10} {about}"))?;
        }
    }
    Ok(Exit::Ok)
}

/// A value that clap takes and a bench cannot: a mistake in the command line like any other.
fn usage(is_sound: bool, message: &str) -> anyhow::Result<()> {
    if is_sound { Ok(()) } else { Err(coded(Exit::Usage, anyhow::anyhow!("{message}"))) }
}

/// Says what is being done, where it does not mix with the answer.
fn progress(text: &str) {
    eprintln!("bench: {text}");
}

/// Two columns, nested objects indented by their names; rows of an array as a table of their own below.
fn table(prefix: &str, value: &Value) -> anyhow::Result<()> {
    for (name, value) in value.as_object().into_iter().flatten() {
        let name = format!("{prefix}{name}");
        match value {
            Value::Object(_) => table(&format!("{name}."), value)?,
            Value::Array(rows) => {
                screen::out(&name)?;
                for line in grid(rows) {
                    screen::out(&format!("  {line}"))?;
                }
            }
            other => screen::out(&format!("{name:<42} {:>14}", cell(other)))?,
        }
    }
    Ok(())
}

fn cell(value: &Value) -> String {
    match value {
        Value::Number(n) if n.is_f64() => format!("{:.3}", n.as_f64().unwrap_or_default()),
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

/// One line a field and one column a row, so that many fields fit: the first field heads the columns. Where there are more
/// rows than fields, one line a row.
fn grid(rows: &[Value]) -> Vec<String> {
    let mut names: Vec<&String> = Vec::new();
    for name in rows.iter().filter_map(Value::as_object).flatten().map(|(name, _)| name) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    // What tells rows apart comes first, wherever its name is in the alphabet.
    names.sort_by_key(|name| !HEADS.contains(&name.as_str()));
    let of_field = |name: &&String| {
        let cells = rows.iter().map(|row| row.get(name.as_str()).map(cell).unwrap_or_default());
        std::iter::once((*name).clone()).chain(cells).collect::<Vec<String>>()
    };
    let mut lines: Vec<Vec<String>> = names.iter().map(of_field).collect();
    if rows.len() > names.len() {
        lines = (0..=rows.len()).map(|n| lines.iter().map(|field| field[n].clone()).collect()).collect();
    }
    let columns = lines.first().map_or(0, Vec::len);
    let width = |n: usize| lines.iter().map(|line| line[n].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |cells: &Vec<String>| {
        let rest = cells.iter().zip(&widths).skip(1).map(|(cell, width)| format!("  {cell:>width$}"));
        format!("{:<24}{}", cells.first().map_or("", String::as_str), rest.collect::<String>())
    };
    lines.iter().map(line).collect()
}

/// Fields that name a row.
const HEADS: [&str; 11] =
    ["of", "what", "set", "engine", "gpus", "sessions", "workers", "process", "call", "model", "start"];

/// Three digits behind the point are more than these measurements are good for.
fn rounded(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

/// What `bench` and the workers it starts find in the user cache.
fn cached(path: &str) -> Option<PathBuf> {
    Some(voxfleet_harness::find::cache().join(path)).filter(|p| p.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns_under_what_names_them() {
        let rows = [
            serde_json::json!({"a_ms": 1, "sessions": 12, "wer": 0.5}),
            serde_json::json!({"sessions": 1, "trouble": null}),
        ];
        let lines: Vec<String> =
            grid(&rows).iter().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines, ["sessions 12 1", "a_ms 1", "wer 0.500", "trouble -"]);
        assert!(grid(&[]).is_empty());
    }

    #[test]
    fn many_rows_of_few_fields_are_lines() {
        let row = |model: &str, factor: f64| serde_json::json!({"factor": factor, "model": model});
        let lines = grid(&[row("a", 1.0), row("b", 2.0), row("c", 12.5)]);
        let lines: Vec<String> = lines.iter().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines, ["model factor", "a 1.000", "b 2.000", "c 12.500"]);
    }
}
