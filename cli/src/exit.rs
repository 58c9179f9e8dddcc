//! Exit codes: one table, used by the code, printed by `--help`.
//!
//! A command fails with an [`anyhow::Error`]; the place that knows what kind of failure it is attaches an [`Exit`] with
//! [`OrExit`]. What carries none is [`Exit::Failure`].

use std::process::ExitCode;

use voxfleet_nats::api::ApiError;
use voxfleet_schema::failure::FailureClass;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Ok,
    /// The command ran and its answer is no: a check failed, a session ended in an error.
    Failure,
    /// What was typed cannot be meant. Clap uses the same number.
    Usage,
    Config,
    Input,
    /// What was named is not there, or is not for us.
    NotFound,
    Unavailable,
    Internal,
    /// Not now: no capacity, not done yet, not in time. Trying again later may work.
    Refused,
    Interrupted,
}

impl Exit {
    pub(crate) const ALL: [(Exit, &'static str); 10] = [
        (Exit::Ok, "done"),
        (Exit::Failure, "failed, or a check found something wrong"),
        (Exit::Usage, "unknown command, option or value"),
        (Exit::Config, "bad configuration; every mistake is named"),
        (Exit::Input, "an input file cannot be read, or is not audio we can read"),
        (Exit::NotFound, "no such job, session or recording, or it may not be read"),
        (Exit::Unavailable, "NATS, or what holds a recording, cannot be reached or lacks what we need"),
        (Exit::Internal, "internal error: a bug"),
        (Exit::Refused, "not now (no capacity, not done yet, out of time); try again later"),
        (Exit::Interrupted, "stopped by Ctrl-C"),
    ];

    pub(crate) fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Failure => 1,
            Exit::Usage => 2,
            Exit::Config => 64,
            Exit::Input => 65,
            Exit::NotFound => 66,
            Exit::Unavailable => 69,
            Exit::Internal => 70,
            Exit::Refused => 75,
            Exit::Interrupted => 130,
        }
    }

    /// What a failure of this class means to whoever asked for the work.
    pub(crate) fn of_class(class: FailureClass) -> Exit {
        use FailureClass::*;
        match class {
            BadAudio | UnsupportedFormat | TooLarge | AudioAfterEnd | StaleSource => Exit::Input,
            NotFound | Forbidden => Exit::NotFound,
            Unavailable => Exit::Unavailable,
            NoCapacity | NoWorkers | Timeout => Exit::Refused,
            BadRequest | ModelMissing | ModelDoesNotFit | OutOfMemory | EngineCrash | DeviceLost | DriverMismatch
            | MissingLibrary | Cancelled | Internal | Unknown => Exit::Failure,
        }
    }

    /// What it means that a request to the dispatcher came to nothing.
    pub(crate) fn of_api(error: &ApiError) -> Exit {
        match error {
            ApiError::Refused(failure) => Exit::of_class(failure.class),
            ApiError::NoDispatcher | ApiError::Timeout | ApiError::Server(_) => Exit::Unavailable,
            ApiError::Encode(_) | ApiError::Malformed(_) => Exit::Internal,
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
    fn a_failure_has_the_code_of_its_class() {
        use FailureClass::*;
        for (class, code) in [
            (BadAudio, 65),
            (TooLarge, 65),
            (NotFound, 66),
            (Forbidden, 66),
            (Unavailable, 69),
            (Timeout, 75),
            (NoWorkers, 75),
            (EngineCrash, 1),
        ] {
            assert_eq!(Exit::of_class(class).code(), code, "{class}");
        }
        let refused = voxfleet_schema::failure::Failure::new(NotFound, "no such job");
        assert_eq!(Exit::of_api(&ApiError::Refused(refused)), Exit::NotFound);
        assert_eq!(Exit::of_api(&ApiError::NoDispatcher), Exit::Unavailable);
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
        assert_eq!(codes, [0, 1, 2, 64, 65, 66, 69, 70, 75, 130]);
        assert!(Exit::help().contains(" 69  NATS,"));
    }
}
