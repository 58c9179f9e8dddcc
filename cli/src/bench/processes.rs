//! CPU and memory of a fleet's processes, as the kernel counts them.

use std::{fs, time::Instant};

use serde_json::{Value, json};
use voxfleet_harness::{
    child::{children_of, resident_bytes},
    fleet::{Fleet, Servers},
};

use super::rounded;

const NAMES: [&str; 4] = ["nats_server", "dispatcher", "supervisor", "engine"];

/// Server, active dispatcher, all supervisors, all engines.
fn pids(fleet: &Fleet) -> [Vec<u32>; 4] {
    let server = match &fleet.servers {
        Servers::One(server) => vec![server.pid()],
        _ => Vec::new(),
    };
    let dispatcher = fleet.dispatchers.first().map(|d| d.pid()).into_iter().collect();
    let supervisors: Vec<u32> = fleet.workers.iter().map(|w| w.pid()).collect();
    let engines = supervisors.iter().flat_map(|pid| children_of(*pid)).collect();
    [server, dispatcher, supervisors, engines]
}

/// The server, and the first of each other kind; 0 where there is none.
pub(super) fn first_pids(fleet: &Fleet) -> [u32; 4] {
    pids(fleet).map(|of_kind| of_kind.first().copied().unwrap_or(0))
}

/// User and system time of a process, in s.
pub(super) fn cpu_seconds(pid: u32) -> f64 {
    // Fields 14 and 15 in clock ticks, of which Linux reports 100 a second; the name in field 2 may hold spaces.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    fields.skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// CPU time so far of each kind of process, in s.
pub(super) struct Cpu {
    at: Instant,
    kinds: [f64; 4],
    producer: f64,
}

/// Cores kept busy.
pub(super) struct Cores {
    pub(super) kinds: [f64; 4],
    producer: f64,
}

impl Cpu {
    pub(super) fn now(fleet: &Fleet) -> Self {
        let kinds = pids(fleet).map(|of_kind| of_kind.into_iter().map(cpu_seconds).sum());
        Self { at: Instant::now(), kinds, producer: cpu_seconds(std::process::id()) }
    }

    pub(super) fn spent_since(&self, fleet: &Fleet) -> Spent {
        let mut spent = Spent(Self::now(fleet).kinds);
        spent.0.iter_mut().zip(self.kinds).for_each(|(now, then)| *now -= then);
        spent
    }

    pub(super) fn cores_since(&self, fleet: &Fleet) -> Cores {
        let (now, wall) = (Self::now(fleet), self.at.elapsed().as_secs_f64());
        let mut kinds = now.kinds;
        kinds.iter_mut().zip(self.kinds).for_each(|(now, then)| *now = (*now - then) / wall);
        Cores { kinds, producer: (now.producer - self.producer) / wall }
    }
}

/// CPU time of each kind of process, in s.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spent([f64; 4]);

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, other: Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, more)| *sum += more);
    }
}

impl Spent {
    /// What dispatcher and supervisors took.
    pub(super) fn ours(&self) -> f64 {
        self.0[1] + self.0[2]
    }

    pub(super) fn json(&self) -> Value {
        by_name(self.0)
    }
}

impl Cores {
    pub(super) fn json(&self) -> Value {
        let mut object = by_name(self.kinds);
        object["producer"] = rounded(self.producer).into();
        object
    }
}

/// Resident memory of each kind of process, in MB.
pub(super) struct Memory(pub(super) [f64; 4]);

impl Memory {
    pub(super) fn of(fleet: &Fleet) -> Self {
        let sum = |of_kind: Vec<u32>| of_kind.into_iter().filter_map(resident_bytes).sum();
        Self(pids(fleet).map(|of_kind| Self::mb(sum(of_kind))))
    }

    pub(super) fn mb(bytes: u64) -> f64 {
        bytes as f64 / f64::from(1 << 20)
    }

    pub(super) fn json(&self) -> Value {
        by_name(self.0)
    }
}

fn by_name(values: [f64; 4]) -> Value {
    let mut object = json!({});
    for (name, value) in NAMES.iter().zip(values) {
        object[*name] = rounded(value).into();
    }
    object
}
