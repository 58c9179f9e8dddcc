//! A web server that does what a test tells it, with a certificate of its own: files in whole or in part, refusals,
//! redirects, and every way of misbehaving while a body is sent.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{self, pki_types::PrivateKeyDer},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Error, Result};

/// What the server does with one request. Made with [`Answer::file`] or [`Answer::status`], then bent.
#[derive(Debug, Clone)]
pub struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Bytes,
    ranges: bool,
    etag: Option<String>,
    length: Length,
    end: End,
    pace: Option<(usize, Duration)>,
}

#[derive(Debug, Clone, Copy)]
enum Length {
    True,
    /// `Content-Length` says this instead.
    Claimed(u64),
    /// Chunks instead of a length.
    Chunked,
}

#[derive(Debug, Clone, Copy)]
enum End {
    Whole,
    /// The connection is closed after so many bytes of the body.
    CutAfter(usize),
    /// Nothing follows so many bytes of the body, and the connection stays.
    SilentAfter(usize),
    /// Not even headers.
    NoAnswer,
    /// Header after header, each in time, for ever.
    EndlessHeaders,
}

impl Answer {
    /// A file; parts of it where a request asks for them.
    pub fn file(body: impl Into<Bytes>) -> Self {
        Self { ranges: true, etag: Some("\"1\"".to_owned()), ..Self::status(200).body(body) }
    }

    pub fn status(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Bytes::new(),
            ranges: false,
            etag: None,
            length: Length::True,
            end: End::Whole,
            pace: None,
        }
    }

    pub fn redirect(to: impl Into<String>) -> Self {
        Self::status(302).header("Location", to)
    }

    /// Takes the request and says nothing.
    pub fn silence() -> Self {
        Self { end: End::NoAnswer, ..Self::status(200) }
    }

    /// Slow-loris the other way round: a header now and then, never the last.
    pub fn endless_headers() -> Self {
        Self { end: End::EndlessHeaders, ..Self::status(200) }
    }

    pub fn body(self, body: impl Into<Bytes>) -> Self {
        Self { body: body.into(), ..self }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Always all of it, whatever part is asked for.
    pub fn without_ranges(self) -> Self {
        Self { ranges: false, ..self }
    }

    pub fn etag(self, etag: Option<&str>) -> Self {
        Self { etag: etag.map(str::to_owned), ..self }
    }

    pub fn claiming(self, length: u64) -> Self {
        Self { length: Length::Claimed(length), ..self }
    }

    pub fn chunked(self) -> Self {
        Self { length: Length::Chunked, ..self }
    }

    pub fn cut_after(self, bytes: usize) -> Self {
        Self { end: End::CutAfter(bytes), ..self }
    }

    pub fn silent_after(self, bytes: usize) -> Self {
        Self { end: End::SilentAfter(bytes), ..self }
    }

    /// So many bytes at a time, with a pause after each.
    pub fn paced(self, bytes: usize, pause: Duration) -> Self {
        Self { pace: Some((bytes, pause)), ..self }
    }
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// With its query.
    pub target: String,
    headers: HashMap<String, String>,
}

impl Request {
    /// `name` in small letters.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

#[derive(Default)]
struct Script {
    /// For each path, what comes next; the last one stays.
    answers: Mutex<HashMap<String, Vec<Answer>>>,
    requests: Mutex<Vec<Request>>,
    open: AtomicUsize,
}

/// Listens on 127.0.0.1 until dropped.
pub struct Server {
    address: SocketAddr,
    tls: bool,
    script: Arc<Script>,
    stop: CancellationToken,
    dir: TempDir,
}

impl Server {
    /// With TLS; who wants to trust it reads [`Self::ca_file`].
    pub async fn start() -> Result<Self> {
        Self::begin(true).await
    }

    /// Without TLS.
    pub async fn start_plain() -> Result<Self> {
        Self::begin(false).await
    }

    async fn begin(tls: bool) -> Result<Self> {
        let dir = tempfile::tempdir().map_err(Error::io("folder of the web server"))?;
        let acceptor = if tls { Some(acceptor(&dir.path().join("ca.pem"))?) } else { None };
        let listener = TcpListener::bind(("127.0.0.1", crate::ports::free_port()?)).await;
        let listener = listener.map_err(Error::io("listener of the web server"))?;
        let address = listener.local_addr().map_err(Error::io("address of the web server"))?;
        let (script, stop) = (Arc::new(Script::default()), CancellationToken::new());
        // Dropping the server ends this task, and with it the connections in its set.
        TaskTracker::new().spawn(accept(listener, acceptor, Arc::clone(&script), stop.clone()));
        Ok(Self { address, tls, script, stop, dir })
    }

    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", if self.tls { "https" } else { "http" }, self.address)
    }

    /// The certificate that signed the server's; PEM.
    pub fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// What the path is answered with, one after the other; the last one from then on. Paths without one are 404.
    pub fn route(&self, path: &str, answers: impl IntoIterator<Item = Answer>) {
        lock(&self.script.answers).insert(path.to_owned(), answers.into_iter().collect());
    }

    /// Requests for a path so far, whatever their query.
    pub fn requests(&self, path: &str) -> Vec<Request> {
        lock(&self.script.requests).iter().filter(|r| path_of(&r.target) == path).cloned().collect()
    }

