//! What fits on a device: the answer of `voxfleet plan` and of the service API, for each model.

use serde::{Deserialize, Serialize};

use crate::id::{GpuId, Incarnation};

/// How close a model brings a device to its limits. Ordered: what comes later is worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Risk {
    /// The dispatcher's reserve stays free.
    Safe,
    /// It fits; a neighbour that grows a little ends that.
    Tight,
    /// It does not fit.
    Refuse,
    #[serde(other)]
    Unknown,
}

impl Risk {
    pub fn as_str(self) -> &'static str {
        match self {
            Risk::Safe => "safe",
            Risk::Tight => "tight",
            Risk::Refuse => "refuse",
            Risk::Unknown => "unknown",
        }
    }
}

/// What becomes of one model on one device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanOption {
    pub model: String,
    /// How many of the sessions asked for it can hold; 0 = the model is refused.
    pub sessions: u64,
    /// Device memory for it and its sessions, in MB of 2^20 bytes.
    pub used_mb: u64,
    /// Of the whole device, other tenants included: 1 is full, more than 1 cannot be.
    pub utilization: f64,
    pub risk: Risk,
}

/// Service API `plan`: what fits on the fleet now. Empty: every model, and as many sessions as there are slots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanRequest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions: Option<u64>,
}

/// Answer to `plan`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FleetPlan {
    /// Each model as if it were the only one to be given out: what the whole fleet takes of it beside what it has.
    pub options: Vec<PlanOption>,
    pub workers: Vec<WorkerPlan>,
}

/// One worker of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerPlan {
    pub gpu_id: GpuId,
    pub incarnation: Incarnation,
    pub host: String,
    /// Decoding runs on a CPU.
    #[serde(default)]
    pub cpu: bool,
    pub total_mb: u64,
    pub free_mb: u64,
    /// Never planned.
    pub reserve_mb: u64,
    /// Spoken for and not in use yet.
    pub promised_mb: u64,
    /// Free slots for live sessions.
    pub slots_free: u32,
    /// Why it takes nothing new, whatever the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    pub models: Vec<ModelPlan>,
}

/// One model on one worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelPlan {
    #[serde(flatten)]
    pub option: PlanOption,
    /// How it stands there: `loaded`, `promised`, `fits`, or why it cannot be used.
    pub standing: String,
    /// The engine that runs it there, as finals name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    pub expected_mb: u64,
    /// That figure was measured there, not taken from the catalog.
    #[serde(default)]
    pub measured: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn risks_are_ordered_and_keep_their_words() {
        assert!(Risk::Safe < Risk::Tight && Risk::Tight < Risk::Refuse);
        for risk in [Risk::Safe, Risk::Tight, Risk::Refuse, Risk::Unknown] {
            assert_eq!(serde_json::to_value(risk).expect("json"), risk.as_str());
        }
        assert_eq!(serde_json::from_str::<Risk>("\"daring\"").expect("tolerated"), Risk::Unknown);
    }
}
