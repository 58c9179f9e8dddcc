//! Long recordings over a whole fleet: parts are done by whoever is free, and the text is that of one worker.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    audio::{self, Pcm},
    checker,
    fleet::{self, Engine, Fleet, FleetBuilder},
    wait::eventually,
};
use voxfleet_nats::{
    Nats, api,
    kv::{Bucket, Records},
    subjects::Endpoint,
};
use voxfleet_schema::{
    id::StreamId,
    job::{JobList, JobListRequest, JobQuery, JobRecord, JobRequest, JobState, JobStatus},
    session::SessionOptions,
};

use crate::{
    direct,
    jobs_fleet::{aggregate, chain, connect, ended, request, submit, under_way},
};

const PATIENCE: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(10);

/// Parts of ten seconds of every recording over half a minute.
fn fleet(workers: usize, speed: f64) -> FleetBuilder {
    let fleet = Fleet::builder().workers(workers).engine(Engine::Simulated { speed });
    fleet.set("worker.split_jobs_over_s", 30).set("worker.job_part_s", 10).set("worker.decode_states", 1)
}

fn recording() -> Pcm {
    audio::bursts(17, 150.0)
}

async fn hand_in(nats: &Nats, fleet: &Fleet, job: &str, pcm: &Pcm) -> Result<()> {
    hand_in_as(nats, fleet, job, pcm, SessionOptions::default()).await
}

pub(crate) async fn hand_in_as(
    nats: &Nats,
    fleet: &Fleet,
    job: &str,
    pcm: &Pcm,
    options: SessionOptions,
) -> Result<()> {
    let store = fleet.js().get_object_store("asr_media").await?;
    store.put(format!("upload/{job}").as_str(), &mut pcm.wav().as_slice()).await?;
    let audio = Some(format!("object://asr_media/upload/{job}"));
    submit(nats, &JobRequest { audio, data: None, options, ..request(job, Vec::new())? }).await?;
    Ok(())
}

/// Checks its chain link by link, and that its text is what one worker says in one piece; gives who decoded its finals.
async fn is_whole(nats: &Nats, fleet: &Fleet, job: &str, pcm: &Pcm) -> Result<Vec<String>> {
    let ended = ended(nats, fleet, job).await?;
    ensure!(ended.record.state == JobState::Done, "{:?}\n{}", ended.record, fleet.logs());
    let finals = chain(fleet, job).await.with_context(|| fleet.logs())?;
    let alone = direct::simulated_finals(pcm)?;
    ensure!(finals.len() == alone.len(), "{} finals, in one piece there are {}", finals.len(), alone.len());
    assert_eq!(aggregate(fleet, &finals).await?["full_text"], direct::text(&alone), "{}", fleet.logs());
    let mut who: Vec<String> = finals.iter().filter_map(|f| Some(f["gpu_id"].as_str()?.to_owned())).collect();
    who.sort();
    who.dedup();
    Ok(who)
}

/// Keys of the parts of a job.
async fn parts(nats: &Nats, job: &str) -> Result<Vec<JobRecord>> {
    let all = Records::<JobRecord>::new(nats, Bucket::Jobs).all().await?;
    let mine = all.into_iter().map(|(_, found)| found.value);
    Ok(mine.filter(|record| record.parent().is_some_and(|parent| parent.as_str() == job)).collect())
}

/// Waits until some part of it is with another worker than `not`, and has finals; gives that worker.
pub(crate) async fn abroad(nats: &Nats, fleet: &Fleet, job: &str, not: usize) -> Result<usize> {
    let found = eventually("a part at another worker", PATIENCE, || async {
        for part in parts(nats, job).await.ok()? {
            let Some(worker) = part.worker.filter(|_| part.state == JobState::Assigned) else { continue };
            let subject = format!("asr.v1.transcript.job.{}.final", part.id);
            let finals = checker::read(&fleet.js(), "ASR_TRANSCRIPT", &subject).await.ok()?;
            let at: usize = worker.gpu_id.as_str().strip_prefix("gpu-")?.parse().ok()?;
            if finals.len() >= 2 && at - 1 != not {
                return Some(at - 1);
            }
        }
        None
    })
    .await;
    found.with_context(|| fleet.logs())
}

async fn parent_at(nats: &Nats, job: &str) -> Result<usize> {
    let query = JobQuery { job: StreamId::new(job)? };
    let status: JobStatus = api::request(nats, Endpoint::JobStatus, &query, ANSWER).await?;
    let worker = status.record.worker.context("nobody has it")?;
    let number = worker.gpu_id.as_str().strip_prefix("gpu-").context("a worker of ours")?;
    Ok(number.parse::<usize>()? - 1)
}

