//! One module a command. Each takes its arguments and the [`Context`], and answers with an exit code.

#[cfg(feature = "worker")]
pub(crate) mod audio_decoder;
mod auth;
pub(crate) mod config;
mod dead;
pub(crate) mod decode;
#[cfg(feature = "dispatcher")]
mod dispatcher;
mod doctor;
mod drain;
#[cfg(feature = "worker")]
pub(crate) mod engine;
mod eval;
mod export;
mod health;
mod jobs;
mod models;
mod plan;
mod purge;
mod status;
mod stream;
mod transcribe;
mod watch;
#[cfg(feature = "worker")]
mod worker;

use std::{path::Path, time::Duration};

use voxfleet_nats::{
    Nats, ServerError,
    topology::{self, TopologyConfig, TopologyError},
};
#[cfg(any(feature = "dispatcher", feature = "worker"))]
use {
    tokio::time::Instant,
    tokio_util::sync::CancellationToken,
    voxfleet_nats::{ConnectError, retry::Backoff},
    voxfleet_trace::{Exporter, Service, Tracer, TracingConfig},
};

use crate::{
    Context,
    args::{Command, Global},
    config::{Loaded, Overrides, Role, SEARCH, Settings, load},
    env::ProcessEnv,
    exit::{Exit, OrExit as _},
    logging,
};

/// How long a command waits for what it has sent to be on its way.
const CLOSE: Duration = Duration::from_secs(2);

/// How long the first look at JetStream may take; it is there to explain a silence, not to cause a wait.
const PROBE: Duration = Duration::from_secs(2);
/// The server's codes for JetStream that is off: in the whole server, in this account.
const JETSTREAM_OFF: [u64; 2] = [10_076, 10_039];

/// How long a service waits for a server to start beside it. Beyond this whoever started the service should hear that
/// it is not running: a wrong address looks the same as a slow start.
#[cfg(any(feature = "dispatcher", feature = "worker"))]
const PATIENCE: Duration = Duration::from_secs(60);
#[cfg(any(feature = "dispatcher", feature = "worker"))]
const REMIND: Duration = Duration::from_secs(30);

/// Logs of a service where nothing else is configured. The client library tells its own connects and disconnects, which
/// ours tell too.
#[cfg(any(feature = "dispatcher", feature = "worker"))]
const SERVICE_LOG: &str = "info,async_nats=warn";

pub(crate) async fn run(command: Command, context: Context) -> anyhow::Result<Exit> {
    match command {
        #[cfg(feature = "dispatcher")]
        Command::Dispatcher(_) => dispatcher::run(&context).await,
        #[cfg(feature = "worker")]
        Command::Worker(args) => worker::run(&args, &context).await,
        Command::Stream(args) => stream::run(&args, &context).await,
        Command::Transcribe(args) => transcribe::run(&args, &context).await,
        Command::Jobs(args) => jobs::run(&args, &context).await,
        Command::Export(args) => export::run(&args, &context).await,
        Command::Eval(args) => eval::run(&args),
        Command::Watch(args) => watch::run(&args, &context).await,
        Command::Status(args) => status::run(&args, &context).await,
        Command::Drain(args) => drain::run(&args, &context).await,
        Command::Purge(args) => purge::run(&args, &context).await,
        Command::Models(args) => models::run(&args, &context).await,
        Command::Plan(args) => plan::run(&args, &context).await,
        Command::Health(args) => health::run(&args).await,
        Command::Doctor(args) => doctor::run(&args, &context).await,
        Command::Auth(args) => auth::run(&args, &context),
        Command::Config(args) => config::run(&args, &context),
        #[cfg(feature = "bench")]
        Command::Demo(args) => {
            own_server(&context)?;
            crate::demo::run(&args, &context).await
        }
        #[cfg(feature = "bench")]
        Command::Bench(args) => {
            own_server(&context)?;
            crate::bench::run(args, context.shutdown.clone()).await
        }
        Command::Decode(args) => decode::run(&args),
        #[cfg(feature = "worker")]
        Command::Engine(args) => engine::run(&args),
        #[cfg(feature = "worker")]
        Command::AudioDecoder(args) => audio_decoder::run(&args),
    }
}

/// `demo` and `bench` start a server of their own: whoever names another one would otherwise believe it was used.
#[cfg(feature = "bench")]
fn own_server(context: &Context) -> anyhow::Result<()> {
    match context.overrides.flags.iter().find(|(_, key, _)| key.starts_with("nats.")) {
        Some((flag, key, _)) => {
            Err(anyhow::anyhow!("{flag} ({key}): this command starts a server of its own")).or_exit(Exit::Usage)
        }
        None => Ok(()),
    }
}

/// Flags are the topmost layer of settings: this is the one place that says which flag is which setting.
pub(crate) fn overrides(global: &Global, command: &Command) -> Overrides {
    let mut flags = Vec::new();
    let mut put = |flag: &str, key: &str, value: Option<String>| {
        if let Some(value) = value {
            flags.push((flag.to_owned(), key.to_owned(), value));
        }
    };
    for (key, value) in &global.set {
        put("--set", key, Some(value.clone()));
    }
    put("--url", "nats.urls", global.url.clone());
    put("--creds", "nats.credentials_file", global.creds.clone());
    put("--log", "log.filter", global.log.clone());
    put("--log-format", "log.format", global.log_format.map(|f| f.as_str().to_owned()));
    match command {
        #[cfg(feature = "dispatcher")]
        Command::Dispatcher(args) => put("--name", "dispatcher.name", args.name.clone()),
        #[cfg(feature = "worker")]
        Command::Worker(args) => {
            put("--gpu", "worker.gpu", args.gpu.clone());
            put("--gpu-id", "worker.gpu_id", args.gpu_id.clone());
            put("--engine", "worker.engine", args.engine.clone());
            put("--models-dir", "worker.models_dir", args.models_dir.clone());
            put("--model", "worker.default_model", args.model.clone());
            put("--slots", "worker.slots", args.slots.map(|n| n.to_string()));
        }
        _ => {}
    }
    Overrides { config: global.config.clone(), flags }
}

