//! Arguments of what has to do with recordings: jobs, their results, transcripts as files.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use voxfleet_schema::{
    id::StreamId,
    job::{JobState, MAX_RESULT_TTL_S},
    session::{OptionError, SessionOptions},
};

use super::{
    commands::{OutputArgs, speed},
    dead::DeadArgs,
};
use crate::formats::Format;

/// Options that have flags of their own, for live audio and recordings alike.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Transcription")]
pub(crate) struct OptionArgs {
    /// Model, as the fleet names it [default: the fleet's]
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Language spoken, such as en or de; auto finds it out [default: auto]
    #[arg(long, value_name = "CODE")]
    pub(crate) language: Option<String>,
    /// transcribe, or translate (into English) [default: transcribe]
    #[arg(long, value_name = "TASK")]
    pub(crate) task: Option<String>,
    /// Text the model is told came before
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Words to expect, separated by commas
    #[arg(long, value_name = "WORDS")]
    pub(crate) hotwords: Option<String>,
    /// Who speaks: on, off, or auto where it can be had [default: off]
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub(crate) diarize: Option<String>,
    /// With --diarize: at least so many people [default: found]
    #[arg(long, value_name = "N")]
    pub(crate) min_speakers: Option<u16>,
    /// With --diarize: at most so many people [default: found]
    #[arg(long, value_name = "N")]
    pub(crate) max_speakers: Option<u16>,
    /// mix, or split: each channel transcribed by itself, a speaker each [default: mix]
    #[arg(long, value_name = "CHANNELS")]
    pub(crate) channels: Option<String>,
    /// With split: who is on the channels from the first on, separated by commas [default: ch0,ch1,...]
    #[arg(long, value_name = "NAMES")]
    pub(crate) channel_names: Option<String>,
    /// Silence that ends an utterance, 100 to 5000 [default: 500]
    #[arg(long, value_name = "MS")]
    pub(crate) endpoint_ms: Option<u32>,
    /// What may stand in for the model and device: exact_model, allow_smaller, allow_cpu, force_cpu [default: allow_cpu]
    #[arg(long, value_name = "POLICY")]
    pub(crate) policy: Option<String>,
    /// high, normal or low [default: normal]
    #[arg(long, value_name = "PRIORITY")]
    pub(crate) priority: Option<String>,
}

/// Session options as they were typed, the flags and the pairs.
pub(crate) struct Typed<'a> {
    pub(super) flags: &'a OptionArgs,
    pub(super) others: &'a [(String, String)],
}

impl Typed<'_> {
    /// By their names on the wire; a flag comes before a pair, and the last of a name counts.
    pub(crate) fn pairs(&self) -> Vec<(String, String)> {
        let flags = [
            ("model", self.flags.model.clone()),
            ("language", self.flags.language.clone()),
            ("task", self.flags.task.clone()),
            ("prompt", self.flags.prompt.clone()),
            ("hotwords", self.flags.hotwords.clone()),
            ("diarize", self.flags.diarize.clone()),
            ("min_speakers", self.flags.min_speakers.map(|n| n.to_string())),
            ("max_speakers", self.flags.max_speakers.map(|n| n.to_string())),
            ("channels", self.flags.channels.clone()),
            ("channel_names", self.flags.channel_names.clone()),
            ("endpoint_ms", self.flags.endpoint_ms.map(|ms| ms.to_string())),
            ("policy", self.flags.policy.clone()),
            ("priority", self.flags.priority.clone()),
        ];
        let flags = flags.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        flags.chain(self.others.iter().cloned()).collect()
    }

    pub(crate) fn parsed(&self) -> Result<SessionOptions, OptionError> {
        let mut options = SessionOptions::default();
        for (name, value) in self.pairs() {
            options.set(&name, &value)?;
        }
        options.validate()?;
        Ok(options)
    }
}

