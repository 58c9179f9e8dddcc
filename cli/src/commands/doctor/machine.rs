//! This machine: cores, memory, and what a worker here would need. Reads files, loads libraries, asks no network.

use super::Check;
use crate::config::Settings;

/// Below this a worker with a small model would be close to being killed.
const LEAST_FREE_MB: u64 = 512;

pub(super) async fn look(settings: &Settings) -> Vec<Check> {
    let here = [cores(settings), memory(std::fs::read_to_string("/proc/meminfo").ok().as_deref())];
    here.into_iter().chain(for_worker(settings).await).collect()
}

#[cfg(feature = "worker")]
async fn for_worker(settings: &Settings) -> Vec<Check> {
    let config = settings.worker.clone();
    // Loading libraries and asking a driver can take seconds.
    match tokio::task::spawn_blocking(move || worker::look(&config)).await {
        Ok(found) => found,
        Err(error) => vec![Check::fail("worker", error.to_string(), "this is a bug")],
    }
}

/// A build without the worker needs nothing more of its machine.
#[cfg(not(feature = "worker"))]
async fn for_worker(_settings: &Settings) -> Vec<Check> {
    Vec::new()
}

fn cores(settings: &Settings) -> Check {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    #[cfg(feature = "worker")]
    {
        let (states, threads) = (settings.worker.decode_states, settings.worker.decode_threads);
        if states * threads > cores {
            let found = format!("{cores}, and {states} x {threads} threads are asked for to decode on");
            return Check::warn(
                "cores",
                found,
                "set worker.decode_threads to 0 (as many as there are cores for): a worker takes no more than that, spinning \
                 threads slow each other down",
            );
        }
    }
    let _ = settings;
    Check::ok("cores", cores.to_string())
}

fn memory(meminfo: Option<&str>) -> Check {
    let free = meminfo
        .and_then(|text| text.lines().find_map(|l| l.strip_prefix("MemAvailable:")))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    match free.map(|kb| kb / 1024) {
        Some(mb) if mb < LEAST_FREE_MB => Check::warn("memory", format!("{mb} MB free"), "a model may not fit"),
        Some(mb) => Check::ok("memory", format!("{mb} MB free")),
        None => Check::warn("memory", "/proc/meminfo cannot be read", "free memory is unknown here"),
    }
}

#[cfg(feature = "worker")]
mod worker {
    use std::path::Path;

    use sha2::{Digest as _, Sha256};
    use voxfleet_schema::{
        device::DeviceTrouble,
        failure::FailureClass,
        remedy::{self, Side, remedy},
    };
    use voxfleet_worker::{
        WorkerConfig,
        config::GpuChoice,
        device::{self, Listed, Neighbour, Versions},
        engine::{pool, vad::Silero},
        ipc::{EngineConfig, EngineKind, ModelFile},
    };

    use super::super::Check;

    /// Silero VAD 6.2.3, the file that measurements were made with.
    const SILERO_SHA256: &str = "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3";
    const FETCH: &str = "`sh deploy/bootstrap.sh deps` fetches it";

    pub(super) fn look(config: &WorkerConfig) -> Vec<Check> {
        let mut checks = gpus(config);
        checks.extend(detector(config));
        checks.extend(whisper(config));
        checks
    }

    /// The driver, each device and who is on it, and the one that a worker here would take.
    fn gpus(config: &WorkerConfig) -> Vec<Check> {
        let mut checks = Vec::new();
        let survey = device::survey(config.nvml_library.as_deref());
        // Without a word about GPUs a machine that has none lacks nothing.
        let wanted = config.nvml_library.is_some() || !matches!(config.gpu, GpuChoice::Auto | GpuChoice::None);
        match &survey {
            Ok(survey) => {
                let Versions { driver, library, cuda } = &survey.versions;
                let named = [("driver", driver), ("library", library), ("CUDA up to", cuda)];
                let versions: Vec<String> =
                    named.iter().filter_map(|(name, v)| Some(format!("{name} {}", v.as_ref()?))).collect();
                checks.push(Check::ok("nvidia", versions.join(", ")));
                let workers = config.cache_dir.as_deref().map(device::workers).unwrap_or_default();
                checks.extend(survey.devices.iter().map(|listed| one_gpu(listed, &workers)));
                checks.extend(survey.troubles.iter().map(trouble));
            }
            Err(found) if wanted || found.class != FailureClass::MissingLibrary => checks.push(trouble(found)),
            Err(_) => {}
        }
        checks.push(pinned(config, survey.is_ok_and(|survey| !survey.devices.is_empty())));
        checks
    }

