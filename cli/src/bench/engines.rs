//! Which speech engines a bench compares: those of this build, or those that were asked for.

use anyhow::Result;
use serde_json::{Value, json};
use voxfleet_worker::engine::ct2::{self, ComputeType};

use super::usage;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Engine {
    #[value(name = "whisper_cpp")]
    WhisperCpp,
    Ct2,
}

impl Engine {
    /// As settings and finals call it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Engine::WhisperCpp => "whisper_cpp",
            Engine::Ct2 => "ct2",
        }
    }
}

/// Those that were asked for, each once; without a wish those of this build.
pub(super) fn chosen(asked: &[Engine]) -> Result<Vec<Engine>> {
    let sound = ct2::BUILT_IN || !asked.contains(&Engine::Ct2);
    usage(sound, "--engines: ct2 is not in this build (cargo feature ct2)")?;
    Ok(among(asked, ct2::BUILT_IN))
}

fn among(asked: &[Engine], ct2_built_in: bool) -> Vec<Engine> {
    [Engine::WhisperCpp, Engine::Ct2]
        .into_iter()
        .filter(|engine| if asked.is_empty() { ct2_built_in || *engine != Engine::Ct2 } else { asked.contains(engine) })
        .collect()
}

/// Numbers that CTranslate2 computes with, by the name of the setting; a bench wants to know which, so not `auto`.
pub(super) fn compute_type(text: &str) -> Result<ComputeType, String> {
    match serde_json::from_value(Value::from(text)) {
        Ok(found) if found != ComputeType::Auto => Ok(found),
        _ => Err("float32, float16, int8_float32 or int8_float16".to_owned()),
    }
}

/// What [`compute_type`] reads.
pub(super) fn name_of(compute_type: ComputeType) -> String {
    json!(compute_type).as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_in_is_compared_unless_something_was_asked_for() {
        use Engine::{Ct2, WhisperCpp};
        assert_eq!(among(&[], true), [WhisperCpp, Ct2]);
        assert_eq!(among(&[], false), [WhisperCpp]);
        assert_eq!(among(&[Ct2, Ct2], true), [Ct2]);
        assert_eq!(among(&[Ct2, WhisperCpp], true), [WhisperCpp, Ct2], "what is compared with comes first");
        assert_eq!(chosen(&[Ct2]).is_ok(), ct2::BUILT_IN);
    }

    #[test]
    fn numbers_have_the_names_of_the_setting() {
        for name in ["float32", "float16", "int8_float32", "int8_float16"] {
            assert_eq!(compute_type(name).map(name_of), Ok(name.to_owned()));
        }
        assert!(compute_type("auto").is_err() && compute_type("int7").is_err());
    }
}
