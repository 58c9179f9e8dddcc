//! What time brings: reconciliation of keys with heartbeats, what a write left open, expiry.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use voxfleet_schema::{
    event::What,
    failure::{Failure, FailureClass},
    fleet::{Held, WorkerHealth},
    id::{Kind, StreamId, WorkerName},
    job::{JobRecord, JobState},
};

use super::{Core, Expired, JobEffect};
use crate::{
    jobs::{
        Known, Stage,
        decide::{self, Action, Desired, Holder, Owner},
    },
    moment::Moment,
};

/// A read that was lost, and an end that could not be written, are tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// Longer than any write or question takes with all its retries: whatever was to answer it is gone.
const LOST_AFTER: Duration = Duration::from_secs(30);
/// Storing a recording, or an end with its dead letter, may take longer.
const STORING_LOST_AFTER: Duration = Duration::from_secs(120);
/// A job whose workers die one after another, without a final in between, is what kills them.
const MAX_DEATHS: u32 = 10;
/// Ended jobs that are expired at the same time: each deletes objects.
const EXPIRING: usize = 8;
/// One that could not be expired is tried again.
const EXPIRE_AGAIN_MS: u64 = 60_000;

impl Core {
    /// Jobs that were given to a worker before it was heard here.
    pub(in crate::core) fn recharge_jobs(&mut self, name: &WorkerName) {
        self.jobs.place_due = true;
        let mine = |id: &&StreamId| self.jobs.book.job(id).is_some_and(|job| job.record.worker.as_ref() == Some(name));
        let ids: Vec<StreamId> = self.jobs.book.busy().filter(mine).cloned().collect();
        for id in ids {
            self.charge_job_from_record(&id);
        }
    }

    /// A worker has more room than before.
    pub(in crate::core) fn job_room(&mut self) {
        self.jobs.place_due = true;
    }

    /// Somebody wrote a key.
    pub(super) fn job_changed(&mut self, id: StreamId, revision: u64, open: bool) {
        match self.jobs.book.get(&id) {
            Some(Known::Job(job)) if job.settled() && job.revision.is_some_and(|known| known < revision) => {
                self.job_effect(JobEffect::Load { id });
            }
            Some(_) => {}
            None if open => self.load_job(id, Vec::new()),
            None => {}
        }
    }

    /// The pace at which everything is looked at.
    pub(in crate::core) fn tick_jobs(&mut self, now: Moment) {
        let busy: Vec<StreamId> = self.jobs.book.busy().cloned().collect();
        for id in busy {
            let Some(job) = self.jobs.book.job_mut(&id) else {
                continue;
            };
            let age = now.since(job.since);
            let late = age >= AGAIN;
            match (&job.stage, job.state()) {
                (Stage::Reading(_), _) if late => {
                    job.since = now.mono;
                    self.job_effect(JobEffect::Load { id });
                }
                (Stage::Saving(_) | Stage::Sending, _) if age >= LOST_AFTER => self.begin_job_again(&id, now),
                (Stage::Putting(_) | Stage::Closing, _) if age >= STORING_LOST_AFTER => self.begin_job_again(&id, now),
                (Stage::Settled, JobState::Closing) if late => self.write_job_end(&id, now),
                (Stage::Settled, _) => {
                    self.check_job_end(&id, now);
                    self.note_job_engine(&id, now);
                }
                _ => {}
            }
        }
        for id in self.jobs.book.due(now.unix_ms, EXPIRING.saturating_sub(self.jobs.expiring)) {
            self.jobs.expiring += 1;
            self.job_effect(JobEffect::Expire { id });
        }
        self.close_orphans(now);
        self.reconcile_jobs(now);
        self.place_jobs(now);
    }

    /// Nobody waits any more for parts whose whole has ended.
    fn close_orphans(&mut self, now: Moment) {
        for id in self.jobs.book.orphans() {
            let Some(job) = self.jobs.book.job(&id) else {
                continue;
            };
            // A standby may have read a part before the whole.
            let open = matches!(job.state(), JobState::Queued | JobState::Assigned);
            if open && job.settled() && now.since(job.since) >= AGAIN {
                let why = Failure::new(FailureClass::Cancelled, "the recording that it is a part of has ended");
                self.close_job(&id, why, now);
            }
        }
    }

    /// What was under way for a job has not come back, whatever became of it: a task that failed answers nothing.
    fn begin_job_again(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        tracing::error!(job = %id, "what was under way for a job was lost, beginning again");
        match std::mem::replace(&mut job.stage, Stage::Settled) {
            // It may have been written or not.
            Stage::Saving(next) => {
                job.enter(Stage::Reading(next), now.mono);
                self.job_effect(JobEffect::Load { id: id.clone() });
            }
            Stage::Putting(_) => {
                let failure = self.come_again(FailureClass::Timeout, "the recording could not be stored");
                self.forget_new_job(id, &failure);
            }
            Stage::Sending => self.send_work(id, now),
            Stage::Closing => self.write_job_end(id, now),
            other @ (Stage::Settled | Stage::Reading(_)) => job.stage = other,
        }
    }

    /// Its owner says whether it crashed an engine: whoever gets it next is told.
    pub(in crate::core) fn note_suspect_job(&mut self, held: &Held, owner: &WorkerName) {
        if let Some(job) = self.jobs.book.job_mut(&held.id)
            && job.state() == JobState::Assigned
            && job.record.epoch == held.epoch
            && job.record.worker.as_ref() == Some(owner)
        {
            job.record.suspect = held.suspect;
        }
    }

