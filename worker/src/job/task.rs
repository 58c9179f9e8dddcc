//! One job on this worker, from the work item to its end here.

use std::{path::PathBuf, sync::Arc};

use tokio::time::Instant;
use voxfleet_audio::Limits;
use voxfleet_nats::media::Media;
use voxfleet_schema::{
    SAMPLE_RATE_HZ,
    event::What,
    failure::{Failure, FailureClass},
    id::Kind,
    job::{AudioUrl, JobStage, WorkItem},
    session::SessionOptions,
};
use voxfleet_store::fetch::Fetcher;

use super::{Recording, Work, recording::Facts};
use crate::{
    memory::Memory,
    provider::Rent,
    session::{End, Handle, Shared, last_final, unix_ms},
};

/// What every job of this worker uses.
#[derive(Debug, Clone)]
pub(crate) struct Means {
    pub(crate) shared: Shared,
    pub(crate) fetcher: Fetcher,
    pub(crate) media: Media,
    pub(crate) limits: Limits,
    /// Executable of the decoder; none = this one.
    pub(crate) exe: Option<PathBuf>,
    pub(crate) rent: Rent,
    pub(crate) memory: Memory,
}

/// How a job ended here.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum JobEnd {
    /// Its end final stands in the chain.
    Done,
    /// A higher epoch owns it.
    LetGo,
    /// It did not work here: the dispatcher decides what comes next.
    GivenUp(Failure),
}

/// A job as its session sees it: nobody reads partials of a recording, and decoding them would only cost time.
pub(crate) fn job_options(options: &SessionOptions) -> SessionOptions {
    SessionOptions { interim: false, ..options.clone() }
}

pub(crate) struct Job {
    pub(crate) means: Means,
    pub(crate) item: WorkItem,
    pub(crate) handle: Arc<Handle>,
}

impl Job {
    /// Works until the job ends here; drop it to release the job at once.
    pub(crate) async fn run(&self) -> JobEnd {
        let mut wishes = self.handle.desired.subscribe();
        let stopping = async move {
            // The handle lives as long as this job; its end would be the worker's.
            let _ = wishes.wait_for(|wish| wish.finish).await;
        };
        let work = tokio::select! {
            work = self.prepare() => work,
            () = stopping => return JobEnd::GivenUp(worker_stops()),
        };
        let work = match work {
            Ok(Some(work)) => Arc::new(work),
            Ok(None) => return JobEnd::Done,
            Err(failure) => return JobEnd::GivenUp(failure),
        };
        let end = self.handle.session(self.means.shared.clone(), Some(Arc::clone(&work))).run().await;
        self.tell_damage(work.recording.facts());
        match end {
            End::Done => JobEnd::Done,
            End::LetGo { .. } => JobEnd::LetGo,
            End::Failed(failure) => JobEnd::GivenUp(failure),
            End::Finished => JobEnd::GivenUp(worker_stops()),
        }
    }

    /// Whoever reads the result should know that the recording was not whole.
    fn tell_damage(&self, facts: Facts) {
        if !facts.truncated && facts.damaged == 0 {
            return;
        }
        let mut event = self.handle.names.event(What::Gap, self.item.epoch);
        let mut notes = Vec::new();
        if facts.truncated {
            notes.push("the recording breaks off before its end".to_owned());
        }
        if facts.damaged > 0 {
            notes.push(format!("{} damaged parts of the recording are silence", facts.damaged));
        }
        event.detail =
            serde_json::json!({ "truncated": facts.truncated, "damaged": facts.damaged, "note": notes.join("; ") });
        let msg_id = format!("{}-{}-recording", self.item.job, self.item.epoch);
        self.means.shared.events.tell(event, Some(msg_id));
    }

    /// Brings the recording here. None: the job is done already.
    async fn prepare(&self) -> Result<Option<Work>, Failure> {
        let Means { shared, fetcher, media, limits, exe, rent, memory } = &self.means;
        let item = &self.item;
        let taken = Instant::now();
        let from_sample = match last_final(&shared.chain, Kind::Job, &item.job).await {
            Ok(Some(last)) if last.value.end => return Ok(None),
            Ok(last) => last.map_or(0, |last| last.value.to_sample),
            Err(error) => {
                return Err(Failure::new(FailureClass::Internal, format!("the chain cannot be used: {error}")));
            }
        };
        let begun = Instant::now();
        let url =
            AudioUrl::parse(&item.audio).map_err(|error| Failure::new(FailureClass::BadRequest, error.to_string()))?;
        self.handle.figures.enter(JobStage::Fetching);
        let spooled = fetcher.spool(&url).await.map_err(|error| error.failure())?;
        tracing::info!(job = %item.job, bytes = spooled.bytes, fetch_ms = begun.elapsed().as_millis() as u64, "recording fetched");
        let name = item.name.clone().or(spooled.name);
        let recording = Recording::new(spooled.file, name, limits.clone(), exe.clone());
        recording.probe().await?;
        self.handle.figures.length(recording.facts().total_ms);
        self.handle.figures.enter(JobStage::Transcribing);
        Ok(Some(Work {
            recording,
            media: media.clone(),
            rent: *rent,
            queue_s: (unix_ms().saturating_sub(item.submitted_ms) as f64 / 1_000.0 - begun.elapsed().as_secs_f64())
                .max(0.0),
            fetch_s: begun.elapsed().as_secs_f64(),
            from_s: from_sample as f64 / f64::from(SAMPLE_RATE_HZ),
            taken,
            begun: Instant::now(),
            before_mb: memory.used_mb(),
            memory: memory.clone(),
        }))
    }
}

fn worker_stops() -> Failure {
    Failure::new(FailureClass::NoCapacity, "the worker is stopping")
}
