//! What is decoded next.
//!
//! Suspects first, one at a time and with nothing beside them, be it a decode, a look at somebody's audio or the load of a
//! model; then the first words of sessions that were taken over, then finals of live sessions, then the partial that has
//! waited longest, then finals of recordings; one of those that has waited for long goes before partials, so that it is done
//! at all. While a live session has input that nobody has looked at, its next window may be a moment away: recordings wait.

use std::time::{Duration, Instant};

use super::desk::{Desk, Said, Session};
use crate::{
    engine::{
        Cancel, Purpose, Window,
        pool::{Job, Model},
    },
    ipc::{EngineConfig, EngineKind, FromEngine},
};

/// How long a recording's window waits behind partials.
const OVERDUE: Duration = Duration::from_secs(5);

/// How long new audio of a suspect waits for a moment in which nothing is decoded, before that moment is made.
const HELD: Duration = Duration::from_millis(300);

/// Whose windows are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Live,
    /// Recordings that have waited for long.
    Overdue,
    Recordings,
}

impl Turn {
    fn is_of(self, session: &Session, since: Instant) -> bool {
        match self {
            Turn::Live => !session.background,
            Turn::Overdue => session.background && since.elapsed() >= OVERDUE,
            Turn::Recordings => session.background,
        }
    }
}

impl Session {
    fn held_for_long(&self) -> bool {
        self.dirty && self.held_since.is_some_and(|at| at.elapsed() >= HELD)
    }

    /// Since when a window of a final waits.
    fn ready_since(&self) -> Option<Instant> {
        (!self.ready.is_empty()).then_some(self.ready_at)
    }

    fn wants_partial(&self) -> bool {
        self.partial.is_none()
            && self.ready.is_empty()
            && self.suspect.is_none()
            && !self.finishing
            && self.stream.partial_due()
    }

    fn partial_job(&mut self, handle: u64, model: Model, mut window: Window) -> Job {
        let now = Instant::now();
        // Of its own, so that a final can overtake it without stopping the session.
        window.cancel = Cancel::default();
        self.partial = Some(window.cancel.clone());
        self.last_partial = now;
        Job { handle, part: 0, model, window, ready_at: now }
    }
}

/// Decode threads that recordings may have beside live sessions: all but one, where there is more than one. A batch is made of
/// the windows that threads have brought, so there as many are left as go into one.
fn recordings_beside_live(config: &EngineConfig) -> usize {
    let left = if config.engine == EngineKind::Ct2 { config.ct2.batch } else { 1 };
    config.decode_states.saturating_sub(left).max(1)
}

impl Desk {
    /// Hands windows to idle threads.
    pub(super) fn dispatch(&mut self) -> Said {
        while self.pool.idle() && self.alone.is_none() && self.may_decode() {
            // For as long as a load takes, suspects stop nobody.
            let loading = self.loading();
            let next = match self.first_suspect().filter(|_| !loading) {
                // It waits until the others are done, and they for it.
                Some(_) if !self.pool.all_idle() || self.listens() || self.stepping => return Ok(()),
                Some(handle) => {
                    let job = self.job_of(handle);
                    self.alone = job.as_ref().map(|job| job.handle);
                    job
                }
                // A suspect that is to be looked at with nothing beside it has waited for long enough.
                None if !loading && self.sessions.values().any(Session::held_for_long) => None,
                None => self.next_of_the_others(),
            };
            let Some(job) = next else {
                return Ok(());
            };
            let handle = job.handle;
            let at = self.sessions.get(&handle).map_or(job.window.from_sample, |s| s.stream.from_sample());
            self.say(&FromEngine::Began { handle, at })?;
            let decode = (handle, (job.window.purpose == Purpose::Final).then_some(job.part));
            if let Err(job) = self.pool.decode(Box::new(job)) {
                self.take_back(*job);
                return self.say(&FromEngine::Over { handle });
            }
            self.pace.begins(decode, Instant::now());
        }
        Ok(())
    }

    /// Whether any window is to be decoded whose model is there.
    pub(super) fn wants_to_decode(&self) -> bool {
        self.sessions.values().any(|session| {
            let loaded = self.models.get(&session.model).is_some_and(|model| model.model.is_some());
            loaded && (!session.ready.is_empty() || session.wants_partial())
        })
    }

    fn next_of_the_others(&mut self) -> Option<Job> {
        // A suspect that waits for a load is not a moment away.
        let loading = self.loading();
        let unseen = self.sessions.values().any(|s| !s.background && s.dirty && !(loading && s.suspect.is_some()));
        let next =
            self.first_words().or_else(|| self.next_final(Turn::Live)).or_else(|| self.next_final(Turn::Overdue));
        let next = next.or_else(|| self.next_partial());
        if next.is_none() && !unseen { self.next_final(Turn::Recordings) } else { next }
    }

