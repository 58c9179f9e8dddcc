//! Which decodes move. Pure; time is an argument.
//!
//! A decode that works looks at its cancel flag again and again. One that hangs does not, and others beside it must not hide
//! that: the child is silent then, as it is when it decodes nothing else, and its supervisor ends it in its own time.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// What runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sign {
    /// The decode of a window of a session's final.
    Final(u64, usize),
    Partial(u64),
    /// Somebody listens to the speakers of one that has been said.
    Speakers(u64, u64),
}

/// So long a decode may go without a look, far less than a supervisor waits: a step of the encoder on a slow machine.
const STILL: Duration = Duration::from_secs(1);

/// Looks of each decode that runs, and since when there are so many.
#[derive(Debug, Default)]
pub(super) struct Signs(HashMap<Sign, (u64, Instant)>);

impl Signs {
    /// Takes in how often each of those that run has looked. Whether all of them move.
    pub(super) fn all_move(&mut self, now: Instant, running: impl Iterator<Item = (Sign, u64)>) -> bool {
        let before = std::mem::take(&mut self.0);
        self.0.extend(running.map(|(decode, looks)| {
            let since = before.get(&decode).filter(|(then, _)| *then == looks).map_or(now, |(_, since)| *since);
            (decode, (looks, since))
        }));
        self.0.values().all(|(_, since)| now.saturating_duration_since(*since) < STILL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_hangs_is_not_hidden_by_those_that_move() {
        let begin = Instant::now();
        let mut signs = Signs::default();
        let mut look =
            |ms, running: &[(Sign, u64)]| signs.all_move(begin + Duration::from_millis(ms), running.iter().copied());
        let (hangs, moves) = (Sign::Final(1, 0), Sign::Final(1, 1));
        assert!(look(0, &[(hangs, 3), (moves, 1)]));
        assert!(look(999, &[(hangs, 3), (moves, 40)]));
        assert!(!look(1_000, &[(hangs, 3), (moves, 41)]));
        // Others come and go.
        assert!(!look(5_000, &[(hangs, 3), (Sign::Speakers(3, 4), 0)]));
        // It was slow, and looks again; then it is over.
        assert!(look(5_100, &[(hangs, 4), (Sign::Speakers(3, 4), 1)]));
        assert!(look(9_000, &[]));
        // A new one of the same session begins anew.
        assert!(look(9_100, &[(hangs, 4)]));
    }
}
