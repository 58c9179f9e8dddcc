//! What time brings to sessions: idle times, reads and writes that were lost, what leaves memory.

use std::time::Duration;

use voxfleet_schema::{id::StreamId, session::SessionState};

use super::{Core, Effect, Mark, requests};
use crate::{
    idle::Due,
    moment::Moment,
    sessions::{Known, Stage},
};

/// A read that was lost is asked for again.
const READ_AGAIN: Duration = Duration::from_secs(2);
/// Longer than any write, question or read takes with all its retries: whatever was to answer it is gone.
const LOST_AFTER: Duration = Duration::from_secs(30);
/// Reading the log behind an end may take longer, in pieces of any size.
const WALK_LOST_AFTER: Duration = Duration::from_secs(120);
const KEEP_CONTAINER: Duration = Duration::from_secs(300);
/// Going back reads again all that came since: not at each place that comes free.
const GO_BACK_EVERY: Duration = Duration::from_secs(10);

impl Core {
    /// The pace at which everything is looked at.
    pub fn tick(&mut self, now: Moment) {
        self.tick_workers(now);
        self.look_at_sessions(now);
        self.look_at_expiry(now);
        self.reconcile(now);
        self.look_at_map(now);
        self.preload_again(now);
        self.place_waiting(now);
        self.tick_jobs(now);
        self.restore(now);
    }

    /// After each batch of inputs: what came free goes to those who wait.
    pub fn settle(&mut self, now: Moment) {
        self.settle_reconciliation(now);
        self.settle_waiting(now);
        self.settle_jobs(now);
    }

    /// Sessions whose keys say that they are open. Something that a stopped predecessor had sent may have arrived after this
    /// one had read them all.
    pub fn open_keys(&mut self, ids: &[StreamId]) {
        for id in ids {
            self.look_up(id);
        }
    }

    fn look_at_sessions(&mut self, now: Moment) {
        let idle_now = self.idle_now(now);
        let flush_after = Duration::from_millis(self.config.flush_after_ms);
        let crowded = self.book.len() >= self.config.max_sessions;
        let keep = if crowded { Duration::ZERO } else { requests::keep_ended(&self.config) };
        let mut due = Vec::new();
        let mut ends = Vec::new();
        let mut notes = Vec::new();
        let mut walks = Vec::new();
        let mut loads = Vec::new();
        let mut unanswered = Vec::new();
        let mut lost = Vec::new();
        let mut asks = Vec::new();
        let mut later = Vec::new();
        let mut forget = Vec::new();
        for (id, known) in self.book.iter() {
            let session = match known {
                Known::Session(session) => session,
                Known::Loading(loading) => {
                    match loading.retry_at {
                        Some(at) if now.mono >= at => loads.push(id.clone()),
                        Some(_) => {}
                        None => unanswered.push(id.clone()),
                    }
                    continue;
                }
                Known::Container { at, .. } => {
                    if crowded || now.since(*at) >= KEEP_CONTAINER {
                        forget.push(id.clone());
                    }
                    continue;
                }
            };
            let age = now.since(session.since);
            match session.stage {
                Stage::Reading(_) if age >= READ_AGAIN => loads.push(id.clone()),
                Stage::Asking if session.ask_again.is_some_and(|at| now.mono >= at) => asks.push(id.clone()),
                Stage::Saving(_) | Stage::Asking if age >= LOST_AFTER => lost.push(id.clone()),
                Stage::Walking if age >= WALK_LOST_AFTER => lost.push(id.clone()),
                _ => {}
            }
            if !session.later.is_empty() {
                later.push(id.clone());
            }
            if session.state() == SessionState::Ended {
                let behind = session.record.ended_seq.unwrap_or(0);
                let read = session.walker.as_ref().map_or(behind + 1, |w| w.next_seq());
                if session.settled() && session.last_audio.is_some_and(|seq| seq > behind && seq >= read) {
                    walks.push(id.clone());
                } else if session.settled() && now.since(session.since) >= keep && session.later.is_empty() {
                    forget.push(id.clone());
                }
                continue;
            }
            if session.settled() && session.end_stands() {
                ends.push(id.clone());
                continue;
            }
            if session.engine_is_due(now.mono) {
                notes.push(id.clone());
            }
            let timeout = Duration::from_secs(u64::from(session.record.options.idle_timeout_s));
            let placed = session.state() == SessionState::Assigned;
            match session.idle.due(idle_now, flush_after, timeout, !session.end_stands(), placed) {
                Due::Nothing => {}
                Due::Flush => due.push((id.clone(), Mark::Pause)),
                Due::End => due.push((id.clone(), Mark::Idle)),
            }
        }
        for id in forget {
            self.book.remove(&id);
        }
        for id in unanswered {
            if let Some(Known::Loading(loading)) = self.book.get_mut(&id) {
                loading.retry_at = Some(now.mono + LOST_AFTER);
            }
        }
        for id in asks {
            self.ask_worker(&id, now);
        }
        for id in lost {
            self.begin_again(&id, now);
        }
        let max = self.config.max_sessions;
        let room = self.book.len() < max && self.book.len() <= max - max / 10;
        if room
            && now.since(self.went_back) >= GO_BACK_EVERY
            && let Some(from) = self.book.go_back()
        {
            self.went_back = now.mono;
            self.effect(Effect::GoBack { from });
        }
        for id in loads {
            match self.book.get_mut(&id) {
                Some(Known::Loading(loading)) => loading.retry_at = None,
                Some(Known::Session(session)) => session.since = now.mono,
                Some(Known::Container { .. }) | None => continue,
            }
            self.effect(Effect::Load { id });
        }
        for id in ends {
            self.check_end(&id, now);
        }
        for id in notes {
            self.note_engine(&id, now);
        }
        for id in walks {
            self.look_behind_end(&id, now);
        }
        for id in later {
            self.asks_later(&id, now);
        }
        for (id, mark) in due {
            self.append_due(&id, mark, now);
        }
    }

    /// What was under way for a session has not come back, whatever became of it: a task that failed answers nothing.
    fn begin_again(&mut self, id: &StreamId, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        tracing::error!(session = %id, "what was under way for a session was lost, beginning again");
        match std::mem::replace(&mut session.stage, Stage::Settled) {
            // It may have been written or not.
            Stage::Saving(next) => {
                session.enter(Stage::Reading(next), now.mono);
                self.effect(Effect::Load { id: id.clone() });
            }
            Stage::Asking => self.ask_worker(id, now),
            Stage::Walking => self.look_behind_end(id, now),
            other @ (Stage::Settled | Stage::Reading(_)) => session.stage = other,
        }
    }
}
