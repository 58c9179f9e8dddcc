//! The decisions of an active dispatcher as one state machine: inputs come in with their time, effects come out. It does
//! no IO and reads no clock, so every order of events can be tried in a test.
//!
//! | module | inputs |
//! |---|---|
//! | [`entries`] | what the tail reads: first chunks, audio, audio behind an end |
//! | [`admitting`] | none: who may come in, and who comes next |
//! | [`placing`] | choosing a worker, writing the record, asking the worker |
//! | [`instead`] | none: what is told of smaller models and CPUs |
//! | [`restoring`] | none: back to what was asked for |
//! | [`endings`] | finals, ends, what stands in the log behind them |
//! | [`requests`] | the API |
//! | [`listing`] | none: open sessions as people list them |
//! | [`services`] | none: the fleet map |
//! | [`spans`] | none: what is told to those who follow traces |
//! | [`jobs`] | file jobs: the same again for recordings |
//! | [`expiry`] | audio that leaves the log before anybody had room, streams that fill up |
//! | [`workers`] | heartbeats, admission, verdicts |
//! | [`drain`] | a GPU that is to be emptied |
//! | [`reconciling`] | none: keys against heartbeats, and acting on the difference |
//! | [`upkeep`] | time: idle sessions, what was lost on the way |

mod admitting;
mod drain;
mod endings;
mod entries;
mod expiry;
mod instead;
pub mod jobs;
mod listing;
mod placing;
mod reconciling;
mod requests;
mod restoring;
mod services;
pub mod spans;
#[cfg(test)]
mod tests;
mod upkeep;
mod workers;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use voxfleet_nats::Subjects;
use voxfleet_schema::{
    audio::RawEntry,
    event::{Event, Scope, What},
    failure::Failure,
    fleet::{Assignment, Drained, FleetStatus, Heartbeat},
    id::{Kind, StreamId, WorkerName},
    job::{JobList, JobStatus, Submitted},
    plan::FleetPlan,
    session::{Closed, Opened, SessionList, SessionRecord, SessionState, SessionStatus},
    trace::TraceContext,
    transcript::Final,
};
use voxfleet_trace::{Span, Tracer};

pub use listing::summary_of;

