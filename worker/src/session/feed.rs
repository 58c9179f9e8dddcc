//! What to hand to the engine next: a hint, an entry of the log, or nothing yet. Pure; time and room are arguments.
//!
//! A hint is used only if it is known to follow what was fed last. Anything else costs a look at the log, never audio.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;
use voxfleet_schema::{
    SAMPLE_RATE_HZ,
    audio::{ASR_END, ASR_FORMAT, AudioFormat, RawEntry},
};

/// Without chunks, the log is looked at this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A hint was here and the log's answer was empty: a replica is behind.
const NOT_YET: Duration = Duration::from_millis(100);
/// After a log read that failed.
const READ_FAILED: Duration = Duration::from_millis(500);
/// An end entry usually leads to an end final, and what is fed behind it would be fed again at the next epoch. It does not
/// when its source is stale; then the session goes on after this.
const HOLD_AFTER_END: Duration = Duration::from_secs(1);
/// Hints remembered that could not be used, for the lag; more are counted together.
const MAX_KNOWN: usize = 256;

/// What to do with a hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HintVerdict {
    /// It follows what was fed last.
    Feed,
    /// Fed before, or before the session's start.
    Seen,
    /// Not now; the log has it.
    Later,
}

/// Entries in order, each with an amount.
#[derive(Debug, Default)]
struct Ledger(VecDeque<(u64, u64)>);

impl Ledger {
    fn add(&mut self, seq: u64, amount: u64) {
        if self.0.len() == MAX_KNOWN
            && let (Some(first), Some(second)) = (self.0.pop_front(), self.0.front_mut())
        {
            second.1 += first.1;
        }
        self.0.push_back((seq, amount));
    }

    fn drop_to(&mut self, seq: u64) {
        while self.0.front().is_some_and(|(first, _)| *first <= seq) {
            self.0.pop_front();
        }
    }

    fn sum(&self) -> u64 {
        self.0.iter().map(|(_, amount)| amount).sum()
    }
}

#[derive(Debug)]
pub(super) struct Feed {
    /// Last entry handed over; none before the first.
    last_fed: Option<u64>,
    /// Lowest sequence that may still be fed.
    next_from: u64,
    /// Entries known to stand in the log beyond that: sequence and bytes.
    known: Ledger,
    /// Audio handed over that no final covers.
    uncovered: Ledger,
    next_look: Instant,
    /// Nothing is fed before this.
    hold_until: Option<Instant>,
    /// Ends up to here have had their final: `to_seq` of a final with `end`.
    done_end: u64,
    format: AudioFormat,
}

impl Feed {
    /// `done_end` is the sequence of the last end that is done, 0 for none.
    pub(super) fn new(now: Instant, first_seq: u64, done_end: u64, format: AudioFormat) -> Self {
        Self {
            last_fed: None,
            next_from: first_seq,
            known: Ledger::default(),
            uncovered: Ledger::default(),
            next_look: now,
            hold_until: None,
            done_end,
            format,
        }
    }

    pub(super) fn last_fed(&self) -> Option<u64> {
        self.last_fed
    }

    pub(super) fn next_from(&self) -> u64 {
        self.next_from
    }

    /// Judges a hint; `room` = an entry of its length may be handed over now.
    pub(super) fn hint(&mut self, now: Instant, seq: u64, prev: Option<u64>, len: u64, room: bool) -> HintVerdict {
        if seq < self.next_from {
            return HintVerdict::Seen;
        }
        let follows = prev.is_some() && prev == self.last_fed;
        if follows && room && !self.is_held(now) {
            return HintVerdict::Feed;
        }
        if self.known.0.back().is_none_or(|(last, _)| *last < seq) {
            self.known.add(seq, len);
        }
        if !self.is_held(now) {
            self.next_look = self.next_look.min(now);
        }
        HintVerdict::Later
    }

