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
}

/// A worker that says it holds the session.
#[derive(Debug, Clone, Copy)]
pub struct Holder<'a> {
    pub worker: &'a WorkerName,
    pub held: &'a Held,
    pub heard: Duration,
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
    /// Tell a worker to let go.
    Release { worker: WorkerName, epoch: u64 },
}

/// Compares one session. `listening`: for how long heartbeats have been heard; a worker that has not been heard at all is
/// gone only when that is longer than `dead_after`.
pub fn compare(
    desired: Desired<'_>,
    owner: Option<Owner>,
    holders: &[Holder<'_>],
    listening: Duration,
    dead_after: Duration,
) -> Vec<Action> {
    let Some(since) = desired.settled_since else {
        return Vec::new();
    };
    let mut actions = Vec::new();
    let fresh = |heard: Duration| heard >= since + PICTURE_AGE;
    let assigned = desired.state == SessionState::Assigned;
    let mine = |holder: &Holder<'_>| assigned && desired.worker == Some(holder.worker);
    for holder in holders.iter().filter(|h| !mine(h) && fresh(h.heard)) {
        actions.push(Action::Release { worker: holder.worker.clone(), epoch: holder.held.epoch });
    }
    if !assigned {
        return actions;
    }
    let held = holders.iter().find(|h| mine(h));
    if held.is_some_and(|h| h.held.final_index > desired.final_index) {
        actions.push(Action::CatchUp);
    }
    match owner.map(|o| (o.health, o.heard)) {
        None if listening > dead_after => actions.push(Action::Displace),
        None => {}
        Some((WorkerHealth::Dead, _)) => actions.push(Action::Displace),
        Some((WorkerHealth::Draining | WorkerHealth::Unhealthy, _)) => actions.push(Action::MoveIfRoom),
        Some((_, heard)) => match held {
            Some(h) if h.held.epoch > desired.epoch => actions.push(Action::Raise { above: h.held.epoch }),
            Some(h) if h.held.epoch == desired.epoch => {}
            Some(_) | None if fresh(heard) => actions.push(Action::Resend),
            Some(_) | None => {}
        },
    }
    actions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, worker};
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(60);
    const DEAD: Duration = Duration::from_secs(3);

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
        let holders: Vec<_> = names.iter().map(|(worker, held)| Holder { worker, held, heard }).collect();
        let desired = Desired { state, epoch, worker: Some(&me), settled_since: Some(LONG), final_index: None };
        compare(desired, owner.map(|health| Owner { health, heard }), &holders, 2 * LONG, DEAD)
    }

    fn release(gpu: &str, epoch: u64) -> Action {
        Action::Release { worker: worker(gpu, "i"), epoch }
    }

    #[test]
    fn differences_become_actions() {
        use SessionState::{Assigned, Ended, Waiting};
        let alive = Some(WorkerHealth::Alive);
        assert_eq!(run(Assigned, 2, alive, &[("g0", 2)], 2_000), []);
        assert_eq!(run(Assigned, 2, alive, &[], 2_000), [Action::Resend]);
        assert_eq!(run(Assigned, 2, alive, &[], 1_000), [], "that heartbeat may be older than the assignment");
        assert_eq!(run(Assigned, 2, alive, &[("g0", 1)], 2_000), [Action::Resend]);
        assert_eq!(run(Assigned, 2, alive, &[("g0", 5)], 2_000), [Action::Raise { above: 5 }]);
        assert_eq!(run(Assigned, 2, alive, &[("g0", 2), ("g1", 1)], 2_000), [release("g1", 1)]);
        assert_eq!(run(Assigned, 2, Some(WorkerHealth::Dead), &[], 0), [Action::Displace]);
        assert_eq!(run(Assigned, 2, None, &[], 0), [Action::Displace]);
        assert_eq!(run(Assigned, 2, Some(WorkerHealth::Suspect), &[("g0", 2)], 0), []);
        assert_eq!(run(Assigned, 2, Some(WorkerHealth::Draining), &[("g0", 2)], 0), [Action::MoveIfRoom]);
        assert_eq!(run(Waiting, 2, alive, &[("g0", 2)], 2_000), [release("g0", 2)]);
        assert_eq!(run(Ended, 2, alive, &[("g0", 2)], 2_000), [release("g0", 2)]);
        assert_eq!(run(Ended, 2, alive, &[("g0", 2)], 500), []);
        assert_eq!(run(Ended, 2, alive, &[], 2_000), []);
    }

    #[test]
    fn nothing_is_done_about_what_is_under_way_or_not_heard_yet() {
        let me = worker("g0", "i");
        let mut desired = Desired {
            state: SessionState::Assigned,
            epoch: 1,
            worker: Some(&me),
            settled_since: None,
            final_index: None,
        };
        assert_eq!(compare(desired, None, &[], LONG, DEAD), []);
        desired.settled_since = Some(Duration::ZERO);
        assert_eq!(compare(desired, None, &[], 2_000 * MS, DEAD), [], "a takeover has not heard everybody yet");
        assert_eq!(compare(desired, None, &[], 3_001 * MS, DEAD), [Action::Displace]);
    }

    #[test]
    fn a_final_that_was_missed_is_read() {
        let me = worker("g0", "i");
        let held = Held { final_index: Some(0), ..testing::held("s", 1) };
        let holder = Holder { worker: &me, held: &held, heard: LONG };
        let desired = Desired {
            state: SessionState::Assigned,
            epoch: 1,
            worker: Some(&me),
            settled_since: Some(Duration::ZERO),
            final_index: None,
        };
        let owner = Some(Owner { health: WorkerHealth::Alive, heard: LONG });
        assert_eq!(compare(desired, owner, &[holder], LONG, DEAD), [Action::CatchUp]);
        let seen = Desired { final_index: Some(0), ..desired };
        assert_eq!(compare(seen, owner, &[holder], LONG, DEAD), []);
    }

    proptest! {
        /// Carrying the actions out leads to a picture that needs none.
        #[test]
        fn acting_settles(state in 0u8..3, epoch in 1u64..5, held in prop::collection::vec((0u8..3, 0u64..6), 0..3)) {
            let state = [SessionState::Waiting, SessionState::Assigned, SessionState::Ended][usize::from(state)];
            let mut epoch = epoch;
            let mut actual: std::collections::BTreeMap<String, u64> =
                held.into_iter().map(|(gpu, epoch)| (format!("g{gpu}"), epoch)).collect();
            for _ in 0..3 {
                let list: Vec<_> = actual.iter().map(|(g, e)| (g.as_str(), *e)).collect();
                for action in run(state, epoch, Some(WorkerHealth::Alive), &list.clone(), 2_000) {
                    match action {
                        Action::Release { worker, .. } => { actual.remove(worker.gpu_id.as_str()); }
                        Action::Raise { above } => { epoch = above + 1; actual.insert("g0".into(), epoch); }
                        Action::Resend => { actual.insert("g0".into(), epoch); }
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
            }
            let list: Vec<_> = actual.iter().map(|(g, e)| (g.as_str(), *e)).collect();
            prop_assert_eq!(run(state, epoch, Some(WorkerHealth::Alive), &list, 2_000), vec![]);
        }
    }
}
