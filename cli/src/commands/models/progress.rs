//! A pull as it is shown on standard error: a bar on a terminal, a line now and then in a pipe.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use voxfleet_store::models::Step;

/// Longest silence in a pipe while something comes.
const SILENCE: Duration = Duration::from_secs(5);

pub(super) struct Progress<'a> {
    name: &'a str,
    bar: Option<ProgressBar>,
    pace: Pace,
}

impl<'a> Progress<'a> {
    pub(super) fn new(name: &'a str) -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::new_spinner);
        Self { name, bar, pace: Pace::new(Instant::now()) }
    }

    pub(super) fn step(&mut self, step: &Step<'_>) {
        let name = self.name;
        match step {
            Step::Waiting => self.line(&format!("{name}: another process is pulling it, waiting for it")),
            Step::Checking { file, bytes } => {
                self.line(&format!("{name}: {file} is here, reading its {} to be sure", megabytes(*bytes)));
            }
            Step::Damaged { file } => self.line(&format!("{name}: {file} is damaged and is fetched again")),
            Step::Evicted(removed) => {
                let (other, free) = (&removed.name, megabytes(removed.bytes));
                self.line(&format!("{name}: {other} was not used for the longest time; removed, {free} free again"));
            }
            Step::Broken { failure, .. } => self.line(&format!("{name}: {}; going on in a moment", failure.message)),
            Step::Failed { url, failure } if failure.message.starts_with(*url) => {
                self.line(&format!("{name}: {}", failure.message));
            }
            Step::Failed { url, failure } => self.line(&format!("{name}: {url}: {}", failure.message)),
            Step::Begun { url, from, total, .. } => {
                let from = if *from > 0 { format!(", going on at {}", megabytes(*from)) } else { String::new() };
                let size = total.map(|total| format!(" ({})", megabytes(total))).unwrap_or_default();
                self.line(&format!("{name}: from {url}{size}{from}"));
                self.pace = Pace::new(Instant::now());
                if let Some(bar) = &self.bar {
                    bar.set_length(total.unwrap_or_default());
                    bar.set_style(style(total.is_some()));
                }
            }
            Step::Got { bytes, total } => match &self.bar {
                Some(bar) => bar.set_position(*bytes),
                None if self.pace.is_due(Instant::now(), *bytes, *total) => {
                    eprintln!("{name}: {}", share(*bytes, *total))
                }
                None => {}
            },
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    pub(super) fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(sized: bool) -> ProgressStyle {
    let template = match sized {
        true => "{wide_bar:.cyan/dim} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        false => "{spinner} {bytes} {bytes_per_sec}",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn share(bytes: u64, total: Option<u64>) -> String {
    match total.filter(|total| *total > 0) {
        Some(total) => {
            format!("{} % ({} of {})", bytes.saturating_mul(100) / total, megabytes(bytes), megabytes(total))
        }
        None => megabytes(bytes),
    }
}

pub(super) fn megabytes(bytes: u64) -> String {
    match bytes as f64 / 1e6 {
        mb if mb >= 1e3 => format!("{:.2} GB", mb / 1e3),
        mb => format!("{mb:.1} MB"),
    }
}

/// When the next line is due: each tenth, and each five seconds.
struct Pace {
    tenth: u64,
    last: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { tenth: 0, last: now }
    }

    fn is_due(&mut self, now: Instant, bytes: u64, total: Option<u64>) -> bool {
        let tenth = total.filter(|total| *total > 0).map_or(0, |total| bytes.saturating_mul(10) / total);
        let due = tenth > self.tenth || now.duration_since(self.last) >= SILENCE;
        if due {
            (self.tenth, self.last) = (tenth.max(self.tenth), now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_each_tenth_and_each_five_seconds() {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        let at = |s| begun + Duration::from_secs(s);
        let due: Vec<bool> = [(0, 5), (1, 9), (1, 10), (2, 15), (5, 16), (6, 16), (7, 39), (7, 40), (8, 100)]
            .map(|(s, bytes)| pace.is_due(at(s), bytes, Some(100)))
            .to_vec();
        assert_eq!(due, [false, false, true, false, false, true, true, true, true]);
        let mut unknown = Pace::new(begun);
        assert!(!unknown.is_due(at(4), 1 << 40, None) && unknown.is_due(at(5), 1 << 40, None));
        assert!(!Pace::new(begun).is_due(at(0), 0, Some(0)));
    }

    #[test]
    fn sizes_are_told_in_decimal_units() {
        assert_eq!(megabytes(32_166_155), "32.2 MB");
        assert_eq!(megabytes(3_095_033_483), "3.10 GB");
        assert_eq!(share(50, Some(200)), "25 % (0.0 MB of 0.0 MB)");
        assert_eq!(share(1_500_000, None), "1.5 MB");
    }
}
