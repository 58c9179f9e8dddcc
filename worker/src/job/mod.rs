//! File jobs: from a work item to an end final that names the job's aggregate.
//!
//! | module | does |
//! |---|---|
//! | [`recording`] | the recording as a log of entries, decoded in a process of its own |
//! | [`task`] | fetches it, runs it as a session, says how that ended |
//! | [`result`] | the aggregate from the chain; pure |
//!
//! The chain is the only state: a job that moves goes on behind its last final, and one whose end final stands is done,
//! whoever wrote it.

mod recording;
mod result;
mod task;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::Instant;
use voxfleet_nats::{
    media::{Media, MediaError},
    retry::Backoff,
    transcript::{Chain, ChainError},
};
use voxfleet_schema::{
    codec,
    failure::{Failure, FailureClass},
    id::Kind,
    job::{AudioUrl, result_key},
    transcript::{Final, Revision},
};

pub(crate) use self::task::{Job, JobEnd, Means, job_options};
use self::{
    recording::Recording,
    result::{Aggregate, Times},
};
use crate::{
    memory::{Change, Memory, Stage},
    provider::Rent,
    session::revisions,
};

/// How long a store that does not answer is asked again; then the job is tried elsewhere, from its last final.
const PATIENCE: Duration = Duration::from_secs(60);

/// A full store is looked at again after this: each look decodes the end of the recording once more.
const FULL_FOR_MS: u64 = 60_000;

/// What a job's session needs beyond a live one's.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) recording: Arc<Recording>,
    media: Media,
    rent: Rent,
    queue_s: f64,
    fetch_s: f64,
    /// What finals stand for when this worker took it.
    from_s: f64,
    /// When this worker took it.
    taken: Instant,
    begun: Instant,
    /// In use on the device when it began, in MB.
    before_mb: u64,
    memory: Memory,
}

impl Work {
    /// Writes the aggregate that `end`, which is not stored yet, is to name; gives its URL.
    pub(crate) async fn aggregate(&self, chain: &Chain, end: &Final) -> Result<String, Failure> {
        let mut aggregate = Aggregate::default();
        let mut revised = match end.speakers {
            Some(_) => revisions(chain, Kind::Job, &end.id).await.map_err(|error| unreadable(&error))?,
            None => BTreeMap::new(),
        };
        self.read_chain(chain, end, &mut revised, &mut aggregate).await?;
        aggregate.add(end);
        let transcribe = self.begun.elapsed().as_secs_f64();
        let times = Times { queue: self.queue_s, fetch: self.fetch_s, transcribe, from: self.from_s };
        let decoded = self.memory.ended(Stage::Transcribe, self.begun, self.before_mb);
        // A model that was here already is no load of this job.
        let loaded = self.memory.last(Stage::Load, self.taken);
        let changes: Vec<Change> = loaded.into_iter().chain([decoded]).collect();
        let result = aggregate.finish(self.rent, times, &changes);
        let bytes = codec::to_json(&result).map_err(|error| Failure::new(FailureClass::Internal, error.to_string()))?;
        let key = result_key(&end.id, &end.final_id);
        let bytes = bytes::Bytes::from(bytes);
        let began = Instant::now();
        let mut backoff = Backoff::default();
        loop {
            match self.media.put_bytes(&key, bytes.clone()).await {
                Ok(_) => return Ok(AudioUrl::object(&key)),
                Err(error) => {
                    let failure = store_failure(&error);
                    tracing::warn!(job = %end.id, error = &error as &dyn std::error::Error, "aggregate not written");
                    if failure.class != FailureClass::Unavailable || began.elapsed() >= PATIENCE {
                        return Err(failure);
                    }
                    backoff.wait().await;
                }
            }
        }
    }

    /// Every final before `end`, from the leader.
    async fn read_chain(
        &self,
        chain: &Chain,
        end: &Final,
        revised: &mut BTreeMap<u64, Revision>,
        aggregate: &mut Aggregate,
    ) -> Result<(), Failure> {
        let (mut from, mut next_index) = (0, 0);
        let mut backoff = Backoff::default();
        let began = Instant::now();
        while next_index < end.index {
            match chain.next_final(Kind::Job, &end.id, from).await {
                Ok(Some(stored)) if stored.value.index == next_index => {
                    let mut value = stored.value;
                    if let Some(revision) = revised.remove(&value.index) {
                        (value.segments, value.turns) = (revision.segments, revision.turns);
                    }
                    aggregate.add(&value);
                    (from, next_index) = (stored.seq + 1, next_index + 1);
                    backoff = Backoff::default();
                }
                // Another worker has gone on; storing the end final will find that out.
                Ok(Some(stored)) if stored.value.index >= end.index => {
                    tracing::warn!(job = %end.id, next_index, end = end.index, "the chain has gone on elsewhere");
                    return Ok(());
                }
                Ok(_) => return Err(expired(next_index)),
                Err(error @ (ChainError::Foreign { .. } | ChainError::Encode(_))) => {
                    return Err(unreadable(&error));
                }
                Err(error) if began.elapsed() >= PATIENCE => {
                    return Err(Failure::new(FailureClass::Unavailable, format!("the chain cannot be read: {error}")));
                }
                Err(error) => {
                    tracing::warn!(job = %end.id, error = &error as &dyn std::error::Error, "chain not read, trying again");
                    backoff.wait().await;
                }
            }
        }
        Ok(())
    }
}

fn unreadable(error: &ChainError) -> Failure {
    Failure::new(FailureClass::Internal, format!("the chain cannot be read: {error}"))
}

/// A result without its beginning would pass for a whole one.
fn expired(index: u64) -> Failure {
    Failure::new(
        FailureClass::Internal,
        format!("final {index} of this job is no longer stored; a longer topology.transcript_max_age_s keeps it"),
    )
}

fn store_failure(error: &MediaError) -> Failure {
    match error {
        // Waiting is all that helps, and it costs no attempt.
        MediaError::Full => Failure {
            retry_after_ms: Some(FULL_FOR_MS),
            ..Failure::new(
                FailureClass::NoCapacity,
                "the object store asr_media is full, the result waits until something in it is deleted or expires",
            )
        },
        error => Failure::new(FailureClass::Unavailable, format!("the result cannot be written: {error}")),
    }
}