    fn one_gpu(listed: &Listed, workers: &[Neighbour]) -> Check {
        let Listed { index, uuid, name, total_mb, is_instance } = listed;
        let kind = if *is_instance { ", an instance" } else { "" };
        let on_it = workers.iter().filter(|worker| worker.uuid.as_ref() == Some(uuid));
        let on_it: Vec<&str> = on_it.map(|worker| worker.gpu_id.as_str()).collect();
        let found = format!("{index}: {name}{kind}, {total_mb} MB, {uuid}");
        match on_it.as_slice() {
            [] => Check::ok("gpu", found),
            [one] => Check::ok("gpu", format!("{found}, worker {one} is on it")),
            several => Check::warn(
                "gpu",
                format!("{found}, {} workers share it: {}", several.len(), several.join(", ")),
                "each loads models of its own: one worker with more worker.slots needs less memory",
            ),
        }
    }

    /// Its message ends with the remedy, which is the mend here.
    fn trouble(found: &DeviceTrouble) -> Check {
        let said = remedy::said(Side::Driver, found.class, &found.message);
        Check::fail("gpu", format!("{}: {said}", found.class), remedy(Side::Driver, found.class))
    }

    fn pinned(config: &WorkerConfig, has_gpus: bool) -> Check {
        match device::look(config) {
            Ok(device) if device.trouble.is_some() && device.uuid.is_some() => {
                Check::fail("device", format!("{} does not answer", device.name), "see gpu above")
            }
            Ok(device) => match &device.uuid {
                Some(uuid) => {
                    let free = format!("{} of {} MB free", device.free_mb, device.total_mb);
                    Check::ok("device", format!("{}, {free}; its engine will see {uuid} alone", device.name))
                }
                None if config.gpu == GpuChoice::None => Check::ok("device", format!("{}, as configured", device.name)),
                None if has_gpus && !device::takes_gpus(config) => Check::warn(
                    "device",
                    format!("{}, for this build has no CUDA", device.name),
                    "take a build with it, or set worker.gpu to none",
                ),
                None if device.trouble.is_some() => Check::warn(
                    "device",
                    format!("{}, in place of a GPU that cannot be used", device.name),
                    "see gpu above; set worker.gpu to none if the CPU is meant",
                ),
                None => Check::ok("device", format!("{}, no GPU is here", device.name)),
            },
            Err(error) => Check::fail(
                "device",
                format!("{:#}", anyhow::Error::new(error)),
                "set worker.gpu to auto, or to an index or a UUID above",
            ),
        }
    }

    /// Voice activity: the model file, the library, and both together.
    fn detector(config: &WorkerConfig) -> Vec<Check> {
        let (model, library) = (config.resolved_silero(), config.resolved_onnxruntime());
        let energy = "speech is found by energy instead, and every final says so";
        let mut checks = Vec::new();
        match &model {
            None => checks.push(Check::warn("silero vad", format!("no file; {energy}"), FETCH)),
            Some(path) => checks.push(match checksum(path) {
                Ok(sum) if sum == SILERO_SHA256 => Check::ok("silero vad", path.display().to_string()),
                Ok(sum) => Check::warn(
                    "silero vad",
                    format!("{} has checksum {}..., not that of version 6.2.3", path.display(), &sum[..12]),
                    FETCH,
                ),
                Err(error) => Check::fail("silero vad", format!("{}: {error}", path.display()), FETCH),
            }),
        }
        let Some(library) = library else {
            checks.push(Check::warn("onnxruntime", format!("no library; {energy}"), FETCH));
            return checks;
        };
        let Some(model) = model else {
            checks.push(Check::ok("onnxruntime", format!("{}, not tried without a model", named(&library))));
            return checks;
        };
        checks.push(match Silero::load(&model, &library) {
            Ok(_) => Check::ok("onnxruntime", format!("{}, runs the detector", named(&library))),
            Err(error) => Check::fail(
                "onnxruntime",
                format!("{error}; {energy}"),
                "1.20 or newer is needed: set worker.onnxruntime or ORT_DYLIB_PATH",
            ),
        });
        checks
    }

