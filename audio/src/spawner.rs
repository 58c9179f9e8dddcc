//! Starts children: the same binary, descriptors of ours as its only inheritance, and dead when we are.
//!
//! `PR_SET_PDEATHSIG` strikes when the *thread* that forked ends, so all children are forked from one thread that lives as
//! long as the process.

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd as _, AsRawFd, OwnedFd},
    path::PathBuf,
    process::Stdio,
    sync::{OnceLock, mpsc::SyncSender},
};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    runtime::Handle,
    sync::oneshot,
};

#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
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

/// What a child finds in its environment.
#[derive(Debug)]
pub enum Environment {
    /// Ours, and this.
    With(&'static str, OsString),
    /// Nothing but what finding the executable's libraries takes.
    Cleared,
}

/// A child to be.
#[derive(Debug)]
pub struct Launch {
    /// None = this executable.
    pub exe: Option<PathBuf>,
    pub args: Vec<OsString>,
    pub environment: Environment,
    /// The child has them under the same numbers; here they are closed once it has them.
    pub inherited: Vec<OwnedFd>,
}

struct Order {
    command: Command,
    runtime: Handle,
    answer: oneshot::Sender<io::Result<Child>>,
}

/// Linux' request for what a socket has written and nobody has read yet.
const SIOCOUTQ: rustix::ioctl::Opcode = 0x5411;

/// The thread that forks, for the life of the process.
fn spawner() -> Result<&'static SyncSender<Order>, SpawnError> {
    static SPAWNER: OnceLock<Option<SyncSender<Order>>> = OnceLock::new();
    SPAWNER
        .get_or_init(|| {
            // One engine, and a decoder for each job that starts.
            let (orders, queue) = std::sync::mpsc::sync_channel::<Order>(64);
            let run = move || {
                while let Ok(mut order) = queue.recv() {
                    // tokio registers the child with the runtime it is spawned in.
                    let _entered = order.runtime.enter();
                    // Whoever asked may have given up; kill_on_drop then ends the child.
                    let _ = order.answer.send(order.command.spawn());
                }
            };
            std::thread::Builder::new().name("spawner".to_owned()).spawn(run).ok().map(|_| orders)
        })
        .as_ref()
        .ok_or(SpawnError::Spawner)
}

/// A socketpair: ours, and the end to be inherited.
pub fn socketpair() -> Result<(UnixStream, OwnedFd), SpawnError> {
    let pair = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, OwnedFd::from(theirs)))
    };
    pair().map_err(SpawnError::Socket)
}

/// Whether the other end has read everything that was written to this socket.
pub fn is_all_read(socket: &UnixStream) -> io::Result<bool> {
    // SAFETY: SIOCOUTQ writes one C int, and every kernel for which this is built knows it by this number.
    let unread = unsafe { rustix::ioctl::ioctl(socket, rustix::ioctl::Getter::<SIOCOUTQ, std::ffi::c_int>::new()) }?;
    Ok(unread == 0)
}

/// The number `fd` will have in the child.
pub fn number(fd: &OwnedFd) -> OsString {
    fd.as_raw_fd().to_string().into()
}

/// Its standard error is a pipe to us, its standard output goes nowhere, and it is killed when it is dropped.
pub async fn launch(launch: Launch) -> Result<Child, SpawnError> {
    // Not its path: an upgrade may have put another version there since.
    let exe = launch.exe.unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    let mut command = Command::new(&exe);
    match launch.environment {
        Environment::With(name, value) => {
            command.env(name, value);
        }
        Environment::Cleared => {
            const LIBRARIES: &str = "LD_LIBRARY_PATH";
            command.env_clear();
            if let Some(value) = std::env::var_os(LIBRARIES) {
                command.env(LIBRARIES, value);
            }
        }
    }
    command
        .args(&launch.args)
        .stdin(Stdio::null())
        // Libraries print there; nothing of ours does.
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // A Ctrl-C in the terminal is for us; the child ends when we say so.
        .process_group(0)
        .kill_on_drop(true);
    start(command, exe, launch.inherited, Signal::KILL).await
}

/// A worker of `worker --all-gpus`: this binary with these words behind its name. It writes where we write, and is asked to
/// stop when we die.
pub async fn launch_worker(args: &[OsString]) -> Result<Child, SpawnError> {
    let exe = PathBuf::from("/proc/self/exe");
    let mut command = Command::new(&exe);
    // A Ctrl-C in the terminal is for us: heard twice, it would end the worker at once.
    command.args(args).stdin(Stdio::null()).process_group(0);
    start(command, exe, Vec::new(), Signal::TERM).await
}

/// Forks from the thread that stays, with `at_death` as what the child hears when we die.
async fn start(
    mut command: Command,
    exe: PathBuf,
    inherited: Vec<OwnedFd>,
    at_death: Signal,
) -> Result<Child, SpawnError> {
    let parent = rustix::process::getpid();
    // The closure owns the child's descriptors, so they stay open until the order is carried out and close here with it.
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are a few system calls without
    // allocation or locks.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(at_death))?;
            // It may have died before the line above took effect; then nobody would ever end this child.
            if getppid() != Some(parent) {
                return Err(io::ErrorKind::NotConnected.into());
            }
            for fd in &inherited {
                rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
    let (answer, spawned) = oneshot::channel();
    let orders = spawner()?;
    orders.try_send(Order { command, runtime: Handle::current(), answer }).map_err(|_| SpawnError::Spawner)?;
    spawned.await.map_err(|_| SpawnError::Spawner)?.map_err(|source| SpawnError::Start { exe, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn what_nobody_has_read_is_seen() {
        let (mut ours, theirs) = socketpair().expect("a pair");
        assert!(is_all_read(&ours).expect("asked"));
        ours.write_all(b"abc").await.expect("room");
        assert!(!is_all_read(&ours).expect("asked"));
        let mut theirs = std::os::unix::net::UnixStream::from(theirs);
        theirs.read_exact(&mut [0; 3]).expect("there");
        assert!(is_all_read(&ours).expect("asked"));
    }
}
