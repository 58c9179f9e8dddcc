//! Whether the engine moves, and how fast it decodes.

use std::time::Duration;

use tokio::time::Instant;

/// Weight of what was measured before, at each report: about the last ten count.
const KEEP: f64 = 0.9;

#[derive(Debug, Default)]
pub(super) struct ProgressMeter {
    working: bool,
    /// Last report, or the moment work was first reported.
    moved_at: Option<Instant>,
    /// Totals of the last report.
    audio_ms: u64,
    busy_ms: u64,
    /// Decayed sums.
    recent_audio_ms: f64,
    recent_busy_ms: f64,
    rated_at: Option<Instant>,
    /// Time with work since the last final, counted until then.
    worked: Duration,
    counted_at: Option<Instant>,
    /// Decayed sums over finals: the audio they cover, and the time with work that they took.
    covered_ms: f64,
    worked_ms: f64,
    /// For how long a neighbour has had the device, as the child said last.
    neighbour_ms: u64,
    /// Since when an answer is awaited.
    asked_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reading {
    pub(super) ms_since_progress: u64,
    pub(super) decode_rate: Option<f32>,
    pub(super) decode_rate_age_ms: Option<u64>,
    /// Audio that finals cover, per time with work.
    pub(super) delivery_rate: Option<f32>,
    /// Of a neighbour that keeps the device for long; 0 = there is none.
    pub(super) neighbour_ms: u64,
}

/// A neighbour that takes its turn is none to speak of before this.
const LONG_TURN_MS: u64 = 5_000;

impl ProgressMeter {
    /// Takes a report; the figures are totals since the child's start.
    pub(super) fn progress(&mut self, now: Instant, _decodes: u64, audio_ms: u64, busy_ms: u64, working: bool) {
        let audio = audio_ms.saturating_sub(self.audio_ms);
        let busy = busy_ms.saturating_sub(self.busy_ms);
        (self.audio_ms, self.busy_ms) = (audio_ms, busy_ms);
        if busy > 0 {
            self.recent_audio_ms = self.recent_audio_ms * KEEP + audio as f64;
            self.recent_busy_ms = self.recent_busy_ms * KEEP + busy as f64;
            self.rated_at = Some(now);
        }
        self.works_until(now);
        self.working = working;
        self.moved_at = Some(now);
    }

    /// A final covers so much audio, silence included. Partials, decodes that are tried again and several that run at once
    /// are in [`Reading::decode_rate`]; here they are but time.
    pub(super) fn covered(&mut self, now: Instant, audio_ms: u64) {
        self.works_until(now);
        // Without work no time passes: finals of silence say nothing of the device.
        if !self.worked.is_zero() {
            self.covered_ms = self.covered_ms * KEEP + audio_ms as f64;
            self.worked_ms = self.worked_ms * KEEP + self.worked.as_secs_f64() * 1_000.0;
            self.worked = Duration::ZERO;
        }
    }

    /// Takes the time since the last report to what was worked.
    fn works_until(&mut self, now: Instant) {
        if let Some(since) = self.counted_at.replace(now).filter(|_| self.working) {
            self.worked += now.saturating_duration_since(since);
        }
    }

    /// A neighbour has kept the device for so long; told when that becomes long, and when it is over.
    pub(super) fn neighbour(&mut self, waited_ms: u64) {
        match (self.neighbour_ms >= LONG_TURN_MS, waited_ms >= LONG_TURN_MS) {
            (false, true) => {
                tracing::warn!(waited_ms, "the neighbour keeps the device's lock, nothing is decoded meanwhile")
            }
            (true, false) => {
                tracing::info!(waited_ms = self.neighbour_ms, "the neighbour has given the device's lock back")
            }
            _ => {}
        }
        self.neighbour_ms = waited_ms;
    }

    /// The child is asked for a sign of life.
    pub(super) fn asked(&mut self, now: Instant) {
        self.asked_at.get_or_insert(now);
    }

    /// It said something, whatever it was.
    pub(super) fn heard(&mut self) {
        self.asked_at = None;
    }

    /// Nobody listened for a while: silence until now says nothing.
    pub(super) fn forgive(&mut self, now: Instant) {
        self.asked_at = None;
        self.moved_at = self.moved_at.map(|_| now);
    }

    /// A new child starts from nothing; the rate stays, it is the device's.
    pub(super) fn reset(&mut self) {
        self.working = false;
        self.worked = Duration::ZERO;
        self.neighbour_ms = 0;
        self.moved_at = None;
        self.asked_at = None;
        (self.audio_ms, self.busy_ms) = (0, 0);
    }

    pub(super) fn is_working(&self) -> bool {
        self.working
    }

