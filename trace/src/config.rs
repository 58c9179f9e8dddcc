//! Where spans go, and how many.

use std::{path::PathBuf, time::Duration};

use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use serde::{Deserialize, Serialize};
use voxfleet_nats::Secret;

/// Of the OTLP specification.
const TRACES: &str = "v1/traces";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TracingConfig {
    /// A collector that speaks OTLP over HTTP: `http://host:4318`; empty = off.
    pub endpoint: String,
    /// Sent with each request, `name=value` and commas between them: collectors ask for tokens in them.
    pub headers: Secret,
    /// Certificates to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Share of the traces that begin here which are told; about one that a producer brings, he has decided.
    pub sample_ratio: f64,
    /// Empty = voxfleet-dispatcher or voxfleet-worker.
    pub service_name: String,
    /// Spans that may wait to be sent; more are dropped.
    pub queue: usize,
    /// For the collector's answer, in ms; also what a stop waits for at most to send the rest.
    pub timeout_ms: u64,
}

impl Default for TracingConfig {
    fn default() -> Self {
        Self {
            endpoint: String::new(),
            headers: Secret::default(),
            ca_file: None,
            // Whoever configures a collector wants to see something; a large fleet turns it down.
            sample_ratio: 1.0,
            service_name: String::new(),
            // Some seconds of a busy worker's finals, 2 MB at most.
            queue: 4_096,
            // A collector in the same network answers within milliseconds; a stop must not wait long.
            timeout_ms: 2_000,
        }
    }
}

impl TracingConfig {
    pub fn is_off(&self) -> bool {
        self.endpoint.is_empty()
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// Where batches are sent.
    pub(crate) fn url(&self) -> Result<Url, String> {
        let wrong = |why: &str| Err(format!("tracing.endpoint: {why}"));
        let Ok(mut url) = Url::parse(&self.endpoint) else {
            return wrong("not a URL, such as http://127.0.0.1:4318");
        };
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
            return wrong("not a URL of http or https, such as http://127.0.0.1:4318");
        }
        // It would show in logs of proxies, and here.
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return wrong("a login or a token belongs into tracing.headers");
        }
        let path = url.path().trim_end_matches('/');
        let path = if path.ends_with(TRACES) { path.to_owned() } else { format!("{path}/{TRACES}") };
        url.set_path(&path);
        Ok(url)
    }

    pub(crate) fn header_map(&self) -> Result<HeaderMap, String> {
        let mut map = HeaderMap::new();
        let pairs = self.headers.reveal().split(',').map(str::trim).filter(|pair| !pair.is_empty());
        for (number, pair) in pairs.enumerate() {
            // What was wrong in it may be the secret.
            let wrong = || format!("tracing.headers: number {} is not name=value", number + 1);
            let (name, value) = pair.split_once('=').ok_or_else(wrong)?;
            let name = HeaderName::try_from(name.trim()).map_err(|_| wrong())?;
            let mut value = HeaderValue::try_from(decoded(value.trim()).ok_or_else(wrong)?).map_err(|_| wrong())?;
            value.set_sensitive(true);
            map.append(name, value);
        }
        Ok(map)
    }

    /// Every mistake, named by its field.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if !self.is_off() {
            found.extend(self.url().err());
        }
        found.extend(self.header_map().err());
        if !(0.0..=1.0).contains(&self.sample_ratio) {
            found.push(format!("tracing.sample_ratio: {} is outside 0 to 1", self.sample_ratio));
        }
        if !(1..=1_000_000).contains(&self.queue) {
            found.push(format!("tracing.queue: {} is outside 1 to 1000000", self.queue));
        }
        if !(100..=60_000).contains(&self.timeout_ms) {
            found.push(format!("tracing.timeout_ms: {} is outside 100 to 60000", self.timeout_ms));
        }
        found
    }
}

/// Values are percent-encoded where they have to be: `Bearer%20abc`, or a comma. None: what follows a `%` are no two digits.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut found = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let mut digit = || (bytes.next()? as char).to_digit(16);
        found.push(if byte == b'%' { (digit()? * 16 + digit()?) as u8 } else { byte });
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(endpoint: &str) -> TracingConfig {
        TracingConfig { endpoint: endpoint.to_owned(), ..TracingConfig::default() }
    }

    #[test]
    fn the_path_of_the_protocol_is_added_once() {
        for (endpoint, url) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
            ("https://c.example/otlp/", "https://c.example/otlp/v1/traces"),
            ("https://c.example/otlp/v1/traces", "https://c.example/otlp/v1/traces"),
        ] {
            assert_eq!(at(endpoint).url().map(|url| url.to_string()), Ok(url.to_owned()));
            assert_eq!(at(endpoint).problems(), Vec::<String>::new());
        }
    }

    #[test]
    fn every_mistake_is_named_and_no_secret_with_it() {
        assert_eq!(TracingConfig::default().problems(), Vec::<String>::new());
        for wrong in
            ["here", "ftp://h", "http://", "http://u:hunter2@h", "http://h/?token=hunter2", "http://h/#hunter2"]
        {
            let problems = at(wrong).problems();
            assert_eq!(problems.len(), 1, "{wrong}");
            assert!(!problems[0].contains("hunter2"), "{}", problems[0]);
        }
        let all = TracingConfig {
            headers: Secret::new("a=b,hunter2"),
            sample_ratio: f64::NAN,
            queue: 0,
            timeout_ms: 1,
            ..at("here")
        };
        let problems = all.problems().join("\n");
        for part in ["endpoint", "headers: number 2", "sample_ratio", "queue", "timeout_ms"] {
            assert!(problems.contains(part), "{part} in {problems}");
        }
        assert!(!problems.contains("hunter2") && !format!("{all:?}").contains("hunter2"));
    }

    #[test]
    fn headers_are_read_as_others_write_them() {
        let config =
            TracingConfig { headers: Secret::new(" authorization=Bearer%20a=b , x-tenant=7,"), ..at("http://h") };
        let map = config.header_map().expect("headers");
        assert_eq!(
            map.get("authorization").map(|v| (v.to_str().ok(), v.is_sensitive())),
            Some((Some("Bearer a=b"), true))
        );
        assert_eq!((map.len(), map["x-tenant"].to_str().ok()), (2, Some("7")));
        for wrong in ["a=%4", "a=%zz", "a=%0a", "a b=c", "a"] {
            let config = TracingConfig { headers: Secret::new(wrong), ..at("http://h") };
            assert!(config.header_map().is_err(), "{wrong}");
        }
    }
}
