//! Turns with a neighbour on the same device, by `flock(2)` on a file that it takes too (`flock FILE COMMAND`).
//!
//! A decode begins only while the lock is ours. It stays ours while decodes follow each other, for `hold_ms` at most; then no
//! other is begun, and what is under way ends it. Before we ask again, `gap_ms` belong to whoever waits. A thread of its own
//! waits for the lock: the loop goes on hearing audio and answering its supervisor meanwhile, and says that it waits.
//!
//! A lock that cannot be taken ends the child: without one nothing is decoded.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, OFlags, flock},
    io::Errno,
};

use crate::ipc::TurnsConfig;

/// A wait that is worth a line in the log.
const LONG_WAIT: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
#[error("the neighbour's lock {} cannot be taken", path.display())]
pub struct LockError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl LockError {
    /// With what the system says, on one line.
    pub(super) fn in_full(&self) -> String {
        format!("{self}: {}", self.source)
    }
}

/// The lock, or why it cannot be had; and since when.
pub(super) struct Turn {
    lock: Result<File, LockError>,
    at: Instant,
}

/// Ours as long as this lives.
struct Ours(#[expect(dead_code, reason = "closing it gives the lock back")] File);

pub(super) struct Neighbour {
    turns: Turns,
    asks: SyncSender<()>,
    ours: Option<Ours>,
    asked_at: Instant,
}

impl Neighbour {
    /// The file must be there, or one that can be made.
    pub(super) fn start<E>(config: &TurnsConfig, events: &SyncSender<E>) -> Result<Self, LockError>
    where
        E: From<Turn> + Send + 'static,
    {
        let path = config.lock_file.clone();
        let failed = |source| LockError { path: config.lock_file.clone(), source };
        open(&path).map_err(failed)?;
        let (asks, queue) = sync_channel(1);
        let events = events.clone();
        let waiting = std::thread::Builder::new().name("neighbour-lock".to_owned());
        // It may wait in there for ever; the process's end is its end.
        waiting.spawn(move || wait_loop(&path, &queue, &events)).map_err(failed)?;
        let (hold, gap) = (Duration::from_millis(config.hold_ms), Duration::from_millis(config.gap_ms));
        let turns = Turns { hold, gap, state: State::Free };
        Ok(Self { turns, asks, ours: None, asked_at: Instant::now() })
    }

    /// Whether a decode may begin; `wanted`: there is one.
    pub(super) fn may_decode(&mut self, now: Instant, wanted: bool) -> bool {
        match self.turns.may_decode(now, wanted) {
            Answer::Yes => true,
            Answer::No => false,
            Answer::Ask => {
                self.asked_at = now;
                // One ask is under way at a time, so there is room; a thread that is gone has said why.
                let _ = self.asks.try_send(());
                false
            }
        }
    }

    /// Gives the lock back when it is time. `busy`: something is being decoded.
    pub(super) fn settle(&mut self, now: Instant, wanted: bool, busy: bool) {
        if self.turns.settle(now, wanted, busy) {
            self.ours = None;
        }
    }

    pub(super) fn begins(&mut self, turn: Turn) -> Result<(), LockError> {
        self.ours = Some(Ours(turn.lock?));
        self.turns.begin(turn.at);
        let waited = turn.at.saturating_duration_since(self.asked_at);
        if waited >= LONG_WAIT {
            tracing::info!(waited_ms = waited.as_millis() as u64, "the neighbour had the device, now it is our turn");
        }
        Ok(())
    }

    /// Somebody else has the device, or may have it.
    pub(super) fn waits(&self) -> bool {
        matches!(self.turns.state, State::Asked | State::Gap { .. })
    }

    /// For how long somebody else has had it since we asked.
    pub(super) fn waited(&self, now: Instant) -> Duration {
        match self.turns.state {
            State::Asked => now.saturating_duration_since(self.asked_at),
            State::Free | State::Ours { .. } | State::Gap { .. } => Duration::ZERO,
        }
    }

    /// When there is something to decide although nothing happens.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        match self.turns.state {
            State::Gap { until } => Some(until),
            State::Free | State::Asked | State::Ours { .. } => None,
        }
    }
}

/// Whose turn it is. Pure; time is an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing is to be decoded.
    Free,
    Asked,
    Ours {
        since: Instant,
    },
    /// Given back a moment ago.
    Gap {
        until: Instant,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Yes,
    No,
    /// Not yet, and now is the time to ask for it.
    Ask,
}

#[derive(Debug)]
struct Turns {
    hold: Duration,
    gap: Duration,
    state: State,
}

impl Turns {
    fn may_decode(&mut self, now: Instant, wanted: bool) -> Answer {
        self.end_gap(now);
        match self.state {
            State::Free if wanted => {
                self.state = State::Asked;
                Answer::Ask
            }
            State::Ours { since } if now < since + self.hold => Answer::Yes,
            State::Free | State::Asked | State::Ours { .. } | State::Gap { .. } => Answer::No,
        }
    }

