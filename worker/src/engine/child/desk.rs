//! What the engine loop keeps: sessions, models, the pool, and the way out. It decides what is decoded next.

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::{ModelState, Residency},
    session::SessionOptions,
    transcript::Timings,
};

use crate::{
    engine::{
        Cancel, EngineError, Purpose, Window,
        pool::{Done, Job, Loaded, Model, Pool, ends_session, expected_mb},
        stream::{SessionStream, Step},
        vad::VadFactory,
    },
    ipc::{
        EngineConfig, FromEngine, ModelFile, StartPoint, ToEngine,
        transport::{BlockingWriter, TransportError},
    },
};

type Said = Result<(), TransportError>;

/// A load that takes longer than this is no longer a sign of life.
const LONGEST_LOAD: Duration = Duration::from_secs(120);

/// How long a recording's window waits behind partials.
const OVERDUE: Duration = Duration::from_secs(5);

/// Whose windows are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Live,
    /// Recordings that have waited for long.
    Overdue,
    Recordings,
}

struct Session {
    stream: SessionStream,
    model: String,
    /// A final's window that waits for a thread, and since when.
    ready: Option<(Window, Instant)>,
    /// The window of a final is being decoded.
    decoding: Option<Cancel>,
    /// A partial is being decoded.
    partial: Option<Cancel>,
    last_partial: Instant,
    /// A file job: live sessions come first.
    background: bool,
    /// There is input that has not been stepped over.
    dirty: bool,
}

struct Shelved {
    file: ModelFile,
    state: Residency,
    model: Option<Model>,
    resident_mb: u64,
    expected_mb: u64,
    loading_since: Option<Instant>,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
struct Totals {
    decodes: u64,
    audio_ms: u64,
    busy_ms: u64,
}

pub(super) struct Desk {
    config: EngineConfig,
    pool: Pool,
    vads: Arc<dyn VadFactory>,
    out: BlockingWriter<UnixStream>,
    sessions: HashMap<u64, Session>,
    models: BTreeMap<String, Shelved>,
    totals: Totals,
    /// What was last told: totals, signs of life, working.
    told: (Totals, u64, bool),
}

impl Desk {
    pub(super) fn new(
        config: EngineConfig,
        pool: Pool,
        vads: Arc<dyn VadFactory>,
        out: BlockingWriter<UnixStream>,
    ) -> Self {
        let models = config.models.iter().map(|file| (file.name.clone(), shelve(&config, file))).collect();
        Self {
            config,
            pool,
            vads,
            out,
            sessions: HashMap::new(),
            models,
            totals: Totals::default(),
            told: (Totals::default(), 0, false),
        }
    }

    pub(super) fn say(&mut self, message: &FromEngine) -> Said {
        self.out.send(message)
    }

    pub(super) fn say_models(&mut self) -> Said {
        let states = self.models.values().map(|m| ModelState {
            name: m.file.name.clone(),
            state: m.state,
            resident_mb: m.resident_mb,
            expected_mb: m.expected_mb,
        });
        let states = states.collect();
        self.say(&FromEngine::Models(states))
    }

    /// Whether something is being decoded or loaded, or waits for it.
    pub(super) fn working(&self) -> bool {
        !self.pool.all_idle()
            || self.sessions.values().any(|s| s.ready.is_some() || s.dirty)
            || self.models.values().any(|m| m.loading_since.is_some())
    }

    /// Told while there is work and it moves, and once when it begins or ends: a hung decode is silent.
    pub(super) fn progress(&mut self, now: Instant) -> Said {
        let working = self.working();
        let flags = self.sessions.values().flat_map(|s| s.decoding.iter().chain(&s.partial));
        let looks = flags.map(Cancel::looks).fold(0, u64::wrapping_add);
        let loads = self.models.values().any(|m| m.loading_since.is_some_and(|t| now - t < LONGEST_LOAD));
        let signs = (self.totals, looks, working);
        if signs == self.told && !(working && loads) {
            return Ok(());
        }
        self.told = signs;
        let Totals { decodes, audio_ms, busy_ms } = self.totals;
        self.say(&FromEngine::Progress { decodes, audio_ms, busy_ms, working })
    }

