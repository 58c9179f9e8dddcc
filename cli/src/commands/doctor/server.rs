//! NATS: reachable, new enough, with the streams that we need, with a fleet behind it.

use std::time::Duration;

use serde_json::json;
use voxfleet_nats::{
    Nats,
    api::{self, Endpoint},
    kv::{Bucket, KvError, Records},
    topology::{self, TopologyError},
};
use voxfleet_schema::{
    fleet::{FleetStatus, WorkerStatus},
    id::WorkerName,
    session::{SessionRecord, SessionRequest, SessionState, SessionStatus},
};

use super::{
    Check, fleet,
    running::{self, Waiting},
};
use crate::{commands::status::heard, config::Settings};

const ASK: Duration = Duration::from_secs(2);
/// A round trip beyond this adds up in every final.
const SLOW_RTT: Duration = Duration::from_millis(250);
/// Chunks and finals are far smaller; beyond this a 30 s chunk fits too.
const AMPLE_PAYLOAD: usize = 4 * 1024 * 1024;
const CLOCK_TOLERANCE_MS: u64 = 2_000;
const ALARM_SHARE: f64 = 0.8;
/// Dispatchers answer within a round trip.
const STANDBYS: Duration = Duration::from_millis(500);
/// Of the sessions that wait so many are asked about: the reason is mostly the same.
const WAITING_ASKED: usize = 3;

pub(super) async fn look(settings: &Settings) -> Vec<Check> {
    let nats = match Nats::connect(&settings.nats, "voxfleet-doctor").await {
        Ok(nats) => nats,
        Err(error) => {
            let why = format!("{:#}", anyhow::Error::new(error));
            return vec![Check::fail("nats", why, "start nats-server, or set nats.urls (--url)")];
        }
    };
    let mut checks = vec![rtt(&nats).await];
    let problems = topology::verify(&nats, &crate::commands::wanted_topology(settings)).await;
    checks.push(version(&nats, &problems));
    let dispatcher = api::request::<_, FleetStatus>(&nats, Endpoint::FleetStatus, &json!({}), ASK).await;
    let connected = api::dispatchers(&nats, STANDBYS).await;
    if let Err(error) = &connected {
        checks.push(Check::warn(
            "standbys",
            format!("not looked at: {error}"),
            "this needs a login that may ask services",
        ));
    }
    let connected = connected.unwrap_or_default();
    checks.extend(streams(&problems, dispatcher.is_ok()));
    checks.push(payload(&nats, &problems));
    let jetstream = answers(&problems);
    if jetstream {
        checks.extend(usage(&nats).await);
    }
    checks.push(running::dispatcher(dispatcher.as_ref().map_err(ToString::to_string), &connected));
    let status = dispatcher.ok();
    checks.extend(workers(&nats, status.as_ref(), jetstream).await);
    if let Some(status) = &status {
        checks.extend(running::workers(status));
        match waiting(&nats, status).await {
            Ok(waiting) => checks.extend(running::waiting(status, &waiting)),
            Err(error) => {
                let found = format!("{} sessions wait; which was not looked at: {error}", status.sessions_waiting);
                checks.push(Check::warn("waiting", found, "this needs a login that may read records"));
            }
        }
    }
    nats.close(Duration::from_secs(1)).await;
    checks
}

