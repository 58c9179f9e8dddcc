//! What models really take on this device: learned from each load, kept in the cache, and told in heartbeats in place of
//! estimates. And how much live audio they get through: learned from what is decoded, and kept for whoever plans.
//!
//! Learning is pure: it compares what the engine says of its models with what it said before. Figures of models only grow
//! while a worker lives: two states made at once are measured together, and planning with too much costs a session where
//! planning with too little costs an engine. What stands beside them only shrinks: a state is seen on the device before the
//! engine tells of it. What an earlier worker found holds until it is measured again. On a GPU memory is measured by what
//! becomes less free, so a tenant that comes or goes meanwhile is measured too: what the model's file cannot explain is not
//! taken. Nothing is learned of a GPU while the engine runs on the CPU.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    device::Device,
    fleet::{ModelState, Residency},
};
use voxfleet_store::models::{DeviceKey, Figures, Measured, ModelKey};

use crate::{
    capacity::locked,
    engine::models::{self, ModelFacts},
    ipc::ModelFile,
    lifecycle::{Engine, Lived},
    session::unix_ms,
};

/// A context that differs by less is the same.
const STEP_MB: u64 = 16;
/// So much live audio says how fast a model is.
const LEAST_AUDIO_MS: f64 = 60_000.0;
/// What lies further back than so much audio counts for less and less.
const MOST_AUDIO_MS: f64 = 1_800_000.0;
/// Memory of weights and of a state is what the file says, give or take so many percent and MB: alignment, a library's
/// first use, a second state.
const LESS_PERCENT: u64 = 70;
const MORE_PERCENT: u64 = 150;
const MORE_MB: u64 = 96;
/// A speed that differs by a smaller share is the same.
const SPEED_STEP: f64 = 0.1;
/// A speed is kept at most once in this time.
const SPEED_EVERY: Duration = Duration::from_secs(600);

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
    /// Found by this worker.
    own: Mutex<BTreeMap<String, Figures>>,
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Measures(Arc<Inner>);

impl Measures {
    /// Reads what is known already. Blocks. `models`: those that whisper.cpp runs. What a file's states take and how they keep up
    /// is its alone; the batched engine measures its own memory at each load, and keeps nothing.
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
            own: Mutex::default(),
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

    /// Speeds that are worth keeping.
    fn faster_or_slower(
        &self,
        now: Instant,
        speeds: &mut BTreeMap<String, Speed>,
        lived: &Lived,
    ) -> Vec<(String, Figures)> {
        let known = locked(&self.0.known);
        let news = lived.iter().filter_map(|(model, all)| {
            let kept = known.get(model).and_then(|figures| figures.realtime_factor);
            let factor = speeds.entry(model.clone()).or_default().heard(now, *all, kept)?;
            Some((model.clone(), Figures { realtime_factor: Some(factor), ..Figures::default() }))
        });
        news.collect()
    }

    /// Takes news in; gives what has become known by it.
    fn learn(&self, news: Vec<(String, Figures)>) -> Vec<(String, Figures)> {
        let (mut known, mut own) = (locked(&self.0.known), locked(&self.0.own));
        let mut changed = Vec::new();
        for (name, new) in news {
            if !self.0.files.iter().any(|file| file.name == name) {
                continue;
            }
            let before = known.get(&name).copied().unwrap_or_default();
            let own = own.entry(name.clone()).or_default();
            *own = joined(*own, new);
            let after = before.with(*own);
            if after != before {
                known.insert(name.clone(), after);
                changed.push((name, after));
            }
        }
        changed
    }

