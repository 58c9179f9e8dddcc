//! Carries out what the core decided. Each effect is one task; its answer is one input.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats,
    events::Events,
    fleet as workers,
    kv::{Bucket, KvError, Records},
    log::{AudioLog, LogError},
    publish::{HintSent, Publisher},
    topology,
    transcript::{Chain, ChainError, Outcome, Revised},
};
use voxfleet_schema::{
    audio::{ASR_CAUSE, ASR_END, ASR_FLUSH, RawEntry},
    fleet::{Assignment, ControlReply, ControlRequest, Heartbeat},
    id::{Kind, StreamId, WorkerName},
    session::{Reply, SessionRecord},
    trace::TraceContext,
    transcript::Revision,
};
use voxfleet_trace::Tracer;

use super::{
    Input, Process,
    fleet_record::{self, FleetRecord},
    jobs::{Caller, JobTools},
    recover,
};
use crate::{
    core::{
        Admission, Answer, AppendError, AskReply, Burial, Effect, Mark, SaveError, WalkEnd, closing_final,
        jobs::JobEffect,
    },
    http::metrics,
    open::{Step, Walker},
    sessions::{CallId, ChainMark},
};

/// Hints that wait for the connection. Beyond that they are dropped: the log has them.
const WAITING: usize = 4_096;

/// How long writing the end of an expired session may take; it holds a permit.
const CLOSE_WITHIN: Duration = Duration::from_secs(30);

/// A copy of an entry on its way to a worker.
struct Hint {
    worker: WorkerName,
    id: StreamId,
    entry: RawEntry,
    prev: Option<u64>,
}

/// Everything tasks need.
#[derive(Clone)]
struct Tools {
    nats: Nats,
    records: Records<SessionRecord>,
    fleet: Records<FleetRecord>,
    chain: Chain,
    log: AudioLog,
    control_timeout: Duration,
    name: Arc<str>,
    jobs: JobTools,
}

pub(super) struct Effects {
    tools: Tools,
    inputs: mpsc::Sender<Input>,
    hints: mpsc::Sender<Hint>,
    events: Events,
    tracer: Tracer,
    hints_dropped: u64,
}

impl Effects {
    pub(super) fn new(
        process: &Process<'_>,
        publisher: Publisher,
        inputs: mpsc::Sender<Input>,
        listeners: &mut JoinSet<&'static str>,
        stop: CancellationToken,
    ) -> Self {
        let &Process { nats, config, name, .. } = process;
        let (events, tracer) = (process.events.clone(), process.tracer.clone());
        let (hints, hint_queue) = mpsc::channel(WAITING);
        listeners.spawn(send_hints(publisher.clone(), hint_queue, stop));
        let jobs = JobTools::new(nats, config, publisher, name.into());
        let tools = Tools {
            nats: nats.clone(),
            records: Records::new(nats, Bucket::Sessions),
            fleet: Records::new(nats, Bucket::Fleet),
            chain: Chain::new(nats),
            log: AudioLog::new(nats),
            control_timeout: Duration::from_millis(config.control_timeout_ms),
            name: name.into(),
            jobs,
        };
        Self { tools, inputs, hints, events, tracer, hints_dropped: 0 }
    }

    /// Starts one effect. Never waits.
    pub(super) fn start(
        &mut self,
        effect: Effect,
        jobs: &mut JoinSet<()>,
        calls: &mut HashMap<CallId, Caller>,
        permits: &Arc<Semaphore>,
    ) {
        match effect {
            Effect::Hint { worker, id, entry, prev } => {
                if self.hints.try_send(Hint { worker, id, entry, prev }).is_err() {
                    self.hints_dropped += 1;
                    if self.hints_dropped.is_power_of_two() {
                        tracing::warn!(dropped = self.hints_dropped, "hints dropped, workers read the log");
                    }
                }
            }
            Effect::Tell { event, once } => {
                metrics::told(&event);
                // The engine that meets the same entry later says the same under the same id.
                let seq = event.seq.filter(|_| once);
                let msg_id = seq.map(|seq| format!("{}-{}-{seq}", event.id, event.what.as_str()));
                self.events.tell(*event, msg_id);
            }
            Effect::Span(span) => self.tracer.record(*span),
            Effect::Answer { call, answer } => {
                if let Answer::Refused(failure) = &*answer {
                    metrics::refused(failure);
                }
                match calls.remove(&call) {
                    Some(Caller::Api(responder)) => drop(jobs.spawn(reply(*responder, *answer))),
                    Some(Caller::Door(at)) => {
                        let tools = self.tools.jobs.clone();
                        jobs.spawn(async move { tools.answer_door(*at, *answer).await });
                    }
                    None => {}
                }
            }
            other => {
                let (tools, inputs, permits) = (self.tools.clone(), self.inputs.clone(), permits.clone());
                // Lists wait for each other; a permit held meanwhile would be one less for everything else.
                let waits = !matches!(other, Effect::Job(JobEffect::List { .. }));
                jobs.spawn(async move {
                    // The semaphore is never closed; without a permit the work is done all the same.
                    let _permit = if waits { permits.acquire().await.ok() } else { None };
                    if let Some(input) = tools.carry_out(other).await {
                        // The loop is gone when this fails: a successor repairs.
                        let _ = inputs.send(input).await;
                    }
                });
            }
        }
    }
}

