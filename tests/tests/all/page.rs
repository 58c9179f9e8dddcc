//! The dashboard in a headless Chromium, as a dispatcher with a real fleet serves it. `tests/page/check.py` looks; what it needs to
//! see is made here. The same checks run against a mock too, which plays what no small fleet shows: hundreds of GPUs, strangers' text,
//! connections that break, a login.

use std::{
    path::Path,
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::Command,
    time::timeout,
};
use voxfleet_harness::{
    audio, find,
    fleet::{self, Engine, Fleet},
    producer::{Pace, Producer},
};

/// Chromium starts in seconds on an idle machine; here others compile and decode beside it.
const LOOKED: Duration = Duration::from_secs(180);

/// What the page's checks said, and whether all passed. `on_line` is told each line as it comes, and may answer with one.
async fn look(words: &[&str], mut on_line: impl FnMut(&str) -> Result<Option<String>>) -> Result<String> {
    let script = find::root().join("tests/page/check.py");
    let mut command = Command::new("python3");
    command.arg("-u").arg(script).args(words);
    if let Some(folder) = std::env::var_os("VOXFLEET_SCREENS") {
        command.arg("--screens").arg(Path::new(&folder));
    }
    command.env("VOXFLEET_CACHE", find::cache()).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = command.spawn().context("python3")?;
    let mut lines = BufReader::new(child.stdout.take().context("its output")?).lines();
    let mut answers = child.stdin.take().context("its input")?;
    let mut said = String::new();
    let reading = async {
        while let Some(line) = lines.next_line().await? {
            println!("{line}");
            if let Some(answer) = on_line(&line)? {
                answers.write_all(answer.as_bytes()).await?;
                answers.write_all(b"\n").await?;
            }
            said.push_str(&line);
            said.push('\n');
        }
        Ok::<_, anyhow::Error>(child.wait().await?)
    };
    let ended = timeout(LOOKED, reading).await;
    let status = ended.with_context(|| format!("the page was not looked at in time; so far:\n{said}"))??;
    ensure!(status.success(), "{said}");
    Ok(said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_fleet_is_shown_as_it_is() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(3).slots(4).set("dispatcher.http.listen", "127.0.0.1:0").start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    for (index, session) in ["call-a", "call-b", "call-c"].into_iter().enumerate() {
        let mut producer = Producer::named(fleet.js(), session, "s");
        producer.stream(&audio::bursts(index as u64 + 3, 12.0), 200, Pace::AsFastAsPossible).await?;
    }
    let looked = look(&["--base", &url, "--scenario", "calm"], |_| Ok(None)).await;
    looked.with_context(|| fleet.logs())?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_shown_dead() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(4).set("dispatcher.http.listen", "127.0.0.1:0").start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let (workers, mut killed) = (&mut fleet.workers, false);
    let looked = look(&["--base", &url, "--scenario", "dead"], |line| {
        if !line.starts_with("kill a worker") {
            return Ok(None);
        }
        // Its page is on the same machine, and reads the same clock.
        let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
        workers[0].kill9()?;
        killed = true;
        Ok(Some(json!({"killed_ms": at, "gpu_id": workers[0].gpu_id()}).to_string()))
    })
    .await;
    let said = looked.with_context(|| fleet.logs())?;
    ensure!(killed && said.contains("ms after the kill") || said.contains("skipped"), "{said}");
    Ok(())
}

/// Everything that a made-up fleet shows: strangers' text that must stay text, connections that break, a fleet that is empty or
/// full, hundreds of GPUs, a login, a drain and a retry.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_small_fleet_shows_is_shown_right() -> Result<()> {
    let _turn = fleet::turn().await;
    // Two browsers at once, which mostly wait. What a real fleet is asked too is left to that.
    let halves: [&[&str]; 2] = [&["--scenario", "load,drops,login"], &["--scenario", "hostile,empty,full"]];
    let only = ["--scenario", "calm", "--only", "grows,keeps_focus,speaks,stale"];
    let (first, second) = tokio::join!(look(halves[0], |_| Ok(None)), async {
        let said = look(halves[1], |_| Ok(None)).await?;
        Ok::<_, anyhow::Error>(said + &look(&only, |_| Ok(None)).await?)
    });
    let said = first? + &second?;
    for check in [
        "load smooth",
        "load searches",
        "hostile inert",
        "drops comes_back",
        "empty says_empty",
        "full refuses_recording",
        "login drains",
        "login retries",
        "calm speaks",
        "calm stale",
    ] {
        ensure!(said.contains(&format!("ok {check} ")) || said.starts_with("skipped"), "{check}: {said}");
    }
    Ok(())
}

/// What the browser's microphone hears goes through `/asr` into the log, and comes back as lines.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_microphone_hears_becomes_text() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).slots(2).engine(Engine::Micro).set("dispatcher.http.listen", "127.0.0.1:0");
    let fleet = fleet.start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let folder = tempfile::tempdir()?;
    let wav = folder.path().join("call.wav");
    std::fs::write(&wav, audio::call(1)?.wav())?;
    let wav = wav.display().to_string();
    let words = ["--base", &url, "--scenario", "record", "--wav", &wav];
    let said = look(&words, |_| Ok(None)).await.with_context(|| fleet.logs())?;
    let Some(words) = said.lines().find_map(|line| line.strip_prefix("said: ")) else {
        ensure!(said.contains("skipped"), "{said}");
        return Ok(());
    };
    // It hears the call from its beginning, for as long as the button was down: about a sentence.
    let spoken = audio::call_text(1)?;
    let heard = words.split_whitespace().count();
    let begin: Vec<&str> = spoken.split_whitespace().take(heard).collect();
    let rate = audio::word_error_rate(&begin.join(" "), words);
    ensure!(heard >= 5 && rate <= 0.2, "word error rate {rate:.2}: {words:?} for {begin:?}");
    Ok(())
}
