//! The dashboard's files, inside the binary: an operator installs nothing, and a page needs nothing from elsewhere.

use voxfleet_http::axum::{
    Router,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
};

/// Path, type, content.
const FILES: &[(&str, &str, &str)] = &[
    ("/api.js", "text/javascript; charset=utf-8", include_str!("../../page/api.js")),
    ("/app.css", "text/css; charset=utf-8", include_str!("../../page/app.css")),
    ("/app.js", "text/javascript; charset=utf-8", include_str!("../../page/app.js")),
    ("/dom.js", "text/javascript; charset=utf-8", include_str!("../../page/dom.js")),
    ("/favicon.svg", "image/svg+xml", include_str!("../../page/favicon.svg")),
    ("/fleet.js", "text/javascript; charset=utf-8", include_str!("../../page/fleet.js")),
    ("/format.js", "text/javascript; charset=utf-8", include_str!("../../page/format.js")),
    ("/gpu.js", "text/javascript; charset=utf-8", include_str!("../../page/gpu.js")),
    ("/", "text/html; charset=utf-8", include_str!("../../page/index.html")),
    ("/lists.js", "text/javascript; charset=utf-8", include_str!("../../page/lists.js")),
    ("/reader.js", "text/javascript; charset=utf-8", include_str!("../../page/reader.js")),
    ("/record-worklet.js", "text/javascript; charset=utf-8", include_str!("../../page/record-worklet.js")),
    ("/record.js", "text/javascript; charset=utf-8", include_str!("../../page/record.js")),
    ("/sessions.js", "text/javascript; charset=utf-8", include_str!("../../page/sessions.js")),
    ("/sheet.css", "text/css; charset=utf-8", include_str!("../../page/sheet.css")),
    ("/state.js", "text/javascript; charset=utf-8", include_str!("../../page/state.js")),
];

pub(crate) fn routes() -> Router {
    FILES.iter().fold(Router::new(), |router, &(path, kind, content)| {
        router.route(path, get(move || async move { file(kind, content) }))
    })
}

fn file(kind: &'static str, content: &'static str) -> Response {
    // Always asked for anew: a page of another version than its dispatcher would not understand it.
    ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], content).into_response()
}
