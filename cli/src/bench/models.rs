//! Models for measurements: the small one of the tests, and random weights in the shapes of the official ones, which are
//! written when they are first wanted and kept in the cache.

use std::{
    fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{find, fleet};
use voxfleet_worker::{
    engine::{
        Cancel, Purpose, Recognizer as _, Window, models,
        pool::Taken,
        whisper::{
            WhisperModel,
            random::{self, Format, Shape},
        },
    },
    ipc::ModelFile,
};

use super::{progress, rounded};

const MICRO: &str = "micro.en-q8_0";
/// Words that a random model says in each window: eight seconds of speech.
const WORDS: u32 = 24;

/// The small model of the tests.
pub(super) fn micro_file() -> ModelFile {
    ModelFile { name: MICRO.to_owned(), path: fleet::models_dir().join(format!("{MICRO}.bin")) }
}

/// The same as a file of its own in `dir`: an engine that wants a folder makes one beside it.
pub(super) fn micro_copied(dir: &Path) -> Result<ModelFile> {
    let file = micro_file();
    let path = dir.join(format!("{MICRO}.bin"));
    fs::copy(&file.path, &path).with_context(|| path.display().to_string())?;
    Ok(ModelFile { path, ..file })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Model {
    Micro,
    Random(Shape),
}

impl FromStr for Model {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "micro" {
            Ok(Model::Micro)
        } else {
            text.parse().map(Model::Random).map_err(|e: String| format!("micro, or a shape: {e}"))
        }
    }
}

/// Where the files of random models are, and how their matrices are stored.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Stubs {
    /// How random models are stored: f16 or q8_0
    #[arg(long, default_value = "f16", value_name = "FORMAT")]
    pub(super) format: Format,
    /// Folder of the random models [default: in the cache]
    #[arg(long, value_name = "DIR")]
    pub(super) stubs_dir: Option<PathBuf>,
}

impl Stubs {
    /// Its file, which is made if it is not there; named like the official one of its shape, in a folder of its format.
    pub(super) fn file(&self, model: Model) -> Result<ModelFile> {
        let shape = match model {
            Model::Micro => return Ok(micro_file()),
            Model::Random(shape) => shape,
        };
        let dir = self.stubs_dir.clone().unwrap_or_else(|| find::cache().join("bench-models"));
        let dir = dir.join(self.format.as_str());
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let path = dir.join(format!("{}.bin", shape.as_str()));
        if models::check(shape.as_str(), &path).is_err() {
            progress(&format!("writing random weights, {} in {}", shape.as_str(), self.format.as_str()));
            random::write(&path, shape, self.format, WORDS).with_context(|| path.display().to_string())?;
        }
        Ok(ModelFile { name: shape.as_str().to_owned(), path })
    }

    /// What its matrices are stored as.
    pub(super) fn stored_as(&self, model: Model) -> &'static str {
        match model {
            Model::Micro => "q8_0",
            Model::Random(_) => self.format.as_str(),
        }
    }

    /// What a row says of where its weights come from.
    pub(super) fn weights(&self, model: Model) -> String {
        let stored_as = self.stored_as(model);
        if model == Model::Micro { stored_as.to_owned() } else { format!("random {stored_as}") }
    }
}

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench stubs --shapes base,small
  voxfleet bench stubs --shapes large-v3-turbo --format q8_0 --stubs-dir /tmp/models")]
pub(crate) struct StubsArgs {
    /// Shapes to write
    #[arg(long, value_delimiter = ',', default_value = "tiny,base", value_name = "SHAPES")]
    shapes: Vec<Shape>,
    #[command(flatten)]
    stubs: Stubs,
}

/// Writes what is not there.
pub(super) fn write_stubs(args: &StubsArgs) -> Result<Value> {
    let rows = args.shapes.iter().map(|shape| {
        let file = args.stubs.file(Model::Random(*shape))?;
        let facts = models::check(&file.name, &file.path)?;
        Ok(json!({ "model": file.name, "file": file.path, "weight_mb": facts.weight_bytes >> 20 }))
    });
    Ok(json!({ "rows": rows.collect::<Result<Vec<Value>>>()? }))
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct WeighArgs {
    #[arg(long)]
    model: Model,
    #[command(flatten)]
    stubs: Stubs,
    #[arg(long)]
    use_gpu: bool,
}

/// States that are made; one by one they differ, since the first decode also makes what the library keeps.
const STATES: u64 = 2;

/// What weights and decode states take of this process, which has done nothing else. On a GPU its context, which belongs to
/// the driver, is left out: the first look at the free memory makes it.
pub(super) fn weigh(args: &WeighArgs) -> Result<Value> {
    let file = args.stubs.file(args.model)?;
    let taken = Taken::from_now(args.use_gpu);
    let model = WhisperModel::load(&file.name, &file.path, args.use_gpu, 1)?;
    ensure!(!args.use_gpu || model.info().device != "cpu", "there is no GPU for this build");
    let weights_mb = taken.mb();
    let window = Window {
        samples: (0..64_000).map(|n| (n as f32 * 0.05).sin() * 0.3).collect(),
        from_sample: 0,
        purpose: Purpose::Final,
        prompt: String::new(),
        language: Some("en".to_owned()),
        task: voxfleet_schema::session::Task::Transcribe,
        hearing: None,
        background: false,
        cancel: Cancel::default(),
    };
    let mut states = Vec::new();
    let mut each_mb = Vec::new();
    for _ in 0..STATES {
        let before = taken.mb();
        let mut state = model.state()?;
        state.decode(std::slice::from_ref(&window)).pop().context("an answer")??;
        states.push(state);
        each_mb.push(taken.mb().saturating_sub(before));
    }
    let mean = each_mb.iter().sum::<u64>() as f64 / STATES as f64;
    Ok(json!({
        "weights_mb": weights_mb,
        "state_mb": rounded(mean),
        "file_weights_mb": models::check(&file.name, &file.path)?.weight_bytes >> 20,
        "device": model.info().device,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_known_by_their_names() {
        assert_eq!("micro".parse(), Ok(Model::Micro));
        assert_eq!("base".parse(), Ok(Model::Random(Shape::Base)));
        assert!("huge".parse::<Model>().expect_err("no shape").contains("large-v3-turbo"));
    }

    #[test]
    fn a_stub_is_written_once_and_again_when_it_is_damaged() {
        let dir = tempfile::tempdir().expect("a folder");
        let stubs = Stubs { format: Format::Q8, stubs_dir: Some(dir.path().to_owned()) };
        let file = stubs.file(Model::Random(Shape::Tiny)).expect("written");
        assert_eq!(file.name, "tiny");
        let written = fs::metadata(&file.path).expect("a file");
        stubs.file(Model::Random(Shape::Tiny)).expect("there");
        assert_eq!(fs::metadata(&file.path).expect("a file").modified().ok(), written.modified().ok());
        fs::File::options().write(true).open(&file.path).and_then(|f| f.set_len(1_000)).expect("cut off");
        stubs.file(Model::Random(Shape::Tiny)).expect("again");
        assert_eq!(fs::metadata(&file.path).expect("a file").len(), written.len());
    }
}
