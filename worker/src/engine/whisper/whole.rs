//! whisper.cpp by itself over a whole recording, as its own command line calls it. Only measurements use it: it shows what
//! the same library, weights and threads give without anything of ours.
//!
//! Its detector is called here and not through `whisper_full`, which gives it four threads whatever the machine has; they
//! spin, and on two busy cores a minute of audio takes many. What is found is put together as `whisper_full` does it.

use std::{
    ffi::{CStr, CString, c_int},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    ptr::NonNull,
};

use whisper_rs::whisper_rs_sys as sys;

use crate::engine::{EngineError, last_words, models};

/// A model with a decode state of its own.
pub struct WholeWhisper {
    context: NonNull<sys::whisper_context>,
    threads: c_int,
    /// Loaded by the first call that asks for it.
    detector: Option<(PathBuf, Detector)>,
}

/// What differs from one call to another; greedy search in any case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WholeOptions {
    /// whisper.cpp's own detector, a ggml file, with its own settings; none = all of the audio is decoded.
    pub vad_model: Option<PathBuf>,
    /// Windows that look bad are decoded again at higher temperatures, as whisper.cpp does unless it is told not to.
    pub fall_back: bool,
}

impl WholeWhisper {
    /// On the CPU. `flash` is whisper.cpp's own default; our engine has it off.
    pub fn load(name: &str, path: &Path, threads: usize, flash: bool) -> Result<Self, EngineError> {
        last_words::listen();
        models::check(name, path)?;
        let refused = |why: &str| EngineError::Model { name: name.to_owned(), why: why.to_owned() };
        let file = c_path(path).ok_or_else(|| refused("its path holds a zero byte"))?;
        // SAFETY: the path is a C string that outlives the call; the answer is null or a context that is ours to free.
        let context = unsafe {
            let mut parameters = sys::whisper_context_default_params();
            parameters.use_gpu = false;
            parameters.flash_attn = flash;
            sys::whisper_init_from_file_with_params(file.as_ptr(), parameters)
        };
        let context = NonNull::new(context).ok_or_else(|| refused("whisper.cpp refused it"))?;
        Ok(Self { context, threads: c_int::try_from(threads.max(1)).unwrap_or(1), detector: None })
    }

    /// Text of each segment, in order. `samples` are mono at 16 kHz.
    pub fn transcribe(&mut self, samples: &[f32], options: &WholeOptions) -> Result<Vec<String>, EngineError> {
        let failed = |why: &str| EngineError::Decode(why.to_owned());
        let speech;
        let samples = match &options.vad_model {
            None => samples,
            Some(path) => {
                speech = self.detector(path)?.speech_only(samples)?;
                &speech
            }
        };
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        let count = c_int::try_from(samples.len()).map_err(|_| failed("longer than whisper.cpp can take"))?;
        // SAFETY: a plain structure of numbers and pointers; those set here outlive the call below.
        let mut parameters =
            unsafe { sys::whisper_full_default_params(sys::whisper_sampling_strategy_WHISPER_SAMPLING_GREEDY) };
        parameters.n_threads = self.threads;
        parameters.greedy.best_of = 1;
        parameters.language = c"en".as_ptr();
        parameters.print_progress = false;
        parameters.print_timestamps = false;
        if !options.fall_back {
            parameters.temperature_inc = 0.0;
        }
        let context = self.context.as_ptr();
        // SAFETY: the context is alive and nobody else uses it; `count` is the length of `samples`.
        let done = unsafe { sys::whisper_full(context, parameters, samples.as_ptr(), count) };
        if done != 0 {
            return Err(failed(&format!("whisper.cpp gave up with {done}")));
        }
        // SAFETY: the segments belong to the context and stay until its next call; the text is copied.
        let segments = unsafe {
            (0..sys::whisper_full_n_segments(context))
                .map(|n| sys::whisper_full_get_segment_text(context, n))
                .filter(|text| !text.is_null())
                .map(|text| CStr::from_ptr(text).to_string_lossy().trim().to_owned())
                .collect()
        };
        Ok(segments)
    }

