//! Where a long recording is cut into parts, what is known of each, and whose turn it is. Pure; time is an argument.
//!
//! Part `n` is made of the finals that begin in the `n`-th stretch of so many samples. Where finals begin follows from the
//! recording alone, so a part is the same whoever cuts, and wherever in the recording he begins to; its name says of which
//! recording, how cut and how decoded, and a worker that takes the whole over finds what others have done.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use sha2::{Digest, Sha256};
use tokio::time::Instant;
use voxfleet_schema::{
    failure::Failure,
    id::{IdError, StreamId},
    job::{JobPart, PartStart},
    transcript::{Resume, VadKind},
};

use crate::{engine::diarize::Heard, ipc::FinalDraft};

/// Parts that wait for a worker at most. More would only wait, and stand in the way of nobody's but their own parent's turn.
const MOST_WAITING: usize = 8;
/// Parts that others have or wait for at most.
const MOST_ABROAD: usize = 64;
/// Parts that are held at most, those that are done and not copied among them.
const MOST_HELD: usize = 2 * MOST_ABROAD;
/// A part that nobody has got on with for so long is done by who has the whole, when there is nothing else to do: its worker
/// has died and there is no other, or it is slow. Whoever of the two stores a final first, the other goes on behind it.
const STALLED: Duration = Duration::from_secs(15);

/// A final of the whole recording: where it begins and ends, whether it is the last one, and the voices in it, where speakers
/// are asked for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Bound {
    pub(super) from_sample: u64,
    pub(super) to_sample: u64,
    pub(super) end: bool,
    pub(super) heard: Option<Arc<Result<Heard, String>>>,
}

/// What parts are named after: everything that shapes their text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Naming {
    pub(super) parent: StreamId,
    /// Of the parent, Unix time in ms: the same id may come again when all of it has expired.
    pub(super) submitted_ms: u64,
    pub(super) part_samples: u64,
    pub(super) vad: VadKind,
    pub(super) model: String,
    pub(super) recording_bytes: u64,
}

impl Naming {
    /// `language`: the locked one.
    pub(super) fn id(&self, number: u64, language: &str) -> Result<StreamId, IdError> {
        let Self { parent, submitted_ms, part_samples, vad, model, recording_bytes } = self;
        let text = format!(
            "{parent} {submitted_ms} {number} {part_samples} {} {model} {recording_bytes} {language}",
            vad.as_str()
        );
        let hash: String = Sha256::digest(text.as_bytes()).iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        JobPart::id(parent, number, &hash)
    }
}

/// Behind what a part begins.
#[derive(Debug, Clone, PartialEq)]
enum Begins {
    AtTheBeginning,
    Behind(Box<PartStart>),
    /// It was cut from somewhere inside it on.
    Before,
}

/// What is known of a part.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum State {
    /// Nobody has looked whether it has a chain.
    Unseen,
    /// Nobody was asked to do it.
    Free,
    /// It was given out, and nobody has begun.
    Asked,
    /// Somebody has; `at`: when its chain was last seen to grow. `asked`: it was given out by this worker.
    Begun {
        index: u64,
        at: Instant,
        asked: bool,
    },
    Done,
    /// Nobody else will do it.
    Failed(Failure),
}

/// What a look at a part's chain found.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Seen {
    pub(super) index: u64,
    pub(super) end: bool,
    pub(super) error: Option<Failure>,
}

#[derive(Debug)]
pub(super) struct Part {
    pub(super) id: StreamId,
    begins: Begins,
    /// Its finals that do not stand in the chain of the whole.
    pub(super) bounds: VecDeque<Bound>,
    /// No more of them come.
    whole: bool,
    pub(super) state: State,
}

/// What who has the whole decodes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// The whole's own chain goes on here, to this sample at least.
    Direct { until: Option<u64> },
    /// This part, in its own chain.
    Part(u64),
    /// Nothing now.
    Wait,
}

