//! What a worker is told at its start. Read once by the command line, validated as a whole, then passed as a value.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use voxfleet_http::HttpConfig;
use voxfleet_schema::{SAMPLE_RATE_HZ, fleet::Provider, id::GpuId, session::is_model_name};
use voxfleet_store::{
    fetch::FetchConfig,
    models::{Catalog, ModelKind},
};

use crate::{
    engine::ct2,
    ipc::{Ct2Config, DiarizeConfig, EngineKind, ModelFile, SimulatedConfig, TurnsConfig},
    job::Split,
    preempt::PreemptionConfig,
    provider::{ProviderChoice, Rent},
};

/// Bytes of audio each session may always hold, in MB: four seconds of the widest format in use, two minutes of the default one,
/// and never less than one entry of the log.
pub const SESSION_SHARE_MB: u64 = 4;
/// What all sessions share beyond that, in MB.
pub const SURPLUS_MB: u64 = 64;

const MB: u64 = 1 << 20;

/// Which device the worker is pinned to: `auto`, `none`, an NVML index, or an NVML UUID.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "GpuText", into = "String")]
pub enum GpuChoice {
    /// The first GPU there is, else the CPU.
    #[default]
    Auto,
    /// The CPU, even where there is a GPU.
    None,
    Index(u32),
    Uuid(String),
}

/// TOML and the environment give an index as a number or as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum GpuText {
    Number(u32),
    Text(String),
}

impl From<GpuText> for GpuChoice {
    fn from(text: GpuText) -> Self {
        match text {
            GpuText::Number(index) => GpuChoice::Index(index),
            GpuText::Text(text) => GpuChoice::from(text.as_str()),
        }
    }
}

impl From<&str> for GpuChoice {
    fn from(text: &str) -> Self {
        match text.trim() {
            "" | "auto" => GpuChoice::Auto,
            "none" | "cpu" => GpuChoice::None,
            other => other.parse().map_or_else(|_| GpuChoice::Uuid(other.to_owned()), GpuChoice::Index),
        }
    }
}

impl From<GpuChoice> for String {
    fn from(choice: GpuChoice) -> String {
        match choice {
            GpuChoice::Auto => "auto".to_owned(),
            GpuChoice::None => "none".to_owned(),
            GpuChoice::Index(index) => index.to_string(),
            GpuChoice::Uuid(uuid) => uuid,
        }
    }
}

impl std::str::FromStr for GpuChoice {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self::from(text))
    }
}

