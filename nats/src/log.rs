//! The audio log: `ASR_AUDIO`, one subject a session, in stream order.
//!
//! Readers that hold a session read by direct get, which any replica answers: "not there" from a replica that lags only
//! means "not yet". What must be certain (a session's last entry, the stream's bounds) is read from the leader.

use async_nats::{
    HeaderMap,
    header::HeaderName,
    jetstream::{ErrorCode, context::PublishAckFuture, message::PublishMessage, stream::DirectGetErrorKind},
};
use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use voxfleet_schema::{
    audio::RawEntry,
    id::{IdError, StreamId},
};

use crate::{
    Nats, ServerError,
    feed::{Feed, Message, Start},
    raw::{self, Get, Stored},
    topology::names::AUDIO,
};

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Somebody else wrote to this session in between.
    #[error("the session's log has moved on")]
    Conflict,
    /// `ASR_AUDIO` is at its `max_bytes`, or the server that keeps it is out of room; nothing is dropped, so nothing more fits
    /// until something expires.
    #[error("the audio log is full, it takes more when older audio expires or somebody gives it room")]
    Full,
    #[error("entry is larger than the log accepts")]
    TooLarge,
    /// A header name or value that no NATS message can carry.
    #[error("header {name:?} cannot be sent")]
    BadHeader { name: String },
    #[error(transparent)]
    Server(ServerError),
}

impl From<ServerError> for LogError {
    fn from(error: ServerError) -> Self {
        match &error {
            ServerError::TooLarge => LogError::TooLarge,
            _ if error.is_conflict() => LogError::Conflict,
            _ if error.is_code(ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM) => LogError::TooLarge,
            _ if error.is_full() => LogError::Full,
            _ => LogError::Server(error),
        }
    }
}

/// What the log holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Oldest entry; `last_seq + 1` when the log is empty (0 in a fresh stream).
    pub first_seq: u64,
    /// Newest sequence ever given; 0 in a fresh stream.
    pub last_seq: u64,
    pub bytes: u64,
    pub max_bytes: u64,
}

/// Where an entry was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    pub seq: u64,
    /// The same `Nats-Msg-Id` was stored before, at `seq`.
    pub duplicate: bool,
}

/// An entry on its way; see [`AudioLog::publish`].
pub struct PendingAppend {
    ack: PublishAckFuture,
    refused: BoxFuture<'static, ServerError>,
}

impl std::fmt::Debug for PendingAppend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingAppend").finish_non_exhaustive()
    }
}

impl PendingAppend {
    /// Waits for the log's answer. `Timeout` means unknown: it may have been stored.
    pub async fn stored(self) -> Result<Appended, LogError> {
        let ack = tokio::select! {
            ack = self.ack.into_future() => ack.map_err(ServerError::from)?,
            error = self.refused => return Err(error.into()),
        };
        Ok(Appended { seq: ack.sequence, duplicate: ack.duplicate })
    }
}

/// One entry of the log as the tail reads it.
#[derive(Debug, Clone)]
pub struct LogItem {
    /// Whose it is. An error where the subject's last token is no id: such an entry belongs to no session.
    pub id: Result<StreamId, IdError>,
    pub entry: RawEntry,
    /// Unix time in ms at which the server stored it; 0 where that could not be read.
    pub stored_ms: u64,
    /// Entries behind it that were in the stream when it was sent.
    pub pending: u64,
}

/// Reads and writes the log.
#[derive(Debug, Clone)]
pub struct AudioLog {
    nats: Nats,
}

impl AudioLog {
    pub fn new(nats: &Nats) -> Self {
        Self { nats: nats.clone() }
    }

    /// The first entry of `id` at or after `from_seq`, by direct get from any replica. None: not there yet (or, on a
    /// replica that lags, not there *here* yet): ask again.
    pub async fn next(&self, id: &StreamId, from_seq: u64) -> Result<Option<RawEntry>, LogError> {
        Ok(self.next_dated(id, from_seq).await?.map(|(entry, _)| entry))
    }

