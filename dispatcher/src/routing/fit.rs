//! Whether a model fits on a device, by the figures of its heartbeat and by what was promised since.

use std::collections::HashMap;

use voxfleet_schema::{
    failure::FailureClass,
    fleet::{EngineName, Heartbeat, Residency},
    ladder,
    session::Policy,
};

use super::{Refusal, Request};

/// Whether decoding runs on a CPU: pinned to none, or fallen back from its GPU.
pub(crate) fn is_cpu(beat: &Heartbeat) -> bool {
    beat.device.index.is_none() || has_fallen(beat)
}

/// It has a GPU, and its engine runs on the CPU all the same. Of an engine that is not there now the worker says where it will
/// start: `none`, unless it is known to be the CPU.
pub(crate) fn has_fallen(beat: &Heartbeat) -> bool {
    beat.device.index.is_some() && beat.engine.effective_device == "cpu"
}

/// What a model's name says of its place on the ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Size {
    /// None: it says nothing, and nothing stands in.
    rung: Option<u8>,
    english: bool,
}

impl Size {
    pub fn of(model: &str) -> Self {
        Self { rung: ladder::rung(model).map(|rung| rung as u8), english: ladder::english_only(model) }
    }

    /// As [`ladder::may_stand_in`]: how many sizes smaller `other` is, if it may stand in for this one.
    fn replaced_by(self, other: Size) -> Option<usize> {
        let (asked, offered) = self.rung.zip(other.rung)?;
        let languages = self.english || !other.english;
        (offered > asked && languages).then(|| usize::from(offered - asked))
    }
}

/// Names of models as numbers: a decision compares a thousand of them.
#[derive(Debug, Default)]
pub(super) struct Names {
    numbers: HashMap<String, u32>,
    known: Vec<(String, Size)>,
}

impl Names {
    pub(super) fn number(&mut self, name: &str) -> u32 {
        if let Some(known) = self.numbers.get(name) {
            return *known;
        }
        let next = self.known.len() as u32;
        self.numbers.insert(name.to_owned(), next);
        self.known.push((name.to_owned(), Size::of(name)));
        next
    }

    pub(super) fn known(&self, name: &str) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    pub(super) fn name(&self, number: u32) -> &str {
        self.known.get(number as usize).map_or("", |(name, _)| name)
    }

    fn size(&self, number: u32) -> Option<Size> {
        self.known.get(number as usize).map(|(_, size)| *size)
    }
}

/// What a request says about models, looked up once for all workers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// None: whatever is the worker's default. Some(None): a name that no worker lists.
    model: Option<Option<u32>>,
    /// Of the model that is named.
    size: Option<Size>,
    /// Smaller ones may stand in.
    smaller: bool,
    /// The only engine that may run it.
    engine: Option<EngineName>,
}

impl Wanted {
    pub(super) fn of(request: &Request<'_>, names: &Names) -> Self {
        let options = request.options;
        let smaller = matches!(options.policy, Policy::AllowSmaller | Policy::AllowCpu | Policy::Unknown);
        let model = options.model.as_deref().map(|name| names.known(name));
        let size = options.model.as_deref().and_then(|name| match model.flatten() {
            Some(number) => names.size(number),
            None => Some(Size::of(name)),
        });
        Self { model, size, smaller, engine: request.engine }
    }

    /// How many sizes smaller a model is that may stand in for `asked`.
    fn takes(self, asked: Size, other: Size) -> Option<usize> {
        if self.smaller { asked.replaced_by(other) } else { None }
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
    /// The device had no memory for it when its worker tried.
    NoRoom,
    Fetching,
    Missing,
    Failed,
}

impl Standing {
    pub(super) fn refusal(self) -> Option<Refusal> {
        match self {
            Standing::Loaded | Standing::Promised | Standing::Fits => None,
            Standing::TooLarge => Some(Refusal::ModelTooLarge),
            Standing::NotNow => Some(Refusal::ModelDoesNotFitNow),
            Standing::NoRoom => Some(Refusal::ModelHasNoRoom),
            Standing::Fetching => Some(Refusal::ModelBeingFetched),
            Standing::Missing => Some(Refusal::ModelMissing),
            Standing::Failed => Some(Refusal::ModelFailed),
        }
    }

    /// Decided by the worker, whatever memory is free.
    fn is_settled(self) -> bool {
        !matches!(self, Standing::Fits | Standing::TooLarge | Standing::NotNow)
    }

    /// Its file is there, or comes.
    fn is_there(self) -> bool {
        !matches!(self, Standing::Missing | Standing::Failed)
    }
}

/// One model of one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Model {
    pub(super) number: u32,
    size: Size,
    pub(super) standing: Standing,
    pub(super) engine: Option<EngineName>,
    pub(super) expected_mb: u64,
    /// That figure was measured there.
    pub(super) measured: bool,
    /// Its memory is spoken for and not in use yet.
    spoken_for: bool,
}

/// The models of a worker, and which of them is its default: the one that it says, or, of an older worker, one that is loaded,
/// else the first of its list. None: it has no such model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Shelf {
    pub(super) models: Vec<Model>,
    default: Option<usize>,
}

