//! The engine that a session or job keeps, where its policy lets nothing differ. Pure.
//!
//! Finals name the engine that heard them, and those that cover nothing name none. Of a chain a successor reads the last final
//! alone: what the finals before it named stands in the key.

use std::time::Duration;

use voxfleet_schema::{fleet::EngineName, session::Policy};

/// A bucket that is full refuses at once, each time, and nothing else of a session is written meanwhile.
const WRITE_AGAIN: Duration = Duration::from_secs(60);

/// What is known of it, under every policy: options may change where a chain goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeptEngine {
    engine: Option<EngineName>,
    /// Monotonic time at which it was last to be written into the key.
    tried: Option<Duration>,
}

impl KeptEngine {
    /// As a key says it.
    pub fn of_key(engine: Option<&str>) -> Self {
        Self { engine: engine.and_then(EngineName::of), tried: None }
    }

    /// A later final than those that are known: one that names none changes nothing.
    pub fn named(&mut self, engine: Option<EngineName>) {
        self.engine = engine.or(self.engine);
    }

    /// Somebody else knows this: what its own finals have named comes first.
    pub fn learn(&mut self, engine: Option<EngineName>) {
        self.engine = self.engine.or(engine);
    }

    pub fn known(self) -> Option<EngineName> {
        self.engine
    }

    /// The one it may not leave.
    pub fn under(self, policy: Policy) -> Option<EngineName> {
        self.engine.filter(|_| policy == Policy::ExactModel)
    }

    /// What the key is to say, where `stands` is there. The name of an engine that only a newer version knows stays.
    pub fn for_key(self, policy: Policy, stands: Option<&str>) -> Option<&str> {
        let known = self.engine.map(EngineName::as_str);
        known.or(stands).filter(|_| policy == Policy::ExactModel)
    }

    /// The key says something else, and may be written now.
    pub fn is_due(self, policy: Policy, stands: Option<&str>, now: Duration) -> bool {
        let waits = self.tried.is_some_and(|at| now.saturating_sub(at) < WRITE_AGAIN);
        !waits && self.for_key(policy, stands) != stands
    }

    pub fn tries(&mut self, now: Duration) {
        self.tried = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use EngineName::{Ct2, WhisperCpp};
    use Policy::{AllowCpu, ExactModel};

    #[test]
    fn a_final_that_names_an_engine_counts_and_one_that_names_none_changes_nothing() {
        let mut kept = KeptEngine::default();
        for (named, then) in
            [(None, None), (Some(Ct2), Some(Ct2)), (None, Some(Ct2)), (Some(WhisperCpp), Some(WhisperCpp))]
        {
            kept.named(named);
            assert_eq!((kept.known(), kept.under(ExactModel), kept.under(AllowCpu)), (then, then, None));
        }
        kept.learn(Some(Ct2));
        assert_eq!(kept.known(), Some(WhisperCpp), "its own finals come first");
        let mut silent = KeptEngine::default();
        silent.learn(Some(Ct2));
        assert_eq!(silent.known(), Some(Ct2));
    }

    #[test]
    fn a_key_says_what_is_known_where_nothing_may_differ() {
        let known = KeptEngine::of_key(Some("ct2"));
        let unknown = KeptEngine::of_key(Some("of_tomorrow"));
        assert_eq!((known.known(), unknown.known(), KeptEngine::of_key(None).known()), (Some(Ct2), None, None));
        for (kept, policy, stands, says) in [
            (known, ExactModel, None, Some("ct2")),
            (known, ExactModel, Some("whisper_cpp"), Some("ct2")),
            (known, AllowCpu, None, None),
            (known, AllowCpu, Some("ct2"), None),
            (unknown, ExactModel, None, None),
            (unknown, ExactModel, Some("of_tomorrow"), Some("of_tomorrow")),
        ] {
            assert_eq!(kept.for_key(policy, stands), says, "{kept:?} {policy:?} {stands:?}");
            assert_eq!(kept.is_due(policy, stands, Duration::ZERO), stands != says, "{kept:?} {policy:?} {stands:?}");
        }
    }

    #[test]
    fn a_key_that_could_not_be_written_is_left_alone_for_a_while() {
        let mut kept = KeptEngine::of_key(Some("ct2"));
        let begin = Duration::from_secs(10);
        kept.tries(begin);
        for now in [begin, begin + WRITE_AGAIN - Duration::from_millis(1)] {
            assert!(!kept.is_due(ExactModel, None, now), "{now:?}");
        }
        assert!(kept.is_due(ExactModel, None, begin + WRITE_AGAIN));
        assert!(!kept.is_due(ExactModel, Some("ct2"), begin + WRITE_AGAIN), "it was written");
    }
}
