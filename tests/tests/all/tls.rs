//! TLS with a private authority: right certificates let everything through, wrong ones are refused in words that name the
//! mend, and no log holds a secret.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use voxfleet_harness::{
    audio,
    authority::{Authority, Certificate},
    fleet,
    login::Keys,
    process::{Dispatcher, Settings, Worker, voxfleet},
    server::{NatsServer, ServerOptions},
    wait::eventually,
};
use voxfleet_http::probe::Probe;
use voxfleet_nats::{ConnectError, Nats, NatsConfig};

use crate::{dead_letters::said, metrics_page::labels_as_documented, roles::violations};

const SOON: Duration = Duration::from_secs(60);

fn tls(shown: &Certificate, clients: Option<&Path>) -> String {
    let verify = clients.map_or(String::new(), |ca| format!("ca_file: {ca:?}\n verify: true\n"));
    format!("tls {{\n cert_file: {:?}\n key_file: {:?}\n {verify} }}\n", shown.certificate, shown.key)
}

async fn server(extra: String) -> Result<NatsServer> {
    Ok(NatsServer::start_with(ServerOptions { extra, ..ServerOptions::default() }).await?)
}

/// Everything that a fleet does, with certificates of both sides, keys, and a prefix of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_behind_tls_keys_and_another_prefix() -> Result<()> {
    let _place = fleet::place().await;
    let folder = tempfile::tempdir()?;
    let authority = Authority::new(folder.path())?;
    let (shown, ours) = (authority.certify("server", &["localhost"])?, authority.certify("client", &["client"])?);
    let keys = Keys::make(&["clinic"], &["--set", "nats.prefix=calls.v2"])?;
    let server = server(keys.include() + &tls(&shown, Some(&authority.ca_file()))).await?;
    let settings = |role: &str| {
        let login =
            keys.login("clinic", role).settings().with("nats.urls", format!("tls://localhost:{}", server.port()));
        let login = login.with("nats.prefix", "calls.v2").with("nats.tls_ca", authority.ca_file().display());
        login.with("nats.tls_cert", ours.certificate.display()).with("nats.tls_key", ours.key.display())
    };
    let dispatcher = Dispatcher::start("dispatcher", &settings("dispatcher"), folder.path())?;
    let worker = settings("worker").with("worker.engine", "simulated").with("worker.gpu", "none");
    let worker = worker.with("worker.cache_dir", folder.path().display());
    let worker = Worker::start("gpu-1", &worker, folder.path())?;
    std::fs::write(folder.path().join("a.wav"), audio::bursts(93, 4.0).wav())?;
    let typed = |role: &str, words: &[&str]| {
        let command = voxfleet(&settings(role), folder.path()).map(|mut command| {
            command.args(words);
            command
        });
        async move {
            let mut command = command?;
            Ok::<_, anyhow::Error>(tokio::task::spawn_blocking(move || command.output()).await??)
        }
    };
    let ready = || async {
        let output = typed("operator", &["status"]).await.ok()?;
        said(&output).contains("alive").then_some(())
    };
    let logs = || format!("{}\n{}\n{}", dispatcher.log(), worker.log(), server.log());
    eventually("the fleet is there", SOON, ready).await.with_context(logs)?;
    for words in [
        &["stream", "a.wav", "--session", "talk", "--speed", "8", "--wait"][..],
        &["transcribe", "a.wav", "--id", "rec"],
        &["export", "talk"],
    ] {
        let output = typed("producer", words).await?;
        ensure!(output.status.success(), "{words:?}: {}\n{}", said(&output), logs());
    }
    let output = typed("viewer", &["export", "talk"]).await?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(violations(&server.log()).is_empty(), "{}", server.log());
    let key = std::fs::read_to_string(&ours.key)?;
    for secret in key.lines().filter(|line| !line.starts_with('-')).map(str::to_owned).chain(
        ["dispatcher", "worker", "producer"]
            .into_iter()
            .filter_map(|role| std::fs::read_to_string(&keys.login("clinic", role).seed_file).ok()),
    ) {
        ensure!(!logs().contains(secret.trim()), "a secret is in a log");
    }
    Ok(())
}

