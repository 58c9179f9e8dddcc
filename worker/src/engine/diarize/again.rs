//! All voices of a session heard together once more, at its end. Pure.

use std::collections::BTreeMap;

use voxfleet_diarize::online::{Tuning, Voices};
use voxfleet_schema::{
    codec,
    session::SessionOptions,
    transcript::{Checkpoint, Segment, Speakers, Turn},
};

use super::{attribute, relabel};
use crate::{engine::stream::limits_of, ipc::FinalDraft};

/// Labels of voices that should be other than those shown, by what the last checkpoint knows.
fn changes(checkpoint: Option<&Checkpoint>, options: &SessionOptions) -> BTreeMap<u32, u32> {
    let bytes = checkpoint.and_then(|checkpoint| checkpoint.voices.as_ref());
    let Some(voices) = bytes.and_then(|bytes| codec::from_msgpack::<Voices>(bytes).ok()) else {
        return BTreeMap::new();
    };
    let shown = voices.now();
    let mut labels = voices.reconsider(limits_of(options), &Tuning::default());
    labels.retain(|voice, label| shown.get(voice).is_some_and(|shown| shown != label));
    labels
}

/// Has the checkpoint of an end final, and what it says, know what was found: who speaks on behind it has the label that was
/// shown last, and nobody else gets it.
fn adopt(end: &mut Ending<'_>, changes: &BTreeMap<u32, u32>) {
    let Some(checkpoint) = end.checkpoint else { return };
    let Some(mut voices) = checkpoint.voices.as_ref().and_then(|bytes| codec::from_msgpack::<Voices>(bytes).ok())
    else {
        return;
    };
    voices.adopt(changes);
    if let Some(speakers) = end.speakers {
        speakers.labels = voices.labels();
    }
    match codec::to_msgpack(&voices) {
        Ok(bytes) => checkpoint.voices = Some(bytes.into()),
        Err(error) => tracing::error!(%error, "voices cannot be encoded"),
    }
}

/// What an end final that is not stored yet says of its speakers.
pub(crate) struct Ending<'a> {
    pub(crate) checkpoint: &'a mut Option<Checkpoint>,
    pub(crate) segments: &'a mut Vec<Segment>,
    pub(crate) turns: &'a mut Vec<Turn>,
    pub(crate) speakers: &'a mut Option<Speakers>,
}

impl<'a> From<&'a mut FinalDraft> for Ending<'a> {
    fn from(draft: &'a mut FinalDraft) -> Self {
        let FinalDraft { checkpoint, segments, turns, speakers, .. } = draft;
        Self { checkpoint, segments, turns, speakers }
    }
}

/// Has an end final say what all voices heard together say: the labels that are to be changed before it, too.
pub(crate) fn hear_all(mut end: Ending<'_>, options: &SessionOptions) -> BTreeMap<u32, u32> {
    let changes = changes(end.checkpoint.as_ref(), options);
    if !changes.is_empty() {
        again(end.segments, end.turns, &changes);
        adopt(&mut end, &changes);
    }
    changes
}

/// Puts a final under other labels.
pub(crate) fn again(segments: &mut Vec<Segment>, turns: &mut [Turn], changes: &BTreeMap<u32, u32>) {
    if relabel(turns, changes) {
        *segments = attribute(std::mem::take(segments), turns);
    }
}

/// What a chain of these finals says when its revisions at the end are taken in.
pub fn reconsidered(mut finals: Vec<FinalDraft>, options: &SessionOptions) -> Vec<FinalDraft> {
    let changes = changes(finals.last().and_then(|last| last.checkpoint.as_ref()), options);
    finals.iter_mut().for_each(|draft| again(&mut draft.segments, &mut draft.turns, &changes));
    finals
}

#[cfg(test)]
mod tests {
    use voxfleet_diarize::{hear::Voiced, online::Limits};
    use voxfleet_schema::transcript::SpeakersBy;

    use super::*;
    use crate::{engine::diarize::turns_of, session::tests::draft};

    /// Two seconds of a voice in this direction, in degrees.
    fn said(at: u64, degrees: f32) -> Voiced {
        let (y, x) = degrees.to_radians().sin_cos();
        Voiced {
            from_sample: at * 48_000,
            to_sample: at * 48_000 + 32_000,
            track: 0,
            overlapped: false,
            embedding: Some(vec![x, y]),
            reliable_ms: 2_000,
        }
    }

    #[test]
    fn who_speaks_on_behind_an_end_has_the_label_that_was_shown_last() {
        let (limits, tuning) = (Limits::default(), Tuning::default());
        let mut voices = Voices::new("e");
        // Opened as two people by two far pieces; what lies between shows that they are one.
        let mut heard = |at: u64, degrees: f32| {
            let said = [said(at, degrees)];
            let assigned = voices.hear(&said, limits, &tuning);
            turns_of(&said, &assigned).remove(0)
        };
        let first = heard(0, 0.0);
        let second = heard(1, 69.0);
        assert_ne!(first.speaker, second.speaker);
        for (at, degrees) in [(2, 30.0), (3, 37.0), (4, 33.0), (5, 39.0)] {
            heard(at, degrees);
        }
        let bytes = codec::to_msgpack(&voices).expect("encodes");
        let checkpoint = Checkpoint { voices: Some(bytes.into()), ..Checkpoint::default() };
        let speakers = Speakers { by: SpeakersBy::Changes, labels: 2, late: false, afresh: false, why: None };
        let mut end = FinalDraft {
            turns: vec![second.clone()],
            checkpoint: Some(checkpoint),
            speakers: Some(speakers),
            ..draft()
        };
        let options = SessionOptions::default();
        let changes = hear_all((&mut end).into(), &options);
        assert!(!changes.is_empty(), "{first:?} {second:?}");
        assert_eq!(end.turns[0].speaker, first.speaker, "the end final itself");
        // The next one to speak as the second did, behind this end.
        let bytes = end.checkpoint.as_ref().and_then(|checkpoint| checkpoint.voices.clone()).expect("voices");
        let mut voices: Voices = codec::from_msgpack(&bytes).expect("voices");
        let said = [said(9, 69.0)];
        let assigned = voices.hear(&said, limits, &tuning);
        assert_eq!(turns_of(&said, &assigned)[0].speaker, first.speaker);
        assert_eq!(end.speakers.map(|speakers| speakers.labels), Some(voices.labels()));
        // What was found is found once.
        assert!(super::changes(end.checkpoint.as_ref(), &options).is_empty());
    }
}
