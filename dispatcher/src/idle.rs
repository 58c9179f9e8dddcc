//! When a session gets a flush, and when its end. Pure; runs on the clock that stands while the stream is silent.
//!
//! Both entries are fenced by the session's last sequence, so whoever speaks in between wins and the machine starts over
//! when that entry is read.

use std::time::Duration;

/// What an entry means for the idle times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoke {
    /// Audio, with or without a flush or end on the same chunk.
    Audio { flushed: bool },
    /// An empty flush or end of a producer.
    Mark,
    /// A flush or end that the dispatcher wrote itself.
    Own { end: bool },
}

/// What is due now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    Nothing,
    Flush,
    End,
}

#[derive(Debug, Clone, Copy)]
pub struct Idle {
    /// When a producer's last entry was read, or the session was opened.
    spoke: Duration,
    /// There is audio that no flush or end follows.
    open_audio: bool,
    /// An end of the dispatcher's own follows the last audio, read at that time.
    own_end: Option<Duration>,
    /// A write is under way, or lost against somebody who spoke and has not been read yet.
    not_before: Duration,
}

impl Idle {
    pub fn new(now: Duration) -> Self {
        Self { spoke: now, open_audio: false, own_end: None, not_before: now }
    }

    pub fn entry(&mut self, spoke: Spoke, now: Duration) {
        match spoke {
            Spoke::Audio { flushed } => {
                *self = Self { spoke: now, open_audio: !flushed, own_end: None, not_before: now };
            }
            Spoke::Mark => {
                self.spoke = now;
                self.open_audio = false;
            }
            Spoke::Own { end } => {
                self.open_audio = false;
                if end {
                    self.own_end = Some(now);
                }
            }
        }
    }

    /// A write was started, or has failed: nothing before `until`.
    pub fn pause(&mut self, until: Duration) {
        self.not_before = until;
    }

    /// `end_missing`: no end final stands that covers all audio. An end entry alone proves nothing: the engine may have
    /// dropped it as a stale source's. `placed`: a worker has the session; without one a second end would only repeat the
    /// first.
    pub fn due(&self, now: Duration, flush_after: Duration, timeout: Duration, end_missing: bool, placed: bool) -> Due {
        if !end_missing || now < self.not_before {
            return Due::Nothing;
        }
        let since = self.own_end.map_or(self.spoke, |at| at.max(self.spoke));
        let silent = now.saturating_sub(since);
        if silent >= timeout && (self.own_end.is_none() || placed) {
            Due::End
        } else if self.open_audio && silent >= flush_after && flush_after < timeout {
            Due::Flush
        } else {
            Due::Nothing
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: Duration = Duration::from_secs(1);

    fn due(idle: &Idle, at: Duration) -> Due {
        idle.due(at, 2 * S, 60 * S, true, true)
    }

    #[test]
    fn one_flush_then_the_end() {
        let mut idle = Idle::new(Duration::ZERO);
        assert_eq!(due(&idle, 59 * S), Due::Nothing, "nothing to flush");
        idle.entry(Spoke::Audio { flushed: false }, 10 * S);
        assert_eq!(due(&idle, 11 * S), Due::Nothing);
        assert_eq!(due(&idle, 12 * S), Due::Flush);
        idle.entry(Spoke::Own { end: false }, 12 * S);
        assert_eq!(due(&idle, 14 * S), Due::Nothing, "once");
        assert_eq!(due(&idle, 70 * S), Due::End, "the own flush does not count as speaking");
        assert_eq!(idle.due(70 * S, 2 * S, 60 * S, false, true), Due::Nothing, "the end final stands");
    }

    #[test]
    fn whoever_speaks_starts_it_over() {
        let mut idle = Idle::new(Duration::ZERO);
        idle.entry(Spoke::Audio { flushed: false }, Duration::ZERO);
        idle.entry(Spoke::Audio { flushed: false }, S);
        assert_eq!(due(&idle, 2 * S), Due::Nothing);
        idle.entry(Spoke::Mark, 2 * S);
        assert_eq!(due(&idle, 10 * S), Due::Nothing, "a producer's flush is one");
        assert_eq!(due(&idle, 61 * S), Due::Nothing);
        assert_eq!(due(&idle, 62 * S), Due::End);
        idle.entry(Spoke::Audio { flushed: true }, 62 * S);
        assert_eq!(due(&idle, 65 * S), Due::Nothing);
    }

    #[test]
    fn a_lost_write_waits_for_the_entry_that_won() {
        let mut idle = Idle::new(Duration::ZERO);
        idle.entry(Spoke::Audio { flushed: false }, Duration::ZERO);
        idle.pause(5 * S);
        assert_eq!(due(&idle, 4 * S), Due::Nothing);
        assert_eq!(due(&idle, 5 * S), Due::Flush);
    }

    #[test]
    fn an_end_that_led_to_nothing_is_written_again() {
        let mut idle = Idle::new(Duration::ZERO);
        idle.entry(Spoke::Audio { flushed: true }, Duration::ZERO);
        idle.entry(Spoke::Own { end: true }, 60 * S);
        assert_eq!(due(&idle, 61 * S), Due::Nothing);
        assert_eq!(idle.due(120 * S, 2 * S, 60 * S, true, false), Due::Nothing, "nobody has it");
        assert_eq!(due(&idle, 120 * S), Due::End);
    }

    proptest! {
        #[test]
        fn nothing_is_due_before_its_time(gaps in prop::collection::vec(0u64..5_000, 1..50)) {
            let (mut idle, mut now) = (Idle::new(Duration::ZERO), Duration::ZERO);
            idle.entry(Spoke::Audio { flushed: false }, now);
            for gap in gaps {
                let later = now + Duration::from_millis(gap);
                let expected = if gap >= 2_000 { Due::Flush } else { Due::Nothing };
                prop_assert_eq!(due(&idle, later), expected);
                now = later;
                idle.entry(Spoke::Audio { flushed: false }, now);
            }
        }
    }
}
