//! File jobs through a whole fleet: real server, dispatcher and workers, and the engine called directly beside them.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use bytes::Bytes;
use serde_json::{Value, json};
use voxfleet_audio::{Limits, decode::Decoder, entries::EntryMaker};
use voxfleet_harness::{
    audio, checker, find,
    fleet::{self, Engine, Fleet},
    process::voxfleet,
    wait::eventually,
};
use voxfleet_nats::{Nats, NatsConfig, api, subjects::Endpoint};
use voxfleet_schema::{
    audio::RawEntry,
    failure::{Failure, FailureClass},
    id::StreamId,
    job::{Inline, JobQuery, JobRequest, JobState, JobStatus, Submitted},
    session::SessionOptions,
};

use crate::{bad_input, direct};

const PATIENCE: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(10);

/// The entries a job's decoder makes of this file.
fn recording(path: &Path) -> Result<Vec<RawEntry>> {
    let limits = Limits { max_seconds: 86_400, memory_mb: 512, stall: Duration::from_secs(30) };
    let mut decoder = Decoder::open(std::fs::File::open(path)?, path.file_name().and_then(|n| n.to_str()), &limits)?;
    let mut maker = EntryMaker::default();
    let mut entries = Vec::new();
    while let Some(chunk) = decoder.next()? {
        entries.push(maker.chunk(chunk));
    }
    entries.push(maker.end());
    Ok(entries)
}

pub(crate) async fn connect(fleet: &Fleet) -> Result<Nats> {
    Ok(Nats::connect(&NatsConfig { urls: fleet.urls(), ..NatsConfig::default() }, "test").await?)
}

pub(crate) fn request(job: &str, data: Vec<u8>) -> Result<JobRequest> {
    Ok(JobRequest {
        job: Some(StreamId::new(job)?),
        audio: None,
        data: Some(Inline(data.into())),
        name: None,
        options: SessionOptions::default(),
        result_ttl_s: None,
        part: None,
    })
}

pub(crate) async fn submit(nats: &Nats, request: &JobRequest) -> Result<Submitted> {
    Ok(api::request(nats, Endpoint::JobSubmit, request, ANSWER).await?)
}

async fn status(nats: &Nats, job: &str) -> Result<JobStatus> {
    Ok(api::request(nats, Endpoint::JobStatus, &JobQuery { job: StreamId::new(job)? }, ANSWER).await?)
}

/// Waits until the job has ended, whichever way.
pub(crate) async fn ended(nats: &Nats, fleet: &Fleet, job: &str) -> Result<JobStatus> {
    let done = eventually("the job's end", PATIENCE, || async {
        status(nats, job).await.ok().filter(|s| s.record.state.has_ended())
    })
    .await;
    done.with_context(|| fleet.logs())
}

/// The chain, as a plain client reads it, checked link by link: nothing missing, nothing twice.
pub(crate) async fn chain(fleet: &Fleet, job: &str) -> Result<Vec<Value>> {
    let read = checker::read(&fleet.js(), "ASR_TRANSCRIPT", &format!("asr.v1.transcript.job.{job}.final")).await?;
    let finals: Vec<Value> = read.iter().map(|m| serde_json::from_slice(&m.payload)).collect::<Result<_, _>>()?;
    let mut at = 0;
    for (n, value) in finals.iter().enumerate() {
        ensure!(value["index"] == n, "index {} at place {n}", value["index"]);
        ensure!(value["from_sample"] == at, "final {n} starts at {}, not at {at}", value["from_sample"]);
        at = value["to_sample"].as_u64().context("to_sample")?;
        let end = value["end"].as_bool().unwrap_or(false);
        ensure!(end == (n + 1 == finals.len()), "final {n} of {} with end {end}", finals.len());
    }
    Ok(finals)
}

