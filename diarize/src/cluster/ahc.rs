//! Agglomerative clustering: the two nearest clusters become one until the nearest are too far apart.
//!
//! A cluster stands for the sum of its embeddings, each as heavy as the speech it was made of; the distance of two
//! clusters is the cosine distance of their sums (centroid linkage), less what may be due to how little was heard of
//! either: an embedding of a second lies further from its speaker than one of ten. Clusters with too little speech are nobody of their
//! own: they are counted for nothing and go to the nearest cluster that has enough. Ties go to the pair that began first,
//! so equal input gives equal clusters.
//!
//! Memory grows with the square of the number of items; beyond [`MOST_ITEMS`] the items are clustered in parts first.

use super::{cosine_distance, in_order};

/// More items than this are clustered in parts of half as many first, with half the threshold.
pub const MOST_ITEMS: usize = 2_000;

/// What is clustered: an embedding (or a sum of them) and the milliseconds of speech behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Only its direction counts.
    pub vector: Vec<f32>,
    pub weight_ms: u64,
}

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ahc {
    /// Cosine distance beyond which two clusters are two people.
    pub threshold: f32,
    /// Distance that may be due to shortness: this divided by the milliseconds of a cluster, for both of two.
    pub doubt_ms: f32,
    /// At least and at most so many people.
    pub min_speakers: usize,
    pub max_speakers: Option<usize>,
    /// Who speaks less than this is nobody of their own.
    pub least_ms: u64,
}

/// The cluster of each item, numbered from 0 in order of first showing.
pub fn cluster(items: &[Item], ahc: &Ahc) -> Vec<usize> {
    if items.len() <= MOST_ITEMS {
        return in_order(&Tree::grow(items, ahc).cut(items, ahc));
    }
    let tight = Ahc { threshold: ahc.threshold / 2.0, doubt_ms: 0.0, min_speakers: 1, max_speakers: None, least_ms: 0 };
    let mut of_item = Vec::with_capacity(items.len());
    let mut sums: Vec<Item> = Vec::new();
    for part in items.chunks(MOST_ITEMS / 2) {
        let clusters = Tree::grow(part, &tight).cut(part, &tight);
        let base = sums.len();
        let clusters = in_order(&clusters);
        sums.extend(gathered(part, &clusters));
        of_item.extend(clusters.iter().map(|cluster| base + cluster));
    }
    if sums.len() == items.len() {
        // Nothing is like anything else: people are not to be found here, and halving would go on for ever.
        return in_order(&vec![0; items.len()]);
    }
    let clusters = cluster(&sums, ahc);
    in_order(&of_item.iter().map(|sum| clusters[*sum]).collect::<Vec<_>>())
}

/// The sum of each cluster; clusters are numbered without gaps.
fn gathered(items: &[Item], clusters: &[usize]) -> Vec<Item> {
    let count = clusters.iter().max().map_or(0, |last| last + 1);
    let mut sums = vec![Item { vector: Vec::new(), weight_ms: 0 }; count];
    for (item, cluster) in items.iter().zip(clusters) {
        let sum = &mut sums[*cluster];
        add(&mut sum.vector, &weighted(item));
        sum.weight_ms += item.weight_ms;
    }
    sums
}

/// The item's direction, as long as its weight; nobody weighs nothing.
fn weighted(item: &Item) -> Vec<f32> {
    let length = item.vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    let scale = if length > 0.0 { item.weight_ms.max(1) as f32 / length } else { 0.0 };
    item.vector.iter().map(|x| x * scale).collect()
}

fn add(sum: &mut Vec<f32>, vector: &[f32]) {
    if sum.is_empty() {
        sum.extend_from_slice(vector);
    } else {
        sum.iter_mut().zip(vector).for_each(|(s, v)| *s += v);
    }
}

/// Less than this is not heard at all; doubt does not grow beyond it.
const LEAST_HEARD_MS: u64 = 500;

