//! Recordings decoded in a process of their own: what it may do, and what becomes of it when it fails.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use voxfleet_audio::{Chunk, Decoder, Limits, process::DecoderProcess};
use voxfleet_harness::{find, wait::eventually};
use voxfleet_schema::failure::{Failure, FailureClass};

const SOON: Duration = Duration::from_secs(15);

fn limits() -> Limits {
    Limits::default()
}

fn call() -> Result<File> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("audio/call-01.flac");
    File::open(&path).with_context(|| path.display().to_string())
}

fn file(bytes: &[u8]) -> Result<File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(bytes)?;
    Ok(file)
}

/// A wav of `seconds` of silence, which takes no room on the disk.
fn silence(seconds: u64, rate_hz: u32, channels: u16) -> Result<File> {
    let block = channels * 2;
    let bytes = seconds * u64::from(rate_hz) * u64::from(block);
    let mut head = b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\x01\0".to_vec();
    head.extend(channels.to_le_bytes());
    head.extend([rate_hz, rate_hz * u32::from(block)].into_iter().flat_map(u32::to_le_bytes));
    head.extend([block, 16].into_iter().flat_map(u16::to_le_bytes));
    head.extend(b"data");
    head.extend((u32::try_from(bytes)?).to_le_bytes());
    let file = file(&head)?;
    file.set_len(head.len() as u64 + bytes)?;
    Ok(file)
}

async fn start(file: File, limits: Limits) -> Result<DecoderProcess, Failure> {
    DecoderProcess::start(Some(find::voxfleet().expect("the binary")), file, None, limits).await
}

async fn failure_of(process: Result<DecoderProcess, Failure>) -> Result<Failure> {
    let mut process = match process {
        Ok(process) => process,
        Err(failure) => return Ok(failure),
    };
    loop {
        match process.next().await {
            Ok(Some(_)) => {}
            Ok(None) => bail!("decoded to the end"),
            Err(failure) => return Ok(failure),
        }
    }
}

/// A stand-in for the executable: shell, with the two descriptors in `$IN` and `$OUT`.
fn script(folder: &TempDir, body: &str) -> Result<PathBuf> {
    let (text, path) = (folder.path().join("text"), folder.path().join("decoder"));
    std::fs::write(&text, format!("#!/bin/bash\nIN=$3 OUT=$5\n{body}\n"))?;
    // Written by another process: a child that another test is starting would inherit our open file, and a file that is open
    // for writing cannot be executed.
    let installed = std::process::Command::new("install").args(["-m", "755"]).arg(&text).arg(&path).status()?;
    ensure!(installed.success(), "install: {installed}");
    Ok(path)
}

async fn scripted(body: &str, limits: Limits) -> Result<Failure> {
    let folder = TempDir::new()?;
    failure_of(DecoderProcess::start(Some(script(&folder, body)?), call()?, None, limits).await).await
}

fn gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn a_process_gives_what_the_decoder_gives() -> Result<()> {
    let mut direct = Decoder::open(call()?, None, &limits())?;
    let mut process = start(call()?, limits()).await?;
    ensure!((process.format(), process.total_ms()) == (direct.format(), direct.total_ms()));
    loop {
        let (ours, theirs): (Option<Chunk>, Option<Chunk>) = (direct.next()?, process.next().await?);
        ensure!(ours == theirs);
        if ours.is_none() {
            break;
        }
    }
    ensure!(!process.truncated() && process.damaged() == 0);
    ensure!(process.next().await?.is_none(), "the end is the end");
    Ok(())
}

