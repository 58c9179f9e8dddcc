//! The whole of a job's life without IO: a world that answers effects as the servers would, in any order a test likes.

mod asking;
mod engines;
mod interleavings;
mod running;

use std::{collections::BTreeMap, time::Duration};

use voxfleet_nats::Subjects;
use voxfleet_schema::{
    event::Event,
    fleet::{GivenUp, Heartbeat},
    job::JobQuery,
    session::Policy,
    transcript::{Final, VadKind},
};

use super::*;
use crate::{
    config::DispatcherConfig,
    core::{Admission, Answer, Burial},
    jobs::JobEnd,
    testing::{self, beat, holds_job, id, worker},
};

/// What servers keep: keys, chains, work queues, the object store. It outlives a dispatcher.
#[derive(Default)]
struct Stored {
    keys: BTreeMap<StreamId, (JobRecord, u64)>,
    /// Each job's finals, as what decides about them.
    chains: BTreeMap<StreamId, Vec<JobMark>>,
    work: BTreeMap<(WorkerName, StreamId), u64>,
    dead: Vec<StreamId>,
    revision: u64,
}

impl Stored {
    fn last(&self, id: &StreamId) -> Option<JobMark> {
        self.chains.get(id)?.last().cloned()
    }
}

struct World {
    core: Core,
    now: Moment,
    stored: Stored,
    /// Effects that nobody has carried out yet.
    open: Vec<Effect>,
    told: Vec<Event>,
    answers: Vec<(CallId, Answer)>,
    released: Vec<(WorkerName, StreamId, u64)>,
    /// Of the last release.
    finish_ms: u32,
}

fn core() -> Core {
    Core::new(DispatcherConfig::default(), "d".to_owned(), Subjects::new("asr.v1"))
}

