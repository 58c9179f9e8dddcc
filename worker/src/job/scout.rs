//! Cuts a whole recording, far ahead of whoever decodes it.

use std::sync::Arc;

use tokio::sync::mpsc;
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    session::SessionOptions,
    transcript::VadKind,
};

use super::Recording;
use crate::{
    ipc::{AfterFinal, ENTRY_COST, FinalDraft, StartPoint},
    lifecycle::{Draft, EngineDown, Treatment},
    session::{MAX_RECORDED_ENTRY, Names, REOPEN_PAUSE, Shared},
};

/// Finals of the recording, undecoded, that wait for their reader.
pub(super) const CUTS: usize = 64;

/// One recording to be cut.
pub(super) struct Scout {
    pub(super) shared: Shared,
    pub(super) names: Names,
    pub(super) options: SessionOptions,
    /// Its own decoder of it: it is far ahead of the others.
    pub(super) recording: Arc<Recording>,
    /// The detector that the chain was begun with.
    pub(super) vad: Option<VadKind>,
}

/// A final of the recording, and the detector that found it.
pub(super) type Cut = (Box<FinalDraft>, VadKind);

/// Why nothing more is cut.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Over {
    /// It is cut to its end.
    Ended,
    /// It may have killed an engine: it is decoded in one piece.
    Suspect,
    /// Whoever decodes it meets the same.
    Failed(Failure),
}

impl Scout {
    /// Cuts from `start` to the end. Drop it to stop.
    pub(super) async fn run(self, mut start: StartPoint, cuts: mpsc::Sender<Cut>) -> Over {
        loop {
            let at = start.after.as_ref().map_or(0, |after| after.to_sample);
            match self.cut(&mut start, &cuts).await {
                Some(over) => return over,
                // The child is gone. Perhaps this was why.
                None if self.shared.engine.treat(&self.names, at) != Treatment::Normal => return Over::Suspect,
                None => tokio::time::sleep(REOPEN_PAUSE).await,
            }
        }
    }

    /// As far as one child of the engine goes; `start` is behind what was cut. None: that child is gone.
    async fn cut(&self, start: &mut StartPoint, cuts: &mpsc::Sender<Cut>) -> Option<Over> {
        let engine = &self.shared.engine;
        let link = match engine.ready().await {
            Ok(link) => link,
            Err(EngineDown::Stopping | EngineDown::Failed) => {
                let why = "the engine cannot be started";
                return Some(Over::Failed(Failure::new(FailureClass::NoCapacity, why)));
            }
        };
        if self.vad.is_some_and(|vad| vad != link.vad) {
            let why = "this worker's voice detector is not that of the chain";
            return Some(Over::Failed(Failure::new(FailureClass::ModelMissing, why)));
        }
        let session = engine.scout(&link, &self.names, self.options.clone(), start.clone()).await?;
        let mut from = start.first_seq();
        let mut all_fed = false;
        loop {
            let room_again = self.shared.budget.room();
            tokio::pin!(room_again);
            room_again.as_mut().enable();
            let taken = session.outbox().take();
            for drafted in taken.drafts {
                // Nobody speaks where nobody listens.
                let Draft::Final(draft) = drafted else { continue };
                start.after = Some(Box::new(AfterFinal {
                    index: start.after.as_ref().map_or(0, |after| after.index + 1),
                    to_sample: draft.to_sample,
                    to_seq: draft.audio.to_seq,
                    end: draft.end,
                    resume: draft.resume.clone(),
                    speakers: draft.speakers.clone(),
                }));
                let end = draft.end;
                if cuts.send((draft, link.vad)).await.is_err() || end {
                    return Some(Over::Ended);
                }
            }
            if let Some(failure) = taken.failed {
                return Some(Over::Failed(failure));
            }
            if taken.gone {
                return None;
            }
            let account = &session.outbox().account;
            if all_fed || !account.has_room(MAX_RECORDED_ENTRY + ENTRY_COST) {
                tokio::select! {
                    () = session.outbox().changed() => {}
                    () = &mut room_again => {}
                }
                continue;
            }
            match self.recording.next(from, u64::MAX).await {
                Ok(Some(entry)) => {
                    from = entry.seq + 1;
                    account.take(entry.payload.len() as u64 + ENTRY_COST);
                    session.room().await?.feed(entry);
                }
                Ok(None) => all_fed = true,
                Err(failure) => return Some(Over::Failed(failure)),
            }
        }
    }
}
