//! One incarnation: answers control requests, runs the sessions it holds, pulls their hints.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    claim::LivePull,
    fleet::{ControlServer, serve_control},
    jobs::WorkPull,
    retry::Backoff,
};
use voxfleet_schema::{
    event::What,
    failure::{Failure, FailureClass},
    fleet::{Assignment, ControlReply, ControlRequest, DrainNotice, EngineRunState},
    id::{Kind, StreamId, WorkerName},
    session::SessionOptions,
};
use voxfleet_trace::unix_ns;

use super::{
    Supervisor, WorkerError,
    holdings::{Decision, EngineIs, Offer},
    jobs::JobFinished,
};
use crate::{
    lifecycle::{Ask, Known},
    pull,
    session::{End, Handle, Names, contained, unix_ms},
    shutdown::{ShutdownBudget, Stage},
};

/// How serving under one name ended.
#[derive(Debug)]
pub(super) enum Served {
    /// What is left of the time is the stop's.
    Stopped(ShutdownBudget),
    Renew,
}

/// What a request leads to besides its answer.
enum After {
    GoOn,
    Drain(Duration),
    Renew,
}

/// Serving, and leaving in two steps.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Serving,
    /// Takes nothing new; what is held goes on until the dispatcher has moved it.
    HandingOver(ShutdownBudget),
    /// Whatever is left stores what it has begun.
    Finishing(ShutdownBudget),
}

impl Phase {
    fn budget(self) -> Option<ShutdownBudget> {
        match self {
            Phase::Serving => None,
            Phase::HandingOver(budget) | Phase::Finishing(budget) => Some(budget),
        }
    }

    fn deadline(self) -> Option<Instant> {
        match self {
            Phase::Serving => None,
            Phase::HandingOver(budget) => Some(budget.deadline(Stage::HandOver)),
            Phase::Finishing(budget) => Some(budget.deadline(Stage::Finish)),
        }
    }

    /// Leaving within `budget`: the earlier end of two reasons holds, and nothing goes back.
    fn leaving(self, budget: ShutdownBudget) -> Phase {
        match self {
            Phase::HandingOver(present) | Phase::Finishing(present) if present.over() <= budget.over() => self,
            Phase::Finishing(_) => Phase::Finishing(budget),
            Phase::Serving | Phase::HandingOver(_) => Phase::HandingOver(budget),
        }
    }
}

/// What ends a worker from outside, each told once.
pub(super) struct Reasons {
    shutdown: CancellationToken,
    shutdown_told: bool,
    preempted: watch::Receiver<Option<String>>,
}

enum Reason {
    Shutdown,
    Preempted(String),
}

impl Reasons {
    pub(super) fn new(shutdown: &CancellationToken, preempted: watch::Receiver<Option<String>>) -> Self {
        Self { shutdown: shutdown.clone(), shutdown_told: false, preempted }
    }

    /// The next one. Cancel-safe.
    async fn next(&mut self) -> Reason {
        let preempted = async {
            loop {
                if self.preempted.changed().await.is_err() {
                    // Nobody is left who could say so.
                    std::future::pending::<()>().await;
                }
                if let Some(what) = self.preempted.borrow_and_update().clone() {
                    return what;
                }
            }
        };
        tokio::select! {
            () = self.shutdown.cancelled(), if !self.shutdown_told => {
                self.shutdown_told = true;
                Reason::Shutdown
            }
            what = preempted => Reason::Preempted(what),
        }
    }
}

/// A session's task: the handle it ran under, and its end unless it was released.
type Finished = (Arc<Handle>, Option<End>);

