//! The active dispatcher: tasks that listen, one loop that owns the decisions, tasks that carry them out.
//!
//! The loop never waits for the network. What it wants done goes to tasks or bounded channels; what comes back is the next
//! input.

mod door;
mod effects;
mod fleet_record;
mod jobs;
mod listen;
mod recover;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::{JoinError, JoinSet},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats,
    api::{ApiCall, ApiResponder, ApiServer, Endpoint},
    kv::{Bucket, Records},
    lease::Lease,
    log::LogItem,
    publish::Publisher,
    topology::Usage,
};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::Heartbeat,
    id::{Kind, StreamId, WorkerName},
    transcript::Final,
};

use crate::{
    config::DispatcherConfig,
    core::{Admission, AppendError, AskReply, Core, Effect, Loaded, Mark, SaveError, WalkEnd, jobs::JobInput},
    jobs::Submission,
    moment::Moment,
    run::DispatcherError,
    sessions::{CallId, ChainMark},
};
use effects::Effects;
use jobs::{Budget, Caller};
use recover::Cursor;

/// One heartbeat period and what its messages may be late: after that, whoever is alive has been heard.
const HEAR_FIRST: Duration = Duration::from_millis(1_200);
/// A loop this late has missed heartbeats.
const LATE: Duration = Duration::from_secs(1);
/// Most entries taken at once before other inputs get their turn.
const BATCH: usize = 256;
/// Jobs under way or waiting for a permit, as a multiple of the permits, at which the loop takes no new entries and
/// requests: enough to keep every permit busy, and what strangers send waits in the log instead of in memory.
const JOBS_PER_PERMIT: usize = 4;
/// What whoever submits a recording is told to wait while others are being stored.
const BUSY_MS: u64 = 500;
/// How long what is under way may take when the dispatcher stops.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// Why the active part ended without an error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Shutdown,
    LeaseLost,
}

/// What comes back to the loop.
enum Input {
    Heartbeat(Box<Heartbeat>, Duration),
    Final(Box<Final>),
    /// The audio stream's oldest sequence, if it answered.
    Probed {
        stream: Option<u64>,
        server: bool,
    },
    Usage(Vec<Usage>),
    Consumers {
        complete: Vec<WorkerName>,
        partial: Vec<WorkerName>,
    },
    Loaded {
        id: StreamId,
        result: Result<Box<Loaded>, String>,
    },
    Saved {
        id: StreamId,
        result: Result<u64, SaveError>,
    },
    Asked {
        id: StreamId,
        epoch: u64,
        worker: WorkerName,
        reply: AskReply,
    },
    Released {
        worker: WorkerName,
        id: StreamId,
        epoch: u64,
        done: bool,
    },
    Appended {
        id: StreamId,
        mark: Mark,
        result: Result<u64, AppendError>,
    },
    Walked {
        id: StreamId,
        result: Result<Box<WalkEnd>, String>,
    },
    ChainRead {
        id: StreamId,
        chain: Option<ChainMark>,
    },
    Admitted {
        worker: WorkerName,
        admission: Admission,
    },
    Buried {
        worker: WorkerName,
        written: Result<(), String>,
    },
    /// Somebody wants a recording transcribed.
    Submit {
        caller: Caller,
        submission: Result<Box<Submission>, Failure>,
    },
    Job(Box<JobInput>),
    CursorSaved,
}

/// Reads both clocks.
#[derive(Debug, Clone, Copy)]
struct Clock {
    start: Instant,
}

impl Clock {
    fn mono(&self) -> Duration {
        self.start.elapsed()
    }

    fn now(&self) -> Moment {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment { mono: self.mono(), unix_ms: unix.as_millis() as u64 }
    }
}

