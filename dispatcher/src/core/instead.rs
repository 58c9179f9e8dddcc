//! What is told of somebody who runs on a smaller model than he asked for, or on a CPU because no GPU was left: once when it
//! begins, once when it is as asked again. The key says what was given, so that a dispatcher that takes over tells nothing again.

use serde_json::{Value, json};
use voxfleet_schema::{device::Instead, event::What, id::WorkerName};

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

pub(super) fn in_words(what: What) -> &'static str {
    match what {
        What::Restored => "it runs as asked again",
        _ => "something else runs than was asked for",
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::failure::FailureClass;

    use super::*;

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
