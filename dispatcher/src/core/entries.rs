//! What the tail reads. Known open sessions take the short way: one lookup, one hint.

use voxfleet_schema::{
    audio::RawEntry,
    event::What,
    failure::{Failure, FailureClass},
    id::{IdError, StreamId},
    session::{SessionOptions, SessionRecord, SessionState},
    trace::TraceContext,
};

use super::{Core, Effect, Loaded};
use crate::{
    moment::Moment,
    open::{self, ContainerSeen, First, Opener, Rejected},
    routing::NO_CAPACITY,
    sessions::{Asked, CallId, EntryNote, Known, Loading, Session, Stage},
};

/// Stands for a name that is none, in events about it.
const NO_NAME: &str = "_invalid";

impl Core {
    /// The next entry of the log.
    pub fn entry(&mut self, id: &Result<StreamId, IdError>, entry: RawEntry, now: Moment) {
        self.book.read_to(entry.seq);
        match id {
            Ok(id) => self.entry_of(id, entry, now),
            Err(error) => {
                let failure = Failure::new(FailureClass::BadRequest, format!("session name: {error}"));
                self.rejected(NO_NAME, &Rejected { seq: entry.seq, what: What::Rejected, failure }, now);
            }
        }
    }

    fn entry_of(&mut self, id: &StreamId, entry: RawEntry, now: Moment) {
        let idle_now = self.idle_now(now);
        match self.book.get_mut(id) {
            Some(Known::Session(session)) => {
                if session.prev.is_some_and(|prev| entry.seq <= prev) {
                    // The tail went back for somebody else.
                    return;
                }
                let note = EntryNote::of(&entry);
                let prev = session.prev.replace(entry.seq);
                note_entry(session, note, idle_now);
                if session.ending() {
                    self.entry_behind_end(id, &entry, note, now);
                } else if session.revision.is_none() || session.state() == SessionState::Ended {
                    // Asked for, and its key does not say yet that it is open: whoever takes over reads this again.
                    if note.audio {
                        self.book.hold(id, note.seq);
                    }
                } else {
                    // A predecessor that is no more may have sent `ended` for it, and been heard late: until this one has
                    // written the key, that may stand there when the next one reads it.
                    let above = session.chain.is_some_and(|c| note.seq > c.to_seq);
                    let behind_end = note.audio && above && session.end_stands();
                    if session.settled()
                        && session.state() == SessionState::Assigned
                        && let Some(worker) = session.record.worker.clone()
                    {
                        self.effect(Effect::Hint { worker, id: id.clone(), entry, prev });
                    }
                    if behind_end {
                        self.book.hold(id, note.seq);
                    }
                }
            }
            Some(Known::Loading(_)) => self.entry_while_loading(id, &entry, now),
            Some(Known::Container { seen, .. }) => {
                if seen.continues(&entry) {
                    self.rejected(id.as_str(), &ContainerSeen::rejects(entry.seq), now);
                } else {
                    self.book.remove(id);
                    self.first_entry(id, &entry, now);
                }
            }
            None => self.first_entry(id, &entry, now),
        }
    }

    fn first_entry(&mut self, id: &StreamId, entry: &RawEntry, now: Moment) {
        let mut loading = Loading::default();
        match open::first(entry) {
            First::Bad(rejected) => {
                self.rejected(id.as_str(), &rejected, now);
                if let Some(seen) = ContainerSeen::of(entry).filter(|_| !self.full()) {
                    self.book.insert(id.clone(), Known::Container { seen, at: now.mono });
                }
                return;
            }
            First::Mark | First::Opens(_) if self.full() => return self.pass_over(id, entry.seq, now),
            First::Mark => loading.bare_mark = Some(entry.seq),
            First::Opens(opener) => {
                loading.opener = Some(opener);
                loading.last_audio = Some(entry.seq);
                self.book.hold(id, entry.seq);
                self.waiting.opens(id);
            }
        }
        loading.last = Some(entry.seq);
        self.load(id, loading);
    }

    /// No place for another session. While somebody waits for one in the log nobody overtakes, so that a session is opened
    /// by its first chunk.
    pub(super) fn full(&self) -> bool {
        self.book.has_passed() || self.book.len() >= self.config.max_sessions
    }

    fn pass_over(&mut self, id: &StreamId, seq: u64, now: Moment) {
        if !self.book.pass_over(seq) {
            return;
        }
        tracing::warn!(session = %id, seq, sessions = self.book.len(), "too many sessions, new ones wait in the log");
        let failure = self.no_place();
        self.session_event(id, What::Waiting, now, |e| {
            e.seq = Some(seq);
            e.error = Some(failure);
        });
    }