async fn rtt(nats: &Nats) -> Check {
    match nats.rtt(ASK).await {
        Ok(rtt) if rtt <= SLOW_RTT => {
            Check::ok("nats", format!("{}, round trip {:.1} ms", nats.server_name(), ms(rtt)))
        }
        Ok(rtt) => Check::warn("nats", format!("round trip {:.0} ms", ms(rtt)), "choose a server that is nearer"),
        Err(error) => Check::fail(
            "nats",
            error.to_string(),
            "the connection stands and nothing comes back: look at the server's log",
        ),
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn version(nats: &Nats, problems: &[TopologyError]) -> Check {
    match problems.iter().find(|p| matches!(p, TopologyError::ServerTooOld { .. })) {
        Some(problem) => Check::fail("server version", problem.to_string(), "install nats-server 2.12 or newer"),
        None => Check::ok("server version", nats.server_version()),
    }
}

/// Whether JetStream answers at all: where it did not, each further question would wait for its time to run out again.
fn answers(problems: &[TopologyError]) -> bool {
    use TopologyError::{NoJetStream, Server, Stream};
    !problems.iter().any(|p| matches!(p, NoJetStream | Server(_) | Stream { .. }))
}

fn is_denied(problem: &TopologyError) -> bool {
    match problem {
        TopologyError::Server(error) | TopologyError::Stream { source: error, .. } => error.is_denied(),
        _ => false,
    }
}

/// One line where all is well, else one line a problem. What is missing while nobody makes it is no failure yet.
fn streams(problems: &[TopologyError], dispatcher: bool) -> Vec<Check> {
    if let Some(denied) = problems.iter().find(|p| is_denied(p)) {
        let found = format!("not looked at: {denied}");
        return vec![Check::warn(
            "streams",
            found,
            "nothing to mend for a role that need not; an operator's login sees them",
        )];
    }
    let off = problems.iter().any(|p| matches!(p, TopologyError::NoJetStream));
    let mut checks = vec![match off {
        true => Check::fail("jetstream", "off", "start nats-server with -js, and enable it for the account"),
        false => Check::ok("jetstream", "on"),
    }];
    let missing: Vec<&str> = problems
        .iter()
        .filter_map(|p| if let TopologyError::Missing { stream } = p { Some(stream.as_str()) } else { None })
        .collect();
    if !missing.is_empty() {
        let found = format!("missing: {}", missing.join(", "));
        let mend = "start a dispatcher, it makes what is missing";
        checks.push(if dispatcher { Check::fail("streams", found, mend) } else { Check::warn("streams", found, mend) });
    }
    let others = problems.iter().filter(|p| {
        !matches!(
            p,
            TopologyError::Missing { .. }
                | TopologyError::NoJetStream
                | TopologyError::ServerTooOld { .. }
                | TopologyError::MaxPayload { .. }
        )
    });
    let before = checks.len();
    checks.extend(others.map(|p| {
        let mut causes = Vec::new();
        let mut at = std::error::Error::source(p);
        while let Some(cause) = at {
            causes.push(cause.to_string());
            at = cause.source();
        }
        let mend = if causes.is_empty() { "see the message".to_owned() } else { causes.join(": ") };
        Check::fail("streams", p.to_string(), mend)
    }));
    if missing.is_empty() && checks.len() == before && !off {
        checks.push(Check::ok("streams", "all there, as wanted"));
    }
    checks
}

fn payload(nats: &Nats, problems: &[TopologyError]) -> Check {
    let found = nats.max_payload();
    match problems.iter().find(|p| matches!(p, TopologyError::MaxPayload { .. })) {
        Some(problem) => Check::fail("max_payload", problem.to_string(), "raise max_payload"),
        None if found < AMPLE_PAYLOAD => Check::warn(
            "max_payload",
            format!("{} KiB", found / 1024),
            "enough for live chunks; 4MB takes whole calls in one message",
        ),
        None => Check::ok("max_payload", format!("{} KiB", found / 1024)),
    }
}

async fn usage(nats: &Nats) -> Vec<Check> {
    let Ok(usage) = topology::usage(nats).await else {
        // Without JetStream or streams there is nothing to fill, and that is told above.
        return Vec::new();
    };
    let mut checks: Vec<Check> = usage
        .iter()
        .filter(|u| u.share() >= ALARM_SHARE)
        .map(|u| {
            let found = format!("{} is {:.0} % full", u.stream, u.share() * 100.0);
            let mend = format!(
                "give it more room before it refuses: nats stream edit {} --max-bytes={}",
                u.stream,
                u.max_bytes.saturating_mul(2)
            );
            Check::warn("stream space", found, mend)
        })
        .collect();
    if checks.is_empty() {
        let (bytes, messages) = usage.iter().fold((0, 0), |(b, m), u| (b + u.bytes, m + u.messages));
        checks.push(Check::ok("stream space", format!("{messages} messages, {} MiB", bytes >> 20)));
    }
    let dead = usage.iter().find(|u| u.stream == topology::names::DEAD).map_or(0, |u| u.messages);
    checks.push(running::dead_letters(dead));
    match topology::behind(nats).await {
        Ok(behind) => checks.extend(running::replicas(&behind)),
        Err(error) => checks.push(Check::warn("replicas", error.to_string(), "look at the servers' logs")),
    }
    checks
}

/// Why those wait that wait, as the dispatcher sees it.
async fn waiting(nats: &Nats, status: &FleetStatus) -> Result<Vec<Waiting>, KvError> {
    if status.sessions_waiting == 0 {
        return Ok(Vec::new());
    }
    let records = Records::<SessionRecord>::new(nats, Bucket::Sessions).all().await?;
    let mut waiting: Vec<SessionRecord> = records.into_iter().map(|(_, versioned)| versioned.value).collect();
    waiting.retain(|record| record.state == SessionState::Waiting);
    waiting.sort_by_key(|record| record.changed_ms);
    let mut told = Vec::new();
    for record in waiting.into_iter().take(WAITING_ASKED) {
        let query = SessionRequest { session: record.id.clone() };
        let asked = api::request::<_, SessionStatus>(nats, Endpoint::SessionStatus, &query, ASK).await;
        let why = asked.map(|status| running::reasons(&status.why, &status.candidates)).unwrap_or_default();
        told.push(Waiting { id: record.id, why });
    }
    Ok(told)
}

async fn workers(nats: &Nats, status: Option<&FleetStatus>, jetstream: bool) -> Vec<Check> {
    let workers = match heard(nats).await {
        Ok(workers) => workers,
        Err(error) => return vec![Check::fail("workers", format!("{error:#}"), "cannot listen to heartbeats")],
    };
    if workers.is_empty() {
        return vec![
            Check::warn("workers", "none beats", "start `voxfleet worker`"),
            Check::ok("clock", "not compared: no worker beats"),
        ];
    }
    let mut checks = vec![Check::ok("workers", format!("{} beat", workers.len())), clock(&workers)];
    checks.extend(fleet::look(workers.iter().map(|worker| &worker.heartbeat)));
    checks.extend(running::versions(workers.iter().map(|worker| &worker.heartbeat), env!("CARGO_PKG_VERSION")));
    let consumers = match jetstream {
        true => topology::list_worker_consumers(nats).await.map(Some),
        false => Ok(None),
    };
    if let Err(error) = &consumers {
        checks.push(Check::warn("consumers", format!("not looked at: {error}"), "this needs an operator's login"));
    }
    if let Ok(Some(consumers)) = consumers {
        let lacking = |w: &&WorkerStatus| !consumers.iter().any(|c| c.live && c.worker == w.heartbeat.worker());
        checks.extend(workers.iter().filter(lacking).map(|w| {
            let found = format!("{} has no consumer for live audio", w.heartbeat.gpu_id);
            Check::warn(
                "consumers",
                found,
                "a dispatcher makes it at the next heartbeat; until then audio comes from the log only",
            )
        }));
        let known: Vec<WorkerName> = workers.iter().map(|worker| worker.heartbeat.worker()).collect();
        checks.extend(running::strangers(consumers.iter().map(|consumer| &consumer.worker), &known, status));
    }
    checks
}

/// Heartbeats carry their worker's clock; deadlines never do, so a difference spoils figures, not transcripts.
fn clock(workers: &[WorkerStatus]) -> Check {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_millis();
    let now = u64::try_from(now).unwrap_or(u64::MAX);
    let off = |w: &WorkerStatus| now.saturating_sub(w.ms_since_heartbeat).abs_diff(w.heartbeat.sent_ms);
    match workers.iter().max_by_key(|w| off(w)) {
        Some(worst) if off(worst) > CLOCK_TOLERANCE_MS => Check::warn(
            "clock",
            format!("{} differs by {:.1} s", worst.heartbeat.gpu_id, off(worst) as f64 / 1000.0),
            "run an NTP client on both machines; times in events and status are off by that much",
        ),
        Some(worst) => Check::ok("clock", format!("within {} ms of every worker", off(worst))),
        None => Check::ok("clock", "not compared"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;

    #[test]
    fn missing_streams_are_a_failure_only_where_someone_should_have_made_them() {
        let missing = [TopologyError::Missing { stream: "ASR_AUDIO".to_owned() }];
        let worst =
            |problems: &[TopologyError], dispatcher| streams(problems, dispatcher).iter().map(|c| c.verdict).max();
        assert_eq!(worst(&missing, false), Some(Verdict::Warn));
        assert_eq!(worst(&missing, true), Some(Verdict::Fail));
        assert_eq!(worst(&[TopologyError::NoJetStream], false), Some(Verdict::Fail));
        assert_eq!(worst(&[], false), Some(Verdict::Ok));
        let denied = || voxfleet_nats::ServerError::Denied { what: "publish to", subject: "$JS.API.INFO".to_owned() };
        assert_eq!(worst(&[TopologyError::Server(denied())], true), Some(Verdict::Warn));
        let stream = TopologyError::Stream { stream: "ASR_DEAD".to_owned(), source: denied() };
        assert_eq!(worst(&[stream], true), Some(Verdict::Warn));
    }

    #[test]
    fn a_server_that_did_not_answer_is_not_asked_again() {
        let timeout = || voxfleet_nats::ServerError::Timeout;
        assert!(!answers(&[TopologyError::NoJetStream]) && !answers(&[TopologyError::Server(timeout())]));
        assert!(!answers(&[TopologyError::Stream { stream: "ASR_AUDIO".to_owned(), source: timeout() }]));
        assert!(answers(&[]) && answers(&[TopologyError::Missing { stream: "ASR_AUDIO".to_owned() }]));
    }
}
