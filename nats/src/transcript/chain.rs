//! The chain itself: last final, fenced publish, storing one until it is known what became of it; and checkpoints.

use async_nats::jetstream::message::PublishMessage;
use voxfleet_schema::{
    codec::{self, CodecError},
    id::{Kind, StreamId},
    trace::TraceContext,
    transcript::{Checkpoint, Final, MAX_FINAL_BYTES},
};

use super::storing::{Act, End, Heard, Link, Storing};
use crate::{
    Nats, ServerError,
    raw::{self, Get},
    retry::Backoff,
    topology::names::{CHECKPOINT, TRANSCRIPT},
};

#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The final is too long even without words.
    #[error("final of {len} bytes is over the limit of {limit}")]
    TooLarge { len: usize, limit: usize },
    #[error("cannot encode")]
    Encode(#[source] CodecError),
    /// What stands there is not what its subject says: somebody else writes to it.
    #[error("message {seq} of the chain cannot be read")]
    Foreign { seq: u64, source: CodecError },
    /// The expected predecessor is not the last final.
    #[error("the chain has moved on")]
    Conflict,
    #[error(transparent)]
    Server(ServerError),
}

impl From<ServerError> for ChainError {
    fn from(error: ServerError) -> Self {
        if error.is_conflict() { ChainError::Conflict } else { ChainError::Server(error) }
    }
}

/// A final as it stands in the chain.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredFinal {
    /// Sequence in `ASR_TRANSCRIPT`: what its successor must expect.
    pub seq: u64,
    pub value: Final,
}

/// The server's answer to one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    pub seq: u64,
    /// Its id was seen before: only the leader's last final tells what that means.
    pub duplicate: bool,
}

/// What [`Chain::store`] came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// My final is the last of the chain, at `seq`. `chain_lost`: the predecessor was gone and this one starts the chain
    /// anew; publish the event.
    Stored { seq: u64, chain_lost: bool },
    /// A higher epoch has written: stop working on this session.
    LetGo(Box<StoredFinal>),
    /// Another final stands there: go on from it and the log.
    Rebuild(Box<StoredFinal>),
}

/// The chain of one account.
#[derive(Debug, Clone)]
pub struct Chain {
    pub(super) nats: Nats,
    pub(super) trace: Option<TraceContext>,
}

impl Chain {
    pub fn new(nats: &Nats) -> Self {
        Self { nats: nats.clone(), trace: None }
    }

    /// The same; what is written carries this, for whoever reads it and goes on with the trace.
    pub fn traced(&self, trace: Option<TraceContext>) -> Self {
        Self { nats: self.nats.clone(), trace }
    }

    /// The last final, from the stream's leader. None: there is none.
    pub async fn last(&self, kind: Kind, id: &StreamId) -> Result<Option<StoredFinal>, ChainError> {
        let subject = self.nats.subjects().finals(kind, id);
        self.read(&Get { last_by_subj: Some(&subject), ..Get::default() }).await
    }

    /// The first final at or after `from_seq` of the stream, from its leader. None: there is no such final (yet). With the
    /// sequence behind the one found, the next call goes on: a whole chain is read without a consumer.
    pub async fn next_final(
        &self,
        kind: Kind,
        id: &StreamId,
        from_seq: u64,
    ) -> Result<Option<StoredFinal>, ChainError> {
        let subject = self.nats.subjects().finals(kind, id);
        self.read(&Get { seq: Some(from_seq.max(1)), next_by_subj: Some(&subject), ..Get::default() }).await
    }

    async fn read(&self, which: &Get<'_>) -> Result<Option<StoredFinal>, ChainError> {
        let Some(stored) = raw::leader_get(&self.nats, TRANSCRIPT, which).await? else { return Ok(None) };
        let value =
            codec::from_json(&stored.payload).map_err(|source| ChainError::Foreign { seq: stored.seq, source })?;
        Ok(Some(StoredFinal { seq: stored.seq, value }))
    }

    /// One attempt, fenced: `predecessor` is the sequence of the final before it (None: it is the first).
    pub async fn publish(&self, value: &Final, predecessor: Option<u64>) -> Result<Published, ChainError> {
        self.attempt(value, &encode(value)?, predecessor).await
    }

    async fn attempt(
        &self,
        value: &Final,
        bytes: &bytes::Bytes,
        predecessor: Option<u64>,
    ) -> Result<Published, ChainError> {
        let message = PublishMessage::build()
            .payload(bytes.clone())
            .headers(raw::traced(raw::json_headers(), self.trace.as_ref()))
            .message_id(&value.final_id)
            .expected_last_subject_sequence(predecessor.unwrap_or(0));
        let ack = raw::publish(&self.nats, self.nats.subjects().finals(value.kind, &value.id), message).await?;
        Ok(Published { seq: ack.sequence, duplicate: ack.duplicate })
    }

