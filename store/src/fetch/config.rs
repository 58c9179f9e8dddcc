//! What may be fetched, and how long it may take.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use voxfleet_nats::Secret;

use super::hosts::{HostRule, Hosts};

/// `[worker.fetch]`. A job's URL is a stranger's; what is not allowed here is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchConfig {
    /// Hosts of https URLs: `host`, `host:port` or `*.example.com`. Empty: any host whose every address is public. A listed
    /// name may lead into private networks; to this machine, its link or metadata only where the address itself is listed.
    pub https_hosts: Vec<String>,
    /// Ports of https URLs whose host is not on that list; a listed host may be asked on any, or on the one it is listed with.
    pub https_ports: Vec<u16>,
    /// Hosts that may be asked over plain http.
    pub http_hosts: Vec<String>,
    /// Buckets of s3 URLs; `*` is any that the credentials open.
    pub s3_buckets: Vec<String>,
    /// An S3 service other than AWS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3_endpoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3_region: Option<String>,
    /// Empty: from the environment (`AWS_*`), or the instance's role.
    pub s3_access_key_id: Secret,
    pub s3_secret_access_key: Secret,
    /// An endpoint without TLS.
    pub s3_allow_http: bool,
    /// Folders of file URLs.
    pub file_roots: Vec<PathBuf>,
    /// PEM file of certificates to trust beside the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Largest recording, in bytes.
    pub max_bytes: u64,
    pub connect_timeout_ms: u64,
    /// Longest time without a byte.
    pub stall_timeout_ms: u64,
    /// Slower than this over a minute is given up; 0 = any speed.
    pub min_bytes_per_s: u64,
    /// Longest time for a whole recording, in s: meanwhile it holds a slot.
    pub total_timeout_s: u64,
    /// Each hop is held to the lists above.
    pub max_redirects: u32,
    /// Folder that holds a recording while it is transcribed; none = the system's temporary folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spool_dir: Option<PathBuf>,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            // Public hosts are anybody's to ask; everything else has to be named.
            https_hosts: Vec::new(),
            // Where recordings are served; others are somebody's mail, database or shell.
            https_ports: vec![443, 8443],
            http_hosts: Vec::new(),
            s3_buckets: Vec::new(),
            s3_endpoint: None,
            s3_region: None,
            s3_access_key_id: Secret::default(),
            s3_secret_access_key: Secret::default(),
            s3_allow_http: false,
            file_roots: Vec::new(),
            ca_file: None,
            // 37 hours of 16 kHz PCM, the largest wav there can be.
            max_bytes: 4 << 30,
            // A far server answers within a second, a busy one within a few.
            connect_timeout_ms: 10_000,
            // Cold storage behind a URL takes its time over the first byte.
            stall_timeout_ms: 30_000,
            // 16 kbit/s: less than any recording's own bit rate, so such a source could never be transcribed in real time.
            min_bytes_per_s: 2_048,
            // 4 GiB at 1.2 MB/s; an hour's mp3 is 60 MB.
            total_timeout_s: 3_600,
            // Shorteners and CDNs need two or three.
            max_redirects: 5,
            spool_dir: None,
        }
    }
}

