//! What a device is to the rest of the worker: figures, or a typed trouble that names its remedy. Never a crash.

use voxfleet_schema::{
    device::{Device, DeviceTrouble},
    failure::FailureClass,
    remedy::{self, Side},
};

/// Our engine, as far as it matters for whose memory is whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ours {
    pub(crate) pid: u32,
    /// What its models take, as planned or measured.
    pub(crate) expected_mb: u64,
    /// What those that are loaded have taken of the device, as the engine says.
    pub(crate) resident_mb: u64,
}

/// One device, asked again and again. Calls may block: a driver that resets a card takes seconds.
pub(crate) trait Card: Send {
    /// Its figures now, or why there are none. One that failed is tried again by later calls. `ours`: none without an engine.
    fn sample(&mut self, ours: Option<Ours>) -> Result<Device, DeviceTrouble>;

    /// Of what is in use, what engines of workers have, whoever runs them; none where the driver does not tell whose it is.
    fn engines_mb(&self) -> Option<u64>;

    /// What is known of it although it does not answer: all figures that change are 0 or absent.
    fn identity(&self) -> Device;
}

/// A trouble in the driver's words, with the remedy behind.
pub(super) fn trouble(class: FailureClass, said: impl std::fmt::Display) -> DeviceTrouble {
    DeviceTrouble { class, message: remedy::told(Side::Driver, class, said) }
}

/// How many samples pass before a device that failed is asked again: each failure in a row doubles them.
#[derive(Debug, Default)]
pub(super) struct Patience {
    failures: u32,
    left: u32,
}

impl Patience {
    /// Loading a library each second for hours would be a load of its own.
    const MOST: u32 = 31;

    pub(super) fn failed(&mut self) {
        self.left = (1u32 << self.failures.min(5)).saturating_sub(1).min(Self::MOST);
        self.failures += 1;
    }

    /// It will not be back soon.
    pub(super) fn gone(&mut self) {
        (self.failures, self.left) = (self.failures.max(Self::MOST.ilog2() + 1), Self::MOST);
    }

    /// Whether this sample is to ask.
    pub(super) fn is_over(&mut self) -> bool {
        let over = self.left == 0;
        self.left = self.left.saturating_sub(1);
        over
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

/// What the driver says of processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listing {
    /// Our engine, with its MB.
    Listed(u64),
    /// Others at most: our engine has nothing on the device.
    NotListed,
    /// Nothing: it refuses, or numbers processes otherwise than we do (a container).
    Unknown,
}

/// What a CUDA context and its allocator take beside models: about 530 MB on Hopper.
const BESIDE_MODELS_MB: u64 = 600;

/// Device memory of our engine: as the driver lists it, else what came on top since the engine started, as far as its models
/// can explain it. The rest is a tenant's that has grown.
pub(super) fn own_memory_mb(
    ours: Option<Ours>,
    listing: Listing,
    used_by_all: u64,
    without_engine: Option<u64>,
) -> u64 {
    match (ours, listing) {
        (None, _) | (Some(_), Listing::NotListed) => 0,
        (Some(_), Listing::Listed(mb)) => mb,
        (Some(ours), Listing::Unknown) => {
            let on_top = used_by_all.saturating_sub(without_engine.unwrap_or(used_by_all));
            on_top.min(ours.expected_mb + BESIDE_MODELS_MB)
        }
    }
}

/// What belongs to others, where the driver does not tell processes apart: what was in use without our engine; less when
/// they have given some back since, for what our models hold is ours.
pub(super) fn without_engine_mb(known: Option<u64>, ours: Option<Ours>, used_by_all: u64) -> Option<u64> {
    let Some(ours) = ours else { return Some(used_by_all) };
    known.map(|known| known.min(used_by_all.saturating_sub(ours.resident_mb)))
}

/// Whether this is the command line of a worker's engine, as `/proc` shows it.
fn is_engine(cmdline: &[u8]) -> bool {
    let mut words = cmdline.split(|byte| *byte == 0).skip(1);
    words.next() == Some(b"engine") && words.next() == Some(b"--fd")
}

/// Whether this process is a worker's engine, of this worker or of another.
pub(super) fn runs_an_engine(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|cmdline| is_engine(&cmdline))
}

