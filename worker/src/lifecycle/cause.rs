//! Why an engine process ended, from what can be seen of its end. Pure.
//!
//! Every cause has one message for people, with what to do about it. What came from the device is held against no input:
//! only a crash or a standstill without a better explanation is.

use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

use rustix::process::Signal;
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    remedy::{self, Side},
};

use super::suspects::Death;
use crate::engine::last_words::LastWords;

/// What is seen of an end.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen<'a> {
    /// None where it could not be reaped.
    pub(super) status: Option<ExitStatus>,
    /// It was ended for standing still, or for never becoming ready.
    pub(super) stuck: bool,
    /// It spoke nonsense, or no longer spoke, and had to be killed.
    pub(super) wire: Option<&'a str>,
    /// The kernel has killed for want of memory while it lived.
    pub(super) memory_kill: bool,
    /// Last lines of its standard error.
    pub(super) lines: &'a [String],
}

/// An end that nobody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cause {
    pub(super) class: FailureClass,
    /// What was seen, without the remedy.
    pub(super) what: String,
    /// How the inputs it was working on are to be looked at; none: they have nothing to do with it.
    pub(super) death: Option<Death>,
    /// Whose remedy helps.
    pub(super) side: Side,
}

impl Cause {
    /// For people: what happened, and what to do about it.
    pub(super) fn failure(&self) -> Failure {
        Failure::new(self.class, remedy::told(self.side, self.class, &self.what))
    }
}

/// Whether a failure comes from the device and not from what it worked on.
pub(super) fn is_of_the_device(class: FailureClass) -> bool {
    matches!(class, FailureClass::DeviceLost | FailureClass::DriverMismatch | FailureClass::MissingLibrary)
}

/// Whether a failure speaks of this worker's device or engine, and not of what was asked of them.
pub(crate) fn is_of_this_worker(class: FailureClass) -> bool {
    is_of_the_device(class)
        || matches!(class, FailureClass::OutOfMemory | FailureClass::EngineCrash | FailureClass::Timeout)
}

/// What an end means; the best explanation first.
pub(super) fn cause(seen: Seen<'_>) -> Cause {
    let Seen { status, stuck, wire, memory_kill, lines } = seen;
    let last = lines.last().map_or("", String::as_str);
    let by = |class, what: String, death| Cause { class, what, death, side: Side::Engine };
    if stuck {
        let what = "the engine gave no sign of life and was ended".to_owned();
        return by(FailureClass::Timeout, what, Some(Death::Stuck));
    }
    if let Some(words) = status.and_then(|status| status.code()).and_then(LastWords::of_code) {
        let what = match last {
            "" => format!("the engine ended with code {}", words as i32),
            last => format!("the engine ended: {last}"),
        };
        let death = (words == LastWords::Assertion).then_some(Death::Crashed);
        let cause = by(words.class(), what, death);
        return if words == LastWords::NoLock { Cause { side: Side::Lock, ..cause } } else { cause };
    }
    // The dynamic loader's code; nothing of ours ran.
    if status.and_then(|status| status.code()) == Some(127)
        && let Some(line) = lines.iter().rev().find(|line| LastWords::in_text(line) == Some(LastWords::MissingLibrary))
    {
        return by(FailureClass::MissingLibrary, format!("the engine cannot be started: {line}"), None);
    }
    if let Some(wire) = wire {
        let what = format!("the engine could not be understood any more and was ended: {wire}");
        return by(FailureClass::EngineCrash, what, Some(Death::Crashed));
    }
    let Some(status) = status else {
        return by(FailureClass::EngineCrash, "the engine could not be reaped".to_owned(), Some(Death::Killed));
    };
    let is = |signal: Signal| status.signal() == Some(signal.as_raw());
    if is(Signal::KILL) && memory_kill {
        let what = "the kernel killed the engine because the host had no memory left".to_owned();
        return by(FailureClass::OutOfMemory, what, None);
    }
    if status.signal().is_some()
        && let Some(words) = LastWords::in_lines(lines)
    {
        return by(words.class(), format!("the engine was aborted: {last}"), None);
    }
    // A crash does not look like this; an operator, a service manager or the end of a terminal does.
    let from_outside = [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP].into_iter().any(is) || status.success();
    let how = match (status.signal(), status.code()) {
        (Some(signal), _) => format!("signal {signal}"),
        (None, code) => format!("code {}", code.unwrap_or_default()),
    };
    let what = match last {
        "" => format!("the engine ended with {how}"),
        last => format!("the engine ended with {how}: {last}"),
    };
    by(FailureClass::EngineCrash, what, Some(if from_outside { Death::Killed } else { Death::Crashed }))
}

