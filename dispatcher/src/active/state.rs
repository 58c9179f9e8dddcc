//! The loop's own state: the core, and what stands between it and the network.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, mpsc},
    task::{JoinError, JoinSet},
};
use voxfleet_nats::{
    api::{ApiCall, ApiResponder, Endpoint},
    kv::Records,
};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    trace::TraceContext,
};

use super::{
    door,
    effects::Effects,
    input::{Clock, Input},
    jobs::{Budget, Caller},
    recover::{self, Cursor, Left},
};
use crate::{
    core::{Core, Effect, jobs::JobInput},
    moment::Moment,
    sessions::CallId,
};

/// What whoever submits a recording is told to wait while others are being stored.
const BUSY_MS: u64 = 500;
/// How long what is under way may take when the dispatcher stops.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// The loop's own state.
pub(super) struct Active {
    pub(super) core: Core,
    pub(super) clock: Clock,
    pub(super) effects: Effects,
    pub(super) jobs: JoinSet<()>,
    pub(super) calls: HashMap<CallId, Caller>,
    pub(super) next_call: u64,
    pub(super) cursors: Records<Cursor>,
    pub(super) saved_cursor: u64,
    pub(super) saving_cursor: bool,
    pub(super) permits: Arc<Semaphore>,
    pub(super) inputs: mpsc::Sender<Input>,
    /// Where the tail is to read again from.
    pub(super) go_back: Option<u64>,
    /// A round trip has ended since verdicts were last looked for.
    pub(super) look_due: bool,
    /// Memory for recordings inside requests.
    pub(super) budget: Budget,
}

impl Active {
    pub(super) fn take(&mut self, input: Input) {
        let now = self.clock.now();
        let core = &mut self.core;
        match input {
            Input::Heartbeat(heartbeat, heard) => core.heartbeat(*heartbeat, Moment { mono: heard, ..now }),
            Input::Final(stored) => core.finished(&stored, now),
            Input::RoundTrip(trip) => {
                core.round_trip(trip, now);
                self.look_due = true;
            }
            Input::Probed { stream } => {
                core.probed(stream.is_some(), now);
                if let Some(first_seq) = stream {
                    core.oldest(first_seq);
                }
            }
            Input::Usage(streams) => core.usage(&streams, now),
            Input::Consumers { complete, partial } => core.consumers(&complete, &partial, now),
            Input::Loaded { id, result } => core.loaded(&id, result.map(|l| *l), now),
            Input::Saved { id, result } => core.saved(&id, result, now),
            Input::Asked { id, epoch, worker, reply } => core.asked(&id, epoch, &worker, reply, now),
            Input::Released { worker, id, epoch, done } => core.released(&worker, &id, epoch, done, now),
            Input::Appended { id, mark, result } => core.appended(&id, mark, result, now),
            Input::Walked { id, result } => core.walked(&id, result.map(|w| *w), now),
            Input::ChainRead { id, chain } => core.chain_read(&id, chain, now),
            Input::Admitted { worker, admission } => core.admitted(&worker, admission, now),
            Input::Buried { worker, burial } => core.buried(&worker, burial, now),
            Input::Noted { worker, result } => core.noted(&worker, result),
            Input::Drained { worker, reply } => core.drained(&worker, &reply),
            Input::Submit { caller, submission } => {
                let call = self.call(caller);
                self.core.job(JobInput::Submit { call, submission }, now);
            }
            Input::Job(input) => core.job(*input, now),
            Input::CursorSaved => self.saving_cursor = false,
            Input::OpenKeys(ids) => core.open_keys(&ids),
        }
    }

    /// Takes over what a predecessor left.
    pub(super) fn recover(&mut self, left: Left) {
        let now = self.clock.now();
        tracing::info!(
            sessions = left.sessions.len(),
            jobs = left.jobs.len(),
            ended = left.ended_jobs.len(),
            workers = left.fleet.len(),
            cursor = left.cursor,
            "what a predecessor left has been read"
        );
        for loaded in left.sessions {
            self.core.recover(loaded, now);
        }
        for loaded in left.jobs {
            self.core.recover_job(loaded, now);
        }
        for (id, at_ms) in left.ended_jobs {
            self.core.job_expires(id, at_ms);
        }
        self.core.recover_fleet(left.fleet, now);
    }

    fn call(&mut self, caller: Caller) -> CallId {
        self.next_call += 1;
        let id = CallId(self.next_call);
        self.calls.insert(id, caller);
        id
    }

    pub(super) fn request(&mut self, call: ApiCall, responder: ApiResponder) {
        let caller = Caller::Api(Box::new(responder));
        if call.endpoint == Endpoint::JobSubmit {
            return self.submit(call, caller);
        }
        let id = self.call(caller);
        self.core.request(id, &call, self.clock.now());
    }

    /// A job request may carry a recording: it is read beside the loop, and only while there is memory for it.
    fn submit(&mut self, call: ApiCall, caller: Caller) {
        let Some(paid) = self.budget.try_take(call.body.len()) else {
            let busy = Failure {
                retry_after_ms: Some(BUSY_MS),
                ..Failure::new(FailureClass::NoCapacity, "too many recordings are being submitted")
            };
            let id = self.call(caller);
            return self.core.job(JobInput::Submit { call: id, submission: Err(busy) }, self.clock.now());
        };
        let inputs = self.inputs.clone();
        self.jobs.spawn(async move {
            let mut submission = door::read(call.body, call.content_type, None, Some(paid)).await;
            if let Ok(submission) = &mut submission {
                submission.trace = call.traceparent.as_deref().and_then(TraceContext::parse);
            }
            // The loop is gone when this fails: the client asks again.
            let _ = inputs.send(Input::Submit { caller, submission }).await;
        });
    }

    pub(super) fn carry_out(&mut self) {
        for effect in self.core.effects() {
            if let Effect::GoBack { from } = effect {
                self.go_back = Some(from);
                continue;
            }
            self.effects.start(effect, &mut self.jobs, &mut self.calls, &self.permits);
        }
    }

    pub(super) fn save_cursor(&mut self) {
        let seq = self.core.cursor();
        if self.saving_cursor || seq == 0 || seq == self.saved_cursor {
            return;
        }
        (self.saving_cursor, self.saved_cursor) = (true, seq);
        let (cursors, inputs) = (self.cursors.clone(), self.inputs.clone());
        self.jobs.spawn(async move {
            recover::save_cursor(&cursors, seq).await;
            // The loop is gone when this fails, and with it the question.
            let _ = inputs.send(Input::CursorSaved).await;
        });
    }

    /// Lets what is under way end, and leaves the cursor where a successor goes on.
    pub(super) async fn finish(mut self) {
        let seq = self.core.cursor().max(self.saved_cursor);
        let all = async {
            recover::save_cursor(&self.cursors, seq).await;
            while let Some(done) = self.jobs.join_next().await {
                observe(done);
            }
        };
        if tokio::time::timeout(STOP_WITHIN, all).await.is_err() {
            tracing::warn!("writes were still under way at the end; a successor repairs what they leave");
        }
    }
}

pub(super) fn observe(done: Result<(), JoinError>) {
    if let Err(error) = done
        && !error.is_cancelled()
    {
        tracing::error!(%error, "a task failed");
    }
}