/// Nothing of it is left to be done.
async fn no_part_is_open(nats: &Nats, fleet: &Fleet, job: &str) -> Result<Vec<JobRecord>> {
    let all = eventually("the end of every part", PATIENCE, || async {
        let parts = parts(nats, job).await.ok()?;
        parts.iter().all(|part| part.state.has_ended()).then_some(parts)
    })
    .await;
    all.with_context(|| fleet.logs())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_recording_is_done_by_all_and_says_what_one_would() -> Result<()> {
    let _turn = fleet::turn().await;
    // Slow enough that no one of them has done it all before the others have begun.
    let mut fleet = fleet(3, 5.0).start().await?;
    let nats = connect(&fleet).await?;
    let pcm = recording();
    hand_in(&nats, &fleet, "long", &pcm).await?;
    let who = is_whole(&nats, &fleet, "long", &pcm).await?;
    assert_eq!(who, ["gpu-1", "gpu-2", "gpu-3"], "finals say who decoded them");
    // Its chain has one author at a time: what is copied is not decoded there too.
    let opened: usize = fleet.workers.iter().map(|w| w.log().matches("session opened job=\"long\" gpu=").count()).sum();
    ensure!((1..=3).contains(&opened), "its own chain was opened {opened} times\n{}", fleet.logs());
    let parts = no_part_is_open(&nats, &fleet, "long").await?;
    ensure!(parts.len() >= 5 && parts.iter().all(|part| part.state == JobState::Done), "{parts:#?}");
    let list = async |parts_of: Option<&str>| -> Result<Vec<StreamId>> {
        let parts_of = parts_of.map(StreamId::new).transpose()?;
        let request = JobListRequest { parts_of, ..JobListRequest::default() };
        let list: JobList = api::request(&nats, Endpoint::JobList, &request, ANSWER).await?;
        Ok(list.jobs.into_iter().map(|job| job.job).collect())
    };
    assert_eq!(list(None).await?, [StreamId::new("long")?], "parts are in no list of jobs");
    assert_eq!(list(Some("long")).await?.len(), parts.len());
    let progress = checker::read(&fleet.js(), "ASR_PARTIAL", "asr.v1.transcript.job.long.partial").await?;
    let last: Value = serde_json::from_slice(&progress.last().context("its progress")?.payload)?;
    assert_eq!(last["progress"]["total_ms"], 150_000, "{last}");
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_worker_with_one_slot_gets_two_long_recordings_done() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = fleet(1, 60.0).start().await?;
    let nats = connect(&fleet).await?;
    let (one, other) = (recording(), audio::bursts(18, 100.0));
    hand_in(&nats, &fleet, "one", &one).await?;
    hand_in(&nats, &fleet, "other", &other).await?;
    for (job, pcm) in [("one", &one), ("other", &other)] {
        assert_eq!(is_whole(&nats, &fleet, job, pcm).await?, ["gpu-1"]);
        no_part_is_open(&nats, &fleet, job).await?;
    }
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_dies_in_between_no_word_is_lost_and_none_is_said_twice() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = fleet(3, 5.0).start().await?;
    let nats = connect(&fleet).await?;
    let pcm = recording();
    hand_in(&nats, &fleet, "killed", &pcm).await?;
    let parent = parent_at_once(&nats, &fleet, "killed").await?;
    let other = abroad(&nats, &fleet, "killed", parent).await?;
    fleet.workers[other].kill9()?;
    under_way(&fleet, "killed", 12).await?;
    fleet.workers[parent].kill9()?;
    let who = is_whole(&nats, &fleet, "killed", &pcm).await?;
    ensure!(who.len() == 3, "what the dead had done is used: {who:?}");
    let new = parent_at(&nats, "killed").await?;
    ensure!(new != parent && new != other, "a dead worker finished it");
    no_part_is_open(&nats, &fleet, "killed").await?;
    Ok(())
}

pub(crate) async fn parent_at_once(nats: &Nats, fleet: &Fleet, job: &str) -> Result<usize> {
    let at = eventually("its worker", PATIENCE, || async { parent_at(nats, job).await.ok() }).await;
    at.with_context(|| fleet.logs())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_the_parts_too_and_a_short_recording_does_not_wait_for_them() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = fleet(2, 4.0).start().await?;
    let nats = connect(&fleet).await?;
    let pcm = recording();
    hand_in(&nats, &fleet, "unwanted", &pcm).await?;
    let parent = parent_at_once(&nats, &fleet, "unwanted").await?;
    abroad(&nats, &fleet, "unwanted", parent).await?;
    let short = audio::bursts(5, 8.0);
    submit(&nats, &request("short", short.wav())?).await?;
    let short = ended(&nats, &fleet, "short").await?;
    ensure!(short.record.state == JobState::Done, "{:?}", short.record);
    let long: JobStatus =
        api::request(&nats, Endpoint::JobStatus, &JobQuery { job: StreamId::new("unwanted")? }, ANSWER).await?;
    assert_eq!(long.record.state, JobState::Assigned, "the short one came first");

    let _: JobStatus =
        api::request(&nats, Endpoint::JobCancel, &JobQuery { job: StreamId::new("unwanted")? }, ANSWER).await?;
    assert_eq!(ended(&nats, &fleet, "unwanted").await?.record.state, JobState::Cancelled);
    let finals = chain(&fleet, "unwanted").await?;
    assert_eq!(finals.last().map(|f| f["error"]["class"].clone()), Some("cancelled".into()));
    ensure!(finals.len() > 2, "what was done until then stands there");
    let parts = no_part_is_open(&nats, &fleet, "unwanted").await?;
    ensure!(parts.iter().any(|part| part.state == JobState::Cancelled), "{parts:#?}");
    let dead = checker::read(&fleet.js(), "ASR_DEAD", "asr.v1.dead.job.*").await?;
    ensure!(dead.is_empty(), "a cancel is no failure");
    Ok(())
}
