//! A recording on its way from a request's body into the object store, as it comes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};
use tokio_util::io::StreamReader;
use voxfleet_http::{Refusal, axum::http::StatusCode};
use voxfleet_nats::{
    Nats,
    media::{Media, MediaError, digest_of},
};
use voxfleet_schema::{id::StreamId, job::audio_key};

/// A sender that sends nothing for so long has gone.
const STALLED: Duration = Duration::from_secs(30);
/// Of what is refused, this much is read for so long.
const POURED_BYTES: u64 = 256 << 20;
const POURED: Duration = Duration::from_secs(5);
/// When there may be room again: jobs end, and with them go their recordings.
const ROOM_LATER_MS: u64 = 60_000;

/// How its reading failed, inside an `io::Error`.
#[derive(Debug, thiserror::Error)]
enum Cut {
    #[error("there is room for {0} bytes")]
    TooLarge(u64),
    #[error("nothing came for {} s", STALLED.as_secs())]
    Stalled,
    #[error("the body breaks off")]
    Broken,
}

/// Puts it where workers find it. `is_known`: there is a job of this id already; its object is not written again, it may be
/// read just now, but this must be the same one.
pub(crate) async fn store<E>(
    nats: &Nats,
    id: &StreamId,
    body: impl Stream<Item = Result<Bytes, E>> + Send,
    is_known: bool,
) -> Result<(), Refusal> {
    let media = Media::new(nats);
    let key = audio_key(id);
    if is_known {
        // What has expired cannot be compared; then what there is of the job is what is asked for.
        let Some(stored) = media.info(&key).await.map_err(refused)? else { return Ok(()) };
        let reader = std::pin::pin!(reader(body));
        let digest = digest_of(reader).await.map_err(|error| refused(MediaError::Read(error)))?;
        return match stored.digest == Some(digest) {
            true => Ok(()),
            false => {
                let message = format!("there is a job {id} with another recording");
                Err(Refusal::new(StatusCode::CONFLICT, "bad_request", message))
            }
        };
    }
    let room = media.room().await.map_err(refused)?.unwrap_or(u64::MAX);
    let mut from = std::pin::pin!(reader(body));
    let limited = Limited { from: from.as_mut(), left: room, room };
    let stored = match media.put(&key, limited).await {
        Ok(stored) => stored,
        Err(error) => {
            pour_away(from).await;
            return Err(refused(error));
        }
    };
    if stored.bytes == 0 {
        forget(nats, id).await;
        return Err(Refusal::bad_request("the recording is empty"));
    }
    Ok(())
}

/// Reads on for a while: whoever still sends hears why he should not only when what he sent is read.
async fn pour_away(from: impl AsyncRead) {
    let mut rest = std::pin::pin!(from.take(POURED_BYTES));
    // Nobody misses it.
    let _ = tokio::time::timeout(POURED, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

/// The same with a body that was not looked at.
pub(crate) async fn pour_away_body<E>(body: impl Stream<Item = Result<Bytes, E>> + Send) {
    pour_away(reader(body)).await;
}

/// Takes away a recording that no job has.
pub(crate) async fn forget(nats: &Nats, id: &StreamId) {
    if let Err(error) = Media::new(nats).delete(&audio_key(id)).await {
        tracing::warn!(job = %id, %error, "an uploaded recording stays behind");
    }
}

fn reader<E>(body: impl Stream<Item = Result<Bytes, E>> + Send) -> impl AsyncRead + Send {
    let body = Box::pin(body.map_err(|_| io::Error::new(io::ErrorKind::UnexpectedEof, Cut::Broken)));
    let bounded = futures_util::stream::unfold(body, |mut body| async move {
        match tokio::time::timeout(STALLED, body.next()).await {
            Ok(next) => next.map(|next| (next, body)),
            Err(_) => Some((Err(io::Error::new(io::ErrorKind::TimedOut, Cut::Stalled)), body)),
        }
    });
    StreamReader::new(Box::pin(bounded))
}

/// Stops where the store is full.
struct Limited<R> {
    from: R,
    left: u64,
    room: u64,
}

impl<R: AsyncRead + Unpin> AsyncRead for Limited<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.from).poll_read(cx, into);
        let read = (into.filled().len() - before) as u64;
        match self.left.checked_sub(read) {
            Some(left) => self.left = left,
            None => {
                // Whoever reads an error may not find bytes beside it.
                into.set_filled(before);
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::StorageFull, Cut::TooLarge(self.room))));
            }
        }
        polled
    }
}

fn refused(error: MediaError) -> Refusal {
    match error {
        MediaError::Full => Refusal {
            retry_after_ms: Some(ROOM_LATER_MS),
            ..Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "no_capacity", "the object store is full")
        },
        MediaError::Read(error) => match error.downcast::<Cut>() {
            Ok(Cut::TooLarge(room)) => {
                let message = format!(
                    "the object store has room for {:.1} MB; send less, or give its URL to job.submit",
                    room as f64 / 1e6
                );
                Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
            }
            Ok(cut @ Cut::Stalled) => Refusal::new(StatusCode::REQUEST_TIMEOUT, "timeout", cut.to_string()),
            Ok(cut @ Cut::Broken) => Refusal::bad_request(cut.to_string()),
            Err(error) => Refusal::bad_request(error.to_string()),
        },
        other => Refusal::unavailable(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;

    #[tokio::test(start_paused = true)]
    async fn a_body_ends_whole_or_says_why() {
        let part = |text: &'static str| Ok::<_, &'static str>(Bytes::from_static(text.as_bytes()));
        let mut all = String::new();
        std::pin::pin!(reader(stream::iter([part("ab"), part("c")]))).read_to_string(&mut all).await.expect("read");
        assert_eq!(all, "abc");

        let broken = stream::iter([part("ab"), Err("gone")]);
        let stalled = stream::iter([part("ab")]).chain(stream::pending());
        let limited = Limited { from: std::pin::pin!(reader(stream::iter([part("abc")]))), left: 2, room: 2 };
        let mut bytes = Vec::new();
        let status = |error: io::Error| refused(MediaError::Read(error)).status.as_u16();
        let error = std::pin::pin!(reader(broken)).read_to_end(&mut bytes).await.expect_err("broken");
        assert_eq!(status(error), 400);
        let error = std::pin::pin!(reader(stalled)).read_to_end(&mut bytes).await.expect_err("stalled");
        assert_eq!(status(error), 408);
        let error = std::pin::pin!(limited).read_to_end(&mut bytes).await.expect_err("too large");
        assert_eq!(status(error), 413);
        assert_eq!(refused(MediaError::Full).retry_after_ms, Some(ROOM_LATER_MS));
    }
}
