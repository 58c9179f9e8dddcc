//! Stays with a job until it has ended.
//!
//! Two witnesses: the chain, whose end final says it even while no dispatcher is active, and the active dispatcher, who knows
//! of jobs that have no final yet. Either is enough.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};
use voxfleet_http::{Refusal, axum::http::StatusCode};
use voxfleet_nats::{
    Nats, ServerError,
    api::{self, ApiError, Endpoint},
    media::Media,
    transcript::{self, Chain, Filter, ReadError, Reader, Start},
};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    id::{Kind, StreamId},
    job::{AudioUrl, JobQuery, JobState, JobStatus},
    transcript::Final,
};

use super::super::api::{of_failure, refusal};

const ASK: Duration = Duration::from_secs(3);
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Largest aggregate that is answered: days of speech.
const MAX_RESULT_BYTES: usize = 256 * 1024 * 1024;

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ended {
    /// With the URL of its aggregate, where it is known.
    Done(Option<String>),
    Failed(Failure),
}

impl Ended {
    fn of_final(value: &Final) -> Self {
        match &value.error {
            None => Ended::Done(value.result.clone()),
            Some(error) => Ended::Failed(error.clone()),
        }
    }

    /// None while it has not ended.
    fn of_status(status: &JobStatus) -> Option<Self> {
        let record = &status.record;
        let failed =
            |class, message: &str| Ended::Failed(record.error.clone().unwrap_or_else(|| Failure::new(class, message)));
        match record.state {
            JobState::Done => Some(Ended::Done(record.result.clone())),
            JobState::Failed => Some(failed(FailureClass::Unknown, "it failed and did not say why")),
            JobState::Cancelled => Some(failed(FailureClass::Cancelled, "it was cancelled")),
            JobState::Queued | JobState::Assigned | JobState::Closing | JobState::Unknown => None,
        }
    }
}

/// What is heard of a job.
pub(crate) enum Step {
    /// As pages read it; only where it changed.
    Progress(Value),
    Final(Box<Final>),
    Ended(Ended),
}

pub(crate) struct Following {
    nats: Nats,
    id: StreamId,
    finals: Reader<Final>,
    ask_at: Instant,
    progress: Value,
    ended: Option<Ended>,
}

impl Following {
    pub(crate) fn new(nats: &Nats, id: StreamId) -> Self {
        let finals = transcript::finals(nats, &Filter::One(Kind::Job, id.clone()), Start::First);
        Self { nats: nats.clone(), id, finals, ask_at: Instant::now(), progress: Value::Null, ended: None }
    }

    /// The next step; nothing comes behind the end.
    pub(crate) async fn next(&mut self) -> Result<Step, Refusal> {
        if let Some(ended) = self.ended.take() {
            return Ok(Step::Ended(ended));
        }
        loop {
            tokio::select! {
                biased;
                read = self.finals.next() => match read {
                    Ok(read) => {
                        if read.value.end {
                            self.ended = Some(Ended::of_final(&read.value));
                        }
                        return Ok(Step::Final(Box::new(read.value)));
                    }
                    Err(ReadError::Server(ServerError::Closed)) => {
                        return Err(Refusal::unavailable("the connection to the transcript is lost"));
                    }
                    Err(error) => tracing::debug!(%error, "transcript not readable now"),
                },
                () = sleep_until(self.ask_at) => {
                    let asked = self.ask().await?;
                    self.ask_at = Instant::now() + ASK_AGAIN;
                    let Some(status) = asked else { continue };
                    if let Some(ended) = Ended::of_status(&status) {
                        return Ok(Step::Ended(ended));
                    }
                    let progress = progress_of(&status);
                    if progress != self.progress {
                        self.progress = progress.clone();
                        return Ok(Step::Progress(progress));
                    }
                }
            }
        }
    }

