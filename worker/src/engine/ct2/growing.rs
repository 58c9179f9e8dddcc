//! Energies of sound that was looked at before: a window that grows is worked out where it is new, and nowhere else.
//!
//! What was kept is known by its samples, not by a name: it is used where the beginning of a window is the same sound, so it
//! never changes what is heard, whoever asks. All recognizers of a model share it, for a session's next window may come to
//! another one. The windows that grew last are kept, up to [`MOST_BYTES`].

use std::{
    collections::VecDeque,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::mel::{LogMel, Spectrogram};

/// Of energies. A window of ten seconds takes 320 kB.
const MOST_BYTES: usize = 16 << 20;
/// A window is looked for by this many samples first: a tenth of a second.
const HEAD: usize = 1_600;

/// A window that was worked out.
struct Kept {
    head: u64,
    samples: usize,
    /// Of all its samples.
    whole: u64,
    /// Of its whole frames.
    energies: Arc<[f32]>,
}

/// What is kept for a model.
#[derive(Default)]
pub struct Growing {
    /// Its keys are drawn at each start: nobody can make two sounds that look the same.
    keys: RandomState,
    /// Those that grew last stand in front.
    shelf: Mutex<VecDeque<Kept>>,
}

impl Growing {
    /// As [`LogMel::spectrogram`], to the bit.
    pub fn spectrogram(&self, mel: &mut LogMel, samples: &[f32]) -> Spectrogram {
        if samples.len() < HEAD {
            return mel.spectrogram(samples);
        }
        let head = self.mark(&samples[..HEAD]);
        let (grew_from, known) = self.known(head, samples).unzip();
        let energies = mel.energies(samples, known.as_deref().unwrap_or(&[]));
        let whole = LogMel::whole_frames(samples.len()) * mel.bands();
        // Nothing new is not kept twice.
        if known.is_none_or(|known| known.len() < whole) {
            let whole = energies[..whole].into();
            self.keep(Kept { head, samples: samples.len(), whole: self.mark(samples), energies: whole }, grew_from);
        }
        mel.picture(energies, samples.len())
    }

    fn mark(&self, samples: &[f32]) -> u64 {
        let mut hasher = self.keys.build_hasher();
        samples.iter().for_each(|sample| hasher.write_u32(sample.to_bits()));
        hasher.finish()
    }

    fn shelf(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        // What a panic left behind is whole: it is changed by single steps.
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest window that this one begins with: the mark of its samples, and its energies.
    fn known(&self, head: u64, samples: &[f32]) -> Option<(u64, Arc<[f32]>)> {
        let mut alike: Vec<(usize, u64, Arc<[f32]>)> = {
            let shelf = self.shelf();
            let fits = shelf.iter().filter(|kept| kept.head == head && kept.samples <= samples.len());
            fits.map(|kept| (kept.samples, kept.whole, kept.energies.clone())).collect()
        };
        alike.sort_by_key(|(samples, ..)| std::cmp::Reverse(*samples));
        let found = alike.into_iter().find(|(len, whole, _)| self.mark(&samples[..*len]) == *whole);
        found.map(|(_, whole, energies)| (whole, energies))
    }

    /// In place of the one that it grew from.
    fn keep(&self, new: Kept, grew_from: Option<u64>) {
        let mut shelf = self.shelf();
        shelf.retain(|kept| Some(kept.whole) != grew_from && kept.whole != new.whole);
        shelf.push_front(new);
        let mut bytes = 0;
        let fits = shelf.iter().take_while(|kept| {
            bytes += size_of_val(&*kept.energies);
            bytes <= MOST_BYTES
        });
        let fits = fits.count();
        shelf.truncate(fits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound(samples: usize, pitch: f32) -> Vec<f32> {
        (0..samples).map(|n| 0.3 * (n as f32 / 16_000.0 * (pitch + n as f32 / 100.0)).sin()).collect()
    }

    fn held(growing: &Growing) -> (usize, usize) {
        let shelf = growing.shelf();
        (shelf.len(), shelf.iter().map(|kept| size_of_val(&*kept.energies)).sum())
    }

    #[test]
    fn a_window_that_grows_looks_as_if_it_had_come_at_once() {
        let (growing, mut mel) = (Growing::default(), LogMel::new(80));
        let (one, other) = (sound(80_000, 300.0), sound(80_000, 700.0));
        for len in [100, 1_599, 1_600, 1_601, 5_000, 5_080, 5_159, 16_000, 48_000, 48_000, 30_000, 80_000] {
            for sound in [&one, &other] {
                let at_once = LogMel::new(80).spectrogram(&sound[..len]);
                assert_eq!(growing.spectrogram(&mut mel, &sound[..len]), at_once, "{len} samples");
            }
        }
        // One for each window, in the end, and that of 30,000 samples, which did not go on.
        assert_eq!(held(&growing).0, 4);
    }

    /// That something was taken from the shelf shows where what stands there is not true.
    #[test]
    fn what_is_known_is_not_worked_out_again() {
        let (growing, mut mel) = (Growing::default(), LogMel::new(80));
        let sound = sound(48_000, 300.0);
        growing.spectrogram(&mut mel, &sound[..32_000]);
        let known = LogMel::whole_frames(32_000);
        growing.shelf()[0].energies = vec![7.0; known * 80].into();
        let (grown, mut frame) = (growing.spectrogram(&mut mel, &sound), Vec::new());
        grown.bands_of(known - 1, 1, &mut frame);
        assert!(frame.iter().all(|value| *value == (7.0 + 4.0) / 4.0), "{frame:?}");
        // Other sound with the same first tenth of a second is worked out by itself.
        let mut other = sound.clone();
        other[20_000] = 0.9;
        assert_eq!(growing.spectrogram(&mut mel, &other), LogMel::new(80).spectrogram(&other));
    }

    #[test]
    fn what_is_kept_has_a_bound() {
        let (growing, mut mel) = (Growing::default(), LogMel::new(80));
        for pitch in 0..30u16 {
            growing.spectrogram(&mut mel, &sound(480_000, f32::from(pitch)));
        }
        let (windows, bytes) = held(&growing);
        assert!((10..30).contains(&windows) && bytes <= MOST_BYTES, "{windows} windows, {bytes} bytes");
    }
}
