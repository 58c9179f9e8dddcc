//! A job's record in `asr_jobs`: what is to stand there, what stands there after a write that went wrong, and what follows
//! from what stands there. A job's slot is charged to whom its record names.

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    id::{StreamId, WorkerName},
    job::{JobRecord, JobState},
};

use super::{Core, JobEffect, JobLoaded, JobSaveError};
use crate::{
    jobs::{Job, Known, Stage},
    kept::KeptEngine,
    moment::Moment,
};

impl Core {
    /// Begins to write what is to stand there.
    pub(super) fn save_job(&mut self, id: &StreamId, mut next: JobRecord, now: Moment) {
        let charge = (next.state == JobState::Assigned).then(|| next.worker.clone()).flatten();
        // An ended job's slot is free once its worker has let go, not before.
        if !next.state.has_ended() {
            self.charge_job(id, charge);
        }
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        next.engine = job.kept.for_key(next.options.policy, next.engine.as_deref()).map(str::to_owned);
        job.enter(Stage::Saving(Box::new(next.clone())), now.mono);
        let revision = job.revision;
        self.jobs.book.file(id);
        self.job_effect(JobEffect::Save { id: id.clone(), record: Box::new(next), revision });
    }

    /// Counts a job against the job slots of `worker`, and of nobody else.
    pub(super) fn charge_job(&mut self, id: &StreamId, worker: Option<WorkerName>) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        if job.charged == worker {
            return;
        }
        let before = std::mem::replace(&mut job.charged, worker.clone());
        if let Some(load) = before.and_then(|name| self.fleet.job_load_mut(&name)) {
            load.unassign(id);
            self.jobs.place_due = true;
        }
        if let Some(load) = worker.and_then(|name| self.fleet.job_load_mut(&name)) {
            load.assign(id);
        }
    }

    pub(super) fn charge_job_from_record(&mut self, id: &StreamId) {
        let worker = self
            .jobs
            .book
            .job(id)
            .filter(|job| job.state() == JobState::Assigned)
            .and_then(|job| job.record.worker.clone())
            .filter(|name| self.fleet.get(name).is_some());
        if worker.is_some() {
            self.charge_job(id, worker);
        }
    }

    /// The key was written, or not.
    pub(super) fn job_saved(&mut self, id: &StreamId, result: Result<u64, JobSaveError>, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        // The answer to a write that was given up long ago changes nothing about what goes on since.
        if !matches!(job.stage, Stage::Saving(_)) {
            return;
        }
        let Stage::Saving(next) = std::mem::replace(&mut job.stage, Stage::Settled) else {
            return;
        };
        match result {
            Ok(revision) => self.job_written(id, *next, revision, now),
            Err(JobSaveError::Conflict) => {
                tracing::info!(job = %id, "job record was written by somebody else, reading it");
                job.enter(Stage::Reading(next), now.mono);
                self.job_effect(JobEffect::Load { id: id.clone() });
            }
            Err(JobSaveError::Full) if job.revision.is_none() => {
                let failure = self.come_again(FailureClass::NoCapacity, "the bucket of jobs is full");
                self.forget_new_job(id, &failure);
            }
            // It may stand there or not. Upkeep looks after a pause.
            Err(JobSaveError::Full) => {
                tracing::error!(job = %id, "job record not written, the bucket is full");
                job.enter(Stage::Reading(next), now.mono);
            }
            Err(JobSaveError::Failed(error)) => {
                tracing::warn!(job = %id, error, "job record not written, reading it soon");
                job.enter(Stage::Reading(next), now.mono);
            }
        }
    }

    /// The key of a known job was read again: after a write went wrong, or because somebody else wrote.
    pub(super) fn job_read_again(&mut self, id: &StreamId, result: Result<JobLoaded, String>, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        let next = match &job.stage {
            Stage::Reading(next) => Some(next.as_ref().clone()),
            Stage::Settled => None,
            Stage::Putting(_) | Stage::Saving(_) | Stage::Sending | Stage::Closing => return,
        };
        let loaded = match result {
            Ok(loaded) => loaded,
            // Still reading: upkeep asks again.
            Err(error) => {
                tracing::warn!(job = %id, error, "cannot read job, trying again");
                job.since = now.mono;
                return;
            }
        };
        if let Some(chain) = loaded.chain {
            job.saw(chain);
        }
        match loaded.record {
            Some((_, revision)) if next.is_none() && job.revision == Some(revision) => {}
            Some((record, revision)) => {
                if next.as_ref() != Some(&record) {
                    // Somebody else wrote: what stands there is true, and reconciliation goes on from it.
                    let worker = (record.state == JobState::Assigned).then(|| record.worker.clone()).flatten();
                    self.charge_job(id, worker);
                }
                self.job_written(id, record, revision, now);
            }
            None if job.revision.is_none() => {
                let failure = self.come_again(FailureClass::Timeout, "the job's record cannot be written now");
                self.forget_new_job(id, &failure);
            }
            None => {
                tracing::warn!(job = %id, "the key of a job that had not ended was deleted");
                self.charge_job(id, None);
                let failure = Failure::new(FailureClass::NotFound, "the job was deleted");
                self.forget_new_job(id, &failure);
                self.release_job_holders(id);
            }
        }
    }

    fn job_written(&mut self, id: &StreamId, next: JobRecord, revision: u64, now: Moment) {
        // Out of the queue under the old record's place, into it under the new one's.
        let Some(Known::Job(mut job)) = self.jobs.book.remove(id) else {
            return;
        };
        let was_new = job.revision.is_none();
        let before = std::mem::replace(&mut job.record, next);
        job.revision = Some(revision);
        job.kept.learn(KeptEngine::of_key(job.record.engine.as_deref()).known());
        job.enter(Stage::Settled, now.mono);
        let submits = std::mem::take(&mut job.submits);
        let record = job.record.clone();
        let told_waiting = job.told_waiting;
        if let Some(opening) = job.opening.take() {
            self.job_opened(&record, opening, now);
        }
        if record.state.has_ended() {
            return self.job_ended(*job, submits, now);
        }
        self.jobs.book.insert(id.clone(), Known::Job(job));
        if was_new {
            tracing::info!(job = %id, priority = ?record.options.priority, "job submitted");
            self.tell_submitted(id, now);
        }
        for call in submits {
            self.answer_submitted(call, &record);
        }
        let left = before
            .worker
            .clone()
            .filter(|old| before.state == JobState::Assigned && record.worker.as_ref() != Some(old));
        if let Some(old) = left {
            // It has moved on: a worker that leaves is not cut off in the middle of a final.
            let moved = record.state == JobState::Assigned;
            let finish_ms = if moved { self.finish_ms(&old, record.suspect, now) } else { 0 };
            self.release_job(&old, id, before.epoch, finish_ms, now);
        }
        match record.state {
            JobState::Queued => {
                self.jobs.place_due = true;
                if !told_waiting {
                    self.jobs.fresh.push(id.clone());
                }
            }
            JobState::Assigned if before.epoch != record.epoch || before.worker != record.worker => {
                if let Some(job) = self.jobs.book.job_mut(id) {
                    (job.taken, job.assigned_since) = (false, now.mono);
                }
                self.send_work(id, now);
            }
            JobState::Closing => {
                if let Some(worker) = record.worker.filter(|_| before.state == JobState::Assigned) {
                    self.release_job(&worker, id, before.epoch, 0, now);
                }
                self.write_job_end(id, now);
            }
            JobState::Assigned | JobState::Done | JobState::Failed | JobState::Cancelled | JobState::Unknown => {}
        }
        self.check_job_end(id, now);
        if self.jobs.book.job(id).is_some_and(Job::settled) {
            self.job_asks_later(id, now);
        }
    }
}
