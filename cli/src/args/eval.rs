//! Arguments of what measures a transcript.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use voxfleet_eval::text::Normalise;

use super::commands::OutputArgs;

const FILES: &str = "\
REF and HYP are files of ours or of others, or two folders, whose files are paired by name and counted together. Both may be
plain text, RTTM, `jobs result -f json`, `export -f json` or `-f words`, or a test call's JSON; HYP may be -.";

#[derive(Debug, Clone, Args)]
pub(crate) struct EvalArgs {
    #[command(subcommand)]
    pub(crate) what: EvalCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum EvalCommand {
    /// Word error rate of a transcript against what was said
    #[command(after_help = format!("Examples:
  voxfleet eval wer call-01.txt heard.txt
  voxfleet transcribe call-01.flac | voxfleet eval wer call-01.txt - --json
  voxfleet eval wer tests/audio heard/ --normalise english --align --bootstrap 1000

Edits (words that are wrong, missed, invented) per word of the reference, as a fraction; jiwer counts the same. Names in front
of lines count as words: export with --no-speakers, or as JSON.

{FILES}"))]
    Wer(WordArgs),
    /// Character error rate, spaces counted
    #[command(after_help = format!("Examples:
  voxfleet eval cer call-01.txt heard.txt
  voxfleet eval cer refs.txt heard.txt --by-line --normalise none --json

{FILES}"))]
    Cer(WordArgs),
    /// Diarization error rate: time that is missed, invented, or another's
    #[command(after_help = format!("Examples:
  voxfleet eval der tests/audio/call-03.rttm heard.rttm
  voxfleet export call-17 -f rttm | voxfleet eval der call-17.rttm - --collar 0.5 --skip-overlap
  voxfleet eval der meetings/ heard/ --json --bootstrap 1000

As pyannote.metrics defines it: speakers are mapped so that they share the most time, without a collar nothing is forgiven, and
what nobody says in either file is not scored unless --uem says what is.

{FILES}"))]
    Der(DerArgs),
    /// Word diarization error rate: words given to the wrong speaker
    #[command(after_help = format!("Examples:
  voxfleet eval wder tests/audio/call-03.json heard.json
  voxfleet export call-17 -f words | voxfleet eval wder call-17.json - --json

Words of both are aligned; of the pairs, right words or not, it is the share whose speakers differ once those of HYP are mapped
to those of REF (Shafey and others, 2019). Both need words with speakers.

{FILES}"))]
    Wder(WderArgs),
    /// From the end of a word to the moment it was shown
    #[command(after_help = "Examples:
  voxfleet stream call-01.flac --wait --json > shown.jsonl
  voxfleet eval latency tests/audio/call-01.json shown.jsonl
  voxfleet eval latency said.jsonl published.jsonl --json

REF has words with times: a test call's JSON, a transcript of ours, or lines of {\"word\", \"end_ms\"}. HYP is what
`voxfleet stream --wait --json` printed at speed 1, or lines of {\"word\", \"at_ms\"}, on the clock of the audio.")]
    Latency(LatencyArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct WordArgs {
    #[command(flatten)]
    pub(crate) sides: Sides,
    #[command(flatten)]
    pub(crate) normalise: NormaliseArg,
    /// Lines are utterances: each of REF against the one of the same number in HYP
    #[arg(long)]
    pub(crate) by_line: bool,
    /// Show what is beside what
    #[arg(long)]
    pub(crate) align: bool,
    #[command(flatten)]
    pub(crate) bootstrap: BootstrapArg,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DerArgs {
    #[command(flatten)]
    pub(crate) sides: Sides,
    /// Width of what is forgiven around each boundary of REF, half of it on either side
    #[arg(long, default_value_t = 0.0, value_name = "S", value_parser = collar)]
    pub(crate) collar: f64,
    /// Leave out what two turns of REF cover
    #[arg(long)]
    pub(crate) skip_overlap: bool,
    /// What is scored, as UEM: `<file> <channel> <start> <end>` a line [default: all that either side covers]
    #[arg(long, value_name = "FILE")]
    pub(crate) uem: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) bootstrap: BootstrapArg,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct WderArgs {
    #[command(flatten)]
    pub(crate) sides: Sides,
    #[command(flatten)]
    pub(crate) normalise: NormaliseArg,
    #[command(flatten)]
    pub(crate) bootstrap: BootstrapArg,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct LatencyArgs {
    #[command(flatten)]
    pub(crate) sides: Sides,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Sides {
    /// What was said: a file, - or a folder
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
    /// What was heard: a file, - or a folder
    #[arg(value_name = "HYP")]
    pub(crate) heard: String,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct NormaliseArg {
    /// What is done to both texts first: none (split at white space), basic (lower case, no punctuation), english (also
    /// numbers as figures, short forms written out, no hesitations)
    #[arg(long = "normalise", default_value_t, value_name = "NAME", value_parser = normalise)]
    pub(crate) by: Normalise,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct BootstrapArg {
    /// Say how far the figure may be off by the choice of files or lines: 95 % of this many sets drawn from them
    #[arg(long = "bootstrap", value_name = "N", value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pub(crate) rounds: Option<u32>,
}

fn normalise(name: &str) -> Result<Normalise, String> {
    name.parse().map_err(|error: voxfleet_eval::text::UnknownName| error.to_string())
}

fn collar(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=10.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds from 0 to 10".to_owned()),
    }
}
