//! A card that is a folder: what is allocated on it are files, so that processes share it and a test can fill it, break it
//! or take it away.
//!
//! | file | holds |
//! |---|---|
//! | `total_mb` | the size of the card |
//! | `<pid>.<n>` | one allocation of a process, in MB; of a process that has ended it counts no more |
//! | `tenant.<name>` | what somebody else has on it, in MB |
//! | `busy.<pid>.<n>` | there while a decode runs |
//! | `faults/<what>` | after how many decodes (or loads) a fault strikes; it does so once, or each time with ` always` behind |
//!
//! The folder is locked with flock(2) while memory is counted and taken, and by whoever else wants both to be one step. As
//! with CUDA, only the weights may be refused: whatever does not fit later ends the process.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open},
    process::{Signal, getpid, kill_process},
};

use crate::engine::{
    EngineError,
    last_words::{LastWords, leave},
};

/// The file that says how large the card is.
const TOTAL: &str = "total_mb";
/// What others have on it.
const TENANT: &str = "tenant.";
/// A decode that runs.
const BUSY: &str = "busy.";
/// Behind a fault's number: it strikes each time.
const ALWAYS: &str = " always";

/// The cards this process has a context on, as long as it lives.
static CONTEXTS: Mutex<BTreeMap<PathBuf, Arc<Card>>> = Mutex::new(BTreeMap::new());

/// The way to the supervisor, for the fault that writes nonsense there.
static WIRE: OnceLock<UnixStream> = OnceLock::new();

/// Where this process speaks to its supervisor; the first one counts.
pub fn speaks_through(wire: UnixStream) {
    // A second child in one process is one of a test, and has no faults of this kind.
    let _ = WIRE.set(wire);
}

/// Why memory cannot be had.
#[derive(Debug, thiserror::Error)]
enum CardError {
    #[error("{wanted_mb} MB do not fit: {used_mb} of {total_mb} MB are in use")]
    Full { wanted_mb: u64, used_mb: u64, total_mb: u64 },
    #[error("the card does not answer")]
    Gone(#[from] io::Error),
}

/// A card with a context of this process on it.
#[derive(Debug)]
pub struct Card {
    folder: PathBuf,
    next: AtomicU64,
}

/// Memory on a card, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Allocation {
    path: PathBuf,
    pub mb: u64,
}

/// A decode that runs on the card.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // Taken away with the card, it is as free as it can be.
        let _ = fs::remove_file(&self.path);
    }
}

impl Card {
    /// The card in this folder. The first use in a process takes `context_mb` of it, which are given back with its end.
    pub fn open(folder: &Path, context_mb: u64) -> Result<Arc<Self>, EngineError> {
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(card) = contexts.get(folder) {
            return Ok(Arc::clone(card));
        }
        let card = Self { folder: folder.to_owned(), next: AtomicU64::new(0) };
        let context = card.soft(card.allocate(context_mb))?;
        // Its file goes with the process.
        std::mem::forget(context);
        let card = Arc::new(card);
        contexts.insert(folder.to_owned(), Arc::clone(&card));
        Ok(card)
    }

    /// Memory for weights: what does not fit is an error, unless a fault is due.
    pub fn weights(&self, mb: u64) -> Result<Allocation, EngineError> {
        self.strike(&[("oom_at_load", Fault::OutOfMemory)]);
        self.soft(self.allocate(mb))
    }

    /// Memory that is asked for after the load: there is no way back from what does not fit.
    pub fn state(&self, mb: u64) -> Allocation {
        self.allocate(mb).unwrap_or_else(|error| end(&error))
    }

    /// A decode begins: the moment for faults, and for finding out that somebody has taken the memory in use. It shows until
    /// it is dropped.
    pub fn decode(&self) -> Kernel {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let kernel = Kernel { path: self.folder.join(format!("{BUSY}{}.{n}", std::process::id())) };
        let shown = fs::write(&kernel.path, "").map_err(CardError::from);
        self.strike(&AT_DECODE);
        if let Err(error) = shown.and_then(|()| self.locked()).and_then(|_lock| fits(&self.folder, 0)) {
            end(&error);
        }
        kernel
    }

    fn soft(&self, allocated: Result<Allocation, CardError>) -> Result<Allocation, EngineError> {
        match allocated {
            Ok(allocation) => Ok(allocation),
            Err(error @ CardError::Full { .. }) => Err(EngineError::OutOfMemory(error.to_string())),
            Err(error) => end(&error),
        }
    }

