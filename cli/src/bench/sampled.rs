//! Resident memory of every process of a fleet, looked at each second.

use std::{collections::BTreeMap, fs, time::Duration};

use serde_json::{Value, json};
use voxfleet_harness::child::{children_of, resident_bytes};

use super::{processes::Memory, rounded};

const EACH: Duration = Duration::from_secs(1);

/// The processes that are always there, and the children of one worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Processes {
    pub(super) nats_server: u32,
    pub(super) dispatcher: u32,
    pub(super) supervisor: u32,
}

/// MB of each process, in order of time.
#[derive(Debug, Default)]
pub(super) struct Sampled(BTreeMap<&'static str, Vec<f64>>);

impl Sampled {
    /// Looks until it is dropped.
    pub(super) async fn watch(&mut self, processes: Processes) {
        let mut ticks = tokio::time::interval(EACH);
        loop {
            ticks.tick().await;
            self.look(processes);
        }
    }

    fn look(&mut self, processes: Processes) {
        let mut note = |name: &'static str, pid: u32| {
            if let Some(bytes) = resident_bytes(pid) {
                self.0.entry(name).or_default().push(Memory::mb(bytes));
            }
        };
        note("nats_server", processes.nats_server);
        note("dispatcher", processes.dispatcher);
        note("supervisor", processes.supervisor);
        for child in children_of(processes.supervisor) {
            // One that is just being started or has just ended is nothing yet or any more.
            if let Some(kind) = child_kind(&fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default()) {
                note(kind, child);
            }
        }
    }

    /// Of each process its first and last value, the most, and the most in each quarter of its time: whoever keeps
    /// something for every hour shows there.
    pub(super) fn json(&self) -> Value {
        let rows = self.0.iter().map(|(name, mb)| {
            let most = |part: &[f64]| rounded(part.iter().copied().fold(0.0, f64::max));
            let quarter = mb.len().div_ceil(4).max(1);
            json!({
                "process": name,
                "first_mb": mb.first().copied().map(rounded),
                "max_mb": most(mb),
                "final_mb": mb.last().copied().map(rounded),
                "quarters_max_mb": mb.chunks(quarter).map(most).map(|mb| mb.to_string()).collect::<Vec<_>>().join(" "),
                "seconds": mb.len(),
            })
        });
        Value::Array(rows.collect())
    }
}

/// What a child of a worker is, by its first argument.
fn child_kind(cmdline: &[u8]) -> Option<&'static str> {
    match cmdline.split(|b| *b == 0).nth(1)? {
        b"engine" => Some("engine"),
        b"audio-decoder" => Some("decoder"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_told_apart() {
        assert_eq!(child_kind(b"/bin/voxfleet\0engine\0--fd\x003\0"), Some("engine"));
        assert_eq!(child_kind(b"/bin/voxfleet\0audio-decoder\0--fd\x003\0"), Some("decoder"));
        assert_eq!(child_kind(b"/bin/voxfleet\0worker\0"), None);
        assert_eq!(child_kind(b""), None);
    }

    #[test]
    fn growth_shows_in_the_quarters() {
        let sampled = Sampled(BTreeMap::from([("engine", vec![1.0, 2.0, 3.0, 9.0, 4.0])]));
        let row = &sampled.json()[0];
        assert_eq!(
            (row["first_mb"].as_f64(), row["max_mb"].as_f64(), row["final_mb"].as_f64()),
            (Some(1.0), Some(9.0), Some(4.0))
        );
        assert_eq!(row["quarters_max_mb"], "2 9 4");
    }
}
