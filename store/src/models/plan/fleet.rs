//! A fleet on paper: which service lies on which card, and what becomes of it when cards fail. Pure.
//!
//! Our services (those with `models`) hold each of their models on each of their cards; their sessions are spread over
//! the cards. Foreign ones (an embedding, a language model) have a figure, split evenly over their cards: they are seen
//! and kept room for, and whoever runs them moves them. A reserve stands in for one failed card at a time, as the
//! dispatcher has it. Services are served in the order of the file: who stands first gets the reserve.
//!
//! Nothing is ever placed beyond the limit of any service of a card; what does not fit is named as lost.

mod file;

use serde::Serialize;
use voxfleet_schema::plan::Risk;

use super::{MOST_PERCENT, Needs, SAFE_PERCENT, Tenant, fraction, share};
pub use file::{FleetError, FleetFile, ServiceEntry};

/// What a service is made of.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    Ours {
        /// What its models need, in their order, on each card of the fleet.
        needs: Vec<Vec<Needs>>,
        sessions: u64,
        states: u64,
    },
    /// MB over all its cards.
    Foreign { mb: u64 },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    pub name: String,
    /// Places in the list of cards.
    pub gpus: Vec<usize>,
    pub reserves: Vec<usize>,
    pub limit_percent: u8,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
pub struct FleetCard {
    pub id: String,
    pub gpu: String,
    pub total_mb: u64,
    pub tenants: Vec<Tenant>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Fleet {
    pub cards: Vec<FleetCard>,
    pub services: Vec<Service>,
}

/// What fills a part of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    Tenant,
    Context,
    Weights,
    States,
    Sessions,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    pub fill: Fill,
    pub mb: u64,
}

/// A service on a card.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Placed {
    pub service: String,
    /// Which of how many shares of the service, from 1.
    pub share: usize,
    pub shares: usize,
    pub mb: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Its models that have no room here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    pub states: u64,
    pub sessions: u64,
    pub parts: Vec<Part>,
    #[serde(skip)]
    limit_percent: u8,
    /// Place of the service in the list of services.
    #[serde(skip)]
    index: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CardUse {
    pub id: String,
    pub gpu: String,
    pub total_mb: u64,
    pub used_mb: u64,
    pub utilization: f64,
    /// The lowest limit of what is on it.
    pub limit_percent: u8,
    /// Up to the limit.
    pub headroom_mb: u64,
    pub risk: Risk,
    /// Of which services.
    pub reserve_of: Vec<String>,
    pub tenants: Vec<Tenant>,
    pub holds: Vec<Placed>,
}

/// A share of a service that has no place.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lost {
    pub service: String,
    pub share: usize,
    pub shares: usize,
    pub from: String,
    pub why: String,
}

/// A share of a service that goes from one card to another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Move {
    pub service: String,
    pub share: usize,
    pub shares: usize,
    pub from: String,
    pub to: String,
    pub how: How,
    pub mb: u64,
    pub sessions: u64,
    /// Models that have no room there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// Of the card that takes it, all things counted.
    pub utilization: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// A reserve stands in.
    Reserve,
    /// The service's other cards take its sessions, which memory allows; their speed is another matter.
    Shared,
}

/// What becomes of the fleet when some cards fail at once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    pub failed: Vec<String>,
    pub moves: Vec<Move>,
    pub lost: Vec<Lost>,
    pub reserves_left: Vec<String>,
    /// `safe`: all of it goes on; `tight`: without some models, or on fewer cards; `refuse`: something is lost.
    pub risk: Risk,
    /// The cards that are left.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cards: Vec<CardUse>,
}

/// How things stand while one plans.
#[derive(Clone)]
struct Table<'a> {
    fleet: &'a Fleet,
    holds: Vec<Vec<Placed>>,
}

/// Where everything lies while nothing has failed, and what has no place even then.
pub fn standing(fleet: &Fleet) -> (Vec<CardUse>, Vec<Lost>) {
    let (table, lost) = Table::filled(fleet);
    (table.cards(&[]), lost)
}

