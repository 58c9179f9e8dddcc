//! How a socket is closed, and what its client is told before. Pure.

use serde_json::{Value, json};
use voxfleet_nats::api::ApiError;
use voxfleet_schema::failure::{Failure, FailureClass};

/// Longest reason a close frame carries, in bytes (RFC 6455, 5.5: 125 with the code).
const MOST_REASON: usize = 123;

/// Why a socket is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Goodbye {
    pub(crate) code: u16,
    reason: String,
    /// None: nothing is wrong.
    failure: Option<Failure>,
}

impl Goodbye {
    pub(crate) fn normal(reason: &str) -> Self {
        Self { code: 1000, reason: short(reason), failure: None }
    }

    /// This process stops; another one takes the session on.
    pub(crate) fn restart() -> Self {
        let message = "this server stops; connect again, with ?session= to go on";
        Self::of(1012, Failure::new(FailureClass::Unavailable, message))
    }

    /// The client broke the protocol: the frame's size, text, or nothing that can be read.
    pub(crate) fn broken(code: u16, class: FailureClass, message: &str) -> Self {
        Self::of(code, Failure::new(class, message))
    }

    /// A session that was refused, or cannot go on.
    pub(crate) fn failed(failure: Failure) -> Self {
        Self::of(code_of(failure.class), failure)
    }

    pub(crate) fn not_opened(error: ApiError) -> Self {
        match error {
            ApiError::Refused(failure) => Self::failed(failure),
            other => Self::failed(Failure::new(FailureClass::Unavailable, other.to_string())),
        }
    }

    fn of(code: u16, failure: Failure) -> Self {
        Self { code, reason: short(&failure.message), failure: Some(failure) }
    }

    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    /// What is told before it is closed: a close frame has room for one line only.
    pub(crate) fn told(&self) -> Option<Value> {
        let failure = self.failure.as_ref()?;
        let mut told =
            json!({ "type": "error", "error": failure.message, "class": failure.class.as_str(), "code": self.code });
        if let Some(ms) = failure.retry_after_ms {
            told["retry_after_ms"] = json!(ms);
        }
        Some(told)
    }
}

/// 1003: send something else. 1009: send less. 1008: not this, or not here now, as existing clients know a full server.
/// 1013: the same again, later. 1011: it is our fault.
fn code_of(class: FailureClass) -> u16 {
    use FailureClass::*;
    match class {
        BadAudio | UnsupportedFormat => 1003,
        TooLarge => 1009,
        NoCapacity | NoWorkers | BadRequest | ModelDoesNotFit | ModelMissing | Forbidden | NotFound | AudioAfterEnd
        | StaleSource | Cancelled => 1008,
        Unavailable | Timeout => 1013,
        _ => 1011,
    }
}

/// Cut at a whole character.
fn short(text: &str) -> String {
    let mut end = text.len().min(MOST_REASON);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_fleet_closes_as_its_clients_know_it() {
        let mut full = Failure::new(FailureClass::NoCapacity, "No GPU resources available");
        full.retry_after_ms = Some(700);
        let goodbye = Goodbye::not_opened(ApiError::Refused(full));
        assert_eq!((goodbye.code, goodbye.reason()), (1008, "No GPU resources available"));
        let told = goodbye.told().expect("told");
        assert_eq!((&told["class"], &told["retry_after_ms"]), (&json!("no_capacity"), &json!(700)));
    }

    #[test]
    fn every_refusal_has_its_code() {
        for (class, code) in [
            (FailureClass::NoWorkers, 1008),
            (FailureClass::ModelDoesNotFit, 1008),
            (FailureClass::BadRequest, 1008),
            (FailureClass::BadAudio, 1003),
            (FailureClass::UnsupportedFormat, 1003),
            (FailureClass::TooLarge, 1009),
            (FailureClass::Unavailable, 1013),
            (FailureClass::Internal, 1011),
        ] {
            assert_eq!(Goodbye::failed(Failure::new(class, "why")).code, code, "{class}");
        }
        assert_eq!(Goodbye::not_opened(ApiError::NoDispatcher).code, 1013);
        assert_eq!((Goodbye::restart().code, Goodbye::normal("").told()), (1012, None));
    }

    #[test]
    fn reasons_fit_a_close_frame_and_stay_text() {
        for text in ["ä".repeat(100), "x".repeat(500), "日".repeat(60), "short".to_owned()] {
            let goodbye = Goodbye::normal(&text);
            assert!(goodbye.reason().len() <= MOST_REASON && text.starts_with(goodbye.reason()));
            assert!(goodbye.reason().len() > MOST_REASON - 4 || goodbye.reason() == text);
        }
    }
}
