//! Models and the threads that decode.
//!
//! A fixed number of threads, each with one decode state per model it has been asked for; weights are loaded once per
//! model, by a thread of its own, one model at a time. The engine loop hands a thread one window at a time, and only when
//! it is idle, so it never waits for a thread.

use std::{
    collections::HashMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

#[cfg(feature = "ct2-engine")]
use super::ct2::{self, Ct2Device, Ct2Model};
use super::{
    Cancel, EngineError, Hypothesis, Recognizer, RecognizerInfo, Window,
    diarize::{DiarizeConfig, Ears, HeardLate, Hearing, Listened, Listening},
    guards::{Judged, judge},
    models,
    simulated::{self, SimulatedModel},
    whisper::{self, WhisperModel},
};
use crate::ipc::{EngineConfig, EngineKind, ModelFile};

/// A decode that fails is tried this often in all: the same window gives the same text, so nothing is lost by it.
const ATTEMPTS: u32 = 3;

/// Loaded weights of either kind.
#[derive(Clone)]
pub enum Model {
    Whisper(WhisperModel),
    #[cfg(feature = "ct2-engine")]
    Ct2(Ct2Model),
    Simulated(SimulatedModel),
}

/// What decodes that run at once have of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runs {
    /// Each its own cores.
    Apart,
    /// Each a part of it, at the same time.
    Together,
    /// One batch after the other: a window waits for those that go before it.
    Batched,
}

/// What models of one process share: it has one device.
#[derive(Default)]
pub struct Devices {
    #[cfg(feature = "ct2-engine")]
    ct2: Option<Ct2Device>,
}

#[cfg(feature = "ct2-engine")]
impl Devices {
    fn ct2(&mut self, name: &str) -> Result<&Ct2Device, EngineError> {
        let failed =
            |e: io::Error| EngineError::Model { name: name.to_owned(), why: format!("no thread for its device: {e}") };
        match &mut self.ct2 {
            Some(device) => Ok(device),
            none => Ok(none.insert(Ct2Device::start().map_err(failed)?)),
        }
    }
}

impl Model {
    pub fn load(config: &EngineConfig, file: &ModelFile, devices: &mut Devices) -> Result<Self, EngineError> {
        #[cfg(not(feature = "ct2-engine"))]
        let Devices {} = devices;
        match config.engine.of_model(file) {
            #[cfg(feature = "ct2-engine")]
            EngineKind::Ct2 => {
                // One batch is at work at a time. Where whisper.cpp's states may be at work as well, it has the threads of all.
                let states = if config.engine == EngineKind::Auto { config.decode_states } else { 1 };
                let threads = config.decode_threads * states;
                let device = devices.ct2(&file.name)?;
                Ct2Model::load(&file.name, &file.path, &config.ct2, threads, config.use_gpu, device).map(Self::Ct2)
            }
            #[cfg(not(feature = "ct2-engine"))]
            EngineKind::Ct2 => Err(no_ct2(file)),
            EngineKind::WhisperCpp | EngineKind::Auto => {
                WhisperModel::load(&file.name, &file.path, config.use_gpu, config.decode_threads).map(Self::Whisper)
            }
            EngineKind::Simulated => {
                SimulatedModel::load_on(&file.name, &config.simulated, config.use_gpu).map(Self::Simulated)
            }
        }
    }

    pub fn info(&self) -> &RecognizerInfo {
        match self {
            Self::Whisper(model) => model.info(),
            #[cfg(feature = "ct2-engine")]
            Self::Ct2(model) => model.info(),
            Self::Simulated(model) => model.info(),
        }
    }

    /// Its weights are in the memory of a GPU.
    fn is_on_gpu(&self) -> bool {
        match self {
            Self::Whisper(model) => model.is_on_gpu(),
            #[cfg(feature = "ct2-engine")]
            Self::Ct2(model) => model.info().device != "cpu",
            Self::Simulated(_) => false,
        }
    }

    pub fn runs(&self) -> Runs {
        match self {
            #[cfg(feature = "ct2-engine")]
            Self::Ct2(_) => Runs::Batched,
            Self::Whisper(_) | Self::Simulated(_) if self.info().device == "cpu" => Runs::Apart,
            Self::Whisper(_) | Self::Simulated(_) => Runs::Together,
        }
    }

    /// MB that its weights take on a simulated card, and each of its states.
    fn on_card_mb(&self) -> Option<(u64, u64)> {
        match self {
            Self::Simulated(model) => model.on_card_mb(),
            _ => None,
        }
    }

