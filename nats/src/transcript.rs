//! The chain of finals, its checkpoints, and readers of what workers publish.
//!
//! Each final is published with the stream sequence of its predecessor as a fence, so of two workers that believe they own
//! a session one wins each link. Everything else follows from reading the chain's last final from the stream's leader and
//! comparing: [`after_conflict`] is that comparison.

use std::marker::PhantomData;

use async_nats::jetstream::message::PublishMessage;
use serde::de::DeserializeOwned;
use voxfleet_schema::{
    codec::{self, CodecError},
    event::Event,
    id::{Kind, StreamId},
    transcript::{Checkpoint, Final, MAX_FINAL_BYTES, Partial, Revision},
};

use crate::{
    Nats, ServerError,
    feed::Feed,
    raw::{self, Get},
    retry::Backoff,
    subjects::Subject,
    topology::names::{CHECKPOINT, EVENT, PARTIAL, TRANSCRIPT},
};
pub use crate::{feed::Start, subjects::Filter};

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

/// What the leader's last final means to the author of one that may or may not have been stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is mine.
    Stored { seq: u64 },
    /// My predecessor: mine was not stored, so the same bytes again.
    RetrySame,
    /// Of a higher epoch: somebody owns the session now.
    LetGo,
    /// Another author's, or another computation of mine.
    Rebuild,
    /// Nothing, although I hold a predecessor: purged or expired. The same bytes, expecting nothing.
    ChainLost,
}

/// The few fields of a final the decision needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link<'a> {
    pub seq: u64,
    pub final_id: &'a str,
    pub epoch: u64,
}

/// Decides from what the leader holds as last final (`found`). `predecessor` is the sequence this attempt expected.
pub fn after_conflict(my_id: &str, my_epoch: u64, predecessor: Option<u64>, found: Option<Link<'_>>) -> Verdict {
    match (found, predecessor) {
        (None, Some(_)) => Verdict::ChainLost,
        (None, None) => Verdict::RetrySame,
        (Some(link), _) if link.final_id == my_id => Verdict::Stored { seq: link.seq },
        (Some(link), Some(seq)) if link.seq == seq => Verdict::RetrySame,
        (Some(link), _) if link.epoch > my_epoch => Verdict::LetGo,
        (Some(_), _) => Verdict::Rebuild,
    }
}

/// The chain of one account.
#[derive(Debug, Clone)]
pub struct Chain {
    nats: Nats,
}

impl Chain {
    pub fn new(nats: &Nats) -> Self {
        Self { nats: nats.clone() }
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
            .headers(raw::json_headers())
            .message_id(&value.final_id)
            .expected_last_subject_sequence(predecessor.unwrap_or(0));
        let ack = raw::publish(&self.nats, self.nats.subjects().finals(value.kind, &value.id), message).await?;
        Ok(Published { seq: ack.sequence, duplicate: ack.duplicate })
    }

    /// Publishes until it is known what became of it, with the same bytes and id each time. Call it for one final of a
    /// session at a time. Returns an error only for what no repetition can change; drop the future to give up.
    pub async fn store(&self, value: &Final, predecessor: Option<u64>) -> Result<Outcome, ChainError> {
        let bytes = encode(value)?;
        let mut expected = predecessor;
        let mut chain_lost = false;
        let mut backoff = Backoff::default();
        loop {
            match self.attempt(value, &bytes, expected).await {
                Ok(Published { seq, duplicate: false }) => return Ok(Outcome::Stored { seq, chain_lost }),
                // The fence, the id and the clock each say only that somebody may have been there.
                Ok(Published { duplicate: true, .. })
                | Err(ChainError::Conflict | ChainError::Server(ServerError::Timeout)) => {}
                Err(ChainError::Server(error)) if !matches!(error, ServerError::TooLarge | ServerError::Closed) => {
                    self.lags(value, &error);
                    backoff.wait().await;
                    continue;
                }
                Err(error) => return Err(error),
            }
            let found = loop {
                match self.last(value.kind, &value.id).await {
                    Ok(found) => break found,
                    Err(ChainError::Server(error)) if !matches!(error, ServerError::Closed) => {
                        self.lags(value, &error);
                        backoff.wait().await;
                    }
                    Err(error) => return Err(error),
                }
            };
            let link = found.as_ref().map(|stored| Link {
                seq: stored.seq,
                final_id: &stored.value.final_id,
                epoch: stored.value.epoch,
            });
            match (after_conflict(&value.final_id, value.epoch, expected, link), found) {
                (Verdict::Stored { seq }, _) => return Ok(Outcome::Stored { seq, chain_lost }),
                (Verdict::LetGo, Some(stored)) => return Ok(Outcome::LetGo(Box::new(stored))),
                (Verdict::Rebuild, Some(stored)) => return Ok(Outcome::Rebuild(Box::new(stored))),
                (Verdict::ChainLost, _) => {
                    tracing::warn!(kind = %value.kind, id = %value.id, index = value.index, "the chain is gone, starting it anew");
                    (expected, chain_lost) = (None, true);
                }
                (Verdict::RetrySame | Verdict::LetGo | Verdict::Rebuild, _) => backoff.wait().await,
            }
        }
    }

