//! `docs/nats-recipes.md`: every block of commands on that page, run as it stands by the real `nats` command against a real
//! fleet, in the order of the page. A block that this test does not know is a failure: it would promise what nobody has seen.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio, checker,
    fleet::{self, Engine, Fleet},
    producer::{Pace, Producer},
    verdict,
    wait::eventually,
    words,
};

use crate::pages::{self, Block, Shell};

const PAGE: &str = "docs/nats-recipes.md";
const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn every_recipe_does_what_its_page_says() -> Result<()> {
    let _place = fleet::place().await;
    // So slow that a recording of minutes can be cancelled, and so fast that nobody waits for a call of seconds.
    let fleet = Fleet::builder().workers(2).slots(4).engine(Engine::Simulated { speed: 25.0 }).start().await?;
    let scene = Scene::set(&fleet).await.with_context(|| fleet.logs())?;
    for block in pages::read(PAGE)? {
        let tried = scene.try_out(&block).await;
        tried.with_context(|| format!("{PAGE}: {:?}\n{}", block.title, fleet.logs()))?;
    }
    Ok(())
}

/// A fleet on which there is something of everything to see.
struct Scene<'a> {
    fleet: &'a Fleet,
    shell: Shell,
    /// The GPU that has it.
    gpu: String,
    /// The other one.
    other: String,
}

impl<'a> Scene<'a> {
    async fn set(fleet: &'a Fleet) -> Result<Self> {
        let mut shell = Shell::new(&fleet.url())?;
        let pcm = audio::bursts(71, 5.0);
        let options = [("Asr-Opt-Carry-Prompt", "true"), ("Asr-Opt-Idle-Timeout-S", "600")];
        let mut producer = Producer::named(fleet.js(), "call-1", "s1");
        producer.stream_with(&pcm, 200, Pace::AsFastAsPossible, &options).await?;
        producer.flush().await?;
        let gpu = eventually("a GPU has it and has said something", SOON, || async {
            let finals = checker::finals(&fleet.js(), "call-1").await.ok()?;
            finals.last()?.json["gpu_id"].as_str().map(str::to_owned)
        })
        .await?;
        let other = if gpu == "gpu-1" { "gpu-2" } else { "gpu-1" }.to_owned();
        // A recording that is not there, and two that are.
        fleet
            .js()
            .publish("asr.v1.jobs.normal.job-1", json!({"audio": "object://asr_media/nothing"}).to_string().into())
            .await?
            .await?;
        std::fs::write(shell.path().join("call.wav"), audio::bursts(72, 4.0).wav())?;
        std::fs::write(shell.path().join("long.wav"), audio::bursts(73, 600.0).wav())?;
        for (name, value) in [("SESSION", "call-1"), ("JOB", "job-1"), ("GPU", gpu.as_str())] {
            shell.set(name, value);
        }
        Ok(Self { fleet, shell, gpu, other })
    }

    async fn record(&self, bucket: &str, key: &str) -> Result<Value> {
        let bucket = self.fleet.js().get_key_value(bucket).await?;
        Ok(serde_json::from_slice(&bucket.get(key).await?.context("no such key")?)?)
    }

    async fn state(&self, bucket: &str, key: &str, wanted: &str) -> Result<()> {
        eventually(format!("{key} is {wanted}"), SOON, || async {
            (self.record(bucket, key).await.ok()?["state"] == wanted).then_some(())
        })
        .await?;
        Ok(())
    }

