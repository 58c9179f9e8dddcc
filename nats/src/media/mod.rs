//! The object store `asr_media`: recordings of file jobs and their results.
//!
//! An object is a record under its name and chunks under a number of their own, in the layout every NATS client reads.
//! Invariants: a record appears only when all its chunks are stored, and the chunks of what it replaces go afterwards; a
//! put that fails or is dropped takes its chunks away again; a read that ends well has given every byte, with the length and
//! the SHA-256 of its record; what is deleted leaves nothing behind. Chunks of a process that died are [`Media::sweep`]'s.

mod put;
mod read;

pub use read::Object;

use std::{collections::HashSet, io, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt};
use voxfleet_schema::{codec, job::MEDIA_BUCKET};

use crate::{
    Nats, ServerError,
    feed::{Feed, Start},
    raw::{self, Get},
    topology::names::MEDIA,
};

/// Longest key, in bytes: as base64 in a subject it must fit the line that a server reads.
pub const MAX_KEY_BYTES: usize = 1_024;

#[derive(Debug, thiserror::Error)]
pub enum MediaError {
    /// At its `max_bytes`: nothing more fits until something is deleted.
    #[error("the object store is full")]
    Full,
    #[error("object keys have 1 to {MAX_KEY_BYTES} bytes")]
    BadKey,
    /// What is stored is not what was put: chunks are missing or differ, or it was replaced or deleted while it was read.
    #[error("object {key} is damaged: {what}")]
    Damaged { key: String, what: &'static str },
    #[error("object {key} has {bytes} bytes, the limit is {limit}")]
    TooLarge { key: String, bytes: u64, limit: usize },
    /// The reader that was to be stored failed.
    #[error("cannot read what is to be stored")]
    Read(#[source] io::Error),
    #[error("record of object {key} cannot be read")]
    Malformed { key: String, source: codec::CodecError },
    #[error(transparent)]
    Server(ServerError),
}

impl From<ServerError> for MediaError {
    fn from(error: ServerError) -> Self {
        if error.is_full() { MediaError::Full } else { MediaError::Server(error) }
    }
}

impl From<MediaError> for io::Error {
    fn from(error: MediaError) -> Self {
        let kind = match &error {
            MediaError::Damaged { .. } => io::ErrorKind::InvalidData,
            MediaError::Server(ServerError::Timeout) => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

impl MediaError {
    /// The error inside one that an [`Object`] gave as its reader.
    pub fn of(error: io::Error) -> Self {
        match error.downcast::<MediaError>() {
            Ok(error) => error,
            Err(error) => MediaError::Read(error),
        }
    }
}

/// An object as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    pub key: String,
    pub bytes: u64,
    /// Unix time in ms, by the server's clock.
    pub modified_ms: u64,
    /// As [`digest_of`] writes it; objects of others may have none.
    pub digest: Option<String>,
}

/// What [`Media::sweep`] removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Unfinished objects.
    pub objects: u64,
    pub chunks: u64,
}

/// Record of an object, in the words of the object store.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    name: String,
    #[serde(default)]
    options: Option<Options>,
    #[serde(default)]
    bucket: String,
    #[serde(default)]
    nuid: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    chunks: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    deleted: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Options {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_chunk_size: Option<u64>,
    /// An object that stands for another one, maybe in another bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link: Option<serde_json::Value>,
}

/// A record and where it stands.
struct Found {
    seq: u64,
    stored_ms: u64,
    record: Record,
}

impl Found {
    /// Links are not followed: they may lead out of the bucket, and nothing of ours makes one.
    fn is_object(&self) -> bool {
        !self.record.deleted && self.record.options.as_ref().is_none_or(|options| options.link.is_none())
    }

    fn info(&self) -> ObjectInfo {
        info_of(&self.record, self.stored_ms)
    }
}

fn info_of(record: &Record, stored_ms: u64) -> ObjectInfo {
    ObjectInfo { key: record.name.clone(), bytes: record.size, modified_ms: stored_ms, digest: record.digest.clone() }
}

/// One part in so many of the store is for results.
const RESULTS_SHARE: u64 = 8;

/// The object store of one account.
#[derive(Debug, Clone)]
pub struct Media {
    nats: Nats,
}

impl Media {
    pub fn new(nats: &Nats) -> Self {
        Self { nats: nats.clone() }
    }

    /// The object to read from, or None where there is none. Its chunks are asked for as they are read.
    pub async fn get(&self, key: &str) -> Result<Option<Object>, MediaError> {
        let Some(found) = self.object(key).await? else { return Ok(None) };
        let info = found.info();
        Ok(Some(Object::new(&self.nats, info, found.record)))
    }

    /// The whole object, if it is no longer than `limit`.
    pub async fn get_bytes(&self, key: &str, limit: usize) -> Result<Option<Bytes>, MediaError> {
        let Some(mut object) = self.get(key).await? else { return Ok(None) };
        let size = usize::try_from(object.info.bytes).ok().filter(|size| *size <= limit);
        let Some(size) = size else {
            return Err(MediaError::TooLarge { key: key.to_owned(), bytes: object.info.bytes, limit });
        };
        let mut bytes = Vec::with_capacity(size);
        object.read_to_end(&mut bytes).await.map_err(MediaError::of)?;
        Ok(Some(bytes.into()))
    }

    /// What is known of it, from the leader. None: there is no such object.
    pub async fn info(&self, key: &str) -> Result<Option<ObjectInfo>, MediaError> {
        Ok(self.object(key).await?.map(|found| found.info()))
    }

    /// Bytes that uploads may still take; None where that is not known. The rest is for results of jobs that run.
    pub async fn room(&self) -> Result<Option<u64>, MediaError> {
        let info = raw::stream_info(&self.nats, MEDIA).await?;
        let most = u64::try_from(info.config.max_bytes).ok().filter(|most| *most > 0);
        Ok(most.map(|most| (most - most / RESULTS_SHARE).saturating_sub(info.state.bytes)))
    }

    /// Removes it; returns whether it was there. Works in a full store too, and leaves no marker. After an error it may
    /// still be listed: delete it again.
    pub async fn delete(&self, key: &str) -> Result<bool, MediaError> {
        let subject = meta_subject(key)?;
        let Some(found) = self.newest(&subject, key).await? else { return Ok(false) };
        // Chunks first: while the record stands, whoever was interrupted here can do it again.
        if !found.record.nuid.is_empty() {
            raw::purge(&self.nats, MEDIA, &chunk_subject(&found.record.nuid), None).await?;
        }
        // Not what somebody has put there meanwhile.
        raw::purge(&self.nats, MEDIA, &subject, Some(found.seq + 1)).await?;
        Ok(!found.record.deleted)
    }

    /// Every object, the oldest first. An unreadable record is left out and logged.
    pub async fn list(&self) -> Result<Vec<ObjectInfo>, MediaError> {
        let records = self.records().await?;
        Ok(records.iter().filter(|found| found.is_object()).map(Found::info).collect())
    }

    /// Removes chunks that belong to no object and are older than `age`: those of processes that died while they stored
    /// one. An hour is longer than any chunk waits for the next one.
    pub async fn sweep(&self, age: Duration) -> Result<Swept, MediaError> {
        // Chunks before records: what is completed in between is seen as complete.
        let unfinished = raw::subject_counts(&self.nats, MEDIA, &chunk_subject(">")).await?;
        let live: HashSet<String> = self.records().await?.into_iter().map(|found| found.record.nuid).collect();
        let mut swept = Swept::default();
        for (subject, chunks) in unfinished {
            let is_live = subject.rsplit('.').next().is_some_and(|nuid| live.contains(nuid));
            if is_live {
                continue;
            }
            let which = Get { last_by_subj: Some(&subject), ..Get::default() };
            let Some(last) = raw::leader_get(&self.nats, MEDIA, &which).await? else { continue };
            let old_ms = now_ms().saturating_sub(last.stored_ms);
            if u128::from(old_ms) < age.as_millis() {
                continue;
            }
            raw::purge(&self.nats, MEDIA, &subject, Some(last.seq + 1)).await?;
            swept.objects += 1;
            swept.chunks += chunks;
        }
        Ok(swept)
    }

    async fn records(&self) -> Result<Vec<Found>, MediaError> {
        let filter = format!("$O.{MEDIA_BUCKET}.M.>");
        let messages = Feed::new(&self.nats, MEDIA, filter, Start::LastPerSubject).read_all().await?;
        let read = |message: crate::feed::Message| match codec::from_json(&message.payload) {
            Ok(record) => Some(Found { seq: message.seq, stored_ms: message.stored_ms, record }),
            Err(error) => {
                tracing::warn!(subject = %message.subject, %error, "record of an object is left out");
                None
            }
        };
        Ok(messages.into_iter().filter_map(read).collect())
    }

    async fn object(&self, key: &str) -> Result<Option<Found>, MediaError> {
        Ok(self.newest(&meta_subject(key)?, key).await?.filter(Found::is_object))
    }

    /// The record as the leader has it, deletions and links included.
    async fn newest(&self, subject: &str, key: &str) -> Result<Option<Found>, MediaError> {
        let which = Get { last_by_subj: Some(subject), ..Get::default() };
        let Some(stored) = raw::leader_get(&self.nats, MEDIA, &which).await? else { return Ok(None) };
        let record = codec::from_json(&stored.payload)
            .map_err(|source| MediaError::Malformed { key: key.to_owned(), source })?;
        Ok(Some(Found { seq: stored.seq, stored_ms: stored.stored_ms, record }))
    }
}

fn meta_subject(key: &str) -> Result<String, MediaError> {
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(MediaError::BadKey);
    }
    Ok(format!("$O.{MEDIA_BUCKET}.M.{}", URL_SAFE.encode(key)))
}

fn chunk_subject(nuid: &str) -> String {
    format!("$O.{MEDIA_BUCKET}.C.{nuid}")
}

/// The digest an object with these bytes has.
pub async fn digest_of(mut reader: impl AsyncRead + Unpin) -> std::io::Result<String> {
    let (mut digest, mut buffer) = (Sha256::new(), vec![0; put::CHUNK_BYTES]);
    loop {
        match reader.read(&mut buffer).await? {
            0 => return Ok(encode_digest(digest)),
            read => digest.update(&buffer[..read]),
        }
    }
}

fn encode_digest(digest: Sha256) -> String {
    format!("SHA-256={}", URL_SAFE.encode(digest.finalize()))
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_a_subject_of_one_token() {
        assert_eq!(meta_subject("audio/a b.wav").expect("key"), "$O.asr_media.M.YXVkaW8vYSBiLndhdg==");
        for bad in [String::new(), "x".repeat(MAX_KEY_BYTES + 1)] {
            assert!(matches!(meta_subject(&bad), Err(MediaError::BadKey)));
        }
    }

    #[test]
    fn records_of_other_clients_are_read() {
        let text = br#"{"name":"a","options":{"max_chunk_size":131072},"bucket":"asr_media","nuid":"n","size":3,
            "mtime":"0001-01-01T00:00:00Z","chunks":1,"digest":"SHA-256=x","headers":{"A":["b"]},"new":1}"#;
        let found = |text: &[u8]| Found { seq: 1, stored_ms: 2, record: codec::from_json(text).expect("reads") };
        assert!(found(text).is_object());
        assert_eq!(
            found(text).info(),
            ObjectInfo { key: "a".into(), bytes: 3, modified_ms: 2, digest: Some("SHA-256=x".into()) }
        );
        assert!(!found(br#"{"name":"a","options":{"link":{"bucket":"other","name":"b"}}}"#).is_object());
        assert!(!found(br#"{"name":"a","deleted":true}"#).is_object());
    }
}
