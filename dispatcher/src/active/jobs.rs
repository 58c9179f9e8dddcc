//! File jobs: the door they come in by, and the effects carried out for them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use voxfleet_nats::{
    Nats,
    api::ApiResponder,
    dead::DeadLetters,
    fleet as workers,
    jobs::{self as queue, JobAck, WorkError},
    kv::{Bucket, KvError, Records},
    media::{Media, MediaError},
    publish::{PublishError, Publisher},
    transcript::{Chain, ChainError, Outcome, StoredFinal},
};
use voxfleet_schema::{
    dead::DeadLetter,
    event::{Event, Scope, What},
    failure::{Failure, FailureClass},
    fleet::{ControlReply, ControlRequest},
    id::{Kind, StreamId, WorkerName},
    job::{JobListRequest, JobRecord, JobState, WorkItem},
};

use super::effects::{describe, unix_ms};
use crate::{
    config::DispatcherConfig,
    core::{
        Answer,
        jobs::{
            ChainEnd, Expired, JobEffect, JobInput, JobLoaded, JobSaveError, ListError, NOT_KEPT, PutError, Sent, Work,
        },
    },
    jobs::{
        JobMark, Recording,
        decide::{self, Expiry},
        letters, request,
    },
};

/// Memory for requests with a recording inside, in kB: twenty of the largest, decoded and not.
const RECORDINGS_KB: u32 = 128 * 1024;
/// How long writing the end of a job may take; it holds a permit.
const CLOSE_WITHIN: Duration = Duration::from_secs(30);
/// How much of a refused request is put away, in bytes.
pub(super) const MAX_KEPT: usize = 64 * 1024;
/// A publish that cannot be taken now comes again after this, unless the refusal says otherwise.
const COME_AGAIN: Duration = Duration::from_secs(1);
/// Stands for a name that is none, where a subject needs one.
const NO_NAME: &str = "_invalid";

/// What strangers' recordings may take of this process's memory.
#[derive(Clone)]
pub(super) struct Budget(Arc<Semaphore>);

impl Budget {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(RECORDINGS_KB as usize)))
    }

    /// A body and what is decoded from it, in kB.
    fn cost(len: usize) -> u32 {
        u32::try_from(2 * len / 1024 + 1).unwrap_or(u32::MAX).min(RECORDINGS_KB)
    }

    /// None: no room now.
    pub(super) fn try_take(&self, len: usize) -> Option<OwnedSemaphorePermit> {
        self.0.clone().try_acquire_many_owned(Self::cost(len)).ok()
    }

    /// Waits for room for the largest request.
    pub(super) async fn take(&self, len: usize) -> Option<OwnedSemaphorePermit> {
        // Never closed.
        self.0.clone().acquire_many_owned(Self::cost(len)).await.ok()
    }

    /// Gives back what a smaller body than expected does not need.
    pub(super) fn shrink(permit: &mut OwnedSemaphorePermit, len: usize) {
        let excess = permit.num_permits().saturating_sub(Self::cost(len) as usize);
        drop(permit.split(excess));
    }
}

/// Who waits for an answer.
pub(super) enum Caller {
    Api(Box<ApiResponder>),
    Door(Box<AtTheDoor>),
}

/// A bare publish: its answer is an ack, and what is refused for good is put away for its sender to find.
pub(super) struct AtTheDoor {
    pub(super) ack: JobAck,
    pub(super) id: Option<StreamId>,
    pub(super) seq: u64,
    pub(super) content_type: Option<String>,
    /// The first [`MAX_KEPT`] bytes of its body, and how many there were.
    pub(super) body: Bytes,
    pub(super) body_bytes: usize,
}

/// Reading all keys takes memory: one list is made at a time, and a few may wait for it.
#[derive(Clone)]
struct Lists {
    places: Arc<Semaphore>,
    turn: Arc<Semaphore>,
}

/// Lists being made or waited for.
const MAX_LISTS: usize = 8;

impl Lists {
    fn new() -> Self {
        Self { places: Arc::new(Semaphore::new(MAX_LISTS)), turn: Arc::new(Semaphore::new(1)) }
    }

    /// Waits for its turn, which lasts until both permits are dropped. None: too many wait.
    async fn turn(&self) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        // Never closed.
        Some((place, self.turn.clone().acquire_owned().await.ok()?))
    }
}

/// Everything the effects of jobs need.
#[derive(Clone)]
pub(super) struct JobTools {
    nats: Nats,
    records: Records<JobRecord>,
    chain: Chain,
    media: Media,
    publisher: Publisher,
    letters: DeadLetters,
    lists: Lists,
    control_timeout: Duration,
    transcript_s: u64,
    /// This dispatcher's.
    name: Arc<str>,
}

