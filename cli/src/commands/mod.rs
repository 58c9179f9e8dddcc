//! One module a command. Each takes its arguments and the [`Context`], and answers with an exit code.

pub(crate) mod config;
pub(crate) mod decode;
#[cfg(feature = "dispatcher")]
mod dispatcher;
mod doctor;
#[cfg(feature = "worker")]
pub(crate) mod engine;
mod status;
mod stream;
mod watch;
#[cfg(feature = "worker")]
mod worker;

use std::{path::Path, time::Duration};

use voxfleet_nats::Nats;

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

/// Logs of a service where nothing else is configured. The client library tells its own connects and disconnects, which
/// ours tell too.
#[cfg(any(feature = "dispatcher", feature = "worker"))]
const SERVICE_LOG: &str = "info,async_nats=warn";

pub(crate) async fn run(command: Command, context: Context) -> anyhow::Result<Exit> {
    match command {
        #[cfg(feature = "dispatcher")]
        Command::Dispatcher(_) => dispatcher::run(&context).await,
        #[cfg(feature = "worker")]
        Command::Worker(_) => worker::run(&context).await,
        Command::Stream(args) => stream::run(&args, &context).await,
        Command::Watch(args) => watch::run(&args, &context).await,
        Command::Status(args) => status::run(&args, &context).await,
        Command::Doctor(args) => doctor::run(&args, &context).await,
        Command::Config(args) => config::run(&args, &context),
        #[cfg(feature = "bench")]
        Command::Demo(args) => crate::demo::run(&args, &context).await,
        #[cfg(feature = "bench")]
        Command::Bench(args) => crate::bench::run(args, context.shutdown.clone()).await,
        Command::Decode(args) => decode::run(&args),
        #[cfg(feature = "worker")]
        Command::Engine(args) => engine::run(&args),
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

/// Closes the connection; whatever the command had to say has been said by then.
async fn close(nats: Nats) {
    if !nats.close(CLOSE).await {
        tracing::debug!("connection did not close in time");
    }
}
