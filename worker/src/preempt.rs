//! Word that the machine is about to be taken away: a file that appears, or a request on a local port.
//!
//! What providers give (the reason why both are plain hooks and the time is configuration):
//!
//! | provider | notice |
//! |---|---|
//! | Vast.ai | none documented: an outbid or stopped instance is simply stopped. Nothing to hook; the fleet's failover is the answer |
//! | RunPod | SIGTERM to the container, SIGKILL about 5 s later: no hook needed, `worker.shutdown_ms` keeps within it |
//! | clouds with spot machines | 30 s to 2 min, told by a metadata service: let its agent write the file or call the hook |
//!
//! `touch FILE`, or `curl -X POST http://127.0.0.1:PORT/preempt`. Either way the worker drains within
//! `worker.preemption.notice_ms`.

use std::{
    future::pending,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A request's head; whoever sends more is no hook.
const MAX_HEAD_BYTES: usize = 8 * 1024;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections beside each other; more wait for one of these to end.
const MAX_CONNECTIONS: usize = 64;

/// How a preemption is announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PreemptionConfig {
    /// The machine goes when this file appears.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Loopback address on which `POST /preempt` says the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_listen: Option<SocketAddr>,
    /// From the notice until the machine is gone.
    pub notice_ms: u64,
}

impl Default for PreemptionConfig {
    fn default() -> Self {
        Self {
            file: None,
            http_listen: None,
            // The shortest notice that a cloud with spot machines promises.
            notice_ms: 30_000,
        }
    }
}

impl PreemptionConfig {
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(address) = self.http_listen.filter(|address| !address.ip().is_loopback()) {
            found.push(format!(
                "worker.preemption.http_listen: {address} is not a loopback address, and whoever reaches it ends this worker"
            ));
        }
        if !(500..=86_400_000).contains(&self.notice_ms) {
            found.push(format!("worker.preemption.notice_ms: {}, allowed are 500 to 86400000", self.notice_ms));
        }
        found
    }
}

/// Where notices are looked for.
#[derive(Debug)]
pub(crate) struct Watch {
    file: Option<(PathBuf, Option<SystemTime>)>,
    listener: Option<TcpListener>,
}

impl Watch {
    pub(crate) async fn open(config: &PreemptionConfig) -> std::io::Result<Self> {
        let listener = match config.http_listen {
            Some(address) => Some(TcpListener::bind(address).await?),
            None => None,
        };
        let file = match config.file.clone() {
            Some(path) => {
                let left = changed_at(&path).await;
                if left.is_some() {
                    tracing::warn!(
                        path = %path.display(),
                        "the preemption file is there already, waiting until it is written again"
                    );
                }
                Some((path, left))
            }
            None => None,
        };
        Ok(Self { file, listener })
    }

    /// Waits for the first notice; says what gave it. Drop it to stop.
    pub(crate) async fn notice(self) -> String {
        let by_file = async {
            match &self.file {
                Some((path, left)) => appeared(path, *left).await,
                None => pending().await,
            }
        };
        let by_request = async {
            match &self.listener {
                Some(listener) => asked(listener).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = by_file => "file".to_owned(),
            () = by_request => "http".to_owned(),
        }
    }
}

/// Time of the file's last change; none where there is no file.
async fn changed_at(path: &Path) -> Option<SystemTime> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    // A file system without times: that it is there is all it says.
    Some(metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH))
}

/// Waits until the file is there. One that was `left` from before this worker counts only once it is written again.
async fn appeared(path: &Path, left: Option<SystemTime>) {
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let now = changed_at(path).await;
        if now.is_some() && now != left {
            return;
        }
    }
}

/// Waits for a request that says so.
async fn asked(listener: &TcpListener) {
    // Beside each other: who connects and says nothing must not keep a notice waiting.
    let mut answers = FuturesUnordered::new();
    let mut rest = None;
    loop {
        tokio::select! {
            accepted = listener.accept(), if answers.len() < MAX_CONNECTIONS && rest.is_none() => match accepted {
                Ok((stream, _)) => answers.push(timeout(REQUEST_TIMEOUT, answer(stream))),
                Err(error) => {
                    tracing::warn!(%error, "preemption hook cannot accept");
                    rest = Some(Instant::now() + LOOK_EVERY);
                }
            },
            () = sleep_until(rest.unwrap_or_else(Instant::now)), if rest.is_some() => rest = None,
            Some(answered) = answers.next() => match answered {
                Ok(Ok(true)) => return,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::debug!(%error, "preemption hook: connection failed"),
                Err(_) => tracing::debug!("preemption hook: no whole request in time"),
            },
        }
    }
}

