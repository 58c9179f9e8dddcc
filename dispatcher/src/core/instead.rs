//! What is told of somebody who runs on a smaller model than he asked for, or on a CPU because no GPU was left: once when it
//! begins, once when it is as asked again. The key says what was given, so that a dispatcher that takes over tells nothing again.

use serde_json::{Value, json};
use voxfleet_schema::{device::Instead, event::What, failure::FailureClass, fleet::Heartbeat, id::WorkerName};

use super::Core;
use crate::routing::is_cpu;

impl Core {
    /// What is news about it. `asked`: the model that was asked for.
    pub(super) fn news_of_instead(
        &self,
        told: Option<&Instead>,
        is: Option<&Instead>,
        asked: Option<String>,
        worker: &WorkerName,
    ) -> Option<(What, Value)> {
        let what = news(told, is)?;
        let asked = asked.or_else(|| is.or(told)?.asked.clone());
        let cpu = self.fleet.get(worker).map_or_else(|| is.is_some_and(|is| is.cpu), |w| is_cpu(&w.heartbeat));
        let mut detail = json!({
            "asked": asked,
            "model": is.and_then(|is| is.model.clone()).or(asked),
            "device": if cpu { "cpu" } else { "gpu" },
            "by": "dispatcher",
        });
        if let Some(is) = is {
            detail["class"] = is.class.as_str().into();
        }
        Some((what, detail))
    }
}

fn news(told: Option<&Instead>, is: Option<&Instead>) -> Option<What> {
    match (told, is) {
        (None, None) => None,
        (Some(told), Some(is)) if told.is_like(is) => None,
        (_, Some(_)) => Some(What::Degraded),
        (Some(_), None) => Some(What::Restored),
    }
}

/// Names in the event of an assignment which model runs in place of which.
pub(super) fn name_models(detail: &mut Value, instead: Option<&Instead>) {
    if let Some(instead) = instead.filter(|instead| instead.model.is_some()) {
        detail["model"] = instead.model.clone().into();
        detail["model_asked"] = instead.asked.clone().into();
    }
}

/// Why a worker with a GPU runs this on its CPU, as it says: of this model, of its device, of any model, of its engine.
pub(super) fn why_on_cpu(beat: &Heartbeat, asked: Option<&str>) -> FailureClass {
    let asked = asked.or(beat.default_model.as_deref());
    let standbys = || beat.engine.standbys.iter().filter(|standby| standby.device == "cpu");
    let of_this = standbys().find(|standby| Some(standby.asked.as_str()) == asked).map(|standby| standby.class);
    let of_device = || beat.device.trouble.as_ref().map(|trouble| trouble.class);
    let of_any = || standbys().next().map(|standby| standby.class);
    let of_engine = || beat.engine.last_end.as_ref().map(|end| end.class);
    of_this.or_else(of_device).or_else(of_any).or_else(of_engine).unwrap_or(FailureClass::DeviceLost)
}

pub(super) fn in_words(what: What) -> &'static str {
    match what {
        What::Restored => "it runs as asked again",
        _ => "something else runs than was asked for",
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::device::{DeviceTrouble, EngineEnd, Standby};

    use super::*;
    use crate::testing::beat;

    #[test]
    fn why_a_worker_is_on_its_cpu_is_what_it_says_itself() {
        use FailureClass::{DeviceLost, EngineCrash, MissingLibrary, OutOfMemory, Timeout};
        let standby = |asked: &str, device: &str, class| Standby {
            asked: asked.to_owned(),
            model: asked.to_owned(),
            device: device.to_owned(),
            class,
            since_ms: 0,
            retry_at_ms: None,
        };
        let both = || vec![standby("medium", "cpu", EngineCrash), standby("small", "cpu", OutOfMemory)];
        let on_gpu = || vec![standby("small", "gpu", OutOfMemory)];
        for (asked, standbys, trouble, last_end, class) in [
            (Some("small"), both(), Some(DeviceLost), None, OutOfMemory),
            (None, both(), None, None, OutOfMemory),
            (Some("base"), both(), Some(MissingLibrary), None, MissingLibrary),
            (Some("base"), both(), None, Some(Timeout), EngineCrash),
            (Some("small"), on_gpu(), None, Some(Timeout), Timeout),
            (Some("small"), on_gpu(), None, None, DeviceLost),
        ] {
            let mut beat = beat("g0", "i");
            let message = "it said so".to_owned();
            beat.default_model = Some("small".to_owned());
            beat.engine.standbys = standbys;
            beat.device.trouble = trouble.map(|class| DeviceTrouble { class, message: message.clone() });
            beat.engine.last_end = last_end.map(|class| EngineEnd { class, message, at_ms: 0 });
            assert_eq!(why_on_cpu(&beat, asked), class, "{asked:?} {:?}", beat.engine);
        }
    }

    #[test]
    fn each_change_is_told_once() {
        let instead =
            |model: Option<&str>, cpu, class| Instead { asked: None, model: model.map(str::to_owned), cpu, class };
        let small = instead(Some("small"), false, FailureClass::OutOfMemory);
        let again = instead(Some("small"), false, FailureClass::ModelMissing);
        let cpu = instead(Some("small"), true, FailureClass::NoCapacity);
        for (told, is, what) in [
            (None, None, None),
            (None, Some(&small), Some(What::Degraded)),
            (Some(&small), Some(&again), None),
            (Some(&small), Some(&cpu), Some(What::Degraded)),
            (Some(&cpu), None, Some(What::Restored)),
        ] {
            assert_eq!(news(told, is), what, "{told:?} -> {is:?}");
        }
    }
}
