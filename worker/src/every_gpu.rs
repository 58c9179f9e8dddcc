//! `worker --all-gpus`: a worker process for each device of the machine, and this one to keep them running.
//!
//! A worker that fails is started again, one that ends in order (drained, or asked) stays ended. A stop is passed on to all.
//! A card that does not answer at the start is asked for again and again, and gets its worker when it is back. This process
//! speaks to nobody else, and loads no driver once it knows every device's name.

use std::{
    collections::BTreeSet, ffi::OsString, io, net::SocketAddr, os::unix::process::ExitStatusExt as _, path::PathBuf,
    pin::pin, process::ExitStatus, time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::Child,
    task::{JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use voxfleet_audio::spawner::{SpawnError, launch_worker};
use voxfleet_http::HttpConfig;
use voxfleet_schema::device::DeviceTrouble;

use crate::{
    config::WorkerConfig,
    device::{self, Listed, Survey},
};

/// Beyond a worker's own time for a stop; a worker that is not gone then hangs.
const GRACE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// A card that fell off the bus may be back at any time; the fleet does without it meanwhile.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A worker that lived so long had no trouble starting.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum EveryGpuError {
    #[error("configuration: {}", .0.join("; "))]
    Config(Vec<String>),
    #[error("no gpu can be looked for: {}; --gpu none takes the cpu", .0.message)]
    Nvml(DeviceTrouble),
    #[error("this machine has no gpu that answers; --gpu none takes the cpu")]
    NoGpu,
    #[error("this build has no CUDA; take a build with it, or --gpu none for one worker on the cpu")]
    NoCuda,
    #[error("{failed} of {all} workers could not be kept running")]
    Failed { failed: usize, all: usize },
    #[error("the task that keeps a worker running failed")]
    Task(#[from] JoinError),
}

impl EveryGpuError {
    /// Whether trying again is of no use: what the driver says may be over in a moment, a wrong setting stays wrong.
    pub fn is_of_settings(&self) -> bool {
        match self {
            EveryGpuError::Config(_) | EveryGpuError::NoCuda => true,
            EveryGpuError::Nvml(_) | EveryGpuError::NoGpu | EveryGpuError::Failed { .. } | EveryGpuError::Task(_) => {
                false
            }
        }
    }
}

/// What of the configuration cannot hold for several workers at once.
fn problems(config: &WorkerConfig) -> Vec<String> {
    let mut found = Vec::new();
    if config.gpu_id.is_some() {
        found.push(
            "worker.gpu_id: one name cannot serve several workers; without it each is named by its device".into(),
        );
    }
    if config.preemption.http_listen.is_some() {
        found.push(
            "worker.preemption.http_listen: one address cannot serve several workers; all of them see \
             worker.preemption.file"
                .into(),
        );
    }
    found
}

/// Runs until `shutdown`, or until every worker has ended. `args`: what a worker is started with, but for its device;
/// `refusal`: the exit code by which it says that it will never start with them.
pub async fn run(
    config: &WorkerConfig,
    args: Vec<OsString>,
    refusal: u8,
    shutdown: CancellationToken,
) -> Result<(), EveryGpuError> {
    let problems = problems(config);
    if !problems.is_empty() {
        return Err(EveryGpuError::Config(problems));
    }
    if !device::takes_gpus(config) {
        return Err(EveryGpuError::NoCuda);
    }
    let library = &config.nvml_library;
    let Some(survey) = shutdown.run_until_cancelled(look(library.clone())).await else { return Ok(()) };
    let mut site = Site::default();
    let first = site.learn(Ok(survey?.map_err(EveryGpuError::Nvml)?));
    if first.is_empty() {
        return Err(EveryGpuError::NoGpu);
    }
    tracing::info!(workers = first.len(), "a worker for each gpu");
    let mut keepers = JoinSet::new();
    let patience = config.shutdown().max(Duration::from_millis(config.preemption.notice_ms)) + GRACE;
    let mut addresses = http_addresses(&config.http);
    let mut start = |keepers: &mut JoinSet<bool>, devices: Vec<Listed>, workers: usize| {
        for device in devices {
            let args = of_device(&args, &device, workers, addresses.next());
            let shutdown = shutdown.clone();
            let keeper = Keeper { args, device, patience, refusal, shutdown };
            keepers.spawn(async move { keeper.keep().await });
        }
    };
    start(&mut keepers, first, site.workers());
    let every = Duration::from_millis(config.survey_every_ms);
    let again = || async {
        sleep(every).await;
        look(library.clone()).await
    };
    let mut looking = pin!(again());
    let mut failed = 0;
    loop {
        tokio::select! {
            ended = keepers.join_next() => match ended {
                Some(ended) => failed += usize::from(!ended?),
                None => break,
            },
            survey = &mut looking, if site.lacks_some() && !shutdown.is_cancelled() => {
                let back = site.learn(survey?);
                start(&mut keepers, back, site.workers());
                looking.set(again());
            }
        }
    }
    if failed == 0 { Ok(()) } else { Err(EveryGpuError::Failed { failed, all: site.known.len() }) }
}

/// A driver may take its time, so on a blocking thread.
async fn look(library: Option<PathBuf>) -> Result<Result<Survey, DeviceTrouble>, JoinError> {
    tokio::task::spawn_blocking(move || device::survey(library.as_deref())).await
}

/// Which devices have been seen, and why others have not. Pure.
#[derive(Debug, Default)]
struct Site {
    /// By their names; each has had its worker.
    known: BTreeSet<String>,
    /// As of the last survey.
    troubles: Vec<DeviceTrouble>,
}

impl Site {
    /// The devices that get a worker now.
    fn learn(&mut self, survey: Result<Survey, DeviceTrouble>) -> Vec<Listed> {
        let (devices, troubles) = match survey {
            Ok(survey) => (survey.devices, survey.troubles),
            Err(trouble) => (Vec::new(), vec![trouble]),
        };
        for trouble in troubles.iter().filter(|trouble| !self.troubles.contains(trouble)) {
            tracing::error!(class = %trouble.class, trouble.message, "a gpu gets no worker until it answers");
        }
        let waited_for = !self.troubles.is_empty();
        self.troubles = troubles;
        let new: Vec<Listed> = devices.into_iter().filter(|device| self.known.insert(device.uuid.clone())).collect();
        for device in new.iter().filter(|_| waited_for) {
            tracing::info!(uuid = device.uuid, name = device.name, "a gpu answers again and gets its worker");
        }
        new
    }

    /// Whether there may be a device that has no worker yet.
    fn lacks_some(&self) -> bool {
        !self.troubles.is_empty()
    }

    /// Who will share the cores once all are back.
    fn workers(&self) -> usize {
        self.known.len() + self.troubles.len()
    }
}

/// The words after the program's name: those of this process, one device, how many share the cores, and where it serves HTTP.
fn of_device(args: &[OsString], device: &Listed, workers: usize, http: Option<SocketAddr>) -> Vec<OsString> {
    let settings = [Some(format!("worker.host_workers={workers}")), http.map(|at| format!("worker.http.listen={at}"))];
    let settings = settings.into_iter().flatten().flat_map(|setting| ["--set".into(), setting.into()]);
    args.iter().cloned().chain(["--gpu".into(), device.uuid.clone().into()]).chain(settings).collect()
}

/// Where each in turn serves HTTP: the first at the address that is configured, the next at the port after it. Any free port
/// (0) is that for all; none where there is no HTTP.
fn http_addresses(config: &HttpConfig) -> impl Iterator<Item = SocketAddr> {
    let first = config.address().filter(|_| !config.is_off());
    first.into_iter().flat_map(|first| {
        let step = u16::from(first.port() != 0);
        let ports = std::iter::successors(Some(first.port()), move |port| port.checked_add(step));
        ports.map(move |port| SocketAddr::new(first.ip(), port))
    })
}

struct Keeper {
    args: Vec<OsString>,
    device: Listed,
    /// From the signal to the end of a worker.
    patience: Duration,
    refusal: u8,
    shutdown: CancellationToken,
}

/// What becomes of a worker's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// It ended in order.
    Done,
    /// It will never start with these settings.
    GiveUp,
    Again,
}

fn next(status: &io::Result<ExitStatus>, refusal: u8, stopping: bool) -> Next {
    match status {
        Ok(status) if status.success() => Next::Done,
        // Told to stop before it could listen.
        Ok(status) if stopping && status.signal() == Some(Signal::TERM.as_raw()) => Next::Done,
        Ok(status) if status.code() == Some(i32::from(refusal)) => Next::GiveUp,
        _ => Next::Again,
    }
}

/// Before the next start; `failures` in a row, this one included.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
}

