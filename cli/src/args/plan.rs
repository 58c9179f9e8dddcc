//! Arguments of `plan`.

use std::path::PathBuf;

use clap::Args;
use voxfleet_store::models::plan::{GpuSpec, Tenant};

use super::commands::OutputArgs;

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet plan
  voxfleet plan --gpu T4:15GB --tenant voxtral=9.6GB
  voxfleet plan --gpu L4:24GB --model large-v3-turbo --model small.en --sessions 16
  voxfleet plan --model all --json | jq -r '.options[] | select(.risk == \"safe\").model'
  voxfleet plan --fleet examples/fleet-eight-cards.toml
  voxfleet plan --fleet examples/fleet-eight-cards.toml --fail gpu-0 --fail gpu-0,gpu-2

Sizes are as NVIDIA's tools count them: MB of 2^20 bytes, 1024 of them a GB; MiB and GiB mean the same.

Weights count once for each model, a decode state for each of the pool, and a session of a GPU only buffers in the memory
of the host. Safe is what leaves free what the dispatcher does (dispatcher.reserve_percent, 10 %), tight what leaves what
the worker does (worker.memory_reserve_percent, 5 %); beyond that it is refused. Recommended is the best model that is safe
and holds all the sessions. Figures are measured where a worker measured them on such a card, else the catalog's published
ones. Memory says what fits, not whether the device is fast enough for it.")]
pub(crate) struct PlanArgs {
    /// Plan for a card of this size instead of the device here
    #[arg(long, value_name = "NAME:SIZE")]
    pub(crate) gpu: Option<GpuSpec>,
    /// Another tenant of the card, beside those that are on the device here; can be repeated
    #[arg(long = "tenant", value_name = "NAME=SIZE")]
    pub(crate) tenants: Vec<Tenant>,
    /// A model of the catalog, or `all`; can be repeated [default: the full sizes of Whisper, and what is here]
    #[arg(long = "model", value_name = "MODEL")]
    pub(crate) models: Vec<String>,
    /// Sessions to hold at once [default: the setting worker.slots]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) sessions: Option<u64>,
    /// Decode states at most; fewer where that many do not fit [default: the setting worker.decode_states]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=8))]
    pub(crate) states: Option<u64>,
    /// Plan a fleet that this file describes: its cards, its services, their reserves and limits
    #[arg(long, value_name = "FILE", conflicts_with_all = ["gpu", "tenants", "models"])]
    pub(crate) fleet: Option<PathBuf>,
    /// Cards of the fleet that fail at once; can be repeated for further cases [default: each, and each two]
    #[arg(long = "fail", value_name = "CARD,...", requires = "fleet", conflicts_with_all = ["gpu", "tenants", "models"])]
    pub(crate) fails: Vec<String>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}
