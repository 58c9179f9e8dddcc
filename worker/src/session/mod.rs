//! One held session: a task that keeps the chain and the log together.
//!
//! It reads the last final from the leader, opens the session in the engine behind it, feeds the log in order, and stores
//! the finals that come back, one at a time. A dead engine, a conflict in the chain or a new epoch all lead to the same
//! place: read the last final, open again. After an end final it stays, feeding nothing, until it is released or assigned
//! at a higher epoch.
//!
//! A file job is a session whose log is its recording: the same feeding, engine and chain, and an end final that names the
//! job's aggregate.

mod again;
mod feed;
mod footing;
mod hints;
mod life;
mod open;
mod outputs;
mod park;
mod reconsider;
mod spans;
mod store;

use std::{
    collections::BTreeSet,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    ServerError,
    events::Events,
    log::{AudioLog, LogError},
    publish::Publisher,
    transcript::{Chain, ChainError, StoredFinal},
};
use voxfleet_schema::{
    audio::RawEntry,
    event::What,
    failure::{Failure, FailureClass},
    fleet::Held,
    id::Kind,
    job::{JobProgress, JobStage},
    session::SessionOptions,
    trace::TraceContext,
    transcript::Final,
};
use voxfleet_trace::{Tracer, unix_ns};

use self::{
    footing::{Standing, Told},
    life::{Life, Next, ReadFailed},
};
pub(crate) use self::{
    hints::{HintQueue, WaitingHint},
    life::MAX_RECORDED_ENTRY,
    open::{last_final, locate},
    outputs::{Names, unix_ms},
    reconsider::{before_the_end, revisions},
    spans::part,
    store::checkpointed,
};
use crate::{
    capacity::{Budget, locked},
    heartbeat::Named,
    ipc::StartPoint,
    job::Work,
    lifecycle::{Ask, Engine, EngineDown, Opening, Treatment},
    metrics,
};

/// How long a session that changes hands waits before it looks at the chain again.
pub(crate) const REOPEN_PAUSE: Duration = Duration::from_millis(50);
/// A log read is one small request; a server that does not answer is asked again.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// What all sessions of a worker share.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) chain: Chain,
    pub(crate) log: AudioLog,
    pub(crate) publisher: Publisher,
    pub(crate) events: Events,
    pub(crate) engine: Engine,
    pub(crate) budget: Budget,
    /// Log reads under way at once; each may bring one largest entry into memory.
    pub(crate) log_reads: Arc<Semaphore>,
    /// Largest entry of the log, in bytes.
    pub(crate) max_entry: u64,
    /// Of this worker, for people.
    pub(crate) name: watch::Receiver<Named>,
    pub(crate) tracer: Tracer,
}

/// What the supervisor wants of a session.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Desired {
    pub(crate) epoch: u64,
    /// May differ from those of an earlier epoch.
    pub(crate) options: Arc<SessionOptions>,
    /// The trace that it is part of, and when it was given here, in ns.
    pub(crate) trace: Option<TraceContext>,
    pub(crate) given_ns: u64,
    /// Feed nothing more, store what has begun, and end.
    pub(crate) finish: bool,
    /// Released: it ends by then, whatever has begun.
    pub(crate) finish_by: Option<Instant>,
}

/// Figures the heartbeat reads while the task works. The highest value means none.
#[derive(Debug)]
pub(crate) struct Figures {
    last_audio_seq: AtomicU64,
    final_index: AtomicU64,
    /// Of a live session: how far it is behind the log, in ms.
    lag_ms: AtomicU64,
    /// Of a job: its stage, the audio its finals cover and the length of the recording, in ms.
    stage: AtomicU8,
    done_ms: AtomicU64,
    total_ms: AtomicU64,
}

/// How far a job is is said at most this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

const NONE: u64 = u64::MAX;
const STAGES: [JobStage; 3] = [JobStage::Fetching, JobStage::Transcribing, JobStage::Finishing];

impl Default for Figures {
    fn default() -> Self {
        Self {
            last_audio_seq: AtomicU64::new(NONE),
            final_index: AtomicU64::new(NONE),
            lag_ms: AtomicU64::new(NONE),
            stage: AtomicU8::new(0),
            done_ms: AtomicU64::new(0),
            total_ms: AtomicU64::new(NONE),
        }
    }
}

impl Figures {
    fn fed(&self, seq: u64) {
        self.last_audio_seq.store(seq, Ordering::Relaxed);
    }

    fn lags(&self, lag_ms: u64) {
        self.lag_ms.store(lag_ms, Ordering::Relaxed);
    }

