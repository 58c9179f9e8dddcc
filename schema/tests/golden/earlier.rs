//! What earlier versions wrote, byte for byte as their own fixtures had it: it still reads, and nothing of it is passed over.
//! A fleet is upgraded one process after the other, so for a while every type is read by a newer version than wrote it; what
//! lies in streams and buckets is read by newer ones for a day.
//!
//! | folder | version |
//! |---|---|
//! | `earlier/jobs` | when file jobs had come: no drains, no memory of models, no speakers |
//! | `earlier/device` | before voices were told apart |
//! | `earlier/untraced` | before sessions and jobs were part of a trace |
//! | `earlier/engineless` | before keys said which engine is kept |
//!
//! Only fixtures are here that have changed since. When the contract grows again, the present ones go into a folder of
//! their own first.

use std::fs;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use voxfleet_schema::{
    codec,
    dead::DeadLetter,
    fleet::{ControlRequest, FleetStatus, Heartbeat},
    job::{JobList, JobRecord, JobResult, JobStatus, WorkItem},
    session::{SessionRecord, SessionStatus},
    transcript::{Checkpoint, Final, Revision},
};

use crate::fixture;

/// Every file of every folder.
fn all() -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for folder in fs::read_dir(fixture("earlier")).expect("folders of earlier versions") {
        for file in fs::read_dir(folder.expect("a folder").path()).expect("fixtures") {
            let path = file.expect("a fixture").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            found.push((name, fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))));
        }
    }
    found
}

/// As this version understands it, and writes it again.
fn again<T: Serialize + DeserializeOwned>(name: &str, bytes: &[u8]) -> Value {
    let read: Result<T, _> =
        if name.ends_with(".msgpack") { codec::from_msgpack(bytes) } else { codec::from_json(bytes) };
    let read = read.unwrap_or_else(|e| panic!("{name} of an earlier version does not read: {e}"));
    serde_json::to_value(&read).expect("JSON")
}

fn understood(name: &str, bytes: &[u8]) -> Value {
    match name {
        "checkpoint.msgpack" => again::<Checkpoint>(name, bytes),
        "control_assign.json" | "control_release.json" => again::<ControlRequest>(name, bytes),
        "dead_job.json" => again::<DeadLetter>(name, bytes),
        "final.json" => again::<Final>(name, bytes),
        "fleet_status.json" => again::<FleetStatus>(name, bytes),
        "heartbeat.json" | "heartbeat_jobs.json" => again::<Heartbeat>(name, bytes),
        "job_list.json" => again::<JobList>(name, bytes),
        "job_record.json" => again::<JobRecord>(name, bytes),
        "job_result.json" => again::<JobResult>(name, bytes),
        "job_status.json" => again::<JobStatus>(name, bytes),
        "revision.json" => again::<Revision>(name, bytes),
        "session_record.json" => again::<SessionRecord>(name, bytes),
        "session_status.json" => again::<SessionStatus>(name, bytes),
        "work_item.msgpack" => again::<WorkItem>(name, bytes),
        other => panic!("nobody has said what {other} is"),
    }
}

/// What was written and is not there any more, by its place. What has its default value is not written again.
fn missing(was: &Value, is: &Value, place: &str) -> Vec<String> {
    let nothing = |v: &Value| match v {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    };
    match (was, is) {
        (Value::Object(was), Value::Object(is)) => was
            .iter()
            .flat_map(|(name, value)| missing(value, is.get(name).unwrap_or(&Value::Null), &format!("{place}.{name}")))
            .collect(),
        (Value::Array(was), Value::Array(is)) if was.len() == is.len() => {
            was.iter().zip(is).enumerate().flat_map(|(n, (a, b))| missing(a, b, &format!("{place}[{n}]"))).collect()
        }
        (was, is) if was == is || (nothing(was) && nothing(is)) => Vec::new(),
        (was, is) => vec![format!("{place}: {was} became {is}")],
    }
}

#[test]
fn what_earlier_versions_wrote_reads_and_nothing_of_it_is_lost() {
    let all = all();
    assert!(all.len() >= 20, "only {} fixtures of earlier versions", all.len());
    for (name, bytes) in all {
        let was: Value = match name.ends_with(".msgpack") {
            true => rmp_serde::from_slice(&bytes).expect("MessagePack"),
            false => serde_json::from_slice(&bytes).expect("JSON"),
        };
        let lost = missing(&was, &understood(&name, &bytes), &name);
        assert!(lost.is_empty(), "{lost:#?}");
    }
}

#[test]
fn what_is_passed_over_would_be_seen() {
    let (was, is) =
        (serde_json::json!({"a": [{"b": 1, "c": false}], "d": "x"}), serde_json::json!({"a": [{}], "d": "x"}));
    assert_eq!(missing(&was, &is, "t"), ["t.a[0].b: 1 became null"]);
    assert!(missing(&is, &was, "t").is_empty(), "what is new is no loss");
}
