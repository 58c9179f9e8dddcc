//! Who said what, through a whole fleet with the real engine: live, as a recording, and with workers that are killed.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::task::JoinSet;
use voxfleet_harness::{
    audio, checker, find,
    fleet::{self, Engine, Fleet, FleetBuilder},
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_schema::session::{Diarize, SessionOptions};
use voxfleet_worker::{
    engine::{
        diarize::{DiarizeConfig, Listener, reconsidered},
        direct::transcribe_with_speakers,
    },
    ipc::{FinalDraft, StartPoint},
};

use crate::{
    direct,
    jobs_fleet::{aggregate, chain, connect, ended, request, submit},
};

const PATIENCE: Duration = Duration::from_secs(120);

/// The segmentation network of the test data.
fn segmentation() -> Option<PathBuf> {
    let data = std::env::var_os("VOXFLEET_TEST_DATA").map(PathBuf::from);
    let data = data.unwrap_or_else(|| find::root().join("../shared/data"));
    let file = data.join("models/pyannote-segmentation-3.0.fp32.onnx");
    if !file.is_file() {
        println!("skipped: segmentation, {} is not there; voices are told apart by changes", file.display());
        return None;
    }
    Some(file)
}

pub(crate) fn builder() -> FleetBuilder {
    let builder = Fleet::builder().engine(Engine::Micro);
    match segmentation() {
        Some(file) => builder.set("worker.segmentation_model", file.display()),
        None => builder,
    }
}

/// ONNX Runtime, without which nobody is told apart.
pub(crate) fn can_listen() -> Option<PathBuf> {
    let library = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
    let library = library.unwrap_or_else(|| find::cache().join("lib/libonnxruntime.so"));
    if !library.is_file() {
        println!("skipped: speakers, {} is not there", library.display());
        return None;
    }
    Some(library)
}

/// What the engine says alone, its listener beside it.
fn alone(number: u32, library: &std::path::Path) -> Result<Vec<FinalDraft>> {
    alone_of(&audio::call(number)?, library)
}

pub(crate) fn alone_of(pcm: &audio::Pcm, library: &std::path::Path) -> Result<Vec<FinalDraft>> {
    let config = DiarizeConfig { segmentation: segmentation(), encoder: None, ..DiarizeConfig::default() };
    let mut listener = Listener::open(&config, Some(library)).map_err(anyhow::Error::msg)?;
    let options = SessionOptions { diarize: Diarize::On, ..SessionOptions::default() };
    let log = direct::log(pcm, 200);
    let (mut recognizer, vad) = (direct::micro()?, direct::best_vad());
    let start = StartPoint::beginning();
    let listener = Some(&mut listener);
    Ok(transcribe_with_speakers(&log, &options, start, &mut *recognizer, &*vad, listener, None)?)
}

/// A word, its middle in ms, and who says it.
type Said = (String, u64, Option<String>);

fn words(finals: &[Value]) -> Vec<Said> {
    let segments = finals.iter().flat_map(|f| f["segments"].as_array().into_iter().flatten());
    let words = segments.flat_map(|s| s["words"].as_array().into_iter().flatten());
    let said = words.map(|w| {
        let middle = (w["start_ms"].as_u64().unwrap_or(0) + w["end_ms"].as_u64().unwrap_or(0)) / 2;
        (w["text"].as_str().unwrap_or_default().to_owned(), middle, w["speaker"].as_str().map(str::to_owned))
    });
    said.collect()
}

/// Share of words under the wrong name, a label being whoever says most under it.
fn wrong(said: &[Said], number: u32) -> Result<f64> {
    let path = find::root().join(format!("tests/audio/call-{number:02}.json"));
    let described: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let mut truth: Vec<(String, f64, f64)> = Vec::new();
    for turn in described["turns"].as_array().context("turns")? {
        for word in turn["words"].as_array().context("words")? {
            let at = |field: &str| word[field].as_f64().unwrap_or(0.0) * 1_000.0;
            truth.push((turn["speaker"].as_str().unwrap_or_default().to_owned(), at("start"), at("end")));
        }
    }
    let mut counts: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for (_, middle, speaker) in said {
        let away =
            |(_, start, end): &&(String, f64, f64)| (start - *middle as f64).max(*middle as f64 - end).max(0.0) as u64;
        let (name, ..) = truth.iter().min_by_key(away).context("a word")?;
        *counts.entry(speaker.as_deref().unwrap_or("nobody")).or_default().entry(name).or_default() += 1;
    }
    let right: usize =
        counts.iter().filter(|(l, _)| **l != "nobody").filter_map(|(_, names)| names.values().max()).sum();
    Ok(1.0 - right as f64 / said.len().max(1) as f64)
}

/// The finals of a session with their highest revisions in their places.
pub(crate) async fn revised(fleet: &Fleet, id: &str) -> Result<Vec<Value>> {
    let finals: Vec<Value> = checker::finals(&fleet.js(), id).await?.into_iter().map(|f| f.json).collect();
    revise(fleet, "session", id, finals).await
}

/// Finals of a chain with their highest revisions in their places.
pub(crate) async fn revise(fleet: &Fleet, kind: &str, id: &str, mut finals: Vec<Value>) -> Result<Vec<Value>> {
    let subject = format!("asr.v1.transcript.{kind}.{id}.revision");
    for message in checker::read(&fleet.js(), "ASR_TRANSCRIPT", &subject).await? {
        let revision: Value = serde_json::from_slice(&message.payload)?;
        let index = revision["index"].as_u64().context("index")? as usize;
        for field in ["segments", "turns", "speakers"] {
            finals[index][field] = revision[field].clone();
        }
    }
    Ok(finals)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_names_its_speakers_live_and_as_a_recording() -> Result<()> {
    if can_listen().is_none() {
        return Ok(());
    }
    let _turn = fleet::turn().await;
    let fleet = builder().workers(1).slots(2).start().await?;
    let mut producer = Producer::named(fleet.js(), "who", "s1");
    let first = [("Asr-Opt-Diarize", "true")];
    producer.stream_with(&audio::call(1)?, 200, Pace::Speed(1.5), &first).await?;
    producer.end().await?;
    fleet.wait_end("who", PATIENCE).await?;
    checker::check(&fleet.js(), "who").await?.clean()?;
    let finals = revised(&fleet, "who").await?;
    let rate = wrong(&words(&finals), 1)?;
    ensure!(rate <= 0.05, "{rate:.3} of the words under the wrong name\n{finals:#?}");
    let by = if segmentation().is_some() { "segmentation" } else { "changes" };
    for f in finals.iter().filter(|f| f["segments"].as_array().is_some_and(|s| !s.is_empty())) {
        ensure!(f["speakers"]["by"] == by && f["turns"].as_array().is_some_and(|t| !t.is_empty()), "{f:#}");
    }
    // Voice prints are nobody's business but a checkpoint's.
    ensure!(finals.iter().all(|f| f.to_string().len() < 20_000 && !f.to_string().contains("mean")), "{finals:#?}");

    let nats = connect(&fleet).await?;
    let mut job = request("who-job", std::fs::read(find::root().join("tests/audio/call-02.flac"))?)?;
    job.options = SessionOptions { diarize: Diarize::On, ..SessionOptions::default() };
    submit(&nats, &job).await?;
    let status = ended(&nats, &fleet, "who-job").await?;
    ensure!(status.record.result.is_some(), "{status:#?}\n{}", fleet.logs());
    let result = aggregate(&fleet, &chain(&fleet, "who-job").await?).await?;
    let turns = result["speaker_turns"].as_array().context("turns")?;
    let names: BTreeSet<&str> = turns.iter().filter_map(|t| t["speaker"].as_str()).collect();
    ensure!(names.len() == 2 && turns.len() >= 6, "{turns:#?}");
    let of_result = result["aligned_segments"].as_array().into_iter().flatten();
    let of_result = of_result.flat_map(|s| s["words"].as_array().into_iter().flatten()).map(|w| {
        let middle = (w["start"].as_f64().unwrap_or(0.0) + w["end"].as_f64().unwrap_or(0.0)) * 500.0;
        (w["word"].as_str().unwrap_or_default().to_owned(), middle as u64, w["speaker"].as_str().map(str::to_owned))
    });
    let of_result: Vec<Said> = of_result.collect();
    let rate = wrong(&of_result, 2)?;
    ensure!(rate <= 0.05, "{rate:.3} of the recording's words under the wrong name\n{result:#}");
    ensure!(result["performance_metrics"]["stages"]["diarize"].as_f64().is_some_and(|s| s > 0.0), "{result:#}");
    Ok(())
}

/// What a reader takes from a final, to the letter: segments, words, turns.
pub(crate) fn shown(value: &Value) -> Value {
    let pick = |value: &Value, fields: &[&str]| -> Value {
        fields.iter().map(|field| ((*field).to_owned(), value[*field].clone())).collect()
    };
    let segments = value["segments"].as_array().into_iter().flatten().map(|segment| {
        let mut shown = pick(segment, &["id", "start_ms", "end_ms", "text", "speaker"]);
        let words = segment["words"].as_array().into_iter().flatten();
        shown["words"] =
            words.map(|word| pick(word, &["text", "start_ms", "end_ms", "speaker", "overlapped_by"])).collect();
        shown
    });
    let turns = value["turns"].as_array().into_iter().flatten();
    let turns = turns.map(|turn| pick(turn, &["start_ms", "end_ms", "speaker", "voice"]));
    serde_json::json!({ "segments": segments.collect::<Vec<_>>(), "turns": turns.collect::<Vec<_>>() })
}

pub(crate) fn is_late(value: &Value) -> bool {
    value["speakers"]["late"] == true
}

/// Whoever stored the last final is killed at once, worker or engine in turn.
#[tokio::test(flavor = "multi_thread")]
async fn kills_at_every_final_change_no_label() -> Result<()> {
    hunted(0).await
}

/// The same where nobody is heard in time: each worker leaves to the next what it was listening to.
#[tokio::test(flavor = "multi_thread")]
async fn kills_at_every_final_lose_no_late_label() -> Result<()> {
    hunted(1_500).await
}

/// A call whose worker is killed at each final; speakers are known `listen_ms` later than they are heard.
async fn hunted(listen_ms: u64) -> Result<()> {
    let Some(library) = can_listen() else { return Ok(()) };
    let _turn = fleet::turn().await;
    let mut fleet = builder().workers(2).slots(1).set("worker.simulated.listen_ms", listen_ms).start().await?;
    let js = fleet.js();
    let session = "hunted";
    let mut speaking = JoinSet::new();
    speaking.spawn({
        let js = js.clone();
        async move {
            let mut producer = Producer::named(js, session, "s1");
            let first = [("Asr-Opt-Diarize", "true")];
            producer.stream_with(&audio::call(2)?, 200, Pace::Speed(4.0), &first).await?;
            producer.end().await?;
            Ok::<_, anyhow::Error>(())
        }
    });
    let mut kills = 0;
    let mut seen = 0;
    loop {
        let finals = eventually("another final", PATIENCE, || async {
            let finals = checker::finals(&js, session).await.ok()?;
            (finals.len() > seen).then_some(finals)
        });
        let finals = finals.await.with_context(|| fleet.logs())?;
        seen = finals.len();
        let Some(last) = finals.last().filter(|last| !last.is_end()) else { break };
        let at = fleet.workers.iter().position(|w| last.json["gpu_id"] == w.gpu_id()).context("the worker")?;
        match (kills % 2, fleet.workers[at].engine_pid()) {
            (1, Some(engine)) => {
                // It may have died by itself a moment ago.
                let _ = std::process::Command::new("kill").args(["-9", &engine.to_string()]).status()?;
            }
            _ => fleet.restart_worker(at)?,
        }
        kills += 1;
    }
    speaking.join_next().await.context("the producer ended")???;
    checker::check(&js, session).await?.clean()?;
    let options = SessionOptions { diarize: Diarize::On, ..SessionOptions::default() };
    let undisturbed = reconsidered(alone(2, &library)?, &options);
    let undisturbed: Vec<Value> = undisturbed.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
    let finals = checker::finals(&js, session).await?;
    let late = finals.iter().filter(|f| is_late(&f.json)).count();
    let disturbed = revised(&fleet, session).await?;
    ensure!(disturbed.len() == undisturbed.len() && kills >= 6, "{kills} kills, {} finals", disturbed.len());
    ensure!(listen_ms == 0 || late >= 3, "{late} of {} finals were late", finals.len());
    println!("{kills} kills, {late} of {} finals without their labels at first", disturbed.len());
    for (told, expected) in disturbed.iter().zip(&undisturbed) {
        ensure!(!is_late(told), "nobody answered for this one:\n{told:#}\n{}", fleet.logs());
        let speakers = (&told["speakers"]["by"], &told["speakers"]["why"]);
        ensure!(speakers == (&expected["speakers"]["by"], &expected["speakers"]["why"]), "{told:#}");
        let (told, expected) = (shown(told), shown(expected));
        ensure!(told == expected, "after {kills} kills:\n{told:#}\ninstead of\n{expected:#}\n{}", fleet.logs());
    }
    Ok(())
}

/// A call up to its first words and a second of what follows, so that nothing else comes for a while; and the rest.
fn first_words(number: u32, library: &std::path::Path) -> Result<(audio::Pcm, audio::Pcm)> {
    let spoken = alone(number, library)?.into_iter().find(|f| !f.segments.is_empty()).context("words")?;
    let mut before = audio::call(number)?;
    ensure!((before.rate_hz, before.channels) == (16_000, 1), "{} {}", before.rate_hz, before.channels);
    let rest = before.samples.split_off(spoken.to_sample as usize + 16_000);
    Ok((before, audio::Pcm::mono_16k(rest)))
}

/// What a worker had found out and did not get out is said by the next one, which hears nothing again for it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_and_not_published_is_published_by_the_next() -> Result<()> {
    let Some(library) = can_listen() else { return Ok(()) };
    let _turn = fleet::turn().await;
    let mut fleet = builder().workers(1).slots(1).set("worker.simulated.listen_ms", 1_000).start().await?;
    let js = fleet.js();
    let session = "untold";
    let subject = format!("asr.v1.transcript.session.{session}.revision");
    let mut producer = Producer::named(js.clone(), session, "s1");
    let (before, behind) = first_words(2, &library)?;
    producer.stream_with(&before, 200, Pace::Speed(20.0), &[("Asr-Opt-Diarize", "true")]).await?;
    // The flush that follows two seconds of nothing is a final, behind which it comes.
    let revision = eventually("a revision", PATIENCE, || async {
        checker::read(&js, "ASR_TRANSCRIPT", &subject).await.ok()?.pop()
    });
    let revision = revision.await.with_context(|| fleet.logs())?;
    fleet.workers[0].kill9()?;
    let finals = checker::finals(&js, session).await?;
    let of: Value = serde_json::from_slice(&revision.payload)?;
    let stood = finals.iter().filter(|f| f.seq < revision.seq).count();
    ensure!(stood == finals.len() && finals.len() == 2 && is_late(&finals[0].json), "{finals:#?}");
    // As if it had died a moment earlier; nor can anybody hear it again.
    ensure!(js.get_stream("ASR_TRANSCRIPT").await?.delete_message(revision.seq).await?);
    let resume = finals[1].json["resume"]["seq"].as_u64().context("resume")?;
    let audio = js.get_stream("ASR_AUDIO").await?;
    audio.purge().sequence(resume).filter(format!("asr.v1.audio.{session}")).await?;
    fleet.restart_worker(0)?;
    producer.stream(&behind, 200, Pace::Speed(8.0)).await?;
    producer.end().await?;
    fleet.wait_end(session, PATIENCE).await?;
    let revisions = checker::read(&js, "ASR_TRANSCRIPT", &subject).await?;
    let again: Value = serde_json::from_slice(&revisions.first().context("published again")?.payload)?;
    ensure!(shown(&again) == shown(&of) && again["index"] == of["index"], "{again:#}\ninstead of\n{of:#}");
    ensure!(again["epoch"].as_u64() > of["epoch"].as_u64(), "{again:#}");
    let next = checker::finals(&js, session).await?.into_iter().nth(2).context("another final")?;
    ensure!(revisions[0].seq < next.seq, "before anything else");
    ensure!(revised(&fleet, session).await?.iter().all(|f| !is_late(f)), "{}", fleet.logs());
    Ok(())
}

/// Audio that expired before anybody could hear it again.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_heard_again_says_why() -> Result<()> {
    let Some(library) = can_listen() else { return Ok(()) };
    let _turn = fleet::turn().await;
    // A flush would let a second final stand before the first is seen.
    let builder = builder().workers(1).slots(1).set("dispatcher.flush_after_ms", 60_000);
    let mut fleet = builder.set("worker.simulated.listen_ms", 1_500).start().await?;
    let js = fleet.js();
    let session = "expired";
    let mut producer = Producer::named(js.clone(), session, "s1");
    let (before, behind) = first_words(2, &library)?;
    let first = [("Asr-Opt-Diarize", "true")];
    producer.stream_with(&before, 200, Pace::Speed(20.0), &first).await?;
    let late = eventually("a late final", PATIENCE, || async {
        let finals = checker::finals(&js, session).await.ok()?;
        finals.into_iter().find(|f| is_late(&f.json))
    });
    let late = late.await.with_context(|| fleet.logs())?;
    fleet.workers[0].kill9()?;
    let finals = checker::finals(&js, session).await?;
    let revisions = format!("asr.v1.transcript.session.{session}.revision");
    let revisions = checker::read(&js, "ASR_TRANSCRIPT", &revisions).await?;
    ensure!(finals.last().is_some_and(|last| last.seq == late.seq) && revisions.is_empty(), "{finals:#?}");
    let stream = js.get_stream("ASR_AUDIO").await?;
    let resume = late.json["resume"]["seq"].as_u64().context("resume")?;
    stream.purge().sequence(resume).filter(format!("asr.v1.audio.{session}")).await?;
    fleet.restart_worker(0)?;
    producer.stream(&behind, 200, Pace::Speed(4.0)).await?;
    producer.end().await?;
    fleet.wait_end(session, PATIENCE).await?;
    let finals = revised(&fleet, session).await?;
    ensure!(finals.iter().all(|f| !is_late(f)), "{finals:#?}");
    let answered = &finals[late.json["index"].as_u64().context("index")? as usize];
    let why = answered["speakers"]["why"].as_str().unwrap_or_default();
    ensure!(answered["speakers"]["by"] == "none" && why.contains("its audio has expired"), "{answered:#}");
    ensure!(shown(answered) == shown(&late.json), "{answered:#}\ninstead of\n{:#}", late.json);
    let others = finals.iter().filter(|f| f["index"] != answered["index"]);
    let named = others.filter(|f| f["turns"].as_array().is_some_and(|t| !t.is_empty())).count();
    ensure!(named >= 3, "those behind it are told as ever\n{finals:#?}");
    Ok(())
}
