//! People who watch: one who stalls costs nobody anything, and a move is seen once, with no final missing and none repeated.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::time::Instant;
use voxfleet_harness::{
    audio, checker,
    child::Child,
    fleet::{self, Engine, Fleet},
    producer::{Pace, Producer},
    wait::eventually,
};

use crate::{dead_letters::command, direct};

const SOON: Duration = Duration::from_secs(60);

fn watch(fleet: &Fleet, dir: &Path, name: &str, words: &[&str]) -> Result<Child> {
    let words = [&["watch"], words].concat();
    Ok(Child::start(name, command(&fleet.url(), dir, &words)?, &dir.join(format!("{name}.log")))?)
}

/// Waits until a viewer's reader of finals stands: it starts at what is new.
async fn readers(fleet: &Fleet, stream: &str, count: usize) -> Result<()> {
    let found = eventually(format!("{count} readers of {stream}"), SOON, || async {
        let names = checker::consumer_names(&fleet.js(), stream).await.ok()?;
        (names.iter().filter(|n| n.starts_with("feed-")).count() >= count).then_some(())
    });
    Ok(found.await?)
}

fn objects(viewer: &Child) -> Vec<Value> {
    viewer.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Indices of the finals a viewer showed, in its order, and their text.
fn finals(objects: &[Value]) -> (Vec<u64>, String) {
    let finals = || objects.iter().filter(|o| o["type"] == "final").map(|o| &o["final"]);
    let text = |f: &Value| {
        let segments = f["segments"].as_array().into_iter().flatten();
        segments.filter_map(|s| s["text"].as_str()).collect::<Vec<_>>().join(" ")
    };
    let said: Vec<String> = finals().map(text).filter(|t| !t.is_empty()).collect();
    (finals().filter_map(|f| f["index"].as_u64()).collect(), said.join(" "))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_viewer_costs_nobody_and_catches_up() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let dir = tempfile::tempdir()?;
    let mut stalled = Vec::new();
    for n in 0..4 {
        stalled.push(watch(&fleet, dir.path(), &format!("stalled-{n}"), &["talk", "--json", "--until-end"])?);
    }
    let mut awake = watch(&fleet, dir.path(), "awake", &["talk", "--json", "--until-end"])?;
    readers(&fleet, "ASR_TRANSCRIPT", 5).await?;
    readers(&fleet, "ASR_PARTIAL", 5).await?;
    for viewer in &mut stalled {
        viewer.stop()?;
    }

    let pcm = audio::bursts(77, 24.0);
    let mut producer = Producer::named(fleet.js(), "talk", "s");
    let begun = Instant::now();
    producer.stream(&pcm, 100, Pace::Speed(3.0)).await?;
    producer.end().await?;
    let sent = begun.elapsed();
    let status = awake.wait(SOON).await.with_context(|| fleet.logs())?;
    let seen = begun.elapsed();
    ensure!(status.success(), "{status}: {}", awake.log_tail());
    // Eight seconds of sending; every chunk was acknowledged in its time, and the last final was seen soon after.
    ensure!(sent < Duration::from_secs(16), "the producer was held up: {sent:?}");
    ensure!(seen < sent + Duration::from_secs(8), "{sent:?} to send, seen after {seen:?}");
    let (indices, text) = finals(&objects(&awake));
    assert_eq!(text, direct::simulated_text(&pcm)?);

    for mut viewer in stalled {
        viewer.cont()?;
        let status = viewer.wait(SOON).await?;
        ensure!(status.success(), "{status}: {}", viewer.log_tail());
        assert_eq!(finals(&objects(&viewer)), (indices.clone(), text.clone()), "{}", viewer.name());
    }
    checker::check(&fleet.js(), "talk").await?.clean()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_seen_once_and_no_final_twice() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).engine(Engine::Simulated { speed: 40.0 }).start().await?;
    let dir = tempfile::tempdir()?;
    let mut machine = watch(&fleet, dir.path(), "machine", &["talk", "--json", "--until-end"])?;
    let mut person = watch(&fleet, dir.path(), "person", &["talk", "--until-end"])?;
    for stream in ["ASR_TRANSCRIPT", "ASR_PARTIAL", "ASR_EVENT"] {
        readers(&fleet, stream, 2).await?;
    }

    let pcm = audio::bursts(78, 24.0);
    let js = fleet.js();
    let sending = async {
        let mut producer = Producer::named(js.clone(), "talk", "s");
        producer.stream(&pcm, 100, Pace::Speed(2.0)).await?;
        Ok::<_, anyhow::Error>(producer.end().await?)
    };
    let killing = async {
        // In the middle of what somebody is saying.
        let partial = eventually("a partial behind a final", SOON, || async {
            let seen = objects(&machine);
            let after = seen.iter().rposition(|o| o["type"] == "final")?;
            let partial = seen[after..].iter().find(|o| o["type"] == "partial")?;
            partial["partial"]["gpu_id"].as_str().map(str::to_owned)
        });
        let owner = partial.await?;
        fleet.workers.iter_mut().find(|w| w.gpu_id() == owner).context("its worker")?.kill9()?;
        Ok(owner)
    };
    let both = tokio::try_join!(sending, killing);
    let (_, owner) = both.with_context(|| fleet.logs())?;
    let text = fleet.wait_end("talk", SOON).await.with_context(|| fleet.logs())?;
    assert_eq!(text, direct::simulated_text(&pcm)?, "moved in mid-word, it says what it would have said");

    for viewer in [&mut machine, &mut person] {
        let status = viewer.wait(SOON).await?;
        ensure!(status.success(), "{status}: {}", viewer.log_tail());
    }
    let seen = objects(&machine);
    let (indices, shown) = finals(&seen);
    assert_eq!(shown, text);
    assert_eq!(indices, (0..indices.len() as u64).collect::<Vec<_>>(), "each final once, in order");
    let moves: Vec<&Value> = seen.iter().filter(|o| o["type"] == "moved").collect();
    ensure!(moves.len() == 1, "{moves:?}");
    ensure!(moves[0]["from"] == owner.as_str() && moves[0]["to"] != owner.as_str(), "{}", moves[0]);
    let at = seen.iter().position(|o| o["type"] == "moved").unwrap_or_default();
    let epoch = moves[0]["epoch"].as_u64().context("epoch")?;
    let old = seen[at..].iter().find(|o| o["type"] == "partial" && o["partial"]["epoch"].as_u64() < Some(epoch));
    ensure!(old.is_none(), "a partial of the old epoch after the move: {old:?}");
    ensure!(seen[at..].iter().any(|o| o["type"] == "partial"), "the new owner's partials");

    let told = person.log();
    ensure!(told.lines().filter(|l| l.starts_with("moved ")).count() == 1, "{told}");
    checker::check(&js, "talk").await?.clean()?;
    Ok(())
}
