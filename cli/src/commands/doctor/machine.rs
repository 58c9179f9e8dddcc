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
            let found = format!("{cores}, and a worker would decode on {states} x {threads} threads");
            return Check::warn(
                "cores",
                found,
                "lower worker.decode_states or worker.decode_threads: spinning threads slow each other down",
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
    use voxfleet_worker::{
        WorkerConfig, device,
        engine::{models, vad::Silero},
        ipc::EngineKind,
    };

    use super::super::Check;

    /// Silero VAD 6.2.3, the file that measurements were made with.
    const SILERO_SHA256: &str = "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3";
    const FETCH: &str = "`sh deploy/bootstrap.sh deps` fetches it";

    pub(super) fn look(config: &WorkerConfig) -> Vec<Check> {
        let mut checks = vec![gpu(config)];
        checks.extend(detector(config));
        checks.extend(whisper(config));
        checks
    }

    fn gpu(config: &WorkerConfig) -> Check {
        match device::look(config) {
            Ok(found) if found.uuid.is_some() => {
                Check::ok("gpu", format!("{}, {} of {} MB free", found.name, found.free_mb, found.total_mb))
            }
            Ok(found) if cfg!(feature = "cuda") => Check::warn(
                "gpu",
                format!("none, work goes to {}", found.name),
                "is the driver there? nvidia-smi tells",
            ),
            Ok(found) => Check::ok("gpu", format!("this build has no CUDA, work goes to {}", found.name)),
            Err(error) => Check::fail(
                "gpu",
                format!("{:#}", anyhow::Error::new(error)),
                "set worker.gpu to auto or to what nvidia-smi -L lists",
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
        let look = |file: &voxfleet_worker::ipc::ModelFile| match models::check(&file.name, &file.path) {
            Ok(facts) => Check::ok("models", format!("{}, about {} MB loaded", file.name, facts.expected_mb)),
            Err(error) => Check::fail("models", error.to_string(), "fetch the file again"),
        };
        files.iter().map(look).collect()
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
