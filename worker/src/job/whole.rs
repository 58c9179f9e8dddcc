//! A long recording, done by whoever is free: this worker has the whole of it, others have parts.
//!
//! One loop over five things that go on at once: the recording is cut ([`super::scout`]); parts are given out as jobs, and
//! their chains looked at; what stands in the chain of the next part is stored in the chain of the whole, in order
//! ([`super::copy`]); and something is decoded here. What that is, [`super::parts`] decides.
//!
//! Nothing in here is the only copy of anything. A worker that takes the whole over cuts it again, finds the same parts under
//! the same names, and goes on with what stands in their chains.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use voxfleet_nats::{jobs::publish_job, transcript::StoredFinal};
use voxfleet_schema::{
    codec,
    failure::{Failure, FailureClass},
    id::{Kind, StreamId},
    job::{JobPart, JobRequest},
    session::{Diarize, SessionOptions},
    transcript::VadKind,
};

use super::{
    Job, JobEnd, Work,
    copy::{Copied, Copy, Over as CopyOver},
    job_options,
    part::mark,
    parts::{Naming, Parts, Seen, State, Turn},
    scout::{CUTS, Cut, Over, Scout},
    task::worker_stops,
};
use crate::{
    capacity::locked,
    engine::stream::Tellers,
    ipc::{AfterFinal, FinalDraft, StartPoint},
    lifecycle::{Engine, Known},
    session::{Desired, End, Handle, Names, last_final},
};

/// How often chains of parts are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// And that which is being copied, while it grows.
const COPY_EVERY: Duration = Duration::from_millis(100);
/// When nothing happens.
const IDLE: Duration = Duration::from_millis(25);
/// A part has no result that would have to be kept.
const PART_TTL_S: u32 = 60;
/// Samples in a millisecond.
const SAMPLES_PER_MS: u64 = 16;

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
type Running<'a, T> = Option<Boxed<'a, T>>;

/// What was decoded here, a part or the chain of the whole, and what that came to.
type Decoded = (Option<u64>, End);

/// What was found of parts, and which were given out.
type Looked = (Vec<(u64, Option<Seen>)>, Vec<u64>);

/// What stays the same.
struct Task<'a> {
    job: &'a Job,
    work: Arc<Work>,
    /// Of every part, with the model named: the default is each worker's own.
    options: SessionOptions,
    model: String,
}

/// What changes.
struct Whole<'a> {
    task: &'a Task<'a>,
    /// None until something is cut.
    parts: Option<Parts>,
    /// The end of its chain.
    last: Option<StoredFinal>,
    /// The part whose chain is copied, and from where on in the stream.
    at: (u64, u64),
    copy_at: Instant,
    look_at: Instant,
    /// Its own chain is decoded here now.
    direct: bool,
    /// Who has spoken in it, up to the final of this index.
    tellers: Option<(u64, Tellers)>,
}