/// Active until `shutdown`, or until the lease is lost.
pub(crate) async fn run(
    nats: &Nats,
    config: &DispatcherConfig,
    name: &str,
    lease: &mut Lease,
    until: Instant,
    api: &mut ApiServer,
    shutdown: &CancellationToken,
) -> Result<Ended, DispatcherError> {
    let stop = CancellationToken::new();
    // Whatever way this ends, its tasks end with it.
    let _stop_all = stop.clone().drop_guard();
    let clock = Clock { start: Instant::now() };
    let (inputs, mut received) = mpsc::channel::<Input>(4_096);
    let (entries, mut log) = mpsc::channel::<LogItem>(4 * BATCH);
    let (tails, tail_starts) = mpsc::channel(1);
    let (held_until, lease_until) = watch::channel(until);

    let publisher = Publisher::new(nats);
    let mut listeners: JoinSet<&'static str> = JoinSet::new();
    listeners.spawn(listen::heartbeats(nats.clone(), clock, inputs.clone(), stop.clone()));
    for kind in [Kind::Session, Kind::Job] {
        listeners.spawn(listen::finals(nats.clone(), kind, inputs.clone(), stop.clone()));
    }
    listeners.spawn(listen::probe(nats.clone(), Duration::from_millis(config.tick_ms), inputs.clone(), stop.clone()));
    listeners.spawn(listen::sweep(nats.clone(), config.topology.clone(), inputs.clone(), stop.clone()));

    let effects = Effects::new(nats, config, publisher, inputs.clone(), &mut listeners, stop.clone(), name);
    let cursors: Records<Cursor> = Records::new(nats, Bucket::Control);
    let mut state = Active {
        core: Core::new(config.clone(), name.to_owned(), nats.subjects().clone()),
        clock,
        effects,
        jobs: JoinSet::new(),
        calls: HashMap::new(),
        next_call: 0,
        cursors,
        saved_cursor: 0,
        saving_cursor: false,
        permits: Arc::new(Semaphore::new(config.io_in_flight)),
        inputs: inputs.clone(),
        go_back: None,
        budget: Budget::new(),
    };

    let renewing = listen::renew(lease, Duration::from_millis(config.lease_ms), held_until, stop.clone());
    tokio::pin!(renewing);
    let ready = async {
        let recovered = recover::open_sessions(nats, config.io_in_flight).await?;
        let jobs = recover::jobs(nats, config.io_in_flight).await?;
        tokio::time::sleep(HEAR_FIRST.saturating_sub(clock.mono())).await;
        Ok::<_, DispatcherError>((recovered, jobs))
    };
    tokio::pin!(ready);
    let ((recovered, from), (open_jobs, ended_jobs)) = loop {
        tokio::select! {
            recovered = &mut ready => break recovered?,
            () = shutdown.cancelled() => return Ok(Ended::Shutdown),
            () = &mut renewing => return Ok(Ended::LeaseLost),
            call = api.next() => if call.is_none() { return Err(DispatcherError::Closed) },
            Some(input) = received.recv() => state.take(input),
        }
        state.carry_out();
    };
    let now = clock.now();
    tracing::info!(sessions = recovered.len(), cursor = from, "predecessor's sessions read");
    for loaded in recovered {
        state.core.recover(loaded, now);
    }
    tracing::info!(jobs = open_jobs.len(), ended = ended_jobs.len(), "predecessor's jobs read");
    for loaded in open_jobs {
        state.core.recover_job(loaded, now);
    }
    for (id, at_ms) in ended_jobs {
        state.core.job_expires(id, at_ms);
    }
    let (door, door_open) = watch::channel(false);
    listeners.spawn(door::publishes(nats.clone(), door_open, state.budget.clone(), inputs.clone(), stop.clone()));
    listeners.spawn(door::keys(nats.clone(), inputs.clone(), stop.clone()));
    listeners.spawn(door::tidy(nats.clone(), config.topology.transcript_max_age_s, stop.clone()));
    state.saved_cursor = from;
    listeners.spawn(listen::tail(nats.clone(), (from + 1, entries), tail_starts, stop.clone()));

    let period = Duration::from_millis(config.tick_ms);
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_tick = clock.mono();
    let mut act_from = Duration::ZERO;
    let mut batch = Vec::with_capacity(BATCH);
    let ended = loop {
        let acting = clock.mono() >= act_from;
        let taking = acting && state.jobs.len() < JOBS_PER_PERMIT * config.io_in_flight;
        tokio::select! {
            () = shutdown.cancelled() => break Ended::Shutdown,
            () = &mut renewing => break Ended::LeaseLost,
            Some(ended) = listeners.join_next() => return Err(listener_ended(ended)),
            Some(done) = state.jobs.join_next() => observe(done),
            Some(input) = received.recv() => {
                state.take(input);
                // What has arrived together is decided together.
                while let Ok(input) = received.try_recv() {
                    state.take(input);
                }
            }
            count = log.recv_many(&mut batch, BATCH), if taking => {
                if count == 0 {
                    return Err(DispatcherError::TaskEnded("tail".to_owned()));
                }
                let now = clock.now();
                for item in batch.drain(..) {
                    state.core.entry(&item.id, item.entry, now);
                }
            }
            call = api.next(), if taking => {
                let Some((call, responder)) = call else { return Err(DispatcherError::Closed) };
                state.request(call, responder);
            }
            _ = ticks.tick() => {
                let now = clock.now();
                if now.since(last_tick) > period + LATE {
                    // Stopped, or starved: the lease may be another's, and silence is our own deafness.
                    tracing::warn!(late_ms = now.since(last_tick).as_millis() as u64, "loop was late, listening first");
                    act_from = now.mono + HEAR_FIRST;
                }
                last_tick = now.mono;
                if now.mono >= act_from {
                    state.core.tick(now);
                    state.save_cursor();
                }
            }
        }
        if Instant::now() > *lease_until.borrow() {
            break Ended::LeaseLost;
        }
        if clock.mono() >= act_from {
            state.core.settle(clock.now());
        }
        let takes_jobs = taking && state.core.takes_jobs();
        door.send_if_modified(|open| std::mem::replace(open, takes_jobs) != takes_jobs);
        state.carry_out();
        if let Some(from) = state.go_back.take() {
            // What the old channel holds is above that and comes again.
            let (entries, again) = mpsc::channel(4 * BATCH);
            log = again;
            if tails.try_send((from, entries)).is_err() {
                return Err(DispatcherError::TaskEnded("tail".to_owned()));
            }
        }
    };
    if ended == Ended::Shutdown {
        state.finish().await;
    }
    Ok(ended)
}

