//! Whether a model fits on a device, by the figures of its heartbeat.

use voxfleet_schema::{
    fleet::{EngineRunState, Heartbeat, ModelState, Residency},
    session::{Policy, SessionOptions},
};

use super::Refusal;

/// Sizes that stand in for each other, largest first.
pub const LADDER: [&str; 5] = ["large-v3-turbo", "medium", "small", "base", "tiny"];

/// Whether decoding runs on a CPU: pinned to none, or fallen back from its GPU.
pub(super) fn is_cpu(beat: &Heartbeat) -> bool {
    beat.device.index.is_none() || (beat.engine.state == EngineRunState::Ready && beat.engine.effective_device == "cpu")
}

pub(super) fn lists(beat: &Heartbeat, model: &str) -> bool {
    usable(beat).any(|m| m.name == model)
}

fn usable(beat: &Heartbeat) -> impl Iterator<Item = &ModelState> {
    beat.models.iter().filter(|m| m.state != Residency::Failed)
}

/// Whether a model the session allows fits; `Ok(true)` if it is loaded already.
pub(super) fn model(options: &SessionOptions, beat: &Heartbeat, reserve_percent: u8) -> Result<bool, Refusal> {
    let reserve_mb = beat.device.total_mb * u64::from(reserve_percent) / 100;
    let judge = |m: &ModelState| {
        if m.state == Residency::Loaded {
            Ok(true)
        } else if beat.device.total_mb == 0 {
            // A device that reports no memory has none to plan with; its worker has the last word.
            Ok(false)
        } else if m.expected_mb > beat.device.total_mb - reserve_mb {
            Err(Refusal::ModelTooLarge)
        } else if m.expected_mb > beat.device.free_mb.saturating_sub(reserve_mb) {
            Err(Refusal::ModelDoesNotFitNow)
        } else {
            Ok(false)
        }
    };
    let Some(wanted) = &options.model else {
        // The worker's default: one that is loaded, else the first of its list.
        let chosen = usable(beat).find(|m| m.state == Residency::Loaded).or_else(|| usable(beat).next());
        return chosen.map_or(Err(Refusal::ModelNotHere), judge);
    };
    let exact = usable(beat).find(|m| m.name == *wanted).map_or(Err(Refusal::ModelNotHere), judge);
    if exact.is_ok() || !matches!(options.policy, Policy::AllowSmaller | Policy::AllowCpu) {
        return exact;
    }
    let Some(rung) = LADDER.iter().position(|name| name == wanted) else {
        return exact;
    };
    LADDER[rung + 1..]
        .iter()
        .filter_map(|name| usable(beat).find(|m| m.name == *name))
        .map(judge)
        .find(|fits| fits.is_ok())
        .unwrap_or(exact)
}
