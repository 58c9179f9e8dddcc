//! Typed records in key-value buckets: JSON values, compare-and-set by revision, reads from the leader.

use std::{collections::HashMap, marker::PhantomData};

use async_nats::{HeaderMap, jetstream::message::PublishMessage};
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use voxfleet_schema::{
    codec::{self, CodecError},
    id,
};

use crate::{
    Nats, ServerError,
    feed::{Feed, Message, Start},
    raw::{self, Get},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bucket {
    Sessions,
    Jobs,
    Fleet,
    Control,
}

impl Bucket {
    pub const ALL: [Bucket; 4] = [Bucket::Sessions, Bucket::Jobs, Bucket::Fleet, Bucket::Control];

    pub fn as_str(self) -> &'static str {
        match self {
            Bucket::Sessions => "asr_sessions",
            Bucket::Jobs => "asr_jobs",
            Bucket::Fleet => "asr_fleet",
            Bucket::Control => "asr_control",
        }
    }

    /// The stream behind it.
    pub const fn stream(self) -> &'static str {
        match self {
            Bucket::Sessions => "KV_asr_sessions",
            Bucket::Jobs => "KV_asr_jobs",
            Bucket::Fleet => "KV_asr_fleet",
            Bucket::Control => "KV_asr_control",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// Somebody else changed the key: read it again.
    #[error("key {key} has changed")]
    Conflict { key: String },
    /// Keys are ids, or several joined by dots.
    #[error("not a key")]
    BadKey,
    #[error("cannot encode")]
    Encode(#[source] CodecError),
    #[error("value of {key} cannot be read")]
    Malformed { key: String, revision: u64, source: CodecError },
    #[error(transparent)]
    Server(#[from] ServerError),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Versioned<T> {
    pub value: T,
    pub revision: u64,
}

/// A change seen by [`Watch`].
#[derive(Debug, Clone, PartialEq)]
pub struct Change<T> {
    pub key: String,
    /// None: deleted.
    pub value: Option<T>,
    pub revision: u64,
    /// Changes behind this one; 0 = caught up.
    pub pending: u64,
}

/// The records of one bucket.
pub struct Records<T> {
    nats: Nats,
    bucket: Bucket,
    _t: PhantomData<fn() -> T>,
}

impl<T> Clone for Records<T> {
    fn clone(&self) -> Self {
        Self { nats: self.nats.clone(), bucket: self.bucket, _t: PhantomData }
    }
}

impl<T: Serialize + DeserializeOwned> Records<T> {
    pub fn new(nats: &Nats, bucket: Bucket) -> Self {
        Self { nats: nats.clone(), bucket, _t: PhantomData }
    }

    /// The newest value, from the leader. None: never there, or deleted.
    pub async fn get(&self, key: &str) -> Result<Option<Versioned<T>>, KvError> {
        match self.newest(key).await? {
            Some((revision, Some(bytes))) => {
                let value = decode(key, revision, &bytes)?;
                Ok(Some(Versioned { value, revision }))
            }
            Some((_, None)) | None => Ok(None),
        }
    }

    /// Writes a key that is not there (or was deleted). Returns its revision.
    pub async fn create(&self, key: &str, value: &T) -> Result<u64, KvError> {
        match self.write(key, value, Some(0)).await {
            // A deleted key still has its marker as last message.
            Err(KvError::Conflict { key }) => match self.newest(&key).await? {
                Some((marker, None)) => self.write(&key, value, Some(marker)).await,
                _ => Err(KvError::Conflict { key }),
            },
            result => result,
        }
    }

    /// Writes a key whose revision is still `revision`. Returns the new one. After `Server(Timeout)` it may have been
    /// written: read it.
    pub async fn update(&self, key: &str, value: &T, revision: u64) -> Result<u64, KvError> {
        self.write(key, value, Some(revision)).await
    }

    /// Writes whatever stands there.
    pub async fn put(&self, key: &str, value: &T) -> Result<u64, KvError> {
        self.write(key, value, None).await
    }

    /// Deletes; with `revision` only if it is still that.
    pub async fn delete(&self, key: &str, revision: Option<u64>) -> Result<(), KvError> {
        let message = PublishMessage::build().header(OPERATION, "DEL");
        self.publish(key, message, revision).await.map(|_| ())
    }

    /// Removes a key without leaving a marker, which would stay for ever; only what stood there up to `revision`, and a
    /// later value stays. Who watches is not told.
    pub async fn purge(&self, key: &str, revision: u64) -> Result<(), KvError> {
        Ok(raw::purge(&self.nats, self.bucket.stream(), &self.subject(key)?, Some(revision + 1)).await?)
    }

    /// Every key there is now, in order of their last change. An unreadable value is left out and logged.
    pub async fn all(&self) -> Result<Vec<(String, Versioned<T>)>, KvError> {
        let mut records: HashMap<String, Option<Versioned<T>>> = HashMap::new();
        for message in self.feed().read_all().await? {
            let Some(key) = key_of(self.bucket, &message).map(str::to_owned) else { continue };
            let value = match bytes_of(&message) {
                None => None,
                Some(bytes) => match decode(&key, message.seq, bytes) {
                    Ok(value) => Some(Versioned { value, revision: message.seq }),
                    Err(error) => {
                        tracing::warn!(bucket = self.bucket.as_str(), %error, "record is left out");
                        None
                    }
                },
            };
            records.insert(key, value);
        }
        let mut records: Vec<_> = records.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
        records.sort_by_key(|(_, value)| value.revision);
        Ok(records)
    }

    /// Every key as it is now, deleted ones included, then every change.
    pub fn watch(&self) -> Watch<T> {
        Watch { bucket: self.bucket, feed: self.feed(), _t: PhantomData }
    }

    fn feed(&self) -> Feed {
        let filter = format!("$KV.{}.>", self.bucket.as_str());
        Feed::new(&self.nats, self.bucket.stream(), filter, Start::LastPerSubject)
    }

    /// Revision and value of the last message of a key; no value where that is a deletion.
    async fn newest(&self, key: &str) -> Result<Option<(u64, Option<Bytes>)>, KvError> {
        let subject = self.subject(key)?;
        let which = Get { last_by_subj: Some(&subject), ..Get::default() };
        let stored = raw::leader_get(&self.nats, self.bucket.stream(), &which).await?;
        Ok(stored.map(|stored| {
            let deleted = stored.headers.as_ref().is_some_and(is_deletion);
            (stored.seq, (!deleted).then_some(stored.payload))
        }))
    }

    async fn write(&self, key: &str, value: &T, expected: Option<u64>) -> Result<u64, KvError> {
        let message = raw::json_message(codec::to_json(value).map_err(KvError::Encode)?);
        self.publish(key, message, expected).await
    }

    async fn publish(&self, key: &str, mut message: PublishMessage, expected: Option<u64>) -> Result<u64, KvError> {
        if let Some(revision) = expected {
            message = message.expected_last_subject_sequence(revision);
        }
        match raw::publish(&self.nats, self.subject(key)?, message).await {
            Ok(ack) => Ok(ack.sequence),
            Err(error) if error.is_conflict() => Err(KvError::Conflict { key: key.to_owned() }),
            Err(error) => Err(error.into()),
        }
    }

    fn subject(&self, key: &str) -> Result<String, KvError> {
        if !is_key(key) {
            return Err(KvError::BadKey);
        }
        Ok(format!("$KV.{}.{key}", self.bucket.as_str()))
    }
}

const OPERATION: &str = "KV-Operation";

fn is_key(key: &str) -> bool {
    key.len() <= 256 && key.split('.').all(|token| id::check(token).is_ok())
}

/// Deletions carry no value: a marker of ours or the client tools', or one the server left.
fn is_deletion(headers: &HeaderMap) -> bool {
    headers.get(OPERATION).is_some_and(|operation| matches!(operation.as_str(), "DEL" | "PURGE"))
        || headers.get("Nats-Marker-Reason").is_some()
}

fn bytes_of(message: &Message) -> Option<&Bytes> {
    let deleted = message.headers.as_ref().is_some_and(is_deletion);
    (!deleted).then_some(&message.payload)
}

fn key_of(bucket: Bucket, message: &Message) -> Option<&str> {
    message.subject.strip_prefix("$KV.")?.strip_prefix(bucket.as_str())?.strip_prefix('.')
}

fn decode<T: DeserializeOwned>(key: &str, revision: u64, bytes: &[u8]) -> Result<T, KvError> {
    codec::from_json(bytes).map_err(|source| KvError::Malformed { key: key.to_owned(), revision, source })
}

/// Follows a bucket for ever.
pub struct Watch<T> {
    bucket: Bucket,
    feed: Feed,
    _t: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Watch<T> {
    /// The next change. Survives reconnects and leader changes; after an error the next call goes on, and
    /// `Server(Closed)` is the end. A key that changed twice while the connection was down may show only its last state.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Result<Change<T>, KvError> {
        loop {
            let message = self.feed.next().await?;
            let Some(key) = key_of(self.bucket, &message) else { continue };
            let value = bytes_of(&message).map(|bytes| decode(key, message.seq, bytes)).transpose()?;
            return Ok(Change { key: key.to_owned(), value, revision: message.seq, pending: message.pending });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_subjects_of_plain_tokens() {
        for good in ["a", "gpu-1.inc_2", &"x".repeat(64)] {
            assert!(is_key(good), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "*", "a.>", "é", "a\n", &"x".repeat(65)] {
            assert!(!is_key(bad), "{bad:?}");
        }
    }
}