/// One that never began. Its device and its inputs have nothing to do with that.
pub(super) fn not_spawned(error: &dyn std::error::Error) -> Cause {
    let mut what = format!("the engine process was not started: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        what += &format!(": {error}");
        source = error.source();
    }
    let class = FailureClass::EngineCrash;
    Cause { class, what, death: None, side: Side::Engine }
}

/// How often the kernel has killed something for want of memory, in this machine's life; 0 where it does not tell.
pub(super) fn memory_kills() -> u64 {
    let counters = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = counters.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signal(signal: Signal) -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(signal.as_raw()))
    }

    fn exit(code: i32) -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(code << 8))
    }

    #[test]
    fn what_is_seen_names_a_class_and_whether_an_input_may_be_blamed() {
        use FailureClass::*;
        let quiet = Seen::default();
        let loader =
            ["voxfleet: error while loading shared libraries: libcublas.so.13: cannot open shared object file"
                .to_owned()];
        let starved = ["memory allocation of 1920000 bytes failed".to_owned()];
        let starved_before: Vec<String> = starved.iter().cloned().chain((0..4).map(|n| format!("layer {n}"))).collect();
        let cases = [
            (Seen { status: exit(81), ..quiet }, OutOfMemory, None),
            (Seen { status: exit(82), ..quiet }, DeviceLost, None),
            (Seen { status: exit(83), ..quiet }, DriverMismatch, None),
            (Seen { status: exit(84), ..quiet }, EngineCrash, Some(Death::Crashed)),
            (Seen { status: exit(85), ..quiet }, MissingLibrary, None),
            (Seen { status: exit(86), ..quiet }, EngineCrash, None),
            (Seen { status: exit(127), lines: &loader, ..quiet }, MissingLibrary, None),
            (Seen { status: exit(127), ..quiet }, EngineCrash, Some(Death::Crashed)),
            (Seen { status: exit(1), ..quiet }, EngineCrash, Some(Death::Crashed)),
            (Seen { status: exit(101), ..quiet }, EngineCrash, Some(Death::Crashed)),
            (Seen { status: exit(0), ..quiet }, EngineCrash, Some(Death::Killed)),
            (Seen { status: signal(Signal::ABORT), ..quiet }, EngineCrash, Some(Death::Crashed)),
            (Seen { status: signal(Signal::SEGV), memory_kill: true, ..quiet }, EngineCrash, Some(Death::Crashed)),
            (Seen { status: signal(Signal::ABORT), lines: &starved, ..quiet }, OutOfMemory, None),
            (
                Seen { status: signal(Signal::ABORT), lines: &starved_before, ..quiet },
                EngineCrash,
                Some(Death::Crashed),
            ),
            (Seen { status: exit(101), lines: &starved, ..quiet }, EngineCrash, Some(Death::Crashed)),
            (Seen { status: signal(Signal::KILL), ..quiet }, EngineCrash, Some(Death::Killed)),
            (Seen { status: signal(Signal::KILL), memory_kill: true, ..quiet }, OutOfMemory, None),
            (Seen { status: signal(Signal::KILL), stuck: true, ..quiet }, Timeout, Some(Death::Stuck)),
            (
                Seen { status: signal(Signal::KILL), wire: Some("invalid frame"), ..quiet },
                EngineCrash,
                Some(Death::Crashed),
            ),
            (Seen { status: exit(81), wire: Some("connection closed inside a frame"), ..quiet }, OutOfMemory, None),
            (Seen { status: signal(Signal::TERM), memory_kill: true, ..quiet }, EngineCrash, Some(Death::Killed)),
            (quiet, EngineCrash, Some(Death::Killed)),
        ];
        for (seen, class, death) in cases {
            let found = cause(seen);
            assert_eq!((found.class, found.death), (class, death), "{seen:?}");
            let failure = found.failure();
            assert_eq!(failure.class, class);
            let side = if seen.status == exit(86) { Side::Lock } else { Side::Engine };
            assert_eq!(remedy::said(side, class, &failure.message), found.what);
            assert!(!found.what.is_empty() && failure.message != found.what, "{failure}");
        }
    }

    #[test]
    fn its_last_line_is_part_of_the_message() {
        let lines = ["loading".to_owned(), "CUDA error: out of memory".to_owned()];
        let found = cause(Seen { status: exit(81), lines: &lines, ..Seen::default() });
        assert_eq!(found.what, "the engine ended: CUDA error: out of memory");
    }

    #[test]
    fn what_ends_an_engine_is_of_this_worker() {
        use FailureClass::*;
        for class in [OutOfMemory, DeviceLost, DriverMismatch, MissingLibrary, EngineCrash, Timeout] {
            assert!(is_of_this_worker(class), "{class}");
        }
        for class in [BadRequest, BadAudio, ModelMissing, ModelDoesNotFit, NoCapacity, Cancelled, Internal] {
            assert!(!is_of_this_worker(class), "{class}");
        }
    }
}
