//! A whole fleet on one machine: server, dispatcher, workers, all real processes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use async_nats::jetstream;
use futures_util::{StreamExt, TryStreamExt};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

use crate::{
    Error, Result,
    child::Child,
    find,
    process::{Dispatcher, Settings, Worker},
    server::{Cluster, NatsServer, ServerOptions},
    wait::eventually,
};

const READY_DEADLINE: Duration = Duration::from_secs(60);

/// One fleet at a time in this process: two cores do not carry two, and their timings would mean nothing.
pub async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

/// Which engine the workers run.
#[derive(Debug, Clone, PartialEq)]
pub enum Engine {
    /// Deterministic text from the samples; `speed` in audio seconds per second, 0 = no delay. With the energy-based
    /// detector, which hears noise as speech.
    Simulated { speed: f64 },
    /// The small Whisper model of `tests/models`, with the Silero detector if it is in the cache.
    Micro,
    /// The same with the energy-based detector.
    MicroEnergy,
}

/// Which servers carry it.
pub enum Servers {
    One(NatsServer),
    Many(Cluster),
    /// Somebody else's, or through a relay.
    Elsewhere(Vec<String>),
}

impl Servers {
    pub fn urls(&self) -> Vec<String> {
        match self {
            Servers::One(server) => vec![server.url()],
            Servers::Many(cluster) => cluster.urls(),
            Servers::Elsewhere(urls) => urls.clone(),
        }
    }
}

/// What fleet to start.
pub struct FleetBuilder {
    workers: usize,
    dispatchers: usize,
    slots: u32,
    engine: Engine,
    settings: Settings,
    options: ServerOptions,
    servers: Option<Servers>,
}

impl FleetBuilder {
    pub fn workers(mut self, n: usize) -> Self {
        self.workers = n;
        self
    }

    pub fn dispatchers(mut self, n: usize) -> Self {
        self.dispatchers = n;
        self
    }

    /// Sessions each worker holds at once.
    pub fn slots(mut self, n: u32) -> Self {
        self.slots = n;
        self
    }

    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// Any setting of any process, by its dotted name.
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        self.settings = self.settings.with(key, value);
        self
    }

    pub fn server_options(mut self, options: ServerOptions) -> Self {
        self.options = options;
        self
    }

    /// On these servers instead of one of its own.
    pub fn on(mut self, servers: Servers) -> Self {
        self.servers = Some(servers);
        self
    }

    /// Starts everything and waits until each worker beats, is ready, and has its consumer.
    pub async fn start(self) -> Result<Fleet> {
        let dir =
            tempfile::Builder::new().prefix("voxfleet-fleet-").tempdir().map_err(Error::io("temporary folder"))?;
        let servers = match self.servers {
            Some(servers) => servers,
            None => Servers::One(NatsServer::start_with(self.options).await?),
        };
        let urls = servers.urls();
        let settings = Settings::new().with("nats.urls", urls.join(",")).and(&self.settings);
        let worker_settings = engine_settings(&self.engine, dir.path())
            .with("worker.slots", self.slots)
            .with("worker.gpu", "none")
            .and(&settings);
        let client = async_nats::connect(urls).await.map_err(Error::nats("connecting to the fleet's server"))?;
        let mut fleet = Fleet {
            workers: Vec::new(),
            dispatchers: Vec::new(),
            servers,
            js: jetstream::new(client),
            settings,
            worker_settings,
            dir,
        };
        for n in 1..=self.dispatchers {
            let name = format!("dispatcher-{n}");
            fleet.dispatchers.push(Dispatcher::start(&name, &fleet.settings, fleet.dir.path())?);
        }
        for n in 1..=self.workers {
            fleet.add_worker(&format!("gpu-{n}"))?;
        }
        fleet.wait_ready().await?;
        Ok(fleet)
    }
}

fn engine_settings(engine: &Engine, dir: &Path) -> Settings {
    // Without a cache the Silero detector is not found, so the energy-based one serves.
    let energy = |settings: Settings| settings.with("worker.cache_dir", dir.display());
    let micro = || Settings::new().with("worker.models_dir", models_dir().display()).with("worker.decode_states", 1);
    match engine {
        Engine::Simulated { speed } => {
            energy(Settings::new().with("worker.engine", "simulated").with("worker.simulated.speed", speed))
        }
        Engine::Micro => micro(),
        Engine::MicroEnergy => energy(micro()),
    }
}

/// Folder of the small test models.
pub fn models_dir() -> PathBuf {
    find::root().join("tests/models")
}

/// Workers, dispatchers and servers; all end when it is dropped, in this order.
pub struct Fleet {
    pub workers: Vec<Worker>,
    pub dispatchers: Vec<Dispatcher>,
    pub servers: Servers,
    js: jetstream::Context,
    settings: Settings,
    worker_settings: Settings,
    dir: TempDir,
}

impl Fleet {
    /// One dispatcher, two simulated workers of 64 slots that decode without delay.
    pub fn builder() -> FleetBuilder {
        FleetBuilder {
            workers: 2,
            dispatchers: 1,
            slots: 64,
            engine: Engine::Simulated { speed: 0.0 },
            settings: Settings::new(),
            options: ServerOptions::default(),
            servers: None,
        }
    }

