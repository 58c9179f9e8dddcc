//! What people type, against a real server: doctor, stream, watch, status; their output and their exit codes.

use std::{
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio, checker, find,
    fleet::{self, Fleet},
    process::{Settings, voxfleet},
    server::{NatsServer, ServerOptions},
};

use crate::direct;

fn command(url: &str, dir: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = voxfleet(&Settings::new().with("nats.urls", url), dir)?;
    command.args(arguments);
    Ok(command)
}

/// Runs to its end on a thread that may block, so that the server's pipes keep being served.
async fn run(url: &str, dir: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command = command(url, dir, arguments)?;
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn said(output: &Output) -> String {
    format!("{}{}", out(output), String::from_utf8_lossy(&output.stderr))
}

fn objects(output: &Output) -> Result<Vec<Value>> {
    out(output).lines().map(|l| serde_json::from_str(l).with_context(|| l.to_owned())).collect()
}

/// Verdict of each check by name; the worst where a name comes more than once.
fn verdict(report: &Value, name: &str) -> String {
    let checks = report["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of_name = checks.iter().filter(|c| c["name"] == name).filter_map(|c| c["verdict"].as_str());
    let rank = |v: &&str| ["ok", "warn", "fail"].iter().position(|r| r == v);
    of_name.max_by_key(rank).unwrap_or("absent").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_what_is_wrong() -> Result<()> {
    let dir = tempfile::tempdir()?;

    let server = NatsServer::start().await?;
    let output = run(&server.url(), dir.path(), &["doctor", "--json"]).await?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    for (name, wanted) in
        [("nats", "ok"), ("server version", "ok"), ("jetstream", "ok"), ("streams", "warn"), ("dispatcher", "warn")]
    {
        ensure!(verdict(&report, name) == wanted, "{name}: {report:#}");
    }
    ensure!(output.status.code() == Some(0), "{}", said(&output));

    let server = NatsServer::start_with(ServerOptions { jetstream: false, ..ServerOptions::default() }).await?;
    let output = run(&server.url(), dir.path(), &["doctor"]).await?;
    ensure!(output.status.code() == Some(1), "{}", said(&output));
    ensure!(out(&output).lines().any(|l| l.starts_with("FAIL  jetstream") && l.contains("-js")), "{}", said(&output));

    let output = run("nats://127.0.0.1:1", dir.path(), &["doctor", "--json"]).await?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(verdict(&report, "nats") == "fail" && report["ok"] == false, "{report:#}");
    ensure!(verdict(&report, "memory") != "absent", "the machine is looked at all the same: {report:#}");
    ensure!(output.status.code() == Some(1), "{}", said(&output));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_sees_a_damaged_model_and_a_library_that_is_none() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let whole = std::fs::read(fleet::models_dir().join(format!("{}.bin", direct::MICRO)))?;
    std::fs::write(dir.path().join("half.bin"), &whole[..whole.len() / 2])?;
    std::fs::write(dir.path().join("ort.so"), "not a library")?;
    std::fs::write(dir.path().join("silero.onnx"), "not a model")?;
    let set = |key: &str, file: &str| format!("worker.{key}={}", dir.path().join(file).display());
    let (models, library, silero) =
        (set("models_dir", ""), set("onnxruntime", "ort.so"), set("silero_model", "silero.onnx"));
    let arguments = ["doctor", "--json", "--set", &models, "--set", &library, "--set", &silero];
    let output = run("nats://127.0.0.1:1", dir.path(), &arguments).await?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    for (name, wanted) in [("models", "fail"), ("onnxruntime", "fail"), ("silero vad", "warn")] {
        ensure!(verdict(&report, name) == wanted, "{name}: {report:#}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_watch_and_status_agree_with_the_engine() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let dir = tempfile::tempdir()?;
    let pcm = audio::bursts(601, 4.0);
    std::fs::write(dir.path().join("call.raw"), pcm.bytes())?;
    let url = fleet.url();
    let expected = direct::simulated_text(&pcm)?;

    let arguments = ["stream", "call.raw", "--session", "typed", "--open", "--speed", "0", "--wait", "--json"];
    let output = run(&url, dir.path(), &arguments).await?;
    ensure!(output.status.code() == Some(0), "{}", said(&output));
    let lines = objects(&output)?;
    let finals = |lines: &[Value]| -> String {
        let texts = lines.iter().filter(|l| l["type"] == "final").flat_map(|l| {
            let segments = l["final"]["segments"].as_array().map(Vec::as_slice).unwrap_or_default();
            segments.iter().filter_map(|s| s["text"].as_str()).map(|t| t.trim().to_owned()).collect::<Vec<_>>()
        });
        texts.filter(|t| !t.is_empty()).collect::<Vec<_>>().join(" ")
    };
    ensure!(finals(&lines) == expected, "{}", said(&output));
    let sent = lines.iter().find(|l| l["type"] == "sent").context("what was sent")?;
    ensure!(sent["audio_ms"] == 4_000 && sent["chunks"] == 20 && sent["ended"] == true, "{sent}");
    checker::check(&fleet.js(), "typed").await?.clean()?;

    // Who comes later sees the same from the start.
    let output = run(&url, dir.path(), &["watch", "typed", "--from", "start", "--until-end", "--json"]).await?;
    ensure!(output.status.code() == Some(0) && finals(&objects(&output)?) == expected, "{}", said(&output));
    let output = run(&url, dir.path(), &["watch", "typed", "--from", "start", "--until-end"]).await?;
    ensure!(out(&output).lines().any(|l| l.starts_with("final ") && l.contains("gpu-1")), "{}", said(&output));

    let output = run(&url, dir.path(), &["status", "--json", "--all"]).await?;
    let status: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(status["dispatcher"].is_string() && status["workers"][0]["heartbeat"]["gpu_id"] == "gpu-1", "{status:#}");
    ensure!(status["sessions"][0]["id"] == "typed", "{status:#}");
    let output = run(&url, dir.path(), &["status"]).await?;
    ensure!(out(&output).contains("gpu-1") && out(&output).contains("no open session"), "{}", said(&output));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_fleet_refuses_an_open_with_its_own_exit_code() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).slots(1).start().await?;
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("call.raw"), audio::bursts(602, 1.0).bytes())?;
    let stream = |session| ["stream", "call.raw", "--open", "--speed", "0", "--no-end", "--session", session];
    let first = run(&fleet.url(), dir.path(), &stream("first")).await?;
    ensure!(first.status.code() == Some(0), "{}", said(&first));
    let second = run(&fleet.url(), dir.path(), &stream("second")).await?;
    ensure!(second.status.code() == Some(75), "{}", said(&second));
    ensure!(said(&second).contains("No GPU resources available"), "{}", said(&second));
    Ok(())
}

/// Without a dispatcher there is still something to see, and it is said where it comes from.
#[tokio::test(flavor = "multi_thread")]
async fn status_works_without_a_dispatcher() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(1).start().await?;
    let dir = tempfile::tempdir()?;
    fleet.dispatchers[0].terminate(Duration::from_secs(10)).await?;
    let output = run(&fleet.url(), dir.path(), &["status"]).await?;
    ensure!(output.status.code() == Some(0), "{}", said(&output));
    ensure!(out(&output).starts_with("no dispatcher") && out(&output).contains("gpu-1"), "{}", said(&output));
    Ok(())
}

/// Ctrl-C leaves nothing running.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_demo_takes_its_processes_along() -> Result<()> {
    let _turn = fleet::turn().await;
    let dir = tempfile::tempdir()?;
    let mut command = voxfleet(&Settings::new(), dir.path())?;
    command.arg("demo");
    let log = dir.path().join("demo.log");
    let mut demo = voxfleet_harness::child::Child::start("demo", command, &log)?;
    let shown = voxfleet_harness::wait::eventually("its processes", Duration::from_secs(60), || async {
        demo.log().lines().find(|l| l.contains("workers (pids")).map(str::to_owned)
    })
    .await?;
    let numbers = shown.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok());
    let pids: Vec<u32> = numbers.filter(|n| Path::new(&format!("/proc/{n}")).exists()).collect();
    ensure!(pids.len() >= 3, "{shown}");
    let signal = Command::new("kill").args(["-INT", &demo.pid().to_string()]).status()?;
    ensure!(signal.success(), "{signal}");
    let status = demo.wait(Duration::from_secs(15)).await?;
    ensure!(status.code() == Some(130), "{status}: {}", demo.log_tail());
    voxfleet_harness::wait::eventually("an end of them all", Duration::from_secs(10), || async {
        pids.iter().all(|pid| !alive(*pid)).then_some(())
    })
    .await?;
    Ok(())
}

/// A process that has ended and was not yet reaped counts as ended.
fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let comm_is_ours = stat.contains("(voxfleet)") || stat.contains("(nats-server)");
    comm_is_ours && !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
}

#[test]
fn the_binary_is_found() -> Result<()> {
    ensure!(find::voxfleet()?.is_file());
    Ok(())
}