    fn allocate(&self, mb: u64) -> Result<Allocation, CardError> {
        let _lock = self.locked()?;
        fits(&self.folder, mb)?;
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.join(format!("{}.{n}", std::process::id()));
        fs::write(&path, mb.to_string())?;
        Ok(Allocation { path, mb })
    }

    /// A description of its own each time: threads of this process keep each other out too.
    fn locked(&self) -> Result<OwnedFd, CardError> {
        let folder = open(&self.folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let folder = folder.map_err(io::Error::from)?;
        flock(&folder, FlockOperation::LockExclusive).map_err(io::Error::from)?;
        Ok(folder)
    }

    /// Counts down the faults among `these`, and does what is due.
    fn strike(&self, these: &[(&str, Fault)]) {
        let due = self.locked().map(|_lock| {
            let folder = self.folder.join("faults");
            these.iter().find(|(name, _)| is_due(&folder.join(name)))
        });
        match due {
            Ok(Some((name, fault))) => {
                tracing::error!(fault = name, "simulated fault");
                fault.strike();
            }
            Ok(None) => {}
            Err(error) => end(&error),
        }
    }
}

/// What may happen at a decode, in this order where several are due.
const AT_DECODE: [(&str, Fault); 10] = [
    ("oom_at_decode", Fault::OutOfMemory),
    ("abort", Fault::Abort),
    ("assertion", Fault::Assertion),
    ("lost", Fault::DeviceLost),
    ("mismatch", Fault::DriverMismatch),
    ("library", Fault::MissingLibrary),
    ("exit", Fault::Exit),
    ("kill", Fault::Kill),
    ("hang", Fault::Hang),
    ("garbage", Fault::Garbage),
];

#[derive(Debug, Clone, Copy)]
enum Fault {
    OutOfMemory,
    Abort,
    Assertion,
    DeviceLost,
    DriverMismatch,
    MissingLibrary,
    Exit,
    Kill,
    Hang,
    Garbage,
}

impl Fault {
    fn strike(self) {
        match self {
            Self::OutOfMemory => leave(LastWords::OutOfMemory, "CUDA error: out of memory (simulated)"),
            Self::Assertion => leave(LastWords::Assertion, "GGML_ASSERT(false) failed (simulated)"),
            Self::DeviceLost => leave(LastWords::DeviceLost, "CUDA error: GPU is lost (simulated)"),
            Self::DriverMismatch => {
                let words = "CUDA error: driver version is insufficient for runtime version (simulated)";
                leave(LastWords::DriverMismatch, words)
            }
            Self::MissingLibrary => {
                let words = "libcublas.so.13: cannot open shared object file (simulated)";
                leave(LastWords::MissingLibrary, words)
            }
            Self::Abort => std::process::abort(),
            Self::Exit => std::process::exit(7),
            Self::Kill => {
                if let Err(error) = kill_process(getpid(), Signal::KILL) {
                    tracing::error!(%error, "cannot kill myself");
                }
            }
            // Deaf to its cancel flag, as a stuck device is.
            Self::Hang => loop {
                std::thread::park_timeout(Duration::from_secs(3_600));
            },
            Self::Garbage => {
                if let Some(Err(error)) = WIRE.get().map(write_garbage) {
                    tracing::error!(%error, "garbage not written");
                }
            }
        }
    }
}

/// No frame is as long as this says it is, and none has such a content.
fn write_garbage(mut wire: &UnixStream) -> io::Result<()> {
    let mut bytes = [0xff; 4_096];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes[64..])?;
    wire.write_all(&bytes)
}

/// Counts one down; says whether it is this one's turn. Without a number nothing is due.
fn is_due(fault: &Path) -> bool {
    let Ok(text) = fs::read_to_string(fault) else { return false };
    let text = text.trim_end();
    let (count, always) = text.strip_suffix(ALWAYS).map_or((text, ""), |count| (count, ALWAYS));
    let Ok(count) = count.trim().parse::<u64>() else { return false };
    let written = match count.checked_sub(1) {
        None if always.is_empty() => fs::remove_file(fault),
        None => Ok(()),
        Some(left) => fs::write(fault, format!("{left}{always}")),
    };
    if let Err(error) = written {
        tracing::error!(%error, fault = %fault.display(), "fault not counted down");
    }
    count == 0
}

