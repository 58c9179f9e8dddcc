//! Every bad input on the wire gets its typed error, stays inspectable, and costs nobody else anything: a healthy session
//! runs beside all of it and ends with the right text without delay.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream;
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker,
    fleet::{self, Engine, Fleet},
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_schema::session::SessionOptions;

use crate::direct;

const SOON: Duration = Duration::from_secs(20);
/// Whoever is held up by somebody else's mistake waits for a retry or a verdict, not for a busy machine.
const BLOCKED: Duration = Duration::from_secs(8);
/// 16 kHz, one channel, 16 bits.
const PLAIN: (&str, &str) = ("Asr-Format", "pcm_s16le;rate=16000;channels=1");

type Chunk = (&'static [(&'static str, &'static str)], Vec<u8>);

/// One bad chunk, and the class its sender is told.
struct Case {
    name: &'static str,
    chunk: Chunk,
    class: &'static str,
}

fn case(
    name: &'static str,
    headers: &'static [(&'static str, &'static str)],
    payload: &[u8],
    class: &'static str,
) -> Case {
    Case { name, chunk: (headers, payload.to_vec()), class }
}

fn bad_chunks() -> Vec<Case> {
    let ogg = [&b"OggS\0\x02"[..], &[0x5a; 500]].concat();
    // Two MPEG-1 layer III frames of 128 kbit/s at 44.1 kHz: 417 bytes each.
    let frame = [&[0xff, 0xfb, 0x90, 0x00][..], &[0; 413]].concat();
    let mp3 = [frame.clone(), frame].concat();
    let numbers = |value: f32| [0.0f32, value].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    const FLOATS: &[(&str, &str)] = &[("Asr-Format", "pcm_f32le")];
    let two = &[0u8; 2];
    vec![
        case("empty", &[], b"", "bad_request"),
        case("odd", &[], b"abc", "bad_audio"),
        case("rate-0", &[("Asr-Format", "pcm_s16le;rate=0")], two, "bad_audio"),
        case("rate-1", &[("Asr-Format", "pcm_s16le;rate=1")], two, "bad_audio"),
        case("rate-10M", &[("Asr-Format", "pcm_s16le;rate=10000000")], two, "bad_audio"),
        case("channels-0", &[("Asr-Format", "pcm_s16le;channels=0")], two, "bad_audio"),
        case("channels-65", &[("Asr-Format", "pcm_s16le;channels=65")], two, "bad_audio"),
        case("channels-wrong", &[("Asr-Format", "pcm_s16le;channels=3")], &[0; 640], "bad_audio"),
        case("nan", FLOATS, &numbers(f32::NAN), "bad_audio"),
        case("inf", FLOATS, &numbers(f32::INFINITY), "bad_audio"),
        case("ogg", &[], &ogg, "unsupported_format"),
        case("mp3", &[], &mp3, "unsupported_format"),
        case("opus", &[("Asr-Format", "opus")], two, "unsupported_format"),
        case("format-syntax", &[("Asr-Format", "pcm_s16le;rate=fast")], two, "bad_audio"),
        case("seq-syntax", &[("Asr-Seq", "-1")], two, "bad_request"),
        case("source-syntax", &[("Asr-Source", "a b")], two, "bad_request"),
        case("end-syntax", &[("Asr-End", "yes")], two, "bad_request"),
        case("flush-syntax", &[("Asr-Flush", "2")], two, "bad_request"),
        case("option-unknown", &[("Asr-Opt-Colour", "red")], two, "bad_request"),
        case("option-value", &[("Asr-Opt-Policy", "whatever")], two, "bad_request"),
        case("options-contradict", &[("Asr-Opt-Min-Speakers", "2")], two, "bad_request"),
    ]
}

/// A session that nothing is wrong with, in real time: how late its end final came.
pub(crate) async fn healthy(js: jetstream::Context, session: &str, seconds: f64) -> Result<Duration> {
    let pcm = audio::bursts(900, seconds);
    let text = direct::simulated_text(&pcm)?;
    spoken(js, session, &pcm, &text).await
}

/// The same with this audio, which must give this text.
async fn spoken(js: jetstream::Context, session: &str, pcm: &Pcm, expected: &str) -> Result<Duration> {
    let mut producer = Producer::named(js.clone(), session, "s1");
    producer.stream(pcm, 200, Pace::Speed(1.0)).await?;
    producer.end().await?;
    let ended = Instant::now();
    let text = fleet::wait_end(&js, session, SOON).await?;
    let late = ended.elapsed();
    checker::check(&js, session).await?.clean()?;
    ensure!(text == expected, "{session}: a healthy session's text is wrong:\n  {text}\nnot\n  {expected}");
    Ok(late)
}

/// Waits for an event of this kind, and of this class if one is given.
async fn told(js: &jetstream::Context, session: &str, what: &str, class: Option<&str>) -> Result<Value> {
    let found = eventually(format!("event {what} {class:?} of {session}"), SOON, || async {
        let events = checker::events(js, session).await.ok()?;
        let fits = |(w, e): &(String, Value)| w == what && class.is_none_or(|c| e["error"]["class"] == c);
        events.into_iter().find(fits).map(|(_, event)| event)
    })
    .await;
    match found {
        Ok(event) => Ok(event),
        Err(e) => bail!("{e}; there are {:?}", checker::events(js, session).await?),
    }
}

/// Good audio, the bad chunk, good audio, end: the bad one is told and left out, the rest is transcribed.
async fn between_good_audio(js: jetstream::Context, bad: Case) -> Result<()> {
    let session = format!("mid-{}", bad.name);
    let (before, after) = (audio::bursts(1, 2.0), audio::bursts(2, 2.0));
    let mut producer = Producer::bare(js.clone(), &session);
    producer.stream(&before, 200, Pace::AsFastAsPossible).await?;
    let seq = producer.send(bad.chunk.1.clone(), bad.chunk.0).await?;
    producer.stream_with(&after, 200, Pace::AsFastAsPossible, &[PLAIN]).await?;
    producer.end().await?;
    let text = fleet::wait_end(&js, &session, SOON).await?;
    let event = told(&js, &session, "rejected", Some(bad.class)).await?;
    ensure!(event["seq"] == seq, "{session}: event about {}, the chunk is {seq}", event["seq"]);
    ensure!(event["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{session}: no message");
    let both = Pcm::mono_16k([before.samples, after.samples].concat());
    let expect = checker::Expect { samples: Some(both.samples.len() as u64), ..checker::Expect::default() };
    checker::check_with(&js, &session, &expect).await?.clean()?;
    ensure!(text == direct::simulated_text(&both)?, "{session}: {text}");
    Ok(())
}

/// The bad chunk comes first: told.
async fn as_the_first_chunk(js: jetstream::Context, bad: Case) -> Result<()> {
    let session = format!("first-{}", bad.name);
    let mut producer = Producer::bare(js.clone(), &session);
    producer.send(bad.chunk.1.clone(), bad.chunk.0).await?;
    told(&js, &session, "rejected", Some(bad.class)).await?;
    Ok(())
}

/// Nothing is opened by bad first chunks. The log is read in order: once a good session that came behind them has ended,
/// whatever they could have caused has been caused.
async fn opened_nothing(js: jetstream::Context) -> Result<()> {
    spoken_fast(js.clone(), "behind-the-first").await?;
    for bad in bad_chunks() {
        let session = format!("first-{}", bad.name);
        ensure!(checker::finals(&js, &session).await?.is_empty(), "{session}: a final");
        let events = checker::events(&js, &session).await?;
        ensure!(events.iter().all(|(what, _)| what == "rejected"), "{session}: {events:?}");
    }
    Ok(())
}

/// A good session as fast as it is taken.
async fn spoken_fast(js: jetstream::Context, session: &str) -> Result<()> {
    let pcm = audio::bursts(901, 2.0);
    let mut producer = Producer::bare(js.clone(), session);
    producer.stream(&pcm, 200, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    let text = fleet::wait_end(&js, session, SOON).await?;
    ensure!(text == direct::simulated_text(&pcm)?, "{session}: {text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_chunks_are_told_and_left_out() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(2).slots(64).start().await?;
    let js = fleet.js();
    let work = async {
        try_join_all(bad_chunks().into_iter().map(|c| as_the_first_chunk(js.clone(), c))).await?;
        opened_nothing(js.clone()).await?;
        try_join_all(bad_chunks().into_iter().map(|c| between_good_audio(js.clone(), c))).await?;
        Ok::<_, anyhow::Error>(())
    };
    let (late, outcome) = tokio::join!(healthy(js.clone(), "healthy", 12.0), work);
    outcome.with_context(|| fleet.logs())?;
    let late = late.with_context(|| fleet.logs())?;
    ensure!(late < BLOCKED, "the healthy session's end came {late:?} late");
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_audio_is_only_audio() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let js = fleet.js();
    let square = (0..48_000).map(|n| if n / 40 % 2 == 0 { i16::MAX } else { i16::MIN }).collect();
    let mut dice = 1u32;
    let random = (0..48_000)
        .map(|_| {
            dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (dice >> 16) as i16
        })
        .collect();
    let sounds = [
        ("clipped", Pcm::mono_16k(square), None),
        ("dc", Pcm::mono_16k(vec![20_000; 48_000]), None),
        ("random", Pcm::mono_16k(random), None),
        // Said to be 8 kHz stereo, is 16 kHz mono: nobody can know; it takes the time its words say.
        ("wrong-rate", audio::bursts(3, 3.0), Some("pcm_s16le;rate=8000;channels=2")),
        ("wrong-rate-high", audio::bursts(4, 3.0), Some("pcm_s16le;rate=192000")),
    ];
    for (name, pcm, format) in &sounds {
        let mut producer = Producer::bare(js.clone(), name);
        let headers: Vec<(&str, &str)> = format.iter().map(|f| ("Asr-Format", *f)).collect();
        producer.stream_with(pcm, 200, Pace::AsFastAsPossible, &headers).await?;
        producer.end().await?;
    }
    for (name, _, _) in &sounds {
        fleet.wait_end(name, SOON).await?;
        let report = checker::check(&js, name).await?.clean()?;
        ensure!(report.finals.iter().all(|f| f.json["error"].is_null()), "{name}");
        let events = checker::events(&js, name).await?;
        ensure!(events.iter().all(|(what, _)| what != "rejected"), "{name}: {events:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_chunk_passes_and_a_larger_one_is_refused_to_its_sender() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let js = fleet.js();
    let limit = js.get_stream("ASR_AUDIO").await?.cached_info().config.max_message_size;
    let limit = usize::try_from(limit).context("ASR_AUDIO has a largest message")?;
    let max_payload = fleet.client().server_info().max_payload;
    ensure!(limit + 16 * 1024 <= max_payload, "a logged chunk of {limit} bytes could not be passed on");

    let pcm = Pcm::mono_16k(audio::bursts(5, 140.0).samples[..limit / 2].to_vec());
    let mut producer = Producer::bare(js.clone(), "largest");
    producer.send(pcm.bytes(), &[]).await?;
    producer.end().await?;
    let text = fleet.wait_end("largest", Duration::from_secs(60)).await?;
    checker::check(&js, "largest").await?.clean()?;
    ensure!(text == direct::simulated_text(&pcm)?, "the largest chunk's text is wrong");

    for bytes in [limit + 1, 64 << 20] {
        let refused = Producer::bare(js.clone(), "too-large").send(vec![0; bytes], &[]).await;
        let Err(error) = refused else { bail!("{bytes} bytes were taken") };
        let why = error.to_string().to_lowercase();
        ensure!(["size", "payload", "exceed", "large"].iter().any(|w| why.contains(w)), "{bytes} bytes: {why}");
    }
    ensure!(checker::log(&js, "too-large").await?.is_empty(), "something of it was stored");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_and_sources_are_judged_and_told() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let js = fleet.js();
    let pcm = audio::bursts(6, 2.0);
    let piece = |n: usize| Pcm::mono_16k(pcm.samples[n * 3_200..(n + 1) * 3_200].to_vec()).bytes();
    let send = |session: &'static str, source: &'static str, number: &'static str, payload: Vec<u8>| {
        let mut producer = Producer::bare(js.clone(), session);
        async move { producer.send(payload, &[("Asr-Source", source), ("Asr-Seq", number)]).await }
    };
    let covers = |chunks: u64| checker::Expect { samples: Some(chunks * 3_200), ..checker::Expect::default() };

    // 0 1 1 4 3: a number taken twice, two skipped, one of them late.
    for number in ["0", "1", "1", "4", "3"] {
        send("numbers", "a", number, piece(0)).await?;
    }
    Producer::bare(js.clone(), "numbers").end().await?;
    fleet.wait_end("numbers", SOON).await?;
    for what in ["duplicate", "gap", "reordered"] {
        told(&js, "numbers", what, None).await?;
    }
    checker::check_with(&js, "numbers", &covers(4)).await?.clean()?;

    // A newer source replaces the older one.
    for (source, number) in [("a", "0"), ("b", "0"), ("a", "1"), ("b", "1")] {
        send("sources", source, number, piece(1)).await?;
    }
    Producer::bare(js.clone(), "sources").end().await?;
    fleet.wait_end("sources", SOON).await?;
    told(&js, "sources", "stale_source", Some("stale_source")).await?;
    checker::check_with(&js, "sources", &covers(3)).await?.clean()?;

    // A named source that has ended itself does not speak again; another one does.
    send("after-end", "a", "0", piece(2)).await?;
    let mut a = Producer::bare(js.clone(), "after-end");
    a.send(Vec::new(), &[("Asr-Source", "a"), ("Asr-Seq", "1"), ("Asr-End", "1")]).await?;
    fleet.wait_end("after-end", SOON).await?;
    send("after-end", "a", "2", piece(3)).await?;
    told(&js, "after-end", "audio_after_end", Some("audio_after_end")).await?;
    checker::check_with(&js, "after-end", &covers(1)).await?.clean()?;
    send("after-end", "b", "0", piece(4)).await?;
    Producer::bare(js.clone(), "after-end").end().await?;
    let expect = checker::Expect { reopened: true, ..covers(2) };
    eventually("the second end", SOON, || async {
        let report = checker::check_with(&js, "after-end", &expect).await.ok()?;
        report.problems.is_empty().then_some(())
    })
    .await?;

    // An end without audio opens nothing.
    Producer::bare(js.clone(), "only-end").end().await?;
    told(&js, "only-end", "rejected", Some("bad_request")).await?;
    ensure!(checker::finals(&js, "only-end").await?.is_empty(), "a final of nothing");
    Ok(())
}

async fn ask(client: &async_nats::Client, endpoint: &str, body: &[u8], content_type: &str) -> Result<Value> {
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Content-Type", content_type);
    let subject = format!("asr.v1.api.{endpoint}");
    // As every client does: a dispatcher that has just stopped or started swallows nothing.
    for _ in 0..5 {
        let asked = client.request_with_headers(subject.clone(), headers.clone(), body.to_vec().into());
        if let Ok(Ok(reply)) = tokio::time::timeout(Duration::from_secs(1), asked).await {
            return Ok(serde_json::from_slice(&reply.payload)?);
        }
    }
    bail!("{endpoint} does not answer to {:?}", String::from_utf8_lossy(&body[..body.len().min(200)]))
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_answered_with_their_class() -> Result<()> {
    const JSON: &str = "application/json";
    const MSGPACK: &str = "application/msgpack";
    let _turn = fleet::turn().await;
    // Nobody dies here: a heartbeat that is a little late refuses no open.
    let fleet = Fleet::builder().workers(1).set("dispatcher.suspect_after_ms", 10_000);
    let mut fleet = fleet.set("dispatcher.dead_after_ms", 20_000).start().await?;
    let client = fleet.client();
    let deep = [b"{\"session\":\"a\",\"options\":".to_vec(), b"[".repeat(20_000)].concat();
    let long = format!(r#"{{"session":"{}"}}"#, "x".repeat(10_000));
    let huge = format!(r#"{{"session":"a","options":{{"prompt":"{}"}}}}"#, "x".repeat(200_000));
    let bodies: Vec<(&str, Vec<u8>, &str)> = vec![
        ("nothing", vec![], JSON),
        ("half", b"{\"session\":".to_vec(), JSON),
        ("not json", b"session=a".to_vec(), JSON),
        ("wrong type", br#"{"session":7}"#.to_vec(), JSON),
        ("a list", b"[1,2]".to_vec(), JSON),
        ("no id", br#"{"options":{}}"#.to_vec(), JSON),
        ("dots", br#"{"session":".."}"#.to_vec(), JSON),
        ("star", br#"{"session":"*"}"#.to_vec(), JSON),
        ("arrow", br#"{"session":">"}"#.to_vec(), JSON),
        ("space", br#"{"session":"a b"}"#.to_vec(), JSON),
        ("unicode", "{\"session\":\"h\u{e9}\"}".as_bytes().to_vec(), JSON),
        ("10 kB id", long.into_bytes(), JSON),
        ("huge", huge.into_bytes(), JSON),
        ("deep", deep, JSON),
        ("deep msgpack", [&[0x81, 0xa7][..], b"options", &[0x91; 5_000]].concat(), MSGPACK),
        ("cut msgpack", vec![0x82, 0xa7, b's', b'e'], MSGPACK),
        ("never used byte", vec![0xc1; 16], MSGPACK),
        ("unknown type", b"a: 1".to_vec(), "text/yaml"),
        ("unknown option", br#"{"session":"a","options":{"colour":"red"}}"#.to_vec(), JSON),
        ("unknown value", br#"{"session":"a","options":{"policy":"never"}}"#.to_vec(), JSON),
        ("contradiction", br#"{"session":"a","options":{"min_speakers":2}}"#.to_vec(), JSON),
        ("out of range", br#"{"session":"a","options":{"endpoint_ms":1}}"#.to_vec(), JSON),
    ];
    for endpoint in ["session.open", "session.status", "session.close"] {
        for (name, body, content_type) in &bodies {
            if endpoint != "session.open" && body.windows(7).any(|w| w == b"options") && *name != "no id" {
                continue;
            }
            let answer = ask(&client, endpoint, body, content_type).await.with_context(|| fleet.logs())?;
            let class = answer["error"]["class"].as_str().unwrap_or_default();
            ensure!(matches!(class, "bad_request" | "too_large"), "{endpoint} {name}: {answer}");
            ensure!(
                answer["error"]["message"].as_str().is_some_and(|m| m.len() < 1_000),
                "{endpoint} {name}: {answer}"
            );
        }
    }
    for endpoint in ["session.status", "session.close"] {
        let answer = ask(&client, endpoint, br#"{"session":"nobody"}"#, JSON).await?;
        ensure!(answer["error"]["class"] == "not_found", "{endpoint}: {answer}");
    }
    let answer = ask(&client, "session.open", br#"{"session":"m","options":{"model":"no-such-model"}}"#, JSON).await?;
    let class = answer["error"]["class"].as_str().unwrap_or_default();
    ensure!(matches!(class, "model_missing" | "model_does_not_fit"), "{answer}");

    // Opening twice is opening once.
    let open = json!({"session": "twice", "options": {"endpoint_ms": 300}}).to_string();
    let first = ask(&client, "session.open", open.as_bytes(), JSON).await?;
    let second = ask(&client, "session.open", open.as_bytes(), JSON).await?;
    ensure!(first["ok"]["session"] == "twice" && first == second, "{first}\n{second}");
    // With other options it is refused, and stays open as it was.
    let other = json!({"session": "twice", "options": {"endpoint_ms": 400}}).to_string();
    let refused = ask(&client, "session.open", other.as_bytes(), JSON).await?;
    ensure!(refused["error"]["class"] == "bad_request", "{refused}");
    ensure!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("other options")), "{refused}");
    let status = ask(&client, "session.status", br#"{"session":"twice"}"#, JSON).await?;
    ensure!(status["ok"]["record"]["options"]["endpoint_ms"] == 300, "{status}");
    ensure!(status["ok"]["record"]["state"] == "assigned", "{status}");
    fleet.check_alive()?;
    Ok(())
}

/// A model's languages are known where the model is loaded: its session is taken, and every final says why it has no text.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_model_lacks_is_said_by_the_finals() -> Result<()> {
    let _turn = fleet::turn().await;
    // Nobody dies here: a heartbeat that is a little late refuses no open.
    let fleet = Fleet::builder().workers(1).slots(8).engine(Engine::Micro);
    let fleet = fleet.set("dispatcher.suspect_after_ms", 10_000).set("dispatcher.dead_after_ms", 20_000);
    let mut fleet = fleet.start().await?;
    let (js, client) = (fleet.js(), fleet.client());
    let call = audio::call(1)?;
    let seconds = |n: usize| {
        let samples = n * call.rate_hz as usize * call.channels;
        Pcm { samples: call.samples[..samples].to_vec(), ..call.clone() }
    };
    let (long, short) = (seconds(20), seconds(4));
    let texts = {
        let (long, short) = (direct::log(&long, 200), direct::log(&short, 200));
        let (mut micro, vad) = (direct::micro()?, direct::best_vad());
        let mut text = |log: &[_]| -> Result<String> {
            let finals = direct::transcribe(&mut *micro, &*vad, &SessionOptions::default(), log)?;
            Ok(direct::text(&finals))
        };
        (text(&long)?, text(&short)?)
    };
    let mut first_engine = None;
    let lacking = async {
        for (option, value) in [("language", "de"), ("task", "translate")] {
            for by_request in [false, true] {
                let session = format!("{option}-{}", if by_request { "opened" } else { "published" });
                let header = format!("Asr-Opt-{option}");
                let mut first = vec![(header.as_str(), value)];
                if by_request {
                    let open = json!({"session": session, "options": {option: value}}).to_string();
                    let answer = ask(&client, "session.open", open.as_bytes(), "application/json").await?;
                    ensure!(answer["ok"]["session"] == session, "{answer}");
                    first.clear();
                }
                let mut producer = Producer::bare(js.clone(), &session);
                producer.stream_with(&short, 200, Pace::AsFastAsPossible, &first).await?;
                producer.end().await?;
                let text = fleet::wait_end(&js, &session, SOON).await?;
                let report = checker::check(&js, &session).await?.clean()?;
                ensure!(text.is_empty(), "{session}: {text}");
                let says = |f: &checker::StoredFinal| f.json["error"]["class"] == "bad_request";
                ensure!(report.finals.iter().all(says), "{session}: {:?}", report.finals);
                // Whoever comes next is served as if nothing had been.
                let next = format!("after-{session}");
                spoken(js.clone(), &next, &short, &texts.1).await?;
                // Not by an engine that had to be started again. How fast this machine decodes is another question.
                let engine = fleet.workers[0].engine_pid();
                ensure!(engine.is_some() && *first_engine.get_or_insert(engine) == engine, "{session}: {engine:?}");
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    let (late, outcome) = tokio::join!(spoken(js.clone(), "healthy", &long, &texts.0), lacking);
    outcome.with_context(|| fleet.logs())?;
    late.with_context(|| fleet.logs())?;
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_names_reach_nobody() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = Fleet::builder().workers(1).start().await?;
    let js = fleet.js();
    let pcm = audio::bursts(8, 1.0);
    let mut stored = 0;
    for name in ["..", "*", ">", "a b", "h\u{e9}llo", "a.b", "a\tb"] {
        // A client of its own: the server may well hang up on such a sender.
        let own = jetstream::new(async_nats::connect(fleet.url()).await?);
        let sent = tokio::time::timeout(Duration::from_secs(2), Producer::bare(own, name).send(pcm.bytes(), &[])).await;
        stored += usize::from(matches!(sent, Ok(Ok(_))));
    }
    let long = "x".repeat(10_000);
    let own = jetstream::new(async_nats::connect(fleet.url()).await?);
    let sent = tokio::time::timeout(Duration::from_secs(2), Producer::bare(own, &long).send(pcm.bytes(), &[])).await;
    ensure!(!matches!(sent, Ok(Ok(_))), "a name of 10 kB was taken");
    ensure!(stored >= 1, "the server takes any token that is one; this test no longer tests what it says");
    told(&js, "_invalid", "rejected", Some("bad_request")).await?;
    let late = healthy(js.clone(), "healthy", 2.0).await.with_context(|| fleet.logs())?;
    ensure!(late < BLOCKED, "{late:?} late");
    let chains = checker::read(&js, "ASR_TRANSCRIPT", "asr.v1.transcript.>").await?;
    ensure!(chains.iter().all(|m| m.subject.contains(".healthy.")), "a hostile name has a chain");
    fleet.check_alive()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_nobody_has_is_told_and_blocks_nobody() -> Result<()> {
    let _turn = fleet::turn().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    let js = fleet.js();
    let mut producer = Producer::bare(js.clone(), "no-model");
    producer.send(audio::bursts(9, 1.0).bytes(), &[("Asr-Opt-Model", "no-such-model")]).await?;
    let events = eventually("word about the missing model", SOON, || async {
        let events = checker::events(&js, "no-model").await.ok()?;
        let about = |e: &Value| matches!(e["error"]["class"].as_str(), Some("model_missing" | "model_does_not_fit"));
        events.iter().any(|(_, e)| about(e)).then_some(events)
    })
    .await;
    if let Err(e) = events {
        bail!("{e}; there are {:?}", checker::events(&js, "no-model").await?);
    }
    let late = healthy(js, "healthy", 2.0).await?;
    ensure!(late < BLOCKED, "{late:?} late");
    Ok(())
}