    pub(super) fn frame(&mut self, frame: ToEngine) -> Said {
        match frame {
            ToEngine::Configure(_) => tracing::warn!("configured twice, the first one stays"),
            ToEngine::Load { model } => {
                if let Err(why) = self.want(&model) {
                    tracing::warn!(%model, %why, "cannot load ahead");
                }
                return self.say_models();
            }
            ToEngine::Open { handle, options, start, background } => {
                return self.open(handle, &options, *start, background);
            }
            // Audio of a session that failed or was closed a moment ago.
            ToEngine::Entry(for_session) => {
                if let Some(session) = self.sessions.get_mut(&for_session.handle) {
                    session.stream.push(for_session.entry);
                    session.dirty = true;
                }
            }
            ToEngine::Close { handle } => self.forget(handle),
        }
        Ok(())
    }

    fn open(&mut self, handle: u64, options: &SessionOptions, start: StartPoint, background: bool) -> Said {
        let model = options.model.clone().unwrap_or_else(|| self.config.default_model.clone());
        let was = self.models.get(&model).map(|m| m.state);
        if let Err(error) = self.want(&model) {
            return self.fail(handle, &error);
        }
        let session = Session {
            stream: SessionStream::new(options, start, self.vads.create()),
            model: model.clone(),
            ready: None,
            decoding: None,
            partial: None,
            last_partial: Instant::now(),
            background,
            dirty: true,
        };
        self.sessions.insert(handle, session);
        if was == self.models.get(&model).map(|m| m.state) { Ok(()) } else { self.say_models() }
    }

    /// Has a model loaded, once at a time; one that failed is tried again.
    fn want(&mut self, name: &str) -> Result<(), EngineError> {
        let Some(shelved) = self.models.get_mut(name) else {
            let why = "not among the models of this worker".to_owned();
            return Err(EngineError::Model { name: name.to_owned(), why });
        };
        if shelved.model.is_some() || shelved.loading_since.is_some() {
            return Ok(());
        }
        if !self.pool.load(&shelved.file) {
            let why = "the loader does not answer".to_owned();
            return Err(EngineError::Model { name: name.to_owned(), why });
        }
        shelved.state = Residency::Loading;
        shelved.loading_since = Some(Instant::now());
        Ok(())
    }

    pub(super) fn loaded(&mut self, loaded: Loaded) -> Said {
        let Loaded { name, model, resident_mb, took } = loaded;
        let Some(shelved) = self.models.get_mut(&name) else {
            return Ok(());
        };
        shelved.loading_since = None;
        match model {
            Ok(model) => {
                tracing::info!(model = %name, resident_mb, took_ms = took.as_millis() as u64, "model loaded");
                (shelved.state, shelved.resident_mb, shelved.model) = (Residency::Loaded, resident_mb, Some(model));
                self.say_models()
            }
            Err(error) => {
                tracing::error!(model = %name, %error, "model not loaded");
                shelved.state = Residency::Failed;
                let waiting: Vec<u64> =
                    self.sessions.iter().filter(|(_, s)| s.model == name).map(|(handle, _)| *handle).collect();
                self.say_models()?;
                waiting.into_iter().try_for_each(|handle| self.fail(handle, &error))
            }
        }
    }

    /// Steps every session that has input, and keeps the threads busy meanwhile.
    pub(super) fn work(&mut self) -> Said {
        self.dispatch();
        let mut dirty: Vec<(bool, u64)> =
            self.sessions.iter().filter(|(_, s)| s.dirty).map(|(handle, s)| (s.background, *handle)).collect();
        dirty.sort_unstable();
        for (_, handle) in dirty {
            self.step(handle)?;
            self.dispatch();
        }
        Ok(())
    }

