//! Who a request is, by its headers. Pure.

use std::{collections::HashMap, io, path::Path};

use axum::{
    extract::Query,
    http::{HeaderMap, Uri, header},
};
use sha2::{Digest, Sha256};

use crate::config::HttpConfig;

/// The cookie that a page's login sets.
pub const COOKIE: &str = "voxfleet_token";
/// Shorter tokens can be guessed.
pub const MIN_TOKEN_CHARS: usize = 16;

/// What somebody may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Read figures and transcripts.
    Viewer,
    /// Send audio and recordings, and be told what becomes of them.
    Producer,
    /// Drain GPUs, send dead letters again, and read.
    Operator,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Viewer, Role::Producer, Role::Operator];

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Producer => "producer",
            Role::Operator => "operator",
        }
    }
}

/// A set of roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Roles {
    viewer: bool,
    producer: bool,
    operator: bool,
}

impl Roles {
    pub fn of(role: Role) -> Self {
        match role {
            Role::Viewer => Self { viewer: true, ..Self::default() },
            // Whoever may send is not thereby told what others say.
            Role::Producer => Self { producer: true, ..Self::default() },
            Role::Operator => Self { viewer: true, operator: true, ..Self::default() },
        }
    }

    pub fn has(self, role: Role) -> bool {
        match role {
            Role::Viewer => self.viewer,
            Role::Producer => self.producer,
            Role::Operator => self.operator,
        }
    }

    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    pub fn and(self, other: Roles) -> Self {
        Self {
            viewer: self.viewer || other.viewer,
            producer: self.producer || other.producer,
            operator: self.operator || other.operator,
        }
    }

    pub fn names(self) -> Vec<&'static str> {
        Role::ALL.into_iter().filter(|role| self.has(*role)).map(Role::as_str).collect()
    }
}

/// Why no tokens could be read. Never shows one.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("token file {file}")]
    Read { file: String, source: io::Error },
    #[error("token file {file}, line {line}: a token has at least {MIN_TOKEN_CHARS} visible characters")]
    Weak { file: String, line: usize },
    #[error("token file {file} holds no token")]
    Empty { file: String },
}

/// Tokens as digests: what is compared takes as long whether it begins alike or not, and `Debug` shows nothing.
pub struct Access {
    tokens: HashMap<[u8; 32], Roles>,
    /// Of everybody, without a token.
    everybody: Roles,
    hosts: Vec<String>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("tokens", &self.tokens.len()).field("everybody", &self.everybody).finish()
    }
}

impl Access {
    /// Reads the token files of a configuration that has been checked.
    pub fn read(config: &HttpConfig) -> Result<Access, TokenError> {
        let mut tokens: HashMap<[u8; 32], Roles> = HashMap::new();
        let files = [
            (Role::Viewer, &config.viewer_token_file),
            (Role::Producer, &config.producer_token_file),
            (Role::Operator, &config.operator_token_file),
        ];
        for (role, file) in files {
            if let Some(file) = file {
                for token in read_tokens(file)? {
                    let roles = tokens.entry(digest(&token)).or_default();
                    *roles = roles.and(Roles::of(role));
                }
            }
        }
        let loopback = config.address().is_some_and(|a| a.ip().is_loopback());
        let open = loopback && !config.has_tokens();
        let everybody = if open { Roles::of(Role::Viewer).and(Roles::of(Role::Producer)) } else { Roles::default() };
        Ok(Access { tokens, everybody, hosts: config.hosts.clone() })
    }

