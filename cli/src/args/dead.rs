//! Arguments of `jobs dead`.

use clap::{Args, Subcommand};
use voxfleet_schema::id::StreamId;

use super::commands::OutputArgs;

#[derive(Debug, Clone, Args)]
pub(crate) struct DeadArgs {
    #[command(subcommand)]
    pub(crate) what: DeadCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum DeadCommand {
    /// What was set aside, newest first
    #[command(after_help = "Examples:
  voxfleet jobs dead list
  voxfleet jobs dead list --json | jq -r '.letters[] | select(.letter.error.class == \"engine_crash\").id'")]
    List(DeadListArgs),
    /// Everything that is kept of one: why, whose hands it was in, what was asked for
    #[command(after_help = "Examples:
  voxfleet jobs dead show call-17
  voxfleet jobs dead show standup --session --json")]
    Show(DeadArg),
    /// Submit a failed job again under a new id; its letter goes once that is accepted
    #[command(after_help = "Examples:
  voxfleet jobs dead retry call-17
  voxfleet jobs dead retry call-17 --id call-17-again --keep")]
    Retry(RetryArgs),
    /// Put letters away for good
    #[command(after_help = "Examples:
  voxfleet jobs dead drop call-17
  voxfleet jobs dead drop standup --session
  voxfleet jobs dead drop --seq 12")]
    Drop(DropArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DeadListArgs {
    /// How many at most
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) limit: u32,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DeadArg {
    /// A job, or a session of which a part was set aside
    #[arg(value_name = "ID")]
    pub(crate) id: StreamId,
    #[command(flatten)]
    pub(crate) kind: KindArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct KindArgs {
    /// It is a session [default: whichever there is]
    #[arg(long, conflicts_with = "job")]
    pub(crate) session: bool,
    /// It is a job
    #[arg(long)]
    pub(crate) job: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RetryArgs {
    /// The job that failed
    #[arg(value_name = "JOB")]
    pub(crate) job: StreamId,
    /// Id of the new job [default: <JOB>-r1, -r2, ...]
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<StreamId>,
    /// Keep the letter
    #[arg(long)]
    pub(crate) keep: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DropArgs {
    /// A job or a session: all of its letters
    #[arg(value_name = "ID", required_unless_present = "seq", conflicts_with = "seq")]
    pub(crate) id: Option<StreamId>,
    /// One letter by its number, as `voxfleet jobs dead list` shows it
    #[arg(long, value_name = "SEQ", conflicts_with_all = ["session", "job"], value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seq: Option<u64>,
    #[command(flatten)]
    pub(crate) kind: KindArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}
