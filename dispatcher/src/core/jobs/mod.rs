//! File jobs within the state machine: `asr_jobs` is the queue, and whatever a crash interrupts is repaired by comparing
//! it with heartbeats and chains.
//!
//! | module | inputs |
//! |---|---|
//! | [`asks`] | submits, questions, cancels, lists |
//! | [`placing`] | choosing a worker, sending the work item |
//! | [`writing`] | writing the record, and what stands there |
//! | [`endings`] | tries that failed, cancels, ends of chains |
//! | [`upkeep`] | reconciliation, expiry |
//! | [`telling`] | none: the events of all of them |

mod asks;
mod endings;
mod placing;
mod telling;
#[cfg(test)]
mod tests;
mod upkeep;
mod writing;

use std::time::Duration;

use voxfleet_schema::{
    event::{Event, Scope, What},
    failure::{Failure, FailureClass},
    fleet::Held,
    id::{Kind, StreamId, WorkerName},
    job::{JobListRequest, JobProgress, JobRecord, JobState, WorkItem},
};

pub use endings::NOT_KEPT;

use super::{Core, Effect};
use crate::{
    admission::come_again_ms,
    fleet::Load,
    jobs::{Book, Job, JobMark, Known, Recording, Submission},
    moment::Moment,
    sessions::CallId,
};

/// What is to be done. Each is answered by the input named beside it, whatever becomes of it.
#[derive(Debug)]
pub enum JobEffect {
    /// Read key and last final -> [`JobInput::Loaded`].
    Load { id: StreamId },
    /// Store an inline recording -> [`JobInput::Put`].
    Put { id: StreamId, recording: Recording },
    /// Write the key, by revision (none: create it) -> [`JobInput::Saved`].
    Save { id: StreamId, record: Box<JobRecord>, revision: Option<u64> },
    /// Read the last final; without an end there, publish the work item unless it is queued (or, if not `publish`, only look
    /// for it) -> [`JobInput::Sent`].
    Send { worker: WorkerName, item: Box<WorkItem>, publish: bool },
    /// Tell a worker to let go, and take back what is queued for it; it may store the final it has begun within
    /// `finish_ms` -> [`JobInput::Released`].
    Release { worker: WorkerName, id: StreamId, epoch: u64, finish_ms: u32 },
    /// Read the last final -> [`JobInput::Chain`].
    ReadChain { id: StreamId },
    /// Write the end final of a job that failed or was cancelled, unless one stands; put away what failed ->
    /// [`JobInput::Closed`].
    Close { record: Box<JobRecord> },
    /// Do what is due for an ended job -> [`JobInput::Expired`].
    Expire { id: StreamId },
    /// Read all keys -> [`JobInput::Listed`].
    List { call: CallId, request: JobListRequest },
}

/// What comes back, and what strangers ask.
#[derive(Debug)]
pub enum JobInput {
    /// A request that has been decoded, or is refused.
    Submit {
        call: CallId,
        submission: Result<Box<Submission>, Failure>,
    },
    /// Somebody wrote this key; `open`: there is a job that has not ended.
    Changed {
        id: StreamId,
        revision: u64,
        open: bool,
    },
    Loaded {
        id: StreamId,
        result: Result<Box<JobLoaded>, String>,
    },
    Put {
        id: StreamId,
        result: Result<(), PutError>,
    },
    Saved {
        id: StreamId,
        result: Result<u64, JobSaveError>,
    },
    Sent {
        id: StreamId,
        epoch: u64,
        result: Result<Sent, String>,
    },
    Released {
        worker: WorkerName,
        id: StreamId,
        epoch: u64,
        done: bool,
    },
    Chain {
        id: StreamId,
        mark: Option<JobMark>,
    },
    Closed {
        id: StreamId,
        result: Result<ChainEnd, String>,
    },
    Expired {
        id: StreamId,
        result: Result<Expired, String>,
    },
    Listed {
        call: CallId,
        result: Result<(Vec<JobRecord>, u64), ListError>,
    },
}

/// What [`JobEffect::Load`] found.
#[derive(Debug, Clone, Default)]
pub struct JobLoaded {
    pub record: Option<(JobRecord, u64)>,
    pub chain: Option<JobMark>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutError {
    /// The object store has no room.
    Full,
    Failed(String),
}

/// Why a write did not happen, or may not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobSaveError {
    Conflict,
    /// The bucket has no room: it was not written.
    Full,
    /// Unknown: it may stand there.
    Failed(String),
}

/// Why there is no list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListError {
    /// Too many are being made.
    Busy,
    Failed(String),
}

/// The end that stands in a chain now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainEnd {
    pub mark: JobMark,
    /// It failed, and `ASR_DEAD` has no room for it.
    pub not_kept: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    pub chain: Option<JobMark>,
    pub work: Work,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Put there just now, or found there.
    Queued,
    Missing,
    /// A later assignment is queued there.
    Newer {
        epoch: u64,
    },
    /// Not looked for: the chain has its end.
    NotNeeded,
}

/// What [`JobEffect::Expire`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expired {
    /// When to look again, as Unix time in ms; none: the key is gone, or the job is open.
    pub next_ms: Option<u64>,
    /// Result and recording were deleted just now.
    pub told: bool,
}

/// What the core keeps for jobs.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    book: Book,
    /// Something came free, or into the queue, since the last look at it.
    place_due: bool,
    /// When the queue was last gone through.
    placed: Duration,
    /// Queued since the last look: whoever finds no room is told once.
    fresh: Vec<StreamId>,
    /// Ended jobs being expired.
    expiring: usize,
    /// The bucket has little room left: what is there can still be written, nothing new comes in.
    pub(super) store_filling: bool,
}

