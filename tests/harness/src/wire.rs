//! What clients send to a nats-server, frame by frame, so that single publishes can be dropped, doubled, delayed or changed
//! on their way.

use std::{sync::Arc, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::time::Instant;

/// One publish of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    pub subject: String,
    pub reply: Option<String>,
    /// The header block as it stands on the wire, its closing empty line included.
    pub headers: Option<Bytes>,
    pub payload: Bytes,
}

/// What becomes of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Pass,
    Drop,
    Double,
    /// It leaves so much later; what comes after it overtakes it.
    Late(Duration),
}

/// Looks at every publish that passes a relay, and may change it.
pub trait Tamper: Send + Sync {
    fn touch(&self, publish: &mut Publish) -> Fate;
}

impl<F: Fn(&mut Publish) -> Fate + Send + Sync> Tamper for F {
    fn touch(&self, publish: &mut Publish) -> Fate {
        self(publish)
    }
}

impl Publish {
    fn encode(&self) -> Bytes {
        let reply = self.reply.as_ref().map(|r| format!(" {r}")).unwrap_or_default();
        let body = self.payload.len();
        let head = match &self.headers {
            None => format!("PUB {}{reply} {body}\r\n", self.subject),
            Some(h) => format!("HPUB {}{reply} {} {}\r\n", self.subject, h.len(), h.len() + body),
        };
        let headers = self.headers.as_deref().unwrap_or_default();
        [head.as_bytes(), headers, &self.payload, b"\r\n"].concat().into()
    }

    /// Takes a header out; true if it was there.
    pub fn strip(&mut self, name: &str) -> bool {
        let Some(text) = self.headers.as_ref().and_then(|h| std::str::from_utf8(h).ok()) else { return false };
        let is_it = |line: &&str| line.split_once(':').is_some_and(|(n, _)| n.trim().eq_ignore_ascii_case(name));
        let kept: String = text.split_inclusive("\r\n").filter(|line| !is_it(line)).collect();
        let found = kept.len() < text.len();
        self.headers = Some(kept.into_bytes().into());
        found
    }

    /// Changes the digits behind `"field":` in a JSON body by `change`; true if there were any.
    pub fn rewrite_number(&mut self, field: &str, change: impl FnOnce(u64) -> u64) -> bool {
        let Ok(text) = std::str::from_utf8(&self.payload) else { return false };
        let mark = format!("\"{field}\":");
        let Some(at) = text.find(&mark).map(|at| at + mark.len()) else { return false };
        let digits = text[at..].bytes().take_while(u8::is_ascii_digit).count();
        let Ok(number) = text[at..at + digits].parse::<u64>() else { return false };
        let changed = format!("{}{}{}", &text[..at], change(number), &text[at + digits..]);
        self.payload = changed.into();
        true
    }
}

/// Cuts one client's bytes into frames and lets a [`Tamper`] at the publishes.
pub(crate) struct Frames {
    tamper: Arc<dyn Tamper>,
    buffer: BytesMut,
    late: Vec<(Instant, Bytes)>,
}

/// Longest line that is no publish: CONNECT with a token and signatures.
const MAX_LINE: usize = 64 * 1024;

impl Frames {
    pub(crate) fn new(tamper: Arc<dyn Tamper>) -> Self {
        Self { tamper, buffer: BytesMut::new(), late: Vec::new() }
    }

    /// Takes what a client sent and gives what is to be passed on.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Vec<Bytes> {
        self.buffer.extend_from_slice(bytes);
        let mut out = Vec::new();
        while let Some(frame) = self.next() {
            match frame {
                Frame::Other(bytes) => out.push(bytes),
                Frame::Publish(mut publish) => match self.tamper.touch(&mut publish) {
                    Fate::Pass => out.push(publish.encode()),
                    Fate::Drop => {}
                    Fate::Double => out.extend([publish.encode(), publish.encode()]),
                    Fate::Late(by) => self.late.push((Instant::now() + by, publish.encode())),
                },
            }
        }
        out
    }

    pub(crate) fn next_late(&self) -> Option<Instant> {
        self.late.iter().map(|(due, _)| *due).min()
    }

    /// What is due by now.
    pub(crate) fn take_late(&mut self) -> Vec<Bytes> {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.late).into_iter().partition(|(due, _)| *due <= now);
        self.late = later;
        due.into_iter().map(|(_, bytes)| bytes).collect()
    }

    fn next(&mut self) -> Option<Frame> {
        let Some(line_end) = self.buffer.windows(2).take(MAX_LINE).position(|w| w == b"\r\n") else {
            // No client writes such a line: pass on what this reading does not understand.
            let stuck = self.buffer.len() > MAX_LINE;
            return stuck.then(|| Frame::Other(self.buffer.split().freeze()));
        };
        let line = String::from_utf8_lossy(&self.buffer[..line_end]).into_owned();
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |n: usize| words.get(n).and_then(|w| w.parse::<usize>().ok());
        let (subject, reply, headers, total) = match words.as_slice() {
            [verb, subject, _] if verb.eq_ignore_ascii_case("PUB") => (subject, None, 0, number(2)),
            [verb, subject, reply, _] if verb.eq_ignore_ascii_case("PUB") => (subject, Some(reply), 0, number(3)),
            [verb, subject, _, _] if verb.eq_ignore_ascii_case("HPUB") => (subject, None, number(2)?, number(3)),
            [verb, subject, reply, _, _] if verb.eq_ignore_ascii_case("HPUB") => {
                (subject, Some(reply), number(3)?, number(4))
            }
            _ => return Some(Frame::Other(self.buffer.split_to(line_end + 2).freeze())),
        };
        let total = total.filter(|t| *t >= headers)?;
        if self.buffer.len() < line_end + 2 + total + 2 {
            return None;
        }
        let (subject, reply) = ((*subject).to_owned(), reply.map(|r| (*r).to_owned()));
        self.buffer.advance(line_end + 2);
        let mut body = self.buffer.split_to(total).freeze();
        self.buffer.advance(2);
        let headers = (headers > 0).then(|| body.split_to(headers));
        Some(Frame::Publish(Publish { subject, reply, headers, payload: body }))
    }
}

