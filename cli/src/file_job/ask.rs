//! Questions to the dispatcher. What is only read can be read from the records too, so it needs none.

use std::time::Duration;

use voxfleet_nats::{
    Nats,
    api::{self, ApiError, Endpoint},
    kv::{Bucket, KvError, Records},
};
use voxfleet_schema::{
    failure::FailureClass,
    id::StreamId,
    job::{AudioUrl, JobList, JobListRequest, JobQuery, JobRecord, JobRequest, JobStatus, JobSummary, Submitted},
};

use crate::{
    env::{ProcessEnv, trace},
    exit::{Exit, OrExit as _, coded},
};

/// A dispatcher that takes over does so within seconds, and asks for the same id mean the same.
const SUBMIT: Duration = Duration::from_secs(20);
const CANCEL: Duration = Duration::from_secs(10);
/// For what the records tell as well.
const READ: Duration = Duration::from_secs(3);
const DEFAULT_LIMIT: u32 = 100;

pub(crate) async fn submit(nats: &Nats, request: &JobRequest) -> Result<Submitted, ApiError> {
    api::request_traced(nats, Endpoint::JobSubmit, request, trace(&ProcessEnv).as_ref(), SUBMIT).await
}

/// How it stands after that; a job that has ended stays as it is. None: there is no such job.
pub(crate) async fn cancel(nats: &Nats, id: &StreamId) -> Result<Option<JobStatus>, ApiError> {
    known(api::request(nats, Endpoint::JobCancel, &JobQuery { job: id.clone() }, CANCEL).await)
}

/// As the dispatcher sees it; only a dispatcher knows progress and reasons.
pub(crate) async fn fresh(nats: &Nats, id: &StreamId) -> Result<Option<JobStatus>, ApiError> {
    known(api::request(nats, Endpoint::JobStatus, &JobQuery { job: id.clone() }, READ).await)
}

fn known<T>(answer: Result<T, ApiError>) -> Result<Option<T>, ApiError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(ApiError::Refused(failure)) if failure.class == FailureClass::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// As the dispatcher sees it, or as its record says. None: there is no such job.
pub(crate) async fn status(nats: &Nats, id: &StreamId) -> anyhow::Result<Option<JobStatus>> {
    match fresh(nats, id).await {
        Ok(status) => Ok(status),
        Err(ApiError::NoDispatcher | ApiError::Timeout) => {
            let why = |record: &JobRecord| (!record.state.has_ended()).then(|| "no dispatcher answers".to_owned());
            let status = |mut record: JobRecord| {
                // As a dispatcher tells it: without a signature.
                record.audio = AudioUrl::redacted(&record.audio).to_owned();
                JobStatus {
                    why: why(&record),
                    record,
                    progress: None,
                    ahead: None,
                    candidates: serde_json::Value::Null,
                }
            };
            Ok(record(nats, id).await?.map(status))
        }
        Err(error) => Err(refused(error, id)),
    }
}

pub(crate) async fn record(nats: &Nats, id: &StreamId) -> anyhow::Result<Option<JobRecord>> {
    match Records::<JobRecord>::new(nats, Bucket::Jobs).get(id.as_str()).await {
        Ok(found) => Ok(found.map(|versioned| versioned.value)),
        Err(error) => Err(unreadable(error)),
    }
}

/// Newest first.
pub(crate) async fn list(nats: &Nats, request: &JobListRequest) -> anyhow::Result<JobList> {
    match api::request(nats, Endpoint::JobList, request, READ).await {
        Ok(list) => Ok(list),
        Err(ApiError::NoDispatcher | ApiError::Timeout) => {
            let records = Records::<JobRecord>::new(nats, Bucket::Jobs).all().await.map_err(unreadable)?;
            Ok(from_records(records.into_iter().map(|(_, versioned)| versioned.value).collect(), request))
        }
        Err(error) => Err(coded(Exit::of_api(&error), error.into())),
    }
}

fn unreadable(error: KvError) -> anyhow::Error {
    coded(Exit::Unavailable, anyhow::Error::new(error).context("reading the jobs"))
}

fn from_records(mut records: Vec<JobRecord>, request: &JobListRequest) -> JobList {
    records.retain(|record| request.wants(record));
    records.sort_by(|a, b| b.submitted_ms.cmp(&a.submitted_ms).then_with(|| a.id.cmp(&b.id)));
    let total = records.len() as u64;
    records.truncate(request.limit.unwrap_or(DEFAULT_LIMIT) as usize);
    let summary = |r: JobRecord| JobSummary {
        job: r.id,
        state: r.state,
        name: r.name,
        priority: r.options.priority,
        submitted_ms: r.submitted_ms,
        ended_ms: r.ended_ms,
        duration_ms: r.duration_ms,
        gpu_id: r.worker.map(|w| w.gpu_id),
        progress: None,
        error: r.error,
        ahead: None,
    };
    JobList { jobs: records.into_iter().map(summary).collect(), total }
}

pub(crate) fn refused(error: ApiError, id: &StreamId) -> anyhow::Error {
    coded(Exit::of_api(&error), anyhow::Error::new(error).context(format!("job {id}")))
}

pub(crate) fn unknown<T>(id: &StreamId) -> anyhow::Result<T> {
    Err(anyhow::anyhow!("there is no job {id}")).or_exit(Exit::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_schema::job::JobState;

    fn a_record(id: &str, state: &str, submitted_ms: u64) -> JobRecord {
        serde_json::from_value(serde_json::json!({
            "id": id, "state": state, "audio": "https://h/a", "options": {}, "result_ttl_s": 60, "epoch": 1,
            "attempts": 1, "submitted_ms": submitted_ms, "changed_ms": 0,
        }))
        .expect("a record")
    }

    #[test]
    fn records_are_listed_like_the_dispatcher_does() {
        let records = vec![a_record("a", "done", 1), a_record("b", "failed", 3), a_record("c", "done", 2)];
        let list = |state, limit| {
            let list = from_records(records.clone(), &JobListRequest { state, limit, parts_of: None });
            (list.jobs.iter().map(|j| j.job.to_string()).collect::<Vec<_>>().join(" "), list.total)
        };
        assert_eq!(list(None, None), ("b c a".to_owned(), 3));
        assert_eq!(list(Some(JobState::Done), Some(1)), ("c".to_owned(), 2));
    }
}
