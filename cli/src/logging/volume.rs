//! How much is logged: a place in the code that says the same again and again, and all of them together, are bounded, and what
//! is left out is said.
//!
//! [`Quota`] decides and knows no clock; [`Volume`] stands between tracing and standard error.

use std::{
    collections::HashMap,
    hash::Hash,
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Metadata, Subscriber, callsite::Identifier};
use tracing_subscriber::{
    fmt::MakeWriter,
    layer::{Context, Filter},
};

/// Bounds are for this time; what was left out is said after it.
pub(crate) const EVERY: Duration = Duration::from_secs(10);

/// What may be written within [`EVERY`]; none = no bound.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// From one place in the code.
    pub(crate) lines: Option<u32>,
    /// In all.
    pub(crate) bytes: Option<usize>,
}

/// What was left out of one stretch of time.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LeftOut<Site> {
    /// By the place that said it too often.
    pub(crate) lines: Vec<(Site, u64)>,
    /// For want of room, from any place.
    pub(crate) beyond: u64,
}

/// Counts. `Site` is a place in the code.
#[derive(Debug)]
pub(crate) struct Quota<Site> {
    limits: Limits,
    since: Option<Duration>,
    lines: HashMap<Site, u64>,
    bytes: usize,
    beyond: u64,
    /// Of stretches that are over, and not said yet.
    left_out: LeftOut<Site>,
}

impl<Site: Eq + Hash + Clone> Quota<Site> {
    pub(crate) fn new(limits: Limits) -> Self {
        let left_out = LeftOut { lines: Vec::new(), beyond: 0 };
        Self { limits, since: None, lines: HashMap::new(), bytes: 0, beyond: 0, left_out }
    }

    /// Whether a line of this place is written.
    pub(crate) fn line(&mut self, site: Site, now: Duration) -> bool {
        self.roll(now);
        let Some(most) = self.limits.lines else { return true };
        let count = self.lines.entry(site).or_default();
        *count += 1;
        *count <= u64::from(most)
    }

    /// Whether there is room for a line of this length. The first of a stretch always has it.
    pub(crate) fn room(&mut self, bytes: usize, now: Duration) -> bool {
        self.roll(now);
        let fits = self.limits.bytes.is_none_or(|most| self.bytes == 0 || self.bytes + bytes <= most);
        if fits {
            self.bytes += bytes;
        } else {
            self.beyond += 1;
        }
        fits
    }

    /// What was left out of stretches that are over.
    pub(crate) fn left_out(&mut self, now: Duration) -> Option<LeftOut<Site>> {
        self.roll(now);
        let found = std::mem::replace(&mut self.left_out, LeftOut { lines: Vec::new(), beyond: 0 });
        (!found.lines.is_empty() || found.beyond > 0).then_some(found)
    }

    /// The stretch is over now, whatever its length.
    pub(crate) fn close(&mut self) {
        let most = self.limits.lines.map_or(u64::MAX, u64::from);
        for (site, count) in self.lines.drain() {
            let Some(more) = count.checked_sub(most).filter(|more| *more > 0) else { continue };
            match self.left_out.lines.iter_mut().find(|(other, _)| *other == site) {
                Some((_, sum)) => *sum += more,
                None => self.left_out.lines.push((site, more)),
            }
        }
        self.left_out.beyond += std::mem::take(&mut self.beyond);
        (self.bytes, self.since) = (0, None);
    }

    fn roll(&mut self, now: Duration) {
        if self.since.is_some_and(|since| now.saturating_sub(since) >= EVERY) {
            self.close();
        }
        self.since.get_or_insert(now);
    }
}

/// A place in the code; [`Identifier`] tells them apart, the rest is for people.
#[derive(Debug, Clone)]
pub(crate) struct Site(&'static Metadata<'static>);

impl Site {
    fn id(&self) -> Identifier {
        self.0.callsite()
    }
}

impl PartialEq for Site {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for Site {}

impl Hash for Site {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.id().hash(state);
    }
}

