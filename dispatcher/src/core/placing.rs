//! From a session to its worker: decide, write the key, ask the worker, tell. The worker has the last word.

use std::time::Duration;

use voxfleet_schema::{
    device::Instead,
    event::What,
    failure::{Failure, FailureClass},
    fleet::Assignment,
    id::{Kind, StreamId, WorkerName},
    session::{Opened, SessionRecord, SessionState},
};

use super::{Answer, AskReply, Core, Effect, Loaded, SaveError, instead};
use crate::{
    kept::KeptEngine,
    moment::Moment,
    routing::Rows,
    sessions::{Session, Stage},
};
/// Pause before a worker is asked again whose answer was lost together with the dispatcher's own link.
const ASK_AGAIN: Duration = Duration::from_secs(1);

impl Core {
    /// Finds a worker and starts to write it down.
    pub(super) fn place(&mut self, id: &StreamId, now: Moment) -> Result<(), Failure> {
        self.refresh_roster();
        let Some(session) = self.book.session(id) else {
            return Ok(());
        };
        let (pick, reasons) = self.decide(session, |placed| placed.then_some(Rows::Short), now);
        let pick = pick?;
        let next = assigned(session, self.roster.name(pick.slot).clone(), pick.instead.clone(), now);
        if let Some(session) = self.book.session_mut(id) {
            session.reasons = reasons;
            (session.instead, session.planned) = (pick.instead, true);
        }
        self.save(id, next, now);
        Ok(())
    }

    /// The same worker again, one epoch up: it still holds the session's slot.
    pub(super) fn place_again(&mut self, id: &StreamId, worker: WorkerName, above: u64, now: Moment) {
        let Some(session) = self.book.session(id) else {
            return;
        };
        let instead = self.roster.instead(&self.request_for(&session.record.options, true), &worker, now.mono);
        let mut next = assigned(session, worker, instead.clone(), now);
        next.epoch = next.epoch.max(above + 1);
        if let Some(session) = self.book.session_mut(id) {
            session.instead = instead;
        }
        self.save(id, next, now);
    }

    /// Writes down which engine it keeps.
    pub(super) fn note_engine(&mut self, id: &StreamId, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        session.kept.tries(now.mono);
        let next = session.record.clone();
        self.save(id, next, now);
    }

    /// Writes down that nobody has it.
    pub(super) fn wait(&mut self, id: &StreamId, failure: Failure, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        session.why_waiting = Some(failure);
        let mut next = SessionRecord {
            state: SessionState::Waiting,
            worker: None,
            changed_ms: now.unix_ms,
            instead: session.told_instead.clone().or_else(|| session.left.clone()),
            ..session.record.clone()
        };
        if session.state() == SessionState::Ended {
            next.ended_seq = session.chain.filter(|c| c.end).map(|c| c.to_seq).or(next.ended_seq);
        }
        session.waits_from(now.mono);
        self.save(id, next, now);
    }

    /// Places a session that lost its worker or was refused; with no room it waits, or, if nothing was said yet and
    /// somebody waits for the answer, is refused.
    pub(super) fn place_or_wait(&mut self, id: &StreamId, now: Moment) {
        let Err(failure) = self.place(id, now) else {
            return;
        };
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        // Audio, or an end that may follow some: after a takeover only the last entry is known.
        let heard = session.last.is_some_and(|seq| session.record.ended_seq.is_none_or(|end| seq > end));
        if !heard && !session.record.implicit && !session.opens.is_empty() && session.displaced_from.is_none() {
            session.why_waiting = Some(failure);
            let next = SessionRecord {
                state: SessionState::Ended,
                worker: None,
                changed_ms: now.unix_ms,
                ..session.record.clone()
            };
            return self.save(id, next, now);
        }
        if session.state() == SessionState::Waiting && session.revision.is_some() {
            session.why_waiting = Some(failure.clone());
            session.enter(Stage::Settled, now.mono);
            self.joins_queue(id);
            return self.refuse_opens(id, &failure, now);
        }
        self.wait(id, failure, now);
    }

