//! `voxfleet purge`: afterwards nothing of it stands in any stream, bucket or object, and everything of its neighbours does.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use futures_util::TryStreamExt as _;
use serde_json::{Value, json};
use voxfleet_harness::{
    audio,
    fleet::{self, Engine, Fleet},
    producer::{Pace, Producer},
    server::NatsServer,
    wait::eventually,
};
use voxfleet_nats::{
    Nats, NatsConfig,
    topology::{self, TopologyConfig},
};
use voxfleet_schema::job::JobState;

use crate::{
    dead_letters::{said, typed},
    jobs_fleet::{connect, ended},
    long_jobs::hand_in_as,
};

const SOON: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(60);

/// One stored message.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stored {
    subject: String,
    payload: Vec<u8>,
}

/// Every message of every stream there is, buckets and object stores included: (stream, sequence).
type Everything = BTreeMap<(String, u64), Stored>;

async fn everything(js: &jetstream::Context) -> Result<Everything> {
    let mut all = Everything::new();
    let names: Vec<String> = js.stream_names().try_collect().await?;
    for name in names {
        let stream = js.get_stream(&name).await?;
        let state = &stream.cached_info().state;
        for seq in state.first_sequence.max(1)..=state.last_sequence {
            // A number that is missing was removed.
            let Ok(message) = stream.get_raw_message(seq).await else { continue };
            let stored = Stored { subject: message.subject.to_string(), payload: message.payload.to_vec() };
            all.insert((name.clone(), seq), stored);
        }
    }
    Ok(all)
}

/// Whose a message is, as somebody sees it who reads subjects: `session a`, `job a`, `object <key>`, or its own subject.
fn owner(subject: &str) -> String {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE};
    let tokens: Vec<&str> = subject.split('.').collect();
    match tokens[..] {
        ["asr", "v1", "audio", id] | ["asr", "v1", "gpu", _, _, "live", id] => format!("session {id}"),
        ["asr", "v1", "gpu", _, _, "job", id] | ["asr", "v1", "jobs", _, id] => format!("job {id}"),
        ["asr", "v1", "transcript", kind, id, _] => format!("{kind} {id}"),
        ["asr", "v1", "checkpoint" | "dead", kind, id] => format!("{kind} {id}"),
        ["asr", "v1", "event", kind, id, _] => format!("{kind} {id}"),
        ["$KV", "asr_sessions", id] => format!("session {id}"),
        ["$KV", "asr_jobs", id] => format!("job {id}"),
        ["$O", "asr_media", "M", key] => {
            let key = URL_SAFE.decode(key).map(|key| String::from_utf8_lossy(&key).into_owned());
            format!("object {}", key.unwrap_or_default())
        }
        _ => subject.to_owned(),
    }
}

fn of<'a>(all: &'a Everything, who: &str) -> BTreeMap<&'a (String, u64), &'a Stored> {
    all.iter().filter(|(_, stored)| owner(&stored.subject) == who).collect()
}

fn places(all: &Everything, who: &str) -> Vec<String> {
    let mut streams: Vec<String> = of(all, who).into_keys().map(|(stream, _)| stream.clone()).collect();
    streams.dedup();
    streams
}

struct Person<'a> {
    url: String,
    dir: &'a Path,
}