impl Job {
    /// Does it with whoever is free. `last`: the end of its chain.
    pub(super) async fn run_whole(&self, work: Arc<Work>, last: Option<StoredFinal>) -> JobEnd {
        let model = self.item.model_asked.clone().or_else(|| self.item.options.model.clone());
        let model = model.unwrap_or_else(|| self.means.shared.engine.default_model().to_owned());
        // Where they can be had: somebody else's memory is asked when he is given a part.
        let diarize = if self.item.options.diarize == Diarize::Off { Diarize::Off } else { Diarize::On };
        let options = SessionOptions { model: Some(model.clone()), diarize, ..self.item.options.clone() };
        // What is decoded in the chain of the whole is cut where parts are.
        self.handle.desired.send_modify(|desired| Arc::make_mut(&mut desired.options).diarize = diarize);
        let recording = match work.recording.again() {
            Ok(recording) => recording,
            Err(failure) => return JobEnd::GivenUp(failure),
        };
        let task = Task { job: self, work, options, model };
        let (cuts, mut found) = mpsc::channel::<Cut>(CUTS);
        let scout = Scout {
            shared: self.means.shared.clone(),
            names: self.handle.names.clone(),
            options: job_options(&task.options),
            recording,
            vad: last.as_ref().map(|last| last.value.vad),
        };
        let after = last.as_ref().map(|last| Box::new(AfterFinal::from(&last.value)));
        let mut scouting: Running<'_, Over> =
            Some(Box::pin(scout.run(StartPoint { after, ..StartPoint::beginning() }, cuts)));
        let now = Instant::now();
        let mut whole = Whole {
            task: &task,
            parts: None,
            last,
            at: (0, 0),
            copy_at: now,
            look_at: now,
            direct: false,
            tellers: None,
        };
        let mut decoding: Running<'_, Decoded> = None;
        let mut looking: Running<'_, Looked> = None;
        let mut copying: Running<'_, Copied> = None;
        let mut decoded_by: Option<Arc<Handle>> = None;
        let mut wishes = self.handle.desired.subscribe();
        let mut stopping = false;
        loop {
            if let Err(failure) = whole.settle() {
                return JobEnd::GivenUp(failure);
            }
            if decoding.is_none() {
                if stopping && copying.is_none() {
                    return JobEnd::GivenUp(worker_stops());
                }
                if !stopping && let Some((handle, running)) = whole.decode_next(copying.is_some()) {
                    (decoded_by, decoding) = (Some(handle), Some(running));
                }
            }
            whole.pause_in_time();
            let now = Instant::now();
            if copying.is_none() && !stopping && now >= whole.copy_at {
                copying = whole.copy_next();
            }
            if looking.is_none() && !stopping && now >= whole.look_at {
                looking = whole.look();
                whole.look_at = now + LOOK_EVERY;
            }
            let idle_until = whole.look_at.min(whole.copy_at).max(now + IDLE);
            tokio::select! {
                Some((draft, vad)) = found.recv(), if whole.takes_cuts() => whole.cut(&draft, vad),
                over = resolve(&mut scouting) => {
                    scouting = None;
                    // What it said before comes first.
                    while let Ok((draft, vad)) = found.try_recv() {
                        whole.cut(&draft, vad);
                    }
                    if over != Over::Ended {
                        say!(warn, self.handle.names, epoch = self.handle.epoch(), ?over, "the recording is decoded in one piece from here on");
                        whole.close();
                    }
                }
                (part, end) = resolve(&mut decoding) => {
                    (decoding, decoded_by) = (None, None);
                    if let Some(end) = whole.decoded(part, end) {
                        return end;
                    }
                }
                looked = resolve(&mut looking) => {
                    looking = None;
                    whole.looked(looked);
                }
                copied = resolve(&mut copying) => {
                    copying = None;
                    if let Some(end) = whole.copied(copied) {
                        return end;
                    }
                }
                () = sleep_until(idle_until) => {}
                () = finish(&mut wishes), if !stopping => {
                    stopping = true;
                    decoded_by.iter().for_each(|handle| handle.finish());
                }
            }
        }
    }
}

impl<'a> Whole<'a> {
    /// The recording's next final.
    fn cut(&mut self, draft: &FinalDraft, vad: VadKind) {
        let Task { job, work, model, .. } = self.task;
        let split = &job.means.split;
        let parts = self.parts.get_or_insert_with(|| {
            let naming = Naming {
                parent: job.item.job.clone(),
                submitted_ms: job.item.submitted_ms,
                part_samples: split.part_samples,
                vad,
                model: model.clone(),
                recording_bytes: work.bytes,
            };
            let length = work.recording.facts().total_ms.map_or(0, |ms| ms * SAMPLES_PER_MS);
            Parts::new(naming, split.longer_than, length, self.direct)
        });
        if let Err(error) = parts.cut(draft) {
            say!(error, job.handle.names, epoch = job.handle.epoch(), %error, "a part has no name");
            parts.close();
        }
    }

    /// The scout need not be hours ahead: what it finds takes memory.
    fn takes_cuts(&self) -> bool {
        self.parts.as_ref().is_none_or(Parts::takes_cuts)
    }

    /// Nothing more is given out.
    fn close(&mut self) {
        self.parts.iter_mut().for_each(Parts::close);
    }

    /// Takes what the end of its chain says.
    fn settle(&mut self) -> Result<(), Failure> {
        if let Some(stored) = locked(&self.task.work.stored).take() {
            self.last = Some(stored);
        }
        let Some(parts) = &mut self.parts else { return Ok(()) };
        let last = self.last.as_ref().map(|last| &last.value);
        let language = self.task.options.language.as_ref().or(last.and_then(|last| last.resume.language.as_ref()));
        if let Some(language) = language {
            parts.locked(language).map_err(|error| Failure::new(FailureClass::Internal, error.to_string()))?;
        }
        parts.stored(last.map_or(0, |last| last.to_sample));
        Ok(())
    }

