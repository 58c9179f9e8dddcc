//! Names on the wire. All are `[A-Za-z0-9_-]{1,64}`, so each is one NATS token and one file name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Longest id accepted, in bytes.
pub const MAX_ID_LEN: usize = 64;

/// Why a string is not an id. Carries no copy of the input: it may be hostile and 10 kB long.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("id is empty")]
    Empty,
    #[error("id is {len} bytes long, the limit is {MAX_ID_LEN}")]
    TooLong { len: usize },
    #[error("id has {found:?} at byte {at}, allowed are letters, digits, '_' and '-'")]
    BadCharacter { found: char, at: usize },
}

/// Checks the rule all ids share.
pub fn check(text: &str) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.len() > MAX_ID_LEN {
        return Err(IdError::TooLong { len: text.len() });
    }
    match text.char_indices().find(|(_, c)| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))) {
        Some((at, found)) => Err(IdError::BadCharacter { found, at }),
        None => Ok(()),
    }
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            pub fn new(text: impl AsRef<str>) -> Result<Self, IdError> {
                let text = text.as_ref();
                check(text)?;
                Ok(Self(text.into()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.to_string()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id_type!(
    /// A live session or a job: whatever has audio and a chain of finals. [`Kind`] tells which.
    StreamId
);
id_type!(
    /// A device, stable over restarts: from its NVML UUID, or `cpu-<host>-<n>`.
    GpuId
);
id_type!(
    /// One life of a worker on a GPU. Never used twice, so that deleting its consumers fences its acks.
    Incarnation
);
id_type!(
    /// One start of a producer (`Asr-Source`).
    SourceId
);

/// What a [`StreamId`] names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Session,
    Job,
    /// Stored by a newer version.
    #[serde(other)]
    Unknown,
}

impl Kind {
    /// The name of a live session, for logs: none of a job.
    pub fn session(self, id: &StreamId) -> Option<&str> {
        (self != Kind::Job).then_some(id.as_str())
    }

    /// The name of a job, for logs: none of a live session.
    pub fn job(self, id: &StreamId) -> Option<&str> {
        (self == Kind::Job).then_some(id.as_str())
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Session => "session",
            Kind::Job => "job",
            Kind::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        match text {
            "session" => Ok(Kind::Session),
            "job" => Ok(Kind::Job),
            _ => Err(UnknownKind),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("kind is neither session nor job")]
pub struct UnknownKind;

/// One incarnation of a worker on one GPU: the key of everything that is addressed to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WorkerName {
    pub gpu_id: GpuId,
    pub incarnation: Incarnation,
}

impl fmt::Display for WorkerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.gpu_id, self.incarnation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_keep_to_one_token() {
        for good in ["a", "call-7", "A_b-9", &"x".repeat(64)] {
            assert_eq!(StreamId::new(good).map(String::from), Ok(good.to_owned()));
        }
        let cases = [
            ("", IdError::Empty),
            ("..", IdError::BadCharacter { found: '.', at: 0 }),
            ("a*", IdError::BadCharacter { found: '*', at: 1 }),
            (">", IdError::BadCharacter { found: '>', at: 0 }),
            ("a b", IdError::BadCharacter { found: ' ', at: 1 }),
            ("é", IdError::BadCharacter { found: 'é', at: 0 }),
        ];
        for (text, error) in cases {
            assert_eq!(StreamId::new(text), Err(error), "{text:?}");
        }
        assert_eq!(StreamId::new("x".repeat(10_000)), Err(IdError::TooLong { len: 10_000 }));
    }

    #[test]
    fn a_bad_id_in_json_is_an_error_not_a_value() {
        assert!(serde_json::from_str::<StreamId>("\"a.b\"").is_err());
        assert_eq!(serde_json::from_str::<StreamId>("\"ab\"").expect("good id").as_str(), "ab");
    }
}
