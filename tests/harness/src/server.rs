//! A nats-server of one's own on 127.0.0.1, with its store in a temporary folder.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use async_nats::jetstream;
use tempfile::TempDir;

use crate::{Error, Result, child::Child, find, ports::free_port, wait::eventually};

/// What all our servers share.
const DEV_CONF: &str = include_str!("../../../nats/conf/dev.conf");

const START_DEADLINE: Duration = Duration::from_secs(15);
const CLUSTER_DEADLINE: Duration = Duration::from_secs(60);

/// What differs from a plain server with JetStream.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    pub jetstream: bool,
    /// Bytes; none = what `nats/conf/dev.conf` says (4 MiB).
    pub max_payload: Option<usize>,
    /// Text put behind the configuration file; it wins over what stands there.
    pub extra: String,
    /// Use exactly this binary.
    pub binary: Option<PathBuf>,
    /// Largest file it may write, in bytes (`ulimit -f`).
    pub file_limit: Option<u64>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { jetstream: true, max_payload: None, extra: String::new(), binary: None, file_limit: None }
    }
}

/// One running nats-server. Dropping it kills it and removes its store.
pub struct NatsServer {
    child: Child,
    plan: Plan,
    // Last: the store goes when the process is gone.
    dir: TempDir,
}

/// Everything needed to start the same server again.
#[derive(Debug, Clone)]
struct Plan {
    binary: PathBuf,
    name: String,
    port: u16,
    jetstream: bool,
    cluster: Option<(u16, Vec<u16>)>,
    file_limit: Option<u64>,
    /// Elsewhere than in the server's own folder.
    store: Option<PathBuf>,
}

impl NatsServer {
    pub async fn start() -> Result<Self> {
        Self::start_with(ServerOptions::default()).await
    }

    pub async fn start_with(options: ServerOptions) -> Result<Self> {
        Self::launch(&options, "n1", free_port()?, None).await
    }

    async fn launch(options: &ServerOptions, name: &str, port: u16, cluster: Option<(u16, Vec<u16>)>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("voxfleet-nats-").tempdir().map_err(Error::io("temporary folder"))?;
        let binary = match &options.binary {
            Some(path) => path.clone(),
            None => find::nats_server()?,
        };
        let plan = Plan {
            binary,
            name: name.to_owned(),
            port,
            jetstream: options.jetstream,
            cluster,
            file_limit: options.file_limit,
            store: None,
        };
        std::fs::write(dir.path().join("server.conf"), config(options)).map_err(Error::io("server.conf"))?;
        let child = plan.launch(dir.path())?;
        let mut server = Self { child, plan, dir };
        server.wait_ready().await?;
        Ok(server)
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let ports = self.dir.path().join(format!("nats-server_{}.ports", self.child.pid()));
        let child = &mut self.child;
        eventually("nats-server writes its ports file", START_DEADLINE, || {
            // Written in place: a half-written file is not JSON yet.
            let listening = std::fs::read(&ports)
                .ok()
                .and_then(|b| serde_json::from_slice::<serde_json::Value>(&b).ok())
                .is_some_and(|v| v["nats"].is_array());
            let done = match child.check_alive() {
                Err(e) => Some(Err(e)),
                Ok(()) => listening.then_some(Ok(())),
            };
            std::future::ready(done)
        })
        .await?
    }

    /// `nats://127.0.0.1:<port>`; the same after a restart.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.plan.port)
    }

    pub fn port(&self) -> u16 {
        self.plan.port
    }

    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Folder of store, configuration and log.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn log(&self) -> String {
        self.child.log()
    }

    /// False once it has ended, by whatever.
    pub fn is_running(&mut self) -> bool {
        self.child.ended().is_none()
    }

    /// Folder of its streams.
    pub fn store(&self) -> PathBuf {
        self.plan.store(self.dir.path())
    }

    /// Its streams are here from the next start on: a server that has moved, and is reached under its old name.
    pub fn store_at(&mut self, store: &Path) {
        self.plan.store = Some(store.to_owned());
    }

    /// Lifts the limit of [`ServerOptions::file_limit`]; it counts from the next start.
    pub fn lift_file_limit(&mut self) {
        self.plan.file_limit = None;
    }

    /// A plain client.
    pub async fn client(&self) -> Result<async_nats::Client> {
        async_nats::connect(self.url()).await.map_err(Error::nats("connecting to the test server"))
    }

    pub async fn jetstream(&self) -> Result<jetstream::Context> {
        Ok(jetstream::new(self.client().await?))
    }

    /// SIGKILL and reap. [`Self::restart`] brings it back with its store and its port.
    pub fn kill9(&mut self) -> Result<()> {
        self.child.kill9()
    }

    /// SIGTERM: an orderly shutdown.
    pub async fn shut_down(&mut self) -> Result<()> {
        self.child.terminate(START_DEADLINE).await.map(drop)
    }

    /// SIGUSR2: lame duck mode, clients are asked to leave, then it ends.
    pub fn lame_duck(&mut self) -> Result<()> {
        self.child.signal(rustix::process::Signal::USR2)
    }

    /// Kills it if it runs and starts it again: same port, same store.
    pub async fn restart(&mut self) -> Result<()> {
        self.child.kill9()?;
        self.start_again().await
    }

    /// Starts it again after [`Self::kill9`] or [`Self::shut_down`].
    pub async fn start_again(&mut self) -> Result<()> {
        self.child = self.plan.launch(self.dir.path())?;
        self.wait_ready().await
    }

    /// SIGSTOP: connections stay open, nothing answers.
    pub fn stop(&mut self) -> Result<()> {
        self.child.stop()
    }

    pub fn cont(&mut self) -> Result<()> {
        self.child.cont()
    }
}

