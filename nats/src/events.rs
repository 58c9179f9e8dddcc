//! Events on their way out: one bounded queue for a process, so that nobody waits for an event to be stored.
//!
//! They are stored in the order in which they were told, one after the other. While the stream does not answer, the first is
//! sent again and again under the same message id, so that the server stores it once however often it arrives (within the
//! stream's window for duplicates, two minutes). What is told meanwhile waits; when too many wait, the oldest goes: the
//! newest say how things are now.

use std::collections::VecDeque;

use tokio::sync::mpsc;
use voxfleet_schema::event::Event;

use crate::{
    Nats, ServerError,
    publish::{PublishError, Publisher},
    retry::Backoff,
};

/// Events that wait: minutes of a busy fleet, a few MB.
const WAITING: usize = 4_096;
/// On their way to the queue's task, which only moves them: as many as a dispatcher may tell in one turn, before that task has
/// a turn of its own. Beyond that it is the newest that is lost.
const HANDED_OVER: usize = 16_384;

#[derive(Debug)]
struct Told {
    event: Event,
    msg_id: String,
}

/// Takes events; clones share one queue, which ends when the last of them is gone.
#[derive(Debug, Clone)]
pub struct Events {
    handed: mpsc::Sender<Told>,
}

/// What is to be stored, in order.
#[derive(Debug)]
pub struct EventQueue {
    handed: mpsc::Receiver<Told>,
    waiting: Waiting,
}

impl Events {
    pub fn new() -> (Self, EventQueue) {
        Self::holding(WAITING)
    }

    fn holding(capacity: usize) -> (Self, EventQueue) {
        let (handed, received) = mpsc::channel(HANDED_OVER);
        (Self { handed }, EventQueue { handed: received, waiting: Waiting::new(capacity) })
    }

    /// Says it, and never waits. What several say under one `msg_id` is stored once.
    pub fn tell(&self, event: Event, msg_id: Option<String>) {
        tracing::debug!(
            session = event.session(),
            job = event.job(),
            gpu = event.gpu_id,
            what = event.what.as_str(),
            seq = event.seq,
            "event"
        );
        let msg_id = msg_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        if let Err(error) = self.handed.try_send(Told { event, msg_id }) {
            let why = error.to_string();
            let event = error.into_inner().event;
            tracing::warn!(
                session = event.session(),
                job = event.job(),
                gpu = event.gpu_id,
                what = event.what.as_str(),
                why,
                "event lost"
            );
        }
    }
}

impl EventQueue {
    /// Stores events until nobody is left who could tell one and the queue is empty, or the connection is closed for good.
    pub async fn run(mut self, nats: &Nats, publisher: &Publisher) {
        let mut open = true;
        loop {
            let Some(next) = self.waiting.take() else {
                match self.handed.recv().await {
                    Some(told) => self.waiting.push(told),
                    None => return,
                }
                continue;
            };
            let storing = store(nats, publisher, &next);
            tokio::pin!(storing);
            let stored = loop {
                tokio::select! {
                    stored = &mut storing => break stored,
                    told = self.handed.recv(), if open => match told {
                        Some(told) => self.waiting.push(told),
                        None => open = false,
                    },
                }
            };
            let event = &next.event;
            match stored {
                Ok(()) => self.waiting.say_lost(),
                Err(PublishError::Server(ServerError::Closed)) => return,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(
                        session = event.session(),
                        job = event.job(),
                        gpu = event.gpu_id,
                        what = event.what.as_str(),
                        error,
                        "event not stored"
                    );
                }
            }
            self.waiting.under_way = false;
        }
    }
}

/// For as long as it may succeed.
async fn store(nats: &Nats, publisher: &Publisher, told: &Told) -> Result<(), PublishError> {
    let mut backoff = Backoff::default();
    let mut attempts = 0u32;
    loop {
        match publisher.event_once(&told.event, &told.msg_id).await {
            Ok(()) => {
                if attempts > 0 {
                    tracing::info!(attempts, "events are stored again");
                }
                return Ok(());
            }
            Err(PublishError::Server(error)) if error.is_transient() || error.is_full() => {
                if nats.connection_events().borrow().closed {
                    return Err(ServerError::Closed.into());
                }
                attempts += 1;
                if attempts == 1 {
                    tracing::warn!(error = &error as &dyn std::error::Error, "events cannot be stored now, they wait");
                }
                backoff.wait().await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// A queue that forgets its oldest when it is full.
#[derive(Debug)]
struct Waiting {
    queue: VecDeque<Told>,
    capacity: usize,
    /// One has been taken out and is not stored yet.
    under_way: bool,
    /// Since that was last said.
    lost: u64,
}

impl Waiting {
    fn new(capacity: usize) -> Self {
        Self { queue: VecDeque::new(), capacity, under_way: false, lost: 0 }
    }

    fn push(&mut self, told: Told) {
        if self.queue.len() >= self.capacity {
            self.queue.pop_front();
            self.lost += 1;
        }
        self.queue.push_back(told);
    }

    fn take(&mut self) -> Option<Told> {
        let next = self.queue.pop_front();
        self.under_way = next.is_some();
        next
    }

    fn say_lost(&mut self) {
        let lost = std::mem::take(&mut self.lost);
        if lost > 0 {
            tracing::error!(lost, "too many events waited for the stream, the oldest of them were dropped");
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let left = self.queue.len() as u64 + u64::from(self.under_way) + self.lost;
        if left > 0 {
            tracing::error!(left, "events were not stored before the end");
        }
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::event::{Scope, What};

    use super::*;

    #[test]
    fn a_full_queue_forgets_its_oldest_and_counts_them() {
        let mut waiting = Waiting::new(2);
        for n in 0..5u64 {
            let event = Event::new(Scope::Session, "s", What::Assigned, n);
            waiting.push(Told { event, msg_id: n.to_string() });
        }
        assert_eq!(waiting.lost, 3);
        let mut left = || waiting.take().map(|told| told.msg_id);
        assert_eq!([left(), left(), left()], [Some("3".to_owned()), Some("4".to_owned()), None]);
        waiting.say_lost();
        assert_eq!(waiting.lost, 0, "said once");
    }

    #[test]
    fn every_event_has_a_message_id() {
        let (events, mut queue) = Events::holding(8);
        let event = |what| Event::new(Scope::Session, "s", what, 0);
        for (what, id) in [(What::Assigned, None), (What::Assigned, None), (What::Ended, Some("mine"))] {
            events.tell(event(what), id.map(str::to_owned));
        }
        let ids: Vec<String> = std::iter::from_fn(|| queue.handed.try_recv().ok()).map(|told| told.msg_id).collect();
        assert!(ids.len() == 3 && !ids[0].is_empty() && ids[0] != ids[1] && ids[2] == "mine", "{ids:?}");
    }
}
