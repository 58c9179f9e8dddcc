//! What fits on a device: the answer of `voxfleet plan` and of the service API, for each model.

use serde::{Deserialize, Serialize};

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
