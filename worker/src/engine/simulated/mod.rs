//! A recognizer that knows no language: its text is made from the samples themselves.
//!
//! Each block of 250 ms of the session becomes one word that depends on the block's samples and place alone. A lost,
//! doubled or shifted sample changes a word, and two runs over the same log must agree to the letter. It also takes time,
//! memory, fails, aborts and hangs on order, so that everything around an engine can be tested without a model. On a GPU its
//! memory lies on a [`card`] that is a folder, and that card may fail.

pub mod card;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use voxfleet_schema::transcript::{VadKind, WordTiming};

use self::card::{Allocation, Card};
use super::{
    Cancel, EngineError, HeardSegment, HeardWord, Hypothesis, Purpose, Recognizer, RecognizerInfo, VAD_FRAME, Vad,
    Window, vad::VadFactory,
};
use crate::ipc::SimulatedConfig;

/// Samples per word: 250 ms, aligned to multiples of itself in the session.
pub const BLOCK: u64 = 4_000;

/// Longest wait between two looks at a cancel flag.
const LOOK: Duration = Duration::from_millis(5);

/// A loaded simulated model; its states share the weights and the count of decodes.
#[derive(Clone)]
pub struct SimulatedModel {
    config: SimulatedConfig,
    info: RecognizerInfo,
    decodes: Arc<AtomicU64>,
    card: Option<Arc<Card>>,
    weights: Arc<Memory>,
}

/// Where weights and states lie.
enum Memory {
    OnCard(Allocation),
    InHost { _bytes: Vec<u8> },
}

impl SimulatedModel {
    /// Takes as long and as much memory as it is told to, of the host.
    pub fn load(name: &str, config: &SimulatedConfig) -> Result<Self, EngineError> {
        Self::load_on(name, config, false)
    }

    /// The same on the card, if there is one and it is to be used.
    pub fn load_on(name: &str, config: &SimulatedConfig, use_gpu: bool) -> Result<Self, EngineError> {
        let card = config.card.as_ref().filter(|_| use_gpu);
        let card = card.map(|folder| Card::open(folder, config.context_mb)).transpose()?;
        let mb = weights_mb(config, name);
        let weights = match &card {
            Some(card) => Memory::OnCard(card.weights(mb)?),
            None => in_host(config, mb)?,
        };
        wait(Duration::from_millis(config.load_ms), &Cancel::default())?;
        let info = RecognizerInfo {
            engine: "simulated".to_owned(),
            model: name.to_owned(),
            device: device(use_gpu).to_owned(),
            multilingual: true,
        };
        Ok(Self { config: config.clone(), info, decodes: Arc::default(), card, weights: Arc::new(weights) })
    }

    pub fn info(&self) -> &RecognizerInfo {
        &self.info
    }

    pub fn state(&self) -> Result<SimulatedRecognizer, EngineError> {
        let mb = self.config.state_mb;
        let memory = match &self.card {
            Some(card) => Memory::OnCard(card.state(mb)),
            None => in_host(&self.config, mb)?,
        };
        Ok(SimulatedRecognizer { model: self.clone(), _memory: memory })
    }

    /// MB that its weights take on the card, and each of its states; none without a card.
    pub fn on_card_mb(&self) -> Option<(u64, u64)> {
        match &*self.weights {
            Memory::OnCard(weights) => Some((weights.mb, self.config.state_mb)),
            Memory::InHost { .. } => None,
        }
    }
}

/// What the simulated engine calls the device that it plays to run on.
pub fn device(use_gpu: bool) -> &'static str {
    if use_gpu { "cuda:simulated" } else { "cpu" }
}

/// MB of a model's weights.
pub fn weights_mb(config: &SimulatedConfig, name: &str) -> u64 {
    config.sizes.get(name).copied().unwrap_or(config.weights_mb)
}

/// One decode state of a simulated model.
pub struct SimulatedRecognizer {
    model: SimulatedModel,
    _memory: Memory,
}

