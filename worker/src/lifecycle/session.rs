//! One session inside the engine, as its task holds it.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Engine, Link, Outbox, suspects::Treatment};
use crate::{
    capacity::locked,
    ipc::{EntryFor, HeardOf, StartPoint, Suspect, ToEngine},
    session::Names,
};
use voxfleet_schema::session::SessionOptions;

/// What a session is opened with.
pub(crate) struct Opening<'a> {
    pub(crate) names: &'a Names,
    pub(crate) options: SessionOptions,
    pub(crate) start: StartPoint,
    /// Live sessions come first.
    pub(crate) background: bool,
    pub(crate) treatment: &'a Treatment,
    /// Boundaries alone: no model is needed for it.
    pub(crate) scout: bool,
    /// Of a scout: who speaks in its first final.
    pub(crate) hears: bool,
}

impl Opening<'_> {
    fn suspect(&self) -> Option<Suspect> {
        match self.treatment {
            Treatment::Normal | Treatment::Wait { .. } | Treatment::GiveUp(_) => None,
            Treatment::Alone { beyond, crashes } => {
                Some(Suspect { beyond: *beyond, crashes: *crashes, park: None, blind: false })
            }
            Treatment::Park { at, failure, crashes, blind } => {
                Some(Suspect { beyond: *at, crashes: *crashes, park: Some(failure.clone()), blind: *blind })
            }
        }
    }
}

/// One session inside the engine. Dropping it closes it there and gives its bytes back.
#[derive(Debug)]
pub(crate) struct EngineSession {
    handle: u64,
    frames: mpsc::Sender<ToEngine>,
    close: Option<mpsc::OwnedPermit<ToEngine>>,
    outbox: Arc<Outbox>,
    engine: Engine,
}

/// Room for one frame; see [`EngineSession::room`].
pub(crate) struct FeedPermit<'a> {
    handle: u64,
    permit: mpsc::Permit<'a, ToEngine>,
}

impl EngineSession {
    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Waits until a frame can be sent; cancel-safe. None: the child is gone, the outbox says so too.
    pub(crate) async fn room(&self) -> Option<FeedPermit<'_>> {
        let permit = self.frames.reserve().await.ok()?;
        Some(FeedPermit { handle: self.handle, permit })
    }
}

impl FeedPermit<'_> {
    /// Hands an entry over. Its bytes are the caller's to count, with the outbox's account.
    pub(crate) fn feed(self, entry: voxfleet_schema::audio::RawEntry) {
        self.permit.send(ToEngine::Entry(EntryFor { handle: self.handle, entry }));
    }

    /// Says what was heard again of an earlier final.
    pub(crate) fn heard(self, heard: HeardOf) {
        self.permit.send(ToEngine::Heard { handle: self.handle, heard: Box::new(heard) });
    }

    /// Says that nothing more comes.
    pub(crate) fn finish(self) {
        self.permit.send(ToEngine::Finish { handle: self.handle });
    }
}

impl Drop for EngineSession {
    fn drop(&mut self) {
        locked(&self.engine.0.outboxes).remove(&self.handle);
        self.engine.0.activity.notify_one();
        self.outbox.account.close();
        if let Some(close) = self.close.take() {
            close.send(ToEngine::Close { handle: self.handle });
        }
    }
}

impl Engine {
    /// Opens a stream of a recording that is only cut. None: the child is gone, ask [`Self::ready`] again.
    pub(crate) async fn scout(
        &self,
        link: &Link,
        names: &Names,
        options: SessionOptions,
        start: StartPoint,
    ) -> Option<EngineSession> {
        let treatment = &Treatment::Normal;
        self.open(link, Opening { names, options, start, background: true, treatment, scout: true, hears: false }).await
    }

    /// Opens a stream whose first final is only listened to. None: the child is gone.
    pub(crate) async fn hear_again(
        &self,
        link: &Link,
        names: &Names,
        options: SessionOptions,
        start: StartPoint,
    ) -> Option<EngineSession> {
        let treatment = &Treatment::Normal;
        self.open(link, Opening { names, options, start, background: true, treatment, scout: true, hears: true }).await
    }

    /// Opens a session with a child that is ready. None: the child is gone, ask [`Self::ready`] again.
    pub(crate) async fn open(&self, link: &Link, opening: Opening<'_>) -> Option<EngineSession> {
        let frames = link.frames.clone();
        // Reserved first, so that the end of a session can always be said, in order.
        let close = frames.clone().reserve_owned().await.ok()?;
        let handle = self.next_handle();
        let account = self.account(opening.background);
        let name = (opening.names.kind, opening.names.id.clone());
        let model = opening.options.model.clone().unwrap_or_else(|| self.default_model().to_owned());
        if !opening.scout {
            locked(&self.0.asked).insert(model.clone());
        }
        let outbox = Arc::new(Outbox::new(name, model, account, opening.scout));
        self.register(handle, Arc::clone(&outbox));
        let session = EngineSession { handle, frames, close: Some(close), outbox, engine: self.clone() };
        for model in self.to_unload() {
            // Before what stands in for it is loaded into the same memory.
            session.frames.send(ToEngine::Unload { model }).await.ok()?;
        }
        let suspect = opening.suspect();
        let Opening { options, start, background, scout, hears, .. } = opening;
        let (options, start) = (Box::new(options), Box::new(start));
        let open = ToEngine::Open { handle, options, start, background, suspect, scout, hears };
        session.frames.send(open).await.ok()?;
        Some(session)
    }
}
