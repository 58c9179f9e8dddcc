//! What to do about a trouble of a worker's device, engine or models: the one table, for workers that tell of it and for
//! those who are told. Pure.
//!
//! One class has a remedy for each side that it is seen from: a driver that does not fit its library is another fault than a
//! build that does not fit its driver. A message that carries its remedy is put together by [`told`] and taken apart by
//! [`said`], so that nobody shows a remedy twice.

use crate::failure::FailureClass;

/// Where a trouble shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The driver's management library, asked about the device.
    Driver,
    /// An engine process that ended, or what was known not to work in it.
    Engine,
    /// The file of the turns with a neighbour.
    Lock,
    /// A model's file.
    Model,
}

use FailureClass::{
    DeviceLost, DriverMismatch, EngineCrash, MissingLibrary, ModelMissing, OutOfMemory, Timeout, Unavailable,
};
use Side::{Driver, Engine, Lock, Model};

#[rustfmt::skip]
const TABLE: [(Side, FailureClass, &str); 12] = [
    (Driver, MissingLibrary,
        "install NVIDIA's driver, start the container with its GPUs (--gpus all), or name libnvidia-ml.so.1 in \
         worker.nvml_library"),
    (Driver, DriverMismatch,
        "driver and library must be of one version: reboot after a driver update, and take the library of the host into \
         containers"),
    (Driver, DeviceLost,
        "dmesg | grep -i xid says why; reset the card (nvidia-smi --gpu-reset), reboot, or rent another machine"),
    (Driver, Unavailable,
        "nvidia-smi tells whether the driver is loaded and may be used by this user"),
    (Engine, OutOfMemory,
        "a smaller or quantised model, fewer worker.decode_states or a larger worker.memory_reserve_percent leaves more \
         room; `nvidia-smi` shows who else uses the device"),
    (Engine, DeviceLost,
        "`nvidia-smi -q` and `dmesg | grep -i xid` say what the driver saw; reset or reboot the host, and replace the \
         device if it happens again"),
    (Engine, DriverMismatch,
        "install a driver as new as the CUDA runtime of this build, or a build for this card's architecture; after a \
         driver upgrade reboot the host"),
    (Engine, MissingLibrary,
        "install the CUDA runtime libraries that this build needs (`ldd` shows which), or run with worker.gpu = \"none\""),
    (Engine, EngineCrash,
        "the engine is started again; an input that does this alone is set aside"),
    (Engine, Timeout,
        "the engine is ended and started again; a longer worker.engine_stuck_ms helps where the machine is only slow"),
    (Lock, EngineCrash,
        "worker.lock_file must be a file that this worker can open or make, on a disk that knows flock(2): in containers, \
         mount its folder into both"),
    (Model, ModelMissing,
        "`voxfleet models pull` brings it, worker.prefetch fetches it beside the worker's work; `voxfleet models verify` \
         finds files that are damaged"),
];

/// For classes that are not expected from a side.
fn other(side: Side) -> &'static str {
    match side {
        Driver => "nvidia-smi says what the driver sees, and dmesg what the kernel does",
        Engine | Lock | Model => "the worker's log says more",
    }
}

/// What to do about it.
pub fn remedy(side: Side, class: FailureClass) -> &'static str {
    let found = TABLE.iter().find(|(of, what, _)| (*of, *what) == (side, class));
    found.map_or_else(|| other(side), |(_, _, text)| text)
}

/// From which side an engine's end was seen, by the remedy at the end of its message.
pub fn side_of_end(class: FailureClass, message: &str) -> Side {
    if message.ends_with(remedy(Lock, class)) && remedy(Lock, class) != other(Lock) { Lock } else { Engine }
}

/// A message for people: what was seen, then the remedy.
pub fn told(side: Side, class: FailureClass, seen: impl std::fmt::Display) -> String {
    format!("{seen}; {}", remedy(side, class))
}

/// What was seen, of such a message. All of it where it ends otherwise: another version may have another remedy.
pub fn said(side: Side, class: FailureClass, message: &str) -> &str {
    message.strip_suffix(remedy(side, class)).map_or(message, |seen| seen.trim_end_matches("; "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_trouble_has_a_remedy_of_its_own() {
        let texts: BTreeSet<&str> = TABLE.iter().map(|(_, _, text)| *text).collect();
        assert_eq!(texts.len(), TABLE.len());
        for class in [OutOfMemory, EngineCrash, DeviceLost, DriverMismatch, MissingLibrary, Timeout] {
            assert!(texts.contains(remedy(Engine, class)), "{class}");
        }
        for class in [MissingLibrary, DriverMismatch, DeviceLost, Unavailable] {
            assert!(texts.contains(remedy(Driver, class)), "{class}");
        }
        for (side, class, part) in [
            (Engine, OutOfMemory, "smaller"),
            (Engine, Timeout, "engine_stuck_ms"),
            (Engine, DriverMismatch, "CUDA runtime"),
            (Driver, DriverMismatch, "one version"),
            (Driver, MissingLibrary, "nvml_library"),
            (Engine, MissingLibrary, "ldd"),
            (Engine, FailureClass::Internal, "log"),
            (Driver, Timeout, "dmesg"),
            (Model, ModelMissing, "models pull"),
        ] {
            assert!(remedy(side, class).contains(part), "{side:?} {class}");
        }
    }

    #[test]
    fn what_was_put_together_is_taken_apart() {
        for side in [Driver, Engine, Lock, Model] {
            for class in [DeviceLost, OutOfMemory, ModelMissing, FailureClass::Unknown] {
                let message = told(side, class, "gone; for good");
                assert!(message.ends_with(remedy(side, class)), "{message}");
                assert_eq!(said(side, class, &message), "gone; for good");
                assert_eq!(said(side, class, "gone; an older remedy"), "gone; an older remedy");
            }
        }
        assert_eq!(side_of_end(EngineCrash, &told(Lock, EngineCrash, "gone")), Lock);
        assert_eq!(side_of_end(EngineCrash, &told(Engine, EngineCrash, "gone")), Engine);
        assert_eq!(side_of_end(FailureClass::Internal, &told(Engine, FailureClass::Internal, "gone")), Engine);
        assert_ne!(said(Driver, DeviceLost, &told(Engine, DeviceLost, "gone")), "gone", "a remedy of another side");
    }
}
