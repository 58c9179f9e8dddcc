//! What stands around every route: the name we were asked by, the page that asks, roles, and the headers of every answer.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{
    Router,
    body::{self, Body},
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use metrics::{counter, gauge};

use crate::{
    access::{Access, Role, Roles, is_foreign},
    patience::{Answer, Brief, Patience},
    refusal::Refusal,
    room::Seat,
};

/// Requests by route and class of status.
pub const HTTP_REQUESTS: &str = "voxfleet_http_requests_total";

/// Open connections by what they carry: `all` counts every one, the others those that stay open.
pub const HTTP_CONNECTIONS: &str = "voxfleet_http_connections";

/// Counts one connection while it lives.
#[derive(Debug)]
pub struct Open(&'static str);

impl Open {
    pub fn new(kind: &'static str) -> Self {
        gauge!(HTTP_CONNECTIONS, "kind" => kind).increment(1.0);
        Self(kind)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        gauge!(HTTP_CONNECTIONS, "kind" => self.0).decrement(1.0);
    }
}

/// Of a refusal that some library wrote.
const MAX_REASON: usize = 4 * 1024;

/// The page needs nothing but its own files, and talks to nobody but us.
pub const CSP: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                       manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

/// Roles of the request that is being answered.
#[derive(Debug, Clone, Copy)]
pub struct Granted(pub Roles);

impl<S: Sync> FromRequestParts<S> for Granted {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        Ok(Granted(granted(parts)))
    }
}

macro_rules! required {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name;

        impl<S: Sync> FromRequestParts<S> for $name {
            type Rejection = Refusal;

            async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
                require(granted(parts), Role::$name).map(|()| $name)
            }
        }
    };
}

required! {
    /// Asked for by handlers that read.
    Viewer
}
required! {
    /// Asked for by handlers that take audio.
    Producer
}
required! {
    /// Asked for by handlers that change something.
    Operator
}

fn granted(parts: &Parts) -> Roles {
    parts.extensions.get::<Granted>().map(|g| g.0).unwrap_or_default()
}

/// 401: who are you. 403: not you.
fn require(roles: Roles, role: Role) -> Result<(), Refusal> {
    if roles.has(role) {
        return Ok(());
    }
    let message = format!("this needs a token of the role {}", role.as_str());
    Err(match roles.is_empty() {
        true => Refusal::new(StatusCode::UNAUTHORIZED, "unauthorized", message),
        false => Refusal::new(StatusCode::FORBIDDEN, "forbidden", message),
    })
}

/// Paths to which something does not apply that does to all others.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exceptions {
    /// A token may stand in the URL.
    pub query_tokens: &'static [&'static str],
    /// Bodies are as long as they are: the handler bounds the time that they take, and says to its [`Seat`] when one is worth
    /// waiting for.
    pub long_bodies: &'static [&'static str],
}

/// Puts the guard around all routes.
pub fn guard(router: Router, access: Arc<Access>, exceptions: Exceptions) -> Router {
    let router = router.fallback(|| async { Refusal::not_found("there is nothing at this path") });
    router.layer(middleware::from_fn_with_state((access, exceptions), admit)).layer(middleware::from_fn(finish))
}

async fn admit(
    State((access, exceptions)): State<(Arc<Access>, Exceptions)>,
    mut request: Request,
    next: Next,
) -> Response {
    let headers = request.headers();
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok());
    if !access.knows_host(host) {
        let message = "this is not a name of this server (http.hosts lists others)";
        return Refusal::new(StatusCode::MISDIRECTED_REQUEST, "unknown_host", message).into_response();
    }
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if (!reads || headers.contains_key(header::UPGRADE)) && is_foreign(headers) {
        let message = "a page of another site asks";
        return Refusal::new(StatusCode::FORBIDDEN, "foreign_origin", message).into_response();
    }
    let in_query = exceptions.query_tokens.contains(&request.uri().path());
    let roles = access.roles(headers, request.uri(), in_query);
    request.extensions_mut().insert(Granted(roles));
    if exceptions.long_bodies.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let patience = request.extensions().get::<Patience>().copied().unwrap_or_default();
    let (seat, late) = (request.extensions().get::<Seat>().cloned(), Arc::new(AtomicBool::new(false)));
    let request = request.map(|body| Body::new(Brief::new(body, patience.body, late.clone(), seat)));
    let response = next.run(request).await;
    if late.load(Ordering::Relaxed) {
        let message = format!("the request did not come within {} s", patience.body.as_secs());
        return Refusal::new(StatusCode::REQUEST_TIMEOUT, "timeout", message).into_response();
    }
    response
}

/// Libraries refuse in plain text; whoever asks us reads one shape of errors.
async fn in_json(response: Response) -> Response {
    let plain =
        response.headers().get(header::CONTENT_TYPE).is_none_or(|kind| kind.as_bytes().starts_with(b"text/plain"));
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error()) || !plain {
        return response;
    }
    let class = match status {
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::METHOD_NOT_ALLOWED => "method_not_allowed",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        _ if status.is_server_error() => "internal",
        _ => "bad_request",
    };
    let (parts, body) = response.into_parts();
    let said = body::to_bytes(body, MAX_REASON).await.unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    let message =
        if said.is_empty() { status.canonical_reason().unwrap_or("refused").to_owned() } else { said.into_owned() };
    let mut refused = Refusal::new(status, class, message).into_response();
    // What says which methods there are, when to come again.
    for (name, value) in &parts.headers {
        if !matches!(*name, header::CONTENT_TYPE | header::CONTENT_LENGTH) {
            refused.headers_mut().insert(name.clone(), value.clone());
        }
    }
    refused
}

/// Headers that every answer has, and the count of requests. No CORS: other sites' pages have no business here.
async fn finish(request: Request, next: Next) -> Response {
    // Patterns, not paths: a path holds ids of sessions.
    let route = request.extensions().get::<MatchedPath>().map_or("none".to_owned(), |path| path.as_str().to_owned());
    let seat = request.extensions().get::<Seat>().cloned();
    let mut response = in_json(next.run(request).await).await;
    let class = match response.status().as_u16() {
        100..=199 => "1xx",
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    };
    counter!(HTTP_REQUESTS, "route" => route, "code" => class).increment(1);
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, CSP),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("permissions-policy"), "camera=(), geolocation=(), microphone=(self)"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    match seat {
        Some(seat) => response.map(|body| Body::new(Answer::new(body, seat))),
        None => response,
    }
}
