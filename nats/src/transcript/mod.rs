//! The chain of finals, its checkpoints, and readers of what workers publish.
//!
//! Each final is published with the stream sequence of its predecessor as a fence, so of two workers that believe they own
//! a session one wins each link. Everything else follows from reading the chain's last final from the stream's leader and
//! comparing: [`after_conflict`] is that comparison. What an author does with it is a machine without IO (`storing`), which
//! a model runs against every order of lost answers, late publishes, forgotten ids and purges (`model`, a test).

mod chain;
#[cfg(test)]
mod model;
mod revising;
mod storing;

use std::{marker::PhantomData, time::Duration};

use serde::{Deserialize, de::DeserializeOwned};
use voxfleet_schema::{
    codec::{self, CodecError},
    event::{Event, Scope, What},
    id::StreamId,
    transcript::{Final, Partial, Revision},
};

pub use self::{
    chain::{Chain, ChainError, Outcome, Published, StoredFinal},
    revising::Revised,
    storing::{Link, Verdict, after_conflict},
};
use crate::{
    Nats, ServerError,
    feed::Feed,
    raw::{self, Get},
    subjects::Subject,
    topology::names::{EVENT, PARTIAL, TRANSCRIPT},
};
pub use crate::{feed::Start, subjects::Filter};

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

/// How long the server keeps the consumer of a [`Reader::brief`] that is gone.
pub const BRIEF: Duration = Duration::from_secs(5);

impl<T: DeserializeOwned> Reader<T> {
    fn new(nats: &Nats, stream: &'static str, filter: String, start: Start) -> Self {
        Self { nats: nats.clone(), feed: Feed::new(nats, stream, filter, start), value: PhantomData }
    }

    /// For somebody who may come and go often: the server forgets its consumer soon after it is gone. Before the first `next`.
    pub fn brief(self) -> Self {
        Self { feed: self.feed.forgotten_after(BRIEF), ..self }
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

/// What a chain says, in the order in which it stands: finals, and what replaces the segments of earlier ones.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Said {
    Final(Box<Final>),
    Revision(Box<Revision>),
}

pub fn said(nats: &Nats, filter: &Filter, start: Start) -> Reader<Said> {
    Reader::new(nats, TRANSCRIPT, nats.subjects().said_of(filter), start)
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

/// Where the newest `count` events begin, for a reader that wants a little of the past; and whether there are any.
pub async fn recent_events(nats: &Nats, count: u64) -> Result<(Start, bool), ServerError> {
    let state = raw::stream_info(nats, EVENT).await?.state;
    Ok((Start::Seq(state.last_sequence.saturating_sub(count) + 1), state.messages > 0))
}

/// The last event of this kind about `id`, from the stream's leader. None: there was none, or it has expired.
pub async fn last_event(nats: &Nats, scope: Scope, id: &StreamId, what: What) -> Result<Option<Event>, ReadError> {
    let subject = nats.subjects().event(&Event::new(scope, id.as_str(), what, 0));
    let which = Get { last_by_subj: Some(&subject), ..Get::default() };
    let Some(stored) = raw::leader_get(nats, EVENT, &which).await? else { return Ok(None) };
    codec::from_json(&stored.payload).map(Some).map_err(|source| ReadError::Malformed { seq: stored.seq, source })
}
