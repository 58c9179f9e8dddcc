//! The parent's side of a recording's decoder: a process of its own that may crash, hang, or be out of memory.
//!
//! The child says frames over a socket and is asked nothing: when nobody reads, the socket fills and it waits. Time only
//! counts against it while it is listened to. Whatever becomes of it is a chunk, an end or a typed failure, and it is
//! gone when this is dropped.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt as _},
    path::PathBuf,
    process::ExitStatus,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use rustix::process::Signal;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::UnixStream,
    process::{Child, ChildStderr},
    time::{Instant, timeout, timeout_at},
};
use voxfleet_schema::{
    audio::AudioFormat,
    failure::{Failure, FailureClass},
};

use crate::{
    Chunk, Limits,
    child::{cpu_seconds, too_much_memory},
    spawner::{Environment, Launch, SpawnError, launch, number, socketpair},
    wire::{Frame, take},
};

/// The subcommand of the child.
const SUBCOMMAND: &str = "audio-decoder";
/// Last words kept of its standard error.
const LAST_WORDS: usize = 4096;
/// From the end of its frames, or from being killed, to its end.
const END_GRACE: Duration = Duration::from_secs(5);

/// A recording being decoded in a process of its own.
#[derive(Debug)]
pub struct DecoderProcess {
    child: Child,
    frames: UnixStream,
    /// Read and not yet a whole frame.
    buffer: BytesMut,
    stderr: Option<ChildStderr>,
    said: Vec<u8>,
    limits: Limits,
    /// Since when it is listened to without a byte from it.
    silent_since: Option<Instant>,
    format: AudioFormat,
    total_ms: Option<u64>,
    truncated: bool,
    damaged: u64,
    /// How it ended: an end, or the failure that every further question is answered with.
    over: Option<Result<(), Failure>>,
}

impl DecoderProcess {
    /// Starts it and waits until it knows that `file` is a recording. `exe` is the `voxfleet` executable; none = this
    /// one. `name` is a hint. The file's position does not matter and stays as it is.
    pub async fn start(
        exe: Option<PathBuf>,
        file: File,
        name: Option<String>,
        limits: Limits,
    ) -> Result<Self, Failure> {
        let (frames, out) = socketpair().map_err(not_started)?;
        let file = OwnedFd::from(file);
        let mut args: Vec<OsString> =
            vec![SUBCOMMAND.into(), "--fd".into(), number(&file), "--out".into(), number(&out)];
        let number = |n: u64| OsString::from(n.to_string());
        args.extend(["--max-seconds".into(), number(limits.max_seconds)]);
        args.extend(["--memory-mb".into(), number(limits.memory_mb)]);
        if let Some(extension) = name.as_deref().and_then(extension) {
            args.extend(["--extension".into(), extension.into()]);
        }
        let order = Launch { exe, args, environment: Environment::Cleared, inherited: vec![file, out] };
        let mut child = launch(order).await.map_err(not_started)?;
        let stderr = child.stderr.take();
        tracing::debug!(pid = child.id(), "decoder started");
        let mut process = Self {
            child,
            frames,
            buffer: BytesMut::new(),
            stderr,
            said: Vec::new(),
            limits,
            silent_since: None,
            format: AudioFormat::default(),
            total_ms: None,
            truncated: false,
            damaged: 0,
            over: None,
        };
        match process.frame().await? {
            (Frame::Opened { format, total_ms }, _) => (process.format, process.total_ms) = (format, total_ms),
            (Frame::Failed { failure }, _) => return Err(process.failed(failure).await),
            (frame, _) => return Err(process.out_of_order(&frame)),
        }
        Ok(process)
    }

    /// Of the first chunk.
    pub fn format(&self) -> AudioFormat {
        self.format
    }

    /// Length, if the recording says it credibly.
    pub fn total_ms(&self) -> Option<u64> {
        self.total_ms
    }

    /// The recording breaks off: there was more of it once. Known after the last chunk.
    pub fn truncated(&self) -> bool {
        self.truncated
    }

    /// Parts that could not be decoded. Known after the last chunk.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// The next 200 ms; none after the last. May be dropped and called again. After a failure there is nothing more.
    pub async fn next(&mut self) -> Result<Option<Chunk>, Failure> {
        if let Some(over) = &self.over {
            return over.clone().map(|()| None);
        }
        // An earlier wait may have been given up long ago.
        self.silent_since = None;
        match self.frame().await? {
            (Frame::Chunk { format }, pcm) => Ok(Some(Chunk { format, pcm })),
            (Frame::End { truncated, damaged }, _) => {
                (self.truncated, self.damaged, self.over) = (truncated, damaged, Some(Ok(())));
                self.reap().await;
                Ok(None)
            }
            (Frame::Failed { failure }, _) => Err(self.failed(failure).await),
            (frame, _) => Err(self.out_of_order(&frame)),
        }
    }

    /// Ends it and waits until it is gone.
    pub async fn stop(mut self) {
        self.kill();
        self.reap().await;
    }

    async fn frame(&mut self) -> Result<(Frame, Bytes), Failure> {
        loop {
            match take(&mut self.buffer) {
                Ok(Some(frame)) => {
                    self.silent_since = None;
                    return Ok(frame);
                }
                Ok(None) => {}
                Err(error) => {
                    self.kill();
                    return Err(self.ended(internal(format!("the decoder says what cannot be read: {error}"))));
                }
            }
            let since = *self.silent_since.get_or_insert_with(Instant::now);
            let read = tokio::select! {
                biased;
                read = timeout_at(since + self.limits.stall, self.frames.read_buf(&mut self.buffer)) => read,
                () = listen(&mut self.stderr, &mut self.said) => continue,
            };
            match read {
                Ok(Ok(1..)) => self.silent_since = None,
                Ok(Ok(0)) => return Err(self.died(None).await),
                Ok(Err(error)) => return Err(self.died(Some(error)).await),
                Err(_) => {
                    self.kill();
                    let stall_s = self.limits.stall.as_secs();
                    let message = format!("the decoder made nothing of this file for {stall_s} s and was ended");
                    let failure = self.ended(Failure::new(FailureClass::Timeout, message));
                    self.reap().await;
                    return Err(failure);
                }
            }
        }
    }

