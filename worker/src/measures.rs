//! What models really take on this device: learned from each load, kept in the cache, and told in heartbeats in place of
//! estimates.
//!
//! Learning is pure: it compares what the engine says of its models with what it said before. Figures of models only grow
//! while a worker lives: two states made at once are measured together, and planning with too much costs a session where
//! planning with too little costs an engine. What stands beside them only shrinks: a state is seen on the device before the
//! engine tells of it. Nothing is learned of a GPU while the engine runs on the CPU.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    device::Device,
    fleet::{ModelState, Residency},
};
use voxfleet_store::models::{DeviceKey, Figures, Measured, ModelKey};

use crate::{capacity::locked, ipc::ModelFile, lifecycle::Engine, session::unix_ms};

/// A context that differs by less is the same.
const STEP_MB: u64 = 16;

#[derive(Debug)]
struct Inner {
    /// None without a cache folder.
    kept: Option<Measured>,
    device: DeviceKey,
    on_gpu: bool,
    files: Vec<ModelFile>,
    /// Decode states that a loaded model will have.
    states: u64,
    known: Mutex<BTreeMap<String, Figures>>,
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Measures(Arc<Inner>);

impl Measures {
    /// Reads what is known already. Blocks.
    pub(crate) fn open(cache: Option<&Path>, device: &Device, models: &[ModelFile], states: usize) -> Self {
        let kept = cache.map(Measured::in_cache);
        let key = DeviceKey { name: device.name.clone(), total_mb: device.total_mb };
        let read = |model: &ModelFile| {
            let file = ModelKey::of_file(&model.name, &model.path)?;
            Some((model.name.clone(), kept.as_ref()?.lookup(&key, &file)?))
        };
        let known = models.iter().filter_map(read).collect();
        Self(Arc::new(Inner {
            kept,
            device: key,
            on_gpu: device.index.is_some(),
            files: models.to_vec(),
            states: states as u64,
            known: Mutex::new(known),
        }))
    }

    /// Puts measured figures in place of expected ones.
    pub(crate) fn overlay(&self, models: &mut [ModelState]) {
        let known = locked(&self.0.known);
        let runs = models.iter().any(|model| model.state == Residency::Loaded);
        for model in models {
            let figures = known.get(&model.name).copied().unwrap_or_default();
            if let (Some(weights), Some(state)) = (figures.weights_mb, figures.state_mb) {
                // Whoever loads first pays for the context.
                let context = if runs { 0 } else { figures.context_mb.unwrap_or(0) };
                model.expected_mb = weights + self.0.states * state + context;
                model.measured = true;
            }
        }
    }

    /// Takes news in; gives what has become known by it.
    fn learn(&self, news: Vec<(String, Figures)>) -> Vec<(String, Figures)> {
        let mut known = locked(&self.0.known);
        let mut changed = Vec::new();
        for (name, new) in news {
            let before = known.get(&name).copied().unwrap_or_default();
            let after = joined(before, new);
            if after != before {
                known.insert(name.clone(), after);
                changed.push((name, after));
            }
        }
        changed
    }

    async fn keep(&self, changed: Vec<(String, Figures)>) {
        let me = Arc::clone(&self.0);
        let kept = tokio::task::spawn_blocking(move || {
            for (name, figures) in changed {
                tracing::info!(
                    model = name,
                    weights_mb = figures.weights_mb,
                    state_mb = figures.state_mb,
                    context_mb = figures.context_mb,
                    "memory of a model measured"
                );
                let figures = Figures { at_ms: unix_ms(), ..figures };
                // Its file may have come after the start.
                let file = me.files.iter().find(|file| file.name == name);
                if let (Some(kept), Some(key)) = (&me.kept, file.and_then(|f| ModelKey::of_file(&name, &f.path)))
                    && let Err(error) = kept.record(&me.device, &key, figures)
                {
                    // Known until the worker ends.
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, model = name, "measured figures not kept");
                }
            }
        });
        if let Err(error) = kept.await {
            tracing::error!(%error, "measured figures not kept");
        }
    }

    /// Watches loads and states until `stop`.
    pub(crate) async fn run(self, engine: Engine, mut device: watch::Receiver<Device>, stop: CancellationToken) {
        let mut status = engine.watch();
        let mut before = status.borrow_and_update().models.clone();
        let mut on_cpu = false;
        loop {
            let news = tokio::select! {
                () = stop.cancelled() => return,
                changed = status.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let status = status.borrow_and_update();
                    on_cpu = status.device == "cpu";
                    let news = learned(&before, &status.models);
                    before = status.models.clone();
                    news
                }
                changed = device.changed(), if self.0.on_gpu => {
                    if changed.is_err() {
                        return;
                    }
                    context(device.borrow_and_update().used_mb, &before)
                }
            };
            if self.0.on_gpu && on_cpu {
                continue;
            }
            let changed = self.learn(news);
            if !changed.is_empty() {
                self.keep(changed).await;
            }
        }
    }
}