/// What happens when these cards fail at once. Places out of range are passed over.
pub fn outcome(fleet: &Fleet, failed: &[usize]) -> Outcome {
    let (mut table, _) = Table::filled(fleet);
    let mut failed: Vec<usize> = failed.iter().copied().filter(|at| *at < fleet.cards.len()).collect();
    failed.sort_unstable();
    failed.dedup();
    let mut homeless: Vec<(usize, Placed)> =
        failed.iter().flat_map(|at| std::mem::take(&mut table.holds[*at]).into_iter().map(move |p| (*at, p))).collect();
    homeless.sort_by_key(|(at, placed)| (placed.index, *at));
    // By card, which failed one it stands in for.
    let mut stands_in: Vec<Option<usize>> = vec![None; fleet.cards.len()];
    let (mut moves, mut lost) = (Vec::new(), Vec::new());
    for (from, old) in homeless {
        let (service, id) = (&fleet.services[old.index], |at: usize| fleet.cards[at].id.clone());
        let free = |to: &usize| !failed.contains(to) && stands_in[*to].is_none_or(|card| card == from);
        let taken = service.reserves.iter().copied().filter(free).find_map(|to| Some((to, table.fit(to, &old)?)));
        let (to, how, new) = match taken {
            Some((to, new)) => {
                stands_in[to] = Some(from);
                (to, How::Reserve, new)
            }
            None => match table.share(&old, &failed) {
                Some((to, new)) => (to, How::Shared, new),
                None => {
                    let why = why_lost(service, &failed);
                    lost.push(Lost { service: old.service, share: old.share, shares: old.shares, from: id(from), why });
                    continue;
                }
            },
        };
        moves.push((
            to,
            Move {
                service: new.service.clone(),
                share: new.share,
                shares: new.shares,
                from: id(from),
                to: id(to),
                how,
                mb: new.mb,
                sessions: new.sessions,
                missing: new.missing.clone(),
                utilization: 0.0,
            },
        ));
        table.holds[to].push(new);
    }
    for (to, step) in &mut moves {
        step.utilization = fraction(table.used_mb(*to), fleet.cards[*to].total_mb);
    }
    let moves: Vec<Move> = moves.into_iter().map(|(_, step)| step).collect();
    let half = |m: &Move| m.how == How::Shared || !m.missing.is_empty();
    let risk = match (lost.is_empty(), moves.iter().any(half)) {
        (false, _) => Risk::Refuse,
        (true, true) => Risk::Tight,
        (true, false) => Risk::Safe,
    };
    let left = |at: &usize| table.is_reserve(*at) && !failed.contains(at) && stands_in[*at].is_none();
    let reserves_left = (0..fleet.cards.len()).filter(left).map(|at| fleet.cards[at].id.clone()).collect();
    let names = failed.iter().map(|at| fleet.cards[*at].id.clone()).collect();
    Outcome { failed: names, moves, lost, reserves_left, risk, cards: table.cards(&failed) }
}

fn why_lost(service: &Service, failed: &[usize]) -> String {
    let alive = service.reserves.iter().filter(|at| !failed.contains(at)).count();
    match (service.reserves.len(), alive) {
        (0, _) => "it has no reserve".to_owned(),
        (_, 0) => "all of its reserves failed too".to_owned(),
        _ => format!("no reserve is free that has room for it within {} %", service.limit_percent),
    }
}

impl<'a> Table<'a> {
    fn filled(fleet: &'a Fleet) -> (Self, Vec<Lost>) {
        let mut table = Self { fleet, holds: vec![Vec::new(); fleet.cards.len()] };
        let mut lost = Vec::new();
        for (index, service) in fleet.services.iter().enumerate() {
            for (at, gpu) in service.gpus.iter().enumerate() {
                let wanted = wanted(service, index, at);
                let (share, shares) = (wanted.share, wanted.shares);
                match table.fit(*gpu, &wanted) {
                    Some(placed) => table.holds[*gpu].push(placed),
                    None => {
                        let why = format!("it has no room within {} %", service.limit_percent);
                        let from = fleet.cards[*gpu].id.clone();
                        lost.push(Lost { service: service.name.clone(), share, shares, from, why });
                    }
                }
            }
        }
        (table, lost)
    }

    fn tenants_mb(&self, card: usize) -> u64 {
        self.fleet.cards[card].tenants.iter().fold(0, |sum, t| sum.saturating_add(t.mb))
    }

    fn used_mb(&self, card: usize) -> u64 {
        self.holds[card].iter().fold(self.tenants_mb(card), |sum, p| sum.saturating_add(p.mb))
    }

    fn limit_percent(&self, card: usize) -> u8 {
        self.holds[card].iter().map(|p| p.limit_percent).min().unwrap_or(SAFE_PERCENT)
    }

    fn is_reserve(&self, card: usize) -> bool {
        self.fleet.services.iter().any(|s| s.reserves.contains(&card))
    }

    /// This share on this card, with as many of its models and states as have room; none where not even one has.
    fn fit(&self, card: usize, wanted: &Placed) -> Option<Placed> {
        let present = self.holds[card].iter().map(|p| p.limit_percent);
        let percent = present.fold(wanted.limit_percent, u8::min);
        let room = share(self.fleet.cards[card].total_mb, percent).checked_sub(self.used_mb(card))?;
        match &self.fleet.services[wanted.index].kind {
            Kind::Foreign { .. } => (wanted.mb <= room).then(|| wanted.clone()),
            Kind::Ours { needs, states, .. } => fit_models(needs.get(card)?, *states, room, wanted),
        }
    }

