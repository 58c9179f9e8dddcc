//! `voxfleet jobs dead` against a real fleet: what failed is found, shown, tried again and put away.

use std::{
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio,
    fleet::{self, Fleet},
    process::{Settings, voxfleet},
    wait::eventually,
};

use crate::direct;

const SOON: Duration = Duration::from_secs(30);

/// `voxfleet` with these words, in a folder without settings of the developer's.
pub(crate) fn command(url: &str, dir: &Path, words: &[&str]) -> Result<Command> {
    let mut command = voxfleet(&Settings::new().with("nats.urls", url), dir)?;
    command.args(words);
    Ok(command)
}

/// Runs it to its end on a thread that may block.
pub(crate) async fn typed(url: &str, dir: &Path, words: &[&str]) -> Result<Output> {
    let mut command = command(url, dir, words)?;
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

pub(crate) fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("exit {:?}\n{}{}", output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A person in front of a fleet.
struct Typist<'a> {
    fleet: &'a Fleet,
    dir: tempfile::TempDir,
}

impl Typist<'_> {
    async fn types(&self, words: &[&str], code: i32) -> Result<String> {
        let output = typed(&self.fleet.url(), self.dir.path(), words).await?;
        ensure!(output.status.code() == Some(code), "{words:?} was to exit with {code}: {}", said(&output));
        Ok(said(&output))
    }

    async fn object(&self, words: &[&str]) -> Result<Value> {
        let output = typed(&self.fleet.url(), self.dir.path(), words).await?;
        ensure!(output.status.success(), "{words:?}: {}", said(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Waits until the job has a letter; gives it.
    async fn letter(&self, id: &str) -> Result<Value> {
        let found = eventually(format!("a letter of {id}"), SOON, || async {
            let list = self.object(&["jobs", "dead", "list", "--json"]).await.ok()?;
            list["letters"].as_array()?.iter().find(|l| l["id"] == id).cloned()
        })
        .await;
        found.with_context(|| self.fleet.logs())
    }

    async fn ids(&self) -> Result<Vec<String>> {
        let list = self.object(&["jobs", "dead", "list", "--json"]).await?;
        let letters = list["letters"].as_array().context("letters")?;
        Ok(letters.iter().filter_map(|l| l["id"].as_str().map(str::to_owned)).collect())
    }
}

async fn publish(fleet: &Fleet, subject: &str, body: &Value) -> Result<()> {
    fleet.js().publish(subject.to_owned(), body.to_string().into()).await?.await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_is_found_shown_tried_again_and_put_away() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let person = Typist { fleet: &fleet, dir: tempfile::tempdir()? };
    let empty = person.types(&["jobs", "dead", "list"], 0).await?;
    ensure!(empty.contains("no dead letters"), "{empty}");

    // A recording that is not there, one that is none, a request that is none, and a window of a session.
    publish(&fleet, "asr.v1.jobs.normal.late", &json!({"audio": "object://asr_media/later.wav"})).await?;
    let noise = json!({"data": "bm90IGF1ZGlvIGF0IGFsbA==", "name": "noise.wav"});
    publish(&fleet, "asr.v1.jobs.high.noise", &noise).await?;
    publish(&fleet, "asr.v1.jobs.low.none", &json!({"audoi": "x"})).await?;
    let window = json!({
        "kind": "session", "id": "talk", "at_ms": 1, "error": {"class": "engine_crash", "message": "it crashed the engine"},
        "origin": {"gpu_id": "gpu-1", "incarnation": "i", "epoch": 3}, "attempts": 3, "audio": {"from_seq": 5, "to_seq": 9},
    });
    publish(&fleet, "asr.v1.dead.session.talk", &window).await?;
    publish(&fleet, "asr.v1.dead.session.foreign", &json!(["no letter at all"])).await?;

    for (id, class) in [("late", "not_found"), ("noise", "unsupported_format"), ("none", "bad_request")] {
        let letter = person.letter(id).await?;
        ensure!(letter["letter"]["error"]["class"] == class, "{letter:#}");
        ensure!(letter["letter"]["origin"]["dispatcher"].is_string(), "who wrote it: {letter:#}");
    }
    let late = person.letter("late").await?;
    ensure!(late["letter"]["origin"]["gpu_id"] == "gpu-1", "whose hands it was in: {late:#}");
    let list = person.types(&["jobs", "dead", "list"], 0).await?;
    for part in ["not_found", "bad_request", "engine_crash", "not a letter this version can read"] {
        ensure!(list.contains(part), "{part:?} is not in:\n{list}");
    }
    let shown = person.types(&["jobs", "dead", "show", "talk"], 0).await?;
    ensure!(shown.contains("log entries 5 to 9") && shown.contains("it crashed the engine"), "{shown}");
    let shown = person.types(&["jobs", "dead", "show", "none"], 0).await?;
    ensure!(shown.contains(r#"{"audoi":"x"}"#), "its sender's own words:\n{shown}");
    person.types(&["jobs", "dead", "show", "nobody"], 66).await?;

    // What cannot be tried again says why.
    let refused = person.types(&["jobs", "dead", "retry", "none"], 1).await?;
    ensure!(refused.contains("corrected"), "{refused}");
    let refused = person.types(&["jobs", "dead", "retry", "talk"], 2).await?;
    ensure!(refused.contains("is a session"), "{refused}");
    person.types(&["jobs", "dead", "retry", "nobody"], 66).await?;

    // The recording is there now: the job is done under a new id, and its letter is gone.
    let pcm = audio::bursts(41, 6.0);
    let store = fleet.js().get_object_store("asr_media").await?;
    store.put("later.wav", &mut pcm.wav().as_slice()).await?;
    let retried = person.object(&["jobs", "dead", "retry", "late", "--json"]).await?;
    ensure!(retried["job"] == "late-r1" && retried["letters_dropped"] == 1, "{retried}");
    let text = eventually("the result of late-r1", SOON, || async {
        let output = typed(&fleet.url(), person.dir.path(), &["jobs", "result", "late-r1"]).await.ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    })
    .await
    .with_context(|| fleet.logs())?;
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(&text), words(&direct::simulated_text(&pcm)?));
    ensure!(!person.ids().await?.contains(&"late".to_owned()));

    // One that came inside its request has its own copy, and fails again under its own name.
    let again = person.object(&["jobs", "dead", "retry", "noise", "--keep", "--json"]).await?;
    ensure!(again["job"] == "noise-r1" && again["letters_dropped"] == 0, "{again}");
    person.letter("noise-r1").await?;
    ensure!(store.info("audio/noise-r1").await.is_ok(), "a recording of its own");
    let third = person.object(&["jobs", "dead", "retry", "noise-r1", "--json"]).await?;
    ensure!(third["job"] == "noise-r2", "{third}");
    person.letter("noise-r2").await?;

    // A job that is there is not written over, and is not taken for a new try.
    for taken in ["late-r1", "noise"] {
        let refused = person.types(&["jobs", "dead", "retry", "noise", "--id", taken], 2).await?;
        ensure!(refused.contains("already"), "{refused}");
    }

    // Put away: by id, by kind, by number.
    let seq = person.letter("none").await?["seq"].to_string();
    person.types(&["jobs", "dead", "drop", "--seq", &seq], 0).await?;
    person.types(&["jobs", "dead", "drop", "--seq", &seq], 66).await?;
    person.types(&["jobs", "dead", "drop", "talk", "--job"], 66).await?;
    for id in ["talk", "foreign", "noise", "noise-r2"] {
        let dropped = person.object(&["jobs", "dead", "drop", id, "--json"]).await?;
        ensure!(dropped["dropped"] == 1, "{id}: {dropped}");
    }
    let left = person.ids().await?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}
