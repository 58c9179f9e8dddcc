//! What each stage of the work does to the device's memory: in the log, as metrics, and in the result of a job.
//!
//! Figures are those of the device's sampler, one each second: what is given as before is the last sample until then, what is
//! given as after the first one behind it. The watching is pure; [`Memory::run`] feeds it.
//!
//! A job's own are those that began after it did: what was loaded for somebody before it is no stage of it. The release of the
//! engine comes after the result, so no result tells it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tokio::{sync::watch, time::Instant};
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
    /// Since a load began: when, and what was in use.
    loading: Option<(Instant, u64)>,
    /// Over, and waiting for the first sample behind them: when they began, and what was in use.
    over: Vec<(Stage, Instant, u64)>,
}

impl Watcher {
    fn engine(&mut self, now: Instant, state: EngineRunState, models: &[ModelState]) {
        let loads = models.iter().any(|model| model.state == Residency::Loading);
        match (self.loading, loads) {
            (None, true) => self.loading = Some((now, self.used_mb)),
            (Some((began, before)), false) => {
                self.loading = None;
                self.over.push((Stage::Load, began, before));
            }
            _ => {}
        }
        let runs = !matches!(state, EngineRunState::Down | EngineRunState::Failed);
        if self.running && !runs {
            self.over.push((Stage::Release, now, self.used_mb));
        }
        self.running = runs;
    }

    /// Changes that are known now, with their beginnings.
    fn sample(&mut self, used_mb: u64) -> Vec<(Instant, Change)> {
        self.used_mb = used_mb;
        let known = |(stage, began, before_mb)| (began, Change { stage, before_mb, after_mb: used_mb });
        self.over.drain(..).map(known).collect()
    }
}

/// The last change of each stage, and the figures now. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    device: watch::Receiver<Device>,
    last: Arc<Mutex<BTreeMap<Stage, (Instant, Change)>>>,
}

impl Memory {
    pub(crate) fn new(device: watch::Receiver<Device>) -> Self {
        Self { device, last: Arc::default() }
    }

    /// In use by this worker at the last sample, in MB.
    pub(crate) fn used_mb(&self) -> u64 {
        self.device.borrow().used_mb
    }

    /// A stage that the caller watches itself since `began` is over.
    pub(crate) fn ended(&self, stage: Stage, began: Instant, before_mb: u64) -> Change {
        let change = Change { stage, before_mb, after_mb: self.used_mb() };
        self.tell(began, change);
        change
    }

    /// The last time there was such a stage, if it began after `since`.
    pub(crate) fn last(&self, stage: Stage, since: Instant) -> Option<Change> {
        locked(&self.last).get(&stage).filter(|(began, _)| *began >= since).map(|(_, change)| *change)
    }

    fn tell(&self, began: Instant, change: Change) {
        let Change { stage, before_mb, after_mb } = change;
        tracing::info!(stage = stage.as_str(), before_mb, after_mb, "memory of a stage");
        metrics::stage_memory(change);
        locked(&self.last).insert(stage, (began, change));
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
                    watcher.engine(Instant::now(), status.state, &status.models);
                }
                changed = device.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let sample = device.borrow_and_update().clone();
                    metrics::device_memory(&sample);
                    for (began, change) in watcher.sample(sample.used_mb) {
                        self.tell(began, change);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn model(state: Residency) -> Vec<ModelState> {
        vec![ModelState { name: "m".to_owned(), state, ..ModelState::default() }]
    }

    #[test]
    fn a_load_and_a_release_are_told_with_the_samples_around_them() {
        use EngineRunState::{Down, Ready, Restarting};
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut watcher = Watcher::default();
        assert_eq!(watcher.sample(10), []);
        watcher.engine(at(1), Ready, &model(Residency::Available));
        watcher.engine(at(2), Ready, &model(Residency::Loading));
        assert_eq!(watcher.sample(60), [], "it goes on");
        watcher.engine(at(3), Ready, &model(Residency::Loaded));
        assert_eq!(watcher.sample(110), [(at(2), Change { stage: Stage::Load, before_mb: 10, after_mb: 110 })]);
        assert_eq!(watcher.sample(120), [], "told once");
        watcher.engine(at(4), Restarting, &model(Residency::Available));
        assert_eq!(watcher.sample(20), [], "it comes back");
        watcher.engine(at(5), Ready, &model(Residency::Available));
        watcher.sample(130);
        watcher.engine(at(6), Down, &model(Residency::Available));
        assert_eq!(watcher.sample(0), [(at(6), Change { stage: Stage::Release, before_mb: 130, after_mb: 0 })]);
    }

    #[test]
    fn a_load_that_dies_with_its_process_is_over_too() {
        let mut watcher = Watcher::default();
        let now = Instant::now();
        watcher.sample(5);
        watcher.engine(now, EngineRunState::Ready, &model(Residency::Loading));
        watcher.engine(now, EngineRunState::Restarting, &model(Residency::Available));
        assert_eq!(watcher.sample(6), [(now, Change { stage: Stage::Load, before_mb: 5, after_mb: 6 })]);
    }

    #[tokio::test]
    async fn the_last_change_of_a_stage_is_kept_for_those_who_came_before_it() {
        let (figures, device) = watch::channel(Device { used_mb: 7, ..Device::default() });
        let memory = Memory::new(device);
        let (before, began) = (memory.used_mb(), Instant::now());
        figures.send_replace(Device { used_mb: 9, ..Device::default() });
        let change = memory.ended(Stage::Transcribe, began, before);
        assert_eq!((change.before_mb, change.after_mb), (7, 9));
        assert_eq!(memory.last(Stage::Transcribe, began), Some(change));
        assert_eq!(memory.last(Stage::Transcribe, began + Duration::from_millis(1)), None, "somebody else's");
        assert_eq!(memory.last(Stage::Load, began), None);
    }
}
