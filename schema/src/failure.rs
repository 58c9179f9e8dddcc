//! The closed set of failure classes. They are the only error label in metrics and the only thing a caller may match.

use serde::{Deserialize, Serialize};

/// Why something failed. Text beside it is for people; nobody matches text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// The request itself is malformed or contradicts itself.
    BadRequest,
    /// The bytes are not what their headers say: odd byte count, impossible rate, not a number.
    BadAudio,
    /// A container or codec that cannot be used here (sliced ogg or mp3 in a live session).
    UnsupportedFormat,
    TooLarge,
    /// Audio from a named source after that source said `Asr-End`.
    AudioAfterEnd,
    /// Audio from a source that a newer one has replaced.
    StaleSource,
    /// The model is not in the catalog or its file is missing, cut off or damaged.
    ModelMissing,
    /// No device of the fleet is large enough for the model, free or not.
    ModelDoesNotFit,
    /// All slots are taken; retry later.
    NoCapacity,
    /// Nobody is there to do the work.
    NoWorkers,
    /// The device, or the host, had no memory left.
    OutOfMemory,
    EngineCrash,
    /// The GPU no longer answers: it fell off the bus, or was taken away.
    DeviceLost,
    /// The driver does not fit the library, or the card the build.
    DriverMismatch,
    /// A shared library that is needed is not on this machine.
    MissingLibrary,
    Timeout,
    Cancelled,
    NotFound,
    /// The owner of the audio, or the allow-list of this fleet, does not let us have it.
    Forbidden,
    /// A server that holds what is needed cannot be reached or breaks off; trying again may help.
    Unavailable,
    Internal,
    #[serde(other)]
    Unknown,
}

impl FailureClass {
    pub fn as_str(self) -> &'static str {
        use FailureClass::*;
        match self {
            BadRequest => "bad_request",
            BadAudio => "bad_audio",
            UnsupportedFormat => "unsupported_format",
            TooLarge => "too_large",
            AudioAfterEnd => "audio_after_end",
            StaleSource => "stale_source",
            ModelMissing => "model_missing",
            ModelDoesNotFit => "model_does_not_fit",
            NoCapacity => "no_capacity",
            NoWorkers => "no_workers",
            OutOfMemory => "out_of_memory",
            EngineCrash => "engine_crash",
            DeviceLost => "device_lost",
            DriverMismatch => "driver_mismatch",
            MissingLibrary => "missing_library",
            Timeout => "timeout",
            Cancelled => "cancelled",
            NotFound => "not_found",
            Forbidden => "forbidden",
            Unavailable => "unavailable",
            Internal => "internal",
            Unknown => "unknown",
        }
    }
}

impl FailureClass {
    /// The input or the request is at fault: another worker, or another try, ends the same way.
    pub fn is_permanent(self) -> bool {
        use FailureClass::*;
        matches!(
            self,
            BadRequest | BadAudio | UnsupportedFormat | TooLarge | AudioAfterEnd | Cancelled | NotFound | Forbidden
        )
    }
}

impl std::fmt::Display for FailureClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failure as it is told to others: class for machines, message for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{class}: {message}")]
pub struct Failure {
    pub class: FailureClass,
    pub message: String,
    /// When trying again may help, in ms from now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl Failure {
    pub fn new(class: FailureClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), retry_after_ms: None }
    }
}
