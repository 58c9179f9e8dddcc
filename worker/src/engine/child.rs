//! The engine child: owns device, models and decode states, and speaks to its supervisor over a socketpair.
//!
//! One loop owns all session streams and steps them (VAD and resampling run on it); a reader thread hands it frames through
//! a bounded channel, so a full engine pushes back on the socket; the [`Pool`]'s threads decode. Finals go before
//! partials, the oldest ready window first; partials only where a thread is idle. The loop ends when the supervisor
//! closes the socket or dies.

mod again;
mod desk;
mod neighbour;
mod pace;
mod scout;
mod shelf;
mod signs;
mod turns;
mod unseen;

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use rustix::process::getppid;
use voxfleet_schema::transcript::{SpeakersBy, VadKind};

use self::{
    desk::Desk,
    neighbour::{LockError, Neighbour, Turn},
};
use super::{
    diarize::{self, HeardLate, Listener},
    last_words::{self, LastWords, leave},
    pool::{Done, Loaded, Pool},
    simulated::{self, PoisonedVads, card},
    vad::{self, VadFactory},
    whisper,
};
use crate::ipc::{
    EngineConfig, EngineKind, FromEngine, ToEngine,
    transport::{BlockingReader, BlockingWriter, TransportError},
};

/// How often progress is told while there is work.
const TICK: Duration = Duration::from_millis(200);
/// How often an idle child looks whether its parent still lives.
const IDLE_TICK: Duration = Duration::from_secs(1);
/// Frames between reader and loop. Audio in them is paid for by the supervisor's permits.
const FRAMES: usize = 64;
/// Events taken before sessions are stepped again: a backlog is not worked through in single chunks.
const EVENTS_AT_ONCE: usize = 256;
/// For decodes under way when the child ends; they look at their cancel flags every few milliseconds.
const END_GRACE: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    #[error("connection to the supervisor failed")]
    Transport(#[from] TransportError),
    #[error("the supervisor's first frame is not a configuration")]
    NotConfigured,
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("file descriptor {0} is not a socket of ours")]
    Fd(RawFd),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("the supervisor is gone")]
    Orphaned,
}

/// What the loop waits for.
enum Event {
    Frame(Box<ToEngine>),
    /// The connection is over, in order or not.
    Over(TransportError),
    Done(Box<Done>),
    Loaded(Box<Loaded>),
    /// Who spoke in a window whose words have gone out.
    HeardLate(Box<HeardLate>),
    /// The lock shared with a neighbour is ours, or cannot be had.
    Turn(Box<Turn>),
}

impl From<Done> for Event {
    fn from(done: Done) -> Self {
        Event::Done(Box::new(done))
    }
}

impl From<HeardLate> for Event {
    fn from(late: HeardLate) -> Self {
        Event::HeardLate(Box::new(late))
    }
}

impl From<Turn> for Event {
    fn from(turn: Turn) -> Self {
        Event::Turn(Box::new(turn))
    }
}

impl From<Loaded> for Event {
    fn from(loaded: Loaded) -> Self {
        Event::Loaded(Box::new(loaded))
    }
}

/// Runs the child on an inherited socket until the supervisor closes it.
pub fn main(fd: RawFd) -> Result<(), ChildError> {
    if fd <= 2 {
        return Err(ChildError::Fd(fd));
    }
    // SAFETY: the supervisor passes this descriptor to us and to nobody else in this process; closed ones show below.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    socket.set_nonblocking(false).map_err(|_| ChildError::Fd(fd))?;
    match serve(socket) {
        // No input has to do with it, and the supervisor is to know that.
        Err(ChildError::Lock(error)) => leave(LastWords::NoLock, &error.in_full()),
        ended => ended,
    }
}

