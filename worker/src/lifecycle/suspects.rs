//! Which inputs are suspected of killing the engine, and what follows from it. Pure; time is an argument.
//!
//! Whatever was being decoded when the engine died is a suspect and is decoded alone from then on, until a final shows that
//! it was innocent. Only a death while nothing else was being decoded counts against an input: after [`MAX_CRASHES`] of
//! them on one stretch of audio, that stretch of a live session is parked; a job is given up after each, so that its
//! dispatcher counts. A stretch is named by the sample at which it begins, which depends on the log alone: it is the same
//! after a restart, whatever else is going on.
//!
//! A kill from outside is nobody's fault, unless the kernel did it for want of memory.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use tokio::time::Instant;
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    id::{Kind, StreamId},
};

/// Deaths while decoded alone before a stretch is set aside; as many as a job has attempts by default.
const MAX_CRASHES: u32 = 3;
/// Deaths remembered for this long.
const REMEMBERED: Duration = Duration::from_secs(600);
/// And this many of them.
const MAX_DEATHS: usize = 256;

/// A session or job.
pub(super) type Name = (Kind, StreamId);

/// Something that was being decoded: whose, unless it was closed meanwhile, and the stretch's first sample.
pub(super) type Decoding = (Option<Name>, u64);

/// How a child that had been ready ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    /// By its own fault: a signal of its own making, an exit code.
    Crashed,
    /// It stood still and was ended for it.
    Stuck,
    /// Somebody killed it.
    Killed,
}

impl Death {
    fn class(self) -> FailureClass {
        match self {
            Death::Crashed | Death::Killed => FailureClass::EngineCrash,
            Death::Stuck => FailureClass::Timeout,
        }
    }
}

/// How an input is to be decoded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Treatment {
    Normal,
    /// Nothing else meanwhile, until a final has gone beyond this sample.
    Alone {
        beyond: u64,
        crashes: u32,
    },
    /// The same, and the stretch that begins there is not decoded at all.
    Park {
        at: u64,
        failure: Failure,
        crashes: u32,
    },
    /// Not here: a job that killed the engine alone.
    GiveUp(Failure),
}

/// What is known against one input.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Suspicion {
    /// First sample of the stretch; none while only another worker knows it: then it is the next one.
    at: Option<u64>,
    /// Deaths on it while it was alone.
    crashes: u32,
    class: FailureClass,
}

impl Suspicion {
    fn failure(&self) -> Failure {
        let text = match self.class {
            FailureClass::Timeout => "the engine stood still",
            _ => "the engine died",
        };
        let times = match self.crashes {
            1 => "once".to_owned(),
            n => format!("{n} times"),
        };
        Failure::new(self.class, format!("{text} {times} while it decoded nothing but this"))
    }
}

/// One death: when, what was being decoded, and whether one input alone can be blamed.
#[derive(Debug)]
struct Past {
    at: Instant,
    suspects: Vec<Name>,
    alone: bool,
}

#[derive(Debug, Default)]
pub(super) struct Suspects {
    known: HashMap<Name, Suspicion>,
    deaths: VecDeque<Past>,
}

impl Suspects {
    /// An input comes with what others know about it; nothing known here before counts any more.
    pub(super) fn begins(&mut self, name: Name, suspect: bool, crashes: u32) {
        if suspect || crashes > 0 {
            self.known.insert(name, Suspicion { at: None, crashes, class: FailureClass::EngineCrash });
        } else {
            self.known.remove(&name);
        }
    }

    /// It is no longer here.
    pub(super) fn forget(&mut self, name: &Name) {
        self.known.remove(name);
    }

    /// The engine died while it decoded these.
    pub(super) fn died(&mut self, now: Instant, death: Death, decoding: &[Decoding]) {
        let mut inputs: Vec<&Decoding> = decoding.iter().collect();
        inputs.sort();
        // A partial and a final of one input are one.
        inputs.dedup_by(|a, b| a.0.is_some() && a.0 == b.0);
        let alone = inputs.len() == 1;
        let mut past = Past { at: now, suspects: Vec::new(), alone };
        if death != Death::Killed {
            for (name, at) in inputs {
                let Some(name) = name else { continue };
                past.suspects.push(name.clone());
                let known =
                    self.known.entry(name.clone()).or_insert(Suspicion { at: None, crashes: 0, class: death.class() });
                if known.at.is_some_and(|before| before != *at) {
                    known.crashes = 0;
                }
                known.at = Some(*at);
                known.class = death.class();
                known.crashes += u32::from(alone);
            }
        }
        if self.deaths.len() == MAX_DEATHS {
            self.deaths.pop_front();
        }
        self.deaths.push_back(past);
    }

