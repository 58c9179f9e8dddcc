//! Which samples of a recording a simulated transcript stands for, decided from the samples and the text alone.
//!
//! The simulated engine's contract, read by itself: the text of a stretch of audio (16 kHz, mono) has one word for each
//! block of 4,000 samples, blocks aligned to multiples of 4,000 of the session; the first and the last block of a stretch
//! may be cut. A word spells 18 bits of the FNV-1a hash over the block's first sample number (eight bytes, little endian)
//! and its samples (two bytes each): three times a consonant of four bits and a vowel of two. So a word says where its
//! samples stand and what they are, and a stretch of text can be laid back onto the recording.

use std::{collections::HashMap, ops::Range};

use crate::checker::{Message, StoredFinal};

/// Samples per word.
pub const BLOCK: u64 = 4_000;

const CONSONANTS: &[u8; 16] = b"bdfghjklmnprstvz";
const VOWELS: &[u8; 4] = b"aeio";

/// How far the times of a segment may lie from its samples, in samples: milliseconds are rounded down twice.
const BLUR: u64 = 32;
/// Louder than this on average over [`FRAME`] samples is speech to every detector in use.
const LOUD: u64 = 1_000;
const FRAME: usize = 160;
/// The most that the energy detector leaves out where a bound cuts it off from the speech around it: it wants three frames of
/// 512 samples, so two of them, and less than a frame at either edge that it never hears whole.
const CLICK: u64 = 2 * 512 + 2 * 512;

#[derive(Clone, Copy)]
struct Hash(u64);

impl Hash {
    fn at(place: u64) -> Self {
        place.to_le_bytes().into_iter().fold(Self(0xcbf2_9ce4_8422_2325), Self::fold)
    }

