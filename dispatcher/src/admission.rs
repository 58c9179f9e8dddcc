//! Who is placed first: waiting and displaced sessions before new ones, higher priority first, then who waits longest.

use std::{cmp::Ordering, time::Duration};

use voxfleet_schema::{
    id::StreamId,
    session::{Policy, Priority},
    transcript::VadKind,
};

/// A session without a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaced {
    pub id: StreamId,
    pub priority: Priority,
    /// Lost its worker; somebody listens to it already.
    pub displaced: bool,
    /// Monotonic time since when it waits.
    pub since: Duration,
}

fn before(a: &Unplaced, b: &Unplaced) -> Ordering {
    a.priority
        .cmp(&b.priority)
        .then_with(|| b.displaced.cmp(&a.displaced))
        .then_with(|| a.since.cmp(&b.since))
        .then_with(|| a.id.cmp(&b.id))
}

/// Puts them into the order in which they are placed.
pub fn order(unplaced: &mut [Unplaced]) {
    unplaced.sort_by(before);
}

/// What decides whether a session that nobody refused yet can be placed: where one found no room, its like finds none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Needs {
    pub model: Option<String>,
    pub policy: PolicyKey,
    pub vad: Option<VadKind>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use proptest::prelude::*;

    fn waits(id: &str, priority: Priority, displaced: bool, since_s: u64) -> Unplaced {
        Unplaced { id: testing::id(id), priority, displaced, since: Duration::from_secs(since_s) }
    }

    #[test]
    fn priority_then_displaced_then_longest() {
        let mut queue = vec![
            waits("late", Priority::Normal, false, 9),
            waits("low", Priority::Low, true, 0),
            waits("early", Priority::Normal, false, 1),
            waits("moved", Priority::Normal, true, 20),
            waits("high", Priority::High, false, 30),
        ];
        order(&mut queue);
        let ids: Vec<_> = queue.iter().map(|u| u.id.as_str()).collect();
        assert_eq!(ids, ["high", "moved", "early", "late", "low"]);
    }

    proptest! {
        #[test]
        fn the_order_does_not_depend_on_the_start(times in prop::collection::vec(0u64..5, 1..12), turn in 0usize..12) {
            let mut a: Vec<_> = times.iter().enumerate()
                .map(|(n, t)| waits(&format!("s{n}"), Priority::Normal, t % 2 == 0, *t)).collect();
            let mut b = a.clone();
            let len = b.len();
            b.rotate_left(turn % len);
            order(&mut a);
            order(&mut b);
            prop_assert_eq!(a, b);
        }
    }
}