    /// Nothing comes after this. Said before anything is waited for: whoever gives up waiting hears it the next time.
    fn ended(&mut self, failure: Failure) -> Failure {
        self.over = Some(Err(failure.clone()));
        failure
    }

    async fn failed(&mut self, failure: Failure) -> Failure {
        let failure = self.ended(failure);
        self.reap().await;
        failure
    }

    fn out_of_order(&mut self, frame: &Frame) -> Failure {
        self.kill();
        self.ended(internal(format!("the decoder said {frame:?} out of order")))
    }

    fn kill(&mut self) {
        // Fails where it has ended already, which is as well.
        let _ = self.child.start_kill();
    }

    /// Its socket closed before it said how it ended.
    async fn died(&mut self, error: Option<io::Error>) -> Failure {
        self.ended(internal("the decoder ended without a word".to_owned()));
        let failure = match self.reap().await {
            Some(status) => end_of(status, &self.limits),
            None => internal(format!("the decoder's socket broke: {error:?}")),
        };
        self.ended(failure)
    }

    /// Waits for its end and says in the log what it left.
    async fn reap(&mut self) -> Option<ExitStatus> {
        // Its last words come before its end; the pipe closes with it.
        let rest = async {
            while self.stderr.is_some() {
                listen(&mut self.stderr, &mut self.said).await
            }
        };
        if timeout(END_GRACE, rest).await.is_err() {
            self.kill();
        }
        let status = match timeout(END_GRACE, self.child.wait()).await {
            Ok(status) => status.inspect_err(|error| tracing::error!(%error, "decoder could not be reaped")).ok(),
            Err(_) => {
                self.kill();
                tracing::warn!(pid = self.child.id(), "decoder does not end");
                None
            }
        };
        let said = String::from_utf8_lossy(&self.said);
        tracing::debug!(status = status.map(tracing::field::display), stderr = %said.trim_end(), "decoder ended");
        status
    }
}

/// Takes what it says on standard error, the last of it; for ever once that is closed.
async fn listen(stderr: &mut Option<impl AsyncRead + Unpin>, said: &mut Vec<u8>) {
    let Some(pipe) = stderr else { return std::future::pending().await };
    match pipe.read_buf(said).await {
        Ok(1..) => {
            let too_much = said.len().saturating_sub(LAST_WORDS);
            said.drain(..too_much);
        }
        // What it has to say about its end is in its exit status.
        Ok(0) | Err(_) => *stderr = None,
    }
}

/// What a child that ended without a word died of.
fn end_of(status: ExitStatus, limits: &Limits) -> Failure {
    match status.signal().and_then(Signal::from_named_raw) {
        Some(Signal::XCPU) => {
            let message = format!("the decoder took more than {} s of processor time", cpu_seconds(limits));
            Failure::new(FailureClass::Timeout, message)
        }
        // An allocation that fails under our limit aborts.
        Some(Signal::ABORT) => too_much_memory(limits),
        // Our limits never kill so; a machine that is out of memory does, and its operator may.
        Some(Signal::KILL | Signal::TERM) => Failure::new(
            FailureClass::OutOfMemory,
            "the decoder was killed from outside, as a machine without memory does",
        ),
        // What it finds wrong with a file it says, even when it panics: this is ours.
        None => internal(format!("the decoder ended without a word ({status})")),
        Some(_) => Failure::new(FailureClass::BadAudio, format!("the decoder died on this file ({status})")),
    }
}

fn not_started(error: SpawnError) -> Failure {
    let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    internal(format!("the decoder cannot be started: {error}{source}"))
}

fn internal(message: String) -> Failure {
    Failure::new(FailureClass::Internal, message)
}

/// The part of a name that a decoder may take for a hint. Names come from strangers.
fn extension(name: &str) -> Option<&str> {
    let (_, extension) = name.rsplit_once('.')?;
    let plain = (1..=8).contains(&extension.len()) && extension.bytes().all(|b| b.is_ascii_alphanumeric());
    plain.then_some(extension)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_extensions_are_passed_on() {
        assert_eq!(extension("a/b c.MP3"), Some("MP3"));
        for name in ["call", "call.", "call.--fd=1", "call.wav\n", "x.äö", "x.averylongone"] {
            assert_eq!(extension(name), None, "{name:?}");
        }
    }

    #[test]
    fn an_end_without_a_word_is_a_typed_failure() {
        let cases = [
            (rustix::process::Signal::SEGV.as_raw(), FailureClass::BadAudio),
            (rustix::process::Signal::ABORT.as_raw(), FailureClass::TooLarge),
            (rustix::process::Signal::KILL.as_raw(), FailureClass::OutOfMemory),
            (rustix::process::Signal::XCPU.as_raw(), FailureClass::Timeout),
            (1 << 8, FailureClass::Internal),
            (127 << 8, FailureClass::Internal),
            (0, FailureClass::Internal),
        ];
        for (raw, class) in cases {
            assert_eq!(end_of(ExitStatus::from_raw(raw), &Limits::default()).class, class, "{raw}");
        }
    }
}