    pub(crate) fn stored(&self, value: &Final) {
        self.final_index.store(value.index, Ordering::Relaxed);
        self.done_ms.store(value.to_sample / 16, Ordering::Relaxed);
    }

    pub(crate) fn enter(&self, stage: JobStage) {
        let number = STAGES.iter().position(|known| *known == stage).unwrap_or(0);
        self.stage.store(number as u8, Ordering::Relaxed);
    }

    pub(crate) fn length(&self, total_ms: Option<u64>) {
        self.total_ms.store(total_ms.unwrap_or(NONE), Ordering::Relaxed);
    }

    pub(crate) fn progress(&self) -> JobProgress {
        let stage = STAGES.get(usize::from(self.stage.load(Ordering::Relaxed)));
        JobProgress {
            stage: stage.copied().unwrap_or(JobStage::Unknown),
            done_ms: self.done_ms.load(Ordering::Relaxed),
            total_ms: Some(self.total_ms.load(Ordering::Relaxed)).filter(|ms| *ms != NONE),
        }
    }
}

/// The supervisor's side of a held session.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) names: Names,
    pub(crate) desired: watch::Sender<Desired>,
    pub(crate) hints: Arc<HintQueue>,
    pub(crate) figures: Arc<Figures>,
    pub(crate) cancel: CancellationToken,
    /// Of a job: how far it is was said then.
    progress_told: Mutex<Option<Instant>>,
}

impl Handle {
    pub(crate) fn new(names: Names, epoch: u64, options: SessionOptions, trace: Option<TraceContext>) -> Self {
        Self {
            names,
            desired: watch::Sender::new(Desired {
                epoch,
                options: Arc::new(options),
                trace,
                given_ns: unix_ns(),
                finish: false,
                finish_by: None,
            }),
            hints: Arc::default(),
            figures: Arc::default(),
            cancel: CancellationToken::new(),
            progress_told: Mutex::default(),
        }
    }

    /// Whether it is time to say how far the job is, which is to be said then.
    pub(crate) fn progress_due(&self) -> bool {
        let (mut told, now) = (locked(&self.progress_told), Instant::now());
        let due = told.is_none_or(|at| now.saturating_duration_since(at) >= PROGRESS_EVERY);
        if due {
            *told = Some(now);
        }
        due
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.desired.borrow().epoch
    }

    /// What has begun may still be stored, nothing else.
    pub(crate) fn finish(&self) {
        self.desired.send_modify(|desired| desired.finish = true);
    }

    /// The same, and by then it is over.
    pub(crate) fn finish_by(&self, deadline: Instant) {
        self.desired.send_modify(|desired| {
            desired.finish = true;
            desired.finish_by = Some(deadline);
        });
    }

    /// Somebody else has it: how it ends here interests nobody.
    pub(crate) fn is_released(&self) -> bool {
        self.cancel.is_cancelled() || self.desired.borrow().finish_by.is_some()
    }

    /// Waits until it must not go on here.
    pub(crate) async fn over(&self) {
        let mut wishes = self.desired.subscribe();
        let time_over = async {
            // The sender is ours: an error cannot come.
            let by = wishes.wait_for(|wish| wish.finish_by.is_some()).await.ok().and_then(|wish| wish.finish_by);
            match by {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = time_over => {}
        }
    }

    pub(crate) fn held(&self) -> Held {
        let some = |value: &AtomicU64| Some(value.load(Ordering::Relaxed)).filter(|v| *v != NONE);
        Held {
            kind: self.names.kind,
            id: self.names.id.clone(),
            epoch: self.epoch(),
            last_audio_seq: some(&self.figures.last_audio_seq),
            final_index: some(&self.figures.final_index),
            lag_ms: some(&self.figures.lag_ms),
            progress: (self.names.kind == Kind::Job).then(|| self.figures.progress()),
            suspect: false,
            crashes: 0,
            suspect_from: None,
            elsewhere: false,
        }
    }

    /// The task that belongs to this handle, to be run by the supervisor; a job comes with its work.
    pub(crate) fn session(&self, shared: Shared, work: Option<Arc<Work>>) -> Session {
        Session {
            shared,
            work,
            names: self.names.clone(),
            desired: self.desired.subscribe(),
            hints: Arc::clone(&self.hints),
            figures: Arc::clone(&self.figures),
            told: Mutex::default(),
            harmful: Mutex::default(),
            taken: AtomicU64::new(0),
        }
    }
}

/// How a session ended here. In every case it is no longer held.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum End {
    /// A higher epoch owns it.
    LetGo { epoch: u64 },
    /// It cannot go on here.
    Failed(Failure),
    /// The worker is stopping.
    Finished,
    /// A job's end final stands in its chain.
    Done,
    /// The job's chain has reached a place from which others go on with it.
    Paused,
}

