//! One child process: its output in a file, killed and reaped when dropped, killed by the kernel when this process dies.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child as StdChild, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal};

use crate::{Error, Result, wait::eventually};

/// For a process to start and bind its address, on a machine that compiles beside it.
const HTTP_DEADLINE: Duration = Duration::from_secs(30);
/// How much of a log is shown when something failed.
const TAIL_BYTES: u64 = 3 * 1024;
/// For threads to stand still after SIGSTOP; they do so at once unless the kernel itself is stuck.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// A running child.
pub struct Child {
    name: String,
    child: StdChild,
    log: PathBuf,
    stopped: bool,
}

impl Child {
    /// Starts `command`, its standard output and error appended to `log`.
    pub fn start(name: impl Into<String>, mut command: Command, log: &Path) -> Result<Self> {
        let name = name.into();
        let out = File::options().create(true).append(true).open(log).map_err(Error::io(format!("log of {name}")))?;
        let err = out.try_clone().map_err(Error::io(format!("log of {name}")))?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = spawn(command).map_err(Error::io(format!("starting {name}")))?;
        Ok(Self { name, child, log: log.to_owned(), stopped: false })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        tail(&self.log).unwrap_or_else(|e| format!("(log unreadable: {e})"))
    }

    /// Whole log, as far as written.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Where it serves HTTP, as its log says: `http url="http://127.0.0.1:40123"`.
    pub async fn http_url(&self) -> Result<String> {
        let what = format!("http of {}", self.name);
        let found = eventually(what, HTTP_DEADLINE, || {
            let log = self.log();
            let url = log.lines().rev().filter(|line| line.contains("http url=")).find_map(|line| {
                let (_, rest) = line.split_once("url=\"")?;
                rest.split('"').next().map(str::to_owned)
            });
            std::future::ready(url)
        });
        Ok(found.await?)
    }

    /// Its end, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal, unless it has ended. Its process id can not be anybody else's: only we reap it.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended().is_some() {
            return Ok(());
        }
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).map_err(|e| Error::Io { what: format!("signal to {}", self.name), source: e.into() })
    }

    /// SIGHUP: its terminal is gone.
    pub fn hang_up(&mut self) -> Result<()> {
        self.signal(Signal::HUP)
    }

    /// SIGKILL, and reaps it.
    pub fn kill9(&mut self) -> Result<()> {
        self.child.kill().map_err(Error::io(format!("killing {}", self.name)))?;
        self.child.wait().map_err(Error::io(format!("reaping {}", self.name)))?;
        Ok(())
    }

    /// SIGTERM, and waits for its end.
    pub async fn terminate(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.cont()?;
        self.signal(Signal::TERM)?;
        self.wait(deadline).await
    }

    pub async fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        Ok(eventually(what, deadline, || std::future::ready(self.ended())).await?)
    }

    /// SIGSTOP: alive, silent. Back when every thread of it stands still.
    pub fn stop(&mut self) -> Result<()> {
        self.stopped = true;
        self.signal(Signal::STOP)?;
        let begun = std::time::Instant::now();
        while !stands_still(self.pid()) {
            if begun.elapsed() > STOP_DEADLINE {
                return Err(Error::Wrong(format!("{} does not stop", self.name)));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// SIGCONT after [`Self::stop`].
    pub fn cont(&mut self) -> Result<()> {
        if std::mem::take(&mut self.stopped) { self.signal(Signal::CONT) } else { Ok(()) }
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> Option<u64> {
        resident_bytes(self.pid())
    }

    /// An error with the end of the log, if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.ended() {
            None => Ok(()),
            Some(status) => {
                Err(Error::EndedEarly { name: self.name.clone(), status: describe(status), log: self.log_tail() })
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only when it has ended and was reaped, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- end of the log of {} ({})\n{}", self.name, self.log.display(), self.log_tail());
        }
    }
}

/// `exit code 1`, `signal 9`.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Whether every thread of a process is stopped (state T in proc(5)).
fn stands_still(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The name before the state may hold anything but ends with the last parenthesis.
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 'Z', 'X']))
    })
}

/// Resident memory of a process, in bytes.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Processes whose parent is `pid`.
pub fn children_of(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

type Order = (Command, SyncSender<io::Result<StdChild>>);

/// Spawns from one thread that lives as long as this process: the kernel sends a child its parent-death signal when the
/// *thread* that made it ends, and test threads and pool threads end early.
fn spawn(mut command: Command) -> io::Result<StdChild> {
    static SPAWNER: OnceLock<Option<SyncSender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = sync_channel::<Order>(16);
        std::thread::Builder::new()
            .name("spawner".to_owned())
            .spawn(move || {
                for (mut command, answer) in inbox {
                    // Nobody waits any more: the child is dropped, and its parent-death signal ends it with us.
                    let _ = answer.send(command.spawn());
                }
            })
            .ok()
            .map(|_| orders)
    });
    let parent = getpid();
    // SAFETY: the closure runs between fork and exec; it makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if getppid() != Some(parent) {
                return Err(io::Error::from_raw_os_error(rustix::io::Errno::SRCH.raw_os_error()));
            }
            Ok(())
        });
    }
    let (answer, reply) = sync_channel(1);
    let gone = || io::Error::other("the spawner thread is gone");
    spawner.as_ref().ok_or_else(gone)?.send((command, answer)).map_err(|_| gone())?;
    reply.recv().map_err(|_| gone())?
}
