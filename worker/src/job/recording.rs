//! A recording as a log: the entries its decoder makes, numbered from 1, always the same for the same file.
//!
//! It is read forwards. The latest entries are kept, for a final is known a few seconds behind its end and whoever goes on
//! begins half a second before it; to go back further, or in very wide recordings, it starts again from the first one. Decoding runs hundreds of times
//! faster than speech, but an hour of it still takes seconds.

use std::{collections::VecDeque, fs::File, path::PathBuf, sync::Arc};

use tokio::sync::Mutex;
use voxfleet_audio::{Limits, entries::EntryMaker, process::DecoderProcess};
use voxfleet_schema::{
    SAMPLE_RATE_HZ,
    audio::{AudioFormat, RawEntry},
    failure::{Failure, FailureClass},
};

/// Bytes of the latest entries that are kept: four minutes of one channel at 16 kHz,
const KEPT_BYTES: usize = 8 << 20;
/// and of more channels at least this many entries, sixteen seconds,
const KEPT_AT_LEAST: usize = 80;
/// as far as they fit here: 32 channels at 44.1 kHz.
const MOST_KEPT_BYTES: usize = 48 << 20;

/// What is needed to decode it, again and again.
#[derive(Debug)]
pub(crate) struct Recording {
    file: File,
    name: Option<String>,
    limits: Limits,
    /// Executable of the decoder; none = this one.
    exe: Option<PathBuf>,
    running: Mutex<Option<Running>>,
    facts: std::sync::Mutex<Facts>,
}

/// What its decoding has shown so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Length where the container says it.
    pub(crate) total_ms: Option<u64>,
    /// It breaks off before its end.
    pub(crate) truncated: bool,
    /// Parts of it that could not be decoded and are silence now.
    pub(crate) damaged: u64,
}

#[derive(Debug)]
struct Running {
    decoder: DecoderProcess,
    maker: EntryMaker,
    /// Sequence of the next entry, and the sample at which it begins, give or take one for each entry before it.
    next: u64,
    at_sample: u64,
    format: AudioFormat,
    ended: bool,
    /// The latest ones, in order.
    behind: Behind,
}

#[derive(Debug, Default)]
struct Behind {
    /// With the sample at which they begin.
    entries: VecDeque<(u64, RawEntry)>,
    bytes: usize,
}

impl Behind {
    fn push(&mut self, at_sample: u64, entry: &RawEntry) {
        self.bytes += entry.payload.len();
        self.entries.push_back((at_sample, entry.clone()));
        let too_many = |kept: &Self| {
            kept.bytes > MOST_KEPT_BYTES || (kept.bytes > KEPT_BYTES && kept.entries.len() > KEPT_AT_LEAST)
        };
        while too_many(self)
            && let Some((_, oldest)) = self.entries.pop_front()
        {
            self.bytes -= oldest.payload.len();
        }
    }

    fn first_seq(&self) -> Option<u64> {
        self.entries.front().map(|(_, entry)| entry.seq)
    }

    /// The entry at `from`; none if it is not kept.
    fn at(&self, from: u64) -> Option<&(u64, RawEntry)> {
        let first = self.first_seq().filter(|first| *first <= from)?;
        // They are numbered without gaps.
        self.entries.get(usize::try_from(from - first).ok()?)
    }
}

impl Recording {
    pub(crate) fn new(file: File, name: Option<String>, limits: Limits, exe: Option<PathBuf>) -> Arc<Self> {
        Arc::new(Self { file, name, limits, exe, running: Mutex::default(), facts: std::sync::Mutex::default() })
    }

    /// The same file with a decoder of its own, for whoever reads another place of it.
    pub(crate) fn again(&self) -> Result<Arc<Self>, Failure> {
        let file = self.file.try_clone().map_err(not_again)?;
        Ok(Self::new(file, self.name.clone(), self.limits.clone(), self.exe.clone()))
    }

    /// The first entry that it can give without starting again.
    pub(super) async fn position(&self) -> u64 {
        let running = self.running.lock().await;
        running.as_ref().map_or(1, |running| running.behind.first_seq().unwrap_or(running.next))
    }

    pub(crate) fn facts(&self) -> Facts {
        *crate::capacity::locked(&self.facts)
    }

