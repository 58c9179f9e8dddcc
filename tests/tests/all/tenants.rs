//! Two accounts on one server: nothing of one is to be seen in the other, and neither gets more than its limits.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, Message, jetstream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio, checker,
    fleet::{self, Fleet, Servers},
    login::Keys,
    process::Dispatcher,
    producer::{Pace, Producer},
    server::NatsServer,
    verdict,
    wait::eventually,
};

use crate::{dead_letters::said, roles};

const SOON: Duration = Duration::from_secs(30);

async fn fleet_of(server: &NatsServer, keys: &Keys, account: &str) -> Result<Fleet> {
    let fleet = Fleet::builder().workers(1).of_account(keys, account).on(Servers::Elsewhere(vec![server.url()]));
    fleet.start().await.with_context(|| server.log())
}

async fn speak(server: &NatsServer, keys: &Keys, account: &str, session: &str, pcm: &audio::Pcm) -> Result<()> {
    let (client, _) = keys.login(account, "producer").connect(vec![server.url()]).await?;
    let mut producer = Producer::named(jetstream::new(client), session, "s");
    producer.stream(pcm, 200, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    Ok(())
}

/// An answer, asked for again as clients do it: a dispatcher that was late listens before it answers.
async fn asked(client: &Client, subject: &str, body: &Value) -> Result<Message> {
    let answer = eventually(format!("an answer on {subject}"), SOON, || async {
        let asking = client.request(subject.to_owned(), body.to_string().into());
        tokio::time::timeout(Duration::from_secs(3), asking).await.ok()?.ok()
    });
    Ok(answer.await?)
}

/// An answer of the JetStream API.
async fn js(client: &Client, request: &str, body: &Value) -> Result<Value> {
    Ok(serde_json::from_slice(&asked(client, &format!("$JS.API.{request}"), body).await?.payload)?)
}

/// Names the session or the job of the other account.
fn is_foreign(subject: &str) -> bool {
    subject.split('.').any(|token| matches!(token, "talk" | "rec"))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_one_account_is_seen_in_the_other() -> Result<()> {
    let _turn = fleet::turn().await;
    let keys = Keys::make(&["clinic", "court"], &[])?;
    let server = roles::server(&keys).await?;
    let (clinic, court) = (fleet_of(&server, &keys, "clinic").await?, fleet_of(&server, &keys, "court").await?);
    // Whoever may do most in the one listens to all that it can hear before the other begins.
    let spy = court.client();
    let mut heard = spy.subscribe("asr.v1.>").await?;
    let mut advisories = spy.subscribe("$JS.EVENT.>").await?;
    spy.flush().await?;

    let pcm = audio::bursts(61, 8.0);
    speak(&server, &keys, "clinic", "talk", &pcm).await?;
    let text = clinic.wait_end("talk", SOON).await.with_context(|| clinic.logs())?;
    ensure!(!text.is_empty());
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("a.wav"), pcm.wav())?;
    let person = |account: &'static str, role: &'static str| roles::Person {
        keys: &keys,
        account,
        role,
        url: server.url(),
        dir: folder.path(),
    };
    person("clinic", "producer").does(&["transcribe", "a.wav", "--id", "rec"]).await?;

    // Both have the same streams and subjects, and each its own of them.
    let names: Vec<String> = court.js().stream_names().try_collect().await?;
    ensure!(names.len() == 14, "{names:?}");
    for name in &names {
        let messages = court.js().get_stream(name).await?.cached_info().state.messages;
        let may_hold = matches!(name.as_str(), "KV_asr_fleet" | "KV_asr_control" | "ASR_EVENT");
        ensure!(messages == 0 || may_hold, "{name} of court has {messages}");
        // Its own fleet's coming and going, and none of the other's.
        if messages > 0 {
            let kept = checker::read(&court.js(), name, ">").await?;
            let foreign = kept.iter().find(|m| is_foreign(&m.subject));
            ensure!(foreign.is_none(), "{name} of court has {:?}", foreign.map(|m| m.subject.as_str()));
        }
    }
    ensure!(checker::finals(&clinic.js(), "talk").await?.len() > 1, "the streams looked at are those that fill");
    for (request, body) in [
        ("STREAM.MSG.GET.ASR_TRANSCRIPT", json!({"last_by_subj": "asr.v1.transcript.session.talk.final"})),
        ("STREAM.MSG.GET.ASR_AUDIO", json!({"last_by_subj": "asr.v1.audio.talk"})),
        ("STREAM.MSG.GET.ASR_CHECKPOINT", json!({"last_by_subj": "asr.v1.checkpoint.session.talk"})),
        ("STREAM.MSG.GET.KV_asr_sessions", json!({"last_by_subj": "$KV.asr_sessions.talk"})),
        ("STREAM.MSG.GET.KV_asr_jobs", json!({"last_by_subj": "$KV.asr_jobs.rec"})),
        ("STREAM.MSG.GET.OBJ_asr_media", json!({"seq": 1})),
    ] {
        ensure!(js(&spy, request, &body).await?["error"]["code"] == 404, "{request}");
        ensure!(
            js(&clinic.client(), request, &body).await?["error"].is_null() || request.contains("CHECKPOINT"),
            "{request}"
        );
    }
    let direct = json!({"last_by_subj": "asr.v1.audio.talk"});
    let direct = asked(&spy, "$JS.API.DIRECT.GET.ASR_AUDIO", &direct).await?;
    ensure!(direct.status == Some(async_nats::StatusCode::NOT_FOUND), "{direct:?}");

    // Nor by asking: API, heartbeats, service discovery, commands.
    for endpoint in ["session.status", "job.status"] {
        let body = json!({"session": "talk"});
        let body = if endpoint == "job.status" { json!({"job": "rec"}) } else { body };
        let answer = asked(&spy, &format!("asr.v1.api.{endpoint}"), &body).await?;
        let answer: Value = serde_json::from_slice(&answer.payload)?;
        ensure!(answer["ok"].is_null() && answer.to_string().contains("not_found"), "{answer}");
    }
    let found = person("court", "operator").types(&["export", "talk"]).await?;
    ensure!(found.status.code() == Some(66), "{}", said(&found));
    let mut services = spy.subscribe("_INBOX_operator.discovery").await?;
    spy.publish_with_reply("$SRV.PING", "_INBOX_operator.discovery", "".into()).await?;
    let first = tokio::time::timeout(SOON, services.next()).await?.context("a service")?;
    ensure!(String::from_utf8_lossy(&first.payload).contains("voxfleet"), "{first:?}");
    let more = tokio::time::timeout(Duration::from_secs(1), services.next()).await;
    ensure!(more.is_err(), "one dispatcher of one's own: {more:?}");

    // All this time only its own fleet was to be heard.
    let mut beats = 0;
    while let Ok(Some(message)) = tokio::time::timeout(Duration::from_millis(1_500), heard.next()).await {
        ensure!(!is_foreign(&message.subject), "{}", message.subject);
        beats += usize::from(message.subject.contains("heartbeat"));
        if beats > 20 {
            break;
        }
    }
    ensure!(beats > 0, "it heard nothing at all");
    while let Ok(Some(message)) = tokio::time::timeout(Duration::from_millis(50), advisories.next()).await {
        let text = String::from_utf8_lossy(&message.payload).into_owned();
        ensure!(!text.contains("clinic"), "{}: {text}", message.subject);
    }

    // The same name in both is two sessions.
    let other = audio::bursts(62, 4.0);
    speak(&server, &keys, "court", "talk", &other).await?;
    court.wait_end("talk", SOON).await.with_context(|| court.logs())?;
    verdict::session(&court.js(), "talk", &other.samples).await?.clean("talk")?;
    verdict::session(&clinic.js(), "talk", &pcm.samples).await?.clean("talk")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_gets_no_more_than_its_limits() -> Result<()> {
    let _place = fleet::place().await;
    let small = [
        "--set",
        "dispatcher.topology.audio_max_bytes=67108864",
        "--set",
        "dispatcher.topology.transcript_max_bytes=67108864",
        "--set",
        "dispatcher.topology.media_max_bytes=67108864",
        "--max-connections",
        "9",
        "--max-streams",
        "15",
    ];
    // The third is the greedy one's: what it made before it was refused would be in the way of the others.
    let keys = Keys::make(&["clinic", "court", "greedy"], &small)?;
    let server = roles::server(&keys).await?;
    let folder = tempfile::tempdir()?;

    // A dispatcher that wants more than its account has says what is too small, and where.
    let settings = keys.login("greedy", "dispatcher").settings().with("nats.urls", server.url());
    let mut greedy = Dispatcher::start("greedy", &settings, folder.path())?;
    let ended = greedy.wait(SOON).await?;
    ensure!(!ended.success() && greedy.log().contains("raise the account's max_file"), "{}", greedy.log());

    let fleet = |account: &str| {
        let mut builder = Fleet::builder().workers(1).of_account(&keys, account);
        for pair in small[1..6].iter().step_by(2) {
            if let Some((key, value)) = pair.split_once('=') {
                builder = builder.set(key, value);
            }
        }
        builder.on(Servers::Elsewhere(vec![server.url()]))
    };
    let (clinic, court) = (fleet("clinic").start().await?, fleet("court").start().await?);
    // Streams: one more than ours, then no more; bytes: what is left, and no more.
    let js = clinic.js();
    let stream = |n: usize, max_bytes: i64| jetstream::stream::Config {
        name: format!("MORE_{n}"),
        subjects: vec![format!("more.{n}")],
        max_bytes,
        ..Default::default()
    };
    let refused = js.create_stream(stream(0, 1 << 40)).await.err().context("a stream of a TiB")?;
    ensure!(refused.to_string().contains("insufficient"), "{refused}");
    js.create_stream(stream(1, 1 << 20)).await?;
    let refused = js.create_stream(stream(2, 1 << 20)).await.err().context("a sixteenth stream")?;
    ensure!(refused.to_string().contains("maximum number of streams"), "{refused}");

    // Connections: some are the fleet's own.
    let login = keys.login("clinic", "viewer");
    let mut open = Vec::new();
    while let Ok(client) = login.connect(vec![server.url()]).await {
        open.push(client);
        ensure!(open.len() < 9, "more than nine");
    }
    ensure!(!open.is_empty(), "there was room for one more");
    let person = |account: &'static str| roles::Person {
        keys: &keys,
        account,
        role: "viewer",
        url: server.url(),
        dir: folder.path(),
    };
    let output = person("clinic").types(&["status"]).await?;
    ensure!(output.status.code() == Some(69), "{}", said(&output));
    for part in ["does not take this connection", "maximum account active connections"] {
        ensure!(said(&output).contains(part), "{}", said(&output));
    }
    // The neighbour notices nothing.
    person("court").does(&["status"]).await?;
    let pcm = audio::bursts(63, 4.0);
    speak(&server, &keys, "court", "talk", &pcm).await?;
    court.wait_end("talk", SOON).await.with_context(|| court.logs())?;
    drop(open);
    eventually("there is room again", SOON, || async { person("clinic").does(&["status"]).await.ok() }).await?;
    Ok(())
}
