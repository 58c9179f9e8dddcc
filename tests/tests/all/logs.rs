//! What a fleet's processes log: names in the same fields everywhere, never more than so much, and neither secrets nor what
//! somebody said.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio, checker,
    fleet::{self, Fleet},
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_schema::{
    job::JobState,
    session::{Priority, SessionOptions},
};

use crate::jobs_fleet;

const SOON: Duration = Duration::from_secs(30);
/// In everything that is secret or private here.
const MARK: &str = "quokkaflute";

async fn say(fleet: &Fleet, session: &str, seed: u64, first: &[(&str, &str)]) -> Result<()> {
    let mut producer = Producer::named(fleet.js(), session, "s1");
    producer.stream_with(&audio::bursts(seed, 5.0), 200, Pace::AsFastAsPossible, first).await?;
    producer.end().await?;
    fleet.wait_end(session, SOON).await.with_context(|| fleet.logs())?;
    Ok(())
}

fn logs(fleet: &Fleet) -> Vec<(String, String)> {
    let dispatchers = fleet.dispatchers.iter().map(|process| (process.name().to_owned(), process.log()));
    dispatchers.chain(fleet.workers.iter().map(|process| (process.name().to_owned(), process.log()))).collect()
}

/// Texts that somebody said: of whole segments, for single words are words of ours too.
async fn said(fleet: &Fleet, kind: &str, id: &str) -> Result<Vec<String>> {
    let finals = checker::finals_of(&fleet.js(), kind, id).await?;
    let segments = finals.iter().flat_map(|f| f.json["segments"].as_array().into_iter().flatten());
    let texts = segments.filter_map(|segment| Some(segment["text"].as_str()?.trim().to_owned()));
    Ok(texts.filter(|text| text.split(' ').count() >= 2).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_and_nothing_that_was_said_is_logged_at_any_level() -> Result<()> {
    let _place = fleet::place().await;
    let secret = |name: &str| format!("{name}-{MARK}");
    let fleet = Fleet::builder()
        .workers(2)
        .set("log.filter", "debug,voxfleet=trace,voxfleet_dispatcher=trace,voxfleet_worker=trace,voxfleet_nats=trace")
        .set("log.format", "json")
        // Nothing may hide behind a bound.
        .set("log.max_lines", 0)
        .set("log.max_kb", 0)
        // A server without accounts takes any.
        .set("nats.token", secret("token"))
        .set("tracing.endpoint", "http://127.0.0.1:9")
        .set("tracing.headers", format!("authorization=Bearer {}", secret("bearer")))
        .set("tracing.timeout_ms", 200)
        .start()
        .await?;
    let (prompt, hotwords) = (secret("prompt"), secret("hotword"));
    say(&fleet, "private", 3, &[("Asr-Opt-Prompt", &prompt), ("Asr-Opt-Hotwords", &hotwords)]).await?;
    // Headers that are wrong, with what must not be repeated in them.
    let mut wrong = Producer::named(fleet.js(), "wrong", "s1");
    wrong.send(vec![0; 640], &[("Asr-Opt-Endpoint-Ms", "soon"), ("Asr-Opt-Prompt", &prompt)]).await?;

    let nats = jobs_fleet::connect(&fleet).await?;
    let options = SessionOptions {
        prompt: Some(prompt.clone()),
        hotwords: vec![hotwords.clone()],
        priority: Priority::High,
        ..SessionOptions::default()
    };
    let mut request = jobs_fleet::request("recording", audio::bursts(4, 5.0).wav())?;
    request.options = options.clone();
    jobs_fleet::submit(&nats, &request).await?;
    ensure!(jobs_fleet::ended(&nats, &fleet, "recording").await?.record.state == JobState::Done);
    // Two that cannot be fetched, whose addresses are secrets: one is refused at once, one by whoever is to fetch it.
    let mut unreachable = jobs_fleet::request("unreachable", Vec::new())?;
    (unreachable.data, unreachable.options) = (None, options);
    unreachable.audio = Some(format!("https://user:{}@127.0.0.1:9/a.wav", secret("password")));
    ensure!(jobs_fleet::submit(&nats, &unreachable).await.is_err());
    unreachable.audio = Some(format!("https://127.0.0.1:9/a.wav?sig={}", secret("signature")));
    jobs_fleet::submit(&nats, &unreachable).await?;
    ensure!(jobs_fleet::ended(&nats, &fleet, "unreachable").await?.record.state == JobState::Failed);

    let mut texts = said(&fleet, "session", "private").await?;
    texts.extend(said(&fleet, "job", "recording").await?);
    ensure!(texts.len() >= 3, "hardly anything was said: {texts:?}");
    eventually("a line of the exporter", SOON, || async {
        logs(&fleet).iter().any(|(_, log)| log.contains("spans not taken")).then_some(())
    })
    .await?;
    for (name, log) in logs(&fleet) {
        ensure!(log.contains("\"level\":\"DEBUG\"") && log.len() > 5_000, "{name} logs nothing:\n{log}");
        for line in log.lines() {
            ensure!(!line.contains(MARK), "{name}: {line}");
            ensure!(!texts.iter().any(|text| line.contains(text.as_str())), "{name}: {line}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_name_session_job_gpu_and_epoch_alike_in_every_process() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = Fleet::builder().workers(1).set("log.filter", "debug").set("log.format", "json").start().await?;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    say(&fleet, "named", 5, &[("traceparent", &format!("00-{trace}-b7ad6b7169203331-01"))]).await?;
    let nats = jobs_fleet::connect(&fleet).await?;
    jobs_fleet::submit(&nats, &jobs_fleet::request("named-job", audio::bursts(6, 5.0).wav())?).await?;
    jobs_fleet::ended(&nats, &fleet, "named-job").await?;
    let gpu = fleet.workers[0].gpu_id().to_owned();
    let lines =
        |log: String| log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).collect::<Vec<_>>();
    let (dispatcher, worker) = (lines(fleet.dispatchers[0].log()), lines(fleet.workers[0].log()));
    let whose =
        [("session", "named", "session assigned", "session opened"), ("job", "named-job", "job assigned", "job taken")];
    for (kind, id, assigned, begun) in whose {
        for (process, lines, message) in [("dispatcher", &dispatcher, assigned), ("worker", &worker, begun)] {
            let line = lines.iter().find(|line| line["message"] == message && line[kind] == id);
            let line = line.with_context(|| format!("{process}: no {message:?} with {kind}={id}\n{}", fleet.logs()))?;
            ensure!(line["gpu"] == gpu && line["epoch"] == 1, "{line}");
            ensure!(kind == "job" || line["trace_id"] == trace, "{line}");
        }
    }
    let stored = worker.iter().find(|line| line["message"] == "final stored").context("a final")?;
    ensure!(stored["session"].is_string() != stored["job"].is_string() && stored["gpu"] == gpu, "{stored}");
    for line in dispatcher.iter().chain(&worker) {
        // Names that said the same by another field.
        ensure!(line.get("gpu_id").is_none(), "{line}");
        ensure!(line.get("id").is_none_or(|id| id != "named" && id != "named-job"), "{line}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_comes_too_often_is_counted_instead() -> Result<()> {
    let _place = fleet::place().await;
    let builder = Fleet::builder().workers(1).slots(32).set("log.max_lines", 5);
    let mut fleet = builder.start().await?;
    futures_util::future::try_join_all((0..30).map(|n| say_in(&fleet, n))).await?;
    let js = fleet.js();
    // Told where it is logged; a dispatcher that ends earlier has not logged each release.
    eventually("thirty releases", SOON, || async {
        let told = checker::read(&js, "ASR_EVENT", "asr.v1.event.session.*.released").await.ok()?;
        (told.len() == 30).then_some(())
    })
    .await?;
    let dispatcher = &mut fleet.dispatchers[0];
    // At its end at the latest it says what is left out.
    dispatcher.terminate(SOON).await?;
    let log = dispatcher.log();
    let count = |text: &str| log.matches(text).count();
    ensure!((5..=25).contains(&count("session assigned")), "{} lines\n{log}", count("session assigned"));
    let left_out: usize = log
        .lines()
        .filter(|line| line.contains("lines were left out") && line.contains("core::admitting"))
        .filter_map(|line| line.split("lines=").nth(1)?.split(' ').next()?.parse::<usize>().ok())
        .sum();
    // The place tells of assignments and of releases.
    ensure!(left_out + count("session assigned") + count("session released") == 60, "{left_out}\n{log}");
    Ok(())
}

async fn say_in(fleet: &Fleet, n: u64) -> Result<()> {
    say(fleet, &format!("crowd-{n}"), n, &[]).await
}
