//! Ends: a session is over when its end final stands and no audio above it has been read; what came behind goes on at a
//! higher epoch.

use voxfleet_schema::{
    event::What,
    failure::{Failure, FailureClass},
    fleet::WorkerHealth,
    id::{StreamId, WorkerName},
    session::{SessionRecord, SessionState},
};

use super::{Answer, AppendError, Core, Effect, Mark, WalkEnd};
use crate::{moment::Moment, reconcile::FINISH_WITHIN, sessions::ChainMark, sessions::Stage};

/// How long a write into the log that was lost, or is under way, keeps the next one back.
const WRITE_PAUSE: std::time::Duration = std::time::Duration::from_secs(5);
const LOST_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);
/// The same while the log is full: it takes more when something expires.
const FULL_PAUSE: std::time::Duration = std::time::Duration::from_secs(10);
const LOG_FULL: &str = "the audio log is full, and the end has no room in it; it takes more when older audio expires";

impl Core {
    /// The last final of a session was read, as reconciliation asked.
    pub fn chain_read(&mut self, id: &StreamId, chain: Option<ChainMark>, now: Moment) {
        if let Some(chain) = chain {
            self.chain_moved(id, chain, now);
        }
    }

    pub(super) fn chain_moved(&mut self, id: &StreamId, chain: ChainMark, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        // A chain that was purged starts again from 0, with the same or a higher epoch.
        let newer = session.chain.is_none_or(|c| chain.index > c.index || chain.to_seq > c.to_seq);
        if newer {
            session.saw(chain);
            self.check_end(id, now);
        }
    }

    /// Writes `ended` once the end final stands and nothing speaks behind it.
    pub(super) fn check_end(&mut self, id: &StreamId, now: Moment) {
        let Some(session) = self.book.session(id) else {
            return;
        };
        let open = matches!(session.state(), SessionState::Assigned | SessionState::Waiting);
        let Some(chain) = session.chain.filter(|_| open && session.settled() && session.end_stands()) else {
            return;
        };
        if !session.read_to_the_last(chain.to_seq) {
            return self.look_behind_end(id, now);
        }
        let next = SessionRecord {
            state: SessionState::Ended,
            changed_ms: now.unix_ms,
            ended_seq: Some(chain.to_seq),
            ..session.record.clone()
        };
        self.save(id, next, now);
    }

    /// Reads what stands behind the end final, to tell whether it goes on.
    pub(super) fn look_behind_end(&mut self, id: &StreamId, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        session.enter(Stage::Walking, now.mono);
        session.last_before_walk = session.last;
        let from = session.walker.clone();
        self.effect(Effect::Walk { id: id.clone(), from });
    }

    /// The log behind the end final has been read.
    pub fn walked(&mut self, id: &StreamId, result: Result<WalkEnd, String>, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        if !matches!(session.stage, Stage::Walking) {
            return;
        }
        session.enter(Stage::Settled, now.mono);
        let end = match result {
            Ok(end) => end,
            // Upkeep looks again.
            Err(error) => {
                return tracing::warn!(session = %id, error, "cannot read the log behind the end, trying again");
            }
        };
        match end.opener {
            Some(opener) if session.state() == SessionState::Ended => {
                if let Some(given) = opener.trace {
                    let (trace, opening) = self.opens(Some(given), now);
                    if let Some(session) = self.book.session_mut(id) {
                        (session.record.traceparent, session.opening) = (trace, opening);
                    }
                }
                let Some(session) = self.book.session_mut(id) else {
                    return;
                };
                if let Some(options) = opener.options {
                    session.record.options = *options;
                }
                session.record.implicit = true;
                session.record.ended_seq = session.chain.map(|c| c.to_seq).or(session.record.ended_seq);
                session.idle.entry(crate::idle::Spoke::Audio { flushed: false }, self.clock.now(now.mono, LOST_PAUSE));
                self.reopen(id, now);
            }
            Some(_) => self.go_on(id, now),
            None => {
                // The leader says what the log ends with, unless the tail has read more meanwhile. What stands there and
                // was not found is on a replica that lags; what was found and stands there no longer has expired.
                if session.last == session.last_before_walk {
                    session.last = end.last;
                    session.last_audio = session.last_audio.filter(|seq| end.last.is_some_and(|last| *seq <= last));
                }
                let to_seq = end.walker.to_seq();
                let behind = session.last_audio.is_some_and(|seq| seq >= end.walker.next_seq());
                session.walker = Some(end.walker);
                if !behind {
                    self.book.let_pass(id);
                }
                for rejected in &end.rejected {
                    self.rejected(id.as_str(), rejected, now);
                }
                // Otherwise the next tick looks again, not this answer: it would go round at the speed of the network.
                if self.book.session(id).is_some_and(|s| s.read_to_the_last(to_seq)) {
                    self.check_end(id, now);
                }
            }
        }
    }

    /// An ended session speaks again.
    fn reopen(&mut self, id: &StreamId, now: Moment) {
        if let Some(session) = self.book.session_mut(id) {
            session.refused.clear();
            session.displaced_from = None;
        }
        tracing::info!(session = %id, "audio behind the end, session goes on");
        // Whoever waits longer looks first.
        if let Err(failure) = self.newcomers_turn(now).and_then(|()| self.place(id, now)) {
            self.wait(id, failure, now);
        }
    }