/// The aggregate that the chain's end names, by plain object store.
pub(crate) async fn aggregate(fleet: &Fleet, finals: &[Value]) -> Result<Value> {
    let url = finals.last().and_then(|f| f["result"].as_str()).context("the end final names no result")?;
    let key = url.strip_prefix("object://asr_media/").context("another store")?;
    let store = fleet.js().get_object_store("asr_media").await?;
    let mut object = store.get(key).await?;
    let mut bytes = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut object, &mut bytes).await?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_says_what_the_engine_says_alone() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(2).engine(Engine::Micro).start().await?;
    let nats = connect(&fleet).await?;
    let mut recognizer = direct::micro()?;
    let vad = direct::best_vad();
    for call in [2, 4] {
        let path = find::root().join(format!("tests/audio/call-{call:02}.flac"));
        let job = format!("call-{call}");
        submit(&nats, &request(&job, std::fs::read(&path)?)?).await?;
        let ended = ended(&nats, &fleet, &job).await?;
        ensure!(ended.record.state == JobState::Done, "{:?}\n{}", ended.record, fleet.logs());
        let finals = chain(&fleet, &job).await?;
        let result = aggregate(&fleet, &finals).await?;
        let alone = direct::transcribe(&mut *recognizer, &*vad, &SessionOptions::default(), &recording(&path)?)?;
        let text = result["full_text"].as_str().context("text")?;
        assert_eq!(text, direct::text(&alone), "call {call}");
        assert_eq!(finals.len(), alone.len(), "the same boundaries");
        let rate = audio::word_error_rate(&audio::call_text(call)?, text);
        ensure!(rate <= 0.02, "call {call}: word error rate {rate:.4}\n{text}");

        let seconds = audio::call(call)?.seconds();
        let duration = result["duration"].as_f64().context("duration")?;
        ensure!((duration - seconds).abs() < 0.01, "duration {duration}, the recording has {seconds} s");
        let words: usize = result["aligned_segments"]
            .as_array()
            .context("aligned")?
            .iter()
            .map(|s| s["words"].as_array().map_or(0, Vec::len))
            .sum();
        assert_eq!(words, text.split_whitespace().count(), "each word has its time");
        assert_eq!(result["provider"], "local");
        assert_eq!(result["speaker_turns"], json!([]));
        let metrics = &result["performance_metrics"];
        ensure!(metrics["realtime_factor"].as_f64().is_some_and(|f| f > 0.0 && f < 1.0), "{metrics}");
        assert_eq!(ended.record.result.as_deref(), finals.last().and_then(|f| f["result"].as_str()));
    }
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_knows_only_nats_pub_gets_a_result() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let pcm = audio::bursts(7, 20.0);
    let body = json!({ "data": base64::engine::general_purpose::STANDARD.encode(pcm.wav()) });
    fleet.js().publish("asr.v1.jobs.high.by-hand", Bytes::from(body.to_string())).await?.await?;
    let done = eventually("the event", PATIENCE, || async {
        checker::read(&fleet.js(), "ASR_EVENT", "asr.v1.event.job.by-hand.done").await.ok()?.pop()
    })
    .await
    .with_context(|| fleet.logs())?;
    let event: Value = serde_json::from_slice(&done.payload)?;
    let finals = chain(&fleet, "by-hand").await?;
    let result = aggregate(&fleet, &finals).await?;
    assert_eq!(result["full_text"], direct::simulated_text(&pcm)?);
    ensure!(event["detail"]["result"].as_str().is_some(), "the event names the result: {event}");
    Ok(())
}

/// A recording that takes the simulated engine about ten seconds at 20 x.
async fn long_job(nats: &Nats, fleet: &Fleet, job: &str) -> Result<String> {
    let pcm = audio::bursts(11, 200.0);
    let text = direct::simulated_text(&pcm)?;
    let mut wav = pcm.wav();
    // By the object store: it is over the limit for inline recordings.
    let store = fleet.js().get_object_store("asr_media").await?;
    store.put(format!("upload/{job}").as_str(), &mut wav.as_slice()).await?;
    wav.clear();
    let request =
        JobRequest { audio: Some(format!("object://asr_media/upload/{job}")), data: None, ..request(job, wav)? };
    submit(nats, &request).await?;
    Ok(text)
}

