//! Stays with a job until it has ended.
//!
//! Two witnesses: the chain, whose end final says it even while no dispatcher is there, and the dispatcher, who knows of
//! jobs that have no final yet. Either is enough, and a restart of the dispatcher or of the server only takes time.

use std::time::Duration;

use voxfleet_nats::{
    Nats,
    api::ApiError,
    retry::Backoff,
    transcript::{self, Filter, Start},
};
use voxfleet_schema::{
    id::{Kind, StreamId},
    job::JobStatus,
};

use super::{
    ask,
    outcome::Ended,
    progress::{Known, Show},
};
use crate::{
    exit::{Exit, OrExit as _},
    transcript::{
        follow::good,
        line::{Paint, of_final},
        view::{News, View},
    },
};

/// Partials tell progress each second; this is for what has none: places in the queue, and ends of jobs without a chain.
const ASK: Duration = Duration::from_secs(2);

/// `verbose` shows finals as they come.
pub(crate) async fn until_end(nats: &Nats, id: &StreamId, show: &mut Show, verbose: bool) -> anyhow::Result<Ended> {
    let filter = Filter::One(Kind::Job, id.clone());
    let mut finals = transcript::finals(nats, &filter, Start::First);
    let mut partials = transcript::partials(nats, &filter, Start::LastPerSubject);
    let mut view = View::default();
    let mut known = Known::default();
    let mut backoff = Backoff::default();
    let mut asking = Box::pin(ask_after(nats, id, Duration::ZERO));
    loop {
        tokio::select! {
            biased;
            read = finals.next() => {
                let Some(read) = good(read, nats, &mut backoff).await.or_exit(Exit::Unavailable)? else { continue };
                let value = read.value;
                if verbose
                    && let Some(News::Final { new, .. }) = view.on_final(&value)
                    && let Some(line) = of_final(new, Paint { colour: false }, None)
                {
                    show.line(&line);
                }
                if value.end {
                    return Ok(Ended::of_error(value.error, value.result));
                }
            }
            read = partials.next() => {
                let Some(read) = good(read, nats, &mut backoff).await.or_exit(Exit::Unavailable)? else { continue };
                known.partial(&read.value);
                show.known(&known);
            }
            answer = &mut asking => {
                asking.set(ask_after(nats, id, ASK));
                match answer {
                    Ok(Some(status)) => {
                        if let Some(ended) = Ended::of(&status.record) {
                            return Ok(ended);
                        }
                        known.status(&status);
                    }
                    Ok(None) => return ask::unknown(id),
                    Err(ApiError::NoDispatcher | ApiError::Timeout | ApiError::Server(_)) => known.nobody_answers(),
                    Err(error) => return Err(ask::refused(error, id)),
                }
                show.known(&known);
            }
        }
    }
}

async fn ask_after(nats: &Nats, id: &StreamId, delay: Duration) -> Result<Option<JobStatus>, ApiError> {
    tokio::time::sleep(delay).await;
    ask::fresh(nats, id).await
}