/// 1 January of these years, in s.
const UNTIL_2041: u64 = 2_240_611_200;
const UNTIL_2042: u64 = 2_272_147_200;
const UNTIL_2043: u64 = 2_303_683_200;

/// Who is to renew what: the process its own two, and the servers theirs, which only a handshake shows.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_each_certificate_is_told_with_whose_it_is() -> Result<()> {
    let _place = fleet::place().await;
    let folder = tempfile::tempdir()?;
    let authority = Authority::new(folder.path())?;
    let shown = authority.certify_until("server", &["localhost"], 2041)?;
    let ours = authority.certify_until("client", &["client"], 2042)?;
    let http = authority.certify_until("http", &["127.0.0.1"], 2043)?;
    let server = server(tls(&shown, Some(&authority.ca_file()))).await?;
    let settings = |role: &str| {
        let all = Settings::new().with("nats.urls", format!("tls://localhost:{}", server.port()));
        let all = all.with("nats.tls_ca", authority.ca_file().display());
        let all = all.with("nats.tls_cert", ours.certificate.display()).with("nats.tls_key", ours.key.display());
        let all = all.with(&format!("{role}.http.listen"), "127.0.0.1:0");
        let all = all.with(&format!("{role}.http.tls_cert"), http.certificate.display());
        all.with(&format!("{role}.http.tls_key"), http.key.display())
    };
    let dispatcher = Dispatcher::start("dispatcher", &settings("dispatcher"), folder.path())?;
    let worker = settings("worker").with("worker.engine", "simulated").with("worker.gpu", "none");
    let worker = Worker::start("gpu-1", &worker.with("worker.cache_dir", folder.path().display()), folder.path())?;
    let probe = Probe { ca: Some(authority.ca_file()), token: None };
    for (url, section) in [(dispatcher.http_url().await?, "## Dispatcher"), (worker.http_url().await?, "## Worker")] {
        let told = || async {
            let answer = probe.get(&format!("{url}/metrics"), Duration::from_secs(10)).await.ok()?;
            let text = String::from_utf8(answer.body).ok()?;
            text.contains("nats_server").then_some(text)
        };
        let text = eventually("what the server shows", SOON, told).await;
        let text = text.with_context(|| format!("{}\n{}", dispatcher.log(), worker.log()))?;
        for (whose, until) in [("http", UNTIL_2043), ("nats", UNTIL_2042), ("nats_server", UNTIL_2041)] {
            let line = format!("voxfleet_certificate_expiry_timestamp_seconds{{use=\"{whose}\"}} {until}\n");
            ensure!(text.contains(&line), "{section}: no {line}\n{text}");
        }
        labels_as_documented(&text, section)?;
    }
    // Looking left no trouble in its log.
    let log = server.log();
    ensure!(!log.contains("TLS handshake error"), "{log}");
    Ok(())
}

/// What one client sets, and what it is told.
struct Try<'a> {
    ca: Option<&'a Path>,
    own: Option<&'a Certificate>,
    /// Part of the error's text; none: it gets in.
    refused: Option<&'a str>,
}

/// The server's alert may come too late to be read: the connection is broken by then, and the next one may tell.
const TRIES: usize = 5;

