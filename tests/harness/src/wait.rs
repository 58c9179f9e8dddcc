//! Poll with a deadline.

use std::{
    future::Future,
    time::{Duration, Instant},
};

/// The condition did not come true.
#[derive(Debug, thiserror::Error)]
#[error("not within {deadline:?}: {what}")]
pub struct NotInTime {
    pub what: String,
    pub deadline: Duration,
}

/// The condition came true, and should not have.
#[derive(Debug, thiserror::Error)]
#[error("within {within:?}: {what}")]
pub struct Happened {
    pub what: String,
    pub within: Duration,
}

/// Asks `probe` again and again for as long as `within`; what it gives is what should not have happened.
pub async fn never<F, Fut>(within: Duration, mut probe: F) -> Result<(), Happened>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<String>>,
{
    let started = Instant::now();
    while started.elapsed() < within {
        if let Some(what) = probe().await {
            return Err(Happened { what, within: started.elapsed() });
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Asks `probe` until it gives something, at most for `deadline`. The first question comes at once.
pub async fn eventually<T, F, Fut>(what: impl Into<String>, deadline: Duration, mut probe: F) -> Result<T, NotInTime>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let what = what.into();
    let started = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        match tokio::time::timeout(deadline.saturating_sub(started.elapsed()), probe()).await {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if started.elapsed() < deadline => {}
            _ => return Err(NotInTime { what, deadline }),
        }
        tokio::time::sleep(pause).await;
        // Quick at first, so that what takes milliseconds costs milliseconds; then easy on two cores.
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
