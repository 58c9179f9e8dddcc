//! Which inputs are suspected of killing the engine, and what follows from it. Pure; time is an argument.
//!
//! Whatever was at work when the engine died (a window in a decode thread, a stream whose audio the engine's loop was looking
//! at) is a suspect and is worked on alone from then on, until a final shows that it was innocent. Only a death while nothing
//! else was at work counts against an input, and only on the stretch of audio it was about. A stretch is named by the sample
//! at which it begins, which depends on the log alone: it is the same after a restart and on another worker, and what is
//! known about one says nothing about the next.
//!
//! A poison input and a broken device look alike from here, so a stretch is tried on two workers before it is set aside:
//!
//! 1. Deaths alone on one stretch of a live session: after one less than [`MAX_CRASHES`], all of them here, this worker asks
//!    that the last try be made elsewhere, and waits [`LAST_TRY`] for the session to be moved. Nobody has room: it tries
//!    itself.
//! 2. After [`MAX_CRASHES`] the stretch is parked, wherever that is. One that fails even so, with nobody looking at its
//!    audio, is nothing that parking cures: the session is given up here.
//! 3. A worker that has seen a stretch kill its engine which had killed another worker's keeps the session: its later
//!    stretches are parked here, after as many tries. So poison goes to two workers, whatever the size of the fleet.
//! 4. Each stretch that kills alone speaks against the device, but for those of a session that killed elsewhere too; enough of
//!    them in a minute, and the dispatcher takes everything away from this worker.
//!
//! A job is given up after each death alone: its dispatcher counts, and chooses another worker for the next try.
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

/// Deaths while it was alone before a stretch is set aside; as many as a job has attempts by default.
const MAX_CRASHES: u32 = 3;
/// How long the last try waits for another worker: the dispatcher hears of it at once, and a standby that has to take over
/// first within so long.
pub(crate) const LAST_TRY: Duration = Duration::from_secs(6);
/// Deaths remembered for this long.
const REMEMBERED: Duration = Duration::from_secs(600);
/// And this many of them.
const MAX_DEATHS: usize = 256;

/// A session or job.
pub(super) type Name = (Kind, StreamId);

/// What the engine was at when it died.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Doing {
    /// None when it was closed meanwhile.
    pub(super) name: Option<Name>,
    /// First sample of the stretch.
    pub(super) at: u64,
    /// Its audio was looked at: to find the stretch's end means to look at it again.
    pub(super) stepping: bool,
}

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
    /// Not yet: by then it has been moved to another worker, or is tried here.
    Wait {
        until: Instant,
    },
    /// Alone, and the stretch that begins there is not decoded at all; `blind`: nor looked at.
    Park {
        at: u64,
        failure: Failure,
        crashes: u32,
        blind: bool,
    },
    /// Not here: a job that killed the engine alone, or a session that does so although it is parked unseen.
    GiveUp(Failure),
}

/// What a worker tells others about a suspect, and is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) suspect: bool,
    /// Deaths of engines while they worked on it alone ...
    pub(crate) crashes: u32,
    /// ... on the stretch that begins here.
    pub(crate) from: Option<u64>,
    /// It should be moved: see [`Treatment::Wait`].
    pub(crate) elsewhere: bool,
}

/// What is known against one input.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Suspicion {
    /// First sample of the stretch; none while only another worker knows it: then it is the next one.
    at: Option<u64>,
    /// Deaths on it while it was alone, and how many of them were here.
    crashes: u32,
    here: u32,
    class: FailureClass,
    /// The last of them was while its audio was looked at.
    stepping: bool,
    /// It died once more after it had been parked unseen.
    incurable: bool,
    /// Its last try waits for another worker until then.
    waits: Option<Instant>,
}

impl Suspicion {
    fn new(class: FailureClass) -> Self {
        Self { at: None, crashes: 0, here: 0, class, stepping: false, incurable: false, waits: None }
    }

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

/// One death: when, what was at work, and whether one input alone can be blamed.
#[derive(Debug)]
struct Past {
    at: Instant,
    suspects: Vec<(Name, u64)>,
    alone: bool,
    /// That one has killed engines of other workers too. Stays with the death when the input has gone.
    proven: bool,
}

#[derive(Debug, Default)]
pub(super) struct Suspects {
    known: HashMap<Name, Suspicion>,
    /// They have killed engines of other workers too, on the same stretch.
    proven: HashSet<Name>,
    deaths: VecDeque<Past>,
}

impl Suspects {
    /// An input comes with what others know about it; nothing known here before counts any more. Deaths on a stretch that
    /// nobody names count for none.
    pub(super) fn begins(&mut self, name: Name, told: Known) {
        self.forget(&name);
        if told.suspect || told.crashes > 0 {
            let crashes = told.from.map_or(0, |_| told.crashes);
            let suspicion = Suspicion { at: told.from, crashes, ..Suspicion::new(FailureClass::EngineCrash) };
            self.known.insert(name, suspicion);
        }
    }

    /// It is no longer here.
    pub(super) fn forget(&mut self, name: &Name) {
        self.known.remove(name);
        self.proven.remove(name);
    }

