//! The device a worker is pinned to: its figures, what is wrong with it, and what was learned of it.
//!
//! Memory is in MB of 2^20 bytes, as NVIDIA's tools count.

use serde::{Deserialize, Serialize};

use crate::failure::FailureClass;

/// The device a worker is pinned to. Figures that a device does not give stay absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// None on a CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    pub total_mb: u64,
    pub free_mb: u64,
    /// Used by this worker: device memory, or resident memory of supervisor and engine on a CPU.
    pub used_mb: u64,
    pub used_by_others_mb: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature_c: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power_w: Option<f32>,
    /// 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utilization: Option<f32>,
    /// Why its clocks are held down: `thermal`, `power`, ... Empty where they are not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub throttled: Vec<String>,
    /// Uncorrected memory errors since the driver was loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ecc_errors: Option<u64>,
    /// Errors that the driver has reported of its card since the worker started; none before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xids: Option<Xids>,
    /// GPUs of this machine, this one included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpus: Option<u32>,
    /// Other workers of ours on this device, as their machine knows them by their `gpu_id`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_with: Vec<String>,
    /// Why it cannot be used as it was asked for; none while all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<DeviceTrouble>,
    /// The state of what other tenants leave us; none without other tenants of note.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure: Option<Pressure>,
}

/// What NVIDIA's driver has reported by the numbers of its catalogue (XID).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xids {
    pub last: u64,
    pub count: u64,
    /// When the last one was seen, unix time in ms.
    pub last_ms: u64,
}

impl Xids {
    /// The card has fallen off the bus.
    pub const FELL_OFF: u64 = 79;

    /// What the last one asks for, for people.
    pub fn meaning(&self) -> &'static str {
        match self.last {
            Self::FELL_OFF => "the card has fallen off the bus: reboot, or rent another machine",
            46 | 48 | 64 | 95 | 119 | 120 | 140 => "the card has to be reset (nvidia-smi --gpu-reset)",
            63 => "memory of the card is replaced at its next reset",
            74 => "a link to another card has failed",
            13 | 31 | 43 | 45 | 94 => "it ends the program that caused it, and no other",
            _ => "NVIDIA's catalogue of XIDs says more",
        }
    }
}

/// A device that cannot be used, or not looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceTrouble {
    /// `device_lost`, `driver_mismatch`, `missing_library`, `unavailable`.
    pub class: FailureClass,
    /// What the driver says, and the remedy.
    pub message: String,
}

/// How far other tenants have grown into what we use. Each step includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pressure {
    /// Nothing new is taken.
    NoNewWork,
    /// Idle models are released.
    ReleaseIdle,
    /// Work is moved away.
    MoveAway,
    #[serde(other)]
    Unknown,
}

/// How the last engine process ended, where nobody asked it to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineEnd {
    pub class: FailureClass,
    /// What it said last, and the remedy.
    pub message: String,
    /// Unix time in ms.
    pub at_ms: u64,
}

/// What the dispatcher gave somebody in place of what he asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instead {
    /// The model asked for, or the default of the worker; none: there is no telling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<String>,
    /// The smaller model that runs; none: the one asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// On a CPU, because no GPU was left.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cpu: bool,
    pub class: FailureClass,
}

impl Instead {
    /// Whether it comes to the same for whoever gets it, whatever the reason.
    pub fn is_like(&self, other: &Self) -> bool {
        (&self.model, self.cpu) == (&other.model, other.cpu)
    }
}

/// What runs in place of what was asked for, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standby {
    /// The model that was asked for.
    pub asked: String,
    /// What runs instead; the same model when only the device is another.
    pub model: String,
    /// `cpu` or `gpu`.
    pub device: String,
    pub class: FailureClass,
    /// Unix time in ms.
    pub since_ms: u64,
    /// Not tried again before this, unix time in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at_ms: Option<u64>,
}
