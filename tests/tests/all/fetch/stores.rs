//! The object store, files, S3, and the folder that recordings are spooled to.

use std::{path::Path, process::Command};

use voxfleet_harness::s3;
use voxfleet_nats::Secret;

use super::*;

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
    let script = "trap '' XFSZ; ulimit -f 1024; exec \"$0\" --exact fetch::stores::a_full_spool_folder_is_named";
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
