//! Chaos: many sessions and jobs on a fleet in which something goes wrong every few seconds, and afterwards the question
//! whether every acknowledged sample was transcribed exactly once.
//!
//! | module | holds |
//! |---|---|
//! | [`schedule`] | which faults come when, from a seed |
//! | [`hands`] | breaks and mends |
//! | [`talk`] | producers and jobs |

pub mod hands;
pub mod schedule;
pub mod talk;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_nats::jetstream;
use tokio::{task::JoinSet, time::Instant};

use self::{
    hands::Hands,
    schedule::{Fault, Schedule},
    talk::{Said, Talk},
};
use crate::{
    Error, Result,
    audio::{self, Pcm},
    checker,
    dice::Dice,
    fleet::Fleet,
    verdict::{self, JobEnd, Verdict},
    wire::{Fate, Publish, Tamper},
};

/// A fault layer at the dispatcher's publishes: this share of the hints is dropped, doubled, or so late that others overtake
/// it, each a third. Everything else passes.
pub fn hint_faults(seed: u64, share: f64) -> impl Tamper {
    let dice = Mutex::new(Dice::new(seed ^ 0x0417));
    move |publish: &mut Publish| {
        if !publish.subject.contains(".live.") {
            return Fate::Pass;
        }
        let mut dice = dice.lock().unwrap_or_else(PoisonError::into_inner);
        if !dice.chance(share) {
            return Fate::Pass;
        }
        match dice.below(3) {
            0 => Fate::Drop,
            1 => Fate::Double,
            _ => Fate::Late(Duration::from_millis(dice.below(700) as u64)),
        }
    }
}

/// No new session or job in the last seconds of the faults: what began must have been under fire, and must end.
const LAST_START_S: f64 = 8.0;
/// How long everything may take to end once nothing breaks any more.
const QUIET: Duration = Duration::from_secs(150);
/// How often processes are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What to do to a fleet.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub lasting: Duration,
    /// Sessions at once.
    pub sessions: usize,
    /// Jobs at once.
    pub jobs: usize,
    /// Only faults of these names; empty = all.
    pub only: Vec<String>,
    /// Where logs and everything known of what went wrong is left.
    pub keep: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub kills: u64,
    pub faults: BTreeMap<&'static str, u64>,
    /// Faults that found nothing to break.
    pub skipped: u64,
    pub seconds: f64,
    pub quiet_seconds: f64,
    pub sessions: u64,
    pub audio_seconds: f64,
    /// Sessions whose last final is not of their first owner.
    pub sessions_moved: u64,
    pub finals: u64,
    pub jobs_done: u64,
    /// Failed or dead-lettered, by class.
    pub jobs_failed: BTreeMap<String, u64>,
    pub without_end: u64,
    pub samples_lost: u64,
    pub samples_repeated: u64,
    pub finals_repeated: u64,
    pub clicks: u64,
    /// Processes that ended by themselves.
    pub unexpected_ends: Vec<String>,
    /// Requests that came to nothing; no promise was broken.
    pub refused: Vec<String>,
    pub problems: Vec<String>,
}

impl Report {
    pub fn jobs(&self) -> u64 {
        self.jobs_done + self.jobs_failed.values().sum::<u64>()
    }

    pub fn kills_per_minute(&self) -> f64 {
        self.kills as f64 * 60.0 / self.seconds.max(1.0)
    }

    pub fn is_clean(&self) -> bool {
        self.samples_lost == 0
            && self.samples_repeated == 0
            && self.finals_repeated == 0
            && self.without_end == 0
            && self.problems.is_empty()
            && self.unexpected_ends.is_empty()
    }

    fn add(&mut self, kind: &str, id: &str, verdict: Verdict) {
        self.samples_lost += verdict.samples_lost;
        self.samples_repeated += verdict.samples_repeated;
        self.finals_repeated += verdict.finals_repeated;
        self.clicks += verdict.clicks;
        self.finals += verdict.finals;
        self.problems.extend(verdict.problems.iter().map(|p| format!("{kind} {id}: {p}")));
    }
}

/// A job that was accepted.
struct Job {
    id: String,
    pcm: Pcm,
}

/// Everything that is said while things break.
struct Load {
    plan: Plan,
    js: jetstream::Context,
    dice: Dice,
    count: usize,
    talks: JoinSet<Said>,
    said: Vec<Said>,
    submissions: JoinSet<(Job, Result<()>)>,
    jobs: Vec<Job>,
    refused: Vec<String>,
    /// Jobs whose end has been seen.
    ended: BTreeSet<String>,
}

