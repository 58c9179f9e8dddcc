//! A session from one opening in the engine to the next: feeds it, publishes what comes back.

use std::{collections::VecDeque, future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use voxfleet_nats::{
    ServerError,
    log::LogError,
    publish::PublishError,
    transcript::{Outcome, StoredFinal},
};
use voxfleet_schema::{
    audio::RawEntry,
    event::What,
    failure::{Failure, FailureClass},
    trace::TraceContext,
};

use super::{
    Desired, End, PROGRESS_EVERY, Session,
    again::Again,
    feed::{Feed, HintVerdict},
    footing::Standing,
    outputs::{LagAlarm, unix_ms},
    park,
    spans::{Course, Dated},
    store::{Kept, StoreFailed, Stored, store_draft},
};
use crate::{
    ipc::{ENTRY_COST, HeardOf, PartialDraft, StartPoint},
    lifecycle::{Draft, EngineSession},
    metrics,
};

/// Finals that may wait to be stored before the session stops feeding.
const MAX_DRAFTS: usize = 8;
/// How often the lag is looked at when nothing else happens.
const LAG_LOOK: Duration = Duration::from_secs(1);
/// The engine collects this much before a window is full or silence is committed; beyond it, it is behind.
const LONGEST_WINDOW_MS: u64 = 31_000;
/// A partial nobody could send in this time is old news.
const PARTIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Largest entry of a recording: 200 ms of eight channels at 192 kHz are 1.2 MB.
pub(crate) const MAX_RECORDED_ENTRY: u64 = 2 << 20;

type Running<'a, T> = Option<Pin<Box<dyn Future<Output = T> + Send + 'a>>>;

/// An entry and when it was logged, if it was.
type DatedEntry = Result<Option<(RawEntry, Option<u64>)>, ReadFailed>;

/// Why an entry could not be read.
#[derive(Debug)]
pub(super) enum ReadFailed {
    Log(LogError),
    /// The recording cannot be decoded; asking again gives the same.
    Recording(Failure),
}

/// What comes after a life.
#[derive(Debug)]
pub(super) enum Next {
    /// Read the last final (or go on from the one that was found) and open again.
    Reopen(Option<Box<StoredFinal>>),
    /// The end final is stored.
    Ended,
    Stop(End),
}

pub(super) struct Life<'a> {
    session: &'a Session,
    engine: Arc<EngineSession>,
    standing: Standing,
    desired: watch::Receiver<Desired>,
    epoch: u64,
    last: Option<StoredFinal>,
    feed: Feed,
    drafts: VecDeque<(Draft, Course)>,
    trace: Option<TraceContext>,
    dated: Dated,
    /// An end was drafted; what the engine drafts behind it belongs to the next epoch.
    end_drafted: bool,
    /// Since when the oldest draft could not be stored.
    storing_since: Option<Instant>,
    partial: Option<PartialDraft>,
    /// An entry that goes to the engine next; already counted.
    pending: Option<RawEntry>,
    lag: LagAlarm,
    engine_lag_ms: u64,
    next_lag_look: Instant,
    gone: bool,
    /// The engine could not look at its audio.
    erred: bool,
    /// The engine was told that nothing more comes, and said that nothing is begun any more.
    asked_to_finish: bool,
    finished: bool,
    next_progress: Instant,
    /// Finals whose speakers are owed, while none of them is listened to; an answer that goes to the engine next.
    again: Option<Again<'a>>,
    heard: Option<HeardOf>,
}

