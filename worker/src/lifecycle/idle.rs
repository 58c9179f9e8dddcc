//! When an engine that nobody needs ends, so that nothing of ours is left on its device. Pure; time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// After the last one so long, where it is to go as soon as it is not needed: whoever only changes its epoch, its model or its
/// device is back before, and what was loaded stays loaded for it.
const SWAP_AFTER: Duration = Duration::from_secs(1);

/// When the engine goes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Terms {
    /// Without work for so long; none = never.
    pub(super) after: Option<Duration>,
    /// As soon as the last one has gone for good.
    pub(super) swap: bool,
}

/// Who is here.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Open {
    /// Sessions and jobs in the engine.
    pub(super) inside: usize,
    /// Those who wait for it, and loads ahead: they may use nothing of it in the end.
    pub(super) waiting: usize,
}

impl Open {
    pub(super) fn is_empty(self) -> bool {
        self.inside == 0 && self.waiting == 0
    }
}

/// What an engine's rest means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// It works, or somebody is there whose audio may come.
    None,
    Until(Option<Instant>),
    /// Half of its time is over, said once.
    Half(Instant),
    Over,
}

/// One child's rest.
#[derive(Debug)]
pub(super) struct Idle {
    terms: Terms,
    since: Option<Instant>,
    /// Somebody was in it.
    used: bool,
    half_told: bool,
}

impl Idle {
    pub(super) fn new(terms: Terms) -> Self {
        Self { terms, since: None, used: false, half_told: false }
    }

    /// A child starts.
    pub(super) fn begins(&mut self) {
        *self = Self::new(self.terms);
    }

    /// `busy`: something is loaded or decoded for nobody.
    pub(super) fn look(&mut self, now: Instant, open: Open, busy: bool) -> Rest {
        self.used |= open.inside > 0;
        if !open.is_empty() || busy {
            (self.since, self.half_told) = (None, false);
            return Rest::None;
        }
        let since = *self.since.get_or_insert(now);
        // What was loaded ahead waits for its first use as long as any other.
        let after = if self.terms.swap && self.used { Some(SWAP_AFTER) } else { self.terms.after };
        let Some(after) = after else { return Rest::Until(None) };
        let end = since + after;
        if now >= end {
            Rest::Over
        } else if now < since + after / 2 {
            Rest::Until(Some(since + after / 2))
        } else if std::mem::replace(&mut self.half_told, true) {
            Rest::Until(Some(end))
        } else {
            Rest::Half(end)
        }
    }

    /// Something was asked of it that has not shown yet.
    pub(super) fn stirred(&mut self) {
        (self.since, self.half_told) = (None, false);
    }

    /// How long it has been without work.
    pub(super) fn for_how_long(&self, now: Instant) -> Option<Duration> {
        self.since.map(|since| now.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(10);
    const NOBODY: Open = Open { inside: 0, waiting: 0 };
    const INSIDE: Open = Open { inside: 1, waiting: 0 };
    const WAITING: Open = Open { inside: 0, waiting: 1 };

    #[test]
    fn it_rests_from_the_moment_the_last_one_goes() {
        let t0 = Instant::now();
        let at = |s| t0 + Duration::from_secs(s);
        let mut idle = Idle::new(Terms { after: Some(AFTER), swap: false });
        assert_eq!(idle.look(at(0), INSIDE, false), Rest::None);
        assert_eq!(idle.look(at(50), NOBODY, true), Rest::None, "a load for nobody");
        assert_eq!(
            (idle.look(at(60), NOBODY, false), idle.for_how_long(at(63))),
            (Rest::Until(Some(at(65))), Some(Duration::from_secs(3)))
        );
        assert_eq!(idle.look(at(66), NOBODY, false), Rest::Half(at(70)));
        assert_eq!(idle.look(at(67), NOBODY, false), Rest::Until(Some(at(70))), "said once");
        assert_eq!(idle.look(at(69), INSIDE, false), Rest::None);
        assert_eq!(idle.for_how_long(at(69)), None);
        assert_eq!(idle.look(at(70), NOBODY, false), Rest::Until(Some(at(75))), "from the beginning");
        idle.stirred();
        assert_eq!(idle.look(at(79), NOBODY, false), Rest::Until(Some(at(84))));
        assert_eq!(idle.look(at(89), NOBODY, false), Rest::Over);
    }

    #[test]
    fn without_a_time_it_stays() {
        let now = Instant::now();
        let mut idle = Idle::new(Terms { after: None, swap: false });
        assert_eq!(idle.look(now, NOBODY, false), Rest::Until(None));
        assert_eq!(idle.look(now + Duration::from_secs(1 << 20), NOBODY, false), Rest::Until(None));
    }

    #[test]
    fn swapped_out_soon_after_its_last_use_but_not_before_the_first() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut idle = Idle::new(Terms { after: Some(AFTER), swap: true });
        assert_eq!(idle.look(now, WAITING, false), Rest::None, "to be loaded ahead");
        assert_eq!(idle.look(now, NOBODY, false), Rest::Until(Some(now + AFTER / 2)), "loaded ahead");
        assert_eq!(idle.look(now, INSIDE, false), Rest::None);
        assert_eq!(idle.look(now, NOBODY, true), Rest::None, "its last decode is being cancelled");
        assert_eq!(idle.look(now, NOBODY, false), Rest::Until(Some(at(500))), "it may be back at once");
        assert_eq!(idle.look(at(60), WAITING, false), Rest::None, "it is");
        assert_eq!(idle.look(at(70), INSIDE, false), Rest::None);
        assert_eq!(idle.look(at(100), NOBODY, false), Rest::Until(Some(at(600))));
        assert_eq!(idle.look(at(1_099), NOBODY, false), Rest::Half(at(1_100)));
        assert_eq!(idle.look(at(1_100), NOBODY, false), Rest::Over);
    }
}
