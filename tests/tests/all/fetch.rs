//! Recordings are brought from where a stranger says: whole or refused, over breaks, within bounds, and from nowhere that
//! the configuration does not allow.

use std::{
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::task::JoinSet;
use voxfleet_harness::{
    https::{Answer, Server},
    s3,
    server::NatsServer,
    wait::eventually,
};
use voxfleet_nats::{Secret, media::Media};
use voxfleet_schema::{
    failure::{Failure, FailureClass as Class},
    job::AudioUrl,
};
use voxfleet_store::fetch::{FetchConfig, Fetcher, Incoming, Spooled};

use super::nats_topology::ready;

const SOON: Duration = Duration::from_secs(10);
/// In a URL's query; it must come up nowhere.
const SIGNATURE: &str = "X-Signature=0a1b2c3d4e5f";

/// Bytes that tell their place.
fn recording(len: usize) -> Bytes {
    (0..len).map(|n| (n % 251) as u8 ^ (n / 251) as u8).collect::<Vec<_>>().into()
}

/// A fleet's object store, a folder for spooling, and a web server.
struct Rig {
    _nats: NatsServer,
    media: Media,
    web: Server,
    spool: tempfile::TempDir,
}

impl Rig {
    async fn start() -> Result<Self> {
        let server = NatsServer::start().await?;
        let nats = ready(vec![server.url()], 1).await?;
        let (web, spool) = (Server::start().await?, tempfile::tempdir()?);
        Ok(Self { _nats: server, media: Media::new(&nats), web, spool })
    }

    /// What allows the web server, with short patience.
    fn config(&self) -> FetchConfig {
        FetchConfig {
            https_hosts: vec![self.web.host()],
            ca_file: Some(self.web.ca_file()),
            connect_timeout_ms: 2_000,
            stall_timeout_ms: 2_000,
            spool_dir: Some(self.spool.path().to_owned()),
            ..FetchConfig::default()
        }
    }

    fn fetcher(&self, config: FetchConfig) -> Result<Fetcher> {
        ensure!(config.problems().is_empty(), "{:?}", config.problems());
        Ok(Fetcher::new(config, self.media.clone())?)
    }

    fn nothing_is_left(&self) -> Result<()> {
        ensure!(std::fs::read_dir(self.spool.path())?.next().is_none(), "the spool folder holds something");
        Ok(())
    }
}

fn parsed(url: &str) -> Result<AudioUrl> {
    AudioUrl::parse(url).with_context(|| url.to_owned())
}

async fn spooled(fetcher: &Fetcher, url: &str) -> Result<Bytes> {
    let Spooled { mut file, bytes, .. } = fetcher.spool(&parsed(url)?).await?;
    let mut read = Vec::new();
    file.read_to_end(&mut read)?;
    ensure!(read.len() as u64 == bytes, "{bytes} bytes are told, {} are there", read.len());
    Ok(read.into())
}

async fn refused(fetcher: &Fetcher, url: &str) -> Result<Failure> {
    match fetcher.spool(&parsed(url)?).await {
        Ok(spooled) => bail!("{url} gave {} bytes", spooled.bytes),
        Err(error) => Ok(error.failure()),
    }
}

async fn refused_as(fetcher: &Fetcher, url: &str, class: Class) -> Result<Failure> {
    let failure = refused(fetcher, url).await?;
    ensure!(failure.class == class, "{url}: {failure}, expected {class}");
    Ok(failure)
}

async fn read(incoming: Incoming) -> Result<Bytes> {
    let mut read = Vec::new();
    let mut body = incoming.body;
    while let Some(chunk) = body.next().await {
        read.extend_from_slice(&chunk?);
    }
    Ok(read.into())
}

#[tokio::test]
async fn a_file_comes_whole_or_from_a_position() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(rig.config())?;
    let file = recording(700_000);
    rig.web.route("/calls/a%20b.flac", [Answer::file(file.clone())]);
    rig.web.route("/stiff", [Answer::file(file.clone()).without_ranges()]);
    rig.web.route("/unknown-length", [Answer::status(200).body(file.clone()).chunked()]);
    rig.web.route("/empty", [Answer::file(Bytes::new())]);

    let url = rig.web.url(&format!("/calls/a%20b.flac?{SIGNATURE}"));
    let got = fetcher.spool(&parsed(&url)?).await?;
    assert_eq!((got.bytes, got.name.as_deref()), (700_000, Some("a b.flac")));
    assert_eq!(got.file.metadata()?.nlink(), 0, "the spooled file has a name");
    assert_eq!(spooled(&fetcher, &url).await?, file);
    assert_eq!(spooled(&fetcher, &rig.web.url("/stiff")).await?, file);
    assert_eq!(spooled(&fetcher, &rig.web.url("/unknown-length")).await?, file);
    assert_eq!(spooled(&fetcher, &rig.web.url("/empty")).await?, Bytes::new());

    let part = fetcher.open(&parsed(&url)?, 1_000).await?;
    assert_eq!((part.from, part.total), (1_000, Some(700_000)));
    assert_eq!(read(part).await?, file.slice(1_000..));
    let whole = fetcher.open(&parsed(&rig.web.url("/stiff"))?, 1_000).await?;
    assert_eq!((whole.from, whole.total), (0, Some(700_000)));
    assert_eq!(read(whole).await?, file);
    let rest = fetcher.open(&parsed(&url)?, 700_000).await?;
    assert_eq!((rest.from, rest.total), (700_000, Some(700_000)));
    assert_eq!(read(rest).await?, Bytes::new());

    let request = &rig.web.requests("/calls/a%20b.flac")[0];
    assert_eq!((request.method.as_str(), request.target.ends_with(SIGNATURE)), ("GET", true));
    assert_eq!(request.header("accept-encoding"), Some("identity"));
    rig.nothing_is_left()
}

