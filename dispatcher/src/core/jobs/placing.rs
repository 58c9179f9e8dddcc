//! From a queued job to its worker and back into the queue: decide, send the work item, let go.

use std::{collections::HashSet, time::Duration};

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::{EngineName, WorkerHealth},
    id::{StreamId, WorkerName},
    job::{JobRecord, JobState, WorkItem},
    session::Policy,
    transcript::VadKind,
};

use super::{Core, JobEffect, Jobs, Sent, Work};
use crate::{
    admission::Needs,
    fleet::Load,
    jobs::{Job, Stage, request},
    moment::Moment,
    routing::{Pick, Request, Rows, Slot},
};

/// A worker where a try failed is left out for this long while others are only busy: an hour's wait for another would be
/// worse than a second try.
const FAILED_LEFT_OUT: Duration = Duration::from_secs(300);
/// Workers remembered for that.
const MAX_FAILED: usize = 16;
/// A job that crashed the engines of so many goes to no others.
const CRASHED_ON: usize = 2;
/// A work item that its worker has not fetched for this long goes to another.
const FETCHED_WITHIN: Duration = Duration::from_secs(30);
/// A queue up to this long is gone through at each change, a longer one a few times a second.
const SHORT_QUEUE: usize = 1_000;
const LONG_QUEUE_EVERY: Duration = Duration::from_millis(250);

impl Jobs {
    /// Models that jobs need which a worker was given.
    pub(in crate::core) fn planned<'a>(&'a self, load: &'a Load) -> impl Iterator<Item = Option<&'a String>> {
        self.of(load).filter(|job| job.planned).map(Job::needs_model)
    }
}

impl Core {
    fn vad_of(job: &Job) -> Option<VadKind> {
        let begun_with = job.chain.as_ref().map(|c| c.vad);
        begun_with.or(job.record.part.as_ref().map(|part| part.vad)).filter(|vad| *vad != VadKind::Unknown)
    }

    /// The engine it keeps, where it said that nothing may differ: that of its finals; of a part also that of the whole.
    fn engine_of(&self, job: &Job) -> Option<EngineName> {
        if job.record.options.policy != Policy::ExactModel {
            return None;
        }
        let of_whole = || {
            let whole = self.jobs.book.job(job.record.parent()?)?;
            whole.engine().or_else(|| self.engine_at(whole.record.worker.as_ref()?, job))
        };
        job.engine().or_else(of_whole)
    }

    /// The engine that runs its model on this worker.
    fn engine_at(&self, worker: &WorkerName, job: &Job) -> Option<EngineName> {
        let beat = &self.fleet.get(worker)?.heartbeat;
        let asked = job.record.options.model.as_ref().or(beat.default_model.as_ref())?;
        beat.engine_of(beat.models.iter().find(|model| model.name == *asked)?)
    }

    /// Routes a job, with every worker's reasons if `rows` asks for them. Workers where it failed come last: while another
    /// could take it once a slot is free, they are left out. One that crashed the engines of two goes to these alone.
    pub(super) fn decide_job(
        &self,
        job: &Job,
        rows: impl FnOnce(bool) -> Option<Rows>,
        now: Moment,
    ) -> (Result<Pick, Failure>, serde_json::Value) {
        let refused = self.left_out(&job.refused);
        let request = Request {
            vad: Self::vad_of(job),
            engine: self.engine_of(job),
            leaves: job.charged.as_ref(),
            left_out: &refused,
            ..self.request_for(&job.record.options, false)
        };
        let failed: Vec<Slot> = self.failed_lately(job, now).filter_map(|name| self.roster.slot(name)).collect();
        let has_failed = |name: &WorkerName| self.failed_lately(job, now).any(|other| other == name);
        // It kills engines wherever it goes: the last tries are not for workers that it has not met.
        let poison = job.record.suspect && failed.len() >= CRASHED_ON;
        let without: Vec<Slot> = if poison {
            let strangers = self.fleet.workers().map(|(name, _)| name).filter(|name| !has_failed(name));
            refused.iter().copied().chain(strangers.filter_map(|name| self.roster.slot(name))).collect()
        } else {
            refused.iter().chain(&failed).copied().collect()
        };
        let narrow = Request { left_out: &without, ..request };
        let could = !failed.is_empty() && self.roster.any_could(&narrow, now.mono, |name| has_failed(name) == poison);
        let request = if could { narrow } else { request };
        let pick = self.roster.route(&request, now.mono, &self.config);
        let reasons = rows(pick.is_ok()).map(|rows| {
            let chosen = pick.as_ref().ok().map(|pick| pick.slot);
            self.roster.explain(&request, chosen, now.mono, rows)
        });
        (pick, reasons.unwrap_or_default())
    }