impl Keeper {
    /// Whether the worker's last life ended in order.
    async fn keep(&self) -> bool {
        let mut failures = 0;
        loop {
            let begun = Instant::now();
            let status = match launch_worker(&self.args).await {
                Ok(child) => self.live(child).await,
                Err(error) => Err(self.not_started(&error)),
            };
            let uuid = self.device.uuid.as_str();
            let stopping = self.shutdown.is_cancelled();
            match next(&status, self.refusal, stopping) {
                Next::Done => {
                    tracing::info!(uuid, "worker ended in order");
                    return true;
                }
                Next::GiveUp => {
                    tracing::error!(uuid, "worker refuses its settings, not started again");
                    return false;
                }
                Next::Again if stopping => {
                    tracing::error!(uuid, status = %told(&status), "worker did not end in order");
                    return false;
                }
                Next::Again => {}
            }
            failures = if begun.elapsed() >= HEALTHY_AFTER { 1 } else { failures + 1 };
            let pause = pause(failures);
            tracing::error!(uuid, status = %told(&status), pause_ms = pause.as_millis() as u64, "worker died, starting it again");
            if timeout(pause, self.shutdown.cancelled()).await.is_ok() {
                return false;
            }
        }
    }

    async fn live(&self, mut child: Child) -> io::Result<ExitStatus> {
        tracing::info!(uuid = self.device.uuid, name = self.device.name, pid = child.id(), "worker started");
        if let Some(status) = self.shutdown.run_until_cancelled(child.wait()).await {
            return status;
        }
        terminate(&child);
        match timeout(self.patience, child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                tracing::error!(uuid = self.device.uuid, "worker does not end, killing it");
                child.kill().await?;
                child.wait().await
            }
        }
    }

    fn not_started(&self, error: &SpawnError) -> io::Error {
        tracing::error!(uuid = self.device.uuid, error = error as &dyn std::error::Error, "worker not started");
        io::Error::other(error.to_string())
    }
}

