//! A recording on its way from a request's body into the object store, as it comes, under a name that no other upload has.

use std::{io, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio_util::io::StreamReader;
use voxfleet_http::{Refusal, axum::http::StatusCode};
use voxfleet_nats::{
    Nats,
    media::{Media, MediaError, digest_of},
};

use super::{
    body::{Cut, ROOM_LATER_MS, Why},
    promise::{Promise, STEP},
};

/// Of what is refused, this much is read for so long.
const POURED_BYTES: u64 = 256 << 20;
const POURED: Duration = Duration::from_secs(5);

/// What one upload may take.
pub(super) struct Allowed {
    pub(super) promise: Promise,
    pub(super) max_bytes: u64,
    pub(super) why: Why,
}

/// Puts it under `key`, where workers find it; gives its digest.
pub(super) async fn store<E>(
    nats: &Nats,
    key: &str,
    body: impl Stream<Item = Result<Bytes, E>> + Send,
    allowed: &mut Allowed,
) -> Result<Option<String>, Refusal> {
    let media = Media::new(nats);
    let why = allowed.why.clone();
    let mut from = std::pin::pin!(reader(bounded(&media, body, allowed)));
    let stored = match media.put(key, from.as_mut()).await {
        Ok(stored) => stored,
        Err(error) => {
            // Now: what is poured away may end in some other way.
            let refusal = refused(error, &why);
            pour_away(from).await;
            return Err(refusal);
        }
    };
    if stored.bytes == 0 {
        forget(nats, key).await;
        return Err(Refusal::bad_request("the recording is empty"));
    }
    Ok(stored.digest)
}

/// Its digest alone.
pub(super) async fn digest<E>(body: impl Stream<Item = Result<Bytes, E>> + Send, why: &Why) -> Result<String, Refusal> {
    let body = body.map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof));
    let digest = digest_of(std::pin::pin!(reader(body))).await;
    digest.map_err(|error| refused(MediaError::Read(error), why))
}

/// The digest of what is stored; none where it is there no longer.
pub(super) async fn stored_digest(nats: &Nats, key: &str, why: &Why) -> Result<Option<String>, Refusal> {
    let stored = Media::new(nats).info(key).await.map_err(|error| refused(error, why))?;
    Ok(stored.and_then(|stored| stored.digest))
}

/// Reads on for a while: whoever still sends hears why he should not only when what he sent is read.
async fn pour_away(from: impl AsyncRead) {
    let mut rest = std::pin::pin!(from.take(POURED_BYTES));
    // Nobody misses it.
    let _ = tokio::time::timeout(POURED, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

/// The same with a body that was not looked at.
pub(super) async fn pour_away_body<E>(body: impl Stream<Item = Result<Bytes, E>> + Send) {
    pour_away(reader(body.map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof)))).await;
}

/// Takes away a recording that no job has.
pub(super) async fn forget(nats: &Nats, key: &str) {
    if let Err(error) = Media::new(nats).delete(key).await {
        tracing::warn!(key, %error, "an uploaded recording stays behind");
    }
}

fn reader(body: impl Stream<Item = Result<Bytes, io::Error>> + Send) -> impl AsyncRead + Send {
    StreamReader::new(Box::pin(body))
}

/// Stops at the largest recording, and where the store has no room for more. What comes behind may still be read, to be poured
/// away.
fn bounded<'a, E>(
    media: &'a Media,
    body: impl Stream<Item = Result<Bytes, E>> + Send + 'a,
    allowed: &'a mut Allowed,
) -> impl Stream<Item = Result<Bytes, io::Error>> + Send + 'a {
    let body = Box::pin(body.map_err(|_| ()));
    stream::unfold((body, allowed, 0u64), move |(mut body, allowed, got)| async move {
        let next = body.next().await?;
        let (item, got) = match next {
            Ok(bytes) => {
                let len = bytes.len() as u64;
                let taken = take(media, allowed, got + len, len).await;
                (taken.map(|()| bytes), got + len)
            }
            Err(()) => {
                allowed.why.set(Cut::Broken);
                (Err(io::Error::from(io::ErrorKind::UnexpectedEof)), got)
            }
        };
        Some((item, (body, allowed, got)))
    })
}

/// `len` more bytes, `got` with them.
async fn take(media: &Media, allowed: &mut Allowed, got: u64, len: u64) -> Result<(), io::Error> {
    let cut = |cut: Cut| io::Error::other(allowed.why.set(cut));
    if got > allowed.max_bytes {
        return Err(cut(Cut::TooLarge(allowed.max_bytes)));
    }
    match reach(media, &mut allowed.promise, len, STEP).await {
        Ok(()) => {
            allowed.promise.came(len);
            Ok(())
        }
        Err(NoRoom::Cut(why)) => Err(cut(why)),
        Err(NoRoom::Media(error)) => Err(error.into()),
    }
}

/// Why there is no room.
pub(super) enum NoRoom {
    Cut(Cut),
    Media(MediaError),
}

impl From<Cut> for NoRoom {
    fn from(cut: Cut) -> Self {
        NoRoom::Cut(cut)
    }
}

/// Makes sure of room for so many bytes more.
pub(super) async fn reach(media: &Media, promise: &mut Promise, need: u64, want: u64) -> Result<(), NoRoom> {
    promise.reach(need, want, async { media.room().await.map_err(NoRoom::Media) }).await
}

pub(super) fn refused(error: MediaError, why: &Why) -> Refusal {
    if let Some(cut) = why.cut() {
        return cut.refusal();
    }
    match error {
        MediaError::Full => Refusal {
            retry_after_ms: Some(ROOM_LATER_MS),
            ..Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "no_capacity", "the object store is full")
        },
        MediaError::Read(error) => match MediaError::of(error) {
            MediaError::Read(error) => Refusal::bad_request(error.to_string()),
            // Of the store, while it was asked for room.
            error => refused(error, why),
        },
        other => Refusal::unavailable(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_that_is_known_is_told_in_place_of_a_readers_error() {
        let read = || MediaError::Read(io::Error::from(io::ErrorKind::UnexpectedEof));
        assert_eq!(refused(read(), &Why::default()).status.as_u16(), 400);
        let why = Why::default();
        why.set(Cut::Stalled);
        why.set(Cut::Broken);
        assert_eq!(refused(read(), &why).status.as_u16(), 408, "the first one");
        assert_eq!(refused(MediaError::Full, &Why::default()).retry_after_ms, Some(ROOM_LATER_MS));
        let asked = MediaError::Read(MediaError::Full.into());
        assert_eq!(refused(asked, &Why::default()).status.as_u16(), 503);
    }
}
