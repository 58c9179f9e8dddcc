//! Scouts that listen: their words are decoded elsewhere, or stand already, and their voices are heard here.
//!
//! What is heard depends on the log alone, as what would be heard beside the words.

use super::desk::{Desk, Said};
use crate::{
    engine::diarize::{Heard, Hearing},
    ipc::{FinalDraft, FromEngine, HeardIn},
};

/// The first final of a stream that looks for no more.
#[derive(Default)]
pub(super) struct Hears {
    range: (u64, u64),
}

impl Hears {
    /// It was found. What can be said of it at once: `heard` is whether somebody is to be listened to.
    pub(super) fn found(&mut self, draft: &FinalDraft, heard: bool) -> Option<HeardIn> {
        self.range = (draft.from_sample, draft.to_sample);
        (!heard).then(|| self.answer(Err("nobody speaks in it".to_owned())))
    }

    pub(super) fn answer(&self, heard: Result<Heard, String>) -> HeardIn {
        let (from_sample, to_sample) = self.range;
        HeardIn { from_sample, to_sample, heard }
    }
}

/// A window whose voices are to be heard.
pub(super) struct ToHear {
    /// Where its final begins.
    pub(super) at: u64,
    pub(super) hearing: Box<Hearing>,
}

impl Desk {
    /// Has what was found listened to, one window at a time, so that nobody is blamed for another's. Each answer makes room.
    pub(super) fn listen_again(&mut self) -> Said {
        if self.alone.is_some() || self.first_suspect().is_some() || self.listens() {
            return Ok(());
        }
        let waiting: Vec<u64> =
            self.sessions.iter().filter(|(_, s)| s.to_hear.is_some()).map(|(handle, _)| *handle).collect();
        for handle in waiting {
            let Some(session) = self.sessions.get_mut(&handle) else { continue };
            let Some(ToHear { at, hearing }) = session.to_hear.take() else { continue };
            let index = hearing.index;
            // First, so that whoever finds this process dead knows what it was doing.
            self.say(&FromEngine::Began { handle, at })?;
            let listening = self.pool.listen(handle, *hearing);
            let Some(session) = self.sessions.get_mut(&handle) else { continue };
            match listening {
                Ok(flag) => {
                    session.listening.push((index, flag));
                    return Ok(());
                }
                Err(hearing) => {
                    session.to_hear = Some(ToHear { at, hearing });
                    self.say(&FromEngine::Over { handle })?;
                }
            }
        }
        Ok(())
    }

    /// Whether somebody listens to what a scout has found.
    pub(super) fn listens(&self) -> bool {
        self.sessions.values().any(|session| session.scout.is_some() && !session.listening.is_empty())
    }

    /// What was heard in the final that a scout has come to.
    pub(super) fn overheard(&mut self, handle: u64, heard: Result<Heard, String>) -> Said {
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        if let Some(hears) = &session.hears {
            let heard = Box::new(hears.answer(heard));
            return self.say(&FromEngine::Heard { handle, heard });
        }
        session.dirty = !session.finishing;
        if let Some(draft) = session.stream.pass_over(Some(heard)) {
            self.say(&FromEngine::Final { handle, draft })?;
        }
        self.say_what_it_left(handle)
    }
}