/// Whether process ids here are those of the host, which drivers count in: the kernel's first namespace has this number.
pub(super) fn pids_are_the_hosts() -> bool {
    const FIRST: &str = "pid:[4026531836]";
    std::fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link.as_os_str() == FIRST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_the_engine_is_listed_or_what_came_on_top() {
        use Listing::{Listed, NotListed, Unknown};
        let ours = Some(Ours { pid: 7, expected_mb: 1_000, resident_mb: 700 });
        for (ours, listing, by_all, without, own) in [
            (None, Unknown, 5_000, Some(5_000), 0),
            (ours, Listed(700), 5_700, Some(5_000), 700),
            (ours, NotListed, 5_700, Some(5_000), 0),
            (ours, Unknown, 5_700, Some(5_000), 700),
            (ours, Unknown, 4_000, Some(5_000), 0),
            (ours, Unknown, 5_700, None, 0),
            // A tenant grew by 8 GB: our model cannot have.
            (ours, Unknown, 14_700, Some(5_000), 1_600),
        ] {
            assert_eq!(own_memory_mb(ours, listing, by_all, without), own, "{listing:?} {by_all}");
        }
    }

    #[test]
    fn a_tenant_that_shrinks_takes_nothing_of_ours_with_it() {
        let engine = |resident_mb| Some(Ours { pid: 7, expected_mb: 4_000, resident_mb });
        let mut others = None;
        let mut seen = |ours: Option<Ours>, by_all| {
            others = without_engine_mb(others, ours, by_all);
            (own_memory_mb(ours, Listing::Unknown, by_all, others), others)
        };
        assert_eq!(seen(engine(0), 9_600), (0, None), "it was never seen without");
        assert_eq!(seen(None, 9_600), (0, Some(9_600)));
        assert_eq!(seen(engine(0), 10_100), (500, Some(9_600)), "a context");
        assert_eq!(seen(engine(4_000), 14_100), (4_500, Some(9_600)));
        // From 9,600 to 2,000, and back.
        assert_eq!(seen(engine(4_000), 6_500), (4_000, Some(2_500)));
        assert_eq!(seen(engine(4_000), 14_100), (4_600, Some(2_500)), "as much as ours may have; the others grew");
        assert_eq!(seen(None, 9_600), (0, Some(9_600)));
    }

    #[test]
    fn engines_are_known_by_their_words() {
        for (cmdline, engine) in [
            (&b"/proc/self/exe\0engine\0--fd\x009\0"[..], true),
            (b"/opt/voxfleet\0engine\0--fd\x0012\0", true),
            (b"voxfleet\0worker\0--gpu\x000\0", false),
            (b"other\0engine\0start\0", false),
            (b"", false),
        ] {
            assert_eq!(is_engine(cmdline), engine, "{}", String::from_utf8_lossy(cmdline));
        }
        assert!(!runs_an_engine(std::process::id()));
    }

    #[test]
    fn a_device_that_failed_is_asked_less_and_less_often() {
        let mut patience = Patience::default();
        let mut waits = Vec::new();
        for _ in 0..8 {
            patience.failed();
            waits.push((0..).take_while(|_: &u32| !patience.is_over()).count());
        }
        assert_eq!(waits, [0, 1, 3, 7, 15, 31, 31, 31]);
        patience.reset();
        assert!(patience.is_over());
        let mut patience = Patience::default();
        patience.gone();
        assert_eq!((0..).take_while(|_: &u32| !patience.is_over()).count(), 31);
        patience.failed();
        assert_eq!((0..).take_while(|_: &u32| !patience.is_over()).count(), 31);
    }
}