    fn no_place(&self) -> Failure {
        Failure {
            retry_after_ms: Some(self.config.retry_after_ms),
            ..Failure::new(FailureClass::NoCapacity, format!("{NO_CAPACITY}: too many sessions"))
        }
    }

    fn load(&mut self, id: &StreamId, loading: Loading) {
        self.book.insert(id.clone(), Known::Loading(loading));
        self.effect(Effect::Load { id: id.clone() });
    }

    fn entry_while_loading(&mut self, id: &StreamId, entry: &RawEntry, now: Moment) {
        let first = open::first(entry);
        let Some(Known::Loading(loading)) = self.book.get_mut(id) else {
            return;
        };
        loading.last = Some(entry.seq);
        if !entry.payload.is_empty() {
            loading.last_audio = Some(entry.seq);
        }
        match first {
            First::Opens(opener) if loading.opener.is_none() => {
                loading.opener = Some(opener);
                self.book.hold(id, entry.seq);
                self.waiting.opens(id);
            }
            First::Mark if loading.opener.is_none() => loading.bare_mark = Some(entry.seq),
            // Behind a chunk that opens it, it is the engine's to tell.
            First::Bad(rejected) if loading.opener.is_none() => self.rejected(id.as_str(), &rejected, now),
            First::Opens(_) | First::Mark | First::Bad(_) => {}
        }
    }

    fn entry_behind_end(&mut self, id: &StreamId, entry: &RawEntry, note: EntryNote, now: Moment) {
        let Some(session) = self.book.session(id) else {
            return;
        };
        let ended_seq = match &session.stage {
            Stage::Saving(next) | Stage::Reading(next) => next.ended_seq,
            Stage::Settled | Stage::Asking | Stage::Walking => session.record.ended_seq,
        };
        if ended_seq.is_some_and(|end| note.seq <= end) {
            return;
        }
        if !note.audio {
            if let First::Bad(rejected) = open::first(entry) {
                self.rejected(id.as_str(), &rejected, now);
            }
            return;
        }
        let settled = session.settled();
        self.book.hold(id, note.seq);
        if settled {
            self.look_behind_end(id, now);
        }
    }

    /// Key and last final of a session have been read.
    pub fn loaded(&mut self, id: &StreamId, result: Result<Loaded, String>, now: Moment) {
        self.waiting.opened(id);
        match self.book.get_mut(id) {
            Some(Known::Loading(loading)) => match result {
                Err(error) => {
                    tracing::warn!(session = %id, error, "cannot read session, trying again");
                    loading.retry_at = Some(now.mono + std::time::Duration::from_secs(1));
                    let failure = Failure {
                        retry_after_ms: Some(self.config.retry_after_ms),
                        ..Failure::new(FailureClass::Timeout, "the session's record cannot be read now")
                    };
                    for (call, _) in std::mem::take(&mut loading.asks) {
                        self.refuse(call, failure.clone());
                    }
                }
                Ok(loaded) => {
                    let Some(Known::Loading(loading)) = self.book.remove(id) else {
                        return;
                    };
                    self.loaded_first(id, loading, loaded, now);
                }
            },
            Some(Known::Session(_)) => self.read_again(id, result, now),
            Some(Known::Container { .. }) | None => {}
        }
    }

    fn loaded_first(&mut self, id: &StreamId, loading: Loading, loaded: Loaded, now: Moment) {
        let (record, revision) = match (loaded.record, loaded.chain) {
            (Some((record, revision)), _) => (record, Some(revision)),
            // The key is gone, the chain is not: as if it had ended at the last final, whatever that was.
            (None, Some(chain)) => {
                let mut record = blank_record(id, SessionOptions::default(), true, now);
                record.state = SessionState::Ended;
                record.epoch = chain.epoch;
                record.ended_seq = Some(chain.to_seq);
                (record, None)
            }
            (None, None) => return self.loaded_nothing(id, loading, now),
        };
        let ended = record.state == SessionState::Ended;
        let ended_seq = record.ended_seq;
        let last = loading.last.map(|seq| (seq, loading.last_audio == Some(seq))).or(loaded.last);
        let mut session = self.adopt(record, revision, loaded.chain, last, now);
        session.last_audio = session.last_audio.or(loading.last_audio);
        self.book.insert(id.clone(), Known::Session(Box::new(session)));
        self.charge_from_record(id);
        let beyond = |seq: u64| ended_seq.is_none_or(|end| seq > end);
        // Without a key nothing says that what lies behind the last final has been ended: it may be audio, whatever came last.
        let above =
            loading.last_audio.is_some_and(beyond) || (revision.is_none() && last.is_some_and(|(seq, _)| beyond(seq)));
        if ended && above {
            self.look_behind_end(id, now);
        } else {
            self.book.let_pass(id);
            self.check_end(id, now);
        }
        self.asks(id, loading.asks, now);
    }