async fn send_hints(publisher: Publisher, mut queue: mpsc::Receiver<Hint>, stop: CancellationToken) -> &'static str {
    let mut dropped = 0u64;
    let sending = async {
        while let Some(Hint { worker, id, entry, prev }) = queue.recv().await {
            if publisher.hint(&worker, &id, &entry, prev).await == HintSent::Dropped {
                dropped += 1;
                if dropped.is_power_of_two() {
                    tracing::warn!(dropped, "too many hints unanswered, workers read the log");
                }
            }
        }
    };
    stop.run_until_cancelled(sending).await;
    "hints"
}

async fn reply(responder: voxfleet_nats::api::ApiResponder, answer: Answer) {
    let sent = match answer {
        Answer::Opened(opened) => responder.reply(&Reply::Ok(opened)).await,
        Answer::Status(status) => responder.reply(&Reply::Ok(*status)).await,
        Answer::Closed(closed) => responder.reply(&Reply::Ok(closed)).await,
        Answer::Sessions(list) => responder.reply(&Reply::Ok(*list)).await,
        Answer::Fleet(fleet) => responder.reply(&Reply::Ok(*fleet)).await,
        Answer::Drained(drained) => responder.reply(&Reply::Ok(*drained)).await,
        Answer::Plan(plan) => responder.reply(&Reply::Ok(*plan)).await,
        Answer::Submitted(submitted) => responder.reply(&Reply::Ok(submitted)).await,
        Answer::Job(status) => responder.reply(&Reply::Ok(*status)).await,
        Answer::Jobs(list) => responder.reply(&Reply::Ok(*list)).await,
        Answer::Refused(failure) => responder.reply(&Reply::<()>::Error(failure)).await,
    };
    if let Err(error) = sent {
        // The client asks again by id.
        tracing::warn!(error = %error, "answer not sent");
    }
}