/// How a card is shared with a tenant that is none of ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Both stay on it; what the other grows by, we do without.
    #[default]
    Resident,
    /// Turns, by `flock(2)` on `lock_file`: we decode only while we hold it.
    Sequential,
    /// Our models leave the card after each job, and when the last live session has gone.
    Swap,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// Health and figures of this process; off unless an address is given, for rented machines let nobody in.
    pub http: HttpConfig,
    pub gpu: GpuChoice,
    /// Overrides the name derived from the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_id: Option<String>,
    /// Tells workers of one host without a GPU apart.
    pub index: u32,
    /// Sessions held at once.
    pub slots: u32,
    /// Jobs held at once; 0 = none are taken.
    pub job_slots: u32,
    /// Longest recording, in s.
    pub max_recording_s: u64,
    /// Parts of longer recordings are given to other workers, in s; 0 = of none.
    pub split_jobs_over_s: u64,
    /// Length of such a part, in s.
    pub job_part_s: u64,
    /// Memory of the process that decodes a recording, in MB.
    pub decoder_memory_mb: u64,
    /// A decoder that says nothing for so long is ended, in ms.
    pub decoder_stall_ms: u64,
    /// What hears: `whisper_cpp`, `ct2` (with the cargo feature of that name), `auto` or `simulated`.
    pub engine: EngineKind,
    pub ct2: Ct2Config,
    /// Folder whose `*.bin` files are models, named by their stem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models_dir: Option<PathBuf>,
    /// Further models by name; they win over those of the folder.
    pub models: BTreeMap<String, PathBuf>,
    /// For sessions that name none; the only model there is, when there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_model: Option<String>,
    /// Loaded at the start instead of at first use.
    pub preload: Vec<String>,
    /// Models of the catalog that are fetched beside the work when they are not here.
    pub prefetch: Vec<String>,
    /// The operator's own catalog, which knows some of them; given by the command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub catalog: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silero_model: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub onnxruntime: Option<PathBuf>,
    /// pyannote's segmentation-3.0, which sees overlapping speech; none = the one among the models, if it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segmentation_model: Option<PathBuf>,
    /// A speaker encoder as ONNX file: WeSpeaker's, CAM++ or TitaNet; none = ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speaker_encoder: Option<PathBuf>,
    /// Cosine distance between voices beyond which somebody else speaks, in hundredths; it belongs to an encoder. None = 60,
    /// which suits ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speaker_distance_percent: Option<u16>,
    /// Memory that must be left on the host for sessions with `diarize=auto` to be listened to; below it their channels are
    /// told apart, or nobody.
    pub diarize_needs_mb: u64,
    pub decode_states: usize,
    /// Threads of each decode state; 0 = as many as this host's workers can have without sharing cores.
    pub decode_threads: usize,
    /// Workers that share this host's cores, this one included, where more are on their way than are seen.
    pub host_workers: u32,
    /// Auto = as the environment says.
    pub provider: ProviderChoice,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
    /// NVIDIA's management library; none = the one that the loader finds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvml_library: Option<PathBuf>,
    /// `--all-gpus` looks so often for devices that did not answer, in ms.
    pub survey_every_ms: u64,
    /// Share of the device's memory that is left free, beside what other tenants have.
    pub memory_reserve_percent: u8,
    /// Without work for so long the engine ends and leaves nothing on its device, in ms; 0 = never.
    pub idle_release_ms: u64,
    /// What did not fit, or failed, is tried again after so long, in ms; each failure in a row doubles it.
    pub restore_after_ms: u64,
    /// The same after a driver or a library that did not fit.
    pub restore_driver_after_ms: u64,
    pub sharing: Sharing,
    /// Of `sharing = "sequential"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lock_file: Option<PathBuf>,
    /// The lock is given back after so long at most, and after the decode under way, in ms.
    pub lock_hold_ms: u64,
    /// Between giving the lock back and asking for it again, in ms.
    pub lock_gap_ms: u64,
    pub simulated: SimulatedConfig,
    /// Where recordings may come from.
    pub fetch: FetchConfig,
    /// Audio in memory, in MB; 0 = 4 for each slot and 64 beyond.
    pub buffer_mb: u64,
    /// Time from one heartbeat to the next.
    pub heartbeat_ms: u32,
    /// An engine that does not answer, or has work and does not move, for this long is ended and started again.
    pub engine_stuck_ms: u64,
    /// The one budget for everything a stop has to do, hand-over included; 0 = what the provider gives.
    pub shutdown_ms: u64,
    /// The same for a drain that names no deadline.
    pub drain_ms: u64,
    pub preemption: PreemptionConfig,
    /// Executable of the engine child; none = this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine_exe: Option<PathBuf>,
    /// Where the defaults of models, Silero and ONNX Runtime lie; given by the command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            http: HttpConfig::off(),
            gpu: GpuChoice::Auto,
            gpu_id: None,
            index: 0,
            // What one small GPU holds of live sessions with a base model; measured figures replace it.
            slots: 4,
            // A recording uses every moment that live sessions leave; a second one at once would only share it.
            job_slots: 1,
            // A day: longer recordings are split by whoever makes them.
            max_recording_s: 86_400,
            // A shorter one is done before others have fetched it.
            split_jobs_over_s: 600,
            // Seconds of work for a GPU: what it costs to begin one is little beside it, and at the end nobody waits long.
            job_part_s: 120,
            // An m4a's index for a day of audio is about 20 MB; libraries and the binary itself need the rest.
            decoder_memory_mb: 512,
            // A decoder works thousands of times faster than this; a silent one hangs.
            decoder_stall_ms: 30_000,
            engine: EngineKind::WhisperCpp,
            ct2: Ct2Config::default(),
            models_dir: None,
            models: BTreeMap::new(),
            default_model: None,
            // Nothing: an idle worker costs 0 MB of device memory.
            preload: Vec::new(),
            // Nothing is fetched that nobody asked for.
            prefetch: Vec::new(),
            catalog: None,
            silero_model: None,
            onnxruntime: None,
            segmentation_model: None,
            speaker_encoder: None,
            speaker_distance_percent: None,
            // Two states' networks and what they compute in, with room for the decode beside them.
            diarize_needs_mb: 512,
            // Two decodes overlap well; more wait for one device anyway.
            decode_states: 2,
            // states x threads must not exceed the cores, of which machines have two or two hundred.
            decode_threads: 0,
            host_workers: 1,
            provider: ProviderChoice::Auto,
            price_per_hour: None,
            nvml_library: None,
            // A card that is reset is back within a minute; asking loads the driver's library anew.
            survey_every_ms: 30_000,
            // What drivers and allocators take beside what is asked for.
            memory_reserve_percent: 5,
            // Longer than the pauses of a working day's calls, shorter than what a neighbour minds.
            idle_release_ms: 600_000,
            // A neighbour that grew for one batch has shrunk by then; trying costs a load and perhaps a crash.
            restore_after_ms: 60_000,
            // Nobody installs a driver under a running process without a thought.
            restore_driver_after_ms: 1_800_000,
            sharing: Sharing::Resident,
            lock_file: None,
            // A neighbour waits for a few windows at most.
            lock_hold_ms: 2_000,
            // Time enough for whoever waits in flock(2) to be woken.
            lock_gap_ms: 100,
            simulated: SimulatedConfig::default(),
            fetch: FetchConfig::default(),
            buffer_mb: 0,
            // A dispatcher calls a worker suspect after one and a half of them, and dead after three.
            heartbeat_ms: 1_000,
            // The longest a healthy engine is silent is one step of a decode on a loaded CPU, a few seconds.
            engine_stuck_ms: 15_000,
            // See `shutdown`.
            shutdown_ms: 0,
            // Sessions move within seconds where there is room; a minute lets them wait for some.
            drain_ms: 60_000,
            preemption: PreemptionConfig::default(),
            engine_exe: None,
            cache_dir: None,
        }
    }
}

