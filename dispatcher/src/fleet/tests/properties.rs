//! What no order of heartbeats, probes and looks may break.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Beat(u8),
    Miss(u8),
    Ready(u8, bool),
    Probe(bool),
    /// Time passes, and the fleet is looked at; who is condemned is buried, at once or not.
    Look {
        ms: u16,
        bury: bool,
    },
}

const WORKERS: u8 = 8;

fn step() -> impl Strategy<Value = Step> {
    let any_worker = || 0..WORKERS;
    prop_oneof![
        12 => any_worker().prop_map(Step::Beat),
        1 => any_worker().prop_map(Step::Miss),
        2 => (any_worker(), any::<bool>()).prop_map(|(n, on)| Step::Ready(n, on)),
        4 => prop_oneof![6 => Just(true), 1 => Just(false)].prop_map(Step::Probe),
        8 => ((1u16..1_500), any::<bool>()).prop_map(|(ms, bury)| Step::Look { ms, bury }),
    ]
}

/// The same, told as simply as possible.
#[derive(Default)]
struct Model {
    now: Duration,
    /// Last sign of life, or since when it is missed.
    signs: BTreeMap<WorkerName, Duration>,
    dead: BTreeSet<WorkerName>,
    /// Silence is proven up to here.
    answered: Duration,
    /// The first round trip that failed since one was answered.
    deaf: Option<Duration>,
    /// Nothing is judged before: an answer that came late, and the time that heartbeats need.
    deaf_until: Duration,
    mass_since: Option<Duration>,
}

impl Model {
    fn silent(&self, name: &WorkerName) -> Duration {
        self.now - self.signs[name]
    }

    fn probe(&mut self, answered: bool, config: &DispatcherConfig) {
        if !answered {
            self.deaf.get_or_insert(self.now);
            return;
        }
        self.answered = self.now;
        if let Some(since) = self.deaf.take() {
            let long = self.now - since >= Duration::from_millis(config.dead_after_ms);
            let ms = if long { config.dead_after_ms } else { config.suspect_after_ms };
            self.deaf_until = self.deaf_until.max(self.now + Duration::from_millis(ms));
        }
    }

    /// No hold of its own link.
    fn hears(&self) -> bool {
        self.deaf.is_none() && self.now >= self.deaf_until
    }

    /// How many are silent for that long by all that an answer proves.
    fn due(&self, silent: Duration) -> usize {
        self.signs.values().filter(|sign| self.answered.saturating_sub(**sign) >= silent).count()
    }

    fn look(&mut self, config: &DispatcherConfig) {
        let suspect_after = Duration::from_millis(config.suspect_after_ms);
        let silent = self.signs.keys().filter(|name| self.silent(name) >= suspect_after).count();
        let mass = silent >= 3 && silent * 5 > self.signs.len();
        self.mass_since = mass.then(|| self.mass_since.unwrap_or(self.now));
    }
}

fn name(n: u8) -> WorkerName {
    worker(&format!("g{n}"), "i")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn silence_is_judged_only_where_it_proves_something(steps in prop::collection::vec(step(), 0..200)) {
        let config = config();
        let dead_after = Duration::from_millis(config.dead_after_ms);
        let hold = Duration::from_millis(config.mass_silence_hold_ms);
        let (mut fleet, mut model) = (Fleet::default(), Model { now: MS, ..Model::default() });
        let (mut condemned, mut mass_until) = (0u32, Duration::ZERO);
        for step in steps {
            match step {
                Step::Beat(n) => {
                    let heard = fleet.heard(beat(&format!("g{n}"), "i"), model.now);
                    if model.dead.contains(&name(n)) {
                        prop_assert!(matches!(heard, Heard::Dead { .. }), "{heard:?}");
                    } else {
                        model.signs.insert(name(n), model.now);
                    }
                }
                Step::Miss(n) => {
                    fleet.miss(&name(n), Duration::ZERO);
                    if !model.dead.contains(&name(n)) {
                        model.signs.entry(name(n)).or_insert(Duration::ZERO);
                    }
                }
                Step::Ready(n, on) => fleet.set_ready(&name(n), on),
                Step::Probe(worked) => {
                    let trip = RoundTrip { began: model.now, answered: worked, connects: 1 };
                    fleet.round_trip(trip, model.now, &config);
                    model.probe(worked, &config);
                }
                Step::Look { ms, bury } => {
                    model.now += u32::from(ms) * MS;
                    let verdicts = fleet.verdicts(model.now, &config);
                    model.look(&config);
                    let held = model.mass_since.is_some_and(|since| model.now < since + hold);
                    mass_until = mass_until.max(model.mass_since.map_or(Duration::ZERO, |since| since + hold));
                    for who in &verdicts {
                        prop_assert!(!model.dead.contains(who), "{who} was condemned before");
                        prop_assert!(model.silent(who) >= dead_after, "{who} was heard {:?} ago", model.silent(who));
                        prop_assert!(model.answered - model.signs[who] >= dead_after, "nothing proves that");
                        prop_assert!(model.hears(), "the own link was in doubt");
                        let longer = if held { hold } else { Duration::ZERO };
                        prop_assert!(model.answered - model.signs[who] >= dead_after + longer, "many fell silent at once");
                    }
                    if model.hears() {
                        // Nobody is spared either, whoever else comes and goes.
                        prop_assert!(verdicts.len() >= model.due(dead_after + hold), "silent, and not condemned");
                        prop_assert!(held || model.now < mass_until || verdicts.len() == model.due(dead_after));
                    }
                    // Looked at again without any news, everybody is still condemned, unless the silence has spread.
                    model.now += MS;
                    model.look(&config);
                    let again = fleet.verdicts(model.now, &config);
                    let spread = model.mass_since.is_some_and(|since| model.now < since + hold);
                    mass_until = mass_until.max(model.mass_since.map_or(Duration::ZERO, |since| since + hold));
                    prop_assert!(spread || verdicts.iter().all(|who| again.contains(who)));
                    if bury {
                        for who in verdicts {
                            fleet.bury(&who, model.now);
                            model.signs.remove(&who);
                            model.dead.insert(who);
                            condemned += 1;
                        }
                    }
                }
            }
            for who in &model.dead {
                prop_assert_eq!(fleet.health(who, model.now, &config), WorkerHealth::Dead);
                prop_assert!(fleet.get(who).is_none());
            }
            for (who, known) in fleet.workers() {
                let suspect = known.silent(model.now) >= Duration::from_millis(config.suspect_after_ms);
                let health = known.health(model.now, &config);
                prop_assert_eq!(health == WorkerHealth::Suspect, suspect, "{}", who);
                prop_assert!(suspect || known.ready == (health != WorkerHealth::Joining));
            }
        }
        prop_assert_eq!(condemned as usize, model.dead.len());
    }
}
