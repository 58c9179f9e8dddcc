//! Arguments of `auth`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Clone, Args)]
pub(crate) struct AuthArgs {
    #[command(subcommand)]
    pub(crate) what: AuthCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum AuthCommand {
    /// Make keys, and server files that let each role do its part and nothing else
    Init(AuthInitArgs),
    /// Write the same server file for keys that come from the server's environment
    Template(AuthTemplateArgs),
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet auth init
  voxfleet auth init --dir keys --account clinic --account court
  voxfleet auth init --dir keys --account clinic --max-connections 200 --max-file-mib 20000
  voxfleet auth init --dir keys --set nats.prefix=calls --set dispatcher.topology.replicas=3

One account is one tenant, with its own streams, dispatchers and workers; nothing of one can be read from another. Each has
a user for every role (dispatcher, worker, producer, viewer, operator), whose seed is in a file that only its owner can
read. Nothing that is there is written over, and no seed is shown.")]
pub(crate) struct AuthInitArgs {
    /// Folder to make; it must not be there yet, or be empty
    #[arg(long, default_value = "nats-auth", value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Name of an account; can be repeated [default: VOXFLEET]
    #[arg(long, value_name = "NAME")]
    pub(crate) account: Vec<String>,
    /// Connections of each account at once
    #[arg(long, default_value_t = 4_096, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_connections: u32,
    /// Subscriptions of each account at once
    #[arg(long, default_value_t = 100_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_subscriptions: u32,
    /// Of each account's memory streams, all replicas [default: half as much again as dispatcher.topology reserves]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub(crate) max_memory_mib: Option<u64>,
    /// The same of file streams
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub(crate) max_file_mib: Option<u64>,
    /// Streams of each account; ours are 14
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(14..))]
    pub(crate) max_streams: Option<u32>,
    /// Consumers of each stream [default: dispatcher.topology.max_consumers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..))]
    pub(crate) max_consumers: Option<u32>,
    /// One object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet auth template > accounts.conf

Each role's public key is then a variable of the server's environment: VOXFLEET_NKEY_WORKER and so on, and
VOXFLEET_NKEY_ADMIN for the system's account.")]
pub(crate) struct AuthTemplateArgs {
    /// Name of the account
    #[arg(long, default_value = "VOXFLEET", value_name = "NAME")]
    pub(crate) account: String,
}
