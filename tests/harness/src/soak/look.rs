//! One look at every process and stream.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    chaos::{schedule::STREAMS, talk::Js},
    child::{children_of, resident_bytes},
    fleet::{Fleet, Servers},
};

/// How long a look at a stream may take: a server that is away is looked at the next time.
const PATIENCE: Duration = Duration::from_secs(1);

/// Everything at one moment.
#[derive(Debug, Clone, Default)]
pub struct Look {
    pub at_s: f64,
    pub processes: Vec<ProcessLook>,
    /// Empty where they were not looked at.
    pub streams: Vec<StreamLook>,
    /// The same, of those that serve HTTP.
    pub tasks: Vec<TaskLook>,
}

/// What runs at once inside a process, as it says itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskLook {
    pub name: String,
    pub pid: u32,
    pub tasks: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessLook {
    /// `nats-server`, `dispatcher-1`, `gpu-1`, `gpu-1 engine`; this process is `producers`.
    pub name: String,
    pub pid: u32,
    pub resident_bytes: u64,
    pub descriptors: u64,
    pub threads: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamLook {
    pub name: &'static str,
    pub bytes: u64,
    pub messages: u64,
    pub consumers: u64,
    /// Of a bucket: its keys, those removed that still have their marker included.
    pub subjects: u64,
}

pub(super) fn of(fleet: &Fleet, at: Duration) -> Look {
    let mut processes = vec![process("producers".to_owned(), std::process::id())];
    if let Servers::One(server) = &fleet.servers {
        processes.push(process("nats-server".to_owned(), server.pid()));
    }
    processes.extend(fleet.dispatchers.iter().map(|d| process(d.name().to_owned(), d.pid())));
    for worker in &fleet.workers {
        processes.push(process(worker.name().to_owned(), worker.pid()));
        // A decoder of recordings lives for seconds.
        let engine = children_of(worker.pid()).into_iter().find(|pid| is_engine(*pid));
        processes.extend(engine.map(|pid| process(format!("{} engine", worker.name()), pid)));
    }
    // One that has just been killed has nothing.
    let processes = processes.into_iter().flatten().collect();
    Look { at_s: at.as_secs_f64(), processes, ..Look::default() }
}

fn process(name: String, pid: u32) -> Option<ProcessLook> {
    let entries = |folder: &str| {
        let found = std::fs::read_dir(format!("/proc/{pid}/{folder}")).ok()?;
        Some(found.count() as u64)
    };
    Some(ProcessLook {
        name,
        pid,
        resident_bytes: resident_bytes(pid)?,
        descriptors: entries("fd")?,
        threads: entries("task")?,
    })
}

fn is_engine(pid: u32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|b| *b == 0).nth(1) == Some(b"engine")
}

pub(super) async fn streams(js: &Js) -> Vec<StreamLook> {
    let mut found = Vec::new();
    for name in STREAMS {
        let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, js.get_stream(name)).await else { continue };
        let state = &stream.cached_info().state;
        found.push(StreamLook {
            name,
            bytes: state.bytes,
            messages: state.messages,
            consumers: state.consumer_count as u64,
            subjects: state.subjects_count,
        });
    }
    found
}

pub(super) async fn tasks(fleet: &Fleet) -> Vec<TaskLook> {
    let children = fleet.dispatchers.iter().map(|d| (d.name(), d.pid(), d.log()));
    let children = children.chain(fleet.workers.iter().map(|w| (w.name(), w.pid(), w.log())));
    let mut found = Vec::new();
    for (name, pid, log) in children {
        let Some(address) = address(&log) else { continue };
        let Ok(Some(tasks)) = tokio::time::timeout(PATIENCE, ask(&address)).await else { continue };
        found.push(TaskLook { name: name.to_owned(), pid, tasks });
    }
    found
}

/// Where it serves HTTP, if it does: a log is of all runs under one name, and the last one counts.
fn address(log: &str) -> Option<String> {
    let (_, rest) = log.rsplit_once("http url=\"http://")?;
    rest.split('"').next().map(str::to_owned)
}

async fn ask(address: &str) -> Option<u64> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok()?;
    tasks_in(&String::from_utf8_lossy(&answer))
}

fn tasks_in(answer: &str) -> Option<u64> {
    answer.lines().find_map(|line| line.strip_prefix("voxfleet_tasks "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_read_from_what_a_process_serves() {
        let log = "INFO http url=\"http://127.0.0.1:1\"\nINFO http url=\"http://127.0.0.1:2\"\nINFO more\n";
        assert_eq!(address(log).as_deref(), Some("127.0.0.1:2"));
        assert_eq!(address("INFO no http\n"), None);
        assert_eq!(tasks_in("HTTP/1.1 200 OK\r\n\r\n# TYPE voxfleet_tasks gauge\nvoxfleet_tasks 41\n"), Some(41));
        assert_eq!(tasks_in("HTTP/1.1 401 Unauthorized\r\n\r\n"), None);
    }

    #[test]
    fn a_process_shows_what_it_holds() {
        let me = std::process::id();
        let before = process("me".to_owned(), me).expect("this process is there");
        assert!(before.resident_bytes > 0 && before.threads > 0);
        let held: Vec<_> = (0..40).map(|_| std::fs::File::open("/dev/null").expect("a file")).collect();
        let during = process("me".to_owned(), me).expect("still there");
        // Other tests of this process open and close files meanwhile, but not that many.
        assert!(during.descriptors > before.descriptors + 20, "{before:?} {during:?}");
        drop(held);
        assert_eq!(process("nobody".to_owned(), u32::MAX), None);
        assert!(!is_engine(me));
    }
}
