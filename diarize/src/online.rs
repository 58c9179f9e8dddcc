//! Labels as speech comes: given at once, in order of first showing, never renamed.
//!
//! [`Voices`] is all that a session remembers of its speakers. It is part of the checkpoint, so it is bounded, and it is
//! exact: numbers are kept at the precision with which they travel, so a worker that takes over goes on as if nothing had
//! happened. What is heard is kept in *voices*, small and pure; a label is a person and has one voice or more. A voice
//! that was given the wrong label can be given another one later as a whole: [`Voices::reconsider`] looks at all of them
//! again, and what it finds is published as a revision, never by changing what was said.
//!
//! Time enters as samples of the stream and nothing else.

use std::{cmp::Reverse, collections::BTreeMap};

use serde::{Deserialize, Serialize};

use crate::{
    cluster::{
        ahc::{self, Ahc, Item},
        cosine_distance,
    },
    hear::Voiced,
};

/// Bytes that the vectors of all voices may have together: the state is written with each final.
const MOST_BYTES: usize = 40 << 10;
/// However long the vectors are.
const LEAST_VOICES: usize = 64;
/// Of voices that became part of another one, so many are remembered.
const MOST_ABSORBED: usize = 2_048;

/// Voices that are kept of an encoder with so many dimensions; of more, the two nearest of one label become one. Where there
/// are as many people, who has not been heard for the longest time is forgotten.
pub fn most_voices(dims: usize) -> usize {
    (MOST_BYTES / (size_of::<i16>() * dims.max(1))).clamp(LEAST_VOICES, 256)
}

/// More voices than a label can have had by then.
const LOST_VOICES: u32 = 65_536;

/// How many people there are, as far as the caller knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    pub min_speakers: Option<usize>,
    pub max_speakers: Option<usize>,
}

/// Distances at which decisions change; they belong to an encoder.
///
/// The defaults are for the encoder in `diarize/encoder`, tuned on calls between synthetic voices that the scored calls
/// do not have and on read speech put together to conversations. An encoder whose embeddings of one person lie nearer to
/// each other wants smaller ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// Cosine distance from all known people beyond which somebody new speaks.
    pub open: f32,
    /// So much of a voice must have been heard to open a label.
    pub open_ms: u32,
    /// Pieces of one track that are further apart than this are two people after all: segmentation hears in its window
    /// what an embedding of a second or two may miss, so this is more than what it takes to be somebody new.
    pub apart: f32,
    /// A piece further than this from the voices of its label is a voice of its own.
    pub voice: f32,
    /// A piece goes to another label than its track only if that one is nearer by this much.
    pub margin: f32,
    /// Where [`Voices::reconsider`] stops clustering,
    pub offline: f32,
    /// how much of a distance it takes for shortness,
    pub doubt_ms: f32,
    /// and who speaks less than this is nobody of their own there.
    pub least_ms: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            open: 0.6,
            open_ms: 1_000,
            apart: 0.7,
            voice: 0.2,
            margin: 0.25,
            offline: 0.48,
            doubt_ms: 300.0,
            least_ms: 1_500,
        }
    }
}

impl Tuning {
    /// The same for an encoder whose name says at which distance somebody else speaks: every distance in proportion.
    fn of(&self, encoder: &str) -> Self {
        let percent = encoder.rsplit_once('/').and_then(|(_, percent)| percent.parse::<u16>().ok());
        let Some(percent) = percent.filter(|percent| *percent > 0) else { return *self };
        let scale = f32::from(percent) / 100.0 / self.open;
        Self {
            open: self.open * scale,
            apart: self.apart * scale,
            voice: self.voice * scale,
            margin: self.margin * scale,
            offline: self.offline * scale,
            ..*self
        }
    }
}

/// How an encoder is called under which somebody has chosen [`Tuning::open`] themselves, in hundredths. Voices that were told
/// apart by another measure are not those of this name.
pub fn encoder_name(encoder: &str, distance_percent: Option<u16>) -> String {
    match distance_percent {
        Some(percent) => format!("{encoder}/{percent}"),
        None => encoder.to_owned(),
    }
}

