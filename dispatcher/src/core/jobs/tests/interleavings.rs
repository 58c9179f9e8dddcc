//! Everything that can happen, in any order: it settles all the same.

use proptest::prelude::*;

use super::*;

/// What may happen next.
#[derive(Debug, Clone)]
enum Step {
    /// One effect is carried out, or its answer is lost where that can be.
    Serve(usize),
    Lose(usize),
    Submit(u8),
    Cancel(u8),
    Second,
    /// A worker fetches, stores a final, ends, gives up, dies.
    Take(u8),
    Final(u8),
    End(u8),
    GiveUp(u8, bool),
    Die(u8),
    /// The dispatcher is killed and another takes over.
    Succeed,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0usize..8).prop_map(Step::Serve),
        1 => (0usize..8).prop_map(Step::Lose),
        3 => (0u8..4).prop_map(Step::Submit),
        1 => (0u8..4).prop_map(Step::Cancel),
        4 => Just(Step::Second),
        4 => (0u8..3).prop_map(Step::Take),
        2 => (0u8..3).prop_map(Step::Final),
        2 => (0u8..3).prop_map(Step::End),
        1 => ((0u8..3), any::<bool>()).prop_map(|(n, permanent)| Step::GiveUp(n, permanent)),
        1 => (0u8..3).prop_map(Step::Die),
        1 => Just(Step::Succeed),
    ]
}

/// A worker as the world plays it.
#[derive(Default, Clone)]
struct Played {
    generation: u32,
    held: BTreeMap<StreamId, (u64, Option<u64>)>,
    given_up: Vec<GivenUp>,
}

struct Play {
    world: World,
    workers: Vec<Played>,
    submitted: std::collections::BTreeSet<StreamId>,
    ended: BTreeMap<StreamId, usize>,
}

impl Play {
    fn new() -> Self {
        let mut play = Self {
            world: World::new(0),
            workers: vec![Played::default(); 3],
            submitted: Default::default(),
            ended: BTreeMap::new(),
        };
        play.beats();
        play.world.run();
        play
    }

    fn name(&self, n: usize) -> WorkerName {
        worker(&format!("g{n}"), &format!("i{}", self.workers[n].generation))
    }

    fn beats(&mut self) {
        for n in 0..self.workers.len() {
            let name = self.name(n);
            // What it was told to let go.
            for (to, job, epoch) in &self.world.released {
                if *to == name && self.workers[n].held.get(job).is_some_and(|(held, _)| held <= epoch) {
                    self.workers[n].held.remove(job);
                }
                if *to == name {
                    self.workers[n].given_up.retain(|g| g.id != *job || g.epoch > *epoch);
                }
            }
            let played = &self.workers[n];
            let mut heartbeat = beat(name.gpu_id.as_str(), name.incarnation.as_str());
            heartbeat.held = played
                .held
                .iter()
                .map(|(job, (epoch, index))| Held { final_index: *index, ..holds_job(job.as_str(), *epoch) })
                .collect();
            heartbeat.given_up = played.given_up.clone();
            self.world.core.heartbeat(heartbeat, self.world.now);
            self.world.gather();
        }
    }

    fn second(&mut self) {
        self.world.pass(Duration::from_secs(1));
        self.beats();
        testing::probe(&mut self.world.core, true, true, self.world.now);
        self.world.core.tick(self.world.now);
        self.world.gather();
    }

    fn take(&mut self, n: usize) {
        let name = self.name(n);
        let next = self.world.stored.work.iter().find(|((to, _), _)| *to == name);
        let Some(((_, job), epoch)) = next.map(|(place, epoch)| (place.clone(), *epoch)) else {
            return;
        };
        let index = self.world.stored.last(&job).map(|m| m.index);
        let held = self.workers[n].held.get(&job).map_or(0, |(held, _)| *held);
        if epoch > held {
            self.workers[n].held.insert(job, (epoch, index));
        }
    }

    /// The first job it holds and has not ended.
    fn holds(&self, n: usize) -> Option<(StreamId, u64)> {
        self.workers[n]
            .held
            .iter()
            .map(|(job, (epoch, _))| (job.clone(), *epoch))
            .find(|(job, _)| self.world.stored.last(job).is_none_or(|m| m.end.is_none()))
    }

    fn publish(&mut self, n: usize, end: Option<JobEnd>) {
        let Some((job, epoch)) = self.holds(n) else {
            return;
        };
        if !self.world.store(&job, epoch, end) {
            // Another has it: let go.
            self.workers[n].held.remove(&job);
            return;
        }
        let index = self.world.stored.last(&job).map(|m| m.index);
        self.workers[n].held.insert(job.clone(), (epoch, index));
        if self.world.stored.last(&job).is_some_and(|m| m.end.is_some()) {
            self.world.stored.work.remove(&(self.name(n), job.clone()));
        }
        let mark = self.world.stored.last(&job);
        self.world.core.job(JobInput::Chain { id: job, mark }, self.world.now);
        self.world.gather();
    }

