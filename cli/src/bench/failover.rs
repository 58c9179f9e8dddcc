//! A worker is killed in mid-word, again and again: how long until the dispatcher knows, until the first words of a new
//! owner, and whether anything was lost or said twice.
//!
//! The clock of a session runs from SIGKILL to the arrival of its first partial or final of a higher epoch that covers audio
//! logged before the kill. Counted are sessions of the killed worker that were in the middle of an utterance (a partial
//! came within the last second and a half): one in a pause would have had nothing to say anyway. The verdict's time is the
//! server's, from the stored `dead` event.
//!
//! What was said is decided from the samples (simulated engine), or against the same engine called directly on the same log
//! (`--real`): ranges alone would believe the program.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use voxfleet_harness::{
    audio::{self, Pcm},
    chaos::talk::{self, Said, Talk},
    checker, find,
    fleet::{self, Engine, Fleet},
    probe_api,
    verdict::{self, Verdict},
    wait::eventually,
};
use voxfleet_schema::{audio::RawEntry, session::SessionOptions, transcript::join_text};
use voxfleet_worker::{
    WorkerConfig,
    engine::{
        direct::transcribe_log,
        vad::{self, VadFactory},
        whisper::{WhisperModel, WhisperRecognizer},
    },
    ipc::StartPoint,
};

use super::{progress, recording, usage};
use crate::{
    demo::report::quantile,
    exit::{Exit, OrExit as _},
};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench failover --kills 100
  voxfleet bench failover --kills 100 --real --json

The exit code is 1 when anything was lost or repeated, a session did not come back, or (with --real) its text is another than
that of the same engine called directly on the same log.")]
pub(crate) struct FailoverArgs {
    /// How many workers are killed, one after the other, each started again before the next
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    kills: u32,
    /// The small Whisper model on the CPU instead of the simulated engine
    #[arg(long)]
    real: bool,
    /// Workers
    #[arg(long, default_value_t = 3, value_name = "N")]
    workers: usize,
    /// Sessions in real time; 6, with --real 3, when not told
    #[arg(long, value_name = "N")]
    sessions: Option<usize>,
    /// Leave the logs of all processes in this folder
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

const CHUNK_MS: u64 = 100;
const SECONDS: f64 = 45.0;
const SPEED: f64 = 30.0;
const PATIENCE: Duration = Duration::from_secs(60);
/// A partial younger than this means: in the middle of an utterance.
const SPEAKING: Duration = Duration::from_millis(1_500);

/// What a session was last heard to say.
#[derive(Default)]
struct Heard {
    gpu_id: String,
    epoch: u64,
    partial: Option<Instant>,
    wait: Option<Wait>,
}

/// What is waited for after a kill.
#[derive(Clone)]
struct Wait {
    killed: Instant,
    epoch: u64,
    /// Samples its log held then.
    logged: u64,
    partial_ms: Option<u64>,
    final_ms: Option<u64>,
}

impl Wait {
    fn first_ms(&self) -> Option<u64> {
        self.partial_ms.into_iter().chain(self.final_ms).min()
    }
}

type Room = Arc<Mutex<BTreeMap<String, Heard>>>;

fn locked(room: &Room) -> MutexGuard<'_, BTreeMap<String, Heard>> {
    room.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes partials and finals as they are published; ends when the connection is gone.
async fn listen(mut words: probe_api::Subscriber, room: Room) {
    while let Some(message) = words.next().await {
        let is_final = message.subject.ends_with(".final");
        let Ok(json) = serde_json::from_slice::<Value>(&message.payload) else { continue };
        let (Some(id), Some(epoch)) = (json["id"].as_str(), json["epoch"].as_u64()) else { continue };
        let mut room = locked(&room);
        let heard = room.entry(id.to_owned()).or_default();
        if let Some(wait) = &mut heard.wait
            && epoch > wait.epoch
            && json["from_sample"].as_u64().is_some_and(|from| from < wait.logged)
        {
            let ms = wait.killed.elapsed().as_millis() as u64;
            let place = if is_final { &mut wait.final_ms } else { &mut wait.partial_ms };
            place.get_or_insert(ms);
        }
        if epoch >= heard.epoch {
            heard.epoch = epoch;
            heard.gpu_id = json["gpu_id"].as_str().unwrap_or_default().to_owned();
            heard.partial = (!is_final).then(Instant::now);
        }
    }
}

/// Sessions in real time, a new one for each that ends.
struct Speakers {
    js: talk::Js,
    pcm: Option<Pcm>,
    wanted: usize,
    count: u64,
    logged: BTreeMap<String, Arc<AtomicU64>>,
    speaking: JoinSet<Said>,
    said: Vec<Said>,
}

impl Speakers {
    fn tend(&mut self) -> Result<()> {
        while let Some(said) = self.speaking.try_join_next() {
            self.said.push(said?);
        }
        while self.speaking.len() < self.wanted {
            self.count += 1;
            // They do not all pause at the same moment.
            let seconds = SECONDS + 7.0 * (self.count % 5) as f64;
            let id = format!("failover-{}", self.count);
            let talk = Talk { id: id.clone(), poison: None, seed: self.count, seconds, speed: 1.0, chunk_ms: CHUNK_MS };
            let pcm = match &self.pcm {
                None => audio::blasts(self.count, seconds),
                Some(calls) => {
                    let from = (self.count as usize * 7 * 16_000) % (calls.samples.len() / 2);
                    let to = (from + (seconds * 16_000.0) as usize).min(calls.samples.len());
                    Pcm::mono_16k(calls.samples[from..to].to_vec())
                }
            };
            let (js, logged) = (self.js.clone(), Arc::<AtomicU64>::default());
            self.logged.insert(id, Arc::clone(&logged));
            self.speaking.spawn(async move { talk::speak(js, &talk, &pcm, &logged).await });
        }
        Ok(())
    }

