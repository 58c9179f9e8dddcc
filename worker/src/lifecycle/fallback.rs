//! What is known not to work here, until when, and what runs for whom meanwhile. Pure; time is an argument.
//!
//! A failure of the device leaves a mark: on one model (no room), or on the GPU as a whole. A mark is taken back when its
//! time is over and the figures of the device show room. If what it stood for fails again soon, the next mark lasts twice
//! as long, so that a card at its limit is not tried in a circle.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use tokio::time::Instant;
use voxfleet_schema::{
    device::Standby,
    failure::{Failure, FailureClass},
    remedy::{self, Side},
};

use super::{
    cause::is_of_the_device,
    ladder::{self, Ask, Footing, Here},
    suspects::Name,
};

/// The longest time until something is tried again.
const LONGEST: Duration = Duration::from_secs(30 * 60);
/// Crashes on a GPU within this time speak against it ...
const CRASHES_WITHIN: Duration = Duration::from_secs(60);
/// ... when there are so many.
const CRASHES: usize = 3;

/// Until what failed is tried again for the first time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waits {
    pub(crate) after: Duration,
    /// After a driver or a library that did not fit: nobody installs one under a running process without a thought.
    pub(crate) driver: Duration,
}

/// What a mark stands on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// The GPU.
    Device,
    Model {
        name: String,
        /// In the memory of the host.
        on_cpu: bool,
    },
}

impl Place {
    /// Whether an engine on that side has to do with it.
    fn is_on(&self, on_cpu: bool) -> bool {
        match self {
            Self::Device => !on_cpu,
            Self::Model { on_cpu: side, .. } => *side == on_cpu,
        }
    }
}

/// Now, by both clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) mono: Instant,
    /// Unix time in ms.
    pub(super) wall_ms: u64,
}

#[derive(Debug, Clone)]
struct Mark {
    class: FailureClass,
    since_ms: u64,
    lasts: Duration,
    until: Instant,
    until_ms: u64,
    /// It is being tried again.
    trying: bool,
}

/// A mark that was taken back.
#[derive(Debug)]
struct Past {
    lasted: Duration,
    at: Instant,
}

/// How an engine ended, as far as it matters here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended<'a> {
    pub(super) class: FailureClass,
    pub(super) on_cpu: bool,
    /// The model that took the last memory.
    pub(super) culprit: Option<&'a str>,
}

#[derive(Debug)]
pub(super) struct Fallback {
    gpu: bool,
    waits: Waits,
    marks: BTreeMap<Place, Mark>,
    past: BTreeMap<Place, Past>,
    /// On the GPU, not explained otherwise.
    crashes: VecDeque<Instant>,
    /// Who is here.
    asks: BTreeMap<Name, Ask>,
    /// Why the engine is to run on the CPU in place of the GPU.
    side: Option<FailureClass>,
}

impl Fallback {
    /// `gpu`: the worker is pinned to one.
    pub(super) fn new(gpu: bool, waits: Waits) -> Self {
        Self {
            gpu,
            waits,
            marks: BTreeMap::new(),
            past: BTreeMap::new(),
            crashes: VecDeque::new(),
            asks: BTreeMap::new(),
            side: None,
        }
    }

    /// Whether the engine is to run on the CPU.
    pub(super) fn on_cpu(&self) -> bool {
        !self.gpu || self.side.is_some()
    }

    /// Why a model cannot be run, on the side where the engine is to run.
    pub(super) fn no_room(&self, model: &str) -> Option<FailureClass> {
        self.mark_of(model, self.on_cpu()).map(|mark| mark.class)
    }

    fn mark_of(&self, model: &str, on_cpu: bool) -> Option<&Mark> {
        self.marks.get(&Place::Model { name: model.to_owned(), on_cpu })
    }

