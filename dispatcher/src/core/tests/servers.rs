//! A world with servers that keep things, workers that hold sessions, and a dispatcher that can be killed.
//!
//! Effects are carried out one by one, in any order, or lost on their way there or back; what a killed dispatcher had under
//! way may still arrive later.

use std::collections::BTreeMap;

use voxfleet_schema::{
    audio::{ASR_CAUSE, ASR_END, ASR_FLUSH},
    failure::FailureClass,
    fleet::Held,
};

use super::*;
use crate::open::{Step, Walker};

/// What servers keep. It outlives a dispatcher.
#[derive(Default)]
pub(super) struct Stored {
    pub(super) keys: BTreeMap<StreamId, (SessionRecord, u64)>,
    pub(super) chains: BTreeMap<StreamId, Vec<Final>>,
    pub(super) log: Vec<(StreamId, RawEntry)>,
    /// Keys of workers: revision, and whether a verdict stands there.
    pub(super) fleet: BTreeMap<WorkerName, (u64, bool)>,
    pub(super) cursor: u64,
    revision: u64,
}

impl Stored {
    pub(super) fn last(&self, id: &StreamId) -> Option<&Final> {
        self.chains.get(id)?.last()
    }

    pub(super) fn mark(&self, id: &StreamId) -> Option<ChainMark> {
        self.last(id).map(ChainMark::from)
    }

    pub(super) fn entries(&self, id: &StreamId) -> impl DoubleEndedIterator<Item = &RawEntry> {
        self.log.iter().filter(move |(of, _)| of == id).map(|(_, entry)| entry)
    }

    fn last_seq(&self, id: &StreamId) -> Option<u64> {
        self.last_entry(id).map(|(seq, _)| seq)
    }

    /// Its sequence, and whether it is audio.
    fn last_entry(&self, id: &StreamId) -> Option<(u64, bool)> {
        self.entries(id).next_back().map(|e| (e.seq, !e.payload.is_empty()))
    }

    pub(super) fn append(&mut self, id: &StreamId, headers: &[(&str, &str)], payload: &'static [u8]) -> u64 {
        let seq = self.log.len() as u64 + 1;
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        self.log.push((id.clone(), RawEntry { seq, headers, payload: payload.into() }));
        seq
    }

    /// What its owner makes of the log behind the last final: everything up to the next end. A lower epoch has lost.
    fn next_final(&self, id: &StreamId, epoch: u64) -> Option<Final> {
        let last = self.last(id);
        if last.is_some_and(|f| f.epoch > epoch || (f.end && f.epoch == epoch)) {
            return None;
        }
        let from = last.map_or(0, |f| f.audio.to_seq);
        let behind: Vec<&RawEntry> = self.entries(id).filter(|e| e.seq > from).collect();
        let ends = |e: &&RawEntry| e.headers.iter().any(|(name, _)| name == ASR_END);
        let to = behind.iter().find(|e| ends(e)).or(behind.last())?;
        let mut next = end_final(id.as_str(), last.map_or(0, |f| f.index + 1), epoch, to.seq);
        (next.end, next.resume.seq) = (ends(to), to.seq);
        Some(next)
    }

    fn write_key(&mut self, id: &StreamId, record: SessionRecord, over: Option<u64>) -> Result<u64, SaveError> {
        if self.keys.get(id).map(|(_, revision)| *revision) != over {
            return Err(SaveError::Conflict);
        }
        self.revision += 1;
        self.keys.insert(id.clone(), (record, self.revision));
        Ok(self.revision)
    }

    fn write_worker(&mut self, worker: &WorkerName, over: Option<u64>, dead: bool) -> Option<u64> {
        if self.fleet.get(worker).map(|(revision, _)| *revision) != over {
            return None;
        }
        self.revision += 1;
        self.fleet.insert(worker.clone(), (self.revision, dead));
        Some(self.revision)
    }

    fn walk(&self, id: &StreamId, from: Option<Box<Walker>>) -> WalkEnd {
        let mut walker = from.unwrap_or_else(|| Box::new(self.last(id).map_or_else(Walker::beginning, Walker::after)));
        let mut rejected = Vec::new();
        while let Some(entry) = self.entries(id).find(|e| e.seq >= walker.next_seq()) {
            match walker.step(entry) {
                Step::Passed => {}
                Step::Opens(opener) => {
                    return WalkEnd { last: Some(opener.seq), walker, opener: Some(opener), rejected };
                }
                Step::Rejected(entry) => rejected.push(entry),
            }
        }
        WalkEnd { walker, opener: None, rejected, last: self.last_seq(id) }
    }
}

