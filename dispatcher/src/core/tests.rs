mod crash_points;
mod crowds;
mod device;
mod drains;
mod engines;
mod interleavings;
mod links;
mod servers;
mod services;
mod spans;
mod troubles;

use std::time::Duration;

use voxfleet_schema::{
    failure::FailureClass,
    session::{OpenRequest, SessionOptions},
};

use super::*;
use crate::testing::{self, beat, end_final, held, id, session as world_record, worker};

const MS: Duration = Duration::from_millis(1);

/// A core whose effects are answered by a world in which everything works, unless a test answers for itself.
struct World {
    core: Core,
    now: Moment,
    revision: u64,
    told: Vec<Event>,
    answers: Vec<(CallId, Answer)>,
    hints: Vec<(String, u64, Option<u64>)>,
    assigned: Vec<(String, String, u64)>,
    releases: Vec<(String, u64)>,
    /// Of the last release.
    finish_ms: u32,
    /// Kinds of effect that the test answers.
    keep: fn(&Effect) -> bool,
    kept: Vec<Effect>,
}

impl World {
    fn new(gpus: u32) -> Self {
        let core = Core::new(DispatcherConfig::default(), "d".to_owned(), Subjects::new("asr.v1"));
        let mut world = Self {
            core,
            now: Moment { mono: Duration::from_secs(10), unix_ms: 0 },
            revision: 0,
            told: Vec::new(),
            answers: Vec::new(),
            hints: Vec::new(),
            assigned: Vec::new(),
            releases: Vec::new(),
            finish_ms: 0,
            keep: |_| false,
            kept: Vec::new(),
        };
        for n in 0..gpus {
            world.beat(n, |_| ());
        }
        world
    }

    fn beat(&mut self, n: u32, change: impl FnOnce(&mut Heartbeat)) {
        let mut heartbeat = beat(&format!("g{n}"), "i");
        heartbeat.device.index = Some(n);
        change(&mut heartbeat);
        self.core.heartbeat(heartbeat, self.now);
        self.run();
    }