impl Shelf {
    /// `promised`: whom this worker was given needs these; none = its default.
    pub(super) fn of(beat: &Heartbeat, promised: &[Option<&str>], names: &mut Names) -> Self {
        let default = match beat.default_model.as_deref() {
            Some(name) => beat.models.iter().position(|m| m.name == name),
            None => Some(beat.models.iter().position(|m| m.state == Residency::Loaded).unwrap_or(0)),
        };
        let models = beat.models.iter().enumerate().map(|(at, m)| {
            let wanted = || promised.iter().any(|p| p.map_or(default == Some(at), |name| name == m.name));
            let standing = match m.state {
                Residency::Loaded => Standing::Loaded,
                // What it has taken of its memory so far is not known.
                Residency::Loading => Standing::Promised,
                Residency::NoRoom => Standing::NoRoom,
                Residency::Fetching => Standing::Fetching,
                Residency::Missing => Standing::Missing,
                Residency::Failed => Standing::Failed,
                Residency::Available | Residency::Unknown if wanted() => Standing::Promised,
                Residency::Available | Residency::Unknown => Standing::NotNow,
            };
            let number = names.number(&m.name);
            Model {
                number,
                size: names.size(number).unwrap_or_else(|| Size::of(&m.name)),
                standing,
                engine: beat.engine_of(m),
                expected_mb: m.expected_mb,
                measured: m.measured,
                spoken_for: standing == Standing::Promised || (standing == Standing::Fetching && wanted()),
            }
        });
        Self { models: models.collect(), default }
    }

    /// Memory that is spoken for and not in use yet.
    pub(super) fn promised_mb(&self) -> u64 {
        self.models.iter().filter(|m| m.spoken_for).map(|m| m.expected_mb).sum()
    }

    /// Says of the models that nobody has spoken for whether they fit: into `plan_mb` at all, into `room_mb` now. None: the
    /// device reports no memory to plan with, and its worker has the last word. True: one fits that did not.
    pub(super) fn measure(&mut self, memory: Option<(u64, u64)>) -> bool {
        let mut more = false;
        for model in &mut self.models {
            if model.standing.is_settled() {
                continue;
            }
            let before = model.standing;
            model.standing = match memory {
                Some((plan_mb, _)) if model.expected_mb > plan_mb => Standing::TooLarge,
                Some((_, room_mb)) if model.expected_mb > room_mb => Standing::NotNow,
                _ => Standing::Fits,
            };
            more |= model.standing == Standing::Fits && before != Standing::Fits;
        }
        more
    }

    fn find(&self, number: u32) -> Option<&Model> {
        self.models.iter().find(|m| m.number == number)
    }

    /// The model that the request names, or the default.
    fn asked(&self, wanted: Wanted) -> Option<&Model> {
        match wanted.model {
            None => self.models.get(self.default?),
            Some(number) => self.find(number?),
        }
    }

    /// Which model the request allows can be run: the one asked for, else the largest that may stand in.
    pub(super) fn fit(&self, wanted: Wanted) -> Result<Fit, Refusal> {
        let asked = self.asked(wanted);
        if wanted.engine.is_some() && asked.is_some_and(|model| model.engine != wanted.engine) {
            return Err(Refusal::OtherEngine);
        }
        let refusal = match asked.map(|model| model.standing.refusal()) {
            Some(None) => {
                let warm = asked.is_some_and(|model| model.standing == Standing::Loaded);
                return Ok(Fit { warm, smaller: 0, stand_in: None });
            }
            Some(Some(refusal)) => refusal,
            None => Refusal::ModelNotHere,
        };
        let size = wanted.size.or(asked.map(|model| model.size)).ok_or(refusal)?;
        let usable = self.models.iter().filter(|m| m.standing.refusal().is_none());
        let may = usable.filter_map(|m| wanted.takes(size, m.size).map(|smaller| (smaller, m)));
        // Of one size that of the languages asked for, then the one with the most to it.
        let best = may.min_by_key(|(smaller, m)| {
            let other_languages = m.size.english != size.english;
            (*smaller, other_languages, std::cmp::Reverse(m.expected_mb), m.number)
        });
        let (smaller, model) = best.ok_or(refusal)?;
        let stand_in = Some(StandIn { model: model.number, asked: asked.map(|m| m.number), why: refusal });
        Ok(Fit { warm: model.standing == Standing::Loaded, smaller, stand_in })
    }

    /// Whether the model, or one that may stand in for it, is there at all.
    pub(super) fn lists_any(&self, wanted: Wanted) -> bool {
        let asked = self.asked(wanted);
        let size = wanted.size.or(asked.map(|m| m.size));
        let stands_in = |m: &&Model| size.is_some_and(|size| wanted.takes(size, m.size).is_some());
        asked.into_iter().chain(self.models.iter().filter(stands_in)).any(|m| m.standing.is_there())
    }
}

/// A smaller model that runs in place of the one asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StandIn {
    pub(super) model: u32,
    /// None: one that the worker does not list.
    pub(super) asked: Option<u32>,
    /// What speaks against the one asked for.
    pub(super) why: Refusal,
}

impl StandIn {
    pub(super) fn class(self) -> FailureClass {
        match self.why {
            Refusal::ModelHasNoRoom => FailureClass::OutOfMemory,
            Refusal::ModelTooLarge | Refusal::ModelDoesNotFitNow => FailureClass::ModelDoesNotFit,
            _ => FailureClass::ModelMissing,
        }
    }
}

/// What a device would run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fit {
    /// Loaded already.
    pub(super) warm: bool,
    /// How many sizes smaller than asked for.
    pub(super) smaller: usize,
    pub(super) stand_in: Option<StandIn>,
}
