//! A collector of traces: OTLP over HTTP, protobuf. It keeps what it is sent, or does what a bad one does.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Error, Result};

/// Longest request, head and body.
const MAX: usize = 16 << 20;

/// A span as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub service: String,
    pub name: String,
    /// Ids in hex; no parent: empty.
    pub trace: String,
    pub span: String,
    pub parent: String,
    /// Unix times in ns.
    pub start_ns: u64,
    pub end_ns: u64,
    pub attributes: BTreeMap<String, String>,
    /// Why it failed.
    pub error: Option<String>,
}

impl Seen {
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

/// What it does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    Takes,
    /// It reads and never answers.
    Hangs,
    /// It answers with this status.
    Refuses(u16),
}

#[derive(Debug)]
struct State {
    manner: Manner,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    spans: AtomicUsize,
    /// Request heads, for what a test asks of them.
    heads: Mutex<Vec<String>>,
    /// Spans are counted and not kept.
    forgets: bool,
}

/// Ends when it is dropped.
#[derive(Debug)]
pub struct Collector {
    state: Arc<State>,
    address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Collector {
    pub async fn start(manner: Manner) -> Result<Self> {
        Self::listen(manner, false).await
    }

    /// One that takes everything and keeps a count, for long runs.
    pub async fn counting() -> Result<Self> {
        Self::listen(Manner::Takes, true).await
    }

    async fn listen(manner: Manner, forgets: bool) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(Error::io("a collector's port"))?;
        let address = listener.local_addr().map_err(Error::io("a collector's port"))?;
        let state = Arc::new(State {
            manner,
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            spans: AtomicUsize::new(0),
            heads: Mutex::default(),
            forgets,
        });
        let stop = CancellationToken::new();
        TaskTracker::new().spawn(accept(listener, Arc::clone(&state), stop.clone()));
        Ok(Self { state, address, stop })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What was sent so far.
    pub fn seen(&self) -> Vec<Seen> {
        kept(&self.state.seen).clone()
    }

    /// How many spans that was.
    pub fn spans(&self) -> usize {
        self.state.spans.load(Ordering::Relaxed)
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// The heads of requests so far.
    pub fn heads(&self) -> Vec<String> {
        kept(&self.state.heads).clone()
    }
}

fn kept<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, state: Arc<State>, stop: CancellationToken) {
    let tasks = TaskTracker::new();
    while let Some(Ok((stream, _))) = stop.run_until_cancelled(listener.accept()).await {
        state.connections.fetch_add(1, Ordering::Relaxed);
        let (state, stop) = (Arc::clone(&state), stop.clone());
        tasks.spawn(async move {
            // A client that goes away ends its connection, and nothing else.
            let _ = stop.run_until_cancelled(serve(stream, &state)).await;
        });
    }
}

/// One request after the other.
async fn serve(stream: TcpStream, state: &State) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() > MAX {
                return Ok(());
            }
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
        });
        let mut body = vec![0; length.unwrap_or(0).min(MAX)];
        stream.read_exact(&mut body).await?;
        let status = match state.manner {
            Manner::Hangs => std::future::pending().await,
            Manner::Refuses(status) => status,
            Manner::Takes => take(state, &head, &body),
        };
        let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n");
        stream.get_mut().write_all(answer.as_bytes()).await?;
    }
}

fn take(state: &State, head: &str, body: &[u8]) -> u16 {
    if !head.starts_with("POST /v1/traces HTTP/1.1\r\n") {
        return 404;
    }
    let Ok(request) = ExportTraceServiceRequest::decode(body) else { return 400 };
    let found: Vec<Seen> = request.resource_spans.iter().flat_map(spans_of).collect();
    state.spans.fetch_add(found.len(), Ordering::Relaxed);
    if !state.forgets {
        kept(&state.seen).extend(found);
        kept(&state.heads).push(head.to_owned());
    }
    200
}

fn spans_of(all: &opentelemetry_proto::tonic::trace::v1::ResourceSpans) -> Vec<Seen> {
    let resource = all.resource.as_ref().map(|resource| attributes(&resource.attributes)).unwrap_or_default();
    let service = resource.get("service.name").cloned().unwrap_or_default();
    let spans = all.scope_spans.iter().flat_map(|scope| &scope.spans);
    spans
        .map(|span| Seen {
            service: service.clone(),
            name: span.name.clone(),
            trace: hex(&span.trace_id),
            span: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            start_ns: span.start_time_unix_nano,
            end_ns: span.end_time_unix_nano,
            attributes: attributes(&span.attributes),
            error: span.status.as_ref().filter(|status| status.code == 2).map(|status| status.message.clone()),
        })
        .collect()
}

fn attributes(list: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(flag) => flag.to_string(),
        other => format!("{other:?}"),
    };
    let one = |pair: &KeyValue| Some((pair.key.clone(), text(pair.value.as_ref()?.value.as_ref()?)));
    list.iter().filter_map(one).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