impl Tools {
    async fn carry_out(&self, effect: Effect) -> Option<Input> {
        Some(match effect {
            Effect::Load { id } => {
                let result = recover::load(&self.records, &self.chain, &self.log, &id).await;
                Input::Loaded { id, result: result.map(Box::new).map_err(|e| describe(&e)) }
            }
            Effect::Save { id, record, revision } => {
                let written = match revision {
                    Some(revision) => self.records.update(id.as_str(), &record, revision).await,
                    None => self.records.create(id.as_str(), &record).await,
                };
                let result = written.map_err(|error| match error {
                    KvError::Conflict { .. } => SaveError::Conflict,
                    other => SaveError::Failed(describe(&other)),
                });
                Input::Saved { id, result }
            }
            Effect::Ask { worker, assignment } => self.ask(worker, *assignment).await,
            Effect::Release { worker, id, epoch, finish_ms } => {
                let request = ControlRequest::Release { kind: Kind::Session, id: id.clone(), epoch, finish_ms };
                let done = self.control(&worker, &request).await == AskReply::Taken;
                Input::Released { worker, id, epoch, done }
            }
            Effect::Append { id, mark, expect } => {
                let result = self.append(&id, mark, expect).await;
                Input::Appended { id, mark, result }
            }
            Effect::Walk { id, from } => {
                let result = self.walk(&id, from).await;
                Input::Walked { id, result: result.map(Box::new) }
            }
            Effect::ReadChain { id } => match self.chain.last(Kind::Session, &id).await {
                Ok(last) => Input::ChainRead { id, chain: last.map(|s| ChainMark::from(&s.value)) },
                Err(error) => {
                    // The next tick sees the same difference.
                    tracing::warn!(session = %id, error = %error, "last final cannot be read");
                    return None;
                }
            },
            Effect::CloseChain { id, epoch, to_seq, trace } => {
                let closing = tokio::time::timeout(CLOSE_WITHIN, self.close_chain(&id, epoch, to_seq, trace));
                match closing.await.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
                    Ok(chain) => Input::ChainRead { id, chain },
                    Err(error) => {
                        // Upkeep tries again.
                        tracing::warn!(session = %id, error, "chain of an expired session not closed");
                        return None;
                    }
                }
            }
            Effect::Admit { heartbeat } => {
                let worker = heartbeat.worker();
                let admission = self.admit(&worker, &heartbeat).await;
                Input::Admitted { worker, admission }
            }
            Effect::Renew { worker } => {
                let reply = self.control(&worker, &ControlRequest::Renew).await;
                tracing::info!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, ?reply, "dead incarnation told to renew");
                return None;
            }
            Effect::Bury { worker, heartbeat, revision, recall } => {
                let heartbeat = heartbeat.map(|h| *h);
                let written =
                    fleet_record::condemn(&self.fleet, &worker, heartbeat, revision, &recall, &self.name).await;
                let burial = written.unwrap_or_else(|e| Burial::Failed(describe(&e)));
                Input::Buried { worker, burial }
            }
            Effect::Note { heartbeat, revision, drain_until_ms } => {
                let worker = heartbeat.worker();
                let result = fleet_record::note(&self.fleet, *heartbeat, revision, drain_until_ms).await;
                Input::Noted { worker, result }
            }
            Effect::Drain { worker, deadline_ms } => {
                let reply = self.control(&worker, &ControlRequest::Drain { deadline_ms }).await;
                Input::Drained { worker, reply }
            }
            Effect::Prewarm { worker, model } => {
                let reply = self.control(&worker, &ControlRequest::Prewarm { model: model.clone() }).await;
                tracing::info!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, model, ?reply, "worker told to load a model");
                return None;
            }
            Effect::RemoveConsumers { worker } => {
                if let Err(error) = topology::remove_worker(&self.nats, &worker).await {
                    // The sweep finds them again.
                    tracing::warn!(gpu = %worker.gpu_id, incarnation = %worker.incarnation, error = %error, "consumers not removed");
                }
                return None;
            }
            Effect::Job(effect) => Input::Job(Box::new(self.jobs.carry_out(effect).await?)),
            Effect::Hint { .. }
            | Effect::Tell { .. }
            | Effect::Answer { .. }
            | Effect::Span(_)
            | Effect::GoBack { .. } => return None,
        })
    }

    async fn control(&self, worker: &WorkerName, request: &ControlRequest) -> AskReply {
        match workers::control(&self.nats, worker, request, self.control_timeout).await {
            Ok(ControlReply::Done) => AskReply::Taken,
            Ok(ControlReply::Refused(failure)) => AskReply::Refused(failure),
            Ok(ControlReply::Unknown) => AskReply::Silent("an answer of a newer version".to_owned()),
            Err(error) => AskReply::Silent(describe(&error)),
        }
    }

    async fn ask(&self, worker: WorkerName, assignment: Assignment) -> Input {
        let (id, epoch) = (assignment.id.clone(), assignment.epoch);
        let reply = self.control(&worker, &ControlRequest::Assign(assignment)).await;
        Input::Asked { id, epoch, worker, reply }
    }

    async fn append(&self, id: &StreamId, mark: Mark, expect: Option<u64>) -> Result<u64, AppendError> {
        let headers = match mark {
            Mark::Pause => [(ASR_FLUSH, "1"), (ASR_CAUSE, "pause")],
            Mark::Idle => [(ASR_END, "1"), (ASR_CAUSE, "idle")],
            Mark::Close(_) => [(ASR_END, "1"), (ASR_CAUSE, "close")],
        };
        match self.log.append(id, &headers, Bytes::new(), expect).await {
            Ok(seq) => Ok(seq),
            Err(LogError::Full) => Err(AppendError::Full),
            Err(LogError::Conflict) => match self.log.last(id).await {
                Ok(last) => Err(AppendError::Conflict { last: last.map(|e| e.seq) }),
                Err(error) => Err(AppendError::Failed(describe(&error))),
            },
            Err(error) => Err(AppendError::Failed(describe(&error))),
        }
    }

    async fn walk(&self, id: &StreamId, from: Option<Box<Walker>>) -> Result<WalkEnd, String> {
        let mut walker = match from {
            Some(walker) => walker,
            None => {
                let last = self.chain.last(Kind::Session, id).await.map_err(|e| describe(&e))?;
                Box::new(last.map_or_else(Walker::beginning, |stored| Walker::after(&stored.value)))
            }
        };
        let mut rejected = Vec::new();
        while let Some(entry) = self.log.next(id, walker.next_seq()).await.map_err(|e| describe(&e))? {
            match walker.step(&entry) {
                Step::Passed => {}
                Step::Opens(opener) => {
                    return Ok(WalkEnd { last: Some(opener.seq), walker, opener: Some(opener), rejected });
                }
                Step::Rejected(entry) => rejected.push(entry),
            }
        }
        let last = self.log.last(id).await.map_err(|e| describe(&e))?.map(|entry| entry.seq);
        Ok(WalkEnd { walker, opener: None, rejected, last })
    }

    /// Ends the chain of a session that has nothing left in the log. Whoever speaks or writes meanwhile wins.
    async fn close_chain(
        &self,
        id: &StreamId,
        epoch: u64,
        to_seq: u64,
        trace: Option<TraceContext>,
    ) -> Result<Option<ChainMark>, String> {
        let found = self.chain.last(Kind::Session, id).await.map_err(|e| describe(&e))?;
        let mark = found.as_ref().map(|stored| ChainMark::from(&stored.value));
        let left = self.log.last(id).await.map_err(|e| describe(&e))?;
        if left.is_some() || mark.is_some_and(|m| m.to_seq >= to_seq) {
            return Ok(mark);
        }
        let (last, predecessor) = (found.as_ref().map(|s| &s.value), found.as_ref().map(|s| s.seq));
        if let Some(found) = found.as_ref().filter(|found| found.value.speakers.is_some()) {
            self.answer_late(id, epoch.max(found.value.epoch), found.seq, trace).await.map_err(|e| describe(&e))?;
        }
        let final_id = uuid::Uuid::new_v4().to_string();
        let end = closing_final(id, epoch, to_seq, last, final_id).map_err(|e| describe(&e))?;
        match self.chain.traced(trace).store(&end, predecessor).await.map_err(|e| describe(&e))? {
            Outcome::Stored { .. } => Ok(Some(ChainMark::from(&end))),
            Outcome::LetGo(stored) | Outcome::Rebuild(stored) => Ok(Some(ChainMark::from(&stored.value))),
        }
    }

    /// Nobody will hear who spoke in them.
    async fn answer_late(
        &self,
        id: &StreamId,
        epoch: u64,
        last_seq: u64,
        trace: Option<TraceContext>,
    ) -> Result<(), ChainError> {
        let chain = self.chain.traced(trace);
        for late in self.chain.unanswered(Kind::Session, id, last_seq).await? {
            let why = "not heard in time, and its audio has expired".to_owned();
            match chain.revise(Revision::nobody(&late, epoch, why)).await? {
                Revised::Stored => {}
                // It is somebody else's.
                Revised::LetGo => return Ok(()),
                Revised::TooLong => {
                    tracing::warn!(session = %id, index = late.index, "there is no room to say why nobody is named")
                }
            }
        }
        Ok(())
    }

    async fn admit(&self, worker: &WorkerName, heartbeat: &Heartbeat) -> Admission {
        let admission = match fleet_record::admit(&self.fleet, heartbeat).await {
            Ok(Admission::Dead) => return Admission::Dead,
            Ok(admission) => admission,
            Err(error) => return Admission::Failed(describe(&error)),
        };
        match topology::ensure_worker(&self.nats, worker, heartbeat.job_slots.total).await {
            Ok(()) => admission,
            Err(error) => Admission::Failed(describe(&error)),
        }
    }
}

pub(super) fn unix_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// An error with its causes, for the log.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        text = format!("{text}: {cause}");
        at = cause.source();
    }
    text
}
