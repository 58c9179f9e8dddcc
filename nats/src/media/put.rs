//! Storing an object: its chunks, then its record; and taking the chunks away again where it comes to nothing.

use std::io;

use async_nats::{
    HeaderMap,
    jetstream::{context::PublishError, message::PublishMessage, publish::PublishAck},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesOrdered};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt};
use uuid::Uuid;
use voxfleet_schema::{codec, job::MEDIA_BUCKET};

use super::{
    Media, MediaError, ObjectInfo, Options, Record, chunk_subject, encode_digest, info_of, meta_subject, now_ms,
};
use crate::{Nats, ServerError, raw, retry::Backoff, topology::names::MEDIA};

/// What every client of the object store uses.
pub(super) const CHUNK_BYTES: usize = 128 * 1024;
/// Chunks sent and not answered: 1 MiB on the way keeps a distant server busy.
const WINDOW: usize = 8;
/// Times a record is written before its outcome counts as unknown.
const COMMITS: u32 = 6;
/// Times the chunks of a failed put are purged before the sweep is left to it.
const PURGES: u32 = 10;

/// What became of a record.
struct Committed {
    info: ObjectInfo,
    /// Whose chunks are to go.
    replaced: Option<String>,
    /// Another one stands in its place already.
    superseded: bool,
}

impl Media {
    /// Stores everything `reader` gives, in place of what stood under `key`. Nothing is to be seen of it before it is
    /// complete.
    pub async fn put(&self, key: &str, reader: impl AsyncRead + Send + Unpin) -> Result<ObjectInfo, MediaError> {
        let meta_subject = meta_subject(key)?;
        let mut chunks = Unfinished::new(&self.nats);
        let record = self.put_chunks(key, reader, &mut chunks).await?;
        match self.commit(&meta_subject, &record).await {
            Ok(Committed { info, replaced, superseded }) => {
                // Somebody has put another one in its place already, or deleted it: its chunks go.
                if !superseded {
                    chunks.keep();
                }
                if let Some(nuid) = replaced {
                    // Nothing refers to them any more; the sweep finds what stays.
                    if let Err(error) = raw::purge(&self.nats, MEDIA, &chunk_subject(&nuid), None).await
                        && !error.is_denied()
                    {
                        tracing::warn!(key, %error, "chunks of a replaced object stay for now");
                    }
                }
                Ok(info)
            }
            Err(error) => {
                if matches!(error, MediaError::Server(ServerError::Timeout)) {
                    // The record may stand; without its chunks it would be a damaged object.
                    chunks.keep();
                    tracing::warn!(key, "unknown whether an object was stored, its chunks stay for now");
                }
                Err(error)
            }
        }
    }

    /// The same with bytes, tried again where that may help.
    pub async fn put_bytes(&self, key: &str, bytes: Bytes) -> Result<ObjectInfo, MediaError> {
        let mut backoff = Backoff::default();
        for _ in 0..2 {
            match self.put(key, &bytes[..]).await {
                Err(MediaError::Server(error)) if error.is_transient() => {
                    tracing::debug!(key, %error, "object is not stored yet, trying again");
                    backoff.wait().await;
                }
                result => return result,
            }
        }
        self.put(key, &bytes[..]).await
    }

    async fn put_chunks(
        &self,
        key: &str,
        mut reader: impl AsyncRead + Send + Unpin,
        unfinished: &mut Unfinished,
    ) -> Result<Record, MediaError> {
        let subject = chunk_subject(&unfinished.nuid);
        let (mut digest, mut size, mut chunks) = (Sha256::new(), 0u64, 0u64);
        let mut last_seq = 0;
        let mut refused = std::pin::pin!(self.nats.denials().publishing(&subject));
        loop {
            let chunk = read_chunk(&mut reader).await.map_err(MediaError::Read)?;
            if chunk.is_empty() || unfinished.answers.len() == WINDOW {
                loop {
                    let answer = tokio::select! {
                        answer = unfinished.answers.next() => answer,
                        error = &mut refused => return Err(error.into()),
                    };
                    let Some(answer) = answer else { break };
                    let ack = answer.map_err(ServerError::from)?;
                    // A cluster that changed its leader may have taken a later one first.
                    if ack.sequence <= last_seq {
                        return Err(MediaError::Damaged {
                            key: key.to_owned(),
                            what: "chunks were stored out of order",
                        });
                    }
                    last_seq = ack.sequence;
                    if !chunk.is_empty() {
                        break;
                    }
                }
            }
            if chunk.is_empty() {
                break;
            }
            digest.update(&chunk);
            size += chunk.len() as u64;
            chunks += 1;
            let message = PublishMessage::build().payload(chunk);
            let sent = self.nats.js().send_publish(subject.clone(), message).await.map_err(ServerError::from)?;
            unfinished.answers.push_back(sent.into_future());
        }
        Ok(Record {
            name: key.to_owned(),
            options: Some(Options { max_chunk_size: Some(CHUNK_BYTES as u64), link: None }),
            bucket: MEDIA_BUCKET.to_owned(),
            nuid: unfinished.nuid.clone(),
            size,
            chunks,
            digest: Some(encode_digest(digest)),
            deleted: false,
        })
    }

