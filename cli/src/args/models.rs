//! Arguments of `models`.

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