    fn fold(self, byte: u8) -> Self {
        Self((self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
    }

    fn sample(self, sample: i16) -> Self {
        sample.to_le_bytes().into_iter().fold(self, Self::fold)
    }

    fn spelled(self) -> [u8; 6] {
        let mut bits = self.0 ^ (self.0 >> 32);
        let mut word = [0; 6];
        for pair in word.chunks_exact_mut(2) {
            pair[0] = CONSONANTS[(bits & 15) as usize];
            pair[1] = VOWELS[((bits >> 4) & 3) as usize];
            bits >>= 6;
        }
        word
    }
}

/// A recording with the words of its whole blocks.
pub struct Recording {
    samples: Vec<i16>,
    blocks: Vec<[u8; 6]>,
    places: HashMap<[u8; 6], Vec<u64>>,
}

impl Recording {
    pub fn new(samples: Vec<i16>) -> Self {
        let whole = samples.chunks_exact(BLOCK as usize).enumerate();
        let blocks: Vec<[u8; 6]> = whole
            .map(|(n, block)| block.iter().fold(Hash::at(n as u64 * BLOCK), |h, s| h.sample(*s)).spelled())
            .collect();
        let mut places: HashMap<[u8; 6], Vec<u64>> = HashMap::new();
        for (n, word) in blocks.iter().enumerate() {
            places.entry(*word).or_default().push(n as u64);
        }
        Self { samples, blocks, places }
    }

    pub fn len(&self) -> u64 {
        self.samples.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    fn slice(&self, range: Range<u64>) -> &[i16] {
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(self.samples.len());
        &self.samples[index(range.start)..index(range.end)]
    }

    /// The samples these words were made of, looked for near `hint` first and then everywhere.
    pub fn find(&self, words: &[&str], hint: &Range<u64>) -> Option<Range<u64>> {
        let words: Option<Vec<[u8; 6]>> = words.iter().map(|w| w.as_bytes().try_into().ok()).collect();
        let words = words.filter(|w| !w.is_empty())?;
        let near = hint.start.saturating_sub(BLUR)..(hint.start + BLUR).min(self.len());
        if words.len() == 1 {
            // 18 bits fit somewhere soon: of all pairs of a start and an end only one near both times is believed.
            let off = |at: u64, hint: u64| if at < hint { hint - at } else { (at - hint).saturating_sub(15) };
            let found = near.filter_map(|from| self.fits(&words, from, hint.end));
            let found = found.filter(|r| r.end.abs_diff(hint.end) <= BLUR);
            return found.min_by_key(|r| off(r.start, hint.start) + off(r.end, hint.end));
        }
        if let Some(found) = near.clone().find_map(|from| self.fits(&words, from, hint.end)) {
            return Some(found);
        }
        // Somewhere else: a whole block in the middle says where.
        let second = words.get(1).filter(|_| words.len() >= 3)?;
        self.places.get(second)?.iter().find_map(|block| {
            let first = block.checked_sub(1)? * BLOCK;
            (first..first + BLOCK).find_map(|from| self.fits(&words, from, hint.end))
        })
    }

    /// The stretch that begins at `from` and has these words; of several ends the one nearest to `end`.
    fn fits(&self, words: &[[u8; 6]], from: u64, end: u64) -> Option<Range<u64>> {
        let (last, before) = words.split_last()?;
        let mut at = from;
        // Whole blocks first: they are a comparison, a cut one is a hash.
        let whole = (from / BLOCK + 1) as usize;
        for (n, word) in before.iter().enumerate().skip(1) {
            if self.blocks.get(whole + n - 1)? != word {
                return None;
            }
        }
        if let Some(first) = before.first() {
            let to = (at / BLOCK + 1) * BLOCK;
            let block = self.slice(at..to);
            if block.len() as u64 != to - at || block.iter().fold(Hash::at(at), |h, s| h.sample(*s)).spelled() != *first
            {
                return None;
            }
            at = to + (before.len() as u64 - 1) * BLOCK;
        }
        let mut hash = Hash::at(at);
        let rest = self.slice(at..(at / BLOCK + 1) * BLOCK);
        let ends = rest.iter().enumerate().filter_map(|(n, s)| {
            hash = hash.sample(*s);
            (hash.spelled() == *last).then_some(at + n as u64 + 1)
        });
        ends.min_by_key(|e| e.abs_diff(end)).map(|to| from..to)
    }

    /// Stretches that every detector takes for speech.
    pub fn loud(&self) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for (n, frame) in self.samples.chunks(FRAME).enumerate() {
            let sum: u64 = frame.iter().map(|s| u64::from(s.unsigned_abs())).sum();
            if sum <= LOUD * frame.len() as u64 {
                continue;
            }
            let from = (n * FRAME) as u64;
            match found.last_mut().filter(|l| l.end == from) {
                Some(last) => last.end = from + frame.len() as u64,
                None => found.push(from..from + frame.len() as u64),
            }
        }
        found
    }
}

/// What a transcript makes of a recording.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// Samples that no final covers, and loud ones that no final speaks of.
    pub lost: u64,
    /// Samples that more than one final covers or speaks of.
    pub repeated: u64,
    /// Finals that cover or speak of samples an earlier one covered or spoke of.
    pub finals_repeated: u64,
    /// Loud samples that a bound cut off and no detector hears by themselves.
    pub clicks: u64,
    pub problems: Vec<String>,
}

/// Lays every final's text onto the recording.
pub fn account(recording: &Recording, finals: &[StoredFinal]) -> Account {
    let mut found = Account::default();
    let (mut heard, mut covered) = (Vec::<Range<u64>>::new(), Vec::<Range<u64>>::new());
    let (mut spoken_again, mut covered_again) = (0, 0);
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or_default();
    for (n, f) in finals.iter().enumerate() {
        let claimed = number(&f.json["from_sample"])..number(&f.json["to_sample"]);
        let mut again: u64 = covered.iter().map(|c| common(c, &claimed)).sum();
        covered_again += again;
        for segment in f.json["segments"].as_array().into_iter().flatten() {
            let words: Vec<&str> = segment["text"].as_str().unwrap_or_default().split_whitespace().collect();
            let hint = number(&segment["start_ms"]) * 16..number(&segment["end_ms"]) * 16;
            let Some(range) = recording.find(&words, &hint) else {
                let text = words.join(" ");
                found.problems.push(format!("final {n} (sequence {}): no samples say {text:?}", f.seq));
                continue;
            };
            if range.start < claimed.start || range.end > claimed.end {
                found
                    .problems
                    .push(format!("final {n} (sequence {}) covers {claimed:?} and speaks of samples {range:?}", f.seq));
            }
            let spoken: u64 = heard.iter().map(|h| common(h, &range)).sum();
            (spoken_again, again) = (spoken_again + spoken, again + spoken);
            heard.push(range);
        }
        covered.push(claimed);
        found.finals_repeated += u64::from(again > 0);
    }
    found.repeated = covered_again.max(spoken_again);
    let bounds: Vec<u64> = covered.iter().flat_map(|c| [c.start, c.end]).collect();
    heard.sort_by_key(|r| r.start);
    covered.sort_by_key(|r| r.start);
    let uncovered = gaps(&(0..recording.len()), &covered, &[]);
    for gap in &uncovered {
        found.lost += gap.end - gap.start;
        found.problems.push(format!("samples {gap:?} are in no final"));
    }
    let loud = recording.loud();
    for (loud, gap) in loud.iter().flat_map(|loud| gaps(loud, &heard, &bounds).into_iter().map(move |gap| (loud, gap)))
    {
        let length = gap.end - gap.start - uncovered.iter().map(|u| common(u, &gap)).sum::<u64>();
        if length == 0 {
            continue;
        }
        // A few frames between a bound and silence (or another bound) are a click to the detector. Where speech follows in
        // the same final it hears them with it: there they are lost.
        let cut_off = |at: &u64, edge: u64| bounds.contains(at) || *at == edge;
        let at_a_bound = bounds.contains(&gap.start) || bounds.contains(&gap.end);
        if length <= CLICK && at_a_bound && cut_off(&gap.start, loud.start) && cut_off(&gap.end, loud.end) {
            found.clicks += length;
        } else {
            found.lost += length;
            found.problems.push(format!("samples {gap:?} are loud and in no final's text"));
        }
    }
    found
}

fn common(a: &Range<u64>, b: &Range<u64>) -> u64 {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}

/// Parts of `whole` that none of `heard` (sorted by start) covers, cut at `bounds`.
fn gaps(whole: &Range<u64>, heard: &[Range<u64>], bounds: &[u64]) -> Vec<Range<u64>> {
    let mut at = whole.start;
    let mut found = Vec::new();
    let behind = whole.end..whole.end;
    for covered in heard.iter().filter(|h| common(h, whole) > 0).chain(std::iter::once(&behind)) {
        if covered.start > at {
            let mut cuts: Vec<u64> = bounds.iter().copied().filter(|b| at < *b && *b < covered.start).collect();
            cuts.push(covered.start);
            cuts.sort_unstable();
            cuts.dedup();
            for cut in cuts {
                found.push(at..cut);
                at = cut;
            }
        }
        at = at.max(covered.end);
    }
    found
}

/// The samples of a session's log: 16-bit mono at 16 kHz without formats. A number that its source used before is a second
/// copy of the same chunk.
pub fn samples_of(log: &[Message]) -> Vec<i16> {
    let mut taken = std::collections::HashSet::new();
    let header = |m: &Message, name: &str| {
        m.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim().to_owned())
    };
    let fresh = log.iter().filter(|m| match (header(m, "Asr-Source"), header(m, "Asr-Seq")) {
        (Some(source), Some(seq)) => taken.insert((source, seq)),
        _ => true,
    });
    fresh
        .flat_map(|m| m.payload.chunks_exact(2).map(|b| i16::from_le_bytes([b[0], b[1]])).collect::<Vec<_>>())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spell(recording: &Recording, range: Range<u64>) -> String {
        let (mut at, mut words) = (range.start, Vec::new());
        while at < range.end {
            let to = ((at / BLOCK + 1) * BLOCK).min(range.end);
            let word = recording.slice(at..to).iter().fold(Hash::at(at), |h, s| h.sample(*s)).spelled();
            words.push(String::from_utf8_lossy(&word).into_owned());
            at = to;
        }
        words.join(" ")
    }

