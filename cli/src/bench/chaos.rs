//! Random faults, at least ten kills a minute, over many sessions and jobs; then a checker that shares nothing with the
//! program asks of every acknowledged sample whether it was transcribed exactly once.
//!
//! Everything runs on this machine: one server or a cluster of three, workers with the simulated engine, two dispatchers,
//! each behind a relay of its own. Which fault comes when follows from the seed; what it meets does not.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use voxfleet_harness::{
    chaos::{self, Plan, Report, hints::Fates, schedule, talk::POISON_RUN},
    fleet::{Engine, Fleet, Servers},
    server::{Cluster, ServerOptions},
};

use super::{progress, rounded, usage};
use crate::exit::{Exit, OrExit as _};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench chaos --minutes 3 --seed 1
  voxfleet bench chaos --minutes 10 --seed 7 --replicas 3 --json --keep chaos-7

The exit code is 1 when anything was lost or repeated or has no end, when a job failed that was not meant to, when slots, keys
or consumers are left over, and when the run shows nothing: too few kills, no session, no job.")]
pub(crate) struct ChaosArgs {
    /// How long things break; the quiet phase and the check come on top
    #[arg(long, default_value_t = 3.0, value_name = "N")]
    minutes: f64,
    /// The same seed gives the same faults at the same times, and the same audio
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Replicas of each stream, which is the number of servers: 1 or 3
    #[arg(long, default_value_t = 1, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=3))]
    replicas: u32,
    /// Workers, with the simulated engine
    #[arg(long, default_value_t = 4, value_name = "N")]
    workers: usize,
    /// Sessions at once, at one to four times real time
    #[arg(long, default_value_t = 8, value_name = "N")]
    sessions: usize,
    /// Jobs of 20 to 120 s at once
    #[arg(long, default_value_t = 3, value_name = "N")]
    jobs: usize,
    /// Only these faults, by the names of the report (repeatable)
    #[arg(long, value_name = "FAULT", value_parser = clap::builder::PossibleValuesParser::new(schedule::NAMES))]
    only: Vec<String>,
    /// No inputs that are meant to fail: else one session in 40 and one job in 12 kills each engine that decodes it, and one
    /// job in six is no recording
    #[arg(long)]
    harmless: bool,
    /// Leave logs, a journal of the faults and all that is known of what went wrong in this folder
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Times real time: decodes take a while, so that faults meet them.
const SPEED: f64 = 30.0;
const SLOTS: u32 = 8;
const DISPATCHERS: usize = 2;
/// Share of the hints that are dropped, doubled or late all the time.
const HINT_FAULTS: f64 = 0.05;

/// A fleet in which every process can be cut off.
async fn fleet(workers: usize, replicas: u32, seed: u64) -> Result<(Fleet, Arc<Fates>)> {
    let (tamper, hints) = chaos::hint_faults(seed, HINT_FAULTS);
    let builder = Fleet::builder().workers(workers).dispatchers(DISPATCHERS).slots(SLOTS).through_relays();
    let builder = builder.tamper_dispatchers(tamper).set("worker.simulated.poison", POISON_RUN);
    let builder = builder.engine(Engine::Simulated { speed: SPEED });
    if replicas == 1 {
        return Ok((builder.start().await?, hints));
    }
    // Clients would learn the servers' own addresses and go round their relays.
    let options = ServerOptions { extra: "cluster { no_advertise: true }".to_owned(), ..ServerOptions::default() };
    let cluster = Cluster::start_with(replicas as usize, options).await?;
    let builder = builder.on(Servers::Many(cluster)).set("dispatcher.topology.replicas", replicas);
    Ok((builder.start().await?, hints))
}

pub(super) async fn run(args: ChaosArgs) -> Result<Value> {
    usage(args.replicas != 2, "--replicas: 1 or 3")?;
    usage((0.1..=600.0).contains(&args.minutes), "--minutes: 0.1 to 600")?;
    usage((1..=32).contains(&args.workers), "--workers: 1 to 32")?;
    usage(args.sessions >= 1, "--sessions: at least 1, or nothing is broken")?;
    if let Some(keep) = &args.keep {
        // Not after an hour.
        let made = std::fs::create_dir_all(keep).with_context(|| format!("--keep {}", keep.display()));
        made.or_exit(Exit::Usage)?;
    }
    let (fleet, hints) = fleet(args.workers, args.replicas, args.seed).await?;
    let plan = Plan {
        seed: args.seed,
        lasting: Duration::from_secs_f64(args.minutes * 60.0),
        sessions: args.sessions,
        jobs: args.jobs,
        only: args.only,
        harmless: args.harmless,
        hints: Some(hints),
        keep: args.keep,
    };
    let report = chaos::run(fleet, &plan, &mut |what| progress(what)).await?;
    Ok(shown(&report, args.seed, args.replicas))
}

fn shown(report: &Report, seed: u64, replicas: u32) -> Value {
    json!({
        "clean": report.is_clean(),
        "seed": seed,
        "replicas": replicas,
        "minutes": rounded(report.seconds / 60.0),
        "kills": report.kills,
        "kills_per_minute": rounded(report.kills_per_minute()),
        "faults": report.faults.values().sum::<u64>(),
        "faults_by_name": report.faults,
        "faults_skipped": report.skipped,
        "sessions": report.sessions,
        "sessions_moved": report.sessions_moved,
        "jobs": report.jobs(),
        "jobs_done": report.jobs_done,
        "jobs_failed": report.jobs_failed,
        "jobs_meant_to_fail": report.jobs_meant_to_fail,
        "sessions_poisoned": report.sessions_poisoned,
        "stretches_parked": report.stretches_parked,
        "hints": report.hints,
        "hints_purged": report.hints_purged,
        "pieces_stalled": report.stalls,
        "finals": report.finals,
        "audio_s": rounded(report.audio_seconds),
        "without_end": report.without_end,
        "samples_lost": report.samples_lost,
        "samples_repeated": report.samples_repeated,
        "finals_repeated": report.finals_repeated,
        "samples_cut_off_as_clicks": report.clicks,
        "quiet_s": rounded(report.quiet_seconds),
        "unexpected_ends": report.unexpected_ends.iter().map(|e| json!({ "process": e })).collect::<Vec<_>>(),
        "refused": report.refused.iter().map(|r| json!({ "job": r })).collect::<Vec<_>>(),
        "problems": report.problems.iter().map(|p| json!({ "what": p })).collect::<Vec<_>>(),
    })
}
