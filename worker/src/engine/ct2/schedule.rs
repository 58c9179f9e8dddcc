//! Which windows are passed over next, together; pure, time is an argument.
//!
//! Windows that share a batch are alike: CTranslate2 wants prompts of one length, and the encoder does not mask what a batch
//! is padded with, so windows that would look at different stretches by themselves stay apart.
//!
//! The window that is due first leads, and takes others like it with it, in the order in which they are due. Finals are due
//! when they come. A partial is due a moment later, so that finals go first and no stream of finals keeps partials waiting
//! for good; windows of recordings are due later still: they fill what is left. A batch that is not full waits for
//! company, but only for a fraction of what one pass takes.

use std::time::{Duration, Instant};

/// How long a partial lets finals go first.
const PARTIAL_AFTER: Duration = Duration::from_millis(500);
/// How long a window of a recording lets live ones go first.
const RECORDING_AFTER: Duration = Duration::from_secs(5);

/// Most windows with word times in a batch: the library aligns the whole batch for each length of text that is in it.
const WITH_WORDS: usize = 8;

/// What windows of a batch have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Which of the models that are on the device.
    pub model: usize,
    /// Encoder positions.
    pub positions: usize,
    pub prompt_tokens: usize,
    /// Word times are asked for.
    pub words: bool,
}

/// For whom a window is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    Final,
    Partial,
    Recording,
}

/// A window that waits for its next pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    pub key: Key,
    pub what: For,
    pub since: Instant,
    /// In a batch of its model.
    pub most: Most,
}

impl Waiting {
    fn due(&self) -> Instant {
        self.since
            + match self.what {
                For::Final => Duration::ZERO,
                For::Partial => PARTIAL_AFTER,
                For::Recording => RECORDING_AFTER,
            }
    }
}

/// What the device does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// A pass over these, by their places.
    Pass(Vec<usize>),
    /// Nothing until then, unless another window comes.
    Wait(Instant),
    /// Nothing waits.
    Idle,
}

/// How much goes into one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    pub windows: usize,
    /// Encoder positions of them all, beyond which a batch is slower than its windows one by one; none: no such bound.
    pub positions: Option<usize>,
}

impl Most {
    /// Windows that are like this, one at least.
    pub fn of(self, key: Key) -> usize {
        let by_positions = self.positions.map_or(usize::MAX, |most| most / key.positions.max(1));
        let by_words = if key.words { WITH_WORDS } else { usize::MAX };
        self.windows.min(by_positions).min(by_words).max(1)
    }
}

/// So many full batches in a row make room for twice as many windows again.
const CALM: usize = 100;

/// After a batch as large as allowed had its memory `calm` times in a row: how many windows the next may have, `fitting` at most.
/// What was short of memory may have it again: a neighbour left, another model was unloaded.
pub fn grown(most: usize, fitting: usize, calm: usize) -> usize {
    if calm >= CALM { (2 * most).min(fitting).max(most) } else { most }
}

