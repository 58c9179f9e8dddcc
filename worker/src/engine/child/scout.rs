//! Scouts: streams of recordings that are cut and not decoded, so that others can begin behind any final. Where speakers are
//! asked for, their voices are listened to all the same: whose they are can only be said in order.
//!
//! Looking for speech takes a hundredth of the time that speaking took, which for a recording of hours is still minutes. A
//! scout gets through a second of audio at a time, behind everybody else, and the loop looks at its inbox in between.

use super::{
    again::ToHear,
    desk::{Desk, Said},
    unseen::guarded,
};
use crate::{
    engine::{EngineError, stream::Step},
    ipc::{FinalDraft, FromEngine, HeardIn},
};

/// Entries of a recording are 200 ms.
const ENTRIES_AT_ONCE: usize = 5;

impl Desk {
    /// Whether one has something to look at now.
    pub(super) fn scouts_wait(&self) -> bool {
        let waits = |session: &super::desk::Session| session.dirty && session.scout.is_some() && !session.finishing;
        self.alone.is_none() && self.sessions.values().any(waits)
    }

    /// The next second of its recording.
    pub(super) fn scout(&mut self, handle: u64) -> Said {
        let Some(at) = self.sessions.get(&handle).map(|session| session.stream.from_sample()) else {
            return Ok(());
        };
        self.stepping = true;
        self.say(&FromEngine::Stepping { handle, at })?;
        self.scouted += 1;
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        if session.hears.is_some() {
            return match guarded(|| session.look_for_one()).and_then(|found| found) {
                Ok(Some(heard)) => self.say(&FromEngine::Heard { handle, heard: Box::new(heard) }),
                Ok(None) => Ok(()),
                Err(error) => self.fail(handle, &error),
            };
        }
        let found = guarded(|| session.look()).and_then(|found| found);
        match found {
            Ok(drafts) => {
                for draft in drafts {
                    self.say(&FromEngine::Final { handle, draft: Box::new(draft) })?;
                }
                self.say_what_it_left(handle)
            }
            Err(error) => self.fail(handle, &error),
        }
    }
}

impl super::desk::Session {
    /// Looks for the first final, and has it listened to; what can be said of it at once. Nothing behind it is looked at.
    fn look_for_one(&mut self) -> Result<Option<HeardIn>, EngineError> {
        let (Some(ahead), Some(hears)) = (&mut self.scout, &mut self.hears) else { return Ok(None) };
        let next = ahead.len().min(ENTRIES_AT_ONCE);
        ahead.drain(..next).for_each(|entry| self.stream.push(entry));
        self.dirty = !ahead.is_empty();
        let (hearing, draft) = match self.stream.step()? {
            Step::Starved | Step::Ended => return Ok(None),
            Step::Draft(draft) => (None, Some(draft)),
            Step::Final(windows) => {
                (windows.into_iter().next().and_then(|window| window.hearing), self.stream.pass_over(None))
            }
        };
        (self.finishing, self.dirty) = (true, false);
        ahead.clear();
        let said = draft.as_ref().and_then(|draft| hears.found(draft, hearing.is_some()));
        self.to_hear = hearing.map(|hearing| ToHear { at: draft.map_or(0, |draft| draft.from_sample), hearing });
        Ok(said)
    }

    /// Cuts what is ahead, a little of it.
    fn look(&mut self) -> Result<Vec<FinalDraft>, EngineError> {
        let Some(ahead) = &mut self.scout else { return Ok(Vec::new()) };
        let next = ahead.len().min(ENTRIES_AT_ONCE);
        ahead.drain(..next).for_each(|entry| self.stream.push(entry));
        self.dirty = !ahead.is_empty();
        let mut drafts = Vec::new();
        loop {
            let at = self.stream.from_sample();
            match self.stream.step()? {
                Step::Starved | Step::Ended => return Ok(drafts),
                Step::Draft(draft) => drafts.push(*draft),
                Step::Final(windows) => match windows.into_iter().find_map(|window| window.hearing) {
                    // It goes on behind it when they have been heard.
                    Some(hearing) => {
                        (self.to_hear, self.dirty) = (Some(ToHear { at, hearing }), false);
                        return Ok(drafts);
                    }
                    None => drafts.extend(self.stream.pass_over(None).map(|draft| *draft)),
                },
            }
        }
    }
}
