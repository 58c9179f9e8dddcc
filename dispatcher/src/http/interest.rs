//! Whether somebody looks at what is read for pages, and what one does about it: streams are read only meanwhile.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;
use voxfleet_nats::{ServerError, retry::Backoff, transcript::ReadError};

/// Whoever looked is expected to look again for so long.
const LASTS: Duration = Duration::from_secs(40);

/// Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Interest(Arc<watch::Sender<Option<Instant>>>);

impl Default for Interest {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl Interest {
    /// Somebody looks now.
    pub(crate) fn want(&self) {
        self.0.send_replace(Some(Instant::now() + LASTS));
    }

    /// Waits until somebody looks.
    pub(crate) async fn begins(&self) {
        let mut until = self.0.subscribe();
        // In vain only if no sender were left, and this is one.
        let _ = until.wait_for(|until| until.is_some_and(|until| Instant::now() < until)).await;
    }

    /// Waits until nobody looks any more.
    pub(crate) async fn ends(&self) {
        loop {
            let until = *self.0.borrow();
            let Some(left) = until.and_then(|until| until.checked_duration_since(Instant::now())) else { return };
            tokio::time::sleep(left).await;
        }
    }
}

/// After an attempt to read: waits where that helps. An error: the connection is closed.
pub(crate) async fn after<T>(
    what: &'static str,
    read: Result<T, ReadError>,
    backoff: &mut Backoff,
) -> Result<Option<T>, ServerError> {
    match read {
        Ok(read) => {
            *backoff = Backoff::default();
            return Ok(Some(read));
        }
        Err(ReadError::Server(ServerError::Closed)) => return Err(ServerError::Closed),
        Err(ReadError::Malformed { seq, .. }) => tracing::debug!(seq, what, "a message of another kind"),
        Err(error) => {
            tracing::debug!(%error, what, "not readable now");
            backoff.wait().await;
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_lasts_as_long_as_somebody_looks_again() {
        // The clock of `Instant` runs on: what is compared here is what has been said, not how long it takes.
        let interest = Interest::default();
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, interest.begins()).await.is_err(), "nobody looks");
        tokio::time::timeout(soon, interest.ends()).await.expect("nobody looks");
        interest.want();
        tokio::time::timeout(soon, interest.begins()).await.expect("somebody looks");
        assert!(tokio::time::timeout(soon, interest.ends()).await.is_err(), "somebody looks");
    }
}
