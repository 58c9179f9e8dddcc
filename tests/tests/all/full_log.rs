//! `ASR_AUDIO` at its limit: an alarm before, a clear refusal then, nothing lost, and it goes on when there is room.

use std::{process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use voxfleet_harness::{
    audio,
    child::Child,
    fleet::{self, Fleet},
    producer::{Pace, Producer},
    verdict,
    wait::eventually,
};

use crate::{
    dead_letters::{command, said, typed},
    nats_pub::nats,
};

const SOON: Duration = Duration::from_secs(60);
const LIMIT: usize = 1024 * 1024;
/// Belongs to no session: it takes room and nothing else.
const FILLER: &str = "asr.v1.audio.not,an,id";

async fn fill(fleet: &Fleet, bytes: usize) -> Result<()> {
    for from in (0..bytes).step_by(64 * 1024) {
        let chunk = vec![0u8; (bytes - from).min(64 * 1024)];
        fleet.js().publish(FILLER, chunk.into()).await?.await?;
    }
    Ok(())
}

async fn nats_typed(fleet: &Fleet, home: &std::path::Path, words: &[&str]) -> Result<Output> {
    let mut command = nats(&fleet.url(), home)?;
    command.args(words);
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_log_refuses_clearly_and_goes_on_when_there_is_room() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = Fleet::builder().workers(1).set("dispatcher.topology.audio_max_bytes", LIMIT).start().await?;
    let outcome = refusals(&fleet).await;
    outcome.with_context(|| fleet.logs())
}

async fn refusals(fleet: &Fleet) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let home = dir.path();
    // A session that was open before, and has its place in the log.
    let early = audio::bursts(60, 3.0);
    let mut producer = Producer::named(fleet.js(), "early", "s");
    producer.stream(&early, 200, Pace::AsFastAsPossible).await?;

    fill(fleet, LIMIT * 72 / 100).await?;
    let alarm = eventually("the alarm", SOON, || async {
        let events = fleet.js().get_stream_no_info("ASR_EVENT").await.ok()?;
        events.get_last_raw_message_by_subject("asr.v1.event.fleet.ASR_AUDIO.stream_filling").await.ok()
    });
    let alarm = alarm.await?;
    ensure!(String::from_utf8_lossy(&alarm.payload).contains("ASR_AUDIO"), "{alarm:?}");

    // What is left is less than this recording: sending stops in the middle, and says why.
    let call = audio::bursts(61, 10.0);
    std::fs::write(home.join("call.wav"), call.wav())?;
    let words = ["stream", "call.wav", "--session", "call", "--speed", "0", "--chunk-ms", "100"];
    let mut waits = command(&fleet.url(), home, &[&words[..], &["--give-up-s", "120"]].concat())?;
    waits.current_dir(home);
    let mut waits = Child::start("stream", waits, &home.join("stream.log"))?;
    eventually("its word that the log is full", SOON, || async {
        waits.log().contains("the audio log is full").then_some(())
    })
    .await?;

    // Whoever does not want to wait is told so in the exit code too.
    std::fs::write(home.join("other.wav"), audio::bursts(62, 1.0).wav())?;
    let file = home.join("other.wav");
    let file = file.to_str().context("a path")?;
    let words = ["stream", file, "--session", "other", "--speed", "0", "--give-up-s", "1"];
    let gave_up = typed(&fleet.url(), home, &words).await?;
    ensure!(gave_up.status.code() == Some(75), "{}", said(&gave_up));
    ensure!(said(&gave_up).contains("the audio log is full"), "{}", said(&gave_up));
    let bare = "x".repeat(32_000);
    let refused = nats_typed(fleet, home, &["pub", "--jetstream", "asr.v1.audio.bare", &bare]).await?;
    ensure!(!refused.status.success(), "{}", said(&refused));
    ensure!(said(&refused).contains("maximum bytes exceeded"), "{}", said(&refused));

    // Room again: what waited goes on where it stopped, and what was open before goes on too.
    let purged = nats_typed(fleet, home, &["stream", "purge", "ASR_AUDIO", "--subject", FILLER, "-f"]).await?;
    ensure!(purged.status.success(), "{}", said(&purged));
    let status = waits.wait(SOON).await?;
    ensure!(status.success(), "{status}: {}", waits.log_tail());
    ensure!(waits.log().contains("there is room again"), "{}", waits.log_tail());
    producer.end().await?;
    for (session, pcm) in [("call", &call), ("early", &early)] {
        fleet.wait_end(session, SOON).await?;
        verdict::session(&fleet.js(), session, &pcm.samples).await?.clean(session)?;
    }
    Ok(())
}
