//! How a worker is, and what of that is news.

use std::{collections::VecDeque, time::Duration};

use voxfleet_schema::{
    device::DeviceTrouble,
    event::What,
    failure::FailureClass,
    fleet::{EngineRunState, WorkerHealth},
};

use super::Worker;
use crate::{config::DispatcherConfig, routing::is_cpu};

/// An engine that dies this often ...
const CRASHES: usize = 3;
/// ... within this time is not fit for new work: whatever kills it is not over.
const CRASHES_WITHIN: Duration = Duration::from_secs(60);

/// When an engine last died, as its heartbeats count it.
#[derive(Debug, Default)]
pub(super) struct Crashes {
    counted: u32,
    /// The last few.
    at: VecDeque<Duration>,
}

impl Crashes {
    /// What happened before the first heartbeat was heard is not known to be recent.
    pub(super) fn before(counted: u32) -> Self {
        Self { counted, at: VecDeque::new() }
    }

    /// `count` falls as old deaths leave the worker's own window; only growth is news.
    pub(super) fn heard(&mut self, count: u32, now: Duration) {
        for _ in 0..count.saturating_sub(self.counted).min(CRASHES as u32) {
            self.at.push_back(now);
        }
        while self.at.len() > CRASHES {
            self.at.pop_front();
        }
        self.counted = count;
    }

    fn too_many(&self, now: Duration) -> bool {
        self.at.len() == CRASHES && self.at.front().is_some_and(|first| now.saturating_sub(*first) < CRASHES_WITHIN)
    }
}

/// What silence of a worker means: by the configuration, but never less than what that many of its own beats take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    pub suspect_after: Duration,
    pub dead_after: Duration,
}

impl Patience {
    /// One beat late and a half, and three that are missing.
    pub(super) fn with(beat_ms: u32, config: &DispatcherConfig) -> Self {
        let beat = Duration::from_millis(beat_ms.into());
        Self {
            suspect_after: Duration::from_millis(config.suspect_after_ms).max(beat * 3 / 2),
            dead_after: Duration::from_millis(config.dead_after_ms).max(beat * 3),
        }
    }
}

impl Worker {
    pub fn patience(&self, config: &DispatcherConfig) -> Patience {
        Patience::with(self.heartbeat.beat_ms, config)
    }

    pub fn health(&self, now: Duration, config: &DispatcherConfig) -> WorkerHealth {
        if self.silent(now) >= self.patience(config).suspect_after && !self.has_left() {
            // Dead is a verdict, not a reading: until it is written, a silent worker is suspect however long.
            WorkerHealth::Suspect
        } else if !self.ready {
            WorkerHealth::Joining
        } else if self.heartbeat.draining || self.drain_until_ms.is_some() {
            WorkerHealth::Draining
        } else if self.sick(now, config).is_some() {
            WorkerHealth::Unhealthy
        } else {
            WorkerHealth::Alive
        }
    }

    /// The last it said is that it drains and has nothing left, and nothing is on its way to it: its silence is no surprise.
    pub fn has_left(&self) -> bool {
        let done = self.heartbeat.held.is_empty() && self.load.used() == 0 && self.jobs.used() == 0;
        self.heartbeat.draining && done
    }

    pub fn silent(&self, now: Duration) -> Duration {
        now.saturating_sub(self.heard)
    }

    /// What speaks against its device; nothing where it runs on the CPU in its place.
    fn broken_device(&self) -> Option<&DeviceTrouble> {
        use FailureClass::{DeviceLost, DriverMismatch, MissingLibrary};
        let trouble = self.heartbeat.device.trouble.as_ref()?;
        let broken = matches!(trouble.class, DeviceLost | DriverMismatch | MissingLibrary);
        (broken && !is_cpu(&self.heartbeat)).then_some(trouble)
    }

    /// What is wrong with its device or its engine.
    fn sick(&self, now: Duration, config: &DispatcherConfig) -> Option<String> {
        let engine = &self.heartbeat.engine;
        if let Some(trouble) = self.broken_device() {
            Some(format!("{}: {}", trouble.class, trouble.message))
        } else if engine.state == EngineRunState::Failed {
            Some("its engine cannot be started".to_owned())
        } else if engine.ms_since_progress >= config.stuck_after_ms {
            Some(format!("its engine has stood still for {} ms", engine.ms_since_progress))
        } else if self.crashes.too_many(now) {
            Some(format!("its engine died {CRASHES} times within {} s", CRASHES_WITHIN.as_secs()))
        } else {
            None
        }
    }

    /// What its health has come to since it was last told, with a reason; each change is told once.
    pub(super) fn news(&mut self, now: Duration, config: &DispatcherConfig) -> Option<(What, String)> {
        let health = self.health(now, config);
        let before = std::mem::replace(&mut self.told, health);
        let what = transition(before, health)?;
        if what == What::Draining && std::mem::replace(&mut self.told_draining, true) {
            return None;
        }
        let why = match what {
            What::Suspect => format!("silent for {} ms", self.silent(now).as_millis()),
            What::Unhealthy => self.sick(now, config).unwrap_or_default(),
            What::Draining => match &self.heartbeat.drain {
                Some(notice) => notice.why.clone(),
                None => "asked".to_owned(),
            },
            _ => "it beats and its engine moves".to_owned(),
        };
        Some((what, why))
    }
}

/// What a change of health is called; none where another event tells it.
fn transition(before: WorkerHealth, after: WorkerHealth) -> Option<What> {
    use WorkerHealth::{Alive, Draining, Suspect, Unhealthy};
    match (before, after) {
        (a, b) if a == b => None,
        (_, Suspect) => Some(What::Suspect),
        (_, Unhealthy) => Some(What::Unhealthy),
        (_, Draining) => Some(What::Draining),
        (Suspect | Unhealthy, Alive) => Some(What::Recovered),
        _ => None,
    }
}
