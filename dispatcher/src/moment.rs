//! Time as the pure parts see it: passed in, never read.

use std::time::Duration;

/// One point in time on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Monotonic, since this dispatcher became active.
    pub mono: Duration,
    /// Unix time in ms: for records and events, and for what has to outlive a dispatcher (pauses, expiry, drains). A clock that
    /// is set delays these; what is decided about silence never uses it.
    pub unix_ms: u64,
}

impl Moment {
    pub fn since(self, earlier: Duration) -> Duration {
        self.mono.saturating_sub(earlier)
    }
}

/// Longest time that counts between two probes: a process that was stopped has not listened in between.
const MAX_STEP: Duration = Duration::from_secs(3);

/// The clock idle times run on: it stands still while the audio stream does not answer, because nobody could speak then.
#[derive(Debug, Clone, Copy, Default)]
pub struct StreamClock {
    elapsed: Duration,
    last: Option<Duration>,
    answered: bool,
}

impl StreamClock {
    /// Takes the outcome of a probe of the stream. Time counts only between two probes that were both answered.
    pub fn probe(&mut self, now: Duration, answered: bool) {
        if self.answered && answered {
            self.elapsed += now.saturating_sub(self.last.unwrap_or(now)).min(MAX_STEP);
        }
        self.last = Some(now);
        self.answered = answered;
    }

    /// Reading at `now`. Runs on after an answered probe, at most `grace` long, so that it does not move in steps.
    pub fn now(&self, now: Duration, grace: Duration) -> Duration {
        match self.last {
            Some(last) if self.answered => self.elapsed + now.saturating_sub(last).min(grace),
            _ => self.elapsed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn the_clock_stands_while_the_stream_is_silent() {
        let mut clock = StreamClock::default();
        clock.probe(S, true);
        assert_eq!(clock.now(S + S / 2, S), S / 2);
        clock.probe(2 * S, true);
        assert_eq!(clock.now(2 * S, S), S);
        clock.probe(3 * S, false);
        assert_eq!(clock.now(60 * S, S), S);
        clock.probe(60 * S, true);
        assert_eq!(clock.now(60 * S, S), S, "an outage does not count");
        clock.probe(61 * S, true);
        assert_eq!(clock.now(61 * S, S), 2 * S);
        assert_eq!(clock.now(90 * S, S), 3 * S, "nor does a probe that never comes back");
        clock.probe(90 * S, true);
        assert_eq!(clock.now(90 * S, S), 2 * S + MAX_STEP, "nor a process that stood still");
    }
}
