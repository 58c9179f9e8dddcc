//! The whole of a job's life without IO: a world that answers effects as the servers would, in any order a test likes.

mod interleavings;

use std::{collections::BTreeMap, time::Duration};

use voxfleet_nats::Subjects;
use voxfleet_schema::{
    event::Event,
    fleet::{GivenUp, Heartbeat},
    job::JobQuery,
    transcript::{Final, VadKind},
};

use super::*;
use crate::{
    config::DispatcherConfig,
    core::{Admission, Answer},
    jobs::JobEnd,
    testing::{beat, holds_job, id, worker},
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
                    self.core.admitted(&heartbeat.worker(), Admission::Ready, self.now);
                    self.gather();
                }
                Effect::Bury { heartbeat } => {
                    self.core.buried(&heartbeat.worker(), Ok(()), self.now);
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
            JobEffect::Release { worker, id, epoch } => {
                let place = (worker.clone(), id.clone());
                if stored.work.get(&place).is_some_and(|queued| *queued <= epoch) {
                    stored.work.remove(&place);
                }
                self.released.push((worker.clone(), id.clone(), epoch));
                JobInput::Released { worker, id, done: true }
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
        chain.push(JobMark { index, epoch, vad: VadKind::Silero, end });
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
            self.core.probed(true, true, self.now);
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

#[test]
fn a_job_is_written_before_it_is_told_and_given_out() {
    let mut world = World::new(1);
    world.submit(1, "a");
    assert!(world.answers.is_empty() && world.told(What::Submitted) == 0);
    world.run();
    assert!(matches!(world.answer(1), Some(Answer::Submitted(s)) if s.state == JobState::Queued));
    assert_eq!((world.state("a"), world.key("a").epoch, world.key("a").attempts), (JobState::Assigned, 1, 1));
    assert_eq!(world.stored.work.get(&(worker("g0", "i"), id("a"))), Some(&1));
    let whats: Vec<_> = world.told.iter().filter(|e| e.scope == Scope::Job).map(|e| e.what).collect();
    assert_eq!(whats, [What::Submitted, What::Assigned]);
    world.submit(2, "b");
    world.run();
    assert_eq!((world.state("b"), world.told(What::Waiting)), (JobState::Queued, 1), "one slot");
}

#[test]
fn the_end_of_the_chain_ends_it_and_frees_the_slot() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.submit(2, "b");
    world.run();
    world.store(&id("a"), 1, done());
    let mark = world.stored.last(&id("a"));
    world.core.job(JobInput::Chain { id: id("a"), mark }, world.now);
    world.run();
    assert_eq!((world.state("a"), world.key("a").duration_ms), (JobState::Done, Some(2_000)));
    assert_eq!(world.told(What::Done), 1);
    assert!(world.released.iter().any(|(_, job, epoch)| *job == id("a") && *epoch == 1));
    assert_eq!(world.state("b"), JobState::Assigned);
    assert!(world.core.jobs.book.job(&id("a")).is_none(), "ended ones are not kept");
}

#[test]
fn a_missed_end_is_found_by_the_heartbeat() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.store(&id("a"), 1, done());
    world.seconds(3, |w| {
        w.beat(0, |b| b.held = vec![Held { final_index: Some(0), ..holds_job("a", 1) }]);
    });
    assert_eq!(world.state("a"), JobState::Done);
}

#[test]
fn asking_again_is_answered_and_another_request_is_refused() {
    let mut world = World::new(0);
    world.submit(1, "a");
    world.submit(2, "a");
    let other = Submission { name: Some("other".to_owned()), ..*submission("a") };
    world.core.job(JobInput::Submit { call: CallId(3), submission: Ok(Box::new(other)) }, world.now);
    world.run();
    for call in [1, 2] {
        assert!(matches!(world.answer(call), Some(Answer::Submitted(_))), "{call}");
    }
    assert!(matches!(world.answer(3), Some(Answer::Refused(f)) if f.class == FailureClass::BadRequest));
    assert_eq!((world.told(What::Submitted), world.stored.revision), (1, 1));
    world.core.ask_status(CallId(4), JobQuery { job: id("ghost") }, world.now);
    world.run();
    assert!(matches!(world.answer(4), Some(Answer::Refused(f)) if f.class == FailureClass::NotFound));
    world.core.ask_status(CallId(5), JobQuery { job: id("a") }, world.now);
    world.run();
    let Some(Answer::Job(status)) = world.answer(5) else { panic!("{:?}", world.answers) };
    assert_eq!((status.ahead, status.record.state), (Some(0), JobState::Queued));
    assert!(status.why.as_ref().is_some_and(|why| why.contains("no_workers")));
}

