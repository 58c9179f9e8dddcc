//! What age takes: waiting sessions whose audio leaves the log before anybody has room, and streams that fill up.

use std::{collections::HashSet, time::Duration};

use voxfleet_nats::{
    kv::Bucket,
    topology::{Usage, names},
};
use voxfleet_schema::{
    audio::AudioFormat,
    event::{Event, Scope, What},
    failure::{Failure, FailureClass},
    id::{GpuId, IdError, Kind, StreamId},
    session::SessionState,
    source::SourceState,
    transcript::{AudioRange, Final, Lost, Resume, Timings, VadKind},
};

use super::{Core, Effect};
use crate::moment::Moment;

/// How long before its audio expires a waiting session is told about.
const TOLD_BEFORE: Duration = Duration::from_secs(300);
/// With a short retention: a share of it instead, as those five minutes are of an hour.
const TOLD_BEFORE_SHARE: u32 = 12;
/// Looks within one retention: one in ten seconds with an hour.
const LOOKS: u32 = 360;
/// A chain whose end could not be written is tried again.
const CLOSE_AGAIN: Duration = Duration::from_secs(60);
/// A stream above the first share is told about, and again only after it was below the second.
const FILLING: f64 = 0.8;
const FILLING_NO_MORE: f64 = 0.75;
/// These drop what is old when they are full: that is their usual state.
const DROPS_OLD: [&str; 3] = [names::LIVE, names::PARTIAL, names::EVENT];

/// What is remembered between two looks.
#[derive(Debug, Default)]
pub(super) struct Expiry {
    /// Oldest sequence of the audio stream.
    first_seq: Option<u64>,
    looked: Duration,
    /// Streams told to be filling.
    filling: HashSet<String>,
}

impl Core {
    /// The audio stream's oldest entry, as a probe found it.
    pub fn oldest(&mut self, first_seq: u64) {
        self.expiry.first_seq = Some(first_seq);
    }

    pub(super) fn look_at_expiry(&mut self, now: Moment) {
        let max_age = Duration::from_secs(self.config.topology.audio_max_age_s);
        if now.since(self.expiry.looked) < max_age / LOOKS {
            return;
        }
        self.expiry.looked = now.mono;
        let warn_age = max_age.saturating_sub(TOLD_BEFORE.min(max_age / TOLD_BEFORE_SHARE));
        let (mut failing, mut empty) = (Vec::new(), Vec::new());
        for id in self.waiting.iter() {
            let Some(session) = self.book.session(id) else {
                continue;
            };
            if !session.settled() || session.state() != SessionState::Waiting {
                continue;
            }
            let age = now.since(session.unplaced_since.unwrap_or(now.mono));
            if age >= warn_age && !session.told_failed {
                failing.push(id.clone());
            }
            let Some(first_seq) = self.expiry.first_seq else {
                continue;
            };
            let served = session.chain.map_or(0, |c| c.to_seq);
            // A takeover that found nothing in the log does not know what stood there; age decides.
            let gone = match session.last {
                Some(last) if last > served => (last < first_seq).then_some(last),
                Some(_) => None,
                None => (age >= max_age).then_some(first_seq.saturating_sub(1)).filter(|seq| *seq > served),
            };
            let tried = session.closing_since.is_some_and(|at| now.since(at) < CLOSE_AGAIN);
            if let Some(to_seq) = gone.filter(|_| !tried && !session.end_stands()) {
                empty.push((id.clone(), to_seq));
            }
        }
        for id in failing {
            let Some(session) = self.book.session_mut(&id) else {
                continue;
            };
            session.told_failed = true;
            let why = session.why_waiting.clone();
            let failure = why.unwrap_or_else(|| Failure::new(FailureClass::NoCapacity, "no worker had room"));
            tracing::warn!(session = %id, why = %failure, "the audio of a waiting session expires");
            self.session_event(&id, What::Failed, now, |e| e.error = Some(failure));
        }
        for (id, to_seq) in empty {
            let Some(session) = self.book.session_mut(&id) else {
                continue;
            };
            session.closing_since = Some(now.mono);
            tracing::warn!(session = %id, to_seq, "nothing of a waiting session is left in the log");
            let epoch = session.record.epoch.max(session.chain.map_or(0, |c| c.epoch));
            let trace = session.record.traceparent;
            self.effect(Effect::CloseChain { id, epoch, to_seq, trace });
        }
    }