impl Plan {
    fn store(&self, dir: &Path) -> PathBuf {
        self.store.clone().unwrap_or_else(|| dir.join("store"))
    }

    fn launch(&self, dir: &Path) -> Result<Child> {
        let mut command = match self.file_limit {
            None => Command::new(&self.binary),
            Some(bytes) => {
                let mut limited = Command::new("prlimit");
                limited.arg(format!("--fsize={bytes}")).arg(&self.binary);
                limited
            }
        };
        command.arg("-c").arg(dir.join("server.conf"));
        command.args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-n", &self.name]);
        command.arg("--ports_file_dir").arg(dir);
        if self.jetstream {
            command.arg("-js").arg("-sd").arg(self.store(dir));
        }
        if let Some((own, all)) = &self.cluster {
            let routes: Vec<String> =
                all.iter().filter(|p| *p != own).map(|p| format!("nats://127.0.0.1:{p}")).collect();
            command.args(["--cluster_name", "voxfleet-test", "--cluster", &format!("nats://127.0.0.1:{own}")]);
            command.args(["--routes", &routes.join(",")]);
        }
        Child::start(format!("nats-server {}", self.name), command, &dir.join("server.log"))
    }
}

/// What all share, then what this one wants otherwise. Later keys win.
fn config(options: &ServerOptions) -> String {
    let mut text = if options.jetstream { DEV_CONF.to_owned() } else { String::new() };
    if let Some(bytes) = options.max_payload {
        text.push_str(&format!("\nmax_payload: {bytes}\n"));
    }
    text.push('\n');
    text.push_str(&options.extra);
    text.push('\n');
    text
}

/// Three (or any number of) servers with routes to each other.
pub struct Cluster {
    servers: Vec<NatsServer>,
}

impl Cluster {
    /// Starts `n` servers and waits until a stream with `n` replicas can be made.
    pub async fn start(n: usize) -> Result<Self> {
        Self::start_with(n, ServerOptions::default()).await
    }

    pub async fn start_with(n: usize, options: ServerOptions) -> Result<Self> {
        let routes = (0..n).map(|_| free_port()).collect::<Result<Vec<_>>>()?;
        let mut servers = Vec::with_capacity(n);
        for (i, own) in routes.iter().enumerate() {
            let name = format!("n{}", i + 1);
            let cluster = Some((*own, routes.clone()));
            servers.push(NatsServer::launch(&options, &name, free_port()?, cluster).await?);
        }
        let cluster = Self { servers };
        cluster.wait_ready().await?;
        Ok(cluster)
    }

    /// Waits until a stream with all replicas can be made through every server.
    pub async fn wait_ready(&self) -> Result<()> {
        let replicas = self.servers.len();
        for (i, server) in self.servers.iter().enumerate() {
            let mut js = server.jetstream().await?;
            // A request sent before there is a leader is never answered.
            js.set_timeout(Duration::from_secs(1));
            let name = format!("HARNESS_READY_{i}");
            eventually(format!("stream of {replicas} replicas through n{}", i + 1), CLUSTER_DEADLINE, || {
                let (js, name) = (js.clone(), name.clone());
                async move {
                    let config = jetstream::stream::Config {
                        name: name.clone(),
                        subjects: vec![format!("harness.ready.{name}")],
                        num_replicas: replicas,
                        storage: jetstream::stream::StorageType::Memory,
                        ..Default::default()
                    };
                    js.create_stream(config).await.ok()?;
                    js.delete_stream(name).await.ok().filter(|d| d.success).map(drop)
                }
            })
            .await?;
        }
        Ok(())
    }

