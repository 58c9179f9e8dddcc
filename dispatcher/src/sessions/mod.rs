//! The book: every session the dispatcher knows, in memory. One task owns it, so there are no locks.
//!
//! A [`Session`] mirrors its key in `asr_sessions`; nothing here is the only copy of anything.

mod entry;

use std::{collections::HashMap, time::Duration};

use voxfleet_schema::{
    device::Instead,
    failure::Failure,
    fleet::EngineName,
    id::{StreamId, WorkerName},
    session::{SessionOptions, SessionRecord, SessionState},
    trace::TraceContext,
    transcript::{Final, VadKind},
};

pub use entry::EntryNote;

use crate::{
    core::spans::Opening,
    idle::Idle,
    kept::KeptEngine,
    open::{ContainerSeen, Opener, Walker},
};

/// Names an API request that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId(pub u64);

/// What of the last final decides about the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainMark {
    pub index: u64,
    pub epoch: u64,
    pub to_seq: u64,
    pub end: bool,
    pub vad: VadKind,
    pub engine: Option<EngineName>,
}

impl From<&Final> for ChainMark {
    fn from(f: &Final) -> Self {
        let engine = EngineName::of(&f.engine);
        Self { index: f.index, epoch: f.epoch, to_seq: f.audio.to_seq, end: f.end, vad: f.vad, engine }
    }
}

/// An API request about a session whose key is being read.
#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    Open(Box<SessionOptions>, Option<TraceContext>),
    Status,
    Close,
}

/// A session whose key and last final are being read.
#[derive(Debug, Default)]
pub struct Loading {
    /// The first good audio that came meanwhile.
    pub opener: Option<Opener>,
    pub last: Option<u64>,
    pub last_audio: Option<u64>,
    /// A flush or end came and nothing to open a session before it.
    pub bare_mark: Option<u64>,
    pub asks: Vec<(CallId, Asked)>,
    /// The read failed: again at this time.
    pub retry_at: Option<Duration>,
}

/// What is under way for a session's record.
#[derive(Debug)]
pub enum Stage {
    Settled,
    /// This record is being written.
    Saving(Box<SessionRecord>),
    /// Its worker is being asked to take it.
    Asking,
    /// The key is being read again, because a write was lost or its outcome is unknown: what was to be written.
    Reading(Box<SessionRecord>),
    /// The log behind its end final is being read.
    Walking,
}

#[derive(Debug)]
pub struct Session {
    pub record: SessionRecord,
    /// Of the key; none while there is no key.
    pub revision: Option<u64>,
    pub stage: Stage,
    /// Monotonic time at which the stage began.
    pub since: Duration,
    /// Last log entry read, or found at a takeover.
    pub last: Option<u64>,
    pub last_audio: Option<u64>,
    /// Last entry this process's own tail has read: the next hint names it.
    pub prev: Option<u64>,
    pub chain: Option<ChainMark>,
    /// Of its finals, the earlier ones too.
    pub kept: KeptEngine,
    pub idle: Idle,
    /// Where the dispatcher's own end stands, while no audio follows it.
    pub own_end: Option<u64>,
    /// Its worker did not answer while the dispatcher's own link was in doubt: it is asked again then.
    pub ask_again: Option<Duration>,
    /// Workers that refused it, and the number of the heartbeat they had sent then.
    pub refused: Vec<(WorkerName, u64)>,
    /// Whose slot it is counted against.
    pub charged: Option<WorkerName>,
    /// Had a worker before.
    pub displaced_from: Option<WorkerName>,
    /// Monotonic time in ms since when it waits; below 0 if it did so before this dispatcher came.
    pub waiting_since_ms: i64,
    pub why_waiting: Option<Failure>,
    /// Every GPU's reason of the last decision, for the event.
    pub reasons: serde_json::Value,
    /// Highest epoch whose assignment has been told.
    pub told_epoch: u64,
    /// Opens that wait for a worker.
    pub opens: Vec<CallId>,
    /// Requests that came while it was ending; they are looked at again when that is done.
    pub later: Vec<(CallId, Asked)>,
    /// What the log behind the end final has shown so far.
    pub walker: Option<Box<Walker>>,
    /// [`Self::last`] when the walk under way began.
    pub last_before_walk: Option<u64>,
    /// What its worker was given in place of what was asked for, from the moment it was chosen.
    pub instead: Option<Instead>,
    /// What of that was told last.
    pub told_instead: Option<Instead>,
    /// It leaves a worker that fell back and told of that itself: what it had there, until another worker has it.
    pub left: Option<Instead>,
    /// There is room for what was asked for, since then.
    pub better_since: Option<Duration>,
    /// This process chose its worker or asked it: which model it needs there is known.
    pub planned: bool,
    /// Monotonic time since when no worker has had it; not started over by workers that refuse.
    pub unplaced_since: Option<Duration>,
    /// It was told that its audio expires.
    pub told_failed: bool,
    /// When its chain was last tried to be closed because nothing of it is left in the log.
    pub closing_since: Option<Duration>,
    /// Its opening has not been told to those who follow its trace.
    pub opening: Option<Opening>,
}

