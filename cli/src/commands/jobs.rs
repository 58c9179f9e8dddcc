//! `voxfleet jobs`: recordings being transcribed.

use std::{cell::Cell, io::IsTerminal as _, time::Duration};

use serde_json::json;
use voxfleet_nats::Nats;
use voxfleet_schema::{
    id::StreamId,
    job::{AudioUrl, JobList, JobListRequest, JobRecord, JobState, JobStatus, JobSummary},
};

use super::{close, dead, need_jetstream, status::table};
use crate::{
    Context,
    args::{JobArg, JobsArgs, JobsCommand, ListArgs, ResultArgs, SubmitArgs},
    deliver::{check, deliver},
    exit::{Exit, OrExit as _},
    file_job::{
        Step, Wish, ask,
        outcome::{self, Ended},
        progress::{Known, percent},
    },
    formats::Document,
    plain::plain,
    transcript::{
        line::clock,
        screen::{object, out},
    },
};

const REDRAW: Duration = Duration::from_secs(2);
/// Clears a terminal and puts the cursor into its corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

pub(crate) async fn run(args: &JobsArgs, context: &Context) -> anyhow::Result<Exit> {
    if let JobsCommand::Result(args) = &args.what {
        check(&args.file)?;
    }
    // Typed wrong is told before anything is asked.
    let wish = match &args.what {
        JobsCommand::Submit(args) => Some(Wish::of(&args.job)?),
        _ => None,
    };
    let (nats, _) = context.client("voxfleet-jobs").await?;
    let answer = async {
        need_jetstream(&nats).await?;
        match (&args.what, &wish) {
            (JobsCommand::Submit(args), Some(wish)) => submit(args, wish, &nats, context).await,
            (JobsCommand::Submit(_), None) => Ok(Exit::Internal),
            (JobsCommand::List(args), _) => list(args, &nats, context).await,
            (JobsCommand::Show(args), _) => show(args, &nats).await,
            (JobsCommand::Cancel(args), _) => cancel(args, &nats).await,
            (JobsCommand::Result(args), _) => result(args, &nats).await,
            (JobsCommand::Dead(args), _) => dead::run(args, &nats).await,
        }
    };
    let answer = answer.await;
    close(nats).await;
    answer
}

async fn submit(args: &SubmitArgs, wish: &Wish, nats: &Nats, context: &Context) -> anyhow::Result<Exit> {
    let step = Cell::new(Step::default());
    let submitted = tokio::select! {
        biased;
        () = context.shutdown.cancelled() => {
            match step.get() {
                Step::Asked => eprintln!("job {} may have been submitted: voxfleet jobs show {}", wish.id, wish.id),
                Step::Uploading => wish.forget(nats).await,
                // It was somebody's before, and stays his.
                Step::Nothing | Step::Known => {}
            }
            return Ok(Exit::Interrupted);
        }
        submitted = wish.submit(nats, args.output.json, &step) => submitted?,
    };
    if submitted.state.has_ended() {
        eprintln!("job {} was submitted before and has ended: {}", submitted.job, submitted.state.as_str());
    }
    if args.output.json {
        object(&serde_json::to_value(&submitted)?)?;
    } else {
        out(submitted.job.as_str())?;
    }
    Ok(Exit::Ok)
}

async fn list(args: &ListArgs, nats: &Nats, context: &Context) -> anyhow::Result<Exit> {
    let request = JobListRequest {
        state: args.state.map(JobState::from),
        limit: Some(args.limit),
        parts_of: args.parts_of.clone(),
    };
    loop {
        let list = ask::list(nats, &request).await?;
        if args.output.json {
            object(&serde_json::to_value(&list)?)?;
        } else {
            let clear = if args.watch && std::io::stdout().is_terminal() { CLEAR } else { "" };
            out(&format!("{clear}{}", text(&list, now_ms())))?;
        }
        if !args.watch {
            return Ok(Exit::Ok);
        }
        tokio::select! {
            () = context.shutdown.cancelled() => return Ok(Exit::Ok),
            () = tokio::time::sleep(REDRAW) => {}
        }
    }
}

async fn show(args: &JobArg, nats: &Nats) -> anyhow::Result<Exit> {
    let Some(status) = ask::status(nats, &args.id).await? else { return ask::unknown(&args.id) };
    if args.output.json {
        object(&serde_json::to_value(&status)?)?;
    } else {
        out(&details(&status, now_ms()))?;
    }
    Ok(Exit::Ok)
}

