//! Audio that this program cannot look at.

use std::panic::{AssertUnwindSafe, catch_unwind};

use voxfleet_schema::transcript::VadKind;

use crate::engine::{EngineError, VAD_FRAME, Vad};

/// What strangers sent is looked at in here: a fault in it ends their session, and nobody else's.
pub(super) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| EngineError::Vad("its audio makes this program fail".to_owned()))
}

/// Hears nothing, so that nothing can happen.
pub(super) struct Blind(pub(super) VadKind);

impl Vad for Blind {
    fn kind(&self) -> VadKind {
        self.0
    }

    fn reset(&mut self) {}

    fn another(&self) -> Box<dyn Vad> {
        Box::new(Self(self.0))
    }

    fn speech_probability(&mut self, _: &[f32; VAD_FRAME]) -> Result<f32, EngineError> {
        Ok(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_an_error_of_whoever_sent_the_audio() {
        assert!(matches!(guarded(|| panic!("thrown")), Err::<(), _>(EngineError::Vad(_))));
        assert!(matches!(guarded(|| 3), Ok(3)));
    }
}