    fn run(&mut self) {
        loop {
            self.core.settle(self.now);
            let effects: Vec<Effect> = self.core.effects().collect();
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                if (self.keep)(&effect) {
                    self.kept.push(effect);
                } else {
                    self.carry_out(effect);
                }
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        let now = self.now;
        self.revision += 1;
        match effect {
            Effect::Load { id } => self.core.loaded(&id, Ok(Loaded::default()), now),
            Effect::Save { id, .. } => self.core.saved(&id, Ok(self.revision), now),
            Effect::Ask { worker, assignment } => {
                let Assignment { id, epoch, .. } = *assignment;
                self.assigned.push((id.to_string(), worker.gpu_id.to_string(), epoch));
                self.core.asked(&id, epoch, &worker, AskReply::Taken, now);
            }
            Effect::Release { worker, id, epoch, finish_ms } => {
                self.releases.push((id.to_string(), epoch));
                self.finish_ms = finish_ms;
                self.core.released(&worker, &id, epoch, true, now);
            }
            Effect::Admit { heartbeat } => {
                let ready = Admission::Ready { revision: self.revision, drain_until_ms: None };
                self.core.admitted(&heartbeat.worker(), ready, now);
            }
            Effect::Note { heartbeat, .. } => self.core.noted(&heartbeat.worker(), Ok(self.revision)),
            Effect::Tell { event, .. } => self.told.push(*event),
            Effect::Answer { call, answer } => self.answers.push((call, *answer)),
            Effect::Hint { id, entry, prev, .. } => self.hints.push((id.to_string(), entry.seq, prev)),
            Effect::Bury { worker, .. } => self.core.buried(&worker, Burial::Written, now),
            Effect::Drain { worker, .. } => self.core.drained(&worker, &AskReply::Taken),
            other => self.kept.push(other),
        }
    }

    fn answer_kept(&mut self) {
        for effect in std::mem::take(&mut self.kept) {
            self.carry_out(effect);
        }
        self.run();
    }

    fn audio(&mut self, session: &str, seq: u64) {
        self.entry(session, seq, &[], b"ab");
    }

    fn entry(&mut self, session: &str, seq: u64, headers: &[(&str, &str)], payload: &'static [u8]) {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        self.core.entry(&Ok(id(session)), RawEntry { seq, headers, payload: payload.into() }, self.now);
        self.run();
    }

    fn wait(&mut self, time: Duration) {
        self.now.mono += time;
    }

    /// Seconds that pass with heartbeats, an answering stream and ticks.
    fn seconds(&mut self, count: u64, beats: impl Fn(&mut Self)) {
        for _ in 0..count {
            self.wait(Duration::from_secs(1));
            beats(self);
            testing::probe(&mut self.core, true, true, self.now);
            self.core.tick(self.now);
            self.run();
        }
    }

    fn ask(&mut self, call: u64, session: &str, asked: crate::sessions::Asked) {
        self.core.ask_about(&id(session), CallId(call), asked, self.now);
        self.run();
    }

    fn open(&mut self, call: u64, session: &str) -> Option<Answer> {
        self.ask(call, session, crate::sessions::Asked::Open(Box::default(), None));
        self.answers.iter().find(|(c, _)| *c == CallId(call)).map(|(_, a)| a.clone())
    }

    fn record(&self, session: &str) -> &SessionRecord {
        &self.core.book.session(&id(session)).expect("a session").record
    }

    fn state(&self, session: &str) -> SessionState {
        self.record(session).state
    }

    fn told(&self, what: What) -> usize {
        self.told.iter().filter(|e| e.what == what).count()
    }

    fn kept(&self, kind: fn(&Effect) -> bool) -> usize {
        self.kept.iter().filter(|e| kind(e)).count()
    }
}

fn refused(answer: Option<Answer>) -> FailureClass {
    match answer {
        Some(Answer::Refused(failure)) => failure.class,
        other => panic!("{other:?}"),
    }
}

#[test]
fn sixteen_at_once_land_in_turns_before_any_worker_has_answered() {
    let mut world = World::new(4);
    world.keep = |e| matches!(e, Effect::Save { .. });
    for n in 0..17 {
        world.audio(&format!("s{n:02}"), n + 1);
    }
    world.answer_kept();
    world.answer_kept();
    let gpus: Vec<_> = world.assigned.iter().map(|(_, gpu, _)| gpu.as_str()).collect();
    assert_eq!(gpus, ["g0", "g1", "g2", "g3"].repeat(4));
    assert_eq!(world.state("s16"), SessionState::Waiting);
    assert_eq!(world.told(What::Waiting), 1);
}

#[test]
fn hints_follow_the_assignment_and_name_the_entry_before() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    world.audio("s", 5);
    world.audio("s", 6);
    assert!(world.hints.is_empty(), "nobody has it yet");
    world.answer_kept();
    world.audio("s", 9);
    world.entry("s", 10, &[("Asr-End", "1")], b"");
    assert_eq!(world.hints, [("s".to_owned(), 9, Some(6)), ("s".to_owned(), 10, Some(9))]);
}

#[test]
fn the_cursor_waits_for_the_key() {
    let mut world = World::new(1);
    world.audio("known", 3);
    assert_eq!(world.core.cursor(), 3);
    world.keep = |e| matches!(e, Effect::Load { .. } | Effect::Save { .. });
    world.audio("new", 4);
    world.audio("known", 5);
    assert_eq!(world.core.cursor(), 3);
    world.answer_kept();
    assert_eq!(world.core.cursor(), 3, "read, but not written yet");
    world.answer_kept();
    assert_eq!(world.core.cursor(), 5);
    world.entry("bad", 6, &[], b"odd");
    assert_eq!(world.core.cursor(), 6, "a bad chunk opens nothing");
}