impl Jobs {
    /// `age`: for how long a job of lower priority may be overtaken.
    pub(super) fn new(age: Duration) -> Self {
        Self { book: Book::new(age), ..Self::default() }
    }

    /// Those that a worker was given.
    pub(super) fn of<'a>(&'a self, load: &'a Load) -> impl Iterator<Item = &'a Job> {
        load.assigned().filter_map(|id| self.book.job(id))
    }

    pub(super) fn record(&self, id: &StreamId) -> Option<&JobRecord> {
        self.book.job(id).map(|job| &job.record)
    }

    /// Those that are not at rest in the queue.
    pub(super) fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.book.busy().filter_map(|id| self.book.job(id))
    }
}

impl Core {
    pub fn job(&mut self, input: JobInput, now: Moment) {
        match input {
            JobInput::Submit { call, submission } => self.job_submitted(call, submission, now),
            JobInput::Changed { id, revision, open } => self.job_changed(id, revision, open),
            JobInput::Loaded { id, result } => self.job_loaded(&id, result.map(|l| *l), now),
            JobInput::Put { id, result } => self.job_put(&id, result, now),
            JobInput::Saved { id, result } => self.job_saved(&id, result, now),
            JobInput::Sent { id, epoch, result } => self.job_sent(&id, epoch, result, now),
            JobInput::Released { worker, id, epoch, done } => self.job_released(&worker, &id, epoch, done),
            JobInput::Chain { id, mark } => self.job_chain(&id, mark, now),
            JobInput::Closed { id, result } => self.job_closed(&id, result, now),
            JobInput::Expired { id, result } => self.job_expired(id, result, now),
            JobInput::Listed { call, result } => self.jobs_listed(call, result),
        }
    }

    /// Takes a job over from its key, at the start.
    pub fn recover_job(&mut self, loaded: JobLoaded, now: Moment) {
        let Some((record, revision)) = loaded.record else {
            return;
        };
        if record.state.has_ended() {
            return self.jobs.book.expire_at(record.id, 0);
        }
        self.adopt_job(record, revision, loaded.chain, now);
    }

    /// An ended job is looked at again at this Unix time in ms.
    pub fn job_expires(&mut self, id: StreamId, at_ms: u64) {
        self.jobs.book.expire_at(id, at_ms);
    }

    fn adopt_job(&mut self, record: JobRecord, revision: u64, chain: Option<JobMark>, now: Moment) {
        let id = record.id.clone();
        let queued = record.state == JobState::Queued;
        let mut job = Job::new(record, Some(revision), chain, now.mono);
        // Whoever submitted it heard of it, or hears when he asks again.
        job.told_waiting = true;
        self.jobs.book.insert(id.clone(), Known::Job(Box::new(job)));
        self.jobs.place_due |= queued;
        self.charge_job_from_record(&id);
        self.check_job_end(&id, now);
    }

    /// Whether more jobs may come in by themselves; the rest waits at the door.
    pub fn takes_jobs(&self) -> bool {
        !self.jobs.store_filling && self.jobs.book.len() < self.config.jobs_max_queued
    }

    /// How full the bucket is.
    pub(super) fn job_store_usage(&mut self, filling: bool) {
        if std::mem::replace(&mut self.jobs.store_filling, filling) != filling {
            tracing::warn!(filling, "bucket of jobs: new jobs are refused while it is filling");
        }
    }

    fn job_effect(&mut self, effect: JobEffect) {
        self.effect(Effect::Job(effect));
    }

    fn job_event(&mut self, id: &StreamId, what: What, now: Moment, with: impl FnOnce(&mut Event)) {
        let mut event = Event::new(Scope::Job, id.as_str(), what, now.unix_ms);
        with(&mut event);
        self.effect(Effect::Tell { event: Box::new(event), once: false });
    }

    /// What somebody is told whose job has no place in the queue: with many others he comes again later, and not at the same
    /// moment.
    fn queue_full(&self, id: &StreamId, why: &str, now: Moment) -> Failure {
        let slots = self.roster.slots(false, now.mono);
        let pause_ms = come_again_ms(self.config.retry_after_ms, id, self.jobs.book.queued(), slots);
        Failure { retry_after_ms: Some(pause_ms), ..Failure::new(FailureClass::NoCapacity, why) }
    }

    /// Why something cannot be done now, and when to come again.
    fn come_again(&self, class: FailureClass, why: impl Into<String>) -> Failure {
        Failure { retry_after_ms: Some(self.config.retry_after_ms), ..Failure::new(class, why) }
    }

    /// Workers that say they hold a job.
    fn job_holders(&self) -> impl Iterator<Item = (&WorkerName, &crate::fleet::Worker, &Held)> {
        self.fleet.workers().flat_map(|(name, worker)| {
            worker.heartbeat.held.iter().filter(|h| h.kind == Kind::Job).map(move |held| (name, worker, held))
        })
    }

    /// How far its worker says it is.
    fn job_progress(&self, record: &JobRecord) -> Option<JobProgress> {
        let worker = self.fleet.get(record.worker.as_ref().filter(|_| record.state == JobState::Assigned)?)?;
        let mut held = worker.heartbeat.held.iter().filter(|h| h.kind == Kind::Job);
        held.find(|h| h.id == record.id && h.epoch == record.epoch)?.progress
    }

    /// Jobs in these states, for the fleet's status.
    pub(super) fn job_counts(&self) -> (u32, u32) {
        let assigned = self.jobs.book.busy().filter_map(|id| self.jobs.book.job(id));
        let assigned = assigned.filter(|job| job.state() == JobState::Assigned).count();
        (self.jobs.book.queued() as u32, assigned as u32)
    }
}