async fn cancel(args: &JobArg, nats: &Nats) -> anyhow::Result<Exit> {
    let answer = ask::cancel(nats, &args.id).await.map_err(|error| ask::refused(error, &args.id))?;
    let Some(status) = answer else { return ask::unknown(&args.id) };
    let record = &status.record;
    if args.output.json {
        object(&serde_json::to_value(&status)?)?;
    } else {
        out(&match Ended::of(record) {
            Some(Ended::Done(_) | Ended::Failed(_)) => {
                format!("{} had ended already: {}", record.id, record.state.as_str())
            }
            Some(Ended::Cancelled(_)) | None => format!("{} cancelled", record.id),
        })?;
    }
    Ok(Exit::Ok)
}

async fn result(args: &ResultArgs, nats: &Nats) -> anyhow::Result<Exit> {
    let Some(JobStatus { record, why, .. }) = ask::status(nats, &args.id).await? else {
        return ask::unknown(&args.id);
    };
    if record.expired && record.state == JobState::Done {
        return outcome::expired(&record.id);
    }
    let Some(ended) = Ended::of(&record) else { return not_yet(&record.id, record.state, why) };
    let aggregate = outcome::aggregate(nats, &record.id, ended).await?;
    deliver(&args.file, &Document::of_result(&record.id, &aggregate.value, aggregate.json))?;
    Ok(Exit::Ok)
}

fn not_yet<T>(id: &StreamId, state: JobState, why: Option<String>) -> anyhow::Result<T> {
    let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
    let hint = format!("`voxfleet export {id} --job` gives what is there by now");
    Err(anyhow::anyhow!("job {id} has not ended, it is {}{why}; {hint}", state.as_str())).or_exit(Exit::Refused)
}

pub(super) fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn text(list: &JobList, now_ms: u64) -> String {
    let mut rows = vec![["ID", "STATE", "PROGRESS", "GPU", "AGE", "DURATION", "NAME"].map(str::to_owned).to_vec()];
    rows.extend(list.jobs.iter().map(|job| row(job, now_ms)));
    let mut text = table(&rows);
    match list.total {
        0 => text.push_str("no jobs"),
        total if total > list.jobs.len() as u64 => text.push_str(&format!("{} of {total} jobs", list.jobs.len())),
        _ => {}
    }
    text.trim_end().to_owned()
}

fn row(job: &JobSummary, now_ms: u64) -> Vec<String> {
    let none = || "-".to_owned();
    let progress = match (job.state, job.progress.and_then(|p| p.fraction())) {
        (JobState::Done, _) => "100 %".to_owned(),
        (JobState::Assigned, Some(fraction)) => format!("{} %", percent(fraction)),
        (JobState::Queued, _) => match job.ahead {
            Some(0) => "next".to_owned(),
            Some(ahead) => format!("{ahead} before it"),
            None => none(),
        },
        _ => none(),
    };
    vec![
        job.job.to_string(),
        match &job.error {
            Some(error) if job.state.has_ended() => format!("{} ({})", job.state.as_str(), error.class),
            _ => job.state.as_str().to_owned(),
        },
        progress,
        job.gpu_id.as_ref().map_or_else(none, ToString::to_string),
        age(now_ms.saturating_sub(job.submitted_ms)),
        job.duration_ms.map_or_else(none, clock),
        job.name.clone().unwrap_or_else(none),
    ]
}

/// Two of the largest units: `12s`, `5m`, `3h`, `2d`.
pub(super) fn age(ms: u64) -> String {
    match ms / 1000 {
        s if s < 60 => format!("{s}s"),
        s if s < 3_600 => format!("{}m", s / 60),
        s if s < 86_400 => format!("{}h", s / 3_600),
        s => format!("{}d", s / 86_400),
    }
}

