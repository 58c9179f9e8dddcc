//! The folder that is a card to simulated engines (`worker.simulated.card`), and what a test may do to it.
//!
//! Files of processes are `<pid>.<n>` (`busy.<pid>.<n>` while a decode runs), those of others `tenant.<name>`, faults `faults/<what>`. Engines count and take
//! memory under flock(2) on the folder, and so do tenants here.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::{Error, Result};

/// A card of its own.
#[derive(Debug)]
pub struct SimulatedCard {
    folder: TempDir,
}

impl SimulatedCard {
    pub fn new(total_mb: u64) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("voxfleet-card-").tempdir();
        let folder = folder.map_err(Error::io("folder of a card"))?;
        fs::create_dir(folder.path().join("faults")).map_err(Error::io("folder of a card's faults"))?;
        let card = Self { folder };
        card.write("total_mb", total_mb)?;
        Ok(card)
    }

    /// For `worker.simulated.card`.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Everything on it: of processes that live, and of tenants.
    pub fn used_mb(&self) -> Result<u64> {
        Ok(self.used_by_processes_mb()? + self.sum(|name| name.starts_with("tenant."))?)
    }

    /// The same without tenants.
    pub fn used_by_processes_mb(&self) -> Result<u64> {
        self.sum(|name| name.split_once('.').and_then(|(pid, _)| pid.parse().ok()).is_some_and(lives))
    }

    /// Decodes that run on it now.
    pub fn decodes(&self) -> Result<usize> {
        let names = self.names(self.path())?;
        let owners = names.iter().filter_map(|name| name.strip_prefix("busy.")?.split_once('.')?.0.parse().ok());
        Ok(owners.filter(|pid| lives(*pid)).count())
    }

    /// Somebody else now has so much on it, whether it fits or not; 0 = nothing.
    pub fn tenant(&self, name: &str, mb: u64) -> Result<()> {
        let _lock = self.locked()?;
        self.set_tenant(name, mb)
    }

    /// Somebody else grows by what is free, but for so much, as one who asks politely. Returns what it has then.
    pub fn tenant_takes_all_but(&self, name: &str, left_mb: u64) -> Result<u64> {
        let _lock = self.locked()?;
        let total_mb = self.read("total_mb")?;
        let has_mb = self.read(&format!("tenant.{name}")).unwrap_or(0);
        let free_mb = total_mb.saturating_sub(self.used_mb()?);
        let mb = has_mb + free_mb.saturating_sub(left_mb);
        self.set_tenant(name, mb)?;
        Ok(mb)
    }

    /// `what` (`oom_at_decode`, `abort`, `assertion`, `lost`, `mismatch`, `library`, `exit`, `kill`, `hang`, `garbage`)
    /// happens once, after so many decodes on this card; `oom_at_load` after so many loads.
    pub fn fault(&self, what: &str, after: u64) -> Result<()> {
        let _lock = self.locked()?;
        self.write(&format!("faults/{what}"), after)
    }

    /// The same each time from then on.
    pub fn fault_always(&self, what: &str, after: u64) -> Result<()> {
        let _lock = self.locked()?;
        self.write(&format!("faults/{what}"), format!("{after} always"))
    }

    /// Whether a fault that was asked for has not struck yet.
    pub fn is_due(&self, what: &str) -> bool {
        self.path().join("faults").join(what).exists()
    }

    /// No faults, no tenants.
    pub fn clear(&self) -> Result<()> {
        let _lock = self.locked()?;
        for name in self.names(self.path())?.iter().filter(|name| name.starts_with("tenant.")) {
            self.remove(name)?;
        }
        for what in self.names(&self.path().join("faults"))? {
            self.remove(&format!("faults/{what}"))?;
        }
        Ok(())
    }

    fn set_tenant(&self, name: &str, mb: u64) -> Result<()> {
        let name = format!("tenant.{name}");
        if mb == 0 { self.remove(&name) } else { self.write(&name, mb) }
    }

    fn sum(&self, counts: impl Fn(&str) -> bool) -> Result<u64> {
        let names = self.names(self.path())?;
        // One that has been given back meanwhile counts for nothing.
        Ok(names.iter().filter(|name| counts(name)).filter_map(|name| self.read(name).ok()).sum())
    }

    fn names(&self, folder: &Path) -> Result<Vec<String>> {
        let entries = fs::read_dir(folder).map_err(Error::io(folder.display().to_string()))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    fn read(&self, name: &str) -> Result<u64> {
        let path = self.path().join(name);
        let text = fs::read_to_string(&path).map_err(Error::io(path.display().to_string()))?;
        text.trim().parse().map_err(|_| Error::Wrong(format!("{}: {text:?}", path.display())))
    }

    /// All of it or nothing: readers without the lock see no half of a number.
    fn write(&self, name: &str, value: impl ToString) -> Result<()> {
        let (path, new) = (self.path().join(name), self.path().join(".new"));
        let written = fs::write(&new, value.to_string()).and_then(|()| fs::rename(&new, &path));
        written.map_err(Error::io(path.display().to_string()))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path: PathBuf = self.path().join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(path.display().to_string())(error))
            }
            _ => Ok(()),
        }
    }

    fn locked(&self) -> Result<fs::File> {
        let folder = fs::File::open(self.path()).map_err(Error::io("folder of a card"))?;
        flock(&folder, FlockOperation::LockExclusive).map_err(|e| Error::io("lock of a card")(e.into()))?;
        Ok(folder)
    }
}

/// A process that has ended and was not looked after yet holds no memory.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}