    /// An entry is handed over (or about to be, and nothing comes between).
    pub(super) fn fed(&mut self, now: Instant, entry: &RawEntry) {
        self.last_fed = Some(entry.seq);
        self.next_from = entry.seq + 1;
        self.known.drop_to(entry.seq);
        if let Some(format) = header(entry, ASR_FORMAT).and_then(|text| text.parse().ok()) {
            self.format = format;
        }
        self.uncovered.add(entry.seq, self.ms_of(entry.payload.len() as u64));
        self.next_look = now + LOOK_EVERY;
        self.hold_until = None;
        let says_end = header(entry, ASR_END).is_some_and(|v| matches!(v.trim(), "1" | "true"));
        if says_end && entry.seq > self.done_end {
            self.hold_until = Some(now + HOLD_AFTER_END);
            self.next_look = now + HOLD_AFTER_END;
        } else if !self.known.0.is_empty() {
            self.next_look = now;
        }
    }

    /// The log was asked for the entry at or above [`Self::next_from`] as it was then. True: hand it over.
    pub(super) fn log_has(&mut self, now: Instant, found: Option<&RawEntry>) -> bool {
        match found {
            Some(entry) if entry.seq >= self.next_from => {
                self.fed(now, entry);
                if self.hold_until.is_none() {
                    self.next_look = now;
                }
                true
            }
            // A hint was faster.
            Some(_) => false,
            None => {
                self.next_look = now + if self.known.0.is_empty() { LOOK_EVERY } else { NOT_YET };
                false
            }
        }
    }

    /// There is an entry that could not be used now.
    pub(super) fn look_again(&mut self, now: Instant) {
        if !self.is_held(now) {
            self.next_look = now;
        }
    }

    pub(super) fn log_failed(&mut self, now: Instant) {
        self.next_look = now + READ_FAILED;
    }

    /// When the log should be looked at, if nothing comes before.
    pub(super) fn next_look(&self) -> Instant {
        self.next_look
    }

    fn is_held(&self, now: Instant) -> bool {
        self.hold_until.is_some_and(|until| now < until)
    }

    /// Audio known to stand in the log and not handed over, in ms.
    pub(super) fn unfed_ms(&self) -> u64 {
        self.ms_of(self.known.sum())
    }

    /// A final covers what was handed over up to `seq`.
    pub(super) fn covered(&mut self, seq: u64) {
        self.uncovered.drop_to(seq);
    }

    /// Audio handed over that no final covers, in ms. Never more than the `held` bytes that the engine still has: entries it
    /// did not use are covered by no final.
    pub(super) fn uncovered_ms(&self, held: u64) -> u64 {
        self.uncovered.sum().min(self.ms_of(held))
    }

    fn ms_of(&self, bytes: u64) -> u64 {
        let frames = bytes / self.format.frame_bytes().max(1) as u64;
        self.format.sample_of_frame(frames) * 1_000 / u64::from(SAMPLE_RATE_HZ)
    }
}

