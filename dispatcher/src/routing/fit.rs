//! Whether a model fits on a device, by the figures of its heartbeat and by what was promised since.

use std::collections::HashMap;

use voxfleet_schema::{
    fleet::{EngineRunState, Heartbeat, Residency},
    session::{Policy, SessionOptions},
};

use super::Refusal;

/// Sizes that stand in for each other, largest first.
pub const LADDER: [&str; 5] = ["large-v3-turbo", "medium", "small", "base", "tiny"];

/// Whether decoding runs on a CPU: pinned to none, or fallen back from its GPU.
pub(super) fn is_cpu(beat: &Heartbeat) -> bool {
    beat.device.index.is_none() || (beat.engine.state == EngineRunState::Ready && beat.engine.effective_device == "cpu")
}

/// Names of models as numbers: a decision compares a thousand of them.
#[derive(Debug)]
pub(super) struct Names(HashMap<String, u32>);

impl Default for Names {
    /// The sizes of the ladder come first, so that their numbers are their places.
    fn default() -> Self {
        Self(LADDER.iter().zip(0..).map(|(name, number)| ((*name).to_owned(), number)).collect())
    }
}

impl Names {
    pub(super) fn number(&mut self, name: &str) -> u32 {
        if let Some(known) = self.0.get(name) {
            return *known;
        }
        let next = self.0.len() as u32;
        self.0.insert(name.to_owned(), next);
        next
    }

    pub(super) fn known(&self, name: &str) -> Option<u32> {
        self.0.get(name).copied()
    }
}

/// What a request says about models, looked up once for all workers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// None: whatever is the worker's default. Some(None): a name that no worker lists.
    model: Option<Option<u32>>,
    /// Place on the ladder from which smaller ones may stand in.
    below: usize,
}

impl Wanted {
    pub(super) fn of(options: &SessionOptions, names: &Names) -> Self {
        let model = options.model.as_deref();
        let may = matches!(options.policy, Policy::AllowSmaller | Policy::AllowCpu | Policy::Unknown);
        let rung = model.filter(|_| may).and_then(|model| LADDER.iter().position(|name| *name == model));
        Self { model: model.map(|name| names.known(name)), below: rung.map_or(LADDER.len(), |rung| rung + 1) }
    }

    fn smaller(self) -> std::ops::Range<u32> {
        self.below as u32..LADDER.len() as u32
    }
}

/// How a model stands on one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Loaded,
    /// Somebody was given to this worker who needs it: its memory is spoken for, once.
    Promised,
    Fits,
    TooLarge,
    NotNow,
}

/// One model of one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Model {
    pub(super) number: u32,
    pub(super) standing: Standing,
    pub(super) expected_mb: u64,
}

/// Models that can be run, and which of them is the worker's default: one that is loaded, else the first of its list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Shelf {
    pub(super) models: Vec<Model>,
    default: usize,
}

impl Shelf {
    /// `promised`: whom this worker was given needs these; none = its default.
    pub(super) fn of(beat: &Heartbeat, promised: &[Option<&str>], names: &mut Names) -> Self {
        let usable = || beat.models.iter().filter(|m| m.state != Residency::Failed);
        let default = usable().position(|m| m.state == Residency::Loaded).unwrap_or(0);
        let models = usable().enumerate().map(|(at, m)| {
            let spoken_for = || promised.iter().any(|p| p.map_or(at == default, |name| name == m.name));
            let standing = match m.state {
                Residency::Loaded => Standing::Loaded,
                // What it has taken of its memory so far is not known.
                Residency::Loading => Standing::Promised,
                _ if spoken_for() => Standing::Promised,
                _ => Standing::NotNow,
            };
            Model { number: names.number(&m.name), standing, expected_mb: m.expected_mb }
        });
        Self { models: models.collect(), default }
    }

    /// Memory that is spoken for and not in use yet.
    pub(super) fn promised_mb(&self) -> u64 {
        self.models.iter().filter(|m| m.standing == Standing::Promised).map(|m| m.expected_mb).sum()
    }

    /// Says of the models that nobody has spoken for whether they fit: into `plan_mb` at all, into `room_mb` now. None: the
    /// device reports no memory to plan with, and its worker has the last word.
    pub(super) fn measure(&mut self, memory: Option<(u64, u64)>) {
        for model in &mut self.models {
            if matches!(model.standing, Standing::Loaded | Standing::Promised) {
                continue;
            }
            model.standing = match memory {
                Some((plan_mb, _)) if model.expected_mb > plan_mb => Standing::TooLarge,
                Some((_, room_mb)) if model.expected_mb > room_mb => Standing::NotNow,
                _ => Standing::Fits,
            };
        }
    }

    fn find(&self, number: u32) -> Result<Standing, Refusal> {
        self.models.iter().find(|m| m.number == number).map_or(Err(Refusal::ModelNotHere), |m| usable(m.standing))
    }

    /// Which model the request allows can be run.
    pub(super) fn fit(&self, wanted: Wanted) -> Result<Fit, Refusal> {
        let as_asked = |standing| Fit { warm: standing == Standing::Loaded, smaller: 0, stand_in: None };
        let Some(model) = wanted.model else {
            let default = self.models.get(self.default).ok_or(Refusal::ModelNotHere)?;
            return usable(default.standing).map(as_asked);
        };
        model.map_or(Err(Refusal::ModelNotHere), |number| self.find(number)).map(as_asked).or_else(|refusal| {
            let mut rungs = wanted.smaller();
            let found = rungs.find_map(|rung| self.find(rung).ok().map(|standing| (rung, standing)));
            let (rung, standing) = found.ok_or(refusal)?;
            let smaller = rung as usize - wanted.below + 1;
            Ok(Fit { warm: standing == Standing::Loaded, smaller, stand_in: Some(rung as usize) })
        })
    }

    /// Whether the model, or one that may stand in for it, is there at all.
    pub(super) fn lists_any(&self, wanted: Wanted) -> bool {
        let lists = |number| self.models.iter().any(|m| m.number == number);
        wanted.model.is_none_or(|model| model.is_some_and(lists)) || wanted.smaller().any(lists)
    }
}

fn usable(standing: Standing) -> Result<Standing, Refusal> {
    match standing {
        Standing::Loaded | Standing::Promised | Standing::Fits => Ok(standing),
        Standing::TooLarge => Err(Refusal::ModelTooLarge),
        Standing::NotNow => Err(Refusal::ModelDoesNotFitNow),
    }
}

/// What a device would run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fit {
    /// Loaded already.
    pub(super) warm: bool,
    /// How many sizes smaller than asked for.
    pub(super) smaller: usize,
    /// Place on the ladder of what stands in for the model asked for.
    pub(super) stand_in: Option<usize>,
}
