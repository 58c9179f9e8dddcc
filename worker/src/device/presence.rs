//! Which workers of ours live on this machine, and on which device: one small file for each in the cache folder, locked for
//! as long as its worker lives, whatever ends it.
//!
//! A lock, not a process id, says that a worker lives: containers that share the folder have numbers of their own. Workers
//! that share no folder do not see each other here; the dispatcher sees all of them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// Under the cache folder.
const FOLDER: &str = "workers";
/// A file of ours is far shorter.
const MOST_BYTES: u64 = 512;

/// A worker that lives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    pub gpu_id: String,
    /// None on a CPU.
    pub uuid: Option<String>,
}

/// This worker's own file; gone when dropped.
#[derive(Debug)]
pub(crate) struct Presence {
    folder: PathBuf,
    path: PathBuf,
    host: String,
    _locked: File,
}

impl Presence {
    pub(crate) fn announce(cache_dir: &Path, host: &str, me: &Neighbour) -> io::Result<Self> {
        let folder = cache_dir.join(FOLDER);
        fs::create_dir_all(&folder)?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let (unborn, path) = (folder.join(format!(".{name}")), folder.join(name));
        let mut file = OpenOptions::new().create_new(true).write(true).open(&unborn)?;
        let written = flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from).and_then(|()| {
            let uuid = me.uuid.as_deref().unwrap_or_default();
            file.write_all(format!("{host}\n{}\n{uuid}\n", me.gpu_id).as_bytes())?;
            // Others see it only locked: an unlocked one is a dead worker's.
            fs::rename(&unborn, &path)
        });
        if let Err(error) = written {
            let _gone = fs::remove_file(&unborn);
            return Err(error);
        }
        Ok(Self { folder, path, host: host.to_owned(), _locked: file })
    }

    /// The other workers of this host.
    pub(crate) fn others(&self) -> Vec<Neighbour> {
        read(&self.folder, &self.host, Some(&self.path))
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let _gone = fs::remove_file(&self.path);
    }
}

/// The workers of `host` that use this cache folder.
pub(super) fn workers(cache_dir: &Path, host: &str) -> Vec<Neighbour> {
    read(&cache_dir.join(FOLDER), host, None)
}

/// A folder that cannot be read shows nobody.
fn read(folder: &Path, host: &str, mine: Option<&Path>) -> Vec<Neighbour> {
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_one = |path: &PathBuf| {
        let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
        !hidden && mine != Some(path.as_path())
    };
    let mut found: Vec<Neighbour> = paths.filter(is_one).filter_map(|path| living(&path, host)).collect();
    found.sort();
    found
}

/// What it says, if its worker lives and is of this host; removes it when nobody holds its lock any more.
fn living(path: &Path, host: &str) -> Option<Neighbour> {
    let file = File::open(path).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            let _gone = fs::remove_file(path);
            return None;
        }
        Err(rustix::io::Errno::WOULDBLOCK) => {}
        // A file system without locks says nothing about who lives.
        Err(_) => return None,
    }
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text).ok()?;
    let mut lines = text.lines();
    let (of_host, gpu_id, uuid) = (lines.next()?, lines.next()?, lines.next()?);
    let uuid = Some(uuid.to_owned()).filter(|uuid| !uuid.is_empty());
    (of_host == host).then(|| Neighbour { gpu_id: gpu_id.to_owned(), uuid })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn neighbour(gpu_id: &str, uuid: Option<&str>) -> Neighbour {
        Neighbour { gpu_id: gpu_id.to_owned(), uuid: uuid.map(str::to_owned) }
    }

    #[test]
    fn workers_see_each_other_while_they_live() {
        let cache = tempfile::tempdir().expect("cache");
        let (a, b) = (neighbour("gpu-a", Some("GPU-1")), neighbour("cpu-b", None));
        let first = Presence::announce(cache.path(), "h", &a).expect("first");
        assert_eq!(first.others(), []);
        let second = Presence::announce(cache.path(), "h", &b).expect("second");
        let elsewhere = Presence::announce(cache.path(), "other", &a).expect("another host's");
        assert_eq!((first.others(), second.others()), (vec![b.clone()], vec![a.clone()]));
        assert_eq!(workers(cache.path(), "h"), [b, a.clone()]);
        assert_eq!(elsewhere.others(), []);
        drop(second);
        assert_eq!(workers(cache.path(), "h"), [a]);
    }

    #[test]
    fn a_worker_that_was_killed_leaves_nothing_that_counts() {
        let cache = tempfile::tempdir().expect("cache");
        let folder = cache.path().join(FOLDER);
        fs::create_dir(&folder).expect("folder");
        let left = folder.join("0123");
        fs::write(&left, "h\ngpu-a\nGPU-1\n").expect("a file that nobody locks");
        assert_eq!(workers(cache.path(), "h"), []);
        assert!(!left.exists());
        assert_eq!(workers(Path::new("/nowhere"), "h"), []);
    }
}