impl Supervisor {
    /// Serves under the name `me`.
    pub(super) async fn serve(&self, me: &WorkerName, reasons: &mut Reasons) -> Result<Served, WorkerError> {
        let mut control = tokio::select! {
            control = self.listen(me) => control?,
            () = reasons.shutdown.cancelled() => return Ok(Served::Stopped(self.shutdown_budget())),
        };
        tracing::info!(worker = %me, "serving");
        let mut sessions: JoinSet<Finished> = JoinSet::new();
        let mut jobs: JoinSet<JobFinished> = JoinSet::new();
        let mut work_pull = WorkPull::new(&self.nats, me);
        let mut loads: JoinSet<()> = JoinSet::new();
        for model in &self.config.preload {
            self.prewarm(&mut loads, model.clone());
        }
        let pull = LivePull::new(&self.nats, me);
        let max_entry = self.shared.max_entry;
        let mut pulling: Pin<Box<dyn Future<Output = _> + Send>> =
            Box::pin(pull::run(pull, self.hints.clone(), max_entry, Arc::clone(&self.holdings)));
        let mut phase = Phase::Serving;
        let served = loop {
            // Released sessions may still be storing what they had begun.
            let empty = self.holdings.is_empty() && sessions.is_empty() && jobs.is_empty();
            let deadline = phase.deadline();
            let time_over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            match phase {
                Phase::HandingOver(budget) | Phase::Finishing(budget) if empty => break Served::Stopped(budget),
                Phase::HandingOver(budget) if time_over => {
                    let left = self.holdings.all();
                    tracing::info!(left = left.len(), "not all was handed over, finishing what has begun");
                    left.iter().for_each(|handle| handle.finish());
                    phase = Phase::Finishing(budget);
                    continue;
                }
                Phase::Finishing(budget) if time_over => break Served::Stopped(budget),
                Phase::Serving | Phase::HandingOver(_) | Phase::Finishing(_) => {}
            }
            let free_jobs = if self.relief.refusal().is_some() { 0 } else { self.holdings.free_job_slots() };
            tokio::select! {
                request = control.next() => {
                    let Some((request, responder)) = request else {
                        return Err(WorkerError::Disconnected);
                    };
                    tracing::debug!(?request, "control request");
                    let (reply, after) = self.answer(request, &mut sessions, &mut loads);
                    if let Err(error) = responder.reply(&reply).await {
                        // The dispatcher asks again; assignments are idempotent.
                        tracing::warn!(error = &error as &dyn std::error::Error, "control request not answered");
                    }
                    match (after, phase.budget()) {
                        (After::GoOn, _) => {}
                        (After::Renew, None) => break Served::Renew,
                        // It holds nothing that counts, and wants nothing new: a new name would be for nothing.
                        (After::Renew, Some(budget)) => break Served::Stopped(budget),
                        (After::Drain(total), _) => phase = self.leave(phase, "asked", total),
                    }
                }
                Some(finished) = sessions.join_next() => self.session_ended(finished)?,
                Some(finished) = jobs.join_next() => self.job_ended(finished)?,
                work = work_pull.next(free_jobs), if free_jobs > 0 && matches!(phase, Phase::Serving) => match work {
                    Ok(work) => self.work(work, &mut jobs, &mut loads),
                    Err(error) => {
                        tracing::error!(error = &error as &dyn std::error::Error, "pull of jobs ended");
                        return Err(WorkerError::Disconnected);
                    }
                },
                Some(loaded) = loads.join_next() => loaded?,
                // Jobs are asked for again, or no more.
                () = self.relief.changed() => {}
                error = &mut pulling, if !matches!(phase, Phase::Finishing(_)) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "pull ended");
                    return Err(WorkerError::Disconnected);
                }
                reason = reasons.next() => phase = match reason {
                    Reason::Shutdown => self.leave(phase, "sigterm", self.config.shutdown()),
                    Reason::Preempted(what) => {
                        let notice = Duration::from_millis(self.config.preemption.notice_ms);
                        self.leave(phase, &format!("preemption: {what}"), notice)
                    }
                },
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
            }
        };
        drop(work_pull);
        let cut_short = self.holdings.all();
        for handle in &cut_short {
            say!(info, handle.names, "session let go");
            handle.cancel.cancel();
            self.holdings.remove(handle.names.kind, &handle.names.id);
        }
        drop(control);
        drop(pulling);
        loads.shutdown().await;
        let budget = match served {
            Served::Stopped(budget) => budget,
            Served::Renew => self.shutdown_budget(),
        };
        let all_ended = pin!(async {
            while sessions.join_next().await.is_some() {}
            while jobs.join_next().await.is_some() {}
        });
        budget.run(Stage::Sessions, all_ended).await;
        Ok(served)
    }

    /// Begins to leave, or leaves sooner.
    fn leave(&self, phase: Phase, why: &str, total: Duration) -> Phase {
        let total = total.min(MAX_DRAIN);
        let budget = ShutdownBudget::begin(Instant::now(), total, self.config.shutdown());
        let next = phase.leaving(budget);
        if next.budget() == Some(budget) {
            tracing::info!(why, budget_ms = total.as_millis() as u64, "draining");
            let until_ms = unix_ms() + total.as_millis() as u64;
            self.holdings.set_draining(DrainNotice { why: why.to_owned(), until_ms: Some(until_ms) });
        }
        next
    }

    /// Subscribes; repeats until the server answers.
    async fn listen(&self, me: &WorkerName) -> Result<ControlServer, WorkerError> {
        let mut backoff = Backoff::default();
        loop {
            match serve_control(&self.own, me).await {
                Ok(control) => return Ok(control),
                Err(error) if self.own.connection_events().borrow().closed => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "not listening yet, trying again");
                    backoff.wait().await;
                }
            }
        }
    }

    fn answer(
        &self,
        request: ControlRequest,
        sessions: &mut JoinSet<Finished>,
        loads: &mut JoinSet<()>,
    ) -> (ControlReply, After) {
        let refused = |class, text: &str| ControlReply::Refused(Failure::new(class, text));
        let reply = match request {
            ControlRequest::Assign(assignment) => self.assign(assignment, sessions),
            ControlRequest::Release { kind, id, epoch, finish_ms } => {
                self.release(kind, &id, epoch, Duration::from_millis(finish_ms.into()));
                ControlReply::Done
            }
            ControlRequest::Prewarm { model } => match self.relief.refusal() {
                Some(failure) => ControlReply::Refused(failure),
                None if self.knows(&model) => {
                    self.prewarm(loads, model);
                    ControlReply::Done
                }
                None => refused(FailureClass::ModelMissing, "the model is not on this worker"),
            },
            ControlRequest::Drain { deadline_ms } => {
                let deadline_ms = if deadline_ms == 0 { self.config.drain_ms } else { deadline_ms };
                return (ControlReply::Done, After::Drain(Duration::from_millis(deadline_ms)));
            }
            ControlRequest::Renew => return (ControlReply::Done, After::Renew),
            ControlRequest::Cancel { kind, id } => {
                self.release(kind, &id, u64::MAX, Duration::ZERO);
                ControlReply::Done
            }
            ControlRequest::Unknown => refused(FailureClass::BadRequest, "unknown request"),
        };
        (reply, After::GoOn)
    }

    /// Lets go, at once or when a final already begun is stored, at most after `finish`. Its slot is free either way.
    fn release(&self, kind: Kind, id: &StreamId, epoch: u64, finish: Duration) {
        if let Some(handle) = self.holdings.get(kind, id)
            && handle.epoch() <= epoch
        {
            say!(info, handle.names, epoch, finish_ms = finish.as_millis() as u64, "released");
            if finish.is_zero() {
                handle.cancel.cancel();
            } else {
                handle.finish_by(Instant::now() + finish.min(LONGEST_FINISH));
            }
            self.holdings.remove(kind, id);
        }
    }

    pub(super) fn knows(&self, model: &str) -> bool {
        self.models.iter().any(|known| known == model)
    }

    /// Nothing is begun with a model whose file is not here yet.
    pub(super) fn in_stock(&self, decision: Decision, model: Option<&str>) -> Decision {
        match decision {
            Decision::Start => {
                let absent = self.stock.refusal(model.unwrap_or(&self.default_model));
                absent.map_or(Decision::Start, Decision::Refuse)
            }
            other => other,
        }
    }

    /// One that waits for its file already is not waited for twice.
    fn prewarm(&self, loads: &mut JoinSet<()>, model: String) {
        let Some(ahead) = self.ahead.begin(&model) else {
            tracing::debug!(model, "on its way already");
            return;
        };
        let (engine, stock, relief) = (self.engine.clone(), self.stock.clone(), Arc::clone(&self.relief));
        loads.spawn(async move {
            ahead.load(&engine, &stock, &relief).await;
        });
    }

    /// What somebody with these options would find here.
    pub(super) fn offer(&self, options: &SessionOptions) -> Offer {
        let model = options.model.as_deref().unwrap_or(&self.default_model);
        let ask = Ask { model: model.to_owned(), policy: options.policy };
        Offer {
            engine: match self.engine.status().state {
                EngineRunState::Failed => EngineIs::Failed,
                _ if self.engine.stalls(Instant::now()) => EngineIs::Stalled,
                _ => EngineIs::Able,
            },
            model_known: self.knows(model),
            no_footing: self.engine.would(&ask).err(),
        }
    }

    /// Nothing is begun while other tenants need what it would take.
    pub(super) fn spared(&self, decision: Decision) -> Decision {
        match decision {
            Decision::Start => self.relief.refusal().map_or(Decision::Start, Decision::Refuse),
            other => other,
        }
    }

    fn assign(&self, assignment: Assignment, sessions: &mut JoinSet<Finished>) -> ControlReply {
        let Assignment { kind, id, epoch, options, suspect, crashes, suspect_from, traceparent, .. } = assignment;
        if kind != Kind::Session {
            let failure = Failure::new(FailureClass::BadRequest, "jobs come as work items, not by request");
            return ControlReply::Refused(failure);
        }
        let decision = self.holdings.consider(kind, &id, epoch, &self.offer(&options), Instant::now());
        let decision = self.spared(self.in_stock(decision, options.model.as_deref()));
        match decision {
            Decision::Held => {}
            Decision::Refuse(failure) => {
                tracing::info!(session = %id, gpu = %self.gpu_id, epoch, %failure, "assignment refused");
                return ControlReply::Refused(failure);
            }
            Decision::Raise => {
                if let Some(handle) = self.holdings.get(kind, &id) {
                    say!(info, handle.names, epoch, "session goes on under a new epoch");
                    handle.desired.send_modify(|desired| {
                        desired.epoch = epoch;
                        desired.options = Arc::new(options);
                        (desired.trace, desired.given_ns) = (traceparent, unix_ns());
                    });
                }
            }
            Decision::Start => {
                let names = Names { kind, id, gpu_id: self.gpu_id.clone() };
                self.engine.begins(&names, Known { suspect, crashes, from: suspect_from, elsewhere: false });
                let handle = Arc::new(Handle::new(names, epoch, options, traceparent));
                self.holdings.put(Arc::clone(&handle));
                let session = handle.session(self.shared.clone(), None);
                sessions.spawn(async move {
                    let end = tokio::select! {
                        biased;
                        () = handle.over() => None,
                        end = contained(session.run()) => Some(end.unwrap_or_else(End::Failed)),
                    };
                    (handle, end)
                });
            }
        }
        ControlReply::Done
    }

    fn session_ended(&self, finished: Result<Finished, JoinError>) -> Result<(), WorkerError> {
        let (handle, end) = finished?;
        let failure = match end {
            None | Some(End::Finished | End::Done | End::Paused) => None,
            Some(End::LetGo { epoch }) => {
                say!(info, handle.names, held = handle.epoch(), epoch, "a higher epoch owns the session");
                let mut event = handle.names.event(What::Released, handle.epoch());
                event.detail = serde_json::json!({ "owned_by_epoch": epoch });
                self.shared.events.tell(event, None);
                None
            }
            Some(End::Failed(failure)) => Some(failure),
        };
        self.let_go(&handle, failure);
        Ok(())
    }

    /// A task has ended: nothing is kept of what it ran, unless it runs again already.
    pub(super) fn let_go(&self, handle: &Arc<Handle>, failure: Option<Failure>) {
        self.holdings.ended(handle, failure, Instant::now());
        if self.holdings.get(handle.names.kind, &handle.names.id).is_none() {
            self.engine.forget(&handle.names);
        }
    }
}