#[test]
fn what_cannot_be_stored_is_refused_and_forgotten() {
    let mut world = World::new(0);
    let mut submission = submission("a");
    submission.recording = Some(Recording { bytes: bytes::Bytes::from_static(b"x"), paid: None });
    world.core.job(JobInput::Submit { call: CallId(1), submission: Ok(submission) }, world.now);
    world.gather();
    world.carry_out(0);
    let Some(Effect::Job(JobEffect::Put { .. })) = world.open.pop() else { panic!("the recording comes first") };
    world.core.job(JobInput::Put { id: id("a"), result: Err(PutError::Full) }, world.now);
    world.run();
    let full = |answer: Option<&Answer>| matches!(answer, Some(Answer::Refused(f)) if f.class == FailureClass::NoCapacity && f.retry_after_ms.is_some());
    assert!(full(world.answer(1)));
    world.submit(2, "b");
    world.carry_out(0);
    world.open.clear();
    world.core.job(JobInput::Saved { id: id("b"), result: Err(JobSaveError::Full) }, world.now);
    world.run();
    assert!(full(world.answer(2)));
    assert!(world.core.jobs.book.is_empty());
}

#[test]
fn a_write_whose_answer_was_lost_is_looked_up() {
    let mut world = World::new(0);
    world.submit(1, "a");
    world.carry_out(0);
    let Some(Effect::Job(save @ JobEffect::Save { .. })) = world.open.pop() else { panic!("a write") };
    world.serve(save);
    world.core.job(JobInput::Saved { id: id("a"), result: Err(JobSaveError::Failed("timeout".to_owned())) }, world.now);
    world.seconds(3, |_| ());
    assert!(matches!(world.answer(1), Some(Answer::Submitted(_))));
    assert_eq!(world.told(What::Submitted), 1);
}

#[test]
fn a_cancel_whose_write_was_lost_is_tried_again() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.core.ask_cancel(CallId(2), JobQuery { job: id("a") }, world.now);
    world.gather();
    let Some(Effect::Job(JobEffect::Save { .. })) = world.open.pop() else { panic!("a write") };
    world.core.job(JobInput::Saved { id: id("a"), result: Err(JobSaveError::Failed("timeout".to_owned())) }, world.now);
    world.run();
    assert!(world.answer(2).is_none() && world.state("a") == JobState::Assigned);
    world.seconds(4, |w| w.beat(0, |_| ()));
    assert_eq!(world.state("a"), JobState::Cancelled);
    assert!(matches!(world.answer(2), Some(Answer::Job(s)) if s.record.state == JobState::Cancelled));
}

#[test]
fn what_was_lost_at_the_end_is_answered_as_it_stands() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.core.ask_cancel(CallId(2), JobQuery { job: id("a") }, world.now);
    world.gather();
    world.carry_out(0);
    let close = world.open.iter().position(|e| matches!(e, Effect::Job(JobEffect::Close { .. }))).expect("a close");
    world.open.remove(close);
    world.core.job(JobInput::Closed { id: id("a"), result: Err("timeout".to_owned()) }, world.now);
    world.gather();
    assert!(matches!(world.answer(2), Some(Answer::Job(s)) if s.record.state == JobState::Closing));
}

#[test]
fn what_is_told_has_no_signature() {
    let mut world = World::new(0);
    let body = br#"{"job":"a","audio":"https://audio.example/a.wav?X-Amz-Signature=s"}"#;
    let submission = Box::new(Submission::read(body, None, None, None).expect("a request"));
    world.core.job(JobInput::Submit { call: CallId(1), submission: Ok(submission) }, world.now);
    world.run();
    world.core.ask_status(CallId(2), JobQuery { job: id("a") }, world.now);
    world.core.ask_cancel(CallId(3), JobQuery { job: id("a") }, world.now);
    world.run();
    world.core.ask_status(CallId(4), JobQuery { job: id("a") }, world.now);
    world.run();
    for call in 2..=4 {
        let Some(Answer::Job(status)) = world.answer(call) else { panic!("{call}: {:?}", world.answers) };
        assert_eq!(status.record.audio, "https://audio.example/a.wav", "{call}");
    }
    assert!(world.key("a").audio.ends_with("=s"), "its worker needs it");
}

