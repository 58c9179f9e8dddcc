//! Configuration of every command: defaults, then `voxfleet.toml`, then `VOXFLEET__SECTION__KEY`, then flags.
//!
//! Read once, at the start, checked as a whole (every mistake is reported, not only the first), then passed on as a
//! struct. [`layers`] says what was set where, [`show`] prints it.

mod layers;
pub(crate) mod show;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use voxfleet_nats::NatsConfig;
use voxfleet_store::models::ModelsConfig;
use voxfleet_trace::TracingConfig;
#[cfg(feature = "worker")]
use voxfleet_worker::provider::{ProviderChoice, detect};

use crate::{
    env::{self, Env},
    logging::LogConfig,
};
pub(crate) use layers::Origin;
use layers::{Layers, Setting};

/// Looked for in this order when `--config` names none; the first one found is the only one read.
pub(crate) const SEARCH: [&str; 2] = ["voxfleet.toml", "/etc/voxfleet/voxfleet.toml"];

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Settings {
    pub(crate) nats: NatsConfig,
    #[cfg(feature = "dispatcher")]
    pub(crate) dispatcher: voxfleet_dispatcher::DispatcherConfig,
    #[cfg(feature = "worker")]
    pub(crate) worker: voxfleet_worker::WorkerConfig,
    pub(crate) models: ModelsConfig,
    pub(crate) log: LogConfig,
    pub(crate) tracing: TracingConfig,
    // One file serves a whole fleet: a slim build passes over the sections of parts it does not have.
    #[cfg(not(feature = "dispatcher"))]
    #[serde(skip_serializing)]
    pub(crate) dispatcher: serde_json::Value,
    #[cfg(not(feature = "worker"))]
    #[serde(skip_serializing)]
    pub(crate) worker: serde_json::Value,
}

/// Parts whose settings can be checked by themselves: what one machine runs says nothing about the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Role {
    /// The connection, which everything needs; checked always.
    Nats,
    #[cfg(feature = "dispatcher")]
    Dispatcher,
    #[cfg(feature = "worker")]
    Worker,
    /// The folder of models.
    Models,
}

impl Role {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Role::Nats => "nats",
            #[cfg(feature = "dispatcher")]
            Role::Dispatcher => "dispatcher",
            #[cfg(feature = "worker")]
            Role::Worker => "worker",
            Role::Models => "models",
        }
    }
}

impl Settings {
    /// Models are pulled into the folder that workers look into, whichever of the two settings names it.
    fn share_models_folder(&mut self) {
        #[cfg(feature = "worker")]
        {
            let worker = &mut self.worker;
            worker.catalog = worker.catalog.take().or_else(|| self.models.catalog.clone());
            match (&self.models.dir, &worker.models_dir) {
                // One that nothing was pulled into yet is no mistake.
                (Some(dir), None) if dir.is_dir() || !worker.prefetch.is_empty() => {
                    worker.models_dir = Some(dir.clone())
                }
                (None, Some(dir)) => self.models.dir = Some(dir.clone()),
                _ => {}
            }
            self.models.dir = self.models.folder(worker.cache_dir.as_deref());
        }
    }

    /// Also where a file says `auto` in so many words.
    fn find_provider(&mut self, env: &impl Env) {
        #[cfg(feature = "worker")]
        if self.worker.provider == ProviderChoice::Auto
            && let Some((provider, _)) = provider(env)
        {
            self.worker.provider = provider;
        }
        #[cfg(not(feature = "worker"))]
        let _unread = env;
    }

    fn problems(&self, roles: &[Role]) -> Vec<String> {
        let mut found = self.nats.problems();
        for role in roles {
            match role {
                Role::Nats => {}
                #[cfg(feature = "dispatcher")]
                Role::Dispatcher => found.extend(self.dispatcher.problems()),
                #[cfg(feature = "worker")]
                Role::Worker => found.extend(self.worker.problems()),
                Role::Models => found.extend(self.models.problems()),
            }
        }
        found.extend(self.log.problems());
        found.extend(self.tracing.problems());
        found
    }
}

/// What the command line says about configuration.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overrides {
    pub(crate) config: Option<PathBuf>,
    /// Flag as typed, key, value.
    pub(crate) flags: Vec<(String, String, String)>,
}

/// Settings, and where each came from.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) settings: Settings,
    /// The file that was read.
    pub(crate) file: Option<PathBuf>,
    set: Vec<Setting>,
}

