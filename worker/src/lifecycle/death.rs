//! What a child's end says about what it was doing.

use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

use rustix::process::Signal;

use super::suspects::Death;

/// `stuck`: it was killed for standing still. `out_of_memory`: the kernel has killed for want of memory while it lived.
pub(super) fn death(status: Option<ExitStatus>, stuck: bool, out_of_memory: bool) -> Death {
    if stuck {
        return Death::Stuck;
    }
    let Some(status) = status else { return Death::Killed };
    let is = |signal: Signal| status.signal() == Some(signal.as_raw());
    if is(Signal::KILL) && out_of_memory {
        return Death::Crashed;
    }
    // A crash does not look like this; an operator, a service manager or the end of a terminal does.
    let from_outside = [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP].into_iter().any(is);
    if from_outside || status.success() { Death::Killed } else { Death::Crashed }
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

    #[test]
    fn only_what_a_child_did_to_itself_is_held_against_its_input() {
        let signal = |signal: Signal| Some(ExitStatus::from_raw(signal.as_raw()));
        let exit = |code: i32| Some(ExitStatus::from_raw(code << 8));
        let cases = [
            (signal(Signal::ABORT), false, false, Death::Crashed),
            (signal(Signal::SEGV), false, false, Death::Crashed),
            (exit(1), false, false, Death::Crashed),
            (exit(0), false, false, Death::Killed),
            (signal(Signal::KILL), false, false, Death::Killed),
            (signal(Signal::KILL), false, true, Death::Crashed),
            (signal(Signal::KILL), true, false, Death::Stuck),
            (signal(Signal::TERM), false, true, Death::Killed),
            (None, false, false, Death::Killed),
        ];
        for (status, stuck, out_of_memory, expected) in cases {
            assert_eq!(death(status, stuck, out_of_memory), expected, "{status:?} {stuck} {out_of_memory}");
        }
    }
}
