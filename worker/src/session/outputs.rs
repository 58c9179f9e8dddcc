//! Makes what the engine drafted into what goes on the wire: names, index, ids. Pure but for the random id.

use std::time::{SystemTime, UNIX_EPOCH};

use voxfleet_schema::{
    event::{Event, Scope, What},
    failure::{Failure, FailureClass},
    id::{GpuId, Kind, StreamId},
    transcript::{Final, Partial, Revision},
};

use crate::ipc::{FinalDraft, PartialDraft, RevisionDraft, StreamNote};

/// Whose outputs these are.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    pub(crate) kind: Kind,
    pub(crate) id: StreamId,
    pub(crate) gpu_id: GpuId,
}

impl Names {
    pub(crate) fn name(&self) -> (Kind, StreamId) {
        (self.kind, self.id.clone())
    }

    /// Completes a draft as the successor of `last_index`.
    pub(super) fn final_of(
        &self,
        draft: FinalDraft,
        epoch: u64,
        last_index: Option<u64>,
        checkpoint_seq: Option<u64>,
    ) -> Final {
        Final {
            kind: self.kind,
            id: self.id.clone(),
            index: last_index.map_or(0, |index| index + 1),
            final_id: uuid::Uuid::new_v4().simple().to_string(),
            epoch,
            gpu_id: self.gpu_id.clone(),
            model: draft.model,
            device: draft.device,
            engine: draft.engine,
            vad: draft.vad,
            from_sample: draft.from_sample,
            to_sample: draft.to_sample,
            audio: draft.audio,
            resume: draft.resume,
            checkpoint_seq,
            checkpoint_missing: draft.checkpoint_missing,
            segments: draft.segments,
            turns: draft.turns,
            speakers: draft.speakers,
            words_omitted: false,
            speech_final: draft.speech_final,
            end: draft.end,
            lost: draft.lost,
            error: draft.error,
            result: None,
            guards: draft.guards,
            timings: draft.timings,
        }
    }

    pub(super) fn revision_of(&self, draft: RevisionDraft, epoch: u64) -> Revision {
        Revision {
            kind: self.kind,
            id: self.id.clone(),
            index: draft.index,
            // Given when it is stored.
            revision: 0,
            epoch,
            segments: draft.segments,
            turns: draft.turns,
            speakers: draft.speakers,
        }
    }

    pub(super) fn partial_of(
        &self,
        draft: PartialDraft,
        epoch: u64,
        after_index: Option<u64>,
        unfed_ms: u64,
    ) -> Partial {
        Partial {
            kind: self.kind,
            id: self.id.clone(),
            epoch,
            gpu_id: self.gpu_id.clone(),
            after_index,
            from_sample: draft.from_sample,
            to_sample: draft.to_sample,
            committed: draft.committed,
            tentative: draft.tentative,
            lag_ms: draft.lag_ms + unfed_ms,
            progress: None,
        }
    }

    pub(crate) fn event(&self, what: What, epoch: u64) -> Event {
        let scope = match self.kind {
            Kind::Session => Scope::Session,
            Kind::Job => Scope::Job,
            Kind::Unknown => Scope::Unknown,
        };
        let mut event = Event::new(scope, self.id.as_str(), what, unix_ms());
        event.epoch = Some(epoch);
        event.gpu_id = Some(self.gpu_id.to_string());
        event
    }

    pub(super) fn event_of_note(&self, note: StreamNote, epoch: u64) -> (Event, String) {
        let msg_id = format!("{}-{}-{}", self.id, note.what.as_str(), note.seq);
        let mut event = self.event(note.what, epoch);
        event.seq = Some(note.seq);
        event.error = note.failure;
        if !note.detail.is_empty() {
            event.detail = serde_json::Value::String(note.detail);
        }
        (event, msg_id)
    }
}

/// What stands in the chain instead of a final that no server would take: the audio is accounted for, the text is not.
pub(super) fn without_text(mut value: Final, len: usize) -> Final {
    value.segments.clear();
    value.words_omitted = true;
    value.final_id = uuid::Uuid::new_v4().simple().to_string();
    value.error = Some(Failure::new(FailureClass::TooLarge, format!("the text of this final was {len} bytes long")));
    value
}