/// Every field that is set, one a line.
fn details(status: &JobStatus, now_ms: u64) -> String {
    let record = &status.record;
    let mut known = Known::default();
    known.status(status);
    let ago = |ms: u64| format!("{} ago", age(now_ms.saturating_sub(ms)));
    let mut fields = vec![("job", record.id.to_string()), ("state", record.state.as_str().to_owned())];
    if !record.state.has_ended() {
        fields.push(("now", known.line()));
    }
    let mut put = |name, value: Option<String>| fields.extend(value.map(|value| (name, value)));
    put("error", record.error.as_ref().map(ToString::to_string));
    put("name", record.name.clone());
    // A presigned URL is a key to what it names.
    put("recording", Some(AudioUrl::redacted(&record.audio).to_owned()));
    put("length", record.duration_ms.map(clock));
    put("options", options(record));
    put("gpu", record.worker.as_ref().map(|w| w.gpu_id.to_string()));
    put("tries", (record.attempts > 0).then(|| record.attempts.to_string()));
    put("epoch", (record.epoch > 0).then(|| record.epoch.to_string()));
    put("submitted", Some(ago(record.submitted_ms)));
    put("started", record.started_ms.map(ago));
    put("next try", record.not_before_ms.filter(|at| *at > now_ms).map(|at| format!("in {}", age(at - now_ms))));
    put("ended", record.ended_ms.map(ago));
    let kept = format!("{} after its end", age(u64::from(record.result_ttl_s) * 1000));
    put(
        "result",
        match (&record.result, record.expired) {
            (_, true) => Some("expired, it was deleted".to_owned()),
            (Some(url), false) => Some(format!("{url}, kept for {kept}")),
            (None, false) => None,
        },
    );
    self::fields(&fields)
}

/// One a line, the values under each other.
pub(super) fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{name:<width$}  {}", plain(value));
    fields.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Those that are not the default ones.
fn options(record: &JobRecord) -> Option<String> {
    let (set, default) = (json!(record.options), json!(voxfleet_schema::session::SessionOptions::default()));
    let set = set.as_object()?.iter().filter(|(name, value)| default.get(name) != Some(value));
    let shown: Vec<String> = set
        .map(|(name, value)| format!("{name}={}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
        .collect();
    (!shown.is_empty()).then(|| shown.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_status(state: &str, extra: serde_json::Value) -> JobStatus {
        let mut record = json!({
            "id": "call-17", "state": state, "audio": "https://h/a.wav?X-Amz-Signature=secret", "options": {"language": "de"},
            "result_ttl_s": 86400, "epoch": 2, "attempts": 2, "submitted_ms": 1_000, "changed_ms": 0,
            "worker": {"gpu_id": "gpu-1", "incarnation": "i"}, "name": "a.wav",
        });
        extra.as_object().cloned().unwrap_or_default().into_iter().for_each(|(name, value)| record[name] = value);
        serde_json::from_value(json!({
            "record": record, "progress": {"stage": "transcribing", "done_ms": 30_000, "total_ms": 120_000},
        }))
        .expect("a status")
    }

    #[test]
    fn a_job_is_shown_without_what_its_url_hides() {
        let shown = details(&a_status("assigned", json!({})), 61_000);
        for line in [
            "state      assigned",
            "now        transcribing 25 % (00:30.0 of 02:00.0) on gpu-1",
            "recording  https://h/a.wav",
            "options    language=de",
            "submitted  1m ago",
        ] {
            assert!(shown.lines().any(|l| l == line), "{line:?} is not in:\n{shown}");
        }
        assert!(!shown.contains("secret"), "{shown}");
    }

    #[test]
    fn an_expired_result_says_so() {
        let extra = json!({"expired": true, "result": "object://asr_media/result/x", "ended_ms": 5_000});
        let shown = details(&a_status("done", extra), 86_405_000);
        assert!(shown.contains("result     expired, it was deleted") && shown.contains("ended      1d ago"), "{shown}");
        assert!(!shown.lines().any(|l| l.starts_with("now ")), "{shown}");
    }

    #[test]
    fn jobs_are_listed() {
        let job = json!({
            "job": "call-17", "state": "failed", "priority": "normal", "submitted_ms": 0, "duration_ms": 90_000,
            "error": {"class": "bad_audio", "message": "noise"},
        });
        let list: JobList = serde_json::from_value(json!({"jobs": [job], "total": 3})).expect("a list");
        let shown = text(&list, 7_200_000);
        let second = shown.lines().nth(1).expect("a row");
        assert_eq!(
            second.split_whitespace().collect::<Vec<_>>(),
            ["call-17", "failed", "(bad_audio)", "-", "-", "2h", "01:30.0", "-"]
        );
        assert!(shown.ends_with("1 of 3 jobs"), "{shown}");
        let queued = |ahead: u32| {
            let job = json!({"job": "j", "state": "queued", "priority": "low", "submitted_ms": 0, "ahead": ahead});
            let list: JobList = serde_json::from_value(json!({"jobs": [job], "total": 1})).expect("a list");
            text(&list, 0)
        };
        assert!(queued(0).contains("next") && queued(7).contains("7 before it"), "{}", queued(7));
        assert!(text(&JobList { jobs: Vec::new(), total: 0 }, 0).ends_with("no jobs"));
    }
}