    fn step(&mut self, handle: u64) -> Said {
        loop {
            let Some(session) = self.sessions.get_mut(&handle) else {
                return Ok(());
            };
            session.dirty = false;
            match session.stream.step() {
                Ok(Step::Starved | Step::Ended) => break,
                Ok(Step::Draft(draft)) => self.say(&FromEngine::Final { handle, draft })?,
                Ok(Step::Final(window)) => {
                    // What it would say has just been overtaken.
                    session.partial.iter().for_each(Cancel::cancel);
                    session.ready = Some((window, Instant::now()));
                    break;
                }
                Err(error) => return self.fail(handle, &error),
            }
        }
        self.say_what_it_left(handle)
    }

    /// Notes about entries, and bytes that are no longer kept.
    fn say_what_it_left(&mut self, handle: u64) -> Said {
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        let (notes, bytes) = (session.stream.take_notes(), session.stream.take_consumed());
        for note in notes {
            self.say(&FromEngine::Note { handle, note })?;
        }
        if bytes > 0 { self.say(&FromEngine::Consumed { handle, bytes }) } else { Ok(()) }
    }

    /// Hands windows to idle threads: finals of live sessions, then the partial that has waited longest, then finals of
    /// recordings; one of those that has waited for long goes before partials, so that it is done at all.
    ///
    /// While a live session has input that nobody has looked at, its next window may be a moment away: recordings wait.
    fn dispatch(&mut self) {
        while self.pool.idle() {
            let unseen = self.sessions.values().any(|s| !s.background && s.dirty);
            let mut next =
                self.next_final(Turn::Live).or_else(|| self.next_final(Turn::Overdue)).or_else(|| self.next_partial());
            if next.is_none() && !unseen {
                next = self.next_final(Turn::Recordings);
            }
            let Some(job) = next else {
                return;
            };
            if let Err(job) = self.pool.decode(Box::new(job)) {
                self.take_back(*job);
                return;
            }
        }
    }

    /// The window of a final that has waited longest among those whose turn it is.
    fn next_final(&mut self, turn: Turn) -> Option<Job> {
        let live = self.sessions.values().any(|s| !s.background);
        let recordings = self.sessions.values().filter(|s| s.background && s.decoding.is_some()).count();
        // Beside live sessions recordings leave one thread free, where there is more than one.
        let most = if live { self.config.decode_states.saturating_sub(1).max(1) } else { usize::MAX };
        if turn != Turn::Live && recordings >= most {
            return None;
        }
        let waiting = self.sessions.iter_mut().filter_map(|(handle, session)| {
            let since = session.ready.as_ref()?.1;
            let model = self.models.get(&session.model)?.model.as_ref()?;
            let its_turn = match turn {
                Turn::Live => !session.background,
                Turn::Overdue => session.background && since.elapsed() >= OVERDUE,
                Turn::Recordings => session.background,
            };
            its_turn.then_some((since, *handle, model, session))
        });
        let (_, handle, model, session) = waiting.min_by_key(|(since, handle, ..)| (*since, *handle))?;
        let (window, ready_at) = session.ready.take()?;
        session.decoding = Some(window.cancel.clone());
        Some(Job { handle, model: model.clone(), window, ready_at })
    }

    fn next_partial(&mut self) -> Option<Job> {
        let due = self.sessions.iter_mut().filter_map(|(handle, session)| {
            let model = self.models.get(&session.model)?.model.as_ref()?;
            let due = session.partial.is_none() && session.ready.is_none() && session.stream.partial_due();
            due.then_some((session.last_partial, *handle, model, session))
        });
        let (_, handle, model, session) = due.min_by_key(|(last, handle, ..)| (*last, *handle))?;
        let mut window = session.stream.partial_window()?;
        let now = Instant::now();
        // Of its own, so that a final can overtake it without stopping the session.
        window.cancel = Cancel::default();
        session.partial = Some(window.cancel.clone());
        session.last_partial = now;
        Some(Job { handle, model: model.clone(), window, ready_at: now })
    }