#[derive(Debug, thiserror::Error)]
#[error("bad configuration, {} mistake{}:{}", problems.len(), if problems.len() == 1 { "" } else { "s" }, list(problems))]
pub(crate) struct ConfigProblems {
    pub(crate) problems: Vec<String>,
}

fn list(problems: &[String]) -> String {
    problems.iter().map(|p| format!("\n  {p}")).collect()
}

/// Reads every layer. `search` is tried in order when no file is named. Every value's type is checked; what the values
/// mean together only for `roles`.
pub(crate) fn load(
    overrides: &Overrides,
    env: &impl Env,
    search: &[&Path],
    roles: &[Role],
) -> Result<Loaded, ConfigProblems> {
    read(overrides, env, search, |_| roles.to_vec()).map(|(loaded, _)| loaded)
}

/// As [`load`], for the parts that somebody configured here, which it names: a machine that runs no worker needs no model.
pub(crate) fn load_configured(
    overrides: &Overrides,
    env: &impl Env,
    search: &[&Path],
) -> Result<(Loaded, Vec<Role>), ConfigProblems> {
    use clap::ValueEnum as _;
    let all = Role::value_variants().iter().copied();
    read(overrides, env, search, |layers| all.filter(|role| layers.mentions(role.as_str())).collect())
}

fn read(
    overrides: &Overrides,
    env: &impl Env,
    search: &[&Path],
    roles: impl FnOnce(&Layers) -> Vec<Role>,
) -> Result<(Loaded, Vec<Role>), ConfigProblems> {
    let file = match &overrides.config {
        Some(named) => Some(named.clone()),
        None => search.iter().find(|p| p.is_file()).map(|p| p.to_path_buf()),
    };
    let mut layers = Layers::new(&Settings::default());
    inherited(env, &mut layers);
    if let Some(file) = &file {
        layers.file(file);
    }
    layers.env(env);
    for (flag, key, value) in &overrides.flags {
        layers.flag(flag, key, value);
    }
    let roles = roles(&layers);
    let (set, mut problems) = layers.checked::<Settings>();
    match layers::assemble::<Settings>(&set) {
        Ok(mut settings) => {
            settings.share_models_folder();
            settings.find_provider(env);
            problems.extend(settings.problems(&roles));
            if problems.is_empty() {
                return Ok((Loaded { settings, file, set }, roles));
            }
        }
        // What one value alone could not show: two that do not go together.
        Err(e) if problems.is_empty() => problems.push(e),
        Err(_) => {}
    }
    Err(ConfigProblems { problems })
}

/// Variables that others define and we follow: the lowest layer above the defaults.
fn inherited(env: &impl Env, layers: &mut Layers) {
    if let Some((dir, name)) = env::cache_dir(env) {
        match cfg!(feature = "worker") {
            true => layers.inherited(name, "worker.cache_dir", &dir.to_string_lossy()),
            false => layers.inherited(name, "models.dir", &dir.join("models").to_string_lossy()),
        }
    }
    if cfg!(feature = "worker")
        && let Some(library) = env.var("ORT_DYLIB_PATH").filter(|l| !l.is_empty())
    {
        layers.inherited("ORT_DYLIB_PATH", "worker.onnxruntime", &library);
    }
    // Of OpenTelemetry's variables those that say where to; one of another protocol is not ours.
    let set = |name: &str| env.var(name).filter(|value| !value.is_empty());
    if set("OTEL_EXPORTER_OTLP_PROTOCOL").is_none_or(|protocol| protocol == "http/protobuf") {
        for (name, key) in
            [("OTEL_EXPORTER_OTLP_ENDPOINT", "tracing.endpoint"), ("OTEL_EXPORTER_OTLP_HEADERS", "tracing.headers")]
        {
            if let Some(value) = set(name) {
                layers.inherited(name, key, &value);
            }
        }
    }
    #[cfg(feature = "worker")]
    if let Some((provider, name)) = provider(env) {
        layers.inherited(name, "worker.provider", provider.as_str());
    }
}

/// Who rents out this machine, by the variables that it documents.
#[cfg(feature = "worker")]
fn provider(env: &impl Env) -> Option<(ProviderChoice, &'static str)> {
    detect(|name| env.var(name).is_some_and(|value| !value.is_empty()))
}

#[cfg(test)]
mod tests;
