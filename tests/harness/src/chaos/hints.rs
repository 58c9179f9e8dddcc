//! A fault layer at the dispatcher's publishes: hints that get lost, come twice, or are overtaken.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    dice::Dice,
    wire::{Fate, Publish, Tamper},
};

/// What became of the hints that passed.
#[derive(Debug, Default)]
pub struct Fates {
    passed: AtomicU64,
    dropped: AtomicU64,
    doubled: AtomicU64,
    late: AtomicU64,
}

impl Fates {
    pub fn all(&self) -> BTreeMap<&'static str, u64> {
        let counts = [&self.passed, &self.dropped, &self.doubled, &self.late].map(|n| n.load(Ordering::Relaxed));
        ["passed", "dropped", "doubled", "late"].into_iter().zip(counts).collect()
    }

    /// Hints to which something was done.
    pub fn faults(&self) -> u64 {
        self.all().iter().filter(|(name, _)| **name != "passed").map(|(_, n)| n).sum()
    }
}

/// This share of the hints is dropped, doubled, or so late that others overtake it, each a third. Everything else passes.
pub fn hint_faults(seed: u64, share: f64) -> (impl Tamper, Arc<Fates>) {
    let dice = Mutex::new(Dice::new(seed ^ 0x0417));
    let fates = Arc::<Fates>::default();
    let counted = Arc::clone(&fates);
    let tamper = move |publish: &mut Publish| {
        if !publish.subject.contains(".live.") {
            return Fate::Pass;
        }
        let mut dice = dice.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, fate) = if dice.chance(share) {
            match dice.below(3) {
                0 => (&counted.dropped, Fate::Drop),
                1 => (&counted.doubled, Fate::Double),
                _ => (&counted.late, Fate::Late(Duration::from_millis(dice.below(700) as u64))),
            }
        } else {
            (&counted.passed, Fate::Pass)
        };
        count.fetch_add(1, Ordering::Relaxed);
        fate
    };
    (tamper, fates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fate_is_met_and_counted() {
        let (tamper, fates) = hint_faults(1, 0.5);
        let mut publish =
            Publish { subject: "asr.v1.gpu.g.i.live.s".to_owned(), reply: None, headers: None, payload: "x".into() };
        let met = (0..200).filter(|_| tamper.touch(&mut publish) != Fate::Pass).count() as u64;
        assert_eq!(fates.faults(), met);
        assert!(fates.all().values().all(|n| *n > 10), "{fates:?}");
        publish.subject = "asr.v1.transcript.session.s.final".to_owned();
        assert_eq!(tamper.touch(&mut publish), Fate::Pass);
        assert_eq!(fates.all().values().sum::<u64>(), 200);
    }
}