impl FetchConfig {
    /// Every mistake, named by its field.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (field, list) in [("https_hosts", &self.https_hosts), ("http_hosts", &self.http_hosts)] {
            for host in list {
                if let Err(why) = HostRule::parse(host) {
                    found.push(format!("worker.fetch.{field}: {why}"));
                }
            }
        }
        if self.https_ports.contains(&0) {
            found.push("worker.fetch.https_ports: 0 is no port".to_owned());
        }
        for bucket in &self.s3_buckets {
            if bucket != "*" && !super::s3::is_bucket(bucket) {
                found.push(format!("worker.fetch.s3_buckets: {bucket:?} is not a bucket's name"));
            }
        }
        if let Some(endpoint) = &self.s3_endpoint {
            match reqwest::Url::parse(endpoint) {
                Ok(url) if url.scheme() == "https" && url.has_host() => {}
                Ok(url) if url.scheme() == "http" && url.has_host() => {
                    if !self.s3_allow_http {
                        found.push("worker.fetch.s3_endpoint: plain http needs worker.fetch.s3_allow_http".to_owned());
                    }
                }
                // Not shown: it may hold a password.
                _ => found.push("worker.fetch.s3_endpoint: it is not an https:// URL".to_owned()),
            }
        }
        if self.s3_access_key_id.is_empty() != self.s3_secret_access_key.is_empty() {
            found.push("worker.fetch.s3_access_key_id and s3_secret_access_key: set both, or neither".to_owned());
        }
        for root in &self.file_roots {
            if !root.is_absolute() {
                found.push(format!("worker.fetch.file_roots: {} is not an absolute path", root.display()));
            }
        }
        if let Some(file) = &self.ca_file
            && !file.is_file()
        {
            found.push(format!("worker.fetch.ca_file: {} is not a file", file.display()));
        }
        if let Some(dir) = &self.spool_dir
            && !dir.is_dir()
        {
            found.push(format!("worker.fetch.spool_dir: {} is not a folder", dir.display()));
        }
        if self.max_bytes == 0 {
            found.push("worker.fetch.max_bytes: 0, nothing would be taken".to_owned());
        }
        for (name, value) in
            [("connect_timeout_ms", self.connect_timeout_ms), ("stall_timeout_ms", self.stall_timeout_ms)]
        {
            if !(100..=600_000).contains(&value) {
                found.push(format!("worker.fetch.{name}: {value}, allowed are 100 to 600000"));
            }
        }
        if !(1..=604_800).contains(&self.total_timeout_s) {
            found.push(format!("worker.fetch.total_timeout_s: {}, allowed are 1 to 604800", self.total_timeout_s));
        }
        if self.max_redirects > 20 {
            found.push(format!("worker.fetch.max_redirects: {}, the most is 20", self.max_redirects));
        }
        found
    }

    pub(super) fn hosts(&self) -> Result<Hosts, String> {
        let rules = |list: &[String]| list.iter().map(|text| HostRule::parse(text)).collect::<Result<Vec<_>, _>>();
        let (https, http) = (rules(&self.https_hosts)?, rules(&self.http_hosts)?);
        Ok(Hosts::Listed { https, http, ports: self.https_ports.clone() })
    }

    pub(super) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(super) fn stall_timeout(&self) -> Duration {
        Duration::from_millis(self.stall_timeout_ms)
    }

    /// Where recordings lie while they are worked on.
    pub fn spool_dir(&self) -> PathBuf {
        self.spool_dir.clone().unwrap_or_else(std::env::temp_dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_has_no_problems() {
        assert_eq!(FetchConfig::default().problems(), Vec::<String>::new());
    }

    #[test]
    fn every_mistake_is_named_at_once() {
        let config = FetchConfig {
            https_hosts: vec!["https://a".into()],
            https_ports: vec![443, 0],
            http_hosts: vec!["*".into()],
            s3_buckets: vec!["../x".into()],
            s3_endpoint: Some("http://u:hunter2@minio:9000".into()),
            s3_access_key_id: Secret::new("hunter2"),
            file_roots: vec!["calls".into()],
            ca_file: Some("/nowhere/ca.pem".into()),
            max_bytes: 0,
            connect_timeout_ms: 0,
            max_redirects: 100,
            spool_dir: Some("/nowhere".into()),
            ..FetchConfig::default()
        };
        let problems = config.problems();
        for field in [
            "https_hosts",
            "https_ports",
            "http_hosts",
            "s3_buckets",
            "s3_endpoint",
            "s3_access_key_id",
            "file_roots",
            "ca_file",
            "max_bytes",
            "connect_timeout_ms",
            "max_redirects",
            "spool_dir",
        ] {
            assert!(problems.iter().any(|p| p.starts_with(&format!("worker.fetch.{field}"))), "{field}: {problems:?}");
        }
        assert_eq!(problems.len(), 12, "{problems:?}");
        assert!(!problems.concat().contains("hunter2"), "{problems:?}");
    }

    #[test]
    fn keys_do_not_print() {
        let config = FetchConfig {
            s3_access_key_id: Secret::new("hunter1"),
            s3_secret_access_key: Secret::new("hunter2"),
            ..FetchConfig::default()
        };
        let text = format!("{config:?} {}", serde_json::to_string(&config).expect("json"));
        assert!(!text.contains("hunter"), "{text}");
    }
}