    /// Begins to decode what is next here. Its own chain has one author: who copies, or who decodes.
    fn decode_next(&mut self, copies: bool) -> Option<(Arc<Handle>, Boxed<'a, Decoded>)> {
        let task = self.task;
        let turn = self.parts.as_ref().map_or(Turn::Direct { until: None }, |parts| parts.turn(Instant::now()));
        match turn {
            Turn::Wait => None,
            Turn::Direct { .. } if copies => None,
            Turn::Direct { until } => {
                self.direct = true;
                self.parts.iter_mut().for_each(|parts| parts.direct = true);
                task.work.pause_at.store(until.unwrap_or(u64::MAX), Ordering::Relaxed);
                let handle = Arc::clone(&task.job.handle);
                let session = handle.session(task.job.means.shared.clone(), Some(Arc::clone(&task.work)));
                Some((handle, Box::pin(async move { (None, session.run().await) })))
            }
            Turn::Part(number) => {
                let parts = self.parts.as_mut()?;
                let part = parts.rest(number);
                // Where somebody has begun and got stuck, this goes on; otherwise it is his.
                let may_join = parts.is_begun(number);
                let id = parts.ours(number, Instant::now())?;
                say!(debug, task.job.handle.names, epoch = task.job.handle.epoch(), number, "a part is done here");
                let names = Names { kind: Kind::Job, id, gpu_id: task.job.handle.names.gpu_id.clone() };
                let options = SessionOptions { diarize: Diarize::Off, ..job_options(&task.options) };
                let handle = Arc::new(Handle::new(names, 0, options, task.job.item.traceparent));
                let own = Arc::clone(&handle);
                Some((handle, Box::pin(async move { (Some(number), task.decode_part(&own, part, may_join).await) })))
            }
        }
    }

    /// Where the chain of the whole, while it is decoded here, is to stop.
    fn pause_in_time(&self) {
        let Some(parts) = self.parts.as_ref().filter(|parts| parts.direct) else { return };
        let at = match parts.turn(Instant::now()) {
            Turn::Direct { until } => until.unwrap_or(u64::MAX),
            // Others have the rest.
            Turn::Part(_) | Turn::Wait => 0,
        };
        self.task.work.pause_at.store(at, Ordering::Relaxed);
    }

    /// What was decoded here is over.
    fn decoded(&mut self, part: Option<u64>, end: End) -> Option<JobEnd> {
        // Stored in its last moments.
        if let Some(stored) = locked(&self.task.work.stored).take() {
            self.last = Some(stored);
        }
        (self.look_at, self.copy_at) = (Instant::now(), Instant::now());
        self.direct &= part.is_some();
        if let Some(parts) = &mut self.parts {
            parts.over(part, end == End::Done, Instant::now());
        }
        match (part, end) {
            (None, End::Done) => Some(JobEnd::Done),
            (None, End::LetGo { .. }) => Some(JobEnd::LetGo),
            (_, End::Failed(failure)) => Some(JobEnd::GivenUp(failure)),
            (_, End::Finished) => Some(JobEnd::GivenUp(worker_stops())),
            // Somebody else has that part, or all of it is there.
            (Some(_), End::Done | End::LetGo { .. }) | (_, End::Paused) => None,
        }
    }

    /// Gets on with its own chain from that of its next part.
    fn copy_next(&mut self) -> Running<'a, Copied> {
        let parts = self.parts.as_ref().filter(|parts| !parts.direct)?;
        let (number, part) = parts.head()?;
        if !matches!(part.state, State::Begun { .. } | State::Done) {
            return None;
        }
        if self.at.0 != number {
            self.at = (number, 0);
        }
        let copy = Copy {
            number,
            part: part.id.clone(),
            from_seq: self.at.1,
            wanted: part.bounds.iter().cloned().collect(),
            is_done: part.state == State::Done,
            last: self.last.clone(),
            tellers: self.tellers.take(),
        };
        self.copy_at = Instant::now() + COPY_EVERY;
        let task = self.task;
        Some(Box::pin(async move { copy.run(task.job, &task.work, &task.options).await }))
    }

    fn copied(&mut self, copied: Copied) -> Option<JobEnd> {
        let Copied { number, from_seq, last, tellers, over } = copied;
        self.tellers = tellers;
        self.at = (number, from_seq);
        self.last = last;
        match over? {
            CopyOver::Ended => return Some(JobEnd::Done),
            CopyOver::LetGo => return Some(JobEnd::LetGo),
            CopyOver::Failed(failure) => return Some(JobEnd::GivenUp(failure)),
            CopyOver::All => self.copy_at = Instant::now(),
            CopyOver::Unusable(failure) => {
                say!(warn, self.task.job.handle.names, epoch = self.task.job.handle.epoch(), number, %failure, "a part is done again here");
                if kills(&failure) {
                    return Some(JobEnd::GivenUp(failure));
                }
                if let Some(parts) = &mut self.parts {
                    parts.failed(number, failure);
                }
            }
        }
        None
    }

    /// Looks at chains of parts, and gives some out.
    fn look(&mut self) -> Running<'a, Looked> {
        let parts = self.parts.as_ref()?;
        let to_look_at = parts.to_look_at();
        let to_give_out: Vec<(u64, StreamId, JobPart)> = parts
            .to_give_out()
            .into_iter()
            .filter_map(|number| Some((number, parts.id(number)?.clone(), parts.request(number)?)))
            .collect();
        if to_look_at.is_empty() && to_give_out.is_empty() {
            return None;
        }
        let task = self.task;
        Some(Box::pin(async move {
            let mut seen = Vec::new();
            for (number, id) in to_look_at {
                match task.job.means.shared.chain.last(Kind::Job, &id).await {
                    Ok(last) => {
                        let last = last.map(|last| last.value);
                        let found = last.map(|last| Seen { index: last.index, end: last.end, error: last.error });
                        seen.push((number, found));
                    }
                    // The next look may see more.
                    Err(error) => tracing::debug!(part = %id, %error, "chain of a part not read"),
                }
            }
            let mut given_out = Vec::new();
            for (number, id, part) in to_give_out {
                match task.give_out(&id, part).await {
                    Ok(()) => given_out.push(number),
                    Err(error) => {
                        tracing::debug!(part = %id, error, "part not given out, trying again");
                        break;
                    }
                }
            }
            (seen, given_out)
        }))
    }

    fn looked(&mut self, (seen, given_out): Looked) {
        let Some(parts) = &mut self.parts else { return };
        let now = Instant::now();
        for number in given_out {
            parts.given_out(number);
        }
        let new = seen.into_iter().fold(false, |new, (number, found)| parts.seen(number, found, now) | new);
        if new {
            // What is free now may be given out, and what is done copied.
            (self.look_at, self.copy_at) = (now, self.copy_at.min(now));
        }
    }
}

