//! The batched engine: text, failover and company as the other engine's, and who may move between the two.
//!
//! Skipped where the binary has no CTranslate2 (cargo feature `ct2`).

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use voxfleet_harness::{
    audio,
    checker::{self, Report},
    fleet::{self, Engine, Fleet},
    probe_api,
    producer::{Pace, Producer},
    wait,
};

use crate::cli::demo;

const PATIENCE: Duration = Duration::from_secs(120);
/// Call and the highest word error rate it may have: those of the other engine.
const SESSIONS: [(u32, f64); 6] = [(1, 0.02), (2, 0.02), (3, 0.10), (4, 0.02), (5, 0.02), (1, 0.02)];

fn here() -> Result<bool> {
    let here = fleet::has_ct2()?;
    if !here {
        println!("skipped: this binary has no CTranslate2 (cargo build -p voxfleet --features ct2)");
    }
    Ok(here)
}

/// Of the finals that heard something, in order.
fn engines(report: &Report) -> Vec<String> {
    let heard = report.finals.iter().filter(|f| f.json["engine"] != "none");
    let mut engines: Vec<String> = heard.filter_map(|f| Some(f.json["engine"].as_str()?.to_owned())).collect();
    engines.dedup();
    engines
}

async fn speak(fleet: &Fleet, session: &str, call: u32, speed: f64) -> Result<Report> {
    let js = fleet.js();
    let mut producer = Producer::named(js.clone(), session, "s1");
    producer.stream(&audio::call(call)?, 200, Pace::Speed(speed)).await?;
    producer.end().await?;
    fleet::wait_end(&js, session, PATIENCE).await?;
    Ok(checker::check(&js, session).await?.clean()?)
}

