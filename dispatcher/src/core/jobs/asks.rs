//! What strangers ask. Every request is idempotent by its id: it is answered from the key, whoever wrote that.

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    id::StreamId,
    job::{JobList, JobListRequest, JobQuery, JobRecord, JobState, JobStatus, JobSummary, Submitted},
};

use super::{Core, JobEffect, JobLoaded, ListError, PutError};
use crate::{
    core::Answer,
    jobs::{Ask, Job, JobMark, Known, Loading, Stage, Submission, is_part_of, request},
    moment::Moment,
    routing::Rows,
    sessions::CallId,
};

/// Longest list.
const MAX_LIST: u32 = 1_000;
const DEFAULT_LIST: u32 = 100;

impl Core {
    pub(in crate::core) fn ask_status(&mut self, call: CallId, query: JobQuery, now: Moment) {
        self.ask_job(query.job, call, Ask::Status, now);
    }

    pub(in crate::core) fn ask_cancel(&mut self, call: CallId, query: JobQuery, now: Moment) {
        self.ask_job(query.job, call, Ask::Cancel, now);
    }

    pub(in crate::core) fn ask_list(&mut self, call: CallId, mut request: JobListRequest) {
        if request.state == Some(JobState::Unknown) {
            let why = "there is no such state; known are queued, assigned, closing, done, failed and cancelled";
            return self.refuse(call, Failure::new(FailureClass::BadRequest, why));
        }
        request.limit = Some(request.limit.unwrap_or(DEFAULT_LIST).clamp(1, MAX_LIST));
        self.job_effect(JobEffect::List { call, request });
    }

    pub(super) fn jobs_listed(&mut self, call: CallId, result: Result<(Vec<JobRecord>, u64), ListError>) {
        match result {
            Ok((records, total)) => {
                let places = self.jobs.book.places();
                let row = |record: JobRecord| {
                    let progress = self.job_progress(&record);
                    let ahead = places.get(&record.id).copied();
                    JobSummary { ahead, ..request::summary(record, progress) }
                };
                let jobs = records.into_iter().map(row).collect();
                self.answer(call, Answer::Jobs(Box::new(JobList { jobs, total })));
            }
            Err(ListError::Busy) => {
                let failure = self.come_again(FailureClass::NoCapacity, "too many lists are being made");
                self.refuse(call, failure);
            }
            Err(ListError::Failed(error)) => {
                tracing::warn!(error, "jobs cannot be listed");
                let failure = self.come_again(FailureClass::Timeout, "the jobs cannot be read now");
                self.refuse(call, failure);
            }
        }
    }

    pub(super) fn job_submitted(&mut self, call: CallId, submission: Result<Box<Submission>, Failure>, now: Moment) {
        match submission {
            Ok(submission) => self.ask_job(submission.id.clone(), call, Ask::Submit(submission), now),
            Err(failure) => self.refuse(call, failure),
        }
    }

    fn ask_job(&mut self, id: StreamId, call: CallId, ask: Ask, now: Moment) {
        match self.jobs.book.get(&id) {
            Some(Known::Job(_)) => self.ask_known_job(&id, call, ask, now),
            Some(Known::Loading(_)) => {
                if let Some(loading) = self.jobs.book.loading_mut(&id) {
                    loading.asks.push((call, ask));
                }
            }
            None => self.load_job(id, vec![(call, ask)]),
        }
    }

    pub(super) fn load_job(&mut self, id: StreamId, asks: Vec<(CallId, Ask)>) {
        let loading = Loading { asks };
        self.jobs.book.insert(id.clone(), Known::Loading(loading));
        self.job_effect(JobEffect::Load { id });
    }

