//! How far other tenants of the device have grown into what we use, and what follows. Pure: one call for each sample.
//!
//! 1. Less is free than our reserve, and somebody else is there: nothing new is taken, at once.
//! 2. Still so two samples later: what is loaded and not used is given back.
//! 3. Still so after that, and it was the others who grew since all was well: sessions are moved away. What we have filled
//!    ourselves moves nobody: it would come back, and go again.
//!
//! A step is left when the reserve is free again; new work is taken when more than that has been free for some samples in a
//! row, so that a tenant at the brink does not make us come and go.

use voxfleet_schema::device::{Device, Pressure};

/// Tenants that have less than this are the driver and a screen.
const OF_NOTE_MB: u64 = 64;
/// Samples with too little free memory after which each step is taken.
const RELEASE_AFTER: u32 = 3;
const MOVE_AFTER: u32 = 6;
/// Samples with enough of it before work is taken again.
const CALM: u32 = 3;

/// One sample's memory, in MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    free_mb: u64,
    ours_mb: u64,
    others_mb: u64,
    reserve_mb: u64,
}

impl Memory {
    /// None for a CPU, whose memory comes and goes with everything on the machine, and for a device that does not answer.
    pub(crate) fn of(device: &Device, reserve_mb: u64) -> Option<Self> {
        let figures = device.uuid.is_some() && device.trouble.is_none() && device.total_mb > 0;
        figures.then_some(Self {
            free_mb: device.free_mb,
            ours_mb: device.used_mb,
            others_mb: device.used_by_others_mb,
            reserve_mb,
        })
    }

    fn is_short(&self) -> bool {
        self.free_mb < self.reserve_mb && self.others_mb >= OF_NOTE_MB
    }

