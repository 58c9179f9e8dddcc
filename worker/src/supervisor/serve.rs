//! One incarnation: answers control requests, runs the sessions it holds, pulls their hints.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use tokio::{
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
    fleet::{Assignment, ControlReply, ControlRequest, EngineRunState},
    id::{Kind, StreamId, WorkerName},
};

use super::{Supervisor, WorkerError, holdings::Decision, jobs::JobFinished};
use crate::{
    pull,
    session::{End, Handle, Names},
    shutdown::{ShutdownBudget, Stage},
};

/// How serving under one name ended.
#[derive(Debug)]
pub(super) enum Served {
    /// The time of the stop began at `begun`.
    Stopped {
        begun: Instant,
    },
    Renew,
}

/// What a request leads to besides its answer.
enum After {
    GoOn,
    Drain { until: Instant },
    Renew,
}

/// Serving, and the two ways out of it.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Serving,
    /// Takes nothing new; what is held goes on until it is released, at most until then.
    Draining {
        until: Instant,
    },
    /// Sessions finish what they have begun.
    Stopping {
        begun: Instant,
        until: Instant,
    },
}

impl Phase {
    fn deadline(self) -> Option<Instant> {
        match self {
            Phase::Serving => None,
            Phase::Draining { until } | Phase::Stopping { until, .. } => Some(until),
        }
    }
}

/// A session's task: the handle it ran under, and its end unless it was released.
type Finished = (Arc<Handle>, Option<End>);