/// A recording and what is wanted of it.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct JobArgs {
    /// A recording: a file here, - for standard input, or where workers find it: https://, s3://, object://, file://
    #[arg(value_name = "FILE|URL|-")]
    pub(crate) input: String,
    /// Id of the job: letters, digits, - and _ [default: random]
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<StreamId>,
    /// Name for people, and a hint at the container [default: that of the file]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// How long the result is kept: 90s, 30m, 12h, 7d [default: 24h]
    #[arg(long, value_name = "TIME", value_parser = ttl)]
    pub(crate) ttl: Option<u32>,
    /// Any other option by its name; can be repeated
    #[arg(long = "option", value_name = "NAME=VALUE", value_parser = super::pair)]
    pub(crate) others: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) flags: OptionArgs,
}

impl JobArgs {
    pub(crate) fn options(&self) -> Typed<'_> {
        Typed { flags: &self.flags, others: &self.others }
    }
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet transcribe call.mp3
  voxfleet transcribe call.flac -f srt -o call.srt --language en
  voxfleet transcribe meeting.flac --diarize -f rttm -o meeting.rttm
  voxfleet transcribe stereo.wav --channels split --channel-names agent,customer
  voxfleet transcribe https://example.com/interview.m4a -f json | jq -r .full_text
  voxfleet transcribe s3://calls/2024/17.ogg --id call-17 --priority low --detach
  ffmpeg -i talk.mkv -f wav - | voxfleet transcribe - -f vtt
  voxfleet transcribe --live call.wav

A file is put into the object store of the NATS account first; workers fetch a URL themselves, as far as their
configuration allows. Ctrl-C cancels the job.")]
pub(crate) struct TranscribeArgs {
    #[command(flatten)]
    pub(crate) output: FileArgs,
    /// Print the id of the job and leave
    #[arg(long, conflicts_with_all = ["live", "format", "output"])]
    pub(crate) detach: bool,
    /// Stream it through a live session, at its own pace, instead of submitting a job
    #[arg(long, conflicts_with_all = ["ttl", "name"])]
    pub(crate) live: bool,
    /// With --live: times real time; 0 sends as fast as it is acknowledged [default: 1]
    #[arg(long, value_name = "N", value_parser = speed, requires = "live")]
    pub(crate) speed: Option<f64>,
    /// Show segments on standard error as they come
    #[arg(short, long)]
    pub(crate) verbose: bool,
    #[command(flatten)]
    pub(crate) job: JobArgs,
}

