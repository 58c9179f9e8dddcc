//! What a worker is told at its start. Read once by the command line, validated as a whole, then passed as a value.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use voxfleet_schema::{fleet::Provider, id::GpuId};

use crate::ipc::{EngineKind, ModelFile, SimulatedConfig};

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

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    pub gpu: GpuChoice,
    /// Overrides the name derived from the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_id: Option<String>,
    /// Tells workers of one host without a GPU apart.
    pub index: u32,
    /// Sessions held at once.
    pub slots: u32,
    /// Jobs held at once.
    pub job_slots: u32,
    pub engine: EngineKind,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silero_model: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub onnxruntime: Option<PathBuf>,
    pub decode_states: usize,
    /// Threads of each decode state.
    pub decode_threads: usize,
    pub provider: Provider,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
    pub simulated: SimulatedConfig,
    /// Audio in memory, in MB; 0 = 4 for each slot and 64 beyond.
    pub buffer_mb: u64,
    /// The one budget for everything a stop has to do.
    pub shutdown_ms: u64,
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
            gpu: GpuChoice::Auto,
            gpu_id: None,
            index: 0,
            // What one small GPU holds of live sessions with a base model; measured figures replace it.
            slots: 4,
            // File jobs are not served yet.
            job_slots: 0,
            engine: EngineKind::WhisperCpp,
            models_dir: None,
            models: BTreeMap::new(),
            default_model: None,
            // Nothing: an idle worker costs 0 MB of device memory.
            preload: Vec::new(),
            silero_model: None,
            onnxruntime: None,
            // Two decodes overlap well; more wait for one device anyway.
            decode_states: 2,
            // states x threads must not exceed the cores, and small machines have two.
            decode_threads: 1,
            provider: Provider::Local,
            price_per_hour: None,
            simulated: SimulatedConfig::default(),
            buffer_mb: 0,
            // Docker's and systemd's patience before SIGKILL is ten seconds or more.
            shutdown_ms: 10_000,
            engine_exe: None,
            cache_dir: None,
        }
    }
}

/// Longest model name, as in a session's options.
const MAX_MODEL_NAME: usize = 128;