    fn begin(&mut self, at: Instant) {
        self.state = State::Ours { since: at };
    }

    /// Whether the lock is to be given back.
    fn settle(&mut self, now: Instant, wanted: bool, busy: bool) -> bool {
        self.end_gap(now);
        let over = match self.state {
            State::Ours { since } => !busy && (!wanted || now >= since + self.hold),
            State::Free | State::Asked | State::Gap { .. } => false,
        };
        if over {
            self.state = State::Gap { until: now + self.gap };
        }
        over
    }

    fn end_gap(&mut self, now: Instant) {
        if let State::Gap { until } = self.state
            && now >= until
        {
            self.state = State::Free;
        }
    }
}

fn wait_loop<E: From<Turn>>(path: &Path, asks: &Receiver<()>, events: &SyncSender<E>) {
    while asks.recv().is_ok() {
        let lock = take(path).map_err(|source| LockError { path: path.to_owned(), source });
        let failed = lock.is_err();
        let turn = Turn { lock, at: Instant::now() };
        if events.send(turn.into()).is_err() || failed {
            return;
        }
    }
}

/// Waits for the lock on the file that has this name when it is ours: one that was replaced meanwhile keeps nobody out.
fn take(path: &Path) -> io::Result<File> {
    loop {
        let file = open(path)?;
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let ours = file.metadata()?;
        match std::fs::metadata(path) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => return Ok(file),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// Made where it is not there, as flock(1) does, and readable for a neighbour that runs as somebody else.
fn open(path: &Path) -> io::Result<File> {
    let as_it_is = OpenOptions::new().read(true).custom_flags(OFlags::NOCTTY.bits() as i32).open(path);
    match as_it_is {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            OpenOptions::new().read(true).append(true).create(true).mode(0o666).open(path)
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns() -> (Turns, impl Fn(u64) -> Instant) {
        let begin = Instant::now();
        let turns = Turns { hold: Duration::from_millis(500), gap: Duration::from_millis(100), state: State::Free };
        (turns, move |ms| begin + Duration::from_millis(ms))
    }

    #[test]
    fn it_is_held_while_decodes_follow_each_other_and_given_back_within_the_bound() {
        let (mut turns, at) = turns();
        assert_eq!(turns.may_decode(at(0), false), Answer::No, "nobody asks for nothing");
        assert_eq!(turns.may_decode(at(0), true), Answer::Ask);
        assert_eq!(turns.may_decode(at(10), true), Answer::No, "asked once");
        assert!(!turns.settle(at(10), true, false));
        turns.begin(at(20));
        assert_eq!(turns.may_decode(at(30), true), Answer::Yes);
        assert!(!turns.settle(at(400), true, true), "decodes follow each other");
        assert!(!turns.settle(at(400), true, false));
        assert_eq!(turns.may_decode(at(519), true), Answer::Yes);
        assert_eq!(turns.may_decode(at(520), true), Answer::No, "no other is begun");
        assert!(!turns.settle(at(700), true, true), "the one under way ends first");
        assert!(turns.settle(at(800), true, false));
        assert_eq!(turns.may_decode(at(899), true), Answer::No, "time for whoever waits");
        assert_eq!(turns.may_decode(at(900), true), Answer::Ask);
    }

    #[test]
    fn it_is_given_back_when_there_is_nothing_to_decode() {
        let (mut turns, at) = turns();
        turns.may_decode(at(0), true);
        turns.begin(at(0));
        assert!(!turns.settle(at(1), false, true));
        assert!(turns.settle(at(2), false, false));
        assert!(!turns.settle(at(3), false, false), "once");
        assert!(!turns.settle(at(102), false, false));
        assert_eq!(turns.state, State::Free);
        // What came meanwhile asks at once.
        assert_eq!(turns.may_decode(at(103), true), Answer::Ask);
    }

    #[test]
    fn only_the_file_of_that_name_keeps_others_out() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("gpu.lock");
        let ours = take(&path).expect("made and taken");
        let theirs = open(&path).expect("open");
        let taken = |file: &File| flock(file, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(taken(&theirs), Err(Errno::WOULDBLOCK));
        // Somebody replaces it while we wait: the new one counts.
        let (sender, receiver) = sync_channel(1);
        std::thread::scope(|scope| {
            scope.spawn(|| sender.send(take(&path).expect("taken")));
            std::fs::remove_file(&path).expect("removed");
            drop(ours);
            let again = receiver.recv_timeout(Duration::from_secs(10)).expect("in time");
            assert_eq!(taken(&open(&path).expect("open")), Err(Errno::WOULDBLOCK));
            drop(again);
            taken(&open(&path).expect("open")).expect("free");
        });
        std::fs::remove_file(&path).expect("removed");
        std::fs::create_dir(&path).expect("folder");
        let nowhere = open(&folder.path().join("none/gpu.lock")).expect_err("no folder");
        assert_eq!(nowhere.kind(), io::ErrorKind::NotFound);
    }
}
