//! What a heartbeat says of a worker's device, in the words that people and health checks use. Pure.

use serde::Serialize;
use voxfleet_schema::fleet::{EngineRunState, Heartbeat, Residency};

use super::text::{table, word};
use crate::plain::plain;

/// Fields of each worker in `status --json`, beside its heartbeat.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Facts {
    /// It has a GPU, and the GPU answers.
    gpu_available: bool,
    /// Devices of its machine, instances of split cards counted as such; 0 on a CPU.
    gpu_count: u32,
    /// What its engine runs on: `cpu`, `cuda:<name>`; empty while there is no engine.
    current_device: String,
    /// Device memory of its engine, as the driver tells.
    memory_allocated_mb: u64,
    model_loaded: bool,
    /// 0 = it is never released.
    idle_timeout_seconds: u64,
    /// In s; null while it works, or is not there.
    time_since_last_activity: Option<f64>,
    /// Audio seconds that finals cover per second with work.
    times_real_time: Option<f64>,
    /// `price_per_hour` over `times_real_time`, as if it did nothing else.
    cost_per_audio_hour: Option<f64>,
}

impl Facts {
    pub(super) fn of(beat: &Heartbeat) -> Self {
        let (device, engine) = (&beat.device, &beat.engine);
        // A single is written with a single's digits.
        let rate =
            engine.delivery_rate.map(|rate| (f64::from(rate) * 100.0).round() / 100.0).filter(|rate| *rate > 0.0);
        let runs = !matches!(engine.state, EngineRunState::Down | EngineRunState::Failed);
        Self {
            gpu_available: device.uuid.is_some() && device.trouble.is_none(),
            gpu_count: device.gpus.unwrap_or(u32::from(device.uuid.is_some())),
            current_device: if runs { engine.effective_device.clone() } else { String::new() },
            memory_allocated_mb: device.used_mb,
            model_loaded: beat.models.iter().any(|model| model.state == Residency::Loaded),
            idle_timeout_seconds: engine.idle_timeout_s,
            time_since_last_activity: engine.ms_since_activity.map(|ms| ms as f64 / 1_000.0),
            times_real_time: rate,
            cost_per_audio_hour: beat.price_per_hour.zip(rate).map(|(price, rate)| price / rate),
        }
    }
}