    /// A key was read.
    pub(super) fn job_loaded(&mut self, id: &StreamId, result: Result<JobLoaded, String>, now: Moment) {
        let asks = match self.jobs.book.get(id) {
            Some(Known::Job(_)) => return self.job_read_again(id, result, now),
            Some(Known::Loading(_)) => match self.jobs.book.remove(id) {
                Some(Known::Loading(loading)) => loading.asks,
                _ => return,
            },
            None => return,
        };
        let loaded = match result {
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::warn!(job = %id, error, "job cannot be read");
                let failure = self.come_again(FailureClass::Timeout, "the job cannot be read now");
                return asks.into_iter().for_each(|(call, _)| self.refuse(call, failure.clone()));
            }
        };
        match loaded.record {
            Some((record, _)) if record.state.has_ended() => {
                self.release_job_holders(id);
                self.plan_expiry(&record, now);
                for (call, ask) in asks {
                    self.ask_ended_job(&record, call, &ask);
                }
            }
            Some((record, revision)) => {
                self.adopt_job(record, revision, loaded.chain, now);
                for (call, ask) in asks {
                    self.ask_job(id.clone(), call, ask, now);
                }
            }
            None => {
                self.release_job_holders(id);
                for (call, ask) in asks {
                    match ask {
                        _ if self.jobs.book.get(id).is_some() => self.ask_job(id.clone(), call, ask, now),
                        Ask::Submit(submission) => self.create_job(call, *submission, loaded.chain.clone(), now),
                        Ask::Status | Ask::Cancel => {
                            self.refuse(call, Failure::new(FailureClass::NotFound, "there is no such job"));
                        }
                    }
                }
            }
        }
    }

    fn ask_ended_job(&mut self, record: &JobRecord, call: CallId, ask: &Ask) {
        match ask {
            Ask::Submit(submission) if submission.same_as(record) => self.answer_submitted(call, record),
            Ask::Submit(_) => self.refuse(call, another()),
            Ask::Status | Ask::Cancel => {
                let status = JobStatus {
                    record: request::told(record),
                    progress: None,
                    ahead: None,
                    why: None,
                    candidates: serde_json::Value::Null,
                };
                self.answer(call, Answer::Job(Box::new(status)));
            }
        }
    }

    fn create_job(&mut self, call: CallId, mut submission: Submission, chain: Option<JobMark>, now: Moment) {
        // A part's name is made of what it is: who has the whole may have begun it himself.
        if chain.is_some() && submission.part.is_none() {
            // A worker would go on behind those finals, in another recording.
            let why = "finals of an earlier job with this id still stand; choose another id";
            return self.refuse(call, Failure::new(FailureClass::BadRequest, why));
        }
        if !self.takes_jobs() {
            let why = if self.jobs.store_filling { "the bucket of jobs is nearly full" } else { "too many jobs wait" };
            let failure = self.queue_full(&submission.id, why, now);
            return self.refuse(call, failure);
        }
        let (traceparent, opening) = self.opens(submission.trace, now);
        let record = JobRecord { traceparent, ..submission.record(now) };
        let whole = record.parent().and_then(|parent| self.jobs.book.job(parent));
        if let Some(whole) = whole.filter(|whole| !is_part_of(&record, whole.wanted())) {
            let why = format!("it is no part of job {}: that has another recording or other options", whole.record.id);
            return self.refuse(call, Failure::new(FailureClass::BadRequest, why));
        }
        let id = record.id.clone();
        let recording = submission.recording.take();
        let mut job = Job::new(record.clone(), None, chain, now.mono);
        job.submits.push(call);
        job.opening = opening;
        let putting = recording.is_some();
        if putting {
            job.enter(Stage::Putting(Box::new(record.clone())), now.mono);
        }
        self.jobs.book.insert(id.clone(), Known::Job(Box::new(job)));
        match recording {
            Some(recording) => self.job_effect(JobEffect::Put { id, recording }),
            None => self.save_job(&id, record, now),
        }
    }

    /// An inline recording was stored, or not.
    pub(super) fn job_put(&mut self, id: &StreamId, result: Result<(), PutError>, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        let Stage::Putting(record) = &job.stage else {
            return;
        };
        let record = record.as_ref().clone();
        match result {
            Ok(()) => self.save_job(id, record, now),
            Err(PutError::Full) => {
                let failure = self.come_again(FailureClass::NoCapacity, "the object store is full");
                self.forget_new_job(id, &failure);
            }
            Err(PutError::Failed(error)) => {
                tracing::warn!(job = %id, error, "recording not stored");
                let failure = self.come_again(FailureClass::Unavailable, "the recording cannot be stored now");
                self.forget_new_job(id, &failure);
            }
        }
    }

    /// A job that never got its key: whoever asked for it hears so.
    pub(super) fn forget_new_job(&mut self, id: &StreamId, failure: &Failure) {
        let Some(Known::Job(job)) = self.jobs.book.remove(id) else {
            return;
        };
        for call in job.submits {
            self.refuse(call, failure.clone());
        }
        for (call, _) in job.later {
            self.refuse(call, Failure::new(FailureClass::NotFound, "there is no such job"));
        }
    }

    fn ask_known_job(&mut self, id: &StreamId, call: CallId, ask: Ask, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        let written = job.revision.is_some();
        match ask {
            Ask::Submit(submission) if !submission.same_as(job.wanted()) => self.refuse(call, another()),
            Ask::Submit(_) if !written => job.submits.push(call),
            Ask::Submit(_) => {
                let record = job.record.clone();
                self.answer_submitted(call, &record);
            }
            Ask::Status if !written => job.later.push((call, Ask::Status)),
            Ask::Status => self.answer_status(id, call, now),
            Ask::Cancel if job.settled() && matches!(job.state(), JobState::Queued | JobState::Assigned) => {
                // Answered once it is written; where that goes wrong, and the job goes on, it is asked again.
                job.later.push((call, Ask::Cancel));
                let why = Failure::new(FailureClass::Cancelled, "cancelled by request");
                self.close_job(id, why, now);
            }
            Ask::Cancel if job.state() == JobState::Closing => self.answer_status(id, call, now),
            Ask::Cancel => job.later.push((call, Ask::Cancel)),
        }
    }

    /// Asks that came while something was under way.
    pub(super) fn job_asks_later(&mut self, id: &StreamId, now: Moment) {
        let later = self.jobs.book.job_mut(id).map(|job| std::mem::take(&mut job.later)).unwrap_or_default();
        for (call, ask) in later {
            self.ask_job(id.clone(), call, ask, now);
        }
    }

    /// The job has ended and leaves the book: what is still asked is answered from its record.
    pub(super) fn answer_ended(&mut self, job: Job) {
        for call in job.submits {
            self.answer_submitted(call, &job.record);
        }
        for (call, ask) in job.later {
            self.ask_ended_job(&job.record, call, &ask);
        }
    }

    pub(super) fn answer_submitted(&mut self, call: CallId, record: &JobRecord) {
        let subjects = self.subjects.job_subjects(&record.id);
        let submitted = Submitted { job: record.id.clone(), state: record.state, subjects };
        self.answer(call, Answer::Submitted(submitted));
    }

    fn answer_status(&mut self, id: &StreamId, call: CallId, now: Moment) {
        self.refresh_roster();
        let Some(job) = self.jobs.book.job(id) else {
            return;
        };
        let (why, candidates) = self.why_job_waits(job, now);
        let status = JobStatus {
            progress: self.job_progress(&job.record),
            ahead: self.jobs.book.ahead(&job.record),
            why,
            candidates,
            record: request::told(&job.record),
        };
        self.answer(call, Answer::Job(Box::new(status)));
    }

    /// With every worker's reason as it would be now.
    fn why_job_waits(&self, job: &Job, now: Moment) -> (Option<String>, serde_json::Value) {
        if job.state() != JobState::Queued {
            return (None, serde_json::Value::Null);
        }
        let (pick, candidates) = self.decide_job(job, |_| Some(Rows::All), now);
        let record = &job.record;
        if record.not_before_ms.is_some_and(|at| at > now.unix_ms) {
            let error = record.error.as_ref().map(ToString::to_string).unwrap_or_default();
            let why = format!("try {} failed, the next one comes soon: {error}", record.attempts);
            return (Some(why), candidates);
        }
        (pick.err().map(|failure| failure.to_string()), candidates)
    }

    /// Whoever holds a job that has ended, or that nobody knows, lets go.
    pub(super) fn release_job_holders(&mut self, id: &StreamId) {
        let holders: Vec<_> = self
            .job_holders()
            .filter(|(_, _, held)| held.id == *id)
            .map(|(name, _, held)| (name.clone(), held.epoch))
            .collect();
        for (worker, epoch) in holders {
            self.job_effect(JobEffect::Release { worker, id: id.clone(), epoch, finish_ms: 0 });
        }
    }
}

fn another() -> Failure {
    Failure::new(FailureClass::BadRequest, "a job with this id was submitted with another request; choose another id")
}