/// What a turn was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assigned {
    /// Index of the turn in what was heard.
    pub turn: usize,
    /// Number of its voice in this chain.
    pub voice: u32,
    /// Number of its person, from 1.
    pub label: u32,
}

/// One voice: a few seconds or many that sound alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Voice {
    number: u32,
    label: u32,
    weight_ms: u64,
    count: u32,
    /// The stretch in which it was heard last.
    #[serde(default)]
    heard: u32,
    /// Mean of the embeddings, weighted; empty where nothing could be heard yet.
    #[serde(with = "small")]
    mean: Vec<i16>,
}

/// A component of 1.
const ONE: f32 = 32_767.0;

impl Voice {
    fn vector(&self) -> Vec<f32> {
        self.mean.iter().map(|x| f32::from(*x) / ONE).collect()
    }

    fn hear(&mut self, embedding: &[f32], weight_ms: u64) {
        let (old, new) = (self.weight_ms as f64, weight_ms.max(1) as f64);
        if self.mean.len() != embedding.len() {
            self.mean = vec![0; embedding.len()];
        }
        for (mean, x) in self.mean.iter_mut().zip(embedding) {
            let value = (f64::from(*mean) * old + f64::from(x * ONE) * new) / (old + new);
            *mean = value.round().clamp(-f64::from(ONE), f64::from(ONE)) as i16;
        }
        self.weight_ms += weight_ms.max(1);
        self.count += 1;
    }
}

/// Everything a session remembers of its speakers; travels in the checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Voices {
    encoder: String,
    voices: Vec<Voice>,
    next_voice: u32,
    next_label: u32,
    /// Label and voice of the last turn.
    last: Option<(u32, u32)>,
    /// Stretches heard so far.
    #[serde(default)]
    stretches: u32,
    /// Voices that are part of others now: which, and of which.
    #[serde(with = "pairs")]
    absorbed: Vec<(u32, u32)>,
}

impl Voices {
    pub fn new(encoder: &str) -> Self {
        Self {
            encoder: encoder.to_owned(),
            voices: Vec::new(),
            next_voice: 1,
            next_label: 1,
            last: None,
            stretches: 0,
            absorbed: Vec::new(),
        }
    }

    /// Goes on behind so many labels whose voices are lost: none of them is given again, nor a number of their voices.
    pub fn after(labels: u32) -> Self {
        Self {
            next_voice: labels.saturating_mul(LOST_VOICES).saturating_add(1),
            next_label: labels + 1,
            ..Self::new("")
        }
    }

    /// Goes on under an encoder. Embeddings of another one mean nothing to it: the voices are forgotten then, and their
    /// labels are not used again.
    pub fn under(self, encoder: &str) -> Self {
        if self.encoder == encoder {
            return self;
        }
        Self { next_voice: self.next_voice, next_label: self.next_label, ..Self::new(encoder) }
    }

    pub fn encoder(&self) -> &str {
        &self.encoder
    }

    /// How many labels were ever given.
    pub fn labels(&self) -> u32 {
        self.next_label.saturating_sub(1)
    }

