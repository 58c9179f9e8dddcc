//! The decisions of an active dispatcher as one state machine: inputs come in with their time, effects come out. It does
//! no IO and reads no clock, so every order of events can be tried in a test.
//!
//! | module | inputs |
//! |---|---|
//! | [`entries`] | what the tail reads: first chunks, audio, audio behind an end |
//! | [`placing`] | choosing a worker, writing the record, asking the worker |
//! | [`endings`] | finals, ends, what stands in the log behind them |
//! | [`requests`] | the API |
//! | [`jobs`] | file jobs: the same again for recordings |
//! | [`expiry`] | audio that leaves the log before anybody had room, streams that fill up |
//! | [`upkeep`] | heartbeats, verdicts, idle times, reconciliation |

mod endings;
mod entries;
mod expiry;
pub mod jobs;
mod placing;
mod requests;
#[cfg(test)]
mod tests;
mod upkeep;

use std::collections::HashSet;

use voxfleet_nats::Subjects;
use voxfleet_schema::{
    audio::RawEntry,
    event::{Event, Scope, What},
    failure::Failure,
    fleet::{Assignment, FleetStatus, Heartbeat},
    id::{Kind, StreamId, WorkerName},
    job::{JobList, JobStatus, Submitted},
    session::{Closed, Opened, SessionRecord, SessionState, SessionStatus},
    transcript::Final,
};

use crate::{
    config::DispatcherConfig,
    fleet::Fleet,
    moment::{Moment, StreamClock},
    open::{Opener, Rejected, Walker},
    sessions::{Book, CallId, ChainMark, Known, Session},
};

/// What the dispatcher writes into a session's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// No audio for a while.
    Pause,
    /// No audio for too long.
    Idle,
    /// Somebody asked for it.
    Close(CallId),
}

/// What is to be done. Each is answered by the input named beside it, whatever becomes of it.
#[derive(Debug)]
pub enum Effect {
    /// Read key, last final and last entry -> [`Core::loaded`].
    Load {
        id: StreamId,
    },
    /// Write the key, by revision (none: create it) -> [`Core::saved`].
    Save {
        id: StreamId,
        record: Box<SessionRecord>,
        revision: Option<u64>,
    },
    /// Give it to a worker -> [`Core::asked`].
    Ask {
        worker: WorkerName,
        assignment: Box<Assignment>,
    },
    /// -> [`Core::released`].
    Release {
        worker: WorkerName,
        id: StreamId,
        epoch: u64,
    },
    /// Write an entry, fenced where a sequence is given -> [`Core::appended`].
    Append {
        id: StreamId,
        mark: Mark,
        expect: Option<u64>,
    },
    /// Read the log behind the last final -> [`Core::walked`].
    Walk {
        id: StreamId,
        from: Option<Box<Walker>>,
    },
    /// Read the last final -> [`Core::chain_read`].
    ReadChain {
        id: StreamId,
    },
    /// Write the end final of a session whose log is empty -> [`Core::chain_read`].
    CloseChain {
        id: StreamId,
        epoch: u64,
        to_seq: u64,
    },
    /// Let the tail read again from here: there is room for who was passed over.
    GoBack {
        from: u64,
    },
    /// Never answered: a lost hint costs latency only.
    Hint {
        worker: WorkerName,
        id: StreamId,
        entry: RawEntry,
        prev: Option<u64>,
    },
    /// Never answered; `once`: stored once even if two say it.
    Tell {
        event: Box<Event>,
        once: bool,
    },
    Answer {
        call: CallId,
        answer: Box<Answer>,
    },
    /// First heartbeat: look for a verdict, make its consumers -> [`Core::admitted`].
    Admit {
        heartbeat: Box<Heartbeat>,
    },
    /// Tell a dead incarnation to take a new name.
    Renew {
        worker: WorkerName,
    },
    /// Write the verdict -> [`Core::buried`].
    Bury {
        heartbeat: Box<Heartbeat>,
    },
    /// Delete its consumers and what lies there for it.
    RemoveConsumers {
        worker: WorkerName,
    },
    /// -> [`Core::job`].
    Job(jobs::JobEffect),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Opened(Opened),
    Status(Box<SessionStatus>),
    Closed(Closed),
    Fleet(Box<FleetStatus>),
    Submitted(Submitted),
    Job(Box<JobStatus>),
    Jobs(Box<JobList>),
    Refused(Failure),
}

/// What [`Effect::Load`] found.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    pub record: Option<(SessionRecord, u64)>,
    pub chain: Option<ChainMark>,
    /// Sequence of the last entry in the log, and whether it is audio.
    pub last: Option<(u64, bool)>,
}