/// Live, after a kill, as a recording and offline.
#[tokio::test(flavor = "multi_thread")]
async fn ct2_runs_the_demo() -> Result<()> {
    if !here()? {
        return Ok(());
    }
    let _turn = fleet::turn().await;
    let dir = tempfile::tempdir()?;
    let output = demo(dir.path(), &["--engine", "ct2", "--speed", "2", "--json"]).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| said.to_string())?;
    for rate in [&report["wer"], &report["live"]["wer"], &report["job"]["wer"], &report["offline"]["wer"]] {
        ensure!(rate.as_f64().is_some_and(|r| r <= 0.02), "{report:#}");
    }
    ensure!(report["failover"]["same_text"] == true && report["offline"]["same_text"] == true, "{report:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ct2_hears_six_sessions_in_batches_and_says_so() -> Result<()> {
    if !here()? {
        return Ok(());
    }
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(3).engine(Engine::Ct2).start().await?;
    let sessions: Vec<String> = (0..SESSIONS.len()).map(|n| format!("ct2-{n}")).collect();
    let outcome = try_join_all(sessions.iter().zip(SESSIONS).map(|(id, (call, _))| speak(&fleet, id, call, 2.0))).await;
    let logs = fleet.logs();
    for ((call, most), report) in SESSIONS.iter().zip(outcome.with_context(|| logs.clone())?) {
        let rate = audio::word_error_rate(&audio::call_text(*call)?, &report.text());
        ensure!(rate <= *most, "call {call}: word error rate {rate:.4}, at most {most}\n{}", report.text());
        ensure!(engines(&report) == ["ct2"], "{:?}", engines(&report));
        for segment in report.finals.iter().flat_map(|f| f.json["segments"].as_array().into_iter().flatten()) {
            ensure!(segment["words"].as_array().is_some_and(|w| !w.is_empty()), "no words: {segment}");
        }
    }
    let asked = || async { probe_api::fleet_status(&fleet.client()).await };
    let status = wait::eventually("the fleet's state", PATIENCE, asked).await.with_context(|| fleet.logs())?;
    for worker in status["workers"].as_array().context("workers")? {
        ensure!(worker["heartbeat"]["engine"]["kind"] == "ct2", "{worker}");
    }
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ct2_workers_that_are_killed_cost_no_word() -> Result<()> {
    if !here()? {
        return Ok(());
    }
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(4).engine(Engine::Ct2).start().await?;
    let undisturbed = speak(&fleet, "whole", 2, 4.0).await?;
    let js = fleet.js();
    let mut producing = JoinSet::new();
    producing.spawn(in_time(js.clone(), "killed", 2, 4.0));
    for _ in 0..2 {
        let owner = owner_after_a_final(&fleet, "killed").await?;
        fleet.workers[owner].kill9()?;
        fleet.restart_worker(owner)?;
    }
    while let Some(done) = producing.join_next().await {
        done??;
    }
    fleet::wait_end(&js, "killed", PATIENCE).await.with_context(|| fleet.logs())?;
    let killed = checker::check(&js, "killed").await?.clean()?;
    ensure!(killed.text() == undisturbed.text(), "{}\n{}", killed.text(), undisturbed.text());
    Ok(())
}

async fn in_time(js: async_nats::jetstream::Context, session: &'static str, call: u32, speed: f64) -> Result<()> {
    let mut producer = Producer::named(js, session, "s1");
    producer.stream(&audio::call(call)?, 200, Pace::Speed(speed)).await?;
    producer.end().await?;
    Ok(())
}

/// The worker that stored the next final of the session.
async fn owner_after_a_final(fleet: &Fleet, session: &str) -> Result<usize> {
    let js = fleet.js();
    let before = checker::finals(&js, session).await?.len();
    let gpu = wait::eventually(format!("a final of {session}"), PATIENCE, || async {
        let finals = checker::finals(&js, session).await.ok()?;
        let last = finals.get(before..)?.last()?;
        Some(last.json["gpu_id"].as_str()?.to_owned())
    });
    let gpu = gpu.await.with_context(|| fleet.logs())?;
    fleet.workers.iter().position(|worker| worker.gpu_id() == gpu).context("a worker of the fleet")
}

/// As every client does: a dispatcher that has just started may not hear the first.
async fn ask(fleet: &Fleet, endpoint: &str, body: &Value) -> Result<Value> {
    let (client, subject) = (fleet.client(), format!("asr.v1.api.{endpoint}"));
    wait::eventually(format!("an answer of {endpoint}"), PATIENCE, || async {
        let asked = client.request(subject.clone(), body.to_string().into());
        let reply = tokio::time::timeout(Duration::from_secs(1), asked).await.ok()?.ok()?;
        serde_json::from_slice(&reply.payload).ok()
    })
    .await
    .map_err(anyhow::Error::from)
}

/// Both begin on CTranslate2, whose worker dies; only one with whisper.cpp is left. The session that may change moves to it, and
/// each final names its own engine; the one that may not waits for its engine, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn ct2_sessions_move_to_the_other_engine_where_they_may() -> Result<()> {
    if !here()? {
        return Ok(());
    }
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(1).slots(4).engine(Engine::Ct2).start().await?;
    let js = fleet.js();
    let mut producing = JoinSet::new();
    for (session, policy) in [("free", "allow_cpu"), ("exact", "exact_model")] {
        let open = json!({"session": session, "options": {"policy": policy}});
        // A worker whose heartbeat is late gets nothing new until it is heard.
        let opened = wait::eventually(format!("{session} being opened"), PATIENCE, || async {
            let reply = ask(&fleet, "session.open", &open).await.ok()?;
            reply.get("ok").is_some().then_some(())
        });
        opened.await.with_context(|| fleet.logs())?;
        producing.spawn(in_time(js.clone(), session, 2, 2.0));
    }
    for session in ["free", "exact"] {
        owner_after_a_final(&fleet, session).await?;
    }
    fleet.set_later("worker.engine", "whisper_cpp");
    fleet.add_worker("gpu-2")?;
    fleet.wait_ready().await?;
    fleet.workers[0].kill9()?;
    while let Some(done) = producing.join_next().await {
        done??;
    }
    fleet::wait_end(&js, "free", PATIENCE).await.with_context(|| fleet.logs())?;
    let why = wait::eventually("what it waits for", PATIENCE, || async {
        let said = ask(&fleet, "session.status", &json!({"session": "exact"})).await.ok()?.to_string();
        said.contains("other engine").then_some(said)
    });
    why.await.with_context(|| fleet.logs())?;
    ensure!(!checker::finals(&js, "exact").await?.iter().any(checker::StoredFinal::is_end), "it did not wait");
    fleet.set_later("worker.engine", "ct2");
    fleet.restart_worker(0)?;
    fleet::wait_end(&js, "exact", PATIENCE).await.with_context(|| fleet.logs())?;
    for (session, expected) in [("free", &["ct2", "whisper_cpp"][..]), ("exact", &["ct2"])] {
        let report = checker::check(&js, session).await?.clean()?;
        ensure!(engines(&report) == expected, "{session}: {:?}", engines(&report));
        let rate = audio::word_error_rate(&audio::call_text(2)?, &report.text());
        ensure!(rate <= 0.02, "{session}: word error rate {rate:.4}\n{}", report.text());
    }
    Ok(())
}