impl WorkerConfig {
    /// Every mistake, named by its field.
    pub fn problems(&self) -> Vec<String> {
        let mut found = self.http.problems("worker.http");
        let mut check = |good: bool, text: String| {
            if !good {
                found.push(text);
            }
        };
        check(self.slots >= 1, "worker.slots: 0, a worker without slots takes nothing".to_owned());
        check(self.slots <= 10_000, format!("worker.slots: {}, the most is 10000", self.slots));
        check(self.job_slots <= 64, format!("worker.job_slots: {}, the most is 64", self.job_slots));
        check(
            self.speaker_distance_percent.is_none_or(|percent| (5..=150).contains(&percent)),
            format!(
                "worker.speaker_distance_percent: {}, allowed are 5 to 150",
                self.speaker_distance_percent.unwrap_or_default()
            ),
        );
        check(
            (1..=31 * 86_400).contains(&self.max_recording_s),
            format!("worker.max_recording_s: {}, allowed are 1 to {}", self.max_recording_s, 31 * 86_400),
        );
        check(
            (5..=3_600).contains(&self.job_part_s),
            format!("worker.job_part_s: {}, allowed are 5 to 3600", self.job_part_s),
        );
        check(
            (64..=65_536).contains(&self.decoder_memory_mb),
            format!("worker.decoder_memory_mb: {}, allowed are 64 to 65536", self.decoder_memory_mb),
        );
        check(
            (1_000..=600_000).contains(&self.decoder_stall_ms),
            format!("worker.decoder_stall_ms: {}, allowed are 1000 to 600000", self.decoder_stall_ms),
        );
        check(self.decode_states >= 1, "worker.decode_states: 0, nothing would be decoded".to_owned());
        check(
            self.decode_states <= 8,
            format!(
                "worker.decode_states: {}, more than 8 parallel states have crashed whisper.cpp",
                self.decode_states
            ),
        );
        check(
            (1..=1_024).contains(&self.host_workers),
            format!("worker.host_workers: {}, allowed are 1 to 1024", self.host_workers),
        );
        if let Some(id) = &self.gpu_id
            && let Err(error) = GpuId::new(id)
        {
            check(false, format!("worker.gpu_id: {error}"));
        }
        if let GpuChoice::Uuid(uuid) = &self.gpu {
            check(
                uuid.starts_with("GPU-") || uuid.starts_with("MIG-"),
                format!("worker.gpu: {uuid:?} is neither auto, none, an index, nor a UUID such as GPU-..."),
            );
        }
        if let Some(price) = self.price_per_hour {
            check((0.0..=MOST_PRICE).contains(&price), format!("worker.price_per_hour: {price} is not a price"));
        }
        check(
            self.simulated.speed.is_finite() && self.simulated.speed >= 0.0,
            format!("worker.simulated.speed: {} is not a speed", self.simulated.speed),
        );
        check(
            self.buffer_mb == 0 || self.buffer_mb >= u64::from(self.slots) * SESSION_SHARE_MB,
            format!("worker.buffer_mb: {}, at least {SESSION_SHARE_MB} for each slot", self.buffer_mb),
        );
        check(
            (100..=5_000).contains(&self.heartbeat_ms),
            format!("worker.heartbeat_ms: {}, allowed are 100 to 5000", self.heartbeat_ms),
        );
        check(
            (2_000..=600_000).contains(&self.engine_stuck_ms),
            format!("worker.engine_stuck_ms: {}, allowed are 2000 to 600000", self.engine_stuck_ms),
        );
        check(
            self.shutdown_ms == 0 || (500..=600_000).contains(&self.shutdown_ms),
            format!("worker.shutdown_ms: {}, allowed are 500 to 600000, or 0", self.shutdown_ms),
        );
        check(
            (500..=86_400_000).contains(&self.drain_ms),
            format!("worker.drain_ms: {}, allowed are 500 to 86400000", self.drain_ms),
        );
        check(
            (100..=3_600_000).contains(&self.survey_every_ms),
            format!("worker.survey_every_ms: {}, allowed are 100 to 3600000", self.survey_every_ms),
        );
        check(
            self.memory_reserve_percent <= 50,
            format!("worker.memory_reserve_percent: {}, the most is 50", self.memory_reserve_percent),
        );
        check(
            self.idle_release_ms == 0 || (100..=604_800_000).contains(&self.idle_release_ms),
            format!("worker.idle_release_ms: {}, allowed are 100 to 604800000, or 0", self.idle_release_ms),
        );
        for (field, ms) in
            [("restore_after_ms", self.restore_after_ms), ("restore_driver_after_ms", self.restore_driver_after_ms)]
        {
            check((100..=86_400_000).contains(&ms), format!("worker.{field}: {ms}, allowed are 100 to 86400000"));
        }
        check(
            (self.sharing == Sharing::Sequential) == self.lock_file.is_some(),
            "worker.lock_file: belongs to sharing = \"sequential\", which needs it".to_owned(),
        );
        if let Some(Err(why)) = self.lock_file.as_deref().map(|path| can_be_locked(path, may_make_files)) {
            check(false, format!("worker.lock_file: {why}"));
        }
        check(
            (100..=60_000).contains(&self.lock_hold_ms),
            format!("worker.lock_hold_ms: {}, allowed are 100 to 60000", self.lock_hold_ms),
        );
        check(
            (10..=10_000).contains(&self.lock_gap_ms),
            format!("worker.lock_gap_ms: {}, allowed are 10 to 10000", self.lock_gap_ms),
        );
        for (name, path) in &self.models {
            check(is_model_name(name), format!("worker.models: {name:?} is not a name for a model"));
            let there = path.is_file() || (self.takes_folders() && path.join(ct2::folder::MODEL).is_file());
            let what = if self.takes_folders() { "neither a file nor a model folder" } else { "not a file" };
            check(there, format!("worker.models.{name}: {} is {what}", path.display()));
        }
        let files = [
            ("silero_model", &self.silero_model),
            ("onnxruntime", &self.onnxruntime),
            ("segmentation_model", &self.segmentation_model),
            ("speaker_encoder", &self.speaker_encoder),
        ];
        for (field, path) in files {
            if let Some(path) = path {
                check(path.is_file(), format!("worker.{field}: {} is not a file", path.display()));
            }
        }
        if let Some(dir) = &self.models_dir {
            check(
                dir.is_dir() || !self.prefetch.is_empty(),
                format!("worker.models_dir: {} is not a folder", dir.display()),
            );
        }
        if let Some(exe) = &self.engine_exe {
            check(exe.is_file(), format!("worker.engine_exe: {} is not a file", exe.display()));
        }
        let models = self.model_files();
        let known = |name: &str| models.iter().any(|m| m.name == name);
        check(
            self.engine != EngineKind::Ct2 || ct2::BUILT_IN,
            "worker.engine: ct2 is not in this build (cargo feature ct2)".to_owned(),
        );
        check((1..=64).contains(&self.ct2.batch), format!("worker.ct2.batch: {}, allowed are 1 to 64", self.ct2.batch));
        if self.engine.is_real() {
            check(
                !models.is_empty(),
                "worker.models: no model found; `voxfleet models pull base.en` brings one, or name a file here, or a folder of *.bin \
                 files in worker.models_dir"
                    .to_owned(),
            );
            match &self.default_model {
                Some(name) => check(known(name), format!("worker.default_model: {}", not_here(name))),
                None => check(
                    models.len() <= 1,
                    format!(
                        "worker.default_model: needed with several models ({})",
                        models.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ")
                    ),
                ),
            }
            for name in &self.preload {
                check(known(name), format!("worker.preload: {}", not_here(name)));
            }
            for name in &self.prefetch {
                check(known(name), format!("worker.prefetch: {name:?} is no Whisper file of the catalog"));
            }
        }
        found.extend(self.fetch.problems());
        found.extend(self.preemption.problems());
        found
    }

