//! Who is placed first, who may come in at all, and when whoever may not comes again.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use voxfleet_schema::{
    fleet::EngineName,
    id::StreamId,
    session::{Policy, Priority},
    transcript::VadKind,
};

use crate::routing::Size;

/// Nobody is sent away for longer than this, however many come.
const LONGEST_RETRY_MS: u64 = 30_000;
/// Refusals of this long ago still tell how many want in.
const DEMAND: Duration = Duration::from_secs(10);

/// How many steps of ageing somebody of this priority starts behind one of the highest.
pub fn rank(priority: Priority) -> u64 {
    match priority {
        Priority::High => 0,
        Priority::Normal | Priority::Unknown => 1,
        Priority::Low => 2,
    }
}

/// A session without a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaced {
    pub id: StreamId,
    pub priority: Priority,
    /// Lost its worker; somebody listens to it already.
    pub displaced: bool,
    /// Monotonic time in ms since when it waits; below 0 before this dispatcher came.
    pub since_ms: i64,
}

impl Unplaced {
    /// Whoever is due first is placed first: one of a lower priority waits `age` longer, and no longer than that, so that
    /// nobody is overtaken for ever. Of those alike the displaced come first, then who waits longest.
    fn due_ms(&self, age: Duration) -> i64 {
        let halves = 2 * rank(self.priority) + u64::from(!self.displaced);
        self.since_ms.saturating_add((age.as_millis() as u64 / 2 * halves) as i64)
    }
}

/// Everybody who wants in: sessions that wait in the log, and opens whose key is being read.
#[derive(Debug, Default)]
pub struct Waiting {
    queue: BTreeSet<(i64, StreamId)>,
    due: HashMap<StreamId, i64>,
    opening: HashSet<StreamId>,
    demand: Demand,
}

impl Waiting {
    pub fn insert(&mut self, unplaced: &Unplaced, age: Duration) {
        self.remove(&unplaced.id);
        let due = unplaced.due_ms(age);
        self.queue.insert((due, unplaced.id.clone()));
        self.due.insert(unplaced.id.clone(), due);
    }

    pub fn remove(&mut self, id: &StreamId) -> bool {
        let due = self.due.remove(id);
        due.is_some_and(|due| self.queue.remove(&(due, id.clone())))
    }

    pub fn contains(&self, id: &StreamId) -> bool {
        self.due.contains_key(id)
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// In the order in which they are placed.
    pub fn iter(&self) -> impl Iterator<Item = &StreamId> {
        self.queue.iter().map(|(_, id)| id)
    }

    /// A session that may take a place once its key has been read.
    pub fn opens(&mut self, id: &StreamId) {
        if !self.opening.contains(id) {
            self.opening.insert(id.clone());
        }
    }

    /// Its key has been read, or could not be.
    pub fn opened(&mut self, id: &StreamId) {
        self.opening.remove(id);
    }

    pub fn opening(&self) -> usize {
        self.opening.len()
    }

    /// Somebody new was sent away; how many want in now.
    pub fn turned_away(&mut self, now: Duration) -> usize {
        self.queue.len() + self.demand.count(now)
    }
}

/// How many were refused lately.
#[derive(Debug, Default)]
struct Demand {
    since: Duration,
    now: usize,
    before: usize,
}

impl Demand {
    fn count(&mut self, now: Duration) -> usize {
        let passed = now.saturating_sub(self.since);
        if passed >= DEMAND {
            self.before = if passed < 2 * DEMAND { self.now } else { 0 };
            (self.since, self.now) = (now, 0);
        }
        self.now += 1;
        self.now + self.before
    }
}

/// When somebody who finds everything taken comes again. The more want in for each slot the later, and not all at once: their
/// times lie scattered by `who` they are.
pub fn come_again_ms(base_ms: u64, who: &impl Hash, wanting: usize, slots: u32) -> u64 {
    let mut hasher = DefaultHasher::new();
    who.hash(&mut hasher);
    let each = 1 + wanting as u64 / u64::from(slots.max(1));
    let spread = base_ms.saturating_mul(each).clamp(1, LONGEST_RETRY_MS.max(base_ms));
    base_ms.saturating_add(hasher.finish() % spread).min(LONGEST_RETRY_MS.max(base_ms))
}

/// What decides whether a session can be placed that nobody refused yet: where one found no room, its like finds none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Needs {
    pub model: Model,
    pub policy: PolicyKey,
    pub vad: Option<VadKind>,
    pub engine: Option<EngineName>,
}

/// [`Policy`] as a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PolicyKey(u8);

impl From<Policy> for PolicyKey {
    fn from(policy: Policy) -> Self {
        Self(match policy {
            Policy::ExactModel => 0,
            Policy::AllowSmaller => 1,
            Policy::AllowCpu | Policy::Unknown => 2,
            Policy::ForceCpu => 3,
        })
    }
}