#[test]
fn too_many_lists_are_refused() {
    let mut world = World::new(0);
    world.core.job(JobInput::Listed { call: CallId(1), result: Err(ListError::Busy) }, world.now);
    world.run();
    let busy = |f: &Failure| f.class == FailureClass::NoCapacity && f.retry_after_ms.is_some();
    assert!(matches!(world.answer(1), Some(Answer::Refused(f)) if busy(f)));
}

#[test]
fn a_bucket_that_is_filling_takes_no_new_jobs() {
    let mut world = World::new(0);
    world.submit(1, "a");
    world.run();
    let usage = |percent: u64| voxfleet_nats::topology::Usage {
        stream: "KV_asr_jobs".to_owned(),
        messages: 1,
        bytes: percent,
        max_bytes: 100,
        consumers: 0,
    };
    for (percent, takes) in [(80, true), (81, false), (76, false), (75, true)] {
        world.core.usage(&[usage(percent)], world.now);
        assert_eq!(world.core.takes_jobs(), takes, "{percent}");
    }
    world.core.usage(&[usage(90)], world.now);
    world.submit(2, "b");
    world.submit(3, "a");
    world.run();
    assert!(matches!(world.answer(2), Some(Answer::Refused(f)) if f.class == FailureClass::NoCapacity));
    assert!(matches!(world.answer(3), Some(Answer::Submitted(_))), "what is known is answered");
}

#[test]
fn a_job_that_failed_is_told_even_when_nothing_can_be_kept_of_it() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.pass(Duration::from_secs(1));
    world.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::BadAudio));
    world.core.tick(world.now);
    world.gather();
    while !matches!(world.open.first(), Some(Effect::Job(JobEffect::Close { .. }))) {
        world.carry_out(0);
    }
    let Effect::Job(close) = world.open.remove(0) else { panic!("a close") };
    let Some(JobInput::Closed { id, result: Ok(end) }) = world.serve(close) else { panic!("an end") };
    world.core.job(JobInput::Closed { id, result: Ok(ChainEnd { not_kept: true, ..end }) }, world.now);
    world.run();
    assert_eq!(world.state("a"), JobState::Failed);
    let told = world.told.iter().find(|e| e.what == What::Failed).expect("told");
    assert_eq!(told.detail["not_kept"], NOT_KEPT);
}

#[test]
fn a_broken_worker_does_not_get_every_try() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    assert_eq!(world.key("a").worker, Some(worker("g0", "i")));
    world.seconds(3, |w| {
        w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::EngineCrash));
        w.beat(1, |_| ());
    });
    assert_eq!((world.key("a").worker.clone(), world.key("a").attempts), (Some(worker("g1", "i")), 2));
    world.seconds(10, |w| {
        w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::EngineCrash));
        w.beat(1, |b| b.given_up = given_up("a", 2, FailureClass::EngineCrash));
    });
    assert_eq!(world.key("a").attempts, 3, "where nobody else is left it may");
}

#[test]
fn what_one_worker_may_not_fetch_another_may() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    world.seconds(2, |w| {
        w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::Forbidden));
        w.beat(1, |_| ());
    });
    assert_eq!((world.state("a"), world.key("a").worker.clone()), (JobState::Assigned, Some(worker("g1", "i"))));
    world.seconds(3, |w| {
        w.beat(0, |_| ());
        w.beat(1, |b| b.given_up = given_up("a", 2, FailureClass::Forbidden));
    });
    assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Failed, 2), "nobody is left to ask");
}

#[test]
fn who_has_no_room_for_a_minute_is_waited_for() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    let full = |w: &mut World| {
        let mut given_up = given_up("a", 1, FailureClass::NoCapacity);
        given_up[0].failure.retry_after_ms = Some(60_000);
        let seq = w.now.mono.as_secs();
        w.beat(0, |b| (b.seq, b.given_up) = (seq, given_up));
    };
    world.seconds(50, full);
    assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Queued, 0));
    world.seconds(20, full);
    assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Assigned, 1));
}

