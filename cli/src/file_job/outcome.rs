//! What a job came to.

use voxfleet_nats::{Nats, media::Media, transcript::Chain};
use voxfleet_schema::{
    codec,
    failure::{Failure, FailureClass},
    id::{Kind, StreamId},
    job::{AudioUrl, JobRecord, JobResult, JobState},
};

use crate::exit::{Exit, OrExit as _, coded};

/// Largest aggregate that is read into memory: days of speech.
const MAX_RESULT_BYTES: usize = 512 * 1024 * 1024;

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ended {
    /// With the URL of its aggregate, where it is known.
    Done(Option<String>),
    Failed(Failure),
    Cancelled(Option<Failure>),
}

impl Ended {
    /// None while it has not ended.
    pub(crate) fn of(record: &JobRecord) -> Option<Self> {
        match record.state {
            JobState::Done => Some(Ended::Done(record.result.clone())),
            JobState::Failed => Some(Ended::Failed(record.error.clone().unwrap_or_else(nameless))),
            JobState::Cancelled => Some(Ended::Cancelled(record.error.clone())),
            JobState::Queued | JobState::Assigned | JobState::Closing | JobState::Unknown => None,
        }
    }

    pub(crate) fn of_error(error: Option<Failure>, result: Option<String>) -> Self {
        match error {
            None => Ended::Done(result),
            Some(error) if error.class == FailureClass::Cancelled => Ended::Cancelled(Some(error)),
            Some(error) => Ended::Failed(error),
        }
    }
}

fn nameless() -> Failure {
    Failure::new(FailureClass::Unknown, "it failed and did not say why")
}

/// An aggregate, and its bytes exactly as they are stored.
pub(crate) struct Aggregate {
    pub(crate) value: JobResult,
    pub(crate) json: String,
}

/// The aggregate of a job that has ended, or the error that says why there is none.
pub(crate) async fn aggregate(nats: &Nats, id: &StreamId, ended: Ended) -> anyhow::Result<Aggregate> {
    let url = match ended {
        Ended::Done(Some(url)) => Some(url),
        Ended::Done(None) => {
            Chain::new(nats).last(Kind::Job, id).await.or_exit(Exit::Unavailable)?.and_then(|f| f.value.result)
        }
        Ended::Failed(failure) => {
            let exit = Exit::of_class(failure.class);
            return Err(coded(exit, anyhow::Error::new(failure).context(format!("job {id} failed"))));
        }
        Ended::Cancelled(_) => return Err(anyhow::anyhow!("job {id} was cancelled")),
    };
    let Some(AudioUrl::Object { key }) = url.as_deref().and_then(|url| AudioUrl::parse(url).ok()) else {
        return Err(anyhow::anyhow!("job {id} is done, but where its result is cannot be found out"))
            .or_exit(Exit::NotFound);
    };
    let bytes = Media::new(nats).get_bytes(&key, MAX_RESULT_BYTES).await.or_exit(Exit::Unavailable)?;
    let Some(bytes) = bytes else { return expired(id) };
    let value = codec::from_json(&bytes).or_exit(Exit::Internal)?;
    let json = String::from_utf8(bytes.into()).or_exit(Exit::Internal)?;
    Ok(Aggregate { value, json })
}

pub(crate) fn expired<T>(id: &StreamId) -> anyhow::Result<T> {
    let hint = format!("`voxfleet export {id} --job` reads the stored transcript while that is kept");
    Err(anyhow::anyhow!("the result of job {id} is no longer kept; {hint}")).or_exit(Exit::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_and_a_record_say_the_same() {
        let failure = |class| Failure::new(class, "why");
        assert_eq!(Ended::of_error(None, Some("u".to_owned())), Ended::Done(Some("u".to_owned())));
        let cancelled = failure(FailureClass::Cancelled);
        assert_eq!(Ended::of_error(Some(cancelled.clone()), None), Ended::Cancelled(Some(cancelled)));
        let bad = failure(FailureClass::BadAudio);
        assert_eq!(Ended::of_error(Some(bad.clone()), None), Ended::Failed(bad));
    }
}
