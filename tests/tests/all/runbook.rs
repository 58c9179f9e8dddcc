//! `docs/runbook.md`: every block of commands on that page is run by a test. Those that only look, and those that mend one
//! thing, are run here, in the order of the page; those that change a fleet while it works have tests of their own.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use voxfleet_harness::{
    audio, find,
    fleet::{self, Fleet},
    producer::{Pace, Producer},
    wait::eventually,
};

use crate::{
    pages::{self, Block, Shell},
    units,
};

pub(crate) const PAGE: &str = "docs/runbook.md";
const SOON: Duration = Duration::from_secs(30);

/// Blocks with a test of their own, by their headings.
const ELSEWHERE: [&str; 8] = [
    "Upgrade the workers",
    "Upgrade the dispatchers",
    "Upgrade nats-server",
    "Backup",
    "Restore",
    "Growing one server into three",
    "From one replica to three",
    "Moving a server",
];

/// Alerts, each with the heading of what to do about it.
const RULES: &str = "deploy/observability/rules/voxfleet.yml";

/// The only block under this heading.
pub(crate) fn block(title: &str) -> Result<Block> {
    let mut found = pages::read(PAGE)?.into_iter().filter(|block| block.title == title);
    let block = found.next().with_context(|| format!("{PAGE} has no commands under {title:?}"))?;
    ensure!(found.next().is_none(), "{PAGE} has two blocks under {title:?}");
    Ok(block)
}

#[test]
fn each_alert_has_its_heading_and_each_change_its_commands() -> Result<()> {
    let page = std::fs::read_to_string(find::root().join(PAGE))?;
    let mut headings = BTreeSet::new();
    for heading in page.lines().filter(|line| line.starts_with("##")) {
        let title = heading.trim_start_matches('#').trim().to_lowercase();
        // Whoever follows a link reads the first of two, and perhaps the second says something else.
        ensure!(headings.insert(title), "{PAGE} has two sections: {heading}");
    }
    let rules = std::fs::read_to_string(find::root().join(RULES))?;
    let link = format!("{PAGE}#");
    let end = |c: char| !c.is_ascii_alphanumeric();
    let linked = rules.split(link.as_str()).skip(1).filter_map(|rest| rest.split(end).next());
    let linked: BTreeSet<&str> = linked.collect();
    ensure!(linked.len() > 10, "{RULES} links {linked:?}");
    for alert in linked {
        ensure!(headings.contains(alert), "{PAGE} says nothing of {alert}");
    }
    for title in ELSEWHERE {
        block(title)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_the_runbook_works() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder().workers(2).slots(4).dispatchers(2).start().await?;
    let mut shell = Shell::new(&fleet.url())?;
    units::install(&mut shell)?;
    scene(&fleet).await.with_context(|| fleet.logs())?;
    for (name, value) in [("DISPATCHERS", "d1 d2"), ("GPU", "gpu-2"), ("SESSION", "call-1")] {
        shell.set(name, value);
    }
    for block in pages::read(PAGE)?.into_iter().filter(|block| !ELSEWHERE.contains(&block.title.as_str())) {
        let tried = try_out(&shell, &mut fleet, &block).await;
        tried.with_context(|| format!("{PAGE}: {:?}\n{}", block.title, fleet.logs()))?;
    }
    Ok(())
}

/// A session that goes on, one that has moved from a worker that died, and a dead letter.
async fn scene(fleet: &Fleet) -> Result<()> {
    let mut producer = Producer::named(fleet.js(), "call-1", "s1");
    // At the pace of speech: there are partials only of what is still being said.
    producer.stream(&audio::bursts(61, 6.0), 200, Pace::Speed(1.0)).await?;
    let lost = json!({"audio": "object://asr_media/nothing"}).to_string();
    fleet.js().publish("asr.v1.jobs.normal.lost", lost.into()).await?.await?;
    for (stream, subject) in
        [("ASR_PARTIAL", "asr.v1.transcript.session.call-1.partial"), ("ASR_DEAD", "asr.v1.dead.job.lost")]
    {
        eventually(format!("something on {subject}"), SOON, || async {
            let stream = fleet.js().get_stream_no_info(stream).await.ok()?;
            stream.get_last_raw_message_by_subject(subject).await.ok().map(drop)
        })
        .await?;
    }
    Ok(())
}

/// The smallest fleet: nobody stands by while it is upgraded, and the block comes to an end all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_that_is_alone_is_upgraded_too() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder().workers(1).start().await?;
    let mut shell = Shell::new(&fleet.url())?;
    units::install(&mut shell)?;
    shell.set("DISPATCHERS", "d1");
    let before = fleet.dispatchers[0].pid();
    let upgraded = units::run(&shell, &mut fleet, &block("Upgrade the dispatchers")?).await;
    upgraded.with_context(|| fleet.logs())?;
    ensure!(fleet.dispatchers[0].pid() != before, "it was not started again");
    let leads = eventually("who leads", SOON, || fleet.leader()).await?;
    ensure!(leads == 0, "it is not active when the block ends");
    Ok(())
}

async fn try_out(shell: &Shell, fleet: &mut Fleet, block: &Block) -> Result<()> {
    // What the page promises to show. Nothing where a healthy fleet has nothing to show.
    let wanted: &[&str] = match block.title.as_str() {
        "Runbook" if block.commands.contains("doctor") => {
            &["dispatcher", "1 standing by", "stream space", "gpu-1", "gpu-2"]
        }
        "Runbook" | "WorkerDead" | "FailoversMany" => &[],
        "GpuMemoryHigh" => &["used_by_others_mb"],
        "GpuHot" => &["HEAT"],
        "SessionsLag" => &["call-1", "lag_ms"],
        "EngineStuck" => &["gpu-1", "ms_since_progress", "restarts"],
        "EngineRestarts" => &["gpu-1"],
        "AudioStreamNearlyFull" if block.commands.contains("edit") => &["8.0 GiB"],
        "AudioStreamNearlyFull" => &["Maximum Bytes", "asr.v1.audio.call-1"],
        "DeadLettersGrow" => &["lost", "not_found"],
        "NoCapacity" => &["sessions", "call-1", "assigned"],
        "CertificateExpires" => &["nats"],
        "NoActiveDispatcher" => &["\"holder\"", "voxfleet"],
        "NatsLost" => &["jetstream", "on"],
        "DispatcherAbsent" if block.commands.contains("health") => &["is active, 1 standing by"],
        "DispatcherAbsent" => {
            // Only the way of whoever asks was broken: nobody is started again.
            let pids = |fleet: &Fleet| fleet.dispatchers.iter().map(|one| one.pid()).collect::<Vec<_>>();
            let before = pids(fleet);
            units::run(shell, fleet, block).await?;
            ensure!(pids(fleet) == before, "dispatchers that were well were started again");
            for dispatcher in &mut fleet.dispatchers {
                dispatcher.kill9()?;
            }
            units::run(shell, fleet, block).await?;
            eventually("one of the new ones is active", SOON, || fleet.leader()).await?;
            let after = pids(fleet);
            ensure!(after[0] != before[0] && after[1] == before[1], "one is enough: {before:?}, then {after:?}");
            return Ok(());
        }
        "WorkerUnhealthy" => {
            units::run(shell, fleet, block).await?;
            fleet.workers[1].wait(SOON).await.context("gpu-2 is given up")?;
            return Ok(());
        }
        other => bail!("nobody has said what {other:?} is to show"),
    };
    let said = units::run(shell, fleet, block).await?;
    for part in wanted {
        ensure!(said.contains(part), "{part:?} is not in what was shown:\n{said}");
    }
    Ok(())
}
