//! Which worker takes a session or a file job: filter, then score, then pick. Pure; time and load come in as values.
//!
//! Every candidate leaves with a reason, chosen or not, so that an `assigned` or `waiting` event explains itself.

mod fit;

use std::cmp::Ordering;

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::{Heartbeat, WorkerHealth},
    id::WorkerName,
    session::{Policy, SessionOptions},
    transcript::VadKind,
};

pub use fit::LADDER;

use crate::config::DispatcherConfig;

/// A decode rate older than this says nothing about now.
const DECODE_RATE_FRESH_MS: u64 = 60_000;
/// Share of a device's memory that other tenants may use before it counts against the device, in per mille.
const PRESSURE_FROM: u64 = 850;

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub options: &'a SessionOptions,
    /// A session that has finals keeps their VAD kind.
    pub vad: Option<VadKind>,
    /// Somebody listens: it must keep up with speech. A file job need not.
    pub live: bool,
}

/// One worker that could take it.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    pub name: &'a WorkerName,
    pub heartbeat: &'a Heartbeat,
    pub health: WorkerHealth,
    /// Slots of the kind asked for that are taken, the dispatcher's own pending assignments included.
    pub used: u32,
    /// Slots of that kind in all: those of live sessions and of jobs do not count against each other.
    pub slots: u32,
    /// A newer incarnation runs on its GPU.
    pub superseded: bool,
    /// It refused this session and has not sent two heartbeats since.
    pub refused: bool,
}

/// Why a worker cannot take a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    NotAlive(WorkerHealth),
    /// The session keeps the VAD kind of its finals.
    OtherVad,
    /// The policy keeps it off CPUs, or on them.
    WrongDevice,
    ModelNotHere,
    /// Not even with all memory free.
    ModelTooLarge,
    ModelDoesNotFitNow,
    NoSlot,
    TooSlow,
    TooHot,
    RefusedBefore,
    /// The newer incarnation on the same GPU takes it.
    Superseded,
}

impl Refusal {
    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::NotAlive(WorkerHealth::Joining) => "joining",
            Refusal::NotAlive(WorkerHealth::Suspect) => "suspect",
            Refusal::NotAlive(WorkerHealth::Dead) => "dead",
            Refusal::NotAlive(WorkerHealth::Draining) => "draining",
            Refusal::NotAlive(WorkerHealth::Unhealthy) => "unhealthy",
            Refusal::NotAlive(_) => "not alive",
            Refusal::OtherVad => "other vad kind",
            Refusal::WrongDevice => "policy excludes this device",
            Refusal::ModelNotHere => "model not here",
            Refusal::ModelTooLarge => "model larger than the device",
            Refusal::ModelDoesNotFitNow => "model does not fit in free memory",
            Refusal::NoSlot => "no free slot",
            Refusal::TooSlow => "decodes slower than speech",
            Refusal::TooHot => "too hot",
            Refusal::RefusedBefore => "refused it just now",
            Refusal::Superseded => "newer incarnation on this gpu",
        }
    }
}

/// What a worker that could take it looks like to the score, in order of weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    /// CPU workers come last, unless the session asks for one.
    pub cpu: bool,
    /// How many sizes below the model asked for; the one asked for comes first.
    pub smaller: usize,
    pub used: u32,
    pub slots: u32,
    /// Per mille of device memory in use by others, above the threshold.
    pub pressure: u32,
    pub warm: bool,
    pub free_mb: u64,
}

impl Score {
    fn compare(&self, other: &Self) -> Ordering {
        let share = |a: &Self, b: &Self| u64::from(a.used) * u64::from(b.slots);
        self.cpu
            .cmp(&other.cpu)
            .then_with(|| self.smaller.cmp(&other.smaller))
            .then_with(|| share(self, other).cmp(&share(other, self)))
            .then_with(|| self.pressure.cmp(&other.pressure))
            .then_with(|| other.warm.cmp(&self.warm))
            .then_with(|| other.free_mb.cmp(&self.free_mb))
    }
}

/// Reasons, in the order of the candidates.
pub type Reasons = Vec<Result<Score, Refusal>>;

#[derive(Debug)]
pub struct Decision {
    /// Index of the chosen candidate, or why there is none.
    pub pick: Result<usize, Failure>,
    pub reasons: Reasons,
}

/// Chooses among `candidates`.
pub fn route(request: Request<'_>, candidates: &[Candidate<'_>], config: &DispatcherConfig) -> Decision {
    let any_gpu = candidates.iter().any(|c| !fit::is_cpu(c.heartbeat));
    let mut reasons: Reasons = candidates.iter().map(|c| judge(request, c, any_gpu, config)).collect();
    let newest_can = |gpu: &WorkerName, reasons: &Reasons| {
        candidates.iter().zip(reasons).any(|(c, r)| r.is_ok() && !c.superseded && c.name.gpu_id == gpu.gpu_id)
    };
    for at in 0..candidates.len() {
        if candidates[at].superseded && reasons[at].is_ok() && newest_can(candidates[at].name, &reasons) {
            reasons[at] = Err(Refusal::Superseded);
        }
    }
    let pick = candidates
        .iter()
        .zip(&reasons)
        .enumerate()
        .filter_map(|(at, (candidate, reason))| reason.ok().map(|score| (at, candidate, score)))
        .min_by(|(_, a, x), (_, b, y)| x.compare(y).then_with(|| tie(a).cmp(&tie(b))))
        .map(|(at, _, _)| at);
    Decision { pick: pick.ok_or_else(|| refuse(request, candidates, &reasons, config)), reasons }
}

