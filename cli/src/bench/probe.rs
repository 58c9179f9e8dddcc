//! An engine child with a clock at its door: a relay between the supervisor's socket and the real engine that notes when
//! each stamped chunk has arrived.
//!
//! A worker is told to start it instead of the plain engine (`worker.engine_exe`). The stamp is the producer's publish
//! time in a header that everything between passes on untouched.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::{fs::PermissionsExt as _, net::UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use voxfleet_harness::load::{SENT_US, now_us};
use voxfleet_worker::{engine::child, ipc::transport::MAX_FRAME_BYTES};

/// How often the report is written.
const REPORT_EVERY: Duration = Duration::from_millis(200);
/// A frame's stamp stands before its audio.
const LOOK_BYTES: usize = 2_048;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ProbeArgs {
    /// File for the latencies
    #[arg(long)]
    report: PathBuf,
    /// What the supervisor appends: `engine --fd N`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// What a worker starts instead of itself: the probe, which is an engine with a clock. Each engine reports into a file of
/// its own in `dir`.
pub(super) fn engine_script(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("engine.sh");
    let (exe, dir) = (std::env::current_exe()?, dir.display());
    let exe = exe.display();
    let text = format!("#!/bin/sh\nexec '{exe}' bench probe --report '{dir}'/$$.{REPORT} -- \"$@\"\n");
    std::fs::write(&path, text)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Latencies in microseconds, in buckets that grow by a hundredth.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) count: u64,
    buckets: Vec<u64>,
    pub(super) max_us: u64,
}

const GROWTH: f64 = 1.01;
const REPORT: &str = "seen";

impl Report {
    fn note(&mut self, us: u64) {
        let bucket = (us.max(1) as f64).ln() / GROWTH.ln();
        let bucket = bucket.round() as usize;
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
        self.max_us = self.max_us.max(us);
    }

    /// In ms; 0 when nothing was noted.
    pub(super) fn percentile_ms(&self, share: f64) -> f64 {
        let wanted = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted.max(1) {
                return GROWTH.powi(bucket as i32) / 1e3;
            }
        }
        0.0
    }

    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// What all probes of [`engine_script`] in this folder have seen.
    pub(super) fn read_all(dir: &Path) -> Self {
        let files = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let reports = files.filter(|path| path.extension().is_some_and(|e| e == REPORT)).filter_map(|p| Self::read(&p));
        reports.fold(Self::default(), Self::and)
    }

    fn and(mut self, other: Self) -> Self {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(mine, others)| *mine += others);
        self.count += other.count;
        self.max_us = self.max_us.max(other.max_us);
        self
    }

    /// A reader sees the old report or the new one, never half of one.
    fn write(&self, path: &Path) -> Result<()> {
        let whole = path.with_extension("new");
        std::fs::write(&whole, serde_json::to_vec(self)?)?;
        Ok(std::fs::rename(&whole, path)?)
    }
}

pub(super) fn run(args: &ProbeArgs) -> Result<()> {
    let fd: RawFd = match args.rest.as_slice() {
        [.., flag, number] if flag == "--fd" => number.parse()?,
        other => bail!("expected engine --fd N, got {other:?}"),
    };
    ensure!(fd > 2, "file descriptor {fd} is not a socket");
    // SAFETY: the supervisor passes this descriptor to us and to nobody else in this process.
    let supervisor = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    supervisor.set_nonblocking(false)?;
    let (ours, engines) = UnixStream::pair()?;
    let engine = std::thread::Builder::new().name("engine".to_owned()).spawn(move || child::serve(engines))?;
    let mut answers = ours.try_clone()?;
    let mut back = supervisor.try_clone()?;
    let relay = std::thread::Builder::new().name("answers".to_owned());
    let relay = relay.spawn(move || std::io::copy(&mut answers, &mut back))?;
    forward(supervisor, &ours, &args.report)?;
    ours.shutdown(std::net::Shutdown::Write)?;
    engine.join().map_err(|_| anyhow::anyhow!("the engine panicked"))?.context("engine")?;
    drop(ours);
    // The supervisor has gone away already; that its last answers are lost is as in life.
    let _ = relay.join();
    Ok(())
}

/// Until the supervisor closes.
fn forward(mut from: UnixStream, mut to: &UnixStream, path: &Path) -> Result<()> {
    from.set_read_timeout(Some(REPORT_EVERY))?;
    let (mut report, mut written, mut at) = (Report::default(), 0, Instant::now());
    let mut frame = Vec::new();
    loop {
        let mut tick = |report: &Report| -> Result<()> {
            if report.count != written && at.elapsed() >= REPORT_EVERY {
                report.write(path)?;
                (written, at) = (report.count, Instant::now());
            }
            Ok(())
        };
        frame.resize(4, 0);
        if !fill(&mut from, &mut frame, || tick(&report))? {
            report.write(path)?;
            return Ok(());
        }
        let len = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
        ensure!(len <= MAX_FRAME_BYTES, "frame of {len} bytes");
        frame.resize(4 + len, 0);
        if !fill(&mut from, &mut frame[4..], || Ok(()))? {
            bail!("closed inside a frame");
        }
        if let Some(sent) = stamp(&frame[4..]) {
            report.note(now_us().saturating_sub(sent));
        }
        to.write_all(&frame)?;
        tick(&report)?;
    }
}

/// Fills `buffer`; false when the other side has closed before its first byte. `idle` is called while nothing comes.
fn fill(from: &mut UnixStream, buffer: &mut [u8], mut idle: impl FnMut() -> Result<()>) -> Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => bail!("closed inside a frame"),
            Ok(n) => filled += n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => idle()?,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // A killed supervisor resets the pair.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}

/// The publish time in a frame's headers: the name, a marker byte for a short string, digits.
fn stamp(frame: &[u8]) -> Option<u64> {
    let head = &frame[..frame.len().min(LOOK_BYTES)];
    let at = head.windows(SENT_US.len()).position(|w| w == SENT_US.as_bytes())? + SENT_US.len();
    let digits: Vec<u8> = head[at + 1..].iter().copied().take_while(u8::is_ascii_digit).collect();
    std::str::from_utf8(&digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use voxfleet_schema::audio::RawEntry;
    use voxfleet_worker::ipc::{EntryFor, ToEngine, transport::BlockingWriter};

    #[test]
    fn a_stamp_is_found_where_the_supervisor_writes_it() {
        let headers = vec![("Asr-Seq".to_owned(), "4".to_owned()), (SENT_US.to_owned(), "1790000000123456".to_owned())];
        let entry = RawEntry { seq: 9, headers, payload: Bytes::from(vec![0; 6_400]) };
        let mut frame = Vec::new();
        let sent = BlockingWriter::new(&mut frame).send(&ToEngine::Entry(EntryFor { handle: 3, entry }));
        assert!(sent.is_ok());
        assert_eq!(stamp(&frame[4..]), Some(1_790_000_000_123_456));
        assert_eq!(stamp(b"nothing here"), None);
    }

    #[test]
    fn percentiles_are_within_a_hundredth() {
        let mut report = Report::default();
        (1..=1_000).for_each(|ms| report.note(ms * 1_000));
        for (share, ms) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1_000.0)] {
            let found = report.percentile_ms(share);
            assert!((found / ms - 1.0).abs() < 0.011, "{share}: {found}");
        }
        assert_eq!(Report::default().percentile_ms(0.5), 0.0);
    }
}
