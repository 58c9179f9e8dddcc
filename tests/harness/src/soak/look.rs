//! One look at every process and stream.

use std::time::Duration;

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
    Look { at_s: at.as_secs_f64(), processes, streams: Vec::new() }
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

#[cfg(test)]
mod tests {
    use super::*;

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