#[test]
fn an_ended_job_that_is_met_is_expired_in_its_time() {
    let mut world = World::new(0);
    let ended = |ttl| JobRecord {
        state: JobState::Done,
        ended_ms: Some(900_000),
        result_ttl_s: ttl,
        ..crate::testing::job("a")
    };
    for (ttl, due) in [(60, true), (3_600, false)] {
        world.stored.keys.insert(id("a"), (ended(ttl), 7));
        world.core.ask_status(CallId(1), JobQuery { job: id("a") }, world.now);
        world.run();
        assert_eq!(!world.core.jobs.book.due(world.now.unix_ms, 9).is_empty(), due, "{ttl}");
    }
    assert_eq!(world.core.jobs.book.due(u64::MAX, 9), [id("a")]);
}

#[test]
fn a_cancel_closes_the_chain_wherever_the_job_is() {
    let mut world = World::new(1);
    for name in ["a", "b"] {
        world.submit(1, name);
        world.run();
    }
    for (call, name) in [(2, "a"), (3, "b"), (4, "b")] {
        world.core.ask_cancel(CallId(call), JobQuery { job: id(name) }, world.now);
    }
    world.run();
    for name in ["a", "b"] {
        assert_eq!(world.state(name), JobState::Cancelled, "{name}");
        assert_eq!(world.stored.chains[&id(name)].len(), 1);
    }
    assert!(world.released.iter().any(|(_, job, epoch)| *job == id("a") && *epoch == 1));
    assert!(world.stored.work.is_empty() && world.stored.dead.is_empty());
    assert_eq!(
        (world.key("a").epoch, world.stored.chains[&id("a")][0].epoch),
        (2, 2),
        "its worker meets a later epoch"
    );
    assert_eq!(world.told(What::Cancelled), 2);
    for call in [2, 3, 4] {
        assert!(matches!(world.answer(call), Some(Answer::Job(_))), "{call}");
    }
}

#[test]
fn who_finishes_before_the_cancel_has_finished() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.store(&id("a"), 1, done());
    world.core.ask_cancel(CallId(2), JobQuery { job: id("a") }, world.now);
    world.run();
    assert_eq!((world.state("a"), world.told(What::Cancelled)), (JobState::Done, 0));
    assert_eq!(world.key("a").error, None);
}

#[test]
fn tries_that_fail_are_repeated_and_counted() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    for attempt in 1..=3u32 {
        let record = world.key("a").clone();
        assert_eq!((record.state, record.attempts), (JobState::Assigned, attempt));
        let epoch = record.epoch;
        let gives_up = |w: &mut World| w.beat(0, |b| b.given_up = given_up("a", epoch, FailureClass::Timeout));
        world.seconds(1, gives_up);
        if attempt < 3 {
            assert_eq!(world.state("a"), JobState::Queued);
            world.seconds(5, gives_up);
        }
    }
    assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Failed, 3));
    assert_eq!((world.told(What::Failed), world.stored.dead.len()), (1, 1));
}

#[test]
fn no_room_is_no_try_and_another_worker_comes_first() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    assert_eq!(world.key("a").worker, Some(worker("g0", "i")));
    world.seconds(1, |w| {
        w.beat(0, |b| b.given_up = given_up("a", 1, FailureClass::NoCapacity));
        w.beat(1, |_| ());
    });
    let record = world.key("a");
    assert_eq!((record.worker.clone(), record.attempts, record.epoch), (Some(worker("g1", "i")), 1, 2));
}

#[test]
fn a_dead_workers_job_is_placed_again_above_its_epoch() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.beat(1, |_| ());
    world.seconds(4, |w| w.beat(1, |_| ()));
    let record = world.key("a");
    assert_eq!((record.state, record.epoch, record.attempts), (JobState::Assigned, 2, 2));
    assert_eq!(record.worker, Some(worker("g1", "i")));
    assert_eq!(world.told(What::Moved), 1);
}

