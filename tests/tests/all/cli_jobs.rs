//! Recordings as people hand them in: transcribe, jobs, export, against a real fleet; output, exit codes, Ctrl-C.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio,
    child::Child,
    find,
    fleet::{self, Engine, Fleet},
    process::{Settings, voxfleet},
    wait::eventually,
};
use voxfleet_schema::session::SessionOptions;

use crate::direct;

fn command(fleet: &Fleet, dir: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = voxfleet(&Settings::new().with("nats.urls", fleet.url()), dir)?;
    command.args(arguments);
    Ok(command)
}

/// Runs to its end on a thread that may block; `input` becomes its standard input.
async fn run_with(fleet: &Fleet, dir: &Path, arguments: &[&str], input: Stdio) -> Result<Output> {
    let mut command = command(fleet, dir, arguments)?;
    command.stdin(input);
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

async fn run(fleet: &Fleet, dir: &Path, arguments: &[&str]) -> Result<Output> {
    run_with(fleet, dir, arguments, Stdio::null()).await
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn said(output: &Output) -> String {
    format!("exit {:?}\n{}{}", output.status.code(), out(output), err(output))
}

fn ended(output: &Output, code: i32) -> Result<()> {
    ensure!(output.status.code() == Some(code), "not {code}: {}", said(output));
    Ok(())
}

/// A run that must succeed.
async fn good(fleet: &Fleet, dir: &Path, arguments: &[&str]) -> Result<String> {
    let output = run(fleet, dir, arguments).await?;
    ended(&output, 0).with_context(|| format!("{arguments:?}"))?;
    Ok(out(&output))
}

async fn object(fleet: &Fleet, dir: &Path, arguments: &[&str]) -> Result<Value> {
    let text = good(fleet, dir, arguments).await?;
    serde_json::from_str(&text).with_context(|| text)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Start and end of each cue in ms, and the text; checks the form on the way.
fn subtitles(file: &str) -> Result<(Vec<(u64, u64)>, String)> {
    let (mut times, mut words) = (Vec::new(), Vec::new());
    for (n, cue) in file.trim_end().split("\n\n").enumerate() {
        let mut lines = cue.lines();
        ensure!(lines.next() == Some((n + 1).to_string().as_str()), "cue {n} is not numbered: {cue}");
        let (from, to) = lines.next().and_then(|l| l.split_once(" --> ")).context("a time range")?;
        let ms = |clock: &str| -> Result<u64> {
            let numbers: Vec<u64> = clock.split([':', ',']).map(str::parse).collect::<Result<_, _>>()?;
            let [h, m, s, ms] = numbers[..] else { anyhow::bail!("{clock} is no time") };
            Ok(((h * 60 + m) * 60 + s) * 1000 + ms)
        };
        times.push((ms(from)?, ms(to)?));
        let text: Vec<&str> = lines.collect();
        ensure!((1..=2).contains(&text.len()) && text.iter().all(|l| l.chars().count() <= 42), "{cue}");
        words.extend(text);
    }
    ensure!(times.iter().all(|(from, to)| from < to), "{times:?}");
    ensure!(times.windows(2).all(|w| w[0].1 <= w[1].0), "cues overlap: {times:?}");
    Ok((times, one_line(&words.join(" "))))
}

/// One call, every form, from a file, from standard input, live; result and export agree to the letter.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_becomes_text_objects_and_subtitles() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(2).slots(2).engine(Engine::Micro).start().await?;
    let outcome = forms(&fleet).await;
    let logs = fleet.logs();
    outcome.with_context(|| logs)
}

async fn forms(fleet: &Fleet) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (dir, file) = (dir.path(), find::root().join("tests/audio/call-02.flac"));
    let call = file.to_str().context("a path")?;
    let log = direct::log(&audio::call(2)?, 200);
    let alone = direct::transcribe(&mut *direct::micro()?, &*direct::best_vad(), &SessionOptions::default(), &log)?;
    let expected = direct::text(&alone);
    let rate = audio::word_error_rate(&audio::call_text(2)?, &expected);
    ensure!(rate <= 0.02, "word error rate {rate}: {expected}");

    let output = run(fleet, dir, &["transcribe", call, "--id", "c2", "-f", "srt"]).await?;
    ended(&output, 0)?;
    let srt = out(&output);
    let (times, text) = subtitles(&srt)?;
    ensure!(text == expected, "{text}\n{expected}");
    let length_ms = (audio::call(2)?.seconds() * 1000.0) as u64;
    ensure!(times.len() >= 8 && times.last().is_some_and(|(_, to)| *to <= length_ms), "{times:?} of {length_ms}");
    ensure!(err(&output).contains("job c2") && err(&output).contains("x real time"), "{}", said(&output));

    // The job exists and is done: its result comes at once, in every other form.
    let begun = std::time::Instant::now();
    let text = good(fleet, dir, &["transcribe", call, "--id", "c2"]).await?;
    ensure!(one_line(&text) == expected && text.lines().count() >= 8, "{text}");
    ensure!(begun.elapsed() < Duration::from_secs(10), "it was transcribed again: {:?}", begun.elapsed());
    let json = object(fleet, dir, &["jobs", "result", "c2", "-f", "json"]).await?;
    ensure!(json["full_text"] == expected && json["provider"] == "local", "{json}");
    ensure!(json["aligned_segments"][0]["words"].as_array().is_some_and(|w| !w.is_empty()), "{json}");
    ensure!(good(fleet, dir, &["jobs", "result", "c2", "-f", "srt", "-o", "c2.srt"]).await?.is_empty());
    ensure!(std::fs::read_to_string(dir.join("c2.srt"))? == srt, "the file differs");
    let vtt = good(fleet, dir, &["jobs", "result", "c2", "-f", "vtt"]).await?;
    ensure!(vtt.starts_with("WEBVTT\n\n1\n00:00:0") && !vtt.contains(','), "{vtt}");

    // From the chain alone.
    let output = run(fleet, dir, &["export", "c2", "-f", "srt"]).await?;
    ended(&output, 0)?;
    ensure!(out(&output) == srt && err(&output).is_empty(), "{}", said(&output));
    let export = object(fleet, dir, &["export", "c2", "--job", "-f", "json"]).await?;
    for field in ["full_text", "segments", "aligned_segments", "language", "duration", "speaker_turns"] {
        ensure!(export[field] == json[field], "{field}: {} and {}", export[field], json[field]);
    }
    ensure!(export["ended"] == true && export["kind"] == "job", "{export}");
    let words = object(fleet, dir, &["export", "c2", "-f", "words"]).await?;
    let spoken: Vec<&str> =
        words["words"].as_array().into_iter().flatten().filter_map(|w| w["word"].as_str()).collect();
    ensure!(one_line(&spoken.join(" ")) == expected, "{words}");
    ended(&run(fleet, dir, &["export", "c2", "--session"]).await?, 66)?;

    // The same id for another recording is a mistake, not its result.
    std::fs::write(dir.join("other.wav"), audio::bursts(7, 1.0).wav())?;
    let output = run(fleet, dir, &["transcribe", "other.wav", "--id", "c2"]).await?;
    ended(&output, 1)?;
    ensure!(err(&output).contains("another recording"), "{}", said(&output));

    let output = run_with(fleet, dir, &["transcribe", "-"], std::fs::File::open(&file)?.into()).await?;
    ended(&output, 0)?;
    ensure!(one_line(&out(&output)) == expected, "{}", said(&output));

    let live = ["transcribe", "--live", call, "--speed", "0", "--id", "live", "-f", "srt", "-v"];
    let output = run(fleet, dir, &live).await?;
    ended(&output, 0)?;
    ensure!(subtitles(&out(&output))?.1 == expected, "{}", said(&output));
    ensure!(err(&output).contains("gpu-"), "finals are shown as they come: {}", said(&output));
    ensure!(good(fleet, dir, &["export", "live", "-f", "srt"]).await? == out(&output));
    Ok(())
}

/// Submit, list, show, cancel, result, and what is not there.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_submitted_looked_at_and_cancelled() -> Result<()> {
    let _turn = fleet::turn().await;
    // As slow as speech, so that a job of a minute is found half way.
    let engine = Engine::Simulated { speed: 1.0 };
    let fleet = Fleet::builder().workers(1).engine(engine).set("worker.job_slots", 1).start().await?;
    let outcome = handled(&fleet).await;
    let logs = fleet.logs();
    outcome.with_context(|| logs)
}

