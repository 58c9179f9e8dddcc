//! From the chain of a part into the chain of the whole.
//!
//! A final is taken as it is: who decoded it, with what and on which device stays in it. What is its place there is said anew:
//! whose it is, its index, its epoch, its id, and whether the recording ends with it. And who spoke: a part has words alone, the
//! scout has heard the voices, and whose they are follows from those before them, in order, as in one piece.

use std::sync::Arc;

use voxfleet_nats::transcript::{ChainError, Outcome, StoredFinal};
use voxfleet_schema::{
    event::What,
    failure::{Failure, FailureClass},
    id::{Kind, StreamId},
    job::JobStage,
    session::{Channels, Diarize, SessionOptions},
    transcript::{Checkpoint, Final, Partial},
};

use super::{Job, Work, part::is_mark, parts::Bound};
use crate::{
    engine::{
        diarize::{Ending, Heard, Listened},
        stream::Tellers,
    },
    metrics,
    session::{before_the_end, checkpointed, locate},
};

/// What is to be copied now.
pub(super) struct Copy {
    pub(super) number: u64,
    pub(super) part: StreamId,
    /// Where to read on in the stream.
    pub(super) from_seq: u64,
    /// The finals of this part that the chain of the whole lacks.
    pub(super) wanted: Vec<Bound>,
    /// Its chain has ended: what is not there will not come.
    pub(super) is_done: bool,
    /// The end of the chain of the whole.
    pub(super) last: Option<StoredFinal>,
    /// Who has spoken up to the final of this index.
    pub(super) tellers: Option<(u64, Tellers)>,
}

/// How far it got.
pub(super) struct Copied {
    pub(super) number: u64,
    pub(super) from_seq: u64,
    pub(super) last: Option<StoredFinal>,
    pub(super) tellers: Option<(u64, Tellers)>,
    /// None: more of it is to come.
    pub(super) over: Option<Over>,
}

#[derive(Debug)]
pub(super) enum Over {
    /// All of the part stands in the chain of the whole.
    All,
    /// And with it the end of the recording.
    Ended,
    LetGo,
    /// What stands in its chain is not what should stand there.
    Unusable(Failure),
    /// Nothing can be stored.
    Failed(Failure),
}

/// What a final of a part's chain is to the whole.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// It stands there, or is none of the recording's.
    Passed,
    Next,
    /// The part ended with this.
    Broken(Failure),
}

/// Judges the next final of a part's chain, where the whole wants `wanted` next.
fn place(value: &Final, wanted: &Bound) -> Place {
    if let Some(failure) = &value.error {
        return Place::Broken(failure.clone());
    }
    if is_mark(value) || value.from_sample < wanted.from_sample {
        return Place::Passed;
    }
    if (value.from_sample, value.to_sample) == (wanted.from_sample, wanted.to_sample) {
        return Place::Next;
    }
    let (from, to) = (value.from_sample, value.to_sample);
    let why = format!("its final from {from} to {to} is none of this recording's");
    Place::Broken(Failure::new(FailureClass::Internal, why))
}

/// A part's final as one of the whole.
fn adopted(value: Final, id: &StreamId, epoch: u64, last: Option<&Final>, end: bool) -> Final {
    Final {
        id: id.clone(),
        index: last.map_or(0, |last| last.index + 1),
        final_id: uuid::Uuid::new_v4().simple().to_string(),
        epoch,
        checkpoint_seq: None,
        end,
        ..value
    }
}

impl Copy {
    /// Stores what is there.
    pub(super) async fn run(mut self, job: &Job, work: &Work, options: &SessionOptions) -> Copied {
        let over = self.all(job, work, options).await;
        if let Some(last) = &self.last {
            self.tell(job, &last.value).await;
        }
        Copied { number: self.number, from_seq: self.from_seq, last: self.last, tellers: self.tellers, over }
    }

