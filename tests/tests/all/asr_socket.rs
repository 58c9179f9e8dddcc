//! Browsers and programs without NATS: real WebSocket clients on a whole fleet. The simulated text is made from the samples,
//! so a lost, doubled or shifted byte of a socket is a wrong word.

use std::{collections::BTreeMap, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _, future::try_join_all};
use serde_json::Value;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{self, Message},
};
use voxfleet_audio::{Decoder, Limits};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker, find,
    fleet::{self, Fleet, FleetBuilder},
    wait::eventually,
};
use voxfleet_schema::{
    audio::{Encoding, RawEntry},
    session::SessionOptions,
};

use crate::direct;

const SOON: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(60);

/// A fleet whose dispatcher is asked over HTTP. Nobody dies in it: a heartbeat that is a little late refuses no client.
fn fleet() -> FleetBuilder {
    mortal().set("dispatcher.suspect_after_ms", 10_000).set("dispatcher.dead_after_ms", 20_000)
}

/// The same where a worker's death has to be noticed soon.
fn mortal() -> FleetBuilder {
    Fleet::builder().set("dispatcher.http.listen", "127.0.0.1:0")
}

async fn socket_url(fleet: &Fleet) -> Result<String> {
    let url = fleet.dispatchers[0].http_url().await?;
    Ok(format!("{}/asr", url.replacen("http", "ws", 1)))
}

/// What a page knows.
struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    config: Value,
    last: Value,
    states: usize,
    /// What it was told before it was closed.
    error: Option<Value>,
    ready: bool,
    closed: Option<(u16, String)>,
}

impl Client {
    /// Connects, and reads until it is configured or sent away.
    async fn connect(url: &str) -> Result<Self> {
        let (socket, _) = connect_async(url).await?;
        let mut client =
            Self { socket, config: Value::Null, last: Value::Null, states: 0, error: None, ready: false, closed: None };
        while client.config.is_null() && client.closed.is_none() {
            client.read(SOON).await?;
        }
        Ok(client)
    }

    fn gpu(&self) -> &str {
        self.config["gpu_id"].as_str().unwrap_or_default()
    }

    fn session(&self) -> &str {
        self.config["connection_id"].as_str().unwrap_or_default()
    }

