//! What the engine has for one session, until the session's task takes it.
//!
//! The task that reads the engine's socket never waits for a session: it leaves everything here. What can be replaced is
//! (partials), what must not be lost is kept (finals); a session stops feeding while finals wait, so the queue is bounded by
//! what is in flight.

use std::{collections::VecDeque, sync::Mutex};

use tokio::sync::Notify;
use voxfleet_schema::failure::Failure;

use super::suspects::Name;
use crate::{
    capacity::{Account, locked},
    ipc::{FinalDraft, HeardIn, PartialDraft, RevisionDraft, StreamNote},
};

/// Notes beyond this are dropped and counted: a producer of nothing but bad chunks must not fill memory.
const MAX_NOTES: usize = 256;

/// What goes into the chain, in this order.
#[derive(Debug)]
pub(crate) enum Draft {
    Final(Box<FinalDraft>),
    Revision(Box<RevisionDraft>),
}

#[derive(Debug, Default)]
struct Waiting {
    drafts: VecDeque<Draft>,
    partial: Option<PartialDraft>,
    notes: VecDeque<StreamNote>,
    notes_dropped: u64,
    heard: Option<Box<HeardIn>>,
    failed: Option<Failure>,
    finished: bool,
    gone: bool,
}

/// Everything that waited at one moment.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) drafts: VecDeque<Draft>,
    pub(crate) partial: Option<PartialDraft>,
    pub(crate) notes: VecDeque<StreamNote>,
    /// Notes there was no room for.
    pub(crate) notes_dropped: u64,
    /// Of a stream that listens: all that it says.
    pub(crate) heard: Option<Box<HeardIn>>,
    pub(crate) failed: Option<Failure>,
    /// Nothing was fed since it was told to finish, and nothing is begun any more.
    pub(crate) finished: bool,
    /// The engine died or was stopped: nothing comes any more.
    pub(crate) gone: bool,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    /// Whose it is.
    pub(super) name: Name,
    /// What it is decoded with.
    pub(super) model: String,
    /// Its finals say nothing of the device.
    pub(super) scout: bool,
    waiting: Mutex<Waiting>,
    changed: Notify,
    /// Bytes the engine holds for this session.
    pub(crate) account: Account,
}

impl Outbox {
    pub(super) fn new(name: Name, model: String, account: Account, scout: bool) -> Self {
        Self { name, model, scout, waiting: Mutex::default(), changed: Notify::new(), account }
    }

    pub(crate) fn final_draft(&self, draft: Box<FinalDraft>) {
        let mut waiting = locked(&self.waiting);
        // It was a hypothesis about audio that is final now.
        waiting.partial = None;
        waiting.drafts.push_back(Draft::Final(draft));
        self.changed.notify_one();
    }

    pub(crate) fn revision(&self, draft: Box<RevisionDraft>) {
        locked(&self.waiting).drafts.push_back(Draft::Revision(draft));
        self.changed.notify_one();
    }

    pub(crate) fn partial(&self, draft: PartialDraft) {
        locked(&self.waiting).partial = Some(draft);
        self.changed.notify_one();
    }

    pub(crate) fn note(&self, note: StreamNote) {
        let mut waiting = locked(&self.waiting);
        if waiting.notes.len() < MAX_NOTES {
            waiting.notes.push_back(note);
        } else {
            waiting.notes_dropped += 1;
        }
        self.changed.notify_one();
    }

    pub(crate) fn heard(&self, heard: Box<HeardIn>) {
        locked(&self.waiting).heard = Some(heard);
        self.changed.notify_one();
    }

    pub(crate) fn failed(&self, failure: Failure) {
        locked(&self.waiting).failed = Some(failure);
        self.changed.notify_one();
    }

    pub(crate) fn finished(&self) {
        locked(&self.waiting).finished = true;
        self.changed.notify_one();
    }

    pub(crate) fn gone(&self) {
        locked(&self.waiting).gone = true;
        self.account.close();
        self.changed.notify_one();
    }

    /// Takes what there is, without waiting.
    pub(crate) fn take(&self) -> Taken {
        let mut waiting = locked(&self.waiting);
        Taken {
            drafts: std::mem::take(&mut waiting.drafts),
            partial: waiting.partial.take(),
            notes: std::mem::take(&mut waiting.notes),
            notes_dropped: std::mem::take(&mut waiting.notes_dropped),
            heard: waiting.heard.take(),
            failed: waiting.failed.take(),
            finished: waiting.finished,
            gone: waiting.gone,
        }
    }

    /// Wakes its one reader when something was put in.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::event::What;

    use super::*;
    use crate::capacity::Budget;

    fn outbox() -> Outbox {
        let id = voxfleet_schema::id::StreamId::new("a").expect("id");
        Outbox::new((voxfleet_schema::id::Kind::Session, id), "small".to_owned(), Budget::new(10, 10).account(), false)
    }

    fn partial(text: &str) -> PartialDraft {
        PartialDraft { from_sample: 0, to_sample: 1, committed: text.to_owned(), tentative: String::new(), lag_ms: 0 }
    }

    #[tokio::test]
    async fn only_the_newest_partial_waits() {
        let outbox = outbox();
        outbox.partial(partial("a"));
        outbox.partial(partial("b"));
        outbox.changed().await;
        assert_eq!(outbox.take().partial, Some(partial("b")));
        assert_eq!(outbox.take().partial, None);
    }

    #[test]
    fn notes_are_bounded_and_counted() {
        let outbox = outbox();
        for seq in 0..300 {
            outbox.note(StreamNote { what: What::Rejected, seq, failure: None, detail: String::new() });
        }
        let taken = outbox.take();
        assert_eq!((taken.notes.len(), taken.notes_dropped), (MAX_NOTES, 44));
    }

    #[test]
    fn a_dead_engine_holds_no_bytes() {
        let outbox = outbox();
        outbox.account.take(9);
        outbox.gone();
        assert_eq!(outbox.account.used(), 0);
        assert!(outbox.take().gone && outbox.take().gone, "for good");
    }
}
