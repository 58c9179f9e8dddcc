//! A fleet that works for long: sessions and jobs that come and go, kills all the while, everything restarted once, and after
//! that a look at each process and stream again and again: what is kept for ever shows as a slope.
//!
//! Each session and job is judged as soon as it has ended and forgotten then, so that the looker itself stays small and what
//! the streams' ages take away is not missed. The first worker, the dispatchers and the server live from the restart to the
//! end: only who lives long can be seen to grow.

mod look;

use std::{collections::BTreeSet, time::Duration};

use futures_util::StreamExt as _;
use tokio::{task::JoinSet, time::Instant};

pub use self::look::{Look, ProcessLook, StreamLook, TaskLook};
use crate::{
    Error, Result, audio,
    chaos::{
        hands::Hands,
        load::has_ended,
        schedule::{Fault, Process},
        talk::{self, Js, Talk},
    },
    dice::Dice,
    fleet::{self, Fleet},
    verdict::{self, JobEnd},
};

/// When everything is restarted, as a share of the whole: the second half begins when that has settled.
const RESTART_AT: f64 = 0.25;
/// From one job to the next at the earliest: recordings and results are kept for a day, and are to fit.
const JOB_EVERY: Duration = Duration::from_secs(5);
/// No new session or job in the last seconds: what began is to end.
const LAST_START: Duration = Duration::from_secs(8);
/// For a session or job that is over for its producer: takeovers and verdicts included.
const END_WAIT: Duration = Duration::from_secs(90);
/// Processes are looked at this often; streams, which costs the server something, each fifth time.
const LOOK: Duration = Duration::from_secs(2);
const STREAMS_EACH: u32 = 5;
/// How long a killed process stays away.
const AWAY: Duration = Duration::from_millis(700);

/// What to do for how long.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub lasting: Duration,
    /// Sessions at once.
    pub sessions: usize,
    /// Jobs at once.
    pub jobs: usize,
    /// From one kill to the next.
    pub kill_every: Duration,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub looks: Vec<Look>,
    pub seconds: f64,
    pub restarted_at_s: f64,
    pub kills: u64,
    pub sessions: u64,
    pub jobs: u64,
    pub audio_seconds: f64,
    /// Of it that of jobs, whose recordings are kept.
    pub job_seconds: f64,
    /// Names of workers that were heard, each with its incarnation.
    pub incarnations: u64,
    pub samples_lost: u64,
    pub samples_repeated: u64,
    pub finals_repeated: u64,
    pub problems: Vec<String>,
}

/// One session or job that is over.
struct Over {
    job: bool,
    audio_seconds: f64,
    verdict: Result<verdict::Verdict>,
}

/// Runs the plan. `say` is told what is done.
pub async fn run(fleet: Fleet, plan: &Plan, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let js = talk::impatient(fleet.client());
    let mut beats = fleet.client().subscribe("asr.v1.heartbeat.*").await.map_err(Error::nats("heartbeats"))?;
    let mut hands = Hands::new(fleet);
    let mut dice = Dice::new(plan.seed ^ 0x50a4);
    let (mut report, mut heard) = (Report::default(), BTreeSet::new());
    let (mut sessions, mut jobs) = (JoinSet::new(), JoinSet::new());
    let (begun, mut count, mut looks, mut restarted) = (Instant::now(), 0u64, 0u32, false);
    let (mut next_kill, mut next_job) = (begun + plan.kill_every, begun);
    let mut ticks = tokio::time::interval(LOOK);
    while begun.elapsed() < plan.lasting {
        tokio::select! {
            _ = ticks.tick() => {
                let mut look = look::of(&hands.fleet, begun.elapsed());
                if looks.is_multiple_of(STREAMS_EACH) {
                    look.streams = look::streams(&js).await;
                    look.tasks = look::tasks(&hands.fleet).await;
                }
                looks += 1;
                report.looks.push(look);
            }
            Some(beat) = beats.next() => {
                heard.extend(incarnation(&beat.payload));
                continue;
            }
            Some(over) = sessions.join_next() => take(&mut report, over),
            Some(over) = jobs.join_next() => take(&mut report, over),
        }
        for done in hands.mend().await? {
            say(&done);
        }
        while begun.elapsed() + LAST_START < plan.lasting && sessions.len() < plan.sessions {
            count += 1;
            sessions.spawn(session(js.clone(), plan.seed * 1_000_000 + count, &mut dice));
        }
        if begun.elapsed() + LAST_START < plan.lasting && jobs.len() < plan.jobs && Instant::now() >= next_job {
            count += 1;
            next_job = Instant::now() + JOB_EVERY;
            jobs.spawn(job(js.clone(), plan.seed * 1_000_000 + count, &mut dice));
        }
        if !restarted && begun.elapsed() >= plan.lasting.mul_f64(RESTART_AT) {
            say("everything is restarted");
            report.kills += restart_everything(&mut hands).await?;
            report.restarted_at_s = begun.elapsed().as_secs_f64();
            restarted = true;
        }
        if Instant::now() >= next_kill {
            next_kill += plan.kill_every;
            let fault = kill(&mut dice, hands.shape().workers, restarted);
            // Where this one has no engine, another's would be taken for it.
            let idle = matches!(fault, Fault::KillEngine(i) if hands.fleet.workers[i].engine_pid().is_none());
            let done = if idle { None } else { hands.apply(fault).await? };
            if let Some(done) = done {
                say(&done);
                report.kills += 1;
            }
        }
    }
    report.seconds = begun.elapsed().as_secs_f64();
    say("nothing new begins; what began is to end");
    hands.mend_all().await?;
    while let Some(over) = sessions.join_next().await {
        take(&mut report, over);
    }
    while let Some(over) = jobs.join_next().await {
        take(&mut report, over);
    }
    report.incarnations = heard.len() as u64;
    report.problems.extend(hands.unexpected.iter().map(|end| format!("ended by itself: {end}")));
    Ok(report)
}