impl Context {
    /// Reads the configuration and starts logging.
    pub(crate) fn configure(&self, roles: &[Role], log: &str) -> anyhow::Result<Loaded> {
        let search: Vec<&Path> = SEARCH.iter().map(Path::new).collect();
        let loaded = load(&self.overrides, &ProcessEnv, &search, roles).or_exit(Exit::Config)?;
        logging::install(&loaded.settings.log, log);
        Ok(loaded)
    }

    /// For commands that talk to a fleet and are no part of it.
    pub(crate) async fn client(&self, name: &str) -> anyhow::Result<(Nats, Settings)> {
        let settings = self.configure(&[], "error")?.settings;
        let nats = connect(&settings, name).await?;
        Ok((nats, settings))
    }
}

async fn connect(settings: &Settings, name: &str) -> anyhow::Result<Nats> {
    Nats::connect(&settings.nats, name).await.or_exit(Exit::Unavailable)
}

/// For services: they and the server are started in any order. None when told to stop before there was a server.
#[cfg(any(feature = "dispatcher", feature = "worker"))]
async fn connect_service(
    settings: &Settings,
    name: &str,
    shutdown: &CancellationToken,
) -> anyhow::Result<Option<Nats>> {
    let connecting = keep_trying(|| Nats::connect(&settings.nats, name), PATIENCE);
    tokio::select! {
        () = shutdown.cancelled() => Ok(None),
        connected = connecting => connected.map(Some).or_exit(Exit::Unavailable),
    }
}

/// Whom to tell of what is done, and what has to be finished when nothing is done any more.
#[cfg(any(feature = "dispatcher", feature = "worker"))]
fn tell_traces(config: &TracingConfig, service: Service) -> anyhow::Result<(Tracer, Exporter)> {
    Exporter::start(config, service).or_exit(Exit::Config)
}

/// Connects again for as long as nobody answers; whatever a server answers is final.
#[cfg(any(feature = "dispatcher", feature = "worker"))]
async fn keep_trying<T, F: Future<Output = Result<T, ConnectError>>>(
    mut connect: impl FnMut() -> F,
    patience: Duration,
) -> Result<T, ConnectError> {
    let begun = Instant::now();
    let mut backoff = Backoff::default();
    let mut told: Option<Instant> = None;
    loop {
        match connect().await {
            Err(error @ ConnectError::Unreachable { .. }) if begun.elapsed() < patience => {
                if told.is_none_or(|at| at.elapsed() >= REMIND) {
                    told = Some(Instant::now());
                    let waited_s = begun.elapsed().as_secs();
                    tracing::warn!(%error, waited_s, give_up_s = patience.as_secs(), "trying again to connect to nats");
                }
                backoff.wait().await;
            }
            result => return result,
        }
    }
}

/// Whether the server has no JetStream: then nothing that is sent is kept, and nothing would ever come back. A server
/// that does not answer in time, or may not answer us, says nothing about it.
async fn lacks_jetstream(nats: &Nats) -> bool {
    match tokio::time::timeout(PROBE, topology::probe(nats)).await {
        // With JetStream somebody answers, be it that there is no such stream.
        Ok(Err(ServerError::NoResponders(_))) => true,
        Ok(Err(error)) => error.code().is_some_and(|code| JETSTREAM_OFF.contains(&code)),
        Ok(_) | Err(_) => false,
    }
}

async fn need_jetstream(nats: &Nats) -> anyhow::Result<()> {
    if lacks_jetstream(nats).await { Err(TopologyError::NoJetStream).or_exit(Exit::Unavailable) } else { Ok(()) }
}

/// The streams that a dispatcher of this configuration makes.
fn wanted_topology(settings: &Settings) -> TopologyConfig {
    #[cfg(feature = "dispatcher")]
    return settings.dispatcher.topology.clone();
    #[cfg(not(feature = "dispatcher"))]
    {
        let _ = settings;
        TopologyConfig::default()
    }
}

/// Closes the connection; whatever the command had to say has been said by then.
async fn close(nats: Nats) {
    if !nats.close(CLOSE).await {
        tracing::debug!("connection did not close in time");
    }
}

#[cfg(all(test, any(feature = "dispatcher", feature = "worker")))]
mod tests {
    use super::*;

    fn nobody() -> ConnectError {
        ConnectError::Unreachable { urls: "nats://nowhere:1".to_owned(), source: "refused".into() }
    }

    #[tokio::test]
    async fn a_service_waits_for_a_server_that_is_not_there_yet() {
        let mut attempts = 0;
        let mut attempt = || {
            attempts += 1;
            std::future::ready(if attempts < 3 { Err(nobody()) } else { Ok(attempts) })
        };
        assert_eq!(keep_trying(&mut attempt, Duration::from_secs(60)).await.ok(), Some(3));
    }

    #[tokio::test]
    async fn waiting_ends_when_patience_does_or_a_server_refuses() {
        let gave_up = keep_trying(|| std::future::ready(Err::<(), _>(nobody())), Duration::ZERO).await;
        assert!(matches!(gave_up, Err(ConnectError::Unreachable { .. })));
        let refused = || ConnectError::Credentials { urls: "nats://here:1".to_owned(), source: "refused".into() };
        let refused = keep_trying(|| std::future::ready(Err::<(), _>(refused())), Duration::from_secs(60)).await;
        assert!(matches!(refused, Err(ConnectError::Credentials { .. })));
    }
}
