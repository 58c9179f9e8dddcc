//! A fleet is upgraded one process after the other by the blocks of `docs/runbook.md`, while sessions speak: no word is lost,
//! whichever side is the newer meanwhile.
//!
//! `VOXFLEET_OLD_BIN` names a binary of an earlier version; `deploy/earlier.sh` builds one. Without it the same steps are taken
//! with this version on both sides, and the test says so; that a version reads what earlier ones wrote is also held by fixtures
//! (`schema/tests/golden`).

use std::{io::Write as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use voxfleet_harness::{
    checker, find,
    fleet::{self, Fleet},
    wait::eventually,
};

use crate::{
    operations::{judge, speak},
    pages::Shell,
    runbook, units,
};

const SOON: Duration = Duration::from_secs(30);
/// Longer than every step takes.
const SPOKEN_S: f64 = 60.0;

fn old() -> Result<PathBuf> {
    match std::env::var_os("VOXFLEET_OLD_BIN") {
        Some(path) if std::fs::read(&path)? == std::fs::read(find::voxfleet()?)? => {
            anyhow::bail!("VOXFLEET_OLD_BIN is the very binary that is new")
        }
        Some(path) => Ok(PathBuf::from(path)),
        None => {
            // Past the test runner, which keeps to itself what a test prints that passes.
            let said = "skipped: two versions side by side: VOXFLEET_OLD_BIN names no earlier binary, this one is upgraded to itself";
            writeln!(std::io::stderr(), "{said}")?;
            Ok(find::voxfleet()?)
        }
    }
}

async fn upgraded(steps: [&str; 3]) -> Result<()> {
    let builder = Fleet::builder().workers(2).slots(8).dispatchers(2).binary(old()?);
    let mut fleet = builder.start().await?;
    let mut shell = Shell::new(&fleet.url())?;
    units::install(&mut shell)?;
    for (name, value) in [("DISPATCHERS", "d1 d2"), ("WORKERS", "w1 w2"), ("SERVERS", "n1")] {
        shell.set(name, value);
    }
    let speaking = speak(&fleet, "through", 4, SPOKEN_S);
    eventually("all of them have said something to the version before", SOON, || async {
        for n in 0..4 {
            checker::finals(&fleet.js(), &format!("through-{n}")).await.ok().filter(|finals| !finals.is_empty())?;
        }
        Some(())
    })
    .await
    .with_context(|| fleet.logs())?;
    fleet.use_binary(None);
    for step in steps {
        units::run(&shell, &mut fleet, &runbook::block(step)?)
            .await
            .with_context(|| format!("{step}\n{}", fleet.logs()))?;
        fleet.check_alive()?;
    }
    ensure!(!speaking.is_empty(), "nobody speaks any more");
    let moved = judge(&fleet, speaking).await.with_context(|| fleet.logs())?;
    ensure!(moved > 0, "no session was handed from one version to the other");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_first_no_word_is_lost() -> Result<()> {
    let _place = fleet::place().await;
    upgraded(["Upgrade the workers", "Upgrade nats-server", "Upgrade the dispatchers"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn dispatchers_first_no_word_is_lost() -> Result<()> {
    let _place = fleet::place().await;
    upgraded(["Upgrade the dispatchers", "Upgrade nats-server", "Upgrade the workers"]).await
}