    async fn read(&mut self, patience: Duration) -> Result<()> {
        let message = timeout(patience, self.socket.next()).await.context("nothing came")?;
        match message {
            Some(Ok(Message::Text(text))) => {
                let value: Value = serde_json::from_str(text.as_str())?;
                match value["type"].as_str() {
                    Some("config") => self.config = value,
                    Some("ready_to_stop") => self.ready = true,
                    Some("error") => self.error = Some(value),
                    None => {
                        ensure!(value["lines"].is_array() && value["buffer_transcription"].is_string(), "{value}");
                        (self.last, self.states) = (value, self.states + 1);
                    }
                    Some(other) => bail!("{other}: {value}"),
                }
            }
            Some(Ok(Message::Close(frame))) => {
                let frame = frame.context("a close without a code")?;
                self.closed = Some((frame.code.into(), frame.reason.to_string()));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.into()),
            None => bail!("the socket closed without a word"),
        }
        Ok(())
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.socket.send(Message::Binary(Bytes::copy_from_slice(bytes))).await?)
    }

    /// Sends it in messages of these sizes, one after the other and again.
    async fn stream(&mut self, bytes: &[u8], sizes: &[usize]) -> Result<()> {
        let (mut at, mut n) = (0, 0);
        while at < bytes.len() {
            let to = (at + sizes[n % sizes.len()]).min(bytes.len());
            self.send(&bytes[at..to]).await?;
            (at, n) = (to, n + 1);
        }
        Ok(())
    }

    /// Reads until it is closed.
    async fn closed(&mut self) -> Result<(u16, String)> {
        let until = Instant::now() + LONG;
        loop {
            if let Some(closed) = &self.closed {
                return Ok(closed.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            self.read(left).await.with_context(|| format!("{} waits for its close", self.session()))?;
        }
    }

    /// Ends as pages do, with an empty message; gives the whole text.
    async fn end(&mut self) -> Result<String> {
        self.send(&[]).await?;
        let closed = self.closed().await?;
        ensure!(closed.0 == 1000 && self.ready, "{closed:?} {:?}", self.error);
        Ok(self.text())
    }

    fn text(&self) -> String {
        let lines = self.last["lines"].as_array().cloned().unwrap_or_default();
        let said = lines.iter().filter(|line| line["speaker"] != -2).filter_map(|line| line["text"].as_str());
        said.collect::<Vec<_>>().join(" ")
    }
}

/// Seventeen clients on four workers of four slots: sixteen are served, each on a slot of its own; the seventeenth is sent
/// away as its kind knows it, and served when somebody leaves.
#[tokio::test(flavor = "multi_thread")]
async fn seventeen_clients_on_sixteen_slots() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = fleet().workers(4).slots(4).start().await?;
    let url = socket_url(&fleet).await?;
    let mut clients = Vec::new();
    for n in 0..16 {
        let client = Client::connect(&format!("{url}?session=page-{n}")).await?;
        ensure!(client.session() == format!("page-{n}"), "{:?} {:?}\n{}", client.closed, client.error, fleet.logs());
        ensure!(client.config["useAudioWorklet"] == true, "{}", client.config);
        clients.push(client);
    }
    let mut landed: BTreeMap<&str, usize> = BTreeMap::new();
    clients.iter().for_each(|client| *landed.entry(client.gpu()).or_default() += 1);
    ensure!(landed.len() == 4 && landed.values().all(|n| *n == 4), "{landed:?}");

    let mut refused = Client::connect(&url).await?;
    ensure!(refused.closed().await? == (1008, "No GPU resources available".to_owned()), "{:?}", refused.closed);
    let told = refused.error.context("it was told")?;
    ensure!(told["class"] == "no_capacity" && told["retry_after_ms"].is_u64(), "{told}");

    let left = clients.remove(5);
    let place = left.gpu().to_owned();
    drop(left);
    let next = eventually("the place that came free", SOON, || async {
        Client::connect(&url).await.ok().filter(|client| !client.config.is_null())
    })
    .await
    .with_context(|| fleet.logs())?;
    ensure!(next.gpu() == place, "{} and not {place}", next.gpu());
    clients.push(next);

    let speaking = clients.iter_mut().enumerate().map(|(n, client)| async move {
        let pcm = audio::bursts(900 + n as u64, 5.0);
        let expected = direct::simulated_text(&pcm)?;
        ensure!(!expected.is_empty());
        client.stream(&pcm.bytes(), &[pcm.chunk_bytes(100)]).await?;
        let text = client.end().await?;
        ensure!(text == expected, "{}:\n  heard    {text}\n  expected {expected}", client.session());
        ensure!(client.states > 0 && client.last["status"] == "active_transcription", "{}", client.last);
        Ok::<_, anyhow::Error>(())
    });
    let outcome = try_join_all(speaking).await;
    outcome.with_context(|| fleet.logs())?;
    for client in &clients {
        checker::check(&fleet.js(), client.session()).await?.clean()?;
    }
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_messages_and_other_rates_lose_nothing() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = fleet().workers(1).start().await?;
    let url = socket_url(&fleet).await?;
    let pcm = audio::bursts(920, 4.0);
    let expected = direct::simulated_text(&pcm)?;
    for sizes in [vec![641], vec![1, 2, 3, 1_999], vec![pcm.bytes().len()]] {
        let mut client = Client::connect(&url).await?;
        client.stream(&pcm.bytes(), &sizes).await?;
        let text = client.end().await.with_context(|| fleet.logs())?;
        ensure!(text == expected, "{sizes:?}:\n  heard    {text}\n  expected {expected}");
        let report = checker::check(&fleet.js(), client.session()).await?.clean()?;
        assert_eq!(report.covered, pcm.samples.len() as u64);
    }
    // The same samples at half their pace are twice as much audio.
    let mut client = Client::connect(&format!("{url}?rate=8000&language=en")).await?;
    client.stream(&pcm.bytes(), &[777]).await?;
    client.end().await?;
    let report = checker::check(&fleet.js(), client.session()).await?.clean()?;
    assert_eq!(report.covered, 2 * pcm.samples.len() as u64);
    // Nothing at all is also a whole session.
    let mut client = Client::connect(&url).await?;
    ensure!(client.end().await?.is_empty(), "{}", client.last);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_without_a_word_frees_his_slot_and_is_still_transcribed() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = fleet().workers(1).slots(1).start().await?;
    let url = socket_url(&fleet).await?;
    let pcm = audio::bursts(930, 5.0);
    let mut client = Client::connect(&url).await?;
    let session = client.session().to_owned();
    client.stream(&pcm.bytes(), &[3_201]).await?;
    // Something was heard of it, so the socket has taken it.
    while client.states == 0 {
        client.read(SOON).await?;
    }
    client.socket.flush().await?;
    drop(client);
    let text = fleet.wait_end(&session, SOON).await.with_context(|| fleet.logs())?;
    let log = checker::log(&fleet.js(), &session).await?;
    let end = log.last().context("a log")?;
    ensure!(end.headers.contains_key("Asr-End") && !end.headers.contains_key("Asr-Cause"), "{end:?}");
    // What was on its way when the connection broke is gone with it; what was logged is in the text.
    let report = checker::check(&fleet.js(), &session).await?.clean()?;
    let heard = Pcm::mono_16k(pcm.samples[..report.covered as usize].to_vec());
    ensure!(text == direct::simulated_text(&heard)?, "{text}");
    let next = eventually("the slot", SOON, || async {
        Client::connect(&url).await.ok().filter(|client| !client.config.is_null())
    });
    next.await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_costs_a_page_no_word() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = mortal().workers(2).start().await?;
    let url = format!("{}?session=killed", socket_url(&fleet).await?);
    let pcm = audio::bursts(940, 16.0);
    let bytes = pcm.bytes();
    // Who comes while heartbeats are late is sent away, and comes again.
    let mut client = eventually("a slot", SOON, || async {
        Client::connect(&url).await.ok().filter(|client| !client.config.is_null())
    })
    .await
    .with_context(|| fleet.logs())?;
    let first = client.gpu().to_owned();
    let half = bytes.len() / 2 + 1;
    client.stream(&bytes[..half], &[6_401]).await?;
    while client.text().is_empty() {
        client.read(SOON).await?;
    }
    let worker = fleet.workers.iter().position(|worker| worker.gpu_id() == first).context("its worker")?;
    fleet.workers[worker].kill9()?;
    client.stream(&bytes[half..], &[6_401]).await?;
    let text = client.end().await.with_context(|| fleet.logs())?;
    ensure!(text == direct::simulated_text(&pcm)?, "{text}");
    ensure!(client.last["gpu_id"] != first.as_str(), "{}", client.last);
    checker::check(&fleet.js(), "killed").await?.clean()?;
    Ok(())
}