#[test]
fn a_write_whose_answer_was_lost_is_looked_up() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Save { .. } | Effect::Load { .. });
    world.audio("s", 1);
    world.answer_kept();
    let Some(Effect::Save { record, revision: None, .. }) = world.kept.pop() else { panic!("a new key") };
    world.core.saved(&id("s"), Err(SaveError::Failed("timeout".to_owned())), world.now);
    world.run();
    assert!(world.kept.is_empty(), "not at once");
    world.seconds(2, |w| w.beat(0, |_| ()));
    assert!(matches!(world.kept.pop(), Some(Effect::Load { .. })));
    let found = Loaded { record: Some((*record, 7)), ..Loaded::default() };
    world.core.loaded(&id("s"), Ok(found), world.now);
    world.run();
    assert_eq!(world.assigned, [("s".to_owned(), "g0".to_owned(), 1)]);
    assert_eq!(world.core.cursor(), 1);
}

#[test]
fn what_somebody_else_wrote_is_true() {
    let mut world = World::new(2);
    world.keep = |e| matches!(e, Effect::Save { .. } | Effect::Load { .. });
    world.audio("s", 1);
    world.answer_kept();
    let Some(Effect::Save { mut record, .. }) = world.kept.pop() else { panic!("a write") };
    world.core.saved(&id("s"), Err(SaveError::Conflict), world.now);
    world.run();
    world.kept.clear();
    record.worker = Some(worker("g1", "i"));
    record.epoch = 4;
    let found = Loaded { record: Some((*record, 9)), ..Loaded::default() };
    world.core.loaded(&id("s"), Ok(found), world.now);
    world.run();
    assert_eq!(world.assigned, [("s".to_owned(), "g1".to_owned(), 4)]);
    let used = |gpu: &str| world.core.fleet.get(&worker(gpu, "i")).map(|w| w.load.used());
    assert_eq!((used("g0"), used("g1")), (Some(0), Some(1)));
}

#[test]
fn an_open_that_every_worker_refuses_is_refused_and_never_reuses_an_epoch() {
    let mut world = World::new(2);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    assert_eq!(world.open(1, "s"), None);
    for epoch in 1..=2 {
        let Some(Effect::Ask { worker, assignment }) = world.kept.pop() else { panic!("attempt {epoch}") };
        assert_eq!(assignment.epoch, epoch);
        let no = Failure::new(FailureClass::NoCapacity, "no permit");
        world.core.asked(&id("s"), epoch, &worker, AskReply::Refused(no), world.now);
        world.run();
    }
    assert!(world.kept.is_empty(), "both refused");
    let answer = world.answers.iter().find(|(c, _)| *c == CallId(1)).map(|(_, a)| a.clone());
    assert_eq!(refused(answer), FailureClass::NoCapacity);
    assert_eq!(world.state("s"), SessionState::Ended);
    world.open(2, "s");
    let Some(Effect::Ask { assignment, .. }) = world.kept.pop() else { panic!("asked again") };
    assert_eq!(assignment.epoch, 3, "opening again forgets who refused");
}

#[test]
fn a_refusing_worker_is_left_out_until_its_next_heartbeat_but_one() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Ask { .. });
    world.audio("s", 1);
    world.kept.clear();
    let no = AskReply::Silent("timeout".to_owned());
    world.core.asked(&id("s"), 1, &worker("g0", "i"), no, world.now);
    world.run();
    assert_eq!(world.state("s"), SessionState::Waiting);
    for (seq, asked) in [(1, 0), (2, 1)] {
        world.beat(0, |b| b.seq = seq);
        assert_eq!(world.kept.len(), asked, "heartbeat {seq}");
    }
}

