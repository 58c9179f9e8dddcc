//! File jobs: from a work item to an end final that names the job's aggregate.
//!
//! | module | does |
//! |---|---|
//! | [`recording`] | the recording as a log of entries, decoded in a process of its own |
//! | [`task`] | fetches it, runs it as a session, says how that ended |
//! | [`result`] | the aggregate from the chain; pure |
//! | [`whole`] | a long recording whose parts others do; it uses the three below |
//! | [`parts`] | where it is cut, what is known of each part, whose turn it is; pure |
//! | [`scout`] | cuts it, far ahead of whoever decodes it |
//! | [`copy`] | from the chain of a part into the chain of the whole |
//! | [`part`], [`kept`] | a part as a job of its own; its recording, until the next part of it comes |
//!
//! The chain is the only state: a job that moves goes on behind its last final, and one whose end final stands is done,
//! whoever wrote it.
//!
//! # Long recordings
//!
//! After each final everything starts anew from half a second before its end, so where finals begin follows from the recording
//! alone, and what is said in one from its own audio, the options and the locked language. Two workers can therefore decode
//! two stretches of a recording, and the text is to the letter that of one worker who decodes it in one piece.
//!
//! 1. The worker that takes the job, its parent, decodes finals into its chain as ever, until a final has locked the language.
//!    Meanwhile a scout has the engine cut the recording without decoding it.
//! 2. The finals that begin in the same stretch of `part_s` seconds are a part. Its name is a hash of the parent and of all
//!    that shapes its text, so that every worker calls it the same. Parts are published to `asr.v1.jobs` like any job, a few at
//!    a time; the dispatcher gives them to free slots behind whole recordings of the same priority.
//! 3. A part's finals stand in a chain of its own; the parent copies them into the chain of the whole, in order, each only
//!    where the scout has found one that begins and ends there.
//! 4. The parent does parts itself, in their own chains too: what its chain waits for, then what nobody was asked for, then
//!    what nobody has begun. It needs no slot for that beyond its own, so any number of parents gets done on any number of
//!    slots. Where somebody is given such a part after all, his epoch is higher and the parent lets go: of two who do the same
//!    part, one wins each link of its chain.
//! 5. A part that nobody else can do is decoded in the chain of the whole, as everything is where it is not worth the trouble
//!    (shorter than `split_jobs_over_s`, a prompt that is carried on, a suspect).
//! 6. Where speakers are to be told apart, parts are words alone. The scout listens to the voices between its cuts, which takes
//!    a two-hundredth of the time that speaking took, and whoever copies says whose they are, in order: no voice print travels,
//!    and the labels are those of one piece.
//!
//! What a crash leaves is what stands in the chains. A worker that takes the whole over cuts it again from its last final on,
//! finds the chains of its parts, copies what is done, and gives out again what was begun: whoever still has it keeps it.

mod copy;
mod kept;
mod part;
mod parts;
mod recording;
mod result;
mod scout;
mod task;
mod whole;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use voxfleet_nats::{
    media::{Media, MediaError},
    retry::Backoff,
    transcript::{Chain, ChainError, StoredFinal},
};
use voxfleet_schema::{
    audio::RawEntry,
    codec,
    failure::{Failure, FailureClass},
    id::Kind,
    job::{AudioUrl, JobPart, result_key},
    transcript::{Final, Revision},
};

pub(crate) use self::{
    kept::Kept,
    part::start_of,
    task::{Job, JobEnd, Means, Split, job_options},
};
use self::{
    recording::Recording,
    result::{Aggregate, Times},
};
use crate::{
    capacity::locked,
    memory::{Change, Memory, Stage},
    provider::Rent,
    session::revisions,
};

/// How long a store that does not answer is asked again; then the job is tried elsewhere, from its last final.
const PATIENCE: Duration = Duration::from_secs(60);

/// A full store is looked at again after this: each look decodes the end of the recording once more.
const FULL_FOR_MS: u64 = 60_000;

/// Samples behind the end of a part that its session is given: ten seconds.
const HEARD_BEHIND: u64 = 160_000;

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
    /// Length of the recording's file.
    bytes: u64,
    /// Only this much of it, without an aggregate.
    pub(crate) part: Option<JobPart>,
    /// The session stops behind the first final that reaches this sample.
    pause_at: AtomicU64,
    /// The last final that the session has stored, for whoever goes on behind it.
    stored: Mutex<Option<StoredFinal>>,
    /// Other workers had parts of it: what it cost is not what this one did.
    shared: AtomicBool,
}

impl Work {
    /// The same recording, and this part of it.
    fn for_part(&self, part: JobPart) -> Work {
        Work {
            recording: Arc::clone(&self.recording),
            media: self.media.clone(),
            memory: self.memory.clone(),
            part: Some(part),
            pause_at: AtomicU64::new(u64::MAX),
            stored: Mutex::default(),
            shared: AtomicBool::new(false),
            ..*self
        }
    }

    /// The entry at `from` or the first above it. Of a part none far behind its end: where a final ends is known five seconds
    /// later at the latest.
    pub(crate) async fn entry(&self, from: u64) -> Result<Option<RawEntry>, Failure> {
        let until = self.part.as_ref().and_then(|part| part.until_sample);
        self.recording.next(from, until.map_or(u64::MAX, |until| until.saturating_add(HEARD_BEHIND))).await
    }

    /// A final was stored. True: the session is to stop behind it.
    pub(crate) fn stored(&self, last: &StoredFinal) -> bool {
        *locked(&self.stored) = Some(last.clone());
        last.value.to_sample >= self.pause_at.load(Ordering::Relaxed)
    }

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
        let shared = self.shared.load(Ordering::Relaxed);
        let rent = if shared { Rent { price_per_hour: None, ..self.rent } } else { self.rent };
        let result = aggregate.finish(rent, times, &changes);
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
