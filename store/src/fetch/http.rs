//! https, and http where it is allowed. Every hop is judged by its host, and every address its name leads to by the
//! resolver that the connection itself uses: what was judged is what is connected to.

use std::{
    error::Error,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt};
use reqwest::{
    Client, ClientBuilder, Response, StatusCode, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{self, HeaderMap, HeaderName},
    redirect::Policy,
};

use super::{
    FetchConfig, FetchError, Opened, Validator,
    address::{is_of_a_site, is_public},
    body::{Limits, watched},
    error::shown,
    hosts::{Hosts, Reach},
    tls::{NO_ROOTS, Trust},
};

const USER_AGENT: &str = concat!("voxfleet/", env!("CARGO_PKG_VERSION"));

pub(super) struct Web {
    hosts: Hosts,
    /// Connects to public addresses only.
    public: Client,
    /// For hosts the operator named.
    site: Client,
    /// For addresses the operator named.
    anywhere: Client,
    has_roots: bool,
    max_redirects: u32,
    /// For one hop's headers, connecting included.
    answer_timeout: Duration,
    limits: Limits,
}

impl Web {
    pub(super) fn new(config: &FetchConfig, hosts: Hosts, trust: &Trust, limits: Limits) -> Result<Self, FetchError> {
        Ok(Self {
            hosts,
            public: build(client(config, trust).dns_resolver(Judged { lookup: system, may: is_public }))?,
            site: build(client(config, trust).dns_resolver(Judged { lookup: system, may: is_of_a_site }))?,
            anywhere: build(client(config, trust))?,
            has_roots: trust.has_roots,
            max_redirects: config.max_redirects,
            answer_timeout: config.connect_timeout() + config.stall_timeout(),
            limits,
        })
    }

    /// The operator's own endpoints (S3) are reached the same way, without the limits for strangers' hosts.
    pub(super) fn unlimited_client(&self) -> Client {
        self.anywhere.clone()
    }

    pub(super) fn has_roots(&self) -> bool {
        self.has_roots
    }

    /// The body from byte `from` on where the server can do that and, when a validator is given, still has the same file;
    /// else from its beginning.
    pub(super) async fn open(
        &self,
        text: &str,
        host: &str,
        from: u64,
        validator: Option<&Validator>,
    ) -> Result<Opened, FetchError> {
        let mut url = parse(text)?;
        // Judged first: an odd notation of a private address is forbidden, not merely odd.
        self.judge(&url)?;
        if !same_host(&url, host) {
            let why = format!("its host would be asked as {:?}; write it so", url.host_str().unwrap_or_default());
            return Err(FetchError::BadUrl { at: shown(text), why });
        }
        for _ in 0..=self.max_redirects {
            let reach = self.judge(&url)?;
            let response = self.ask(&url, reach, from, validator).await?;
            match redirect(&url, &response)? {
                Some(next) => url = next,
                None => return self.take(&url, response, from, validator),
            }
        }
        let why = format!("more than {} redirects", self.max_redirects);
        Err(FetchError::Unavailable { at: shown(text), why, retry_after: None })
    }

    fn judge(&self, url: &Url) -> Result<Reach, FetchError> {
        let reach = self
            .hosts
            .judge(url)
            .map_err(|why| FetchError::Forbidden { at: shown(url.as_str()), why: why.to_owned() })?;
        if url.scheme() == "https" && !self.has_roots {
            return Err(FetchError::Config(format!("{}: {NO_ROOTS}", shown(url.as_str()))));
        }
        Ok(reach)
    }

