//! The active dispatcher: tasks that listen, one loop that owns the decisions, tasks that carry them out.
//!
//! The loop never waits for the network. What it wants done goes to tasks or bounded channels; what comes back is the next
//! input. A loop that was late (stopped, starved) has missed heartbeats and perhaps its lease: it renews and listens before
//! it decides anything.

mod door;
mod effects;
pub(crate) mod fleet_record;
mod input;
mod jobs;
mod listen;
mod recover;
mod state;
mod tidy;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::{JoinError, JoinSet},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats,
    api::{ApiCall, ApiResponder, ApiServer},
    events::Events,
    kv::{Bucket, Records},
    lease::Lease,
    log::LogItem,
    publish::Publisher,
};
use voxfleet_schema::id::Kind;

use crate::{
    config::DispatcherConfig,
    core::Core,
    http::{metrics, window::Window},
    run::DispatcherError,
};
use effects::Effects;
use input::{Clock, Input};
use jobs::Budget;
use recover::Cursor;
use state::{Active, observe};

/// One heartbeat period and what its messages may be late: after that, whoever is alive has been heard.
const HEAR_FIRST: Duration = Duration::from_millis(1_200);
/// How often the server is asked whether it answers, and verdicts are looked for with its answer: a verdict is at most
/// this late. The tick, where that is faster.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A loop this late has missed heartbeats.
const LATE: Duration = Duration::from_secs(1);
/// Most entries taken at once before other inputs get their turn.
const BATCH: usize = 256;
/// Jobs under way or waiting for a permit, as a multiple of the permits, at which the loop takes no new entries and
/// requests: enough to keep every permit busy, and what strangers send waits in the log instead of in memory.
const JOBS_PER_PERMIT: usize = 4;

/// Why the active part ended without an error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Shutdown,
    LeaseLost,
}

/// What woke the loop.
enum Turn {
    Input(Input),
    /// This many entries were added to the batch.
    Entries(usize),
    Call(Box<(ApiCall, ApiResponder)>),
    Tick,
    /// A task came to its end.
    Done,
}

/// Whether the loop may act, or has to renew its lease and listen first.
struct Watchfulness {
    period: Duration,
    ttl: Duration,
    last_turn: Duration,
    act_from: Duration,
    /// Nothing before a renewal that was asked for after this.
    renewed_after: Option<Instant>,
}

impl Watchfulness {
    /// The loop turns at `now`; true if it was late.
    fn turn(&mut self, now: Duration) -> bool {
        let late = now.saturating_sub(std::mem::replace(&mut self.last_turn, now)) > self.period + LATE;
        if late {
            self.act_from = now + HEAR_FIRST;
            self.renewed_after = Some(Instant::now());
        }
        late
    }

    /// `until`: how long the lease is surely held.
    fn acts(&mut self, now: Duration, until: Instant) -> bool {
        if self.renewed_after.is_some_and(|at| until >= at + self.ttl) {
            self.renewed_after = None;
        }
        self.renewed_after.is_none() && now >= self.act_from
    }
}

/// What is there whether this dispatcher is active or not.
pub(crate) struct Process<'a> {
    pub(crate) nats: &'a Nats,
    pub(crate) config: &'a DispatcherConfig,
    pub(crate) name: &'a str,
    pub(crate) events: &'a Events,
    pub(crate) shutdown: &'a CancellationToken,
    /// For those who look from outside.
    pub(crate) window: &'a Window,
}

