//! What workers tell of their devices, engines and models: each trouble with its class and its remedy. Pure.

use std::time::Duration;

use voxfleet_schema::{
    device::{DeviceTrouble, EngineEnd, Standby},
    failure::{Failure, FailureClass},
    fleet::{EngineRunState, Heartbeat, ModelState, Residency},
    remedy::{self, Side, remedy},
};

use super::Check;

const NAME: &str = "fleet";
/// An engine that died longer ago, and works since, is no trouble any more.
const END_MATTERS: Duration = Duration::from_secs(24 * 3_600);

/// One line for each trouble; one line in all where nobody has any.
pub(super) fn look<'a>(beats: impl Iterator<Item = &'a Heartbeat>) -> Vec<Check> {
    let checks: Vec<Check> = beats.flat_map(of_worker).collect();
    if checks.is_empty() {
        return vec![Check::ok(NAME, "no worker has trouble with its device, its engine or its models")];
    }
    checks
}

fn of_worker(beat: &Heartbeat) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.extend(beat.device.trouble.as_ref().map(|trouble| device(beat, trouble)));
    checks.extend(engine(beat));
    checks.extend(beat.engine.standbys.iter().map(|standby| stands_in(beat, standby)));
    checks.extend(beat.models.iter().filter_map(|state| model(beat, state)));
    checks
}

fn device(beat: &Heartbeat, trouble: &DeviceTrouble) -> Check {
    let DeviceTrouble { class, message } = trouble;
    let said = remedy::said(Side::Driver, *class, message);
    let found = format!("{}, the driver: {class}: {said}", beat.gpu_id);
    Check::fail(NAME, found, remedy(Side::Driver, *class))
}

/// How its last engine ended, and what has become of it.
fn engine(beat: &Heartbeat) -> Option<Check> {
    let engine = &beat.engine;
    let fails = engine.state == EngineRunState::Failed;
    let Some(EngineEnd { class, message, at_ms }) = &engine.last_end else {
        let mend = remedy(Side::Engine, FailureClass::Internal);
        return fails.then(|| Check::fail(NAME, format!("{}, the engine cannot be started", beat.gpu_id), mend));
    };
    // Both times are of the worker's clock.
    let ago = Duration::from_millis(beat.sent_ms.saturating_sub(*at_ms));
    let off_gpu = beat.device.uuid.is_some() && engine.effective_device == "cpu";
    if ago > END_MATTERS && !fails && !off_gpu {
        return None;
    }
    let side = remedy::side_of_end(*class, message);
    let said = remedy::said(side, *class, message);
    let now = match (fails, off_gpu) {
        (true, _) => "; none can be started",
        (false, true) => "; the GPU is left alone for now",
        (false, false) => "",
    };
    let found = format!("{}, an engine ended {} s ago: {class}: {said}{now}", beat.gpu_id, ago.as_secs());
    let mend = remedy(side, *class);
    Some(if fails { Check::fail(NAME, found, mend) } else { Check::warn(NAME, found, mend) })
}

fn stands_in(beat: &Heartbeat, standby: &Standby) -> Check {
    let Standby { asked, model, device, class, retry_at_ms, .. } = standby;
    let again = retry_at_ms.map(|at| at.saturating_sub(beat.sent_ms).div_ceil(1_000));
    let again = again.map_or_else(String::new, |s| format!(", which is tried again in {s} s"));
    let found = format!("{}, {model} runs on the {device} in place of {asked}: {class}{again}", beat.gpu_id);
    // What the driver says of the device is known before an engine has died of it.
    let by_driver = beat.device.trouble.as_ref().is_some_and(|trouble| trouble.class == *class);
    let side = if by_driver { Side::Driver } else { Side::Engine };
    Check::warn(NAME, found, remedy(side, *class))
}

