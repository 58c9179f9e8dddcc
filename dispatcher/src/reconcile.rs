//! Desired against actual: the only repair. What the keys say is compared with what workers say they hold, and the
//! difference becomes actions. Pure, and idempotent by (id, epoch): acting twice on the same picture does no harm.

use std::time::Duration;

use voxfleet_schema::{
    fleet::{Held, WorkerHealth},
    id::WorkerName,
    session::SessionState,
};

/// A heartbeat shows what its worker held when it was made; one that was on its way when something was decided shows the
/// world before. Heartbeats come each second.
const PICTURE_AGE: Duration = Duration::from_millis(1_500);
/// What a worker gets to store the final that it has begun, when its session has moved on: about one window's decoding.
pub const FINISH_WITHIN: Duration = Duration::from_secs(2);

/// What the key of a session says.
#[derive(Debug, Clone, Copy)]
pub struct Desired<'a> {
    pub state: SessionState,
    pub epoch: u64,
    pub worker: Option<&'a WorkerName>,
    /// Nothing is under way for it, since then.
    pub settled_since: Option<Duration>,
    /// Index of the last final the dispatcher has seen.
    pub final_index: Option<u64>,
}

/// Its worker, as the fleet sees it.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    pub health: WorkerHealth,
    pub heard: Duration,
    /// It says itself that it drains, so that what it does not hold it will never hold.
    pub drains: bool,
}

/// A worker that says it holds the session.
#[derive(Debug, Clone, Copy)]
pub struct Holder<'a> {
    pub worker: &'a WorkerName,
    pub held: &'a Held,
    pub heard: Duration,
    pub health: WorkerHealth,
}

impl Holder<'_> {
    /// It beats and should not keep what it has, or asks that it be taken for want of room.
    fn leaves(&self) -> bool {
        let asks = self.held.elsewhere && !self.held.suspect;
        asks || matches!(self.health, WorkerHealth::Draining | WorkerHealth::Unhealthy)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send the same assignment again.
    Resend,
    /// Its worker is gone: place it anew.
    Displace,
    /// Its worker should not keep it: place it elsewhere if there is room.
    MoveIfRoom,
    /// A final was stored that the dispatcher has not seen.
    CatchUp,
    /// The worker holds a later epoch than the key knows: assign above it.
    Raise { above: u64 },
    /// Nobody is to have it, and this worker works on it: it may as well keep it, one epoch above.
    Adopt { worker: WorkerName, above: u64 },
    /// Tell a worker to let go; `finish`: it may store the final that it has begun.
    Release { worker: WorkerName, epoch: u64, finish: bool },
}

/// Compares one session. An owner that is none has not been heard: its silence is judged by the fleet, like that of any
/// other, and what it had stays where it is until then.
pub fn compare(desired: Desired<'_>, owner: Option<Owner>, holders: &[Holder<'_>]) -> Vec<Action> {
    let Some(since) = desired.settled_since else {
        return Vec::new();
    };
    if desired.state == SessionState::Waiting {
        return unassigned(since, holders);
    }
    let fresh = |heard: Duration| heard >= since + PICTURE_AGE;
    let assigned = desired.state == SessionState::Assigned;
    let mine = |holder: &Holder<'_>| assigned && desired.worker == Some(holder.worker);
    let mut actions = Vec::new();
    for holder in holders.iter().filter(|h| !mine(h)) {
        let finish = assigned && holder.leaves();
        let patience = if finish { FINISH_WITHIN } else { Duration::ZERO };
        if holder.heard >= since + PICTURE_AGE + patience {
            actions.push(Action::Release { worker: holder.worker.clone(), epoch: holder.held.epoch, finish });
        }
    }
    if !assigned {
        return actions;
    }
    let held = holders.iter().find(|h| mine(h));
    if held.is_some_and(|h| h.held.final_index > desired.final_index) {
        actions.push(Action::CatchUp);
    }
    let Some(owner) = owner else {
        return actions;
    };
    match (owner.health, held) {
        (WorkerHealth::Dead, _) => actions.push(Action::Displace),
        (_, None) if owner.drains => actions.push(Action::Displace),
        (WorkerHealth::Draining | WorkerHealth::Unhealthy, _) => actions.push(Action::MoveIfRoom),
        // The last try of what kills engines is another worker's, if there is one; and whoever has too little room asks, too.
        (WorkerHealth::Alive, Some(h)) if h.held.elsewhere && h.held.epoch == desired.epoch => {
            actions.push(Action::MoveIfRoom);
        }
        (_, Some(h)) if h.held.epoch > desired.epoch => actions.push(Action::Raise { above: h.held.epoch }),
        (_, Some(h)) if h.held.epoch == desired.epoch => {}
        _ if fresh(owner.heard) => actions.push(Action::Resend),
        _ => {}
    }
    actions
}

