//! What only machines exchange: MessagePack.

use bytes::Bytes;
use serde::Serialize;
use voxfleet_schema::{audio::RawEntry, codec, transcript::Checkpoint};

use crate::{msgpack, people::resume};

#[test]
fn what_only_machines_exchange_is_pinned_messagepack() {
    msgpack(
        "checkpoint",
        &Checkpoint {
            index: 3,
            prompt_tail: "good morning".into(),
            guard_hit: true,
            voices: Some(Bytes::from_static(&[1, 0, 255])),
            ..Checkpoint::default()
        },
    );
    msgpack(
        "raw_entry",
        &RawEntry {
            seq: 44,
            headers: vec![("Asr-Seq".into(), "11".into())],
            payload: Bytes::from_static(&[0, 1, 254, 255]),
        },
    );
    msgpack("resume", &resume());
    #[derive(Serialize)]
    struct Newer {
        index: u64,
        colour: &'static str,
    }
    let newer = codec::to_msgpack(&Newer { index: 5, colour: "red" }).expect("encodes");
    let read: Checkpoint = codec::from_msgpack(&newer).expect("a newer checkpoint reads");
    assert_eq!(read, Checkpoint { index: 5, ..Checkpoint::default() });
}