/// Waits until at least `n` finals stand and the job has not ended.
pub(crate) async fn under_way(fleet: &Fleet, job: &str, n: usize) -> Result<()> {
    let subject = format!("asr.v1.transcript.job.{job}.final");
    eventually("finals", PATIENCE, || async {
        let finals = checker::read(&fleet.js(), "ASR_TRANSCRIPT", &subject).await.ok()?;
        (finals.len() >= n).then_some(())
    })
    .await
    .with_context(|| fleet.logs())
}

fn slow() -> Engine {
    Engine::Simulated { speed: 20.0 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_its_engine_and_its_worker() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).engine(slow()).start().await?;
    let nats = connect(&fleet).await?;
    let text = long_job(&nats, &fleet, "moved").await?;
    under_way(&fleet, "moved", 3).await?;
    let owner = status(&nats, "moved").await?.record.worker.context("nobody has it")?;
    let at = usize::from(owner.gpu_id.as_str() == "gpu-2");
    let engine = fleet.workers[at].engine_pid().context("no engine")?;
    nix_kill(engine)?;
    let before = chain_len(&fleet, "moved").await?;
    under_way(&fleet, "moved", before + 3).await?;
    fleet.workers[at].kill9()?;
    let ended = ended(&nats, &fleet, "moved").await?;
    ensure!(ended.record.state == JobState::Done, "{:?}\n{}", ended.record, fleet.logs());
    ensure!(ended.record.worker != Some(owner), "the dead worker finished it");
    let finals = chain(&fleet, "moved").await?;
    assert_eq!(aggregate(&fleet, &finals).await?["full_text"], text, "the move changed no word");
    Ok(())
}

async fn chain_len(fleet: &Fleet, job: &str) -> Result<usize> {
    Ok(checker::read(&fleet.js(), "ASR_TRANSCRIPT", &format!("asr.v1.transcript.job.{job}.final")).await?.len())
}

