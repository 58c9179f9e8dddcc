//! Who spoke when, and who said which word, on recordings whose speakers are known.
//!
//! Each set goes through the engine's own stream and listener as a file job does (detector, boundaries of finals, voices,
//! labels), called directly. `synth_stream` scores the labels as they are first shown; every other set what stands at the
//! end, revisions included. Errors are time in the wrong place per time in the reference: no collar, overlap is scored.
//!
//! | set | is |
//! |---|---|
//! | `synth_offline`, `synth_stream` | our five synthetic calls, with the small Whisper model for their words |
//! | `sample` | pyannote's sample, 30 s |
//! | `ami30`, `ami30_oracle` | far-field AMI, ten clips of 30 s; `oracle`: the number of speakers is given |
//! | `digits` | people who say digits in turns |
//! | `segmentation`, `segmentation_pooled` | the segmentation network alone, on the sample; on the sample and `ami30` |
//! | `vbx` | clustering alone, on the x-vectors that VBx's authors give, scored as they do it |
//!
//! `realtime_factor` is the time in features, networks and clustering; `realtime_factor_whole`, where words are not asked for,
//! has the voice detector and the stream as well. Sets whose recordings are not here are named under `skipped`.
//!
//! | module | does |
//! |---|---|
//! | [`sets`] | the recordings |
//! | [`segmentation`], [`vbx`] | one part alone |
//! | [`peers`] | what a user would take instead, over the same recordings |
//! | [`hour`] | an hour of one live session: what grows |

mod hour;
mod peers;
mod segmentation;
mod sets;
mod vbx;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context as _, Result, anyhow};
use serde_json::{Value, json};
use voxfleet_eval::{
    Turn,
    der::{self, Der},
    wder::{self, Spoken, Wder},
};
use voxfleet_harness::{find, fleet};
use voxfleet_schema::session::{Diarize, SessionOptions};
use voxfleet_worker::{
    engine::{
        Recognizer,
        diarize::{DiarizeConfig, Listener, reconsidered},
        direct::transcribe_with_speakers,
        simulated::SimulatedModel,
        vad::{self, VadFactory},
        whisper::WhisperModel,
    },
    ipc::{FinalDraft, SimulatedConfig, StartPoint},
};

use self::sets::Recording;
use super::{progress, rounded};

const MICRO: &str = "micro.en-q8_0";
const SEGMENTATION: &str = "models/pyannote-segmentation-3.0.fp32.onnx";

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench diarize
  voxfleet bench diarize --without-segmentation --json
  voxfleet bench diarize --peers --python venv/bin/python --json
  voxfleet bench diarize --hour
  VOXFLEET_TEST_DATA=/data voxfleet bench diarize --only ami30 --only digits

The segmentation network is VOXFLEET_TEST_DATA/models/pyannote-segmentation-3.0.fp32.onnx unless one is named.")]
pub(crate) struct DiarizeArgs {
    /// Only these sets
    #[arg(long = "only", value_name = "NAME")]
    sets: Vec<String>,
    /// Another segmentation network
    #[arg(long, value_name = "FILE")]
    segmentation: Option<PathBuf>,
    /// Tell voices apart by where they change
    #[arg(long, conflicts_with = "segmentation")]
    without_segmentation: bool,
    /// Another speaker encoder than ours
    #[arg(long, value_name = "FILE")]
    encoder: Option<PathBuf>,
    /// Cosine distance of that encoder beyond which somebody else speaks, in hundredths [default: 60, which suits ours]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(5..=150))]
    distance_percent: Option<u16>,
    #[command(flatten)]
    peers: peers::PeerArgs,
    /// Nothing of that, but what grows in an hour of one live session with ever new people
    #[arg(long, conflicts_with_all = ["sets", "peers"])]
    hour: bool,
    #[command(flatten)]
    long: hour::HourArgs,
}

/// Networks and libraries that are here.
struct Found {
    config: DiarizeConfig,
    library: Option<PathBuf>,
    silero: Option<PathBuf>,
}

impl Found {
    fn new(args: &DiarizeArgs) -> Self {
        let there = |path: PathBuf| path.is_file().then_some(path);
        let library = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from).and_then(there);
        let library = library.or_else(|| there(find::cache().join("lib/libonnxruntime.so")));
        let segmentation = args.segmentation.clone().or_else(|| there(sets::data().join(SEGMENTATION)));
        let segmentation = segmentation.filter(|_| !args.without_segmentation);
        let (encoder, distance_percent) = (args.encoder.clone(), args.distance_percent);
        let config = DiarizeConfig { segmentation, encoder, distance_percent, ..DiarizeConfig::default() };
        Self { config, library, silero: there(find::cache().join("models/silero_vad.onnx")) }
    }
}

