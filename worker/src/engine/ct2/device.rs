//! The thread that owns the device: windows of all recognizers of all models wait here and are passed over in batches.
//!
//! It decides nothing: [`schedule`] says what is next. A window leaves when it was heard to its end, failed, or was
//! cancelled; between its passes it waits like any other. That it is waited for, and not stuck, [`pulse`](super::pulse) says.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    pass::{Loaded, Run},
    pulse::{Heart, Pulse},
    schedule::{self, Next, Waiting},
};
use crate::engine::EngineError;

/// How long a batch waits for company. A pass takes tens of milliseconds at least, and what comes meanwhile is in the next.
const COMPANY: Duration = Duration::from_millis(2);
/// Windows that are on their way to the thread; whoever brings one more waits.
const ORDERS: usize = 64;

type Answer = Result<Run, EngineError>;

struct Held {
    run: Run,
    loaded: Arc<Loaded>,
    answer: SyncSender<Answer>,
    /// Gives signs of life while it lives.
    _waits: Heart,
}

impl Held {
    fn waiting(&self) -> Waiting {
        self.run.waiting(self.loaded.id, self.loaded.most())
    }
}

/// The way to the thread, for every model that this process has on the device. The last of them that is dropped ends the
/// thread, once nothing waits.
#[derive(Clone)]
pub struct Ct2Device(Arc<DeviceThread>);

struct DeviceThread {
    orders: Option<SyncSender<Held>>,
    thread: Option<JoinHandle<()>>,
    pulse: Pulse,
}

impl Ct2Device {
    pub fn start() -> io::Result<Self> {
        let (orders, inbox) = sync_channel(ORDERS);
        let pulse = Pulse::start()?;
        let beating = pulse.clone();
        let thread = std::thread::Builder::new().name("ct2-device".to_owned()).spawn(move || {
            let served = catch_unwind(AssertUnwindSafe(|| serve(&inbox, &beating)));
            if served.is_err() {
                // A pass catches its own panics, so this one is ours. Nobody would ever be served again, which a living process
                // hides; its supervisor starts a new one, and nothing is lost.
                tracing::error!("the device thread panicked, the engine ends");
                std::process::abort();
            }
        })?;
        Ok(Self(Arc::new(DeviceThread { orders: Some(orders), thread: Some(thread), pulse })))
    }

    /// Brings a window; what was heard comes through the receiver.
    pub(super) fn bring(&self, loaded: &Arc<Loaded>, run: Run) -> Result<Receiver<Answer>, EngineError> {
        let (answer, heard) = sync_channel(1);
        let held = Held { _waits: self.0.pulse.waits(&run.cancel), run, loaded: loaded.clone(), answer };
        let sent = self.0.orders.as_ref().is_some_and(|orders| orders.send(held).is_ok());
        if sent { Ok(heard) } else { Err(gone()) }
    }
}

pub(super) fn gone() -> EngineError {
    EngineError::Decode("the device thread has ended".to_owned())
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // It never panics: it would have ended the process.
            let _ = thread.join();
        }
    }
}

fn serve(inbox: &Receiver<Held>, pulse: &Pulse) {
    let mut held: Vec<Held> = Vec::new();
    loop {
        held.extend(inbox.try_iter());
        held = held.into_iter().filter_map(still_wanted).collect();
        let waiting: Vec<_> = held.iter().map(Held::waiting).collect();
        let now = Instant::now();
        match schedule::next(&waiting, now, COMPANY) {
            Next::Idle => match inbox.recv() {
                Ok(first) => held.push(first),
                Err(_) => return,
            },
            Next::Wait(until) => match inbox.recv_timeout(until.saturating_duration_since(now)) {
                Ok(more) => held.push(more),
                Err(RecvTimeoutError::Timeout) => {}
                // Nobody else will come; those who wait have their answers' receivers still.
                Err(RecvTimeoutError::Disconnected) => {
                    pass(pulse, &mut held, &(0..waiting.len().min(1)).collect::<Vec<_>>());
                }
            },
            Next::Pass(places) => pass(pulse, &mut held, &places),
        }
    }
}

/// Answers a window that was cancelled, or that has nothing left to hear.
fn still_wanted(held: Held) -> Option<Held> {
    let answer = match &held.run {
        run if run.cancel.is_cancelled() => Err(EngineError::Cancelled),
        run if run.is_over() => Ok(held.run),
        _ => return Some(held),
    };
    // Whoever asked may have gone.
    let _ = held.answer.send(answer);
    None
}

fn pass(pulse: &Pulse, held: &mut Vec<Held>, places: &[usize]) {
    let (mut batch, mut kept) = (Vec::new(), Vec::new());
    let mut left = Vec::new();
    for (place, Held { run, loaded, answer, _waits }) in held.drain(..).enumerate() {
        if places.contains(&place) {
            batch.push(run);
            kept.push((loaded, answer, _waits));
        } else {
            left.push(Held { run, loaded, answer, _waits });
        }
    }
    let Some((loaded, ..)) = kept.first() else { return };
    let passed = loaded.pass_or_fail(&mut batch, pulse);
    for ((run, (loaded, answer, _waits)), passed) in batch.into_iter().zip(kept).zip(passed) {
        match passed {
            Ok(()) => left.push(Held { run, loaded, answer, _waits }),
            Err(error) => drop(answer.send(Err(error))),
        }
    }
    *held = left;
}
