//! An engine child in a thread of this process, and its supervisor's side of the socket.

use std::{
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use voxfleet_schema::{audio::RawEntry, failure::Failure, fleet::Residency, session::SessionOptions};
use voxfleet_worker::{
    engine::{
        child::{ChildError, serve},
        vad::Energy,
    },
    ipc::{
        EngineConfig, EngineKind, EntryFor, FinalDraft, FromEngine, ModelFile, PartialDraft, SimulatedConfig,
        StartPoint, ToEngine,
        transport::{BlockingReader, BlockingWriter},
    },
};

use crate::support::{Remembering, finals, simulated};

/// Longer than anything here takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn simulated_config(simulated: SimulatedConfig) -> EngineConfig {
    let model = |name: &str| ModelFile { name: name.to_owned(), path: PathBuf::from("/nonexistent") };
    EngineConfig {
        engine: EngineKind::Simulated,
        models: vec![model("simulated"), model("other")],
        default_model: "simulated".to_owned(),
        silero_model: None,
        onnxruntime: None,
        decode_states: 2,
        decode_threads: 1,
        use_gpu: false,
        reserve_mb: 0,
        turns: None,
        diarize: Default::default(),
        ct2: Default::default(),
        simulated,
    }
}

pub(crate) fn instant() -> SimulatedConfig {
    SimulatedConfig { speed: 0.0, ..SimulatedConfig::default() }
}

/// What the engine says of a log when it is called directly.
pub(crate) fn directly(log: &[RawEntry]) -> Vec<FinalDraft> {
    finals(log, &mut Remembering::new(&simulated()), &Energy)
}

/// A child and its supervisor's side of the socket.
pub(crate) struct Child {
    writer: BlockingWriter<UnixStream>,
    inbox: Receiver<FromEngine>,
    socket: UnixStream,
    child: Option<JoinHandle<Result<(), ChildError>>>,
    /// All that came so far.
    pub(crate) seen: Vec<FromEngine>,
}

impl Child {
    pub(crate) fn start(config: EngineConfig) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        let child = std::thread::spawn(move || serve(theirs));
        Self { child: Some(child), ..Self::beyond(ours, config) }
    }

    /// One that is served by somebody else, and cannot be ended in order.
    pub(crate) fn beyond(ours: UnixStream, config: EngineConfig) -> Self {
        let mut reader = BlockingReader::new(ours.try_clone().expect("clone"));
        let (messages, inbox) = sync_channel(10_000);
        std::thread::spawn(move || {
            while let Ok(message) = reader.next::<FromEngine>() {
                if messages.send(message).is_err() {
                    return;
                }
            }
        });
        let writer = BlockingWriter::new(ours.try_clone().expect("clone"));
        let mut started = Self { writer, inbox, socket: ours, child: None, seen: Vec::new() };
        started.send(ToEngine::Configure(Box::new(config)));
        started
    }

    pub(crate) fn send(&mut self, frame: ToEngine) {
        self.writer.send(&frame).expect("send");
    }

    pub(crate) fn open(&mut self, handle: u64, options: SessionOptions) {
        self.open_as(handle, options, false);
    }

    pub(crate) fn open_as(&mut self, handle: u64, options: SessionOptions, background: bool) {
        self.open_at(handle, options, background, StartPoint::beginning());
    }

    pub(crate) fn open_at(&mut self, handle: u64, options: SessionOptions, background: bool, start: StartPoint) {
        let start = Box::new(start);
        self.send(ToEngine::Open {
            handle,
            options: Box::new(options),
            start,
            background,
            suspect: None,
            scout: false,
            hears: false,
        });
    }

    pub(crate) fn feed(&mut self, handle: u64, log: &[RawEntry]) {
        for entry in log {
            self.send(ToEngine::Entry(EntryFor { handle, entry: entry.clone() }));
        }
    }

    /// For one that may die of it.
    pub(crate) fn feed_while_it_lives(&mut self, handle: u64, log: &[RawEntry]) {
        for entry in log {
            let entry = ToEngine::Entry(EntryFor { handle, entry: entry.clone() });
            if self.writer.send(&entry).is_err() {
                return;
            }
        }
    }

    /// Entry by entry in turn, as live sessions are heard; the first log is that of session 0.
    pub(crate) fn feed_in_turn(&mut self, logs: &[Vec<RawEntry>]) {
        for at in 0..logs.iter().map(Vec::len).max().expect("logs") {
            for (handle, log) in (0..).zip(logs) {
                self.feed(handle, log.get(at..=at).unwrap_or_default());
            }
        }
    }

    /// Waits until what has come so far gives an answer.
    pub(crate) fn until<T>(&mut self, what: &str, mut answer: impl FnMut(&[FromEngine]) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = answer(&self.seen) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(message) => self.seen.push(message),
                Err(e) => panic!("no {what}: {e}; the last messages are {:?}", self.seen.iter().rev().take(5)),
            }
        }
    }

    /// Takes what it says until it has said nothing for a second.
    pub(crate) fn until_it_is_quiet(&mut self) {
        while let Ok(message) = self.inbox.recv_timeout(Duration::from_secs(1)) {
            self.seen.push(message);
        }
    }

    /// Takes all that it still says.
    pub(crate) fn until_it_is_gone(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(message) => self.seen.push(message),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(e) => panic!("it lives on: {e}"),
            }
        }
    }

    pub(crate) fn finals_of(&mut self, handle: u64) -> Vec<FinalDraft> {
        self.until("end final", |seen| {
            let all = finals_in(seen, handle);
            all.last().is_some_and(|f| f.end).then_some(all)
        })
    }

    pub(crate) fn failure_of(&mut self, handle: u64) -> Failure {
        self.until("failure", |seen| {
            seen.iter().find_map(|m| match m {
                FromEngine::Failed { handle: h, failure } if *h == handle => Some(failure.clone()),
                _ => None,
            })
        })
    }

    /// Closes the socket and waits for the child.
    pub(crate) fn end(mut self) -> Result<(), ChildError> {
        self.socket.shutdown(std::net::Shutdown::Both).expect("shutdown");
        self.child.take().expect("running").join().expect("no panic")
    }
}

pub(crate) fn finals_in(seen: &[FromEngine], handle: u64) -> Vec<FinalDraft> {
    let finals = seen.iter().filter_map(|m| match m {
        FromEngine::Final { handle: h, draft } if *h == handle => Some((**draft).clone()),
        _ => None,
    });
    finals.collect()
}

pub(crate) fn partials_in(seen: &[FromEngine], handle: u64) -> Vec<PartialDraft> {
    let partials = seen.iter().filter_map(|m| match m {
        FromEngine::Partial { handle: h, partial } if *h == handle => Some((**partial).clone()),
        _ => None,
    });
    partials.collect()
}

pub(crate) fn state_of(seen: &[FromEngine], model: &str) -> Option<(Residency, u64, u64)> {
    let of = |m: &FromEngine| match m {
        FromEngine::Models(models) => models.iter().find(|m| m.name == model).cloned(),
        _ => None,
    };
    seen.iter().rev().find_map(of).map(|m| (m.state, m.resident_mb, m.expected_mb))
}