    fn failed_lately<'a>(&self, job: &'a Job, now: Moment) -> impl Iterator<Item = &'a WorkerName> + use<'a> {
        job.failed.iter().filter(move |(_, at)| now.since(*at) < FAILED_LEFT_OUT).map(|(name, _)| name)
    }

    /// A worker where it has not failed could take it, now or once a slot is free.
    pub(super) fn others_could(&mut self, id: &StreamId, now: Moment) -> bool {
        self.refresh_roster();
        let Some(job) = self.jobs.book.job(id) else {
            return false;
        };
        let (vad, engine) = (Self::vad_of(job), self.engine_of(job));
        let request = Request { vad, engine, ..self.request_for(&job.record.options, false) };
        self.roster.any_could(&request, now.mono, |name| {
            job.record.worker.as_ref() != Some(name) && !job.failed.iter().any(|(who, _)| who == name)
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

    /// Finds a worker and starts to write it down. `counted`: it begins a new try.
    pub(super) fn place_job(&mut self, id: &StreamId, counted: bool, now: Moment) -> Result<(), Failure> {
        self.refresh_roster();
        let Some(job) = self.jobs.book.job(id) else {
            return Ok(());
        };
        let (pick, reasons) = self.decide_job(job, |placed| placed.then_some(Rows::Short), now);
        let pick = pick?;
        let worker = self.roster.name(pick.slot).clone();
        // Two workers have the recording from here on: before either has stored a final, neither may go elsewhere alone.
        let shared = job.record.part.as_ref().and_then(|_| self.engine_at(&worker, job));
        let next = JobRecord { instead: pick.instead.clone(), ..assigned(job, worker, counted, now) };
        if let Some(job) = self.jobs.book.job_mut(id) {
            job.reasons = reasons;
            (job.instead, job.planned) = (pick.instead, true);
            job.kept.learn(shared);
        }
        self.jobs.book.whole_keeps(id);
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
        let request = self.request_for(&job.record.options, false);
        let instead = self.roster.instead(&request, &worker, now.mono);
        let mut next = JobRecord { instead, ..assigned(job, worker, false, now) };
        next.epoch = next.epoch.max(above + 1);
        self.save_job(id, next, now);
    }

    /// Writes down which engine it keeps, once that is known.
    pub(super) fn note_job_engine(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id).filter(|job| job.engine_is_due(now.mono)) else {
            return;
        };
        job.kept.tries(now.mono);
        let next = job.record.clone();
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
            instead: job.told_instead.clone(),
            ..job.record.clone()
        };
        change(&mut next);
        self.save_job(id, next, now);
    }

    /// Tells a worker to let go, unless it is dead: then its subjects are purged with it.
    pub(super) fn release_job(&mut self, worker: &WorkerName, id: &StreamId, epoch: u64, finish_ms: u32, now: Moment) {
        if self.fleet.health(worker, now.mono, &self.config) != WorkerHealth::Dead {
            self.job_effect(JobEffect::Release { worker: worker.clone(), id: id.clone(), epoch, finish_ms });
        }
    }

    pub(super) fn job_released(&mut self, worker: &WorkerName, id: &StreamId, epoch: u64, done: bool) {
        // If not, its heartbeat will show the job again.
        if done && let Some(load) = self.fleet.job_load_mut(worker) {
            load.let_go(id);
            self.jobs.place_due = true;
            self.log_job_slot(
                "job released",
                id,
                epoch,
                worker,
                self.jobs.record(id).and_then(|r| r.traceparent.as_ref()),
            );
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
        (job.instead, job.planned) = (job.record.instead.clone(), true);
        self.fleet.touch(&worker);
        let item = request::work_item(&job.record);
        let publish = !job.taken;
        job.enter(Stage::Sending, now.mono);
        self.jobs.book.file(id);
        let traceparent = self.handed(item.traceparent.as_ref(), item.epoch);
        let item = Box::new(WorkItem { traceparent, ..item });
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

    /// After each batch of inputs.
    pub(in crate::core) fn settle_jobs(&mut self, now: Moment) {
        self.refresh_roster();
        let long = self.jobs.book.queued() > SHORT_QUEUE && now.since(self.jobs.placed) < LONG_QUEUE_EVERY;
        if self.jobs.place_due && !long {
            self.place_jobs(now);
        }
    }

    /// Gives waiting jobs what is free, in order.
    pub(in crate::core) fn place_jobs(&mut self, now: Moment) {
        self.refresh_roster();
        (self.jobs.place_due, self.jobs.placed) = (false, now.mono);
        if self.jobs.book.queued() > 0 && self.roster.free(false, now.mono) > 0 {
            let ready = |id: &&StreamId| {
                let job = self.jobs.book.job(id);
                let due = |job: &Job| job.record.not_before_ms.is_none_or(|at| at <= now.unix_ms);
                let wanted = |job: &Job| self.jobs.book.is_wanted(&job.record);
                job.is_some_and(|job| due(job) && wanted(job) && !job.is_done_by_its_parent(now.mono))
            };
            let queue: Vec<StreamId> = self.jobs.book.queue().filter(ready).cloned().collect();
            let mut hopeless = HashSet::new();
            for id in queue {
                let Some(job) = self.jobs.book.job(&id) else {
                    continue;
                };
                let needs = self.job_needs(job);
                if hopeless.contains(&needs) {
                    continue;
                }
                let anywhere = job.refused.is_empty() && job.failed.is_empty();
                if self.place_job(&id, true, now).is_err() {
                    if anywhere {
                        hopeless.insert(needs);
                    }
                    continue;
                }
                self.refresh_roster();
                if self.roster.free(false, now.mono) == 0 {
                    break;
                }
            }
        }
        for id in std::mem::take(&mut self.jobs.fresh) {
            self.tell_job_waits(&id, now);
        }
    }

    /// What decides whether there is room for it.
    fn job_needs(&self, job: &Job) -> Needs {
        let options = &job.record.options;
        let (vad, engine) = (Self::vad_of(job), self.engine_of(job));
        Needs { model: self.model_of(options), policy: options.policy.into(), vad, engine }
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
