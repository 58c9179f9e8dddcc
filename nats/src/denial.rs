//! What the server does not let us do. It says so once, on the connection and not to whoever asked, whose request then
//! looks like one that nobody answers: here the two are brought together.

use std::{
    collections::HashSet,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::broadcast;

use crate::ServerError;

/// One refusal in the server's words.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Denial {
    Publish(String),
    Subscribe(String),
}

impl Denial {
    /// None: the server complains of something else.
    pub(crate) fn parse(text: &str) -> Option<Denial> {
        let (head, rest) = text.split_once('"')?;
        let (subject, _) = rest.split_once('"')?;
        match head.trim().to_ascii_lowercase().as_str() {
            "permissions violation for publish to" => Some(Denial::Publish(subject.to_owned())),
            "permissions violation for subscription to" => Some(Denial::Subscribe(subject.to_owned())),
            _ => None,
        }
    }
}

/// Refusals that a reader may be behind by; who waits for one waits for its own only.
const BACKLOG: usize = 64;

/// Different refusals that are worth a log line on one connection.
const TOLD: usize = 64;

/// The refusals of one connection. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Denials {
    inbox_prefix: Arc<str>,
    said: broadcast::Sender<Arc<Denial>>,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Our own inbox: without it no answer ever comes, whatever is asked.
    inbox: Option<String>,
    told: HashSet<Denial>,
}

impl Denials {
    pub(crate) fn new(inbox_prefix: &str) -> Self {
        let (said, _) = broadcast::channel(BACKLOG);
        Self { inbox_prefix: format!("{inbox_prefix}.").into(), said, known: Arc::default() }
    }

    /// Returns whether it is worth a log line: what is tried each second is told once.
    pub(crate) fn hear(&self, denial: Denial) -> bool {
        let is_new = {
            let mut known = self.known();
            if let Denial::Subscribe(subject) = &denial
                && subject.starts_with(&*self.inbox_prefix)
            {
                known.inbox = Some(subject.clone());
            }
            known.told.len() < TOLD && known.told.insert(denial.clone())
        };
        // Nobody may be waiting for one just now.
        let _ = self.said.send(Arc::new(denial));
        is_new
    }

    /// A new connection asks for everything again.
    pub(crate) fn reset(&self) {
        *self.known() = Known::default();
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when the server refuses this publish, or any answer to it. Make it before publishing.
    pub(crate) fn publishing(&self, subject: &str) -> impl Future<Output = ServerError> + Send + use<> {
        let (mut said, denials, subject) = (self.said.subscribe(), self.clone(), subject.to_owned());
        async move {
            loop {
                if let Some(inbox) = denials.known().inbox.clone() {
                    return ServerError::NoInbox { inbox };
                }
                match said.recv().await.as_deref() {
                    Ok(Denial::Publish(refused)) if *refused == subject => {
                        return ServerError::Denied { what: "publish to", subject };
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    // The sender lives as long as this does.
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        }
    }

    /// From now on; see [`subscribing`].
    pub(crate) fn listen(&self) -> broadcast::Receiver<Arc<Denial>> {
        self.said.subscribe()
    }
}

/// Resolves when the server refuses the subscription to `subject`. Cancel-safe.
pub(crate) async fn subscribing(said: &mut broadcast::Receiver<Arc<Denial>>, subject: &str) -> ServerError {
    loop {
        match said.recv().await.as_deref() {
            Ok(Denial::Subscribe(refused)) if refused == subject => {
                return ServerError::Denied { what: "subscribe to", subject: refused.clone() };
            }
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn the_servers_words_are_read() {
        let publish = |s: &str| Some(Denial::Publish(s.to_owned()));
        for (text, want) in [
            (r#"Permissions Violation for Publish to "$JS.API.INFO""#, publish("$JS.API.INFO")),
            (r#"Permissions Violation for Publish to "a" using reply "b""#, publish("a")),
            (r#"permissions violation for publish to "A.b""#, publish("A.b")),
            (
                r#"Permissions Violation for Subscription to "_INBOX.x.*" using queue "q""#,
                Some(Denial::Subscribe("_INBOX.x.*".to_owned())),
            ),
            (r#"Permissions Violation for Publish with Reply of "x""#, None),
            ("Stale Connection", None),
            ("", None),
        ] {
            assert_eq!(Denial::parse(text), want, "{text}");
        }
    }

    #[test]
    fn only_ones_own_refusal_ends_ones_wait() {
        let denials = Denials::new("_INBOX");
        let mut mine = Box::pin(denials.publishing("mine"));
        denials.hear(Denial::Publish("other".to_owned()));
        denials.hear(Denial::Subscribe("mine".to_owned()));
        assert!((&mut mine).now_or_never().is_none());
        denials.hear(Denial::Publish("mine".to_owned()));
        let refused = mine.now_or_never();
        assert!(matches!(refused, Some(ServerError::Denied { subject, .. }) if subject == "mine"));
    }

    #[test]
    fn what_is_tried_again_and_again_is_logged_once() {
        let denials = Denials::new("_INBOX");
        let hear = |n: usize| denials.hear(Denial::Publish(n.to_string()));
        assert!(hear(1) && !hear(1) && hear(2));
        assert_eq!((0..1_000).filter(|n| hear(*n)).count(), TOLD - 2);
        denials.reset();
        assert!(hear(1));
    }

    #[test]
    fn without_an_inbox_nothing_is_waited_for_until_the_next_connection() {
        let denials = Denials::new("_INBOX");
        denials.hear(Denial::Subscribe("_INBOX_other.x.*".to_owned()));
        assert!(denials.publishing("a").now_or_never().is_none());
        denials.hear(Denial::Subscribe("_INBOX.x.*".to_owned()));
        assert!(matches!(denials.publishing("a").now_or_never(), Some(ServerError::NoInbox { .. })));
        denials.reset();
        assert!(denials.publishing("a").now_or_never().is_none());
    }
}
