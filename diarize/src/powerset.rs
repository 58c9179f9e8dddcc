//! The segmentation network's answer: which of three local speakers are active in each frame.
//!
//! segmentation-3.0 gives each frame seven classes: nobody, one of three, two of three. Its frames are 270 samples apart
//! and each sees 991 samples, so frame `i` speaks of the sample `495 + 270 i`, and ten seconds have 589 frames.

use std::ops::Range;

/// Classes of a frame: {}, {1}, {2}, {3}, {1,2}, {1,3}, {2,3}.
pub const CLASSES: usize = 7;
/// Speakers that a window can tell apart.
pub const LOCAL: usize = 3;
/// Samples from frame to frame.
pub const STEP: usize = 270;
/// Samples that a frame sees.
pub const FIELD: usize = 991;

/// Which classes each local speaker is active in.
const MEMBERS: [[usize; 3]; LOCAL] = [[1, 4, 5], [2, 4, 6], [3, 5, 6]];

/// Frames that so many samples give.
pub fn frames(samples: usize) -> usize {
    (samples + STEP).saturating_sub(FIELD) / STEP
}

/// Probability that each local speaker is active, from a frame's log-probabilities. A network that gives plain logits is
/// understood as well.
pub fn activity(logits: &[f32; CLASSES]) -> [f32; LOCAL] {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let odds = logits.map(|l| (l - highest).exp());
    let all: f32 = odds.iter().sum();
    MEMBERS.map(|classes| classes.iter().map(|c| odds[*c]).sum::<f32>() / all)
}

/// Which local speakers are active in a frame, by its likeliest class alone.
pub fn decided(logits: &[f32; CLASSES]) -> [bool; LOCAL] {
    let class = (0..CLASSES).fold(0, |best, class| if logits[class] > logits[best] { class } else { best });
    MEMBERS.map(|classes| classes.contains(&class))
}

/// The first sample that belongs to a frame: half-way between its centre and the one before.
pub fn boundary(frame: usize) -> usize {
    match frame {
        0 => 0,
        _ => FIELD / 2 - STEP / 2 + frame * STEP,
    }
}

/// When activity becomes a turn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hysteresis {
    /// A turn begins at this probability,
    pub onset: f32,
    /// and goes on until it falls below this one.
    pub offset: f32,
    /// Shorter turns are nothing, in frames.
    pub min_on: usize,
    /// Shorter pauses are none, in frames.
    pub min_off: usize,
}

impl Hysteresis {
    /// Turns in frames, in order, apart from each other.
    pub fn turns(&self, activity: &[f32]) -> Vec<Range<usize>> {
        let mut turns: Vec<Range<usize>> = Vec::new();
        let mut since = None;
        for (frame, probability) in activity.iter().copied().chain([0.0]).enumerate() {
            match since {
                None if probability >= self.onset && frame < activity.len() => since = Some(frame),
                Some(start) if probability < self.offset || frame == activity.len() => {
                    match turns.last_mut() {
                        Some(last) if start - last.end < self.min_off => last.end = frame,
                        _ => turns.push(start..frame),
                    }
                    since = None;
                }
                _ => {}
            }
        }
        turns.retain(|turn| turn.len() >= self.min_on.max(1));
        turns
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is compared")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ten_seconds_have_589_frames() {
        for (samples, expected) in [(0, 0), (990, 0), (991, 1), (1_260, 1), (1_261, 2), (160_000, 589)] {
            assert_eq!(frames(samples), expected, "{samples}");
        }
    }

    #[test]
    fn a_frame_lies_around_its_centre() {
        assert_eq!(boundary(0), 0);
        assert_eq!((boundary(1) + boundary(2)) / 2, 495 + 270);
        assert!(boundary(589) < 160_000);
    }

    #[test]
    fn classes_become_speakers() {
        let sure = |class: usize| {
            let mut logits = [-20.0; CLASSES];
            logits[class] = 0.0;
            activity(&logits).map(|p| p > 0.5)
        };
        let expected = [
            [false, false, false],
            [true, false, false],
            [false, true, false],
            [false, false, true],
            [true, true, false],
            [true, false, true],
            [false, true, true],
        ];
        for (class, speakers) in expected.into_iter().enumerate() {
            assert_eq!(sure(class), speakers, "class {class}");
        }
        // Half "1 alone", half "1 and 2": the first is sure, the second a coin.
        let half = 0.5f32.ln();
        let mixed = activity(&[-50.0, half, -50.0, -50.0, half, -50.0, -50.0]);
        assert!((mixed[0] - 1.0).abs() < 1e-6 && (mixed[1] - 0.5).abs() < 1e-6 && mixed[2] < 1e-6);
    }

    #[test]
    fn the_likeliest_class_decides() {
        let only = |class: usize| std::array::from_fn(|c| if c == class { -0.1 } else { -3.0 });
        let expected = ["...", "1..", ".2.", "..3", "12.", "1.3", ".23"];
        for (class, expected) in expected.iter().enumerate() {
            let active = decided(&only(class));
            let shown: String =
                active.iter().zip(['1', '2', '3']).map(|(on, name)| if *on { name } else { '.' }).collect();
            assert_eq!(&shown, expected);
        }
    }

    #[test]
    fn turns_begin_high_and_end_low() {
        let plain = Hysteresis { onset: 0.6, offset: 0.4, min_on: 1, min_off: 0 };
        let activity = [0.1, 0.5, 0.7, 0.5, 0.5, 0.3, 0.5, 0.9, 0.9];
        assert_eq!(plain.turns(&activity), [2..5, 7..9]);
        assert_eq!(Hysteresis { min_off: 3, ..plain }.turns(&activity), [2..9]);
        assert_eq!(Hysteresis { min_off: 2, ..plain }.turns(&activity), [2..5, 7..9]);
        assert_eq!(Hysteresis { min_on: 3, ..plain }.turns(&activity), [2..5]);
        assert!(plain.turns(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn turns_are_ordered_long_enough_and_apart(
            activity in prop::collection::vec(0f32..1.0, 0..200),
            min_on in 0usize..6,
            min_off in 0usize..6,
        ) {
            let turns = Hysteresis { onset: 0.6, offset: 0.4, min_on, min_off }.turns(&activity);
            prop_assert!(turns.iter().all(|t| t.len() >= min_on.max(1) && t.end <= activity.len()));
            prop_assert!(turns.iter().all(|t| activity[t.start] >= 0.6));
            prop_assert!(turns.windows(2).all(|w| w[1].start - w[0].end >= min_off.max(1)));
        }
    }
}
