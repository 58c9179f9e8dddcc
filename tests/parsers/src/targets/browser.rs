//! What browsers and programs without NATS write: queries, forms, headers, and audio in pieces of any size.

use std::sync::OnceLock;

use bytes::Bytes;
use voxfleet_dispatcher::strangers;
use voxfleet_http::{
    Access, HttpConfig, Role,
    access::is_foreign,
    axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, header},
};
use voxfleet_schema::{
    audio::{AudioFormat, sniff_container},
    job::MAX_NAME_BYTES,
};

const OPERATOR: &str = "operator-of-this-test";
const HOST: &str = "dash.example";

fn line(input: &[u8], number: usize) -> String {
    let text = String::from_utf8_lossy(input);
    text.lines().nth(number).unwrap_or_default().to_owned()
}

/// The query of `/asr`: what is taken can be opened as a session.
pub(super) fn asr_query(input: &[u8]) -> bool {
    let Some(pairs) = strangers::pairs(&line(input, 0)) else { return false };
    let Some((session, options, format)) = strangers::session(&pairs) else { return false };
    assert!(options.validate().is_ok(), "{options:?}");
    assert!(format.frame_bytes() > 0 && format.channels > 0, "{format:?}");
    assert!(voxfleet_schema::id::check(session.as_str()).is_ok(), "{session:?}");
    // As its header says it to whoever reads the log.
    let again: AudioFormat = format.to_string().parse().expect("what is written reads");
    assert_eq!(again, format);
    true
}

/// `/api/transcribe`: the first line is the query, each further one a field of the form.
pub(super) fn job_form(input: &[u8]) -> bool {
    let Some(pairs) = strangers::pairs(&line(input, 0)) else { return false };
    let text = String::from_utf8_lossy(input);
    let form: Vec<(String, String)> = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let Some(request) = strangers::job(&pairs, &form) else { return false };
    assert!(request.validate().is_ok(), "{request:?}");
    let name = request.name.unwrap_or_default();
    assert!(name.len() <= MAX_NAME_BYTES && !name.chars().any(char::is_control), "{name:?}");
    true
}

/// Lists of the API.
pub(super) fn lists(input: &[u8]) -> bool {
    strangers::list(&line(input, 0))
}

/// Raw audio in messages as a browser cuts them: the first byte chooses a format, the second how it is cut.
pub(super) fn pcm(input: &[u8]) -> bool {
    let [kind, cut, audio @ ..] = input else { return false };
    let encoding = ["pcm_s16le", "pcm_f32le"][usize::from(kind & 1)];
    let format = format!("{encoding};rate=16000;channels={}", 1 + (kind >> 1) % 8);
    let format: AudioFormat = format.parse().expect("a format");
    let size = usize::from(*cut).max(1);
    let messages: Vec<Bytes> = audio.chunks(size).map(Bytes::copy_from_slice).collect();
    let frame = format.frame_bytes();
    let mut out = Vec::new();
    for whole in strangers::samples(format, &messages) {
        assert_eq!(whole.len() % frame, 0, "a part of a frame");
        out.extend_from_slice(&whole);
    }
    assert!(audio.len() - out.len() < frame, "{} of {} bytes", out.len(), audio.len());
    assert!(audio.starts_with(&out), "its sound changes");
    let (told, held, taken) = strangers::head(&messages);
    let given: usize = messages[..taken].iter().map(Bytes::len).sum();
    assert!(audio[..given] == held[..], "its beginning changes");
    assert!(told.is_none_or(|container| container == sniff_container(&held)));
    !out.is_empty()
}

/// Tokens of an operator alone, and of nobody; the second is open on loopback.
fn doors() -> &'static [Access; 2] {
    static DOORS: OnceLock<[Access; 2]> = OnceLock::new();
    DOORS.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("operator");
        std::fs::write(&file, OPERATOR).expect("room for it");
        let hosts = vec![HOST.to_owned()];
        let closed = HttpConfig { operator_token_file: Some(file), hosts: hosts.clone(), ..HttpConfig::default() };
        let open = HttpConfig { listen: "127.0.0.1:9480".to_owned(), hosts, ..HttpConfig::default() };
        [closed, open].map(|config| Access::read(&config).expect("its tokens"))
    })
}

/// The first line is the URL, each further one a header: nobody is an operator who does not bring the token, and no foreign name
/// is ours.
pub(super) fn door(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let Ok(uri) = text.lines().next().unwrap_or_default().parse::<Uri>() else { return false };
    let mut headers = HeaderMap::new();
    for (name, value) in text.lines().skip(1).filter_map(|line| line.split_once(": ")) {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse::<HeaderValue>()) {
            headers.append(name, value);
        }
    }
    let [closed, open] = doors();
    for in_query in [false, true] {
        let roles = closed.roles(&headers, &uri, in_query);
        assert!(!roles.has(Role::Operator) || text.contains(OPERATOR), "an operator without a token");
        assert!(roles.is_empty() || roles.has(Role::Operator), "half of a role");
        assert!(!open.roles(&headers, &uri, in_query).has(Role::Operator), "everybody is an operator");
    }
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok());
    if let Some(host) = host.filter(|host| open.knows_host(Some(host))) {
        let name = host.to_ascii_lowercase();
        let address = name.bytes().all(|b| b.is_ascii_hexdigit() || matches!(b, b'.' | b':' | b'[' | b']'));
        let ours = |known: &str| name == known || name.strip_prefix(known).is_some_and(|port| port.starts_with(':'));
        assert!(address || ours("localhost") || ours(HOST), "{host:?} is taken for ours");
    }
    let origin = headers.get(header::ORIGIN).and_then(|value| value.to_str().ok());
    if let Some(origin) = origin.filter(|_| !is_foreign(&headers)) {
        let ours = host.is_some_and(|host| origin.to_ascii_lowercase().ends_with(&host.to_ascii_lowercase()));
        assert!(ours, "{origin:?} is taken for {host:?}");
    }
    !headers.is_empty()
}