#[tokio::test]
async fn what_a_server_refuses_is_told_by_class() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(rig.config())?;
    for (status, class) in [
        (404, Class::NotFound),
        (410, Class::NotFound),
        (401, Class::Forbidden),
        (403, Class::Forbidden),
        (400, Class::BadRequest),
        (418, Class::BadRequest),
    ] {
        let path = format!("/{status}");
        rig.web.route(&path, [Answer::status(status)]);
        refused_as(&fetcher, &rig.web.url(&path), class).await?;
        assert_eq!(rig.web.requests(&path).len(), 1, "{status} was asked for again");
    }
    rig.web.route("/packed", [Answer::file(recording(100)).header("Content-Encoding", "gzip")]);
    refused_as(&fetcher, &rig.web.url("/packed"), Class::BadRequest).await?;

    let file = recording(1_000);
    rig.web.route("/broken", [Answer::status(500)]);
    rig.web.route("/mended", [Answer::status(500), Answer::status(503), Answer::file(file.clone())]);
    rig.web.route("/busy", [Answer::status(429).header("Retry-After", "1"), Answer::file(file.clone())]);
    rig.web.route("/closed", [Answer::status(503).header("Retry-After", "3600")]);
    let began = Instant::now();
    let urls = ["/broken", "/mended", "/busy", "/closed"].map(|path| rig.web.url(path));
    let (broken, mended, busy, closed) = tokio::join!(
        refused_as(&fetcher, &urls[0], Class::Unavailable),
        spooled(&fetcher, &urls[1]),
        async {
            let got = spooled(&fetcher, &urls[2]).await;
            (got, began.elapsed())
        },
        refused_as(&fetcher, &urls[3], Class::Unavailable),
    );
    assert!(broken?.message.contains("500"));
    assert_eq!(rig.web.requests("/broken").len(), 4);
    assert_eq!(mended?, file);
    let (busy, took) = busy;
    assert_eq!(busy?, file);
    assert!(took >= Duration::from_secs(1), "asked again after {took:?}");
    assert_eq!(closed?.retry_after_ms, Some(3_600_000));
    assert_eq!(rig.web.requests("/closed").len(), 1);
    rig.nothing_is_left()
}

