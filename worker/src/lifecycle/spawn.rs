//! Starts the engine child: the same binary, one end of a socketpair as its only inheritance, and dead when we are.
//!
//! `PR_SET_PDEATHSIG` strikes when the *thread* that forked ends, so all children are forked from one thread that lives as
//! long as the process.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    process::Stdio,
    sync::{OnceLock, mpsc::SyncSender},
};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use tokio::{
    net::UnixStream,
    process::{Child, ChildStderr, Command},
    runtime::Handle,
    sync::oneshot,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    #[error("cannot make a socketpair")]
    Socket(#[source] io::Error),
    #[error("cannot start {exe}")]
    Start {
        exe: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the thread that starts children is gone")]
    Spawner,
}

/// What runs as the engine child.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    /// None = this executable.
    pub(crate) exe: Option<PathBuf>,
    /// Before `--fd N`.
    pub(crate) args: Vec<String>,
    /// `CUDA_VISIBLE_DEVICES`.
    pub(crate) visible_device: String,
}

/// A started child.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) child: Child,
    pub(crate) stderr: Option<ChildStderr>,
    pub(crate) socket: UnixStream,
}

struct Order {
    command: Command,
    runtime: Handle,
    answer: oneshot::Sender<io::Result<Child>>,
}

/// The thread that forks, for the life of the process.
fn spawner() -> Result<&'static SyncSender<Order>, SpawnError> {
    static SPAWNER: OnceLock<Option<SyncSender<Order>>> = OnceLock::new();
    SPAWNER
        .get_or_init(|| {
            let (orders, queue) = std::sync::mpsc::sync_channel::<Order>(4);
            let run = move || {
                while let Ok(mut order) = queue.recv() {
                    // tokio registers the child with the runtime it is spawned in.
                    let _entered = order.runtime.enter();
                    // Whoever asked may have given up; kill_on_drop then ends the child.
                    let _ = order.answer.send(order.command.spawn());
                }
            };
            std::thread::Builder::new().name("engine-spawner".to_owned()).spawn(run).ok().map(|_| orders)
        })
        .as_ref()
        .ok_or(SpawnError::Spawner)
}

pub(crate) async fn spawn(program: &Program) -> Result<Spawned, SpawnError> {
    let exe = match &program.exe {
        Some(exe) => exe.clone(),
        // Not its path: an upgrade may have put another version there since.
        None => PathBuf::from("/proc/self/exe"),
    };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(SpawnError::Socket)?;
    ours.set_nonblocking(true).map_err(SpawnError::Socket)?;
    let socket = UnixStream::from_std(ours).map_err(SpawnError::Socket)?;

    let mut command = Command::new(&exe);
    command
        .args(&program.args)
        .arg("--fd")
        .arg(theirs.as_raw_fd().to_string())
        .env("CUDA_VISIBLE_DEVICES", &program.visible_device)
        .stdin(Stdio::null())
        // Libraries print there; nothing of ours does.
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // A Ctrl-C in the terminal is for us; the child ends when we say so.
        .process_group(0)
        .kill_on_drop(true);
    let parent = rustix::process::getpid();
    // The closure owns the child's end, so it stays open until the order is carried out and closes here with it.
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are three system calls without
    // allocation or locks.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // It may have died before the line above took effect; then nobody would ever end this child.
            if getppid() != Some(parent) {
                return Err(io::ErrorKind::NotConnected.into());
            }
            rustix::io::fcntl_setfd(theirs.as_fd(), rustix::io::FdFlags::empty())?;
            Ok(())
        });
    }

    let (answer, spawned) = oneshot::channel();
    let orders = spawner()?;
    orders.try_send(Order { command, runtime: Handle::current(), answer }).map_err(|_| SpawnError::Spawner)?;
    let mut child =
        spawned.await.map_err(|_| SpawnError::Spawner)?.map_err(|source| SpawnError::Start { exe, source })?;
    let stderr = child.stderr.take();
    Ok(Spawned { child, stderr, socket })
}
