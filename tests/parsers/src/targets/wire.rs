//! Wire types in both codecs, headers of chunks, options of sessions, frames between supervisor and engine.

use serde::{Serialize, de::DeserializeOwned};
use voxfleet_schema::{
    audio::{AudioFormat, ChunkHeaders, RawEntry},
    codec::{self, CodecError},
    dead::DeadLetter,
    event::Event,
    fleet::{ControlReply, ControlRequest, DrainRequest, Drained, FleetStatus, Heartbeat},
    job::{JobList, JobListRequest, JobQuery, JobRecord, JobRequest, JobResult, JobStatus, Submitted, WorkItem},
    plan::{FleetPlan, PlanRequest},
    session::{Closed, OpenRequest, Opened, Reply, SessionOptions, SessionRecord, SessionRequest, SessionStatus},
    transcript::{Checkpoint, Final, Partial, Resume, Revision},
};
use voxfleet_worker::ipc::{
    FromEngine, ToEngine,
    transport::{BlockingReader, BlockingWriter},
};

type Read<T> = fn(&[u8]) -> Result<T, CodecError>;
type Write<T> = fn(&T) -> Result<Vec<u8>, CodecError>;

/// What is accepted is written, and what was written is read as the same: its bytes are the same again.
fn comes_back<T: Serialize + DeserializeOwned>(input: &[u8], read: Read<T>, write: Write<T>) -> bool {
    let Ok(value) = read(input) else { return false };
    same(&value, read, write);
    true
}

fn same<T: Serialize + DeserializeOwned>(value: &T, read: Read<T>, write: Write<T>) {
    let name = std::any::type_name::<T>();
    let first = write(value).unwrap_or_else(|error| panic!("{name} was accepted and cannot be written: {error:?}"));
    let again = read(&first).unwrap_or_else(|error| panic!("{name} was written and cannot be read: {error:?}"));
    let second = write(&again).unwrap_or_else(|error| panic!("{name} cannot be written again: {error:?}"));
    assert!(first == second, "{name} changes when it is written:\n{first:?}\n{second:?}");
}

macro_rules! any_of {
    ($check:ident, $input:expr, $($kind:ty),+ $(,)?) => {
        [$($check::<$kind>($input)),+].contains(&true)
    };
}

fn of_json<T: Serialize + DeserializeOwned>(input: &[u8]) -> bool {
    comes_back::<T>(input, codec::from_json, codec::to_json)
}

fn of_msgpack<T: Serialize + DeserializeOwned>(input: &[u8]) -> bool {
    comes_back::<T>(input, codec::from_msgpack, codec::to_msgpack)
}

/// What people may look at.
pub(super) fn json(input: &[u8]) -> bool {
    any_of!(
        of_json,
        input,
        Final,
        Partial,
        Revision,
        Event,
        DeadLetter,
        Heartbeat,
        ControlRequest,
        ControlReply,
        DrainRequest,
        Drained,
        FleetStatus,
        SessionRecord,
        SessionStatus,
        JobRecord,
        JobStatus,
        JobList,
        JobResult,
        Submitted,
        Opened,
        Closed,
        Reply<Opened>,
        Reply<Submitted>,
        PlanRequest,
        FleetPlan,
    )
}

/// What only machines exchange.
pub(super) fn msgpack(input: &[u8]) -> bool {
    any_of!(of_msgpack, input, Checkpoint, WorkItem, RawEntry, Resume, JobRequest, OpenRequest, Final)
}

/// A stranger's request, as either codec: what is taken can be kept as JSON, which is how keys keep it.
pub(super) fn requests(input: &[u8]) -> bool {
    let mut taken = false;
    for content_type in [None, Some(codec::JSON), Some(codec::MSGPACK)] {
        if let Ok(request) = JobRequest::decode(input, content_type)
            && request.validate().is_ok()
        {
            same(&request, codec::from_json, codec::to_json);
            same(&request, codec::from_msgpack, codec::to_msgpack);
            taken = true;
        }
        if let Ok(request) = codec::from_request::<OpenRequest>(input, content_type)
            && request.options.validate().is_ok()
        {
            same(&request, codec::from_json, codec::to_json);
            taken = true;
        }
        taken |= codec::from_request::<SessionRequest>(input, content_type).is_ok();
        taken |= codec::from_request::<JobQuery>(input, content_type).is_ok();
        taken |= codec::from_request::<JobListRequest>(input, content_type).is_ok();
    }
    taken
}

/// `Name: value` a line, as a chunk carries them.
pub(super) fn headers(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let pairs: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once(": ")).collect();
    let Ok(read) = ChunkHeaders::parse(pairs.iter().copied()) else { return false };
    if let Some(format) = read.format {
        assert_eq!(format.to_string().parse::<AudioFormat>().ok(), Some(format));
        assert!(format.frame_bytes() > 0 && format.sample_of_frame(1 << 40) > 0, "{format}");
    }
    if let Some(options) = &read.options {
        options.validate().expect("what a chunk asks for was checked");
        same(options.as_ref(), codec::from_json, codec::to_json);
    }
    assert_eq!(ChunkHeaders::parse(pairs).expect("read before").seq, read.seq);
    !text.trim().is_empty()
}

/// `name=value` a line, as a command line or headers set them; or a whole document.
pub(super) fn options(input: &[u8]) -> bool {
    let mut options = SessionOptions::default();
    let mut known = false;
    for (name, value) in String::from_utf8_lossy(input).lines().filter_map(|line| line.split_once('=')) {
        known |= options.set(name, value).is_ok();
    }
    if options.validate().is_ok() {
        same(&options, codec::from_json, codec::to_json);
        same(&options, codec::from_msgpack, codec::to_msgpack);
    }
    of_json::<SessionOptions>(input) || known
}

/// Frames of both directions: a length, then that many bytes.
pub(super) fn engine_frames(input: &[u8]) -> bool {
    framed::<ToEngine>(input) | framed::<FromEngine>(input)
}

fn framed<T: Serialize + DeserializeOwned>(input: &[u8]) -> bool {
    let mut reader = BlockingReader::new(input);
    let mut taken = false;
    while let Ok(frame) = reader.next::<T>() {
        taken = true;
        let write = |frame: &T| {
            let mut bytes = Vec::new();
            BlockingWriter::new(&mut bytes).send(frame).expect("what was read can be sent");
            bytes
        };
        let first = write(&frame);
        let again: T = BlockingReader::new(first.as_slice()).next().expect("what was sent can be read");
        assert!(first == write(&again), "{} changes on its way", std::any::type_name::<T>());
    }
    taken
}
