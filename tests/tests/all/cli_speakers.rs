//! What people see of speakers who are known later than their words: as lines, as objects, in files.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{checker, find, fleet};

use crate::{
    cli::{objects, out, run, said},
    speakers::{builder, can_listen, is_late, revised, shown},
};

/// Nobody is heard in time.
const LISTEN_MS: u64 = 1_000;

#[tokio::test(flavor = "multi_thread")]
async fn speakers_that_come_late_are_shown() -> Result<()> {
    if can_listen().is_none() {
        return Ok(());
    }
    let _turn = fleet::turn().await;
    let fleet = builder().workers(1).slots(2).set("worker.simulated.listen_ms", LISTEN_MS).start().await?;
    let (url, dir) = (fleet.url(), tempfile::tempdir()?);
    let call = find::root().join("tests/audio/call-02.flac").display().to_string();

    let stream = ["stream", &call, "--session", "streamed", "--diarize", "--wait", "--json", "--speed", "3"];
    let live = ["transcribe", "--live", &call, "--id", "kept", "--diarize", "--speed", "3", "-f", "words", "-v"];
    let (stream, live) = tokio::join!(run(&url, dir.path(), &stream), run(&url, dir.path(), &live));
    let (stream, live) = (stream?, live?);
    ensure!(stream.status.code() == Some(0), "{}\n{}", said(&stream), fleet.logs());
    ensure!(live.status.code() == Some(0), "{}\n{}", said(&live), fleet.logs());

    // As objects: each final and each revision is one, and together they are the chain.
    let finals = checker::finals(&fleet.js(), "streamed").await?;
    ensure!(finals.iter().filter(|f| is_late(&f.json)).count() >= 4, "{finals:#?}");
    let stands = revised(&fleet, "streamed").await?;
    ensure!(stands.iter().all(|f| !is_late(f)), "{stands:#?}");
    let of_type = |objects: &[Value], kind: &str| -> Vec<Value> {
        objects.iter().filter(|o| o["type"] == kind).map(|o| o[kind].clone()).collect()
    };
    let watched = ["watch", "streamed", "--from", "start", "--until-end", "--json"];
    for output in [stream, run(&url, dir.path(), &watched).await?] {
        let objects = objects(&output)?;
        let (mut told, revisions) = (of_type(&objects, "final"), of_type(&objects, "revision"));
        let promised = |f: &Value| (f["index"].clone(), is_late(f), shown(f));
        ensure!(told.iter().map(promised).eq(finals.iter().map(|f| promised(&f.json))), "{}", said(&output));
        for revision in &revisions {
            let index = revision["index"].as_u64().context("index")? as usize;
            for field in ["segments", "turns", "speakers"] {
                told[index][field] = revision[field].clone();
            }
        }
        ensure!(told.iter().map(shown).eq(stands.iter().map(shown)), "{}", said(&output));
    }

    // As lines: the words come without names, and again with them.
    let output = run(&url, dir.path(), &["watch", "streamed", "--from", "start", "--until-end"]).await?;
    let lines = out(&output);
    let lines: Vec<&str> = lines.lines().collect();
    let late = finals.iter().position(|f| is_late(&f.json)).context("a late one")?;
    let segments = &stands[late]["segments"];
    let (text, name) = (&segments[0]["text"], &segments[0]["speaker"]);
    let (text, name) = (text.as_str().context("text")?.trim(), name.as_str().context("name")?);
    let at = |tag: &str, text: &str| lines.iter().position(|line| line.starts_with(tag) && line.contains(text));
    let first = at("final ", &format!("gpu-1  {text}")).with_context(|| said(&output))?;
    let again = at("revised ", &format!("  {name}: {text}")).with_context(|| said(&output))?;
    ensure!(first < again, "{}", said(&output));

    // In a file: as it stands in the end.
    let rows: Value = serde_json::from_str(&out(&live))?;
    let rows = rows["words"].as_array().context("words")?;
    ensure!(rows.len() > 30 && rows.iter().all(|row| row["speaker"].is_string()), "{rows:#?}");
    ensure!(String::from_utf8_lossy(&live.stderr).lines().any(|l| l.starts_with("revised ")), "{}", said(&live));
    let export = run(&url, dir.path(), &["export", "kept", "-f", "words"]).await?;
    ensure!(out(&export) == out(&live), "{}\ninstead of\n{}", out(&live), out(&export));
    Ok(())
}