    async fn all(&mut self, job: &Job, work: &Work, options: &SessionOptions) -> Option<Over> {
        let shared = &job.means.shared;
        for wanted in std::mem::take(&mut self.wanted) {
            if job.handle.desired.borrow().finish {
                // What has begun is stored, nothing else.
                return None;
            }
            let value = loop {
                // A look that failed is made again, with the next part of the loop that this belongs to.
                let found = shared.chain.next_final(Kind::Job, &self.part, self.from_seq).await;
                let stored = match found {
                    Ok(Some(stored)) => stored,
                    Ok(None) if self.is_done => {
                        let why = "its finals are no longer stored";
                        return Some(Over::Unusable(Failure::new(FailureClass::Internal, why)));
                    }
                    Ok(None) => return None,
                    Err(error @ (ChainError::Foreign { .. } | ChainError::Encode(_))) => {
                        let why = format!("its chain cannot be read: {error}");
                        return Some(Over::Unusable(Failure::new(FailureClass::Internal, why)));
                    }
                    Err(error) => {
                        tracing::debug!(part = %self.part, %error, "chain of a part not read");
                        return None;
                    }
                };
                match place(&stored.value, &wanted) {
                    Place::Passed => self.from_seq = stored.seq + 1,
                    Place::Broken(failure) => return Some(Over::Unusable(failure)),
                    Place::Next => {
                        self.from_seq = stored.seq + 1;
                        break stored.value;
                    }
                }
            };
            let last = self.last.as_ref().map(|last| &last.value);
            if value.gpu_id != job.handle.names.gpu_id {
                work.shared.store(true, std::sync::atomic::Ordering::Relaxed);
            }
            if last.is_some_and(|last| last.to_sample != wanted.from_sample) {
                let why = format!("the chain of the whole does not end at {}, where it begins", wanted.from_sample);
                return Some(Over::Unusable(Failure::new(FailureClass::Internal, why)));
            }
            let mut value = adopted(value, &job.item.job, job.handle.epoch(), last, wanted.end);
            if options.diarize != Diarize::Off
                && options.channels == Channels::Mix
                && let Err(error) = self.attribute(&mut value, wanted.heard, job, options).await
            {
                let why = format!("its speakers cannot be stored: {error}");
                return Some(Over::Failed(Failure::new(FailureClass::Internal, why)));
            }
            if value.end {
                job.handle.figures.enter(JobStage::Finishing);
                match work.aggregate(&shared.chain, &value).await {
                    Ok(url) => value.result = Some(url),
                    Err(failure) => return Some(Over::Failed(failure)),
                }
            }
            let chain = shared.chain.traced(job.item.traceparent);
            match chain.store(&value, self.last.as_ref().map(|last| last.seq)).await {
                Ok(Outcome::Stored { seq, chain_lost }) => {
                    if chain_lost {
                        shared.events.tell(job.handle.names.event(What::ChainLost, value.epoch), None);
                    }
                    job.handle.figures.stored(&value);
                    metrics::stored(&value);
                    let end = value.end;
                    self.last = Some(StoredFinal { seq, value });
                    if end {
                        return Some(Over::Ended);
                    }
                }
                Ok(Outcome::LetGo(_)) => return Some(Over::LetGo),
                // Another worker of this epoch: it goes on behind that.
                Ok(Outcome::Rebuild(found)) => {
                    self.last = Some(*found);
                    return None;
                }
                Err(error) => {
                    let why = format!("the chain cannot be used: {error}");
                    return Some(Over::Failed(Failure::new(FailureClass::Internal, why)));
                }
            }
        }
        Some(Over::All)
    }

