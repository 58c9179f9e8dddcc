//! Voice activity detection: Silero through ONNX Runtime, and a detector by energy for where it cannot be had.
//!
//! One Silero session serves all streams; what a stream remembers is in its own [`Vad`]. Where ONNX Runtime or the model is
//! missing, the engine says in its notes which detector it uses instead and why.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use ort::{session::Session, value::TensorRef};
use voxfleet_schema::{SAMPLE_RATE_HZ, transcript::VadKind};

use super::{EngineError, VAD_FRAME, Vad, onnx};

/// Makes a detector for each stream; all of one engine are of one kind.
pub trait VadFactory: Send + Sync {
    fn kind(&self) -> VadKind;

    fn create(&self) -> Box<dyn Vad>;
}

/// Silero where both files are usable, else by energy, with the reason.
pub fn best_available(silero: Option<&Path>, onnxruntime: Option<&Path>) -> (Arc<dyn VadFactory>, Option<String>) {
    let (Some(model), Some(library)) = (silero, onnxruntime) else {
        let missing = if silero.is_none() { "no Silero model" } else { "no ONNX Runtime library" };
        return (Arc::new(Energy), Some(format!("voice activity by energy: {missing} configured")));
    };
    match Silero::load(model, library) {
        Ok(silero) => (Arc::new(silero), None),
        Err(why) => (Arc::new(Energy), Some(format!("voice activity by energy: {why}"))),
    }
}

/// Silero v6, one session for all streams.
#[derive(Clone)]
pub struct Silero {
    session: Arc<Mutex<Session>>,
}

/// Samples of the previous frame that go in front of each frame.
const CONTEXT: usize = 64;
/// Numbers the model carries from frame to frame: `[2, 1, 128]`.
const STATE: usize = 2 * 128;

impl Silero {
    /// Loads ONNX Runtime (once per process: a later path is not looked at) and the model, and tries it out.
    pub fn load(model: &Path, library: &Path) -> Result<Self, EngineError> {
        let session = onnx::open(onnx::Model::File(model), library).map_err(EngineError::Vad)?;
        let silero = Self { session: Arc::new(Mutex::new(session)) };
        // A model with other inputs or outputs shows here, not in the middle of a call.
        SileroStream::new(&silero).speech_probability(&[0.0; VAD_FRAME])?;
        Ok(silero)
    }
}

fn failed(what: &str) -> impl Fn(ort::Error) -> EngineError + '_ {
    move |error| EngineError::Vad(format!("{what}: {error}"))
}

impl VadFactory for Silero {
    fn kind(&self) -> VadKind {
        VadKind::Silero
    }

    fn create(&self) -> Box<dyn Vad> {
        Box::new(SileroStream::new(self))
    }
}

/// One stream's memory beside the shared session.
struct SileroStream {
    session: Arc<Mutex<Session>>,
    /// Context, then the frame.
    input: Vec<f32>,
    state: Vec<f32>,
}

impl SileroStream {
    fn new(silero: &Silero) -> Self {
        Self::with(silero.session.clone())
    }

    fn with(session: Arc<Mutex<Session>>) -> Self {
        Self { session, input: vec![0.0; CONTEXT + VAD_FRAME], state: vec![0.0; STATE] }
    }

    fn infer(&mut self) -> Result<f32, ort::Error> {
        let rate = [i64::from(SAMPLE_RATE_HZ)];
        let none: [usize; 0] = [];
        // Another stream's panic cannot have left the session half changed: all memory is passed in.
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let outputs = session.run(ort::inputs! {
            "input" => TensorRef::from_array_view(([1, CONTEXT + VAD_FRAME], self.input.as_slice()))?,
            "state" => TensorRef::from_array_view(([2usize, 1, 128], self.state.as_slice()))?,
            "sr" => TensorRef::from_array_view((none, rate.as_slice()))?,
        })?;
        let output = outputs.get("output").ok_or_else(|| ort::Error::new("the model has no output named output"))?;
        let state = outputs.get("stateN").ok_or_else(|| ort::Error::new("the model has no output named stateN"))?;
        let (_, probability) = output.try_extract_tensor::<f32>()?;
        let (_, next) = state.try_extract_tensor::<f32>()?;
        if next.len() != STATE {
            return Err(ort::Error::new(format!("a state of {} numbers", next.len())));
        }
        self.state.copy_from_slice(next);
        probability.first().copied().filter(|p| p.is_finite()).ok_or_else(|| ort::Error::new("no probability came out"))
    }
}