/// What a recorder makes is decoded in a process of its own, as it comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_browsers_recording_is_decoded() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = fleet().workers(1).start().await?;
    let url = socket_url(&fleet).await?;
    for name in ["call-01.webm", "call-01.opus"] {
        let path = find::root().join("audio/tests/fixtures").join(name);
        let expected = simulated_text_of(&path)?;
        ensure!(!expected.is_empty());
        let bytes = std::fs::read(&path)?;
        for sizes in [vec![97], vec![bytes.len()]] {
            let mut client = Client::connect(&format!("{url}?format=webm")).await?;
            ensure!(client.config["useAudioWorklet"] == false, "{}", client.config);
            client.stream(&bytes, &sizes).await?;
            let text = client.end().await.with_context(|| fleet.logs())?;
            ensure!(text == expected, "{name} {sizes:?}:\n  heard    {text}\n  expected {expected}");
        }
        // Also where nobody said that it comes.
        let mut client = Client::connect(&url).await?;
        client.stream(&bytes, &[1_000]).await?;
        ensure!(client.end().await? == expected);
    }
    Ok(())
}

/// What the simulated engine makes of a recording, read as a file and given to it as a socket gives it.
fn simulated_text_of(path: &Path) -> Result<String> {
    let mut decoder = Decoder::open(std::fs::File::open(path)?, None, &Limits::default())?;
    let (mut log, mut format) = (Vec::new(), decoder.format());
    while let Some(chunk) = decoder.next()? {
        format = chunk.format.unwrap_or(format);
        let pcm = match format.encoding {
            Encoding::PcmS16Le => chunk.pcm.to_vec(),
            Encoding::PcmF32Le => {
                let wide = chunk.pcm.chunks_exact(4).map(|s| f32::from_le_bytes([s[0], s[1], s[2], s[3]]));
                wide.flat_map(|sample| ((sample * 32_768.0).round() as i16).to_le_bytes()).collect()
            }
        };
        let headers =
            vec![("Asr-Format".to_owned(), format!("pcm_s16le;rate={};channels={}", format.rate_hz, format.channels))];
        log.push(RawEntry { seq: log.len() as u64 + 1, headers, payload: pcm.into() });
    }
    log.push(RawEntry {
        seq: log.len() as u64 + 1,
        headers: vec![("Asr-End".to_owned(), "1".to_owned())],
        payload: Bytes::new(),
    });
    let vad = direct::energy_vad();
    Ok(direct::text(&direct::transcribe(&mut *direct::simulated()?, &*vad, &SessionOptions::default(), &log)?))
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_told_what_is_wrong_and_cost_nobody_anything() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = fleet().workers(1).slots(1).start().await?;
    let url = socket_url(&fleet).await?;
    // What cannot be meant is told before anything is opened.
    for (query, part) in [
        ("colour=red", "unknown option"),
        ("rate=0", "rate 0 Hz"),
        ("session=..%2F..", "session"),
        ("format=mp3", "unsupported encoding"),
        ("diarize=true&channels=split", "contradicts"),
        ("session=a&session=b", "twice"),
    ] {
        match connect_async(format!("{url}?{query}")).await {
            Err(tungstenite::Error::Http(answer)) => {
                let body = answer.body().as_ref().map(|body| String::from_utf8_lossy(body).into_owned());
                ensure!(answer.status() == 400 && body.as_ref().is_some_and(|b| b.contains(part)), "{query}: {body:?}");
            }
            other => bail!("{query}: {:?}", other.map(|_| "connected")),
        }
    }
    // Then what comes is judged. Each of them has had the only slot, and gives it back.
    let mut noise = vec![0x1a, 0x45, 0xdf, 0xa3];
    noise.extend((0..40_000u32).map(|n| (n * 7_919 % 251) as u8));
    let cases: [(&str, Message, u16, &str); 4] = [
        ("text", Message::text("{\"type\":\"start\"}"), 1003, "binary"),
        ("too long", Message::binary(vec![0; (1 << 20) + 2]), 1009, "limit"),
        ("garbage of a recorder", Message::binary(noise), 1003, "pcm_s16le"),
        (
            "a picture",
            Message::binary(b"RIFF\x24\0\0\0WAVEfmt garbage that is no sound at all".to_vec()),
            1003,
            "pcm_s16le",
        ),
    ];
    for (what, message, code, part) in cases {
        let mut client = eventually("the slot", SOON, || async {
            Client::connect(&url).await.ok().filter(|client| !client.config.is_null())
        })
        .await
        .with_context(|| format!("{what}\n{}", fleet.logs()))?;
        client.socket.send(message).await?;
        if code == 1003 && part == "pcm_s16le" {
            client.send(&[]).await?;
        }
        let closed = client.closed().await.with_context(|| format!("{what}\n{}", fleet.logs()))?;
        let told = client.error.as_ref().map(ToString::to_string).unwrap_or_default();
        ensure!(closed.0 == code && told.contains(part), "{what}: {closed:?} {told}");
    }
    // A session that is not spoken in ends by itself.
    let mut quiet = eventually("the slot", SOON, || async {
        Client::connect(&format!("{url}?idle_timeout_s=1")).await.ok().filter(|client| !client.config.is_null())
    })
    .await?;
    let closed = quiet.closed().await?;
    ensure!(closed.0 == 1000 && closed.1.contains("no audio") && quiet.ready, "{closed:?}");
    // And somebody decent is served as ever.
    let pcm = audio::bursts(950, 3.0);
    let mut client = eventually("the slot", SOON, || async {
        Client::connect(&url).await.ok().filter(|client| !client.config.is_null())
    })
    .await?;
    client.stream(&pcm.bytes(), &[3_200]).await?;
    ensure!(client.end().await? == direct::simulated_text(&pcm)?);
    fleet.check_alive()?;
    Ok(())
}

