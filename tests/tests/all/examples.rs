//! The example producers, run as a reader would run them.

use std::{
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker, find,
    fleet::{self, Fleet},
};

use crate::direct;

/// Runs an example with the tools where bootstrap puts them, in a folder of its own: `nats` is also a folder of ours, and
/// Python would import that.
async fn run(program: &str, args: &[&str], url: &str, dir: &Path) -> Result<Output> {
    let tools = find::nats_cli()?.parent().context("a folder")?.to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(tools).chain(std::env::split_paths(&path)))?;
    let mut command = Command::new(program);
    command.args(args).current_dir(dir).env("PATH", path).env("NATS_URL", url).env_remove("NATS_CONTEXT");
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

async fn ends_right(fleet: &Fleet, session: &str, pcm: &Pcm) -> Result<()> {
    let text = fleet.wait_end(session, Duration::from_secs(30)).await?;
    checker::check(&fleet.js(), session).await?.clean()?;
    ensure!(text == direct::simulated_text(pcm)?, "{session}: {text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shell_producer_sends_a_file_whole_and_live() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let dir = tempfile::tempdir()?;
    let pcm = audio::bursts(501, 4.0);
    std::fs::write(dir.path().join("call.raw"), pcm.bytes())?;
    let script = find::root().join("examples/producer.sh").display().to_string();

    let output = run("sh", &[&script, "call.raw"], &fleet.url(), dir.path()).await?;
    ensure!(output.status.success(), "{}", said(&output));
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let session = told.lines().find_map(|l| l.strip_prefix("session ")).context("the script names its session")?;
    ends_right(&fleet, session, &pcm).await?;

    let output = run("sh", &[&script, "--live", "call.raw", "shell-live"], &fleet.url(), dir.path()).await?;
    ensure!(output.status.success(), "{}", said(&output));
    ends_right(&fleet, "shell-live", &pcm).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_producer_sends_a_file_and_prints_its_finals() -> Result<()> {
    let _turn = fleet::turn().await;
    let dir = tempfile::tempdir()?;
    let probe = run("python3", &["-c", "import nats; nats.connect"], "", dir.path()).await;
    if !probe.as_ref().is_ok_and(|o| o.status.success()) {
        println!("skipped: Python 3 with nats-py is not here (pip install nats-py)");
        return Ok(());
    }
    let fleet = Fleet::builder().workers(1).start().await?;
    let pcm = audio::bursts(502, 4.0);
    std::fs::write(dir.path().join("call.raw"), pcm.bytes())?;
    let script = find::root().join("examples/producer.py").display().to_string();
    let (format, url) = ("pcm_s16le;rate=16000;channels=1", fleet.url());
    let args = [script.as_str(), "call.raw", "--format", format, "--session", "python", "--url", &url];
    let output = run("python3", &args, &url, dir.path()).await?;
    ensure!(output.status.success(), "{}", said(&output));
    ends_right(&fleet, "python", &pcm).await?;
    let expected = direct::simulated_text(&pcm)?;
    let first_word = expected.split(' ').next().context("a word")?;
    ensure!(said(&output).contains(first_word), "{}", said(&output));
    Ok(())
}
