//! The thread that listens to a window while its decode thread decodes it.
//!
//! It opens its networks at its first window and keeps them. The decode thread waits for it as long as the window allows;
//! what comes later goes to the engine's loop by itself, under the name of its session and final.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant},
};

use super::{DiarizeConfig, Heard, Hearing, Listened, Listener};
use crate::engine::Cancel;

/// Windows that wait here when a thread decodes faster than it listens. Beyond them, words go out without speakers.
const WAITING: usize = 16;
/// How often a decode thread that waits shows that it lives.
const LOOK: Duration = Duration::from_millis(100);

/// What was heard too late to go with its words.
pub struct HeardLate {
    pub handle: u64,
    pub index: u64,
    pub heard: Result<Heard, String>,
}

/// Where an answer is left: the decode thread takes it, or has gone on without it.
#[derive(Default)]
struct Slot {
    answer: Mutex<(Option<Result<Heard, String>>, bool)>,
    there: Condvar,
}

struct Order {
    handle: u64,
    hearing: Hearing,
    cancel: Cancel,
    slot: Arc<Slot>,
}

/// A decode thread's side.
pub(in crate::engine) struct Ears {
    orders: SyncSender<Order>,
}

/// An answer on its way.
pub(in crate::engine) struct Listening {
    slot: Result<Arc<Slot>, String>,
    /// What there was no room for yet: who is patient asks again.
    waiting: Option<(Order, SyncSender<Order>)>,
    patient: bool,
    waited_ms: u64,
    /// Of the decode that waits, and of the listener.
    decode: Cancel,
    listener: Cancel,
}

/// An answer that was not waited for. It goes its own way once this is dropped, and not before: whoever hands this on does it
/// first, so that no answer comes before the final that it belongs to.
#[derive(Clone)]
pub struct Late {
    slot: Option<Arc<Slot>>,
    flag: Cancel,
}

impl std::fmt::Debug for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Late").field("flag", &self.flag).finish_non_exhaustive()
    }
}

impl From<Cancel> for Late {
    fn from(flag: Cancel) -> Self {
        Self { slot: None, flag }
    }
}

impl Late {
    /// As long as somebody looks at this, it is on its way; nobody has while it waits for its turn.
    pub fn flag(&self) -> &Cancel {
        &self.flag
    }

    /// Splits off what lets the answer go.
    pub(in crate::engine) fn hold(&mut self) -> Option<Held> {
        self.slot.take().map(Held)
    }
}

/// Keeps an answer back until it is dropped.
pub(in crate::engine) struct Held(Arc<Slot>);

impl Drop for Held {
    fn drop(&mut self) {
        let mut answer = self.0.answer.lock().unwrap_or_else(PoisonError::into_inner);
        answer.1 = true;
        self.0.there.notify_all();
    }
}

impl Ears {
    /// Ends when this is dropped.
    pub(in crate::engine) fn start<E>(
        name: String,
        config: DiarizeConfig,
        onnxruntime: Option<PathBuf>,
        late: SyncSender<E>,
    ) -> std::io::Result<Self>
    where
        E: From<HeardLate> + Send + 'static,
    {
        let (orders, queue) = sync_channel(WAITING);
        std::thread::Builder::new().name(name).spawn(move || listen(&config, onnxruntime.as_deref(), &queue, &late))?;
        Ok(Self { orders })
    }

    pub(in crate::engine) fn begin(&self, handle: u64, hearing: Hearing, decode: Cancel) -> Listening {
        let (slot, patient, waited_ms) = (Arc::<Slot>::default(), hearing.patient, hearing.waited_ms);
        let listener = Cancel::default();
        let order = Order { handle, hearing, cancel: listener.clone(), slot: Arc::clone(&slot) };
        let (slot, waiting) = match self.orders.try_send(order) {
            Ok(()) => (Ok(slot), None),
            Err(TrySendError::Full(order)) if patient => (Ok(slot), Some((order, self.orders.clone()))),
            Err(_) => (Err("voices are listened to more slowly than words".to_owned()), None),
        };
        Listening { slot, waiting, patient, waited_ms, decode, listener }
    }
}

impl Ears {
    /// Listens to what no decode waits for: the answer goes its own way. Gives it back where too much waits already.
    pub(in crate::engine) fn listen(&self, handle: u64, hearing: Hearing) -> Result<Cancel, Box<Hearing>> {
        let (slot, cancel) = (Arc::<Slot>::default(), Cancel::default());
        slot.answer.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        match self.orders.try_send(Order { handle, hearing, cancel: cancel.clone(), slot }) {
            Ok(()) => Ok(cancel),
            Err(TrySendError::Full(order) | TrySendError::Disconnected(order)) => Err(Box::new(order.hearing)),
        }
    }
}

