//! Files of the store: locks, checksums beside models, room on the disk. All of it blocks.
//!
//! Three locks, all advisory and given back by the kernel when their process ends, however it ends:
//! - `.locks/<model>`, exclusive: somebody is pulling this model. The file holds how many bytes it will take, so that two
//!   pulls at once do not both spend the same quota.
//! - `.locks/.store`, exclusive and short: somebody is making room.
//! - the model's file itself (of a folder that with the weights), shared: somebody uses it ([`InUse`]); whoever wants to
//!   remove it needs it alone.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read as _, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustix::fs::{FlockOperation, flock, statvfs};
use sha2::{Digest as _, Sha256};

use super::{catalog::WEIGHTS, error::ModelError};

const LOCKS: &str = ".locks";
const STORE: &str = ".store";

pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ModelError {
    let path = path.to_owned();
    move |source| ModelError::Io { what, path, source }
}

/// A lock held until it is dropped.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Lock {
    /// None = somebody else has it.
    pub(super) fn model(dir: &Path, name: &str) -> Result<Option<Self>, ModelError> {
        let file = lock_file(dir, name)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(io("locking in", dir)(e.into())),
        }
    }

    /// Waits: whoever has it only counts files.
    pub(super) fn store(dir: &Path) -> Result<Self, ModelError> {
        let file = lock_file(dir, STORE)?;
        flock(&file, FlockOperation::LockExclusive).map_err(|e| io("locking in", dir)(e.into()))?;
        Ok(Self(file))
    }

    /// Says how many bytes the model will take.
    pub(super) fn reserve(&mut self, bytes: u64) -> io::Result<()> {
        self.0.set_len(0)?;
        io::Seek::rewind(&mut self.0)?;
        self.0.write_all(bytes.to_string().as_bytes())
    }
}

fn lock_file(dir: &Path, name: &str) -> Result<File, ModelError> {
    let folder = dir.join(LOCKS);
    fs::create_dir_all(&folder).map_err(io("making", &folder))?;
    let path = folder.join(name);
    // Never removed: two processes that lock two files of one name would both be alone.
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).map_err(io("opening", &path))
}

/// What whoever is pulling this model has said it will take; None = nobody is.
pub(super) fn reserved(dir: &Path, name: &str) -> Option<u64> {
    let mut file = File::open(dir.join(LOCKS).join(name)).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(e) if e.kind() == ErrorKind::WouldBlock => {
            let mut text = String::new();
            // A puller that has not said it yet will look for room after us.
            file.read_to_string(&mut text).ok().and_then(|_| text.parse().ok()).or(Some(0))
        }
        _ => None,
    }
}

/// A model that is being used: nobody removes it to make room.
#[derive(Debug)]
pub struct InUse(#[expect(dead_code, reason = "holds the lock")] File);

impl InUse {
    /// Of a file or a model folder. None where it is not there, or its file system knows no locks: it is used all the same.
    pub fn hold(path: &Path) -> Option<Self> {
        let weights = path.join(WEIGHTS);
        let file = File::open(if path.is_dir() { weights.as_path() } else { path }).ok()?;
        touch(&file);
        // Waits: whoever asks whether it is used, or removes it, has it for a moment.
        flock(&file, FlockOperation::LockShared).ok().map(|()| Self(file))
    }
}

/// Notes a use: the time of its last change is what the least recently used model is found by.
fn touch(file: &File) {
    // A folder that may only be read (a shared cache) cannot be told; it is not ours to tidy either.
    let _unwritable = file.set_modified(SystemTime::now());
}

pub(super) fn touch_path(path: &Path) {
    if let Ok(file) = File::open(path) {
        touch(&file);
    }
}

/// Whether some process uses it.
pub(super) fn in_use(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => {
            flock(&file, FlockOperation::NonBlockingLockExclusive).is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
        }
        Err(_) => false,
    }
}

/// Where the checksum of a file stands, as `sha256sum` writes it.
pub(super) fn sum_path(path: &Path) -> PathBuf {
    with_suffix(path, ".sha256")
}