/// A worker as the world plays it.
#[derive(Default, Clone)]
pub(super) struct Played {
    pub(super) generation: u32,
    pub(super) held: BTreeMap<StreamId, u64>,
    pub(super) draining: bool,
    /// Takes nothing.
    pub(super) refuses: bool,
    /// Does not beat, and works on: stopped, or cut off.
    pub(super) mute: bool,
    pub(super) beats: u64,
}

pub(super) struct Site {
    pub(super) core: Core,
    pub(super) now: Moment,
    pub(super) stored: Stored,
    pub(super) workers: Vec<Played>,
    /// Effects that nobody has carried out yet.
    pub(super) open: Vec<Effect>,
    /// Those of dispatchers that were killed or stopped: nobody hears what becomes of them.
    pub(super) stale: Vec<Effect>,
    /// How far the tail has read.
    read: u64,
    pub(super) answers: Vec<(CallId, Answer)>,
    pub(super) told: Vec<Event>,
}

fn core() -> Core {
    Core::new(DispatcherConfig::default(), "d".to_owned(), Subjects::new("asr.v1"))
}

impl Site {
    pub(super) fn new(workers: usize) -> Self {
        let mut site = Self {
            core: core(),
            now: Moment { mono: Duration::from_secs(10), unix_ms: 1_000_000 },
            stored: Stored::default(),
            workers: vec![Played::default(); workers],
            open: Vec::new(),
            stale: Vec::new(),
            read: 0,
            answers: Vec::new(),
            told: Vec::new(),
        };
        site.beats();
        site.run();
        site
    }

    pub(super) fn name(&self, n: usize) -> WorkerName {
        worker(&format!("g{n}"), &format!("i{}", self.workers[n].generation))
    }

    fn whose(&self, name: &WorkerName) -> Option<usize> {
        (0..self.workers.len()).find(|n| self.name(*n) == *name)
    }

    /// Collects what the core wants done.
    pub(super) fn gather(&mut self) {
        self.core.settle(self.now);
        for effect in self.core.effects().collect::<Vec<_>>() {
            match effect {
                Effect::Tell { event, .. } => self.told.push(*event),
                Effect::Answer { call, answer } => self.answers.push((call, *answer)),
                Effect::Hint { .. } | Effect::RemoveConsumers { .. } => {}
                other => self.open.push(other),
            }
        }
    }

    /// Carries everything out until nothing is left to do now.
    pub(super) fn run(&mut self) {
        self.gather();
        let mut turns = 0;
        while !self.open.is_empty() {
            self.serve(0);
            turns += 1;
            assert!(turns < 10_000, "it goes round in circles: {:?}", self.open);
        }
    }

    pub(super) fn serve(&mut self, at: usize) {
        let effect = self.open.remove(at);
        self.carry_out(effect, true, true);
    }