    /// The engine died while it was at these. `beside`: it was at something else as well that has no name.
    pub(super) fn died(&mut self, now: Instant, death: Death, doing: &[Doing], beside: bool) {
        let mut inputs: Vec<&Doing> = doing.iter().collect();
        inputs.sort();
        // A partial and a final of one input are one.
        inputs.dedup_by(|a, b| a.name.is_some() && a.name == b.name);
        let alone = inputs.len() == 1 && !beside;
        let mut past = Past { at: now, suspects: Vec::new(), alone, proven: false };
        if death != Death::Killed {
            for Doing { name, at, stepping } in inputs {
                let Some(name) = name else { continue };
                past.suspects.push((name.clone(), *at));
                self.suspect(now, name, *at, death.class(), alone, *stepping);
                past.proven |= alone && self.proven.contains(name);
            }
        }
        if self.deaths.len() == MAX_DEATHS {
            self.deaths.pop_front();
        }
        self.deaths.push_back(past);
    }

    fn suspect(&mut self, now: Instant, name: &Name, at: u64, class: FailureClass, alone: bool, stepping: bool) {
        let known = self.known.entry(name.clone()).or_insert_with(|| Suspicion::new(class));
        if known.at.is_some_and(|before| before != at) {
            *known = Suspicion::new(class);
        }
        (known.at, known.class) = (Some(at), class);
        if !alone {
            return;
        }
        known.incurable |= known.crashes >= MAX_CRASHES && known.stepping && stepping;
        known.stepping = stepping;
        known.crashes += 1;
        known.here += 1;
        if known.here < known.crashes {
            self.proven.insert(name.clone());
        }
        let last_try = known.crashes == MAX_CRASHES - 1;
        if name.0 == Kind::Session && last_try && !self.proven.contains(name) {
            known.waits = Some(now + LAST_TRY);
        }
    }

    /// How the input that goes on at sample `from` is to be decoded.
    pub(super) fn treat(&mut self, now: Instant, name: &Name, from: u64) -> Treatment {
        let Some(known) = self.known.get_mut(name) else { return Treatment::Normal };
        let at = *known.at.get_or_insert(from);
        if at < from {
            // It has been decoded: by another worker, or by a child that died of something else.
            self.known.remove(name);
            return Treatment::Normal;
        }
        if let Some(until) = known.waits.filter(|until| now < *until) {
            return Treatment::Wait { until };
        }
        match (name.0, known.crashes) {
            (_, 0) => Treatment::Alone { beyond: at, crashes: 0 },
            // Always of this class: it is how a dispatcher knows that the job is to be decoded alone from then on.
            (Kind::Job, _) => Treatment::GiveUp(Failure { class: FailureClass::EngineCrash, ..known.failure() }),
            _ if known.incurable => Treatment::GiveUp(known.failure()),
            (_, crashes) if crashes >= MAX_CRASHES => {
                Treatment::Park { at, failure: known.failure(), crashes, blind: known.stepping }
            }
            (_, crashes) => Treatment::Alone { beyond: at, crashes },
        }
    }

    /// A final up to `to_sample` came of it. True: nothing is held against it any more.
    pub(super) fn passed(&mut self, name: &Name, to_sample: u64) -> bool {
        let passed = self.known.get(name).is_some_and(|known| known.at.is_some_and(|at| at < to_sample));
        if passed {
            self.known.remove(name);
        }
        passed
    }

    /// What others are to know about it.
    pub(super) fn told(&self, now: Instant, name: &Name) -> Known {
        self.known.get(name).map_or(Known::default(), |known| Known {
            suspect: true,
            crashes: known.crashes,
            from: known.at,
            elsewhere: known.waits.is_some_and(|until| now < until),
        })
    }

    /// What speaks against the device: each stretch that killed the engine alone, and each death that none of them explains. Of
    /// an input that is poison on other workers too, all stretches count once.
    pub(super) fn crashes(&mut self, now: Instant) -> u32 {
        while self.deaths.front().is_some_and(|past| now.saturating_duration_since(past.at) > REMEMBERED) {
            self.deaths.pop_front();
        }
        let culprits: HashSet<&(Name, u64)> =
            self.deaths.iter().filter(|past| past.alone).flat_map(|past| &past.suspects).collect();
        let proven: HashSet<&Name> = self
            .deaths
            .iter()
            .filter(|past| past.proven)
            .flat_map(|past| &past.suspects)
            .map(|(name, _)| name)
            .collect();
        let stretches: HashSet<(&Name, u64)> =
            culprits.iter().map(|(name, at)| (name, if proven.contains(name) { 0 } else { *at })).collect();
        let names: HashSet<&Name> = culprits.iter().map(|(name, _)| name).collect();
        let explained = |past: &Past| past.suspects.iter().any(|(name, _)| names.contains(name));
        let unexplained = self.deaths.iter().filter(|past| !explained(past)).count();
        (stretches.len() + unexplained) as u32
    }
}

#[cfg(test)]
mod tests;
