//! Arguments of each command.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use voxfleet_schema::{audio::AudioFormat, id::StreamId};

use super::job::{OptionArgs, Typed};
use crate::config::Role;

#[cfg(feature = "dispatcher")]
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet dispatcher --url nats://hub:4222
  voxfleet dispatcher --name a --log-format json")]
pub(crate) struct DispatcherArgs {
    /// Name in status and logs [default: made up]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
}

#[cfg(feature = "worker")]
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet worker --url nats://hub:4222
  voxfleet worker --models-dir /models --model small.en --slots 8
  voxfleet worker --all-gpus --models-dir /models
  voxfleet worker --gpu none --engine simulated --gpu-id cpu-test-0

Workers of one host need different names. Those on GPUs have them from their devices; one on the CPU takes the next that
it hears nobody use. CPU workers that start within the same second need --gpu-id or --set worker.index=1 (2, 3, ...).")]
pub(crate) struct WorkerArgs {
    /// auto, none (the CPU), an NVML index or a UUID (GPU-... or MIG-...)
    #[arg(long, value_name = "GPU")]
    pub(crate) gpu: Option<String>,
    /// A worker process for each GPU of this machine, or instance of a split one; those that die are started again
    #[arg(long, conflicts_with_all = ["gpu", "gpu_id"])]
    pub(crate) all_gpus: bool,
    /// Stable name of this device [default: from its NVML UUID, or cpu-<host>-0]
    #[arg(long, value_name = "ID")]
    pub(crate) gpu_id: Option<String>,
    /// whisper_cpp or simulated
    #[arg(long, value_name = "ENGINE")]
    pub(crate) engine: Option<String>,
    /// Folder with ggml model files
    #[arg(long, value_name = "DIR")]
    pub(crate) models_dir: Option<String>,
    /// Model of sessions that name none
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Live sessions held at once
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<u32>,
}

#[cfg(feature = "worker")]
#[derive(Debug, Clone, Args)]
pub(crate) struct EngineArgs {
    /// The inherited socket
    #[arg(long)]
    pub(crate) fd: i32,
}

#[cfg(feature = "worker")]
#[derive(Debug, Clone, Args)]
pub(crate) struct AudioDecoderArgs {
    /// The inherited recording
    #[arg(long)]
    pub(crate) fd: i32,
    /// The inherited socket
    #[arg(long)]
    pub(crate) out: i32,
    #[arg(long)]
    pub(crate) max_seconds: u64,
    #[arg(long)]
    pub(crate) memory_mb: u64,
    #[arg(long)]
    pub(crate) extension: Option<String>,
}

#[cfg(feature = "bench")]
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet demo
  voxfleet demo --speed 4 --call 03
  voxfleet demo --json > demo.json
  voxfleet demo --serve

It starts a server of its own, so --url and --creds are refused.")]
pub(crate) struct DemoArgs {
    /// Which test call: tests/audio/call-<CALL>.flac
    #[arg(long, default_value = "01", value_name = "CALL")]
    pub(crate) call: String,
    /// Times real time
    #[arg(long, default_value_t = 1.0, value_name = "N", value_parser = speed)]
    pub(crate) speed: f64,
    /// One object on standard output and nothing else
    #[arg(long)]
    pub(crate) json: bool,
    /// Leave the server and the processes running until Ctrl-C, to look around with `nats`
    #[arg(long)]
    pub(crate) keep: bool,
    /// Only start the server and the fleet, and print lines to try on them; Ctrl-C stops all of it
    #[arg(long, conflicts_with_all = ["keep", "json", "call", "speed"])]
    pub(crate) serve: bool,
    /// What hears: whisper_cpp, or ct2 in builds that have it
    #[arg(long, value_enum, default_value_t, value_name = "ENGINE")]
    pub(crate) engine: DemoEngine,
    /// Without the second act, in which the worker that has the call is killed
    #[arg(long)]
    pub(crate) no_kill: bool,
    /// Folder of the test calls [default: tests/audio of the source tree]
    #[arg(long, value_name = "DIR")]
    pub(crate) audio_dir: Option<PathBuf>,
    /// Folder of the test models [default: tests/models of the source tree]
    #[arg(long, value_name = "DIR")]
    pub(crate) models_dir: Option<PathBuf>,
}

/// The engine of a demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum DemoEngine {
    #[default]
    #[value(name = "whisper_cpp")]
    WhisperCpp,
    #[value(name = "ct2")]
    Ct2,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet stream call.flac --wait
  voxfleet stream call.wav --session call-7 --speed 4 --language en -o interim=false
  voxfleet stream stereo.wav --channels split --channel-names agent,customer --wait
  arecord -q -f S16_LE -r 16000 -c 1 -t raw | voxfleet stream - --session mic --wait
  voxfleet stream --open --format 'pcm_s16le;rate=8000' phone.raw")]