/// Sizes that are a card's are none of the host's: there may be far more of them than there is memory.
fn in_host(config: &SimulatedConfig, mb: u64) -> Result<Memory, EngineError> {
    let mb = if config.card.is_some() { 0 } else { mb };
    allocate(mb).map(|bytes| Memory::InHost { _bytes: bytes })
}

/// Memory that really is there: every page is written to.
fn allocate(mb: u64) -> Result<Vec<u8>, EngineError> {
    let bytes = usize::try_from(mb << 20).map_err(|_| EngineError::OutOfMemory(format!("{mb} MB")))?;
    let mut memory = Vec::new();
    memory.try_reserve_exact(bytes).map_err(|e| EngineError::OutOfMemory(format!("{mb} MB: {e}")))?;
    memory.resize(bytes, 1);
    Ok(memory)
}

/// Waits unless cancelled.
fn wait(time: Duration, cancel: &Cancel) -> Result<(), EngineError> {
    let until = Instant::now() + time;
    loop {
        if cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
            return Ok(());
        };
        std::thread::park_timeout(left.min(LOOK));
    }
}

impl SimulatedRecognizer {
    fn decode_one(&mut self, window: &Window) -> Result<Hypothesis, EngineError> {
        let config = &self.model.config;
        let count = self.model.decodes.fetch_add(1, Ordering::Relaxed) + 1;
        let _running = self.model.card.as_ref().map(|card| card.decode());
        if config.abort_at > 0 && count == config.abort_at {
            tracing::error!(decode = count, "simulated abort");
            std::process::abort();
        }
        let at_the_top = longest_at_the_top(&window.samples);
        if config.poison.is_some_and(|poison| at_the_top >= poison) {
            tracing::error!(decode = count, at_the_top, "simulated abort at a poison input");
            std::process::abort();
        }
        let hangs = config.poison_hang.is_some_and(|poison| at_the_top >= poison);
        if hangs || (config.hang_at > 0 && count > config.hang_at) {
            // Deaf to its cancel flag, as a stuck device is.
            loop {
                std::thread::park_timeout(Duration::from_secs(3_600));
            }
        }
        if config.speed > 0.0 {
            let seconds = window.samples.len() as f64 / 16_000.0 / config.speed;
            wait(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX), &window.cancel)?;
        }
        if window.cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        if config.fail_every > 0 && count.is_multiple_of(config.fail_every) {
            return Err(EngineError::Decode(format!("simulated failure of decode {count}")));
        }
        Ok(hear(window))
    }
}

impl Recognizer for SimulatedRecognizer {
    fn info(&self) -> &RecognizerInfo {
        &self.model.info
    }

    fn decode(&mut self, batch: &[Window]) -> Vec<Result<Hypothesis, EngineError>> {
        batch.iter().map(|window| self.decode_one(window)).collect()
    }
}