/// Why a write did not happen, or may not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SaveError {
    Conflict,
    /// Unknown: it may stand there.
    Failed(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AskReply {
    Taken,
    Refused(Failure),
    /// No answer: it may have taken it.
    Silent(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AppendError {
    /// Somebody spoke; where the log's last entry stands now.
    Conflict {
        last: Option<u64>,
    },
    Failed(String),
}

#[derive(Debug, Clone, PartialEq)]
pub struct WalkEnd {
    pub walker: Box<Walker>,
    pub opener: Option<Opener>,
    pub rejected: Vec<Rejected>,
    /// The session's last entry as the leader knows it, read after the walk found nothing more.
    pub last: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    Ready,
    /// A verdict stands in the bucket.
    Dead,
    Failed(String),
}

pub struct Core {
    config: DispatcherConfig,
    name: String,
    subjects: Subjects,
    fleet: Fleet,
    book: Book,
    clock: StreamClock,
    /// Settled sessions without a worker.
    waiting: HashSet<StreamId>,
    /// Something came free since the last look at them.
    place_due: bool,
    burying: HashSet<WorkerName>,
    /// Their consumers could not be made yet.
    readmit: HashSet<WorkerName>,
    effects: Vec<Effect>,
    expiry: expiry::Expiry,
    /// When the tail last went back.
    went_back: std::time::Duration,
    jobs: jobs::Jobs,
}

pub(crate) use expiry::closing_final;

impl Core {
    pub fn new(config: DispatcherConfig, name: String, subjects: Subjects) -> Self {
        Self {
            config,
            name,
            subjects,
            fleet: Fleet::default(),
            book: Book::default(),
            clock: StreamClock::default(),
            waiting: HashSet::new(),
            place_due: false,
            burying: HashSet::new(),
            readmit: HashSet::new(),
            effects: Vec::new(),
            expiry: expiry::Expiry::default(),
            went_back: std::time::Duration::ZERO,
            jobs: jobs::Jobs::default(),
        }
    }

    /// What the inputs since the last call have led to.
    pub fn effects(&mut self) -> std::vec::Drain<'_, Effect> {
        self.effects.drain(..)
    }

    /// The last entry a successor need not read again.
    pub fn cursor(&self) -> u64 {
        self.book.cursor()
    }

    /// Takes an open session over from its key, at the start.
    pub fn recover(&mut self, loaded: Loaded, now: Moment) {
        let Some((record, revision)) = loaded.record else {
            return;
        };
        if record.state == SessionState::Ended {
            return;
        }
        let id = record.id.clone();
        let session = self.adopt(record, Some(revision), loaded.chain, loaded.last, now);
        self.book.insert(id.clone(), Known::Session(Box::new(session)));
        self.charge_from_record(&id);
        self.check_end(&id, now);
    }

    /// A session as its key says, nothing under way.
    fn adopt(
        &mut self,
        record: SessionRecord,
        revision: Option<u64>,
        chain: Option<ChainMark>,
        last: Option<(u64, bool)>,
        now: Moment,
    ) -> Session {
        if record.state == SessionState::Waiting {
            self.waiting.insert(record.id.clone());
            self.place_due = true;
        }
        let mut session = Session::new(record, revision, now.mono, self.idle_now(now));
        session.unplaced_since = (session.state() == SessionState::Waiting).then_some(now.mono);
        session.chain = chain;
        if let Some((seq, audio)) = last {
            session.last = Some(seq);
            if audio {
                session.last_audio = Some(seq);
                session.idle.entry(crate::idle::Spoke::Audio { flushed: false }, self.idle_now(now));
            }
        }
        session
    }

    fn idle_now(&self, now: Moment) -> std::time::Duration {
        self.clock.now(now.mono, std::time::Duration::from_millis(self.config.tick_ms * 2))
    }

    fn effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    fn session_event(&mut self, id: &StreamId, what: What, now: Moment, with: impl FnOnce(&mut Event)) {
        let mut event = Event::new(Scope::Session, id.as_str(), what, now.unix_ms);
        with(&mut event);
        self.effect(Effect::Tell { event: Box::new(event), once: false });
    }

    fn fleet_event(&mut self, worker: &WorkerName, what: What, now: Moment, detail: serde_json::Value) {
        let mut event = Event::new(Scope::Fleet, worker.gpu_id.as_str(), what, now.unix_ms);
        event.gpu_id = Some(worker.gpu_id.to_string());
        event.detail = detail;
        event.detail["incarnation"] = worker.incarnation.as_str().into();
        self.effect(Effect::Tell { event: Box::new(event), once: false });
    }

    /// Tells about an entry that opened nothing.
    fn rejected(&mut self, id: &str, rejected: &Rejected, now: Moment) {
        let mut event = Event::new(Scope::Session, id, rejected.what, now.unix_ms);
        event.seq = Some(rejected.seq);
        event.error = Some(rejected.failure.clone());
        tracing::info!(session = id, seq = rejected.seq, what = rejected.what.as_str(), error = %rejected.failure, "entry opens nothing");
        self.effect(Effect::Tell { event: Box::new(event), once: true });
    }

    fn answer(&mut self, call: CallId, answer: Answer) {
        self.effect(Effect::Answer { call, answer: Box::new(answer) });
    }

    fn refuse(&mut self, call: CallId, failure: Failure) {
        self.answer(call, Answer::Refused(failure));
    }

    /// A final was stored, by whichever worker.
    pub fn finished(&mut self, stored: &Final, now: Moment) {
        match stored.kind {
            Kind::Session => self.chain_moved(&stored.id, ChainMark::from(stored), now),
            Kind::Job => self.job_final(stored, now),
            Kind::Unknown => {}
        }
    }
}
