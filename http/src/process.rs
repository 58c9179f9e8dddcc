//! This process as `/proc` knows it, under the names that Prometheus' own clients use.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::exposition::Exposition;

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    pub resident_bytes: u64,
    pub open_fds: u64,
    pub threads: u64,
    pub cpu_seconds: f64,
}

/// Now; what cannot be read is 0.
pub fn figures() -> Figures {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fds = std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
    let (page, hertz) = (rustix::param::page_size() as u64, rustix::param::clock_ticks_per_second());
    Figures { open_fds: fds, ..parse(&stat, page, hertz) }
}

/// `proc(5)`: fields behind the command, which is in parentheses and may hold anything.
fn parse(stat: &str, page_bytes: u64, ticks_per_s: u64) -> Figures {
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let at = |n: usize| fields.get(n).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    Figures {
        // Fields 24, 20, 14 and 15 of the page; the first behind the command is 3.
        resident_bytes: at(21) * page_bytes,
        threads: at(17),
        cpu_seconds: (at(11) + at(12)) as f64 / ticks_per_s.max(1) as f64,
        open_fds: 0,
    }
}

/// `started`: when this process began.
pub fn expose(out: &mut Exposition, started: SystemTime) {
    let now = figures();
    let since = started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    out.gauge("process_resident_memory_bytes", "resident memory of this process").value(now.resident_bytes as f64);
    out.gauge("process_open_fds", "open file descriptors of this process").value(now.open_fds as f64);
    out.gauge("process_threads", "threads of this process").value(now.threads as f64);
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        let tasks = runtime.metrics().num_alive_tasks();
        out.gauge("voxfleet_tasks", "tasks of this process that have not ended").value(tasks as f64);
    }
    out.gauge("process_start_time_seconds", "unix time at which this process began").value(since);
    out.counter("process_cpu_seconds_total", "user and system time of this process").value(now.cpu_seconds);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_parentheses_and_blanks_is_passed_over() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 9 0 1234 999 25 18446744073709551615 1";
        let figures = parse(stat, 4_096, 100);
        assert_eq!(figures, Figures { resident_bytes: 102_400, open_fds: 0, threads: 9, cpu_seconds: 2.0 });
    }

    #[test]
    fn this_process_has_memory_and_descriptors() {
        let now = figures();
        assert!(now.resident_bytes > 1 << 20 && now.open_fds >= 3 && now.threads >= 1, "{now:?}");
    }
}