/// What everything is heard with.
struct Rig {
    listener: Listener,
    detector: std::sync::Arc<dyn VadFactory>,
    words: Box<dyn Recognizer>,
    no_words: Box<dyn Recognizer>,
}

impl Rig {
    fn new(found: &Found) -> Result<Self> {
        let library = found.library.as_deref();
        let listener = Listener::open(&found.config, library).map_err(|why| anyhow!("{why}"))?;
        let detector = vad::best_available(found.silero.as_deref(), library).0;
        let micro = fleet::models_dir().join(format!("{MICRO}.bin"));
        let words = Box::new(WhisperModel::load(MICRO, &micro, false, 1)?.state()?);
        let none = SimulatedConfig { speed: 0.0, ..SimulatedConfig::default() };
        let no_words = Box::new(SimulatedModel::load("simulated", &none)?.state()?);
        Ok(Self { listener, detector, words, no_words })
    }

    fn hear(&mut self, recording: &Recording, options: &SessionOptions) -> Result<Vec<FinalDraft>> {
        let recognizer = if recording.words.is_empty() { &mut self.no_words } else { &mut self.words };
        let (log, start) = (recording.log(), StartPoint::beginning());
        let listener = Some(&mut self.listener);
        transcribe_with_speakers(&log, options, start, &mut **recognizer, &*self.detector, listener, None)
            .with_context(|| recording.name.clone())
    }
}

/// Sums over the recordings of a set.
#[derive(Default)]
struct Row {
    der: Der,
    wder: Wder,
    audio_s: f64,
    listened_s: f64,
    /// From the first sample to the last label.
    whole_s: f64,
    /// Off by so many, summed.
    miscounted: usize,
    recordings: usize,
}

impl Row {
    fn add(&mut self, recording: &Recording, finals: &[FinalDraft], whole_s: f64) {
        let turns: Vec<Turn> = finals.iter().flat_map(|f| &f.turns).map(turn).collect();
        let listened_s = finals.iter().map(|f| f.timings.diarize_ms as f64 / 1_000.0).sum::<f64>();
        self.add_turns(recording, &turns, listened_s);
        self.whole_s += whole_s;
        let words = finals.iter().flat_map(|f| &f.segments).flat_map(|s| &s.words);
        let words: Vec<Spoken> =
            words.map(|w| Spoken { word: w.text.to_lowercase(), speaker: w.speaker.clone() }).collect();
        if !recording.words.is_empty() {
            self.wder += wder::score(&recording.words, &words);
        }
    }

    fn add_turns(&mut self, recording: &Recording, turns: &[Turn], listened_s: f64) {
        let heard = turns.iter().map(|t| t.speaker.as_str()).collect::<std::collections::BTreeSet<_>>().len();
        self.der += der::score(&recording.turns, turns, &der::Options::default());
        self.audio_s += recording.seconds();
        self.listened_s += listened_s;
        self.miscounted += heard.abs_diff(recording.speakers());
        self.recordings += 1;
    }

    fn object(&self, set: &str) -> Value {
        let share = |seconds: f64| rounded(seconds / self.der.total_s.max(f64::MIN_POSITIVE));
        let words = self.wder.pairs > 0;
        let factor = |seconds: f64| rounded(seconds / self.audio_s.max(f64::MIN_POSITIVE));
        json!({
            "set": set,
            "der": rounded(self.der.rate()),
            "wer": words.then(|| rounded(self.wder.edits.rate())),
            "wder": words.then(|| rounded(self.wder.rate())),
            "confusion": share(self.der.confusion_s),
            "missed": share(self.der.missed_s),
            "false_alarm": share(self.der.false_alarm_s),
            "miscounted_speakers": self.miscounted,
            "recordings": self.recordings,
            "audio_s": rounded(self.audio_s),
            "realtime_factor": factor(self.listened_s),
            "realtime_factor_whole": (!words && self.whole_s > 0.0).then(|| factor(self.whole_s)),
        })
    }
}