fn submission(name: &str) -> Box<Submission> {
    let body = format!(r#"{{"job":"{name}","audio":"https://audio.example/a.wav"}}"#);
    Box::new(Submission::read(body.as_bytes(), None, None, None).expect("a request"))
}

impl World {
    fn new(gpus: usize) -> Self {
        let now = Moment { mono: Duration::from_secs(10), unix_ms: 1_000_000 };
        let mut world = Self {
            core: core(),
            now,
            stored: Stored::default(),
            open: Vec::new(),
            told: Vec::new(),
            answers: Vec::new(),
            released: Vec::new(),
            finish_ms: 0,
        };
        for n in 0..gpus {
            world.beat(n, |_| ());
        }
        world.run();
        world
    }

    fn beat(&mut self, n: usize, change: impl FnOnce(&mut Heartbeat)) {
        let mut heartbeat = beat(&format!("g{n}"), "i");
        change(&mut heartbeat);
        self.core.heartbeat(heartbeat, self.now);
        self.gather();
    }

    /// Collects what the core wants done.
    fn gather(&mut self) {
        self.core.settle(self.now);
        let effects: Vec<Effect> = self.core.effects().collect();
        for effect in effects {
            match effect {
                Effect::Tell { event, .. } => self.told.push(*event),
                Effect::Answer { call, answer } => self.answers.push((call, *answer)),
                Effect::Admit { heartbeat } => {
                    let ready = Admission::Ready { revision: 1, drain_until_ms: None };
                    self.core.admitted(&heartbeat.worker(), ready, self.now);
                    self.gather();
                }
                Effect::Note { heartbeat, .. } => self.core.noted(&heartbeat.worker(), Ok(1)),
                Effect::Bury { worker, .. } => {
                    self.core.buried(&worker, Burial::Written, self.now);
                    self.gather();
                }
                Effect::RemoveConsumers { worker } => self.stored.work.retain(|(name, _), _| *name != worker),
                other => self.open.push(other),
            }
        }
    }

    fn run(&mut self) {
        self.gather();
        while !self.open.is_empty() {
            self.carry_out(0);
        }
    }

    /// What the servers do with one effect.
    fn carry_out(&mut self, at: usize) {
        let Effect::Job(effect) = self.open.remove(at) else {
            return;
        };
        let input = self.serve(effect);
        if let Some(input) = input {
            self.core.job(input, self.now);
        }
        self.gather();
    }

    fn serve(&mut self, effect: JobEffect) -> Option<JobInput> {
        let stored = &mut self.stored;
        Some(match effect {
            JobEffect::Load { id } => {
                let loaded = JobLoaded { record: stored.keys.get(&id).cloned(), chain: stored.last(&id) };
                JobInput::Loaded { id, result: Ok(Box::new(loaded)) }
            }
            JobEffect::Put { id, .. } => JobInput::Put { id, result: Ok(()) },
            JobEffect::Save { id, record, revision } => {
                let found = stored.keys.get(&id).map(|(_, revision)| *revision);
                let result = if found == revision {
                    stored.revision += 1;
                    stored.keys.insert(id.clone(), (*record, stored.revision));
                    Ok(stored.revision)
                } else {
                    Err(JobSaveError::Conflict)
                };
                JobInput::Saved { id, result }
            }
            JobEffect::Send { worker, item, publish } => {
                let chain = stored.last(&item.job);
                let place = (worker, item.job.clone());
                let queued = stored.work.get(&place).copied();
                let work = if chain.as_ref().is_some_and(|mark| mark.end.is_some()) {
                    Work::NotNeeded
                } else {
                    match queued {
                        Some(epoch) if epoch > item.epoch => Work::Newer { epoch },
                        Some(epoch) if epoch == item.epoch => Work::Queued,
                        _ if publish => {
                            stored.work.insert(place, item.epoch);
                            Work::Queued
                        }
                        _ => Work::Missing,
                    }
                };
                JobInput::Sent { id: item.job, epoch: item.epoch, result: Ok(Sent { chain, work }) }
            }
            JobEffect::Release { worker, id, epoch, finish_ms } => {
                self.finish_ms = finish_ms;
                let place = (worker.clone(), id.clone());
                if stored.work.get(&place).is_some_and(|queued| *queued <= epoch) {
                    stored.work.remove(&place);
                }
                self.released.push((worker.clone(), id.clone(), epoch));
                JobInput::Released { worker, id, epoch, done: true }
            }
            JobEffect::ReadChain { id } => JobInput::Chain { mark: stored.last(&id), id },
            JobEffect::Close { record } => {
                let id = record.id.clone();
                if stored.last(&id).is_none_or(|mark| mark.end.is_none()) {
                    let epoch = record.epoch;
                    let end = JobEnd { error: record.error.clone(), result: None, duration_ms: 0 };
                    self.store(&id, epoch, Some(end));
                }
                let mark = self.stored.last(&id);
                let failed = mark.as_ref().and_then(|m| m.end.as_ref()?.error.as_ref());
                if failed.is_some_and(|error| error.class != FailureClass::Cancelled) {
                    self.stored.dead.push(id.clone());
                }
                let mark = mark.expect("just written");
                JobInput::Closed { id, result: Ok(ChainEnd { mark, not_kept: false }) }
            }
            JobEffect::Expire { id } => JobInput::Expired { id, result: Ok(Expired { next_ms: None, told: false }) },
            JobEffect::List { call, .. } => JobInput::Listed { call, result: Ok((Vec::new(), 0)) },
        })
    }

    /// A final, fenced by its epoch: who comes with a lower one than the last has lost.
    fn store(&mut self, id: &StreamId, epoch: u64, end: Option<JobEnd>) -> bool {
        let chain = self.stored.chains.entry(id.clone()).or_default();
        if chain.last().is_some_and(|last| last.end.is_some() || last.epoch > epoch) {
            return false;
        }
        let index = chain.len() as u64;
        chain.push(JobMark { index, epoch, vad: VadKind::Silero, engine: None, end });
        true
    }

    fn submit(&mut self, call: u64, name: &str) {
        self.core.job(JobInput::Submit { call: CallId(call), submission: Ok(submission(name)) }, self.now);
        self.gather();
    }

    fn seconds(&mut self, count: u64, beats: impl Fn(&mut Self)) {
        for _ in 0..count {
            self.pass(Duration::from_secs(1));
            beats(self);
            testing::probe(&mut self.core, true, true, self.now);
            self.core.tick(self.now);
            self.run();
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now.mono += time;
        self.now.unix_ms += time.as_millis() as u64;
    }

    fn key(&self, name: &str) -> &JobRecord {
        &self.stored.keys.get(&id(name)).expect("a key").0
    }

    fn state(&self, name: &str) -> JobState {
        self.key(name).state
    }

    fn told(&self, what: What) -> usize {
        self.told.iter().filter(|e| e.what == what).count()
    }

    fn answer(&self, call: u64) -> Option<&Answer> {
        self.answers.iter().find(|(c, _)| *c == CallId(call)).map(|(_, answer)| answer)
    }

    /// The dispatcher is killed, and another one starts.
    fn succeed(&mut self) {
        self.open.clear();
        self.core = core();
        for (record, revision) in self.stored.keys.values().cloned().collect::<Vec<_>>() {
            let chain = self.stored.last(&record.id);
            self.core.recover_job(JobLoaded { record: Some((record, revision)), chain }, self.now);
        }
        self.gather();
    }
}

fn done() -> Option<JobEnd> {
    Some(JobEnd { error: None, result: Some("object://asr_media/r".to_owned()), duration_ms: 2_000 })
}

fn given_up(name: &str, epoch: u64, class: FailureClass) -> Vec<GivenUp> {
    vec![GivenUp { kind: Kind::Job, id: id(name), epoch, failure: Failure::new(class, "x") }]
}