/// Active until it is shut down, or until the lease is lost.
pub(crate) async fn run(
    process: &Process<'_>,
    lease: &mut Lease,
    until: Instant,
    api: &mut ApiServer,
) -> Result<Ended, DispatcherError> {
    let &Process { nats, config, name, shutdown, window, .. } = process;
    let stop = CancellationToken::new();
    // Whatever way this ends, its tasks end with it.
    let _stop_all = stop.clone().drop_guard();
    let clock = Clock { start: Instant::now() };
    let (inputs, mut received) = mpsc::channel::<Input>(4_096);
    let (entries, mut log) = mpsc::channel::<LogItem>(4 * BATCH);
    let (tails, tail_starts) = mpsc::channel(1);
    let (held_until, lease_until) = watch::channel(until);
    let renew_now = Notify::new();

    let publisher = Publisher::new(nats);
    let mut listeners: JoinSet<&'static str> = JoinSet::new();
    listeners.spawn(listen::heartbeats(nats.clone(), clock, inputs.clone(), stop.clone()));
    for kind in [Kind::Session, Kind::Job] {
        listeners.spawn(listen::finals(nats.clone(), kind, inputs.clone(), stop.clone()));
    }
    let period = Duration::from_millis(config.tick_ms);
    listeners.spawn(listen::probe(nats.clone(), period, inputs.clone(), stop.clone()));
    listeners.spawn(listen::round_trips(nats.clone(), clock, period.min(LOOK_EVERY), inputs.clone(), stop.clone()));
    listeners.spawn(listen::sweep(nats.clone(), config.topology.clone(), inputs.clone(), stop.clone()));

    let effects = Effects::new(process, publisher, inputs.clone(), &mut listeners, stop.clone());
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
        look_due: false,
        budget: Budget::new(),
    };

    let ttl = Duration::from_millis(config.lease_ms);
    let renewing = listen::renew(lease, ttl, held_until, &renew_now, stop.clone());
    tokio::pin!(renewing);
    let ready = async {
        let left = recover::everything(nats, config.io_in_flight).await?;
        tokio::time::sleep(HEAR_FIRST.saturating_sub(clock.mono())).await;
        Ok::<_, DispatcherError>(left)
    };
    tokio::pin!(ready);
    let left = loop {
        tokio::select! {
            left = &mut ready => break left?,
            () = shutdown.cancelled() => return Ok(Ended::Shutdown),
            () = &mut renewing => return Ok(Ended::LeaseLost),
            call = api.next() => if call.is_none() { return Err(DispatcherError::Closed) },
            Some(ended) = listeners.join_next() => return Err(listener_ended(ended)),
            Some(input) = received.recv() => state.take(input),
        }
        if Instant::now() > *lease_until.borrow() {
            return Ok(Ended::LeaseLost);
        }
        state.carry_out();
    };
    let from = left.cursor;
    state.recover(left);
    window.open();
    let (door, door_open) = watch::channel(false);
    listeners.spawn(door::publishes(nats.clone(), door_open, state.budget.clone(), inputs.clone(), stop.clone()));
    listeners.spawn(door::keys(nats.clone(), inputs.clone(), stop.clone()));
    listeners.spawn(tidy::media(nats.clone(), config.topology.transcript_max_age_s, stop.clone()));
    let kept_s = config.topology.transcript_max_age_s;
    listeners.spawn(tidy::keys(nats.clone(), kept_s, inputs.clone(), stop.clone()));
    state.saved_cursor = from;
    listeners.spawn(listen::tail(nats.clone(), (from + 1, entries), tail_starts, stop.clone()));

    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watchful =
        Watchfulness { period, ttl, last_turn: clock.mono(), act_from: Duration::ZERO, renewed_after: None };
    let mut batch = Vec::with_capacity(BATCH);
    let mut healths = Vec::new();
    let mut calls: VecDeque<(ApiCall, ApiResponder)> = VecDeque::new();
    let ended = loop {
        let acting = watchful.acts(clock.mono(), *lease_until.borrow());
        let taking = acting && state.jobs.len() < JOBS_PER_PERMIT * config.io_in_flight;
        let turn = tokio::select! {
            () = shutdown.cancelled() => break Ended::Shutdown,
            () = &mut renewing => break Ended::LeaseLost,
            Some(ended) = listeners.join_next() => return Err(listener_ended(ended)),
            Some(done) = state.jobs.join_next() => {
                observe(done);
                Turn::Done
            }
            Some(input) = received.recv() => Turn::Input(input),
            count = log.recv_many(&mut batch, BATCH), if taking && batch.is_empty() => Turn::Entries(count),
            call = api.next(), if taking => {
                let Some(call) = call else { return Err(DispatcherError::Closed) };
                Turn::Call(Box::new(call))
            }
            _ = ticks.tick() => Turn::Tick,
        };
        if watchful.turn(clock.mono()) {
            tracing::warn!("loop was late, renewing the lease and listening first");
            renew_now.notify_one();
        }
        if Instant::now() > *lease_until.borrow() {
            break Ended::LeaseLost;
        }
        let acting = watchful.acts(clock.mono(), *lease_until.borrow());
        let mut ticked = false;
        match turn {
            Turn::Input(input) => state.take(input),
            Turn::Entries(0) => return Err(DispatcherError::TaskEnded("tail".to_owned())),
            Turn::Call(call) => calls.push_back(*call),
            Turn::Tick => ticked = true,
            Turn::Entries(_) | Turn::Done => {}
        }
        // What has arrived together is decided together, and nobody is judged while his heartbeat waits here.
        while let Ok(input) = received.try_recv() {
            state.take(input);
        }
        if acting {
            let now = clock.now();
            metrics::audio_read(batch.len(), batch.iter().map(|item| item.entry.payload.len()).sum());
            for item in batch.drain(..) {
                state.core.entry(&item.id, item.entry, now);
            }
            for (call, responder) in calls.drain(..) {
                state.request(call, responder);
            }
            if ticked {
                state.core.tick(now);
                state.save_cursor();
            }
            if std::mem::take(&mut state.look_due) {
                state.core.judge(now);
            }
            state.core.settle(clock.now());
            state.carry_out();
            // Beside the tick also whenever somebody's health changes: a worker that falls silent shows at once.
            if window.is_wanted() && (ticked || state.core.healths(clock.now()) != healths) {
                healths = state.core.healths(clock.now());
                window.show(state.core.fleet_status(clock.now()), state.core.open_sessions());
            }
        }
        let takes_jobs = taking && acting && state.core.takes_jobs();
        door.send_if_modified(|open| std::mem::replace(open, takes_jobs) != takes_jobs);
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

fn listener_ended(ended: Result<&'static str, JoinError>) -> DispatcherError {
    match ended {
        Ok(name) => DispatcherError::TaskEnded(name.to_owned()),
        Err(error) => DispatcherError::TaskEnded(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_loop_acts_only_after_a_renewal_and_a_heartbeat_period() {
        let (second, ttl) = (Duration::from_secs(1), Duration::from_secs(5));
        let mut watchful =
            Watchfulness { period: second, ttl, last_turn: second, act_from: Duration::ZERO, renewed_after: None };
        let before = Instant::now();
        assert!(!watchful.turn(2 * second) && watchful.acts(2 * second, before + ttl));
        assert!(watchful.turn(5 * second), "three seconds without a turn");
        assert!(!watchful.acts(60 * second, before + ttl), "that renewal is older than the stop");
        let renewed = Instant::now() + ttl;
        assert!(!watchful.acts(6 * second, renewed), "who lives has not been heard yet");
        assert!(watchful.acts(5 * second + HEAR_FIRST, renewed));
        assert!(!watchful.turn(6 * second) && watchful.acts(7 * second, renewed));
    }
}