    /// Plain access for producers and checks.
    pub fn js(&self) -> jetstream::Context {
        self.js.clone()
    }

    pub fn client(&self) -> async_nats::Client {
        self.js.client()
    }

    pub fn urls(&self) -> Vec<String> {
        self.servers.urls()
    }

    pub fn url(&self) -> String {
        self.urls().into_iter().next().unwrap_or_default()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What every process of this fleet is told.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Starts one more worker; [`Self::wait_ready`] waits for it.
    pub fn add_worker(&mut self, gpu_id: &str) -> Result<&mut Worker> {
        self.workers.push(Worker::start(gpu_id, &self.worker_settings, self.dir.path())?);
        self.workers.last_mut().ok_or_else(|| Error::Wrong("a worker just added is gone".to_owned()))
    }

    /// The single server, for faults on it.
    pub fn server(&mut self) -> Result<&mut NatsServer> {
        match &mut self.servers {
            Servers::One(server) => Ok(server),
            _ => Err(Error::Wrong("this fleet has no single server of its own".to_owned())),
        }
    }

    /// Waits until each worker beats with a usable engine and has its consumer.
    pub async fn wait_ready(&mut self) -> Result<()> {
        let mut beats = self.client().subscribe("asr.v1.heartbeat.*").await.map_err(Error::nats("heartbeats"))?;
        let mut ready: BTreeMap<String, String> = BTreeMap::new();
        let started = std::time::Instant::now();
        loop {
            if let Ok(Some(message)) = tokio::time::timeout(Duration::from_millis(200), beats.next()).await
                && let Ok(beat) = serde_json::from_slice::<Value>(&message.payload)
                && let (Some(gpu), Some(incarnation)) = (beat["gpu_id"].as_str(), beat["incarnation"].as_str())
                // Down is as good as ready: an idle engine is started by its first session.
                && matches!(beat["engine"]["state"].as_str(), Some("ready" | "down"))
            {
                ready.insert(gpu.to_owned(), incarnation.to_owned());
            }
            for child in self.children() {
                child.check_alive()?;
            }
            if self.workers.iter().all(|w| ready.contains_key(w.gpu_id())) && self.has_consumers(&ready).await {
                return Ok(());
            }
            if started.elapsed() > READY_DEADLINE {
                let logs: String = self.children().map(|c| format!("---- {}\n{}\n", c.name(), c.log_tail())).collect();
                return Err(Error::Wrong(format!(
                    "fleet not ready within {READY_DEADLINE:?}; ready: {ready:?}\n{logs}"
                )));
            }
        }
    }

    async fn has_consumers(&self, ready: &BTreeMap<String, String>) -> bool {
        let Ok(stream) = self.js.get_stream_no_info("ASR_LIVE").await else { return false };
        let Ok(names) = stream.consumer_names().try_collect::<Vec<String>>().await else { return false };
        self.workers
            .iter()
            .filter_map(|w| ready.get(w.gpu_id()))
            .all(|incarnation| names.iter().any(|name| name.contains(incarnation.as_str())))
    }

    fn children(&mut self) -> impl Iterator<Item = &mut Child> {
        let workers = self.workers.iter_mut().map(|w| &mut **w);
        workers.chain(self.dispatchers.iter_mut().map(|d| &mut **d))
    }

    /// An error if any process has ended by itself.
    pub fn check_alive(&mut self) -> Result<()> {
        self.children().try_for_each(Child::check_alive)
    }

    /// Waits until the session's chain has an end final; gives its text.
    pub async fn wait_end(&self, session: &str, deadline: Duration) -> Result<String> {
        wait_end(&self.js, session, deadline).await
    }

    /// The newest logs of all processes, for a failing test's message.
    pub fn logs(&self) -> String {
        let workers = self.workers.iter().map(|w| &**w);
        let children = workers.chain(self.dispatchers.iter().map(|d| &**d));
        children.map(|c| format!("---- {}\n{}\n", c.name(), c.log_tail())).collect()
    }
}

/// Waits until the session's chain has an end final; gives its whole text.
pub async fn wait_end(js: &jetstream::Context, session: &str, deadline: Duration) -> Result<String> {
    let subject = format!("asr.v1.transcript.session.{session}.final");
    let stream = js.get_stream_no_info("ASR_TRANSCRIPT").await.map_err(Error::nats("ASR_TRANSCRIPT"))?;
    eventually(format!("end final of {session}"), deadline, || async {
        let last = stream.get_last_raw_message_by_subject(&subject).await.ok()?;
        let last: Value = serde_json::from_slice(&last.payload).ok()?;
        (last["end"] == true).then_some(())
    })
    .await?;
    Ok(crate::checker::finals(js, session)
        .await?
        .iter()
        .map(|f| f.text())
        .filter(|t| !t.is_empty())
        .collect::<Vec<_>>()
        .join(" "))
}
