//! What goes wrong when: a seed's own sequence of faults. Pure.

use std::time::Duration;

use crate::dice::Dice;

/// Every stream of a fleet, buckets included: the leader of each is a target.
pub const STREAMS: [&str; 14] = [
    "ASR_AUDIO",
    "ASR_TRANSCRIPT",
    "ASR_LIVE",
    "ASR_WORK",
    "ASR_JOBS",
    "ASR_CHECKPOINT",
    "ASR_PARTIAL",
    "ASR_EVENT",
    "ASR_DEAD",
    "KV_asr_sessions",
    "KV_asr_jobs",
    "KV_asr_control",
    "KV_asr_fleet",
    "OBJ_asr_media",
];

/// Every fault by the name under which it is counted.
pub const NAMES: [&str; 18] = [
    "kill_worker",
    "kill_dispatcher",
    "kill_engine",
    "kill_server",
    "stop_worker",
    "stop_dispatcher",
    "stop_engine",
    "stop_server",
    "lame_duck",
    "terminate_worker",
    "terminate_dispatcher",
    "relay_pause",
    "relay_one_way",
    "relay_reset",
    "relay_delay",
    "relay_stall",
    "purge_live",
    "delete_consumers",
];

/// How many there are of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub workers: usize,
    pub dispatchers: usize,
    pub servers: usize,
}

/// A process that speaks to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    Worker(usize),
    /// The active dispatcher, or another one.
    Dispatcher {
        active: bool,
    },
}

/// One thing that goes wrong. Times are how long until it is mended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; started again.
    Kill(Process, Duration),
    /// SIGKILL of a worker's engine; its supervisor mends that.
    KillEngine(usize),
    /// SIGKILL of the server that leads this stream, with its store.
    KillServer(&'static str, Duration),
    /// SIGSTOP, then SIGCONT.
    Stop(Process, Duration),
    StopEngine(usize, Duration),
    /// The server that leads this stream: connections stay open, nothing answers.
    StopServer(&'static str, Duration),
    /// SIGUSR2, then SIGKILL and a new start.
    LameDuck(usize, Duration),
    /// SIGTERM; started again when it has ended.
    Terminate(Process),
    /// Nothing moves between it and the servers.
    Pause(Process, Duration),
    /// What goes to the servers (or comes from them) is swallowed; the connection is cut afterwards.
    OneWay(Process, bool, Duration),
    Reset(Process),
    /// 200 ms later, both ways.
    Delay(Process, Duration),
    /// Three pieces in a hundred stand still for half a second.
    Stall(Process, Duration),
    /// While hints stand there.
    PurgeLive,
    /// Its consumers, by hand.
    DeleteConsumers(usize),
}

impl Fault {
    pub fn is_kill(self) -> bool {
        matches!(self, Fault::Kill(..) | Fault::KillEngine(_) | Fault::KillServer(..))
    }

    /// Group it is counted under.
    pub fn name(self) -> &'static str {
        let worker = |process| matches!(process, Process::Worker(_));
        match self {
            Fault::Kill(p, _) if worker(p) => "kill_worker",
            Fault::Kill(..) => "kill_dispatcher",
            Fault::KillEngine(_) => "kill_engine",
            Fault::KillServer(..) => "kill_server",
            Fault::Stop(p, _) if worker(p) => "stop_worker",
            Fault::Stop(..) => "stop_dispatcher",
            Fault::StopEngine(..) => "stop_engine",
            Fault::StopServer(..) => "stop_server",
            Fault::LameDuck(..) => "lame_duck",
            Fault::Terminate(p) if worker(p) => "terminate_worker",
            Fault::Terminate(_) => "terminate_dispatcher",
            Fault::Pause(..) => "relay_pause",
            Fault::OneWay(..) => "relay_one_way",
            Fault::Reset(_) => "relay_reset",
            Fault::Delay(..) => "relay_delay",
            Fault::Stall(..) => "relay_stall",
            Fault::PurgeLive => "purge_live",
            Fault::DeleteConsumers(_) => "delete_consumers",
        }
    }
}

/// What happens next: faults at the same moment, so long after those before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub after: Duration,
    pub faults: Vec<Fault>,
}

/// A kill at least this often: ten a minute and some that find nobody to kill.
const KILL_EVERY_S: f64 = 4.5;
/// Share of the moments with two faults at once.
const TWO: f64 = 0.15;

/// An endless sequence of steps.
#[derive(Debug, Clone)]
pub struct Schedule {
    dice: Dice,
    shape: Shape,
    since_kill_s: f64,
}

type Make = fn(&mut Schedule) -> Fault;

impl Schedule {
    pub fn new(seed: u64, shape: Shape) -> Self {
        Self { dice: Dice::new(seed ^ 0xc4a0_5000), shape, since_kill_s: 0.0 }
    }