async fn handled(fleet: &Fleet) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    std::fs::write(dir.join("long.wav"), audio::bursts(701, 60.0).wav())?;
    std::fs::write(dir.join("short.wav"), audio::bursts(702, 2.0).wav())?;
    let state = |id: &'static str| async move {
        Ok::<_, anyhow::Error>(object(fleet, dir, &["jobs", "show", id, "--json"]).await?["record"]["state"].clone())
    };

    ensure!(good(fleet, dir, &["jobs", "submit", "long.wav", "--id", "running", "--ttl", "1h"]).await? == "running\n");
    let held = || async {
        let shown = object(fleet, dir, &["jobs", "show", "running", "--json"]).await.ok()?;
        (shown["progress"]["stage"] == "transcribing").then_some(shown)
    };
    let shown = eventually("a job being transcribed", Duration::from_secs(30), held).await?;
    ensure!(shown["record"]["name"] == "long.wav" && shown["record"]["result_ttl_s"] == 3_600, "{shown:#}");
    let submitted =
        object(fleet, dir, &["jobs", "submit", "short.wav", "--id", "waiting", "--json", "--priority", "low"]).await?;
    ensure!(submitted["job"] == "waiting" && submitted["state"] == "queued", "{submitted}");
    good(fleet, dir, &["jobs", "submit", "short.wav", "--id", "behind", "--priority", "low"]).await?;
    let shown = good(fleet, dir, &["jobs", "show", "waiting"]).await?;
    ensure!(shown.contains("queued") && shown.contains("priority=low"), "{shown}");

    let list = good(fleet, dir, &["jobs", "list"]).await?;
    for part in ["running", "waiting", "assigned", "queued", "gpu-1", "long.wav", "PROGRESS"] {
        ensure!(list.contains(part), "{part} is not in:\n{list}");
    }
    // Whoever waits is told how long the queue before him is.
    let line = |id: &str| list.lines().find(|l| l.starts_with(id)).map(one_line).unwrap_or_default();
    ensure!(line("waiting").contains("next"), "{list}");
    ensure!(line("behind").contains("1 before it"), "{list}");
    let only = object(fleet, dir, &["jobs", "list", "--state", "queued", "--json"]).await?;
    let rows = only["jobs"].as_array().context("jobs")?;
    let ahead = |id: &str| rows.iter().find(|j| j["job"] == id).map(|j| j["ahead"].clone());
    ensure!(only["total"] == 2 && ahead("waiting") == Some(0.into()) && ahead("behind") == Some(1.into()), "{only}");

    // What is not done has no result yet, and its chain is read as far as it goes.
    let output = run(fleet, dir, &["jobs", "result", "waiting"]).await?;
    ended(&output, 75)?;
    ensure!(err(&output).contains("has not ended"), "{}", said(&output));
    let so_far = || async {
        let output = run(fleet, dir, &["export", "running"]).await.ok()?;
        (output.status.code() == Some(0)).then_some(output)
    };
    let output = eventually("the first finals of a running job", Duration::from_secs(40), so_far).await?;
    ensure!(err(&output).contains("has not ended") && !out(&output).is_empty(), "{}", said(&output));

    for id in ["waiting", "behind", "running"] {
        let asked_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
        ensure!(good(fleet, dir, &["jobs", "cancel", id]).await? == format!("{id} cancelled\n"));
        let gone = || async {
            let shown = object(fleet, dir, &["jobs", "show", id, "--json"]).await.ok()?;
            (shown["record"]["state"] == "cancelled").then_some(shown)
        };
        let shown = eventually(format!("{id} being cancelled"), Duration::from_secs(20), gone).await?;
        // Bounded, though a decode is under way in the one that runs. How long a process takes to show it is not counted.
        let ended_ms = shown["record"]["ended_ms"].as_u64().context("its end")?;
        ensure!(ended_ms < asked_ms + 5_000, "{id} ended {} ms after it was cancelled", ended_ms - asked_ms);
        // Twice is as good as once.
        ensure!(good(fleet, dir, &["jobs", "cancel", id]).await?.contains(id));
        let output = run(fleet, dir, &["jobs", "result", id]).await?;
        ended(&output, 1)?;
        ensure!(err(&output).contains("cancelled"), "{}", said(&output));
    }

    for arguments in [
        &["jobs", "show", "nobody"][..],
        &["jobs", "cancel", "nobody"],
        &["jobs", "result", "nobody"],
        &["export", "nobody"],
    ] {
        let output = run(fleet, dir, arguments).await?;
        ended(&output, 66).with_context(|| format!("{arguments:?}"))?;
        ensure!(err(&output).contains("nobody"), "{}", said(&output));
    }

    // The slot is free again: what comes next is done.
    ensure!(!good(fleet, dir, &["transcribe", "short.wav", "--id", "next"]).await?.is_empty());
    ensure!(state("next").await? == "done");
    Ok(())
}