/// Runs what belongs to one session or job; a panic in there is its own failure and nobody else's.
pub(crate) async fn contained<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    AssertUnwindSafe(work).catch_unwind().await.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        tracing::error!(panic = text, "a session's task panicked");
        Failure::new(FailureClass::Internal, "a fault in the worker's own code ended this here")
    })
}

#[derive(Debug)]
pub(crate) struct Session {
    shared: Shared,
    /// Of a job: its recording, and where its aggregate goes.
    work: Option<Arc<Work>>,
    names: Names,
    desired: watch::Receiver<Desired>,
    hints: Arc<HintQueue>,
    figures: Arc<Figures>,
    /// What was said about its model and device.
    told: Mutex<Told>,
    /// Where stretches begin that may have killed the engine while it listened to them again.
    harmful: Mutex<BTreeSet<u64>>,
    /// Highest epoch of which it was told that it was taken over.
    taken: AtomicU64,
}

impl Session {
    /// Works until the session ends here; drop it to release the session at once.
    pub(crate) async fn run(self) -> End {
        let mut wishes = self.desired.clone();
        let mut known: Option<StoredFinal> = None;
        loop {
            let desired = wishes.borrow_and_update().clone();
            if desired.finish {
                return End::Finished;
            }
            let opened = tokio::select! {
                opened = self.open(&desired, known.take()) => opened,
                // A new epoch or a stop while it waits for the server or the engine.
                Ok(()) = wishes.changed() => continue,
            };
            let next = match opened {
                Ok(Opened::Life(life)) => life.run().await,
                Ok(Opened::Ended) => Next::Ended,
                Ok(Opened::EngineGone) => Next::Reopen(None),
                Err(end) => Next::Stop(end),
            };
            match next {
                Next::Stop(end) => return end,
                Next::Reopen(found) => {
                    known = found.map(|found| *found);
                    tokio::time::sleep(REOPEN_PAUSE).await;
                }
                Next::Ended if self.work.is_some() => return End::Done,
                Next::Ended => {
                    let changed = wishes.wait_for(|now| now.finish || now.epoch > desired.epoch).await;
                    if changed.is_err() {
                        return End::Finished;
                    }
                }
            }
        }
    }

    fn failed(&self, epoch: u64, failure: Failure) -> End {
        metrics::failed(&failure);
        say!(error, self.names, epoch, %failure, "session failed");
        if self.work.is_some() {
            // A job may be tried again: the dispatcher says when it has failed.
            return End::Failed(failure);
        }
        let mut event = self.names.event(What::Failed, epoch);
        event.error = Some(failure.clone());
        self.shared.events.tell(event, None);
        End::Failed(failure)
    }

    fn chain_failed(&self, epoch: u64, error: &ChainError) -> End {
        say!(error, self.names, error = error as &dyn std::error::Error, "chain unreadable");
        self.failed(epoch, Failure::new(FailureClass::Internal, format!("the chain cannot be used: {error}")))
    }

