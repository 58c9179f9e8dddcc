//! Brings a recording here from wherever its URL says, or says in one sentence why not.
//!
//! A URL is a stranger's wish. The worker's [`FetchConfig`] decides which hosts, buckets and folders it may name; sizes,
//! pace and time are bounded; a body that breaks off is resumed where the source can prove that it is still the same file,
//! else begun again. Nothing of a URL's query and nothing of a credential reaches an error or a log. Whoever drops a future
//! of ours leaves nothing behind: spooled files have no name.
//!
//! | module | holds |
//! |---|---|
//! | [`config`](FetchConfig) | what may be fetched and how long it may take |
//! | `hosts`, `address` | which hosts and addresses may be asked; pure |
//! | `http`, `tls` | https and http, hop by hop |
//! | `s3`, `object`, `file` | the other schemes |
//! | `body` | pace, size and announced length of any body |
//! | `spool` | into an unlinked file, over breaks |

mod address;
mod body;
mod config;
mod error;
mod file;
mod hosts;
mod http;
mod object;
mod s3;
mod spool;
mod tls;

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use reqwest::header::{self, HeaderMap};
use voxfleet_nats::media::Media;
use voxfleet_schema::job::AudioUrl;

use self::{
    body::Limits,
    file::Roots,
    hosts::Hosts,
    http::Web,
    s3::{Buckets, S3},
    tls::Trust,
};
pub use self::{config::FetchConfig, error::FetchError, spool::Spooled};

/// A body on its way.
pub struct Incoming {
    /// Ends after `total` bytes where that is known, or in an error, which is its last item.
    pub body: BoxStream<'static, Result<Bytes, FetchError>>,
    /// Position of its first byte in the file: what was asked for, or 0 where the source can not do that.
    pub from: u64,
    /// Length of the whole file.
    pub total: Option<u64>,
}

/// The same with what proves that a later answer is about the same file.
struct Opened {
    body: BoxStream<'static, Result<Bytes, FetchError>>,
    from: u64,
    total: Option<u64>,
    validator: Option<Validator>,
}

/// What a server says to tell one version of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Validator {
    etag: Option<String>,
    last_modified: Option<String>,
}

impl Validator {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| headers.get(name)?.to_str().ok().map(str::to_owned);
        let (etag, last_modified) = (text(header::ETAG), text(header::LAST_MODIFIED));
        (etag.is_some() || last_modified.is_some()).then_some(Self { etag, last_modified })
    }

    /// For `If-Range`, which takes no weak tag.
    fn if_range(&self) -> Option<&str> {
        let strong = self.etag.as_deref().filter(|tag| !tag.starts_with("W/"));
        strong.or(self.last_modified.as_deref())
    }

    /// Whether what came is of the file that was asked for. Only what both sides name can tell them apart.
    fn agree(asked: Option<&Self>, found: Option<&Self>) -> bool {
        let (Some(asked), Some(found)) = (asked, found) else { return true };
        let same = |a: &Option<String>, b: &Option<String>| a.is_none() || b.is_none() || a == b;
        same(&asked.etag, &found.etag) && same(&asked.last_modified, &found.last_modified)
    }
}

/// Fetches by URL. Cheap to clone.
#[derive(Clone)]
pub struct Fetcher {
    parts: Arc<Parts>,
}

struct Parts {
    web: Web,
    s3: S3,
    roots: Arc<Roots>,
    media: Option<Media>,
    limits: Limits,
    total: Duration,
    spool_dir: PathBuf,
}

impl Fetcher {
    /// For strangers' URLs: what `config` does not allow is refused.
    pub fn new(config: FetchConfig, media: Media) -> Result<Self, FetchError> {
        let hosts = config.hosts().map_err(FetchError::Config)?;
        let buckets = match config.s3_buckets.iter().any(|b| b == "*") {
            true => Buckets::Any,
            false => Buckets::Listed(config.s3_buckets.clone()),
        };
        let roots = Roots::Listed(config.file_roots.clone());
        Self::assemble(&config, hosts, buckets, roots, Some(media))
    }

    /// For URLs that the operator chose, as of models: any host, bucket and folder, of any size; `object://` is not theirs.
    pub fn trusted(ca_file: Option<PathBuf>) -> Result<Self, FetchError> {
        Self::trusted_with(FetchConfig { ca_file, max_bytes: u64::MAX, ..FetchConfig::default() })
    }

    /// The same with an S3 service, limits and timeouts of one's own.
    pub fn trusted_with(config: FetchConfig) -> Result<Self, FetchError> {
        Self::assemble(&config, Hosts::All, Buckets::Any, Roots::Anywhere, None)
    }

    fn assemble(
        config: &FetchConfig,
        hosts: Hosts,
        buckets: Buckets,
        roots: Roots,
        media: Option<Media>,
    ) -> Result<Self, FetchError> {
        let limits = Limits {
            stall: config.stall_timeout(),
            min_bytes_per_s: config.min_bytes_per_s,
            max_bytes: config.max_bytes,
        };
        let trust = Trust::load(config.ca_file.as_deref())?;
        let web = Web::new(config, hosts, &trust, limits)?;
        let s3 = S3::new(config, buckets, &web, limits);
        let spool_dir = config.spool_dir();
        let total = Duration::from_secs(config.total_timeout_s);
        Ok(Self { parts: Arc::new(Parts { web, s3, roots: Arc::new(roots), media, limits, total, spool_dir }) })
    }

    /// The body of a URL from byte `from` on, or from its beginning where the source can not do that. One try.
    pub async fn open(&self, url: &AudioUrl, from: u64) -> Result<Incoming, FetchError> {
        let Opened { body, from, total, .. } = self.begin(url, from, None).await?;
        Ok(Incoming { body, from, total })
    }

    async fn begin(&self, url: &AudioUrl, from: u64, validator: Option<&Validator>) -> Result<Opened, FetchError> {
        let parts = &*self.parts;
        match url {
            AudioUrl::Http { url, host, .. } => parts.web.open(url, host, from, validator).await,
            AudioUrl::S3 { bucket, key } => parts.s3.open(bucket, key, from, validator).await,
            AudioUrl::Object { key } => object::open(parts.media.as_ref(), key, from, parts.limits).await,
            AudioUrl::File { path } => {
                let (file, total) = self.open_file(path).await?;
                object::read_file(file, path, from, total, parts.limits).await
            }
        }
    }

    async fn open_file(&self, path: &str) -> Result<(std::fs::File, u64), FetchError> {
        let (roots, owned) = (Arc::clone(&self.parts.roots), path.to_owned());
        let opened = tokio::task::spawn_blocking(move || file::open(&roots, &owned)).await;
        let at = error::shown(&format!("file://{path}"));
        let (file, total) =
            opened.map_err(|error| FetchError::Internal { at: at.clone(), why: error.to_string() })??;
        self.parts.limits.admit(&at, Some(total))?;
        Ok((file, total))
    }
}

impl std::fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetcher").field("limits", &self.parts.limits).finish_non_exhaustive()
    }
}