    /// Connections that are open now.
    pub fn open_connections(&self) -> usize {
        self.script.open.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn path_of(target: &str) -> &str {
    target.split('?').next().unwrap_or_default()
}

/// A new authority, written to `ca_file`, and a server certificate by it for this machine.
fn acceptor(ca_file: &Path) -> Result<TlsAcceptor> {
    let wrong = |error: &dyn std::fmt::Display| Error::Wrong(format!("certificate of the web server: {error}"));
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "authority of a test");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().map_err(|e| wrong(&e))?;
    let signed = authority.self_signed(&authority_key).map_err(|e| wrong(&e))?;
    std::fs::write(ca_file, signed.pem()).map_err(Error::io("certificate file"))?;
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let key = KeyPair::generate().map_err(|e| wrong(&e))?;
    let leaf = CertificateParams::new(names).map_err(|e| wrong(&e))?;
    let leaf = leaf.signed_by(&key, &Issuer::new(authority, authority_key)).map_err(|e| wrong(&e))?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|e| wrong(&e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| wrong(&e))?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .map_err(|e| wrong(&e))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, script: Arc<Script>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => if let Ok((client, _)) = accepted {
                connections.spawn(connection(client, tls.clone(), Arc::clone(&script)));
            },
        }
    }
}

async fn connection(client: TcpStream, tls: Option<TlsAcceptor>, script: Arc<Script>) {
    script.open.fetch_add(1, Ordering::SeqCst);
    // An error is a client that went away, which is its right.
    let _ = match tls {
        None => serve(client, &script).await,
        Some(tls) => match tls.accept(client).await {
            Ok(client) => serve(client, &script).await,
            Err(error) => Err(error),
        },
    };
    script.open.fetch_sub(1, Ordering::SeqCst);
}

/// One request; the connection is closed after it.
async fn serve(client: impl AsyncRead + AsyncWrite + Unpin, script: &Script) -> std::io::Result<()> {
    let mut client = BufReader::new(client);
    let Some(request) = read_request(&mut client).await? else { return Ok(()) };
    let answer = next_answer(script, path_of(&request.target));
    lock(&script.requests).push(request.clone());
    match answer.end {
        End::NoAnswer => return until_closed(&mut client).await,
        End::EndlessHeaders => {
            client.write_all(b"HTTP/1.1 200 OK\r\n").await?;
            loop {
                client.write_all(b"X-More: 1\r\n").await?;
                client.flush().await?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        _ => {}
    }
    let part = part(&answer, &request);
    client.write_all(head(&answer, &part).as_bytes()).await?;
    if request.method != "HEAD" {
        send(&mut client, &answer, &part.body).await?;
    }
    client.flush().await?;
    if let End::SilentAfter(_) = answer.end {
        return until_closed(&mut client).await;
    }
    client.shutdown().await
}

async fn until_closed(client: &mut (impl AsyncRead + Unpin)) -> std::io::Result<()> {
    tokio::io::copy(client, &mut tokio::io::sink()).await.map(|_| ())
}

async fn read_request(client: &mut (impl AsyncBufReadExt + Unpin)) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    client.read_line(&mut line).await?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(None) };
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if client.read_line(&mut line).await? == 0 {
            return Ok(None);
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
            None => return Ok(Some(Request { method, target, headers })),
        };
    }
}

fn next_answer(script: &Script, path: &str) -> Answer {
    let mut answers = lock(&script.answers);
    match answers.get_mut(path) {
        Some(list) if list.len() > 1 => list.remove(0),
        Some(list) => list.first().cloned().unwrap_or_else(|| Answer::status(404)),
        None => Answer::status(404),
    }
}

/// What is sent of the body, and as what.
struct Part {
    status: u16,
    range: Option<String>,
    body: Bytes,
}

fn part(answer: &Answer, request: &Request) -> Part {
    let whole = || Part { status: answer.status, range: None, body: answer.body.clone() };
    let fresh = request.header("if-range").is_none_or(|mark| answer.etag.as_deref() == Some(mark));
    let start =
        request.header("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let len = answer.body.len();
    match start {
        Some(start) if answer.ranges && fresh && start < len => Part {
            status: 206,
            range: Some(format!("bytes {start}-{}/{len}", len - 1)),
            body: answer.body.slice(start..),
        },
        Some(_) if answer.ranges && fresh => {
            Part { status: 416, range: Some(format!("bytes */{len}")), body: Bytes::new() }
        }
        _ => whole(),
    }
}

fn head(answer: &Answer, part: &Part) -> String {
    let mut head = format!("HTTP/1.1 {} Scripted\r\nConnection: close\r\n", part.status);
    let mut line = |name: &str, value: &str| head.push_str(&format!("{name}: {value}\r\n"));
    match answer.length {
        Length::True => line("Content-Length", &part.body.len().to_string()),
        Length::Claimed(length) => line("Content-Length", &length.to_string()),
        Length::Chunked => line("Transfer-Encoding", "chunked"),
    }
    if let Some(range) = &part.range {
        line("Content-Range", range);
    }
    if let Some(etag) = &answer.etag {
        line("ETag", etag);
    }
    for (name, value) in &answer.headers {
        line(name, value);
    }
    head.push_str("\r\n");
    head
}

async fn send(client: &mut (impl AsyncWrite + Unpin), answer: &Answer, body: &[u8]) -> std::io::Result<()> {
    let shown = match answer.end {
        End::CutAfter(bytes) | End::SilentAfter(bytes) => &body[..bytes.min(body.len())],
        _ => body,
    };
    let (step, pause) = answer.pace.unwrap_or((64 * 1024, Duration::ZERO));
    for piece in shown.chunks(step.max(1)) {
        if let Length::Chunked = answer.length {
            client.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await?;
            client.write_all(piece).await?;
            client.write_all(b"\r\n").await?;
        } else {
            client.write_all(piece).await?;
        }
        if !pause.is_zero() {
            client.flush().await?;
            tokio::time::sleep(pause).await;
        }
    }
    match (answer.length, answer.end) {
        (Length::Chunked, End::Whole) => client.write_all(b"0\r\n\r\n").await,
        _ => Ok(()),
    }
}