impl JobTools {
    pub(super) fn new(nats: &Nats, config: &DispatcherConfig, publisher: Publisher, name: Arc<str>) -> Self {
        Self {
            nats: nats.clone(),
            records: Records::new(nats, Bucket::Jobs),
            chain: Chain::new(nats),
            media: Media::new(nats),
            publisher,
            letters: DeadLetters::new(nats),
            lists: Lists::new(),
            control_timeout: Duration::from_millis(config.control_timeout_ms),
            transcript_s: config.topology.transcript_max_age_s,
            name,
        }
    }

    pub(super) async fn carry_out(&self, effect: JobEffect) -> Option<JobInput> {
        Some(match effect {
            JobEffect::Load { id } => {
                let result = self.load(&id).await.map(Box::new).map_err(|e| describe(&e));
                JobInput::Loaded { id, result }
            }
            JobEffect::Put { id, recording } => {
                let result = self.put(&id, recording).await;
                JobInput::Put { id, result }
            }
            JobEffect::Save { id, record, revision } => {
                let written = match revision {
                    Some(revision) => self.records.update(id.as_str(), &record, revision).await,
                    None => self.records.create(id.as_str(), &record).await,
                };
                JobInput::Saved { id, result: written.map_err(|error| save_error(&error)) }
            }
            JobEffect::Send { worker, item, publish } => {
                let result = self.send(&worker, &item, publish).await;
                JobInput::Sent { id: item.job, epoch: item.epoch, result }
            }
            JobEffect::Release { worker, id, epoch, finish_ms } => {
                let done = self.release(&worker, &id, epoch, finish_ms).await;
                JobInput::Released { worker, id, epoch, done }
            }
            JobEffect::ReadChain { id } => match self.chain.last(Kind::Job, &id).await {
                Ok(last) => JobInput::Chain { mark: last.map(|s| JobMark::from(&s.value)), id },
                Err(error) => {
                    // The next tick sees the same difference.
                    tracing::warn!(job = %id, error = %error, "last final cannot be read");
                    return None;
                }
            },
            JobEffect::Close { record } => {
                let closing = tokio::time::timeout(CLOSE_WITHIN, self.close(&record)).await;
                let result = closing.unwrap_or_else(|_| Err("no answer in time".to_owned()));
                JobInput::Closed { id: record.id, result }
            }
            JobEffect::Expire { id } => {
                let result = self.expire(&id).await;
                JobInput::Expired { id, result }
            }
            JobEffect::List { call, request } => {
                let result = match self.lists.turn().await {
                    Some(_turn) => self.list(&request).await.map_err(|e| ListError::Failed(describe(&e))),
                    None => Err(ListError::Busy),
                };
                JobInput::Listed { call, result }
            }
        })
    }

    async fn load(&self, id: &StreamId) -> Result<JobLoaded, KvError> {
        let (record, chain) = tokio::join!(self.records.get(id.as_str()), last_mark(&self.chain, id));
        Ok(JobLoaded { record: record?.map(|v| (v.value, v.revision)), chain: chain? })
    }

    async fn put(&self, id: &StreamId, recording: Recording) -> Result<(), PutError> {
        let key = voxfleet_schema::job::audio_key(id);
        match self.media.put_bytes(&key, recording.bytes.clone()).await {
            Ok(_) => Ok(()),
            Err(MediaError::Full) => Err(PutError::Full),
            Err(error) => Err(PutError::Failed(describe(&error))),
        }
    }

    async fn send(&self, worker: &WorkerName, item: &WorkItem, publish: bool) -> Result<Sent, String> {
        let chain = last_mark(&self.chain, &item.job).await.map_err(|e| describe(&e))?;
        if chain.as_ref().is_some_and(|mark| mark.end.is_some()) {
            return Ok(Sent { chain, work: Work::NotNeeded });
        }
        let queued = if publish {
            queue::publish_work(&self.nats, worker, item).await.map(|_| true)
        } else {
            let found = queue::queued_work(&self.nats, worker, &item.job).await;
            found.map(|found| found.is_some_and(|found| found.epoch == item.epoch))
        };
        let work = match queued {
            Ok(true) => Work::Queued,
            Ok(false) => Work::Missing,
            Err(WorkError::Newer { epoch }) => Work::Newer { epoch },
            Err(error) => return Err(describe(&error)),
        };
        Ok(Sent { chain, work })
    }