#[tokio::test]
async fn only_allowed_hosts_are_asked() -> Result<()> {
    let rig = Rig::start().await?;
    let plain = Server::start_plain().await?;
    for server in [&rig.web, &plain] {
        server.route("/a", [Answer::file(recording(10))]);
    }
    let port = rig.web.port();

    // Without a list: any public host, and this machine is none, however it is written.
    let open = rig.fetcher(FetchConfig { https_hosts: Vec::new(), ..rig.config() })?;
    for host in [
        "127.0.0.1",
        "localhost",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "127.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "169.254.169.254",
    ] {
        refused_as(&open, &format!("https://{host}:{port}/a"), Class::Forbidden).await?;
    }
    refused_as(&open, &plain.url("/a"), Class::Forbidden).await?;

    // With one: what is on it.
    let listed = rig.fetcher(rig.config())?;
    assert_eq!(spooled(&listed, &rig.web.url("/a")).await?, recording(10));
    refused_as(&listed, "https://example.com/a", Class::Forbidden).await?;
    refused_as(&listed, &format!("https://localhost:{port}/a"), Class::Forbidden).await?;
    refused_as(&listed, &plain.url("/a"), Class::Forbidden).await?;
    // A listed address in another notation is the same place, but has to be written plainly.
    refused_as(&listed, &format!("https://0x7f.1:{port}/a"), Class::BadRequest).await?;
    assert_eq!((rig.web.requests("/a").len(), plain.requests("/a").len()), (1, 0));

    let named = FetchConfig { https_hosts: vec!["localhost".into()], ..rig.config() };
    let named = rig.fetcher(FetchConfig { http_hosts: vec![plain.host()], ..named })?;
    assert_eq!(spooled(&named, &format!("https://localhost:{port}/a")).await?, recording(10));
    assert_eq!(spooled(&named, &plain.url("/a")).await?, recording(10));

    let trusted = Fetcher::trusted(Some(rig.web.ca_file()))?;
    assert_eq!(spooled(&trusted, &rig.web.url("/a")).await?, recording(10));
    assert_eq!(spooled(&trusted, &plain.url("/a")).await?, recording(10));
    rig.nothing_is_left()
}

#[tokio::test]
async fn every_hop_of_a_redirect_is_held_to_the_list() -> Result<()> {
    let rig = Rig::start().await?;
    let (other, plain) = (Server::start().await?, Server::start_plain().await?);
    for server in [&rig.web, &other, &plain] {
        server.route("/file", [Answer::file(recording(10))]);
    }
    let hops = [
        ("/near", "/file".to_owned()),
        ("/far", other.url("/file")),
        ("/plain", plain.url("/file")),
        ("/loop", "/loop".to_owned()),
        ("/metadata", "https://169.254.169.254/latest/meta-data".to_owned()),
        ("/disk", "file:///etc/passwd".to_owned()),
        ("/user", format!("https://user:pass@{}/file", rig.web.host())),
        ("/nowhere", "https://".to_owned()),
    ];
    for (path, to) in hops {
        rig.web.route(path, [Answer::redirect(to).header("Set-Cookie", "a=b")]);
    }
    rig.web.route("/lost", [Answer::status(302)]);
    let fetcher = rig.fetcher(rig.config())?;
    assert_eq!(spooled(&fetcher, &rig.web.url(&format!("/near?{SIGNATURE}"))).await?, recording(10));
    for path in ["/far", "/plain", "/metadata", "/disk", "/user"] {
        refused_as(&fetcher, &rig.web.url(path), Class::Forbidden).await?;
    }
    let one_try = |path| {
        let (fetcher, url) = (&fetcher, rig.web.url(path));
        async move { Ok::<_, anyhow::Error>(fetcher.open(&parsed(&url)?, 0).await.err().map(|e| e.failure().class)) }
    };
    for path in ["/loop", "/nowhere", "/lost"] {
        assert_eq!(one_try(path).await?, Some(Class::Unavailable), "{path}");
    }
    assert_eq!(rig.web.requests("/loop").len(), 6, "five redirects are followed");
    assert_eq!((other.requests("/file").len(), plain.requests("/file").len()), (0, 0));

    // Where the list says so, also from https to http; nothing is carried along.
    let wide = FetchConfig { http_hosts: vec![plain.host()], ..rig.config() };
    let wide = rig.fetcher(wide)?;
    assert_eq!(spooled(&wide, &rig.web.url(&format!("/plain?{SIGNATURE}"))).await?, recording(10));
    let request = &plain.requests("/file")[0];
    for header in ["cookie", "referer", "authorization"] {
        assert_eq!(request.header(header), None, "{header}");
    }
    rig.nothing_is_left()
}

