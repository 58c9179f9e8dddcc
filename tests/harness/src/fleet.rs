//! A whole fleet on one machine: server, dispatcher, workers, all real processes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_nats::jetstream;
use futures_util::{StreamExt, TryStreamExt};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{
    Error, Result,
    child::Child,
    find,
    login::{Keys, Login},
    process::{Dispatcher, Settings, Worker},
    relay::Relay,
    server::{Cluster, NatsServer, ServerOptions},
    wait::eventually,
    wire::Tamper,
};

const READY_DEADLINE: Duration = Duration::from_secs(60);

/// How many fleets without timing of their own run at once; what they mostly do is wait for a death to be noticed.
const PLACES: u32 = 3;

static MACHINE: Semaphore = Semaphore::const_new(PLACES as usize);

/// The whole machine: two cores do not carry another fleet beside one that is timed or decodes with a real model.
pub async fn turn() -> Option<SemaphorePermit<'static>> {
    // Never closed, so there always is one.
    MACHINE.acquire_many(PLACES).await.ok()
}

/// A place beside others, for a small simulated fleet whose test asks what happens and not how fast.
pub async fn place() -> Option<SemaphorePermit<'static>> {
    MACHINE.acquire().await.ok()
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
    /// The same model in CTranslate2, as [`Engine::Micro`] otherwise; [`has_ct2`] says whether the binary has it.
    Ct2,
}

/// Which servers carry it.
pub enum Servers {
    One(Box<NatsServer>),
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
    through: Through,
    worker_env: Vec<(String, String)>,
    logins: Option<Logins>,
    binary: Option<PathBuf>,
}

/// Who the parts of a fleet are to a server with accounts.
#[derive(Debug, Clone)]
struct Logins {
    dispatcher: Login,
    worker: Login,
    /// Of whoever looks at it.
    operator: Login,
}

/// Whether processes speak to their servers through relays, and who looks at what they publish.
#[derive(Clone, Default)]
struct Through {
    relays: bool,
    dispatchers: Option<Arc<dyn Tamper>>,
    workers: Option<Arc<dyn Tamper>>,
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

    /// Each process through a relay of its own, for [`Fleet::relay`].
    pub fn through_relays(mut self) -> Self {
        self.through.relays = true;
        self
    }

    /// The same, and what dispatchers publish passes through these hands.
    pub fn tamper_dispatchers(mut self, tamper: impl Tamper + 'static) -> Self {
        self.through.dispatchers = Some(Arc::new(tamper));
        self.through_relays()
    }

    /// The same with what workers publish.
    pub fn tamper_workers(mut self, tamper: impl Tamper + 'static) -> Self {
        self.through.workers = Some(Arc::new(tamper));
        self.through_relays()
    }

