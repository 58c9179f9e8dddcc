//! Where a session goes on: from the last final, its checkpoint and what is left of the log.

use voxfleet_nats::{
    log::{AudioLog, LogError},
    retry::Backoff,
    transcript::{Chain, ChainError, StoredFinal},
};
use voxfleet_schema::{
    id::{Kind, StreamId},
    transcript::{Checkpoint, Final, Lost},
};

use crate::ipc::StartPoint;

/// What the log answers for the chunk a final wants to resume at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResumeChunk {
    There,
    /// A later chunk, or the leader says that nothing is left.
    Expired {
        /// First sequence of the stream.
        stream_first: u64,
    },
}

/// Decides where to start. `checkpoint`: none named, or what was found under its name.
pub(super) fn start_point(last: &Final, checkpoint: Option<Option<Checkpoint>>, chunk: ResumeChunk) -> StartPoint {
    let (expired, lost) = match chunk {
        ResumeChunk::There => (false, None),
        ResumeChunk::Expired { stream_first } => {
            let gone = Lost { from_seq: last.audio.to_seq + 1, to_seq: stream_first.saturating_sub(1) };
            (true, Some(gone).filter(|gone| gone.to_seq >= gone.from_seq && !last.end))
        }
    };
    StartPoint {
        after: Some(Box::new(last.into())),
        expired,
        lost,
        checkpoint_missing: matches!(checkpoint, Some(None)),
        checkpoint: checkpoint.flatten().unwrap_or_default(),
        late: Vec::new(),
        taken_over: true,
    }
}

/// Reads the chain's last final from the leader; repeats until it answers.
pub(crate) async fn last_final(chain: &Chain, kind: Kind, id: &StreamId) -> Result<Option<StoredFinal>, ChainError> {
    let mut backoff = Backoff::default();
    loop {
        match chain.last(kind, id).await {
            Ok(last) => return Ok(last),
            // It will not become readable.
            Err(error @ (ChainError::Foreign { .. } | ChainError::Encode(_))) => return Err(error),
            Err(error) => {
                tracing::warn!(
                    session = kind.session(id),
                    job = kind.job(id),
                    error = &error as &dyn std::error::Error,
                    "last final not read, trying again"
                );
                backoff.wait().await;
            }
        }
    }
}

/// Everything else that [`start_point`] needs, from the server. Without a log nothing expires.
pub(crate) async fn locate(
    chain: &Chain,
    log: Option<&AudioLog>,
    kind: Kind,
    id: &StreamId,
    last: Option<&Final>,
) -> Result<StartPoint, ChainError> {
    let Some(last) = last else {
        return Ok(StartPoint::beginning());
    };
    let checkpoint = match last.checkpoint_seq {
        None => None,
        Some(seq) => Some(checkpoint(chain, kind, id, seq).await?),
    };
    let chunk = match log {
        Some(log) => resume_chunk(log, id, last.resume.seq).await,
        None => ResumeChunk::There,
    };
    Ok(start_point(last, checkpoint, chunk))
}

async fn checkpoint(chain: &Chain, kind: Kind, id: &StreamId, seq: u64) -> Result<Option<Checkpoint>, ChainError> {
    let mut backoff = Backoff::default();
    loop {
        match chain.checkpoint_get(kind, id, seq).await {
            Ok(found) => return Ok(found),
            Err(error @ (ChainError::Foreign { .. } | ChainError::Encode(_))) => {
                tracing::error!(
                    session = kind.session(id),
                    job = kind.job(id),
                    seq,
                    error = &error as &dyn std::error::Error,
                    "checkpoint unreadable"
                );
                return Ok(None);
            }
            Err(error) => {
                tracing::warn!(
                    session = kind.session(id),
                    job = kind.job(id),
                    seq,
                    error = &error as &dyn std::error::Error,
                    "checkpoint not read, trying again"
                );
                backoff.wait().await;
            }
        }
    }
}

async fn resume_chunk(log: &AudioLog, id: &StreamId, seq: u64) -> ResumeChunk {
    let mut backoff = Backoff::default();
    loop {
        match look_for(log, id, seq).await {
            Ok(Some(chunk)) => return chunk,
            Ok(None) => tracing::debug!(session = %id, seq, "the replica does not have it yet"),
            Err(error) => {
                tracing::warn!(session = %id, seq, error = &error as &dyn std::error::Error, "log not read, trying again");
            }
        }
        backoff.wait().await;
    }
}

/// None: this replica is behind, ask again.
async fn look_for(log: &AudioLog, id: &StreamId, seq: u64) -> Result<Option<ResumeChunk>, LogError> {
    let expired = async || Ok(Some(ResumeChunk::Expired { stream_first: log.bounds().await?.first_seq }));
    match log.next(id, seq).await? {
        Some(entry) if entry.seq == seq => Ok(Some(ResumeChunk::There)),
        Some(_) => expired().await,
        // Only the leader can say that nothing is left.
        None => match log.last(id).await? {
            Some(entry) if entry.seq >= seq => Ok(None),
            _ => expired().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::outputs::tests::final_of;

    #[test]
    fn what_is_left_decides_where_to_go_on() {
        let mut last = final_of(3);
        last.audio.to_seq = 20;
        last.resume.seq = 17;
        let there = start_point(&last, None, ResumeChunk::There);
        assert_eq!((there.first_seq(), there.expired, there.lost), (17, false, None));

        // (first of the stream, end, lost)
        let cases = [
            (18, false, None),
            (20, false, None),
            (21, false, None),
            (22, false, Some(Lost { from_seq: 21, to_seq: 21 })),
            (40, false, Some(Lost { from_seq: 21, to_seq: 39 })),
            (40, true, None),
        ];
        for (stream_first, end, lost) in cases {
            last.end = end;
            let start = start_point(&last, None, ResumeChunk::Expired { stream_first });
            assert_eq!((start.first_seq(), start.expired, start.lost), (21, true, lost), "{stream_first} {end}");
        }
    }

    #[test]
    fn a_checkpoint_that_is_gone_is_said() {
        let last = final_of(0);
        let found = Checkpoint { index: 0, prompt_tail: "so far".to_owned(), ..Checkpoint::default() };
        let with = |checkpoint| start_point(&last, checkpoint, ResumeChunk::There);
        assert!(!with(None).checkpoint_missing);
        assert!(with(Some(None)).checkpoint_missing);
        let start = with(Some(Some(found.clone())));
        assert_eq!((start.checkpoint, start.checkpoint_missing), (found, false));
    }
}