/// A clock set before 1970 reads as 1970.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// When a session says `lagging` and when `restored`, each once.
#[derive(Debug, Default)]
pub(super) struct LagAlarm {
    lagging: bool,
}

impl LagAlarm {
    const RAISE_MS: u64 = 5_000;
    const CLEAR_MS: u64 = 2_000;

    pub(super) fn observe(&mut self, lag_ms: u64) -> Option<What> {
        if !self.lagging && lag_ms > Self::RAISE_MS {
            self.lagging = true;
            Some(What::Lagging)
        } else if self.lagging && lag_ms < Self::CLEAR_MS {
            self.lagging = false;
            Some(What::Restored)
        } else {
            None
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use voxfleet_schema::{
        audio::AudioFormat,
        source::SourceState,
        transcript::{AudioRange, Resume, Segment, Timings, VadKind},
    };

    use super::*;

    pub(crate) fn draft() -> FinalDraft {
        FinalDraft {
            from_sample: 100,
            to_sample: 200,
            audio: AudioRange { from_seq: 1, to_seq: 2 },
            resume: Resume {
                seq: 1,
                at_sample: 0,
                at_frame: 0,
                format: AudioFormat::default(),
                format_sample: 0,
                producers: SourceState::default(),
                language: None,
            },
            segments: Vec::new(),
            turns: Vec::new(),
            speakers: None,
            speech_final: true,
            end: false,
            lost: None,
            error: None,
            parked: false,
            heard: None,
            guards: Vec::new(),
            checkpoint_missing: false,
            checkpoint: None,
            model: "simulated".to_owned(),
            device: "cpu".to_owned(),
            engine: "simulated".to_owned(),
            vad: VadKind::Energy,
            timings: Timings::default(),
        }
    }

    /// One segment of two words' length.
    pub(crate) fn said(text: &str) -> Vec<Segment> {
        vec![Segment {
            id: 0,
            start_ms: 100,
            end_ms: 900,
            text: text.to_owned(),
            speaker: None,
            channel: None,
            language: None,
            confidence: 1.0,
            words: Vec::new(),
        }]
    }

    fn names() -> Names {
        Names {
            kind: Kind::Session,
            id: StreamId::new("call-1").expect("id"),
            gpu_id: GpuId::new("cpu-test-0").expect("id"),
        }
    }

    /// A final with this index.
    pub(crate) fn final_of(index: u64) -> Final {
        names().final_of(draft(), 1, index.checked_sub(1), None)
    }

    #[test]
    fn finals_continue_the_chain_under_an_id_of_their_own() {
        let first = names().final_of(draft(), 4, None, None);
        let next = names().final_of(draft(), 4, Some(first.index), Some(77));
        assert_eq!((first.index, next.index, next.epoch, next.checkpoint_seq), (0, 1, 4, Some(77)));
        assert_ne!(first.final_id, next.final_id);
        assert_eq!(next.final_id.len(), 32);
        let bare = without_text(next.clone(), 300_000);
        assert_ne!(bare.final_id, next.final_id, "other bytes, another id");
        assert_eq!((bare.to_sample, bare.resume), (next.to_sample, next.resume));
    }

    #[test]
    fn a_note_is_told_once() {
        let note = StreamNote { what: What::Gap, seq: 12, failure: None, detail: "3..5".to_owned() };
        let (event, msg_id) = names().event_of_note(note, 2);
        assert_eq!(msg_id, "call-1-gap-12");
        assert_eq!((event.seq, event.epoch, event.what), (Some(12), Some(2), What::Gap));
    }

    #[test]
    fn lag_is_raised_and_cleared_once_with_a_margin() {
        let mut alarm = LagAlarm::default();
        let told: Vec<_> = [0, 5_000, 5_001, 9_000, 3_000, 2_000, 1_999, 4_000].map(|lag| alarm.observe(lag)).into();
        let expected = [None, None, Some(What::Lagging), None, None, None, Some(What::Restored), None];
        assert_eq!(told, expected);
        let partial = names().partial_of(
            PartialDraft { from_sample: 0, to_sample: 9, committed: "a".into(), tentative: "b".into(), lag_ms: 40 },
            3,
            Some(7),
            100,
        );
        assert_eq!((partial.lag_ms, partial.after_index, partial.epoch), (140, Some(7), 3));
    }
}
