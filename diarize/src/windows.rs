//! A stretch of any length in the segmentation network's windows, and its local speakers followed through them.
//!
//! Windows begin on the network's own grid of [`STEP`] samples, so frames of overlapping windows lie on each other. The
//! network numbers speakers anew in each window. Where two windows overlap, the numbering is taken under which they say
//! most nearly the same, and a pair that truly agrees becomes one [`Track`], blended from one window into the other. A
//! pair that does not agree stays two tracks, cut in the middle of the overlap: whether they are one person is for the
//! embeddings to say.

use std::ops::Range;

use crate::powerset::{LOCAL, STEP, frames};

/// Samples of a window: ten seconds, what the network was trained on.
pub const WINDOW: usize = 160_000;

/// Local speakers are the same only where both windows hear them for at least so many frames (0.25 s),
const LEAST_COMMON: f32 = 15.0;
/// and where what both say is at least this part of what either says.
const LEAST_AGREEMENT: f32 = 0.5;

const PERMUTATIONS: [[usize; LOCAL]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// The windows of so many samples, `hop` frames from one to the next; the last one ends with the samples. Together they
/// cover every sample; none is longer than [`WINDOW`].
pub fn windows(samples: usize, hop: usize) -> Vec<Range<usize>> {
    let hop = hop.clamp(1, frames(WINDOW)) * STEP;
    let last = samples.saturating_sub(WINDOW).div_ceil(STEP) * STEP;
    let mut starts: Vec<usize> = (0..last).step_by(hop).collect();
    starts.push(last);
    starts.into_iter().map(|start| start..samples.min(start + WINDOW)).collect()
}

/// One local speaker over all windows in which it could be followed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Track {
    /// Its first frame in the stretch.
    pub first: usize,
    /// Probability of being active, a frame each.
    pub activity: Vec<f32>,
}

impl Track {
    /// Nought outside of the track.
    fn at(&self, frame: usize) -> f32 {
        frame.checked_sub(self.first).and_then(|i| self.activity.get(i)).copied().unwrap_or(0.0)
    }

    fn set(&mut self, frame: usize, value: f32) {
        // What lies before a track was settled when the track began.
        let Some(index) = frame.checked_sub(self.first) else { return };
        if self.activity.len() <= index {
            self.activity.resize(index + 1, 0.0);
        }
        self.activity[index] = value;
    }
}

/// Puts windows together as they come, in order.
#[derive(Debug, Default)]
pub struct Stitcher {
    tracks: Vec<Track>,
    /// The window before: its first frame, its activity, and the track of each local speaker.
    before: Option<(usize, Vec<[f32; LOCAL]>, [usize; LOCAL])>,
}

impl Stitcher {
    /// Adds a window that begins at `first` (in frames of the stretch); it neither begins nor ends before the window
    /// before.
    pub fn add(&mut self, first: usize, activity: Vec<[f32; LOCAL]>) {
        let (shared, continued) = match &self.before {
            None => (first..first, [None; LOCAL]),
            Some((start, earlier, tracks)) => {
                let shared = first..(start + earlier.len()).min(first + activity.len()).max(first);
                let pairs = agree(&earlier[(first - start).min(earlier.len())..], &activity);
                (shared, pairs.map(|pair| pair.map(|local| tracks[local])))
            }
        };
        let middle = shared.start + shared.len() / 2;
        if let Some((_, _, tracks)) = &self.before {
            for track in tracks.iter().filter(|track| !continued.contains(&Some(**track))) {
                let keep = middle.saturating_sub(self.tracks[*track].first);
                self.tracks[*track].activity.truncate(keep);
            }
        }
        let tracks = std::array::from_fn(|local| {
            let track = continued[local].unwrap_or_else(|| {
                self.tracks.push(Track { first: middle, activity: Vec::new() });
                self.tracks.len() - 1
            });
            for (frame, active) in (first..).zip(&activity) {
                let new = active[local];
                let value = match (continued[local], shared.contains(&frame)) {
                    (None, true) if frame < middle => continue,
                    (Some(_), true) => {
                        let share = (frame - shared.start) as f32 / shared.len() as f32;
                        (1.0 - share) * self.tracks[track].at(frame) + share * new
                    }
                    _ => new,
                };
                self.tracks[track].set(frame, value);
            }
            track
        });
        self.before = Some((first, activity, tracks));
    }

    /// The tracks, in order of their beginning.
    pub fn finish(self) -> Vec<Track> {
        self.tracks
    }
}

