//! A line through points, by least squares. Pure.

/// What a figure did over its window.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Line {
    pub(super) per_s: f64,
    /// Standard error of that, as if each look were chance of its own.
    pub(super) error_per_s: f64,
    pub(super) first: f64,
    pub(super) last: f64,
    pub(super) most: f64,
    /// From the first look to the last.
    pub(super) seconds: f64,
    pub(super) count: usize,
}

/// Of points (s, value) in order of time.
pub(super) fn line(points: &[(f64, f64)]) -> Line {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Line::default() };
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (mean_t, mean_v) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = points.iter().map(|p| (p.0 - mean_t).powi(2)).sum();
    let together: f64 = points.iter().map(|p| (p.0 - mean_t) * (p.1 - mean_v)).sum();
    let per_s = if spread > 0.0 { together / spread } else { 0.0 };
    let off = |p: &(f64, f64)| (p.1 - mean_v - per_s * (p.0 - mean_t)).powi(2);
    let residual: f64 = points.iter().map(off).sum();
    let error_per_s = if spread > 0.0 && n > 2.0 { (residual / (n - 2.0) / spread).sqrt() } else { 0.0 };
    let most = points.iter().map(|p| p.1).fold(f64::MIN, f64::max);
    Line { per_s, error_per_s, first: first.1, last: last.1, most, seconds: last.0 - first.0, count: points.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slope_is_found_under_noise() {
        let points: Vec<(f64, f64)> = (0..300)
            .map(|n| (f64::from(n) * 2.0, 50.0 + f64::from(n) * 0.02 + f64::from(n * 7_919 % 13) - 6.0))
            .collect();
        let line = line(&points);
        assert!((line.per_s - 0.01).abs() < 3.0 * line.error_per_s + 1e-9 && line.per_s > 0.0, "{line:?}");
        assert_eq!((line.count, line.seconds), (300, 598.0));
    }

    #[test]
    fn an_exact_line_has_no_error_and_few_points_have_no_slope() {
        let exact = line(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]);
        assert_eq!((exact.per_s, exact.error_per_s, exact.most), (2.0, 0.0, 5.0));
        assert_eq!(line(&[(5.0, 7.0)]).per_s, 0.0);
        assert_eq!(line(&[]), Line::default());
    }
}