/// Distance of two clusters, less what may be due to how little was heard of them.
fn doubted(a: (&[f32], u64), b: (&[f32], u64), doubt_ms: f32) -> f32 {
    let doubt = |weight_ms: u64| doubt_ms / weight_ms.max(LEAST_HEARD_MS) as f32;
    cosine_distance(a.0, b.0) - doubt(a.1) - doubt(b.1)
}

/// Who was joined with whom, in order.
struct Tree {
    /// The second joined the first; clusters are named by their first item.
    joins: Vec<(usize, usize)>,
    /// How many joins lie within the threshold.
    within: usize,
    /// Clusters with enough speech after so many joins.
    grown: Vec<usize>,
}

impl Tree {
    fn grow(items: &[Item], ahc: &Ahc) -> Self {
        let n = items.len();
        let mut sums: Vec<Vec<f32>> = items.iter().map(weighted).collect();
        let mut weights: Vec<u64> = items.iter().map(|i| i.weight_ms).collect();
        let mut alive: Vec<usize> = (0..n).collect();
        // The lower triangle: the distance of i and j < i is at `i * (i - 1) / 2 + j`.
        let mut distances = Vec::with_capacity(n * n.saturating_sub(1) / 2);
        for i in 0..n {
            let of = |j: usize| doubted((&sums[i], weights[i]), (&sums[j], weights[j]), ahc.doubt_ms);
            distances.extend((0..i).map(of));
        }
        let place = |a: usize, b: usize| {
            let (low, high) = if a < b { (a, b) } else { (b, a) };
            high * (high - 1) / 2 + low
        };
        // The nearest later cluster of each.
        let nearest_after = |i: usize, alive: &[usize], distances: &[f32]| {
            let mut best: Option<(usize, f32)> = None;
            for j in alive.iter().copied().filter(|j| *j > i) {
                let distance = distances[place(i, j)];
                if best.is_none_or(|(_, d)| distance < d) {
                    best = Some((j, distance));
                }
            }
            best
        };
        let mut nearest: Vec<_> = (0..n).map(|i| nearest_after(i, &alive, &distances)).collect();
        let big = |weight: u64| usize::from(weight >= ahc.least_ms);
        let mut count = weights.iter().map(|w| big(*w)).sum::<usize>();
        let mut tree = Self { joins: Vec::new(), within: 0, grown: vec![count] };
        loop {
            let mut best: Option<(usize, usize, f32)> = None;
            for i in &alive {
                if let Some((j, distance)) = nearest[*i]
                    && best.is_none_or(|(_, _, d)| distance < d)
                {
                    best = Some((*i, j, distance));
                }
            }
            let Some((i, j, distance)) = best else { break };
            let within = distance <= ahc.threshold;
            if !within && ahc.max_speakers.is_none_or(|most| count <= most.max(1)) {
                break;
            }
            count = count + big(weights[i] + weights[j]) - big(weights[i]) - big(weights[j]);
            weights[i] += weights[j];
            let joined = std::mem::take(&mut sums[j]);
            add(&mut sums[i], &joined);
            alive.retain(|k| *k != j);
            nearest[j] = None;
            for k in alive.iter().copied().filter(|k| *k != i) {
                distances[place(i, k)] = doubted((&sums[i], weights[i]), (&sums[k], weights[k]), ahc.doubt_ms);
            }
            for k in alive.iter().copied() {
                let stale = k == i || nearest[k].is_some_and(|(target, _)| target == i || target == j);
                if stale {
                    nearest[k] = nearest_after(k, &alive, &distances);
                } else if k < i {
                    let moved = distances[place(i, k)];
                    if nearest[k].is_none_or(|(target, d)| moved < d || (moved == d && i < target)) {
                        nearest[k] = Some((i, moved));
                    }
                }
            }
            tree.joins.push((i, j));
            tree.grown.push(count);
            if within {
                tree.within = tree.joins.len();
            }
        }
        tree
    }

