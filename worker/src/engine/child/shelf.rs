//! The models of an engine: what is there, what is being loaded, and what they take.

use std::time::{Duration, Instant};

use voxfleet_schema::{
    failure::Failure,
    fleet::{ModelState, Residency},
};

use super::desk::{Desk, Said};
use crate::{
    engine::{
        EngineError, ct2,
        pool::{Loaded, Model, expected_mb},
    },
    ipc::{EngineConfig, FromEngine, ModelFile},
};

/// A load that takes longer than this is no longer a sign of life.
const LONGEST_LOAD: Duration = Duration::from_secs(120);

pub(super) struct Shelved {
    file: ModelFile,
    pub(super) state: Residency,
    pub(super) model: Option<Model>,
    pub(super) resident_mb: u64,
    expected_mb: u64,
    /// Why it is not there.
    failure: Option<Failure>,
    /// Asked for, and neither there nor failed yet.
    loading_since: Option<Instant>,
}

pub(super) fn shelve(config: &EngineConfig, file: &ModelFile) -> Shelved {
    let (state, expected_mb, failure) = match expected_mb(config, file) {
        // It may still come: it is looked at again when somebody wants it.
        Err(error) if config.engine.is_real() && !file.path.exists() => {
            (Residency::Missing, 0, Some(failure_of(&error)))
        }
        Ok(mb) => (Residency::Available, mb, None),
        Err(error) => {
            tracing::warn!(model = %file.name, %error, "model file is not usable");
            (Residency::Failed, 0, Some(failure_of(&error)))
        }
    };
    Shelved { file: file.clone(), state, model: None, resident_mb: 0, expected_mb, failure, loading_since: None }
}

fn failure_of(error: &EngineError) -> Failure {
    Failure::new(error.class(), error.to_string())
}

/// Whether a load since then is a sign of life. One that makes a model folder takes as long as the disk needs, and `grew`.
fn load_moves(now: Instant, since: Instant, grew: Option<Instant>) -> bool {
    let moved = grew.map_or(since, |grew| grew.max(since));
    now.saturating_duration_since(moved) < LONGEST_LOAD
}

impl Desk {
    /// Whether any model is being loaded.
    pub(super) fn loading(&self) -> bool {
        self.models.values().any(|m| m.loading_since.is_some())
    }

    /// Whether one is that has not taken too long for a sign of life.
    pub(super) fn loads(&self, now: Instant) -> bool {
        self.models.values().any(|m| m.loading_since.is_some_and(|since| load_moves(now, since, ct2::folder::grew())))
    }

    pub(super) fn say_models(&mut self) -> Said {
        let states = self.models.values().map(|m| ModelState {
            name: m.file.name.clone(),
            engine: self.config.engine.told_of(&m.file),
            state: m.state,
            resident_mb: m.resident_mb,
            expected_mb: m.expected_mb,
            failure: m.failure.clone(),
            ..ModelState::default()
        });
        let states = states.collect();
        self.say(&FromEngine::Models(states))
    }

    /// Has a model loaded, once at a time; one that failed is tried again.
    pub(super) fn want(&mut self, name: &str) -> Result<(), EngineError> {
        let Some(shelved) = self.models.get_mut(name) else {
            let why = "not among the models of this worker".to_owned();
            return Err(EngineError::Model { name: name.to_owned(), why });
        };
        if shelved.model.is_some() || shelved.loading_since.is_some() {
            return Ok(());
        }
        if shelved.state == Residency::Missing {
            *shelved = shelve(&self.config, &shelved.file);
        }
        if !self.pool.load(&shelved.file) {
            let why = "the loader does not answer".to_owned();
            return Err(EngineError::Model { name: name.to_owned(), why });
        }
        (shelved.state, shelved.failure) = (Residency::Loading, None);
        shelved.loading_since = Some(Instant::now());
        Ok(())
    }

    /// Gives a model's memory back, unless somebody here uses it.
    pub(super) fn unload(&mut self, name: &str) -> Said {
        let used = self.sessions.values().any(|session| session.model == name);
        let Some(shelved) = self.models.get_mut(name).filter(|shelved| shelved.model.is_some() && !used) else {
            tracing::debug!(model = name, used, "not released");
            return Ok(());
        };
        (shelved.model, shelved.resident_mb, shelved.state) = (None, 0, Residency::Available);
        self.pool.forget(name);
        self.say_models()
    }

    pub(super) fn loaded(&mut self, loaded: Loaded) -> Said {
        let Loaded { name, model, resident_mb, took } = loaded;
        let Some(shelved) = self.models.get_mut(&name) else {
            return Ok(());
        };
        shelved.loading_since = None;
        match model {
            Ok(model) => {
                let took_ms = took.as_millis() as u64;
                (shelved.state, shelved.resident_mb, shelved.model) = (Residency::Loaded, resident_mb, Some(model));
                self.say(&FromEngine::Loaded { model: name, took_ms, resident_mb })?;
                self.say_models()
            }
            Err(error) => {
                tracing::error!(model = %name, %error, "model not loaded");
                let no_room = matches!(error, EngineError::OutOfMemory(_));
                shelved.state = if no_room { Residency::NoRoom } else { Residency::Failed };
                shelved.failure = Some(failure_of(&error));
                let waiting: Vec<u64> =
                    self.sessions.iter().filter(|(_, s)| s.model == name).map(|(handle, _)| *handle).collect();
                self.say_models()?;
                waiting.into_iter().try_for_each(|handle| self.fail(handle, &error))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_that_moves_is_given_its_time() {
        let begin = Instant::now();
        let at = |s| begin + Duration::from_secs(s);
        for (now, grew, moves) in
            [(119, None, true), (120, None, false), (120, Some(1), true), (200, Some(81), true), (200, Some(80), false)]
        {
            assert_eq!(load_moves(at(now), begin, grew.map(at)), moves, "after {now} s, grew at {grew:?}");
        }
        assert!(!load_moves(at(500), at(300), Some(at(20))), "an earlier load's folder says nothing");
    }
}