    pub(super) fn save(&mut self, id: &StreamId, mut next: SessionRecord, now: Moment) {
        self.waiting.remove(id);
        let charge = (next.state == SessionState::Assigned).then(|| next.worker.clone()).flatten();
        // An ended session's slot is free once its worker has let go, not before.
        if next.state != SessionState::Ended {
            self.charge(id, charge);
        }
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        if session.state() != SessionState::Assigned && next.state == SessionState::Assigned {
            // Whom workers refuse keeps his place.
            session.waits_from(now.mono);
        }
        // A successor tells of a move that this one did not get to tell.
        next.displaced_from = session.displaced_from.clone().filter(|_| next.state != SessionState::Ended);
        if next.state == SessionState::Ended {
            (next.suspect, next.crashes, next.suspect_from) = (false, 0, None);
            // Should it be opened again, nothing has been told of that.
            (next.instead, session.told_instead, session.left) = (None, None, None);
        }
        next.engine = session.kept.for_key(next.options.policy, next.engine.as_deref()).map(str::to_owned);
        session.better_since = None;
        session.enter(Stage::Saving(Box::new(next.clone())), now.mono);
        let revision = session.revision;
        self.effect(Effect::Save { id: id.clone(), record: Box::new(next), revision });
    }

    /// Counts a session against the slots of `worker`, and of nobody else.
    pub(super) fn charge(&mut self, id: &StreamId, worker: Option<WorkerName>) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        if session.charged == worker {
            return;
        }
        let before = std::mem::replace(&mut session.charged, worker.clone());
        if let Some(load) = before.and_then(|name| self.fleet.load_mut(&name)) {
            load.unassign(id);
            self.place_due = true;
        }
        if let Some(load) = worker.and_then(|name| self.fleet.load_mut(&name)) {
            load.assign(id);
        }
    }

    pub(super) fn charge_from_record(&mut self, id: &StreamId) {
        let worker = self
            .book
            .session(id)
            .filter(|s| s.state() == SessionState::Assigned)
            .and_then(|s| s.record.worker.clone())
            .filter(|name| self.fleet.get(name).is_some());
        if worker.is_some() {
            self.charge(id, worker);
        }
    }

    /// The key was written, or not.
    pub fn saved(&mut self, id: &StreamId, result: Result<u64, SaveError>, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        // The answer to a write that was given up long ago changes nothing about what goes on since.
        if !matches!(session.stage, Stage::Saving(_)) {
            return;
        }
        let Stage::Saving(next) = std::mem::replace(&mut session.stage, Stage::Settled) else {
            return;
        };
        if result.is_err() {
            // It may not leave at all.
            session.left = None;
        }
        match result {
            Ok(revision) => self.written(id, *next, revision, now),
            Err(SaveError::Conflict) => {
                tracing::info!(session = %id, "session record was written by somebody else, reading it");
                session.enter(Stage::Reading(next), now.mono);
                self.effect(Effect::Load { id: id.clone() });
            }
            // It may stand there or not. Upkeep looks after a pause: a bucket that is full refuses at once, each time.
            Err(SaveError::Failed(error)) => {
                tracing::warn!(session = %id, error, "session record not written, reading it soon");
                session.enter(Stage::Reading(next), now.mono);
            }
        }
    }

    fn written(&mut self, id: &StreamId, next: SessionRecord, revision: u64, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        let was_new = session.revision.is_none();
        let noted = is_note(&session.record, &next);
        session.record = next;
        session.kept.learn(KeptEngine::of_key(session.record.engine.as_deref()).known());
        session.revision = Some(revision);
        session.enter(Stage::Settled, now.mono);
        if session.state() != SessionState::Ended {
            session.walker = None;
            self.book.let_pass(id);
        }
        let Some(session) = self.book.session(id) else {
            return;
        };
        let (state, implicit) = (session.state(), session.record.implicit);
        if state != SessionState::Ended {
            let record = session.record.clone();
            if let Some(opening) = self.book.session_mut(id).and_then(|session| session.opening.take()) {
                self.session_opened(&record, opening, now);
            }
        }
        if was_new && state != SessionState::Ended {
            self.session_event(id, What::Opened, now, |e| e.detail = serde_json::json!({ "implicit": implicit }));
        }
        match state {
            SessionState::Assigned if noted => self.stays(id, now),
            SessionState::Assigned => self.ask_worker(id, now),
            SessionState::Waiting => {
                let Some(session) = self.book.session_mut(id) else {
                    return;
                };
                let failure = session.why_waiting.clone();
                self.joins_queue(id);
                let reasons = self.reasons_now(id, Rows::Short, now);
                tracing::info!(session = %id, why = failure.as_ref().map(tracing::field::display), "session waits");
                let told = failure.clone();
                self.session_event(id, What::Waiting, now, |e| {
                    e.error = told;
                    e.detail = serde_json::json!({ "candidates": reasons });
                });
                if let Some(failure) = failure {
                    self.refuse_opens(id, &failure, now);
                }
            }
            SessionState::Ended | SessionState::Unknown => self.ended(id, now),
        }
    }

    /// Its worker has it as before.
    fn stays(&mut self, id: &StreamId, now: Moment) {
        let opens = self.book.session_mut(id).map(|s| std::mem::take(&mut s.opens)).unwrap_or_default();
        for call in opens {
            self.answer_opened(id, call);
        }
        self.check_end(id, now);
    }

    pub(super) fn ask_worker(&mut self, id: &StreamId, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        let Some(worker) = session.record.worker.clone() else {
            return;
        };
        // The record keeps what was asked for; the worker is told what it can run.
        let mut options = session.record.options.clone();
        (session.instead, session.planned) = (session.record.instead.clone(), true);
        self.fleet.touch(&worker);
        let mut model_asked = None;
        if let Some(instead) = session.instead.as_ref().filter(|instead| instead.model.is_some()) {
            (options.model, model_asked) = (instead.model.clone(), instead.asked.clone());
        }
        let assignment = Assignment {
            kind: Kind::Session,
            id: id.clone(),
            epoch: session.record.epoch,
            model_asked,
            options,
            suspect: session.record.suspect,
            crashes: session.record.crashes,
            suspect_from: session.record.suspect_from,
            traceparent: None,
        };
        session.enter(Stage::Asking, now.mono);
        session.ask_again = None;
        let trace = session.record.traceparent;
        let traceparent = self.handed(trace.as_ref(), assignment.epoch);
        self.effect(Effect::Ask { worker, assignment: Box::new(Assignment { traceparent, ..assignment }) });
    }

    /// The worker answered, or did not.
    pub fn asked(&mut self, id: &StreamId, epoch: u64, worker: &WorkerName, reply: AskReply, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        let current = session.record.epoch == epoch && session.record.worker.as_ref() == Some(worker);
        if !matches!(session.stage, Stage::Asking) || !current {
            return;
        }
        if matches!(reply, AskReply::Silent(_)) && !self.fleet.may_judge(now.mono) {
            // That says more about the dispatcher's own link than about the worker: the same one again, soon.
            session.ask_again = Some(now.mono + ASK_AGAIN);
            return;
        }
        session.enter(Stage::Settled, now.mono);
        match reply {
            AskReply::Taken => self.taken(id, epoch, worker, now),
            AskReply::Refused(_) | AskReply::Silent(_) => {
                let class = match &reply {
                    AskReply::Refused(failure) => failure.class,
                    _ => FailureClass::Timeout,
                };
                let record = session.record.clone();
                self.session_assigned(&record, worker, Some(class), now);
                tracing::info!(session = %id, epoch, gpu = %worker.gpu_id, ?reply, "worker did not take the session");
                self.refused_by(id, worker);
                self.charge(id, None);
                self.place_or_wait(id, now);
            }
        }
    }

    fn taken(&mut self, id: &StreamId, epoch: u64, worker: &WorkerName, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        session.refused.clear();
        session.why_waiting = None;
        (session.unplaced_since, session.told_failed, session.closing_since) = (None, false, None);
        let opens = std::mem::take(&mut session.opens);
        if session.told_epoch < epoch {
            session.told_epoch = epoch;
            let reasons = std::mem::take(&mut session.reasons);
            let from = session.displaced_from.take();
            let suspect = session.record.suspect;
            let instead = session.record.instead.clone();
            let left = session.left.take();
            let told = std::mem::replace(&mut session.told_instead, instead.clone()).or(left);
            let record = session.record.clone();
            let asked = record.options.model.clone();
            self.log_slot("session assigned", id, epoch, worker, record.traceparent.as_ref());
            self.session_assigned(&record, worker, None, now);
            // Whoever has it again never lost it.
            if let Some(from) = from.filter(|from| from != worker) {
                // A draining worker waits for this; a dead one is not in the fleet any more.
                let held = self.fleet.get(&from).and_then(|w| {
                    w.heartbeat.held.iter().find(|h| h.kind == Kind::Session && h.id == *id).map(|h| h.epoch)
                });
                if let Some(epoch) = held {
                    let finish_ms = self.finish_ms(&from, suspect, now);
                    self.effect(Effect::Release { worker: from.clone(), id: id.clone(), epoch, finish_ms });
                }
                self.reconcile_due = true;
                let why = self.why_moved(&from);
                self.session_moved(&record, (&from, worker), why, now);
                self.session_event(id, What::Moved, now, |e| {
                    e.epoch = Some(epoch);
                    e.gpu_id = Some(worker.gpu_id.to_string());
                    e.detail = serde_json::json!({ "from": from, "to": worker, "why": why });
                });
            }
            self.session_event(id, What::Assigned, now, |e| {
                e.epoch = Some(epoch);
                e.gpu_id = Some(worker.gpu_id.to_string());
                e.detail = serde_json::json!({ "incarnation": worker.incarnation, "candidates": reasons });
                instead::name_models(&mut e.detail, instead.as_ref());
            });
            if let Some((what, detail)) = self.news_of_instead(told.as_ref(), instead.as_ref(), asked, worker) {
                tracing::warn!(session = %id, epoch, gpu = %worker.gpu_id, %detail, "{}", instead::in_words(what));
                self.session_event(id, what, now, |e| {
                    e.epoch = Some(epoch);
                    e.gpu_id = Some(worker.gpu_id.to_string());
                    e.detail = detail;
                });
            }
        }
        for call in opens {
            self.answer_opened(id, call);
        }
        self.check_end(id, now);
    }

    pub(super) fn answer_opened(&mut self, id: &StreamId, call: crate::sessions::CallId) {
        let Some(session) = self.book.session(id) else {
            return;
        };
        let Some(worker) = session.record.worker.clone() else {
            return;
        };
        let opened =
            Opened { session: id.clone(), worker, epoch: session.record.epoch, subjects: self.subjects.session(id) };
        self.answer(call, Answer::Opened(opened));
    }

    pub(super) fn refuse_opens(&mut self, id: &StreamId, failure: &Failure, now: Moment) {
        let opens = self.book.session_mut(id).map(|s| std::mem::take(&mut s.opens)).unwrap_or_default();
        for call in opens {
            let failure = self.sent_away(id, failure, now);
            self.refuse(call, failure);
        }
    }

    /// The key of a known session was read again after a write went wrong.
    pub(super) fn read_again(&mut self, id: &StreamId, result: Result<Loaded, String>, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        let Stage::Reading(next) = &session.stage else {
            return;
        };
        let next = next.as_ref().clone();
        let loaded = match result {
            Ok(loaded) => loaded,
            // Still reading: upkeep asks again.
            Err(error) => {
                tracing::warn!(session = %id, error, "cannot read session, trying again");
                session.since = now.mono;
                return;
            }
        };
        session.enter(Stage::Settled, now.mono);
        if let Some(chain) = loaded.chain
            && session.chain.is_none_or(|c| c.index < chain.index)
        {
            session.saw(chain);
        }
        match loaded.record {
            Some((record, revision)) if record == next => self.written(id, record, revision, now),
            Some((record, revision)) => {
                // Somebody else wrote: what stands there is true, and reconciliation goes on from it.
                let worker = (record.state == SessionState::Assigned).then(|| record.worker.clone()).flatten();
                session.revision = Some(revision);
                self.charge(id, worker);
                self.written(id, record, revision, now);
            }
            None => {
                // Nobody but its caller knows of it, who hears so and asks again.
                let unheard = session.last.is_none() && session.chain.is_none();
                let forget = session.revision.take().is_none() && !next.implicit && unheard;
                // Nothing stands there: whoever asked for it hears so, instead of nothing.
                let failure = Failure {
                    retry_after_ms: Some(self.config.retry_after_ms),
                    ..Failure::new(FailureClass::Timeout, "the session's record cannot be written now")
                };
                self.refuse_opens(id, &failure, now);
                if forget { self.forget_unwritten(id, now) } else { self.save(id, next, now) }
            }
        }
    }

    /// A session whose key was never written takes no slot.
    fn forget_unwritten(&mut self, id: &StreamId, now: Moment) {
        self.charge(id, None);
        let later = self.book.session_mut(id).map(|s| std::mem::take(&mut s.later)).unwrap_or_default();
        self.book.remove(id);
        self.asks(id, later, now);
    }
}

/// The key says more than before, and nothing that its worker would have to hear. Whom it was taken from is told by then.
fn is_note(before: &SessionRecord, next: &SessionRecord) -> bool {
    let (engine, displaced_from) = (next.engine.clone(), next.displaced_from.clone());
    before.engine != engine && SessionRecord { engine, displaced_from, ..before.clone() } == *next
}

/// The record of a session that `worker` is to have.
fn assigned(session: &Session, worker: WorkerName, instead: Option<Instead>, now: Moment) -> SessionRecord {
    SessionRecord {
        state: SessionState::Assigned,
        epoch: session.next_epoch(),
        worker: Some(worker),
        instead,
        changed_ms: now.unix_ms,
        ..session.record.clone()
    }
}