    /// After how many joins to stop, then small clusters to big ones.
    fn cut(&self, items: &[Item], ahc: &Ahc) -> Vec<usize> {
        let most = ahc.max_speakers.unwrap_or(usize::MAX).max(1);
        let least = ahc.min_speakers.clamp(1, most);
        let mut level = (self.within..self.grown.len()).find(|l| self.grown[*l] <= most).unwrap_or(self.joins.len());
        if self.grown[level] < least {
            // Back to where there were enough people, or as near to it as it ever came.
            let last = items.len() - least.min(items.len());
            level = (0..=level.min(last)).max_by_key(|l| (self.grown[*l].min(least), *l)).unwrap_or(level);
        }
        let mut cluster: Vec<usize> = (0..items.len()).collect();
        for (kept, gone) in &self.joins[..level] {
            cluster.iter_mut().filter(|c| *c == gone).for_each(|c| *c = *kept);
        }
        let cluster = in_order(&cluster);
        let sums = gathered(items, &cluster);
        let mut big: Vec<usize> = (0..sums.len()).filter(|c| sums[*c].weight_ms >= ahc.least_ms).collect();
        if big.len() < least {
            // Those who speak most count, however little it is.
            let mut small: Vec<usize> = (0..sums.len()).filter(|c| !big.contains(c)).collect();
            small.sort_by_key(|c| std::cmp::Reverse(sums[*c].weight_ms));
            big.extend(small.into_iter().take(least - big.len()));
        }
        let home: Vec<usize> = (0..sums.len())
            .map(|c| if big.contains(&c) { c } else { nearest(&sums[c].vector, &sums, &big).unwrap_or(c) })
            .collect();
        cluster.iter().map(|c| home[*c]).collect()
    }
}