    async fn ask(
        &self,
        url: &Url,
        reach: Reach,
        from: u64,
        validator: Option<&Validator>,
    ) -> Result<Response, FetchError> {
        let client = match reach {
            Reach::Public => &self.public,
            Reach::Site => &self.site,
            Reach::Anywhere => &self.anywhere,
        };
        // Nothing is carried from hop to hop: neither headers nor cookies.
        let mut request = client.get(url.clone()).header(header::ACCEPT_ENCODING, "identity");
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
            if let Some(mark) = validator.and_then(Validator::if_range) {
                request = request.header(header::IF_RANGE, mark);
            }
        }
        match tokio::time::timeout(self.answer_timeout, request.send()).await {
            Ok(answer) => answer.map_err(|error| trouble(url, error)),
            Err(_) => {
                let why = format!("no answer within {:?}", self.answer_timeout);
                Err(FetchError::Timeout { at: shown(url.as_str()), why })
            }
        }
    }

    fn take(
        &self,
        url: &Url,
        response: Response,
        asked_from: u64,
        asked: Option<&Validator>,
    ) -> Result<Opened, FetchError> {
        let at = shown(url.as_str());
        let headers = response.headers();
        let found = Validator::of(headers);
        let status = response.status();
        let (from, total) = match status {
            StatusCode::OK => (0, response.content_length()),
            StatusCode::PARTIAL_CONTENT => {
                let range = text(headers, &header::CONTENT_RANGE).and_then(content_range);
                match range {
                    Some((start, total)) if start == asked_from && Validator::agree(asked, found.as_ref()) => {
                        (start, total.or_else(|| response.content_length().map(|len| start + len)))
                    }
                    _ => {
                        let why = "the server sends another part than the one it was asked for".to_owned();
                        return Err(FetchError::Unavailable { at, why, retry_after: None });
                    }
                }
            }
            // All of it is here already.
            StatusCode::RANGE_NOT_SATISFIABLE
                if text(headers, &header::CONTENT_RANGE).and_then(range_total) == Some(asked_from) =>
            {
                let body = futures_util::stream::empty().boxed();
                return Ok(Opened { body, from: asked_from, total: Some(asked_from), validator: found });
            }
            status => return Err(refusal(at, status, headers)),
        };
        if let Some(coding) = text(headers, &header::CONTENT_ENCODING).filter(|c| !c.eq_ignore_ascii_case("identity")) {
            let why = format!("the server packs the file ({}); it has to come as it is", printable(coding));
            return Err(FetchError::BadUrl { at, why });
        }
        self.limits.admit(&at, total)?;
        let url = url.clone();
        let body = response.bytes_stream().map_err(move |error| trouble(&url, error)).boxed();
        Ok(Opened { body: watched(body, at, self.limits, from, total), from, total, validator: found })
    }
}

fn client(config: &FetchConfig, trust: &Trust) -> ClientBuilder {
    Client::builder()
        .tls_backend_preconfigured(trust.config.clone())
        .user_agent(USER_AGENT)
        // HTTP/1.1: each body has a connection of its own, so a slow one holds up no other.
        .http1_only()
        // The environment's proxies would connect in our place and undo the check of addresses.
        .no_proxy()
        .referer(false)
        .redirect(Policy::none())
        .retry(reqwest::retry::never())
        // A connection is not kept: its address would not be judged again.
        .pool_max_idle_per_host(0)
        .connect_timeout(config.connect_timeout())
}

fn build(client: ClientBuilder) -> Result<Client, FetchError> {
    client.build().map_err(|error| FetchError::Config(format!("the HTTP client: {error}")))
}

/// A resolver that refuses names which lead to any address that may not be reached. The connection is made to the addresses
/// it gives out, without another look-up: a name that answers differently a moment later (DNS rebinding) gains nothing.
struct Judged<L> {
    lookup: L,
    may: fn(IpAddr) -> bool,
}

#[derive(Debug, thiserror::Error)]
#[error("its name leads to an address that may not be reached by a name")]
struct NotPublic;

async fn system(name: String) -> io::Result<Vec<SocketAddr>> {
    Ok(tokio::net::lookup_host((name.as_str(), 0)).await?.collect())
}

