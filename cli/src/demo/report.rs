//! What the demo found: transcript beside reference, word error rates, lag.

use serde_json::{Value, json};
use voxfleet_eval::{
    Edits,
    align::{Beside, beside},
    text::{Normalise, compare},
};
use voxfleet_harness::fleet::Fleet;

use super::{
    Live, Recorded,
    call::{Call, Offline},
};
use crate::transcript::{line::Paint, screen::out};

/// Widest reference column.
const COLUMN: usize = 72;

pub(crate) fn processes(fleet: &Fleet) -> String {
    let pids = |pids: Vec<u32>| pids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    format!(
        "nats-server ({}), dispatcher (pid {}), workers (pids {})",
        fleet.url(),
        pids(fleet.dispatchers.iter().map(|d| d.pid()).collect()),
        pids(fleet.workers.iter().map(|w| w.pid()).collect()),
    )
}

/// The value at this share of the sorted list.
pub(crate) fn quantile(values: &[u64], share: f64) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let at = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
    sorted.get(at).copied()
}

/// Everything the demo measured.
pub(crate) struct Found<'a> {
    pub(crate) call: &'a Call,
    pub(crate) speed: f64,
    pub(crate) live: &'a Live,
    pub(crate) job: &'a Recorded,
    pub(crate) offline: &'a Offline,
}

impl Found<'_> {
    fn errors(&self) -> (Edits, Edits) {
        let reference = self.call.reference();
        (compare(&reference, &self.live.text()), compare(&reference, &self.job.result.full_text))
    }

    /// `wer` is the worse of the two ways through the fleet.
    pub(crate) fn object(&self) -> Value {
        let Found { call, speed, live, job, offline } = self;
        let (of_live, of_job) = self.errors();
        let gpus: std::collections::BTreeSet<&str> = live.finals.iter().map(|f| f.gpu_id.as_str()).collect();
        json!({
            "wer": of_live.rate().max(of_job.rate()),
            "live": {
                "wer": of_live.rate(),
                "errors": counts(of_live),
                "finals": live.finals.len(),
                "final_lag_p50_ms": quantile(&live.lags_ms, 0.5),
                "final_lag_p95_ms": quantile(&live.lags_ms, 0.95),
                "wall_s": live.wall.as_secs_f64(),
                "text": live.text(),
                "gpu_ids": gpus,
            },
            "job": {
                "wer": of_job.rate(),
                "errors": counts(of_job),
                "wall_s": job.wall.as_secs_f64(),
                "realtime_factor": job.result.performance_metrics.realtime_factor,
                "text": job.result.full_text,
                "same_text": job.result.full_text == offline.text,
                "gpu_id": job.gpu,
            },
            "offline": {
                "wer": offline.errors.rate(),
                "errors": counts(offline.errors),
                "wall_s": offline.seconds,
                "same_text": offline.text == live.text(),
            },
            "call": call.name,
            "audio_s": call.seconds(),
            "speed": speed,
            "model": live.finals.first().map(|f| &f.model),
            "engine": live.finals.first().map(|f| &f.engine),
            "device": live.finals.first().map(|f| &f.device),
            "vad": live.finals.first().map(|f| f.vad.as_str()),
        })
    }

    pub(crate) fn print(&self, paint: Paint) -> std::io::Result<()> {
        let Found { call, speed, live, job, offline } = self;
        let (of_live, of_job) = self.errors();
        out("")?;
        let column = call.lines.iter().map(|l| l.chars().count()).max().unwrap_or(0).clamp(13, COLUMN);
        out(&paint.bold(&format!("{:<column$}  {}", "what was said", "what was heard")))?;
        let heard = Normalise::Basic.words(&live.text());
        let words: Vec<_> = call.lines.iter().map(|line| Normalise::Basic.words(line)).collect();
        for (line, beside) in call.lines.iter().zip(beside(&words, &heard)) {
            out(&row(line, &beside, column, paint))?;
        }
        out("")?;
        let same = |text: &str| if offline.text == text { "the same text" } else { "another text" };
        out(&format!("live:    {}", rate(of_live, paint)))?;
        out(&format!(
            "job:     {}, the same call as a file on {}: {:.1} s from the upload to the result",
            rate(of_job, paint),
            job.gpu.as_deref().unwrap_or("a worker"),
            job.wall.as_secs_f64()
        ))?;
        out(&format!(
            "offline: {}, the same engine called directly, {:.1} s for {:.1} s of audio: live {}, job {}",
            rate(offline.errors, paint),
            offline.seconds,
            call.seconds(),
            same(&live.text()),
            same(&job.result.full_text)
        ))?;
        if let (Some(p50), Some(p95)) = (quantile(&live.lags_ms, 0.5), quantile(&live.lags_ms, 0.95)) {
            out(&format!(
                "lag:     finals came {:.1} s (median) and {:.1} s (95th percentile) after their last sound, at {speed} x real time",
                p50 as f64 / 1000.0,
                p95 as f64 / 1000.0
            ))?;
        }
        if let Some(f) = live.finals.first() {
            out(&format!("engine:  {} {} on {}, speech found by {}", f.engine, f.model, f.device, f.vad.as_str()))?;
        }
        Ok(())
    }
}

fn counts(errors: Edits) -> Value {
    json!({
        "reference_words": errors.reference, "substituted": errors.substituted, "deleted": errors.deleted,
        "inserted": errors.inserted,
    })
}

fn rate(errors: Edits, paint: Paint) -> String {
    let text = format!(
        "word error rate {:.1} % ({} of {} words: {} wrong, {} missed, {} invented)",
        errors.rate() * 100.0,
        errors.edits(),
        errors.reference,
        errors.substituted,
        errors.deleted,
        errors.inserted
    );
    if errors.rate() <= 0.02 { paint.green(&text) } else { paint.yellow(&text) }
}

/// Wrong words stand in brackets, so that they show without colour too.
fn row(said: &str, line: &Beside, column: usize, paint: Paint) -> String {
    let words: Vec<String> =
        line.heard.iter().map(|h| if h.right { h.word.clone() } else { paint.red(&format!("[{}]", h.word)) }).collect();
    let missed = if line.missed == 0 { String::new() } else { paint.red(&format!("  (-{})", line.missed)) };
    let reference: String = said.chars().take(column).collect();
    format!("{reference:<column$}  {}{missed}", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values = [40, 10, 30, 20];
        assert_eq!((quantile(&values, 0.5), quantile(&values, 0.95)), (Some(20), Some(40)));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn errors_show_without_colour() {
        let said = "good morning anna";
        let lines = beside(&[Normalise::Basic.words(said)], &Normalise::Basic.words("good mourning"));
        assert!(row(said, &lines[0], 20, Paint { colour: false }).ends_with("good [mourning]  (-1)"));
    }
}
