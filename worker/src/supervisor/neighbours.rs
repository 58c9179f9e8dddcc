//! Other workers whose heartbeats concern this one: two of a host that go by one name would supersede each other, and two on
//! one device share its memory, from whatever containers they run.

use std::{
    collections::{BTreeSet, HashSet},
    path::Path,
    time::Duration,
};

use tokio::time::{Instant, timeout_at};
use voxfleet_nats::{
    Nats,
    fleet::{FleetError, heartbeats},
};
use voxfleet_schema::{fleet::Heartbeat, id::GpuId};

/// Beyond the time between two heartbeats.
const MARGIN: Duration = Duration::from_millis(200);

/// Who was heard.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Neighbours {
    /// Names that other living processes of this host beat under.
    pub(super) names: HashSet<GpuId>,
    /// Names of workers on our device.
    pub(super) on_device: BTreeSet<GpuId>,
}

impl Neighbours {
    fn add(&mut self, beat: Heartbeat, host: &str, uuid: Option<&str>) {
        let on_device = uuid.is_some() && beat.device.uuid.as_deref() == uuid;
        let of_host = beat.host == host;
        // Containers have process ids of their own: those of another host say nothing here.
        if of_host && !is_another_process(beat.pid) {
            return;
        }
        if on_device {
            self.on_device.insert(beat.gpu_id.clone());
        }
        if of_host {
            self.names.insert(beat.gpu_id);
        }
    }
}

/// Workers of this host, or on the device `uuid`, if they beat as often as we do (`every`). Two that start within this time do
/// not hear each other.
pub(super) async fn listen(nats: &Nats, host: &str, uuid: Option<&str>, every: Duration) -> Neighbours {
    let mut found = Neighbours::default();
    // A worker that starts before its server is there has nobody to hear.
    if !nats.is_connected() {
        return found;
    }
    let end = Instant::now() + every + MARGIN;
    let mut heard = match heartbeats(nats).await {
        Ok(heard) => heard,
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot hear other workers of this host");
            return found;
        }
    };
    loop {
        match timeout_at(end, heard.next()).await {
            Ok(Ok(beat)) => found.add(beat, host, uuid),
            Ok(Err(FleetError::Server(_))) | Err(_) => return found,
            // Whoever sends what cannot be read is told by the dispatcher.
            Ok(Err(_)) => {}
        }
    }
}

/// Of a process that is gone the name is free, although a beat of it may still come.
fn is_another_process(pid: u32) -> bool {
    pid != std::process::id() && Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_of_this_host_or_on_this_device() {
        let beat = |gpu_id: &str, host: &str, pid: u32, uuid: Option<&str>| -> Heartbeat {
            serde_json::from_value(serde_json::json!({
                "gpu_id": gpu_id, "incarnation": "i", "seq": 1, "sent_ms": 0, "host": host, "pid": pid,
                "provider": "local", "slots": {"total": 4, "used": 1}, "job_slots": {"total": 2, "used": 0},
                "device": {"name": "d", "uuid": uuid, "total_mb": 1, "free_mb": 1, "used_mb": 0, "used_by_others_mb": 0},
                "held": [], "models": [], "draining": false, "version": "0",
                "engine": {"state": "ready", "kind": "simulated", "effective_device": "cpu", "vad": "energy",
                    "ms_since_progress": 0, "restarts": 0},
            }))
            .expect("a heartbeat")
        };
        let (me, parent) = (std::process::id(), std::os::unix::process::parent_id());
        let mut found = Neighbours::default();
        for beat in [
            beat("myself", "h", me, Some("GPU-1")),
            beat("dead", "h", 4_194_399, Some("GPU-1")),
            beat("beside", "h", parent, Some("GPU-2")),
            beat("same", "h", parent, Some("GPU-1")),
            beat("container", "c", me, Some("GPU-1")),
            beat("elsewhere", "c", parent, Some("GPU-3")),
        ] {
            found.add(beat, "h", Some("GPU-1"));
        }
        let names =
            |ids: &mut dyn Iterator<Item = &GpuId>| -> BTreeSet<String> { ids.map(ToString::to_string).collect() };
        assert_eq!(names(&mut found.names.iter()), ["beside", "same"].map(str::to_owned).into());
        assert_eq!(names(&mut found.on_device.iter()), ["container", "same"].map(str::to_owned).into());
        let mut on_cpu = Neighbours::default();
        on_cpu.add(beat("same", "c", parent, None), "h", None);
        assert_eq!(on_cpu, Neighbours::default(), "two without a device share none");
    }
}