    /// More than is needed to be out of trouble.
    fn is_roomy(&self) -> bool {
        self.others_mb < OF_NOTE_MB || self.free_mb >= self.reserve_mb + (self.reserve_mb / 4).max(1)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Gauge {
    /// Samples in a row.
    short: u32,
    roomy: u32,
    level: Option<Pressure>,
    /// The last sample before it began.
    well: Option<Memory>,
}

impl Gauge {
    /// None: nothing is known of the device, or nothing of ours is on it. What was seen before is no reason any more.
    pub(crate) fn look(&mut self, memory: Option<Memory>) -> Option<Pressure> {
        match memory {
            Some(memory) => self.sample(memory),
            None => {
                *self = Self::default();
                None
            }
        }
    }

    fn sample(&mut self, memory: Memory) -> Option<Pressure> {
        if memory.is_short() {
            self.roomy = 0;
            self.short += 1;
            let step = match self.short {
                ..RELEASE_AFTER => Pressure::NoNewWork,
                RELEASE_AFTER..MOVE_AFTER => Pressure::ReleaseIdle,
                _ if self.others_grew(memory) => Pressure::MoveAway,
                _ => Pressure::ReleaseIdle,
            };
            self.level = self.level.max(Some(step));
            return self.level;
        }
        self.short = 0;
        self.roomy = if memory.is_roomy() { self.roomy + 1 } else { 0 };
        self.level = match self.level {
            Some(_) if self.roomy < CALM => Some(Pressure::NoNewWork),
            _ => None,
        };
        if self.level.is_none() {
            self.well = Some(memory);
        }
        self.level
    }

    /// More than we did, since all was well.
    fn others_grew(&self, now: Memory) -> bool {
        let grown = |now: u64, before: u64| now.saturating_sub(before);
        self.well.is_none_or(|well| {
            let others = grown(now.others_mb, well.others_mb);
            others > 0 && others >= grown(now.ours_mb, well.ours_mb)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOTAL_MB: u64 = 16_000;

    fn memory(ours_mb: u64, others_mb: u64) -> Memory {
        Memory { free_mb: TOTAL_MB.saturating_sub(ours_mb + others_mb), ours_mb, others_mb, reserve_mb: 800 }
    }

    fn steps(gauge: &mut Gauge, samples: &[(u64, u64)]) -> Vec<Option<Pressure>> {
        samples.iter().map(|(ours, others)| gauge.sample(memory(*ours, *others))).collect()
    }

    #[test]
    fn each_step_follows_the_one_before() {
        use Pressure::*;
        let (none, no_new, release, away) = (None, Some(NoNewWork), Some(ReleaseIdle), Some(MoveAway));
        /// What it is about, memory of ours and of others at each sample, and what is said then.
        type Case<'a> = (&'a str, &'a [(u64, u64)], &'a [Option<Pressure>]);
        let cases: [Case<'_>; 8] = [
            ("room for all", &[(4_000, 9_600); 4], &[none; 4]),
            ("nobody else is there", &[(15_900, 40); 4], &[none; 4]),
            (
                "a tenant grows and stays",
                &[
                    (4_000, 9_600),
                    (4_000, 11_600),
                    (4_000, 11_600),
                    (4_000, 11_600),
                    (4_000, 11_600),
                    (4_000, 11_600),
                    (4_000, 11_600),
                ],
                &[none, no_new, no_new, release, release, release, away],
            ),
            (
                "we have filled it ourselves",
                &[
                    (4_000, 9_600),
                    (6_000, 9_600),
                    (6_000, 9_600),
                    (6_000, 9_600),
                    (6_000, 9_600),
                    (6_000, 9_600),
                    (6_000, 9_600),
                ],
                &[none, no_new, no_new, release, release, release, release],
            ),
            ("the tenant was there first", &[(0, 15_500); 6], &[no_new, no_new, release, release, release, away]),
            (
                "what is released is enough, and is not taken again at once",
                &[
                    (4_000, 9_600),
                    (4_000, 11_600),
                    (4_000, 11_600),
                    (4_000, 11_600),
                    (2_000, 11_600),
                    (2_000, 11_600),
                    (2_000, 11_600),
                ],
                &[none, no_new, no_new, release, no_new, no_new, none],
            ),
            (
                "at the brink nothing is taken and nothing goes",
                &[
                    (4_000, 9_600),
                    (4_000, 11_600),
                    (4_000, 11_100),
                    (4_000, 11_100),
                    (4_000, 11_100),
                    (4_000, 11_100),
                    (4_000, 11_600),
                ],
                &[none, no_new, no_new, no_new, no_new, no_new, no_new],
            ),
            (
                "a tenant that shrinks for a moment",
                &[(4_000, 9_600), (4_000, 11_600), (4_000, 9_600), (4_000, 9_600), (4_000, 11_600), (4_000, 9_600)],
                &[none, no_new, no_new, no_new, no_new, no_new],
            ),
        ];
        for (what, samples, expected) in cases {
            assert_eq!(steps(&mut Gauge::default(), samples), expected, "{what}");
        }
    }

    #[test]
    fn a_slow_growth_is_the_tenant_s_and_not_ours() {
        let mut gauge = Gauge::default();
        let creeping: Vec<(u64, u64)> = (0..20).map(|n| (4_000, 11_000 + 20 * n)).collect();
        assert_eq!(steps(&mut gauge, &creeping).last(), Some(&Some(Pressure::MoveAway)));
    }

    #[test]
    fn what_cannot_be_seen_presses_nobody() {
        let mut gauge = Gauge::default();
        let full = Some(memory(4_000, 11_600));
        gauge.look(Some(memory(4_000, 9_600)));
        (0..6).for_each(|_| {
            gauge.look(full);
        });
        assert_eq!(gauge.look(full), Some(Pressure::MoveAway));
        assert_eq!(gauge.look(None), None, "the device does not answer, or the engine has left it");
        assert_eq!(gauge.look(full), Some(Pressure::NoNewWork), "from the first step on");
    }

    #[test]
    fn a_cpu_and_a_device_in_trouble_say_nothing() {
        let gpu = Device { uuid: Some("GPU-1".to_owned()), total_mb: 16_000, ..Device::default() };
        assert!(Memory::of(&gpu, 800).is_some());
        assert_eq!(Memory::of(&Device { uuid: None, ..gpu.clone() }, 800), None);
        assert_eq!(Memory::of(&Device { total_mb: 0, ..gpu.clone() }, 800), None);
        let class = voxfleet_schema::failure::FailureClass::DeviceLost;
        let trouble = Some(voxfleet_schema::device::DeviceTrouble { class, message: String::new() });
        assert_eq!(Memory::of(&Device { trouble, ..gpu }, 800), None);
    }

    proptest! {
        #[test]
        fn too_little_memory_is_answered_at_once_and_enough_of_it_in_the_end(
            samples in prop::collection::vec((0..8_000u64, 0..16_000u64), 1..60)
        ) {
            let mut gauge = Gauge::default();
            let mut before = None;
            for (ours, others) in samples {
                let others = others.min(TOTAL_MB - ours);
                let now = memory(ours, others);
                let level = gauge.sample(now);
                prop_assert_eq!(now.is_short() && level.is_none(), false, "admission goes on");
                prop_assert!(now.is_short() || level <= Some(Pressure::NoNewWork), "work goes although there is room");
                // No step is passed over.
                let step = |to, from| level == Some(to) && before >= Some(from);
                let allowed = level <= before.max(Some(Pressure::NoNewWork))
                    || step(Pressure::ReleaseIdle, Pressure::NoNewWork)
                    || step(Pressure::MoveAway, Pressure::ReleaseIdle);
                prop_assert!(allowed, "from {before:?} to {level:?}");
                before = level;
            }
            let last = (0..CALM).map(|_| gauge.sample(memory(1_000, 1_000))).last();
            prop_assert_eq!(last, Some(None));
        }
    }
}