/// Nobody has room, and somebody holds it all the same: a move that found no taker, or an assignment whose answer was
/// lost. Whoever works on it is not cut off for nothing.
fn unassigned(since: Duration, holders: &[Holder<'_>]) -> Vec<Action> {
    let able = |h: &&Holder<'_>| h.health == WorkerHealth::Alive && h.heard >= since + PICTURE_AGE;
    let keeps = holders.iter().filter(able).max_by_key(|h| (h.held.epoch, h.worker));
    let others = holders.iter().filter(able).filter(|h| keeps.is_some_and(|k| k.worker != h.worker));
    let release = |h: &Holder<'_>| Action::Release { worker: h.worker.clone(), epoch: h.held.epoch, finish: false };
    let adopt = keeps.map(|h| Action::Adopt { worker: h.worker.clone(), above: h.held.epoch });
    others.map(release).chain(adopt).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, worker};
    use proptest::prelude::*;

    const LONG: Duration = Duration::from_secs(60);

    fn run(
        state: SessionState,
        epoch: u64,
        owner: Option<WorkerHealth>,
        held: &[(&str, u64)],
        age_ms: u64,
    ) -> Vec<Action> {
        let me = worker("g0", "i");
        let names: Vec<_> = held.iter().map(|(gpu, epoch)| (worker(gpu, "i"), testing::held("s", *epoch))).collect();
        let heard = LONG + Duration::from_millis(age_ms);
        let health = |name: &WorkerName| match owner {
            Some(health) if *name == me => health,
            _ => WorkerHealth::Alive,
        };
        let holders: Vec<_> =
            names.iter().map(|(worker, held)| Holder { worker, held, heard, health: health(worker) }).collect();
        let desired = Desired { state, epoch, worker: Some(&me), settled_since: Some(LONG), final_index: None };
        let owner = owner.map(|health| Owner { health, heard, drains: health == WorkerHealth::Draining });
        compare(desired, owner, &holders)
    }

    fn release(gpu: &str, epoch: u64) -> Action {
        Action::Release { worker: worker(gpu, "i"), epoch, finish: false }
    }

    #[test]
    fn differences_become_actions() {
        use SessionState::{Assigned, Ended};
        let alive = Some(WorkerHealth::Alive);
        assert_eq!(run(Assigned, 2, alive, &[("g0", 2)], 2_000), []);
        assert_eq!(run(Assigned, 2, alive, &[], 2_000), [Action::Resend]);
        assert_eq!(run(Assigned, 2, alive, &[], 1_000), [], "that heartbeat may be older than the assignment");
        assert_eq!(run(Assigned, 2, alive, &[("g0", 1)], 2_000), [Action::Resend]);
        assert_eq!(run(Assigned, 2, alive, &[("g0", 5)], 2_000), [Action::Raise { above: 5 }]);
        assert_eq!(run(Assigned, 2, alive, &[("g0", 2), ("g1", 1)], 2_000), [release("g1", 1)]);
        assert_eq!(run(Assigned, 2, Some(WorkerHealth::Dead), &[], 0), [Action::Displace]);
        assert_eq!(run(Assigned, 2, None, &[], 60_000), [], "its silence has not been judged");
        assert_eq!(run(Assigned, 2, Some(WorkerHealth::Suspect), &[("g0", 2)], 0), []);
        assert_eq!(run(Assigned, 2, Some(WorkerHealth::Draining), &[("g0", 2)], 0), [Action::MoveIfRoom]);
        assert_eq!(run(Assigned, 2, Some(WorkerHealth::Draining), &[], 0), [Action::Displace], "it will not take it");
        assert_eq!(run(Assigned, 2, Some(WorkerHealth::Unhealthy), &[], 0), [Action::MoveIfRoom]);
        assert_eq!(run(Ended, 2, alive, &[("g0", 2)], 2_000), [release("g0", 2)]);
        assert_eq!(run(Ended, 2, alive, &[("g0", 2)], 500), []);
        assert_eq!(run(Ended, 2, alive, &[], 2_000), []);
    }

    #[test]
    fn who_works_on_a_waiting_session_keeps_it() {
        use SessionState::Waiting;
        let adopt = |gpu: &str, above| Action::Adopt { worker: worker(gpu, "i"), above };
        let alive = Some(WorkerHealth::Alive);
        assert_eq!(run(Waiting, 2, alive, &[("g0", 2)], 2_000), [adopt("g0", 2)]);
        assert_eq!(run(Waiting, 2, alive, &[("g0", 2)], 1_000), [], "that heartbeat may be older");
        assert_eq!(run(Waiting, 2, alive, &[("g1", 1), ("g0", 2)], 2_000), [release("g1", 1), adopt("g0", 2)]);
        for leaves in [WorkerHealth::Draining, WorkerHealth::Unhealthy, WorkerHealth::Suspect] {
            assert_eq!(run(Waiting, 3, Some(leaves), &[("g0", 2)], 60_000), [], "nobody else has it: {leaves:?}");
        }
    }

    #[test]
    fn an_old_owner_that_leaves_may_finish_what_it_has_begun() {
        let (me, other) = (worker("g1", "i"), worker("g0", "i"));
        let held = testing::held("s", 1);
        let desired = Desired {
            state: SessionState::Assigned,
            epoch: 2,
            worker: Some(&me),
            settled_since: Some(LONG),
            final_index: None,
        };
        let run_with = |held: &Held, health, age: Duration| {
            let holder = Holder { worker: &other, held, heard: LONG + age, health };
            compare(desired, None, &[holder])
        };
        let run = |health, age| run_with(&held, health, age);
        let release = |finish| vec![Action::Release { worker: other.clone(), epoch: 1, finish }];
        assert_eq!(run(WorkerHealth::Alive, PICTURE_AGE), release(false));
        assert_eq!(run(WorkerHealth::Draining, PICTURE_AGE), [], "it was told, and has time");
        assert_eq!(run(WorkerHealth::Draining, PICTURE_AGE + FINISH_WITHIN), release(true));
        let asked = Held { elsewhere: true, ..held.clone() };
        assert_eq!(run_with(&asked, WorkerHealth::Alive, PICTURE_AGE), [], "it asked for want of room");
        assert_eq!(run_with(&asked, WorkerHealth::Alive, PICTURE_AGE + FINISH_WITHIN), release(true));
        let kills = Held { suspect: true, ..asked };
        assert_eq!(run_with(&kills, WorkerHealth::Alive, PICTURE_AGE), release(false), "not what kills engines");
    }

    #[test]
    fn nothing_is_done_about_what_is_under_way() {
        let me = worker("g0", "i");
        let desired = Desired {
            state: SessionState::Assigned,
            epoch: 1,
            worker: Some(&me),
            settled_since: None,
            final_index: None,
        };
        let owner = Some(Owner { health: WorkerHealth::Dead, heard: Duration::ZERO, drains: false });
        assert_eq!(compare(desired, owner, &[]), []);
    }

    #[test]
    fn a_final_that_was_missed_is_read() {
        let me = worker("g0", "i");
        let held = Held { final_index: Some(0), ..testing::held("s", 1) };
        let holder = Holder { worker: &me, held: &held, heard: LONG, health: WorkerHealth::Alive };
        let desired = Desired {
            state: SessionState::Assigned,
            epoch: 1,
            worker: Some(&me),
            settled_since: Some(Duration::ZERO),
            final_index: None,
        };
        let owner = Some(Owner { health: WorkerHealth::Alive, heard: LONG, drains: false });
        assert_eq!(compare(desired, owner, &[holder]), [Action::CatchUp]);
        let seen = Desired { final_index: Some(0), ..desired };
        assert_eq!(compare(seen, owner, &[holder]), []);
    }

    #[test]
    fn what_asks_for_another_worker_is_moved_if_there_is_room() {
        let me = worker("g0", "i");
        let acted = |elsewhere, epoch, suspect| {
            let held = Held { suspect, elsewhere, ..testing::held("s", epoch) };
            let holder = Holder { worker: &me, held: &held, heard: LONG, health: WorkerHealth::Alive };
            let desired = Desired {
                state: SessionState::Assigned,
                epoch: 1,
                worker: Some(&me),
                settled_since: Some(Duration::ZERO),
                final_index: None,
            };
            compare(desired, Some(Owner { health: WorkerHealth::Alive, heard: LONG, drains: false }), &[holder])
        };
        for suspect in [false, true] {
            assert_eq!(acted(true, 1, suspect), [Action::MoveIfRoom]);
            assert_eq!(acted(false, 1, suspect), []);
            assert_eq!(acted(true, 2, suspect), [Action::Raise { above: 2 }], "said under another epoch");
        }
    }

    proptest! {
        /// Carrying the actions out leads to a picture that needs none.
        #[test]
        fn acting_settles(state in 0u8..3, epoch in 1u64..5, held in prop::collection::vec((0u8..3, 0u64..6), 0..3)) {
            let state = [SessionState::Waiting, SessionState::Assigned, SessionState::Ended][usize::from(state)];
            let (mut state, mut epoch) = (state, epoch);
            let mut actual: std::collections::BTreeMap<String, u64> =
                held.into_iter().map(|(gpu, epoch)| (format!("g{gpu}"), epoch)).collect();
            for _ in 0..3 {
                let list: Vec<_> = actual.iter().map(|(g, e)| (g.as_str(), *e)).collect();
                for action in run(state, epoch, Some(WorkerHealth::Alive), &list.clone(), 2_000) {
                    match action {
                        Action::Release { worker, .. } => { actual.remove(worker.gpu_id.as_str()); }
                        Action::Raise { above } => { epoch = above + 1; actual.insert("g0".into(), epoch); }
                        Action::Resend => { actual.insert("g0".into(), epoch); }
                        Action::Adopt { worker, above } => {
                            // As if that were the owner of this comparison.
                            (state, epoch) = (SessionState::Assigned, above + 1);
                            actual.remove(worker.gpu_id.as_str());
                            actual.insert("g0".into(), epoch);
                        }
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
            }
            let list: Vec<_> = actual.iter().map(|(g, e)| (g.as_str(), *e)).collect();
            prop_assert_eq!(run(state, epoch, Some(WorkerHealth::Alive), &list, 2_000), vec![]);
        }
    }
}
