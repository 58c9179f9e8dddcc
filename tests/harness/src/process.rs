//! The product's processes: real binaries, configured through the environment only, each with a log file.

use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
    path::Path,
    process::Command,
};

use crate::{Result, child::Child, find};

/// Settings by their dotted names (`nats.urls`), as `voxfleet config show` prints them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<String, String>);

impl Settings {
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.0.insert(key.to_owned(), value.to_string());
        self
    }

    /// `other` wins.
    #[must_use]
    pub fn and(mut self, other: &Settings) -> Self {
        self.0.extend(other.0.clone());
        self
    }

    /// As environment variables: `nats.urls` is `VOXFLEET__NATS__URLS`.
    pub fn environment(&self) -> impl Iterator<Item = (String, &String)> {
        self.0.iter().map(|(key, value)| (format!("VOXFLEET__{}", key.replace('.', "__").to_uppercase()), value))
    }
}

/// A `voxfleet` command with these settings and no others, in `dir`.
pub fn voxfleet(settings: &Settings, dir: &Path) -> Result<Command> {
    Ok(voxfleet_at(&find::voxfleet()?, settings, dir))
}

/// The same with a binary of another version.
pub fn voxfleet_at(binary: &Path, settings: &Settings, dir: &Path) -> Command {
    let mut command = Command::new(binary);
    // A developer's own settings must not reach a test.
    for (name, _) in std::env::vars_os() {
        if ["VOXFLEET__", "OTEL_", "TRACEPARENT"].iter().any(|start| name.to_string_lossy().starts_with(start)) {
            command.env_remove(name);
        }
    }
    // Many dispatchers run beside each other here; a test that asks over HTTP names an address.
    command.env("VOXFLEET__DISPATCHER__HTTP__LISTEN", "");
    command.envs(settings.environment()).env("NO_COLOR", "1").current_dir(dir);
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "info");
    }
    command
}

/// `voxfleet dispatcher`.
pub struct Dispatcher(Child);

impl Dispatcher {
    pub fn start(name: &str, settings: &Settings, dir: &Path) -> Result<Self> {
        Self::start_at(&find::voxfleet()?, name, settings, dir)
    }

    /// With a binary of another version.
    pub fn start_at(binary: &Path, name: &str, settings: &Settings, dir: &Path) -> Result<Self> {
        let mut command = voxfleet_at(binary, settings, dir);
        command.arg("dispatcher");
        Ok(Self(Child::start(name, command, &dir.join(format!("{name}.log")))?))
    }
}

/// `voxfleet worker`: the supervisor; its engine is its child.
pub struct Worker {
    gpu_id: String,
    child: Child,
}

impl Worker {
    pub fn start(gpu_id: &str, settings: &Settings, dir: &Path) -> Result<Self> {
        Self::start_in(gpu_id, settings, dir, &[])
    }

    /// With further environment variables.
    pub fn start_in(gpu_id: &str, settings: &Settings, dir: &Path, env: &[(String, String)]) -> Result<Self> {
        Self::start_at(&find::voxfleet()?, gpu_id, settings, dir, env)
    }

    /// With a binary of another version.
    pub fn start_at(
        binary: &Path,
        gpu_id: &str,
        settings: &Settings,
        dir: &Path,
        env: &[(String, String)],
    ) -> Result<Self> {
        let settings = settings.clone().with("worker.gpu_id", gpu_id);
        let mut command = voxfleet_at(binary, &settings, dir);
        command.arg("worker").envs(env.iter().cloned());
        let child = Child::start(gpu_id, command, &dir.join(format!("{gpu_id}.log")))?;
        Ok(Self { gpu_id: gpu_id.to_owned(), child })
    }

    pub fn gpu_id(&self) -> &str {
        &self.gpu_id
    }

    /// Process id of its engine child, while it has one.
    pub fn engine_pid(&self) -> Option<u32> {
        crate::child::children_of(self.child.pid()).into_iter().next()
    }
}

impl Deref for Dispatcher {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Dispatcher {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Deref for Worker {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for Worker {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}
