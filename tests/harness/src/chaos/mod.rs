//! Chaos: many sessions and jobs on a fleet in which something goes wrong every few seconds, and afterwards the question
//! whether every acknowledged sample was transcribed exactly once.
//!
//! | module | holds |
//! |---|---|
//! | [`schedule`] | which faults come when, from a seed |
//! | [`hands`] | breaks and mends |
//! | [`hints`] | what happens to hints on their way |
//! | [`load`], [`talk`] | producers and jobs, and how each is meant to end |
//! | [`rest`] | whether all is over for the fleet too |

pub mod hands;
pub mod hints;
pub mod load;
pub mod rest;
pub mod schedule;
pub mod talk;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use async_nats::jetstream;
use tokio::time::Instant;

pub use self::hints::hint_faults;
use self::{
    hands::Hands,
    hints::Fates,
    load::{Answer, Load},
    schedule::{Fault, NAMES, Schedule},
};
use crate::{
    Error, Result, checker,
    fleet::Fleet,
    verdict::{self, JobEnd, Verdict},
};

/// No new session or job in the last seconds of the faults: what began must have been under fire, and must end.
const LAST_START_S: f64 = 8.0;
/// How long everything may take to end once nothing breaks any more.
const QUIET: Duration = Duration::from_secs(150);
/// Fewer kills a minute than this are no chaos.
const KILLS_A_MINUTE: f64 = 10.0;
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
    /// Only faults of these names ([`NAMES`]); empty = all.
    pub only: Vec<String>,
    /// No poison and no bad recordings: nothing is meant to fail. Else the workers must know poison
    /// ([`talk::POISON_RUN`]).
    pub harmless: bool,
    /// What the hints' fault layer has done, where there is one.
    pub hints: Option<Arc<Fates>>,
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
    /// Of these, inputs that were meant to fail so.
    pub jobs_meant_to_fail: u64,
    /// Sessions with poison in them.
    pub sessions_poisoned: u64,
    /// Stretches of these that were set aside.
    pub stretches_parked: u64,
    /// What became of hints on their way, by fate.
    pub hints: BTreeMap<&'static str, u64>,
    pub hints_purged: u64,
    /// Pieces that stood still on a relay.
    pub stalls: u64,
    pub without_end: u64,
    pub samples_lost: u64,
    pub samples_repeated: u64,
    pub finals_repeated: u64,
    pub clicks: u64,
    /// Processes that ended by themselves.
    pub unexpected_ends: Vec<String>,
    /// Jobs that were never accepted, however often they were handed in.
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
            && self.refused.is_empty()
    }

    /// A run in which nothing was at stake shows nothing, however clean: what was missing.
    fn shows_nothing(&self, plan: &Plan) -> Vec<String> {
        let mut missing = Vec::new();
        let mut need = |good: bool, what: String| {
            if !good {
                missing.push(format!("this run shows nothing: {what}"));
            }
        };
        need(self.sessions > 0, "no session was spoken".to_owned());
        need(plan.jobs == 0 || self.jobs_done > 0, "no job was done".to_owned());
        need(self.faults.values().any(|n| *n > 0), "nothing was broken".to_owned());
        for name in &plan.only {
            need(self.faults.contains_key(name.as_str()), format!("{name} was never done"));
        }
        let kills = (self.seconds / 60.0 * KILLS_A_MINUTE) as u64;
        need(!plan.only.is_empty() || self.kills >= kills, format!("{} kills, at least {kills} are due", self.kills));
        let poisoned = !plan.harmless && self.sessions_poisoned > 0;
        need(!poisoned || self.stretches_parked > 0, "no poison was set aside".to_owned());
        if let Some(hints) = &plan.hints {
            need(hints.faults() > 0, "nothing happened to any hint".to_owned());
        }
        missing
    }

    fn add(&mut self, kind: &str, id: &str, verdict: Verdict) {
        self.samples_lost += verdict.samples_lost;
        self.samples_repeated += verdict.samples_repeated;
        self.finals_repeated += verdict.finals_repeated;
        self.clicks += verdict.clicks;
        self.finals += verdict.finals;
        self.stretches_parked += verdict.parked;
        self.problems.extend(verdict.problems.iter().map(|p| format!("{kind} {id}: {p}")));
    }
}