#[derive(Debug)]
pub(super) struct Parts {
    naming: Naming,
    parts: BTreeMap<u64, Part>,
    /// Behind the last bound.
    last: Option<PartStart>,
    /// All is cut.
    ended: bool,
    language: Option<String>,
    /// Only a recording at least so long is given out, in samples.
    longer_than: u64,
    /// Length of the recording, as far as it is known.
    length: u64,
    /// Nothing more is given out.
    closed: bool,
    /// The part that is decoded here, in its own chain ...
    ours: Option<u64>,
    /// ... or the chain of the whole is gone on with.
    pub(super) direct: bool,
}

impl Parts {
    /// `length`: of the recording, where its container says it; 0 = unknown.
    /// `direct`: the chain of the whole is being decoded here.
    pub(super) fn new(naming: Naming, longer_than: u64, length: u64, direct: bool) -> Self {
        Self {
            naming,
            parts: BTreeMap::new(),
            last: None,
            ended: false,
            language: None,
            longer_than,
            length,
            closed: false,
            ours: None,
            direct,
        }
    }

    /// From now on all finals have this language.
    pub(super) fn locked(&mut self, language: &str) -> Result<(), IdError> {
        if self.language.is_none() {
            self.language = Some(language.to_owned());
            for (number, part) in &mut self.parts {
                part.id = self.naming.id(*number, language)?;
            }
        }
        Ok(())
    }

    /// Nothing more is given out: all that is left is decoded here, in one piece.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Whether there is room for what is cut next.
    pub(super) fn takes_cuts(&self) -> bool {
        self.closed || self.parts.len() <= MOST_HELD
    }

    /// Whether anything may be given out.
    pub(super) fn open(&self) -> bool {
        !self.closed && self.language.is_some() && self.length >= self.longer_than
    }

    /// The next final of the recording, undecoded.
    pub(super) fn cut(&mut self, draft: &FinalDraft) -> Result<(), IdError> {
        let number = draft.from_sample / self.naming.part_samples;
        let heard = draft.heard.clone().map(Arc::new);
        let bound = Bound { from_sample: draft.from_sample, to_sample: draft.to_sample, end: draft.end, heard };
        if !self.parts.contains_key(&number) {
            if let Some(mut before) = self.parts.last_entry() {
                before.get_mut().whole = true;
            }
            let begins = match self.last.take() {
                Some(start) => Begins::Behind(Box::new(start)),
                None if draft.from_sample == 0 => Begins::AtTheBeginning,
                None => Begins::Before,
            };
            let id = self.naming.id(number, self.language.as_deref().unwrap_or_default())?;
            let part = Part { id, begins, bounds: VecDeque::new(), whole: false, state: State::Unseen };
            self.parts.insert(number, part);
        }
        if let Some(part) = self.parts.get_mut(&number) {
            part.whole |= draft.end;
            part.bounds.push_back(bound);
        }
        self.ended |= draft.end;
        self.length = self.length.max(draft.to_sample);
        self.last =
            Some(PartStart { to_sample: draft.to_sample, to_seq: draft.audio.to_seq, resume: draft.resume.clone() });
        Ok(())
    }

    /// The chain of the whole ends at this sample now. Where nothing was cut there, what was cut is another chain's.
    pub(super) fn stored(&mut self, to_sample: u64) {
        while let Some(mut first) = self.parts.first_entry() {
            let part = first.get_mut();
            while part.bounds.front().is_some_and(|bound| bound.from_sample < to_sample) {
                part.bounds.pop_front();
            }
            if !(part.whole && part.bounds.is_empty()) {
                break;
            }
            first.remove();
        }
        let next = self.parts.values().find_map(|part| part.bounds.front());
        if next.is_some_and(|next| to_sample > 0 && next.from_sample != to_sample) {
            self.closed = true;
        }
    }

    /// The part that the next final of the whole belongs to.
    pub(super) fn head(&self) -> Option<(u64, &Part)> {
        let (number, part) = self.parts.first_key_value()?;
        (!part.bounds.is_empty()).then_some((*number, part))
    }

    /// It is decoded here from now on; none: there is no such part.
    pub(super) fn ours(&mut self, number: u64, now: Instant) -> Option<StreamId> {
        let part = self.parts.get_mut(&number)?;
        let asked = matches!(part.state, State::Asked | State::Begun { asked: true, .. });
        part.state = State::Begun { index: 0, at: now, asked };
        self.ours = Some(number);
        Some(part.id.clone())
    }