    /// The suspect whose window is to be decoded next: those that have done least harm first, so that on a device where
    /// everything dies no single one is blamed for it.
    pub(super) fn first_suspect(&self) -> Option<u64> {
        let waiting = self.sessions.iter().filter_map(|(handle, session)| {
            let crashes = session.suspect.as_ref()?.crashes;
            let since = session.ready_since()?;
            self.models.get(&session.model)?.model.as_ref()?;
            Some((crashes, since, *handle))
        });
        waiting.min().map(|(.., handle)| handle)
    }

    /// The window of a final that has waited longest among those whose turn it is.
    fn next_final(&mut self, turn: Turn) -> Option<Job> {
        let live = self.sessions.values().any(|s| !s.background);
        let recordings: usize = self.sessions.values().filter(|s| s.background).map(|s| s.decoding.len()).sum();
        let most = if live { recordings_beside_live(&self.config) } else { usize::MAX };
        if turn != Turn::Live && recordings >= most {
            return None;
        }
        let others = self.sessions.iter().filter(|(_, session)| session.suspect.is_none());
        let waiting = others.filter_map(|(handle, session)| {
            let since = session.ready_since()?;
            self.models.get(&session.model)?.model.as_ref()?;
            turn.is_of(session, since).then_some((since, *handle))
        });
        let (_, handle) = waiting.min()?;
        self.job_of(handle)
    }

    /// Takes the final's window that waits there.
    fn job_of(&mut self, handle: u64) -> Option<Job> {
        let session = self.sessions.get_mut(&handle)?;
        let model = self.models.get(&session.model)?.model.clone()?;
        let (part, mut window) = session.ready.pop_front()?;
        window.background = session.background;
        session.decoding.insert(part, window.cancel.clone());
        Some(Job { handle, part, model, window, ready_at: session.ready_at })
    }

    /// A quick pass over the first window of a session that was taken over, beside or before its final.
    fn first_words(&mut self) -> Option<Job> {
        let waiting = self.sessions.iter_mut().filter_map(|(handle, session)| {
            let model = self.models.get(&session.model)?.model.as_ref()?;
            let since = session.ready_since()?;
            let due = !session.background && session.suspect.is_none() && session.partial.is_none();
            (due && !session.finishing && session.stream.has_first_words()).then_some((since, *handle, model, session))
        });
        let (_, handle, model, session) = waiting.min_by_key(|(since, handle, ..)| (*since, *handle))?;
        let window = session.stream.first_words()?;
        Some(session.partial_job(handle, model.clone(), window))
    }

    fn next_partial(&mut self) -> Option<Job> {
        let due = self.sessions.iter_mut().filter_map(|(handle, session)| {
            let model = self.models.get(&session.model)?.model.as_ref()?;
            session.wants_partial().then_some((session.last_partial, *handle, model, session))
        });
        let (_, handle, model, session) = due.min_by_key(|(last, handle, ..)| (*last, *handle))?;
        let window = session.stream.partial_window()?;
        Some(session.partial_job(handle, model.clone(), window))
    }

    /// No thread took it after all.
    fn take_back(&mut self, job: Job) {
        self.alone.take_if(|handle| *handle == job.handle);
        let Some(session) = self.sessions.get_mut(&job.handle) else {
            return;
        };
        match job.window.purpose {
            Purpose::Final => {
                session.decoding.remove(&job.part);
                session.ready.push_front((job.part, job.window));
            }
            Purpose::Partial => {
                session.partial = None;
                session.stream.partial_failed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ct2::Ct2Config;

    #[test]
    fn recordings_leave_threads_to_live_windows() {
        use EngineKind::{Auto, Ct2, WhisperCpp};
        for (engine, states, batch, most) in [
            (WhisperCpp, 1, 4, 1),
            (WhisperCpp, 4, 4, 3),
            (Auto, 2, 4, 1),
            (Ct2, 8, 4, 4),
            (Ct2, 8, 16, 1),
            (Ct2, 16, 4, 12),
        ] {
            let config = EngineConfig {
                engine,
                decode_states: states,
                ct2: Ct2Config { batch, ..Ct2Config::default() },
                ..EngineConfig::default()
            };
            assert_eq!(recordings_beside_live(&config), most, "{engine:?}, {states} states, batches of {batch}");
        }
    }
}
