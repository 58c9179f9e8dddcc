//! Errors that the driver reports of a card (XID), gathered between two samples without waiting for any.
//!
//! The library keeps the events of a set until somebody fetches them. A set belongs to one copy of the library and goes with it.
//! Cards and drivers without such events are as good as any other, there is only nothing to gather. The number of an event is
//! that of the last error the driver has seen: of several in one second, all may carry the last one's.

use std::{ffi::c_void, mem::ManuallyDrop, ptr::NonNull};

use nvml_wrapper::{
    Device as Handle, EventSet, Nvml, bitmasks::event::EventTypes, enums::event::XidError, error::NvmlErrorWithSource,
};
use voxfleet_schema::device::Xids;

/// More than so many in one second are looked at in the next.
const MOST_AT_ONCE: usize = 64;
/// What the library calls an error that it does not know.
const UNKNOWN: u64 = 999;

/// The library, and what it is to gather.
pub(super) struct Library {
    pub(super) nvml: Nvml,
    /// Made by `nvml`, and freed before it.
    set: Option<NonNull<c_void>>,
}

// SAFETY: the library may be called from any thread, and a set by one at a time, which exclusive access through `&mut` is.
unsafe impl Send for Library {}

impl Library {
    pub(super) fn new(nvml: Nvml) -> Self {
        Self { nvml, set: None }
    }

    /// From now on errors of this card are gathered, where that is supported.
    pub(super) fn watch(mut self, find: impl for<'n> Fn(&'n Nvml) -> Option<Handle<'n>>) -> Self {
        let set = find(&self.nvml).and_then(|card| {
            let types = card.supported_event_types().ok()?;
            if !types.contains(EventTypes::CRITICAL_XID_ERROR) {
                return None;
            }
            let begun = self.nvml.create_event_set().map_err(NvmlErrorWithSource::from);
            match begun.and_then(|set| card.register_events(EventTypes::CRITICAL_XID_ERROR, set)) {
                Ok(set) => {
                    let set = ManuallyDrop::new(set);
                    // SAFETY: the handle is made a set again by `set`, one at a time, and freed once, by `drop`.
                    NonNull::new(unsafe { set.handle() }.cast())
                }
                Err(error) => {
                    tracing::info!(%error, "errors of this card are not told as they happen");
                    None
                }
            }
        });
        self.set = set;
        self
    }

    fn held(&self, handle: NonNull<c_void>) -> EventSet<'_> {
        // SAFETY: `handle` was made by this library, which lives as long as the borrow, and is not freed before `drop`.
        unsafe { EventSet::new(handle.as_ptr().cast(), &self.nvml) }
    }

    /// Those since the last call, oldest first.
    pub(super) fn take(&mut self) -> Vec<u64> {
        let Some(handle) = self.set else { return Vec::new() };
        let set = ManuallyDrop::new(self.held(handle));
        let events = (0..MOST_AT_ONCE).map_while(|_| set.wait(0).ok());
        let xid = |xid| match xid {
            XidError::Value(xid) => xid,
            XidError::Unknown => UNKNOWN,
        };
        events.filter_map(|event| event.event_data).map(xid).collect()
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if let Some(handle) = self.set.take() {
            drop(self.held(handle));
        }
    }
}

/// Counts them and tells each. Says whether the card has fallen off the bus; what comes with that comes of that.
pub(super) fn heard(known: &mut Option<Xids>, new: &[u64], now_ms: u64, uuid: &str) -> bool {
    let fell_off = new.contains(&Xids::FELL_OFF);
    for &xid in new {
        let count = known.map_or(0, |known| known.count) + 1;
        let one = Xids { last: xid, count, last_ms: now_ms };
        tracing::warn!(uuid, xid, count, "the driver reports an error of the card: {}", one.meaning());
        *known = Some(if fell_off { Xids { last: Xids::FELL_OFF, ..one } } else { one });
    }
    fell_off
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_counted_and_one_of_them_is_the_end() {
        let mut known = None;
        for (new, at_ms, gone, after) in [
            (&[][..], 5, false, None),
            (&[31, 94][..], 6, false, Some((94, 2, 6))),
            (&[][..], 7, false, Some((94, 2, 6))),
            (&[48, 119, 120, 140, 95, 74, UNKNOWN][..], 8, false, Some((UNKNOWN, 9, 8))),
            (&[79, 45][..], 9, true, Some((79, 11, 9))),
        ] {
            assert_eq!(heard(&mut known, new, at_ms, "GPU-1"), gone, "{new:?}");
            assert_eq!(known.map(|x| (x.last, x.count, x.last_ms)), after, "{new:?}");
        }
    }
}