    /// Gives each turn of a stretch its label; `turns` as [`crate::hear::Listener::voices`] made them.
    pub fn hear(&mut self, turns: &[Voiced], limits: Limits, tuning: &Tuning) -> Vec<Assigned> {
        let tuning = &tuning.of(&self.encoder);
        let first_new = self.next_label;
        self.stretches = self.stretches.saturating_add(1);
        let mut units = units(turns, tuning);
        // Those who say most are the surest, and what is known of them helps with the others.
        units.sort_by_key(|unit| Reverse(unit.reliable_ms));
        let mut given: Vec<Option<(u32, u32)>> = vec![None; turns.len()];
        for unit in &units {
            let Some(centre) = &unit.centre else { continue };
            let label = self.label_for(centre, unit, turns, &given, limits, tuning);
            for turn in &unit.turns {
                let Some(embedding) = &turns[*turn].embedding else { continue };
                let own = self.mended(embedding, label, &turns[*turn], tuning);
                given[*turn] = Some((self.remember(embedding, own, turns[*turn].reliable_ms, tuning), own));
            }
        }
        // What could not be heard: its track's label, else whoever spoke before.
        for turn in 0..turns.len() {
            if given[turn].is_none() {
                let same_track = |other: &usize| turns[*other].track == turns[turn].track && given[*other].is_some();
                let known = (0..turns.len())
                    .filter(same_track)
                    .min_by_key(|other| other.abs_diff(turn))
                    .and_then(|other| given[other])
                    .or_else(|| given[..turn].iter().rev().flatten().next().copied())
                    .or(self.last)
                    .or_else(|| given.iter().flatten().next().copied());
                given[turn] = Some(known.unwrap_or_else(|| self.unheard()));
            }
        }
        let given: Vec<(u32, u32)> = given.into_iter().flatten().collect();
        let shown = self.number_in_order(first_new, &given);
        let assigned: Vec<Assigned> = given
            .iter()
            .enumerate()
            .map(|(turn, (voice, label))| Assigned { turn, voice: *voice, label: *shown.get(label).unwrap_or(label) })
            .collect();
        if let Some(last) = assigned.last() {
            self.last = Some((last.voice, last.label));
        }
        self.shrink();
        assigned
    }

    /// The person that a unit is.
    fn label_for(
        &mut self,
        centre: &[f32],
        unit: &Unit,
        turns: &[Voiced],
        given: &[Option<(u32, u32)>],
        limits: Limits,
        tuning: &Tuning,
    ) -> u32 {
        let mut known = self.distances(centre);
        // Who speaks at the same time is somebody else, if there is anybody else.
        let at_once = |label: u32| {
            unit.turns.iter().any(|turn| {
                turns.iter().zip(given).any(|(other, label_of)| {
                    label_of.is_some_and(|(_, l)| l == label)
                        && other.track != turns[*turn].track
                        && overlap(other, &turns[*turn]) > 0
                })
            })
        };
        let excluded: Vec<u32> = known.iter().map(|(label, _)| *label).filter(|label| at_once(*label)).collect();
        let everybody = known.len();
        known.retain(|(label, _)| !excluded.contains(label));
        let may_open = limits.max_speakers.is_none_or(|most| everybody < most.max(1));
        let expected = limits.min_speakers.unwrap_or(1);
        let open = if everybody < expected { tuning.open * 0.6 } else { tuning.open };
        match known.first() {
            Some((_, distance)) if *distance > open && may_open && unit.reliable_ms >= tuning.open_ms => {
                self.new_label()
            }
            Some((label, _)) => *label,
            // Whoever spoke before anybody could be heard is whoever is heard first.
            None if everybody == 0 => {
                let unheard = self.voices.iter().find(|voice| voice.mean.is_empty()).map(|voice| voice.label);
                unheard.unwrap_or_else(|| self.new_label())
            }
            None if may_open && unit.reliable_ms >= tuning.open_ms => self.new_label(),
            None => self.distances(centre).first().map_or(1, |(label, _)| *label),
        }
    }

    /// A piece that is clearly somebody else than its track.
    fn mended(&self, embedding: &[f32], label: u32, turn: &Voiced, tuning: &Tuning) -> u32 {
        let known = self.distances(embedding);
        let of = |wanted: u32| known.iter().find(|(l, _)| *l == wanted).map(|(_, d)| *d);
        match (known.first(), of(label)) {
            (Some((nearest, distance)), Some(own))
                if distance + tuning.margin < own && turn.reliable_ms >= tuning.open_ms =>
            {
                *nearest
            }
            _ => label,
        }
    }

    /// Known people, the nearest first.
    fn distances(&self, embedding: &[f32]) -> Vec<(u32, f32)> {
        let mut sums: BTreeMap<u32, Vec<f32>> = BTreeMap::new();
        for voice in self.voices.iter().filter(|v| v.mean.len() == embedding.len()) {
            let sum = sums.entry(voice.label).or_insert_with(|| vec![0.0; embedding.len()]);
            sum.iter_mut().zip(voice.vector()).for_each(|(s, x)| *s += x * voice.weight_ms as f32);
        }
        let mut distances: Vec<_> =
            sums.into_iter().map(|(label, sum)| (label, cosine_distance(&sum, embedding))).collect();
        distances.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        distances
    }