    /// The same, with the Unix time in ms at which it was stored.
    pub async fn next_dated(&self, id: &StreamId, from_seq: u64) -> Result<Option<(RawEntry, u64)>, LogError> {
        let subject = self.nats.subjects().audio(id);
        let seq = Some(from_seq.max(1));
        let stream =
            self.nats.js().get_stream_no_info(AUDIO).await.map_err(|error| ServerError::Request(Box::new(error)))?;
        match stream.direct_get_next_for_subject(subject.clone(), seq).await {
            Ok(message) => {
                let stored_ms = u64::try_from(message.time.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
                let headers = raw::asr_headers(Some(&message.headers));
                Ok(Some((RawEntry { seq: message.sequence, headers, payload: message.payload }, stored_ms)))
            }
            Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
            Err(error) => {
                // A header block that the client cannot read shows as a lost connection; the leader sends it as JSON.
                tracing::debug!(session = %id, from_seq, %error, "direct get failed, asking the leader");
                let which = Get { seq, next_by_subj: Some(&subject), ..Get::default() };
                let found = raw::leader_get(&self.nats, AUDIO, &which).await?;
                Ok(found.map(|stored| (stored.stored_ms, entry(stored))).map(|(at, entry)| (entry, at)))
            }
        }
    }

    /// The last entry of `id`, from the stream's leader.
    pub async fn last(&self, id: &StreamId) -> Result<Option<RawEntry>, LogError> {
        let subject = self.nats.subjects().audio(id);
        let which = Get { last_by_subj: Some(&subject), ..Get::default() };
        Ok(raw::leader_get(&self.nats, AUDIO, &which).await?.map(entry))
    }

    /// Writes an entry and waits until it is stored. With `expect_last`, only if the session's last entry has that
    /// sequence (0: the session has none); else [`LogError::Conflict`]. After `Timeout` it may have been stored: read
    /// [`Self::last`].
    pub async fn append(
        &self,
        id: &StreamId,
        headers: &[(&str, &str)],
        payload: Bytes,
        expect_last: Option<u64>,
    ) -> Result<u64, LogError> {
        let mut message = message(headers, payload)?;
        if let Some(seq) = expect_last {
            message = message.expected_last_subject_sequence(seq);
        }
        Ok(raw::publish(&self.nats, self.nats.subjects().audio(id), message).await?.sequence)
    }

    /// Writes an entry without waiting for the answer (a producer's way): entries go out in the order of these calls; how
    /// many may be unanswered is bounded, beyond that this waits.
    pub async fn publish(
        &self,
        id: &StreamId,
        headers: &[(&str, &str)],
        payload: Bytes,
        msg_id: Option<&str>,
    ) -> Result<PendingAppend, LogError> {
        self.offer(id, headers, payload, msg_id, None).await
    }

    /// The same, taken only if the session's last entry has the sequence `expect_last`; else [`LogError::Conflict`].
    pub async fn offer(
        &self,
        id: &StreamId,
        headers: &[(&str, &str)],
        payload: Bytes,
        msg_id: Option<&str>,
        expect_last: Option<u64>,
    ) -> Result<PendingAppend, LogError> {
        let mut message = message(headers, payload)?;
        if let Some(seq) = expect_last {
            message = message.expected_last_subject_sequence(seq);
        }
        if let Some(msg_id) = msg_id {
            message = message.message_id(msg_id);
        }
        let subject = self.nats.subjects().audio(id);
        let refused = self.nats.denials().publishing(&subject).boxed();
        let sent = self.nats.js().send_publish(subject, message).await;
        Ok(PendingAppend { ack: sent.map_err(ServerError::from)?, refused })
    }

    /// What the log holds, from its leader.
    pub async fn bounds(&self) -> Result<Bounds, LogError> {
        let info = raw::stream_info(&self.nats, AUDIO).await?;
        Ok(Bounds {
            first_seq: info.state.first_sequence,
            last_seq: info.state.last_sequence,
            bytes: info.state.bytes,
            max_bytes: u64::try_from(info.config.max_bytes).unwrap_or(0),
        })
    }

    /// Every entry of every session from `from_seq` on, in order. A sequence above the stream's last starts at its first.
    pub fn tail(&self, from_seq: u64) -> LogTail {
        let filter = self.nats.subjects().audio_log();
        LogTail { nats: self.nats.clone(), feed: Feed::new(&self.nats, AUDIO, filter, Start::Seq(from_seq)) }
    }
}

fn entry(stored: Stored) -> RawEntry {
    RawEntry { seq: stored.seq, headers: raw::asr_headers(stored.headers.as_ref()), payload: stored.payload }
}

fn message(headers: &[(&str, &str)], payload: Bytes) -> Result<PublishMessage, LogError> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let bad = || LogError::BadHeader { name: name.chars().take(64).collect() };
        let name: HeaderName = name.parse().map_err(|_| bad())?;
        let value: async_nats::HeaderValue = value.parse().map_err(|_| bad())?;
        map.append(name, value);
    }
    Ok(PublishMessage::build().payload(payload).headers(map))
}

/// Reads the log for ever; see [`AudioLog::tail`].
pub struct LogTail {
    nats: Nats,
    feed: Feed,
}

impl LogTail {
    /// The next entry. Reconnects, lost consumers and restarted servers are survived inside; an error means that this
    /// attempt failed (it is worth a log line), and the next call goes on behind the last entry. `Server(Closed)` is the
    /// end. Cancel-safe.
    pub async fn next(&mut self) -> Result<LogItem, LogError> {
        let Message { seq, stored_ms, pending, subject, headers, payload } = self.feed.next().await?;
        let token = self.nats.subjects().audio_token(&subject).unwrap_or("");
        Ok(LogItem {
            id: StreamId::new(token),
            entry: RawEntry { seq, headers: raw::asr_headers(headers.as_ref()), payload },
            stored_ms,
            pending,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_headers_are_refused_before_they_are_sent() {
        for bad in [("a b", "x"), ("a:b", "x"), ("é", "x"), ("a", "x\r\nInjected: 1"), ("a\n", "x")] {
            assert!(matches!(message(&[bad], Bytes::new()), Err(LogError::BadHeader { .. })), "{bad:?}");
        }
        assert!(message(&[("Asr-End", "1")], Bytes::new()).is_ok());
    }
}