/// Only we reap it, so its number is nobody else's.
fn terminate(child: &Child) {
    let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    if let Some(Err(error)) = pid.map(|pid| kill_process(pid, Signal::TERM)) {
        tracing::debug!(%error, "worker is gone already");
    }
}

fn told(status: &io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::failure::FailureClass;

    use super::*;
    use crate::device::Versions;

    #[test]
    fn only_a_failure_is_started_again() {
        let exited = |code: i32| Ok(ExitStatus::from_raw(code << 8));
        let killed = |signal: i32| Ok(ExitStatus::from_raw(signal));
        let unknown = Err(io::Error::other("not started"));
        for (status, stopping, wanted) in [
            (exited(0), false, Next::Done),
            (exited(1), false, Next::Again),
            (exited(64), false, Next::GiveUp),
            (killed(9), false, Next::Again),
            (killed(15), false, Next::Again),
            (killed(15), true, Next::Done),
            (killed(9), true, Next::Again),
            (unknown, false, Next::Again),
        ] {
            assert_eq!(next(&status, 64, stopping), wanted, "{status:?} {stopping}");
        }
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let pauses: Vec<u128> = [1, 2, 3, 7, 100].map(|n| pause(n).as_millis()).into();
        assert_eq!(pauses, [500, 1_000, 2_000, 30_000, 30_000]);
    }

    #[test]
    fn each_worker_is_told_its_device() {
        let device = Listed { index: 1, uuid: "GPU-1".into(), name: "T4".into(), total_mb: 16_000, is_instance: false };
        let words = ["worker".into(), "--slots".into(), "8".into()];
        let told =
            |http| of_device(&words, &device, 2, http).iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
        let (alone, served): (Vec<String>, Vec<String>) = (told(None), told(Some(([127, 0, 0, 1], 9490).into())));
        assert_eq!(alone, ["worker", "--slots", "8", "--gpu", "GPU-1", "--set", "worker.host_workers=2"]);
        assert_eq!(served[alone.len()..], ["--set", "worker.http.listen=127.0.0.1:9490"]);
    }

    #[test]
    fn no_two_workers_are_given_one_port() {
        let ports = |listen: &str| -> Vec<u16> {
            http_addresses(&HttpConfig::on(listen)).take(3).map(|address| address.port()).collect()
        };
        assert_eq!(ports("127.0.0.1:9490"), [9490, 9491, 9492]);
        assert_eq!(ports("[::1]:65534"), [65_534, 65_535], "the rest find theirs taken, and say so");
        assert_eq!(ports("127.0.0.1:0"), [0, 0, 0]);
        assert_eq!(ports(""), [0; 0]);
    }

    #[test]
    fn a_card_that_comes_back_gets_a_worker_and_no_card_gets_two() {
        let card = |index: u32| Listed {
            index,
            uuid: format!("GPU-{index}"),
            name: "T4".into(),
            total_mb: 16_000,
            is_instance: false,
        };
        let lost = |message: &str| DeviceTrouble { class: FailureClass::DeviceLost, message: message.to_owned() };
        let survey = |devices: &[u32], troubles: &[&str]| Survey {
            versions: Versions::default(),
            devices: devices.iter().map(|index| card(*index)).collect(),
            troubles: troubles.iter().map(|message| lost(message)).collect(),
        };
        let mut site = Site::default();
        for (what, found, started, lacks, workers) in [
            ("one does not answer", Ok(survey(&[0, 2], &["gpu 1"])), &[0, 2][..], true, 3),
            ("still", Ok(survey(&[0, 2], &["gpu 1"])), &[], true, 3),
            ("nothing does", Err(lost("no driver")), &[], true, 3),
            ("it is back", Ok(survey(&[0, 1, 2], &[])), &[1], false, 3),
            ("and that was all", Ok(survey(&[0, 1, 2], &[])), &[], false, 3),
        ] {
            let new: Vec<u32> = site.learn(found).iter().map(|device| device.index).collect();
            assert_eq!((&new[..], site.lacks_some(), site.workers()), (started, lacks, workers), "{what}");
        }
    }

    #[test]
    fn only_settings_are_never_tried_again() {
        let trouble = DeviceTrouble { class: FailureClass::DriverMismatch, message: String::new() };
        for (error, settings) in [
            (EveryGpuError::Config(Vec::new()), true),
            (EveryGpuError::NoCuda, true),
            (EveryGpuError::Nvml(trouble), false),
            (EveryGpuError::NoGpu, false),
            (EveryGpuError::Failed { failed: 1, all: 2 }, false),
        ] {
            assert_eq!(error.is_of_settings(), settings, "{error}");
        }
    }

    #[test]
    fn what_cannot_be_shared_is_named() {
        assert!(problems(&WorkerConfig::default()).is_empty());
        let mut config = WorkerConfig { gpu_id: Some("gpu-1".into()), ..WorkerConfig::default() };
        config.preemption.http_listen = Some(([127, 0, 0, 1], 9911).into());
        assert_eq!(problems(&config).len(), 2);
    }
}