impl Vad for SileroStream {
    fn kind(&self) -> VadKind {
        VadKind::Silero
    }

    fn reset(&mut self) {
        self.input.fill(0.0);
        self.state.fill(0.0);
    }

    fn another(&self) -> Box<dyn Vad> {
        Box::new(Self::with(self.session.clone()))
    }

    fn speech_probability(&mut self, frame: &[f32; VAD_FRAME]) -> Result<f32, EngineError> {
        self.input[CONTEXT..].copy_from_slice(frame);
        let probability = self.infer().map_err(failed("Silero"))?;
        self.input.copy_within(VAD_FRAME.., 0);
        Ok(probability.clamp(0.0, 1.0))
    }
}

/// Makes [`EnergyVad`]s.
#[derive(Debug, Clone, Copy, Default)]
pub struct Energy;

impl VadFactory for Energy {
    fn kind(&self) -> VadKind {
        VadKind::Energy
    }

    fn create(&self) -> Box<dyn Vad> {
        Box::new(EnergyVad::default())
    }
}

/// Speech by level above an adaptive noise floor, with hysteresis.
///
/// The floor is the lowest smoothed level of the last three seconds: speech dips between words within that time. Until a
/// second has been heard the floor is taken to be no higher than a quiet room, so that a stream may begin in mid-word.
#[derive(Debug, Default)]
pub struct EnergyVad {
    /// One-pole high-pass: what was in and out last. Hum and offsets are no speech.
    high_pass: (f32, f32),
    level_db: Option<f32>,
    /// Smoothed levels of the last [`FLOOR_FRAMES`] frames.
    levels: VecDeque<f32>,
    speaking: bool,
}

/// Three seconds.
const FLOOR_FRAMES: usize = 94;
/// One second.
const SETTLED_FRAMES: usize = 31;
/// A quiet room, in dB below full scale.
const ASSUMED_FLOOR_DB: f32 = -45.0;
/// Bounds of the floor: below is digital silence, above nobody would be understood.
const FLOOR_DB: std::ops::RangeInclusive<f32> = -66.0..=-26.0;
/// Above the floor, where speech begins and where it stays.
const BEGIN_DB: f32 = 12.0;
const STAY_DB: f32 = 8.0;
/// Decibels over which the probability goes from about 0.27 to 0.73.
const SOFTNESS_DB: f32 = 2.0;