    /// Says who spoke in a final that stands next in the chain of the whole, and puts what is known of them before it.
    async fn attribute(
        &mut self,
        value: &mut Final,
        heard: Option<Arc<Result<Heard, String>>>,
        job: &Job,
        options: &SessionOptions,
    ) -> Result<(), ChainError> {
        let (chain, last) = (&job.means.shared.chain, self.last.as_ref().map(|last| &last.value));
        let known = self.tellers.take().filter(|(index, _)| last.is_some_and(|last| last.index == *index));
        let mut tellers = match known {
            Some((_, tellers)) => tellers,
            None => {
                let start = locate(chain, None, Kind::Job, &value.id, last).await?;
                value.checkpoint_missing = start.checkpoint_missing;
                let Some(tellers) = Tellers::new(options, &start) else { return Ok(()) };
                tellers
            }
        };
        let listened = heard.map_or(Listened::NotAsked, |heard| Listened::Heard(Arc::unwrap_or_clone(heard)));
        if let Listened::Heard(Ok(heard)) = &listened {
            value.timings.diarize_ms = heard.took.as_millis() as u64;
        }
        let told = tellers.tell(value.index, std::mem::take(&mut value.segments), listened);
        (value.segments, value.turns, value.speakers) = (told.segments, told.turns, told.speakers);
        let voices = tellers.voices();
        let mut checkpoint =
            voices.map(|voices| Checkpoint { index: value.index, voices: Some(voices), ..Checkpoint::default() });
        if value.end {
            let end = Ending {
                checkpoint: &mut checkpoint,
                segments: &mut value.segments,
                turns: &mut value.turns,
                speakers: &mut value.speakers,
            };
            before_the_end(chain, &job.handle.names, options, end, value.epoch, last.map(|last| last.index)).await?;
        }
        value.checkpoint_seq = match &checkpoint {
            Some(checkpoint) => Some(checkpointed(chain, &job.handle.names, checkpoint).await?),
            None => None,
        };
        self.tellers = Some((value.index, tellers));
        Ok(())
    }

    /// Says how far the whole is.
    async fn tell(&self, job: &Job, last: &Final) {
        if !job.handle.progress_due() {
            return;
        }
        let partial = Partial {
            kind: Kind::Job,
            id: job.item.job.clone(),
            epoch: job.handle.epoch(),
            gpu_id: job.handle.names.gpu_id.clone(),
            after_index: Some(last.index),
            from_sample: last.to_sample,
            to_sample: last.to_sample,
            committed: last.text(),
            tentative: String::new(),
            lag_ms: 0,
            progress: Some(job.handle.figures.progress()),
        };
        if let Err(error) = job.means.shared.publisher.partial(&partial).await {
            tracing::debug!(job = %job.item.job, error = &error as &dyn std::error::Error, "progress not sent");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::tests::final_of;

    fn bound(from_sample: u64, to_sample: u64) -> Bound {
        Bound { from_sample, to_sample, end: false, heard: None }
    }

    fn final_at(from_sample: u64, to_sample: u64) -> Final {
        Final { from_sample, to_sample, ..final_of(3) }
    }

    #[test]
    fn only_what_comes_next_is_taken() {
        assert_eq!(place(&final_at(100, 200), &bound(100, 200)), Place::Next);
        assert_eq!(place(&final_at(50, 100), &bound(100, 200)), Place::Passed, "it stands there already");
        assert_eq!(place(&final_at(100, 100), &bound(100, 200)), Place::Passed, "a mark");
        for odd in [final_at(100, 201), final_at(200, 300)] {
            assert!(matches!(place(&odd, &bound(100, 200)), Place::Broken(_)), "{odd:?}");
        }
        let last = Final { end: true, ..final_at(200, 200) };
        assert_eq!(place(&last, &bound(200, 200)), Place::Next, "the recording's end");
        let failure = Failure::new(FailureClass::EngineCrash, "x");
        let failed = Final { error: Some(failure.clone()), end: true, ..final_at(200, 200) };
        assert_eq!(place(&failed, &bound(200, 300)), Place::Broken(failure));
    }

    #[test]
    fn a_final_keeps_who_decoded_it_and_gets_its_place_in_the_whole() {
        let id = StreamId::new("whole").expect("id");
        let part = Final { end: true, epoch: 9, ..final_at(100, 200) };
        let whole = adopted(part.clone(), &id, 2, Some(&final_of(40)), false);
        assert_eq!((whole.index, whole.epoch, whole.end, &whole.id), (41, 2, false, &id));
        assert_ne!(whole.final_id, part.final_id);
        let restored = Final {
            id: part.id.clone(),
            index: part.index,
            final_id: part.final_id.clone(),
            epoch: part.epoch,
            end: part.end,
            ..whole
        };
        assert_eq!(restored, part, "nothing else is changed");
    }
}
