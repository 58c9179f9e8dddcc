//! `voxfleet transcribe`: a recording in, its transcript out. Standard output holds the result and nothing else.

use std::cell::Cell;

use voxfleet_nats::Nats;
use voxfleet_schema::{id::StreamId, job::JobState};

use super::{close, need_jetstream, stream};
use crate::{
    Context,
    args::{StreamArgs, TranscribeArgs},
    deliver::{check, deliver},
    exit::{Exit, OrExit as _},
    file_job::{
        Step, Wish, ask,
        outcome::{self, Aggregate, Ended},
        progress::Show,
        recording::Recording,
        wait,
    },
    formats::{Chain, Document},
    transcript::{
        follow::Seen,
        line::{Paint, clock, of_final, of_revision},
        screen::{Detail, Screen, Style, out},
    },
};

pub(crate) async fn run(args: &TranscribeArgs, context: &Context) -> anyhow::Result<Exit> {
    check(&args.output)?;
    if args.live {
        return live(args, context).await;
    }
    let wish = Wish::of(&args.job)?;
    let (nats, _) = context.client("voxfleet-transcribe").await?;
    let step = Cell::new(Step::default());
    let result = tokio::select! {
        biased;
        () = context.shutdown.cancelled() => undo(&nats, &wish, step.get()).await,
        result = with_nats(args, &wish, &nats, &step) => result,
    };
    close(nats).await;
    result
}

async fn with_nats(args: &TranscribeArgs, wish: &Wish, nats: &Nats, step: &Cell<Step>) -> anyhow::Result<Exit> {
    need_jetstream(nats).await?;
    let submitted = wish.submit(nats, false, step).await?;
    let id = &submitted.job;
    if args.detach {
        out(id.as_str())?;
        return Ok(Exit::Ok);
    }
    eprintln!("job {id}{}", if submitted.state == JobState::Queued { "" } else { ", submitted before" });
    let ended = {
        let mut show = Show::new(false);
        wait::until_end(nats, id, &mut show, args.verbose).await?
    };
    // Nothing is left to be cancelled.
    step.set(Step::Nothing);
    let Aggregate { value, json } = outcome::aggregate(nats, id, ended).await?;
    deliver(&args.output, &Document::of_result(id, &value, json))?;
    let took = value.performance_metrics.total_duration;
    let times = if took > 0.0 { format!(", {:.1} x real time", value.duration / took) } else { String::new() };
    let length = clock((value.duration * 1000.0) as u64);
    eprintln!("job {id}: {length} of audio in {took:.1} s on its worker{times}");
    Ok(Exit::Ok)
}

/// Ctrl-C: what was begun is taken back. A second one ends the process at once.
async fn undo(nats: &Nats, wish: &Wish, step: Step) -> anyhow::Result<Exit> {
    match step {
        Step::Nothing => {}
        Step::Uploading => {
            wish.forget(nats).await;
            eprintln!("stopped before the job was submitted");
        }
        Step::Known => {
            eprintln!("left; job {} goes on: voxfleet transcribe --id, or voxfleet jobs cancel {}", wish.id, wish.id)
        }
        Step::Asked => eprintln!("{}", cancelled(&wish.id, cancel(nats, &wish.id).await)),
    }
    Ok(Exit::Interrupted)
}

async fn cancel(nats: &Nats, id: &StreamId) -> Result<Option<Ended>, String> {
    eprintln!("cancelling job {id}; once more leaves at once");
    match ask::cancel(nats, id).await {
        Ok(Some(status)) => Ok(Ended::of(&status.record)),
        Ok(None) => Ok(Some(Ended::Cancelled(None))),
        Err(error) => Err(error.to_string()),
    }
}

fn cancelled(id: &StreamId, answer: Result<Option<Ended>, String>) -> String {
    match answer {
        Ok(Some(Ended::Done(_))) => format!("job {id} was done already: voxfleet jobs result {id}"),
        Ok(Some(Ended::Failed(failure))) => format!("job {id} had failed already: {failure}"),
        // It is being closed, or is already.
        Ok(Some(Ended::Cancelled(_)) | None) => format!("job {id} cancelled"),
        Err(why) => format!("job {id} could not be cancelled ({why}): voxfleet jobs cancel {id}"),
    }
}

/// Through a live session: the same as `voxfleet stream --wait`, with the transcript as a file at the end.
async fn live(args: &TranscribeArgs, context: &Context) -> anyhow::Result<Exit> {
    if matches!(Recording::of(&args.job.input).or_exit(Exit::Usage)?, Recording::Url(_)) {
        return Err(anyhow::anyhow!("--live streams a file or standard input, no URL")).or_exit(Exit::Usage);
    }
    let stream = StreamArgs {
        input: args.job.input.clone(),
        session: args.job.id.clone(),
        speed: args.speed,
        wait: true,
        others: args.job.others.clone(),
        flags: args.job.flags.clone(),
        ..StreamArgs::default()
    };
    let (mut chain, mut revisions) = (Chain::default(), Vec::new());
    let mut keep = |seen: Seen<'_>| {
        let paint = Paint { colour: false };
        let line = match seen {
            Seen::Final(value) => {
                chain.finals.push(value.clone());
                of_final(value, paint, None)
            }
            Seen::Revision(value) => {
                revisions.push(value.clone());
                of_revision(value, paint).map(|line| format!("revised {line}"))
            }
            Seen::Partial(_) | Seen::Event(_) => None,
        };
        if let Some(line) = line.filter(|_| args.verbose) {
            eprintln!("{line}");
        }
    };
    let mut screen = Screen::new(Style::Silent, Detail::default());
    let exit = stream::stream(&stream, context, &mut screen, &mut keep).await?;
    chain.revise(revisions);
    // Stopped or failed half way, what was heard until then is still worth having.
    match chain.document() {
        Some(document) => deliver(&args.output, &document.or_exit(Exit::Internal)?)?,
        None => eprintln!("nothing was transcribed"),
    }
    if let Some(error) = chain.error() {
        eprintln!("voxfleet: the session ended with {error}");
    }
    Ok(exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_became_of_a_cancelled_job_is_told() {
        let id = StreamId::new("j").expect("id");
        assert_eq!(cancelled(&id, Ok(None)), "job j cancelled");
        assert_eq!(cancelled(&id, Ok(Some(Ended::Done(None)))), "job j was done already: voxfleet jobs result j");
        assert!(cancelled(&id, Err("why".to_owned())).ends_with("(why): voxfleet jobs cancel j"));
    }
}
