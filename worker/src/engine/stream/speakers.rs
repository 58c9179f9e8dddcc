//! Whose voices a session has heard, and what its finals say of them.
//!
//! Invariants:
//! - Finals get their labels in the order of the chain, however late their voices are heard: what is shown depends on the log
//!   alone.
//! - A label is shown only where a checkpoint that knows it is stored: with its final, or as a revision behind a later one.
//! - A label is never given to somebody else, not even where the voices of earlier finals are lost: it counts on.

use std::{collections::VecDeque, ops::Range};

use voxfleet_diarize::online::{Limits, Tuning, Voices};
use voxfleet_schema::{
    codec,
    session::{Channels, Diarize, SessionOptions},
    transcript::{Segment, Speakers, SpeakersBy},
};

use crate::{
    engine::diarize::{Heard, Listened, attribute, turns_of},
    ipc::{RevisionDraft, StartPoint, Told},
};

/// A final whose voices were not heard when its words were said.
struct Owed {
    index: u64,
    segments: Vec<Segment>,
    heard: Option<Result<Heard, String>>,
}

pub(super) struct Tellers {
    voices: Voices,
    limits: Limits,
    /// What the last final said.
    last: Option<Speakers>,
    /// The voices of earlier finals are not known; no final has said so yet.
    afresh: bool,
    owed: VecDeque<Owed>,
    revisions: Vec<RevisionDraft>,
}

impl Tellers {
    /// None where speakers are not asked for.
    pub(super) fn new(options: &SessionOptions, start: &StartPoint) -> Option<Self> {
        if options.diarize == Diarize::Off || options.channels == Channels::Split {
            return None;
        }
        let last = start.after.as_ref().and_then(|after| after.speakers.clone());
        let shown = last.as_ref().map_or(0, |last| last.labels);
        let kept = start.checkpoint.voices.as_ref().and_then(|bytes| match codec::from_msgpack::<Voices>(bytes) {
            Ok(voices) => Some(voices),
            Err(error) => {
                tracing::warn!(%error, "the voices of a checkpoint are not readable");
                None
            }
        });
        let afresh = kept.is_none() && shown > 0;
        let voices = kept.unwrap_or_else(|| Voices::after(shown));
        let limits = limits_of(options);
        Some(Self { voices, limits, last, afresh, owed: VecDeque::new(), revisions: Vec::new() })
    }

    /// Whether there are finals that still wait for their speakers.
    pub(super) fn owes(&self) -> bool {
        self.owed.iter().any(|owed| owed.heard.is_none())
    }

    /// What was heard of an earlier final.
    pub(super) fn heard(&mut self, index: u64, heard: Result<Heard, String>) {
        if let Some(owed) = self.owed.iter_mut().find(|owed| owed.index == index) {
            owed.heard = Some(heard);
        }
    }

    /// What the next final says, and the revisions of those before it that are possible now.
    pub(super) fn tell(&mut self, index: u64, segments: Vec<Segment>, listened: Listened) -> Told {
        while let Some(Owed { heard: Some(_), .. }) = self.owed.front()
            && let Some(Owed { index, segments, heard: Some(heard) }) = self.owed.pop_front()
        {
            let Told { segments, turns, speakers } = self.label(segments, heard);
            self.revisions.push(RevisionDraft { index, segments, turns, speakers });
        }
        match listened {
            Listened::NotAsked => Told { segments, turns: Vec::new(), speakers: self.last.clone().map(repeated) },
            Listened::Heard(heard) if self.owed.is_empty() => self.label(segments, heard),
            Listened::Heard(heard) => self.postpone(Owed { index, segments, heard: Some(heard) }),
            Listened::Late(_) => self.postpone(Owed { index, segments, heard: None }),
        }
    }

    fn postpone(&mut self, owed: Owed) -> Told {
        let by = self.last.as_ref().map_or(SpeakersBy::None, |last| last.by);
        let speakers = Speakers { by, labels: self.voices.labels(), late: true, afresh: false, why: None };
        self.last = Some(speakers.clone());
        let segments = owed.segments.clone();
        self.owed.push_back(owed);
        Told { segments, turns: Vec::new(), speakers: Some(speakers) }
    }

    fn label(&mut self, segments: Vec<Segment>, heard: Result<Heard, String>) -> Told {
        let (by, why, segments, turns) = match heard {
            Err(why) => (SpeakersBy::None, Some(why), segments, Vec::new()),
            Ok(heard) => {
                // What another encoder says of a voice means nothing to this one.
                self.afresh |= self.voices.encoder() != heard.encoder && self.voices.labels() > 0;
                let known = std::mem::replace(&mut self.voices, Voices::new(""));
                self.voices = known.under(&heard.encoder);
                let assigned = self.voices.hear(&heard.voiced, self.limits, &Tuning::default());
                let turns = turns_of(&heard.voiced, &assigned);
                (heard.by, heard.why, attribute(segments, &turns), turns)
            }
        };
        let afresh = std::mem::take(&mut self.afresh);
        let speakers = Speakers { by, labels: self.voices.labels(), late: false, afresh, why };
        self.last = Some(speakers.clone());
        Told { segments, turns, speakers: Some(speakers) }
    }

    /// For the checkpoint of the final that was just told.
    pub(super) fn voices(&self) -> Option<bytes::Bytes> {
        if self.voices.labels() == 0 {
            return None;
        }
        match codec::to_msgpack(&self.voices) {
            Ok(bytes) => Some(bytes.into()),
            Err(error) => {
                tracing::error!(%error, "voices cannot be encoded");
                None
            }
        }
    }

    pub(super) fn take_revisions(&mut self) -> Vec<RevisionDraft> {
        std::mem::take(&mut self.revisions)
    }
}

/// What each final says where channels are split.
pub(super) fn by_channels(options: &SessionOptions) -> Option<Speakers> {
    let by = Speakers { by: SpeakersBy::Channels, labels: 0, late: false, afresh: false, why: None };
    (options.channels == Channels::Split).then_some(by)
}

/// How many people the session expects.
pub(crate) fn limits_of(options: &SessionOptions) -> Limits {
    Limits { min_speakers: options.min_speakers.map(usize::from), max_speakers: options.max_speakers.map(usize::from) }
}

/// The same of a final in which nobody spoke.
fn repeated(last: Speakers) -> Speakers {
    Speakers { late: false, afresh: false, ..last }
}

/// Speech inside `window`, as the detector heard it.
pub(super) fn inside(speech: &[Range<u64>], window: &Range<u64>) -> Vec<Range<u64>> {
    let clipped = speech.iter().map(|one| one.start.max(window.start)..one.end.min(window.end));
    clipped.filter(|one| !one.is_empty()).collect()
}
