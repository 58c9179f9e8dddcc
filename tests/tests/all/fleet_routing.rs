//! Who gets what, asked of a whole fleet of real processes: order of placement, the refusal when all is full, places that
//! come free, a burst of opens, and why a session is where it is.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, StatusCode};
use futures_util::{StreamExt as _, future::try_join_all, stream};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio, checker,
    fleet::{self, Fleet},
    producer::{Pace, Producer},
    wait::eventually,
};

use crate::fleet_map::model_is;

const SOON: Duration = Duration::from_secs(10);

/// As a client asks: again by the same id, where nobody answered within a second.
async fn ask(client: &Client, endpoint: &str, body: &Value) -> Result<Value> {
    // One inbox for every time it asks: a late answer to the first is an answer.
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await?;
    let (begun, mut wait) = (Instant::now(), Duration::from_secs(1));
    while begun.elapsed() < 3 * SOON {
        let subject = format!("asr.v1.api.{endpoint}");
        client.publish_with_reply(subject, inbox.clone(), body.to_string().into()).await?;
        match tokio::time::timeout(wait, answers.next()).await {
            Ok(Some(answer)) if answer.status != Some(StatusCode::NO_RESPONDERS) => {
                return Ok(serde_json::from_slice(&answer.payload)?);
            }
            Ok(Some(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            Ok(None) => anyhow::bail!("{endpoint}: the connection is closed"),
            // Whoever is behind is not helped by thousands who repeat themselves each second.
            Err(_) => wait *= 2,
        }
    }
    anyhow::bail!("{endpoint}: nobody answered")
}

async fn open(client: &Client, session: &str) -> Result<Value> {
    ask(client, "session.open", &json!({ "session": session })).await
}

fn class(answer: &Value) -> &str {
    answer["error"]["class"].as_str().unwrap_or_default()
}

/// The value of this field in a line of a log.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let of_it = |word: &'a str| word.strip_prefix(name)?.strip_prefix('=');
    line.split_whitespace().find_map(of_it).map(|value| value.trim_matches('"'))
}

/// 16 sessions on 4 GPUs of 4 slots land 0, 1, 2, 3, 0, ...; the 17th is refused with a time to come again; closing one
/// frees its place at once; the assigned event says why each GPU was chosen or not.
#[tokio::test(flavor = "multi_thread")]
async fn sixteen_sessions_spread_evenly_and_the_seventeenth_is_refused() -> Result<()> {
    let _turn = fleet::turn().await;
    // Warm before the first: a worker that is heard to have its model comes before one that is not heard to yet.
    // And nobody is suspect, and passed over, because the machine was slow for a moment.
    let builder = Fleet::builder().workers(4).slots(4).set("worker.preload", "simulated");
    let builder = builder.set("dispatcher.suspect_after_ms", 10_000).set("dispatcher.dead_after_ms", 20_000);
    let mut fleet = builder.start().await?;
    let client = fleet.client();
    let turn = ["gpu-1", "gpu-2", "gpu-3", "gpu-4"];
    for gpu in turn {
        model_is(&fleet, gpu, "loaded").await?;
    }
    let mut landed = Vec::new();
    for n in 0..16 {
        let opened = open(&client, &format!("s{n}")).await?;
        let gpu = opened["ok"]["worker"]["gpu_id"].as_str().with_context(|| format!("{opened}"))?;
        landed.push(gpu.to_owned());
    }
    ensure!(landed == turn.repeat(4), "{landed:?}\n{}", fleet.logs());

    let refused = open(&client, "s16").await?;
    ensure!(class(&refused) == "no_capacity", "{refused}");
    ensure!(refused["error"]["message"] == "No GPU resources available", "{refused}");
    let wait_ms = refused["error"]["retry_after_ms"].as_u64().with_context(|| format!("{refused}"))?;
    ensure!((1..=30_000).contains(&wait_ms), "{refused}");

    ask(&client, "session.close", &json!({ "session": "s6" })).await?;
    let begun = Instant::now();
    let taken = eventually("the place of s6", SOON, || async {
        open(&client, "s16").await.ok().filter(|answer| answer["ok"].is_object())
    })
    .await?;
    ensure!(taken["ok"]["worker"]["gpu_id"] == "gpu-3", "s6 was on gpu-3: {taken}");
    ensure!(begun.elapsed() < Duration::from_secs(3), "it took {:?}", begun.elapsed());

    let js = fleet.js();
    let events = js.get_stream_no_info("ASR_EVENT").await?;
    // Stored behind the answer.
    let event = eventually("the event", SOON, || async {
        let event = events.get_last_raw_message_by_subject("asr.v1.event.session.s16.assigned").await.ok()?;
        serde_json::from_slice::<Value>(&event.payload).ok()
    })
    .await?;
    let rows = event["detail"]["candidates"].as_array().with_context(|| format!("{event}"))?;
    let row = |gpu: &str| rows.iter().find(|row| row.to_string().contains(gpu)).map(Value::to_string);
    for gpu in ["gpu-1", "gpu-2", "gpu-4"] {
        ensure!(row(gpu).is_some_and(|row| row.contains("no free slot")), "{gpu}: {event}");
    }
    ensure!(row("gpu-3").is_some_and(|row| !row.contains("refused")), "{event}");
    // The place may be given again before the worker's word that it let go has come, and with it the line in the log; the
    // event is told behind that line.
    eventually("the release of s6", SOON, || async {
        events.get_last_raw_message_by_subject("asr.v1.event.session.s6.released").await.ok()
    })
    .await?;
    let log = fleet.dispatchers[0].log();
    // On allocation and on release: where, whose, and how full it was.
    let find = |what: &str, session: &str| {
        let named = |l: &str| l.contains(what) && field(l, "session") == Some(session);
        log.lines().position(named).with_context(|| format!("no line of {session} being {what}:\n{log}"))
    };
    // A heartbeat may show the place free before the worker's word arrives: whoever waits has it by then, or is just being given it.
    let (released, taken) = (find("session released", "s6")?, find("session assigned", "s16")?);
    for (at, used) in [(find("session assigned", "s6")?, 2..=2), (released, 3..=4), (taken, 4..=4)] {
        let line = log.lines().nth(at).unwrap_or_default();
        ensure!(field(line, "gpu") == Some("gpu-3"), "{line}");
        let number = |name: &str| field(line, name).and_then(|n| n.parse::<u64>().ok());
        let slots_used = number("slots_used").with_context(|| line.to_owned())?;
        ensure!(used.contains(&slots_used) && number("slots_total") == Some(4), "{line}");
        ensure!(number("memory_used_mb").is_some() && number("memory_free_mb").is_some(), "{line}");
    }
    fleet.check_alive()?;
    Ok(())
}

/// Without any worker the answer is not that of a full fleet.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_not_the_same_as_full() -> Result<()> {
    let _turn = fleet::place().await;
    let fleet = Fleet::builder().workers(0).start().await?;
    let nobody = open(&fleet.client(), "a").await?;
    ensure!(class(&nobody) == "no_workers" && nobody["error"]["retry_after_ms"].is_u64(), "{nobody}");
    Ok(())
}

