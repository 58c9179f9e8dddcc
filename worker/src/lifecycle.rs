//! The engine child's life: started at first need, started again when it dies, ended and reaped at the stop.
//!
//! Sessions see an [`Engine`]: they open an [`EngineSession`], feed it, and read its [`Outbox`]. When the child dies every
//! outbox says so, and the sessions open again from their last final as soon as the next child is ready. Nothing here
//! waits for a session, and no session waits here for another one's audio.

mod link;
mod outbox;
mod progress;
mod spawn;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    process::Child,
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    fleet::{EngineRunState, EngineState, ModelState},
    session::SessionOptions,
    transcript::VadKind,
};

pub(crate) use self::{outbox::Outbox, spawn::Program};
use self::{progress::ProgressMeter, spawn::SpawnError};
use crate::{
    capacity::{Budget, locked},
    ipc::{EngineConfig, EngineKind, EntryFor, FromEngine, StartPoint, ToEngine, transport::TransportError},
};

/// The child only parses its configuration before it says `Ready`.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Between closing the socket and SIGKILL: a decode step ends long before.
const STOP_GRACE: Duration = Duration::from_millis(1_000);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// A child that lived this long had no trouble starting.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// Starts in a row that never became ready before the engine is said to be failed.
const MAX_FAILED_STARTS: u32 = 5;
/// How often a failed engine is tried again, in case a missing file came back.
const RETRY_FAILED: Duration = Duration::from_secs(30);
/// Bytes of audio a job may hold: the longest window at the highest rate, and what is read ahead. Apart from what live
/// sessions share, so that no recording takes their room.
pub(crate) const JOB_BYTES: u64 = 32 << 20;
/// Frames on their way to the child, beyond one for each session's end.
const FRAMES: usize = 64;

/// What the heartbeat says about the engine, and what assignment looks at.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EngineStatus {
    pub(crate) state: EngineRunState,
    pub(crate) engine: String,
    pub(crate) device: String,
    pub(crate) vad: VadKind,
    pub(crate) restarts: u32,
    pub(crate) models: Vec<ModelState>,
}

/// The engine cannot be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EngineDown {
    #[error("the engine cannot be started")]
    Failed,
    #[error("the worker is stopping")]
    Stopping,
}

/// The way to one child.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    frames: mpsc::Sender<ToEngine>,
    pub(crate) vad: VadKind,
}

#[derive(Debug)]
struct Inner {
    config: EngineConfig,
    program: Program,
    /// Sessions at most; each keeps room for its `Close` frame.
    slots: usize,
    budget: Budget,
    link: watch::Sender<Option<Link>>,
    status: watch::Sender<EngineStatus>,
    outboxes: Mutex<HashMap<u64, Arc<Outbox>>>,
    next_handle: AtomicU64,
    wanted: Notify,
    pid: AtomicU32,
    progress: Mutex<ProgressMeter>,
}

#[derive(Debug, Clone)]
pub(crate) struct Engine(Arc<Inner>);

/// How one child's life ended.
#[derive(Debug)]
enum LifeEnd {
    Stopped,
    /// It never said `Ready`.
    NotReady,
    Died {
        lived: Duration,
    },
}

impl Engine {
    pub(crate) fn new(config: EngineConfig, program: Program, slots: usize, budget: Budget) -> Self {
        let vad = if config.silero_model.is_some() { VadKind::Silero } else { VadKind::Energy };
        let engine = match config.engine {
            EngineKind::WhisperCpp => "whisper_cpp",
            EngineKind::Simulated => "simulated",
        };
        let status = EngineStatus {
            state: EngineRunState::Down,
            engine: engine.to_owned(),
            device: "none".to_owned(),
            vad,
            restarts: 0,
            models: link::models_on_disk(&config),
        };
        Self(Arc::new(Inner {
            config,
            program,
            slots,
            budget,
            link: watch::Sender::new(None),
            status: watch::Sender::new(status),
            outboxes: Mutex::default(),
            next_handle: AtomicU64::new(1),
            wanted: Notify::new(),
            pid: AtomicU32::new(0),
            progress: Mutex::default(),
        }))
    }

    pub(crate) fn status(&self) -> EngineStatus {
        self.0.status.borrow().clone()
    }