    /// None: nobody answers now.
    async fn ask(&self) -> Result<Option<JobStatus>, Refusal> {
        let query = JobQuery { job: self.id.clone() };
        match api::request(&self.nats, Endpoint::JobStatus, &query, ASK).await {
            Ok(status) => Ok(Some(status)),
            Err(ApiError::NoDispatcher | ApiError::Timeout | ApiError::Server(_)) => Ok(None),
            Err(error) => Err(refusal(error)),
        }
    }
}

fn progress_of(status: &JobStatus) -> Value {
    let record = &status.record;
    let progress = status.progress;
    json!({
        "job": record.id, "state": record.state, "gpu_id": record.worker.as_ref().map(|worker| &worker.gpu_id),
        "stage": progress.map(|p| p.stage),
        "percent": progress.and_then(|p| p.fraction()).map(|fraction| (fraction * 100.0).floor() as u64),
        "done_ms": progress.map(|p| p.done_ms), "total_ms": progress.and_then(|p| p.total_ms),
        "ahead": status.ahead, "why": status.why, "attempts": record.attempts,
    })
}

/// The aggregate as it is stored, or why there is none.
pub(crate) async fn aggregate(nats: &Nats, id: &StreamId, ended: Ended) -> Result<Bytes, Refusal> {
    let url = match ended {
        Ended::Done(Some(url)) => Some(url),
        Ended::Done(None) => {
            let last = Chain::new(nats).last(Kind::Job, id).await;
            last.map_err(|error| Refusal::unavailable(error.to_string()))?.and_then(|last| last.value.result)
        }
        Ended::Failed(failure) => {
            let mut refusal = of_failure(&failure);
            if failure.class == FailureClass::Cancelled {
                refusal.status = StatusCode::CONFLICT;
            }
            refusal.message = format!("job {id}: {}", failure.message);
            return Err(refusal);
        }
    };
    let Some(AudioUrl::Object { key }) = url.as_deref().and_then(|url| AudioUrl::parse(url).ok()) else {
        return Err(Refusal::not_found(format!("job {id} is done, but where its result is cannot be found out")));
    };
    let bytes = Media::new(nats).get_bytes(&key, MAX_RESULT_BYTES).await;
    let bytes = bytes.map_err(|error| Refusal::unavailable(error.to_string()))?;
    bytes.ok_or_else(|| Refusal::not_found(format!("the result of job {id} is no longer kept")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: &str, more: Value) -> JobStatus {
        let mut record = json!({
            "id": "j", "state": state, "audio": "https://h/a", "options": {}, "result_ttl_s": 60, "epoch": 1,
            "attempts": 1, "submitted_ms": 0, "changed_ms": 0,
        });
        for (name, field) in more.as_object().cloned().unwrap_or_default() {
            record[name] = field;
        }
        let progress = json!({ "stage": "transcribing", "done_ms": 4_290, "total_ms": 10_000 });
        serde_json::from_value(json!({ "record": record, "progress": progress, "ahead": 2 })).expect("a status")
    }

    #[test]
    fn a_record_says_how_it_ended_or_that_it_has_not() {
        let done = Ended::of_status(&status("done", json!({ "result": "object://asr_media/result/j/1.json" })));
        assert_eq!(done, Some(Ended::Done(Some("object://asr_media/result/j/1.json".to_owned()))));
        for state in ["queued", "assigned", "closing"] {
            assert_eq!(Ended::of_status(&status(state, json!({}))), None);
        }
        let failed = status("failed", json!({ "error": { "class": "bad_audio", "message": "noise" } }));
        assert_eq!(Ended::of_status(&failed), Some(Ended::Failed(Failure::new(FailureClass::BadAudio, "noise"))));
        let cancelled = Ended::of_status(&status("cancelled", json!({})));
        assert!(matches!(cancelled, Some(Ended::Failed(failure)) if failure.class == FailureClass::Cancelled));
    }

    #[test]
    fn progress_is_told_in_percent() {
        let told = progress_of(&status("assigned", json!({ "worker": { "gpu_id": "gpu-1", "incarnation": "i" } })));
        assert_eq!((&told["percent"], &told["gpu_id"], &told["ahead"]), (&json!(42), &json!("gpu-1"), &json!(2)));
    }
}