    fn logged(&self, id: &str) -> u64 {
        self.logged.get(id).map_or(0, |l| l.load(Ordering::Relaxed))
    }
}

/// One kill.
struct Killed {
    detection_ms: u64,
    waits: Vec<Wait>,
    never_back: Vec<String>,
}

pub(super) async fn run(args: FailoverArgs) -> Result<Value> {
    usage((2..=32).contains(&args.workers), "--workers: 2 to 32, somebody must be left")?;
    let wanted = args.sessions.unwrap_or(if args.real { 3 } else { 6 });
    usage(wanted >= 1, "--sessions: at least one must be speaking")?;
    if let Some(keep) = &args.keep {
        // Not after an hour.
        let made = std::fs::create_dir_all(keep).with_context(|| format!("--keep {}", keep.display()));
        made.or_exit(Exit::Usage)?;
    }
    let engine = if args.real { Engine::Micro } else { Engine::Simulated { speed: SPEED } };
    let mut fleet = Fleet::builder().workers(args.workers).dispatchers(2).slots(wanted as u32).engine(engine);
    if args.real {
        // A worker without a model loaded would be measured loading it.
        fleet = fleet.set("worker.preload", MICRO);
    }
    let mut fleet = fleet.start().await?;
    let room = Room::default();
    let words = probe_api::subscribe(&fleet.client(), "asr.v1.transcript.session.*.*").await?;
    let mut listener = JoinSet::new();
    listener.spawn(listen(words, Arc::clone(&room)));
    let pcm = if args.real { Some(recording::calls(&[1, 2, 4, 5], 180.0)?.pcm) } else { None };
    let mut speakers = Speakers {
        js: talk::impatient(fleet.client()),
        pcm,
        wanted,
        count: 0,
        logged: BTreeMap::new(),
        speaking: JoinSet::new(),
        said: Vec::new(),
    };
    let (mut kills, mut in_a_pause) = (Vec::new(), 0);
    while kills.len() < args.kills as usize {
        let killed = kill_one(&mut fleet, &room, &mut speakers).await.with_context(|| fleet.logs())?;
        // An utterance may end between the look and the kill: then nobody waited, and nothing was measured.
        if killed.waits.is_empty() && killed.never_back.is_empty() {
            in_a_pause += 1;
            ensure!(in_a_pause <= 10 + args.kills / 2, "{in_a_pause} kills met nobody in mid-word");
            continue;
        }
        let firsts: Vec<u64> = killed.waits.iter().filter_map(Wait::first_ms).collect();
        let n = kills.len() + 1;
        progress(&format!(
            "kill {n} of {}: verdict after {} ms, words again after {firsts:?} ms",
            args.kills, killed.detection_ms
        ));
        kills.push(killed);
    }
    if let Some(keep) = &args.keep {
        fleet.keep_logs(keep)?;
    }
    speakers.wanted = 0;
    let until = Instant::now() + Duration::from_secs_f64(SECONDS * 2.0) + PATIENCE;
    while !speakers.speaking.is_empty() {
        ensure!(Instant::now() < until, "sessions are still speaking");
        speakers.tend()?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut sum = judged(&fleet, &speakers.said, args.real).await?;
    sum.in_a_pause = in_a_pause;
    Ok(shown(&args, &kills, speakers.said.len(), &sum))
}

const MICRO: &str = "micro.en-q8_0";

/// Waits for somebody in the middle of an utterance, kills who hears him, and waits for words of a new owner.
async fn kill_one(fleet: &mut Fleet, room: &Room, speakers: &mut Speakers) -> Result<Killed> {
    let deadline = Instant::now() + PATIENCE;
    let (gpu_id, i) = loop {
        ensure!(Instant::now() < deadline, "nobody speaks, or the workers are not all back");
        speakers.tend()?;
        tokio::time::sleep(Duration::from_millis(20)).await;
        if !all_alive(fleet).await {
            continue;
        }
        let speaking = locked(room)
            .iter()
            .filter(|(id, h)| !ended(speakers, id) && h.partial.is_some_and(|p| p.elapsed() < SPEAKING / 2))
            .map(|(_, h)| h.gpu_id.clone())
            .next();
        let index = |gpu: &String| fleet.workers.iter().position(|w| w.gpu_id() == gpu);
        if let Some((gpu, i)) = speaking.and_then(|gpu| index(&gpu).map(|i| (gpu, i))) {
            break (gpu, i);
        }
    };
    let killed_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
    fleet.workers[i].kill9()?;
    let killed = Instant::now();
    for (id, heard) in locked(room).iter_mut() {
        let speaks = heard.gpu_id == gpu_id && heard.partial.is_some_and(|p| p.elapsed() < SPEAKING);
        heard.wait = (speaks && !ended(speakers, id)).then(|| Wait {
            killed,
            epoch: heard.epoch,
            logged: speakers.logged(id),
            partial_ms: None,
            final_ms: None,
        });
    }
    // The first words count, the first final is waited for only as long as an utterance lasts.
    let (words_by, finals_by) = (killed + Duration::from_secs(30), killed + Duration::from_secs(12));
    loop {
        speakers.tend()?;
        tokio::time::sleep(Duration::from_millis(10)).await;
        let now = Instant::now();
        let waiting =
            |w: &Wait| (w.first_ms().is_none() && now < words_by) || (w.final_ms.is_none() && now < finals_by);
        if !locked(room).values().filter_map(|h| h.wait.as_ref()).any(waiting) {
            break;
        }
    }
    let subject = format!("asr.v1.event.fleet.{gpu_id}.dead");
    let js = fleet.js();
    let told = eventually("the verdict's event", PATIENCE, || async {
        checker::stored_ms(&js, "ASR_EVENT", &subject).await.filter(|stored| *stored >= killed_ms)
    });
    let detection_ms = told.await? - killed_ms;
    fleet.restart_worker(i)?;
    let (mut waits, mut never_back) = (Vec::new(), Vec::new());
    for (id, heard) in locked(room).iter_mut() {
        match heard.wait.take() {
            Some(wait) if wait.first_ms().is_none() => never_back.push(id.clone()),
            Some(wait) => waits.push(wait),
            None => {}
        }
    }
    Ok(Killed { detection_ms, waits, never_back })
}

/// Whether all that it had to say is in the log.
fn ended(speakers: &Speakers, id: &str) -> bool {
    speakers.said.iter().any(|s| s.id == id) || !speakers.logged.contains_key(id)
}

async fn all_alive(fleet: &Fleet) -> bool {
    let Some(status) = probe_api::fleet_status(&fleet.client()).await else { return false };
    let ready = |w: &&Value| w["health"] == "alive" && w["heartbeat"]["engine"]["state"] != "starting";
    status["workers"].as_array().is_some_and(|all| all.iter().filter(ready).count() == fleet.workers.len())
}

/// What became of all sessions together.
#[derive(Default)]
struct Sum {
    samples_lost: u64,
    finals_repeated: u64,
    clicks: u64,
    /// Sessions whose text is that of the engine called directly; none with the simulated one, whose samples decide.
    texts_equal: Option<u64>,
    in_a_pause: u32,
    problems: Vec<String>,
}

async fn judged(fleet: &Fleet, said: &[Said], real: bool) -> Result<Sum> {
    let js = fleet.js();
    let mut sum = Sum { texts_equal: real.then_some(0), ..Sum::default() };
    let mut direct = None;
    if real {
        progress("the same logs, the same engine called directly");
        direct = Some(tokio::task::spawn_blocking(Direct::load).await??);
    }
    for said in said {
        if let Some(why) = &said.gave_up {
            bail!("the producer of {} gave up: {why}", said.id);
        }
        let heard = fleet::wait_end(&js, &said.id, PATIENCE).await?;
        let verdict: Verdict = match direct.take() {
            None => verdict::session(&js, &said.id, &said.samples).await?,
            Some(mut engine) => {
                let log = log_of(&js, &said.id).await?;
                let alone = tokio::task::spawn_blocking(move || engine.text_of(&log).map(|text| (engine, text)));
                let (engine, alone) = alone.await??;
                direct = Some(engine);
                match different(&heard, &alone) {
                    None => sum.texts_equal = sum.texts_equal.map(|n| n + 1),
                    Some(how) => sum.problems.push(format!("{}: {how}", said.id)),
                }
                verdict::session_by_ranges(&js, &said.id, &said.samples).await?
            }
        };
        sum.samples_lost += verdict.samples_lost;
        sum.finals_repeated += verdict.finals_repeated;
        sum.clicks += verdict.clicks;
        sum.problems.extend(verdict.problems.iter().map(|p| format!("{}: {p}", said.id)));
    }
    Ok(sum)
}

/// The engine of the workers without a fleet around it.
struct Direct {
    state: WhisperRecognizer,
    detector: Arc<dyn VadFactory>,
}

impl Direct {
    /// Blocks.
    fn load() -> Result<Self> {
        let path = fleet::models_dir().join(format!("{MICRO}.bin"));
        // The cache in which the workers look for their detector.
        let worker = WorkerConfig { cache_dir: Some(find::cache()), ..WorkerConfig::default() };
        let (silero, library) = (worker.resolved_silero(), worker.resolved_onnxruntime());
        let detector = vad::best_available(silero.as_deref(), library.as_deref()).0;
        Ok(Self { state: WhisperModel::load(MICRO, &path, false, 1)?.state()?, detector })
    }

    /// What it makes of this log from its beginning. Blocks.
    fn text_of(&mut self, log: &[RawEntry]) -> Result<String> {
        let (options, start) = (SessionOptions::default(), StartPoint::beginning());
        let finals = transcribe_log(log, &options, start, &mut self.state, self.detector.as_ref(), None)?;
        Ok(join_text(finals.iter().flat_map(|f| f.segments.iter().map(|s| s.text.as_str()))))
    }
}

/// A session's log as it stands in the stream, pauses and end included.
async fn log_of(js: &talk::Js, session: &str) -> Result<Vec<RawEntry>> {
    let messages = checker::read(js, "ASR_AUDIO", &format!("asr.v1.audio.{session}")).await?;
    let entry = |m: checker::Message| RawEntry {
        seq: m.seq,
        headers: m.headers.into_iter().filter(|(name, _)| name.starts_with("Asr-")).collect(),
        payload: m.payload,
    };
    Ok(messages.into_iter().map(entry).collect())
}

/// Where two texts part, if they do.
fn different(heard: &str, alone: &str) -> Option<String> {
    let (heard, alone): (Vec<&str>, Vec<&str>) =
        (heard.split_whitespace().collect(), alone.split_whitespace().collect());
    if heard == alone {
        return None;
    }
    let same = heard.iter().zip(&alone).take_while(|(a, b)| a == b).count();
    let from =
        |words: &[&str]| words.iter().skip(same.saturating_sub(3)).take(9).copied().collect::<Vec<_>>().join(" ");
    Some(format!("from word {same} on the fleet heard {:?}, the engine alone {:?}", from(&heard), from(&alone)))
}

fn shown(args: &FailoverArgs, kills: &[Killed], sessions: usize, sum: &Sum) -> Value {
    let waits = || kills.iter().flat_map(|k| k.waits.iter().map(move |w| (k, w)));
    let detection: Vec<u64> = kills.iter().map(|k| k.detection_ms).collect();
    let first: Vec<u64> = waits().filter_map(|(_, w)| w.first_ms()).collect();
    let after: Vec<u64> = waits().filter_map(|(k, w)| Some(w.first_ms()?.saturating_sub(k.detection_ms))).collect();
    let partials: Vec<u64> = waits().filter_map(|(_, w)| w.partial_ms).collect();
    let finals: Vec<u64> = waits().filter_map(|(_, w)| w.final_ms).collect();
    let never_back: Vec<&String> = kills.iter().flat_map(|k| &k.never_back).collect();
    json!({
        "clean": sum.samples_lost == 0
            && sum.finals_repeated == 0
            && sum.problems.is_empty()
            && never_back.is_empty(),
        "engine": if args.real { "whisper_cpp" } else { "simulated" },
        "kills": kills.len(),
        "kills_that_met_a_pause": sum.in_a_pause,
        "workers": args.workers,
        "sessions": sessions,
        "moved_in_mid_word": first.len(),
        "detection_ms": quantile(&detection, 0.95),
        "detection_p50_ms": quantile(&detection, 0.5),
        "p50_ms": quantile(&first, 0.5),
        "p95_ms": quantile(&first, 0.95),
        "max_ms": first.iter().max(),
        "after_detection_p50_ms": quantile(&after, 0.5),
        "after_detection_p95_ms": quantile(&after, 0.95),
        "first_partial_p50_ms": quantile(&partials, 0.5),
        "first_partial_p95_ms": quantile(&partials, 0.95),
        "first_final_p50_ms": quantile(&finals, 0.5),
        "first_final_p95_ms": quantile(&finals, 0.95),
        "never_back": never_back.len(),
        "samples_lost": sum.samples_lost,
        "finals_repeated": sum.finals_repeated,
        "samples_cut_off_as_clicks": sum.clicks,
        "texts_equal": sum.texts_equal,
        "problems": sum.problems.iter().map(|p| json!({ "what": p })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_differ_where_words_do() {
        assert_eq!(different("a b  c", "a b c"), None);
        let how = different("a b c d e", "a b c e").expect("a word more");
        assert!(how.contains("word 3") && how.contains("\"a b c d e\""), "{how}");
        assert!(different("a b", "a b c").is_some() && different("", "a").is_some());
    }
}