/// Before the restart anybody; afterwards not the first worker, nor its engine, a dispatcher or the server, which are
/// watched.
fn kill(dice: &mut Dice, workers: usize, restarted: bool) -> Fault {
    let other = |dice: &mut Dice| if workers > 1 { 1 + dice.below(workers - 1) } else { 0 };
    if restarted {
        return if dice.chance(0.5) {
            Fault::Kill(Process::Worker(other(dice)), AWAY)
        } else {
            Fault::KillEngine(other(dice))
        };
    }
    match dice.below(6) {
        0 | 1 => Fault::Kill(Process::Worker(dice.below(workers)), AWAY),
        2 | 3 => Fault::KillEngine(dice.below(workers)),
        4 => Fault::Kill(Process::Dispatcher { active: true }, AWAY),
        _ => Fault::KillServer("ASR_AUDIO", AWAY),
    }
}

async fn restart_everything(hands: &mut Hands) -> Result<u64> {
    hands.mend_all().await?;
    let shape = hands.shape();
    let workers = (0..shape.workers).map(|i| Fault::Kill(Process::Worker(i), AWAY));
    let dispatchers = (0..shape.dispatchers).map(|_| Fault::Kill(Process::Dispatcher { active: true }, AWAY));
    let servers = std::iter::once(Fault::KillServer("ASR_AUDIO", AWAY));
    let mut kills = 0;
    for fault in workers.chain(dispatchers).chain(servers).collect::<Vec<_>>() {
        kills += u64::from(hands.apply(fault).await?.is_some());
    }
    Ok(kills)
}

fn take(report: &mut Report, over: std::result::Result<Over, tokio::task::JoinError>) {
    let over = match over {
        Ok(over) => over,
        Err(e) => return report.problems.push(format!("a producer came to no end: {e}")),
    };
    let counted = if over.job { &mut report.jobs } else { &mut report.sessions };
    *counted += 1;
    report.audio_seconds += over.audio_seconds;
    report.job_seconds += if over.job { over.audio_seconds } else { 0.0 };
    match over.verdict {
        Ok(verdict) => {
            report.samples_lost += verdict.samples_lost;
            report.samples_repeated += verdict.samples_repeated;
            report.finals_repeated += verdict.finals_repeated;
            report.problems.extend(verdict.problems);
        }
        Err(e) => report.problems.push(e.to_string()),
    }
}

/// Speaks a session, waits for its end and judges it.
fn session(js: Js, seed: u64, dice: &mut Dice) -> impl Future<Output = Over> + use<> {
    let (seconds, speed) = (dice.between(8.0, 30.0), dice.between(1.0, 4.0));
    let talk = Talk { id: format!("soak-s{seed}"), poison: None, seed, seconds, speed, chunk_ms: 200 };
    async move {
        let id = talk.id.clone();
        let said = talk::talk(js.clone(), talk).await;
        let judged = async {
            if let Some(why) = &said.gave_up {
                return Err(Error::Wrong(format!("{id}: its producer gave up: {why}")));
            }
            fleet::wait_end(&js, &id, END_WAIT).await?;
            verdict::session(&js, &id, &said.samples).await?.clean(&id)
        };
        let verdict = judged.await;
        Over { job: false, audio_seconds: said.samples.len() as f64 / 16_000.0, verdict }
    }
}

/// The same with a recording.
fn job(js: Js, seed: u64, dice: &mut Dice) -> impl Future<Output = Over> + use<> {
    let seconds = dice.between(10.0, 60.0);
    async move {
        let (id, pcm) = (format!("soak-j{seed}"), audio::blasts(seed, seconds));
        let judged = async {
            talk::submit(js.clone(), id.clone(), &pcm, "normal").await?;
            let until = Instant::now() + END_WAIT;
            while !has_ended(&js, "job", &id).await {
                if Instant::now() > until {
                    return Err(Error::Wrong(format!("{id} has no end")));
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            match verdict::job(&js, &id, &pcm.samples).await? {
                (verdict, JobEnd::Done) => verdict.clean(&id),
                (_, end) => Err(Error::Wrong(format!("{id} ended as {end:?}"))),
            }
        };
        let verdict = judged.await;
        Over { job: true, audio_seconds: seconds, verdict }
    }
}

fn incarnation(beat: &[u8]) -> Option<String> {
    let beat: serde_json::Value = serde_json::from_slice(beat).ok()?;
    Some(format!("{}.{}", beat["gpu_id"].as_str()?, beat["incarnation"].as_str()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_restart_the_watched_are_left_alone() {
        let mut dice = Dice::new(7);
        for _ in 0..200 {
            match kill(&mut dice, 3, true) {
                Fault::Kill(Process::Worker(i), _) | Fault::KillEngine(i) => assert!(i == 1 || i == 2),
                other => panic!("{other:?} is watched"),
            }
        }
        let names: BTreeSet<&str> = (0..200).map(|_| kill(&mut dice, 3, false).name()).collect();
        assert_eq!(names, BTreeSet::from(["kill_worker", "kill_engine", "kill_dispatcher", "kill_server"]));
    }
}
