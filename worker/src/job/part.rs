//! A part of a recording as a job: where it begins, and the mark that says that somebody has begun.

use voxfleet_nats::transcript::{Chain, ChainError};
use voxfleet_schema::{
    audio::AudioFormat,
    job::JobPart,
    source::SourceState,
    transcript::{AudioRange, Final, Resume, Timings},
};

use crate::{
    ipc::{AfterFinal, StartPoint},
    session::Names,
};

/// Where it begins when nothing stands in its chain.
pub(crate) fn start_of(part: &JobPart) -> StartPoint {
    let after = part.from.as_deref().map(|start| {
        let (to_sample, to_seq, resume) = (start.to_sample, start.to_seq, start.resume.clone());
        Box::new(AfterFinal { index: 0, to_sample, to_seq, end: false, resume, speakers: None })
    });
    StartPoint { after, ..StartPoint::beginning() }
}

/// Whether this is the mark at the beginning of a part's chain, and none of the recording's finals.
pub(super) fn is_mark(value: &Final) -> bool {
    value.from_sample == value.to_sample && !value.end
}

/// Marks its chain, which is empty, as begun. Somebody else may have done so meanwhile: that is as well.
pub(super) async fn mark(chain: &Chain, names: &Names, epoch: u64, part: &JobPart) -> Result<(), ChainError> {
    chain.store(&mark_of(names, epoch, part), None).await.map(drop)
}

fn mark_of(names: &Names, epoch: u64, part: &JobPart) -> Final {
    let nobody = || "none".to_owned();
    let (at, seq) = part.from.as_ref().map_or((0, 0), |start| (start.to_sample, start.to_seq));
    let beginning = || Resume {
        seq: 1,
        at_sample: 0,
        at_frame: 0,
        format: AudioFormat::default(),
        format_sample: 0,
        producers: SourceState::default(),
        language: None,
    };
    Final {
        kind: names.kind,
        id: names.id.clone(),
        index: 0,
        final_id: uuid::Uuid::new_v4().simple().to_string(),
        epoch,
        gpu_id: names.gpu_id.clone(),
        model: nobody(),
        device: nobody(),
        engine: nobody(),
        vad: part.vad,
        from_sample: at,
        to_sample: at,
        audio: AudioRange { from_seq: seq, to_seq: seq },
        resume: part.from.as_ref().map_or_else(beginning, |start| start.resume.clone()),
        checkpoint_seq: None,
        checkpoint_missing: false,
        segments: Vec::new(),
        turns: Vec::new(),
        speakers: None,
        words_omitted: false,
        speech_final: false,
        end: false,
        lost: None,
        error: None,
        result: None,
        guards: Vec::new(),
        timings: Timings::default(),
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::{
        id::{GpuId, Kind, StreamId},
        job::PartStart,
        transcript::VadKind,
    };

    use super::*;
    use crate::session::tests::final_of;

    #[test]
    fn who_goes_on_behind_the_mark_goes_on_where_the_part_begins() {
        let before = final_of(7);
        let from =
            PartStart { to_sample: before.to_sample, to_seq: before.audio.to_seq, resume: before.resume.clone() };
        let parent = StreamId::new("whole").expect("id");
        let part = JobPart {
            parent,
            number: 3,
            from: Some(Box::new(from)),
            until_sample: None,
            vad: VadKind::Energy,
            recording_bytes: 1,
        };
        let names =
            Names { kind: Kind::Job, id: StreamId::new("part").expect("id"), gpu_id: GpuId::new("g").expect("id") };
        let mark = mark_of(&names, 2, &part);
        assert!(is_mark(&mark) && !is_mark(&before) && mark.epoch == 2);
        assert_eq!(AfterFinal::from(&mark), *start_of(&part).after.expect("behind a final"));
        let first = JobPart { from: None, ..part };
        assert_eq!(start_of(&first), StartPoint::beginning());
        let after = AfterFinal::from(&mark_of(&names, 2, &first));
        assert_eq!((after.to_sample, after.to_seq, after.resume.seq, after.end), (0, 0, 1, false));
    }
}