fn nearest(vector: &[f32], sums: &[Item], among: &[usize]) -> Option<usize> {
    let distance = |c: usize| cosine_distance(vector, &sums[c].vector);
    among.iter().copied().min_by(|a, b| distance(*a).total_cmp(&distance(*b)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FREE: Ahc = Ahc { threshold: 0.3, doubt_ms: 0.0, min_speakers: 1, max_speakers: None, least_ms: 0 };

    /// Unit vectors in a plane, by degrees, a second each.
    fn at(degrees: &[f32]) -> Vec<Item> {
        degrees
            .iter()
            .map(|d| Item { vector: vec![d.to_radians().cos(), d.to_radians().sin()], weight_ms: 1_000 })
            .collect()
    }

    #[test]
    fn near_ones_are_one_person() {
        let items = at(&[0.0, 90.0, 10.0, 95.0, 180.0]);
        assert_eq!(cluster(&items, &FREE), [0, 1, 0, 1, 2]);
        assert_eq!(cluster(&[], &FREE), Vec::<usize>::new());
        assert_eq!(cluster(&items[..1], &FREE), [0]);
    }

    #[test]
    fn limits_are_kept() {
        let items = at(&[0.0, 5.0, 90.0, 95.0, 180.0]);
        for (min_speakers, max_speakers, expected) in [
            (1, Some(2), vec![0, 0, 1, 1, 1]),
            (1, Some(1), vec![0; 5]),
            (4, None, vec![0, 0, 1, 2, 3]),
            (9, None, vec![0, 1, 2, 3, 4]),
            (3, Some(3), vec![0, 0, 1, 1, 2]),
            // The most wins over the least.
            (4, Some(2), vec![0, 0, 1, 1, 1]),
        ] {
            let found = cluster(&items, &Ahc { min_speakers, max_speakers, ..FREE });
            assert_eq!(found, expected, "{min_speakers} {max_speakers:?}");
        }
    }

    #[test]
    fn who_says_little_goes_to_the_nearest() {
        let mut items = at(&[0.0, 180.0, 130.0]);
        items[2].weight_ms = 200;
        assert_eq!(cluster(&items, &FREE), [0, 1, 2]);
        assert_eq!(cluster(&items, &Ahc { least_ms: 500, ..FREE }), [0, 1, 1]);
        // A small one does not use up one of the allowed people.
        assert_eq!(cluster(&items, &Ahc { least_ms: 500, max_speakers: Some(2), ..FREE }), [0, 1, 1]);
        // Where nobody says enough, somebody still speaks.
        assert_eq!(cluster(&items, &Ahc { least_ms: 5_000, ..FREE }), [0, 0, 0]);
        assert_eq!(cluster(&items, &Ahc { least_ms: 5_000, min_speakers: 2, ..FREE }), [0, 1, 1]);
    }

    #[test]
    fn heavier_speech_pulls_harder() {
        // 40 degrees lies between; the heavy cluster's centre stays near 0, so 75 is beyond the threshold of all three.
        let mut items = at(&[0.0, 40.0, 75.0]);
        items[0].weight_ms = 100_000;
        assert_eq!(cluster(&items, &FREE), [0, 1, 1]);
        let mut items = at(&[0.0, 40.0, 84.0]);
        items[1].weight_ms = 100_000;
        assert_eq!(cluster(&items, &Ahc { threshold: 0.35, ..FREE }), [0, 0, 0]);
    }

    #[test]
    fn little_speech_leaves_doubt_and_much_leaves_none() {
        // 53 degrees are 0.4 apart.
        let mut items = at(&[0.0, 53.0]);
        let doubtful = Ahc { doubt_ms: 300.0, ..FREE };
        assert_eq!(cluster(&items, &FREE), [0, 1]);
        assert_eq!(cluster(&items, &doubtful), [0, 0]);
        items.iter_mut().for_each(|item| item.weight_ms = 20_000);
        assert_eq!(cluster(&items, &doubtful), [0, 1]);
        // A moment is heard as half a second, not as nothing.
        let mut items = at(&[0.0, 180.0]);
        items.iter_mut().for_each(|item| item.weight_ms = 0);
        assert_eq!(cluster(&items, &Ahc { doubt_ms: 400.0, ..FREE }), [0, 1]);
    }

    #[test]
    fn thousands_are_clustered_in_parts() {
        let degrees: Vec<f32> = (0..5_000).map(|i| (i % 3) as f32 * 100.0 + (i % 7) as f32).collect();
        let found = cluster(&at(&degrees), &FREE);
        assert!(found.iter().enumerate().all(|(i, c)| *c == i % 3));
    }

    proptest! {
        #[test]
        fn numbers_are_in_order_and_within_limits(
            degrees in prop::collection::vec(0f32..360.0, 1..40),
            min_speakers in 1usize..5,
            extra in 0usize..4,
            least_ms in prop::sample::select(vec![0u64, 500, 2_500]),
        ) {
            let items = at(&degrees);
            let most = min_speakers + extra;
            let ahc = Ahc { threshold: 0.2, doubt_ms: 0.0, min_speakers, max_speakers: Some(most), least_ms };
            let found = cluster(&items, &ahc);
            let count = found.iter().max().unwrap() + 1;
            prop_assert_eq!(in_order(&found), found.clone());
            prop_assert!(count <= most && count >= min_speakers.min(items.len()).min(most), "{} people", count);
            prop_assert_eq!(cluster(&items, &ahc), found);
        }

        #[test]
        fn without_limits_clusters_lie_apart(degrees in prop::collection::vec(0f32..360.0, 1..40)) {
            let items = at(&degrees);
            let found = cluster(&items, &FREE);
            let sums = gathered(&items, &found);
            for (i, a) in sums.iter().enumerate() {
                prop_assert!(sums[..i].iter().all(|b| cosine_distance(&a.vector, &b.vector) > FREE.threshold));
            }
        }
    }
}