#[tokio::test]
async fn too_large_is_refused_before_or_while_it_comes() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(FetchConfig { max_bytes: 100_000, ..rig.config() })?;
    rig.web.route("/exact", [Answer::file(recording(100_000))]);
    rig.web.route("/announced", [Answer::file(recording(100_001)).silent_after(0)]);
    rig.web.route("/endless", [Answer::status(200).body(recording(400_000)).chunked()]);
    assert_eq!(spooled(&fetcher, &rig.web.url("/exact")).await?.len(), 100_000);
    let began = Instant::now();
    refused_as(&fetcher, &rig.web.url("/announced"), Class::TooLarge).await?;
    assert!(began.elapsed() < Duration::from_secs(2), "its body was waited for");
    refused_as(&fetcher, &rig.web.url("/endless"), Class::TooLarge).await?;
    rig.nothing_is_left()
}

#[tokio::test]
async fn a_body_that_breaks_off_is_resumed_or_begun_again() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(rig.config())?;
    let (file, newer) = (recording(300_000), recording(300_001));
    let whole = || Answer::file(file.clone());
    let changed = Answer::file(newer.clone()).etag(Some("\"2\""));
    let part = |range: &str, etag: &str, body: Bytes| {
        Answer::status(206).header("Content-Range", format!("bytes {range}/300000")).header("ETag", etag).body(body)
    };
    // Served as a part though the file is another one: a server that does not know If-Range.
    let mixed = part("100000-299999", "\"2\"", Bytes::from(vec![7; 200_000]));
    let displaced = part("150000-299999", "\"1\"", file.slice(150_000..));
    // Whole as HTTP counts it, but less than the part it says it is.
    let dwindled = part("100000-299999", "\"1\"", file.slice(100_000..101_000));
    let swollen = part("100000-299999", "\"1\"", recording(900_000));
    let cut = |n| whole().cut_after(n);
    rig.web.route("/resumed", [cut(100_000), cut(50_000), whole()]);
    rig.web.route("/changed", [cut(100_000), changed]);
    rig.web.route("/mixed", [cut(100_000), mixed, whole()]);
    rig.web.route("/displaced", [cut(100_000), displaced, whole()]);
    rig.web.route("/dwindled", [cut(100_000), dwindled, whole()]);
    rig.web.route("/swollen", [cut(100_000), swollen]);
    rig.web.route("/stiff", [cut(100_000).without_ranges(), whole().without_ranges()]);
    rig.web.route("/unmarked", [cut(100_000).etag(None), whole().etag(None)]);
    rig.web.route("/weak", [cut(100_000).etag(Some("W/\"1\"")), whole().etag(Some("W/\"1\""))]);
    rig.web.route("/chunks", [cut(100_000).chunked(), whole().chunked()]);
    rig.web.route("/short", [Answer::file(recording(1_000)).without_ranges().claiming(5_000)]);
    rig.web.route("/longer", [Answer::file(recording(5_000)).claiming(1_000)]);

    let paths = ["resumed", "changed", "mixed", "displaced", "dwindled", "stiff", "unmarked", "weak", "chunks"];
    let mut running = JoinSet::new();
    for path in paths {
        let (fetcher, url) = (fetcher.clone(), rig.web.url(&format!("/{path}")));
        running.spawn(async move { (path, spooled(&fetcher, &url).await) });
    }
    let urls = (rig.web.url("/short"), rig.web.url("/swollen"));
    let (short, swollen) = tokio::join!(
        refused_as(&fetcher, &urls.0, Class::Unavailable),
        refused_as(&fetcher, &urls.1, Class::TooLarge),
    );
    short?;
    swollen?;
    while let Some(done) = running.join_next().await {
        let (path, got) = done?;
        let expected = if path == "changed" { &newer } else { &file };
        ensure!(got.with_context(|| path)? == *expected, "{path} is another file");
    }
    // HTTP ends a body at its announced length; what follows is not part of it.
    assert_eq!(spooled(&fetcher, &rig.web.url("/longer")).await?, recording(1_000));

    let asked = |path| rig.web.requests(path).iter().map(|r| r.header("range").map(str::to_owned)).collect::<Vec<_>>();
    let range = |from: u32| Some(format!("bytes={from}-"));
    assert_eq!(asked("/resumed"), [None, range(100_000), range(150_000)]);
    assert_eq!(rig.web.requests("/resumed")[1].header("if-range"), Some("\"1\""));
    assert_eq!(asked("/unmarked"), [None, None], "nothing proves that it is the same file");
    assert_eq!(asked("/short").len(), 4);
    rig.nothing_is_left()
}

