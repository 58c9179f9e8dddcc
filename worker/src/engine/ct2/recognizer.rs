//! Models and recognizers. A recognizer makes the picture of a window's sound on its own thread and brings it to the device
//! thread, where windows of all recognizers of a model share batches.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use ct2rs::sys::{Config, Device, Whisper};
use voxfleet_schema::transcript::WordTiming;

use super::{
    Ct2Config,
    device::{Ct2Device, gone},
    folder,
    growing::Growing,
    mel::LogMel,
    pass::{Loaded, Run, out_of_memory},
    schedule::For,
    vocabulary::Vocabulary,
    warmup,
};
use crate::engine::{
    EngineError, Hypothesis, Purpose, Recognizer, RecognizerInfo, Window, checksum, guards,
    whisper::{
        self, MAX_PROMPT_TOKENS,
        context::{Context, MIN_SAMPLES},
        enough_memory,
    },
};

/// What a pass may take before one was made, in ms: a large model on a slow CPU.
const UNKNOWN_MS: u64 = 8_000;

/// One loaded model.
#[derive(Clone)]
pub struct Ct2Model {
    pub(super) loaded: Arc<Loaded>,
    device: Ct2Device,
}

impl Ct2Model {
    /// `path` is a model folder, or a ggml file that has one beside it or gets it. All models of a process are on one device. Where a GPU is asked for and not to be had
    /// the process has ended before.
    pub fn load(
        name: &str,
        path: &Path,
        config: &Ct2Config,
        threads: usize,
        use_gpu: bool,
        on: &Ct2Device,
    ) -> Result<Self, EngineError> {
        static LOADED: AtomicUsize = AtomicUsize::new(0);
        let device = whisper::device(use_gpu);
        let on_gpu = device != "cpu";
        let facts = folder::of(name, path, config.folders.as_deref())?;
        checksum::verify(name, &facts.dir.join(folder::MODEL))?;
        let vocabulary = Vocabulary::read(name, &facts.dir)?;
        folder::has_what_is_needed(name, &facts.dir, vocabulary.is_multilingual())?;
        // Loading holds the numbers of the file and what they are turned into, of which a card sees the latter.
        let needed_mb = (facts.weight_bytes >> 20) * if on_gpu { 1 } else { 3 };
        enough_memory(on_gpu, needed_mb, || format!("model {name}"))?;
        // A worker's engine sees its own GPU alone: the first.
        let loading = Config {
            device: if on_gpu { Device::CUDA } else { Device::CPU },
            compute_type: config.compute_type.on(on_gpu),
            num_threads_per_replica: threads.max(1),
            ..Config::default()
        };
        let failed = |why: String| EngineError::Model { name: name.to_owned(), why };
        let whisper = Whisper::new(&facts.dir, loading)
            .map_err(|error| out_of_memory(&error).unwrap_or_else(|| failed(error.to_string())))?;
        if whisper.is_multilingual() != vocabulary.is_multilingual() {
            // The library knows many languages by the empty token that stands last among the text in Whisper's vocabulary.
            return Err(failed(
                "its vocabulary has as many tokens as one of many languages, and not their empty one".to_owned(),
            ));
        }
        let specials = vocabulary.specials;
        let never_said =
            specials.never_said().into_iter().chain(specials.language_tokens()).map(|t| t as i32).collect();
        let info = RecognizerInfo {
            engine: "ct2".to_owned(),
            model: name.to_owned(),
            device,
            multilingual: vocabulary.is_multilingual(),
        };
        let bands = whisper.n_mels();
        let loaded = Arc::new(Loaded {
            whisper,
            vocabulary,
            info,
            bands,
            never_said,
            id: LOADED.fetch_add(1, Ordering::Relaxed),
            most: AtomicUsize::new(1),
            fitting: AtomicUsize::new(1),
            calm: AtomicUsize::new(0),
            silence_ms: AtomicU64::new(UNKNOWN_MS),
            passed_ms: AtomicU64::new(0),
            growing: Growing::default(),
        });
        // Silence is nobody's input: what fails on it is the model's.
        let most = warmup::most_at_once(on, &loaded, config.batch, on_gpu).map_err(|error| match error {
            EngineError::Decode(why) => failed(why),
            other => other,
        })?;
        loaded.fitting.store(most, Ordering::Relaxed);
        loaded.most.store(most, Ordering::Relaxed);
        Ok(Self { loaded, device: on.clone() })
    }

