//! A card's memory as a row of characters.

/// Widest row that is written, label and figure included.
pub(super) const COLUMNS: usize = 80;
/// Longer names are cut.
const LABEL: usize = 20;

pub(super) const LEGEND: &str = "T tenants  C context  W weights  S decode states  B sessions  . free  r reserve";

/// Something on a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) sign: char,
    pub(super) mb: u64,
}

/// One card, or one way of filling it.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) label: String,
    pub(super) total_mb: u64,
    /// What lies beyond is the reserve.
    pub(super) safe_mb: u64,
    pub(super) stretches: Vec<Stretch>,
}

impl Row {
    fn used_mb(&self) -> u64 {
        self.stretches.iter().fold(0, |sum, s| sum.saturating_add(s.mb))
    }

    fn percent(&self) -> u64 {
        (self.used_mb() as f64 / self.total_mb.max(1) as f64 * 100.0).round() as u64
    }

    /// `cells` characters. Whatever is there shows, however small; whatever does not fit is cut off.
    fn cells(&self, cells: usize) -> String {
        let at = |mb: u64| (mb as f64 / self.total_mb.max(1) as f64 * cells as f64).round() as usize;
        let shown: Vec<&Stretch> = self.stretches.iter().filter(|s| s.mb > 0).collect();
        let mut widths: Vec<usize> = shown.iter().map(|s| at(s.mb).clamp(1, cells)).collect();
        let most = at(self.used_mb()).max(shown.len()).min(cells);
        // The widest can spare what rounding gave too much.
        while widths.iter().sum::<usize>() > most {
            match widths.iter_mut().max() {
                Some(widest) if *widest > 1 => *widest -= 1,
                _ => break,
            }
        }
        let used = shown.iter().zip(widths).flat_map(|(s, width)| std::iter::repeat_n(s.sign, width));
        let mut text: String = used.take(cells).collect();
        for cell in text.chars().count()..cells {
            text.push(if cell < at(self.safe_mb) { '.' } else { 'r' });
        }
        text
    }
}

/// Rows of one width, at most [`COLUMNS`] characters each.
pub(super) fn picture(rows: &[Row]) -> String {
    let label = |row: &Row| row.label.chars().take(LABEL).collect::<String>();
    let width = rows.iter().map(|row| label(row).chars().count()).max().unwrap_or(0);
    let cells = COLUMNS - width - " || 100 %".len();
    let line = |row: &Row| format!("{:<width$} |{}| {:>3} %\n", label(row), row.cells(cells), row.percent());
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(total_mb: u64, stretches: &[(char, u64)]) -> Row {
        let stretches = stretches.iter().map(|(sign, mb)| Stretch { sign: *sign, mb: *mb }).collect();
        Row { label: "x".to_owned(), total_mb, safe_mb: total_mb * 9 / 10, stretches }
    }

    #[test]
    fn a_row_is_as_wide_as_its_card() {
        for (total_mb, stretches, wanted) in [
            (100, &[][..], "..................rr"),
            (100, &[('T', 50), ('W', 25)], "TTTTTTTTTTWWWWW...rr"),
            (100, &[('T', 92)], "TTTTTTTTTTTTTTTTTTrr"),
            (100, &[('T', 95)], "TTTTTTTTTTTTTTTTTTTr"),
            (100, &[('T', 100)], "TTTTTTTTTTTTTTTTTTTT"),
            // Small things show, at the cost of the largest.
            (10_000, &[('T', 5_000), ('B', 1)], "TTTTTTTTTB........rr"),
            (100, &[('T', 0), ('W', 50)], "WWWWWWWWWW........rr"),
            // More than there is is cut off.
            (100, &[('T', 90), ('W', 50)], "TTTTTTTTTTWWWWWWWWWW"),
            (0, &[('T', 5)], "TTTTTTTTTTTTTTTTTTTT"),
        ] {
            assert_eq!(row(total_mb, stretches).cells(20), wanted, "{stretches:?}");
        }
        // More things than places.
        let many: Vec<(char, u64)> = std::iter::repeat_n(('T', 1), 9).collect();
        assert_eq!(row(9, &many).cells(4), "TTTT");
    }

    #[test]
    fn a_picture_fits_a_terminal() {
        let long = Row { label: "card-".repeat(20), ..row(100, &[('T', 50)]) };
        let text = picture(&[long, row(100, &[('T', 100), ('W', 100)])]);
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|line| line.chars().count() == COLUMNS), "{text}");
        assert!(text.lines().next().is_some_and(|line| line.ends_with("|  50 %")), "{text}");
        assert!(LEGEND.len() <= COLUMNS);
        assert_eq!(picture(&[]), "");
    }
}
