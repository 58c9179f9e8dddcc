//! How far a job is: a bar on a terminal, a line now and then in a pipe, on standard error.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use voxfleet_schema::{
    failure::Failure,
    job::{JobProgress, JobStage, JobState, JobStatus},
    transcript::Partial,
};

use crate::transcript::line::clock;

/// A pipe is told this often at most, unless something happens.
const EVERY: Duration = Duration::from_secs(5);
const STEP_PERCENT: u64 = 10;

/// What is known of a job that has not ended.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Known {
    state: Option<JobState>,
    gpu: Option<String>,
    progress: Option<JobProgress>,
    ahead: Option<u32>,
    why: Option<String>,
    attempts: u32,
    error: Option<Failure>,
    /// Epoch of what `progress` says: an older worker's word counts no more.
    epoch: u64,
    /// Nobody answers; what was known may be old.
    silent: bool,
}

impl Known {
    pub(crate) fn status(&mut self, status: &JobStatus) {
        let record = &status.record;
        if record.epoch > self.epoch {
            // A new try begins where the last final ends, and says so itself.
            (self.epoch, self.progress) = (record.epoch, None);
        }
        self.state = Some(record.state);
        self.gpu = record.worker.as_ref().filter(|_| record.state == JobState::Assigned).map(|w| w.gpu_id.to_string());
        (self.ahead, self.why) = (status.ahead, status.why.clone());
        (self.attempts, self.error) = (record.attempts, record.error.clone());
        self.silent = false;
        if let Some(progress) = status.progress {
            self.progressed(progress);
        }
    }

    pub(crate) fn partial(&mut self, partial: &Partial) {
        if partial.epoch < self.epoch {
            return;
        }
        (self.epoch, self.state) = (partial.epoch, Some(JobState::Assigned));
        self.gpu = Some(partial.gpu_id.to_string());
        if let Some(progress) = partial.progress {
            self.progressed(progress);
        }
    }

    pub(crate) fn nobody_answers(&mut self) {
        self.silent = true;
    }

    fn progressed(&mut self, new: JobProgress) {
        // Of two words of one worker the one that is further on is the newer.
        let older = self
            .progress
            .is_some_and(|p| p.done_ms > new.done_ms || (p.stage != new.stage && rank(p.stage) > rank(new.stage)));
        if !older {
            self.progress = Some(new);
        }
    }

    fn fraction(&self) -> Option<f64> {
        self.progress.filter(|_| self.state == Some(JobState::Assigned)).and_then(JobProgress::fraction)
    }

    /// Something else than more of the same: told at once.
    fn phase(&self) -> (Option<JobState>, Option<JobStage>, Option<&str>, u32, bool) {
        (self.state, self.progress.map(|p| p.stage), self.gpu.as_deref(), self.attempts, self.silent)
    }

    /// `transcribing 42 % (01:02.3 of 02:28.0) on gpu-1`.
    pub(crate) fn line(&self) -> String {
        let mut line = match (self.state, self.progress) {
            (None, _) => "submitted".to_owned(),
            (Some(JobState::Assigned), Some(progress)) => stage(progress),
            (Some(JobState::Assigned), None) => "given to a worker".to_owned(),
            (Some(state), _) => state.as_str().to_owned(),
        };
        if let Some(gpu) = &self.gpu {
            line.push_str(&format!(" on {gpu}"));
        }
        match self.ahead {
            Some(1) => line.push_str(", one job before it"),
            Some(jobs) if jobs > 1 => line.push_str(&format!(", {jobs} jobs before it")),
            _ => {}
        }
        if let Some(why) = &self.why {
            line.push_str(&format!(": {why}"));
        }
        if let Some(error) = self.error.as_ref().filter(|_| self.attempts > 0) {
            line.push_str(&format!(" (try {} ended with {error})", self.attempts));
        }
        if self.silent {
            line.push_str("; no dispatcher answers just now");
        }
        line
    }
}

fn rank(stage: JobStage) -> u8 {
    match stage {
        JobStage::Unknown => 0,
        JobStage::Fetching => 1,
        JobStage::Transcribing => 2,
        JobStage::Finishing => 3,
    }
}

fn stage(progress: JobProgress) -> String {
    match (progress.stage, progress.fraction(), progress.total_ms) {
        (JobStage::Fetching, _, _) => "fetching the recording".to_owned(),
        (JobStage::Finishing, _, _) => "writing the result".to_owned(),
        (_, Some(fraction), Some(total)) => {
            let percent = percent(fraction);
            format!("transcribing {percent} % ({} of {})", clock(progress.done_ms.min(total)), clock(total))
        }
        (_, _, _) => format!("transcribing ({} done)", clock(progress.done_ms)),
    }
}

/// Whole, and 100 only when nothing is left.
pub(crate) fn percent(fraction: f64) -> u64 {
    (fraction * 100.0).floor() as u64
}

/// When a pipe is told again. Pure.
#[derive(Debug, Default)]
struct Pace {
    told: Option<(Instant, Known)>,
}