    /// From SIGTERM to the end of the process.
    pub(crate) fn shutdown(&self) -> Duration {
        Duration::from_millis(match (self.shutdown_ms, self.rent().provider) {
            // SIGKILL follows SIGTERM after about five seconds.
            (0, Provider::RunPod) => 4_500,
            // Docker's and systemd's patience is ten seconds or more.
            (0, _) => 9_500,
            (ms, _) => ms,
        })
    }

    /// Turns on the device with a neighbour.
    pub(crate) fn turns(&self) -> Option<TurnsConfig> {
        let lock_file = self.lock_file.clone().filter(|_| self.sharing == Sharing::Sequential)?;
        Some(TurnsConfig { lock_file, hold_ms: self.lock_hold_ms, gap_ms: self.lock_gap_ms })
    }

    /// Memory of a device of this size that is left free, in MB.
    pub(crate) fn reserve_mb(&self, total_mb: u64) -> u64 {
        total_mb * u64::from(self.memory_reserve_percent) / 100
    }

    /// What the device costs, and whom.
    pub(crate) fn rent(&self) -> Rent {
        Rent { provider: self.provider.into(), price_per_hour: self.price_per_hour }
    }

    pub(crate) fn heartbeat(&self) -> Duration {
        Duration::from_millis(u64::from(self.heartbeat_ms))
    }