impl<'a> Life<'a> {
    pub(super) fn new(
        session: &'a Session,
        engine: EngineSession,
        standing: Standing,
        epoch: u64,
        last: Option<StoredFinal>,
        start: &StartPoint,
    ) -> Self {
        let after = start.after.as_deref();
        let done_end = after.filter(|a| a.end).map_or(0, |a| a.to_seq);
        let format = after.map(|a| a.resume.format).unwrap_or_default();
        let again = Again::new(session, &start.late, last.as_ref().map(|last| last.seq));
        Self {
            session,
            engine: Arc::new(engine),
            standing,
            desired: session.desired.clone(),
            epoch,
            last,
            feed: Feed::new(Instant::now(), start.first_seq(), done_end, format),
            drafts: VecDeque::new(),
            trace: session.desired.borrow().trace,
            dated: Dated::default(),
            end_drafted: false,
            storing_since: None,
            partial: None,
            pending: None,
            lag: LagAlarm::default(),
            engine_lag_ms: 0,
            next_lag_look: Instant::now() + LAG_LOOK,
            gone: false,
            erred: false,
            asked_to_finish: false,
            finished: false,
            next_progress: Instant::now(),
            again,
            heard: None,
        }
    }

    pub(super) async fn run(mut self: Box<Self>) -> Next {
        let session = self.session;
        let shared = &session.shared;
        let engine = Arc::clone(&self.engine);
        let _hints = session.hints.read();
        let max_entry = session.max_entry();
        let mut storing: Running<'a, Result<Stored, StoreFailed>> = None;
        let mut sending: Running<'a, Result<(), PublishError>> = None;
        let mut reading: Running<'a, DatedEntry> = None;
        let mut hearing: Running<'a, (Again<'a>, Option<HeardOf>)> = self.again.take().map(hear_next);
        loop {
            let desired = self.desired.borrow_and_update().clone();
            if desired.epoch > self.epoch {
                return Next::Reopen(None);
            }
            if let Some(end) = self.take_outputs() {
                return Next::Stop(end);
            }
            if storing.is_none() {
                match self.drafts.pop_front() {
                    Some((draft, course)) => {
                        self.storing_since.get_or_insert_with(Instant::now);
                        storing = Some(Box::pin(store_draft(
                            session,
                            draft,
                            course,
                            self.epoch,
                            self.last.as_ref().map(|l| (l.seq, l.value.index)),
                        )));
                    }
                    None if self.gone => {
                        if self.erred {
                            // What was drafted before it is stored: the next stretch is what it could not look at.
                            let at = self.last.as_ref().map_or(0, |last| last.value.to_sample);
                            shared.engine.erred(&session.names, at);
                        }
                        return Next::Reopen(None);
                    }
                    None if desired.finish && self.finished => return Next::Stop(End::Finished),
                    None => {}
                }
            }
            if sending.is_none() && storing.is_none() {
                sending = self.partial.take().map(|draft| self.send_partial(draft));
            }

            let room_again = shared.budget.room();
            tokio::pin!(room_again);
            room_again.as_mut().enable();
            let may_feed = !self.gone && !self.end_drafted && !desired.finish && self.drafts.len() < MAX_DRAFTS;
            let mut has_room = true;
            if self.pending.is_none() {
                self.take_hints(may_feed);
                has_room = self.engine.outbox().account.has_room(max_entry + ENTRY_COST);
            }
            let may_read = may_feed && self.pending.is_none() && has_room && reading.is_none();
            if may_read && self.feed.next_look() <= Instant::now() {
                reading = Some(self.read_log());
            }

            let says_finish = desired.finish && !self.asked_to_finish;
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() {
                    return Next::Stop(End::Finished);
                },
                () = engine.outbox().changed() => {}
                kept = resolve(&mut storing) => {
                    storing = None;
                    if let Some(next) = self.kept(kept) {
                        return next;
                    }
                }
                sent = resolve(&mut sending) => {
                    sending = None;
                    if let Err(error) = sent {
                        say!(debug, session.names, error = &error as &dyn std::error::Error, "partial not sent");
                    }
                }
                read = resolve(&mut reading) => {
                    reading = None;
                    if let Some(end) = self.read(read) {
                        return Next::Stop(end);
                    }
                }
                (again, heard) = resolve(&mut hearing) => {
                    self.heard = heard;
                    // One answer at a time; without one there is no other.
                    (hearing, self.again) = (None, self.heard.is_some().then_some(again));
                }
                permit = engine.room(), if self.heard.is_some() => match (permit, self.heard.take()) {
                    (Some(permit), Some(heard)) => {
                        permit.heard(heard);
                        hearing = self.again.take().map(hear_next);
                    }
                    _ => self.gone = true,
                },
                permit = engine.room(), if self.pending.is_some() || says_finish => match (permit, self.pending.take()) {
                    (Some(permit), Some(entry)) => permit.feed(entry),
                    (Some(permit), None) => {
                        permit.finish();
                        self.asked_to_finish = true;
                    }
                    // The child is gone; what it had not answered is read from the log again.
                    _ => self.gone = true,
                },
                () = session.hints.arrived() => {}
                () = sleep_until(self.feed.next_look()), if may_read && reading.is_none() => {}
                () = &mut room_again, if !has_room => {}
                () = sleep_until(self.next_lag_look) => {
                    self.observe_lag();
                    // Nothing was fed that a final has to come of.
                    if self.feed.last_fed().is_none() && self.pending.is_none() && self.stands_elsewhere() {
                        return Next::Reopen(None);
                    }
                }
            }
        }
    }

    /// Takes what the engine has said since the last time.
    fn take_outputs(&mut self) -> Option<End> {
        let taken = self.engine.outbox().take();
        let names = &self.session.names;
        for note in taken.notes {
            let (event, msg_id) = names.event_of_note(note, self.epoch);
            self.session.shared.events.tell(event, Some(msg_id));
        }
        if taken.notes_dropped > 0 {
            say!(warn, names, dropped = taken.notes_dropped, "too many notes at once");
        }
        for drafted in taken.drafts {
            let mut draft = match drafted {
                Draft::Final(draft) => draft,
                revision @ Draft::Revision(_) => {
                    let course = Course::new(&self.session.shared.tracer, self.trace, None);
                    self.drafts.push_back((revision, course));
                    continue;
                }
            };
            if let Some(part) = self.session.work.as_ref().and_then(|work| work.part.as_ref()) {
                // What comes behind it is another part's.
                draft.end = part.ends_at(draft.to_sample, draft.end);
            }
            if self.session.work.is_some()
                && let Some(failure) = &draft.error
            {
                // A live session goes on with a hole that says why; a recording can be tried again, and a result with a
                // hole would pass for a whole one.
                return Some(End::Failed(failure.clone()));
            }
            if !self.end_drafted {
                self.end_drafted = draft.end;
                self.feed.covered(draft.audio.to_seq);
                self.partial = None;
                // A final comes as soon as it can be said: what the engine was handed beyond it is how far it is behind. Who
                // is far behind has no time for partials.
                self.engine_lag_ms = self.feed.uncovered_ms(self.engine.outbox().account.used());
                let logged_ms = self.dated.covered(draft.audio.to_seq);
                let course = Course::new(&self.session.shared.tracer, self.trace, logged_ms);
                self.drafts.push_back((Draft::Final(draft), course));
            }
        }
        if let Some(partial) = taken.partial
            && !self.end_drafted
        {
            self.engine_lag_ms = partial.lag_ms;
            self.partial = Some(partial);
            self.observe_lag();
        }
        if taken.gone && !self.gone {
            say!(warn, names, epoch = self.epoch, "engine gone, session goes on from its last final");
            self.gone = true;
            self.pending = None;
        }
        self.finished |= taken.finished;
        if let Some(failure) = taken.failed.as_ref().filter(|failure| failure.class == FailureClass::OutOfMemory) {
            // The engine lives on without that model: what runs instead is found at the next opening.
            say!(warn, names, epoch = self.epoch, %failure, "no memory, session goes on from its last final");
            (self.gone, self.pending) = (true, None);
            return None;
        }
        if self.session.work.is_none()
            && let Some(failure) = taken.failed.as_ref().filter(|failure| failure.class == FailureClass::Internal)
        {
            // Elsewhere it would be the same: it is counted, and its audio set aside like that of one that kills.
            say!(warn, names, epoch = self.epoch, %failure, "its audio could not be looked at");
            (self.gone, self.erred, self.pending) = (true, true, None);
            return None;
        }
        taken.failed.map(|failure| self.session.failed(self.epoch, failure))
    }

    fn observe_lag(&mut self) {
        self.next_lag_look = Instant::now() + LAG_LOOK;
        if self.session.work.is_some() {
            // A recording is there at once; being behind it is no trouble.
            return;
        }
        let storing_ms = self.storing_since.map_or(0, |since| since.elapsed().as_millis() as u64);
        // Partials and finals tell how far behind the engine is; where none come, what it holds beyond a window does.
        let held_ms = self.feed.uncovered_ms(self.engine.outbox().account.used());
        self.engine_lag_ms = self.engine_lag_ms.min(held_ms);
        let engine_ms = self.engine_lag_ms.max(held_ms.saturating_sub(LONGEST_WINDOW_MS));
        let lag_ms = (engine_ms + self.feed.unfed_ms()).max(storing_ms);
        self.session.figures.lags(lag_ms);
        if let Some(what) = self.lag.observe(lag_ms) {
            let mut event = self.session.names.event(what, self.epoch);
            event.seq = self.feed.last_fed();
            event.detail = serde_json::json!({ "lag_ms": lag_ms });
            self.session.shared.events.tell(event, None);
        }
    }

    /// Takes hints until one can be fed.
    fn take_hints(&mut self, may_feed: bool) {
        while self.pending.is_none()
            && let Some(waiting) = self.session.hints.take()
        {
            let now = Instant::now();
            let entry = &waiting.hint.entry;
            let len = entry.payload.len() as u64;
            let room = may_feed && self.engine.outbox().account.has_room(len + ENTRY_COST);
            if self.feed.hint(now, entry.seq, waiting.hint.prev, len, room) == HintVerdict::Feed {
                self.feed.fed(now, entry);
                // A hint comes within milliseconds of its entry.
                self.hand_over(waiting.hint.entry, None);
            }
        }
    }

    /// `logged_ms`: none for what was logged just now.
    fn hand_over(&mut self, entry: RawEntry, logged_ms: Option<u64>) {
        if self.session.work.is_none() && self.session.shared.tracer.tells(self.trace.as_ref()) {
            self.dated.add(entry.seq, logged_ms.unwrap_or_else(unix_ms));
        }
        self.session.figures.fed(entry.seq);
        self.engine.outbox().account.take(entry.payload.len() as u64 + ENTRY_COST);
        self.pending = Some(entry);
    }

    fn read_log(&self) -> Pin<Box<dyn Future<Output = DatedEntry> + Send + 'a>> {
        Box::pin(self.session.entry_dated(self.feed.next_from()))
    }

    fn read(&mut self, read: DatedEntry) -> Option<End> {
        let now = Instant::now();
        match read {
            Ok(found) => {
                if self.gone || self.end_drafted {
                    // Nothing more is fed in this life.
                } else if self.pending.is_some() {
                    self.feed.look_again(now);
                } else if self.feed.log_has(now, found.as_ref().map(|(entry, _)| entry))
                    && let Some((entry, logged_ms)) = found
                {
                    self.hand_over(entry, logged_ms);
                }
            }
            Err(ReadFailed::Log(error)) => {
                say!(warn, self.session.names, error = &error as &dyn std::error::Error, "log not read, trying again");
                self.feed.log_failed(now);
            }
            Err(ReadFailed::Recording(failure)) => return Some(End::Failed(failure)),
        }
        self.observe_lag();
        None
    }

    fn send_partial(&self, draft: PartialDraft) -> Pin<Box<dyn Future<Output = Result<(), PublishError>> + Send + 'a>> {
        let after_index = self.last.as_ref().map(|l| l.value.index);
        let mut partial = self.session.names.partial_of(draft, self.epoch, after_index, self.feed.unfed_ms());
        partial.progress = self.session.work.is_some().then(|| self.session.figures.progress());
        let publisher = &self.session.shared.publisher;
        Box::pin(async move {
            match timeout(PARTIAL_TIMEOUT, publisher.partial(&partial)).await {
                Ok(sent) => sent.inspect(|()| metrics::partial()),
                Err(_) => Err(PublishError::Server(ServerError::Timeout)),
            }
        })
    }

    /// Something else is to run for it now.
    fn stands_elsewhere(&self) -> bool {
        !self.session.shared.engine.stands(&self.standing.ask, &self.standing.footing)
    }

    /// What became of a final.
    fn kept(&mut self, stored: Result<Stored, StoreFailed>) -> Option<Next> {
        let session = self.session;
        self.storing_since = None;
        let kept = match stored {
            Ok(Stored::Revision) => return None,
            Ok(Stored::Final(kept)) => Ok(*kept),
            Err(error) => Err(error),
        };
        match kept {
            Err(StoreFailed::Chain(error)) => Some(Next::Stop(session.chain_failed(self.epoch, &error))),
            Err(StoreFailed::Aggregate(failure)) => Some(Next::Stop(End::Failed(failure))),
            Ok(Kept { outcome: Outcome::Stored { seq, chain_lost }, value, parked }) => {
                if chain_lost {
                    session.shared.events.tell(session.names.event(What::ChainLost, self.epoch), None);
                }
                session.figures.stored(&value);
                metrics::stored(&value);
                session.shared.engine.passed(&session.names, value.to_sample);
                if parked {
                    park::tell(session, &value);
                }
                if session.work.is_some() && !value.end && self.next_progress <= Instant::now() {
                    self.next_progress = Instant::now() + PROGRESS_EVERY;
                    self.partial = Some(PartialDraft {
                        from_sample: value.to_sample,
                        to_sample: value.to_sample,
                        committed: value.text(),
                        tentative: String::new(),
                        lag_ms: 0,
                    });
                }
                say!(
                    debug,
                    session.names,
                    index = value.index,
                    epoch = self.epoch,
                    seq,
                    end = value.end,
                    "final stored"
                );
                let end = value.end;
                if parked && !end {
                    // The engine was told to treat it differently, which is over.
                    return Some(Next::Reopen(Some(Box::new(StoredFinal { seq, value }))));
                }
                if !end && self.drafts.is_empty() && self.stands_elsewhere() {
                    return Some(Next::Reopen(Some(Box::new(StoredFinal { seq, value }))));
                }
                let last = self.last.insert(StoredFinal { seq, value });
                if session.work.as_ref().is_some_and(|work| work.stored(last)) && !end {
                    return Some(Next::Stop(End::Paused));
                }
                self.observe_lag();
                end.then_some(Next::Ended)
            }
            Ok(Kept { outcome: Outcome::LetGo(found), .. }) => {
                Some(Next::Stop(End::LetGo { epoch: found.value.epoch }))
            }
            Ok(Kept { outcome: Outcome::Rebuild(found), .. }) => {
                say!(
                    warn,
                    session.names,
                    epoch = self.epoch,
                    found = found.value.index,
                    "another final stands there, rebuilding"
                );
                Some(Next::Reopen(Some(found)))
            }
        }
    }
}

/// The next of them.
fn hear_next<'a>(mut again: Again<'a>) -> Pin<Box<dyn Future<Output = (Again<'a>, Option<HeardOf>)> + Send + 'a>> {
    Box::pin(async move {
        let heard = again.next().await;
        (again, heard)
    })
}

/// Waits for what is running; for ever when nothing is.
async fn resolve<T>(running: &mut Running<'_, T>) -> T {
    match running {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