    /// Whether a login can give anybody more than he has.
    pub fn has_logins(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// What everybody may do who brings nothing.
    pub fn everybody(&self) -> Roles {
        self.everybody
    }

    pub fn of_token(&self, token: &str) -> Option<Roles> {
        self.tokens.get(&digest(token)).copied()
    }

    /// Roles of a request: `Authorization: Bearer`, the login's cookie, or `?token=` where `in_query`, for clients that know
    /// nothing but a URL. A token that nobody has counts as none: a page whose cookie was withdrawn may still log in.
    pub fn roles(&self, headers: &HeaderMap, uri: &Uri, in_query: bool) -> Roles {
        let given = [bearer(headers), cookie(headers), if in_query { query_token(uri) } else { None }];
        given.into_iter().flatten().filter_map(|token| self.of_token(&token)).fold(self.everybody, Roles::and)
    }

    /// Whether the name under which we were asked is ours. Only asked for where no token is needed: there a foreign page whose
    /// name points to us (DNS rebinding) would otherwise read everything.
    pub fn knows_host(&self, host: Option<&str>) -> bool {
        if self.everybody.is_empty() {
            return true;
        }
        let Some(host) = host else { return false };
        let name = without_port(host);
        let loopback = name.eq_ignore_ascii_case("localhost")
            || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        loopback || self.hosts.iter().any(|known| known.eq_ignore_ascii_case(name) || known.eq_ignore_ascii_case(host))
    }
}

/// Whether a page of another site asks: its `Origin` is not the host it asks. Programs send none.
pub fn is_foreign(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok());
    let Some(origin) = text(header::ORIGIN) else {
        // A browser says so where it sends no origin.
        return text(header::HeaderName::from_static("sec-fetch-site"))
            .is_some_and(|site| !matches!(site, "same-origin" | "none"));
    };
    let authority = origin.split_once("://").map(|(_, rest)| rest);
    match (authority, text(header::HOST)) {
        (Some(authority), Some(host)) => !authority.eq_ignore_ascii_case(host),
        _ => true,
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

fn read_tokens(file: &Path) -> Result<Vec<String>, TokenError> {
    let name = || file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|source| TokenError::Read { file: name(), source })?;
    let mut tokens = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let visible = line.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b';' | b',' | b'"' | b'\\'));
        if line.len() < MIN_TOKEN_CHARS || !visible {
            return Err(TokenError::Weak { file: name(), line: index + 1 });
        }
        tokens.push(line.to_owned());
    }
    if tokens.is_empty() {
        return Err(TokenError::Empty { file: name() });
    }
    Ok(tokens)
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
}

fn cookie(headers: &HeaderMap) -> Option<String> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    all.flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE)
        .map(|(_, value)| value.to_owned())
}