impl Supervisor {
    /// Serves under the name `me`.
    pub(super) async fn serve(&self, me: &WorkerName, shutdown: &CancellationToken) -> Result<Served, WorkerError> {
        let mut control = tokio::select! {
            control = self.listen(me) => control?,
            () = shutdown.cancelled() => return Ok(Served::Stopped { begun: Instant::now() }),
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
            match phase {
                Phase::Serving => {}
                Phase::Draining { until } => {
                    if self.holdings.is_empty() || Instant::now() >= until {
                        phase = self.stopping();
                        continue;
                    }
                }
                Phase::Stopping { begun, until } => {
                    if self.holdings.is_empty() || Instant::now() >= until {
                        break Served::Stopped { begun };
                    }
                }
            }
            let deadline = phase.deadline();
            let free_jobs = self.holdings.free_job_slots();
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
                    match after {
                        After::GoOn => {}
                        After::Renew => break Served::Renew,
                        After::Drain { until } => if !matches!(phase, Phase::Stopping { .. }) {
                            self.holdings.set_draining();
                            phase = Phase::Draining { until };
                        },
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
                error = &mut pulling, if matches!(phase, Phase::Serving | Phase::Draining { .. }) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "pull ended");
                    return Err(WorkerError::Disconnected);
                }
                () = shutdown.cancelled(), if !matches!(phase, Phase::Stopping { .. }) => phase = self.stopping(),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
            }
        };
        drop(work_pull);
        let cut_short = self.holdings.all();
        for handle in &cut_short {
            tracing::info!(id = %handle.names.id, "session let go");
            handle.cancel.cancel();
            self.holdings.remove(handle.names.kind, &handle.names.id);
        }
        drop(control);
        drop(pulling);
        loads.shutdown().await;
        let begun = match served {
            Served::Stopped { begun } => begun,
            Served::Renew => Instant::now(),
        };
        let budget = ShutdownBudget::begin(begun, Duration::from_millis(self.config.shutdown_ms));
        let all_ended = pin!(async {
            while sessions.join_next().await.is_some() {}
            while jobs.join_next().await.is_some() {}
        });
        budget.run(Stage::Sessions, all_ended).await;
        Ok(served)
    }

    /// Subscribes; repeats until the server answers.
    async fn listen(&self, me: &WorkerName) -> Result<ControlServer, WorkerError> {
        let mut backoff = Backoff::default();
        loop {
            match serve_control(&self.nats, me).await {
                Ok(control) => return Ok(control),
                Err(error) if self.nats.connection_events().borrow().closed => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "not listening yet, trying again");
                    backoff.wait().await;
                }
            }
        }
    }

    fn stopping(&self) -> Phase {
        let begun = Instant::now();
        self.holdings.set_draining();
        for handle in self.holdings.all() {
            handle.desired.send_modify(|desired| desired.finish = true);
        }
        let budget = ShutdownBudget::begin(begun, Duration::from_millis(self.config.shutdown_ms));
        Phase::Stopping { begun, until: budget.deadline(Stage::Finish) }
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
            ControlRequest::Release { kind, id, epoch, .. } => {
                self.release(kind, &id, epoch);
                ControlReply::Done
            }
            ControlRequest::Prewarm { model } if self.knows(&model) => {
                self.prewarm(loads, model);
                ControlReply::Done
            }
            ControlRequest::Prewarm { .. } => refused(FailureClass::ModelMissing, "the model is not on this worker"),
            ControlRequest::Drain { deadline_ms } => {
                tracing::info!(deadline_ms, "draining");
                let until = Instant::now() + Duration::from_millis(deadline_ms.min(MAX_DRAIN_MS));
                return (ControlReply::Done, After::Drain { until });
            }
            ControlRequest::Renew => return (ControlReply::Done, After::Renew),
            ControlRequest::Cancel { kind, id } => {
                self.release(kind, &id, u64::MAX);
                ControlReply::Done
            }
            ControlRequest::Unknown => refused(FailureClass::BadRequest, "unknown request"),
        };
        (reply, After::GoOn)
    }

    fn release(&self, kind: Kind, id: &StreamId, epoch: u64) {
        if let Some(handle) = self.holdings.get(kind, id)
            && handle.epoch() <= epoch
        {
            tracing::info!(%kind, %id, epoch, "released");
            handle.cancel.cancel();
            self.holdings.remove(kind, id);
        }
    }

    pub(super) fn knows(&self, model: &str) -> bool {
        self.models.iter().any(|known| known == model)
    }

    fn prewarm(&self, loads: &mut JoinSet<()>, model: String) {
        let engine = self.engine.clone();
        loads.spawn(async move {
            if let Err(error) = engine.load(model.clone()).await {
                tracing::warn!(model, %error, "model not loaded ahead");
            }
        });
    }

    fn assign(&self, assignment: Assignment, sessions: &mut JoinSet<Finished>) -> ControlReply {
        let Assignment { kind, id, epoch, options, .. } = assignment;
        if kind != Kind::Session {
            let failure = Failure::new(FailureClass::BadRequest, "jobs come as work items, not by request");
            return ControlReply::Refused(failure);
        }
        let model_known = self.knows(options.model.as_deref().unwrap_or(&self.default_model));
        let engine_failed = self.engine.status().state == EngineRunState::Failed;
        let decision = self.holdings.consider(kind, &id, epoch, engine_failed, model_known, Instant::now());
        match decision {
            Decision::Held => {}
            Decision::Refuse(failure) => {
                tracing::info!(%id, epoch, %failure, "assignment refused");
                return ControlReply::Refused(failure);
            }
            Decision::Raise => {
                if let Some(handle) = self.holdings.get(kind, &id) {
                    tracing::info!(%id, epoch, "session goes on under a new epoch");
                    handle.desired.send_modify(|desired| {
                        desired.epoch = epoch;
                        desired.options = Arc::new(options);
                    });
                }
            }
            Decision::Start => {
                let names = Names { kind, id, gpu_id: self.gpu_id.clone() };
                let handle = Arc::new(Handle::new(names, epoch, options));
                self.holdings.put(Arc::clone(&handle));
                let session = handle.session(self.shared.clone(), None);
                sessions.spawn(async move {
                    let end = tokio::select! {
                        biased;
                        () = handle.cancel.cancelled() => None,
                        end = session.run() => Some(end),
                    };
                    (handle, end)
                });
            }
        }
        ControlReply::Done
    }

    fn session_ended(&self, finished: Result<Finished, JoinError>) -> Result<(), WorkerError> {
        let (handle, end) = finished?;
        let id = &handle.names.id;
        let failure = match end {
            None | Some(End::Finished | End::Done) => None,
            Some(End::LetGo { epoch }) => {
                tracing::info!(%id, held = handle.epoch(), epoch, "a higher epoch owns the session");
                let mut event = handle.names.event(What::Released, handle.epoch());
                event.detail = serde_json::json!({ "owned_by_epoch": epoch });
                self.shared.events.tell(event, None);
                None
            }
            Some(End::Failed(failure)) => Some(failure),
        };
        self.holdings.ended(&handle, failure, Instant::now());
        Ok(())
    }
}

/// Longest drain: a day.
const MAX_DRAIN_MS: u64 = 86_400_000;
