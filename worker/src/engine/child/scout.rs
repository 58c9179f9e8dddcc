//! Scouts: streams of recordings that are cut and not decoded, so that others can begin behind any final. Where speakers are
//! asked for, their voices are listened to all the same: whose they are can only be said in order.
//!
//! Looking for speech takes a hundredth of the time that speaking took, which for a recording of hours is still minutes. A
//! scout gets through a second of audio at a time, behind everybody else, and the loop looks at its inbox in between.

use super::{
    desk::{Desk, Said},
    unseen::guarded,
};
use crate::{
    engine::{
        EngineError,
        diarize::{Heard, Hearing},
        stream::Step,
    },
    ipc::{FinalDraft, FromEngine},
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
        let found = guarded(|| session.look()).and_then(|found| found);
        let Found { drafts, hearing } = match found {
            Ok(found) => found,
            Err(error) => return self.fail(handle, &error),
        };
        for draft in drafts {
            self.say(&FromEngine::Final { handle, draft })?;
        }
        if let Some(hearing) = hearing {
            let index = hearing.index;
            match self.pool.listen(handle, *hearing) {
                Ok(flag) => {
                    let session = self.sessions.get_mut(&handle);
                    session.into_iter().for_each(|session| session.listening.push((index, flag.clone())));
                }
                // As many listen as can.
                Err(why) => return self.overheard(handle, Err(why)),
            }
        }
        self.say_what_it_left(handle)
    }

    /// What was heard in the final that this scout has come to.
    pub(super) fn overheard(&mut self, handle: u64, heard: Result<Heard, String>) -> Said {
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        session.dirty = !session.finishing;
        if let Some(draft) = session.stream.pass_over(Some(heard)) {
            self.say(&FromEngine::Final { handle, draft })?;
        }
        self.say_what_it_left(handle)
    }
}

/// What a look ahead found.
struct Found {
    drafts: Vec<Box<FinalDraft>>,
    /// To be listened to before it goes on.
    hearing: Option<Box<Hearing>>,
}

impl super::desk::Session {
    /// Cuts what is ahead, a little of it.
    fn look(&mut self) -> Result<Found, EngineError> {
        let mut found = Found { drafts: Vec::new(), hearing: None };
        let Some(ahead) = &mut self.scout else { return Ok(found) };
        let next = ahead.len().min(ENTRIES_AT_ONCE);
        ahead.drain(..next).for_each(|entry| self.stream.push(entry));
        self.dirty = !ahead.is_empty();
        loop {
            match self.stream.step()? {
                Step::Starved | Step::Ended => return Ok(found),
                Step::Draft(draft) => found.drafts.push(draft),
                Step::Final(windows) => match windows.into_iter().find_map(|window| window.hearing) {
                    Some(hearing) => {
                        (found.hearing, self.dirty) = (Some(hearing), false);
                        return Ok(found);
                    }
                    None => found.drafts.extend(self.stream.pass_over(None)),
                },
            }
        }
    }
}
