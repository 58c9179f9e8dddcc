//! `POST /api/transcribe`: recordings from programs that know nothing but HTTP, on a whole fleet.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use voxfleet_harness::{
    audio::{self, Pcm},
    fleet::{self, Engine, Fleet, FleetBuilder},
    wait::{eventually, never},
};
use voxfleet_nats::{Nats, api, subjects::Endpoint};
use voxfleet_schema::{
    id::StreamId,
    job::{JobQuery, JobState, JobStatus},
};

use crate::{direct, jobs_fleet::connect};

const SOON: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(60);
const FORM: &str = "multipart/form-data; boundary=voxfleet-test";

fn fleet() -> FleetBuilder {
    Fleet::builder().workers(1).slots(2).set("dispatcher.http.listen", "127.0.0.1:0")
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| self.text())
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Sends a request and leaves its answer to be read.
async fn send(url: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<TcpStream> {
    let host = url.strip_prefix("http://").context("plain http")?;
    let mut socket = TcpStream::connect(host).await?;
    let mut head = format!("POST /api/transcribe{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n");
    for (name, value) in headers.iter().chain(&[("content-length", body.len().to_string().as_str())]) {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    socket.write_all(format!("{head}\r\n").as_bytes()).await?;
    // A server that has heard enough answers before it has read everything.
    let _ = socket.write_all(body).await;
    Ok(socket)
}

async fn post(url: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Answer> {
    let mut socket = send(url, path, headers, body).await?;
    let mut all = Vec::new();
    timeout(LONG, socket.read_to_end(&mut all)).await.context("no answer")??;
    let at = all.windows(4).position(|four| four == b"\r\n\r\n").context("a head")?;
    let head = String::from_utf8(all[..at].to_vec())?;
    let status = head.split(' ').nth(1).context("a status")?.parse()?;
    let mut answer = Answer { status, head, body: all[at + 4..].to_vec() };
    if answer.header("transfer-encoding").is_some_and(|value| value.contains("chunked")) {
        answer.body = unchunked(&answer.body)?;
    }
    Ok(answer)
}

fn unchunked(mut body: &[u8]) -> Result<Vec<u8>> {
    let mut whole = Vec::new();
    loop {
        let line = body.windows(2).position(|two| two == b"\r\n").context("a chunk's length")?;
        let len = usize::from_str_radix(std::str::from_utf8(&body[..line])?, 16)?;
        if len == 0 {
            return Ok(whole);
        }
        whole.extend_from_slice(&body[line + 2..line + 2 + len]);
        body = &body[line + 2 + len + 2..];
    }
}

/// A form with these fields and a file among them.
fn form(before: &[(&str, &str)], file: Option<(&str, &[u8])>, after: &[(&str, &str)]) -> Vec<u8> {
    let mut form = Vec::new();
    let field = |form: &mut Vec<u8>, name: &str, more: &str, value: &[u8]| {
        form.extend_from_slice(
            format!("--voxfleet-test\r\ncontent-disposition: form-data; name=\"{name}\"{more}\r\n\r\n").as_bytes(),
        );
        form.extend_from_slice(value);
        form.extend_from_slice(b"\r\n");
    };
    before.iter().for_each(|(name, value)| field(&mut form, name, "", value.as_bytes()));
    if let Some((name, bytes)) = file {
        field(&mut form, "file", &format!("; filename=\"{name}\""), bytes);
    }
    after.iter().for_each(|(name, value)| field(&mut form, name, "", value.as_bytes()));
    form.extend_from_slice(b"--voxfleet-test--\r\n");
    form
}

async fn status(nats: &Nats, job: &str) -> Result<JobStatus> {
    Ok(api::request(nats, Endpoint::JobStatus, &JobQuery { job: StreamId::new(job)? }, SOON).await?)
}

async fn keys(fleet: &Fleet) -> Result<Vec<String>> {
    use futures_util::TryStreamExt as _;
    let store = fleet.js().get_object_store("asr_media").await?;
    let listed: Vec<_> = store.list().await?.try_collect().await?;
    Ok(listed.into_iter().map(|object| object.name).collect())
}

fn recording(seed: u64, seconds: f64) -> Result<(Pcm, String)> {
    let pcm = audio::bursts(seed, seconds);
    let text = direct::simulated_text(&pcm)?;
    ensure!(!text.is_empty());
    Ok((pcm, text))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_and_a_bare_body_get_their_text() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = fleet().start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let (pcm, expected) = recording(700, 12.0)?;

    let body =
        form(&[("job", "form-1")], Some(("call.wav", &pcm.wav())), &[("language", "en"), ("endpoint_ms", "500")]);
    let answer = post(&url, "", &[("content-type", FORM)], &body).await?;
    ensure!(answer.status == 200, "{} {}\n{}", answer.status, answer.text(), fleet.logs());
    let result = answer.json()?;
    ensure!(result["full_text"] == expected.as_str(), "{result}");
    ensure!(result["segments"].is_array() && result["performance_metrics"].is_object(), "{result}");
    ensure!(answer.header("voxfleet-job") == Some("form-1"), "{}", answer.head);
    let nats = connect(&fleet).await?;
    let record = status(&nats, "form-1").await?.record;
    ensure!(
        record.name.as_deref() == Some("call.wav") && record.options.language.as_deref() == Some("en"),
        "{record:?}"
    );

    // The same again is the same job; another recording under its name is not.
    let answer = post(&url, "?format=text", &[("content-type", FORM)], &body).await?;
    ensure!(answer.status == 200 && answer.text() == expected, "{} {}", answer.status, answer.text());
    let (other, _) = recording(701, 3.0)?;
    let body = form(&[("job", "form-1")], Some(("call.wav", &other.wav())), &[]);
    let answer = post(&url, "", &[("content-type", FORM)], &body).await?;
    ensure!(answer.status == 409, "{} {}", answer.status, answer.text());

    let answer = post(&url, "?format=text&job=bare", &[("content-type", "audio/wav")], &pcm.wav()).await?;
    ensure!(answer.status == 200 && answer.text() == expected, "{} {}", answer.status, answer.text());
    ensure!(answer.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")), "{}", answer.head);

    let answer = post(&url, "?wait=false&job=later", &[("content-type", "audio/wav")], &pcm.wav()).await?;
    ensure!(answer.status == 202 && answer.json()?["job"] == "later", "{} {}", answer.status, answer.text());
    let done = eventually("the job's end", SOON, || async {
        status(&nats, "later").await.ok().filter(|status| status.record.state == JobState::Done)
    });
    done.await?;
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_for_events_sees_it_grow() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = fleet().engine(Engine::Simulated { speed: 10.0 }).start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let (pcm, expected) = recording(710, 30.0)?;
    let headers = [("content-type", "audio/wav"), ("accept", "text/event-stream")];
    let answer = post(&url, "", &headers, &pcm.wav()).await?;
    ensure!(answer.status == 200, "{} {}", answer.status, answer.text());
    let text = answer.text();
    let mut events: Vec<(String, Value)> = Vec::new();
    for block in text.split("\n\n").filter(|block| block.starts_with("event:")) {
        let (name, data) = block.split_once('\n').with_context(|| block.to_owned())?;
        let name = name.trim_start_matches("event:").trim().to_owned();
        events.push((name, serde_json::from_str(data.trim_start_matches("data:").trim())?));
    }
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(names.first() == Some(&"job") && names.last() == Some(&"result"), "{names:?}");
    ensure!(names.contains(&"progress") && names.iter().filter(|name| **name == "final").count() > 1, "{names:?}");
    let last = &events.last().context("events")?.1;
    ensure!(last["full_text"] == expected.as_str(), "{last}");
    let finals = events.iter().filter(|(name, _)| name == "final");
    let said: Vec<&str> = finals
        .flat_map(|(_, value)| value["segments"].as_array())
        .flatten()
        .filter_map(|s| s["text"].as_str())
        .collect();
    ensure!(said.join(" ") == expected, "{said:?}");

    // A recording that is none ends in an error, as an event and as an answer.
    let answer = post(&url, "", &headers, b"this is no recording at all, whatever it says it is").await?;
    ensure!(answer.text().contains("event: error"), "{}", answer.text());
    let answer = post(&url, "", &headers[..1], b"this is no recording at all, whatever it says it is").await?;
    ensure!(answer.status == 400, "{} {}", answer.status, answer.text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_cancels_only_where_it_was_asked_for() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = fleet().engine(Engine::Simulated { speed: 4.0 }).start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let nats = connect(&fleet).await?;
    let (pcm, _) = recording(720, 30.0)?;
    let wav = pcm.wav();
    for (job, query) in [("goes", "?job=goes&cancel_on_disconnect=true"), ("stays", "?job=stays")] {
        let socket = send(&url, query, &[("content-type", "audio/wav")], &wav).await?;
        eventually("the job", SOON, || async {
            status(&nats, job).await.ok().filter(|status| status.record.state == JobState::Assigned)
        })
        .await
        .with_context(|| fleet.logs())?;
        drop(socket);
    }
    let ended = |job: &'static str| {
        let nats = nats.clone();
        async move {
            eventually(format!("the end of {job}"), LONG, || async {
                status(&nats, job).await.ok().filter(|status| status.record.state.has_ended()).map(|s| s.record.state)
            })
            .await
        }
    };
    assert_eq!(ended("goes").await?, JobState::Cancelled);
    assert_eq!(ended("stays").await?, JobState::Done);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_taken_is_refused_and_leaves_nothing_behind() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = fleet().set("dispatcher.topology.media_max_bytes", 2 << 20).start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let (pcm, _) = recording(730, 2.0)?;
    let wav = pcm.wav();
    let huge = vec![1u8; 3 << 20];
    let two = {
        let mut two = form(&[], Some(("a.wav", &wav)), &[]);
        two.truncate(two.len() - b"--voxfleet-test--\r\n".len());
        [two, form(&[], Some(("b.wav", &wav)), &[])].concat()
    };
    let wav_type = ("content-type", "audio/wav");
    let form_type = ("content-type", FORM);
    /// What it is, query, header, body, status, and a part of the answer.
    type Case<'a> = (&'a str, &'a str, (&'a str, &'a str), Vec<u8>, u16, &'a str);
    let cases: Vec<Case<'_>> = vec![
        ("too large", "", wav_type, huge.clone(), 413, "too_large"),
        ("too large in a form", "", form_type, form(&[], Some(("x.wav", &huge)), &[]), 413, "too_large"),
        ("not a recording", "", ("content-type", "application/json"), b"{}".to_vec(), 415, "unsupported_format"),
        ("nothing", "", wav_type, Vec::new(), 400, "empty"),
        ("a form without a file", "", form_type, form(&[("language", "en")], None, &[]), 400, "file"),
        (
            "a form that breaks off",
            "",
            form_type,
            form(&[], Some(("x.wav", &wav)), &[])[..500].to_vec(),
            400,
            "bad_request",
        ),
        ("two files", "", form_type, two, 400, "two recordings"),
        ("an unknown option", "?colour=red", wav_type, wav.clone(), 400, "unknown option"),
        (
            "a bad option behind the file",
            "",
            form_type,
            form(&[], Some(("x.wav", &wav)), &[("endpoint_ms", "1")]),
            400,
            "endpoint_ms",
        ),
        ("a late id", "", form_type, form(&[], Some(("x.wav", &wav)), &[("job", "late")]), 400, "behind the recording"),
        ("a hostile id", "?job=..%2F..", wav_type, wav.clone(), 400, "job"),
        ("another format", "?format=srt", wav_type, wav.clone(), 400, "json or text"),
    ];
    for (what, query, kind, body, code, part) in cases {
        let answer = post(&url, query, &[kind], &body).await.with_context(|| what.to_owned())?;
        ensure!(answer.status == code && answer.text().contains(part), "{what}: {} {}", answer.status, answer.text());
        ensure!(answer.json()?["error"]["class"].is_string(), "{what}: {}", answer.text());
    }
    let left = eventually("an empty store", SOON, || async { keys(&fleet).await.ok().filter(Vec::is_empty) }).await;
    ensure!(left.is_ok(), "{:?}", keys(&fleet).await?);
    // A client that goes away in the middle of its recording leaves nothing, and submits nothing.
    let host = url.strip_prefix("http://").context("plain http")?;
    let mut socket = TcpStream::connect(host).await?;
    let head = format!(
        "POST /api/transcribe?job=cut HTTP/1.1\r\nhost: {host}\r\ncontent-type: audio/wav\r\ncontent-length: {}\r\n\r\n",
        wav.len()
    );
    socket.write_all(head.as_bytes()).await?;
    socket.write_all(&wav[..wav.len() / 2]).await?;
    drop(socket);
    let nats = connect(&fleet).await?;
    never(Duration::from_secs(1), || async {
        status(&nats, "cut").await.ok().map(|status| format!("{:?}", status.record))
    })
    .await?;
    // And somebody decent is served as ever.
    let answer = post(&url, "?format=text", &[wav_type], &wav).await?;
    ensure!(answer.status == 200 && answer.text() == direct::simulated_text(&pcm)?, "{}", answer.text());
    fleet.check_alive()?;
    Ok(())
}

/// A request whose body comes in two parts: the first is on its way now.
struct Halves {
    socket: TcpStream,
    rest: Vec<u8>,
}

impl Halves {
    async fn begin(url: &str, query: &str, kind: &str, body: &[u8]) -> Result<Self> {
        let host = url.strip_prefix("http://").context("plain http")?;
        let mut socket = TcpStream::connect(host).await?;
        let head = format!(
            "POST /api/transcribe{query} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(head.as_bytes()).await?;
        let (first, rest) = body.split_at(body.len() / 2);
        socket.write_all(first).await?;
        Ok(Self { socket, rest: rest.to_vec() })
    }

    /// A little more of it.
    async fn go_on(&mut self) -> Result<()> {
        let rest = self.rest.split_off(self.rest.len().min(1_000));
        self.socket.write_all(&self.rest).await?;
        self.rest = rest;
        Ok(())
    }

    async fn end(mut self) -> Result<(u16, String)> {
        self.socket.write_all(&self.rest).await?;
        self.answer().await
    }

    async fn answer(mut self) -> Result<(u16, String)> {
        let mut all = Vec::new();
        timeout(LONG, self.socket.read_to_end(&mut all)).await.context("no answer")??;
        let text = String::from_utf8_lossy(&all).into_owned();
        Ok((text.split(' ').nth(1).context("a status")?.parse()?, text))
    }
}

/// What the store holds, of unfinished objects too.
async fn stored_bytes(fleet: &Fleet) -> Result<u64> {
    Ok(fleet.js().get_stream("OBJ_asr_media").await?.get_info().await?.state.bytes)
}

/// Whoever comes first under a name is the job; nobody writes over, or takes away, what another one brought.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_of_one_name_do_not_touch_each_other() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = fleet().start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let (first, expected) = recording(740, 12.0)?;
    let (other, _) = recording(741, 12.0)?;
    let (first, other) = (first.wav(), other.wav());
    let under_way = || async {
        eventually("all three are being stored", SOON, || async {
            stored_bytes(&fleet).await.ok().filter(|n| *n > 390_000)
        })
        .await
        .with_context(|| fleet.logs())
    };
    let of = |name: &'static str, keys: Vec<String>| {
        keys.into_iter().filter(|key| key.starts_with(&format!("audio/{name}/"))).collect::<Vec<_>>()
    };

    // All of them ask before any is a job: one with another recording, one with the same, one whose form is broken behind it.
    let broken = form(&[], Some(("x.wav", &first)), &[("endpoint_ms", "1")]);
    let another = Halves::begin(&url, "?job=one&format=text", "audio/wav", &other).await?;
    let same = Halves::begin(&url, "?job=one&format=text", "audio/wav", &first).await?;
    let broken = Halves::begin(&url, "?job=one", FORM, &broken).await?;
    under_way().await?;
    let answer = post(&url, "?job=one&format=text", &[("content-type", "audio/wav")], &first).await?;
    ensure!(answer.status == 200 && answer.text() == expected, "{} {}", answer.status, answer.text());
    let stands = of("one", keys(&fleet).await?);
    ensure!(stands.len() == 1, "{stands:?}");
    let (status, text) = another.end().await?;
    ensure!(status == 409 && text.contains("another recording"), "{text}");
    let (status, text) = broken.end().await?;
    ensure!(status == 400 && text.contains("endpoint_ms"), "{text}");
    let (status, text) = same.end().await?;
    ensure!(status == 200 && text.ends_with(&expected), "{text}");
    ensure!(of("one", keys(&fleet).await?) == stands, "{:?}, before {stands:?}", keys(&fleet).await?);
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_send_loses_his_place() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet =
        fleet().set("dispatcher.uploads.max_at_once", 2).set("dispatcher.uploads.total_timeout_s", 10).start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let (pcm, expected) = recording(750, 3.0)?;
    let wav = pcm.wav();
    let wav_type = ("content-type", "audio/wav");
    // Everything is up, so that time runs only where nothing is sent.
    let answer = post(&url, "?format=text", &[wav_type], &wav).await?;
    ensure!(answer.status == 200 && answer.text() == expected, "{} {}", answer.status, answer.text());
    // Half of a form's own words, and half of a field that is no recording.
    let head = form(&[], Some(("x.wav", b"")), &[])[..40].to_vec();
    let field = form(&[("prompt", &"x".repeat(4_000))], None, &[]);
    let mut silent = vec![Halves::begin(&url, "", FORM, &head).await?, Halves::begin(&url, "", FORM, &field).await?];
    let until = Instant::now() + SOON;
    loop {
        // No recording: with a place it is refused too, and leaves nothing.
        let answer = post(&url, "", &[("content-type", "application/json")], b"{}").await?;
        if answer.status == 503 && answer.header("retry-after").is_some() {
            break;
        }
        ensure!(answer.status == 415, "{} {}", answer.status, answer.text());
        ensure!(Instant::now() < until, "there are places left");
        // This one may have had the place for which one of them came, and was sent away.
        silent.push(Halves::begin(&url, "", FORM, &head).await?);
    }
    let mut late = 0;
    for silent in silent {
        let (status, text) = silent.answer().await?;
        let too_late = status == 408 && text.contains("\"timeout\"") && text.contains("within 10 s");
        ensure!(status == 503 || too_late, "{text}");
        late += usize::from(too_late);
    }
    ensure!(late >= 2, "{late} lost their places");
    let answer = post(&url, "?format=text", &[wav_type], &wav).await?;
    ensure!(answer.status == 200 && answer.text() == expected, "{} {}", answer.status, answer.text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_more_than_there_is() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = fleet()
        .set("dispatcher.uploads.max_bytes", 3 << 20)
        .set("dispatcher.topology.media_max_bytes", 4 << 20)
        .start()
        .await?;
    let url = fleet.dispatchers[0].http_url().await?;
    let wav_type = ("content-type", "audio/wav");
    // More than one recording may have, announced or not. The store is empty: where it had no room, that would be the reason.
    let large = vec![1u8; (3 << 20) + 1];
    let answer = post(&url, "", &[wav_type], &large).await?;
    ensure!(answer.status == 413 && answer.text().contains("largest recording"), "{}", answer.text());
    let answer = post(&url, "", &[("content-type", FORM)], &form(&[], Some(("x.wav", &large)), &[])).await?;
    ensure!(answer.status == 413 && answer.text().contains("largest recording"), "{}", answer.text());

    // What was refused is gone.
    eventually("room", SOON, || async { stored_bytes(&fleet).await.ok().filter(|n| *n < 100_000) }).await?;
    // Each of them fits, both do not: the second is told to come again, and what is kept for results stays free.
    let most = vec![1u8; 2 << 20];
    let mut first = Halves::begin(&url, "?wait=false", "audio/wav", &most).await?;
    eventually("half of the first", SOON, || async { stored_bytes(&fleet).await.ok().filter(|n| *n > 900_000) })
        .await?;
    let until = Instant::now() + SOON;
    loop {
        // It may be told before it has sent everything, and its connection be gone with that.
        if let Ok(answer) = post(&url, "?wait=false", &[wav_type], &most).await {
            ensure!(answer.status == 503, "{} {}\n{}", answer.status, answer.text(), fleet.logs());
            if answer.text().contains("other recordings") {
                break;
            }
        }
        ensure!(Instant::now() < until, "the second is not refused\n{}", fleet.logs());
        // However long that takes: the first is not silent meanwhile.
        first.go_on().await?;
    }
    let (status, text) = first.end().await?;
    ensure!(status == 202, "{text}");
    Ok(())
}