    /// What servers and workers do with one effect (`done`), and whether the dispatcher hears of it (`told`).
    pub(super) fn carry_out(&mut self, effect: Effect, done: bool, told: bool) {
        let now = self.now;
        let lost = || "lost".to_owned();
        match effect {
            Effect::Load { id } => {
                let loaded = Loaded {
                    record: self.stored.keys.get(&id).cloned(),
                    chain: self.stored.mark(&id),
                    last: self.stored.last_entry(&id),
                };
                self.core.loaded(&id, if told { Ok(loaded) } else { Err(lost()) }, now);
            }
            Effect::Save { id, record, revision } => {
                let saved = if done { self.stored.write_key(&id, *record, revision) } else { Ok(0) };
                self.core.saved(&id, if told { saved } else { Err(SaveError::Failed(lost())) }, now);
            }
            Effect::Ask { worker, assignment } => {
                let reply = if done { self.assign(&worker, &assignment) } else { AskReply::Silent(lost()) };
                let reply = if told { reply } else { AskReply::Silent(lost()) };
                self.core.asked(&assignment.id, assignment.epoch, &worker, reply, now);
            }
            Effect::Release { worker, id, epoch, .. } => {
                let there = self.whose(&worker);
                if let Some(n) = there.filter(|_| done)
                    && self.workers[n].held.get(&id).is_some_and(|held| *held <= epoch)
                {
                    self.workers[n].held.remove(&id);
                }
                self.core.released(&worker, &id, epoch, told && there.is_some(), now);
            }
            Effect::Append { id, mark, expect } => {
                let result = match (done, expect) {
                    (true, Some(expect)) if self.stored.last_seq(&id).unwrap_or(0) != expect => {
                        Err(AppendError::Conflict { last: self.stored.last_seq(&id) })
                    }
                    (true, _) => {
                        let headers: &[(&str, &str)] = match mark {
                            Mark::Pause => &[(ASR_FLUSH, "1"), (ASR_CAUSE, "pause")],
                            Mark::Idle => &[(ASR_END, "1"), (ASR_CAUSE, "idle")],
                            Mark::Close(_) => &[(ASR_END, "1"), (ASR_CAUSE, "close")],
                        };
                        Ok(self.stored.append(&id, headers, b""))
                    }
                    (false, _) => Ok(0),
                };
                let result = if told { result } else { Err(AppendError::Failed(lost())) };
                self.core.appended(&id, mark, result, now);
            }
            Effect::Walk { id, from } => {
                let end = self.stored.walk(&id, from);
                self.core.walked(&id, if told { Ok(end) } else { Err(lost()) }, now);
            }
            Effect::ReadChain { id } if told => self.core.chain_read(&id, self.stored.mark(&id), now),
            Effect::Admit { heartbeat } => {
                let name = heartbeat.worker();
                let found = self.stored.fleet.get(&name).copied();
                let admission = match found {
                    Some((_, true)) => Admission::Dead,
                    _ if !done => Admission::Failed(lost()),
                    found => match self.stored.write_worker(&name, found.map(|(revision, _)| revision), false) {
                        Some(revision) => Admission::Ready { revision, drain_until_ms: None },
                        None => Admission::Failed(lost()),
                    },
                };
                let admission = if told { admission } else { Admission::Failed(lost()) };
                self.core.admitted(&name, admission, now);
            }
            Effect::Bury { worker, revision, .. } => {
                let found = self.stored.fleet.get(&worker).copied();
                let burial = match found {
                    Some((_, true)) => Burial::Stood,
                    _ if !done => Burial::Failed(lost()),
                    found => match self.stored.write_worker(&worker, revision.or(found.map(|(r, _)| r)), true) {
                        Some(_) => Burial::Written,
                        None => Burial::Fenced,
                    },
                };
                self.core.buried(&worker, if told { burial } else { Burial::Failed(lost()) }, now);
            }
            Effect::Note { heartbeat, revision, .. } => {
                let name = heartbeat.worker();
                let noted = if done { self.stored.write_worker(&name, Some(revision), false) } else { None };
                let result = match noted {
                    _ if !told || !done => Err(NoteError::Failed(lost())),
                    Some(revision) => Ok(revision),
                    None => Err(NoteError::Conflict),
                };
                self.core.noted(&name, result);
            }
            Effect::Renew { worker } => {
                if let Some(n) = self.whose(&worker).filter(|_| done) {
                    self.die(n);
                }
            }
            Effect::Drain { worker, .. } => {
                let there = self.whose(&worker).filter(|_| done);
                if let Some(n) = there {
                    self.workers[n].draining = true;
                }
                let answer = if told && there.is_some() { AskReply::Taken } else { AskReply::Silent(lost()) };
                self.core.drained(&worker, &answer);
            }
            Effect::ReadChain { .. } => {}
            other => panic!("nothing leads to {other:?}"),
        }
        self.gather();
    }

    /// Something that a dispatcher which is no more had sent.
    pub(super) fn carry_out_stale(&mut self, at: usize) {
        let effect = self.stale.remove(at);
        let mut nobody = core();
        std::mem::swap(&mut self.core, &mut nobody);
        let (open, told, answers) = (self.open.len(), self.told.len(), self.answers.len());
        self.carry_out(effect, true, true);
        std::mem::swap(&mut self.core, &mut nobody);
        self.open.truncate(open);
        self.told.truncate(told);
        self.answers.truncate(answers);
    }

    fn assign(&mut self, to: &WorkerName, assignment: &Assignment) -> AskReply {
        let Some(n) = self.whose(to) else {
            return AskReply::Silent("nobody".to_owned());
        };
        let worker = &mut self.workers[n];
        if worker.mute {
            return AskReply::Silent("timeout".to_owned());
        }
        let held = worker.held.get(&assignment.id).copied();
        if held.is_some_and(|epoch| epoch > assignment.epoch) || (held.is_none() && (worker.draining || worker.refuses))
        {
            return AskReply::Refused(Failure::new(FailureClass::NoCapacity, "no permit"));
        }
        worker.held.insert(assignment.id.clone(), assignment.epoch);
        AskReply::Taken
    }