pub(crate) struct StreamArgs {
    /// A recording in any format that jobs take, or raw PCM; - is standard input
    #[arg(value_name = "FILE")]
    pub(crate) input: String,
    /// Id of the session: letters, digits, - and _ [default: random]
    #[arg(long, value_name = "ID")]
    pub(crate) session: Option<StreamId>,
    /// Times real time; 0 sends as fast as it is acknowledged [default: 1, for standard input 0]
    #[arg(long, value_name = "N", value_parser = speed)]
    pub(crate) speed: Option<f64>,
    /// Length of a chunk
    #[arg(long, default_value_t = 200, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=30_000))]
    pub(crate) chunk_ms: u32,
    /// Take the input as raw PCM of this format [default for what is no wav or flac: pcm_s16le;rate=16000;channels=1]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<AudioFormat>,
    /// Any session option by its name: interim, idle_timeout_s, carry_prompt, ...; can be repeated
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE", value_parser = super::pair)]
    pub(crate) others: Vec<(String, String)>,
    /// Ask the dispatcher for a place first, and fail if there is none; without it the audio waits in the log
    #[arg(long)]
    pub(crate) open: bool,
    /// Do not end the session: more audio will follow under the same id
    #[arg(long)]
    pub(crate) no_end: bool,
    /// Show the transcript and stay until the session's end final
    #[arg(long, conflicts_with = "no_end")]
    pub(crate) wait: bool,
    /// Give up when a chunk was not acknowledged for this long
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) give_up_s: u64,
    /// One object a line on standard output
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) flags: OptionArgs,
}

impl Default for StreamArgs {
    /// What no flag at all means.
    fn default() -> Self {
        Self {
            input: "-".to_owned(),
            session: None,
            speed: None,
            chunk_ms: 200,
            format: None,
            others: Vec::new(),
            open: false,
            no_end: false,
            wait: false,
            give_up_s: 60,
            json: false,
            flags: OptionArgs::default(),
        }
    }
}

impl StreamArgs {
    pub(crate) fn options(&self) -> Typed<'_> {
        Typed { flags: &self.flags, others: &self.others }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum From {
    /// What is kept of the past, then what comes
    Start,
    /// Only what comes
    #[default]
    Now,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet watch
  voxfleet watch call-7 --from start --until-end
  voxfleet watch --json | jq -r 'select(.type == \"final\") | .final.segments[].text'")]
pub(crate) struct WatchArgs {
    /// One session [default: all]
    #[arg(value_name = "SESSION")]
    pub(crate) session: Option<StreamId>,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) from: From,
    /// Leave at the end final (of any session, when none is named)
    #[arg(long)]
    pub(crate) until_end: bool,
    /// Finals only
    #[arg(long)]
    pub(crate) no_partials: bool,
    /// Show the time of each word under its final
    #[arg(long)]
    pub(crate) words: bool,
    /// One object a line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet status
  voxfleet status --why call-7
  voxfleet status --json | jq '.workers[].heartbeat.held'")]
pub(crate) struct StatusArgs {
    /// Ended sessions too
    #[arg(long)]
    pub(crate) all: bool,
    /// One session or job: where it is, and what spoke for and against each GPU, then and now
    #[arg(long, value_name = "ID", conflicts_with = "all")]
    pub(crate) why: Option<StreamId>,
    /// Again and again, each so many seconds, until Ctrl-C
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", conflicts_with = "why",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) watch: Option<u64>,
    /// One object; with --watch one a line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet health
  voxfleet health --ready
  voxfleet health --at https://fleet.example:9480 --ca ca.pem

Ends with 0 where the process is alive (with --ready: where work progresses), else with 1. Needs no token.")]
pub(crate) struct HealthArgs {
    /// Where it serves HTTP; with a path, what to ask (nats-server: http://127.0.0.1:8222/healthz)
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9480")]
    pub(crate) at: String,
    /// Ask whether work progresses
    #[arg(long)]
    pub(crate) ready: bool,
    /// Certificates to trust in place of the system's
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// How long to wait for the answer, in s
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) timeout: u64,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet doctor
  voxfleet doctor --url nats://hub:4222 --json")]
pub(crate) struct DoctorArgs {
    /// One object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  nats sub 'asr.v1.>' --translate 'voxfleet decode'
  nats stream get ASR_CHECKPOINT 1 --translate 'voxfleet decode'
  voxfleet decode --format 'pcm_s16le;rate=8000' < chunk.raw")]
pub(crate) struct DecodeArgs {
    /// What raw audio is taken for
    #[arg(long, value_name = "FORMAT", default_value_t)]
    pub(crate) format: AudioFormat,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    pub(crate) what: ConfigCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Read it as a service would, and name every mistake
    #[command(after_help = "Examples:
  voxfleet config check
  voxfleet config check worker --config deploy/voxfleet.toml --json")]
    Check(CheckArgs),
    /// Every setting, its value and where it came from; secrets stay hidden
    #[command(after_help = "Examples:
  voxfleet config show
  VOXFLEET__NATS__URLS=nats://hub:4222 voxfleet config show --json")]
    Show(OutputArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct CheckArgs {
    /// Parts to check whole [default: those that are configured]
    #[arg(value_enum, value_name = "PART")]
    pub(crate) roles: Vec<Role>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct OutputArgs {
    /// One object
    #[arg(long)]
    pub(crate) json: bool,
}

pub(super) fn speed(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(speed) if speed.is_finite() && (0.0..=1000.0).contains(&speed) => Ok(speed),
        _ => Err("expected a number from 0 to 1000".to_owned()),
    }
}
