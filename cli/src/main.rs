//! `voxfleet`: the one binary. `voxfleet --help` lists what it does.
//!
//! Typed words ([`args`]) become settings ([`config`]) and a command ([`commands`]); whatever fails carries its exit code
//! ([`exit`]) up to here. Logs go to standard error, answers to standard output.

mod args;
#[cfg(feature = "bench")]
mod bench;
mod commands;
mod config;
mod decode;
mod deliver;
#[cfg(feature = "bench")]
mod demo;
mod env;
mod exit;
mod file_job;
mod formats;
mod logging;
mod plain;
mod producer;
mod signals;
mod sound;
mod transcript;

use std::{process::ExitCode, time::Duration};

use clap::Parser as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use args::{Cli, Command};
use exit::{Exit, OrExit as _};

/// What every command is given.
pub(crate) struct Context {
    pub(crate) overrides: config::Overrides,
    /// Cancelled by the first SIGINT or SIGTERM.
    pub(crate) shutdown: CancellationToken,
    /// Everything spawned here is awaited before the process ends.
    pub(crate) tracker: TaskTracker,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        // Owns its threads and its device: no runtime, no configuration, no environment.
        #[cfg(feature = "worker")]
        Command::Engine(args) => commands::engine::run(&args),
        #[cfg(feature = "worker")]
        Command::AudioDecoder(args) => commands::audio_decoder::run(&args),
        Command::Decode(args) => commands::decode::run(&args),
        command => with_runtime(command, cli.global),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            let exit = exit::exit_of(&error);
            if exit != Exit::Ok {
                eprintln!("voxfleet: {error:#}");
            }
            exit.into()
        }
    }
}

fn with_runtime(command: Command, global: args::Global) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().or_exit(Exit::Internal)?;
    let result = runtime.block_on(async {
        let context = Context {
            overrides: commands::overrides(&global, &command),
            shutdown: CancellationToken::new(),
            tracker: TaskTracker::new(),
        };
        let done = CancellationToken::new();
        signals::listen(&context.tracker, context.shutdown.clone(), done.clone()).or_exit(Exit::Internal)?;
        let tracker = context.tracker.clone();
        let result = commands::run(command, context).await;
        done.cancel();
        tracker.close();
        tracker.wait().await;
        result
    });
    // A read of standard input cannot be called back; nothing else is left by now.
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}
