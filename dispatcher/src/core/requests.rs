//! The API. Every request is idempotent by its id: clients ask again when they hear nothing.

use std::time::Duration;

use voxfleet_nats::api::{ApiCall, Endpoint};
use voxfleet_schema::{
    codec::CodecError,
    failure::{Failure, FailureClass},
    fleet::{DrainRequest, FleetStatus},
    id::StreamId,
    job::{JobListRequest, JobQuery},
    plan::PlanRequest,
    session::{Closed, OpenRequest, SessionListRequest, SessionOptions, SessionRequest, SessionState, SessionStatus},
    trace::TraceContext,
};

use super::{Answer, Core, Effect, Mark};
use crate::{
    jobs::request::explain,
    moment::Moment,
    routing::Rows,
    sessions::{Asked, CallId, Stage},
};

/// Dead workers named in a status.
const MOST_DEAD: usize = 64;

impl Core {
    pub fn request(&mut self, call: CallId, request: &ApiCall, now: Moment) {
        match request.endpoint {
            Endpoint::SessionOpen => match request.decode::<OpenRequest>() {
                Ok(open) => match open.options.validate() {
                    Ok(()) => {
                        let trace = request.traceparent.as_deref().and_then(TraceContext::parse);
                        self.ask_about(&open.session, call, Asked::Open(Box::new(open.options), trace), now);
                    }
                    Err(error) => self.refuse(call, Failure::new(FailureClass::BadRequest, error.to_string())),
                },
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            Endpoint::SessionStatus => match request.decode::<SessionRequest>() {
                Ok(ask) => self.ask_about(&ask.session, call, Asked::Status, now),
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            Endpoint::SessionClose => match request.decode::<SessionRequest>() {
                Ok(ask) => self.ask_about(&ask.session, call, Asked::Close, now),
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            Endpoint::SessionList => match request.decode::<SessionListRequest>() {
                Ok(list) => self.list_sessions(call, &list),
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            Endpoint::FleetStatus => {
                let status = self.fleet_status(now);
                self.answer(call, Answer::Fleet(Box::new(status)));
            }
            Endpoint::FleetDrain => match request.decode::<DrainRequest>() {
                Ok(drain) => self.drain(call, &drain, now),
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            Endpoint::Plan => match request.decode::<PlanRequest>() {
                Ok(plan) => {
                    self.refresh_roster();
                    self.answer(call, Answer::Plan(Box::new(self.roster.plan(&plan, now.mono))));
                }
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            Endpoint::JobStatus => match request.decode::<JobQuery>() {
                Ok(query) => self.ask_status(call, query, now),
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            Endpoint::JobCancel => match request.decode::<JobQuery>() {
                Ok(query) => self.ask_cancel(call, query, now),
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            Endpoint::JobList => match request.decode::<JobListRequest>() {
                Ok(list) => self.ask_list(call, list),
                Err(error) => self.refuse(call, bad_request(&error)),
            },
            other => {
                let message = format!("{other} is not available in this version");
                self.refuse(call, Failure::new(FailureClass::BadRequest, message));
            }
        }
    }

    /// What this dispatcher believes of the fleet.
    pub fn fleet_status(&self, now: Moment) -> FleetStatus {
        let (jobs_queued, jobs_assigned) = self.job_counts();
        let count = |state| self.book.sessions().filter(|(_, s)| s.state() == state).count() as u32;
        FleetStatus {
            dispatcher: self.name.clone(),
            workers: self.fleet.status(now.mono, &self.config),
            sessions_waiting: count(SessionState::Waiting),
            sessions_assigned: count(SessionState::Assigned),
            jobs_queued,
            jobs_assigned,
            dead: self.fleet.dead().into_iter().take(MOST_DEAD).collect(),
            services: self.services(now),
            verdicts_wait: self.fleet.held(now.mono).map(|why| why.as_str().to_owned()),
        }
    }

    /// Requests about a session whose key has been read.
    pub(super) fn asks(&mut self, id: &StreamId, asks: Vec<(CallId, Asked)>, now: Moment) {
        for (call, asked) in asks {
            if self.book.session(id).is_none() {
                if let Asked::Open(options, trace) = asked {
                    // The open before it was refused; each is answered for itself.
                    self.ask_about(id, call, Asked::Open(options, trace), now);
                } else {
                    self.refuse(call, Failure::new(FailureClass::NotFound, "there is no such session"));
                }
                continue;
            }
            match asked {
                Asked::Open(options, trace) => self.open(id, call, options, trace, now),
                Asked::Status => self.status(id, call, now),
                Asked::Close => self.close(id, call),
            }
        }
    }

    fn open(
        &mut self,
        id: &StreamId,
        call: CallId,
        options: Box<SessionOptions>,
        trace: Option<TraceContext>,
        now: Moment,
    ) {
        let idle_now = self.idle_now(now);
        // Whoever waits looks first, this one in its place among them.
        let turn = self.newcomers_turn(now);
        // Without one of its own it goes on in the trace that its key carries.
        let reopened = trace.map(|given| self.opens(Some(given), now));
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        let ended = session.state() == SessionState::Ended && session.settled();
        if ended {
            let before =
                (session.record.clone(), session.refused.clone(), session.displaced_from.clone(), session.idle);
            session.record.options = *options;
            session.record.implicit = false;
            session.record.ended_seq = session.chain.map(|c| c.to_seq).or(session.record.ended_seq);
            session.refused.clear();
            session.displaced_from = None;
            session.idle = crate::idle::Idle::new(idle_now);
            if let Some((trace, opening)) = reopened {
                (session.record.traceparent, session.opening) = (trace, opening);
            }
            session.opens.push(call);
            match turn.and_then(|()| self.place(id, now)) {
                Ok(()) => tracing::info!(session = %id, "opened again by request"),
                Err(failure) => {
                    // Refused: it stays as it ended.
                    if let Some(session) = self.book.session_mut(id) {
                        (session.record, session.refused, session.displaced_from, session.idle) = before;
                        session.opening = None;
                    }
                    self.refuse_opens(id, &failure, now);
                }
            }
            return;
        }
        if session.ending() || session.end_stands() || matches!(session.stage, Stage::Walking) {
            session.later.push((call, Asked::Open(options, trace)));
            return;
        }
        let wanted = match &session.stage {
            Stage::Saving(next) | Stage::Reading(next) => &next.options,
            Stage::Settled | Stage::Asking | Stage::Walking => &session.record.options,
        };
        if *wanted != *options {
            let failure = Failure::new(FailureClass::BadRequest, "the session is open with other options");
            return self.refuse(call, failure);
        }
        match (session.state(), session.settled()) {
            (SessionState::Assigned, true) => self.answer_opened(id, call),
            (SessionState::Waiting, true) => {
                session.opens.push(call);
                let why = session.why_waiting.clone();
                let failure = why.unwrap_or_else(|| self.no_capacity());
                self.refuse_opens(id, &failure, now);
            }
            _ => session.opens.push(call),
        }
    }

    fn status(&mut self, id: &StreamId, call: CallId, now: Moment) {
        let waits = self.waiting.contains(id);
        let candidates = if waits { self.reasons_now(id, Rows::All, now) } else { serde_json::Value::Null };
        let Some(session) = self.book.session(id) else {
            return;
        };
        let status = SessionStatus {
            record: session.record.clone(),
            last_final: session.chain.map(|c| c.index),
            last_audio_seq: session.last,
            why: session.why_waiting.iter().map(ToString::to_string).collect(),
            candidates,
        };
        self.answer(call, Answer::Status(Box::new(status)));
    }

    fn close(&mut self, id: &StreamId, call: CallId) {
        let Some(session) = self.book.session(id) else {
            return;
        };
        // Asked twice, or asked after it ended by itself: the end that stands is the answer.
        let stands = session.own_end.or_else(|| session.chain.filter(|_| session.end_stands()).map(|c| c.to_seq));
        let ended = session.state() == SessionState::Ended && session.settled();
        if ended && session.record.ended_seq.is_none() {
            return self.refuse(call, Failure::new(FailureClass::NotFound, "the session was never placed"));
        }
        match if ended { session.record.ended_seq } else { stands } {
            Some(end_seq) => self.answer(call, Answer::Closed(Closed { session: id.clone(), end_seq })),
            None => self.effect(Effect::Append { id: id.clone(), mark: Mark::Close(call), expect: None }),
        }
    }

    /// Requests that came while the session was ending.
    pub(super) fn asks_later(&mut self, id: &StreamId, now: Moment) {
        let Some(session) = self.book.session_mut(id) else {
            return;
        };
        if session.settled() && !session.later.is_empty() {
            let later = std::mem::take(&mut session.later);
            self.asks(id, later, now);
        }
    }
}

fn bad_request(error: &CodecError) -> Failure {
    Failure::new(FailureClass::BadRequest, explain(error))
}

/// How long sessions that ended stay in memory.
pub(super) fn keep_ended(config: &crate::config::DispatcherConfig) -> Duration {
    Duration::from_secs(config.keep_ended_s)
}
