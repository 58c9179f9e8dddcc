//! What is written for one final: its checkpoint before it, a job's aggregate, a dead letter, then the final itself.

use voxfleet_nats::{
    ServerError,
    retry::Backoff,
    transcript::{Chain, ChainError, Outcome, Revised},
};
use voxfleet_schema::{
    codec,
    failure::Failure,
    job::JobStage,
    transcript::{Checkpoint, Final, Revision, SpeakersBy},
};

use super::{
    Session, Shared,
    outputs::{Names, without_text},
    park,
    reconsider::before_the_end,
    spans::Course,
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
    course: Course,
    epoch: u64,
    last: Option<(u64, u64)>,
) -> Result<Stored, StoreFailed> {
    match drafted {
        Draft::Final(draft) => Ok(Stored::Final(Box::new(store(session, *draft, course, epoch, last).await?))),
        Draft::Revision(draft) => {
            let value = session.names.revision_of(*draft, epoch);
            let index = value.index;
            let chain = session.shared.chain.traced(course.header());
            if answer(&chain, value.clone()).await? {
                course.revised(&session.shared.tracer, &session.names, &value);
            } else {
                // Whoever has the session now will be found by the next final.
                say!(warn, session.names, index, epoch, "revision is not wanted any more");
            }
            Ok(Stored::Revision)
        }
    }
}

/// Publishes what a late final was promised, or why that cannot be. False: a higher epoch has the chain.
pub(super) async fn answer(chain: &Chain, value: Revision) -> Result<bool, ChainError> {
    let short = without_speakers(&value);
    let mut revised = chain.revise(value).await?;
    if revised == Revised::TooLong {
        revised = chain.revise(short).await?;
    }
    Ok(revised != Revised::LetGo)
}

/// Less than the final that it is about, which there was room for. Pure.
fn without_speakers(value: &Revision) -> Revision {
    let mut short = value.clone();
    short.fit(usize::MAX);
    short.turns.clear();
    short.segments.iter_mut().for_each(|segment| segment.speaker = None);
    if let Some(speakers) = &mut short.speakers {
        (speakers.by, speakers.why) = (SpeakersBy::None, Some("what was told of them is too long".to_owned()));
    }
    short
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
    course: Course,
    epoch: u64,
    last: Option<(u64, u64)>,
) -> Result<Kept, StoreFailed> {
    let (shared, names): (&Shared, &Names) = (&session.shared, &session.names);
    let chain = shared.chain.traced(course.header());
    let publish_ns = course.begins();
    let (predecessor, last_index) = last.unzip();
    if draft.end && draft.speakers.is_some() {
        let options = session.desired.borrow().options.clone();
        before_the_end(&chain, names, &options, (&mut draft).into(), epoch, last_index).await?;
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
        let begun_ns = course.begins();
        let url = work.aggregate(&shared.chain, &value).await.map_err(StoreFailed::Aggregate)?;
        course.aggregated(&shared.tracer, names, epoch, begun_ns);
        value.result = Some(url);
    }
    let kept = match chain.store(&value, predecessor).await {
        Ok(outcome) => Kept { outcome, value, parked },
        Err(error) if is_too_large(&error) => {
            let len = codec::to_json(&value).map_err(ChainError::Encode)?.len();
            say!(error, names, len, %error, "final too large, stored without its text");
            let mut value = without_text(value, len);
            if value.result.is_some() {
                // The aggregate has its text.
                value.error = None;
            }
            Kept { outcome: chain.store(&value, predecessor).await?, value, parked }
        }
        Err(error) => return Err(error.into()),
    };
    if matches!(kept.outcome, Outcome::Stored { .. }) {
        course.stored(&shared.tracer, names, &kept.value, publish_ns);
    }
    Ok(kept)
}

/// Writes a checkpoint; gives the sequence under which its final names it. Repeats until the server answers.
pub(crate) async fn checkpointed(chain: &Chain, names: &Names, checkpoint: &Checkpoint) -> Result<u64, ChainError> {
    let mut backoff = Backoff::default();
    loop {
        match chain.checkpoint_put(names.kind, &names.id, checkpoint).await {
            Ok(seq) => return Ok(seq),
            Err(error @ ChainError::Encode(_)) => return Err(error),
            Err(error) => {
                say!(warn, names, error = &error as &dyn std::error::Error, "checkpoint not written, trying again");
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
    use voxfleet_schema::transcript::Turn;

    use super::*;
    use crate::session::tests::{final_of, said};

    #[test]
    fn what_is_too_long_to_be_told_is_answered() {
        let mut stands = final_of(2);
        stands.segments = said("yes");
        let mut value = Revision::nobody(&stands, 4, "none".to_owned());
        value.segments[0].speaker = Some("S1".to_owned());
        value.turns = vec![Turn { start_ms: 0, end_ms: 9, speaker: "S1".to_owned(), voice: None }];
        let short = without_speakers(&value);
        assert_eq!((short.index, short.epoch, &short.segments), (2, 4, &stands.segments));
        assert!(short.turns.is_empty() && short.words_omitted);
        let speakers = short.speakers.expect("said");
        assert!(
            !speakers.late
                && speakers.by == SpeakersBy::None
                && speakers.why.is_some_and(|why| why.contains("too long"))
        );
    }

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