impl Session {
    pub fn new(record: SessionRecord, revision: Option<u64>, now: Duration, idle_now: Duration) -> Self {
        Self {
            kept: KeptEngine::of_key(record.engine.as_deref()),
            record,
            revision,
            stage: Stage::Settled,
            since: now,
            last: None,
            last_audio: None,
            prev: None,
            chain: None,
            idle: Idle::new(idle_now),
            own_end: None,
            ask_again: None,
            refused: Vec::new(),
            charged: None,
            displaced_from: None,
            waiting_since_ms: now.as_millis() as i64,
            why_waiting: None,
            reasons: serde_json::Value::Null,
            told_epoch: 0,
            opens: Vec::new(),
            later: Vec::new(),
            walker: None,
            last_before_walk: None,
            instead: None,
            told_instead: None,
            left: None,
            better_since: None,
            planned: false,
            unplaced_since: None,
            told_failed: false,
            closing_since: None,
            opening: None,
        }
    }

    pub fn settled(&self) -> bool {
        matches!(self.stage, Stage::Settled)
    }

    pub fn enter(&mut self, stage: Stage, now: Duration) {
        self.stage = stage;
        self.since = now;
    }

    /// Nobody has it from now on, unless that was so before.
    pub fn waits_from(&mut self, now: Duration) {
        if self.unplaced_since.is_none() {
            self.unplaced_since = Some(now);
            self.waiting_since_ms = now.as_millis() as i64;
        }
    }

    pub fn state(&self) -> SessionState {
        self.record.state
    }

    /// The session has ended, or is about to be written as ended.
    pub fn ending(&self) -> bool {
        match &self.stage {
            Stage::Saving(next) | Stage::Reading(next) => next.state == SessionState::Ended,
            _ => self.record.state == SessionState::Ended,
        }
    }

    /// An end final stands that this session has not gone past. `ended_seq` of an open record is the end it was reopened
    /// behind.
    pub fn end_stands(&self) -> bool {
        self.chain.is_some_and(|c| c.end && self.record.ended_seq.is_none_or(|past| c.to_seq > past))
    }

    /// No entry is known that lies above `to_seq` and that the walk from there has not read.
    pub fn read_to_the_last(&self, to_seq: u64) -> bool {
        let walked = self.walker.as_ref().filter(|w| w.to_seq() == to_seq).map(|w| w.next_seq());
        self.last.is_none_or(|last| last <= to_seq || walked.is_some_and(|next| last < next))
    }

    /// The VAD kind it keeps: that of its finals, unless none of them heard anything.
    pub fn vad(&self) -> Option<VadKind> {
        self.chain.map(|c| c.vad).filter(|vad| *vad != VadKind::Unknown)
    }

    /// A later final of it.
    pub fn saw(&mut self, mark: ChainMark) {
        self.kept.named(mark.engine);
        self.chain = Some(mark);
    }

    /// The engine it keeps: that of its finals, where it said that nothing may differ.
    pub fn engine(&self) -> Option<EngineName> {
        self.kept.under(self.record.options.policy)
    }

    /// Its key is to say which engine it keeps. One that waits has that written with its next assignment.
    pub fn engine_is_due(&self, now: Duration) -> bool {
        let settled = self.settled() && self.record.state == SessionState::Assigned;
        settled && self.kept.is_due(self.record.options.policy, self.record.engine.as_deref(), now)
    }

    /// The model its worker needs for it; none: the worker's default.
    pub fn needs_model(&self) -> Option<&String> {
        let stand_in = self.instead.as_ref().and_then(|instead| instead.model.as_ref());
        stand_in.or(self.record.options.model.as_ref())
    }

    /// Epoch of its next assignment: above its last and above the last final's.
    pub fn next_epoch(&self) -> u64 {
        self.record.epoch.max(self.chain.map_or(0, |c| c.epoch)) + 1
    }
}

#[derive(Debug)]
pub enum Known {
    Loading(Loading),
    Session(Box<Session>),
    /// No session: what came before looked like the start of a container.
    Container {
        seen: ContainerSeen,
        at: Duration,
    },
}