/// Ten thousand opens at once, each answered for itself: as many accepted as there is room, the rest refused with times to
/// come again that are spread out; the dispatcher stays small and goes on serving those who are in.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_ten_thousand_opens_is_answered_in_order() -> Result<()> {
    const OPENS: usize = 10_000;
    const SLOTS: usize = 40;
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(2).slots(SLOTS as u32 / 2).start().await?;
    let client = fleet.client();
    let (js, pcm) = (fleet.js(), audio::bursts(7, 6.0));
    let mut producer = Producer::bare(js.clone(), "burst-0");
    ensure!(open(&client, "burst-0").await?["ok"].is_object(), "the first of all");

    let before = fleet.dispatchers[0].resident_bytes().context("memory")?;
    let begun = Instant::now();
    let asked = stream::iter(1..OPENS).map(|n| {
        let client = client.clone();
        async move { Ok::<_, anyhow::Error>((n, open(&client, &format!("burst-{n}")).await?)) }
    });
    let answers = async { asked.buffered(1_000).collect::<Vec<_>>().await.into_iter().collect::<Result<Vec<_>>>() };
    let speaking = producer.stream(&pcm, 200, Pace::Speed(1.0));
    let (answers, spoken) = futures_util::future::join(answers, speaking).await;
    let (answers, took) = (answers?, begun.elapsed());
    spoken?;
    // Not before all are answered: its place would go to somebody in the middle of the others.
    producer.end().await?;
    let accepted: Vec<usize> = answers.iter().filter(|(_, a)| a["ok"].is_object()).map(|(n, _)| *n).collect();
    // `burst-0` has one of the places.
    ensure!(accepted.len() == SLOTS - 1, "{} accepted", accepted.len());
    ensure!(accepted.iter().max().is_some_and(|n| *n < SLOTS + 1_000), "not in order: {accepted:?}");
    let refused: Vec<&Value> = answers.iter().map(|(_, a)| a).filter(|a| a["ok"].is_null()).collect();
    ensure!(
        refused.iter().all(|a| class(a) == "no_capacity"),
        "{:?}",
        refused.iter().find(|a| class(a) != "no_capacity")
    );
    let times: BTreeSet<u64> = refused.iter().filter_map(|a| a["error"]["retry_after_ms"].as_u64()).collect();
    ensure!(times.len() > 100, "all would come back at the same {} moments", times.len());
    ensure!(took < 6 * SOON, "answered after {took:?}");
    let after = fleet.dispatchers[0].resident_bytes().context("memory")?;
    ensure!(after < before + 100 * (1 << 20), "{} MB more", (after - before) >> 20);

    fleet::wait_end(&js, "burst-0", 3 * SOON).await?;
    let report = checker::check(&js, "burst-0").await?.clean()?;
    ensure!(report.covered == pcm.samples.len() as u64, "{} samples", report.covered);
    Ok(())
}

/// Sessions that come by audio alone and find no room wait in the log, in their order, and all are transcribed.
#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_room_waits_in_the_log_and_is_transcribed_in_the_end() -> Result<()> {
    const SESSIONS: u64 = 24;
    let _turn = fleet::place().await;
    let fleet = Fleet::builder().workers(2).slots(3).start().await?;
    let js = fleet.js();
    let sessions = (0..SESSIONS).map(|n| {
        let js = js.clone();
        async move {
            let (session, pcm) = (format!("queue-{n}"), audio::bursts(n, 4.0));
            let mut producer = Producer::bare(js.clone(), &session);
            producer.stream(&pcm, 200, Pace::AsFastAsPossible).await?;
            producer.end().await?;
            fleet::wait_end(&js, &session, 6 * SOON).await?;
            let report = checker::check(&js, &session).await?.clean()?;
            ensure!(report.covered == pcm.samples.len() as u64, "{session}: {} samples", report.covered);
            Ok::<_, anyhow::Error>(())
        }
    });
    try_join_all(sessions).await.with_context(|| fleet.logs())?;
    Ok(())
}