/// A batch that is not full waits for `company` since its leader came.
pub fn next(waiting: &[Waiting], now: Instant, company: Duration) -> Next {
    let Some(leader) = waiting.iter().min_by_key(|w| (w.due(), w.since)) else { return Next::Idle };
    let most = leader.most.of(leader.key);
    let mut alike: Vec<usize> = (0..waiting.len()).filter(|n| waiting[*n].key == leader.key).collect();
    alike.sort_by_key(|n| (waiting[*n].due(), waiting[*n].since, *n));
    alike.truncate(most);
    let until = leader.since + company;
    if alike.len() < most && now < until { Next::Wait(until) } else { Next::Pass(alike) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const COMPANY: Duration = Duration::from_millis(3);

    fn most(windows: usize) -> Most {
        Most { windows, positions: None }
    }

    #[test]
    fn a_batch_has_bounds_of_windows_and_of_positions() {
        for (windows, positions, each, expected) in [
            (4, None, 1_500, 4),
            (4, Some(2_048), 512, 4),
            (4, Some(2_048), 600, 3),
            (4, Some(2_048), 1_500, 1),
            (0, None, 512, 1),
        ] {
            let key = Key { model: 0, positions: each, prompt_tokens: 0, words: false };
            assert_eq!(Most { windows, positions }.of(key), expected, "{windows} windows, {positions:?} positions");
            assert_eq!(Most { windows: 64, positions: None }.of(Key { words: true, ..key }), 8);
        }
        let begin = Instant::now();
        let finals = [waits(For::Final, 1_500, begin), waits(For::Final, 1_500, begin)];
        let most = Most { windows: 4, positions: Some(2_048) };
        assert_eq!(
            next(&having(&finals, most), begin, COMPANY),
            Next::Pass(vec![0]),
            "a batch that can have no more does not wait"
        );
    }

    fn waits(what: For, positions: usize, since: Instant) -> Waiting {
        let key = Key { model: 0, positions, prompt_tokens: 0, words: what != For::Partial };
        Waiting { key, what, since, most: most(4) }
    }

    fn having(waiting: &[Waiting], most: Most) -> Vec<Waiting> {
        waiting.iter().map(|w| Waiting { most, ..*w }).collect()
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn finals_lead_then_partials_then_recordings() {
        let begin = Instant::now();
        let waiting = [
            waits(For::Recording, 1_500, begin),
            waits(For::Partial, 512, begin + ms(10)),
            waits(For::Final, 1_500, begin + ms(20)),
            waits(For::Partial, 512, begin + ms(5)),
        ];
        let now = begin + ms(100);
        // The recording is like the final, and fills its batch.
        assert_eq!(next(&waiting, now, COMPANY), Next::Pass(vec![2, 0]));
        assert_eq!(next(&waiting[..2], now, COMPANY), Next::Pass(vec![1]));
        let partials = [waiting[1], waiting[3]];
        assert_eq!(next(&partials, now, COMPANY), Next::Pass(vec![1, 0]), "the one that waited longer first");
        assert_eq!(next(&having(&partials, most(1)), now, COMPANY), Next::Pass(vec![1]));
        assert_eq!(next(&[], now, COMPANY), Next::Idle);
    }

    #[test]
    fn models_share_the_device_and_no_batch() {
        let begin = Instant::now();
        let other = |w: Waiting| Waiting { key: Key { model: 1, ..w.key }, most: most(1), ..w };
        let partial = |at| waits(For::Partial, 512, begin + ms(at));
        let mut waiting = vec![partial(0), other(partial(1)), partial(2), other(partial(3))];
        let now = begin + ms(100);
        assert_eq!(next(&waiting, now, COMPANY), Next::Pass(vec![0, 2]));
        waiting[0] = other(waits(For::Final, 512, begin + ms(50)));
        assert_eq!(next(&waiting, now, COMPANY), Next::Pass(vec![0]), "each model has its own bound");
    }

    #[test]
    fn batches_grow_again_where_memory_has_come_back() {
        for (most, fitting, calm, expected) in
            [(2, 16, 99, 2), (2, 16, 100, 4), (12, 16, 100, 16), (16, 16, 500, 16), (1, 1, 100, 1), (4, 2, 100, 4)]
        {
            assert_eq!(grown(most, fitting, calm), expected, "{most} of {fitting} after {calm}");
        }
    }

    #[test]
    fn nobody_waits_for_good() {
        let begin = Instant::now();
        let (partial, recording) = (waits(For::Partial, 512, begin), waits(For::Recording, 512, begin));
        // A final comes every 10 ms, more than can be done.
        let finals = |from: u64, to: u64| (from..to).step_by(10).map(|at| waits(For::Final, 1_500, begin + ms(at)));
        let led = |first: Waiting, from: u64, to: u64| {
            let waiting: Vec<Waiting> = std::iter::once(first).chain(finals(from, to)).collect();
            next(&waiting, begin + ms(to), COMPANY) == Next::Pass(vec![0])
        };
        assert!(!led(partial, 400, 600) && led(partial, 510, 700));
        assert!(!led(recording, 4_900, 5_100) && led(recording, 5_010, 5_200));
    }

    #[test]
    fn a_batch_waits_for_company_for_a_moment_only() {
        let begin = Instant::now();
        let one = [waits(For::Partial, 512, begin)];
        assert_eq!(next(&having(&one, most(2)), begin + ms(1), COMPANY), Next::Wait(begin + COMPANY));
        assert_eq!(next(&having(&one, most(2)), begin + COMPANY, COMPANY), Next::Pass(vec![0]));
        assert_eq!(next(&having(&one, most(1)), begin, COMPANY), Next::Pass(vec![0]), "a full batch does not wait");
        let two = [one[0], waits(For::Partial, 512, begin + ms(1))];
        assert_eq!(next(&having(&two, most(2)), begin + ms(1), COMPANY), Next::Pass(vec![0, 1]));
    }

    proptest! {
        #[test]
        fn batches_are_alike_and_everyone_has_a_turn(
            drawn in proptest::collection::vec((0usize..3, 0u64..3_000, 0u8..3), 1..30),
            most in 1usize..6,
        ) {
            let most = Most { windows: most, positions: None };
            let begin = Instant::now();
            let kinds = [For::Final, For::Partial, For::Recording];
            let mut left: Vec<Waiting> = drawn
                .into_iter()
                .map(|(positions, at, kind)| waits(kinds[usize::from(kind)], positions, begin + ms(at)))
                .map(|w| Waiting { most, ..w })
                .collect();
            let now = begin + ms(60_000);
            let mut passes = 0;
            while !left.is_empty() {
                let Next::Pass(batch) = next(&left, now, COMPANY) else {
                    return Err(TestCaseError::fail("nothing is done although windows wait"));
                };
                prop_assert!((1..=most.windows).contains(&batch.len()));
                prop_assert!(batch.iter().all(|n| left[*n].key == left[batch[0]].key));
                let earliest = left.iter().map(Waiting::due).min();
                prop_assert_eq!(Some(left[batch[0]].due()), earliest);
                let mut places = batch;
                places.sort_unstable();
                places.into_iter().rev().for_each(|n| { left.remove(n); });
                passes += 1;
            }
            prop_assert!(passes <= 30);
        }
    }
}
