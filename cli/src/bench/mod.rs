//! `voxfleet bench`: stub.

use tokio_util::sync::CancellationToken;

use crate::exit::Exit;

/// Which bench to run.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench")]
pub(crate) struct BenchArgs {}

pub(crate) async fn run(_args: BenchArgs, _shutdown: CancellationToken) -> anyhow::Result<Exit> {
    anyhow::bail!("not there yet")
}