    /// The heartbeat's view.
    pub(crate) fn heartbeat_state(&self, now: Instant) -> (EngineState, Vec<ModelState>) {
        let status = self.status();
        let progress = locked(&self.0.progress).reading(now);
        let state = EngineState {
            state: status.state,
            kind: status.engine,
            effective_device: status.device,
            vad: status.vad,
            ms_since_progress: progress.ms_since_progress,
            restarts: status.restarts,
            crashes: 0,
            decode_rate: progress.decode_rate,
            decode_rate_age_ms: progress.decode_rate_age_ms,
        };
        (state, status.models)
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        Some(self.0.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    pub(crate) fn is_working(&self) -> bool {
        locked(&self.0.progress).working()
    }

    /// Starts the child if it is not running.
    pub(crate) fn want(&self) {
        self.0.wanted.notify_one();
    }

    /// Waits until a child is ready.
    pub(crate) async fn ready(&self) -> Result<Link, EngineDown> {
        self.want();
        let mut link = self.0.link.subscribe();
        let mut status = self.0.status.subscribe();
        loop {
            if let Some(link) = link.borrow_and_update().clone() {
                return Ok(link);
            }
            if status.borrow_and_update().state == EngineRunState::Failed {
                return Err(EngineDown::Failed);
            }
            tokio::select! {
                changed = link.changed() => changed.map_err(|_| EngineDown::Stopping)?,
                changed = status.changed() => changed.map_err(|_| EngineDown::Stopping)?,
            }
        }
    }

    /// Loads a model before its first use.
    pub(crate) async fn load(&self, model: String) -> Result<(), EngineDown> {
        let link = self.ready().await?;
        // A child that dies meanwhile loads at first use.
        let _ = link.frames.send(ToEngine::Load { model }).await;
        Ok(())
    }

    /// Opens a session with a child that is ready. None: the child is gone, ask [`Self::ready`] again.
    pub(crate) async fn open(
        &self,
        link: &Link,
        options: SessionOptions,
        start: StartPoint,
        background: bool,
    ) -> Option<EngineSession> {
        let frames = link.frames.clone();
        // Reserved first, so that the end of a session can always be said, in order.
        let close = frames.clone().reserve_owned().await.ok()?;
        let handle = self.0.next_handle.fetch_add(1, Ordering::Relaxed);
        let account = if background { self.0.budget.apart(JOB_BYTES) } else { self.0.budget.account() };
        let outbox = Arc::new(Outbox::new(account));
        locked(&self.0.outboxes).insert(handle, Arc::clone(&outbox));
        let session = EngineSession { handle, frames, close: Some(close), outbox, engine: self.clone() };
        let open = ToEngine::Open { handle, options: Box::new(options), start: Box::new(start), background };
        session.frames.send(open).await.ok()?;
        Some(session)
    }

    /// Keeps the child alive until `stop`; then ends it and returns when it is reaped.
    pub(crate) async fn run(&self, stop: CancellationToken) {
        let mut failed_starts = 0u32;
        let mut backoff = FIRST_BACKOFF;
        tokio::select! {
            () = stop.cancelled() => return,
            () = self.0.wanted.notified() => {}
        }
        loop {
            let end = self.live(&stop).await;
            let wait = match end {
                LifeEnd::Stopped => break,
                LifeEnd::Died { lived } => {
                    failed_starts = 0;
                    if lived >= HEALTHY_AFTER {
                        backoff = FIRST_BACKOFF;
                    }
                    self.set_state(EngineRunState::Restarting, true);
                    backoff
                }
                LifeEnd::NotReady => {
                    failed_starts += 1;
                    if failed_starts >= MAX_FAILED_STARTS {
                        tracing::error!(failed_starts, "engine cannot be started");
                        self.set_state(EngineRunState::Failed, true);
                        RETRY_FAILED
                    } else {
                        self.set_state(EngineRunState::Restarting, true);
                        backoff
                    }
                }
            };
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep(wait) => {}
            }
        }
        self.set_state(EngineRunState::Down, false);
    }

    fn set_state(&self, state: EngineRunState, restarted: bool) {
        self.0.status.send_modify(|status| {
            status.state = state;
            status.restarts += u32::from(restarted);
            if state != EngineRunState::Ready {
                status.device = "none".to_owned();
                status.models = link::models_on_disk(&self.0.config);
            }
        });
    }

    /// One child from fork to reaping.
    async fn live(&self, stop: &CancellationToken) -> LifeEnd {
        if self.status().state == EngineRunState::Down {
            self.set_state(EngineRunState::Starting, false);
        }
        let spawned = match spawn::spawn(&self.0.program).await {
            Ok(spawned) => spawned,
            Err(error) => {
                self.log_spawn_error(&error);
                return LifeEnd::NotReady;
            }
        };
        let mut child = spawned.child;
        self.0.pid.store(child.id().unwrap_or(0), Ordering::Relaxed);
        tracing::info!(pid = child.id(), "engine started");

        let (read, write) = spawned.socket.into_split();
        let (frames, queue) = mpsc::channel(FRAMES + self.0.slots);
        let mut stderr = JoinSet::new();
        if let Some(pipe) = spawned.stderr {
            stderr.spawn(link::forward_stderr(pipe));
        }
        let mut wires = JoinSet::new();
        wires.spawn(link::write_frames(write, self.0.config.clone(), queue));
        let (ready, mut is_ready) = mpsc::channel(1);
        wires.spawn(link::read_frames(read, self.clone(), ready));

        let begun = Instant::now();
        let mut ready_at = None;
        let stopped = loop {
            tokio::select! {
                () = stop.cancelled() => break true,
                Some(vad) = is_ready.recv() => {
                    ready_at = Some(Instant::now());
                    self.set_state(EngineRunState::Ready, false);
                    self.0.link.send_replace(Some(Link { frames: frames.clone(), vad }));
                }
                Some(ended) = wires.join_next() => {
                    match ended {
                        Ok(TransportError::Closed) => tracing::debug!("engine closed its socket"),
                        Ok(error) => tracing::error!(error = &error as &dyn std::error::Error, "engine socket failed"),
                        Err(error) => tracing::error!(%error, "engine wire task failed"),
                    }
                    break false;
                }
                _ = child.wait() => break false,
                () = sleep(START_TIMEOUT.saturating_sub(begun.elapsed())), if ready_at.is_none() => {
                    tracing::error!(timeout_ms = START_TIMEOUT.as_millis() as u64, "engine did not become ready");
                    break false;
                }
            }
        };
        self.0.link.send_replace(None);
        drop(frames);
        // Ends both halves of the socket: the child's sign to stop.
        wires.shutdown().await;
        for (_, outbox) in locked(&self.0.outboxes).drain() {
            outbox.gone();
        }
        locked(&self.0.progress).reset();
        self.reap(child, stopped).await;
        // The pipe ends with the child; its last words are worth a moment.
        if timeout(STOP_GRACE, stderr.join_next()).await.is_err() {
            tracing::warn!("something still holds the engine's stderr");
        }
        match (stopped, ready_at) {
            (true, _) => LifeEnd::Stopped,
            (false, None) => LifeEnd::NotReady,
            (false, Some(at)) => LifeEnd::Died { lived: at.elapsed() },
        }
    }

    fn log_spawn_error(&self, error: &SpawnError) {
        tracing::error!(error = error as &dyn std::error::Error, "engine not started");
    }

    async fn reap(&self, mut child: Child, asked: bool) {
        let pid = child.id();
        let mut killed = false;
        let status = match timeout(STOP_GRACE, child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                killed = true;
                child.kill().await.err().map_or_else(|| child.try_wait().map(Option::unwrap_or_default), Err)
            }
        };
        self.0.pid.store(0, Ordering::Relaxed);
        match status {
            Ok(status) if asked => tracing::info!(pid, %status, killed, "engine stopped"),
            Ok(status) => tracing::error!(pid, %status, killed, "engine died"),
            Err(error) => tracing::error!(pid, %error, "engine could not be reaped"),
        }
    }

