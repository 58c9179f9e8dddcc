//! A producer in Rust, with nothing of voxfleet's code: streams raw PCM or a 16-bit WAV file as a microphone would.
//!
//! ```text
//! cargo run -p voxfleet-nats --example producer -- call.wav nats://127.0.0.1:4222 my-session
//! ```
//!
//! Two rules make a producer safe: wait for JetStream's acknowledgement before the next chunk, and send what was not
//! acknowledged again under the same message id. Then nothing acknowledged is lost, and nothing is stored twice.

use std::{error::Error, time::Duration};

use async_nats::{HeaderMap, jetstream};
use bytes::Bytes;
use tokio::time::{Instant, sleep, sleep_until};

const CHUNK_MS: u64 = 200;
const ATTEMPTS: u32 = 10;

/// Audio of a file: its bytes, what `Asr-Format` says about them, and how many bytes a second takes.
struct Audio {
    bytes: Bytes,
    format: String,
    bytes_per_second: usize,
    frame_bytes: usize,
}

/// A WAV file if it is one, else raw PCM: 16 kHz, mono, signed 16 bit, little endian.
fn load(file: Vec<u8>) -> Result<Audio, Box<dyn Error>> {
    let file = Bytes::from(file);
    if !(file.starts_with(b"RIFF") && file.get(8..12) == Some(b"WAVE")) {
        return Ok(audio(file, 16_000, 1));
    }
    let (mut at, mut described) = (12, None);
    while let Some(head) = file.get(at..at + 8) {
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let body = file.slice((at + 8).min(file.len())..(at + 8 + length).min(file.len()));
        match (&head[..4], described) {
            (b"fmt ", _) if body.len() >= 16 => {
                let bits = u16::from_le_bytes([body[14], body[15]]);
                if bits != 16 {
                    return Err(format!("{bits} bits a sample, only 16 here").into());
                }
                let rate = u32::from_le_bytes([body[4], body[5], body[6], body[7]]);
                described = Some((rate as usize, usize::from(u16::from_le_bytes([body[2], body[3]]))));
            }
            (b"data", Some((rate, channels))) => return Ok(audio(body, rate, channels)),
            _ => {}
        }
        at += 8 + length + length % 2;
    }
    Err("no audio in this WAV file".into())
}

fn audio(bytes: Bytes, rate: usize, channels: usize) -> Audio {
    let frame_bytes = 2 * channels.max(1);
    let format = format!("pcm_s16le;rate={rate};channels={channels}");
    Audio { bytes, format, bytes_per_second: rate * frame_bytes, frame_bytes }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: producer FILE [URL] [SESSION]")?;
    let url = arguments.next().unwrap_or_else(|| "nats://127.0.0.1:4222".to_owned());
    // New for each start, so that a restarted producer is not taken for a repetition of itself.
    let source = uuid::Uuid::new_v4().simple().to_string();
    let session = arguments.next().unwrap_or_else(|| format!("rust-{}", &source[..8]));
    let audio = load(std::fs::read(path)?)?;

    let client = async_nats::connect(url).await?;
    let js = jetstream::new(client.clone());
    let subject = format!("asr.v1.audio.{session}");
    let step = (audio.bytes_per_second * CHUNK_MS as usize / 1000 / audio.frame_bytes).max(1) * audio.frame_bytes;
    let started = Instant::now();
    let (mut sent, mut seq) = (0, 0u64);
    loop {
        let end = (sent + step).min(audio.bytes.len());
        let chunk = audio.bytes.slice(sent..end);
        // The last message is empty and ends the session.
        let last = chunk.is_empty();
        let mut headers = HeaderMap::new();
        headers.insert("Asr-Source", source.as_str());
        headers.insert("Asr-Seq", seq.to_string());
        headers.insert("Asr-Format", audio.format.as_str());
        headers.insert("Nats-Msg-Id", format!("{session}:{source}:{seq}"));
        if last {
            headers.insert("Asr-End", "1");
        }
        // A chunk is ready when its last sample has been spoken.
        sleep_until(started + Duration::from_secs_f64(end as f64 / audio.bytes_per_second as f64)).await;
        publish(&js, &subject, headers, chunk).await?;
        if last {
            break;
        }
        (sent, seq) = (end, seq + 1);
    }
    println!("session {session}: {seq} chunks");
    client.drain().await?;
    Ok(())
}

/// Until JetStream says that it is stored.
async fn publish(
    js: &jetstream::Context,
    subject: &str,
    headers: HeaderMap,
    chunk: Bytes,
) -> Result<(), Box<dyn Error>> {
    for attempt in 1.. {
        let stored = async { js.publish_with_headers(subject.to_owned(), headers.clone(), chunk.clone()).await?.await };
        match stored.await {
            Ok(_) => break,
            Err(error) if attempt == ATTEMPTS => return Err(error.into()),
            Err(error) => eprintln!("not acknowledged ({error}), sending it again"),
        }
        sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}