    /// Model files by name: those named, then those of the folder (or of the cache).
    pub fn model_files(&self) -> Vec<ModelFile> {
        let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
        let folder = self.models_dir.clone().or_else(|| Some(self.cache_dir.as_ref()?.join("models")));
        // A folder that can not be read holds no models; `problems` says so when it was named.
        for entry in folder.as_ref().and_then(|f| std::fs::read_dir(f).ok()).into_iter().flatten().flatten() {
            let path = entry.path();
            if let Some(name) = self.folder_model(&path) {
                files.insert(name, path);
            } else if path.extension().is_some_and(|e| e == "bin")
                && let Some(stem) = path.file_stem().and_then(|s| s.to_str())
                && is_model_name(stem)
            {
                // A folder made of it stands for it.
                files.entry(stem.to_owned()).or_insert_with(|| path.clone());
            }
        }
        for name in &self.prefetch {
            if let (Some(folder), Some(file)) = (&folder, self.catalog_file(name)) {
                files.entry(name.clone()).or_insert_with(|| folder.join(file));
            }
        }
        files.extend(self.models.clone());
        if self.engine == EngineKind::Simulated && files.is_empty() {
            files.insert(SIMULATED_MODEL.to_owned(), PathBuf::new());
        }
        files.into_iter().map(|(name, path)| ModelFile { name, path }).collect()
    }

