//! How a job comes to its end: tries that failed, cancels, and the end that stands in its chain.

use std::time::Duration;

use voxfleet_schema::{
    event::What,
    failure::{Failure, FailureClass},
    id::StreamId,
    job::{JobRecord, JobState},
    transcript::Final,
};

use super::{ChainEnd, Core, JobEffect};
use crate::{
    jobs::{
        Job, JobMark, Stage,
        decide::{self, Expiry, Verdict},
    },
    moment::Moment,
    reconcile::FINISH_WITHIN,
    sessions::CallId,
};

/// Says in an event that `ASR_DEAD` has no copy.
pub const NOT_KEPT: &str = "ASR_DEAD is full";

impl Core {
    /// A final of a job was stored, by whichever worker.
    pub(in crate::core) fn job_final(&mut self, stored: &Final, now: Moment) {
        self.job_chain(&stored.id, Some(JobMark::from(stored)), now);
    }

    pub(super) fn job_chain(&mut self, id: &StreamId, mark: Option<JobMark>, now: Moment) {
        let Some((job, mark)) = self.jobs.book.job_mut(id).zip(mark) else {
            return;
        };
        if job.saw(mark) {
            job.grown = now.mono;
            self.jobs.book.whole_keeps(id);
        }
        self.check_job_end(id, now);
    }

    /// Writes down what the end of the chain makes of the job, once nothing else is under way.
    pub(super) fn check_job_end(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job(id).filter(|job| job.settled()) else {
            return;
        };
        let ended = job.chain.as_ref().and_then(|mark| decide::ended(&job.record, mark, now.unix_ms));
        match ended {
            // Its dead letter comes first, and that is written with the end.
            Some(next) if next.state == JobState::Failed => {}
            Some(next) => self.save_job(id, next, now),
            None => {}
        }
    }

    /// A try ended without the end of the job.
    pub(super) fn try_failed(&mut self, id: &StreamId, failure: &Failure, now: Moment) {
        let others = self.others_could(id, now);
        let Some(job) = self.jobs.book.job(id) else {
            return;
        };
        let tried = decide::Tried { progressed: job.progressed(), others };
        let verdict = decide::judge(&job.record, failure, tried, self.config.max_attempts);
        let gpu = job.record.worker.as_ref().map(|worker| tracing::field::display(&worker.gpu_id));
        tracing::info!(
            job = %id, gpu, epoch = job.record.epoch, attempts = job.record.attempts, error = %failure, ?verdict, "a try failed"
        );
        match verdict {
            Verdict::Close => self.close_job(id, failure.clone(), now),
            Verdict::Elsewhere { attempts, pause_ms } => {
                let failure = failure.clone();
                self.leave_out(id);
                let change = |next: &mut JobRecord| {
                    next.attempts = attempts;
                    if let Some(pause_ms) = pause_ms {
                        next.not_before_ms = Some(now.unix_ms + pause_ms);
                        next.error = Some(failure);
                    }
                };
                self.requeue_job(id, change, now);
            }
            Verdict::Again { attempts, pause_ms } => {
                let failure = failure.clone();
                self.failed_there(id, now);
                let change = |next: &mut JobRecord| {
                    next.attempts = attempts;
                    // It crashed an engine while nothing else was decoded there.
                    next.suspect |= failure.class == FailureClass::EngineCrash;
                    next.error = Some(failure);
                    next.not_before_ms = Some(now.unix_ms + pause_ms);
                };
                self.requeue_job(id, change, now);
            }
        }
    }

    /// It has failed or is cancelled: first its record says so, then the end of its chain is written.
    pub(super) fn close_job(&mut self, id: &StreamId, why: Failure, now: Moment) {
        let Some(job) = self.jobs.book.job(id) else {
            return;
        };
        let next = JobRecord {
            state: JobState::Closing,
            // Above its worker's: that one lets go when it meets this end.
            epoch: job.next_epoch(),
            error: Some(why),
            not_before_ms: None,
            changed_ms: now.unix_ms,
            ..job.record.clone()
        };
        self.save_job(id, next, now);
    }