async fn tried(server: &NatsServer, one: &Try<'_>) -> Result<()> {
    let config = NatsConfig {
        urls: vec![format!("tls://localhost:{}", server.port())],
        tls_ca: one.ca.map(Path::to_owned),
        tls_cert: one.own.map(|c| c.certificate.clone()),
        tls_key: one.own.map(|c| c.key.clone()),
        ..NatsConfig::default()
    };
    let mut connected = Nats::connect(&config, "test").await;
    for _ in 1..TRIES {
        if matches!(connected, Err(ConnectError::Unreachable { .. })) {
            connected = Nats::connect(&config, "test").await;
        }
    }
    match (connected, one.refused) {
        (Ok(nats), None) => {
            nats.rtt(Duration::from_secs(5)).await?;
            nats.close(Duration::from_secs(1)).await;
            Ok(())
        }
        (Err(error @ ConnectError::Tls { .. }), Some(part)) => {
            ensure!(error.to_string().contains(part), "{error}, wanted {part:?}");
            Ok(())
        }
        (Ok(_), Some(part)) => anyhow::bail!("it got in, wanted {part:?}"),
        (Err(error), wanted) => Err(anyhow::Error::new(error).context(format!("wanted {wanted:?}"))),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_certificates_are_refused_and_the_reason_is_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let other = folder.path().join("other");
    std::fs::create_dir(&other)?;
    let (authority, stranger) = (Authority::new(folder.path())?, Authority::new(&other)?);
    let (ca, their_ca) = (authority.ca_file(), stranger.ca_file());
    let ours = authority.certify("client", &["client"])?;
    let over = authority.certify_expired("client-over", &["client"])?;
    let theirs = stranger.certify("client", &["client"])?;

    let right = authority.certify("server", &["localhost"])?;
    let open = server(tls(&right, None)).await?;
    let with = |ca, own, refused| Try { ca, own, refused };
    tried(&open, &with(Some(ca.as_path()), None, None)).await?;
    tried(&open, &with(None, None, Some("set nats.tls_ca"))).await?;
    tried(&open, &with(Some(their_ca.as_path()), None, Some("set nats.tls_ca"))).await?;
    let missing = folder.path().join("no-such.pem");
    tried(&open, &with(Some(missing.as_path()), None, Some("check the files"))).await?;

    let expired = server(tls(&authority.certify_expired("over", &["localhost"])?, None)).await?;
    tried(&expired, &with(Some(ca.as_path()), None, Some("is over"))).await?;
    let elsewhere = server(tls(&authority.certify("elsewhere", &["elsewhere.example"])?, None)).await?;
    tried(&elsewhere, &with(Some(ca.as_path()), None, Some("other host names"))).await?;
    let plain = server(String::new()).await?;
    tried(&plain, &with(Some(ca.as_path()), None, Some("does not speak TLS"))).await?;

    let mutual = server(tls(&right, Some(&ca))).await?;
    tried(&mutual, &with(Some(ca.as_path()), Some(&ours), None)).await?;
    tried(&mutual, &with(Some(ca.as_path()), None, Some("set nats.tls_cert"))).await?;
    tried(&mutual, &with(Some(ca.as_path()), Some(&over), Some("check nats.tls_cert"))).await?;
    tried(&mutual, &with(Some(ca.as_path()), Some(&theirs), Some("check nats.tls_cert"))).await?;

    // A client that was told to want TLS does not talk without it.
    let config = NatsConfig { urls: vec![plain.url()], tls_required: true, ..NatsConfig::default() };
    ensure!(Nats::connect(&config, "test").await.is_err(), "without TLS though it is required");

    // A command says it too, with the exit code of what cannot be reached, and a service does not wait a minute for a
    // certificate to become right.
    for words in [&["export", "x"][..], &["dispatcher"]] {
        let settings = Settings::new().with("nats.urls", format!("tls://localhost:{}", expired.port()));
        let mut command = voxfleet(&settings.with("nats.tls_ca", ca.display()), folder.path())?;
        command.args(words);
        let begun = std::time::Instant::now();
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        ensure!(output.status.code() == Some(69) && said(&output).contains("is over"), "{words:?}: {}", said(&output));
        ensure!(begun.elapsed() < Duration::from_secs(20), "{words:?} took {:?}", begun.elapsed());
    }
    Ok(())
}
