//! What can be typed. Nothing here decides anything: [`crate::invocation`] turns it into what is meant.

mod auth;
mod commands;
mod dead;
mod drain;
mod eval;
#[cfg(all(test, feature = "bench"))]
mod examples;
mod job;
mod models;
mod plan;
mod purge;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use auth::*;
pub(crate) use commands::*;
pub(crate) use dead::*;
pub(crate) use drain::*;
pub(crate) use eval::*;
pub(crate) use job::*;
pub(crate) use models::*;
pub(crate) use plan::*;
pub(crate) use purge::*;

use crate::{exit::Exit, logging::LogFormat};

/// The version, and what this build can hear with.
const VERSION: &str = match (cfg!(feature = "worker"), cfg!(feature = "ct2-engine")) {
    (true, true) => concat!(env!("CARGO_PKG_VERSION"), "\nengines: whisper_cpp, ct2, simulated"),
    (true, false) => concat!(env!("CARGO_PKG_VERSION"), "\nengines: whisper_cpp, simulated"),
    (false, _) => concat!(env!("CARGO_PKG_VERSION"), "\nengines: none"),
};

/// Speech inference for fleets of GPUs over NATS.
#[derive(Debug, Parser)]
#[command(name = "voxfleet", version, long_version = VERSION, propagate_version = true, after_help = Exit::help(), max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Configuration")]
pub(crate) struct Global {
    /// Configuration file [default: ./voxfleet.toml, /etc/voxfleet/voxfleet.toml, where there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// NATS servers, separated by commas: the setting nats.urls
    #[arg(long, global = true, value_name = "URLS")]
    pub(crate) url: Option<String>,
    /// NATS credentials file: the setting nats.credentials_file
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) creds: Option<String>,
    /// Any setting, as `voxfleet config show` names it; can be repeated
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) set: Vec<(String, String)>,
    /// How logs are written to standard error: the setting log.format
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
    /// Which logs: the setting log.filter, for example info,voxfleet_nats=debug
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Route sessions to workers (one active per account, any number stand by)
    #[cfg(feature = "dispatcher")]
    Dispatcher(DispatcherArgs),
    /// Serve one device: take sessions, transcribe, publish
    #[cfg(feature = "worker")]
    Worker(WorkerArgs),
    /// The child process of a worker that owns the device
    #[cfg(feature = "worker")]
    #[command(hide = true)]
    Engine(EngineArgs),
    /// The child process of a worker that decodes one recording
    #[cfg(feature = "worker")]
    #[command(hide = true)]
    AudioDecoder(AudioDecoderArgs),
    /// Start everything here, stream a call through it, and watch it being transcribed
    #[cfg(feature = "bench")]
    Demo(DemoArgs),
    /// Send audio as a producer: a file at its own pace, or standard input
    Stream(StreamArgs),
    /// Transcribe a recording: a file, standard input or a URL
    Transcribe(TranscribeArgs),
    /// Recordings being transcribed: submit, list, show, cancel, fetch results
    Jobs(JobsArgs),
    /// Write the stored transcript of a session or job as text, JSON, subtitles or speaker turns
    Export(ExportArgs),
    /// Measure a transcript against what was said
    Eval(EvalArgs),
    /// Follow transcripts: partials turning into finals
    Watch(WatchArgs),
    /// Workers and sessions as they are now, or why one of them is where it is
    Status(StatusArgs),
    /// Take a GPU out of the fleet: what it holds goes elsewhere, then its worker ends
    Drain(DrainArgs),
    /// Remove all that is kept of a session or job, or of everything older than a time
    Purge(PurgeArgs),
    /// Models of this machine: list, pull, verify, remove
    Models(ModelsArgs),
    /// Which models and how many sessions fit on a card, or on a fleet of them
    Plan(PlanArgs),
    /// Ask a dispatcher or worker over HTTP whether it is well
    Health(HealthArgs),
    /// Check what can be wrong, and name the mend
    Doctor(DoctorArgs),
    /// Keys and permissions: who may do what
    Auth(AuthArgs),
    /// Make a payload on standard input readable
    Decode(DecodeArgs),
    /// Check or show the configuration
    Config(ConfigArgs),
    /// Measure
    #[cfg(feature = "bench")]
    Bench(crate::bench::BenchArgs),
}

/// `key=value`.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn pairs_split_at_the_first_sign() {
        assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(pair("a").is_err() && pair("=b").is_err());
    }
}