    pub fn state(&self) -> Result<Box<dyn Recognizer>, EngineError> {
        Ok(match self {
            Self::Whisper(model) => Box::new(model.state()?),
            #[cfg(feature = "ct2-engine")]
            Self::Ct2(model) => Box::new(model.state()),
            Self::Simulated(model) => Box::new(model.state()?),
        })
    }
}

/// What loading a model will take in MB, all decode states included; an error says why it cannot be loaded at all.
pub fn expected_mb(config: &EngineConfig, file: &ModelFile) -> Result<u64, EngineError> {
    let states = config.decode_states as u64;
    match config.engine.of_model(file) {
        EngineKind::Simulated => {
            Ok(simulated::weights_mb(&config.simulated, &file.name) + states * config.simulated.state_mb)
        }
        #[cfg(not(feature = "ct2-engine"))]
        EngineKind::Ct2 => Err(no_ct2(file)),
        #[cfg(feature = "ct2-engine")]
        EngineKind::Ct2 if file.path.is_dir() => {
            ct2::folder::expected_mb(&file.name, &file.path, &config.ct2, config.use_gpu)
        }
        #[cfg(feature = "ct2-engine")]
        EngineKind::Ct2 => ct2::folder::expected_mb_of(&file.name, &file.path, &config.ct2, config.use_gpu),
        _ => models::check(&file.name, &file.path)
            .map(|facts| facts.expected_mb - facts.state_mb + states * facts.state_mb),
    }
}

#[cfg(not(feature = "ct2-engine"))]
fn no_ct2(file: &ModelFile) -> EngineError {
    let why = "this build has no CTranslate2 (cargo feature ct2)".to_owned();
    EngineError::Model { name: file.name.clone(), why }
}

/// Whether a session cannot go on here after such an error; any other makes one final without text. A language or task the
/// model lacks is of the second kind: the session would fail at every worker alike, and its finals say why.
pub fn ends_session(error: &EngineError) -> bool {
    match error {
        EngineError::Model { .. } | EngineError::OutOfMemory(_) | EngineError::Vad(_) => true,
        EngineError::Cancelled | EngineError::Decode(_) | EngineError::Unsupported(_) => false,
    }
}

/// Decodes one window and lets the guards judge it. Failed decodes are tried again; the answer does not depend on how
/// many tries it took.
pub fn hear(recognizer: &mut dyn Recognizer, window: &Window) -> Result<Judged, EngineError> {
    let mut attempt = 1;
    loop {
        let heard = recognizer
            .decode(std::slice::from_ref(window))
            .pop()
            .unwrap_or_else(|| Err(EngineError::Decode("no answer to a window".to_owned())));
        match heard {
            Err(EngineError::Decode(why)) if attempt < ATTEMPTS && !window.cancel.is_cancelled() => {
                tracing::warn!(%why, attempt, "decode failed, trying again");
                attempt += 1;
            }
            heard => return heard.map(|hypothesis: Hypothesis| judge(&hypothesis)),
        }
    }
}

/// One window for a thread.
pub struct Job {
    pub handle: u64,
    /// Which of its final's windows it is.
    pub part: usize,
    pub model: Model,
    pub window: Window,
    /// Since when it could have been decoded.
    pub ready_at: Instant,
}

/// A thread's answer.
pub struct Done {
    pub thread: usize,
    pub handle: u64,
    pub part: usize,
    pub window: Window,
    pub heard: Result<Judged, EngineError>,
    pub listened: Listened,
    pub info: RecognizerInfo,
    pub runs: Runs,
    pub queued: Duration,
    pub took: Duration,
    /// Resident memory that a decode state made for this job took, in MB.
    pub state_mb: u64,
}

/// The loader's answer.
pub struct Loaded {
    pub name: String,
    pub model: Result<Model, EngineError>,
    pub resident_mb: u64,
    pub took: Duration,
}

/// For a decode thread.
enum Order {
    Decode(Box<Job>),
    /// Drops its state of this model, and says so by dropping the sender.
    Forget(String, SyncSender<()>),
}

/// For the loader: a file, and what has to be over before, so that the memory is there.
type Load = (ModelFile, Vec<Receiver<()>>);

/// How long a load waits for memory that is being given back: for a decode that was cancelled.
const GIVEN_BACK: Duration = Duration::from_secs(5);

/// The decode threads and the loader. Dropping it tells them to end; [`Pool::end`] also waits for those that are idle.
pub struct Pool {
    threads: Vec<DecodeThread>,
    loads: SyncSender<Load>,
    loader: JoinHandle<()>,
    /// States that are being dropped.
    forgetting: Vec<Receiver<()>>,
    /// Listens to finals that were decoded elsewhere.
    ears: Ears,
}

