//! Keys of accounts as `voxfleet auth init` writes them, and clients that log in with one of them.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::{Client, ConnectOptions, Event};
use tempfile::TempDir;

use crate::{Error, Result, find, process::Settings, wait::eventually};

/// A folder of keys; it goes when this is dropped.
#[derive(Debug)]
pub struct Keys {
    // Beside the folders of servers: a server's configuration names files from where it lies itself.
    dir: TempDir,
}

impl Keys {
    /// With these accounts, and whatever else `voxfleet auth init` takes.
    pub fn make(accounts: &[&str], more: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("voxfleet-keys-").tempdir().map_err(Error::io("temporary folder"))?;
        let mut command = Command::new(find::voxfleet()?);
        command.args(["auth", "init", "--dir"]).arg(dir.path()).args(more).current_dir(dir.path());
        for account in accounts {
            command.args(["--account", account]);
        }
        let output = command.output().map_err(Error::io("voxfleet auth init"))?;
        if output.status.success() {
            return Ok(Self { dir });
        }
        Err(Error::Wrong(format!("voxfleet auth init: {}", String::from_utf8_lossy(&output.stderr))))
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// For [`crate::server::ServerOptions::extra`].
    pub fn include(&self) -> String {
        let name = self.dir.path().file_name().unwrap_or_default().to_string_lossy();
        format!("include \"../{name}/accounts.conf\"\n")
    }

    pub fn login(&self, account: &str, role: &str) -> Login {
        Login {
            seed_file: self.dir.path().join(account).join(format!("{role}.nk")),
            inbox_prefix: format!("_INBOX_{role}"),
        }
    }
}

/// One user.
#[derive(Debug, Clone)]
pub struct Login {
    pub seed_file: PathBuf,
    pub inbox_prefix: String,
}

impl Login {
    /// For a process of ours.
    pub fn settings(&self) -> Settings {
        Settings::new()
            .with("nats.nkey_seed_file", self.seed_file.display())
            .with("nats.inbox_prefix", &self.inbox_prefix)
    }

    /// A plain client, and what its server refused it so far.
    pub async fn connect(&self, urls: Vec<String>) -> Result<(Client, Refusals)> {
        let seed = std::fs::read_to_string(&self.seed_file).map_err(Error::io("seed file"))?;
        let refusals = Refusals::default();
        let heard = refusals.clone();
        // A server that stands still is noticed within seconds.
        let options = ConnectOptions::with_nkey(seed.trim().to_owned())
            .custom_inbox_prefix(&self.inbox_prefix)
            .ping_interval(Duration::from_secs(2))
            .event_callback(move |event| {
                if let Event::ServerError(error) = event {
                    heard.words().push(error.to_string());
                }
                async {}
            });
        let client = options.connect(urls).await.map_err(Error::nats("connecting with a key"))?;
        Ok((client, refusals))
    }
}

/// What a server refused, in its words.
#[derive(Debug, Clone, Default)]
pub struct Refusals(Arc<Mutex<Vec<String>>>);

impl Refusals {
    fn words(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn all(&self) -> Vec<String> {
        self.words().clone()
    }

    /// Waits until this subject was refused; an error when it was not in time.
    pub async fn wait(&self, subject: &str) -> Result<()> {
        let quoted = format!("\"{subject}\"");
        let refused = || std::future::ready(self.words().iter().any(|words| words.contains(&quoted)).then_some(()));
        Ok(eventually(format!("{subject} is refused"), Duration::from_secs(5), refused).await?)
    }
}
