//! Which hosts may be asked, and where their names may lead. Pure; [`super::http`] asks before each hop.

use std::net::IpAddr;

use reqwest::Url;

use super::address::is_public;

/// One entry of an allow-list: `host`, `host:port` or `*.example.com`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostRule {
    /// Any name below `host`, not `host` itself.
    below: bool,
    /// As the URL parser writes it.
    host: String,
    port: Option<u16>,
}

impl HostRule {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("{text:?} is not a host ({why}); use host, host:port or *.example.com"));
        let (below, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let bare_v6 = !rest.starts_with('[') && rest.matches(':').count() > 1;
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !bare_v6 && !port.ends_with(']') => match port.parse::<u16>() {
                Ok(port) if port > 0 => (host, Some(port)),
                _ => return wrong("its port is no number from 1 to 65535"),
            },
            _ => (rest, None),
        };
        let host = if bare_v6 { format!("[{host}]") } else { host.to_owned() };
        if host.is_empty() || host.contains(['/', '@', '?', '#', '\\', '*', ' ']) {
            return wrong("it is only a name or an address");
        }
        let parsed = Url::parse(&format!("https://{host}/")).ok();
        match parsed.as_ref().and_then(Url::host_str) {
            Some(host) => Ok(Self { below, host: host.to_owned(), port }),
            None => wrong("no URL has such a host"),
        }
    }

    fn covers(&self, host: &str, port: u16) -> bool {
        let named = match self.below {
            true if literal(host).is_some() => false,
            true => host.strip_suffix(&self.host).is_some_and(|front| front.len() > 1 && front.ends_with('.')),
            false => host == self.host,
        };
        named && self.port.is_none_or(|p| p == port)
    }

    /// An operator who writes an address, or this machine's own name, means it. A name leads where whoever keeps it in the DNS
    /// says, and that may be a stranger by the time it is asked.
    fn reach(&self) -> Reach {
        if literal(&self.host).is_some() || self.host == "localhost" { Reach::Anywhere } else { Reach::Site }
    }
}

fn literal(host: &str) -> Option<IpAddr> {
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host).parse().ok()
}

/// Where a hop's host may lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Public addresses only.
    Public,
    /// Private networks too: the operator named this host. Not this machine, its link, or a cloud's metadata.
    Site,
    /// Anywhere: the operator named this address.
    Anywhere,
}

#[derive(Debug, Clone)]
pub(super) enum Hosts {
    /// The operator chose the URL.
    All,
    Listed {
        /// Empty: any, as far as it is public.
        https: Vec<HostRule>,
        http: Vec<HostRule>,
        /// Of https hosts that no rule names.
        ports: Vec<u16>,
    },
}

impl Hosts {
    /// Judges one hop; the reason of a refusal is for the one who named the URL.
    pub(super) fn judge(&self, url: &Url) -> Result<Reach, &'static str> {
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return Err("it has no host");
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err("it carries a user name or a password");
        }
        let (https, http, ports) = match self {
            Hosts::All if matches!(url.scheme(), "https" | "http") => return Ok(Reach::Anywhere),
            Hosts::All => return Err("only https and http are followed"),
            Hosts::Listed { https, http, ports } => (https, http, ports),
        };
        let listed = |rules: &[HostRule]| rules.iter().find(|rule| rule.covers(host, port)).map(HostRule::reach);
        let rule = match url.scheme() {
            "https" => listed(https),
            "http" => listed(http),
            _ => None,
        };
        if let Some(reach) = rule {
            return Ok(reach);
        }
        match url.scheme() {
            "https" if !https.is_empty() => Err("its host is not among worker.fetch.https_hosts"),
            "https" if is_literal_private(host) => Err("its address is not a public one"),
            "https" if !ports.contains(&port) => Err("its port is not among worker.fetch.https_ports"),
            "https" => Ok(Reach::Public),
            "http" => Err("plain http is only for hosts in worker.fetch.http_hosts"),
            _ => Err("only https is followed"),
        }
    }
}

