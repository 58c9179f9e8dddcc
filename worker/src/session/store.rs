//! What is written for one final: its checkpoint before it, a job's aggregate, a dead letter, then the final itself.

use voxfleet_nats::{
    ServerError,
    retry::Backoff,
    transcript::{Chain, ChainError, Outcome},
};
use voxfleet_schema::{
    codec,
    failure::Failure,
    job::JobStage,
    transcript::{Checkpoint, Final},
};

use super::{
    Session, Shared,
    outputs::{Names, without_text},
    park,
    reconsider::before_the_end,
};
use crate::{ipc::FinalDraft, lifecycle::Draft};

/// What was put into the chain.
#[derive(Debug)]
pub(super) enum Stored {
    Final(Box<Kept>),
    Revision,
}

/// Puts the next link into the chain.
pub(super) async fn store_draft(
    session: &Session,
    drafted: Draft,
    epoch: u64,
    last: Option<(u64, u64)>,
) -> Result<Stored, StoreFailed> {
    match drafted {
        Draft::Final(draft) => Ok(Stored::Final(Box::new(store(session, *draft, epoch, last).await?))),
        Draft::Revision(draft) => {
            let value = session.names.revision_of(*draft, epoch);
            let index = value.index;
            if !session.shared.chain.revise(value).await? {
                // Whoever has the session now will be found by the next final.
                tracing::warn!(id = %session.names.id, index, epoch, "revision is not wanted any more");
            }
            Ok(Stored::Revision)
        }
    }
}

/// A final and what became of it.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) outcome: Outcome,
    pub(super) value: Final,
    /// Its audio was set aside.
    pub(super) parked: bool,
}

/// Why a final could not be stored at all.
#[derive(Debug)]
pub(super) enum StoreFailed {
    Chain(ChainError),
    /// The aggregate that it was to name.
    Aggregate(Failure),
}

impl From<ChainError> for StoreFailed {
    fn from(error: ChainError) -> Self {
        StoreFailed::Chain(error)
    }
}

/// Writes the checkpoint, then the final that names it; before a job's end final, its aggregate.
async fn store(
    session: &Session,
    mut draft: FinalDraft,
    epoch: u64,
    last: Option<(u64, u64)>,
) -> Result<Kept, StoreFailed> {
    let (shared, names): (&Shared, &Names) = (&session.shared, &session.names);
    let (predecessor, last_index) = last.unzip();
    if draft.end && draft.speakers.is_some() {
        let options = session.desired.borrow().options.clone();
        before_the_end(&shared.chain, names, &options, (&mut draft).into(), epoch, last_index).await?;
    }
    let checkpoint_seq = match draft.checkpoint.take() {
        None => None,
        Some(mut checkpoint) => {
            checkpoint.index = last_index.map_or(0, |index| index + 1);
            Some(checkpointed(&shared.chain, names, &checkpoint).await?)
        }
    };
    let parked = draft.parked;
    let mut value = names.final_of(draft, epoch, last_index, checkpoint_seq);
    if parked {
        park::write_letter(session, &value).await;
    }
    if let Some(work) = session.work.as_ref().filter(|work| value.end && work.part.is_none()) {
        session.figures.enter(JobStage::Finishing);
        let url = work.aggregate(&shared.chain, &value).await.map_err(StoreFailed::Aggregate)?;
        value.result = Some(url);
    }
    match shared.chain.store(&value, predecessor).await {
        Ok(outcome) => Ok(Kept { outcome, value, parked }),
        Err(error) if is_too_large(&error) => {
            let len = codec::to_json(&value).map_err(ChainError::Encode)?.len();
            tracing::error!(id = %names.id, len, %error, "final too large, stored without its text");
            let mut value = without_text(value, len);
            if value.result.is_some() {
                // The aggregate has its text.
                value.error = None;
            }
            Ok(Kept { outcome: shared.chain.store(&value, predecessor).await?, value, parked })
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes a checkpoint; gives the sequence under which its final names it. Repeats until the server answers.
pub(crate) async fn checkpointed(chain: &Chain, names: &Names, checkpoint: &Checkpoint) -> Result<u64, ChainError> {
    let mut backoff = Backoff::default();
    loop {
        match chain.checkpoint_put(names.kind, &names.id, checkpoint).await {
            Ok(seq) => return Ok(seq),
            Err(error @ ChainError::Encode(_)) => return Err(error),
            Err(error) => {
                tracing::warn!(
                    id = %names.id,
                    error = &error as &dyn std::error::Error,
                    "checkpoint not written, trying again"
                );
                backoff.wait().await;
            }
        }
    }
}

/// Over our limit, or over that of a server configured with a smaller one.
fn is_too_large(error: &ChainError) -> bool {
    matches!(error, ChainError::TooLarge { .. } | ChainError::Server(ServerError::TooLarge))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_final_that_no_server_takes_is_stored_without_its_text() {
        assert!(is_too_large(&ChainError::TooLarge { len: 300_000, limit: 262_144 }));
        assert!(is_too_large(&ChainError::Server(ServerError::TooLarge)), "as where max_payload is below our limit");
        for error in [ServerError::Timeout, ServerError::Closed] {
            assert!(!is_too_large(&ChainError::Server(error)));
        }
        assert!(!is_too_large(&ChainError::Conflict));
    }
}