impl Listening {
    /// Waits as long as words may wait behind a decode of this length.
    pub(in crate::engine) fn wait(mut self, decode: Duration) -> Listened {
        let slot = match self.slot {
            Ok(slot) => slot,
            Err(why) => return Listened::Heard(Err(why)),
        };
        let patience = (Duration::from_millis(self.waited_ms) + decode) / 10;
        let until = (!self.patient).then(|| Instant::now() + patience);
        let mut looks = self.listener.looks();
        let mut answer = slot.answer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match self.waiting.take().map(|(order, orders)| (orders.try_send(order), orders)) {
                Some((Err(TrySendError::Full(order)), orders)) => {
                    // The decode waits, and that is no standing still.
                    let _ = self.decode.is_cancelled();
                    self.waiting = Some((order, orders));
                }
                Some((Err(TrySendError::Disconnected(_)), _)) => {
                    return Listened::Heard(Err("nobody listens any more".to_owned()));
                }
                Some((Ok(()), _)) | None => {}
            }
            if let Some(heard) = answer.0.take() {
                slot.there.notify_all();
                return Listened::Heard(heard);
            }
            if self.decode.was_cancelled() {
                self.listener.cancel();
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) || self.decode.was_cancelled() {
                drop(answer);
                return Listened::Late(Late { slot: Some(slot), flag: self.listener });
            }
            // A listener that hangs must not look like a decode that moves.
            if std::mem::replace(&mut looks, self.listener.looks()) != looks {
                let _ = self.decode.is_cancelled();
            }
            let next = left.map_or(LOOK, |left| left.min(LOOK));
            answer = slot.there.wait_timeout(answer, next).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn listen<E: From<HeardLate>>(
    config: &DiarizeConfig,
    onnxruntime: Option<&std::path::Path>,
    orders: &Receiver<Order>,
    late: &SyncSender<E>,
) {
    let mut listener: Option<Listener> = None;
    while let Ok(Order { handle, hearing, cancel, slot }) = orders.recv() {
        let index = hearing.index;
        let heard = catch_unwind(AssertUnwindSafe(|| {
            let listener = match &mut listener {
                Some(listener) => listener,
                none => none.insert(Listener::open(config, onnxruntime)?),
            };
            listener.hear(&hearing, &cancel)
        }));
        let heard = heard.unwrap_or_else(|_| Err("the listener panicked".to_owned()));
        let mut answer = slot.answer.lock().unwrap_or_else(PoisonError::into_inner);
        let then = Instant::now() + Duration::from_millis(config.later_ms);
        while Instant::now() < then && !cancel.is_cancelled() {
            let left = then.saturating_duration_since(Instant::now()).min(LOOK);
            answer = slot.there.wait_timeout(answer, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        answer.0 = Some(heard);
        slot.there.notify_all();
        // Whoever waits takes it, or lets it go.
        while answer.0.is_some() && !answer.1 {
            answer = slot.there.wait(answer).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(heard) = answer.0.take() {
            drop(answer);
            if late.send(HeardLate { handle, index, heard }.into()).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::{
            Purpose, Window,
            pool::{Done, Job, Loaded, Model, Pool},
            simulated::SimulatedModel,
        },
        ipc::{EngineConfig, EngineKind, SimulatedConfig},
    };

    /// Longer than anything here takes.
    const PATIENCE: Duration = Duration::from_secs(30);
    /// For an answer that must not come.
    const HELD_MS: u64 = 400;

    #[derive(Debug, PartialEq, Eq)]
    enum Came {
        Final { late: bool },
        Late { index: u64 },
        Loaded,
    }

    /// Says that an answer has gone its own way.
    static GONE: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

    impl From<Done> for Came {
        /// Between a final's text and the moment at which the loop hears of it: an answer may be there long since.
        fn from(done: Done) -> Self {
            let gone = GONE.0.lock().expect("no panic");
            let until = Duration::from_millis(HELD_MS);
            let _waited = GONE.1.wait_timeout_while(gone, until, |gone| !*gone).expect("no panic");
            Came::Final { late: matches!(done.listened, Listened::Late(_)) }
        }
    }

    impl From<HeardLate> for Came {
        fn from(late: HeardLate) -> Self {
            *GONE.0.lock().expect("no panic") = true;
            GONE.1.notify_all();
            Came::Late { index: late.index }
        }
    }

    impl From<Loaded> for Came {
        fn from(_: Loaded) -> Self {
            Came::Loaded
        }
    }

    #[test]
    fn a_late_answer_never_comes_before_its_final() {
        let simulated = SimulatedConfig { speed: 0.0, ..SimulatedConfig::default() };
        // It cannot listen at all, and says so a little later than the words.
        let diarize = DiarizeConfig { later_ms: HELD_MS / 4, ..DiarizeConfig::default() };
        let config = EngineConfig {
            engine: EngineKind::Simulated,
            models: Vec::new(),
            default_model: "simulated".to_owned(),
            silero_model: None,
            onnxruntime: None,
            decode_states: 1,
            decode_threads: 1,
            use_gpu: false,
            reserve_mb: 0,
            turns: None,
            diarize,
            ct2: Default::default(),
            simulated: simulated.clone(),
        };
        let (events, inbox) = sync_channel::<Came>(4);
        let mut pool = Pool::start(&config, &events).expect("threads");
        let model = SimulatedModel::load("simulated", &simulated).expect("a model");
        let (index, samples) = (7, vec![0.1; 16_000]);
        let hearing = Hearing {
            index,
            samples: samples.clone(),
            from_sample: 0,
            speech: Vec::new(),
            patient: false,
            waited_ms: 0,
        };
        let window = Window {
            samples,
            from_sample: 0,
            purpose: Purpose::Final,
            prompt: String::new(),
            language: None,
            task: Default::default(),
            hearing: Some(Box::new(hearing)),
            background: false,
            cancel: Cancel::default(),
        };
        let job = Job { handle: 1, part: 0, model: Model::Simulated(model), window, ready_at: Instant::now() };
        assert!(pool.decode(Box::new(job)).is_ok());
        let came = [(); 2].map(|()| inbox.recv_timeout(PATIENCE).expect("an event"));
        assert_eq!(came, [Came::Final { late: true }, Came::Late { index }]);
        // What nobody waits for comes by itself.
        let hearing = Hearing {
            index: 8,
            samples: vec![0.1; 160],
            from_sample: 0,
            speech: Vec::new(),
            patient: false,
            waited_ms: 0,
        };
        assert!(pool.listen(1, hearing).is_ok());
        assert_eq!(inbox.recv_timeout(PATIENCE), Ok(Came::Late { index: 8 }));
    }
}