/// Serves one supervisor. Also usable inside a test, with the other end of a socketpair.
pub fn serve(socket: UnixStream) -> Result<(), ChildError> {
    let parent = getppid();
    let own = |socket: &UnixStream| socket.try_clone().map_err(TransportError::Io);
    let mut reader = BlockingReader::new(own(&socket)?);
    let config = match reader.next::<ToEngine>() {
        Ok(ToEngine::Configure(config)) => *config,
        Ok(_) => return Err(ChildError::NotConfigured),
        Err(TransportError::Closed) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if config.simulated.card.is_some() {
        card::speaks_through(own(&socket)?);
    }
    let writer = BlockingWriter::new(own(&socket)?);
    let (events, inbox) = sync_channel(FRAMES);
    let pool = Pool::start(&config, &events).map_err(ChildError::Thread)?;
    let neighbour = config.turns.as_ref().map(|turns| Neighbour::start(turns, &events)).transpose()?;
    if config.engine.is_real() {
        last_words::listen();
        if config.use_gpu {
            claim_gpu();
            whisper::leave_free(config.reserve_mb);
        }
    }
    let (vads, mut notes) = prepare(&config);
    let (speakers, why) = speakers(&config, vads.kind());
    notes.extend(why);
    let ready = FromEngine::Ready {
        vad: vads.kind(),
        speakers,
        device: match config.engine {
            EngineKind::WhisperCpp | EngineKind::Ct2 | EngineKind::Auto => whisper::device(config.use_gpu),
            EngineKind::Simulated => simulated::device(config.use_gpu).to_owned(),
        },
        engine: config.engine.as_str().to_owned(),
        notes,
    };
    std::thread::Builder::new()
        .name("frames-in".to_owned())
        .spawn(move || read_frames(reader, &events))
        .map_err(ChildError::Thread)?;
    let mut desk = Desk::new(config, pool, vads, writer, neighbour);
    let ended = desk.say(&ready).and_then(|()| desk.say_models()).map_err(ChildError::from);
    let ended = ended.and_then(|()| run(&mut desk, &inbox, parent));
    end(desk, &inbox);
    // A thread still waits for frames with the socket in hand: without this a supervisor would see our end only with the
    // process's. A supervisor that closed first has nothing left to shut down.
    let _ = socket.shutdown(Shutdown::Both);
    match ended {
        // The supervisor may close while we write: that is its way of saying goodbye.
        Err(ChildError::Transport(TransportError::Closed)) => Ok(()),
        ended => ended,
    }
}

/// A GPU that was asked for and is not there ends the process: whoever allows the CPU gets it from one that says so.
fn claim_gpu() {
    if whisper::device(true) != "cpu" {
        return;
    }
    let (words, lines) = last_words::heard();
    match (cfg!(feature = "cuda"), words) {
        (false, _) => leave(LastWords::MissingLibrary, "a GPU was asked for, and this build has no CUDA"),
        (true, Some(words)) => leave(words, &lines),
        (true, None) => leave(LastWords::DeviceLost, "a GPU was asked for, and CUDA shows none"),
    }
}

fn prepare(config: &EngineConfig) -> (Arc<dyn VadFactory>, Vec<String>) {
    let (mut vads, note) = vad::best_available(config.silero_model.as_deref(), config.onnxruntime.as_deref());
    if config.engine == EngineKind::Simulated
        && let Some(poison) = config.simulated.poison_vad
    {
        vads = Arc::new(PoisonedVads { inner: vads, poison });
    }
    let notes: Vec<String> = note.into_iter().collect();
    for note in &notes {
        tracing::warn!(%note, "engine runs differently from its configuration");
    }
    (vads, notes)
}

/// How speakers are told apart here. Nothing is opened before somebody asks for them, unless there is reason to doubt that it
/// can be.
fn speakers(config: &EngineConfig, vad: VadKind) -> (SpeakersBy, Option<String>) {
    let library = config.onnxruntime.as_deref();
    let doubtful = config.silero_model.is_some() && vad != VadKind::Silero;
    match doubtful.then(|| Listener::open(&config.diarize, library)) {
        Some(Err(why)) => (SpeakersBy::None, Some(format!("no speakers: {why}"))),
        _ => diarize::expected(&config.diarize, library),
    }
}

fn read_frames(mut reader: BlockingReader<UnixStream>, events: &SyncSender<Event>) {
    loop {
        let event = match reader.next::<ToEngine>() {
            Ok(frame) => Event::Frame(Box::new(frame)),
            Err(error) => Event::Over(error),
        };
        let over = matches!(event, Event::Over(_));
        // Nobody listening any more is an end like any other.
        if events.send(event).is_err() || over {
            return;
        }
    }
}

fn run(desk: &mut Desk, inbox: &Receiver<Event>, parent: Option<rustix::process::Pid>) -> Result<(), ChildError> {
    let mut next_tick = Instant::now();
    loop {
        let now = Instant::now();
        if now >= next_tick {
            if getppid() != parent {
                return Err(ChildError::Orphaned);
            }
            desk.progress(now)?;
            next_tick = now + if desk.working() { TICK } else { IDLE_TICK };
        }
        let wake = desk.wakes_at().map_or(next_tick, |at| at.min(next_tick));
        let first = match inbox.recv_timeout(wake.saturating_duration_since(now)) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => {
                if desk.wakes_at().is_some_and(|at| at <= Instant::now()) {
                    desk.work()?;
                }
                continue;
            }
            // The reader ends with an event of its own and the pool holds senders too.
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        let was_working = desk.working();
        for event in std::iter::once(first).chain(inbox.try_iter().take(EVENTS_AT_ONCE)) {
            match event {
                Event::Frame(frame) => desk.frame(*frame)?,
                Event::Over(TransportError::Closed) => return Ok(()),
                Event::Over(error) => return Err(error.into()),
                Event::Done(done) => desk.done(*done)?,
                Event::Loaded(loaded) => desk.loaded(*loaded)?,
                Event::HeardLate(late) => desk.heard_late(*late)?,
                Event::Turn(turn) => desk.turn_begins(*turn)?,
            }
        }
        desk.work()?;
        if desk.working() != was_working {
            // The supervisor's watch over a decode begins with its start and ends with its end.
            next_tick = Instant::now();
        }
    }
}

/// Cancels what is under way and gives it a moment; the process's end takes care of the rest.
fn end(desk: Desk, inbox: &Receiver<Event>) {
    let mut pool = desk.cancel_all();
    let until = Instant::now() + END_GRACE;
    while !pool.all_idle() {
        match inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Event::Done(done)) => pool.freed(done.thread),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    if !pool.end() {
        tracing::warn!("a decode did not end when it was cancelled");
    }
}
