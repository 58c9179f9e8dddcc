//! The engine child's life: started at first need, started again when it dies, ended and reaped at the stop.
//!
//! Sessions see an [`Engine`]: they open an [`EngineSession`], feed it, and read its [`Outbox`]. When the child dies every
//! outbox says so, and the sessions open again from their last final as soon as the next child is ready. Nothing here
//! waits for a session, and no session waits here for another one's audio.
//!
//! | module | does |
//! |---|---|
//! | [`child`], [`link`], [`hear`], [`spawn`] | one child from fork to reaping, its socket and what it says there |
//! | [`cause`] | why it ended; pure |
//! | [`files`], [`load`] | what is told of the models' files without it, and how far it has read them |
//! | [`ladder`], [`fallback`], [`standing`] | what runs for whom when the device fails; the first two pure |
//! | [`idle`] | when an engine that nobody needs ends; pure |
//! | [`pressure`] | how far other tenants have grown; pure |
//! | [`suspects`], [`progress`] | whose input kills it; whether it moves; pure |
//! | [`session`], [`outbox`] | one session inside the engine |

mod cause;
mod child;
mod fallback;
mod files;
mod hear;
mod idle;
mod ladder;
mod link;
mod load;
mod outbox;
mod pressure;
mod progress;
mod session;
mod spawn;
mod standing;
mod suspects;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    device::EngineEnd,
    failure::FailureClass,
    fleet::{Device, EngineRunState, EngineState, ModelState, Residency},
    id::{Kind, StreamId},
    transcript::{SpeakersBy, VadKind},
};

pub(crate) use self::{
    cause::is_of_this_worker,
    fallback::Waits,
    ladder::{Ask, Footing},
    outbox::{Draft, Outbox},
    pressure::{Gauge, Memory},
    session::{EngineSession, Opening},
    spawn::Program,
    suspects::{Known, Treatment},
};
use self::{
    fallback::Fallback,
    files::Files,
    idle::{Idle, Open, Terms},
    load::Load,
    progress::ProgressMeter,
    suspects::{Death, Doing, Name, Suspects},
};
use crate::{
    capacity::{Account, Budget, locked},
    engine::diarize,
    ipc::{EngineConfig, ToEngine},
    session::Names,
};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// A child that lived this long had no trouble starting.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// Starts in a row that never became ready before the engine is said to be failed.
const MAX_FAILED_STARTS: u32 = 5;
/// How often is looked whether something may be tried again while there is no child.
const RESTORE_EVERY: Duration = Duration::from_secs(1);
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
    pub(crate) speakers: SpeakersBy,
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

/// How long an engine is kept, waited for and left alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EngineTerms {
    /// Sessions at most; each keeps room for its `Close` frame.
    pub(crate) slots: usize,
    /// Without a sign of life for so long, the child is ended.
    pub(crate) stuck_after: Duration,
    /// Without work for so long, it ends too; none = never.
    pub(crate) idle_release: Option<Duration>,
    /// It ends as soon as the last session or job has gone for good.
    pub(crate) swap: bool,
    /// What failed is tried again then.
    pub(crate) waits: Waits,
    /// Share of the device's memory that is left free.
    pub(crate) reserve_percent: u8,
}

/// By model, what live audio on this device has cost since the worker's start: audio heard, and time of the whole pool, in ms.
pub(crate) type Lived = BTreeMap<String, (u64, f64)>;

/// The way to one child.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    frames: mpsc::Sender<ToEngine>,
    pub(crate) vad: VadKind,
    /// It runs on the CPU.
    pub(crate) on_cpu: bool,
}

