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
pub(crate) fn changes(checkpoint: Option<&Checkpoint>, options: &SessionOptions) -> BTreeMap<u32, u32> {
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
pub(crate) fn adopt(
    checkpoint: &mut Option<Checkpoint>,
    speakers: &mut Option<Speakers>,
    changes: &BTreeMap<u32, u32>,
) {
    let Some(checkpoint) = checkpoint else { return };
    let Some(mut voices) = checkpoint.voices.as_ref().and_then(|bytes| codec::from_msgpack::<Voices>(bytes).ok())
    else {
        return;
    };
    voices.adopt(changes);
    if let Some(speakers) = speakers {
        speakers.labels = voices.labels();
    }
    match codec::to_msgpack(&voices) {
        Ok(bytes) => checkpoint.voices = Some(bytes.into()),
        Err(error) => tracing::error!(%error, "voices cannot be encoded"),
    }
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