    /// As it was set, with the place of model folders.
    pub fn ct2(&self) -> Ct2Config {
        let folders = || Some(self.cache_dir.as_ref()?.join("ct2"));
        Ct2Config { folders: self.ct2.folders.clone().or_else(folders), ..self.ct2.clone() }
    }

    fn takes_folders(&self) -> bool {
        ct2::BUILT_IN && matches!(self.engine, EngineKind::Ct2 | EngineKind::Auto)
    }

    /// The name of a CTranslate2 model folder, where this engine takes such: `base.en-ct2`, as `voxfleet models convert` calls
    /// it, is `base.en`.
    fn folder_model(&self, path: &Path) -> Option<String> {
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .filter(|_| self.takes_folders() && path.join(ct2::folder::MODEL).is_file())?;
        let name = name.strip_suffix("-ct2").unwrap_or(name);
        is_model_name(name).then(|| name.to_owned())
    }

    /// The file under which the store keeps a Whisper model of the catalog.
    fn catalog_file(&self, name: &str) -> Option<String> {
        let catalog = Catalog::load(self.catalog.as_deref()).ok()?;
        let model = catalog.get(name).filter(|model| model.kind == ModelKind::Whisper)?;
        Some(model.files.first()?.file.clone())
    }

    /// The model of sessions that name none; empty when there is no model at all.
    pub fn resolved_default_model(&self) -> String {
        match &self.default_model {
            Some(name) => name.clone(),
            None => self.model_files().into_iter().next().map(|m| m.name).unwrap_or_default(),
        }
    }

    pub fn resolved_silero(&self) -> Option<PathBuf> {
        let pulled = || Some(self.models_dir.as_ref()?.join("silero_vad.onnx")).filter(|p| p.is_file());
        self.silero_model.clone().or_else(pulled).or_else(|| self.cached(Path::new("models/silero_vad.onnx")))
    }

    pub fn resolved_onnxruntime(&self) -> Option<PathBuf> {
        self.onnxruntime.clone().or_else(|| self.cached(Path::new("lib/libonnxruntime.so")))
    }

