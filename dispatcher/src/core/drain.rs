//! Draining a GPU on request: its workers are told, and told again until their heartbeats say so. What they hold is moved
//! by reconciliation, like that of any worker that drains by itself.

use std::collections::HashMap;

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::{DrainRequest, Drained},
    id::WorkerName,
};

use super::{Answer, AskReply, Core, Effect};
use crate::{moment::Moment, sessions::CallId};

/// End of a drain without a deadline: the worker takes its own `drain_ms`, and says in its heartbeats until when. Any other end
/// is earlier.
const OWN_TIME: u64 = u64::MAX;
/// The longest: a worker that is to finish its work and then go.
const LONGEST_MS: u64 = 86_400_000;
/// What is left of a deadline is not sent below this: it would say nothing else than 'now'.
const LEAST_MS: u64 = 1_000;

/// Drains that are on their way to their workers.
#[derive(Debug, Default)]
pub(super) struct Drains {
    /// Who waits for the answers of how many.
    waiting: HashMap<WorkerName, Vec<CallId>>,
    calls: HashMap<CallId, Pending>,
}

#[derive(Debug)]
struct Pending {
    left: usize,
    drained: Drained,
    silent: Option<String>,
}

impl Core {
    pub(super) fn drain(&mut self, call: CallId, request: &DrainRequest, now: Moment) {
        let mut workers: Vec<WorkerName> =
            self.fleet.workers().map(|(name, _)| name).filter(|n| n.gpu_id == request.gpu_id).cloned().collect();
        workers.sort();
        if workers.is_empty() {
            let message = format!("no living worker on GPU {} is known", request.gpu_id);
            return self.refuse(call, Failure::new(FailureClass::NotFound, message));
        }
        let deadline_ms = request.deadline_ms.map(|ms| ms.clamp(LEAST_MS, LONGEST_MS));
        let until_ms = deadline_ms.map_or(OWN_TIME, |ms| now.unix_ms.saturating_add(ms));
        let held = |load: fn(&crate::fleet::Worker) -> u32| {
            workers.iter().filter_map(|name| self.fleet.get(name)).map(load).sum::<u32>()
        };
        let drained = Drained { sessions: held(|w| w.load.used()), jobs: held(|w| w.jobs.used()), workers: Vec::new() };
        tracing::info!(gpu = %request.gpu_id, workers = workers.len(), deadline_ms, "drain asked for");
        self.drains.calls.insert(call, Pending { left: workers.len(), drained, silent: None });
        for worker in workers {
            if let Some(known) = self.fleet.get_mut(&worker) {
                // An earlier end wins: whoever said that meant it.
                known.drain_until_ms = Some(known.drain_until_ms.map_or(until_ms, |before| before.min(until_ms)));
            }
            self.drains.waiting.entry(worker.clone()).or_default().push(call);
            // A successor finds the wish there.
            self.note(&worker, now);
            self.effect(Effect::Drain { worker, deadline_ms: deadline_ms.unwrap_or(0) });
        }
        self.reconcile_due = true;
    }

    /// The worker answered, or did not.
    pub fn drained(&mut self, worker: &WorkerName, reply: &AskReply) {
        for call in self.drains.waiting.remove(worker).unwrap_or_default() {
            let Some(pending) = self.drains.calls.get_mut(&call) else {
                continue;
            };
            pending.left -= 1;
            match reply {
                AskReply::Taken => pending.drained.workers.push(worker.clone()),
                AskReply::Refused(failure) => pending.silent = Some(failure.to_string()),
                AskReply::Silent(error) => pending.silent = Some(error.clone()),
            }
            if pending.left > 0 {
                continue;
            }
            let Some(pending) = self.drains.calls.remove(&call) else {
                continue;
            };
            match pending.silent.filter(|_| pending.drained.workers.is_empty()) {
                None => self.answer(call, Answer::Drained(Box::new(pending.drained))),
                Some(error) => {
                    let message = format!("the worker does not answer yet, it is told again until it drains: {error}");
                    let failure = Failure {
                        retry_after_ms: Some(self.config.retry_after_ms),
                        ..Failure::new(FailureClass::Timeout, message)
                    };
                    self.refuse(call, failure);
                }
            }
        }
    }

    /// Tells those again who were asked to drain and do not say that they do.
    pub(super) fn drain_again(&mut self, now: Moment) {
        let due: Vec<(WorkerName, u64)> = self
            .fleet
            .workers()
            .filter(|(name, w)| !w.heartbeat.draining && !self.drains.waiting.contains_key(name))
            .filter_map(|(name, w)| Some((name.clone(), w.drain_until_ms?)))
            .collect();
        for (worker, until_ms) in due {
            let deadline_ms = match until_ms {
                OWN_TIME => 0,
                until_ms => until_ms.saturating_sub(now.unix_ms).clamp(LEAST_MS, LONGEST_MS),
            };
            self.drains.waiting.insert(worker.clone(), Vec::new());
            self.effect(Effect::Drain { worker, deadline_ms });
        }
    }
}