/// For each local speaker of the later window the one of the earlier that it is, where they agree.
fn agree(earlier: &[[f32; LOCAL]], later: &[[f32; LOCAL]]) -> [Option<usize>; LOCAL] {
    let mut both = [[0f32; LOCAL]; LOCAL];
    let mut either = [[0f32; LOCAL]; LOCAL];
    for (p, q) in earlier.iter().zip(later) {
        for (i, p) in p.iter().enumerate() {
            for (j, q) in q.iter().enumerate() {
                both[i][j] += p.min(*q);
                either[i][j] += p.max(*q);
            }
        }
    }
    let said = |order: &[usize; LOCAL]| -> f32 { order.iter().enumerate().map(|(j, i)| both[*i][j]).sum() };
    let best =
        PERMUTATIONS.iter().fold(&PERMUTATIONS[0], |best, order| if said(order) > said(best) { order } else { best });
    std::array::from_fn(|j| {
        let i = best[j];
        (both[i][j] >= LEAST_COMMON && both[i][j] >= LEAST_AGREEMENT * either[i][j]).then_some(i)
    })
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is compared")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_stretches_have_one_window_and_long_ones_end_with_the_last() {
        assert_eq!(windows(4_800, 296), [0..4_800]);
        assert_eq!(windows(160_000, 296), [0..160_000]);
        assert_eq!(windows(160_001, 296), [0..160_000, 270..160_001]);
        assert_eq!(windows(300_000, 296), [0..160_000, 79_920..239_920, 140_130..300_000]);
    }

    proptest! {
        #[test]
        fn windows_cover_everything(samples in 1usize..2_000_000, hop in 1usize..700) {
            let windows = windows(samples, hop);
            prop_assert_eq!(windows[0].start, 0);
            prop_assert_eq!(windows[windows.len() - 1].end, samples);
            prop_assert!(windows.iter().all(|w| w.len() <= WINDOW && w.start % STEP == 0));
            prop_assert!(windows.windows(2).all(|w| w[0].start < w[1].start && w[1].start <= w[0].end));
        }
    }

    /// Who is active in each frame, as one window would say it with its own numbering.
    fn window(truth: &[[bool; LOCAL]], span: Range<usize>, numbering: [usize; LOCAL]) -> Vec<[f32; LOCAL]> {
        truth[span].iter().map(|frame| numbering.map(|who| f32::from(u8::from(frame[who])) * 0.9 + 0.05)).collect()
    }

    #[test]
    fn numbers_change_from_window_to_window_and_tracks_do_not() {
        let truth: Vec<_> = (0..1_200).map(|f| [f % 200 < 90, f % 200 >= 100, (300..360).contains(&f)]).collect();
        for numbering in PERMUTATIONS {
            let mut stitcher = Stitcher::default();
            stitcher.add(0, window(&truth, 0..589, [0, 1, 2]));
            stitcher.add(296, window(&truth, 296..885, numbering));
            stitcher.add(592, window(&truth, 592..1_181, [0, 1, 2]));
            let tracks = stitcher.finish();
            for who in 0..2 {
                let track = &tracks[who];
                assert_eq!((track.first, track.activity.len()), (0, 1_181), "{numbering:?}");
                assert!((0..1_181).all(|f| (track.at(f) > 0.5) == truth[f][who]), "{numbering:?} {who}");
            }
        }
    }

    #[test]
    fn who_is_not_heard_in_the_overlap_is_not_linked() {
        // One speaks at the start of the first window, another at the end of the second: nothing links them.
        let truth: Vec<_> = (0..885).map(|f| [f < 200, f > 700, false]).collect();
        let mut stitcher = Stitcher::default();
        stitcher.add(0, window(&truth, 0..589, [0, 1, 2]));
        stitcher.add(296, window(&truth, 296..885, [1, 0, 2]));
        let tracks = stitcher.finish();
        let speaking: Vec<_> =
            tracks.iter().filter(|t| t.activity.iter().any(|p| *p > 0.5)).map(|t| t.first + t.activity.len()).collect();
        assert_eq!(speaking, [442, 885]);
    }

    #[test]
    fn windows_that_disagree_are_cut_in_the_middle() {
        // The same speech, which the second window gives to somebody half as long.
        let mut stitcher = Stitcher::default();
        stitcher.add(0, vec![[0.9, 0.0, 0.0]; 589]);
        stitcher.add(296, (0..589).map(|f| if f % 4 == 0 { [0.9, 0.0, 0.0] } else { [0.0, 0.0, 0.0] }).collect());
        let tracks = stitcher.finish();
        assert_eq!(tracks.len(), 2 * LOCAL);
        assert!(tracks[..LOCAL].iter().all(|t| (t.first, t.activity.len()) == (0, 442)));
        assert!(tracks[LOCAL..].iter().all(|t| (t.first, t.activity.len()) == (442, 443)));
    }

    proptest! {
        #[test]
        fn no_frame_has_more_tracks_than_a_window_has_speakers(
            windows in prop::collection::vec(prop::collection::vec(prop::array::uniform3(0f32..1.0), 100), 3),
            hop in 0usize..60,
            last_hop in 0usize..60,
        ) {
            let end = hop + last_hop + 100;
            let mut stitcher = Stitcher::default();
            for (first, window) in [0, hop, hop + last_hop].into_iter().zip(windows) {
                stitcher.add(first, window);
            }
            let tracks = stitcher.finish();
            prop_assert!(tracks.len() >= LOCAL && tracks.len() <= 3 * LOCAL);
            for frame in 0..end {
                prop_assert!(tracks.iter().filter(|t| frame >= t.first && frame < t.first + t.activity.len()).count() <= LOCAL);
            }
        }
    }
}
