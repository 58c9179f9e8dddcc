//! How many transcripts may be read for others at once. Each reader is a consumer of the stream that every producer's and
//! viewer's transcripts come from, and the server keeps it for a while after its reader has gone: whoever may look must not be
//! able to take all that the stream allows.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Instant,
};

use voxfleet_http::Refusal;
use voxfleet_nats::transcript;

/// A tenth of the consumers that a stream may have unless it is told otherwise, for everybody behind this door.
const MOST: usize = 1_000;

#[derive(Debug, Default)]
struct Count {
    open: usize,
    /// When readers ended whose consumers the server may still have, the oldest first.
    ended: VecDeque<Instant>,
}

impl Count {
    fn take(&mut self, most: usize, now: Instant) -> bool {
        while self.ended.front().is_some_and(|at| now.duration_since(*at) >= transcript::BRIEF) {
            self.ended.pop_front();
        }
        let free = self.open + self.ended.len() < most;
        self.open += usize::from(free);
        free
    }

    fn end(&mut self, now: Instant) {
        self.open -= 1;
        self.ended.push_back(now);
    }
}

/// Clones count together.
#[derive(Debug, Clone, Default)]
pub(crate) struct Readers {
    count: Arc<Mutex<Count>>,
}

/// One reader's place, given back when it goes.
#[derive(Debug)]
pub(crate) struct Place {
    count: Arc<Mutex<Count>>,
}

impl Readers {
    pub(crate) fn take(&self) -> Result<Place, Refusal> {
        let taken = self.count.lock().is_ok_and(|mut count| count.take(MOST, Instant::now()));
        match taken {
            true => Ok(Place { count: self.count.clone() }),
            false => Err(Refusal {
                retry_after_ms: Some(transcript::BRIEF.as_millis() as u64),
                ..Refusal::unavailable("as many transcripts are being read here as may be; try again")
            }),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Ok(mut count) = self.count.lock() {
            count.end(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_place_is_free_again_when_the_server_has_forgotten_its_consumer() {
        let (mut count, begin) = (Count::default(), Instant::now());
        assert!(count.take(2, begin) && count.take(2, begin) && !count.take(2, begin));
        count.end(begin);
        assert!(!count.take(2, begin + transcript::BRIEF - Duration::from_millis(1)));
        assert!(count.take(2, begin + transcript::BRIEF));
        assert!(!count.take(2, begin + transcript::BRIEF));
        count.end(begin);
        count.end(begin);
        assert!(count.take(1, begin + transcript::BRIEF));
    }

    #[test]
    fn whoever_goes_leaves_its_place() {
        let readers = Readers::default();
        let places: Vec<Place> = (0..MOST).map(|n| readers.take().unwrap_or_else(|_| panic!("{n}"))).collect();
        assert!(readers.take().is_err());
        drop(places);
        let count = readers.count.lock().expect("no panic");
        assert_eq!((count.open, count.ended.len()), (0, MOST));
    }
}
