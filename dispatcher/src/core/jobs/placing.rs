//! From a queued job to its worker: decide, write the key, send the work item, tell.

use std::{collections::HashSet, time::Duration};

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::WorkerHealth,
    id::{StreamId, WorkerName},
    job::{JobRecord, JobState},
};

use super::{Core, JobEffect, JobLoaded, JobSaveError, Sent, Work};
use crate::{
    admission::Needs,
    jobs::{Job, Known, Stage, request},
    moment::Moment,
    routing::{self, Candidate, Decision, LADDER, Refusal, Request},
};

/// A worker without room is left out until its next heartbeat but one.
const HEARTBEATS_LEFT_OUT: u64 = 2;
/// A worker where a try failed is left out for this long while others are only busy: an hour's wait for another would be
/// worse than a second try.
const FAILED_LEFT_OUT: Duration = Duration::from_secs(300);
/// Workers remembered for that.
const MAX_FAILED: usize = 16;
/// A work item that its worker has not fetched for this long goes to another.
const FETCHED_WITHIN: Duration = Duration::from_secs(30);
/// A queue up to this long is gone through at each change, a longer one a few times a second.
const SHORT_QUEUE: usize = 1_000;
const LONG_QUEUE_EVERY: Duration = Duration::from_millis(250);

impl Core {
    fn job_candidates<'a>(&'a self, job: &Job, now: Moment) -> Vec<Candidate<'a>> {
        self.fleet
            .workers()
            .map(|(name, worker)| Candidate {
                name,
                heartbeat: &worker.heartbeat,
                health: worker.health(now.mono, &self.config),
                used: worker.jobs.used(),
                slots: worker.heartbeat.job_slots.total,
                superseded: self.fleet.superseded(name),
                refused: job
                    .refused
                    .iter()
                    .any(|(who, seq)| who == name && worker.heartbeat.seq < seq + HEARTBEATS_LEFT_OUT),
            })
            .collect()
    }

    /// Workers where it failed come last: while another could take it once a slot is free, they are left out.
    fn route_job(&self, job: &Job, candidates: &[Candidate<'_>], now: Moment) -> Decision {
        let vad = job.chain.as_ref().map(|c| c.vad).filter(|vad| *vad != voxfleet_schema::transcript::VadKind::Unknown);
        let request = Request { options: &job.record.options, vad, live: false };
        if !job.failed.is_empty() {
            let failed_at =
                |name: &WorkerName| job.failed.iter().any(|(who, at)| who == name && now.since(*at) < FAILED_LEFT_OUT);
            let others: Vec<_> =
                candidates.iter().map(|c| Candidate { refused: c.refused || failed_at(c.name), ..*c }).collect();
            let decision = routing::route(request, &others, &self.config);
            let could = |(c, reason): (&Candidate<'_>, &Result<_, Refusal>)| !failed_at(c.name) && has_place(reason);
            if candidates.iter().zip(&decision.reasons).any(could) {
                return decision;
            }
        }
        routing::route(request, candidates, &self.config)
    }

    /// A worker where it has not failed could take it, now or once a slot is free.
    pub(super) fn others_could(&self, job: &Job, now: Moment) -> bool {
        let candidates = self.job_candidates(job, now);
        let decision = self.route_job(job, &candidates, now);
        candidates.iter().zip(&decision.reasons).any(|(c, reason)| {
            let here = job.record.worker.as_ref() == Some(c.name) || job.failed.iter().any(|(who, _)| who == c.name);
            !here && has_place(reason)
        })
    }

    /// A try failed on its present worker.
    pub(super) fn failed_there(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        let Some(worker) = job.record.worker.clone() else {
            return;
        };
        job.failed.retain(|(name, _)| *name != worker);
        job.failed.push((worker, now.mono));
        if job.failed.len() > MAX_FAILED {
            job.failed.remove(0);
        }
    }

    /// Routes a job; with the answer every worker's reasons.
    pub(super) fn decide_job(&self, job: &Job, now: Moment) -> (Result<WorkerName, Failure>, serde_json::Value) {
        let candidates = self.job_candidates(job, now);
        let decision = self.route_job(job, &candidates, now);
        let reasons = routing::explain(&candidates, &decision);
        (decision.pick.map(|at| candidates[at].name.clone()), reasons)
    }

    /// Finds a worker and starts to write it down. `counted`: it begins a new try.
    pub(super) fn place_job(&mut self, id: &StreamId, counted: bool, now: Moment) -> Result<(), Failure> {
        let Some(job) = self.jobs.book.job(id) else {
            return Ok(());
        };
        let candidates = self.job_candidates(job, now);
        let decision = self.route_job(job, &candidates, now);
        let at = decision.pick.clone()?;
        let reasons = routing::explain(&candidates, &decision);
        let worker = candidates[at].name.clone();
        let next = assigned(job, worker, counted, now);
        if let Some(job) = self.jobs.book.job_mut(id) {
            job.reasons = reasons;
        }
        self.save_job(id, next, now);
        Ok(())
    }

    /// The same worker again, one epoch up.
    pub(super) fn job_again(&mut self, id: &StreamId, above: u64, now: Moment) {
        let Some(job) = self.jobs.book.job(id) else {
            return;
        };
        let Some(worker) = job.record.worker.clone() else {
            return;
        };
        let mut next = assigned(job, worker, false, now);
        next.epoch = next.epoch.max(above + 1);
        self.save_job(id, next, now);
    }

    /// Back into the queue.
    pub(super) fn requeue_job(&mut self, id: &StreamId, change: impl FnOnce(&mut JobRecord), now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        job.moved_from = job.record.worker.clone();
        let mut next = JobRecord {
            state: JobState::Queued,
            worker: None,
            changed_ms: now.unix_ms,
            not_before_ms: None,
            ..job.record.clone()
        };
        change(&mut next);
        self.save_job(id, next, now);
    }

    pub(super) fn save_job(&mut self, id: &StreamId, next: JobRecord, now: Moment) {
        let charge = (next.state == JobState::Assigned).then(|| next.worker.clone()).flatten();
        // An ended job's slot is free once its worker has let go, not before.
        if !next.state.has_ended() {
            self.charge_job(id, charge);
        }
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
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
        job.enter(Stage::Settled, now.mono);
        let submits = std::mem::take(&mut job.submits);
        let record = job.record.clone();
        let told_waiting = job.told_waiting;
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
            self.release_job(&old, id, before.epoch, now);
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
                    self.release_job(&worker, id, before.epoch, now);
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

    /// Tells a worker to let go, unless it is dead: then its subjects are purged with it.
    pub(super) fn release_job(&mut self, worker: &WorkerName, id: &StreamId, epoch: u64, now: Moment) {
        if self.fleet.health(worker, now.mono, &self.config) != WorkerHealth::Dead {
            self.job_effect(JobEffect::Release { worker: worker.clone(), id: id.clone(), epoch });
        }
    }

    pub(super) fn job_released(&mut self, worker: &WorkerName, id: &StreamId, done: bool) {
        // If not, its heartbeat will show the job again.
        if done && let Some(load) = self.fleet.job_load_mut(worker) {
            load.let_go(id);
            self.jobs.place_due = true;
        }
    }

    /// Publishes the work item where none is queued. Where its worker had it already, only looks.
    pub(super) fn send_work(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        let Some(worker) = job.record.worker.clone() else {
            return;
        };
        let known = self.fleet.get(&worker);
        let stand_in = known.and_then(|w| routing::stand_in(&job.record.options, &w.heartbeat, &self.config));
        job.stand_in = stand_in.map(str::to_owned);
        let item = Box::new(request::work_item(&job.record, stand_in));
        let publish = !job.taken;
        job.enter(Stage::Sending, now.mono);
        self.jobs.book.file(id);
        self.job_effect(JobEffect::Send { worker, item, publish });
    }

    pub(super) fn job_sent(&mut self, id: &StreamId, epoch: u64, result: Result<Sent, String>, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        if !matches!(job.stage, Stage::Sending) || job.record.epoch != epoch {
            return;
        }
        job.enter(Stage::Settled, now.mono);
        self.jobs.book.file(id);
        match result {
            // The next look finds it missing.
            Err(error) => tracing::warn!(job = %id, epoch, error, "work item not sent, trying again"),
            Ok(sent) => self.work_sent(id, sent, now),
        }
        self.check_job_end(id, now);
        if self.jobs.book.job(id).is_some_and(Job::settled) {
            self.job_asks_later(id, now);
        }
    }

    fn work_sent(&mut self, id: &StreamId, sent: Sent, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        if let Some(mark) = sent.chain {
            job.saw(mark);
        }
        match sent.work {
            Work::NotNeeded => {}
            Work::Queued => {
                let late = !job.taken && now.since(job.assigned_since) >= FETCHED_WITHIN;
                self.tell_assigned(id, now);
                if late {
                    tracing::warn!(job = %id, "work item was not fetched, another worker gets it");
                    self.take_back(id, now);
                }
            }
            Work::Newer { epoch } => self.job_again(id, epoch, now),
            Work::Missing => {
                // Its worker had it: a try that ended without a word.
                let failure = Failure::new(FailureClass::Internal, "its worker let it go without saying why");
                self.try_failed(id, &failure, now);
            }
        }
    }

    /// Its worker had no room or leaves: another one first, and it was no try.
    pub(super) fn take_back(&mut self, id: &StreamId, now: Moment) {
        self.leave_out(id);
        self.requeue_job(id, |next| next.attempts = next.attempts.saturating_sub(1), now);
    }

    /// Not to its present worker again at once.
    pub(super) fn leave_out(&mut self, id: &StreamId) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        let Some(worker) = job.record.worker.clone() else {
            return;
        };
        let seq = self.fleet.get(&worker).map_or(0, |w| w.heartbeat.seq);
        job.refused.retain(|(name, _)| *name != worker);
        job.refused.push((worker, seq));
    }

    fn free_job_slots(&self, now: Moment) -> u32 {
        let alive = self.fleet.workers().filter(|(_, w)| w.health(now.mono, &self.config) == WorkerHealth::Alive);
        alive.map(|(_, w)| w.heartbeat.job_slots.total.saturating_sub(w.jobs.used())).sum()
    }

    /// After each batch of inputs.
    pub(in crate::core) fn settle_jobs(&mut self, now: Moment) {
        let long = self.jobs.book.queued() > SHORT_QUEUE && now.since(self.jobs.placed) < LONG_QUEUE_EVERY;
        if self.jobs.place_due && !long {
            self.place_jobs(now);
        }
    }

    /// Gives waiting jobs what is free, in order.
    pub(in crate::core) fn place_jobs(&mut self, now: Moment) {
        (self.jobs.place_due, self.jobs.placed) = (false, now.mono);
        if self.jobs.book.queued() > 0 && self.free_job_slots(now) > 0 {
            let ready = |id: &&StreamId| {
                let job = self.jobs.book.job(id);
                job.is_some_and(|job| job.record.not_before_ms.is_none_or(|at| at <= now.unix_ms))
            };
            let queue: Vec<StreamId> = self.jobs.book.queue().filter(ready).cloned().collect();
            let models = self.fleet.workers().flat_map(|(_, w)| w.heartbeat.models.iter().map(|m| m.name.clone()));
            let listed: HashSet<String> = models.collect();
            let mut hopeless = HashSet::new();
            for id in queue {
                let Some(job) = self.jobs.book.job(&id) else {
                    continue;
                };
                let needs = (job.refused.is_empty() && job.failed.is_empty()).then(|| needs(job, &listed));
                if needs.as_ref().is_some_and(|n| hopeless.contains(n)) {
                    continue;
                }
                if self.place_job(&id, true, now).is_err() {
                    hopeless.extend(needs);
                } else if self.free_job_slots(now) == 0 {
                    break;
                }
            }
        }
        for id in std::mem::take(&mut self.jobs.fresh) {
            self.tell_job_waits(&id, now);
        }
    }
}

/// It could take the job now, or will once a slot is free.
fn has_place<T>(reason: &Result<T, Refusal>) -> bool {
    matches!(reason, Ok(_) | Err(Refusal::NoSlot | Refusal::RefusedBefore))
}

/// What decides whether there is room for it. Models that no worker lists are all alike: strangers may think up as many
/// as there are jobs, and each would be looked for on every worker.
fn needs(job: &Job, listed: &HashSet<String>) -> Needs {
    let known = |model: &&String| listed.contains(*model) || LADDER.contains(&model.as_str());
    let model = job.record.options.model.as_ref();
    Needs {
        model: model.map(|model| Some(model).filter(known).cloned().unwrap_or_default()),
        policy: job.record.options.policy.into(),
        vad: job.chain.as_ref().map(|c| c.vad),
    }
}

/// The record of a job that `worker` is to have.
fn assigned(job: &Job, worker: WorkerName, counted: bool, now: Moment) -> JobRecord {
    JobRecord {
        state: JobState::Assigned,
        epoch: job.next_epoch(),
        attempts: job.record.attempts + u32::from(counted),
        worker: Some(worker),
        changed_ms: now.unix_ms,
        started_ms: job.record.started_ms.or(Some(now.unix_ms)),
        not_before_ms: None,
        ..job.record.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::job;

    #[test]
    fn models_that_nobody_has_are_all_alike() {
        let listed = HashSet::from(["mine".to_owned()]);
        let of = |model: &str| {
            let mut record = job("a");
            record.options.model = Some(model.to_owned());
            needs(&Job::new(record, None, None, Duration::ZERO), &listed)
        };
        assert_eq!(of("thought-up-1"), of("thought-up-2"));
        assert_ne!(of("mine"), of("thought-up-1"));
        assert_ne!(of("medium"), of("thought-up-1"), "a smaller one may stand in for it");
    }
}
