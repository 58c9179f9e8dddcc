//! Who is one person, over everything that was heard: [`ahc`] by embeddings alone, [`vbx`] with a model of how they vary.

pub mod ahc;
pub mod vbx;

/// `1 - cos` of the angle between two vectors of any length; 1 where one of them is nought.
pub fn cosine_distance(a: &[f32], b: &[f32]) -> f32 {
    let (mut product, mut left, mut right) = (0f32, 0f32, 0f32);
    for (x, y) in a.iter().zip(b) {
        product += x * y;
        left += x * x;
        right += y * y;
    }
    let lengths = (left * right).sqrt();
    if lengths > 0.0 { 1.0 - product / lengths } else { 1.0 }
}

/// Numbers from 0 in order of first showing.
pub(crate) fn in_order(clusters: &[usize]) -> Vec<usize> {
    let mut seen: Vec<usize> = Vec::new();
    clusters
        .iter()
        .map(|cluster| {
            seen.iter().position(|s| s == cluster).unwrap_or_else(|| {
                seen.push(*cluster);
                seen.len() - 1
            })
        })
        .collect()
}