impl<L, F> Resolve for Judged<L>
where
    L: Fn(String) -> F + Send + Sync,
    F: Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'static,
{
    fn resolve(&self, name: Name) -> Resolving {
        let (looking, may) = ((self.lookup)(name.as_str().to_owned()), self.may);
        Box::pin(async move {
            let found = looking.await?;
            if found.iter().any(|address| !may(address.ip())) {
                return Err(NotPublic.into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

fn parse(text: &str) -> Result<Url, FetchError> {
    Url::parse(text).map_err(|error| FetchError::BadUrl {
        at: shown(text),
        why: format!("it is not a URL that can be used: {error}"),
    })
}

/// Whether the wire types and the URL parser read the same host. They differ in what only a trick, or a name that is not
/// written in ASCII, needs.
fn same_host(url: &Url, host: &str) -> bool {
    let bare = |h: &str| h.trim_start_matches('[').trim_end_matches(']').to_owned();
    let asked = url.host_str().map(bare).unwrap_or_default();
    let v6 = |h: &str| h.parse::<std::net::Ipv6Addr>().ok();
    asked == host || (v6(&asked).is_some() && v6(&asked) == v6(host))
}

fn redirect(url: &Url, response: &Response) -> Result<Option<Url>, FetchError> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let wrong = || FetchError::Unavailable {
        at: shown(url.as_str()),
        why: format!("the server redirects ({}) without saying where", response.status().as_u16()),
        retry_after: None,
    };
    let location = text(response.headers(), &header::LOCATION).ok_or_else(wrong)?;
    url.join(location).map(Some).map_err(|_| wrong())
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// A stranger's header in a message.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(40).collect()
}

/// `bytes 100-199/200` gives (100, 200); the total may be `*`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    match total.trim() {
        "*" if start <= end => Some((start, None)),
        total => total.parse().ok().filter(|total| start <= end && end < *total).map(|total| (start, Some(total))),
    }
}

/// `bytes */200` gives 200.
fn range_total(text: &str) -> Option<u64> {
    text.trim().strip_prefix("bytes ")?.trim().strip_prefix("*/")?.parse().ok()
}

/// What a status other than success means.
pub(super) fn refusal(at: String, status: StatusCode, headers: &HeaderMap) -> FetchError {
    let why = format!("the server answers {}", status.as_u16());
    match status.as_u16() {
        404 | 410 => FetchError::NotFound { at },
        401 | 403 | 407 | 451 => FetchError::Forbidden { at, why },
        408 | 425 | 429 | 500.. => FetchError::Unavailable { at, why, retry_after: retry_after(headers) },
        413 | 414 | 431 => FetchError::BadUrl { at, why },
        400..=499 => FetchError::BadUrl { at, why },
        _ => FetchError::Unavailable { at, why: format!("{why}, which is no file"), retry_after: None },
    }
}

/// In seconds; the other form, a date, is rare and left to our own delays.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = text(headers, &header::RETRY_AFTER)?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds.min(24 * 3600)))
}

/// The client's errors name the whole URL, so only their causes are told.
fn trouble(url: &Url, error: reqwest::Error) -> FetchError {
    let at = shown(url.as_str());
    let timed_out = error.is_timeout();
    let connecting = error.is_connect();
    let error = error.without_url();
    let mut last: &(dyn Error + 'static) = &error;
    loop {
        if last.is::<NotPublic>() {
            return FetchError::Forbidden { at, why: NotPublic.to_string() };
        }
        let inner = last.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(rustls::Error::InvalidCertificate(why)) = inner.and_then(|e| e.downcast_ref::<rustls::Error>()) {
            return FetchError::Untrusted { at, why: format!("its certificate is not trusted: {why}") };
        }
        match last.source() {
            Some(source) => last = source,
            None => break,
        }
    }
    match (timed_out, connecting) {
        (true, _) => FetchError::Timeout { at, why: "no connection in time".to_owned() },
        (_, true) => FetchError::Unavailable { at, why: format!("no connection: {last}"), retry_after: None },
        _ => FetchError::Unavailable { at, why: format!("the connection broke off: {last}"), retry_after: None },
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{
            Arc, Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };
    use tokio_util::task::TaskTracker;
    use voxfleet_schema::job::AudioUrl;

    use super::*;

    #[test]
    fn ranges_are_read_strictly() {
        assert_eq!(content_range("bytes 100-199/200"), Some((100, Some(200))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, None)));
        for text in ["", "bytes", "bytes */200", "bytes 5-4/10", "bytes 5-10/10", "bytes x-1/2", "items 0-1/2"] {
            assert_eq!(content_range(text), None, "{text}");
        }
        assert_eq!(range_total("bytes */200"), Some(200));
        assert_eq!(range_total("bytes 0-1/200"), None);
    }

    #[test]
    fn statuses_have_their_class() {
        use voxfleet_schema::failure::FailureClass as C;
        for (status, class) in [
            (400, C::BadRequest),
            (401, C::Forbidden),
            (403, C::Forbidden),
            (404, C::NotFound),
            (410, C::NotFound),
            (416, C::BadRequest),
            (429, C::Unavailable),
            (500, C::Unavailable),
            (503, C::Unavailable),
            (204, C::Unavailable),
            (304, C::Unavailable),
        ] {
            let status = StatusCode::from_u16(status).expect("status");
            let failure = refusal("https://h/a".to_owned(), status, &HeaderMap::new()).failure();
            assert_eq!(failure.class, class, "{status}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::RETRY_AFTER, "7".parse().expect("header"));
        let failure = refusal("https://h/a".to_owned(), StatusCode::SERVICE_UNAVAILABLE, &headers).failure();
        assert_eq!(failure.retry_after_ms, Some(7_000));
    }

    #[test]
    fn both_parsers_must_read_the_same_host() {
        let agree = |text: &str| match AudioUrl::parse(text) {
            Ok(AudioUrl::Http { url, host, .. }) => Url::parse(&url).is_ok_and(|url| same_host(&url, &host)),
            _ => false,
        };
        for text in [
            "https://a.example/x",
            "https://A.Example:8443/x",
            "https://[::1]:1/x",
            "https://[0:0::1]/x",
            "http://1.2.3.4/x",
        ] {
            assert!(agree(text), "{text}");
        }
        for text in [
            "https://good.example\\.evil.example/x",
            "https://good.example\\@evil.example/x",
            "https://evil.example%2f.good.example/x",
            "https://0x7f.1/x",
            "https://b\u{fc}cher.example/x",
            "https://ex%61mple.org/x",
        ] {
            assert!(!agree(text), "{text}");
        }
    }

    /// A server that counts who comes, and says where he came to.
    async fn listener(address: &str) -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind(address).await.expect("a port");
        let (at, came) = (listener.local_addr().expect("bound"), Arc::new(AtomicUsize::new(0)));
        let counter = Arc::clone(&came);
        let serving = async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                let mut request = vec![0; 4_096];
                let _ = stream.read(&mut request).await;
                let said = at.ip().to_string();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{said}", said.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        };
        TaskTracker::new().spawn(serving);
        (at, came)
    }

    #[tokio::test]
    async fn what_was_judged_is_what_is_connected_to() {
        // One port on two addresses; in this test the first is public and the second is not.
        let (good, visits) = listener("127.0.0.2:0").await;
        let (_, trespasses) = listener(&format!("127.0.0.1:{}", good.port())).await;
        let answers: Arc<Mutex<VecDeque<Vec<&str>>>> = Arc::default();
        let asked = Arc::new(AtomicUsize::new(0));
        let (script, count) = (Arc::clone(&answers), Arc::clone(&asked));
        let lookup = move |_: String| {
            count.fetch_add(1, Ordering::SeqCst);
            let said = script.lock().expect("no panic").pop_front().unwrap_or_else(|| vec!["127.0.0.1"]);
            let found = said.into_iter().map(|ip| SocketAddr::new(ip.parse().expect("an address"), 0)).collect();
            std::future::ready(Ok(found))
        };
        let may = |ip: IpAddr| ip == IpAddr::from([127, 0, 0, 2]);
        let (config, trust) = (FetchConfig::default(), Trust::load(None).expect("trust"));
        let limits = Limits { stall: Duration::from_secs(5), min_bytes_per_s: 0, max_bytes: 1_000 };
        let mut web = Web::new(&config, Hosts::All, &trust, limits).expect("a client");
        web.public = build(client(&config, &trust).dns_resolver(Judged { lookup, may })).expect("a client");
        let url = Url::parse(&format!("http://rebind.example:{}/a", good.port())).expect("url");
        let ask = || web.ask(&url, Reach::Public, 0, None);

        // Public when it is judged, private a moment later: nobody asks a second time.
        answers.lock().expect("no panic").push_back(vec!["127.0.0.2"]);
        let response = ask().await.expect("the public one");
        assert_eq!(response.text().await.expect("a body"), "127.0.0.2");
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        // The next hop or resumption is judged anew: no connection is kept, no answer remembered.
        assert!(matches!(ask().await, Err(FetchError::Forbidden { .. })));
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        // One private address among public ones spoils all of them.
        for mixed in
            [vec!["127.0.0.2", "127.0.0.1"], vec!["127.0.0.1", "127.0.0.2"], vec!["::1"], vec!["::ffff:127.0.0.2"]]
        {
            answers.lock().expect("no panic").push_back(mixed.clone());
            assert!(matches!(ask().await, Err(FetchError::Forbidden { .. })), "{mixed:?}");
        }
        assert_eq!((visits.load(Ordering::SeqCst), trespasses.load(Ordering::SeqCst)), (1, 0));
    }

    #[test]
    fn a_relative_redirect_stays_with_its_host() {
        let base = Url::parse("https://a.example/b/c?d").expect("url");
        assert_eq!(base.join("/x").expect("join").as_str(), "https://a.example/x");
        assert_eq!(base.join("//evil.example/x").expect("join").host_str(), Some("evil.example"));
    }
}