#[tokio::test]
async fn a_server_that_dawdles_is_left() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(FetchConfig { connect_timeout_ms: 300, stall_timeout_ms: 300, ..rig.config() })?;
    rig.web.route("/silent", [Answer::silence()]);
    rig.web.route("/headers", [Answer::endless_headers()]);
    rig.web.route("/body", [Answer::file(recording(1_000)).silent_after(0)]);
    rig.web.route("/recovers", [Answer::file(recording(1_000)).silent_after(500), Answer::file(recording(1_000))]);
    let began = Instant::now();
    let urls = ["/silent", "/headers", "/body", "/recovers"].map(|path| rig.web.url(path));
    let (silent, headers, body, recovers) = tokio::join!(
        refused_as(&fetcher, &urls[0], Class::Timeout),
        refused_as(&fetcher, &urls[1], Class::Timeout),
        refused_as(&fetcher, &urls[2], Class::Timeout),
        spooled(&fetcher, &urls[3]),
    );
    silent?;
    headers?;
    body?;
    assert_eq!(recovers?, recording(1_000));
    // Four tries of 600 ms each and the delays between them.
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    eventually("connections are closed", SOON, || async { (rig.web.open_connections() == 0).then_some(()) }).await?;
    rig.nothing_is_left()
}

#[tokio::test]
async fn a_server_that_drips_has_its_time() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(FetchConfig { total_timeout_s: 1, ..rig.config() })?;
    rig.web.route("/drip", [Answer::file(recording(100_000)).paced(500, Duration::from_millis(100))]);
    let url = rig.web.url("/drip");
    let failure = refused(&fetcher, &format!("{url}?{SIGNATURE}")).await?;
    assert_eq!(failure.class, Class::Timeout);
    assert!(failure.message.starts_with(&url) && failure.message.contains("total_timeout_s"), "{failure}");
    assert!(!failure.message.contains(SIGNATURE), "{failure}");
    eventually("its connection is closed", SOON, || async { (rig.web.open_connections() == 0).then_some(()) }).await?;
    rig.nothing_is_left()
}

