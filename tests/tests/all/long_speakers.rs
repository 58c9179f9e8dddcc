//! Who said what in long recordings whose parts are done by a whole fleet: as in one piece, whoever dies.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio::{self, Pcm},
    find,
    fleet::{self, Fleet, FleetBuilder},
};
use voxfleet_schema::{
    job::JobState,
    session::{Channels, Diarize, SessionOptions},
};
use voxfleet_worker::engine::diarize::reconsidered;

use crate::{
    direct,
    jobs_fleet::{aggregate, chain, connect, ended, under_way},
    long_jobs::{abroad, hand_in_as, parent_at_once},
    speakers::{alone_of, builder, can_listen, revise, shown},
};

/// Parts of ten seconds of every recording over twenty.
fn in_parts(builder: FleetBuilder) -> FleetBuilder {
    let builder = builder.set("worker.split_jobs_over_s", 20).set("worker.job_part_s", 10);
    builder.set("worker.decode_states", 1)
}

/// Two calls, one behind the other: four people.
fn two_calls() -> Result<Pcm> {
    let (mut one, other) = (audio::call(1)?, audio::call(2)?);
    one.samples.extend(other.samples);
    Ok(one)
}

/// The finals of a job that is done, revisions in their places, and who decoded them.
async fn told(fleet: &Fleet, job: &str) -> Result<(Vec<Value>, Vec<Value>, usize)> {
    let nats = connect(fleet).await?;
    let ended = ended(&nats, fleet, job).await?;
    ensure!(ended.record.state == JobState::Done, "{:?}\n{}", ended.record, fleet.logs());
    let first = chain(fleet, job).await.with_context(|| fleet.logs())?;
    let told = revise(fleet, "job", job, first.clone()).await?;
    let mut who: Vec<&str> = first.iter().filter_map(|f| f["gpu_id"].as_str()).collect();
    who.sort_unstable();
    who.dedup();
    let who = who.len();
    Ok((first, told, who))
}

fn same(told: &[Value], alone: &[Value], fleet: &Fleet) -> Result<()> {
    ensure!(told.len() == alone.len(), "{} finals, in one piece there are {}", told.len(), alone.len());
    for (told, alone) in told.iter().zip(alone) {
        let place = |value: &Value| (value["to_sample"].as_u64(), value["end"] == true);
        ensure!(place(told) == place(alone), "{told:#}\ninstead of\n{alone:#}");
        for field in ["by", "labels", "late", "why"] {
            let of = |value: &Value| (value["speakers"][field] != false).then(|| value["speakers"][field].clone());
            let (told, alone) = (of(told).unwrap_or_default(), of(alone).unwrap_or_default());
            ensure!(told == alone, "{field}: {told} instead of {alone}\n{}", fleet.logs());
        }
        let (told, alone) = (shown(told), shown(alone));
        ensure!(told == alone, "{told:#}\ninstead of\n{alone:#}\n{}", fleet.logs());
    }
    Ok(())
}

fn values<T: serde::Serialize>(finals: &[T]) -> Result<Vec<Value>> {
    Ok(finals.iter().map(serde_json::to_value).collect::<Result<_, _>>()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn speakers_of_a_long_recording_are_those_of_one_piece_whoever_dies() -> Result<()> {
    let Some(library) = can_listen() else { return Ok(()) };
    let _turn = fleet::turn().await;
    let mut fleet = in_parts(builder()).workers(3).slots(1).start().await?;
    let nats = connect(&fleet).await?;
    let pcm = two_calls()?;
    let options = SessionOptions { diarize: Diarize::On, ..SessionOptions::default() };
    let alone = alone_of(&pcm, &library)?;
    let at_the_end = values(&reconsidered(alone.clone(), &options))?;
    let as_shown = values(&alone)?;

    hand_in_as(&nats, &fleet, "calm", &pcm, options.clone()).await?;
    let (first, told, who) = self::told(&fleet, "calm").await?;
    // What is first shown at the end is what is known then.
    let before_the_end = first.len() - 1;
    same(&first[..before_the_end], &as_shown[..before_the_end], &fleet)?;
    same(&told, &at_the_end, &fleet)?;
    ensure!(who >= 2, "one worker did all of it\n{}", fleet.logs());
    let result = aggregate(&fleet, &chain(&fleet, "calm").await?).await?;
    let turns = result["speaker_turns"].as_array().context("turns")?;
    ensure!(turns.len() >= 12, "{turns:#?}");

    hand_in_as(&nats, &fleet, "hunted", &pcm, options).await?;
    let parent = parent_at_once(&nats, &fleet, "hunted").await?;
    abroad(&nats, &fleet, "hunted", parent).await?;
    under_way(&fleet, "hunted", 5).await?;
    fleet.workers[parent].kill9()?;
    let (_, told, _) = self::told(&fleet, "hunted").await?;
    same(&told, &at_the_end, &fleet)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_of_a_long_recording_are_those_of_one_piece() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = in_parts(Fleet::builder().engine(fleet::Engine::Micro)).workers(2).slots(1).start().await?;
    let nats = connect(&fleet).await?;
    let pcm = audio::read(&find::root().join("tests/audio/call-01-stereo.flac"))?;
    let channel_names = vec!["agent".to_owned(), "customer".to_owned()];
    let options = SessionOptions { channels: Channels::Split, channel_names, ..SessionOptions::default() };
    let log = {
        let mut log = direct::log(&pcm, 200);
        log[0].headers.push(("Asr-Format".to_owned(), "pcm_s16le;rate=16000;channels=2".to_owned()));
        log
    };
    let alone = direct::transcribe(&mut *direct::micro()?, &*direct::best_vad(), &options, &log)?;
    hand_in_as(&nats, &fleet, "both", &pcm, options).await?;
    let (_, told, who) = told(&fleet, "both").await?;
    same(&told, &values(&alone)?, &fleet)?;
    ensure!(who == 2, "one worker did all of it\n{}", fleet.logs());
    Ok(())
}