/// A dispatcher that stops says so, and what it took is transcribed by whoever goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_says_so_and_another_goes_on() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = fleet().workers(1).dispatchers(2).start().await?;
    let pcm = audio::bursts(960, 6.0);
    let bytes = pcm.bytes();
    let half = bytes.len() / 2;
    let leader = eventually("a leader", SOON, || async { fleet.leader().await }).await?;
    let url = |n: usize| {
        let dispatcher = &fleet.dispatchers[n];
        async move { Ok::<_, anyhow::Error>(format!("{}/asr", dispatcher.http_url().await?.replacen("http", "ws", 1))) }
    };
    let (first, second) = (url(leader).await?, url(1 - leader).await?);
    let mut client = Client::connect(&format!("{first}?session=goes-on")).await?;
    client.stream(&bytes[..half], &[6_400]).await?;
    let logged = eventually("half of it logged", SOON, || async {
        let log = checker::log(&fleet.js(), "goes-on").await.ok()?;
        (log.iter().map(|entry| entry.bytes).sum::<usize>() == half).then_some(())
    });
    logged.await?;
    let status = fleet.dispatchers[leader].terminate(SOON).await?;
    ensure!(status.success(), "{status}");
    let closed = client.closed().await?;
    ensure!(closed.0 == 1012, "{closed:?}");
    let mut client = eventually("the other server", SOON, || async {
        Client::connect(&format!("{second}?session=goes-on")).await.ok().filter(|client| !client.config.is_null())
    })
    .await
    .with_context(|| fleet.logs())?;
    client.stream(&bytes[half..], &[6_400]).await?;
    let text = client.end().await.with_context(|| fleet.logs())?;
    let expect = checker::Expect { reopened: true, ..checker::Expect::default() };
    let report = checker::check_with(&fleet.js(), "goes-on", &expect).await?.clean()?;
    assert_eq!(report.covered, pcm.samples.len() as u64);
    ensure!(text == report.text(), "the page that came back has all of it: {text}");
    Ok(())
}

