//! Arguments of `purge`.

use clap::{Args, ValueEnum};
use voxfleet_schema::id::{Kind, StreamId};

use super::{commands::OutputArgs, job::seconds};

#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  voxfleet purge session call-7 --dry-run
  voxfleet purge session call-7
  voxfleet purge job call-17 --json | jq .total
  voxfleet purge --older-than 7d --dry-run
  voxfleet purge --older-than 12h --kind session

Removes audio, hints, transcripts, revisions, partials, checkpoints, events, dead letters, the key, and of a job its
requests, its parts, and the objects it wrote or names (a recording that another job names too stays). What is still open
is refused, or with --older-than passed over. Run it again after an error: what is gone is gone.")]
pub(crate) struct PurgeArgs {
    /// What it is
    #[arg(value_enum, value_name = "session|job", requires = "id", required_unless_present = "older_than")]
    pub(crate) what: Option<KindArg>,
    /// Which one: its whole id
    #[arg(value_name = "ID")]
    pub(crate) id: Option<StreamId>,
    /// Everything of which nothing is newer than this: 90s, 30m, 12h, 7d
    #[arg(long, value_name = "TIME", value_parser = age, conflicts_with_all = ["what", "id", "force"])]
    pub(crate) older_than: Option<u32>,
    /// Only sessions, or only jobs
    #[arg(long, value_enum, value_name = "KIND", requires = "older_than", conflicts_with_all = ["what", "id"])]
    pub(crate) kind: Option<KindArg>,
    /// Tell what would go, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Though it is open: close the session or cancel the job first, wait up to 30 s for its end, and remove it even
    /// where that does not come
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KindArg {
    Session,
    Job,
}

impl From<KindArg> for Kind {
    fn from(kind: KindArg) -> Self {
        match kind {
            KindArg::Session => Kind::Session,
            KindArg::Job => Kind::Job,
        }
    }
}

/// In s.
fn age(text: &str) -> Result<u32, String> {
    match seconds(text)? {
        0 => Err("everything is older than 0 s; name a longer time".to_owned()),
        seconds => Ok(seconds),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::args::Cli;

    #[test]
    fn one_is_named_or_an_age() {
        let reads = |words: &str| Cli::try_parse_from(format!("voxfleet purge {words}").split_whitespace()).is_ok();
        for good in [
            "session a",
            "job a --dry-run --json",
            "session a --force",
            "--older-than 7d",
            "--older-than 90s --kind job --dry-run",
        ] {
            assert!(reads(good), "{good}");
        }
        for bad in [
            "",
            "session",
            "a",
            "session a.b",
            "session a --kind job",
            "--kind job",
            "--older-than 0s",
            "--older-than soon",
            "session a --older-than 7d",
            "--older-than 7d --force",
        ] {
            assert!(!reads(bad), "{bad}");
        }
    }
}