#[tokio::test]
async fn a_dropped_fetch_leaves_nothing() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(rig.config())?;
    rig.web.route("/slow", [Answer::file(recording(1_000_000)).paced(1_000, Duration::from_millis(10))]);
    let url = parsed(&rig.web.url("/slow"))?;
    let mut running = JoinSet::new();
    running.spawn(async move { fetcher.spool(&url).await.map(|s| s.bytes) });
    eventually("it is on its way", SOON, || async { (rig.web.open_connections() == 1).then_some(()) }).await?;
    eventually("it was asked for", SOON, || async { rig.web.requests("/slow").pop() }).await?;
    running.shutdown().await;
    eventually("its connection is closed", SOON, || async { (rig.web.open_connections() == 0).then_some(()) }).await?;
    rig.nothing_is_left()
}

#[tokio::test]
async fn neither_signature_nor_certificate_trouble_is_a_riddle() -> Result<()> {
    let rig = Rig::start().await?;
    for (path, answer) in [
        ("/404", Answer::status(404)),
        ("/403", Answer::status(403)),
        ("/503", Answer::status(503).header("Retry-After", "3600")),
        ("/gone", Answer::redirect("https://elsewhere.example/?token=0a1b2c3d4e5f")),
        ("/large", Answer::file(recording(10)).claiming(u64::MAX / 2)),
        ("/quiet", Answer::silence()),
    ] {
        rig.web.route(path, [answer]);
    }
    let fetcher = rig.fetcher(FetchConfig { stall_timeout_ms: 100, connect_timeout_ms: 200, ..rig.config() })?;
    let mut texts = Vec::new();
    for path in ["/404", "/403", "/503", "/gone", "/large", "/quiet"] {
        let url = parsed(&rig.web.url(&format!("{path}?{SIGNATURE}#{SIGNATURE}")))?;
        match fetcher.open(&url, 0).await {
            Ok(_) => bail!("{path} was opened"),
            Err(error) => texts.push(format!("{error} {error:?}")),
        }
    }
    // Nobody listens; a certificate nobody vouches for.
    let closed = format!("https://127.0.0.1:{}/a?{SIGNATURE}", voxfleet_harness::server::free_port()?);
    let wide = rig.fetcher(FetchConfig { https_hosts: vec!["127.0.0.1".into()], ..rig.config() })?;
    let error = wide.open(&parsed(&closed)?, 0).await.err().context("nobody listens there")?;
    assert_eq!(error.failure().class, Class::Unavailable);
    texts.push(format!("{error} {error:?}"));
    let wary = rig.fetcher(FetchConfig { ca_file: None, ..rig.config() })?;
    let failure = refused(&wary, &rig.web.url(&format!("/404?{SIGNATURE}"))).await?;
    // A machine without any certificates says that instead.
    assert!(matches!(failure.class, Class::Unavailable | Class::Internal), "{failure}");
    assert!(failure.message.contains("certificate"), "{failure}");
    assert_eq!(rig.web.requests("/404").len(), 1, "it was asked without trust");
    texts.push(failure.to_string());
    for text in texts {
        assert!(!text.contains("0a1b2c3d4e5f"), "{text}");
        assert!(text.contains("https://"), "{text} does not say where");
    }
    rig.nothing_is_left()
}