    fn says(recording: &Recording, claimed: Range<u64>, spoken: Range<u64>) -> StoredFinal {
        let segment =
            json!([{"start_ms": spoken.start / 16, "end_ms": spoken.end / 16, "text": spell(recording, spoken)}]);
        let json = json!({"from_sample": claimed.start, "to_sample": claimed.end, "segments": segment});
        StoredFinal { seq: 1, headers: Default::default(), bytes: 0, json }
    }

    fn silent(claimed: Range<u64>) -> StoredFinal {
        let json = json!({"from_sample": claimed.start, "to_sample": claimed.end, "segments": []});
        StoredFinal { seq: 2, headers: Default::default(), bytes: 0, json }
    }

    /// Five seconds of noise between two of silence.
    fn recording() -> Recording {
        let mut dice = crate::dice::Dice::new(5);
        let noise = (0..80_000).map(|_| ((dice.unit() - 0.5) * 20_000.0) as i16);
        Recording::new(std::iter::repeat_n(0, 16_000).chain(noise).chain(std::iter::repeat_n(0, 16_000)).collect())
    }

    #[test]
    fn words_are_spelled_as_the_contract_says() {
        let recording = Recording::new((0..8_000).map(|n| (n % 251) as i16 - 125).collect());
        let text = spell(&recording, 0..8_000);
        assert_eq!(text.split(' ').count(), 2);
        assert!(text.bytes().all(|b| b == b' ' || CONSONANTS.contains(&b) || VOWELS.contains(&b)), "{text}");
        assert_ne!(spell(&recording, 0..3_999), spell(&recording, 0..4_000));
    }

