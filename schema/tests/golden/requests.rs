//! What is asked and answered, and what is kept of what could not be done.

use bytes::Bytes;
use voxfleet_schema::{
    codec,
    dead::{DeadLetter, Origin, RefusedRequest},
    failure::{Failure, FailureClass},
    fleet::{Assignment, ControlReply, ControlRequest, DrainRequest, Drained},
    id::Kind,
    job::Inline,
    session::{Channels, Closed, OpenRequest, Opened, Reply, SessionOptions, SessionRequest, SessionSubjects},
    transcript::AudioRange,
};

use crate::{jobs::job_record, json, options, stream, trace, worker};

#[test]
fn requests_and_answers_are_pinned_json() {
    json("open_request", &OpenRequest { session: stream("call-7"), options: options() });
    let names = vec!["agent".into(), "customer".into()];
    let split = SessionOptions { channels: Channels::Split, channel_names: names, ..SessionOptions::default() };
    json("open_request_split", &OpenRequest { session: stream("call-8"), options: split });
    json("session_request", &SessionRequest { session: stream("call-7") });
    let opened = Opened {
        session: stream("call-7"),
        worker: worker(),
        epoch: 2,
        subjects: SessionSubjects {
            audio: "asr.v1.audio.call-7".into(),
            finals: "asr.v1.transcript.session.call-7.final".into(),
            partials: "asr.v1.transcript.session.call-7.partial".into(),
            events: "asr.v1.event.session.call-7.*".into(),
        },
    };
    json("reply_opened", &Reply::Ok(opened));
    json("reply_closed", &Reply::Ok(Closed { session: stream("call-7"), end_seq: 45 }));
    let refusal =
        Failure { retry_after_ms: Some(2_000), ..Failure::new(FailureClass::NoCapacity, "No GPU resources available") };
    json("reply_refused", &Reply::<Opened>::Error(refusal.clone()));
    let assignment = Assignment {
        kind: Kind::Session,
        id: stream("call-7"),
        epoch: 2,
        options: options(),
        suspect: true,
        crashes: 1,
        suspect_from: Some(96_000),
        model_asked: Some("medium".into()),
        traceparent: Some(trace()),
    };
    json("control_assign", &ControlRequest::Assign(assignment));
    json(
        "control_release",
        &ControlRequest::Release { kind: Kind::Session, id: stream("call-7"), epoch: 2, finish_ms: 2_000 },
    );
    json("control_cancel", &ControlRequest::Cancel { kind: Kind::Job, id: stream("job-1") });
    json("control_prewarm", &ControlRequest::Prewarm { model: "micro.en".into() });
    json("control_drain", &ControlRequest::Drain { deadline_ms: 10_000 });
    json("control_renew", &ControlRequest::Renew);
    json("control_reply_refused", &ControlReply::Refused(refusal));
    let done = codec::to_json(&ControlReply::Done).expect("encodes");
    assert_eq!(done, b"\"done\"");
}

#[test]
fn drains_and_dead_letters_are_pinned_json() {
    let gpu_id = worker().gpu_id;
    json("drained", &Reply::Ok(Drained { workers: vec![worker()], sessions: 3, jobs: 1 }));
    let request = DrainRequest { gpu_id: gpu_id.clone(), deadline_ms: Some(60_000) };
    let text = codec::to_json(&request).expect("encodes");
    assert_eq!(String::from_utf8_lossy(&text), r#"{"gpu_id":"gpu-7f3a","deadline_ms":60000}"#);
    assert!(serde_json::from_str::<DrainRequest>(r#"{"gpu_id":"g","until":1}"#).is_err());
    let parked = DeadLetter {
        kind: Kind::Session,
        id: stream("call-7"),
        error: Failure::new(FailureClass::EngineCrash, "the engine crashed 3 times on this window"),
        at_ms: 1_700_000_009_000,
        origin: Origin {
            gpu_id: Some(gpu_id),
            incarnation: Some(worker().incarnation),
            epoch: Some(2),
            dispatcher: Some("d1".into()),
        },
        attempts: 3,
        audio: Some(AudioRange { from_seq: 40, to_seq: 44 }),
        record: None,
        request: None,
    };
    json("dead_session", &parked);
    let failed = DeadLetter { kind: Kind::Job, audio: None, record: Some(job_record()), ..parked.clone() };
    json("dead_job", &failed);
    let request = RefusedRequest {
        seq: 17,
        content_type: Some("application/json".into()),
        body_bytes: 4,
        body: Some("{hi}".into()),
        body_base64: Some(Inline(Bytes::from_static(&[0, 1, 254, 255]))),
    };
    json("dead_request", &DeadLetter { request: Some(request), record: None, ..failed });
}
