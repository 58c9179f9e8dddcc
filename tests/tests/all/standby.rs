//! Dispatchers that stop, die and come back: whoever asks is answered once, and sessions go on.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::Instant};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker,
    fleet::{self, Fleet},
    producer::{Pace, Producer},
    wait::eventually,
};

use crate::direct;

/// The default lease.
const LEASE: Duration = Duration::from_secs(5);
const TAKEOVER: Duration = Duration::from_secs(30);

/// Answers to one request, in the order they came.
type Answers = Arc<Mutex<BTreeMap<String, Vec<Value>>>>;

/// Opens a session as a client does: asks again each second until somebody answers, and hears everything that is said.
async fn open(client: async_nats::Client, session: String, answers: Answers) -> Result<()> {
    let inbox = client.new_inbox();
    let mut replies = client.subscribe(inbox.clone()).await?;
    let body = Bytes::from(json!({ "session": session }).to_string());
    let (mut again, end) = (tokio::time::interval(Duration::from_secs(1)), Instant::now() + TAKEOVER);
    let mut answered = false;
    loop {
        tokio::select! {
            _ = again.tick(), if !answered => {
                client.publish_with_reply("asr.v1.api.session.open", inbox.clone(), body.clone()).await?;
            }
            reply = replies.next() => {
                let reply = reply.context("closed")?;
                if reply.payload.is_empty() {
                    // Nobody listens yet.
                    continue;
                }
                let reply: Value = serde_json::from_slice(&reply.payload)?;
                answered |= reply["ok"].is_object();
                let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                answers.entry(session.clone()).or_default().push(reply);
            }
            () = tokio::time::sleep_until(end) => return Ok(()),
        }
    }
}

/// Streams a call in real time and checks what became of it.
async fn call(
    fleet_js: async_nats::jetstream::Context,
    session: &str,
    pcm: Pcm,
    speed: f64,
) -> Result<checker::Report> {
    let mut producer = Producer::named(fleet_js.clone(), session, "s1");
    producer.stream(&pcm, 200, Pace::Speed(speed)).await?;
    producer.end().await?;
    let text = fleet::wait_end(&fleet_js, session, Duration::from_secs(60)).await?;
    let report = checker::check(&fleet_js, session).await?.clean()?;
    ensure!(report.covered == pcm.samples.len() as u64, "{session}: {} samples", report.covered);
    let expected = direct::simulated_text(&pcm)?;
    ensure!(text == expected, "{session}:\n  heard    {text}\n  expected {expected}");
    Ok(report)
}

async fn leader(fleet: &Fleet) -> Result<usize> {
    Ok(eventually("a leader", TAKEOVER, || fleet.leader()).await?)
}