impl WorkerConfig {
    /// Every mistake, named by its field.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut check = |good: bool, text: String| {
            if !good {
                found.push(text);
            }
        };
        check(self.slots >= 1, "worker.slots: 0, a worker without slots takes nothing".to_owned());
        check(self.slots <= 10_000, format!("worker.slots: {}, the most is 10000", self.slots));
        check(self.job_slots == 0, "worker.job_slots: file jobs are not available in this version".to_owned());
        check(self.decode_states >= 1, "worker.decode_states: 0, nothing would be decoded".to_owned());
        check(
            self.decode_states <= 8,
            format!(
                "worker.decode_states: {}, more than 8 parallel states have crashed whisper.cpp",
                self.decode_states
            ),
        );
        check(self.decode_threads >= 1, "worker.decode_threads: 0, nothing would be decoded".to_owned());
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
            check(price.is_finite() && price >= 0.0, format!("worker.price_per_hour: {price} is not a price"));
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
            (500..=600_000).contains(&self.shutdown_ms),
            format!("worker.shutdown_ms: {}, allowed are 500 to 600000", self.shutdown_ms),
        );
        for (name, path) in &self.models {
            check(good_model_name(name), format!("worker.models: {name:?} is not a name for a model"));
            check(path.is_file(), format!("worker.models.{name}: {} is not a file", path.display()));
        }
        for (field, path) in [("silero_model", &self.silero_model), ("onnxruntime", &self.onnxruntime)] {
            if let Some(path) = path {
                check(path.is_file(), format!("worker.{field}: {} is not a file", path.display()));
            }
        }
        if let Some(dir) = &self.models_dir {
            check(dir.is_dir(), format!("worker.models_dir: {} is not a folder", dir.display()));
        }
        if let Some(exe) = &self.engine_exe {
            check(exe.is_file(), format!("worker.engine_exe: {} is not a file", exe.display()));
        }
        let models = self.model_files();
        let known = |name: &str| models.iter().any(|m| m.name == name);
        if self.engine == EngineKind::WhisperCpp {
            check(
                !models.is_empty(),
                "worker.models: no model found; name one, or a folder of *.bin files in worker.models_dir".to_owned(),
            );
            match &self.default_model {
                Some(name) => check(known(name), format!("worker.default_model: {name:?} is not one of the models")),
                None => check(
                    models.len() <= 1,
                    format!(
                        "worker.default_model: needed with several models ({})",
                        models.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ")
                    ),
                ),
            }
            for name in &self.preload {
                check(known(name), format!("worker.preload: {name:?} is not one of the models"));
            }
        }
        found
    }

    /// Model files by name: those named, then those of the folder (or of the cache).
    pub fn model_files(&self) -> Vec<ModelFile> {
        let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
        let folder = self.models_dir.clone().or_else(|| Some(self.cache_dir.as_ref()?.join("models")));
        // A folder that can not be read holds no models; `problems` says so when it was named.
        for entry in folder.and_then(|f| std::fs::read_dir(f).ok()).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|e| e == "bin")
                && let Some(stem) = path.file_stem().and_then(|s| s.to_str())
                && good_model_name(stem)
            {
                files.insert(stem.to_owned(), path.clone());
            }
        }
        files.extend(self.models.clone());
        if self.engine == EngineKind::Simulated && files.is_empty() {
            files.insert(SIMULATED_MODEL.to_owned(), PathBuf::new());
        }
        files.into_iter().map(|(name, path)| ModelFile { name, path }).collect()
    }

    /// The model of sessions that name none; empty when there is no model at all.
    pub fn resolved_default_model(&self) -> String {
        match &self.default_model {
            Some(name) => name.clone(),
            None => self.model_files().into_iter().next().map(|m| m.name).unwrap_or_default(),
        }
    }

    pub fn resolved_silero(&self) -> Option<PathBuf> {
        self.silero_model.clone().or_else(|| self.cached(Path::new("models/silero_vad.onnx")))
    }

    pub fn resolved_onnxruntime(&self) -> Option<PathBuf> {
        self.onnxruntime.clone().or_else(|| self.cached(Path::new("lib/libonnxruntime.so")))
    }

    fn cached(&self, path: &Path) -> Option<PathBuf> {
        Some(self.cache_dir.as_ref()?.join(path)).filter(|p| p.is_file())
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

/// The simulated engine needs no file; its one model is called like this.
pub const SIMULATED_MODEL: &str = "simulated";

fn good_model_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_MODEL_NAME && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn simulated() -> WorkerConfig {
        WorkerConfig { engine: EngineKind::Simulated, ..WorkerConfig::default() }
    }

    #[test]
    fn the_simulated_default_has_no_problem_and_the_real_one_wants_a_model() {
        assert_eq!(simulated().problems(), Vec::<String>::new());
        assert_eq!(simulated().resolved_default_model(), SIMULATED_MODEL);
        let problems = WorkerConfig::default().problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("worker.models:"));
    }

    #[test]
    fn every_mistake_is_named_at_once() {
        let config = WorkerConfig {
            slots: 0,
            decode_states: 0,
            gpu_id: Some("a b".to_owned()),
            gpu: GpuChoice::Uuid("first".to_owned()),
            price_per_hour: Some(f64::NAN),
            shutdown_ms: 1,
            silero_model: Some("/nowhere/silero.onnx".into()),
            models: [("x/y".to_owned(), PathBuf::from("/nowhere/x.bin"))].into(),
            ..simulated()
        };
        let problems = config.problems();
        for field in [
            "worker.slots:",
            "worker.decode_states:",
            "worker.gpu_id:",
            "worker.gpu:",
            "worker.price_per_hour:",
            "worker.shutdown_ms:",
            "worker.silero_model:",
            "worker.models:",
            "worker.models.x/y:",
        ] {
            assert!(problems.iter().any(|p| p.starts_with(field)), "{field} not in {problems:?}");
        }
    }

    #[test]
    fn the_device_is_given_as_number_or_text() {
        let read = |json: &str| serde_json::from_str::<GpuChoice>(json).expect(json);
        assert_eq!(read("0"), GpuChoice::Index(0));
        assert_eq!(read("\"1\""), GpuChoice::Index(1));
        assert_eq!(read("\"auto\""), GpuChoice::Auto);
        assert_eq!(read("\"none\""), GpuChoice::None);
        assert_eq!(read("\"GPU-1\""), GpuChoice::Uuid("GPU-1".to_owned()));
        for choice in [GpuChoice::Auto, GpuChoice::None, GpuChoice::Index(3), GpuChoice::Uuid("GPU-x".to_owned())] {
            assert_eq!(GpuChoice::from(String::from(choice.clone()).as_str()), choice);
        }
    }

    #[test]
    fn models_come_from_the_folder_and_by_name() {
        let dir = tempfile::tempdir().expect("dir");
        let models = dir.path().join("models");
        std::fs::create_dir(&models).expect("models");
        for name in ["b.bin", "a.bin", "silero_vad.onnx", ".hidden.bin"] {
            std::fs::write(models.join(name), "x").expect(name);
        }
        let named = dir.path().join("other.bin");
        std::fs::write(&named, "x").expect("other");
        let config = WorkerConfig {
            cache_dir: Some(dir.path().to_owned()),
            models: [("b".to_owned(), named.clone())].into(),
            default_model: Some("b".to_owned()),
            ..WorkerConfig::default()
        };
        assert_eq!(config.problems(), Vec::<String>::new());
        let files = config.model_files();
        assert_eq!(files.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(files[1].path, named);
        assert_eq!(config.resolved_silero(), Some(models.join("silero_vad.onnx")));
        assert_eq!(config.resolved_onnxruntime(), None);
        let undecided = WorkerConfig { default_model: None, ..config };
        assert!(undecided.problems()[0].starts_with("worker.default_model:"));
    }
}