/// Ctrl-C takes the job along.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_transcribe_cancels_its_job() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).engine(Engine::Simulated { speed: 1.0 }).start().await?;
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    std::fs::write(dir.join("long.wav"), audio::bursts(703, 60.0).wav())?;
    let arguments = ["transcribe", "long.wav", "--id", "stopped"];
    let mut typed = Child::start("transcribe", command(&fleet, dir, &arguments)?, &dir.join("transcribe.log"))?;
    let begun = || async { typed.log().contains("transcribing").then_some(()) };
    eventually("progress in a pipe", Duration::from_secs(30), begun).await.with_context(|| typed.log())?;
    let sent = Command::new("kill").args(["-INT", &typed.pid().to_string()]).status()?;
    ensure!(sent.success(), "{sent}");
    let status = typed.wait(Duration::from_secs(15)).await?;
    ensure!(status.code() == Some(130) && typed.log().contains("job stopped cancelled"), "{status}: {}", typed.log());
    let cancelled = || async {
        let shown = object(&fleet, dir, &["jobs", "show", "stopped", "--json"]).await.ok()?;
        (shown["record"]["state"] == "cancelled").then_some(())
    };
    eventually("its job being cancelled", Duration::from_secs(20), cancelled).await?;
    Ok(())
}

/// Each bad recording has its class, its sentence and its exit code, and stands in nobody's way.
#[tokio::test(flavor = "multi_thread")]
async fn bad_recordings_end_with_their_own_exit_codes() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let outcome = refused(&fleet).await;
    let logs = fleet.logs();
    outcome.with_context(|| logs)
}