    pub(super) fn reading(&self, now: Instant) -> Reading {
        let age = |at: Instant| now.saturating_duration_since(at).min(Duration::from_secs(86_400)).as_millis() as u64;
        Reading {
            ms_since_progress: self.moved_at.filter(|_| self.working).map_or(0, age).max(self.asked_at.map_or(0, age)),
            decode_rate: (self.recent_busy_ms > 0.0).then(|| (self.recent_audio_ms / self.recent_busy_ms) as f32),
            decode_rate_age_ms: self.rated_at.map(age),
            neighbour_ms: if self.neighbour_ms < LONG_TURN_MS { 0 } else { self.neighbour_ms },
            delivery_rate: (self.worked_ms > 0.0).then(|| (self.covered_ms / self.worked_ms) as f32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stands_still_only_while_there_is_work() {
        let mut meter = ProgressMeter::default();
        let t0 = Instant::now();
        let at = |ms| t0 + Duration::from_millis(ms);
        assert_eq!(meter.reading(t0).ms_since_progress, 0);
        meter.progress(t0, 1, 1_000, 100, true);
        assert_eq!(meter.reading(at(5_000)).ms_since_progress, 5_000);
        meter.progress(at(5_000), 2, 2_000, 200, false);
        assert_eq!(meter.reading(at(9_000)).ms_since_progress, 0);
    }

    #[test]
    fn a_child_that_does_not_answer_stands_still_with_or_without_work() {
        let mut meter = ProgressMeter::default();
        let t0 = Instant::now();
        let at = |ms| t0 + Duration::from_millis(ms);
        meter.asked(t0);
        meter.asked(at(1_000));
        assert_eq!(meter.reading(at(3_000)).ms_since_progress, 3_000, "since it was asked first");
        meter.heard();
        assert_eq!(meter.reading(at(3_000)).ms_since_progress, 0);
        // Deaf in a decode, but its loop answers.
        meter.progress(at(4_000), 1, 0, 0, true);
        meter.asked(at(9_000));
        meter.heard();
        assert_eq!(meter.reading(at(10_000)).ms_since_progress, 6_000);
        // This process stood still itself.
        meter.asked(at(10_000));
        meter.forgive(at(60_000));
        assert_eq!(meter.reading(at(60_500)).ms_since_progress, 500);
    }

    #[test]
    fn what_is_delivered_is_what_finals_cover_in_the_time_with_work() {
        let mut meter = ProgressMeter::default();
        let t0 = Instant::now();
        let at = |ms| t0 + Duration::from_millis(ms);
        let delivered =
            |meter: &ProgressMeter| meter.reading(t0).delivery_rate.map(|rate| (rate * 10.0).round() / 10.0);
        meter.covered(at(0), 30_000);
        assert_eq!(delivered(&meter), None, "silence without a decode");
        // An utterance of 6 s with partials of 2, 4 and 6 s, each decode 300 ms, beside each other with another session.
        meter.progress(at(1_000), 0, 0, 0, true);
        for n in 1..=4u64 {
            meter.progress(at(1_000 + n * 300), n, n * 4_000, n * 300, n < 4);
        }
        meter.covered(at(9_000), 6_000);
        assert_eq!(delivered(&meter), Some(5.0), "6 s in 1.2; what was decoded for partials does not count");
        assert!(meter.reading(t0).decode_rate.expect("rate") > 13.0);
        meter.covered(at(20_000), 60_000);
        assert_eq!(delivered(&meter), Some(5.0));
    }

    #[test]
    fn a_neighbour_s_turn_is_told_when_it_is_long() {
        let mut meter = ProgressMeter::default();
        let mut seen = |waited_ms| {
            meter.neighbour(waited_ms);
            meter.reading(Instant::now()).neighbour_ms
        };
        assert_eq!([0, 2_000, 4_999, 5_000, 61_000, 0].map(&mut seen), [0, 0, 0, 5_000, 61_000, 0]);
        meter.neighbour(9_000);
        meter.reset();
        assert_eq!(meter.reading(Instant::now()).neighbour_ms, 0, "who died waits for nobody");
    }

    #[test]
    fn the_rate_is_audio_per_busy_time() {
        let mut meter = ProgressMeter::default();
        let t0 = Instant::now();
        assert_eq!(meter.reading(t0).decode_rate, None);
        for n in 1..=50 {
            meter.progress(t0, n, n * 1_000, n * 100, true);
        }
        let rate = meter.reading(t0 + Duration::from_millis(70));
        assert!((rate.decode_rate.expect("rate") - 10.0).abs() < 0.01);
        assert_eq!(rate.decode_rate_age_ms, Some(70));
        meter.reset();
        meter.progress(t0, 1, 500, 100, true);
        let slower = meter.reading(t0).decode_rate.expect("rate");
        assert!(slower < 10.0 && slower > 5.0, "{slower}");
    }
}
