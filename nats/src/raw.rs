//! The JetStream API spoken plainly, so that every answer becomes one kind of error; and the few header and reply-subject
//! forms that several modules read.

use std::collections::HashMap;

use async_nats::{
    HeaderMap, StatusCode,
    jetstream::{
        ErrorCode,
        message::{PublishMessage, StreamMessage},
        publish::PublishAck,
        response::Response,
        stream::{self, RawMessage},
    },
};
use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use voxfleet_schema::{
    audio::{ASR_LOG_PREV, ASR_LOG_SEQ},
    codec::{CONTENT_TYPE, JSON, MSGPACK},
    trace::{TRACEPARENT, TraceContext},
};

use crate::{Nats, ServerError};

/// One API request; `subject` without its `$JS.API.`.
pub(crate) async fn api<T: DeserializeOwned>(
    nats: &Nats,
    subject: String,
    request: &(impl Serialize + ?Sized),
) -> Result<T, ServerError> {
    let full = format!("$JS.API.{subject}");
    let refused = nats.denials().publishing(&full);
    let answer = tokio::select! {
        answer = nats.js().request(subject, request) => answer?,
        error = refused => return Err(error),
    };
    match answer {
        Response::Ok(value) => Ok(value),
        Response::Err { error } => Err(error.into()),
    }
}

pub(crate) async fn stream_info(nats: &Nats, stream: &str) -> Result<stream::Info, ServerError> {
    api(nats, format!("STREAM.INFO.{stream}"), &Empty {}).await
}

/// Every subject of a stream that matches `filter` with the number of its messages, page by page.
pub(crate) async fn subject_counts(
    nats: &Nats,
    stream: &str,
    filter: &str,
) -> Result<HashMap<String, u64>, ServerError> {
    #[derive(Serialize)]
    struct Ask<'a> {
        subjects_filter: &'a str,
        offset: usize,
    }
    #[derive(Deserialize)]
    struct Page {
        #[serde(default)]
        total: usize,
        state: State,
    }
    #[derive(Deserialize)]
    struct State {
        #[serde(default)]
        subjects: Option<HashMap<String, u64>>,
    }
    let mut counts = HashMap::new();
    let mut offset = 0;
    loop {
        let ask = Ask { subjects_filter: filter, offset };
        let page: Page = api(nats, format!("STREAM.INFO.{stream}"), &ask).await?;
        let subjects = page.state.subjects.unwrap_or_default();
        offset += subjects.len();
        let last = subjects.is_empty() || offset >= page.total;
        counts.extend(subjects);
        if last {
            return Ok(counts);
        }
    }
}

/// A request without parameters.
#[derive(Serialize)]
pub(crate) struct Empty {}

/// Which message of a stream.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Get<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_by_subj: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) next_by_subj: Option<&'a str>,
}

/// A message as the stream's leader holds it.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) seq: u64,
    pub(crate) subject: String,
    /// Unix time in ms at which it was stored.
    pub(crate) stored_ms: u64,
    /// None when the header block cannot be read at all.
    pub(crate) headers: Option<HeaderMap>,
    pub(crate) payload: Bytes,
}