#[test]
fn silence_is_fenced_by_the_last_entry_and_stands_still_with_the_stream() {
    let mut world = World::new(1);
    world.audio("s", 7);
    let beats = |w: &mut World| w.beat(0, |b| b.held = vec![held("s", 1)]);
    let appends = |e: &Effect| matches!(e, Effect::Append { .. });
    for _ in 0..30 {
        world.wait(Duration::from_secs(1));
        beats(&mut world);
        testing::probe(&mut world.core, false, true, world.now);
        world.core.tick(world.now);
        world.run();
    }
    assert_eq!(world.kept(appends), 0, "nobody could speak");
    world.seconds(3, beats);
    let Some(Effect::Append { mark: Mark::Pause, expect: Some(7), .. }) = world.kept.pop() else {
        panic!("a fenced flush: {:?}", world.kept)
    };
    world.core.appended(&id("s"), Mark::Pause, Err(AppendError::Conflict { last: Some(8) }), world.now);
    world.audio("s", 8);
    world.seconds(1, beats);
    assert_eq!(world.kept(appends), 0, "whoever spoke wins");
    world.seconds(2, beats);
    assert!(matches!(world.kept.pop(), Some(Effect::Append { expect: Some(8), .. })));
    world.core.appended(&id("s"), Mark::Pause, Ok(9), world.now);
    world.entry("s", 9, &[("Asr-Flush", "1"), ("Asr-Cause", "pause")], b"");
    world.seconds(56, beats);
    assert_eq!(world.kept(appends), 0);
    world.seconds(4, beats);
    assert!(matches!(world.kept.pop(), Some(Effect::Append { mark: Mark::Idle, expect: Some(9), .. })));
}

#[test]
fn an_end_final_ends_it_and_frees_the_slot() {
    let mut world = World::new(1);
    world.audio("s", 1);
    world.entry("s", 2, &[("Asr-End", "1")], b"");
    world.core.finished(&end_final("s", 0, 1, 2), world.now);
    world.run();
    assert_eq!((world.state("s"), world.record("s").ended_seq), (SessionState::Ended, Some(2)));
    assert_eq!((world.releases.as_slice(), world.finish_ms), (&[("s".to_owned(), 1)][..], 2_000), "it may hear of it");
    assert_eq!(world.core.fleet.get(&worker("g0", "i")).map(|w| w.load.used()), Some(0));
    assert_eq!(world.told(What::Ended), 1);
}

#[test]
fn audio_read_while_the_end_is_written_is_not_lost() {
    let mut world = World::new(1);
    world.audio("s", 1);
    world.entry("s", 2, &[("Asr-End", "1")], b"");
    world.keep = |e| matches!(e, Effect::Save { .. } | Effect::Walk { .. });
    world.core.finished(&end_final("s", 0, 1, 2), world.now);
    world.run();
    world.audio("s", 3);
    assert_eq!(world.core.cursor(), 2, "its key may say ended at any time");
    let Some(save) = world.kept.pop() else { panic!("a write") };
    world.carry_out(save);
    world.run();
    let Some(Effect::Walk { from: None, .. }) = world.kept.pop() else { panic!("a look behind the end") };
    let walker = Box::new(Walker::after(&end_final("s", 0, 1, 2)));
    let opener = Some(Opener { seq: 3, options: None, source: None, trace: None });
    world.core.walked(&id("s"), Ok(WalkEnd { walker, opener, rejected: Vec::new(), last: None }), world.now);
    world.run();
    assert_eq!(world.core.cursor(), 2);
    world.answer_kept();
    assert_eq!(world.assigned.last(), Some(&("s".to_owned(), "g0".to_owned(), 2)));
    assert_eq!(world.core.cursor(), 3);
    world.core.finished(&end_final("s", 0, 1, 2), world.now);
    world.seconds(1, |_| ());
    assert_eq!(world.state("s"), SessionState::Assigned, "the end it was reopened behind no longer counts");
}

#[test]
fn a_missing_key_opens_above_the_last_final_and_never_by_an_entry_it_covers() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Load { .. } | Effect::Walk { .. });
    world.audio("s", 2);
    world.kept.clear();
    let last = end_final("s", 3, 9, 4);
    let found = Loaded { record: None, chain: Some(ChainMark::from(&last)), last: Some((4, true)) };
    world.core.loaded(&id("s"), Ok(found), world.now);
    world.run();
    world.audio("s", 3);
    world.audio("s", 4);
    assert!(world.kept.is_empty() && world.assigned.is_empty());
    assert_eq!(world.core.cursor(), 4);
    world.audio("s", 5);
    assert!(matches!(world.kept.pop(), Some(Effect::Walk { .. })));
    let walker = Box::new(Walker::after(&last));
    let opener = Some(Opener { seq: 5, options: None, source: None, trace: None });
    world.core.walked(&id("s"), Ok(WalkEnd { walker, opener, rejected: Vec::new(), last: None }), world.now);
    world.run();
    assert_eq!(world.assigned, [("s".to_owned(), "g0".to_owned(), 10)]);
}

