//! One job on this worker, from the work item to its end here.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64},
    },
};

use tokio::time::Instant;
use voxfleet_audio::Limits;
use voxfleet_nats::{
    Nats,
    media::Media,
    transcript::{ChainError, StoredFinal},
};
use voxfleet_schema::{
    SAMPLE_RATE_HZ,
    event::What,
    failure::{Failure, FailureClass},
    id::Kind,
    job::{AudioUrl, JobStage, WorkItem},
    session::{Diarize, SessionOptions},
};
use voxfleet_store::fetch::Fetcher;
use voxfleet_trace::{Span, unix_ns};

use super::{Kept, Recording, Work, part::mark, recording::Facts};
use crate::{
    engine::diarize::lacking,
    memory::Memory,
    provider::Rent,
    session::{End, Handle, Shared, last_final, part, unix_ms},
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
    pub(crate) nats: Nats,
    pub(crate) split: Split,
    pub(crate) kept: Kept,
}

/// Which recordings others may have parts of, in samples.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Split {
    /// Longer ones; the highest value = none.
    pub(crate) longer_than: u64,
    /// Length of a part.
    pub(crate) part_samples: u64,
    /// Free memory that it takes to tell speakers apart where they are wanted if they can be had, in MB.
    pub(crate) speakers_need_mb: u64,
}

