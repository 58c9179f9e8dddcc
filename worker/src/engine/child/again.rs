//! Scouts that listen: streams that find a final which stands already, and hear who speaks in it.
//!
//! Its words are not decoded again. What is heard depends on the log alone, as what was heard the first time would have.

use super::desk::{Desk, Said};
use crate::{
    engine::diarize::{Heard, Hearing},
    ipc::{FinalDraft, FromEngine, HeardIn},
};

/// The first final of such a stream.
#[derive(Default)]
pub(super) struct Hears {
    range: (u64, u64),
    /// It waits for somebody who listens.
    waiting: Option<Box<Hearing>>,
}

impl Hears {
    /// It was found. `hearing`: none where there is nobody to listen to.
    pub(super) fn found(&mut self, draft: &FinalDraft, hearing: Option<Box<Hearing>>) -> Option<HeardIn> {
        self.range = (draft.from_sample, draft.to_sample);
        self.waiting = hearing;
        self.waiting.is_none().then(|| self.answer(Err("nobody speaks in it".to_owned())))
    }

    pub(super) fn answer(&self, heard: Result<Heard, String>) -> HeardIn {
        let (from_sample, to_sample) = self.range;
        HeardIn { from_sample, to_sample, heard }
    }
}

impl Desk {
    /// Has what was found listened to, where there is room for it. Each answer makes some.
    pub(super) fn listen_again(&mut self) -> Said {
        let waits = |session: &super::desk::Session| session.hears.as_ref().is_some_and(|h| h.waiting.is_some());
        let waiting: Vec<u64> = self.sessions.iter().filter(|(_, s)| waits(s)).map(|(handle, _)| *handle).collect();
        for handle in waiting {
            let Some(session) = self.sessions.get_mut(&handle) else { continue };
            let Some(hears) = &mut session.hears else { continue };
            let Some(hearing) = hears.waiting.take() else { continue };
            let (index, at) = (hearing.index, hears.range.0);
            // First, so that whoever finds this process dead knows what it was doing.
            self.say(&FromEngine::Began { handle, at })?;
            let listening = self.pool.listen(handle, *hearing);
            let Some(session) = self.sessions.get_mut(&handle) else { continue };
            match listening {
                Ok(flag) => session.listening.push((index, flag)),
                Err(hearing) => {
                    session.hears.iter_mut().for_each(|hears| hears.waiting = Some(hearing.clone()));
                    self.say(&FromEngine::Over { handle })?;
                }
            }
        }
        Ok(())
    }
}
