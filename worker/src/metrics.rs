//! Names of this crate's metrics, and the one place that sets them. Without a recorder they cost nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{counter, gauge};
use voxfleet_schema::{
    device::Device,
    failure::{Failure, FailureClass},
    fleet::Heartbeat,
    id::Kind,
    transcript::Final,
};

use crate::memory::Change;

/// Memory of the device in bytes; `kind` is `total`, `free`, `used` (ours) or `others`.
pub const DEVICE_MEMORY: &str = "voxfleet_device_memory_bytes";
/// Memory in use by this worker around a stage, in bytes; `stage` is `load`, `transcribe` or `release`, `when` is `before` or
/// `after`.
pub const STAGE_MEMORY: &str = "voxfleet_stage_memory_bytes";

const FINALS: &str = "voxfleet_finals_total";
const PARTIALS: &str = "voxfleet_partials_total";
const FAILURES: &str = "voxfleet_failures_total";
/// What sessions mostly fail of.
const FAILS: [FailureClass; 5] = [
    FailureClass::BadAudio,
    FailureClass::UnsupportedFormat,
    FailureClass::ModelMissing,
    FailureClass::OutOfMemory,
    FailureClass::EngineCrash,
];
const KINDS: [Kind; 2] = [Kind::Session, Kind::Job];

/// Milliseconds of audio that stored finals cover, of sessions and of jobs: a recorder's counters hold whole numbers, and seconds
/// would lose the rest of each final.
static AUDIO_MS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// A final of this worker stands in its chain.
pub(crate) fn stored(value: &Final) {
    let Some(index) = KINDS.iter().position(|kind| *kind == value.kind) else { return };
    counter!(FINALS, "kind" => KINDS[index].as_str()).increment(1);
    AUDIO_MS[index].fetch_add(value.to_sample.saturating_sub(value.from_sample) / 16, Ordering::Relaxed);
}

pub(crate) fn partial() {
    counter!(PARTIALS).increment(1);
}

pub(crate) fn failed(failure: &Failure) {
    counter!(FAILURES, "class" => failure.class.as_str()).increment(1);
}

/// By kind, in s.
pub(crate) fn audio_seconds() -> impl Iterator<Item = (&'static str, f64)> {
    KINDS.iter().zip(&AUDIO_MS).map(|(kind, ms)| (kind.as_str(), ms.load(Ordering::Relaxed) as f64 / 1e3))
}

/// Ends that are told from the first on, with 0: an increase needs a value before it.
const ENDS: [FailureClass; 3] = [FailureClass::Timeout, FailureClass::EngineCrash, FailureClass::OutOfMemory];

/// Every class with what its heartbeat counts.
pub(crate) fn engine_ends(beat: &Heartbeat) -> impl Iterator<Item = (&'static str, f64)> {
    let none = ENDS.iter().filter(|class| !beat.engine.ends.contains_key(class)).map(|class| (class.as_str(), 0.0));
    beat.engine.ends.iter().map(|(class, count)| (class.as_str(), f64::from(*count))).chain(none)
}

/// So that the first scrape finds them at 0.
pub(crate) fn begin() {
    voxfleet_trace::begin_counting();
    for kind in KINDS {
        counter!(FINALS, "kind" => kind.as_str()).absolute(0);
    }
    counter!(PARTIALS).absolute(0);
    for class in FAILS {
        counter!(FAILURES, "class" => class.as_str()).absolute(0);
    }
}

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
