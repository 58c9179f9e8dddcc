//! Reading an object: chunk by chunk as its reader asks, checked against its record.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, ReadBuf};
use tokio_util::io::StreamReader;

use super::{MediaError, ObjectInfo, Record, chunk_subject, encode_digest};
use crate::{
    Nats, ServerError,
    feed::{Feed, Start},
    raw::{self, Get},
    topology::names::MEDIA,
};

/// How long a read waits for a chunk before it asks whether there is one.
const PATIENCE: Duration = Duration::from_secs(2);

/// An object being read, from its beginning. Its end is only reached when every byte came and length and digest are those
/// of its record; else the reader fails with a [`MediaError`] inside (see [`MediaError::of`]).
pub struct Object {
    pub info: ObjectInfo,
    reader: StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>,
}

impl Object {
    pub(super) fn new(nats: &Nats, info: ObjectInfo, record: Record) -> Self {
        let begin = Chunks::new(nats, record);
        let chunks =
            stream::try_unfold(
                begin,
                |mut chunks| async move { Ok(chunks.next().await?.map(|chunk| (chunk, chunks))) },
            );
        Self { info, reader: StreamReader::new(chunks.boxed()) }
    }
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object").field("info", &self.info).finish_non_exhaustive()
    }
}

impl AsyncRead for Object {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

struct Chunks {
    nats: Nats,
    record: Record,
    feed: Feed,
    subject: String,
    digest: Sha256,
    bytes: u64,
    count: u64,
    next_seq: u64,
}

impl Chunks {
    fn new(nats: &Nats, record: Record) -> Self {
        let subject = chunk_subject(&record.nuid);
        let feed = Feed::new(nats, MEDIA, subject.clone(), Start::First);
        Self { nats: nats.clone(), record, feed, subject, digest: Sha256::new(), bytes: 0, count: 0, next_seq: 1 }
    }

    /// The next chunk; None behind the last one, when everything is as the record says.
    async fn next(&mut self) -> Result<Option<Bytes>, MediaError> {
        if self.bytes >= self.record.size && self.count >= self.record.chunks {
            return self.check().map(|()| None);
        }
        loop {
            match tokio::time::timeout(PATIENCE, self.feed.next()).await {
                Ok(Ok(message)) => {
                    self.next_seq = message.seq + 1;
                    self.bytes += message.payload.len() as u64;
                    self.count += 1;
                    self.digest.update(&message.payload);
                    let more = self.bytes < self.record.size || self.count < self.record.chunks;
                    if more && message.pending == 0 {
                        // The server that is read from may lag behind the stream's leader: the rest comes then.
                        self.look().await?;
                    }
                    if !more {
                        // Before the last bytes are given away, so that nobody takes a wrong object for a whole one.
                        self.check()?;
                    }
                    return Ok(Some(message.payload));
                }
                Ok(Err(ServerError::Closed)) => return Err(ServerError::Closed.into()),
                Ok(Err(error)) => tracing::debug!(key = self.record.name, %error, "reading of an object goes on"),
                Err(_) => self.look().await?,
            }
        }
    }

    /// Nothing came for a while: fails when nothing will.
    async fn look(&self) -> Result<(), MediaError> {
        let which = Get { seq: Some(self.next_seq), next_by_subj: Some(&self.subject), ..Get::default() };
        match raw::leader_get(&self.nats, MEDIA, &which).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(self.damaged("chunks are missing")),
            Err(ServerError::Closed) => Err(ServerError::Closed.into()),
            Err(error) if error.is_transient() => {
                tracing::debug!(key = self.record.name, %error, "cannot see whether chunks are missing");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn check(&self) -> Result<(), MediaError> {
        if (self.bytes, self.count) != (self.record.size, self.record.chunks) {
            return Err(self.damaged("its length is not that of its record"));
        }
        let Some(want) = &self.record.digest else { return Err(self.damaged("its record has no digest")) };
        // Some clients leave the padding out.
        let is = encode_digest(self.digest.clone());
        if want.trim_end_matches('=') != is.trim_end_matches('=') {
            return Err(self.damaged("its digest is not that of its record"));
        }
        Ok(())
    }

    fn damaged(&self, what: &'static str) -> MediaError {
        MediaError::Damaged { key: self.record.name.clone(), what }
    }
}