    /// How the input that goes on at sample `from` is to be decoded.
    pub(super) fn treat(&mut self, name: &Name, from: u64) -> Treatment {
        let Some(known) = self.known.get_mut(name) else { return Treatment::Normal };
        let at = *known.at.get_or_insert(from);
        if at < from {
            // It has been decoded: by another worker, or by a child that died of something else.
            self.known.remove(name);
            return Treatment::Normal;
        }
        match (name.0, known.crashes) {
            (_, 0) => Treatment::Alone { beyond: at, crashes: 0 },
            // Always of this class: it is how a dispatcher knows that the job is to be decoded alone from then on.
            (Kind::Job, _) => Treatment::GiveUp(Failure { class: FailureClass::EngineCrash, ..known.failure() }),
            (_, crashes) if crashes >= MAX_CRASHES => Treatment::Park { at, failure: known.failure(), crashes },
            (_, crashes) => Treatment::Alone { beyond: at, crashes },
        }
    }

    /// A final up to `to_sample` came of it.
    pub(super) fn passed(&mut self, name: &Name, to_sample: u64) {
        if self.known.get(name).is_some_and(|known| known.at.is_some_and(|at| at < to_sample)) {
            self.known.remove(name);
        }
    }

    /// Whether it is suspected, and how often it has killed the engine alone.
    pub(super) fn told(&self, name: &Name) -> Option<u32> {
        self.known.get(name).map(|known| known.crashes)
    }