/// What a change of the models says: a model that is there now shows its weights, one that has grown a state.
fn learned(before: &[ModelState], after: &[ModelState]) -> Vec<(String, Figures)> {
    let loaded = after.iter().filter(|model| model.state == Residency::Loaded && model.resident_mb > 0);
    let figures = loaded.filter_map(|model| {
        let was = before.iter().find(|was| was.name == model.name && was.state == Residency::Loaded);
        let figures = match was {
            None => Figures { weights_mb: Some(model.resident_mb), ..Figures::default() },
            Some(was) if model.resident_mb > was.resident_mb => {
                Figures { state_mb: Some(model.resident_mb - was.resident_mb), ..Figures::default() }
            }
            Some(_) => return None,
        };
        Some((model.name.clone(), figures))
    });
    figures.collect()
}

/// What this worker has on its GPU beside its models: a context and what libraries keep. None while something is loaded.
fn context(used_mb: u64, models: &[ModelState]) -> Vec<(String, Figures)> {
    let loaded = || models.iter().filter(|model| model.state == Residency::Loaded);
    if loaded().next().is_none() || models.iter().any(|model| model.state == Residency::Loading) {
        return Vec::new();
    }
    let beside = used_mb.saturating_sub(loaded().map(|model| model.resident_mb).sum());
    let figures = Figures { context_mb: Some(beside / STEP_MB * STEP_MB), ..Figures::default() };
    loaded().filter(|_| beside >= STEP_MB).map(|model| (model.name.clone(), figures)).collect()
}

fn joined(known: Figures, new: Figures) -> Figures {
    Figures {
        context_mb: known.context_mb.into_iter().chain(new.context_mb).min(),
        weights_mb: known.weights_mb.max(new.weights_mb),
        state_mb: known.state_mb.max(new.state_mb),
        ..known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(state: Residency, resident_mb: u64) -> ModelState {
        ModelState { name: "m".to_owned(), state, resident_mb, expected_mb: 7, ..ModelState::default() }
    }

    fn one(figures: Figures) -> Vec<(String, Figures)> {
        vec![("m".to_owned(), figures)]
    }

    #[test]
    fn a_load_shows_weights_and_growth_a_state() {
        use Residency::{Available, Loaded, Loading};
        let weights = |mb| one(Figures { weights_mb: Some(mb), ..Figures::default() });
        let state = |mb| one(Figures { state_mb: Some(mb), ..Figures::default() });
        let learned = |before, after| learned(&[before], &[after]);
        assert_eq!(learned(model(Loading, 0), model(Loaded, 140)), weights(140));
        assert_eq!(learned(model(Loaded, 140), model(Loaded, 340)), state(200));
        assert_eq!(learned(model(Loaded, 340), model(Loaded, 340)), []);
        assert_eq!(learned(model(Loaded, 340), model(Available, 0)), []);
        assert_eq!(learned(model(Loading, 0), model(Loaded, 0)), [], "nothing was seen");
    }

    #[test]
    fn what_stands_beside_the_models_is_the_context() {
        use Residency::{Available, Loaded, Loading};
        let seen = |used, models: &[ModelState]| context(used, models).first().and_then(|(_, f)| f.context_mb);
        assert_eq!(seen(670, &[model(Loaded, 140)]), Some(528));
        assert_eq!(seen(150, &[model(Loaded, 140)]), None, "less than can be told apart");
        assert_eq!(seen(670, &[model(Available, 0)]), None);
        assert_eq!(seen(670, &[model(Loaded, 140), model(Loading, 0)]), None);
    }

    #[tokio::test]
    async fn what_was_learned_is_told_and_kept() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("m.bin");
        std::fs::write(&path, "weights").expect("model");
        let device = Device { name: "T4".to_owned(), total_mb: 15_360, index: Some(0), ..Device::default() };
        let files = [ModelFile { name: "m".to_owned(), path }];
        let measures = Measures::open(Some(dir.path()), &device, &files, 2);
        let told = |measures: &Measures, state| {
            let mut models = [model(state, 0)];
            measures.overlay(&mut models);
            (models[0].expected_mb, models[0].measured)
        };
        assert_eq!(told(&measures, Residency::Available), (7, false), "an estimate");
        let news = |weights, state, context| {
            one(Figures { weights_mb: weights, state_mb: state, context_mb: context, ..Figures::default() })
        };
        for news in [news(Some(140), None, None), news(None, Some(200), None), news(None, None, Some(528))] {
            let changed = measures.learn(news);
            assert!(!changed.is_empty());
            measures.keep(changed).await;
        }
        assert_eq!(measures.learn(news(Some(139), Some(10), None)), [], "less is no news");
        assert_eq!(told(&measures, Residency::Available), (140 + 2 * 200 + 528, true));
        assert_eq!(told(&measures, Residency::Loaded), (140 + 2 * 200, true), "its context is there");
        let again = Measures::open(Some(dir.path()), &device, &files, 1);
        assert_eq!(told(&again, Residency::Available), (140 + 200 + 528, true), "after a restart");
    }
}