    /// Opens the session in the engine behind its last final. `known` saves reading what was just read.
    async fn open(&self, desired: &Desired, known: Option<StoredFinal>) -> Result<Opened<'_>, End> {
        let epoch = desired.epoch;
        let Names { kind, id, .. } = &self.names;
        let last = match known {
            Some(found) => Some(found),
            None => open::last_final(&self.shared.chain, *kind, id)
                .await
                .map_err(|error| self.chain_failed(epoch, &error))?,
        };
        if let Some(last) = &last {
            if last.value.epoch > epoch {
                return Err(End::LetGo { epoch: last.value.epoch });
            }
            self.figures.stored(&last.value);
            // A recording ends once.
            if last.value.end && (last.value.epoch == epoch || self.work.is_some()) {
                return Ok(Opened::Ended);
            }
        }
        let goes_on_at = last.as_ref().map_or(0, |last| last.value.to_sample);
        // A recording never expires.
        let log = self.work.is_none().then_some(&self.shared.log);
        let mut start = match (&last, self.work.as_ref().and_then(|work| work.part.as_ref())) {
            (None, Some(part)) => crate::job::start_of(part),
            _ => open::locate(&self.shared.chain, log, *kind, id, last.as_ref().map(|l| &l.value))
                .await
                .map_err(|error| self.chain_failed(epoch, &error))?,
        };
        start.taken_over |= epoch > 1;
        if let Some(last) = &last {
            let told = std::mem::take(&mut start.checkpoint.told);
            let of_the_chain = async {
                again::publish_told(self, last, told, epoch).await?;
                again::late(self, last, &start).await
            };
            start.late = of_the_chain.await.map_err(|error| self.chain_failed(epoch, &error))?;
        }
        let engine = &self.shared.engine;
        let model = desired.options.model.as_deref().unwrap_or_else(|| engine.default_model());
        let ask = Ask { model: model.to_owned(), policy: desired.options.policy };
        // Before a child is waited for: it may have to be another one.
        let footing = engine
            .footing(&self.names, &ask)
            .map_err(|failure| self.failed(epoch, not_its_fault(self.names.kind, failure)))?;
        let link = match engine.ready().await {
            Ok(link) => link,
            Err(EngineDown::Stopping) => return Err(End::Finished),
            Err(error @ EngineDown::Failed) => {
                let failure = Failure::new(FailureClass::EngineCrash, error.to_string());
                return Err(self.failed(epoch, not_its_fault(self.names.kind, failure)));
            }
        };
        if link.on_cpu != footing.on_cpu || !engine.stands(&ask, &footing) {
            return Ok(Opened::EngineGone);
        }
        let standing = Standing { ask, footing };
        let part = self.work.as_ref().and_then(|work| work.part.as_ref());
        if let Some(begun_with) = last.as_ref().map(|last| last.value.vad).or(part.map(|part| part.vad))
            && begun_with != link.vad
        {
            let (wanted, have) = (begun_with.as_str(), link.vad.as_str());
            let message = format!("the session was begun with the {wanted} voice detector, this worker has {have}");
            return Err(self.failed(epoch, Failure::new(FailureClass::ModelMissing, message)));
        }
        if let Some(lost) = start.lost {
            let mut event = self.names.event(What::Gap, epoch);
            event.seq = Some(lost.from_seq);
            event.detail = serde_json::json!({ "lost": lost });
            self.shared.events.tell(event, Some(format!("{id}-lost-{}-{}", lost.from_seq, lost.to_seq)));
        }
        // Asked last: it is about the child that has just become ready.
        self.remember_harm(goes_on_at);
        let treatment = match self.shared.engine.treat(&self.names, goes_on_at) {
            Treatment::GiveUp(failure) => return Err(self.failed(epoch, failure)),
            Treatment::Wait { until } => {
                say!(
                    warn,
                    self.names,
                    epoch,
                    "its last try is better made by another worker, waiting for it to be moved"
                );
                sleep_until(until).await;
                // Whatever has happened meanwhile, from the beginning.
                return Ok(Opened::EngineGone);
            }
            treatment => treatment,
        };
        if treatment != Treatment::Normal {
            say!(warn, self.names, epoch, ?treatment, "session is suspected of killing the engine");
        }
        say!(
            info,
            self.names,
            epoch,
            trace_id = desired.trace.as_ref().map(TraceContext::trace_text),
            after_index = last.as_ref().map(|l| l.value.index),
            first_seq = start.first_seq(),
            expired = start.expired,
            model = standing.footing.model,
            on_cpu = standing.footing.on_cpu,
            "session opened"
        );
        let opening = Opening {
            names: &self.names,
            options: SessionOptions { model: Some(standing.footing.model.clone()), ..(*desired.options).clone() },
            start: start.clone(),
            background: self.work.is_some(),
            treatment: &treatment,
            scout: false,
            hears: false,
        };
        match self.shared.engine.open(&link, opening).await {
            None => Ok(Opened::EngineGone),
            Some(engine) => {
                self.tell(epoch, &standing);
                self.tell_taken(desired, &start);
                Ok(Opened::Life(Box::new(Life::new(self, engine, standing, epoch, last, &start))))
            }
        }
    }

    /// The first time under an epoch.
    fn tell_taken(&self, desired: &Desired, start: &StartPoint) {
        if self.work.is_some() || self.taken.fetch_max(desired.epoch, Ordering::Relaxed) >= desired.epoch {
            return;
        }
        let Some(given) = &desired.trace else { return };
        let whose = (&self.names, desired.epoch);
        part(&self.shared.tracer, given, "session.take", desired.given_ns, whose, |span| {
            span.with("from_seq", start.first_seq()).with("taken_over", start.taken_over).with("expired", start.expired)
        });
    }

    /// Its chain; what is written there carries its trace.
    fn chain(&self) -> Chain {
        self.shared.chain.traced(self.desired.borrow().trace)
    }

    /// What killed the engine before the place where the session goes on was listened to again.
    fn remember_harm(&self, goes_on_at: u64) {
        let known = self.shared.engine.suspected(self.names.kind, &self.names.id);
        locked(&self.harmful).extend(known.from.filter(|from| *from < goes_on_at));
    }

    fn is_harmful(&self, from_sample: u64) -> bool {
        locked(&self.harmful).contains(&from_sample)
    }

    /// Largest entry of its log.
    fn max_entry(&self) -> u64 {
        if self.work.is_some() { MAX_RECORDED_ENTRY } else { self.shared.max_entry }
    }

    /// The first entry at or above `from`, if there is one yet.
    async fn entry(&self, from: u64) -> Result<Option<RawEntry>, ReadFailed> {
        Ok(self.entry_dated(from).await?.map(|(entry, _)| entry))
    }

    /// The same, with the Unix time in ms at which it was logged; a recording never was.
    async fn entry_dated(&self, from: u64) -> Result<Option<(RawEntry, Option<u64>)>, ReadFailed> {
        if let Some(work) = &self.work {
            let found = work.entry(from).await.map_err(ReadFailed::Recording)?;
            return Ok(found.map(|entry| (entry, None)));
        }
        // Never closed; without it the read would only be uncounted.
        let _reading = self.shared.log_reads.acquire().await.ok();
        match timeout(READ_TIMEOUT, self.shared.log.next_dated(&self.names.id, from)).await {
            Ok(answer) => Ok(answer.map_err(ReadFailed::Log)?.map(|(entry, at)| (entry, Some(at)))),
            Err(_) => Err(ReadFailed::Log(LogError::Server(ServerError::Timeout))),
        }
    }

    /// Says when it runs on something else than was asked for, or no longer does.
    fn tell(&self, epoch: u64, standing: &Standing) {
        let Some(change) = locked(&self.told).opened(standing) else { return };
        let id = &self.names.id;
        say!(warn, self.names, epoch, detail = %change.detail, "session {}", change.what.as_str());
        let mut event = self.names.event(change.what, epoch);
        event.detail = change.detail;
        let incarnation = self.shared.name.borrow().incarnation.clone();
        let msg_id = format!("{id}-{epoch}-{}-{incarnation}-{}", change.what.as_str(), change.number);
        self.shared.events.tell(event, Some(msg_id));
    }
}

