//! From start to stop: topology, the lease, active while it is held.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats, ServerError,
    api::{ApiError, ApiServer},
    events::Events,
    kv::KvError,
    lease::{Lease, Standing},
    publish::Publisher,
    retry::Backoff,
    topology::{self, TopologyError},
};
use voxfleet_trace::Tracer;

use crate::{
    active::{self, Ended, Process},
    config::DispatcherConfig,
    http::{self, window::Window},
};

/// Why a dispatcher could not go on.
#[derive(Debug, thiserror::Error)]
pub enum DispatcherError {
    #[error("bad configuration: {}", .0.join("; "))]
    Config(Vec<String>),
    #[error("streams and buckets")]
    Topology(#[from] TopologyError),
    #[error("service api")]
    Api(#[from] ApiError),
    #[error("connection is closed")]
    Closed,
    #[error("task {0} ended by itself")]
    TaskEnded(String),
}

/// For each word of goodbye to a server that may just have gone.
const GOODBYE: Duration = Duration::from_secs(1);
/// For events that are not stored yet, beside those words: as long as both of them take together.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// Runs a dispatcher until `shutdown`. Any number may run; one is active, the others wait for its lease. `tracer`: who is told
/// what is done for sessions and jobs.
pub async fn run(
    nats: Nats,
    config: DispatcherConfig,
    tracer: Tracer,
    shutdown: CancellationToken,
) -> Result<(), DispatcherError> {
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(DispatcherError::Config(problems));
    }
    let name = if config.name.is_empty() {
        let random = uuid::Uuid::new_v4().simple().to_string();
        format!("dispatcher-{}", &random[..8])
    } else {
        config.name.clone()
    };
    let Some(report) = make_topology(&nats, &config, &shutdown).await? else {
        return Ok(());
    };
    tracing::info!(
        name,
        created = report.created.len(),
        verified = report.verified.len(),
        grown = report.grown.len(),
        "streams and buckets are there"
    );
    let window = Window::new();
    // Beside everything else, and before the service: who watches processes learns that this one waits for its turn.
    let looking = shutdown.child_token();
    let mut serving = JoinSet::new();
    serving.spawn(http::run(nats.clone(), (&config).into(), name.as_str().into(), window.clone(), looking.clone()));
    let mut api = ApiServer::start(&nats, &name).await?;
    let mut lease = Lease::new(&nats, &name, Duration::from_millis(config.lease_ms));
    // One queue for all the times that this process is active: what it has decided is told, whoever decides next.
    let (events, queue) = Events::new();
    let mut telling = JoinSet::new();
    telling.spawn({
        let (nats, publisher) = (nats.clone(), Publisher::new(&nats));
        async move { queue.run(&nats, &publisher).await }
    });
    let process = Process {
        nats: &nats,
        config: &config,
        name: &name,
        events: &events,
        tracer: &tracer,
        shutdown: &shutdown,
        window: &window,
    };
    let result = tokio::select! {
        result = serve(&process, &mut lease, &mut api) => result,
        Some(ended) = telling.join_next() => Err(match ended {
            Ok(()) => DispatcherError::Closed,
            Err(error) => DispatcherError::TaskEnded(error.to_string()),
        }),
    };
    // Whatever ended it: pages and scrapes of a dispatcher that does nothing any more would mislead.
    looking.cancel();
    // Nobody tells anything any more.
    drop(events);
    if nats.is_connected() {
        tokio::join!(say_goodbye(lease, api), async {
            if tokio::time::timeout(LAST_EVENTS, telling.join_next()).await.is_err() {
                tracing::warn!("events not stored in time");
            }
        });
    }
    if tokio::time::timeout(LAST_EVENTS, serving.join_next()).await.is_err() {
        tracing::warn!("http did not end in time");
    }
    tracing::info!(name, "dispatcher stopped");
    result
}

async fn say_goodbye(mut lease: Lease, api: ApiServer) {
    // A standby waits for the lease to stand still where this does not come through.
    match tokio::time::timeout(GOODBYE, lease.release()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = %error, "lease not given up"),
        Err(_) => tracing::warn!("lease not given up in time"),
    }
    if tokio::time::timeout(GOODBYE, api.stop()).await.is_err() {
        tracing::warn!("service not taken down in time");
    }
}

