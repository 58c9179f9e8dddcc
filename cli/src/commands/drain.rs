//! `voxfleet drain`: take a GPU out of the fleet in good order.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::json;
use voxfleet_nats::{
    Nats, ServerError,
    api::{self, ApiError, Endpoint},
    fleet::{self, FleetError, Heartbeats},
};
use voxfleet_schema::{
    failure::FailureClass,
    fleet::{ControlRequest, DrainRequest, Drained, Heartbeat},
    id::{GpuId, Kind, WorkerName},
};

use super::close;
use crate::{
    Context,
    args::DrainArgs,
    exit::{Exit, OrExit as _, coded},
    transcript::screen::{object, out},
};

const ASK: Duration = Duration::from_secs(10);
/// Between two questions about a worker that does not answer.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// A worker answers at once, or is cut off.
const CONTROL: Duration = Duration::from_secs(1);
/// A worker that has been silent for so long is asked whether it is still there: silence alone may be the network's.
const SILENT: Duration = Duration::from_secs(3);
/// What a worker that was told no deadline takes at most, unless its configuration says otherwise.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// The longest drain there is.
const NO_SOONER_MS: u64 = 86_400_000;
/// Beyond its deadline: the last heartbeat, the silence after it, and a busy machine.
const GRACE: Duration = Duration::from_secs(15);

pub(crate) async fn run(args: &DrainArgs, context: &Context) -> anyhow::Result<Exit> {
    let (nats, _) = context.client("voxfleet-drain").await?;
    let drained = drain(args, &nats, context).await;
    close(nats).await;
    drained
}

async fn drain(args: &DrainArgs, nats: &Nats, context: &Context) -> anyhow::Result<Exit> {
    // Heard from before it is asked, so that no heartbeat is missed.
    let mut beats = fleet::heartbeats(nats).await.or_exit(Exit::Unavailable)?;
    let deadline_ms = args.deadline.map(|s| u64::from(s) * 1000);
    let request = DrainRequest { gpu_id: args.gpu.clone(), deadline_ms };
    let Some(drained) = ask(args, &request, nats, &mut beats, context).await? else {
        return gone(args, None);
    };
    if !args.wait {
        if args.json {
            object(&serde_json::to_value(&drained)?)?;
        } else {
            out(&told(args, &drained))?;
        }
        return Ok(Exit::Ok);
    }
    if !args.json {
        eprintln!("{}", told(args, &drained));
    }
    let begun = Instant::now();
    let mut patience = args.deadline.map_or(DEFAULT_DEADLINE, |s| Duration::from_secs(s.into())) + GRACE;
    let mut leaving = Leaving::new(&drained.workers, begun);
    loop {
        let now = Instant::now();
        for worker in leaving.silent(now) {
            if is_gone(nats, &worker).await {
                leaving.left.remove(&worker);
            } else {
                leaving.asked(&worker, Instant::now());
            }
        }
        if leaving.left.is_empty() {
            let after = leaving.last_heard.duration_since(begun);
            return gone(args, Some((&drained, after)));
        }
        if now.duration_since(begun) > patience {
            let left: Vec<String> = leaving.left.keys().map(ToString::to_string).collect();
            let waited = patience.as_secs();
            return Err(anyhow::anyhow!("{} not gone after {waited} s", left.join(", "))).or_exit(Exit::Failure);
        }
        let beat = tokio::select! {
            () = context.shutdown.cancelled() => return Ok(Exit::Interrupted),
            beat = tokio::time::timeout(Duration::from_millis(250), beats.next()) => beat,
        };
        match beat {
            Ok(Ok(beat)) => {
                if args.deadline.is_none() && leaving.left.contains_key(&beat.worker()) {
                    patience = patience.max(begun.elapsed() + own_time(&beat) + GRACE);
                }
                if let Some(line) = leaving.heard(&beat, Instant::now()).filter(|_| !args.json) {
                    eprintln!("{line}");
                }
            }
            Ok(Err(FleetError::Server(error))) => return Err(error).or_exit(Exit::Unavailable),
            Ok(Err(error)) => tracing::warn!(%error, "a heartbeat cannot be read"),
            // Nothing heard in this while; the silence is what is waited for.
            Err(_) => {}
        }
    }
}

/// The dispatcher's answer. Who waits asks on where the worker does not answer yet: the wish is kept, and the worker told again.
/// None when it is gone before it ever answered.
async fn ask(
    args: &DrainArgs,
    request: &DrainRequest,
    nats: &Nats,
    beats: &mut Heartbeats,
    context: &Context,
) -> anyhow::Result<Option<Drained>> {
    let patience = args.deadline.map_or(DEFAULT_DEADLINE, |s| Duration::from_secs(s.into())) + GRACE;
    let until = Instant::now() + patience;
    let mut asked_before = false;
    loop {
        let error = match api::request(nats, Endpoint::FleetDrain, request, ASK).await {
            Ok(drained) => return Ok(Some(drained)),
            Err(error) => error,
        };
        match &error {
            ApiError::Refused(failure) if failure.class == FailureClass::NotFound && (asked_before || args.wait) => {
                // A dispatcher that has just taken over may not have heard it yet: its own silence says more.
                let beats = Instant::now() < until && beats_still(beats, &args.gpu).await?;
                if !beats && asked_before {
                    return Ok(None);
                }
                if !beats {
                    return Err(coded(
                        Exit::of_api(&error),
                        anyhow::Error::new(error).context(format!("drain {}", args.gpu)),
                    ));
                }
            }
            ApiError::Refused(failure)
                if failure.class == FailureClass::Timeout && args.wait && Instant::now() < until =>
            {
                if !asked_before && !args.json {
                    eprintln!("{}: {failure}", args.gpu);
                }
                asked_before = true;
            }
            _ => {
                let exit = Exit::of_api(&error);
                return Err(coded(exit, anyhow::Error::new(error).context(format!("drain {}", args.gpu))));
            }
        }
        let again = context.shutdown.run_until_cancelled(tokio::time::sleep(ASK_AGAIN)).await;
        if again.is_none() {
            return Err(anyhow::anyhow!("interrupted")).or_exit(Exit::Interrupted);
        }
    }
}

