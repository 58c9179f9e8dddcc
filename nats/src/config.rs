//! Where the server is and how we prove who we are.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

/// A value that never prints: neither in logs nor in `config show`.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { "***" })
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if self.0.is_empty() { "" } else { "***" })
    }
}

/// The connection. Empty strings mean "not set".
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsConfig {
    /// Any of a cluster's servers; the others are learnt from it.
    pub urls: Vec<String>,
    /// JWT and seed in one file, as `nsc` writes it.
    pub credentials_file: Option<PathBuf>,
    pub user: String,
    pub password: Secret,
    pub token: Secret,
    pub nkey_seed_file: Option<PathBuf>,
    pub tls_required: bool,
    /// Certificates to trust beside the system's.
    pub tls_ca: Option<PathBuf>,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    /// TLS before the server's greeting; the server must be configured the same way.
    pub tls_first: bool,
    /// Inboxes begin with it, so that permissions can name one role's inboxes.
    pub inbox_prefix: String,
    /// A dead connection is noticed after three of these.
    pub ping_interval_ms: u64,
    pub request_timeout_ms: u64,
    pub connect_timeout_ms: u64,
    /// First tokens of every subject of ours.
    pub prefix: String,
}

impl Default for NatsConfig {
    fn default() -> Self {
        Self {
            // A server on the same machine, the port every NATS tool assumes.
            urls: vec!["nats://127.0.0.1:4222".to_owned()],
            credentials_file: None,
            user: String::new(),
            password: Secret::default(),
            token: Secret::default(),
            nkey_seed_file: None,
            tls_required: false,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            tls_first: false,
            // The server's own default; roles with permissions set theirs.
            inbox_prefix: "_INBOX".to_owned(),
            // 6 s until a dead peer is noticed; the library's 60 s would be three minutes.
            ping_interval_ms: 2_000,
            // A leader election takes a few seconds; longer waits would hide that a stream is stuck.
            request_timeout_ms: 5_000,
            connect_timeout_ms: 5_000,
            prefix: "asr.v1".to_owned(),
        }
    }
}

impl NatsConfig {
    /// Every mistake, each with the name of its field.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.urls.is_empty() {
            found.push("nats.urls: empty, name at least one server".to_owned());
        }
        for url in &self.urls {
            if let Err(error) = url.parse::<async_nats::ServerAddr>() {
                found.push(format!("nats.urls: {:?} is not a server address: {error}", without_user(url)));
            }
        }
        let ways = [
            ("credentials_file", self.credentials_file.is_some()),
            ("user", !self.user.is_empty()),
            ("token", !self.token.is_empty()),
            ("nkey_seed_file", self.nkey_seed_file.is_some()),
        ];
        let set: Vec<_> = ways.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
        if set.len() > 1 {
            found.push(format!("nats: {} are set together, choose one way to log in", set.join(" and ")));
        }
        if self.user.is_empty() && !self.password.is_empty() {
            found.push("nats.password: set without nats.user".to_owned());
        }
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            found.push("nats.tls_cert and nats.tls_key: a client certificate needs both".to_owned());
        }
        for (name, value, range) in [
            ("ping_interval_ms", self.ping_interval_ms, 100..=60_000),
            ("request_timeout_ms", self.request_timeout_ms, 100..=60_000),
            ("connect_timeout_ms", self.connect_timeout_ms, 100..=60_000),
        ] {
            if !range.contains(&value) {
                found.push(format!("nats.{name}: {value} is outside {} to {}", range.start(), range.end()));
            }
        }
        for (name, value) in [("prefix", &self.prefix), ("inbox_prefix", &self.inbox_prefix)] {
            if !is_subject_prefix(value) {
                found.push(format!("nats.{name}: {value:?} is not a subject (tokens of letters, digits, _ and -)"));
            }
        }
        found
    }
}

/// A URL may carry a password.
pub(crate) fn without_user(url: &str) -> &str {
    url.rsplit_once('@').map_or(url, |(_, rest)| rest)
}

fn is_subject_prefix(text: &str) -> bool {
    text.len() <= 128 && text.split('.').all(|token| voxfleet_schema::id::check(token).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_has_no_problems() {
        assert_eq!(NatsConfig::default().problems(), Vec::<String>::new());
    }

    #[test]
    fn every_mistake_is_named_at_once() {
        let config = NatsConfig {
            urls: vec!["not a url".into()],
            user: "u".into(),
            token: Secret::new("t"),
            tls_cert: Some("c.pem".into()),
            ping_interval_ms: 0,
            prefix: "asr.*".into(),
            inbox_prefix: String::new(),
            ..NatsConfig::default()
        };
        let problems = config.problems();
        for name in ["urls", "user and token", "tls_key", "ping_interval_ms", "nats.prefix", "inbox_prefix"] {
            assert!(problems.iter().any(|p| p.contains(name)), "{name} is missing in {problems:?}");
        }
        assert_eq!(problems.len(), 6);
    }

    #[test]
    fn secrets_do_not_print() {
        let config = NatsConfig {
            user: "u".into(),
            password: Secret::new("hunter2"),
            urls: vec!["nats://a:hunter2@bad host".into()],
            ..NatsConfig::default()
        };
        let shown = format!(
            "{:?} {} {:?}",
            config.password,
            serde_json::to_string(&config.password).expect("json"),
            config.problems()
        );
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