enum Frame {
    Publish(Publish),
    Other(Bytes),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{relay::Relay, server::NatsServer, wait::eventually};
    use futures_util::StreamExt;
    use std::sync::Mutex;

    const SENT: &[u8] = b"CONNECT {\"verbose\":false}\r\nPING\r\nPUB a 2\r\nhi\r\nHPUB b _INBOX.1 24 26\r\nNATS/1.0\r\nAb: c\r\nD:e\r\n\r\n\r\n\r\nSUB x 1\r\n";

    #[test]
    fn every_frame_passes_unchanged_however_it_is_cut() {
        let seen: Arc<Mutex<Vec<Publish>>> = Arc::default();
        for step in [1, 3, 7, SENT.len()] {
            let kept = Arc::clone(&seen);
            seen.lock().expect("seen").clear();
            let mut frames = Frames::new(Arc::new(move |p: &mut Publish| {
                kept.lock().expect("kept").push(p.clone());
                Fate::Pass
            }));
            let out: Vec<u8> = SENT.chunks(step).flat_map(|c| frames.take(c)).flatten().collect();
            assert_eq!(String::from_utf8_lossy(&out), String::from_utf8_lossy(SENT), "in steps of {step}");
            let seen = seen.lock().expect("seen");
            assert_eq!((seen.len(), seen[0].subject.as_str(), &seen[0].payload[..]), (2, "a", &b"hi"[..]));
            assert_eq!(seen[1].reply.as_deref(), Some("_INBOX.1"));
            assert_eq!(seen[1].payload.len(), 2);
        }
    }

    #[test]
    fn headers_and_numbers_can_be_changed() {
        let mut publish = Publish {
            subject: "s".into(),
            reply: None,
            headers: Some(Bytes::from_static(b"NATS/1.0\r\nFence: 4\r\nId: x\r\n\r\n")),
            payload: Bytes::from_static(b"{\"resume\":{\"at_sample\":41,\"z\":1}}"),
        };
        assert!(publish.strip("fence") && !publish.strip("fence"));
        assert_eq!(publish.headers.as_deref(), Some(&b"NATS/1.0\r\nId: x\r\n\r\n"[..]));
        assert!(publish.rewrite_number("at_sample", |n| n + 100) && !publish.rewrite_number("none", |n| n));
        assert_eq!(
            &publish.encode()[..],
            b"HPUB s 19 53\r\nNATS/1.0\r\nId: x\r\n\r\n{\"resume\":{\"at_sample\":141,\"z\":1}}\r\n"
        );
    }

    #[tokio::test]
    async fn publishes_are_dropped_doubled_and_overtaken() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let server = NatsServer::start().await?;
        let tamper = |p: &mut Publish| match &p.payload[..] {
            b"drop" => Fate::Drop,
            b"double" => Fate::Double,
            b"late" => Fate::Late(Duration::from_millis(100)),
            _ => Fate::Pass,
        };
        let relay = Relay::start_with(&[server.url()], Some(Arc::new(tamper))).await?;
        let direct = server.client().await?;
        let mut sub = direct.subscribe("x").await?;
        direct.flush().await?;
        let client = async_nats::connect(relay.url()).await?;
        for text in ["late", "drop", "double", "last"] {
            client.publish("x", text.into()).await?;
        }
        let mut seen = Vec::new();
        for _ in 0..4 {
            let message = tokio::time::timeout(Duration::from_secs(5), sub.next()).await?.ok_or("closed")?;
            seen.push(String::from_utf8_lossy(&message.payload).into_owned());
        }
        assert_eq!(seen, ["double", "double", "last", "late"]);
        eventually("the client goes on", Duration::from_secs(5), || async { client.flush().await.ok() }).await?;
        Ok(())
    }
}
