//! Revisions: what replaces the segments of a final that stands.
//!
//! They have a subject of their own, fenced like the chain, and count along it: of two workers that believe they own a
//! session, the one with the lower epoch finds the other's and lets go.

use async_nats::jetstream::message::PublishMessage;
use voxfleet_schema::{
    codec,
    id::{Kind, StreamId},
    transcript::{MAX_FINAL_BYTES, Revision},
};

use super::chain::{Chain, ChainError};
use crate::{
    ServerError,
    raw::{self, Get},
    retry::Backoff,
    topology::names::TRANSCRIPT,
};

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

    /// Puts this behind the last revision of its chain, under the next number, and says whether the chain is still ours: not when a
    /// higher epoch has revised. Repeats until that is known; an error is what no repetition can change.
    pub async fn revise(&self, mut value: Revision) -> Result<bool, ChainError> {
        let mut backoff = Backoff::default();
        loop {
            let tried = match self.last_revision(value.kind, &value.id).await {
                Ok(last) => {
                    if last.as_ref().is_some_and(|(_, last)| last.epoch > value.epoch) {
                        return Ok(false);
                    }
                    if last.as_ref().is_some_and(|(_, last)| says_the_same(last, &value)) {
                        return Ok(true);
                    }
                    value.revision = last.as_ref().map_or(0, |(_, last)| last.revision) + 1;
                    self.attempt_revision(&value, last.map_or(0, |(seq, _)| seq)).await
                }
                Err(error) => Err(error),
            };
            match tried {
                Ok(()) => return Ok(true),
                // It may have been stored all the same: the next look tells.
                Err(ChainError::Conflict | ChainError::Server(ServerError::Timeout)) => {}
                Err(ChainError::Server(error)) if !matches!(error, ServerError::TooLarge | ServerError::Closed) => {
                    tracing::warn!(id = %value.id, index = value.index, %error, "revision is not stored yet, trying again");
                }
                Err(error @ (ChainError::TooLarge { .. } | ChainError::Server(ServerError::TooLarge))) => {
                    // What stands is worth more than what would be told of its speakers.
                    tracing::error!(id = %value.id, index = value.index, %error, "revision left out");
                    return Ok(true);
                }
                Err(error) => return Err(error),
            }
            backoff.wait().await;
        }
    }

    async fn attempt_revision(&self, value: &Revision, after: u64) -> Result<(), ChainError> {
        let message = PublishMessage::build()
            .payload(encode(value)?.into())
            .headers(raw::json_headers())
            .expected_last_subject_sequence(after);
        raw::publish(&self.nats, self.nats.subjects().revision(value.kind, &value.id), message).await?;
        Ok(())
    }
}

/// But for the number, which is given when it is stored.
fn says_the_same(one: &Revision, other: &Revision) -> bool {
    let mut one = one.clone();
    one.revision = other.revision;
    one == *other
}

/// JSON within the limit of finals, without words where they do not fit.
fn encode(value: &Revision) -> Result<Vec<u8>, ChainError> {
    let bytes = codec::to_json(value).map_err(ChainError::Encode)?;
    if bytes.len() <= MAX_FINAL_BYTES {
        return Ok(bytes);
    }
    let mut short = value.clone();
    short.segments.iter_mut().for_each(|segment| segment.words.clear());
    let bytes = codec::to_json(&short).map_err(ChainError::Encode)?;
    match bytes.len() {
        len if len > MAX_FINAL_BYTES => Err(ChainError::TooLarge { len, limit: MAX_FINAL_BYTES }),
        _ => Ok(bytes),
    }
}
