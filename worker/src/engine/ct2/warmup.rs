//! How many windows at once the memory carries: one is passed over when a model is loaded, and what it takes is measured.
//!
//! Silence does: the encoder and its cross attention take the same for every sound, and they are nearly all of it. The first
//! pass also lays out what the library lays out once, so that no session waits for it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use voxfleet_schema::session::Task;

use super::{
    device::{Ct2Device, gone},
    mel::LogMel,
    pass::{Loaded, Run},
    schedule::For,
};
use crate::engine::{
    Cancel, EngineError,
    pool::resident_mb,
    whisper::{context::Context, free_device_mb, free_mb},
};

/// Of the memory that is free now, in hundredths, batches may take so much: others live here as well.
const SHARE_PERCENT: u64 = 50;
/// What a window may take beyond silence, in hundredths: keys and values of a long text.
const LONG_TEXT_PERCENT: u64 = 125;

/// Of one window on a GPU.
const LEAST_ON_GPU_MB: u64 = 128;

/// A second pass is made where the first took less.
const SECOND_MS: u64 = 2_000;

/// Windows in a batch, `asked` at most and one at least, where each takes so much.
fn fitting(asked: usize, window_mb: u64, free_mb: Option<u64>) -> usize {
    let Some(free_mb) = free_mb else { return asked.max(1) };
    let each = (window_mb * LONG_TEXT_PERCENT).div_ceil(100).max(1);
    let fits = free_mb * SHARE_PERCENT / 100 / each;
    asked.min(usize::try_from(fits).unwrap_or(usize::MAX)).max(1)
}

/// Passes over one window of silence, notes what it takes, and says how many there may be at once.
pub(super) fn most_at_once(
    device: &Ct2Device,
    loaded: &Arc<Loaded>,
    asked: usize,
    on_gpu: bool,
) -> Result<usize, EngineError> {
    let begin = Instant::now();
    let pass = || device.bring(loaded, silence(loaded))?.recv().unwrap_or_else(|_| Err(gone()));
    let passed_ms = || loaded.passed_ms.load(Ordering::Relaxed);
    let free_mb = free_mb(on_gpu);
    let free_before = if on_gpu { free_device_mb() } else { None };
    let resident_mb = resident_mb();
    let peak_from_here = !on_gpu && std::fs::write("/proc/self/clear_refs", "5").is_ok();
    pass()?;
    let window_mb = match (on_gpu, peak_from_here) {
        // Some of its allocators give back what a pass has taken: less than this is not believed.
        (true, _) => {
            free_before.zip(free_device_mb()).map(|(before, now)| before.saturating_sub(now).max(LEAST_ON_GPU_MB))
        }
        (false, true) => peak_resident_mb().map(|peak| peak.saturating_sub(resident_mb)),
        (false, false) => None,
    };
    // The first also made what is made once. Where that would take long, its time is enough: longer than a pass will take.
    if passed_ms() < SECOND_MS {
        pass()?;
    }
    loaded.silence_ms.store(passed_ms().max(1), Ordering::Relaxed);
    let most = window_mb.map_or(asked, |window_mb| fitting(asked, window_mb, free_mb));
    let warmup_ms = begin.elapsed().as_millis() as u64;
    tracing::info!(model = loaded.info.model, batch = most, asked, window_mb, free_mb, warmup_ms, "windows at once");
    Ok(most)
}

fn silence(loaded: &Loaded) -> Run {
    Run {
        sound: LogMel::new(loaded.bands).spectrogram(&[0.0; 16_000]),
        window_ms: 1_000,
        positions: Context::Full.positions(0),
        what: For::Recording,
        words: true,
        task: Task::Transcribe,
        prompt: Vec::new(),
        // Detection is part of the first pass where a model knows many languages.
        asked: None,
        language: (!loaded.info.multilingual).then(|| "en".to_owned()),
        cancel: Cancel::default(),
        since: Instant::now(),
        said: Vec::new(),
        at: 0,
        segments: Vec::new(),
    }
}

/// Most memory of this process since the mark was set back, in MB.
fn peak_resident_mb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kb| kb / 1_024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_takes_half_of_what_is_free() {
        // asked, MB of a window, MB free: windows
        for (asked, window_mb, free_mb, most) in [
            (4, 100, Some(10_000), 4),
            (64, 100, Some(10_000), 40),
            (64, 1_000, Some(10_000), 4),
            (4, 1_000, Some(2_000), 1),
            (4, 1_000, Some(0), 1),
            (4, 0, Some(16), 4),
            (16, 0, Some(16), 8),
            (8, 1_000, None, 8),
            (0, 10, None, 1),
        ] {
            assert_eq!(fitting(asked, window_mb, free_mb), most, "{asked} of {window_mb} MB in {free_mb:?}");
        }
    }
}