    pub(super) fn beats(&mut self) {
        for n in 0..self.workers.len() {
            if self.workers[n].mute {
                continue;
            }
            let name = self.name(n);
            let mut heartbeat = beat(name.gpu_id.as_str(), name.incarnation.as_str());
            let played = &mut self.workers[n];
            played.beats += 1;
            (heartbeat.seq, heartbeat.draining) = (played.beats, played.draining);
            let held = self.workers[n].held.iter().map(|(session, epoch)| Held {
                final_index: self.stored.last(session).map(|f| f.index),
                ..held(session.as_str(), *epoch)
            });
            heartbeat.held = held.collect();
            self.core.heartbeat(heartbeat, self.now);
            self.gather();
        }
    }

    /// The tail reads what stands in the log.
    pub(super) fn read(&mut self) {
        while let Some((id, entry)) = self.stored.log.get(self.read as usize).cloned() {
            self.read = entry.seq;
            self.core.entry(&Ok(id), entry, self.now);
            self.gather();
        }
    }

    pub(super) fn second(&mut self) {
        self.now.mono += Duration::from_secs(1);
        self.now.unix_ms += 1_000;
        self.read();
        self.beats();
        testing::probe(&mut self.core, true, true, self.now);
        self.core.tick(self.now);
        self.stored.cursor = self.core.cursor();
        self.gather();
    }

    /// A worker stores its next final of some session, if there is anything to say; who meets a higher epoch lets go.
    pub(super) fn publish(&mut self, n: usize) {
        for (session, epoch) in self.workers[n].held.clone() {
            if self.stored.last(&session).is_some_and(|f| f.epoch > epoch) {
                self.workers[n].held.remove(&session);
                continue;
            }
            if let Some(next) = self.stored.next_final(&session, epoch) {
                self.stored.chains.entry(session).or_default().push(next.clone());
                self.core.finished(&next, self.now);
                self.gather();
                return;
            }
        }
    }

    /// It is gone, and another comes in its place.
    pub(super) fn die(&mut self, n: usize) {
        let generation = self.workers[n].generation + 1;
        self.workers[n] = Played { generation, ..Played::default() };
    }

    /// The dispatcher is killed, or stopped for long, and another takes over.
    pub(super) fn succeed(&mut self) {
        self.stale.append(&mut self.open);
        self.core = core();
        self.now.mono = Duration::from_millis(1_200);
        self.beats();
        for (record, revision) in self.stored.keys.values().cloned().collect::<Vec<_>>() {
            let (chain, last) = (self.stored.mark(&record.id), self.stored.last_entry(&record.id));
            let loaded = Loaded { record: Some((record, revision)), chain, last };
            self.core.recover(loaded, self.now);
        }
        let keys = self.stored.fleet.iter().map(|(worker, (revision, dead))| FleetKey {
            worker: worker.clone(),
            revision: *revision,
            dead_ms: dead.then_some(0),
            device: None,
        });
        self.core.recover_fleet(keys.collect(), self.now);
        self.read = self.stored.cursor;
        self.gather();
    }

    /// From here on everything works, until nothing is left to do.
    pub(super) fn finish(&mut self, mut look: impl FnMut(&mut Self)) {
        for worker in &mut self.workers {
            (worker.refuses, worker.mute) = (false, false);
        }
        for round in 0..200 {
            self.run();
            look(self);
            if round == 20 {
                let open = self.stored.keys.iter().filter(|(_, (r, _))| r.state != SessionState::Ended);
                let open: Vec<StreamId> = open.map(|(id, _)| id.clone()).collect();
                self.core.open_keys(&open);
                self.gather();
            }
            self.second();
            self.run();
            for n in 0..self.workers.len() {
                self.publish(n);
                self.run();
                if self.workers[n].draining && self.workers[n].held.is_empty() {
                    self.die(n);
                }
                look(self);
            }
        }
        for (id, (record, _)) in &self.stored.keys {
            assert_eq!(record.state, SessionState::Ended, "{record:?} {:?}", self.core.book.get(id));
            let audio = self.stored.entries(id).filter(|e| !e.payload.is_empty()).map(|e| e.seq).max();
            let covered = self.stored.last(id).map(|f| f.audio.to_seq);
            assert!(audio <= covered, "{id}: audio up to {audio:?}, finals up to {covered:?}");
        }
        for (id, entry) in &self.stored.log {
            let known = entry.payload.is_empty() || self.stored.keys.contains_key(id);
            assert!(known, "entry {} of {id} opened nothing", entry.seq);
        }
        for (n, worker) in self.workers.iter().enumerate() {
            assert!(worker.held.is_empty(), "g{n} still holds {:?}", worker.held);
        }
        for (name, known) in self.core.fleet.workers() {
            assert_eq!(known.load.used(), 0, "slots of {name}");
        }
        assert!(self.core.waiting.is_empty());
    }
}