/// Longest run of samples with the highest value that 16 bits hold.
fn longest_at_the_top(samples: &[f32]) -> u32 {
    let (mut run, mut longest) = (0u32, 0);
    for sample in samples {
        run = if *sample >= 32_766.5 / 32_768.0 { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

/// A voice detector that is killed by poison, as one in foreign code may be.
pub struct PoisonedVads {
    pub inner: Arc<dyn VadFactory>,
    pub poison: u32,
}

struct PoisonedVad {
    inner: Box<dyn Vad>,
    poison: u32,
}

impl VadFactory for PoisonedVads {
    fn kind(&self) -> VadKind {
        self.inner.kind()
    }

    fn create(&self) -> Box<dyn Vad> {
        Box::new(PoisonedVad { inner: self.inner.create(), poison: self.poison })
    }
}

impl Vad for PoisonedVad {
    fn kind(&self) -> VadKind {
        self.inner.kind()
    }

    fn reset(&mut self) {
        self.inner.reset();
    }

    fn another(&self) -> Box<dyn Vad> {
        Box::new(Self { inner: self.inner.another(), poison: self.poison })
    }

    fn speech_probability(&mut self, frame: &[f32; VAD_FRAME]) -> Result<f32, EngineError> {
        if longest_at_the_top(frame) >= self.poison {
            tracing::error!("simulated abort of the voice detector");
            std::process::abort();
        }
        self.inner.speech_probability(frame)
    }
}

fn hear(window: &Window) -> Hypothesis {
    let language = Some(window.language.clone().unwrap_or_else(|| "en".to_owned()));
    let words = words_of(&window.samples, window.from_sample);
    let Some(last) = words.last() else {
        return Hypothesis { segments: Vec::new(), language, word_timing: None };
    };
    let segment = HeardSegment {
        start_ms: 0,
        end_ms: last.end_ms,
        text: joined(&words),
        words: if window.purpose == Purpose::Final { words } else { Vec::new() },
        confidence: 1.0,
        no_speech_probability: 0.0,
        mean_log_probability: 0.0,
    };
    let word_timing = (window.purpose == Purpose::Final).then_some(WordTiming::Exact);
    Hypothesis { segments: vec![segment], language, word_timing }
}

/// What the simulated engine hears in `samples`, which begin at `from_sample` of their session.
pub fn text_of(samples: &[f32], from_sample: u64) -> String {
    joined(&words_of(samples, from_sample))
}

fn joined(words: &[HeardWord]) -> String {
    words.iter().map(|w| w.text.as_str()).collect::<Vec<_>>().join(" ")
}

/// One word per block; the first and the last may be cut.
fn words_of(samples: &[f32], from_sample: u64) -> Vec<HeardWord> {
    let end = from_sample + samples.len() as u64;
    let mut words = Vec::with_capacity(samples.len() / BLOCK as usize + 2);
    let mut at = from_sample;
    while at < end {
        let next = (at / BLOCK + 1) * BLOCK;
        let next = next.min(end);
        let (from, to) = ((at - from_sample) as usize, (next - from_sample) as usize);
        words.push(HeardWord {
            text: word_of(&samples[from..to], at),
            start_ms: (at - from_sample) / 16,
            end_ms: (next - from_sample) / 16,
            confidence: 1.0,
        });
        at = next;
    }
    words
}

/// FNV-1a over the place and the samples as 16-bit numbers, spoken in three syllables.
fn word_of(samples: &[f32], at: u64) -> String {
    const CONSONANTS: [char; 16] = ['b', 'd', 'f', 'g', 'h', 'j', 'k', 'l', 'm', 'n', 'p', 'r', 's', 't', 'v', 'z'];
    const VOWELS: [char; 4] = ['a', 'e', 'i', 'o'];
    let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let mut hash = at.to_le_bytes().into_iter().fold(0xcbf2_9ce4_8422_2325, fold);
    for sample in samples {
        let number = (sample * 32_768.0).round().clamp(-32_768.0, 32_767.0) as i16;
        hash = number.to_le_bytes().into_iter().fold(hash, fold);
    }
    hash ^= hash >> 32;
    let mut word = String::with_capacity(6);
    for _ in 0..3 {
        word.push(CONSONANTS[(hash & 15) as usize]);
        word.push(VOWELS[(hash >> 4 & 3) as usize]);
        hash >>= 6;
    }
    word
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use voxfleet_schema::session::Task;

    use super::*;

    fn samples(count: usize) -> Vec<f32> {
        (0..count).map(|n| ((n * 7_919) % 20_011) as f32 / 20_011.0 - 0.5).collect()
    }

    fn window(samples: Vec<f32>, from_sample: u64) -> Window {
        Window {
            samples,
            from_sample,
            purpose: Purpose::Final,
            prompt: String::new(),
            language: None,
            task: Task::Transcribe,
            hearing: None,
            background: false,
            cancel: Cancel::default(),
        }
    }

    fn recognizer(config: SimulatedConfig) -> SimulatedRecognizer {
        SimulatedModel::load("simulated", &config).and_then(|m| m.state()).expect("load")
    }

    #[test]
    fn a_lost_doubled_or_shifted_sample_shows() {
        let whole = samples(16_000);
        let text = text_of(&whole, 8_000);
        assert_eq!(text.split(' ').count(), 4);
        assert_eq!(text_of(&whole, 8_000), text);
        let mut lost = whole.clone();
        lost.remove(5_000);
        assert_ne!(text_of(&lost, 8_000), text);
        let mut doubled = whole.clone();
        doubled.insert(5_000, whole[5_000]);
        assert_ne!(text_of(&doubled, 8_000), text);
        assert_ne!(text_of(&whole, 8_001), text);
        assert_ne!(text_of(&vec![0.0; 16_000], 8_000), text_of(&vec![0.0; 16_000], 12_000), "silence has a place too");
    }

    #[test]
    fn blocks_lie_where_the_session_has_them() {
        let whole = samples(32_000);
        let all: Vec<String> = text_of(&whole, 0).split(' ').map(str::to_owned).collect();
        let part = text_of(&whole[4_000..20_000], 4_000);
        assert_eq!(part.split(' ').collect::<Vec<_>>(), all[1..5]);
        let ragged = text_of(&whole[4_100..20_100], 4_100);
        let ragged: Vec<&str> = ragged.split(' ').collect();
        assert_eq!(ragged.len(), 5);
        assert_eq!(ragged[1..4], all[2..5], "whole blocks are the same however the window lies");
    }

    #[test]
    fn word_times_are_exact() {
        let heard = hear(&window(samples(10_000), 1_600));
        let times: Vec<(u64, u64)> = heard.segments[0].words.iter().map(|w| (w.start_ms, w.end_ms)).collect();
        assert_eq!(times, [(0, 150), (150, 400), (400, 625)]);
        assert_eq!(heard.word_timing, Some(WordTiming::Exact));
        assert!(hear(&window(Vec::new(), 0)).segments.is_empty());
    }

    #[test]
    fn speed_takes_time_and_can_be_cancelled() {
        let mut quick = recognizer(SimulatedConfig { speed: 20.0, ..SimulatedConfig::default() });
        let begin = Instant::now();
        assert!(quick.decode(&[window(samples(16_000), 0)])[0].is_ok());
        assert!(begin.elapsed() >= Duration::from_millis(50));

        let mut slow = recognizer(SimulatedConfig { speed: 0.001, ..SimulatedConfig::default() });
        let window = window(samples(160_000), 0);
        let cancel = window.cancel.clone();
        let running = std::thread::spawn(move || slow.decode(&[window]));
        cancel.cancel();
        assert_eq!(running.join().expect("thread"), [Err(EngineError::Cancelled)]);
    }

    #[test]
    fn every_nth_decode_fails_over_all_states() {
        let config = SimulatedConfig { speed: 0.0, fail_every: 3, ..SimulatedConfig::default() };
        let model = SimulatedModel::load("simulated", &config).expect("load");
        let mut states = [model.state().expect("state"), model.state().expect("state")];
        let failed: Vec<bool> = (0..6).map(|n| states[n % 2].decode(&[window(samples(100), 0)])[0].is_err()).collect();
        assert_eq!(failed, [false, false, true, false, false, true]);
    }

    #[test]
    fn poison_is_a_run_at_the_top() {
        let top = 32_767.0 / 32_768.0;
        assert_eq!(longest_at_the_top(&[0.0, top, top, 32_766.0 / 32_768.0, top, top, top, 0.0]), 3);
        assert_eq!(longest_at_the_top(&samples(16_000)), 0);
        let config = SimulatedConfig { speed: 0.0, poison: Some(4), ..SimulatedConfig::default() };
        let harmless = [vec![top; 3], vec![0.0; 9], vec![top; 3]].concat();
        assert!(recognizer(config).decode(&[window(harmless, 0)])[0].is_ok());
    }

    #[test]
    fn memory_that_cannot_be_had_is_typed() {
        let greedy = SimulatedConfig { weights_mb: 1 << 40, ..SimulatedConfig::default() };
        assert!(matches!(SimulatedModel::load("simulated", &greedy), Err(EngineError::OutOfMemory(_))));
    }
}