    /// Deaths that speak against the device: each input that kills the engine alone counts once, and what it explains is not
    /// counted again. One poison input leaves its worker healthy; a device on which anything dies does not.
    pub(super) fn crashes(&mut self, now: Instant) -> u32 {
        while self.deaths.front().is_some_and(|past| now.saturating_duration_since(past.at) > REMEMBERED) {
            self.deaths.pop_front();
        }
        let culprits: HashSet<&Name> =
            self.deaths.iter().filter(|past| past.alone).flat_map(|past| &past.suspects).collect();
        let unexplained =
            self.deaths.iter().filter(|past| !past.suspects.iter().any(|name| culprits.contains(name))).count();
        (culprits.len() + unexplained) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(id: &str) -> Name {
        (Kind::Session, StreamId::new(id).expect("id"))
    }

    fn job(id: &str) -> Name {
        (Kind::Job, StreamId::new(id).expect("id"))
    }

    fn at(name: &Name, from: u64) -> Decoding {
        (Some(name.clone()), from)
    }

    fn parked(treatment: &Treatment) -> Option<(u64, FailureClass)> {
        match treatment {
            Treatment::Park { at, failure, .. } => Some((*at, failure.class)),
            _ => None,
        }
    }

    #[test]
    fn what_follows_from_deaths() {
        use Death::*;
        let (a, b, j) = (session("a"), session("b"), job("j"));
        let alone = |crashes| Treatment::Alone { beyond: 100, crashes };
        // Deaths with what was being decoded then, and how `a`, `b` and `j` are treated at sample 100 after them.
        type Case = (Vec<(Death, Vec<Decoding>)>, [Treatment; 2]);
        let cases: Vec<Case> = vec![
            (vec![], [Treatment::Normal, Treatment::Normal]),
            (vec![(Crashed, vec![])], [Treatment::Normal, Treatment::Normal]),
            (vec![(Crashed, vec![at(&a, 100), at(&b, 100)])], [alone(0), alone(0)]),
            (vec![(Crashed, vec![at(&a, 100)])], [alone(1), Treatment::Normal]),
            (vec![(Killed, vec![at(&a, 100)]); 9], [Treatment::Normal, Treatment::Normal]),
            (vec![(Crashed, vec![at(&a, 100), at(&b, 100)]); 9], [alone(0), alone(0)]),
            (vec![(Crashed, vec![at(&a, 100)]); 2], [alone(2), Treatment::Normal]),
            // A stretch behind it is decoded alone until then; one before it is over.
            (vec![(Crashed, vec![at(&a, 300)])], [Treatment::Alone { beyond: 300, crashes: 1 }, Treatment::Normal]),
            (vec![(Crashed, vec![at(&a, 50)])], [Treatment::Normal, Treatment::Normal]),
            // Deaths on different stretches do not add up.
            (
                vec![(Crashed, vec![at(&a, 0)]), (Crashed, vec![at(&a, 100)]), (Crashed, vec![at(&a, 100)])],
                [alone(2), Treatment::Normal],
            ),
        ];
        for (deaths, [for_a, for_b]) in cases {
            let mut suspects = Suspects::default();
            for (death, decoding) in &deaths {
                suspects.died(Instant::now(), *death, decoding);
            }
            assert_eq!(suspects.treat(&a, 100), for_a, "{deaths:?}");
            assert_eq!(suspects.treat(&b, 100), for_b, "{deaths:?}");
            assert_eq!(suspects.treat(&j, 100), Treatment::Normal, "{deaths:?}");
        }
    }

    #[test]
    fn three_deaths_alone_park_a_stretch_and_one_gives_up_a_job() {
        let (a, j) = (session("a"), job("j"));
        let mut suspects = Suspects::default();
        let now = Instant::now();
        // A partial and a final of one input, or two stretches of it, are one input.
        suspects.died(now, Death::Crashed, &[at(&a, 100), at(&a, 100)]);
        assert_eq!(suspects.told(&a), Some(1));
        // Somebody closed meanwhile was decoded too: not alone.
        suspects.died(now, Death::Crashed, &[at(&a, 100), (None, 7)]);
        assert_eq!(suspects.told(&a), Some(1));
        suspects.died(now, Death::Crashed, &[at(&a, 100)]);
        suspects.died(now, Death::Stuck, &[at(&a, 100)]);
        assert_eq!(parked(&suspects.treat(&a, 40)), Some((100, FailureClass::Timeout)));
        suspects.passed(&a, 100);
        assert_eq!(suspects.told(&a), Some(3), "the one before it");
        suspects.passed(&a, 101);
        assert_eq!((suspects.told(&a), suspects.treat(&a, 101)), (None, Treatment::Normal));

        suspects.died(now, Death::Crashed, &[at(&j, 0), at(&a, 200)]);
        assert_eq!(suspects.treat(&j, 0), Treatment::Alone { beyond: 0, crashes: 0 });
        suspects.died(now, Death::Crashed, &[at(&j, 0)]);
        assert!(matches!(suspects.treat(&j, 0), Treatment::GiveUp(f) if f.class == FailureClass::EngineCrash));
        suspects.begins(j.clone(), true, 0);
        assert_eq!(suspects.treat(&j, 0), Treatment::Alone { beyond: 0, crashes: 0 }, "given again it is a new try");
        suspects.forget(&j);
        assert_eq!(suspects.treat(&j, 0), Treatment::Normal);
    }

    #[test]
    fn what_another_worker_knows_counts_for_the_next_stretch() {
        let a = session("a");
        let mut suspects = Suspects::default();
        suspects.begins(a.clone(), true, 2);
        assert_eq!(suspects.treat(&a, 500), Treatment::Alone { beyond: 500, crashes: 2 });
        suspects.died(Instant::now(), Death::Crashed, &[at(&a, 500)]);
        assert_eq!(parked(&suspects.treat(&a, 500)), Some((500, FailureClass::EngineCrash)));
        suspects.begins(a.clone(), false, 0);
        assert_eq!(suspects.treat(&a, 500), Treatment::Normal);
    }

    #[test]
    fn a_poison_input_is_not_a_broken_device() {
        let now = Instant::now();
        let (a, b, c) = (session("a"), session("b"), job("c"));
        let mut one = Suspects::default();
        one.died(now, Death::Crashed, &[at(&a, 0), at(&b, 0)]);
        assert_eq!(one.crashes(now), 1);
        for _ in 0..3 {
            one.died(now, Death::Crashed, &[at(&a, 0)]);
        }
        assert_eq!(one.crashes(now), 1, "the first is explained too");
        one.died(now, Death::Crashed, &[at(&c, 0)]);
        assert_eq!(one.crashes(now), 2);
        one.died(now, Death::Killed, &[at(&b, 0)]);
        assert_eq!(one.crashes(now), 3, "a kill is explained by nobody");
        assert_eq!(one.crashes(now + REMEMBERED + Duration::from_secs(1)), 0);

        let mut broken = Suspects::default();
        for name in ["a", "b", "c", "d"] {
            broken.died(now, Death::Crashed, &[at(&session(name), 0)]);
        }
        assert_eq!(broken.crashes(now), 4);
    }
}