impl Vad for EnergyVad {
    fn kind(&self) -> VadKind {
        VadKind::Energy
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    fn another(&self) -> Box<dyn Vad> {
        Box::new(Self::default())
    }

    fn speech_probability(&mut self, frame: &[f32; VAD_FRAME]) -> Result<f32, EngineError> {
        // 100 Hz at 16 kHz.
        const POLE: f32 = 0.961;
        let (mut last_in, mut last_out) = self.high_pass;
        let mut power = 0.0_f32;
        for sample in frame {
            last_out = POLE * (last_out + sample - last_in);
            last_in = *sample;
            power += last_out * last_out;
        }
        self.high_pass = (last_in, last_out);
        let now_db = 10.0 * (power / VAD_FRAME as f32 + 1e-10).log10();
        // Up at once, down over some frames: a stop consonant is no pause.
        let level = self.level_db.map_or(now_db, |before| now_db.max(0.6 * before + 0.4 * now_db));
        self.level_db = Some(level);
        if self.levels.len() == FLOOR_FRAMES {
            self.levels.pop_front();
        }
        self.levels.push_back(level);

        let lowest = self.levels.iter().copied().fold(f32::INFINITY, f32::min);
        let assumed = if self.levels.len() < SETTLED_FRAMES { ASSUMED_FLOOR_DB } else { f32::INFINITY };
        let floor = lowest.min(assumed).clamp(*FLOOR_DB.start(), *FLOOR_DB.end());
        let needed = floor + if self.speaking { STAY_DB } else { BEGIN_DB };
        let probability = 1.0 / (1.0 + (-(level - needed) / SOFTNESS_DB).exp());
        self.speaking = probability >= 0.5;
        Ok(probability)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(samples: &[f32]) -> impl Iterator<Item = &[f32; VAD_FRAME]> {
        samples.as_chunks::<VAD_FRAME>().0.iter()
    }

    fn noise(seconds: f32, amplitude: f32) -> Vec<f32> {
        let mut state = 1u32;
        (0..(seconds * 16_000.0) as usize)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1u32 << 24) as f32 * 2.0 * amplitude - amplitude
            })
            .collect()
    }

    /// A buzz with a syllable's rise and fall four times a second.
    fn voice(seconds: f32, amplitude: f32) -> Vec<f32> {
        (0..(seconds * 16_000.0) as usize)
            .map(|n| {
                let t = n as f32 / 16_000.0;
                let syllable = 0.3 + 0.7 * (std::f32::consts::PI * 4.0 * t).sin().abs();
                amplitude * syllable * (std::f32::consts::TAU * 220.0 * t).sin()
            })
            .collect()
    }

    fn share_of_speech(vad: &mut dyn Vad, samples: &[f32]) -> f32 {
        let voiced: Vec<bool> =
            frames(samples).map(|f| vad.speech_probability(f).expect("energy cannot fail") > 0.5).collect();
        voiced.iter().filter(|v| **v).count() as f32 / voiced.len() as f32
    }

    #[test]
    fn energy_hears_voice_in_noise_and_none_in_noise_alone() {
        for amplitude in [0.0, 0.001, 0.01, 0.03] {
            let mut vad = EnergyVad::default();
            assert_eq!(share_of_speech(&mut vad, &noise(3.0, amplitude)), 0.0, "noise of {amplitude}");
            let mut both = noise(3.0, amplitude);
            both.iter_mut().zip(voice(3.0, 0.3)).for_each(|(n, v)| *n += v);
            assert!(share_of_speech(&mut vad, &both) > 0.9, "voice in noise of {amplitude}");
            let tail = noise(3.0, amplitude);
            assert!(share_of_speech(&mut vad, &tail) < 0.1, "noise of {amplitude} after voice");
        }
    }

    #[test]
    fn energy_hears_a_stream_that_begins_in_mid_word() {
        assert!(share_of_speech(&mut EnergyVad::default(), &voice(1.0, 0.2)) > 0.9);
    }

    #[test]
    fn offsets_and_hum_are_no_speech() {
        let hum: Vec<f32> =
            (0..48_000).map(|n| 0.2 + 0.01 * (std::f32::consts::TAU * 50.0 * n as f32 / 16_000.0).sin()).collect();
        let mut vad = EnergyVad::default();
        let first = share_of_speech(&mut vad, &hum[..16_000]);
        assert!(first < 0.1, "the jump at the start may count, {first}");
        assert_eq!(share_of_speech(&mut vad, &hum[16_000..]), 0.0);
    }

    #[test]
    fn a_reset_forgets_everything() {
        let samples = voice(2.0, 0.2);
        let run = |vad: &mut EnergyVad| -> Vec<f32> {
            frames(&samples).map(|f| vad.speech_probability(f).expect("energy")).collect()
        };
        let mut vad = EnergyVad::default();
        let first = run(&mut vad);
        assert_ne!(run(&mut vad), first, "it has a memory");
        vad.reset();
        assert_eq!(run(&mut vad), first);
    }

    #[test]
    fn unusable_files_fall_back_and_say_why() {
        let folder = tempfile::tempdir().expect("folder");
        let text = folder.path().join("libonnxruntime.so");
        std::fs::write(&text, "not a library").expect("write");
        let missing = folder.path().join("missing");
        for (model, library, why) in [
            (None, Some(text.as_path()), "no Silero model"),
            (Some(text.as_path()), None, "no ONNX Runtime"),
            (Some(text.as_path()), Some(missing.as_path()), "No such file"),
            (Some(text.as_path()), Some(text.as_path()), "not a shared library"),
        ] {
            let (factory, note) = best_available(model, library);
            assert_eq!(factory.kind(), VadKind::Energy);
            let note = note.expect("a reason");
            assert!(note.contains(why), "{note}");
        }
    }
}