    /// True when the worker says that it holds the job no longer.
    async fn release(&self, worker: &WorkerName, id: &StreamId, epoch: u64, finish_ms: u32) -> bool {
        // A later assignment to the same worker stays.
        let stale = match queue::queued_work(&self.nats, worker, id).await {
            Ok(item) => item.is_some_and(|item| item.epoch <= epoch),
            Err(WorkError::Malformed { .. }) => true,
            Err(error) => {
                tracing::warn!(job = %id, gpu = %worker.gpu_id, error = %error, "queued work cannot be read");
                false
            }
        };
        if stale && let Err(error) = queue::purge_work(&self.nats, worker, id).await {
            // A worker that takes it is told to let go when its heartbeat shows it.
            tracing::warn!(job = %id, gpu = %worker.gpu_id, error = %error, "queued work not taken back");
        }
        let request = ControlRequest::Release { kind: Kind::Job, id: id.clone(), epoch, finish_ms };
        match workers::control(&self.nats, worker, &request, self.control_timeout).await {
            Ok(ControlReply::Done) => true,
            Ok(reply) => {
                tracing::info!(job = %id, gpu = %worker.gpu_id, ?reply, "worker did not let go");
                false
            }
            Err(error) => {
                tracing::info!(job = %id, gpu = %worker.gpu_id, error = %error, "worker did not answer");
                false
            }
        }
    }

    /// Ends the chain of a job that failed or was cancelled. An end that stands there wins.
    async fn close(&self, record: &JobRecord) -> Result<ChainEnd, String> {
        let mark = loop {
            let (last, predecessor) = match self.chain.last(Kind::Job, &record.id).await {
                Ok(Some(StoredFinal { seq, value })) => (Some(value), Some(seq)),
                Ok(None) => (None, None),
                // Somebody else wrote there: the end comes behind it all the same.
                Err(ChainError::Foreign { seq, .. }) => (None, Some(seq)),
                Err(error) => return Err(describe(&error)),
            };
            if let Some(last) = last.as_ref().filter(|last| last.end) {
                break JobMark::from(last);
            }
            let final_id = uuid::Uuid::new_v4().to_string();
            let end = request::closing_final(record, last.as_ref(), final_id).map_err(|e| describe(&e))?;
            match self.chain.traced(record.traceparent).store(&end, predecessor).await.map_err(|e| describe(&e))? {
                Outcome::Stored { .. } => break JobMark::from(&end),
                // Its worker was faster: behind that final, then.
                Outcome::LetGo(_) | Outcome::Rebuild(_) => {}
            }
        };
        let mut kept = true;
        let failed = mark.end.as_ref().and_then(|end| end.error.as_ref());
        if let Some(error) = failed.filter(|error| error.class != FailureClass::Cancelled) {
            let once = letters::failed_once(record);
            kept = self.keep(&letters::failed(record, error, &self.name, unix_ms()), &once).await?;
        }
        Ok(ChainEnd { mark, not_kept: !kept })
    }

    /// Puts a letter into `ASR_DEAD`. False: that is full, and the job goes on without, or nothing would ever end again.
    /// `once`: a second one of that name, after an answer that was lost, is not stored.
    async fn keep(&self, letter: &DeadLetter, once: &str) -> Result<bool, String> {
        match self.publisher.dead_once(Kind::Job, &letter.id, letter, once).await {
            Ok(()) => Ok(true),
            Err(PublishError::Server(error)) if error.is_full() => {
                tracing::error!(job = %letter.id, "ASR_DEAD is full, what failed is not kept there");
                Ok(false)
            }
            Err(error) => Err(describe(&error)),
        }
    }

    async fn expire(&self, id: &StreamId) -> Result<Expired, String> {
        let nothing = Expired { next_ms: None, told: false };
        let Some(found) = self.records.get(id.as_str()).await.map_err(|e| describe(&e))? else {
            return Ok(nothing);
        };
        match decide::expiry(&found.value, unix_ms(), self.transcript_s) {
            None => Ok(nothing),
            Some(Expiry::Later(at)) => Ok(Expired { next_ms: Some(at), told: false }),
            Some(Expiry::Media) => {
                let letter = found.value.state == JobState::Failed && self.has_letter(id).await?;
                for key in decide::media_due(&found.value, letter) {
                    self.media.delete(&key).await.map_err(|e| describe(&e))?;
                }
                let next = JobRecord { expired: true, changed_ms: unix_ms(), ..found.value };
                match self.records.update(id.as_str(), &next, found.revision).await {
                    Ok(_) => Ok(Expired { next_ms: Some(unix_ms()), told: true }),
                    Err(error) if save_error(&error) == JobSaveError::Full => {
                        tracing::warn!(job = %id, "the bucket of jobs is full: the key goes with its result");
                        self.records.purge(id.as_str(), found.revision).await.map_err(|e| describe(&e))?;
                        Ok(Expired { next_ms: None, told: true })
                    }
                    Err(error) => Err(describe(&error)),
                }
            }
            Some(Expiry::Key) => {
                self.records.purge(id.as_str(), found.revision).await.map_err(|e| describe(&e))?;
                Ok(nothing)
            }
        }
    }

