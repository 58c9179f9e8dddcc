//! Hints that wait for their session's task, bounded; each holds its bytes of the hint pool.

use std::{collections::VecDeque, sync::Mutex};

use tokio::sync::Notify;
use voxfleet_nats::claim::Hint;

use crate::capacity::{HintPermit, locked};

/// More are not worth keeping: the session reads the log anyway.
const MAX_WAITING: usize = 64;

#[derive(Debug)]
pub(crate) struct WaitingHint {
    pub(crate) hint: Hint,
    pub(crate) _bytes: HintPermit,
}

#[derive(Debug, Default)]
pub(crate) struct HintQueue {
    waiting: Mutex<VecDeque<WaitingHint>>,
    arrived: Notify,
}

impl HintQueue {
    /// Puts a hint in; the oldest gives way, for the session goes on from the newest known anyway.
    pub(crate) fn put(&self, hint: WaitingHint) {
        let mut waiting = locked(&self.waiting);
        if waiting.len() == MAX_WAITING {
            waiting.pop_front();
        }
        waiting.push_back(hint);
        self.arrived.notify_one();
    }

    pub(super) fn take(&self) -> Option<WaitingHint> {
        locked(&self.waiting).pop_front()
    }

    /// Wakes its one reader.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }
}