impl Pace {
    fn due(&mut self, now: Instant, known: &Known) -> bool {
        let steps = |known: &Known| known.fraction().map_or(0, |f| percent(f) / STEP_PERCENT);
        let due = match &self.told {
            None => true,
            Some((_, told)) if told.phase() != known.phase() || steps(told) != steps(known) => true,
            Some((at, told)) => now.duration_since(*at) >= EVERY && told.line() != known.line(),
        };
        if due {
            self.told = Some((now, known.clone()));
        }
        due
    }
}

/// Where progress is shown.
pub(crate) struct Show {
    bar: Option<ProgressBar>,
    pace: Pace,
    quiet: bool,
}

const UNITS: u64 = 1_000;

impl Show {
    pub(crate) fn new(quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(UNITS).with_style(style("{spinner} {msg} {elapsed}"));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, pace: Pace::default(), quiet }
    }

    pub(crate) fn known(&mut self, known: &Known) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(known.line());
                if let Some(fraction) = known.fraction() {
                    bar.set_style(style("{msg} {wide_bar:.cyan/dim} {elapsed}"));
                    bar.set_position((fraction * UNITS as f64) as u64);
                } else {
                    bar.set_style(style("{spinner} {msg} {elapsed}"));
                }
            }
            None if self.quiet => {}
            None if self.pace.due(Instant::now(), known) => eprintln!("{}", known.line()),
            None => {}
        }
    }

    /// A line that stays, above the bar.
    pub(crate) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Show {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn status(state: &str, epoch: u64, extra: serde_json::Value) -> JobStatus {
        let mut value = json!({"record": {
            "id": "j", "state": state, "audio": "https://h/a", "options": {}, "result_ttl_s": 60, "epoch": epoch,
            "attempts": epoch, "submitted_ms": 0, "changed_ms": 0, "worker": {"gpu_id": "gpu-1", "incarnation": "i"},
        }});
        let fields = extra.as_object().cloned().unwrap_or_default();
        fields.into_iter().for_each(|(name, field)| value[name] = field);
        serde_json::from_value(value).expect("a status")
    }

    fn at(stage: &str, done_ms: u64) -> serde_json::Value {
        json!({"progress": {"stage": stage, "done_ms": done_ms, "total_ms": 100_000}})
    }

    fn known(statuses: &[JobStatus]) -> Known {
        let mut known = Known::default();
        statuses.iter().for_each(|s| known.status(s));
        known
    }

    #[test]
    fn a_line_says_where_it_is_and_why() {
        let queued = status("queued", 0, json!({"ahead": 3, "why": "every slot is taken"}));
        let cases = [
            (known(&[]), "submitted"),
            (known(&[queued]), "queued, 3 jobs before it: every slot is taken"),
            (known(&[status("assigned", 1, json!({}))]), "given to a worker on gpu-1"),
            (known(&[status("assigned", 1, at("fetching", 0))]), "fetching the recording on gpu-1"),
            (
                known(&[status("assigned", 1, at("transcribing", 42_900))]),
                "transcribing 42 % (00:42.9 of 01:40.0) on gpu-1",
            ),
            (known(&[status("assigned", 1, at("finishing", 100_000))]), "writing the result on gpu-1"),
            (known(&[status("closing", 1, json!({}))]), "closing"),
        ];
        for (known, line) in cases {
            assert_eq!(known.line(), line);
        }
        let mut silent = known(&[status("queued", 0, json!({}))]);
        silent.nobody_answers();
        assert_eq!(silent.line(), "queued; no dispatcher answers just now");
    }

    #[test]
    fn progress_goes_forward_until_another_try() {
        let (far, near) =
            (status("assigned", 1, at("transcribing", 50_000)), status("assigned", 1, at("transcribing", 20_000)));
        assert_eq!(known(&[far.clone(), near.clone()]).fraction(), Some(0.5));
        assert_eq!(known(&[far.clone(), status("assigned", 1, at("fetching", 50_000))]).fraction(), Some(0.5));
        assert_eq!(known(&[far.clone(), status("assigned", 2, at("transcribing", 20_000))]).fraction(), Some(0.2));
        assert_eq!(known(&[far, status("queued", 1, json!({}))]).fraction(), None);
    }

    #[test]
    fn a_pipe_is_told_what_is_new() {
        let now = Instant::now();
        let after = |s| now + Duration::from_secs(s);
        let mut pace = Pace::default();
        let queued = known(&[status("queued", 0, json!({}))]);
        let at = |done_ms| known(&[status("assigned", 1, at("transcribing", done_ms))]);
        assert!(pace.due(now, &queued));
        assert!(!pace.due(after(60), &queued), "nothing new");
        assert!(pace.due(after(60), &at(1_000)), "a new phase");
        assert!(!pace.due(after(61), &at(2_000)));
        assert!(pace.due(after(61), &at(10_000)), "ten percent");
        assert!(!pace.due(after(65), &at(12_000)));
        assert!(pace.due(after(66), &at(12_000)), "five seconds");
        assert_eq!((percent(0.999), percent(1.0)), (99, 100));
    }
}
