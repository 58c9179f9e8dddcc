//! The unmodified `nats` command is a producer and a viewer.

use std::{
    fs::File,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio, checker,
    child::Child,
    find,
    fleet::{self, Engine, Fleet},
    wait::eventually,
};

/// `nats` with this server and nobody's saved contexts.
pub(crate) fn nats(url: &str, home: &Path) -> Result<Command> {
    let mut command = Command::new(find::nats_cli()?);
    command.env("NATS_URL", url).env("XDG_CONFIG_HOME", home).env("HOME", home).env("NO_COLOR", "1");
    command.env_remove("NATS_CONTEXT");
    Ok(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_file_becomes_a_readable_transcript() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).slots(2).engine(Engine::Micro).start().await?;
    let home = tempfile::tempdir()?;
    let raw = home.path().join("call.raw");
    let call = audio::call(2)?;
    std::fs::write(&raw, call.bytes())?;

    let seen = home.path().join("seen.log");
    let mut viewer = nats(&fleet.url(), home.path())?;
    viewer.args(["sub", "asr.v1.transcript.>"]);
    let viewer = Child::start("nats sub", viewer, &seen)?;
    eventually("nats sub is listening", Duration::from_secs(10), || async {
        viewer.log().contains("Subscribing").then_some(())
    })
    .await?;

    let published = nats(&fleet.url(), home.path())?
        .args(["pub", "--jetstream", "--force-stdin", "--no-templates", "-H", "Asr-End:1", "asr.v1.audio.call-2"])
        .stdin(Stdio::from(File::open(&raw)?))
        .output()?;
    ensure!(published.status.success(), "nats pub: {}", String::from_utf8_lossy(&published.stderr));

    let heard = fleet.wait_end("call-2", Duration::from_secs(60)).await.with_context(|| fleet.logs())?;
    checker::check(&fleet.js(), "call-2").await?.clean()?;
    let shown = eventually("nats sub shows the end final", Duration::from_secs(10), || async {
        let finals = finals_shown(&viewer.log());
        finals.iter().any(|f| f["end"] == true).then_some(finals)
    })
    .await?;
    let words = |f: &Value| {
        let segments = f["segments"].as_array().into_iter().flatten();
        segments.filter_map(|s| s["text"].as_str().map(str::to_owned)).collect::<Vec<_>>()
    };
    let text = shown.iter().flat_map(words).collect::<Vec<_>>().join(" ");
    assert_eq!(text, heard);
    let rate = audio::word_error_rate(&audio::call_text(2)?, &text);
    ensure!(rate <= 0.02, "word error rate {rate:.4}: {text}");
    Ok(())
}

/// The JSON bodies of finals in what `nats sub` printed: lines of their own.
fn finals_shown(output: &str) -> Vec<Value> {
    let bodies = output.lines().filter_map(|l| serde_json::from_str::<Value>(l.trim()).ok());
    bodies.filter(|v| v["final_id"].is_string()).collect()
}