/// Longest drain: a day.
const MAX_DRAIN: Duration = Duration::from_secs(86_400);
/// Longest time for a final already begun when it was released: a window is decoded long before.
const LONGEST_FINISH: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_earlier_end_of_two_reasons_holds() {
        let seconds = Duration::from_secs;
        let tail = seconds(10);
        let drain = ShutdownBudget::begin(Instant::now(), seconds(60), tail);
        let phase = Phase::Serving.leaving(drain);
        assert_eq!(phase.budget(), Some(drain));
        tokio::time::advance(seconds(20)).await;
        let sigterm = ShutdownBudget::begin(Instant::now(), tail, tail);
        let sooner = phase.leaving(sigterm);
        assert_eq!(sooner.budget(), Some(sigterm));
        assert!(matches!(sooner, Phase::HandingOver(_)));
        assert_eq!(sooner.leaving(drain).budget(), Some(sigterm), "a later end changes nothing");
        let finishing = Phase::Finishing(drain).leaving(sigterm);
        assert!(matches!(finishing, Phase::Finishing(budget) if budget == sigterm), "and nothing goes back");
    }

    #[tokio::test]
    async fn each_reason_is_told_once() {
        let (stop, (sender, receiver)) = (CancellationToken::new(), watch::channel(None));
        let mut reasons = Reasons::new(&stop, receiver);
        stop.cancel();
        assert!(matches!(reasons.next().await, Reason::Shutdown));
        sender.send_replace(Some("file".to_owned()));
        drop(sender);
        assert!(matches!(reasons.next().await, Reason::Preempted(what) if what == "file"));
        let soon = tokio::time::timeout(Duration::from_millis(20), reasons.next()).await;
        assert!(soon.is_err(), "nothing more");
    }
}