#[tokio::test]
async fn objects_and_files() -> Result<()> {
    let rig = Rig::start().await?;
    let files = tempfile::tempdir()?;
    let config = FetchConfig { file_roots: vec![files.path().to_owned()], max_bytes: 1_000_000, ..rig.config() };
    let fetcher = rig.fetcher(config)?;
    let file = recording(600_000);
    rig.media.put_bytes("audio/job-1", file.clone()).await?;
    rig.media.put_bytes("audio/large", recording(1_000_001)).await?;
    assert_eq!(spooled(&fetcher, "object://asr_media/audio/job-1").await?, file);
    let part = fetcher.open(&parsed("object://asr_media/audio/job-1")?, 200_000).await?;
    assert_eq!((part.from, part.total), (200_000, Some(600_000)));
    assert_eq!(read(part).await?, file.slice(200_000..));
    refused_as(&fetcher, "object://asr_media/audio/none", Class::NotFound).await?;
    refused_as(&fetcher, "object://asr_media/audio/large", Class::TooLarge).await?;
    let long = format!("object://asr_media/{}", "k".repeat(2_000));
    refused_as(&fetcher, &long, Class::BadRequest).await?;

    let url = |name: &str| format!("file://{}/{name}", files.path().display());
    std::fs::write(files.path().join("a b.wav"), &file)?;
    std::fs::File::create(files.path().join("large"))?.set_len(1_000_001)?;
    let got = fetcher.spool(&parsed(&url("a%20b.wav"))?).await?;
    assert_eq!((got.bytes, got.name.as_deref()), (600_000, Some("a b.wav")));
    assert_eq!(spooled(&fetcher, &url("a%20b.wav")).await?, file);
    let part = fetcher.open(&parsed(&url("a%20b.wav"))?, 599_000).await?;
    assert_eq!(read(part).await?, file.slice(599_000..));
    refused_as(&fetcher, &url("large"), Class::TooLarge).await?;
    refused_as(&fetcher, &url("none"), Class::NotFound).await?;
    refused_as(&fetcher, "file:///etc/passwd", Class::Forbidden).await?;
    rig.nothing_is_left()
}

fn keys(config: FetchConfig) -> FetchConfig {
    FetchConfig {
        s3_access_key_id: Secret::new("AKIDFORTESTS"),
        s3_secret_access_key: Secret::new("SECRETFORTESTS"),
        s3_buckets: vec!["calls".into(), "none".into()],
        ..config
    }
}

#[tokio::test]
async fn a_real_s3_service() -> Result<()> {
    let folder = match s3::installed() {
        Ok(folder) => folder,
        Err(why) => {
            println!("skipped: {why}");
            return Ok(());
        }
    };
    let (rig, server) = (Rig::start().await?, s3::Server::start(&folder).await?);
    server.make_bucket("calls").await?;
    server.make_bucket("private").await?;
    let file = recording(1_500_000);
    server.put_object("calls", "2026/a%20b.flac", &file).await?;
    server.put_object("private", "a", b"x").await?;
    let config = FetchConfig { s3_endpoint: Some(server.endpoint()), s3_allow_http: true, ..keys(rig.config()) };
    let fetcher = rig.fetcher(config.clone())?;

    let url = "s3://calls/2026/a%20b.flac";
    let got = fetcher.spool(&parsed(url)?).await.with_context(|| server.log())?;
    assert_eq!((got.bytes, got.name.as_deref()), (1_500_000, Some("a b.flac")));
    assert_eq!(spooled(&fetcher, url).await?, file);
    let part = fetcher.open(&parsed(url)?, 1_000_000).await?;
    assert_eq!((part.from, part.total), (1_000_000, Some(1_500_000)));
    assert_eq!(read(part).await?, file.slice(1_000_000..));
    refused_as(&fetcher, "s3://calls/2026/none", Class::NotFound).await?;
    refused_as(&fetcher, "s3://none/a", Class::NotFound).await?;
    refused_as(&fetcher, "s3://private/a", Class::Forbidden).await?;
    refused_as(&fetcher, "s3://../a", Class::BadRequest).await?;
    refused_as(&fetcher, "s3://calls/a//b", Class::BadRequest).await?;
    let any = rig.fetcher(FetchConfig { s3_buckets: vec!["*".into()], ..config.clone() })?;
    assert_eq!(spooled(&any, "s3://private/a").await?, "x");
    let small = rig.fetcher(FetchConfig { max_bytes: 1_000, ..config })?;
    refused_as(&small, url, Class::TooLarge).await?;
    rig.nothing_is_left()
}