fn tie<'a>(candidate: &Candidate<'a>) -> (&'a str, Option<u32>, &'a WorkerName) {
    (&candidate.heartbeat.host, candidate.heartbeat.device.index, candidate.name)
}

fn judge(
    request: Request<'_>,
    candidate: &Candidate<'_>,
    any_gpu: bool,
    config: &DispatcherConfig,
) -> Result<Score, Refusal> {
    let beat = candidate.heartbeat;
    if candidate.health != WorkerHealth::Alive {
        return Err(Refusal::NotAlive(candidate.health));
    }
    if candidate.refused {
        return Err(Refusal::RefusedBefore);
    }
    if request.vad.is_some_and(|vad| vad != beat.engine.vad) {
        return Err(Refusal::OtherVad);
    }
    let cpu = fit::is_cpu(beat);
    let device_ok = match request.options.policy {
        // What a newer version means is not known here: as if nothing had been said.
        Policy::AllowCpu | Policy::Unknown => true,
        Policy::ForceCpu => cpu,
        // On a fleet without any GPU a CPU stands in for nothing.
        Policy::ExactModel | Policy::AllowSmaller => !cpu || !any_gpu,
    };
    if !device_ok {
        return Err(Refusal::WrongDevice);
    }
    let fit = fit::model(request.options, beat, config.reserve_percent)?;
    if candidate.used >= candidate.slots {
        return Err(Refusal::NoSlot);
    }
    // What it measured under work that is gone says nothing of a worker that is idle.
    if request.live
        && candidate.used > 0
        && let (Some(rate), Some(age)) = (beat.engine.decode_rate, beat.engine.decode_rate_age_ms)
        && age < DECODE_RATE_FRESH_MS
        && rate < config.min_decode_rate
    {
        return Err(Refusal::TooSlow);
    }
    if beat.device.temperature_c.is_some_and(|t| t >= config.max_temperature_c) {
        return Err(Refusal::TooHot);
    }
    let device = &beat.device;
    let others = device.used_by_others_mb.saturating_mul(1_000) / device.total_mb.max(1);
    Ok(Score {
        smaller: fit.stand_in.map_or(0, |(_, sizes)| sizes),
        cpu: cpu && request.options.policy != Policy::ForceCpu,
        used: candidate.used,
        slots: candidate.slots,
        pressure: others.saturating_sub(PRESSURE_FROM) as u32,
        warm: fit.warm,
        free_mb: device.free_mb,
    })
}

/// The typed refusal when nobody can take it: an empty fleet, a model nobody has or could hold, or no room now.
fn refuse(request: Request<'_>, candidates: &[Candidate<'_>], reasons: &Reasons, config: &DispatcherConfig) -> Failure {
    let retry =
        |class, message: &str| Failure { retry_after_ms: Some(config.retry_after_ms), ..Failure::new(class, message) };
    let there = |r: &Result<Score, Refusal>| !matches!(r, Err(Refusal::NotAlive(_)));
    if !reasons.iter().any(there) {
        return retry(FailureClass::NoWorkers, "no worker is ready");
    }
    if let Some(model) = &request.options.model
        && !candidates.iter().any(|c| fit::lists_any(request.options, c.heartbeat, model))
    {
        return Failure::new(FailureClass::ModelMissing, format!("no worker has model {model:?}"));
    }
    // A policy or a VAD kind that excludes whole devices never comes free, no more than memory that is not there.
    let never = |r: &Result<Score, Refusal>| {
        matches!(r, Err(Refusal::ModelTooLarge | Refusal::ModelNotHere | Refusal::WrongDevice))
    };
    if reasons.iter().filter(|r| there(r)).all(never) {
        return Failure::new(FailureClass::ModelDoesNotFit, "no device of the fleet can hold the model");
    }
    retry(FailureClass::NoCapacity, "No GPU resources available")
}

/// The smaller model that `beat`'s worker is to run in place of the one asked for, if that does not fit there.
pub fn stand_in(options: &SessionOptions, beat: &Heartbeat, config: &DispatcherConfig) -> Option<&'static str> {
    fit::model(options, beat, config.reserve_percent).ok()?.stand_in.map(|(name, _)| name)
}

/// Every candidate's reason as a person reads it, chosen one marked.
pub fn explain(candidates: &[Candidate<'_>], decision: &Decision) -> serde_json::Value {
    let picked = decision.pick.as_ref().ok().copied();
    candidates
        .iter()
        .zip(&decision.reasons)
        .enumerate()
        .map(|(at, (candidate, reason))| {
            let mut row = serde_json::json!({
                "gpu_id": candidate.name.gpu_id,
                "incarnation": candidate.name.incarnation,
            });
            match reason {
                Ok(score) => {
                    row["used"] = score.used.into();
                    row["slots"] = score.slots.into();
                    row["warm"] = score.warm.into();
                    if score.smaller > 0 {
                        row["sizes_smaller"] = score.smaller.into();
                    }
                    row["free_mb"] = score.free_mb.into();
                    row["pressure_permille"] = score.pressure.into();
                    row["chosen"] = (picked == Some(at)).into();
                }
                Err(refusal) => row["refused"] = refusal.as_str().into(),
            }
            row
        })
        .collect()
}

#[cfg(test)]
mod tests;
