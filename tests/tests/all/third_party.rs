//! What somebody sees who has nothing of us, only the `nats` command: sessions and their GPUs, what waits for each GPU,
//! heartbeats, events, dead letters, all of it readable text.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio,
    fleet::{self, Fleet},
    wait::eventually,
};

use crate::nats_pub::nats;

const SOON: Duration = Duration::from_secs(30);

struct Stranger<'a> {
    fleet: &'a Fleet,
    home: tempfile::TempDir,
}

impl Stranger<'_> {
    /// What `nats` prints; an error where it fails.
    async fn nats(&self, words: &[&str]) -> Result<String> {
        self.nats_with(words, None).await
    }

    async fn nats_with(&self, words: &[&str], input: Option<&Path>) -> Result<String> {
        let mut command = nats(&self.fleet.url(), self.home.path())?;
        command.args(words);
        match input {
            Some(path) => command.stdin(std::fs::File::open(path)?),
            None => command.stdin(Stdio::null()),
        };
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "nats {words:?}: {text}{error}");
        Ok(text)
    }

    async fn sees(&self, what: &str, words: &[&str], wanted: &[&str]) -> Result<String> {
        let seen = eventually(what, SOON, || async {
            self.nats(words).await.ok().filter(|text| wanted.iter().all(|part| text.contains(part)))
        });
        match seen.await {
            Ok(text) => Ok(text),
            Err(error) => {
                Err(error).with_context(|| format!("nats {words:?} does not show {wanted:?}\n{}", self.fleet.logs()))
            }
        }
    }

    /// A key as JSON.
    async fn record(&self, bucket: &str, key: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.nats(&["kv", "get", bucket, key, "--raw"]).await?)?)
    }

    /// Sends raw sound to a session, in pieces.
    async fn speaks(&self, session: &str, seed: u64) -> Result<()> {
        let raw = self.home.path().join(format!("{session}.raw"));
        std::fs::write(&raw, audio::bursts(seed, 2.0).bytes())?;
        let subject = format!("asr.v1.audio.{session}");
        self.nats_with(&["pub", "--jetstream", "--force-stdin", "--no-templates", &subject], Some(&raw)).await.map(drop)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_to_be_seen_with_the_nats_command_alone() -> Result<()> {
    let _place = fleet::place().await;
    // The worker that stands still below must not be declared dead meanwhile.
    let patient = Fleet::builder().set("dispatcher.suspect_after_ms", 20_000).set("dispatcher.dead_after_ms", 60_000);
    let fleet = patient.workers(2).slots(4).start().await?;
    let home = tempfile::tempdir()?;
    let outcome = look(&fleet, home).await;
    let logs = fleet.logs();
    outcome.with_context(|| logs)
}

async fn look(fleet: &Fleet, home: tempfile::TempDir) -> Result<()> {
    let stranger = Stranger { fleet, home };
    stranger.speaks("call-a", 90).await?;
    stranger.speaks("call-b", 91).await?;

    // Sessions, and the GPU of each.
    stranger.sees("both sessions", &["kv", "ls", "asr_sessions"], &["call-a", "call-b"]).await?;
    let mut gpus = Vec::new();
    for session in ["call-a", "call-b"] {
        let record = eventually(format!("the GPU of {session}"), SOON, || async {
            let record = stranger.record("asr_sessions", session).await.ok()?;
            (record["state"] == "assigned").then_some(record)
        })
        .await?;
        let worker = &record["worker"];
        let (gpu, incarnation) =
            (worker["gpu_id"].as_str().context("gpu")?, worker["incarnation"].as_str().context("i")?);
        gpus.push((gpu.to_owned(), format!("{gpu}={incarnation}")));
    }
    ensure!(gpus[0].0 != gpus[1].0, "two sessions on two empty GPUs: {gpus:?}");

    // Heartbeats say who holds what.
    let beats = stranger.nats(&["sub", "asr.v1.heartbeat.>", "--count", "8", "--raw"]).await?;
    let beats: Vec<Value> = beats.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let holds = |gpu: &str, session: &str| {
        let held = |beat: &&Value| beat["held"].as_array().is_some_and(|held| held.iter().any(|h| h["id"] == session));
        beats.iter().filter(|b| b["gpu_id"] == gpu).any(|b| held(&b))
    };
    ensure!(holds(&gpus[0].0, "call-a") && holds(&gpus[1].0, "call-b"), "{beats:#?}");

    // Events, with the reasons of the decision; transcripts; who answers requests.
    let event = ["stream", "get", "ASR_EVENT", "--last-for", "asr.v1.event.session.call-a.assigned"];
    stranger.sees("why call-a is where it is", &event, &["\"candidates\"", "\"chosen\":true", &gpus[0].0]).await?;
    // The last one may be of silence; the first has words, whichever session was faster.
    let last = ["stream", "get", "ASR_TRANSCRIPT", "--last-for", "asr.v1.transcript.session.call-a.final"];
    stranger.sees("a final", &last, &["\"segments\"", "\"to_sample\"", &gpus[0].0]).await?;
    stranger.sees("what was said", &["stream", "get", "ASR_TRANSCRIPT", "1"], &["\"text\"", "\"words\""]).await?;
    let status = stranger.nats(&["req", "asr.v1.api.fleet.status", "{}", "--raw"]).await?;
    let status: Value = serde_json::from_str(status.trim())?;
    ensure!(status["ok"]["workers"].as_array().is_some_and(|w| w.len() == 2), "{status:#}");
    stranger.sees("the service", &["micro", "ls"], &["voxfleet"]).await?;

    // A dead letter.
    let job = r#"{"audio":"object://asr_media/nothing"}"#;
    stranger.nats(&["pub", "--jetstream", "asr.v1.jobs.normal.lost", job]).await?;
    let letter = ["stream", "get", "ASR_DEAD", "--last-for", "asr.v1.dead.job.lost"];
    let wanted = ["\"class\":\"not_found\"", "\"origin\"", "\"gpu_id\"", "object://asr_media/nothing"];
    stranger.sees("the dead letter", &letter, &wanted).await?;
    // Its key says so after its letter was written.
    eventually("the key of a failed job", SOON, || async {
        let record = stranger.record("asr_jobs", "lost").await.ok()?;
        (record["state"] == "failed" && record["error"]["class"] == "not_found").then_some(())
    })
    .await?;

    // What waits for each GPU: one that stands still takes nothing, and its queue grows.
    let pid = stranger.fleet.workers.iter().find(|w| w.gpu_id() == gpus[0].0).context("its worker")?.pid();
    let worker = Standing::new(pid)?;
    for seed in 0..4 {
        stranger.speaks("call-a", seed).await?;
        stranger.speaks("call-b", seed).await?;
    }
    let waiting = |consumer: String| {
        let stranger = &stranger;
        async move {
            let info = stranger.nats(&["consumer", "info", "ASR_LIVE", &consumer, "--json"]).await?;
            let info: Value = serde_json::from_str(&info)?;
            let count = |name: &str| info[name].as_u64().context(name.to_owned());
            Ok::<u64, anyhow::Error>(count("num_pending")? + count("num_ack_pending")?)
        }
    };
    eventually("hints wait for it", SOON, || async { waiting(gpus[0].1.clone()).await.ok().filter(|n| *n > 0) })
        .await?;
    eventually("and none for the other", SOON, || async { waiting(gpus[1].1.clone()).await.ok().filter(|n| *n == 0) })
        .await?;
    let report = stranger.nats(&["consumer", "report", "ASR_LIVE"]).await?;
    ensure!(gpus.iter().all(|(_, consumer)| report.contains(consumer.as_str())), "{report}");
    drop(worker);
    eventually("the queue is empty again", SOON, || async {
        waiting(gpus[0].1.clone()).await.ok().filter(|n| *n == 0)
    })
    .await?;
    Ok(())
}

/// A process that stands still until this is dropped.
struct Standing(u32);

impl Standing {
    fn new(pid: u32) -> Result<Self> {
        signal(pid, "-STOP")?;
        Ok(Self(pid))
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        // A process that has ended needs no waking.
        let _ = signal(self.0, "-CONT");
    }
}

fn signal(pid: u32, name: &str) -> Result<()> {
    let status = Command::new("kill").args([name, &pid.to_string()]).status()?;
    ensure!(status.success(), "kill {name} {pid}: {status}");
    Ok(())
}