    /// Neither key nor chain: it is new, or it is nothing.
    fn loaded_nothing(&mut self, id: &StreamId, loading: Loading, now: Moment) {
        let Loading { opener, last, last_audio, bare_mark, mut asks, .. } = loading;
        let open_at = asks.iter().position(|(_, asked)| matches!(asked, Asked::Open(..)));
        if let Some(at) = open_at
            && let (call, Asked::Open(options, trace)) = asks.remove(at)
        {
            self.create(id, *options, Some(call), opener.as_ref(), trace, now);
        } else if let Some(opener) = &opener {
            let options = opener.options.as_deref().cloned().unwrap_or_default();
            self.create(id, options, None, Some(opener), None, now);
        } else if let Some(seq) = bare_mark {
            let failure = Failure::new(FailureClass::BadRequest, "a flush or end without audio opens no session");
            self.rejected(id.as_str(), &Rejected { seq, what: What::Rejected, failure }, now);
        }
        if let Some(session) = self.book.session_mut(id) {
            session.last = last;
            session.last_audio = last_audio;
            session.prev = last;
        } else {
            self.book.let_pass(id);
            self.release_holders(id);
        }
        self.asks(id, asks, now);
    }

    /// A session that was not there before.
    fn create(
        &mut self,
        id: &StreamId,
        options: SessionOptions,
        call: Option<CallId>,
        opener: Option<&Opener>,
        trace: Option<TraceContext>,
        now: Moment,
    ) {
        let (traceparent, opening) = self.opens(trace.or(opener.and_then(|opener| opener.trace)), now);
        let record = SessionRecord { traceparent, ..blank_record(id, options, call.is_none(), now) };
        let mut session = Session::new(record, None, now.mono, self.idle_now(now));
        session.opening = opening;
        if opener.is_some() {
            session.idle.entry(crate::idle::Spoke::Audio { flushed: false }, self.idle_now(now));
        }
        session.opens.extend(call);
        self.book.insert(id.clone(), Known::Session(Box::new(session)));
        let placed = self.newcomers_turn(now).and_then(|()| self.place(id, now));
        let Err(failure) = placed else {
            return;
        };
        if opener.is_some() {
            self.wait(id, failure, now);
        } else {
            // Nothing has been written and nothing was said: the refusal is all there is.
            self.book.remove(id);
            if let Some(call) = call {
                let failure = self.sent_away(id, &failure, now);
                self.refuse(call, failure);
            }
        }
    }

    pub(super) fn ask_about(&mut self, id: &StreamId, call: CallId, asked: Asked, now: Moment) {
        let full = self.full();
        match self.book.get_mut(id) {
            Some(Known::Session(_)) => self.asks(id, vec![(call, asked)], now),
            Some(Known::Loading(loading)) => loading.asks.push((call, asked)),
            Some(Known::Container { .. }) | None => {
                if let Asked::Open(options, _) = &asked {
                    let may = if full { Err(self.no_place()) } else { self.may_open(options, now) };
                    if let Err(failure) = may {
                        let failure = self.sent_away(id, &failure, now);
                        return self.refuse(call, failure);
                    }
                    self.waiting.opens(id);
                }
                self.load(id, Loading { asks: vec![(call, asked)], ..Loading::default() });
            }
        }
    }

    /// A worker holds a session nobody here knows.
    pub(super) fn look_up(&mut self, id: &StreamId) {
        if self.book.get(id).is_none() {
            self.load(id, Loading::default());
        }
    }
}

fn note_entry(session: &mut Session, note: EntryNote, idle_now: std::time::Duration) {
    if session.last.is_some_and(|last| note.seq <= last) {
        return;
    }
    session.last = Some(note.seq);
    if note.audio {
        session.last_audio = Some(note.seq);
        session.own_end = None;
    } else if note.own && note.end {
        session.own_end = Some(note.seq);
    }
    if let Some(spoke) = note.spoke() {
        session.idle.entry(spoke, idle_now);
    }
}

fn blank_record(id: &StreamId, options: SessionOptions, implicit: bool, now: Moment) -> SessionRecord {
    SessionRecord {
        kind: voxfleet_schema::id::Kind::Session,
        id: id.clone(),
        state: SessionState::Waiting,
        options,
        epoch: 0,
        worker: None,
        implicit,
        opened_ms: now.unix_ms,
        changed_ms: now.unix_ms,
        ended_seq: None,
        suspect: false,
        crashes: 0,
        suspect_from: None,
        displaced_from: None,
        instead: None,
        engine: None,
        traceparent: None,
    }
}