    fn new_label(&mut self) -> u32 {
        self.next_label += 1;
        self.next_label - 1
    }

    /// Puts an embedding into the nearest voice of its label, or into a new one; the number of that voice.
    fn remember(&mut self, embedding: &[f32], label: u32, reliable_ms: u32, tuning: &Tuning) -> u32 {
        let nearest = self
            .voices
            .iter_mut()
            .filter(|v| v.label == label)
            .map(|v| (if v.mean.is_empty() { 0.0 } else { cosine_distance(&v.vector(), embedding) }, v))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        // What is not sure changes no voice that is.
        let sure = reliable_ms >= tuning.open_ms;
        match nearest {
            Some((distance, voice)) if distance <= tuning.voice || !sure => {
                voice.heard = self.stretches;
                if sure || voice.mean.is_empty() {
                    voice.hear(embedding, u64::from(reliable_ms));
                }
                voice.number
            }
            _ => {
                let mut voice = self.unnamed(label);
                voice.hear(embedding, u64::from(reliable_ms));
                let number = voice.number;
                self.voices.push(voice);
                number
            }
        }
    }

    fn unnamed(&mut self, label: u32) -> Voice {
        self.next_voice += 1;
        let heard = self.stretches;
        Voice { number: self.next_voice - 1, label, weight_ms: 0, count: 0, heard, mean: Vec::new() }
    }

    /// Somebody spoke, nothing could be heard of them, and nobody is known: the first person.
    fn unheard(&mut self) -> (u32, u32) {
        if let Some(voice) = self.voices.last() {
            return (voice.number, voice.label);
        }
        let label = self.new_label();
        let voice = self.unnamed(label);
        let number = voice.number;
        self.voices.push(voice);
        (number, label)
    }

    /// New labels are numbered in the order in which their turns begin; the numbers that change.
    fn number_in_order(&mut self, first_new: u32, given: &[(u32, u32)]) -> BTreeMap<u32, u32> {
        let mut shown = BTreeMap::new();
        for (_, label) in given.iter().filter(|(_, label)| *label >= first_new) {
            let next = first_new + shown.len() as u32;
            shown.entry(*label).or_insert(next);
        }
        // A label that no turn kept was never shown.
        self.next_label = first_new + shown.len() as u32;
        for voice in &mut self.voices {
            voice.label = *shown.get(&voice.label).unwrap_or(&voice.label);
        }
        shown
    }

    /// Keeps to [`most_voices`].
    fn shrink(&mut self) {
        let most = most_voices(self.voices.iter().map(|voice| voice.mean.len()).max().unwrap_or(0));
        while self.voices.len() > most {
            let vectors: Vec<Vec<f32>> = self.voices.iter().map(Voice::vector).collect();
            let mut nearest: Option<(usize, usize, f32)> = None;
            for (i, a) in self.voices.iter().enumerate() {
                for (j, b) in self.voices.iter().enumerate().skip(i + 1) {
                    let distance =
                        if a.label == b.label { cosine_distance(&vectors[i], &vectors[j]) } else { continue };
                    if nearest.is_none_or(|(_, _, d)| distance < d) {
                        nearest = Some((i, j, distance));
                    }
                }
            }
            match nearest {
                Some((into, gone, _)) => {
                    let gone = self.voices.remove(gone);
                    let kept = &mut self.voices[into];
                    let count = kept.count + gone.count;
                    kept.hear(&gone.vector(), gone.weight_ms);
                    (kept.count, kept.heard) = (count, kept.heard.max(gone.heard));
                    let number = kept.number;
                    self.absorbed.iter_mut().filter(|(_, at)| *at == gone.number).for_each(|(_, at)| *at = number);
                    self.absorbed.push((gone.number, number));
                }
                // As many people as voices: of those who were silent longest, who said least is forgotten.
                None => {
                    let order = |voice: &usize| (self.voices[*voice].heard, self.voices[*voice].weight_ms);
                    if let Some(gone) = (0..self.voices.len()).min_by_key(order) {
                        let gone = self.voices.remove(gone);
                        self.absorbed.retain(|(_, into)| *into != gone.number);
                    }
                }
            }
        }
        let beyond = self.absorbed.len().saturating_sub(MOST_ABSORBED);
        self.absorbed.drain(..beyond);
    }

