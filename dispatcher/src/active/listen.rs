//! Tasks that listen and pass on. Each ends when it is told to stop, or when the connection is closed.

use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats, ServerError,
    fleet::{self, FleetError},
    kv::KvError,
    lease::{Lease, Standing},
    log::{AudioLog, LogError, LogItem},
    retry::Backoff,
    topology::{self, TopologyConfig},
    transcript::{self, Filter, ReadError, Start},
};
use voxfleet_schema::id::Kind;

use super::input::{Clock, Input};
use crate::fleet::RoundTrip;

/// How often consumers are compared with the fleet: a lost one costs latency only.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// A server that takes longer for a round trip is not fit to carry heartbeats: that is a whole period of them.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Every heartbeat, with the time it was heard.
pub(super) async fn heartbeats(
    nats: Nats,
    clock: Clock,
    inputs: mpsc::Sender<Input>,
    stop: CancellationToken,
) -> &'static str {
    let mut backoff = Backoff::default();
    let listen = async {
        loop {
            let mut beats = match fleet::heartbeats(&nats).await {
                Ok(beats) => beats,
                Err(FleetError::Server(ServerError::Closed)) => return,
                Err(error) => {
                    tracing::warn!(error = %error, "cannot listen for heartbeats, trying again");
                    backoff.wait().await;
                    continue;
                }
            };
            loop {
                match beats.next().await {
                    Ok(beat) => {
                        if inputs.send(Input::Heartbeat(Box::new(beat), clock.mono())).await.is_err() {
                            return;
                        }
                    }
                    Err(FleetError::Server(ServerError::Closed)) => return,
                    Err(error) => tracing::warn!(error = %error, "heartbeat not usable"),
                }
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "heartbeats"
}

/// Every final of one kind from now on.
pub(super) async fn finals(
    nats: Nats,
    kind: Kind,
    inputs: mpsc::Sender<Input>,
    stop: CancellationToken,
) -> &'static str {
    let mut backoff = Backoff::default();
    let listen = async {
        let mut finals = transcript::finals(&nats, &Filter::Kind(kind), Start::New);
        loop {
            match finals.next().await {
                Ok(read) => {
                    backoff = Backoff::default();
                    if inputs.send(Input::Final(Box::new(read.value))).await.is_err() {
                        return;
                    }
                }
                Err(ReadError::Server(ServerError::Closed)) => return,
                Err(ReadError::Malformed { seq, source }) => tracing::warn!(seq, error = %source, "not a final"),
                Err(error) => {
                    tracing::warn!(error = %error, "finals not readable now");
                    backoff.wait().await;
                }
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "finals"
}

/// Where a tail begins, and where its entries go.
type TailStart = (u64, mpsc::Sender<LogItem>);

/// Every entry of the log from a sequence on; another start takes the place of the one before.
pub(super) async fn tail(
    nats: Nats,
    mut start: TailStart,
    mut starts: mpsc::Receiver<TailStart>,
    stop: CancellationToken,
) -> &'static str {
    let listen = async {
        loop {
            let (from, entries) = start;
            start = tokio::select! {
                next = starts.recv() => match next {
                    Some(next) => next,
                    None => return,
                },
                () = read_tail(&nats, from, entries) => return,
            };
        }
    };
    stop.run_until_cancelled(listen).await;
    "tail"
}

/// Ends with the connection.
async fn read_tail(nats: &Nats, from: u64, entries: mpsc::Sender<LogItem>) {
    let mut backoff = Backoff::default();
    let mut tail = AudioLog::new(nats).tail(from);
    loop {
        match tail.next().await {
            Ok(item) => {
                backoff = Backoff::default();
                if entries.send(item).await.is_err() {
                    // The next start is on its way, or the end.
                    return std::future::pending().await;
                }
            }
            Err(LogError::Server(ServerError::Closed)) => return,
            Err(error) => {
                tracing::warn!(error = %error, "log not readable now");
                backoff.wait().await;
            }
        }
    }
}

/// Round trips to the server, over the connection that heartbeats come on.
pub(super) async fn round_trips(
    nats: Nats,
    clock: Clock,
    every: Duration,
    inputs: mpsc::Sender<Input>,
    stop: CancellationToken,
) -> &'static str {
    let connection = nats.connection_events();
    let listen = async {
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let began = clock.mono();
            let answered = nats.rtt(ANSWER_WITHIN).await.is_ok();
            let connects = connection.borrow().connects;
            if inputs.send(Input::RoundTrip(RoundTrip { began, answered, connects })).await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "round trips"
}

/// Whether the audio stream answers, at each tick.
pub(super) async fn probe(
    nats: Nats,
    every: Duration,
    inputs: mpsc::Sender<Input>,
    stop: CancellationToken,
) -> &'static str {
    let log = AudioLog::new(&nats);
    // A fast tick is no reason to give up a slow answer.
    let within = every.max(ANSWER_WITHIN);
    let listen = async {
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let bounds = tokio::time::timeout(within, log.bounds()).await;
            let stream = bounds.ok().and_then(Result::ok).map(|b| b.first_seq);
            if inputs.send(Input::Probed { stream }).await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "probe"
}

/// Makes what has vanished (memory streams go with their server), and tells which consumers exist.
pub(super) async fn sweep(
    nats: Nats,
    config: TopologyConfig,
    inputs: mpsc::Sender<Input>,
    stop: CancellationToken,
) -> &'static str {
    let mut connection = nats.connection_events();
    let listen = async {
        let mut seen = connection.borrow_and_update().connects;
        let mut raised = Vec::new();
        loop {
            let pause = tokio::time::sleep(SWEEP_EVERY);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    changed = connection.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        let connects = connection.borrow_and_update().connects;
                        if connects != seen {
                            seen = connects;
                            break;
                        }
                    }
                }
            }
            match topology::ensure(&nats, &config).await {
                Ok(report) => {
                    tell_raised(&report.raised, &raised);
                    raised = report.raised;
                }
                // One that differs is no reason to leave the others, and their consumers, alone.
                Err(error) => tracing::warn!(error = %error, "streams and buckets cannot be checked now"),
            }
            match topology::list_worker_consumers(&nats).await {
                Ok(found) => {
                    let (complete, partial): (Vec<_>, Vec<_>) = found.into_iter().partition(|c| c.live && c.work);
                    let names = |list: Vec<topology::WorkerConsumers>| list.into_iter().map(|c| c.worker).collect();
                    let input = Input::Consumers { complete: names(complete), partial: names(partial) };
                    if inputs.send(input).await.is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!(error = %error, "consumers cannot be listed now"),
            }
            match topology::usage(&nats).await {
                Ok(streams) => {
                    if inputs.send(Input::Usage(streams)).await.is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!(error = %error, "how full the streams are cannot be read now"),
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "sweep"
}

/// Says once what somebody has given more room than configured.
fn tell_raised(found: &[topology::Raised], told: &[topology::Raised]) {
    for topology::Raised { stream, field, configured, found } in found.iter().filter(|raised| !told.contains(raised)) {
        tracing::warn!(
            stream,
            field,
            configured,
            found,
            "a stream has more room than configured, which stays so; a configuration that says less would make it smaller again if it had to be made anew"
        );
    }
}

/// Renews the lease, at its pace and when `now` asks for it; ends when it is another's. `until` says how long it is surely
/// held.
pub(super) async fn renew(
    lease: &mut Lease,
    ttl: Duration,
    until: watch::Sender<Instant>,
    now: &Notify,
    stop: CancellationToken,
) {
    let renewing = async {
        loop {
            tokio::select! {
                () = tokio::time::sleep(ttl / 3) => {}
                () = now.notified() => {}
            }
            let asked = Instant::now();
            match lease.renew().await {
                Ok(Standing::Leader) => {
                    until.send_replace(asked + ttl);
                }
                Ok(Standing::Follower { holder }) => {
                    tracing::warn!(holder, "another dispatcher holds the lease");
                    return;
                }
                Err(KvError::Server(ServerError::Closed)) => return,
                Err(error) => tracing::warn!(error = %error, "lease not renewed, trying again"),
            }
            if Instant::now() > *until.borrow() {
                return;
            }
        }
    };
    stop.run_until_cancelled(renewing).await;
}