impl Load {
    /// Keeps as many sessions and jobs going as planned.
    async fn tend(&mut self) {
        while let Some(done) = self.talks.try_join_next() {
            self.said.extend(done.ok());
        }
        while let Some(done) = self.submissions.try_join_next() {
            self.submitted(done.ok());
        }
        while self.talks.len() < self.plan.sessions {
            let talk = self.next_talk();
            self.talks.spawn(talk::talk(self.js.clone(), talk));
        }
        let open = self.jobs.iter().filter(|j| !self.ended.contains(&j.id));
        let open: Vec<String> = open.map(|j| j.id.clone()).collect();
        for id in &open {
            if has_ended(&self.js, "job", id).await {
                self.ended.insert(id.clone());
            }
        }
        let going = open.len() + self.submissions.len();
        if going < self.plan.jobs {
            self.count += 1;
            let (seed, seconds) = (self.plan.seed * 100_000 + self.count as u64, self.dice.between(20.0, 120.0));
            let job =
                Job { id: format!("chaos-j{}-{}", self.plan.seed, self.count), pcm: audio::blasts(seed, seconds) };
            let priority = ["high", "normal", "low"][self.dice.below(3)];
            let js = self.js.clone();
            self.submissions.spawn(async move {
                let submitted = talk::submit(js, job.id.clone(), &job.pcm, priority).await;
                (job, submitted)
            });
        }
    }

    fn next_talk(&mut self) -> Talk {
        self.count += 1;
        Talk {
            id: format!("chaos-s{}-{}", self.plan.seed, self.count),
            seed: self.plan.seed * 100_000 + self.count as u64,
            seconds: self.dice.between(8.0, 40.0),
            speed: self.dice.between(1.0, 4.0),
            chunk_ms: [40, 100, 200, 400][self.dice.below(4)],
        }
    }

    fn submitted(&mut self, done: Option<(Job, Result<()>)>) {
        match done {
            Some((job, Ok(()))) => self.jobs.push(job),
            Some((_, Err(e))) => self.refused.push(e.to_string()),
            None => {}
        }
    }

    /// Lets everybody finish what he began.
    async fn finish(&mut self) {
        while let Some(done) = self.talks.join_next().await {
            self.said.extend(done.ok());
        }
        while let Some(done) = self.submissions.join_next().await {
            self.submitted(done.ok());
        }
    }
}

/// Runs the plan; `say` is told each thing that is done. The fleet must have been started through relays.
pub async fn run(fleet: Fleet, plan: &Plan, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let js = talk::impatient(fleet.client());
    let mut load = Load {
        plan: plan.clone(),
        js: js.clone(),
        dice: Dice::new(plan.seed),
        count: 0,
        talks: JoinSet::new(),
        said: Vec::new(),
        submissions: JoinSet::new(),
        jobs: Vec::new(),
        refused: Vec::new(),
        ended: BTreeSet::new(),
    };
    let mut hands = Hands::new(fleet);
    let mut report = Report::default();
    let mut journal = Vec::new();
    let begun = Instant::now();
    let mut tell = |what: &str| {
        let line = format!("{} {:7.2} s  {what}", crate::load::now_us() / 1_000, begun.elapsed().as_secs_f64());
        say(&line);
        journal.push(line);
    };
    tell(&format!("seed {}: {:?}", plan.seed, hands.shape()));
    let mut schedule = Schedule::new(plan.seed, hands.shape());
    let (mut next, mut faults) = pause_and_faults(&mut schedule, plan);
    let mut due = begun + next;
    while begun.elapsed() < plan.lasting {
        if begun.elapsed() + Duration::from_secs_f64(LAST_START_S) < plan.lasting {
            load.tend().await;
        }
        let wake = [Some(due), hands.next_mend(), Some(Instant::now() + LOOK)].into_iter().flatten().min();
        tokio::time::sleep_until(wake.unwrap_or(due).min(begun + plan.lasting)).await;
        for done in hands.mend().await? {
            tell(&done);
        }
        if Instant::now() < due {
            continue;
        }
        for fault in faults {
            match hands.apply(fault).await? {
                Some(done) => {
                    tell(&done);
                    *report.faults.entry(fault.name()).or_default() += 1;
                    report.kills += u64::from(fault.is_kill());
                }
                None => report.skipped += 1,
            }
        }
        (next, faults) = pause_and_faults(&mut schedule, plan);
        due = Instant::now() + next;
    }
    report.seconds = begun.elapsed().as_secs_f64();
    tell("all is mended, nothing more breaks");
    let calm = Instant::now();
    hands.mend_all().await?;
    {
        let quiet = async {
            load.finish().await;
            wait_ends(&mut load).await;
        };
        tokio::pin!(quiet);
        let until = calm + QUIET;
        loop {
            tokio::select! {
                () = &mut quiet => break,
                () = tokio::time::sleep_until(until) => break,
                // Processes that die of what happened before are still started again.
                () = tokio::time::sleep(LOOK) => for done in hands.mend().await? {
                    tell(&done);
                }
            }
        }
    }
    report.quiet_seconds = calm.elapsed().as_secs_f64();
    tell("checking");
    let troubled = judge(&mut report, load, &js).await?;
    report.unexpected_ends = hands.unexpected.clone();
    if let Some(keep) = &plan.keep {
        keep_evidence(&hands.fleet, keep, &journal, &troubled, &report).await?;
    }
    Ok(report)
}