    /// What was decoded here, a part or the chain of the whole, no longer is; `done`: to its end.
    pub(super) fn over(&mut self, number: Option<u64>, done: bool, now: Instant) {
        let Some(number) = number else {
            self.direct = false;
            return;
        };
        self.ours = None;
        if let Some(part) = self.parts.get_mut(&number) {
            // Otherwise somebody else has it.
            part.state = if done { State::Done } else { State::Begun { index: 0, at: now, asked: true } };
        }
    }

    /// Nothing of its chain can be used.
    pub(super) fn failed(&mut self, number: u64, failure: Failure) {
        if let Some(part) = self.parts.get_mut(&number) {
            part.state = State::Failed(failure);
        }
    }

    /// Its chain has been begun by somebody.
    pub(super) fn is_begun(&self, number: u64) -> bool {
        self.parts.get(&number).is_some_and(|part| matches!(part.state, State::Begun { .. }))
    }

    pub(super) fn id(&self, number: u64) -> Option<&StreamId> {
        self.parts.get(&number).map(|part| &part.id)
    }

    /// What a worker needs to know to do this part; none: it was cut from somewhere inside it on.
    pub(super) fn request(&self, number: u64) -> Option<JobPart> {
        let part = self.parts.get(&number).filter(|part| part.whole)?;
        let language = self.language.clone();
        let from = match &part.begins {
            Begins::AtTheBeginning => None,
            Begins::Behind(start) => {
                let resume = Resume { language, ..start.resume.clone() };
                Some(Box::new(PartStart { resume, ..start.as_ref().clone() }))
            }
            Begins::Before => return None,
        };
        Some(self.part(number, from))
    }

    /// The same for one whose chain goes on: that says where.
    pub(super) fn rest(&self, number: u64) -> JobPart {
        self.request(number).unwrap_or_else(|| self.part(number, None))
    }

    fn part(&self, number: u64, from: Option<Box<PartStart>>) -> JobPart {
        let last = self.parts.get(&number).and_then(|part| part.bounds.back());
        JobPart {
            parent: self.naming.parent.clone(),
            number,
            from,
            until_sample: last.filter(|last| !last.end).map(|last| last.to_sample),
            vad: self.naming.vad,
            recording_bytes: self.naming.recording_bytes,
        }
    }

    /// Whose chains are to be looked at.
    pub(super) fn to_look_at(&self) -> Vec<(u64, StreamId)> {
        if !self.open() {
            return Vec::new();
        }
        let looked_for = |state: &State| matches!(state, State::Unseen | State::Asked | State::Begun { .. });
        let parts = self
            .parts
            .iter()
            .filter(|(number, part)| part.whole && looked_for(&part.state) && self.ours != Some(**number));
        parts.take(MOST_ABROAD).map(|(number, part)| (*number, part.id.clone())).collect()
    }

    /// What stands in its chain. True: that is more than a chain that has grown.
    pub(super) fn seen(&mut self, number: u64, seen: Option<Seen>, now: Instant) -> bool {
        let Some(part) = self.parts.get_mut(&number) else { return false };
        let kind = std::mem::discriminant(&part.state);
        part.state = match (seen, &part.state) {
            // Since the look began it may have come to be done here.
            _ if self.ours == Some(number) => return false,
            (None, State::Unseen) => State::Free,
            (None, _) | (Some(_), State::Done | State::Failed(_)) => return false,
            (Some(Seen { error: Some(failure), .. }), _) => State::Failed(failure),
            (Some(Seen { end: true, .. }), _) => State::Done,
            (Some(seen), State::Begun { index, at, asked }) => {
                State::Begun { index: seen.index, at: if seen.index == *index { *at } else { now }, asked: *asked }
            }
            (Some(seen), state) => State::Begun { index: seen.index, at: now, asked: *state == State::Asked },
        };
        std::mem::discriminant(&part.state) != kind
    }

