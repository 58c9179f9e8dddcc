//! The networks of diarization through ONNX Runtime.
//!
//! Which encoder a file is shows in its inputs: WeSpeaker's files (and ours) take `[batch, frames, 80]` of Kaldi's features,
//! NeMo's TitaNet `[batch, 80, frames]` of its own and a length. Both are tried out when they are opened, so that a file of
//! another kind is an error then and not in the middle of a call.

use std::path::{Path, PathBuf};

use ort::{
    session::{Session, SessionInputValue},
    value::TensorRef,
};
use sha2::{Digest as _, Sha256};
use voxfleet_diarize::{
    fbank::{Features, FrontEnd},
    models::{Embedder, ModelError, Segmenter},
    online::encoder_name,
    powerset::CLASSES,
};

use super::super::onnx::{self, Model};

/// Bands of every front end here.
const BINS: usize = 80;
/// Frames that an encoder is tried out with (1 s).
const TRIAL_FRAMES: usize = 100;

/// pyannote's segmentation-3.0.
pub(super) struct Segmentation {
    session: Session,
    input: String,
}

impl Segmentation {
    pub(super) fn open(file: &Path, library: &Path) -> Result<Self, String> {
        let session = onnx::open(Model::File(file), library)?;
        let input = only_input(&session)?;
        let mut segmentation = Self { session, input };
        segmentation.logits(&[0.0; 16_000]).map_err(|error| error.to_string())?;
        Ok(segmentation)
    }

    fn run(&mut self, samples: &[f32]) -> Result<Vec<[f32; CLASSES]>, ort::Error> {
        let tensor = TensorRef::from_array_view(([1, 1, samples.len()], samples))?;
        let outputs = self.session.run(vec![(self.input.as_str(), SessionInputValue::from(tensor))])?;
        let (shape, values) = outputs[0].try_extract_tensor::<f32>()?;
        if shape.last() != Some(&(CLASSES as i64)) {
            return Err(ort::Error::new(format!("its output has the shape {shape}")));
        }
        let (rows, _) = values.as_chunks::<CLASSES>();
        if rows.iter().flatten().any(|value| !value.is_finite()) {
            return Err(ort::Error::new("its output is not finite"));
        }
        Ok(rows.to_vec())
    }
}

impl Segmenter for Segmentation {
    fn logits(&mut self, samples: &[f32]) -> Result<Vec<[f32; CLASSES]>, ModelError> {
        self.run(samples).map_err(|error| ModelError::Segmentation(error.to_string()))
    }
}

/// Where the speaker encoder comes from.
#[derive(Debug, Clone)]
pub(super) enum EncoderFile {
    /// Ours, which every binary carries.
    BuiltIn,
    File(PathBuf),
}

/// A speaker encoder.
pub(super) struct Encoder {
    session: Session,
    /// Its checksum, and the distance chosen for it.
    id: String,
    front_end: FrontEnd,
    dims: usize,
}

impl Encoder {
    pub(super) fn open(file: &EncoderFile, distance_percent: Option<u16>, library: &Path) -> Result<Self, String> {
        let read;
        let bytes = match file {
            EncoderFile::BuiltIn => voxfleet_diarize::ENCODER,
            EncoderFile::File(path) => {
                read = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
                read.as_slice()
            }
        };
        let session = onnx::open(Model::Bytes(bytes), library)?;
        let id: String = Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let id = encoder_name(&id, distance_percent);
        let front_end = match session.inputs().len() {
            1 => FrontEnd::Kaldi { bins: BINS },
            2 => FrontEnd::Nemo { bins: BINS },
            n => return Err(format!("a speaker encoder with {n} inputs is not known")),
        };
        let mut encoder = Self { session, id, front_end, dims: 0 };
        // No frame like the other: some networks divide by the variance.
        let trial = (0..TRIAL_FRAMES * BINS).map(|n| (n % 7) as f32 - 3.0).collect();
        encoder.dims = encoder.run(&Features::new(BINS, trial)).map_err(|error| error.to_string())?.len();
        Ok(encoder)
    }

    fn run(&mut self, features: &Features) -> Result<Vec<f32>, ort::Error> {
        let frames = features.frames();
        let names: Vec<String> = self.session.inputs().iter().map(|input| input.name().to_owned()).collect();
        let output = match self.session.outputs().iter().position(|output| output.name() == "embs") {
            Some(embs) => embs,
            None => self.session.outputs().len().saturating_sub(1),
        };
        let turned: Vec<f32>;
        let length = [frames as i64];
        let inputs: Vec<(&str, SessionInputValue<'_>)> = match self.front_end {
            FrontEnd::Kaldi { .. } => {
                vec![(&names[0], TensorRef::from_array_view(([1, frames, BINS], features.values()))?.into())]
            }
            FrontEnd::Nemo { .. } => {
                turned = (0..BINS).flat_map(|bin| (0..frames).map(move |t| features.frame(t)[bin])).collect();
                vec![
                    (&names[0], TensorRef::from_array_view(([1, BINS, frames], turned.as_slice()))?.into()),
                    (&names[1], TensorRef::from_array_view(([1usize], length.as_slice()))?.into()),
                ]
            }
        };
        let outputs = self.session.run(inputs)?;
        let (_, values) = outputs[output].try_extract_tensor::<f32>()?;
        if values.is_empty() || values.len() > MAX_DIMS || values.iter().any(|value| !value.is_finite()) {
            return Err(ort::Error::new(format!("{} numbers are no voice", values.len())));
        }
        Ok(values.to_vec())
    }
}

/// Published encoders have 192 to 512.
const MAX_DIMS: usize = 1_024;

impl Embedder for Encoder {
    fn encoder(&self) -> &str {
        &self.id
    }

    fn dims(&self) -> usize {
        self.dims
    }

    fn front_end(&self) -> FrontEnd {
        self.front_end
    }

    fn embed(&mut self, features: &Features) -> Result<Vec<f32>, ModelError> {
        let voice = self.run(features).map_err(|error| ModelError::Encoder(error.to_string()))?;
        if voice.len() != self.dims {
            return Err(ModelError::Encoder(format!("{} numbers instead of {}", voice.len(), self.dims)));
        }
        Ok(voice)
    }
}

fn only_input(session: &Session) -> Result<String, String> {
    match session.inputs() {
        [input] => Ok(input.name().to_owned()),
        inputs => Err(format!("a segmentation network with {} inputs is not known", inputs.len())),
    }
}