/// What is written to standard error. Clones share one quota.
#[derive(Debug, Clone)]
pub(crate) struct Volume {
    start: Instant,
    quota: Arc<Mutex<Quota<Site>>>,
}

impl Volume {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { start: Instant::now(), quota: Arc::new(Mutex::new(Quota::new(limits))) }
    }

    fn quota(&self) -> MutexGuard<'_, Quota<Site>> {
        // Counts are whole at every step.
        self.quota.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what was left out; `last`: of the time since, too.
    pub(crate) fn say(&self, last: bool) {
        let left_out = {
            let mut quota = self.quota();
            if last {
                quota.close();
            }
            quota.left_out(self.start.elapsed())
        };
        let Some(LeftOut { lines, beyond }) = left_out else { return };
        for (Site(place), lines) in lines {
            tracing::warn!(
                lines,
                level = %place.level(),
                module = place.module_path(),
                at = place.line(),
                "lines were left out, they came too often from one place (log.max_lines)"
            );
        }
        if beyond > 0 {
            tracing::warn!(lines = beyond, "lines were left out, there were too many in all (log.max_kb)");
        }
    }
}

impl<S: Subscriber> Filter<S> for Volume {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        self.quota().line(Site(event.metadata()), self.start.elapsed())
    }
}

impl<'a> MakeWriter<'a> for Volume {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self.clone())
    }
}

/// One line; tracing writes it whole.
pub(crate) struct Line(Volume);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.quota().room(bytes.len(), self.0.start.elapsed()) {
            io::stderr().lock().write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn quota(lines: u32, bytes: usize) -> Quota<&'static str> {
        Quota::new(Limits { lines: Some(lines).filter(|n| *n > 0), bytes: Some(bytes).filter(|n| *n > 0) })
    }

    #[test]
    fn a_place_says_so_much_in_a_stretch_and_others_are_not_its_victims() {
        let mut quota = quota(2, 0);
        let said: Vec<bool> = ["a", "a", "b", "a", "a", "b", "b"].map(|site| quota.line(site, at(1_000))).into();
        assert_eq!(said, [true, true, true, false, false, true, false]);
        assert_eq!(quota.left_out(at(10_999)), None, "the stretch is not over");
        let mut left_out = quota.left_out(at(11_000)).expect("it is");
        left_out.lines.sort_unstable();
        assert_eq!(left_out, LeftOut { lines: vec![("a", 2), ("b", 1)], beyond: 0 });
        assert_eq!(quota.left_out(at(11_000)), None, "said once");
        assert!(quota.line("a", at(11_001)) && quota.line("a", at(11_002)) && !quota.line("a", at(11_003)));
        // Nobody looked for two stretches.
        assert!(quota.line("a", at(21_003)) && quota.line("a", at(21_003)) && !quota.line("a", at(21_003)));
        assert_eq!(quota.left_out(at(99_000)), Some(LeftOut { lines: vec![("a", 2)], beyond: 0 }), "added up");
    }

    #[test]
    fn all_together_have_so_much_room() {
        let mut quota = quota(0, 100);
        let fits: Vec<bool> = [60, 60, 40, 1].map(|bytes| quota.room(bytes, at(5))).into();
        assert_eq!(fits, [true, false, true, false]);
        assert!((0..1_000).all(|_| quota.line("a", at(6))), "places are not bounded here");
        assert!(quota.room(1_000, at(10_005)), "a line that is longer than all that may be, alone");
        assert_eq!(quota.left_out(at(10_005)), Some(LeftOut { lines: vec![], beyond: 2 }));
        assert!(!quota.room(1, at(10_006)));
        quota.close();
        assert_eq!(quota.left_out(at(10_007)), Some(LeftOut { lines: vec![], beyond: 1 }), "at the end at once");
    }

    #[test]
    fn without_bounds_everything_is_said() {
        let mut quota = quota(0, 0);
        assert!((0..10_000).all(|n| quota.line("a", at(n)) && quota.room(1 << 20, at(n))));
        assert_eq!(quota.left_out(at(60_000)), None);
    }
}
