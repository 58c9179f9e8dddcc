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
//! 2. After [`MAX_CRASHES`] the stretch is parked, wherever that is.
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
    /// Not here: a job that killed the engine alone.
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
    /// Its last try waits for another worker until then.
    waits: Option<Instant>,
}

impl Suspicion {
    fn new(class: FailureClass) -> Self {
        Self { at: None, crashes: 0, here: 0, class, stepping: false, waits: None }
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
        let mut past = Past { at: now, suspects: Vec::new(), alone };
        if death != Death::Killed {
            for Doing { name, at, stepping } in inputs {
                let Some(name) = name else { continue };
                past.suspects.push((name.clone(), *at));
                self.suspect(now, name, *at, death.class(), alone, *stepping);
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
        let stretches: HashSet<(&Name, u64)> =
            culprits.iter().map(|(name, at)| (name, if self.proven.contains(name) { 0 } else { *at })).collect();
        let names: HashSet<&Name> = culprits.iter().map(|(name, _)| name).collect();
        let explained = |past: &Past| past.suspects.iter().any(|(name, _)| names.contains(name));
        let unexplained = self.deaths.iter().filter(|past| !explained(past)).count();
        (stretches.len() + unexplained) as u32
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

    fn at(name: &Name, from: u64) -> Doing {
        Doing { name: Some(name.clone()), at: from, stepping: false }
    }

    /// After any wait for another worker.
    fn treated(suspects: &mut Suspects, name: &Name, from: u64) -> Treatment {
        suspects.treat(Instant::now() + LAST_TRY, name, from)
    }

    fn told(suspects: &Suspects, name: &Name) -> Option<u32> {
        let known = suspects.told(Instant::now(), name);
        known.suspect.then_some(known.crashes)
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
        type Case = (Vec<(Death, Vec<Doing>)>, [Treatment; 2]);
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
                suspects.died(Instant::now(), *death, decoding, false);
            }
            assert_eq!(treated(&mut suspects, &a, 100), for_a, "{deaths:?}");
            assert_eq!(treated(&mut suspects, &b, 100), for_b, "{deaths:?}");
            assert_eq!(treated(&mut suspects, &j, 100), Treatment::Normal, "{deaths:?}");
        }
    }

    #[test]
    fn three_deaths_alone_park_a_stretch_and_one_gives_up_a_job() {
        let (a, j) = (session("a"), job("j"));
        let mut suspects = Suspects::default();
        let now = Instant::now();
        // A partial and a final of one input, or two stretches of it, are one input.
        suspects.died(now, Death::Crashed, &[at(&a, 100), at(&a, 100)], false);
        assert_eq!(told(&suspects, &a), Some(1));
        // Somebody closed meanwhile was decoded too: not alone.
        suspects.died(now, Death::Crashed, &[at(&a, 100), Doing { name: None, ..at(&a, 7) }], false);
        assert_eq!(told(&suspects, &a), Some(1));
        suspects.died(now, Death::Crashed, &[at(&a, 100)], false);
        suspects.died(now, Death::Stuck, &[at(&a, 100)], false);
        assert_eq!(parked(&treated(&mut suspects, &a, 40)), Some((100, FailureClass::Timeout)));
        suspects.passed(&a, 100);
        assert_eq!(told(&suspects, &a), Some(3), "the one before it");
        suspects.passed(&a, 101);
        assert_eq!((told(&suspects, &a), treated(&mut suspects, &a, 101)), (None, Treatment::Normal));

        suspects.died(now, Death::Crashed, &[at(&j, 0), at(&a, 200)], false);
        assert_eq!(treated(&mut suspects, &j, 0), Treatment::Alone { beyond: 0, crashes: 0 });
        suspects.died(now, Death::Crashed, &[at(&j, 0)], false);
        assert!(matches!(treated(&mut suspects, &j, 0), Treatment::GiveUp(f) if f.class == FailureClass::EngineCrash));
        suspects.begins(j.clone(), Known { suspect: true, ..Known::default() });
        assert_eq!(
            treated(&mut suspects, &j, 0),
            Treatment::Alone { beyond: 0, crashes: 0 },
            "given again it is a new try"
        );
        suspects.forget(&j);
        assert_eq!(treated(&mut suspects, &j, 0), Treatment::Normal);
    }

    /// What a worker tells about a session that has killed `crashes` engines alone, at this stretch.
    fn others_say(crashes: u32, from: impl Into<Option<u64>>) -> Known {
        Known { suspect: true, crashes, from: from.into(), elsewhere: false }
    }

    #[test]
    fn what_another_worker_knows_counts_for_that_stretch_and_no_other() {
        let a = session("a");
        let begun = |told: Known| {
            let mut suspects = Suspects::default();
            suspects.begins(a.clone(), told);
            suspects
        };
        let alone = |crashes| Treatment::Alone { beyond: 500, crashes };
        assert_eq!(treated(&mut begun(others_say(2, 500)), &a, 500), alone(2));
        assert_eq!(parked(&treated(&mut begun(others_say(3, 500)), &a, 500)), Some((500, FailureClass::EngineCrash)));
        assert_eq!(parked(&treated(&mut begun(others_say(3, 500)), &a, 100)), Some((500, FailureClass::EngineCrash)));
        for crashes in 0..5 {
            // Stored meanwhile: what comes behind it is innocent.
            let mut suspects = begun(others_say(crashes, 500));
            assert_eq!(treated(&mut suspects, &a, 501), Treatment::Normal, "{crashes}");
            assert_eq!(suspects.told(Instant::now(), &a), Known::default(), "{crashes}");
            assert_eq!(treated(&mut begun(others_say(crashes, None)), &a, 500), alone(0), "{crashes} on no stretch");
        }
        let mut suspects = begun(others_say(2, 500));
        suspects.died(Instant::now(), Death::Crashed, &[at(&a, 500)], false);
        assert_eq!(parked(&treated(&mut suspects, &a, 500)), Some((500, FailureClass::EngineCrash)));
        suspects.begins(a.clone(), Known::default());
        assert_eq!(treated(&mut suspects, &a, 500), Treatment::Normal);
    }

    #[test]
    fn the_last_try_of_a_stretch_is_anothers_and_poison_stays_with_the_second() {
        let (a, now) = (session("a"), Instant::now());
        let mut first = Suspects::default();
        first.died(now, Death::Crashed, &[at(&a, 100)], false);
        assert!(!first.told(now, &a).elsewhere);
        first.died(now, Death::Crashed, &[at(&a, 100)], false);
        let told = first.told(now, &a);
        assert_eq!(told, Known { elsewhere: true, ..others_say(2, 100) });
        assert_eq!(first.treat(now, &a, 40), Treatment::Wait { until: now + LAST_TRY });
        // Nobody had room.
        let later = now + LAST_TRY;
        assert!(!first.told(later, &a).elsewhere);
        assert_eq!(first.treat(later, &a, 40), Treatment::Alone { beyond: 100, crashes: 2 });
        first.died(later, Death::Crashed, &[at(&a, 100)], false);
        assert_eq!(parked(&first.treat(later, &a, 40)), Some((100, FailureClass::EngineCrash)));
        assert!(first.passed(&a, 200));
        for _ in 0..2 {
            first.died(later, Death::Crashed, &[at(&a, 200)], false);
        }
        assert!(first.told(later, &a).elsewhere, "the next stretch may do better elsewhere");

        // The other one: it dies there too.
        let mut second = Suspects::default();
        second.begins(a.clone(), told);
        assert_eq!(second.treat(now, &a, 40), Treatment::Alone { beyond: 100, crashes: 2 }, "at once");
        second.died(now, Death::Crashed, &[at(&a, 100)], false);
        assert!(matches!(second.treat(now, &a, 40), Treatment::Park { at: 100, crashes: 3, .. }));
        assert!(second.passed(&a, 200));
        for stretch in [200, 300, 400] {
            for crashes in 1..=3 {
                second.died(now, Death::Crashed, &[at(&a, stretch)], false);
                assert_eq!(second.told(now, &a), others_say(crashes, stretch), "it goes no further");
            }
            assert!(matches!(second.treat(now, &a, stretch), Treatment::Park { .. }));
            second.passed(&a, stretch + 1);
        }
        assert_eq!(second.crashes(now), 1, "poison, not the device");
    }

    #[test]
    fn what_dies_while_it_is_looked_at_is_parked_unseen() {
        let (a, b, now) = (session("a"), session("b"), Instant::now());
        let looked_at = |name: &Name| Doing { stepping: true, ..at(name, 100) };
        let mut suspects = Suspects::default();
        // Several streams in one turn of the loop, one of them being decoded too.
        suspects.died(now, Death::Crashed, &[looked_at(&a), looked_at(&b), at(&a, 100)], false);
        assert_eq!((told(&suspects, &a), told(&suspects, &b)), (Some(0), Some(0)));
        // With a model being loaded nobody is alone.
        suspects.died(now, Death::Crashed, &[looked_at(&a)], true);
        assert_eq!(told(&suspects, &a), Some(0));
        for _ in 0..3 {
            suspects.died(now, Death::Crashed, &[looked_at(&a)], false);
        }
        assert!(matches!(treated(&mut suspects, &a, 100), Treatment::Park { blind: true, .. }));
        assert_eq!(told(&suspects, &b), Some(0));
    }

    #[test]
    fn a_poison_input_is_not_a_broken_device() {
        let now = Instant::now();
        let (a, b, c) = (session("a"), session("b"), job("c"));
        let mut one = Suspects::default();
        one.died(now, Death::Crashed, &[at(&a, 0), at(&b, 0)], false);
        assert_eq!(one.crashes(now), 1);
        for _ in 0..3 {
            one.died(now, Death::Crashed, &[at(&a, 0)], false);
        }
        assert_eq!(one.crashes(now), 1, "the first is explained too");
        one.died(now, Death::Crashed, &[at(&c, 0)], false);
        assert_eq!(one.crashes(now), 2);
        one.died(now, Death::Killed, &[at(&b, 0)], false);
        assert_eq!(one.crashes(now), 3, "a kill is explained by nobody");
        assert_eq!(one.crashes(now + REMEMBERED + Duration::from_secs(1)), 0);

        let mut broken = Suspects::default();
        for name in ["a", "b", "c", "d"] {
            broken.died(now, Death::Crashed, &[at(&session(name), 0)], false);
        }
        assert_eq!(broken.crashes(now), 4);
    }

    #[test]
    fn a_broken_device_shows_with_one_session_too() {
        let (a, now) = (session("a"), Instant::now());
        let mut broken = Suspects::default();
        for stretch in [0, 100, 200] {
            for _ in 0..3 {
                broken.died(now, Death::Crashed, &[at(&a, stretch)], false);
            }
            broken.passed(&a, stretch + 1);
        }
        assert_eq!(broken.crashes(now), 3, "each stretch that dies is one more");
    }
}
