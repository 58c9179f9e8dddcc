//! Where the speaker changes, by embeddings alone: for those who have no segmentation network.
//!
//! Voice activity gives regions of speech; a pause always ends a turn. Within a region, what is heard just before each
//! point is compared with what is heard just after; a change is where they are least alike and unlike enough. Overlapping
//! speech cannot be told apart this way.

use std::ops::Range;

use crate::{
    cluster::cosine_distance,
    hear::{Heard, samples_of},
    models::ModelError,
};

/// How changes are looked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Changes {
    /// How much is heard on either side of a point.
    pub side_ms: u32,
    /// From point to point.
    pub hop_ms: u32,
    /// Cosine distance from which the two sides are two people.
    pub distance: f32,
}

impl Default for Changes {
    fn default() -> Self {
        Self { side_ms: 1_200, hop_ms: 200, distance: 0.7 }
    }
}

/// The regions, cut where the voice changes.
pub(crate) fn turns(
    regions: &[Range<usize>],
    changes: &Changes,
    heard: &mut Heard<'_>,
) -> Result<Vec<Range<usize>>, ModelError> {
    let hop = samples_of(changes.hop_ms).max(1);
    // Sides lie on the points' own grid: one embedding is the right side of a point and the left side of a later one.
    let steps = (samples_of(changes.side_ms) / hop).max(1);
    let side = steps * hop;
    let mut turns = Vec::new();
    for region in regions {
        let mut sides = Vec::new();
        for start in (region.start..(region.end + 1).saturating_sub(side)).step_by(hop) {
            sides.push(heard.embedding(std::slice::from_ref(&(start..start + side)))?);
        }
        let points: Vec<(usize, f32)> = sides
            .iter()
            .zip(sides.iter().skip(steps))
            .enumerate()
            .filter_map(|(i, (left, right))| {
                Some((region.start + (i + steps) * hop, cosine_distance(left.as_ref()?, right.as_ref()?)))
            })
            .collect();
        let mut from = region.start;
        for at in peaks(&points, changes.distance, side) {
            turns.push(from..at);
            from = at;
        }
        turns.push(from..region.end);
    }
    Ok(turns)
}

/// The points that are the highest within `apart` on either side, and at least `least` high.
fn peaks(points: &[(usize, f32)], least: f32, apart: usize) -> Vec<usize> {
    let mut found: Vec<usize> = Vec::new();
    for (at, height) in points {
        let beaten = points.iter().any(|(other, theirs)| other.abs_diff(*at) < apart && theirs > height);
        let taken = found.last().is_some_and(|last| at - last < apart);
        if *height >= least && !beaten && !taken {
            found.push(*at);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_the_highest_point_around() {
        let points = |heights: &[f32]| heights.iter().enumerate().map(|(i, h)| (i * 10, *h)).collect::<Vec<_>>();
        for (heights, expected) in [
            (vec![0.1, 0.6, 0.9, 0.6, 0.1], vec![20]),
            (vec![0.1, 0.4, 0.4, 0.1], vec![]),
            // Two changes further apart than a side; a lower one too near to a higher.
            (vec![0.9, 0.2, 0.2, 0.2, 0.7, 0.8], vec![0, 50]),
            (vec![0.8, 0.2, 0.9], vec![20]),
            // Equal heights: the first.
            (vec![0.7, 0.7, 0.7], vec![0]),
        ] {
            assert_eq!(peaks(&points(&heights), 0.5, 30), expected, "{heights:?}");
        }
    }
}
