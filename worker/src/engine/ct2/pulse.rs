//! Signs of life for windows that wait for the device.
//!
//! The library is not looked into: while it is in a call nobody else can say that the windows of the batch move, and those that
//! wait behind it are not looked at either. A slow call is not a hang, and on a slow CPU a call of a large model takes longer
//! than a supervisor waits. So each call is given as long as its model may need for it, by what it took when it was loaded; as
//! long as that lasts, a thread of its own looks at all windows. Beyond it there is silence, and the supervisor does what it does.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use crate::engine::{Cancel, whisper::context::Context};

/// Far less than a decode may be silent before it counts as standing still.
const EVERY: Duration = Duration::from_millis(250);
/// A text as long as a window can have, on a machine that others use, takes so many times what silence took.
const SLOWER: u32 = 8;

/// However slow the machine was when the model was loaded: a hang is found some time.
const LONGEST: Duration = Duration::from_secs(120);

/// How long a pass over so many positions of the encoder may take, where one of silence in the full context took `silence` when
/// the model was loaded.
pub(super) fn patience(silence: Duration, positions: usize) -> Duration {
    let all = silence.saturating_mul(SLOWER).saturating_mul(u32::try_from(positions).unwrap_or(u32::MAX));
    (all / Context::Full.positions(0).max(1) as u32).min(LONGEST)
}

#[derive(Default)]
struct State {
    windows: HashMap<u64, Cancel>,
    brought: u64,
    /// Until when the call that runs now is only slow.
    until: Option<Instant>,
    over: bool,
}

impl State {
    /// Whether it has looked at all windows: only while a call runs that may still be only slow.
    fn beat(&self, now: Instant) -> bool {
        let slow = self.until.is_some_and(|until| now < until);
        if slow {
            self.windows.values().for_each(|cancel| _ = cancel.is_cancelled());
        }
        slow
    }
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds it can panic half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread ends with the last of these.
#[derive(Clone)]
pub(super) struct Pulse(Arc<Beating>);

struct Beating(Arc<Inner>);

impl Drop for Beating {
    fn drop(&mut self) {
        self.0.state().over = true;
        self.0.changed.notify_all();
    }
}

/// A window that waits.
pub(super) struct Heart {
    id: u64,
    inner: Weak<Inner>,
}

impl Drop for Heart {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.upgrade() {
            inner.state().windows.remove(&self.id);
        }
    }
}

/// A call that runs.
pub(super) struct Slow<'a>(&'a Inner);

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        self.0.state().until = None;
    }
}

impl Pulse {
    pub(super) fn start() -> io::Result<Self> {
        let inner = Arc::new(Inner::default());
        let beats = inner.clone();
        std::thread::Builder::new().name("ct2-pulse".to_owned()).spawn(move || beat(&beats))?;
        Ok(Self(Arc::new(Beating(inner))))
    }

    /// From now on it is looked at.
    pub(super) fn waits(&self, cancel: &Cancel) -> Heart {
        let mut state = self.0.0.state();
        state.brought += 1;
        let id = state.brought;
        state.windows.insert(id, cancel.clone());
        Heart { id, inner: Arc::downgrade(&self.0.0) }
    }

    /// A call begins that may take so long.
    pub(super) fn slow(&self, patience: Duration) -> Slow<'_> {
        self.0.0.state().until = Instant::now().checked_add(patience);
        self.0.0.changed.notify_all();
        Slow(&self.0.0)
    }
}

fn beat(inner: &Inner) {
    let mut state = inner.state();
    while !state.over {
        state = if state.beat(Instant::now()) {
            inner.changed.wait_timeout(state, EVERY).unwrap_or_else(PoisonError::into_inner).0
        } else {
            inner.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_as_long_as_its_model_needs() {
        let ms = Duration::from_millis;
        assert_eq!(patience(ms(300), 1_500), ms(2_400));
        assert_eq!(patience(ms(300), 4 * 1_500), ms(9_600));
        assert_eq!(patience(ms(300), 2 * 750), ms(2_400));
        assert_eq!(patience(ms(20_000), 1_500), ms(120_000));
        assert_eq!(patience(Duration::MAX, usize::MAX), LONGEST);
    }

    #[test]
    fn a_slow_call_gives_signs_and_one_that_hangs_does_not() {
        let begin = Instant::now();
        let (waits, gone) = (Cancel::default(), Cancel::default());
        let mut state = State { until: Some(begin + Duration::from_secs(20)), ..State::default() };
        state.windows.extend([(1, waits.clone()), (2, gone.clone())]);
        for (seconds, looks) in [(0, 1), (19, 2), (20, 2), (60, 2)] {
            state.beat(begin + Duration::from_secs(seconds));
            assert_eq!((waits.looks(), gone.looks()), (looks, looks), "after {seconds} s");
        }
        state.until = None;
        assert!(!state.beat(begin));
    }

    #[test]
    fn it_looks_at_those_that_wait_as_long_as_they_wait() {
        let pulse = Pulse::start().expect("thread");
        let (waits, leaves) = (Cancel::default(), Cancel::default());
        let (_heart, leaving) = (pulse.waits(&waits), pulse.waits(&leaves));
        drop(leaving);
        let looked = || {
            let until = Instant::now() + Duration::from_secs(20);
            let before = waits.looks();
            while waits.looks() < before + 2 && Instant::now() < until {
                std::thread::yield_now();
            }
            waits.looks() >= before + 2
        };
        let call = pulse.slow(Duration::from_secs(600));
        assert!(looked());
        drop(call);
        assert_eq!(leaves.looks(), 0);
        let inner = Arc::downgrade(&pulse.0.0);
        drop(pulse);
        // Its thread ends with it.
        let until = Instant::now() + Duration::from_secs(20);
        while inner.strong_count() > 0 && Instant::now() < until {
            std::thread::yield_now();
        }
        assert_eq!(inner.strong_count(), 0);
    }
}
