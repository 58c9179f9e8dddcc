//! Which of one side is which of the other, so that together they have most in common.

/// For each row the column it is given, or none. Of all one-to-one choices the sum of `gain` is largest; a pair without
/// gain is no pair. The Hungarian method with potentials (Kuhn 1955; Jonker and Volgenant's shortest augmenting paths),
/// cubic in the number of rows or columns.
pub fn best(gain: &[Vec<f64>]) -> Vec<Option<usize>> {
    let rows = gain.len();
    let columns = gain.iter().map(Vec::len).max().unwrap_or(0);
    let size = rows.max(columns);
    let cost = |row: usize, column: usize| -gain.get(row).and_then(|r| r.get(column)).copied().unwrap_or(0.0);
    // Index 0 is nobody, as in the textbook: rows and columns count from 1.
    let (mut of_rows, mut of_columns) = (vec![0.0; size + 1], vec![0.0; size + 1]);
    let mut row_of = vec![0usize; size + 1];
    for row in 1..=size {
        row_of[0] = row;
        let mut column = 0;
        let mut slack = vec![f64::INFINITY; size + 1];
        let (mut came_from, mut used) = (vec![0usize; size + 1], vec![false; size + 1]);
        while row_of[column] != 0 {
            used[column] = true;
            let (here, mut step, mut next) = (row_of[column], f64::INFINITY, 0);
            for to in (1..=size).filter(|to| !used[*to]) {
                let reduced = cost(here - 1, to - 1) - of_rows[here] - of_columns[to];
                if reduced < slack[to] {
                    (slack[to], came_from[to]) = (reduced, column);
                }
                if slack[to] < step {
                    (step, next) = (slack[to], to);
                }
            }
            for to in 0..=size {
                if used[to] {
                    of_rows[row_of[to]] += step;
                    of_columns[to] -= step;
                } else {
                    slack[to] -= step;
                }
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[came_from[column]];
            column = came_from[column];
        }
    }
    let mut chosen = vec![None; rows];
    for (column, row) in row_of.iter().enumerate().skip(1) {
        if *row >= 1 && *row <= rows && -cost(row - 1, column - 1) > 0.0 {
            chosen[row - 1] = Some(column - 1);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn total(gain: &[Vec<f64>], chosen: &[Option<usize>]) -> f64 {
        chosen.iter().enumerate().filter_map(|(row, column)| Some(gain[row][(*column)?])).sum()
    }

    /// By trying everything.
    fn most(gain: &[Vec<f64>], row: usize, taken: &mut Vec<bool>) -> f64 {
        if row == gain.len() {
            return 0.0;
        }
        let mut best = most(gain, row + 1, taken);
        for column in 0..taken.len() {
            if !taken[column] {
                taken[column] = true;
                best = best.max(gain[row][column] + most(gain, row + 1, taken));
                taken[column] = false;
            }
        }
        best
    }

    #[test]
    fn greed_is_not_best() {
        let gain = vec![vec![10.0, 9.0], vec![9.0, 1.0]];
        assert_eq!(best(&gain), [Some(1), Some(0)]);
        assert_eq!(best(&[vec![0.0, 3.0, 0.0]]), [Some(1)]);
        assert_eq!(best(&[vec![0.0], vec![2.0], vec![1.0]]), [None, Some(0), None]);
        assert_eq!(best(&[]), []);
        assert_eq!(best(&[vec![], vec![]]), [None, None]);
    }

    proptest! {
        #[test]
        fn nothing_is_better(rows in 0usize..6, columns in 0usize..6, cells in prop::collection::vec(0u8..20, 36)) {
            let gain: Vec<Vec<f64>> =
                (0..rows).map(|r| (0..columns).map(|c| f64::from(cells[r * 6 + c])).collect()).collect();
            let chosen = best(&gain);
            let mut columns_used: Vec<_> = chosen.iter().flatten().collect();
            columns_used.sort_unstable();
            columns_used.dedup();
            prop_assert_eq!(columns_used.len(), chosen.iter().flatten().count(), "one to one");
            let expected = most(&gain, 0, &mut vec![false; columns]);
            prop_assert!((total(&gain, &chosen) - expected).abs() < 1e-9);
        }
    }
}
