//! Revisions: what replaces the segments of a final that stands.
//!
//! They have a subject of their own, fenced like the chain, and count along it: of two workers that believe they own a
//! session, the one with the lower epoch finds the other's and lets go.

use std::collections::BTreeMap;

use async_nats::jetstream::message::PublishMessage;
use voxfleet_schema::{
    codec,
    id::{Kind, StreamId},
    transcript::{Final, MAX_FINAL_BYTES, Revision},
};

use super::chain::{Chain, ChainError};
use crate::{
    ServerError,
    raw::{self, Get},
    retry::Backoff,
    topology::names::TRANSCRIPT,
};

/// What [`Chain::revise`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revised {
    Stored,
    /// A higher epoch has revised: the chain is not ours any more.
    LetGo,
    /// No server would take it, even without its words; nothing was stored.
    TooLong,
}

impl Chain {
    /// The last revision of a chain and its sequence in the stream, from the leader.
    pub async fn last_revision(&self, kind: Kind, id: &StreamId) -> Result<Option<(u64, Revision)>, ChainError> {
        let subject = self.nats.subjects().revision(kind, id);
        self.read_revision(&Get { last_by_subj: Some(&subject), ..Get::default() }).await
    }

    async fn read_revision(&self, which: &Get<'_>) -> Result<Option<(u64, Revision)>, ChainError> {
        let Some(stored) = raw::leader_get(&self.nats, TRANSCRIPT, which).await? else { return Ok(None) };
        match codec::from_json(&stored.payload) {
            Ok(value) => Ok(Some((stored.seq, value))),
            Err(source) => Err(ChainError::Foreign { seq: stored.seq, source }),
        }
    }

    /// The first revision at or after `from_seq` of the stream, and its sequence, from the leader.
    pub async fn next_revision(
        &self,
        kind: Kind,
        id: &StreamId,
        from_seq: u64,
    ) -> Result<Option<(u64, Revision)>, ChainError> {
        let subject = self.nats.subjects().revision(kind, id);
        self.read_revision(&Get { seq: Some(from_seq.max(1)), next_by_subj: Some(&subject), ..Get::default() }).await
    }

    /// The revision at this sequence of the stream, which must be one.
    pub async fn revision_at(&self, seq: u64) -> Result<Option<Revision>, ChainError> {
        let found = self.read_revision(&Get { seq: Some(seq), ..Get::default() }).await?;
        Ok(found.map(|(_, revision)| revision))
    }

    /// Finals up to `last_seq` of the stream that promised their speakers, and that no revision answers for.
    pub async fn unanswered(&self, kind: Kind, id: &StreamId, last_seq: u64) -> Result<Vec<Final>, ChainError> {
        let mut late: BTreeMap<u64, Final> = BTreeMap::new();
        let mut from = 0;
        while let Some(found) = self.next_final(kind, id, from).await?.filter(|found| found.seq <= last_seq) {
            from = found.seq + 1;
            if found.value.speakers.as_ref().is_some_and(|speakers| speakers.late) {
                late.insert(found.value.index, found.value);
            }
        }
        from = 0;
        while !late.is_empty()
            && let Some((seq, revision)) = self.next_revision(kind, id, from).await?
        {
            from = seq + 1;
            late.remove(&revision.index);
        }
        Ok(late.into_values().collect())
    }

    /// Puts this behind the last revision of its chain, under the next number. Repeats until it is known what became of it; an
    /// error is what no repetition can change.
    pub async fn revise(&self, mut value: Revision) -> Result<Revised, ChainError> {
        let mut backoff = Backoff::default();
        loop {
            let tried = match self.last_revision(value.kind, &value.id).await {
                Ok(last) => {
                    if last.as_ref().is_some_and(|(_, last)| last.epoch > value.epoch) {
                        return Ok(Revised::LetGo);
                    }
                    if last.as_ref().is_some_and(|(_, last)| says_the_same(last, &value)) {
                        return Ok(Revised::Stored);
                    }
                    value.revision = last.as_ref().map_or(0, |(_, last)| last.revision) + 1;
                    self.attempt_revision(&value, last.map_or(0, |(seq, _)| seq)).await
                }
                Err(error) => Err(error),
            };
            match tried {
                Ok(()) => return Ok(Revised::Stored),
                // It may have been stored all the same: the next look tells.
                Err(ChainError::Conflict | ChainError::Server(ServerError::Timeout)) => {}
                Err(ChainError::Server(error)) if !matches!(error, ServerError::TooLarge | ServerError::Closed) => {
                    tracing::warn!(session = value.kind.session(&value.id), job = value.kind.job(&value.id), epoch = value.epoch, index = value.index, %error, "revision is not stored yet, trying again");
                }
                Err(error @ (ChainError::TooLarge { .. } | ChainError::Server(ServerError::TooLarge))) => {
                    tracing::error!(session = value.kind.session(&value.id), job = value.kind.job(&value.id), epoch = value.epoch, index = value.index, %error, "revision left out");
                    return Ok(Revised::TooLong);
                }
                Err(error) => return Err(error),
            }
            backoff.wait().await;
        }
    }

    async fn attempt_revision(&self, value: &Revision, after: u64) -> Result<(), ChainError> {
        let message = PublishMessage::build()
            .payload(encode(value)?.into())
            .headers(raw::traced(raw::json_headers(), self.trace.as_ref()))
            .expected_last_subject_sequence(after);
        raw::publish(&self.nats, self.nats.subjects().revision(value.kind, &value.id), message).await?;
        Ok(())
    }
}

/// But for the number, which is given when it is stored.
fn says_the_same(one: &Revision, other: &Revision) -> bool {
    let mut one = one.clone();
    one.revision = other.revision;
    one == *other || (one.words_omitted && one == fitted(other))
}

fn fitted(value: &Revision) -> Revision {
    let mut short = value.clone();
    short.fit(usize::MAX);
    short
}

/// JSON within the limit of finals, without words where they do not fit.
fn encode(value: &Revision) -> Result<Vec<u8>, ChainError> {
    let bytes = codec::to_json(value).map_err(ChainError::Encode)?;
    if bytes.len() <= MAX_FINAL_BYTES {
        return Ok(bytes);
    }
    let bytes = codec::to_json(&fitted(value)).map_err(ChainError::Encode)?;
    match bytes.len() {
        len if len > MAX_FINAL_BYTES => Err(ChainError::TooLarge { len, limit: MAX_FINAL_BYTES }),
        _ => Ok(bytes),
    }
}
