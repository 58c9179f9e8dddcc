//! Pins the bytes on the wire: every type has a fixture in this folder, written as it is and read back the same.
//!
//! A fixture that changes is a change of the contract. After a deliberate one, write them anew:
//! `VOXFLEET_WRITE_GOLDEN=1 cargo test -p voxfleet-schema --test golden`, and read the difference before it lands.
//!
//! | module | pins |
//! |---|---|
//! | `people` | what people may look at: transcripts, events, heartbeats, records, status |
//! | `requests` | what is asked and answered, drains, dead letters |
//! | `jobs` | file jobs, from the request to the result |
//! | `machines` | what only machines exchange |
//! | `earlier` | what earlier versions wrote |
//! | `unknown` | what has no fixture: values of tomorrow, requests of strangers |

mod earlier;
mod jobs;
mod machines;
mod people;
mod requests;
mod unknown;

use std::{fmt::Debug, path::PathBuf};

use serde::{Serialize, de::DeserializeOwned};
use voxfleet_schema::{
    codec,
    id::{GpuId, Incarnation, StreamId, WorkerName},
    session::{Channels, Diarize, Policy, Priority, SessionOptions, Task},
    trace::TraceContext,
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn pinned<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T, encoded: Vec<u8>) -> Vec<u8> {
    let path = fixture(name);
    if std::env::var_os("VOXFLEET_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &encoded).expect("writing a fixture");
    }
    let stored = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(
        String::from_utf8_lossy(&encoded),
        String::from_utf8_lossy(&stored),
        "{name}: what is written differs from the fixture, for {value:?}"
    );
    assert_eq!(encoded, stored, "{name}");
    stored
}

fn json<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let stored = pinned(&format!("{name}.json"), value, codec::to_json(value).expect("encodes"));
    assert_eq!(&codec::from_json::<T>(&stored).expect("decodes"), value, "{name}");
    // A newer writer's fields, at every level, are passed over.
    let mut newer: serde_json::Value = serde_json::from_slice(&stored).expect("JSON");
    add_fields(&mut newer, true);
    let newer = serde_json::to_vec(&newer).expect("JSON");
    assert_eq!(&codec::from_json::<T>(&newer).unwrap_or_else(|e| panic!("{name} with new fields: {e}")), value);
}

/// For requests that take no field they do not know.
fn strict_json<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let stored = pinned(&format!("{name}.json"), value, codec::to_json(value).expect("encodes"));
    assert_eq!(&codec::from_json::<T>(&stored).expect("decodes"), value, "{name}");
    let mut newer: serde_json::Value = serde_json::from_slice(&stored).expect("JSON");
    add_fields(&mut newer, true);
    assert!(serde_json::from_value::<T>(newer).is_err(), "{name} took an unknown field");
}

fn msgpack<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let stored = pinned(&format!("{name}.msgpack"), value, codec::to_msgpack(value).expect("encodes"));
    assert_eq!(&codec::from_msgpack::<T>(&stored).expect("decodes"), value, "{name}");
}

/// Adds an unknown field to every object, except where an object is an enum (`{"error": ..}`) or holds only options,
/// which requests check strictly, or is an event's free `detail`, or maps names to numbers.
fn add_fields(value: &mut serde_json::Value, top: bool) {
    match value {
        serde_json::Value::Object(map) => {
            let is_enum = map.len() == 1 && ["ok", "error", "refused"].iter().any(|k| map.contains_key(*k)) && top;
            for (_, inner) in map
                .iter_mut()
                .filter(|(k, _)| !["options", "detail", "stages", "candidates", "ends"].contains(&k.as_str()))
            {
                add_fields(inner, false);
            }
            if !is_enum {
                map.insert("from_tomorrow".to_owned(), serde_json::json!({"x": [1]}));
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(|i| add_fields(i, false)),
        _ => {}
    }
}

fn stream(text: &str) -> StreamId {
    StreamId::new(text).expect("id")
}

fn worker() -> WorkerName {
    WorkerName { gpu_id: GpuId::new("gpu-7f3a").expect("id"), incarnation: Incarnation::new("w0aB9").expect("id") }
}

fn trace() -> TraceContext {
    TraceContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").expect("a context")
}

fn options() -> SessionOptions {
    SessionOptions {
        model: Some("micro.en".into()),
        language: Some("en".into()),
        task: Task::Translate,
        prompt: Some("a call".into()),
        carry_prompt: true,
        hotwords: vec!["oslo".into(), "paris".into()],
        diarize: Diarize::On,
        min_speakers: Some(1),
        max_speakers: Some(2),
        channels: Channels::Split,
        channel_names: vec![],
        interim: false,
        endpoint_ms: 300,
        policy: Policy::ExactModel,
        priority: Priority::High,
        idle_timeout_s: 30,
    }
}
