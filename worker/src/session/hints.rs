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

/// None while nobody reads: a session that is being opened or has ended takes no hints, and their bytes are free.
type Waiting = Option<VecDeque<WaitingHint>>;

#[derive(Debug, Default)]
pub(crate) struct HintQueue {
    waiting: Mutex<Waiting>,
    arrived: Notify,
}

/// Hints are kept while this lives.
#[derive(Debug)]
pub(super) struct Reading<'a>(&'a HintQueue);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        *locked(&self.0.waiting) = None;
    }
}

impl HintQueue {
    /// Puts a hint in; the oldest gives way, for the session goes on from the newest known anyway.
    pub(crate) fn put(&self, hint: WaitingHint) {
        let mut waiting = locked(&self.waiting);
        let Some(waiting) = waiting.as_mut() else { return };
        if waiting.len() == MAX_WAITING {
            waiting.pop_front();
        }
        waiting.push_back(hint);
        self.arrived.notify_one();
    }

    pub(super) fn take(&self) -> Option<WaitingHint> {
        locked(&self.waiting).as_mut()?.pop_front()
    }

    /// From now on hints are kept.
    pub(super) fn read(&self) -> Reading<'_> {
        *locked(&self.waiting) = Some(VecDeque::new());
        Reading(self)
    }

    /// Wakes its one reader.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use voxfleet_schema::{audio::RawEntry, id::StreamId};

    use super::*;
    use crate::capacity::HintPool;

    #[test]
    fn bytes_of_hints_nobody_reads_are_free() {
        let pool = HintPool::new(100, 1);
        let queue = HintQueue::default();
        let put = |seq| {
            let entry = RawEntry { seq, headers: Vec::new(), payload: Bytes::from_static(b"x") };
            let hint = Hint { id: StreamId::new("a").expect("id"), entry, prev: None };
            queue.put(WaitingHint { hint, _bytes: pool.try_take(1).expect("room") });
        };
        put(1);
        assert!(pool.try_take(100).is_some(), "no reader yet");
        let reading = queue.read();
        (2..90).for_each(put);
        assert!(pool.try_take(37).is_none() && pool.try_take(36).is_some(), "64 wait");
        assert_eq!(queue.take().map(|w| w.hint.entry.seq), Some(26), "the oldest gave way");
        drop(reading);
        assert!(pool.try_take(100).is_some() && queue.take().is_none());
    }
}
