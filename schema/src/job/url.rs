//! Where recordings lie.

/// Longest audio URL, in bytes; presigned ones run to about 2,000.
pub const MAX_URL_BYTES: usize = 4_096;
/// Bucket of the object store that `object://` means.
pub const MEDIA_BUCKET: &str = "asr_media";

/// Where a recording lies. Parsed here, allowed or refused by the worker's configuration: it is data from a stranger.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AudioUrl {
    /// `object://asr_media/<key>`: the object store of this NATS account.
    Object { key: String },
    /// `file:///path` on the worker's machine.
    File { path: String },
    /// `https://...`, or `http://...` where a worker's configuration names that host.
    Http { url: String, host: String, tls: bool },
    /// `s3://<bucket>/<key>`, with the worker's own credentials.
    S3 { bucket: String, key: String },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    #[error("the audio URL is {len} bytes long, the limit is {MAX_URL_BYTES}")]
    TooLong { len: usize },
    #[error("the audio URL has no scheme; use object://asr_media/<key>, https://, s3:// or file:///")]
    NoScheme,
    #[error("scheme {0:?} is not among object, https, http, s3 and file")]
    Scheme(String),
    #[error("{0}")]
    Shape(&'static str),
}

impl AudioUrl {
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        if text.len() > MAX_URL_BYTES {
            return Err(UrlError::TooLong { len: text.len() });
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(UrlError::Shape(
                "the audio URL has spaces or control characters; write them as %20 and the like",
            ));
        }
        let (scheme, rest) = text.split_once("://").ok_or(UrlError::NoScheme)?;
        match scheme.to_ascii_lowercase().as_str() {
            "object" => match rest.split_once('/') {
                Some((MEDIA_BUCKET, key)) if !key.is_empty() => Ok(AudioUrl::Object { key: key.to_owned() }),
                _ => Err(UrlError::Shape("an object URL is object://asr_media/<key>")),
            },
            "file" if rest.contains(['?', '#']) => {
                Err(UrlError::Shape("a file URL has no query; write ? as %3F and # as %23"))
            }
            "file" => match rest.strip_prefix("localhost").unwrap_or(rest) {
                path if path.starts_with('/') && path.len() > 1 => Ok(AudioUrl::File { path: path.to_owned() }),
                _ => Err(UrlError::Shape("a file URL is file:///absolute/path")),
            },
            "s3" => match rest.split_once('/') {
                Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() => {
                    Ok(AudioUrl::S3 { bucket: bucket.to_owned(), key: key.to_owned() })
                }
                _ => Err(UrlError::Shape("an S3 URL is s3://<bucket>/<key>")),
            },
            scheme @ ("https" | "http") => {
                let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
                if authority.contains('@') {
                    return Err(UrlError::Shape("an audio URL carries no user name and no password"));
                }
                let host = match authority.strip_prefix('[') {
                    Some(v6) => v6.split(']').next().unwrap_or_default(),
                    None => authority.split(':').next().unwrap_or_default(),
                };
                if host.is_empty() {
                    return Err(UrlError::Shape("the audio URL has no host"));
                }
                let host = host.to_ascii_lowercase();
                Ok(AudioUrl::Http { url: text.to_owned(), host, tls: scheme == "https" })
            }
            other => Err(UrlError::Scheme(other.chars().take(16).collect())),
        }
    }

    /// URL of a key in the object store.
    pub fn object(key: &str) -> String {
        format!("object://{MEDIA_BUCKET}/{key}")
    }

    /// Any URL as it may be shown, also one that is none of ours: without query, fragment, user name and password.
    pub fn harmless(text: &str) -> String {
        let plain = Self::redacted(text);
        let Some((scheme, rest)) = plain.split_once("://") else { return plain.to_owned() };
        match rest.rsplit_once('@') {
            Some((_, host)) => format!("{scheme}://***@{host}"),
            None => plain.to_owned(),
        }
    }

    /// The URL as it may be shown: without query and fragment, which may hold a signature.
    pub fn redacted(text: &str) -> &str {
        text.split(['?', '#']).next().unwrap_or_default()
    }

    /// Last part of its path, a hint at the container.
    pub fn file_name(&self) -> Option<&str> {
        let path = match self {
            AudioUrl::Object { key } | AudioUrl::S3 { key, .. } => key,
            AudioUrl::File { path } => path,
            AudioUrl::Http { url, .. } => url.split(['?', '#']).next()?.split_once("://")?.1.split_once('/')?.1,
        };
        path.rsplit('/').next().filter(|name| !name.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_told_apart() {
        let parse = |text: &str| AudioUrl::parse(text);
        let http = |url: &str, host: &str, tls| Ok(AudioUrl::Http { url: url.into(), host: host.into(), tls });
        assert_eq!(
            parse("object://asr_media/audio/a b"),
            Err(UrlError::Shape("the audio URL has spaces or control characters; write them as %20 and the like"))
        );
        assert_eq!(parse("object://asr_media/a/b.wav"), Ok(AudioUrl::Object { key: "a/b.wav".into() }));
        assert!(matches!(parse("object://other/a"), Err(UrlError::Shape(_))));
        assert!(matches!(parse("object://asr_media/"), Err(UrlError::Shape(_))));
        assert_eq!(parse("file:///tmp/a.wav"), Ok(AudioUrl::File { path: "/tmp/a.wav".into() }));
        for bad in ["file://tmp/a.wav", "file:///a.wav?x", "file:///a#b.wav"] {
            assert!(matches!(parse(bad), Err(UrlError::Shape(_))), "{bad}");
        }
        assert_eq!(parse("s3://b/k/1.flac"), Ok(AudioUrl::S3 { bucket: "b".into(), key: "k/1.flac".into() }));
        assert_eq!(parse("https://H.example:8443/a?x=1"), http("https://H.example:8443/a?x=1", "h.example", true));
        assert_eq!(parse("http://[::1]:80/a"), http("http://[::1]:80/a", "::1", false));
        assert!(matches!(parse("https://user:pass@host/a"), Err(UrlError::Shape(_))));
        assert!(matches!(parse("https:///a"), Err(UrlError::Shape(_))));
        assert_eq!(parse("ftp://host/a"), Err(UrlError::Scheme("ftp".into())));
        assert_eq!(parse("call.wav"), Err(UrlError::NoScheme));
        assert_eq!(parse(&format!("https://h/{}", "x".repeat(5_000))), Err(UrlError::TooLong { len: 5_010 }));
        assert_eq!(parse("https://h/p/call.mp3?sig=s").expect("url").file_name(), Some("call.mp3"));
        assert_eq!(parse("https://h").expect("url").file_name(), None);
        for secret in ["https://h/a?X-Amz-Signature=s", "https://h/a#token=s", "https://h/a#t?s", "https://h/a?s#t"] {
            assert_eq!(AudioUrl::redacted(secret), "https://h/a", "{secret}");
        }
        for secret in ["https://u:p@h/a?s", "https://u:p/@h/a#s", "https://u@h/a"] {
            assert_eq!(AudioUrl::harmless(secret), "https://***@h/a", "{secret}");
        }
        assert_eq!(AudioUrl::harmless("models?s"), "models");
    }
}