pub(super) fn part_path(path: &Path) -> PathBuf {
    with_suffix(path, ".part")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The checksum beside a file, in lower case.
pub(super) fn read_sum(path: &Path) -> Result<Option<String>, ModelError> {
    let beside = sum_path(path);
    match fs::read_to_string(&beside) {
        Ok(text) => Ok(Some(text.split_whitespace().next().unwrap_or_default().to_ascii_lowercase())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io("reading", &beside)(e)),
    }
}

/// Writes the checksum beside a file, whole or not at all.
pub(super) fn write_sum(path: &Path, sum: &str) -> Result<(), ModelError> {
    let beside = sum_path(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staged = with_suffix(&beside, ".part");
    fs::write(&staged, format!("{sum}  {name}\n")).map_err(io("writing", &staged))?;
    fs::rename(&staged, &beside).map_err(io("writing", &beside))
}

pub(super) fn remove(path: &Path) -> Result<u64, ModelError> {
    let bytes = len(path);
    match fs::remove_file(path) {
        Ok(()) => Ok(bytes),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(0),
        Err(e) => Err(io("removing", path)(e)),
    }
}

/// Removes a model's own folder once nothing is left in it. That of all models holds the locks, and stays.
pub(super) fn remove_empty(paths: &[PathBuf]) {
    if let Some(folder) = paths.first().and_then(|path| path.parent()) {
        let _not_empty = fs::remove_dir(folder);
    }
}

pub(super) fn len(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.len())
}

pub(super) fn last_used(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

/// Free bytes for us on the disk of this folder; None where it does not say.
pub(super) fn free_bytes(dir: &Path) -> Option<u64> {
    statvfs(dir).ok().map(|v| v.f_bavail.saturating_mul(v.f_frsize))
}

/// Feeds a whole file into `hash`; `told` hears how far it is.
pub(super) fn hash_into(hash: &mut Sha256, path: &Path, mut told: impl FnMut(u64)) -> Result<u64, ModelError> {
    let mut file = File::open(path).map_err(io("opening", path))?;
    let mut block = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        match file.read(&mut block).map_err(io("reading", path))? {
            0 => return Ok(done),
            read => {
                hash.update(&block[..read]);
                done += read as u64;
                told(done);
            }
        }
    }
}

pub(super) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn sha256(path: &Path) -> Result<String, ModelError> {
    let mut hash = Sha256::new();
    hash_into(&mut hash, path, |_| ())?;
    Ok(hex(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_puller_at_a_time_and_its_reservation_is_seen() {
        let dir = tempfile::tempdir().expect("folder");
        assert_eq!(reserved(dir.path(), "m"), None);
        let mut lock = Lock::model(dir.path(), "m").expect("lock").expect("free");
        assert_eq!(reserved(dir.path(), "m"), Some(0));
        lock.reserve(1_234).expect("reserve");
        lock.reserve(77).expect("reserve");
        assert_eq!(reserved(dir.path(), "m"), Some(77));
        assert!(Lock::model(dir.path(), "m").expect("lock").is_none());
        assert!(Lock::model(dir.path(), "n").expect("lock").is_some());
        drop(lock);
        assert_eq!(reserved(dir.path(), "m"), None);
        assert!(Lock::model(dir.path(), "m").expect("lock").is_some());
    }

    #[test]
    fn a_model_in_use_is_seen_by_others() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("m.bin");
        assert!(InUse::hold(&path).is_none() && !in_use(&path));
        fs::write(&path, "x").expect("file");
        assert!(!in_use(&path));
        let (first, second) = (InUse::hold(&path), InUse::hold(&path));
        assert!(first.is_some() && second.is_some());
        drop(first);
        assert!(in_use(&path));
        drop(second);
        assert!(!in_use(&path));
        assert!(InUse::hold(dir.path()).is_none(), "no model folder");
        let weights = dir.path().join(WEIGHTS);
        fs::write(&weights, "x").expect("file");
        let folder = InUse::hold(dir.path());
        assert!(folder.is_some() && in_use(&weights));
    }

    #[test]
    fn sums_are_kept_as_sha256sum_writes_them() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("m.bin");
        fs::write(&path, b"abc").expect("file");
        assert_eq!(read_sum(&path).expect("none"), None);
        // FIPS 180-2, appendix B.1
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&path).expect("sum"), known);
        write_sum(&path, known).expect("written");
        assert_eq!(fs::read_to_string(sum_path(&path)).expect("text"), format!("{known}  m.bin\n"));
        assert_eq!(read_sum(&path).expect("read").as_deref(), Some(known));
    }
}
