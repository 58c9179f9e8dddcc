//! What is known of the speakers at the end: all voices are heard together once more, and finals that look different then
//! are revised before the end is said.
//!
//! Nothing of it is remembered: whoever takes the session over in between finds the revisions and goes on.

use std::collections::BTreeMap;

use voxfleet_nats::{
    retry::Backoff,
    transcript::{Chain, ChainError, Revised},
};
use voxfleet_schema::{
    id::{Kind, StreamId},
    session::SessionOptions,
    transcript::{Final, Revision},
};

use super::{again::asked, outputs::Names};
use crate::engine::diarize::{Ending, attribute, hear_all, relabel};

/// Revises what the end final and those before it say of their speakers.
pub(crate) async fn before_the_end(
    chain: &Chain,
    names: &Names,
    options: &SessionOptions,
    end: Ending<'_>,
    epoch: u64,
    last_index: Option<u64>,
) -> Result<(), ChainError> {
    let changes = hear_all(end, options);
    if changes.is_empty() {
        return Ok(());
    }
    let Some(last_index) = last_index else { return Ok(()) };
    let mut revised = revisions_from(chain, names.kind, &names.id, 0).await?;
    let (mut from, mut revisions) = (0, 0);
    let mut backoff = Backoff::default();
    loop {
        match chain.next_final(names.kind, &names.id, from).await {
            Ok(Some(stored)) if stored.value.index <= last_index => {
                from = stored.seq + 1;
                backoff = Backoff::default();
                let before = match revised.remove(&stored.value.index) {
                    Some(seq) => asked((names.kind, &names.id), || chain.revision_at(seq)).await?,
                    None => None,
                };
                if let Some(revision) = revision_of(names, &stored.value, before, &changes) {
                    revisions += 1;
                    // What is too long is left out: what stands is worth more than what would be told of its speakers.
                    if chain.revise(Revision { epoch, ..revision }).await? == Revised::LetGo {
                        // A higher epoch has it: the end final will find that out.
                        return Ok(());
                    }
                }
                if stored.value.index == last_index {
                    break;
                }
            }
            // The rest has expired, or stands under another worker's name.
            Ok(_) => break,
            Err(ChainError::Server(error)) if !matches!(error, voxfleet_nats::ServerError::Closed) => {
                say!(warn, names, %error, "chain not read, trying again");
                backoff.wait().await;
            }
            Err(error) => return Err(error),
        }
    }
    say!(info, names, voices = changes.len(), revisions, "speakers reconsidered");
    Ok(())
}

/// What replaces this final, or its last revision, under other labels; none where nothing changes. Pure.
fn revision_of(
    names: &Names,
    stands: &Final,
    revised: Option<Revision>,
    changes: &BTreeMap<u32, u32>,
) -> Option<Revision> {
    let revised_omits = revised.as_ref().map(|revision| revision.words_omitted);
    let (segments, mut turns, speakers) = match revised {
        Some(revision) => (revision.segments, revision.turns, revision.speakers),
        None => (stands.segments.clone(), stands.turns.clone(), stands.speakers.clone()),
    };
    let words_omitted = revised_omits.unwrap_or(stands.words_omitted);
    relabel(&mut turns, changes).then(|| Revision {
        kind: names.kind,
        id: names.id.clone(),
        index: stands.index,
        revision: 0,
        epoch: 0,
        segments: attribute(segments, &turns),
        turns,
        speakers,
        words_omitted,
    })
}

/// The highest revision of each final that has one.
pub(crate) async fn revisions(chain: &Chain, kind: Kind, id: &StreamId) -> Result<BTreeMap<u64, Revision>, ChainError> {
    let mut found = BTreeMap::new();
    for (index, seq) in revisions_from(chain, kind, id, 0).await? {
        found.extend(asked((kind, id), || chain.revision_at(seq)).await?.map(|revision| (index, revision)));
    }
    Ok(found)
}

/// Where the highest revision of each final stands that has one at or after a sequence of the stream. Those of hours are more
/// than is held at once.
pub(super) async fn revisions_from(
    chain: &Chain,
    kind: Kind,
    id: &StreamId,
    mut from: u64,
) -> Result<BTreeMap<u64, u64>, ChainError> {
    let mut found = BTreeMap::new();
    let mut backoff = Backoff::default();
    loop {
        match chain.next_revision(kind, id, from).await {
            // They count along the chain: a later one is higher.
            Ok(Some((seq, revision))) => {
                from = seq + 1;
                found.insert(revision.index, seq);
            }
            Ok(None) => return Ok(found),
            Err(ChainError::Server(error)) if !matches!(error, voxfleet_nats::ServerError::Closed) => {
                tracing::warn!(session = kind.session(id), job = kind.job(id), %error, "revisions not read, trying again");
                backoff.wait().await;
            }
            Err(error) => return Err(error),
        }
    }
}