/// Answers one request; says whether it was a notice.
async fn answer(mut stream: TcpStream) -> std::io::Result<bool> {
    let mut head = Vec::new();
    let (is_notice, status) = loop {
        if let Some(judged) = judge(&head) {
            break judged;
        }
        if head.len() >= MAX_HEAD_BYTES {
            break (false, "431 Request Header Fields Too Large");
        }
        if stream.read_buf(&mut head).await? == 0 {
            break (false, "400 Bad Request");
        }
    };
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    // A caller that is gone has said what it had to say.
    if let Err(error) = stream.write_all(answer.as_bytes()).await {
        tracing::debug!(%error, "preemption hook: not answered");
    }
    Ok(is_notice)
}

/// What a request's head asks for; none while it is not whole.
fn judge(head: &[u8]) -> Option<(bool, &'static str)> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => None,
        Err(_) => Some((false, "400 Bad Request")),
        // A web page can make a browser send a POST here, but not without saying where it comes from.
        Ok(_) if request.headers.iter().any(|header| header.name.eq_ignore_ascii_case("origin")) => {
            Some((false, "403 Forbidden"))
        }
        Ok(_) => Some(match (request.method, request.path) {
            (Some("POST"), Some("/preempt")) => (true, "202 Accepted"),
            (_, Some("/preempt")) => (false, "405 Method Not Allowed"),
            _ => (false, "404 Not Found"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_post_to_the_hook_is_a_notice() {
        let cases: [(&str, Option<(bool, &str)>); 7] = [
            ("POST /preempt HTTP/1.1\r\nhost: x\r\n\r\n", Some((true, "202 Accepted"))),
            ("POST /preempt HTTP/1.0\r\n\r\n", Some((true, "202 Accepted"))),
            ("GET /preempt HTTP/1.1\r\n\r\n", Some((false, "405 Method Not Allowed"))),
            ("POST / HTTP/1.1\r\n\r\n", Some((false, "404 Not Found"))),
            ("POST /preempt HTTP/1.1\r\norigin: http://evil\r\n\r\n", Some((false, "403 Forbidden"))),
            ("nonsense\r\n\r\n", Some((false, "400 Bad Request"))),
            ("POST /preempt HTTP/1.1\r\n", None),
        ];
        for (head, judged) in cases {
            assert_eq!(judge(head.as_bytes()), judged, "{head:?}");
        }
    }

    #[tokio::test]
    async fn a_file_that_appears_is_a_notice_and_an_old_one_is_none() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("preempted");
        let config = PreemptionConfig { file: Some(path.clone()), ..PreemptionConfig::default() };
        let watch = Watch::open(&config).await.expect("open");
        let (noticed, ()) = tokio::join!(watch.notice(), async {
            tokio::fs::write(&path, "").await.expect("write");
        });
        assert_eq!(noticed, "file");

        let old = Watch::open(&config).await.expect("open");
        assert!(timeout(LOOK_EVERY * 3, old.notice()).await.is_err(), "left from before");
    }

    #[tokio::test]
    async fn a_request_is_a_notice_and_silent_connections_block_nobody() {
        let config =
            PreemptionConfig { http_listen: Some(SocketAddr::from(([127, 0, 0, 1], 0))), ..Default::default() };
        let watch = Watch::open(&config).await.expect("open");
        let address = watch.listener.as_ref().and_then(|l| l.local_addr().ok()).expect("address");
        let call = async {
            let mut silent = Vec::new();
            for _ in 0..MAX_CONNECTIONS - 1 {
                silent.push(TcpStream::connect(address).await.expect("connect"));
            }
            let mut stream = TcpStream::connect(address).await.expect("connect");
            stream.write_all(b"POST /preempt HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("ask");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("answer");
            answer
        };
        let both = async { tokio::join!(watch.notice(), call) };
        // One after the other they would take a minute and more.
        let (noticed, answer) = timeout(REQUEST_TIMEOUT * 5, both).await.expect("in time");
        assert_eq!(noticed, "http");
        assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    }

    #[test]
    fn who_can_reach_the_hook_is_limited() {
        let open = PreemptionConfig { http_listen: "0.0.0.0:9".parse().ok(), notice_ms: 1, ..Default::default() };
        assert_eq!(open.problems().len(), 2, "{:?}", open.problems());
        assert_eq!(PreemptionConfig::default().problems(), Vec::<String>::new());
    }
}