    pub fn url(&self, i: usize) -> String {
        self.servers[i].url()
    }

    /// All addresses, as a client's configuration wants them.
    pub fn urls(&self) -> Vec<String> {
        self.servers.iter().map(NatsServer::url).collect()
    }

    pub fn servers(&self) -> &[NatsServer] {
        &self.servers
    }

    /// SIGKILL of the server that leads `stream`; which one that was.
    pub async fn kill_leader(&mut self, stream: &str) -> Result<usize> {
        let leader = self.leader_of(stream).await?;
        let leader = leader.ok_or_else(|| Error::Wrong(format!("{stream} has no leader")))?;
        self.servers[leader].kill9()?;
        Ok(leader)
    }

    /// For faults on one of them.
    pub fn server(&mut self, i: usize) -> &mut NatsServer {
        &mut self.servers[i]
    }

    pub async fn client(&self) -> Result<async_nats::Client> {
        async_nats::connect(self.urls()).await.map_err(Error::nats("connecting to the test cluster"))
    }

    pub async fn jetstream(&self) -> Result<jetstream::Context> {
        Ok(jetstream::new(self.client().await?))
    }

    /// Index of the server that leads `stream`.
    pub async fn leader_of(&self, stream: &str) -> Result<Option<usize>> {
        let js = self.jetstream().await?;
        let info = js.get_stream(stream).await.map_err(Error::nats(format!("info of {stream}")))?;
        let leader = info.cached_info().cluster.as_ref().and_then(|c| c.leader.clone());
        Ok(leader.and_then(|name| self.servers.iter().position(|s| s.plan.name == name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

    #[tokio::test]
    async fn a_server_keeps_its_store_and_port_over_a_restart() -> TestResult {
        let mut server = NatsServer::start().await?;
        let url = server.url();
        let js = server.jetstream().await?;
        js.create_stream(jetstream::stream::Config {
            name: "S".into(),
            subjects: vec!["s.>".into()],
            ..Default::default()
        })
        .await?;
        js.publish("s.a", "kept".into()).await?.await?;
        server.restart().await?;
        assert_eq!(server.url(), url);
        let js = server.jetstream().await?;
        assert_eq!(js.get_stream("S").await?.cached_info().state.messages, 1);
        Ok(())
    }

    #[tokio::test]
    async fn a_dropped_server_is_gone() -> TestResult {
        let server = NatsServer::start().await?;
        let (pid, dir) = (server.pid(), server.dir().to_owned());
        drop(server);
        assert!(!dir.exists());
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        Ok(())
    }

    #[tokio::test]
    async fn options_reach_the_server() -> TestResult {
        let options = ServerOptions { jetstream: false, max_payload: Some(65_536), ..ServerOptions::default() };
        let server = NatsServer::start_with(options).await?;
        let client = server.client().await?;
        assert_eq!(client.server_info().max_payload, 65_536);
        assert!(!client.server_info().jetstream);
        Ok(())
    }

    #[tokio::test]
    async fn a_stopped_server_answers_again_when_it_goes_on() -> TestResult {
        let mut server = NatsServer::start().await?;
        let client = server.client().await?;
        let mut sub = client.subscribe("x").await?;
        client.flush().await?;
        server.stop()?;
        client.publish("x", "1".into()).await?;
        assert!(tokio::time::timeout(Duration::from_millis(200), sub.next()).await.is_err());
        server.cont()?;
        assert!(tokio::time::timeout(Duration::from_secs(5), sub.next()).await?.is_some());
        Ok(())
    }

    #[tokio::test]
    async fn three_servers_make_a_cluster() -> TestResult {
        let cluster = Cluster::start(3).await?;
        let js = cluster.jetstream().await?;
        js.create_stream(jetstream::stream::Config {
            name: "S".into(),
            subjects: vec!["s.>".into()],
            num_replicas: 3,
            ..Default::default()
        })
        .await?;
        assert!(cluster.leader_of("S").await?.is_some());
        Ok(())
    }

    #[tokio::test]
    async fn a_wrong_configuration_shows_the_servers_own_words() {
        let options = ServerOptions { extra: "max_payload: {".into(), ..ServerOptions::default() };
        let Err(Error::EndedEarly { log, .. }) = NatsServer::start_with(options).await else {
            panic!("started with a broken configuration")
        };
        assert!(!log.is_empty());
    }
}