    pub(super) fn write_job_end(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id).filter(|job| job.settled()) else {
            return;
        };
        let record = Box::new(job.record.clone());
        job.enter(Stage::Closing, now.mono);
        self.jobs.book.file(id);
        self.job_effect(JobEffect::Close { record });
    }

    /// The end final stands, and what failed was put away; or not.
    pub(super) fn job_closed(&mut self, id: &StreamId, result: Result<ChainEnd, String>, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        if !matches!(job.stage, Stage::Closing) {
            return;
        }
        job.enter(Stage::Settled, now.mono);
        self.jobs.book.file(id);
        let end = match result {
            Ok(end) => end,
            Err(error) => {
                // Upkeep tries again; whoever asks hears how it stands.
                tracing::warn!(job = %id, error, "end of the job not written, trying again");
                return self.job_asks_later(id, now);
            }
        };
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        job.not_kept = end.not_kept;
        let next = decide::ended(&job.record, &end.mark, now.unix_ms);
        job.saw(end.mark);
        if let Some(next) = next {
            self.save_job(id, next, now);
        }
    }

    /// An ended job is looked at again when something of it is due.
    pub(super) fn plan_expiry(&mut self, record: &JobRecord, now: Moment) {
        let at = match decide::expiry(record, now.unix_ms, self.config.topology.transcript_max_age_s) {
            None => return,
            Some(Expiry::Later(at)) => at,
            Some(Expiry::Media | Expiry::Key) => 0,
        };
        self.jobs.book.expire_at(record.id.clone(), at);
    }

    /// Its key says how it ended: it leaves the book.
    pub(super) fn job_ended(&mut self, job: Job, submits: Vec<CallId>, now: Moment) {
        let record = &job.record;
        let id = record.id.clone();
        if let Some(load) = job.charged.as_ref().and_then(|name| self.fleet.job_load_mut(name)) {
            load.unassign(&id);
        }
        self.jobs.place_due = true;
        if let Some(worker) = &record.worker {
            let held = self.fleet.get(worker).and_then(|w| {
                let mut held = w.heartbeat.held.iter();
                held.find(|h| h.kind == voxfleet_schema::id::Kind::Job && h.id == id).map(|h| h.epoch)
            });
            // Its author may not have heard yet that its end final is stored; what was cancelled has nothing to hear.
            let within = if record.state == JobState::Done { FINISH_WITHIN } else { Duration::ZERO };
            self.release_job(worker, &id, held.unwrap_or(record.epoch), within.as_millis() as u32, now);
        }
        let took_ms = record.ended_ms.zip(record.started_ms).map(|(end, start)| end.saturating_sub(start));
        // Seconds of recording for each second since it was first given to a worker.
        let realtime =
            record.duration_ms.zip(took_ms.filter(|ms| *ms > 0)).map(|(long, took)| long as f64 / took as f64);
        tracing::info!(
            job = %id, gpu = record.worker.as_ref().map(|worker| tracing::field::display(&worker.gpu_id)), epoch = record.epoch,
            state = record.state.as_str(), attempts = record.attempts, duration_ms = record.duration_ms,
            took_ms, error = record.error.as_ref().map(tracing::field::display), "job ended"
        );
        let what = match record.state {
            JobState::Failed => What::Failed,
            JobState::Cancelled => What::Cancelled,
            _ => What::Done,
        };
        let (event, not_kept) = (record.clone(), job.not_kept);
        self.job_closed_span(&event, now);
        self.job_event(&id, what, now, |e| {
            e.epoch = Some(event.epoch);
            e.gpu_id = event.worker.map(|w| w.gpu_id.to_string());
            e.error = event.error;
            e.detail = serde_json::json!({ "attempts": event.attempts, "took_ms": took_ms });
            if not_kept {
                e.detail["not_kept"] = NOT_KEPT.into();
            }
            if what == What::Done {
                e.detail["result"] = event.result.into();
                e.detail["duration_ms"] = event.duration_ms.into();
                e.detail["realtime"] = realtime.into();
            }
        });
        self.plan_expiry(&job.record, now);
        for call in submits {
            self.answer_submitted(call, &job.record);
        }
        self.answer_ended(job);
    }
}