struct DecodeThread {
    orders: SyncSender<Order>,
    thread: JoinHandle<()>,
    idle: bool,
    /// Models it has a state for already.
    warm: Vec<String>,
}

impl Pool {
    /// Room for as many waiting loads as there are models: each is asked for once at a time.
    pub fn start<E>(config: &EngineConfig, events: &SyncSender<E>) -> io::Result<Self>
    where
        E: From<Done> + From<Loaded> + From<HeardLate> + Send + 'static,
    {
        let mut threads = Vec::new();
        for number in 0..config.decode_states.max(1) {
            // One job, and each model forgotten once.
            let (orders, queue) = sync_channel(1 + config.models.len());
            let events = events.clone();
            let ears = (config.diarize.clone(), config.onnxruntime.clone());
            let thread = std::thread::Builder::new()
                .name(format!("decode-{number}"))
                .spawn(move || decode_loop(number, ears, &queue, &events))?;
            threads.push(DecodeThread { orders, thread, idle: true, warm: Vec::new() });
        }
        let ears = Ears::start("ears".to_owned(), config.diarize.clone(), config.onnxruntime.clone(), events.clone())?;
        let (loads, queue) = sync_channel(config.models.len().max(1));
        let (config, events) = (config.clone(), events.clone());
        let loader = std::thread::Builder::new()
            .name("model-loader".to_owned())
            .spawn(move || load_loop(&config, &queue, &events))?;
        Ok(Self { threads, loads, loader, forgetting: Vec::new(), ears })
    }

    /// Listens to a window that is not decoded here; the answer is a [`HeardLate`] of this handle. Gives it back where too many
    /// wait already.
    pub fn listen(&self, handle: u64, hearing: Hearing) -> Result<Cancel, Box<Hearing>> {
        self.ears.listen(handle, hearing)
    }

    pub fn idle(&self) -> bool {
        self.threads.iter().any(|t| t.idle)
    }

    pub fn all_idle(&self) -> bool {
        self.threads.iter().all(|t| t.idle)
    }

    /// Gives a window to an idle thread, one that has a state for its model if there is one. Gives it back where none is
    /// idle or its thread is gone.
    pub fn decode(&mut self, job: Box<Job>) -> Result<(), Box<Job>> {
        let name = &job.model.info().model;
        let warm = self.threads.iter().position(|t| t.idle && t.warm.contains(name));
        let Some(thread) = warm.or_else(|| self.threads.iter().position(|t| t.idle)) else {
            return Err(job);
        };
        let thread = &mut self.threads[thread];
        let name = name.clone();
        if let Err(TrySendError::Full(order) | TrySendError::Disconnected(order)) =
            thread.orders.try_send(Order::Decode(job))
        {
            return match order {
                Order::Decode(job) => Err(job),
                Order::Forget(..) => Ok(()),
            };
        }
        thread.idle = false;
        if !thread.warm.contains(&name) {
            thread.warm.push(name);
        }
        Ok(())
    }

    /// A thread's answer was taken.
    pub fn freed(&mut self, thread: usize) {
        if let Some(thread) = self.threads.get_mut(thread) {
            thread.idle = true;
        }
    }

    /// Asks for a model; says false when the loader is gone or has more to do than there are models.
    pub fn load(&mut self, file: &ModelFile) -> bool {
        let before = std::mem::take(&mut self.forgetting);
        self.loads.try_send((file.clone(), before)).is_ok()
    }

    /// Has all threads drop their states of a model; loads asked for later wait until they have.
    pub fn forget(&mut self, model: &str) {
        for thread in &mut self.threads {
            let Some(known) = thread.warm.iter().position(|name| name == model) else { continue };
            let (dropping, dropped) = sync_channel(0);
            if thread.orders.try_send(Order::Forget(model.to_owned(), dropping)).is_ok() {
                thread.warm.swap_remove(known);
                self.forgetting.push(dropped);
            }
        }
    }

    /// Ends threads that have nothing to do, and says whether all did; others are left to the process's end.
    pub fn end(self) -> bool {
        let Self { threads, loads, loader, .. } = self;
        drop(loads);
        let mut all = true;
        let handles: Vec<(bool, JoinHandle<()>)> = threads.into_iter().map(|t| (t.idle, t.thread)).collect();
        for (idle, thread) in handles {
            // A panic in there was reported as its job's missing answer; here it only means that it has ended.
            all &= idle && thread.join().is_ok();
        }
        all && (!loader.is_finished() || loader.join().is_ok())
    }
}