    /// What this worker tells speakers apart with.
    pub fn diarize(&self) -> DiarizeConfig {
        let pulled = |dir: &PathBuf| Some(dir.join(SEGMENTATION_FILE)).filter(|path| path.is_file());
        let found = || self.models_dir.as_ref().and_then(pulled);
        let cached = || self.cached(&Path::new("models").join(SEGMENTATION_FILE));
        DiarizeConfig {
            segmentation: self.segmentation_model.clone().or_else(found).or_else(cached),
            encoder: self.speaker_encoder.clone(),
            distance_percent: self.speaker_distance_percent,
            needs_mb: self.diarize_needs_mb,
            later_ms: self.simulated.listen_ms,
        }
    }

    fn cached(&self, path: &Path) -> Option<PathBuf> {
        Some(self.cache_dir.as_ref()?.join(path)).filter(|p| p.is_file())
    }

    /// Limits of the process that decodes a stranger's recording.
    pub(crate) fn decoding(&self) -> voxfleet_audio::Limits {
        voxfleet_audio::Limits {
            max_seconds: self.max_recording_s,
            memory_mb: self.decoder_memory_mb,
            stall: std::time::Duration::from_millis(self.decoder_stall_ms),
        }
    }

    /// Which recordings others may have parts of.
    pub(crate) fn split(&self) -> Split {
        let samples = |seconds: u64| seconds.saturating_mul(u64::from(SAMPLE_RATE_HZ));
        Split {
            longer_than: if self.split_jobs_over_s == 0 { u64::MAX } else { samples(self.split_jobs_over_s) },
            part_samples: samples(self.job_part_s),
            speakers_need_mb: self.diarize_needs_mb,
        }
    }

    /// Bytes of audio all sessions together may hold, beyond their guaranteed shares.
    pub(crate) fn surplus_bytes(&self) -> u64 {
        match self.buffer_mb {
            0 => SURPLUS_MB * MB,
            total => total.saturating_sub(u64::from(self.slots) * SESSION_SHARE_MB) * MB,
        }
    }

    pub(crate) fn share_bytes(&self) -> u64 {
        SESSION_SHARE_MB * MB
    }
}

/// Under this name `voxfleet models pull pyannote-segmentation-3.0` keeps it.
const SEGMENTATION_FILE: &str = "pyannote-segmentation-3.0.onnx";

/// Per hour, in whatever currency: above what anybody rents a device for.
const MOST_PRICE: f64 = 100_000.0;

/// The simulated engine needs no file; its one model is called like this.
pub const SIMULATED_MODEL: &str = "simulated";

/// Says which command brings it, where one does.
fn not_here(name: &str) -> String {
    // Only names of the catalog can be pulled; a binary whose own catalog is broken has nothing to offer.
    match Catalog::built_in().ok().and_then(|catalog| Some(catalog.get(name)?.kind)) {
        Some(ModelKind::WhisperCt2) => {
            let model = name.strip_suffix("-ct2").unwrap_or(name);
            format!("{name:?} is a folder, and its model is called {model:?}: where worker.engine is ct2 or auto")
        }
        Some(_) => format!("model {name:?} is not here; `voxfleet models pull {name}` brings it"),
        None => format!("{name:?} is not one of the models"),
    }
}

fn may_make_files(folder: &Path) -> bool {
    use rustix::fs::Access;
    rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// Whether a lock can be taken on this file, now or once it has been made; nothing is made here. `may_make`: whether we may
/// make files in this folder.
fn can_be_locked(path: &Path, may_make: impl Fn(&Path) -> bool) -> Result<(), String> {
    match std::fs::File::open(path) {
        Ok(file) if file.metadata().is_ok_and(|m| m.is_dir()) => Err(format!("{} is a folder", path.display())),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let folder = path.parent().map(|folder| Path::new(".").join(folder)).filter(|folder| folder.is_dir());
            match folder {
                Some(folder) if may_make(&folder) => Ok(()),
                Some(_) => Err(format!("{} is not there, and we may not make it", path.display())),
                None => Err(format!("the folder of {} is not there", path.display())),
            }
        }
        Err(error) => Err(format!("{} cannot be opened: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests;