    fn detector(&mut self, path: &Path) -> Result<&Detector, EngineError> {
        let detector = match self.detector.take() {
            Some((loaded, detector)) if loaded == path => detector,
            _ => Detector::load(path, self.threads)?,
        };
        Ok(&self.detector.insert((path.to_owned(), detector)).1)
    }
}

impl Drop for WholeWhisper {
    fn drop(&mut self) {
        // SAFETY: made by us, freed once.
        unsafe { sys::whisper_free(self.context.as_ptr()) }
    }
}

/// whisper.cpp's port of Silero.
struct Detector(NonNull<sys::whisper_vad_context>);

/// Kept behind each stretch of speech but the last, and put between stretches, in samples (100 ms).
const OVERLAP: usize = 1_600;
const GAP: usize = 1_600;

impl Detector {
    fn load(path: &Path, threads: c_int) -> Result<Self, EngineError> {
        let refused = |why: &str| EngineError::Vad(format!("{}: {why}", path.display()));
        let file = c_path(path).ok_or_else(|| refused("its path holds a zero byte"))?;
        // SAFETY: as for the model above.
        let context = unsafe {
            let mut parameters = sys::whisper_vad_default_context_params();
            parameters.n_threads = threads;
            sys::whisper_vad_init_from_file_with_params(file.as_ptr(), parameters)
        };
        NonNull::new(context).map(Self).ok_or_else(|| refused("whisper.cpp refused it"))
    }

    /// The stretches of speech with short silences between them.
    fn speech_only(&self, samples: &[f32]) -> Result<Vec<f32>, EngineError> {
        let failed = |why: &str| EngineError::Vad(why.to_owned());
        let count = c_int::try_from(samples.len()).map_err(|_| failed("longer than whisper.cpp can take"))?;
        // SAFETY: the context is alive and ours; the segments are read and freed before it is used again.
        let stretches: Vec<(f32, f32)> = unsafe {
            let parameters = sys::whisper_vad_default_params();
            let found = sys::whisper_vad_segments_from_samples(self.0.as_ptr(), parameters, samples.as_ptr(), count);
            if found.is_null() {
                return Err(failed("whisper.cpp's detector gave up"));
            }
            let stretches = (0..sys::whisper_vad_segments_n_segments(found))
                .map(|n| {
                    let begin = sys::whisper_vad_segments_get_segment_t0(found, n);
                    (begin, sys::whisper_vad_segments_get_segment_t1(found, n))
                })
                .collect();
            sys::whisper_vad_free_segments(found);
            stretches
        };
        Ok(put_together(samples, &stretches))
    }
}

impl Drop for Detector {
    fn drop(&mut self) {
        // SAFETY: made by us, freed once.
        unsafe { sys::whisper_vad_free(self.0.as_ptr()) }
    }
}

/// `stretches` are begins and ends in hundredths of a second.
fn put_together(samples: &[f32], stretches: &[(f32, f32)]) -> Vec<f32> {
    let place = |hundredths: f32| (hundredths * 160.0) as usize;
    let mut together = Vec::new();
    for (n, (begin, end)) in stretches.iter().enumerate() {
        let last = n + 1 == stretches.len();
        let end = (place(*end) + if last { 0 } else { OVERLAP }).min(samples.len());
        together.extend_from_slice(samples.get(place(*begin).min(end)..end).unwrap_or_default());
        if !last {
            together.resize(together.len() + GAP, 0.0);
        }
    }
    together
}

fn c_path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speech_is_put_together_with_short_gaps() {
        let samples: Vec<f32> = (0..32_000).map(|n| n as f32).collect();
        assert!(put_together(&samples, &[]).is_empty());
        let one = put_together(&samples, &[(10.0, 20.0)]);
        assert_eq!((one.len(), one[0], one[1_599]), (1_600, 1_600.0, 3_199.0));
        let two = put_together(&samples, &[(10.0, 20.0), (100.0, 500.0)]);
        assert_eq!(two.len(), 1_600 + OVERLAP + GAP + 16_000, "cut at the recording's end");
        assert_eq!((two[3_199], two[3_200], two[4_800]), (4_799.0, 0.0, 16_000.0));
    }
}
