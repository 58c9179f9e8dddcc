//! Everything that is said while things break, and what is meant to become of it.

use std::{ops::Range, sync::Arc, time::Duration};

use async_nats::jetstream;
use serde_json::Value;
use tokio::task::JoinSet;

use super::{
    Plan,
    talk::{self, Said, Talk},
};
use crate::{
    Result,
    audio::{self, Pcm},
    dice::Dice,
    verdict::JobEnd,
};

/// Of so many sessions one speaks poison, where inputs may be harmful at all.
const POISON_TALK: usize = 40;
/// Of so many jobs one is poison, and one is no recording.
const POISON_JOB: usize = 12;
const BAD_JOB: usize = 6;
const CALL_WAIT: Duration = Duration::from_secs(2);

/// How a job is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meant {
    Done,
    /// It kills each engine that decodes it.
    Crash,
    /// It is no recording.
    Bad,
}

impl Meant {
    fn of(number: usize, harmless: bool) -> Self {
        match number {
            _ if harmless => Meant::Done,
            n if n % POISON_JOB == 4 => Meant::Crash,
            n if n % BAD_JOB == 1 => Meant::Bad,
            _ => Meant::Done,
        }
    }

    /// What is wrong with this end, if anything.
    pub fn problem(self, end: &JobEnd) -> Option<String> {
        let meant = match self {
            Meant::Done => None,
            Meant::Crash => Some("engine_crash"),
            Meant::Bad => Some("bad_audio"),
        };
        match (meant, end) {
            (_, JobEnd::Open) => Some("has no end".to_owned()),
            (None, JobEnd::Done) => None,
            (None, JobEnd::Failed(class)) => Some(format!("failed ({class}), and nothing was wrong with it")),
            (Some(meant), JobEnd::Failed(class)) if class == meant => None,
            (Some(meant), JobEnd::Failed(class)) => Some(format!("failed ({class}), and was to fail ({meant})")),
            (Some(meant), JobEnd::Done) => Some(format!("is done, and was to fail ({meant})")),
        }
    }
}

/// What was heard of a submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Waiting,
    Accepted,
    /// No answer said that it was accepted; it may be all the same.
    Unheard(String),
}

/// A job that was handed in, or is being.
#[derive(Debug, Clone)]
pub struct Job {
    pub id: String,
    /// None: no recording at all.
    pub pcm: Option<Arc<Pcm>>,
    pub meant: Meant,
    pub answer: Answer,
    /// Its end has been seen.
    ended: bool,
}

impl Job {
    pub fn samples(&self) -> &[i16] {
        self.pcm.as_deref().map_or(&[], |pcm| &pcm.samples)
    }
}

pub struct Load {
    plan: Plan,
    js: jetstream::Context,
    dice: Dice,
    count: usize,
    spoken: usize,
    talks: JoinSet<Said>,
    pub said: Vec<Said>,
    submissions: JoinSet<(usize, Result<()>)>,
    pub jobs: Vec<Job>,
    /// Of the load itself.
    pub problems: Vec<String>,
}