    fn lags(&self, value: &Final, error: &ServerError) {
        tracing::warn!(kind = %value.kind, id = %value.id, index = value.index, %error, "final is not stored yet, trying again");
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

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A message that is not what its subject says; the next call goes on behind it.
    #[error("message {seq} cannot be read")]
    Malformed { seq: u64, source: CodecError },
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// One message of a [`Reader`].
#[derive(Debug, Clone)]
pub struct Read<T> {
    /// Sequence in its stream.
    pub seq: u64,
    pub subject: Subject,
    /// Unix time in ms at which the server stored it.
    pub stored_ms: u64,
    /// Messages behind it that were in the stream when it was sent; 0 = the reader has caught up.
    pub pending: u64,
    pub value: T,
}

/// Reads one kind of message for ever.
pub struct Reader<T> {
    nats: Nats,
    feed: Feed,
    value: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Reader<T> {
    fn new(nats: &Nats, stream: &'static str, filter: String, start: Start) -> Self {
        Self { nats: nats.clone(), feed: Feed::new(nats, stream, filter, start), value: PhantomData }
    }

    /// The next message. Survives reconnects and restarted servers; an error means that this attempt failed, and the next
    /// call goes on. `Server(Closed)` is the end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Read<T>, ReadError> {
        loop {
            let message = self.feed.next().await?;
            let seq = message.seq;
            // A subject that no id of ours can make is nobody's.
            let Some(subject) = self.nats.subjects().parse(&message.subject) else { continue };
            let value = codec::from_json(&message.payload).map_err(|source| ReadError::Malformed { seq, source })?;
            return Ok(Read { seq, subject, stored_ms: message.stored_ms, pending: message.pending, value });
        }
    }
}

pub fn finals(nats: &Nats, filter: &Filter, start: Start) -> Reader<Final> {
    Reader::new(nats, TRANSCRIPT, nats.subjects().finals_of(filter), start)
}

pub fn partials(nats: &Nats, filter: &Filter, start: Start) -> Reader<Partial> {
    Reader::new(nats, PARTIAL, nats.subjects().partials_of(filter), start)
}

pub fn revisions(nats: &Nats, filter: &Filter, start: Start) -> Reader<Revision> {
    Reader::new(nats, TRANSCRIPT, nats.subjects().revisions_of(filter), start)
}

/// `Filter::All` includes the fleet's events.
pub fn events(nats: &Nats, filter: &Filter, start: Start) -> Reader<Event> {
    Reader::new(nats, EVENT, nats.subjects().events_of(filter), start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leaders_last_final_decides() {
        let link = |seq, final_id, epoch| Some(Link { seq, final_id, epoch });
        // Mine is "m" of epoch 5; the predecessor stood at 10.
        let cases = [
            ("mine was stored", Some(10), link(11, "m", 5), Verdict::Stored { seq: 11 }),
            ("mine was stored as the first", None, link(1, "m", 5), Verdict::Stored { seq: 1 }),
            ("mine, although the epoch reads higher", Some(10), link(11, "m", 6), Verdict::Stored { seq: 11 }),
            ("my predecessor: not stored", Some(10), link(10, "p", 5), Verdict::RetrySame),
            ("my predecessor, written by a lower epoch", Some(10), link(10, "p", 4), Verdict::RetrySame),
            ("my predecessor, written by a higher epoch", Some(10), link(10, "p", 6), Verdict::RetrySame),
            ("a higher epoch", Some(10), link(11, "o", 6), Verdict::LetGo),
            ("a higher epoch, where I wanted to be first", None, link(1, "o", 6), Verdict::LetGo),
            ("my own epoch, another computation", Some(10), link(11, "o", 5), Verdict::Rebuild),
            ("a lower epoch that was faster", Some(10), link(11, "o", 4), Verdict::Rebuild),
            ("somebody else was first", None, link(1, "o", 5), Verdict::Rebuild),
            ("another predecessor than I hold", Some(10), link(9, "p", 5), Verdict::Rebuild),
            ("purged under me", Some(10), None, Verdict::ChainLost),
            ("nothing there, nothing expected", None, None, Verdict::RetrySame),
        ];
        for (what, predecessor, found, want) in cases {
            assert_eq!(after_conflict("m", 5, predecessor, found), want, "{what}");
        }
    }
}