/// A dispatcher that stops while it waits for an answer leaves no session behind that nobody speaks in.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_may_have_been_opened_gets_its_end() -> Result<()> {
    let _turn = fleet::turn().await;
    // The worker does not answer an assignment, so the open is under way for as long as that is waited for.
    let mut fleet = fleet()
        .workers(1)
        .set("dispatcher.control_timeout_ms", 60_000)
        .set("dispatcher.suspect_after_ms", 50_000)
        .set("dispatcher.dead_after_ms", 60_000)
        .start()
        .await?;
    let url = socket_url(&fleet).await?;
    // Somebody was served: everything is there.
    Client::connect(&url).await?.end().await?;
    fleet.workers[0].stop()?;
    let (mut socket, _) = connect_async(format!("{url}?session=opening")).await?;
    let said = timeout(Duration::from_secs(1), socket.next()).await;
    ensure!(said.is_err(), "it is still being opened: {said:?}");
    let status = fleet.dispatchers[0].terminate(SOON).await?;
    ensure!(status.success(), "{status}");
    let log = checker::log(&fleet.js(), "opening").await?;
    let end = log.last().with_context(|| format!("no end\n{}", fleet.logs()))?;
    ensure!(end.headers.contains_key("Asr-End"), "{end:?}");
    fleet.workers[0].cont()?;
    Ok(())
}

