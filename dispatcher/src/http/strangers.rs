//! What strangers write to HTTP, read by the very functions that the routes call, without a server around them. For those who feed
//! parsers with damaged inputs (`tests/parsers`), and for nobody else.

use bytes::Bytes;
use voxfleet_http::axum::{extract::Query, http::Uri};
use voxfleet_schema::{
    audio::AudioFormat,
    id::StreamId,
    job::{AudioUrl, JobRequest, upload_key},
    session::SessionOptions,
};

use super::{
    api,
    asr::{
        frames::{Content, Frames, Head},
        query,
    },
    sessions::ListQuery,
    transcribe::wish::Wish,
};

/// Names and values of a query, as a route gets them.
pub type Pairs = Vec<(String, String)>;

/// What follows the `?` of a URL.
pub fn pairs(text: &str) -> Option<Pairs> {
    of_query(text)
}

fn of_query<T: serde::de::DeserializeOwned>(text: &str) -> Option<T> {
    let uri: Uri = format!("/?{text}").parse().ok()?;
    Query::try_from_uri(&uri).ok().map(|Query(read)| read)
}

/// `/asr`.
pub fn session(pairs: &[(String, String)]) -> Option<(StreamId, SessionOptions, AudioFormat)> {
    query::read(pairs).ok().map(|wish| (wish.session, wish.options, wish.format))
}

/// `/api/transcribe`: its query, then the fields of its form.
pub fn job(pairs: &[(String, String)], form: &[(String, String)]) -> Option<JobRequest> {
    let mut wish = Wish::of_query(pairs).ok()?;
    form.iter().try_for_each(|(name, value)| wish.set(name, value, false)).ok()?;
    let id = wish.id().ok()?;
    wish.request(&id, &AudioUrl::object(&upload_key(&id, "upload"))).ok()
}

/// Whether one of the lists that pages ask for can be meant.
pub fn list(query: &str) -> bool {
    of_query::<ListQuery>(query).is_some()
        || of_query::<api::JobsQuery>(query).is_some()
        || of_query::<api::EventsQuery>(query).is_some()
}

/// Messages of a socket, cut at whole frames.
pub fn samples(format: AudioFormat, messages: &[Bytes]) -> Vec<Bytes> {
    let mut frames = Frames::new(format);
    messages.iter().map(|message| frames.push(message.clone())).collect()
}

/// The first messages of a socket until they tell what they are (a container's name), and all bytes that were held for that.
pub fn head(messages: &[Bytes]) -> (Option<Option<&'static str>>, Bytes, usize) {
    let mut head = Head::default();
    for (at, message) in messages.iter().enumerate() {
        if let Some((content, all)) = head.push(message.clone()) {
            let container = match content {
                Content::Samples => None,
                Content::Container(name) => Some(name),
            };
            return (Some(container), all, at + 1);
        }
    }
    (None, head.finish(), messages.len())
}