/// In which form, and where to.
#[derive(Debug, Clone, Args)]
pub(crate) struct FileArgs {
    /// In which form
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) format: Format,
    /// Text and subtitles without the names of who speaks
    #[arg(long)]
    pub(crate) no_speakers: bool,
    /// Where to; it is there whole or not at all [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct JobsArgs {
    #[command(subcommand)]
    pub(crate) what: JobsCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum JobsCommand {
    /// Submit a recording and print the id of its job
    #[command(after_help = "Examples:
  voxfleet jobs submit call.mp3 --id call-17
  voxfleet jobs submit s3://calls/2024/17.ogg --language de --priority low --ttl 7d
  voxfleet jobs submit https://example.com/interview.m4a --json | jq -r .job")]
    Submit(Box<SubmitArgs>),
    /// Jobs, newest first
    #[command(after_help = "Examples:
  voxfleet jobs list
  voxfleet jobs list --state failed --limit 20
  voxfleet jobs list --watch")]
    List(ListArgs),
    /// Everything about one job: how far it is, and why it waits
    #[command(after_help = "Examples:
  voxfleet jobs show call-17
  voxfleet jobs show call-17 --json | jq .progress")]
    Show(JobArg),
    /// Stop a job, whether it waits or runs
    #[command(after_help = "Examples:
  voxfleet jobs cancel call-17")]
    Cancel(JobArg),
    /// The result of a job that is done
    #[command(after_help = "Examples:
  voxfleet jobs result call-17
  voxfleet jobs result call-17 -f srt -o call-17.srt")]
    Result(ResultArgs),
    /// What could not be done and was set aside: jobs that failed for good, parts of sessions that crashed the engine
    Dead(DeadArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct SubmitArgs {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    pub(crate) job: JobArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ListArgs {
    /// Only those in this state
    #[arg(long, value_enum, value_name = "STATE")]
    pub(crate) state: Option<State>,
    /// How many at most
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) limit: u32,
    /// The parts of this long recording, which the list leaves out
    #[arg(long, value_name = "JOB")]
    pub(crate) parts_of: Option<StreamId>,
    /// Show them again every two seconds, until Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum State {
    Queued,
    Assigned,
    Closing,
    Done,
    Failed,
    Cancelled,
}

impl From<State> for JobState {
    fn from(state: State) -> Self {
        match state {
            State::Queued => JobState::Queued,
            State::Assigned => JobState::Assigned,
            State::Closing => JobState::Closing,
            State::Done => JobState::Done,
            State::Failed => JobState::Failed,
            State::Cancelled => JobState::Cancelled,
        }
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct JobArg {
    /// The job
    #[arg(value_name = "ID")]
    pub(crate) id: StreamId,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ResultArgs {
    /// The job
    #[arg(value_name = "ID")]
    pub(crate) id: StreamId,
    #[command(flatten)]
    pub(crate) file: FileArgs,
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet export call-17 -f srt
  voxfleet export standup --session -f vtt -o standup.vtt
  voxfleet export call-17 -f rttm -o call-17.rttm
  voxfleet export call-17 -f words | jq -r '.words[] | [.start, .speaker, .word] | @tsv'
  voxfleet export call-17 --job -f json | jq -r .full_text

From the stored finals, so it works while a session or job still runs; what is there by now is written, and said.")]
pub(crate) struct ExportArgs {
    /// A session or a job
    #[arg(value_name = "ID")]
    pub(crate) id: StreamId,
    /// It is a session [default: whichever there is]
    #[arg(long, conflicts_with = "job")]
    pub(crate) session: bool,
    /// It is a job
    #[arg(long)]
    pub(crate) job: bool,
    #[command(flatten)]
    pub(crate) file: FileArgs,
}

/// How long a result is kept.
fn ttl(text: &str) -> Result<u32, String> {
    match seconds(text)? {
        seconds if (60..=MAX_RESULT_TTL_S).contains(&seconds) => Ok(seconds),
        _ => Err("a result is kept for a minute to 30 days".to_owned()),
    }
}

/// Seconds, or a number with s, m, h or d.
pub(super) fn seconds(text: &str) -> Result<u32, String> {
    let (number, unit) = match text.trim_end_matches(|c: char| c.is_ascii_alphabetic()) {
        number if number.len() == text.len() => (number, "s"),
        number => (number, &text[number.len()..]),
    };
    let unit: u32 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err("expected a time such as 90s, 30m, 12h or 7d".to_owned()),
    };
    let seconds = number.parse::<u32>().ok().and_then(|n| n.checked_mul(unit));
    seconds.ok_or_else(|| "expected a time such as 90s, 30m, 12h or 7d".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("30m", 1_800), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(ttl(text), Ok(seconds), "{text}");
        }
        for text in ["", "h", "1.5h", "-1h", "1w", "59s", "31d", "9999999999d", "1 h"] {
            assert!(ttl(text).is_err(), "{text}");
        }
    }

    #[test]
    fn flags_and_pairs_become_options() {
        let flags = OptionArgs {
            language: Some("de".to_owned()),
            endpoint_ms: Some(300),
            priority: Some("low".to_owned()),
            channels: Some("split".to_owned()),
            channel_names: Some("agent, customer".to_owned()),
            ..OptionArgs::default()
        };
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let others = [pair("interim", "false"), pair("endpoint_ms", "900")];
        let options = Typed { flags: &flags, others: &others }.parsed().expect("options");
        assert_eq!((options.language.as_deref(), options.endpoint_ms, options.interim), (Some("de"), 900, false));
        assert_eq!(options.speaker_of(1).as_deref(), Some("customer"));
        assert!(Typed { flags: &flags, others: &[pair("colour", "red")] }.parsed().is_err());
    }
}
