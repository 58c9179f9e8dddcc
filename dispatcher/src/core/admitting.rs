//! Who may come in: the roster of the fleet kept up to date, those who wait, and those who are sent away.

use std::{collections::HashSet, time::Duration};

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    id::{StreamId, WorkerName},
    session::{SessionOptions, SessionState},
    trace::TraceContext,
};

use super::Core;
use crate::{
    admission::{self, Model, Needs, Unplaced},
    moment::Moment,
    routing::{self, Pick, Request, Rows, Seen, Service, Size, Slot},
    sessions::Session,
};

/// A worker that refused is left out until its next heartbeat but one.
pub(super) const HEARTBEATS_LEFT_OUT: u64 = 2;
/// A queue up to this long is gone through at each change, a longer one a few times a second.
const SHORT_QUEUE: usize = 1_000;
const LONG_QUEUE_EVERY: Duration = Duration::from_millis(250);

impl Core {
    /// Brings the roster up to date with what was heard and given since.
    pub(super) fn refresh_roster(&mut self) {
        let touched = self.fleet.take_touched();
        if touched.is_empty() {
            return;
        }
        let mut more = false;
        let mut twins = HashSet::new();
        for name in &touched {
            more |= self.refresh(name);
            // Which of them is the newest may have changed.
            twins.extend(self.roster.on_gpu(&name.gpu_id).filter(|other| !touched.contains(*other)).cloned());
        }
        for name in twins {
            more |= self.refresh(&name);
        }
        if more {
            self.place_due = true;
            self.job_room();
        }
    }

    fn refresh(&mut self, name: &WorkerName) -> bool {
        let Some(worker) = self.fleet.get(name) else {
            self.map_due = true;
            return self.roster.remove(name);
        };
        let sessions = worker.load.assigned().filter_map(|id| self.book.session(id));
        let sessions = sessions.filter(|s| s.planned).map(|s| s.needs_model());
        let promised: Vec<Option<&str>> =
            sessions.chain(self.jobs.planned(&worker.jobs)).map(|model| model.map(String::as_str)).collect();
        let reserve_percent = self.map.reserve_percent(&self.roles, &name.gpu_id);
        let seen = Seen {
            name,
            heartbeat: &worker.heartbeat,
            health: worker.health(worker.heard, &self.config),
            suspect_at: worker.heard + worker.patience(&self.config).suspect_after,
            superseded: self.fleet.superseded(name),
            sessions: worker.load.used(),
            jobs: worker.jobs.used(),
            promised: &promised,
            duty: self.map.duty(&self.roles, &name.gpu_id, worker.heartbeat.device.index.is_none()),
            reserve_percent: reserve_percent.unwrap_or(self.config.reserve_percent),
        };
        let (before, health) = (self.roster.health(name), seen.health);
        self.map_due |= before != Some(health);
        self.roster.put(seen, &self.config)
    }

    /// Workers that refused it just now.
    pub(super) fn left_out(&self, refused: &[(WorkerName, u64)]) -> Vec<Slot> {
        let still = |(name, seq): &(WorkerName, u64)| {
            let slot = self.roster.slot(name)?;
            (self.roster.seq(slot) < seq + HEARTBEATS_LEFT_OUT).then_some(slot)
        };
        refused.iter().filter_map(still).collect()
    }

    /// Routes a session, with every worker's reasons if `rows` asks for them.
    pub(super) fn decide(
        &self,
        session: &Session,
        rows: impl FnOnce(bool) -> Option<Rows>,
        now: Moment,
    ) -> (Result<Pick, Failure>, serde_json::Value) {
        let left_out = self.left_out(&session.refused);
        let request = Request {
            vad: session.vad(),
            engine: session.engine(),
            leaves: session.charged.as_ref(),
            left_out: &left_out,
            ..self.request_for(&session.record.options, true)
        };
        let pick = self.roster.route(&request, now.mono, &self.config);
        let reasons = rows(pick.is_ok()).map(|rows| {
            let chosen = pick.as_ref().ok().map(|pick| pick.slot);
            self.roster.explain(&request, chosen, now.mono, rows)
        });
        (pick, reasons.unwrap_or_default())
    }

