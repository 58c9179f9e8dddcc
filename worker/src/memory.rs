//! What each stage of the work does to the device's memory: in the log, as metrics, and in the result of a job.
//!
//! Figures are those of the device's sampler, one each second: what is given as before is the last sample until then, what is
//! given as after the first one behind it. The watching is pure; [`Memory::run`] feeds it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    device::Device,
    fleet::{EngineRunState, ModelState, Residency},
};

use crate::{capacity::locked, lifecycle::Engine, metrics};

/// A stretch of work that takes or gives memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Weights of a model are loaded.
    Load,
    /// A recording is decoded.
    Transcribe,
    /// The engine has ended.
    Release,
}

impl Stage {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Stage::Load => "load",
            Stage::Transcribe => "transcribe",
            Stage::Release => "release",
        }
    }
}

/// Memory in use by this worker on its device around a stage, in MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) stage: Stage,
    pub(crate) before_mb: u64,
    pub(crate) after_mb: u64,
}

/// Tells stages from what the engine says of itself and what the device shows. Pure.
#[derive(Debug, Default)]
struct Watcher {
    used_mb: u64,
    running: bool,
    /// Since a load began.
    loading: Option<u64>,
    /// Over, and waiting for the first sample behind them.
    over: Vec<(Stage, u64)>,
}

impl Watcher {
    fn engine(&mut self, state: EngineRunState, models: &[ModelState]) {
        let loads = models.iter().any(|model| model.state == Residency::Loading);
        match (self.loading, loads) {
            (None, true) => self.loading = Some(self.used_mb),
            (Some(before), false) => {
                self.loading = None;
                self.over.push((Stage::Load, before));
            }
            _ => {}
        }
        let runs = !matches!(state, EngineRunState::Down | EngineRunState::Failed);
        if self.running && !runs {
            self.over.push((Stage::Release, self.used_mb));
        }
        self.running = runs;
    }

    fn sample(&mut self, used_mb: u64) -> Vec<Change> {
        self.used_mb = used_mb;
        self.over.drain(..).map(|(stage, before_mb)| Change { stage, before_mb, after_mb: used_mb }).collect()
    }
}

/// The last change of each stage, and the figures now. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    device: watch::Receiver<Device>,
    last: Arc<Mutex<BTreeMap<Stage, Change>>>,
}

impl Memory {
    pub(crate) fn new(device: watch::Receiver<Device>) -> Self {
        Self { device, last: Arc::default() }
    }

    /// In use by this worker at the last sample, in MB.
    pub(crate) fn used_mb(&self) -> u64 {
        self.device.borrow().used_mb
    }

    /// A stage that the caller watches itself is over.
    pub(crate) fn ended(&self, stage: Stage, before_mb: u64) -> Change {
        let change = Change { stage, before_mb, after_mb: self.used_mb() };
        self.tell(change);
        change
    }

    /// The last time there was such a stage.
    pub(crate) fn last(&self, stage: Stage) -> Option<Change> {
        locked(&self.last).get(&stage).copied()
    }

    fn tell(&self, change: Change) {
        let Change { stage, before_mb, after_mb } = change;
        tracing::info!(stage = stage.as_str(), before_mb, after_mb, "memory of a stage");
        metrics::stage_memory(change);
        locked(&self.last).insert(stage, change);
    }

    /// Watches loads and releases until `stop`.
    pub(crate) async fn run(self, engine: Engine, stop: CancellationToken) {
        let (mut device, mut status) = (self.device.clone(), engine.watch());
        let mut watcher = Watcher::default();
        watcher.sample(device.borrow_and_update().used_mb);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = status.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let status = status.borrow_and_update();
                    watcher.engine(status.state, &status.models);
                }
                changed = device.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let sample = device.borrow_and_update().clone();
                    metrics::device_memory(&sample);
                    for change in watcher.sample(sample.used_mb) {
                        self.tell(change);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(state: Residency) -> Vec<ModelState> {
        vec![ModelState { name: "m".to_owned(), state, ..ModelState::default() }]
    }

    #[test]
    fn a_load_and_a_release_are_told_with_the_samples_around_them() {
        use EngineRunState::{Down, Ready, Restarting};
        let mut watcher = Watcher::default();
        assert_eq!(watcher.sample(10), []);
        watcher.engine(Ready, &model(Residency::Available));
        watcher.engine(Ready, &model(Residency::Loading));
        assert_eq!(watcher.sample(60), [], "it goes on");
        watcher.engine(Ready, &model(Residency::Loaded));
        assert_eq!(watcher.sample(110), [Change { stage: Stage::Load, before_mb: 10, after_mb: 110 }]);
        assert_eq!(watcher.sample(120), [], "told once");
        watcher.engine(Restarting, &model(Residency::Available));
        assert_eq!(watcher.sample(20), [], "it comes back");
        watcher.engine(Ready, &model(Residency::Available));
        watcher.sample(130);
        watcher.engine(Down, &model(Residency::Available));
        assert_eq!(watcher.sample(0), [Change { stage: Stage::Release, before_mb: 130, after_mb: 0 }]);
    }

    #[test]
    fn a_load_that_dies_with_its_process_is_over_too() {
        let mut watcher = Watcher::default();
        watcher.sample(5);
        watcher.engine(EngineRunState::Ready, &model(Residency::Loading));
        watcher.engine(EngineRunState::Restarting, &model(Residency::Available));
        assert_eq!(watcher.sample(6), [Change { stage: Stage::Load, before_mb: 5, after_mb: 6 }]);
    }

    #[tokio::test]
    async fn the_last_change_of_a_stage_is_kept() {
        let (figures, device) = watch::channel(Device { used_mb: 7, ..Device::default() });
        let memory = Memory::new(device);
        let before = memory.used_mb();
        figures.send_replace(Device { used_mb: 9, ..Device::default() });
        let change = memory.ended(Stage::Transcribe, before);
        assert_eq!((change.before_mb, change.after_mb), (7, 9));
        assert_eq!(memory.last(Stage::Transcribe), Some(change));
        assert_eq!(memory.last(Stage::Load), None);
    }
}
