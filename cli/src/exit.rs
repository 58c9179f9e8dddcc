//! Exit codes: one table, used by the code, printed by `--help`.
//!
//! A command fails with an [`anyhow::Error`]; the place that knows what kind of failure it is attaches an [`Exit`] with
//! [`OrExit`]. What carries none is [`Exit::Failure`].

use std::process::ExitCode;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Ok,
    /// The command ran and its answer is no: a check failed, a session ended in an error.
    Failure,
    /// What was typed cannot be meant. Clap uses the same number.
    Usage,
    Config,
    Input,
    Unavailable,
    Internal,
    /// Refused for now: no capacity. Trying again later may work.
    Refused,
    Interrupted,
}

impl Exit {
    pub(crate) const ALL: [(Exit, &'static str); 9] = [
        (Exit::Ok, "done"),
        (Exit::Failure, "failed, or a check found something wrong"),
        (Exit::Usage, "unknown command, option or value"),
        (Exit::Config, "bad configuration; every mistake is named"),
        (Exit::Input, "an input file cannot be read, or is not audio we can read"),
        (Exit::Unavailable, "NATS cannot be reached, or lacks what we need"),
        (Exit::Internal, "internal error: a bug"),
        (Exit::Refused, "refused for now (no GPU, no capacity); try again later"),
        (Exit::Interrupted, "stopped by Ctrl-C"),
    ];

    pub(crate) fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Failure => 1,
            Exit::Usage => 2,
            Exit::Config => 64,
            Exit::Input => 65,
            Exit::Unavailable => 69,
            Exit::Internal => 70,
            Exit::Refused => 75,
            Exit::Interrupted => 130,
        }
    }

    /// The table as `--help` shows it.
    pub(crate) fn help() -> String {
        let mut text = String::from("Exit codes:\n");
        for (exit, meaning) in Exit::ALL {
            text.push_str(&format!("  {:>3}  {meaning}\n", exit.code()));
        }
        text
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// An error with its exit code.
#[derive(Debug)]
struct Coded {
    exit: Exit,
    error: anyhow::Error,
}

impl std::fmt::Display for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

// No source: Display already prints the whole chain.
impl std::error::Error for Coded {}

pub(crate) trait OrExit<T> {
    /// Says which exit code this failure means.
    fn or_exit(self, exit: Exit) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> anyhow::Result<T> {
        self.map_err(|e| coded(exit, e.into()))
    }
}

pub(crate) fn coded(exit: Exit, error: anyhow::Error) -> anyhow::Error {
    anyhow::Error::new(Coded { exit, error })
}

/// What an error that reached `main` means.
pub(crate) fn exit_of(error: &anyhow::Error) -> Exit {
    if let Some(coded) = error.downcast_ref::<Coded>() {
        return coded.exit;
    }
    // `voxfleet watch | head` ends when head has seen enough: not a failure.
    let pipe_closed = error
        .chain()
        .filter_map(|e| e.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe);
    if pipe_closed { Exit::Ok } else { Exit::Failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outermost_code_survives_context() {
        use anyhow::Context as _;
        let failed: anyhow::Result<()> = Err(anyhow::anyhow!("no route")).or_exit(Exit::Unavailable);
        let error = failed.context("connect").expect_err("an error");
        assert_eq!(exit_of(&error), Exit::Unavailable);
        assert_eq!(format!("{error:#}"), "connect: no route");
        assert_eq!(exit_of(&anyhow::anyhow!("plain")), Exit::Failure);
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let error = anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert_eq!(exit_of(&error), Exit::Ok);
    }

    #[test]
    fn every_code_is_in_the_table_once() {
        let mut codes: Vec<u8> = Exit::ALL.iter().map(|(e, _)| e.code()).collect();
        codes.dedup();
        assert_eq!(codes, [0, 1, 2, 64, 65, 69, 70, 75, 130]);
        assert!(Exit::help().contains(" 69  NATS"));
    }
}
