//! Whether silence proves anything: what the dispatcher's own round trips say, and whether many fell silent at once.
//!
//! A round trip shares the connection that heartbeats come on, and its answer comes behind them. So whoever had not been
//! heard when an answered one began was silent until then: silence is measured up to that moment, and while nothing is
//! answered nobody gets any deader. A round trip that fails is worse: what was sent meanwhile may be lost or late, and
//! verdicts wait until the living have had the time to be heard again.

use std::time::Duration;

use crate::config::DispatcherConfig;

/// Three silent workers at once can be chance on a small fleet; with a fifth of the fleet it is the network.
const MASS_SILENCE_WORKERS: usize = 3;
const MASS_SILENCE_SHARE: usize = 5;

/// A question to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundTrip {
    /// When it was asked.
    pub began: Duration,
    /// Not answered: given up.
    pub answered: bool,
    /// How often the connection had been made by then.
    pub connects: u64,
}

/// Why verdicts wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    NoAnswer,
    LateAnswer,
    Reconnected,
    MassSilence,
}

impl Why {
    pub fn as_str(self) -> &'static str {
        match self {
            Why::NoAnswer => "the server does not answer the dispatcher",
            Why::LateAnswer => "the server has answered late, heartbeats may still come",
            Why::Reconnected => "the connection was made again, workers may still be connecting",
            Why::MassSilence => "many workers fell silent at once, it may be the network",
        }
    }
}

/// What is new about holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldNews {
    /// No end is known while the server does not answer.
    Held { why: Why, until: Option<Duration> },
    /// It had lasted since then.
    Over { since: Duration },
}

#[derive(Debug, Default)]
pub(super) struct Link {
    /// Who had not been heard by then was silent until then.
    proven: Duration,
    connects: Option<u64>,
    /// The first round trip of those that were not answered lately began then.
    failing: Option<Duration>,
    hold: Option<(Why, Duration)>,
    mass_silence_since: Option<Duration>,
    /// Many had fallen silent at once, lately enough to wait.
    mass_hold_until: Duration,
    /// What was told of the hold that lasts, and since when it does.
    told: Option<(Why, Duration)>,
}

impl Link {
    pub(super) fn round_trip(&mut self, trip: RoundTrip, now: Duration, config: &DispatcherConfig) {
        if !trip.answered {
            self.failing.get_or_insert(trip.began);
            return;
        }
        self.proven = self.proven.max(trip.began);
        let again = self.connects.replace(trip.connects).is_some_and(|before| before != trip.connects);
        let failing = self.failing.take();
        let dead_after = Duration::from_millis(config.dead_after_ms);
        // Workers on the same server have to find their way back as well, and nobody waits for another at that.
        let long = failing.is_some_and(|since| now.saturating_sub(since) >= dead_after);
        if again || long {
            self.hold(Why::Reconnected, now + dead_after);
        } else if failing.is_some() {
            // Nothing was lost: one period of heartbeats later everybody who lives has been heard.
            self.hold(Why::LateAnswer, now + Duration::from_millis(config.suspect_after_ms));
        }
    }

    /// `silent` of `all` incarnations are silent now. Remembers when that became many.
    pub(super) fn silent(&mut self, silent: usize, all: usize, now: Duration, config: &DispatcherConfig) {
        let mass = silent >= MASS_SILENCE_WORKERS && silent * MASS_SILENCE_SHARE > all;
        self.mass_silence_since = if mass { Some(self.mass_silence_since.unwrap_or(now)) } else { None };
        if let Some(since) = self.mass_silence_since {
            let until = since + Duration::from_millis(config.mass_silence_hold_ms);
            self.mass_hold_until = self.mass_hold_until.max(until);
        }
    }

    /// The hold that ends last counts.
    fn hold(&mut self, why: Why, until: Duration) {
        if self.hold.is_none_or(|(_, before)| before < until) {
            self.hold = Some((why, until));
        }
    }

    /// Why silence means nothing now, and until when, if it does not.
    pub(super) fn held(&self, now: Duration) -> Option<(Why, Option<Duration>)> {
        if self.failing.is_some() {
            return Some((Why::NoAnswer, None));
        }
        let mass = (Why::MassSilence, self.mass_hold_until);
        let last =
            self.hold.into_iter().chain([mass]).filter(|(_, until)| now < *until).max_by_key(|(_, until)| *until);
        last.map(|(why, until)| (why, Some(until)))
    }

    /// The dispatcher's own link is in doubt: nobody's silence means anything.
    pub(super) fn in_doubt(&self, now: Duration) -> bool {
        self.failing.is_some() || self.hold.is_some_and(|(_, until)| now < until)
    }

