//! The heartbeat: each second, from a task of its own that waits for nobody.
//!
//! Everything in it is read from shared figures; the device is sampled elsewhere, because a driver may block.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{Nats, fleet::heartbeat_publish};
use voxfleet_schema::{
    fleet::{Device, Heartbeat, Provider},
    id::{GpuId, Incarnation},
};

use crate::{
    device::Probe,
    lifecycle::Engine,
    session::unix_ms,
    supervisor::holdings::{Holdings, Snapshot},
};

const EVERY: Duration = Duration::from_secs(1);

/// What never changes in a worker's heartbeats.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) gpu_id: GpuId,
    pub(crate) host: String,
    pub(crate) provider: Provider,
    pub(crate) price_per_hour: Option<f64>,
}

/// What it is read from.
#[derive(Debug, Clone)]
pub(crate) struct Sources {
    pub(crate) identity: Identity,
    pub(crate) incarnation: watch::Receiver<Incarnation>,
    pub(crate) device: watch::Receiver<Device>,
    pub(crate) engine: Engine,
    pub(crate) holdings: Arc<Holdings>,
}

impl Sources {
    fn heartbeat(&self, incarnation: Incarnation, seq: u64, now: Instant) -> Heartbeat {
        let Snapshot { slots, job_slots, held, given_up, draining } = self.holdings.snapshot(now);
        let (engine, models) = self.engine.heartbeat_state(now);
        let identity = &self.identity;
        Heartbeat {
            gpu_id: identity.gpu_id.clone(),
            incarnation,
            seq,
            sent_ms: unix_ms(),
            started_ms: 0,
            beat_ms: 0,
            host: identity.host.clone(),
            pid: std::process::id(),
            provider: identity.provider,
            device: self.device.borrow().clone(),
            slots,
            job_slots,
            held,
            given_up,
            models,
            engine,
            draining,
            drain: None,
            price_per_hour: identity.price_per_hour,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// Beats until `stop`, then once more: whoever listens sees what is still held.
pub(crate) async fn run(nats: Nats, mut sources: Sources, stop: CancellationToken) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut current = sources.incarnation.borrow_and_update().clone();
    let mut seq = 0;
    loop {
        let last = tokio::select! {
            () = stop.cancelled() => true,
            _ = ticks.tick() => false,
            // A new name is announced at once.
            Ok(()) = sources.incarnation.changed() => false,
        };
        let incarnation = sources.incarnation.borrow_and_update().clone();
        if incarnation != current {
            (current, seq) = (incarnation, 0);
        }
        // Beats that wait in a disconnected client would all be sent later, as if they were fresh.
        if nats.is_connected() {
            let heartbeat = sources.heartbeat(current.clone(), seq, Instant::now());
            seq += 1;
            match timeout(EVERY, heartbeat_publish(&nats, &heartbeat)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "heartbeat not sent"),
                Err(_) => tracing::warn!("heartbeat not sent within a second"),
            }
        }
        if last {
            break;
        }
    }
}

/// Samples the device each second on a blocking thread.
pub(crate) async fn sample_device(
    mut probe: Probe,
    engine: Engine,
    figures: watch::Sender<Device>,
    stop: CancellationToken,
) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ticks.tick() => {}
        }
        let pid = engine.pid();
        let sampled = tokio::task::spawn_blocking(move || {
            let device = probe.sample(pid);
            (probe, device)
        });
        let sampled = tokio::select! {
            // A blocked driver must not hold up the stop.
            () = stop.cancelled() => break,
            sampled = sampled => sampled,
        };
        match sampled {
            Ok((back, device)) => {
                probe = back;
                figures.send_replace(device);
            }
            Err(error) => {
                tracing::error!(%error, "device sampling ended");
                break;
            }
        }
    }
}
