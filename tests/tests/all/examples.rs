//! The example producers, run as a reader would run them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
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
    // Ours in front of what somebody has installed, which may be another version.
    let modules = std::env::var_os("PYTHONPATH").unwrap_or_default();
    let modules =
        std::iter::once(nats_py()).chain(std::env::split_paths(&modules).filter(|p| !p.as_os_str().is_empty()));
    command.env("PYTHONPATH", std::env::join_paths(modules)?).env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

/// Where `deploy/bootstrap.sh` puts the Python client.
fn nats_py() -> PathBuf {
    find::cache().join("python")
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

/// Why the Python example cannot run here although nothing is wrong.
async fn no_python(dir: &Path) -> Result<Option<&'static str>> {
    if !run("python3", &["--version"], "", dir).await.is_ok_and(|o| o.status.success()) {
        return Ok(Some("Python 3 is not here"));
    }
    let probe = run("python3", &["-c", "import nats; nats.connect"], "", dir).await?;
    if probe.status.success() {
        return Ok(None);
    }
    if std::env::var_os("VOXFLEET_OFFLINE").is_some_and(|v| v == "1") {
        return Ok(Some("nats-py is not here, and VOXFLEET_OFFLINE=1 says that it cannot be fetched"));
    }
    bail!("nats-py is not in {}; get it with: sh deploy/bootstrap.sh deps\n{}", nats_py().display(), said(&probe))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_producer_sends_a_file_and_prints_its_finals() -> Result<()> {
    let _turn = fleet::turn().await;
    let dir = tempfile::tempdir()?;
    if let Some(why) = no_python(dir.path()).await? {
        println!("skipped: {why}");
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

/// `cargo test --workspace` builds the examples beside the test executables, which lie in target/<profile>/deps.
fn rust_producer() -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let program = me.parent().and_then(Path::parent).context("a folder")?.join("examples/producer");
    ensure!(
        program.is_file(),
        "{} is not here; build it with: cargo build -p voxfleet-nats --example producer",
        program.display()
    );
    Ok(program)
}

/// A 16-bit WAV file with one thing in it that is not audio.
fn wav(pcm: &Pcm) -> Vec<u8> {
    let (audio, frame) = (pcm.bytes(), pcm.channels as u32 * 2);
    let chunk = |name: &[u8], body: &[u8]| [name, &(body.len() as u32).to_le_bytes(), body].concat();
    let rate = pcm.rate_hz;
    let format = [
        &1u16.to_le_bytes()[..],
        &(pcm.channels as u16).to_le_bytes(),
        &rate.to_le_bytes(),
        &(rate * frame).to_le_bytes(),
        &(frame as u16).to_le_bytes(),
        &16u16.to_le_bytes(),
    ];
    let body = [&b"WAVE"[..], &chunk(b"LIST", b"made up!"), &chunk(b"fmt ", &format.concat()), &chunk(b"data", &audio)];
    chunk(b"RIFF", &body.concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rust_producer_sends_raw_audio_and_a_wav_file() -> Result<()> {
    let _turn = fleet::turn().await;
    let program = rust_producer()?.display().to_string();
    let fleet = Fleet::builder().workers(1).start().await?;
    let dir = tempfile::tempdir()?;
    let pcm = audio::bursts(503, 3.0);
    std::fs::write(dir.path().join("call.raw"), pcm.bytes())?;
    std::fs::write(dir.path().join("call.wav"), wav(&pcm))?;
    for (file, session) in [("call.raw", "rust-raw"), ("call.wav", "rust-wav")] {
        let output = run(&program, &[file, &fleet.url(), session], &fleet.url(), dir.path()).await?;
        ensure!(output.status.success(), "{}", said(&output));
        ensure!(said(&output).contains(&format!("session {session}: 15 chunks")), "{}", said(&output));
        ends_right(&fleet, session, &pcm).await?;
    }
    let output = run(&program, &[], &fleet.url(), dir.path()).await?;
    ensure!(!output.status.success() && said(&output).contains("usage"), "{}", said(&output));
    Ok(())
}