fn turn(turn: &voxfleet_schema::transcript::Turn) -> Turn {
    let seconds = |ms: u64| ms as f64 / 1_000.0;
    Turn { start_s: seconds(turn.start_ms), end_s: seconds(turn.end_ms), speaker: turn.speaker.clone() }
}

/// Names of the sets, in the order in which they are told.
const SETS: [&str; 9] = [
    "synth_offline",
    "synth_stream",
    "sample",
    "ami30",
    "ami30_oracle",
    "digits",
    "segmentation",
    "segmentation_pooled",
    "vbx",
];

/// Those that a peer hears as well: whole recordings, with labels as they stand at the end.
const WITH_PEERS: [&str; 5] = ["synth_offline", "sample", "ami30", "ami30_oracle", "digits"];

fn recordings_of(set: &str) -> Result<Vec<Recording>> {
    match set {
        "synth_offline" | "synth_stream" => sets::synthetic(),
        "sample" | "segmentation" => sets::sample(),
        "digits" => sets::digits(),
        "segmentation_pooled" => Ok([sets::sample()?, sets::ami30()?].into_iter().flatten().collect()),
        _ => sets::ami30(),
    }
}

pub(super) async fn run(args: DiarizeArgs) -> Result<Value> {
    let unknown = args.sets.iter().find(|set| !SETS.contains(&set.as_str()));
    super::usage(unknown.is_none(), &format!("--only: the sets are {}", SETS.join(", ")))?;
    let found = Found::new(&args);
    if args.hour {
        return hour::run(&args.long, &found).await;
    }
    tokio::task::spawn_blocking(move || score(&args, &found)).await?
}

fn score(args: &DiarizeArgs, found: &Found) -> Result<Value> {
    let mut rig = Rig::new(found)?;
    let (mut rows, mut skipped) = (Vec::new(), Vec::new());
    let mut skip = |set: &str, why: &anyhow::Error| skipped.push(json!({ "set": set, "why": format!("{why:#}") }));
    let mut for_peers: Vec<(&str, Vec<Recording>)> = Vec::new();
    let (mut audio_s, mut listened_s) = (0.0, 0.0);
    for set in SETS.into_iter().filter(|set| args.sets.is_empty() || args.sets.iter().any(|s| s == set)) {
        if set == "vbx" {
            match vbx::row() {
                Ok(row) => rows.push(row),
                Err(error) => skip(set, &error),
            }
            continue;
        }
        let recordings = match recordings_of(set) {
            Ok(recordings) => recordings,
            Err(error) => {
                skip(set, &error);
                continue;
            }
        };
        progress(&format!("{set}: {} recordings", recordings.len()));
        if set.starts_with("segmentation") {
            match rig.listener.segmenter() {
                Some(segmenter) => rows.push(segmentation::row(set, &recordings, segmenter)?),
                None => skip(set, &anyhow!("there is no segmentation network")),
            }
            continue;
        }
        let mut row = Row::default();
        for recording in &recordings {
            let mut options = SessionOptions { diarize: Diarize::On, ..SessionOptions::default() };
            if set.ends_with("oracle") {
                let speakers = u16::try_from(recording.speakers()).ok();
                (options.min_speakers, options.max_speakers) = (speakers, speakers);
            }
            let begin = Instant::now();
            let finals = rig.hear(recording, &options)?;
            let finals = if set == "synth_stream" { finals } else { reconsidered(finals, &options) };
            row.add(recording, &finals, begin.elapsed().as_secs_f64());
        }
        (audio_s, listened_s) = (audio_s + row.audio_s, listened_s + row.listened_s);
        rows.push(row.object(set));
        if WITH_PEERS.contains(&set) {
            for_peers.push((set, recordings));
        }
    }
    let config = &found.config;
    let mut peers = Vec::new();
    if args.peers.wanted() {
        match peers::rows(&args.peers, config.segmentation.as_deref(), config.encoder.as_deref(), &for_peers) {
            Ok(rows) => peers = rows,
            Err(error) => skip("sherpa-onnx", &error),
        }
    }
    let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok(json!({
        "rows": rows,
        "peers": peers,
        "realtime_factor": rounded(listened_s / f64::max(audio_s, f64::MIN_POSITIVE)),
        "segmentation": config.segmentation.as_ref().and_then(name),
        "distance_percent": config.distance_percent,
        "encoder": config.encoder.as_ref().and_then(name).unwrap_or_else(|| "ours".to_owned()),
        "detector": rig.detector.kind().as_str(),
        "skipped": skipped,
    }))
}