    fn worker(&mut self) -> usize {
        self.dice.below(self.shape.workers)
    }

    fn process(&mut self) -> Process {
        if self.dice.chance(0.7) { Process::Worker(self.worker()) } else { self.dispatcher() }
    }

    fn dispatcher(&mut self) -> Process {
        Process::Dispatcher { active: self.shape.dispatchers < 2 || self.dice.chance(0.7) }
    }

    fn lasting(&mut self, low: f64, high: f64) -> Duration {
        Duration::from_millis((self.dice.between(low, high) * 1e3) as u64)
    }

    fn stream(&mut self) -> &'static str {
        STREAMS[self.dice.below(STREAMS.len())]
    }

    fn pick(&mut self, of: &[(u32, Make)]) -> Fault {
        let total: u32 = of.iter().map(|(weight, _)| weight).sum();
        let mut left = self.dice.below(total as usize) as u32;
        for (weight, make) in of {
            match left.checked_sub(*weight) {
                None => return make(self),
                Some(rest) => left = rest,
            }
        }
        Fault::PurgeLive
    }

    fn kill(&mut self) -> Fault {
        self.pick(&[
            (40, |s| Fault::Kill(Process::Worker(s.worker()), s.lasting(0.1, 3.0))),
            (30, |s| Fault::KillEngine(s.worker())),
            (18, |s| Fault::Kill(s.dispatcher(), s.lasting(0.1, 4.0))),
            (12, |s| Fault::KillServer(s.stream(), s.lasting(0.1, 3.0))),
        ])
    }

    fn other(&mut self) -> Fault {
        self.pick(&[
            (14, |s| Fault::Stop(Process::Worker(s.worker()), s.lasting(0.5, 8.0))),
            (8, |s| Fault::Stop(s.dispatcher(), s.lasting(0.5, 9.0))),
            (8, |s| Fault::StopEngine(s.worker(), s.lasting(0.5, 6.0))),
            (4, |s| Fault::StopServer(s.stream(), s.lasting(0.3, 6.0))),
            (2, |s| Fault::LameDuck(s.dice.below(s.shape.servers), s.lasting(0.5, 3.0))),
            (9, |s| Fault::Terminate(Process::Worker(s.worker()))),
            (3, |s| Fault::Terminate(s.dispatcher())),
            (8, |s| Fault::Pause(s.process(), s.lasting(0.3, 6.0))),
            (9, |s| Fault::OneWay(s.process(), s.dice.chance(0.5), s.lasting(0.5, 6.0))),
            (7, |s| Fault::Reset(s.process())),
            (6, |s| Fault::Delay(s.process(), s.lasting(2.0, 8.0))),
            (6, |s| Fault::Stall(s.process(), s.lasting(2.0, 8.0))),
            (7, |_| Fault::PurgeLive),
            (6, |s| Fault::DeleteConsumers(s.worker())),
        ])
    }

    fn one(&mut self) -> Fault {
        if self.since_kill_s >= KILL_EVERY_S || self.dice.chance(0.5) {
            self.since_kill_s = 0.0;
            self.kill()
        } else {
            self.other()
        }
    }
}

impl Iterator for Schedule {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let after = self.dice.between(1.0, 3.5);
        self.since_kill_s += after;
        let mut faults = vec![self.one()];
        if self.dice.chance(TWO) {
            faults.push(self.one());
        }
        Some(Step { after: Duration::from_secs_f64(after), faults })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const SHAPE: Shape = Shape { workers: 4, dispatchers: 2, servers: 3 };

    #[test]
    fn a_seed_is_a_sequence_of_its_own() {
        let steps = |seed| Schedule::new(seed, SHAPE).take(50).collect::<Vec<_>>();
        assert_eq!(steps(1), steps(1));
        assert_ne!(steps(1), steps(2));
    }

    #[test]
    fn every_kind_comes_and_kills_come_often_enough() {
        let mut all: BTreeSet<&str> = BTreeSet::new();
        for seed in 1..=10 {
            let steps: Vec<Step> = Schedule::new(seed, SHAPE).take(400).collect();
            let minutes = steps.iter().map(|s| s.after.as_secs_f64()).sum::<f64>() / 60.0;
            let faults: Vec<Fault> = steps.iter().flat_map(|s| s.faults.clone()).collect();
            let kills = faults.iter().filter(|f| f.is_kill()).count() as f64;
            assert!(kills / minutes > 13.0, "{} a minute", kills / minutes);
            let names: BTreeSet<&str> = faults.iter().map(|f| f.name()).collect();
            assert!(names.len() >= 16, "{names:?}");
            assert!(steps.iter().any(|s| s.faults.len() == 2));
            all.extend(names);
        }
        assert_eq!(all, BTreeSet::from(NAMES));
    }
}