    /// How full the streams are.
    pub fn usage(&mut self, streams: &[Usage], now: Moment) {
        if let Some(bucket) = streams.iter().find(|s| s.stream == Bucket::Jobs.stream()) {
            let above = if self.jobs.store_filling { FILLING_NO_MORE } else { FILLING };
            self.job_store_usage(bucket.share() > above);
        }
        for stream in streams.iter().filter(|s| !DROPS_OLD.contains(&s.stream.as_str())) {
            if stream.share() < FILLING_NO_MORE {
                self.expiry.filling.remove(&stream.stream);
            }
            if stream.share() <= FILLING || !self.expiry.filling.insert(stream.stream.clone()) {
                continue;
            }
            tracing::warn!(
                stream = stream.stream,
                bytes = stream.bytes,
                max_bytes = stream.max_bytes,
                "stream is filling"
            );
            let mut event = Event::new(Scope::Fleet, &stream.stream, What::StreamFilling, now.unix_ms);
            event.detail = serde_json::json!({ "bytes": stream.bytes, "max_bytes": stream.max_bytes });
            self.effect(Effect::Tell { event: Box::new(event), once: false });
        }
    }
}

/// The end final of a session whose audio is gone: it covers no sample, and says which entries were lost.
pub(crate) fn closing_final(
    id: &StreamId,
    epoch: u64,
    to_seq: u64,
    last: Option<&Final>,
    final_id: String,
) -> Result<Final, IdError> {
    let from_seq = last.map_or(1, |f| f.audio.to_seq + 1).min(to_seq);
    let nobody = || "none".to_owned();
    let resume = Resume {
        seq: to_seq + 1,
        at_sample: 0,
        at_frame: 0,
        format: AudioFormat::default(),
        format_sample: 0,
        producers: SourceState::default(),
        language: None,
    };
    let to_sample = last.map_or(0, |f| f.to_sample);
    Ok(Final {
        kind: Kind::Session,
        id: id.clone(),
        index: last.map_or(0, |f| f.index + 1),
        final_id,
        epoch: epoch.max(last.map_or(0, |f| f.epoch)),
        gpu_id: last.map_or_else(|| GpuId::new("none"), |f| Ok(f.gpu_id.clone()))?,
        model: last.map_or_else(nobody, |f| f.model.clone()),
        device: nobody(),
        engine: nobody(),
        vad: last.map_or(VadKind::Unknown, |f| f.vad),
        from_sample: to_sample,
        to_sample,
        audio: AudioRange { from_seq, to_seq },
        resume: last.map_or(resume, |f| f.resume.clone()),
        checkpoint_seq: last.and_then(|f| f.checkpoint_seq),
        checkpoint_missing: false,
        segments: Vec::new(),
        turns: Vec::new(),
        speakers: None,
        words_omitted: false,
        speech_final: true,
        end: true,
        lost: Some(Lost { from_seq, to_seq }),
        error: Some(Failure::new(FailureClass::NoCapacity, "its audio expired before a worker had room")),
        result: None,
        guards: Vec::new(),
        timings: Timings::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{end_final, id};

    #[test]
    fn a_chain_is_closed_where_it_stands() {
        let first = closing_final(&id("s"), 3, 9, None, "f".to_owned()).expect("a final");
        assert_eq!((first.index, first.epoch, first.from_sample, first.to_sample), (0, 3, 0, 0));
        assert_eq!((first.end, first.lost), (true, Some(Lost { from_seq: 1, to_seq: 9 })));
        let next = closing_final(&id("s"), 3, 9, Some(&end_final("s", 4, 5, 7)), "f".to_owned()).expect("a final");
        assert_eq!((next.index, next.epoch, next.from_sample, next.to_sample), (5, 5, 16_000, 16_000));
        assert_eq!(next.lost, Some(Lost { from_seq: 8, to_seq: 9 }));
        assert_eq!(next.audio.to_seq, 9);
    }
}