fn end(error: &CardError) -> ! {
    match error {
        CardError::Full { .. } => leave(LastWords::OutOfMemory, &format!("CUDA error: out of memory: {error}")),
        CardError::Gone(why) => leave(LastWords::DeviceLost, &format!("CUDA error: GPU is lost: {error}: {why}")),
    }
}

/// Whether so much more fits, now.
fn fits(folder: &Path, wanted_mb: u64) -> Result<(), CardError> {
    let total = fs::read_to_string(folder.join(TOTAL))?;
    let total_mb = total.trim().parse().map_err(|_| io::Error::other(format!("{total:?} is not a size")))?;
    let used_mb = used_mb(folder)?;
    if used_mb + wanted_mb > total_mb {
        return Err(CardError::Full { wanted_mb, used_mb, total_mb });
    }
    Ok(())
}

/// All that is allocated, by living processes and tenants.
fn used_mb(folder: &Path) -> io::Result<u64> {
    let mut used = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let pid = name.split_once('.').and_then(|(pid, _)| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !lives(pid)) {
            // Its owner has ended; so has what it held.
            let _ = fs::remove_file(entry.path());
        } else if pid.is_some() || name.starts_with(TENANT) {
            // One that goes away meanwhile, or is being written, counts for nothing.
            let mb = fs::read_to_string(entry.path()).unwrap_or_default();
            used += mb.trim().parse::<u64>().unwrap_or(0);
        }
    }
    Ok(used)
}

/// A process that has ended keeps its number until its parent has looked, but none of its memory.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything.
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(total_mb: u64) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("folder");
        fs::write(folder.path().join(TOTAL), total_mb.to_string()).expect("total");
        fs::create_dir(folder.path().join("faults")).expect("faults");
        let path = folder.path().to_owned();
        (folder, path)
    }

    #[test]
    fn memory_is_counted_over_processes_and_tenants_and_given_back() {
        let (_folder, path) = card(1_000);
        let card = Card::open(&path, 100).expect("context");
        assert_eq!(used_mb(&path).expect("used"), 100);
        assert!(Arc::ptr_eq(&card, &Card::open(&path, 100).expect("again")), "one context a process");
        fs::write(path.join("tenant.llm"), "300\n").expect("tenant");
        // A process that has ended, and a child that has and was not looked after yet.
        fs::write(path.join("4194999.0"), "500").expect("dead");
        let mut ended = std::process::Command::new("true").spawn().expect("child");
        let zombie = || fs::read_to_string(format!("/proc/{}/stat", ended.id())).expect("stat").contains(") Z");
        while !zombie() {
            std::thread::yield_now();
        }
        fs::write(path.join(format!("{}.0", ended.id())), "400").expect("zombie");
        let weights = card.weights(600).expect("just fits");
        assert_eq!(used_mb(&path).expect("used"), 1_000);
        let refused = card.weights(1).expect_err("full");
        assert!(matches!(&refused, EngineError::OutOfMemory(why) if why.contains("1000 of 1000 MB")), "{refused}");
        drop(weights);
        let state = card.state(550);
        fs::remove_file(path.join("tenant.llm")).expect("shrinks");
        drop(card.weights(300).expect("room again"));
        drop(state);
        assert_eq!(used_mb(&path).expect("used"), 100, "the context stays");
        ended.wait().expect("reaped");
    }

    #[test]
    fn a_fault_strikes_after_its_count_once_or_always() {
        let (_folder, path) = card(1);
        let fault = path.join("faults/abort");
        let due = || is_due(&fault);
        assert!(!due(), "nobody asked for it");
        fs::write(&fault, "2\n").expect("fault");
        assert_eq!([due(), due(), due(), due()], [false, false, true, false]);
        fs::write(&fault, "1 always").expect("fault");
        assert_eq!([due(), due(), due(), due()], [false, true, true, true]);
        fs::write(&fault, "soon").expect("fault");
        assert!(!due());
    }

    #[test]
    fn two_who_want_the_last_memory_do_not_both_get_it() {
        let (_folder, path) = card(100);
        let card = Card::open(&path, 0).expect("card");
        let got = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..8).map(|_| scope.spawn(|| card.weights(60).ok())).collect();
            let got: Vec<_> = takers.into_iter().filter_map(|t| t.join().expect("thread")).collect();
            got.len()
        });
        assert_eq!(got, 1);
    }
}
