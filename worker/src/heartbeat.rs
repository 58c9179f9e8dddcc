//! The heartbeat: each second, and at once on news that others wait for, from a task of its own that waits for nobody.
//!
//! Everything in it is read from shared figures; the device is sampled elsewhere, because a driver may block.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{Nats, fleet::heartbeat_publish};
use voxfleet_schema::{
    fleet::{Device, Heartbeat, Provider},
    id::{GpuId, Incarnation},
};

use crate::{
    device::{self, Ours, Probe},
    lifecycle::Engine,
    measures::Measures,
    session::unix_ms,
    stock::Stock,
    supervisor::{
        holdings::{Holdings, Snapshot},
        relief::Relief,
    },
};

/// How often the device is sampled.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// A driver that has not answered for so long hangs; one that resets a card takes seconds.
const HANGS: Duration = Duration::from_secs(5);
/// Between a heartbeat and one that only brings news: many sessions moved at once make few of them.
const NEWS_GAP: Duration = Duration::from_millis(50);

/// Beats go on for so long without the main connection: it is usually back at once, on another server.
const WITHOUT_MAIN: Duration = Duration::from_secs(10);

/// An incarnation's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) incarnation: Incarnation,
    /// Unix time in ms.
    pub(crate) since_ms: u64,
}

impl Named {
    pub(crate) fn now(incarnation: Incarnation) -> Self {
        Self { incarnation, since_ms: unix_ms() }
    }
}

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
    pub(crate) name: watch::Receiver<Named>,
    pub(crate) device: watch::Receiver<Device>,
    pub(crate) engine: Engine,
    pub(crate) holdings: Arc<Holdings>,
    pub(crate) relief: Arc<Relief>,
    pub(crate) stock: Stock,
    pub(crate) measures: Measures,
    pub(crate) news: Arc<Notify>,
    pub(crate) every: Duration,
    /// Each as it was sent, for whoever asks this process over HTTP.
    pub(crate) told: watch::Sender<Option<Arc<Heartbeat>>>,
}

impl Sources {
    fn heartbeat(&self, name: &Named, seq: u64, now: Instant) -> Heartbeat {
        let Snapshot { slots, job_slots, mut held, given_up, drain } = self.holdings.snapshot(now);
        for held in &mut held {
            let known = self.engine.suspected(held.kind, &held.id);
            (held.suspect, held.crashes) = (known.suspect, known.crashes);
            held.suspect_from = known.from;
            held.elsewhere = known.elsewhere || self.relief.asks_elsewhere(held.kind, &held.id);
        }
        let (engine, mut models) = self.engine.heartbeat_state(now);
        self.measures.overlay(&mut models);
        self.stock.overlay(&mut models);
        let identity = &self.identity;
        Heartbeat {
            gpu_id: identity.gpu_id.clone(),
            incarnation: name.incarnation.clone(),
            seq,
            sent_ms: unix_ms(),
            started_ms: name.since_ms,
            beat_ms: self.every.as_millis() as u32,
            host: identity.host.clone(),
            pid: std::process::id(),
            provider: identity.provider,
            device: Device { pressure: self.relief.level(), ..self.device.borrow().clone() },
            slots,
            job_slots,
            held,
            given_up,
            models,
            default_model: Some(self.engine.default_model().to_owned()).filter(|name| !name.is_empty()),
            engine,
            draining: drain.is_some(),
            drain,
            price_per_hour: identity.price_per_hour,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// Beats on `own` until `stop`, then once more: whoever listens sees what is still held. Without the connection that carries
/// the work, `main`, it falls silent after a while: beats are no use to anybody whose sessions stand still.
pub(crate) async fn run(own: Nats, main: Nats, mut sources: Sources, stop: CancellationToken) {
    let news = Arc::clone(&sources.news);
    let every = sources.every;
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut current = sources.name.borrow_and_update().clone();
    let mut seq = 0;
    let mut beaten_at: Option<Instant> = None;
    let mut main_at = Instant::now();
    loop {
        let last = tokio::select! {
            () = stop.cancelled() => true,
            _ = ticks.tick() => false,
            // A new name is announced at once.
            Ok(()) = sources.name.changed() => false,
            () = async {
                news.notified().await;
                if let Some(at) = beaten_at {
                    sleep_until(at + NEWS_GAP).await;
                }
            } => false,
        };
        let name = sources.name.borrow_and_update().clone();
        if name != current {
            (current, seq) = (name, 0);
        }
        if main.is_connected() {
            main_at = Instant::now();
        }
        // Beats that wait in a disconnected client would all be sent later, as if they were fresh.
        if own.is_connected() && main_at.elapsed() < WITHOUT_MAIN {
            let heartbeat = sources.heartbeat(&current, seq, Instant::now());
            seq += 1;
            match timeout(every, heartbeat_publish(&own, &heartbeat)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "heartbeat not sent"),
                Err(_) => tracing::warn!("heartbeat not sent within its time"),
            }
            beaten_at = Some(Instant::now());
            sources.told.send_replace(Some(Arc::new(heartbeat)));
        }
        if last {
            break;
        }
    }
}

/// Samples the device each second on a blocking thread. A sampler that panics takes this task with it: a worker whose figures
/// stand still is of no use.
pub(crate) async fn sample_device(
    mut probe: Probe,
    engine: Engine,
    figures: watch::Sender<Device>,
    stop: CancellationToken,
) {
    let mut ticks = interval(SAMPLE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ticks.tick() => {}
        }
        // On the CPU it takes nothing of a GPU.
        let resident_mb = if engine.is_on_side(true) { 0 } else { engine.models_mb() };
        let ours = engine.pid().map(|pid| Ours { pid, expected_mb: engine.expected_mb(), resident_mb });
        let mut sampling = tokio::task::spawn_blocking(move || {
            let device = probe.sample(ours);
            (probe, device)
        });
        let begun = Instant::now();
        let mut told = false;
        let sampled = loop {
            tokio::select! {
                // A blocked driver must not hold up the stop.
                () = stop.cancelled() => return,
                sampled = &mut sampling => break sampled,
                () = sleep_until(begun + HANGS), if !told => {
                    told = true;
                    tracing::error!(waited_ms = HANGS.as_millis() as u64, "the driver does not answer");
                    figures.send_modify(|device| device.trouble = Some(device::hangs(HANGS)));
                }
            }
        };
        match sampled {
            Ok((back, device)) => {
                probe = back;
                figures.send_replace(device);
            }
            Err(error) => match error.try_into_panic() {
                Ok(panicked) => std::panic::resume_unwind(panicked),
                // The runtime is ending, and everything with it.
                Err(_) => return,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn a_sampler_that_panics_does_not_end_in_silence() {
        let (engine, _figures) = crate::lifecycle::tests::engine(&["small"], true);
        let (figures, _device) = watch::channel(Device::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(sample_device(Probe::that_panics(), engine, figures, CancellationToken::new()));
        let ended = tasks.join_next().await.expect("it ends");
        assert!(ended.is_err_and(|error| error.is_panic()));
    }
}
