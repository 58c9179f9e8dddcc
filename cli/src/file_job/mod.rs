//! A recording's way through the fleet, seen from whoever asked for it.
//!
//! | module | holds |
//! |---|---|
//! | [`recording`] | where the recording is; putting one that is here into the object store |
//! | [`ask`] | submit, status, cancel, list; without a dispatcher what the records say |
//! | [`progress`] | how far it is, as a bar on a terminal and as lines in a pipe |
//! | [`wait`] | stays until the job has ended, whatever restarts meanwhile |
//! | [`outcome`] | the aggregate of a job that is done, or why there is none |

pub(crate) mod ask;
pub(crate) mod outcome;
pub(crate) mod progress;
pub(crate) mod recording;
pub(crate) mod wait;

use std::cell::Cell;

use uuid::Uuid;
use voxfleet_nats::{Nats, api::ApiError, media::Media};
use voxfleet_schema::{
    id::{IdError, StreamId},
    job::{AudioUrl, JobRequest, Submitted, audio_key},
};

use crate::{
    args::JobArgs,
    exit::{Exit, OrExit as _, coded},
};
use recording::{Recording, Upload};

/// A recording and what is wanted of it, as it was meant.
pub(crate) struct Wish {
    pub(crate) id: StreamId,
    /// The id was chosen by the caller, so there may be such a job.
    named: bool,
    pub(crate) recording: Recording,
    request: JobRequest,
}

/// How far the submission has come: what has to be undone when it is broken off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Step {
    #[default]
    Nothing,
    Uploading,
    /// The dispatcher may have it.
    Asked,
    /// Somebody had submitted it before: it is his to cancel.
    Known,
}

impl Wish {
    pub(crate) fn of(args: &JobArgs) -> anyhow::Result<Self> {
        let recording = Recording::of(&args.input).or_exit(Exit::Usage)?;
        recording.check()?;
        let id = match &args.id {
            Some(id) => id.clone(),
            None => random_id().or_exit(Exit::Internal)?,
        };
        let request = JobRequest {
            job: Some(id.clone()),
            audio: Some(match &recording {
                Recording::Url(url) => url.clone(),
                Recording::File(_) | Recording::Stdin => AudioUrl::object(&audio_key(&id)),
            }),
            data: None,
            name: args.name.clone().or_else(|| recording.name()),
            options: args.options().parsed().or_exit(Exit::Usage)?,
            result_ttl_s: args.ttl,
            part: None,
        };
        request.validate().or_exit(Exit::Usage)?;
        Ok(Self { id, named: args.id.is_some(), recording, request })
    }

    /// Puts the recording where workers find it and hands the job in. A job of this id that exists already is taken for
    /// this one, as long as nothing contradicts it.
    pub(crate) async fn submit(&self, nats: &Nats, quiet: bool, step: &Cell<Step>) -> anyhow::Result<Submitted> {
        let media = Media::new(nats);
        let upload = self.recording.open().await?;
        let known = if self.named { ask::status(nats, &self.id).await? } else { None };
        let asked = if known.is_some() { Step::Known } else { Step::Asked };
        if let Some(upload) = upload {
            match known {
                Some(_) => self.compare(&media, upload).await?,
                None => {
                    step.set(Step::Uploading);
                    upload.put(&media, &self.id, quiet).await?;
                }
            }
        }
        step.set(asked);
        let error = match ask::submit(nats, &self.request).await {
            Ok(submitted) => return Ok(submitted),
            Err(error) => error,
        };
        // Where nobody answered it may have been taken, and then its recording is needed.
        if matches!(error, ApiError::Refused(_)) {
            step.set(Step::Nothing);
            self.forget(nats).await;
        }
        Err(coded(Exit::of_api(&error), anyhow::Error::new(error).context(format!("job {}", self.id))))
    }

    /// The object of a job that exists is not written again: it may be read just now.
    async fn compare(&self, media: &Media, upload: Upload) -> anyhow::Result<()> {
        // What has expired cannot be compared; then what there is of the job is what is asked for.
        let Some(stored) = media.info(&audio_key(&self.id)).await.or_exit(Exit::Unavailable)? else { return Ok(()) };
        if stored.digest == Some(upload.digest().await?) {
            return Ok(());
        }
        Err(anyhow::anyhow!("there is a job {} with another recording; choose another --id", self.id))
    }

    /// Takes away a recording that no job has.
    pub(crate) async fn forget(&self, nats: &Nats) {
        if matches!(self.recording, Recording::Url(_)) || matches!(ask::record(nats, &self.id).await, Ok(Some(_))) {
            return;
        }
        if let Err(error) = Media::new(nats).delete(&audio_key(&self.id)).await {
            tracing::warn!(%error, key = audio_key(&self.id), "the uploaded recording stays behind");
        }
    }
}

fn random_id() -> Result<StreamId, IdError> {
    StreamId::new(format!("job-{}", &Uuid::new_v4().simple().to_string()[..12]))
}
