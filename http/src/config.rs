//! Where to listen, with which certificate, and who may ask.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port; empty = no HTTP.
    pub listen: String,
    /// PEM chain; with it HTTPS is spoken and nothing else. Read again when the file changes.
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    /// One token a line, each gives its role; a token in two files has both. Reading needs a viewer's or an operator's where a
    /// viewer's or producer's file is named, and wherever the address is not loopback.
    pub viewer_token_file: Option<PathBuf>,
    pub producer_token_file: Option<PathBuf>,
    pub operator_token_file: Option<PathBuf>,
    /// Names in the `Host` header that are ours beside loopback ones. Asked for only where no token is needed: a page from
    /// elsewhere whose name was made to point here brings its own name along.
    pub hosts: Vec<String>,
    /// Connections at once; more wait to be accepted.
    pub max_connections: usize,
}

impl HttpConfig {
    /// Off.
    pub fn off() -> Self {
        Self::on("")
    }

    pub fn on(listen: &str) -> Self {
        Self {
            listen: listen.to_owned(),
            tls_cert: None,
            tls_key: None,
            viewer_token_file: None,
            producer_token_file: None,
            operator_token_file: None,
            hosts: Vec::new(),
            // Fifty open pages, scrapes, and every browser's session of a large fleet.
            max_connections: 4_096,
        }
    }

    pub fn is_off(&self) -> bool {
        self.listen.is_empty()
    }

    /// None: not an address.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }

    /// Whether tokens decide who may read.
    pub fn has_tokens(&self) -> bool {
        [&self.viewer_token_file, &self.producer_token_file].into_iter().any(Option::is_some)
    }

    /// Every mistake, `section` before each.
    pub fn problems(&self, section: &str) -> Vec<String> {
        let mut problems = Vec::new();
        if self.is_off() {
            return problems;
        }
        match self.address() {
            None => {
                problems.push(format!(
                    "{section}.listen: {:?} is not an address with a port, such as 127.0.0.1:9480",
                    self.listen
                ));
            }
            Some(address) if !address.ip().is_loopback() && !self.has_tokens() => problems.push(format!(
                "{section}.listen: {address} is not loopback: name {section}.viewer_token_file (a token a line), so that not everybody reads transcripts"
            )),
            Some(_) => {}
        }
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            problems.push(format!("{section}: tls_cert and tls_key go together"));
        }
        if !(1..=100_000).contains(&self.max_connections) {
            problems.push(format!("{section}.max_connections: {} is outside 1 to 100000", self.max_connections));
        }
        problems
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self::off()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_goes_without_tokens() {
        assert_eq!(HttpConfig::off().problems("x"), [""; 0]);
        assert_eq!(HttpConfig::on("127.0.0.1:1").problems("x"), [""; 0]);
        assert_eq!(HttpConfig::on("[::1]:1").problems("x"), [""; 0]);
        let open = HttpConfig::on("0.0.0.0:1");
        assert!(open.problems("x")[0].contains("viewer_token_file"), "{:?}", open.problems("x"));
        let operator = HttpConfig { operator_token_file: Some("o".into()), ..open.clone() };
        assert_eq!(operator.problems("x").len(), 1, "who may change things says nothing about who may read");
        let closed = HttpConfig { viewer_token_file: Some("v".into()), ..open };
        assert_eq!(closed.problems("x"), [""; 0]);
    }

    #[test]
    fn every_mistake_is_named() {
        let bad = HttpConfig { tls_cert: Some("c".into()), max_connections: 0, ..HttpConfig::on("here") };
        let problems = bad.problems("dispatcher.http").join("\n");
        for part in ["listen", "tls_key", "max_connections"] {
            assert!(problems.contains(part), "{part} in {problems}");
        }
    }
}