    /// The clustering that [`Voices::reconsider`] does, for whoever has the pieces themselves and not only their voices.
    pub fn offline(limits: Limits, tuning: &Tuning) -> Ahc {
        Ahc {
            threshold: tuning.offline,
            doubt_ms: tuning.doubt_ms,
            min_speakers: limits.min_speakers.unwrap_or(1),
            max_speakers: limits.max_speakers,
            least_ms: tuning.least_ms,
        }
    }

    /// The label that each voice would have if all were heard together; a voice that is not named keeps what it has.
    ///
    /// A person keeps a label that was mostly theirs; people who turn out to be one take the oldest of theirs; a label
    /// never goes to somebody else; who has none left gets a new one.
    pub fn reconsider(&self, limits: Limits, tuning: &Tuning) -> BTreeMap<u32, u32> {
        let tuning = &tuning.of(&self.encoder);
        let heard: Vec<&Voice> = self.voices.iter().filter(|v| !v.mean.is_empty()).collect();
        let items: Vec<Item> = heard.iter().map(|v| Item { vector: v.vector(), weight_ms: v.weight_ms }).collect();
        let clusters = ahc::cluster(&items, &Self::offline(limits, tuning));
        let mut shares: BTreeMap<u32, BTreeMap<usize, u64>> = BTreeMap::new();
        for (voice, cluster) in heard.iter().zip(&clusters) {
            *shares.entry(voice.label).or_default().entry(*cluster).or_default() += voice.weight_ms;
        }
        let mut label_of: BTreeMap<usize, u32> = BTreeMap::new();
        for (label, shares) in &shares {
            let home = shares.iter().max_by_key(|(cluster, weight)| (**weight, Reverse(**cluster)));
            if let Some((cluster, _)) = home {
                // Labels come from the oldest on: the first to find its home here stays.
                label_of.entry(*cluster).or_insert(*label);
            }
        }
        let mut next = self.next_label;
        let mut labels: BTreeMap<u32, u32> = BTreeMap::new();
        for (voice, cluster) in heard.iter().zip(&clusters) {
            let label = *label_of.entry(*cluster).or_insert_with(|| {
                next += 1;
                next - 1
            });
            labels.insert(voice.number, label);
        }
        for (gone, into) in &self.absorbed {
            if let Some(label) = labels.get(into).copied() {
                labels.insert(*gone, label);
            }
        }
        labels
    }

    /// The label that each voice has now.
    pub fn now(&self) -> BTreeMap<u32, u32> {
        let mut labels: BTreeMap<u32, u32> = self.voices.iter().map(|voice| (voice.number, voice.label)).collect();
        let gone: Vec<_> = self.absorbed.iter().filter_map(|(gone, into)| Some((*gone, *labels.get(into)?))).collect();
        labels.extend(gone);
        labels
    }

    /// Goes on with what [`Voices::reconsider`] found, once its revision is published.
    pub fn adopt(&mut self, labels: &BTreeMap<u32, u32>) {
        for voice in &mut self.voices {
            voice.label = *labels.get(&voice.number).unwrap_or(&voice.label);
        }
        if let Some((voice, label)) = &mut self.last {
            *label = *labels.get(voice).unwrap_or(label);
        }
        let highest = labels.values().max().map_or(0, |label| label + 1);
        self.next_label = self.next_label.max(highest);
    }
}

/// What is one person as far as one stretch can say.
struct Unit {
    turns: Vec<usize>,
    /// Sum of their embeddings by their reliable time.
    centre: Option<Vec<f32>>,
    reliable_ms: u32,
}