/// The example of docs/asr-websocket.md, as its reader runs it.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_client_is_served() -> Result<()> {
    const SOCKETS: &str = "--experimental-websocket";
    let probe =
        Command::new("node").args([SOCKETS, "-e", "process.exit(typeof WebSocket === 'function' ? 0 : 1)"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        println!("skipped: no Node.js with WebSocket here (20.10 or newer)");
        return Ok(());
    }
    let _turn = fleet::turn().await;
    let fleet = fleet().workers(1).start().await?;
    let dir = tempfile::tempdir()?;
    let pcm = audio::bursts(970, 4.0);
    std::fs::write(dir.path().join("call.raw"), pcm.bytes())?;
    let script = find::root().join("examples/asr-socket.mjs");
    let url = socket_url(&fleet).await?;
    let mut command = Command::new("node");
    command.args([SOCKETS, "--no-warnings"]).arg(script).arg(url).arg("call.raw").current_dir(dir.path());
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{out}{err}\n{}", fleet.logs());
    let said: Vec<&str> = out.lines().filter_map(|line| line.split_once("] ").map(|(_, text)| text)).collect();
    ensure!(said.join(" ") == direct::simulated_text(&pcm)?, "{out}");
    Ok(())
}

/// Two connections under one id: the newer one speaks, and the other learns it at its next word.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_replaced_in_a_session_is_told() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = fleet().workers(1).slots(2).start().await?;
    let url = format!("{}?session=shared", socket_url(&fleet).await?);
    let said = audio::blasts(5, 6.0).bytes();
    let second = 32_000;
    let mut first = Client::connect(&url).await?;
    first.stream(&said[..2 * second], &[3_200]).await?;
    eventually("the first one's audio is logged", SOON, || async {
        let log = checker::read(&fleet.js(), "ASR_AUDIO", "asr.v1.audio.shared").await.ok()?;
        (log.iter().map(|m| m.payload.len()).sum::<usize>() == 2 * second).then_some(())
    })
    .await?;
    let mut other = Client::connect(&url).await?;
    other.stream(&said[2 * second..4 * second], &[3_200]).await?;
    eventually("the other one's audio is logged", SOON, || async {
        let log = checker::read(&fleet.js(), "ASR_AUDIO", "asr.v1.audio.shared").await.ok()?;
        (log.iter().map(|m| m.payload.len()).sum::<usize>() == 4 * second).then_some(())
    })
    .await?;
    first.send(&said[..3_200]).await?;
    let (code, reason) = first.closed().await?;
    ensure!(code == 1008 && reason.contains("somebody else speaks"), "{code} {reason}");
    ensure!(first.error.as_ref().is_some_and(|error| error["class"] == "stale_source"), "{:?}", first.error);
    // It has put neither audio nor an end behind the other's.
    other.stream(&said[4 * second..], &[3_200]).await?;
    other.end().await.with_context(|| fleet.logs())?;
    let log = checker::read(&fleet.js(), "ASR_AUDIO", "asr.v1.audio.shared").await?;
    let logged: Vec<u8> = log.iter().flat_map(|m| m.payload.to_vec()).collect();
    ensure!(logged == said, "{} of {} bytes", logged.len(), said.len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_close_is_answered() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = fleet().workers(1).slots(1).start().await?;
    let mut client = Client::connect(&socket_url(&fleet).await?).await?;
    client.send(&audio::bursts(3, 1.0).bytes()).await?;
    client.socket.close(None).await?;
    let answered = timeout(SOON, async {
        while let Some(message) = client.socket.next().await {
            match message {
                Ok(Message::Close(_)) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
        false
    });
    ensure!(answered.await?, "the socket was cut");
    Ok(())
}
