//! Reads finals and their revisions, partials and events as they come and hands what is news to a [`Screen`], until told to stop.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats,
    retry::Backoff,
    transcript::{self, Filter, Read, ReadError, Said, Start},
};
use voxfleet_schema::{
    event::Event,
    transcript::{Final, Partial, Revision},
};

use super::{screen::Screen, view::View};

/// How long the past is read before the present is shown, when no final says that it is the last one kept.
const CATCH_UP: Duration = Duration::from_millis(500);

/// What to follow.
pub(crate) struct Follow {
    pub(crate) filter: Filter,
    /// What is kept of the past too.
    pub(crate) from_start: bool,
    pub(crate) until_end: bool,
}

/// Why following ended.
#[derive(Debug)]
pub(crate) enum Followed {
    /// The end final of the session came.
    Ended(Box<Final>),
    Stopped,
}

/// When the sound at this position (ms of audio) was published, as ms ago; where the caller knows it.
pub(crate) type Lag<'a> = &'a (dyn Fn(u64) -> Option<u64> + Send + Sync);

#[derive(Debug, thiserror::Error)]
pub(crate) enum FollowError {
    #[error("the connection to NATS is closed")]
    Closed,
    #[error("cannot write to standard output")]
    Output(#[from] std::io::Error),
}

/// `seen` is told every new final.
pub(crate) async fn follow(
    nats: &Nats,
    what: &Follow,
    screen: &mut Screen,
    lag: Lag<'_>,
    seen: &mut (dyn FnMut(&Final) + Send),
    stop: &CancellationToken,
) -> Result<Followed, FollowError> {
    let mut seen = |news: Seen<'_>| {
        if let Seen::Final(value) = news {
            seen(value)
        }
    };
    follow_all(nats, what, screen, lag, &mut seen, stop).await
}

/// What a follower came by.
#[derive(Clone, Copy)]
pub(crate) enum Seen<'a> {
    /// New, each once.
    Final(&'a Final),
    /// New, each once; of a final that came before it.
    Revision(&'a Revision),
    /// As it came, old epochs and all.
    Partial(#[cfg_attr(not(feature = "bench"), expect(dead_code, reason = "the demo looks at it"))] &'a Partial),
    Event(&'a Event),
}

/// `seen` is told every new final and revision, every partial and every event.
pub(crate) async fn follow_all(
    nats: &Nats,
    what: &Follow,
    screen: &mut Screen,
    lag: Lag<'_>,
    seen: &mut (dyn FnMut(Seen<'_>) + Send),
    stop: &CancellationToken,
) -> Result<Followed, FollowError> {
    let (past, present) =
        if what.from_start { (Start::First, Start::LastPerSubject) } else { (Start::New, Start::New) };
    // Of one reader, so that they come in the order in which they stand.
    let mut said = transcript::said(nats, &what.filter, past);
    let mut events = transcript::events(nats, &what.filter, past);
    let mut partials = transcript::partials(nats, &what.filter, present);
    let mut view = View::default();
    let mut backoff = Backoff::default();
    // Until the past has been read, a partial would stand above finals that belong before it.
    let mut caught_up = !what.from_start;
    let mut end: Option<Box<Final>> = None;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(Followed::Stopped),
            read = said.next() => {
                let Some(read) = good(read, nats, &mut backoff).await? else { continue };
                let last = read.pending == 0;
                caught_up |= last;
                match read.value {
                    Said::Final(value) => {
                        if let Some(news) = view.on_final(&value) {
                            let heard_ms = value.segments.last().map(|s| s.end_ms);
                            screen.show(&news, heard_ms.and_then(lag))?;
                            seen(Seen::Final(&value));
                        }
                        end = Some(value).filter(|value| value.end);
                    }
                    Said::Revision(value) => {
                        if let Some(news) = view.on_revision(&value) {
                            screen.show(&news, None)?;
                            seen(Seen::Revision(&value));
                        }
                    }
                }
                // An end in the past may have been followed by more audio.
                if what.until_end && last && let Some(end) = end.take() {
                    return Ok(Followed::Ended(end));
                }
            }
            read = events.next() => {
                let Some(read) = good(read, nats, &mut backoff).await? else { continue };
                if let Some(news) = view.on_event(&read.value) {
                    screen.show(&news, None)?;
                }
                seen(Seen::Event(&read.value));
            }
            read = partials.next(), if caught_up => {
                let Some(read) = good(read, nats, &mut backoff).await? else { continue };
                if let Some(news) = view.on_partial(&read.value) {
                    screen.show(&news, None)?;
                }
                seen(Seen::Partial(&read.value));
            }
            () = tokio::time::sleep(CATCH_UP), if !caught_up => caught_up = true,
        }
    }
}

/// A read that failed is logged and tried again; a connection that is closed for good ends it.
pub(crate) async fn good<T>(
    read: Result<Read<T>, ReadError>,
    nats: &Nats,
    backoff: &mut Backoff,
) -> Result<Option<Read<T>>, FollowError> {
    match read {
        Ok(read) => {
            *backoff = Backoff::default();
            Ok(Some(read))
        }
        Err(error @ ReadError::Malformed { .. }) => {
            tracing::warn!(%error, "passing over a message");
            Ok(None)
        }
        Err(error) => {
            if nats.connection_events().borrow().closed {
                return Err(FollowError::Closed);
            }
            tracing::warn!(%error, "reading again");
            backoff.wait().await;
            Ok(None)
        }
    }
}
