//! The producer state machine: what one session's log entries say about who speaks, and what is missing.
//!
//! Order is log order, always. `Asr-Seq` only detects, and counts only together with `Asr-Source`. The state is part of
//! every final's `resume`, so that a session that moves judges the next entry as the old owner would have.

use serde::{Deserialize, Serialize};

use crate::{audio::ChunkHeaders, id::SourceId};

/// How many sources of a session are remembered.
pub const MAX_SOURCES: usize = 16;
/// How many numbers below the highest can still be told apart as new or already taken.
pub const SEEN_WINDOW: u64 = 64;

/// A source that has spoken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub id: SourceId,
    /// It said `Asr-End` itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ended: bool,
}

/// State of the producers before an entry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SourceState {
    /// Oldest first; only the last one may speak.
    #[serde(default)]
    pub sources: Vec<Source>,
    /// Highest `Asr-Seq` taken from the newest source.
    #[serde(default)]
    pub asr_seq: Option<u64>,
    /// Bit `i` = number `asr_seq - i` was taken.
    #[serde(default)]
    pub asr_seen: u64,
    /// A chunk began with a container's mark: what follows is a slice of it, until a format or a new source is named.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub container: bool,
}

/// What to do with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Use(Note),
    /// The number was taken before, or lies below the window.
    DropDuplicate,
    DropStaleSource,
    /// Audio from a named source after its own `Asr-End`.
    DropAfterEnd,
}

/// What is worth an event although the entry is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    Plain,
    /// Numbers `from..to` are missing so far.
    Gap {
        from: u64,
        to: u64,
    },
    /// A number that was skipped before, used where it stands.
    Reordered {
        seq: u64,
    },
}

impl SourceState {
    /// Whether audio under these headers may reopen an ended session: everything may, except a named source that ended
    /// itself or has been replaced.
    pub fn may_reopen(&self, headers: &ChunkHeaders) -> bool {
        match headers.source.as_ref().and_then(|id| self.sources.iter().position(|s| s.id == *id)) {
            None => true,
            Some(at) => at + 1 == self.sources.len() && !self.sources[at].ended,
        }
    }

    /// Judges one entry and takes it into the state.
    pub fn judge(&mut self, headers: &ChunkHeaders, has_audio: bool) -> Verdict {
        let Some(id) = &headers.source else {
            return Verdict::Use(Note::Plain);
        };
        match self.sources.iter().position(|s| s.id == *id) {
            Some(at) if at + 1 < self.sources.len() => return Verdict::DropStaleSource,
            Some(at) if self.sources[at].ended && has_audio => return Verdict::DropAfterEnd,
            Some(_) => {}
            None => {
                if self.sources.len() == MAX_SOURCES {
                    self.sources.remove(0);
                }
                self.sources.push(Source { id: id.clone(), ended: false });
                self.asr_seq = None;
                self.asr_seen = 0;
                self.container = false;
            }
        }
        let note = match headers.seq {
            None => Note::Plain,
            Some(seq) => match self.take(seq) {
                Some(note) => note,
                None => return Verdict::DropDuplicate,
            },
        };
        if headers.end
            && let Some(newest) = self.sources.last_mut()
        {
            newest.ended = true;
        }
        Verdict::Use(note)
    }

    fn take(&mut self, seq: u64) -> Option<Note> {
        let Some(highest) = self.asr_seq else {
            (self.asr_seq, self.asr_seen) = (Some(seq), 1);
            return Some(if seq == 0 { Note::Plain } else { Note::Gap { from: 0, to: seq } });
        };
        if seq > highest {
            let step = seq - highest;
            self.asr_seen = if step < SEEN_WINDOW { self.asr_seen << step } else { 0 } | 1;
            self.asr_seq = Some(seq);
            return Some(if step == 1 { Note::Plain } else { Note::Gap { from: highest + 1, to: seq } });
        }
        let back = highest - seq;
        if back >= SEEN_WINDOW || self.asr_seen & (1 << back) != 0 {
            return None;
        }
        self.asr_seen |= 1 << back;
        Some(Note::Reordered { seq })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(source: &str, seq: u64) -> ChunkHeaders {
        ChunkHeaders { seq: Some(seq), source: SourceId::new(source).ok(), ..ChunkHeaders::default() }
    }

    #[test]
    fn numbers_detect_duplicates_gaps_and_late_ones() {
        let mut state = SourceState::default();
        let cases = [
            (0, Verdict::Use(Note::Plain)),
            (0, Verdict::DropDuplicate),
            (1, Verdict::Use(Note::Plain)),
            (4, Verdict::Use(Note::Gap { from: 2, to: 4 })),
            (3, Verdict::Use(Note::Reordered { seq: 3 })),
            (3, Verdict::DropDuplicate),
            (2, Verdict::Use(Note::Reordered { seq: 2 })),
            (200, Verdict::Use(Note::Gap { from: 5, to: 200 })),
            (136, Verdict::DropDuplicate),
            (137, Verdict::Use(Note::Reordered { seq: 137 })),
        ];
        for (seq, verdict) in cases {
            assert_eq!(state.judge(&chunk("a", seq), true), verdict, "number {seq}");
        }
    }

    #[test]
    fn a_source_that_starts_late_has_a_gap() {
        let mut state = SourceState::default();
        assert_eq!(state.judge(&chunk("a", 3), true), Verdict::Use(Note::Gap { from: 0, to: 3 }));
        assert_eq!(state.judge(&chunk("a", 1), true), Verdict::Use(Note::Reordered { seq: 1 }));
    }

    #[test]
    fn only_the_newest_source_speaks() {
        let mut state = SourceState::default();
        assert_eq!(state.judge(&chunk("a", 0), true), Verdict::Use(Note::Plain));
        assert_eq!(state.judge(&chunk("b", 0), true), Verdict::Use(Note::Plain));
        assert_eq!(state.judge(&chunk("a", 1), true), Verdict::DropStaleSource);
        assert_eq!(state.judge(&ChunkHeaders::default(), true), Verdict::Use(Note::Plain));
        assert_eq!(state.judge(&chunk("b", 1), true), Verdict::Use(Note::Plain));
        for n in 0..MAX_SOURCES {
            state.judge(&chunk(&format!("s{n}"), 0), true);
        }
        assert_eq!(state.sources.len(), MAX_SOURCES);
        assert_eq!(state.judge(&chunk("a", 2), true), Verdict::Use(Note::Gap { from: 0, to: 2 }), "forgotten: new");
    }

    #[test]
    fn audio_after_its_own_end_is_refused_and_after_a_foreign_end_is_not() {
        let mut state = SourceState::default();
        let mut end = chunk("a", 0);
        end.end = true;
        assert_eq!(state.judge(&end, true), Verdict::Use(Note::Plain));
        assert!(!state.may_reopen(&chunk("a", 1)));
        assert_eq!(state.judge(&chunk("a", 1), true), Verdict::DropAfterEnd);
        assert!(state.may_reopen(&chunk("b", 0)) && state.may_reopen(&ChunkHeaders::default()));

        let mut idle = SourceState::default();
        idle.judge(&chunk("a", 0), true);
        idle.judge(&ChunkHeaders { end: true, ..ChunkHeaders::default() }, false);
        assert!(idle.may_reopen(&chunk("a", 1)));
        assert_eq!(idle.judge(&chunk("a", 1), true), Verdict::Use(Note::Plain));
    }
}