/// Streams and buckets, for as long as it takes: servers that are restarted, or elect a leader, are there later. What is
/// wrong with the configuration stays wrong and is said at once. None: shut down meanwhile.
async fn make_topology(
    nats: &Nats,
    config: &DispatcherConfig,
    shutdown: &CancellationToken,
) -> Result<Option<topology::Report>, DispatcherError> {
    let mut backoff = Backoff::default();
    loop {
        let made = shutdown.run_until_cancelled(topology::ensure(nats, &config.topology)).await;
        match made {
            None => return Ok(None),
            Some(Ok(report)) => return Ok(Some(report)),
            Some(Err(error)) if may_pass(&error) => {
                tracing::warn!(error = %error, "streams and buckets cannot be made now, trying again");
            }
            Some(Err(error)) => return Err(error.into()),
        }
        if shutdown.run_until_cancelled(backoff.wait()).await.is_none() {
            return Ok(None);
        }
    }
}

/// Whether the same may succeed later without anybody changing anything.
fn may_pass(error: &TopologyError) -> bool {
    match error {
        TopologyError::Server(source)
        | TopologyError::Stream { source, .. }
        | TopologyError::Consumer { source, .. } => source.is_transient(),
        _ => false,
    }
}

async fn serve(process: &Process<'_>, lease: &mut Lease, api: &mut ApiServer) -> Result<(), DispatcherError> {
    let &Process { nats, config, name, shutdown, .. } = process;
    while let Some(until) = stand_by(nats, config, lease, api, shutdown).await? {
        tracing::info!(name, "active");
        match active::run(process, lease, until, api).await? {
            Ended::Shutdown => return Ok(()),
            Ended::LeaseLost => tracing::warn!(name, "lease lost, standing by"),
        }
        process.window.close();
    }
    Ok(())
}

/// Waits for the lease; Some: until when it is held. Requests go unanswered here: the active one answers them.
async fn stand_by(
    nats: &Nats,
    config: &DispatcherConfig,
    lease: &mut Lease,
    api: &mut ApiServer,
    shutdown: &CancellationToken,
) -> Result<Option<Instant>, DispatcherError> {
    let ttl = Duration::from_millis(config.lease_ms);
    let mut told = None;
    loop {
        let asked = Instant::now();
        let standing = tokio::select! {
            () = shutdown.cancelled() => return Ok(None),
            standing = lease.renew() => standing,
        };
        match standing {
            Ok(Standing::Leader) => return Ok(Some(asked + ttl)),
            Ok(Standing::Follower { holder }) => {
                if told != Some(holder.clone()) {
                    tracing::info!(holder, "standing by");
                    told = Some(holder);
                }
            }
            Err(KvError::Server(ServerError::Closed)) => return Err(DispatcherError::Closed),
            Err(error) => {
                tracing::warn!(error = %error, "lease not readable, trying again");
                // Its bucket may be gone, and nobody is active to make it again. Not longer than a lease lives: the next
                // look at it must not wait for what is slow to come back.
                let made = tokio::time::timeout(ttl, topology::ensure(nats, &config.topology));
                match shutdown.run_until_cancelled(made).await {
                    None => return Ok(None),
                    Some(Ok(Ok(_))) => {}
                    Some(Ok(Err(error))) => tracing::warn!(error = %error, "streams and buckets not made"),
                    Some(Err(_)) => tracing::warn!("streams and buckets not made in time"),
                }
            }
        }
        let pause = tokio::time::sleep(ttl / 3);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(None),
                () = &mut pause => break,
                call = api.next() => if call.is_none() { return Err(DispatcherError::Closed) },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_waited_for_and_what_is_wrong_is_said() {
        let stream = |source| TopologyError::Stream { stream: "ASR_AUDIO".to_owned(), source };
        assert!(may_pass(&stream(ServerError::Timeout)));
        assert!(may_pass(&TopologyError::Server(ServerError::Timeout)));
        assert!(!may_pass(&stream(ServerError::Closed)));
        assert!(!may_pass(&TopologyError::Config(Vec::new())));
        assert!(!may_pass(&TopologyError::NoJetStream));
    }
}