#[derive(Debug)]
struct Inner {
    config: EngineConfig,
    program: Program,
    terms: EngineTerms,
    budget: Budget,
    link: watch::Sender<Option<Link>>,
    status: watch::Sender<EngineStatus>,
    lived: watch::Sender<Lived>,
    outboxes: Mutex<HashMap<u64, Arc<Outbox>>>,
    /// Models asked of this child that have not been heard to be there. Sessions that see it die are gone before its end is
    /// looked at.
    asked: Mutex<HashSet<String>>,
    /// What the child is decoding, by handle.
    decoding: Mutex<HashMap<u64, Decoding>>,
    /// Whose audio its loop looks at.
    stepping: Mutex<Option<Doing>>,
    suspects: Mutex<Suspects>,
    fallback: Mutex<Fallback>,
    last_end: Mutex<Option<EngineEnd>>,
    ends: Mutex<BTreeMap<FailureClass, u32>>,
    device: watch::Receiver<Device>,
    files: Mutex<Files>,
    /// When each load began, and how long it took.
    loads: Mutex<HashMap<String, Load>>,
    next_handle: AtomicU64,
    /// Who waits for a child.
    waiting: AtomicUsize,
    wanted: Notify,
    idle: Mutex<Idle>,
    /// Idle models are wanted back.
    release: AtomicBool,
    /// The next child is to have the memory of this one.
    anew: AtomicBool,
    /// For the child's keeper: somebody came or went, or the engine is to run elsewhere.
    activity: Notify,
    /// Where the present child runs.
    on_cpu: AtomicBool,
    pid: AtomicU32,
    progress: Mutex<ProgressMeter>,
    /// A change that the fleet should hear of at once.
    news: Arc<Notify>,
}

#[derive(Debug, Clone)]
pub(crate) struct Engine(Arc<Inner>);

/// Somebody waits for a child.
struct Waiting<'a>(&'a Inner);

impl<'a> Waiting<'a> {
    fn new(inner: &'a Inner) -> Self {
        inner.waiting.fetch_add(1, Ordering::Relaxed);
        inner.wanted.notify_one();
        inner.activity.notify_one();
        Self(inner)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.activity.notify_one();
    }
}

/// Windows of one session that are being decoded.
#[derive(Debug)]
struct Decoding {
    /// None when it was closed before.
    name: Option<Name>,
    /// First sample of the stretch begun last.
    at: u64,
    windows: u32,
}

/// How one child's life ended.
#[derive(Debug)]
enum LifeEnd {
    Stopped,
    /// Nobody needed it, or it is to run elsewhere: the next one comes when it is wanted.
    Released,
    /// It never said `Ready`.
    NotReady,
    Died {
        lived: Duration,
    },
}

impl Engine {
    pub(crate) fn new(
        config: EngineConfig,
        program: Program,
        terms: EngineTerms,
        budget: Budget,
        device: watch::Receiver<Device>,
        news: Arc<Notify>,
    ) -> Self {
        let vad = if config.silero_model.is_some() { VadKind::Silero } else { VadKind::Energy };
        let engine = config.engine.as_str();
        let status = EngineStatus {
            state: EngineRunState::Down,
            engine: engine.to_owned(),
            device: "none".to_owned(),
            vad,
            speakers: diarize::expected(&config.diarize, config.onnxruntime.as_deref()).0,
            restarts: 0,
            models: link::models_of(&config),
        };
        let rest = Terms { after: terms.idle_release, swap: terms.swap };
        Self(Arc::new(Inner {
            fallback: Mutex::new(Fallback::new(config.use_gpu, terms.waits)),
            on_cpu: AtomicBool::new(!config.use_gpu),
            config,
            program,
            terms,
            budget,
            link: watch::Sender::new(None),
            status: watch::Sender::new(status),
            lived: watch::Sender::default(),
            outboxes: Mutex::default(),
            asked: Mutex::default(),
            decoding: Mutex::default(),
            stepping: Mutex::default(),
            suspects: Mutex::default(),
            last_end: Mutex::default(),
            ends: Mutex::default(),
            device,
            files: Mutex::default(),
            loads: Mutex::default(),
            next_handle: AtomicU64::new(1),
            waiting: AtomicUsize::new(0),
            wanted: Notify::new(),
            idle: Mutex::new(Idle::new(rest)),
            release: AtomicBool::new(false),
            anew: AtomicBool::new(false),
            activity: Notify::new(),
            pid: AtomicU32::new(0),
            progress: Mutex::default(),
            news,
        }))
    }

    pub(crate) fn status(&self) -> EngineStatus {
        self.0.status.borrow().clone()
    }

    /// Every change of what [`Self::status`] says.
    pub(crate) fn watch(&self) -> watch::Receiver<EngineStatus> {
        self.0.status.subscribe()
    }

    /// Every change of what live audio has cost.
    pub(crate) fn watch_lived(&self) -> watch::Receiver<Lived> {
        self.0.lived.subscribe()
    }