/// All of them.
#[derive(Debug, Default)]
pub struct Book {
    known: HashMap<StreamId, Known>,
    /// Entries that may open a session which is not open in the KV yet: the saved cursor stays below them.
    holds: HashMap<StreamId, u64>,
    /// Highest entry read by the tail.
    read: u64,
    /// First entry that would have opened a session for which there was no place: the tail goes back to it.
    passed: Option<u64>,
}

impl Book {
    pub fn get(&self, id: &StreamId) -> Option<&Known> {
        self.known.get(id)
    }

    pub fn get_mut(&mut self, id: &StreamId) -> Option<&mut Known> {
        self.known.get_mut(id)
    }

    pub fn insert(&mut self, id: StreamId, known: Known) {
        self.known.insert(id, known);
    }

    pub fn remove(&mut self, id: &StreamId) -> Option<Known> {
        self.known.remove(id)
    }

    pub fn session(&self, id: &StreamId) -> Option<&Session> {
        match self.known.get(id) {
            Some(Known::Session(session)) => Some(session),
            _ => None,
        }
    }

    pub fn session_mut(&mut self, id: &StreamId) -> Option<&mut Session> {
        match self.known.get_mut(id) {
            Some(Known::Session(session)) => Some(session),
            _ => None,
        }
    }

    pub fn sessions(&self) -> impl Iterator<Item = (&StreamId, &Session)> {
        self.known.iter().filter_map(|(id, known)| match known {
            Known::Session(session) => Some((id, session.as_ref())),
            _ => None,
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = (&StreamId, &Known)> {
        self.known.iter()
    }

    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    pub fn has_passed(&self) -> bool {
        self.passed.is_some()
    }

    /// Leaves an entry in the log for later; true if it is the first.
    pub fn pass_over(&mut self, seq: u64) -> bool {
        let first = self.passed.is_none();
        self.passed = Some(self.passed.map_or(seq, |at| at.min(seq)));
        first
    }

    /// Where the tail reads on once there is room; what lies above counts as not read.
    pub fn go_back(&mut self) -> Option<u64> {
        let from = self.passed.take()?;
        self.read = self.read.min(from.saturating_sub(1));
        Some(from)
    }

    /// Notes how far the tail has read.
    pub fn read_to(&mut self, seq: u64) {
        self.read = self.read.max(seq);
    }

    /// Keeps the cursor below `seq` until [`Self::let_pass`].
    pub fn hold(&mut self, id: &StreamId, seq: u64) {
        let at = self.holds.entry(id.clone()).or_insert(seq);
        *at = (*at).min(seq);
    }

    pub fn let_pass(&mut self, id: &StreamId) {
        self.holds.remove(id);
    }

    /// The last entry a successor need not read again.
    pub fn cursor(&self) -> u64 {
        self.holds.values().chain(&self.passed).min().map_or(self.read, |first| self.read.min(first.saturating_sub(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{end_final, id, session};
    use voxfleet_schema::session::Policy;

    #[test]
    fn a_final_that_names_no_engine_leaves_the_one_that_is_kept() {
        let mut record = session("s");
        record.options.policy = Policy::ExactModel;
        let mut session = Session::new(record, Some(1), Duration::ZERO, Duration::ZERO);
        for (index, named, kept) in [
            (0, "none", None),
            (1, "whisper_cpp", Some(EngineName::WhisperCpp)),
            (2, "none", Some(EngineName::WhisperCpp)),
            (3, "ct2", Some(EngineName::Ct2)),
            (4, "of_tomorrow", Some(EngineName::Ct2)),
        ] {
            let last = Final { engine: named.to_owned(), ..end_final("s", index, 1, index + 1) };
            session.saw(ChainMark::from(&last));
            assert_eq!((session.engine(), session.chain), (kept, Some(ChainMark::from(&last))), "{named}");
        }
        session.record.options.policy = Policy::AllowCpu;
        assert_eq!(session.engine(), None);
    }

    #[test]
    fn the_cursor_stays_below_what_is_not_in_the_bucket_yet() {
        let mut book = Book::default();
        assert_eq!(book.cursor(), 0);
        book.read_to(10);
        book.hold(&id("a"), 8);
        book.hold(&id("b"), 9);
        book.hold(&id("a"), 10);
        assert_eq!(book.cursor(), 7);
        book.let_pass(&id("a"));
        assert_eq!(book.cursor(), 8);
        book.let_pass(&id("b"));
        book.let_pass(&id("b"));
        assert_eq!(book.cursor(), 10);
    }
}
