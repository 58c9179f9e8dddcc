//! What the loop of an active dispatcher lets others in this process see: a copy, once a tick, while somebody looks.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch;
use voxfleet_schema::{fleet::FleetStatus, session::SessionSummary};

/// The fleet as the loop believed it to be at one moment.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) fleet: FleetStatus,
    pub(crate) sessions: Vec<SessionSummary>,
}

/// Clones look through the same window.
#[derive(Debug, Clone)]
pub(crate) struct Window {
    shown: Arc<watch::Sender<Option<Arc<Snapshot>>>>,
    wanted_until: Arc<Mutex<Option<Instant>>>,
    active: Arc<AtomicBool>,
}

impl Window {
    pub(crate) fn new() -> Self {
        Self { shown: Arc::new(watch::Sender::new(None)), wanted_until: Arc::default(), active: Arc::default() }
    }

    /// This process decides from now on, and shows what it believes.
    pub(crate) fn open(&self) {
        self.active.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_open(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Somebody will look for this long: copies cost, and mostly nobody does.
    pub(crate) fn want(&self, lasting: Duration) {
        if let Ok(mut until) = self.wanted_until.lock() {
            *until = (*until).max(Some(Instant::now() + lasting));
        }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted_until.lock().is_ok_and(|until| until.is_some_and(|until| Instant::now() < until))
    }

    pub(crate) fn show(&self, fleet: FleetStatus, sessions: Vec<SessionSummary>) {
        self.shown.send_replace(Some(Arc::new(Snapshot { fleet, sessions })));
    }

    /// This process is no longer active: what it believed is nobody's business.
    pub(crate) fn close(&self) {
        self.active.store(false, Ordering::Relaxed);
        self.shown.send_replace(None);
    }

    pub(crate) fn look(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.shown.subscribe()
    }
}
