//! Arguments of `models` and `plan`.

use clap::{Args, Subcommand};

use super::commands::OutputArgs;

#[derive(Debug, Clone, Args)]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    pub(crate) what: ModelsCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ModelsCommand {
    /// Every model by name: what is here, size, memory, licence
    #[command(after_help = "Examples:
  voxfleet models list
  voxfleet models list --here
  voxfleet models list --json | jq -r '.models[] | select(.state == \"present\").name'")]
    List(ListModelsArgs),
    /// Bring models here: resumed, verified, whole or not at all
    #[command(after_help = "Examples:
  voxfleet models pull tiny.en-q5_1 silero-vad
  voxfleet models pull large-v3-turbo --set models.quota_gb=20
  voxfleet models pull base.en --set models.mirrors=s3://models/whisper,file:///mnt/models

Sources are asked in order: models.mirrors, then those of the catalog (setting models.catalog adds models of your own).
Where nobody published a checksum, the first one seen is kept beside the model and holds from then on.")]
    Pull(PullArgs),
    /// Read models and compare their checksums
    #[command(after_help = "Examples:
  voxfleet models verify
  voxfleet models verify base.en --json")]
    Verify(VerifyArgs),
    /// Remove a model, or what a broken pull left of it
    #[command(after_help = "Examples:
  voxfleet models rm base.en")]
    Rm(RemoveArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ListModelsArgs {
    /// Only those that are here, whole or in part
    #[arg(long)]
    pub(crate) here: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PullArgs {
    /// Names, as `voxfleet models list` shows them
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Use no network: only file:// sources; say what is missing and how to bring it
    #[arg(long)]
    pub(crate) offline: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct VerifyArgs {
    /// One model [default: all that are here]
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RemoveArgs {
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet plan
  voxfleet plan --device-mb 24576 --others-mb 2048
  voxfleet plan --sessions 16 --json | jq -r '.options[] | select(.sessions == 16).model'

Weights count once for each model, a decode state for each of the pool, and a session only buffers in the memory of the
host. A tenth of the device stays free. Memory of models is published, not measured. Memory says what fits, not whether
the device is fast enough for it.")]
pub(crate) struct PlanArgs {
    /// Plan for a GPU of this size instead of the device here
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) device_mb: Option<u64>,
    /// Device memory that others use [default: what they use now; 0 with --device-mb]
    #[arg(long, value_name = "MB")]
    pub(crate) others_mb: Option<u64>,
    /// Sessions to hold at once [default: the setting worker.slots]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) sessions: Option<u64>,
    /// Decode states in the pool [default: the setting worker.decode_states]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=8))]
    pub(crate) states: Option<u64>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}