use crate::{
    admission::Waiting,
    config::DispatcherConfig,
    fleet::Fleet,
    map::{Map, Roles},
    moment::{Moment, StreamClock},
    open::{Opener, Rejected, Walker},
    routing::Roster,
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
    /// Tell a worker to let go; it may store the final it has begun within `finish_ms` -> [`Core::released`].
    Release {
        worker: WorkerName,
        id: StreamId,
        epoch: u64,
        finish_ms: u32,
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
        trace: Option<TraceContext>,
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
    /// Never answered.
    Span(Box<Span>),
    /// First heartbeat: look for a verdict, make its consumers -> [`Core::admitted`].
    Admit {
        heartbeat: Box<Heartbeat>,
    },
    /// Tell a dead incarnation to take a new name.
    Renew {
        worker: WorkerName,
    },
    /// Write the verdict over this revision of its key, or over what is found there -> [`Core::buried`].
    Bury {
        worker: WorkerName,
        heartbeat: Option<Box<Heartbeat>>,
        revision: Option<u64>,
        recall: Recall,
    },
    /// Write its last heartbeat over this revision of its key -> [`Core::noted`].
    Note {
        heartbeat: Box<Heartbeat>,
        revision: u64,
        drain_until_ms: Option<u64>,
    },
    /// Tell a worker to hand over and end -> [`Core::drained`].
    Drain {
        worker: WorkerName,
        deadline_ms: u64,
    },
    /// Let it load a model that somebody will ask for. Never answered.
    Prewarm {
        worker: WorkerName,
        model: String,
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
    Sessions(Box<SessionList>),
    Fleet(Box<FleetStatus>),
    Drained(Box<Drained>),
    Plan(Box<FleetPlan>),
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
    /// The log has no room.
    Full,
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
    Ready {
        /// Of its key, just written.
        revision: u64,
        /// A predecessor was asked to drain it.
        drain_until_ms: Option<u64>,
    },
    /// A verdict stands in the bucket.
    Dead,
    Failed(String),
}

/// Takes back a verdict that has been decided and not written yet: its worker beats.
#[derive(Debug, Clone, Default)]
pub struct Recall(Arc<AtomicBool>);

impl Recall {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What became of a verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Burial {
    Written,
    /// One stood there before.
    Stood,
    /// Somebody else has written its key since: it has been heard there.
    Fenced,
    /// It was heard here before the verdict was written.
    Recalled,
    Failed(String),
}

/// Why a heartbeat was not written to its key, or may not have been.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoteError {
    Conflict,
    Failed(String),
}

pub struct Core {
    config: DispatcherConfig,
    name: String,
    subjects: Subjects,
    fleet: Fleet,
    book: Book,
    clock: StreamClock,
    /// The fleet as routing sees it.
    roster: Roster,
    map: Map,
    roles: Roles,
    /// Something has changed that may change who does what.
    map_due: bool,
    preloads: HashMap<(WorkerName, String), services::Preload>,
    /// When the own link was last in doubt: who was not heard then is not missed for that.
    doubted: Duration,
    /// Settled sessions without a worker, and who else wants in.
    waiting: Waiting,
    /// When those who wait were last gone through.
    placed: Duration,
    /// Workers that refused, and the number of the heartbeat they had sent then.
    refusals: HashMap<WorkerName, u64>,
    /// Something came free since the last look at them.
    place_due: bool,
    /// Workers whose key is being written, since then.
    key_writes: HashMap<WorkerName, Duration>,
    /// Verdicts on their way to their keys.
    burying: HashMap<WorkerName, Recall>,
    /// Their consumers could not be made yet.
    readmit: HashSet<WorkerName>,
    effects: Vec<Effect>,
    expiry: expiry::Expiry,
    /// When the tail last went back.
    went_back: Duration,
    jobs: jobs::Jobs,
    drains: drain::Drains,
    /// A heartbeat showed something that reconciliation need not wait a second for.
    reconcile_due: bool,
    reconciled: Duration,
    tracer: Tracer,
}

pub(crate) use expiry::closing_final;
pub use workers::FleetKey;

impl Core {
    pub fn new(config: DispatcherConfig, name: String, subjects: Subjects) -> Self {
        let jobs = jobs::Jobs::new(Duration::from_secs(config.jobs_age_s));
        Self {
            map: Map::of(&config.services),
            roles: Roles::default(),
            map_due: false,
            preloads: HashMap::new(),
            doubted: Duration::ZERO,
            config,
            name,
            subjects,
            fleet: Fleet::default(),
            book: Book::default(),
            clock: StreamClock::default(),
            roster: Roster::default(),
            waiting: Waiting::default(),
            placed: Duration::ZERO,
            refusals: HashMap::new(),
            place_due: false,
            key_writes: HashMap::new(),
            burying: HashMap::new(),
            readmit: HashSet::new(),
            effects: Vec::new(),
            expiry: expiry::Expiry::default(),
            went_back: Duration::ZERO,
            jobs,
            drains: drain::Drains::default(),
            reconcile_due: false,
            reconciled: Duration::ZERO,
            tracer: Tracer::off(),
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
        let mut session = Session::new(record, revision, now.mono, self.idle_now(now));
        let waits = session.state() == SessionState::Waiting;
        session.unplaced_since = waits.then_some(now.mono);
        // A predecessor has let it wait: it keeps its place.
        let waited_ms = now.unix_ms.saturating_sub(session.record.changed_ms);
        session.waiting_since_ms = now.mono.as_millis() as i64 - waited_ms as i64;
        if let Some(chain) = chain {
            session.saw(chain);
        }
        session.displaced_from = session.record.displaced_from.clone();
        session.instead = session.record.instead.clone();
        session.told_instead = session.record.instead.clone();
        if waits {
            let age = Duration::from_secs(self.config.jobs_age_s);
            self.waiting.insert(&admitting::unplaced(&session), age);
            self.place_due = true;
        }
        if let Some((seq, audio)) = last {
            session.last = Some(seq);
            if audio {
                session.last_audio = Some(seq);
                session.idle.entry(crate::idle::Spoke::Audio { flushed: false }, self.idle_now(now));
            }
        }
        session
    }

    fn idle_now(&self, now: Moment) -> Duration {
        self.clock.now(now.mono, Duration::from_millis(self.config.tick_ms * 2))
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
