//! Arguments of `models`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

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
    /// Make a CTranslate2 folder of a ggml Whisper file, so that one download serves both engines
    #[command(after_help = "Examples:
  voxfleet models convert ~/.cache/voxfleet/models/base.en.bin
  voxfleet models convert ggml-small.bin --out /models/small-ct2 --precision int8_float32

Any precision runs on any device: the engine turns the numbers into what it computes with when it loads them. float16 keeps
what f16 and quantized files hold; int8 halves it again and changes a word now and then.")]
    Convert(ConvertArgs),
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
pub(crate) struct ConvertArgs {
    /// A Whisper model as whisper.cpp has it: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// The folder to make; it must not exist [default: beside the file, by its name]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// How numbers are kept
    #[arg(long, value_name = "TYPE", default_value = "float16")]
    pub(crate) precision: ConvertedPrecision,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// CTranslate2's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConvertedPrecision {
    #[value(name = "float32")]
    Float32,
    #[value(name = "float16")]
    Float16,
    #[value(name = "int8_float32")]
    Int8Float32,
    #[value(name = "int8_float16")]
    Int8Float16,
}