    fn step(&mut self, step: &Step) {
        let count = self.world.open.len();
        match step {
            Step::Serve(at) if count > 0 => self.world.carry_out(at % count),
            Step::Lose(at) if count > 0 => {
                // Done, and the answer was lost.
                if let Effect::Job(effect) = self.world.open.remove(at % count) {
                    let answer = self.world.serve(effect);
                    let lost = match answer {
                        Some(JobInput::Saved { id, .. }) => {
                            Some(JobInput::Saved { id, result: Err(JobSaveError::Failed("lost".to_owned())) })
                        }
                        Some(JobInput::Sent { id, epoch, .. }) => {
                            Some(JobInput::Sent { id, epoch, result: Err("lost".to_owned()) })
                        }
                        Some(JobInput::Closed { id, .. }) => {
                            Some(JobInput::Closed { id, result: Err("lost".to_owned()) })
                        }
                        Some(JobInput::Loaded { id, .. }) => {
                            Some(JobInput::Loaded { id, result: Err("lost".to_owned()) })
                        }
                        Some(JobInput::Released { worker, id, epoch, .. }) => {
                            Some(JobInput::Released { worker, id, epoch, done: false })
                        }
                        other => other,
                    };
                    if let Some(input) = lost {
                        self.world.core.job(input, self.world.now);
                    }
                    self.world.gather();
                }
            }
            Step::Submit(n) => {
                let name = format!("j{n}");
                self.world.submit(u64::from(*n), &name);
                self.submitted.insert(id(&name));
            }
            Step::Cancel(n) => {
                let query = JobQuery { job: id(&format!("j{n}")) };
                self.world.core.ask_cancel(CallId(99), query, self.world.now);
                self.world.gather();
            }
            Step::Second => self.second(),
            Step::Take(n) => self.take(usize::from(*n)),
            Step::Final(n) => self.publish(usize::from(*n), None),
            Step::End(n) => self.publish(usize::from(*n), done()),
            Step::GiveUp(n, permanent) => {
                let n = usize::from(*n);
                if let Some((job, epoch)) = self.holds(n) {
                    self.workers[n].held.remove(&job);
                    self.world.stored.work.remove(&(self.name(n), job.clone()));
                    let class = if *permanent { FailureClass::BadAudio } else { FailureClass::Timeout };
                    self.workers[n].given_up.extend(given_up(job.as_str(), epoch, class));
                }
            }
            Step::Die(n) => {
                let n = usize::from(*n);
                let generation = self.workers[n].generation + 1;
                self.workers[n] = Played { generation, ..Played::default() };
            }
            Step::Succeed => {
                self.world.succeed();
                self.beats();
            }
            Step::Serve(_) | Step::Lose(_) => {}
        }
        self.check();
    }

    /// What must hold at every moment.
    fn check(&mut self) {
        let mut owners: BTreeMap<(StreamId, u64), Vec<usize>> = BTreeMap::new();
        for (n, played) in self.workers.iter().enumerate() {
            for (job, (epoch, _)) in &played.held {
                owners.entry((job.clone(), *epoch)).or_default().push(n);
            }
        }
        for (what, who) in owners {
            assert!(who.len() == 1, "{what:?} is held by {who:?}");
        }
        for (job, chain) in &self.world.stored.chains {
            assert!(chain.iter().filter(|m| m.end.is_some()).count() <= 1, "{job} ends twice");
            assert!(chain.windows(2).all(|w| w[0].epoch <= w[1].epoch), "{job}: epochs fall");
            if let Some((record, _)) = self.world.stored.keys.get(job) {
                assert!(chain.iter().all(|m| m.epoch <= record.epoch), "{job}: a final above its key");
            }
        }
        for (job, (record, _)) in &self.world.stored.keys {
            // Once ended, always ended.
            let known = self.ended.contains_key(job);
            assert!(!known || record.state.has_ended(), "{job} came back");
            if record.state.has_ended() {
                self.ended.insert(job.clone(), 1);
                let end = self.world.stored.last(job).and_then(|m| m.end).expect("an end final");
                assert_eq!(end.error.is_none(), record.state == JobState::Done, "{job}");
            }
        }
    }

    /// From here on everything works: workers fetch what they are given and end it.
    fn finish(&mut self) {
        for job in self.submitted.clone() {
            // Whoever got no answer asks again.
            self.world.submit(1, job.as_str());
        }
        for _ in 0..120 {
            while !self.world.open.is_empty() {
                self.world.carry_out(0);
                self.check();
            }
            self.second();
            for n in 0..self.workers.len() {
                self.take(n);
                self.publish(n, done());
                self.check();
            }
        }
        for job in &self.submitted {
            let (record, _) = self.world.stored.keys.get(job).expect("a key");
            assert!(record.state.has_ended(), "{job} is {record:?}, {:?}", self.world.core.jobs.book.get(job));
        }
        assert!(self.world.core.jobs.book.is_empty());
        assert!(self.workers.iter().all(|w| w.held.is_empty()), "everybody let go");
        let free = |w: &crate::fleet::Worker| w.jobs.used() == 0;
        assert!(self.world.core.fleet.workers().all(|(_, w)| free(w)), "every slot is free");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order, every submitted job ends, exactly once, and nobody keeps a slot.
    #[test]
    fn any_order_of_events_settles(steps in prop::collection::vec(step(), 0..80)) {
        let mut play = Play::new();
        for step in &steps {
            play.step(step);
        }
        play.finish();
    }
}
