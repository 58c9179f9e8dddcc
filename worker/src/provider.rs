//! Where the machine is rented, and what work on it costs. Pure: whoever reads the environment hands it in.
//!
//! | provider | documented variables | price |
//! |---|---|---|
//! | Vast.ai | `VAST_CONTAINERLABEL`; `CONTAINER_ID` with `CONTAINER_API_KEY` | in none |
//! | RunPod | `RUNPOD_POD_ID` | in none |
//! | Lambda | none: a plain virtual machine | in none |
//!
//! A price is therefore always configuration (`worker.price_per_hour`, or `VOXFLEET__WORKER__PRICE_PER_HOUR` in the
//! template that rents the machine), and so is Lambda as a provider.

use serde::{Deserialize, Serialize};
use voxfleet_schema::fleet::Provider;

/// `worker.provider`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProviderChoice {
    /// As the environment says, else local.
    #[default]
    Auto,
    VastAi,
    #[serde(rename = "runpod")]
    RunPod,
    Lambda,
    Local,
}

impl From<ProviderChoice> for Provider {
    fn from(choice: ProviderChoice) -> Self {
        match choice {
            ProviderChoice::VastAi => Provider::VastAi,
            ProviderChoice::RunPod => Provider::RunPod,
            ProviderChoice::Lambda => Provider::Lambda,
            ProviderChoice::Auto | ProviderChoice::Local => Provider::Local,
        }
    }
}

impl ProviderChoice {
    /// As a setting spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            ProviderChoice::Auto => "auto",
            ProviderChoice::VastAi => "vast_ai",
            ProviderChoice::RunPod => "runpod",
            ProviderChoice::Lambda => "lambda",
            ProviderChoice::Local => "local",
        }
    }
}

/// The provider whose variables are set, and the one that told. `is_set`: whether a variable has a value.
pub fn detect(is_set: impl Fn(&str) -> bool) -> Option<(ProviderChoice, &'static str)> {
    // `CONTAINER_ID` alone is a name that others use as well.
    let signs: [(&'static str, &[&str], ProviderChoice); 3] = [
        ("RUNPOD_POD_ID", &[], ProviderChoice::RunPod),
        ("VAST_CONTAINERLABEL", &[], ProviderChoice::VastAi),
        ("CONTAINER_API_KEY", &["CONTAINER_ID"], ProviderChoice::VastAi),
    ];
    signs
        .into_iter()
        .find(|(name, others, _)| is_set(name) && others.iter().all(|other| is_set(other)))
        .map(|(name, _, provider)| (provider, name))
}

/// What the device costs, and whom.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rent {
    pub(crate) provider: Provider,
    pub(crate) price_per_hour: Option<f64>,
}

impl Rent {
    /// What an hour of audio costs at so many times real time, as if the device did nothing else.
    pub(crate) fn per_audio_hour(self, times_real_time: f64) -> Option<f64> {
        self.price_per_hour.filter(|_| times_real_time > 0.0).map(|price| price / times_real_time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn providers_are_known_by_their_variables() {
        for (set, provider) in [
            (&["RUNPOD_POD_ID", "RUNPOD_GPU_COUNT"][..], Some(ProviderChoice::RunPod)),
            (&["VAST_CONTAINERLABEL"], Some(ProviderChoice::VastAi)),
            (&["CONTAINER_ID", "CONTAINER_API_KEY"], Some(ProviderChoice::VastAi)),
            (&["CONTAINER_ID"], None),
            (&["CONTAINER_API_KEY"], None),
            (&["HOME", "LAMBDA_TASK_ROOT"], None),
            (&[], None),
        ] {
            assert_eq!(detect(|name| set.contains(&name)).map(|(found, _)| found), provider, "{set:?}");
        }
    }

    #[test]
    fn names_are_those_of_the_wire() {
        for choice in [ProviderChoice::VastAi, ProviderChoice::RunPod, ProviderChoice::Lambda, ProviderChoice::Local] {
            let written = serde_json::to_value(choice).expect("JSON");
            assert_eq!(written, choice.as_str());
            assert_eq!(written, serde_json::to_value(Provider::from(choice)).expect("JSON"));
        }
        assert_eq!(Provider::from(ProviderChoice::Auto), Provider::Local);
    }

    #[test]
    fn the_faster_the_cheaper() {
        let rent = Rent { provider: Provider::VastAi, price_per_hour: Some(0.30) };
        assert_eq!(rent.per_audio_hour(20.0).map(|cost| (cost * 1e6).round() / 1e6), Some(0.015));
        assert_eq!(rent.per_audio_hour(0.0), None);
        assert_eq!(Rent { price_per_hour: None, ..rent }.per_audio_hour(20.0), None);
    }
}