impl Load {
    pub fn new(plan: &Plan, js: jetstream::Context) -> Self {
        Self {
            plan: plan.clone(),
            js,
            dice: Dice::new(plan.seed),
            count: 0,
            spoken: 0,
            talks: JoinSet::new(),
            said: Vec::new(),
            submissions: JoinSet::new(),
            jobs: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// Keeps as many sessions and jobs going as planned.
    pub async fn tend(&mut self) {
        self.gather();
        while self.talks.len() < self.plan.sessions {
            let talk = self.next_talk();
            self.talks.spawn(talk::talk(self.js.clone(), talk));
        }
        let mut going = self.submissions.len();
        for job in self.jobs.iter_mut().filter(|j| j.answer == Answer::Accepted && !j.ended) {
            job.ended = has_ended(&self.js, "job", &job.id).await;
            going += usize::from(!job.ended);
        }
        if going < self.plan.jobs {
            self.hand_in();
        }
    }

    fn hand_in(&mut self) {
        self.count += 1;
        let (seed, seconds) = (self.plan.seed * 100_000 + self.count as u64, self.dice.between(20.0, 120.0));
        let number = self.jobs.len();
        let meant = Meant::of(number, self.plan.harmless);
        let mut pcm = audio::blasts(seed, seconds);
        if meant == Meant::Crash
            && let Some(place) = talk::place_for_poison(&pcm, pcm.samples.len() as u64 / 4)
        {
            talk::poisoned(&mut pcm, &place);
        }
        let pcm = (meant != Meant::Bad).then(|| Arc::new(pcm));
        let id = format!("chaos-j{}-{}", self.plan.seed, self.count);
        let priority = ["high", "normal", "low"][self.dice.below(3)];
        let (js, job, recording) = (self.js.clone(), id.clone(), pcm.clone());
        self.submissions.spawn(async move {
            let bytes = recording.map_or_else(|| vec![7; 5_000], |pcm| pcm.wav());
            (number, talk::submit_bytes(js, job, bytes, priority).await)
        });
        self.jobs.push(Job { id, pcm, meant, answer: Answer::Waiting, ended: false });
    }

    fn next_talk(&mut self) -> Talk {
        self.count += 1;
        self.spoken += 1;
        let seed = self.plan.seed * 100_000 + self.count as u64;
        let seconds = self.dice.between(8.0, 40.0);
        let poison =
            (!self.plan.harmless && self.spoken % POISON_TALK == 9).then(|| poison_in(seed, seconds)).flatten();
        Talk {
            id: format!("chaos-s{}-{}", self.plan.seed, self.count),
            poison,
            seed,
            seconds,
            speed: self.dice.between(1.0, 4.0),
            chunk_ms: [40, 100, 200, 400][self.dice.below(4)],
        }
    }

    /// Takes what has come to its end.
    fn gather(&mut self) {
        while let Some(done) = self.talks.try_join_next() {
            self.spoke(done);
        }
        while let Some(done) = self.submissions.try_join_next() {
            self.submitted(done);
        }
    }

    fn spoke(&mut self, done: std::result::Result<Said, tokio::task::JoinError>) {
        match done {
            Ok(said) => self.said.push(said),
            Err(e) => self.problems.push(format!("a producer came to no end: {e}")),
        }
    }

    fn submitted(&mut self, done: std::result::Result<(usize, Result<()>), tokio::task::JoinError>) {
        match done {
            Ok((number, answer)) => {
                self.jobs[number].answer = match answer {
                    Ok(()) => Answer::Accepted,
                    Err(e) => Answer::Unheard(e.to_string()),
                };
            }
            Err(e) => self.problems.push(format!("a submission came to no end: {e}")),
        }
    }

    /// Lets everybody finish what he began, and waits until all of it has an end.
    pub async fn finish(&mut self) {
        while let Some(done) = self.talks.join_next().await {
            self.spoke(done);
        }
        while let Some(done) = self.submissions.join_next().await {
            self.submitted(done);
        }
        self.ask_again().await;
        let sessions = self.said.iter().filter(|s| s.gave_up.is_none()).map(|s| ("session", s.id.clone()));
        let jobs = self.jobs.iter().filter(|j| j.answer == Answer::Accepted).map(|j| ("job", j.id.clone()));
        for (kind, id) in sessions.chain(jobs).collect::<Vec<_>>() {
            while !has_ended(&self.js, kind, &id).await {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }

    /// A job whose answer nobody heard was accepted all the same if it has a record.
    async fn ask_again(&mut self) {
        for job in self.jobs.iter_mut().filter(|j| j.answer != Answer::Accepted) {
            if record(&self.js, "job", &job.id).await.is_some() {
                job.answer = Answer::Accepted;
            }
        }
    }

    /// After the quiet phase: whoever still waits is a problem, and what he has brought about is judged.
    pub async fn close(&mut self) {
        self.gather();
        for _ in 0..self.talks.len() {
            self.problems.push("a producer is still waiting for an acknowledgement".to_owned());
        }
        self.talks.shutdown().await;
        self.submissions.shutdown().await;
        self.ask_again().await;
    }
}

fn poison_in(seed: u64, seconds: f64) -> Option<Range<u64>> {
    let pcm = audio::blasts(seed, seconds);
    talk::place_for_poison(&pcm, pcm.samples.len() as u64 / 4)
}

/// The newest value of the key of a session or job.
pub async fn record(js: &jetstream::Context, kind: &str, id: &str) -> Option<Value> {
    let read = async {
        let stream = js.get_stream_no_info(format!("KV_asr_{kind}s")).await.ok()?;
        stream.get_last_raw_message_by_subject(&format!("$KV.asr_{kind}s.{id}")).await.ok()
    };
    let message = tokio::time::timeout(CALL_WAIT, read).await.ok().flatten()?;
    serde_json::from_slice(&message.payload).ok()
}

/// Whether its chain has its end; no where nobody answers.
pub async fn has_ended(js: &jetstream::Context, kind: &str, id: &str) -> bool {
    let subject = format!("asr.v1.transcript.{kind}.{id}.final");
    let last = async {
        let stream = js.get_stream_no_info("ASR_TRANSCRIPT").await.ok()?;
        stream.get_last_raw_message_by_subject(&subject).await.ok()
    };
    let last = tokio::time::timeout(CALL_WAIT, last).await.ok().flatten();
    let json: Option<Value> = last.and_then(|m| serde_json::from_slice(&m.payload).ok());
    json.is_some_and(|j| j["end"] == true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_job_is_a_problem_unless_it_was_meant() {
        let failed = |class: &str| JobEnd::Failed(class.to_owned());
        for (meant, end) in
            [(Meant::Done, JobEnd::Done), (Meant::Crash, failed("engine_crash")), (Meant::Bad, failed("bad_audio"))]
        {
            assert_eq!(meant.problem(&end), None, "{meant:?}");
            assert!(meant.problem(&JobEnd::Open).is_some());
        }
        for (meant, end) in [
            (Meant::Done, failed("engine_crash")),
            (Meant::Done, failed("timeout")),
            (Meant::Crash, JobEnd::Done),
            (Meant::Crash, failed("bad_audio")),
            (Meant::Bad, JobEnd::Done),
            (Meant::Bad, failed("internal")),
        ] {
            assert!(meant.problem(&end).is_some(), "{meant:?} {end:?}");
        }
    }

    #[test]
    fn a_few_jobs_are_meant_to_fail() {
        let all: Vec<Meant> = (0..24).map(|n| Meant::of(n, false)).collect();
        assert_eq!(all.iter().filter(|m| **m == Meant::Crash).count(), 2);
        assert_eq!(all.iter().filter(|m| **m == Meant::Bad).count(), 4);
        assert!((0..24).all(|n| Meant::of(n, true) == Meant::Done));
    }

    #[test]
    fn poison_lies_whole_in_speech() {
        let place = poison_in(7, 20.0).expect("a place");
        assert_eq!(place.end - place.start, talk::POISON_RUN);
        let mut pcm = audio::blasts(7, 20.0);
        talk::poisoned(&mut pcm, &place);
        assert!(pcm.samples[place.start as usize..place.end as usize].iter().all(|s| *s == i16::MAX));
        assert!(place.start >= pcm.samples.len() as u64 / 4);
    }
}