/// Tried again it would kill engines again.
fn kills(failure: &Failure) -> bool {
    matches!(failure.class, FailureClass::EngineCrash | FailureClass::Timeout)
}

impl Task<'_> {
    /// Gives a part out as a job. Idempotent by its id.
    async fn give_out(&self, id: &StreamId, part: JobPart) -> Result<(), String> {
        let item = &self.job.item;
        let request = JobRequest {
            job: Some(id.clone()),
            audio: Some(item.audio.clone()),
            data: None,
            name: item.name.clone(),
            // Whose voices these are can only be said in the whole.
            options: SessionOptions { diarize: Diarize::Off, ..self.options.clone() },
            result_ttl_s: Some(PART_TTL_S),
            part: Some(part),
        };
        let body = codec::to_json(&request).map_err(|error| error.to_string())?;
        let priority = self.options.priority;
        let sent = publish_job(&self.job.means.nats, priority, id, codec::JSON, body.into(), item.traceparent).await;
        sent.map(drop).map_err(|error| error.to_string())
    }

    /// Does a part in its own chain, as any worker would that was given it.
    async fn decode_part(&self, handle: &Handle, part: JobPart, may_join: bool) -> End {
        let shared = &self.job.means.shared;
        shared.engine.begins(&handle.names, Known::default());
        let _here = Here { engine: &shared.engine, names: &handle.names };
        let broken = |error: &dyn std::fmt::Display| {
            End::Failed(Failure::new(FailureClass::Internal, format!("the chain of a part cannot be used: {error}")))
        };
        match last_final(&shared.chain, Kind::Job, &handle.names.id).await {
            Ok(Some(last)) if last.value.end => return End::Done,
            // Since it was last looked at, somebody has begun.
            Ok(Some(_)) if !may_join => return End::Paused,
            // Under the epoch of whoever has it, if there is somebody: he need not let go.
            Ok(Some(last)) => handle.desired.send_modify(|desired| desired.epoch = last.value.epoch),
            Ok(None) => {
                if let Err(error) = mark(&shared.chain, &handle.names, 0, &part).await {
                    return broken(&error);
                }
            }
            Err(error) => return broken(&error),
        }
        let work = Arc::new(self.work.for_part(part));
        handle.session(shared.clone(), Some(work)).run().await
    }
}

/// An input that is here while this lives.
struct Here<'a> {
    engine: &'a Engine,
    names: &'a Names,
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        self.engine.forget(self.names);
    }
}

/// Waits until nothing new is to be begun.
async fn finish(wishes: &mut watch::Receiver<Desired>) {
    if wishes.wait_for(|wish| wish.finish).await.is_err() {
        // Its sender is the job's own handle.
        std::future::pending().await
    }
}

/// Waits for what is running; for ever when nothing is.
async fn resolve<T>(running: &mut Running<'_, T>) -> T {
    match running {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