    /// Every worker's reason as it would be now.
    pub(super) fn reasons_now(&mut self, id: &StreamId, rows: Rows, now: Moment) -> serde_json::Value {
        self.refresh_roster();
        let session = self.book.session(id);
        session.map(|session| self.decide(session, |_| Some(rows), now).1).unwrap_or_default()
    }

    /// A new request of a session or job with these options.
    pub(super) fn request_for<'a>(&self, options: &'a SessionOptions, live: bool) -> Request<'a> {
        let service = self.map.service_of(options.model.as_deref()).map(|service| {
            let gpus = self.map.names_gpu(service.number, |gpu| self.roster.is_cpu(gpu));
            Service { gpus, ..service }
        });
        Request { service, ..Request::new(options, live) }
    }

    /// Whether somebody who asks to open a session that nobody here knows may be let as far as to have its key read. Where
    /// there is no room now, reading it would cost three reads and change nothing: all open sessions are in the book.
    pub(super) fn may_open(&mut self, options: &SessionOptions, now: Moment) -> Result<(), Failure> {
        self.newcomers_turn(now)?;
        let request = self.request_for(options, true);
        self.roster.route(&request, now.mono, &self.config)?;
        // Those before it, whose keys are being read, have a claim on what is free.
        if self.waiting.opening() >= self.roster.free(true, now.mono) as usize {
            return Err(self.no_capacity());
        }
        Ok(())
    }

    /// Whoever waits looks before anybody who comes new.
    pub(super) fn newcomers_turn(&mut self, now: Moment) -> Result<(), Failure> {
        self.refresh_roster();
        if !self.place_due || self.waiting.is_empty() {
            return Ok(());
        }
        if self.queue_rests(now) {
            return Err(self.no_capacity());
        }
        self.place_waiting(now);
        self.refresh_roster();
        Ok(())
    }

    pub(super) fn no_capacity(&self) -> Failure {
        Failure {
            retry_after_ms: Some(self.config.retry_after_ms),
            ..Failure::new(FailureClass::NoCapacity, routing::NO_CAPACITY)
        }
    }

    /// What somebody is told who is sent away: with many others he comes again later, and not at the same moment.
    pub(super) fn sent_away(&mut self, id: &StreamId, failure: &Failure, now: Moment) -> Failure {
        let waits = matches!(failure.class, FailureClass::NoCapacity | FailureClass::NoWorkers);
        let Some(base_ms) = failure.retry_after_ms.filter(|_| waits) else {
            return failure.clone();
        };
        let wanting = self.waiting.turned_away(now.mono);
        let slots = self.roster.slots(true, now.mono);
        let retry_after_ms = Some(admission::come_again_ms(base_ms, id, wanting, slots));
        Failure { retry_after_ms, ..failure.clone() }
    }

    /// It waits, in its place among those who do.
    pub(super) fn joins_queue(&mut self, id: &StreamId) {
        if let Some(session) = self.book.session(id) {
            let age = Duration::from_secs(self.config.jobs_age_s);
            self.waiting.insert(&unplaced(session), age);
        }
    }

    /// A worker refused: it is asked again when it has sent two heartbeats more.
    pub(super) fn refused_by(&mut self, id: &StreamId, worker: &WorkerName) {
        let seq = self.fleet.get(worker).map_or(0, |w| w.heartbeat.seq);
        if let Some(session) = self.book.session_mut(id) {
            session.refused.retain(|(name, _)| name != worker);
            session.refused.push((worker.clone(), seq));
        }
        self.refusals.insert(worker.clone(), seq);
    }

    /// A worker is gone, and what it refused with it.
    pub(super) fn forget_asking(&mut self, worker: &WorkerName) {
        self.refusals.remove(worker);
    }

    /// A heartbeat: whoever its worker refused before may ask it again.
    pub(super) fn refusals_end(&mut self, worker: &WorkerName, seq: u64) {
        if self.refusals.get(worker).is_some_and(|refused| seq >= refused + HEARTBEATS_LEFT_OUT) {
            self.refusals.remove(worker);
            self.place_due = true;
        }
    }

    fn queue_rests(&self, now: Moment) -> bool {
        self.waiting.len() > SHORT_QUEUE && now.since(self.placed) < LONG_QUEUE_EVERY
    }

    /// After each batch of inputs: what came free goes to those who wait.
    pub(super) fn settle_waiting(&mut self, now: Moment) {
        self.refresh_roster();
        if self.map_due {
            self.look_at_map(now);
            self.refresh_roster();
        }
        if self.place_due && !self.queue_rests(now) {
            self.place_waiting(now);
        }
    }

    /// Gives waiting sessions what came free, in order.
    pub(super) fn place_waiting(&mut self, now: Moment) {
        self.refresh_roster();
        (self.place_due, self.placed) = (false, now.mono);
        if self.waiting.is_empty() || self.roster.free(true, now.mono) == 0 {
            return;
        }
        let queue: Vec<StreamId> = self.waiting.iter().cloned().collect();
        let mut hopeless = HashSet::new();
        for id in queue {
            let Some(session) = self.book.session(&id).filter(|s| s.settled() && s.state() == SessionState::Waiting)
            else {
                continue;
            };
            let needs = self.needs(session);
            if hopeless.contains(&needs) {
                continue;
            }
            let anywhere = session.refused.is_empty();
            if let Err(failure) = self.place(&id, now) {
                if let Some(session) = self.book.session_mut(&id) {
                    session.why_waiting = Some(failure);
                }
                if anywhere {
                    hopeless.insert(needs);
                }
                continue;
            }
            self.refresh_roster();
            if self.roster.free(true, now.mono) == 0 {
                break;
            }
        }
    }

    /// What decides whether there is room for it.
    pub(super) fn needs(&self, session: &Session) -> Needs {
        let options = &session.record.options;
        let (vad, engine) = (session.vad(), session.engine());
        Needs { model: self.model_of(options), policy: options.policy.into(), vad, engine }
    }

    pub(super) fn model_of(&self, options: &SessionOptions) -> Model {
        match &options.model {
            None => Model::Default,
            Some(model) => {
                self.roster.model_number(model).map_or_else(|| Model::Nobodys(Size::of(model)), Model::Known)
            }
        }
    }

    /// Every allocation and release in the log, with the figures that explain it.
    pub(super) fn log_slot(
        &self,
        what: &'static str,
        id: &StreamId,
        epoch: u64,
        worker: &WorkerName,
        trace: Option<&TraceContext>,
    ) {
        let f = self.figures(worker, true);
        tracing::info!(
            session = %id, epoch, gpu = %worker.gpu_id, incarnation = %worker.incarnation,
            trace_id = trace.map(TraceContext::trace_text), slots_used = f.used, slots_total = f.total, memory_used_mb = f.used_mb, memory_free_mb = f.free_mb, "{what}"
        );
    }

    pub(super) fn log_job_slot(
        &self,
        what: &'static str,
        id: &StreamId,
        epoch: u64,
        worker: &WorkerName,
        trace: Option<&TraceContext>,
    ) {
        let f = self.figures(worker, false);
        tracing::info!(
            job = %id, epoch, gpu = %worker.gpu_id, incarnation = %worker.incarnation,
            trace_id = trace.map(TraceContext::trace_text), slots_used = f.used, slots_total = f.total, memory_used_mb = f.used_mb, memory_free_mb = f.free_mb, "{what}"
        );
    }

    /// None of one that is gone.
    fn figures(&self, worker: &WorkerName, live: bool) -> Figures {
        let worker = self.fleet.get(worker);
        let beat = worker.map(|w| &w.heartbeat);
        Figures {
            used: worker.map(|w| if live { w.load.used() } else { w.jobs.used() }),
            total: beat.map(|b| if live { b.slots.total } else { b.job_slots.total }),
            used_mb: beat.map(|b| b.device.used_mb),
            free_mb: beat.map(|b| b.device.free_mb),
        }
    }
}

struct Figures {
    used: Option<u32>,
    total: Option<u32>,
    used_mb: Option<u64>,
    free_mb: Option<u64>,
}

pub(super) fn unplaced(session: &Session) -> Unplaced {
    Unplaced {
        id: session.record.id.clone(),
        priority: session.record.options.priority,
        displaced: session.displaced_from.is_some(),
        since_ms: session.waiting_since_ms,
    }
}