fn query_token(uri: &Uri) -> Option<String> {
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri).ok()?;
    pairs.into_iter().find(|(name, _)| name == "token").map(|(_, token)| token)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: &str = "viewer-0123456789";
    const OPERATE: &str = "operator-0123456789";
    /// As `openssl rand -base64` writes them.
    const SEND: &str = "send+0123/456789==";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (header::HeaderName::from_static(n), v.parse().expect("a value"))).collect()
    }

    fn with(listen: &str, viewers: bool) -> (tempfile::TempDir, Access) {
        let dir = tempfile::tempdir().expect("a folder");
        let (v, o, p) = (dir.path().join("v"), dir.path().join("o"), dir.path().join("p"));
        std::fs::write(&v, format!("# pages\n{VIEW}\n\n")).expect("written");
        std::fs::write(&o, OPERATE).expect("written");
        std::fs::write(&p, SEND).expect("written");
        let config = HttpConfig {
            viewer_token_file: viewers.then_some(v),
            producer_token_file: viewers.then_some(p),
            operator_token_file: Some(o),
            ..HttpConfig::on(listen)
        };
        let access = Access::read(&config).expect("tokens");
        (dir, access)
    }

    #[test]
    fn loopback_reads_and_sends_without_a_token_and_changes_nothing() {
        let (_dir, access) = with("127.0.0.1:0", false);
        let uri = Uri::from_static("/api/me");
        let nobody = access.roles(&headers(&[]), &uri, false);
        assert!(nobody.has(Role::Viewer) && nobody.has(Role::Producer) && !nobody.has(Role::Operator));
        let operator = access.roles(&headers(&[("authorization", &format!("Bearer {OPERATE}"))]), &uri, false);
        assert!(operator.has(Role::Operator) && operator.has(Role::Producer));
    }

    #[test]
    fn elsewhere_nobody_is_anybody_without_a_token() {
        let (_dir, access) = with("0.0.0.0:0", true);
        let uri = Uri::from_static("/asr?rate=8000&token=viewer-0123456789");
        for (given, in_query, expected) in [
            (vec![], false, vec![]),
            (vec![], true, vec!["viewer"]),
            (vec![("authorization", format!("bearer {VIEW}"))], false, vec!["viewer"]),
            (vec![("authorization", format!("Basic {VIEW}"))], false, vec![]),
            (vec![("authorization", "Bearer viewer-012345678".to_owned())], false, vec![]),
            (vec![("cookie", format!("a=b; {COOKIE}={OPERATE}"))], false, vec!["viewer", "operator"]),
            (vec![("authorization", format!("Bearer {SEND}"))], false, vec!["producer"]),
        ] {
            let pairs: Vec<(&'static str, &str)> = given.iter().map(|(n, v)| (*n, v.as_str())).collect();
            assert_eq!(access.roles(&headers(&pairs), &uri, in_query).names(), expected, "{given:?}");
        }
    }

    #[test]
    fn a_token_in_a_url_is_read_as_urls_are_written() {
        let (_dir, access) = with("0.0.0.0:0", true);
        let roles = |uri: &'static str| access.roles(&headers(&[]), &Uri::from_static(uri), true).names();
        assert_eq!(roles("/asr?token=send%2B0123%2F456789%3D%3D&rate=8000"), ["producer"]);
        assert_eq!(roles("/asr?token=send%2B0123/456789=="), ["producer"]);
        assert_eq!(roles("/asr?tokens=send%2B0123/456789=="), [""; 0]);
    }

    #[test]
    fn a_foreign_name_is_refused_where_no_token_is_needed() {
        let (_dir, open) = with("127.0.0.1:0", false);
        for (host, known) in [
            (Some("127.0.0.1:9480"), true),
            (Some("localhost"), true),
            (Some("[::1]:9480"), true),
            (Some("rebound.example:9480"), false),
            (Some("127.0.0.1.example"), false),
            (None, false),
        ] {
            assert_eq!(open.knows_host(host), known, "{host:?}");
        }
        let (_dir, closed) = with("127.0.0.1:0", true);
        assert!(closed.knows_host(Some("fleet.example")), "a token is asked for: its cookie does not go there");
    }

    #[test]
    fn pages_of_other_sites_are_foreign_and_programs_are_not() {
        for (pairs, foreign) in [
            (vec![], false),
            (vec![("origin", "http://a:1"), ("host", "a:1")], false),
            (vec![("origin", "http://b:1"), ("host", "a:1")], true),
            (vec![("origin", "null"), ("host", "a:1")], true),
            (vec![("sec-fetch-site", "cross-site"), ("host", "a:1")], true),
            (vec![("sec-fetch-site", "same-origin"), ("host", "a:1")], false),
        ] {
            assert_eq!(is_foreign(&headers(&pairs)), foreign, "{pairs:?}");
        }
    }

    #[test]
    fn weak_and_missing_tokens_are_refused_and_never_shown() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("t");
        let config = HttpConfig { viewer_token_file: Some(file.clone()), ..HttpConfig::on("127.0.0.1:0") };
        assert!(matches!(Access::read(&config), Err(TokenError::Read { .. })));
        std::fs::write(&file, "# only this\n").expect("written");
        assert!(matches!(Access::read(&config), Err(TokenError::Empty { .. })));
        std::fs::write(&file, "long-enough-token\nshort-secret\n").expect("written");
        let error = Access::read(&config).expect_err("too short");
        assert!(matches!(error, TokenError::Weak { line: 2, .. }) && !format!("{error:?}").contains("secret"));
    }
}