async fn refused(fleet: &Fleet) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    std::fs::write(dir.join("text.wav"), "this is a letter and no recording\n".repeat(100))?;
    std::fs::write(dir.join("empty.wav"), "")?;
    std::fs::write(dir.join("good.wav"), audio::bursts(704, 2.0).wav())?;
    let cases = [
        ("text.wav", 65, "_"),
        ("empty.wav", 65, "empty"),
        ("no-such.wav", 65, "no-such.wav"),
        ("object://asr_media/no/such/object", 66, "not_found"),
        // No folder of a worker's machine is open unless it was opened.
        ("file:///etc/hostname", 66, "forbidden"),
    ];
    for (input, code, part) in cases {
        let output = run(fleet, dir, &["transcribe", input]).await?;
        ended(&output, code).with_context(|| input.to_owned())?;
        ensure!(out(&output).is_empty() && err(&output).contains(part), "{input}: {}", said(&output));
    }
    let nothing = run(fleet, dir, &["transcribe", "-"]).await?;
    ended(&nothing, 65)?;
    ensure!(!good(fleet, dir, &["transcribe", "good.wav"]).await?.is_empty());
    Ok(())
}

/// The fleet of the demo is there for others until Ctrl-C, and the lines it prints work.
#[tokio::test(flavor = "multi_thread")]
async fn the_demos_fleet_can_be_used_from_elsewhere() -> Result<()> {
    let _turn = fleet::turn().await;
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let mut serve = voxfleet(&Settings::new(), dir)?;
    serve.args(["demo", "--serve"]);
    let mut demo = Child::start("demo", serve, &dir.join("demo.log"))?;
    let url = || async {
        let log = demo.log();
        log.lines().find_map(|l| l.trim().strip_prefix("export VOXFLEET__NATS__URLS=")).map(str::to_owned)
    };
    let url = eventually("its lines to try", Duration::from_secs(60), url).await.with_context(|| demo.log())?;
    let log = demo.log();
    let typed = log.lines().find(|l| l.contains(" transcribe ")).context("a line to try")?;
    let mut shell = Command::new("sh");
    shell.args(["-c", typed]).env("VOXFLEET__NATS__URLS", url).current_dir(dir);
    let output = tokio::task::spawn_blocking(move || shell.output()).await??;
    ended(&output, 0)?;
    let heard = subtitles(&out(&output))?.1;
    let rate = audio::word_error_rate(&audio::call_text(1)?, &heard);
    ensure!(rate <= 0.02, "word error rate {rate}: {heard}");
    let sent = Command::new("kill").args(["-INT", &demo.pid().to_string()]).status()?;
    ensure!(sent.success(), "{sent}");
    let status = demo.wait(Duration::from_secs(15)).await?;
    ensure!(status.success(), "{status}: {}", demo.log_tail());
    Ok(())
}
