//! One transcript as a page reads it: what stands, then what comes.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};
use voxfleet_nats::{
    Nats,
    transcript::{self, Filter, ReadError, Reader, Said, Start},
};
use voxfleet_schema::{
    id::{Kind, StreamId},
    transcript::{Final, Partial, Revision, Segment},
};

/// Finals shown of a long transcript: the last ones.
const MOST_FINALS: usize = 5_000;
const SAMPLES_PER_MS: u64 = 16;

#[derive(Debug, Clone, Serialize)]
struct SegmentView<'a> {
    start_ms: u64,
    end_ms: u64,
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    speaker: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    language: Option<&'a str>,
}

fn segments(segments: &[Segment]) -> Vec<SegmentView<'_>> {
    fn view(s: &Segment) -> SegmentView<'_> {
        SegmentView {
            start_ms: s.start_ms,
            end_ms: s.end_ms,
            text: &s.text,
            speaker: s.speaker.as_deref(),
            channel: s.channel,
            language: s.language.as_deref(),
        }
    }
    segments.iter().map(view).collect()
}

pub(crate) fn final_view(value: &Final) -> Value {
    json!({
        "index": value.index, "from_ms": value.from_sample / SAMPLES_PER_MS, "to_ms": value.to_sample / SAMPLES_PER_MS,
        "epoch": value.epoch, "gpu_id": value.gpu_id, "model": value.model, "device": value.device, "end": value.end,
        "segments": segments(&value.segments), "lost": value.lost.is_some(), "error": value.error,
    })
}

pub(crate) fn partial_view(value: &Partial) -> Value {
    json!({
        "after_index": value.after_index, "committed": value.committed, "tentative": value.tentative,
        "lag_ms": value.lag_ms, "epoch": value.epoch, "progress": value.progress,
    })
}

pub(crate) fn revision_view(value: &Revision) -> Value {
    json!({ "index": value.index, "revision": value.revision, "segments": segments(&value.segments) })
}

/// Which partials and revisions are still news, as DESIGN has it: a lower epoch or index is dropped.
#[derive(Debug, Default)]
pub(crate) struct Follower {
    last: Option<(u64, u64)>,
    revisions: BTreeMap<u64, u64>,
}

impl Follower {
    /// False: it has been seen.
    pub(crate) fn on_final(&mut self, value: &Final) -> bool {
        if self.last.is_some_and(|(index, _)| value.index <= index) {
            return false;
        }
        self.last = Some((value.index, value.epoch));
        true
    }

    pub(crate) fn on_revision(&mut self, value: &Revision) -> bool {
        let seen = self.revisions.entry(value.index).or_insert(0);
        let news = value.revision >= *seen;
        *seen = value.revision.max(*seen);
        news
    }

    pub(crate) fn on_partial(&self, value: &Partial) -> bool {
        match self.last {
            None => true,
            Some((index, epoch)) => value.epoch >= epoch && value.after_index.is_some_and(|after| after >= index),
        }
    }
}

/// What stands of a chain: its last finals as revised.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    pub(crate) finals: Vec<Final>,
    pub(crate) follower: Follower,
}

impl Standing {
    pub(crate) fn view(&self) -> Vec<Value> {
        self.finals.iter().map(final_view).collect()
    }

    /// Ended, and nothing behind the end.
    pub(crate) fn has_ended(&self) -> bool {
        self.finals.last().is_some_and(|last| last.end)
    }

    /// Words have their own times, which nobody is shown here: they would be most of what is held.
    fn take(&mut self, mut said: Said) {
        let segments = match &mut said {
            Said::Final(value) => &mut value.segments,
            Said::Revision(value) => &mut value.segments,
        };
        segments.iter_mut().for_each(|segment| segment.words = Vec::new());
        match said {
            Said::Final(value) => {
                if self.follower.on_final(&value) {
                    if self.finals.len() >= MOST_FINALS {
                        self.finals.remove(0);
                    }
                    self.finals.push(*value);
                }
            }
            Said::Revision(value) => {
                if self.follower.on_revision(&value)
                    && let Ok(at) = self.finals.binary_search_by_key(&value.index, |f| f.index)
                {
                    self.finals[at].segments = value.segments;
                }
            }
        }
    }
}

/// Everything said so far, and the reader that goes on behind it. `has_any`: there is at least one message; without one the
/// reader would wait for ever.
pub(crate) async fn read(
    nats: &Nats,
    kind: Kind,
    id: &StreamId,
    has_any: bool,
) -> Result<(Standing, Reader<Said>), ReadError> {
    let mut reader = transcript::said(nats, &Filter::One(kind, id.clone()), Start::First).brief();
    let mut standing = Standing::default();
    if !has_any {
        return Ok((standing, reader));
    }
    loop {
        match reader.next().await {
            Ok(read) => {
                standing.take(read.value);
                if read.pending == 0 {
                    return Ok((standing, reader));
                }
            }
            Err(ReadError::Malformed { seq, .. }) => tracing::debug!(seq, "not a transcript"),
            Err(error) => return Err(error),
        }
    }
}
