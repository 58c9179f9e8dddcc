//! The supervisor: everything of a worker that speaks NATS. It never blocks and never computes.
//!
//! | task | does |
//! |---|---|
//! | heartbeat | one each second, from shared figures |
//! | device | samples NVML or `/proc` |
//! | engine | keeps the child alive ([`crate::lifecycle`]) |
//! | serve | control requests, the sessions' tasks, the pull ([`serve`]), jobs ([`jobs`]) |
//! | events | publishes what happened |

pub(crate) mod events;
pub(crate) mod holdings;
mod jobs;
mod neighbours;
mod serve;

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, watch},
    task::JoinError,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use voxfleet_nats::{Nats, log::AudioLog, media::Media, publish::Publisher, transcript::Chain};
use voxfleet_schema::id::{IdError, Incarnation, WorkerName};
use voxfleet_store::fetch::{FetchError, Fetcher};

use self::{events::Events, holdings::Holdings, serve::Served};
use crate::{
    capacity::{Budget, HintPool},
    config::WorkerConfig,
    device::{DeviceError, Probe},
    heartbeat::{self, Identity, Sources},
    ipc::EngineConfig,
    job::Means,
    lifecycle::{Engine, Program},
    session::Shared,
    shutdown::{ShutdownBudget, Stage},
};