    /// Writes the record, fenced on the one before it.
    async fn commit(&self, subject: &str, record: &Record) -> Result<Committed, MediaError> {
        let malformed = |source| MediaError::Malformed { key: record.name.clone(), source };
        let body = Bytes::from(codec::to_json(record).map_err(malformed)?);
        let mut backoff = Backoff::default();
        // An attempt whose answer was lost: what it was fenced on.
        let mut unknown: Option<(u64, Option<String>)> = None;
        for _ in 0..COMMITS {
            let before = match self.newest(subject, &record.name).await {
                Ok(before) => before,
                Err(MediaError::Server(error)) if error.is_transient() => {
                    backoff.wait().await;
                    continue;
                }
                // A record that nobody can read gives way.
                Err(MediaError::Malformed { .. }) => {
                    raw::purge(&self.nats, MEDIA, subject, None).await?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let fence = before.as_ref().map_or(0, |found| found.seq);
            if let Some((last_fence, replaced)) = &unknown {
                let replaced = replaced.clone();
                match &before {
                    Some(found) if found.record.nuid == record.nuid => {
                        return Ok(Committed { info: found.info(), replaced, superseded: false });
                    }
                    // Ours may have stood and been replaced: writing it now would bring back a record without its chunks.
                    _ if fence != *last_fence => {
                        let info = info_of(record, now_ms());
                        return Ok(Committed { info, replaced, superseded: true });
                    }
                    _ => {}
                }
            }
            let replaced = before.map(|found| found.record.nuid).filter(|nuid| !nuid.is_empty());
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Rollup", "sub");
            let message =
                PublishMessage::build().payload(body.clone()).headers(headers).expected_last_subject_sequence(fence);
            match raw::publish(&self.nats, subject.to_owned(), message).await {
                Ok(_) => {
                    let stored_ms = self.stored_ms(subject, record).await.unwrap_or_else(now_ms);
                    return Ok(Committed { info: info_of(record, stored_ms), replaced, superseded: false });
                }
                // Somebody was faster, or it is stored and the answer was lost: the next turn tells.
                Err(error) if error.is_conflict() => {}
                Err(error) if error.is_transient() => {
                    unknown = Some((fence, replaced));
                    tracing::debug!(key = record.name, %error, "record of an object is not stored yet");
                    backoff.wait().await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ServerError::Timeout.into())
    }

    /// When the server stored this record; None where it cannot be asked or has another one already.
    async fn stored_ms(&self, subject: &str, record: &Record) -> Option<u64> {
        let found = self.newest(subject, &record.name).await.ok()??;
        (found.record.nuid == record.nuid).then_some(found.stored_ms)
    }
}

/// A whole chunk, or what is left of the reader; empty at its end.
async fn read_chunk(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
    while chunk.len() < CHUNK_BYTES {
        let room = CHUNK_BYTES - chunk.len();
        if reader.read_buf(&mut (&mut chunk).limit(room)).await? == 0 {
            break;
        }
    }
    Ok(chunk.freeze())
}

/// Chunks without a record. Dropped as such, they are taken away in the background.
struct Unfinished {
    nats: Nats,
    nuid: String,
    /// Of chunks that are on the way.
    answers: FuturesOrdered<BoxFuture<'static, Result<PublishAck, PublishError>>>,
    kept: bool,
}

impl Unfinished {
    fn new(nats: &Nats) -> Self {
        Self {
            nats: nats.clone(),
            nuid: Uuid::new_v4().simple().to_string(),
            answers: FuturesOrdered::new(),
            kept: false,
        }
    }

    fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            tracing::warn!(nuid = self.nuid, "chunks of an unfinished object stay for now");
            return;
        };
        let (nats, nuid, stop) = (self.nats.clone(), std::mem::take(&mut self.nuid), self.nats.stop_token());
        let mut answers = std::mem::take(&mut self.answers);
        let purging = async move {
            // A purge overtakes chunks that are still on the way. What became of each does not matter here.
            while answers.next().await.is_some() {}
            tokio::select! {
                () = stop.cancelled() => tracing::warn!(nuid, "chunks of an unfinished object stay for now"),
                () = purge_unfinished(&nats, &nuid) => {}
            }
        };
        self.nats.tasks().spawn_on(purging, &runtime);
    }
}

async fn purge_unfinished(nats: &Nats, nuid: &str) {
    let mut backoff = Backoff::default();
    for _ in 0..PURGES {
        match raw::purge(nats, MEDIA, &chunk_subject(nuid), None).await {
            Ok(()) => return,
            // Whoever may store and not purge leaves them to the sweep.
            Err(error) if error.is_denied() => return,
            Err(error) => tracing::debug!(nuid, %error, "chunks of an unfinished object are not purged yet"),
        }
        backoff.wait().await;
    }
    tracing::warn!(nuid, "chunks of an unfinished object stay for now");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn chunks_are_whole_however_the_reader_gives_them() {
        let bytes = vec![7u8; CHUNK_BYTES + 10];
        let (first, second) = bytes.split_at(1_000);
        let mut reader = first.chain(second);
        let mut lengths = Vec::new();
        loop {
            let chunk = read_chunk(&mut reader).await.expect("reads");
            lengths.push(chunk.len());
            if chunk.is_empty() {
                break;
            }
        }
        assert_eq!(lengths, [CHUNK_BYTES, 10, 0]);
    }
}