    /// No thread took it after all.
    fn take_back(&mut self, job: Job) {
        let Some(session) = self.sessions.get_mut(&job.handle) else {
            return;
        };
        match job.window.purpose {
            Purpose::Final => {
                session.decoding = None;
                session.ready = Some((job.window, job.ready_at));
            }
            Purpose::Partial => {
                session.partial = None;
                session.stream.partial_failed();
            }
        }
    }

    pub(super) fn done(&mut self, done: Done) -> Said {
        self.pool.freed(done.thread);
        self.totals.decodes += 1;
        // Both or neither: time of a decode that was cancelled or failed would read as a slow device.
        if done.heard.is_ok() {
            self.totals.busy_ms += done.took.as_millis() as u64;
            self.totals.audio_ms += done.window.samples.len() as u64 / 16;
        }
        if done.state_mb > 0
            && let Some(shelved) = self.models.get_mut(&done.info.model)
        {
            shelved.resident_mb += done.state_mb;
            self.say_models()?;
        }
        match done.window.purpose {
            Purpose::Final => self.final_done(done),
            Purpose::Partial => self.partial_done(&done),
        }
    }

    fn final_done(&mut self, done: Done) -> Said {
        let handle = done.handle;
        // Closed meanwhile: its text is nobody's.
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        session.decoding = None;
        let (heard, guards) = match done.heard {
            Ok(judged) => (Ok(judged.hypothesis), judged.guards.into_iter().map(str::to_owned).collect()),
            Err(error) if ends_session(&error) => return self.fail(handle, &error),
            Err(error) => {
                tracing::error!(handle, %error, "window could not be decoded");
                (Err(error), Vec::new())
            }
        };
        let timings = Timings {
            queued_ms: done.queued.as_millis() as u64,
            decode_ms: done.took.as_millis() as u64,
            ..Timings::default()
        };
        let draft = session.stream.complete(heard, guards, &done.info, timings);
        session.dirty = true;
        if let Some(draft) = draft {
            self.say(&FromEngine::Final { handle, draft })?;
        }
        self.say_what_it_left(handle)
    }

    fn partial_done(&mut self, done: &Done) -> Said {
        let handle = done.handle;
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        session.partial = None;
        match &done.heard {
            Ok(judged) => {
                let to_sample = done.window.from_sample + done.window.samples.len() as u64;
                match session.stream.partial_heard(&judged.hypothesis, to_sample) {
                    Some(partial) => self.say(&FromEngine::Partial { handle, partial: Box::new(partial) }),
                    None => Ok(()),
                }
            }
            Err(error) => {
                session.stream.partial_failed();
                match error {
                    // What the model cannot do is told once for each final.
                    EngineError::Cancelled | EngineError::Unsupported(_) => Ok(()),
                    error if ends_session(error) => self.fail(handle, error),
                    error => {
                        tracing::warn!(handle, %error, "partial pass failed");
                        Ok(())
                    }
                }
            }
        }
    }

    /// Ends a session here and tells why; its bytes are free with that.
    fn fail(&mut self, handle: u64, error: &EngineError) -> Said {
        tracing::warn!(handle, %error, "session cannot go on here");
        self.forget(handle);
        let class: FailureClass = error.class();
        self.say(&FromEngine::Failed { handle, failure: Failure::new(class, error.to_string()) })
    }

    fn forget(&mut self, handle: u64) {
        if let Some(session) = self.sessions.remove(&handle) {
            session.cancel();
        }
    }

    pub(super) fn cancel_all(self) -> Pool {
        self.sessions.values().for_each(Session::cancel);
        self.pool
    }
}

impl Session {
    fn cancel(&self) {
        self.stream.cancel();
        self.decoding.iter().chain(&self.partial).for_each(Cancel::cancel);
    }
}

fn shelve(config: &EngineConfig, file: &ModelFile) -> Shelved {
    let (state, expected_mb) = match expected_mb(config, file) {
        Ok(mb) => (Residency::Available, mb),
        Err(error) => {
            tracing::warn!(model = %file.name, %error, "model file is not usable");
            (Residency::Failed, 0)
        }
    };
    Shelved { file: file.clone(), state, model: None, resident_mb: 0, expected_mb, loading_since: None }
}