fn pause_and_faults(schedule: &mut Schedule, plan: &Plan) -> (Duration, Vec<Fault>) {
    let mut pause = Duration::ZERO;
    // A choice of faults is made by leaving out the others; the pace stays.
    for step in schedule.take(1_000) {
        pause = (pause + step.after).min(Duration::from_secs(4));
        let wanted = |f: &Fault| plan.only.is_empty() || plan.only.iter().any(|o| o == f.name());
        let faults: Vec<Fault> = step.faults.into_iter().filter(wanted).collect();
        if !faults.is_empty() {
            return (pause, faults);
        }
    }
    (Duration::from_secs(5), Vec::new())
}

async fn has_ended(js: &jetstream::Context, kind: &str, id: &str) -> bool {
    let subject = format!("asr.v1.transcript.{kind}.{id}.final");
    let last = async {
        let stream = js.get_stream_no_info("ASR_TRANSCRIPT").await.ok()?;
        stream.get_last_raw_message_by_subject(&subject).await.ok()
    };
    let last = tokio::time::timeout(Duration::from_secs(2), last).await.ok().flatten();
    let json: Option<serde_json::Value> = last.and_then(|m| serde_json::from_slice(&m.payload).ok());
    json.is_some_and(|j| j["end"] == true)
}

async fn wait_ends(load: &mut Load) {
    let sessions = load.said.iter().filter(|s| s.gave_up.is_none()).map(|s| ("session", s.id.clone()));
    let jobs = load.jobs.iter().map(|j| ("job", j.id.clone()));
    for (kind, id) in sessions.chain(jobs).collect::<Vec<_>>() {
        while !has_ended(&load.js, kind, &id).await {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Judges everything; ids of what is not clean.
async fn judge(report: &mut Report, load: Load, js: &jetstream::Context) -> Result<Vec<(&'static str, String)>> {
    let mut troubled = Vec::new();
    let Load { mut talks, mut submissions, mut said, jobs, refused, .. } = load;
    // Only after a quiet phase that was too short.
    while let Some(done) = talks.try_join_next() {
        said.extend(done.ok());
    }
    for _ in 0..talks.len() {
        report.problems.push("a producer is still waiting for an acknowledgement".to_owned());
    }
    talks.abort_all();
    submissions.abort_all();
    report.refused = refused;
    for said in said {
        report.sessions += 1;
        report.audio_seconds += said.samples.len() as f64 / 16_000.0;
        if let Some(why) = said.gave_up {
            report.problems.push(format!("session {}: its producer gave up: {why}", said.id));
        }
        let verdict = verdict::session(js, &said.id, &said.samples).await?;
        report.sessions_moved += u64::from(verdict.epoch > 1);
        report.without_end += u64::from(!verdict.ended);
        if !verdict.is_clean() {
            troubled.push(("session", said.id.clone()));
        }
        report.add("session", &said.id, verdict);
    }
    for job in jobs {
        let (verdict, end) = verdict::job(js, &job.id, &job.pcm.samples).await?;
        report.audio_seconds += job.pcm.seconds();
        match end {
            JobEnd::Done => report.jobs_done += 1,
            JobEnd::Failed(class) => {
                *report.jobs_failed.entry(class).or_default() += 1;
                troubled.push(("job", job.id.clone()));
            }
            JobEnd::Open => {
                report.without_end += 1;
                report.problems.push(format!("job {} has no end", job.id));
            }
        }
        if !verdict.is_clean() {
            troubled.push(("job", job.id.clone()));
        }
        report.add("job", &job.id, verdict);
    }
    Ok(troubled)
}

async fn keep_evidence(
    fleet: &Fleet,
    keep: &PathBuf,
    journal: &[String],
    troubled: &[(&'static str, String)],
    report: &Report,
) -> Result<()> {
    std::fs::create_dir_all(keep).map_err(Error::io(keep.display().to_string()))?;
    let write = |name: &str, text: &str| std::fs::write(keep.join(name), text).map_err(Error::io(name.to_owned()));
    write("journal.txt", &journal.join("\n"))?;
    write("report.txt", &format!("{report:#?}"))?;
    for (kind, id) in troubled {
        write(&format!("{kind}-{id}.txt"), &verdict::dossier(&fleet.js(), kind, id).await?)?;
    }
    let fleet_events = checker::read(&fleet.js(), "ASR_EVENT", "asr.v1.event.fleet.>").await?;
    let lines = fleet_events.iter().map(|m| format!("{} {}\n", m.seq, String::from_utf8_lossy(&m.payload)));
    write("fleet-events.txt", &lines.collect::<String>())?;
    fleet.keep_logs(keep)
}
