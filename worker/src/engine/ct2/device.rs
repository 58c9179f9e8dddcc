//! The thread that owns the device: windows of all recognizers of a model wait here and are passed over in batches.
//!
//! It decides nothing: [`schedule`] says what is next. A window leaves when it was heard to its end, failed, or was
//! cancelled; between its passes it waits like any other.

use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    pass::{Loaded, Run},
    schedule::{self, Next},
};
use crate::engine::EngineError;

/// How long a batch waits for company. A pass takes tens of milliseconds at least, and what comes meanwhile is in the next.
const COMPANY: Duration = Duration::from_millis(2);
/// Windows that are on their way to the thread; whoever brings one more waits.
const ORDERS: usize = 64;

type Answer = Result<Run, EngineError>;

struct Held {
    run: Run,
    answer: SyncSender<Answer>,
}

/// The way to the thread. Dropping it ends the thread, once nothing waits.
pub(super) struct DeviceThread {
    orders: Option<SyncSender<Held>>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    pub(super) fn start(loaded: &Arc<Loaded>) -> io::Result<Self> {
        let (orders, inbox) = sync_channel(ORDERS);
        let loaded = loaded.clone();
        let thread = std::thread::Builder::new().name("ct2-device".to_owned()).spawn(move || serve(&loaded, &inbox))?;
        Ok(Self { orders: Some(orders), thread: Some(thread) })
    }

    /// Brings a window; what was heard comes through the receiver.
    pub(super) fn bring(&self, run: Run) -> Result<Receiver<Answer>, EngineError> {
        let (answer, heard) = sync_channel(1);
        let sent = self.orders.as_ref().is_some_and(|orders| orders.send(Held { run, answer }).is_ok());
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
            // It catches what panics in a pass; if it panicked elsewhere, its windows were answered by that.
            let _ = thread.join();
        }
    }
}

fn serve(loaded: &Loaded, inbox: &Receiver<Held>) {
    let mut held: Vec<Held> = Vec::new();
    loop {
        held.extend(inbox.try_iter());
        held = held.into_iter().filter_map(still_wanted).collect();
        let waiting: Vec<_> = held.iter().map(|held| held.run.waiting()).collect();
        let now = Instant::now();
        match schedule::next(&waiting, now, loaded.most(), COMPANY) {
            Next::Idle => match inbox.recv() {
                Ok(first) => held.push(first),
                Err(_) => return,
            },
            Next::Wait(until) => match inbox.recv_timeout(until.saturating_duration_since(now)) {
                Ok(more) => held.push(more),
                Err(RecvTimeoutError::Timeout) => {}
                // Nobody else will come; those who wait have their answers' receivers still.
                Err(RecvTimeoutError::Disconnected) => {
                    pass(loaded, &mut held, &(0..waiting.len().min(1)).collect::<Vec<_>>());
                }
            },
            Next::Pass(places) => pass(loaded, &mut held, &places),
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

fn pass(loaded: &Loaded, held: &mut Vec<Held>, places: &[usize]) {
    let (mut batch, mut answers) = (Vec::new(), Vec::new());
    let mut left = Vec::new();
    for (place, Held { run, answer }) in held.drain(..).enumerate() {
        if places.contains(&place) {
            batch.push(run);
            answers.push(answer);
        } else {
            left.push(Held { run, answer });
        }
    }
    let passed = loaded.pass_or_fail(&mut batch);
    for ((run, answer), passed) in batch.into_iter().zip(answers).zip(passed) {
        match passed {
            Ok(()) => left.push(Held { run, answer }),
            Err(error) => drop(answer.send(Err(error))),
        }
    }
    *held = left;
}