    /// Publishes until it is known what became of it, with the same bytes and id each time. Call it for one final of a
    /// session at a time. Returns an error only for what no repetition can change; drop the future to give up.
    pub async fn store(&self, value: &Final, predecessor: Option<u64>) -> Result<Outcome, ChainError> {
        let bytes = encode(value)?;
        let mut storing = Storing::new(value.final_id.as_str(), value.epoch, predecessor);
        let mut last: Option<StoredFinal> = None;
        let mut backoff = Backoff::default();
        loop {
            if storing.pauses() {
                backoff.wait().await;
            }
            match storing.next() {
                Act::Publish { expected } => {
                    storing.heard(self.tried(value, &bytes, expected).await?);
                }
                Act::Read => match self.last(value.kind, &value.id).await {
                    Ok(found) => {
                        last = found;
                        storing.heard(Heard::Found(last.as_ref().map(link)));
                        if last.is_none() && predecessor.is_some() {
                            tracing::warn!(
                                session = value.kind.session(&value.id),
                                job = value.kind.job(&value.id),
                                epoch = value.epoch,
                                index = value.index,
                                "the chain is gone, starting it anew"
                            );
                        }
                    }
                    Err(ChainError::Server(error)) if !matches!(error, ServerError::Closed) => {
                        self.lags(value, &error);
                        storing.heard(NOT_NOW);
                    }
                    Err(error) => return Err(error),
                },
                Act::Done(End::Stored { seq, chain_lost }) => return Ok(Outcome::Stored { seq, chain_lost }),
                Act::Done(End::LetGo) => return found(last, Outcome::LetGo),
                Act::Done(End::Rebuild) => return found(last, Outcome::Rebuild),
            }
        }
    }

    /// What came of one attempt, as far as repeating it may help.
    async fn tried(
        &self,
        value: &Final,
        bytes: &bytes::Bytes,
        expected: Option<u64>,
    ) -> Result<Heard<&'static str>, ChainError> {
        match self.attempt(value, bytes, expected).await {
            Ok(Published { seq, duplicate }) => Ok(Heard::Ack { seq, duplicate }),
            Err(ChainError::Conflict | ChainError::Server(ServerError::Timeout)) => Ok(Heard::Unclear),
            Err(ChainError::Server(error)) if !matches!(error, ServerError::TooLarge | ServerError::Closed) => {
                self.lags(value, &error);
                Ok(NOT_NOW)
            }
            Err(error) => Err(error),
        }
    }

    fn lags(&self, value: &Final, error: &ServerError) {
        tracing::warn!(session = value.kind.session(&value.id), job = value.kind.job(&value.id), epoch = value.epoch, index = value.index, %error, "final is not stored yet, trying again");
    }

    /// Writes a checkpoint and returns its sequence, for the final that goes with it.
    pub async fn checkpoint_put(&self, kind: Kind, id: &StreamId, value: &Checkpoint) -> Result<u64, ChainError> {
        let bytes = codec::to_msgpack(value).map_err(ChainError::Encode)?;
        let message = PublishMessage::build().payload(bytes.into()).headers(raw::msgpack_headers());
        Ok(raw::publish(&self.nats, self.nats.subjects().checkpoint(kind, id), message).await?.sequence)
    }

    /// The checkpoint at `seq`, from the leader. None: the leader says it is gone, or that `seq` is another session's.
    pub async fn checkpoint_get(&self, kind: Kind, id: &StreamId, seq: u64) -> Result<Option<Checkpoint>, ChainError> {
        let which = Get { seq: Some(seq), ..Get::default() };
        let Some(stored) = raw::leader_get(&self.nats, CHECKPOINT, &which).await? else { return Ok(None) };
        if stored.subject != self.nats.subjects().checkpoint(kind, id) {
            return Ok(None);
        }
        codec::from_msgpack(&stored.payload).map(Some).map_err(|source| ChainError::Foreign { seq, source })
    }
}

/// Ids are compared where they stand, so what is heard without one names a type all the same.
const NOT_NOW: Heard<&str> = Heard::NotNow;

fn link(stored: &StoredFinal) -> Link<&str> {
    Link { seq: stored.seq, final_id: &stored.value.final_id, epoch: stored.value.epoch }
}

/// The end that was decided from a final has that final.
fn found(last: Option<StoredFinal>, end: fn(Box<StoredFinal>) -> Outcome) -> Result<Outcome, ChainError> {
    last.map(|stored| end(Box::new(stored))).ok_or(ChainError::Conflict)
}

/// JSON within the limit, without words where they do not fit.
fn encode(value: &Final) -> Result<bytes::Bytes, ChainError> {
    let bytes = codec::to_json(value).map_err(ChainError::Encode)?;
    if bytes.len() <= MAX_FINAL_BYTES {
        return Ok(bytes.into());
    }
    let mut short = value.clone();
    short.fit(bytes.len());
    let bytes = codec::to_json(&short).map_err(ChainError::Encode)?;
    if bytes.len() > MAX_FINAL_BYTES {
        return Err(ChainError::TooLarge { len: bytes.len(), limit: MAX_FINAL_BYTES });
    }
    Ok(bytes.into())
}