/// An address instead of a name never reaches the resolver, so it is judged here. The URL parser has already brought every
/// notation (0x7f.1, 2130706433) into the usual one.
fn is_literal_private(host: &str) -> bool {
    literal(host).is_some_and(|ip| !is_public(ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(https: &[&str], http: &[&str]) -> Hosts {
        let rules = |list: &[&str]| list.iter().map(|t| HostRule::parse(t).expect(t)).collect();
        Hosts::Listed { https: rules(https), http: rules(http), ports: vec![443, 8443] }
    }

    fn judge(hosts: &Hosts, url: &str) -> Option<Reach> {
        hosts.judge(&Url::parse(url).expect(url)).ok()
    }

    #[test]
    fn without_a_list_any_public_https_host_is_asked() {
        let open = hosts(&[], &[]);
        assert_eq!(judge(&open, "https://example.com/a"), Some(Reach::Public));
        assert_eq!(judge(&open, "https://8.8.8.8/a"), Some(Reach::Public));
        assert_eq!(judge(&open, "https://example.com:8443/a"), Some(Reach::Public));
        assert_eq!(judge(&open, "http://example.com/a"), None);
        for port in [0, 22, 25, 80, 444, 3306, 4222, 6443, 8080, 65535] {
            assert_eq!(judge(&open, &format!("https://example.com:{port}/a")), None, "{port}");
        }
        for url in [
            "https://127.0.0.1/a",
            "https://0x7f.1/a",
            "https://2130706433/a",
            "https://0177.0.0.1/a",
            "https://127.1/a",
            "https://169.254.169.254/latest/meta-data",
            "https://169.254.169.254./latest/meta-data",
            "https://0xa9fea9fe/",
            "https://2852039166/",
            "https://0251.0376.0251.0376/",
            "https://0xa9.0xfe.43518/",
            "https://169.16689662/",
            "https://[::ffff:169.254.169.254]/",
            "https://[::ffff:a9fe:a9fe]/",
            "https://[64:ff9b::169.254.169.254]/",
            "https://[64:ff9b:1::a9fe:a9fe]/",
            "https://[2002:a9fe:a9fe::]/",
            "https://[::169.254.169.254]/",
            "https://[fd00::]/",
            "https://[fd00:ec2::254]/",
            "https://[fe80::1]/",
            "https://[::]/",
            "https://0/",
            "https://0.0.0.0/",
            "https://127.0.0.1.:443/",
            "https://%31%32%37.0.0.1/",
            "https://\u{2460}\u{2461}\u{2466}.0.0.1/",
            "https://[::1]/a",
            "https://[::ffff:127.0.0.1]/a",
            "https://[::ffff:8.8.8.8]/a",
            "https://[fd00::1]/a",
            "https://\u{ff11}27.0.0.1/a",
            "ftp://example.com/a",
            "https://user@example.com/a",
            "https://user:pass@example.com/a",
        ] {
            assert_eq!(judge(&open, url), None, "{url}");
        }
    }

    #[test]
    fn a_listed_host_may_be_private_and_others_are_refused() {
        let listed = hosts(
            &["127.0.0.1:8443", "audio.example.com", "*.cdn.example.com", "[::1]"],
            &["minio:9000", "localhost:1"],
        );
        for (reach, url) in [
            (Reach::Anywhere, "https://127.0.0.1:8443/a"),
            (Reach::Anywhere, "https://0x7f.1:8443/a"),
            (Reach::Anywhere, "https://[::1]/a"),
            (Reach::Anywhere, "http://localhost:1/a"),
            (Reach::Site, "https://AUDIO.example.com/a"),
            (Reach::Site, "https://audio.example.com:8443/a"),
            (Reach::Site, "https://a.cdn.example.com/"),
            (Reach::Site, "https://a.b.cdn.example.com/"),
            (Reach::Site, "http://minio:9000/a"),
        ] {
            assert_eq!(judge(&listed, url), Some(reach), "{url}");
        }
        for url in [
            "https://127.0.0.1/a",
            "https://other.example.com/a",
            "https://cdn.example.com/",
            "https://evilcdn.example.com/",
            "https://audio.example.com.evil.org/",
            "http://minio/a",
            "http://audio.example.com/a",
            "https://minio:9000/a",
        ] {
            assert_eq!(judge(&listed, url), None, "{url}");
        }
    }

    #[test]
    fn rules_are_hosts_and_nothing_else() {
        for text in ["a", "a:1", "*.a.b", "*.a.b:8443", "[::1]", "[::1]:443", "::1", "10.0.0.1:443"] {
            assert!(HostRule::parse(text).is_ok(), "{text}");
        }
        for text in ["", "*", "*.", "https://a", "a/b", "a:0", "a:x", "a:70000", "u@a", "a b", "a*b"] {
            assert!(HostRule::parse(text).is_err(), "{text}");
        }
        let odd = HostRule::parse("*.0.0.1").ok();
        assert!(odd.is_none_or(|rule| !rule.covers("127.0.0.1", 443)), "addresses have nothing below them");
        assert_eq!(HostRule::parse("A.Example").expect("rule").host, "a.example");
    }
}