/// Log reads under way at once.
const LOG_READS: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("configuration: {}", .0.join("; "))]
    Config(Vec<String>),
    #[error("device")]
    Device(#[from] DeviceError),
    #[error("recordings cannot be fetched")]
    Fetch(#[from] FetchError),
    #[error("a task of the worker failed")]
    Task(#[from] JoinError),
    #[error("cannot make a name for this worker")]
    Name(#[from] IdError),
    #[error("the connection to NATS is closed")]
    Disconnected,
    #[error(transparent)]
    Fleet(#[from] voxfleet_nats::fleet::FleetError),
}

/// What serving needs.
#[derive(Clone)]
pub(crate) struct Supervisor {
    nats: Nats,
    config: Arc<WorkerConfig>,
    models: Arc<Vec<String>>,
    default_model: Arc<str>,
    gpu_id: voxfleet_schema::id::GpuId,
    holdings: Arc<Holdings>,
    engine: Engine,
    shared: Shared,
    means: Means,
    hints: HintPool,
}

/// Runs a worker until `shutdown`, or until it has been drained.
pub async fn run(nats: Nats, config: WorkerConfig, shutdown: CancellationToken) -> Result<(), WorkerError> {
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(WorkerError::Config(problems));
    }
    let (mut probe, first_figures) = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || {
            let mut probe = Probe::open(&config)?;
            let figures = probe.sample(None);
            Ok::<_, DeviceError>((probe, figures))
        })
        .await??
    };
    if config.gpu_id.is_none() && !probe.is_gpu() {
        let taken = shutdown.run_until_cancelled(neighbours::names_taken(&nats, &probe.host)).await;
        probe.rename_cpu(config.index, &taken.unwrap_or_default())?;
    }
    let max_entry = nats.max_payload() as u64;
    let hint_bytes = (config.surplus_bytes() / 2).max(max_entry);
    let budget = Budget::new(config.share_bytes(), config.surplus_bytes().saturating_sub(hint_bytes));
    let engine_config = engine_config(&config, &probe);
    let models: Vec<String> = engine_config.models.iter().map(|m| m.name.clone()).collect();
    let default_model: Arc<str> = engine_config.default_model.as_str().into();
    let program = Program {
        exe: config.engine_exe.clone(),
        args: vec!["engine".to_owned()],
        visible_device: probe.visible_device().to_owned(),
    };
    let engine = Engine::new(engine_config, program, (config.slots + config.job_slots) as usize, budget.clone());
    let holdings = Arc::new(Holdings::new(config.slots, config.job_slots));
    let publisher = Publisher::new(&nats);
    let (events, event_queue) = Events::new();
    let identity = Identity {
        gpu_id: probe.gpu_id.clone(),
        host: probe.host.clone(),
        provider: config.provider,
        price_per_hour: config.price_per_hour,
    };
    tracing::info!(gpu_id = %identity.gpu_id, device = first_figures.name, slots = config.slots, "worker starts");

    let engine_tasks = TaskTracker::new();
    let stop_engine = CancellationToken::new();
    let tasks = TaskTracker::new();
    let stop_tasks = CancellationToken::new();
    let (incarnation, current) = watch::channel(new_incarnation()?);
    let (figures, device) = watch::channel(first_figures);
    engine_tasks.spawn({
        let (engine, stop) = (engine.clone(), stop_engine.clone());
        async move { engine.run(stop).await }
    });
    let sources = Sources {
        identity: identity.clone(),
        incarnation: current,
        device,
        engine: engine.clone(),
        holdings: Arc::clone(&holdings),
    };
    tasks.spawn(heartbeat::run(nats.clone(), sources, stop_tasks.clone()));
    tasks.spawn(heartbeat::sample_device(probe, engine.clone(), figures, stop_tasks.clone()));
    tasks.spawn(event_queue.run(publisher.clone()));
    tasks.spawn({
        let (nats, me, stop) = (nats.clone(), identity.clone(), stop_tasks.clone());
        async move {
            let taken = stop.run_until_cancelled(neighbours::names_taken(&nats, &me.host)).await;
            if taken.is_some_and(|taken| taken.contains(&me.gpu_id)) {
                tracing::warn!(gpu_id = %me.gpu_id, "another worker of this host has the same gpu_id, one of them will be superseded");
            }
        }
    });

    let shared = Shared {
        chain: Chain::new(&nats),
        log: AudioLog::new(&nats),
        publisher,
        events,
        engine: engine.clone(),
        budget,
        log_reads: Arc::new(Semaphore::new(LOG_READS)),
        max_entry,
    };
    let media = Media::new(&nats);
    let supervisor = Supervisor {
        nats: nats.clone(),
        models: Arc::new(models),
        default_model,
        gpu_id: identity.gpu_id.clone(),
        holdings,
        means: Means {
            shared: shared.clone(),
            fetcher: Fetcher::new(config.fetch.clone(), media.clone())?,
            media,
            limits: config.decoding(),
            exe: config.engine_exe.clone(),
            provider: config.provider,
        },
        shared,
        engine,
        hints: HintPool::new(hint_bytes, max_entry),
        config: Arc::new(config),
    };
    let served = supervisor.serve_all(incarnation, &shutdown).await;
    let ending = ShutdownBudget::begin(served.stop_begun, Duration::from_millis(supervisor.config.shutdown_ms));
    // Senders of events go with it.
    drop(supervisor);

    stop_engine.cancel();
    engine_tasks.close();
    ending.run(Stage::Engine, engine_tasks.wait()).await;
    stop_tasks.cancel();
    tasks.close();
    ending.run(Stage::Tasks, tasks.wait()).await;
    let left = ending.deadline(Stage::Nats).saturating_duration_since(Instant::now());
    if !nats.close(left).await {
        tracing::warn!("connection did not close in time");
    }
    tracing::info!(elapsed_ms = served.stop_begun.elapsed().as_millis() as u64, "worker stopped");
    served.result
}

/// A name that was never used before.
fn new_incarnation() -> Result<Incarnation, IdError> {
    // Half a random UUID: short in subjects, and still never the same twice.
    let random = uuid::Uuid::new_v4().simple().to_string();
    Incarnation::new(&random[..16])
}

fn engine_config(config: &WorkerConfig, probe: &Probe) -> EngineConfig {
    EngineConfig {
        engine: config.engine,
        models: config.model_files(),
        default_model: config.resolved_default_model(),
        silero_model: config.resolved_silero(),
        onnxruntime: config.resolved_onnxruntime(),
        decode_states: config.decode_states,
        decode_threads: config.decode_threads,
        use_gpu: probe.is_gpu(),
        simulated: config.simulated.clone(),
    }
}

impl Supervisor {
    /// Serves under one name after another, until told to stop.
    async fn serve_all(&self, names: watch::Sender<Incarnation>, shutdown: &CancellationToken) -> Ended {
        loop {
            let me = WorkerName { gpu_id: self.gpu_id.clone(), incarnation: names.borrow().clone() };
            let result = match self.serve(&me, shutdown).await {
                Ok(Served::Stopped { begun }) => return Ended { stop_begun: begun, result: Ok(()) },
                Ok(Served::Renew) => new_incarnation().map_err(WorkerError::from),
                Err(error) => Err(error),
            };
            match result {
                Ok(incarnation) => {
                    tracing::info!(was = %me.incarnation, now = %incarnation, "worker renewed");
                    names.send_replace(incarnation);
                }
                Err(error) => return Ended { stop_begun: Instant::now(), result: Err(error) },
            }
        }
    }
}

#[derive(Debug)]
struct Ended {
    stop_begun: Instant,
    result: Result<(), WorkerError>,
}