    /// How much longer than usual somebody has to be silent now: many who fell silent together wait, each once and not anew
    /// for everybody who comes and goes.
    pub(super) fn longer(&self, now: Duration, config: &DispatcherConfig) -> Duration {
        let wait = Duration::from_millis(config.mass_silence_hold_ms);
        if now < self.mass_hold_until { wait } else { Duration::ZERO }
    }

    /// How long somebody who was last heard at `heard` is known to have been silent.
    pub(super) fn proven_silence(&self, heard: Duration) -> Duration {
        self.proven.saturating_sub(heard)
    }

    /// What has changed about holds since the last call.
    pub(super) fn news(&mut self, now: Duration) -> Option<HoldNews> {
        match (self.held(now), self.told) {
            (None, None) => None,
            (None, Some((_, since))) => {
                self.told = None;
                Some(HoldNews::Over { since })
            }
            (Some((why, _)), Some((told, _))) if why == told => None,
            (Some((why, until)), told) => {
                self.told = Some((why, told.map_or(now, |(_, since)| since)));
                Some(HoldNews::Held { why, until })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn trip(began: u32, answered: bool) -> RoundTrip {
        RoundTrip { began: began * MS, answered, connects: 1 }
    }

    /// Asked and given up, or answered, at these times.
    fn link(trips: &[(u32, bool, u32)]) -> Link {
        let mut link = Link::default();
        for (began, answered, at) in trips {
            link.round_trip(trip(*began, *answered), *at * MS, &DispatcherConfig::default());
        }
        link
    }

    #[test]
    fn silence_counts_up_to_the_last_question_that_was_answered() {
        let link = link(&[(1_000, true, 1_001), (3_900, true, 4_200)]);
        assert_eq!(link.proven_silence(1_000 * MS), 2_900 * MS);
        assert_eq!(link.proven_silence(4_000 * MS), Duration::ZERO, "heard after it was asked");
        assert_eq!(link.held(4_200 * MS), None, "an answer within its time holds nothing up");
    }

    #[test]
    fn a_late_answer_holds_for_one_heartbeat_and_slow_ones_do_not_add_up() {
        let mut link = link(&[(1_000, true, 1_001), (2_000, false, 3_000)]);
        assert_eq!(link.held(60_000 * MS), Some((Why::NoAnswer, None)), "for as long as nothing is answered");
        link.round_trip(trip(3_000, true), 3_400 * MS, &DispatcherConfig::default());
        assert_eq!(link.held(3_400 * MS), Some((Why::LateAnswer, Some(4_900 * MS))));
        link.round_trip(trip(3_600, true), 4_400 * MS, &DispatcherConfig::default());
        assert_eq!(link.held(4_899 * MS), Some((Why::LateAnswer, Some(4_900 * MS))));
        assert_eq!(link.held(4_900 * MS), None);
    }

    #[test]
    fn after_a_long_outage_or_a_new_connection_workers_get_the_time_to_connect() {
        let mut link =
            link(&[(1_000, true, 1_001), (2_000, false, 3_000), (3_000, false, 4_000), (4_000, true, 5_000)]);
        assert_eq!(link.held(5_000 * MS), Some((Why::Reconnected, Some(8_000 * MS))));
        let config = DispatcherConfig::default();
        link.round_trip(RoundTrip { connects: 2, ..trip(20_000, true) }, 20_001 * MS, &config);
        assert_eq!(link.held(20_001 * MS), Some((Why::Reconnected, Some(23_001 * MS))));
        link.round_trip(RoundTrip { connects: 2, ..trip(21_000, true) }, 21_001 * MS, &config);
        assert_eq!(link.held(23_001 * MS), None, "once for each connection");
    }

    #[test]
    fn a_hold_is_told_once_with_each_reason_and_once_when_it_ends() {
        let mut link = link(&[(1_000, true, 1_001)]);
        assert_eq!(link.news(1_001 * MS), None);
        link.round_trip(trip(2_000, false), 3_000 * MS, &DispatcherConfig::default());
        assert_eq!(link.news(3_000 * MS), Some(HoldNews::Held { why: Why::NoAnswer, until: None }));
        assert_eq!(link.news(3_250 * MS), None);
        link.round_trip(trip(3_000, true), 3_500 * MS, &DispatcherConfig::default());
        let late = HoldNews::Held { why: Why::LateAnswer, until: Some(5_000 * MS) };
        assert_eq!(link.news(3_500 * MS), Some(late));
        assert_eq!(link.news(4_999 * MS), None);
        assert_eq!(link.news(5_000 * MS), Some(HoldNews::Over { since: 3_000 * MS }));
        assert_eq!(link.news(5_250 * MS), None);
    }
}