    /// Whether the chain of the whole gets this part's finals from its own chain.
    fn is_copied(&self, part: &Part) -> bool {
        let has_chain = matches!(part.state, State::Begun { .. } | State::Done);
        let is_whole = part.whole && part.begins != Begins::Before;
        // Decoding it in the chain of the whole has begun.
        let is_new = !self.direct && part.bounds.front().is_some_and(|first| self.starts(part) == first.from_sample);
        has_chain || (is_whole && is_new && matches!(part.state, State::Free | State::Asked | State::Unseen))
    }

    fn starts(&self, part: &Part) -> u64 {
        match &part.begins {
            Begins::AtTheBeginning => 0,
            Begins::Behind(start) => start.to_sample,
            Begins::Before => u64::MAX,
        }
    }

    /// What is decoded here next, when nothing is. Parts that others have are theirs: first what the chain of the whole waits
    /// for now or next, then what nobody was asked for, then what nobody has begun. Of those the last: the dispatcher begins
    /// with the first, and of two who do the same part one works for nothing.
    pub(super) fn turn(&self, now: Instant) -> Turn {
        let Some((number, head)) = self.head().filter(|_| self.open()) else {
            return if self.head().is_none() && self.ended { Turn::Wait } else { Turn::Direct { until: None } };
        };
        if !self.is_copied(head) {
            // A part that is not cut to its end is decoded to its end all the same: by then it is.
            let until = head.bounds.back().filter(|_| head.whole).map(|last| last.to_sample);
            return Turn::Direct { until };
        }
        let open = |wanted: fn(&State) -> bool| {
            let parts = self.parts.iter().filter(|(_, part)| part.whole && part.begins != Begins::Before);
            parts.filter(move |(_, part)| wanted(&part.state)).map(|(number, _)| *number)
        };
        // In order as long as nobody else is at it: going back and forth in the recording costs its decoder time.
        let next = self.parts.iter().find(|(_, part)| part.state != State::Done);
        match next.filter(|(_, part)| part.whole && part.begins != Begins::Before) {
            Some((_, Part { state: State::Unseen, .. })) => return Turn::Wait,
            Some((next, Part { state: State::Free | State::Asked, .. })) => return Turn::Part(*next),
            _ => {}
        }
        let unasked = open(|state| *state == State::Free).next();
        if let Some(next) = unasked.or_else(|| open(|state| *state == State::Asked).next_back()) {
            return Turn::Part(next);
        }
        let stalled = |at: Instant| now.saturating_duration_since(at) >= STALLED;
        match &head.state {
            State::Begun { at, .. } if stalled(*at) => Turn::Part(number),
            _ => Turn::Wait,
        }
    }

    /// What is given out now. Of what was found begun, nobody knows whether anybody is still at it: that is given out again,
    /// and whoever has it keeps it.
    pub(super) fn to_give_out(&self) -> Vec<u64> {
        let Some((head, _)) = self.head().filter(|_| self.open()) else { return Vec::new() };
        let count = |wanted: fn(&State) -> bool| self.parts.values().filter(|part| wanted(&part.state)).count();
        let waiting = count(|state| *state == State::Asked);
        let abroad = waiting + count(|state| matches!(state, State::Begun { asked: true, .. }));
        let room = MOST_WAITING.saturating_sub(waiting).min(MOST_ABROAD.saturating_sub(abroad));
        let parts = self.parts.iter().filter(|(number, part)| {
            let wanted = match part.state {
                // The first is done here, and what nobody has begun to copy may be decoded in one piece.
                State::Free => **number > head,
                State::Begun { asked, .. } => !asked,
                _ => false,
            };
            wanted && part.whole && part.begins != Begins::Before && self.ours != Some(**number)
        });
        parts.take(room).map(|(number, _)| *number).collect()
    }

    /// It was given out.
    pub(super) fn given_out(&mut self, number: u64) {
        let Some(part) = self.parts.get_mut(&number) else { return };
        match &mut part.state {
            State::Begun { asked, .. } => *asked = true,
            state @ State::Free => *state = State::Asked,
            State::Unseen | State::Asked | State::Done | State::Failed(_) => {}
        }
    }
}

#[cfg(test)]
mod tests;
