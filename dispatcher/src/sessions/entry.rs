//! What an entry of a known session means to the dispatcher: the worker's engine judges the rest.

use voxfleet_schema::audio::{ASR_CAUSE, ASR_END, ASR_FLUSH, ASR_SOURCE, RawEntry};

use crate::idle::Spoke;

/// A cheap reading of an entry: this runs for every chunk of every session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryNote {
    pub seq: u64,
    pub audio: bool,
    pub end: bool,
    pub flush: bool,
    /// The dispatcher wrote it.
    pub own: bool,
    pub sourced: bool,
}

impl EntryNote {
    pub fn of(entry: &RawEntry) -> Self {
        let mut note = Self {
            seq: entry.seq,
            audio: !entry.payload.is_empty(),
            end: false,
            flush: false,
            own: false,
            sourced: false,
        };
        for (name, value) in &entry.headers {
            let set = || matches!(value.trim(), "1" | "true");
            if name.eq_ignore_ascii_case(ASR_END) {
                note.end = set();
            } else if name.eq_ignore_ascii_case(ASR_FLUSH) {
                note.flush = set();
            } else if name.eq_ignore_ascii_case(ASR_CAUSE) {
                note.own = true;
            } else if name.eq_ignore_ascii_case(ASR_SOURCE) {
                note.sourced = true;
            }
        }
        note.own &= !note.audio;
        note
    }

    /// None: an empty chunk that says nothing.
    pub fn spoke(self) -> Option<Spoke> {
        if self.audio {
            Some(Spoke::Audio { flushed: self.end || self.flush })
        } else if self.own {
            Some(Spoke::Own { end: self.end })
        } else {
            (self.end || self.flush).then_some(Spoke::Mark)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spoke(headers: &[(&str, &str)], payload: &'static [u8]) -> Option<Spoke> {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        EntryNote::of(&RawEntry { seq: 1, headers, payload: payload.into() }).spoke()
    }

    #[test]
    fn entries_are_read_by_their_flags() {
        assert_eq!(spoke(&[], b"ab"), Some(Spoke::Audio { flushed: false }));
        assert_eq!(spoke(&[("asr-end", "1")], b"ab"), Some(Spoke::Audio { flushed: true }));
        assert_eq!(spoke(&[("Asr-Flush", "1")], b""), Some(Spoke::Mark));
        assert_eq!(spoke(&[("Asr-Flush", "1"), ("Asr-Cause", "pause")], b""), Some(Spoke::Own { end: false }));
        assert_eq!(spoke(&[("Asr-End", "1"), ("Asr-Cause", "idle")], b""), Some(Spoke::Own { end: true }));
        assert_eq!(spoke(&[("Asr-Cause", "x")], b"ab"), Some(Spoke::Audio { flushed: false }), "audio is a producer's");
        assert_eq!(spoke(&[("Asr-End", "0")], b""), None);
    }
}
