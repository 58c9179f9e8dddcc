//! Other workers of this host: two that go by one name would supersede each other.

use std::{collections::HashSet, path::Path, time::Duration};

use tokio::time::{Instant, timeout_at};
use voxfleet_nats::{
    Nats,
    fleet::{FleetError, heartbeats},
};
use voxfleet_schema::{fleet::Heartbeat, id::GpuId};

/// Beyond the time between two heartbeats.
const MARGIN: Duration = Duration::from_millis(200);

/// Names that other living processes of this host beat under, if they beat as often as we do (`every`). Two that start within
/// this time do not hear each other.
pub(super) async fn names_taken(nats: &Nats, host: &str, every: Duration) -> HashSet<GpuId> {
    let mut taken = HashSet::new();
    // A worker that starts before its server is there has nobody to hear.
    if !nats.is_connected() {
        return taken;
    }
    let end = Instant::now() + every + MARGIN;
    let mut heard = match heartbeats(nats).await {
        Ok(heard) => heard,
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot hear other workers of this host");
            return taken;
        }
    };
    loop {
        match timeout_at(end, heard.next()).await {
            Ok(Ok(beat)) if is_neighbour(&beat, host) => {
                taken.insert(beat.gpu_id);
            }
            Ok(Ok(_)) => {}
            Ok(Err(FleetError::Server(_))) | Err(_) => return taken,
            // Whoever sends what cannot be read is told by the dispatcher.
            Ok(Err(_)) => {}
        }
    }
}

fn is_neighbour(beat: &Heartbeat, host: &str) -> bool {
    // Of a process that is gone the name is free, although a beat of it may still come.
    beat.host == host && beat.pid != std::process::id() && Path::new(&format!("/proc/{}", beat.pid)).exists()
}
