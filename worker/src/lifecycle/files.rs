//! What is told of the models while no child runs: what the last one found out about their files, as long as that can be so.
//!
//! A file that cannot be used is not offered again because the engine was released. It is when it has changed, or after a
//! time: not every failed load is the file's fault.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, SystemTime},
};

use tokio::{task::JoinSet, time::Instant};
use voxfleet_schema::fleet::{ModelState, Residency};

use super::{Engine, load::Source};
use crate::{capacity::locked, engine::pool::expected_mb};

/// A file that has not changed is taken for unusable for so long.
const BELIEVED: Duration = Duration::from_secs(600);

/// A file's length and time; none: it is not there.
type Stamp = Option<(u64, SystemTime)>;

/// By model, what its file was when it could not be used, and since when that is known.
#[derive(Debug, Default)]
pub(super) struct Files(BTreeMap<String, (Stamp, Instant)>);

fn is_unusable(model: &ModelState) -> bool {
    matches!(model.state, Residency::Failed | Residency::Missing)
}

impl Files {
    /// A child says what it has.
    pub(super) fn heard(&mut self, now: Instant, models: &[ModelState], stamp: impl Fn(&str) -> Stamp) {
        for model in models {
            if !is_unusable(model) {
                self.0.remove(&model.name);
                continue;
            }
            let stamp = stamp(&model.name);
            let known = self.0.entry(model.name.clone()).or_insert((stamp, now));
            if known.0 != stamp {
                *known = (stamp, now);
            }
        }
    }

    /// The same models without a child. Figures that were read stay.
    pub(super) fn at_rest(&mut self, now: Instant, models: &mut [ModelState], stamp: impl Fn(&str) -> Stamp) {
        for model in models {
            let known = self.0.get(&model.name).filter(|_| is_unusable(model));
            let stays = known.is_some_and(|(was, since)| {
                *was == stamp(&model.name) && (was.is_none() || now.saturating_duration_since(*since) < BELIEVED)
            });
            model.resident_mb = 0;
            if !stays {
                self.0.remove(&model.name);
                (model.state, model.failure) = (Residency::Available, None);
            }
            if model.expected_mb == 0 {
                // Weights are most of what a model takes.
                model.expected_mb = stamp(&model.name).map_or(0, |(bytes, _)| bytes.div_ceil(1 << 20));
            }
        }
    }
}

impl Engine {
    fn path_of(&self, model: &str) -> Option<&Path> {
        self.0.config.models.iter().find(|file| file.name == model).map(|file| file.path.as_path())
    }

    /// What a child reads to load it.
    pub(super) fn source_of(&self, model: &str) -> Option<Source> {
        Source::of(self.path_of(model)?)
    }

    fn stamp(&self, model: &str) -> Stamp {
        let metadata = std::fs::metadata(self.path_of(model)?).ok()?;
        Some((metadata.len(), metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH)))
    }

    /// A child says what it has.
    pub(super) fn files_are(&self, models: &[ModelState]) {
        locked(&self.0.files).heard(Instant::now(), models, |model| self.stamp(model));
    }

    /// What is left of them without it.
    pub(super) fn rest_models(&self, models: &mut [ModelState]) {
        locked(&self.0.files).at_rest(Instant::now(), models, |model| self.stamp(model));
    }

    /// Looks whether what could not be used may be offered again. While no child runs.
    pub(super) fn look_at_files(&self) {
        if self.0.status.borrow().models.iter().any(is_unusable) {
            self.0.status.send_if_modified(|status| {
                let before = status.models.clone();
                self.rest_models(&mut status.models);
                status.models != before
            });
        }
    }

    /// Reads in the files' headers what each model takes; see [`Engine::headers_say`].
    pub(super) fn read_headers(&self) -> JoinSet<Vec<(String, u64)>> {
        let (config, mut reading) = (self.0.config.clone(), JoinSet::new());
        reading.spawn_blocking(move || {
            let found =
                config.models.iter().filter_map(|file| Some((file.name.clone(), expected_mb(&config, file).ok()?)));
            found.collect()
        });
        reading
    }

    /// In place of the size of the file, before a child has said it.
    pub(super) fn headers_say(&self, found: &[(String, u64)]) {
        self.0.status.send_modify(|status| {
            for model in &mut status.models {
                if let Some((_, mb)) = found.iter().find(|(name, _)| *name == model.name) {
                    model.expected_mb = *mb;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(state: Residency) -> ModelState {
        ModelState { name: "m".to_owned(), state, resident_mb: 700, expected_mb: 900, ..ModelState::default() }
    }

    #[test]
    fn what_the_child_found_out_outlives_it_until_the_file_changes() {
        use Residency::*;
        let now = Instant::now();
        let old = Some((5 << 20, SystemTime::UNIX_EPOCH));
        let new = Some((6 << 20, SystemTime::UNIX_EPOCH));
        for (said, was, is, later_s, told) in [
            (Failed, old, old, 0, Failed),
            (Failed, old, old, 599, Failed),
            (Failed, old, old, 600, Available),
            (Failed, old, new, 0, Available),
            (Missing, None, None, 100_000, Missing),
            (Missing, None, new, 0, Available),
            (Loaded, old, old, 0, Available),
            (Loading, old, old, 0, Available),
            (NoRoom, old, old, 0, Available),
        ] {
            let mut files = Files::default();
            files.heard(now, &[model(said)], |_| was);
            files.heard(now + Duration::from_secs(300), &[model(said)], |_| was);
            let mut models = [model(said)];
            files.at_rest(now + Duration::from_secs(later_s), &mut models, |_| is);
            let [model] = models;
            assert_eq!((model.state, model.resident_mb), (told, 0), "{said:?} {was:?} {is:?} {later_s}");
            assert_eq!(model.expected_mb, 900, "as it was read");
        }
    }

    #[test]
    fn without_a_figure_the_file_s_size_is_one() {
        let mut models = [ModelState { expected_mb: 0, ..model(Residency::Unknown) }];
        Files::default().at_rest(Instant::now(), &mut models, |_| Some(((5 << 20) + 1, SystemTime::UNIX_EPOCH)));
        assert_eq!((models[0].state, models[0].expected_mb), (Residency::Available, 6));
    }
}
