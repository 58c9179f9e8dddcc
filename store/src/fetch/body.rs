//! What a body is held to while it comes, whatever its source: pace, size, and the length it announced.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream, stream::BoxStream};
use tokio::time::{Instant, timeout};

use super::FetchError;

/// The minute of "a minimum rate over a minute".
const WINDOW: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) stall: Duration,
    /// 0 = none.
    pub(super) min_bytes_per_s: u64,
    pub(super) max_bytes: u64,
}

impl Limits {
    /// Refuses what announces itself as too large, before a byte of it is read.
    pub(super) fn admit(&self, at: &str, total: Option<u64>) -> Result<(), FetchError> {
        match total {
            Some(total) if total > self.max_bytes => Err(too_large(at, self.max_bytes, Some(total))),
            _ => Ok(()),
        }
    }
}

fn too_large(at: &str, max: u64, total: Option<u64>) -> FetchError {
    let size = total.map_or_else(|| "its".to_owned(), |t| format!("{t}"));
    let why = match total {
        Some(_) => format!("{size} bytes, the limit is {max} (worker.fetch.max_bytes)"),
        None => format!("more than {max} bytes (worker.fetch.max_bytes)"),
    };
    FetchError::TooLarge { at: at.to_owned(), why }
}

/// Time spent waiting for bytes, and what came. The reader's own slowness is not held against the source.
#[derive(Debug)]
struct Pace {
    min_bytes_per_s: u64,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// False when the source has been too slow over a whole window.
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

struct Watched {
    /// None once it has ended, well or badly.
    inner: Option<BoxStream<'static, Result<Bytes, FetchError>>>,
    at: String,
    limits: Limits,
    pace: Pace,
    got: u64,
    total: Option<u64>,
}

/// A body from byte `from` on. It ends at `total` where that is known, or in an error; nothing follows an error.
pub(super) fn watched(
    inner: BoxStream<'static, Result<Bytes, FetchError>>,
    at: String,
    limits: Limits,
    from: u64,
    total: Option<u64>,
) -> BoxStream<'static, Result<Bytes, FetchError>> {
    let pace = Pace { min_bytes_per_s: limits.min_bytes_per_s, waited: Duration::ZERO, bytes: 0 };
    let state = Watched { inner: Some(inner), at, limits, pace, got: from, total };
    stream::unfold(state, |mut state| async move {
        let item = state.next().await?;
        if item.is_err() {
            state.inner = None;
        }
        Some((item, state))
    })
    .boxed()
}

impl Watched {
    async fn next(&mut self) -> Option<Result<Bytes, FetchError>> {
        let inner = self.inner.as_mut()?;
        let begun = Instant::now();
        let Ok(item) = timeout(self.limits.stall, inner.next()).await else {
            let why = format!("no byte for {:?}", self.limits.stall);
            return Some(Err(FetchError::Timeout { at: self.at.clone(), why }));
        };
        match item {
            Some(Ok(bytes)) => Some(self.judge(bytes, begun.elapsed())),
            Some(Err(error)) => Some(Err(error)),
            None => {
                self.inner = None;
                let total = self.total.filter(|total| *total > self.got)?;
                let why = format!("it broke off after {} of {total} bytes", self.got);
                Some(Err(FetchError::Unavailable { at: self.at.clone(), why, retry_after: None }))
            }
        }
    }

    fn judge(&mut self, bytes: Bytes, waited: Duration) -> Result<Bytes, FetchError> {
        let len = bytes.len() as u64;
        self.got += len;
        if let Some(total) = self.total.filter(|total| self.got > *total) {
            let why = format!("the server sends more than the {total} bytes it announced");
            return Err(FetchError::TooLarge { at: self.at.clone(), why });
        }
        if self.got > self.limits.max_bytes {
            return Err(too_large(&self.at, self.limits.max_bytes, None));
        }
        if !self.pace.goes_on(waited, len) {
            let (min_bytes_per_s, window_s) = (self.limits.min_bytes_per_s, WINDOW.as_secs());
            return Err(FetchError::TooSlow { at: self.at.clone(), min_bytes_per_s, window_s });
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { stall: Duration::from_secs(30), min_bytes_per_s: 1_000, max_bytes: 1_000_000 };

    /// `chunks` of `len` bytes, one each `every`; then an end, or silence.
    fn source(chunks: usize, len: usize, every: Duration, ends: bool) -> BoxStream<'static, Result<Bytes, FetchError>> {
        let made = stream::unfold(0, move |n| async move {
            if n == chunks {
                if !ends {
                    std::future::pending::<()>().await;
                }
                return None;
            }
            tokio::time::sleep(every).await;
            Some((Ok(Bytes::from(vec![0; len])), n + 1))
        });
        made.boxed()
    }

    async fn read(
        inner: BoxStream<'static, Result<Bytes, FetchError>>,
        from: u64,
        total: Option<u64>,
    ) -> (usize, Option<FetchError>) {
        let mut body = watched(inner, "https://h/a".to_owned(), LIMITS, from, total);
        let mut got = 0;
        while let Some(item) = body.next().await {
            match item {
                Ok(bytes) => got += bytes.len(),
                Err(error) => {
                    assert!(body.next().await.is_none(), "something follows an error");
                    return (got, Some(error));
                }
            }
        }
        (got, None)
    }

    #[tokio::test(start_paused = true)]
    async fn a_steady_body_comes_through() {
        let (got, error) = read(source(200, 2_000, Duration::from_secs(1), true), 0, Some(400_000)).await;
        assert_eq!(got, 400_000);
        assert!(error.is_none(), "{error:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_timeout() {
        let (got, error) = read(source(3, 100, Duration::ZERO, false), 0, None).await;
        assert_eq!(got, 300);
        assert!(matches!(error, Some(FetchError::Timeout { .. })), "{error:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_now_and_then_does_not_keep_it_alive() {
        let begun = Instant::now();
        let (_, error) = read(source(10_000, 1, Duration::from_secs(5), true), 0, None).await;
        assert!(matches!(error, Some(FetchError::TooSlow { .. })), "{error:?}");
        assert!(begun.elapsed() <= Duration::from_secs(65), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_is_not_the_servers_fault() {
        let mut body = watched(source(100, 10, Duration::ZERO, true), "https://h/a".to_owned(), LIMITS, 0, None);
        while let Some(item) = body.next().await {
            assert!(item.is_ok(), "{item:?}");
            tokio::time::sleep(Duration::from_secs(10)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn lengths_are_kept() {
        let (got, error) = read(source(2, 100, Duration::ZERO, true), 0, Some(300)).await;
        assert_eq!(got, 200);
        assert!(matches!(error, Some(FetchError::Unavailable { .. })), "{error:?}");
        let (_, error) = read(source(4, 100, Duration::ZERO, true), 0, Some(300)).await;
        assert!(matches!(error, Some(FetchError::TooLarge { .. })), "{error:?}");
        // From the middle on, positions count from there.
        let (got, error) = read(source(2, 100, Duration::ZERO, true), 100, Some(300)).await;
        assert_eq!((got, error.is_none()), (200, true));
        let (_, error) = read(source(11, 100_000, Duration::ZERO, true), 0, None).await;
        assert!(matches!(error, Some(FetchError::TooLarge { .. })), "{error:?}");
    }
}