/// Reads from the stream's leader; never from a replica that may lag. None: the leader says there is none.
pub(crate) async fn leader_get(nats: &Nats, stream: &str, which: &Get<'_>) -> Result<Option<Stored>, ServerError> {
    #[derive(Deserialize)]
    struct Answer {
        message: RawMessage,
    }
    let answer: Answer = match api(nats, format!("STREAM.MSG.GET.{stream}"), which).await {
        Ok(answer) => answer,
        Err(error) if error.is_code(ErrorCode::NO_MESSAGE_FOUND) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut raw = answer.message;
    let (seq, subject) = (raw.sequence, raw.subject.clone());
    let stored_ms = u64::try_from(raw.time.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    let read = StreamMessage::try_from(raw.clone()).map(|message| (Some(message.headers), message.payload));
    let (headers, payload) = match read {
        Ok(read) => read,
        Err(_) => {
            // Headers come from strangers: an unreadable block costs its entry only.
            raw.headers = None;
            (None, StreamMessage::try_from(raw).map_err(ServerError::Unreadable)?.payload)
        }
    };
    Ok(Some(Stored { seq, subject, stored_ms, headers, payload }))
}

/// Publishes into a stream and waits for its answer.
pub(crate) async fn publish(nats: &Nats, subject: String, message: PublishMessage) -> Result<PublishAck, ServerError> {
    let refused = nats.denials().publishing(&subject);
    let publishing = async { Ok(nats.js().send_publish(subject.clone(), message).await?.await?) };
    tokio::select! {
        stored = publishing => stored,
        error = refused => Err(error),
    }
}

/// Removes what stands on `filter`, up to the message before `below` where that is given. Gone already is done.
pub(crate) async fn purge(nats: &Nats, stream: &str, filter: &str, below: Option<u64>) -> Result<(), ServerError> {
    purge_counted(nats, stream, filter, below).await.map(drop)
}

/// The same, and how many there were.
pub(crate) async fn purge_counted(
    nats: &Nats,
    stream: &str,
    filter: &str,
    below: Option<u64>,
) -> Result<u64, ServerError> {
    #[derive(Serialize)]
    struct Purge<'a> {
        filter: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        seq: Option<u64>,
    }
    #[derive(Deserialize)]
    struct Done {
        #[serde(default)]
        purged: u64,
    }
    let done: Done = api(nats, format!("STREAM.PURGE.{stream}"), &Purge { filter, seq: below }).await?;
    Ok(done.purged)
}

/// The server's words for "there is no such message" when it is asked to delete one.
const NOT_THERE: [u64; 3] = [10_037, 10_043, 10_057];

/// Removes one message, without writing over its bytes. False: it was not there.
pub(crate) async fn delete(nats: &Nats, stream: &str, seq: u64) -> Result<bool, ServerError> {
    #[derive(Serialize)]
    struct Which {
        seq: u64,
        no_erase: bool,
    }
    #[derive(Deserialize)]
    struct Done {}
    let error = match api(nats, format!("STREAM.MSG.DELETE.{stream}"), &Which { seq, no_erase: true }).await {
        Ok(Done {}) => return Ok(true),
        Err(error) => error,
    };
    // One of these words stands for any failure, so the message itself is looked for.
    let gone = error.code().is_some_and(|code| NOT_THERE.contains(&code))
        && leader_get(nats, stream, &Get { seq: Some(seq), ..Get::default() }).await?.is_none();
    if gone { Ok(false) } else { Err(error) }
}

/// Whether a stream sent this and not a client. Whoever may read a stream may have its messages sent anywhere in the account,
/// also where he may not publish; the server marks them in a way that he cannot take away.
pub(crate) fn is_from_a_stream(message: &async_nats::Message) -> bool {
    let by_consumer = message.reply.as_ref().is_some_and(|reply| reply.starts_with("$JS."));
    let by_get = message.headers.as_ref().is_some_and(|headers| headers.get("Nats-Stream").is_some());
    by_consumer || by_get
}

pub(crate) fn json_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, JSON);
    headers
}

pub(crate) fn msgpack_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, MSGPACK);
    headers
}

pub(crate) fn json_message(payload: Vec<u8>) -> PublishMessage {
    PublishMessage::build().payload(payload.into()).headers(json_headers())
}

/// What stands for a header block that cannot be read: no reader takes it for a number.
const UNREADABLE: (&str, &str) = ("Asr-Seq", "the headers cannot be read");

/// The producer's `Asr-*` headers and his `traceparent`, sorted by name so that every reader sees the same order; of a name
/// that is given twice the last value counts.
pub(crate) fn asr_headers(headers: Option<&HeaderMap>) -> Vec<(String, String)> {
    let Some(headers) = headers else {
        return vec![(UNREADABLE.0.to_owned(), UNREADABLE.1.to_owned())];
    };
    let mut found: Vec<(String, String)> = headers
        .iter()
        .filter_map(|(name, values)| {
            let name: &str = name.as_ref();
            let ours = name.get(..4).is_some_and(|head| head.eq_ignore_ascii_case("asr-"))
                && !name.eq_ignore_ascii_case(ASR_LOG_SEQ)
                && !name.eq_ignore_ascii_case(ASR_LOG_PREV);
            let trace = name.eq_ignore_ascii_case(TRACEPARENT);
            let value = values.last().filter(|value| ours || (trace && value.as_str().len() <= MAX_TRACEPARENT))?;
            Some((name.to_owned(), value.as_str().to_owned()))
        })
        .collect();
    found.sort_unstable();
    found
}

/// Longest `traceparent` that is looked at, in bytes: one of a later version may have more to say.
const MAX_TRACEPARENT: usize = 128;

/// These headers and the trace that what they stand above is part of.
pub(crate) fn traced(mut headers: HeaderMap, trace: Option<&TraceContext>) -> HeaderMap {
    if let Some(trace) = trace {
        headers.insert(TRACEPARENT, trace.to_string());
    }
    headers
}

/// What the reply subject of a consumer's message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Delivery {
    /// How often the server has sent it, this time included.
    pub(crate) delivered: u64,
    pub(crate) stream_seq: u64,
    pub(crate) consumer_seq: u64,
    /// Unix time in ms at which the server stored the message.
    pub(crate) stored_ms: u64,
    pub(crate) pending: u64,
}

impl Delivery {
    /// `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>`, or the same with domain and
    /// account hash before the stream and possibly a token behind.
    pub(crate) fn parse(reply: &str) -> Option<Self> {
        let rest = reply.strip_prefix("$JS.ACK.")?;
        let mut tokens = [""; 10];
        let mut count = 0;
        for token in rest.split('.') {
            if let Some(place) = tokens.get_mut(count) {
                *place = token;
            }
            count += 1;
        }
        let from = match count {
            7 => 3,
            9.. => 5,
            _ => return None,
        };
        let number = |at: usize| tokens.get(at)?.parse::<u64>().ok();
        Some(Self {
            delivered: number(from - 1)?,
            stream_seq: number(from)?,
            consumer_seq: number(from + 1)?,
            stored_ms: number(from + 2)? / 1_000_000,
            pending: number(from + 3)?,
        })
    }
}

