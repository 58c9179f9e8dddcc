//! Values of tomorrow decode to `Unknown`; a stranger's request is refused without a panic.

use std::fmt::Debug;

use serde::de::DeserializeOwned;
use voxfleet_schema::{
    codec,
    event::{Scope, What},
    failure::FailureClass,
    fleet::{ControlReply, ControlRequest, EngineRunState, Provider, Residency, WorkerHealth},
    id::Kind,
    job::{JobStage, JobState},
    session::{Channels, OpenRequest, Policy, Priority, SessionState, Task},
    transcript::{VadKind, WordTiming},
};

#[test]
fn values_of_tomorrow_decode_to_unknown() {
    fn unknown<T: DeserializeOwned + PartialEq + Debug>(expected: T) {
        let read: T = serde_json::from_str("\"from_tomorrow\"").expect("an unknown value reads");
        assert_eq!(read, expected);
    }
    unknown(Kind::Unknown);
    unknown(Task::Unknown);
    unknown(Channels::Unknown);
    unknown(Policy::Unknown);
    unknown(Priority::Unknown);
    unknown(VadKind::Unknown);
    unknown(WordTiming::Unknown);
    unknown(Scope::Unknown);
    unknown(What::Unknown);
    unknown(FailureClass::Unknown);
    unknown(Provider::Unknown);
    unknown(Residency::Unknown);
    unknown(EngineRunState::Unknown);
    unknown(WorkerHealth::Unknown);
    unknown(SessionState::Unknown);
    unknown(ControlReply::Unknown);
    unknown(JobState::Unknown);
    unknown(JobStage::Unknown);
    let request: ControlRequest = serde_json::from_str(r#"{"do":"dance","with":"gpu-1"}"#).expect("reads");
    assert_eq!(request, ControlRequest::Unknown);
}

#[test]
fn a_strangers_request_is_refused_without_a_panic() {
    let cases: [(&[u8], Option<&str>); 10] = [
        (b"", None),
        (b"{", None),
        (b"null", None),
        (b"[]", None),
        (br#"{"session":7}"#, None),
        (br#"{"session":"a","options":{"endpoint_ms":"soon"}}"#, None),
        (br#"{"session":"a","options":{"task":"sing"}}"#, None),
        (br#"{"session":"a"}"#, Some(codec::MSGPACK)),
        (b"\xc1\xc1\xc1", Some(codec::MSGPACK)),
        (br#"{"session":"a"}"#, Some("application/xml")),
    ];
    for (body, content_type) in cases {
        let read = codec::from_request::<OpenRequest>(body, content_type);
        assert!(read.is_err(), "{:?} was taken as {read:?}", String::from_utf8_lossy(body));
    }
}