/// A model as far as it decides who has room. Those that no worker lists are alike where the same may stand in for
/// them: strangers may think up as many as there are sessions, and each would be looked for on every worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Model {
    Default,
    Known(u32),
    Nobodys(Size),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use proptest::prelude::*;

    const AGE: Duration = Duration::from_secs(600);

    fn waits(id: &str, priority: Priority, displaced: bool, since_s: u64) -> Unplaced {
        Unplaced { id: testing::id(id), priority, displaced, since_ms: since_s as i64 * 1_000 }
    }

    fn order(all: &[Unplaced]) -> Vec<String> {
        let mut waiting = Waiting::default();
        all.iter().for_each(|one| waiting.insert(one, AGE));
        waiting.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn priority_then_displaced_then_longest() {
        let queue = [
            waits("late", Priority::Normal, false, 9),
            waits("low", Priority::Low, true, 0),
            waits("early", Priority::Normal, false, 1),
            waits("moved", Priority::Normal, true, 20),
            waits("high", Priority::High, false, 30),
        ];
        assert_eq!(order(&queue), ["high", "moved", "early", "late", "low"]);
    }

    #[test]
    fn whoever_waits_long_is_overtaken_no_more() {
        let mut queue = vec![waits("low", Priority::Low, false, 0)];
        queue.extend((0..30).map(|n| waits(&format!("high{n:02}"), Priority::High, false, n * 60 + 1)));
        let at = order(&queue).iter().position(|id| id == "low");
        assert_eq!(at, Some(20), "high ones that came within twenty minutes, not those after");
    }

    #[test]
    fn whoever_leaves_the_queue_is_gone_and_may_come_back_elsewhere_in_it() {
        let mut waiting = Waiting::default();
        waiting.insert(&waits("a", Priority::Normal, false, 1), AGE);
        waiting.insert(&waits("b", Priority::Normal, false, 2), AGE);
        waiting.insert(&waits("a", Priority::Normal, false, 3), AGE);
        assert_eq!(waiting.iter().map(StreamId::as_str).collect::<Vec<_>>(), ["b", "a"]);
        assert!(waiting.remove(&testing::id("b")) && !waiting.remove(&testing::id("b")));
        assert_eq!((waiting.len(), waiting.contains(&testing::id("a"))), (1, true));
    }

    #[test]
    fn the_more_want_in_the_later_and_the_more_scattered_they_come() {
        let times = |wanting, slots| -> Vec<u64> {
            (0..1_000).map(|n| come_again_ms(1_000, &format!("s{n}"), wanting, slots)).collect()
        };
        let few = times(0, 16);
        assert!(few.iter().all(|ms| (1_000..2_000).contains(ms)));
        let many = times(10_000, 16);
        assert!(many.iter().all(|ms| (1_000..=30_000).contains(ms)));
        for second in 1..30 {
            let within = many.iter().filter(|ms| **ms / 1_000 == second).count();
            assert!((10..70).contains(&within), "{within} of 1,000 in second {second}");
        }
        assert_eq!(come_again_ms(60_000, &"s", 10_000, 0), 60_000, "never before the pause that is configured");
    }

    #[test]
    fn refusals_count_for_a_while() {
        let mut demand = Demand::default();
        let s = Duration::from_secs;
        assert_eq!((demand.count(s(1)), demand.count(s(2))), (1, 2));
        assert_eq!((demand.count(s(12)), demand.count(s(40))), (3, 1));
    }

    proptest! {
        #[test]
        fn the_order_does_not_depend_on_the_start(times in prop::collection::vec(0u64..5, 1..12), turn in 0usize..12) {
            let a: Vec<_> = times.iter().enumerate()
                .map(|(n, t)| waits(&format!("s{n}"), Priority::Normal, t % 2 == 0, *t)).collect();
            let mut b = a.clone();
            let len = b.len();
            b.rotate_left(turn % len);
            prop_assert_eq!(order(&a), order(&b));
        }

        /// Of those alike nobody overtakes; of the others only within the time that priority is worth.
        #[test]
        fn nobody_is_overtaken_for_longer_than_priority_is_worth(
            all in prop::collection::vec((0u64..5_000, 0u8..3, any::<bool>()), 2..40),
        ) {
            let of = [Priority::High, Priority::Normal, Priority::Low];
            let all: Vec<_> = all.iter().enumerate()
                .map(|(n, (t, p, d))| waits(&format!("s{n:02}"), of[usize::from(*p)], *d, *t)).collect();
            let order = order(&all);
            let at = |one: &Unplaced| order.iter().position(|id| id == one.id.as_str());
            for a in &all {
                for b in &all {
                    let alike = a.priority == b.priority && a.displaced == b.displaced;
                    let worth = AGE.as_millis() as i64 * 5 / 2;
                    if a.since_ms < b.since_ms && (alike || b.since_ms - a.since_ms > worth) {
                        prop_assert!(at(a) < at(b), "{a:?} before {b:?}");
                    }
                }
            }
        }
    }
}