impl Unit {
    fn of(pieces: Vec<usize>, turns: &[Voiced]) -> Self {
        let mut unit = Self { turns: pieces, centre: None, reliable_ms: 0 };
        for turn in unit.turns.iter().map(|turn| &turns[*turn]) {
            if let Some(embedding) = &turn.embedding {
                let weight = turn.reliable_ms.max(1) as f32;
                let sum = unit.centre.get_or_insert_with(|| vec![0.0; embedding.len()]);
                sum.iter_mut().zip(embedding).for_each(|(s, x)| *s += x * weight);
                unit.reliable_ms += turn.reliable_ms;
            }
        }
        unit
    }
}

/// The pieces of each track; a track whose pieces are too far apart was more than one person, whatever segmentation
/// said.
fn units(turns: &[Voiced], tuning: &Tuning) -> Vec<Unit> {
    let mut by_track: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (index, turn) in turns.iter().enumerate() {
        by_track.entry(turn.track).or_default().push(index);
    }
    let apart = Ahc {
        threshold: tuning.apart,
        doubt_ms: 0.0,
        min_speakers: 1,
        max_speakers: None,
        least_ms: u64::from(tuning.open_ms),
    };
    let mut units = Vec::new();
    for pieces in by_track.into_values() {
        let item = |turn: &usize| {
            let Voiced { embedding, reliable_ms, .. } = &turns[*turn];
            Some(Item { vector: embedding.clone()?, weight_ms: u64::from(*reliable_ms) })
        };
        let (heard, unheard): (Vec<usize>, Vec<usize>) =
            pieces.into_iter().partition(|turn| turns[*turn].embedding.is_some());
        let people = ahc::cluster(&heard.iter().filter_map(item).collect::<Vec<_>>(), &apart);
        for person in 0..people.iter().max().map_or(0, |last| last + 1) {
            let own = heard.iter().zip(&people).filter(|(_, p)| **p == person).map(|(turn, _)| *turn);
            units.push(Unit::of(own.collect(), turns));
        }
        if !unheard.is_empty() {
            units.push(Unit::of(unheard, turns));
        }
    }
    units.sort_by_key(|unit| unit.turns[0]);
    units
}

fn overlap(a: &Voiced, b: &Voiced) -> u64 {
    a.to_sample.min(b.to_sample).saturating_sub(a.from_sample.max(b.from_sample))
}

/// Numbers of two bytes as bytes: half of what they would take one by one.
mod small {
    use std::fmt;

    use serde::{
        Deserializer, Serializer,
        de::{Error, SeqAccess, Visitor},
    };

    pub(super) fn serialize<S: Serializer>(values: &[i16], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    pub(super) struct Bytes;

    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("bytes")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<u8>, A::Error> {
            let mut bytes = Vec::new();
            while let Some(byte) = sequence.next_element()? {
                bytes.push(byte);
            }
            Ok(bytes)
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<i16>, D::Error> {
        let bytes = deserializer.deserialize_bytes(Bytes)?;
        Ok(bytes.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect())
    }
}

/// Pairs of numbers as bytes: seven bits in each, the rest of a number in those behind.
mod pairs {
    use serde::{Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(pairs: &[(u32, u32)], serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::with_capacity(pairs.len() * 4);
        for mut number in pairs.iter().flat_map(|(a, b)| [*a, *b]) {
            while number >= 0x80 {
                bytes.push(number as u8 | 0x80);
                number >>= 7;
            }
            bytes.push(number as u8);
        }
        serializer.serialize_bytes(&bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(u32, u32)>, D::Error> {
        let bytes = deserializer.deserialize_bytes(super::small::Bytes)?;
        let (mut numbers, mut number, mut shift) = (Vec::new(), 0u32, 0);
        for byte in bytes {
            let bits = u32::from(byte & 0x7f);
            // The fifth byte has the last four bits.
            if shift > 28 || (shift == 28 && bits > 0xf) {
                return Err(Error::custom("a number of more than 32 bits"));
            }
            number |= bits << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                numbers.push(number);
                (number, shift) = (0, 0);
            }
        }
        if shift > 0 || numbers.len() % 2 > 0 {
            return Err(Error::custom("half a pair of numbers"));
        }
        let (pairs, _) = numbers.as_chunks::<2>();
        Ok(pairs.iter().map(|[a, b]| (*a, *b)).collect())
    }
}

#[cfg(test)]
#[path = "online_tests.rs"]
mod tests;
