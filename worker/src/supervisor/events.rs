//! Events on their way out: one bounded queue for the whole worker, so that nobody waits for an event to be stored.

use tokio::sync::mpsc;
use voxfleet_nats::{
    publish::{PublishError, Publisher},
    retry::Backoff,
};
use voxfleet_schema::event::Event;

const WAITING: usize = 1_024;
/// About ten seconds; then an event is worth less than those behind it.
const ATTEMPTS: u32 = 8;

#[derive(Debug, Clone)]
pub(crate) struct Events {
    queue: mpsc::Sender<(Event, Option<String>)>,
}

pub(super) struct EventQueue(mpsc::Receiver<(Event, Option<String>)>);

impl Events {
    pub(super) fn new() -> (Self, EventQueue) {
        let (queue, waiting) = mpsc::channel(WAITING);
        (Self { queue }, EventQueue(waiting))
    }

    /// Says it, once under the same `msg_id`. When the queue is full the event is logged and lost: it is for people.
    pub(crate) fn tell(&self, event: Event, msg_id: Option<String>) {
        tracing::debug!(id = event.id, what = event.what.as_str(), seq = event.seq, "event");
        if let Err(error) = self.queue.try_send((event, msg_id)) {
            let (event, _) = match &error {
                mpsc::error::TrySendError::Full(lost) | mpsc::error::TrySendError::Closed(lost) => lost,
            };
            tracing::warn!(id = event.id, what = event.what.as_str(), %error, "event lost");
        }
    }
}

impl EventQueue {
    /// Publishes until every sender is gone and the queue is empty.
    pub(super) async fn run(mut self, publisher: Publisher) {
        while let Some((event, msg_id)) = self.0.recv().await {
            let mut backoff = Backoff::default();
            for attempt in 1..=ATTEMPTS {
                let sent = match &msg_id {
                    Some(msg_id) => publisher.event_once(&event, msg_id).await,
                    None => publisher.event(&event).await,
                };
                match sent {
                    Ok(()) => break,
                    Err(PublishError::Server(error)) if error.is_transient() && attempt < ATTEMPTS => {
                        backoff.wait().await;
                    }
                    Err(error) => {
                        tracing::warn!(
                            id = event.id,
                            what = event.what.as_str(),
                            attempt,
                            error = &error as &dyn std::error::Error,
                            "event not stored"
                        );
                        break;
                    }
                }
            }
        }
    }
}