#[test]
fn a_job_that_gets_on_survives_any_number_of_workers() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    for n in 1..6 {
        let epoch = world.key("a").epoch;
        world.store(&id("a"), epoch, None);
        let mark = world.stored.last(&id("a"));
        world.core.job(JobInput::Chain { id: id("a"), mark }, world.now);
        world.beat(n, |_| ());
        world.seconds(4, |w| w.beat(n, |_| ()));
        assert_eq!(world.state("a"), JobState::Assigned, "worker {n}");
    }
    for n in 6..9 {
        assert_eq!((world.state("a"), world.key("a").attempts), (JobState::Assigned, n as u32 - 5), "worker {n}");
        world.beat(n, |_| ());
        world.seconds(4, |w| w.beat(n, |_| ()));
    }
    assert_eq!(world.state("a"), JobState::Failed, "three tries without a final");
}

#[test]
fn a_lost_work_item_is_sent_again_and_a_silent_worker_is_passed_over() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    world.stored.work.clear();
    world.seconds(3, |w| w.beat(0, |_| ()));
    assert_eq!(world.stored.work.get(&(worker("g0", "i"), id("a"))), Some(&1));
    world.beat(1, |_| ());
    world.seconds(40, |w| {
        w.beat(0, |_| ());
        w.beat(1, |_| ());
    });
    let record = world.key("a");
    assert_eq!((record.worker.clone(), record.attempts), (Some(worker("g1", "i")), 1));
    assert!(!world.stored.work.contains_key(&(worker("g0", "i"), id("a"))));
}

#[test]
fn a_job_nobody_knows_is_let_go() {
    let mut world = World::new(1);
    world.seconds(1, |w| w.beat(0, |b| b.held = vec![holds_job("ghost", 3)]));
    assert_eq!(world.released, [(worker("g0", "i"), id("ghost"), 3)]);
}

#[test]
fn a_job_another_process_wrote_is_placed() {
    let mut world = World::new(1);
    let record = crate::testing::job("theirs");
    world.stored.keys.insert(id("theirs"), (record, 7));
    world.core.job(JobInput::Changed { id: id("theirs"), revision: 7, open: true }, world.now);
    world.run();
    assert_eq!(world.state("theirs"), JobState::Assigned);
}

#[test]
fn what_somebody_else_wrote_is_true() {
    let mut world = World::new(2);
    world.submit(1, "a");
    world.run();
    let mut record = world.key("a").clone();
    (record.worker, record.epoch) = (Some(worker("g1", "i")), 4);
    world.stored.revision += 1;
    let revision = world.stored.revision;
    world.stored.keys.insert(id("a"), (record, revision));
    world.core.job(JobInput::Changed { id: id("a"), revision, open: true }, world.now);
    world.run();
    let used = |gpu: &str| world.core.fleet.get(&worker(gpu, "i")).map(|w| w.jobs.used());
    assert_eq!((used("g0"), used("g1")), (Some(0), Some(1)));
    assert_eq!(world.stored.work.get(&(worker("g1", "i"), id("a"))), Some(&4));
    assert!(world.released.contains(&(worker("g0", "i"), id("a"), 1)));
}

#[test]
fn a_draining_worker_hands_over_when_there_is_room() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    let drains = |w: &mut World| {
        w.beat(0, |b| {
            b.draining = true;
            b.held = vec![holds_job("a", 1)];
        });
    };
    world.seconds(3, drains);
    assert_eq!(world.key("a").epoch, 1, "nobody else has room");
    world.seconds(2, |w| {
        drains(w);
        w.beat(1, |_| ());
    });
    let record = world.key("a");
    assert_eq!((record.worker.clone(), record.epoch, record.attempts), (Some(worker("g1", "i")), 2, 1));
    assert!(world.released.contains(&(worker("g0", "i"), id("a"), 1)));
}

#[test]
fn finals_are_told_by_their_kind() {
    let mut world = World::new(1);
    world.submit(1, "a");
    world.run();
    let mut end: Final = crate::testing::end_final("a", 0, 1, 2);
    world.core.finished(&end, world.now);
    world.run();
    assert_eq!(world.state("a"), JobState::Assigned, "a session of the same name");
    end.kind = Kind::Job;
    world.core.finished(&end, world.now);
    world.run();
    assert_eq!((world.state("a"), world.key("a").duration_ms), (JobState::Done, Some(1_000)));
}