/// Where no engine is to be had, or none with its model, that is no try of a job: another worker may have one.
fn not_its_fault(kind: Kind, failure: Failure) -> Failure {
    match kind {
        Kind::Job => Failure { class: FailureClass::NoCapacity, ..failure },
        _ => failure,
    }
}

enum Opened<'a> {
    Life(Box<Life<'a>>),
    /// Its end final of this epoch stands in the chain.
    Ended,
    /// The child died in between, or may have.
    EngineGone,
}

#[cfg(test)]
pub(crate) mod tests {
    pub(crate) use super::outputs::tests::{draft, final_of, said};
    use super::*;

    #[test]
    fn only_a_job_is_told_that_there_is_no_room_where_there_is_no_engine_for_it() {
        let failure = Failure { retry_after_ms: Some(9), ..Failure::new(FailureClass::DeviceLost, "gone") };
        let told = not_its_fault(Kind::Job, failure.clone());
        assert_eq!(told, Failure { class: FailureClass::NoCapacity, ..failure.clone() });
        assert_eq!(not_its_fault(Kind::Session, failure.clone()), failure);
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_of_its_session() {
        let failed = contained(async { panic!("{}", "thrown") }).await.map(|(): ()| ());
        assert_eq!(failed.map_err(|failure| failure.class), Err(FailureClass::Internal));
        assert_eq!(contained(async { 3 }).await, Ok(3));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_released_may_finish_but_not_for_ever() {
        let names = Names {
            kind: Kind::Session,
            id: voxfleet_schema::id::StreamId::new("a").expect("id"),
            gpu_id: voxfleet_schema::id::GpuId::new("g").expect("id"),
        };
        let handle = Handle::new(names, 1, SessionOptions::default(), None);
        handle.finish();
        let second = Duration::from_secs(1);
        assert!(tokio::time::timeout(second, handle.over()).await.is_err() && !handle.is_released());
        handle.finish_by(Instant::now() + 2 * second);
        assert!(handle.is_released());
        assert!(tokio::time::timeout(second, handle.over()).await.is_err());
        assert!(tokio::time::timeout(2 * second, handle.over()).await.is_ok());
        handle.cancel.cancel();
        handle.over().await;
    }
}
