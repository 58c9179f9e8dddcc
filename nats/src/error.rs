//! What can go wrong between us and the server, one kind for all modules; each module's error wraps it.

use async_nats::jetstream::{self, ErrorCode, context::PublishErrorKind};

/// Anything a library below gave as the cause.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// A request or publish that did not succeed at the server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No answer in time. A publish may have been stored all the same.
    #[error("no answer from the server in time")]
    Timeout,
    /// Nobody listens on that subject: no stream, no JetStream, or no service.
    #[error("nobody answers on {0}")]
    NoResponders(String),
    /// JetStream answered with an error of its own.
    #[error("jetstream: {0}")]
    JetStream(#[source] jetstream::Error),
    /// The message is larger than the server's `max_payload`.
    #[error("message is over the server's max_payload")]
    TooLarge,
    /// The server's permissions for this login.
    #[error("this login may not {what} {subject}")]
    Denied { what: &'static str, subject: String },
    /// The same for the subject on which every answer would come.
    #[error("this login may not listen on {inbox}, where answers come: set nats.inbox_prefix to that of its role")]
    NoInbox { inbox: String },
    /// This connection is closed for good.
    #[error("connection is closed")]
    Closed,
    /// The answer cannot be read.
    #[error("unreadable answer from the server")]
    Unreadable(#[source] Source),
    #[error("request failed")]
    Request(#[source] Source),
}

/// The same message id is on its way through a replicated stream at this moment; a moment later it is stored or not.
const IN_PROCESS: ErrorCode = ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT;

/// Account, server, memory, storage, store (a stream's own limit, or its disk), stream against its account's limit.
const FULL: [u64; 6] = [10_002, 10_023, 10_028, 10_047, 10_077, 10_122];

impl ServerError {
    /// The server's own error code, where it gave one.
    pub fn code(&self) -> Option<u64> {
        match self {
            ServerError::JetStream(error) => Some(error.error_code().0),
            _ => None,
        }
    }

    /// Whether the same request may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            ServerError::Timeout | ServerError::NoResponders(_) | ServerError::Request(_) => true,
            ServerError::JetStream(error) => {
                error.code() == 503
                    || matches!(error.error_code(), ErrorCode::CLUSTER_NOT_AVAILABLE | ErrorCode::CLUSTER_NO_PEERS)
                    || error.error_code() == IN_PROCESS
            }
            ServerError::TooLarge
            | ServerError::Denied { .. }
            | ServerError::NoInbox { .. }
            | ServerError::Closed
            | ServerError::Unreadable(_) => false,
        }
    }

    /// 10071, or 10164 while another fenced publish is in flight on a replicated stream: the expected sequence was wrong.
    pub fn is_conflict(&self) -> bool {
        matches!(self.code(), Some(10_071 | 10_164))
    }

    /// There is no room: a stream or the account is at its limit, or the server's store or memory is. Nothing that was
    /// acknowledged before is lost by it; the same request succeeds once something expires or somebody makes room.
    pub fn is_full(&self) -> bool {
        self.code().is_some_and(|code| FULL.contains(&code))
    }

    /// This login lacks a permission: asking again changes nothing until somebody changes the server's configuration.
    pub fn is_denied(&self) -> bool {
        matches!(self, ServerError::Denied { .. } | ServerError::NoInbox { .. })
    }

    pub(crate) fn is_code(&self, code: ErrorCode) -> bool {
        self.code() == Some(code.0)
    }
}

impl From<jetstream::Error> for ServerError {
    fn from(error: jetstream::Error) -> Self {
        ServerError::JetStream(error)
    }
}

/// The JetStream error inside `error`'s causes, if there is one.
fn jetstream_cause(error: &(dyn std::error::Error + 'static)) -> Option<jetstream::Error> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(found) = error.downcast_ref::<jetstream::Error>() {
            return Some(found.clone());
        }
        at = error.source();
    }
    None
}

impl From<jetstream::context::PublishError> for ServerError {
    fn from(error: jetstream::context::PublishError) -> Self {
        if let Some(cause) = jetstream_cause(&error) {
            return ServerError::JetStream(cause);
        }
        match error.kind() {
            PublishErrorKind::TimedOut => ServerError::Timeout,
            PublishErrorKind::StreamNotFound => ServerError::NoResponders("the stream's subject".to_owned()),
            PublishErrorKind::MaxPayloadExceeded => ServerError::TooLarge,
            _ => ServerError::Request(Box::new(error)),
        }
    }
}

impl From<jetstream::context::RequestError> for ServerError {
    fn from(error: jetstream::context::RequestError) -> Self {
        use jetstream::context::RequestErrorKind as Kind;
        if let Some(cause) = jetstream_cause(&error) {
            return ServerError::JetStream(cause);
        }
        match error.kind() {
            Kind::TimedOut => ServerError::Timeout,
            Kind::NoResponders => ServerError::NoResponders("the JetStream API".to_owned()),
            _ => ServerError::Request(Box::new(error)),
        }
    }
}

impl From<async_nats::RequestError> for ServerError {
    fn from(error: async_nats::RequestError) -> Self {
        use async_nats::RequestErrorKind as Kind;
        match error.kind() {
            Kind::TimedOut => ServerError::Timeout,
            Kind::NoResponders => ServerError::NoResponders("that subject".to_owned()),
            Kind::MaxPayloadExceeded => ServerError::TooLarge,
            _ => ServerError::Request(Box::new(error)),
        }
    }
}

impl From<async_nats::PublishError> for ServerError {
    fn from(error: async_nats::PublishError) -> Self {
        match error.kind() {
            async_nats::client::PublishErrorKind::MaxPayloadExceeded => ServerError::TooLarge,
            _ => ServerError::Request(Box::new(error)),
        }
    }
}

impl From<async_nats::SubscribeError> for ServerError {
    fn from(error: async_nats::SubscribeError) -> Self {
        ServerError::Request(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, err_code: u64) -> ServerError {
        let json = serde_json::json!({"code": code, "err_code": err_code, "description": "x"});
        let error: jetstream::Error = serde_json::from_value(json).expect("an error of the server");
        error.into()
    }

    #[test]
    fn no_room_is_told_from_other_refusals() {
        for (code, err_code) in
            [(503, 10_077), (500, 10_047), (503, 10_023), (400, 10_122), (400, 10_002), (500, 10_028)]
        {
            assert!(answer(code, err_code).is_full(), "{err_code}");
        }
        // Too large, conflict, no stream, no leader, no message.
        for (code, err_code) in [(400, 10_054), (400, 10_071), (404, 10_059), (503, 10_008), (404, 10_037)] {
            assert!(!answer(code, err_code).is_full(), "{err_code}");
        }
        assert!(!ServerError::Timeout.is_full() && !ServerError::TooLarge.is_full());
    }
}