#[tokio::test]
async fn an_s3_endpoint_behind_tls_that_fails() -> Result<()> {
    let rig = Rig::start().await?;
    let config = FetchConfig { s3_endpoint: Some(rig.web.url("")), ..keys(rig.config()) };
    let fetcher = rig.fetcher(config.clone())?;
    let file = recording(300_000);
    let whole = || Answer::file(file.clone()).header("Last-Modified", "Wed, 21 Oct 2026 07:28:00 GMT");
    let told = "<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIDFORTESTS</AWSAccessKeyId></Error>";
    rig.web.route("/calls/broken-off", [whole().cut_after(100_000), whole()]);
    rig.web.route("/calls/refused", [Answer::status(403).body(told)]);
    rig.web.route("/calls/busy", [Answer::status(503), whole()]);
    rig.web.route("/calls/elsewhere", [Answer::redirect("https://169.254.169.254/")]);
    assert_eq!(spooled(&fetcher, "s3://calls/broken-off").await?, file);
    let asked = rig.web.requests("/calls/broken-off");
    assert_eq!(asked[1].header("range"), Some("bytes=100000-"));
    assert_eq!(asked[1].header("if-match"), Some("\"1\""));
    let authorization = asked[0].header("authorization").unwrap_or_default();
    assert!(authorization.starts_with("AWS4-HMAC-SHA256 Credential=AKIDFORTESTS/"), "it is not signed");
    assert_eq!(spooled(&fetcher, "s3://calls/busy").await?, file);
    let failure = refused_as(&fetcher, "s3://calls/refused", Class::Forbidden).await?;
    let mut texts = vec![format!("{failure:?} {config:?} {fetcher:?}")];
    let elsewhere = fetcher.open(&parsed("s3://calls/elsewhere")?, 0).await.err().context("it was followed")?;
    assert_eq!(elsewhere.failure().class, Class::Unavailable, "{elsewhere}");
    texts.push(format!("{elsewhere} {elsewhere:?}"));
    for text in texts {
        assert!(!text.contains("AKIDFORTESTS") && !text.contains("SECRETFORTESTS"), "{text}");
    }
    rig.nothing_is_left()
}

/// Set for the process that [`a_full_spool_folder_is_named`] starts.
const CHILD_URL: &str = "VOXFLEET_TEST_FETCH";

/// Writes beyond a limit of this process are refused as by a full disk; proxies of the environment are not asked.
#[tokio::test]
async fn a_full_spool_folder_is_named() -> Result<()> {
    let spool = tempfile::tempdir()?;
    if let Ok(base) = std::env::var(CHILD_URL) {
        let config = FetchConfig { spool_dir: Some(spool.path().to_owned()), ..FetchConfig::default() };
        let fetcher = Fetcher::trusted_with(config)?;
        ensure!(spooled(&fetcher, &format!("{base}/small")).await? == recording(1_000), "the small one");
        let failure = refused_as(&fetcher, &format!("{base}/large"), Class::Internal).await?;
        ensure!(failure.message.contains(&*spool.path().to_string_lossy()), "{failure}");
        ensure!(failure.message.contains("takes no file this large"), "{failure}");
        return Ok(());
    }
    let web = Server::start_plain().await?;
    web.route("/small", [Answer::file(recording(1_000))]);
    web.route("/large", [Answer::file(recording(3_000_000))]);
    let script = "trap '' XFSZ; ulimit -f 1024; exec \"$0\" --exact fetch::a_full_spool_folder_is_named";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(std::env::current_exe()?).env(CHILD_URL, web.url(""));
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env(name, "http://127.0.0.1:9");
    }
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && text.contains("1 passed"), "{text}");
    ensure!(Path::new(spool.path()).is_dir() && web.requests("/large").len() == 1, "a full disk is not tried again");
    Ok(())
}