    /// Calls `with` with what is known.
    fn here<T>(&self, models: &[String], with: impl FnOnce(Here<'_>) -> T) -> T {
        let no_room = |model: &str, on_cpu: bool| self.mark_of(model, on_cpu).map(|mark| mark.class);
        let device_out = self.marks.get(&Place::Device).map(|mark| mark.class);
        with(Here { gpu: self.gpu, models, device_out, no_room: &no_room })
    }

    fn settle(&mut self, models: &[String]) {
        self.side = self.here(models, |here| ladder::side(self.side, self.asks.values(), here));
    }

    /// Marks what has failed. A mark that stands stays as it is, unless it was being tried.
    pub(super) fn failed(&mut self, now: Moment, place: Place, class: FailureClass, models: &[String]) {
        let before = match self.marks.get(&place) {
            Some(mark) if !mark.trying => return,
            Some(mark) => Some((mark.lasts, mark.since_ms)),
            // One that held for as long as it had failed before has nothing to do with that.
            None => self
                .past
                .get(&place)
                .filter(|past| now.mono.saturating_duration_since(past.at) < past.lasted.max(self.waits.after))
                .map(|past| (past.lasted, now.wall_ms)),
        };
        let first = match class {
            FailureClass::DriverMismatch | FailureClass::MissingLibrary => self.waits.driver,
            _ => self.waits.after,
        };
        let lasts = before.map_or(first, |(lasts, _)| (lasts * 2).min(LONGEST.max(first)));
        let since_ms = before.map_or(now.wall_ms, |(_, since_ms)| since_ms);
        let until_ms = now.wall_ms + lasts.as_millis() as u64;
        self.past.remove(&place);
        self.marks.insert(place, Mark { class, since_ms, lasts, until: now.mono + lasts, until_ms, trying: false });
        self.settle(models);
    }

    /// An engine ended. Gives what was marked for it.
    pub(super) fn ended(&mut self, now: Moment, end: Ended<'_>, models: &[String]) -> Option<Place> {
        let Ended { class, on_cpu, culprit } = end;
        let on_gpu = self.gpu && !on_cpu;
        // What died while it was tried has failed, whatever was at fault: it is not tried again at once.
        self.tried_in_vain(now, |place| place.is_on(on_cpu), models);
        let place = match class {
            FailureClass::OutOfMemory => match culprit {
                Some(name) => Place::Model { name: name.to_owned(), on_cpu },
                // Not even what comes before the first model had room.
                None if on_gpu => Place::Device,
                None => return None,
            },
            class if is_of_the_device(class) && on_gpu => Place::Device,
            FailureClass::EngineCrash | FailureClass::Timeout if on_gpu => {
                self.crashes.push_back(now.mono);
                let recent = |at: &Instant| now.mono.saturating_duration_since(*at) < CRASHES_WITHIN;
                self.crashes.retain(recent);
                if self.crashes.len() < CRASHES {
                    return None;
                }
                self.crashes.clear();
                Place::Device
            }
            _ => return None,
        };
        self.failed(now, place.clone(), class, models);
        Some(place)
    }

    /// What may be tried again now. `room`: the figures show enough memory for it.
    pub(super) fn due(&mut self, now: Instant, room: impl Fn(&Place) -> bool) -> Vec<Place> {
        let due = self.marks.iter_mut().filter(|(place, mark)| !mark.trying && mark.until <= now && room(place));
        due.map(|(place, mark)| {
            mark.trying = true;
            place.clone()
        })
        .collect()
    }

    /// What was being tried there does not work yet, for the reason known before.
    pub(super) fn tried_in_vain(&mut self, now: Moment, there: impl Fn(&Place) -> bool, models: &[String]) {
        let tried = self.marks.iter().filter(|(place, mark)| mark.trying && there(place));
        let tried: Vec<_> = tried.map(|(place, mark)| (place.clone(), mark.class)).collect();
        for (place, class) in tried {
            self.failed(now, place, class, models);
        }
    }

    /// The child in which something was being tried is no more, and it had nothing to do with that.
    pub(super) fn gave_up_trying(&mut self) {
        self.marks.values_mut().for_each(|mark| mark.trying = false);
    }

    /// It works again, or there is nothing to try it with before somebody needs it.
    pub(super) fn restored(&mut self, now: Instant, place: &Place, models: &[String]) {
        if let Some(mark) = self.marks.remove(place) {
            self.past.insert(place.clone(), Past { lasted: mark.lasts, at: now });
            self.settle(models);
        }
    }

    /// Somebody is here with this wish.
    pub(super) fn begins(&mut self, name: Name, ask: Ask, models: &[String]) {
        if self.asks.get(&name) != Some(&ask) {
            self.asks.insert(name, ask);
            self.settle(models);
        }
    }

    /// And is gone.
    pub(super) fn forget(&mut self, name: &Name, models: &[String]) {
        if self.asks.remove(name).is_some() {
            self.settle(models);
        }
    }

    /// What runs for somebody who is here.
    pub(super) fn footing(&self, now: Instant, ask: &Ask, models: &[String]) -> Result<Footing, Failure> {
        self.in_place(now, ask, self.side, models)
    }

    /// What would run for somebody who is not here yet.
    pub(super) fn would(&self, now: Instant, ask: &Ask, models: &[String]) -> Result<Footing, Failure> {
        let with = self.asks.values().chain(std::iter::once(ask));
        let side = self.here(models, |here| ladder::side(self.side, with, here));
        self.in_place(now, ask, side, models)
    }

    fn in_place(
        &self,
        now: Instant,
        ask: &Ask,
        side: Option<FailureClass>,
        models: &[String],
    ) -> Result<Footing, Failure> {
        self.here(models, |here| ladder::footing(ask, side, here)).map_err(|failure| {
            let until = self.marks.values().filter(|mark| mark.class == failure.class).map(|mark| mark.until).min();
            let left = until.map(|until| until.saturating_duration_since(now).as_millis() as u64);
            Failure { retry_after_ms: left.filter(|ms| *ms > 0), ..failure }
        })
    }

    /// Models that run here for nobody but those who ask for `model`: with that one back, they are not needed.
    pub(super) fn only_in_place_of(&self, model: &str, models: &[String]) -> BTreeSet<String> {
        let (mut only, mut others) = (BTreeSet::new(), BTreeSet::new());
        for ask in self.asks.values() {
            let Ok(found) = self.here(models, |here| ladder::footing(ask, self.side, here)) else { continue };
            if ask.model == model { &mut only } else { &mut others }.insert(found.model);
        }
        only.difference(&others).filter(|found| *found != model).cloned().collect()
    }

    /// What runs in place of what is asked for by those who are here, each once.
    pub(super) fn standbys(&self, models: &[String]) -> Vec<Standby> {
        let mut told: Vec<Standby> = Vec::new();
        for ask in self.asks.values() {
            let found = self.here(models, |here| ladder::footing(ask, self.side, here));
            let Ok(Footing { model, on_cpu, because: Some(class) }) = found else { continue };
            let mark = self.mark_of(&ask.model, on_cpu || !self.gpu);
            let mark = mark.or_else(|| self.marks.get(&Place::Device)).or_else(|| self.mark_of(&ask.model, false));
            let standby = Standby {
                asked: ask.model.clone(),
                model,
                device: if on_cpu { "cpu" } else { "gpu" }.to_owned(),
                class,
                since_ms: mark.map_or(0, |mark| mark.since_ms),
                retry_at_ms: mark.map(|mark| mark.until_ms),
            };
            if !told.contains(&standby) {
                told.push(standby);
            }
        }
        told
    }

    /// Why a model has no room, and when it is tried again, on the side where the engine is to run.
    pub(super) fn failure_of(&self, now: Instant, model: &str) -> Option<Failure> {
        let mark = self.mark_of(model, self.on_cpu())?;
        let left = mark.until.saturating_duration_since(now).as_millis() as u64;
        let text = remedy::told(Side::Engine, mark.class, format_args!("no memory for model {model}"));
        Some(Failure { retry_after_ms: Some(left).filter(|ms| *ms > 0), ..Failure::new(mark.class, text) })
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::{
        id::{Kind, StreamId},
        session::Policy,
    };

    use super::*;

    const WAITS: Waits = Waits { after: Duration::from_secs(60), driver: Duration::from_secs(1_200) };

    fn models() -> Vec<String> {
        ["medium", "small", "base"].map(str::to_owned).to_vec()
    }

    fn name(id: &str) -> Name {
        (Kind::Session, StreamId::new(id).expect("id"))
    }

    fn ask(model: &str, policy: Policy) -> Ask {
        Ask { model: model.to_owned(), policy }
    }

    fn on_gpu(model: &str) -> Place {
        Place::Model { name: model.to_owned(), on_cpu: false }
    }

    struct Clock(Instant);

    impl Clock {
        fn at(&self, seconds: u64) -> Moment {
            Moment { mono: self.0 + Duration::from_secs(seconds), wall_ms: 1_000_000 + seconds * 1_000 }
        }
    }

    fn gpu() -> (Fallback, Clock) {
        (Fallback::new(true, WAITS), Clock(Instant::now()))
    }

    #[test]
    fn what_each_end_marks() {
        use FailureClass::*;
        let device = Some(Place::Device);
        let cases = [
            (true, false, OutOfMemory, Some("small"), Some(on_gpu("small"))),
            (true, false, OutOfMemory, None, device.clone()),
            (true, true, OutOfMemory, Some("small"), Some(Place::Model { name: "small".to_owned(), on_cpu: true })),
            (true, true, OutOfMemory, None, None),
            (false, true, OutOfMemory, Some("base"), Some(Place::Model { name: "base".to_owned(), on_cpu: true })),
            (true, false, DeviceLost, Some("small"), device.clone()),
            (true, false, DriverMismatch, None, device.clone()),
            (true, false, MissingLibrary, None, device),
            (true, true, DeviceLost, None, None),
            (false, true, MissingLibrary, None, None),
            (true, false, EngineCrash, Some("small"), None),
            (true, false, Timeout, Some("small"), None),
        ];
        for (gpu, on_cpu, class, culprit, expected) in cases {
            let mut fallback = Fallback::new(gpu, WAITS);
            let now = Clock(Instant::now()).at(0);
            let end = Ended { class, on_cpu, culprit };
            assert_eq!(fallback.ended(now, end, &models()), expected, "{gpu} {end:?}");
        }
    }

    #[test]
    fn three_crashes_within_a_minute_speak_against_the_gpu() {
        let (mut fallback, clock) = gpu();
        let crash = |class| Ended { class, on_cpu: false, culprit: None };
        let mut die = |at, class| fallback.ended(clock.at(at), crash(class), &models());
        assert_eq!(die(0, FailureClass::EngineCrash), None);
        assert_eq!(die(40, FailureClass::EngineCrash), None);
        assert_eq!(die(61, FailureClass::Timeout), None, "the first is too long ago");
        assert_eq!(die(62, FailureClass::EngineCrash), Some(Place::Device));
        assert!(fallback.on_cpu());
        let lent = ask("small", Policy::AllowCpu);
        let footing = fallback.footing(clock.at(62).mono, &lent, &models()).expect("the CPU");
        assert_eq!((footing.on_cpu, footing.because), (true, Some(FailureClass::EngineCrash)));
    }

    #[test]
    fn a_mark_goes_when_its_time_is_over_and_there_is_room_and_lasts_twice_as_long_the_next_time() {
        let (mut fallback, clock) = gpu();
        let (place, models) = (on_gpu("small"), models());
        let asked = ask("small", Policy::AllowSmaller);
        fallback.failed(clock.at(0), place.clone(), FailureClass::OutOfMemory, &models);
        fallback.failed(clock.at(30), place.clone(), FailureClass::OutOfMemory, &models);
        assert_eq!(fallback.due(clock.at(59).mono, |_| true), []);
        assert_eq!(fallback.due(clock.at(60).mono, |_| false), [], "no room yet");
        assert_eq!(fallback.due(clock.at(90).mono, |_| true), std::slice::from_ref(&place));
        assert_eq!(fallback.due(clock.at(91).mono, |_| true), [], "it is being tried");
        assert!(fallback.footing(clock.at(91).mono, &asked, &models).expect("base").because.is_some(), "not yet");
        fallback.restored(clock.at(92).mono, &place, &models);
        assert_eq!(fallback.footing(clock.at(92).mono, &asked, &models).expect("small").because, None);

        // Soon after, and then while it is tried: 60 s, 120 s, 240 s, ... 30 min.
        fallback.failed(clock.at(100), place.clone(), FailureClass::OutOfMemory, &models);
        let mut at = 100;
        for lasts in [120, 240, 480, 960, 1_800, 1_800] {
            assert_eq!(fallback.due(clock.at(at + lasts - 1).mono, |_| true), [], "{lasts}");
            at += lasts;
            assert_eq!(fallback.due(clock.at(at).mono, |_| true), std::slice::from_ref(&place), "{lasts}");
            fallback.failed(clock.at(at), place.clone(), FailureClass::OutOfMemory, &models);
        }
        // One that worked for long enough begins anew.
        at += 1_800;
        assert_eq!(fallback.due(clock.at(at).mono, |_| true), std::slice::from_ref(&place));
        fallback.restored(clock.at(at).mono, &place, &models);
        fallback.failed(clock.at(at + 1_801), place.clone(), FailureClass::OutOfMemory, &models);
        assert_eq!(fallback.due(clock.at(at + 1_801 + 60).mono, |_| true), [place]);
    }

    #[test]
    fn a_refusal_says_when_to_come_again() {
        let (mut fallback, clock) = gpu();
        fallback.failed(clock.at(0), on_gpu("small"), FailureClass::OutOfMemory, &models());
        let exact = ask("small", Policy::ExactModel);
        let failure = fallback.would(clock.at(20).mono, &exact, &models()).expect_err("refused");
        assert_eq!((failure.class, failure.retry_after_ms), (FailureClass::OutOfMemory, Some(40_000)));
        let told = fallback.failure_of(clock.at(20).mono, "small").expect("no room");
        assert_eq!(told.retry_after_ms, Some(40_000));
        assert_eq!(fallback.failure_of(clock.at(20).mono, "base"), None);
    }

    #[test]
    fn who_comes_and_goes_decides_the_side() {
        let (mut fallback, clock) = gpu();
        let models = vec!["small".to_owned()];
        fallback.failed(clock.at(0), on_gpu("small"), FailureClass::OutOfMemory, &models);
        assert!(!fallback.on_cpu(), "nobody needs it");
        let lent = ask("small", Policy::AllowCpu);
        assert!(fallback.would(clock.at(1).mono, &lent, &models).expect("CPU").on_cpu);
        assert!(!fallback.on_cpu(), "a question changes nothing");
        fallback.begins(name("a"), lent.clone(), &models);
        assert!(fallback.on_cpu());
        let standbys = fallback.standbys(&models);
        assert_eq!(standbys.len(), 1);
        assert_eq!((standbys[0].model.as_str(), standbys[0].device.as_str()), ("small", "cpu"));
        assert_eq!((standbys[0].since_ms, standbys[0].retry_at_ms), (1_000_000, Some(1_060_000)));
        fallback.begins(name("b"), lent, &models);
        assert_eq!(fallback.standbys(&models).len(), 1, "each once");
        fallback.forget(&name("a"), &models);
        assert!(fallback.on_cpu());
        fallback.forget(&name("b"), &models);
        assert!(!fallback.on_cpu() && fallback.standbys(&models).is_empty());
    }

    #[test]
    fn what_dies_while_it_is_tried_is_not_tried_again_at_once() {
        use FailureClass::*;
        for (class, on_cpu, again_s) in [
            (EngineCrash, false, 120),
            (Timeout, false, 120),
            (DeviceLost, false, 120),
            (OutOfMemory, false, 120),
            // What is tried on the other side has nothing to do with it.
            (EngineCrash, true, 0),
        ] {
            let (mut fallback, clock) = gpu();
            let (place, models) = (on_gpu("small"), models());
            fallback.failed(clock.at(0), place.clone(), OutOfMemory, &models);
            assert_eq!(fallback.due(clock.at(60).mono, |_| true), std::slice::from_ref(&place));
            fallback.ended(clock.at(60), Ended { class, on_cpu, culprit: None }, &models);
            fallback.gave_up_trying();
            let due = |fallback: &mut Fallback, at| fallback.due(clock.at(at).mono, |due| *due == place).len();
            if again_s > 0 {
                assert_eq!(due(&mut fallback, 60 + again_s - 1), 0, "{class}");
            }
            assert_eq!(due(&mut fallback, 60 + again_s), 1, "{class} {on_cpu}");
        }
    }

    #[test]
    fn what_is_tried_in_vain_waits_longer_and_what_is_not_tried_stays_as_it_is() {
        let (mut fallback, clock) = gpu();
        let (place, models) = (on_gpu("small"), models());
        fallback.failed(clock.at(0), place.clone(), FailureClass::OutOfMemory, &models);
        fallback.tried_in_vain(clock.at(10), |_| true, &models);
        assert_eq!(fallback.due(clock.at(60).mono, |_| true), std::slice::from_ref(&place), "it was not being tried");
        fallback.tried_in_vain(clock.at(61), |other| *other == on_gpu("base"), &models);
        assert_eq!(fallback.due(clock.at(1_000).mono, |_| true), [], "another one");
        fallback.tried_in_vain(clock.at(1_000), |tried| *tried == place, &models);
        assert_eq!(fallback.due(clock.at(1_119).mono, |_| true), []);
        assert_eq!(fallback.due(clock.at(1_120).mono, |_| true), [place]);
    }

    #[test]
    fn who_stands_in_for_one_model_alone_makes_room_for_it() {
        let (mut fallback, clock) = gpu();
        let models = models();
        fallback.failed(clock.at(0), on_gpu("medium"), FailureClass::OutOfMemory, &models);
        let freed = |fallback: &Fallback| fallback.only_in_place_of("medium", &models).into_iter().collect::<Vec<_>>();
        assert_eq!(freed(&fallback), Vec::<String>::new(), "nobody is here");
        fallback.begins(name("a"), ask("medium", Policy::AllowSmaller), &models);
        assert_eq!(freed(&fallback), ["small"]);
        fallback.begins(name("b"), ask("base", Policy::ExactModel), &models);
        fallback.begins(name("c"), ask("medium", Policy::ExactModel), &models);
        assert_eq!(freed(&fallback), ["small"], "others use another one, or none");
        fallback.begins(name("d"), ask("small", Policy::ExactModel), &models);
        assert_eq!(freed(&fallback), Vec::<String>::new(), "somebody asked for it");
    }

    #[test]
    fn drivers_are_not_tried_again_each_minute() {
        for class in [FailureClass::DriverMismatch, FailureClass::MissingLibrary] {
            let (mut fallback, clock) = gpu();
            let end = Ended { class, on_cpu: false, culprit: None };
            fallback.ended(clock.at(0), end, &models());
            assert_eq!(fallback.due(clock.at(1_199).mono, |_| true), []);
            assert_eq!(fallback.due(clock.at(1_200).mono, |_| true), [Place::Device]);
            fallback.gave_up_trying();
            assert_eq!(fallback.due(clock.at(1_201).mono, |_| true), [Place::Device]);
        }
    }
}
