//! The process in which a worker decodes: one recording, then it ends.
//!
//! Decoders read the files of strangers. Whatever one does here, the worker sees a frame, an exit or a signal. The
//! process is given the file, a socket to say frames on and its standard error. Limits of the kernel bound its memory,
//! its processor time and the files it may open, and let it write none and gain no right. It has no network where its
//! user may make namespaces. It is not kept from reading what its user may read: there is no seccomp or Landlock filter.

use std::{
    any::Any,
    fs::File,
    io::{self, Write},
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
    panic::{AssertUnwindSafe, catch_unwind},
};

use rustix::{
    process::{Resource, Rlimit, setrlimit},
    thread::{UnshareFlags, set_no_new_privs, unshare_unsafe},
};
use voxfleet_schema::failure::{Failure, FailureClass};

use crate::{
    AudioError, Decoder, Limits,
    wire::{Frame, WireError, head},
};

/// Descriptors: standard ones, file, socket, and a few for whatever a library opens for a moment.
const DESCRIPTORS: u64 = 16;
/// Every decoder here is faster than this many times real time, in a build without optimisation too.
const SLOWEST: u64 = 5;
/// Processor time beside decoding.
const SPARE_CPU_S: u64 = 60;

#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    #[error("file descriptor {0} was not inherited")]
    Fd(RawFd),
    #[error("the worker is gone")]
    Write(#[source] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// What the parent says on the command line.
#[derive(Debug, Clone)]
pub struct Task {
    /// The recording.
    pub fd: RawFd,
    /// Where frames go.
    pub out: RawFd,
    /// The recording's name, or its extension with a dot.
    pub name: Option<String>,
    pub limits: Limits,
}

/// Entry point. Call it before anything else has started a thread.
pub fn main(task: &Task) -> Result<(), ChildError> {
    let (file, out) = (inherited(task.fd)?, inherited(task.out)?);
    let mut out = Frames(out);
    if let Err(error) = close_others(task).and_then(|()| confine(&task.limits)) {
        let message = format!("the decoder's limits cannot be set: {error}");
        return out.send(&Frame::Failed { failure: Failure::new(FailureClass::Internal, message) }, &[]);
    }
    // Nothing of what is inside is used afterwards.
    let worked = catch_unwind(AssertUnwindSafe(|| decode(file, task, &mut out)));
    let failure = match worked {
        Ok(Ok(None)) => return Ok(()),
        Ok(Ok(Some(failure))) => failure,
        Ok(Err(error)) => return Err(error),
        Err(panic) => died(panic.as_ref()),
    };
    out.send(&Frame::Failed { failure }, &[])
}

fn decode(file: File, task: &Task, out: &mut Frames) -> Result<Option<Failure>, ChildError> {
    let mut decoder = match Decoder::open(file, task.name.as_deref(), &task.limits) {
        Ok(decoder) => decoder,
        Err(error) => return Ok(Some(failure_of(&error, &task.limits))),
    };
    out.send(&Frame::Opened { format: decoder.format(), total_ms: decoder.total_ms() }, &[])?;
    loop {
        match decoder.next() {
            Ok(Some(chunk)) => out.send(&Frame::Chunk { format: chunk.format }, &chunk.pcm)?,
            Ok(None) => {
                let end = Frame::End { truncated: decoder.truncated(), damaged: decoder.damaged() };
                out.send(&end, &[])?;
                return Ok(None);
            }
            Err(error) => return Ok(Some(failure_of(&error, &task.limits))),
        }
    }
}

fn failure_of(error: &AudioError, limits: &Limits) -> Failure {
    match error {
        // An allocation beyond the process's limit that was told instead of aborting.
        AudioError::Read(error) if error.kind() == io::ErrorKind::OutOfMemory => too_much_memory(limits),
        error => error.failure(),
    }
}

/// The file needs more memory than its decoder may take.
pub fn too_much_memory(limits: &Limits) -> Failure {
    let message = format!("the decoder needed more than the {} MiB it is allowed for this file", limits.memory_mb);
    Failure::new(FailureClass::TooLarge, message)
}

fn died(panic: &(dyn Any + Send)) -> Failure {
    let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let message = format!("the decoder died on this file: {}", said.unwrap_or("no reason given"));
    Failure::new(FailureClass::BadAudio, message)
}

struct Frames(File);

impl Frames {
    fn send(&mut self, frame: &Frame, pcm: &[u8]) -> Result<(), ChildError> {
        let head = head(frame, pcm.len())?;
        self.0.write_all(&head).and_then(|()| self.0.write_all(pcm)).map_err(ChildError::Write)
    }
}

fn inherited(fd: RawFd) -> Result<File, ChildError> {
    if fd <= 2 {
        return Err(ChildError::Fd(fd));
    }
    if !is_open(fd) {
        return Err(ChildError::Fd(fd));
    }
    // SAFETY: it is open, was passed to us by the parent for this, and nothing else in this process knows its number.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: only asked whether it is open, which a closed one answers with an error.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok()
}

/// Whoever started our parent may have left descriptors open that are inherited by all.
fn close_others(task: &Task) -> io::Result<()> {
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2 && *fd != task.fd && *fd != task.out)
        .collect();
    for fd in open {
        // SAFETY: only asked whether it is open: the listing's own number is closed by now.
        if rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok() {
            // SAFETY: it is open, and this process has opened none but the two above.
            unsafe { rustix::io::close(fd) };
        }
    }
    Ok(())
}

/// Processor seconds a recording may take.
pub fn cpu_seconds(limits: &Limits) -> u64 {
    SPARE_CPU_S + limits.max_seconds / SLOWEST
}

fn confine(limits: &Limits) -> io::Result<()> {
    let memory = mapped_bytes()?.saturating_add(limits.memory_mb.saturating_mul(1 << 20));
    let cpu = cpu_seconds(limits);
    let set = |resource, soft: u64, hard: u64| setrlimit(resource, Rlimit { current: Some(soft), maximum: Some(hard) });
    set(Resource::As, memory, memory)?;
    // The first one ends the process with a signal of its own, which tells it from being killed.
    set(Resource::Cpu, cpu, cpu + 5)?;
    set(Resource::Fsize, 0, 0)?;
    set(Resource::Nofile, DESCRIPTORS, DESCRIPTORS)?;
    set(Resource::Core, 0, 0)?;
    set_no_new_privs(true)?;
    // SAFETY: no other thread runs yet, and neither namespace has anything to do with descriptors or memory.
    if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNET) } {
        // Often forbidden in containers. It is a further wall, not the only one.
        eprintln!("the decoder keeps its network namespace: {error}");
    }
    Ok(())
}

/// What the executable and its libraries take already; with CUDA's that is gigabytes of address space.
fn mapped_bytes() -> io::Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split_whitespace().next().and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.ok_or(io::ErrorKind::InvalidData)?.saturating_mul(rustix::param::page_size() as u64))
}