    /// The sessions of a lost card of ours on another card of its service: the models are there already.
    fn share(&self, old: &Placed, failed: &[usize]) -> Option<(usize, Placed)> {
        let service = &self.fleet.services[old.index];
        let Kind::Ours { needs, .. } = &service.kind else { return None };
        let alive = |to: &&usize| !failed.contains(to);
        let holder = |to: usize| self.holds[to].iter().find(|p| p.index == old.index);
        service.gpus.iter().filter(alive).find_map(|to| {
            let there = holder(*to)?;
            let each = needs.get(*to)?.iter().map(|m| m.session.mb).max().unwrap_or(0);
            let mb = old.sessions.saturating_mul(each);
            let room = share(self.fleet.cards[*to].total_mb, self.limit_percent(*to)).checked_sub(self.used_mb(*to))?;
            let parts = if mb == 0 { Vec::new() } else { vec![Part { fill: Fill::Sessions, mb }] };
            let (models, missing) = (there.models.clone(), there.missing.clone());
            (mb <= room).then(|| (*to, Placed { mb, parts, models, missing, states: 0, ..old.clone() }))
        })
    }

    fn cards(&self, failed: &[usize]) -> Vec<CardUse> {
        let left = (0..self.fleet.cards.len()).filter(|at| !failed.contains(at));
        left.map(|at| self.card(at)).collect()
    }

    fn card(&self, at: usize) -> CardUse {
        let card = &self.fleet.cards[at];
        let (used_mb, limit_percent) = (self.used_mb(at), self.limit_percent(at));
        let headroom_mb = share(card.total_mb, limit_percent).saturating_sub(used_mb);
        let risk = match used_mb {
            mb if mb <= share(card.total_mb, SAFE_PERCENT) => Risk::Safe,
            mb if mb <= share(card.total_mb, MOST_PERCENT.max(limit_percent)) => Risk::Tight,
            _ => Risk::Refuse,
        };
        let of = self.fleet.services.iter().filter(|s| s.reserves.contains(&at)).map(|s| s.name.clone());
        CardUse {
            id: card.id.clone(),
            gpu: card.gpu.clone(),
            total_mb: card.total_mb,
            used_mb,
            utilization: fraction(used_mb, card.total_mb),
            limit_percent,
            headroom_mb,
            risk,
            reserve_of: of.collect(),
            tenants: card.tenants.clone(),
            holds: self.holds[at].clone(),
        }
    }
}

/// A share of a service as it would be with room enough; `at` is the place of the card in the list of its cards.
fn wanted(service: &Service, index: usize, at: usize) -> Placed {
    let shares = service.gpus.len().max(1);
    let spread = |all: u64| all / shares as u64 + u64::from((at as u64) < all % shares as u64);
    let (mb, sessions) = match &service.kind {
        Kind::Foreign { mb } => (spread(*mb), 0),
        Kind::Ours { sessions, .. } => (0, spread(*sessions)),
    };
    Placed {
        service: service.name.clone(),
        share: at + 1,
        shares,
        mb,
        models: Vec::new(),
        missing: Vec::new(),
        states: 0,
        sessions,
        parts: if mb == 0 { Vec::new() } else { vec![Part { fill: Fill::Tenant, mb }] },
        limit_percent: service.limit_percent,
        index,
    }
}

/// Models in their order, each with one state first; then as many states as have room.
fn fit_models(models: &[Needs], states: u64, room: u64, wanted: &Placed) -> Option<Placed> {
    let mut here: Vec<&Needs> = Vec::new();
    let mut missing = Vec::new();
    for model in models {
        here.push(model);
        if total(&parts(&here, 1, wanted.sessions)) > room {
            here.pop();
            missing.push(model.model.clone());
        }
    }
    if here.is_empty() {
        return None;
    }
    let fits = |states: &u64| total(&parts(&here, *states, wanted.sessions)) <= room;
    let states = (1..=states).rev().find(fits).unwrap_or(1);
    let parts = parts(&here, states, wanted.sessions);
    let models = here.iter().map(|m| m.model.clone()).collect();
    Some(Placed { mb: total(&parts), models, missing, states, parts, ..wanted.clone() })
}

/// One context for all, weights and states of each, and sessions as dear as the dearest of the models has them.
fn parts(models: &[&Needs], states: u64, sessions: u64) -> Vec<Part> {
    let sum = |mb: &dyn Fn(&Needs) -> u64| models.iter().fold(0_u64, |sum, m| sum.saturating_add(mb(m)));
    let most = |mb: &dyn Fn(&Needs) -> u64| models.iter().map(|m| mb(m)).max().unwrap_or(0);
    let filled = [
        (Fill::Context, most(&|m| m.context.mb)),
        (Fill::Weights, sum(&|m| m.weights.mb)),
        (Fill::States, sum(&|m| states.saturating_mul(m.state.mb))),
        (Fill::Sessions, sessions.saturating_mul(most(&|m| m.session.mb))),
    ];
    filled.into_iter().filter(|(_, mb)| *mb > 0).map(|(fill, mb)| Part { fill, mb }).collect()
}

fn total(parts: &[Part]) -> u64 {
    parts.iter().fold(0, |sum, part| sum.saturating_add(part.mb))
}

#[cfg(test)]
mod tests;
