//! Arguments of `drain`.

use clap::Args;
use voxfleet_schema::id::GpuId;

use super::job::seconds;

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet drain gpu-3f2a
  voxfleet drain gpu-3f2a --deadline 30s --wait

Its sessions and jobs go to other GPUs as these have room; a final already begun is finished first. What nobody has room
for waits for a place; the worker does not keep it longer than the deadline allows.")]
pub(crate) struct DrainArgs {
    /// The GPU, as `voxfleet status` shows it
    #[arg(value_name = "GPU")]
    pub(crate) gpu: GpuId,
    /// The worker is gone by then: 90s, 5m [default: its setting worker.drain_ms]
    #[arg(long, value_name = "TIME", value_parser = deadline)]
    pub(crate) deadline: Option<u32>,
    /// Stay until it is gone
    #[arg(long)]
    pub(crate) wait: bool,
    /// One object
    #[arg(long)]
    pub(crate) json: bool,
}

/// In s.
fn deadline(text: &str) -> Result<u32, String> {
    match seconds(text)? {
        s @ 1..=3_600 => Ok(s),
        _ => Err("a drain takes a second to an hour".to_owned()),
    }
}
