//! What one session or job runs on, and what is told about it: `degraded` when it is not what was asked for, `restored` when
//! it is again, each once for each change. Pure.

use serde_json::json;
use voxfleet_schema::event::What;

use crate::lifecycle::{Ask, Footing};

/// What was asked for here, and what runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) ask: Ask,
    pub(super) footing: Footing,
}

/// What was told last.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// None: as it was asked for.
    degraded: Option<Footing>,
    changes: u32,
}

/// An event to be told, and its number among those of one session here.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Change {
    pub(super) what: What,
    pub(super) detail: serde_json::Value,
    pub(super) number: u32,
}

impl Told {
    /// It was opened on this.
    pub(super) fn opened(&mut self, standing: &Standing) -> Option<Change> {
        let Standing { ask, footing } = standing;
        let degraded = footing.because.map(|_| footing.clone());
        if degraded == self.degraded {
            return None;
        }
        self.degraded = degraded;
        self.changes += 1;
        let device = if footing.on_cpu { "cpu" } else { "gpu" };
        let mut detail = json!({ "asked": ask.model, "model": footing.model, "device": device, "by": "worker" });
        if let Some(class) = footing.because {
            detail["class"] = json!(class);
        }
        let what = if footing.because.is_some() { What::Degraded } else { What::Restored };
        Some(Change { what, detail, number: self.changes })
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::{failure::FailureClass, session::Policy};

    use super::*;

    fn on(model: &str, on_cpu: bool, because: Option<FailureClass>) -> Standing {
        let ask = Ask { model: "small".to_owned(), policy: Policy::AllowCpu };
        Standing { ask, footing: Footing { model: model.to_owned(), on_cpu, because } }
    }

    #[test]
    fn each_change_is_told_once() {
        let lost = Some(FailureClass::DeviceLost);
        let full = Some(FailureClass::OutOfMemory);
        let mut told = Told::default();
        let tell = |told: &mut Told, standing| told.opened(&standing).map(|change| (change.what, change.number));
        assert_eq!(tell(&mut told, on("small", false, None)), None, "as it was asked for");
        assert_eq!(tell(&mut told, on("base", false, full)), Some((What::Degraded, 1)));
        assert_eq!(tell(&mut told, on("base", false, full)), None, "after another death");
        assert_eq!(tell(&mut told, on("tiny", false, full)), Some((What::Degraded, 2)));
        assert_eq!(tell(&mut told, on("small", true, lost)), Some((What::Degraded, 3)));
        assert_eq!(tell(&mut told, on("small", false, None)), Some((What::Restored, 4)));
        assert_eq!(tell(&mut told, on("small", false, None)), None);
    }

    #[test]
    fn it_says_what_was_asked_what_runs_and_why() {
        let change = Told::default().opened(&on("small", true, Some(FailureClass::DeviceLost))).expect("news");
        let expected =
            json!({ "asked": "small", "model": "small", "device": "cpu", "class": "device_lost", "by": "worker" });
        assert_eq!(change.detail, expected);
    }
}