#[test]
fn a_dead_workers_sessions_move_before_new_ones_come() {
    let mut world = World::new(2);
    for n in 0..8 {
        world.audio(&format!("s{n}"), n + 1);
    }
    let beats = |w: &mut World| {
        w.beat(1, |b| b.held = (0..8).filter(|n| n % 2 == 1).map(|n| held(&format!("s{n}"), 1)).collect());
    };
    world.seconds(2, beats);
    assert_eq!(world.told(What::Dead), 0);
    world.seconds(2, beats);
    assert_eq!(world.told(What::Dead), 1);
    assert_eq!(world.core.waiting.len(), 4, "no room for them");
    assert_eq!(refused(world.open(1, "new")), FailureClass::NoCapacity);
    world.beat(2, |_| ());
    assert_eq!(world.told(What::Moved), 4);
    assert!(world.core.waiting.is_empty());
    let epochs: Vec<_> = world.assigned[8..].iter().map(|(_, gpu, epoch)| (gpu.as_str(), *epoch)).collect();
    assert_eq!(epochs, [("g2", 2); 4]);
}

#[test]
fn a_draining_worker_keeps_its_sessions_until_there_is_room_elsewhere() {
    let mut world = World::new(1);
    world.audio("s", 1);
    let drains = |w: &mut World| {
        w.beat(0, |b| {
            b.draining = true;
            b.held = vec![held("s", 1)];
        });
    };
    world.seconds(2, drains);
    assert_eq!((world.state("s"), world.assigned.len()), (SessionState::Assigned, 1));
    world.seconds(1, |w| {
        drains(w);
        w.beat(1, |_| ());
    });
    assert_eq!(world.assigned.last(), Some(&("s".to_owned(), "g1".to_owned(), 2)));
    assert_eq!(world.told(What::Moved), 1);
    assert_eq!(world.releases, [("s".to_owned(), 1)], "the old owner is told at once");
}

#[test]
fn a_session_nobody_knows_is_let_go() {
    let mut world = World::new(1);
    world.seconds(1, |w| w.beat(0, |b| b.held = vec![held("ghost", 3)]));
    world.releases.dedup();
    assert_eq!(world.releases, [("ghost".to_owned(), 3)]);
}

#[test]
fn an_open_is_idempotent_and_strict_about_options() {
    let mut world = World::new(1);
    let Some(Answer::Opened(opened)) = world.open(1, "s") else { panic!("{:?}", world.answers) };
    assert_eq!(world.open(2, "s"), Some(Answer::Opened(opened)));
    let options = SessionOptions { endpoint_ms: 300, ..SessionOptions::default() };
    let request = OpenRequest { session: id("s"), options };
    world.ask(3, "s", crate::sessions::Asked::Open(Box::new(request.options), None));
    let answer = world.answers.pop().map(|(_, a)| a);
    assert_eq!(refused(answer), FailureClass::BadRequest);
    assert_eq!(world.assigned.len(), 1);
}

#[test]
fn two_opens_at_once_get_the_same_answer() {
    let mut world = World::new(1);
    world.keep = |e| matches!(e, Effect::Load { .. } | Effect::Save { .. });
    world.open(1, "s");
    world.open(2, "s");
    world.answer_kept();
    world.open(3, "s");
    world.answer_kept();
    assert_eq!(world.assigned.len(), 1);
    assert_eq!(world.answers.len(), 3);
    assert!(world.answers.iter().all(|(_, a)| matches!(a, Answer::Opened(o) if o.epoch == 1)));
}

#[test]
fn idle_time_of_a_session_that_never_spoke_runs_too() {
    let mut world = World::new(1);
    world.open(1, "s");
    world.seconds(62, |w| w.beat(0, |b| b.held = vec![held("s", 1)]));
    assert!(matches!(world.kept.pop(), Some(Effect::Append { mark: Mark::Idle, expect: Some(0), .. })));
    assert!(world.now.mono > 60_000 * MS);
}
