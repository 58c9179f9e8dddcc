//! The supervisor: everything of a worker that speaks NATS. It never blocks and never computes.
//!
//! | task | does |
//! |---|---|
//! | heartbeat | one each second, from shared figures; it and control requests have a connection of their own |
//! | device | samples NVML or `/proc` |
//! | engine | keeps the child alive ([`crate::lifecycle`]) |
//! | relief | makes room where other tenants of the device grow ([`relief`]) |
//! | serve | control requests, the sessions' tasks, the pull ([`serve`]), jobs ([`jobs`]), loads ahead ([`ahead`]) |

mod ahead;
pub(crate) mod holdings;
mod jobs;
mod neighbours;
pub(crate) mod relief;
mod serve;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, Semaphore, watch},
    task::{JoinError, JoinSet},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use voxfleet_nats::{
    ConnectError, Nats, events::Events, log::AudioLog, media::Media, publish::Publisher, retry::Backoff,
    transcript::Chain,
};
use voxfleet_schema::id::{IdError, Incarnation, WorkerName};
use voxfleet_store::{
    fetch::{FetchError, Fetcher},
    models::ModelStore,
};
use voxfleet_trace::Tracer;

use self::{
    ahead::Ahead,
    holdings::Holdings,
    relief::{Follow, Relief},
    serve::{Reasons, Served},
};
use crate::{
    capacity::{Budget, HintPool},
    config::{Sharing, WorkerConfig},
    device::{DeviceError, Probe},
    heartbeat::{self, Identity, Named, Sources},
    http,
    ipc::{EngineConfig, EngineKind, ModelFile},
    job::{Kept, Means},
    lifecycle::{Engine, EngineTerms, Program, Waits},
    measures::Measures,
    memory::Memory,
    preempt,
    session::Shared,
    shutdown::{ShutdownBudget, Stage},
    stock::Stock,
};

