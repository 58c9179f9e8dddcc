//! Which models and how many sessions a card can hold. Pure.
//!
//! Weights lie on a card once for each model, a small pool of decode states serves all sessions, and a session costs
//! buffers (in the memory of the host where the device is a GPU), not a state. So memory alone never says how many
//! sessions a GPU can serve: its speed does, once measured.
//!
//! Two lines cut a card. Up to the first (90 %) a plan is safe: the dispatcher leaves a tenth of each card free when it
//! places work, and a service's limit is 90 % unless its operator says otherwise. Up to the second (95 %) it is tight: the
//! worker still loads, for it keeps 5 % for what drivers and allocators take, but no new work would be placed there once
//! a neighbour grows. Beyond that it is refused. Both follow the settings that they come from.

pub mod fleet;
mod size;

use std::cmp::Reverse;

use serde::Serialize;
use voxfleet_schema::{
    ladder,
    plan::{PlanOption, Risk},
};

pub use self::size::{GpuSpec, Size, SizeError, Tenant};

/// What the dispatcher's `reserve_percent` and a service's limit leave by default.
pub const SAFE_PERCENT: u8 = 90;
/// What the worker's `memory_reserve_percent` leaves by default.
pub const MOST_PERCENT: u8 = 95;

/// A device as a plan sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Card {
    pub name: String,
    pub total_mb: u64,
    pub tenants: Vec<Tenant>,
    /// Up to this share of the card a plan is safe.
    pub safe_percent: u8,
    /// Beyond this share nothing is loaded.
    pub most_percent: u8,
    /// Memory for the buffers of sessions; none where that is the card's own, or nobody can tell.
    pub host_mb: Option<u64>,
}

impl Card {
    pub fn tenants_mb(&self) -> u64 {
        self.tenants.iter().fold(0, |sum, t| sum.saturating_add(t.mb))
    }

    pub fn safe_mb(&self) -> u64 {
        share(self.total_mb, self.safe_percent.min(self.most_percent))
    }

    pub fn most_mb(&self) -> u64 {
        share(self.total_mb, self.most_percent)
    }

    /// `in_use_mb`: by everybody.
    fn risk(&self, in_use_mb: u64) -> Risk {
        match in_use_mb {
            mb if mb <= self.safe_mb() => Risk::Safe,
            mb if mb <= self.most_mb() => Risk::Tight,
            _ => Risk::Refuse,
        }
    }
}

fn share(total_mb: u64, percent: u8) -> u64 {
    total_mb.saturating_mul(u64::from(percent)) / 100
}

/// A fraction with four digits.
fn fraction(part_mb: u64, total_mb: u64) -> f64 {
    (part_mb as f64 / total_mb.max(1) as f64 * 1e4).round() / 1e4
}

/// Where a figure comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// On this device, with this file and this version.
    Measured,
    /// Published, as the catalog has it.
    Catalog,
}

impl Origin {
    pub fn as_str(self) -> &'static str {
        match self {
            Origin::Measured => "measured",
            Origin::Catalog => "catalog",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Figure {
    pub mb: u64,
    pub from: Origin,
}

impl Figure {
    /// What was measured, else what is published.
    pub fn choose(measured: Option<u64>, catalog: u64) -> Self {
        match measured {
            Some(mb) => Self { mb, from: Origin::Measured },
            None => Self { mb: catalog, from: Origin::Catalog },
        }
    }
}

/// What a model needs of the device's memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Needs {
    #[serde(skip)]
    pub model: String,
    /// What the runtime takes before any model: a CUDA context; nothing on a CPU.
    pub context: Figure,
    pub weights: Figure,
    /// Of one decode state.
    pub state: Figure,
    /// Of one session.
    pub session: Figure,
    /// Seconds of live audio that the whole pool gets through in a second, partials included; none until measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_factor: Option<f64>,
}

impl Needs {
    fn used_mb(&self, states: u64, sessions: u64) -> u64 {
        let pool = states.saturating_mul(self.state.mb);
        let buffers = sessions.saturating_mul(self.session.mb);
        [self.weights.mb, pool, buffers].iter().fold(self.context.mb, |sum, mb| sum.saturating_add(*mb))
    }
}

/// What is wished for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    pub sessions: u64,
    /// Decode states at most; fewer where that many do not fit.
    pub states: u64,
    /// What a session takes of the host's memory beside a GPU.
    pub host_session_mb: u64,
}

/// What keeps an option from holding more sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Nothing known; no more were asked for.
    Asked,
    DecodeSpeed,
    HostMemory,
    DeviceMemory,
}