fn nix_kill(pid: u32) -> Result<()> {
    let killed = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status()?;
    ensure!(killed.success(), "kill: {killed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_ends_its_chain_and_frees_its_slot() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).engine(slow()).start().await?;
    let nats = connect(&fleet).await?;
    long_job(&nats, &fleet, "unwanted").await?;
    let text = long_job(&nats, &fleet, "next").await?;
    under_way(&fleet, "unwanted", 2).await?;
    let query = JobQuery { job: StreamId::new("unwanted")? };
    for _ in 0..2 {
        // Twice: the second answer is how it stands.
        let _: JobStatus = api::request(&nats, Endpoint::JobCancel, &query, ANSWER).await?;
    }
    let cancelled = ended(&nats, &fleet, "unwanted").await?;
    assert_eq!(cancelled.record.state, JobState::Cancelled);
    let finals = chain(&fleet, "unwanted").await?;
    let error = finals.last().map(|f| f["error"]["class"].clone());
    assert_eq!(error, Some(json!("cancelled")), "whoever follows the chain sees its end");
    let next = ended(&nats, &fleet, "next").await?;
    ensure!(next.record.state == JobState::Done, "{:?}", next.record);
    let finals = chain(&fleet, "next").await?;
    assert_eq!(aggregate(&fleet, &finals).await?["full_text"], text);
    Ok(())
}

/// The figures in the result of a recording.
async fn figures(nats: &Nats, fleet: &Fleet, job: &str) -> Result<Value> {
    submit(nats, &request(job, audio::bursts(91, 60.0).wav())?).await?;
    let ended = ended(nats, fleet, job).await?;
    ensure!(ended.record.state == JobState::Done, "{:?}\n{}", ended.record, fleet.logs());
    let result = aggregate(fleet, &chain(fleet, job).await?).await?;
    assert_eq!(result["provider"], "runpod", "{result:#}");
    Ok(result["performance_metrics"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_tells_its_own_memory_and_what_it_cost_on_a_rented_machine() -> Result<()> {
    let _turn = fleet::turn().await;
    let rented = Fleet::builder().workers(1).engine(slow()).worker_env("RUNPOD_POD_ID", "pod-1");
    let priced = rented.set("worker.price_per_hour", 0.5).set("worker.simulated.load_ms", 500);
    let fleet = priced.set("worker.simulated.weights_mb", 200).start().await?;
    let nats = connect(&fleet).await?;
    let mb = |metrics: &Value, stage: &str| metrics["stages"][stage].as_f64();
    let loading = figures(&nats, &fleet, "loading").await?;
    let (before, after) = (mb(&loading, "load_before_mb"), mb(&loading, "load_after_mb"));
    ensure!(before.zip(after).is_some_and(|(before, after)| after >= before + 150.0), "200 MB more: {loading:#}");
    for metrics in [&loading, &figures(&nats, &fleet, "warm").await?] {
        let whole = mb(metrics, "transcribe_after_mb").context("memory of the decoding")?;
        ensure!(whole >= 200.0 && mb(metrics, "transcribe_before_mb").is_some(), "{metrics:#}");
        let (times, cost) = (metrics["times_real_time"].as_f64(), metrics["cost_per_audio_hour"].as_f64());
        let (times, cost) = times.zip(cost).context("a speed and a cost")?;
        ensure!(times > 1.0 && (cost * times - 0.5).abs() < 1e-6, "{cost} at {times} x real time: {metrics:#}");
        let is_first = std::ptr::eq(metrics, &loading);
        ensure!(mb(metrics, "load_after_mb").is_some() == is_first, "the first alone has loaded: {metrics:#}");
    }

    let mut status = voxfleet(fleet.settings(), fleet.dir())?;
    status.args(["status", "--json"]);
    let output = tokio::task::spawn_blocking(move || status.output()).await??;
    let status: Value = serde_json::from_slice(&output.stdout)?;
    let heartbeat = &status["workers"][0]["heartbeat"];
    ensure!((&heartbeat["provider"], &heartbeat["price_per_hour"]) == (&json!("runpod"), &json!(0.5)), "{status:#}");
    ensure!(status["workers"][0]["cost_per_audio_hour"].is_f64(), "{status:#}");
    Ok(())
}

/// What becomes of a recording that is none.
async fn refused(nats: &Nats, fleet: &Fleet, job: &str, data: Vec<u8>) -> Result<Failure> {
    submit(nats, &request(job, data)?).await?;
    let ended = ended(nats, fleet, job).await?;
    ensure!(ended.record.state == JobState::Failed, "{job}: {:?}", ended.record);
    let finals = chain(fleet, job).await?;
    let failure = ended.record.error.context("a failure")?;
    let said = finals.last().map(|f| f["error"]["class"].clone());
    assert_eq!(said, Some(json!(failure.class.as_str())), "{job}: the chain says the same");
    ensure!(ended.record.attempts == 1, "{job}: tried {} times", ended.record.attempts);
    let dead = checker::read(&fleet.js(), "ASR_DEAD", &format!("asr.v1.dead.job.{job}")).await?;
    ensure!(dead.len() == 1, "{job}: {} dead letters", dead.len());
    Ok(failure)
}

/// One after another.
async fn bad_ones(nats: &Nats, fleet: &Fleet, wav: &[u8]) -> Result<()> {
    let mut claims_more = wav.to_vec();
    claims_more[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    claims_more[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
    let cases: [(&str, Vec<u8>, FailureClass); 4] = [
        (
            "noise",
            (0..60_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect(),
            FailureClass::BadAudio,
        ),
        ("text", b"this is a letter, not a call\n".repeat(200), FailureClass::UnsupportedFormat),
        ("one-byte", vec![0], FailureClass::BadAudio),
        ("header-only", wav[..44].to_vec(), FailureClass::BadAudio),
    ];
    for (job, data, class) in cases {
        let failure = refused(nats, fleet, job, data).await?;
        ensure!(failure.class == class, "{job}: {failure}");
        ensure!(failure.message.len() > 15, "{job}: {failure}");
    }
    let missing = JobRequest {
        audio: Some("object://asr_media/not/there.wav".to_owned()),
        data: None,
        ..request("missing", Vec::new())?
    };
    submit(nats, &missing).await?;
    let ended_missing = ended(nats, fleet, "missing").await?;
    assert_eq!(ended_missing.record.error.map(|e| e.class), Some(FailureClass::NotFound));
    let forbidden =
        JobRequest { audio: Some("file:///etc/passwd".to_owned()), data: None, ..request("forbidden", Vec::new())? };
    submit(nats, &forbidden).await?;
    let ended_forbidden = ended(nats, fleet, "forbidden").await?;
    assert_eq!(ended_forbidden.record.error.map(|e| e.class), Some(FailureClass::Forbidden));

    // A header that claims 4 GiB is not believed; what is there is transcribed.
    submit(nats, &request("claims-more", claims_more)?).await?;
    let ended_more = ended(nats, fleet, "claims-more").await?;
    ensure!(ended_more.record.state == JobState::Done, "{:?}", ended_more.record);
    let silence = audio::silence(12.0).wav();
    submit(nats, &request("silence", silence)?).await?;
    let ended_silence = ended(nats, fleet, "silence").await?;
    ensure!(ended_silence.record.state == JobState::Done, "{:?}", ended_silence.record);
    let finals = chain(fleet, "silence").await?;
    assert_eq!(aggregate(fleet, &finals).await?["full_text"], "");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn recordings_that_are_none_fail_with_a_reason_and_hurt_nobody() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(1).start().await?;
    let nats = connect(&fleet).await?;
    let wav = audio::bursts(3, 5.0).wav();
    let bad = bad_ones(&nats, &fleet, &wav);
    let (late, outcome) = tokio::join!(bad_input::healthy(fleet.js(), "healthy", 12.0), bad);
    outcome.with_context(|| fleet.logs())?;
    let late = late.with_context(|| fleet.logs())?;
    ensure!(late < Duration::from_secs(8), "the live session's end came {late:?} late");
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_the_model_cannot_do_fails_instead_of_ending_empty() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).engine(Engine::MicroEnergy).start().await?;
    let nats = connect(&fleet).await?;
    let mut pcm = audio::call(2)?;
    pcm.samples.truncate(16_000 * 6);
    // Silence at the end: the end final itself has nothing to decode, so nothing is wrong with it.
    pcm.samples.extend(audio::silence(4.0).samples);
    let options = SessionOptions { language: Some("de".to_owned()), ..SessionOptions::default() };
    submit(&nats, &JobRequest { options, ..request("german", pcm.wav())? }).await?;
    let ended = ended(&nats, &fleet, "german").await?;
    assert_eq!(ended.record.state, JobState::Failed, "{:?}", ended.record);
    let failure = ended.record.error.context("a failure")?;
    assert_eq!(failure.class, FailureClass::BadRequest, "{failure}");
    ensure!(failure.message.contains("de"), "{failure}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_none_is_told_so() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let nats = connect(&fleet).await?;
    let refusal = |body: Value| {
        let nats = &nats;
        async move {
            let answer: Result<Value, _> = api::request(nats, Endpoint::JobSubmit, &body, ANSWER).await;
            match answer {
                Err(api::ApiError::Refused(failure)) => Ok(failure),
                other => anyhow::bail!("{body}: {other:?}"),
            }
        }
    };
    for body in [
        json!({}),
        json!({"job": "a.b", "data": "aGk="}),
        json!({"job": "x"}),
        json!({"job": "x", "audio": "ftp://host/a"}),
        json!({"job": "x", "audio": "https://h/a", "data": "aGk="}),
        json!({"job": "x", "data": "aGk=", "options": {"model": "../etc"}}),
        json!({"job": "x", "data": "aGk=", "option": {}}),
        json!([1, 2]),
    ] {
        let failure = refusal(body.clone()).await?;
        assert_eq!(failure.class, FailureClass::BadRequest, "{body}: {failure}");
    }
    let unknown: Result<JobStatus, _> =
        api::request(&nats, Endpoint::JobStatus, &json!({"job": "nobody"}), ANSWER).await;
    ensure!(matches!(&unknown, Err(api::ApiError::Refused(f)) if f.class == FailureClass::NotFound), "{unknown:?}");
    Ok(())
}
