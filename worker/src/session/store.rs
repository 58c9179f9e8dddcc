//! What is written for one final: its checkpoint before it, a job's aggregate, a dead letter, then the final itself.

use voxfleet_nats::{
    ServerError,
    retry::Backoff,
    transcript::{ChainError, Outcome},
};
use voxfleet_schema::{codec, failure::Failure, job::JobStage, transcript::Final};

use super::{
    Session, Shared,
    outputs::{Names, without_text},
    park,
};
use crate::ipc::FinalDraft;

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
pub(super) async fn store(
    session: &Session,
    mut draft: FinalDraft,
    epoch: u64,
    last: Option<(u64, u64)>,
) -> Result<Kept, StoreFailed> {
    let (shared, names): (&Shared, &Names) = (&session.shared, &session.names);
    let (predecessor, last_index) = last.unzip();
    let checkpoint_seq = match draft.checkpoint.take() {
        None => None,
        Some(mut checkpoint) => {
            checkpoint.index = last_index.map_or(0, |index| index + 1);
            let mut backoff = Backoff::default();
            loop {
                match shared.chain.checkpoint_put(names.kind, &names.id, &checkpoint).await {
                    Ok(seq) => break Some(seq),
                    Err(error @ ChainError::Encode(_)) => return Err(error.into()),
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
