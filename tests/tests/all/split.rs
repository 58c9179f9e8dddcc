//! Channels heard one by one: a stereo call through a whole fleet, live and as a recording.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker, find,
    fleet::{self, Engine, Fleet},
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_schema::{
    job::JobState,
    session::{Channels, SessionOptions},
    transcript::Segment,
};

use crate::{direct, jobs_fleet};

const PATIENCE: Duration = Duration::from_secs(120);
const FORMAT: &str = "pcm_s16le;rate=16000;channels=2";

fn options() -> SessionOptions {
    let channel_names = vec!["agent".to_owned(), "customer".to_owned()];
    SessionOptions { channels: Channels::Split, channel_names, ..SessionOptions::default() }
}

fn stereo() -> Result<Pcm> {
    Ok(audio::read(&find::root().join("tests/audio/call-01-stereo.flac"))?)
}

/// Who says which words, by the description of the call.
fn truth() -> Result<BTreeMap<String, String>> {
    let described = std::fs::read(find::root().join("tests/audio/call-01.json"))?;
    let described: Value = serde_json::from_slice(&described)?;
    let mut said: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for turn in described["turns"].as_array().context("turns")? {
        let (speaker, text) = (turn["speaker"].as_str().context("speaker")?, turn["text"].as_str().context("text")?);
        said.entry(speaker.to_owned()).or_default().push(text.to_owned());
    }
    Ok(said.into_iter().map(|(speaker, turns)| (speaker, turns.join(" "))).collect())
}

/// The same of segments, by the speaker of each word.
fn said<'a>(segments: impl IntoIterator<Item = &'a Segment>) -> BTreeMap<String, String> {
    let mut said: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for word in segments.into_iter().flat_map(|s| &s.words) {
        said.entry(word.speaker.clone().unwrap_or_default()).or_default().push(&word.text);
    }
    said.into_iter().map(|(speaker, words)| (speaker, words.join(" "))).collect()
}

/// What must not depend on who decoded it.
fn essence(segments: &[Segment]) -> Vec<Value> {
    let of = |s: &Segment| json!([s.id, s.start_ms, s.end_ms, s.text, s.speaker, s.channel, s.words.len()]);
    segments.iter().map(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_of_a_live_call_are_told_apart_and_a_kill_changes_nothing() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(2).engine(Engine::Micro).start().await?;
    let js = fleet.js();
    let call = stereo()?;
    let log = {
        let mut log = direct::log(&call, 200);
        log[0].headers.push(("Asr-Format".to_owned(), FORMAT.to_owned()));
        log
    };
    let alone = direct::transcribe(&mut *direct::micro()?, &*direct::best_vad(), &options(), &log)?;
    ensure!(said(alone.iter().flat_map(|f| &f.segments)) == truth()?, "the engine alone hears something else");

    let mut producer = Producer::named(js.clone(), "both", "s1");
    let first = [("Asr-Format", FORMAT), ("Asr-Opt-Channels", "split"), ("Asr-Opt-Channel-Names", "agent,customer")];
    let speaking = async {
        producer.stream_with(&call, 200, Pace::Speed(2.0), &first).await?;
        producer.end().await?;
        anyhow::Ok(())
    };
    let killing = async {
        let owner = eventually("three finals", PATIENCE, || async {
            let finals = checker::finals(&js, "both").await.ok()?;
            (finals.len() >= 3).then(|| finals[2].json["gpu_id"].as_str().map(str::to_owned)).flatten()
        })
        .await?;
        let at = usize::from(owner == "gpu-2");
        fleet.workers[at].kill9()?;
        anyhow::Ok(owner)
    };
    let (spoken, killed) = tokio::join!(speaking, killing);
    spoken?;
    let killed = killed?;
    let heard = fleet.wait_end("both", PATIENCE).await;
    heard.with_context(|| fleet.logs())?;
    let report = checker::check(&js, "both").await?.clean()?;
    ensure!(report.finals.iter().any(|f| f.json["gpu_id"] != killed.as_str()), "nobody took it over\n{}", fleet.logs());
    ensure!(report.finals.len() == alone.len(), "{} finals, alone {}", report.finals.len(), alone.len());
    for (stored, alone) in report.finals.iter().zip(&alone) {
        let segments: Vec<Segment> = serde_json::from_value(stored.json["segments"].clone())?;
        assert_eq!(essence(&segments), essence(&alone.segments), "up to sample {}", alone.to_sample);
        assert_eq!(stored.json["to_sample"], alone.to_sample);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_of_a_recording_are_told_apart() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).slots(2).engine(Engine::Micro).start().await?;
    let nats = jobs_fleet::connect(&fleet).await?;
    let data = std::fs::read(find::root().join("tests/audio/call-01-stereo.flac"))?;
    let request = voxfleet_schema::job::JobRequest { options: options(), ..jobs_fleet::request("both", data)? };
    jobs_fleet::submit(&nats, &request).await?;
    let ended = jobs_fleet::ended(&nats, &fleet, "both").await?;
    ensure!(ended.record.state == JobState::Done, "{:?}\n{}", ended.record, fleet.logs());
    let finals = jobs_fleet::chain(&fleet, "both").await?;
    let segments = finals.iter().map(|f| serde_json::from_value(f["segments"].clone()));
    let segments: Vec<Segment> = segments.collect::<Result<Vec<Vec<Segment>>, _>>()?.concat();
    assert_eq!(said(&segments), truth()?);

    let result = jobs_fleet::aggregate(&fleet, &finals).await?;
    let mut words: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for segment in result["aligned_segments"].as_array().context("segments")? {
        for word in segment["words"].as_array().context("words")? {
            let speaker = word["speaker"].as_str().context("a word without a speaker")?.to_owned();
            words.entry(speaker).or_default().push(word["word"].as_str().context("word")?.to_owned());
        }
    }
    assert_eq!(
        words.into_iter().map(|(speaker, words)| (speaker, words.join(" "))).collect::<BTreeMap<_, _>>(),
        truth()?
    );
    Ok(())
}