impl Person<'_> {
    async fn types(&self, words: &[&str], code: i32) -> Result<String> {
        let output = typed(&self.url, self.dir, words).await?;
        ensure!(output.status.code() == Some(code), "{words:?} was to exit with {code}: {}", said(&output));
        Ok(said(&output))
    }

    async fn object(&self, words: &[&str]) -> Result<Value> {
        let output = typed(&self.url, self.dir, words).await?;
        ensure!(output.status.success(), "{words:?}: {}", said(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// Puts something of this id into every place there is, as strangers and a fleet would.
async fn plant(js: &jetstream::Context, id: &str) -> Result<()> {
    let word = format!("words-of-{id}");
    let mut subjects: Vec<String> = vec![
        format!("asr.v1.audio.{id}"),
        format!("asr.v1.audio.{id}"),
        format!("asr.v1.gpu.g1.i1.live.{id}"),
        format!("asr.v1.gpu.g2.i2.live.{id}"),
        format!("asr.v1.gpu.g1.i1.job.{id}"),
        format!("asr.v1.jobs.high.{id}"),
        format!("asr.v1.jobs.low.{id}"),
    ];
    for kind in ["session", "job"] {
        for what in ["final", "revision", "partial"] {
            subjects.push(format!("asr.v1.transcript.{kind}.{id}.{what}"));
        }
        subjects.push(format!("asr.v1.checkpoint.{kind}.{id}"));
        subjects.push(format!("asr.v1.event.{kind}.{id}.ended"));
        subjects.push(format!("asr.v1.event.{kind}.{id}.unheard_of"));
        subjects.push(format!("asr.v1.dead.{kind}.{id}"));
    }
    for subject in subjects {
        js.publish(subject, word.clone().into()).await?.await?;
    }
    let session = json!({
        "kind": "session", "id": id, "state": "ended", "options": {"prompt": word}, "epoch": 1, "opened_ms": 1, "changed_ms": 1,
        "ended_seq": 1_000_000,
    });
    js.publish(format!("$KV.asr_sessions.{id}"), session.to_string().into()).await?.await?;
    let job = json!({
        "id": id, "state": "done", "audio": format!("object://asr_media/calls/{id}.wav"), "options": {}, "result_ttl_s": 60,
        "epoch": 1, "attempts": 1, "submitted_ms": 1, "changed_ms": 1,
    });
    js.publish(format!("$KV.asr_jobs.{id}"), job.to_string().into()).await?.await?;
    let store = js.get_object_store("asr_media").await?;
    for key in [format!("audio/{id}"), format!("result/{id}/f1.json"), format!("calls/{id}.wav")] {
        store.put(key.as_str(), &mut word.as_bytes()).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_place_is_emptied_of_one_and_of_no_other() -> Result<()> {
    let server = NatsServer::start().await?;
    let config = NatsConfig { urls: vec![server.url()], ..NatsConfig::default() };
    let nats = Nats::connect(&config, "purge-test").await?;
    topology::ensure(&nats, &TopologyConfig::default()).await?;
    let js = server.jetstream().await?;
    let ids = ["call", "call-2", "cal", "CALL"];
    for id in ids {
        plant(&js, id).await?;
    }
    let store = js.get_object_store("asr_media").await?;
    // One is nobody's; of two the job is not in the keys: its request waits, its dead letter may be sent again.
    for key in ["lost.wav", "waiting.wav", "dead.wav"] {
        store.put(key, &mut &b"somebody's words"[..]).await?;
    }
    let request = json!({"audio": "object://asr_media/waiting.wav"});
    js.publish("asr.v1.jobs.normal.later", request.to_string().into()).await?.await?;
    let letter = json!({
        "kind": "job", "id": "failed", "error": {"class": "engine_crash", "message": "three times"}, "at_ms": 1,
        "record": {
            "id": "failed", "state": "failed", "audio": "object://asr_media/dead.wav", "options": {}, "result_ttl_s": 60,
            "epoch": 1, "attempts": 3, "submitted_ms": 1, "changed_ms": 1,
        },
    });
    let before = everything(&js).await?;
    let dir = tempfile::tempdir()?;
    let person = Person { url: server.url(), dir: dir.path() };

    // Told, not done. A job whose request waits is open.
    let dry = person.object(&["purge", "session", "call", "--dry-run", "--json"]).await?;
    ensure!(dry["dry_run"] == true && dry["places"]["ASR_AUDIO"] == json!({"messages": 2, "bytes": 26}), "{dry:#}");
    ensure!(everything(&js).await? == before, "a dry run has changed something");
    let refused = person.types(&["purge", "job", "call"], 75).await?;
    ensure!(refused.contains("its request waits"), "{refused}");

    let done = person.object(&["purge", "session", "call", "--json"]).await?;
    ensure!(done["places"] == dry["places"], "told {}, done {}", dry["places"], done["places"]);
    let after = everything(&js).await?;
    assert_eq!(places(&after, "session call"), [""; 0]);
    let rest: Everything = before.clone().into_iter().filter(|(_, m)| owner(&m.subject) != "session call").collect();
    ensure!(after == rest, "a neighbour has lost or got something");
    let again = person.object(&["purge", "session", "call", "--json"]).await?;
    ensure!(again["total"] == json!({"messages": 0, "bytes": 0}), "{again}");

    // No dispatcher answers: what is open goes by force only, and says so.
    let forced = person.types(&["purge", "job", "call", "--force"], 0).await?;
    ensure!(forced.contains("though it had not ended"), "{forced}");
    let after = everything(&js).await?;
    let mine = ["job call", "object audio/call", "object result/call/f1.json", "object calls/call.wav"];
    for who in mine {
        // The marker that tells a dispatcher holds nothing.
        let left: Vec<_> = of(&after, who).into_values().filter(|m| !m.payload.is_empty()).collect();
        ensure!(left.is_empty(), "{who}: {left:?}");
    }
    let words = |all: &Everything| all.values().filter(|m| m.payload.ends_with(b"words-of-call")).count();
    ensure!(words(&before) > 20 && words(&after) == 0, "{} of {} are left", words(&after), words(&before));
    for who in ["session call-2", "job call-2", "session cal", "job cal", "session CALL", "job CALL", "object lost.wav"]
    {
        ensure!(of(&after, who) == of(&before, who) && !of(&after, who).is_empty(), "{who}");
    }
    let marker = person.object(&["purge", "job", "call", "--json"]).await?;
    ensure!(marker["total"] == json!({"messages": 1, "bytes": 0}), "{marker}");
    ensure!(places(&everything(&js).await?, "job call").is_empty(), "the marker");

    // By age: jobs whose requests wait stay, and nothing is younger than it says.
    let none = person.types(&["purge", "--older-than", "1h"], 0).await?;
    ensure!(none.contains("nothing is as old as that"), "{none}");
    let gone = eventually("everything is two seconds old", SOON, || async {
        // But for this letter.
        js.publish("asr.v1.dead.job.failed", letter.to_string().into()).await.ok()?.await.ok()?;
        person
            .object(&["purge", "--older-than", "2s", "--json"])
            .await
            .ok()
            .filter(|v| v["uploads"][0]["key"] == "lost.wav")
    })
    .await?;
    ensure!(gone["open"].as_array().map(Vec::len) == Some(4), "{gone:#}");
    let after = everything(&js).await?;
    for recording in ["object waiting.wav", "object dead.wav"] {
        ensure!(!of(&after, recording).is_empty(), "{recording} is needed by a job: {gone:#}");
    }
    for id in ids {
        assert_eq!(places(&after, &format!("session {id}")), [""; 0], "{gone:#}");
        ensure!(id == "call" || of(&after, &format!("job {id}")) == of(&before, &format!("job {id}")), "{id} is open");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_forgets_what_it_has_transcribed() -> Result<()> {
    let _place = fleet::place().await;
    let builder =
        Fleet::builder().workers(2).engine(Engine::Simulated { speed: 20.0 }).set("worker.split_jobs_over_s", 30);
    let fleet = builder.set("worker.job_part_s", 10).set("worker.decode_states", 1).start().await?;
    let nats = connect(&fleet).await?;
    let js = fleet.js();
    let dir = tempfile::tempdir()?;
    let person = Person { url: fleet.url(), dir: dir.path() };

    // Two sessions and two jobs of the same names; the recordings are long enough to be done in parts.
    let mut texts = BTreeMap::new();
    for (n, id) in ["call", "call-2"].into_iter().enumerate() {
        let mut producer = Producer::named(js.clone(), id, "mic");
        producer.stream(&audio::bursts(60 + n as u64, 8.0), 200, Pace::AsFastAsPossible).await?;
        producer.end().await?;
        texts.insert(id, fleet.wait_end(id, PATIENCE).await.with_context(|| fleet.logs())?);
        hand_in_as(&nats, &fleet, id, &audio::bursts(70 + n as u64, 150.0), Default::default()).await?;
    }
    for id in ["call", "call-2"] {
        let status = ended(&nats, &fleet, id).await?;
        ensure!(status.record.state == JobState::Done, "{:?}\n{}", status.record, fleet.logs());
        for what in [format!("session.{id}.ended"), format!("session.{id}.released"), format!("job.{id}.done")] {
            let told = format!("asr.v1.event.{what}");
            let stored = || async { voxfleet_harness::checker::stored_ms(&js, "ASR_EVENT", &told).await };
            eventually(format!("{what} is told"), SOON, stored).await?;
        }
    }
    let before = everything(&js).await?;
    ensure!(contain(&before, &texts["call"]) > 0, "its words are nowhere");

    let done = person.object(&["purge", "session", "call", "--json"]).await?;
    for place in ["ASR_AUDIO", "ASR_TRANSCRIPT", "ASR_EVENT", "KV_asr_sessions"] {
        ensure!(done["places"][place]["messages"].as_u64().is_some_and(|n| n > 0), "{place}: {done:#}");
    }
    let after = everything(&js).await?;
    assert_eq!(places(&after, "session call"), [""; 0]);
    assert_eq!(contain(&after, &texts["call"]), 0, "its words stand elsewhere");
    for who in ["session call-2", "job call", "job call-2"] {
        ensure!(of(&after, who) == of(&before, who), "{who}");
    }

    // The job takes its parts, its result and its recording with it.
    let done = person.object(&["purge", "job", "call", "--json"]).await?;
    let parts: Vec<&str> =
        done["purged"][0]["parts"].as_array().context("parts")?.iter().filter_map(Value::as_str).collect();
    ensure!(parts.len() > 2, "{done:#}");
    let after = everything(&js).await?;
    for who in parts.iter().map(|part| format!("job {part}")).chain(["job call".to_owned()]) {
        ensure!(!of(&before, &who).is_empty() && of(&after, &who).is_empty(), "{who}");
    }
    let store = js.get_object_store("asr_media").await?;
    let names: Vec<String> = store.list().await?.map_ok(|object| object.name).try_collect().await?;
    ensure!(names.iter().any(|name| name == "upload/call-2"), "{names:?}");
    ensure!(names.iter().any(|name| name.starts_with("result/call-2/")), "{names:?}");
    ensure!(!names.iter().any(|name| name == "upload/call" || name.starts_with("result/call/")), "{names:?}");
    let chunks = |all: &Everything| all.values().filter(|m| m.subject.starts_with("$O.asr_media.C.")).count();
    ensure!(chunks(&after) < chunks(&before), "chunks of its recording stay");
    person.types(&["jobs", "result", "call"], 66).await?;
    person.types(&["jobs", "result", "call-2"], 0).await?;

    // No log of any process holds a word of what was said.
    let logs = dir.path().join("logs");
    fleet.keep_logs(&logs)?;
    for entry in std::fs::read_dir(&logs)? {
        let log = std::fs::read_to_string(entry?.path())?;
        for text in texts.values() {
            ensure!(!log.contains(&beginning(text)), "a transcript is in a log");
        }
    }

    // Its name is free again, in the same dispatcher.
    let again = audio::bursts(66, 6.0);
    let mut producer = Producer::named(js.clone(), "call", "mic-2");
    producer.stream(&again, 200, Pace::AsFastAsPossible).await?;
    let refused = person.types(&["purge", "session", "call"], 75).await?;
    ensure!(refused.contains("is open") && refused.contains("--force"), "{refused}");
    eventually("a final of the new session", SOON, || async {
        let said = voxfleet_harness::checker::finals(&js, "call").await.ok()?;
        said.iter().any(|f| !f.text().is_empty()).then_some(())
    })
    .await
    .with_context(|| fleet.logs())?;

    // By force: it is ended in order, and nothing comes after it.
    person.types(&["purge", "session", "call", "--force"], 0).await?;
    hand_in_as(&nats, &fleet, "long", &audio::bursts(80, 300.0), Default::default()).await?;
    person.types(&["purge", "job", "long"], 75).await?;
    let forced = person.object(&["purge", "job", "long", "--force", "--json"]).await?;
    ensure!(forced["purged"][0]["cut_off"] == false, "a dispatcher has ended it: {forced:#}");
    let after = everything(&js).await?;
    for who in ["session call", "job long", "object upload/long"] {
        assert_eq!(places(&after, who), [""; 0], "{who}");
    }
    let parts: Vec<_> = after.values().filter(|m| owner(&m.subject).starts_with("job long-")).collect();
    ensure!(parts.is_empty(), "{parts:?}");
    Ok(())
}

/// How many messages have this text in them.
fn contain(all: &Everything, text: &str) -> usize {
    let needle = beginning(text);
    let has = |payload: &[u8]| payload.windows(needle.len()).any(|window| window == needle.as_bytes());
    all.values().filter(|stored| has(&stored.payload)).count()
}

/// A few words of it: a text is cut into finals, each with its own.
fn beginning(text: &str) -> String {
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}
