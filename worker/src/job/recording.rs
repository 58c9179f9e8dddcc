//! A recording as a log: the entries its decoder makes, numbered from 1, always the same for the same file.
//!
//! It is read forwards; whoever asks for an entry behind makes it start again from the first one. Decoding runs hundreds of
//! times faster than speech, so going back is cheap and nothing but one entry is ever kept.

use std::{fs::File, path::PathBuf, sync::Arc};

use tokio::sync::Mutex;
use voxfleet_audio::{Limits, entries::EntryMaker};
use voxfleet_schema::{
    audio::RawEntry,
    failure::{Failure, FailureClass},
};

use crate::decoder::DecoderProcess;

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
    /// Sequence of the next entry.
    next: u64,
    ended: bool,
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

    /// The entry that comes next, were it read on from where it is.
    pub(super) async fn position(&self) -> u64 {
        self.running.lock().await.as_ref().map_or(1, |running| running.next)
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
        Ok(Running { decoder, maker: EntryMaker::default(), next: 1, ended: false })
    }

    /// The entry at `from` or the first above it; none behind the end.
    pub(crate) async fn next(&self, from: u64) -> Result<Option<RawEntry>, Failure> {
        let mut slot = self.running.lock().await;
        if let Some(old) = slot.take_if(|running| running.next > from) {
            old.decoder.stop().await;
        }
        if slot.is_none() {
            *slot = Some(self.start().await?);
        }
        let Some(running) = slot.as_mut() else { return Ok(None) };
        loop {
            if running.ended {
                return Ok(None);
            }
            let entry = match running.decoder.next().await {
                Ok(Some(chunk)) => running.maker.chunk(chunk),
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
            if entry.seq >= from {
                return Ok(Some(entry));
            }
        }
    }
}

fn not_again(error: std::io::Error) -> Failure {
    Failure::new(FailureClass::Internal, format!("the recording cannot be read again: {error}"))
}