/// Log reads under way at once.
const LOG_READS: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("configuration: {}", .0.join("; "))]
    Config(Vec<String>),
    #[error("device")]
    Device(#[from] DeviceError),
    #[error("preemption notices cannot be listened for")]
    Preemption(#[source] std::io::Error),
    #[error("recordings cannot be fetched")]
    Fetch(#[from] FetchError),
    #[error("a task of the worker failed")]
    Task(#[from] JoinError),
    #[error("cannot make a name for this worker")]
    Name(#[from] IdError),
    #[error("the connection to NATS is closed")]
    Disconnected,
    #[error("no connection for heartbeats")]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Fleet(#[from] voxfleet_nats::fleet::FleetError),
}

/// What serving needs.
#[derive(Clone)]
pub(crate) struct Supervisor {
    nats: Nats,
    /// For heartbeats and control requests: never behind audio, finals and results.
    own: Nats,
    config: Arc<WorkerConfig>,
    models: Arc<Vec<String>>,
    default_model: Arc<str>,
    stock: Stock,
    gpu_id: voxfleet_schema::id::GpuId,
    holdings: Arc<Holdings>,
    relief: Arc<Relief>,
    ahead: Ahead,
    engine: Engine,
    shared: Shared,
    means: Means,
    hints: HintPool,
}

/// Runs a worker until `shutdown`, or until it has been drained.
///
/// `store`: where models come from that are to be fetched; `tracer`: who is told what is done for sessions and jobs.
pub async fn run(
    nats: Nats,
    config: WorkerConfig,
    store: Option<ModelStore>,
    tracer: Tracer,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
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
    // Before the server is waited for, however long: what appears meanwhile is a notice.
    let preemption = preempt::Watch::open(&config.preemption).await.map_err(WorkerError::Preemption)?;
    let Some(own) = shutdown.run_until_cancelled(own_connection(&nats)).await else {
        return Ok(());
    };
    let own = own?;
    if config.gpu_id.is_none() && !probe.is_gpu() {
        let listening = neighbours::listen(&nats, &probe.host, None, config.heartbeat());
        let heard = shutdown.run_until_cancelled(listening).await;
        probe.rename_cpu(config.index, &heard.unwrap_or_default().names)?;
    }
    let probe = {
        let cache_dir = config.cache_dir.clone();
        let announce = move || {
            if let Some(cache_dir) = &cache_dir {
                probe.announce(cache_dir);
            }
            probe
        };
        tokio::task::spawn_blocking(announce).await?
    };
    let max_entry = nats.max_payload() as u64;
    let hint_bytes = (config.surplus_bytes() / 2).max(max_entry);
    let budget = Budget::new(config.share_bytes(), config.surplus_bytes().saturating_sub(hint_bytes));
    let engine_config = engine_config(&config, &probe, first_figures.total_mb);
    let models: Vec<String> = engine_config.models.iter().map(|m| m.name.clone()).collect();
    let default_model: Arc<str> = engine_config.default_model.as_str().into();
    let program = Program {
        exe: config.engine_exe.clone(),
        args: vec!["engine".to_owned()],
        visible_device: probe.visible_device().to_owned(),
        cores: probe.cores(&config),
        gpu: probe.gpu_id.as_str().into(),
    };
    let news = Arc::new(Notify::new());
    let stock = Stock::new(Arc::clone(&news));
    let wanted = engine_config.models.iter().filter(|m| config.prefetch.contains(&m.name)).cloned().collect();
    let measures = {
        let (config, device, kind) = (config.clone(), first_figures.clone(), engine_config.engine);
        let batched = |model: &&ModelFile| kind.of_model(model) == EngineKind::Ct2;
        let models: Vec<_> = engine_config.models.iter().filter(|model| !batched(model)).cloned().collect();
        let open = move || Measures::open(config.cache_dir.as_deref(), &device, &models, config.decode_states);
        tokio::task::spawn_blocking(open).await?
    };
    let first_uuid = first_figures.uuid.clone();
    let (figures, device) = watch::channel(first_figures.clone());
    let engine = Engine::new(engine_config, program, terms(&config), budget.clone(), device.clone(), Arc::clone(&news));
    let holdings = Arc::new(Holdings::new(config.slots, config.job_slots, Arc::clone(&news)));
    let publisher = Publisher::new(&nats);
    let (events, event_queue) = Events::new();
    let identity = Identity {
        gpu_id: probe.gpu_id.clone(),
        host: probe.host.clone(),
        provider: config.rent().provider,
        price_per_hour: config.price_per_hour,
    };
    tracing::info!(gpu = %identity.gpu_id, device = first_figures.name, slots = config.slots, "worker starts");

    let engine_tasks = TaskTracker::new();
    let stop_engine = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let shutdown = shutdown.child_token();
    let stop_tasks = CancellationToken::new();
    let (name, current) = watch::channel(Named::now(new_incarnation()?));
    let (preempted, preemptions) = watch::channel(None);
    engine_tasks.spawn({
        let (engine, stop) = (engine.clone(), stop_engine.clone());
        async move { engine.run(stop).await }
    });
    let relief = Arc::new(Relief::default());
    let config = Arc::new(config);
    let follow = Follow {
        relief: Arc::clone(&relief),
        config: Arc::clone(&config),
        default_model: Arc::clone(&default_model),
        engine: engine.clone(),
        holdings: Arc::clone(&holdings),
        device: device.clone(),
        news: Arc::clone(&news),
    };
    let sources = Sources {
        identity: identity.clone(),
        name: current.clone(),
        device: device.clone(),
        engine: engine.clone(),
        holdings: Arc::clone(&holdings),
        relief: Arc::clone(&relief),
        stock: stock.clone(),
        measures: measures.clone(),
        news,
        every: config.heartbeat(),
        told: watch::Sender::new(None),
    };
    tasks.spawn(http::run(nats.clone(), config.http.clone(), sources.told.subscribe(), stop_tasks.clone()));
    tasks.spawn(needed(shutdown.clone(), heartbeat::run(own.clone(), nats.clone(), sources, stop_tasks.clone())));
    tasks.spawn(needed(shutdown.clone(), follow.run(stop_tasks.clone())));
    tasks.spawn(needed(shutdown.clone(), heartbeat::sample_device(probe, engine.clone(), figures, stop_tasks.clone())));
    if let Some(store) = store {
        let (stock, stop) = (stock.clone(), stop_tasks.clone());
        tasks.spawn(async move { stock.fetch(store, wanted, stop).await });
    }
    let memory = Memory::new(device.clone());
    tasks.spawn(measures.clone().run(engine.clone(), device.clone(), stop_tasks.clone()));
    tasks.spawn(needed(shutdown.clone(), memory.clone().run(engine.clone(), stop_tasks.clone())));
    tasks.spawn({
        let (nats, publisher) = (nats.clone(), publisher.clone());
        needed(shutdown.clone(), async move { event_queue.run(&nats, &publisher).await })
    });
    tasks.spawn({
        let (nats, me, stop, every) = (nats.clone(), identity.clone(), stop_tasks.clone(), config.heartbeat());
        let uuid = first_uuid;
        async move {
            let listening = neighbours::listen(&nats, &me.host, uuid.as_deref(), every);
            let Some(heard) = stop.run_until_cancelled(listening).await else { return };
            if heard.names.contains(&me.gpu_id) {
                tracing::warn!(gpu = %me.gpu_id, "another worker of this host has the same gpu_id, one of them will be superseded");
            }
            if !heard.on_device.is_empty() {
                tracing::warn!(gpu = %me.gpu_id, uuid, others = ?heard.on_device, "other workers are on this device: all of them share its memory");
            }
        }
    });

    tasks.spawn({
        let stop = stop_tasks.clone();
        async move {
            if let Some(what) = stop.run_until_cancelled(preemption.notice()).await {
                preempted.send_replace(Some(what));
            }
        }
    });

    let kept = Kept::default();
    tasks.spawn(kept.clone().run(stop_tasks.clone()));
    let shared = Shared {
        chain: Chain::new(&nats),
        log: AudioLog::new(&nats),
        publisher,
        events,
        engine: engine.clone(),
        budget,
        log_reads: Arc::new(Semaphore::new(LOG_READS)),
        max_entry,
        name: current,
        tracer,
    };
    let media = Media::new(&nats);
    let supervisor = Supervisor {
        nats: nats.clone(),
        own: own.clone(),
        models: Arc::new(models),
        default_model,
        stock,
        gpu_id: identity.gpu_id.clone(),
        holdings,
        relief,
        ahead: Ahead::default(),
        means: Means {
            shared: shared.clone(),
            fetcher: Fetcher::new(config.fetch.clone(), media.clone())?,
            media,
            limits: config.decoding(),
            exe: config.engine_exe.clone(),
            rent: config.rent(),
            memory,
            nats: nats.clone(),
            split: config.split(),
            kept,
        },
        shared,
        engine,
        hints: HintPool::new(hint_bytes, max_entry),
        config,
    };
    let ended = supervisor.serve_all(name, Reasons::new(&shutdown, preemptions)).await;
    let ending = ended.budget;
    // Senders of events go with it.
    drop(supervisor);

    stop_engine.cancel();
    engine_tasks.close();
    ending.run(Stage::Engine, engine_tasks.wait()).await;
    stop_tasks.cancel();
    let mut result = ended.result;
    ending.run(Stage::Tasks, all_ended(&mut tasks, &mut result)).await;
    let left = ending.deadline(Stage::Nats).saturating_duration_since(Instant::now());
    let (main_closed, own_closed) = tokio::join!(nats.close(left), own.close(left));
    if !(main_closed && own_closed) {
        tracing::warn!("connections did not close in time");
    }
    tracing::info!(elapsed_ms = ending.elapsed().as_millis() as u64, "worker stopped");
    result
}

/// A task that the worker is of no use without: a panic in it stops the worker in order, so that whatever runs it starts it
/// anew.
async fn needed(shutdown: CancellationToken, task: impl Future<Output = ()>) {
    let panicked = shutdown.drop_guard();
    task.await;
    panicked.disarm();
}

/// Waits for all tasks; the first that failed is the reason why the worker ends, where there is no other.
async fn all_ended(tasks: &mut JoinSet<()>, result: &mut Result<(), WorkerError>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a task of the worker failed");
            if result.is_ok() {
                *result = Err(error.into());
            }
        }
    }
}

/// Connects once more; repeats while no server answers, as the first connection does when it is lost.
async fn own_connection(nats: &Nats) -> Result<Nats, WorkerError> {
    let mut backoff = Backoff::default();
    loop {
        match nats.sibling("voxfleet-worker-heartbeat").await {
            Ok(own) => return Ok(own),
            Err(error @ ConnectError::Unreachable { .. }) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "no connection for heartbeats yet, trying again"
                );
                backoff.wait().await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A name that was never used before.
fn new_incarnation() -> Result<Incarnation, IdError> {
    // Half a random UUID: short in subjects, and still never the same twice.
    let random = uuid::Uuid::new_v4().simple().to_string();
    Incarnation::new(&random[..16])
}

fn terms(config: &WorkerConfig) -> EngineTerms {
    EngineTerms {
        slots: (config.slots + config.job_slots) as usize,
        stuck_after: Duration::from_millis(config.engine_stuck_ms),
        idle_release: Some(Duration::from_millis(config.idle_release_ms)).filter(|after| !after.is_zero()),
        swap: config.sharing == Sharing::Swap,
        waits: Waits {
            after: Duration::from_millis(config.restore_after_ms),
            driver: Duration::from_millis(config.restore_driver_after_ms),
        },
        reserve_percent: config.memory_reserve_percent,
    }
}

fn engine_config(config: &WorkerConfig, probe: &Probe, total_mb: u64) -> EngineConfig {
    EngineConfig {
        engine: config.engine,
        models: config.model_files(),
        default_model: config.resolved_default_model(),
        silero_model: config.resolved_silero(),
        onnxruntime: config.resolved_onnxruntime(),
        // Each engine is told its share of the cores when it starts.
        decode_states: config.decode_states,
        decode_threads: config.decode_threads,
        use_gpu: probe.is_gpu(),
        reserve_mb: config.reserve_mb(total_mb),
        turns: config.turns(),
        diarize: config.diarize(),
        ct2: config.ct2(),
        simulated: config.simulated.clone(),
    }
}

impl Supervisor {
    /// Serves under one name after another, until told to stop.
    async fn serve_all(&self, names: watch::Sender<Named>, mut reasons: Reasons) -> Ended {
        loop {
            let me = WorkerName { gpu_id: self.gpu_id.clone(), incarnation: names.borrow().incarnation.clone() };
            let result = match self.serve(&me, &mut reasons).await {
                Ok(Served::Stopped(budget)) => return Ended { budget, result: Ok(()) },
                Ok(Served::Renew) => new_incarnation().map_err(WorkerError::from),
                Err(error) => Err(error),
            };
            match result {
                Ok(incarnation) => {
                    tracing::info!(was = %me.incarnation, now = %incarnation, "worker renewed");
                    names.send_replace(Named::now(incarnation));
                }
                Err(error) => return Ended { budget: self.shutdown_budget(), result: Err(error) },
            }
        }
    }

    /// For a stop that begins now.
    fn shutdown_budget(&self) -> ShutdownBudget {
        let total = self.config.shutdown();
        ShutdownBudget::begin(Instant::now(), total, total)
    }
}

#[derive(Debug)]
struct Ended {
    budget: ShutdownBudget,
    result: Result<(), WorkerError>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_stops_the_worker_and_one_that_ends_does_not() {
        let shutdown = CancellationToken::new();
        let (mut tasks, mut result) = (JoinSet::new(), Ok(()));
        tasks.spawn(needed(shutdown.clone(), async {}));
        all_ended(&mut tasks, &mut result).await;
        assert!(result.is_ok() && !shutdown.is_cancelled());
        tasks.spawn(needed(shutdown.clone(), async { panic!("thrown") }));
        tasks.spawn(needed(shutdown.clone(), async {}));
        all_ended(&mut tasks, &mut result).await;
        assert!(matches!(result, Err(WorkerError::Task(error)) if error.is_panic()));
        assert!(shutdown.is_cancelled());
    }
}