/// Whether it is heard before its silence says that it is gone.
async fn beats_still(beats: &mut Heartbeats, gpu: &GpuId) -> anyhow::Result<bool> {
    let heard = async {
        loop {
            match beats.next().await {
                Ok(beat) if beat.gpu_id == *gpu => return Ok(()),
                Err(FleetError::Server(error)) => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
    };
    match tokio::time::timeout(SILENT, heard).await {
        Ok(heard) => heard.map(|()| true).or_exit(Exit::Unavailable),
        Err(_) => Ok(false),
    }
}

fn gone(args: &DrainArgs, after: Option<(&Drained, Duration)>) -> anyhow::Result<Exit> {
    if !args.json {
        out(&format!("{} is gone", args.gpu))?;
        return Ok(Exit::Ok);
    }
    // Nobody was there to be told.
    let nobody = Drained { sessions: 0, jobs: 0, workers: Vec::new() };
    let (drained, after) = after.unwrap_or((&nobody, Duration::ZERO));
    let mut value = serde_json::to_value(drained)?;
    value["gone_after_ms"] = json!(after.as_millis() as u64);
    object(&value)?;
    Ok(Exit::Ok)
}

/// What a worker that was told no deadline says it has left, by its own clock.
fn own_time(beat: &Heartbeat) -> Duration {
    let until = beat.drain.as_ref().and_then(|drain| drain.until_ms);
    Duration::from_millis(until.map_or(0, |until| until.saturating_sub(beat.sent_ms)))
}

/// Only the server's word that nobody listens there any more says so. Draining twice is draining once: the earlier end holds,
/// and this one is later than any.
async fn is_gone(nats: &Nats, worker: &WorkerName) -> bool {
    let request = ControlRequest::Drain { deadline_ms: NO_SOONER_MS };
    let answer = fleet::control(nats, worker, &request, CONTROL).await;
    matches!(answer, Err(FleetError::Server(ServerError::NoResponders(_))))
}

fn told(args: &DrainArgs, drained: &Drained) -> String {
    let workers = match drained.workers.len() {
        1 => String::new(),
        n => format!(" on {n} workers"),
    };
    format!("{} drains: {} to hand over{workers}", args.gpu, load(drained.sessions as usize, drained.jobs as usize))
}

fn load(sessions: usize, jobs: usize) -> String {
    let of = |n: usize, what: &str| if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") };
    format!("{} and {}", of(sessions, "session"), of(jobs, "job"))
}

/// Who has been told to go and was still heard.
struct Leaving {
    /// When each was last heard, and what it held then.
    left: BTreeMap<WorkerName, (Instant, Option<(usize, usize)>)>,
    last_heard: Instant,
}

impl Leaving {
    fn new(workers: &[WorkerName], now: Instant) -> Self {
        Self { left: workers.iter().map(|w| (w.clone(), (now, None))).collect(), last_heard: now }
    }

    /// A line when it holds something else than before.
    fn heard(&mut self, beat: &Heartbeat, now: Instant) -> Option<String> {
        let (at, held) = self.left.get_mut(&beat.worker())?;
        (*at, self.last_heard) = (now, now);
        let count = |kind| beat.held.iter().filter(|h| h.kind == kind).count();
        let holds = (count(Kind::Session), count(Kind::Job));
        if *held == Some(holds) {
            return None;
        }
        *held = Some(holds);
        let draining = if beat.draining { "" } else { ", not draining yet" };
        Some(format!("{}: {} left{draining}", beat.gpu_id, load(holds.0, holds.1)))
    }

    fn silent(&self, now: Instant) -> Vec<WorkerName> {
        let silent = self.left.iter().filter(|(_, (at, _))| now.duration_since(*at) >= SILENT);
        silent.map(|(worker, _)| worker.clone()).collect()
    }

    /// It is still there, or cannot be asked: its silence is counted anew.
    fn asked(&mut self, worker: &WorkerName, now: Instant) {
        if let Some((at, _)) = self.left.get_mut(worker) {
            *at = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_worker_is_asked() {
        let worker: WorkerName = serde_json::from_value(json!({"gpu_id": "g", "incarnation": "i"})).expect("a worker");
        let begun = Instant::now();
        let mut leaving = Leaving::new(std::slice::from_ref(&worker), begun);
        assert!(leaving.silent(begun + Duration::from_secs(2)).is_empty());
        leaving.asked(&worker, begun + Duration::from_secs(2));
        assert!(leaving.silent(begun + Duration::from_secs(4)).is_empty(), "it was heard in between");
        assert_eq!(leaving.silent(begun + Duration::from_secs(5)), [worker]);
    }

    #[test]
    fn a_worker_says_how_long_it_takes() {
        let mut beat: Heartbeat =
            serde_json::from_str(include_str!("../../../schema/tests/golden/heartbeat.json")).expect("a heartbeat");
        let until_ms = Some(beat.sent_ms + 600_000);
        beat.drain = Some(voxfleet_schema::fleet::DrainNotice { why: "asked".to_owned(), until_ms });
        assert_eq!(own_time(&beat), Duration::from_secs(600));
        beat.drain = None;
        assert_eq!(own_time(&beat), Duration::ZERO);
    }

    #[test]
    fn loads_are_counted_in_words() {
        assert_eq!(load(1, 2), "1 session and 2 jobs");
    }
}