    pub(super) fn job_expired(&mut self, id: StreamId, result: Result<Expired, String>, now: Moment) {
        self.jobs.expiring = self.jobs.expiring.saturating_sub(1);
        match result {
            Ok(expired) => {
                if let Some(at) = expired.next_ms {
                    self.jobs.book.expire_at(id.clone(), at);
                }
                if expired.told {
                    tracing::info!(job = %id, "result expired");
                    self.job_event(&id, What::Expired, now, |_| ());
                }
            }
            Err(error) => {
                tracing::warn!(job = %id, error, "job not expired, trying again");
                self.jobs.book.expire_at(id, now.unix_ms + EXPIRE_AGAIN_MS);
            }
        }
    }

    /// Compares what the keys say with what workers hold, and acts on the difference.
    pub(in crate::core) fn reconcile_jobs(&mut self, now: Moment) {
        let mut holders: HashMap<&StreamId, Vec<Holder<'_>>> = HashMap::new();
        for (worker, known, held) in self.job_holders() {
            let health = known.health(now.mono, &self.config);
            holders.entry(&held.id).or_default().push(Holder { worker, held, heard: known.heard, health });
        }
        let ids: BTreeSet<&StreamId> = self.jobs.book.busy().chain(holders.keys().copied()).collect();
        let mut actions: Vec<(StreamId, Action)> = Vec::new();
        let mut strangers = Vec::new();
        for id in ids {
            let job = match self.jobs.book.get(id) {
                Some(Known::Job(job)) => job,
                Some(Known::Loading(_)) => continue,
                None => {
                    strangers.push(id.clone());
                    continue;
                }
            };
            let desired = Desired {
                record: &job.record,
                settled_since: job.settled().then_some(job.since),
                final_index: job.chain.as_ref().map(|c| c.index),
            };
            let owner = job.record.worker.as_ref().and_then(|name| {
                let health = self.fleet.health(name, now.mono, &self.config);
                let Some(worker) = self.fleet.get(name) else {
                    let dead = Owner { health, heard: Duration::ZERO, given_up: None };
                    return (health == WorkerHealth::Dead).then_some(dead);
                };
                let mut given_up = worker.heartbeat.given_up.iter().filter(|g| g.kind == Kind::Job && g.id == *id);
                let given_up = given_up.find(|g| g.epoch == job.record.epoch).map(|g| &g.failure);
                Some(Owner { health, heard: worker.heard, given_up })
            });
            let held = holders.get(id).map_or(&[][..], Vec::as_slice);
            let found = decide::compare(desired, owner, held);
            actions.extend(found.into_iter().map(|action| (id.clone(), action)));
        }
        for id in strangers {
            self.load_job(id, Vec::new());
        }
        for (id, action) in actions {
            self.act_on_job(&id, action, now);
        }
    }

    fn act_on_job(&mut self, id: &StreamId, action: Action, now: Moment) {
        // An action before it may have set something going for the same job.
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        if action == Action::Taken {
            job.taken = true;
            return;
        }
        let settled = job.settled();
        tracing::debug!(job = %id, ?action, settled, "reconciling");
        match action {
            Action::Release { worker, epoch, finish } => {
                let finish_ms = if finish { self.finish_ms(&worker, false, now) } else { 0 };
                self.release_job(&worker, id, epoch, finish_ms, now);
            }
            Action::CatchUp => self.job_effect(JobEffect::ReadChain { id: id.clone() }),
            _ if !settled => {}
            Action::GaveUp(failure) => self.try_failed(id, &failure, now),
            Action::Displace => self.displace_job(id, now),
            Action::TakeBack => self.take_back(id, now),
            Action::Raise { above } => self.job_again(id, above, now),
            Action::Look => self.send_work(id, now),
            Action::MoveIfRoom => {
                job.taken = true;
                let from = job.record.worker.clone();
                if from
                    .as_ref()
                    .is_some_and(|from| self.fleet.health(from, now.mono, &self.config) == WorkerHealth::Alive)
                {
                    // It is fit, and asks itself that it be somebody else.
                    self.leave_out(id);
                }
                if self.place_job(id, false, now).is_ok()
                    && let Some(job) = self.jobs.book.job_mut(id)
                {
                    job.moved_from = from;
                }
            }
            Action::Taken => {}
        }
    }

    /// Its worker is gone. Another goes on from the last final at once. That was no try of the job's own: workers are taken
    /// away for any reason, and what crashes an engine is found out by the worker that lives.
    fn displace_job(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job(id) else {
            return;
        };
        let gpu = job.record.worker.as_ref().map(|w| w.gpu_id.to_string()).unwrap_or_default();
        let failure = Failure::new(FailureClass::EngineCrash, format!("worker {gpu} died while it had the job"));
        let (deaths, attempts) = match job.progressed() {
            true => (1, 0),
            false => (job.record.deaths + 1, job.record.attempts.saturating_sub(1)),
        };
        if deaths >= MAX_DEATHS {
            return self.close_job(id, failure, now);
        }
        let change = |next: &mut JobRecord| {
            (next.attempts, next.deaths, next.error) = (attempts, deaths, Some(failure));
        };
        self.requeue_job(id, change, now);
    }
}
