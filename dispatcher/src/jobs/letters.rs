//! What goes into `ASR_DEAD`: jobs that failed, and published requests that are none.

use bytes::Bytes;
use voxfleet_schema::{
    dead::{DeadLetter, Origin, RefusedRequest},
    failure::Failure,
    id::{Kind, StreamId},
    job::{Inline, JobRecord},
};

use super::request;

/// Enough of a job that failed to submit it again, but for a signature in its URL: that stands in its key only.
pub fn failed(record: &JobRecord, error: &Failure, dispatcher: &str, at_ms: u64) -> DeadLetter {
    let origin = Origin {
        gpu_id: record.worker.as_ref().map(|w| w.gpu_id.clone()),
        incarnation: record.worker.as_ref().map(|w| w.incarnation.clone()),
        epoch: Some(record.epoch),
        dispatcher: Some(dispatcher.to_owned()),
    };
    DeadLetter {
        attempts: record.attempts,
        record: Some(request::told(record)),
        origin,
        ..blank(&record.id, error, at_ms)
    }
}

/// What tells the letter of this failure from that of another one.
pub fn failed_once(record: &JobRecord) -> String {
    format!("dead-job-{}-{}-{}", record.id, record.epoch, record.changed_ms)
}

/// The same of a refused request, by its sequence in the stream of jobs.
pub fn refused_once(seq: u64) -> String {
    format!("dead-request-{seq}")
}

/// What was published, and how much of it is kept.
#[derive(Debug, Clone, Copy)]
pub struct Published<'a> {
    pub seq: u64,
    pub content_type: Option<&'a str>,
    /// The first bytes of its body, and how many there were.
    pub body: &'a [u8],
    pub body_bytes: usize,
}

/// A request that was refused, in its sender's own words without what may be a signature.
pub fn refused(id: &StreamId, published: Published<'_>, error: &Failure, dispatcher: &str, at_ms: u64) -> DeadLetter {
    let (body, body_base64) = match String::from_utf8(request::masked(published.body)) {
        Ok(text) => (Some(text), None),
        Err(bytes) => (None, Some(Inline(Bytes::from(bytes.into_bytes())))),
    };
    let request = RefusedRequest {
        seq: published.seq,
        content_type: published.content_type.map(str::to_owned),
        body_bytes: published.body_bytes as u64,
        body,
        body_base64,
    };
    let origin = Origin { dispatcher: Some(dispatcher.to_owned()), ..Origin::default() };
    DeadLetter { request: Some(request), origin, ..blank(id, error, at_ms) }
}

fn blank(id: &StreamId, error: &Failure, at_ms: u64) -> DeadLetter {
    DeadLetter {
        kind: Kind::Job,
        id: id.clone(),
        error: error.clone(),
        at_ms,
        origin: Origin::default(),
        attempts: 0,
        audio: None,
        record: None,
        request: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{id, job, worker};
    use voxfleet_schema::failure::FailureClass;

    #[test]
    fn a_letter_says_whose_hands_it_was_in_and_carries_no_signature() {
        let record = JobRecord {
            audio: "https://audio.example/a.wav?sig=1".to_owned(),
            worker: Some(worker("g1", "i")),
            epoch: 4,
            attempts: 3,
            ..job("j")
        };
        let letter = failed(&record, &Failure::new(FailureClass::EngineCrash, "x"), "d", 7);
        assert_eq!((letter.kind, letter.at_ms, letter.attempts), (Kind::Job, 7, 3));
        assert_eq!(letter.origin.gpu_id.as_ref().map(|g| g.as_str()), Some("g1"));
        assert_eq!((letter.origin.epoch, letter.origin.dispatcher.as_deref()), (Some(4), Some("d")));
        assert_eq!(letter.record.expect("the record").audio, "https://audio.example/a.wav");
    }

    #[test]
    fn a_refused_request_is_kept_as_it_came() {
        let error = Failure::new(FailureClass::BadRequest, "x");
        let of = |body: &[u8]| {
            let published = Published { seq: 9, content_type: None, body, body_bytes: 100 };
            refused(&id("j"), published, &error, "d", 7).request.expect("the request")
        };
        let text = of(b"{\"audoi\":");
        assert_eq!((text.body.as_deref(), text.body_bytes, text.seq), (Some("{\"audoi\":"), 100, 9));
        assert_eq!(of(&[0xff, 0xfe]).body_base64, Some(Inline(Bytes::from_static(&[0xff, 0xfe]))));
    }
}
