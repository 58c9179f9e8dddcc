//! Recordings of which this worker does parts: brought here once, and read on where the last part ended.
//!
//! Parts come one after the other and in order, so whoever does the next one has most of the way behind him. What nobody has
//! used for a while is let go: it takes a place on the disk, and its decoder some memory.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{failure::Failure, id::StreamId};

use super::Recording;
use crate::capacity::locked;

/// Longer than the pause between two parts, in a fleet that has others to do.
const UNUSED: Duration = Duration::from_secs(30);
/// Recordings kept at most, each with its decoder.
const MOST: usize = 4;

#[derive(Debug)]
struct Entry {
    /// The job, and its recording's URL: of a job that comes again under the same name it may be another.
    parent: (StreamId, String),
    bytes: u64,
    /// The first entry that it can give without starting again.
    at_seq: u64,
    recording: Arc<Recording>,
    since: Instant,
}

/// Those that nobody uses now.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<Vec<Entry>>>);

impl Kept {
    /// The recording of this parent, and the length of its file, for a part that begins at entry `seq`: one that has not been
    /// read so far yet, or another decoder of the same file.
    pub(super) fn take(&self, parent: &(StreamId, String), seq: u64) -> Option<(Arc<Recording>, u64)> {
        let mut kept = locked(&self.0);
        let of_parent = |entry: &Entry| entry.parent == *parent;
        let before = kept.iter().enumerate().filter(|(_, entry)| of_parent(entry) && entry.at_seq <= seq);
        if let Some((at, _)) = before.max_by_key(|(_, entry)| entry.at_seq) {
            let Entry { recording, bytes, .. } = kept.swap_remove(at);
            return Some((recording, bytes));
        }
        let entry = kept.iter().find(|entry| of_parent(entry))?;
        let again: Result<_, Failure> = entry.recording.again();
        Some((again.ok()?, entry.bytes))
    }

    /// Nobody uses it any more; it was read up to `at_seq`.
    pub(super) fn put(
        &self,
        parent: (StreamId, String),
        recording: Arc<Recording>,
        bytes: u64,
        at_seq: u64,
        now: Instant,
    ) {
        let mut kept = locked(&self.0);
        kept.push(Entry { parent, bytes, at_seq, recording, since: now });
        if kept.len() > MOST {
            // The one that has waited longest.
            kept.remove(0);
        }
    }

    fn sweep(&self, now: Instant) {
        locked(&self.0).retain(|entry| now.saturating_duration_since(entry.since) < UNUSED);
    }

    /// Lets go what nobody uses, until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(UNUSED / 3)).await.is_some() {
            self.sweep(Instant::now());
        }
        locked(&self.0).clear();
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_audio::Limits;

    use super::*;

    #[tokio::test]
    async fn the_decoder_that_has_least_to_skip_is_used_and_none_for_long_after() {
        let now = Instant::now();
        let file = || tempfile::tempfile().expect("a file");
        let recording = || Recording::new(file(), None, Limits::default(), None);
        let id = |text: &str| (StreamId::new(text).expect("id"), "https://h/a".to_owned());
        let kept = Kept::default();
        let all: Vec<_> = (0..3).map(|_| recording()).collect();
        for (recording, at) in all.iter().zip([100, 300, 200]) {
            kept.put(id("a"), Arc::clone(recording), 7, at, now);
        }
        assert!(kept.take(&id("b"), 900).is_none(), "another recording");
        let (found, bytes) = kept.take(&id("a"), 250).expect("kept");
        assert!(Arc::ptr_eq(&found, &all[2]) && bytes == 7);
        let (other, _) = kept.take(&id("a"), 50).expect("the same file");
        assert!(all.iter().all(|recording| !Arc::ptr_eq(recording, &other)), "none is read backwards");
        kept.sweep(now + UNUSED / 2);
        assert!(kept.take(&id("a"), 900).is_some_and(|(found, _)| Arc::ptr_eq(&found, &all[1])));
        kept.sweep(now + UNUSED);
        assert!(kept.take(&id("a"), 900).is_none());
        for at in 0..9 {
            kept.put(id("a"), recording(), 7, at, now);
        }
        assert_eq!(locked(&kept.0).len(), MOST);
    }
}