/// The loop's own state.
struct Active {
    core: Core,
    clock: Clock,
    effects: Effects,
    jobs: JoinSet<()>,
    calls: HashMap<CallId, Caller>,
    next_call: u64,
    cursors: Records<Cursor>,
    saved_cursor: u64,
    saving_cursor: bool,
    permits: Arc<Semaphore>,
    inputs: mpsc::Sender<Input>,
    /// Where the tail is to read again from.
    go_back: Option<u64>,
    /// Memory for recordings inside requests.
    budget: Budget,
}

impl Active {
    fn take(&mut self, input: Input) {
        let now = self.clock.now();
        let core = &mut self.core;
        match input {
            Input::Heartbeat(heartbeat, heard) => core.heartbeat(*heartbeat, Moment { mono: heard, ..now }),
            Input::Final(stored) => core.finished(&stored, now),
            Input::Probed { stream, server } => {
                core.probed(stream.is_some(), server, now);
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
            Input::Buried { worker, written } => core.buried(&worker, written, now),
            Input::Submit { caller, submission } => {
                let call = self.call(caller);
                self.core.job(JobInput::Submit { call, submission }, now);
            }
            Input::Job(input) => core.job(*input, now),
            Input::CursorSaved => self.saving_cursor = false,
        }
    }

    fn call(&mut self, caller: Caller) -> CallId {
        self.next_call += 1;
        let id = CallId(self.next_call);
        self.calls.insert(id, caller);
        id
    }

    fn request(&mut self, call: ApiCall, responder: ApiResponder) {
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
            let submission = door::read(call.body, call.content_type, None, Some(paid)).await;
            // The loop is gone when this fails: the client asks again.
            let _ = inputs.send(Input::Submit { caller, submission }).await;
        });
    }

    fn carry_out(&mut self) {
        for effect in self.core.effects() {
            if let Effect::GoBack { from } = effect {
                self.go_back = Some(from);
                continue;
            }
            self.effects.start(effect, &mut self.jobs, &mut self.calls, &self.permits);
        }
    }

    fn save_cursor(&mut self) {
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
    async fn finish(mut self) {
        recover::save_cursor(&self.cursors, self.core.cursor().max(self.saved_cursor)).await;
        let all = async {
            while let Some(done) = self.jobs.join_next().await {
                observe(done);
            }
        };
        if tokio::time::timeout(STOP_WITHIN, all).await.is_err() {
            tracing::warn!("writes were still under way at the end; a successor repairs what they leave");
        }
    }
}

fn listener_ended(ended: Result<&'static str, JoinError>) -> DispatcherError {
    match ended {
        Ok(name) => DispatcherError::TaskEnded(name.to_owned()),
        Err(error) => DispatcherError::TaskEnded(error.to_string()),
    }
}

fn observe(done: Result<(), JoinError>) {
    if let Err(error) = done
        && !error.is_cancelled()
    {
        tracing::error!(%error, "a task failed");
    }
}
