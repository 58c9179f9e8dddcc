//! Names of this crate's metrics, and the one place that sets them. Without a recorder they cost nothing.

use metrics::gauge;
use voxfleet_schema::device::Device;

use crate::memory::Change;

/// Memory of the device in bytes; `kind` is `total`, `free`, `used` (ours) or `others`.
pub const DEVICE_MEMORY: &str = "voxfleet_device_memory_bytes";
/// Memory in use by this worker around a stage, in bytes; `stage` is `load`, `transcribe` or `release`, `when` is `before` or
/// `after`.
pub const STAGE_MEMORY: &str = "voxfleet_stage_memory_bytes";

/// Of one MB as NVIDIA's tools count.
const BYTES: f64 = 1_048_576.0;

pub(crate) fn device_memory(device: &Device) {
    let figures = [
        ("total", device.total_mb),
        ("free", device.free_mb),
        ("used", device.used_mb),
        ("others", device.used_by_others_mb),
    ];
    for (kind, mb) in figures {
        gauge!(DEVICE_MEMORY, "kind" => kind).set(mb as f64 * BYTES);
    }
}

pub(crate) fn stage_memory(change: Change) {
    for (when, mb) in [("before", change.before_mb), ("after", change.after_mb)] {
        gauge!(STAGE_MEMORY, "stage" => change.stage.as_str(), "when" => when).set(mb as f64 * BYTES);
    }
}

#[cfg(test)]
mod tests {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    use super::*;
    use crate::memory::Stage;

    #[test]
    fn figures_become_gauges() {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        metrics::with_local_recorder(&recorder, || {
            device_memory(&Device {
                total_mb: 100,
                free_mb: 60,
                used_mb: 30,
                used_by_others_mb: 10,
                ..Device::default()
            });
            stage_memory(Change { stage: Stage::Load, before_mb: 1, after_mb: 31 });
        });
        let mut seen: Vec<(String, f64)> = Vec::new();
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            let labels: Vec<&str> = key.key().labels().map(metrics::Label::value).collect();
            if let DebugValue::Gauge(value) = value {
                seen.push((format!("{} {}", key.key().name(), labels.join(" ")), value.into_inner()));
            }
        }
        seen.sort_by(|a, b| a.0.cmp(&b.0));
        let expected = [
            ("voxfleet_device_memory_bytes free", 60.0 * BYTES),
            ("voxfleet_device_memory_bytes others", 10.0 * BYTES),
            ("voxfleet_device_memory_bytes total", 100.0 * BYTES),
            ("voxfleet_device_memory_bytes used", 30.0 * BYTES),
            ("voxfleet_stage_memory_bytes load after", 31.0 * BYTES),
            ("voxfleet_stage_memory_bytes load before", 1.0 * BYTES),
        ];
        assert_eq!(seen, expected.map(|(name, value)| (name.to_owned(), value)));
    }
}
