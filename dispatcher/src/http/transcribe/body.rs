//! A request's body as it is waited for: all of it, the form around a recording too, so that nobody holds a place by sending
//! half a word.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use tokio::time::{Instant, timeout_at};
use voxfleet_http::{Refusal, axum::http::StatusCode};

use super::super::limits::UploadLimits;

/// A sender that sends nothing for so long has gone.
const STALLED: Duration = Duration::from_secs(30);
/// Over which its pace is judged.
const WINDOW: Duration = Duration::from_secs(60);
/// A form's own words around a recording.
pub(super) const FORM_BYTES: u64 = 1 << 20;
/// When there may be room again: jobs end, and with them go their recordings.
pub(super) const ROOM_LATER_MS: u64 = 60_000;

/// Why an upload was not read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Cut {
    #[error("nothing came for {stalled_s} s", stalled_s = STALLED.as_secs())]
    Stalled,
    #[error("less than {0} bytes per second came over {window_s} s", window_s = WINDOW.as_secs())]
    TooSlow(u64),
    #[error("it did not come within {0} s")]
    TooLate(u64),
    #[error("it has more than {0} bytes, the largest recording that is taken; give its URL to job.submit")]
    TooLarge(u64),
    #[error("the object store has room for {mb:.1} MB; send less, or give its URL to job.submit", mb = *.0 as f64 / 1e6)]
    NoRoom(u64),
    #[error("other recordings that come in take the room that the object store has")]
    Crowded,
    #[error("the body breaks off")]
    Broken,
}

impl Cut {
    pub(super) fn refusal(self) -> Refusal {
        let (status, class) = match self {
            Cut::Stalled | Cut::TooSlow(_) | Cut::TooLate(_) => (StatusCode::REQUEST_TIMEOUT, "timeout"),
            Cut::TooLarge(_) | Cut::NoRoom(_) => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            Cut::Crowded => (StatusCode::SERVICE_UNAVAILABLE, "no_capacity"),
            Cut::Broken => (StatusCode::BAD_REQUEST, "bad_request"),
        };
        let retry_after_ms = (self == Cut::Crowded).then_some(ROOM_LATER_MS);
        Refusal { retry_after_ms, ..Refusal::new(status, class, self.to_string()) }
    }
}

/// The first reason, for whoever hears of it from a parser that knows none.
#[derive(Debug, Clone, Default)]
pub(super) struct Why(Arc<OnceLock<Cut>>);

impl Why {
    pub(super) fn set(&self, cut: Cut) -> Cut {
        *self.0.get_or_init(|| cut)
    }

    pub(super) fn cut(&self) -> Option<Cut> {
        self.0.get().copied()
    }
}

/// Time spent waiting for bytes, and what came. A slow store is not held against the sender.
#[derive(Debug)]
struct Pace {
    min_bytes_per_s: u64,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// False where it was too slow over a whole window.
    fn goes_on(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < WINDOW {
            return true;
        }
        let enough = self.bytes as f64 >= self.min_bytes_per_s as f64 * self.waited.as_secs_f64();
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        enough
    }
}

struct Watched<S> {
    body: Pin<Box<S>>,
    until: Instant,
    limits: UploadLimits,
    pace: Pace,
    got: u64,
    why: Why,
}

/// Gives what comes, in time and no more than may; behind an error nothing comes.
pub(super) fn watched<S: Stream<Item = Result<Bytes, E>> + Send, E>(
    body: S,
    limits: &UploadLimits,
    why: Why,
) -> impl Stream<Item = Result<Bytes, Cut>> + Send + use<S, E> {
    let watched = Watched {
        body: Box::pin(body),
        until: Instant::now() + Duration::from_secs(limits.total_timeout_s),
        pace: Pace { min_bytes_per_s: limits.min_bytes_per_s, waited: Duration::ZERO, bytes: 0 },
        limits: limits.clone(),
        got: 0,
        why,
    };
    stream::unfold(Some(watched), |watched| async move {
        let mut watched = watched?;
        match watched.next().await? {
            Ok(bytes) => Some((Ok(bytes), Some(watched))),
            Err(cut) => Some((Err(watched.why.set(cut)), None)),
        }
    })
}

