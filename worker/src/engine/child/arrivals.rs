//! When entries reach the engine, for measuring what the way through NATS and the fleet adds.
//!
//! Only the simulated engine writes it, and only when it is told where: one `u32` (little endian) for each entry that carries
//! `Asr-Sent-Us`, the µs since that Unix time. Reader: `voxfleet bench route`.

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use voxfleet_schema::audio::RawEntry;

/// Unix time in µs at which the producer published the chunk.
const SENT_US: &str = "Asr-Sent-Us";

pub(super) struct Arrivals(BufWriter<File>);

impl Arrivals {
    /// Writes to `<path>.<pid>`, so that every engine of a fleet has its own.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        Ok(Self(BufWriter::new(File::create(name)?)))
    }

    pub(super) fn note(&mut self, entry: &RawEntry) {
        let sent = entry.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(SENT_US));
        let Some(sent_us) = sent.and_then(|(_, value)| value.parse::<u128>().ok()) else { return };
        let now_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_micros());
        let delay_us = u32::try_from(now_us.saturating_sub(sent_us)).unwrap_or(u32::MAX);
        let written = self.0.write_all(&delay_us.to_le_bytes());
        self.told(written);
    }

    pub(super) fn flush(&mut self) {
        let flushed = self.0.flush();
        self.told(flushed);
    }

    fn told(&self, result: io::Result<()>) {
        if let Err(error) = result {
            tracing::warn!(%error, "arrival times cannot be written");
        }
    }
}
