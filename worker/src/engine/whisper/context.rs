//! How much of Whisper's 30 s encoder context a window looks at; pure. The encoder is most of what a short window costs.

/// Encoder positions per second of audio.
const POSITIONS_PER_SECOND: usize = 50;
/// Positions beyond the audio that a fitted context looks at; with fewer the last word suffers.
const MARGIN_POSITIONS: usize = 64;
/// Fewest positions a partial looks at; Whisper was not trained on less than 30 s and grows unreliable far below.
const MIN_POSITIONS: usize = 512;
const STEP_POSITIONS: usize = 64;
const MAX_POSITIONS: usize = 1_500;
/// Shorter windows are padded with silence: whisper.cpp ignores less than 100 ms and is unsure below a second.
pub(in crate::engine) const MIN_SAMPLES: usize = 16_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// 30 s, whatever the window is.
    Full,
    /// What its audio needs and a margin, at least so many positions.
    Fitted { least: usize },
}

impl Context {
    /// What partials have.
    pub const PARTIAL: Context = Context::Fitted { least: MIN_POSITIONS };

    /// For a window of so many samples at 16 kHz.
    pub fn positions(self, samples: usize) -> usize {
        match self {
            Context::Full => MAX_POSITIONS,
            Context::Fitted { least } => {
                let needed = (samples.max(MIN_SAMPLES) * POSITIONS_PER_SECOND).div_ceil(16_000) + MARGIN_POSITIONS;
                needed.next_multiple_of(STEP_POSITIONS).clamp(least.min(MAX_POSITIONS), MAX_POSITIONS)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partials_look_at_what_their_audio_needs() {
        let table =
            [(0, 512), (16_000, 512), (8 * 16_000, 512), (9 * 16_000, 576), (20 * 16_000, 1_088), (40 * 16_000, 1_500)];
        for (samples, positions) in table {
            assert_eq!(Context::PARTIAL.positions(samples), positions, "{samples} samples");
            assert_eq!(Context::Full.positions(samples), 1_500);
        }
    }

    #[test]
    fn the_least_is_kept_within_what_there_is() {
        assert_eq!(Context::Fitted { least: 0 }.positions(4 * 16_000), 320);
        assert_eq!(Context::Fitted { least: 384 }.positions(4 * 16_000), 384);
        assert_eq!(Context::Fitted { least: 9_999 }.positions(16_000), 1_500);
    }
}