    #[test]
    fn text_is_laid_back_onto_its_samples_wherever_it_is() {
        let recording = recording();
        for range in [16_100..40_003, 16_000..20_000, 17_000..17_900, 19_999..24_001, 20_000..60_000] {
            let text = spell(&recording, range.clone());
            let words: Vec<&str> = text.split(' ').collect();
            let hint = range.start / 16 * 16..range.end / 16 * 16;
            assert_eq!(recording.find(&words, &hint), Some(range.clone()), "{range:?}");
            if words.len() > 2 {
                assert_eq!(recording.find(&words, &(0..range.end)).map(|r| r.start), Some(range.start), "a wrong hint");
            }
            assert_eq!(recording.find(&["baba", "x"], &hint), None);
        }
    }

    #[test]
    fn nothing_is_wrong_with_a_right_transcript() {
        let recording = recording();
        let finals = [says(&recording, 0..50_000, 13_600..50_000), says(&recording, 50_000..112_000, 50_000..98_000)];
        assert_eq!(account(&recording, &finals), Account::default());
    }

    #[test]
    fn what_is_lost_repeated_or_invented_shows() {
        let recording = recording();
        let hole = [says(&recording, 0..40_000, 13_600..40_000), says(&recording, 50_000..112_000, 50_000..98_000)];
        let found = account(&recording, &hole);
        assert_eq!((found.lost, found.repeated, found.problems.len()), (10_000, 0, 1));
        let twice = [
            says(&recording, 0..50_000, 13_600..50_000),
            says(&recording, 0..50_000, 13_600..50_000),
            says(&recording, 50_000..112_000, 49_000..98_000),
        ];
        let found = account(&recording, &twice);
        assert_eq!((found.lost, found.repeated, found.finals_repeated), (0, 50_000, 2));
        assert_eq!(found.problems.len(), 1, "it speaks of samples before its own: {:?}", found.problems);
        let mut wrong = says(&recording, 0..112_000, 13_600..98_000);
        wrong.json["segments"][0]["text"] = json!("baba dodo gigi");
        let found = account(&recording, &[wrong]);
        assert_eq!((found.lost, found.problems.len()), (80_000, 2));
    }

    #[test]
    fn a_click_at_a_bound_is_not_a_loss() {
        let recording = recording();
        let finals = [says(&recording, 0..94_000, 13_600..94_000), silent(94_000..112_000)];
        let found = account(&recording, &finals);
        assert_eq!((found.lost, found.clicks), (0, 2_000));
        let far = account(&recording, &[says(&recording, 0..112_000, 13_600..90_000)]);
        assert_eq!((far.lost, far.clicks), (6_000, 0), "too long for a click");
        assert_eq!(account(&recording, &finals[..1]).lost, 18_000, "what no final covers is lost, loud or not");
    }

    #[test]
    fn what_a_bad_resume_leaves_out_is_lost_and_no_click() {
        let recording = recording();
        // In the middle of the noise, with noise before and behind: however short, somebody skipped it.
        for late in [1_000, 2_000, 3_000] {
            let resumed = 50_000 + late;
            let finals =
                [says(&recording, 0..50_000, 13_600..50_000), says(&recording, 50_000..112_000, resumed..98_000)];
            let found = account(&recording, &finals);
            assert_eq!((found.lost, found.clicks, found.problems.len()), (late, 0, 1), "{late} samples late");
        }
        let early = [says(&recording, 0..50_000, 13_600..49_000), says(&recording, 50_000..112_000, 50_000..98_000)];
        assert_eq!(account(&recording, &early).lost, 1_000, "the end of a final that was not heard out");
        // Between a bound and silence it is one, up to what the detector wants.
        let tail = |from: u64| [says(&recording, 0..from, 13_600..from), silent(from..112_000)];
        assert_eq!(account(&recording, &tail(94_000)).lost, 0);
        assert_eq!(account(&recording, &tail(93_000)).lost, 3_000);
    }

    #[test]
    fn second_copies_of_a_chunk_count_once() {
        let chunk = |seq: u64, number: &str, sample: i16| Message {
            seq,
            subject: String::new(),
            headers: [("Asr-Source".to_owned(), "s".to_owned()), ("Asr-Seq".to_owned(), number.to_owned())].into(),
            payload: sample.to_le_bytes().to_vec().into(),
        };
        assert_eq!(samples_of(&[chunk(1, "0", 7), chunk(2, "1", 8), chunk(3, "0", 7)]), [7, 8]);
    }
}