/// Runs the plan; `say` is told each thing that is done. The fleet must have been started through relays.
pub async fn run(fleet: Fleet, plan: &Plan, say: &mut dyn FnMut(&str)) -> Result<Report> {
    if let Some(unknown) = plan.only.iter().find(|name| !NAMES.contains(&name.as_str())) {
        return Err(Error::Wrong(format!("no fault is called {unknown:?}; there are {}", NAMES.join(", "))));
    }
    let js = talk::impatient(fleet.client());
    let mut load = Load::new(plan, js.clone());
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
        let quiet = load.finish();
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
    load.close().await;
    let sessions = load.said.iter().filter(|s| s.gave_up.is_none()).map(|s| ("session", s.id.clone()));
    let jobs = load.jobs.iter().filter(|j| j.answer == Answer::Accepted).map(|j| ("job", j.id.clone()));
    let ids = sessions.chain(jobs).collect();
    let unfinished = rest::unfinished(&hands.fleet.client(), &js, hands.shape().workers, ids).await?;
    report.problems.extend(unfinished);
    let troubled = judge(&mut report, load, &js).await?;
    report.unexpected_ends = hands.unexpected.clone();
    (report.hints_purged, report.stalls) = (hands.hints_purged, hands.stalls());
    report.hints = plan.hints.as_ref().map(|hints| hints.all()).unwrap_or_default();
    let nothing = report.shows_nothing(plan);
    report.problems.extend(nothing);
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

/// Judges everything; ids of what is not clean.
async fn judge(report: &mut Report, load: Load, js: &jetstream::Context) -> Result<Vec<(&'static str, String)>> {
    let mut troubled = Vec::new();
    let Load { said, jobs, problems, .. } = load;
    report.problems.extend(problems);
    for said in said {
        report.sessions += 1;
        report.sessions_poisoned += u64::from(said.poison.is_some());
        report.audio_seconds += said.samples.len() as f64 / 16_000.0;
        if let Some(why) = said.gave_up {
            report.problems.push(format!("session {}: its producer gave up: {why}", said.id));
        }
        let verdict = verdict::poisoned_session(js, &said.id, &said.samples, said.poison.as_slice()).await?;
        report.sessions_moved += u64::from(verdict.epoch > 1);
        report.without_end += u64::from(!verdict.ended);
        if !verdict.is_clean() {
            troubled.push(("session", said.id.clone()));
        }
        report.add("session", &said.id, verdict);
    }
    for job in jobs {
        match &job.answer {
            Answer::Accepted => {}
            Answer::Waiting => {
                report.problems.push(format!("job {} was still being handed in at the end", job.id));
                continue;
            }
            Answer::Unheard(why) => {
                report.refused.push(why.clone());
                continue;
            }
        }
        let (verdict, end) = verdict::job(js, &job.id, job.samples()).await?;
        report.audio_seconds += job.samples().len() as f64 / 16_000.0;
        let problem = job.meant.problem(&end);
        match end {
            JobEnd::Done => report.jobs_done += 1,
            JobEnd::Failed(class) => {
                *report.jobs_failed.entry(class).or_default() += 1;
                report.jobs_meant_to_fail += u64::from(problem.is_none());
            }
            JobEnd::Open => report.without_end += 1,
        }
        if problem.is_some() || !verdict.is_clean() {
            troubled.push(("job", job.id.clone()));
        }
        report.problems.extend(problem.map(|p| format!("job {} {p}", job.id)));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let lasting = Duration::from_secs(60);
        Plan { seed: 1, lasting, sessions: 8, jobs: 3, only: Vec::new(), harmless: false, hints: None, keep: None }
    }

    #[test]
    fn a_run_that_shows_nothing_is_not_clean() {
        let faults: BTreeMap<&'static str, u64> = [("kill_worker", 10)].into();
        let good = Report { kills: 10, faults, seconds: 60.0, sessions: 5, jobs_done: 2, ..Report::default() };
        assert_eq!(good.shows_nothing(&plan()), Vec::<String>::new());
        type Change = fn(&mut Report, &mut Plan);
        let changes: [(&str, Change); 7] = [
            ("no session", |r, _| r.sessions = 0),
            ("no job", |r, _| r.jobs_done = 0),
            ("no fault", |r, p| (r.faults, p.only) = (BTreeMap::new(), Vec::new())),
            ("too few kills", |r, _| r.kills = 9),
            ("a fault that never came", |_, p| p.only = vec!["purge_live".to_owned()]),
            ("poison that met nobody", |r, _| r.sessions_poisoned = 2),
            ("untouched hints", |_, p| p.hints = Some(Arc::default())),
        ];
        for (name, change) in changes {
            let (mut report, mut plan) = (good.clone(), plan());
            change(&mut report, &mut plan);
            assert!(!report.shows_nothing(&plan).is_empty(), "{name}");
        }
        let parked = Report { sessions_poisoned: 2, stretches_parked: 1, ..good.clone() };
        assert_eq!(parked.shows_nothing(&plan()), Vec::<String>::new());
        let only = Plan { only: vec!["kill_worker".to_owned()], jobs: 0, ..plan() };
        assert!(Report { kills: 1, jobs_done: 0, ..good }.shows_nothing(&only).is_empty());
    }

    #[test]
    fn what_was_refused_or_went_wrong_is_not_clean() {
        assert!(Report::default().is_clean());
        assert!(!Report { refused: vec!["never accepted".to_owned()], ..Report::default() }.is_clean());
        assert!(!Report { problems: vec!["a failed job".to_owned()], ..Report::default() }.is_clean());
    }
}