    /// The heartbeat's view.
    pub(crate) fn heartbeat_state(&self, now: Instant) -> (EngineState, Vec<ModelState>) {
        let status = self.status();
        let progress = locked(&self.0.progress).reading(now);
        let state = EngineState {
            state: status.state,
            effective_device: self.effective_device(&status),
            kind: status.engine,
            vad: status.vad,
            speakers: status.speakers,
            ms_since_progress: progress.ms_since_progress,
            restarts: status.restarts,
            crashes: locked(&self.0.suspects).crashes(now),
            decode_rate: progress.decode_rate,
            decode_rate_age_ms: progress.decode_rate_age_ms,
            delivery_rate: progress.delivery_rate,
            neighbour_ms: progress.neighbour_ms,
            idle_timeout_s: self.0.terms.idle_release.map_or(0, |after| after.as_millis().div_ceil(1_000) as u64),
            ms_since_activity: (status.state == EngineRunState::Ready)
                .then(|| locked(&self.0.idle).for_how_long(now))
                .flatten()
                .map(|rest| rest.as_millis() as u64),
            last_end: locked(&self.0.last_end).clone(),
            ends: locked(&self.0.ends).clone(),
            standbys: self.standbys(),
        };
        (state, self.told_models(status.models, now))
    }

    /// For how long a neighbour has kept the device from us, where that is long.
    pub(crate) fn neighbour_ms(&self) -> u64 {
        locked(&self.0.progress).reading(Instant::now()).neighbour_ms
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        Some(self.0.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    /// What the models that are loaded have taken, as the engine says.
    pub(crate) fn models_mb(&self) -> u64 {
        self.status()
            .models
            .iter()
            .filter(|model| model.state == Residency::Loaded)
            .map(|model| model.resident_mb)
            .sum()
    }

    /// What the models that are loaded, or being loaded, are expected to take.
    pub(crate) fn expected_mb(&self) -> u64 {
        let there = |model: &&ModelState| matches!(model.state, Residency::Loaded | Residency::Loading);
        self.status().models.iter().filter(there).map(|model| model.expected_mb).sum()
    }

    /// Starts the child if it is not running, and waits until it is ready. However many wait, there is one child.
    pub(crate) async fn ready(&self) -> Result<Link, EngineDown> {
        let _waiting = Waiting::new(&self.0);
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
        let has_room = || {
            let free = locked(&self.0.fallback).no_room(&model).is_none();
            if !free {
                tracing::info!(model, "not loaded ahead, it had no room a moment ago");
            }
            free
        };
        // An engine alone takes memory of a device that has none.
        if !has_room() {
            return Ok(());
        }
        let link = self.ready().await?;
        // Its start may have taken long.
        if !has_room() {
            return Ok(());
        }
        // Nobody uses it yet: its time begins when it is there.
        locked(&self.0.idle).stirred();
        // A child that dies meanwhile loads at first use.
        locked(&self.0.asked).insert(model.clone());
        let _ = link.frames.send(ToEngine::Load { model }).await;
        Ok(())
    }

    /// Gives back what nobody here uses: the whole engine, or models of it.
    pub(crate) fn release_idle(&self) {
        self.0.release.store(true, Ordering::Relaxed);
        self.0.activity.notify_one();
    }

    fn open_now(&self) -> Open {
        Open { inside: locked(&self.0.outboxes).len(), waiting: self.0.waiting.load(Ordering::Relaxed) }
    }

    fn next_handle(&self) -> u64 {
        self.0.next_handle.fetch_add(1, Ordering::Relaxed)
    }

    fn account(&self, background: bool) -> Account {
        if background { self.0.budget.apart(JOB_BYTES) } else { self.0.budget.account() }
    }

    fn register(&self, handle: u64, outbox: Arc<Outbox>) {
        locked(&self.0.outboxes).insert(handle, outbox);
    }

    /// An input comes, with what others know about it.
    pub(crate) fn begins(&self, names: &Names, told: Known) {
        locked(&self.0.suspects).begins(names.name(), told);
    }

    /// It is no longer here.
    pub(crate) fn forget(&self, names: &Names) {
        locked(&self.0.suspects).forget(&names.name());
        self.leaves(names);
    }

    /// How an input that goes on at sample `from` is to be decoded.
    pub(crate) fn treat(&self, names: &Names, from: u64) -> Treatment {
        locked(&self.0.suspects).treat(Instant::now(), &names.name(), from)
    }

    /// A final up to `to_sample` is stored.
    pub(crate) fn passed(&self, names: &Names, to_sample: u64) {
        if locked(&self.0.suspects).passed(&names.name(), to_sample) {
            // What the dispatcher knows of it is wrong from now on.
            self.0.news.notify_one();
        }
    }

    /// What is held against it.
    pub(crate) fn suspected(&self, kind: Kind, id: &StreamId) -> Known {
        locked(&self.0.suspects).told(Instant::now(), &(kind, id.clone()))
    }

    /// Its audio could not be looked at, in the stretch that begins at `at`: as bad as a death of which it is the only cause.
    pub(crate) fn erred(&self, names: &Names, at: u64) {
        let doing = Doing { name: Some(names.name()), at, stepping: true };
        locked(&self.0.suspects).died(Instant::now(), Death::Crashed, &[doing], false);
        self.0.news.notify_one();
    }

    /// It has work and does not move, for half of the time after which it is ended: whoever comes now would only wait.
    pub(crate) fn stalls(&self, now: Instant) -> bool {
        let silent_ms = locked(&self.0.progress).reading(now).ms_since_progress;
        u128::from(silent_ms) >= self.0.terms.stuck_after.as_millis() / 2
    }

    /// Keeps the child alive while it is wanted, until `stop`; then ends it and returns when it is reaped.
    pub(crate) async fn run(&self, stop: CancellationToken) {
        let mut failed_starts = 0u32;
        let mut backoff = FIRST_BACKOFF;
        let mut again = false;
        let mut headers = self.read_headers();
        while again || self.is_wanted(&stop, &mut headers).await {
            let end = self.live(&stop).await;
            // However it ended: nobody tells any more how a trial in it went.
            locked(&self.0.fallback).gave_up_trying();
            again = true;
            let wait = match end {
                LifeEnd::Stopped => break,
                LifeEnd::Released => {
                    (failed_starts, backoff, again) = (0, FIRST_BACKOFF, false);
                    self.set_state(EngineRunState::Down, false);
                    continue;
                }
                LifeEnd::Died { lived } => {
                    failed_starts = 0;
                    if lived >= HEALTHY_AFTER {
                        backoff = FIRST_BACKOFF;
                    }
                    self.set_state(EngineRunState::Restarting, true);
                    backoff
                }
                // What came of it is another engine to start.
                LifeEnd::NotReady if !self.is_on_side(self.0.on_cpu.load(Ordering::Relaxed)) => {
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

    /// Waits until somebody waits for a child; false: it is to stop.
    async fn is_wanted(&self, stop: &CancellationToken, headers: &mut JoinSet<Vec<(String, u64)>>) -> bool {
        let mut looks = interval(RESTORE_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.0.waiting.load(Ordering::Relaxed) == 0 {
            tokio::select! {
                () = stop.cancelled() => return false,
                () = self.0.wanted.notified() => {}
                _ = looks.tick() => {
                    self.look_at_files();
                    self.restore(None);
                }
                Some(found) = headers.join_next() => match found {
                    Ok(found) => self.headers_say(&found),
                    Err(error) => tracing::error!(%error, "headers of the models not read"),
                },
            }
        }
        !stop.is_cancelled()
    }

    fn set_state(&self, state: EngineRunState, restarted: bool) {
        self.0.status.send_modify(|status| {
            status.state = state;
            status.restarts += u32::from(restarted);
            if state != EngineRunState::Ready {
                status.device = "none".to_owned();
                self.rest_models(&mut status.models);
            }
        });
        if matches!(state, EngineRunState::Restarting | EngineRunState::Failed) {
            self.0.news.notify_one();
        }
    }

    pub(crate) fn standbys(&self) -> Vec<voxfleet_schema::device::Standby> {
        let models: Vec<String> = self.0.status.borrow().models.iter().map(|model| model.name.clone()).collect();
        locked(&self.0.fallback).standbys(&models)
    }
}

#[cfg(test)]
pub(crate) mod tests;