#[tokio::test]
async fn a_bad_file_is_told_with_its_class_at_the_start() -> Result<()> {
    for (bytes, class) in [
        (&b""[..], FailureClass::BadAudio),
        (b"no recording at all, a text", FailureClass::UnsupportedFormat),
        (&[7; 5_000], FailureClass::BadAudio),
    ] {
        match start(file(bytes)?, limits()).await {
            Ok(_) => bail!("{class} expected"),
            Err(failure) => ensure!(failure.class == class, "{failure}"),
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_cut_recording_says_so_at_its_end() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("audio/call-01.flac");
    let bytes = std::fs::read(path)?;
    let mut process = start(file(&bytes[..bytes.len() / 2])?, limits()).await?;
    let mut chunks = 0;
    while process.next().await?.is_some() {
        chunks += 1;
    }
    ensure!(chunks > 50 && process.truncated(), "{chunks} chunks");
    Ok(())
}

#[tokio::test]
async fn the_process_is_confined() -> Result<()> {
    // Long enough to fill the socket: it waits for us while we look.
    let mut process = start(silence(600, 16_000, 1)?, Limits { memory_mb: 100, ..limits() }).await?;
    process.next().await?;
    let pid = process.pid().context("it runs")?;
    let of = |what: &str| std::fs::read_to_string(format!("/proc/{pid}/{what}"));
    let limits = of("limits")?;
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line[name.len()..].split_whitespace().next().unwrap_or_default().to_owned()
    };
    ensure!(limit("Max file size") == "0" && limit("Max core file size") == "0", "{limits}");
    ensure!(limit("Max open files") == "16", "{limits}");
    ensure!(limit("Max address space") != "unlimited" && limit("Max cpu time") != "unlimited", "{limits}");
    let status = of("status")?;
    ensure!(status.lines().any(|line| line.split_whitespace().eq(["NoNewPrivs:", "1"])), "{status}");
    let environment = of("environ")?;
    ensure!(environment.split('\0').all(|v| v.is_empty() || v.starts_with("LD_LIBRARY_PATH=")), "{environment:?}");
    // Standard ones, recording, socket; nothing else of ours.
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    ensure!(open == 5, "{open} descriptors");
    drop(process);
    eventually("it is gone with its owner", SOON, async || gone(pid).then_some(())).await?;
    Ok(())
}

#[tokio::test]
async fn nobody_reading_is_no_stall() -> Result<()> {
    let stall = Duration::from_secs(2);
    let mut process = start(silence(600, 16_000, 1)?, Limits { stall, ..limits() }).await?;
    let begun = Instant::now();
    eventually("longer than a stall passes", SOON, async || (begun.elapsed() > stall * 2).then_some(())).await?;
    let mut chunks = 0;
    while process.next().await?.is_some() {
        chunks += 1;
    }
    ensure!(chunks == 3_000, "{chunks}");
    Ok(())
}

#[tokio::test]
async fn a_dropped_wait_loses_nothing() -> Result<()> {
    let mut process = start(silence(60, 16_000, 1)?, limits()).await?;
    let mut chunks = 0;
    loop {
        // Most of these are dropped in the middle of a frame.
        match tokio::time::timeout(Duration::from_micros(20), process.next()).await {
            Ok(next) if next.as_ref().is_ok_and(Option::is_none) => break,
            Ok(next) => chunks += u32::from(next?.is_some()),
            Err(_) => {}
        }
    }
    ensure!(chunks == 300, "{chunks}");
    Ok(())
}

#[tokio::test]
async fn stopping_waits_until_it_is_gone() -> Result<()> {
    let process = start(silence(600, 16_000, 1)?, limits()).await?;
    let pid = process.pid().context("it runs")?;
    process.stop().await;
    ensure!(gone(pid));
    Ok(())
}

#[tokio::test]
async fn every_death_is_a_typed_failure() -> Result<()> {
    for (body, class) in [
        ("kill -SEGV $$", FailureClass::BadAudio),
        ("kill -KILL $$", FailureClass::OutOfMemory),
        ("kill -ABRT $$", FailureClass::TooLarge),
        ("kill -XCPU $$", FailureClass::Timeout),
        ("exit 101", FailureClass::Internal),
        ("exit 0", FailureClass::Internal),
        ("yes nonsense >&$OUT", FailureClass::Internal),
        // A flood on standard error must not block it.
        ("head -c 1000000 /dev/zero >&2; exit 3", FailureClass::Internal),
    ] {
        let failure = scripted(body, limits()).await?;
        ensure!(failure.class == class, "{body}: {failure}");
    }
    let missing = DecoderProcess::start(Some("/nonexistent/voxfleet".into()), call()?, None, limits()).await;
    ensure!(failure_of(missing).await?.class == FailureClass::Internal);
    Ok(())
}

#[tokio::test]
async fn a_decoder_that_hangs_is_ended() -> Result<()> {
    let folder = TempDir::new()?;
    let pid = folder.path().join("pid");
    let body = format!("echo $$ > {}; exec sleep 1000", pid.display());
    // One that is ended before it has said its name did not begin to hang: another has its turn.
    for _ in 0..10 {
        let failure = scripted(&body, Limits { stall: Duration::from_secs(3), ..limits() }).await?;
        ensure!(failure.class == FailureClass::Timeout, "{failure}");
        let name = std::fs::read_to_string(&pid).unwrap_or_default();
        if !name.trim().is_empty() {
            ensure!(gone(name.trim().parse()?));
            return Ok(());
        }
    }
    bail!("none came as far as to hang")
}

#[tokio::test]
async fn a_file_without_an_end_has_its_time() -> Result<()> {
    // A recording, and behind it nothing for 64 GiB, which takes no room on the disk: read to its end that is half a minute of
    // looking for the next frame.
    for name in ["call-01.mp3", "call-01.ogg", "call-01.opus", "call-01.webm", "call-01.m4a", "call-01-adpcm.wav"] {
        let path = find::root().join("audio/tests/fixtures").join(name);
        let endless = file(&std::fs::read(&path)?)?;
        endless.set_len(64 << 30)?;
        let few = Limits { stall: Duration::from_secs(3), max_seconds: 3_600, ..limits() };
        let begun = Instant::now();
        let mut heard = 0;
        let ended = match start(endless, few).await {
            Err(failure) => Some(failure),
            Ok(mut process) => loop {
                match process.next().await {
                    Ok(Some(chunk)) => heard += chunk.pcm.len(),
                    Ok(None) => break None,
                    Err(failure) => break Some(failure),
                }
            },
        };
        let took = begun.elapsed();
        eprintln!("{name}: {heard} bytes of sound, {ended:?}, {took:.1?}");
        // Said to be over, or to be bad, or ended: never followed to its end.
        ensure!(took < Duration::from_secs(25), "{name}: {took:?}");
        let typed = ended.as_ref().is_none_or(|failure| {
            matches!(failure.class, FailureClass::Timeout | FailureClass::BadAudio | FailureClass::TooLarge)
        });
        ensure!(typed, "{name}: {ended:?}");
    }
    Ok(())
}

#[tokio::test]
async fn too_much_memory_is_too_large() -> Result<()> {
    // A chunk alone, 1.2 MB, is more than what is left to it.
    let failure = failure_of(start(silence(60, 192_000, 16)?, Limits { memory_mb: 0, ..limits() }).await).await?;
    ensure!(
        failure.class == FailureClass::TooLarge && failure.message.contains("the 0 MiB it is allowed"),
        "{failure}"
    );
    Ok(())
}

#[tokio::test]
async fn a_recording_of_hours_takes_no_more_memory_than_a_short_one() -> Result<()> {
    let hours = 2;
    let mut process = start(silence(hours * 3_600, 16_000, 1)?, limits()).await?;
    let pid = process.pid().context("it runs")?;
    let (mut chunks, mut most_kb) = (0u64, 0u64);
    let begun = Instant::now();
    while process.next().await?.is_some() {
        chunks += 1;
        if chunks % 4_000 == 0 {
            // Gone when it has said everything already.
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
            most_kb = most_kb.max(line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0));
        }
    }
    ensure!(chunks == hours * 3_600 * 5, "{chunks}");
    eprintln!("{hours} h: {most_kb} kB at most, {:.1} s", begun.elapsed().as_secs_f64());
    ensure!((1..200_000).contains(&most_kb), "{most_kb} kB");
    Ok(())
}
