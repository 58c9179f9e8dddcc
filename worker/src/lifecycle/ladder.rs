//! What runs for a session or job, by what it asked for, what its policy allows, and what is known not to work here. Pure.
//!
//! | policy | on a worker with a GPU | on one without |
//! |---|---|---|
//! | `exact_model` | the model, on the GPU | the model |
//! | `allow_smaller` | else the next smaller one | else the next smaller one |
//! | `allow_cpu` | else the CPU, with the model asked for, or a smaller one | the same |
//! | `force_cpu` | the model, where the engine runs on the CPU already | the model |
//!
//! The engine is one process, on the GPU or on the CPU as a whole. It goes to the CPU when the GPU is out, or when nobody
//! here can be served on the GPU any more and somebody may be served on the CPU; it stays there while that one needs it.
//! Whoever may not follow is refused with the cause, and placed elsewhere.

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    ladder::{english_only, may_stand_in, rung},
    remedy::{self, Side},
    session::Policy,
};

/// What a session or job asks for, and may get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) model: String,
    pub(crate) policy: Policy,
}

impl Ask {
    fn allows_smaller(&self) -> bool {
        matches!(self.policy, Policy::AllowSmaller | Policy::AllowCpu | Policy::Unknown)
    }

    /// In place of a GPU.
    fn allows_cpu(&self) -> bool {
        matches!(self.policy, Policy::AllowCpu | Policy::ForceCpu | Policy::Unknown)
    }
}

/// What runs for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footing {
    pub(crate) model: String,
    /// The engine runs on the CPU.
    pub(crate) on_cpu: bool,
    /// Why it is not what was asked for.
    pub(crate) because: Option<FailureClass>,
}

/// What is known here.
#[derive(Clone, Copy)]
pub(super) struct Here<'a> {
    /// The worker is pinned to a GPU.
    pub(super) gpu: bool,
    /// Models whose files can be used.
    pub(super) models: &'a [String],
    /// Why the GPU is not used at all.
    pub(super) device_out: Option<FailureClass>,
    /// Why a model cannot be run: on the GPU (false), or on the CPU (true).
    pub(super) no_room: &'a dyn Fn(&str, bool) -> Option<FailureClass>,
}

impl Here<'_> {
    /// The model, or where that is allowed the largest smaller one that has room.
    fn best(&self, ask: &Ask, on_cpu: bool) -> Result<(String, Option<FailureClass>), FailureClass> {
        let Some(class) = (self.no_room)(&ask.model, on_cpu) else {
            return Ok((ask.model.clone(), None));
        };
        let mut smaller: Vec<&String> = self.models.iter().filter(|other| may_stand_in(other, &ask.model)).collect();
        // Of one size: with the same languages, then the one that lost least, which has the shortest name.
        smaller.sort_by_key(|name| (rung(name), english_only(name) != english_only(&ask.model), name.len(), *name));
        let found = smaller.into_iter().find(|name| (self.no_room)(name, on_cpu).is_none());
        match found.filter(|_| ask.allows_smaller()) {
            Some(name) => Ok((name.clone(), Some(class))),
            None => Err(class),
        }
    }

    fn on_gpu(&self, ask: &Ask) -> Result<Footing, FailureClass> {
        if let Some(class) = self.device_out {
            return Err(class);
        }
        if ask.policy == Policy::ForceCpu {
            return Err(FailureClass::NoCapacity);
        }
        let (model, because) = self.best(ask, false)?;
        Ok(Footing { model, on_cpu: false, because })
    }

    /// `instead_of_gpu`: why it is not the GPU; none where there is none.
    fn on_cpu(&self, ask: &Ask, instead_of_gpu: Option<FailureClass>) -> Result<Footing, FailureClass> {
        if let Some(class) = instead_of_gpu.filter(|_| !ask.allows_cpu()) {
            return Err(class);
        }
        let (model, smaller) = self.best(ask, true)?;
        // Who asked for the CPU has what was asked for.
        let because = smaller.or(instead_of_gpu.filter(|_| ask.policy != Policy::ForceCpu));
        Ok(Footing { model, on_cpu: true, because })
    }
}

/// Why the engine is to run on the CPU in place of its GPU; none: it is not. `now`: as it is.
pub(super) fn side<'a>(
    now: Option<FailureClass>,
    asks: impl Iterator<Item = &'a Ask>,
    here: Here<'_>,
) -> Option<FailureClass> {
    if !here.gpu || here.device_out.is_some() {
        return here.device_out.filter(|_| here.gpu);
    }
    let (mut served, mut needs) = (false, None);
    for ask in asks {
        match here.on_gpu(ask) {
            Ok(_) => served = true,
            // A wish for the CPU takes the GPU from nobody.
            Err(_) if ask.policy == Policy::ForceCpu => {}
            Err(class) if here.on_cpu(ask, Some(class)).is_ok() => needs = needs.or(Some(class)),
            Err(_) => {}
        }
    }
    needs.filter(|_| now.is_some() || !served)
}