    pub fn info(&self) -> &RecognizerInfo {
        &self.loaded.info
    }

    /// Most windows in one batch: what was configured, or less where the memory carries less or an allocation failed.
    pub fn batch(&self) -> usize {
        self.loaded.most.load(Ordering::Relaxed)
    }

    /// One more that decodes with these weights.
    pub fn state(&self) -> Ct2Recognizer {
        Ct2Recognizer { model: self.clone(), mel: LogMel::new(self.loaded.bands) }
    }
}

/// Decodes with the shared weights.
pub struct Ct2Recognizer {
    model: Ct2Model,
    mel: LogMel,
}

impl Recognizer for Ct2Recognizer {
    fn info(&self) -> &RecognizerInfo {
        self.model.info()
    }

    fn decode(&mut self, batch: &[Window]) -> Vec<Result<Hypothesis, EngineError>> {
        let runs: Vec<Result<Run, EngineError>> = batch.iter().map(|window| self.run(window)).collect();
        let heard = self.hear(runs);
        // A partial that gave no sensible text looks at all of the context, as whisper.cpp's does.
        let full = Context::Full.positions(0);
        let (mut doubtful, mut places) = (Vec::new(), Vec::new());
        let mut answers: Vec<Option<Result<Run, EngineError>>> = Vec::new();
        for (place, heard) in heard.into_iter().enumerate() {
            match heard {
                Ok(mut run) if is_doubtful(&run) => {
                    run.again(full);
                    doubtful.push(Ok(run));
                    places.push(place);
                    answers.push(None);
                }
                heard => answers.push(Some(heard)),
            }
        }
        for (place, heard) in places.into_iter().zip(self.hear(doubtful)) {
            answers[place] = Some(heard);
        }
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(gone())).map(hypothesis)).collect()
    }
}

fn is_doubtful(run: &Run) -> bool {
    if run.words || run.window_ms == 0 || run.positions == Context::Full.positions(0) {
        return false;
    }
    let heard = Hypothesis { segments: run.segments.clone(), ..Hypothesis::default() };
    let judged = guards::judge(&heard);
    !judged.guards.is_empty() || judged.hypothesis.segments.is_empty()
}

fn hypothesis(run: Run) -> Hypothesis {
    let word_timing = run.words.then_some(WordTiming::Dtw);
    Hypothesis { segments: run.segments, language: run.language, word_timing }
}

impl Ct2Recognizer {
    /// Brings all, then waits for all.
    fn hear(&self, runs: Vec<Result<Run, EngineError>>) -> Vec<Result<Run, EngineError>> {
        let brought: Vec<_> =
            runs.into_iter().map(|run| run.and_then(|run| self.model.device.bring(&self.model.loaded, run))).collect();
        brought.into_iter().map(|heard| heard.and_then(|heard| heard.recv().unwrap_or_else(|_| Err(gone())))).collect()
    }

    pub(super) fn run(&mut self, window: &Window) -> Result<Run, EngineError> {
        let loaded = &self.model.loaded;
        let language = loaded.language(window)?;
        let padded;
        let samples = if window.samples.len() < MIN_SAMPLES {
            padded = [&window.samples[..], &vec![0.0; MIN_SAMPLES - window.samples.len()]].concat();
            &padded
        } else {
            &window.samples
        };
        let (context, what) = match window.purpose {
            Purpose::Final if window.background => (Context::Full, For::Recording),
            Purpose::Final => (Context::Full, For::Final),
            Purpose::Partial => (Context::PARTIAL, For::Partial),
        };
        let tokens = match window.prompt.trim() {
            "" => Vec::new(),
            prompt => loaded.vocabulary.tokens(&format!(" {prompt}")),
        };
        let sound = loaded.growing.spectrogram(&mut self.mel, samples);
        Ok(Run {
            // Nothing is over before it begins.
            at: if window.samples.is_empty() { sound.frames() } else { 0 },
            sound,
            window_ms: window.samples.len() as u64 * 1_000 / 16_000,
            positions: context.positions(samples.len()),
            what,
            words: window.purpose == Purpose::Final,
            task: window.task,
            prompt: tokens[tokens.len().saturating_sub(MAX_PROMPT_TOKENS)..].to_vec(),
            asked: language.clone(),
            language,
            cancel: window.cancel.clone(),
            since: Instant::now(),
            said: Vec::new(),
            segments: Vec::new(),
        })
    }
}