impl<S: Stream<Item = Result<Bytes, E>>, E> Watched<S> {
    async fn next(&mut self) -> Option<Result<Bytes, Cut>> {
        let begun = Instant::now();
        let came = timeout_at(self.until.min(begun + STALLED), self.body.next()).await;
        Some(match came {
            Err(_) if Instant::now() >= self.until => Err(Cut::TooLate(self.limits.total_timeout_s)),
            Err(_) => Err(Cut::Stalled),
            Ok(None) => return None,
            Ok(Some(Err(_))) => Err(Cut::Broken),
            Ok(Some(Ok(bytes))) => self.judge(bytes, begun.elapsed()),
        })
    }

    fn judge(&mut self, bytes: Bytes, waited: Duration) -> Result<Bytes, Cut> {
        self.got += bytes.len() as u64;
        if self.got > self.limits.max_bytes.saturating_add(FORM_BYTES) {
            return Err(Cut::TooLarge(self.limits.max_bytes));
        }
        if Instant::now() >= self.until {
            return Err(Cut::TooLate(self.limits.total_timeout_s));
        }
        match self.pace.goes_on(waited, bytes.len() as u64) {
            true => Ok(bytes),
            false => Err(Cut::TooSlow(self.limits.min_bytes_per_s)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    type Part = (u64, Result<usize, &'static str>);

    /// Parts of so many bytes, each after so many seconds; then the body stays open.
    fn body(parts: Vec<Part>) -> impl Stream<Item = Result<Bytes, &'static str>> + Send {
        let come = stream::iter(parts).then(|(after_s, part)| async move {
            sleep(Duration::from_secs(after_s)).await;
            part.map(|len| Bytes::from(vec![0; len]))
        });
        come.chain(stream::pending())
    }

    async fn cut(parts: Vec<Part>) -> (Cut, u64) {
        let limits = UploadLimits { max_bytes: 1 << 20, total_timeout_s: 600, ..UploadLimits::default() };
        let (why, begun) = (Why::default(), Instant::now());
        let mut watched = Box::pin(watched(body(parts), &limits, why.clone()));
        let told = loop {
            match watched.next().await.expect("it is cut") {
                Ok(_) => {}
                Err(cut) => break cut,
            }
        };
        assert!(watched.next().await.is_none(), "behind an error nothing comes");
        assert_eq!(why.cut(), Some(told));
        (told, begun.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_waited_for_beyond_his_time() {
        assert_eq!(cut(vec![(5, Ok(100))]).await, (Cut::Stalled, 35));
        // A byte now and then is no pace.
        assert_eq!(cut(vec![(29, Ok(1)); 100]).await, (Cut::TooSlow(2_048), 87));
        assert_eq!(cut(vec![(1, Ok(2_048)); 1_000]).await, (Cut::TooLate(600), 600));
        assert_eq!(cut(vec![(0, Ok(1 << 20)), (0, Ok(1 << 20)), (0, Ok(1))]).await.0, Cut::TooLarge(1 << 20));
        assert_eq!(cut(vec![(1, Ok(1)), (1, Err("gone"))]).await, (Cut::Broken, 2));
    }

    #[test]
    fn each_reason_has_its_status() {
        for (cut, status, class) in [
            (Cut::Stalled, 408, "timeout"),
            (Cut::TooSlow(1), 408, "timeout"),
            (Cut::TooLate(1), 408, "timeout"),
            (Cut::TooLarge(1), 413, "too_large"),
            (Cut::NoRoom(1), 413, "too_large"),
            (Cut::Crowded, 503, "no_capacity"),
            (Cut::Broken, 400, "bad_request"),
        ] {
            let refusal = cut.refusal();
            assert_eq!((refusal.status.as_u16(), refusal.class.as_str()), (status, class), "{cut}");
            assert_eq!(refusal.retry_after_ms.is_some(), status == 503);
        }
    }
}