/// What runs for `ask` in an engine on that side, or why nothing does.
pub(super) fn footing(ask: &Ask, side: Option<FailureClass>, here: Here<'_>) -> Result<Footing, Failure> {
    let on_gpu = here.gpu && side.is_none();
    let found = if on_gpu { here.on_gpu(ask) } else { here.on_cpu(ask, side) };
    found.map_err(|class| refusal(ask, class, if on_gpu { None } else { side }))
}

fn refusal(ask: &Ask, class: FailureClass, on_cpu: Option<FailureClass>) -> Failure {
    let Ask { model, policy } = ask;
    let allows = match policy {
        Policy::ExactModel => "exact_model allows nothing else",
        Policy::AllowSmaller => "allow_smaller allows no CPU, and no smaller model is here that fits",
        Policy::ForceCpu => "force_cpu allows nothing else",
        Policy::AllowCpu | Policy::Unknown => "no smaller model is here that fits",
    };
    if class == FailureClass::NoCapacity {
        let text = "force_cpu was asked for, and the engine of this worker runs on its GPU; a worker with worker.gpu = \
                    \"none\" takes it";
        return Failure::new(class, text);
    }
    let text = match (class, on_cpu) {
        (FailureClass::OutOfMemory, None) => format!("no memory for model {model}"),
        (_, Some(_)) => format!("the engine runs on the CPU, not with model {model} on its GPU"),
        _ => "the GPU of this worker cannot be used".to_owned(),
    };
    Failure::new(class, remedy::told(Side::Engine, class, format_args!("{text}, and {allows}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Policy; 4] = [Policy::ExactModel, Policy::AllowSmaller, Policy::AllowCpu, Policy::ForceCpu];

    fn ask(model: &str, policy: Policy) -> Ask {
        Ask { model: model.to_owned(), policy }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Written short: `small@gpu`, `base@cpu because out_of_memory`, or the class of a refusal.
    fn short(found: Result<Footing, Failure>) -> String {
        match found {
            Ok(Footing { model, on_cpu, because }) => {
                let place = if on_cpu { "cpu" } else { "gpu" };
                because.map_or(format!("{model}@{place}"), |class| format!("{model}@{place} because {class}"))
            }
            Err(failure) => {
                assert!(failure.message.contains("; "), "no remedy: {failure}");
                format!("refused {}", failure.class)
            }
        }
    }

    fn alone(asked: &Ask, here: Here<'_>) -> String {
        let side = side(None, std::iter::once(asked), here);
        short(footing(asked, side, here))
    }

    #[test]
    fn each_cause_and_policy_has_its_answer_on_a_gpu() {
        use FailureClass::*;
        let models = names(&["medium", "small", "small.en", "base", "tiny"]);
        let gpu_full: &[(&str, bool)] = &[("small", false)];
        let down_to_tiny: &[(&str, bool)] = &[("small", false), ("base", false)];
        let none_fits: &[(&str, bool)] = &[("small", false), ("base", false), ("tiny", false)];
        let host_too: &[(&str, bool)] = &[("small", false), ("base", false), ("tiny", false), ("small", true)];
        let nothing: &[(&str, bool)] =
            &[("small", false), ("base", false), ("tiny", false), ("small", true), ("base", true), ("tiny", true)];
        let forced = "refused no_capacity";
        // What is known, then the answers to exact_model, allow_smaller, allow_cpu, force_cpu.
        let cases = [
            (None, &[][..], ["small@gpu", "small@gpu", "small@gpu", forced]),
            (
                None,
                gpu_full,
                ["refused out_of_memory", "base@gpu because out_of_memory", "base@gpu because out_of_memory", forced],
            ),
            (
                None,
                down_to_tiny,
                ["refused out_of_memory", "tiny@gpu because out_of_memory", "tiny@gpu because out_of_memory", forced],
            ),
            (
                None,
                none_fits,
                ["refused out_of_memory", "refused out_of_memory", "small@cpu because out_of_memory", forced],
            ),
            (
                None,
                host_too,
                ["refused out_of_memory", "refused out_of_memory", "base@cpu because out_of_memory", forced],
            ),
            (None, nothing, ["refused out_of_memory", "refused out_of_memory", "refused out_of_memory", forced]),
            (
                Some(DeviceLost),
                &[],
                ["refused device_lost", "refused device_lost", "small@cpu because device_lost", "small@cpu"],
            ),
            (
                Some(DriverMismatch),
                &[],
                [
                    "refused driver_mismatch",
                    "refused driver_mismatch",
                    "small@cpu because driver_mismatch",
                    "small@cpu",
                ],
            ),
            (
                Some(MissingLibrary),
                &[],
                [
                    "refused missing_library",
                    "refused missing_library",
                    "small@cpu because missing_library",
                    "small@cpu",
                ],
            ),
            (
                Some(EngineCrash),
                &[],
                ["refused engine_crash", "refused engine_crash", "small@cpu because engine_crash", "small@cpu"],
            ),
            (Some(Timeout), &[], ["refused timeout", "refused timeout", "small@cpu because timeout", "small@cpu"]),
            (
                Some(OutOfMemory),
                &[("small", true)],
                [
                    "refused out_of_memory",
                    "refused out_of_memory",
                    "base@cpu because out_of_memory",
                    "refused out_of_memory",
                ],
            ),
        ];
        for (device_out, marks, answers) in cases {
            let no_room = |model: &str, on_cpu: bool| marks.contains(&(model, on_cpu)).then_some(OutOfMemory);
            let here = Here { gpu: true, models: &models, device_out, no_room: &no_room };
            for (policy, expected) in ALL.into_iter().zip(answers) {
                assert_eq!(alone(&ask("small", policy), here), expected, "{device_out:?} {marks:?} {policy:?}");
            }
        }
    }

    #[test]
    fn a_worker_without_a_gpu_has_only_the_sizes() {
        use FailureClass::OutOfMemory;
        let models = names(&["small", "base"]);
        for (marks, answers) in [
            (&[][..], ["small@cpu"; 4]),
            (
                &[("small", true)],
                [
                    "refused out_of_memory",
                    "base@cpu because out_of_memory",
                    "base@cpu because out_of_memory",
                    "refused out_of_memory",
                ],
            ),
            (&[("small", true), ("base", true)], ["refused out_of_memory"; 4]),
        ] {
            let no_room = |model: &str, on_cpu: bool| marks.contains(&(model, on_cpu)).then_some(OutOfMemory);
            let here = Here { gpu: false, models: &models, device_out: None, no_room: &no_room };
            for (policy, expected) in ALL.into_iter().zip(answers) {
                assert_eq!(alone(&ask("small", policy), here), expected, "{marks:?} {policy:?}");
            }
        }
    }

    #[test]
    fn what_stands_in_loses_no_language_and_as_little_as_can_be() {
        let full = |name: &'static str| {
            move |model: &str, on_cpu: bool| (model == name && !on_cpu).then_some(FailureClass::OutOfMemory)
        };
        for (here, asked, expected) in [
            (&["medium", "small.en", "small-q5_1", "small", "base"][..], "medium", "small"),
            (&["medium", "small.en", "base"], "medium", "base"),
            (&["medium.en", "small", "small.en", "tiny"], "medium.en", "small.en"),
            (&["medium.en", "small", "tiny.en"], "medium.en", "small"),
            (&["medium", "small-q8_0", "small-q5_1"], "medium", "small-q5_1"),
        ] {
            let (models, no_room) = (names(here), full(asked));
            let here = Here { gpu: true, models: &models, device_out: None, no_room: &no_room };
            let asked = ask(asked, Policy::AllowSmaller);
            assert_eq!(footing(&asked, None, here).expect("a smaller one").model, expected, "{models:?}");
        }
        let (models, no_room) = (names(&["micro.en", "tiny"]), full("micro.en"));
        let here = Here { gpu: true, models: &models, device_out: None, no_room: &no_room };
        let nameless = ask("micro.en", Policy::AllowCpu);
        assert_eq!(
            alone(&nameless, here),
            "micro.en@cpu because out_of_memory",
            "a size that nobody knows has no smaller"
        );
    }

    #[test]
    fn the_engine_goes_to_the_cpu_only_where_that_takes_the_gpu_from_nobody() {
        use FailureClass::OutOfMemory;
        let models = names(&["small", "tiny.en"]);
        let no_room = |model: &str, on_cpu: bool| (model == "small" && !on_cpu).then_some(OutOfMemory);
        let here = Here { gpu: true, models: &models, device_out: None, no_room: &no_room };
        let (small, exact) = (ask("small", Policy::AllowCpu), ask("small", Policy::ExactModel));
        let (tiny, forced) = (ask("tiny.en", Policy::ExactModel), ask("small", Policy::ForceCpu));
        let side = |now, asks: &[&Ask]| side(now, asks.iter().copied(), here);
        assert_eq!(side(None, &[&small]), Some(OutOfMemory));
        assert_eq!(side(None, &[&small, &tiny]), None, "somebody is served there");
        assert_eq!(side(Some(OutOfMemory), &[&small, &tiny]), Some(OutOfMemory), "it stays for the one that needs it");
        assert_eq!(side(Some(OutOfMemory), &[&tiny]), None);
        assert_eq!(side(None, &[&exact]), None, "nobody may be served on the CPU");
        assert_eq!(side(None, &[&forced]), None);
        assert_eq!(side(Some(OutOfMemory), &[]), None);
        assert_eq!(short(footing(&tiny, Some(OutOfMemory), here)), "refused out_of_memory");
        assert_eq!(short(footing(&forced, Some(OutOfMemory), here)), "small@cpu");
        let lent = ask("tiny.en", Policy::AllowCpu);
        assert_eq!(short(footing(&lent, Some(OutOfMemory), here)), "tiny.en@cpu because out_of_memory");
    }
}
