//! Dead letters: what `ASR_DEAD` keeps of what could not be done, read and removed. [`crate::publish::Publisher::dead`]
//! writes them.
//!
//! Everything is read from the stream's leader, message by message: letters are few, and who reads them is a person who
//! wants to see the one that was just written.

use bytes::Bytes;
use voxfleet_schema::{
    codec::{self, CodecError},
    dead::DeadLetter,
    id::{Kind, StreamId},
};

use crate::{
    Nats, ServerError,
    raw::{self, Get, Stored},
    subjects::Subject,
    topology::names::DEAD,
};

/// One message of `ASR_DEAD`.
#[derive(Debug)]
pub struct StoredLetter {
    /// Sequence in `ASR_DEAD`.
    pub seq: u64,
    /// Unix time in ms at which it was stored.
    pub stored_ms: u64,
    pub kind: Kind,
    pub id: StreamId,
    /// Whoever may publish there may write what is no letter.
    pub letter: Result<DeadLetter, CodecError>,
    pub payload: Bytes,
}

/// Letters read in one go before the stream is asked where it ends.
const BLOCK: u64 = 64;

/// The dead letters of one account.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    nats: Nats,
}

impl DeadLetters {
    pub fn new(nats: &Nats) -> Self {
        Self { nats: nats.clone() }
    }

    /// The newest letters, newest first, at most `limit`; and how many messages the stream holds in all.
    pub async fn list(&self, limit: usize) -> Result<(Vec<StoredLetter>, u64), ServerError> {
        let info = raw::stream_info(&self.nats, DEAD).await?;
        let (first, last) = (info.state.first_sequence.max(1), info.state.last_sequence);
        let filter = self.nats.subjects().dead_all();
        let mut letters = Vec::new();
        let mut blocks = Blocks::new(first, last);
        while letters.len() < limit
            && let Some((from, to)) = blocks.next()
        {
            let mut block = self.read(&filter, from, to).await?;
            block.reverse();
            letters.extend(block);
        }
        letters.truncate(limit);
        Ok((letters, info.state.messages))
    }

    /// Every letter of one session or job, newest first: a session has one for each of its windows that was set aside.
    pub async fn of(&self, kind: Kind, id: &StreamId) -> Result<Vec<StoredLetter>, ServerError> {
        let mut letters = self.read(&self.nats.subjects().dead(kind, id), 1, u64::MAX).await?;
        letters.reverse();
        Ok(letters)
    }

    /// The letter with this number. None: it is not there any more.
    pub async fn at(&self, seq: u64) -> Result<Option<StoredLetter>, ServerError> {
        if seq == 0 {
            // The server takes it for a request without a number.
            return Ok(None);
        }
        let which = Get { seq: Some(seq), ..Get::default() };
        Ok(raw::leader_get(&self.nats, DEAD, &which).await?.and_then(|stored| self.letter(stored)))
    }

    /// Whether there is any.
    pub async fn any_of(&self, kind: Kind, id: &StreamId) -> Result<bool, ServerError> {
        let filter = self.nats.subjects().dead(kind, id);
        let first = Get { seq: Some(1), next_by_subj: Some(&filter), ..Get::default() };
        Ok(raw::leader_get(&self.nats, DEAD, &first).await?.is_some())
    }

    /// Puts one away for good. False: it was not there.
    pub async fn remove(&self, seq: u64) -> Result<bool, ServerError> {
        raw::delete(&self.nats, DEAD, seq).await
    }

    /// Puts away the letters of one session or job; returns how many there were.
    pub async fn remove_of(&self, kind: Kind, id: &StreamId) -> Result<u64, ServerError> {
        raw::purge_counted(&self.nats, DEAD, &self.nats.subjects().dead(kind, id), None).await
    }

    /// What stands on `filter` from `from` up to `to`, oldest first.
    async fn read(&self, filter: &str, from: u64, to: u64) -> Result<Vec<StoredLetter>, ServerError> {
        let mut letters = Vec::new();
        let mut next = from;
        loop {
            let which = Get { seq: Some(next), next_by_subj: Some(filter), ..Get::default() };
            let Some(stored) = raw::leader_get(&self.nats, DEAD, &which).await? else { return Ok(letters) };
            if stored.seq > to {
                return Ok(letters);
            }
            next = stored.seq + 1;
            letters.extend(self.letter(stored));
        }
    }

    /// None where its subject names nothing that can be.
    fn letter(&self, stored: Stored) -> Option<StoredLetter> {
        let Stored { seq, subject, stored_ms, payload, .. } = stored;
        let Some(Subject::Dead { kind, id }) = self.nats.subjects().parse(&subject) else { return None };
        Some(StoredLetter { seq, stored_ms, kind, id, letter: codec::from_json(&payload), payload })
    }
}

/// Ranges of sequences from the newest to the oldest, each twice as long as the one before: most numbers are taken, and
/// where many are not, few ranges are asked for all the same.
struct Blocks {
    first: u64,
    /// End of the next range.
    to: u64,
    len: u64,
}

impl Blocks {
    fn new(first: u64, last: u64) -> Self {
        Self { first, to: last, len: BLOCK }
    }
}

impl Iterator for Blocks {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<Self::Item> {
        if self.to < self.first {
            return None;
        }
        let from = self.to.saturating_sub(self.len - 1).max(self.first);
        let block = (from, self.to);
        self.to = from - 1;
        self.len *= 2;
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_everything_once_from_the_newest_on() {
        for (first, last) in [(1, 0), (1, 1), (1, 64), (1, 65), (7, 1_000), (500, 501)] {
            let mut want = last;
            for (from, to) in Blocks::new(first, last) {
                assert_eq!(to, want, "{first} to {last}");
                assert!(from <= to && from >= first);
                want = from - 1;
            }
            assert_eq!(want, last.min(first - 1), "{first} to {last}");
        }
    }
}