/// What a decode thread's listener is made of.
type EarsOf = (DiarizeConfig, Option<PathBuf>);

fn decode_loop<E>(number: usize, ears_of: EarsOf, orders: &Receiver<Order>, events: &SyncSender<E>)
where
    E: From<Done> + From<HeardLate> + Send + 'static,
{
    let mut ears: Option<Ears> = None;
    let mut states: HashMap<String, Box<dyn Recognizer>> = HashMap::new();
    while let Ok(order) = orders.recv() {
        let mut job = match order {
            Order::Decode(job) => job,
            Order::Forget(model, dropping) => {
                states.remove(&model);
                drop(dropping);
                continue;
            }
        };
        let begin = Instant::now();
        let info = job.model.info().clone();
        let queued = begin.duration_since(job.ready_at);
        let runs = job.model.runs();
        let before = Taken::from_now(job.model.is_on_gpu());
        let listening = job.window.hearing.take().map(|hearing| {
            let ears = match &mut ears {
                Some(ears) => ears,
                none => {
                    let (config, library) = ears_of.clone();
                    none.insert(Ears::start(format!("ears-{number}"), config, library, events.clone())?)
                }
            };
            Ok::<Listening, io::Error>(ears.begin(job.handle, *hearing, job.window.cancel.clone()))
        });
        // A state whose decode panicked is not put back: the next job makes a new one.
        let state = match states.remove(&info.model) {
            Some(state) => Ok((state, false)),
            None => job.model.state().map(|state| (state, true)),
        };
        let (heard, state_mb) = match state {
            Err(error) => (Err(error), 0),
            Ok((mut state, new)) => match catch_unwind(AssertUnwindSafe(|| hear(state.as_mut(), &job.window))) {
                Err(_) => (Err(EngineError::Decode("the recognizer panicked".to_owned())), 0),
                Ok(heard) => {
                    states.insert(info.model.clone(), state);
                    let took = || before.mb();
                    // What batches work on belongs to nobody's state.
                    let new = new && runs != Runs::Batched;
                    (heard, if new { job.model.on_card_mb().map_or_else(took, |(_, state)| state) } else { 0 })
                }
            },
        };
        let Job { handle, part, window, .. } = *job;
        let took = begin.elapsed();
        let mut listened = match listening {
            None => Listened::NotAsked,
            Some(Ok(listening)) => listening.wait(took),
            Some(Err(error)) => Listened::Heard(Err(format!("no thread to listen: {error}"))),
        };
        let held = if let Listened::Late(late) = &mut listened { late.hold() } else { None };
        let done = Done { thread: number, handle, part, window, heard, listened, info, runs, queued, took, state_mb };
        if events.send(done.into()).is_err() {
            // The engine loop has ended, and so does this.
            return;
        }
        // Now what was heard too late may follow.
        drop(held);
    }
}

fn load_loop<E: From<Loaded>>(config: &EngineConfig, loads: &Receiver<Load>, events: &SyncSender<E>) {
    let mut devices = Devices::default();
    while let Ok((file, before)) = loads.recv() {
        let patience = Instant::now() + GIVEN_BACK;
        for dropped in before {
            // Dropped or too late: either way the load shows whether there is room.
            let _ = dropped.recv_timeout(patience.saturating_duration_since(Instant::now()));
        }
        let on_gpu = config.engine.is_real() && config.use_gpu;
        let (begin, before) = (Instant::now(), Taken::from_now(on_gpu));
        let model = Model::load(config, &file, &mut devices);
        let on_card = model.as_ref().ok().and_then(Model::on_card_mb);
        let resident_mb = on_card.map_or_else(|| before.mb(), |(weights, _)| weights);
        let loaded = Loaded { name: file.name, model, resident_mb, took: begin.elapsed() };
        if events.send(loaded.into()).is_err() {
            return;
        }
    }
}

/// MB that this process has taken: of the GPU's free memory where one is used and nobody else grows, else resident.
pub struct Taken {
    free_before_mb: Option<u64>,
    resident_before_mb: u64,
}

impl Taken {
    pub fn from_now(use_gpu: bool) -> Self {
        let free_before_mb = use_gpu.then(whisper::free_device_mb).flatten();
        Self { free_before_mb, resident_before_mb: resident_mb() }
    }

    pub fn mb(&self) -> u64 {
        match (self.free_before_mb, whisper::free_device_mb()) {
            (Some(before), Some(now)) => before.saturating_sub(now),
            _ => resident_mb().saturating_sub(self.resident_before_mb),
        }
    }
}

/// Resident memory of this process in MB; 0 where the system does not tell.
pub fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}
