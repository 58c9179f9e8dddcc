//! Open sessions as people list them.

use std::collections::HashMap;

use voxfleet_schema::{
    fleet::WorkerHealth,
    id::{Kind, StreamId},
    session::{SessionList, SessionListRequest, SessionRecord, SessionState, SessionStatus, SessionSummary},
};

use super::{Answer, Core};
use crate::{
    moment::Moment,
    sessions::{CallId, Session},
};

/// Lines where nothing is said, and the most: a line is about 200 bytes, and an answer stays under a server's payload.
const USUAL: usize = 100;
const MOST: usize = 5_000;

/// Logged minus decoded of everything that is held, as heartbeats said last.
type Lags<'a> = HashMap<&'a StreamId, u64>;

impl Core {
    /// Every open session, in no order.
    pub fn open_sessions(&self) -> Vec<SessionSummary> {
        let lags = self.lags();
        self.book.sessions().filter(|(_, s)| is_open(s)).map(|(_, s)| summary(s, &lags)).collect()
    }

    /// How many workers are in each state, for whoever waits for a change.
    pub fn healths(&self, now: Moment) -> Vec<(WorkerHealth, usize)> {
        let mut counts: Vec<(WorkerHealth, usize)> = Vec::new();
        for (_, worker) in self.fleet.workers() {
            let health = worker.health(now.mono, &self.config);
            match counts.iter_mut().find(|(known, _)| *known == health) {
                Some((_, count)) => *count += 1,
                None => counts.push((health, 1)),
            }
        }
        counts.sort_by_key(|(health, _)| *health as u8);
        counts
    }

    pub(super) fn list_sessions(&mut self, call: CallId, request: &SessionListRequest) {
        let wanted = |s: &Session| is_open(s) && request.state.is_none_or(|state| s.state() == state);
        let mut found: Vec<(&StreamId, &Session)> = self.book.sessions().filter(|(_, s)| wanted(s)).collect();
        let total = found.len() as u64;
        found.retain(|(id, _)| request.after.as_ref().is_none_or(|after| *id > after));
        found.sort_by_key(|(id, _)| *id);
        found.truncate(request.limit.map_or(USUAL, |limit| (limit as usize).clamp(1, MOST)));
        let lags = self.lags();
        let sessions = found.into_iter().map(|(_, s)| summary(s, &lags)).collect();
        self.answer(call, Answer::Sessions(Box::new(SessionList { sessions, total })));
    }

    fn lags(&self) -> Lags<'_> {
        let held = self.fleet.workers().flat_map(|(_, worker)| &worker.heartbeat.held);
        held.filter(|held| held.kind == Kind::Session).filter_map(|held| Some((&held.id, held.lag_ms?))).collect()
    }
}

fn is_open(session: &Session) -> bool {
    matches!(session.state(), SessionState::Waiting | SessionState::Assigned)
}

fn summary(session: &Session, lags: &Lags<'_>) -> SessionSummary {
    SessionSummary {
        last_final: session.chain.map(|chain| chain.index),
        lag_ms: lags.get(&session.record.id).copied(),
        why: session.why_waiting.clone(),
        ..of_record(&session.record)
    }
}

/// The line of one session, from an answer about it.
pub fn summary_of(status: &SessionStatus) -> SessionSummary {
    SessionSummary { last_final: status.last_final, ..of_record(&status.record) }
}

fn of_record(record: &SessionRecord) -> SessionSummary {
    let runs = record.instead.as_ref().and_then(|instead| instead.model.clone());
    SessionSummary {
        session: record.id.clone(),
        state: record.state,
        epoch: record.epoch,
        worker: record.worker.clone(),
        model: runs.or_else(|| record.options.model.clone()),
        language: record.options.language.clone(),
        opened_ms: record.opened_ms,
        last_final: None,
        lag_ms: None,
        why: None,
    }
}