fn header<'a>(entry: &'a RawEntry, name: &str) -> Option<&'a str> {
    entry.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn entry(seq: u64, headers: &[(&str, &str)]) -> RawEntry {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        RawEntry { seq, headers, payload: Bytes::from_static(&[0; 3_200]) }
    }

    fn after(now: Instant, fed: &[u64]) -> Feed {
        let mut feed = Feed::new(now, 1, 0, AudioFormat::default());
        for seq in fed {
            assert!(feed.log_has(now, Some(&entry(*seq, &[]))));
        }
        feed
    }

    #[test]
    fn what_becomes_of_a_hint() {
        use HintVerdict::*;
        let now = Instant::now();
        let cases = [
            // fed, hint, its predecessor, room, verdict
            (&[][..], 5, None, true, Later),
            (&[], 5, Some(4), true, Later),
            (&[5], 5, Some(4), true, Seen),
            (&[5], 4, Some(3), true, Seen),
            (&[5], 9, Some(5), true, Feed),
            (&[5], 9, Some(5), false, Later),
            (&[5], 9, Some(7), true, Later),
            (&[5], 9, None, true, Later),
            (&[5, 7], 9, Some(5), true, Later),
        ];
        for (fed, seq, prev, room, verdict) in cases {
            let mut feed = after(now, fed);
            assert_eq!(feed.hint(now, seq, prev, 3_200, room), verdict, "{fed:?} {seq} {prev:?} {room}");
            if verdict == Later {
                assert!(feed.next_look() <= now, "the log is looked at at once");
            }
        }
    }

    #[test]
    fn the_log_is_looked_at_each_second_without_chunks() {
        let t0 = Instant::now();
        let at = |ms| t0 + Duration::from_millis(ms);
        let mut feed = Feed::new(t0, 3, 0, AudioFormat::default());
        assert_eq!((feed.next_look(), feed.next_from()), (t0, 3));
        assert!(!feed.log_has(t0, None));
        assert_eq!(feed.next_look(), at(1_000));
        assert!(feed.log_has(at(1_000), Some(&entry(8, &[]))));
        assert_eq!((feed.next_look(), feed.next_from()), (at(1_000), 9), "there may be more");
        assert!(!feed.log_has(at(1_001), None));
        assert_eq!(feed.hint(at(1_200), 9, Some(8), 3_200, true), HintVerdict::Feed);
        feed.fed(at(1_200), &entry(9, &[]));
        assert_eq!(feed.next_look(), at(2_200), "a chunk puts it off");
        feed.log_failed(at(2_200));
        assert_eq!(feed.next_look(), at(2_700));
    }

    #[test]
    fn a_hint_that_overtakes_the_log_read_is_fed_once() {
        let now = Instant::now();
        let mut feed = after(now, &[1]);
        assert_eq!(feed.hint(now, 2, Some(1), 3_200, true), HintVerdict::Feed);
        feed.fed(now, &entry(2, &[]));
        assert!(!feed.log_has(now, Some(&entry(2, &[]))), "the read that was under way");
        assert_eq!(feed.last_fed(), Some(2));
    }

    #[test]
    fn a_replica_that_is_behind_is_asked_again_soon() {
        let now = Instant::now();
        let mut feed = after(now, &[1]);
        assert_eq!(feed.hint(now, 9, Some(5), 3_200, true), HintVerdict::Later);
        assert!(!feed.log_has(now, None));
        assert_eq!(feed.next_look(), now + NOT_YET);
        assert_eq!(feed.unfed_ms(), 100);
        assert!(feed.log_has(now, Some(&entry(9, &[]))));
        assert_eq!(feed.unfed_ms(), 0);
    }

    #[test]
    fn an_end_entry_holds_what_follows_for_a_moment() {
        let t0 = Instant::now();
        let at = |ms| t0 + Duration::from_millis(ms);
        let end = [("Asr-End", "1")];
        let mut feed = Feed::new(t0, 1, 0, AudioFormat::default());
        assert!(feed.log_has(t0, Some(&entry(4, &end))));
        assert_eq!(feed.hint(t0, 5, Some(4), 3_200, true), HintVerdict::Later);
        assert_eq!(feed.next_look(), at(1_000), "its final is awaited");
        assert_eq!(feed.hint(at(1_000), 5, Some(4), 3_200, true), HintVerdict::Feed, "it was void");

        let mut reopened = Feed::new(t0, 1, 4, AudioFormat::default());
        assert!(reopened.log_has(t0, Some(&entry(4, &end))));
        assert_eq!(reopened.next_look(), t0, "an end that is done is passed over");
    }

    #[test]
    fn lag_follows_the_format() {
        let now = Instant::now();
        let mut feed = after(now, &[]);
        feed.log_has(now, Some(&entry(1, &[("Asr-Format", "pcm_f32le;rate=48000;channels=2")])));
        feed.hint(now, 3, Some(2), 384_000, true);
        assert_eq!(feed.unfed_ms(), 1_000);
        for seq in 4..1_000 {
            feed.hint(now, seq, Some(seq - 1), 384_000, true);
        }
        assert_eq!(feed.unfed_ms(), 997_000, "all are counted");
        assert!(feed.known.0.len() <= MAX_KNOWN);
    }

    #[test]
    fn what_no_final_covers_is_counted_while_the_engine_holds_it() {
        let now = Instant::now();
        let fed: Vec<u64> = (1..=600).collect();
        let mut feed = after(now, &fed);
        assert_eq!(feed.uncovered_ms(1 << 40), 60_000);
        assert!(feed.uncovered.0.len() <= MAX_KNOWN);
        assert_eq!(feed.uncovered_ms(32_000), 1_000, "the rest was not used");
        feed.covered(400);
        assert_eq!(feed.uncovered_ms(1 << 40), 20_000);
        feed.covered(600);
        assert_eq!(feed.uncovered_ms(1 << 40), 0);
    }
}