    /// A further environment variable of every worker.
    pub fn worker_env(mut self, name: &str, value: &str) -> Self {
        self.worker_env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Each process with the login of its role in this account; the fleet's own client is an operator.
    pub fn of_account(mut self, keys: &Keys, account: &str) -> Self {
        let login = |role: &str| keys.login(account, role);
        self.logins =
            Some(Logins { dispatcher: login("dispatcher"), worker: login("worker"), operator: login("operator") });
        self
    }

    /// Every process is this binary, until [`Fleet::use_binary`] says otherwise.
    pub fn binary(mut self, path: PathBuf) -> Self {
        self.binary = Some(path);
        self
    }

    /// Starts everything and waits until each worker beats, is ready, and has its consumer.
    pub async fn start(self) -> Result<Fleet> {
        let dir =
            tempfile::Builder::new().prefix("voxfleet-fleet-").tempdir().map_err(Error::io("temporary folder"))?;
        let servers = match self.servers {
            Some(servers) => servers,
            None => Servers::One(Box::new(NatsServer::start_with(self.options).await?)),
        };
        let urls = servers.urls();
        let settings = Settings::new().with("nats.urls", urls.join(",")).and(&self.settings);
        let worker_settings = engine_settings(&self.engine, dir.path())
            .with("worker.slots", self.slots)
            .with("worker.gpu", "none")
            .and(&settings);
        let (settings, worker_settings, client) = match self.logins {
            None => {
                // A server that stands still is noticed within seconds.
                let options = async_nats::ConnectOptions::new().ping_interval(Duration::from_secs(2));
                let client = options.connect(urls).await.map_err(Error::nats("connecting to the fleet's server"))?;
                (settings, worker_settings, client)
            }
            Some(Logins { dispatcher, worker, operator }) => {
                let (client, _) = operator.connect(urls).await?;
                (settings.and(&dispatcher.settings()), worker_settings.and(&worker.settings()), client)
            }
        };
        let mut fleet = Fleet {
            workers: Vec::new(),
            dispatchers: Vec::new(),
            servers,
            js: jetstream::new(client),
            settings,
            worker_settings,
            through: self.through,
            relays: BTreeMap::new(),
            worker_env: self.worker_env,
            binary: self.binary,
            dispatcher_starts: 0,
            dir,
        };
        for n in 1..=self.dispatchers {
            fleet.relay_for(&format!("dispatcher-{n}")).await?;
            let dispatcher = fleet.start_dispatcher(n)?;
            fleet.dispatchers.push(dispatcher);
        }
        for n in 1..=self.workers {
            fleet.relay_for(&format!("gpu-{n}")).await?;
            fleet.add_worker(&format!("gpu-{n}"))?;
        }
        fleet.wait_ready().await?;
        Ok(fleet)
    }
}

fn engine_settings(engine: &Engine, dir: &Path) -> Settings {
    // Without a cache the Silero detector is not found, so the energy-based one serves.
    let energy = |settings: Settings| settings.with("worker.cache_dir", dir.display());
    // One thread: workers that start together do not see each other, and each would take the cores for itself.
    let micro = || {
        let one = Settings::new().with("worker.decode_states", 1).with("worker.decode_threads", 1);
        one.with("worker.models_dir", models_dir().display())
    };
    match engine {
        Engine::Simulated { speed } => {
            energy(Settings::new().with("worker.engine", "simulated").with("worker.simulated.speed", speed))
        }
        Engine::Micro => micro(),
        Engine::MicroEnergy => energy(micro()),
        Engine::Ct2 => micro().with("worker.engine", "ct2"),
    }
}

/// Whether the binary under test was built with the batched engine.
pub fn has_ct2() -> Result<bool> {
    let said = std::process::Command::new(find::voxfleet()?).arg("--version").output();
    let said = said.map_err(|e| Error::Wrong(format!("voxfleet --version: {e}")))?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let engines = said.lines().find_map(|line| line.strip_prefix("engines: "));
    let engines = engines.ok_or_else(|| Error::Wrong(format!("voxfleet --version names no engines: {said}")))?;
    Ok(engines.split(", ").any(|engine| engine == "ct2"))
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
    through: Through,
    relays: BTreeMap<String, Relay>,
    worker_env: Vec<(String, String)>,
    /// None: the one that was built.
    binary: Option<PathBuf>,
    dispatcher_starts: u32,
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
            through: Through::default(),
            worker_env: Vec::new(),
            logins: None,
            binary: None,
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

    /// What every process of this fleet is told; with accounts, what its dispatchers are.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The same for its workers, without their names.
    pub fn worker_settings(&self) -> &Settings {
        &self.worker_settings
    }

    /// Starts one more worker; [`Self::wait_ready`] waits for it.
    pub fn add_worker(&mut self, gpu_id: &str) -> Result<&mut Worker> {
        let worker = self.start_worker(gpu_id)?;
        self.workers.push(worker);
        self.workers.last_mut().ok_or_else(|| Error::Wrong("a worker just added is gone".to_owned()))
    }

    fn start_worker(&self, gpu_id: &str) -> Result<Worker> {
        let settings = self.reached_by(gpu_id, &self.worker_settings);
        Worker::start_at(&self.program()?, gpu_id, &settings, self.dir.path(), &self.worker_env)
    }

    fn program(&self) -> Result<PathBuf> {
        match &self.binary {
            Some(path) => Ok(path.clone()),
            None => Ok(find::voxfleet()?),
        }
    }

    /// What is started from now on is this binary; none = the one that was built.
    pub fn use_binary(&mut self, path: Option<PathBuf>) {
        self.binary = path;
    }

    /// What is started from now on is told this.
    pub fn set_later(&mut self, key: &str, value: impl ToString) {
        let value = value.to_string();
        self.settings = self.settings.clone().with(key, &value);
        self.worker_settings = self.worker_settings.clone().with(key, &value);
    }

    /// A name of its own for each start: logs and `fleet.status` tell them apart.
    fn start_dispatcher(&mut self, n: usize) -> Result<Dispatcher> {
        let name = format!("dispatcher-{n}");
        self.dispatcher_starts += 1;
        let settings = self.reached_by(&name, &self.settings);
        let settings = settings.with("dispatcher.name", format!("{name}-{}", self.dispatcher_starts));
        Dispatcher::start_at(&self.program()?, &name, &settings, self.dir.path())
    }

    /// Settings with the address of this process's relay, if it has one.
    fn reached_by(&self, name: &str, settings: &Settings) -> Settings {
        match self.relays.get(name) {
            Some(relay) => settings.clone().with("nats.urls", relay.url()),
            None => settings.clone(),
        }
    }

    async fn relay_for(&mut self, name: &str) -> Result<()> {
        if self.through.relays {
            let tamper = if name.starts_with("dispatcher") { &self.through.dispatchers } else { &self.through.workers };
            let relay = Relay::start_with(&self.servers.urls(), tamper.clone()).await?;
            self.relays.insert(name.to_owned(), relay);
        }
        Ok(())
    }

    /// The relay of `dispatcher-1`, `gpu-1`, ..., for faults between it and the servers.
    pub fn relay(&self, name: &str) -> Result<&Relay> {
        self.relays.get(name).ok_or_else(|| Error::Wrong(format!("{name} has no relay")))
    }

    pub fn relays(&self) -> impl Iterator<Item = (&String, &Relay)> {
        self.relays.iter()
    }

    /// A new process with the name and device of worker `i`, which is killed if it still runs.
    pub fn restart_worker(&mut self, i: usize) -> Result<()> {
        self.workers[i].kill9()?;
        let gpu_id = self.workers[i].gpu_id().to_owned();
        self.workers[i] = self.start_worker(&gpu_id)?;
        Ok(())
    }

    /// A new process in the place of dispatcher `i`, which is killed if it still runs.
    pub fn restart_dispatcher(&mut self, i: usize) -> Result<()> {
        self.dispatchers[i].kill9()?;
        self.dispatchers[i] = self.start_dispatcher(i + 1)?;
        Ok(())
    }

    /// Which of the dispatchers is active.
    pub async fn leader(&self) -> Option<usize> {
        let status = crate::probe_api::fleet_status(&self.client()).await?;
        let number = status["dispatcher"].as_str()?.strip_prefix("dispatcher-")?.split('-').next()?;
        number.parse::<usize>().ok()?.checked_sub(1).filter(|i| *i < self.dispatchers.len())
    }

    /// Server `i` of however many there are.
    pub fn server_at(&mut self, i: usize) -> Result<&mut NatsServer> {
        match &mut self.servers {
            Servers::One(server) => Ok(server),
            Servers::Many(cluster) if i < cluster.servers().len() => Ok(cluster.server(i)),
            _ => Err(Error::Wrong("this server is not the fleet's own".to_owned())),
        }
    }

    /// Which server leads `stream`; the first where there is one only.
    pub async fn leader_of(&self, stream: &str) -> Result<usize> {
        match &self.servers {
            Servers::Many(cluster) => {
                let leader = cluster.leader_of(stream).await?;
                leader.ok_or_else(|| Error::Wrong(format!("{stream} has no leader")))
            }
            _ => Ok(0),
        }
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

    /// Writes the whole log of each process into this folder.
    pub fn keep_logs(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder.display().to_string()))?;
        let workers = self.workers.iter().map(|w| &**w);
        for child in workers.chain(self.dispatchers.iter().map(|d| &**d)) {
            let path = folder.join(format!("{}.log", child.name()));
            std::fs::write(&path, child.log()).map_err(Error::io(path.display().to_string()))?;
        }
        Ok(())
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