/// What a status message to a pull request means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PullStatus {
    /// The server is alive and has nothing for us.
    Alive,
    /// A request has ended with this many messages undelivered; ask again.
    Ended { unused: usize },
    /// There is no such consumer (any more).
    Gone,
}

pub(crate) fn pull_status(message: &async_nats::Message) -> Option<PullStatus> {
    let status = message.status?;
    let unused = message
        .headers
        .as_ref()
        .and_then(|headers| headers.get("Nats-Pending-Messages"))
        .and_then(|value| value.as_str().parse().ok());
    Some(match status {
        StatusCode::IDLE_HEARTBEAT => PullStatus::Alive,
        StatusCode::NO_RESPONDERS => PullStatus::Gone,
        // Consumer deleted, leadership changed, server shutting down: those carry no count, and every request with them.
        StatusCode::REQUEST_TERMINATED if unused.is_none() => PullStatus::Gone,
        _ => PullStatus::Ended { unused: unused.unwrap_or(usize::MAX) },
    })
}

/// The body of a pull request.
#[derive(Serialize)]
pub(crate) struct PullRequest {
    batch: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_bytes: Option<usize>,
    /// In ns.
    expires: u64,
    /// In ns.
    idle_heartbeat: u64,
}

/// How often an idle pull hears that the server is there.
const HEARTBEAT: std::time::Duration = std::time::Duration::from_secs(1);
/// Silence on a pull after which it is taken for lost: two heartbeats missed and a moment.
pub(crate) const SILENCE: std::time::Duration = std::time::Duration::from_millis(2_500);

impl PullRequest {
    pub(crate) fn body(
        batch: usize,
        max_bytes: Option<usize>,
        expires: std::time::Duration,
    ) -> Result<Bytes, ServerError> {
        let request = PullRequest {
            batch,
            max_bytes,
            expires: expires.as_nanos() as u64,
            idle_heartbeat: HEARTBEAT.as_nanos() as u64,
        };
        serde_json::to_vec(&request).map(Bytes::from).map_err(|error| ServerError::Request(Box::new(error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reply_subjects_of_both_forms_are_read() {
        let want = Delivery { delivered: 1, stream_seq: 42, consumer_seq: 7, stored_ms: 1_700_000_000_123, pending: 3 };
        for reply in [
            "$JS.ACK.ASR_AUDIO.c1.1.42.7.1700000000123456789.3",
            "$JS.ACK.hub.ACCHASH.ASR_AUDIO.c1.1.42.7.1700000000123456789.3",
            "$JS.ACK._.ACCHASH.ASR_AUDIO.c1.1.42.7.1700000000123456789.3.token",
        ] {
            assert_eq!(Delivery::parse(reply), Some(want), "{reply}");
        }
        for bad in ["", "_INBOX.x", "$JS.ACK.", "$JS.ACK.a.b.c", "$JS.ACK.a.b.1.x.1.1.1", "$JS.ACK.a.b.1.1.1.1.1.1"] {
            assert_eq!(Delivery::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_the_producers_headers_are_kept_and_their_order_is_fixed() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("Asr-Source", "s"),
            ("asr-seq", "1"),
            ("Asr-Log-Seq", "9"),
            ("Nats-Msg-Id", "x"),
            ("Asr-End", "0"),
            ("Asr-End", "1"),
        ] {
            headers.append(name, value);
        }
        let want = [("Asr-End", "1"), ("Asr-Source", "s"), ("asr-seq", "1")];
        assert_eq!(asr_headers(Some(&headers)), want.map(|(n, v)| (n.to_owned(), v.to_owned())));
        assert_eq!(asr_headers(Some(&HeaderMap::new())), []);
    }

    #[test]
    fn what_a_stream_sends_is_told_from_what_a_client_says() {
        let message = |reply: Option<&'static str>, header: Option<&'static str>| async_nats::Message {
            subject: "asr.v1.control.g.i".into(),
            reply: reply.map(Into::into),
            payload: Bytes::new(),
            headers: header.map(|name| {
                let mut headers = HeaderMap::new();
                headers.insert(name, "x");
                headers
            }),
            status: None,
            description: None,
            length: 0,
        };
        for (reply, header, want) in [
            (Some("_INBOX_dispatcher.a.b"), Some("Content-Type"), false),
            (None, None, false),
            (Some("$JS.ACK.OBJ_asr_media.c.1.1.1.1.0"), None, true),
            (None, Some("Nats-Stream"), true),
        ] {
            assert_eq!(is_from_a_stream(&message(reply, header)), want, "{reply:?} {header:?}");
        }
    }

    #[test]
    fn an_unreadable_header_block_makes_a_bad_chunk() {
        let entry = voxfleet_schema::audio::RawEntry { seq: 1, headers: asr_headers(None), payload: Bytes::from("ab") };
        assert!(voxfleet_schema::audio::ChunkHeaders::of(&entry).is_err());
    }
}