    async fn has_letter(&self, id: &StreamId) -> Result<bool, String> {
        self.letters.any_of(Kind::Job, id).await.map_err(|e| describe(&e))
    }

    /// The newest of those asked for, and how many there are.
    async fn list(&self, request: &JobListRequest) -> Result<(Vec<JobRecord>, u64), KvError> {
        let all = self.records.all().await?.into_iter().map(|(_, v)| v.value);
        let mut records: Vec<JobRecord> = all.filter(|record| request.wants(record)).collect();
        let total = records.len() as u64;
        records.sort_by(|a, b| b.submitted_ms.cmp(&a.submitted_ms).then_with(|| a.id.cmp(&b.id)));
        records.truncate(request.limit.unwrap_or(u32::MAX) as usize);
        Ok((records, total))
    }

    /// Answers a bare publish.
    pub(super) async fn answer_door(&self, at: AtTheDoor, answer: Answer) {
        let Answer::Refused(failure) = answer else {
            if let Err(error) = at.ack.done().await {
                // It comes again and is the same request.
                tracing::warn!(error = %error, "submitted job not acked");
            }
            return;
        };
        let later = match failure.retry_after_ms {
            Some(ms) => Some(Duration::from_millis(ms)),
            None => match self.put_away(&at, &failure).await {
                Ok(()) => None,
                Err(error) => {
                    tracing::warn!(error, "refused job not put away, it comes again");
                    Some(COME_AGAIN)
                }
            },
        };
        let acked = match later {
            Some(delay) => at.ack.later(delay.max(COME_AGAIN)).await,
            None => at.ack.done().await,
        };
        if let Err(error) = acked {
            tracing::warn!(error = %error, "submitted job not acked");
        }
    }

    async fn put_away(&self, at: &AtTheDoor, failure: &Failure) -> Result<(), String> {
        let id = match &at.id {
            Some(id) => id.clone(),
            None => StreamId::new(NO_NAME).map_err(|e| describe(&e))?,
        };
        tracing::info!(job = %id, seq = at.seq, error = %failure, "published job refused");
        let published = letters::Published {
            seq: at.seq,
            content_type: at.content_type.as_deref(),
            body: &at.body,
            body_bytes: at.body_bytes,
        };
        let letter = letters::refused(&id, published, failure, &self.name, unix_ms());
        let kept = self.keep(&letter, &letters::refused_once(at.seq)).await?;
        let mut event = Event::new(Scope::Job, id.as_str(), What::Rejected, unix_ms());
        event.seq = Some(at.seq);
        event.error = Some(failure.clone());
        if !kept {
            event.detail = serde_json::json!({ "not_kept": NOT_KEPT });
        }
        self.publisher.event(&event).await.map_err(|e| describe(&e))
    }
}

fn save_error(error: &KvError) -> JobSaveError {
    match error {
        KvError::Conflict { .. } => JobSaveError::Conflict,
        KvError::Server(server) if server.is_full() => JobSaveError::Full,
        other => JobSaveError::Failed(describe(other)),
    }
}

/// What the leader knows of a job's last final.
pub(super) async fn last_mark(chain: &Chain, id: &StreamId) -> Result<Option<JobMark>, voxfleet_nats::ServerError> {
    match chain.last(Kind::Job, id).await {
        Ok(stored) => Ok(stored.map(|s| JobMark::from(&s.value))),
        Err(ChainError::Server(error)) => Err(error),
        Err(error) => {
            // Somebody else writes there; the job goes on without that knowledge, its worker meets the same wall.
            tracing::error!(job = %id, error = %error, "last final cannot be read");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future as _;

    use super::*;

    #[tokio::test]
    async fn one_list_at_a_time_and_not_everybody_may_wait() {
        let lists = Lists::new();
        let first = lists.turn().await.expect("nobody else");
        let mut waiting: Vec<_> = (1..MAX_LISTS).map(|_| Box::pin(lists.turn())).collect();
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        for turn in &mut waiting {
            assert!(turn.as_mut().poll(&mut context).is_pending());
        }
        assert!(lists.turn().await.is_none(), "no place left");
        drop(first);
        let second = waiting.remove(0).await;
        assert!(second.is_some() && waiting[0].as_mut().poll(&mut context).is_pending());
    }
}