    /// Starts the decoder, so that a file nobody can decode fails before anything else is set in motion.
    pub(crate) async fn probe(&self) -> Result<(), Failure> {
        let mut running = self.running.lock().await;
        if running.is_none() {
            *running = Some(self.start().await?);
        }
        Ok(())
    }

    async fn start(&self) -> Result<Running, Failure> {
        let file = self.file.try_clone().map_err(not_again)?;
        let decoder = DecoderProcess::start(self.exe.clone(), file, self.name.clone(), self.limits.clone()).await?;
        crate::capacity::locked(&self.facts).total_ms = decoder.total_ms();
        Ok(Running {
            decoder,
            maker: EntryMaker::default(),
            next: 1,
            ended: false,
            at_sample: 0,
            format: AudioFormat::default(),
            behind: Behind::default(),
        })
    }

    /// The entry at `from` or the first above it; none behind the end, and none that begins behind `until_sample`.
    pub(crate) async fn next(&self, from: u64, until_sample: u64) -> Result<Option<RawEntry>, Failure> {
        let mut slot = self.running.lock().await;
        if let Some((at_sample, kept)) = slot.as_ref().and_then(|running| running.behind.at(from)) {
            return Ok((*at_sample <= until_sample).then(|| kept.clone()));
        }
        if let Some(old) = slot.take_if(|running| running.next > from) {
            old.decoder.stop().await;
        }
        if slot.is_none() {
            *slot = Some(self.start().await?);
        }
        let Some(running) = slot.as_mut() else { return Ok(None) };
        loop {
            if running.ended || running.at_sample > until_sample {
                return Ok(None);
            }
            let at_sample = running.at_sample;
            let entry = match running.decoder.next().await {
                Ok(Some(chunk)) => {
                    running.format = chunk.format.unwrap_or(running.format);
                    let AudioFormat { rate_hz, .. } = running.format;
                    let frames = chunk.pcm.len() / running.format.frame_bytes().max(1);
                    running.at_sample += frames as u64 * u64::from(SAMPLE_RATE_HZ) / u64::from(rate_hz.max(1));
                    running.maker.chunk(chunk)
                }
                Ok(None) => {
                    running.ended = true;
                    let mut facts = crate::capacity::locked(&self.facts);
                    (facts.truncated, facts.damaged) = (running.decoder.truncated(), running.decoder.damaged());
                    drop(facts);
                    running.maker.end()
                }
                Err(failure) => {
                    *slot = None;
                    return Err(failure);
                }
            };
            running.next = entry.seq + 1;
            running.behind.push(at_sample, &entry);
            if entry.seq >= from {
                return Ok(Some(entry));
            }
        }
    }
}

fn not_again(error: std::io::Error) -> Failure {
    Failure::new(FailureClass::Internal, format!("the recording cannot be read again: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u64, len: usize) -> RawEntry {
        RawEntry { seq, headers: Vec::new(), payload: vec![0; len].into() }
    }

    #[test]
    fn the_latest_entries_are_given_again_and_no_more_than_fit() {
        let mut behind = Behind::default();
        assert_eq!((behind.first_seq(), behind.at(1)), (None, None));
        let (len, count) = (KEPT_BYTES / 100, 250);
        (1..=count).for_each(|seq| behind.push(seq * 3_200, &entry(seq, len)));
        let first = behind.first_seq().expect("some are kept");
        assert!(behind.bytes <= KEPT_BYTES && (150..=152).contains(&first), "{first}");
        for seq in first..=count {
            assert_eq!(behind.at(seq).map(|(at, entry)| (*at, entry.seq)), Some((seq * 3_200, seq)));
        }
        assert_eq!((behind.at(first - 1), behind.at(count + 1)), (None, None));
        let mut wide = Behind::default();
        (1..=count).for_each(|seq| wide.push(0, &entry(seq, KEPT_BYTES / 20)));
        assert_eq!(wide.entries.len(), KEPT_AT_LEAST, "of many channels");
        behind.push(0, &entry(count + 1, MOST_KEPT_BYTES + 1));
        assert_eq!((behind.first_seq(), behind.bytes), (None, 0), "one that is too large by itself");
    }
}
