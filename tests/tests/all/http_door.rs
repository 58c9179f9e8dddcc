//! Who is let in over HTTP: every route for every role and method, and those who come only to keep others out.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_tungstenite::{connect_async, tungstenite};
use voxfleet_harness::{
    fleet::{self, Fleet},
    wait::eventually,
};
use voxfleet_http::probe::Probe;

const SOON: Duration = Duration::from_secs(20);
const ASK: Duration = Duration::from_secs(10);
const VIEW: &str = "viewer-token-0123456789";
const SEND: &str = "producer-token-0123456789";
const OPERATE: &str = "operator-token-0123456789";
const NOBODY: &str = "nobody-has-this-token";

/// Who asks.
const WHO: [(&str, Option<&str>); 5] = [
    ("nobody", None),
    ("a wrong token", Some(NOBODY)),
    ("a viewer", Some(VIEW)),
    ("a producer", Some(SEND)),
    ("an operator", Some(OPERATE)),
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum For {
    Everybody,
    Viewers,
    Producers,
    Operators,
}

impl For {
    /// What stands between this one and the answer.
    fn refusal(self, token: Option<&str>) -> Option<u16> {
        let may = match self {
            For::Everybody => return None,
            For::Viewers => [VIEW, OPERATE].as_slice(),
            For::Producers => &[SEND],
            For::Operators => &[OPERATE],
        };
        match token {
            None | Some(NOBODY) => Some(401),
            Some(token) if may.contains(&token) => None,
            Some(_) => Some(403),
        }
    }
}

/// Every route with its only method, who may ask, and what it answers then.
const ROUTES: [(&str, &str, For, u16); 23] = [
    ("GET", "/", For::Everybody, 200),
    ("GET", "/health", For::Everybody, 200),
    ("GET", "/ready", For::Everybody, 200),
    ("GET", "/api/me", For::Everybody, 200),
    // The body says nothing of a token.
    ("POST", "/api/login", For::Everybody, 422),
    ("POST", "/api/logout", For::Everybody, 204),
    ("GET", "/gpu-status", For::Viewers, 200),
    ("GET", "/metrics", For::Viewers, 200),
    ("GET", "/api/fleet", For::Viewers, 200),
    ("GET", "/api/sessions", For::Viewers, 200),
    ("GET", "/api/jobs", For::Viewers, 200),
    ("GET", "/api/dead", For::Viewers, 200),
    ("GET", "/api/events", For::Viewers, 200),
    ("GET", "/api/stream", For::Viewers, 200),
    ("GET", "/api/sessions/nobody", For::Viewers, 404),
    ("GET", "/api/sessions/nobody/stream", For::Viewers, 404),
    ("GET", "/api/jobs/nobody", For::Viewers, 404),
    ("GET", "/api/jobs/nobody/stream", For::Viewers, 404),
    ("GET", "/asr", For::Producers, 426),
    ("POST", "/api/transcribe", For::Producers, 415),
    ("POST", "/api/dead/999/retry", For::Operators, 404),
    ("POST", "/api/gpus/nobody/drain", For::Operators, 404),
    ("GET", "/nothing", For::Everybody, 404),
];

const UPGRADE: &str = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                       sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/// The status alone: some answers do not end.
async fn status(url: &str, method: &str, path: &str, token: Option<&str>, more: &str) -> Result<u16> {
    let host = url.strip_prefix("http://").context("plain http")?;
    let mut socket = TcpStream::connect(host).await?;
    let token = token.map_or_else(String::new, |token| format!("authorization: Bearer {token}\r\n"));
    let body = if method == "POST" { "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}" } else { "\r\n" };
    let request = format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\n{token}{more}{body}");
    socket.write_all(request.as_bytes()).await?;
    let mut head = [0; 12];
    timeout(ASK, socket.read_exact(&mut head)).await.context("no answer")??;
    let head = String::from_utf8(head.to_vec())?;
    Ok(head.split(' ').nth(1).context("a status")?.parse()?)
}

async fn ready(fleet: &Fleet) -> Result<String> {
    let url = fleet.dispatchers[0].http_url().await?;
    eventually("it is ready", SOON, || async {
        let answer = Probe::default().get(&format!("{url}/ready"), ASK).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await?;
    Ok(url)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_whom_it_should_and_nobody_else() -> Result<()> {
    let _place = fleet::place().await;
    let dir = tempfile::tempdir()?;
    let mut builder = Fleet::builder().workers(1).set("dispatcher.http.listen", "127.0.0.1:0");
    for (role, token) in [("viewer", VIEW), ("producer", SEND), ("operator", OPERATE)] {
        let file = dir.path().join(role);
        std::fs::write(&file, token)?;
        builder = builder.set(&format!("dispatcher.http.{role}_token_file"), file.display());
    }
    let fleet = builder.start().await?;
    let url = ready(&fleet).await?;
    let mut wrong = Vec::new();
    for (its, path, whom, answer) in ROUTES {
        for (who, token) in WHO {
            let refused = whom.refusal(token);
            let foreign = format!("{UPGRADE}origin: https://evil.example\r\n");
            for (what, method, more) in [
                ("GET", "GET", ""),
                ("HEAD", "HEAD", ""),
                ("POST", "POST", ""),
                ("OPTIONS", "OPTIONS", ""),
                ("upgrade", "GET", UPGRADE),
                ("foreign upgrade", "GET", foreign.as_str()),
                ("foreign POST", "POST", "origin: https://evil.example\r\n"),
            ] {
                let is_its = method == its || (method == "HEAD" && its == "GET");
                let expected = match () {
                    // A page of another site, whoever its visitor is.
                    () if what.starts_with("foreign") => 403,
                    () if path == "/nothing" => 404,
                    () if !is_its => 405,
                    () if path == "/asr" && what == "upgrade" => refused.unwrap_or(101),
                    () => refused.unwrap_or(answer),
                };
                let got = status(&url, method, path, token, more).await.with_context(|| format!("{what} {path}"))?;
                if got != expected {
                    wrong.push(format!("{what} {path} by {who}: {got}, not {expected}"));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    // For clients that know nothing but a URL, and nowhere else.
    ensure!(status(&url, "GET", &format!("/asr?token={SEND}"), None, UPGRADE).await? == 101);
    ensure!(status(&url, "GET", &format!("/api/fleet?token={VIEW}"), None, "").await? == 401);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_clients_keep_nobody_out_and_are_sent_away() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = Fleet::builder()
        .workers(1)
        .set("dispatcher.http.listen", "127.0.0.1:0")
        .set("dispatcher.http.max_connections", 24)
        .start()
        .await?;
    let url = ready(&fleet).await?;
    let host = url.strip_prefix("http://").context("plain http")?;
    let login = format!(
        "POST /api/login HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: 40\r\n\r\n{{\"tok"
    );
    let mut slow = TcpStream::connect(host).await?;
    let begun = Instant::now();
    slow.write_all(login.as_bytes()).await?;
    let mut answer = Vec::new();
    let read = timeout(SOON, slow.read_to_end(&mut answer)).await;
    ensure!(read.is_ok(), "half a login is waited for");
    let answer = String::from_utf8_lossy(&answer);
    ensure!(answer.starts_with("HTTP/1.1 408 ") && begun.elapsed() > Duration::from_secs(8), "{answer}");

    let mut flood = Vec::new();
    for n in 0..100 {
        let mut socket = TcpStream::connect(host).await?;
        // Who has been sent away already does not take it.
        let _ = socket.write_all(["", "GET / HT", login.as_str()][n % 3].as_bytes()).await;
        flood.push(socket);
    }
    for path in ["/health", "/ready", "/metrics"] {
        let answer = Probe::default().get(&format!("{url}{path}"), Duration::from_secs(5)).await?;
        ensure!(answer.status == 200, "{path}: {}", answer.status);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_are_counted_to_their_end_and_refused_before_they_are_any() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = Fleet::builder()
        .workers(1)
        .slots(4)
        .set("dispatcher.http.listen", "127.0.0.1:0")
        .set("dispatcher.sockets.max_at_once", 2)
        .start()
        .await?;
    let url = ready(&fleet).await?;
    let open = |kind: &'static str| {
        let url = url.clone();
        async move {
            let answer = Probe::default().get(&format!("{url}/metrics"), ASK).await.ok()?;
            let text = String::from_utf8(answer.body).ok()?;
            let series = format!("voxfleet_http_connections{{kind=\"{kind}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&series)?.parse::<f64>().ok())
        }
    };
    let asr = format!("{}/asr", url.replacen("http", "ws", 1));
    let (first, _) = connect_async(&asr).await?;
    let (second, _) = connect_async(&asr).await?;
    // The one that asks is counted too.
    eventually("two sockets", SOON, || async { (open("websocket").await == Some(2.0)).then_some(()) }).await?;
    let all = open("all").await.context("a figure")?;
    ensure!(all >= 3.0, "{all} connections, sockets among them");
    match connect_async(&asr).await {
        Err(tungstenite::Error::Http(answer)) => {
            ensure!(answer.status() == 503 && answer.headers().contains_key("retry-after"), "{answer:?}");
        }
        other => anyhow::bail!("{:?}", other.map(|_| "connected")),
    }
    drop((first, second));
    eventually("no socket", SOON, || async { (open("websocket").await == Some(0.0)).then_some(()) }).await?;
    eventually("their places", SOON, || async { connect_async(&asr).await.ok().map(|_| ()) }).await?;
    Ok(())
}