    async fn try_out(&self, block: &Block) -> Result<()> {
        let Self { shell, gpu, .. } = self;
        match block.title.as_str() {
            "With the `nats` command" => shell.run(block).await.map(drop),
            "Who holds this session" => shell.sees(block, &[r#""state": "assigned""#, gpu]).await.map(drop),
            "Why is it there" => {
                shell.sees(block, &["candidates", r#""chosen": true"#, "gpu-1", "gpu-2"]).await.map(drop)
            }
            "What has happened to it" => shell.sees(block, &["call-1.opened", "call-1.assigned"]).await.map(drop),
            "All sessions" => shell.sees(block, &["call-1"]).await.map(drop),
            "Follow one transcript" => {
                let wanted = [r#""tentative""#, r#""final_id""#, r#""id": "call-1""#];
                self.shown_while(block, |_| "call-1".to_owned(), &wanted).await
            }
            "What it has said so far" => {
                let first = checker::finals(&self.fleet.js(), "call-1").await?.first().context("a final")?.text();
                ensure!(!first.is_empty());
                shell.sees(block, &[&first]).await.map(drop)
            }
            "What it is saying now" => shell.sees(block, &["after_index", "lag_ms", "tentative"]).await.map(drop),
            "How far behind is it" => shell.sees(block, &["Item: ASR_AUDIO#", r#""to_seq": "#]).await.map(drop),
            "Its audio, into a file" => {
                shell.run(block).await?;
                let heard = std::fs::read(shell.path().join("call-1.raw"))?;
                let said: Vec<u8> = self.logged().await?.iter().flat_map(|s| s.to_le_bytes()).collect();
                ensure!(heard == said, "{} bytes of {}", heard.len(), said.len());
                Ok(())
            }
            "Say it again to another session" => {
                shell.run(block).await?;
                self.fleet.wait_end("call-1-again", SOON).await?;
                let said = self.logged().await?;
                verdict::session(&self.fleet.js(), "call-1-again", &said).await?.clean("call-1-again")?;
                Ok(())
            }
            "What it knows beyond its last final" => shell.sees(block, &["prompt_tail", r#""index""#]).await.map(drop),
            "Its options, asked of the dispatcher" => {
                shell.sees(block, &[r#""carry_prompt": true"#, r#""record""#]).await.map(drop)
            }
            "Open one, send into it, close it" => {
                shell.sees(block, &[r#""worker""#, r#""end_seq""#]).await?;
                self.state("asr_sessions", "by-hand", "ended").await
            }
            "Watch heartbeats" => {
                shell.run_until(block, &[&format!(r#""gpu_id": "{gpu}""#), r#""id": "call-1""#]).await.map(drop)
            }
            "The last heartbeat of each, and who was declared dead" => {
                shell.sees(block, &["gpu-1.", "gpu-2.", r#""heartbeat""#]).await.map(drop)
            }
            "What waits for this GPU" => {
                let said = shell.sees(block, &["ASR_LIVE", "ASR_WORK", "Unprocessed Messages"]).await?;
                ensure!(said.contains(&format!("{gpu}=")) && !said.contains(&format!("{}=", self.other)), "{said}");
                Ok(())
            }
            "Give up a GPU" => {
                shell.sees(block, &[r#""sessions": 1"#]).await?;
                eventually("call-1 is on the other GPU", SOON, || async {
                    let record = self.record("asr_sessions", "call-1").await.ok()?;
                    (record["worker"]["gpu_id"] == self.other.as_str()).then_some(())
                })
                .await?;
                Ok(())
            }
            "What the dispatcher believes" => {
                shell.sees(block, &[r#""dispatcher": "#, r#""health": "#]).await.map(drop)
            }
            "Who is the active dispatcher" => {
                shell.sees(block, &[r#""holder": "dispatcher-1-1""#, "voxfleet"]).await.map(drop)
            }
            "Follow what happens" => {
                let wanted = [r#""what": "opened""#, r#""what": "assigned""#, r#""id": "call-"#];
                self.shown_while(block, |n| format!("call-{}", n + 2), &wanted).await
            }
            "How full is the log" => shell.sees(block, &["Maximum Bytes: 4.0 GiB", "OBJ_asr_media"]).await.map(drop),
            "Who has how much of the log" => {
                shell.sees(block, &["asr.v1.audio.call-1 ", "asr.v1.audio.call-1-again"]).await.map(drop)
            }
            "Give the log more room" => {
                shell.run(block).await?;
                let audio = self.fleet.js().get_stream("ASR_AUDIO").await?;
                ensure!(audio.cached_info().config.max_bytes == 8 << 30);
                Ok(())
            }
            "Hand in a recording" => {
                shell.run(block).await?;
                self.state("asr_jobs", "by-hand", "done").await
            }
            "How far is it" => shell.sees(block, &[r#""state": "done""#]).await.map(drop),
            "What waits and what runs" => shell.sees(block, &[r#""job": "by-hand""#, r#""total""#]).await.map(drop),
            "Its result" => {
                shell.run(block).await?;
                let result: Value = serde_json::from_slice(&std::fs::read(shell.path().join("by-hand.json"))?)?;
                ensure!(result["full_text"].as_str().is_some_and(|text| !text.is_empty()), "{result}");
                Ok(())
            }
            "Cancel a job" => {
                self.hand_in_long().await?;
                shell.sees(block, &[r#""id": "long""#, "cancelled"]).await?;
                self.state("asr_jobs", "long", "cancelled").await
            }
            "Find them" => shell.sees(block, &["asr.v1.dead.job.job-1", r#""class": "not_found""#]).await.map(drop),
            "Send one again" => {
                shell.run(block).await?;
                self.state("asr_jobs", "job-1-again", "done").await
            }
            "Put one away" => {
                shell.run(block).await?;
                let left = checker::read(&self.fleet.js(), "ASR_DEAD", "asr.v1.dead.job.job-1").await?;
                ensure!(left.is_empty(), "{} letters left", left.len());
                Ok(())
            }
            other => bail!("nobody has said what {other:?} is to do"),
        }
    }

    /// Runs a block that goes on for ever, while these sessions speak, until it has shown all of this.
    async fn shown_while(&self, block: &Block, speaks: impl Fn(u64) -> String, wanted: &[&str]) -> Result<()> {
        let speaking = async {
            for n in 0.. {
                let pcm = audio::bursts(80 + n, 1.0);
                Producer::bare(self.fleet.js(), &speaks(n)).stream(&pcm, 200, Pace::Speed(4.0)).await?;
            }
            Ok::<(), anyhow::Error>(())
        };
        tokio::select! {
            shown = self.shell.run_until(block, wanted) => shown.map(drop),
            failed = speaking => failed,
        }
    }

    /// What the log holds of `call-1`, read plainly.
    async fn logged(&self) -> Result<Vec<i16>> {
        Ok(words::samples_of(&checker::read(&self.fleet.js(), "ASR_AUDIO", "asr.v1.audio.call-1").await?))
    }

    async fn hand_in_long(&self) -> Result<()> {
        let store = self.fleet.js().get_object_store("asr_media").await?;
        let mut file = tokio::fs::File::open(self.shell.path().join("long.wav")).await?;
        store.put("audio/long.wav", &mut file).await?;
        let job = json!({"audio": "object://asr_media/audio/long.wav"}).to_string();
        self.fleet.js().publish("asr.v1.jobs.normal.long", job.into()).await?.await?;
        self.state("asr_jobs", "long", "assigned").await
    }
}
