//! What fits where, for people who plan: each model on each worker as routing sees it, and over the whole fleet.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use voxfleet_schema::{
    fleet::WorkerHealth,
    plan::{FleetPlan, ModelPlan, PlanOption, PlanRequest, Risk, WorkerPlan},
};

use super::{
    Refusal, Roster, Slot,
    fit::{Model, Standing},
    roster::{Duty, Row},
};

/// Utilization is told to this many parts.
const PARTS: f64 = 1_000.0;

/// A model over the workers that have it.
#[derive(Default)]
struct Sum {
    sessions: u64,
    used_mb: u64,
    filled_mb: u64,
    total_mb: u64,
    risk: Option<Risk>,
}

impl Roster {
    /// Pure: nothing is promised to anybody by it.
    pub fn plan(&self, request: &PlanRequest, now: Duration) -> FleetPlan {
        let mut slots: Vec<Slot> = (0..self.rows.len()).collect();
        slots.sort_unstable_by_key(|slot| self.rows[*slot].rank);
        let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
        // Memory of a card that several workers share, as far as each model has taken it.
        let mut taken: HashMap<(Slot, u32), u64> = HashMap::new();
        let mut workers = Vec::new();
        for slot in slots {
            let row = &self.rows[slot];
            let refusal = self.takes_nothing(slot, row, now);
            let places = u64::from(row.places(true).free());
            let mut models = Vec::new();
            for model in &row.shelf.models {
                let name = self.names.name(model.number);
                if request.model.as_deref().is_some_and(|wanted| wanted != name) {
                    continue;
                }
                let sessions = match (refusal, refused(model)) {
                    (None, None) => places.min(request.sessions.unwrap_or(u64::MAX)),
                    _ => 0,
                };
                let planned = planned(row, model, name, sessions);
                let sum = sums.entry(name).or_default();
                if sessions > 0 && self.has_room(slot, model, &mut taken) {
                    sum.sessions += sessions;
                    sum.used_mb += model.expected_mb;
                    sum.filled_mb += filled_mb(row, model);
                    sum.total_mb += row.total_mb;
                    sum.risk = sum.risk.max(Some(planned.option.risk));
                }
                models.push(planned);
            }
            workers.push(self.worker(slot, row, refusal, models));
        }
        if let Some(model) = request.model.as_deref() {
            sums.entry(model).or_default();
        }
        let option = |(model, sum): (&str, Sum)| PlanOption {
            model: model.to_owned(),
            sessions: sum.sessions.min(request.sessions.unwrap_or(u64::MAX)),
            used_mb: sum.used_mb,
            utilization: share(sum.filled_mb, sum.total_mb),
            risk: sum.risk.unwrap_or(Risk::Refuse),
        };
        FleetPlan { options: sums.into_iter().map(option).collect(), workers }
    }

    fn worker(&self, slot: Slot, row: &Row, refusal: Option<Refusal>, models: Vec<ModelPlan>) -> WorkerPlan {
        let who = &self.who[slot];
        WorkerPlan {
            gpu_id: who.name.gpu_id.clone(),
            incarnation: who.name.incarnation.clone(),
            host: who.host.clone(),
            cpu: row.cpu,
            total_mb: row.total_mb,
            free_mb: row.free_mb,
            reserve_mb: row.reserve_mb,
            promised_mb: row.promised_mb,
            slots_free: row.places(true).free(),
            refused: refusal.map(|refusal| refusal.as_str().to_owned()),
            models,
        }
    }

    /// Why it would take nothing new, whatever the model.
    fn takes_nothing(&self, slot: Slot, row: &Row, now: Duration) -> Option<Refusal> {
        let health = row.health(now);
        if health != WorkerHealth::Alive {
            return Some(Refusal::of(health));
        }
        let newer_takes_it = || self.others_on_gpu(slot).any(|other| !self.rows[other].superseded);
        match row.duty {
            Duty::Reserve => Some(Refusal::Reserved),
            Duty::Nobody => Some(Refusal::OtherService),
            _ if row.superseded && row.shared && newer_takes_it() => Some(Refusal::Superseded),
            _ if row.pressed => Some(Refusal::TenantPressure),
            _ if row.places(true).is_full() => Some(Refusal::NoSlot),
            _ if row.slow => Some(Refusal::TooSlow),
            _ if row.hot => Some(Refusal::TooHot),
            _ => None,
        }
    }

    /// Whether it still fits on its card beside what neighbours would take of the same model.
    fn has_room(&self, slot: Slot, model: &Model, taken: &mut HashMap<(Slot, u32), u64>) -> bool {
        if model.standing != Standing::Fits || self.rows[slot].total_mb == 0 {
            return true;
        }
        let taken = taken.entry((self.first_on_card(slot), model.number)).or_default();
        let fits = *taken + model.expected_mb <= self.rows[slot].room_mb;
        *taken += if fits { model.expected_mb } else { 0 };
        fits
    }
}

fn refused(model: &Model) -> Option<Refusal> {
    model.standing.refusal()
}

/// What is in use on the device with this model loaded, other tenants and what is promised included.
fn filled_mb(row: &Row, model: &Model) -> u64 {
    let comes = if matches!(model.standing, Standing::Loaded | Standing::Promised) { 0 } else { model.expected_mb };
    row.total_mb.saturating_sub(row.free_mb) + row.promised_mb + comes
}

fn planned(row: &Row, model: &Model, name: &str, sessions: u64) -> ModelPlan {
    let filled_mb = filled_mb(row, model);
    let risk = match refused(model) {
        Some(_) => Risk::Refuse,
        None if row.total_mb > 0 && filled_mb + row.reserve_mb > row.total_mb => Risk::Tight,
        None => Risk::Safe,
    };
    let standing = match model.standing {
        Standing::Loaded => "loaded",
        Standing::Promised => "promised",
        Standing::Fits => "fits",
        other => other.refusal().map_or("", Refusal::as_str),
    };
    let option = PlanOption {
        model: name.to_owned(),
        sessions,
        used_mb: model.expected_mb,
        utilization: share(filled_mb, row.total_mb),
        risk,
    };
    let engine = model.engine.map(|engine| engine.as_str().to_owned());
    let (expected_mb, measured) = (model.expected_mb, model.measured);
    ModelPlan { option, standing: standing.to_owned(), engine, expected_mb, measured }
}

/// Nought of a device that reports no memory.
fn share(part_mb: u64, total_mb: u64) -> f64 {
    if total_mb == 0 { 0.0 } else { (part_mb as f64 / total_mb as f64 * PARTS).round() / PARTS }
}