    /// A session whose end final stands goes on: audio came behind it while it was still held.
    fn go_on(&mut self, id: &StreamId, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        let Some(chain) = session.chain else {
            return;
        };
        session.record.ended_seq = Some(chain.to_seq);
        session.walker = None;
        let assigned = session.state() == SessionState::Assigned;
        if !assigned {
            // Already waiting: whoever takes it reads that final first.
            return;
        }
        let later_owner = session.record.epoch > chain.epoch;
        let worker = session.record.worker.clone();
        if later_owner {
            // Its owner came after that final and has read past it.
            let next = session.record.clone();
            return self.save(id, next, now);
        }
        let alive = |name: &WorkerName| self.fleet.health(name, now.mono, &self.config) == WorkerHealth::Alive;
        match worker.filter(alive) {
            Some(worker) => self.place_again(id, worker, 0, now),
            None => self.place_or_wait(id, now),
        }
    }

    /// The key says `ended`.
    pub(super) fn ended(&mut self, id: &StreamId, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        let record = session.record.clone();
        let refused = session.why_waiting.take().filter(|_| !session.opens.is_empty());
        let worker = session.charged.clone();
        session.displaced_from = None;
        (session.unplaced_since, session.told_failed, session.closing_since) = (None, false, None);
        let behind = session.last_audio.is_some_and(|seq| record.ended_seq.is_none_or(|end| seq > end));
        self.charge(id, None);
        if let Some(failure) = refused {
            self.refuse_opens(id, &failure, now);
        } else {
            self.session_closed(&record, now);
            self.session_event(id, What::Ended, now, |e| {
                e.epoch = Some(record.epoch);
                e.seq = record.ended_seq;
                e.gpu_id = record.worker.as_ref().map(|w| w.gpu_id.to_string());
            });
        }
        if let Some(worker) = worker {
            // Its end final is read here before its author hears that it is stored, which counts and tells it then.
            let finish_ms = FINISH_WITHIN.as_millis() as u32;
            self.effect(Effect::Release { worker, id: id.clone(), epoch: record.epoch, finish_ms });
        }
        let walked = self.book.session(id).and_then(|s| s.walker.as_ref().map(|w| w.next_seq()));
        let last_audio = self.book.session(id).and_then(|s| s.last_audio);
        // Somebody else has written that: he had not read what this one has, which may be audio.
        let end = record.ended_seq;
        let unread = end.is_some_and(|end| self.book.session(id).is_some_and(|s| !s.read_to_the_last(end)));
        if unread || (behind && last_audio.is_some_and(|seq| walked.is_none_or(|next| seq >= next))) {
            self.look_behind_end(id, now);
        } else {
            self.book.let_pass(id);
        }
    }

    /// A worker was told to let go.
    pub fn released(&mut self, worker: &WorkerName, id: &StreamId, epoch: u64, done: bool, now: Moment) {
        if !done {
            // Its heartbeat will show it again.
            return;
        }
        if let Some(load) = self.fleet.load_mut(worker) {
            load.let_go(id);
        }
        self.place_due = true;
        let trace = self.book.session(id).and_then(|session| session.record.traceparent);
        self.log_slot("session released", id, epoch, worker, trace.as_ref());
        self.session_event(id, What::Released, now, |e| {
            e.epoch = Some(epoch);
            e.gpu_id = Some(worker.gpu_id.to_string());
        });
    }

    /// A flush or end was written into the log, or not.
    pub fn appended(&mut self, id: &StreamId, mark: Mark, result: Result<u64, AppendError>, now: Moment) {
        let idle_now = self.idle_now(now);
        if let Mark::Close(call) = mark {
            return match result {
                Ok(end_seq) => {
                    self.answer(
                        call,
                        Answer::Closed(voxfleet_schema::session::Closed { session: id.clone(), end_seq }),
                    );
                }
                Err(error) => {
                    tracing::warn!(session = %id, ?error, "end not written");
                    let (class, why) = match error {
                        AppendError::Full => (FailureClass::NoCapacity, LOG_FULL),
                        _ => (FailureClass::Timeout, "the end could not be written now"),
                    };
                    let retry_after_ms = Some(self.config.retry_after_ms);
                    self.refuse(call, Failure { retry_after_ms, ..Failure::new(class, why) });
                }
            };
        }
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        match result {
            Ok(seq) => tracing::debug!(session = %id, seq, ?mark, "entry written"),
            Err(AppendError::Conflict { last }) => {
                session.idle.pause(idle_now + LOST_PAUSE);
                // Above what was read: its entry is on the way here. Below: entries have expired or were purged.
                if last.unwrap_or(0) < session.last.unwrap_or(0) {
                    session.last = last;
                }
            }
            Err(AppendError::Full) => {
                // That it fills was told of the stream; not again for each of its sessions.
                session.idle.pause(idle_now + FULL_PAUSE);
                tracing::debug!(session = %id, ?mark, "entry not written, the log is full");
            }
            Err(AppendError::Failed(error)) => {
                session.idle.pause(idle_now + LOST_PAUSE);
                tracing::warn!(session = %id, error, ?mark, "entry not written");
            }
        }
    }

    /// Writes what is due by the idle times, unless somebody speaks first.
    pub(super) fn append_due(&mut self, id: &StreamId, mark: Mark, now: Moment) {
        let until = self.idle_now(now) + WRITE_PAUSE;
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        session.idle.pause(until);
        let expect = Some(session.last.unwrap_or(0));
        self.effect(Effect::Append { id: id.clone(), mark, expect });
    }
}