async fn status(fleet: &Fleet, session: &str) -> Result<Value> {
    let body = Bytes::from(json!({ "session": session }).to_string());
    let client = fleet.client();
    let reply = eventually("status", Duration::from_secs(10), || async {
        let asked = client.request("asr.v1.api.session.status", body.clone());
        tokio::time::timeout(Duration::from_secs(1), asked).await.ok()?.ok()
    });
    Ok(serde_json::from_slice(&reply.await?.payload)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_stopped_for_longer_than_its_lease_swallows_nothing_and_does_no_harm() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(64).dispatchers(2).start().await?;
    let first = leader(&fleet).await?;
    let mut running = JoinSet::new();
    running.spawn(call(fleet.js(), "running", audio::bursts(31, 18.0), 1.0));

    let answers = Answers::default();
    let mut opens: JoinSet<Result<()>> = JoinSet::new();
    let started = Instant::now();
    let (stop_at, go_on_at, last_at) =
        (Duration::from_secs(1), LEASE + Duration::from_secs(5), Duration::from_secs(12));
    let (mut stopped, mut count) = (false, 0);
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    while started.elapsed() < last_at {
        ticks.tick().await;
        opens.spawn(open(fleet.client(), format!("open-{count}"), answers.clone()));
        count += 1;
        if !stopped && started.elapsed() >= stop_at && started.elapsed() < go_on_at {
            fleet.dispatchers[first].stop()?;
            stopped = true;
        } else if stopped && started.elapsed() >= go_on_at {
            fleet.dispatchers[first].cont()?;
            stopped = false;
        }
    }
    ensure!(!stopped, "it goes on");
    let all = eventually("every open is answered", TAKEOVER, || async {
        let answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = answers.values().filter(|a| a.iter().any(|reply| reply["ok"].is_object())).count();
        (taken == count).then(|| answers.clone())
    });
    let all = all.await.with_context(|| format!("{:?}\n{}", answers.lock(), fleet.logs()))?;
    for (session, replies) in &all {
        let mut owners: Vec<String> = replies
            .iter()
            .filter(|reply| reply["ok"].is_object())
            .map(|reply| format!("{} {}", reply["ok"]["worker"], reply["ok"]["epoch"]))
            .collect();
        owners.sort();
        owners.dedup();
        ensure!(owners.len() == 1, "{session} was given to {owners:?}");
    }
    ensure!(leader(&fleet).await? != first, "the standby leads");
    let log = || fleet.dispatchers[first].log();
    eventually("the resumed leader stands by", TAKEOVER, || async { log().contains("standing by").then_some(()) })
        .await
        .with_context(log)?;

    let report = running.join_next().await.context("the call")???;
    ensure!(report.finals.iter().all(|f| f.json["epoch"] == 1), "nobody had a reason to move it");
    for (session, replies) in &all {
        let opened = replies.iter().find(|reply| reply["ok"].is_object()).context("answered")?;
        let record = &status(&fleet, session).await?["ok"]["record"];
        ensure!(record["epoch"] == opened["ok"]["epoch"], "{session}: {record} {opened}");
        ensure!(record["worker"] == opened["ok"]["worker"], "{session}: {record} {opened}");
    }
    opens.shutdown().await;
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stands_still_while_a_standby_takes_over_ends_nobody() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(64).dispatchers(2).start().await?;
    let first = leader(&fleet).await?;
    let second = 1 - first;
    let pcm = audio::bursts(32, 5.0);
    // Something to read at the takeover.
    let mut producers = Vec::new();
    for n in 0..40 {
        let mut producer = Producer::named(fleet.js(), &format!("left-{n}"), "s1");
        producer.stream(&pcm, 500, Pace::AsFastAsPossible).await?;
        producers.push(producer);
    }
    fleet.dispatchers[first].kill9()?;
    let log = fleet.dispatchers[second].log_path().to_owned();
    eventually("the standby becomes active", TAKEOVER, || async {
        std::fs::read_to_string(&log).ok()?.contains("active").then_some(())
    })
    .await?;
    fleet.server()?.stop()?;
    // Longer than any request to it waits, and longer than a lease lives.
    tokio::time::sleep(Duration::from_secs(8)).await;
    fleet.server()?.cont()?;

    leader(&fleet).await.with_context(|| fleet.logs())?;
    for producer in &mut producers {
        producer.end().await?;
    }
    let expected = direct::simulated_text(&pcm)?;
    for producer in &producers {
        let text = fleet.wait_end(producer.session(), Duration::from_secs(60)).await.with_context(|| fleet.logs())?;
        ensure!(text == expected, "{}:\n  heard    {text}\n  expected {expected}", producer.session());
        checker::check(&fleet.js(), producer.session()).await?.clean()?;
    }
    fleet.dispatchers[second].check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_dispatcher_a_running_session_goes_on_from_the_log() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder().workers(1).start().await?;
    let pcm = audio::bursts(33, 40.0);
    let mut running = JoinSet::new();
    running.spawn(call(fleet.js(), "alone", pcm, 1.0));
    eventually("its owner", TAKEOVER, || async {
        let bucket = fleet.js().get_key_value("asr_sessions").await.ok()?;
        let record: Value = serde_json::from_slice(&bucket.get("alone").await.ok()??).ok()?;
        (record["state"] == "assigned").then_some(())
    })
    .await?;
    fleet.dispatchers[0].kill9()?;
    let alone = Instant::now();
    let report = running.join_next().await.context("the call")??.with_context(|| fleet.logs())?;
    ensure!(alone.elapsed() >= Duration::from_secs(30), "only {:?} without a dispatcher", alone.elapsed());
    ensure!(report.finals.len() > 3, "finals came all the while: {}", report.finals.len());
    fleet.restart_dispatcher(0)?;
    let ended = eventually("the key says so", TAKEOVER, || async {
        let record = &status(&fleet, "alone").await.ok()?["ok"]["record"];
        (record["state"] == "ended").then(|| record.clone())
    });
    let record = ended.await.with_context(|| fleet.logs())?;
    ensure!(record["epoch"] == 1, "{record}");
    Ok(())
}