/// What a plan says of an option, beside its risk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stance {
    /// The best model that is safe and holds all the sessions.
    Recommended,
    /// Tight: for those who know their neighbours.
    Aggressive,
    /// Safe, and leaves more than it has to.
    Conservative,
}

impl Stance {
    pub fn as_str(self) -> &'static str {
        match self {
            Stance::Recommended => "recommended",
            Stance::Aggressive => "aggressive",
            Stance::Conservative => "conservative",
        }
    }
}

/// An option and what it is made of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Planned {
    #[serde(flatten)]
    pub option: PlanOption,
    pub states: u64,
    /// Of the card, beside this option and all tenants.
    pub headroom_mb: u64,
    /// None where it is refused.
    pub stance: Option<Stance>,
    pub bound: Bound,
    pub figures: Needs,
}

/// One option for each model: the recommended one, then the others by the quality of their models, refused ones last.
pub fn plan(card: &Card, models: &[Needs], wish: Wish) -> Vec<Planned> {
    let mut options: Vec<Planned> = models.iter().map(|model| option(card, model, wish)).collect();
    options.sort_by(|a, b| quality(&a.figures).cmp(&quality(&b.figures)));
    let wished = wish.sessions.max(1);
    let fine = |o: &&mut Planned| o.option.risk == Risk::Safe && o.option.sessions == wished;
    if let Some(best) = options.iter_mut().find(fine) {
        best.stance = Some(Stance::Recommended);
    }
    options.sort_by_key(|o| (o.stance != Some(Stance::Recommended), o.option.risk == Risk::Refuse));
    options
}

/// Better ones first: by the ladder of sizes, then by weights (of one size, those with more bits), then those that know
/// many languages, then the newer of two of one shape.
pub fn quality(model: &Needs) -> impl Ord + use<'_> {
    let name = model.model.as_str();
    let rung = ladder::rung(name).unwrap_or(usize::MAX);
    (rung, Reverse(model.weights.mb), ladder::english_only(name), Reverse(name))
}

/// With the most states at which the risk is least; what fits with none of them is told by what it needs at least.
fn option(card: &Card, model: &Needs, wish: Wish) -> Planned {
    let order = |o: &Planned| {
        let refused = o.option.risk == Risk::Refuse;
        (o.option.risk, Reverse(o.option.sessions), if refused { o.states } else { 0 })
    };
    let most = with_states(card, model, wish, wish.states.max(1));
    let fewer = (1..wish.states).rev().map(|states| with_states(card, model, wish, states));
    fewer.fold(most, |best, next| if order(&next) < order(&best) { next } else { best })
}

fn with_states(card: &Card, model: &Needs, wish: Wish, states: u64) -> Planned {
    let fixed = model.used_mb(states, 0);
    let room = card.most_mb().checked_sub(card.tenants_mb().saturating_add(fixed));
    let by_device = match (room, model.session.mb) {
        (None, _) => 0,
        (Some(_), 0) => u64::MAX,
        (Some(room), each) => room / each,
    };
    let by_host = card.host_mb.map_or(u64::MAX, |mb| mb / wish.host_session_mb.max(1));
    // Whole sessions only; a factor that is no number promises none.
    let by_speed = model.realtime_factor.map_or(u64::MAX, |factor| factor.max(0.0) as u64);
    let bounds = [
        (wish.sessions.max(1), Bound::Asked),
        (by_device, Bound::DeviceMemory),
        (by_host, Bound::HostMemory),
        (by_speed, Bound::DecodeSpeed),
    ];
    let first = bounds[0];
    let (sessions, bound) = bounds.into_iter().fold(first, |least, next| if next.0 < least.0 { next } else { least });
    let used_mb = model.used_mb(states, sessions);
    let in_use_mb = card.tenants_mb().saturating_add(used_mb);
    let risk = if sessions == 0 { Risk::Refuse } else { card.risk(in_use_mb) };
    let stance = match risk {
        Risk::Safe => Some(Stance::Conservative),
        Risk::Tight => Some(Stance::Aggressive),
        Risk::Refuse | Risk::Unknown => None,
    };
    let utilization = fraction(in_use_mb, card.total_mb);
    Planned {
        option: PlanOption { model: model.model.clone(), sessions, used_mb, utilization, risk },
        states,
        headroom_mb: card.total_mb.saturating_sub(in_use_mb),
        stance,
        bound,
        figures: model.clone(),
    }
}

#[cfg(test)]
mod tests;
