//! What people type, against a real server: doctor, stream, watch, status; their output and their exit codes.

use std::{
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio, checker,
    child::Child,
    find,
    fleet::{self, Fleet},
    process::{Settings, voxfleet},
    producer::{Pace, Producer},
    server::{NatsServer, ServerOptions},
    wait::eventually,
};

use crate::direct;

fn command(url: &str, dir: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = voxfleet(&Settings::new().with("nats.urls", url), dir)?;
    command.args(arguments);
    Ok(command)
}

/// Runs to its end on a thread that may block, so that the server's pipes keep being served.
pub(crate) async fn run(url: &str, dir: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command = command(url, dir, arguments)?;
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

pub(crate) fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn said(output: &Output) -> String {
    format!("{}{}", out(output), String::from_utf8_lossy(&output.stderr))
}

pub(crate) fn objects(output: &Output) -> Result<Vec<Value>> {
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

/// What a library of ONNX Runtime 1.10 says to one who asks for its interface: its version, and nothing newer.
const OLD_RUNTIME: &str = r#"
struct base { const void *(*api)(unsigned); const char *(*version)(void); };
static const void *api(unsigned wanted) { (void)wanted; return 0; }
static const char *version(void) { return "1.10.0"; }
const struct base *OrtGetApiBase(void) { static const struct base b = { api, version }; return &b; }
"#;

#[tokio::test(flavor = "multi_thread")]
async fn doctor_sees_a_runtime_of_a_wrong_version() -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("old.c"), OLD_RUNTIME)?;
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o", "libonnxruntime.so", "old.c"]).current_dir(dir.path());
    ensure!(compiler.status().context("cc, which building whisper.cpp needs too")?.success());
    let library = format!("worker.onnxruntime={}", dir.path().join("libonnxruntime.so").display());
    let output = run("nats://127.0.0.1:1", dir.path(), &["doctor", "--json", "--set", &library]).await?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(verdict(&report, "onnxruntime") == "fail", "{report:#}");
    ensure!(report.to_string().contains("1.10.0"), "it names the version it found: {report:#}");
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

/// The server goes away in the middle of a session and comes back with its store: each final is shown once, to the last.
#[tokio::test(flavor = "multi_thread")]
async fn watch_survives_a_restart_of_the_server() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(1).start().await?;
    let dir = tempfile::tempdir()?;
    let (before, after) = (audio::bursts(603, 4.0), audio::bursts(604, 4.0));
    let arguments = ["watch", "restart", "--from", "start", "--until-end", "--json"];
    let command = command(&fleet.url(), dir.path(), &arguments)?;
    let mut watch = Child::start("watch", command, &dir.path().join("watch.log"))?;
    let shown = |watch: &Child| -> Vec<Value> {
        let lines = watch.log().lines().filter_map(|l| serde_json::from_str(l).ok()).collect::<Vec<Value>>();
        lines.into_iter().filter(|l| l["type"] == "final").collect()
    };

    let mut producer = Producer::named(fleet.js(), "restart", "s1");
    producer.stream(&before, 200, Pace::AsFastAsPossible).await?;
    producer.flush().await?;
    eventually("a final before", Duration::from_secs(20), || async { (!shown(&watch).is_empty()).then_some(()) })
        .await?;
    fleet.server()?.restart().await?;
    // As every producer does: what was not acknowledged is sent again under its own number.
    let pieces: Vec<Vec<u8>> = after.bytes().chunks(after.chunk_bytes(200)).map(<[u8]>::to_vec).collect();
    for (piece, end) in pieces.iter().map(|p| (p.clone(), false)).chain([(Vec::new(), true)]) {
        let headers: &[(&str, &str)] = if end { &[("Asr-End", "1")] } else { &[] };
        let begun = std::time::Instant::now();
        while let Err(error) = producer.send(piece.clone(), headers).await {
            ensure!(begun.elapsed() < Duration::from_secs(30), "{error}");
        }
    }
    let status = watch.wait(Duration::from_secs(60)).await.with_context(|| fleet.logs())?;
    ensure!(status.success(), "{status}: {}", watch.log_tail());

    let report = checker::check(&fleet.js(), "restart").await?.clean()?;
    let stored: Vec<u64> = report.finals.iter().filter_map(|f| f.json["index"].as_u64()).collect();
    let seen: Vec<u64> = shown(&watch).iter().filter_map(|l| l["final"]["index"].as_u64()).collect();
    ensure!(seen == stored && stored.len() >= 2, "shown {seen:?}, stored {stored:?}");
    let both = audio::Pcm::mono_16k([before.samples, after.samples].concat());
    ensure!(report.covered == both.samples.len() as u64, "{} samples covered", report.covered);
    Ok(())
}

/// One object, and the words of the call in it.
#[tokio::test(flavor = "multi_thread")]
async fn the_demo_prints_one_object_with_its_word_error_rate() -> Result<()> {
    let _turn = fleet::turn().await;
    let dir = tempfile::tempdir()?;
    let output = demo(dir.path(), &["--speed", "4", "--json"]).await?;
    ensure!(output.status.code() == Some(0), "{}", said(&output));
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| said(&output))?;
    for rate in [&report["wer"], &report["live"]["wer"], &report["job"]["wer"], &report["offline"]["wer"]] {
        ensure!(rate.as_f64().is_some_and(|r| r <= 0.02), "{report:#}");
    }
    ensure!(report["offline"]["same_text"] == true && report["job"]["same_text"] == true, "{report:#}");
    ensure!(report["speed"] == 4.0 && report["job"]["gpu_id"].is_string(), "{report:#}");
    ensure!(report["live"]["final_lag_p50_ms"].is_u64(), "{report:#}");
    let failover = &report["failover"];
    ensure!(failover["same_text"] == true && failover["killed"] != failover["moved_to"], "{report:#}");
    ensure!(failover["detection_ms"].as_u64() <= failover["gap_ms"].as_u64(), "{report:#}");
    ensure!(failover["gap_ms"].as_u64().is_some_and(|ms| ms >= 1_000), "{report:#}");
    Ok(())
}

/// For people: transcript beside reference, and what the `nats` command shows of the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_demo_shows_the_same_through_the_nats_command() -> Result<()> {
    let _turn = fleet::turn().await;
    let dir = tempfile::tempdir()?;
    let output = demo(dir.path(), &["--speed", "4"]).await?;
    ensure!(output.status.code() == Some(0), "{}", said(&output));
    let shown = out(&output);
    for part in [
        "what was said",
        "word error rate 0.0 %",
        "kill -9",
        "declared dead",
        "no word lost, none twice",
        "$ nats stream ls",
        "ASR_AUDIO",
        "$ nats stream get ASR_TRANSCRIPT",
    ] {
        ensure!(shown.contains(part), "{part:?} is not in:\n{shown}");
    }
    ensure!(shown.lines().any(|l| l.starts_with("final ")) && shown.contains("\"gpu_id\""), "{shown}");
    Ok(())
}

pub(crate) async fn demo(dir: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command = voxfleet(&Settings::new(), dir)?;
    command.arg("demo").args(arguments);
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

/// Ctrl-C leaves nothing running.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_demo_takes_its_processes_along() -> Result<()> {
    let _turn = fleet::turn().await;
    let dir = tempfile::tempdir()?;
    let mut command = voxfleet(&Settings::new(), dir.path())?;
    command.arg("demo");
    let log = dir.path().join("demo.log");
    let mut demo = Child::start("demo", command, &log)?;
    let shown = eventually("its processes", Duration::from_secs(60), || async {
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
    eventually("an end of them all", Duration::from_secs(10), || async {
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
