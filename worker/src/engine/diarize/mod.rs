//! Who speaks in a window: beside each decode thread another one listens to the same window, so that words do not wait.
//!
//! | module | does |
//! |---|---|
//! | [`memory`] | whether there is memory to listen |
//! | [`networks`] | segmentation and speaker encoder through ONNX Runtime |
//! | [`again`] | all voices once more, at the end |
//! | [`attribute`] | turns and words under their labels |
//! | [`ears`] | the thread that listens while its decode thread decodes |
//!
//! What is heard depends on the window alone. Whose label a voice gets is decided by the stream, in the order of its finals.

mod again;
mod attribute;
mod ears;
mod memory;
mod networks;

use std::{
    ops::Range,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use voxfleet_diarize::{
    fbank::{Features, FrontEnd},
    hear::{self, Stretch, Voiced},
    models::{Embedder, ModelError, Segmenter},
    powerset::CLASSES,
};
use voxfleet_schema::transcript::SpeakersBy;

pub(crate) use self::again::{Ending, hear_all};
pub(crate) use self::attribute::{attribute, relabel, turns_of};
pub(super) use self::ears::{Ears, Listening};
pub(crate) use self::memory::{free_mb, lacking};
use self::networks::{Encoder, EncoderFile, Segmentation};
pub use self::{
    again::reconsidered,
    ears::{HeardLate, Late},
};
use super::Cancel;

/// What an engine listens with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DiarizeConfig {
    /// pyannote's segmentation-3.0; without it voices are told apart by where they change.
    pub segmentation: Option<PathBuf>,
    /// A speaker encoder; none = ours.
    pub encoder: Option<PathBuf>,
    /// Cosine distance of that encoder beyond which somebody else speaks, in hundredths; none = what suits ours.
    pub distance_percent: Option<u16>,
    /// Sessions that ask for speakers if they can be had get them where so much memory is left on the host, in MB.
    pub needs_mb: u64,
    /// Answers come this much later, where a test wants them to.
    pub later_ms: u64,
}

/// One window to listen to.
#[derive(Debug, Clone)]
pub struct Hearing {
    /// Of the final it becomes.
    pub index: u64,
    /// Mono, 16 kHz, -1 to 1.
    pub samples: Vec<f32>,
    /// Where they begin in their session.
    pub from_sample: u64,
    /// Where the voice detector heard somebody, on the session's clock.
    pub speech: Vec<Range<u64>>,
    /// Whether the words wait for it, however long it takes: recordings, and the end of a call.
    pub patient: bool,
    /// Silence before the window's end, in ms: what its words have waited already.
    pub waited_ms: u64,
}

/// What was heard in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heard {
    pub voiced: Vec<Voiced>,
    pub by: SpeakersBy,
    /// Why not better.
    pub why: Option<String>,
    /// Whose vectors these are.
    pub encoder: String,
    pub took: Duration,
}

/// What a decode brings beside its words.
#[derive(Debug, Clone, Default)]
pub enum Listened {
    /// Nobody wants to know.
    #[default]
    NotAsked,
    Heard(Result<Heard, String>),
    /// It comes by itself.
    Late(Late),
}

/// What diarization would be like with these files, as far as that can be seen without opening them.
pub fn expected(config: &DiarizeConfig, onnxruntime: Option<&std::path::Path>) -> (SpeakersBy, Option<String>) {
    if onnxruntime.is_none() {
        return (SpeakersBy::None, Some("no speakers: no ONNX Runtime library configured".to_owned()));
    }
    match &config.segmentation {
        Some(_) => (SpeakersBy::Segmentation, None),
        None => (SpeakersBy::Changes, Some(NO_SEGMENTATION.to_owned())),
    }
}

const NO_SEGMENTATION: &str = "no segmentation model: `voxfleet models pull pyannote-segmentation-3.0` brings it";

/// The networks, opened.
pub struct Listener {
    segmentation: Option<Segmentation>,
    /// Why there is none.
    why: Option<String>,
    encoder: Encoder,
    pieces: hear::Listener,
}

impl Listener {
    pub fn open(config: &DiarizeConfig, onnxruntime: Option<&std::path::Path>) -> Result<Self, String> {
        let library = onnxruntime.ok_or("no ONNX Runtime library configured")?;
        let file = config.encoder.clone().map_or(EncoderFile::BuiltIn, EncoderFile::File);
        let encoder =
            Encoder::open(&file, config.distance_percent, library).map_err(|why| format!("speaker encoder: {why}"))?;
        let (segmentation, why) = match &config.segmentation {
            None => (None, Some(NO_SEGMENTATION.to_owned())),
            Some(file) => match Segmentation::open(file, library) {
                Ok(segmentation) => (Some(segmentation), None),
                Err(why) => (None, Some(format!("segmentation: {why}"))),
            },
        };
        if let Some(why) = &why {
            tracing::warn!(%why, "speakers are told apart by changes of voice");
        }
        let pieces = hear::Listener::new(encoder.front_end(), hear::Hearing::default());
        Ok(Self { segmentation, why, encoder, pieces })
    }

    /// The segmentation network by itself, for whoever measures it.
    pub fn segmenter(&mut self) -> Option<&mut dyn Segmenter> {
        self.segmentation.as_mut().map(|segmentation| segmentation as &mut dyn Segmenter)
    }

    /// Listens to a window; looks at `cancel` before each run of a network.
    pub fn hear(&mut self, hearing: &Hearing, cancel: &Cancel) -> Result<Heard, String> {
        let begin = Instant::now();
        let encoder = self.encoder.encoder().to_owned();
        let mut segmentation = self.segmentation.as_mut().map(|inner| Watched { inner, cancel });
        let by = if segmentation.is_some() { SpeakersBy::Segmentation } else { SpeakersBy::Changes };
        let segmenter = segmentation.as_mut().map(|watched| watched as &mut dyn Segmenter);
        let mut embedder = Watched { inner: &mut self.encoder, cancel };
        let stretch = Stretch { samples: &hearing.samples, from_sample: hearing.from_sample, speech: &hearing.speech };
        let voiced = self.pieces.voices(stretch, segmenter, &mut embedder).map_err(|error| error.to_string())?;
        Ok(Heard { voiced, by, why: self.why.clone(), encoder, took: begin.elapsed() })
    }
}

/// A network that can be stopped between two runs.
struct Watched<'a, T> {
    inner: &'a mut T,
    cancel: &'a Cancel,
}

const CANCELLED: &str = "cancelled";

impl<T: Segmenter> Segmenter for Watched<'_, T> {
    fn logits(&mut self, samples: &[f32]) -> Result<Vec<[f32; CLASSES]>, ModelError> {
        match self.cancel.is_cancelled() {
            true => Err(ModelError::Segmentation(CANCELLED.to_owned())),
            false => self.inner.logits(samples),
        }
    }
}

impl<T: Embedder> Embedder for Watched<'_, T> {
    fn encoder(&self) -> &str {
        self.inner.encoder()
    }

    fn dims(&self) -> usize {
        self.inner.dims()
    }

    fn front_end(&self) -> FrontEnd {
        self.inner.front_end()
    }

    fn embed(&mut self, features: &Features) -> Result<Vec<f32>, ModelError> {
        match self.cancel.is_cancelled() {
            true => Err(ModelError::Encoder(CANCELLED.to_owned())),
            false => self.inner.embed(features),
        }
    }
}