    /// Takes one message from the child. Called by its reader only.
    fn receive(&self, message: FromEngine) {
        let outbox = |handle: u64| locked(&self.0.outboxes).get(&handle).cloned();
        match message {
            // Only the first one counts, and that one was taken by the reader.
            FromEngine::Ready { .. } => tracing::warn!("engine said ready twice"),
            FromEngine::Models(models) => self.0.status.send_modify(|status| status.models = models),
            FromEngine::Consumed { handle, bytes } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.account.consumed(bytes);
                }
            }
            FromEngine::Note { handle, note } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.note(note);
                }
            }
            FromEngine::Partial { handle, partial } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.partial(*partial);
                }
            }
            FromEngine::Final { handle, draft } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.final_draft(*draft);
                }
            }
            FromEngine::Failed { handle, failure } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.failed(failure);
                }
            }
            FromEngine::Progress { decodes, audio_ms, busy_ms, working } => {
                locked(&self.0.progress).progress(Instant::now(), decodes, audio_ms, busy_ms, working);
            }
        }
    }
}

/// One session inside the engine. Dropping it closes it there and gives its bytes back.
#[derive(Debug)]
pub(crate) struct EngineSession {
    handle: u64,
    frames: mpsc::Sender<ToEngine>,
    close: Option<mpsc::OwnedPermit<ToEngine>>,
    outbox: Arc<Outbox>,
    engine: Engine,
}

/// Room for one frame; see [`EngineSession::room`].
pub(crate) struct FeedPermit<'a> {
    handle: u64,
    permit: mpsc::Permit<'a, ToEngine>,
}

impl EngineSession {
    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Waits until a frame can be sent; cancel-safe. None: the child is gone, the outbox says so too.
    pub(crate) async fn room(&self) -> Option<FeedPermit<'_>> {
        let permit = self.frames.reserve().await.ok()?;
        Some(FeedPermit { handle: self.handle, permit })
    }
}

impl FeedPermit<'_> {
    /// Hands an entry over. Its bytes are the caller's to count, with the outbox's account.
    pub(crate) fn feed(self, entry: voxfleet_schema::audio::RawEntry) {
        self.permit.send(ToEngine::Entry(EntryFor { handle: self.handle, entry }));
    }
}

impl Drop for EngineSession {
    fn drop(&mut self) {
        locked(&self.engine.0.outboxes).remove(&self.handle);
        self.outbox.account.close();
        if let Some(close) = self.close.take() {
            close.send(ToEngine::Close { handle: self.handle });
        }
    }
}
