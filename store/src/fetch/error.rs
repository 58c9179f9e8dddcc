//! Why something could not be brought here.

use std::{io, path::PathBuf, time::Duration};

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    job::AudioUrl,
};

/// `at` is a URL as it may be shown ([`shown`]): without its query, which may be a signature.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// This worker's settings or machine stand in the way.
    #[error("{0}")]
    Config(String),
    #[error("{at}: {why}")]
    BadUrl { at: String, why: String },
    #[error("{at}: there is no such file or object")]
    NotFound { at: String },
    #[error("{at}: {why}")]
    Forbidden { at: String, why: String },
    #[error("{at}: {why}")]
    TooLarge { at: String, why: String },
    /// Nothing came for too long.
    #[error("{at}: {why}")]
    Timeout { at: String, why: String },
    /// Something comes, but so little that it would hold its place for ever.
    #[error("{at}: less than {min_bytes_per_s} bytes per second over {window_s} s")]
    TooSlow { at: String, min_bytes_per_s: u64, window_s: u64 },
    #[error("{at}: {why}")]
    Unavailable { at: String, why: String, retry_after: Option<Duration> },
    /// The server's certificate; asking again at once shows the same one.
    #[error("{at}: {why}")]
    Untrusted { at: String, why: String },
    #[error("the spool folder {} {}", dir.display(), disk_trouble(source))]
    Spool { dir: PathBuf, source: io::Error },
    #[error("{at}: {why}")]
    Internal { at: String, why: String },
}

impl FetchError {
    /// As it is told to others.
    pub fn failure(&self) -> Failure {
        use FetchError as E;
        let class = match self {
            E::Config(_) | E::Spool { .. } | E::Internal { .. } => FailureClass::Internal,
            E::BadUrl { .. } => FailureClass::BadRequest,
            E::NotFound { .. } => FailureClass::NotFound,
            E::Forbidden { .. } => FailureClass::Forbidden,
            E::TooLarge { .. } => FailureClass::TooLarge,
            E::Timeout { .. } | E::TooSlow { .. } => FailureClass::Timeout,
            E::Unavailable { .. } | E::Untrusted { .. } => FailureClass::Unavailable,
        };
        let mut failure = Failure::new(class, self.to_string());
        if let E::Unavailable { retry_after: Some(wait), .. } = self {
            failure.retry_after_ms = u64::try_from(wait.as_millis()).ok();
        }
        failure
    }

    /// Asking again in a moment may help.
    pub fn is_passing(&self) -> bool {
        matches!(self, FetchError::Unavailable { .. } | FetchError::Timeout { .. })
    }
}

fn disk_trouble(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull => "is full; make room, or name another in worker.fetch.spool_dir".to_owned(),
        io::ErrorKind::QuotaExceeded => "has reached its quota; name another in worker.fetch.spool_dir".to_owned(),
        io::ErrorKind::FileTooLarge => "takes no file this large".to_owned(),
        _ => format!("can not be written: {error}"),
    }
}

/// Longest part of a URL in a message, in characters.
const SHOWN_CHARS: usize = 200;

/// A URL for messages and logs.
pub(super) fn shown(url: &str) -> String {
    let plain = AudioUrl::redacted(url).split('#').next().unwrap_or_default();
    match plain.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &plain[..end]),
        None => plain.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_not_shown() {
        assert_eq!(shown("https://h/p?X-Amz-Signature=abc#frag"), "https://h/p");
        assert_eq!(shown("https://h/p#token=abc"), "https://h/p");
        assert!(shown(&format!("https://h/{}", "ä".repeat(4_000))).len() < 500);
    }

    #[test]
    fn a_full_disk_names_its_folder() {
        let error = FetchError::Spool {
            dir: "/spool".into(),
            source: io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()),
        };
        let failure = error.failure();
        assert_eq!(failure.class, FailureClass::Internal);
        assert!(failure.message.contains("/spool is full"), "{failure}");
    }

    #[test]
    fn a_wait_that_the_server_asked_for_is_passed_on() {
        let error = FetchError::Unavailable {
            at: "https://h".into(),
            why: "the server answers 503".into(),
            retry_after: Some(Duration::from_secs(90)),
        };
        assert_eq!(error.failure().retry_after_ms, Some(90_000));
        assert!(error.is_passing());
    }
}
