//! What models need: measured where a worker here, or on such a card, measured it, else as the catalog has it.

use std::path::PathBuf;

use voxfleet_schema::ladder;
use voxfleet_store::models::{
    Catalog, Model, ModelError, ModelKind,
    measured::{DeviceKey, Figures, Measured, ModelKey},
    plan::{Figure, Needs},
};

/// A CUDA context on a current GPU, published.
const CONTEXT_MB: u64 = 530;
/// What a session costs: four guaranteed MB of audio, and its window in the engine. Of the host where the device is a GPU.
pub(super) const SESSION_MB: u64 = 6;

/// The kind of device, for what is not a model's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    Gpu,
    Cpu,
}

/// Everything known of models.
pub(super) struct Known {
    pub(super) catalog: Catalog,
    pub(super) measured: Option<Measured>,
    /// The folder of models.
    pub(super) dir: Option<PathBuf>,
}

impl Known {
    /// The models asked for by name, in the catalog's order; None = nobody asked for any.
    pub(super) fn named(&self, names: &[String]) -> Result<Option<Vec<&Model>>, ModelError> {
        let unknown = |name: &str| {
            let like = self.catalog.like(name).into_iter().map(str::to_owned).collect();
            Err(ModelError::Unknown { name: name.to_owned(), like })
        };
        for name in names.iter().filter(|name| *name != "all") {
            match self.catalog.get(name) {
                Some(Model { kind: ModelKind::Whisper | ModelKind::WhisperCt2, .. }) => {}
                _ => return unknown(name),
            }
        }
        let all = names.iter().any(|name| name == "all");
        // All of them are the files: a folder is the same model for the other engine.
        let wanted = |m: &&Model| (all && m.kind == ModelKind::Whisper) || names.contains(&m.name);
        Ok((!names.is_empty()).then(|| self.catalog.models().iter().filter(wanted).collect()))
    }

    /// The published sizes, and what is here if `here` matters.
    pub(super) fn usual(&self, here: bool) -> Vec<&Model> {
        let wanted = |m: &&Model| ladder::is_plain_size(&m.name) || (here && self.path(m).is_some_and(|p| p.is_file()));
        self.whisper().filter(wanted).collect()
    }

    pub(super) fn whisper(&self) -> impl Iterator<Item = &Model> {
        self.catalog.models().iter().filter(|m| m.kind == ModelKind::Whisper)
    }

    fn path(&self, model: &Model) -> Option<PathBuf> {
        Some(self.dir.as_ref()?.join(&model.files.first()?.file))
    }

    fn figures(&self, model: &Model, device: &DeviceKey) -> Option<Figures> {
        let measured = self.measured.as_ref()?;
        let here = self.path(model).and_then(|path| ModelKey::of_file(&model.name, &path));
        [here, ModelKey::of_catalog(model)].into_iter().flatten().find_map(|key| measured.lookup(device, &key))
    }

    /// The device that somebody means who describes a card, where one was measured.
    pub(super) fn described(&self, name: &str, total_mb: u64) -> Option<DeviceKey> {
        self.measured.as_ref()?.described(name, total_mb)
    }

    pub(super) fn needs(&self, model: &Model, device: Option<&DeviceKey>, on: On) -> Needs {
        let figures = device.and_then(|device| self.figures(model, device)).unwrap_or_default();
        let (context_mb, session_mb) = match on {
            On::Gpu => (CONTEXT_MB, 0),
            On::Cpu => (0, SESSION_MB),
        };
        Needs {
            model: model.name.clone(),
            context: Figure::choose(figures.context_mb, context_mb),
            weights: Figure::choose(figures.weights_mb, model.weights_mb()),
            state: Figure::choose(figures.state_mb, model.state_mb),
            session: Figure::choose(None, session_mb),
            realtime_factor: figures.realtime_factor,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_store::models::plan::Origin;

    fn known(dir: &tempfile::TempDir) -> Known {
        Known {
            catalog: Catalog::built_in().expect("valid"),
            measured: Some(Measured::in_cache(dir.path())),
            dir: Some(dir.path().join("models")),
        }
    }

    fn names(models: Vec<&Model>) -> Vec<&str> {
        models.into_iter().map(|m| m.name.as_str()).collect()
    }

    #[test]
    fn the_usual_ones_are_the_sizes_and_what_is_here() {
        let dir = tempfile::tempdir().expect("folder");
        let known = known(&dir);
        assert_eq!(names(known.usual(true)), ["tiny", "base", "small", "medium", "large-v3"]);
        std::fs::create_dir(dir.path().join("models")).expect("folder");
        std::fs::write(dir.path().join("models/tiny.en.bin"), "x").expect("file");
        assert_eq!(names(known.usual(true)), ["tiny", "tiny.en", "base", "small", "medium", "large-v3"]);
        assert_eq!(known.usual(false).len(), 5);
    }

    #[test]
    fn models_are_asked_for_by_name() {
        let known = known(&tempfile::tempdir().expect("folder"));
        let named = |names: &[&str]| known.named(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert!(named(&[]).expect("none").is_none());
        assert_eq!(names(named(&["small", "base"]).expect("both").expect("some")), ["base", "small"]);
        assert_eq!(names(named(&["small-ct2"]).expect("a folder").expect("some")), ["small-ct2"]);
        assert!(named(&["all"]).expect("all").is_some_and(|all| all.len() > 20));
        // What is no speech model is none to plan.
        for name in ["smal", "silero-vad"] {
            assert!(matches!(named(&[name]), Err(ModelError::Unknown { .. })), "{name}");
        }
    }

    #[test]
    fn measured_figures_stand_before_published_ones() {
        let dir = tempfile::tempdir().expect("folder");
        let known = known(&dir);
        let base = known.catalog.get("base").expect("there");
        let t4 = DeviceKey { name: "Tesla T4".to_owned(), total_mb: 15_109 };
        let figures = Figures { weights_mb: Some(140), context_mb: Some(300), at_ms: 1, ..Figures::default() };
        let key = ModelKey::of_catalog(base).expect("a key");
        known.measured.as_ref().expect("a folder").record(&t4, &key, figures).expect("recorded");
        let device = known.described("T4", 15_360).expect("measured");
        let needs = known.needs(base, Some(&device), On::Gpu);
        assert_eq!((needs.weights, needs.context), (Figure::choose(Some(140), 0), Figure::choose(Some(300), 0)));
        assert_eq!((needs.state.mb, needs.state.from, needs.session.mb), (246, Origin::Catalog, 0));
        let cpu = known.needs(base, None, On::Cpu);
        assert_eq!((cpu.context.mb, cpu.weights.from, cpu.session.mb), (0, Origin::Catalog, SESSION_MB));
    }
}