    /// With the version, which the real file's name carries behind `.so.`.
    fn named(library: &Path) -> String {
        let real = library.canonicalize().unwrap_or_else(|_| library.to_owned());
        let name = real.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        match name.split_once(".so.") {
            Some((_, version)) => format!("{version} at {}", library.display()),
            None => library.display().to_string(),
        }
    }

    fn checksum(path: &Path) -> std::io::Result<String> {
        let digest = Sha256::digest(std::fs::read(path)?);
        Ok(digest.iter().map(|b| format!("{b:02x}")).collect())
    }

    fn whisper(config: &WorkerConfig) -> Vec<Check> {
        if config.engine == EngineKind::Simulated {
            return vec![Check::ok("models", "none needed, the engine is simulated")];
        }
        let files = config.model_files();
        if files.is_empty() {
            return vec![Check::warn(
                "models",
                "none in this configuration; a worker started with it alone would refuse",
                "set worker.models_dir to a folder of ggml *.bin files. A worker that was given --models-dir knows more than \
                 these settings: ask with --set worker.models_dir=DIR to have that folder looked at",
            )];
        }
        let engine = EngineConfig {
            engine: config.engine,
            ct2: config.ct2.clone(),
            decode_states: config.decode_states,
            ..EngineConfig::default()
        };
        files.iter().map(|file| model(&engine, file, config.prefetch.contains(&file.name))).collect()
    }

    /// `fetched`: a worker here brings what is missing.
    fn model(config: &EngineConfig, file: &ModelFile, fetched: bool) -> Check {
        if fetched && !file.path.exists() {
            let mend = "sessions that want it wait until then; `voxfleet models pull` brings it before";
            return Check::warn("models", format!("{} is not here, a worker fetches it at its start", file.name), mend);
        }
        match pool::expected_mb(config, file) {
            Ok(mb) => Check::ok("models", format!("{}, about {mb} MB loaded", file.name)),
            Err(error) => Check::fail("models", error.to_string(), remedy(Side::Model, FailureClass::ModelMissing)),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::commands::doctor::Verdict;

        #[test]
        fn only_what_is_fetched_may_be_missing() {
            let dir = tempfile::tempdir().expect("folder");
            let file = ModelFile { name: "m".to_owned(), path: dir.path().join("m.bin") };
            let whisper = EngineConfig { engine: EngineKind::WhisperCpp, ..EngineConfig::default() };
            assert_eq!(model(&whisper, &file, true).verdict, Verdict::Warn);
            assert_eq!(model(&whisper, &file, false).verdict, Verdict::Fail);
            std::fs::write(&file.path, "half").expect("file");
            let damaged = model(&whisper, &file, true);
            assert_eq!(damaged.verdict, Verdict::Fail, "one that is there is not fetched again");
            assert!(damaged.mend.is_some_and(|mend| mend.contains("models pull")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;

    #[test]
    fn free_memory_is_read_and_judged() {
        assert_eq!(memory(Some("MemTotal: 9 kB\nMemAvailable:    2097152 kB\n")).found, "2048 MB free");
        assert_eq!(memory(Some("MemAvailable: 1024 kB\n")).verdict, Verdict::Warn);
        assert_eq!(memory(None).verdict, Verdict::Warn);
    }
}
