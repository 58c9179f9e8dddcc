//! Jobs of one incarnation: takes work items while a job slot is free, keeps each acked while it runs, says how it ended.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::{JoinError, JoinSet},
    time::{Instant, MissedTickBehavior, interval},
};
use voxfleet_nats::jobs::{Work, WorkAck};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::GivenUp,
    id::Kind,
    job::WorkItem,
    trace::TraceContext,
};

use super::{Supervisor, WorkerError, holdings::Decision};
use crate::{
    job::{Job, JobEnd, job_options},
    lifecycle::{Known, is_of_this_worker},
    session::{Handle, Names, contained},
};

/// Progress acks: well within the consumer's ack wait of 30 s.
const STILL_AT_IT: Duration = Duration::from_secs(10);

/// How long a finished job waits to be released: no dispatcher needs longer to take over and read the chain.
const UNTIL_RELEASED: Duration = Duration::from_secs(15);

/// A job's task: the handle it ran under, its epoch, and its end unless it was released.
pub(super) type JobFinished = (Arc<Handle>, Option<JobEnd>);

impl Supervisor {
    /// Takes a work item, or says why not.
    pub(super) fn work(&self, work: Work, jobs: &mut JoinSet<JobFinished>, acks: &mut JoinSet<()>) {
        let Work { item, ack, .. } = work;
        let item = match item {
            Ok(item) => item,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "not a work item");
                acks.spawn(async move { ended(ack.term("not a work item").await) });
                return;
            }
        };
        let (id, epoch) = (&item.job, item.epoch);
        let decision = self.holdings.consider(Kind::Job, id, epoch, &self.offer(&item.options), Instant::now());
        match self.spared(self.in_stock(decision, item.options.model.as_deref())) {
            // Delivered again while it runs here: its progress acks count for this delivery too.
            Decision::Held => tracing::debug!(job = %id, gpu = %self.gpu_id, epoch, "work item delivered again"),
            Decision::Refuse(failure) => {
                let failure = refusal(failure);
                tracing::info!(job = %id, gpu = %self.gpu_id, epoch, %failure, "job refused");
                if failure.class != FailureClass::BadRequest {
                    self.give_up(&item, failure);
                }
                acks.spawn(async move { ended(ack.term("refused").await) });
            }
            Decision::Raise => {
                if let Some(older) = self.holdings.get(Kind::Job, id) {
                    older.cancel.cancel();
                }
                self.start(item, ack, jobs);
            }
            Decision::Start => self.start(item, ack, jobs),
        }
    }

    fn give_up(&self, item: &WorkItem, failure: Failure) {
        let given_up = GivenUp { kind: Kind::Job, id: item.job.clone(), epoch: item.epoch, failure };
        self.holdings.give_up(given_up, Instant::now());
    }

    fn start(&self, item: WorkItem, ack: WorkAck, jobs: &mut JoinSet<JobFinished>) {
        let names = Names { kind: Kind::Job, id: item.job.clone(), gpu_id: self.gpu_id.clone() };
        self.engine.begins(&names, Known { suspect: item.suspect, ..Known::default() });
        let handle = Arc::new(Handle::new(names, item.epoch, job_options(&item.options), item.traceparent));
        self.holdings.put(Arc::clone(&handle));
        let trace_id = item.traceparent.as_ref().map(TraceContext::trace_text);
        say!(info, handle.names, epoch = item.epoch, trace_id, attempt = item.attempt, "job taken");
        let job = Job { means: self.means.clone(), item, handle };
        jobs.spawn(run(job, ack));
    }

    pub(super) fn job_ended(&self, finished: Result<JobFinished, JoinError>) -> Result<(), WorkerError> {
        let (handle, end) = finished?;
        let (job, epoch) = (&handle.names.id, handle.epoch());
        match end {
            None => say!(info, handle.names, epoch, "job released"),
            Some(JobEnd::Done) => say!(info, handle.names, epoch, "job done"),
            Some(JobEnd::LetGo) => say!(info, handle.names, epoch, "a higher epoch owns the job"),
            Some(JobEnd::GivenUp(failure)) => {
                say!(warn, handle.names, epoch, %failure, "job given up");
                // Before it leaves what is held: no heartbeat may know nothing of it.
                let given_up = GivenUp { kind: Kind::Job, id: job.clone(), epoch, failure };
                self.holdings.give_up(given_up, Instant::now());
            }
        }
        self.let_go(&handle, None);
        Ok(())
    }
}

/// What is said to one that was not begun. No engine has seen it: that is no try, and no suspicion.
fn refusal(failure: Failure) -> Failure {
    let class = if is_of_this_worker(failure.class) { FailureClass::NoCapacity } else { failure.class };
    Failure { class, ..failure }
}

/// Runs one job under its work item's ack.
async fn run(job: Job, ack: WorkAck) -> JobFinished {
    let handle = Arc::clone(&job.handle);
    let mut beats = interval(STILL_AT_IT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = {
        let running = contained(job.run());
        let over = handle.over();
        tokio::pin!(running, over);
        loop {
            tokio::select! {
                biased;
                () = &mut over => break None,
                end = &mut running => match end.unwrap_or_else(JobEnd::GivenUp) {
                    JobEnd::GivenUp(_) if handle.is_released() => break None,
                    end => break Some(end),
                },
                _ = beats.tick() => {
                    if let Err(error) = ack.progress().await {
                        // The item comes again then, and finds the job held.
                        say!(warn, handle.names, epoch = job.item.epoch, error = &error as &dyn std::error::Error, "progress not acked");
                    }
                }
            }
        }
    };
    match &end {
        Some(JobEnd::Done) => {
            ended(ack.done().await);
            // Held until the dispatcher has read the end: to it, a job that vanishes has failed.
            let mut wishes = handle.desired.subscribe();
            tokio::select! {
                () = handle.cancel.cancelled() => {}
                _ = wishes.wait_for(|wish| wish.finish) => {}
                () = tokio::time::sleep(UNTIL_RELEASED) => {}
            }
        }
        Some(JobEnd::LetGo) => ended(ack.done().await),
        Some(JobEnd::GivenUp(failure)) => ended(ack.term(failure.class.as_str()).await),
        None => ended(ack.term("released").await),
    }
    (handle, end)
}

/// An item whose ack is lost comes again, and then the chain, or its epoch, tells that it is over.
fn ended<E: std::error::Error + 'static>(acked: Result<(), E>) {
    if let Err(error) = acked {
        tracing::warn!(error = &error as &dyn std::error::Error, "work item not acked");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_out_costs_a_job_no_try() {
        use FailureClass::*;
        for (class, told) in [
            (OutOfMemory, NoCapacity),
            (DeviceLost, NoCapacity),
            (DriverMismatch, NoCapacity),
            (MissingLibrary, NoCapacity),
            (EngineCrash, NoCapacity),
            (Timeout, NoCapacity),
            (NoCapacity, NoCapacity),
            (ModelMissing, ModelMissing),
            (BadRequest, BadRequest),
        ] {
            let failure = Failure { retry_after_ms: Some(40_000), ..Failure::new(class, "small has no room") };
            assert_eq!(refusal(failure.clone()), Failure { class: told, ..failure }, "{class}");
        }
    }
}