fn model(beat: &Heartbeat, state: &ModelState) -> Option<Check> {
    let ModelState { name, failure, .. } = state;
    let (class, message) = match failure {
        Some(Failure { class, message, .. }) => (*class, message.as_str()),
        None => (FailureClass::ModelMissing, "its file cannot be used"),
    };
    match state.state {
        Residency::Missing | Residency::Failed => {
            let found = format!("{}, model {name}: {class}: {message}", beat.gpu_id);
            Some(Check::fail(NAME, found, remedy(Side::Model, class)))
        }
        // Whoever runs in place of it tells the same.
        Residency::NoRoom if !beat.engine.standbys.iter().any(|standby| standby.asked == *name) => {
            let said = remedy::said(Side::Engine, class, message);
            let found = format!("{}, model {name}: {class}: {said}", beat.gpu_id);
            Some(Check::warn(NAME, found, remedy(Side::Engine, class)))
        }
        Residency::Fetching => {
            let found = format!("{}, model {name}: {message}", beat.gpu_id);
            Some(Check::warn(NAME, found, "sessions that want it wait, or go where it is"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::commands::doctor::Verdict;

    const NOW_MS: u64 = 1_000_000_000;
    const SIX: [FailureClass; 6] = [
        FailureClass::OutOfMemory,
        FailureClass::EngineCrash,
        FailureClass::DeviceLost,
        FailureClass::DriverMismatch,
        FailureClass::MissingLibrary,
        FailureClass::Timeout,
    ];

    /// A worker on a GPU, with these fields in its device and its engine, and these models.
    fn beat(device: Value, engine: Value, models: Value) -> Heartbeat {
        let mut beat = json!({
            "gpu_id": "gpu-1", "incarnation": "i", "seq": 1, "sent_ms": NOW_MS, "host": "h", "pid": 1, "provider": "local",
            "device": {"name": "T4", "uuid": "GPU-1", "index": 0, "total_mb": 16_000, "free_mb": 5_000, "used_mb": 0,
                "used_by_others_mb": 0},
            "slots": {"total": 4, "used": 1}, "job_slots": {"total": 2, "used": 0}, "held": [], "models": models,
            "engine": {"state": "ready", "kind": "whisper_cpp", "effective_device": "cuda:T4", "vad": "silero",
                "ms_since_progress": 0, "restarts": 0},
            "draining": false, "version": "0",
        });
        for (part, fields) in [("device", device), ("engine", engine)] {
            let fields = fields.as_object().expect("fields").clone();
            beat[part].as_object_mut().expect("a part").extend(fields);
        }
        serde_json::from_value(beat).expect("a heartbeat")
    }

    fn of(device: Value, engine: Value, models: Value) -> Vec<Check> {
        look([beat(device, engine, models)].iter())
    }

    fn ended(class: FailureClass, ago: Duration) -> Value {
        let message = remedy::told(Side::Engine, class, "the engine ended: it said so");
        json!({ "class": class, "message": message, "at_ms": NOW_MS - ago.as_millis() as u64 })
    }

    #[test]
    fn a_fleet_without_trouble_is_one_line() {
        let well = || beat(json!({}), json!({}), json!([{"name": "small", "state": "loaded", "resident_mb": 9}]));
        let checks = look([well(), well()].iter());
        assert_eq!((checks.len(), checks[0].verdict, &checks[0].mend), (1, Verdict::Ok, &None));
        let died =
            look([well(), beat(json!({}), json!({"last_end": ended(SIX[0], Duration::ZERO)}), json!([]))].iter());
        assert_eq!((died.len(), died[0].verdict), (1, Verdict::Warn), "nothing is well beside it");
    }

    #[test]
    fn an_engine_s_end_is_told_with_the_engine_s_remedy() {
        for class in SIX {
            let checks = of(json!({}), json!({"last_end": ended(class, Duration::from_secs(7))}), json!([]));
            let found = format!("gpu-1, an engine ended 7 s ago: {class}: the engine ended: it said so");
            assert_eq!(checks, [Check::warn(NAME, found, remedy(Side::Engine, class))]);
        }
    }

    #[test]
    fn a_device_s_trouble_is_told_with_the_driver_s_remedy() {
        for class in [FailureClass::DeviceLost, FailureClass::DriverMismatch, FailureClass::MissingLibrary] {
            let message = remedy::told(Side::Driver, class, "no answer");
            let trouble = json!({ "class": class, "message": message });
            let standby =
                json!([{ "asked": "small", "model": "small", "device": "cpu", "class": class, "since_ms": 1 }]);
            let checks = of(json!({ "trouble": trouble }), json!({ "standbys": standby }), json!([]));
            assert_eq!(checks.len(), 2, "{checks:?}");
            let found = format!("gpu-1, the driver: {class}: no answer");
            assert_eq!(checks[0], Check::fail(NAME, found, remedy(Side::Driver, class)));
            assert_eq!(checks[1].mend.as_deref(), Some(remedy(Side::Driver, class)), "it was no engine that said so");
        }
    }

    #[test]
    fn an_old_end_counts_only_where_it_still_tells() {
        let old = || ended(FailureClass::EngineCrash, END_MATTERS + Duration::from_secs(1));
        for (engine, verdict, part) in [
            (json!({"last_end": old()}), Verdict::Ok, "no worker has trouble"),
            (json!({"last_end": old(), "state": "failed"}), Verdict::Fail, "none can be started"),
            (json!({"last_end": old(), "effective_device": "cpu"}), Verdict::Warn, "the GPU is left alone"),
            (json!({"state": "failed"}), Verdict::Fail, "cannot be started"),
        ] {
            let checks = of(json!({}), engine, json!([]));
            assert_eq!((checks.len(), checks[0].verdict), (1, verdict), "{checks:?}");
            assert!(checks[0].found.contains(part), "{checks:?}");
        }
    }

    #[test]
    fn what_runs_for_another_is_told_once() {
        let standby = json!([{ "asked": "small", "model": "base", "device": "gpu", "class": "out_of_memory", "since_ms": 1,
            "retry_at_ms": NOW_MS + 40_000 }]);
        let no_room = |name: &str| {
            let class = FailureClass::OutOfMemory;
            let message = remedy::told(Side::Engine, class, format_args!("no memory for model {name}"));
            json!({"name": name, "state": "no_room", "resident_mb": 0, "failure": {"class": class, "message": message}})
        };
        let checks = of(json!({}), json!({ "standbys": standby }), json!([no_room("small"), no_room("medium")]));
        let found: Vec<&str> = checks.iter().map(|check| check.found.as_str()).collect();
        assert_eq!(
            found,
            [
                "gpu-1, base runs on the gpu in place of small: out_of_memory, which is tried again in 40 s",
                "gpu-1, model medium: out_of_memory: no memory for model medium",
            ]
        );
        let mend = Some(remedy(Side::Engine, FailureClass::OutOfMemory).to_owned());
        assert!(checks.iter().all(|check| check.mend == mend && check.verdict == Verdict::Warn), "{checks:?}");
    }

    #[test]
    fn models_that_cannot_be_used_are_told() {
        let failure = |class: &str, message: &str| json!({"class": class, "message": message});
        for (state, failure, verdict, part) in [
            ("missing", failure("model_missing", "cannot be fetched: 404"), Verdict::Fail, "model_missing: cannot be"),
            ("failed", failure("model_missing", "m.bin: cut off"), Verdict::Fail, "m.bin: cut off"),
            ("failed", Value::Null, Verdict::Fail, "model_missing"),
            ("fetching", failure("no_capacity", "40 % are here"), Verdict::Warn, "40 % are here"),
            ("loading", Value::Null, Verdict::Ok, "no worker has trouble"),
        ] {
            let mut model = json!({"name": "m", "state": state, "resident_mb": 0});
            if !failure.is_null() {
                model["failure"] = failure;
            }
            let checks = of(json!({}), json!({}), json!([model]));
            assert_eq!((checks.len(), checks[0].verdict), (1, verdict), "{checks:?}");
            assert!(checks[0].found.contains(part), "{checks:?}");
            assert_eq!(checks[0].mend.is_some(), verdict != Verdict::Ok);
        }
    }
}