    /// Leaves out what the models' files cannot explain.
    async fn plausible(&self, news: Vec<(String, Figures)>) -> Vec<(String, Figures)> {
        // Figures of what stands beside models come each second and say nothing of a file.
        if news.iter().all(|(_, new)| new.weights_mb.is_none() && new.state_mb.is_none()) {
            return news;
        }
        let me = Arc::clone(&self.0);
        let looked = tokio::task::spawn_blocking(move || {
            let explained = news.into_iter().map(|(name, new)| {
                let file = me.files.iter().find(|file| file.name == name);
                let facts = file.and_then(|file| models::check(&file.name, &file.path).ok());
                let left = facts.map_or(new, |facts| plausible(new, &facts));
                if left != new {
                    tracing::info!(
                        model = name,
                        weights_mb = new.weights_mb,
                        state_mb = new.state_mb,
                        "measured beside others, not taken"
                    );
                }
                (name, left)
            });
            explained.collect()
        });
        looked.await.unwrap_or_else(|error| {
            tracing::error!(%error, "measured figures not looked at");
            Vec::new()
        })
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
                    realtime_factor = figures.realtime_factor,
                    "needs of a model measured"
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
        let mut lived = engine.watch_lived();
        let mut speeds: BTreeMap<String, Speed> = BTreeMap::new();
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
                changed = lived.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let changed = self.learn(self.faster_or_slower(Instant::now(), &mut speeds, &lived.borrow_and_update()));
                    self.keep(changed).await;
                    continue;
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
            let changed = self.learn(self.plausible(news).await);
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

fn plausible(new: Figures, facts: &ModelFacts) -> Figures {
    let near =
        |mb: &u64, said: u64, most: u64| (said * LESS_PERCENT / 100..=most * MORE_PERCENT / 100 + MORE_MB).contains(mb);
    let weights = facts.weight_bytes >> 20;
    Figures {
        weights_mb: new.weights_mb.filter(|mb| near(mb, weights, weights)),
        // Small states share what is allocated already; two may be seen at once.
        state_mb: new.state_mb.filter(|mb| near(mb, 0, 2 * facts.state_mb)),
        ..new
    }
}

fn joined(known: Figures, new: Figures) -> Figures {
    Figures {
        context_mb: known.context_mb.into_iter().chain(new.context_mb).min(),
        weights_mb: known.weights_mb.max(new.weights_mb),
        state_mb: known.state_mb.max(new.state_mb),
        realtime_factor: new.realtime_factor.or(known.realtime_factor),
        ..known
    }
}

/// How fast a model is.
#[derive(Debug, Default)]
struct Speed {
    /// Totals that were heard last.
    heard: (u64, f64),
    /// Fading sums, in ms.
    audio_ms: f64,
    pool_ms: f64,
    kept_at: Option<Instant>,
}

impl Speed {
    /// Takes totals in. Gives the factor when it is to be kept; `kept`: the one that is.
    fn heard(&mut self, now: Instant, all: (u64, f64), kept: Option<f64>) -> Option<f64> {
        self.audio_ms += all.0.saturating_sub(self.heard.0) as f64;
        self.pool_ms += (all.1 - self.heard.1).max(0.0);
        self.heard = all;
        if self.audio_ms > MOST_AUDIO_MS {
            (self.audio_ms, self.pool_ms) = (self.audio_ms / 2.0, self.pool_ms / 2.0);
        }
        let rests = self.kept_at.is_some_and(|at| now.saturating_duration_since(at) < SPEED_EVERY);
        if rests || self.audio_ms < LEAST_AUDIO_MS || self.pool_ms < 1.0 {
            return None;
        }
        let factor = (self.audio_ms / self.pool_ms * 100.0).round() / 100.0;
        if kept.is_some_and(|kept| (factor - kept).abs() < kept * SPEED_STEP) {
            return None;
        }
        self.kept_at = Some(now);
        Some(factor)
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
    fn what_a_tenant_took_or_gave_meanwhile_is_not_the_model_s() {
        let facts = ModelFacts {
            multilingual: false,
            weight_bytes: 1_500 << 20,
            audio_ctx: 1_500,
            expected_mb: 1_901,
            state_mb: 400,
        };
        for (weights, state, taken) in [
            (Some(1_520), None, true),
            (Some(1_050), None, true),
            (Some(1_049), None, false),
            (Some(5_520), None, false),
            (None, Some(420), true),
            (None, Some(860), true),
            (None, Some(4_400), false),
        ] {
            let new = Figures { weights_mb: weights, state_mb: state, context_mb: Some(500), ..Figures::default() };
            let none = Figures { context_mb: Some(500), ..Figures::default() };
            assert_eq!(plausible(new, &facts), if taken { new } else { none }, "{weights:?} {state:?}");
        }
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

    #[test]
    fn a_speed_is_kept_when_there_is_enough_audio_behind_it_and_rarely() {
        let begin = Instant::now();
        let mut speed = Speed::default();
        let mut kept = None;
        // After so many s: audio and pool time since the start, in s, and what is kept then.
        for (at_s, audio_s, pool_s, told) in [
            (10, 59, 5.9, None),
            (11, 60, 6.0, Some(10.0)),
            (20, 70, 20.0, None),
            (610, 71, 20.0, None),
            (611, 72, 20.0, Some(3.6)),
            (1_300, 73, 20.0, None),
            (2_000, 1_800, 500.0, None),
            // The sums were halved before.
            (3_000, 1_810, 502.0, None),
            (4_000, 3_600, 704.0, Some(5.95)),
        ] {
            let now = begin + Duration::from_secs(at_s);
            let found = speed.heard(now, (audio_s * 1_000, pool_s * 1_000.0), kept);
            assert_eq!(found, told, "after {at_s} s");
            kept = found.or(kept);
        }
        let mut restarted = Speed::default();
        assert_eq!(restarted.heard(begin, (60_000, 10_900.0), Some(5.95)), None, "as it was before the start");
        assert_eq!(Speed::default().heard(begin, (60_000, 0.0), None), None, "no time at all is no speed");
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
        again.keep(again.learn(news(Some(120), None, None))).await;
        assert_eq!(told(&again, Residency::Available), (120 + 200 + 528, true), "measured again");
        again.keep(again.learn(news(Some(125), None, None))).await;
        let last = Measures::open(Some(dir.path()), &device, &files, 1);
        assert_eq!(told(&last, Residency::Available), (125 + 200 + 528, true));
        let of_others = Measures::open(Some(dir.path()), &device, &[], 1);
        assert_eq!(of_others.learn(news(Some(125), Some(10), Some(50))), [], "it is another engine's");
        assert_eq!(told(&of_others, Residency::Available), (7, false));
    }
}