/// One row a worker; "-" is what its device does not tell.
pub(super) fn devices<'a>(beats: impl Iterator<Item = &'a Heartbeat> + Clone) -> String {
    let head =
        ["GPU", "DEVICE", "OTHERS MB", "HEAT", "POWER", "LOAD", "PROVIDER", "PRICE", "X REAL TIME", "AUDIO HOUR"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(beats.clone().map(row));
    let mut text = table(&rows);
    text.extend(beats.flat_map(remarks).map(|line| plain(&line) + "\n"));
    text
}

fn row(beat: &Heartbeat) -> Vec<String> {
    let device = &beat.device;
    let facts = Facts::of(beat);
    let or_dash = |told: Option<String>| told.unwrap_or_else(|| "-".to_owned());
    vec![
        beat.gpu_id.to_string(),
        device.name.clone(),
        device.used_by_others_mb.to_string(),
        or_dash(device.temperature_c.map(|c| format!("{c} C"))),
        or_dash(device.power_w.map(|w| format!("{w:.0} W"))),
        or_dash(device.utilization.map(|share| format!("{:.0} %", share * 100.0))),
        word(&beat.provider),
        or_dash(beat.price_per_hour.map(|price| format!("{price:.2}/h"))),
        or_dash(facts.times_real_time.map(|rate| format!("{rate:.1}"))),
        or_dash(facts.cost_per_audio_hour.map(|cost| format!("{cost:.4}"))),
    ]
}

/// What somebody should look at.
fn remarks(beat: &Heartbeat) -> Vec<String> {
    let device = &beat.device;
    let id = &beat.gpu_id;
    let mut lines = Vec::new();
    if let Some(trouble) = &device.trouble {
        lines.push(format!("{id} has trouble ({}): {}", trouble.class, trouble.message));
    }
    if !device.throttled.is_empty() {
        lines.push(format!("{id} is held down: {}", device.throttled.join(", ")));
    }
    if let Some(errors) = device.ecc_errors.filter(|errors| *errors > 0) {
        lines.push(format!("{id} has had {errors} uncorrected memory errors"));
    }
    if let Some(xids) = &device.xids {
        let (count, last) = (xids.count, xids.last);
        lines.push(format!("{id} has had {count} errors of its card, the last is XID {last}: {}", xids.meaning()));
    }
    if !device.shared_with.is_empty() {
        let name =
            |other: &String| if other == id.as_str() { "another of this name".to_owned() } else { other.clone() };
        let others: Vec<String> = device.shared_with.iter().map(name).collect();
        lines.push(format!("{id} shares its device with {}", others.join(", ")));
    }
    if beat.engine.neighbour_ms > 0 {
        let waited_s = beat.engine.neighbour_ms / 1_000;
        lines.push(format!("{id} decodes nothing: its neighbour has held the device's lock for {waited_s} s"));
    }
    if let Some(pressure) = &device.pressure {
        let others = device.used_by_others_mb;
        lines.push(format!("{id} gives way to {others} MB of others: {}", word(pressure).replace('_', " ")));
    }
    for standby in &beat.engine.standbys {
        let (asked, model, on) = (&standby.asked, &standby.model, &standby.device);
        lines.push(format!("{id} runs {model} on the {on} in place of {asked} ({})", standby.class));
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn beat(extra: Value) -> Heartbeat {
        let mut beat = json!({
            "gpu_id": "gpu-1", "incarnation": "i", "seq": 1, "sent_ms": 0, "host": "h", "pid": 1, "provider": "runpod",
            "device": {"name": "T4", "uuid": "GPU-1", "index": 0, "gpus": 2, "total_mb": 16_000, "free_mb": 5_000,
                "used_mb": 1_400, "used_by_others_mb": 9_600, "temperature_c": 84, "power_w": 61.7, "utilization": 0.5},
            "slots": {"total": 4, "used": 1}, "job_slots": {"total": 2, "used": 0}, "held": [],
            "models": [{"name": "small.en", "state": "loaded", "resident_mb": 900}],
            "engine": {"state": "ready", "kind": "whisper_cpp", "effective_device": "cuda:T4", "vad": "silero",
                "ms_since_progress": 0, "restarts": 0, "delivery_rate": 20.0, "idle_timeout_s": 600,
                "ms_since_activity": 12_500},
            "price_per_hour": 0.3, "draining": false, "version": "0",
        });
        for (name, value) in extra.as_object().expect("fields") {
            let at = beat.pointer_mut(name).and_then(Value::as_object_mut).expect("a part of it");
            value.as_object().expect("fields").clone().into_iter().for_each(|(key, value)| {
                at.insert(key, value);
            });
        }
        serde_json::from_value(beat).expect("a heartbeat")
    }

    #[test]
    fn health_checks_find_their_fields() {
        let told = serde_json::to_value(Facts::of(&beat(json!({})))).expect("JSON");
        let expected = json!({
            "gpu_available": true, "gpu_count": 2, "current_device": "cuda:T4", "memory_allocated_mb": 1_400,
            "model_loaded": true, "idle_timeout_seconds": 600, "time_since_last_activity": 12.5,
            "times_real_time": 20.0, "cost_per_audio_hour": 0.015,
        });
        assert_eq!(told, expected);
        let down = json!({"/device": {"trouble": {"class": "device_lost", "message": "gone"}},
            "/engine": {"state": "down", "delivery_rate": null, "ms_since_activity": null}});
        let told = Facts::of(&beat(down));
        assert_eq!((told.gpu_available, told.current_device.as_str()), (false, ""));
        assert_eq!((told.times_real_time, told.cost_per_audio_hour, told.time_since_last_activity), (None, None, None));
    }

    #[test]
    fn what_a_driver_calls_its_card_steers_no_terminal() {
        let name = "T4\u{1b}[2J\nfree\u{202e}";
        let shown = devices(
            [beat(json!({"/device": {"name": name, "trouble": {"class": "device_lost", "message": name}}}))].iter(),
        );
        assert!(!shown.contains(|c: char| c == '\u{202e}' || (c.is_control() && c != '\n')), "{shown:?}");
        assert_eq!(shown.lines().count(), 3, "{shown}");
    }

    #[test]
    fn the_table_has_figures_prices_and_remarks() {
        let troubled = json!({"/device": {
            "throttled": ["thermal"], "ecc_errors": 2, "xids": {"last": 48, "count": 3, "last_ms": 1}, "shared_with": ["gpu-x"], "pressure": "release_idle",
            "trouble": {"class": "device_lost", "message": "fell off the bus; reset the card"},
        }, "/engine": {"standbys": [
            {"asked": "small.en", "model": "tiny.en", "device": "gpu", "class": "out_of_memory", "since_ms": 1},
        ]}});
        let beats = [beat(troubled)];
        let text = devices(beats.iter());
        for part in [
            "9600",
            "84 C",
            "62 W",
            "50 %",
            "runpod",
            "0.30/h",
            "20.0",
            "0.0150",
            "gpu-1 has trouble (device_lost): fell off the bus; reset the card\n",
            "gpu-1 is held down: thermal\n",
            "2 uncorrected memory errors",
            "gpu-1 has had 3 errors of its card, the last is XID 48: the card has to be reset",
            "shares its device with gpu-x",
            "gives way to 9600 MB of others: release idle",
            "runs tiny.en on the gpu in place of small.en (out_of_memory)",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let quiet =
            [beat(json!({"/device": {"power_w": null, "temperature_c": null}, "/engine": {"delivery_rate": null}}))];
        let text = devices(quiet.iter());
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(
            text.lines().nth(1).is_some_and(|row| row.ends_with("-  -") || row.trim_end().ends_with('-')),
            "{text}"
        );
    }
}
