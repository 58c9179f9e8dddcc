//! What comes back to the loop, and the clocks it is dated by.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use voxfleet_nats::topology::Usage;
use voxfleet_schema::{
    failure::Failure,
    fleet::Heartbeat,
    id::{StreamId, WorkerName},
    transcript::Final,
};

use super::jobs::Caller;
use crate::{
    core::{Admission, AppendError, AskReply, Burial, Loaded, Mark, NoteError, SaveError, WalkEnd, jobs::JobInput},
    fleet::RoundTrip,
    jobs::Submission,
    moment::Moment,
    sessions::ChainMark,
};

/// What comes back to the loop.
pub(super) enum Input {
    Heartbeat(Box<Heartbeat>, Duration),
    Final(Box<Final>),
    /// The audio stream's oldest sequence, if it answered.
    Probed {
        stream: Option<u64>,
    },
    RoundTrip(RoundTrip),
    Usage(Vec<Usage>),
    Consumers {
        complete: Vec<WorkerName>,
        partial: Vec<WorkerName>,
    },
    Loaded {
        id: StreamId,
        result: Result<Box<Loaded>, String>,
    },
    Saved {
        id: StreamId,
        result: Result<u64, SaveError>,
    },
    Asked {
        id: StreamId,
        epoch: u64,
        worker: WorkerName,
        reply: AskReply,
    },
    Released {
        worker: WorkerName,
        id: StreamId,
        epoch: u64,
        done: bool,
    },
    Appended {
        id: StreamId,
        mark: Mark,
        result: Result<u64, AppendError>,
    },
    Walked {
        id: StreamId,
        result: Result<Box<WalkEnd>, String>,
    },
    ChainRead {
        id: StreamId,
        chain: Option<ChainMark>,
    },
    Admitted {
        worker: WorkerName,
        admission: Admission,
    },
    Buried {
        worker: WorkerName,
        burial: Burial,
    },
    Noted {
        worker: WorkerName,
        result: Result<u64, NoteError>,
    },
    Drained {
        worker: WorkerName,
        reply: AskReply,
    },
    /// Somebody wants a recording transcribed.
    Submit {
        caller: Caller,
        submission: Result<Box<Submission>, Failure>,
    },
    Job(Box<JobInput>),
    CursorSaved,
    /// Sessions that are open by their keys.
    OpenKeys(Vec<StreamId>),
}

/// Reads both clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    pub(super) start: Instant,
}

impl Clock {
    pub(super) fn mono(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn now(&self) -> Moment {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment { mono: self.mono(), unix_ms: unix.as_millis() as u64 }
    }
}
