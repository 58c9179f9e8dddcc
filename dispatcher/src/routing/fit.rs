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

fn lists(beat: &Heartbeat, model: &str) -> bool {
    usable(beat).any(|m| m.name == model)
}

fn usable(beat: &Heartbeat) -> impl Iterator<Item = &ModelState> {
    beat.models.iter().filter(|m| m.state != Residency::Failed)
}

/// The names smaller than `wanted` that the session allows in its place, largest first.
fn smaller(options: &SessionOptions, wanted: &str) -> &'static [&'static str] {
    if !matches!(options.policy, Policy::AllowSmaller | Policy::AllowCpu | Policy::Unknown) {
        return &[];
    }
    LADDER.iter().position(|name| *name == wanted).map_or(&[], |rung| &LADDER[rung + 1..])
}

/// Whether the model, or one the session allows in its place, is there at all.
pub(super) fn lists_any(options: &SessionOptions, beat: &Heartbeat, wanted: &str) -> bool {
    lists(beat, wanted) || smaller(options, wanted).iter().any(|name| lists(beat, name))
}

/// What a device would run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fit {
    /// Loaded already.
    pub(super) warm: bool,
    /// A smaller model than asked for, and how many sizes smaller.
    pub(super) stand_in: Option<(&'static str, usize)>,
}

/// Which model the session allows fits.
pub(super) fn model(options: &SessionOptions, beat: &Heartbeat, reserve_percent: u8) -> Result<Fit, Refusal> {
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
        return chosen.map_or(Err(Refusal::ModelNotHere), judge).map(|warm| Fit { warm, stand_in: None });
    };
    let named = |name: &str| usable(beat).find(|m| m.name == name).map_or(Err(Refusal::ModelNotHere), judge);
    named(wanted).map(|warm| Fit { warm, stand_in: None }).or_else(|refusal| {
        let mut rungs = smaller(options, wanted).iter().enumerate();
        let found =
            rungs.find_map(|(at, name)| named(name).ok().map(|warm| Fit { warm, stand_in: Some((name, at + 1)) }));
        found.ok_or(refusal)
    })
}