impl Split {
    /// Whether parts of this job may be given out, as far as is known before anything is decoded. What a final says must not
    /// depend on those before it.
    fn concerns(self, item: &WorkItem, total_ms: Option<u64>) -> bool {
        let options = &item.options;
        let long = total_ms.is_none_or(|ms| ms * (u64::from(SAMPLE_RATE_HZ) / 1_000) >= self.longer_than);
        // By channels it would be cut in other places.
        let heard = || options.diarize != Diarize::Auto || lacking(self.speakers_need_mb).is_none();
        let apart = !options.carry_prompt && item.part.is_none() && !item.suspect;
        self.longer_than < u64::MAX && long && apart && heard()
    }
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
        let begun_ns = unix_ns();
        let end = self.try_it().await;
        self.told("job.run", begun_ns, |span| {
            let (how, class) = match &end {
                JobEnd::Done => ("done", None),
                JobEnd::LetGo => ("let_go", None),
                JobEnd::GivenUp(failure) => ("given_up", Some(failure.class)),
            };
            span.with("attempt", u64::from(self.item.attempt)).with("end", how).failed(class)
        });
        end
    }

    async fn try_it(&self) -> JobEnd {
        let mut wishes = self.handle.desired.subscribe();
        let stopping = async move {
            // The handle lives as long as this job; its end would be the worker's.
            let _ = wishes.wait_for(|wish| wish.finish).await;
        };
        let work = tokio::select! {
            work = self.prepare() => work,
            () = stopping => return JobEnd::GivenUp(worker_stops()),
        };
        let (work, last) = match work {
            Ok(Some((work, last))) => (Arc::new(work), last),
            Ok(None) => return JobEnd::Done,
            Err(failure) => return JobEnd::GivenUp(failure),
        };
        let begun_ns = unix_ns();
        let transcribed = |apart: bool| {
            let audio_ms = work.recording.facts().total_ms;
            self.told("job.transcribe", begun_ns, |span| span.with("in_parts", apart).with_some("audio_ms", audio_ms));
        };
        if self.means.split.concerns(&self.item, work.recording.facts().total_ms) {
            let end = self.run_whole(Arc::clone(&work), last).await;
            transcribed(true);
            self.tell_damage(work.recording.facts());
            return end;
        }
        let end = self.handle.session(self.means.shared.clone(), Some(Arc::clone(&work))).run().await;
        transcribed(false);
        self.tell_damage(work.recording.facts());
        if let (Some(part), End::Done) = (&self.item.part, &end) {
            let (recording, at) = (Arc::clone(&work.recording), work.recording.position().await);
            let whose = (part.parent.clone(), self.item.audio.clone());
            self.means.kept.put(whose, recording, work.bytes, at, Instant::now());
        }
        match end {
            End::Done => JobEnd::Done,
            End::LetGo { .. } => JobEnd::LetGo,
            End::Failed(failure) => JobEnd::GivenUp(failure),
            End::Finished | End::Paused => JobEnd::GivenUp(worker_stops()),
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

    /// Tells what was done until now to those who follow its trace.
    fn told(&self, name: &'static str, begun_ns: u64, with: impl FnOnce(Span) -> Span) {
        if let Some(given) = &self.item.traceparent {
            let whose = (&self.handle.names, self.item.epoch);
            part(&self.means.shared.tracer, given, name, begun_ns, whose, with);
        }
    }

    /// Brings the recording here, and says where its chain ends. None: the job is done already.
    async fn prepare(&self) -> Result<Option<(Work, Option<StoredFinal>)>, Failure> {
        let Means { shared, fetcher, media, limits, exe, rent, memory, .. } = &self.means;
        let item = &self.item;
        let taken = Instant::now();
        let broken =
            |error: ChainError| Failure::new(FailureClass::Internal, format!("the chain cannot be used: {error}"));
        let last = last_final(&shared.chain, Kind::Job, &item.job).await.map_err(broken)?;
        if last.as_ref().is_some_and(|last| last.value.end) {
            return Ok(None);
        }
        if let (None, Some(part)) = (&last, &item.part) {
            // Before the recording is fetched: who has the whole waits to hear of it.
            mark(&shared.chain, &self.handle.names, item.epoch, part).await.map_err(broken)?;
        }
        let from_sample = last.as_ref().map_or(0, |last| last.value.to_sample);
        let begun = Instant::now();
        let here = item.part.as_ref().and_then(|part| {
            let seq = part.from.as_ref().map_or(1, |start| start.resume.seq);
            self.means.kept.take(&(part.parent.clone(), item.audio.clone()), seq)
        });
        let (recording, bytes) = match here {
            Some(here) => here,
            None => {
                let url = AudioUrl::parse(&item.audio)
                    .map_err(|error| Failure::new(FailureClass::BadRequest, error.to_string()))?;
                self.handle.figures.enter(JobStage::Fetching);
                let begun_ns = unix_ns();
                let spooled = fetcher.spool(&url).await.map_err(|error| error.failure());
                let class = spooled.as_ref().err().map(|failure| failure.class);
                let bytes = spooled.as_ref().ok().map(|spooled| spooled.bytes);
                self.told("job.fetch", begun_ns, |span| span.with_some("bytes", bytes).failed(class));
                let spooled = spooled?;
                say!(
                    info,
                    self.handle.names,
                    epoch = item.epoch,
                    bytes = spooled.bytes,
                    fetch_ms = begun.elapsed().as_millis() as u64,
                    "recording fetched"
                );
                let name = item.name.clone().or(spooled.name);
                (Recording::new(spooled.file, name, limits.clone(), exe.clone()), spooled.bytes)
            }
        };
        if item.part.as_ref().is_some_and(|part| part.recording_bytes != bytes) {
            let why = "the recording is no longer the one that this is a part of";
            return Err(Failure::new(FailureClass::BadRequest, why));
        }
        let begun_ns = unix_ns();
        let probed = recording.probe().await;
        let class = probed.as_ref().err().map(|failure| failure.class);
        self.told("job.decode_audio", begun_ns, |span| span.failed(class));
        probed?;
        self.handle.figures.length(recording.facts().total_ms);
        self.handle.figures.enter(JobStage::Transcribing);
        let work = Work {
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
            bytes,
            part: item.part.clone(),
            pause_at: AtomicU64::new(u64::MAX),
            stored: Mutex::default(),
            shared: AtomicBool::new(false),
        };
        Ok(Some((work, last)))
    }
}

pub(super) fn worker_stops() -> Failure {
    Failure::new(FailureClass::NoCapacity, "the worker is stopping")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_long_recording_whose_finals_stand_alone_is_split() {
        let item = |change: fn(&mut WorkItem)| {
            let item = serde_json::json!({
                "job": "j", "epoch": 1, "attempt": 1, "audio": "https://h/a", "options": {}, "submitted_ms": 1,
                "assigned_ms": 2,
            });
            let mut item: WorkItem = serde_json::from_value(item).expect("an item");
            change(&mut item);
            item
        };
        let item_with = |item: &WorkItem, diarize| {
            let options = SessionOptions { diarize, ..item.options.clone() };
            WorkItem { options, ..item.clone() }
        };
        let split = Split { longer_than: 600 * 16_000, part_samples: 120 * 16_000, speakers_need_mb: 0 };
        let whole = item(|_| ());
        let concerns = [None, Some(599_999), Some(600_000)].map(|total_ms| split.concerns(&whole, total_ms));
        assert_eq!(concerns, [true, false, true], "one that does not say how long it is may be long");
        assert!(!Split { longer_than: u64::MAX, ..split }.concerns(&whole, None), "switched off");
        let speakers = |diarize| item_with(&whole, diarize);
        assert!(split.concerns(&speakers(Diarize::On), None) && split.concerns(&speakers(Diarize::Auto), None));
        let full = Split { speakers_need_mb: u64::MAX, ..split };
        let concerns =
            [Diarize::Off, Diarize::On, Diarize::Auto].map(|diarize| full.concerns(&speakers(diarize), None));
        assert_eq!(concerns, [true, true, false], "where memory is short");
        let part = serde_json::json!({ "parent": "p", "number": 0, "vad": "energy", "recording_bytes": 1 });
        let part: voxfleet_schema::job::JobPart = serde_json::from_value(part).expect("a part");
        assert!(!split.concerns(&WorkItem { part: Some(part), ..whole }, None), "a part has none");
        for change in
            [|item: &mut WorkItem| item.options.carry_prompt = true, |item: &mut WorkItem| item.suspect = true]
        {
            assert!(!split.concerns(&item(change), None));
        }
    }
}
